"""Reward functions of a user's own, as the tests load them: each behaves in one way."""

import asyncio
import math
import threading

from reward_server import RetryLater, Reward

calls: list[dict[str, object]] = []
gate = threading.Event()
async_cancelled = threading.Event()


def record(prompts, completions, **columns):
    calls.append({"prompts": prompts, "completions": completions, **columns})
    return [float(len(completion)) for completion in completions]


def lengths(completions):
    return [len(completion) for completion in completions]


def with_column(completions, *, weight, bonus=0.5):
    return [len(completion) * float(each) + bonus for completion, each in zip(completions, weight, strict=True)]


def by_token(completions, completion_ids):
    return [
        Reward(1.0, components={"tokens": len(ids)}, token_rewards=[0.5] * len(ids))
        for _, ids in zip(completions, completion_ids, strict=True)
    ]


def by_word(completions):
    """What each completion asks for."""
    answers = {"nan": math.nan, "inf": -math.inf, "none": None, "text": "high", "true": True, "huge": 10**400}
    return [answers.get(completion, 1.0) for completion in completions]


def too_few(completions):
    return [0.0] * (len(completions) - 1)


def not_a_list(completions):
    return "0.5"


def raises(completions):
    raise KeyError("no such thing")


def exits(completions):
    raise SystemExit(3)


def later(completions):
    raise RetryLater(2.5, "the judge sleeps")


def waits(completions):
    """Until the test opens the gate."""
    calls.append({"completions": completions})
    assert gate.wait(30)
    return [1.0] * len(completions)


async def asynchronous(completions):
    calls.append({"completions": completions})
    await asyncio.sleep(0)
    return [2.0] * len(completions)


async def asynchronous_forever(completions):
    calls.append({"completions": completions})
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        async_cancelled.set()
        raise


def ranks(completions, group_ids, *, weight=0.0):
    """Of each completion, how many of its group are shorter."""
    calls.append({"completions": completions, "group_ids": group_ids})
    return [
        float(sum(len(other) < len(own) for other, g in zip(completions, group_ids, strict=True) if g == group))
        for own, group in zip(completions, group_ids, strict=True)
    ]


class Scaled:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, completions):
        return [self.scale] * len(completions)


def positional_only(completions, extra, /):
    return [0.0] * len(completions)


def no_completions(texts):
    return [0.0] * len(texts)


NOT_A_FUNCTION = 3

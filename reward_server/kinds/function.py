"""The function kind: a Python function called as TRL calls its reward functions.

`f(prompts, completions, completion_ids=…, messages=…, group_ids=…, **columns) -> list[float | None]`, where `columns`
are the prompts' other columns as lists. Everything goes by keyword, and only what the function accepts.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from reward_server.kinds import Description, Limits, RewardKind, Sample, Scope
from reward_server.kinds.groups import fail_whole_groups
from reward_server.kinds.loading import RESERVED_PARAMETERS, LoadedFunction
from reward_server.results import Abstained, Failed, FailureCode, Outcome, Pending, RetryLater, Reward, Scored
from reward_server.workers import WorkerThreads
from rlhf.logs import get_logger

_log = get_logger(__name__)


class FunctionReward(RewardKind):
    """Calls a reward function and judges what it answers.

    A plain function runs in one of `limits.threads` worker threads; an async one on the event loop, at most
    `limits.concurrency` calls at once.
    """

    kind = "function"

    def __init__(self, function: LoadedFunction, limits: Limits) -> None:
        self._function = function
        self._workers = None if function.is_async else WorkerThreads(limits.threads, name="reward")
        self.concurrency = limits.concurrency if function.is_async else limits.threads
        self.batch_size = limits.batch_size
        self.stoppable = function.is_async
        self.description = Description(
            name=function.name,
            version=function.version,
            required_metadata=function.required_columns,
            needs_token_ids=function.takes_token_ids,
            scope=Scope.GROUP if function.compares else Scope.SAMPLE,
        )

    async def score(self, samples: Sequence[Sample], answer_by: float | None) -> list[Outcome]:
        """One outcome per sample, in order. Samples that lack something the function needs never reach it."""
        outcomes: list[Outcome | None] = [self._lacks(sample) for sample in samples]
        if self._function.compares:
            outcomes = fail_whole_groups([sample.group_id for sample in samples], outcomes)
        judged = [sample for sample, refused in zip(samples, outcomes, strict=True) if refused is None]
        answers = iter(await self._judge(judged) if judged else ())
        return [next(answers) if refused is None else refused for refused in outcomes]

    def _lacks(self, sample: Sample) -> Failed | None:
        for column in self._function.required_columns:
            if column not in sample.metadata:
                return Failed(FailureCode.MISSING_METADATA, f"the reward needs the column {column!r}")
        if self._function.takes_token_ids and sample.completion and not sample.completion_ids:
            return Failed(FailureCode.MISSING_TOKEN_IDS, "the reward needs completion_token_ids")
        return None

    async def _judge(self, samples: Sequence[Sample]) -> list[Outcome]:
        call = partial(self._function.call, **self._arguments(samples))
        try:
            answer = await (self._workers.run(call) if self._workers else call())
        except RetryLater as later:
            _log.info("the reward function asks to come back", seconds=later.seconds, reason=str(later))
            return [Pending(later.seconds)] * len(samples)
        except Exception as error:
            _log.exception("the reward function raised", samples=len(samples))
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            return [Failed(FailureCode.FUNCTION_RAISED, message)] * len(samples)
        return _judgements(answer, samples)

    def _arguments(self, samples: Sequence[Sample]) -> dict[str, Any]:
        columns = {name for sample in samples for name in sample.metadata} | self._function.parameters
        arguments: dict[str, Any] = {
            name: [sample.metadata.get(name) for sample in samples]
            for name in columns.difference(RESERVED_PARAMETERS)
            # A parameter with a default keeps it when no sample has the column.
            if self._function.accepts(name) and any(name in sample.metadata for sample in samples)
        }
        given = {
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.completion for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
            "messages": [list(sample.messages) for sample in samples],
            "group_ids": [sample.group_id for sample in samples],
        }
        arguments.update({name: value for name, value in given.items() if self._function.accepts(name)})
        return arguments


def _judgements(answer: Any, samples: Sequence[Sample]) -> list[Outcome]:
    """What the function's return value means for each sample; wrong as a whole fails them all."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, (str, bytes, Mapping)) or not isinstance(answer, Sequence):
        message = f"the reward function returned {type(answer).__name__}, not a list with one reward per completion"
        return [Failed(FailureCode.WRONG_RESULT, message)] * len(samples)
    if len(answer) != len(samples):
        message = f"the reward function returned {len(answer)} rewards for {len(samples)} completions"
        return [Failed(FailureCode.WRONG_RESULT, message)] * len(samples)
    return [_judgement(item, sample) for item, sample in zip(answer, samples, strict=True)]


def _judgement(item: Any, sample: Sample) -> Outcome:
    if type(item) is float and math.isfinite(item):  # what nearly every function returns
        return Scored(item)
    if item is None:
        return Abstained("the reward function returned None")
    reward = item if isinstance(item, Reward) else Reward(item)
    try:
        value = _number(reward.value, "the reward")
        components = {str(name): _number(part, f"component {name!r}") for name, part in reward.components.items()}
        tokens = [_number(part, f"token reward {index}") for index, part in enumerate(reward.token_rewards)]
    except ValueError as error:
        return Failed(FailureCode.NOT_FINITE, str(error))
    except (TypeError, AttributeError) as error:
        return Failed(FailureCode.WRONG_RESULT, str(error))
    wrong = _wrong_token_rewards(tokens, sample) if tokens else None
    return wrong or Scored(value, components, tokens)


def _number(value: Any, what: str) -> float:
    """`value` as a finite float. Raises TypeError for what is no number, ValueError for NaN and infinities."""
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, not a finite number")
    return number


# Token rewards travel as 32-bit floats.
_FLOAT32_MAX = 3.4028234663852886e38


def _wrong_token_rewards(tokens: Sequence[float], sample: Sample) -> Failed | None:
    if len(tokens) != len(sample.completion_ids):
        return Failed(
            FailureCode.WRONG_RESULT,
            f"{len(tokens)} token rewards for {len(sample.completion_ids)} completion tokens"
            " (a function that returns token rewards must take completion_ids)",
        )
    for index, part in enumerate(tokens):
        if abs(part) > _FLOAT32_MAX:
            return Failed(FailureCode.NOT_FINITE, f"token reward {index} is {part}, beyond a 32-bit float")
        sampled = not sample.sampled_ranges or any(first <= index < past for first, past in sample.sampled_ranges)
        if part and not sampled:
            return Failed(
                FailureCode.WRONG_RESULT, f"token reward {index} lies outside the sampled tokens and is not 0"
            )
    return None

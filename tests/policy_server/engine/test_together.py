"""Everything at once: what must hold whatever the timing is."""

from __future__ import annotations

import asyncio
import random

import pytest

from policy_server.engine.batch import BatchEngine
from policy_server.engine.protocol import FinishReason, InFlight, ScoringRequest, WeightsPrecondition, WeightsVersion
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import loaded, make_model
from tests.policy_server.engine.harness import Watcher, generate, request, running, until

pytestmark = pytest.mark.usefixtures("each_engine")

ROUNDS = 40


@pytest.mark.parametrize(("architecture", "reproducible"), [("gpt2", False), ("gemma2", False), ("gpt2", True)])
async def test_requests_scores_swaps_and_cancellations_leave_nothing_behind(
    architecture: str, reproducible: bool
) -> None:
    watcher = Watcher()
    source = random.Random(7)
    models = loaded(make_model(architecture))
    weights = dict(make_model(architecture, seed=1).named_parameters())
    async with running(
        models, max_batch_rows=6, max_queue_requests=1000, score_tokens=64, reproducible=reproducible, observer=watcher
    ) as engine:
        finished = await asyncio.gather(
            *(_one(engine, source, index) for index in range(ROUNDS)),
            _swap_again_and_again(engine, source, weights),
        )
        await until(lambda: watcher.rows == 0 and watcher.waiting == 0)
        await generate(engine, request([1], max_new_tokens=2))
        assert not engine._worker._open
        assert engine._queue._waiting == 0
    assert watcher.most_rows <= 6
    assert {"generated", "scored", "cancelled"} <= set(finished)


async def _one(engine: BatchEngine, source: random.Random, index: int) -> str:
    prompt = [source.randrange(256) for _ in range(source.randint(1, 25))]
    kind = source.choice(["generate", "generate", "generate exactly", "score", "cancel"])
    n, length, patience = source.randint(1, 9), source.randint(1, 30), source.choice([0.0, 0.01, 0.05])
    if kind == "score":
        sequences = [(prompt, [1, 2, 3])] * n
        scores = await engine.log_probs(ScoringRequest(f"{index}", "policy", sequences))
        assert [len(each) for each in scores.logprobs] == [3] * n
        return "scored"
    live = engine.describe("policy").weights
    exact = WeightsPrecondition(exact=live) if kind == "generate exactly" else WeightsPrecondition()
    asked = request(prompt, name=f"{index}", n=n, max_new_tokens=length, seed=index, weights=exact)
    if kind == "cancel":
        try:
            async with asyncio.timeout(patience):
                await generate(engine, asked)
        except TimeoutError:
            return "cancelled"
        return "generated"
    try:
        completions = await generate(engine, asked)
    except RpcFailure as failure:
        assert kind == "generate exactly"
        return failure.reason
    for completion in completions:
        count = len(completion.token_ids)
        assert count == len(completion.raw_logprobs) == sum(span.token_count for span in completion.spans)
        assert count == length or completion.finish_reason in (FinishReason.EOS, FinishReason.ABORTED)
        if kind == "generate exactly":
            assert {span.weights for span in completion.spans} <= {live}
    return "generated"


async def _swap_again_and_again(engine: BatchEngine, source: random.Random, weights: dict[str, object]) -> str:
    for number, in_flight in enumerate(source.sample(list(InFlight), 4) + source.sample(list(InFlight), 4), start=1):
        version = WeightsVersion("run", 1, number)
        assert await engine.load_weights(weights, version, if_current=None, in_flight=in_flight) == version  # type: ignore[arg-type]
    return "swapped"

"""Random updates while many requests run: every token has the log-probability that its span's weights give it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import grpc
import pytest
import torch

from policy_server.engine.batch import BatchEngine
from policy_server.engine.protocol import (
    FinishReason,
    GenerationRequest,
    InFlight,
    Priority,
    Scores,
    ScoringRequest,
    WeightsVersion,
)
from rlhf.failures import RpcFailure
from tests.policy_server.engine.architectures import EOS, loaded, make_model
from tests.policy_server.engine.harness import Gathered, Watcher, generate, request, running, until
from tests.policy_server.engine.replaying import Ledger, Passage, generated, largest_difference, scored

TOLERANCE = 1e-4
AT_ONCE = 64
ROWS = 12


@dataclass
class Answers:
    """What came back."""

    generations: list[tuple[GenerationRequest, list[Gathered]]] = field(default_factory=list)
    scores: list[tuple[ScoringRequest, Scores]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.generations) + len(self.scores)


class Writer:
    """Loads random updates, some of them stale, and writes down those that must have gone live."""

    def __init__(self, engine: BatchEngine, ledger: Ledger, *, updates: int, seed: int) -> None:
        self._engine = engine
        self._ledger = ledger
        self._source = random.Random(seed)
        self._random = torch.Generator().manual_seed(seed)
        self._ways = [way for way in InFlight for _ in range(-(-updates // len(InFlight)))]
        self._source.shuffle(self._ways)
        self.stale = 0

    @property
    def left(self) -> int:
        return len(self._ways)

    async def write(self) -> None:
        """Load an update, or a few without waiting between them; now and then one that comes too late."""
        burst = [self._ways.pop() for _ in range(min(self._source.choice([1, 1, 2, 3]), self.left))]
        loads = [asyncio.create_task(self._load(way)) for way in burst]
        await asyncio.gather(*loads)
        if self._source.random() < 0.2:
            await self._load_stale()

    async def _load(self, in_flight: InFlight) -> None:
        names = self._ledger.names
        if self._source.random() < 0.4:
            names = self._source.sample(names, self._source.randint(1, len(names) - 1))
        tensors = {name: self._like(self._ledger.swaps[0].weights[name]) for name in names}
        live = self._ledger.swaps[-1].version
        version = WeightsVersion("run", max(live.incarnation, 1), live.version + self._source.randint(1, 3))
        if self._source.random() < 0.1:
            version = WeightsVersion("run", live.incarnation + 1, 0)
        self._ledger.record(version, in_flight, tensors)  # before another of the burst asks what will be live
        assert version == await self._engine.load_weights(tensors, version, if_current=None, in_flight=in_flight)

    async def _load_stale(self) -> None:
        self.stale += 1
        old = self._source.choice([swap.version for swap in self._ledger.swaps if swap.version.run_id])
        tensors = {name: self._like(tensor) for name, tensor in self._ledger.swaps[0].weights.items()}
        in_flight = self._source.choice(list(InFlight))
        with pytest.raises(RpcFailure) as caught:
            await self._engine.load_weights(tensors, old, if_current=None, in_flight=in_flight)
        assert caught.value.code is grpc.StatusCode.ABORTED

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=self._random)
        return tensor.mean() + (tensor.std() + 0.1) * noise


async def ask(engine: BatchEngine, source: random.Random, index: int, answers: Answers) -> None:
    prompt = [source.randrange(256) for _ in range(source.randint(1, 20))]
    if source.random() < 0.1:
        sequences = [(prompt, [source.randrange(256) for _ in range(source.randint(1, 20))]) for _ in range(4)]
        scoring = ScoringRequest(f"{index}", "policy", sequences)
        answers.scores.append((scoring, await engine.log_probs(scoring)))
        return
    asked = request(
        prompt,
        name=f"{index}",
        n=source.choice([1, 1, 1, 2, 4]),
        seed=source.getrandbits(64),
        temperature=source.choice([0.0, 0.7, 1.0, 1.3]),
        top_k=source.choice([0, 20]),
        max_new_tokens=source.randint(4, 30),
        completion_prefix=source.choice([(), (), (7, 8, 9)]),
        priority=source.choice(list(Priority)),
        stream_interval=source.choice([1, 4, 100]),
    )
    answers.generations.append((asked, await generate(engine, asked)))


async def ask_all(engine: BatchEngine, count: int, answers: Answers) -> None:
    source = random.Random(1)
    places = asyncio.Semaphore(AT_ONCE)

    async def one(index: int) -> None:
        try:
            await ask(engine, random.Random(source.random()), index, answers)
        finally:
            places.release()

    async with asyncio.TaskGroup() as group:
        for index in range(count):
            await places.acquire()
            group.create_task(one(index))


@pytest.mark.parametrize(
    ("updates", "requests"), [(20, 200), pytest.param(200, 2000, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
async def test_every_token_of_a_swapped_engine_is_of_the_weights_that_its_span_names(
    architecture: str, updates: int, requests: int
) -> None:
    watcher = Watcher()
    ledger = Ledger(make_model(architecture))
    answers = Answers()
    settings = {"max_batch_rows": ROWS, "score_tokens": 128, "observer": watcher}
    async with running(loaded(make_model(architecture)), **settings) as engine:
        writer = Writer(engine, ledger, updates=updates, seed=2)
        asking = asyncio.create_task(ask_all(engine, requests, answers))
        while writer.left:
            due = requests * (len(ledger.swaps) - 1) // (updates + 2)
            await until(lambda due=due: len(answers) >= due or asking.done())  # type: ignore[misc]
            await writer.write()
        await asking
        await until(lambda: watcher.rows == 0 and watcher.waiting == 0)
        assert engine.describe("policy").weights == ledger.swaps[-1].version
    assert len(ledger.swaps) == updates + 1
    assert writer.stale > 0

    assert len(answers) == requests
    passages = [passage for asked, scores in answers.scores for passage in scored(asked, scores)]
    for asked, completions in answers.generations:
        for completion in completions:
            passages.append(generated(asked, completion, ledger))
            check_end(asked, completion, ledger)
    check_coverage(passages, answers)
    difference = largest_difference(passages, ledger, make_model(architecture))
    assert difference < TOLERANCE


def check_end(asked: GenerationRequest, completion: Gathered, ledger: Ledger) -> None:
    """It ended as it was asked to, or by an ABORT that came before anything that it would have to end before."""
    length = len(asked.completion_prefix) + len(completion.token_ids)
    if completion.finish_reason is FinishReason.ABORTED:
        if not completion.token_ids:
            return  # while its prompt was read
        after = [swap.in_flight for swap in ledger.after(completion.spans[-1].weights)]
        assert next(way for way in after if way in (InFlight.ABORT, InFlight.WAIT)) is InFlight.ABORT
    elif completion.finish_reason is FinishReason.EOS:
        assert completion.token_ids[-1] == EOS
    else:
        assert completion.finish_reason is FinishReason.LENGTH
        assert length == asked.sampling.max_new_tokens


def check_coverage(passages: list[Passage], answers: Answers) -> None:
    """The load was such that swaps of every kind met what they are about."""
    completions = [completion for _, each in answers.generations for completion in each]
    assert any(len(passage.epochs) > 1 for passage in passages), "nothing was recomputed"
    assert any(len(epoch) > 1 for passage in passages for epoch in passage.epochs), "no cache was kept"
    assert any(each.finish_reason is FinishReason.ABORTED for each in completions), "nothing was aborted"
    assert len({scores.weights for _, scores in answers.scores}) > 1, "all scores are of one version"

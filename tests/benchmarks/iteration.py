"""Seconds of a PPO step: three processes over gRPC against one, a slow reward, and rollouts that run ahead."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from policy_server.engine.batch import BatchEngine
from policy_server.engine.loading import load_models
from policy_server.engine.protocol import GenerationRequest, InFlight, Sampling, ScoringRequest, WeightsVersion
from tests.benchmarks.measuring import make_table
from tests.benchmarks.roofline import Limits
from tests.support.processes import ProcessUnderTest, StartProcess, as_flags
from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The first step meets cold caches, the second, ahead, a pipeline that was empty.
WARM_UP = 2

_REWARD = """
import threading, time
ONE_AT_A_TIME = threading.Lock()
def reward(prompts, completions, **columns):
    with ONE_AT_A_TIME:
        time.sleep({seconds} * len(completions))
    return [sum(text.count(letter) for letter in "aeiou ") / (1 + len(text)) for text in completions]
"""
ONE = "one process"
THREE = "three processes"
SLOW = "slow reward"  # as slow as generation
PINNED = "CPUs apart"
AHEAD = "staleness 1"
_COMPARED_WITH = {SLOW: THREE, AHEAD: PINNED}
_PHASES = ("rollout", "learn", "publish")


@dataclass(frozen=True)
class Work:
    """What a step rolls out and learns, and how often."""

    samples: int = 32
    prompt_tokens: int = 16
    new_tokens: int = 64
    epochs: int = 1
    steps: int = 6
    """Of a run, with the first WARM_UP, which don't count."""
    rounds: int = 2

    @property
    def mini_batch(self) -> int:
        """Samples."""
        return self.samples // 4


@dataclass(frozen=True)
class Iteration:
    """Seconds from the end of a step to that of the next, and of its phases; the rollout's are those it is waited for.

    What no phase has is what happens between them: accounting and reports.
    """

    step: float
    phases: Mapping[str, float]


@dataclass(frozen=True)
class Iterations:
    """By alternative, all steps of all rounds."""

    work: Work
    steps: Mapping[str, list[Iteration]]
    reward_seconds: float
    """What the slow reward takes for a step's samples."""

    def seconds(self, name: str, phase: str | None = None) -> float:
        """The median over steps, of the whole or of one phase."""
        return statistics.median(each.step if phase is None else each.phases[phase] for each in self.steps[name])

    def faster(self, name: str) -> float:
        """Steps per second against those of the alternative that it is compared with."""
        return self.seconds(_COMPARED_WITH.get(name, ONE)) / self.seconds(name)

    def show(self) -> None:
        """Print the table."""
        work = self.work
        table = make_table(
            f"iteration: {work.samples} prompts x {work.prompt_tokens} tokens, {work.new_tokens} new tokens, "
            f"{work.epochs} epoch(s)",
            *("", "s a step", *_PHASES, "steps/s", "to"),
        )
        for name in self.steps:
            cells = [f"{self.seconds(name, phase):.2f}" for phase in _PHASES]
            ratio = f"{self.faster(name):.2f} x"
            table.add_row(name, f"{self.seconds(name):.2f}", *cells, ratio, _COMPARED_WITH.get(name, ONE))
        console = Console()
        console.print(table)
        console.print(f"the slow reward takes {self.reward_seconds:.2f} s for a step's completions")

    def record(self) -> dict[str, Any]:
        """See Report."""
        return {
            "settings": asdict(self.work),
            "steps": {name: [asdict(each) for each in steps] for name, steps in self.steps.items()},
            "medians": {name: self.seconds(name) for name in self.steps},
            "ratios": {name: self.faster(name) for name in self.steps},
            "reward_seconds": self.reward_seconds,
        }

    def draw(self, figure: Figure) -> None:
        """See Report."""
        axes = figure.subplots()
        names = list(self.steps)
        left = [0.0] * len(names)
        for phase in _PHASES:
            widths = [self.seconds(name, phase) for name in names]
            axes.barh(names, widths, left=left, label=phase)
            left = [begin + width for begin, width in zip(left, widths, strict=True)]
        axes.scatter([self.seconds(name) for name in names], names, color="black", label="step")
        axes.invert_yaxis()
        axes.set(title="a step", xlabel="seconds")
        axes.legend()

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        at_best = max(self.seconds(THREE, "rollout"), self.reward_seconds) + self._rest(THREE)
        reached = {
            f"the one process's rate: {THREE}": self.faster(THREE),
            f"the rate at max(generation, reward) + learning: {SLOW}": at_best / self.seconds(SLOW),
        }
        if AHEAD in self.steps:
            overlapped = max(self.seconds(PINNED, "rollout"), self._rest(PINNED))
            reached[f"perfect overlap's {self.seconds(PINNED) / overlapped:.2f} x: {AHEAD}"] = (
                overlapped / self.seconds(AHEAD)
            )
        return reached

    def _rest(self, name: str) -> float:
        """What a step takes beside its rollout."""
        return self.seconds(name) - self.seconds(name, "rollout")


async def measure(folder: Path, start: StartProcess, threads: int, work: Work | None = None) -> Iterations:
    """The alternatives in turn; the servers stay, each run of the trainer is a process of its own.

    With more than one CPU, servers and trainer are also put on halves of their own, where they can overlap.
    """
    work = work or Work()
    data = folder.parent / "prompts.jsonl"
    rows = ({"prompt": f"{row:0{work.prompt_tokens}d}"} for row in range(work.samples * work.steps * 2))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = _Runs(folder, data, start, work)
    together = await runs.servers(threads)
    steps: dict[str, list[Iteration]] = {ONE: [], THREE: []}
    cpus = sorted(os.sched_getaffinity(0))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :])
    apart = await runs.servers(len(halves[0]), cpus=halves[0]) if halves[0] else None
    slow: ProcessUnderTest | None = None
    reward_seconds = 0.0
    for _ in range(work.rounds):
        steps[ONE] += await _in_one_process(folder, work)
        steps[THREE] += await runs.train(*together, threads=threads)
        if slow is None:
            reward_seconds = statistics.median(each.phases["rollout"] for each in steps[THREE])
            slow = await runs.reward(seconds=reward_seconds / work.samples)
        steps.setdefault(SLOW, []).extend(await runs.train(together[0], slow, threads=threads))
        if apart is not None:
            for name, staleness in ((PINNED, 0), (AHEAD, 1)):
                pinned = await runs.train(*apart, threads=len(halves[1]), cpus=halves[1], max_staleness=staleness)
                steps.setdefault(name, []).extend(pinned)
    return Iterations(work, steps, reward_seconds)


class _Runs:
    """Starts servers and trainers, on the CPUs that are named."""

    def __init__(self, folder: Path, data: Path, start: StartProcess, work: Work) -> None:
        self._work = work
        self._folder = folder
        self._data = data
        self._start = start
        self._count = 0

    async def servers(
        self, threads: int, cpus: Sequence[int] | None = None
    ) -> tuple[ProcessUnderTest, ProcessUnderTest]:
        """A policy server and a reward server."""
        flags = ("--model", str(self._folder), "--managed", "--threads", str(threads))
        policy = self._start("policy_server", *flags)
        _pin(policy, cpus)
        policy.wait_serving("rlhf.weights.v1.WeightsService")
        return policy, await self.reward(seconds=0.0, cpus=cpus)

    async def reward(self, *, seconds: float, cpus: Sequence[int] | None = None) -> ProcessUnderTest:
        """A reward server that takes so long for each sample, without a CPU."""
        self._count += 1
        source = self._folder.parent / f"reward_{self._count}.py"
        source.write_text(_REWARD.format(seconds=seconds))
        server = self._start("reward_server", "--reward", f"{source}:reward")
        _pin(server, cpus)
        server.wait_serving("rlhf.reward.v1.RewardService")
        return server

    async def train(
        self,
        policy: ProcessUnderTest,
        reward: ProcessUnderTest,
        *,
        threads: int,
        cpus: Sequence[int] | None = None,
        max_staleness: int = 0,
    ) -> list[Iteration]:
        """The steps of a run, but for the first WARM_UP."""
        self._count += 1
        run_dir = self._folder.parent / f"run_{self._count}"
        work = self._work
        values = {
            "model": self._folder,
            "policy_server": policy.address,
            "reward_server": reward.address,
            "data": self._data,
            "run_dir": run_dir,
            "steps": work.steps,
            "batch_size": work.samples,
            "mini_batch_size": work.mini_batch,
            "ppo_epochs": work.epochs,
            "max_new_tokens": work.new_tokens,
            "eval_prompts": 0,
            "save_every": work.steps,
            "threads": threads,
            "max_staleness": max_staleness,
        }
        trainer = self._start("trainer", *as_flags(values), listen=None)
        _pin(trainer, cpus)
        ends: list[float] = []
        while True:
            code = trainer.poll()  # before the file is read, which is whole once this is no longer None
            lines = metrics.read_text().splitlines() if (metrics := run_dir / "metrics.jsonl").exists() else []
            ends += [time.perf_counter()] * (len(lines) - len(ends))
            if code is not None:
                break
            await asyncio.sleep(0.01)
        if code != 0:
            raise RuntimeError(trainer.log_text()[-4000:])
        steps = [json.loads(line) for line in lines]
        return [
            Iteration(
                # At least the trainer's own part of it, if two lines were seen at once.
                max(ends[step] - ends[step - 1], steps[step]["time/step"]),
                {phase: steps[step][f"time/{phase}"] for phase in _PHASES},
            )
            for step in range(WARM_UP, work.steps)
        ]


def _pin(process: ProcessUnderTest, cpus: Sequence[int] | None) -> None:
    """As taskset does; at once, before it starts threads, which inherit it."""
    if cpus is not None:
        os.sched_setaffinity(process.pid, cpus)


async def _in_one_process(folder: Path, work: Work) -> list[Iteration]:
    """The same engine, reward and learner, called one after the other."""
    models = load_models(str(folder), None, dtype=torch.float32, device="cpu", reproducible=False)
    learner = PPOLearner(
        AutoModelForCausalLMWithValueHead.from_pretrained(folder),
        PPOConfig(batch_size=work.samples, mini_batch_size=work.mini_batch, ppo_epochs=work.epochs),
        reference=None,
        tokenizer_pad_id=0,
    )
    engine = BatchEngine(models)
    judge: dict[str, object] = {}
    exec(_REWARD.format(seconds=0.0), judge)
    await engine.start()
    try:
        return [await _one_step(engine, learner, judge["reward"], step, work) for step in range(work.steps)][WARM_UP:]
    finally:
        await engine.stop(finish_within=0)


async def _one_step(engine: BatchEngine, learner: PPOLearner, reward: object, step: int, work: Work) -> Iteration:
    assert callable(reward)
    began = time.perf_counter()
    # A byte is a token.
    prompts = [
        tuple(b"%0*d" % (work.prompt_tokens, row)) for row in range(step * work.samples, (step + 1) * work.samples)
    ]

    async def complete(row: int) -> tuple[list[int], list[float], str]:
        ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        request = GenerationRequest(
            request_id=f"{step}-{row}",
            model="policy",
            prompt_token_ids=prompts[row],
            sampling=Sampling(max_new_tokens=work.new_tokens, seed=step * work.samples + row),
            processed_logprobs=True,
            stream_interval=work.new_tokens,
        )
        async with aclosing(engine.submit(request)) as deltas:
            async for delta in deltas:
                ids += delta.token_ids
                logprobs += delta.processed_logprobs
                text += delta.text
        return ids, logprobs, text

    completions = await asyncio.gather(*(complete(row) for row in range(work.samples)))
    sequences = [(prompt, ids) for prompt, (ids, _, _) in zip(prompts, completions, strict=True)]
    reference = await engine.log_probs(ScoringRequest(f"reference-{step}", "reference", sequences))
    scores = reward([""] * work.samples, [text for _, _, text in completions])
    rolled_out = time.perf_counter()
    batch = RolloutBatch(
        queries=[torch.tensor(prompt) for prompt in prompts],
        responses=[torch.tensor(ids) for ids, _, _ in completions],
        scores=torch.tensor(scores),
        reference_logprobs=[torch.tensor(row) for row in reference.logprobs],
        rollout_logprobs=[torch.tensor(logprobs) for _, logprobs, _ in completions],
    )
    await asyncio.to_thread(learner.step, batch)
    learned = time.perf_counter()
    tensors = {name: parameter.detach() for name, parameter in learner.policy_parameters()}
    await engine.load_weights(
        tensors,
        WeightsVersion("run", 1, step + 1),
        if_current=None if step else WeightsVersion(),
        in_flight=InFlight.WAIT,
    )
    ended = time.perf_counter()
    phases = dict(zip(_PHASES, (rolled_out - began, learned - rolled_out, ended - learned), strict=True))
    return Iteration(ended - began, phases)

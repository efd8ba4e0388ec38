"""Seconds of a PPO step: three processes over gRPC against one, a slow reward, and rollouts that run ahead."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from policy_server.engine.batch import BatchEngine
from policy_server.engine.loading import load_models
from policy_server.engine.protocol import GenerationRequest, InFlight, Sampling, ScoringRequest, WeightsVersion
from tests.support.processes import ProcessUnderTest, StartProcess
from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.ppo.config import PPOConfig

SAMPLES, PROMPT_TOKENS, NEW_TOKENS, EPOCHS = 32, 16, 64, 1
STEPS, WARM_UP, ROUNDS = 5, 2, 2

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
class Iteration:
    """Seconds of one step and of its phases; the rollout's are those that the step waits for it."""

    step: float
    phases: Mapping[str, float]


@dataclass(frozen=True)
class Iterations:
    """By alternative, all steps of all rounds."""

    steps: Mapping[str, list[Iteration]]

    def seconds(self, name: str, phase: str | None = None) -> float:
        """The median over steps, of the whole or of one phase."""
        return statistics.median(each.step if phase is None else each.phases[phase] for each in self.steps[name])

    def show(self) -> None:
        """Print the table, and what overlap could give at most."""
        table = Table(
            title=f"iteration: {SAMPLES} prompts x {PROMPT_TOKENS} tokens, {NEW_TOKENS} new tokens, {EPOCHS} epoch"
        )
        for heading in ("", "s a step", *_PHASES, "steps/s", "to"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name in self.steps:
            against = _COMPARED_WITH.get(name, ONE)
            cells = [f"{self.seconds(name, phase):.2f}" for phase in _PHASES]
            rate = self.seconds(against) / self.seconds(name)
            table.add_row(name, f"{self.seconds(name):.2f}", *cells, f"{rate:.2f} x", against)
        console = Console()
        console.print(table)
        if PINNED in self.steps:
            whole, rollout = self.seconds(PINNED), self.seconds(PINNED, "rollout")
            console.print(f"perfect overlap would be {whole / max(rollout, whole - rollout):.2f} x {PINNED}")


async def measure(folder: Path, start: StartProcess, threads: int) -> Iterations:
    """The alternatives in turn, ROUNDS times; the servers stay, each run of the trainer is a process of its own."""
    data = folder.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{row:0{PROMPT_TOKENS}d}"}) + "\n" for row in range(512)))
    runs = _Runs(folder, data, start)
    together = await runs.servers(threads)
    steps: dict[str, list[Iteration]] = {ONE: [], THREE: []}
    cpus = sorted(os.sched_getaffinity(0))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :])
    apart = await runs.servers(len(halves[0]), cpus=halves[0]) if halves[0] else None
    slow: ProcessUnderTest | None = None
    for _ in range(ROUNDS):
        steps[ONE] += await _in_one_process(folder)
        steps[THREE] += await runs.train(*together, threads=threads)
        if slow is None:
            rollout = statistics.median(each.phases["rollout"] for each in steps[THREE])
            slow = await runs.reward(seconds=rollout / SAMPLES)
        steps.setdefault(SLOW, []).extend(await runs.train(together[0], slow, threads=threads))
        if apart is not None:
            for name, staleness in ((PINNED, 0), (AHEAD, 1)):
                pinned = await runs.train(*apart, threads=len(halves[1]), cpus=halves[1], max_staleness=staleness)
                steps.setdefault(name, []).extend(pinned)
    return Iterations(steps)


class _Runs:
    """Starts servers and trainers, on the CPUs that are named."""

    def __init__(self, folder: Path, data: Path, start: StartProcess) -> None:
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
        """The steps of a run, but for the first, which meet cold caches and, ahead, an empty pipeline."""
        self._count += 1
        run_dir = self._folder.parent / f"run_{self._count}"
        values = {
            "model": self._folder,
            "policy-server": policy.address,
            "reward-server": reward.address,
            "data": self._data,
            "run-dir": run_dir,
            "steps": STEPS,
            "batch-size": SAMPLES,
            "mini-batch-size": SAMPLES // 4,
            "ppo-epochs": EPOCHS,
            "max-new-tokens": NEW_TOKENS,
            "eval-prompts": 0,
            "save-every": STEPS,
            "threads": threads,
            "max-staleness": max_staleness,
        }
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        trainer = self._start("trainer", *flags, listen=None)
        _pin(trainer, cpus)
        if await asyncio.to_thread(trainer.wait_exit, 600) != 0:
            raise RuntimeError(trainer.log_text()[-4000:])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [
            Iteration(line["time/step"], {phase: line[f"time/{phase}"] for phase in _PHASES})
            for line in lines[WARM_UP:]
        ]


def _pin(process: ProcessUnderTest, cpus: Sequence[int] | None) -> None:
    """As taskset does; at once, before it starts threads, which inherit it."""
    if cpus is not None:
        os.sched_setaffinity(process.pid, cpus)


async def _in_one_process(folder: Path) -> list[Iteration]:
    """The same engine, reward and learner, called one after the other."""
    models = load_models(str(folder), None, dtype=torch.float32, device="cpu", reproducible=False)
    learner = PPOLearner(
        AutoModelForCausalLMWithValueHead.from_pretrained(folder),
        PPOConfig(batch_size=SAMPLES, mini_batch_size=SAMPLES // 4, ppo_epochs=EPOCHS),
        reference=None,
        tokenizer_pad_id=0,
    )
    engine = BatchEngine(models)
    judge: dict[str, object] = {}
    exec(_REWARD.format(seconds=0.0), judge)
    await engine.start()
    try:
        return [await _one_step(engine, learner, judge["reward"], step) for step in range(STEPS)][WARM_UP:]
    finally:
        await engine.stop(finish_within=0)


async def _one_step(engine: BatchEngine, learner: PPOLearner, reward: object, step: int) -> Iteration:
    assert callable(reward)
    began = time.perf_counter()
    # A byte is a token.
    prompts = [tuple(b"%0*d" % (PROMPT_TOKENS, row)) for row in range(step * SAMPLES, (step + 1) * SAMPLES)]

    async def complete(row: int) -> tuple[list[int], list[float], str]:
        ids: list[int] = []
        logprobs: list[float] = []
        text = ""
        request = GenerationRequest(
            request_id=f"{step}-{row}",
            model="policy",
            prompt_token_ids=prompts[row],
            sampling=Sampling(max_new_tokens=NEW_TOKENS, seed=step * SAMPLES + row),
            processed_logprobs=True,
            stream_interval=NEW_TOKENS,
        )
        async with aclosing(engine.submit(request)) as deltas:
            async for delta in deltas:
                ids += delta.token_ids
                logprobs += delta.processed_logprobs
                text += delta.text
        return ids, logprobs, text

    completions = await asyncio.gather(*(complete(row) for row in range(SAMPLES)))
    sequences = [(prompt, ids) for prompt, (ids, _, _) in zip(prompts, completions, strict=True)]
    reference = await engine.log_probs(ScoringRequest(f"reference-{step}", "reference", sequences))
    scores = reward([""] * SAMPLES, [text for _, _, text in completions])
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

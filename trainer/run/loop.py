"""The run: draw prompts → roll out → learn → publish, with evaluations and checkpoints at step boundaries."""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlhf import tracing
from rlhf.logs import bound_context, get_logger
from trainer.clients.fleet import PolicyFleet
from trainer.clients.rewards import Scored
from trainer.learning.batch import RolloutBatch
from trainer.learning.learner import PPOLearner
from trainer.metrics import TrainerMetrics
from trainer.run.agreement import Agreement
from trainer.run.checkpoints import CheckpointStore, RunState, save_model
from trainer.run.heldout import logprobs_of, sample_line, summarize
from trainer.run.journal import Journal
from trainer.run.progress import Progress
from trainer.run.prompts import Cursor, Draw, Prompt, PromptSource
from trainer.run.records import RunRecords, accounting_lines, scalars
from trainer.run.rollouts import Rollout, RolloutCollector
from trainer.run.seeds import derive_seed
from trainer.run.stopping import StopSignal
from trainer.run.tracking import Tracker
from trainer.versions import WeightsVersion

_log = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What is done when."""

    steps: int
    batch_size: int
    eval_every: int
    save_every: int
    sample_lines: int
    seed: int
    max_staleness: int
    oversample: float
    merge_adapter: bool

    @property
    def draws(self) -> int:
        """Prompts that are rolled out for a step."""
        return math.ceil(self.batch_size * (1 + self.oversample))


@dataclass(frozen=True)
class Parts:
    """What the loop drives; each is ready to use."""

    tokenizer: Any
    learner: PPOLearner
    served_reference: bool
    prompts: PromptSource
    held_out: Sequence[Prompt]
    policy: PolicyFleet
    collector: RolloutCollector
    agreement: Agreement
    checkpoints: CheckpointStore
    best_folder: Path
    journal: Journal
    records: RunRecords
    trackers: Sequence[Tracker]
    metrics: TrainerMetrics
    progress: Progress


@dataclass(frozen=True)
class _Export:
    """A learner's model as a run leaves it behind: an adapter merged into the weights, or alone."""

    learner: PPOLearner
    merge_adapter: bool

    def save_pretrained(self, folder: Path) -> None:
        self.learner.save_pretrained(folder, merge_adapter=self.merge_adapter)


@dataclass(frozen=True)
class _Begun:
    """A step's rollouts, under way: `draws` take the prompts up to `cursor`."""

    step: int
    draws: Sequence[Draw]
    cursor: Cursor
    rollouts: asyncio.Task[list[Rollout | None]]
    span: tracing.Span


class TrainingLoop:
    """Runs the plan from `state` on. `state` always describes a step boundary, whatever interrupts the run."""

    def __init__(self, plan: Plan, parts: Parts, state: RunState, stop: StopSignal) -> None:
        self.state = state
        self._plan = plan
        self._parts = parts
        self._stop = stop
        self._learning = False
        self._best_written: int | None = None
        self._begun: deque[_Begun] = deque()
        self._seconds: dict[str, float] = {}
        self._whole_length: float | None = None
        # One thread makes every torch call, so that signals, displays and retries stay alive meanwhile.
        self._model_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    @property
    def at_boundary(self) -> bool:
        """Whether model and learner are what `state` says: not while, or after, a learner's step that was cut short."""
        return not self._learning

    async def run(self) -> None:
        """Until the last step's checkpoint is written. Raises Stopped at a step boundary."""
        try:
            await self._run()
        finally:
            await self._abandon_rollouts()

    async def _run(self) -> None:
        self._parts.metrics.steps_planned.set(self._plan.steps)
        self._parts.metrics.incarnation.set(self.state.incarnation)
        self._parts.metrics.step.set(self.state.completed_step)
        self._parts.progress.resumed_at(self.state.completed_step)
        self._show_checkpoint()
        with self._phase("publish"):
            await self._stop.interruptible(self._publish())
        await self._stop.interruptible(self._require_agreement())
        while True:
            if self._evaluation_is_due():
                with self._phase("evaluate"):
                    await self._evaluate()
            step = self.state.completed_step
            finished = step >= self._plan.steps
            if finished or self._is_best() or (step and step % self._plan.save_every == 0):
                await self.save()
            if finished:
                return
            with bound_context(step=self.state.completed_step + 1), self._step_span():
                await self._train_one_step()

    async def save(self) -> None:
        """Write a checkpoint of the boundary that the run is at, and, if that is the best, the model by itself."""
        with self._phase("checkpoint"):
            self.state = replace(self.state, log_offsets=self._parts.records.sync())
            await self._in_model_thread(self._write_checkpoint)
            if self._is_best() and self._best_written != self.state.best_step:
                await self._in_model_thread(lambda: self._write_model(self._parts.best_folder))
                self._best_written = self.state.best_step
            await self._parts.journal.forget(before=self._parts.checkpoints.oldest_step())
        self._parts.metrics.checkpoints.inc()
        self._show_checkpoint()

    def _show_checkpoint(self) -> None:
        """Tell the metrics which checkpoint a kill would go back to."""
        newest, metrics = self._parts.checkpoints.latest(), self._parts.metrics
        if newest is None:
            metrics.checkpoint_timestamp.set_to_current_time()
            return
        metrics.checkpoint_timestamp.set(newest.stat().st_mtime)
        metrics.checkpoint_bytes.set(sum(file.stat().st_size for file in newest.rglob("*") if file.is_file()))

    async def export(self, folder: Path) -> None:
        """Write the model as it is, and its tokenizer, to `folder`."""
        with self._phase("export"):
            await self._in_model_thread(lambda: self._write_model(folder))

    async def _train_one_step(self) -> None:
        started = time.monotonic()
        step = self.state.completed_step + 1
        self._begin_rollouts()
        begun = self._begun[0]
        with self._phase("rollout", traced=False):
            outcome = await self._stop.interruptible(_result(begun.rollouts))
        self._begun.popleft()
        rollouts = [rollout for rollout in outcome if rollout is not None]
        trained = [rollout for rollout in rollouts if isinstance(rollout.outcome, Scored)]
        numbers: dict[str, float | None] = {}
        if trained:
            with self._phase("learn"):
                batch = _batch(trained, self.state.version)
                tracing.annotate(samples=len(trained))
                self._learning = True
                numbers = scalars(await self._in_model_thread(lambda: self._parts.learner.step(batch)))
                self._learning = False
            # Tokens of older weights are as far off as the policy has moved since.
            if numbers["rollout/staleness_max"] == 0:
                self._parts.agreement.watch(numbers.get("rollout/logprob_gap_mean"))
        self.state = replace(
            self.state,
            completed_step=step,
            version=self.state.version + bool(trained),
            cursor=begun.cursor,
        )
        try:
            # Nothing changed without a sample, so there is nothing to publish.
            if trained:
                with self._phase("publish"):
                    await self._stop.interruptible(self._publish())
        finally:
            # The step is made, whatever became of its publish.
            self._report_step(step, begun.draws, outcome, numbers, seconds=time.monotonic() - started)

    def _begin_rollouts(self) -> None:
        """Begin those of the next step, and those of later steps that may be trained on what is published now.

        Each step publishes once at most, so tokens of today's version are stale by as many versions as steps lie
        between. The prompts belong to the run only once a step is made: a resumed run draws the same ones again.
        """
        after = self.state.completed_step
        for step in range(
            after + len(self._begun) + 1, min(after + 1 + self._plan.max_staleness, self._plan.steps) + 1
        ):
            cursor = self._begun[-1].cursor if self._begun else self.state.cursor
            draws, cursor = self._parts.prompts.draw(cursor, self._plan.draws)
            version = self.state.version + (step - after - 1) - self._plan.max_staleness
            oldest = replace(self._weights(), version=max(0, version))
            span = self._rollout_span(step, draws, oldest)
            rollouts = asyncio.create_task(self._roll_out(step, draws, oldest, span))
            self._begun.append(_Begun(step, draws, cursor, rollouts, span))

    def _step_span(self) -> tracing.Span:
        """Of the step that begins now; linked to its rollouts if they have begun already."""
        ahead = [begun.span.context for begun in list(self._begun)[:1]]
        return tracing.span("step", links=ahead, incarnation=self.state.incarnation, version=self.state.version)

    def _rollout_span(self, step: int, draws: Sequence[Draw], oldest: WeightsVersion) -> tracing.Span:
        """A child of its step's; in a trace of its own, linked to the current step's, when it is for a later step."""
        ahead = step > self.state.completed_step + 1
        links = [tracing.here()] if ahead else []
        return tracing.span(
            "rollout", root=ahead, links=links, step=step, prompts=len(draws), oldest_version=oldest.version
        )

    async def _roll_out(
        self, step: int, draws: Sequence[Draw], oldest: WeightsVersion, span: tracing.Span
    ) -> list[Rollout | None]:
        prompts = [draw.prompt for draw in draws if draw.dropped is None]

        def on_generated(done: int, of: int) -> None:
            if step == self.state.completed_step + 1:
                self._parts.progress.count(done, of)

        with bound_context(step=step), span:
            return await self._parts.collector.collect(
                prompts,
                name=str(step),
                step=step,
                seeds=[derive_seed(self._plan.seed, "rollout", step, row, 0) for row in range(len(prompts))],
                weights=oldest,
                or_later=self._plan.max_staleness > 0,
                enough=self._plan.batch_size if self._plan.oversample > 0 else None,
                on_generated=on_generated,
            )

    async def _abandon_rollouts(self) -> None:
        tasks = [begun.rollouts for begun in self._begun]
        self._begun.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _publish(self) -> None:
        learner = self._parts.learner
        await self._parts.policy.publish(learner.policy_parameters(), self._weights(), frozen=learner.frozen_parameters)
        self._parts.metrics.publishes.inc()
        self._parts.metrics.weights_version.set(self.state.version)

    async def _require_agreement(self) -> None:
        """The server's log-probabilities of the weights just published must be the trainer's, before any is used."""
        agreement = self._parts.agreement
        ours = await self._in_model_thread(lambda: agreement.probe.logprobs_by(self._parts.learner))
        _log.info("log-probabilities agree", gaps=await agreement.require(ours, self._weights()))

    def _evaluation_is_due(self) -> bool:
        step, every = self.state.completed_step, self._plan.eval_every
        if not self._parts.held_out or self.state.evaluated_step == step:
            return False
        return step in (0, self._plan.steps) or (every > 0 and step % every == 0)

    async def _evaluate(self) -> None:
        step = self.state.completed_step
        started = time.monotonic()
        everyone = await self._stop.interruptible(
            self._parts.collector.collect(
                self._parts.held_out,
                name=f"evaluation-{step}",
                step=step,
                seeds=[derive_seed(self._plan.seed, "evaluation", row) for row in range(len(self._parts.held_out))],
                weights=self._weights(),
                on_generated=self._parts.progress.count,
            )
        )
        rollouts = [rollout for rollout in everyone if rollout is not None]
        result = summarize(rollouts, await self._reference_logprobs(rollouts))
        self._whole_length = result.length_mean
        best = self.state.best_reward
        if result.reward_mean is not None and (best is None or result.reward_mean > best):
            self.state = replace(self.state, best_reward=result.reward_mean, best_step=step)
            _log.info("the best evaluation so far", step=step, reward_mean=result.reward_mean)
        numbers = asdict(result)
        self._parts.records.metrics.write(
            {
                "kind": "evaluation",
                "step": step,
                "incarnation": self.state.incarnation,
                **numbers,
                "seconds": time.monotonic() - started,
            }
        )
        for rollout in rollouts:
            self._parts.records.samples.write(sample_line("evaluation", step, rollout))
        self.state = replace(self.state, evaluated_step=step)
        prefixed = {f"evaluation/{name}": value for name, value in numbers.items()}
        self._parts.metrics.set_statistics(prefixed)
        self._track(step, prefixed)
        self._parts.progress.evaluated(step, numbers)

    async def _reference_logprobs(self, rollouts: Sequence[Rollout]) -> Sequence[Sequence[float] | None]:
        if self._parts.served_reference:
            return [rollout.reference_logprobs for rollout in rollouts]
        return await self._in_model_thread(lambda: logprobs_of(self._parts.learner, rollouts))

    def _report_step(
        self,
        step: int,
        draws: Sequence[Draw],
        outcome: Sequence[Rollout | None],
        numbers: dict[str, float | None],
        *,
        seconds: float,
    ) -> None:
        parts = self._parts
        rollouts = [rollout for rollout in outcome if rollout is not None]
        lines = accounting_lines(step, draws, outcome)
        for line in lines:
            parts.records.accounting.write(line)
        dropped = Counter(line["reason"] for line in lines if line["outcome"] == "dropped")
        failed = Counter(line["code"] for line in lines if "code" in line)
        for (reason, code), count in Counter(
            (line["reason"], line.get("code", "")) for line in lines if line["outcome"] == "dropped"
        ).items():
            parts.metrics.count_dropped(reason, code, count)
        tokens = sum(len(rollout.generation.token_ids) for rollout in rollouts)
        components = _reward_components(rollouts)
        numbers = {**numbers, **_rollout_statistics(rollouts)}
        if self._plan.oversample > 0:
            numbers |= self._straggler_statistics(len(outcome) - len(rollouts), len(outcome), rollouts)
        parts.metrics.set_statistics(numbers)
        parts.metrics.set_reward_components(components)
        numbers |= {
            **{f"reward/{name}": value for name, value in components.items()},
            "samples/trained": len(lines) - dropped.total(),
            "samples/dropped": dropped.total(),
            **{f"samples/dropped_{reason}": count for reason, count in dropped.items()},
            **{f"samples/failed_{code}": count for code, count in failed.items()},
            **{f"time/{phase}": duration for phase, duration in self._seconds.items()},
            "time/step": seconds,
            "throughput/tokens_per_second": tokens / seconds,
        }
        # Here rather than where a step begins: an evaluation and a checkpoint count to the step that follows them.
        self._seconds.clear()
        parts.records.metrics.write(
            {
                "kind": "step",
                "step": step,
                "incarnation": self.state.incarnation,
                "weights_version": self.state.version,
                **numbers,
            }
        )
        for rollout in rollouts[: self._plan.sample_lines]:
            parts.records.samples.write(sample_line("step", step, rollout))
        parts.metrics.step.set(step)
        parts.metrics.steps_completed.inc()
        parts.metrics.generated_tokens.inc(tokens)
        parts.metrics.tokens_per_second.set(tokens / seconds)
        parts.metrics.samples_trained.inc(len(lines) - dropped.total())
        self._track(step, numbers)
        parts.progress.step_done(step, numbers)

    def _straggler_statistics(self, dropped: int, of: int, kept: Sequence[Rollout]) -> dict[str, float | None]:
        """The share dropped, and how much longer the others are than the last completions of which none was dropped.

        How long a straggler would have become nobody knows: an evaluation, or a step without any, has to tell.
        """
        length = statistics.fmean(len(rollout.generation.token_ids) for rollout in kept)
        if not dropped:
            self._whole_length = length
        return {
            "rollout/straggler_fraction": dropped / of,
            "rollout/straggler_length_bias": None if self._whole_length is None else length - self._whole_length,
        }

    def _track(self, step: int, numbers: dict[str, float | None]) -> None:
        defined = {name: value for name, value in numbers.items() if value is not None}
        for tracker in self._parts.trackers:
            tracker.log(step, defined)

    def _write_checkpoint(self) -> None:
        self._parts.checkpoints.save(
            self.state,
            model=self._parts.learner,
            tokenizer=self._parts.tokenizer,
            learner_state=self._parts.learner.state_dict(),
        )

    def _write_model(self, folder: Path) -> None:
        save_model(
            folder,
            step=self.state.completed_step,
            model=_Export(self._parts.learner, merge_adapter=self._plan.merge_adapter),
            tokenizer=self._parts.tokenizer,
        )

    def _is_best(self) -> bool:
        """Whether no evaluation had a higher reward; what the run began with is no result of it."""
        return 0 < self.state.completed_step == self.state.best_step

    def _weights(self) -> WeightsVersion:
        return WeightsVersion(self.state.run_id, self.state.incarnation, self.state.version)

    async def _in_model_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._model_thread, work)

    @contextlib.contextmanager
    def _phase(self, name: str, *, traced: bool = True) -> Iterator[None]:
        """Measure what happens inside; `traced`: as a span, too."""
        started = time.monotonic()
        span = tracing.span(name, version=self.state.version) if traced else contextlib.nullcontext()
        with self._parts.progress.phase(name), span:
            try:
                yield
            finally:
                seconds = time.monotonic() - started
                self._seconds[name] = seconds
                self._parts.metrics.phase_seconds.labels(phase=name).observe(seconds, tracing.exemplar())


async def _result(task: asyncio.Task[T]) -> T:
    return await task


def _batch(rollouts: Sequence[Rollout], version: int) -> RolloutBatch:
    """What the learner trains on, at `version`; every rollout is Scored."""
    scored = [rollout.outcome for rollout in rollouts if isinstance(rollout.outcome, Scored)]
    lengths = [len(rollout.generation.token_ids) for rollout in rollouts]
    has_token_rewards = any(outcome.token_rewards for outcome in scored)
    references = [rollout.reference_logprobs for rollout in rollouts if rollout.reference_logprobs is not None]
    return RolloutBatch(
        queries=[torch.tensor(rollout.prompt.token_ids, dtype=torch.int64) for rollout in rollouts],
        responses=[torch.tensor(rollout.generation.token_ids, dtype=torch.int64) for rollout in rollouts],
        scores=torch.tensor([outcome.reward for outcome in scored], dtype=torch.float32),
        token_rewards=[
            torch.tensor(outcome.token_rewards or (0.0,) * length, dtype=torch.float32)
            for outcome, length in zip(scored, lengths, strict=True)
        ]
        if has_token_rewards
        else None,
        reference_logprobs=[torch.tensor(row, dtype=torch.float32) for row in references] if references else None,
        rollout_logprobs=[torch.tensor(rollout.generation.logprobs, dtype=torch.float32) for rollout in rollouts],
        staleness=torch.tensor(
            [version - min(weights.version for weights in rollout.generation.versions) for rollout in rollouts]
        ),
    )


def _rollout_statistics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """What is told of a step's rollouts beside the learner's statistics; all samples, trained or dropped."""
    rewards = [rollout.outcome.reward for rollout in rollouts if isinstance(rollout.outcome, Scored)]
    return {
        "reward_mean": statistics.fmean(rewards) if rewards else None,
        "rollout/length_mean": statistics.fmean(len(rollout.generation.token_ids) for rollout in rollouts),
        "rollout/distinct_fraction": len({rollout.generation.token_ids for rollout in rollouts}) / len(rollouts),
    }


def _reward_components(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """The mean of each component over the samples that have it, by name."""
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        if isinstance(rollout.outcome, Scored):
            for name, value in rollout.outcome.components.items():
                values.setdefault(name, []).append(value)
    return {name: statistics.fmean(values[name]) for name in sorted(values)}

"""Rollouts: completions from the policy server, and beside them rewards and reference log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.channel import call_metadata
from rlhf.logs import bound_context
from trainer.clients.policy import REFERENCE, BrokenServerError, FinishReason, Generation, ModelInfo
from trainer.clients.rewards import Outcome, RewardClient, RewardSample, Scored
from trainer.run.prompts import Prompt
from trainer.run.seeds import content_hash
from trainer.versions import WeightsVersion

# Most rows whose reference log-probabilities are asked for in one call.
_REFERENCE_ROWS = 16
_ABORTED_ATTEMPTS = 10


@dataclass(frozen=True)
class Rollout:
    """One prompt, its completion, the reward's answer and the reference's log-probabilities of the completion.

    `outcome` is None for a completion without tokens, which nobody is asked to judge; `reference_logprobs` is None
    then, and when the server's reference isn't used.
    """

    row: int
    prompt: Prompt
    generation: Generation
    sample_id: str
    outcome: Outcome | None
    reference_logprobs: tuple[float, ...] | None


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Only temperature may shape the distribution that PPO trains."""

    temperature: float
    max_new_tokens: int


class Policy(Protocol):
    """What is asked of the policy servers; a call takes as long as it takes."""

    @property
    def target(self) -> str:
        """Who answers, for messages."""
        ...

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        seed: int,
        max_new_tokens: int,
        temperature: float,
        weights: WeightsVersion | None,
        or_later: bool,
        metadata: Sequence[tuple[str, str]],
    ) -> list[Generation]:
        """One completion, all of its tokens under `weights`, or, with or_later, under those or later ones."""
        ...

    async def log_probs(
        self,
        model: str,
        sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        temperature: float,
        metadata: Sequence[tuple[str, str]],
    ) -> list[list[float]]:
        """Log-probabilities of each completion of (prompt ids, completion ids)."""
        ...

    async def get_model(self, model: str) -> ModelInfo:
        """Limits of a model's calls."""
        ...


class RolloutCollector:
    """Sends prompts to the policy server and completions, as they finish, to the reward server and the reference."""

    def __init__(
        self,
        policy: Policy,
        rewards: RewardClient,
        *,
        run_id: str,
        sampling: Sampling,
        concurrency: int,
        served_reference: bool,
    ) -> None:
        """`concurrency` bounds the Generate calls in flight; `served_reference`: ask the server's frozen reference."""
        self._policy = policy
        self._rewards = rewards
        self._run_id = run_id
        self._sampling = sampling
        self._slots = asyncio.Semaphore(concurrency)
        self._served_reference = served_reference

    async def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        name: str,
        step: int,
        seeds: Sequence[int],
        weights: WeightsVersion,
        or_later: bool = False,
        enough: int | None = None,
        on_generated: Callable[[int, int], None],
    ) -> list[Rollout | None]:
        """One rollout per prompt, in order, every token sampled under `weights` with the row's seed.

        or_later: later weights of the run may sample as well, so several collections may run while others are learned
        from; the calls of the one that began first go first. enough: once so many are scored the others are cancelled,
        wherever they are, and None takes their places.
        `name` makes sample and request ids unique within the run (a step's number, say); `step` is for the servers'
        log lines. `on_generated(done, of)` is called as completions arrive. The first error that is not waited out
        cancels the rest and is raised as it is.
        """
        await self._rewards.check_pinned()
        done = scored = 0

        async def generate(row: int) -> Generation:
            nonlocal done
            generation = await self._generate(
                prompts[row], seeds[row], weights, or_later, step=step, row=row, request_id=f"{name}-{row}"
            )
            done += 1
            on_generated(done, len(prompts))
            return generation

        async def judge(row: int) -> tuple[str, Outcome | None]:
            nonlocal scored
            generation = await generations[row]
            sample = self._sample(name, step, row, prompts[row], generation)
            outcome = await self._rewards.score(sample) if generation.token_ids else None
            scored += isinstance(outcome, Scored)
            if scored == enough:
                cancel_stragglers(but=row)
            return sample.sample_id, outcome

        def cancel_stragglers(*, but: int) -> None:
            for row in range(len(prompts)):
                if row != but and not judgements[row].done():
                    for tasks_of in (generations, judgements, references):
                        if tasks_of:
                            tasks_of[row].cancel()

        async def refer(rows: range) -> list[tuple[float, ...] | None]:
            finished = [await generations[row] for row in rows]
            return await self._refer(
                [prompts[row] for row in rows], finished, step=step, request_id=f"{name}-reference-{rows.start}"
            )

        groups = await self._reference_groups(prompts) if self._served_reference else []
        if enough is not None:
            # Rows of a group wait for each other, which would make all of them stragglers.
            groups = [range(row, row + 1) for group in groups for row in group]
        try:
            async with asyncio.TaskGroup() as tasks:
                generations = [tasks.create_task(generate(row)) for row in range(len(prompts))]
                judgements = [tasks.create_task(judge(row)) for row in range(len(prompts))]
                references = [tasks.create_task(refer(rows)) for rows in groups]
        except BaseExceptionGroup as errors:
            raise _first(errors) from None
        logprobs = {
            row: logprobs
            for rows, reference in zip(groups, references, strict=True)
            if not reference.cancelled()
            for row, logprobs in zip(rows, reference.result(), strict=True)
        }
        return [
            None
            if judgement.cancelled()
            else Rollout(row, prompts[row], generations[row].result(), *judgement.result(), logprobs.get(row))
            for row, judgement in enumerate(judgements)
        ]

    async def _reference_groups(self, prompts: Sequence[Prompt]) -> list[range]:
        """The rows of each LogProbs call, by what they may come to hold and never by who finished first.

        A request's rows may share a padded batch, whose shape changes the last bits.
        """
        served = await self._policy.get_model(REFERENCE)
        longest = [len(prompt.token_ids) + self._sampling.max_new_tokens for prompt in prompts]
        return list(served.log_probs_groups(longest, rows=_REFERENCE_ROWS))

    async def _generate(
        self,
        prompt: Prompt,
        seed: int,
        weights: WeightsVersion,
        or_later: bool,
        *,
        step: int,
        row: int,
        request_id: str,
    ) -> Generation:
        async with self._slots:
            for _ in range(_ABORTED_ATTEMPTS):
                with bound_context(request_id=request_id):
                    (generation,) = await self._policy.generate(
                        prompt.token_ids,
                        seed=seed,
                        temperature=self._sampling.temperature,
                        max_new_tokens=self._sampling.max_new_tokens,
                        weights=weights,
                        or_later=or_later,
                        metadata=call_metadata(run_id=self._run_id, step=step, request_id=request_id),
                    )
                # Ended early by the server; the same seed under the same weights gives the whole completion.
                if generation.finish_reason is not FinishReason.ABORTED:
                    break
            else:
                raise BrokenServerError(
                    f"policy server {self._policy.target} aborted the completion of row {row} {_ABORTED_ATTEMPTS} times"
                )
        for version in generation.versions:
            if version != weights and not (or_later and version.is_after(weights)):
                raise BrokenServerError(
                    f"policy server {self._policy.target} was asked for {weights}{' or later' if or_later else ''} and "
                    f"sampled row {row} with {version}"
                )
        return generation

    async def _refer(
        self, prompts: Sequence[Prompt], generations: Sequence[Generation], *, step: int, request_id: str
    ) -> list[tuple[float, ...] | None]:
        sequences = [
            (prompt.token_ids, generation.token_ids)
            for prompt, generation in zip(prompts, generations, strict=True)
            if generation.token_ids
        ]
        if not sequences:
            return [None] * len(prompts)
        with bound_context(request_id=request_id):
            rows = await self._policy.log_probs(
                REFERENCE,
                sequences,
                temperature=self._sampling.temperature,
                metadata=call_metadata(run_id=self._run_id, step=step, request_id=request_id),
            )
        answers = iter(rows)
        return [tuple(next(answers)) if generation.token_ids else None for generation in generations]

    def _sample(self, name: str, step: int, row: int, prompt: Prompt, generation: Generation) -> RewardSample:
        turns = prompt.messages
        return RewardSample(
            sample_id=f"{self._run_id}/{name}/{row}/{content_hash(prompt.token_ids, generation.token_ids)}",
            prompt=prompt.text,
            completion=generation.text,
            completion_ids=generation.token_ids,
            finish_reason=generation.finish_reason,
            metadata=prompt.record.metadata,
            json_keys=prompt.record.json_keys,
            messages=[*turns, {"role": "assistant", "content": generation.text}] if turns is not None else (),
            step=step,
            request_id=f"{name}-{row}",
        )


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error

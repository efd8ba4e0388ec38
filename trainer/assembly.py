"""Builds a run's parts from its settings, brings the servers to where the run is, and runs the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.accelerator import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.channel import call_metadata
from rlhf.fingerprints import tokenizer_digest, weights_digest
from rlhf.logs import bound_context, get_logger
from trainer.checkpoints import (
    CheckpointStore,
    Pins,
    RunState,
    load_learner_state,
    load_state,
    realign_parameters,
    save_model,
)
from trainer.clients.policy import PolicyClient
from trainer.clients.rewards import RewardClient
from trainer.learner import PPOLearner
from trainer.loop import Parts, Plan, TrainingLoop
from trainer.metrics import TrainerMetrics
from trainer.model import AutoModelForCausalLMWithValueHead
from trainer.pinning import check_pins, check_policy_server, served_reference_digest
from trainer.progress import Progress
from trainer.prompts import Prompt, PromptSource, Record, encode, load_records
from trainer.publisher import WeightPublisher
from trainer.records import RunRecords
from trainer.rollouts import RolloutCollector, Sampling
from trainer.runfolder import RunIdentity, next_identity, store_identity
from trainer.seeds import derive_seed
from trainer.settings import ReferencePlace, TrainerSettings
from trainer.stopping import Stopped, StopSignal
from trainer.tracking import open_trackers
from trainer.waiting import WaitBoard

_log = get_logger(__name__)


class SettingsError(ValueError):
    """Settings that fit neither each other nor the model or the data; the message says what to change."""


@dataclass
class _Servers:
    """The clients of one run; `pins` is set as soon as it is known what the run is held to."""

    policy: PolicyClient
    publisher: WeightPublisher
    rewards: RewardClient
    pins: Pins | None = None


@dataclass(frozen=True)
class _Local:
    """What this process loads: the policy being trained and what goes with it."""

    model: AutoModelForCausalLMWithValueHead
    tokenizer: Any
    tokenizer_digest: str
    reference: PreTrainedModel | None
    max_prompt_tokens: int
    training: Sequence[Record]
    held_out: Sequence[Prompt]


async def run(settings: TrainerSettings, *, metrics: TrainerMetrics, progress: Progress, waits: WaitBoard) -> int:
    """One start of a run, until it is finished or stopped; returns the exit code.

    The caller holds the lock of the run's folder.
    """
    stop = StopSignal()
    stop.listen()
    identity = next_identity(settings.run_dir, run_id=settings.run_id, resume=settings.resume)
    checkpoints = CheckpointStore(settings.run_dir / "checkpoints", keep=settings.keep_checkpoints)
    checkpoint = checkpoints.latest()
    stored = load_state(checkpoint) if checkpoint is not None else None
    if stored is not None and stored.completed_step >= settings.steps and (settings.run_dir / "model").exists():
        _log.info("the run is finished already", steps=stored.completed_step, model=str(settings.run_dir / "model"))
        return 0
    _prepare_torch(settings)
    with bound_context(run_id=identity.run_id):
        local = await asyncio.to_thread(_load, settings, checkpoint)
        store_identity(settings.run_dir, identity)
        async with _connected(settings, identity, local, waits) as servers:
            try:
                state = await stop.interruptible(_state_at_start(settings, identity, stored, local, servers))
            except Stopped:
                return stop.exit_code
            with contextlib.closing(RunRecords(settings.run_dir, state.log_offsets)) as records:
                loop = _build_loop(
                    settings, state, checkpoint, local, servers, checkpoints, records, metrics, progress, stop
                )
                return await _run_loop(loop, settings.run_dir / "model", local, stop)


async def _run_loop(loop: TrainingLoop, model_folder: Path, local: _Local, stop: StopSignal) -> int:
    try:
        await loop.run()
    except Stopped:
        await loop.save()
        _log.info("stopped with a checkpoint; --resume goes on", step=loop.state.completed_step)
        return stop.exit_code
    except Exception:
        if loop.at_boundary:
            await loop.save()
        raise
    await asyncio.to_thread(save_model, model_folder, model=local.model, tokenizer=local.tokenizer)
    _log.info("finished", steps=loop.state.completed_step, model=str(model_folder))
    return 0


def _prepare_torch(settings: TrainerSettings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.reproducible:
        torch.use_deterministic_algorithms(True)
    # A fresh value head draws its weights here.
    torch.manual_seed(derive_seed(settings.seed, "model"))


def _load(settings: TrainerSettings, checkpoint: Path | None) -> _Local:
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    source = str(checkpoint or settings.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(source)
    realign_parameters(model)
    reference = None
    if settings.reference is ReferencePlace.TRAINER:
        reference = AutoModelForCausalLM.from_pretrained(
            settings.reference_model or settings.model, dtype=torch.float32
        )
        realign_parameters(reference)
    max_prompt_tokens = _max_prompt_tokens(settings, _context_tokens(model))
    training, held_out = _records(settings)
    return _Local(
        model=model,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(tokenizer),
        reference=reference,
        max_prompt_tokens=max_prompt_tokens,
        training=training,
        held_out=_usable([encode(record, tokenizer) for record in held_out], max_prompt_tokens),
    )


def _records(settings: TrainerSettings) -> tuple[Sequence[Record], Sequence[Record]]:
    """Training records and held-out ones, which are the same rows at every start of the run."""
    records = load_records(settings.data, column=settings.prompt_column, split=settings.data_split)
    if settings.eval_prompts == 0:
        return records, []
    if settings.eval_data is not None:
        others = load_records(settings.eval_data, column=settings.prompt_column, split=settings.eval_split)
        return records, others[: settings.eval_prompts]
    # PromptSource's permutation is the one whose order never changes; pass -1 is never trained on.
    count = min(settings.eval_prompts, len(records) // 5)
    order = sorted(range(len(records)), key=lambda row: derive_seed(settings.seed, "held out", row))
    held_out = set(order[:count])
    return [record for record in records if record.row not in held_out], [records[row] for row in order[:count]]


def _usable(prompts: Sequence[Prompt], max_prompt_tokens: int) -> list[Prompt]:
    usable = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= max_prompt_tokens]
    if len(usable) < len(prompts):
        _log.warning("held-out prompts that are empty or too long are left out", count=len(prompts) - len(usable))
    return usable


def _context_tokens(model: AutoModelForCausalLMWithValueHead) -> int | None:
    tokens = getattr(model.pretrained_model.config, "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) else None


def _logit_columns(model: AutoModelForCausalLMWithValueHead) -> int:
    head = model.pretrained_model.get_output_embeddings()  # type: ignore[no-untyped-call]
    columns: int = head.weight.shape[0]
    return columns


def _max_prompt_tokens(settings: TrainerSettings, context: int | None) -> int:
    if context is None:
        if settings.max_prompt_tokens is None:
            raise SettingsError("the model states no context length: give --max-prompt-tokens")
        return settings.max_prompt_tokens
    room = context - settings.max_new_tokens
    if room < 1:
        raise SettingsError(
            f"max_new_tokens ({settings.max_new_tokens}) leaves no room for a prompt: the model's context is {context}"
        )
    if settings.max_prompt_tokens is None:
        return room
    if settings.max_prompt_tokens > room:
        raise SettingsError(
            f"max_prompt_tokens ({settings.max_prompt_tokens}) + max_new_tokens ({settings.max_new_tokens}) is more "
            f"than the model's context of {context}"
        )
    return settings.max_prompt_tokens


@contextlib.asynccontextmanager
async def _connected(
    settings: TrainerSettings, identity: RunIdentity, local: _Local, waits: WaitBoard
) -> AsyncIterator[_Servers]:
    def on_wait(on: str) -> Any:
        return lambda waiting: waits.waiting(on, waiting.target, waiting.reason)

    def on_answer(on: str) -> Any:
        return lambda: waits.answered(on)

    async def check_new_server() -> None:
        # A server that was started again may be another: the reference or the tokenizer of another folder.
        await _check_server(settings, local, servers)

    metadata = call_metadata(run_id=identity.run_id)
    common: dict[str, Any] = {"on_wait": on_wait("policy"), "on_answer": on_answer("policy"), "metadata": metadata}
    publisher = WeightPublisher(
        settings.policy_server, timeout=settings.publish_timeout, on_new_server=check_new_server, **common
    )
    policy = PolicyClient(settings.policy_server, timeout=settings.policy_timeout, recover=publisher.ensure, **common)
    rewards = RewardClient(
        settings.reward_server,
        run_id=identity.run_id,
        timeout=settings.reward_timeout,
        on_wait=on_wait("reward"),
        on_answer=on_answer("reward"),
        metadata=metadata,
    )
    servers = _Servers(policy, publisher, rewards)
    try:
        yield servers
    finally:
        await asyncio.gather(policy.close(), publisher.close(), rewards.close())


async def _state_at_start(
    settings: TrainerSettings, identity: RunIdentity, stored: RunState | None, local: _Local, servers: _Servers
) -> RunState:
    """Wait for both servers, hold them to what the run began with, and say where the run is."""
    servers.pins = stored.pins if stored is not None else None
    await servers.publisher.wait_ready()
    reference_digest = await _check_server(settings, local, servers)
    info = await servers.rewards.pin(servers.pins.reward_version if servers.pins is not None else None)
    columns = {key for record in local.training for key in record.metadata}
    if missing := sorted(set(info.required_metadata) - columns):
        raise SettingsError(
            f"reward {info.name!r} needs the column(s) {', '.join(missing)}; {settings.data} has "
            f"{', '.join(sorted(columns)) or 'none beside the prompt'}"
        )
    if stored is not None:
        return replace(stored, incarnation=identity.incarnation)
    servers.pins = Pins(reference_digest, local.tokenizer_digest, info.version)
    return RunState(run_id=identity.run_id, incarnation=identity.incarnation, pins=servers.pins)


async def _check_server(settings: TrainerSettings, local: _Local, servers: _Servers) -> str:
    """Check the policy server against the run and return the digest of the reference that the run uses."""
    await check_policy_server(
        servers.policy,
        tokenizer_digest=local.tokenizer_digest,
        vocab_size=_logit_columns(local.model),
        context_tokens=local.max_prompt_tokens + settings.max_new_tokens,
    )
    if local.reference is not None:
        digest = weights_digest(local.reference.named_parameters(), torch.float32)
    else:
        digest = await served_reference_digest(servers.policy)
    if servers.pins is not None:
        check_pins(servers.pins, reference_digest=digest, tokenizer_digest=local.tokenizer_digest)
    return digest


def _build_loop(
    settings: TrainerSettings,
    state: RunState,
    checkpoint: Path | None,
    local: _Local,
    servers: _Servers,
    checkpoints: CheckpointStore,
    records: RunRecords,
    metrics: TrainerMetrics,
    progress: Progress,
    stop: StopSignal,
) -> TrainingLoop:
    learner = PPOLearner(
        local.model,
        settings.ppo_config(),
        reference=local.reference,
        tokenizer_pad_id=local.tokenizer.pad_token_id or 0,
        temperature=settings.temperature,
        old_logprobs=settings.old_logprobs.value,
        accelerator=Accelerator(),
    )
    if checkpoint is not None:
        learner.load_state_dict(load_learner_state(checkpoint))
    collector = RolloutCollector(
        servers.policy,
        servers.rewards,
        run_id=state.run_id,
        sampling=Sampling(settings.temperature, settings.max_new_tokens),
        concurrency=settings.rollout_concurrency,
        served_reference=local.reference is None,
    )
    trackers = open_trackers(
        settings.track,
        run_id=state.run_id,
        folder=settings.run_dir,
        settings=settings.model_dump(mode="json"),
        resumed_step=state.completed_step,
    )
    parts = Parts(
        model=local.model,
        tokenizer=local.tokenizer,
        learner=learner,
        local_reference=local.reference,
        prompts=PromptSource(
            local.training, local.tokenizer, seed=settings.seed, max_prompt_tokens=local.max_prompt_tokens
        ),
        held_out=local.held_out,
        publisher=servers.publisher,
        collector=collector,
        checkpoints=checkpoints,
        records=records,
        trackers=trackers,
        metrics=metrics,
        progress=progress,
    )
    plan = Plan(
        steps=settings.steps,
        batch_size=settings.batch_size,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        sample_lines=settings.sample_lines,
        seed=settings.seed,
        temperature=settings.temperature,
    )
    return TrainingLoop(plan, parts, state, stop)

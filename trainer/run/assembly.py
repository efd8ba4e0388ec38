"""One start of a run: its parts built from the settings, then the loop, to the end or to a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from accelerate.accelerator import Accelerator

from rlhf.config import ProcessSettings, to_yaml
from rlhf.logs import bound_context, get_logger
from trainer.learning.learner import PPOLearner
from trainer.metrics import TrainerMetrics
from trainer.ppo.importance import IMPORTANCE_CAP
from trainer.run.checkpoints import CheckpointStore, RunState, exported_step, load_learner_state, load_state
from trainer.run.loading import Loaded, load
from trainer.run.loop import Parts, Plan, TrainingLoop
from trainer.run.progress import Progress
from trainer.run.prompts import PromptSource
from trainer.run.records import RunRecords
from trainer.run.rollouts import RolloutCollector, Sampling
from trainer.run.runfolder import next_identity, store_identity
from trainer.run.seeds import derive_seed
from trainer.run.servers import Servers
from trainer.run.stopping import Stopped, StopSignal
from trainer.run.tracking import open_trackers
from trainer.run.waiting import WaitBoard
from trainer.settings import TrainerSettings

_log = get_logger(__name__)

# What a later start may set differently without changing a number of the run.
_FREE_TO_CHANGE = frozenset(
    {
        *(name for name in ProcessSettings.model_fields),
        *("run_dir", "run_id", "resume", "model", "policy_server", "reward_server"),
        *("policy_timeout", "reward_timeout", "publish_timeout", "rollout_concurrency"),
        *("steps", "eval_every", "save_every", "keep_checkpoints", "sample_lines", "track"),
    }
)


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
    model_folder = settings.run_dir / "model"
    if (
        stored is not None
        and stored.completed_step >= settings.steps
        and (exported_step(model_folder) == stored.completed_step)
    ):
        _log.info("the run is finished already", steps=stored.completed_step, model=str(model_folder))
        return 0
    with bound_context(run_id=identity.run_id):
        _prepare_torch(settings)
        loaded = await asyncio.to_thread(load, settings, checkpoint)
        store_identity(settings.run_dir, identity)
        _note_settings(settings)
        servers = Servers(settings, identity, loaded, waits, metrics)
        async with servers:
            try:
                pins = await stop.interruptible(servers.hold_to(stored.pins if stored is not None else None))
            except Stopped:
                return stop.exit_code
            begun = stored or RunState(run_id=identity.run_id, incarnation=identity.incarnation, pins=pins)
            state = replace(begun, incarnation=identity.incarnation)
            with _parts(settings, state, loaded, servers, checkpoints, metrics, progress) as parts:
                if checkpoint is not None:
                    parts.learner.load_state_dict(load_learner_state(checkpoint))
                return await _run_loop(TrainingLoop(_plan(settings), parts, state, stop), model_folder, stop)


async def _run_loop(loop: TrainingLoop, model_folder: Path, stop: StopSignal) -> int:
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
    await loop.export(model_folder)
    _log.info("finished", steps=loop.state.completed_step, model=str(model_folder))
    return 0


def _note_settings(settings: TrainerSettings) -> None:
    """Keep the settings beside the run, as a file for --config, and say which have changed since the last start."""
    file = settings.run_dir / "settings.yaml"
    now = settings.model_dump(mode="json")
    before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else now
    changed = {
        name: f"{before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in _FREE_TO_CHANGE and before.get(name) != value
    }
    if changed:
        _log.warning(
            "settings changed since the last start, so the run will not equal an uninterrupted one; the optimizer "
            "and the KL controller go on from the checkpoint all the same",
            **changed,
        )
    file.write_text(to_yaml(settings), encoding="utf-8")


def _prepare_torch(settings: TrainerSettings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.reproducible:
        # cuBLAS reads it when CUDA starts; without it, torch refuses the first matrix product there.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # A fresh value head draws its weights here.
    torch.manual_seed(derive_seed(settings.seed, "model"))


@contextlib.contextmanager
def _parts(
    settings: TrainerSettings,
    state: RunState,
    loaded: Loaded,
    servers: Servers,
    checkpoints: CheckpointStore,
    metrics: TrainerMetrics,
    progress: Progress,
) -> Iterator[Parts]:
    learner = PPOLearner(
        loaded.model,
        settings.ppo_config(),
        reference=loaded.reference,
        tokenizer_pad_id=loaded.tokenizer.pad_token_id or 0,
        temperature=settings.temperature,
        old_logprobs=settings.old_logprobs.value,
        importance_cap=IMPORTANCE_CAP if settings.max_staleness > 0 and settings.importance_sampling else None,
        accelerator=Accelerator(),
    )
    collector = RolloutCollector(
        servers.policy,
        servers.rewards,
        run_id=state.run_id,
        sampling=Sampling(settings.temperature, settings.max_new_tokens),
        concurrency=settings.rollout_concurrency,
        served_reference=loaded.reference is None,
    )
    prompts = PromptSource(
        loaded.training, loaded.tokenizer, seed=settings.seed, max_prompt_tokens=loaded.max_prompt_tokens
    )
    with contextlib.ExitStack() as closing:
        records = closing.enter_context(contextlib.closing(RunRecords(settings.run_dir, state.log_offsets)))
        trackers = open_trackers(
            settings.track,
            run_id=state.run_id,
            folder=settings.run_dir,
            settings=settings.model_dump(mode="json"),
            resumed_step=state.completed_step,
        )
        for tracker in trackers:
            closing.callback(tracker.close)
        yield Parts(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            learner=learner,
            local_reference=loaded.reference,
            prompts=prompts,
            held_out=loaded.held_out,
            policy=servers.policy,
            collector=collector,
            checkpoints=checkpoints,
            records=records,
            trackers=trackers,
            metrics=metrics,
            progress=progress,
        )


def _plan(settings: TrainerSettings) -> Plan:
    return Plan(
        steps=settings.steps,
        batch_size=settings.batch_size,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        sample_lines=settings.sample_lines,
        seed=settings.seed,
        temperature=settings.temperature,
        max_staleness=settings.max_staleness,
        oversample=settings.oversample,
    )

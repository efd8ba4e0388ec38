"""One start of a run: its parts built from the settings, then the loop, to the end or to a checkpoint."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from rlhf.config import ProcessSettings, to_yaml
from rlhf.logs import bound_context, get_logger
from rlhf.metrics import Pulse
from trainer.learning.ranks import ALONE, Ranks
from trainer.metrics import TrainerMetrics
from trainer.run.checkpoints import RunState, load_learner_state
from trainer.run.journal import Journal
from trainer.run.loading import prepare_torch
from trainer.run.loop import Parts, Plan, TrainingLoop
from trainer.run.preflight import Preflight
from trainer.run.progress import Progress
from trainer.run.records import RunRecords
from trainer.run.rollouts import RolloutCollector, Sampling
from trainer.run.runfolder import StorageError, replace_durably, store_identity
from trainer.run.servers import Servers
from trainer.run.start import best_folder, checkpoint_store, find_start, model_folder
from trainer.run.stopping import Stopped, StopSignal
from trainer.run.tracking import open_trackers
from trainer.run.waiting import WaitBoard
from trainer.settings import LoraExport, TrainerSettings

_log = get_logger(__name__)

# What a later start may set differently without changing a number of the run.
_FREE_TO_CHANGE = frozenset(
    {
        *(name for name in ProcessSettings.model_fields),
        *("run_dir", "run_id", "resume", "model", "policy_server", "reward_server"),
        *("policy_timeout", "reward_timeout", "publish_timeout", "rollout_concurrency"),
        *("steps", "eval_every", "save_every", "keep_checkpoints", "sample_lines", "track", "lora_export"),
        *("check", "check_patience", "processes", "max_logprob_gap", "other_reference", "metrics_linger"),
    }
)


async def run(
    settings: TrainerSettings,
    *,
    metrics: TrainerMetrics,
    progress: Progress,
    waits: WaitBoard,
    pulse: Pulse,
    ranks: Ranks = ALONE,
) -> int:
    """One start of a run, until it is finished or stopped, led by this process; returns the exit code.

    The caller holds the lock of the run's folder.
    """
    stop = StopSignal()
    stop.listen()
    pulse.begin()
    start = find_start(settings)
    if start.stored is not None and start.finished:
        _log.info("the run is finished already", steps=start.stored.completed_step, model=str(model_folder(settings)))
        return 0
    identity = start.identity
    with bound_context(run_id=identity.run_id):
        prepare_torch(settings)
        async with Servers(settings, run_id=identity.run_id, watch=waits.watch, metrics=metrics) as servers:
            preflight = Preflight(settings, start, servers, ranks=ranks)
            try:
                await stop.interruptible(preflight.require())
            except Stopped:
                return stop.exit_code
            store_identity(settings.run_dir, identity)
            _note_settings(settings)
            begun = start.stored or RunState(identity.run_id, identity.incarnation, preflight.pins)
            state = replace(begun, incarnation=identity.incarnation)
            resumed_step = start.stored.completed_step if start.stored is not None else None
            journal = Journal(
                settings.run_dir / "journal.jsonl",
                reward_version=state.pins.reward_version,
                on_found=metrics.journal_answers.inc,
            )
            async with contextlib.aclosing(journal):
                with _parts(settings, state, resumed_step, preflight, servers, journal, metrics, progress) as parts:
                    if start.checkpoint is not None:
                        # Gigabytes: the loop turns meanwhile.
                        learned = await asyncio.to_thread(load_learner_state, start.checkpoint)
                        parts.learner.load_state_dict(learned)
                    metrics.describe_run(
                        identity.run_id,
                        settings.run_dir,
                        kl_target=settings.target,
                        logprob_gap_limit=preflight.agreement.limit,
                    )
                    loop = TrainingLoop(_plan(settings), parts, state, stop)
                    code = await _run_loop(loop, model_folder(settings), stop)
        if code == 0 and settings.metrics_port != 0:
            with contextlib.suppress(Stopped):
                await stop.interruptible(_be_seen(metrics, within=settings.metrics_linger))
        return code


async def _be_seen(metrics: TrainerMetrics, *, within: float) -> None:
    """Say that the run is finished, until a scrape has seen it or `within` seconds are over."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    metrics.finish(lambda: loop.call_soon_threadsafe(seen.set))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(seen.wait(), within)


async def _run_loop(loop: TrainingLoop, folder: Path, stop: StopSignal) -> int:
    try:
        await loop.run()
    except Stopped:
        await loop.save()
        _log.info("stopped with a checkpoint; --resume goes on", step=loop.state.completed_step)
        return stop.exit_code
    except StorageError:
        # A checkpoint would be one more write that fails.
        raise
    except Exception:
        # Before the first step there is nothing to keep, and what is wrong may be what a checkpoint would pin.
        if loop.at_boundary and loop.state.completed_step:
            await loop.save()
        raise
    await loop.export(folder)
    _log.info("finished", steps=loop.state.completed_step, model=str(folder))
    return 0


def _note_settings(settings: TrainerSettings) -> None:
    """Keep the settings beside the run, as a file for --config, and say which have changed since the last start."""
    file = settings.run_dir / "settings.yaml"
    now = settings.model_dump(mode="json")
    free = _FREE_TO_CHANGE - {"steps"} if settings.lr_scheduler.ends_at_zero else _FREE_TO_CHANGE
    before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else now
    changed = {
        name: f"{before.get(name)} -> {value}"
        for name, value in now.items()
        if name not in free and before.get(name) != value
    }
    if changed:
        _log.warning(
            "settings changed since the last start, so the run will not equal an uninterrupted one; the optimizer "
            "and the KL controller go on from the checkpoint all the same",
            **changed,
        )
    replace_durably(file, to_yaml(settings).encode())


@contextlib.contextmanager
def _parts(
    settings: TrainerSettings,
    state: RunState,
    resumed_step: int | None,
    preflight: Preflight,
    servers: Servers,
    journal: Journal,
    metrics: TrainerMetrics,
    progress: Progress,
) -> Iterator[Parts]:
    loaded = preflight.model
    collector = RolloutCollector(
        servers.fleet,
        servers.rewards,
        journal,
        run_id=state.run_id,
        sampling=Sampling(settings.temperature, settings.max_new_tokens),
        concurrency=settings.rollout_concurrency,
        served_reference=loaded.reference is None,
    )
    with contextlib.ExitStack() as closing:
        records = closing.enter_context(contextlib.closing(RunRecords(settings.run_dir, state.log_offsets)))
        trackers = open_trackers(
            settings.track,
            run_id=state.run_id,
            folder=settings.run_dir,
            settings=settings.model_dump(mode="json"),
            resumed_step=resumed_step,
        )
        for tracker in trackers:
            closing.callback(tracker.close)
        yield Parts(
            tokenizer=loaded.tokenizer,
            learner=preflight.learner,
            served_reference=loaded.reference is None,
            prompts=preflight.prompts,
            held_out=preflight.held_out,
            policy=servers.fleet,
            collector=collector,
            agreement=preflight.agreement,
            checkpoints=checkpoint_store(settings),
            best_folder=best_folder(settings),
            journal=journal,
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
        max_staleness=settings.max_staleness,
        oversample=settings.oversample,
        merge_adapter=settings.lora_export is LoraExport.MERGED,
    )

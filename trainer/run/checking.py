"""--check: the checks of a start without the start."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from rlhf.config import EX_CONFIG
from trainer.learning.ranks import ALONE, Ranks
from trainer.metrics import TrainerMetrics
from trainer.run.findings import Finding, Outcome, table
from trainer.run.loading import prepare_torch
from trainer.run.preflight import REFUSALS, Preflight
from trainer.run.runfolder import RunIdentity, require_free
from trainer.run.servers import Servers
from trainer.run.start import Start, find_start
from trainer.run.waiting import Patience
from trainer.settings import TrainerSettings


async def check(settings: TrainerSettings, ranks: Ranks = ALONE) -> tuple[str, int]:
    """The table of every check and the exit code: 0, or 78 when one failed. Nothing is written or published."""
    start, found = _check_run_folder(settings)
    findings = [found]
    if not start.finished:
        prepare_torch(settings)
        patience = Patience(settings.check_patience)
        metrics = TrainerMetrics(CollectorRegistry())
        async with Servers(settings, run_id=start.identity.run_id, watch=patience.watch, metrics=metrics) as servers:
            findings += await Preflight(settings, start, servers, ranks=ranks, patience=patience).report()
    failed = any(finding.outcome is Outcome.FAILED for finding in findings)
    return table(findings), EX_CONFIG if failed else 0


def _check_run_folder(settings: TrainerSettings) -> tuple[Start, Finding]:
    """Where the run would begin; what can't be used is checked on as if the run were new."""
    name, folder = "run folder", settings.run_dir
    try:
        require_free(folder)
        start = find_start(settings)
    except REFUSALS as error:
        return Start(RunIdentity("check", 1)), Finding(name, Outcome.FAILED, str(error))
    if start.stored is None:
        said = f"a new run in {folder}"
    elif start.finished:
        said = f"{folder} holds a finished run, nothing is left to do: to go on, raise --steps ({settings.steps})"
    else:
        said = f"{folder} goes on from step {start.stored.completed_step}"
    return start, Finding(name, Outcome.OK, said)

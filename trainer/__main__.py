"""python -m trainer: one start of a run.

Exit codes: 0 finished, or --check found nothing wrong; 78 settings, data, folder or servers that don't fit the run
(starting again won't help, another trainer among them);
143 or 130 stopped by SIGTERM or SIGINT, a checkpoint is there; 1 anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from rlhf.config import EX_CONFIG, load_settings
from rlhf.endpoint import write_endpoint_file
from rlhf.extras import brought_by
from rlhf.failures import RpcFailure
from rlhf.logs import configure_logging, get_logger
from rlhf.metrics import Pulse, serve_metrics
from rlhf.tracing import exporting
from trainer.settings import TrainerSettings

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainer with these arguments (default: the command line's) and return the exit code."""
    settings = load_settings(TrainerSettings, argv, prog="python -m trainer")
    configure_logging(settings.log_format, settings.log_level)
    # Seconds of importing torch come after mistakes in the settings have been told.
    with brought_by("trainer"):
        from trainer.clients.policy import BrokenServerError
        from trainer.learning.control import RanksLostError
        from trainer.learning.learner import NonFiniteLossError
        from trainer.learning.ranks import ALONE
        from trainer.metrics import TrainerMetrics
        from trainer.run.assembly import run
        from trainer.run.checking import check
        from trainer.run.following import follow
        from trainer.run.launch import join_ranks
        from trainer.run.preflight import REFUSALS
        from trainer.run.progress import Progress, wants_live_display
        from trainer.run.runfolder import StorageError, lock_run_folder
        from trainer.run.waiting import WaitBoard

    ranks, code = ALONE, 1
    try:
        ranks = join_ranks(settings)
        if ranks.index > 0:
            return follow(settings, ranks)
        if settings.check:
            report, code = asyncio.run(check(settings, ranks))
            print(report)
            return code
        metrics = TrainerMetrics()
        pulse = Pulse()
        waits = WaitBoard(metrics)
        live = wants_live_display(settings.log_format)
        with (
            lock_run_folder(settings.run_dir),
            _metrics_endpoint(settings, pulse),
            exporting(settings.otlp_endpoint, service="rlhf-trainer"),
            Progress(steps=settings.steps, waits=waits, live=live) as progress,
        ):
            code = asyncio.run(run(settings, metrics=metrics, progress=progress, waits=waits, ranks=ranks, pulse=pulse))
    except REFUSALS as error:
        _log.error(str(error))
        code = EX_CONFIG
    except _MetricsPortError as error:
        _log.error(str(error))
    except (RpcFailure, BrokenServerError, NonFiniteLossError, StorageError, RanksLostError) as error:
        _log.error(f"the run stops: {error}")
    finally:
        ranks.end(code)
    return code


class _MetricsPortError(Exception):
    """The port is taken, by a process that may end: starting again may help."""


@contextlib.contextmanager
def _metrics_endpoint(settings: TrainerSettings, pulse: Pulse) -> Iterator[None]:
    try:
        endpoint = serve_metrics(settings.metrics_port, host=settings.metrics_host, pulse=pulse)
    except OSError as error:
        raise _MetricsPortError(error.strerror) from error
    try:
        if settings.endpoint_file is not None:
            url = endpoint.url if endpoint is not None else None
            write_endpoint_file(settings.endpoint_file, address=None, metrics_url=url)
        yield
    finally:
        if endpoint is not None:
            endpoint.close()


def _exit(code: int) -> NoReturn:
    """End the process, the moment its work is done where it is one of several ranks.

    A thread of torch.distributed's may be about to let go of its last tensor, for which it needs the interpreter: when
    that is on its way out, the thread is ended and takes the process with it (SIGABRT).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    _exit(main())

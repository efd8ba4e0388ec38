"""How rank 0 leads the other ranks: it tells them what to call, and that it is still there."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from rlhf.logs import get_logger

_log = get_logger(__name__)

_SIGN_OF_LIFE_SECONDS = 30.0
_SILENCE = datetime.timedelta(minutes=10)

_ALIVE = "alive"
END = "end"


class RanksLostError(Exception):
    """A process of the run ended or answers no more."""


class Control:
    """Commands from rank 0 to all others, through the CPU and beside the group that tensors go through.

    Rank 0 may wait for a server as long as it takes, so it says from time to time that it lives: silence means that it
    does not. A process that ends closes its connections, which the others notice at once.
    """

    def __init__(self) -> None:
        """Collective: every rank of the default group makes one."""
        self._leads = dist.get_rank() == 0
        self._group = dist.new_group(backend="gloo", timeout=_SILENCE)
        # A command holds it until rank 0 has done its own part: nothing may come between.
        self._one_at_a_time = threading.Lock()
        self._ended = threading.Event()
        if self._leads:
            threading.Thread(target=self._say_alive, name="sign of life", daemon=True).start()

    @contextlib.contextmanager
    def telling(self, command: str, *arguments: Any) -> Iterator[None]:
        """On rank 0: send a command, then do the same within the block. Raises RanksLostError."""
        with self._one_at_a_time, lost_ranks_named():
            self._broadcast((command, arguments))
            yield

    def hear(self) -> tuple[str, tuple[Any, ...]]:
        """On another rank: the next command and its arguments. Raises RanksLostError when rank 0 is gone."""
        while True:
            with lost_ranks_named():
                command, arguments = self._broadcast(None)
            if command != _ALIVE:
                return command, arguments

    def end(self, code: int) -> None:
        """On rank 0: have the others end with exit code `code`; those that are gone already are left alone."""
        self._ended.set()
        with contextlib.suppress(RanksLostError), self.telling(END, code):
            pass

    def _say_alive(self) -> None:
        while not self._ended.wait(_SIGN_OF_LIFE_SECONDS):
            try:
                with self.telling(_ALIVE):
                    pass
            except RanksLostError as error:
                if not self._ended.is_set():
                    _log.error(f"the run stops: {error}")
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def _broadcast(self, message: Any) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Errors of torch.distributed's as RanksLostError; others as they are."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "NCCL" in str(error)):
            raise
        said = str(error).partition("\n")[0]
        raise RanksLostError(
            f"another process of this run ended or does not answer (rank {dist.get_rank()} was told: {said})"
        ) from error

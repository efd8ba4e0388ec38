"""What a person sees while the trainer runs: one live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf.logs import get_logger
from trainer.run.waiting import WaitBoard

_log = get_logger(__name__)

_SHOWN = {
    "reward": "ppo/mean_scores",
    "KL": "objective/kl",
    "length": "tokens/responses_len_mean",
    "tokens/s": "throughput/tokens_per_second",
}

_SHOWN_HELD_OUT = {"reward": "reward_mean", "KL": "kl_mean", "length": "length_mean"}


class Progress:
    """Knows the run's step, phase and last numbers. As a context it shows them live if `live`, else as log lines."""

    def __init__(self, *, steps: int, waits: WaitBoard, live: bool, console: Console | None = None) -> None:
        self._steps = steps
        self._waits = waits
        self._step = 0
        self._phase = "starting"
        self._phase_since = time.monotonic()
        self._counts: tuple[int, int] | None = None
        self._numbers: dict[str, float] = {}
        self._held_out: dict[str, float] = {}
        self._live = (
            Live(get_renderable=self.render, console=console or Console(), refresh_per_second=4, transient=False)
            if live
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase, self._phase_since = "ended", time.monotonic()
        if self._live is not None:
            self._live.stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that `name` is what happens now."""
        previous, self._phase, self._phase_since = self._phase, name, time.monotonic()
        try:
            yield
        finally:
            self._phase, self._phase_since, self._counts = previous, time.monotonic(), None

    def count(self, done: int, of: int) -> None:
        """How much of the phase is done."""
        self._counts = (done, of)

    def resumed_at(self, step: int) -> None:
        """The run goes on after `step`."""
        self._step = step

    def step_done(self, step: int, statistics: Mapping[str, float | None]) -> None:
        """A PPO step is over."""
        self._step = step
        self._numbers = {label: value for label, key in _SHOWN.items() if (value := statistics.get(key)) is not None}
        if self._live is None:
            _log.info(
                f"step {step}/{self._steps}", **{key: float(f"{value:.4g}") for key, value in self._numbers.items()}
            )

    def evaluated(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Held-out prompts were evaluated after `step`."""
        self._held_out = {
            label: value for label, key in _SHOWN_HELD_OUT.items() if (value := numbers.get(key)) is not None
        }
        if self._live is None:
            _log.info(f"evaluation after step {step}", **{k: float(f"{v:.4g}") for k, v in self._held_out.items()})

    def render(self) -> RenderableType:
        """The live panel."""
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"step {self._step}/{self._steps}", style="bold"),
            ProgressBar(total=self._steps, completed=self._step, width=40),
            Text(self._phase_text(), style="dim"),
        )
        lines: list[RenderableType] = [head]
        if self._numbers:
            lines.append(Text(_told(self._numbers)))
        if self._held_out:
            lines.append(Text(f"held out: {_told(self._held_out)}", style="cyan"))
        for on, wait in self._waits.waits.items():
            lines.append(
                Text(
                    f"waiting for the {on} server {wait.target} for {wait.seconds():.0f} s: {wait.reason}",
                    style="yellow",
                )
            )
        return Group(*lines)

    def _phase_text(self) -> str:
        counts = f" {self._counts[0]}/{self._counts[1]}" if self._counts else ""
        return f"{self._phase}{counts} ({time.monotonic() - self._phase_since:.0f} s)"


def _told(numbers: Mapping[str, float]) -> str:
    """Two decimals: a KL that is rounding noise reads 0.00."""
    return "  ".join(f"{label} {value:.2f}" for label, value in numbers.items())


def wants_live_display(log_format: str) -> bool:
    """A terminal, and no machine reading the lines."""
    return log_format != "json" and sys.stdout.isatty() and sys.stderr.isatty()

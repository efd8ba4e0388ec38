"""How the benchmarks measure and report: alternatives in turn, several rounds, medians and the ratio round by round."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.roofline import Limits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Report(Protocol):
    """What one benchmark found."""

    def show(self) -> None:
        """Print the tables."""
        ...

    def record(self) -> dict[str, Any]:
        """All of it for the JSON document: settings, raw figures, medians, ratios."""
        ...

    def draw(self, figure: Figure) -> None:
        """Draw it into an empty figure."""
        ...

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """Shares of a limit, by a description that goes on after "38 % of"; empty where none is meaningful."""
        ...


@dataclass(frozen=True)
class Measurement:
    """Rates of the alternatives over the same rounds; the first alternative is what the others are compared with."""

    title: str
    unit: str
    rates: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Of the rates of `name` over the rounds."""
        return statistics.median(self.rates[name])

    def ratio(self, name: str, to: str | None = None) -> float:
        """Median over rounds of the rate of `name` over that of `to` (None = the first) in the same round."""
        others = self.rates[to if to is not None else next(iter(self.rates))]
        return statistics.median(own / other for own, other in zip(self.rates[name], others, strict=True))

    def show(self) -> None:
        """Print the table."""
        table = make_table(self.title, "", f"median {self.unit}", "min", "max", "ratio")
        for name, rates in self.rates.items():
            row = (self.median(name), min(rates), max(rates))
            table.add_row(name, *(f"{rate:,.1f}" for rate in row), f"{self.ratio(name):.2f}")
        Console().print(table)

    def record(self) -> dict[str, Any]:
        """See Report."""
        return {
            "title": self.title,
            "unit": self.unit,
            "rates": dict(self.rates),
            "medians": {name: self.median(name) for name in self.rates},
            "ratios": {name: self.ratio(name) for name in self.rates},
        }

    def draw(self, figure: Figure) -> None:
        """See Report."""
        self.draw_bars(figure.subplots())

    def draw_bars(self, axes: Axes) -> None:
        """One bar for each alternative's median, its line from the slowest round to the fastest."""
        medians = [self.median(name) for name in self.rates]
        spread = [
            [median - min(rates) for median, rates in zip(medians, self.rates.values(), strict=True)],
            [max(rates) - median for median, rates in zip(medians, self.rates.values(), strict=True)],
        ]
        axes.barh(list(self.rates), medians, xerr=spread, capsize=3)
        axes.invert_yaxis()
        axes.set(title=self.title, xlabel=self.unit)

    def reached(self, limits: Limits) -> Mapping[str, float]:
        """See Report."""
        return {}


async def interleaved(
    title: str,
    unit: str,
    alternatives: Mapping[str, Callable[[], Awaitable[float]]],
    *,
    rounds: int = 5,
    rest: float = 0.0,
) -> Measurement:
    """Run each alternative in turn, after one warm-up of each; an alternative returns how much work it did.

    rest: seconds before each, for what the one before left to be done.
    """
    for work in alternatives.values():
        await work()
    rates: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, work in alternatives.items():
            await asyncio.sleep(rest)
            began = time.perf_counter()
            done = await work()
            rates[name].append(done / (time.perf_counter() - began))
    return Measurement(title, unit, rates)


def percentile(values: Sequence[float], share: float) -> float:
    """What `share` of the values are at most; not a number if there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def log_uniform(count: int, shortest: int, longest: int, *, seed: int = 0) -> list[int]:
    """Lengths between shortest and longest, with the skew of real completions; the same in every run."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return [round(shortest * (longest / shortest) ** each) for each in uniform.tolist()]


def make_table(title: str, *headings: str) -> Table:
    """An empty table whose first column holds names and whose others hold numbers."""
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table

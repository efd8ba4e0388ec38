"""How the benchmarks measure: alternatives in turn, several rounds, medians and the ratio round by round."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """Rates of the alternatives over the same rounds; the first alternative is what the others are compared with."""

    title: str
    unit: str
    rates: Mapping[str, list[float]]

    def ratio(self, name: str) -> float:
        """Median over rounds of the rate of `name` over that of the first alternative in the same round."""
        first = next(iter(self.rates.values()))
        return statistics.median(own / base for own, base in zip(self.rates[name], first, strict=True))

    def show(self) -> None:
        """Print the table."""
        table = Table(title=self.title)
        for heading in ("", f"median {self.unit}", "min", "max", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, rates in self.rates.items():
            row = (statistics.median(rates), min(rates), max(rates))
            table.add_row(name, *(f"{rate:,.1f}" for rate in row), f"{self.ratio(name):.2f}")
        Console().print(table)


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

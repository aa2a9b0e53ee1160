"""Samples, their medians and ratios, and how they are written: JSON lines and tables. Measuring is left to the rest."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.table import Table

Tell = Callable[[str], None]
"""Shows what is being done."""

_KIB: Final = 1024.0


@dataclass(slots=True)
class Samples:
    """What one bench found: by case and metric, one sample for each round. A metric's name ends in its unit."""

    bench: str
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, case: str, **metrics: float) -> None:
        """Add one round's samples of a case."""
        for metric, value in metrics.items():
            self.samples.setdefault((case, metric), []).append(float(value))

    def skip(self, case: str, reason: str) -> None:
        """Say why a case was not measured."""
        self.skipped[case] = reason

    def ratio(self, case: str, name: str, above: tuple[str, str], below: tuple[str, str]) -> None:
        """Add the ratio of two metrics, round by round, if both were measured in every round."""
        over, under = self.samples.get(above, []), self.samples.get(below, [])
        if over and len(over) == len(under) and all(under):
            self.samples[case, name] = [a / b for a, b in zip(over, under, strict=True)]

    def median(self, case: str, metric: str) -> float:
        """Return the median of a metric. Raises KeyError if it was not measured."""
        return statistics.median(self.samples[case, metric])

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record for each case and metric, then one for each case that was skipped, then the notes."""
        records: list[dict[str, Any]] = [
            {
                "bench": self.bench,
                "case": case,
                "metric": metric,
                "median": statistics.median(values),
                "low": min(values),
                "high": max(values),
                "rounds": len(values),
            }
            for (case, metric), values in self.samples.items()
        ]
        records += [{"bench": self.bench, "case": case, "skipped": why} for case, why in self.skipped.items()]
        records += [{"bench": self.bench, "note": note} for note in self.notes]
        return records

    def table(self) -> Table:
        """Return a table for people."""
        table = Table(title=self.bench, box=None, pad_edge=False, title_justify="left")
        for name in ("case", "metric"):
            table.add_column(name, overflow="fold")
        for name in ("median", "lowest", "highest", "rounds"):
            table.add_column(name, justify="right")
        last = ""
        for record in self.records():
            if "metric" in record:
                metric = record["metric"]
                table.add_row(
                    record["case"] if record["case"] != last else "",
                    metric,
                    *(show(metric, record[key]) for key in ("median", "low", "high")),
                    str(record["rounds"]),
                )
                last = record["case"]
        for case, why in self.skipped.items():
            table.add_row(case, f"skipped: {why}")
        return table


def interval(groups: Sequence[Sequence[float]], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the median: by drawing groups, and values in each, again and again (bootstrap).

    A group's values have something in common, here the process that was measured; so groups are drawn first.
    """
    chance = random.Random(1)
    medians = sorted(
        statistics.median(
            [value for group in chance.choices(groups, k=len(groups)) for value in chance.choices(group, k=len(group))]
        )
        for _ in range(draws)
    )
    return medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]


def show(metric: str, value: float) -> str:
    """Return a value as text, scaled by the unit at the end of its metric's name."""
    if metric.endswith("_bytes_per_s"):
        return f"{value / _KIB**3:.2f} GiB/s"
    if metric.endswith("_bytes_per_page"):
        return f"{value:.1f} B"
    if metric.endswith("_per_s"):
        return f"{value:,.0f}/s"
    if metric.endswith(("_bytes", "_bytes_per_gib")):
        return f"{value / _KIB**2:,.2f} MiB"
    if metric.endswith("_ratio"):
        return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"
    if metric.endswith("_s"):
        return f"{value * 1000:.2f} ms" if value < 0.1 else f"{value:.2f} s"
    return f"{value:,.0f}"

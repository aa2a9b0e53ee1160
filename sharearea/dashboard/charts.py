"""Charts of a Snapshot, as plotly draws them, each with the same numbers as a table.

Colours stand on a light and on a dark page; text and lines of the axes take the page's (assets/style.css).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go

from ..common.events import OWNER_BUCKETS
from ..common.explain import EXPLANATIONS
from .snapshot import Choice, Row, Snapshot

# At least 3 to 1 on white and on the dark page's ground.
COLOURS: Final = ("#2f7ed8", "#c8641e", "#1d8f5b", "#a855c8", "#8a7a1a", "#c43d5a", "#5b7c99", "#7a6bd1")
_SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
LINES: Final = len(COLOURS)  # hosts, pools or domains in one chart
_UNITS: Final = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
CLASSES: Final = {
    "text": "executable text",
    "rodata": "read-only data",
    "data": "plain data",
    "unclassified": "not known yet",
}
STAGES: Final = {
    "scan": "the agent leaves it out",
    "report": "the broker does not take it",
    "grant": "the broker gives no grant",
    "attach": "a program asked, and got the plain file",
}
_PUBLISHING: Final = ("pages.published", "pages.granted", "pages.released", "pages.revoked", "pool.statistics")


Line = tuple[Sequence["str | Amount"], "Mapping[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class Table:
    """A chart's numbers: heads, and rows of cells with what lies behind them (see Source.events), None for nothing."""

    heads: Sequence[str]
    rows: Sequence[Line]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, its numbers, and how high it is drawn."""

    figure: go.Figure
    table: Table
    height_px: int = 320


@dataclass(frozen=True, slots=True)
class Amount:
    """A number as it is shown, and as it is. `number`: None where it is not known."""

    number: int | None
    unit: str = "bytes"

    @property
    def text(self) -> str:
        """Return it for people."""
        if self.number is None:
            return "not known"
        return bytes_text(self.number) if self.unit == "bytes" else f"{self.number:,}"


def bytes_text(size: int) -> str:
    """Write a number of bytes with one decimal, as `25.4 MiB`."""
    for unit, factor in _UNITS[:-1]:
        if abs(size) >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} B"


def time_text(moment: datetime.datetime) -> str:
    """Write a time for people; UTC."""
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def behind(**about: Any) -> str:
    """Return what a point of a chart carries: which events lie behind it."""
    return json.dumps({name: value for name, value in about.items() if value}, separators=(",", ":"))


def saved(snapshot: Snapshot, choice: Choice) -> Chart:
    """Memory saved and net saved over time, of every host, pool or domain."""
    words = ("gave up", "net") if choice.by == "domain" else ("saved", "net saved")
    unit, factor = _unit(abs(row[name] or 0) for row in snapshot.series for name in ("saved_bytes", "net_saved_bytes"))
    figure = _figure(unit)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in snapshot.series:
        groups.setdefault((row["host"], row["pool"], row["domain"]), []).append(row)
    most = sorted(groups, key=lambda key: -abs(groups[key][-1]["net_saved_bytes"] or 0))[:LINES]
    for at, (key, steps) in enumerate((key, groups[key]) for key in groups if key in most):
        for name, word, dash in (("saved_bytes", words[0], "dot"), ("net_saved_bytes", words[1], "solid")):
            figure.add_scatter(
                x=[row["step_time"] for row in steps],
                y=[_scaled(row[name], factor) for row in steps],
                name=f"{_whose(key, snapshot)} {word}",
                mode="lines+markers",
                line={"color": COLOURS[at % len(COLOURS)], "dash": dash, "width": 2},
                marker={"symbol": _SYMBOLS[at % len(_SYMBOLS)], "size": 7},
                customdata=[_about_step(row, snapshot, choice) for row in steps],
                hovertemplate=f"%{{x}}<br>%{{y:,.1f}} {unit}<extra>%{{fullData.name}}</extra>",
            )
    figure.update_xaxes(type="date", nticks=4, tickangle=0)
    rows: list[Line] = [
        (
            (
                time_text(row["step_time"]),
                _whose((row["host"], row["pool"], row["domain"]), snapshot),
                Amount(row["saved_bytes"]),
                Amount(row["net_saved_bytes"]),
            ),
            json.loads(_about_step(row, snapshot, choice)),
        )
        for row in reversed(snapshot.series)
    ]
    return Chart(figure, Table(("time (UTC)", choice.by, *words), rows))


def _about_step(row: Row, snapshot: Snapshot, choice: Choice) -> str:
    until = row["step_time"] + datetime.timedelta(seconds=snapshot.step_s)
    whose = _whose((row["host"], row["pool"], row["domain"]), snapshot)
    return behind(
        label=f"{choice.by} {whose}, {snapshot.step_s} s from {time_text(row['step_time'])}",
        since=row["step_time"].isoformat(),
        until=until.isoformat(),
        host=row["host"],
        pool=row["pool"],
        domain=row["domain"],
    )


def _whose(key: tuple[str, str, str], snapshot: Snapshot) -> str:
    host, pool, domain = key
    parts = [domain, f"({pool})" if domain and len(snapshot.pools) > 1 else "" if domain else pool]
    if not (pool or domain) or len(snapshot.hosts) > 1:
        parts.append(host if not (pool or domain) else f"on {host}")
    return " ".join(filter(None, parts))


def page_classes(snapshot: Snapshot) -> Chart:
    """Bytes that agents reported and that domains map, by page class."""
    found = {(row["kind"], row["class"]): row["bytes"] for row in snapshot.classes}
    unit, factor = _unit(found.values())
    figure = _figure(unit)
    kinds = ("reported", "mapped")
    for at, (name, word) in enumerate(CLASSES.items()):
        if any(found.get((kind, name)) for kind in kinds):
            figure.add_bar(
                x=list(kinds),
                y=[_scaled(found.get((kind, name)), factor) for kind in kinds],
                name=word,
                marker={"color": COLOURS[at]},
                customdata=[behind(label=f"{kind}: {word}", events=_CLASS_EVENTS[kind]) for kind in kinds],
                hovertemplate=f"%{{x}}: %{{y:,.1f}} {unit}<extra>{word}</extra>",
            )
    figure.update_layout(barmode="stack")
    rows: list[Line] = [
        (
            (CLASSES[name], *(Amount(found.get((kind, name), 0)) for kind in kinds)),
            {"label": f"mapped: {CLASSES[name]}", "events": _CLASS_EVENTS["mapped"]},
        )
        for name in CLASSES
        if any((kind, name) in found for kind in kinds)
    ]
    return Chart(figure, Table(("page class", *kinds), rows))


_CLASS_EVENTS: Final = {
    "reported": ["scan.finished", "pool.statistics"],
    "mapped": ["pages.granted", "pool.statistics"],
}


def largest(snapshot: Snapshot) -> Chart:
    """The files whose copies take the most: what they take, and what of it sharing every copy but one would save."""
    return _bars(
        [
            (
                row["path"],
                (row["held_bytes"], row["possible_saved_bytes"]),
                {"label": row["path"], "paths": [row["path"]], "events": _FILE_EVENTS, "pool": row["pool"]},
                (
                    row["path"],
                    Amount(row["domains"], "domains"),
                    Amount(row["held_bytes"]),
                    Amount(row["possible_saved_bytes"]),
                    Amount(row["mapped_bytes"]),
                ),
            )
            for row in snapshot.largest
        ],
        ("its copies take", "all copies but one"),
        ("file", "domains", "its copies take", "all copies but one", "mapped"),
        shortened=True,
    )


def packages(snapshot: Snapshot) -> Chart:
    """The packages whose files take the most, of the files that file.statistics names."""
    return _bars(
        [
            (
                row["package"],
                (row["held_bytes"], row["possible_saved_bytes"]),
                {"label": f"package {row['package']}", "package": row["package"], "events": _FILE_EVENTS},
                (
                    row["package"],
                    Amount(row["contents"], "files"),
                    Amount(row["held_bytes"]),
                    Amount(row["possible_saved_bytes"]),
                    Amount(row["mapped_bytes"]),
                ),
            )
            for row in snapshot.packages
        ],
        ("its copies take", "all copies but one"),
        ("package", "files", "its copies take", "all copies but one", "mapped"),
        shortened=True,
    )


_FILE_EVENTS: Final = [
    "file.statistics",
    "files.shared",
    "files.refused",
    "files.withdrawn",
    "files.returned",
    "files.plain",
    "file.mismatch",
]


def refusals(snapshot: Snapshot) -> Chart:
    """Bytes that are not shared, by reason; files, where no size is known at all."""
    by_size = any(row["bytes"] for row in snapshot.refusals)
    return _bars(
        [
            (
                f"{row['reason']} ({row['stage']})",
                ((row["bytes"] if by_size else row["files"]) or 0,),
                {
                    "label": f"{row['reason']}: {STAGES[row['stage']]}",
                    "reason": row["reason"],
                    "stage": "" if row["stage"] == "attach" else row["stage"],
                    "events": ["files.plain"] if row["stage"] == "attach" else ["files.refused"],
                },
                (
                    row["reason"],
                    STAGES[row["stage"]],
                    Amount(row["files"], "files"),
                    Amount(row["bytes"]),
                    *_explained(row["reason"]),
                ),
            )
            for row in snapshot.refusals
        ],
        ("refused",),
        ("reason", "where", "files", "bytes", "what it means", "what to do"),
        unit="" if by_size else "files",
    )


def _explained(reason: str) -> tuple[str, str]:
    found = EXPLANATIONS.get(reason)
    return (found.meaning, found.remedy) if found is not None else ("", "")


def owners(snapshot: Snapshot) -> Chart:
    """Slots of the area by how many domains hold their page, and by how often it is mapped."""
    found = {(row["kind"], row["owners"]): row["slots"] for row in snapshot.owners}
    names = [bucket.replace("_to_", "-").replace("_or_more", "+") for bucket in OWNER_BUCKETS]
    figure = _figure("slots")
    for at, (kind, word) in enumerate((("held", "domains hold the page"), ("mapped", "times mapped"))):
        figure.add_bar(
            x=names,
            y=[found.get((kind, bucket), 0) for bucket in OWNER_BUCKETS],
            name=word,
            marker={"color": COLOURS[at]},
            customdata=[behind(label=f"slots: {name} {word}", events=_PUBLISHING) for name in names],
            hovertemplate=f"%{{y:,}} slots<extra>%{{x}} {word}</extra>",
        )
    figure.update_layout(barmode="group", xaxis={"type": "category", "tickangle": 0})
    rows: list[Line] = [
        (
            (name, *(Amount(found.get((kind, bucket), 0), "slots") for kind in ("held", "mapped"))),
            {"label": f"slots of {name} owners", "events": list(_PUBLISHING)},
        )
        for name, bucket in zip(names, OWNER_BUCKETS, strict=True)
    ]
    return Chart(figure, Table(("owners", "slots that so many domains hold", "slots mapped so often"), rows))


def budgets(snapshot: Snapshot) -> Chart:
    """What areas and tables of grants have left, as a part of what they may take."""
    figure = _figure("%")
    rows: list[Line] = []
    names = [row["pool"] if len(snapshot.hosts) < 2 else f"{row['pool']} on {row['host']}" for row in snapshot.budgets]
    for at, (word, ratio) in enumerate((("area", "area_fill_ratio"), ("grants", "grants_fill_ratio"))):
        if any(row[ratio] is not None for row in snapshot.budgets):
            figure.add_bar(
                x=names,
                y=[100 * (row[ratio] or 0) for row in snapshot.budgets],
                name=word,
                marker={"color": COLOURS[at]},
                customdata=[behind(**_about_budget(row)) for row in snapshot.budgets],
                hovertemplate=f"%{{y:.1f}} %<extra>{word}</extra>",
            )
    figure.update_layout(yaxis={"range": [0, 100]}, xaxis={"type": "category"}, barmode="group")
    for name, row in zip(names, snapshot.budgets, strict=True):
        cells: tuple[str | Amount, ...] = (
            name,
            Amount(row["area_bytes"]),
            Amount(row["area_max_bytes"]),
            f"{100 * row['area_fill_ratio']:.1f} %",
            Amount(row["unmapped_bytes"]),
            _grants(row),
            row["paused"] or "publishing",
        )
        rows.append((cells, _about_budget(row)))
    return Chart(figure, Table(("pool", "area", "at most", "full", "mapped by nobody", "grants", "state"), rows))


def _grants(row: Row) -> str:
    if row["grants_max"] is None:
        return "no table (local)"
    return f"{row['grants_used']:,} of {row['grants_max']:,}, {row['grants_pinned'] or 0:,} pinned"


def _about_budget(row: Row) -> dict[str, Any]:
    events = ["pool.paused", "grants.refused", "grants.pinned", "area.opened", "area.adopted", "area.lost"]
    return {
        "label": f"budget of pool {row['pool']}",
        "host": row["host"],
        "pool": row["pool"],
        "events": [*events, "segment.closed", "segment.moved", "pool.statistics"],
    }


def _bars(
    rows: Sequence[tuple[str, tuple[int, ...], dict[str, Any], Sequence[str | Amount]]],
    words: Sequence[str],
    heads: Sequence[str],
    *,
    shortened: bool = False,
    unit: str = "",
) -> Chart:
    """Bars that lie, the first row on top. A row: its name, a number for each word, what is behind it, its cells."""
    factor = 1
    if not unit:
        unit, factor = _unit(number for _, numbers, _, _ in rows for number in numbers)
    figure = _figure(unit, lying=True)
    names = [_short(name) if shortened else name for name, *_ in rows]
    for at, word in enumerate(words):
        figure.add_bar(
            y=list(range(len(rows))),
            x=[_scaled(numbers[at], factor) for _, numbers, _, _ in rows],
            name=word,
            orientation="h",
            marker={"color": COLOURS[at]},
            customdata=[behind(**about) for _, _, about, _ in rows],
            text=names if at == 0 else None,
            hovertemplate=f"%{{x:,.1f}} {unit}<extra>{word}</extra>",
            textposition="none",
        )
    figure.update_layout(barmode="group")
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(
        autorange="reversed", tickmode="array", tickvals=list(range(len(rows))), ticktext=names, automargin=True
    )
    table = Table(heads, [(cells, about) for _, _, about, cells in rows])
    return Chart(figure, table, 120 + 34 * max(1, len(rows)))


def _short(path: str) -> str:
    return path if len(path) <= 24 else "…" + path[-23:]


def _unit(numbers: Iterable[int]) -> tuple[str, int]:
    most = max(numbers, default=0)
    return next(((unit, factor) for unit, factor in _UNITS if most >= factor), ("MiB", 1 << 20))


def _scaled(number: int | None, factor: int) -> float | None:
    return None if number is None else number / factor


def _figure(unit: str, *, lying: bool = False) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "left", "x": 0},
        hovermode="closest",
        showlegend=True,
        uirevision="kept",
        dragmode=False,
    )
    figure.update_xaxes(automargin=True, fixedrange=True)
    figure.update_yaxes(automargin=True, fixedrange=True)
    (figure.update_xaxes if lying else figure.update_yaxes)(title={"text": unit})
    return figure

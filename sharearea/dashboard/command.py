"""The verb `stats`: its options, its progress, its tables. Light to import: DuckDB is imported when the verb runs."""

from __future__ import annotations

import argparse
import csv
import datetime
import glob
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..common.errors import UsageError
from ..common.explain import EXPLANATIONS
from ..config import BrokerConfig
from ..estimate.text import size_text
from .figures import NEEDS, Row, overview, rows, span
from .logs import Logs, cache_folder, find_logs
from .packages import package_finder

_MOST_ROWS: Final = 20
_AGO: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")
_UNITS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BYS: Final = tuple(by for by in NEEDS if by)


def add_arguments(parser: argparse.ArgumentParser, config_option: Callable[[Any], None]) -> None:
    """Add the options to the verb."""
    parser.description = (
        "Answer from log files: what is saved, where, and why not more. Figures on a timer count as they were last in "
        "the window, counters by how much they grew in it."
    )
    parser.epilog = (
        "Needs pip install 'sharearea[dashboard]'. Without --logs, log_file of the configuration is read, rotated ones "
        "too. For the journal: journalctl -u sharearea -o cat | sharearea stats --logs -. docs/stats.md defines every "
        "figure and shows how to ask further with SQL."
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--logs", nargs="+", metavar="GLOB", help="log files, .gz too; - is standard input")
    config_option(place)
    parser.add_argument(
        "--since", type=moment, metavar="TIME", help="from then on: 1h, 30m, 2d ago, or 2026-11-20T08:00"
    )
    parser.add_argument("--until", type=moment, metavar="TIME", help="until then (default: now)")
    parser.add_argument("--by", choices=_BYS, help="one row for each of these, instead of the overview")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV, with --by")
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="root folder of a guest, whose dpkg or rpm database says which package a file is of (default: /)",
    )
    parser.add_argument(
        "--limit", type=int, default=_MOST_ROWS, metavar="N", help=f"rows of a table (default: {_MOST_ROWS}; 0: all)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep nothing of what was read of long logs")


def moment(value: str) -> datetime.datetime:
    """Return a moment in UTC, without a zone: so long ago, or a date and time (this system's zone if it names none)."""
    found = _AGO.fullmatch(value.strip())
    now = datetime.datetime.now(tz=datetime.UTC)
    try:
        if found is not None:
            said = now - datetime.timedelta(seconds=float(found[1]) * _UNITS[found[2]])
        else:
            said = datetime.datetime.fromisoformat(value).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        what = f"{value!r} is no time: write 1h, 30m, 2d, or 2026-11-20T08:00"
        raise argparse.ArgumentTypeError(what) from None
    return said.replace(tzinfo=None)


def run(options: argparse.Namespace, console: Console, errors: Console) -> int:
    """Run the verb and return the exit code. `errors`: a console on stderr, for progress and remarks."""
    if options.csv and not options.by:
        raise UsageError("--csv needs --by", f"one of {', '.join(_BYS)}")
    if options.since is not None and options.until is not None and options.since >= options.until:
        raise UsageError("--since is not before --until")
    by = options.by or ""
    with (
        _patterns(options) as patterns,
        _progress(errors, patterns) as tell,
        Logs(
            patterns,
            since=options.since,
            until=options.until,
            events=NEEDS[by],
            cache=None if options.no_cache else cache_folder(),
            tell=tell,
        ) as logs,
    ):
        about = span(logs)
        note = partial(errors.print, highlight=False, markup=False)
        package_of = package_finder(options.root, note) if by in ("file", "package") else lambda _: None
        found = rows(logs, by, package_of) if by else []
        figures = {} if by else overview(logs)
    _remark(about, errors)
    if options.json:
        window = {"since": _said(options.since), "until": _said(options.until)}
        body: Row = {"by": by, "rows": found} if by else {"figures": figures}
        console.out(json.dumps(window | about | body, indent=2), highlight=False)
    elif options.csv:
        console.out(_csv(found), highlight=False, end="")
    elif by:
        _show_rows(console, by, found, options.limit)
    else:
        _show_overview(console, about, figures)
    return 0


def _said(when: datetime.datetime | None) -> str | None:
    return when.isoformat(timespec="milliseconds") + "Z" if when is not None else None


# --------------------------------------------------------------------------------------------------- what is read


@contextmanager
def _patterns(options: argparse.Namespace) -> Iterator[list[str]]:
    """Give the globs of the logs: the ones that were named, or the configured one. Standard input becomes a file."""
    if options.logs is None:
        config = BrokerConfig.load(options.config)
        if not config.log_file:
            raise UsageError(
                f"{options.config} has no log_file, so there is no log to read",
                "set log_file, name logs with --logs, or: journalctl -u sharearea -o cat | sharearea stats --logs -",
            )
        yield [f"{glob.escape(config.log_file)}*"]
    elif "-" in options.logs:
        with tempfile.NamedTemporaryFile(prefix="sharearea-stdin-") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            yield [*(name for name in options.logs if name != "-"), file.name]
    else:
        yield options.logs


@contextmanager
def _progress(errors: Console, patterns: list[str]) -> Iterator[Callable[[int], None]]:
    """Show how much has been read, if that takes long and somebody looks."""
    total = sum(path.stat().st_size for path in find_logs(patterns))
    with Progress(
        TextColumn("reading logs"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)


# ----------------------------------------------------------------------------------------------------- what is shown

_COLUMNS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "host": (
        ("host", "host"),
        ("pools", "pools"),
        ("domains", "domains"),
        ("saved", "saved_bytes"),
        ("net saved", "net_saved_bytes"),
        ("highest", "net_saved_bytes_max"),
        ("mean", "net_saved_bytes_mean"),
        ("possible", "possible_saved_bytes"),
        ("area", "area_bytes"),
        ("overhead", "overhead_bytes"),
        ("", "note"),
    ),
    "pool": (
        ("host", "host"),
        ("pool", "pool"),
        ("domains", "domains"),
        ("saved", "saved_bytes"),
        ("net saved", "net_saved_bytes"),
        ("highest", "net_saved_bytes_max"),
        ("possible", "possible_saved_bytes"),
        ("area", "area_bytes"),
        ("filled", "area_fill_ratio"),
        ("overhead", "overhead_bytes"),
        ("zero", "zero_bytes"),
        ("self-shared", "self_shared_bytes"),
        ("", "note"),
    ),
    "domain": (
        ("host", "host"),
        ("pool", "pool"),
        ("domain", "domain"),
        ("gave up", "given_up_bytes"),
        ("pays", "share_bytes"),
        ("net", "net_bytes"),
        ("possible", "possible_net_bytes"),
        ("files", "files"),
        ("ignored", "ignored_files"),
        ("zero", "zero_bytes"),
        ("self-shared", "self_shared_bytes"),
        ("", "note"),
    ),
    "file": (
        ("pool", "pool"),
        ("domains", "domains"),
        ("held", "held_bytes"),
        ("possible", "possible_saved_bytes"),
        ("mapped", "mapped_bytes"),
        ("text", "text_bytes"),
        ("package", "package"),
        ("path", "path"),
    ),
    "package": (
        ("package", "package"),
        ("contents", "contents"),
        ("held", "held_bytes"),
        ("possible", "possible_saved_bytes"),
        ("mapped", "mapped_bytes"),
        ("text", "text_bytes"),
        ("read-only data", "rodata_bytes"),
    ),
    "reason": (
        ("when", "stage"),
        ("reason", "reason"),
        ("files", "files"),
        ("bytes", "bytes"),
        ("domains", "domains"),
        ("times", "times"),
        ("what it means", "meaning"),
    ),
}
_TEXTS: Final = {"host", "pool", "domain", "package", "path", "stage", "reason", "note", "meaning"}


def _show_rows(console: Console, by: str, found: Sequence[Row], limit: int) -> None:
    if not found:
        console.print("nothing was said about that in the window", highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, key in _COLUMNS[by]:
        table.add_column(title, justify="left" if key in _TEXTS else "right", overflow="fold")
    shown = found[:limit] if limit else found
    for row in shown:
        table.add_row(*(escape(_cell(key, _value(row, key))) for _, key in _COLUMNS[by]))
    console.print(table)
    if len(shown) < len(found):
        console.print(f"{len(found) - len(shown)} more: --limit 0, --json or --csv has them", highlight=False)
    if by in ("file", "package"):
        console.print(
            "only files with a line of their own are here: file_statistics of the configuration", highlight=False
        )


def _value(row: Row, key: str) -> Any:
    if key == "meaning":
        explained = EXPLANATIONS.get(row["reason"])
        return explained.meaning if explained is not None else ""
    if key != "note":
        return row[key]
    if row.get("stopped"):
        return "stopped since"
    if row.get("is_current") is False:
        return "gone since"
    return row.get("paused") or ("reports only" if row.get("mode") == "report" else "")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key.endswith("_bytes") or key == "bytes" or "_bytes_" in key:
        return size(value)
    if key.endswith("_ratio"):
        return f"{100 * value:.0f}%"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size(value: int) -> str:
    """Return a number of bytes, which may be below 0, in the unit that leaves it short."""
    return f"-{size_text(-value)}" if value < 0 else size_text(value)


def _show_overview(console: Console, about: Row, figures: Row) -> None:
    if figures["hosts"] == 0:
        console.print("no broker has logged figures in the window (status_interval says how often it does)")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")

    def line(title: str, value: str, remark: str = "") -> None:
        table.add_row(title, escape(value), escape(remark))

    def line_of(title: str, key: str, remark: str = "") -> None:
        value = figures[key]
        line(title, _cell(key, value) if value is not None else "-", remark)

    line("window", "", f"{about['first']} to {about['last']}" if about["events"] else "nothing was said in it")
    line("domains", _cell("", figures["domains"]), f"in {figures['pools']} pools on {figures['hosts']} hosts")
    line_of("saved", "saved_bytes", "given up by guests, less the area")
    line_of("  highest", "saved_bytes_max", figures["saved_bytes_max_time"] or "of one host only: --by host")
    line_of("  mean", "saved_bytes_mean")
    line_of("overhead", "overhead_bytes", "bookkeeping of both sides")
    line_of("net saved", "net_saved_bytes")
    line_of("  highest", "net_saved_bytes_max", figures["net_saved_bytes_max_time"] or "")
    line_of("  mean", "net_saved_bytes_mean")
    line_of("possible", "possible_saved_bytes", "if all that several domains hold were shared")
    line_of("area", "area_bytes", f"of {_cell('area_max_bytes', figures['area_max_bytes'])} at most")
    if figures["grants_max"]:
        line_of("grants", "grants_used", f"of {figures['grants_max']:,}")
    line_of("zero pages", "zero_bytes", "apart, never shared")
    line_of("self-shared", "self_shared_bytes", "apart: a domain has them more than once")
    for kind in ("reported", "mapped"):
        parts = [
            f"{name.removeprefix(kind + '_').removesuffix('_bytes')} {size(value)}"
            for name, value in figures["page_classes"].items()
            if name.startswith(kind) and value
        ]
        total = sum(value for name, value in figures["page_classes"].items() if name.startswith(kind))
        line(kind, size(total), ", ".join(parts))
    owners = [
        f"{name.rpartition('by_')[2].replace('_', ' ')}: {count:,}"
        for name, count in figures["owners"].items()
        if name.startswith("slots_held") and count
    ]
    line("owners per page", "", "; ".join(owners) or "no page is in an area")
    line_of("published", "published_bytes", "in the window")
    line_of("granted", "granted_bytes", "in the window")
    line("not shared", f"{figures['refused_files']:,} files", f"{size(figures['refused_bytes'])}; why: --by reason")
    line_of("I/O avoided", "io_avoided_bytes", "shared now, and never read from a disk there")
    console.print(table)


def _csv(found: Sequence[Row]) -> str:
    text = io.StringIO()
    if found:
        writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return text.getvalue()


def _remark(about: Row, errors: Console) -> None:
    for what in about["unreadable_files"]:
        errors.print(f"note: not read: {what}", highlight=False, markup=False, soft_wrap=True)
    if about["other_lines"]:
        errors.print(f"note: {about['other_lines']:,} lines are no events of sharearea", highlight=False)
    if not about["events"] and about["events_loaded"]:
        errors.print(
            f"note: nothing is in the window; the logs go from {about['logs_first']} to {about['logs_last']}",
            highlight=False,
        )

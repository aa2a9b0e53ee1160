"""What the dashboard shows, as plain values: one Snapshot for each choice of window, host and pool, out of the views.

Asks the views only; what they mean is views.sql's. Knows nothing of pages and charts.
"""

from __future__ import annotations

import datetime
import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..common.errors import ShareareaError, UsageError
from .figures import NO_PACKAGE, by_package
from .logs import Logs, cache_folder, find_logs
from .packages import package_finder

Row = Mapping[str, Any]

POINTS: Final = 200  # steps of time in one chart, at most
TOP_FILES: Final = 20
EVENTS_SHOWN: Final = 200
STEPS_S: Final = (1, 2, 5, 10, 30, 60, 300, 900, 3600, 6 * 3600, 86_400, 7 * 86_400)
REST: Final = 4  # after loading, rest as long as that took, times this: a dashboard is not to keep a core busy

# Keys of every line that say nothing beside the others in a table of events.
_PLAIN: Final = frozenset({"time", "event", "level", "host", "program", "pid", "sequence", "version", "message"})


@dataclass(frozen=True, slots=True)
class Choice:
    """What the reader wants to see. `seconds`: back from the last line, None for all; "" for every host or pool."""

    seconds: int | None = None
    host: str = ""
    pool: str = ""
    by: str = "host"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why there is nothing to see, and what to do about it."""

    what: str
    remedies: tuple[str, ...]


@dataclass(slots=True)
class Snapshot:
    """All that one page shows. Times are UTC without a zone; figures are the views' own columns.

    `serial` differs whenever the logs or the choice do. `problem`: then the rest is empty.
    """

    serial: str
    problem: Problem | None = None
    files: Sequence[str] = ()
    span: Row = field(default_factory=dict)
    other_lines: int = 0
    hosts: Sequence[str] = ()
    pools: Sequence[str] = ()
    stopped: bool = False
    step_s: int = 1
    totals: Row = field(default_factory=dict)
    series: Sequence[Row] = ()
    classes: Sequence[Row] = ()
    largest: Sequence[Row] = ()
    packages: Sequence[Row] = ()
    package_note: str = ""
    refusals: Sequence[Row] = ()
    turned_away: Sequence[Row] = ()
    obstacles: Sequence[Row] = ()
    owners: Sequence[Row] = ()
    budgets: Sequence[Row] = ()
    reading: Row = field(default_factory=dict)


class Source:
    """Log files that may grow while they are looked at. Any thread may ask; one is answered at a time.

    `patterns`: globs of files, which need not be there yet. `root`: the root folder of a guest, whose database says
    which package a file is of; None: this system's. Raises UsageError if that is no folder.
    """

    def __init__(self, patterns: Sequence[str], root: Path | None = None) -> None:
        self.patterns = list(patterns)
        notes: list[str] = []
        self._package_of = functools.cache(package_finder(root, notes.append))
        self._package_note = " ".join(_sentence(note.removeprefix("note: ")) for note in notes)
        self._lock = threading.Lock()
        self._logs: Logs | None = None
        self._seen: tuple[tuple[str, int, int], ...] = ()
        self._rest_until = 0.0
        self._known: dict[Choice, Snapshot] = {}
        self._serial = 0

    def close(self) -> None:
        """Let go of the files. Twice is fine."""
        with self._lock:
            if self._logs is not None:
                self._logs.close()
                self._logs = None

    def snapshot(self, choice: Choice) -> Snapshot:
        """Return what the logs say now. Costs little as long as they do not change."""
        with self._lock:
            try:
                self._follow()
                if choice not in self._known:
                    if len(self._known) >= 50:
                        self._known.clear()
                    self._known[choice] = self._look(choice)
                return self._known[choice]
            except UsageError as error:
                self._forget()
                return Snapshot(f"none {error.message}", Problem(_sentence(error.message), _NO_FILE))
            except ShareareaError as error:
                self._forget()
                return Snapshot(f"failed {error.message}", Problem(_sentence(error.message), (_sentence(error.hint),)))

    def events(self, choice: Choice, about: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Return the newest events of a choice that are about something, and how many there are in all.

        `about`: `since`, `until` (UTC, ISO 8601), `host`, `pool`, `domain`, `reason`, `stage`, `paths`, `package`,
        `events`; what is missing does not matter. An event without a pool or a domain concerns all of them.
        """
        with self._lock:
            try:
                self._follow()
                if self._logs is None:
                    return [], 0
                self._window(self._logs, choice)
                if about.get("package"):
                    about = {**about, "paths": self._paths_of(self._logs, about["package"])}
                where, values = _condition(choice, about)
                found = self._logs.query(
                    f"SELECT * FROM events WHERE {where} ORDER BY time DESC, sequence DESC LIMIT {EVENTS_SHOWN}", values
                )
                (count,) = self._logs.query(f"SELECT count(*) AS n FROM events WHERE {where}", values)
            except ShareareaError:
                return [], 0
        return found, int(count["n"])

    # ------------------------------------------------------------------------------------------------ with the lock

    def _forget(self) -> None:
        if self._logs is not None:
            self._logs.close()
        self._logs, self._seen = None, ()
        self._known.clear()

    def _follow(self) -> None:
        """Load what is new, unless the last time took so long that a rest is due."""
        if self._logs is not None and time.monotonic() < self._rest_until:
            return
        seen = []
        for path in find_logs(self.patterns):
            info = os.stat(path)
            seen.append((os.fspath(path), info.st_size, info.st_mtime_ns))
        if self._logs is not None and tuple(seen) == self._seen:
            return
        began = time.monotonic()
        if self._logs is None:
            self._logs = Logs(self.patterns, cache=cache_folder())
        else:
            self._logs.window(None, None)
            self._logs.refresh()
        self._known.clear()
        self._serial += 1
        self._seen = tuple(seen)
        self._rest_until = time.monotonic() + REST * (time.monotonic() - began)

    def _paths_of(self, logs: Logs, package: str) -> list[str]:
        wanted = None if package == NO_PACKAGE else package
        return [row["path"] for row in logs.query("SELECT path FROM files") if self._package_of(row["path"]) == wanted]

    def _window(self, logs: Logs, choice: Choice) -> None:
        logs.window(None, None)
        if choice.seconds is not None:
            (span,) = logs.query("SELECT last FROM span")
            if span["last"] is not None:
                logs.window(span["last"] - datetime.timedelta(seconds=choice.seconds), None)

    def _look(self, choice: Choice) -> Snapshot:
        logs = self._logs
        assert logs is not None
        made = Snapshot(f"{self._serial} {choice}", files=[os.fspath(path) for path in logs.files])
        self._window(logs, choice)
        (lines,) = logs.query("SELECT count(*) AS n, count(*) FILTER (WHERE event IS NULL) AS other FROM lines")
        made.other_lines = lines["other"]
        (made.span,) = logs.query("SELECT * FROM span")
        if not lines["n"]:
            made.problem = Problem("The log files are empty.", _EMPTY)
        elif not made.span["events"]:
            made.problem = Problem(f"None of the {lines['n']:,} lines is an event of sharearea.", _NOT_OURS)
        if made.problem is not None:
            return made
        asked = {"host": choice.host or None, "pool": choice.pool or None}
        host = {"host": asked["host"]}
        on_host = "($host IS NULL OR host = $host)"
        in_pool = f"{on_host} AND ($pool IS NULL OR pool = $pool)"
        made.hosts = [row["host"] for row in logs.query("SELECT DISTINCT host FROM host_history ORDER BY host")]
        made.pools = [row["pool"] for row in logs.query("SELECT DISTINCT pool FROM pool_history ORDER BY pool")]
        made.step_s = _step(made.span)
        ended = logs.query(f"SELECT bool_and(stopped) AS stopped FROM host_statistics WHERE {on_host}", host)
        made.stopped = bool(ended[0]["stopped"])
        sums = ", ".join(f"sum({name})::BIGINT AS {name}" for name in TOTALS)
        if choice.pool:
            (made.totals,) = logs.query(f"SELECT {sums} FROM pool_statistics WHERE is_current AND {in_pool}", asked)
        else:
            (made.totals,) = logs.query(f"SELECT {sums} FROM host_statistics WHERE {on_host}", host)
        made.series = self._series(logs, choice, made.step_s)
        made.classes = logs.query(
            f"SELECT kind, class, sum(bytes)::BIGINT AS bytes FROM page_classes WHERE domain = '' AND {in_pool} "
            "GROUP BY ALL ORDER BY ALL",
            asked,
        )
        files = logs.query(
            "SELECT *, pages_in_area * 4096 AS in_area_bytes "
            f"FROM files WHERE {in_pool} ORDER BY held_bytes DESC, path",
            asked,
        )
        made.largest = files[:TOP_FILES]
        packages = by_package(file | {"package": self._package_of(file["path"])} for file in files)
        made.packages = sorted(packages, key=lambda row: -row["held_bytes"])[:TOP_FILES]
        made.package_note = self._package_note
        # Agents that have not joined yet do not know their pool.
        made.refusals = logs.query(
            "SELECT stage, reason, sum(files)::BIGINT AS files, sum(bytes)::BIGINT AS bytes "
            f"FROM refusals WHERE {_maybe_in_pool} GROUP BY ALL ORDER BY bytes DESC NULLS LAST, files DESC, reason",
            asked,
        )
        made.turned_away = logs.query(
            f"SELECT * FROM domain_refusals WHERE {on_host} ORDER BY last_time DESC LIMIT 50", host
        )
        made.obstacles = logs.query(
            f"SELECT * FROM obstacles WHERE {_maybe_in_pool} ORDER BY last_time DESC LIMIT 50", asked
        )
        made.owners = logs.query(
            f"SELECT kind, owners, sum(slots)::BIGINT AS slots FROM page_owners WHERE {in_pool} GROUP BY ALL", asked
        )
        made.budgets = logs.query(f"SELECT * FROM budgets WHERE {in_pool} ORDER BY host, pool", asked)
        (avoided,) = logs.query(
            "SELECT sum(io_avoided_bytes)::BIGINT AS io_avoided_bytes, sum(dropped_bytes)::BIGINT AS dropped_bytes "
            f"FROM io_avoided WHERE {in_pool}",
            asked,
        )
        (scans,) = logs.query(
            "SELECT sum(read_bytes)::BIGINT AS read_bytes, count(*) AS scans FROM events "
            f"WHERE event = 'scan.finished' AND {_maybe_in_pool}",
            asked,
        )
        made.reading = {**avoided, **scans}
        return made

    @staticmethod
    def _series(logs: Logs, choice: Choice, step_s: int) -> list[dict[str, Any]]:
        """Return the figures of every step. Each has `host`, `pool` and `domain`, "" where it is not told apart."""
        macro, names = {
            "host": ("host_savings", "host, '' AS pool, '' AS domain, saved_bytes, net_saved_bytes"),
            "pool": ("pool_savings", "host, pool, '' AS domain, saved_bytes, net_saved_bytes"),
            "domain": (
                "domain_savings",
                "host, pool, domain, given_up_bytes AS saved_bytes, net_bytes AS net_saved_bytes",
            ),
        }[choice.by]
        where, values = "($host IS NULL OR host = $host)", {"host": choice.host or None}
        if choice.by != "host":
            where, values = where + " AND ($pool IS NULL OR pool = $pool)", {**values, "pool": choice.pool or None}
        return logs.query(
            f"SELECT step_time, {names} FROM {macro}(INTERVAL {step_s} SECOND) WHERE {where} ORDER BY ALL", values
        )


TOTALS: Final = (
    "net_saved_bytes",
    "saved_bytes",
    "possible_saved_bytes",
    "given_up_bytes",
    "area_bytes",
    "overhead_bytes",
    "domains",
)

_maybe_in_pool: Final = "($host IS NULL OR host = $host) AND ($pool IS NULL OR pool = $pool OR pool IS NULL)"

_NO_FILE: Final = (
    "Are the globs right? Quote them, so that the shell leaves them alone: --logs '/var/log/sharearea/*.log'.",
    'Log files are written where log_file is configured: log_file = "/var/log/sharearea/broker.log" in broker.toml.',
    "From the journal: journalctl -u sharearea -u sharearea-agent -o cat > sharearea.log, and --logs sharearea.log.",
    "Without an installation: sharearea demo --keep leaves its logs behind, and says where.",
    "This page looks again by itself.",
)
_EMPTY: Final = (
    "Does the broker run? sharearea status says so.",
    "May it write there? Its last lines are in the journal too: journalctl -u sharearea.",
    "This page looks again by itself.",
)
_NOT_OURS: Final = (
    "Are these the logs of sharearea? Each line is a JSON object with event.name (docs/events.md).",
    "From the journal take the bare lines: journalctl -u sharearea -o cat.",
    "This page looks again by itself.",
)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _step(span: Row) -> int:
    seconds = (span["last"] - span["first"]).total_seconds()
    return next((step for step in STEPS_S if seconds / step < POINTS), STEPS_S[-1])


def _condition(choice: Choice, about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what events must satisfy, as SQL with its values. Of figures, only what the point itself shows."""
    parts, values = ["TRUE"], dict[str, Any]()
    given = {"host": choice.host, "pool": choice.pool} | {name: value for name, value in about.items() if value}
    for name in ("host", "pool", "domain"):
        if given.get(name):
            # An agent in a guest names its own machine; its pool tells whose it is.
            parts.append(f"({name} = ${name} OR {name} IS NULL" + (" OR program = 'agent')" if name == "host" else ")"))
            values[name] = given[name]
    for name, operator in (("since", ">="), ("until", "<")):
        if given.get(name):
            parts.append(f"time {operator} ${name}::TIMESTAMP")
            values[name] = given[name]
    for name in ("reason", "stage"):
        if given.get(name):
            parts.append(f"{name} = ${name}")
            values[name] = given[name]
    if given.get("events"):
        parts.append("list_contains($events, event)")
        values["events"] = list(given["events"])
    else:
        parts.append("event NOT IN ('host.statistics', 'pool.statistics', 'domain.statistics', 'file.statistics')")
    if given.get("paths"):
        parts.append("(list_contains($paths, path) OR list_has_any(examples, $paths))")
        values["paths"] = list(given["paths"])
    return " AND ".join(parts), values


def details(event: Row) -> dict[str, Any]:
    """Return what an event says beyond what every line has, and beyond its pool, domain and reason."""
    return {
        name: value
        for name, value in event.items()
        if value is not None and name not in _PLAIN and name not in ("pool", "domain", "reason")
    }

"""The broker's figures on a timer: what is taken when, and in how large steps, so that its loop goes on meanwhile.

The figures themselves are stats.py's, which is pure; the clock, the kernel's files and the log are here.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from . import stats
from .area.base import Area
from .common.logs import EventLog
from .config import BrokerConfig
from .model import PoolId

_LINES: Final = 32  # in one step: each takes some 50 us


class Source(Protocol):
    """What the figures are taken of: the broker."""

    @property
    def engine(self) -> Any:
        """The engine, whose pools are read."""
        ...

    def area(self, pool: PoolId) -> Area:
        """Return a pool's area."""
        ...

    def store_bytes(self) -> int:
        """Return the size of the store."""
        ...

    def connection_count(self) -> int:
        """Return how many connections there are."""
        ...

    def memory(self, domid: int) -> dict[str, Any]:
        """Return what is known of a Xen domain's memory target."""
        ...


class Statistics:
    """Takes and logs figures: call step() in every round."""

    def __init__(self, config: BrokerConfig, log: EventLog, source: Source, now: float) -> None:
        self._config = config
        self._log = log
        self._source = source
        self._due_at = now + config.status_interval
        self._files_at = now + config.file_statistics_interval
        self._surveys: dict[PoolId, stats.Survey] = {}  # the last finished one of each large pool
        self._queue: deque[PoolId] = deque()  # pools whose figures are being taken
        self._survey: stats.Survey | None = None  # of the first of them
        self._taken: list[dict[str, Any]] = []
        self._rankings: deque[stats.Ranking] = deque()
        self._lines: Iterator[tuple[str, dict[str, Any]]] = iter(())
        self._checked: dict[PoolId, int] = {}  # where the next check of bytes begins

    # --------------------------------------------------------------------------------------------------- on a timer

    def step(self, now: float) -> None:
        """Do a part of what is due: some 5 ms of work."""
        if self._say_some():
            return
        if self._queue:
            self._take(now)
        elif self._rankings:
            self._rank()
        elif now >= self._due_at:
            self._due_at = now + self._config.status_interval
            self._taken = []
            self._queue.extend(self._pools())
            if not self._queue:
                self._say_host()
        elif now >= self._files_at:
            self._files_at = now + self._config.file_statistics_interval
            if self._config.file_statistics:
                self._rankings.extend(
                    stats.Ranking(pool, self._config.file_statistics) for pool in self._pools().values()
                )

    def _pools(self) -> Mapping[PoolId, Any]:
        pools: Mapping[PoolId, Any] = self._source.engine.pools()
        return pools

    def _say_some(self) -> bool:
        """Write a few of the lines that wait. Returns whether there were any."""
        for at in range(_LINES):
            line = next(self._lines, None)
            if line is None:
                return at > 0
            self._log.event(line[0], **line[1])
        return True

    def _take(self, now: float) -> None:
        name = self._queue[0]
        pool = self._pools().get(name)
        if pool is None:
            self._queue.popleft()
            return
        # A pool that began anew has another table.
        if self._survey is None or not self._survey.of(pool):
            self._survey = stats.Survey(pool)
        if not self._survey.step():
            return
        self._surveys[name], self._survey = self._survey, None
        self._queue.popleft()
        snapshot = self.pool(name)
        self._taken.append(snapshot)
        self._log.event("pool.statistics", **stats.fields("pool.statistics", snapshot))
        self._check(name, pool)
        self._lines = (
            ("domain.statistics", stats.fields("domain.statistics", each)) for each in list(self.domains(name, now))
        )
        if not self._queue:
            self._say_host()

    def _check(self, name: PoolId, pool: Any) -> None:
        """Count, and hash a few slots again (I3, I6)."""
        violations = stats.audit(pool)
        stretches, self._checked[name] = stats.sample(pool, self._checked.get(name, 0))
        checked = bad = 0
        for first, fingerprints in stretches:
            ok = self._source.area(name).verify(first, fingerprints)
            checked += len(ok)
            bad += ok.count(0)
        if bad:
            violations.append("bytes-differ")
        if violations:
            self._log.event(
                "invariants.violated", pool=name, violations=violations, checked_slots=checked, bad_slots=bad
            )
        else:
            self._log.event("invariants.checked", pool=name, checked_slots=checked)

    def _say_host(self) -> None:
        self._log.event("host.statistics", **stats.fields("host.statistics", self.host(self._taken)))
        self._taken = []

    def _rank(self) -> None:
        if self._rankings[0].step():
            ranking = self._rankings.popleft()
            self._lines = (("file.statistics", stats.fields("file.statistics", row)) for row in list(ranking.rows()))

    # --------------------------------------------------------------------------------------------------- when asked

    def _found(self, name: PoolId, pool: Any) -> stats.Survey:
        """Return a survey of a pool: a new one if that is quick, else the last that was taken."""
        last = self._surveys.get(name)
        if last is not None and last.of(pool) and pool.index.table.totals().pages > stats.SURVEY_PAGES:
            return last
        found = self._surveys[name] = stats.survey(pool)
        return found

    def pool(self, name: PoolId) -> dict[str, Any]:
        """Return a pool's figures now."""
        pool = self._pools()[name]
        mapping = stats.XEN_MAPPING_BYTES if self._config.backend == "xen" else 0
        return stats.pool_snapshot(
            pool,
            self._source.area(name).allocated_bytes(),
            self._source.store_bytes(),
            time.monotonic(),
            mapping_bytes=mapping,
            found=self._found(name, pool),
        )

    def domains(self, name: PoolId, now: float) -> Iterator[dict[str, Any]]:
        """Yield the figures of every domain of a pool."""
        pool = self._pools()[name]
        for snapshot in stats.domain_snapshots({name: pool}, now, {name: self._found(name, pool)}):
            yield snapshot | self._source.memory(snapshot.get("domid", 0))

    def host(self, pools: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of the host, whose pools have these."""
        figures = stats.host_snapshot(pools, self._source.store_bytes(), _anonymous_bytes()) | {
            "backend": self._config.backend,
            "connections": self._source.connection_count(),
            "cpu_ns_total": time.process_time_ns(),
            "log_lines_dropped": self._log.dropped,
        }
        if self._config.backend == "local":  # dom0's is not the host's
            figures |= _meminfo()
        return figures


def _kib(path: str, names: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(path).read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in names:
                found[names[name]] = int(rest.split()[0]) * 1024
    return found


def _meminfo() -> dict[str, int]:
    return _kib("/proc/meminfo", {"MemTotal": "memory_bytes", "MemAvailable": "available_bytes"})


def _anonymous_bytes() -> int:
    """Return our memory that is no mapping of a file or of an area. Costs the kernel nothing, other than smaps."""
    return _kib("/proc/self/status", {"RssAnon": "bytes"}).get("bytes", 0)

"""From log files to tables: what of which file is read, and what is kept so that it is read once.

A log only grows, so what was read of it stays true. Long stretches of lines are kept as Parquet files in a folder of
their log, by their place in it; the rest, at most KEEP_BYTES of each log, is read again each time. Which log it is, the
inode and its first line say: a renamed log is the same one, a truncated one that begins anew is another. (One that is
edited in place is not noticed.)

It knows nothing of what the lines mean: columns.py does.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ..common import __version__
from .columns import COLUMNS, GROUPS, parsing, text

KEEP_BYTES: Final = 64 << 20
"""Stretches of a log from this length on are kept."""

_SLICE_BYTES: Final = 128 << 20  # read at once, where a file cannot be handed over as a whole
_PACKED_KEEP_BYTES: Final = 1 << 20
_LINE_BYTES: Final = 1 << 20  # longer lines are nobody's: ours have 64 KiB at most
_PROBE_BYTES: Final = 1 << 16
_UNUSED_S: Final = 30 * 86_400  # what was kept of a log and not used for as long goes
_SLACK: Final = datetime.timedelta(minutes=10)  # by which clocks may be set back within a log
_FORMAT: Final = hashlib.blake2b(
    json.dumps([__version__, GROUPS, [[c.name, c.type, c.sql] for c in COLUMNS.values()]]).encode(), digest_size=6
).hexdigest()
_STAMP: Final = re.compile(rb'"@timestamp": ?"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)')

Tell = Callable[[int], None]
"""Told how many bytes more have been read."""


@dataclass(frozen=True, slots=True)
class Log:
    """A log file as it was found: `end` is where its last whole line ends, `packed` says that it is a .gz."""

    path: Path
    identity: str
    end: int
    packed: bool


@dataclass(frozen=True, slots=True)
class Part:
    """Lines of one group from a stretch of a log, kept as a Parquet file."""

    start: int
    end: int
    path: Path


def look(path: Path) -> Log | None:
    """Look at a file. None if there is nothing in it, or it is gone. Raises OSError if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        info = os.fstat(fd)
        head = os.pread(fd, 4096, 0)
        packed = head[:2] == b"\x1f\x8b"
        name = [_FORMAT, info.st_dev, info.st_ino, head.partition(b"\n")[0].hex()]
        if packed:
            name += [info.st_size, info.st_mtime_ns]  # it does not grow: another size is another file
            end = info.st_size
        else:
            end = _last_line_end(fd, info.st_size)
            if end < info.st_size and time.time() - info.st_mtime > 60:
                end = info.st_size  # nobody is going to end this line
    finally:
        os.close(fd)
    if end == 0:
        return None
    identity = hashlib.blake2b(json.dumps(name).encode(), digest_size=16).hexdigest()
    return Log(path, identity, end, packed)


def _last_line_end(fd: int, size: int) -> int:
    at = size
    while at > 0:
        begin = max(0, at - _PROBE_BYTES)
        found = os.pread(fd, at - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        at = begin
    return 0


def first_of(log: Log, since: datetime.datetime) -> int:
    """Return a place in a log before which no line is of `since` or later, if its lines are in the order of time."""
    if log.packed:
        return 0
    wanted = (since - _SLACK).isoformat(timespec="seconds").encode()
    fd = os.open(log.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        low, high = 0, log.end  # all before low is too old; what begins at high or later is not
        while high - low > KEEP_BYTES // 4:
            middle = (low + high) // 2
            at, stamp = _stamp_after(fd, middle, high)
            if stamp is None or stamp >= wanted or at >= high:
                high = middle
            else:
                low = at
        return low
    finally:
        os.close(fd)


def _stamp_after(fd: int, place: int, end: int) -> tuple[int, bytes | None]:
    """Return where the first line after a place that has a time begins, and its time."""
    at = place
    rest = b""
    while at < end:
        block = rest + os.pread(fd, min(_PROBE_BYTES, end - at), at)
        start = at - len(rest)
        at += len(block) - len(rest)
        begin = block.find(b"\n") + 1 if start == place else 0
        while (stop := block.find(b"\n", begin)) >= 0:
            found = _STAMP.search(block, begin, stop)
            if found is not None:
                return start + begin, found[1]
            begin = stop + 1
        rest = block[begin:] if len(block) - begin < _LINE_BYTES else b"\n"
        if start + begin == place:
            return place, None
    return place, None


class Cache:
    """Parts that were kept, in a folder of ours. Processes may share it: a part that has its name is complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def parts(self, log: Log, group: str) -> list[Part]:
        """Return what is kept of a log, in order and without overlaps."""
        folder = self._folder / log.identity
        found: list[Part] = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(folder):
                fields = name.split(".")
                if len(fields) == 3 and fields[1] == group and fields[2] == "parquet":
                    start, _, end = fields[0].partition("-")
                    if start.isdecimal() and end.isdecimal():
                        found.append(Part(int(start), int(end), folder / name))
            os.utime(folder)
        chosen: list[Part] = []
        for part in sorted(found, key=lambda part: (part.start, -part.end)):
            if part.end <= log.end and (not chosen or part.start >= chosen[-1].end):
                chosen.append(part)
        return chosen

    def place(self, log: Log, group: str, start: int, end: int) -> Path:
        """Return where a part is when it is kept."""
        return self._folder / log.identity / f"{start}-{end}.{group}.parquet"

    @contextlib.contextmanager
    def adding(self, log: Log, group: str, start: int, end: int) -> Iterator[Path]:
        """Give the path to write a part to; when that is done without an error, the part is kept."""
        folder = self._folder / log.identity
        folder.mkdir(exist_ok=True, mode=0o700)
        made = self.place(log, group, start, end)
        raw = folder / f".{os.getpid()}-{made.name}"
        try:
            yield raw
            raw.replace(made)
        finally:
            raw.unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove what nobody has used for long."""
        oldest = time.time() - _UNUSED_S
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)


def holes(start: int, end: int, parts: list[Part]) -> Iterator[tuple[int, int]]:
    """Yield the stretches from start to end that no part has."""
    at = start
    for part in parts:
        if part.end <= at or part.start >= end:
            continue
        if part.start > at:
            yield at, part.start
        at = part.end
    if at < end:
        yield at, end


class _Grew(Exception):
    """A log was written to while it was read as a whole."""


class Intake:
    """Loads logs into one connection: into its table `fresh`, and as `parts`, the files of what is kept.

    `groups`: what is loaded (columns.GROUPS). `failed`: files that could not be read, and why. `error`: what the
    connection raises.
    """

    def __init__(
        self, connection: Any, cache: Cache, groups: Sequence[str], tell: Tell, error: type[Exception]
    ) -> None:
        self._connection = connection
        self._cache = cache
        self._groups = tuple(groups)
        self._tell = tell
        self._error = error
        self._loaded: dict[str, dict[str, int]] = {}  # how far each log is loaded, by identity and group
        self._spools: dict[tuple[str, ...], _Spool] = {}
        self.parts: list[Path] = []
        self.failed: dict[Path, str] = {}
        columns = ", ".join(f"{column.quoted} {column.type}" for column in COLUMNS.values())
        connection.execute(f"CREATE OR REPLACE TABLE fresh ({columns})")

    def knows_more_than(self, logs: Iterable[Log]) -> bool:
        """Return whether something is loaded that these logs do not have any more."""
        return not set(self._loaded) <= {log.identity for log in logs}

    def load(self, log: Log, start: int) -> None:
        """Load a log, without what is loaded already.

        `start`: the beginning of a line; what is before it may be left out. Call finish() after the last log.
        """
        loaded = self._loaded.get(log.identity)
        if loaded is None:
            loaded = self._loaded[log.identity] = {}
            if log.packed and log.end < _PACKED_KEEP_BYTES:
                self._insert(os.fspath(log.path), self._groups, log)
                return
            for group in self._groups:
                loaded[group] = self._load_kept(log, group, start)
        for begin in sorted({place for place in loaded.values() if place < log.end}):
            groups = tuple(group for group, place in loaded.items() if place == begin)
            self._gather(log, groups, begin, log.end)
            loaded.update(dict.fromkeys(groups, log.end))

    def finish(self) -> None:
        """Take in what was gathered of short stretches."""
        for groups, spool in self._spools.items():
            self._take_in(groups, spool)
        self._spools.clear()

    def _load_kept(self, log: Log, group: str, start: int) -> int:
        """Load what is kept of a log, and keep what is long enough. Return up to where that is."""
        parts = [part for part in self._cache.parts(log, group) if part.end > start]
        self.parts += [part.path for part in parts]
        reached = max([start, *(part.end for part in parts)])
        for begin, end in list(holes(start, log.end, parts)):
            if log.packed or end - begin >= KEEP_BYTES:
                self._keep(log, group, begin, end)
                reached = max(reached, end)
            elif end < log.end:
                self._gather(log, (group,), begin, end)
        return reached

    # ------------------------------------------------------------------------------------------------ long stretches

    def _keep(self, log: Log, group: str, start: int, end: int) -> None:
        try:
            if log.packed or (start == 0 and end == _size(log.path)):
                with contextlib.suppress(_Grew):
                    self._keep_whole(log, group, end)
                    return
            with open(log.path, "rb") as file:
                at = start
                while at < end:
                    stop = _line_end(file.fileno(), at, end)
                    with _Spool() as spool, self._cache.adding(log, group, at, stop) as made:
                        spool.append(file.fileno(), at, stop)
                        self._copy(spool.path, group, made, packed=False)
                    self.parts.append(self._cache.place(log, group, at, stop))
                    self._tell(stop - at)
                    at = stop
        except (OSError, self._error) as error:
            self.failed[log.path] = _first_line(error)

    def _keep_whole(self, log: Log, group: str, end: int) -> None:
        with self._cache.adding(log, group, 0, end) as made:
            self._copy(os.fspath(log.path), group, made, packed=log.packed)
            if not log.packed and _size(log.path) != end:
                raise _Grew
        self.parts.append(self._cache.place(log, group, 0, end))
        self._tell(end)

    def _copy(self, source: str, group: str, made: Path, *, packed: bool) -> None:
        rows = parsing(_reading(source, packed=packed), [group])
        self._connection.execute(f"COPY ({rows}) TO {text(os.fspath(made))} (FORMAT parquet, COMPRESSION zstd)")

    # ----------------------------------------------------------------------------------------------- short stretches

    def _gather(self, log: Log, groups: tuple[str, ...], start: int, end: int) -> None:
        try:
            with open(log.path, "rb") as file:
                at = start
                while at < end:
                    stop = _line_end(file.fileno(), at, end)
                    spool = self._spools.setdefault(groups, _Spool())
                    spool.append(file.fileno(), at, stop)
                    self._tell(stop - at)
                    at = stop
                    if spool.size >= _SLICE_BYTES:
                        self._take_in(groups, self._spools.pop(groups))
        except OSError as error:
            self.failed[log.path] = _first_line(error)

    def _take_in(self, groups: tuple[str, ...], spool: _Spool) -> None:
        with spool:
            self._insert(spool.path, groups)

    def _insert(self, source: str, groups: Sequence[str], log: Log | None = None) -> None:
        rows = parsing(_reading(source, packed=log is not None), groups)
        try:
            self._connection.execute(f"INSERT INTO fresh BY NAME {rows}")
        except self._error as error:
            if log is None:
                raise
            self.failed[log.path] = _first_line(error)


class _Spool:
    """Stretches of logs, one after the other, in memory; `path` is where to read them."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("sharearea-logs", os.MFD_CLOEXEC)
        self.path = f"/proc/self/fd/{self._fd}"
        self.size = 0

    def append(self, fd: int, start: int, end: int) -> None:
        """Add a stretch of a file. Raises OSError."""
        at = start
        while at < end:
            sent = os.sendfile(self._fd, fd, at, end - at)
            if sent == 0:
                break  # truncated meanwhile
            at += sent
            self.size += sent
        os.write(self._fd, b"\n")  # what comes next is another line, whatever this one was

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _reading(path: str, *, packed: bool) -> str:
    """Return SQL for the lines of a file: nothing in them ends one but a newline, and none is an error."""
    return (
        f"read_csv({text(path)}, columns = {{'line': 'VARCHAR'}}, header = false, auto_detect = false, "
        f"delim = '\x01', quote = '', escape = '', new_line = '\\n', strict_mode = false, ignore_errors = true, "
        f"max_line_size = {_LINE_BYTES}, compression = '{'gzip' if packed else 'none'}')"
    )


def _line_end(fd: int, start: int, end: int) -> int:
    """Return where to stop reading from `start`, at most a slice further on, at the end of a line if there is one."""
    if end - start <= _SLICE_BYTES:
        return end
    at = start + _SLICE_BYTES
    found = os.pread(fd, _LINE_BYTES, at - _LINE_BYTES).rfind(b"\n")
    return at - _LINE_BYTES + found + 1 if found >= 0 else at


def _size(path: Path) -> int:
    return path.stat().st_size


def _first_line(error: Exception) -> str:
    return (os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)).partition("\n")[0]

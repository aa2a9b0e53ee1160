"""Log files as an embedded database: Logs finds them, loads what a question needs, and answers SQL over the views.

DuckDB comes with the extra `sharearea[dashboard]` and is imported when a Logs is made.
"""

from __future__ import annotations

import contextlib
import datetime
import glob
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ..common.errors import HostError, UsageError
from ..common.events import EVENTS
from .columns import groups_of, text
from .intake import Cache, Intake, Log, Tell, first_of, look

MEMORY_BYTES: Final = 512 << 20
"""What the database may take; beyond that it uses a temporary folder."""

_MISSING: Final = "pip install 'sharearea[dashboard]' brings it"


_LINES: Final = re.compile(r"^-- generated: lines$.*?^-- end$", re.DOTALL | re.MULTILINE)


def views(*, with_lines: bool = True) -> str:
    """Return the text of views.sql; without what reads the lines, for where they were loaded already."""
    text = (resources.files(__package__) / "views.sql").read_text()
    return text if with_lines else _LINES.sub("", text)


def cache_folder() -> Path:
    """Return where read logs are kept: in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sharearea" / "logs"


def find_logs(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that patterns name, each once. Raises UsageError if there is none."""
    found: dict[tuple[int, int], Path] = {}
    asked = [os.fspath(pattern) for pattern in patterns]
    for pattern in asked:
        names = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        for name in names:
            with contextlib.suppress(OSError):
                info = os.stat(name)
                if os.path.isfile(name):
                    found.setdefault((info.st_dev, info.st_ino), Path(name))
    if not found:
        raise UsageError(f"no log file fits {' '.join(asked)}", "say where they are: --logs GLOB...")
    return list(found.values())


class Logs:
    """Log files, ready to be asked. Not thread-safe; make one for each thread.

    `patterns`: globs or paths; .gz is read too. `since`, `until`: the window that the views look at, in UTC without a
    zone. `events`: load lines of these kinds only; None: all. `cache`: the folder for what was read of long logs, None
    for a temporary one. `tell` hears how many bytes more have been read.

    `failed`: files that could not be read, and why. Raises UsageError if no file is there, HostError without DuckDB or
    if the cache cannot be used.
    """

    def __init__(
        self,
        patterns: Sequence[str | os.PathLike[str]],
        *,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        events: Iterable[str] | None = None,
        cache: Path | None = None,
        tell: Tell = lambda _: None,
    ) -> None:
        try:
            import duckdb
        except ImportError:
            raise HostError("DuckDB is not installed, which reads the logs", _MISSING) from None
        self._patterns = list(patterns)
        self._groups = groups_of(events if events is not None else EVENTS)
        self._tell = tell
        self._error: type[Exception] = duckdb.Error
        self._undo = contextlib.ExitStack()
        try:
            work = self._undo.enter_context(tempfile.TemporaryDirectory(prefix="sharearea-logs-"))
            try:
                self._cache = Cache(cache if cache is not None else Path(work, "cache"))
                self._cache.prune()
            except OSError as error:
                raise HostError(f"cannot use {cache}: {error.strerror}", "--no-cache does without") from None
            self._connection: Any = duckdb.connect()
            self._undo.callback(self._connection.close)
            for setting in (
                f"memory_limit = '{MEMORY_BYTES >> 20}MiB'",
                f"temp_directory = {text(os.path.join(work, 'spill'))}",
                "preserve_insertion_order = false",
                "autoinstall_known_extensions = false",
            ):
                self._connection.execute(f"SET {setting}")
            self._since, self._until = since, until
            self._begin()
        except BaseException:
            self._undo.close()
            raise

    def _begin(self) -> None:
        """Load from nothing."""
        self._floor = self._since
        self._intake = Intake(self._connection, self._cache, self._groups, self._tell, self._error)
        self.refresh()

    def refresh(self) -> None:
        """Look at the files again: at lines that were added, at files that came or went."""
        logs = self._look()
        if self._intake.knows_more_than(logs):
            self._intake = Intake(self._connection, self._cache, self._groups, self._tell, self._error)
        for log in logs:
            self._intake.load(log, first_of(log, self._floor) if self._floor is not None else 0)
        self._intake.finish()
        self.failed |= self._intake.failed
        rows = "FROM fresh"
        if self._intake.parts:
            parts = ", ".join(text(os.fspath(path)) for path in self._intake.parts)
            rows += f" UNION ALL BY NAME FROM read_parquet([{parts}], union_by_name = true)"
        self._connection.execute(f"CREATE OR REPLACE VIEW lines AS {rows}")
        self._connection.execute(views(with_lines=False))
        self.window(self._since, self._until)

    def _look(self) -> list[Log]:
        self.files = find_logs(self._patterns)
        self.failed: dict[Path, str] = {}
        found = []
        for path in self.files:
            try:
                log = look(path)
            except OSError as error:
                self.failed[path] = error.strerror or str(error)
                continue
            if log is not None:
                found.append(log)
        return found

    def window(self, since: datetime.datetime | None, until: datetime.datetime | None) -> None:
        """Set the window that the views look at."""
        self._since, self._until = since, until
        if self._floor is not None and (since is None or since < self._floor):
            self._begin()
        self._connection.execute("SET VARIABLE since = ?::TIMESTAMP", [since])
        self._connection.execute("SET VARIABLE until = ?::TIMESTAMP", [until])

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of one statement, by column names. Times are datetimes without a zone, in UTC."""
        cursor = self._connection.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def close(self) -> None:
        """Let go of everything. Twice is fine."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

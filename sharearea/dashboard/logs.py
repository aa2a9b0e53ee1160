"""Log files as an embedded database: Logs finds them, loads what a question needs, and answers SQL over the views.

DuckDB comes with the extra `sharearea[dashboard]` and is imported when a Logs is made.
"""

from __future__ import annotations

import datetime
import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ..common.errors import HostError, UsageError

MEMORY_BYTES: Final = 512 << 20
_MISSING: Final = "pip install 'sharearea[dashboard]' brings it"


def views() -> str:
    """Return the text of views.sql."""
    return (resources.files(__package__) / "views.sql").read_text()


def find_logs(patterns: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Return the files that patterns name, each once. Raises UsageError if there is none."""
    found: dict[Path, None] = {}
    asked = [os.fspath(pattern) for pattern in patterns]
    for pattern in asked:
        for name in sorted(glob.glob(pattern, recursive=True)) or [pattern]:
            if Path(name).is_file():
                found.setdefault(Path(name))
    if not found:
        raise UsageError(f"no log file fits {' '.join(asked)}", "say where they are: --logs GLOB...")
    return list(found)


class Logs:
    """Log files, ready to be asked. Not thread-safe; one thread each.

    `patterns`: globs or paths; .gz is read too. `since`, `until`: the window that the views look at, as UTC without a
    zone. `events`: load lines of these kinds only; None: all. Raises UsageError if no file is there, HostError without
    DuckDB or if a file cannot be read.
    """

    def __init__(
        self,
        patterns: Sequence[str | os.PathLike[str]],
        *,
        since: datetime.datetime | None = None,
        until: datetime.datetime | None = None,
        events: Iterable[str] | None = None,
    ) -> None:
        try:
            import duckdb
        except ImportError:
            raise HostError("DuckDB is not installed, which reads the logs", _MISSING) from None
        self._patterns = list(patterns)
        self._events = frozenset(events) if events is not None else None
        self._connection: Any = duckdb.connect()
        self._connection.execute(f"SET memory_limit = '{MEMORY_BYTES >> 20}MiB'")
        self.window(since, until)
        self.refresh()
        self._connection.execute(views())

    def refresh(self) -> None:
        """Look at the files again: lines that were added, files that came or went."""
        self.files = find_logs(self._patterns)
        self._connection.execute("SET VARIABLE logs = ?", [[os.fspath(path) for path in self.files]])

    def window(self, since: datetime.datetime | None, until: datetime.datetime | None) -> None:
        """Set the window that the views look at."""
        self._connection.execute("SET VARIABLE since = ?::TIMESTAMP", [since])
        self._connection.execute("SET VARIABLE until = ?::TIMESTAMP", [until])

    def query(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of one statement, by column names. Times come as datetimes without a zone, in UTC."""
        cursor = self._connection.execute(sql, parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def close(self) -> None:
        """Let go of everything. Twice is fine."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""The columns that lines of the log become: one for each field of the catalogue, and some of the keys of every line.

A field's column has the field's name (`saved_bytes` is the key `sharearea.saved_bytes`). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..common.events import EVENTS, FIELDS

READ_OPTIONS: Final = "format = 'newline_delimited', ignore_errors = true, maximum_object_size = 16777216"
"""How DuckDB is to read lines: what is broken becomes a row without an event, a value of a wrong type becomes NULL."""

_TYPES: Final = {
    "integer": "BIGINT",
    "number": "DOUBLE",
    "string": "VARCHAR",
    "boolean": "BOOLEAN",
    "strings": "VARCHAR[]",
}
_OURS: Final = "starts_with(\"event.dataset\", 'sharearea.')"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its name, the key and the DuckDB type of what it is read from, and how it is made of that."""

    name: str
    key: str
    type: str
    expression: str = ""

    @property
    def sql(self) -> str:
        """Return the expression over the read keys."""
        return self.expression or f'"{self.key}"'

    @property
    def quoted(self) -> str:
        """Return the name as SQL takes it."""
        return f'"{self.name}"'


COLUMNS: Final[dict[str, Column]] = {
    column.name: column
    for column in (
        Column("time", "@timestamp", "TIMESTAMP"),
        Column("event", "event.name", "VARCHAR", f'CASE WHEN {_OURS} THEN "event.name" END'),
        Column("level", "log.level", "VARCHAR"),
        Column("host", "host.name", "VARCHAR"),
        Column("program", "event.dataset", "VARCHAR", f'CASE WHEN {_OURS} THEN substr("event.dataset", 11) END'),
        Column("pid", "process.pid", "BIGINT"),
        Column("sequence", "event.sequence", "BIGINT"),
        Column("version", "service.version", "VARCHAR"),
        Column("message", "message", "VARCHAR"),
        *(Column(field.name, field.key, _TYPES[field.type]) for field in FIELDS.values()),
    )
}

ALWAYS: Final = ("time", "event", "level", "host", "program", "pid", "sequence", "version", "message")


def columns_of(events: Iterable[str]) -> dict[str, Column]:
    """Return the columns that lines of these events can fill."""
    wanted = set(ALWAYS)
    for event in events:
        wanted.update(EVENTS[event].fields, EVENTS[event].options)
    return {name: column for name, column in COLUMNS.items() if name in wanted}

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


GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "domains": ("domain.statistics",),
    "files": ("file.statistics",),
    "plain": ("files.plain",),
    "traffic": (
        "pages.published",
        "pages.granted",
        "pages.released",
        "pages.revoked",
        "files.shared",
        "files.returned",
        "files.withdrawn",
        "invariants.checked",
        "memory.taken",
        "memory.returned",
        "scan.finished",
    ),
}
GROUPS["summary"] = tuple(name for name in EVENTS if not any(name in events for events in GROUPS.values()))
"""Events that are loaded together. Most lines are traffic or figures of domains, which most questions do not need."""

_TIME_CHARACTERS: Final = len('{"@timestamp": "2026-11-20T18:49:26.838Z"')
_MARK_CHARACTERS: Final = 60


def mark(event: str) -> str:
    """Return what lines of an event, as our programs write them, have at `MARK`: it tells them without reading JSON."""
    kind = EVENTS[event]
    return f', "log.level": "{kind.level}", "message": "{kind.message}", "ecs.version"'[:_MARK_CHARACTERS]


MARK: Final = f"substring(line, {_TIME_CHARACTERS + 1}, {_MARK_CHARACTERS})"
"""Where `mark` is, as SQL over `line`."""


def groups_of(events: Iterable[str]) -> list[str]:
    """Return the groups that have these events."""
    wanted = set(events)
    return [name for name, some in GROUPS.items() if wanted.intersection(some)]


def text(value: str) -> str:
    """Return a text as SQL takes it."""
    return "'" + value.replace("'", "''") + "'"


def parsing(source: str, groups: Iterable[str]) -> str:
    """Return SQL that reads lines and gives the rows of these groups, with the columns that they can fill.

    `source`: what has the lines, in a column `line`. With the summary come lines that are no event that we know: those
    of later versions with their names, all others without.
    """
    wanted = list(dict.fromkeys(groups))
    events = [event for group in wanted for event in GROUPS[group]]
    columns = columns_of(events).values()
    marks = {mark(event) for event in EVENTS if event not in events} - {mark(event) for event in events}
    passed_over = f"AND {MARK} NOT IN ({', '.join(map(text, sorted(marks)))})" if marks else ""
    shape = "{" + ", ".join(f'"{column.key}": "{column.type}"' for column in columns) + "}"
    shape = shape.replace('"VARCHAR[]"', '["VARCHAR"]')
    selected = ", ".join(f"{column.sql} AS {column.quoted}" for column in columns)
    # A join, since WHERE would be moved down and read JSON in lines that need none. The one of the summary keeps
    # rows without an event.
    others = [event for event in EVENTS if event not in events]
    kind, names = ("ANTI", others) if "summary" in wanted else ("SEMI", events)
    chosen = f"{kind} JOIN (SELECT unnest([{', '.join(map(text, names))}]::VARCHAR[]) AS event) USING (event)"
    return (
        f"SELECT * FROM (SELECT {selected} FROM (SELECT unnest(parsed) FROM ("
        f"SELECT CASE WHEN json_valid(line) THEN json_transform(line, {text(shape)}) END AS parsed FROM {source} "
        f"WHERE line IS NOT NULL {passed_over}))) {chosen}"
    )

"""Write the JSON Schema of every event (sharearea/schemas) and the tables of docs/events.md from the catalogue.

A table goes between `<!-- generated: NAME -->` and `<!-- end -->`; the prose is written by hand. Run without arguments
it rewrites all of it. tests/test_events.py fails when something is out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sharearea.common.events import (
    COMMON,
    ECS_VERSION,
    EVENTS,
    FIELDS,
    MAX_EXAMPLES,
    MAX_PATH_TEXT,
    MAX_TEXT,
    SEVERITY,
    SIGNED,
    Field,
    Kind,
)

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "sharearea" / "schemas"
DOCUMENT = ROOT / "docs" / "events.md"

_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def schemas() -> dict[str, str]:
    """Return the text of every schema by the name of its file."""
    return {f"{name}.json": json.dumps(_schema(kind), indent=2) + "\n" for name, kind in EVENTS.items()}


def _schema(kind: Kind) -> dict[str, Any]:
    fields = [FIELDS[name] for name in (*kind.fields, *kind.options)]
    properties = {field.key: _property(field) for field in COMMON}
    datasets = [f"sharearea.{program}" for program in kind.programs]
    for key, value in (
        ("@timestamp", {"format": "date-time", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"}),
        ("message", {"const": kind.message}),
        ("log.level", {"const": kind.level}),
        ("ecs.version", {"const": ECS_VERSION}),
        ("event.name", {"const": kind.name}),
        ("event.action", {"const": kind.name}),
        ("event.kind", {"const": kind.kind}),
        ("event.category", {"const": [kind.category]}),
        ("event.type", {"const": list(kind.type)}),
        ("event.outcome", {"const": kind.outcome}),
        ("event.severity", {"const": SEVERITY[kind.level]}),
        ("event.sequence", {"minimum": 1}),
        ("event.module", {"const": "sharearea"}),
        ("event.dataset", {"enum": datasets}),
        ("service.name", {"enum": ["sharearea" if p == "broker" else "sharearea-agent" for p in kind.programs]}),
    ):
        properties[key] |= value
    properties |= {field.key: _property(field) for field in fields}
    if kind.reasons:
        properties["event.reason"] |= {"enum": list(kind.reasons)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:sharearea:event:{kind.name}",
        "title": kind.name,
        "description": kind.message,
        "type": "object",
        "properties": properties,
        "required": [field.key for field in COMMON] + [FIELDS[name].key for name in kind.fields],
        "additionalProperties": False,
    }


def _property(field: Field) -> dict[str, Any]:
    described: dict[str, Any] = {"description": field.text}
    if field.unit:
        described["x-unit"] = field.unit
    longest = MAX_PATH_TEXT if field.name == "path" else MAX_TEXT
    match field.type:
        case "strings":
            described |= {"type": "array", "items": {"type": "string", "maxLength": longest}}
            if field.name == "examples":
                described |= {"maxItems": MAX_EXAMPLES}
        case "string":
            described |= {"type": "string", "minLength": 1, "maxLength": longest}
        case "integer" | "number":
            described |= {"type": field.type}
            if field.name not in SIGNED:
                described |= {"minimum": 0}
        case "boolean":
            described |= {"type": "boolean"}
    return described


def filled(document: str) -> str:
    """Return the document with every generated part as the catalogue is now. Raises KeyError for an unknown part."""
    parts = {"common": _common(), "events": _events(), "fields": _fields(), "list": _list()}
    return _BLOCK.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", document)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _common() -> str:
    return _table(("key", "what"), ((f"`{field.key}`", field.text) for field in COMMON))


def _list() -> str:
    rows = (
        (f"[`{n}`](#{n.replace('.', '')})", k.level, " and ".join(k.programs), k.message) for n, k in EVENTS.items()
    )
    return _table(("event", "level", "by", "what it says"), rows)


def _events() -> str:
    parts = []
    for name, kind in EVENTS.items():
        ecs = f"kind `{kind.kind}`, category `{kind.category}`, type `{', '.join(kind.type)}`, outcome `{kind.outcome}`"
        text = f"### {name}\n\n{kind.message[0].upper()}{kind.message[1:]}. {kind.level}; {ecs}."
        if kind.gathered:
            text += " Gathered: one line for all of an interval."
        for label, names in (("always", kind.fields), ("where it applies", kind.options)):
            if names:
                text += f"\n\n{label}: {', '.join(f'`{FIELDS[n].key}`' for n in names)}"
        if kind.reasons:
            text += f"\n\nreasons: {', '.join(f'`{reason}`' for reason in kind.reasons)}"
        parts.append(text + "\n")
    return "\n".join(parts)


def _fields() -> str:
    fields = sorted(FIELDS.values(), key=lambda field: field.key)
    return _table(("key", "type", "unit", "what"), ((f"`{f.key}`", f.type, f.unit, f.text) for f in fields))


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for old in SCHEMAS.glob("*.json"):
        old.unlink()
    for file_name, schema in schemas().items():
        (SCHEMAS / file_name).write_text(schema)
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))

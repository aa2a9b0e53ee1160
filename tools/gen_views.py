"""Write what sharearea/dashboard/views.sql has of the catalogue of events: the columns, and lists of classes.

A part goes between `-- generated: NAME` and `-- end`; the rest is written by hand. Run without arguments it rewrites
all of them. tests/dashboard/test_views.py fails when something is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

from sharearea.common.events import OWNER_BUCKETS
from sharearea.dashboard.columns import COLUMNS, READ_OPTIONS

VIEWS = Path(__file__).resolve().parent.parent / "sharearea" / "dashboard" / "views.sql"

_CLASSES = ("text", "rodata", "data")
_BLOCK = re.compile(r"( *)(-- generated: ([a-z-]+)\n).*?( *-- end\n)", re.DOTALL)


def _lines() -> list[str]:
    columns = list(COLUMNS.values())
    found = ["CREATE OR REPLACE VIEW lines AS", "SELECT"]
    found += [f"    {column.sql} AS {column.quoted}," for column in columns]
    found[-1] = found[-1].rstrip(",")
    found += ["FROM read_json(", "    getvariable('logs'),", f"    {READ_OPTIONS},", "    columns = {"]
    found += [f"        '{column.key}': '{column.type}'," for column in columns]
    found[-1] = found[-1].rstrip(",")
    return [*found, "    }", ");"]


def _owners() -> list[str]:
    rows = [
        f"{{kind: '{kind}', owners: '{bucket}', slots: slots_{kind}_{end}}},"
        for kind, buckets in (("held", OWNER_BUCKETS), ("mapped", OWNER_BUCKETS[1:]))
        for bucket in buckets
        for end in [f"by_{bucket}" if kind == "held" else f"{bucket}_times"]
    ]
    rows[-1] = rows[-1].rstrip(",")
    return rows


def _classes() -> list[str]:
    rows = [
        f"{{kind: '{kind}', class: '{name}', bytes: {kind}_{name}_bytes}},"
        for kind, names in (("reported", _CLASSES), ("mapped", (*_CLASSES, "unclassified")))
        for name in names
    ]
    rows[-1] = rows[-1].rstrip(",")
    return rows


PARTS = {"lines": _lines, "owners": _owners, "classes": _classes}


def filled(text: str) -> str:
    """Return the views with every generated part as it is to be."""

    def part(found: re.Match[str]) -> str:
        indent, head, name, end = found.groups()
        return indent + head + "".join(f"{indent}{line}\n" for line in PARTS[name]()) + end

    return _BLOCK.sub(part, text)


if __name__ == "__main__":
    VIEWS.write_text(filled(VIEWS.read_text()))

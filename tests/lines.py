"""Checks what programs logged against the schemas that the package ships."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator


@cache
def validator(name: str) -> Draft202012Validator | None:
    """Return what checks lines of an event, None for one that has no schema."""
    file = resources.files("sharearea") / "schemas" / f"{name}.json"
    return Draft202012Validator(json.loads(file.read_text())) if file.is_file() else None


def faults(lines: Iterable[str]) -> list[str]:
    """Return what is wrong with lines: with each by its schema, and with their order.

    A line that is no object is somebody else's, of the interpreter or of the command line, and passed over.
    """
    found: list[str] = []
    last: dict[int, int] = {}
    for line in lines:
        if not line.startswith("{"):
            continue
        try:
            event: dict[str, Any] = json.loads(line)
        except ValueError:
            found.append(f"half a line: {line[:200]}")
            continue
        check = validator(str(event.get("event.name")))
        if check is None:
            found.append(f"no such event: {line[:200]}")
            continue
        found += [f"{event['event.name']}: {error.json_path}: {error.message}" for error in check.iter_errors(event)]
        pid, sequence = event.get("process.pid", 0), event.get("event.sequence", 0)
        if sequence == 1 and event["event.name"].endswith(".started"):
            last.pop(pid, None)  # another process: numbers come again
        if sequence != last.get(pid, 0) + (
            event.get("sharearea.lines", 1) if event["event.name"] == "log.dropped" else 1
        ):
            found.append(f"{event['event.name']}: line {sequence} of process {pid} follows line {last.get(pid, 0)}")
        last[pid] = sequence
    return found


def read(path: Path) -> list[str]:
    """Return the lines of a log."""
    return path.read_text(errors="replace").splitlines()

"""What the documents and catalogues say is what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from sharearea.common import errors
from sharearea.common.events import EVENTS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    *sorted((ROOT / "sharearea").rglob("*.py")),
    *sorted((ROOT / "guest-agent" / "sharearea_agent").glob("*.py")),
]


def test_exit_codes_are_documented_as_they_are() -> None:
    rows = re.findall(r"^\| (\d+) \| ([\w, ]*?) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    said = {name: int(code) for code, names in rows for name in names.split(", ") if name}
    real = {
        name: error.exit_code
        for name, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, errors.ShareareaError)
    }
    del real["Closed"]  # a fault of the program that uses a handle; no command ends with it
    assert said == real


def test_every_relative_link_leads_somewhere() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
        if not (document.parent / target).exists()
    ]
    assert not broken


def test_every_logged_event_is_in_the_catalogue_and_the_other_way_round() -> None:
    calls = r"(?:\.event|_log|_tally|_count|_write|_log_details)"
    pattern = re.compile(calls + r'\(\s*(?:pool,\s*|peer\.pool,\s*)?"([a-z]+\.[a-z_]+)"')
    logged = {name for source in SOURCES for name in pattern.findall(source.read_text())}
    # One call names its two events in a condition; two events are written when their turn comes.
    logged |= {"broker.lost", "broker.unreachable", "domain.statistics", "file.statistics"}
    assert logged == set(EVENTS)

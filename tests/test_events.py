"""The catalogue of events, what is generated from it, and the lines that come out of it."""

from __future__ import annotations

import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sharearea.area import xen
from sharearea.backend import base, local
from sharearea.common.events import COMMON, EVENTS, FIELDS, Kind
from sharearea.common.logs import EventLog
from tests.lines import faults
from tools import gen_events

ROOT = Path(__file__).resolve().parent.parent

# ECS 8.11: allowed values of event.kind, event.category and event.type.
KINDS = {"alert", "event", "metric"}
CATEGORIES = {"configuration", "database", "file", "host", "network", "process", "session"}
TYPES = {"access", "allowed", "change", "connection", "creation", "denied", "end", "info", "protocol", "start"}


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was written, parsed."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def sample(kind: Kind) -> dict[str, object]:
    """Return fields that fit an event."""
    values: dict[str, object] = {"integer": 1, "number": 0.5, "string": "x", "boolean": True, "strings": ["x"]}
    fields = {name: values[FIELDS[name].type] for name in (*kind.fields, *kind.options)}
    if kind.reasons:
        fields["reason"] = kind.reasons[-1]
    return fields


def test_what_is_generated_is_current() -> None:
    assert {path.name: path.read_text() for path in gen_events.SCHEMAS.glob("*.json")} == gen_events.schemas()
    document = gen_events.DOCUMENT.read_text()
    assert document == gen_events.filled(document)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_an_event_fits_its_schema_and_nothing_else_does(name: str) -> None:
    schema = json.loads((gen_events.SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    kind = EVENTS[name]
    stream = io.StringIO()
    log = EventLog("sharearea" if "broker" in kind.programs else "sharearea-agent", "debug", stream)
    log.event(name, **sample(kind))
    assert faults(stream.getvalue().splitlines()) == []
    [line] = lines(stream)
    assert list(line)[: len(COMMON)] == [field.key for field in COMMON]
    check = Draft202012Validator(schema)
    for key in line:
        assert not check.is_valid({other: value for other, value in line.items() if other != key}) or key in {
            FIELDS[option].key for option in kind.options
        }, key
        assert not check.is_valid(line | {key: {"an": "object"}}), key
        assert not check.is_valid(line | {key: None}), key
    assert not check.is_valid(line | {"sharearea.other": 1})
    if kind.reasons:
        assert not check.is_valid(line | {"event.reason": "for no reason"})


def test_the_catalogue_keeps_its_own_conventions() -> None:
    used = {name for kind in EVENTS.values() for name in (*kind.fields, *kind.options)}
    assert used == set(FIELDS)
    keys = [field.key for field in FIELDS.values()]
    assert len(keys) == len(set(keys))
    assert not set(keys) & {field.key for field in COMMON}
    # No key is the beginning of another one: it would be a value and an object at once.
    everything = {*keys, *(field.key for field in COMMON)}
    assert not [(a, b) for a in everything for b in everything if b.startswith(a + ".")]
    for field in FIELDS.values():
        suffix = {"bytes": "_bytes", "ns": "_ns", "ms": "_ms", "ratio": "_ratio"}.get(field.unit, "")
        assert field.name.removesuffix("_total").endswith(suffix), field.name
        assert field.text.endswith("."), field.name
    for kind in EVENTS.values():
        assert {kind.kind} <= KINDS
        assert {kind.category} <= CATEGORIES, kind.name
        assert set(kind.type) <= TYPES, kind.name
        assert kind.outcome in ("success", "failure", "unknown")
        assert len({*kind.fields, *kind.options}) == len(kind.fields) + len(kind.options), kind.name
        assert not {"detail", "error"} <= {*kind.fields, *kind.options}
        assert ("error" in kind.fields) <= (kind.outcome == "failure"), kind.name


def test_every_reason_that_the_code_gives_is_in_the_catalogue() -> None:
    engine = (ROOT / "sharearea" / "engine.py").read_text()
    policy = (ROOT / "sharearea" / "policy.py").read_text()
    said = set(re.findall(r'_refuse\(\s*peer,\s*"([a-z-]+)"', engine))
    said |= set(re.findall(r'Refusal\(\s*"([a-z-]+)"', policy))
    said |= set(re.findall(r'_expel\([\w.]+, "([a-z-]+)"', engine)) - {"struck-out"}
    said |= set(re.findall(r'wire\.Refused\("([a-z-]+)"', engine))
    assert said <= set(EVENTS["domain.refused"].reasons)
    assert len(said) > 10
    strikes = set(re.findall(r'_(?:expel|strike)\([^"\n]*"([a-z-]+)"', engine))
    assert strikes <= set(EVENTS["peer.strike"].reasons)
    assert set(re.findall(r'_pause\([^"]*"([a-z-]+)"', engine)) == set(EVENTS["pool.paused"].reasons)
    begun = set()
    for source in (inspect.getsource(base), inspect.getsource(local._adopt), inspect.getsource(xen.XenArea.adopt)):
        begun |= set(re.findall(r'return f?"([a-z-]+)', source))
    assert begun == set(EVENTS["area.opened"].reasons)
    agent = (ROOT / "guest-agent" / "sharearea_agent" / "agent.py").read_text()
    plain = set(re.findall(r'(?:_settle_plain|_plain)\([^"\n]*"([a-z-]+)"', agent))
    plain |= set(re.findall(r'return "([a-z-]+)"', agent))
    assert plain <= set(EVENTS["files.plain"].reasons)
    assert len(plain) > 8


def test_what_is_not_known_is_left_out_and_what_is_long_is_cut() -> None:
    stream = io.StringIO()
    log = EventLog("sharearea", stream=stream)
    log.event("domain.joined", domain="d", pool="p", rule=None, uid=0)
    log.event("domain.refused", reason="malformed", detail="x" * 5000, domain="")
    log.about(pool="q")
    log.event("segment.closed", segment=1)
    joined, refused, closed = lines(stream)
    assert "sharearea.rule" not in joined
    assert joined["sharearea.uid"] == 0
    assert len(refused["error.message"]) == 1024
    assert "sharearea.domain" not in refused
    assert closed["sharearea.pool"] == "q"
    assert [line["event.sequence"] for line in (joined, refused, closed)] == [1, 2, 3]
    assert faults(stream.getvalue().splitlines()) == []


def test_faults_are_found() -> None:
    stream = io.StringIO()
    log = EventLog("sharearea", stream=stream)
    log.event("segment.closed", pool="p", segment=1)
    log.event("segment.closed", pool="p", segment="one")
    log.event("segment.closed", pool="p", segment=3, more=1)
    log.event("segment.closed", segment=4)
    text = stream.getvalue().splitlines()
    assert len(faults(text)) == 3
    assert "follows line" in faults([text[0], *text[2:]])[-1] or "follows line" in " ".join(
        faults([text[0], *text[2:]])
    )
    assert faults(['{"event.name": "segment.cl']) == ['half a line: {"event.name": "segment.cl']
    assert faults(["Traceback (most recent call last):"]) == []


def test_levels_below_the_configured_one_are_not_written() -> None:
    stream = io.StringIO()
    log = EventLog("sharearea", "warning", stream)
    log.event("segment.closed", pool="p", segment=1)
    log.event("broker.limit", detail="x")
    assert [line["event.name"] for line in lines(stream)] == ["broker.limit"]

"""Write the tables of docs/protocol.md from the message classes; the prose between them is written by hand.

A table goes between `<!-- generated: NAME -->` and `<!-- end -->`. Run without arguments it rewrites the document.
tests/test_wire.py fails when the document is out of date.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from sharearea.common import wire
from sharearea.common.wire import Codec
from sharearea.model import Verdict, WithdrawReason
from sharearea_agent import consumer_wire

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"

_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)

_LIMITS = (
    ("PROTOCOL_VERSION", "spoken by this version"),
    ("PAGE_SIZE", "bytes of a page"),
    ("FINGERPRINT_SIZE", "bytes of a fingerprint, a file root, a pool's key"),
    ("CLASSES_SIZE", "bytes of a file's page classes"),
    ("MAX_FILE_PAGES", "pages of a file that can be reported whole or in part"),
    ("MAX_REPORT_FILES", "files in one Roots or Verdicts"),
    ("MAX_REPORT_PAGES", "fingerprints in one Pages"),
    ("MAX_FETCH_PAGES", "pages in one Fetch or Data"),
    ("MAX_IDS", "numbers in one Offer, Withdraw, Retired or SegmentsGone"),
    ("MAX_CHANGES", "files in one Gone or Release"),
    ("MAX_ATTACH", "files in one Attach or Denied"),
    ("MAX_HELD", "files in Hello.held"),
    ("MAX_GRANT_RUNS", "runs in one Granted or Share"),
    ("MAX_GLOBS", "globs in Welcome.include and in Welcome.exclude"),
    ("MAX_PATH", "bytes of a path, characters of a glob"),
)


def filled(document: str) -> str:
    """Return the document with every generated part as the classes are now. Raises KeyError for an unknown part."""
    parts = {
        "limits": _limits(),
        "frames": _frames(),
        "agent-to-broker": _messages(wire.AGENT_TO_BROKER),
        "broker-to-agent": _messages(wire.BROKER_TO_AGENT),
        "consumer-to-agent": _messages(cast(Codec, consumer_wire.CONSUMER_TO_AGENT)),
        "agent-to-consumer": _messages(cast(Codec, consumer_wire.AGENT_TO_CONSUMER)),
        "verdicts": _numbers(Verdict),
        "withdraw-reasons": _numbers(WithdrawReason),
    }
    return _BLOCK.sub(lambda found: f"{found[1]}\n{parts[found[2]]}\n{found[3]}", document)


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _limits() -> str:
    return _table(("constant", "value", "what"), ((f"`{name}`", getattr(wire, name), what) for name, what in _LIMITS))


def _frames() -> str:
    codecs = (
        wire.AGENT_TO_BROKER,
        wire.BROKER_TO_AGENT,
        consumer_wire.CONSUMER_TO_AGENT,
        consumer_wire.AGENT_TO_CONSUMER,
    )
    return _table(("direction", "longest payload, bytes"), ((codec.name, codec.max_frame) for codec in codecs))


def _messages(codec: Codec) -> str:
    parts = []
    for message in codec.messages:
        text = " ".join((message.__doc__ or "").split())
        fd = "\n\nA descriptor travels with it." if message.FD else ""
        fields = dataclasses.fields(cast(Any, message))
        rows = _table(("field", "kind and bound"), ((f"`{f.name}`", f.metadata["kind"].text) for f in fields))
        parts.append(f"#### {message.TYPE} {message.__name__} ({codec.name})\n\n{text}{fd}\n\n{rows}")
    return "\n".join(parts)


def _numbers(numbers: type[enum.IntEnum]) -> str:
    return _table(("number", "code"), ((n.value, f"`{n.name.lower().replace('_', '-')}`") for n in numbers))


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))

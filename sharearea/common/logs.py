"""Structured logs of both programs: JSON lines, one event name per kind of line, flat dotted keys.

Conventions: ECS and OpenTelemetry's log model where they have a key, `sharearea.` and KSM's words where they do not;
units at the end of a name. Never a fingerprint, never a key: fields are numbers, names and reasons. A sink that cannot
be written drops the line and counts it; a program never stops because of its log.
"""

from __future__ import annotations

import datetime
import io
import logging
import socket
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO, cast

import structlog

ECS_VERSION: Final = "8.11.0"

EVENTS: Final[dict[str, tuple[str, str]]] = {
    # name: (level, what it says)
    "broker.started": ("info", "the broker serves"),
    "broker.stopped": ("info", "the broker stopped"),
    "broker.lost": ("warning", "the connection to the broker ended; consumers keep what they have"),
    "broker.unreachable": ("warning", "the broker cannot be reached; it is tried again"),
    "config.warning": ("warning", "the configuration says something that cannot have the effect one would expect"),
    "broker.limit": ("error", "the broker is at a limit of this host; it goes on with what it has"),
    "agent.started": ("info", "the agent runs"),
    "agent.stopped": ("info", "the agent stopped"),
    "agent.limit": ("error", "the agent is at a limit of this host; it goes on with what it has"),
    "area.adopted": ("info", "the sharing area of the last broker is served again"),
    "area.opened": ("info", "a pool begins with an empty sharing area"),
    "area.lost": ("error", "the sharing area is gone; its pool begins anew with another one"),
    "store.set_aside": ("warning", "the store could not be used; a fresh one begins"),
    "store.failed": ("error", "the store could not be written; nothing of the transaction is in force"),
    "domain.joined": ("info", "a domain shares in its pool"),
    "domain.refused": ("warning", "a domain may not share"),
    "domain.unreachable": ("warning", "a domain offers rings that cannot be used"),
    "domain.left": ("info", "a domain's agent is gone; its grants are kept for the grace time"),
    "peer.strike": ("warning", "a peer sent what it must not"),
    "pool.paused": ("error", "nothing more is published for a while"),
    "pages.published": ("info", "pages are in the sharing area"),
    "pages.granted": ("info", "a domain may map pages"),
    "pages.released": ("info", "a domain let go of pages"),
    "pages.revoked": ("info", "a domain is asked to let go of pages"),
    "grants.refused": ("warning", "grants were refused: the table or the domain's part of it is full"),
    "grants.pinned": (
        "warning",
        "a domain still maps pages whose grants it has released; they stay counted against it",
    ),
    "grants.failed": ("error", "grants could not be written into the area's table; none of them is in force"),
    "grants.reconciled": ("warning", "after a restart, owners and entries of the area's table were made the same"),
    "domain.detached": ("info", "a domain's programs go back to their plain files, by the operator's wish"),
    "domain.reattached": ("info", "a detached domain may share again"),
    "segment.moved": ("info", "pages of a thinly used segment are in a newer one"),
    "segment.closed": ("info", "a segment's memory went back to the host"),
    "memory.taken": ("info", "a domain's memory target was lowered by what it gave up"),
    "memory.returned": ("info", "a domain's memory target was raised again"),
    "memory.failed": ("error", "memory targets cannot be read or written; it is tried again"),
    "pool.statistics": ("info", "what a pool shares now"),
    "scan.finished": ("info", "the designated folders were looked through"),
    "scan.failed": ("error", "part of the designated folders could not be looked at"),
    "cache.noticed": ("info", "something about the fingerprint cache or the globs of the broker"),
    "cache.failed": ("error", "the fingerprint cache cannot be used; files are read again when they are wanted"),
    "watch.limited": ("warning", "not every folder can be watched; the periodic scan finds changes there"),
    "file.mismatch": ("error", "a consumer found other bytes in the area than in the file; the file stays plain"),
    "consumer.refused": ("warning", "a program sent what it must not; its files stay plain"),
    "consumer.hung": ("error", "a program does not put its plain files back while a writer waits"),
    "mappings.limited": ("warning", "pages of the area cannot be shared with this guest's programs, or not safely"),
    "domain.suspending": ("info", "this domain is about to be suspended; consumers go back to their plain files"),
    "domain.restored": ("info", "this domain goes on as another one; what was shared is void, and begins anew"),
    "files.detached": ("info", "consumers go back to their plain files"),
    "files.reattached": ("info", "consumers may share again"),
}


class _Sink(io.TextIOBase):
    """A text stream that never fails: what cannot be written is counted."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.dropped = 0

    def write(self, text: str) -> int:
        """Write a line, or count it as dropped."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped += 1


class EventLog:
    """Writes events of one program as JSON lines."""

    def __init__(self, service: str, level: str = "info", stream: TextIO | None = None) -> None:
        self._sink = _Sink(stream or sys.stderr)
        self._level: int = getattr(logging, level.upper())
        common: dict[str, Any] = {
            "ecs.version": ECS_VERSION,
            "event.dataset": f"{service}.events",
            "service.name": service,
            "host.name": socket.gethostname(),
        }
        self._logger: Any = structlog.wrap_logger(
            structlog.PrintLogger(file=cast(TextIO, self._sink)),
            processors=[_stamp, structlog.processors.JSONRenderer(default=repr)],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        ).bind(**common)

    @property
    def dropped(self) -> int:
        """Return how many lines could not be written."""
        return self._sink.dropped

    def event(self, event: str, **fields: object) -> None:
        """Write one event of the catalogue. `domain`, `pages`, ... become `sharearea.domain`, `sharearea.pages`, ..."""
        level, message = EVENTS[event]
        if getattr(logging, level.upper()) < self._level:
            return
        keys = {f"sharearea.{name}": value for name, value in fields.items()}
        method = getattr(self._logger, level)
        method(message, **{"event.name": event, "log.level": level}, **keys)


def _stamp(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the time first and the message under its ECS name."""
    now = datetime.datetime.now(tz=datetime.UTC)
    message = line.pop("event")
    stamped = {"@timestamp": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "message": message}
    return stamped | dict(line)

"""Writes log files as the programs write them, with times, hosts and processes of a test's choice."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

from sharearea.common.events import EVENTS, FIELDS
from sharearea.common.logs import EventLog
from tests.lines import faults

START = datetime.datetime(2026, 11, 20, 8, tzinfo=datetime.UTC).replace(tzinfo=None)


class Writer:
    """One process's lines, written by the real EventLog; `at` moves its clock."""

    def __init__(self, *, host: str = "h1", pid: int = 100, service: str = "sharearea") -> None:
        self._stream = io.StringIO()
        self._log = EventLog(service, "debug", self._stream)
        self._host = host
        self._pid = pid
        self.lines: list[str] = []

    def say(self, seconds: float, event: str, **fields: Any) -> str:
        """Write one event so many seconds after START. Figures that are not given are 0, texts "x"."""
        kind = EVENTS[event]
        given = {name: _nothing(name) for name in kind.fields} | fields
        if kind.reasons and "reason" in kind.fields:
            given["reason"] = fields.get("reason", kind.reasons[0])
        self._stream.seek(0)
        self._stream.truncate()
        self._log.event(event, **given)
        line = json.loads(self._stream.getvalue())
        moment = START + datetime.timedelta(seconds=seconds)
        line["@timestamp"] = moment.isoformat(timespec="milliseconds") + "Z"
        line |= {"host.name": self._host, "process.pid": self._pid}
        text = json.dumps(line)
        assert faults([text]) in ([], [f"{event}: line {line['event.sequence']} of process {self._pid} follows line 0"])
        self.lines.append(text)
        return text

    def round(self, seconds: float, pool: str = "p", domains: tuple[str, ...] = (), **fields: Any) -> None:
        """Write a round of figures: pool, domains, host; `fields` are those of all of them."""
        count = {"domains": len(domains)}
        self.say(seconds, "pool.statistics", **_known("pool.statistics", count | fields | {"pool": pool}))
        for domain in domains:
            about = fields | {"pool": pool, "domain": domain, "state": "connected"}
            self.say(seconds, "domain.statistics", **_known("domain.statistics", about))
        self.say(seconds, "host.statistics", **_known("host.statistics", count | {"pools": 1} | fields))

    def text(self) -> str:
        """Return all lines."""
        return "".join(line + "\n" for line in self.lines)

    def save(self, path: Path) -> Path:
        """Write all lines to a file."""
        path.write_text(self.text())
        return path


def _known(event: str, fields: dict[str, Any]) -> dict[str, Any]:
    kind = EVENTS[event]
    return {name: value for name, value in fields.items() if name in kind.fields or name in kind.options}


def _nothing(name: str) -> Any:
    kind = FIELDS[name].type
    return {"integer": 0, "number": 0.0, "string": "x", "boolean": False}.get(kind, ["x"])

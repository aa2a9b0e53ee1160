"""The lines of both programs: events of the catalogue (events.py) as JSON, one line each, to stderr and to a file.

A program never stops because of its log, and never waits for it: a sink that cannot take a line at once drops it and
counts it. When it takes lines again it says first how many are missing. The file may be moved or removed under way
(logrotate): the next line goes to a new one at the same path.
"""

from __future__ import annotations

import datetime
import logging
import os
import select
import socket
import stat
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final, Protocol, TextIO

import structlog

from . import __version__
from .errors import HostError
from .events import COMMON, ECS_VERSION, EVENTS, FIELDS, MAX_PATH_TEXT, MAX_TEXT, SEVERITY

_PROGRAMS: Final = {"sharearea": "broker", "sharearea-agent": "agent"}
_FILE_MODE: Final = 0o640  # names of domains and files are nobody else's business


class _Sink(Protocol):
    """Where lines go. `write` takes a whole line, or nothing of it, and says which."""

    name: str
    dropped: int
    unsaid: int  # lines that were dropped since it was last said

    def write(self, line: bytes) -> bool: ...

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class _Text:
    """A text stream of this process: for tests."""

    name = "stderr"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.dropped = self.unsaid = 0

    def write(self, line: bytes) -> bool:
        try:
            self._stream.write(line.decode())
            self._stream.flush()
        except (OSError, ValueError):
            return False
        return True

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class _Descriptor:
    """A descriptor that is somebody else's: a pipe, a socket, a terminal, a file. It is never waited for."""

    name = "stderr"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._torn = False
        self.dropped = self.unsaid = 0
        self._poll: select.poll | None = None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                self._poll = select.poll()
                self._poll.register(fd, select.POLLOUT)
        except OSError:
            pass  # closed: every write says so

    def write(self, line: bytes) -> bool:
        try:
            # A pipe that is ready takes 4096 bytes at once, which only lines with long paths exceed.
            if self._poll is not None and not any(event & select.POLLOUT for _, event in self._poll.poll(0)):
                return False
            if self._torn:
                line = b"\n" + line
            written = os.write(self._fd, line)
        except (OSError, ValueError):
            return False
        self._torn = written < len(line)
        return not self._torn

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class _File:
    """A file of ours alone. It is opened again when its path names another file, or none."""

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._inode: tuple[int, int] | None = None
        self.dropped = self.unsaid = 0

    def open(self) -> None:
        """Raise OSError if it cannot be."""
        # A pipe without a reader is refused instead of waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        self._fd = os.open(self._path, flags, _FILE_MODE)
        info = os.fstat(self._fd)
        self._inode = (info.st_dev, info.st_ino)

    def write(self, line: bytes) -> bool:
        try:
            self._follow()
            before = os.fstat(self._fd).st_size
            written = os.write(self._fd, line)
            if written == len(line):
                return True
            os.ftruncate(self._fd, before)  # no half lines
        except OSError:
            pass
        return False

    def _follow(self) -> None:
        try:
            info = os.stat(self._path)
            if self._fd >= 0 and self._inode == (info.st_dev, info.st_ino):
                return
        except FileNotFoundError:
            pass
        self.close()
        self.open()

    def reopen(self) -> None:
        self.close()  # the next line opens it

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._inode = -1, None


class _Lines:
    """What structlog hands rendered lines to: all sinks."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def msg(self, line: str) -> None:
        self._log.put(line)

    debug = info = warning = error = msg


class EventLog:
    """Writes events of one program as JSON lines. One thread may use it.

    `stream`: instead of the process's stderr. `file`: a file besides, which may be moved away at any time. Raises
    HostError if that cannot be opened now; what happens to it later costs lines only.
    """

    def __init__(
        self, service: str, level: str = "info", stream: TextIO | None = None, *, file: Path | None = None
    ) -> None:
        self._level: int = getattr(logging, level.upper())
        self._sequence = 0
        self._about: dict[str, object] = {}
        self._sinks: list[_Sink] = [_Text(stream) if stream is not None else _Descriptor(_stderr())]
        if file is not None:
            self._sinks.append(_opened(file))
        self._common: dict[str, object] = {
            "ecs.version": ECS_VERSION,
            "event.module": "sharearea",
            "event.dataset": f"sharearea.{_PROGRAMS.get(service, service)}",
            "service.name": service,
            "service.version": __version__,
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
        }
        self._logger: Any = structlog.wrap_logger(
            _Lines(self),
            processors=[_stamp, structlog.processors.JSONRenderer(default=repr)],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )

    @property
    def dropped(self) -> int:
        """Return how many lines could not be written, over all sinks."""
        return sum(sink.dropped for sink in self._sinks)

    def about(self, **fields: object) -> None:
        """Put these fields into every later line, unless its event has its own."""
        self._about |= fields

    def event(self, event: str, **fields: object) -> None:
        """Write one event of the catalogue. What is None or "" is left out; `detail` of a failure is its error."""
        level = EVENTS[event].level
        if getattr(logging, level.upper()) < self._level:
            return
        self._sequence += 1
        self._write(event, self._about | fields, self._sequence)

    def _write(self, event: str, fields: dict[str, object], sequence: int) -> None:
        kind = EVENTS[event]
        said: dict[str, object] = {
            "event.name": event,
            "event.action": event,
            "event.kind": kind.kind,
            "event.category": [kind.category],
            "event.type": list(kind.type),
            "event.outcome": kind.outcome,
            "event.severity": SEVERITY[kind.level],
            "event.sequence": sequence,
            "log.level": kind.level,
        }
        for name, value in fields.items():
            if name == "detail" and "error" in kind.fields:
                name = "error"  # ECS has a key for what went wrong
            if value is not None and value != "":
                known = FIELDS.get(name)
                said[known.key if known is not None else f"sharearea.{name}"] = _cut(value, name)
        getattr(self._logger, kind.level)(kind.message, **self._common, **said)

    def put(self, line: str) -> None:
        """Hand a rendered line to every sink: structlog's side of this object."""
        data = line.encode() + b"\n"
        for sink in self._sinks:
            if (sink.unsaid and not self._say_dropped(sink)) or not sink.write(data):
                sink.dropped += 1
                sink.unsaid += 1

    def _say_dropped(self, sink: _Sink) -> bool:
        """Tell a sink that it lacks lines, in the place of the last of them; return whether it can be told."""
        sinks, self._sinks = self._sinks, [_Once(sink)]
        try:
            self._write("log.dropped", self._about | {"lines": sink.unsaid, "sink": sink.name}, self._sequence - 1)
            said = self._sinks[0].dropped == 0
        finally:
            self._sinks = sinks
        if said:
            sink.unsaid = 0
        return said

    def reopen(self) -> None:
        """Open the file again at its path: after SIGHUP. Without it, the next line notices by itself."""
        for sink in self._sinks:
            sink.reopen()

    def close(self) -> None:
        """Close the file. A later line opens it again."""
        for sink in self._sinks:
            sink.close()


class _Once:
    """One line for a sink, whose losses are not counted."""

    unsaid = 0

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self.name = sink.name
        self.dropped = 0

    def write(self, line: bytes) -> bool:
        return self._sink.write(line)

    def reopen(self) -> None: ...

    def close(self) -> None: ...


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):
        return 2


def _opened(path: Path) -> _File:
    sink = _File(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        sink.open()
    except OSError as error:
        raise HostError(
            f"cannot open the log file {path}: {error.strerror}", "check its folder and rights, or leave log_file out"
        ) from None
    return sink


def _cut(value: object, name: str) -> object:
    """Shorten what a peer may have made long."""
    if isinstance(value, str):
        return value[: MAX_PATH_TEXT if name == "path" else MAX_TEXT]
    if isinstance(value, list | tuple):
        return [item[:MAX_TEXT] if isinstance(item, str) else item for item in value]
    return value


def _stamp(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the time first, then the keys that every line has, in their order."""
    now = datetime.datetime.now(tz=datetime.UTC)
    line["message"] = line.pop("event")
    line["@timestamp"] = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {field.key: line.pop(field.key) for field in COMMON} | dict(line)

"""A client of xenstore: small values under paths, and watches that say when they change. Nothing of it is ours.

In dom0 xenstored listens on a socket; in a guest, and where there is no such socket, the kernel passes requests on
(/dev/xen/xenbus). The protocol is the same (Xen, docs/misc/xenstore.txt; xen/include/public/io/xs_wire.h). The socket
comes first: there xenstored drops a watch event that is already waiting to be read, while the kernel queues every one
of them, so that a guest could fill dom0's memory.

Paths that do not begin with "/" are relative to the own domain's, /local/domain/<domid>. Values are texts; what is not
UTF-8 in one that a guest wrote becomes U+FFFD.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .errors import Closed, HostError

SOCKET: Final = Path("/run/xenstored/socket")
DEVICE: Final = Path("/dev/xen/xenbus")
TIMEOUT_S: Final = 5.0

PAYLOAD_MAX: Final = 4096
"""The most bytes that a request or an answer may carry."""

_HEADER: Final = struct.Struct("<IIII")  # type, request id, transaction id, length
_DIRECTORY, _READ, _WATCH, _UNWATCH, _WRITE, _RM, _SET_PERMS, _WATCH_EVENT, _ERROR, _IS_INTRODUCED = (
    1, 2, 4, 5, 11, 13, 14, 15, 16, 17,
)  # fmt: skip
_CHUNK: Final = 1 << 16
_EVENTS_OF_A_TOKEN: Final = 64  # different paths that are remembered for one watch
_READS_AT_ONCE: Final = 16  # of _CHUNK each, in one events()


class XenStoreError(HostError):
    """xenstored refused a request or did not answer; `code` is its word for why ("ENOENT", "EACCES", ...)."""

    def __init__(self, message: str, code: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class XenStoreTimeout(XenStoreError):
    """xenstored did not answer in time. It may have done what it was asked."""


class XenStoreLost(XenStoreError):
    """The connection to xenstored is over; watches went with it. Open a new one."""


class XenStore:
    """One connection to xenstored. For one thread at a time.

    A request waits for its answer, `timeout` seconds at the most; while an answer is overdue, later requests fail at
    once. Raises HostError if there is no xenstored to talk to, and XenStoreError as its classes say.
    """

    def __init__(self, path: Path | None = None, *, timeout: float = TIMEOUT_S) -> None:
        if path is None:
            path = SOCKET if SOCKET.is_socket() else DEVICE
        self._timeout = timeout
        self._sock: socket.socket | None = None
        self._fd = -1
        try:
            if path.is_socket():
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._sock.settimeout(timeout)
                self._sock.connect(os.fspath(path))
                self._sock.setblocking(False)
                self._fd = self._sock.fileno()
            else:
                self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if self._sock is not None:
                self._sock.close()
            raise HostError(
                f"no xenstored at {path}: {os.strerror(error.errno) if error.errno else error}",
                "this needs Xen: dom0, or a guest with the kernel module xenfs",
            ) from None
        self._input = bytearray()
        self._next_id = 1
        self._overdue: set[int] = set()  # requests that nobody waits for any more
        self._watches: dict[str, str] = {}  # token -> path
        # In order and each once, so that a flood of changes takes no more room than this.
        self._events: dict[tuple[str, str], None] = {}
        self._event_counts: dict[str, int] = {}
        self._lost: XenStoreLost | None = None

    # ----------------------------------------------------------------------------------------------------- requests

    def read(self, path: str) -> str | None:
        """Return a node's value; None if there is no such node."""
        try:
            return self._ask(_READ, path).decode("utf-8", "replace")
        except XenStoreError as error:
            if error.code == "ENOENT":
                return None
            raise

    def write(self, path: str, value: str) -> None:
        """Set a node's value; the node, and those above it, are made if need be."""
        self._request(_WRITE, _path(path) + value.encode(), f"write {path}")

    def remove(self, path: str) -> None:
        """Remove a node and all below it; one that is not there is no error."""
        try:
            self._ask(_RM, path)
        except XenStoreError as error:
            if error.code != "ENOENT":
                raise

    def list(self, path: str) -> tuple[str, ...]:
        """Return the names of the nodes right below `path`; none if there is no such node."""
        try:
            names = self._ask(_DIRECTORY, path)
        except XenStoreError as error:
            if error.code == "ENOENT":
                return ()
            raise
        return tuple(name.decode("utf-8", "replace") for name in names.split(b"\0") if name)

    def set_permissions(self, path: str, *permissions: str) -> None:
        """Say who may do what with a node: the owner and everybody first, then single domains.

        A permission is a letter and a domid: n(othing), r(ead), w(rite), b(oth). `"n5", "r0"`: domain 5 owns the node,
        everybody else may do nothing, domain 0 may read.
        """
        packed = b"".join(permission.encode() + b"\0" for permission in permissions)
        self._request(_SET_PERMS, _path(path) + packed, f"set the permissions of {path}")

    def watch(self, path: str, token: str) -> None:
        """Have events() report changes of a node and of all below it, with `token`; at first it reports once anyway.

        `path` may also be @introduceDomain or @releaseDomain. A token names one watch of this connection.
        """
        if token in self._watches:
            raise ValueError(f"the token {token!r} names a watch already")
        self._watches[token] = path
        try:
            self._request(_WATCH, _path(path) + _path(token), f"watch {path}")
        except XenStoreError:
            del self._watches[token]
            raise

    def unwatch(self, path: str, token: str) -> None:
        """End a watch; what it has reported and events() has not returned is forgotten. No such watch: no error."""
        if self._watches.pop(token, None) is None:
            return
        for event in [event for event in self._events if event[1] == token]:
            del self._events[event]
        self._event_counts.pop(token, None)
        with contextlib.suppress(XenStoreTimeout):
            try:
                self._request(_UNWATCH, _path(path) + _path(token), f"unwatch {path}")
            except XenStoreError as error:
                if error.code != "ENOENT":
                    raise

    def is_introduced(self, domid: int) -> bool:
        """Tell whether xenstored serves this domain: from its creation to its end. For dom0 only."""
        return self._request(_IS_INTRODUCED, b"%d\0" % domid, f"ask for domain {domid}").rstrip(b"\0") == b"T"

    def _ask(self, kind: int, path: str) -> bytes:
        return self._request(kind, _path(path), f"{_VERBS[kind]} {path}")

    # ------------------------------------------------------------------------------------------------------- events

    def fileno(self) -> int:
        """Return the connection's descriptor: readable when events() may have something. Raises Closed."""
        self._check_open()
        return self._fd

    def events(self) -> builtins.list[tuple[str, str]]:
        """Return what watches have reported, as (path, token), each once. Never waits.

        When many different paths below one watch have changed, the watch's own path stands for the rest. Raises
        XenStoreLost when the connection is over.
        """
        self._check_open()
        if self._lost is None:
            for _ in range(_READS_AT_ONCE):
                if not self._receive():
                    break
            while (answer := self._take_answer()) is not None:
                self._overdue.discard(answer[1])
        events = list(self._events)
        self._events.clear()
        self._event_counts.clear()
        if not events and self._lost is not None:
            raise self._lost
        return events

    @property
    def has_events(self) -> bool:
        """Whether events() has something to return that was read along with an answer: fileno() does not show it."""
        return bool(self._events)

    def _queue(self, payload: bytes) -> None:
        parts = payload.split(b"\0")
        if len(parts) < 2:
            return
        path, token = (part.decode("utf-8", "replace") for part in parts[:2])
        watched = self._watches.get(token)
        if watched is None or (path, token) in self._events:
            return
        count = self._event_counts.get(token, 0)
        if count >= _EVENTS_OF_A_TOKEN:
            path = watched
        else:
            self._event_counts[token] = count + 1
        self._events[path, token] = None

    # ----------------------------------------------------------------------------------------------------- the wire

    def _request(self, kind: int, payload: bytes, what: str) -> bytes:
        self._check_open()
        if self._lost is not None:
            raise self._lost
        if len(payload) > PAYLOAD_MAX:
            raise ValueError(f"{what}: {len(payload)} bytes; xenstore takes {PAYLOAD_MAX}")
        end = time.monotonic() + self._timeout
        if self._overdue:
            self._settle()
        number = self._next_id
        self._next_id = self._next_id % 0xFFFF_FFFF + 1
        self._send(kind, _HEADER.pack(kind, number, 0, len(payload)) + payload, what, end)
        while True:
            while (answer := self._take_answer()) is not None:
                found, request, body = answer
                # The kernel answers for watches itself, under request number 0 (xenbus_dev_frontend.c).
                if request == number or (request == 0 and kind in (_WATCH, _UNWATCH) and found == kind):
                    return _checked(found, body, kind, what)
                self._overdue.discard(request)
            left = end - time.monotonic()
            if left <= 0 or not self._wait(select.POLLIN, left):
                self._overdue.add(number)
                raise _late(what)
            self._receive()
            if self._lost is not None:
                raise self._lost

    def _settle(self) -> None:
        """Look whether overdue answers have come. Raises XenStoreTimeout while one has not."""
        self._receive()
        while (answer := self._take_answer()) is not None:
            self._overdue.discard(answer[1])
        if self._overdue:
            raise _late("answer an earlier request")

    def _send(self, kind: int, packet: bytes, what: str, end: float) -> None:
        if self._sock is None and kind in (_WATCH, _UNWATCH):
            self._send_beside(packet, what, end)
            return
        rest = memoryview(packet)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                left = end - time.monotonic()
                if left <= 0 or not self._wait(select.POLLOUT, left):
                    if len(rest) < len(packet):  # half a request: nothing can follow it
                        self._lose("xenstored stopped in the middle of a request")
                    raise _late(what) from None
            except OSError as error:
                raise self._refused(error, what) from None

    def _send_beside(self, packet: bytes, what: str, end: float) -> None:
        """Write a request during which the kernel waits for xenstored, uninterruptibly: by a thread of its own."""
        failure: list[OSError] = []

        def write() -> None:
            try:
                os.write(self._fd, packet)
            except OSError as error:
                failure.append(error)

        thread = threading.Thread(target=write, name="xenstore-watch", daemon=True)
        thread.start()
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            # It cannot be called off, and what follows would wait behind it.
            self._lose("xenstored does not answer")
            raise _late(what)
        if failure:
            raise self._refused(failure[0], what)

    def _refused(self, error: OSError, what: str) -> XenStoreError:
        if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
            return self._lose("xenstored has closed the connection")
        code = errno.errorcode.get(error.errno or 0, "EIO")
        return XenStoreError(f"cannot {what}: {os.strerror(error.errno or errno.EIO)}", code)

    def _receive(self) -> bool:
        """Take what has arrived, without waiting. Returns whether there was anything."""
        try:
            data = os.read(self._fd, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._lose(os.strerror(error.errno or errno.EIO))
            return False
        if not data:
            self._lose("xenstored has closed the connection")
            return False
        self._input += data
        return True

    def _take_answer(self) -> tuple[int, int, bytes] | None:
        """Take the next whole answer that has arrived: type, request, payload. Events before it are queued."""
        while len(self._input) >= _HEADER.size:
            kind, number, _, length = _HEADER.unpack_from(self._input)
            if length > PAYLOAD_MAX:
                self._lose(f"xenstored sent a packet of {length} bytes")
                self._input.clear()
                return None
            size = _HEADER.size + length
            if len(self._input) < size:
                return None
            payload = bytes(self._input[_HEADER.size : size])
            del self._input[:size]
            if kind != _WATCH_EVENT:
                return kind, number, payload
            self._queue(payload)
        return None

    def _wait(self, events: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, events)
        return bool(poll.poll(seconds * 1000))

    def _lose(self, why: str) -> XenStoreLost:
        self._lost = XenStoreLost(why, "EIO", "see whether xenstored runs; a host without it has to be restarted")
        return self._lost

    # ----------------------------------------------------------------------------------------------------- lifetime

    def close(self) -> None:
        """End the connection and its watches. Twice is fine."""
        if self._sock is not None:
            self._sock.close()
        elif self._fd >= 0:
            os.close(self._fd)
        self._sock, self._fd = None, -1

    def __enter__(self) -> Self:
        """Return the connection itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self.close()

    def _check_open(self) -> None:
        if self._fd < 0:
            raise Closed("the connection to xenstored is closed")


_VERBS: Final = {_DIRECTORY: "list", _READ: "read", _RM: "remove"}


def _path(text: str) -> bytes:
    if "\0" in text:
        raise ValueError("a NUL inside a path")
    return text.encode() + b"\0"


def _checked(found: int, body: bytes, kind: int, what: str) -> bytes:
    if found == _ERROR:
        code = body.rstrip(b"\0").decode("ascii", "replace")
        number = getattr(errno, code, None)
        raise XenStoreError(f"cannot {what}: {os.strerror(number) if number else code}", code)
    if found != kind:
        raise XenStoreError(f"cannot {what}: xenstored answered something else", "EIO")
    return body


def _late(what: str) -> XenStoreTimeout:
    return XenStoreTimeout(f"cannot {what}: xenstored does not answer", "ETIMEDOUT", "see whether xenstored runs")

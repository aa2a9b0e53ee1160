"""A stream socket that carries frames: bytes and descriptors in, messages out, and never a wait.

One link is one connected AF_UNIX stream socket of the broker, an agent or a consumer. It moves bytes and descriptors
and keeps the bounds: how much one call may read, how much may wait to be sent, how many descriptors may wait to be
taken. What a message may hold is wire.py's; when to read and write is the owner's, whose selector watches fileno().
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from .errors import Closed, HostError, PeerUnreachable, ProtocolError, ShareareaError
from .wire import Codec, FrameReader, Message

RECEIVE_BYTES: Final = 1 << 20
"""What one receive() reads at the most."""

_CHUNK: Final = 1 << 18  # one recvmsg; the kernel's default socket buffer holds 208 KiB
_GATHER: Final = 64  # buffers in one sendmsg; the kernel's bound is 1024
_FD: Final = 4  # sizeof(int) in SCM_RIGHTS

# One receive buffer for each thread, not for each link: bytes are copied out of it before anything else happens.
_scratch = threading.local()


class LinkClosed(PeerUnreachable):
    """The other end is gone: it closed, died, or the connection cannot go on. Close the link."""


class QueueFull(ShareareaError):
    """The peer does not read: a message would pass the bound of what may wait for it. The message was not queued."""


class _Outgoing:
    """One frame, or what is left of it, and the descriptor that has to go with its first byte."""

    __slots__ = ("data", "fd")

    def __init__(self, data: memoryview, fd: int | None) -> None:
        self.data = data
        self.fd = fd


class Link(Protocol):
    """What both kinds of links do: StreamLink over sockets, RingLink over shared rings. For one thread at a time."""

    def fileno(self) -> int:
        """Return the descriptor to poll. Raises Closed after close()."""
        ...

    def poll_events(self, reading: bool) -> int:
        """Return what to poll for (selectors' mask), if what arrives is to be read or not."""
        ...

    def receive(self) -> Sequence[tuple[Message, int | None]]:
        """Return the messages that have arrived."""
        ...

    def send(self, message: Message, fd: int | None = None) -> None:
        """Queue a message."""
        ...

    def flush(self) -> bool:
        """Write as much as there is room for; return whether the queue is empty."""
        ...

    @property
    def wants_write(self) -> bool:
        """Whether something waits for flush()."""
        ...

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for flush()."""
        ...

    def close(self) -> None:
        """Let go of everything. Twice is fine."""
        ...


class StreamLink:
    """Carry frames over a connected stream socket, which belongs to the link from now on and becomes non-blocking.

    `incoming` decodes what arrives, `outgoing` encodes what is sent. `max_queue_bytes` bounds the frames that wait to
    be written. `accept_fds` bounds the descriptors that have arrived and whose message has not. For one thread at a
    time.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        incoming: Codec,
        outgoing: Codec,
        max_queue_bytes: int,
        accept_fds: int = 0,
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._incoming = incoming
        self._outgoing = outgoing
        self._max_queue_bytes = max_queue_bytes
        self._accept_fds = accept_fds
        self._reader = FrameReader(incoming.max_frame)
        self._fds: deque[int] = deque()
        self._queue: deque[_Outgoing] = deque()
        self._queued_bytes = 0
        self._failure: ProtocolError | LinkClosed | None = None

    def fileno(self) -> int:
        """Return the socket's descriptor. Raises Closed after close()."""
        self._check_open()
        return self._sock.fileno()

    # ------------------------------------------------------------------------------------------------- receiving

    def receive(self) -> list[tuple[Message, int | None]]:
        """Read what is there, RECEIVE_BYTES at the most, and return the messages that are whole.

        A message whose class has FD comes with its descriptor (close-on-exec), which is the caller's from then on; all
        others come with None. An empty list means that nothing whole is there yet.

        Raises LinkClosed when the other end is gone, after the messages that came before; ProtocolError when it sent
        something that is not allowed: then the messages of this call are lost, their descriptors closed, and every
        later call raises the same.
        """
        self._check_open()
        if self._failure is not None:
            raise self._failure
        messages: list[tuple[Message, int | None]] = []
        try:
            self._read(messages)
        except ProtocolError as error:
            self._failure = error
            _close_all(fd for _, fd in messages if fd is not None)
            self._close_pending()
            raise
        except LinkClosed as error:
            self._failure = error
            if not messages:
                raise
        return messages

    def _read(self, messages: list[tuple[Message, int | None]]) -> None:
        left = RECEIVE_BYTES
        buffer = _receive_buffer()
        while left > 0:
            try:
                count = self._read_once(buffer[: min(left, _CHUNK)])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise LinkClosed(f"the connection broke: {os.strerror(error.errno or errno.EIO)}") from None
            if count == 0:
                inside = " in the middle of a frame" if self._reader.pending else ""
                raise LinkClosed(f"the other end closed the connection{inside}")
            left -= count
            self._reader.feed(buffer[:count])
            for payload in self._reader:
                message = self._incoming.decode(payload)
                messages.append((message, self._take_fd(message)))

    def _read_once(self, into: memoryview) -> int:
        # Room for exactly the descriptors that we would keep. With no room at all the kernel throws descriptors away
        # before they enter this process; in both cases it says MSG_CTRUNC when there were more.
        room = self._accept_fds - len(self._fds)
        space = socket.CMSG_LEN(room * _FD) if room > 0 else 0
        count, ancillary, flags, _ = self._sock.recvmsg_into([into], space, socket.MSG_CMSG_CLOEXEC)
        arrived = 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                whole = len(data) // _FD * _FD  # the kernel writes whole numbers; a cut buffer may end inside one
                fds = memoryview(data[:whole]).cast("i").tolist()
                arrived += len(fds)
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            if arrived < room:
                # There was room and still something is missing: this process is at its limit of open files. Nothing
                # more may arrive, so the shutdown is what makes the owner's selector call receive() once more.
                self._sock.shutdown(socket.SHUT_RDWR)
                raise LinkClosed("a descriptor was lost: this process cannot open any more")
            raise ProtocolError(f"more than {self._accept_fds} descriptors that no message has asked for")
        return count

    def _take_fd(self, message: Message) -> int | None:
        if not message.FD:
            return None
        if not self._fds:
            raise ProtocolError(f"{type(message).__name__} came without its descriptor")
        return self._fds.popleft()

    # --------------------------------------------------------------------------------------------------- sending

    def send(self, message: Message, fd: int | None = None) -> None:
        """Queue a message; flush() writes it. A message whose class has FD needs `fd`, of which a duplicate is queued.

        Raises QueueFull when max_queue_bytes would be passed, HostError when no duplicate can be made, ValueError for a
        message that does not belong here. Nothing is queued then.
        """
        self._check_open()
        if (fd is not None) != message.FD:
            raise ValueError(f"{type(message).__name__} {'needs a' if message.FD else 'travels without'} descriptor")
        frame = self._outgoing.encode(message)
        if self._queued_bytes + len(frame) > self._max_queue_bytes:
            raise QueueFull(
                f"{self._queued_bytes} bytes wait for a peer that does not read; "
                f"{len(frame)} more would pass the limit of {self._max_queue_bytes}"
            )
        self._queue.append(_Outgoing(memoryview(frame), None if fd is None else _duplicate(fd)))
        self._queued_bytes += len(frame)

    def flush(self) -> bool:
        """Write what the socket takes, without waiting. Returns True when nothing is left.

        Raises LinkClosed when the other end is gone. What it had sent before can still be read.
        """
        self._check_open()
        while self._queue:
            head = self._queue[0]
            try:
                if head.fd is None:
                    count = self._sock.sendmsg(self._gather(), [], socket.MSG_NOSIGNAL)
                else:
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, head.fd.to_bytes(_FD, sys.byteorder))
                    count = self._sock.sendmsg([head.data], [rights], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError as error:
                raise LinkClosed(f"cannot write: {os.strerror(error.errno or errno.EIO)}") from None
            self._sent(count)
        return True

    def _gather(self) -> list[memoryview]:
        buffers: list[memoryview] = []
        for item in self._queue:
            if item.fd is not None or len(buffers) == _GATHER:
                break
            buffers.append(item.data)
        return buffers

    def _sent(self, count: int) -> None:
        self._queued_bytes -= count
        while count:
            head = self._queue[0]
            if head.fd is not None:  # it went with the first byte
                os.close(head.fd)
                head.fd = None
            if count < len(head.data):
                head.data = head.data[count:]
                return
            count -= len(head.data)
            self._queue.popleft()

    @property
    def wants_write(self) -> bool:
        """Whether something waits for flush()."""
        return bool(self._queue)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for flush()."""
        return self._queued_bytes

    def poll_events(self, reading: bool) -> int:
        """Return what to poll for: to read, if `reading`, and to write, if something waits for it."""
        return (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if self._queue else 0)

    # -------------------------------------------------------------------------------------------------- lifetime

    def close(self) -> None:
        """Close the socket and every descriptor that nobody has taken or that was not sent. Twice is fine."""
        self._sock.close()
        self._close_pending()
        _close_all(item.fd for item in self._queue if item.fd is not None)
        self._queue.clear()
        self._queued_bytes = 0

    def _close_pending(self) -> None:
        while self._fds:
            os.close(self._fds.popleft())

    def __enter__(self) -> Self:
        """Return the link itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the link."""
        self.close()

    def _check_open(self) -> None:
        if self._sock.fileno() < 0:
            raise Closed("the link is closed")


def _receive_buffer() -> memoryview:
    buffer: memoryview | None = getattr(_scratch, "buffer", None)
    if buffer is None:
        buffer = _scratch.buffer = memoryview(bytearray(_CHUNK))
    return buffer


def _duplicate(fd: int) -> int:
    try:
        return os.dup(fd)
    except OSError as error:
        raise HostError(
            f"cannot duplicate a descriptor to send it: {os.strerror(error.errno or errno.EIO)}",
            "raise the limit on open files",
        ) from None


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)

"""Frames over a pair of byte rings in memory shared with another domain: link.py's StreamLink, without a socket.

The two behave alike for a loop: receive(), send(), flush(), and poll_events() for its selector. What differs is inside.
An event channel says that something has happened in the rings, once, and not what; room to write is announced like
bytes to read. So the descriptor given out here is an epoll of the event channel and of an eventfd of our own, which is
raised while bytes may be waiting that no event will announce again. Rings and events come from below (Channel): on Xen
that is native.Vchan.
"""

from __future__ import annotations

import os
import select
import selectors
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Self

from .errors import Closed, NativeError, ProtocolError
from .link import RECEIVE_BYTES, LinkClosed, QueueFull
from .native import RING_CLOSED, BytesLike
from .wire import Codec, FrameReader, Message

DEFAULT_ORDER: Final = 16
"""The rings of an agent: 64 KiB each way."""

_GATHER: Final = 1 << 16  # bytes handed to one write


class Channel(Protocol):
    """Two byte rings and their events, of which the link is the only user. native.Vchan is one."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while an event is pending."""

    def drain(self) -> bool:
        """Take the pending event, if there is one."""

    def state(self) -> int:
        """Return RING_WAITING, RING_OPEN or RING_CLOSED."""

    def read(self) -> bytes:
        """Take what is there, up to a bound; nothing at all: an event comes when there is more."""

    def write(self, buffers: Sequence[BytesLike]) -> int:
        """Put what fits; less than all: an event comes when there is room."""

    def close(self) -> None:
        """Tell the peer and let go."""

    def abandon(self) -> None:
        """Use it no more, and touch nothing of it."""


class RingLink:
    """Carry frames over `channel`, which belongs to the link from now on and whose other end is there.

    `incoming` decodes what arrives, `outgoing` encodes what is sent; `max_queue_bytes` bounds the frames that wait to
    be written. For one thread at a time.

    A loop waits for what poll_events() says, and calls flush() and receive() when the descriptor is readable: which of
    the two has something to do, an event does not tell.
    """

    def __init__(self, channel: Channel, *, incoming: Codec, outgoing: Codec, max_queue_bytes: int) -> None:
        self._channel = channel
        self._incoming = incoming
        self._outgoing = outgoing
        self._max_queue_bytes = max_queue_bytes
        self._reader = FrameReader(incoming.max_frame)
        self._queue: deque[memoryview] = deque()
        self._queued_bytes = 0
        self._failure: ProtocolError | LinkClosed | None = None
        self._gone: str | None = None
        self._stuck = False  # the ring that we write makes no sense any more
        self._reading = True
        self._unread = True  # there may be bytes that no event will announce
        self._raised = False
        self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._epoll.register(self._kick, select.EPOLLIN)
        self._show()

    def fileno(self) -> int:
        """Return a descriptor for a selector, see poll_events(). Raises Closed after close()."""
        self._check_open()
        return self._epoll.fileno()

    def poll_events(self, reading: bool) -> int:
        """Return what a selector should wait for (its EVENT_* bits), where `reading` says whether to receive at all.

        Never EVENT_WRITE: room, too, is announced by an event. Call it whenever the answer may have changed: while
        reading is not wanted, bytes that wait do not make the descriptor readable.
        """
        self._reading = reading
        self._show()
        return selectors.EVENT_READ if reading or self._queue else 0

    # ------------------------------------------------------------------------------------------------- receiving

    def receive(self) -> list[tuple[Message, int | None]]:
        """Read what is there, about RECEIVE_BYTES at the most, and return the messages that are whole.

        An empty list means that nothing whole is there yet. Raises LinkClosed when the other end is gone, after the
        messages that came before; ProtocolError when it sent something, or did something to the rings, that is not
        allowed: then the messages of this call are lost, and every later call raises the same.
        """
        self._check_open()
        if self._failure is not None:
            raise self._failure
        messages: list[tuple[Message, int | None]] = []
        try:
            self._read(messages)
        except ProtocolError as error:
            self._fail(error)
            raise
        except (LinkClosed, NativeError) as error:
            closed = error if isinstance(error, LinkClosed) else LinkClosed(f"the connection broke: {error.message}")
            self._fail(closed)
            if not messages:
                raise closed from None
        finally:
            self._show()
        return messages

    def _read(self, messages: list[tuple[Message, int | None]]) -> None:
        # The event before the bytes: one that comes later announces bytes that come later. It may be about room, too,
        # and nobody else will hear of it.
        self._channel.drain()
        self._write()
        if self._stuck:
            raise ProtocolError("the peer's ring counters make no sense")
        self._unread = False
        # Before the last bytes are looked for: whoever has left writes no more.
        gone = self._peer_gone()
        left = RECEIVE_BYTES
        while data := self._channel.read():
            self._reader.feed(data)
            for payload in self._reader:
                messages.append((self._incoming.decode(payload), None))
            left -= len(data)
            if left <= 0:
                self._unread = True
                return
        if gone is not None:
            inside = " in the middle of a frame" if self._reader.pending else ""
            raise LinkClosed(f"{gone}{inside}")

    def _peer_gone(self) -> str | None:
        if self._gone is None and self._channel.state() == RING_CLOSED:
            self._gone = "the other end closed the connection"
        return self._gone

    def _fail(self, failure: ProtocolError | LinkClosed) -> None:
        self._failure = failure
        self._unread = True  # the loop has to hear it again

    # --------------------------------------------------------------------------------------------------- sending

    def send(self, message: Message, fd: int | None = None) -> None:
        """Queue a message; flush() writes it. Descriptors do not travel between domains: `fd` has to be None.

        Raises QueueFull when max_queue_bytes would be passed, ValueError for a message that does not belong here.
        Nothing is queued then.
        """
        self._check_open()
        if fd is not None or message.FD:
            raise ValueError(f"{type(message).__name__}: no descriptor travels between domains")
        frame = self._outgoing.encode(message)
        if self._queued_bytes + len(frame) > self._max_queue_bytes:
            raise QueueFull(
                f"{self._queued_bytes} bytes wait for a peer that does not read; "
                f"{len(frame)} more would pass the limit of {self._max_queue_bytes}"
            )
        self._queue.append(memoryview(frame))
        self._queued_bytes += len(frame)

    def flush(self) -> bool:
        """Write what the ring takes, without waiting. Returns True when nothing is left.

        Raises LinkClosed when the other end is gone; what it had sent before can still be received. When the peer has
        made the ring unusable, nothing is written, and receive() says so.
        """
        self._check_open()
        if not self._reading:
            self._drain()
        done = self._write()
        if not done and self._gone is not None:
            self._unread = True
            self._show()
            raise LinkClosed(f"cannot write: {self._gone}")
        return done

    def _write(self) -> bool:
        while self._queue:
            if self._stuck or self._peer_gone() is not None:
                return False
            buffers = self._gather()
            try:
                count = self._channel.write(buffers)
            except ProtocolError:
                self._stuck = self._unread = True
                self._show()
                return False
            except NativeError as error:
                self.lose(f"the connection broke: {error.message}")
                continue
            self._sent(count)
            if count < sum(map(len, buffers)):
                # Full, as far as we know: its reader's event says when it is not.
                return False
        return True

    def _gather(self) -> list[memoryview]:
        buffers: list[memoryview] = []
        size = 0
        for data in self._queue:
            buffers.append(data[: _GATHER - size])
            size += len(buffers[-1])
            if size >= _GATHER:
                break
        return buffers

    def _sent(self, count: int) -> None:
        self._queued_bytes -= count
        while count:
            head = self._queue[0]
            if count < len(head):
                self._queue[0] = head[count:]
                return
            count -= len(head)
            self._queue.popleft()

    @property
    def wants_write(self) -> bool:
        """Whether something waits for flush()."""
        return bool(self._queue)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for flush()."""
        return self._queued_bytes

    # ---------------------------------------------------------------------------------------------------- events

    def _drain(self) -> None:
        """Take the pending event without looking for bytes, which it may have been about."""
        try:
            self._unread = self._channel.drain() or self._unread
        except NativeError as error:
            self.lose(f"the connection broke: {error.message}")

    def _show(self) -> None:
        """Make the descriptor readable, beyond the event channel, exactly while the loop is to call receive()."""
        wanted = self._unread and self._reading
        if wanted and not self._raised:
            os.eventfd_write(self._kick, 1)
        elif self._raised and not wanted:
            os.eventfd_read(self._kick)
        self._raised = wanted

    # -------------------------------------------------------------------------------------------------- lifetime

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._epoll.closed

    def alive(self) -> bool:
        """Look whether the other end is there, without any event. If not, receive() will say so after the last bytes.

        A domain that is destroyed sends no event: who hears of it calls lose().
        """
        self._check_open()
        if self._failure is None and self._peer_gone() is not None and not self._unread:
            self._unread = True
            self._show()
        return self._gone is None

    def lose(self, why: str) -> None:
        """Say that the other end is gone: receive() raises LinkClosed after what has arrived. Twice is fine."""
        if self._epoll.closed:
            return
        self._gone = self._gone or why
        self._unread = True
        self._show()

    def close(self) -> None:
        """Tell the other end and let everything go. Twice is fine."""
        self._let_go(self._channel.close)

    def abandon(self) -> None:
        """Let go without a word, and without touching the channel (Vchan.abandon): this guest was restored."""
        self._let_go(self._channel.abandon)

    def _let_go(self, end: Callable[[], None]) -> None:
        if self._epoll.closed:
            return
        self._epoll.close()
        os.close(self._kick)
        end()
        self._queue.clear()
        self._queued_bytes = 0

    def __enter__(self) -> Self:
        """Return the link itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the link."""
        self.close()

    def _check_open(self) -> None:
        if self._epoll.closed:
            raise Closed("the link is closed")

"""The agent's side of its consumers: the socket they connect to, their messages, the files they have open.

A consumer proves its right to a file with a descriptor of it; the agent opens the same inode again for itself, once per
inode, and takes leases on that. Whatever a consumer sends costs that consumer only. What follows from a message is
decided in agent.py; this module turns messages into events and actions into messages.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import selectors
import socket
import stat
import struct
from array import array
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from . import agent
from .agent import ConsumerId, Event, FileKey, Handle
from .common import native
from .common.control import Door
from .common.errors import HostError, NativeError, ProtocolError
from .common.link import LinkClosed, QueueFull, StreamLink
from .common.wire import PAGE_SIZE, Message
from .consumer_wire import (
    AGENT_TO_CONSUMER,
    CONSUMER_TO_AGENT,
    MAPPED_NO_ROOM,
    Close,
    LetGo,
    Mapped,
    Open,
    Plain,
    SegmentsGone,
    Unchanged,
    Unshare,
)
from .mapper import Mapper

_MAX_CONSUMERS: Final = 4096
_MAX_QUEUE: Final = 8 << 20
_MAX_FDS: Final = 256  # descriptors that may arrive ahead of their messages
_SPARE_FDS: Final = 192  # for segments, the scanner's folders, the cache and the sockets
_UCRED: Final = struct.Struct("iII")
_SO_PEERGROUPS: Final = 59  # Linux 4.13, asm-generic/socket.h
_MAX_GROUPS: Final = 4096


@dataclass(slots=True, eq=False)
class OpenFile:
    """An inode that consumers have open: the agent's own read-only descriptor, and by whom it is used."""

    fd: int
    uses: set[tuple[ConsumerId, Handle]] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Consumer:
    id: ConsumerId
    link: StreamLink
    pid: int
    uid: int
    allowed: bool
    unchanged: bool = False  # a shim speaks for it
    files: dict[Handle, FileKey] = field(default_factory=dict)
    segments: set[int] = field(default_factory=set)


class Credentials(NamedTuple):
    """Who is at the other end of a socket, as the kernel says: of the process that connected, when it did."""

    pid: int
    uid: int
    gids: frozenset[int]


def _credentials(sock: socket.socket) -> Credentials:
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    gids = array("I")
    with contextlib.suppress(OSError):  # more groups than room: those do not count
        gids.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS * gids.itemsize))
    return Credentials(pid, uid, frozenset({gid, *gids}))


class ConsumerHub:
    """All consumers of one agent. Runs on the runner's selector; `feed` hands events to the agent's state machine."""

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        mapper: Mapper,
        feed: Callable[[Event], None],
        log: Callable[..., None],
        allow: Callable[[Credentials], bool] = lambda _: True,
        off: str = "",
        *,
        serve_unchanged: bool = True,
        plain_path: Callable[[int, FileKey], bytes | None] = lambda *_: None,
    ) -> None:
        """`allow`: whether a program with these credentials gets handles; one that may not stays plain.

        `off`: why no program of this guest does, as a reason code; "": programs do. `serve_unchanged`: whether
        programs that do not know of shared pages get them, through the shim. `plain_path`: where a file that somebody
        has opened is besides, if it may have been opened through a guest view, where nothing can be leased.
        """
        self._selector = selector
        self._mapper = mapper
        self._feed = feed
        self._log = log
        self._allow = allow
        self._off = off
        self._serve_unchanged = serve_unchanged
        self._plain_path = plain_path
        self._told_unchanged = False
        self._next = 0
        self._consumers: dict[ConsumerId, _Consumer] = {}
        self.files: dict[FileKey, OpenFile] = {}
        # Were all descriptors in use, arriving ones would be lost, and with them the connection that they came on.
        self._max_files = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _MAX_FDS - _SPARE_FDS)
        self._leases: dict[tuple[ConsumerId, Handle], int] = {}  # of consumers: our duplicate of each
        self._limits: set[str] = set()  # those that have been logged and still hold
        # Every program of the domain may connect; it gets what its own descriptors prove, if it is allowed to.
        self._door = Door(path, 0o666, 128)
        selector.register(self._door, selectors.EVENT_READ, self._accept)

    # --------------------------------------------------------------------------------------------------- messages

    def _accept(self, _: int) -> None:
        sock = self._door.accept()
        if sock is None:
            if self._door.lacking is not None:
                self._at_limit("accept", f"cannot accept a consumer: {self._door.lacking}")
            return
        if len(self._consumers) >= _MAX_CONSUMERS:
            sock.close()
            self._at_limit("accept", f"{_MAX_CONSUMERS} consumers are connected")
            return
        self._limits.discard("accept")
        who = _credentials(sock)
        link = StreamLink(
            sock,
            incoming=CONSUMER_TO_AGENT,
            outgoing=AGENT_TO_CONSUMER,
            max_queue_bytes=_MAX_QUEUE,
            accept_fds=_MAX_FDS,
        )
        self._next += 1
        consumer = _Consumer(self._next, link, who.pid, who.uid, self._allow(who))
        self._consumers[consumer.id] = consumer
        self._selector.register(link, selectors.EVENT_READ, lambda mask: self._ready(consumer, mask))

    def _ready(self, consumer: _Consumer, mask: int) -> None:
        if consumer.id not in self._consumers:
            return  # it was dropped since the selector said so, for what was sent to it on another's account
        try:
            if mask & selectors.EVENT_WRITE:
                self._flush(consumer)
            if mask & selectors.EVENT_READ:
                self._handle(consumer, deque(consumer.link.receive()))
        except LinkClosed:
            self._drop(consumer)
        except ProtocolError as error:
            self._log("consumer.refused", detail=error.message, consumer_pid=consumer.pid, uid=consumer.uid)
            self._drop(consumer)

    def _handle(self, consumer: _Consumer, messages: deque[tuple[Message, int | None]]) -> None:
        """Take up messages in their order; those behind one that ended the connection are nobody's any more."""
        try:
            while messages and consumer.id in self._consumers:
                self._on_message(consumer, *messages.popleft())
        finally:
            for _, fd in messages:
                if fd is not None:
                    os.close(fd)

    def _on_message(self, consumer: _Consumer, message: Message, fd: int | None) -> None:
        match message:
            case Open():
                assert fd is not None
                try:
                    self._on_open(consumer, message, fd)
                finally:
                    os.close(fd)
            case Close():
                self._forget(consumer, message.handle)
                self._feed(agent.Closed(consumer.id, message.handle))
            case Mapped():
                self._feed(
                    agent.ConsumerMapped(
                        consumer.id, message.handle, message.generation, message.pages, message.outcome
                    )
                )
            case LetGo():
                self._end_lease(consumer.id, message.handle)
                self._feed(agent.ConsumerLetGo(consumer.id, message.handle, message.generation))
            case Unchanged():
                consumer.unchanged = True
                if not self._serve_unchanged and not self._told_unchanged:
                    self._told_unchanged = True
                    self._log(
                        "mappings.limited",
                        reason="no-shim",
                        hint="unchanged programs keep their own pages in Xen guests: the guest view does this job",
                    )

    def _on_open(self, consumer: _Consumer, message: Open, fd: int) -> None:
        if message.handle in consumer.files:
            raise ProtocolError(f"handle {message.handle} is in use")
        info = os.fstat(fd)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not stat.S_ISREG(info.st_mode) or flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
            raise ProtocolError("a descriptor that does not give the right to read a regular file")
        if self._off or not consumer.allowed:
            self._send(consumer, Plain(message.handle, self._off or "not-allowed"))
            return
        if consumer.unchanged and not self._serve_unchanged:
            self._send(consumer, Plain(message.handle, "no-shim"))
            return
        key = FileKey(info.st_dev, info.st_ino)
        use = (consumer.id, message.handle)
        if message.length != info.st_size:
            self._send(consumer, Plain(message.handle, "changed"))
            return
        known = self.files.get(key)
        if known is None:
            if len(self.files) + len(self._leases) + len(self._consumers) >= self._max_files:
                self._at_limit("files", f"consumers have {len(self.files)} files open: the limit on open files is near")
                self._send(consumer, Plain(message.handle, "agent-limit"))
                return
            try:
                # A description of our own: the consumer cannot touch a lease on it, nor close it. Nor can it make us
                # wait, with a write lease of its own.
                own = self._open_again(fd, key)
            except BlockingIOError:
                self._send(consumer, Plain(message.handle, "lease-refused"))
                return
            except OSError as error:
                self._at_limit("files", f"cannot open a consumer's file: {error.strerror}")
                self._send(consumer, Plain(message.handle, "agent-limit"))
                return
            known = self.files[key] = OpenFile(own)
            self._limits.discard("files")
        known.uses.add(use)
        consumer.files[message.handle] = key
        self._feed(agent.Opened(consumer.id, message.handle, key))

    def _open_again(self, fd: int, key: FileKey) -> int:
        """Open a consumer's file for ourselves: a plain file, if there is a way to it."""
        path = self._plain_path(fd, key)
        if path is not None:
            try:
                own = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            except BlockingIOError:
                raise
            except OSError:
                pass  # it has lost that name
            else:
                info = os.fstat(own)
                if (info.st_dev, info.st_ino) == key:
                    return own
                os.close(own)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def hold(self, key: FileKey, path: bytes, use: tuple[ConsumerId, Handle]) -> bool:
        """Have a file open for a consumer that is no program (agent.VIEWS); False if it cannot be or is another."""
        known = self.files.get(key)
        if known is None:
            if len(self.files) + len(self._leases) + len(self._consumers) >= self._max_files:
                self._at_limit("files", f"{len(self.files)} files are open: the limit on open files is near")
                return False
            try:
                own = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                return False  # it is gone, or somebody writes
            info = os.fstat(own)
            if (info.st_dev, info.st_ino) != key:
                os.close(own)
                return False
            known = self.files[key] = OpenFile(own)
        known.uses.add(use)
        return True

    def release(self, key: FileKey, use: tuple[ConsumerId, Handle]) -> None:
        """End what hold() began."""
        if key in self.files:
            self.files[key].uses.discard(use)

    # ---------------------------------------------------------------------------------------------------- actions

    def share(self, action: agent.ShareWith) -> None:
        """Send a consumer the handles for its file, and segments that it has not got yet."""
        consumer = self._consumers.get(action.consumer)
        if consumer is None or action.handle not in consumer.files:
            return  # closed: the state machine is about to hear of it
        key = consumer.files[action.handle]
        try:
            parcel = self._mapper.parcel(action, consumer.segments, self._resident(key) if action.proven else None)
        except HostError as error:
            self._at_limit("handles", f"cannot send a consumer its handles: {error.message}")
            self._send(consumer, Plain(action.handle, "agent-limit"))
            self._feed(agent.ConsumerMapped(consumer.id, action.handle, action.generation, 0, MAPPED_NO_ROOM))
            return
        self._limits.discard("handles")
        try:
            lease = self._lease_for(consumer, action.handle)
            for message, fd in parcel.before:
                self._send(consumer, message, fd)
            consumer.segments.update(parcel.segments)
            self._send(consumer, parcel.share, lease)
            self._feed(agent.Compared(key, action.generation, parcel.compared_pages))
        except (OSError, NativeError) as error:
            # A writer is there already (the agent hears of it and ends this), or descriptors are used up.
            self._at_limit("files", f"cannot take a lease for a consumer: {error}")
            self._send(consumer, Plain(action.handle, "lease-refused"))
        finally:
            parcel.close()

    def _resident(self, key: FileKey) -> bytes | None:
        """Return the resident pages of an open file, packed (page, count); None if the kernel does not tell."""
        fd = self.files[key].fd
        try:
            return native.resident_runs(fd, -(-os.fstat(fd).st_size // PAGE_SIZE))
        except NativeError:
            return None

    def _lease_for(self, consumer: _Consumer, handle: Handle) -> int:
        """Take the read lease that a consumer holds itself, so that it outlives this agent, and return its descriptor.

        Each has a lease of its own: a consumer that gives its one up harms nobody else. The agent keeps a duplicate to
        end it, and hears of writers through its own lease on the file.
        """
        self._end_lease(consumer.id, handle)
        fd = os.open(
            f"/proc/self/fd/{self.files[consumer.files[handle]].fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        )
        try:
            native.lease_take(fd)
            fcntl.fcntl(fd, fcntl.F_SETOWN, 0)
        except BaseException:
            os.close(fd)
            raise
        self._leases[consumer.id, handle] = fd
        return fd

    def _end_lease(self, consumer: ConsumerId, handle: Handle) -> None:
        fd = self._leases.pop((consumer, handle), None)
        if fd is not None:
            native.lease_release(fd)
            os.close(fd)

    def unshare(self, action: agent.UnshareWith) -> None:
        """Ask a consumer to put its plain file back."""
        consumer = self._consumers.get(action.consumer)
        if consumer is not None:
            self._send(consumer, Unshare(action.handle, action.generation))

    def cut_off(self, action: agent.CutOff) -> None:
        """Close the connection of a consumer that does not answer; its library goes back to plain files by itself."""
        consumer = self._consumers.get(action.consumer)
        if consumer is not None:
            self._drop(consumer)

    def plain(self, action: agent.StayPlain) -> None:
        """Tell a consumer that its file stays plain."""
        consumer = self._consumers.get(action.consumer)
        if consumer is not None:
            self._send(consumer, Plain(action.handle, action.reason))

    def segments_gone(self, numbers: list[int]) -> None:
        """Have consumers close their descriptors of segments."""
        for consumer in list(self._consumers.values()):
            theirs = [number for number in numbers if number in consumer.segments]
            consumer.segments.difference_update(theirs)
            for at in range(0, len(theirs), 4096):
                part = theirs[at : at + 4096]
                self._send(consumer, SegmentsGone(b"".join(number.to_bytes(4, "little") for number in part)))

    def programs(self) -> list[tuple[ConsumerId, int, int, bool]]:
        """Return the connected programs: number, process, uid, and whether a shim speaks for it."""
        return [(each.id, each.pid, each.uid, each.unchanged) for each in self._consumers.values()]

    def describe(self, consumer_id: ConsumerId) -> str:
        """Return a consumer's process for the log, as `pid 17 uid 1000`, or `guest view`."""
        if consumer_id == agent.VIEWS:
            return "guest view"
        consumer = self._consumers.get(consumer_id)
        return f"pid {consumer.pid} uid {consumer.uid}" if consumer is not None else "gone"

    # -------------------------------------------------------------------------------------------------- links

    def _send(self, consumer: _Consumer, message: Message, fd: int | None = None) -> None:
        if consumer.id not in self._consumers:
            return
        try:
            consumer.link.send(message, fd)
            self._flush(consumer)
        except LinkClosed:
            self._drop(consumer)
        except (QueueFull, HostError) as error:
            self._log("consumer.refused", detail=error.message, consumer_pid=consumer.pid, uid=consumer.uid)
            self._drop(consumer)

    def _flush(self, consumer: _Consumer) -> None:
        consumer.link.flush()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if consumer.link.wants_write else 0)
        key = self._selector.get_key(consumer.link)
        if key.events != events:
            self._selector.modify(consumer.link, events, key.data)

    def _forget(self, consumer: _Consumer, handle: Handle) -> None:
        key = consumer.files.pop(handle, None)
        if key is None:
            return
        self._end_lease(consumer.id, handle)
        self.files[key].uses.discard((consumer.id, handle))

    def release_unused(self, leased: Container[int] = ()) -> None:
        """Close the descriptors of files that no consumer has open any more, but for those with a lease."""
        for key in [key for key, file in self.files.items() if not file.uses and file.fd not in leased]:
            os.close(self.files.pop(key).fd)

    def _drop(self, consumer: _Consumer) -> None:
        if self._consumers.pop(consumer.id, None) is None:
            return
        self._selector.unregister(consumer.link)
        consumer.link.close()
        for handle in list(consumer.files):
            self._forget(consumer, handle)
        self._feed(agent.ConsumerGone(consumer.id))

    def close(self) -> None:
        """Drop all consumers, who then put their plain files back, and remove the socket."""
        for consumer in list(self._consumers.values()):
            self._drop(consumer)
        self.release_unused()
        self._selector.unregister(self._door)
        self._door.close()

    def _at_limit(self, limit: str, what: str) -> None:
        """Log a limit, once until it does not hold any more."""
        if limit not in self._limits:
            self._limits.add(limit)
            self._log("agent.limit", detail=what)

"""The Python API for consumers: `open_shared(path)` maps a file, with shared pages under it wherever the area has them.

One background thread per process talks to the agent. It compares shared pages with the file before it puts them under a
mapping, and puts the file's own pages back whenever the agent asks, which it does before any writer gets on. Without an
agent, or when it dies, a mapping is simply the file.

Needs two descriptors per open file (the mapping's own and the one that puts the file back), a third while pages of it
are shared (the lease, which this process holds itself so that a dying agent lets no writer in), and one mapping per run
of shared pages; where the process would run out of mappings, a file stays plain.

In a Xen guest shared pages are grants (native/gntdev.c): they never become executable, and a child of a fork that does
not run Python's hooks, nor another program right away, must not touch them. Memory of another kind of guest than PV
must be let go before the guest is suspended, or reads 0xFF afterwards; that is why it takes a setting of the agent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import stat
import threading
import time
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Self

from .common import native
from .common.errors import NativeError, ShareareaError
from .common.link import StreamLink
from .common.wire import PAGE_SIZE, Message
from .consumer_wire import (
    AGENT_TO_CONSUMER,
    CONSUMER_TO_AGENT,
    MAPPED_DIFFERENT,
    MAPPED_DONE,
    MAPPED_NO_ROOM,
    Close,
    GrantDevice,
    LetGo,
    Mapped,
    Open,
    Plain,
    SegmentsGone,
    Share,
    ShareGrants,
    ShareSegment,
    Unshare,
)

DEFAULT_SOCKET: Final = "/run/sharearea-agent/consumers.sock"
SOCKET_VARIABLE: Final = "SHAREAREA_AGENT_SOCKET"

_RETRY_S: Final = (0.2, 5.0)  # first and longest pause before the agent is tried again
_STABLE_S: Final = 1.0  # a connection that lasted longer was a good one
_ADVICE: Final = (mmap.MADV_NORMAL, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL)  # that no page comes or goes by
_MAPS_SHARE: Final = 0.75  # of vm.max_map_count that shared runs may take in one process


class SharedFile(mmap.mmap):
    """A read-only mapping of a whole file, as mmap.mmap gives it, some of whose pages may be shared ones.

    It is what its file is: a write to the file shows, and reading past the end of a file that was truncated is SIGBUS,
    as with any mapping. `close()` raises BufferError while a memoryview of it exists, and it works as a context
    manager.
    """

    _session: _Session | None
    _fd: int

    @property
    def shared_pages(self) -> int:
        """Return how many pages are shared at this moment."""
        return self._shared_pages

    @property
    def reason(self) -> str:
        """Return why the file is plain: the agent's reason code, `no-agent`, or "" while pages are shared."""
        return "" if self._shared_pages else self._reason

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        """Give the kernel advice, as mmap.mmap does.

        While pages are another domain's, only advice about reading ahead: MADV_DONTNEED and the like would have nothing
        to do there, and break the kernel of a PV guest.
        """
        with self._lock:
            if self._granted and option not in _ADVICE:
                return
            super().madvise(option, start, len(self) - start if length is None else length)

    def close(self) -> None:
        """Unmap the file and tell the agent. Twice is fine. BufferError: a view of it is still in use."""
        with self._lock:
            super().close()
            self._keep_lease(-1)
            session, self._session = self._session, None
            self._shared_pages = 0
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if session is not None:
            session.forget(self)

    def __enter__(self) -> Self:
        """Return the mapping itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the mapping."""
        self.close()

    def __del__(self) -> None:
        """Close what was not closed."""
        with contextlib.suppress(Exception):
            self.close()

    # Set by open_shared, before anybody else sees the object.
    _lock: threading.Lock
    _handle: int
    _length: int
    _shared_pages: int
    _runs: int
    _granted: bool
    _lease: int
    _reason: str
    _answered: threading.Event

    def _set_up(self, fd: int, length: int) -> None:
        self._lock = threading.Lock()
        self._fd = fd
        self._length = length
        self._session = None
        self._handle = 0
        self._shared_pages = 0
        self._runs = 0
        self._granted = False
        self._lease = -1
        self._reason = "no-agent"
        self._answered = threading.Event()

    @property
    def _pages(self) -> int:
        return -(-self._length // PAGE_SIZE)

    def _put_back(self) -> None:
        """Make every page the file's own again. The lock is held, or nobody else can be here."""
        if self._fd >= 0 and self._runs:
            native.map_file(self, self._fd, 0, self._pages)
        self._shared_pages = self._runs = 0
        self._granted = False
        self._keep_lease(-1)

    def _keep_lease(self, fd: int) -> None:
        """Hold the lease of this descriptor from now on (-1: none), and give up the one before."""
        before, self._lease = self._lease, fd
        if before >= 0:
            os.close(before)


FilePath = str | bytes | os.PathLike[str]


def open_shared(path: FilePath, *, agent: str | None = None, timeout: float = 5.0) -> SharedFile:
    """Map a whole regular file read-only and share what can be shared of it.

    Returns when the agent has answered, or after `timeout` seconds; pages may become shared, and plain again, at any
    later time. `agent`: path of the agent's socket (default: $SHAREAREA_AGENT_SOCKET, then /run/sharearea-agent/...).
    Raises OSError if the file cannot be opened, ValueError if it is empty or no regular file. Never fails because of
    the agent: the file is then plain, and `reason` says why.
    """
    return open_shared_all((path,), agent=agent, timeout=timeout)[0]


def open_shared_all(paths: Iterable[FilePath], *, agent: str | None = None, timeout: float = 5.0) -> list[SharedFile]:
    """Map files as open_shared does, and wait for the agent's answers to all of them at once.

    Several times faster than one by one. If one of them cannot be mapped, none is: the others are closed again.
    """
    session = _session(agent or os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)
    files: list[SharedFile] = []
    try:
        for path in paths:
            files.append(_map(path))
            session.add(files[-1])
    except BaseException:
        for shared in files:
            shared.close()
        raise
    deadline = time.monotonic() + timeout
    for shared in files:
        shared._answered.wait(max(0.0, deadline - time.monotonic()))
    return files


def _map(path: FilePath) -> SharedFile:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(f"{os.fsdecode(path)} is not a regular file")
        if info.st_size == 0:
            raise ValueError(f"{os.fsdecode(path)} is empty, and an empty file cannot be mapped")
        shared = SharedFile(fd, info.st_size, access=mmap.ACCESS_READ)
    except BaseException:
        os.close(fd)
        raise
    shared._set_up(fd, info.st_size)
    return shared


# ----------------------------------------------------------------------------------------------------------- session

_sessions: dict[str, _Session] = {}
_sessions_lock = threading.Lock()


def _session(path: str) -> _Session:
    with _sessions_lock:
        session = _sessions.get(path)
        if session is None:
            session = _sessions[path] = _Session(path)
        return session


class _Session:
    """This process's connection to one agent, with the thread that serves it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()  # files, link, next handle
        self._files: dict[int, SharedFile] = {}
        self._next = 0
        self._link: StreamLink | None = None
        self._segments: dict[int, tuple[int, mmap.mmap]] = {}
        self._device = (0, -1)  # the grant device, and for which handle it came
        self._room = int(_max_map_count() * _MAPS_SHARE)
        self._again = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, shared: SharedFile) -> None:
        with self._lock:
            self._next += 1
            shared._handle, shared._session = self._next, self
            self._files[shared._handle] = shared
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="sharearea", daemon=True)
                self._thread.start()
                return  # the thread opens all files as soon as it is connected
            if self._link is not None:
                self._open(self._link, shared)
            else:
                shared._answered.set()  # no agent now; it may come back
        self._again.set()

    def forget(self, shared: SharedFile) -> None:
        with self._lock:
            self._files.pop(shared._handle, None)
            if self._link is not None:
                self._send(self._link, Close(shared._handle))

    # -------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        pause = _RETRY_S[0]
        while True:
            link = self._connect()
            if link is not None:
                begun = time.monotonic()
                self._serve(link)
                # A connection that ends at once (a limit of either side) is not tried again at once.
                if time.monotonic() - begun > _STABLE_S:
                    pause = _RETRY_S[0]
            self._lost()
            self._again.clear()
            self._again.wait(pause)
            pause = min(pause * 2, _RETRY_S[1])
            with self._lock:
                if not self._files:
                    self._thread = None
                    return

    def _connect(self) -> StreamLink | None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        except OSError:
            return None
        sock.settimeout(2.0)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return None
        link = StreamLink(
            sock,
            incoming=AGENT_TO_CONSUMER,
            outgoing=CONSUMER_TO_AGENT,
            max_queue_bytes=8 << 20,
            accept_fds=256,
        )
        with self._lock:
            self._link = link
            for shared in list(self._files.values()):
                self._open(link, shared)
        return link

    def _serve(self, link: StreamLink) -> None:
        readable = select.poll()
        readable.register(link, select.POLLIN)
        try:
            while True:
                readable.poll()
                for message, fd in link.receive():
                    self._on_message(link, message, fd)
        except (ShareareaError, OSError, ValueError):
            pass  # the agent is gone or talks nonsense: back to plain files

    def _lost(self) -> None:
        with self._lock:
            link, self._link = self._link, None
            files = list(self._files.values())
        for shared in files:
            with shared._lock:
                if shared._session is self:
                    shared._put_back()
            shared._reason = "no-agent"
            shared._answered.set()
        if link is not None:
            link.close()  # not before: an agent that is there takes it for our having let go
        self._drop_segments(list(self._segments))
        self._drop_device()

    def _on_message(self, link: StreamLink, message: Message, fd: int | None) -> None:
        match message:
            case ShareSegment():
                assert fd is not None
                try:
                    self._segments[message.number] = (fd, mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
                except OSError:
                    os.close(fd)  # at a limit of this process: what is in the segment stays plain
            case SegmentsGone():
                self._drop_segments(array("I", message.numbers))
            case Plain():
                shared = self._files.get(message.handle)
                if shared is not None:
                    shared._reason = message.reason
                    shared._answered.set()
            case Share():
                assert fd is not None
                runs = array("I", message.runs), array("I", message.segments)
                compare = runs if message.all else (array("I", message.compare), array("I", message.compare_segments))
                self._on_share(link, message, fd, lambda shared: self._share(shared, *runs, *compare))
            case GrantDevice():
                assert fd is not None
                self._drop_device()
                self._device = (message.handle, fd)
            case ShareGrants():
                assert fd is not None
                grants = message
                try:
                    self._on_share(link, grants, fd, lambda shared: self._share_grants(shared, grants))
                finally:
                    self._drop_device()
            case Unshare():
                shared = self._files.get(message.handle)
                if shared is not None:
                    with shared._lock:
                        if shared._shared_pages:
                            shared._reason = "withdrawn"
                        if shared._session is self:
                            shared._put_back()
                with self._lock:
                    self._send(link, LetGo(message.handle, message.generation))

    def _on_share(
        self,
        link: StreamLink,
        share: Share | ShareGrants,
        lease: int,
        put: Callable[[SharedFile], tuple[int, int]],
    ) -> None:
        shared = self._files.get(share.handle)
        outcome, pages = MAPPED_NO_ROOM, 0
        if shared is None:
            os.close(lease)
        else:
            with shared._lock:
                shared._put_back()
                shared._keep_lease(lease)
                if shared._session is self:
                    outcome, pages = put(shared)
                if outcome != MAPPED_DONE:
                    shared._put_back()
        with self._lock:
            self._send(link, Mapped(share.handle, share.generation, pages, outcome))
        if shared is not None:
            shared._reason = ("", "bytes-differed", "no-room")[outcome]
            shared._answered.set()

    def _share(
        self,
        shared: SharedFile,
        runs: array[int],
        segments: array[int],
        compare: array[int],
        compare_segments: array[int],
    ) -> tuple[int, int]:
        """Compare, then map, under the file's lease. Returns the outcome and the pages that are shared now."""
        used = sum(other._runs for other in list(self._files.values()))
        if used + len(segments) > self._room or os.fstat(shared._fd).st_size != shared._length:
            return MAPPED_NO_ROOM, 0
        pages = sum(runs[2::3])
        try:
            for page, slot, count, segment in zip(
                compare[0::3], compare[1::3], compare[2::3], compare_segments, strict=True
            ):
                start = native.SEGMENT_HEADER + slot * PAGE_SIZE
                view = memoryview(self._segments[segment][1])
                with view, view[start : start + count * PAGE_SIZE] as slots:
                    if native.compare_pages(shared._fd, page, slots) != count:
                        return MAPPED_DIFFERENT, 0
            if not native.lease_held(shared._lease):
                return MAPPED_NO_ROOM, 0  # a writer waits already: Unshare is on its way
            at = 0
            while at < len(segments):
                end = at
                while end < len(segments) and segments[end] == segments[at]:
                    end += 1
                shared._runs += end - at
                native.map_runs(
                    shared, shared._pages, self._segments[segments[at]][0], runs[at * 3 : end * 3].tobytes()
                )
                at = end
            if pages < shared._pages:
                # Pages in between come from the file: read-ahead would bring the shared ones back into the cache.
                super(SharedFile, shared).madvise(mmap.MADV_RANDOM)
        except (NativeError, OSError, KeyError, ValueError):
            return MAPPED_NO_ROOM, 0
        shared._shared_pages = pages
        return MAPPED_DONE, pages

    def _share_grants(self, shared: SharedFile, share: ShareGrants) -> tuple[int, int]:
        """Do what _share does, with pages of another domain."""
        handle, device = self._device
        used = sum(other._runs for other in list(self._files.values()))
        if handle != share.handle or device < 0 or os.fstat(shared._fd).st_size != shared._length:
            return MAPPED_NO_ROOM, 0
        pages = sum(array("I", share.runs)[2::3])
        try:
            with native.Grants(device, share.domid, share.runs, movable=bool(share.movable)) as grants:
                if used + grants.stretches() > self._room:
                    return MAPPED_NO_ROOM, 0
                if not grants.compare(shared._fd):
                    return MAPPED_DIFFERENT, 0
                if not native.lease_held(shared._lease):
                    return MAPPED_NO_ROOM, 0  # a writer waits already: Unshare is on its way
                if pages < shared._pages:
                    super(SharedFile, shared).madvise(mmap.MADV_RANDOM)  # as in _share
                shared._runs, shared._granted = grants.stretches(), True
                grants.place(device, shared, shared._pages, shared._fd)
        except (NativeError, OSError, ValueError):
            return MAPPED_NO_ROOM, 0
        shared._shared_pages = pages
        return MAPPED_DONE, pages

    def _drop_device(self) -> None:
        """Close the grant device: while it is open, so are the grants that were mapped through it."""
        (_, fd), self._device = self._device, (0, -1)
        if fd >= 0:
            os.close(fd)

    def _drop_segments(self, numbers: list[int] | array[int]) -> None:
        for number in numbers:
            fd, view = self._segments.pop(number, (-1, None))
            if view is not None:
                os.close(fd)
                # In a child that was forked in the middle of a comparison, a view of it is in use for good.
                with contextlib.suppress(BufferError):
                    view.close()

    # ---------------------------------------------------------------------------------------------------- sending

    def _open(self, link: StreamLink, shared: SharedFile) -> None:
        if not self._send(link, Open(shared._handle, shared._length), shared._fd):
            shared._reason = "not-asked"
            shared._answered.set()

    def _send(self, link: StreamLink, message: Message, fd: int | None = None) -> bool:
        """Send and wait until it is out; the lock is held. A dead link is the serving thread's business.

        Returns whether it was sent, which it is not without a descriptor to spare for the one that goes with it.
        """
        try:
            link.send(message, fd)
            writable = select.poll()
            writable.register(link, select.POLLOUT)
            deadline = time.monotonic() + 5.0
            while not link.flush() and time.monotonic() < deadline:
                writable.poll(100)
        except (ShareareaError, OSError, ValueError):
            return False
        return True

    def after_fork(self) -> None:
        """In a child: its mappings are the parent's, but nobody would tell it to let go of them."""
        self._lock = threading.Lock()
        if self._link is not None:
            self._link.close()
            self._link = None
        for shared in list(self._files.values()):
            shared._lock = threading.Lock()
            shared._session = None
            shared._put_back()
            shared._reason = "forked"
        self._files.clear()
        self._drop_segments(list(self._segments))
        self._drop_device()


def _after_fork() -> None:
    global _sessions_lock
    _sessions_lock = threading.Lock()
    for session in _sessions.values():
        session.after_fork()
    _sessions.clear()


os.register_at_fork(after_in_child=_after_fork)


def _max_map_count() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65_530

"""Where domains of the local backend connect: a listening unix socket.

Who a peer is comes from the kernel (SO_PEERCRED), at the moment it connected, and from nothing that it says. Frames and
their bounds are link.py's; which pool the peer belongs to is the policy's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ..common.errors import Closed, HostError
from ..common.link import StreamLink
from ..common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, MAX_FRAME
from ..model import Identity

MAX_QUEUE_BYTES: Final = 8 * MAX_FRAME
"""What may wait for one domain that reads slowly."""

_BACKLOG: Final = 128
_PATH_BYTES: Final = 107  # sun_path without its terminating NUL, unix(7)
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid

# accept(2): this process or the host is at a limit. The connection stays in the backlog and the socket readable.
_LACKING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class LocalListener:
    """Listen on `path`, whose file gets `mode`, until close().

    A socket that a dead broker left there is replaced. Beside it lies `<path>.lock`, which a broker holds locked for as
    long as it listens and which stays: removing it would let two brokers hold two locks.

    Raises HostError if a broker answers at `path`, if something else is there, or if it cannot be bound.
    """

    def __init__(self, path: Path, mode: int = 0o666, *, max_queue_bytes: int = MAX_QUEUE_BYTES) -> None:
        if len(os.fsencode(path)) > _PATH_BYTES:
            raise HostError(
                f"the socket path {path} is longer than the {_PATH_BYTES} bytes that the kernel allows",
                "choose a shorter path",
            )
        self.path = path
        self.lacking: str | None = None
        """Why the last accept() could not take a waiting connection (no descriptor or no memory), else None.

        The socket stays readable then: stop watching it for a while instead of spinning.
        """
        self._max_queue_bytes = max_queue_bytes
        with contextlib.ExitStack() as undo:
            try:
                lock = _lock(path)
                undo.callback(os.close, lock)
                _clear(path)
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                undo.callback(sock.close)
                sock.setblocking(False)
                sock.bind(os.fspath(path))
                undo.callback(path.unlink, missing_ok=True)
                # Nobody can connect before listen(), so nobody passes under the mode that bind() gave the file.
                path.chmod(mode)
                info = path.lstat()
                sock.listen(_BACKLOG)
            except OSError as error:
                raise HostError(
                    f"cannot listen on {path}: {os.strerror(error.errno or errno.EIO)}",
                    f"check that {path.parent} exists and may be written",
                ) from None
            undo.pop_all()
        self._lock, self._sock = lock, sock
        self._identity = (info.st_dev, info.st_ino)

    def fileno(self) -> int:
        """Return the listening descriptor; it is readable when accept() has something to do. Raises Closed."""
        if self._sock.fileno() < 0:
            raise Closed("the listener is closed")
        return self._sock.fileno()

    def accept(self) -> tuple[StreamLink, Identity] | None:
        """Take one waiting connection and say who it is. Never waits.

        None: nobody is there (any more), or, if `lacking` says so, there is nothing left to take it with. The caller
        owns the link. Raises Closed after close().
        """
        self.fileno()
        self.lacking = None
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in _LACKING:
                self.lacking = os.strerror(error.errno)
            # Everything else is a connection that went away while it waited, or none at all (accept(2)).
            return None
        try:
            _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            link = StreamLink(
                sock, incoming=AGENT_TO_BROKER, outgoing=BROKER_TO_AGENT, max_queue_bytes=self._max_queue_bytes
            )
        except OSError:
            sock.close()
            return None
        return link, Identity("local", uid)

    def close(self) -> None:
        """Stop listening and remove the socket's file if it is still ours. Twice is fine."""
        if self._sock.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            info = self.path.lstat()
            if (info.st_dev, info.st_ino) == self._identity:
                self.path.unlink()
        self._sock.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        """Return the listener itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the listener."""
        self.close()


def _answers(path: Path) -> HostError:
    return HostError(
        f"a broker is running already: {path} is taken",
        "stop it first, or give this one another socket path",
    )


def _lock(path: Path) -> int:
    # Two brokers that start at the same moment would both find a stale socket, and one would remove the other's.
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise _answers(path) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _clear(path: Path) -> None:
    """Remove a socket on which nobody answers. Raises HostError for anything else that is there."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise HostError(f"{path} exists and is no socket", "remove it, or choose another socket path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except FileNotFoundError:
            return
        except BlockingIOError:  # its backlog is full: somebody listens
            raise _answers(path) from None
        else:
            raise _answers(path)

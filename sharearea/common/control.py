"""The operator's door of a running program: a Unix socket on which one JSON question gets one JSON answer.

The server part never waits: the program's own selector watches it. The client part is what the command lines use.
Answers are plain data; what they mean is their program's business. `Door` is the listening socket by itself, which
the agent has for its consumers too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .errors import HostError, PeerUnreachable, ProtocolError, ShareareaError

MAX_REQUEST: Final = 65_536
MAX_ANSWER: Final = 64 << 20
_MAX_CLIENTS: Final = 16

Handler = Callable[[dict[str, Any]], dict[str, Any]]


# accept(2): this process or the host is at a limit; the connection stays where it is and the socket readable.
_LACKING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Door:
    """A listening Unix socket at `path`, whose file gets `mode`. It takes the place of one that a dead program left.

    Raises HostError if somebody answers at `path`, if something else is there, or if it cannot be bound.
    """

    def __init__(self, path: Path, mode: int, backlog: int) -> None:
        self.path = path
        self.lacking: str | None = None
        """Why the last accept() turned a caller away, else None."""
        self._spare = -1
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _clear(path)
            listener.bind(os.fspath(path))
            path.chmod(mode)
            listener.listen(backlog)
            self._spare = _spare()
        except OSError as error:
            listener.close()
            raise HostError(f"cannot listen on {path}: {error.strerror}", "check the folder and its rights") from None
        except HostError:
            listener.close()
            raise
        self._listener = listener

    def fileno(self) -> int:
        """Return the listening descriptor, -1 after close()."""
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """Take one waiting caller, if there is one. Never waits.

        With no descriptor left for him he is hung up on, for which one is set aside: were he left waiting, the socket
        would stay readable and its owner would spin.
        """
        self.lacking = None
        try:
            return self._listener.accept()[0]
        except OSError as error:
            if error.errno in _LACKING:
                self.lacking = os.strerror(error.errno)
                self._turn_away()
            return None

    def _turn_away(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = _spare()

    def close(self) -> None:
        """Stop listening and remove the socket file. Twice is fine."""
        if self._listener.fileno() < 0:
            return
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)
        self.path.unlink(missing_ok=True)


class ControlServer:
    """Answers questions on a socket at `path`. `handle` must be quick: it runs on the program's loop.

    The owner registers `fileno()`-objects through the selector it gives; `ready(key)` does the work for one of them.
    """

    def __init__(self, path: Path, mode: int, handle: Handler, selector: selectors.BaseSelector) -> None:
        self._handle = handle
        self._selector = selector
        self._clients: dict[socket.socket, _Client] = {}
        self._door = Door(path, mode, _MAX_CLIENTS)
        self._selector.register(self._door, selectors.EVENT_READ, self)

    def ready(self, source: object) -> None:
        """Handle readiness of the door or of one client: what the selector says is ready."""
        if source is self._door:
            self._accept()
            return
        client = self._clients.get(source) if isinstance(source, socket.socket) else None
        if client is not None and not client.step(self._handle, self._selector, self):
            self._drop(client.sock)

    def _accept(self) -> None:
        sock = self._door.accept()
        if sock is None:
            return
        if len(self._clients) >= _MAX_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        self._clients[sock] = _Client(sock)
        self._selector.register(sock, selectors.EVENT_READ, self)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._clients[sock]
        sock.close()

    def close(self) -> None:
        """Stop listening, drop all clients, remove the socket file. Twice is fine."""
        for sock in list(self._clients):
            self._drop(sock)
        if self._door.fileno() >= 0:
            self._selector.unregister(self._door)
            self._door.close()


class _Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.request = bytearray()
        self.answer = memoryview(b"")
        self.answered = False

    def step(self, handle: Handler, selector: selectors.BaseSelector, server: ControlServer) -> bool:
        """Read or write what goes without waiting. Returns whether the client stays."""
        try:
            if not self.answered:
                data = self.sock.recv(MAX_REQUEST)
                self.request += data
                if not data or len(self.request) > MAX_REQUEST:
                    return False
                if b"\n" not in self.request:
                    return True
                self.answer = memoryview(json.dumps(_respond(handle, bytes(self.request))).encode())
                self.answered = True
                selector.modify(self.sock, selectors.EVENT_WRITE, server)
            self.answer = self.answer[self.sock.send(self.answer) :]
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return bool(self.answer)


def _respond(handle: Handler, request: bytes) -> dict[str, Any]:
    try:
        question = json.loads(request)
        if not isinstance(question, dict):
            raise ProtocolError("a question is a JSON object")
        return {"ok": True, "answer": handle(question)}
    except ShareareaError as error:
        return {"ok": False, "error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    except ValueError as error:
        return {"ok": False, "error": f"not understood: {error}", "hint": "", "exit_code": ProtocolError.exit_code}


def _clear(path: Path) -> None:
    """Remove a socket on which nobody answers. Raises HostError for anything else that is there."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise HostError(f"{path} exists and is no socket", "remove it, or configure another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody listens
    raise HostError(f"{path} is in use by a running program", "stop it, or configure another path")


def _spare() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def ask(path: Path, question: dict[str, Any], timeout: float = 10.0) -> dict[str, Any]:
    """Ask a running program. Raises PeerUnreachable, or the error that the program answered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(os.fspath(path))
            sock.sendall(json.dumps(question).encode() + b"\n")
            chunks: list[bytes] = []
            while chunk := sock.recv(1 << 20):
                chunks.append(chunk)
        except OSError as error:
            raise PeerUnreachable(
                f"nobody answers on {path}: {error.strerror or error}", "is it running, and is this its configuration?"
            ) from None
    try:
        reply = json.loads(b"".join(chunks))
    except ValueError:
        raise PeerUnreachable(f"{path} hung up without an answer", "look at its log") from None
    if not reply["ok"]:
        failure = ShareareaError(reply["error"], reply["hint"])
        failure.exit_code = reply["exit_code"]
        raise failure
    answer: dict[str, Any] = reply["answer"]
    return answer

"""A small xenstored over a unix socket: a tree, watches, which domains there are; slow, silent or mad when asked to.

It knows just what XenStore asks for. Debian 12's own xenstored does not run without Xen: told not to look for it (-D),
it ends at the first write.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

HEADER = struct.Struct("<IIII")
DIRECTORY, READ, WATCH, UNWATCH, WRITE, RM, SET_PERMS, WATCH_EVENT, ERROR, IS_INTRODUCED = (
    1, 2, 4, 5, 11, 13, 14, 15, 16, 17,
)  # fmt: skip


class FakeXenstored:
    """Listen on `path` until the end of the with block. Attributes may be changed at any time, under `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.nodes: dict[str, str] = {}
        self.permissions: dict[str, list[str]] = {}
        self.domains: set[int] = set()
        self.refuse: dict[str, str] = {}  # path -> error
        self.silent = False  # requests are taken and not answered
        self.bytewise = False  # answers come byte by byte
        self.held: list[bytes] = []  # answers that silence has kept back
        self.requests = 0
        self._clients: list[_Client] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                client = _Client(self, connection)
                with self.lock:
                    self._clients.append(client)
                client.start()

    def set(self, path: str, value: str) -> None:
        """Write a node as its owner would, and tell who watches."""
        with self.lock:
            parts = path.split("/")
            for end in range(2, len(parts)):
                self.nodes.setdefault("/".join(parts[:end]), "")
            self.nodes[path] = value
            self.fire(path)

    def remove(self, path: str) -> bool:
        with self.lock:
            gone = [node for node in self.nodes if node == path or node.startswith(path + "/")]
            for node in gone:
                del self.nodes[node]
            if gone:
                self.fire(path)
            return bool(gone)

    def fire(self, path: str) -> None:
        """Report a change of `path`, or of @introduceDomain or @releaseDomain."""
        with self.lock:
            for client in self._clients:
                for watched, token in client.watches:
                    if path == watched or path.startswith(watched.rstrip("/") + "/") or watched.startswith(path + "/"):
                        client.event(path if not watched.startswith(path + "/") else watched, token)

    def raw(self, data: bytes) -> None:
        """Send bytes of any kind to every client."""
        with self.lock:
            for client in self._clients:
                client.send(data)

    def speak(self) -> None:
        """Answer again, the kept answers first."""
        with self.lock:
            self.silent = False
            for answer in self.held:
                self.raw(answer)
            self.held.clear()

    def add_domain(self, domid: int, name: str, uuid: str, label: str | None = None) -> None:
        with self.lock:
            base = f"/local/domain/{domid}"
            for path, value in (
                (base, ""),
                (f"{base}/name", name),
                (f"{base}/vm", f"/vm/{uuid}"),
                (f"{base}/domid", str(domid)),
                (f"{base}/data", ""),
                (f"{base}/memory/target", "196608"),
                (f"{base}/memory/static-max", "262144"),
            ):
                self.set(path, value)
            if label is not None:
                self.set(f"{base}/sharearea-label", label)
            self.domains.add(domid)
            self.fire("@introduceDomain")

    def end_domain(self, domid: int, *, keep_nodes: bool = False) -> None:
        with self.lock:
            self.domains.discard(domid)
            self.fire("@releaseDomain")
            if not keep_nodes:
                self.remove(f"/local/domain/{domid}")

    def hang_up(self) -> None:
        """Close every connection."""
        with self.lock:
            clients, self._clients = self._clients, []
            for client in clients:
                client.shutdown()
        for client in clients:
            client.join(10)
            client.connection.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)  # first: what it has accepted meanwhile is to be hung up too
        self._socket.close()
        self.hang_up()
        self.path.unlink()

    def answer(self, client: _Client, kind: int, payload: bytes) -> bytes:
        """Return the payload of the answer to a request; KeyError or PermissionError as xenstored's words."""
        with self.lock:
            self.requests += 1
            words = [word.decode() for word in payload.split(b"\0")]
            path = words[0]
            if kind == IS_INTRODUCED:
                return b"T\0" if int(path) in self.domains else b"F\0"
            if not path.startswith(("/", "@")):
                path = "/local/domain/0/" + path
            if " " in path:
                raise PermissionError("EINVAL")
            if path in self.refuse:
                raise PermissionError(self.refuse[path])
            match kind:
                case _ if kind == READ:
                    return self.nodes[path].encode()
                case _ if kind == DIRECTORY:
                    if path not in self.nodes:
                        raise KeyError(path)
                    below = [node[len(path) + 1 :] for node in self.nodes if node.startswith(path + "/")]
                    return b"".join(name.encode() + b"\0" for name in below if "/" not in name)
                case _ if kind == WRITE:
                    self.set(path, "\0".join(words[1:]))
                case _ if kind == RM:
                    if not self.remove(path):
                        raise KeyError(path)
                case _ if kind == SET_PERMS:
                    self.permissions[path] = words[1:-1]
                case _ if kind == WATCH:
                    client.watches.append((path, words[1]))
                    client.event(path, words[1])
                case _ if kind == UNWATCH:
                    if (path, words[1]) not in client.watches:
                        raise KeyError(path)
                    client.watches.remove((path, words[1]))
            return b"OK\0"


class _Client(threading.Thread):
    def __init__(self, server: FakeXenstored, connection: socket.socket) -> None:
        super().__init__(daemon=True)
        self.server, self.connection = server, connection
        self.watches: list[tuple[str, str]] = []
        self._out = threading.RLock()

    def run(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, number, _, length = HEADER.unpack(self._take(HEADER.size))
                payload = self._take(length)
                try:
                    answer = self.server.answer(self, kind, payload)
                except KeyError:
                    kind, answer = ERROR, b"ENOENT\0"
                except PermissionError as error:
                    kind, answer = ERROR, f"{error}\0".encode()
                packet = HEADER.pack(kind, number, 0, len(answer)) + answer
                with self.server.lock:
                    if self.server.silent:
                        self.server.held.append(packet)
                    else:
                        self.send(packet)

    def _take(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.connection.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def send(self, data: bytes) -> None:
        with self._out, contextlib.suppress(OSError):
            for at in range(0, len(data), 1 if self.server.bytewise else len(data)):
                self.connection.sendall(data[at : at + (1 if self.server.bytewise else len(data))])

    def event(self, path: str, token: str) -> None:
        payload = f"{path}\0{token}\0".encode()
        self.send(HEADER.pack(WATCH_EVENT, 0, 0, len(payload)) + payload)

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

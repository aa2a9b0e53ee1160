"""The near end of the command channel: commands and files for dom0 and the guests (inside/server.py is the far end).

A machine is reached by one TCP connection for each command. Nothing waits without a limit of time, and a machine that
does not answer is a ChannelError, never a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Final

PORT: Final = 7000
"""Where inside/server.py listens, in every machine."""
_HEAD: Final = struct.Struct(">cI")
PATIENCE: Final = float(os.environ.get("XEN_PATIENCE", "1"))
"""Every limit of time is multiplied with this: more than 1 for a machine that is busy with other things."""
_SLACK_S: Final = 20.0  # the far end keeps the limit of time; we wait a little longer for it to say so


class ChannelError(Exception):
    """A machine of the lab does not answer, or the connection to it broke."""


class CommandFailed(AssertionError):
    """A command in a machine ended with another exit code than 0."""

    def __init__(self, machine: str, words: Sequence[str], done: Done) -> None:
        text = (done.out + done.err).strip()
        super().__init__(f"{machine}: {shlex.join(words)[:400]!r} ended with {done.code}: {text[-4000:]}")
        self.done = done


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended: its exit code (negative: a signal; None: killed for its limit of time) and what it said."""

    code: int | None
    data: bytes
    err: str

    @property
    def out(self) -> str:
        """What it wrote to standard output, as text."""
        return self.data.decode(errors="replace")


class Running:
    """A program that runs in a machine. Output is collected by a thread, by lines where they are asked for."""

    def __init__(self, sock: socket.socket, machine: str, words: Sequence[str]) -> None:
        self.machine = machine
        self.words = list(words)
        self._sock = sock
        self._sending = threading.Lock()
        self._out = bytearray()
        self._err = bytearray()
        self._lines: Queue[bytes] = Queue()
        self._part = bytearray()
        self._code: int | None = None
        self._broken: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still runs, as far as is known here."""
        return not self._over.is_set()

    def write(self, data: bytes) -> None:
        """Write to its standard input."""
        for at in range(0, len(data), 1 << 18):
            self._send(b"i", data[at : at + (1 << 18)])

    def end_input(self) -> None:
        """Close its standard input."""
        self._send(b"e")

    def signal(self, number: int) -> None:
        """Send a signal to its process group."""
        self._send(b"k", str(number).encode())

    def read_line(self, timeout: float) -> str:
        """Return the next line of its output. ChannelError if none comes in time or the program has ended."""
        deadline = time.monotonic() + timeout * PATIENCE
        while True:
            try:
                return self._lines.get(timeout=0.05).decode(errors="replace")
            except Empty:
                if self._over.is_set() and self._lines.empty():
                    about = self._broken or f"ended with {self._code}"
                    raise ChannelError(f"{self._name}: {about}: {self._err.decode(errors='replace')[-2000:]}") from None
                if time.monotonic() > deadline:
                    raise ChannelError(f"{self._name}: no line after {timeout} s") from None

    def wait(self, timeout: float) -> Done:
        """Wait for its end. ChannelError if it does not come in time or the connection broke."""
        if not self._over.wait(timeout * PATIENCE):
            self.close()
            raise ChannelError(f"{self._name}: no end after {timeout} s: {self._err.decode(errors='replace')[-2000:]}")
        if self._broken is not None:
            raise ChannelError(f"{self._name}: {self._broken}")
        return Done(self._code, bytes(self._out), self._err.decode(errors="replace"))

    def close(self) -> None:
        """Give up the connection; the program is killed if it still runs."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._sock.close()

    @property
    def _name(self) -> str:
        return f"{self.machine}: {shlex.join(self.words)[:400]!r}"

    def _send(self, kind: bytes, data: bytes = b"") -> None:
        try:
            with self._sending:
                self._sock.sendall(_HEAD.pack(kind, len(data)) + data)
        except OSError as error:
            if not self._over.wait(2):
                raise ChannelError(f"{self._name}: {error}") from None

    def _collect(self) -> None:
        try:
            while True:
                kind, size = _HEAD.unpack(_read(self._sock, _HEAD.size))
                data = _read(self._sock, size)
                if kind == b"o":
                    self._out += data
                    self._part += data
                    *whole, rest = self._part.split(b"\n")
                    self._part = bytearray(rest)
                    for line in whole:
                        self._lines.put(bytes(line))
                elif kind == b"r":
                    self._err += data
                else:
                    self._code = int(data) if kind == b"x" else None
                    return
        except (OSError, EOFError, ValueError) as error:
            self._broken = f"the connection broke ({error or 'closed'})"
        finally:
            self._over.set()


class Machine:
    """dom0, or a guest that is reached through it."""

    def __init__(self, name: str, port: int, guest: str | None = None) -> None:
        self.name = name
        self._port = port  # of this host, where QEMU listens for dom0
        self._guest = guest

    def start(self, *words: str, limit: float = 3600) -> Running:
        """Start a program; it is killed after `limit` seconds, or when the connection closes."""
        try:
            sock = socket.create_connection(("127.0.0.1", self._port), timeout=10 * PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._guest is not None:
                _request(sock, {"connect": [self._guest, PORT]})
            _request(sock, {"run": list(words), "timeout": limit * PATIENCE})
            sock.settimeout(None)
        except OSError as error:
            raise ChannelError(f"{self.name} cannot be reached: {error}") from None
        return Running(sock, self.name, words)

    def try_run(self, command: str, *, timeout: float = 60, data: bytes = b"") -> Done:
        """Run a shell command, with `data` as its standard input, and return how it ended."""
        running = self.start("/bin/sh", "-c", command, limit=timeout)
        try:
            running.write(data)
            running.end_input()
            return running.wait(timeout + _SLACK_S)
        finally:
            running.close()

    def run(self, command: str, *, timeout: float = 60, data: bytes = b"") -> str:
        """Run a shell command that must succeed, and return its standard output. CommandFailed if it does not."""
        done = self.try_run(command, timeout=timeout, data=data)
        if done.code != 0:
            raise CommandFailed(self.name, [command], done)
        return done.out

    def put(self, path: str, content: bytes | str | Path, *, mode: int = 0o644, timeout: float = 120) -> None:
        """Write a file there, with its folder."""
        data = content.read_bytes() if isinstance(content, Path) else content
        raw = data.encode() if isinstance(data, str) else data
        name = shlex.quote(path)
        command = f"mkdir -p $(dirname {name}) && cat >{name} && chmod {mode:o} {name} && stat -c %s {name}"
        if int(self.run(command, timeout=timeout, data=raw)) != len(raw):
            raise ChannelError(f"{self.name}: {path} did not arrive whole")

    def get(self, path: str, *, timeout: float = 120) -> bytes:
        """Read a file from there."""
        done = self.try_run(f"cat {shlex.quote(path)}", timeout=timeout)
        if done.code != 0:
            raise CommandFailed(self.name, ["cat", path], done)
        return done.data

    def answers(self) -> bool:
        """Whether it can run a command now."""
        try:
            return self.try_run("true", timeout=5).code == 0
        except ChannelError:
            return False


def _request(sock: socket.socket, request: dict[str, object]) -> None:
    data = json.dumps(request).encode()
    sock.sendall(_HEAD.pack(b"q", len(data)) + data)


def _read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(size - len(parts))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)

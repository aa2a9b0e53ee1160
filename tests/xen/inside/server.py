"""The far end of the command channel: runs in dom0 and in every guest, on Debian's Python alone.

One TCP connection is one command. A frame is one byte of kind, four bytes of length (big-endian), then the bytes. First
comes a request, a JSON object in a frame of kind "q":

{"run": [WORD...], "timeout": SECONDS}  run a program in a session of its own. Then, inwards: "i" bytes for its standard
        input, "e" end of its input, "k" a signal for its process group (decimal). Outwards: "o" its output, "r" its
        standard error, at last "x" with its exit code, or "t" if it was killed for its time limit. A connection that
        closes early kills the group. What is to outlive its command asks for a session of its own (setsid).
{"connect": [HOST, PORT]}  pass everything on to another machine: the way to the guests leads through dom0.

There is no authentication: the channel exists inside the emulator's own network only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import IO, Any

HEAD = struct.Struct(">cI")
LINGER_S = 0.3


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read so many bytes. EOFError if the connection ends before."""
    parts = []
    while size:
        part = sock.recv(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read one frame: its kind and its bytes."""
    kind, size = HEAD.unpack(read_exactly(sock, HEAD.size))
    return kind, read_exactly(sock, size)


def send_frame(sock: socket.socket, kind: bytes, data: bytes = b"") -> None:
    """Send one frame."""
    sock.sendall(HEAD.pack(kind, len(data)) + data)


def serve(sock: socket.socket) -> None:
    """Serve one connection to its end."""
    with sock, contextlib.suppress(EOFError, OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, data = read_frame(sock)
        request: dict[str, Any] = json.loads(data)
        if "connect" in request:
            relay(sock, request["connect"][0], request["connect"][1])
        else:
            run(sock, request["run"], float(request["timeout"]))


def relay(sock: socket.socket, host: str, port: int) -> None:
    """Pass bytes between the caller and another machine until one of them closes."""
    with socket.create_connection((host, port), timeout=5) as other:
        other.settimeout(None)
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def pump(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        back = threading.Thread(target=pump, args=(other, sock), daemon=True)
        back.start()
        pump(sock, other)
        back.join()


def run(sock: socket.socket, words: list[str], timeout: float) -> None:
    """Run one program and carry its standard streams."""
    sending = threading.Lock()

    def send(kind: bytes, data: bytes) -> None:
        with contextlib.suppress(OSError), sending:
            send_frame(sock, kind, data)

    try:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        send(b"r", f"{error}\n".encode())
        send(b"x", b"127")
        return

    def kill(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, number)

    def pump(pipe: IO[bytes], kind: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(pipe.fileno(), 1 << 16):
                send(kind, data)

    def wait() -> None:
        kind = b"x"
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            kind = b"t"
            kill(signal.SIGKILL)
            process.wait()
        # What it left in the background may hold its output open for ever.
        for pump in pumps:
            pump.join(LINGER_S)
        send(kind, str(process.returncode).encode())
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    pumps = [
        threading.Thread(target=pump, args=about, daemon=True)
        for about in ((process.stdout, b"o"), (process.stderr, b"r"))
    ]
    waiter = threading.Thread(target=wait, daemon=True)
    for thread in (*pumps, waiter):
        thread.start()
    try:
        while True:
            kind, data = read_frame(sock)
            with contextlib.suppress(BrokenPipeError, ValueError):
                if kind == b"i":
                    process.stdin.write(data)
                    process.stdin.flush()
                elif kind == b"e":
                    process.stdin.close()
                elif kind == b"k":
                    kill(int(data))
    finally:
        kill(signal.SIGKILL)
        waiter.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError, ValueError):
                pipe.close()


def main() -> int:
    """Serve for ever."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=16, reuse_port=False) as listener:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())

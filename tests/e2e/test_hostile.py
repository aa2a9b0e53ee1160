"""Peers that lie, flood and send what they must not, on the real sockets. They pay; broker, agent and others go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharearea.common import wire
from sharearea.common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, FrameReader
from sharearea_agent.consumer_wire import CONSUMER_TO_AGENT, Close, LetGo, Mapped, Open

from .harness import BIN, MIB, PAGE, Consumer, Domain, Host, digest, noise, wait

PAGES = MIB // PAGE


@contextlib.contextmanager
def _connect(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(os.fspath(path))
        sock.settimeout(30)
        yield sock


def _hello(name: str, protocol: int = wire.PROTOCOL_VERSION) -> bytes:
    return AGENT_TO_BROKER.encode(wire.Hello(protocol, "0", name, os.urandom(16), b""))


def _said(sock: socket.socket) -> list[wire.Message]:
    """Return what the broker says until it hangs up."""
    reader = FrameReader()
    found: list[wire.Message] = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            reader.feed(data)
            found += [BROKER_TO_AGENT.decode(payload) for payload in reader]
    return found


def _quietly_send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


def _garbage(sock: socket.socket) -> None:
    _quietly_send(sock, random.Random(1).randbytes(100_000))


def _huge(sock: socket.socket) -> None:
    _quietly_send(sock, struct.pack("<I", 0xFFFFFFFF) + b"x")


def _empty(sock: socket.socket) -> None:
    _quietly_send(sock, struct.pack("<I", 0))


def _not_hello(sock: socket.socket) -> None:
    _quietly_send(sock, AGENT_TO_BROKER.encode(wire.Attach(array("I", [1]).tobytes())))


def _broker_message(sock: socket.socket) -> None:
    _quietly_send(sock, _hello("d9") + BROKER_TO_AGENT.encode(wire.Ping(1)))


def _second_hello(sock: socket.socket) -> None:
    _quietly_send(sock, _hello("d9") * 2)


def _descriptors(sock: socket.socket) -> None:
    with Path("/dev/null").open("rb") as null:
        socket.send_fds(sock, [_hello("d9")], [null.fileno()] * 10)


def _twice_reported(sock: socket.socket) -> None:
    ids, sizes, counts = array("I", [1, 1]), array("Q", [PAGE, PAGE]), array("I", [1, 1])
    columns = (ids.tobytes(), sizes.tobytes(), counts.tobytes(), os.urandom(64), (b"/a", b"/b"))
    roots = wire.Roots(*columns, bytes(2 * wire.CLASSES_SIZE))
    _quietly_send(sock, _hello("d9") + AGENT_TO_BROKER.encode(roots))


def _impossible_counts(sock: socket.socket) -> None:
    roots = wire.Roots(
        array("I", [1]).tobytes(),
        array("Q", [PAGE]).tobytes(),
        array("I", [9]).tobytes(),
        os.urandom(32),
        (b"/a",),
        wire.NO_CLASSES,
    )
    _quietly_send(sock, _hello("d9") + AGENT_TO_BROKER.encode(roots))


@pytest.fixture
def sharing(host: Host) -> tuple[Host, Domain, Consumer, bytes]:
    """Give a host whose domains share one file, with a program that checks it all the time."""
    data = noise(MIB, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    program = first.program()
    program.open(first.root / "f.bin")
    program.wait_shared(PAGES)
    program.ask("check_hashes", name="all", want={"f": digest(data)})
    return host, first, program, data


def _still_well(host: Host, program: Consumer, data: bytes) -> None:
    """Check that those who share went on, and that somebody new can begin."""
    report = program.ask("stop", name="all")
    assert report["faults"] == []
    assert report["least_shared"] == PAGES
    assert host.running.alive
    late = host.add_domain()
    late.write("f.bin", data)
    late.start()
    host.wait_offered(1, late)
    guest = late.program()
    guest.open(late.root / "f.bin")
    guest.wait_shared(PAGES)
    assert guest.ask("hash", name="f") == digest(data)
    assert all(domain.running.alive for domain in host.domains)


def test_what_the_broker_must_not_be_sent(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    host, _, program, data = sharing
    before = host.running.descriptors()
    attacks: list[tuple[Callable[[socket.socket], None], str]] = [
        (_garbage, "a frame of"),
        (_huge, "a frame of 4294967295 bytes"),
        (_empty, "a frame of 0 bytes"),
        (_not_hello, "the first message must be Hello"),
        (_broker_message, "message type 75 does not travel"),
        (_second_hello, "Hello is not expected now"),
        (_descriptors, "more than 0 descriptors"),
        (_twice_reported, "file 1 is reported already"),
        (_impossible_counts, "file 1: 9 pages do not make a file of 4096 bytes"),
    ]
    for number, (attack, text) in enumerate(attacks, 1):
        with _connect(host.socket) as sock:
            attack(sock)
            said = _said(sock)
        strikes = wait("a strike in the log", lambda n: len(host.events("peer.strike")) == n, number)
        assert strikes
        strike = host.events("peer.strike")[-1]
        assert strike["event.reason"] == "malformed"
        assert strike["error.message"].startswith(text)
        assert strike["sharearea.uid"] == os.getuid()
        # The reason was told, unless the unread rest of what was sent reset the connection.
        refused = [message for message in said if isinstance(message, wire.Refused)]
        assert not refused or (refused[-1].reason == "malformed" and refused[-1].text.startswith(text))
    wait("no descriptor left behind", lambda: host.running.descriptors() <= before)
    _still_well(host, program, data)


def test_who_may_not_join(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    host, _, program, data = sharing
    for name, protocol, reason in (
        ("d1", wire.PROTOCOL_VERSION, "already-connected"),
        ("stranger", wire.PROTOCOL_VERSION, None),
        ("d9", 99, "protocol-version"),
    ):
        with _connect(host.socket) as sock:
            sock.sendall(_hello(name, protocol))
            [said] = _said(sock)
        assert isinstance(said, wire.Refused)
        assert reason in (None, said.reason)
        event = host.events("domain.refused")[-1]
        assert (event["sharearea.domain"], event["event.reason"]) == (name, said.reason)
    _still_well(host, program, data)


OTHER_USER = """
import os, socket, sys
from sharearea.common import wire
# Only now: the tree may be where nobody else may look.
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(sys.argv[1])
sock.sendall(wire.AGENT_TO_BROKER.encode(wire.Hello(wire.PROTOCOL_VERSION, "0", "d9", bytes(16), b"")))
data = b""
while part := sock.recv(65536):
    data += part
reader = wire.FrameReader()
reader.feed(data)
[payload] = reader
print(wire.BROKER_TO_AGENT.decode(payload).reason)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be somebody else")
def test_the_kernel_says_who_a_peer_is(host: Host) -> None:
    host.sockets.chmod(0o755)
    host.start_broker()
    done = subprocess.run(
        [sys.executable, "-c", OTHER_USER, os.fspath(host.socket)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    event = host.events("domain.refused")[-1]
    assert event["event.reason"] == done.stdout.strip()
    assert event["sharearea.uid"] == 65534


def test_flood_and_deaf_peer(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    """One sends without a pause and never reads its answers: its own queue ends it, or its own socket holds it back."""
    host, first, program, data = sharing
    with _connect(host.socket) as deaf, _connect(host.socket) as slow:
        slow.sendall(_hello("d8")[:7])
        deaf.sendall(_hello("d9"))
        flood = AGENT_TO_BROKER.encode(wire.Attach(array("I", range(64)).tobytes())) * 100
        deaf.settimeout(5)  # the broker takes it up in turns, on a loaded machine in slow ones
        sent = 0
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            while sent < 64 * MIB:
                sent += deaf.send(flood)
        assert sent > 4 * MIB
        other = noise(MIB, 5)
        for domain in host.domains:
            domain.write("g.bin", other)
        program.open(first.root / "g.bin", "g")
        program.wait_shared(PAGES, "g")
        wait("the deaf one sent away", lambda: "d9" not in host.domain_states())
        # Its queue is bounded, and gone.
        assert host.running.memory() < 400 * MIB
    _still_well(host, program, data)


def test_connections_that_say_nothing(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    host, _, program, data = sharing
    before = host.running.descriptors()
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(_connect(host.socket))
        wait("strikes", lambda: len(host.events("peer.strike")) == 200 - 32)
        assert host.running.descriptors() <= before + 32
        _still_well(host, program, data)


# ------------------------------------------------------------------------------------------------------- consumers


def _open_with(sock: socket.socket, fds: list[int], handle: int = 1, length: int = PAGE) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(sock, [CONSUMER_TO_AGENT.encode(Open(handle, length))], fds)


def test_what_the_agent_must_not_be_sent(sharing: tuple[Host, Domain, Consumer, bytes], tmp_path: Path) -> None:
    host, domain, program, data = sharing
    path = domain.root / "f.bin"
    (tmp_path / "file").write_bytes(bytes(PAGE))
    os.mkfifo(tmp_path / "fifo")
    ours, theirs = socket.socketpair()
    not_files = {
        "folder": os.open(domain.root, os.O_RDONLY),
        "O_PATH": os.open(path, os.O_PATH),
        "write-only": os.open(tmp_path / "file", os.O_WRONLY),
        "fifo": os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK),
        "device": os.open("/dev/zero", os.O_RDONLY),
        "socket": ours.fileno(),
    }
    good = os.open(path, os.O_RDONLY)
    before = domain.running.descriptors()
    strikes = 0
    for what, fd in not_files.items():
        with _connect(domain.consumer_socket) as sock:
            # More of them behind the bad one: they are nobody's and must be closed.
            _open_with(sock, [fd])
            frames = b"".join(CONSUMER_TO_AGENT.encode(Open(n, MIB)) for n in range(2, 12))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(sock, [frames], [good] * 10)
            assert _hung_up(sock), what
        strikes += 1
        wait(f"a strike for {what}", lambda n: len(domain.running.events("consumer.refused")) == n, strikes)
        event = domain.running.events("consumer.refused")[-1]
        assert event["error.message"].startswith("a descriptor that does not give the right to read"), what
        assert event["sharearea.consumer_pid"] == os.getpid()
    raw: list[tuple[bytes, list[int]]] = [
        (random.Random(2).randbytes(5000), []),
        (struct.pack("<I", 1 << 31), []),
        (CONSUMER_TO_AGENT.encode(Open(1, MIB)), []),  # without its descriptor
        (CONSUMER_TO_AGENT.encode(Open(1, MIB)) * 2, [good, good]),  # the same handle twice
    ]
    for frames, fds in raw:
        with _connect(domain.consumer_socket) as sock:
            socket.send_fds(sock, [frames], fds)
            assert _hung_up(sock)
        strikes += 1
        wait("a strike", lambda n: len(domain.running.events("consumer.refused")) == n, strikes)
    # What names nothing is passed over.
    with _connect(domain.consumer_socket) as sock:
        for message in (Close(7), Mapped(7, 1, 5, 0), LetGo(7, 3), Mapped(7, 0, 0xFFFFFFFF, 1)):
            sock.sendall(CONSUMER_TO_AGENT.encode(message))
        _open_with(sock, [good], handle=3, length=MIB)
        # It was asked to map and says that it has, and that the bytes differ, for a generation that never was.
        assert sock.recv(4)
        sock.sendall(CONSUMER_TO_AGENT.encode(Mapped(3, 12345, 1, 1)))
        sock.sendall(CONSUMER_TO_AGENT.encode(LetGo(3, 12345)))
        wait("two programs", lambda: domain.status()["consumers"] == 2)
    wait("one program", lambda: domain.status()["consumers"] == 1)
    for fd in (*(fd for what, fd in not_files.items() if what != "socket"), good):
        os.close(fd)
    ours.close()
    theirs.close()
    wait("no descriptor left behind", lambda: domain.running.descriptors() <= before)
    assert not domain.running.events("file.mismatch")
    _still_well(host, program, data)


def _hung_up(sock: socket.socket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_file_under_a_write_lease_makes_nobody_wait(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    """Opening it would wait for up to the kernel's lease break time, and all consumers with it."""
    host, domain, program, data = sharing
    trap = host.folder / "trap"
    trap.write_bytes(bytes(PAGE))
    held = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(trap, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        with _connect(domain.consumer_socket) as sock:
            _open_with(sock, [fd])
            assert b"lease-refused" in sock.recv(65536)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, held)
    _still_well(host, program, data)


def test_the_status_sockets_take_no_nonsense(sharing: tuple[Host, Domain, Consumer, bytes]) -> None:
    host, domain, program, data = sharing
    for path in (host.status_socket, domain.control_socket):
        for question in (b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"verb": 7}\n', b'{"verb": "files", "start": -1}\n'):
            with _connect(path) as sock:
                sock.sendall(question)
                answer = b"".join(iter(lambda s=sock: s.recv(65536), b""))  # type: ignore[misc]
            assert json.loads(answer)["ok"] is False
        with _connect(path) as sock:
            _quietly_send(sock, b"x" * 200_000)
            _hung_up(sock)
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(_connect(path))
    wait("a broker that answers", host.status)
    wait("an agent that answers", domain.status)
    done = subprocess.run(
        [BIN / "sharearea", "status", "--socket", host.status_socket], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _still_well(host, program, data)

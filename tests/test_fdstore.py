"""The descriptor store against a small service manager that speaks the protocol, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharearea import fdstore
from sharearea.common.errors import HostError

# Keeps descriptors for its service, starts it again after each exit, and gives it what it keeps. Ends with the
# service's exit status when that is neither 0 nor killed by a signal, or after the last start.
SUPERVISOR = """
import array, os, socket, sys

address, starts, service = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(chr(0) + address[1:] if address.startswith("@") else address)
kept = []

def drain():
    manager.setblocking(False)
    while True:
        try:
            data, fds, flags, _ = socket.recv_fds(manager, 65536, 253)
        except BlockingIOError:
            return
        assert not flags & socket.MSG_CTRUNC
        lines = dict(line.split("=", 1) for line in data.decode().splitlines())
        name = lines.get("FDNAME", "stored")
        if lines.get("FDSTORE") == "1":
            for fd in fds:
                if any(os.path.samestat(os.fstat(fd), os.fstat(other)) for _, other in kept):
                    os.close(fd)
                else:
                    kept.append((name, fd))
        elif lines.get("FDSTOREREMOVE") == "1":
            for entry in [entry for entry in kept if entry[0] == name]:
                kept.remove(entry)
                os.close(entry[1])
        else:
            sys.stdout.write(data.decode() + chr(10))
            sys.stdout.flush()

for start in range(starts):
    pid = os.fork()
    if pid == 0:
        environment = {**os.environ, "NOTIFY_SOCKET": address, "FDSTORE": "64", "START": str(start)}
        if kept:
            copies = [os.dup2(fd, 200 + i) for i, (_, fd) in enumerate(kept)]
            for i, fd in enumerate(copies):
                os.dup2(fd, 3 + i)
            environment["LISTEN_PID"] = str(os.getpid())
            environment["LISTEN_FDS"] = str(len(kept))
            environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
        os.closerange(3 + len(kept), 1000)
        os.execve(service[0], service, environment)
    _, status = os.waitpid(pid, 0)
    drain()
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(os.WEXITSTATUS(status))
"""

SERVICE = """
import os, signal, sys
from sharearea import fdstore

assert fdstore.available()
start = int(os.environ["START"])
found = fdstore.inherited()
assert "LISTEN_FDS" not in os.environ
assert fdstore.inherited() == {}
assert not any(os.get_inheritable(fd) for fds in found.values() for fd in fds)
read = {name: [os.pread(fd, 100, 0).decode() for fd in fds] for name, fds in found.items()}
if start == 0:
    assert read == {}
    for name, text in (("area-1", "one"), ("area-1", "one more"), ("area-2", "two")):
        fd = os.memfd_create("segment")
        os.write(fd, text.encode())
        assert fdstore.store(name, fd)
        os.close(fd)
    assert fdstore.notify("READY=1")
elif start == 1:
    assert read == {"area-1": ["one", "one more"], "area-2": ["two"]}, read
    assert fdstore.store("area-1", found["area-1"][0])  # a second time: the manager sees that it has it
    os.kill(os.getpid(), signal.SIGKILL)
elif start == 2:
    assert read == {"area-1": ["one", "one more"], "area-2": ["two"]}, read
    assert fdstore.remove("area-1")
else:
    assert read == {"area-2": ["two"]}, read
    assert fdstore.notify("STATUS=done")
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        monkeypatch.delenv(name, raising=False)
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("abstract", [False, True])
def test_descriptors_outlive_the_service(tmp_path: Path, abstract: bool) -> None:
    address = f"@sharearea-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    service = [sys.executable, "-c", SERVICE]
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, address, "4", *service],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "READY=1\nSTATUS=done\n", done.stderr


def test_without_a_service_manager_nothing_happens() -> None:
    assert not fdstore.available()
    assert not fdstore.notify("READY=1")
    assert not fdstore.store("area", 0)
    assert not fdstore.remove("area")
    assert fdstore.inherited() == {}


@pytest.mark.parametrize(
    ("address", "keeps", "expected"),
    [
        ("/run/notify", None, True),
        ("/run/notify", "64", True),
        ("/run/notify", "0", False),
        ("@notify", None, True),
        ("@", None, False),
        ("vsock:2:1234", None, False),
        ("", None, False),
    ],
)
def test_available(monkeypatch: pytest.MonkeyPatch, address: str, keeps: str | None, expected: bool) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    if keeps is not None:
        monkeypatch.setenv("FDSTORE", keeps)
    assert fdstore.available() is expected


def test_a_service_manager_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with pytest.raises(HostError, match="cannot be told"):
        fdstore.notify("READY=1")


def test_many_descriptors_go_in_one_datagram(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        assert fdstore.notify("FDSTORE=1", [0] * fdstore.MAX_FDS)
        data, fds, _, _ = socket.recv_fds(manager, 100, fdstore.MAX_FDS)
        assert data == b"FDSTORE=1"
        assert len(fds) == fdstore.MAX_FDS
        for fd in fds:
            os.close(fd)
        with pytest.raises(ValueError, match="254"):
            fdstore.notify("FDSTORE=1", [0] * (fdstore.MAX_FDS + 1))


@pytest.mark.parametrize("name", ["", "a:b", "a\nFDSTOREREMOVE=1", "\x7f", "\u00e4rea", "x" * 256])
def test_names_that_the_protocol_cannot_carry(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        fdstore.store(name, 0)
    with pytest.raises(ValueError, match="cannot name"):
        fdstore.remove(name)


def test_descriptors_for_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert fdstore.inherited() == {}
    assert "LISTEN_FDS" not in os.environ


@pytest.mark.parametrize(
    ("count", "names"), [("x", ""), ("-1", ""), ("", ""), ("1", "a:b"), ("1000000", ""), ("2", "a")]
)
def test_announcements_that_cannot_be_meant(monkeypatch: pytest.MonkeyPatch, count: str, names: str) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_FDNAMES", names)
    inheritable = {fd: os.get_inheritable(int(fd)) for fd in ("0", "1", "2")}
    with pytest.raises(HostError):
        fdstore.inherited()
    assert inheritable == {fd: os.get_inheritable(int(fd)) for fd in ("0", "1", "2")}


def test_unnamed_descriptors_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import os\n"
        "from sharearea import fdstore\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "os.environ['LISTEN_FDS'] = '2'\n"
        "for fd in (3, 4): os.dup2(0, fd)\n"
        "assert fdstore.inherited() == {'unknown': [3, 4]}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    subprocess.run([sys.executable, "-c", script], check=True)

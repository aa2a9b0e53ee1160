"""The broker's socket: who may bind it, who connects, and what happens when there is no descriptor left."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharearea.common.errors import Closed, HostError
from sharearea.common.link import StreamLink
from sharearea.common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, Ping, Pong
from sharearea.model import Identity
from sharearea.transport.local import LocalListener


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.sock"


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


def test_a_peer_is_who_the_kernel_says(path: Path) -> None:
    with LocalListener(path) as listener:
        assert listener.accept() is None
        assert listener.lacking is None
        with StreamLink(
            connected(path), incoming=BROKER_TO_AGENT, outgoing=AGENT_TO_BROKER, max_queue_bytes=100
        ) as agent:
            assert select.select([listener], [], [], 10)[0]
            accepted = listener.accept()
            assert accepted is not None
            link, identity = accepted
            with link:
                assert identity == Identity("local", os.geteuid())
                assert not os.get_inheritable(link.fileno())
                link.send(Ping(1))
                assert link.flush()
                assert agent.receive() == [(Ping(1), None)]
                agent.send(Pong(1))
                assert agent.flush()
                assert link.receive() == [(Pong(1), None)]


_CONNECT = """
import os, socket, sys
os.setresgid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
os.setresuid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.recv(1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("uid", [4711, 2**32 - 3])
def test_a_peer_of_another_user_has_its_own_uid(tmp_path_factory: pytest.TempPathFactory, uid: int) -> None:
    folder = tmp_path_factory.mktemp("open")
    for parent in (folder, *folder.parents):
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    with LocalListener(folder / "s") as listener:
        child = subprocess.Popen([sys.executable, "-c", _CONNECT, str(folder / "s"), str(uid)])
        assert select.select([listener], [], [], 30)[0]
        accepted = listener.accept()
        assert accepted is not None
        accepted[0].close()
        assert accepted[1] == Identity("local", uid)
        assert child.wait() == 0


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_the_mode_is_what_was_asked_for_whatever_the_umask(path: Path, mode: int) -> None:
    old = os.umask(0o027)
    try:
        with LocalListener(path, mode):
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(old)


def test_a_live_broker_is_left_alone(path: Path) -> None:
    with LocalListener(path) as listener:
        with pytest.raises(HostError, match="running already") as raised:
            LocalListener(path)
        assert raised.value.hint
        with connected(path):
            accepted = listener.accept()
            assert accepted is not None
            accepted[0].close()


def test_anybody_who_answers_is_left_alone(path: Path) -> None:
    """A socket without our lock: another program's, or a broker whose lock file was removed."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        with pytest.raises(HostError, match="running already"):
            LocalListener(path)
        # The question itself has filled its backlog, which is an answer too.
        with socket.socket(socket.AF_UNIX) as one_more:
            one_more.setblocking(False)
            with pytest.raises(BlockingIOError):
                one_more.connect(str(path))
        with pytest.raises(HostError, match="running already"):
            LocalListener(path)
        assert path.exists()


def test_a_broker_that_is_just_starting_is_left_alone(path: Path) -> None:
    """It holds the lock and does not listen yet: nobody would answer on the socket of its dead predecessor."""
    LocalListener(path).close()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with path.with_name(path.name + ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(HostError, match="running already"):
            LocalListener(path)
        assert path.exists()
    with LocalListener(path), connected(path):
        pass


_LISTEN = """
import sys
import tempfile
from pathlib import Path
from sharearea.transport.local import LocalListener
listener = LocalListener(Path(sys.argv[1]))
sys.stdout.write("listening\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_the_socket_of_a_killed_broker_is_replaced(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", _LISTEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"listening\n"
        with pytest.raises(HostError, match="running already"):
            LocalListener(path)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.exists()
    with LocalListener(path), connected(path):
        pass
    assert not path.exists()


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(HostError, match="no socket"):
        LocalListener(path)
    assert path.read_text() == "precious"


def test_close_leaves_a_file_that_is_not_ours(path: Path) -> None:
    listener = LocalListener(path)
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    listener.close()
    assert path.read_text() == "somebody else's"
    with pytest.raises(Closed):
        listener.accept()
    with pytest.raises(Closed):
        listener.fileno()


def test_a_place_that_cannot_be_is_an_error_with_a_hint(tmp_path: Path) -> None:
    for bad in (tmp_path / "missing" / "s", tmp_path / ("x" * 120)):
        with pytest.raises(HostError) as raised:
            LocalListener(bad)
        assert raised.value.hint


def test_a_second_listener_may_follow_the_first(path: Path) -> None:
    for _ in range(2):
        with LocalListener(path), connected(path):
            pass
    assert not path.exists()


def test_no_descriptor_left_is_said_and_passes(path: Path) -> None:
    with LocalListener(path) as listener, connected(path):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            assert listener.accept() is None
            assert listener.lacking == "Too many open files"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        accepted = listener.accept()
        assert accepted is not None
        assert listener.lacking is None
        accepted[0].close()


def test_a_peer_that_is_gone_before_it_was_taken(path: Path) -> None:
    with LocalListener(path) as listener:
        connected(path).close()
        accepted = listener.accept()
        assert accepted is not None  # its end is for the link to tell
        accepted[0].close()
        assert listener.accept() is None

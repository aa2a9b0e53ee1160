"""Area, store, disk and descriptors come to an end: one clear event, and everything else goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import MIB, PAGE, Consumer, Domain, Host, digest, noise, unchecked, wait

PAGES = MIB // PAGE


def _pair(host: Host, **more: object) -> tuple[Domain, Consumer, bytes]:
    """Give a domain whose program shares a file with another domain and checks it all the time."""
    data = noise(MIB, 1)
    first, _ = host.add_domains(2, {"f.bin": data}, **more)
    host.wait_offered(1)
    program = first.program()
    program.open(first.root / "f.bin")
    program.wait_shared(PAGES)
    program.ask("check_hashes", name="all", want={"f": digest(data)})
    return first, program, data


def _went_on(program: Consumer) -> None:
    report = program.ask("stop", name="all")
    assert report["faults"] == []
    assert report["least_shared"] == PAGES


def _third(host: Host, data: bytes) -> None:
    """Have a third domain connect and share."""
    late = host.add_domain()
    late.write("f.bin", data)
    late.start()
    host.wait_offered(1, late)
    program = late.program()
    program.open(late.root / "f.bin")
    program.wait_shared(PAGES)
    assert program.ask("hash", name="f") == digest(data)


def test_area_full(host: Host) -> None:
    host.configure(pool={"max_area_bytes": "8 MiB"})
    host.start_broker()
    first, program, data = _pair(host)
    large = noise(12 * MIB, 2)
    for domain in host.domains:
        domain.write("large.bin", large)
    [event] = wait("the event", lambda: host.events("pool.paused"))
    assert event["event.reason"] == "area-full"
    assert "limit" in event["error.message"]
    assert host.pool()["paused"] == "area-full"
    assert host.pool()["area_bytes"] <= 8 * MIB
    # What fitted is shared, the rest is the plain file.
    wait("part of the large file published", lambda: host.pool()["pages_published"] > PAGES)
    other = first.program()
    other.open(first.root / "large.bin", "large")
    wait("part of the large file shared", lambda: 0 < other.pages("large") < 12 * PAGES)
    assert other.ask("hash", name="large") == digest(large)
    _third(host, data)
    assert len(host.events("pool.paused")) == 1
    _went_on(program)


SMALL_STORE = """
import dataclasses, sys
from sharearea.broker import Broker
from sharearea.common.logs import EventLog
from sharearea.config import BrokerConfig
config = dataclasses.replace(BrokerConfig.load(sys.argv[1]), store_max_bytes=int(sys.argv[2]))
broker = Broker(config, EventLog("sharearea"))
try:
    broker.open()
    broker.run()
finally:
    broker.close()
"""


class _SmallStore(Host):
    """A host whose broker has a store that is smaller than the configuration allows."""

    @property
    def broker_command(self) -> list[str | os.PathLike[str]]:
        """The same broker, in its own process."""
        return [sys.executable, "-c", SMALL_STORE, self.config, str(256 * 1024)]


def test_store_full(disk_path: Path) -> None:
    host = _SmallStore(disk_path)
    try:
        host.start_broker()
        _, program, data = _pair(host)
        large = noise(40 * MIB, 2)
        for domain in host.domains:
            domain.write("large.bin", large)
        [event] = wait("the event", lambda: host.events("pool.paused"))
        assert event["event.reason"] == "store-full"
        assert host.pool()["paused"] == "store-full"
        _went_on(program)
        assert host.running.alive
        # Going away needs no room.
        program.quit()
        wait("no owner", lambda: host.domain_states()["d1"]["owned_pages"] == 0)
        for domain in host.domains:
            (domain.root / "large.bin").unlink()
        wait("the large file forgotten", lambda: len(host.files()) == 2)
        again = host.domains[0].program()
        again.open(host.domains[0].root / "f.bin")
        assert again.ask("hash", name="f") == digest(data)
        assert not host.events("store.set_aside")
    finally:
        host.close()


@pytest.fixture
def small_disk(disk_path: Path) -> Iterator[Path]:
    """Give a file system of half a MiB."""
    place = disk_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_disk_of_the_store_full(small_disk: Path, host: Host) -> None:
    host.configure({"state_dir": str(small_disk / "state")})
    host.start_broker()
    _, program, data = _pair(host)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    large = noise(8 * MIB, 2)
    for domain in host.domains:
        domain.write("large.bin", large)
    [event] = wait("the event", lambda: host.events("pool.paused"))
    assert event["event.reason"] == "store-full"
    assert "full" in event["error.message"]
    # A domain can still join; it gets no grant that could not be recorded, and reads its own file.
    late = host.add_domain()
    late.write("f.bin", data)
    late.start()
    host.wait_offered(1, late)
    guest = late.program()
    guest.open(late.root / "f.bin")
    assert guest.ask("hash", name="f") == digest(data)
    _went_on(program)
    # With room again, another broker begins where it has to, and nothing was damaged.
    filler.unlink()
    assert host.running.end() == 0
    host.start_broker()
    assert not host.events("store.set_aside")
    for reader in (program, guest):
        assert reader.ask("hash", name="f") == digest(data)
        reader.wait_shared(PAGES)


def test_descriptors_of_the_broker(host: Host) -> None:
    host.start_broker()
    _, program, data = _pair(host)
    most = host.running.descriptors() + 4
    hard = resource.prlimit(host.running.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(host.running.pid, resource.RLIMIT_NOFILE, (most, hard))
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(os.fspath(host.socket))
        wait("the event", lambda: host.events("broker.limit"))
        # While it lasts the operator's questions are hung up on, and nothing spins.
        used = _cpu_seconds(host.running.pid)
        begun = time.monotonic()
        wait("many questions", lambda: [unchecked(host.status) for _ in range(50)])
        wait("two more tries to accept", lambda: time.monotonic() > begun + 2.2)
        assert _cpu_seconds(host.running.pid) - used < 1.0
        assert len(host.events("broker.limit")) == 1
    wait("a broker that answers", host.status)
    _third(host, data)
    _went_on(program)
    assert len(host.events("broker.limit")) == 1


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_descriptors_of_the_agent(host: Host) -> None:
    files = {f"n{n:03}.bin": noise(2 * PAGE, n) for n in range(150)}
    host.start_broker()
    first, second = host.add_domain(), host.add_domain()
    for domain in (first, second):
        for name, data in files.items():
            domain.write(name, data)
    # 192 are for the agent itself, 256 for descriptors that arrive; 64 remain: a file and a lease for each mapping.
    first.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)))
    second.start()
    host.wait_offered(len(files))
    program = first.program()
    for name in files:
        program.open(first.root / name, name)
    host.wait_warm("as many files attached as there is room for", lambda: first.status()["attached_files"] >= 30)
    state = program.ask("state")
    plain = [name for name, file in state.items() if not file["pages"]]
    assert {state[name]["reason"] for name in plain} == {"agent-limit"}
    assert 30 <= len(files) - len(plain) <= 33
    assert len(first.running.events("agent.limit")) == 1
    for name, data in files.items():
        assert program.ask("hash", name=name) == digest(data)
    # With some closed, others find room.
    for name in list(files)[:40]:
        program.ask("close", name=name)
    late = first.program()
    wait("room", lambda: first.status()["leases"] <= 24)
    late.open(first.root / plain[-1])
    late.wait_shared(2)
    assert first.running.alive


def test_descriptors_of_a_program(host: Host) -> None:
    host.start_broker()
    files = {f"n{n}.bin": noise(4 * PAGE, n) for n in range(40)}
    first, _ = host.add_domains(2, files)
    host.wait_offered(len(files))
    program = first.program(files=60)
    opened = []
    for name in files:
        with contextlib.suppress(OSError):
            program.open(first.root / name, name)
            opened.append(name)
    assert 10 < len(opened) < 40
    for name in opened:
        assert program.ask("hash", name=name) == digest(files[name])
    for name in opened[2:]:
        program.ask("close", name=name)
    # What could not be asked for then can be now.
    program.open(first.root / "n39.bin", "late")
    program.wait_shared(4, "late")
    assert program.ask("hash", name="late") == digest(files["n39.bin"])
    # No descriptor at all when the agent is looked for.
    second = first.program(files=60)
    second.ask("occupy", count=1000)
    with pytest.raises(OSError, match="Too many open files"):
        second.open(first.root / "n1.bin")
    second.ask("release")
    second.open(first.root / "n1.bin")
    second.wait_shared(4)

"""An unchanged program under stress (stress.c) while its files are rewritten, replaced and truncated, and agent and
broker killed: every byte that it reads is what its file held.

Two minutes; SHAREAREA_STRESS_S=3600 for an hour (with `-rP -o faulthandler_timeout=0`: what it did is shown, and not
where it is after five minutes), SHAREAREA_STRESS_SEED for other chances.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import PAGE, Domain, Host, Process, unchecked, wait

SECONDS = float(os.environ.get("SHAREAREA_STRESS_S", "120"))
SEED = int(os.environ.get("SHAREAREA_STRESS_SEED", "1"))
PAGES = 64
# Longer than any pause of a loaded machine: a program that is cut off may read old bytes, which is not the point here.
PATIENCE = "30 s"


def _content(generation: int) -> bytes:
    """Return what all words of a file are in a generation: that and the number of their page."""
    return b"".join(struct.pack("Q", generation << 20 | page) * (PAGE // 8) for page in range(PAGES))


class Changing:
    """A file that has the same bytes in both domains, and counters in the way of harness.Stamped."""

    def __init__(self, name: str, domains: list[Domain], change: Callable[[Path, bytes], None]) -> None:
        self.name = name
        self.generation = 1
        self.paths = [domain.write(name, _content(1)) for domain in domains]
        self.counters = domains[0].host.folder / f"{name}.counters"
        self.counters.write_bytes(struct.pack("QQ", 1, 1))
        self.change = change
        self.changes = 0

    def next(self) -> None:
        """Bring another generation, in all domains."""
        self.generation += 1
        data = _content(self.generation)
        self._say(0)
        for path in self.paths:
            self.change(path, data)
        self._say(8)
        self.changes += 1

    def _say(self, at: int) -> None:
        with self.counters.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(struct.pack("Q", self.generation))


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    for at in range(0, len(data), PAGE * 7):
        os.pwrite(fd, data[at : at + PAGE * 7], at)
    os.close(fd)


def _map_write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, len(data)) as mapped:
        os.close(fd)
        mapped[:] = data


def _truncate(path: Path, data: bytes) -> None:
    """Rewrite the first half; cut the second off and bring it back. The program maps the first half only."""
    half = len(data) // 2
    os.truncate(path, half)
    _write(path, data)


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    fresh.rename(path)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the program."""
    program = tmp_path_factory.mktemp("stress") / "stress"
    source = Path(__file__).with_name("stress.c")
    flags = ["-std=c17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["cc", *flags, "-o", program, source], check=True)
    return program


def test_no_byte_is_wrong_whatever_happens(host: Host, stress: Path) -> None:
    host.start_broker()
    domains = [host.add_domain(lease_timeout=PATIENCE) for _ in range(2)]
    files = {
        "w.bin": Changing("w.bin", domains, _write),
        "m.bin": Changing("m.bin", domains, _map_write),
        "t.bin": Changing("t.bin", domains, _truncate),
        "r.bin": Changing("r.bin", domains, _replace),
        "s.bin": Changing("s.bin", domains, _write),  # seldom: shared most of the time
    }
    words = [
        f"{'r' if name == 'r.bin' else 'w'}:{PAGES // 2 if name == 't.bin' else PAGES}:{file.paths[0]}:{file.counters}"
        for name, file in files.items()
    ]
    for domain in domains:
        domain.start()
    host.wait_offered(1)
    programs = []
    for number in range(2):
        command = ["nice", *domains[0].shim, stress, str(SEED + number), "2", *words]
        log = host.folder / f"stress-{number}.log"
        programs.append(host.add(Process("stress", command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)))
    stop = threading.Event()
    errors: list[BaseException] = []
    writer = threading.Thread(target=_change, args=(files, stop, errors))
    writer.start()
    try:
        most = _disturb(host, domains, programs, errors)
    finally:
        stop.set()
        writer.join()
    assert not errors
    for program in programs:
        assert program.popen.stdin is not None
        assert program.popen.stdout is not None
        program.popen.stdin.close()
        said = json.loads(program.popen.stdout.read() or "{}")
        sys.stdout.write(json.dumps(said) + "\n")
        assert program.popen.wait(60) == 0, program.log.read_text()
        assert said["wrong"] == 0
        assert min(count for name, count in said.items() if name != "wrong") > 0, said
    changes = {name: file.changes for name, file in files.items()}
    sys.stdout.write(json.dumps({"most_attached_bytes": most, "changes": changes}) + "\n")
    assert all(file.changes for file in files.values())
    assert most > 0, "nothing was ever shared"
    assert not domains[0].running.events("consumer.hung")
    assert not domains[0].running.events("file.mismatch")


def _change(files: dict[str, Changing], stop: threading.Event, errors: list[BaseException]) -> None:
    rng = random.Random(SEED)
    often = [file for name, file in files.items() if name != "s.bin"]
    try:
        while not stop.wait(rng.uniform(0.0, 1.5)):
            for file in rng.sample(often, rng.randrange(1, len(often))):
                file.next()
            if rng.random() < 0.1:
                files["s.bin"].next()
            os.sync()
    except BaseException as error:  # the test's own thread says so
        errors.append(error)


def _disturb(host: Host, domains: list[Domain], programs: list[Process], errors: list[BaseException]) -> int:
    """Kill the agent and the broker now and then. Returns the most bytes that were seen attached at a time."""
    end = time.monotonic() + SECONDS
    quiet = min(15.0, SECONDS / 5)
    disturb_at = time.monotonic() + quiet
    kill_agent = True
    most = 0
    while time.monotonic() < end:
        assert not errors
        for program in programs:
            assert program.alive, f"ended with {program.popen.returncode}: {program.log.read_text()}"
        answer = unchecked(lambda: domains[0].ask("ps")) or {"programs": []}
        pids = {program.pid for program in programs}
        most = max(most, sum(p["attached_bytes"] for p in answer["programs"] if p["pid"] in pids))
        if time.monotonic() >= disturb_at:
            disturb_at = time.monotonic() + quiet
            victim = domains[0].running if kill_agent else host.running
            victim.kill()
            if kill_agent:
                domains[0].start()
            else:
                host.start_broker()
            kill_agent = not kill_agent
        for domain in domains:
            with contextlib.suppress(OSError):
                domain.use()
        time.sleep(0.2)
    wait("an agent that answers", lambda: domains[0].status())
    return most

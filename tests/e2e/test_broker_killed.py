"""The broker is killed with -9 again and again, at every stage of its work. No program may notice in what it reads."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from .harness import MIB, PAGE, Consumer, Host, digest, noise, wait

FILES = 6
SIZE = 4 * MIB
PAGES = FILES * SIZE // PAGE
KILLS = 15

Moment = Callable[[Host], Any]


def _reporting(host: Host) -> bool:
    return any(state.get("files") or state.get("reports_under_way") for state in host.domain_states().values())


MOMENTS: dict[str, Moment] = {
    "just started": lambda host: host.status(),
    "reporting": _reporting,
    "publishing": lambda host: 0 < host.pool().get("pages_published", 0) < PAGES,
    "attaching": lambda host: host.pool().get("pages_sharing", 0) > 0,
    "steady": lambda host: host.pool().get("pages_sharing") == 2 * PAGES,
}


def _programs(host: Host, files: dict[str, bytes]) -> list[Consumer]:
    """Open every file in every domain, and have each read over and over."""
    programs = [domain.program() for domain in host.domains]
    for program in programs:
        for name in files:
            program.open(program.domain.root / name, name)
        _check(program, files)
    return programs


def _check(program: Consumer, files: dict[str, bytes]) -> None:
    program.ask("check_hashes", name="all", want={name: digest(data) for name, data in files.items()})


def _stop(programs: list[Consumer]) -> list[dict[str, Any]]:
    reports = [program.ask("stop", name="all") for program in programs]
    assert [report["faults"] for report in reports] == [[]] * len(reports)
    assert all(report["rounds"] for report in reports)
    return reports


def _wait_all_shared(host: Host, programs: list[Consumer]) -> None:
    for program in programs:
        wait(
            f"everything shared in {program.name}",
            lambda p: sum(file["pages"] for file in p.ask("state").values()) == PAGES,
            program,
        )
    host.wait_pages("pages_sharing", 2 * PAGES)


def _kill_at(host: Host, moment: str, rng: random.Random, kill: Callable[[], None]) -> str:
    """Kill the broker at a moment, or a little later; return when it was."""
    if moment == "random":
        delay = rng.uniform(0, 1.5)
        end = time.monotonic() + delay
        wait("a random moment", lambda: time.monotonic() >= end)
        moment = f"after {delay:.2f} s"
    else:
        wait(f"the moment {moment}", lambda: MOMENTS[moment](host))
    pool = host.pool()
    kill()
    return f"{moment}: {pool.get('pages_published')} published, {pool.get('pages_sharing')} sharing"


@pytest.mark.parametrize("seed", [1])
def test_without_descriptor_store_domains_start_again(host: Host, seed: int) -> None:
    rng = random.Random(seed)
    files = {f"f{n}.bin": noise(SIZE, n) for n in range(FILES)}
    host.start_broker()
    host.add_domains(2, files)
    programs = _programs(host, files)
    moments = [*MOMENTS, *MOMENTS, *["random"] * (KILLS - 2 * len(MOMENTS))]
    rng.shuffle(moments)
    killed = []
    for moment in moments:
        killed.append(_kill_at(host, moment, rng, host.running.kill))
        host.start_broker()
    _wait_all_shared(host, programs)
    reports = _stop(programs)
    assert all(report["shared_rounds"] for report in reports), killed
    assert len(killed) == KILLS
    # Nothing is left of the areas that are gone, in no program and in no agent.
    segments = host.pool()["segments"]
    for program in programs:
        wait("only the last area's segments", lambda p: _segments(p.pid) == segments, program)
        assert all(program.ask("hash", name=name) == digest(data) for name, data in files.items())
    for domain in host.domains:
        wait("only the last area's segments", lambda d: _segments(d.running.pid) == segments, domain)
    assert all(domain.running.alive for domain in host.domains)


def _segments(pid: int) -> int:
    """Count the different area segments that a process holds, open or mapped."""
    with open(f"/proc/{pid}/maps") as maps:
        found = {line.split()[4] for line in maps if "memfd:sharearea" in line}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if "memfd:sharearea" in os.readlink(f"/proc/{pid}/fd/{fd}"):
                found.add(str(os.stat(f"/proc/{pid}/fd/{fd}").st_ino))
    return len(found)


def test_with_descriptor_store_programs_notice_nothing(host: Host) -> None:
    rng = random.Random(7)
    files = {f"f{n}.bin": noise(SIZE, n) for n in range(FILES)}
    host.configure({"grace": "10 s"})
    host.start_supervised_broker()
    host.add_domains(2, files)
    host.wait_pages("pages_published", PAGES)
    programs = _programs(host, files)
    _wait_all_shared(host, programs)
    for program in programs:
        program.ask("stop", name="all")
        _check(program, files)
    identity = {name: state["owned_pages"] for name, state in host.domain_states().items()}
    for _ in range(5):
        pid = host.supervised_pid()
        moment = rng.choice(["just started", "steady", "random", "reporting"])
        _kill_at(host, moment, rng, partial(os.kill, pid, signal.SIGKILL))
        wait("another broker", lambda p: host.supervised_pid() != p, pid)
        host.wait_broker()
        # The area is there with its owners before anybody is served.
        pool = host.pool()
        assert (pool["pages_published"], pool["pages_sharing"]) == (PAGES, 2 * PAGES)
    wait(
        "both domains connected",
        lambda: [state["state"] for state in host.domain_states().values()] == ["connected"] * 2,
    )
    assert {name: state["owned_pages"] for name, state in host.domain_states().items()} == identity
    host.wait_warm("all files reported", lambda: host.pool()["files"] == 2 * FILES)
    reports = _stop(programs)
    assert {report["least_shared"] for report in reports} == {PAGES}
    assert not host.events("pages.revoked")
    adopted = host.events("area.adopted")
    assert [event["sharearea.owners"] for event in adopted] == [2 * FILES] * len(adopted)
    assert len(adopted) >= 5

    # New pages go into a new segment, since nobody can write the adopted ones any more; owners leave as before.
    more = noise(MIB, 99)
    for domain in host.domains:
        domain.write("more.bin", more)
    host.wait_pages("pages_published", PAGES + MIB // PAGE)
    for program in programs:
        program.open(program.domain.root / "more.bin", "more")
        program.wait_shared(MIB // PAGE, "more")
        assert program.ask("hash", name="more") == digest(more)
        program.quit()
    host.wait_pages("pages_sharing", 0)


def test_agents_that_never_come_back_lose_their_grants(host: Host) -> None:
    """Both die in turn: the broker's owners are of an agent that no broker sees again."""
    data = noise(MIB, 1)
    host.configure({"grace": "2 s"})
    host.start_supervised_broker()
    first, second = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    programs = [domain.program() for domain in host.domains]
    for program in programs:
        program.open(program.domain.root / "f.bin")
        program.wait_shared(MIB // PAGE)
    pid = host.supervised_pid()
    first.running.kill()
    os.kill(pid, signal.SIGKILL)
    wait("another broker", lambda: host.supervised_pid() != pid)
    host.wait_broker()
    assert host.domain_states()[first.name]["owned_files"] == 1
    programs[0].wait_shared(0)
    assert programs[0].ask("hash", name="f") == digest(data)
    wait("the grants of the dead agent ended", lambda: first.name not in host.domain_states())
    assert host.domain_states()[second.name]["owned_pages"] == MIB // PAGE
    assert programs[1].pages() == MIB // PAGE
    first.start()
    programs[0].wait_shared(MIB // PAGE)

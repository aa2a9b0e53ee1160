"""Agents and programs that die, stop, fork, hang, are told to let go; and many programs at one file."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from .harness import MIB, PAGE, Consumer, Domain, Host, Stamped, digest, noise, wait

PAGES = MIB // PAGE


def _attached(host: Host, programs: int = 1, **keys: object) -> tuple[Domain, list[Consumer], bytes]:
    """Give a domain whose programs share one file with another domain."""
    data = noise(MIB, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data}, **keys)
    host.wait_offered(1)
    made = [first.program() for _ in range(programs)]
    for program in made:
        program.open(first.root / "f.bin")
    for program in made:
        program.wait_shared(PAGES)
    return first, made, data


def test_agent_killed(host: Host) -> None:
    domain, programs, data = _attached(host, programs=3)
    for program in programs:
        program.ask("check_hashes", name="all", want={"f": digest(data)})
    for _ in range(2):
        domain.running.kill()
        for program in programs:
            program.wait_shared(0)
            assert program.ask("state")["f"]["reason"] == "no-agent"
            assert program.ask("hash", name="f") == digest(data)
        wait("the broker released its owners", lambda: domain.name not in host.domain_states())
        host.wait_pages("pages_sharing", 0)
        domain.start()
        for program in programs:
            program.wait_shared(PAGES)
        wait("one owner again", lambda: host.domain_states()[domain.name]["owned_pages"] == PAGES)
    for program in programs:
        report = program.ask("stop", name="all")
        assert report["faults"] == []
        assert report["shared_rounds"]
    released = wait("releases in the log", lambda: host.events("pages.revoked"))
    assert {event["sharearea.domain"] for event in released} == {domain.name}


def test_agent_comes_back_within_the_grace_time(host: Host) -> None:
    """A new agent knows nothing of the old one's files: what it does not use is released when it joins."""
    host.configure({"grace": "1 h"})
    domain, [program], data = _attached(host)
    domain.running.kill()
    program.wait_shared(0)
    assert host.domain_states()[domain.name]["state"] == "absent"
    assert host.domain_states()[domain.name]["owned_pages"] == PAGES
    # What is read goes into the page cache again, which is where the new agent finds it.
    assert program.ask("hash", name="f") == digest(data)
    domain.start()
    program.wait_shared(PAGES)
    assert program.ask("hash", name="f") == digest(data)
    program.quit()
    wait("no owner", lambda: host.domain_states()[domain.name]["owned_pages"] == 0)
    host.wait_pages("pages_sharing", 0)


def test_no_writer_gets_in_while_a_program_has_not_heard_of_its_agents_death(host: Host) -> None:
    domain, [program], data = _attached(host)
    path = domain.root / "f.bin"
    program.stop()
    domain.running.kill()
    # The lease is the program's own: it is still there, and with it the shared pages under the mapping.
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    program.send(signal.SIGCONT)
    fd = os.open(path, os.O_WRONLY)  # waits until the program is back on the plain file
    os.pwrite(fd, bytes(len(data)), 0)
    os.close(fd)
    assert program.ask("hash", name="f") == digest(bytes(len(data)))
    assert program.pages() == 0


def test_agent_stopped_by_sigterm(host: Host) -> None:
    domain, [program], data = _attached(host)
    sockets = (domain.control_socket, domain.consumer_socket)
    assert domain.running.end() == 0
    assert not any(path.exists() for path in sockets)
    # Its leases ended with it, so nobody may map a shared page any more, not even for a moment.
    assert program.pages() == 0
    assert program.ask("hash", name="f") == digest(data)
    [stopped] = domain.running.events("agent.stopped")
    assert stopped["sharearea.log_lines_dropped"] == 0


def test_agent_does_not_end_before_its_programs_let_go(host: Host) -> None:
    domain, [program], _ = _attached(host, lease_timeout="30 s")
    program.stop()
    domain.running.send(signal.SIGTERM)
    wait("the agent ending", lambda: domain.status().get("detached") is True)
    assert domain.status()["leases"] == 1
    program.send(signal.SIGCONT)
    assert domain.running.popen.wait(30) == 0
    assert program.pages() == 0
    assert not domain.running.events("consumer.hung")


def test_broker_stopped_by_sigterm(host: Host) -> None:
    _, [program], data = _attached(host)
    assert host.running.end() == 0
    assert not host.socket.exists()
    assert not host.status_socket.exists()
    assert len(host.events("broker.stopped")) == 1
    # Sealed memory outlives the broker, and so do the leases on the files.
    assert program.pages() == PAGES
    assert program.ask("hash", name="f") == digest(data)


def test_detach_and_reattach(host: Host) -> None:
    domain, programs, data = _attached(host, programs=2)
    other = domain.write("g.bin", noise(MIB, 2))
    host.domains[1].write("g.bin", noise(MIB, 2))
    programs[0].open(other, "g")
    programs[0].wait_shared(PAGES, "g")
    programs[0].ask("check_hashes", name="all", want={"f": digest(data), "g": digest(noise(MIB, 2))})

    done = domain.command("detach", str(domain.root / "f.bin"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1 files go back to plain; `sharearea-agent reattach` ends this\n"
    for program in programs:
        program.wait_shared(0)
        assert program.ask("hash", name="f") == digest(data)
    assert programs[0].pages("g") == PAGES
    late = domain.program()
    assert late.open(domain.root / "f.bin")["reason"] == "detached"

    done = domain.command("detach", "--all")
    assert done.returncode == 0
    programs[0].wait_shared(0, "g")
    wait("no owner", lambda: host.domain_states()[domain.name]["owned_pages"] == 0)
    assert domain.status()["leases"] == 0

    done = domain.command("reattach")
    assert (done.returncode, done.stdout) == (0, "programs may share again\n")
    programs[0].wait_shared(PAGES, "g")
    for program in (*programs, late):
        program.wait_shared(PAGES)
    assert programs[0].ask("stop", name="all")["faults"] == []

    for words, code, text in (
        (("detach", "/no/such/file"), 2, "is not inside"),
        (("detach", str(domain.root / "nothing")), 2, "is not a file that this agent reports"),
        (("detach",), 2, "one of the arguments PATH --all is required"),
    ):
        done = domain.command(*words)
        assert done.returncode == code, done.stderr
        assert text in done.stderr


def test_thirty_programs_at_one_file(host: Host) -> None:
    host.start_broker()
    first, second = host.add_domain(), host.add_domain()
    stamped = Stamped(first, "f.bin", 64)
    second.write("f.bin", stamped.content())
    first.start()
    second.start()
    host.wait_offered(1)
    programs = [first.program() for _ in range(30)]
    for program in programs:
        program.tell("open", name="f", path=os.fsencode(stamped.path).hex())
    for program in programs:
        program.answer()
        program.ask("check_stamps", name="f", counters=str(stamped.counters), pages=64)
    for program in programs:
        program.wait_shared(64)
    assert host.domain_states()[first.name]["owned_pages"] == 64
    assert first.status()["attached_pages"] == 30 * 64
    assert first.status()["leases"] == 1
    with stamped.writing() as data:
        stamped.path.open("r+b").close()
        fd = os.open(stamped.path, os.O_WRONLY)
        os.pwrite(fd, data, 0)
        os.close(fd)
    for program in programs:
        assert program.ask("hash", name="f") == digest(data)
    for program in programs[:10]:
        program.kill()
    for program in programs[10:]:
        assert program.ask("stop", name="f")["faults"] == []
    wait("ten programs gone", lambda: first.status()["consumers"] == 20)


def test_programs_killed_while_they_attach(host: Host) -> None:
    domain, [witness], _ = _attached(host)
    for _ in range(3):
        programs = [domain.program() for _ in range(5)]
        for program in programs:
            program.tell("open", name="f", path=os.fsencode(domain.root / "f.bin").hex())
        wait("one of them known to the agent", lambda: domain.status()["consumers"] > 1)
        for program in programs:
            program.kill()
    wait("only the witness left", lambda: domain.status()["consumers"] == 1)
    assert witness.pages() == PAGES
    witness.quit()
    wait("no owner", lambda: host.domain_states()[domain.name]["owned_pages"] == 0)
    wait("no lease", lambda: domain.status()["leases"] == 0)


def test_forked_child_is_on_the_plain_file(host: Host) -> None:
    domain, [program], _ = _attached(host)
    child = program.ask("fork", name="f")
    assert child == {"pages": 0, "reason": "forked"}
    assert program.pages() == PAGES
    now = noise(MIB, 5)
    fd = os.open(domain.root / "f.bin", os.O_WRONLY)
    os.pwrite(fd, now, 0)
    os.close(fd)
    assert program.ask("child") == digest(now)
    assert program.ask("hash", name="f") == digest(now)
    host.domains[1].write("g.bin", now)
    os.sync()
    program.wait_shared(PAGES)


@pytest.fixture
def lease_break_time() -> int:
    """Give the time after which the kernel lets a writer in by force."""
    return int(Path("/proc/sys/fs/lease-break-time").read_text())


def test_hung_program_holds_a_writer_for_a_bounded_time(host: Host, lease_break_time: int) -> None:
    timeout = 2
    assert timeout < lease_break_time
    domain, [hung, well], _ = _attached(host, programs=2, lease_timeout=f"{timeout} s")
    hung.stop()
    now = noise(MIB, 5)
    written = threading.Event()

    def write() -> None:
        fd = os.open(domain.root / "f.bin", os.O_WRONLY)
        os.pwrite(fd, now, 0)
        os.close(fd)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    well.wait_shared(0)
    assert written.wait(lease_break_time - 10), "the writer waits for the kernel's own limit"
    writer.join()
    [event] = wait("an event", lambda: domain.running.events("consumer.hung"))
    assert event["sharearea.consumers"] == [f"pid {hung.pid} uid {os.getuid()}"]
    assert event["file.path"] == "/f.bin"
    assert well.ask("hash", name="f") == digest(now)
    hung.send(signal.SIGCONT)
    hung.wait_shared(0)
    assert hung.ask("hash", name="f") == digest(now)
    # It was cut off, connects again, and shares like everybody else.
    host.domains[1].write("g.bin", now)
    os.sync()
    for program in (hung, well):
        program.wait_shared(PAGES)


def test_stopped_program_does_not_hang_others_in_the_domain(host: Host) -> None:
    domain, [stopped], data = _attached(host)
    stopped.stop()
    other = noise(MIB, 7)
    for member in host.domains:
        member.write("g.bin", other)
    program = domain.program()
    program.open(domain.root / "g.bin", "g")
    program.wait_shared(PAGES, "g")
    assert program.ask("hash", name="g") == digest(other)
    stopped.send(signal.SIGCONT)
    assert stopped.ask("hash", name="f") == digest(data)


def test_program_with_many_descriptors_comes_back(host: Host) -> None:
    """A socket whose number is beyond 1023 is one like any other."""
    domain, [program], data = _attached(host)
    assert program.ask("occupy", count=1200) == 1200
    domain.running.kill()
    program.wait_shared(0)
    assert program.ask("hash", name="f") == digest(data)
    domain.start()
    program.wait_shared(PAGES)
    assert program.ask("hash", name="f") == digest(data)

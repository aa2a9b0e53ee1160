"""The operator takes a whole domain off the area and lets it on again, from dom0."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

from .harness import MIB, PAGE, Consumer, Domain, Host, digest, noise, run, wait

PAGES = MIB // PAGE


def _shared(host: Host) -> tuple[list[Domain], list[Consumer], bytes]:
    """Give two domains, a program in each of them, and what their shared file has."""
    data = noise(MIB, 1)
    host.start_broker()
    domains = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    programs = [domain.program() for domain in domains]
    for domain, program in zip(domains, programs, strict=True):
        program.open(domain.root / "f.bin")
    for program in programs:
        program.wait_shared(PAGES)
    return domains, programs, data


def _command(host: Host, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
    return run("sharearea", verb, *words, "--socket", str(host.status_socket))


def test_a_detached_domain_is_plain_until_it_is_reattached(host: Host) -> None:
    (first, second), (program, other), data = _shared(host)
    program.ask("check_hashes", name="all", want={"f": digest(data)})
    done = _command(host, "detach", first.name)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert f"{first.name}: asked to let go of {PAGES} pages (1.0M)" in done.stdout
    assert f"{first.name} is detached" in done.stdout
    assert program.pages() == 0
    assert other.pages() == PAGES
    assert host.domain_states()[first.name]["held_pages"] == 0
    # A program that asks now stays on its plain file, and is told nothing wrong.
    late = first.program()
    late.open(first.root / "f.bin")
    time.sleep(2)
    assert (program.pages(), late.pages(), other.pages()) == (0, 0, PAGES)
    assert late.ask("hash", name="f") == digest(data)
    assert host.domain_states()[first.name]["held_pages"] == 0
    done = _command(host, "detach", first.name)
    assert done.returncode == 0
    assert "asked to let go of 0 pages" in done.stdout
    done = _command(host, "reattach", first.name)
    assert (done.returncode, done.stderr) == (0, "")
    for each in (program, late, other):
        each.wait_shared(PAGES)
    report = program.ask("stop", name="all")
    assert report["faults"] == []
    assert second.name in host.domain_states()


def test_a_domain_that_does_not_let_go_in_time_is_said_so(host: Host) -> None:
    (first, _), (program, _), data = _shared(host)
    program.popen.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = _command(host, "detach", first.name, "--timeout", "1")
        assert done.returncode == 10
        assert 1 <= time.monotonic() - began < 8
        assert f"{first.name} still holds {PAGES} pages (1.0M) after 1 s" in done.stderr
        assert "stays detached" in done.stderr
    finally:
        program.popen.send_signal(signal.SIGCONT)
    done = _command(host, "detach", first.name)
    assert done.returncode == 0, done.stderr
    assert program.ask("hash", name="f") == digest(data)


def test_a_domain_whose_agent_is_dead_is_detached_when_its_grace_time_ends(host: Host) -> None:
    host.configure({"grace": "10 s"})
    (first, _), (program, _), _ = _shared(host)
    first.running.kill()
    wait("an absent domain", lambda: host.domain_states()[first.name]["state"] == "absent")
    done = _command(host, "detach", first.name)
    assert done.returncode == 0, done.stderr
    assert "no agent is connected" in done.stdout
    assert first.name not in host.domain_states()
    program.wait_shared(0)


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["nobody"], 2, "there is no domain nobody in any pool"),
        (["d1", "--pool", "q"], 2, "there is no pool q"),
        (["d1", "--pool", "p", "--timeout", "-1"], 2, "a number of seconds from 0 to 86400"),
        ([], 2, "the following arguments are required: DOMAIN"),
    ],
)
def test_wrong_words(host: Host, words: list[str], code: int, text: str) -> None:
    host.start_broker()
    done = _command(host, "detach", *words)
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr

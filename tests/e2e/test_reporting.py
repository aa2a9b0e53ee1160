"""What both programs say while they work: lines, figures, files that are moved; pools that only report; no secrets."""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sharearea.broker import boot_id
from sharearea.common import native
from sharearea.keys import load_keys
from tests.lines import faults, read

from .harness import MIB, PAGE, POOL, Host, cached_pages, noise, run, wait

PAGES = MIB // PAGE


def figures(host: Host, name: str) -> dict[str, Any]:
    """The last line of an event, without what all lines have."""
    events = host.events(name)
    return {key.removeprefix("sharearea."): value for key, value in events[-1].items()} if events else {}


def test_a_pool_that_only_reports_maps_nothing(host: Host) -> None:
    host.configure(pool={"mode": "report"})
    host.start_broker()
    common, own = noise(MIB, 1), noise(MIB, 2)
    domains = host.add_domains(2, {"f.bin": common})
    domains[0].write("own.bin", own)
    for domain in domains:
        host.wait_warm("reported", lambda d: d.status().get("reports", {}).get("report-only", 0) >= 1, domain)
    host.wait_warm("both files", lambda: domains[0].status()["reports"] == {"report-only": 2})
    program = domains[0].program()
    assert program.open(domains[0].root / "f.bin")["reason"] == "report-only"

    found = host.wait_warm(
        "figures", lambda: figures(host, "pool.statistics").get("possible_saved_bytes") and host.pool()
    )
    assert (found["mode"], found["possible_saved_bytes"]) == ("report", MIB)
    assert (found["area_bytes"], found["pages_published"], found["pages_sharing"]) == (0, 0, 0)
    states = host.domain_states()
    assert states["d1"]["possible_given_up_bytes"] == MIB
    assert states["d1"]["possible_net_bytes"] == MIB // 2
    host.wait_warm("the host's line", lambda: figures(host, "host.statistics").get("possible_saved_bytes") == MIB)
    plain = wait("a line", lambda: domains[0].running.events("files.plain"))
    assert (plain[0]["event.reason"], plain[0]["sharearea.examples"]) == ("report-only", ["/f.bin"])
    assert all(cached_pages(domain.root / "f.bin") == PAGES for domain in domains), "nothing was dropped"

    shown = run("sharearea", "status", "--config", str(host.config))
    assert "report" in shown.stdout
    assert "1.0M" in shown.stdout

    # Switched on, the same pool shares; switched back, it gives everything back.
    for mode, pages in (("share", PAGES), ("report", 0)):
        host.running.end()
        host.configure(pool={"mode": mode})
        host.start_broker()
        wait(f"{mode}: {pages} pages shared", lambda pages: program.pages() == pages, pages)
    assert program.ask("hash", name="f")
    wait("no mapping", lambda: host.pool().get("pages_sharing") == 0)


def test_every_figure_is_in_the_log_and_adds_up(host: Host) -> None:
    host.start_broker()
    elf = Path(os.path.realpath("/bin/sh")).read_bytes()
    domains = host.add_domains(2, {"f.bin": noise(MIB, 1), "sh": elf})
    host.wait_offered(2)
    for domain in domains:
        program = domain.program()
        for name in ("f.bin", "sh"):
            program.open(domain.root / name, name)
            wait(f"{name} shared", lambda program, name: program.pages(name) > 0, program, name)
    host.wait_warm("drops", lambda: all(d.status()["dropped_pages_total"] for d in domains))
    pages = host.pool()["pages_sharing"]
    wait("the log", lambda: figures(host, "pool.statistics").get("pages_sharing") == pages)
    wait("the drops in it", lambda: figures(host, "pool.statistics")["given_up_bytes"] > 0)
    pool, of_host = figures(host, "pool.statistics"), figures(host, "host.statistics")
    assert pool["saved_bytes"] == pool["given_up_bytes"] - pool["area_bytes"]
    assert pool["net_saved_bytes"] == pool["saved_bytes"] - pool["overhead_bytes"]
    mapped = [pool[f"mapped_{kind}_bytes"] for kind in ("text", "rodata", "data", "unclassified")]
    assert sum(mapped) == pages * PAGE
    assert mapped[0] > 0
    assert mapped[1] > 0
    assert mapped[2] >= 2 * MIB
    assert mapped[3] == 0
    assert pool["slots_mapped_2_times"] == pages // 2
    assert of_host["broker_private_bytes"] > MIB
    assert of_host["memory_bytes"] > of_host["available_bytes"] > 0
    rows = {event["file.path"]: event for event in host.events("file.statistics")}
    assert rows["/f.bin"]["sharearea.held_bytes"] == 2 * MIB
    assert rows["/sh"]["sharearea.text_bytes"] > 0
    assert "sharearea.text_bytes" not in rows["/f.bin"]
    assert {event["sharearea.domain"] for event in host.events("domain.statistics")} == {"d1", "d2"}
    checked = wait("checks", lambda: host.events("invariants.checked"))
    assert sum(event["sharearea.checked_slots"] for event in checked) > 0
    assert not host.events("invariants.violated")
    shared = host.events("files.shared")
    assert sum(event["sharearea.files"] for event in shared) >= 4


def test_what_the_agent_leaves_out_is_said_once(host: Host) -> None:
    host.configure(pool={"min_file_bytes": "8 KiB", "exclude": ["*.key"]})
    host.start_broker()
    domain = host.add_domain(exclude=["*.own"])
    domain.write("small", b"x" * 100)
    domain.write("a.key", noise(MIB, 1))
    domain.write("b.own", noise(MIB, 2))
    domain.write("secret", noise(MIB, 3)).chmod(0o600)
    domain.write("fine", noise(MIB, 4))
    domain.start()
    wait("a second scan", lambda: domain.status().get("scans", 0) >= 2)
    lines = domain.running.events("files.refused")
    said = {e["event.reason"]: (e["sharearea.files"], e["sharearea.file_bytes"]) for e in lines}
    assert said == {"too-small": (1, 100), "excluded": (2, 2 * MIB), "not-world-readable": (1, MIB)}
    assert len(lines) == 3
    assert {e["sharearea.stage"] for e in lines} == {"scan"}
    assert {e["sharearea.domain"] for e in lines} == {"d1"}
    assert {e["sharearea.pool"] for e in lines} == {POOL}


@pytest.mark.parametrize("signalled", [False, True])
def test_log_files_may_be_moved_under_way(host: Host, signalled: bool) -> None:
    logs = host.folder / "lines"
    host.configure(broker={"log_file": str(logs / "broker.log")})
    broker = host.start_broker()
    domain = host.add_domain(log_file=str(logs / "agent.log"))
    domain.write("f.bin", noise(MIB, 1))
    agent = domain.start()
    for name, process in (("broker", broker), ("agent", agent)):
        path, old = logs / f"{name}.log", logs / f"{name}.log.1"
        wait("lines", lambda path: path.exists() and len(read(path)) > 1, path)
        path.rename(old)
        if signalled:
            process.send(signal.SIGHUP)
        if name == "agent":
            domain.ask("reattach")
        wait("lines in a new file", lambda path: path.exists() and read(path), path)
        lines = read(old) + read(path)
        assert faults(lines) == [], "no line is lost between the two"
        assert process.alive
    assert run("sharearea", "status", "--json", "--config", str(host.config)).returncode == 0


def test_a_full_disk_stops_nobody(host: Host) -> None:
    """/dev/full takes no byte; the journal's side lacks nothing."""
    host.configure(broker={"log_file": "/dev/full"})
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": noise(MIB, 1)}, log_file="/dev/full")
    host.wait_offered(1)
    program = first.program()
    program.open(first.root / "f.bin")
    program.wait_shared(PAGES)
    assert host.status()["log_lines_dropped"] > 0
    assert first.status()["log_lines_dropped"] > 0
    assert host.events("broker.started")
    first.running.end()
    [stopped] = first.running.events("agent.stopped")
    assert stopped["sharearea.log_lines_dropped"] > 0


def test_no_line_has_a_fingerprint_or_a_key(host: Host) -> None:
    """A whole life, strikes and restarts included; then every line is searched, in every spelling."""
    host.configure(broker={"log_level": "debug"})
    host.start_broker()
    data = noise(32 * PAGE, 1)
    domains = host.add_domains(2, {"f.bin": data}, log_level="debug")
    host.wait_offered(1)
    program = domains[0].program()
    program.open(domains[0].root / "f.bin")
    program.wait_shared(32)
    domains[0].write("f.bin", noise(32 * PAGE, 2))
    wait("what was withdrawn in the log", lambda: domains[0].running.events("files.returned"))
    domains[1].running.end()
    host.running.kill()
    host.start_broker()
    wait("a line", lambda: figures(host, "file.statistics"))

    secrets = _secrets(host, [data, noise(32 * PAGE, 2)])
    assert len(secrets) == 2 * 33 + 1
    text = "\n".join(log.read_text(errors="replace") for log in host.folder.glob("*.log"))
    assert len(text.splitlines()) > 25
    # What identifies them is much shorter than they are.
    for secret in secrets:
        for part in (secret[:8], secret[-8:]):
            for spelling in (part.hex(), part.hex().upper(), repr(part)[2:-1], base64.b64encode(part)[:10].decode()):
                assert spelling not in text
            assert json.dumps(part.decode("latin-1"))[1:-1] not in text


def _secrets(host: Host, contents: list[bytes]) -> list[bytes]:
    """The pool's key, and the fingerprints and roots of these files under it."""
    key = load_keys(host.state_dir, boot_id(), [POOL])[POOL].key
    found = [key]
    for data in contents:
        column, _ = native.fingerprint_pages(key, data)
        found += [column[at : at + 32] for at in range(0, len(column), 32)]
        found.append(native.file_root(len(data), column))
    return found

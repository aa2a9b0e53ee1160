"""stats, top and why on a real broker with real agents and programs, and on what these logged."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lines import read

from .harness import BIN, MIB, PAGE, Consumer, Domain, Host, noise, run, wait


def why(host: Host, subject: str | os.PathLike[str], *words: str) -> dict[str, Any]:
    done = run("sharearea", "why", os.fspath(subject), "--config", str(host.config), "--json", *words)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def first(host: Host, subject: str | os.PathLike[str], *words: str) -> str:
    code: str = why(host, subject, *words)["findings"][0]["code"]
    return code


def stats(*words: str | os.PathLike[str]) -> Any:
    done = run("sharearea", "stats", *(os.fspath(word) for word in words))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def asking(domain: Domain) -> tuple[str, str]:
    return "--agent", str(domain.control_socket)


def test_why_of_files_and_domains(host: Host) -> None:
    shared, single, secret, small = noise(MIB, 1), noise(MIB, 2), noise(MIB, 3), b"s" * 100
    host.configure(pool={"exclude": ["/secret"], "min_file_bytes": 4096})
    assert first(host, "/shared") == "broker-not-running"
    host.start_broker()
    assert first(host, "d1") == "domain-unknown"
    assert first(host, "nobody") == "no-matching-rule"
    assert first(host, "/shared") == "no-domains"
    one, two = host.add_domains(2, {"shared": shared, "secret": secret, "small": small, "zero": bytes(MIB)})
    one.write("single", single)
    outside = one.root.parent / "outside"
    outside.write_bytes(shared)
    host.wait_offered(1)
    host.wait_warm("single is reported", lambda: any(file["path"] == "/single" for file in host.files()))
    host.wait_warm("zero is reported", lambda: any(file["path"] == "/zero" for file in host.files()))

    assert first(host, "/shared") == "no-consumer"
    assert first(host, "/single") == "one-holder"
    assert first(host, "/zero") == "zero-pages"
    excluded = why(host, "/secret")
    assert [finding["code"] for finding in excluded["findings"]] == ["excluded"]
    assert excluded["findings"][0]["where"] == 'pools.p.exclude "/secret"'
    assert first(host, "/none") == "not-reported-by-any"
    assert first(host, "d1") == "no-consumer"
    # What only the agent knows; it takes paths as this system sees them.
    assert first(host, one.root / "shared", *asking(one)) == "no-consumer"
    assert first(host, one.root / "secret", *asking(one)) == "excluded"
    assert first(host, one.root / "small", *asking(one)) == "too-small"
    assert first(host, one.root / "none", *asking(one)) == "deleted"
    done = run("sharearea", "why", str(outside), "--config", str(host.config), *asking(one))
    assert done.returncode == 2
    assert "is not inside" in done.stderr

    program = one.program()
    program.open(one.root / "shared")
    program.wait_shared(MIB // PAGE)
    found = why(host, "/shared")
    assert found["shared"]
    assert {finding["who"]: finding["code"] for finding in found["findings"]} == {
        "d1 in p": "shared",
        "d2 in p": "no-consumer",
    }
    assert first(host, one.root / "shared", *asking(one)) == "shared"
    assert first(host, "d1") == "shared"
    said = run("sharearea", "why", "d1", "--config", str(host.config)).stdout
    assert "1 files, 1.0 MiB mapped" in said
    assert json.loads(one.command("why", "--json", str(one.root / "shared")).stdout)["code"] == "shared"
    assert "no-consumer: " in two.command("why", str(two.root / "shared")).stdout

    # A writer stands in the way of a program of the other domain.
    with (two.root / "shared").open("r+b"):
        two.program().open(two.root / "shared")
        wait("a refused lease", lambda: first(host, two.root / "shared", *asking(two)) == "lease-refused")

    assert run("sharearea", "detach", "d1", "--config", str(host.config)).returncode == 0
    assert first(host, "d1") == "detached"
    assert {finding["who"]: finding["code"] for finding in why(host, "/shared")["findings"]}["d1 in p"] == "detached"
    two.running.end()
    assert first(host, "d2") in ("agent-gone", "domain-unknown")


def test_why_of_one_who_was_turned_away(host: Host) -> None:
    host.configure(pool={"max_domains": 2})
    host.start_broker()
    for _ in range(3):
        host.add_domain().start()
    stranger = host.add_domain(name="stranger")
    stranger.start()
    wait("two domains", lambda: len(host.domain_states()) == 2)
    out = wait("the third", lambda: {"d1", "d2", "d3"} - set(host.domain_states())).pop()
    wait("refusals", lambda: len(host.events("domain.refused")) >= 2)
    assert first(host, out) == "pool-full"
    assert first(host, "stranger") == "no-matching-rule"
    top = run("sharearea", "top", "--once", "--config", str(host.config)).stdout
    assert f"turned away: {out}: pool-full" in top


def test_why_in_a_pool_that_only_reports(host: Host) -> None:
    host.configure(pool={"mode": "report"})
    host.start_broker()
    host.add_domains(2, {"shared": noise(MIB, 4)})
    host.wait_warm("reports", lambda: host.pool().get("possible_saved_bytes") == MIB)
    assert first(host, "/shared") == "report-only"
    assert first(host, "d1") == "report-only"


@pytest.fixture
def logged(host: Host) -> tuple[Host, list[dict[str, Any]]]:
    """Give a host whose programs have shared something, and all lines that its broker and agents wrote."""
    log = host.folder / "log" / "broker.log"
    host.configure(broker={"log_file": str(log)}, pool={"exclude": ["/secret*"], "min_file_bytes": 4096})
    host.start_broker()
    files = {"a": noise(2 * MIB, 5), "b": noise(MIB, 6) + bytes(8 * PAGE), "secret": noise(PAGE * 5, 7), "small": b"x"}
    domains = host.add_domains(2, files)
    host.wait_offered(2)
    programs: list[Consumer] = []
    for domain in domains:
        program = domain.program()
        programs.append(program)
        for name in ("a", "b"):
            program.open(domain.root / name, name)
    for program in programs:
        program.wait_shared(2 * MIB // PAGE, "a")

    def settled() -> bool:
        figures = [json.loads(line) for line in read(log) if '"pool.statistics"' in line]
        ranked = [json.loads(line) for line in read(log) if '"file.statistics"' in line]
        return (
            bool(figures and ranked)
            and figures[-1]["sharearea.given_up_bytes"] >= 6 * MIB
            and (ranked[-1]["sharearea.pages_owned"] > 0)
        )

    host.wait_warm("figures of all that is shared", settled)
    for domain in domains:
        domain.running.send(signal.SIGTERM)
    host.running.end()
    lines = [
        json.loads(line) for path in [log, *host.folder.glob("d?.log")] for line in read(path) if line.startswith("{")
    ]
    return host, lines


def last_of(lines: list[dict[str, Any]], event: str, **about: Any) -> dict[str, Any]:
    """Return the last line of an event about something."""
    wanted = {f"sharearea.{name}": value for name, value in about.items()}
    found: dict[str, Any] = [line for line in lines if line["event.name"] == event and wanted.items() <= line.items()][
        -1
    ]
    return found


def test_stats_say_what_the_lines_say(logged: tuple[Host, list[dict[str, Any]]], disk_path: Path) -> None:
    host, lines = logged
    logs = ("--logs", host.folder / "log" / "*.log", host.folder / "d?.log", "--json")

    overview = stats("--config", host.config, "--json")["figures"]
    figures = last_of(lines, "host.statistics")
    for name in ("saved_bytes", "net_saved_bytes", "given_up_bytes", "area_bytes", "overhead_bytes", "domains"):
        assert overview[name] == figures[f"sharearea.{name}"], name
    highest = max(line["sharearea.saved_bytes"] for line in lines if line["event.name"] == "host.statistics")
    assert overview["saved_bytes_max"] == highest
    pool = last_of(lines, "pool.statistics")
    assert overview["published_bytes"] == pool["sharearea.published_pages_total"] * PAGE
    assert overview["granted_bytes"] == pool["sharearea.granted_pages_total"] * PAGE

    [by_host] = stats(*logs, "--by", "host")["rows"]
    assert by_host["saved_bytes"] == figures["sharearea.saved_bytes"]
    assert by_host["stopped"] is True
    [by_pool] = stats(*logs, "--by", "pool")["rows"]
    assert by_pool["saved_bytes"] == pool["sharearea.saved_bytes"]
    by_domain = {row["domain"]: row for row in stats(*logs, "--by", "domain")["rows"]}
    for name in ("d1", "d2"):
        line = last_of(lines, "domain.statistics", domain=name, state="connected")
        assert by_domain[name]["given_up_bytes"] == line["sharearea.given_up_bytes"]
    by_file = {row["path"]: row for row in stats(*logs, "--by", "file", "--root", disk_path)["rows"]}
    for path in ("/a", "/b"):
        ranked = [line for line in lines if line["event.name"] == "file.statistics" and line["file.path"] == path]
        assert by_file[path]["held_bytes"] == ranked[-1]["sharearea.held_bytes"]
        assert by_file[path]["package"] is None
    by_reason = {(row["stage"], row["reason"]): row for row in stats(*logs, "--by", "reason")["rows"]}
    for reason in ("excluded", "too-small"):
        said = sum(
            line["sharearea.files"]
            for line in lines
            if line["event.name"] == "files.refused" and line["event.reason"] == reason
        )
        assert sum(row["times"] for key, row in by_reason.items() if key[1] == reason) == said, reason
    assert any(reason == "too-small" for _, reason in by_reason)


def test_stats_by_package_of_a_guest_root(logged: tuple[Host, list[dict[str, Any]]], disk_path: Path) -> None:
    host, _ = logged
    info = disk_path / "guest" / "var" / "lib" / "dpkg" / "info"
    info.mkdir(parents=True)
    (info / "first:amd64.list").write_text("/.\n/a\n")
    rows = stats("--config", host.config, "--by", "package", "--root", disk_path / "guest", "--json")["rows"]
    assert {row["package"]: row["contents"] for row in rows} == {"first": 1, "(no package)": 1}
    done = run("sharearea", "stats", "--config", str(host.config), "--by", "file", "--root", str(disk_path / "none"))
    assert done.returncode == 2
    empty = run("sharearea", "stats", "--config", str(host.config), "--by", "file", "--root", str(host.folder))
    assert "has no dpkg or rpm database" in empty.stderr


def test_stats_as_tables_as_csv_and_from_stdin(logged: tuple[Host, list[dict[str, Any]]]) -> None:
    host, lines = logged
    config = ("--config", str(host.config))
    saved = last_of(lines, "pool.statistics")["sharearea.saved_bytes"]
    text = run("sharearea", "stats", *config).stdout
    assert f"{saved / MIB:,.1f} MiB" in text
    [avoided] = [line.split() for line in text.splitlines() if "I/O avoided" in line]
    assert avoided[2] == "0", avoided  # every file was read here
    for by in ("host", "pool", "domain", "file", "package", "reason"):
        done = run("sharearea", "stats", *config, "--by", by)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        rows = list(csv.DictReader(io.StringIO(run("sharearea", "stats", *config, "--by", by, "--csv").stdout)))
        assert rows == [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in stats(*config, "--by", by, "--json")["rows"]
        ]
    with (host.folder / "log" / "broker.log").open("rb") as log:
        command = [str(BIN / "sharearea"), "stats", "--logs", "-", "--by", "pool", "--json"]
        piped = subprocess.run(command, stdin=log, capture_output=True, check=True)
    assert json.loads(piped.stdout)["rows"][0]["saved_bytes"] == saved
    # Rotated: the configured log's older ones are read too.
    (host.folder / "log" / "broker.log").rename(host.folder / "log" / "broker.log.1")
    assert stats(*config, "--by", "pool", "--json")["rows"][0]["saved_bytes"] == saved
    none = run("sharearea", "stats", *config, "--until", "30d", "--by", "pool")
    assert none.returncode == 0
    assert "nothing is in the window; the logs go from" in none.stderr
    assert stats(*config, "--since", "1h", "--by", "pool", "--json")["rows"][0]["saved_bytes"] == saved


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--logs", "{}/none*.log"], "no log file fits"),
        (["--csv", "--logs", "{}/x.log"], "--csv needs --by"),
        (["--since", "yesterday", "--logs", "{}/x.log"], "is no time"),
        (["--since", "1h", "--until", "2h", "--logs", "{}/x.log"], "--since is not before --until"),
        (["--by", "moon", "--logs", "{}/x.log"], "invalid choice"),
        (["--config", "{}/quiet.toml"], "has no log_file"),
        (["--json", "--csv", "--by", "pool"], "not allowed with"),
    ],
)
def test_stats_with_wrong_words(disk_path: Path, words: list[str], text: str) -> None:
    (disk_path / "x.log").write_text("nothing of ours\n")
    (disk_path / "quiet.toml").write_text("[broker]\n")
    done = run("sharearea", "stats", *(word.format(disk_path) for word in words))
    assert done.returncode == 2
    assert text in done.stderr


def test_stats_of_logs_without_a_line_of_ours(disk_path: Path) -> None:
    (disk_path / "x.log").write_text("nothing of ours\n")
    done = run("sharearea", "stats", "--logs", str(disk_path / "x.log"))
    assert done.returncode == 0, done.stderr
    assert "1 lines are no events of sharearea" in done.stderr
    assert "no broker has logged figures" in done.stdout


# ----------------------------------------------------------------------------------------------------------------- top


@contextlib.contextmanager
def terminal(*words: str, width: int = 80) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run top in a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [BIN / "sharearea", "top", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm", "COLUMNS": str(width), "LINES": "24"},
    )
    try:
        yield process, ours
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)
        os.close(theirs)


def shown(fd: int, text: str) -> str:
    """Read from a terminal until a text is there."""
    said, end = "", time.monotonic() + 30
    while text not in said:
        assert time.monotonic() < end, said
        ready, _, _ = select.select([fd], [], [], 1)
        if ready:
            said += os.read(fd, 65536).decode(errors="replace")
    return said


@pytest.mark.parametrize("ending", [b"q", b"\x03"])
def test_top_shows_what_happens_and_ends_cleanly(host: Host, ending: bytes) -> None:
    host.start_broker()
    with terminal("--config", str(host.config), "--interval", "0.2") as (process, screen):
        before = termios.tcgetattr(screen)
        shown(screen, "no domain is connected")
        host.add_domains(2, {"shared": noise(MIB, 8)})
        shown(screen, "connected")
        os.write(screen, ending)
        code = wait("its end", lambda: (process.poll(), True) if process.poll() is not None else None)[0]
        assert code == (0 if ending == b"q" else 130)
        assert termios.tcgetattr(screen) == before


def test_top_goes_on_when_the_broker_comes_back(host: Host) -> None:
    host.start_broker()
    with terminal("--config", str(host.config), "--interval", "0.2") as (process, screen):
        shown(screen, "no domain is connected")
        host.running.end()
        shown(screen, "trying again")
        host.start_broker()
        shown(screen, f"broker {host.running.pid}")
        os.write(screen, b"q")
        wait("its end", lambda: process.poll() == 0)


def test_top_once_fits_into_80_columns(host: Host) -> None:
    host.configure(pool={"min_file_bytes": 4096, "exclude": ["/secret*"]})
    host.start_broker()
    host.add_domains(2, {"shared": noise(MIB, 9), "small": b"x", "secret": noise(MIB, 10)})
    host.wait_offered(1)
    done = run("sharearea", "top", "--once", "--config", str(host.config))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["d1"][1] == rows["d2"][1] == "p"
    assert "1M" in rows["p"]
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout


def test_top_without_a_broker_or_a_terminal(host: Host) -> None:
    host.configure()
    done = run("sharearea", "top", "--once", "--config", str(host.config))
    assert done.returncode == 5
    assert "is it running" in done.stderr
    host.start_broker()
    done = run("sharearea", "top", "--config", str(host.config))
    assert done.returncode == 2
    assert "--once" in done.stderr

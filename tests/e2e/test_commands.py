"""The two commands as a user types them: exit codes, messages, JSON, and a demo that leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sharearea.demo_disk import lacking
from tests.lines import faults, read

from .harness import BIN, MIB, PAGE, Host, noise, run, wait

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["sharearea"], 2, "usage:"),
        (["sharearea", "nothing"], 2, "invalid choice"),
        (["sharearea", "broker", "--config", "{}/none.toml"], 3, "none.toml"),
        (["sharearea", "broker", "--config", "{}/unknown.toml"], 3, "broker.sockett"),
        (["sharearea", "broker", "--config", "{}/type.toml"], 3, "broker.grace"),
        (["sharearea", "broker", "--config", "{}/broken.toml"], 3, "broken.toml"),
        (["sharearea", "broker", "--config", "{}/taken.toml"], 4, "exists and is no socket"),
        (["sharearea", "broker", "--config", "{}/taken-status.toml"], 4, "exists and is no socket"),
        (["sharearea", "check", "--config", "{}/none.toml"], 3, "none.toml"),
        (["sharearea", "status", "--socket", "{}/none.sock"], 5, "nobody answers on"),
        (["sharearea", "domains", "--socket", "{}/none.toml"], 5, "nobody answers on"),
        (["sharearea", "status", "--config", "{}/none.toml"], 3, "none.toml"),
        (["sharearea", "demo", "--domains", "1"], 2, "sharing needs at least 2"),
        (["sharearea", "demo", "--source", "{}/none"], 2, "is no folder"),
        (["sharearea", "demo", "--work-dir", "{}/none"], 2, "is no folder"),
        (["sharearea-agent", "run", "--config", "{}/none.toml"], 3, "none.toml"),
        (["sharearea-agent", "run", "--config", "{}/unknown-agent.toml"], 3, "agent.folder"),
        (["sharearea-agent", "run", "--config", "{}/taken-agent.toml"], 4, "exists and is no socket"),
        (["sharearea-agent", "status", "--config", "{}/none.toml"], 3, "none.toml"),
    ],
)
def test_wrong_words(disk_path: Path, words: list[str], code: int, text: str) -> None:
    folder = disk_path
    precious = folder / "precious"
    precious.write_text("not a socket")
    broker = f'[broker]\nstate_dir = "{folder}/state"\n'
    agent = f'[agent]\nname = "a"\nfolders = ["{folder}"]\ncache = "{folder}/cache/c.db"\n'
    for name, content in {
        "unknown.toml": '[broker]\nsockett = "/x"\n',
        "type.toml": "[broker]\ngrace = true\n",
        "broken.toml": "[broker\n",
        "taken.toml": f'{broker}socket = "{precious}"\nstatus_socket = "{folder}/s.sock"\n',
        "taken-status.toml": f'{broker}socket = "{folder}/b.sock"\nstatus_socket = "{precious}"\n',
        "unknown-agent.toml": '[agent]\nname = "a"\nfolder = ["/usr"]\n',
        "taken-agent.toml": f'{agent}control_socket = "{folder}/c.sock"\nconsumer_socket = "{precious}"\n',
    }.items():
        (folder / name).write_text(content)
    done = run(*(word.format(folder) for word in words))
    assert (done.returncode, text in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert precious.read_text() == "not a socket"
    assert done.stdout == ""
    # Nothing listens any more, and no socket is left behind.
    assert not [path for path in folder.iterdir() if path.suffix == ".sock"]


def test_a_second_broker_and_a_second_agent_are_refused(host: Host) -> None:
    host.start_broker()
    domain = host.add_domain()
    domain.start()
    wait("an agent that answers", domain.status)
    done = run("sharearea", "broker", "--config", str(host.config))
    assert done.returncode == 4
    assert "a broker is running already" in done.stderr
    done = run("sharearea-agent", "run", "--config", str(domain.config))
    assert done.returncode == 4
    assert "is in use by a running program" in done.stderr
    assert host.status()
    assert domain.status()


def test_json_and_tables(host: Host) -> None:
    host.start_broker()
    socket = ["--socket", str(host.status_socket)]
    for verb, text in (("pools", "p "), ("domains", "no domain is connected"), ("files", "no file is reported")):
        done = run("sharearea", verb, *socket)
        assert (done.returncode, done.stderr) == (0, "")
        assert text in done.stdout
    first, _ = host.add_domains(2, {"f.bin": noise(MIB, 1)})
    host.wait_offered(1)
    found = {}
    for verb in ("status", "pools", "domains", "files"):
        done = run("sharearea", verb, "--json", *socket)
        assert (done.returncode, done.stderr) == (0, "")
        found[verb] = json.loads(done.stdout)
    for verb in ("status", "files"):
        done = run("sharearea", verb, "--config", str(host.config))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    assert found["status"]["pid"] == host.running.pid
    assert [pool["pool"] for pool in found["pools"]] == ["p"]
    assert {domain["domain"] for domain in found["domains"]} == {"d1", "d2"}
    assert {file["path"] for file in found["files"]} == {"/f.bin"}
    done = first.command("status", "--json")
    assert json.loads(done.stdout)["name"] == first.name
    done = first.command("status")
    assert f"agent {first.name}: connected, pool p" in done.stdout
    # Whoever reads our output may have had enough of it.
    with subprocess.Popen([BIN / "sharearea", "files", *socket], stdout=subprocess.PIPE) as early:
        assert early.stdout is not None
        early.stdout.close()
        assert early.wait(30) in (0, 141)


def test_check(host: Host) -> None:
    host.configure()
    done = run("sharearea", "check", "--config", str(host.config))
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout
    for subject in ("kernel", "sealed memory", "leases", "fingerprints", "pool p"):
        assert f"ok    {subject}:" in done.stdout
    done = run("sharearea", "check", "--json", "--config", str(host.config))
    findings = json.loads(done.stdout)
    assert all(set(finding) == {"level", "subject", "text", "remedy"} for finding in findings)
    host.configure(broker={"metrics_listen": "127.0.0.1:9420"}, pool={"mode": "report"})
    done = run("sharearea", "check", "--config", str(host.config))
    assert "ok    metrics: http://127.0.0.1:9420/metrics" in done.stdout
    assert "it only reports, nothing is shared" in done.stdout
    # The example as it is: sharing is off, and that is said.
    done = run("sharearea", "check", "--config", str(EXAMPLES / "broker.toml"))
    assert "every domain is refused: sharing is switched off" in done.stdout


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted(disk_path: Path, number: signal.Signals) -> None:
    work = _demo_folders(disk_path)
    demo = subprocess.Popen(
        [BIN / "sharearea", "demo", "--domains", "2", *_demo_words(disk_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert demo.stdout is not None
    with demo:
        wait("its processes", lambda: demo.poll() is not None or len(_children(demo.pid)) >= 3)
        children = _children(demo.pid)
        demo.send_signal(number)
        demo.send_signal(number)  # somebody is impatient
        output = demo.stdout.read().decode()
        assert demo.wait(30) == 130, output
    assert "Traceback" not in output
    assert "interrupted" in output
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(work.iterdir()) == []


def _demo_folders(folder: Path) -> Path:
    """Make files to share, and the folder for the demo's own."""
    (folder / "source").mkdir()
    for n in range(16):
        (folder / "source" / f"n{n}.bin").write_bytes(noise(MIB // 2, n))
        (folder / "source" / f"n{n}.bin").chmod(0o644)
    (folder / "work").mkdir()
    return folder / "work"


def _demo_words(folder: Path) -> list[str]:
    return ["--size-mib", "8", "--source", str(folder / "source"), "--work-dir", str(folder / "work")]


def test_every_line_of_a_demo_fits_and_says_what_the_demo_says(disk_path: Path) -> None:
    """A soak: this system's own libraries, real programs, and lines compared with what the demo counts by itself."""
    (disk_path / "work").mkdir()
    figures_file = disk_path / "figures.json"
    words = ["--size-mib", "64", "--work-dir", str(disk_path / "work"), "--json", str(figures_file), "--keep"]
    words += ["--no-cold-start"]  # its domain would be in the lines that are compared
    done = run("sharearea", "demo", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(figures_file.read_text())
    [kept] = (disk_path / "work").iterdir()
    logs = [log for log in kept.glob("*.log") if "consumer" not in log.name]
    assert len(logs) == 1 + figures["domains"]
    for log in logs:
        assert faults(read(log)) == [], log.name
    lines = [json.loads(line) for line in read(kept / "broker.log")]
    pools = [line for line in lines if line["event.name"] == "pool.statistics"]
    best = max(pools, key=lambda line: (line["sharearea.pages_sharing"], line["event.sequence"]))
    assert best["sharearea.pages_sharing"] == figures["sharing_pages"]
    assert best["sharearea.pages_shared"] == figures["shared_pages"]
    # What was evicted before it was scanned was not reported, and the demo counts files.
    full = max(pools, key=lambda line: (line["sharearea.possible_saved_bytes"], line["event.sequence"]))
    reported = sum(full[f"sharearea.reported_{kind}_bytes"] for kind in ("text", "rodata", "data")) // PAGE
    missing = figures["candidate_pages"] - reported
    assert 0 <= missing < figures["candidate_pages"] // 50
    own = figures["self_shared_pages"]
    assert 0 <= own - full["sharearea.self_shared_pages"] <= missing
    assert 0 <= figures["zero_pages"] - best["sharearea.zero_pages"] <= missing
    # The demo counts a domain's own further copies of a page in; in lines they are apart.
    rest = figures["possible_saved_bytes"] - full["sharearea.possible_saved_bytes"]
    assert 0 <= rest <= (own + missing) * PAGE
    mapped = {kind: best[f"sharearea.mapped_{kind}_bytes"] for kind in ("text", "rodata", "data", "unclassified")}
    assert sum(mapped.values()) == figures["sharing_pages"] * PAGE
    assert mapped["text"] > 0
    assert mapped["rodata"] > 0
    assert mapped["unclassified"] == 0
    files = sum(line["sharearea.files"] for line in lines if line["event.name"] == "files.shared")
    others = [line for line in lines if line["event.name"] != "file.statistics"]
    assert len(others) < files // 4, "lines are gathered"


def test_demo(disk_path: Path) -> None:
    figures_file = disk_path / "figures.json"
    work = _demo_folders(disk_path)
    words = ["--domains", "2", *_demo_words(disk_path), "--json", str(figures_file)]
    done = run("sharearea", "demo", *words, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == 0, done.stderr + done.stdout
    figures = json.loads(figures_file.read_text())
    assert figures["mismatched_bytes"] == 0
    assert figures["verified_bytes"] > 0
    assert figures["saved_ratio"] > 0.9
    assert figures["saved_bytes"] <= figures["possible_saved_bytes"]
    assert "net saved" in done.stdout
    cold = figures["cold_start"]
    if "why_not" in cold:
        assert lacking()
        assert cold["why_not"] in done.stdout
    else:
        assert cold["program_bytes_without"] >= cold["bytes"]
        assert cold["program_bytes_with"] < cold["bytes"] // 10  # Python's own, where that was evicted
        assert cold["device_bytes_with"] < MIB
        assert cold["unread_bytes"] >= cold["bytes"]
    assert list(work.iterdir()) == []

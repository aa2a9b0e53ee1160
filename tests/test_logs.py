"""Where lines go: files that are moved, disks that are full, readers that stand still."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharearea.common.errors import HostError
from sharearea.common.logs import EventLog
from tests.lines import read

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stderr() -> io.StringIO:
    """Give the other sink."""
    return io.StringIO()


def opened(path: Path, stderr: io.StringIO) -> EventLog:
    """A log to a file, and to the other sink besides."""
    return EventLog("sharearea", stream=stderr, file=path)


def closed(number: int) -> dict[str, Any]:
    """Fields of an event that can be told from the next."""
    return {"pool": "p", "segment": number}


def numbers(where: Path | io.StringIO) -> list[int]:
    """The segments that a sink's lines name."""
    lines = read(where) if isinstance(where, Path) else where.getvalue().splitlines()
    return [event["sharearea.segment"] for event in map(json.loads, lines) if "sharearea.segment" in event]


def test_a_file_gets_every_line_and_only_its_group_reads_it(tmp_path: Path, stderr: io.StringIO) -> None:
    path = tmp_path / "sub" / "broker.log"
    log = opened(path, stderr)
    for number in range(3):
        log.event("segment.closed", **closed(number))
    assert numbers(path) == [0, 1, 2]
    assert path.read_text() == stderr.getvalue()
    assert path.stat().st_mode & 0o777 == 0o640
    log.close()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced", "told"])
def test_a_file_may_go_at_any_time(tmp_path: Path, stderr: io.StringIO, how: str) -> None:
    path, old = tmp_path / "broker.log", tmp_path / "broker.log.1"
    log = opened(path, stderr)
    log.event("segment.closed", **closed(1))
    if how == "removed":
        path.unlink()
    else:
        path.rename(old)
    if how == "replaced":
        path.touch()
    if how == "told":
        log.reopen()
    log.event("segment.closed", **closed(2))
    log.event("segment.closed", **closed(3))
    assert numbers(path) == [2, 3]
    if how != "removed":
        assert numbers(old) == [1]
    assert log.dropped == 0
    assert not [fd for fd in os.listdir("/proc/self/fd") if str(old) == _target(fd)]
    log.close()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_logrotate_moves_it_by_our_own_rules(tmp_path: Path, stderr: io.StringIO) -> None:
    """The shipped rules, with another folder; logrotate itself, where it is installed."""
    folder = tmp_path / "sharearea"
    folder.mkdir(mode=0o755)
    rules = (ROOT / "deploy" / "logrotate" / "sharearea").read_text()
    assert "/var/log/sharearea/*.log" in rules
    log = opened(folder / "broker.log", stderr)
    log.event("segment.closed", **closed(1))
    mine = tmp_path / "rules"
    mine.write_text(rules.replace("/var/log/sharearea/", f"{folder}/"))
    mine.chmod(0o644)
    try:
        subprocess.run(["logrotate", "-f", "-s", tmp_path / "state", mine], check=True)
    except FileNotFoundError:
        (folder / "broker.log").rename(folder / "broker.log.1")  # what it does with these rules
    log.event("segment.closed", **closed(2))
    assert numbers(folder / "broker.log") == [2]
    assert numbers(folder / "broker.log.1") == [1]
    log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_costs_lines_which_are_counted(small_disk: Path, stderr: io.StringIO) -> None:
    path = small_disk / "broker.log"
    log = opened(path, stderr)
    for number in range(400):
        log.event("segment.closed", **closed(number))
    written = numbers(path)
    assert written == list(range(len(written))), "no line is cut, none is out of its order"
    lost = 400 - len(written)
    assert lost > 100
    assert log.dropped == lost
    assert numbers(stderr) == list(range(400)), "the other sink lacks nothing"
    path.write_bytes(b"")
    log.event("segment.closed", **closed(400))
    first, second = (json.loads(line) for line in read(path))
    assert first["event.name"] == "log.dropped"
    assert (first["sharearea.lines"], first["sharearea.sink"]) == (lost, "file")
    assert second["sharearea.segment"] == 400
    assert log.dropped == lost
    assert (first["event.sequence"], second["event.sequence"]) == (400, 401), "in the place of the last one"
    log.close()


def test_a_device_that_is_full_costs_lines(stderr: io.StringIO) -> None:
    log = opened(Path("/dev/full"), stderr)
    for number in range(5):
        log.event("segment.closed", **closed(number))
    assert log.dropped == 5
    assert numbers(stderr) == list(range(5))
    log.close()


def test_a_folder_that_is_gone_costs_lines(tmp_path: Path, stderr: io.StringIO) -> None:
    folder = tmp_path / "sub"
    log = opened(folder / "broker.log", stderr)
    (folder / "broker.log").unlink()
    folder.rmdir()
    log.event("segment.closed", **closed(1))
    assert log.dropped == 1
    folder.mkdir()
    log.event("segment.closed", **closed(2))
    assert numbers(folder / "broker.log") == [2]
    log.close()


def test_a_file_that_cannot_be_opened_at_the_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="cannot open the log file") as error:
        EventLog("sharearea", file=tmp_path / "file" / "broker.log")
    assert "log_file" in error.value.hint
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HostError, match=os.strerror(errno.ENXIO)):
        EventLog("sharearea", file=tmp_path / "pipe")


_WRITER = """
import sys
from sharearea.common.logs import EventLog
log = EventLog("sharearea")
for number in range(2000):
    log.event("segment.closed", pool="p", segment=number)
print(log.dropped, flush=True)
sys.stdin.readline()
log.event("segment.closed", pool="p", segment=2000)
"""


def test_a_reader_that_stands_still_costs_lines_and_no_time() -> None:
    """A pipe that nobody reads, as the journal's when it hangs: the program goes on."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 65_536)
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True
    ) as program:
        os.close(theirs)
        assert program.stdout is not None
        assert program.stdin is not None
        dropped = int(program.stdout.readline())  # it came this far
        text = os.read(ours, 1 << 20)
        program.stdin.write("\n")
        program.stdin.flush()
        with open(ours, "rb") as rest:
            text += rest.read()
        program.wait(30)
    lines = text.decode().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event.get("sharearea.segment") for event in events[:-2]] == list(range(2000 - dropped))
    assert dropped > 1000
    assert (events[-2]["event.name"], events[-2]["sharearea.lines"]) == ("log.dropped", dropped)
    assert events[-2]["sharearea.sink"] == "stderr"
    assert events[-1]["sharearea.segment"] == 2000

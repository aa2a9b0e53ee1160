"""Reading log files: broken ones, rotated ones, growing ones, long ones of which parts are kept."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sharearea.common.errors import HostError, UsageError
from sharearea.dashboard import intake
from sharearea.dashboard.logs import Logs, cache_folder, find_logs

from .writing import START, Writer

EVERYTHING = "SELECT * EXCLUDE (sequence) FROM lines ORDER BY ALL"


@pytest.fixture
def long_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat a few kilobytes as a long log."""
    monkeypatch.setattr(intake, "KEEP_BYTES", 32_768)
    monkeypatch.setattr(intake, "_SLICE_BYTES", 131_072)
    monkeypatch.setattr(intake, "_LINE_BYTES", 4096)
    monkeypatch.setattr(intake, "_PACKED_KEEP_BYTES", 100)


def busy(rounds: int, host: str = "h1", pid: int = 100) -> Writer:
    """Give a writer with lines of every group, one minute apart."""
    writer = Writer(host=host, pid=pid)
    writer.say(0, "broker.started")
    for at in range(rounds):
        writer.round(at * 60, domains=("a", "b"), saved_bytes=at)
        writer.say(at * 60 + 1, "pages.granted", pool="p", domain="a", pages=at)
        writer.say(at * 60 + 2, "files.refused", stage="report", reason="excluded", files=1, file_bytes=at, domain="a")
        writer.say(at * 60 + 3, "file.statistics", pool="p", rank=1, path=f"/f{at}")
    return writer


def everything(path: Path, **more: Any) -> list[dict[str, Any]]:
    """Return all rows, in an order of their own."""
    with Logs([path], **more) as logs:
        assert not logs.failed
        return logs.query(EVERYTHING)


def test_broken_and_foreign_lines_are_counted_and_nothing_else(tmp_path: Path) -> None:
    writer = busy(2)
    good = len(writer.lines)
    broken = [
        writer.lines[0][:100],
        "not json",
        "[1, 2]",
        "42",
        '{"event.name": "pool.statistics"',
        '{"message": "somebody else\'s", "event.dataset": "nginx.access", "event.name": "pool.statistics"}',
        "\0\0\0",
        '"',
        "x\ry",
        '{"a": "\x01"}',
    ]
    data = "\n".join([*broken[:5], *writer.lines, *broken[5:]]).encode() + b"\n\xff\xfe\n\n" + b"L" * 3_000_000 + b"\n"
    path = tmp_path / "a.log"
    path.write_bytes(data + writer.lines[-1].encode()[:50])
    os.utime(path, (0, 0))  # nobody is going to end that last line
    with Logs([path]) as logs:
        [counted] = logs.query("SELECT count(event) AS ours, count(*) AS lines FROM lines")
        assert counted["ours"] == good
        assert counted["lines"] >= good + len(broken)
        assert not logs.failed


def test_values_of_a_wrong_kind_are_not_known(tmp_path: Path) -> None:
    writer = Writer()
    line = json.loads(writer.say(0, "pool.statistics", pool="p", saved_bytes=5, area_bytes=6))
    (tmp_path / "a.log").write_text(json.dumps(line | {"sharearea.saved_bytes": "many"}) + "\n")
    with Logs([tmp_path / "a.log"]) as logs:
        assert logs.query("SELECT saved_bytes, area_bytes FROM pool_history") == [
            {"saved_bytes": None, "area_bytes": 6}
        ]


def test_events_of_a_later_version_are_kept_by_name(tmp_path: Path) -> None:
    line = json.loads(Writer().say(0, "broker.started"))
    (tmp_path / "a.log").write_text(json.dumps(line | {"event.name": "page.teleported"}) + "\n")
    with Logs([tmp_path / "a.log"]) as logs:
        assert logs.query("SELECT event FROM events") == [{"event": "page.teleported"}]


@pytest.mark.usefixtures("long_is_short")
@pytest.mark.parametrize("spaces", [(",", ":"), (", ", " : ")])
def test_lines_that_a_shipper_wrote_anew_are_read_all_the_same(tmp_path: Path, spaces: tuple[str, str]) -> None:
    writer = busy(20)
    assert len(writer.text()) > intake.KEEP_BYTES
    expected = everything(writer.save(tmp_path / "a.log"))
    lines = [json.dumps(dict(reversed(json.loads(line).items())), separators=spaces) for line in writer.lines]
    (tmp_path / "a.log").write_text("\n".join(lines) + "\n")
    assert everything(tmp_path / "a.log") == expected
    for events in (["pool.statistics"], ["domain.statistics"], ["file.statistics", "pages.granted"]):
        with Logs([tmp_path / "a.log"], events=events) as logs:
            [counted] = logs.query("SELECT count(*) AS n, count(DISTINCT (time, event, domain)) AS d FROM lines")
            assert counted["n"] == counted["d"] > 0


@pytest.mark.usefixtures("long_is_short")
def test_what_is_kept_says_the_same_as_what_is_read(tmp_path: Path) -> None:
    path, cache = busy(60).save(tmp_path / "a.log"), tmp_path / "cache"
    assert path.stat().st_size > 5 * intake.KEEP_BYTES
    expected = everything(path)
    assert len(expected) == 1 + 60 * 7
    for _ in range(2):
        with Logs([path], events=["pool.statistics"], cache=cache) as logs:
            assert logs.query("SELECT max(saved_bytes) AS n FROM host_history") == [{"n": 59}]
            assert logs.query("SELECT count(*) AS n FROM domain_history") == [{"n": 0}]
    assert everything(path, cache=cache) == expected
    parts = {part: part.stat().st_mtime_ns for part in cache.rglob("*.parquet")}
    assert {part.name.split(".")[1] for part in parts} == {"summary", "domains", "files", "plain", "traffic"}
    assert everything(path, cache=cache) == expected
    assert {part: part.stat().st_mtime_ns for part in cache.rglob("*.parquet")} == parts, "they were used"


@pytest.mark.usefixtures("long_is_short")
def test_a_log_that_grows_and_is_renamed_is_read_on(tmp_path: Path) -> None:
    writer, cache = busy(90), tmp_path / "cache"
    path = tmp_path / "a.log"
    whole = everything(writer.save(path))
    text = writer.text().encode()
    for part in (0.3, 0.31, 0.32, 0.7, 0.995, 1.0):
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(text[: int(len(text) * part)])
        lines = text[: int(len(text) * part)].count(b"\n")
        assert len(everything(path, cache=cache)) == lines, f"the line under way is left for later, at {part}"
    assert everything(path, cache=cache) == whole
    kept = sorted(cache.rglob("*.parquet"))
    path.rename(tmp_path / "a.log.1")
    assert everything(tmp_path / "a.log*", cache=cache) == whole
    assert sorted(cache.rglob("*.parquet")) == kept, "a renamed log is the same one"


@pytest.mark.usefixtures("long_is_short")
def test_a_log_that_begins_anew_is_another_one(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.log", tmp_path / "cache"
    first, second = busy(40), busy(60, pid=200)
    assert len(everything(first.save(path), cache=cache)) == len(first.lines)
    inode = path.stat().st_ino
    expected = everything(second.save(path))
    assert path.stat().st_ino == inode
    assert everything(path, cache=cache) == expected


@pytest.mark.usefixtures("long_is_short")
def test_parts_that_overlap_count_once(tmp_path: Path) -> None:
    writer, path = busy(60), tmp_path / "a.log"
    text = writer.text().encode()
    path.touch()
    for end, cache in ((len(text) * 2 // 3, tmp_path / "one"), (len(text), tmp_path / "other")):
        path.write_bytes(text[: text.rfind(b"\n", 0, end) + 1])
        everything(path, cache=cache)
    shutil.copytree(tmp_path / "one", tmp_path / "other", dirs_exist_ok=True)
    assert len(everything(path, cache=tmp_path / "other")) == len(writer.lines)
    # Cut short in its place: what is beyond the end is not there any more.
    with path.open("r+b") as file:
        file.truncate(text.find(b"\n", len(text) // 2) + 1)
    assert everything(path, cache=tmp_path / "other") == everything(path)


def test_a_log_without_a_last_newline_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    one, other = busy(1), busy(1, host="h2")
    (tmp_path / "a.log").write_text(one.text().rstrip("\n"))
    os.utime(tmp_path / "a.log", (0, 0))
    other.save(tmp_path / "b.log")
    with Logs([tmp_path / "*.log"]) as logs:
        assert logs.query("SELECT count(event) AS n FROM lines") == [{"n": len(one.lines) + len(other.lines)}]


def test_refresh_reads_what_came_and_forgets_what_went(tmp_path: Path) -> None:
    writer = busy(3)
    path = writer.save(tmp_path / "a.log")
    with Logs([tmp_path / "*.log*"]) as logs:

        def count() -> int:
            logs.refresh()
            return int(logs.query("SELECT count(event) AS n FROM lines")[0]["n"])

        assert count() == len(writer.lines)
        with path.open("a") as file:
            file.write(writer.lines[-1])
        assert count() == len(writer.lines), "half a line is none yet"
        with path.open("a") as file:
            file.write("\n" + writer.lines[-1] + "\n")
        assert count() == len(writer.lines) + 2
        other = busy(2, host="h2", pid=5)
        other.save(tmp_path / "b.log")
        assert count() == len(writer.lines) + 2 + len(other.lines)
        path.unlink()
        assert count() == len(other.lines)


@pytest.mark.usefixtures("long_is_short")
def test_packed_logs(tmp_path: Path) -> None:
    writer, cache = busy(40), tmp_path / "cache"
    expected = everything(writer.save(tmp_path / "plain"))
    (tmp_path / "a.log.2.gz").write_bytes(gzip.compress(writer.text().encode()))
    assert everything(tmp_path / "a.log.2.gz", cache=cache) == expected
    assert everything(tmp_path / "a.log.2.gz", cache=cache) == expected
    assert list(cache.rglob("*.parquet"))


@pytest.mark.usefixtures("long_is_short")
@pytest.mark.parametrize("small", [False, True])
def test_a_broken_packed_log_is_named_and_the_others_are_read(
    tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(intake, "_PACKED_KEEP_BYTES", 1 << 20)
    writer = busy(40)
    packed = gzip.compress(writer.text().encode())
    (tmp_path / "a.log.1.gz").write_bytes(packed[: len(packed) // 2])
    writer.save(tmp_path / "a.log")
    with Logs([tmp_path / "a.log*"], cache=tmp_path / "cache") as logs:
        [counted] = logs.query("SELECT count(event) AS n FROM lines")
        # Before 2.0 DuckDB reads what is there of it, and says nothing.
        if duckdb.__version__ >= "2":
            assert [path.name for path in logs.failed] == ["a.log.1.gz"]
            assert counted["n"] >= len(writer.lines)
        else:
            assert counted["n"] > len(writer.lines)
    assert not list((tmp_path / "cache").rglob(".*")), "nothing half done stays"


@pytest.mark.usefixtures("long_is_short")
@pytest.mark.parametrize("minutes", [-30, 0, 1, 30, 59, 119, 10_000])
def test_a_window_leaves_old_lines_unread_and_answers_the_same(tmp_path: Path, minutes: int) -> None:
    path = busy(120).save(tmp_path / "a.log")
    since = START + datetime.timedelta(minutes=minutes)
    with Logs([path]) as all_of_it, Logs([path], since=since) as window:
        all_of_it.window(since, None)
        for view in ("span", "host_history", "refusals", "counters"):
            assert window.query(f"FROM {view} ORDER BY ALL") == all_of_it.query(f"FROM {view} ORDER BY ALL")
        read, there = (logs.query("SELECT count(*) AS n FROM lines")[0]["n"] for logs in (window, all_of_it))
        assert read < there if minutes >= 30 else read <= there
        for logs in (window, all_of_it):
            logs.window(None, None)
        assert window.query("FROM span") == all_of_it.query("FROM span"), "a wider window reads what was left out"


def test_old_files_and_other_hosts_mix(tmp_path: Path) -> None:
    old, new = busy(3, host="h1"), busy(3, host="h2", pid=9)
    for at, line in enumerate(old.lines):
        old.lines[at] = line.replace("2026-11-20", "2024-01-01")
    old.save(tmp_path / "old.log")
    new.save(tmp_path / "new.log")
    with Logs([tmp_path / "*.log"]) as logs:
        assert len(logs.query("FROM host_statistics")) == 2
        logs.window(START - datetime.timedelta(days=1), None)
        assert [row["host"] for row in logs.query("FROM host_statistics")] == ["h2"]


def test_no_logs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no log file fits"):
        Logs([tmp_path / "*.log"])
    (tmp_path / "empty.log").touch()
    with Logs([tmp_path / "*.log"]) as logs:
        assert logs.query("SELECT events FROM span") == [{"events": 0}]


def test_a_name_with_a_quote_and_a_bracket(tmp_path: Path) -> None:
    path = busy(1).save(tmp_path / "it's [1].log")
    assert len(everything(path)) == 8


def test_the_same_file_twice_is_read_once(tmp_path: Path) -> None:
    path = busy(1).save(tmp_path / "a.log")
    (tmp_path / "link.log").symlink_to(path)
    assert len(find_logs([tmp_path / "*.log", path])) == 1


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    path = busy(1).save(tmp_path / "a.log")
    with pytest.raises(HostError, match="cannot use") as raised:
        Logs([path], cache=path / "cache")
    assert "--no-cache" in raised.value.hint


def test_what_was_not_used_for_long_goes(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("old", "new"):
        (cache / name).mkdir(parents=True)
        (cache / name / "0-1.summary.parquet").touch()
    os.utime(cache / "old", (0, 0))
    everything(busy(1).save(tmp_path / "a.log"), cache=cache)
    assert sorted(path.name for path in cache.iterdir()) == ["new"]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sharearea" / "logs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "sharearea" / "logs"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    path = busy(3).save(tmp_path / "a.log")
    descriptors = len(os.listdir("/proc/self/fd"))
    everything(path)
    assert not list((tmp_path / "tmp").iterdir())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    shutil.rmtree(tmp_path / "tmp")

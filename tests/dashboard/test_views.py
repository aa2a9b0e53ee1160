"""The views: what each figure is, on lines of which the answer is plain."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sharearea.common.events import EVENTS, FIELDS
from sharearea.dashboard import columns
from sharearea.dashboard.logs import Logs, views
from tools import gen_views

from .writing import START, Writer

VIEWS = (
    "span",
    "rounds",
    "host_statistics",
    "pool_statistics",
    "domain_statistics",
    "files",
    "host_extremes",
    "pool_extremes",
    "counters",
    "refusals",
    "domain_refusals",
    "obstacles",
    "page_owners",
    "page_classes",
    "budgets",
    "io_avoided",
    "host_savings(INTERVAL 1 MINUTE)",
    "pool_savings(INTERVAL 1 MINUTE)",
    "domain_savings(INTERVAL 1 MINUTE)",
)


@contextmanager
def asked(path: Path, *writers: Writer, **more: Any) -> Iterator[Logs]:
    """Give the logs of some writers."""
    for number, writer in enumerate(writers):
        writer.save(path / f"{number}.log")
    with Logs([path / "*.log"], **more) as logs:
        yield logs


def one(logs: Logs, sql: str) -> Any:
    """Return the one value of the one row."""
    [row] = logs.query(sql)
    [value] = row.values()
    return value


def test_what_is_generated_is_up_to_date() -> None:
    text = gen_views.VIEWS.read_text()
    assert text == gen_views.filled(text)


def test_every_field_is_a_column_and_no_name_means_two_things() -> None:
    assert set(columns.COLUMNS) == set(FIELDS) | set(columns.ALWAYS)
    assert not set(FIELDS) & set(columns.ALWAYS)
    assert sorted(event for events in columns.GROUPS.values() for event in events) == sorted(EVENTS)


def test_marks_are_where_the_programs_write_them() -> None:
    first, count = (int(place) for place in columns.MARK.removeprefix("substring(line, ").removesuffix(")").split(","))
    for event in EVENTS:
        service = "sharearea" if "broker" in EVENTS[event].programs else "sharearea-agent"
        line = Writer(service=service).say(0, event)
        assert line[first - 1 :][:count] == columns.mark(event), event
    for mine in columns.GROUPS.values():
        others = {columns.mark(event) for event in EVENTS if event not in mine}
        assert not others & {columns.mark(event) for event in mine}


def test_every_view_answers_without_a_line_of_its_own(tmp_path: Path) -> None:
    writer = Writer()
    writer.say(0, "broker.started")
    with asked(tmp_path, writer) as logs:
        for view in VIEWS:
            logs.query(f"FROM {view}")


def test_the_views_work_by_themselves_in_plain_duckdb(tmp_path: Path) -> None:
    writer = Writer()
    writer.round(0, saved_bytes=5)
    writer.save(tmp_path / "a.log")
    with duckdb.connect() as connection:
        connection.execute("SET VARIABLE logs = ?", [[str(tmp_path / "*.log")]])
        connection.execute(views())
        for view in VIEWS:
            connection.execute(f"FROM {view}")
        assert connection.execute("SELECT saved_bytes FROM host_statistics").fetchall() == [(5,)]


def test_gauges_are_the_last_of_each_source_and_not_added_up_over_time(tmp_path: Path) -> None:
    one_host, other = Writer(host="h1"), Writer(host="h2")
    for at, saved in ((0, 10), (60, 30), (120, 20)):
        one_host.round(at, saved_bytes=saved, net_saved_bytes=saved)
        other.round(at, saved_bytes=100 + saved)
    with asked(tmp_path, one_host, other) as logs:
        assert one(logs, "SELECT sum(saved_bytes) FROM host_statistics") == 20 + 120
        assert one(logs, "SELECT sum(saved_bytes) FROM pool_statistics WHERE is_current") == 20 + 120
        [extremes] = logs.query("FROM host_extremes WHERE host = 'h1'")
        assert extremes["saved_bytes_max"] == 30
        assert extremes["saved_bytes_max_time"] == START + datetime.timedelta(seconds=60)
        assert extremes["saved_bytes_mean"] == 20
        logs.window(None, START + datetime.timedelta(seconds=90))
        assert one(logs, "SELECT sum(saved_bytes) FROM host_statistics") == 30 + 130
        steps = logs.query("FROM host_savings(INTERVAL 1 MINUTE) WHERE host = 'h1'")
        assert [step["saved_bytes"] for step in steps] == [10, 30]


def test_who_is_gone_is_not_current(tmp_path: Path) -> None:
    writer = Writer()
    writer.round(0, domains=("a", "b"), net_bytes=1)
    writer.round(60, domains=("a", "b"), net_bytes=2)
    writer.round(120, domains=("a",), net_bytes=3)
    # The next round has begun: nothing is gone for that.
    writer.say(180, "pool.statistics", pool="p")
    with asked(tmp_path, writer) as logs:
        rows = logs.query("SELECT domain, net_bytes, is_current FROM domain_statistics ORDER BY domain")
        assert rows == [
            {"domain": "a", "net_bytes": 3, "is_current": True},
            {"domain": "b", "net_bytes": 2, "is_current": False},
        ]
        assert one(logs, "SELECT stopped FROM host_statistics") is False
    writer.say(190, "broker.stopped")
    with asked(tmp_path, writer) as logs:
        assert one(logs, "SELECT stopped FROM host_statistics") is True


@pytest.mark.parametrize(
    ("started", "counts", "growth"),
    [
        (False, [[100, 150]], 50),  # what it had before the window is not in it
        (True, [[100, 150]], 150),  # it began in the window, so all of it is
        (True, [[100, 150], [30, 40]], 190),  # restarted: the second process begins at 0
        (True, [[100, 150, 20, 25]], 175),  # began anew within a process
        (False, [[7]], 0),
    ],
)
def test_counters_are_what_they_grew_by(tmp_path: Path, started: bool, counts: list[list[int]], growth: int) -> None:
    writers = []
    for number, said in enumerate(counts):
        writer = Writer(pid=100 + number)
        if started:
            writer.say(number * 1000, "broker.started")
        for at, count in enumerate(said):
            writer.round(number * 1000 + 1 + at, published_pages_total=count)
        writers.append(writer)
    with asked(tmp_path, *writers) as logs:
        assert one(logs, "SELECT growth FROM counters WHERE counter = 'published_pages_total'") == growth


def test_refusals_by_stage(tmp_path: Path) -> None:
    broker, agent = Writer(), Writer(host="g1", pid=7, service="sharearea-agent")
    about = {"pool": "p", "domain": "d"}
    for at, files in ((0, 5), (60, 3)):
        agent.say(at, "files.refused", stage="scan", reason="too-small", files=files, file_bytes=files * 10, **about)
    report = {"stage": "report", "reason": "excluded", **about}
    broker.say(1, "domain.joined", **about)
    broker.say(2, "files.refused", files=4, file_bytes=400, **report)
    broker.say(50, "domain.joined", **about)  # it came again, and all is reported anew
    broker.say(51, "files.refused", files=2, file_bytes=200, **report)
    broker.say(52, "files.refused", files=1, file_bytes=100, **report)
    for at in (70, 80):
        broker.say(at, "files.refused", stage="grant", reason="grant-budget", files=1, file_bytes=7, **about)
        agent.say(at, "files.plain", reason="lease-refused", files=2, **about)
    broker.say(90, "domain.refused", domain="z", reason="no-matching-rule", error="why")
    with asked(tmp_path, broker, agent) as logs:
        found = {
            (row["stage"], row["reason"]): (row["files"], row["bytes"], row["files_said"], row["bytes_said"])
            for row in logs.query("FROM refusals")
        }
        assert found == {
            ("scan", "too-small"): (3, 30, 8, 80),
            ("report", "excluded"): (3, 300, 7, 700),
            ("grant", "grant-budget"): (2, 14, 2, 14),
            ("attach", "lease-refused"): (4, None, 4, None),
        }
        [refused] = logs.query("SELECT host, domain, reason, times, error FROM domain_refusals")
        assert refused == {"host": "h1", "domain": "z", "reason": "no-matching-rule", "times": 1, "error": "why"}


@pytest.mark.parametrize("heard_at", [60, 61], ids=["in-the-same-millisecond", "later"])
def test_files_are_those_of_the_last_whole_ranking(tmp_path: Path, heard_at: float) -> None:
    writer = Writer()

    def ranking(at: float, *paths: str) -> None:
        for rank, path in enumerate(paths, 1):
            writer.say(at, "file.statistics", pool="p", rank=rank, path=path, held_bytes=1000 - rank, pages_owned=2)

    ranking(0, "/a", "/b", "/c")
    writer.round(1)
    ranking(60, "/b")  # being written: nothing else has been heard since
    with asked(tmp_path, writer) as logs:
        assert [row["path"] for row in logs.query("FROM files ORDER BY rank")] == ["/a", "/b", "/c"]
    writer.round(heard_at)
    with asked(tmp_path, writer) as logs:
        assert [row["path"] for row in logs.query("FROM files ORDER BY rank")] == ["/b"]
        assert one(logs, "SELECT mapped_bytes FROM files") == 8192


def test_owners_classes_and_budgets(tmp_path: Path) -> None:
    writer = Writer()
    figures: dict[str, Any] = {
        "slots_held_by_2": 5,
        "slots_mapped_2_times": 4,
        "mapped_text_bytes": 4096,
        "reported_data_bytes": 8192,
        "area_fill_ratio": 0.5,
        "grants_used": 10,
        "grants_max": 40,
        "grants_pinned": 1,
    }
    writer.round(0, domains=("a",), **figures)
    with asked(tmp_path, writer) as logs:
        owners = logs.query("SELECT kind, owners, slots FROM page_owners WHERE slots > 0 ORDER BY kind")
        assert owners == [{"kind": "held", "owners": "2", "slots": 5}, {"kind": "mapped", "owners": "2", "slots": 4}]
        classes = logs.query("SELECT domain, kind, class, bytes FROM page_classes WHERE bytes > 0 ORDER BY ALL")
        assert [tuple(row.values()) for row in classes] == [
            ("", "mapped", "text", 4096),
            ("", "reported", "data", 8192),
            ("a", "mapped", "text", 4096),
            ("a", "reported", "data", 8192),
        ]
        [budget] = logs.query("SELECT area_fill_ratio, grants_fill_ratio, grants_pinned FROM budgets")
        assert budget == {"area_fill_ratio": 0.5, "grants_fill_ratio": 0.25, "grants_pinned": 1}


def test_without_duckdb_it_says_what_to_install(tmp_path: Path) -> None:
    Writer().save(tmp_path / "a.log")
    code = (
        "import sys; sys.modules['duckdb'] = None; from sharearea.cli import main; "
        f"sys.exit(main(['stats', '--logs', {str(tmp_path / 'a.log')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "pip install 'sharearea[dashboard]'" in done.stderr

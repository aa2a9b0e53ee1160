"""What the broker says of itself: gathered lines, surveys, rankings, audits; and pools that only report."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from sharearea import stats
from sharearea.common import wire
from sharearea.common.events import EVENTS
from sharearea.engine import Settings
from sharearea.model import Fill, PeerClosed, Verdict, WithdrawReason
from tests.test_engine import PAGE, RULES, Broker, logged, of, offers, page, roots, u32s, verdicts
from tests.test_engine import fps as fps_of
from tests.test_stats import XenBroker, said

REPORT = replace(RULES, mode="report")


def pool_of(broker: Broker) -> Any:
    """The state of the pool."""
    return broker.engine.pools()["pool"]


def snapshot(broker: Broker) -> dict[str, Any]:
    """The pool's figures, which have to be all that a line wants."""
    figures = stats.pool_snapshot(pool_of(broker), 0, 0, broker.now)
    assert set(EVENTS["pool.statistics"].fields) <= set(figures)
    return figures


def domains(broker: Broker) -> dict[str, dict[str, Any]]:
    """The figures of each domain."""
    return {each["domain"]: each for each in stats.domain_snapshots({"pool": pool_of(broker)}, broker.now)}


# ------------------------------------------------------------------------------------------------------ mode = "report"


def test_a_pool_that_only_reports_publishes_and_grants_nothing() -> None:
    broker = Broker(REPORT)
    a, b = broker.join("a"), broker.join("b")
    done = broker.bring(a, 1, [1, 2, 3])
    assert verdicts(done, a) == {1: Verdict.REPORT_ONLY}, "after its pages have come"
    done += broker.bring(b, 1, [1, 2, 3])
    assert verdicts(done, b) == {1: Verdict.REPORT_ONLY}
    done += broker.ticks(10)
    done += broker.say(a, wire.Attach(u32s(1)))
    [denied] = of(done, a, wire.Denied)
    assert list(denied.reasons) == [Verdict.REPORT_ONLY]
    assert not [action for action in done if isinstance(action, Fill)]
    assert not of(done, a, wire.Fetch) + of(done, b, wire.Fetch)
    assert not offers(done, a) | offers(done, b)
    [refused] = logged(broker.ticks(2), "files.refused")
    assert (refused["reason"], refused["stage"], refused["files"]) == ("report-only", "grant", 1)


def test_a_pool_that_only_reports_says_what_sharing_would_bring() -> None:
    broker = Broker(replace(REPORT, k=3))
    peers = {name: broker.join(name) for name in ("a", "b", "c")}
    for peer in peers.values():
        broker.bring(peer, 1, [1, 2, 3])
    broker.bring(peers["a"], 2, [4, 5])
    broker.bring(peers["b"], 2, [4, 5])  # two of them: not enough
    figures = snapshot(broker)
    assert figures["mode"] == "report"
    assert figures["common_pages"] == 3
    assert figures["possible_saved_bytes"] == 2 * 3 * PAGE
    assert (figures["given_up_bytes"], figures["saved_bytes"], figures["pages_published"]) == (0, 0, 0)
    assert figures["self_shared_pages"] == 0
    of_a = domains(broker)["a"]
    assert (of_a["distinct_pages"], of_a["common_pages"]) == (5, 3)
    assert of_a["possible_given_up_bytes"] == 3 * PAGE
    assert of_a["possible_share_bytes"] == PAGE - 1  # a third of each page, rounded down
    assert of_a["possible_net_bytes"] == 2 * PAGE + 1


def test_what_waits_for_anothers_pages_is_taken_up_as_reported() -> None:
    broker = Broker(REPORT)
    a, b = broker.join("a"), broker.join("b")
    broker.report(a, 1, [1, 2])
    assert verdicts(broker.report(b, 7, [1, 2]), b) == {}
    done = broker.send_pages(a, 1, [1, 2])
    assert verdicts(done, a) == {1: Verdict.REPORT_ONLY}
    assert verdicts(done, b) == {7: Verdict.REPORT_ONLY}


# ------------------------------------------------------------------------------------------------------------- figures


def test_pages_that_a_domain_has_twice_are_counted_apart() -> None:
    broker = Broker()
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2, 2, 0])  # 0 is the zero page
    broker.bring(a, 2, [1, 2, 2, 0])  # the same once more
    broker.bring(a, 3, [2, 3])
    broker.bring(b, 1, [9])
    assert snapshot(broker)["self_shared_pages"] == 8 - 3
    assert domains(broker)["a"]["self_shared_pages"] == 5
    assert domains(broker)["b"]["self_shared_pages"] == 0
    broker.say(a, wire.Gone(u32s(2)))
    broker.ticks(2)
    assert domains(broker)["a"]["self_shared_pages"] == 5 - 3
    broker.feed(PeerClosed(a, "end"))
    assert snapshot(broker)["self_shared_pages"] == 0


def test_a_survey_in_steps_finds_the_same() -> None:
    broker = Broker()
    a, b, c = (broker.join(name) for name in "abc")
    for peer, symbols in ((a, range(1, 40)), (b, range(20, 60)), (c, range(30, 35))):
        broker.bring(peer, 1, list(symbols))
    whole, parts = stats.survey(pool_of(broker)), stats.Survey(pool_of(broker))
    steps = 1
    while not parts.step(7):
        steps += 1
    assert steps == -(-60 // 7)
    assert (parts.common, parts.copies, parts.saved_bytes) == (whole.common, whole.copies, whole.saved_bytes)
    assert whole.common == 20
    assert whole.saved_bytes == (20 + 5) * PAGE
    for domain in "abc":
        number = broker.index.domains[domain].number
        assert parts.domain(number) == whole.domain(number)
    assert whole.of(pool_of(broker))
    assert not whole.of(pool_of(Broker()))


@pytest.mark.parametrize("kind", [Broker, XenBroker])
def test_page_classes_go_from_reports_to_figures(kind: type[Broker]) -> None:
    broker = kind()
    a, b = broker.join("a"), broker.join("b")
    classes = struct.pack("<4I", 1, 2, 0, 4)  # of 6 pages, 2 are text, 2 read-only data
    for peer in (a, b):
        message = roots((1, 6 * PAGE, 6, wire.NO_ROOT, b"/usr/lib"))
        broker.say(peer, replace(message, classes=classes))
        done = broker.send_pages(peer, 1, [1, 2, 3, 4, 5, 6])
    for peer in (a, b):
        for fetch in of(done, peer, wire.Fetch):
            done = done + broker.deliver(peer, fetch, [1, 2, 3, 4, 5, 6])
    broker.say(a, wire.Attach(u32s(1)))
    figures = snapshot(broker)
    assert [figures[f"reported_{name}_bytes"] for name in ("text", "rodata", "data")] == [4 * PAGE] * 3
    kinds = ("text", "rodata", "data", "unclassified")
    assert [figures[f"mapped_{name}_bytes"] for name in kinds] == [2 * PAGE, 2 * PAGE, 2 * PAGE, 0]
    assert domains(broker)["b"]["mapped_text_bytes"] == 0
    broker.say(a, wire.Release(u32s(1)))
    assert [snapshot(broker)[f"mapped_{name}_bytes"] for name in kinds] == [0, 0, 0, 0]


def test_classes_of_a_part_of_a_file_are_of_that_part() -> None:
    broker = Broker()
    a = broker.join("a")
    message = roots((1, 20 * PAGE, 3, wire.NO_ROOT, b"/usr/lib"))
    broker.say(a, replace(message, classes=struct.pack("<4I", 2, 4, 0, 8)))
    broker.say(a, wire.Pages(u32s(1, 1, 2, 1, 19, 1), fps_of([1, 2, 3])))
    assert domains(broker)["a"]["reported_text_bytes"] == PAGE
    assert domains(broker)["a"]["reported_rodata_bytes"] == PAGE
    assert domains(broker)["a"]["reported_data_bytes"] == PAGE


def test_classes_beyond_the_file_are_a_strike() -> None:
    broker = Broker()
    a = broker.join("a")
    message = roots((1, 3 * PAGE, 3, wire.NO_ROOT, b"/usr/lib"))
    done = broker.say(a, replace(message, classes=struct.pack("<4I", 0, 0, 1, 3)))
    [strike] = logged(done, "peer.strike")
    assert strike["reason"] == "malformed"


def test_owners_of_an_earlier_broker_have_no_class_until_they_are_reported() -> None:
    first = Broker()
    a, _ = first.share([1, 2, 3], "a", "b")
    first.say(a, wire.Attach(u32s(1)))
    second = Broker(record=first.record())
    assert snapshot(second)["mapped_unclassified_bytes"] == 3 * PAGE
    peer = second.join("a", held=(1,))
    message = roots((1, 3 * PAGE, 3, wire.NO_ROOT, b"/usr/lib"))
    second.say(peer, replace(message, classes=struct.pack("<4I", 0, 1, 0, 2)))
    second.send_pages(peer, 1, [1, 2, 3])
    figures = snapshot(second)
    assert [figures[f"mapped_{name}_bytes"] for name in ("text", "rodata", "data", "unclassified")] == [
        PAGE,
        PAGE,
        PAGE,
        0,
    ]


def test_files_are_ranked_by_what_their_copies_take() -> None:
    broker = Broker()
    peers = [*broker.share([1, 2, 3], "a", "b"), broker.join("c")]
    broker.bring(peers[2], 1, [1, 2, 3])
    broker.say(peers[0], wire.Attach(u32s(1)))
    broker.bring(peers[0], 2, list(range(10, 18)))
    broker.bring(peers[0], 3, [50])
    ranking = stats.Ranking(pool_of(broker), 2)
    while not ranking.step(1):
        pass
    rows = list(ranking.rows())
    for row in rows:
        assert set(EVENTS["file.statistics"].fields) <= set(row)
    assert [(row["rank"], row["held_bytes"]) for row in rows] == [(1, 9 * PAGE), (2, 8 * PAGE)]
    assert (rows[0]["domains"], rows[0]["files"], rows[0]["pages"]) == (3, 3, 3)
    assert (rows[0]["pages_in_area"], rows[0]["pages_owned"]) == (3, 3)
    assert [row["possible_saved_bytes"] for row in rows] == [6 * PAGE, 0]
    assert rows[0]["path"] == "/usr/f"
    for peer in peers:
        broker.feed(PeerClosed(peer, "end"))
    broker.ticks(40)
    assert list(ranking.rows()) == [], "what is gone meanwhile is no row"


def test_a_host_adds_up_what_pools_share() -> None:
    pool = {
        "domains": 2,
        "area_bytes": 100,
        "given_up_bytes": 1000,
        "overhead_bytes": 300,
        "possible_saved_bytes": 5,
        "store_bytes": 50,
        "table_bytes": 70,
    }
    figures = stats.host_snapshot([pool, pool], 50, 400)
    # Of each pool's 300, 180 are agents'; the store counts once, the tables are the broker's memory.
    assert figures["overhead_bytes"] == 2 * 180 + 50 + 400
    assert figures["saved_bytes"] == 1800
    assert figures["net_saved_bytes"] == 1800 - 810
    assert figures["pools"] == 2


# -------------------------------------------------------------------------------------------------------------- audits


@pytest.mark.parametrize("kind", [Broker, XenBroker])
def test_an_audit_finds_what_does_not_add_up(kind: type[Broker]) -> None:
    broker = kind()
    a, b = broker.share([1, 2, 3, 4], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.say(b, wire.Attach(u32s(1)))
    pool = pool_of(broker)
    assert stats.audit(pool) == []
    if isinstance(broker, XenBroker):
        broker.busy = set(range(1000))
        broker.say(b, wire.Release(u32s(1)))
        assert snapshot(broker)["grants_pinned"] == 4
        assert stats.audit(pool) == [], "what is pinned counts"
        pool.ledger.give_back(pool.domids["a"], struct.pack("<II", *_first_reference(pool)))
        assert stats.audit(pool) == ["grants-differ"]
    pool.index.table.map(u32s(0, 0, 1))
    assert "mappings-differ" in stats.audit(pool)
    pool.index.segments.clear()
    assert "slots-beyond-area" in stats.audit(pool)


def _first_reference(pool: Any) -> tuple[int, int]:
    owner = pool.index.owners["a", 1]
    first, _ = struct.unpack_from("<II", owner.refs)
    return first, 1


def test_a_sample_goes_round_through_all_slots() -> None:
    broker = Broker(slots_per_segment=12)
    a, b = broker.share([*range(1, 9)], "a", "b")
    for file, symbols in ((2, range(9, 17)), (3, range(17, 21))):
        done = broker.bring(a, file, [*symbols]) + broker.bring(b, file, [*symbols])
        for peer in (a, b):
            for fetch in of(done, peer, wire.Fetch):
                broker.deliver(peer, fetch, [*symbols])
    pool = pool_of(broker)
    assert len(pool.index.segments) == 2
    want = {page(symbol) for symbol in range(1, 21)}
    seen: dict[int, bytes] = {}
    at = 0
    for _ in range(40):
        stretches, at = stats.sample(pool, at)
        assert len(stretches) <= stats.CHECK_STRETCHES
        for first, prints in stretches:
            for i in range(len(prints) // 32):
                assert fps_of([_symbol(broker.area[first + i])]) == prints[i * 32 : i * 32 + 32]
                seen[first + i] = broker.area[first + i]
    assert set(seen.values()) == want
    assert stats.sample(pool_of(Broker()), 5) == ([], 0)


def _symbol(data: bytes) -> int:
    return next(symbol for symbol in range(1, 21) if page(symbol) == data)


# ------------------------------------------------------------------------------------------------------ gathered lines


def test_twenty_thousand_files_are_a_handful_of_lines() -> None:
    """Shared, refused and given back by two domains within a minute."""
    rules = replace(RULES, max_files=12_000, min_file_bytes=2 * PAGE)
    broker = Broker(rules, Settings(tally_interval=10.0), slots_per_segment=1024)
    a, b = broker.join("a"), broker.join("b")
    at = len(broker.trace)
    for start in range(0, 10_000, 200):
        for peer in (a, b):
            some = range(start, start + 200)
            kinds = [[7, 8] if file % 2 else [9] for file in some]
            names = [b"/usr/%d" % file for file in some]
            sizes = [len(symbols) * PAGE for symbols in kinds]
            files = [
                (file, size, len(symbols), wire.NO_ROOT, name)
                for file, size, symbols, name in zip(some, sizes, kinds, names, strict=True)
            ]
            broker.say(peer, roots(*files))
            for file in some:
                if file % 2:
                    done = broker.send_pages(peer, file, [7, 8])
                    for fetch in of(done, peer, wire.Fetch):
                        broker.deliver(peer, fetch, [7, 8])
        broker.tick(0.5)
        for peer in (a, b):
            for first in range(start, start + 200, 64):
                odd = [file for file in range(first, min(first + 64, start + 200)) if file % 2]
                broker.say(peer, wire.Attach(u32s(*odd)))
    for peer in (a, b):
        for start in range(1, 10_000, 200):
            broker.say(peer, wire.Release(u32s(*range(start, start + 200, 2))))
    broker.ticks(30)
    done = broker.trace[at:]
    lines = [action for action in done if hasattr(action, "event") and hasattr(action, "fields")]
    assert len(lines) < 60, [action.event for action in lines]
    shared = logged(done, "files.shared")
    assert sum(int(str(line["files"])) for line in shared) == 10_000
    assert sum(int(str(line["pages"])) for line in shared) == 20_000
    assert all(len(list(line["examples"])) == 3 for line in shared)  # type: ignore[call-overload]
    refused = logged(done, "files.refused")
    assert {(line["reason"], line["stage"]) for line in refused} == {("too-small", "report")}
    assert sum(int(str(line["files"])) for line in refused) == 10_000
    assert sum(int(str(line["file_bytes"])) for line in refused) == 10_000 * PAGE
    assert sum(int(str(line["files"])) for line in logged(done, "pages.released")) == 10_000


def test_who_asks_for_pages_back_and_why_is_said() -> None:
    broker = Broker()
    a, _ = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.run(broker.engine.detach("pool", "a", True, broker.now))
    [withdraw] = of(broker.trace, a, wire.Withdraw)
    assert withdraw.reason == WithdrawReason.OPERATOR
    broker.say(a, wire.Release(u32s(1)))
    broker.say(a, wire.Attach(u32s(1)))
    done = broker.ticks(2)
    [line] = logged(done, "files.withdrawn")
    assert line == {
        "pool": "pool",
        "domain": "a",
        "reason": "operator",
        "files": 1,
        "pages": 2,
        "file_bytes": 2 * PAGE,
        "examples": ["/usr/f"],
    }
    assert logged(done, "pages.released") == [{"pool": "pool", "domain": "a", "files": 1, "pages": 2}]
    assert [line["reason"] for line in logged(done, "files.refused")] == ["detached"]


def test_what_was_gathered_is_said_at_the_end() -> None:
    broker = Broker(settings=Settings(tally_interval=1000.0))
    broker.tick(1.0)
    a, _ = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.say(a, said(2))
    assert not logged(broker.trace, "files.shared")
    words = broker.engine.last_words(broker.now)
    assert {"files.shared", "pages.granted", "pages.published"} == {getattr(word, "event", "") for word in words}
    assert broker.engine.last_words(broker.now) == []

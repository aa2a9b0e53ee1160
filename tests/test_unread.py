"""Files that a domain knows and has not read: what the broker makes of them, and when the agent takes their pages from
the area instead of from the disk. docs/cold-start.md.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from sharearea.common import wire as broker_wire
from sharearea.model import Action
from sharearea.stats import survey
from sharearea_agent import agent as ag
from sharearea_agent.agent import Agent, FileIdentity, FileKey, Observation, Settings
from sharearea_agent.common import wire
from sharearea_agent.consumer_wire import MAPPED_DONE
from tests.test_engine import PAGE as PAGE_SIZE
from tests.test_engine import RULES, Broker, denials, fetches, file_root, fps, of, offers, roots, verdicts

SYMBOLS = [1, 2, 3]
SIZE = len(SYMBOLS) * PAGE_SIZE

# --------------------------------------------------------------------------------------------------------- the broker


def unread(broker: Broker, peer: int, symbols: list[int], file: int = 7) -> list[Action]:
    """Report a file that the domain has nothing of in memory."""
    size = len(symbols) * PAGE_SIZE
    return broker.say(peer, roots((file, size, 0, file_root(size, fps(symbols)), b"/usr/f")))


def test_what_the_area_has_is_offered_to_who_has_not_read_it() -> None:
    broker = Broker()
    broker.share(SYMBOLS, "a", "b")
    peer = broker.join("c")
    done = unread(broker, peer, SYMBOLS)
    assert verdicts(done, peer) == {7: broker_wire.Verdict.KNOWN}
    assert offers(done, peer) == {7: 3}
    done = broker.say(peer, broker_wire.Attach(array("I", (7,)).tobytes()))
    assert [granted.file for granted in of(done, peer, broker_wire.Granted)] == [7]


def test_what_nobody_has_brought_is_not_asked_for() -> None:
    broker = Broker()
    peer = broker.join("c")
    assert verdicts(unread(broker, peer, SYMBOLS), peer) == {7: broker_wire.Verdict.NOT_RESIDENT}
    assert denials(broker.say(peer, broker_wire.Attach(array("I", (7,)).tobytes())), peer) == {
        7: broker_wire.Verdict.NOT_REPORTED
    }
    # Nothing is kept of it: it may be asked again, or be reported as read.
    assert verdicts(unread(broker, peer, SYMBOLS), peer) == {7: broker_wire.Verdict.NOT_RESIDENT}
    assert verdicts(broker.report(peer, 7, SYMBOLS), peer) == {7: broker_wire.Verdict.WANTED}


def test_who_has_not_read_it_is_no_holder() -> None:
    """Neither for k, nor when bytes are wanted, nor in what could be saved."""
    broker = Broker()
    first = broker.join("a")
    broker.bring(first, 1, SYMBOLS)
    peer = broker.join("c")
    assert fetches(unread(broker, peer, SYMBOLS)) == []
    pool = broker.engine.pools()["pool"]
    assert survey(pool).saved_bytes == 0
    assert pool.index.domains["c"].pages == 0
    assert pool.index.domains["c"].size_bytes == SIZE
    second = broker.join("b")
    done = broker.bring(second, 1, SYMBOLS)
    asked = fetches(done)
    assert asked
    assert {to for to, _ in asked} <= {first, second}
    done = [action for to, fetch in asked for action in broker.deliver(to, fetch, SYMBOLS)]
    assert offers(done, peer) == {7: 3}
    assert survey(pool).saved_bytes == SIZE


def test_who_has_read_it_is_a_holder_under_the_same_number() -> None:
    broker = Broker()
    broker.bring(broker.join("a"), 1, SYMBOLS)
    peer = broker.join("b")
    unread(broker, peer, SYMBOLS)
    done = broker.report(peer, 7, SYMBOLS)
    assert verdicts(done, peer) == {7: broker_wire.Verdict.KNOWN}
    assert fetches(done)
    content = broker.index.find(file_root(SIZE, fps(SYMBOLS)))
    assert (content.holders, content.unread) == ({"a": {1}, "b": {7}}, {})
    assert broker.index.domains["b"].pages == 3
    assert broker.index.domains["b"].size_bytes == SIZE


@pytest.mark.parametrize(("symbols", "short"), [([4, 5, 6], 0), (SYMBOLS, 5), ([1, 2], 0)])
def test_it_must_be_the_same_that_was_asked_for(symbols: list[int], short: int) -> None:
    broker = Broker()
    broker.bring(broker.join("a"), 1, SYMBOLS)
    peer = broker.join("b")
    unread(broker, peer, SYMBOLS)
    assert of(broker.report(peer, 7, symbols, short=short), peer, broker_wire.Refused)


def test_what_only_unread_files_have_stays_in_the_area_until_they_are_gone() -> None:
    broker = Broker()
    peers = broker.share(SYMBOLS, "a", "b")
    peer = broker.join("c")
    unread(broker, peer, SYMBOLS)
    for other in peers:
        broker.say(other, broker_wire.Gone(array("I", (1,)).tobytes()))
    assert broker.published() == {fps([symbol]) for symbol in SYMBOLS}
    broker.say(peer, broker_wire.Gone(array("I", (7,)).tobytes()))
    assert broker.published() == set()


def test_one_content_read_in_one_file_and_not_in_another() -> None:
    broker = Broker()
    broker.bring(broker.join("a"), 1, SYMBOLS)
    peer = broker.join("b")
    unread(broker, peer, SYMBOLS)
    content = broker.index.find(file_root(SIZE, fps(SYMBOLS)))
    broker.report(peer, 8, SYMBOLS)
    assert content.holders == {"a": {1}, "b": {8}}
    assert content.unread == {"b": {7}}
    broker.say(peer, broker_wire.Gone(array("I", (8,)).tobytes()))
    assert content.holders == {"a": {1}}
    broker.ticks(3)
    assert broker.index.table.want(content.ids, 2) == b""
    assert broker.index.domains["b"].nonzero_pages == 0


@pytest.mark.parametrize("root", [broker_wire.NO_ROOT, None])
def test_only_a_root_can_be_asked_for(root: bytes | None) -> None:
    broker = Broker()
    peer = broker.join("a")
    done = broker.say(peer, roots((1, SIZE, 0, root or bytes(31) + b"\1", b"/usr/f")))
    assert bool(of(done, peer, broker_wire.Refused)) is (root is not None)


def test_unread_files_count_for_the_quota() -> None:
    broker = Broker(replace(RULES, max_bytes=SIZE))
    broker.bring(broker.join("a"), 1, SYMBOLS)
    peer = broker.join("b")
    assert verdicts(unread(broker, peer, SYMBOLS, 7), peer) == {7: broker_wire.Verdict.KNOWN}
    assert verdicts(unread(broker, peer, SYMBOLS, 8), peer) == {8: broker_wire.Verdict.QUOTA_BYTES}


# ---------------------------------------------------------------------------------------------------------- the agent

PAGES = 100
KEY = FileKey(1, 2)
IDENTITY = FileIdentity(PAGES * wire.PAGE_SIZE, 1, 1)
WELCOME = wire.Welcome(wire.PROTOCOL_VERSION, "g", "p", bytes(16), bytes(16), bytes(32), 8, 1, 1 << 20, 10, ("**",), ())
ROOT = b"r" * 32


def seen(*, resident: bool, proven: bool = True, identity: FileIdentity = IDENTITY) -> Observation:
    return Observation(b"/usr/f", KEY, identity, ROOT, None, PAGES, 4, proven=proven, resident=resident)


class Guest:
    """An agent that knows one file, of which nothing is resident."""

    def __init__(self) -> None:
        self.agent = Agent(Settings("g", "1", bytes(16)), lambda: 0.5)
        self.now = 100.0
        self.said = self.feed(ag.LinkUp(), ag.FromBroker(WELCOME), ag.Observed((seen(resident=False),)), ag.LinkReady())

    def feed(self, *events: ag.Event) -> list[ag.Action]:
        return self.agent.handle_all(events, self.now)

    def tick(self, seconds: float) -> list[ag.Action]:
        self.now += seconds
        return self.feed(ag.Tick())

    def verdict(self, verdict: wire.Verdict, file: int = 1) -> list[ag.Action]:
        return self.feed(ag.FromBroker(wire.Verdicts(array("I", (file,)).tobytes(), bytes((verdict,)))))

    def offer(self, file: int = 1, pages: int = PAGES) -> list[ag.Action]:
        return self.feed(ag.FromBroker(wire.Offer(array("I", (file,)).tobytes(), array("I", (pages,)).tobytes())))

    def grant(self, pages: int = PAGES) -> ag.ShareWith:
        self.feed(ag.LeaseTaken(KEY, IDENTITY))
        done = self.feed(ag.FromBroker(wire.Granted(1, array("I", (0, 8, pages)).tobytes())))
        (share,) = [action for action in done if isinstance(action, ag.ShareWith)]
        return share

    def file(self) -> dict[str, object]:
        status = self.agent.file_status(b"/usr/f")
        assert status is not None
        return status


def counts(actions: list[ag.Action]) -> list[int]:
    """How many pages were reported of each file."""
    messages = [action.message for action in actions if isinstance(action, ag.Send)]
    return [count for said in messages if isinstance(said, wire.Roots) for count in array("I", said.counts)]


def plain(actions: list[ag.Action]) -> list[str]:
    return [action.reason for action in actions if isinstance(action, ag.StayPlain)]


def test_a_file_that_nobody_read_is_asked_for_by_its_root() -> None:
    guest = Guest()
    assert counts(guest.said) == [0]
    assert guest.agent.status()["resident_pages"] == 0
    assert guest.agent.status()["zero_pages"] == 0


def test_a_program_gets_it_without_its_being_read() -> None:
    guest = Guest()
    guest.verdict(wire.Verdict.KNOWN)
    guest.offer()
    done = guest.feed(ag.Opened(1, 1, KEY))
    assert [type(action) for action in done] == [ag.TakeLease]
    share = guest.grant()
    assert share.proven
    guest.feed(ag.Compared(KEY, share.generation, 10), ag.ConsumerMapped(1, 1, share.generation, PAGES, MAPPED_DONE))
    assert guest.file()["unread_pages"] == 90
    guest.feed(ag.Dropped(10, ((KEY, 15),)))  # somebody has read five more
    assert guest.agent.status()["unread_pages"] == 75  # the ten counted twice: never too many


def test_what_was_compared_after_all_is_not_unread() -> None:
    guest = Guest()
    guest.verdict(wire.Verdict.KNOWN)
    guest.offer()
    guest.feed(ag.Opened(1, 1, KEY))
    share = guest.grant()
    guest.feed(ag.Compared(KEY, share.generation, PAGES))
    assert guest.file()["unread_pages"] == 0


def test_where_nobody_says_what_was_compared_nothing_counts() -> None:
    """As of a file that the agent has read itself: what was dropped is no proof that the rest was never read."""
    guest = Guest()
    guest.verdict(wire.Verdict.KNOWN)
    guest.offer()
    guest.feed(ag.Opened(1, 1, KEY))
    guest.grant()
    guest.feed(ag.Dropped(10, ((KEY, 15),)))
    assert guest.file()["unread_pages"] == 0


def test_pages_of_one_content_are_unread_once() -> None:
    """Let go of, attached anew, replaced: they are counted once."""
    guest = Guest()
    guest.verdict(wire.Verdict.KNOWN)
    guest.offer()
    guest.feed(ag.Opened(1, 1, KEY))
    for _ in range(2):
        share = guest.grant()
        guest.feed(ag.Compared(KEY, share.generation, 0))
        assert guest.agent.status()["unread_pages"] == PAGES
        guest.feed(ag.Detach(None))
        guest.feed(ag.ConsumerLetGo(1, 1, share.generation))
        guest.feed(ag.Reattach())
    assert guest.agent.status()["unread_pages"] == PAGES
    guest.feed(ag.Detach(None), ag.Observed((seen(resident=True, identity=FileIdentity(IDENTITY.size, 2, 2)),)))
    guest.feed(ag.LeaseRefused(KEY, "written"))
    assert guest.agent.status()["unread_pages"] == PAGES
    assert guest.file()["unread_pages"] == 0


def test_without_proof_everything_is_compared() -> None:
    guest = Guest()
    guest.feed(ag.Observed((seen(resident=True, proven=False, identity=FileIdentity(IDENTITY.size, 2, 2)),)))
    guest.feed(ag.LinkReady())
    guest.verdict(wire.Verdict.KNOWN, 2)
    guest.offer(2)
    guest.feed(ag.Opened(1, 1, KEY))
    guest.feed(ag.LeaseTaken(KEY, FileIdentity(IDENTITY.size, 2, 2)))
    done = guest.feed(ag.FromBroker(wire.Granted(2, array("I", (0, 8, PAGES)).tobytes())))
    assert [action.proven for action in done if isinstance(action, ag.ShareWith)] == [False]


def test_another_identity_under_the_lease_is_not_shared() -> None:
    guest = Guest()
    guest.verdict(wire.Verdict.KNOWN)
    guest.offer()
    guest.feed(ag.Opened(1, 1, KEY))
    done = guest.feed(ag.LeaseTaken(KEY, FileIdentity(IDENTITY.size, 1, 2)))
    assert plain(done) == ["changed"]
    assert ag.Rescan(b"/usr/f") in done


def test_a_file_that_was_read_meanwhile_is_reported_as_a_copy() -> None:
    guest = Guest()
    guest.verdict(wire.Verdict.NOT_RESIDENT)
    done = guest.feed(ag.Observed((seen(resident=True),)), ag.LinkReady())
    assert counts(done) == [PAGES]
    assert guest.agent.status()["resident_pages"] == PAGES
    assert guest.feed(ag.Observed((seen(resident=False),)), ag.LinkReady()) == []  # evicted again: it stays known


def test_who_opens_it_waits_for_the_broker_and_not_for_long() -> None:
    guest = Guest()
    assert plain(guest.feed(ag.Opened(1, 1, KEY))) == []  # no verdict yet
    assert plain(guest.verdict(wire.Verdict.NOT_RESIDENT)) == ["not-resident"]
    # Asked again for the next one: somebody may have brought it.
    done = guest.feed(ag.Opened(2, 1, KEY), ag.LinkReady())
    assert (plain(done), counts(done)) == ([], [0])
    guest.verdict(wire.Verdict.KNOWN)
    assert plain(guest.tick(0.1)) == []
    assert plain(guest.tick(0.5)) == ["not-offered"]
    assert plain(guest.tick(5)) == []
    assert any(isinstance(action, ag.TakeLease) for action in guest.offer())


def test_who_waits_and_goes_is_forgotten() -> None:
    guest = Guest()
    guest.feed(ag.Opened(1, 1, KEY), ag.ConsumerGone(1))
    assert plain(guest.tick(1)) == []


def test_a_link_that_is_lost_ends_the_waiting() -> None:
    guest = Guest()
    guest.feed(ag.Opened(1, 1, KEY))
    guest.feed(ag.LinkDown("gone"))
    assert plain(guest.tick(1)) == ["no-broker"]

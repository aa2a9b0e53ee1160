"""The broker's decisions, one by one: what each event brings about, in which order, and what it costs whom.

A `Broker` here carries out Fill, Move and Commit as the loop does, on dicts, and can be told to fail; all else is
only collected. Long sequences, crashes at any point and both sides together are the simulation's (sim.py).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from sharearea.common import wire
from sharearea.engine import Engine, PoolSetup, Settings
from sharearea.model import (
    Action,
    Change,
    CloseSegment,
    Commit,
    CommitFailed,
    Committed,
    Event,
    Fill,
    Filled,
    FillFailed,
    Identity,
    Log,
    Malformed,
    Move,
    OwnerCleared,
    OwnerSet,
    PeerClosed,
    PeerConnected,
    PoolOpened,
    PoolRecord,
    Received,
    SegmentClosed,
    SegmentOpened,
    Send,
    SendSegment,
    SlotsFilled,
    SlotsFreed,
    Tick,
    Verdict,
    WithdrawReason,
)
from sharearea.pagetable import ReferencePageTable
from sharearea.policy import DomainRule, Policy, PoolRules

PAGE = wire.PAGE_SIZE
UID = 1000
RULES = PoolRules("pool", exclude=("*.key",), include=("/usr/**",), min_file_bytes=2, max_file_bytes=100 * PAGE)
SETTINGS = Settings()
INSTANCE = b"i" * 16
M = TypeVar("M", bound=wire.Message)


def u32s(*values: int) -> bytes:
    return array("I", values).tobytes()


def ints(column: bytes) -> list[int]:
    return array("I", column).tolist()


def page(symbol: int) -> bytes:
    return symbol.to_bytes(8, "little") * (PAGE // 8)


def fp(symbol: int) -> bytes:
    return hashlib.blake2b(page(symbol), digest_size=32).digest()


def fps(symbols: Iterable[int]) -> bytes:
    return b"".join(map(fp, symbols))


def file_root(size: int, fingerprints: bytes) -> bytes:
    return hashlib.blake2b(size.to_bytes(8, "little") + fingerprints, digest_size=32, person=b"root").digest()


class Broker:
    """An engine, and around it what carries out its actions."""

    device = 7

    def __init__(
        self,
        rules: PoolRules = RULES,
        settings: Settings = SETTINGS,
        record: PoolRecord | None = None,
        slots_per_segment: int = 8,
    ) -> None:
        self.rules = rules
        policy = Policy({"pool": rules}, (DomainRule("pool", ("*",), (UID,), "test"),))
        self.engine = Engine(policy, {"pool": self.setup(record, slots_per_segment)}, file_root, settings)
        self.slots_per_segment = slots_per_segment
        self.now = 1000.0
        self.peers = 0
        self.area: dict[int, bytes] = {}
        self.segments = set(record.segments) if record is not None else set()
        self.trace: list[Action] = []
        self.changes: list[Change] = []
        self.no_room = False
        self.refuse_commit: Callable[[tuple[Change, ...]], bool] = lambda _: False
        self.run(self.engine.start(self.now))

    def setup(self, record: PoolRecord | None, slots_per_segment: int) -> PoolSetup:
        table = ReferencePageTable(bytes(40), fp(0), self.rules.max_domains, self.rules.max_pages)
        return PoolSetup(b"a" * 16, b"e" * 16, b"k" * 32, slots_per_segment, table, record)

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self, actions: Iterable[Action]) -> None:
        work = deque(actions)
        while work:
            action = work.popleft()
            self.trace.append(action)
            outcome = self.act(action)
            if outcome is not None:
                work.extend(self.engine.handle(outcome, self.now))

    def act(self, action: Action) -> Event | None:
        match action:
            case Fill():
                pages = [action.pages[at : at + PAGE] for at in range(0, len(action.pages), PAGE)]
                return self.fill(action.token, action.first, pages, action.want)
            case Move():
                pages = [self.area[slot] for slot in ints(action.slots)]
                return self.fill(action.token, action.first, pages, action.want)
            case Commit():
                if self.refuse_commit(action.changes):
                    return CommitFailed(action.token, "disk full")
                self.changes.extend(action.changes)
                return Committed(action.token)
        return None

    def fill(self, token: int, first: int, pages: list[bytes], want: bytes) -> Event:
        assert len(pages) * 32 == len(want)
        if self.no_room:
            return FillFailed(token, "no memory")
        segment = first // self.slots_per_segment
        opened = () if segment in self.segments else ((segment, self.device, 100 + segment),)
        self.segments.add(segment)
        ok = bytearray()
        for i, data in enumerate(pages):
            good = hashlib.blake2b(data, digest_size=32).digest() == want[i * 32 : i * 32 + 32]
            ok.append(good)
            if good:
                self.area[first + i] = data
        return Filled(token, bytes(ok), opened)

    def feed(self, event: Event) -> list[Action]:
        """Handle an event with all that follows; return what was done."""
        at = len(self.trace)
        self.run(self.engine.handle(event, self.now))
        return self.trace[at:]

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self.feed(Tick())

    def ticks(self, seconds: float) -> list[Action]:
        """Let time pass in steps of a second."""
        done = []
        for _ in range(int(seconds)):
            done += self.tick(1.0)
        return done

    # ---------------------------------------------------------------------------------------------------- the peers

    def connect(self, uid: int = UID) -> int:
        self.peers += 1
        self.feed(PeerConnected(self.peers, Identity("local", uid)))
        return self.peers

    def join(self, name: str, held: tuple[int, ...] = (), instance: bytes = INSTANCE) -> int:
        peer = self.connect()
        done = self.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", name, instance, u32s(*held)))
        assert of(done, peer, wire.Welcome)
        return peer

    def say(self, peer: int, message: wire.Message) -> list[Action]:
        return self.feed(Received(peer, message))

    def report(
        self, peer: int, file: int, symbols: list[int], *, path: bytes = b"/usr/f", short: int = 0
    ) -> list[Action]:
        """Report a file by its root; return the actions."""
        size = len(symbols) * PAGE - short
        root = file_root(size, fps(symbols))
        return self.say(peer, roots((file, size, len(symbols), root, path)))

    def send_pages(self, peer: int, file: int, symbols: list[int], first: int = 0) -> list[Action]:
        return self.say(peer, wire.Pages(u32s(file, first, len(symbols)), fps(symbols)))

    def bring(self, peer: int, file: int, symbols: list[int]) -> list[Action]:
        """Report a file, and its pages if they are wanted."""
        done = self.report(peer, file, symbols)
        if verdicts(done, peer) == {file: Verdict.WANTED}:
            done += self.send_pages(peer, file, symbols)
        return done

    def deliver(self, peer: int, fetch: wire.Fetch, symbols: list[int]) -> list[Action]:
        """Answer a fetch of a whole file with these pages."""
        pages = [symbols[first + i] for first, count in pairs(fetch.runs) for i in range(count)]
        return self.say(peer, wire.Data(fetch.request, b"\1" * len(pages), b"".join(map(page, pages))))

    def share(self, symbols: list[int], *names: str, file: int = 1) -> list[int]:
        """Let domains join and hold one file, all of it published; return their peers."""
        peers = [self.join(name) for name in names]
        for peer in peers:
            done = self.bring(peer, file, symbols)
        for peer in peers:
            for fetch in of(done, peer, wire.Fetch):
                done = done + self.deliver(peer, fetch, symbols)
        return peers

    @property
    def index(self) -> Any:
        return self.engine.pools()["pool"].index

    def published(self) -> set[bytes]:
        """Fingerprints in slots."""
        found = set()
        for segment in range(self.index.current_segment() + 1):
            slots, ids, _ = self.index.live(segment)
            for slot, fingerprint in zip(ints(slots), chunks(self.index.table.fps(ids)), strict=True):
                assert hashlib.blake2b(self.area[slot], digest_size=32).digest() == fingerprint
                found.add(fingerprint)
        return found

    def record(self) -> PoolRecord:
        """What the store has after all commits."""
        record = PoolRecord(b"a" * 16, self.slots_per_segment)
        slots = record.slots
        for change in self.changes:
            match change:
                case SegmentOpened():
                    record.segments[change.segment] = (change.dev, change.ino)
                case SegmentClosed():
                    del record.segments[change.segment]
                case SlotsFilled():
                    for i, fingerprint in enumerate(chunks(change.fingerprints)):
                        if fingerprint != bytes(32):
                            slots[change.first + i] = fingerprint
                case SlotsFreed():
                    for slot in ints(change.slots):
                        del slots[slot]
                case OwnerSet():
                    record.owners[change.domain, change.file] = change
                case OwnerCleared():
                    del record.owners[change.domain, change.file]
        return record

    def restarted(self, **more: Any) -> Broker:
        """A broker that finds this one's store and area."""
        other = Broker(record=self.record(), slots_per_segment=self.slots_per_segment, **more)
        other.area = self.area
        return other


def chunks(column: bytes) -> list[bytes]:
    return [column[at : at + 32] for at in range(0, len(column), 32)]


def pairs(runs: bytes) -> list[tuple[int, int]]:
    values = ints(runs)
    return list(zip(values[0::2], values[1::2], strict=True))


def roots(*files: tuple[int, int, int, bytes, bytes]) -> wire.Roots:
    ids, sizes, counts, names, paths = zip(*files, strict=True)
    classes = wire.NO_CLASSES * len(ids)
    return wire.Roots(u32s(*ids), array("Q", sizes).tobytes(), u32s(*counts), b"".join(names), tuple(paths), classes)


def of(actions: Iterable[Action], peer: int, kind: type[M]) -> list[M]:
    """The messages of one kind that were sent to a peer."""
    return [a.message for a in actions if isinstance(a, Send) and a.peer == peer and isinstance(a.message, kind)]


def verdicts(actions: Iterable[Action], peer: int) -> dict[int, Verdict]:
    found: dict[int, Verdict] = {}
    for message in of(actions, peer, wire.Verdicts):
        found |= {file: Verdict(v) for file, v in zip(ints(message.ids), message.verdicts, strict=True)}
    return found


def offers(actions: Iterable[Action], peer: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for message in of(actions, peer, wire.Offer):
        found |= dict(zip(ints(message.ids), ints(message.available), strict=True))
    return found


def denials(actions: Iterable[Action], peer: int) -> dict[int, Verdict]:
    found: dict[int, Verdict] = {}
    for message in of(actions, peer, wire.Denied):
        found |= {file: Verdict(v) for file, v in zip(ints(message.ids), message.reasons, strict=True)}
    return found


def refusal(actions: Iterable[Action], peer: int) -> str | None:
    """The reason with which a peer was sent away; whoever is refused is disconnected right after."""
    actions = list(actions)
    refused = [i for i, a in enumerate(actions) if isinstance(a, Send) and isinstance(a.message, wire.Refused)]
    if not refused:
        assert not [a for a in actions if type(a).__name__ == "Disconnect"]
        return None
    (at,) = refused
    sent = actions[at]
    assert isinstance(sent, Send)
    assert isinstance(sent.message, wire.Refused)
    assert sent.peer == peer
    assert type(actions[at + 1]).__name__ == "Disconnect"
    return sent.message.reason


def logged(actions: Iterable[Action], event: str) -> list[dict[str, object]]:
    return [action.fields for action in actions if isinstance(action, Log) and action.event == event]


def fetches(actions: Iterable[Action]) -> list[tuple[int, wire.Fetch]]:
    return [(a.peer, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, wire.Fetch)]


@pytest.fixture
def broker() -> Broker:
    return Broker()


# ----------------------------------------------------------------------------------------------------------- greeting


def test_a_new_pool_is_recorded_first(broker: Broker) -> None:
    assert broker.changes == [PoolOpened("pool", b"a" * 16, 8)]


def test_hello_is_answered_with_key_area_and_rules(broker: Broker) -> None:
    peer = broker.connect()
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "web", INSTANCE, b""))
    (welcome,) = of(done, peer, wire.Welcome)
    assert (welcome.domain, welcome.pool, welcome.area, welcome.epoch, welcome.key) == (
        "web",
        "pool",
        b"a" * 16,
        b"e" * 16,
        b"k" * 32,
    )
    assert (welcome.slots_per_segment, welcome.min_file_bytes, welcome.max_file_bytes) == (8, 2, 100 * PAGE)
    assert (welcome.include, welcome.exclude) == (("/usr/**",), ("*.key",))
    assert refusal(done, peer) is None
    assert logged(done, "domain.joined") == [{"domain": "web", "pool": "pool", "rule": "test", "uid": UID}]


def test_another_protocol_is_refused(broker: Broker) -> None:
    peer = broker.connect()
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION + 1, "0", "web", INSTANCE, b""))
    assert refusal(done, peer) == "protocol-version"
    assert of(done, peer, wire.Welcome) == []
    assert broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "web", INSTANCE, b"")) == []


@pytest.mark.parametrize(("name", "uid", "reason"), [("web", UID + 1, "no-matching-rule"), ("", UID, "bad-name")])
def test_policy_refuses(broker: Broker, name: str, uid: int, reason: str) -> None:
    peer = broker.connect(uid)
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", name, INSTANCE, b""))
    assert refusal(done, peer) == reason
    (refused,) = of(done, peer, wire.Refused)
    assert refused.retry_ms == 0


def test_nobody_joins_a_name_that_is_taken_until_its_agent_is_gone(broker: Broker) -> None:
    first, second = broker.join("web"), broker.connect()
    hello = wire.Hello(wire.PROTOCOL_VERSION, "0", "web", INSTANCE, b"")
    done = broker.say(second, hello)
    assert refusal(done, second) == "already-connected"
    assert of(done, second, wire.Refused)[0].retry_ms == 30_000
    assert of(done, second, wire.Welcome) == []
    broker.feed(PeerClosed(first, "end"))
    broker.join("web")


def test_a_pool_has_as_many_domains_as_it_may() -> None:
    broker = Broker(replace(RULES, max_domains=2))
    peers = [broker.join("a"), broker.join("b")]
    third = broker.connect()
    done = broker.say(third, wire.Hello(wire.PROTOCOL_VERSION, "0", "c", INSTANCE, b""))
    assert refusal(done, third) == "pool-full"
    broker.feed(PeerClosed(peers[0], "end"))
    broker.join("c")


@pytest.mark.parametrize(
    "message", [wire.Gone(b""), wire.Pong(1), wire.Attach(u32s(1))], ids=lambda message: type(message).__name__
)
def test_the_first_message_must_be_hello(broker: Broker, message: wire.Message) -> None:
    peer = broker.connect()
    assert refusal(broker.say(peer, message), peer) == "malformed"
    assert broker.say(peer, message) == []


def test_hello_comes_once(broker: Broker) -> None:
    peer = broker.join("web")
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "web", INSTANCE, b""))
    assert refusal(done, peer) == "malformed"


def test_who_says_nothing_or_breaks_the_format_is_sent_away(broker: Broker) -> None:
    silent, broken = broker.connect(), broker.join("web")
    assert refusal(broker.tick(20.0), silent) is None
    assert refusal(broker.tick(0.1), silent) == "no-hello"
    assert refusal(broker.feed(Malformed(broken, "a frame of 0 bytes")), broken) == "malformed"
    assert broker.index.domains == {}
    assert broker.feed(Malformed(broken, "again")) == []
    assert broker.feed(PeerClosed(broken, "end")) == []


def test_ping_pong_and_silence(broker: Broker) -> None:
    peer = broker.join("web")
    assert of(broker.ticks(15), peer, wire.Ping) == []
    (ping,) = of(broker.ticks(1), peer, wire.Ping)
    broker.say(peer, wire.Pong(ping.number))
    assert of(broker.ticks(15), peer, wire.Ping) == []
    (ping,) = of(broker.ticks(1), peer, wire.Ping)
    # Anything that is heard counts.
    broker.ticks(15)
    broker.say(peer, wire.Gone(b""))
    assert refusal(broker.ticks(15), peer) is None
    assert refusal(broker.ticks(6), peer) == "no-answer"


# ------------------------------------------------------------------------------------------------------------ reports


def test_an_unknown_root_is_wanted_a_known_one_costs_one_look_up(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    assert verdicts(broker.report(a, 1, [1, 2, 3]), a) == {1: Verdict.WANTED}
    assert verdicts(broker.send_pages(a, 1, [1, 2, 3]), a) == {}
    before = broker.index.table.totals().pages
    assert verdicts(broker.report(b, 9, [1, 2, 3]), b) == {9: Verdict.KNOWN}
    assert broker.index.table.totals().pages == before == 3
    assert len(broker.index.contents) == 1


def test_pages_may_come_in_parts(broker: Broker) -> None:
    a = broker.join("a")
    broker.report(a, 1, [1, 2, 3])
    broker.send_pages(a, 1, [1, 2])
    assert broker.index.contents == {}
    broker.send_pages(a, 1, [3], first=2)
    assert len(broker.index.contents) == 1


def test_policy_judges_every_file(broker: Broker) -> None:
    a = broker.join("a")
    root = b"r" * 32
    done = broker.say(
        a,
        roots(
            (1, 1, 1, root, b"/usr/small"),
            (2, 101 * PAGE, 101, root, b"/usr/large"),
            (3, PAGE, 1, root, b"/usr/x.key"),
            (4, PAGE, 1, root, b"/home/x"),
            (5, PAGE, 1, root, b"usr/../x"),
            (6, PAGE, 1, root, b"/usr/x"),
        ),
    )
    assert verdicts(done, a) == {
        1: Verdict.TOO_SMALL,
        2: Verdict.TOO_LARGE,
        3: Verdict.EXCLUDED,
        4: Verdict.NOT_INCLUDED,
        5: Verdict.EXCLUDED,
        6: Verdict.WANTED,
    }
    # An ignored file was not taken, and may come again.
    assert verdicts(broker.say(a, roots((3, PAGE, 1, root, b"/usr/x.key"))), a) == {3: Verdict.EXCLUDED}


@pytest.mark.parametrize(
    ("size", "count", "root"),
    [(2 * PAGE, 1, b"r" * 32), (PAGE + 1, 3, b"r" * 32), (PAGE, 0, bytes(32)), (PAGE, 2, bytes(32))],
)
def test_pages_that_do_not_make_the_file_are_malformed(broker: Broker, size: int, count: int, root: bytes) -> None:
    a = broker.join("a")
    assert refusal(broker.say(a, roots((1, size, count, root, b"/usr/f"))), a) == "malformed"


def test_a_file_is_reported_once_until_it_is_gone(broker: Broker) -> None:
    a = broker.join("a")
    broker.bring(a, 1, [1])
    broker.say(a, wire.Gone(u32s(1)))
    assert broker.index.contents == {}
    broker.bring(a, 1, [1])
    assert refusal(broker.report(a, 1, [1]), a) == "malformed"
    assert broker.index.contents == {}


@pytest.mark.parametrize(
    "parts",
    [
        ((1, 1, 1),),  # page 0 is missing
        ((1, 0, 0),),
        ((1, 0, 3),),  # more than the file has
        ((1, 0, 1), (1, 0, 1)),
        ((1, 0, 0xFFFFFFFF),),
    ],
)
def test_pages_that_do_not_belong_are_malformed(broker: Broker, parts: tuple[tuple[int, int, int], ...]) -> None:
    a = broker.join("a")
    broker.report(a, 1, [1, 2])
    count = min(sum(part[2] for part in parts), 10)
    done = broker.say(a, wire.Pages(u32s(*[n for part in parts for n in part]), fps(range(1, count + 1))))
    assert refusal(done, a) == "malformed"


def test_pages_of_a_file_that_was_given_up_are_passed_over(broker: Broker) -> None:
    a = broker.join("a")
    broker.report(a, 1, [1, 2])
    assert verdicts(broker.ticks(21), a) == {1: Verdict.NOT_REPORTED}
    assert broker.send_pages(a, 1, [1, 2]) == []
    assert broker.index.contents == {}
    assert verdicts(broker.report(a, 1, [1, 2]), a) == {1: Verdict.WANTED}


def test_of_two_domains_with_one_root_one_is_asked(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    assert verdicts(broker.report(a, 1, [1, 2]), a) == {1: Verdict.WANTED}
    assert verdicts(broker.report(b, 7, [1, 2]), b) == {}
    done = broker.send_pages(a, 1, [1, 2])
    assert verdicts(done, b) == {7: Verdict.KNOWN}
    assert len(fetches(done)) == 1


@pytest.mark.parametrize("how", ["dies", "hangs", "lies", "takes it back"])
def test_if_the_one_does_not_deliver_the_next_is_asked(broker: Broker, how: str) -> None:
    a, b, c = broker.join("a"), broker.join("b"), broker.join("c")
    broker.report(a, 1, [1, 2])
    broker.report(b, 7, [1, 2])
    broker.report(c, 8, [1, 2])
    if how == "dies":
        done = broker.feed(PeerClosed(a, "end"))
    elif how == "hangs":
        done = broker.ticks(21)
        assert verdicts(done, a) == {1: Verdict.NOT_REPORTED}
    elif how == "lies":
        done = broker.send_pages(a, 1, [1, 3])
        assert verdicts(done, a) == {1: Verdict.ROOT_MISMATCH}
        assert logged(done, "peer.strike")[0]["reason"] == "root-mismatch"
    else:
        done = broker.say(a, wire.Gone(u32s(1)))
    assert verdicts(done, b) == {7: Verdict.WANTED}
    assert verdicts(done, c) == {}
    done = broker.send_pages(b, 7, [1, 2])
    assert verdicts(done, c) == {8: Verdict.KNOWN}


def test_who_waits_may_leave_or_take_it_back(broker: Broker) -> None:
    a, b, c, d = (broker.join(name) for name in "abcd")
    for peer in (a, b, c, d):
        broker.report(peer, 1, [1])
    broker.feed(PeerClosed(b, "end"))
    broker.say(c, wire.Gone(u32s(1)))
    done = broker.feed(PeerClosed(a, "end"))
    assert verdicts(done, c) == {}
    assert verdicts(done, d) == {1: Verdict.WANTED}


def test_a_root_with_another_size_is_not_what_was_brought(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.report(a, 1, [1, 2])
    broker.say(b, roots((7, 2 * PAGE - 1, 2, file_root(2 * PAGE, fps([1, 2])), b"/usr/f")))
    assert verdicts(broker.send_pages(a, 1, [1, 2]), b) == {7: Verdict.ROOT_MISMATCH}
    # Once it is known as well: only its own pages could prove it, and they do not.
    b_again = roots((8, 2 * PAGE - 1, 2, file_root(2 * PAGE, fps([1, 2])), b"/usr/f"))
    assert verdicts(broker.say(b, b_again), b) == {8: Verdict.WANTED}
    assert verdicts(broker.send_pages(b, 8, [1, 2]), b) == {8: Verdict.ROOT_MISMATCH}


def test_reports_wait_while_much_is_under_way() -> None:
    broker = Broker(settings=replace(SETTINGS, pending_pages=4))
    a, b = broker.join("a"), broker.join("b")
    files = {1: [1, 2, 3], 2: [4, 5], 3: [6], 4: [7, 8, 9, 10, 11, 12]}
    done = []
    for file, symbols in files.items():
        done += broker.report(a, file, symbols)
    assert verdicts(done, a) == {1: Verdict.WANTED, 3: Verdict.WANTED}
    broker.bring(b, 2, files[2])  # what waits becomes known meanwhile
    done = broker.send_pages(a, 1, files[1])
    assert verdicts(done, a) == {2: Verdict.KNOWN}
    assert verdicts(broker.send_pages(a, 3, files[3]), a) == {4: Verdict.WANTED}, "one file always has room"
    broker.send_pages(a, 4, files[4])
    assert len(broker.index.domains["a"].files) == 4


def test_room_that_a_file_leaves_goes_to_the_next() -> None:
    broker = Broker(settings=replace(SETTINGS, pending_pages=2))
    a = broker.join("a")
    for file in (1, 2, 3):
        broker.report(a, file, [file, file + 10])
    assert verdicts(broker.say(a, wire.Gone(u32s(1))), a) == {2: Verdict.WANTED}
    assert verdicts(broker.ticks(21), a) == {2: Verdict.NOT_REPORTED, 3: Verdict.WANTED}


def test_quotas() -> None:
    broker = Broker(replace(RULES, max_files=2, max_bytes=10 * PAGE))
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1])
    broker.report(a, 2, [2])  # under way counts too
    assert verdicts(broker.report(a, 3, [3]), a) == {3: Verdict.QUOTA_FILES}
    broker.bring(b, 1, list(range(1, 7)))
    assert verdicts(broker.report(b, 2, list(range(1, 6))), b) == {2: Verdict.QUOTA_BYTES}
    broker.say(b, wire.Gone(u32s(1)))
    assert verdicts(broker.report(b, 2, list(range(1, 6))), b) == {2: Verdict.WANTED}


def test_files_that_wait_cannot_get_round_the_quota() -> None:
    broker = Broker(replace(RULES, max_bytes=10 * PAGE), replace(SETTINGS, pending_pages=1))
    a = broker.join("a")
    files = {1: [1, 2, 3, 4], 2: [5, 6, 7, 8], 3: [9, 10, 11, 12]}
    for file, symbols in files.items():
        broker.report(a, file, symbols)
    broker.send_pages(a, 1, files[1])
    broker.send_pages(a, 2, files[2])
    assert set(broker.index.domains["a"].files) == {1, 2}
    assert broker.index.domains["a"].size_bytes <= 10 * PAGE


def test_a_file_counts_with_its_whole_size_however_few_of_its_pages_are_resident() -> None:
    broker = Broker(replace(RULES, max_bytes=10 * PAGE))
    a = broker.join("a")
    for file in (1, 2):
        broker.say(a, roots((file, 6 * PAGE, 1, wire.NO_ROOT, b"/usr/f")))
    assert verdicts(broker.send_pages(a, 1, [1]), a) == {}
    assert verdicts(broker.send_pages(a, 2, [1]), a) == {2: Verdict.QUOTA_BYTES}
    assert broker.index.domains["a"].size_bytes == 6 * PAGE


def test_who_waited_for_a_root_is_held_to_its_quota_when_it_arrives() -> None:
    broker = Broker(replace(RULES, max_bytes=10 * PAGE))
    a, b = broker.join("a"), broker.join("b")
    files = {1: [1, 2, 3, 4, 5, 6], 2: [1, 2, 3, 4, 5, 7]}
    for file, symbols in files.items():
        broker.report(a if file == 1 else b, file, symbols)
    broker.say(b, wire.Gone(u32s(2)))
    c = broker.join("c")
    broker.report(c, 2, files[2])
    for file in files:
        broker.report(b, file, files[file])
    assert verdicts(broker.send_pages(a, 1, files[1]), b) == {1: Verdict.KNOWN}
    assert verdicts(broker.send_pages(c, 2, files[2]), b) == {2: Verdict.QUOTA_BYTES}


def test_a_table_that_is_full_refuses_the_file_and_the_waiting_are_asked() -> None:
    broker = Broker(replace(RULES, max_pages=2))
    a, b = broker.join("a"), broker.join("b")
    broker.report(a, 1, [1, 2, 3])
    broker.report(b, 1, [1, 2, 3])
    done = broker.send_pages(a, 1, [1, 2, 3])
    assert verdicts(done, a) == {1: Verdict.TABLE_FULL}
    assert verdicts(done, b) == {1: Verdict.WANTED}
    assert verdicts(broker.bring(a, 2, [1, 2]), a) == {2: Verdict.WANTED}
    assert len(broker.index.contents) == 1


# --------------------------------------------------------------------------------------------------------- publishing


def test_k_domains_make_a_page_wanted_and_zero_pages_never_are() -> None:
    broker = Broker(replace(RULES, k=3))
    a, b, c = (broker.join(name) for name in "abc")
    symbols = [1, 0, 2, 1]
    assert fetches(broker.bring(a, 1, symbols)) == []
    assert fetches(broker.bring(b, 1, symbols)) == []
    done = broker.bring(c, 1, symbols)
    ((peer, fetch),) = fetches(done)
    assert peer in (a, b, c)
    assert pairs(fetch.runs) == [(0, 1), (2, 1)]
    done = broker.deliver(peer, fetch, symbols)
    assert broker.published() == {fp(1), fp(2)}
    assert [offers(done, p) for p in (a, b, c)] == [{1: 3}] * 3


def test_the_record_is_committed_before_the_pages_are_published(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2])
    ((peer, fetch),) = fetches(broker.bring(b, 1, [1, 2]))
    seen: list[set[bytes]] = []

    def look(changes: tuple[Change, ...]) -> bool:
        if any(isinstance(change, SlotsFilled) for change in changes):
            seen.append(broker.published())
        return False

    broker.refuse_commit = look
    done = broker.deliver(peer, fetch, [1, 2])
    assert seen == [set()]
    assert broker.published() == {fp(1), fp(2)}
    kinds = [type(action) for action in done if isinstance(action, Fill | Commit | Send)]
    assert kinds == [Fill, Commit, Send, Send]
    assert broker.changes[1:] == [SegmentOpened("pool", 0, 7, 100), SlotsFilled("pool", 0, fps([1, 2]))]


def test_two_files_of_one_domain_are_one_holder(broker: Broker) -> None:
    a = broker.join("a")
    broker.join("b")
    broker.bring(a, 1, [1, 2])
    assert fetches(broker.bring(a, 2, [1, 2])) == []
    assert fetches(broker.bring(a, 3, [1, 3])) == []
    assert fetches(broker.ticks(60)) == []


def test_pages_of_different_contents_and_of_partial_files_meet(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2, 3])
    done = broker.say(b, roots((7, 9 * PAGE, 2, wire.NO_ROOT, b"/usr/other")))
    assert verdicts(done, b) == {7: Verdict.WANTED}
    done = broker.say(b, wire.Pages(u32s(7, 4, 1, 7, 8, 1), fps([3, 9])))
    ((peer, fetch),) = fetches(done)
    assert (peer, fetch.file, pairs(fetch.runs)) == (b, 7, [(4, 1)])
    done = broker.say(b, wire.Data(fetch.request, b"\1", page(3)))
    assert offers(done, b) == {7: 1}
    # The other content learns of it by a sweep.
    assert offers(broker.tick(), a) == {1: 1}
    done = broker.say(b, wire.Attach(u32s(7)))
    assert of(done, b, wire.Granted)[0].runs == u32s(4, 0, 1)
    done = broker.say(a, wire.Attach(u32s(1)))
    assert of(done, a, wire.Granted)[0].runs == u32s(2, 0, 1)


@pytest.mark.parametrize("parts", [((7, 4, 1), (7, 4, 1)), ((7, 8, 1), (7, 4, 1)), ((7, 9, 1),)])
def test_pages_of_a_partial_file_ascend(broker: Broker, parts: tuple[tuple[int, int, int], ...]) -> None:
    b = broker.join("b")
    broker.say(b, roots((7, 9 * PAGE, 2, wire.NO_ROOT, b"/usr/other")))
    done = broker.say(b, wire.Pages(u32s(*[n for part in parts for n in part]), fps(range(1, len(parts) + 1))))
    assert refusal(done, b) == "malformed"


def test_a_partial_file_reports_no_more_than_it_announced(broker: Broker) -> None:
    b = broker.join("b")
    broker.say(b, roots((7, 9 * PAGE, 2, wire.NO_ROOT, b"/usr/other")))
    assert refusal(broker.say(b, wire.Pages(u32s(7, 0, 3), fps([1, 2, 3]))), b) == "malformed"


@pytest.mark.parametrize("how", ["hangs", "dies", "has nothing", "has one", "lies about one"])
def test_pages_that_do_not_come_are_asked_of_another(broker: Broker, how: str) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2])
    ((first, fetch),) = fetches(broker.bring(b, 1, [1, 2]))
    second = b if first == a else a
    if how == "hangs":
        done = broker.ticks(21)
        assert refusal(done, first) is None
        assert broker.deliver(first, fetch, [1, 2]) == [], "the late answer is passed over"
    elif how == "dies":
        # One domain is enough to deliver what two had when it was asked for.
        done = broker.feed(PeerClosed(first, "end"))
    elif how == "has nothing":
        done = broker.say(first, wire.Data(fetch.request, b"\0\0", b""))
    elif how == "has one":
        done = broker.say(first, wire.Data(fetch.request, b"\0\1", page(2)))
    else:
        done = broker.say(first, wire.Data(fetch.request, b"\1\1", page(9) + page(2)))
        assert logged(done, "peer.strike")[0]["reason"] == "page-mismatch"
        assert refusal(done, first) is None
    one = how in ("has one", "lies about one")
    assert broker.published() == ({fp(2)} if one else set())
    ((peer, again),) = fetches(done)
    assert peer == second
    assert pairs(again.runs) == ([(0, 1)] if one else [(0, 2)])
    assert offers(done, second) == {}, "more is on its way"
    done = broker.deliver(peer, again, [1, 2])
    assert broker.published() == {fp(1), fp(2)}
    assert offers(done, second) == {1: 2}


def test_slots_of_pages_that_were_all_wrong_are_used_again(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2])
    ((first, fetch),) = fetches(broker.bring(b, 1, [1, 2]))
    ((second, fetch),) = fetches(broker.say(first, wire.Data(fetch.request, b"\1\1", page(8) + page(9))))
    broker.deliver(second, fetch, [1, 2])
    assert broker.record().slots == {0: fp(1), 1: fp(2)}


def test_what_nobody_delivers_is_asked_for_again_later(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1])
    done = broker.bring(b, 1, [1])
    for _ in range(2):
        ((peer, fetch),) = fetches(done)
        done = broker.say(peer, wire.Data(fetch.request, b"\0", b""))
    assert fetches(done) == []
    assert fetches(broker.ticks(29)) == []
    ((peer, fetch),) = fetches(broker.ticks(2))
    broker.deliver(peer, fetch, [1])
    assert broker.published() == {fp(1)}


def test_an_answer_of_another_length_is_malformed_and_the_next_is_asked(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1, 2])
    ((first, fetch),) = fetches(broker.bring(b, 1, [1, 2]))
    done = broker.say(first, wire.Data(fetch.request, b"\1", page(1)))
    assert refusal(done, first) == "malformed"
    ((second, _),) = fetches(done)
    assert second != first


def test_data_that_nobody_asked_for_is_passed_over(broker: Broker) -> None:
    a = broker.join("a")
    assert broker.say(a, wire.Data(77, b"\1", page(1))) == []


def test_three_strikes_and_the_domain_is_out_for_a_while() -> None:
    broker = Broker(replace(RULES, k=2))
    broker.join("honest")
    liar = broker.join("liar")
    for file in (1, 2):
        broker.report(liar, file, [file, 9])
        assert refusal(broker.send_pages(liar, file, [file, 8]), liar) is None
    broker.report(liar, 3, [3, 9])
    done = broker.send_pages(liar, 3, [3, 8])
    assert refusal(done, liar) == "struck-out"
    assert "liar" not in broker.index.domains
    hello = wire.Hello(wire.PROTOCOL_VERSION, "0", "liar", INSTANCE, b"")
    again = broker.connect()
    done = broker.say(again, hello)
    assert refusal(done, again) == "struck-out"
    assert of(done, again, wire.Refused)[0].retry_ms == 300_000
    broker.now += 300
    broker.join("liar")


def test_a_peer_has_few_fetches_at_a_time() -> None:
    broker = Broker(settings=replace(SETTINGS, fetches_per_peer=2))
    a, b = broker.join("a"), broker.join("b")
    for file in range(1, 8):
        broker.bring(a, file, [file])
    done: list[Action] = []
    for file in range(1, 8):
        done += broker.bring(b, file, [file])
    asked = fetches(done)
    assert sorted(peer for peer, _ in asked) == [a, a, b, b]
    while asked:
        peer, fetch = asked.pop(0)
        more = fetches(broker.deliver(peer, fetch, [fetch.file]))
        assert len(more) <= 1
        asked += more
    assert broker.published() == {fp(n) for n in range(1, 8)}


def test_a_full_area_pauses_publishing_and_it_goes_on_later(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.no_room = True
    broker.bring(a, 1, [1])
    ((peer, fetch),) = fetches(broker.bring(b, 1, [1]))
    done = broker.deliver(peer, fetch, [1])
    assert logged(done, "pool.paused")[0]["reason"] == "area-full"
    broker.bring(a, 2, [2])
    assert fetches(broker.bring(b, 2, [2])) == [], "nothing is asked for meanwhile"
    assert fetches(broker.ticks(29)) == []
    broker.no_room = False
    for peer, fetch in fetches(broker.ticks(2)):
        broker.deliver(peer, fetch, [fetch.file])
    assert broker.published() == {fp(1), fp(2)}
    assert {slot for slot, data in broker.area.items() if data in (page(1), page(2))} == {0, 1}, "no slot was lost"


def test_what_the_store_cannot_take_is_not_published(broker: Broker) -> None:
    a, b = broker.join("a"), broker.join("b")
    broker.bring(a, 1, [1])
    ((peer, fetch),) = fetches(broker.bring(b, 1, [1]))
    broker.refuse_commit = lambda changes: any(isinstance(change, SlotsFilled) for change in changes)
    done = broker.deliver(peer, fetch, [1])
    assert logged(done, "pool.paused")[0]["reason"] == "store-full"
    assert broker.published() == set()
    assert broker.record().slots == {}
    broker.refuse_commit = lambda _: False
    for peer, fetch in fetches(broker.ticks(31)):
        broker.deliver(peer, fetch, [1])
    assert broker.published() == {fp(1)}
    assert broker.record().slots == {0: fp(1)}
    assert broker.record().segments == {0: (7, 100)}, "the segment that the refused commit had is recorded"


# ------------------------------------------------------------------------------------------------------------- grants


def test_the_owner_is_committed_before_the_handle_goes_out(broker: Broker) -> None:
    a, _ = broker.share([1, 2, 3], "a", "b")
    done = broker.say(a, wire.Attach(u32s(1)))
    assert [type(action) for action in done] == [Commit, SendSegment, Send]
    assert isinstance(done[0], Commit)
    assert done[0].changes == (OwnerSet("pool", "a", INSTANCE, 1, u32s(0, 0, 3)),)
    assert done[1] == SendSegment(a, "pool", 0)
    assert done[2] == Send(a, wire.Granted(1, u32s(0, 0, 3)))
    assert broker.record().owners["a", 1].runs == u32s(0, 0, 3)


def test_a_segment_is_sent_once_for_each_connection(broker: Broker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [1])
    broker.say(a, wire.Attach(u32s(1)))
    assert [type(x) for x in broker.say(a, wire.Attach(u32s(2))) if not isinstance(x, Commit)] == [Send]
    assert [type(x) for x in broker.say(b, wire.Attach(u32s(1))) if not isinstance(x, Commit)] == [SendSegment, Send]
    broker.feed(PeerClosed(a, "end"))
    a = broker.join("a", held=(1, 2))
    broker.bring(a, 3, [2])
    assert SendSegment(a, "pool", 0) in broker.say(a, wire.Attach(u32s(3)))


def test_wishes_that_cannot_be_granted_are_denied(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.bring(a, 2, [5])
    done = broker.say(a, wire.Attach(u32s(1, 2, 3)))
    assert denials(done, a) == {2: Verdict.NOTHING_SHARED, 3: Verdict.NOT_REPORTED}
    assert [granted.file for granted in of(done, a, wire.Granted)] == [1]


@pytest.mark.parametrize("wishes", [((1, 1),), ((1,), (1,))])
def test_what_is_granted_must_be_released_first(broker: Broker, wishes: tuple[tuple[int, ...], ...]) -> None:
    a, _ = broker.share([1], "a", "b")
    for wish in wishes:
        done = broker.say(a, wire.Attach(u32s(*wish)))
    assert refusal(done, a) == "malformed"


def test_an_owner_that_the_store_cannot_take_gets_nothing(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.refuse_commit = lambda _: True
    done = broker.say(a, wire.Attach(u32s(1)))
    assert denials(done, a) == {1: Verdict.STORE_FULL}
    assert of(done, a, wire.Granted) == []
    assert broker.index.owners == {}
    assert broker.index.table.totals().mappings == 0
    broker.refuse_commit = lambda _: False
    assert of(broker.say(a, wire.Attach(u32s(1))), a, wire.Granted)


def test_release_clears_the_owner_and_frees_what_nobody_needs(broker: Broker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.say(a, wire.Gone(u32s(1)))
    broker.say(b, wire.Gone(u32s(1)))
    assert broker.record().slots == {0: fp(1), 1: fp(2)}, "a still maps them"
    broker.say(a, wire.Release(u32s(1, 99)))
    assert broker.record().owners == {}
    assert broker.record().slots == {}
    broker.say(a, wire.Release(u32s(1)))


def test_what_a_full_store_could_not_take_is_written_later(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.refuse_commit = lambda _: True
    done = broker.say(a, wire.Release(u32s(1)))
    assert logged(done, "store.failed")
    assert broker.index.owners == {}
    assert set(broker.record().owners) == {("a", 1)}
    assert not [x for x in broker.ticks(29) if isinstance(x, Commit)], "it is not tried at every step"
    broker.refuse_commit = lambda _: False
    broker.ticks(2)
    assert broker.record().owners == {}


def test_what_was_not_saved_goes_before_what_comes_next(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.refuse_commit = lambda _: True
    broker.say(a, wire.Release(u32s(1)))
    broker.refuse_commit = lambda _: False
    done = broker.say(a, wire.Attach(u32s(1)))
    (commit,) = [action for action in done if isinstance(action, Commit)]
    assert [type(change) for change in commit.changes] == [OwnerCleared, OwnerSet]
    assert set(broker.record().owners) == {("a", 1)}


def test_a_later_report_of_a_shared_content_is_offered_at_once(broker: Broker) -> None:
    broker.share([1, 2], "a", "b")
    c = broker.join("c")
    done = broker.bring(c, 4, [1, 2])
    assert verdicts(done, c) == {4: Verdict.KNOWN}
    assert offers(done, c) == {4: 2}
    assert fetches(done) == []


# ---------------------------------------------------------------------------------------------- ends and beginnings


def test_grants_of_a_vanished_agent_are_kept_for_the_grace_time(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.feed(PeerClosed(a, "end"))
    broker.ticks(29)
    assert set(broker.record().owners) == {("a", 1)}
    done = broker.ticks(1)
    assert broker.record().owners == {}
    assert logged(done, "pages.revoked") == [
        {"pool": "pool", "domain": "a", "reason": "grace-over", "files": 1, "pages": 1}
    ]


def test_a_domain_with_many_files_leaves_in_steps(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    for file in range(2, 600):
        broker.bring(a, file, [1])
    for first in range(1, 600, 50):
        broker.say(a, wire.Attach(u32s(*range(first, min(first + 50, 600)))))
    assert len(broker.record().owners) == 599
    broker.feed(PeerClosed(a, "end"))
    hello = wire.Hello(wire.PROTOCOL_VERSION, "0", "a", INSTANCE, b"")
    peer = broker.connect()
    done = broker.say(peer, hello)
    assert refusal(done, peer) == "still-leaving"
    assert of(done, peer, wire.Refused)[0].retry_ms == 250
    assert broker.engine.busy
    steps = 0
    while "a" in broker.index.domains:
        broker.tick()
        steps += 1
    assert steps == 9  # 64 at once and 64 in each step
    left = [len(broker.record().owners) for _ in range(4) if broker.tick(30.0) is not None]
    assert left == [343, 87, 0, 0]
    broker.join("a")


def test_who_comes_back_keeps_what_it_holds_and_only_that(broker: Broker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [1])
    broker.say(a, wire.Attach(u32s(1, 2)))
    broker.feed(PeerClosed(a, "end"))
    peer = broker.connect()
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "a", INSTANCE, u32s(1, 77)))
    assert of(done, peer, wire.Withdraw) == [wire.Withdraw(u32s(77), WithdrawReason.UNKNOWN_GRANT)]
    assert set(broker.record().owners) == {("a", 1)}
    broker.ticks(10)
    broker.say(peer, wire.Gone(b""))
    broker.ticks(10)
    broker.say(peer, wire.Gone(b""))
    broker.say(b, wire.Gone(b""))
    broker.ticks(11)
    assert set(broker.record().owners) == {("a", 1)}, "no grace time ends for one that is back"


def test_another_instance_holds_nothing(broker: Broker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    broker.feed(PeerClosed(a, "end"))
    peer = broker.connect()
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "a", b"j" * 16, u32s(1)))
    assert of(done, peer, wire.Withdraw) == [wire.Withdraw(u32s(1), WithdrawReason.UNKNOWN_GRANT)]
    assert broker.record().owners == {}


def test_a_restarted_broker_goes_on_with_what_it_finds(broker: Broker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    after = broker.restarted()
    assert not [change for change in after.changes if isinstance(change, PoolOpened)]
    assert after.published() == {fp(1), fp(2)}
    a = after.join("a", held=(1,))
    assert set(after.index.owners) == {("a", 1)}
    # The index knows pages, not contents: they come again, and nothing is fetched.
    done = after.bring(a, 5, [1, 2])
    assert offers(done, a) == {5: 2}
    done = after.bring(after.join("b"), 1, [1, 2])
    assert fetches(done) == []
    for _ in range(3):
        after.ticks(10)
        after.say(a, wire.Gone(b""))
    assert after.published() == {fp(1), fp(2)}


def test_a_restarted_broker_frees_what_nobody_comes_back_for(broker: Broker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    after = broker.restarted()
    after.changes = list(broker.changes)
    after.ticks(29)
    assert after.record().slots == {0: fp(1), 1: fp(2)}
    after.ticks(2)
    assert after.record().owners == {}
    assert after.record().slots == {}


@pytest.mark.parametrize("reports", [True, False])
def test_a_restarted_broker_waits_for_the_reports_of_who_came_back(broker: Broker, reports: bool) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.say(a, wire.Attach(u32s(1)))
    after = broker.restarted()
    after.changes = list(broker.changes)
    a = after.join("a", held=(1,))

    def wait(seconds: int) -> None:
        for _ in range(seconds // 10):
            after.ticks(10)
            for peer in list(after.engine.pools()["pool"].peers.values()):
                after.say(peer.id, wire.Gone(b""))

    def moved() -> list[wire.Message]:
        return [withdraw for withdraw in of(after.trace, a, wire.Withdraw) if withdraw.reason == WithdrawReason.MOVING]

    after.share([3], "c", "d")  # into another segment
    wait(280)
    after.share([4], "e", "f")
    wait(10)
    assert moved() == [], "its report may still be on the way: what it holds is no thin segment"
    if reports:
        after.bring(a, 1, [1, 2])
    wait(20)
    after.share([5], "g", "h")
    wait(10)
    assert bool(moved()) is not reports


def test_new_slots_of_a_restarted_broker_are_in_a_new_segment(broker: Broker) -> None:
    broker.share([1, 2], "a", "b")
    after = broker.restarted()
    after.share([3], "a", "b")
    assert after.published() == {fp(1), fp(2), fp(3)}
    assert after.area[8] == page(3)


# ----------------------------------------------------------------------------------------------------------- segments


def thin(broker: Broker) -> tuple[int, int]:
    """Two domains share one page of an old segment, and eight of a new one; the first maps both."""
    a, b = broker.share(list(range(1, 9)), "a", "b")
    for file, symbols in ((2, [8]), (3, list(range(11, 19)))):
        broker.bring(a, file, symbols)
        for peer, fetch in fetches(broker.bring(b, file, symbols)):
            broker.deliver(peer, fetch, symbols)
    broker.say(a, wire.Attach(u32s(2, 3)))
    assert len(broker.index.segments) == 2
    broker.say(a, wire.Gone(u32s(1)))
    broker.say(b, wire.Gone(u32s(1)))
    return a, b


def test_a_thin_segment_is_emptied_and_closed(broker: Broker) -> None:
    a, b = thin(broker)
    done = broker.tick()
    (move,) = [action for action in done if isinstance(action, Move)]
    assert (move.slots, move.first, move.want) == (u32s(7), 16, fp(8))
    assert logged(done, "segment.moved") == [{"pool": "pool", "segment": 0, "pages": 1}]
    assert broker.record().slots[16] == fp(8)
    assert 7 in broker.record().slots, "a still maps the old slot"
    done = broker.ticks(2)
    assert of(done, a, wire.Withdraw) == [wire.Withdraw(u32s(2), WithdrawReason.MOVING)]
    assert of(done, b, wire.Withdraw) == []
    assert of(broker.ticks(5), a, wire.Withdraw) == [], "once"
    assert not [action for action in broker.trace if isinstance(action, CloseSegment)]
    broker.say(a, wire.Release(u32s(2)))
    done = broker.tick()
    assert CloseSegment("pool", 0) in done
    assert of(done, a, wire.Retired) == [wire.Retired(u32s(0))]
    assert of(done, b, wire.Retired) == [], "b never had it"
    assert set(broker.record().segments) == {1, 2}
    done = broker.say(a, wire.Attach(u32s(2)))
    assert [granted.runs for granted in of(done, a, wire.Granted)] == [u32s(0, 16, 1)]


def test_who_was_away_when_the_segment_was_emptied_is_told_when_it_is_back(broker: Broker) -> None:
    a, _ = thin(broker)
    broker.feed(PeerClosed(a, "end"))
    c = broker.join("c")
    broker.bring(c, 2, [8])  # so that k is still met; the page lives on
    broker.ticks(3)
    peer = broker.connect()
    done = broker.say(peer, wire.Hello(wire.PROTOCOL_VERSION, "0", "a", INSTANCE, u32s(2, 3)))
    assert of(done, peer, wire.Withdraw) == [wire.Withdraw(u32s(2), WithdrawReason.MOVING)]


@pytest.mark.parametrize("what", ["no room", "store full"])
def test_a_move_that_fails_changes_nothing_and_is_tried_again(broker: Broker, what: str) -> None:
    thin(broker)
    if what == "no room":
        broker.no_room = True
    else:
        broker.refuse_commit = lambda changes: any(isinstance(change, SlotsFilled) for change in changes)
    before = broker.published()
    done = broker.tick()
    assert logged(done, "pool.paused")
    assert broker.published() == before
    broker.no_room, broker.refuse_commit = False, lambda _: False
    peers = range(1, broker.peers + 1)
    for _ in range(4):
        for peer in peers:
            broker.say(peer, wire.Gone(b""))
        broker.ticks(10)
    assert broker.published() == before
    assert logged(broker.trace, "segment.moved")


def test_what_is_reported_while_a_failed_move_pauses_publishing_is_asked_for_afterwards(broker: Broker) -> None:
    a, b = thin(broker)
    broker.no_room = True
    assert logged(broker.tick(), "pool.paused")
    broker.no_room = False
    broker.bring(a, 9, [30])
    assert fetches(broker.bring(b, 9, [30])) == []
    ((_, fetch),) = fetches(broker.ticks(31))
    assert fetch.file == 9


def test_the_last_segment_is_never_closed(broker: Broker) -> None:
    a, b = broker.share([1], "a", "b")
    for peer in (a, b):
        broker.say(peer, wire.Gone(u32s(1)))
    broker.ticks(5)
    assert broker.record().slots == {}
    assert set(broker.record().segments) == {0}


def test_of_several_files_with_a_content_each_is_asked_for_it(broker: Broker) -> None:
    """One of them may be evicted, and the domain has the bytes all the same."""
    first, second = broker.join("a"), broker.join("b")
    for file in (1, 2, 3):
        broker.bring(first, file, [1, 2])
    done = broker.bring(second, 1, [1, 2])
    asked = set()
    for _ in range(30):
        pending = deque(fetches(done))
        while pending:
            peer, fetch = pending.popleft()
            asked |= {fetch.file} if peer == first else set()
            pending += fetches(broker.say(peer, wire.Data(fetch.request, b"\0\0", b"")))
        done = broker.ticks(15)
        for peer in (first, second):  # they are alive
            broker.say(peer, wire.Release(b""))
        done += broker.ticks(16)
    assert asked == {1, 2, 3}

"""The broker's decisions on `xen`, one by one: grants behind owners, slots that are used again, what a restart finds.

A `XenBroker` is the broker of test_engine.py with a table of grants: entries are (domid, slot) under their reference,
and what is in `mapped` cannot be revoked. Long sequences and crashes at any point are the simulation's (sim.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from sharearea.common import wire
from sharearea.common.errors import UsageError
from sharearea.engine import PoolSetup
from sharearea.grants import FIRST_REFERENCE, NO_SLOT, GrantLimits
from sharearea.model import (
    Action,
    CloseSegment,
    DomainGone,
    Event,
    Fill,
    GrantsFailed,
    GrantsWritten,
    Identity,
    Move,
    OwnerCleared,
    OwnerSet,
    PeerClosed,
    PeerConnected,
    PoolOpened,
    PoolRecord,
    Revoke,
    Revoked,
    SegmentClosed,
    Send,
    SendSegment,
    SlotsFilled,
    SlotsFreed,
    Verdict,
    WithdrawReason,
    WriteGrants,
)
from sharearea.policy import Admission, Policy, Refusal
from tests.test_engine import (
    INSTANCE,
    SETTINGS,
    UID,
    Broker,
    denials,
    fetches,
    ints,
    logged,
    of,
    offers,
    page,
    refusal,
    u32s,
)

GRANTOR = 3  # the area's domain
FIRST = FIRST_REFERENCE
LIMITS = GrantLimits(entries=FIRST + 40, per_domain=20)
DOMIDS = {name: 10 + n for n, name in enumerate("abcdefgh")}
Table = dict[int, tuple[int, int]]


class AnyBackend(Policy):
    """The rules of `local` for everybody."""

    def admit(self, identity: Identity, name: str) -> Admission | Refusal:
        return super().admit(replace(identity, backend="local"), name)


class XenBroker(Broker):
    """A broker whose area has a table of grants."""

    device = GRANTOR

    def __init__(
        self,
        limits: GrantLimits = LIMITS,
        table: Table | None = None,
        mapped: set[int] | None = None,
        **more: Any,
    ) -> None:
        self.limits = limits
        self.table: Table = {} if table is None else table  # reference -> (domid, slot)
        self.mapped = set() if mapped is None else mapped
        self.cannot_write = False
        super().__init__(**more)
        self.engine.policy = AnyBackend(self.engine.policy.pools, self.engine.policy.domains)

    def setup(self, record: PoolRecord | None, slots_per_segment: int) -> PoolSetup:
        base = super().setup(record, slots_per_segment)
        columns = (
            u32s(*self.table),
            u32s(*[domid for domid, _ in self.table.values()]),
            u32s(*[slot for _, slot in self.table.values()]),
        )
        return replace(base, grants=self.limits, entries=columns)

    def act(self, action: Action) -> Event | None:
        match action:
            case WriteGrants():
                return self.write(action)
            case Revoke():
                busy = bytes(ref in self.mapped for ref in ints(action.refs))
                for ref, is_busy in zip(ints(action.refs), busy, strict=True):
                    if not is_busy:
                        self.table.pop(ref, None)
                return Revoked(action.token, busy)
            case Fill():
                # What nothing reaches, neither through an entry nor by the store's record, may be written.
                slots = set(range(action.first, action.first + len(action.want) // 32))
                assert not slots & {slot for _, slot in self.table.values()}
                assert not slots & self.stored()
            case CloseSegment():
                assert action.segment not in self.record().segments
                self.segments.discard(action.segment)
        return super().act(action)

    def write(self, action: WriteGrants) -> Event:
        if self.cannot_write:
            return GrantsFailed(action.token, "no table")
        for ref, slot in zip(ints(action.refs), ints(action.slots), strict=True):
            assert ref not in self.table
            self.table[ref] = (action.domid, slot)
        return GrantsWritten(action.token)

    def stored(self) -> set[int]:
        """Slots that the store has a page in."""
        return {first + i for first, column in self.record().slots.items() for i in range(len(column) // 32)}

    def join(self, name: str, held: tuple[int, ...] = (), instance: bytes = INSTANCE, domid: int | None = None) -> int:
        self.peers += 1
        domid = DOMIDS[name] if domid is None else domid
        self.feed(PeerConnected(self.peers, Identity("xen", UID, domid, name)))
        done = self.say(self.peers, wire.Hello(wire.PROTOCOL_VERSION, "0", name, instance, u32s(*held)))
        assert of(done, self.peers, wire.Welcome)
        return self.peers

    def attach(self, peer: int, *files: int) -> list[Action]:
        return self.say(peer, wire.Attach(u32s(*files)))

    def release(self, peer: int, *files: int) -> list[Action]:
        return self.say(peer, wire.Release(u32s(*files)))

    def restarted(self, **more: Any) -> XenBroker:
        more.setdefault("limits", self.limits)
        other = XenBroker(
            table=self.table,
            mapped=self.mapped,
            record=self.record(),
            slots_per_segment=self.slots_per_segment,
            **more,
        )
        other.area = self.area
        other.changes[:0] = self.changes
        return other

    def serve(self, seconds: int, symbols: list[int]) -> list[Action]:
        """Let time pass, and answer every ping and every fetch at once."""
        done: list[Action] = []
        for _ in range(seconds):
            new = self.tick(1.0)
            for ping in [
                action for action in new if isinstance(action, Send) and isinstance(action.message, wire.Ping)
            ]:
                self.say(ping.peer, wire.Pong(0))
            while new:
                done += new
                new = [action for peer, fetch in fetches(new) for action in self.deliver(peer, fetch, symbols)]
        return done

    @property
    def pool(self) -> Any:
        return self.engine.pools()["pool"]

    def used(self) -> dict[int, int]:
        """The ledger's count of every domain; it agrees with the table and with itself."""
        ledger = self.pool.ledger
        counts = {domid: ledger.used_by(domid) for domid in {*DOMIDS.values(), *(d for d, _ in self.table.values())}}
        counts = {domid: count for domid, count in counts.items() if count}
        assert ledger.used == sum(counts.values()) == len(self.table)
        assert ledger.free == ledger.limits.entries - FIRST - sum(ref < ledger.limits.entries for ref in self.table)
        return counts

    def no_slot_is_lost(self) -> None:
        index, per_segment = self.index, self.slots_per_segment
        opened = {
            slot
            for segment in index.segments
            for slot in range(segment * per_segment, min((segment + 1) * per_segment, index.next_slot))
        }
        ranges = [*index.free, *index.withheld]
        free = [slot for first, count in ranges for slot in range(first, first + count)]
        assert len(free) == len(set(free))
        assert not set(free) & self.stored()
        assert not set(free) & {slot for _, slot in self.table.values()}
        assert set(free) | self.stored() == opened


def kinds(actions: Iterable[Action]) -> list[str]:
    """What is done, in order; Send by its message."""
    return [type(a.message if isinstance(a, Send) else a).__name__ for a in actions if type(a).__name__ != "Log"]


def granted(actions: Iterable[Action], peer: int) -> dict[int, list[int]]:
    return {message.file: ints(message.runs) for message in of(actions, peer, wire.Granted)}


def withdrawn(actions: Iterable[Action], peer: int) -> list[tuple[list[int], WithdrawReason]]:
    return [(ints(message.ids), WithdrawReason(message.reason)) for message in of(actions, peer, wire.Withdraw)]


@pytest.fixture
def broker() -> XenBroker:
    return XenBroker()


# ------------------------------------------------------------------------------------------------------------- granting


def test_owner_entry_grantor_handle_in_this_order(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    done = broker.attach(a, 1)
    assert kinds(done) == ["Commit", "WriteGrants", "Grantor", "Granted"]
    runs, refs = u32s(0, 0, 2), u32s(FIRST, 2)
    assert broker.changes[-1] == OwnerSet("pool", "a", INSTANCE, 1, runs, DOMIDS["a"], refs)
    assert broker.table == {FIRST: (DOMIDS["a"], 0), FIRST + 1: (DOMIDS["a"], 1)}
    assert of(done, a, wire.Grantor) == [wire.Grantor(GRANTOR)]
    assert granted(done, a) == {1: [0, FIRST, 2]}
    assert broker.used() == {DOMIDS["a"]: 2}


def test_the_grantor_is_told_once_for_each_connection(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [1])
    broker.attach(a, 1)
    assert kinds(broker.attach(a, 2)) == ["Commit", "WriteGrants", "Granted"]
    assert of(broker.attach(b, 1), b, wire.Grantor)
    broker.feed(PeerClosed(a, "end"))
    a = broker.join("a", (1, 2))
    broker.bring(a, 3, [1, 2])
    assert of(broker.attach(a, 3), a, wire.Grantor)


def test_nobody_hears_of_segments(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    assert not [action for action in broker.trace if isinstance(action, SendSegment)]


def test_scattered_slots_are_one_run_of_references(broker: XenBroker) -> None:
    a, b = broker.share([1], "a", "b", file=1)
    for symbols, file in (([2], 2), ([3, 1, 2], 3)):
        for peer in (a, b):
            done = broker.bring(peer, file, symbols)
        ((peer, fetch),) = fetches(done)
        broker.deliver(peer, fetch, symbols)
    done = broker.attach(a, 3)
    assert granted(done, a) == {3: [0, FIRST, 3]}
    assert [broker.table[FIRST + i] for i in range(3)] == [(DOMIDS["a"], slot) for slot in (2, 0, 1)]


def test_two_domains_have_entries_of_their_own_for_one_slot(broker: XenBroker) -> None:
    a, b = broker.share([1], "a", "b")
    broker.attach(a, 1)
    broker.attach(b, 1)
    assert broker.table == {FIRST: (DOMIDS["a"], 0), FIRST + 1: (DOMIDS["b"], 0)}
    assert broker.used() == {DOMIDS["a"]: 1, DOMIDS["b"]: 1}


def test_a_peer_that_is_gone_when_its_grants_are_written_keeps_them_for_the_grace_time(broker: XenBroker) -> None:
    a, _ = broker.share([1], "a", "b")
    engine_write = broker.write

    def write(action: WriteGrants) -> Event:
        broker.run(broker.engine.handle(PeerClosed(a, "its queue is full"), broker.now))
        return engine_write(action)

    broker.write = write  # type: ignore[method-assign]
    assert of(broker.attach(a, 1), a, wire.Granted) == []
    assert broker.used() == {DOMIDS["a"]: 1}
    broker.ticks(31)
    assert broker.used() == {}


# --------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    "limits", [GrantLimits(FIRST + 40, 3), GrantLimits(FIRST + 3, 40)], ids=["of the domain", "of the table"]
)
def test_a_wish_beyond_the_budget_is_denied_and_takes_nothing(limits: GrantLimits) -> None:
    broker = XenBroker(limits)
    a, _ = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [1, 2])
    done = broker.attach(a, 1, 2)
    assert granted(done, a) == {1: [0, FIRST, 2]}
    assert denials(done, a) == {2: Verdict.GRANT_BUDGET}
    assert broker.used() == {DOMIDS["a"]: 2}
    assert logged(broker.ticks(2), "grants.refused") == [{"pool": "pool", "domain": "a", "files": 1, "pages": 2}]
    broker.bring(a, 3, [1])
    assert granted(broker.attach(a, 3), a) == {3: [0, FIRST + 2, 1]}
    broker.release(a, 1)
    assert granted(broker.attach(a, 2), a) == {2: [0, FIRST, 2]}
    assert broker.used() == {DOMIDS["a"]: 3}


def test_the_budget_of_one_domain_is_not_anothers(broker: XenBroker) -> None:
    broker = XenBroker(GrantLimits(FIRST + 40, 2))
    a, b = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    assert granted(broker.attach(b, 1), b) == {1: [0, FIRST + 2, 2]}


def test_a_commit_that_fails_gives_the_references_back(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [2])
    broker.refuse_commit = lambda changes: any(isinstance(change, OwnerSet) for change in changes)
    done = broker.attach(a, 1, 2)
    assert denials(done, a) == {1: Verdict.STORE_FULL, 2: Verdict.STORE_FULL}
    assert not [action for action in done if isinstance(action, WriteGrants)]
    assert broker.used() == {}
    broker.refuse_commit = lambda _: False
    broker.now += 31
    assert granted(broker.attach(a, 1), a) == {1: [0, FIRST, 2]}


def test_grants_that_could_not_be_written_are_revoked(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [2])
    broker.cannot_write = True
    # Somebody has put entries there, and one of them is mapped.
    broker.table |= {FIRST: (99, NO_SLOT), FIRST + 1: (99, NO_SLOT)}
    broker.mapped = {FIRST}
    done = broker.attach(a, 1, 2)
    assert kinds(done) == ["Commit", "WriteGrants", "Revoke", "Denied", "Commit"]
    assert denials(done, a) == {1: Verdict.GRANT_BUDGET, 2: Verdict.GRANT_BUDGET}
    assert broker.changes[-2:] == [OwnerCleared("pool", "a", 1), OwnerCleared("pool", "a", 2)]
    assert list(broker.table) == [FIRST]
    assert broker.pool.ledger.used == 1
    assert broker.index.owners == {}
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.table == {}
    assert broker.used() == {}
    broker.cannot_write = False
    assert granted(broker.attach(a, 1), a)
    broker.no_slot_is_lost()


@pytest.mark.parametrize("files", [(1, 1), (2, 1)], ids=["twice", "granted already"])
def test_a_message_that_is_malformed_takes_nothing(broker: XenBroker, files: tuple[int, ...]) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [2])
    if files == (2, 1):
        broker.attach(a, 1)
    before = broker.used()
    assert refusal(broker.attach(a, *files), a) == "malformed"
    assert broker.used() == before


def test_references_too_scattered_for_a_message_grant_the_first_pages(
    broker: XenBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_GRANT_RUNS", 2)
    a, _ = broker.share([1, 2, 3, 4, 5], "a", "b")
    for file in range(2, 12):
        broker.bring(a, file, [1])
        broker.attach(a, file)
    for file in (3, 5, 6, 8):
        broker.release(a, file)
    taken = broker.used()[DOMIDS["a"]]
    broker.bring(a, 20, [1, 2, 3, 4, 5])
    # Free: one reference, two, one, and all behind the others; only those have room for five.
    broker.limits = broker.pool.ledger.limits = replace(LIMITS, entries=FIRST + 10)
    broker.pool.ledger._free.remove(FIRST + 10, 1000)
    done = broker.attach(a, 20)
    assert denials(done, a) == {20: Verdict.GRANT_BUDGET}
    broker.release(a, 10)
    done = broker.attach(a, 20)
    assert granted(done, a) == {20: [0, FIRST + 1, 1, 1, FIRST + 3, 2]}
    owner = broker.index.owners["a", 20]
    assert (ints(owner.runs), ints(owner.refs)) == ([0, 0, 3], [FIRST + 1, 1, FIRST + 3, 2])
    assert broker.used() == {DOMIDS["a"]: taken - 1 + 3}
    broker.release(a, 20)
    assert broker.used() == {DOMIDS["a"]: taken - 1}


# ----------------------------------------------------------------------------------------------------------- letting go


def test_a_slot_is_filled_again_only_when_the_store_knows_that_it_is_free(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    for peer in (a, b):
        broker.say(peer, wire.Gone(u32s(1)))
    assert broker.stored() == {0, 1}
    broker.refuse_commit = lambda changes: any(isinstance(change, SlotsFreed) for change in changes)
    done = broker.release(a, 1)
    assert [kind for kind in kinds(done) if kind != "Commit"] == ["Revoke"]
    assert broker.table == {}
    assert broker.index.free.count == 0
    for peer in (a, b):
        done = broker.bring(peer, 2, [3])
    ((peer, fetch),) = fetches(done)
    broker.refuse_commit = lambda _: False
    broker.deliver(peer, fetch, [3])
    assert broker.area[2] == page(3), "nothing was free when it was filled"
    broker.ticks(31)
    for peer in (a, b):
        done = broker.bring(peer, 3, [4, 5])
    ((peer, fetch),) = fetches(done)
    broker.deliver(peer, fetch, [4, 5])
    assert broker.area[0] == page(4)
    broker.no_slot_is_lost()


def test_a_slot_stays_while_another_domain_has_it(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    for peer in (a, b):
        broker.attach(peer, 1)
    for peer in (a, b):
        broker.say(peer, wire.Gone(u32s(1)))
    broker.release(a, 1)
    assert broker.stored() == {0, 1}
    broker.release(b, 1)
    assert broker.stored() == set()
    broker.no_slot_is_lost()


def test_what_is_still_mapped_is_pinned_and_counted_and_tried_again(broker: XenBroker) -> None:
    broker = XenBroker(GrantLimits(FIRST + 40, 4))
    a, b = broker.share([1, 2, 3], "a", "b")
    broker.attach(a, 1)
    broker.mapped = {FIRST + 1}
    broker.release(a, 1)
    assert broker.table == {FIRST + 1: (DOMIDS["a"], 1)}
    assert broker.used() == {DOMIDS["a"]: 1}
    assert logged(broker.ticks(1), "grants.pinned") == [{"pool": "pool", "domain": "a", "pages": 1}]
    # Its slot stays in use when nobody has the page any more, and what is free is filled around it.
    for peer in (a, b):
        broker.say(peer, wire.Gone(u32s(1)))
    assert broker.stored() == {1}
    for peer in (a, b):
        done = broker.bring(peer, 2, [4, 5, 6])
    ((peer, fetch),) = fetches(done)
    broker.deliver(peer, fetch, [4, 5, 6])
    assert broker.area[1] == page(2)
    # It counts: there is room for three, and then for none.
    assert granted(broker.attach(a, 2), a) == {2: [0, FIRST + 2, 3]}
    broker.bring(a, 3, [4])
    assert denials(broker.attach(a, 3), a) == {3: Verdict.GRANT_BUDGET}
    assert len([action for action in broker.ticks(20) if isinstance(action, Revoke)]) == 4
    assert broker.used() == {DOMIDS["a"]: 4}
    broker.mapped = set()
    broker.ticks(6)
    assert broker.used() == {DOMIDS["a"]: 3}
    assert broker.stored() == {3, 4, 5}
    assert granted(broker.attach(a, 3), a)
    assert not broker.pool.pinned
    broker.no_slot_is_lost()


def test_the_same_file_again_gets_other_references_while_it_is_pinned(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    broker.mapped = {FIRST, FIRST + 1}
    broker.release(a, 1)
    assert granted(broker.attach(a, 1), a) == {1: [0, FIRST + 2, 2]}
    assert broker.used() == {DOMIDS["a"]: 4}
    broker.mapped = set()
    broker.release(a, 1)
    broker.ticks(6)
    assert broker.used() == {}


def test_grants_of_a_vanished_agent_end_with_its_grace_time(broker: XenBroker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.attach(a, 1)
    broker.feed(PeerClosed(a, "end"))
    broker.ticks(29)
    assert broker.used() == {DOMIDS["a"]: 1}
    broker.ticks(2)
    assert broker.used() == {}
    assert broker.pool.domids.keys() == {"b"}, "nothing is kept of those who own nothing"


# ------------------------------------------------------------------------------------------------------- domains end


def test_the_end_of_a_domain_ends_its_grants(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [2])
    broker.attach(a, 1, 2)
    broker.attach(b, 1)
    broker.mapped = {FIRST + 2}
    broker.release(a, 2)
    broker.mapped = set()  # Xen clears what a domain had mapped before it is gone
    done = broker.feed(DomainGone(DOMIDS["a"]))
    assert "Disconnect" in kinds(done)
    assert logged(done, "domain.left")[0]["domain"] == "a"
    broker.tick(0.25)
    assert broker.used() == {DOMIDS["b"]: 2}
    assert not broker.pool.pinned
    assert "a" not in broker.pool.domids


def test_the_end_of_a_domain_with_many_files_takes_some_ticks() -> None:
    broker = XenBroker(GrantLimits(2000, 2000))
    a, _ = broker.share([1], "a", "b")
    for file in range(2, 600):
        broker.bring(a, file, [1])
    for first in range(1, 600, 60):
        broker.attach(a, *range(first, min(first + 60, 600)))
    assert broker.used() == {DOMIDS["a"]: 599}
    broker.feed(DomainGone(DOMIDS["a"]))
    left = []
    for _ in range(3):
        broker.tick(0.25)
        left.append(len(broker.table))
    assert left == [599 - 256, 599 - 512, 0]


def test_an_unknown_domain_may_end(broker: XenBroker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.attach(a, 1)
    assert broker.feed(DomainGone(77)) == []
    broker.tick(1.0)
    assert broker.used() == {DOMIDS["a"]: 1}


def test_a_domain_that_is_back_under_another_number_owns_nothing(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    broker.feed(PeerClosed(a, "end"))
    at = len(broker.trace)
    a = broker.join("a", (1,), domid=50)
    done = broker.trace[at:]
    assert withdrawn(done, a) == [([1], WithdrawReason.UNKNOWN_GRANT)]
    assert broker.used() == {}
    broker.release(a, 1)
    broker.bring(a, 1, [1, 2])
    broker.attach(a, 1)
    assert broker.used() == {50: 2}
    broker.feed(DomainGone(DOMIDS["a"]))  # heard late
    broker.ticks(2)
    assert broker.used() == {50: 2}


def test_the_same_agent_under_the_same_number_keeps_what_it_has(broker: XenBroker) -> None:
    a, _ = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    broker.feed(PeerClosed(a, "end"))
    at = len(broker.trace)
    a = broker.join("a", (1,))
    assert withdrawn(broker.trace[at:], a) == []
    assert broker.used() == {DOMIDS["a"]: 2}


# ------------------------------------------------------------------------------------------------------------ detached


def test_a_detached_domain_is_asked_back_gets_nothing_and_is_offered_again(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.bring(a, 2, [2])
    broker.attach(a, 1)
    at = len(broker.trace)
    broker.run(broker.engine.detach("pool", "a", True, broker.now))
    assert withdrawn(broker.trace[at:], a) == [([1], WithdrawReason.OPERATOR)]
    broker.release(a, 1)
    assert broker.used() == {}
    assert denials(broker.attach(a, 1, 2), a) == {1: Verdict.DETACHED, 2: Verdict.DETACHED}
    assert granted(broker.attach(b, 1), b), "the others go on"
    broker.run(broker.engine.detach("pool", "a", False, broker.now))
    assert offers(broker.ticks(1), a) == {1: 2, 2: 1}
    assert granted(broker.attach(a, 1), a)


def test_a_detached_domain_is_free_when_it_is_another_xen_domain(broker: XenBroker) -> None:
    a, _ = broker.share([1], "a", "b")
    broker.run(broker.engine.detach("pool", "a", True, broker.now))
    broker.feed(PeerClosed(a, "end"))
    a = broker.join("a")
    broker.bring(a, 1, [1])
    assert denials(broker.attach(a, 1), a) == {1: Verdict.DETACHED}
    broker.feed(PeerClosed(a, "end"))
    a = broker.join("a", domid=50)
    broker.bring(a, 1, [1])
    assert granted(broker.attach(a, 1), a)


def test_who_is_unknown_cannot_be_detached(broker: XenBroker) -> None:
    for pool, domain in (("pool", "z"), ("other", "a")):
        with pytest.raises(UsageError):
            broker.engine.detach(pool, domain, True, broker.now)


# ---------------------------------------------------------------------------------------------------------- a lost area


def test_a_lost_area_is_replaced_and_its_domains_come_again(broker: XenBroker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    broker.attach(a, 1)
    broker.refuse_commit = lambda changes: any(isinstance(change, OwnerCleared) for change in changes)
    broker.attach(b, 1)
    broker.release(b, 1)  # cannot be saved, and need not be any more
    broker.run(broker.engine.detach("pool", "b", True, broker.now))
    broker.refuse_commit = lambda _: False
    broker.now += 31
    broker.table.clear()
    broker.segments.clear()
    setup = replace(broker.setup(None, 8), area=b"n" * 16)
    at = len(broker.trace)
    broker.run(broker.engine.replace("pool", setup, broker.now))
    done = broker.trace[at:]
    for peer in (a, b):
        (refused,) = of(done, peer, wire.Refused)
        assert refused.reason == "area-lost"
        assert refused.retry_ms > 0
    assert kinds(done) == ["Refused", "Disconnect", "Refused", "Disconnect", "Commit"]
    assert broker.changes[-1] == PoolOpened("pool", b"n" * 16, 8)
    assert not isinstance(broker.changes[-2], OwnerCleared)
    assert logged(done, "area.lost") == [{"pool": "pool", "domains": 2, "owners": 1}]
    assert broker.feed(PeerClosed(a, "late")) == []
    broker.changes = [broker.changes[-1]]
    at = len(broker.trace)
    a, b = broker.join("a", (1,)), broker.join("b")
    assert withdrawn(broker.trace[at:], a) == [([1], WithdrawReason.UNKNOWN_GRANT)]
    for peer in (a, b):
        done = broker.bring(peer, 5, [1, 2])
    ((peer, fetch),) = fetches(done)
    broker.deliver(peer, fetch, [1, 2])
    assert granted(broker.attach(a, 5), a) == {5: [0, FIRST, 2]}
    assert denials(broker.attach(b, 5), b) == {5: Verdict.DETACHED}, "the operator's wish stands"
    assert broker.used() == {DOMIDS["a"]: 2}


# --------------------------------------------------------------------------------------------------------- a restart


def owning(*names: str, symbols: Iterable[int] = (1, 2)) -> XenBroker:
    """A broker with domains a and b, those named owning file 1."""
    broker = XenBroker()
    peers = dict(zip("ab", broker.share(list(symbols), "a", "b"), strict=True))
    for name in names:
        broker.attach(peers[name], 1)
    return broker


def test_a_restarted_broker_that_finds_all_in_order_leaves_it_so() -> None:
    broker = owning("a", "b").restarted()
    assert not [action for action in broker.trace if isinstance(action, Revoke | WriteGrants)]
    assert broker.used() == {DOMIDS["a"]: 2, DOMIDS["b"]: 2}
    assert logged(broker.trace, "grants.reconciled") == []
    a = broker.join("a", (1,))
    broker.bring(a, 1, [1, 2])
    broker.bring(a, 2, [2])
    assert granted(broker.attach(a, 2), a) == {2: [0, FIRST + 4, 1]}
    broker.release(a, 1)
    assert broker.used() == {DOMIDS["a"]: 1, DOMIDS["b"]: 2}
    broker.ticks(31)
    assert broker.used() == {DOMIDS["a"]: 1}
    broker.no_slot_is_lost()


@pytest.mark.parametrize("how", ["missing", "another domain", "another slot"])
def test_an_owner_without_its_entries_is_dropped(how: str) -> None:
    before = owning("a", "b")
    if how == "missing":
        del before.table[FIRST + 1]
    else:
        before.table[FIRST + 1] = (77, 1) if how == "another domain" else (DOMIDS["a"], 0)
    broker = before.restarted()
    assert broker.index.owners.keys() == {("b", 1)}
    assert OwnerCleared("pool", "a", 1) in broker.changes
    assert broker.used() == {DOMIDS["b"]: 2}
    entries = 1 if how == "missing" else 2
    assert logged(broker.trace, "grants.reconciled") == [
        {"pool": "pool", "owners_dropped": 1, "entries_without_owner": entries}
    ]
    at = len(broker.trace)
    a = broker.join("a", (1,))
    assert withdrawn(broker.trace[at:], a) == [([1], WithdrawReason.UNKNOWN_GRANT)]
    broker.no_slot_is_lost()


@pytest.mark.parametrize("busy", [False, True])
def test_an_entry_without_an_owner_goes_or_stays_pinned(busy: bool) -> None:
    before = owning("a", "b")
    before.changes.append(OwnerCleared("pool", "a", 1))  # and the broker died
    before.mapped = {FIRST} if busy else set()
    broker = before.restarted()
    assert broker.used() == ({DOMIDS["a"]: 1, DOMIDS["b"]: 2} if busy else {DOMIDS["b"]: 2})
    assert set(broker.pool.pinned) == ({DOMIDS["a"]} if busy else set())
    broker.ticks(31)  # b's grace, and that of the pages nobody reports
    assert broker.stored() == ({0} if busy else set())
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.used() == {}
    assert broker.stored() == set()
    broker.no_slot_is_lost()


def test_a_crash_between_revoke_and_commit_frees_nothing_that_is_mapped() -> None:
    # The owner is still in the store, one of its entries is gone, the other mapped, and nobody has the pages.
    before = owning("a")
    del before.table[FIRST]
    before.mapped = {FIRST + 1}
    broker = before.restarted()
    assert broker.index.owners == {}
    broker.ticks(31)
    assert broker.stored() == {1}
    assert broker.used() == {DOMIDS["a"]: 1}
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.stored() == set()
    broker.no_slot_is_lost()


def test_a_page_in_two_slots_keeps_the_one_that_a_grant_without_an_owner_reaches() -> None:
    # A crash between the record of a move and the release of the earlier slot.
    before = owning("a")
    before.changes += [SlotsFilled("pool", 3, before.record().slots[0] + before.record().slots[1])]
    before.changes += [OwnerCleared("pool", "a", 1)]
    before.area |= {3: page(1), 4: page(2)}
    before.mapped = {FIRST}
    broker = before.restarted()
    assert broker.stored() == {0, 3, 4}
    assert not broker.index.free.overlaps(0, 1)
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.stored() == {3, 4}
    broker.no_slot_is_lost()


def test_a_foreign_frame_is_revoked_or_stays_taken() -> None:
    before = owning()
    before.table |= {FIRST + 5: (77, NO_SLOT), FIRST + 6: (78, NO_SLOT)}
    before.mapped = {FIRST + 6}
    broker = before.restarted()
    assert list(broker.table) == [FIRST + 6]
    assert broker.pool.ledger.used_by(78) == 1
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.table == {}
    assert broker.pool.ledger.used == 0
    broker.ticks(31)
    broker.no_slot_is_lost()


def test_a_free_slot_that_an_entry_reaches_is_not_filled() -> None:
    before = owning()
    before.table |= {FIRST + 5: (77, 4)}
    before.mapped = {FIRST + 5}
    broker = before.restarted()
    assert not broker.index.free.overlaps(4, 1)
    broker.mapped.clear()
    broker.ticks(6)
    assert broker.table == {}
    # It is forgotten until the next restart: nobody counted how often it is reached.
    assert not broker.index.free.overlaps(4, 1)
    broker = broker.restarted()
    assert broker.index.free.holds(2, 6)


def test_a_smaller_table_keeps_what_a_larger_one_had() -> None:
    before = owning("a", "b")
    broker = before.restarted(limits=GrantLimits(FIRST + 3, 3))
    assert broker.pool.ledger.used_by(DOMIDS["b"]) == 2
    a = broker.join("a", (1,))
    broker.bring(a, 1, [1, 2])
    broker.bring(a, 2, [2])
    assert denials(broker.attach(a, 2), a) == {2: Verdict.GRANT_BUDGET}
    broker.ticks(31)  # b does not come back: one of its references was behind the end
    assert broker.used() == {DOMIDS["a"]: 2}
    assert granted(broker.attach(a, 2), a) == {2: [0, FIRST + 2, 1]}
    broker.release(a, 1, 2)
    assert broker.used() == {}


def test_free_slots_of_a_restarted_broker_are_filled_before_new_ones() -> None:
    broker = owning("a").restarted()
    a, b = broker.join("a", (1,)), broker.join("b")
    for peer in (a, b):
        broker.bring(peer, 1, [1, 2])
        done = broker.bring(peer, 2, [3, 4, 5])
    ((peer, fetch),) = fetches(done)
    broker.deliver(peer, fetch, [3, 4, 5])
    assert broker.area[2] == page(3)
    assert list(broker.index.segments) == [0]


# ---------------------------------------------------------------------------------------------------------- segments


def filled(*files: tuple[int, ...]) -> tuple[XenBroker, int, int]:
    """A broker with segments of 4 slots, and domains a and b that hold files 1, 2, ... with these pages."""
    broker = XenBroker(slots_per_segment=4)
    a, b = broker.join("a"), broker.join("b")
    for file, symbols in enumerate(files, 1):
        for peer in (a, b):
            done = broker.bring(peer, file, list(symbols))
        ((peer, fetch),) = fetches(done)
        broker.deliver(peer, fetch, list(symbols))
    return broker, a, b


def gone(broker: XenBroker, file: int, *peers: int) -> None:
    for peer in peers:
        broker.say(peer, wire.Gone(u32s(file)))


def test_an_empty_segment_leaves_the_store_before_the_area() -> None:
    broker, a, b = filled((1, 2, 3, 4), (5, 6, 7, 8))
    gone(broker, 1, a, b)
    broker.refuse_commit = lambda changes: any(isinstance(change, SegmentClosed) for change in changes)
    done = broker.ticks(2)
    assert not [action for action in done if isinstance(action, CloseSegment)]
    broker.refuse_commit = lambda _: False
    done = broker.ticks(31)
    assert [action for action in done if isinstance(action, CloseSegment)] == [CloseSegment("pool", 0)]
    assert set(broker.index.segments) == {1}
    broker.no_slot_is_lost()


def test_a_segment_that_a_grant_reaches_stays(broker: XenBroker) -> None:
    broker, a, b = filled((1, 2, 3, 4), (5, 6, 7, 8))
    broker.attach(a, 1)
    broker.mapped = {FIRST}
    gone(broker, 1, a, b)
    done = broker.ticks(2)
    assert withdrawn(done, a) == [([1], WithdrawReason.MOVING)]
    broker.release(a, 1)
    broker.ticks(10)
    assert set(broker.index.segments) == {0, 1}
    broker.mapped.clear()
    done = broker.ticks(10)
    assert CloseSegment("pool", 0) in done
    broker.no_slot_is_lost()


def test_what_a_segment_that_is_emptied_has_free_is_used_when_the_area_is_full() -> None:
    broker, a, b = filled((1, 2, 3, 4), (5, 6, 7, 8))
    broker.attach(a, 1)
    broker.mapped = {FIRST}
    broker.release(a, 1)
    gone(broker, 1, a, b)
    broker.ticks(6)
    assert (broker.index.free.count, broker.index.withheld.count) == (0, 3)
    broker.no_room = True
    for peer in (a, b):
        done = broker.bring(peer, 3, [9, 10])
    ((peer, fetch),) = fetches(done)
    done = broker.deliver(peer, fetch, [9, 10])
    assert logged(done, "pool.paused")[0]["reason"] == "area-full"
    assert (broker.index.free.count, broker.index.withheld.count) == (3, 0)
    broker.no_room = False
    broker.serve(61, [9, 10])
    assert {broker.area[1], broker.area[2]} == {page(9), page(10)}
    broker.no_slot_is_lost()


def test_a_full_area_is_used_in_pieces() -> None:
    broker, a, b = filled((1, 2), (3, 4), (5,), (6, 7, 8))
    gone(broker, 1, a, b)
    gone(broker, 3, a, b)
    assert [*broker.index.free] == [(0, 2), (4, 1)]

    def fill(token: int, first: int, pages: list[bytes], want: bytes) -> Event:
        broker.no_room = first // 4 not in broker.segments
        return Broker.fill(broker, token, first, pages, want)

    broker.fill = fill  # type: ignore[method-assign]
    symbols = [9, 10, 11, 12]
    for peer in (a, b):
        done = broker.bring(peer, 5, symbols)
    ((peer, fetch),) = fetches(done)
    done = broker.deliver(peer, fetch, symbols)
    assert logged(done, "pool.paused")[0]["reason"] == "area-full"
    done = broker.serve(32, symbols)
    # Three of the four have room, and are offered; the last one waits for more.
    assert [broker.area[slot] for slot in (0, 1, 4)] == [page(9), page(10), page(11)]
    assert [ints(fetch.runs) for _, fetch in fetches(done)] == [[0, 4], [3, 1]]
    assert logged(done, "pool.paused")[0]["reason"] == "area-full"
    assert offers(done, a)[5] == 3
    gone(broker, 2, a, b)
    broker.serve(62, symbols)
    assert broker.index.table.slots(broker.index.domains["a"].files[5].content.ids) == u32s(0, 1, 4, 2)
    broker.no_slot_is_lost()


def test_a_thin_segment_moves_into_free_slots_of_others_and_closes() -> None:
    broker, a, b = filled((1,), (2, 3, 4), (5, 6), (7, 8), (9,))
    broker.attach(a, 1)
    gone(broker, 2, a, b)
    broker.engine.settings = replace(SETTINGS, thin_ratio=0.3)
    gone(broker, 3, a, b)
    done = broker.ticks(2)
    moves = [action for action in done if isinstance(action, Move)]
    assert [(ints(move.slots), move.first) for move in moves] == [([0], 4)]
    assert withdrawn(done, a) == [([1], WithdrawReason.MOVING)]
    broker.release(a, 1)
    assert CloseSegment("pool", 0) in broker.ticks(2)
    assert granted(broker.attach(a, 1), a)
    assert broker.table == {FIRST: (DOMIDS["a"], 4)}
    broker.no_slot_is_lost()


def test_a_move_that_fails_for_want_of_room_leaves_its_segment_to_be_filled() -> None:
    broker, a, b = filled((1,), (2, 3, 4), (5, 6, 7, 8), (9,))
    gone(broker, 2, a, b)
    broker.engine.settings = replace(SETTINGS, thin_ratio=0.3)
    broker.index.free.remove(0, 1000)
    broker.index.withheld.add_all([(1, 3)])
    broker.index.emptying.add(0)
    broker.no_room = True
    done = broker.ticks(2)
    assert [ints(action.slots) for action in done if isinstance(action, Move)] == [[0]]
    assert broker.index.emptying == broker.pool.emptying == set()
    assert [*broker.index.free] == [(1, 3)]
    assert broker.pool.moving is None
    broker.no_room = False
    for peer in (a, b):
        broker.bring(peer, 7, [20, 21])
    broker.serve(62, [20, 21])
    assert {page(20), page(21)} <= set(broker.area.values())
    broker.no_slot_is_lost()


def test_a_thin_segment_stays_where_others_have_no_room() -> None:
    broker, a, b = filled((1,), (2, 3, 4), (5, 6, 7, 8))
    gone(broker, 2, a, b)
    broker.engine.settings = replace(SETTINGS, thin_ratio=0.3)
    assert not [action for action in broker.ticks(10) if isinstance(action, Move)]
    for peer in (a, b):
        done = broker.bring(peer, 4, [9, 10])
    ((peer, fetch),) = fetches(done)
    broker.deliver(peer, fetch, [9, 10])
    assert [broker.area[1], broker.area[2]] == [page(9), page(10)]
    broker.no_slot_is_lost()


def test_a_move_that_cannot_be_saved_is_made_again() -> None:
    broker, a, b = filled((1,), (2, 3, 4), (5, 6, 7, 8), (9,))
    gone(broker, 2, a, b)
    broker.engine.settings = replace(SETTINGS, thin_ratio=0.3)
    broker.refuse_commit = lambda changes: any(isinstance(change, SlotsFilled) for change in changes)
    assert len([action for action in broker.ticks(2) if isinstance(action, Move)]) == 1
    broker.no_slot_is_lost()
    broker.refuse_commit = lambda _: False
    done = broker.serve(62, [])
    assert len([action for action in done if isinstance(action, Move)]) == 1
    assert CloseSegment("pool", 0) in done
    broker.no_slot_is_lost()

"""Balances: what domains gave up and what they pay, from the engine's state; and what the balloon is told of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

import pytest

from sharearea.balloon import claims
from sharearea.common import wire
from sharearea.engine import Engine, PoolSetup
from sharearea.grants import GrantLimits
from sharearea.model import (
    Action,
    Commit,
    Committed,
    DomainGone,
    Event,
    Fill,
    GrantsWritten,
    Identity,
    PeerClosed,
    PeerConnected,
    Revoke,
    Revoked,
    WriteGrants,
)
from sharearea.pagetable import ReferencePageTable
from sharearea.policy import DomainRule, Policy, Reclaim
from sharearea.reclaim import Report
from sharearea.stats import XEN_MAPPING_BYTES, Balance, balances, domain_snapshots, pool_snapshot
from tests.test_engine import INSTANCE, PAGE, RULES, SETTINGS, Broker, file_root, fp, of, u32s

SLOTS = 8  # of a segment


class XenBroker(Broker):
    """The same on Xen. Entries of references in `busy` stay in use."""

    def __init__(self, reclaim: Reclaim = "balloon") -> None:
        super().__init__()
        rules = replace(RULES, reclaim=reclaim, reclaim_floor=1 << 20, reclaim_headroom=2 << 20)
        policy = Policy({"pool": rules}, (DomainRule("pool", ("*",), (), "test"),), backend="xen")
        table = ReferencePageTable(bytes(40), fp(0), rules.max_domains, rules.max_pages)
        setup = PoolSetup(b"a" * 16, b"e" * 16, b"k" * 32, SLOTS, table, grants=GrantLimits(1000, 500))
        self.engine = Engine(policy, {"pool": setup}, file_root, SETTINGS)
        self.area.clear()
        self.segments.clear()
        self.busy: set[int] = set()
        self.run(self.engine.start(self.now))

    def run(self, actions: Iterable[Action]) -> None:
        work = deque(actions)
        while work:
            action = work.popleft()
            self.trace.append(action)
            outcome: Event | None = None
            match action:
                case Fill():
                    pages = [action.pages[at : at + PAGE] for at in range(0, len(action.pages), PAGE)]
                    outcome = self.fill(action.token, action.first, pages, action.want)
                case Commit():
                    outcome = Committed(action.token)
                case WriteGrants():
                    outcome = GrantsWritten(action.token)
                case Revoke():
                    refs = [int.from_bytes(action.refs[i : i + 4], "little") for i in range(0, len(action.refs), 4)]
                    outcome = Revoked(action.token, bytes(ref in self.busy for ref in refs))
            if outcome is not None:
                work.extend(self.engine.handle(outcome, self.now))

    def join(self, name: str, held: tuple[int, ...] = (), instance: bytes = INSTANCE) -> int:
        """Domids are counted from 101."""
        self.peers += 1
        self.feed(PeerConnected(self.peers, Identity("xen", domid=100 + self.peers, name=name)))
        done = self.say(self.peers, wire.Hello(wire.PROTOCOL_VERSION, "0", "liar", instance, u32s(*held)))
        assert of(done, self.peers, wire.Welcome)
        return self.peers


def said(dropped: int, available: int = 0, pressure: int = 0, private: int = 0) -> wire.AgentStats:
    return wire.AgentStats(1, 2, 3, 4, 5, dropped, 0, private, 512 << 20, available, pressure)


def pages(granted: int, given_up: int | None, share: float) -> Balance:
    return Balance(granted * PAGE, None if given_up is None else given_up * PAGE, int(share * PAGE))


@pytest.fixture(params=[Broker, XenBroker])
def broker(request: pytest.FixtureRequest) -> Broker:
    made: Broker = request.param()
    return made


def of_pool(broker: Broker) -> dict[str, Balance]:
    return balances(broker.engine.pools()["pool"])


def test_a_slot_is_paid_by_those_who_map_it(broker: Broker) -> None:
    a, b = broker.share([1, 2, 3, 4], "a", "b")
    assert of_pool(broker) == {"a": pages(0, None, 0), "b": pages(0, None, 0)}
    broker.say(a, wire.Attach(u32s(1)))
    assert of_pool(broker) == {"a": pages(4, None, 4), "b": pages(0, None, 0)}
    broker.say(a, said(4))
    broker.say(b, wire.Attach(u32s(1)))
    broker.say(b, said(3))
    assert of_pool(broker) == {"a": pages(4, 4, 2), "b": pages(4, 3, 2)}
    assert of_pool(broker)["b"].net == PAGE
    broker.say(a, wire.Release(u32s(1)))
    assert of_pool(broker) == {"a": pages(0, 0, 0), "b": pages(4, 3, 4)}
    assert of_pool(broker)["b"].net == -PAGE


def test_nobody_can_have_given_up_more_than_was_granted(broker: Broker) -> None:
    a, _ = broker.share([1, 2, 3], "a", "b")
    broker.say(a, said(1 << 40))
    assert of_pool(broker)["a"] == pages(0, 0, 0)
    broker.say(a, wire.Attach(u32s(1)))
    assert of_pool(broker)["a"] == pages(3, 3, 3)


def test_an_absent_domain_pays_as_long_as_it_has_grants(broker: Broker) -> None:
    a, b = broker.share([1, 2], "a", "b")
    for peer in (a, b):
        broker.say(peer, wire.Attach(u32s(1)))
        broker.say(peer, said(2))
    broker.feed(PeerClosed(a, "end"))
    assert of_pool(broker) == {"a": pages(2, None, 1), "b": pages(2, 2, 1)}
    assert of_pool(broker)["a"].net == -PAGE
    assert of_pool(broker)["a"].most == PAGE
    broker.ticks(SETTINGS.grace + 2)
    assert of_pool(broker) == {"b": pages(2, 2, 2)}


def test_snapshots_show_the_balance(broker: Broker) -> None:
    a, b = broker.share([1, 2, 3, 4], "a", "b")
    for peer in (a, b):
        broker.say(peer, wire.Attach(u32s(1)))
    broker.say(a, said(4, available=7, pressure=8, private=9))
    pools = broker.engine.pools()
    shown = {domain["domain"]: domain for domain in domain_snapshots(pools, broker.now)}
    assert shown["a"]["given_up_bytes"] == 4 * PAGE
    assert (shown["a"]["share_bytes"], shown["a"]["net_bytes"]) == (2 * PAGE, 2 * PAGE)
    assert (shown["a"]["memory_bytes"], shown["a"]["available_bytes"], shown["a"]["pressure"]) == (512 << 20, 7, 8)
    assert (shown["b"]["given_up_bytes"], shown["b"]["net_bytes"]) == (None, -2 * PAGE)
    pool = pool_snapshot(pools["pool"], SLOTS * PAGE, 1000, broker.now, mapping_bytes=XEN_MAPPING_BYTES)
    assert pool["unmapped_bytes"] == (SLOTS - 4) * PAGE
    assert pool["given_up_bytes"] == 4 * PAGE
    assert pool["overhead_bytes"] == 1000 + 9 + 8 * XEN_MAPPING_BYTES
    assert pool["net_saved_bytes"] == 4 * PAGE - SLOTS * PAGE - pool["overhead_bytes"]
    broker.feed(PeerClosed(b, "end"))
    absent = {domain["domain"]: domain for domain in domain_snapshots(pools, broker.now)}["b"]
    assert (absent["state"], absent["share_bytes"]) == ("absent", 2 * PAGE)


def test_who_pins_a_slot_pays_for_it() -> None:
    broker = XenBroker()
    a, b = broker.share([1, 2], "a", "b")
    for peer in (a, b):
        broker.say(peer, wire.Attach(u32s(1)))
    broker.busy = {8, 9}  # the first two references, a's
    broker.say(a, wire.Release(u32s(1)))
    assert of_pool(broker) == {"a": pages(0, None, 1), "b": pages(2, None, 1)}
    shown = {domain["domain"]: domain for domain in domain_snapshots(broker.engine.pools(), broker.now)}
    assert (shown["a"]["owned_pages"], shown["a"]["held_pages"]) == (0, 2)
    assert (shown["b"]["owned_pages"], shown["b"]["held_pages"]) == (2, 2)
    broker.busy.clear()
    broker.ticks(60)
    assert of_pool(broker)["b"] == pages(2, None, 2)


def test_claims_are_those_of_pools_that_reclaim() -> None:
    broker = XenBroker()
    a, b = broker.share([1, 2], "a", "b")
    for peer in (a, b):
        broker.say(peer, wire.Attach(u32s(1)))
    broker.say(a, said(2, available=5, pressure=6))
    found = claims(broker.engine.pools())
    assert set(found) == {101, 102}
    one = found[101]
    assert (one.pool, one.domain, one.floor, one.headroom) == ("pool", "a", 1 << 20, 2 << 20)
    assert one.report == Report(broker.now, 5, 6)
    assert (one.balance, found[102].report) == (pages(2, 2, 1), None)
    broker.feed(PeerClosed(a, "end"))
    absent = claims(broker.engine.pools())[101]
    assert (absent.domain, absent.report, absent.balance.most) == ("a", None, PAGE)
    broker.feed(DomainGone(101))
    broker.ticks(2)
    assert set(claims(broker.engine.pools())) == {102}
    off = XenBroker("off")
    off.share([1, 2], "a", "b")
    assert claims(off.engine.pools()) == {}

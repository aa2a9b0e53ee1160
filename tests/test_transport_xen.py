"""The listener of the Xen backend: domains that come and go in a small xenstored, agents over real rings in memory.

Grants and event channels are the lab's (tests/xen/link_run.py): here a number in the store leads to rings in memory.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharearea.common.errors import HostError, NativeError
from sharearea.common.link import LinkClosed
from sharearea.common.ring_link import Channel, RingLink
from sharearea.common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, Ping, Pong
from sharearea.common.xenstore import XenStore, XenStoreLost
from sharearea.model import Identity
from sharearea.transport.xen import DETACHED, NODE, Arrived, DomainGone, ListenerEvent, Unreachable, XenListener
from tests.rings import MemoryChannel, channel_pair
from tests.xenstored import FakeXenstored

REFUSED = "sa_vchan_connect: no such grant"


class Host:
    """A small xenstored, agents that a test makes, and a clock that stands still until it is moved."""

    def __init__(self, folder: Path) -> None:
        self.server = FakeXenstored(folder / "socket")
        self.rings: dict[tuple[int, int, int], MemoryChannel] = {}
        self.asked: list[tuple[int, int, int]] = []
        self.lacking = 0
        self.now = 1000.0
        self.next = 100
        self.listener: XenListener
        self.links: list[RingLink] = []
        self.ends: list[MemoryChannel] = []

    def connect(self, domid: int, ring_ref: int, port: int) -> Channel:
        self.asked.append((domid, ring_ref, port))
        if self.lacking:
            raise NativeError("sa_vchan_connect", self.lacking, "too many open files")
        client = self.rings.pop((domid, ring_ref, port), None)
        if client is None:
            raise NativeError("sa_vchan_connect", errno.EINVAL, "no such grant")
        return client

    def offer(self, domid: int) -> MemoryChannel:
        """Offer fresh rings as an agent does; return the agent's end."""
        server, client = channel_pair()
        self.next += 1
        self.rings[domid, self.next, self.next + 7] = client
        self.ends += [server, client]
        self.server.remove(f"/local/domain/{domid}/{NODE}/event-channel")
        self.server.remove(f"/local/domain/{domid}/{NODE}/ring-ref")
        self.server.set(f"/local/domain/{domid}/{NODE}/ring-ref", str(self.next))
        self.server.set(f"/local/domain/{domid}/{NODE}/event-channel", str(self.next + 7))
        return server

    def events(self, count: int = 0, *, check: bool = True) -> list[ListenerEvent]:
        """Run the loop until `count` events are there, or, for none, for a moment in which nothing happens."""
        found: list[ListenerEvent] = []
        end = time.monotonic() + (20 if count else 0.1)
        while time.monotonic() < end and not (count and len(found) >= count):
            if select.select([self.listener], [], [], 0.02)[0]:
                found += self.listener.ready()
            if check:
                self.now += 0.3
                found += self.listener.check()
        for event in found:
            if isinstance(event, Arrived):
                self.links.append(event.link)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    with host.server:
        host.server.add_domain(0, "Domain-0", "00000000-0000-0000-0000-000000000000")
        host.server.add_domain(3, "web-1", "11111111-2222-3333-4444-555555555555", "office")
        with XenStore(host.server.path, timeout=20) as store:
            host.listener = XenListener(store, connect=host.connect, clock=lambda: host.now)
            with host.listener:
                yield host
        for link in host.links:
            link.close()
        for end in host.ends:
            end.close()


def arrived(events: list[ListenerEvent]) -> Arrived:
    (event,) = events
    assert isinstance(event, Arrived)
    return event


def test_an_agent_is_found_and_told_by_what_dom0_wrote(host: Host) -> None:
    agent = host.offer(3)
    event = arrived(host.events(1))
    assert event.identity == Identity(
        "xen", domid=3, name="web-1", uuid="11111111-2222-3333-4444-555555555555", label="office"
    )
    event.link.send(Ping(1))
    assert event.link.flush()
    assert agent.read() == BROKER_TO_AGENT.encode(Ping(1))
    agent.write([AGENT_TO_BROKER.encode(Pong(1))])
    assert event.link.receive() == [(Pong(1), None)]
    assert host.events() == []
    assert host.asked == [(3, 101, 108)]


def test_domains_are_known_from_the_start(host: Host) -> None:
    assert sorted(host.listener.domains()) == [3]  # nobody's owner is to be taken for gone


def test_domains_are_described_as_xenstore_has_them(host: Host) -> None:
    host.server.add_domain(4, "db", "99999999-2222-3333-4444-555555555555")
    host.server.set("/local/domain/4/memory/target", "lots")
    host.events()
    found = host.listener.domains()
    assert sorted(found) == [3, 4]
    assert (found[3].name, found[3].label, found[3].memory_target, found[3].memory_max) == (
        "web-1",
        "office",
        192 << 20,
        256 << 20,
    )
    assert (found[4].label, found[4].memory_target) == ("", 0)
    host.server.set("/local/domain/4/memory/target", "1024")
    assert host.listener.domains()[4].memory_target == 1 << 20


def test_a_domain_that_comes_later(host: Host) -> None:
    assert host.events() == []
    host.server.add_domain(9, "late", "u-9")
    host.offer(9)
    assert arrived(host.events(1)).identity.name == "late"


def test_an_agent_that_starts_again_is_met_again_once_its_old_link_is_closed(host: Host) -> None:
    agent = host.offer(3)
    first = arrived(host.events(1)).link
    agent.die()
    host.offer(3)
    assert host.events() == []  # two links of one domain at once would be one too many
    assert select.select([first], [], [], 5)[0]
    with pytest.raises(LinkClosed):
        first.receive()
    first.close()
    second = arrived(host.events(1)).link
    assert second is not first
    assert second.alive()


def test_a_second_agent_waits_for_the_first(host: Host) -> None:
    first_agent = host.offer(3)
    first = arrived(host.events(1)).link
    host.offer(3)
    assert host.events() == []
    first_agent.write([AGENT_TO_BROKER.encode(Pong(1))])
    assert first.receive() == [(Pong(1), None)]


@pytest.mark.parametrize(
    "value",
    ["", "0", "-1", "+1", " 8", "8 ", "8\n", "1e3", "0x10", "08", "4294967296", "9" * 2000, "\u0663", "eight"],
    ids=repr,
)
@pytest.mark.parametrize("which", ["ring-ref", "event-channel"])
def test_numbers_that_are_none_are_not_tried(host: Host, which: str, value: str) -> None:
    host.events()
    for name in ("ring-ref", "event-channel"):
        host.server.set(f"/local/domain/3/{NODE}/{name}", value if name == which else "5")
    assert host.events() == []
    assert host.asked == []
    host.offer(3)
    arrived(host.events(1))


def test_rings_that_cannot_be_used_are_said_once_and_tried_when_they_change(host: Host) -> None:
    host.server.set(f"/local/domain/3/{NODE}/ring-ref", "5")
    host.server.set(f"/local/domain/3/{NODE}/event-channel", "6")
    assert host.events(1) == [Unreachable(3, REFUSED)]
    asked = len(host.asked)
    assert host.events() == []
    assert len(host.asked) == asked
    host.server.set(f"/local/domain/3/{NODE}/event-channel", "7")
    host.now += 1
    assert host.events() == []
    assert len(host.asked) == asked + 1
    host.now += 20
    host.server.set(f"/local/domain/3/{NODE}/event-channel", "8")
    assert host.events(1) == [Unreachable(3, REFUSED)]


def test_a_host_at_its_limits_tries_again(host: Host) -> None:
    host.lacking = errno.EMFILE
    host.offer(3)
    assert host.events() == []
    assert host.listener.lacking == "sa_vchan_connect: too many open files"
    host.lacking = 0
    arrived(host.events(1))
    host.events()
    assert host.listener.lacking is None


@pytest.mark.parametrize("keep_nodes", [False, True])
def test_a_domain_that_ends_takes_its_link_along(host: Host, keep_nodes: bool) -> None:
    agent = host.offer(3)
    link = arrived(host.events(1)).link
    agent.write([AGENT_TO_BROKER.encode(Pong(1))])
    host.server.end_domain(3, keep_nodes=keep_nodes)
    assert host.events(1) == [DomainGone(3)]
    assert link.receive() == [(Pong(1), None)]
    with pytest.raises(LinkClosed, match="its domain is gone"):
        link.receive()
    assert host.events() == []
    assert host.listener.domains() == {}


def test_a_domain_that_is_parted_has_no_link_until_it_is_met_again(host: Host) -> None:
    host.offer(3)
    link = arrived(host.events(1)).link
    assert host.listener.offers(3)
    host.listener.part(3)
    host.listener.part(77)  # there is none
    assert host.server.nodes[f"/local/domain/3/{DETACHED}"] == "1"
    with pytest.raises(LinkClosed, match="detached"):
        link.receive()
    link.close()
    host.offer(3)  # an agent that does not look
    assert host.events() == []
    host.listener.meet(3)
    assert f"/local/domain/3/{DETACHED}" not in host.server.nodes
    arrived(host.events(1))
    host.server.remove(f"/local/domain/3/{NODE}/event-channel")
    assert not host.listener.offers(3)


def test_a_domain_that_ends_unheard_is_missed_by_the_census(host: Host) -> None:
    host.offer(3)
    link = arrived(host.events(1)).link
    host.server.domains.discard(3)
    assert host.events(1) == [DomainGone(3)]
    assert not link.alive()


def test_a_domid_that_comes_round_is_another_domain(host: Host) -> None:
    host.offer(3)
    link = arrived(host.events(1)).link
    host.server.set("/local/domain/3/vm", "/vm/another")
    host.server.fire("@introduceDomain")
    assert host.events(1)[0] == DomainGone(3)
    with pytest.raises(LinkClosed):
        link.receive()
    link.close()
    host.events()
    host.offer(3)
    assert arrived(host.events(1)).identity.uuid == "another"


def test_a_link_that_died_without_an_event_is_found_at_a_check(host: Host) -> None:
    agent = host.offer(3)
    link = arrived(host.events(1)).link
    assert link.receive() == []
    agent.memory[21] = 0
    assert not select.select([link], [], [], 0)[0]
    host.listener.check()
    assert select.select([link], [], [], 0)[0]


def test_a_domain_that_changes_its_node_all_the_time_is_not_listened_to_for_a_while(host: Host) -> None:
    host.server.add_domain(4, "loud", "u-4")
    host.events()
    before = host.server.requests
    for number in range(3000):
        host.server.set(f"/local/domain/4/{NODE}/{number % 400}", "x")
        host.server.set(f"/local/domain/4/{NODE}/ring-ref", "x")
        if number % 20 == 0:
            host.listener.ready()
    assert host.server.requests - before < 100
    # The others are heard all the same, at once.
    host.offer(3)
    assert arrived(host.events(1, check=False)).identity.domid == 3
    # It is listened to again later, and then nothing is missed.
    host.offer(4)
    assert host.events(check=False) == []
    host.now += 30
    assert arrived(host.events(1)).identity.domid == 4


def test_a_domain_is_looked_at_so_often_and_not_more_often(host: Host) -> None:
    host.events()
    asked = len(host.asked)
    for number in range(30):
        host.server.set(f"/local/domain/3/{NODE}/ring-ref", str(number + 1))
        host.server.set(f"/local/domain/3/{NODE}/event-channel", "6")
        host.listener.ready()
    host.listener.ready()
    assert len(host.asked) - asked <= 1
    host.now += 1
    host.listener.check()
    assert host.asked[-1] == (3, 30, 6)


def test_a_xenstored_that_answers_too_late_is_made_up_for(host: Host) -> None:
    with XenStore(host.server.path, timeout=0.2) as store:
        listener = XenListener(store, connect=host.connect, clock=lambda: host.now)
        host.server.silent = True
        agent_of = host.offer(3)
        assert listener.check() == []
        assert listener.lacking is not None
        host.server.silent = False
        host.server.speak()
        end = time.monotonic() + 20
        found: list[ListenerEvent] = []
        while not found and time.monotonic() < end:
            host.now += 0.3
            found += listener.check()
        host.links.append(arrived(found).link)
        assert listener.lacking is None
        assert agent_of.state()
        listener.close()
        listener.close()


def test_the_end_of_xenstored_is_an_error(host: Host) -> None:
    host.events()
    host.server.hang_up()
    select.select([host.listener], [], [], 20)
    with pytest.raises(XenStoreLost):
        host.listener.ready()


def test_without_the_devices_nothing_is_accepted(host: Host) -> None:
    with XenStore(host.server.path) as store:
        host.offer(3)
        listener = XenListener(store, clock=lambda: host.now)
        if not store.has_events:
            select.select([listener], [], [], 20)
        with pytest.raises(HostError, match=r"/dev/xen"):
            listener.check()

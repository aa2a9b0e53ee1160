"""Links over real rings in shared memory: frames in pieces, peers that die, lie, flood or do not read, no event lost.

The same over real event channels and grants is shown in the lab (tests/xen/link_run.py).
"""

from __future__ import annotations

import os
import random
import select
import selectors
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea.common.errors import Closed, PeerUnreachable, ProtocolError
from sharearea.common.link import RECEIVE_BYTES, Link, LinkClosed, QueueFull
from sharearea.common.native import RING_OPEN
from sharearea.common.ring_link import RingLink
from sharearea.common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, Data, Granted, Message, Ping, Pong, Segment
from tests.rings import MemoryChannel, channel_pair

MEBIBYTE = 1 << 20
LARGE = Data(1, b"\1" * 255, random.Random(0).randbytes(255 * 4096))


def broker_end(channel: MemoryChannel, max_queue_bytes: int = 4 * MEBIBYTE) -> RingLink:
    return RingLink(channel, incoming=AGENT_TO_BROKER, outgoing=BROKER_TO_AGENT, max_queue_bytes=max_queue_bytes)


def agent_end(channel: MemoryChannel) -> RingLink:
    return RingLink(channel, incoming=BROKER_TO_AGENT, outgoing=AGENT_TO_BROKER, max_queue_bytes=4 * MEBIBYTE)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture(params=[(12, 12), (10, 11), (16, 16), (11, 13)], ids=str)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[RingLink, RingLink]]:
    """Give the broker's and the agent's end; the agent is the server."""
    server, client = channel_pair(*request.param)
    with broker_end(client) as broker, agent_end(server) as agent:
        yield broker, agent


@pytest.fixture
def raw() -> Iterator[tuple[MemoryChannel, RingLink]]:
    """Give a bare end, and the broker's link at its other end."""
    server, client = channel_pair()
    with broker_end(client) as broker:
        yield server, broker
    server.close()


def readable(link: RingLink) -> bool:
    return bool(select.select([link], [], [], 0)[0])


def carried(sender: RingLink, receiver: RingLink) -> list[Message]:
    """Flush and receive in turns until everything is over."""
    received: list[Message] = []
    while not sender.flush():
        received += [message for message, _ in receiver.receive()]
    while more := receiver.receive():
        received += [message for message, _ in more]
    return received


# ----------------------------------------------------------------------------------------------------- messages


def test_messages_arrive_in_order_and_both_ways(pair: tuple[RingLink, RingLink]) -> None:
    broker, agent = pair
    for number in range(1000):
        broker.send(Ping(number))
    assert carried(broker, agent) == [Ping(number) for number in range(1000)]
    for message in (Pong(5), LARGE, Pong(6)):
        agent.send(message)
    assert carried(agent, broker) == [Pong(5), LARGE, Pong(6)]
    assert broker.receive() == []
    assert agent.receive() == []


def test_a_large_frame_goes_in_parts(pair: tuple[RingLink, RingLink]) -> None:
    broker, agent = pair
    agent.send(LARGE)
    whole = agent.queued_bytes
    assert not agent.flush()  # the ring is smaller than the frame
    assert agent.wants_write
    assert 0 < agent.queued_bytes < whole
    assert broker.receive() == []
    assert carried(agent, broker) == [LARGE]
    assert not agent.wants_write
    assert agent.queued_bytes == 0


@given(
    messages=st.lists(
        st.one_of(st.integers(0, 9).map(Ping), st.integers(0, 500).map(lambda n: Granted(n, bytes(12 * n)))),
        max_size=12,
    ),
    cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
)
def test_a_stream_may_be_cut_anywhere(messages: list[Message], cuts: list[int]) -> None:
    server, client = channel_pair()
    with agent_end(server) as agent:
        received: list[Message] = []
        turn = 0
        for message in messages:
            frame = memoryview(BROKER_TO_AGENT.encode(message))
            while frame:
                frame = frame[client.write([frame[: cuts[turn % len(cuts)]]]) :]
                turn += 1
                received += [message for message, _ in agent.receive()]
        assert received == messages
    client.close()


def test_it_is_what_a_loop_takes_for_a_link(raw: tuple[MemoryChannel, RingLink]) -> None:
    link: Link = raw[1]
    assert link.poll_events(True) == selectors.EVENT_READ
    assert link.poll_events(False) == 0
    link.send(Ping(1))
    assert link.poll_events(False) == selectors.EVENT_READ  # room is announced like bytes


def test_messages_that_do_not_belong_here_are_not_queued(raw: tuple[MemoryChannel, RingLink]) -> None:
    _, link = raw
    with pytest.raises(ValueError, match="no descriptor"):
        link.send(Segment(1))
    with pytest.raises(ValueError, match="no descriptor"):
        link.send(Ping(1), 0)
    with pytest.raises(ValueError, match="does not travel"):
        link.send(Pong(1))
    assert not link.wants_write


def test_a_peer_that_does_not_read_fills_its_queue_only() -> None:
    server, client = channel_pair()
    with agent_end(server) as agent, broker_end(client, max_queue_bytes=10_000) as broker:
        grant = Granted(1, bytes(12 * 100))
        for _ in range(8):
            broker.send(grant)
        with pytest.raises(QueueFull):
            broker.send(grant)
        queued = broker.queued_bytes
        assert 8_000 < queued <= 10_000
        assert not broker.flush()
        assert broker.queued_bytes == queued - 4096
        broker.send(Ping(1))
        assert carried(broker, agent)[-1] == Ping(1)


# --------------------------------------------------------------------------------------------------------- ends


def test_what_was_sent_before_the_end_is_received(pair: tuple[RingLink, RingLink]) -> None:
    broker, agent = pair
    agent.send(Pong(1))
    agent.flush()
    agent.close()
    assert readable(broker)
    assert broker.receive() == [(Pong(1), None)]
    assert readable(broker)  # the end has to be heard of, too
    for _ in range(2):
        with pytest.raises(LinkClosed, match=r"closed the connection$"):
            broker.receive()
    with pytest.raises(PeerUnreachable):
        broker.receive()


def test_a_peer_that_is_killed_in_the_middle_of_a_frame(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    peer.write([AGENT_TO_BROKER.encode(Pong(1)) + b"\7\0"])
    peer.die()
    assert link.receive() == [(Pong(1), None)]
    with pytest.raises(LinkClosed, match="in the middle of a frame"):
        link.receive()


def test_writing_to_a_peer_that_is_gone(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    peer.write([AGENT_TO_BROKER.encode(Pong(3))])
    peer.die()
    link.send(Ping(1))
    with pytest.raises(LinkClosed, match="cannot write"):
        link.flush()
    assert link.receive() == [(Pong(3), None)]
    with pytest.raises(LinkClosed):
        link.receive()


def test_a_peer_that_dies_without_an_event_is_found_by_looking(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    assert link.receive() == []
    assert link.alive()
    assert not readable(link)
    peer.memory[21] = 0  # srv_live, as if the event had been lost
    assert not readable(link)
    assert not link.alive()
    assert readable(link)
    with pytest.raises(LinkClosed):
        link.receive()


def test_a_domain_that_is_gone_is_said_to_be(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    peer.write([AGENT_TO_BROKER.encode(Pong(3))])
    link.lose("its domain is gone")
    link.lose("something else")
    assert link.receive() == [(Pong(3), None)]
    with pytest.raises(LinkClosed, match="its domain is gone"):
        link.receive()


def test_a_closed_link_says_so(raw: tuple[MemoryChannel, RingLink]) -> None:
    _, link = raw
    link.send(Ping(1))
    assert not link.closed
    link.close()
    link.close()
    link.lose("no matter")
    assert link.closed
    assert not link.wants_write
    for use in (link.fileno, link.receive, link.flush, link.alive, lambda: link.send(Ping(1))):
        with pytest.raises(Closed):
            use()


# --------------------------------------------------------------------------------------------------------- lies


def lie(peer: MemoryChannel, offset: int, number: int) -> None:
    """Write a counter of the control page: left.cons 0, left.prod 4, right.cons 8, right.prod 12."""
    struct.pack_into("<I", peer.memory, offset, number)
    peer.notify()


def test_an_abandoned_link_is_not_heard_of_again(raw: tuple[MemoryChannel, RingLink]) -> None:
    channel, link = raw
    link.abandon()
    link.close()
    assert link.closed
    assert channel.state() == RING_OPEN
    with pytest.raises(Closed):
        link.receive()


def test_a_peer_that_lies_about_its_bytes_is_told_from_one_that_left(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    peer.write([AGENT_TO_BROKER.encode(Pong(3))])
    lie(peer, 12, 5000)
    for _ in range(2):
        with pytest.raises(ProtocolError, match="make no sense"):
            link.receive()
    # Last words still go out.
    link.send(Ping(1))
    assert link.flush()
    assert peer.read() == BROKER_TO_AGENT.encode(Ping(1))


def test_a_peer_that_lies_about_what_it_has_read(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    link.receive()
    lie(peer, 0, 77)
    link.send(Ping(1))
    assert not link.flush()
    assert not link.flush()
    assert link.wants_write
    assert readable(link)
    with pytest.raises(ProtocolError, match="make no sense"):
        link.receive()
    # It is to go, and is not read any more: nothing may turn the loop round and round.
    assert link.poll_events(False) == selectors.EVENT_READ
    link.flush()
    assert not readable(link)


def test_a_frame_that_is_none_is_the_peers_fault(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    peer.write([AGENT_TO_BROKER.encode(Pong(3)) + b"\xff\xff\xff\xff"])
    for _ in range(2):
        with pytest.raises(ProtocolError, match="a frame of"):
            link.receive()


# ------------------------------------------------------------------------------------------------------- events


def test_bytes_that_came_before_the_link_are_seen() -> None:
    server, client = channel_pair()
    client.write([BROKER_TO_AGENT.encode(Ping(1))])
    server.drain()
    with agent_end(server) as agent:
        assert readable(agent)
        assert agent.receive() == [(Ping(1), None)]
        assert not readable(agent)
    client.close()


def test_a_call_reads_a_bounded_amount_and_leaves_the_descriptor_readable() -> None:
    server, client = channel_pair(12, 20)
    with broker_end(client) as broker, agent_end(server) as agent:
        agent.send(LARGE)
        agent.send(LARGE)
        assert not agent.flush()
        assert broker.receive() == [(LARGE, None)]  # all that the ring held, which is as much as one call reads
        assert readable(broker)
        assert agent.flush()
        assert broker.receive() == [(LARGE, None)]
        assert not readable(broker)


def test_a_peer_that_writes_as_fast_as_it_is_read_takes_its_share_only(
    raw: tuple[MemoryChannel, RingLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, link = raw
    frames = AGENT_TO_BROKER.encode(Data(1, bytes(255), b"")) * 200
    monkeypatch.setattr(MemoryChannel, "read", lambda _: frames)
    messages = link.receive()
    assert RECEIVE_BYTES <= len(messages) * len(frames) // 200 < RECEIVE_BYTES + len(frames)
    assert readable(link)


def test_a_link_that_is_held_back_loses_nothing_and_does_not_spin(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    assert link.receive() == []
    link.poll_events(False)
    for number in range(400):  # more than the ring takes
        link.send(Granted(number, bytes(12)))
    assert not link.flush()
    assert not readable(link)
    peer.write([AGENT_TO_BROKER.encode(Pong(1))])
    assert readable(link)  # the event may be about room
    assert not link.flush()
    assert link.poll_events(False) == selectors.EVENT_READ
    assert not readable(link)
    peer.read()
    assert readable(link)
    link.flush()
    link.poll_events(False)
    assert not readable(link)
    link.poll_events(True)
    assert readable(link)
    assert link.receive() == [(Pong(1), None)]
    assert not readable(link)


def test_room_that_is_announced_while_bytes_are_read_is_used(raw: tuple[MemoryChannel, RingLink]) -> None:
    # A loop calls flush() and then receive(): the event between the two is about both, and receive() takes it.
    peer, link = raw
    for number in range(400):
        link.send(Granted(number, bytes(12)))
    assert not link.flush()
    queued = link.queued_bytes
    peer.read()
    peer.write([AGENT_TO_BROKER.encode(Pong(1))])
    assert link.receive() == [(Pong(1), None)]
    assert link.queued_bytes == queued - 4096 or readable(link)


class _Loop(threading.Thread):
    """One end with a loop of its own: sends `count` messages, expects as many, and is now and then held back."""

    def __init__(self, link: RingLink, message: Message, expected: Message, count: int) -> None:
        super().__init__()
        self.link, self.message, self.expected, self.count = link, message, expected, count
        self.random = random.Random(count)
        self.got = 0
        self.wrong = 0
        self.timeouts = 0

    def run(self) -> None:
        sent = 0
        with selectors.DefaultSelector() as selector:
            selector.register(self.link, selectors.EVENT_READ)
            while sent < self.count or self.got < self.count or self.link.wants_write:
                while sent < self.count and self.link.queued_bytes < 1 << 19:
                    self.link.send(self.message)
                    sent += 1
                if self.link.flush() and sent == self.count == self.got:
                    return
                # Held back for a moment only: two that both wait for room and read nothing wait for ever.
                reading = not self.link.wants_write or self.random.random() < 0.7
                selector.modify(self.link, self.link.poll_events(reading))
                if not selector.select(30 if reading else 0) and reading:
                    self.timeouts += 1
                    return
                if self.link.wants_write:
                    self.link.flush()
                if reading:
                    got = [message for message, _ in self.link.receive()]
                    self.wrong += sum(message != self.expected for message in got)
                    self.got += len(got)


@pytest.mark.parametrize(
    ("orders", "size", "count"),
    [((10, 11), 2, 20_000), ((12, 12), 300, 3_000), ((16, 16), 60_000, 60), ((16, 16), 1, 40_000)],
    ids=str,
)
def test_two_loops_never_wait_for_an_event_that_does_not_come(orders: tuple[int, int], size: int, count: int) -> None:
    server, client = channel_pair(*orders)
    with broker_end(client) as broker, agent_end(server) as agent:
        down, up = Granted(7, random.Random(1).randbytes(12 * size)), Data(7, bytes(size % 256), b"")
        loops = [_Loop(broker, down, up, count), _Loop(agent, up, down, count)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join(120)
        assert [(loop.got, loop.wrong, loop.timeouts) for loop in loops] == [(count, 0, 0)] * 2


def test_one_after_the_other_costs_no_time(raw: tuple[MemoryChannel, RingLink]) -> None:
    peer, link = raw
    with agent_end(peer) as agent:
        begun = time.monotonic()
        for number in range(2000):
            link.send(Ping(number))
            assert link.flush()
            assert select.select([agent], [], [], 5)[0]
            assert agent.receive() == [(Ping(number), None)]
            agent.send(Pong(number))
            assert agent.flush()
            assert select.select([link], [], [], 5)[0]
            assert link.receive() == [(Pong(number), None)]
        assert not readable(link)
        assert time.monotonic() - begun < 20

"""Links over real socket pairs: frames in pieces, descriptors between frames, peers that die, flood or do not read."""

from __future__ import annotations

import array
import fcntl
import os
import random
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea.common.errors import Closed, PeerUnreachable, ProtocolError
from sharearea.common.link import RECEIVE_BYTES, LinkClosed, QueueFull, StreamLink
from sharearea.common.wire import (
    AGENT_TO_BROKER,
    BROKER_TO_AGENT,
    Data,
    Gone,
    Granted,
    Message,
    Ping,
    Pong,
    Segment,
)

MEBIBYTE = 1 << 20
LARGE = Data(1, b"\1" * 255, random.Random(0).randbytes(255 * 4096))
GRANT = Granted(1, random.Random(0).randbytes(12 * 60_000))


def broker_end(sock: socket.socket, max_queue_bytes: int = 4 * MEBIBYTE) -> StreamLink:
    return StreamLink(sock, incoming=AGENT_TO_BROKER, outgoing=BROKER_TO_AGENT, max_queue_bytes=max_queue_bytes)


def agent_end(sock: socket.socket, accept_fds: int = 1) -> StreamLink:
    return StreamLink(
        sock,
        incoming=BROKER_TO_AGENT,
        outgoing=AGENT_TO_BROKER,
        max_queue_bytes=4 * MEBIBYTE,
        accept_fds=accept_fds,
    )


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def pair() -> Iterator[tuple[StreamLink, StreamLink]]:
    one, other = socket.socketpair()
    with broker_end(one) as broker, agent_end(other) as agent:
        yield broker, agent


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, StreamLink]]:
    """Give a plain socket and the agent's link at its other end."""
    one, other = socket.socketpair()
    with one, agent_end(other) as agent:
        yield one, agent


def carried(sender: StreamLink, receiver: StreamLink) -> list[tuple[Message, int | None]]:
    """Flush and receive in turns until everything is over."""
    received: list[tuple[Message, int | None]] = []
    while not sender.flush():
        received += receiver.receive()
    while more := receiver.receive():
        received += more
    return received


def rights(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


# ----------------------------------------------------------------------------------------------------- messages


def test_messages_arrive_in_order_and_both_ways(pair: tuple[StreamLink, StreamLink]) -> None:
    broker, agent = pair
    for number in range(1000):
        broker.send(Ping(number))
    assert [message for message, _ in carried(broker, agent)] == [Ping(number) for number in range(1000)]
    agent.send(Pong(5))
    agent.send(LARGE)
    agent.send(Pong(6))
    assert carried(agent, broker) == [(Pong(5), None), (LARGE, None), (Pong(6), None)]
    assert broker.receive() == []
    assert agent.receive() == []


def test_a_large_frame_goes_in_parts(pair: tuple[StreamLink, StreamLink]) -> None:
    broker, agent = pair
    agent.send(LARGE)
    assert not agent.flush()  # a socket buffer is smaller than the frame
    assert agent.wants_write
    assert 0 < agent.queued_bytes < 255 * 4096
    assert broker.receive() == []
    assert carried(agent, broker) == [(LARGE, None)]
    assert not agent.wants_write
    assert agent.queued_bytes == 0


@given(
    messages=st.lists(
        st.one_of(
            st.integers(0, 9).map(Ping),
            st.integers(0, 500).map(lambda n: Granted(n, bytes(12 * n))),
            st.just(Segment(3)),
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
)
def test_a_stream_may_be_cut_anywhere(messages: list[Message], cuts: list[int]) -> None:
    one, other = socket.socketpair()
    with one, agent_end(other, accept_fds=12) as agent, open(os.devnull, "rb") as null:
        received: list[tuple[Message, int | None]] = []
        turn = 0
        for message in messages:
            frame = memoryview(BROKER_TO_AGENT.encode(message))
            attached = rights(null.fileno()) if message.FD else []
            while frame:
                sent = one.sendmsg([frame[: cuts[turn % len(cuts)]]], attached)
                frame, attached, turn = frame[sent:], [], turn + 1
                received += agent.receive()
        assert [message for message, _ in received] == messages
        for message, fd in received:
            assert (fd is not None) == message.FD
            if fd is not None:
                assert same_file(fd, null.fileno())
                os.close(fd)


def test_one_call_reads_a_bounded_amount() -> None:
    one, other = socket.socketpair()
    with broker_end(one) as broker, other:
        frame = AGENT_TO_BROKER.encode(LARGE)
        total = 8
        # A writer that never stops would otherwise keep the broker in one call for as long as it likes.
        writer = threading.Thread(target=other.sendall, args=(frame * total,))
        writer.start()
        received = 0
        while received < total:
            messages = broker.receive()
            assert len(messages) * len(frame) <= RECEIVE_BYTES + len(frame)
            received += len(messages)
        writer.join()


def test_a_queue_is_bounded_and_loses_nothing() -> None:
    one, other = socket.socketpair()
    with broker_end(one, max_queue_bytes=2 * MEBIBYTE) as broker, agent_end(other) as agent:
        broker.send(GRANT)
        broker.send(GRANT)
        before = broker.queued_bytes
        with open(os.devnull, "rb") as null:
            broker.send(Segment(1), null.fileno())
        with pytest.raises(QueueFull, match=str(2 * MEBIBYTE)):
            broker.send(GRANT)
        assert before < broker.queued_bytes < before + 20
        received = carried(broker, agent)
        assert [message for message, _ in received] == [GRANT, GRANT, Segment(1)]
        _close_fds(received)
        broker.send(GRANT)


def _close_fds(received: list[tuple[Message, int | None]]) -> None:
    for _, fd in received:
        if fd is not None:
            os.close(fd)


def test_a_message_that_does_not_belong_here_is_our_own_fault(pair: tuple[StreamLink, StreamLink]) -> None:
    broker, agent = pair
    with pytest.raises(ValueError, match="does not travel"):
        broker.send(Pong(1))
    with pytest.raises(ValueError, match="needs a descriptor"):
        broker.send(Segment(1))
    with pytest.raises(ValueError, match="without descriptor"):
        agent.send(Pong(1), 0)
    assert not broker.wants_write


# --------------------------------------------------------------------------------------------------- descriptors


def test_descriptors_stay_with_their_messages(pair: tuple[StreamLink, StreamLink], tmp_path: Path) -> None:
    broker, agent = pair
    names = [tmp_path / str(number) for number in range(6)]
    expected: list[Message] = []
    for number, name in enumerate(names):
        # Large frames on both sides: descriptors are sent while the socket is full, and read in the middle of frames.
        with name.open("wb") as file:
            broker.send(GRANT if number % 2 else Ping(number))
            broker.send(Segment(number), file.fileno())
            expected += [GRANT if number % 2 else Ping(number), Segment(number)]
    received = carried(broker, agent)
    assert [message for message, _ in received] == expected
    for (message, fd), name in zip(received[1::2], names, strict=True):
        assert fd is not None
        assert os.path.samestat(os.fstat(fd), name.stat()), message
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert all(fd is None for _, fd in received[::2])
    _close_fds(received)


def test_a_descriptor_is_a_duplicate(pair: tuple[StreamLink, StreamLink]) -> None:
    broker, agent = pair
    with open(os.devnull, "rb") as null:
        broker.send(Segment(1), null.fileno())
        info = os.fstat(null.fileno())
    with open(os.devnull, "wb"):  # takes the number that the caller has closed
        ((_, fd),) = carried(broker, agent)
    assert fd is not None
    assert os.path.samestat(os.fstat(fd), info)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(fd)


def test_a_message_without_its_descriptor_is_refused(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    peer.sendall(BROKER_TO_AGENT.encode(Segment(1)))
    with pytest.raises(ProtocolError, match="Segment came without its descriptor"):
        agent.receive()
    peer.sendall(BROKER_TO_AGENT.encode(Ping(1)))
    with pytest.raises(ProtocolError, match="Segment"):
        agent.receive()


def test_descriptors_that_nobody_may_send_never_enter(pair: tuple[StreamLink, StreamLink]) -> None:
    broker, agent = pair
    before = len(os.listdir("/proc/self/fd"))
    frame = AGENT_TO_BROKER.encode(Pong(1))
    with socket.socket(fileno=os.dup(agent.fileno())) as peer, open(os.devnull, "rb") as null:
        peer.sendmsg([frame], rights(*[null.fileno()] * 253))
    with pytest.raises(ProtocolError, match="more than 0 descriptors"):
        broker.receive()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("count", [2, 3, 253])
def test_a_message_with_too_many_descriptors_is_refused(raw: tuple[socket.socket, StreamLink], count: int) -> None:
    peer, agent = raw
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as null:
        peer.sendmsg([BROKER_TO_AGENT.encode(Segment(1))], rights(*[null.fileno()] * count))
    with pytest.raises(ProtocolError, match="more than 1 descriptors"):
        agent.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_flood_of_descriptors_is_refused(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    before = len(os.listdir("/proc/self/fd"))
    frame = BROKER_TO_AGENT.encode(Ping(1))
    with open(os.devnull, "rb") as null:
        peer.sendmsg([frame], rights(null.fileno()))
        peer.sendmsg([frame], rights(null.fileno()))
    with pytest.raises(ProtocolError, match="more than 1 descriptors"):
        agent.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_messages_lost_to_an_error_lose_their_descriptors_too(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as null:
        peer.sendmsg([BROKER_TO_AGENT.encode(Segment(1))], rights(null.fileno()))
    peer.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError, match="frame of"):
        agent.receive()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_without_descriptors_closes_the_link_and_blames_nobody(
    raw: tuple[socket.socket, StreamLink],
) -> None:
    peer, agent = raw
    with open(os.devnull, "rb") as null:
        peer.sendall(BROKER_TO_AGENT.encode(Ping(1)))
        peer.sendmsg([BROKER_TO_AGENT.encode(Segment(1))], rights(null.fileno()))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(LinkClosed, match="descriptor was lost"):
            agent.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert peer.recv(1) == b""


def test_close_closes_what_was_neither_taken_nor_sent(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    before = len(os.listdir("/proc/self/fd"))
    one, other = socket.socketpair()
    broker = broker_end(one)
    with open(os.devnull, "rb") as null:
        peer.sendmsg([BROKER_TO_AGENT.encode(Segment(1))[:3]], rights(null.fileno()))
        assert agent.receive() == []
        broker.send(Segment(1), null.fileno())
        broker.send(Segment(2), null.fileno())
    assert len(os.listdir("/proc/self/fd")) == before + 5
    agent.close()
    broker.close()
    other.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


# ---------------------------------------------------------------------------------------------------------- ends


def test_what_was_sent_before_the_end_arrives(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    peer.sendall(BROKER_TO_AGENT.encode(Ping(1)) + BROKER_TO_AGENT.encode(Ping(2)))
    peer.close()
    assert agent.receive() == [(Ping(1), None), (Ping(2), None)]
    for _ in range(2):
        with pytest.raises(LinkClosed, match=r"closed the connection$"):
            agent.receive()


def test_an_end_inside_a_frame_says_so(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    peer.sendall(BROKER_TO_AGENT.encode(Ping(1))[:-1])
    peer.close()
    with pytest.raises(LinkClosed, match="in the middle of a frame"):
        agent.receive()


def test_a_peer_that_dies_with_unread_bytes(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    agent.send(Pong(1))
    agent.flush()
    peer.close()  # with Pong unread: the kernel answers with a reset
    with pytest.raises(LinkClosed, match="broke"):
        agent.receive()
    assert issubclass(LinkClosed, PeerUnreachable)


def test_writing_to_the_dead_is_an_error_and_no_signal(raw: tuple[socket.socket, StreamLink]) -> None:
    peer, agent = raw
    peer.sendall(BROKER_TO_AGENT.encode(Ping(7)))
    peer.close()
    agent.send(Pong(1))
    with pytest.raises(LinkClosed, match="cannot write"):
        agent.flush()
    assert agent.receive() == [(Ping(7), None)]


@pytest.mark.parametrize(
    "bytes_sent",
    [
        struct.pack("<I", 0),
        struct.pack("<I", MEBIBYTE + 1),
        struct.pack("<I", 1) + b"\xc1",
        AGENT_TO_BROKER.encode(Gone(b"")),
        struct.pack("<I", 4) + b"junk",
    ],
    ids=["empty", "too long", "no msgpack", "wrong way", "junk"],
)
def test_what_is_not_allowed_is_refused_and_stays_refused(
    raw: tuple[socket.socket, StreamLink], bytes_sent: bytes
) -> None:
    peer, agent = raw
    peer.sendall(bytes_sent)
    with pytest.raises(ProtocolError):
        agent.receive()
    with pytest.raises(ProtocolError):
        agent.receive()


def test_a_closed_link_raises(pair: tuple[StreamLink, StreamLink]) -> None:
    _, agent = pair
    agent.close()
    agent.close()
    calls: list[Callable[[], object]] = [agent.receive, agent.flush, agent.fileno, lambda: agent.send(Pong(1))]
    for call in calls:
        with pytest.raises(Closed):
            call()
    assert not agent.wants_write

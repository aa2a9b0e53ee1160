"""The agent's end of consumers' connections: what a consumer does at an unlucky moment ends nobody else's service."""

from __future__ import annotations

import os
import selectors
import socket
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sharearea_agent.agent import CutOff, FileKey, ShareWith
from sharearea_agent.common.link import StreamLink
from sharearea_agent.consumer_wire import AGENT_TO_CONSUMER, CONSUMER_TO_AGENT, Close, Open, Unchanged
from sharearea_agent.consumers import ConsumerHub
from sharearea_agent.mapper import LocalMapper


class Agent:
    """A hub on a selector, and programs that connect to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "s"
        self.selector = selectors.DefaultSelector()
        self.events: list[Any] = []
        self.hub = ConsumerHub(self.path, self.selector, LocalMapper(), self.events.append, lambda *_, **__: None)
        self.links: list[StreamLink] = []

    def connect(self) -> StreamLink:
        """Connect a program."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.fspath(self.path))
        sock.setblocking(False)
        link = StreamLink(
            sock, incoming=AGENT_TO_CONSUMER, outgoing=CONSUMER_TO_AGENT, max_queue_bytes=1 << 20, accept_fds=4
        )
        self.links.append(link)
        self.turn()
        return link

    def turn(self) -> None:
        """Do one round of the agent's loop."""
        for key, mask in self.selector.select(0):
            key.data(mask)

    def close(self) -> None:
        """Close everything."""
        for link in self.links:
            link.close()
        self.hub.close()
        self.selector.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path)
    yield agent
    agent.close()


def test_who_was_dropped_in_this_round_of_the_selector_is_not_read(agent: Agent) -> None:
    first, second = agent.connect(), agent.connect()
    for link in (first, second):
        link.send(Unchanged())
        link.flush()
    ready = agent.selector.select(0)
    assert len(ready) == 2
    for number in (1, 2):
        agent.hub.cut_off(CutOff(number))
    for key, mask in ready:
        key.data(mask)
    assert agent.hub.programs() == []
    third = agent.connect()
    third.send(Unchanged())
    third.flush()
    agent.turn()
    assert [(number, unchanged) for number, _, _, unchanged in agent.hub.programs()] == [(3, True)]


def test_handles_of_a_file_that_was_just_closed_go_to_nobody(agent: Agent, tmp_path: Path) -> None:
    data = tmp_path / "f"
    data.write_bytes(bytes(4096))
    fd = os.open(data, os.O_RDONLY)
    try:
        program = agent.connect()
        program.send(Open(7, 4096), fd)
        program.send(Close(7))
        program.flush()
        agent.turn()
        assert [type(event).__name__ for event in agent.events] == ["Opened", "Closed"]
        agent.hub.share(ShareWith(1, 7, 1, array("I", (0, 0, 1)).tobytes()))
        assert program.receive() == []
        assert len(agent.hub.programs()) == 1
    finally:
        os.close(fd)


@pytest.mark.parametrize("other", [False, True])
def test_a_file_that_was_opened_through_a_view_is_leased_by_its_plain_path(tmp_path: Path, other: bool) -> None:
    data, seen = tmp_path / "f", tmp_path / "in-view"
    data.write_bytes(bytes(4096))
    os.link(data, seen)
    if other:
        data.unlink()
        data.write_bytes(bytes(4096))
    agent = Agent(tmp_path)
    agent.hub.close()
    agent.hub = ConsumerHub(
        agent.path,
        agent.selector,
        LocalMapper(),
        agent.events.append,
        lambda *_, **__: None,
        plain_path=lambda _fd, _key: os.fsencode(data),
    )
    fd = os.open(seen, os.O_RDONLY)
    try:
        program = agent.connect()
        program.send(Open(7, 4096), fd)
        program.flush()
        agent.turn()
        status = os.fstat(fd)
        own = agent.hub.files[FileKey(status.st_dev, status.st_ino)].fd
        assert os.readlink(f"/proc/self/fd/{own}") == str(seen if other else data)
    finally:
        os.close(fd)
        agent.close()

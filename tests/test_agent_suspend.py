"""A guest that is saved must have no event channel then: when rings are made, taken away, and left as they are.

xenstored is the tests' own; the rings are only noted, for gntalloc and evtchn are in guests alone.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sharearea_agent import connect
from sharearea_agent.common.xenstore import XenStore
from sharearea_agent.connect import SHUTDOWN, RingConnector
from sharearea_agent.xen_link import DETACHED, XenRendezvous
from tests.xenstored import FakeXenstored

OURS = "/local/domain/0/"  # what the tests' xenstored takes relative paths for


class Rings:
    """Stands where Vchan does: says what was done with it."""

    def __init__(self) -> None:
        self.end = ""

    def close(self) -> None:
        self.end = "closed"

    def abandon(self) -> None:
        self.end = "abandoned"


class Rendezvous(XenRendezvous):
    """The agent's own, up to the devices."""

    made: list[Rings]

    def publish(self) -> None:
        self.withdraw()
        rings: Any = Rings()
        self._vchan = rings
        self.made.append(rings)

    def filenos(self) -> tuple[int, ...]:
        return (self._xenstore.fileno(),)

    def accept(self) -> None:
        return None


class Guest:
    """A connector in its loop."""

    def __init__(self, path: Path) -> None:
        self.server = FakeXenstored(path / "xenstored")
        self.set("domid", "7")
        self.selector = selectors.DefaultSelector()
        self.said: list[str] = []
        self.made: list[Rings] = []

    def set(self, path: str, value: str) -> None:
        """Write a node of this guest's."""
        self.server.set(OURS + path, value)

    def start(self) -> RingConnector:
        def rendezvous(xenstore: XenStore) -> Rendezvous:
            made = Rendezvous(xenstore)
            made.made = self.made
            return made

        self.connector = RingConnector(
            self.selector,
            arrived=lambda _: self.said.append("arrived"),
            lost=lambda why: self.said.append(f"lost: {why}"),
            suspending=lambda: self.said.append("suspending"),
            restored=lambda: self.said.append("restored"),
            xenstore=lambda: XenStore(self.server.path, timeout=20),
            rendezvous=rendezvous,
        )
        return self.connector

    def run(self, until: Callable[[], object] | None = None) -> None:
        """Run the loop until something is so, or for a moment."""
        end = time.monotonic() + (20 if until else 0.2)
        while time.monotonic() < end and not (until and until()):
            for key, _ in self.selector.select(0.02):
                key.data(0)
            self.connector.check()
        assert not until or until()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    with guest.server:
        guest.start()
        yield guest
        guest.connector.close()
    guest.selector.close()


def test_a_detached_guest_makes_rings_when_it_is_detached_no_more(guest: Guest) -> None:
    guest.set(DETACHED, "1")
    guest.connector.connect()
    guest.run()
    assert guest.made == []
    guest.server.remove(OURS + DETACHED)
    guest.run(lambda: guest.made)
    assert guest.said == []


def test_rings_that_nobody_took_go_when_the_guest_is_detached(guest: Guest) -> None:
    guest.connector.connect()
    guest.run()
    (first,) = guest.made
    assert first.end == ""
    guest.set(DETACHED, "1")
    guest.run(lambda: first.end == "closed")
    assert len(guest.made) == 1
    guest.server.remove(OURS + DETACHED)
    guest.run(lambda: len(guest.made) == 2)
    assert guest.said == []


def test_rings_are_taken_away_before_a_suspend_and_made_again_if_none_comes(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "SUSPEND_S", 0.5)
    guest.connector.connect()
    guest.run()
    (first,) = guest.made
    guest.set(SHUTDOWN, "suspend")
    guest.run(lambda: guest.said == ["suspending"])
    assert first.end == "closed"
    guest.connector.connect()  # the agent's, whose link was closed
    guest.run()
    assert len(guest.made) == 1
    guest.run(lambda: len(guest.made) == 2)
    assert guest.made[1].end == ""


def test_nothing_of_the_old_rings_is_touched_in_a_restored_guest(guest: Guest) -> None:
    guest.connector.connect()
    guest.run()
    (first,) = guest.made
    guest.set("domid", "8")
    guest.run(lambda: "restored" in guest.said)
    assert first.end == "abandoned"
    guest.connector.connect()
    guest.run(lambda: len(guest.made) == 2)


def test_a_guest_that_was_detached_and_restored_makes_rings_at_once(guest: Guest) -> None:
    guest.set(DETACHED, "1")
    guest.connector.connect()
    guest.run()
    guest.server.remove(OURS + DETACHED)  # the new domain's nodes are others
    guest.set("domid", "8")
    guest.run(lambda: "restored" in guest.said)
    if not guest.made:
        guest.connector.connect()
    guest.run(lambda: guest.made)
    assert guest.made[-1].end == ""


def test_a_refused_suspend_is_asked_for_again_when_all_has_let_go(guest: Guest) -> None:
    guest.connector.connect()
    guest.run()
    (first,) = guest.made
    assert guest.connector.bound
    guest.connector.nothing_left()
    assert guest.server.nodes.get(OURS + SHUTDOWN) is None, "none was refused"
    guest.connector.suspend_refused()
    assert guest.said == ["suspending"]
    assert first.end == "closed"
    assert not guest.connector.bound
    assert guest.server.nodes.get(OURS + SHUTDOWN) is None, "somebody may still be letting go"
    guest.connector.nothing_left()
    assert guest.server.nodes.get(OURS + SHUTDOWN) == "suspend"
    guest.run()  # its own request is no news
    assert guest.said == ["suspending"]
    guest.set(SHUTDOWN, "")  # the kernel's answer
    guest.connector.nothing_left()
    assert guest.server.nodes.get(OURS + SHUTDOWN) == "", "asked for once"


def test_a_refused_suspend_that_nobody_waits_for_any_more_is_not_asked_for(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "SUSPEND_S", 0.1)
    guest.connector.connect()
    guest.run()
    guest.connector.suspend_refused()
    guest.run(lambda: len(guest.made) == 2)  # the time is over
    guest.connector.nothing_left()
    assert guest.server.nodes.get(OURS + SHUTDOWN) is None
    assert guest.connector.bound


def test_a_suspend_that_another_process_holds_back_is_asked_for_again_once(guest: Guest) -> None:
    guest.connector.connect()
    guest.run()
    guest.connector.suspend_refused()
    guest.connector.nothing_left()
    guest.set(SHUTDOWN, "")  # the kernel's answer, before it refuses this one as well
    guest.connector.suspend_refused()
    guest.connector.nothing_left()
    assert guest.server.nodes.get(OURS + SHUTDOWN) == ""


def test_who_binds_an_event_channel_says_so_before(guest: Guest) -> None:
    made: list[int] = []
    guest.connector._binding = lambda: made.append(len(guest.made))
    guest.connector.connect()
    assert made == [0]
    assert len(guest.made) == 1

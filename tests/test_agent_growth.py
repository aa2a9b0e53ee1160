"""A file that is shared while only some of its pages are known: when the rest is, and what is dropped of it."""

from __future__ import annotations

from array import array

import pytest

from sharearea_agent import agent as ag
from sharearea_agent.agent import Agent, FileIdentity, FileKey, Observation, Settings
from sharearea_agent.common import wire
from sharearea_agent.common.wire import Verdict
from sharearea_agent.consumer_wire import MAPPED_DONE

PAGES = 100
KEY = FileKey(1, 2)
IDENTITY = FileIdentity(PAGES * wire.PAGE_SIZE - 5, 1, 1)
WELCOME = wire.Welcome(wire.PROTOCOL_VERSION, "g", "p", bytes(16), bytes(16), bytes(32), 8, 1, 1 << 20, 10, ("**",), ())


def seen(count: int) -> Observation:
    """The file with its first `count` pages known."""
    whole = count == PAGES
    pages = None if whole else array("I", range(count)).tobytes()
    return Observation(b"/usr/f", KEY, IDENTITY, bytes(32) if whole else None, pages, count, 0)


class Guest:
    """An agent whose one file is shared with one program, as far as its first pages are known."""

    def __init__(self, known: int) -> None:
        self.agent = Agent(Settings("g", "1", bytes(16)), lambda: 0.5)
        self.now = 100.0
        self.feed(ag.LinkUp(), ag.FromBroker(WELCOME))
        self.observe(known)
        self.reported = 1
        self.attach(known)

    def feed(self, *events: ag.Event) -> list[ag.Action]:
        """Handle events; return what follows from them."""
        return self.agent.handle_all(events, self.now)

    def observe(self, known: int) -> list[ag.Action]:
        """The scanner looks again."""
        return self.feed(ag.Observed((seen(known),)), ag.LinkReady())

    def attach(self, pages: int) -> list[ag.Action]:
        """Have the version that was reported last offered, granted and mapped."""
        number = array("I", (self.reported,)).tobytes()
        offer = wire.Offer(number, array("I", (pages,)).tobytes())
        self.feed(ag.FromBroker(wire.Verdicts(number, bytes((Verdict.KNOWN,)))), ag.FromBroker(offer))
        if self.reported == 1:
            self.feed(ag.Opened(1, 1, KEY))
        self.now += 1
        self.feed(ag.Tick())
        self.feed(ag.LeaseTaken(KEY, IDENTITY))
        runs = array("I", (0, 8, pages)).tobytes()
        done = self.feed(ag.FromBroker(wire.Granted(self.reported, runs)))
        (share,) = [action for action in done if isinstance(action, ag.ShareWith)]
        return self.feed(ag.ConsumerMapped(1, 1, share.generation, pages, MAPPED_DONE))


def roots(actions: list[ag.Action]) -> list[int]:
    """Return how many pages were reported, for each version."""
    return [
        count
        for action in actions
        if isinstance(action, ag.Send) and isinstance(action.message, wire.Roots)
        for count in array("I", action.message.counts)
    ]


@pytest.mark.parametrize(("known", "later"), [(10, PAGES), (90, PAGES), (10, 20)])
def test_much_more_of_a_shared_file_is_reported_and_attached_anew(known: int, later: int) -> None:
    guest = Guest(known)
    done = guest.observe(later)
    (back,) = [action for action in done if isinstance(action, ag.UnshareWith)]
    done = guest.feed(ag.ConsumerLetGo(1, 1, back.generation), ag.LinkReady())
    assert roots(done) == [later]
    guest.reported = 2
    guest.attach(later)
    assert guest.agent.status()["attached_pages"] == later


@pytest.mark.parametrize("later", [10, 5, 0, 19])
def test_a_little_more_or_less_changes_nothing(later: int) -> None:
    guest = Guest(10)
    assert guest.observe(later) == []
    assert guest.agent.status()["attached_pages"] == 10


@pytest.mark.parametrize(("known", "whole"), [(10, False), (95, False), (PAGES, True)])
def test_a_file_is_dropped_as_a_whole_only_if_all_of_it_is_known(known: int, whole: bool) -> None:
    # What is dropped before it is known would never be seen by the scan.
    guest = Guest(known)
    guest.now += 60
    (drop,) = [action for action in guest.feed(ag.Tick()) if isinstance(action, ag.DropCache)]
    assert (drop.whole, sum(array("I", drop.runs)[2::3])) == (whole, known)


@pytest.mark.parametrize(("known", "looked"), [(0, True), (10, True), (PAGES, False)])
def test_a_file_that_is_opened_is_looked_at_again_unless_all_of_it_is_known(known: int, looked: bool) -> None:
    agent = Agent(Settings("g", "1", bytes(16)), lambda: 0.5)
    events = (ag.LinkUp(), ag.FromBroker(WELCOME), ag.Observed((seen(known),)), ag.LinkReady(), ag.Opened(1, 1, KEY))
    assert (ag.Rescan(b"/usr/f") in agent.handle_all(events, 100.0)) is looked

"""The agent on the `xen` backend, as far as it goes without Xen: what the state machine does, what consumers are sent.

Grants themselves need a guest: tests/xen. The device here is /dev/null, which refuses every grant, as the real one does
with a reference that is not ours.
"""

from __future__ import annotations

import dataclasses
import os
import selectors
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sharearea_agent import agent as ag
from sharearea_agent import shared
from sharearea_agent.agent import Agent, FileIdentity, FileKey, Observation, Settings
from sharearea_agent.common import native, wire
from sharearea_agent.common.errors import HostError, ProtocolError
from sharearea_agent.common.wire import Verdict, WithdrawReason
from sharearea_agent.connect import guest_kind
from sharearea_agent.consumer_wire import (
    MAPPED_DONE,
    MAPPED_NO_ROOM,
    MAX_COMPARE_RUNS,
    GrantDevice,
    Share,
    ShareGrants,
)
from sharearea_agent.consumers import ConsumerHub, Credentials
from sharearea_agent.mapper import LocalMapper, XenMapper

ID = bytes(16)
KEY = FileKey(1, 2)
IDENTITY = FileIdentity(8192, 1, 1)
RUNS = array("I", (0, 8, 2)).tobytes()
AREA = 7


def u32s(*values: int) -> bytes:
    return array("I", values).tobytes()


class World:
    """An agent, what it has done, and the few things that its surroundings answer."""

    def __init__(self, **settings: object) -> None:
        base = Settings(name="g", version="1", instance=ID)
        self.agent = Agent(dataclasses.replace(base, **settings), lambda: 0.5)  # type: ignore[arg-type]
        self.now = 100.0
        self.actions: list[ag.Action] = []
        self.feed(ag.Tick(), ag.LinkUp(), ag.FromBroker(welcome()))
        self.feed(ag.Observed((Observation(b"/usr/f", KEY, IDENTITY, bytes(32), None, 2, 0),)), ag.LinkReady())

    def feed(self, *events: ag.Event) -> list[ag.Action]:
        done = self.agent.handle_all(events, self.now)
        self.actions += done
        return done

    def say(self, *messages: wire.Message) -> list[ag.Action]:
        return self.feed(*(ag.FromBroker(message) for message in messages))

    def wait(self, seconds: float) -> list[ag.Action]:
        self.now += seconds
        return self.feed(ag.Tick())

    def offer(self) -> list[ag.Action]:
        return self.say(wire.Verdicts(u32s(1), bytes((Verdict.KNOWN,))), wire.Offer(u32s(1), u32s(2)))

    def lease(self) -> list[ag.Action]:
        return self.feed(ag.LeaseTaken(KEY, IDENTITY))

    def share(self) -> None:
        """Bring the file to SHARED with consumer 1."""
        self.offer()
        self.feed(ag.Opened(1, 1, KEY))
        self.lease()
        self.say(wire.Grantor(AREA), wire.Granted(1, RUNS))
        assert self.stage() is ag.Stage.SHARED

    def stage(self) -> ag.Stage:
        return self.agent._files[KEY].stage


def welcome(area: bytes = ID) -> wire.Welcome:
    return wire.Welcome(1, "g", "p", area, ID, bytes(32), 2048, 0, 1 << 30, 100, (), ())


def of(actions: list[ag.Action], kind: type) -> list[object]:
    return [action for action in actions if isinstance(action, kind)]


def sent(actions: list[ag.Action], kind: type) -> list[wire.Message]:
    return [action.message for action in actions if isinstance(action, ag.Send) and isinstance(action.message, kind)]


# ------------------------------------------------------------------------------------------------- the state machine


def test_handles_go_out_with_their_grantor() -> None:
    world = World()
    world.share()
    assert of(world.actions, ag.ShareWith) == [ag.ShareWith(1, 1, 1, RUNS, AREA)]
    # Another area's references do not change whose these are.
    world.say(wire.Grantor(9))
    assert of(world.feed(ag.Opened(2, 1, KEY)), ag.ShareWith) == [ag.ShareWith(2, 1, 1, RUNS, AREA)]


def test_a_grantor_is_forgotten_with_its_link() -> None:
    world = World()
    world.say(wire.Grantor(AREA))
    world.feed(ag.LinkDown("lost"), ag.LinkUp(), ag.FromBroker(welcome()), ag.LinkReady())
    world.offer()
    world.feed(ag.Opened(1, 1, KEY))
    world.lease()
    (share,) = of(world.say(wire.Granted(1, RUNS)), ag.ShareWith)
    assert isinstance(share, ag.ShareWith)
    assert share.grantor is None
    with pytest.raises(ProtocolError, match="has not said whose"):
        XenMapper("pv").parcel(share, ())


@pytest.mark.parametrize("code", ["user-mappings-off", "no-grant-device"])
def test_without_mappings_the_agent_reports_and_attaches_nothing(code: str) -> None:
    world = World(mappings_off=code)
    world.offer()
    done = world.feed(ag.Opened(1, 1, KEY))
    assert of(done, ag.StayPlain) == [ag.StayPlain(1, 1, code)]
    world.wait(60)
    assert not of(world.actions, ag.TakeLease)
    assert sent(world.actions, wire.Roots)
    assert world.agent.status()["mappings_off"] == code


def test_a_detached_domain_stays_plain_until_the_next_offer() -> None:
    world = World()
    world.offer()
    world.feed(ag.Opened(1, 1, KEY))
    world.lease()
    done = world.say(wire.Denied(u32s(1), bytes((Verdict.DETACHED,))))
    assert of(done, ag.StayPlain) == [ag.StayPlain(1, 1, "detached")]
    assert of(done, ag.ReleaseLease)
    assert of(world.feed(ag.Opened(2, 1, KEY)), ag.StayPlain) == [ag.StayPlain(2, 1, "detached")]
    assert not of(world.wait(600), ag.TakeLease)
    assert of(world.say(wire.Offer(u32s(1), u32s(2))), ag.TakeLease)


def test_the_operators_withdraw_is_not_answered_with_another_wish() -> None:
    world = World()
    world.share()
    done = world.say(wire.Withdraw(u32s(1), WithdrawReason.OPERATOR))
    assert of(done, ag.UnshareWith) == [ag.UnshareWith(1, 1, 1)]
    done = world.feed(ag.ConsumerLetGo(1, 1, 1))
    assert sent(done, wire.Release) == [wire.Release(u32s(1))]
    assert not of(world.wait(600), ag.TakeLease)
    assert of(world.say(wire.Offer(u32s(1), u32s(2))), ag.TakeLease)
    # Any other reason is: the pages are in another place.
    other = World()
    other.share()
    other.say(wire.Withdraw(u32s(1), WithdrawReason.MOVING))
    other.feed(ag.ConsumerLetGo(1, 1, 1))
    assert of(other.wait(5), ag.TakeLease)


def test_beyond_the_budget_is_tried_again_later() -> None:
    world = World()
    world.offer()
    world.feed(ag.Opened(1, 1, KEY))
    world.lease()
    done = world.say(wire.Denied(u32s(1), bytes((Verdict.GRANT_BUDGET,))))
    assert of(done, ag.StayPlain) == [ag.StayPlain(1, 1, "grant-budget")]
    assert of(world.feed(ag.Opened(2, 1, KEY)), ag.StayPlain) == [ag.StayPlain(2, 1, "grant-budget")]
    assert not of(world.wait(29), ag.TakeLease)
    assert of(world.wait(2), ag.TakeLease)


def test_a_suspend_brings_everybody_back_and_what_follows_begins_anew() -> None:
    world = World()
    world.share()
    done = world.feed(ag.Suspending())
    assert of(done, ag.UnshareWith) == [ag.UnshareWith(1, 1, 1)]
    assert sent(world.feed(ag.ConsumerLetGo(1, 1, 1)), wire.Release)
    assert of(world.feed(ag.Opened(2, 1, KEY)), ag.StayPlain) == [ag.StayPlain(2, 1, "suspending")]
    assert not of(world.wait(5), ag.TakeLease)
    world.feed(ag.Suspending(), ag.LinkDown("another domain"), ag.Resumed())
    assert not of(world.wait(0), ag.TakeLease), "nothing is on offer before the broker says so"
    world.feed(ag.LinkUp(), ag.FromBroker(welcome()), ag.LinkReady())
    assert of(world.offer(), ag.TakeLease)


@pytest.mark.parametrize("before", ["lease", "grant"])
def test_a_suspend_on_the_way_to_sharing_ends_it(before: str) -> None:
    world = World()
    world.offer()
    world.feed(ag.Opened(1, 1, KEY))
    if before == "grant":
        world.lease()
    world.feed(ag.Suspending())
    done = world.lease() if before == "lease" else world.say(wire.Grantor(AREA), wire.Granted(1, RUNS))
    assert not of(done, ag.ShareWith)
    assert of(done, ag.StayPlain) == [ag.StayPlain(1, 1, "suspending")]
    assert of(done, ag.ReleaseLease)
    assert bool(sent(done, wire.Release)) == (before == "grant")
    assert of(world.feed(ag.Resumed()), ag.TakeLease)


def test_grants_that_nobody_can_map_are_given_back_and_tried_a_few_times() -> None:
    world = World()
    world.share()
    for generation in range(1, world.agent.settings.room_tries + 1):
        done = world.feed(ag.ConsumerMapped(1, 1, generation, 0, MAPPED_NO_ROOM))
        assert of(done, ag.UnshareWith) == [ag.UnshareWith(1, 1, generation)]
        assert sent(world.feed(ag.ConsumerLetGo(1, 1, generation)), wire.Release)
        assert not of(world.wait(29), ag.TakeLease)
        again = of(world.wait(2), ag.TakeLease)
        if generation < world.agent.settings.room_tries:
            assert again
            world.lease()
            world.say(wire.Granted(1, RUNS))
        else:
            assert not again
            assert not of(world.wait(600), ag.TakeLease)
    # Somebody else may have room.
    assert of(world.feed(ag.Opened(2, 1, KEY)), ag.TakeLease)


def test_grants_that_one_of_two_can_map_are_kept() -> None:
    world = World()
    world.share()
    world.feed(ag.Opened(2, 1, KEY))
    world.feed(ag.ConsumerMapped(1, 1, 1, 0, MAPPED_NO_ROOM), ag.ConsumerMapped(2, 1, 1, 2, MAPPED_DONE))
    assert world.stage() is ag.Stage.SHARED
    # With the one that could, the reason to keep them goes.
    world.feed(ag.ConsumerGone(2))
    assert world.stage() is ag.Stage.LEAVING


# --------------------------------------------------------------------------------------------------- what is sent


def null_device() -> tuple[int, bool]:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC), True


def test_a_parcel_has_its_own_descriptor_and_the_references_as_they_came() -> None:
    for kind, movable in (("pv", 0), ("pvh", 1), ("hvm", 1)):
        parcel = XenMapper(kind, null_device).parcel(ag.ShareWith(1, 4, 2, RUNS, AREA), ())
        assert parcel.share == ShareGrants(4, 2, AREA, movable, RUNS)
        ((before, fd),) = parcel.before
        assert before == GrantDevice(4)
        os.fstat(fd)
        parcel.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        parcel.close()


def test_a_local_parcel_has_the_segments_that_the_consumer_lacks() -> None:
    mapper = LocalMapper()
    mapper.learn(welcome(), None)
    for segment in (0, 3):
        mapper.learn(wire.Segment(segment), os.memfd_create("segment"))
    runs = array("I", (0, 10, 1, 1, 3 * 2048 + 5, 2)).tobytes()
    parcel = mapper.parcel(ag.ShareWith(1, 4, 2, runs), {1})
    assert parcel.share == Share(4, 2, u32s(0, 10, 1, 1, 5, 2), u32s(1, 2), 1, b"", b"")
    assert parcel.compared_pages == 3
    assert parcel.segments == [2]
    assert [message.TYPE for message, _ in parcel.before] == [33]
    parcel.close()
    os.fstat(parcel.before[0][1])
    with pytest.raises(ProtocolError, match="segment 1"):
        mapper.parcel(ag.ShareWith(1, 4, 2, u32s(0, 2048, 1)), ())
    mapper.close()


def test_a_local_parcel_names_the_pages_that_are_to_be_compared() -> None:
    """Of three runs: what lies in the resident ranges, with the slots and segments that belong to it."""
    mapper = LocalMapper()
    mapper.learn(welcome(), None)
    for segment in (0, 1):
        mapper.learn(wire.Segment(segment), os.memfd_create("segment"))
    runs = u32s(0, 100, 4, 10, 200, 6, 20, 2048, 5)
    share = ag.ShareWith(1, 4, 2, runs, proven=True)
    parcel = mapper.parcel(share, (), u32s(2, 10, 15, 1, 18, 3, 24, 40))
    assert parcel.share == Share(
        *(4, 2, u32s(0, 100, 4, 10, 200, 6, 20, 0, 5), u32s(1, 1, 2)),
        *(0, u32s(2, 102, 2, 10, 200, 2, 15, 205, 1, 20, 0, 1, 24, 4, 1), u32s(1, 1, 1, 2, 2)),
    )
    assert parcel.compared_pages == 7
    nothing = mapper.parcel(share, (), b"")
    assert (nothing.share, nothing.compared_pages) == (replace(parcel.share, compare=b"", compare_segments=b""), 0)
    many = u32s(*(number for page in range(MAX_COMPARE_RUNS + 1) for number in (2 * page, 1)))
    large = mapper.parcel(replace(share, runs=u32s(0, 0, 2 * MAX_COMPARE_RUNS + 2)[:12]), (), many)
    assert isinstance(large.share, Share)
    assert (large.share.all, large.share.compare, large.compared_pages) == (1, b"", 2 * MAX_COMPARE_RUNS + 2)


def test_a_guest_is_of_the_kind_that_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "type").write_text("PVH\n")
    assert guest_kind(tmp_path / "type") == "pvh"
    assert guest_kind(tmp_path / "none") == ""


# ------------------------------------------------------------------------------------------------- a real consumer


class Loop:
    """A hub on a thread of its own, which shares every file that is opened as if the broker had granted it."""

    def __init__(self, path: Path, *, allow: bool = True, device: Callable[[], tuple[int, bool]] = null_device) -> None:
        self.events: list[ag.Event] = []
        self.selector = selectors.DefaultSelector()
        self.asked: list[Credentials] = []
        self.hub = ConsumerHub(
            path,
            self.selector,
            XenMapper("pvh", device),
            self.take,
            lambda *_, **__: None,
            self.may,
        )
        self.allow = allow
        self.end = False
        self.pending: list[ag.ShareWith] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def may(self, who: Credentials) -> bool:
        self.asked.append(who)
        return self.allow

    def take(self, event: ag.Event) -> None:
        self.events.append(event)
        if isinstance(event, ag.Opened):
            self.pending.append(ag.ShareWith(event.consumer, event.handle, 1, RUNS, AREA))

    def run(self) -> None:
        while not self.end:
            for key, mask in self.selector.select(0.02):
                key.data(mask)
            while self.pending:
                self.hub.share(self.pending.pop())
        self.hub.close()
        self.selector.close()

    def stop(self) -> None:
        self.end = True
        self.thread.join()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 4096 + b"b" * 4096)
    yield path
    for session in list(shared._sessions.values()):  # the thread of a session lives as long as files are open
        assert not session._files


def wait_for(what: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_refused_grant_leaves_the_file_and_is_reported(tmp_path: Path, file: Path) -> None:
    loop = Loop(tmp_path / "sock")
    before = native.grant_calls()
    try:
        with shared.open_shared(file, agent=str(tmp_path / "sock")) as mapped:
            assert (mapped.shared_pages, mapped.reason) == (0, "no-room")
            assert mapped[:] == file.read_bytes()
            mapped.madvise(4)  # MADV_DONTNEED: nothing is granted, so it is passed on
            wait_for(lambda: ag.ConsumerMapped(1, mapped._handle, 1, 0, MAPPED_NO_ROOM) in loop.events)
            session = mapped._session
            assert session is not None
            wait_for(lambda: session._device == (0, -1))
    finally:
        loop.stop()
    assert native.grant_calls().map_ioctls == before.map_ioctls + 1
    assert native.grant_calls().mmaps == before.mmaps
    assert loop.asked[0].uid == os.getuid()
    assert os.getgid() in loop.asked[0].gids
    assert set(os.getgroups()) <= loop.asked[0].gids


def test_who_may_not_stays_plain_and_is_sent_no_device(tmp_path: Path, file: Path) -> None:
    loop = Loop(tmp_path / "sock", allow=False)
    try:
        with shared.open_shared(file, agent=str(tmp_path / "sock")) as mapped:
            assert (mapped.shared_pages, mapped.reason) == (0, "not-allowed")
    finally:
        loop.stop()
    assert not [event for event in loop.events if isinstance(event, ag.Opened)]


def test_an_agent_without_a_device_says_so(tmp_path: Path, file: Path) -> None:
    def lacking() -> tuple[int, bool]:
        raise HostError("this system has no grant device")

    loop = Loop(tmp_path / "sock", device=lacking)
    try:
        with shared.open_shared(file, agent=str(tmp_path / "sock")) as mapped:
            assert (mapped.shared_pages, mapped.reason) == (0, "agent-limit")
            wait_for(lambda: ag.ConsumerMapped(1, mapped._handle, 1, 0, MAPPED_NO_ROOM) in loop.events)
    finally:
        loop.stop()


def test_no_grant_device_here() -> None:
    with pytest.raises(HostError, match="no grant device"):
        native.open_grant_device("/dev/xen/there-is-none")

"""The agent and mounted views: which files come in, what is attached for them, and that everything else is left alone.

The module itself needs Xen (tests/xen/view.py); here its control device is one that keeps the same rules in memory.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sharearea_agent import agent, runner
from sharearea_agent.agent import VIEWS, Agent, FileIdentity, FileKey, Observation, Settings
from sharearea_agent.common import wire
from sharearea_agent.common.errors import UsageError
from sharearea_agent.common.logs import EventLog
from sharearea_agent.config import AgentConfig
from sharearea_agent.consumer_wire import MAPPED_DIFFERENT, MAPPED_DONE, MAPPED_NO_ROOM
from sharearea_agent.consumers import ConsumerHub
from sharearea_agent.mapper import LocalMapper
from sharearea_agent.runner import Runner
from sharearea_agent.view_control import ViewControl, ViewInfo
from sharearea_agent.view_mounts import ViewMounts
from sharearea_agent.views import MountedView, Views, mounted_views
from sharearea_agent.worker import Job, Worker

WELCOME = wire.Welcome(wire.PROTOCOL_VERSION, "g", "p", bytes(16), bytes(16), bytes(32), 8, 1, 1 << 20, 10, ("**",), ())
RUNS = array("I", (0, 40, 3)).tobytes()


class Device(ViewControl):
    """/dev/shareview, as far as one can tell from outside: tables by inode, an epoch, and errors on order."""

    def __init__(self) -> None:
        self._fd = -1
        self.tables: dict[int, tuple[int, bytes]] = {}
        self.epoch = 0
        self.refused = 0
        self.fail = 0
        self.resident = 0
        self.holds: list[bool] = []
        self.attaching: Callable[[], None] = lambda: None

    def info(self) -> ViewInfo:
        return ViewInfo(2, self.epoch, 0, self.refused, len(self.tables), 0, 0, 0, 0, 0, 0)

    def attach(self, file: int, domid: int, runs: bytes, epoch: int) -> int:
        number = os.fstat(file).st_ino
        self.attaching()
        if self.fail:
            raise OSError(self.fail, os.strerror(self.fail))
        if epoch != self.epoch:
            raise OSError(errno.ESTALE, "")
        if number in self.tables:
            raise OSError(errno.EEXIST, "")
        self.tables[number] = (domid, runs)
        return self.resident

    def detach(self, file: int) -> bool:
        return self.tables.pop(os.fstat(file).st_ino, None) is not None

    def detach_all(self) -> None:
        self.tables.clear()

    def hold(self, on: bool) -> None:
        self.holds.append(on)

    def state(self, file: int) -> tuple[int, int]:
        _, runs = self.tables.get(os.fstat(file).st_ino, (0, b""))
        return sum(array("I", runs)[2::3]), 9


def at_once(job: Job) -> None:
    """A worker that is as fast as it can be."""
    then = job()
    if then is not None:
        then()


class House:
    """A lower folder with two files, and a "view" of it: a folder with the same inodes."""

    def __init__(self, tmp_path: Path) -> None:
        self.lower, self.at = tmp_path / "lower", tmp_path / "view"
        self.lower.mkdir()
        self.at.mkdir()
        for name in ("one", "two"):
            (self.lower / name).write_bytes(b"x" * 9 * 4096)
            os.link(self.lower / name, self.at / name)
        self.device = Device()
        self.device.tables[999] = (1, RUNS)
        self.events: list[agent.Event] = []
        self.lines: list[str] = []
        mounted = MountedView(os.fsencode(self.lower), os.fsencode(self.at))
        self.submit: Callable[[Job], None] = at_once
        self.views = Views(
            self.device,
            [mounted],
            self.events.append,
            lambda event, **_: self.lines.append(event),
            lambda job: self.submit(job),
        )

    def key(self, name: str) -> FileKey:
        seen = os.stat(self.lower / name)
        return FileKey(seen.st_dev, seen.st_ino)

    def take_in(self, name: str) -> int:
        handle = self.views.take_in(self.key(name), os.fsencode(self.lower / name))
        assert handle is not None
        return handle

    def share(self, handle: int, grantor: int | None = 5, generation: int = 1) -> agent.Event:
        self.views.share(agent.ShareWith(VIEWS, handle, generation, RUNS, grantor))
        return self.events.pop()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_views_are_found_among_mounts_but_not_those_over_their_own_folder() -> None:
    text = (
        b"25 1 8:1 / / rw - ext4 /dev/xvda rw\n"
        b"30 25 0:40 / /mnt/view ro,relatime shared:1 - shareview none ro,lower=/srv/data\n"
        b"31 25 0:41 / /mnt/a\\040b ro - shareview none ro,lower=/srv/a\\134040b,verify=all\n"
        b"32 25 0:42 / /srv/own ro - shareview none ro,lower=/srv/own/\n"
        b"33 25 0:43 / /odd ro - shareview none ro\n"
        b"nonsense\n"
    )
    assert mounted_views(text) == [MountedView(b"/srv/data", b"/mnt/view"), MountedView(b"/srv/a b", b"/mnt/a b")]


def test_what_an_earlier_agent_left_attached_is_let_go_first(house: House) -> None:
    assert house.device.tables == {}


def test_pages_are_attached_and_let_go(house: House) -> None:
    handle = house.take_in("one")
    house.views.asking(house.key("one"))
    assert house.share(handle) == agent.ConsumerMapped(VIEWS, handle, 1, 3, MAPPED_DONE)
    assert house.device.tables == {house.key("one").ino: (5, RUNS)}
    assert house.views.status()["attached_files"] == 1
    house.views.unshare(agent.UnshareWith(VIEWS, handle, 1))
    assert house.events.pop() == agent.ConsumerLetGo(VIEWS, handle, 1)
    assert house.device.tables == {}


@pytest.mark.parametrize(
    ("number", "outcome", "lines"),
    [
        (errno.EBADMSG, MAPPED_DIFFERENT, 0),
        (errno.EAGAIN, MAPPED_NO_ROOM, 0),
        (errno.ENOMEM, MAPPED_NO_ROOM, 1),
    ],
)
def test_what_cannot_be_attached_is_given_back(house: House, number: int, outcome: int, lines: int) -> None:
    handle = house.take_in("one")
    house.device.fail = number
    for _ in range(2):
        assert house.share(handle) == agent.ConsumerMapped(VIEWS, handle, 1, 0, outcome)
    assert house.lines == ["agent.limit"] * lines


def test_grants_that_were_asked_for_before_a_suspend_are_not_attached(house: House) -> None:
    handle = house.take_in("one")
    house.views.asking(house.key("one"))
    house.device.epoch += 1
    assert house.share(handle) == agent.ConsumerMapped(VIEWS, handle, 1, 0, MAPPED_NO_ROOM)
    house.views.asking(house.key("one"))
    assert house.share(handle) == agent.ConsumerMapped(VIEWS, handle, 1, 3, MAPPED_DONE)


def test_pages_that_the_kernel_has_let_go_are_given_back(house: House) -> None:
    first, second = house.take_in("one"), house.take_in("two")
    house.share(first)
    house.share(second, generation=7)
    del house.device.tables[house.key("two").ino]
    house.views.look()
    assert house.events == [agent.ConsumerMapped(VIEWS, second, 7, 0, MAPPED_NO_ROOM)]
    house.views.look()
    assert len(house.events) == 1


def test_another_file_under_the_name_is_not_touched(house: House, tmp_path: Path) -> None:
    key = house.key("one")
    handle = house.take_in("one")
    (house.at / "one").unlink()
    (house.at / "one").write_bytes(b"another")
    assert house.share(handle) == agent.ConsumerMapped(VIEWS, handle, 1, 0, MAPPED_NO_ROOM)
    assert house.device.tables == {}
    assert house.views.put_out(key) == handle
    assert house.views.take_in(key, os.fsencode(house.lower / "one")) is None
    assert house.views.take_in(key, os.fsencode(tmp_path / "elsewhere")) is None


def test_descriptors_are_closed_with_what_they_were_for(house: House) -> None:
    before = open_files()
    handle = house.take_in("one")
    for generation in range(1, 4):
        house.share(handle, generation=generation)
        house.events.clear()
    assert open_files() == before + 1
    house.views.put_out(house.key("one"))
    assert open_files() == before
    assert house.device.tables == {}


@pytest.mark.parametrize("proven", [False, True])
def test_what_was_not_compared_counts_as_unread_if_the_agent_never_read_it(house: House, proven: bool) -> None:
    handle = house.take_in("one")
    house.device.resident = 2
    house.views.share(agent.ShareWith(VIEWS, handle, 1, RUNS, 5, proven))
    said = [agent.Compared(house.key("one"), 1, 2)] if proven else []
    assert house.events == [*said, agent.ConsumerMapped(VIEWS, handle, 1, 3, MAPPED_DONE)]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_attaching_that_has_not_begun_is_called_off(house: House) -> None:
    jobs: list[Job] = []
    house.submit = jobs.append
    handle = house.take_in("one")
    house.views.share(agent.ShareWith(VIEWS, handle, 1, RUNS, 5))
    assert not house.events
    house.views.unshare(agent.UnshareWith(VIEWS, handle, 1))
    house.views.share(agent.ShareWith(VIEWS, handle, 2, RUNS, 5))
    house.views.put_out(house.key("one"))
    assert house.events == [agent.ConsumerLetGo(VIEWS, handle, 1)]
    assert [job() for job in jobs] == [None, None]
    assert house.device.tables == {}


def test_pages_that_are_let_go_before_anybody_knows_that_they_are_attached(house: House) -> None:
    jobs: list[Job] = []
    house.submit = jobs.append
    before = open_files()
    handle = house.take_in("one")
    house.views.share(agent.ShareWith(VIEWS, handle, 1, RUNS, 5))
    then = jobs[0]()
    house.device.tables.clear()
    house.views.look()
    assert not house.events
    assert then is not None
    then()
    assert house.events == [agent.ConsumerMapped(VIEWS, handle, 1, 0, MAPPED_NO_ROOM)]
    assert open_files() == before


@pytest.mark.parametrize("way", ["unshare", "put_out", "close"])
@pytest.mark.parametrize("fail", [0, errno.EAGAIN])
def test_letting_go_waits_for_what_is_just_being_attached(house: House, way: str, fail: int) -> None:
    before = open_files()
    begun, goes_on = threading.Event(), threading.Event()
    failures: list[Exception] = []
    worker = Worker(lambda: None, failures.append, lambda: None)
    worker.start()
    house.submit = worker.submit

    def attaching() -> None:
        begun.set()
        assert goes_on.wait(20)

    house.device.attaching = attaching
    house.device.fail = fail
    handle = house.take_in("one")
    house.views.share(agent.ShareWith(VIEWS, handle, 1, RUNS, 5))
    assert begun.wait(20)
    threading.Timer(0.2, goes_on.set).start()
    match way:
        case "unshare":
            house.views.unshare(agent.UnshareWith(VIEWS, handle, 1))
        case "put_out":
            house.views.put_out(house.key("one"))
        case "close":
            house.views.close()
    assert goes_on.is_set()
    assert house.device.tables == {}
    worker.stop()
    for then in worker.results():
        then()
    assert not [event for event in house.events if isinstance(event, agent.ConsumerMapped)]
    assert not failures
    assert house.device.tables == {}
    assert open_files() == before


def test_a_suspend_is_held_back_while_programs_map_grants_and_no_longer(house: House) -> None:
    for on in (False, True, True, False, False):
        house.views.hold_suspend(on)
    assert house.device.holds == [True, False]


def test_a_suspend_that_was_refused_is_seen_once(house: House) -> None:
    assert not house.views.look()
    house.device.refused += 1
    assert house.views.look()
    assert not house.views.look()


def test_what_is_in_a_view_that_goes_is_let_go_and_the_rest_stays(house: House, tmp_path: Path) -> None:
    over = tmp_path / "over"
    over.mkdir()
    (over / "three").write_bytes(b"y" * 4096)
    covering = MountedView(os.fsencode(over), os.fsencode(over))
    beside = house.views.views
    house.views.use([*beside, covering])
    first = house.take_in("one")
    seen = os.stat(over / "three")
    key = FileKey(seen.st_dev, seen.st_ino)
    second = house.views.take_in(key, os.fsencode(over / "three"))
    assert second is not None
    for handle in (first, second):
        house.share(handle)
    assert [view.over for view in house.views.views] == [False, True]
    assert house.views.use(beside) == [(key, second)]
    assert list(house.device.tables) == [house.key("one").ino]
    assert house.views.take_in(key, os.fsencode(over / "three")) is None
    house.views.use([*beside, covering])
    assert house.views.take_in(key, os.fsencode(over / "three")) == second + 1


# ------------------------------------------------------------------------------------------------------- the runner

VIEWS_CONFIG = """
[agent]
name = "g"
backend = "xen"
folders = ["TOP/lower"]
control_socket = "TOP/control"
views = [{ lower = "TOP/lower", at = "TOP/at" }]
"""


class Log(EventLog):
    """What is logged."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str = VIEWS_CONFIG) -> tuple[Runner, Log]:
    (tmp_path / "lower").mkdir(exist_ok=True)
    monkeypatch.setattr(runner, "ViewMounts", partial(ViewMounts, base=tmp_path / "base"))
    log = Log()
    return Runner(AgentConfig.parse(config.replace("TOP", str(tmp_path)).encode(), "x"), log), log


def test_a_guest_without_the_module_says_once_what_is_missing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, log = run(tmp_path, monkeypatch)  # mount(8) is really asked
    ((event, fields),) = log.events
    assert event == "agent.limit"
    assert f"no view of {tmp_path}/lower at {tmp_path}/at: " in str(fields["detail"])
    assert str(fields["detail"]).endswith("; plain files go on")
    assert "cannot be used" not in str(fields["detail"])  # which follows from it
    assert not made.agent.settings.views
    assert not (tmp_path / "at").exists()
    assert made._on_view_question({"verb": "view", "do": "up"}) == {"views": [], "restart": True}


def test_views_that_others_mount_later_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ViewControl", Device)
    made, log = run(tmp_path, monkeypatch)  # mount(8) fails
    assert [event for event, _ in log.events] == ["agent.limit"]
    assert made.agent.settings.views
    assert made._on_view_question({"verb": "view", "do": "up"}) == {"views": [], "restart": False}


def test_views_that_somebody_wants_down_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "down").write_text('{"by_hand": true, "holders": []}')
    monkeypatch.setattr(runner, "ViewControl", Device)
    made, log = run(tmp_path, monkeypatch)
    assert log.events == []
    assert made.agent.settings.views


def test_files_on_offer_wait_for_their_view_and_leave_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "at").mkdir()
    file = tmp_path / "lower/one"
    file.write_bytes(bytes(4096))
    os.link(file, tmp_path / "at/one")
    table = tmp_path / "mountinfo"
    table.write_text(f"1 1 0:1 / {tmp_path}/at ro - shareview none ro,lower={tmp_path}/lower\n")
    monkeypatch.setattr(runner, "MOUNTS", table)
    monkeypatch.setattr(runner, "ViewControl", Device)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "down").write_text('{"by_hand": true, "holders": []}')  # nothing is mounted by the runner
    made, _ = run(tmp_path, monkeypatch)
    made._hub = ConsumerHub(tmp_path / "s", made._selector, LocalMapper(), made._events.append, made.log.event)
    seen = os.stat(file)
    key = FileKey(seen.st_dev, seen.st_ino)
    try:
        made._take_into_view(agent.OfferToViews(key, os.fsencode(file)))
        assert made._events.pop() == agent.Opened(VIEWS, 1, key)
        answer = made._on_view_question({"do": "down", "over": True})
        assert answer["views"] == [f"{tmp_path}/at"]  # it is beside its folder, and in nobody's way
        assert not made._events
        assert made._on_view_question({"do": "down"}) == {"views": [], "restart": False}
        assert made._events.pop() == agent.Closed(VIEWS, 1)
        assert not made._hub.files[key].uses
        with pytest.raises(UsageError):
            made._on_view_question({"do": "sideways"})
        assert made._on_view_question({"do": "up"})["views"] == [f"{tmp_path}/at"]
        assert made._events.pop() == agent.Opened(VIEWS, 2, key)
        made._put_out_of_view(key)
        assert made._events.pop() == agent.Closed(VIEWS, 2)
        made._on_view_question({"do": "down"})
        made._on_view_question({"do": "up"})
        assert not made._events, "what has lost its name comes back"
    finally:
        made._hub.close()
        made._selector.close()


# ------------------------------------------------------------------------------------------------- the state machine


def offered(views: bool, path: bytes = b"/srv/one") -> tuple[Agent, FileKey, list[agent.Action]]:
    """An agent whose file the broker has just offered pages of."""
    machine = Agent(Settings("guest", "1", bytes(16), views=views), lambda: 0.0)
    key = FileKey(1, 2)
    machine.handle(agent.Tick(), 0)
    machine.handle(agent.LinkUp(), 0)
    machine.handle(agent.FromBroker(WELCOME), 0)
    seen = Observation(path, key, FileIdentity(9 * 4096, 1, 1), bytes(32), None, 9, 0)
    machine.handle(agent.Observed((seen,)), 0)
    ids = array("I", [1]).tobytes()
    return machine, key, machine.handle(agent.FromBroker(wire.Offer(ids, array("I", [9]).tobytes())), 0)


def test_files_on_offer_are_offered_to_views_once() -> None:
    machine, key, actions = offered(True)
    assert agent.OfferToViews(key, b"/srv/one") in actions
    taken = machine.handle(agent.Opened(VIEWS, 1, key), 1)
    assert agent.TakeLease(key, VIEWS, 1) in taken
    again = machine.handle(agent.FromBroker(wire.Offer(array("I", [1]).tobytes(), array("I", [9]).tobytes())), 1)
    assert not [action for action in again if isinstance(action, agent.OfferToViews)]
    gone = machine.handle(agent.Vanished((b"/srv/one",)), 2)
    assert agent.LeaveViews(key) in gone


@pytest.mark.parametrize("consumer", [VIEWS, 4])
def test_what_views_share_holds_no_suspend_back_and_what_programs_share_does(consumer: int) -> None:
    machine, key, _ = offered(True)
    machine.handle(agent.Opened(consumer, 1, key), 1)
    machine.handle(agent.LeaseTaken(key, FileIdentity(9 * 4096, 1, 1)), 1)
    assert not machine.programs_share
    machine.handle(agent.FromBroker(wire.Grantor(3)), 1)
    shared = machine.handle(agent.FromBroker(wire.Granted(1, array("I", (0, 8, 9)).tobytes())), 1)
    assert [action for action in shared if isinstance(action, agent.ShareWith)]
    assert machine.programs_share == (consumer != VIEWS)
    left = machine.handle(agent.FromBroker(wire.Withdraw(array("I", [1]).tobytes(), 0)), 2)
    assert [action for action in left if isinstance(action, agent.UnshareWith)]
    assert machine.programs_share == (consumer != VIEWS)
    machine.handle(agent.ConsumerLetGo(consumer, 1, 1), 2)
    assert not machine.programs_share


def test_without_views_nothing_is_offered_to_them() -> None:
    _, _, actions = offered(False)
    assert not [action for action in actions if isinstance(action, agent.OfferToViews)]

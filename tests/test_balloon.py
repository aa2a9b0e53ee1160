"""Memory targets in xenstore: whatever happens to the broker, to a domain or to a write, every domain gets back what it
had.

Xenstore is a dict here. What the real one and a real guest do with a target is tests/xen's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sharearea.balloon import RECORDS, Balloon, Change, Claim, Memory
from sharearea.common.errors import HostError
from sharearea.common.events import EVENTS
from sharearea.common.units import KIB, MIB
from sharearea.reclaim import Report, Settings
from sharearea.stats import Balance

UUID = "2f1d4b6e-5c7a-4d3e-9b8f-0a1c2e3d4f"
QUICK = Settings(steady=2.0, settle=0.0, rest=4.0)


def uuid(number: int) -> str:
    return f"{UUID}{number:02x}"


FORGET = 1400.0  # until the guest has been reminded for the last time


class Killed(Exception):
    """The broker is dead: nothing of it runs any more, not even what handles errors."""


@dataclass
class Store:
    """Xenstore. `writes_left`: as many more may be made before the broker is killed; `refuses`: everything fails."""

    nodes: dict[str, str] = field(default_factory=dict)
    writes_left: int | None = None
    refuses: bool = False
    requests: int = 0
    maximum: dict[int, int] = field(default_factory=dict)  # what Xen lets a domain have: set when it is built
    history: list[tuple[str, str]] = field(default_factory=list)

    def read(self, path: str) -> str | None:
        self._ask()
        return self.nodes.get(path)

    def write(self, path: str, value: str) -> None:
        self._change()
        self.nodes[path] = value
        self.history.append((path, value))

    def set_memory(self, domid: int, size: int) -> None:
        """Do what `xl mem-set` does."""
        self._change()
        self.nodes[f"/local/domain/{domid}/memory/target"] = str(size // KIB)
        self.maximum[domid] = size

    def remove(self, path: str) -> None:
        self._change()
        self.nodes = {at: value for at, value in self.nodes.items() if at != path and not at.startswith(path + "/")}

    def list(self, path: str) -> tuple[str, ...]:
        self._ask()
        return tuple({at[len(path) + 1 :].split("/")[0]: 0 for at in self.nodes if at.startswith(path + "/")})

    def _ask(self) -> None:
        self.requests += 1
        if self.refuses:
            raise HostError("xenstored does not answer")

    def _change(self) -> None:
        self._ask()
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Killed
            self.writes_left -= 1

    def boot(self, domid: int, target: int, static_max: int | None = None) -> None:
        self.nodes[f"/local/domain/{domid}/memory/target"] = str(target // KIB)
        self.nodes[f"/local/domain/{domid}/memory/static-max"] = str((static_max or target) // KIB)
        self.maximum[domid] = target

    def end(self, domid: int) -> None:
        self.nodes = {at: value for at, value in self.nodes.items() if not at.startswith(f"/local/domain/{domid}/")}

    def target(self, domid: int) -> int:
        return int(self.nodes[f"/local/domain/{domid}/memory/target"]) * KIB

    @property
    def records(self) -> Sequence[str]:
        return [at.rpartition("/")[2] for at in self.nodes if at.startswith(RECORDS)]


def claim(net: int = 100 * MIB, available: int = 400 * MIB, at: float = 0.0, **more: Any) -> Claim:
    balance = Balance(net, net, 0)
    report = Report(at, available, 0)
    return replace(Claim("office", "web-1", 128 * MIB, 64 * MIB, balance, report), **more)


class Host:
    """A broker's balloon over time, and what else happens on the host."""

    def __init__(self) -> None:
        self.store = Store()
        self.now = 0.0
        self.living: dict[int, str] = {}
        self.claims: dict[int, Claim] = {}
        self.log: list[Change] = []
        self.start()

    def start(self) -> None:
        self.balloon = Balloon(self.store, self.store.set_memory, QUICK)
        self.log += self.balloon.open(self.living.values())

    def boot(self, domid: int, target: int, static_max: int | None = None, number: int | None = None) -> None:
        self.living[domid] = uuid(domid if number is None else number)
        self.store.boot(domid, target, static_max)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            if self.balloon.due(self.now):
                fresh = {
                    domid: replace(known, report=replace(known.report, at=self.now) if known.report else None)
                    for domid, known in self.claims.items()
                }
                self.balloon.look(fresh, self.living, self.now)
            self.log += self.balloon.step(self.now)

    def close(self) -> None:
        self.log += self.balloon.close(self.living, self.now)


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_target_is_lowered_and_given_back_and_nothing_is_left(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    assert host.store.target(5) == 412 * MIB + QUICK.step
    assert host.balloon.memory(5) == Memory(host.store.target(5), 512 * MIB, 512 * MIB)
    assert host.store.records == [uuid(5)]
    host.claims[5] = claim(net=10 * MIB)
    host.pass_time(4)
    assert host.store.target(5) == 502 * MIB
    host.claims[5] = claim(net=0)
    host.pass_time(4)
    assert host.store.target(5) == 512 * MIB
    host.pass_time(FORGET)
    assert host.store.records == []
    assert {change.event for change in host.log} == {"memory.taken", "memory.returned"} <= set(EVENTS)
    assert host.log[-1].fields["taken_bytes"] == 0


def test_what_is_no_whole_kibibyte_stays_with_the_domain(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.claims[5] = claim(net=10 * MIB + 1023)
    host.pass_time(4)
    assert host.store.target(5) == 502 * MIB


def test_without_a_claim_nothing_is_touched(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.boot(6, 300 * MIB, 512 * MIB)
    before = dict(host.store.nodes)
    host.pass_time(60)
    host.close()
    assert host.store.nodes == before


def test_a_domain_without_a_claim_any_more_gets_everything_back(host: Host) -> None:
    """Reclaiming was switched off, or the domain has left its pool."""
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    assert host.store.target(5) < 420 * MIB
    host.claims.clear()
    host.pass_time(4)
    assert host.store.target(5) == 512 * MIB
    host.pass_time(FORGET)
    assert host.store.records == []


def test_the_end_of_the_broker_gives_everything_back(host: Host) -> None:
    for domid in range(1, 10):
        host.boot(domid, 512 * MIB)
        host.claims[domid] = claim()
    host.pass_time(60)
    assert all(host.store.target(domid) < 420 * MIB for domid in host.claims)
    host.close()
    assert all(host.store.target(domid) == 512 * MIB for domid in host.claims)
    assert host.store.records == []


def _take_and_return(host: Host) -> None:
    host.pass_time(600)
    host.claims[5] = claim(net=0)
    host.pass_time(600)


def test_a_guest_is_reminded_of_what_it_got_back(host: Host) -> None:
    """Linux gives up after four attempts to get memory that the host has not, and wakes when its target changes."""
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.claims[5] = claim(net=50 * MIB)
    host.pass_time(4)
    host.log.clear()
    host.store.history.clear()
    host.pass_time(FORGET)
    target = "/local/domain/5/memory/target"
    seen = [int(value) for path, value in host.store.history if path == target]
    assert seen == [462 * 1024 + 4 * n for n in range(1, 7)], "a page more each time"
    host.claims.clear()
    host.pass_time(4)
    host.store.history.clear()
    host.pass_time(FORGET)
    seen = [int(value) for path, value in host.store.history if path == target]
    assert seen == [512 * 1024 - 4, 512 * 1024] * 6
    assert [change.fields["taken_bytes"] for change in host.log] == [0], "nothing is said of it"
    assert host.store.records == []


def test_nothing_is_left_by_a_broker_that_ends_while_a_guest_is_being_reminded(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.claims.clear()
    for _ in range(16):
        host.pass_time(2)
        host.close()
        assert host.store.target(5) == 512 * MIB
        assert host.store.records == []
        host.start()


def test_a_reminder_ends_when_something_is_taken_again(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.claims[5] = claim(net=50 * MIB)
    host.pass_time(4)
    host.claims[5] = claim()
    host.pass_time(60)
    host.store.history.clear()
    host.pass_time(FORGET)
    assert host.store.history == []


@pytest.mark.parametrize("writes", range(9))
def test_a_broker_killed_at_any_write_costs_nobody_memory(host: Host, writes: int) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.store.writes_left = writes
    with pytest.raises(Killed):
        _take_and_return(host)
    host.store.writes_left = None
    host.start()
    host.claims[5] = claim()
    host.pass_time(60)
    assert host.store.target(5) == 412 * MIB + QUICK.step, "the next one knows what was taken already"
    host.close()
    assert host.store.target(5) == 512 * MIB
    assert host.store.records == []


def test_what_somebody_else_sets_is_what_the_domain_is_entitled_to(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.store.boot(5, 480 * MIB, 512 * MIB)  # xl mem-set
    host.pass_time(60)
    assert host.store.target(5) == 380 * MIB + QUICK.step
    host.close()
    assert host.store.target(5) == 480 * MIB


def test_an_earlier_target_that_somebody_sets_is_his(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    seen = set()
    while host.store.target(5) > 412 * MIB + QUICK.step:
        seen.add(host.store.target(5))
        host.pass_time(0.25)
    host.pass_time(10)
    seen -= {512 * MIB}
    assert seen
    host.claims.clear()
    host.store.boot(5, max(seen), 512 * MIB)
    host.close()
    assert host.store.target(5) == max(seen)


def test_a_saved_domain_comes_back_with_its_memory(host: Host) -> None:
    """Saving keeps the lowered target; the restored domain has another number and nobody claims it yet."""
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    lowered = host.store.target(5)
    del host.living[5], host.claims[5]
    host.store.end(5)
    host.pass_time(60)
    host.start()  # and the broker was restarted meanwhile
    host.boot(7, lowered, 512 * MIB, number=5)
    host.pass_time(4)
    assert host.store.target(7) == 512 * MIB
    assert host.store.maximum[7] == 512 * MIB, "Xen must let it have as much"
    host.pass_time(FORGET)
    assert host.store.target(7) == 512 * MIB
    assert host.store.records == []


def test_a_domain_saved_right_after_it_was_lowered_comes_back_with_its_memory(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    while (lowered := host.store.target(5)) == 512 * MIB:
        host.pass_time(0.25)
    del host.living[5]
    host.store.end(5)
    host.boot(7, lowered, 512 * MIB, number=5)
    host.claims[7] = host.claims.pop(5)
    host.pass_time(60)
    assert host.store.target(7) == 412 * MIB + QUICK.step
    host.claims[7] = claim(net=10 * MIB)
    host.pass_time(4)
    assert host.store.maximum[7] == 502 * MIB
    host.close()
    assert (host.store.target(7), host.store.maximum[7]) == (512 * MIB, 512 * MIB)


def test_another_domain_under_the_same_number_is_another_domain(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.boot(5, 256 * MIB, number=6)
    host.pass_time(1.75)
    assert host.store.target(5) == 256 * MIB
    host.pass_time(60)
    host.close()
    assert host.store.target(5) == 256 * MIB


def test_domain_0_and_a_domain_without_uuid_are_never_touched(host: Host) -> None:
    host.boot(0, 4096 * MIB)
    host.store.boot(5, 512 * MIB)
    host.living[5] = "unknown"
    host.claims = {0: claim(), 5: claim(), 6: claim()}
    before = dict(host.store.nodes)
    host.pass_time(60)
    assert host.store.nodes == before


@pytest.mark.parametrize(
    "text", ["", "1 2 3", "1 2 3 4 5", "a b c d", "-1 2 3 4", "1 2 3 " + "9" * 30, "1  2 3", "٣ 2 1 5"]
)
def test_a_broken_record_counts_as_none(host: Host, text: str) -> None:
    host.boot(5, 512 * MIB)
    host.store.nodes[f"{RECORDS}/{uuid(5)}"] = text
    host.store.nodes[f"{RECORDS}/nobody"] = "1 2 3 4"
    host.start()
    assert host.store.records == []
    host.close()
    assert host.store.target(5) == 512 * MIB


def test_records_of_domains_that_are_not_there_do_not_pile_up(host: Host) -> None:
    for number in range(1100):
        host.store.nodes[f"{RECORDS}/00000000-0000-4000-8000-{number:012x}"] = "4 3 2 5"
    host.boot(5, 2 * KIB, 8 * KIB)
    host.living[5] = "00000000-0000-4000-8000-000000000007"
    host.start()
    assert host.store.records == [host.living[5]]
    host.close()
    assert host.store.target(5) == 4 * KIB


def test_a_xenstore_that_fails_is_logged_once_and_tried_again(host: Host) -> None:
    host.boot(5, 512 * MIB)
    host.claims[5] = claim()
    host.pass_time(60)
    host.log.clear()
    host.store.refuses, host.store.requests = True, 0
    host.pass_time(60)
    assert [change.event for change in host.log] == ["memory.failed"]
    assert host.store.requests <= 5, "each may take seconds"
    host.store.refuses = False
    host.claims.clear()
    host.pass_time(20)
    assert host.store.target(5) == 512 * MIB


def test_an_end_with_a_xenstore_that_fails_comes_to_an_end(host: Host) -> None:
    for domid in range(1, 10):
        host.boot(domid, 512 * MIB)
        host.claims[domid] = claim()
    host.pass_time(60)
    host.store.refuses, host.store.requests = True, 0
    host.close()
    assert host.store.requests <= 2
    host.store.refuses = False
    host.claims.clear()
    host.start()
    host.pass_time(10)
    assert all(host.store.target(domid) == 512 * MIB for domid in range(1, 10))


def test_one_step_makes_few_requests(host: Host) -> None:
    for domid in range(1, 65):
        host.boot(domid, 512 * MIB)
        host.claims[domid] = claim()
    worst = 0
    for _ in range(400):
        host.store.requests = 0
        host.pass_time(0.25)
        worst = max(worst, host.store.requests)
    assert worst <= 24
    assert all(host.store.target(domid) < 420 * MIB for domid in host.claims)


class Machine(RuleBasedStateMachine):
    """Anything in any order. `entitled` is what each domain must end up with."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.entitled: dict[int, int] = {}  # by number of the uuid
        self.numbers: dict[int, int] = {}  # domid -> number of the uuid
        self.saved: dict[int, tuple[int, int]] = {}  # number -> target, static-max
        self.domid = 0

    def alive(self) -> list[int]:
        return sorted(self.numbers)

    @precondition(lambda self: len(self.entitled) < 9)
    @rule(size=st.sampled_from([192, 300, 512]), more=st.sampled_from([0, 64]))
    def boot(self, size: int, more: int) -> None:
        self.domid += 1
        number = len(self.entitled)
        self.host.boot(self.domid, size * MIB, (size + more) * MIB, number)
        self.numbers[self.domid] = number
        self.entitled[number] = size * MIB

    @precondition(lambda self: self.numbers)
    @rule(
        pick=st.integers(0, 99),
        net=st.sampled_from([-5, 0, 1, 20, 100, 9999]),
        available=st.sampled_from([0, 40, 70, 100, 9999]),
        report=st.booleans(),
    )
    def says(self, pick: int, net: int, available: int, report: bool) -> None:
        domid = self.alive()[pick % len(self.numbers)]
        known = claim(net * MIB + 123, available * MIB)
        self.host.claims[domid] = known if report else replace(known, report=None)

    @precondition(lambda self: self.host.claims)
    @rule(pick=st.integers(0, 99))
    def leaves(self, pick: int) -> None:
        del self.host.claims[sorted(self.host.claims)[pick % len(self.host.claims)]]

    @rule(seconds=st.sampled_from([0.25, 1.0, 5.0, 20.0, 40.0]))
    def time(self, seconds: float) -> None:
        self.host.pass_time(seconds)

    @rule(writes=st.integers(0, 5))
    def is_killed(self, writes: int) -> None:
        self.host.store.writes_left = writes
        with contextlib.suppress(Killed):
            self.host.pass_time(10)
        self.host.store.writes_left = None
        self.host.start()

    @rule()
    def ends(self) -> None:
        self.host.close()
        self.host.start()

    @precondition(lambda self: self.numbers)
    @rule(pick=st.integers(0, 99), size=st.sampled_from([150, 199, 401]))
    def mem_set(self, pick: int, size: int) -> None:
        domid = self.alive()[pick % len(self.numbers)]
        static_max = int(self.host.store.nodes[f"/local/domain/{domid}/memory/static-max"]) * KIB
        number = self.numbers[domid]
        # A target that nobody else has set just now: see the module's docstring.
        odd = min(size * MIB, static_max) - 4 * KIB * (1 + domid)
        self.host.store.boot(domid, odd, static_max)
        self.entitled[number] = odd

    @precondition(lambda self: self.numbers)
    @rule(pick=st.integers(0, 99), keep=st.booleans())
    def goes(self, pick: int, keep: bool) -> None:
        """It is destroyed, or saved."""
        domid = self.alive()[pick % len(self.numbers)]
        number = self.numbers.pop(domid)
        if keep:
            static_max = int(self.host.store.nodes[f"/local/domain/{domid}/memory/static-max"]) * KIB
            self.saved[number] = (self.host.store.target(domid), static_max)
        self.host.store.end(domid)
        del self.host.living[domid]
        self.host.claims.pop(domid, None)

    @precondition(lambda self: self.saved)
    @rule(pick=st.integers(0, 99))
    def is_restored(self, pick: int) -> None:
        number = sorted(self.saved)[pick % len(self.saved)]
        self.domid += 1
        self.host.boot(self.domid, *self.saved.pop(number), number=number)
        self.numbers[self.domid] = number

    @invariant()
    def bounded(self) -> None:
        for domid, number in self.numbers.items():
            target = self.host.store.target(domid)
            assert min(self.entitled[number], 128 * MIB) <= target <= self.entitled[number]

    def teardown(self) -> None:
        self.host.close()
        for domid, number in self.numbers.items():
            assert self.host.store.target(domid) == self.entitled[number]
            assert self.host.store.maximum[domid] >= self.entitled[number]
        assert set(self.host.store.records) <= {uuid(n) for n in self.entitled if n not in self.numbers.values()}


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

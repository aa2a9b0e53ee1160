"""Reclaiming memory: whatever a guest says, bounds hold and only it is concerned; and what becomes of guests that need
their memory back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharearea.common.units import GIB, KIB, MIB
from sharearea.reclaim import Course, Decision, Domain, Report, Settings

S = Settings()

# ------------------------------------------------------------------------------------------------- any guest, any time

sizes = st.one_of(
    st.integers(0, 8 * GIB), st.sampled_from([0, 1, KIB, MIB, 192 * MIB, 256 * MIB, GIB]), st.integers(0, 64 * MIB)
)
reports = st.builds(Report, at=st.just(0.0), available=sizes, pressure=st.integers(0, 10_000))


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[float, Domain]]:
    """A domain over some time. Its target is what was decided last, unless somebody else sets it."""
    now, found = 0.0, []
    entitled, static_max, floor, headroom = (draw(sizes) for _ in range(4))
    entitled, static_max = max(entitled, MIB), max(static_max, MIB)
    report: Report | None = None
    for _ in range(draw(st.integers(1, 25))):
        now += draw(st.sampled_from([0.0, 0.5, 2.0, 2.0, 5.0, 10.0, 31.0, 70.0, 4000.0]))
        if draw(st.booleans()):
            report = replace(draw(reports), at=max(0.0, now - draw(st.sampled_from([0.0, 0.0, 1.0, 20.0]))))
        elif draw(st.integers(0, 9)) == 0:
            report = None
        found.append((now, Domain(0, entitled, static_max, floor, headroom, draw(sizes) - MIB, report)))
    return found


def run(course: Course, path: list[tuple[float, Domain]], begin: int) -> Iterator[tuple[float, Domain, Decision]]:
    """Follow decisions from the target `begin` on."""
    target = begin
    for now, domain in path:
        asked = replace(domain, target=target)
        decision = course.decide(asked, now)
        yield now, asked, decision
        target = decision.target


@given(steps(), sizes)
@settings(max_examples=400)
def test_targets_stay_within_bounds_whatever_a_guest_says(path: list[tuple[float, Domain]], begin: int) -> None:
    for now, domain, decision in run(Course(), path, begin):
        if decision.reason == "kept":
            assert decision.target == domain.target
        else:
            assert decision.target != domain.target
            assert domain.least <= decision.target <= max(domain.limit, domain.least)
        # Never more away than the net, whoever set the target, and never less than the floor.
        assert decision.target >= domain.limit - max(0, domain.net)
        assert decision.target >= domain.least
        if decision.target < domain.target:
            assert decision.reason == "taken"
            assert domain.report is not None
            assert now - domain.report.at <= S.silent / 2
            amount = min(domain.target, domain.limit) - decision.target
            assert S.step <= amount <= max(S.step, domain.target // S.portion)
            assert domain.report.available - amount >= domain.headroom + domain.headroom // 2
            assert domain.report.pressure <= S.pressure_low


@given(steps(), sizes)
@settings(max_examples=200)
def test_a_guest_that_is_short_gets_at_least_half_back_at_once(path: list[tuple[float, Domain]], begin: int) -> None:
    returned_at: float | None = None
    for now, domain, decision in run(Course(), path, begin):
        report = domain.report
        if report is None or now - report.at > S.silent:
            continue
        if report.available >= domain.headroom and report.pressure < S.pressure_high:
            continue
        assert decision.target >= domain.target
        taken = domain.limit - domain.target
        if taken > 0 and (returned_at is None or report.at >= returned_at + S.settle):
            assert decision.target - domain.target >= taken - taken // 2
        returned_at = now


@given(steps(), sizes)
@settings(max_examples=200)
def test_a_guest_that_says_nothing_gets_everything_back(path: list[tuple[float, Domain]], begin: int) -> None:
    course = Course()
    *_, (last, domain, decision) = run(course, path, begin)
    target = decision.target
    silent = course.decide(replace(domain, target=target, report=None), last + S.silent + 1)
    assert silent.target >= domain.limit


@given(steps(), steps(), sizes)
@settings(max_examples=100)
def test_what_one_domain_says_changes_nothing_for_another(
    mine: list[tuple[float, Domain]], other: list[tuple[float, Domain]], begin: int
) -> None:
    alone = [decision for _, _, decision in run(Course(), mine, begin)]
    beside = run(Course(), other, begin)
    together = []
    for _, _, decision in run(Course(), mine, begin):
        next(beside, None)
        together.append(decision)
    assert together == alone


# --------------------------------------------------------------------------------------------------------- scenarios


@dataclass
class Guest:
    """A guest that follows its target after `lag` seconds, reports in intervals, and needs as much as `needs` says.

    Available is what it has less what it needs; below nothing it would have been killed.
    """

    size: int = 512 * MIB
    needs: Callable[[float], int] = lambda _: 200 * MIB
    net: Callable[[float], int] = lambda _: 100 * MIB
    floor: int = 256 * MIB
    headroom: int = 64 * MIB
    interval: float = 10.0
    lag: float = 2.0
    now: float = 0.0
    target: int = 0
    report: Report | None = None
    lowest_available: int = 1 << 60
    course: Course = field(default_factory=Course)
    changes: list[tuple[float, Decision]] = field(default_factory=list)
    _coming: list[tuple[float, int]] = field(default_factory=list)
    _has: int = 0
    _said_at: float = -1e9

    def __post_init__(self) -> None:
        self.target = self._has = self.size

    def live(self, until: float) -> None:
        while self.now < until:
            self.now += 2.0
            while self._coming and self._coming[0][0] <= self.now:
                self._has = self._coming.pop(0)[1]
            available = self._has - self.needs(self.now)
            self.lowest_available = min(self.lowest_available, available)
            if self.now - self._said_at >= self.interval:
                self._said_at = self.now
                self.report = Report(self.now, max(0, available), 0)
            net = self.net(self.now)
            domain = Domain(self.target, self.size, self.size, self.floor, self.headroom, net, self.report)
            decision = self.course.decide(domain, self.now)
            if decision.reason != "kept":
                self.target = decision.target
                self.changes.append((self.now, decision))
                self._coming.append((self.now + self.lag, decision.target))

    @property
    def taken(self) -> int:
        return self.size - self.target


def test_all_of_a_steady_net_is_taken_and_then_nothing_moves() -> None:
    guest = Guest()
    guest.live(90)
    assert guest.taken >= 99 * MIB
    assert {decision.reason for _, decision in guest.changes} == {"taken"}
    assert len(guest.changes) <= 3
    before = list(guest.changes)
    guest.live(4000)
    assert guest.changes == before
    assert guest.lowest_available >= 200 * MIB


def test_a_net_that_comes_and_goes_is_never_taken() -> None:
    guest = Guest(net=lambda now: 100 * MIB if now % 8 < 4 else 0)
    guest.live(600)
    assert guest.changes == []


def test_a_net_that_wavers_a_little_moves_nothing() -> None:
    guest = Guest(net=lambda now: 100 * MIB - (200 * KIB if now % 400 < 10 and now > 100 else 0))
    guest.live(2000)
    assert guest.taken >= 99 * MIB
    assert all(at < 100 for at, _ in guest.changes)


def test_what_is_let_go_of_comes_back_at_once_and_exactly() -> None:
    guest = Guest(net=lambda now: 100 * MIB if now < 200 else 30 * MIB if now < 300 else 0)
    guest.live(198)
    assert guest.taken >= 99 * MIB
    guest.live(202)
    assert guest.taken == 30 * MIB
    guest.live(302)
    assert guest.target == guest.size


def test_nothing_goes_below_the_floor() -> None:
    guest = Guest(size=300 * MIB, needs=lambda _: 50 * MIB)
    guest.live(200)
    assert guest.target == 256 * MIB
    small = Guest(size=200 * MIB, needs=lambda _: 50 * MIB)
    small.live(200)
    assert small.changes == []


def test_a_guest_without_memory_to_spare_keeps_it() -> None:
    guest = Guest(needs=lambda _: 420 * MIB)  # 92 MiB available, less than 1.5 times the headroom
    guest.live(300)
    assert guest.changes == []
    guest = Guest(needs=lambda _: 400 * MIB)  # 112 MiB: 16 to spare
    guest.live(300)
    assert guest.taken == 16 * MIB


@pytest.mark.parametrize("interval", [2.0, 10.0])
def test_memory_is_back_before_a_growing_guest_runs_short(interval: float) -> None:
    """It begins to grow by 4 MiB/s when everything has been taken, and never has less than nothing."""
    guest = Guest(needs=lambda now: 200 * MIB + int(max(0.0, now - 300) * 4 * MIB), interval=interval)
    guest.live(298)
    assert guest.taken >= 99 * MIB
    guest.live(370)  # 280 MiB more
    assert guest.target == guest.size
    assert guest.lowest_available > 0
    assert next(decision.reason for at, decision in guest.changes if at > 300) == "short"


def test_the_same_guest_dies_if_nothing_comes_back() -> None:
    """The scenario above means something: without what came back there would not have been enough."""
    guest = Guest(needs=lambda now: 200 * MIB + int(max(0.0, now - 300) * 4 * MIB))
    guest.live(298)
    assert guest.target - guest.needs(370) < 0 <= guest.size - guest.needs(370)


def test_a_need_that_comes_and_goes_is_left_alone_for_longer_each_time() -> None:
    guest = Guest(needs=lambda now: 400 * MIB if now % 400 < 40 else 150 * MIB)
    guest.live(20_000)
    returns = [at for at, decision in guest.changes if decision.reason == "short"]
    pauses = []
    for at in returns:
        later = [then for then, decision in guest.changes if decision.reason == "taken" and then > at]
        if later:
            pauses.append(later[0] - at)
    assert pauses[0] >= S.rest
    assert max(pauses) >= 400
    assert len([at for at in returns if at > 10_000]) < len([at for at in returns if at <= 10_000])


def test_one_report_is_good_for_one_step_and_not_for_long() -> None:
    course, at = Course(), 0.0
    domain = Domain(512 * MIB, 512 * MIB, 512 * MIB, 64 * MIB, 16 * MIB, 200 * MIB, Report(0.0, 400 * MIB, 0))
    while (decision := course.decide(domain, at)).reason == "kept":
        at += 1.0
    assert (decision, at) == (Decision(512 * MIB - 64 * MIB, "taken"), S.steady)
    domain = replace(domain, target=decision.target)
    for report in (domain.report, Report(at + 1.0, 400 * MIB, 0)):
        assert course.decide(replace(domain, report=report), at + 3.0).reason == "kept"
    late = replace(domain, report=Report(at + 3.0, 400 * MIB, 0))
    assert course.decide(late, at + 4.0 + S.silent / 2).reason == "kept"
    assert course.decide(late, at + 2.0 + S.silent / 2).reason == "taken"


def test_pressure_counts_even_with_much_available() -> None:
    course, target = Course(), 512 * MIB
    calm = Domain(target, 512 * MIB, 512 * MIB, 64 * MIB, 16 * MIB, 100 * MIB, None)
    for at in range(0, 60, 2):
        domain = replace(calm, target=target, report=Report(float(at), 300 * MIB, 0))
        target = course.decide(domain, float(at)).target
    assert target < 415 * MIB
    half = course.decide(replace(calm, target=target, report=Report(60.0, 300 * MIB, S.pressure_high)), 60.0)
    assert half.reason == "short"
    assert 512 * MIB - half.target <= (512 * MIB - target) // 2
    whole = course.decide(replace(calm, target=half.target, report=Report(70.0, 300 * MIB, 2 * S.pressure_high)), 70.0)
    assert whole == Decision(512 * MIB, "short")


def test_a_guest_that_vanishes_gets_its_memory_back_after_a_while() -> None:
    guest = Guest()
    guest.live(100)
    assert guest.taken >= 99 * MIB
    guest.interval = 1e9
    guest.live(100 + S.silent - 12)
    assert guest.taken >= 99 * MIB
    guest.live(100 + S.silent + 4)
    assert guest.changes[-1][1] == Decision(guest.size, "silent")


def test_a_broker_that_starts_finds_a_lowered_domain_and_waits_for_its_agent() -> None:
    lowered = Domain(412 * MIB, 512 * MIB, 512 * MIB, 64 * MIB, 16 * MIB, 100 * MIB, None)
    course = Course()
    assert course.decide(lowered, 1000.0) == Decision(412 * MIB, "kept")
    assert course.decide(lowered, 1000.0 + S.silent) == Decision(412 * MIB, "kept")
    assert course.decide(lowered, 1001.0 + S.silent) == Decision(512 * MIB, "silent")
    assert Course().decide(replace(lowered, net=60 * MIB), 0.0) == Decision(452 * MIB, "let-go")


def test_a_target_above_what_the_domain_can_have_is_not_touched() -> None:
    odd = Domain(600 * MIB, 512 * MIB, 500 * MIB, 64 * MIB, 16 * MIB, 0, None)
    assert Course().decide(odd, 0.0) == Decision(600 * MIB, "kept")
    assert Course().decide(odd, 9e9) == Decision(600 * MIB, "kept")

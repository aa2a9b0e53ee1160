"""How much memory a domain may keep: what it gave up by sharing is taken from it, and given back before it runs short.

Pure: numbers and the time in, memory targets out. balloon.py reads and writes the targets; stats.py says what a domain
gave up and what it pays.

The rule. A domain is entitled to the target that it had before anything was taken. Of that at most its net goes away:
what it gave up (copies of its own that it dropped because the area has them), less its share of the area's cost. What
goes away comes back at once when the net shrinks, that is, when the domain lets go of pages and will read its files
again; and it comes back fast, whatever the net, when the guest is short: little memory available or memory pressure.

Nothing is taken in haste: a net must have lasted, the guest must have reported after the last change, and must have
half as much again available afterwards as what counts as short. After a shortage it is left alone for a while, longer
each time. So a guest whose need comes and goes settles with its memory, not without it.

Whom a lie costs. Each domain is judged by its own figures alone. The share and the grants, the upper bound of what
anybody can have given up, are the broker's own counts. A guest that says it has plenty is lowered to its entitlement
less its net, and not below the floor; one that says it is short keeps what it was entitled to. Others see neither.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from .common.units import KIB
from .common.wire import PAGE_SIZE

Reason = Literal["kept", "taken", "let-go", "short", "silent"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Times and thresholds; times in seconds, pressure in hundredths of a percent (PSI memory, some avg10)."""

    steady: float = 10.0  # a net must have lasted as long before it is taken
    settle: float = (
        2.0  # a report counts if it was made as long after the last change of the target: balloons take time
    )
    silent: float = 30.0  # a guest that has not reported for as long gets everything back
    rest: float = 60.0  # nothing is taken as long after a shortage; twice as long after the next one, and so on
    longest_rest: float = 1800.0
    forgiven: float = 3600.0  # without a shortage for as long, the next one counts as the first
    pressure_high: int = 1000  # 10 %: the guest stalls for memory, that is, it is short
    pressure_low: int = 100  # 1 %: nothing is taken above it
    # Less is not taken, and as much of a net is left alone, so that a share which wavers does not move the target.
    step: int = 256 * KIB
    portion: int = 8  # at most one part in as many of the target is taken at a time, so that the guest can follow


@dataclass(frozen=True, slots=True)
class Report:
    """What a guest's kernel said of memory at time `at`: MemAvailable in bytes, pressure as in Settings."""

    at: float
    available: int
    pressure: int


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain as it is now; sizes in bytes.

    `target` is its memory target, `entitled` what that was before anything was taken, `static_max` what it can never
    have more than. `net`: what it gave up less what it pays; below 0 counts as 0. `report` is the last one, None if
    there is none: then nothing is taken.
    """

    target: int
    entitled: int
    static_max: int
    floor: int
    headroom: int
    net: int
    report: Report | None

    @property
    def limit(self) -> int:
        """The most that the domain can get."""
        return min(self.entitled, self.static_max)

    @property
    def least(self) -> int:
        """The least that it can be left with: its floor, unless it was never entitled to as much."""
        return min(self.floor, self.limit)


@dataclass(frozen=True, slots=True)
class Decision:
    """The target that a domain ought to have, and why it is another one than now ("kept": it is not)."""

    target: int
    reason: Reason


@dataclass(slots=True, eq=False)
class Course:
    """What is remembered of one domain between decisions. One object per domain, for as long as it is the same one."""

    settings: Settings = field(default_factory=Settings)
    _heard: float | None = None  # when the last report was made, or of the first decision
    _nets: deque[tuple[float, int]] = field(default_factory=deque)  # of the last `steady` seconds and one before
    _changed_at: float | None = None  # the target
    _returned_at: float | None = None  # something, because the guest was short
    _short_at: float | None = None
    _rest: float = 0.0

    def decide(self, domain: Domain, now: float) -> Decision:
        """Return the target for now.

        It is the present one or one within [domain.least, domain.limit]; limit less target is within the net then.
        """
        if domain.report is not None:
            self._heard = domain.report.at
        elif self._heard is None:
            self._heard = now
        limit, net = domain.limit, max(0, domain.net)
        allowed = max(domain.least, limit - net)  # no lower than this, whatever else holds
        steady = max(0, self._steady(net, now) - self.settings.step)
        report = domain.report
        decision = Decision(domain.target, "kept")
        if now - self._heard > self.settings.silent:
            decision = Decision(limit, "silent")
        elif report is not None and self._is_short(domain, report):
            self._note_shortage(report, now)
            if self._returned_at is None or report.at >= self._returned_at + self.settings.settle:
                decision = Decision(self._returned(domain, report), "short")
                self._returned_at = now
        elif report is not None and domain.target > allowed:
            most = min(domain.target, limit) - max(domain.least, limit - steady)
            amount = self._takable(domain, report, most, now)
            if amount:
                decision = Decision(min(domain.target, limit) - amount, "taken")
        if decision.target < allowed:
            decision = Decision(allowed, "let-go")
        elif decision.reason != "taken" and decision.target <= domain.target:
            return Decision(domain.target, "kept")  # nothing is to be given back
        self._changed_at = now
        return decision

    def _steady(self, net: int, now: float) -> int:
        """Return what the net has been at least for `steady` seconds; 0 if it has not been looked at for as long."""
        self._nets.append((now, net))
        begin = now - self.settings.steady
        while len(self._nets) > 1 and self._nets[1][0] <= begin:
            self._nets.popleft()
        return min(net for _, net in self._nets) if self._nets[0][0] <= begin else 0

    def _is_short(self, domain: Domain, report: Report) -> bool:
        return report.available < domain.headroom or report.pressure >= self.settings.pressure_high

    def _note_shortage(self, report: Report, now: float) -> None:
        """Begin a rest, or make it longer if this is a shortage after some time without one."""
        if self._short_at is None or now - self._short_at > self.settings.forgiven:
            self._rest = self.settings.rest
        elif report.at - self._short_at > self.settings.silent:
            self._rest = min(2 * self._rest, self.settings.longest_rest)
        self._short_at = now

    def _returned(self, domain: Domain, report: Report) -> int:
        """Return the target of a guest that is short: half of what was taken comes back, or all of it."""
        if 2 * report.available < domain.headroom or report.pressure >= 2 * self.settings.pressure_high:
            return domain.limit
        taken = domain.limit - domain.target
        back = max(taken - taken // 2, 2 * (domain.headroom - report.available))
        return domain.limit if taken - back < self.settings.step else domain.target + _up(back)

    def _takable(self, domain: Domain, report: Report, most: int, now: float) -> int:
        """Return how much of `most` may be taken now, 0 for nothing."""
        if report.pressure > self.settings.pressure_low or now - report.at > self.settings.silent / 2:
            return 0
        if self._changed_at is not None and report.at < self._changed_at + self.settings.settle:
            return 0  # the guest had no time to follow and to say how that was
        if self._short_at is not None and now - self._short_at < self._rest:
            return 0
        room = report.available - domain.headroom - domain.headroom // 2
        amount = _down(min(most, room, max(self.settings.step, domain.target // self.settings.portion)))
        return amount if amount >= self.settings.step else 0


def _down(size: int) -> int:
    return size - size % PAGE_SIZE


def _up(size: int) -> int:
    return size + -size % PAGE_SIZE

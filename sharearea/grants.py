"""Which grant references of an area are free, and what each domain has of them (`xen` backend). Pure.

The table of grants is one for the whole area; a domain gets at most its part of it, and what it keeps mapped after it
should have let go (pinned) stays counted against that part until Xen says that it is free. What is in the table at any
moment only Xen knows: the area reads and writes it, the engine compares.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FIRST_REFERENCE = 8
"""References below are reserved by Xen's public interface (GNTTAB_NR_RESERVED_ENTRIES)."""


@dataclass(frozen=True, slots=True)
class GrantLimits:
    """How many grants there may be: entries of the area's table, reserved ones counted, and entries of one domain."""

    entries: int
    per_domain: int


class Ranges:
    """A set of integers as stretches, for slots and references: cheap where neighbours come and go together."""

    def __init__(self, stretches: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.count = 0
        for first, count in stretches:
            self.add(first, count)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first, count), ascending."""
        return ((start, end - start) for start, end in zip(self._starts, self._ends, strict=True))

    def add(self, first: int, count: int) -> None:
        """Add a stretch. Raises ValueError if a part of it is there already."""
        if count <= 0:
            return
        end = first + count
        at = bisect_right(self._starts, first)
        before = at > 0 and self._ends[at - 1] >= first
        after = at < len(self._starts) and self._starts[at] <= end
        if (before and self._ends[at - 1] > first) or (after and self._starts[at] < end):
            raise ValueError(f"a part of {first} to {end} is there already")
        if before and after:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif before:
            self._ends[at - 1] = end
        elif after:
            self._starts[at] = first
        else:
            self._starts.insert(at, first)
            self._ends.insert(at, end)
        self.count += count

    def remove(self, first: int, count: int) -> None:
        """Take out what is there of a stretch."""
        if count <= 0:
            return
        end = first + count
        at = max(bisect_right(self._starts, first) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            start, stop = self._starts[at], self._ends[at]
            if stop <= first:
                at += 1
                continue
            pieces = [(a, b) for a, b in ((start, min(stop, first)), (max(start, end), stop)) if a < b]
            self._starts[at : at + 1] = [a for a, _ in pieces]
            self._ends[at : at + 1] = [b for _, b in pieces]
            self.count -= (stop - start) - sum(b - a for a, b in pieces)
            at += len(pieces)

    def take(self, count: int) -> list[tuple[int, int]]:
        """Take out `count` integers, the lowest; as few stretches as that makes. Raises ValueError if there are fewer.

        One stretch that is long enough goes before several shorter ones in front of it.
        """
        if count > self.count:
            raise ValueError(f"{count} of {self.count}")
        first = self.take_stretch(count)
        if first is not None:
            return [(first, count)]
        taken: list[tuple[int, int]] = []
        while count:
            start, end = self._starts[0], self._ends[0]
            part = min(count, end - start)
            taken.append((start, part))
            self.remove(start, part)
            count -= part
        return taken

    def take_stretch(self, count: int) -> int | None:
        """Take out the lowest `count` integers that follow one another, and return the first; None: nowhere so many."""
        for start, end in zip(self._starts, self._ends, strict=True):
            if end - start >= count:
                self.remove(start, count)
                return start
        return None

    def holds(self, first: int, count: int) -> bool:
        """Return whether all of a stretch is there."""
        at = bisect_right(self._starts, first) - 1
        return at >= 0 and self._ends[at] >= first + count

    def overlaps(self, first: int, count: int) -> bool:
        """Return whether any of a stretch is there."""
        at = bisect_left(self._ends, first + 1)
        return at < len(self._starts) and self._starts[at] < first + count


class GrantLedger:
    """Hand out the references of one area's table."""

    def __init__(self, limits: GrantLimits) -> None:
        self.limits = limits
        self._free = Ranges([(FIRST_REFERENCE, max(0, limits.entries - FIRST_REFERENCE))])
        self._used: dict[int, int] = {}  # domid -> entries, pinned ones included

    @property
    def free(self) -> int:
        """Entries that nobody has."""
        return self._free.count

    @property
    def used(self) -> int:
        """Entries that somebody has."""
        return sum(self._used.values())

    def used_by(self, domid: int) -> int:
        """Entries of one domain."""
        return self._used.get(domid, 0)

    def take(self, domid: int, count: int) -> bytes | None:
        """Return references for `count` pages as packed (first, count), or None where the budget has not so many."""
        if count > self._free.count or self.used_by(domid) + count > self.limits.per_domain:
            return None
        self._used[domid] = self.used_by(domid) + count
        return array("I", [n for stretch in self._free.take(count) for n in stretch]).tobytes()

    def claim(self, domid: int, refs: bytes) -> None:
        """Take these very references (packed (first, count)), whatever the budget: a restarted broker found them.

        Raises ValueError if one is taken already, or is none of the table's.
        """
        stretches = list(pairs(refs))
        for first, count in stretches:
            if not self._free.holds(first, count):
                raise ValueError(f"references {first} to {first + count} are not free")
        for first, count in stretches:
            self._free.remove(first, count)
            self._used[domid] = self.used_by(domid) + count

    def give_back(self, domid: int, refs: bytes) -> None:
        """Take back references (packed (first, count)) whose entries are free."""
        total = 0
        for first, count in pairs(refs):
            self._free.add(first, count)
            total += count
        left = self.used_by(domid) - total
        if left > 0:
            self._used[domid] = left
        else:
            self._used.pop(domid, None)


def pairs(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield the (first, count) of a packed column."""
    column = array("I", packed)
    return zip(column[0::2], column[1::2], strict=True)


def spread(packed: bytes) -> array[int]:
    """Return every number of packed (first, count) stretches, in their order."""
    numbers = array("I")
    for first, count in pairs(packed):
        numbers.extend(range(first, first + count))
    return numbers


def stretches(numbers: array[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each stretch of numbers that follow one another: the opposite of `spread`."""
    steps = map(operator.sub, numbers[1:], numbers)
    ends = itertools.compress(range(1, len(numbers)), map((1).__ne__, steps))
    start = 0
    for end in itertools.chain(ends, [len(numbers)] if numbers else []):
        yield numbers[start], end - start
        start = end


def gather(numbers: array[int]) -> bytes:
    """Return numbers as packed (first, count) stretches, in their order."""
    return array("I", [n for stretch in stretches(numbers) for n in stretch]).tobytes()


def slots_of(runs: bytes) -> array[int]:
    """Return the slot of every page of packed runs (page, slot, count), in their order."""
    column = array("I", runs)
    slots = array("I")
    for first, count in zip(column[1::3], column[2::3], strict=True):
        slots.extend(range(first, first + count))
    return slots


def handles(runs: bytes, refs: bytes) -> bytes:
    """Put references (packed (first, count)) in the place of the slots of runs (page, slot, count).

    Both cover the same pages in the same order. Runs of the result are as long as pages and references allow.
    """
    out = array("I")
    left = list(pairs(refs))
    left.reverse()
    column = array("I", runs)
    for page, count in zip(column[0::3], column[2::3], strict=True):
        while count:
            ref, many = left.pop()
            part = min(count, many)
            if out and out[-3] + out[-1] == page and out[-2] + out[-1] == ref:
                out[-1] += part
            else:
                out.extend((page, ref, part))
            if part < many:
                left.append((ref + part, many - part))
            page, count = page + part, count - part
    if left:
        raise ValueError("more references than pages")
    return out.tobytes()

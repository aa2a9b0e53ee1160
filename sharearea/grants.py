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

from .model import DomainId, FileId, OwnerSet

NO_SLOT = 0xFFFFFFFF
"""In the place of a slot: a frame that is none."""
_NOBODY = 0xFFFFFFFF
_MANY = 64  # stretches: so many are added in one pass over all
FIRST_REFERENCE = 8
"""References below are reserved by Xen's public interface (GNTTAB_NR_RESERVED_ENTRIES)."""


@dataclass(frozen=True, slots=True)
class GrantLimits:
    """How many grants there may be: entries of the area's table, reserved ones counted, and entries of one domain."""

    entries: int
    per_domain: int


class Ranges:
    """A set of integers as stretches, for slots and references: cheap where neighbours come and go together.

    `within`: take_stretch takes no stretch over a multiple of it (slots of one segment); 0: anywhere.
    """

    def __init__(self, stretches: Iterable[tuple[int, int]] = (), within: int = 0) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._within = within
        self._longest = 0  # take_stretch has not found more than this, and nothing longer was added since
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
        self.count += count
        if before:
            first = self._starts[at - 1]
        if after:
            end = self._ends[at]
        self._starts[at - before : at + after] = [first]
        self._ends[at - before : at + after] = [end]
        self._longest = max(self._longest, end - first)

    def add_all(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Add stretches, many of them in one pass. Raises ValueError as `add`, with nothing added."""
        new = sorted((first, first + count) for first, count in stretches if count > 0)
        if len(new) < _MANY and not any(self.overlaps(start, end - start) for start, end in new):
            if all(end <= start for (_, end), (start, _) in itertools.pairwise(new)):
                for start, end in new:
                    self.add(start, end - start)
                return
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted([*zip(self._starts, self._ends, strict=True), *new]):
            if ends and start < ends[-1]:
                raise ValueError(f"a part of {start} to {end} is there already")
            if ends and start == ends[-1]:
                ends[-1] = end
            else:
                starts.append(start)
                ends.append(end)
        self._starts, self._ends = starts, ends
        self._longest = max(map(operator.sub, ends, starts), default=0)
        self.count += sum(end - start for start, end in new)

    def remove(self, first: int, count: int) -> int:
        """Take out what is there of a stretch, and return how many integers that were."""
        if count <= 0:
            return 0
        end, before = first + count, self.count
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
        return before - self.count

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
        self.count -= count
        for start, end in zip(self._starts, self._ends, strict=True):
            taken.append((start, min(count, end - start)))
            count -= end - start
            if count <= 0:
                break
        whole = len(taken) - (count < 0)
        del self._starts[:whole], self._ends[:whole]
        if count < 0:
            self._starts[0] += taken[-1][1]
        return taken

    def take_stretch(self, count: int) -> int | None:
        """Take out the lowest `count` integers that follow one another, and return the first; None: nowhere so many.

        With `within`, that is the most that can be asked for.
        """
        if count > self._longest:
            return None
        for start, end in zip(self._starts, self._ends, strict=True):
            if end - start < count:
                continue
            first = start
            if self._within and first // self._within != (first + count - 1) // self._within:
                first = (first // self._within + 1) * self._within
            if first + count <= end:
                self.remove(first, count)
                return first
        self._longest = count - 1
        return None

    def take_some(self, count: int, most: int) -> list[tuple[int, int]]:
        """Take out up to `count` integers, the lowest, in up to `most` stretches inside multiples of `within`."""
        taken: list[tuple[int, int]] = []
        for start, end in zip(self._starts, self._ends, strict=True):
            while start < end and count and len(taken) < most:
                stop = min(end, start + count)
                if self._within:
                    stop = min(stop, (start // self._within + 1) * self._within)
                taken.append((start, stop - start))
                count -= stop - start
                start = stop
            if not count or len(taken) == most:
                break
        for first, part in taken:
            self.remove(first, part)
        return taken

    def inside(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return what is there from `first` to `end`."""
        at, until = bisect_right(self._ends, first), bisect_left(self._starts, end)
        starts = (max(start, first) for start in self._starts[at:until])
        ends = (min(stop, end) for stop in self._ends[at:until])
        return [(start, stop - start) for start, stop in zip(starts, ends, strict=True)]

    def gaps(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return what is not there from `first` to `end`."""
        starts = [first, *(max(stop, first) for stop in self._ends)]
        ends = [*(min(start, end) for start in self._starts), end]
        return [(start, stop - start) for start, stop in zip(starts, ends, strict=True) if start < stop]

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
        self._beyond = Ranges()  # taken, and behind the end of the table: an earlier broker was allowed more
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
        """Take these very references (packed (first, count)), whatever the limits: a restarted broker found them.

        References behind the end of the table are lost once they are given back. Raises ValueError, with nothing
        taken, if one is taken already or reserved.
        """
        inside, beyond = self._cut(refs)
        for first, count in inside:
            if not self._free.holds(first, count):
                raise ValueError(f"references {first} to {first + count} are not free")
        for first, count in beyond:
            if self._beyond.overlaps(first, count):
                raise ValueError(f"references {first} to {first + count} are not free")
        for first, count in inside:
            self._free.remove(first, count)
        self._beyond.add_all(beyond)
        total = sum(array("I", refs)[1::2])
        if total:
            self._used[domid] = self.used_by(domid) + total

    def give_back(self, domid: int, refs: bytes) -> None:
        """Take back references (packed (first, count)) whose entries are free."""
        inside, beyond = self._cut(refs)
        self._free.add_all(inside)
        for first, count in beyond:
            self._beyond.remove(first, count)
        left = self.used_by(domid) - sum(array("I", refs)[1::2])
        if left > 0:
            self._used[domid] = left
        else:
            self._used.pop(domid, None)

    def _cut(self, refs: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the stretches inside the table, and those behind its end."""
        end = max(self.limits.entries, FIRST_REFERENCE)
        inside = [(first, min(count, end - first)) for first, count in pairs(refs) if first < end]
        beyond = [
            (max(first, end), first + count - max(first, end)) for first, count in pairs(refs) if first + count > end
        ]
        return inside, beyond


def pairs(packed: bytes) -> Iterator[tuple[int, int]]:
    """Yield the (first, count) of a packed column."""
    column = array("I", packed)
    return zip(column[0::2], column[1::2], strict=True)


def spread(packed: bytes) -> array[int]:
    """Return every number of packed (first, count) stretches, in their order."""
    column = array("I", packed)
    firsts, counts = column[0::2], column[1::2]
    if counts.count(1) == len(counts):
        return firsts
    return array("I", itertools.chain.from_iterable(map(range, firsts, map(operator.add, firsts, counts))))


def gather(numbers: array[int]) -> bytes:
    """Return numbers as packed (first, count) stretches, in their order: the opposite of `spread`."""
    if not numbers:
        return b""
    # 1 where a number is not the one before it plus one.
    new = b"\1" + bytes(map(operator.ne, map(operator.sub, numbers[1:], numbers), itertools.repeat(1)))
    starts = array("I", itertools.compress(range(len(numbers)), new))
    ends = starts[1:]
    ends.append(len(numbers))
    packed = array("I", bytes(8 * len(starts)))
    packed[0::2] = array("I", itertools.compress(numbers, new))
    packed[1::2] = array("I", map(operator.sub, ends, starts))
    return packed.tobytes()


def stretches(numbers: array[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each stretch of numbers that follow one another."""
    return pairs(gather(numbers))


def slot_stretches(runs: bytes) -> bytes:
    """Return the slots of packed runs (page, slot, count) as packed (first, count), in the order of their pages."""
    column = array("I", runs)
    packed = array("I", bytes(len(runs) // 3 * 2))
    packed[0::2], packed[1::2] = column[1::3], column[2::3]
    return packed.tobytes()


def known(slots: array[int]) -> array[int]:
    """Leave out what is no slot."""
    return array("I", [slot for slot in slots if slot != NO_SLOT]) if slots.count(NO_SLOT) else slots


def slots_of(runs: bytes) -> array[int]:
    """Return the slot of every page of packed runs (page, slot, count), in their order."""
    return spread(slot_stretches(runs))


def first_pages(runs: bytes, pages: int, width: int = 3) -> bytes:
    """Return the first so many pages of packed runs, or of packed stretches (`width` 2)."""
    column = array("I", runs)
    ends = list(itertools.accumulate(column[width - 1 :: width]))
    at = bisect_left(ends, pages)
    if at < len(ends):
        del column[(at + 1) * width :]
        column[-1] -= ends[at] - pages
    return column.tobytes()


def last_pages(refs: bytes, after: int) -> bytes:
    """Return what `first_pages` leaves out of packed stretches."""
    left = []
    for first, count in pairs(refs):
        skip = min(count, after)
        after -= skip
        if count > skip:
            left += [first + skip, count - skip]
    return array("I", left).tobytes()


def handles(runs: bytes, refs: bytes) -> bytes:
    """Put references (packed (first, count)) in the place of the slots of runs (page, slot, count).

    Both cover the same pages in the same order. Runs of the result are as long as pages and references allow.
    """
    column = array("I", runs)
    pages = column[0::3]
    ends = array("I", map(operator.add, pages, column[2::3]))
    new = bytes(map(operator.ne, pages[1:], ends))  # where pages do not follow one another, whatever their slots do
    blocks = zip(itertools.compress(pages, b"\1" + new), itertools.compress(ends, new + b"\1"), strict=True)
    out = array("I")
    left = list(pairs(refs))
    left.reverse()
    for page, end in blocks:
        while page < end:
            ref, many = left.pop()
            part = min(end - page, many)
            out.extend((page, ref, part))
            if part < many:
                left.append((ref + part, many - part))
            page += part
    if left:
        raise ValueError("more references than pages")
    return out.tobytes()


def compare(
    owners: Iterable[tuple[tuple[DomainId, FileId], OwnerSet]], entries: tuple[bytes, bytes, bytes]
) -> tuple[list[tuple[DomainId, FileId]], dict[int, tuple[array[int], array[int]]]]:
    """Compare the owners that the store has with the entries that the table has (references, domains, slots).

    Return the owners one of whose entries is not there or is another's, and the references and slots, by domain, of
    the entries that no other owner has.
    """
    refs, domids, slots = (array("I", column) for column in entries)
    size = max(refs, default=-1) + 1
    domid_at, slot_at = array("I", [_NOBODY]) * size, array("I", [_NOBODY]) * size
    at = 0
    for first, count in stretches(refs):
        domid_at[first : first + count] = domids[at : at + count]
        slot_at[first : first + count] = slots[at : at + count]
        at += count
    lost: list[tuple[DomainId, FileId]] = []
    for key, owner in owners:
        seen = array("I")
        whose = True
        for first, count in pairs(owner.refs):
            seen.extend(slot_at[first : first + count])
            whose = whose and domid_at[first : first + count] == array("I", [owner.domid]) * count
        if whose and seen == slots_of(owner.runs):
            for first, count in pairs(owner.refs):
                domid_at[first : first + count] = array("I", [_NOBODY]) * count
        else:
            lost.append(key)
    orphans: dict[int, tuple[array[int], array[int]]] = {}
    domid_at[:FIRST_REFERENCE] = array("I", [_NOBODY]) * min(size, FIRST_REFERENCE)
    left = array("I", itertools.compress(range(size), map(operator.ne, domid_at, itertools.repeat(_NOBODY))))
    for first, count in stretches(left):
        for domid, group in itertools.groupby(range(first, first + count), domid_at.__getitem__):
            numbers = array("I", group)
            mine = orphans.setdefault(domid, (array("I"), array("I")))
            mine[0].extend(numbers)
            mine[1].extend(slot_at[numbers[0] : numbers[-1] + 1])
    return lost, orphans

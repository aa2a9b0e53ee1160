"""References and slots as stretches, and the ledger of one area's table, against plain sets."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sharearea import grants
from sharearea.grants import (
    FIRST_REFERENCE,
    NO_SLOT,
    GrantLedger,
    GrantLimits,
    Ranges,
    compare,
    first_pages,
    gather,
    handles,
    last_pages,
    pairs,
    slots_of,
    spread,
    stretches,
)
from sharearea.model import OwnerSet

TOP = 60
numbers = st.lists(st.integers(0, TOP), max_size=80).map(lambda values: array("I", values))


def u32s(*values: int) -> bytes:
    return array("I", values).tobytes()


class RangesMachine(RuleBasedStateMachine):
    """Ranges next to a set of integers."""

    within = 0

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Ranges(within=self.within)
        self.model: set[int] = set()

    @rule(first=st.integers(0, TOP), count=st.integers(0, 12))
    def add(self, first: int, count: int) -> None:
        new = set(range(first, first + count))
        if new & self.model:
            with pytest.raises(ValueError, match="already"):
                self.ranges.add(first, count)
        else:
            self.ranges.add(first, count)
            self.model |= new

    @rule(parts=st.lists(st.tuples(st.integers(0, TOP), st.integers(0, 4)), max_size=6), at_once=st.booleans())
    def add_all(self, parts: list[tuple[int, int]], at_once: bool) -> None:
        new = [number for first, count in parts for number in range(first, first + count)]
        many = grants._MANY
        grants._MANY = 0 if at_once else many
        try:
            if len(new) > len(set(new)) or set(new) & self.model:
                with pytest.raises(ValueError, match="already"):
                    self.ranges.add_all(parts)
            else:
                self.ranges.add_all(parts)
                self.model |= set(new)
        finally:
            grants._MANY = many

    @rule(first=st.integers(0, TOP), count=st.integers(0, 30))
    def remove(self, first: int, count: int) -> None:
        there = self.model & set(range(first, first + count))
        assert self.ranges.remove(first, count) == len(there)
        self.model -= there

    @rule(first=st.integers(0, TOP), count=st.integers(1, 30))
    def look(self, first: int, count: int) -> None:
        asked = set(range(first, first + count))
        found = self.ranges.inside(first, first + count)
        assert {n for start, many in found for n in range(start, start + many)} == asked & self.model
        gaps = self.ranges.gaps(first, first + count)
        assert {n for start, many in gaps for n in range(start, start + many)} == asked - self.model

    @rule(count=st.integers(1, 12))
    def take_stretch(self, count: int) -> None:
        """The lowest one that fits and, with `within`, is inside one block."""
        fitting = [
            n
            for n in range(TOP + 20)
            if set(range(n, n + count)) <= self.model
            and (not self.within or n // self.within == (n + count - 1) // self.within)
        ]
        if count > (self.within or count):
            return
        first = self.ranges.take_stretch(count)
        assert first == min(fitting, default=None)
        self.model -= set(range(first, first + count)) if first is not None else set()

    @rule(count=st.integers(1, 20), most=st.integers(1, 5))
    def take_some(self, count: int, most: int) -> None:
        taken = self.ranges.take_some(count, most)
        numbers = [n for first, many in taken for n in range(first, first + many)]
        assert numbers == sorted(self.model)[: len(numbers)]
        assert len(numbers) == min(count, len(self.model) + len(set(numbers) - self.model)) or len(taken) == most
        if self.within:
            assert all(first // self.within == (first + many - 1) // self.within for first, many in taken)
        self.model -= set(numbers)

    @precondition(lambda self: self.model and not self.within)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, len(self.model)))
        before = list(self.ranges)
        taken = [n for first, length in self.ranges.take(count) for n in range(first, first + length)]
        assert len(taken) == len(set(taken)) == count
        assert set(taken) <= self.model
        fitting = [first for first, length in before if length >= count]
        if fitting:
            assert taken == list(range(fitting[0], fitting[0] + count))
        else:
            assert taken == sorted(self.model)[:count]
        self.model -= set(taken)

    @rule(count=st.integers(1, 20))
    def take_more_than_there_are(self, count: int) -> None:
        with pytest.raises(ValueError, match="of"):
            self.ranges.take(len(self.model) + count)

    @rule(first=st.integers(0, TOP), count=st.integers(1, 10))
    def ask(self, first: int, count: int) -> None:
        asked = set(range(first, first + count))
        assert self.ranges.holds(first, count) == (asked <= self.model)
        assert self.ranges.overlaps(first, count) == bool(asked & self.model)

    @invariant()
    def same(self) -> None:
        found = list(self.ranges)
        assert [n for first, count in found for n in range(first, first + count)] == sorted(self.model)
        assert self.ranges.count == len(self.model)
        # Neighbours are one stretch.
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found))


TestRanges = RangesMachine.TestCase


class BlocksMachine(RangesMachine):
    """Stretches that are taken stay inside blocks, as slots do inside segments."""

    within = 4


TestBlocks = BlocksMachine.TestCase


@given(numbers)
def test_gathered_numbers_spread_again(values: array[int]) -> None:
    assert spread(gather(values)) == values
    assert all(b != a + n for (a, n), (b, _) in itertools.pairwise(stretches(values)))


@given(st.data())
def test_handles_give_each_page_its_reference(data: st.DataObject) -> None:
    pages = sorted(data.draw(st.sets(st.integers(0, TOP), max_size=40)))
    slots = data.draw(st.lists(st.integers(0, 9), min_size=len(pages), max_size=len(pages)))
    refs = data.draw(st.permutations(range(100, 100 + len(pages))))
    runs = array("I")
    for page, slot in zip(pages, slots, strict=True):
        if runs and runs[-3] + runs[-1] == page and runs[-2] + runs[-1] == slot:
            runs[-1] += 1
        else:
            runs.extend((page, slot, 1))
    assert slots_of(runs.tobytes()).tolist() == slots
    made = array("I", handles(runs.tobytes(), gather(array("I", refs))))
    found = {made[at] + i: made[at + 1] + i for at in range(0, len(made), 3) for i in range(made[at + 2])}
    assert found == dict(zip(pages, refs, strict=True))


def test_handles_of_a_whole_file_are_one_run_wherever_its_slots_are() -> None:
    runs = u32s(0, 500, 2, 2, 9, 3, 5, 40, 1)
    assert handles(runs, u32s(8, 6)) == u32s(0, 8, 6)
    with pytest.raises(ValueError, match="more references"):
        handles(runs, u32s(8, 7))
    with pytest.raises(IndexError):
        handles(runs, u32s(8, 5))


def test_a_domain_gets_its_part_and_the_table_its_end() -> None:
    ledger = GrantLedger(GrantLimits(entries=FIRST_REFERENCE + 10, per_domain=6))
    assert ledger.take(1, 7) is None
    first = ledger.take(1, 4)
    assert first == u32s(FIRST_REFERENCE, 4)
    assert ledger.take(1, 3) is None
    assert ledger.take(2, 6) == u32s(FIRST_REFERENCE + 4, 6)
    assert (ledger.free, ledger.used, ledger.used_by(1), ledger.used_by(2)) == (0, 10, 4, 6)
    assert ledger.take(3, 1) is None
    ledger.give_back(1, u32s(FIRST_REFERENCE + 1, 2))
    assert (ledger.free, ledger.used_by(1)) == (2, 2)
    assert ledger.take(3, 2) == u32s(FIRST_REFERENCE + 1, 2)
    with pytest.raises(ValueError, match="already"):
        ledger.give_back(2, u32s(FIRST_REFERENCE + 4, 1, FIRST_REFERENCE + 4, 1))


def test_what_a_restarted_broker_finds_is_taken_whatever_the_budget() -> None:
    ledger = GrantLedger(GrantLimits(entries=100, per_domain=2))
    ledger.claim(7, u32s(20, 5, 50, 1))
    assert ledger.used_by(7) == 6
    assert ledger.take(7, 1) is None
    with pytest.raises(ValueError, match="not free"):
        ledger.claim(8, u32s(80, 2, 24, 1))
    assert ledger.used_by(8) == 0
    with pytest.raises(ValueError, match="not free"):
        ledger.claim(8, u32s(FIRST_REFERENCE - 1, 1))
    assert list(pairs(ledger.take(8, 2) or b"")) == [(FIRST_REFERENCE, 2)]
    ledger.give_back(7, u32s(20, 5, 50, 1))
    assert ledger.free == 100 - FIRST_REFERENCE - 2


def test_a_table_smaller_than_the_reserved_entries_has_nothing() -> None:
    assert GrantLedger(GrantLimits(entries=4, per_domain=10)).take(1, 1) is None


def test_references_behind_the_end_of_the_table_are_lost_when_they_come_back() -> None:
    ledger = GrantLedger(GrantLimits(entries=20, per_domain=100))
    ledger.claim(7, u32s(18, 5, 30, 2))
    assert (ledger.used_by(7), ledger.free) == (7, 20 - FIRST_REFERENCE - 2)
    for taken in ((19, 1), (22, 1), (29, 2)):
        with pytest.raises(ValueError, match="not free"):
            ledger.claim(8, u32s(10, 1, *taken))
    ledger.give_back(7, u32s(19, 3))
    assert (ledger.used_by(7), ledger.free) == (4, 20 - FIRST_REFERENCE - 1)
    ledger.claim(8, u32s(20, 2))
    ledger.give_back(8, u32s(20, 2))
    ledger.give_back(7, u32s(18, 1, 22, 1, 30, 2))
    assert (ledger.used, ledger.free) == (0, 20 - FIRST_REFERENCE)
    assert ledger.take(9, 12) == u32s(FIRST_REFERENCE, 12)


@given(st.data())
def test_what_is_cut_off_is_what_is_left_out(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    firsts = data.draw(st.lists(st.integers(0, TOP), min_size=len(counts), max_size=len(counts)))
    refs = u32s(*[n for pair in zip(firsts, counts, strict=True) for n in pair])
    runs = u32s(*[n for first, count in zip(firsts, counts, strict=True) for n in (7, first, count)])
    pages = data.draw(st.integers(1, sum(counts)))
    assert spread(first_pages(refs, pages, width=2)) == spread(refs)[:pages]
    assert slots_of(first_pages(runs, pages)) == spread(refs)[:pages]
    assert spread(last_pages(refs, pages)) == spread(refs)[pages:]


def owner(file: int, runs: bytes, refs: bytes, domid: int = 5) -> tuple[tuple[str, int], OwnerSet]:
    return ("a", file), OwnerSet("pool", "a", bytes(16), file, runs, domid, refs)


def columns(**entries: tuple[int, int]) -> tuple[bytes, bytes, bytes]:
    """Columns of entries rN=(domid, slot)."""
    refs = [int(name[1:]) for name in entries]
    return u32s(*refs), u32s(*[d for d, _ in entries.values()]), u32s(*[s for _, s in entries.values()])


def test_owners_and_entries_are_compared() -> None:
    owners = [
        owner(1, u32s(0, 7, 2), u32s(10, 2)),  # whole
        owner(2, u32s(0, 9, 2), u32s(12, 2)),  # 13 is missing
        owner(3, u32s(0, 9, 1), u32s(14, 1)),  # another's
        owner(4, u32s(0, 9, 1), u32s(15, 1)),  # another slot
        owner(5, u32s(0, 9, 1), u32s(99, 1)),  # behind the last entry
        owner(6, u32s(0, 7, 1), u32s(10, 1)),  # somebody has it already
    ]
    entries = columns(r10=(5, 7), r11=(5, 8), r12=(5, 9), r14=(6, 9), r15=(5, 3), r20=(6, NO_SLOT), r1=(0, 4))
    lost, orphans = compare(owners, entries)
    assert lost == [("a", file) for file in (2, 3, 4, 5, 6)]
    assert {domid: (refs.tolist(), slots.tolist()) for domid, (refs, slots) in orphans.items()} == {
        5: ([12, 15], [9, 3]),
        6: ([14, 20], [9, NO_SLOT]),
    }
    assert compare([], columns()) == ([], {})
    assert compare(owners[:1], columns()) == ([("a", 1)], {})

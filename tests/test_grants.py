"""References and slots as stretches, and the ledger of one area's table, against plain sets."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sharearea.grants import (
    FIRST_REFERENCE,
    GrantLedger,
    GrantLimits,
    Ranges,
    gather,
    handles,
    pairs,
    slots_of,
    spread,
    stretches,
)

TOP = 60
numbers = st.lists(st.integers(0, TOP), max_size=80).map(lambda values: array("I", values))


def u32s(*values: int) -> bytes:
    return array("I", values).tobytes()


class RangesMachine(RuleBasedStateMachine):
    """Ranges next to a set of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = Ranges()
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

    @rule(first=st.integers(0, TOP), count=st.integers(0, 30))
    def remove(self, first: int, count: int) -> None:
        self.ranges.remove(first, count)
        self.model -= set(range(first, first + count))

    @precondition(lambda self: self.model)
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
        ledger.claim(8, u32s(90, 2, 24, 1))
    assert ledger.used_by(8) == 0
    with pytest.raises(ValueError, match="not free"):
        ledger.claim(8, u32s(FIRST_REFERENCE - 1, 1))
    assert list(pairs(ledger.take(8, 2) or b"")) == [(FIRST_REFERENCE, 2)]
    ledger.give_back(7, u32s(20, 5, 50, 1))
    assert ledger.free == 100 - FIRST_REFERENCE - 2


def test_a_table_smaller_than_the_reserved_entries_has_nothing() -> None:
    assert GrantLedger(GrantLimits(entries=4, per_domain=10)).take(1, 1) is None

"""The native page table against the twin that defines it: the same operations, the same results, always.

What the twin itself means is tested by example at the end; memory running out, in native/tests/test_table.c.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from struct import pack, unpack
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharearea.common import native
from sharearea.common.errors import Closed, TableFull
from sharearea.common.native import NativePageTable
from sharearea.pagetable import NO_SLOT, SHARE_PAGE, ZERO_PAGE, Census, PageTable, ReferencePageTable, Totals

SEED = bytes(range(40))
ZERO_FP = b"\xaa" * 32
U32_MAX = 0xFFFFFFFF


def u32s(values: Iterable[int]) -> bytes:
    return b"".join(pack("<I", value) for value in values)


def ints(packed: bytes) -> list[int]:
    return list(unpack(f"<{len(packed) // 4}I", packed))


def triples(runs: Iterable[tuple[int, int, int]]) -> bytes:
    return u32s(value for run in runs for value in run)


def counts(table: PageTable) -> dict[str, Any]:
    """All totals but the memory, which is the native table's own."""
    totals = table.totals()
    return {name: getattr(totals, name) for name in Totals.__dataclass_fields__ if name != "memory_bytes"}


class Both:
    """The native table and the twin, driven alike. An answer that differs, or a different refusal, is a failure."""

    def __init__(self, max_holders: int, max_pages: int, seed: bytes = SEED) -> None:
        self.native: PageTable = NativePageTable(seed, ZERO_FP, max_holders, max_pages)
        self.twin: PageTable = ReferencePageTable(seed, ZERO_FP, max_holders, max_pages)

    def do(self, method: str, *args: object) -> object:
        """What both answered; of a refusal, its type."""
        answers = []
        for table in (self.twin, self.native):
            answer: object
            try:
                answer = getattr(table, method)(*args)
            except (ValueError, TableFull) as error:
                answer = type(error)
            answers.append(answer)
        assert answers[1] == answers[0], f"{method}{args}: native {answers[1]!r}, twin {answers[0]!r}"
        return answers[0]

    def packed(self, method: str, *args: object) -> list[int]:
        """An answer that must be an array."""
        return ints(cast("bytes", self.do(method, *args)))

    def same_totals(self) -> dict[str, Any]:
        native = counts(self.native)
        assert native == counts(self.twin)
        for first, n, k in ((0, 1 << 40, 2), (0, 3, 1), (2, 2, 3), (1 << 20, 5, 2)):
            counted = [table.census(first, n, k) for table in (self.native, self.twin)]
            # A native table that was full has given out ids that no page got.
            names = [name for name in Census.__dataclass_fields__ if name != "end"]
            assert [getattr(counted[0], name) for name in names] == [getattr(counted[1], name) for name in names]
        return native

    def close(self) -> None:
        self.native.close()
        self.twin.close()


# ------------------------------------------------------------------------------------------------------- any sequence

MAX_PAGES = 8
MAX_HOLDERS = 70  # two words of 64
FPS = [ZERO_FP] + [bytes([n]) * 32 for n in range(1, 6)] + [bytes(31) + bytes([n]) for n in range(1, 6)]
SLOTS = [*range(8), 16383, 16384, 40000]  # three chunks of the native table, one of them skipped

choices = st.lists(st.integers(0, 999), max_size=6)
any_ids = st.lists(st.sampled_from([*range(MAX_PAGES + 2), U32_MAX]), max_size=4)
any_slots = st.lists(st.sampled_from([*SLOTS, NO_SLOT]), max_size=4)
holders = st.sampled_from([0, 1, 63, 64, 69])
any_runs = st.lists(
    st.tuples(st.sampled_from([0, 7, U32_MAX]), st.sampled_from([*SLOTS, 8, 50000, U32_MAX]), st.integers(0, 5)),
    max_size=3,
)


class Machine(RuleBasedStateMachine):
    """Random operations on a small table: most with arguments that are good at the time, some with any at all."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both(MAX_HOLDERS, MAX_PAGES)
        self.known = [ZERO_PAGE]
        self.free_slots = list(SLOTS)
        self.mapped: list[int] = []

    def teardown(self) -> None:
        self.both.close()

    def pick(self, picked: list[int]) -> bytes:
        return u32s(self.known[n % len(self.known)] for n in picked)

    @initialize(picked=st.lists(st.sampled_from(FPS), min_size=3, max_size=6))
    def begin(self, picked: list[bytes]) -> None:
        self.both.do("intern", b"".join(picked))

    @rule(picked=st.lists(st.sampled_from(FPS), max_size=6))
    def intern(self, picked: list[bytes]) -> None:
        self.both.do("intern", b"".join(picked))

    @rule(picked=choices)
    def unref(self, picked: list[int]) -> None:
        self.both.do("unref", self.pick(picked))

    @rule(picked=st.integers(0, 999))
    def unref_wholly(self, picked: int) -> None:
        """Until the page has no references."""
        page = self.pick([picked])
        while page != u32s([ZERO_PAGE]) and self.both.do("unref", page) is not ValueError:
            pass

    @rule(picked=choices, holder=holders)
    def mark(self, picked: list[int], holder: int) -> None:
        self.both.do("mark", self.pick(picked), holder)

    @rule(picked=st.integers(0, 999), least=st.integers(0, 30), n=st.integers(0, 40))
    def mark_for_many(self, picked: int, least: int, n: int) -> None:
        for holder in range(least, least + n):
            self.both.do("mark", self.pick([picked]), holder)

    @rule(picked=choices, holder=holders)
    def unmark(self, picked: list[int], holder: int) -> None:
        self.both.do("unmark", self.pick(picked), holder)

    @rule(holder=st.one_of(holders, st.sampled_from([-1, MAX_HOLDERS, U32_MAX, U32_MAX + 1])))
    def forget(self, holder: int) -> None:
        self.both.do("forget", holder)

    @rule(picked=choices, k=st.sampled_from([0, 1, 2, 8]))
    def want(self, picked: list[int], k: int) -> None:
        self.both.do("want", self.pick(picked), k)

    @rule(picked=choices)
    def unwant(self, picked: list[int]) -> None:
        self.both.do("unwant", self.pick(picked))

    @precondition(lambda self: len(self.known) > 1 and self.free_slots)
    @rule(picked=choices, into=st.randoms(use_true_random=False))
    def publish(self, picked: list[int], into: random.Random) -> None:
        picked = picked[: len(self.free_slots)]
        ids = u32s(self.known[1 + n % (len(self.known) - 1)] for n in picked)
        answer = self.both.do("publish", ids, u32s(into.sample(self.free_slots, len(picked))))
        assert isinstance(answer, bytes)

    @rule(
        picked=choices, pages=st.lists(st.integers(0, 4), min_size=6, max_size=6), slots_per_segment=st.integers(0, 4)
    )
    def ask(self, picked: list[int], pages: list[int], slots_per_segment: int) -> None:
        ids = self.pick(picked)
        self.both.do("slots", ids)
        self.both.do("fps", ids)
        self.both.do("count", ids)
        self.both.do("runs", ids, None, slots_per_segment)
        self.both.do("runs", ids, u32s(pages[: len(picked)]), slots_per_segment)

    @rule(picked=choices)
    def map(self, picked: list[int]) -> None:
        """What a domain does: map the runs of some pages."""
        runs = self.both.do("runs", self.pick(picked), None, 4)
        self.both.do("map", runs)

    @rule(runs=any_runs)
    def map_any(self, runs: list[tuple[int, int, int]]) -> None:
        self.both.do("map", triples(runs))

    @rule(runs=any_runs)
    def unmap_any(self, runs: list[tuple[int, int, int]]) -> None:
        self.both.do("unmap", triples(runs))

    @precondition(lambda self: self.mapped)
    @rule(picked=choices)
    def unmap(self, picked: list[int]) -> None:
        slots = [self.mapped[n % len(self.mapped)] for n in picked]
        self.both.do("unmap", triples((0, slot, 1) for slot in slots))

    @rule(runs=any_runs)
    def share_any(self, runs: list[tuple[int, int, int]]) -> None:
        self.both.do("share", triples(runs))

    @precondition(lambda self: self.mapped)
    @rule(picked=choices)
    def share(self, picked: list[int]) -> None:
        self.both.do("share", triples((7, self.mapped[n % len(self.mapped)], 1) for n in picked))

    @rule(ids=any_ids, slots=any_slots, holder=st.sampled_from([-1, 0, MAX_HOLDERS, U32_MAX + 1]))
    def call_with_anything(self, ids: list[int], slots: list[int], holder: int) -> None:
        packed = u32s(ids)
        self.both.do("unref", packed)
        self.both.do("mark", packed, holder)
        self.both.do("unmark", packed, holder)
        self.both.do("want", packed, holder)
        self.both.do("unwant", packed)
        self.both.do("publish", packed, u32s(slots))
        for method in ("slots", "fps", "count"):
            self.both.do(method, packed)
        self.both.do("runs", packed, u32s(slots), 3)

    @invariant()
    def agree(self) -> None:
        self.both.same_totals()
        every = range(MAX_PAGES + 2)
        self.known = [id_ for id_ in every if self.both.do("slots", u32s([id_])) is not ValueError]
        self.both.do("fps", u32s(self.known))
        self.both.do("slots", u32s(self.known))
        self.both.do("live", 16380, 6)
        self.both.do("live", 39999, 1 << 40)
        self.both.do("live", 0, 8)
        used = {slot for first in (0, 16380, 39999) for slot in ints(self.both.twin.live(first, 8)[0])}
        self.mapped = [slot for slot in SLOTS if self.both.twin.live(slot, 1)[2]]
        self.free_slots = [slot for slot in SLOTS if slot not in used.union(self.mapped)]
        # All mappings together pay for each mapped slot once, but for what division leaves over.
        each = [(slot, self.both.twin.live(slot, 1)[2]) for slot in self.mapped]
        paid = self.both.do("share", triples((0, slot, 1) for slot, n in each for _ in range(n)))
        assert isinstance(paid, int)
        whole = len(each) * SHARE_PAGE
        assert whole - sum(n for _, n in each) <= paid <= whole


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------------------------ large tables

SHAPES: dict[str, Callable[[int], bytes]] = {
    "random": lambda n: random.Random(n).randbytes(32),
    "counted in front": lambda n: n.to_bytes(4, "little") + bytes(28),
    "counted behind": lambda n: bytes(28) + n.to_bytes(4, "little"),
    "counted by large steps": lambda n: (n * 0x10001_0000_0001).to_bytes(16, "big") + b"\x01" * 16,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_large_tables_agree(shape: str) -> None:
    """Tens of thousands of pages come and go, the index grows and splits meanwhile, and every answer is the same."""
    draw = random.Random(7)
    both = Both(max_holders=3, max_pages=30_000)
    fps = [SHAPES[shape](n) for n in range(1, 40_000)]
    held: list[int] = []
    for _ in range(40):
        some = b"".join(draw.choices(fps, k=1500))
        answer = both.do("intern", some)
        if isinstance(answer, bytes):
            held += ints(answer)
        draw.shuffle(held)
        gone = [held.pop() for _ in range(min(len(held), draw.choice((300, 1200, 4000))))]
        both.do("mark", u32s(held[:500]), draw.randrange(3))
        both.do("unref", u32s(gone))
        both.same_totals()
    both.do("fps", u32s(held))
    assert both.packed("intern", b"".join(fps[:20_000]))
    both.do("unref", u32s(held))
    both.same_totals()
    assert both.do("intern", b"".join(fps)) is TableFull
    both.same_totals()
    both.do("forget", 1)
    assert both.packed("intern", b"".join(fps[10_000:25_000]))
    both.close()


def test_results_do_not_depend_on_the_seed() -> None:
    """Even a seed that sends every fingerprint to the same place changes the time only."""
    both = Both(max_holders=1, max_pages=10_000, seed=bytes(40))
    fps = [SHAPES["random"](n) for n in range(8000)]
    ids = both.packed("intern", b"".join(fps))
    both.do("unref", u32s(ids[1::2]))
    both.do("intern", b"".join(reversed(fps)))
    both.same_totals()
    both.close()


def test_memory_is_counted_and_stays_near_64_bytes_a_page() -> None:
    table = NativePageTable(SEED, ZERO_FP, 64, 1 << 20)
    empty = table.totals().memory_bytes
    ids = table.intern(random.Random(1).randbytes(32 * 300_000))
    table.publish(ids, u32s(range(300_000)))
    full = table.totals().memory_bytes
    assert 40 * 300_000 < full - empty < 68 * 300_000
    table.close()


# --------------------------------------------------------------------------------------------------------- by example


@pytest.fixture
def both() -> Iterator[Both]:
    tables = Both(MAX_HOLDERS, MAX_PAGES)
    yield tables
    tables.close()


A, B, C, D = (bytes([n]) * 32 for n in (1, 2, 3, 4))


def test_ids_are_dense_and_the_last_recycled_comes_first(both: Both) -> None:
    assert both.packed("intern", A + ZERO_FP + B + A + C) == [1, 0, 2, 1, 3]
    assert both.do("unref", u32s([2, 1, 3])) == b""  # 1 has another reference
    assert both.packed("intern", D + B + A) == [3, 2, 1]
    assert both.do("fps", u32s([3, 0, 2])) == D + ZERO_FP + B


def test_a_full_table_takes_nothing_of_a_report(both: Both) -> None:
    both.do("intern", A + B)
    both.do("unref", u32s([1]))
    many = b"".join(bytes([n]) * 32 for n in range(2, 12))
    assert both.do("intern", many) is TableFull
    assert both.same_totals()["pages"] == 1
    assert both.do("unref", u32s([2, 2])) is ValueError  # B got no second reference
    assert both.packed("intern", C + D + A) == [1, 3, 4]


def test_a_pending_page_that_loses_its_last_reference_gets_no_slot(both: Both) -> None:
    both.do("intern", A + B)
    both.do("mark", u32s([1, 2]), 5)
    assert both.packed("want", u32s([0, 1, 1, 2]), 1) == [1, 3]
    assert both.do("unref", u32s([1])) == b""
    assert both.do("mark", u32s([1]), 5) is ValueError
    assert both.same_totals()["pages"] == 2
    assert both.packed("publish", u32s([1, 2, 1]), u32s([7, 8, 9])) == [7, 9]
    assert both.do("slots", u32s([1])) is ValueError
    assert both.do("map", triples([(0, 7, 1)])) is ValueError
    assert both.packed("intern", C) == [1]


def test_a_pending_page_that_is_found_again_is_published(both: Both) -> None:
    both.do("intern", A)
    both.do("mark", u32s([1]), 5)
    both.do("want", u32s([1]), 1)
    both.do("unref", u32s([1]))
    assert both.packed("intern", A) == [1]
    assert both.packed("want", u32s([1]), 0) == []
    assert both.packed("publish", u32s([1]), u32s([7])) == []
    assert both.packed("slots", u32s([1])) == [7]
    assert both.same_totals()["by_holders"] == (1, 0, 0, 0, 0, 0, 0, 0)


def test_unwant_recycles_what_nobody_references(both: Both) -> None:
    both.do("intern", A + B)
    both.do("want", u32s([1, 2]), 0)
    both.do("unref", u32s([1]))
    assert both.do("unwant", u32s([1, 2, 1])) is None
    totals = both.same_totals()
    assert (totals["pages"], totals["pending"]) == (1, 0)
    assert both.packed("want", u32s([2]), 0) == [0]
    assert both.do("unwant", u32s([1])) is ValueError


def test_a_move_leaves_the_old_slot(both: Both) -> None:
    both.do("intern", A + B)
    assert both.packed("publish", u32s([1, 2]), u32s([0, 1])) == []
    both.do("map", triples([(9, 1, 1)]))
    assert both.packed("publish", u32s([1, 2]), u32s([2, 3])) == [0]
    assert both.do("live", 0, 9) == (u32s([2, 3]), u32s([1, 2]), 1)
    assert both.do("publish", u32s([1]), u32s([1])) is ValueError  # left, and still mapped
    assert both.packed("unmap", triples([(0, 1, 1)])) == [1]
    assert both.packed("publish", u32s([1, 1]), u32s([1, 0])) == [2, 1]


def test_a_taken_slot_refuses_the_whole_publication(both: Both) -> None:
    both.do("intern", A + B + C)
    both.do("publish", u32s([1]), u32s([5]))
    for ids, slots in (([2, 3], [6, 5]), ([2, 3], [6, 6]), ([2, 0], [6, 7]), ([2, 3], [6, NO_SLOT]), ([2, 9], [6, 7])):
        assert both.do("publish", u32s(ids), u32s(slots)) is ValueError
        assert both.packed("slots", u32s([1, 2, 3])) == [5, NO_SLOT, NO_SLOT]
    assert both.packed("publish", u32s([2, 3]), u32s([6, 7])) == []


def test_a_slot_is_freed_when_neither_used_nor_mapped(both: Both) -> None:
    both.do("intern", A + B)
    both.do("publish", u32s([1, 2]), u32s([3, 4]))
    both.do("map", triples([(0, 3, 1), (0, 3, 2)]))
    assert both.packed("unmap", triples([(0, 4, 1)])) == []  # a page uses it
    assert both.packed("unref", u32s([1, 2])) == [4]
    assert both.packed("unmap", triples([(0, 3, 1)])) == []
    assert both.do("unmap", triples([(0, 3, 1), (0, 3, 1)])) is ValueError
    assert both.packed("unmap", triples([(0, 3, 1)])) == [3]
    assert both.do("map", triples([(0, 4, 2)])) is ValueError
    assert both.same_totals()["mappings"] == 0
    both.do("map", triples([(0, 3, 2)]))  # used once, if by nobody now
    assert both.same_totals()["mappings"] == 2


def test_who_maps_a_slot_pays_an_equal_part_of_it(both: Both) -> None:
    assert native.SHARE_PAGE == SHARE_PAGE
    both.do("intern", A + B + C)
    both.do("publish", u32s([1, 2, 3]), u32s([3, 4, 20000]))
    first, second = triples([(0, 3, 2), (9, 20000, 1)]), triples([(5, 3, 1)])
    assert both.do("share", first) is ValueError  # nobody maps anything yet
    both.do("map", first)
    assert both.do("share", first) == 3 * SHARE_PAGE
    both.do("map", second)
    both.do("map", second)  # through two files: it pays twice
    assert both.do("share", first) == 2 * SHARE_PAGE + SHARE_PAGE // 3
    assert both.do("share", second + second) == SHARE_PAGE // 3 * 2
    # A page that left its slot is paid for as long as somebody maps that.
    both.do("unref", u32s([1]))
    assert both.do("share", second) == SHARE_PAGE // 3
    both.do("unmap", second + second)
    assert both.do("share", first) == 3 * SHARE_PAGE
    assert both.do("share", b"") == 0
    assert both.do("share", triples([(0, 3, 3)])) is ValueError
    assert both.do("share", triples([(0, U32_MAX, 2)])) is ValueError


def test_runs_end_where_page_slot_or_segment_jump(both: Both) -> None:
    ids = both.packed("intern", b"".join(bytes([n]) * 32 for n in range(1, 8)))
    both.do("publish", u32s(ids[:6]), u32s([2, 3, 4, 5, 9, 10]))
    assert both.packed("runs", u32s(ids), None, 4) == [0, 2, 2, 2, 4, 2, 4, 9, 2]
    assert both.packed("runs", u32s(ids), None, 100) == [0, 2, 4, 4, 9, 2]
    assert both.packed("runs", u32s([1, 7, 2]), None, 100) == [0, 2, 1, 2, 3, 1]
    assert both.packed("runs", u32s([1, 7, 2]), u32s([8, 0, 9]), 100) == [8, 2, 2]
    assert both.packed("runs", u32s([1, 2]), u32s([U32_MAX, 0]), 100) == [U32_MAX, 2, 1, 0, 3, 1]


def test_counts_leave_the_zero_page_out_of_repetitions(both: Both) -> None:
    both.do("intern", A + B)
    both.do("publish", u32s([1]), u32s([3]))
    assert both.do("count", u32s([0, 1, 1, 2, 0, 2, 2])) == (2, 2, 3)
    assert both.do("count", u32s([1, 2])) == (0, 1, 0)


def test_holders_are_counted_in_classes(both: Both) -> None:
    ids = both.packed("intern", b"".join(bytes([n]) * 32 for n in range(1, 9)))
    both.do("publish", u32s(ids), u32s(range(8)))
    for numbers in ((0, 1, 2, 3, 4, 8, 16, 32), (0, 1, 2, 3, 7, 15, 31, 70)):
        for id_, n in zip(ids, numbers, strict=True):
            for holder in range(n):
                both.do("mark", u32s([id_, id_]), holder)
        assert both.same_totals()["by_holders"] == (1,) * 8
    both.do("forget", 0)
    assert both.same_totals()["by_holders"] == (2, 1, 1, 0, 1, 1, 1, 1)


@pytest.mark.parametrize("holder", [0, 63, 64, 69])
def test_one_holder_goes_and_the_others_stay(both: Both, holder: int) -> None:
    others = {0, 5, 63, 64, 68, 69} - {holder}
    ids = u32s(both.packed("intern", A + B))
    both.do("publish", ids, u32s([0, 1]))
    for each in (*others, holder):
        both.do("mark", ids, each)
    assert both.same_totals()["by_holders"] == (0, 0, 0, 0, 2, 0, 0, 0)
    both.do("unmark", ids[:4], holder)
    both.do("unmark", ids[:4], holder)
    both.do("forget", holder)
    for left, each in reversed(list(enumerate(others))):
        both.do("forget", each)
        assert both.do("want", ids, 0) == b""
        assert both.same_totals()["by_holders"][min(left, 4)] == 2


def test_the_highest_slot_number_is_a_slot(both: Both) -> None:
    both.do("intern", A + B)
    both.do("publish", u32s([1, 2]), u32s([NO_SLOT - 1, 0]))
    assert both.do("live", 1, (1 << 64) - 1) == (u32s([NO_SLOT - 1]), u32s([1]), 0)
    assert both.do("map", triples([(0, NO_SLOT - 1, 3)])) is ValueError
    assert both.do("live", 0, 1 << 64) is ValueError
    both.do("publish", u32s([2]), u32s([32768]))
    assert both.do("live", 20000, 20000) == (u32s([32768]), u32s([2]), 0)  # begins where nothing was ever used
    assert both.do("live", 32769, 0) == (b"", b"", 0)
    assert both.packed("unref", u32s([1])) == [NO_SLOT - 1]


@pytest.mark.parametrize("method", ["intern", "unref", "unwant", "fps", "slots", "count", "map", "unmap", "share"])
def test_arrays_of_broken_length_are_refused(both: Both, method: str) -> None:
    assert both.do(method, b"\0" * 33) is ValueError


@pytest.mark.parametrize("args", [(0, 5), (5, 0), (1 << 32, 5), (5, NO_SLOT), (-1, 5)])
def test_tables_without_room_are_refused(args: tuple[int, int]) -> None:
    for table in (NativePageTable, ReferencePageTable):
        with pytest.raises(ValueError):  # noqa: PT011  both say it in their own words
            table(SEED, ZERO_FP, *args)


@pytest.mark.parametrize("table", [NativePageTable, ReferencePageTable])
def test_a_closed_table_says_so(table: type[NativePageTable] | type[ReferencePageTable]) -> None:
    closed = table(SEED, ZERO_FP, 1, 1)
    closed.close()
    closed.close()
    for call in (lambda: closed.intern(A), lambda: closed.unref(b""), lambda: closed.live(0, 1), closed.totals):
        with pytest.raises(Closed):
            call()


def test_the_census_says_what_could_be_shared(both: Both) -> None:
    both.do("intern", A + B + C + ZERO_FP + A)
    both.do("mark", u32s([1, 2]), 0)
    both.do("mark", u32s([1, 3]), 1)
    both.do("mark", u32s([1]), 69)
    both.same_totals()
    census = both.native.census(0, 100, 2)
    assert (census.common, census.copies, census.end) == (1, 3, 4)
    held, common, share = (unpack("<70Q", column) for column in (census.held, census.held_common, census.share))
    assert (held[0], held[1], held[69], sum(held)) == (2, 2, 1, 5)
    assert (common[0], common[1], common[69], sum(common)) == (1, 1, 1, 3)
    assert share[0] == share[69] == SHARE_PAGE // 3
    part = both.native.census(2, 100, 1)
    assert (part.common, part.copies, part.end) == (2, 2, 4)
    with pytest.raises(ValueError, match="out of range"):
        both.twin.census(0, -1, 2)


def test_slots_are_counted_by_their_mappings(both: Both) -> None:
    ids = both.packed("intern", A + B)
    both.do("publish", u32s(ids), u32s([0, 1]))
    for _ in range(9):
        both.do("map", u32s([0, 0, 2]))
    both.do("map", u32s([0, 0, 1]))
    assert both.same_totals()["by_mappings"] == (0, 0, 0, 0, 2, 0, 0)
    for _ in range(8):
        both.do("unmap", u32s([0, 0, 2]))
    assert both.same_totals()["by_mappings"] == (1, 1, 0, 0, 0, 0, 0)
    both.do("unmap", u32s([0, 0, 2]))
    assert both.same_totals()["by_mappings"] == (1, 0, 0, 0, 0, 0, 0)

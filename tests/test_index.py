"""The index of a pool against a naive model: who holds which page, which slot has it, who may map it.

The model knows contents, pages and slots by value and keeps every rule in the plainest way. The table under the index
is the reference one; that the native one does the same is test_pagetable.py's business, what the broker makes of the
index is test_engine.py's and the simulation's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharearea.common.errors import TableFull
from sharearea.common.wire import MAX_GRANT_RUNS
from sharearea.grants import NO_SLOT, gather, slots_of
from sharearea.index import Content, PoolIndex
from sharearea.model import (
    Change,
    OwnerCleared,
    OwnerSet,
    PoolRecord,
    SegmentClosed,
    SegmentOpened,
    SlotsFilled,
    SlotsFreed,
)
from sharearea.pagetable import ReferencePageTable

SLOTS_PER_SEGMENT = 4
SYMBOLS = 7  # pages that exist; 0 is the zero page
DOMAINS = ("a", "b", "c", "d")
MAX_DOMAINS = 3
PAGE = 4096
EMPTY = bytes(32)


def fingerprint(symbol: int) -> bytes:
    return bytes([symbol]) + b"\x77" * 31


def u32s(values: Iterable[int]) -> bytes:
    return array("I", values).tobytes()


def ints(column: bytes) -> list[int]:
    return array("I", column).tolist()


def table(max_pages: int = 100) -> ReferencePageTable:
    return ReferencePageTable(bytes(40), fingerprint(0), MAX_DOMAINS, max_pages)


def expanded(runs: bytes) -> list[tuple[int, int]]:
    """(page, slot) of every page in runs, none of which leaves its segment."""
    pairs: list[tuple[int, int]] = []
    values = ints(runs)
    for page, slot, count in zip(values[0::3], values[1::3], values[2::3], strict=True):
        assert count > 0
        assert slot // SLOTS_PER_SEGMENT == (slot + count - 1) // SLOTS_PER_SEGMENT
        pairs.extend((page + i, slot + i) for i in range(count))
    return pairs


@dataclass
class Record:
    """What a store would have."""

    segments: dict[int, tuple[int, int]] = field(default_factory=dict)
    slots: dict[int, bytes] = field(default_factory=dict)
    owners: dict[tuple[str, int], OwnerSet] = field(default_factory=dict)

    def apply(self, changes: Iterable[Change]) -> None:
        for change in changes:
            match change:
                case SegmentOpened():
                    self.segments[change.segment] = (change.dev, change.ino)
                case SegmentClosed():
                    del self.segments[change.segment]
                    low = change.segment * SLOTS_PER_SEGMENT
                    assert not [slot for slot in self.slots if low <= slot < low + SLOTS_PER_SEGMENT]
                case SlotsFilled():
                    for i in range(len(change.fingerprints) // 32):
                        fp = change.fingerprints[i * 32 : i * 32 + 32]
                        if fp != EMPTY:
                            assert change.first + i not in self.slots
                            self.slots[change.first + i] = fp
                case SlotsFreed():
                    for slot in ints(change.slots):
                        del self.slots[slot]
                case OwnerSet():
                    assert (change.domain, change.file) not in self.owners
                    self.owners[change.domain, change.file] = change
                case OwnerCleared():
                    del self.owners[change.domain, change.file]
                case _:
                    raise AssertionError(change)

    def stored(self) -> PoolRecord:
        """As the store gives it back: one stretch for each segment, holes of zero bytes."""
        stretches = {}
        for segment in {slot // SLOTS_PER_SEGMENT for slot in self.slots}:
            first = segment * SLOTS_PER_SEGMENT
            slots = range(first, first + SLOTS_PER_SEGMENT)
            stretches[first] = b"".join(self.slots.get(slot, EMPTY) for slot in slots)
        return PoolRecord(bytes(16), SLOTS_PER_SEGMENT, dict(self.segments), stretches, dict(self.owners))


@dataclass(eq=False)
class Held:
    """A content in the model."""

    root: bytes | None
    symbols: list[int]
    numbers: list[int]
    content: Content
    holders: dict[str, set[int]] = field(default_factory=dict)


class Machine(RuleBasedStateMachine):
    """Random operations on an index and on the model."""

    reuse = False

    def __init__(self) -> None:
        super().__init__()
        self.index = PoolIndex("pool", table(), SLOTS_PER_SEGMENT, MAX_DOMAINS, reuse=self.reuse)
        self.record = Record()
        self.k = 2
        self.contents: list[Held] = []
        self.files: dict[str, dict[int, Held]] = {}
        self.marks: dict[str, set[int]] = {}
        self.slot_of: dict[int, int] = {}  # symbol -> slot
        self.pending: dict[int, bytes] = {}  # symbol -> id
        self.kept: list[int] = []  # symbols that a restart keeps for a while
        self.mapped: dict[tuple[str, int], list[int]] = {}
        self.pinned: list[list[int]] = []  # slots that are mapped and have no owner
        self.given_out: set[int] = set()  # slots, of this area
        self.freed: set[int] = set()  # slots of which the store does not know yet
        self.strays: set[int] = set()  # free ones that something reaches all the same

    # ------------------------------------------------------------------------------------------------- the model

    def referenced(self) -> set[int]:
        return {symbol for held in self.contents for symbol in held.symbols} | set(self.kept)

    def mappings(self) -> list[int]:
        return [slot for slots in (*self.mapped.values(), *self.pinned) for slot in slots]

    def mapped_slots(self) -> set[int]:
        return set(self.mappings())

    def forget_unreferenced(self) -> None:
        """Pages that nobody has leave their slots."""
        referenced = self.referenced()
        for symbol in [symbol for symbol in self.slot_of if symbol not in referenced]:
            del self.slot_of[symbol]

    def check_changes(self, changes: list[Change]) -> None:
        """Slots are freed exactly when no page uses them and nobody maps them."""
        before = set(self.record.slots)
        self.record.apply(changes)
        for change in changes:
            if isinstance(change, SlotsFreed):
                assert not self.freed & set(ints(change.slots))
                self.freed |= set(ints(change.slots))
        expected = before & (set(self.slot_of.values()) | self.mapped_slots())
        assert set(self.record.slots) == expected

    def wanted(self, held: Held) -> list[int]:
        positions, seen = [], set()
        for position, symbol in enumerate(held.symbols):
            holders = sum(symbol in marks for marks in self.marks.values())
            free = symbol != 0 and symbol not in self.slot_of and symbol not in self.pending and symbol not in seen
            if free and holders >= self.k:
                positions.append(position)
                seen.add(symbol)
        return positions

    def some_file(self, pick: int) -> tuple[str, int] | None:
        files = [(domain, file) for domain, files in self.files.items() for file in files]
        return files[pick % len(files)] if files else None

    # --------------------------------------------------------------------------------------- domains and contents

    @initialize(k=st.integers(2, 3), everybody=st.booleans())
    def begin(self, k: int, everybody: bool) -> None:
        self.k = k
        for domain in DOMAINS[:MAX_DOMAINS] if everybody else ():
            self.join(domain)

    @precondition(lambda self: len(self.files) < MAX_DOMAINS or not self.contents)
    @rule(domain=st.sampled_from(DOMAINS))
    def join(self, domain: str) -> None:
        if domain in self.files:
            return
        holdings = self.index.join(domain)
        assert (holdings is None) == (len(self.files) == MAX_DOMAINS)
        if holdings is not None:
            others = {self.index.domains[other].number for other in self.files}
            assert holdings.number not in others
            assert 0 <= holdings.number < MAX_DOMAINS
            self.files[domain], self.marks[domain] = {}, set()

    @precondition(lambda self: any(self.files.values()))
    @rule(pick=st.integers(0, 99))
    def leave(self, pick: int) -> None:
        domain = sorted(self.files)[pick % len(self.files)]
        self.index.leave(domain)
        changes: list[Change] = []
        while domain in self.index.leaving:
            changes += self.index.drain(domain, 2)
        for file in list(self.files[domain]):
            self.model_drop(domain, file)
        del self.files[domain], self.marks[domain]
        self.forget_unreferenced()
        self.check_changes(changes)

    @precondition(lambda self: self.files)
    @rule(
        pick=st.integers(0, 99),
        file=st.integers(0, 4),
        symbols=st.lists(st.integers(0, SYMBOLS - 1), min_size=1, max_size=6),
        gaps=st.none() | st.lists(st.integers(0, 2), min_size=6, max_size=6),
        short=st.booleans(),
    )
    def report(self, pick: int, file: int, symbols: list[int], gaps: list[int] | None, short: bool) -> None:
        """A domain reports a file: whole (with a root) or in part."""
        domain = sorted(self.files)[pick % len(self.files)]
        if gaps is None:
            numbers = list(range(len(symbols)))
            root: bytes | None = bytes([short, *symbols]).ljust(32, b"\xff")
        else:
            numbers = [position + sum(gaps[: position + 1]) for position in range(len(symbols))]
            root = None
        held = None if root is None else next((held for held in self.contents if held.root == root), None)
        found = None if root is None else self.index.find(root)
        assert (found is None) == (held is None)
        if file in self.files[domain]:
            if found is not None:
                with pytest.raises(ValueError, match="held already"):
                    self.index.claim(domain, file, b"/f", found)
            return
        if held is None:
            size = (numbers[-1] + 1) * PAGE - short
            pages = None if root is not None else u32s(numbers)
            content = self.index.add(root, size, pages, b"".join(map(fingerprint, symbols)))
            held = Held(root, symbols, numbers, content)
            self.contents.append(held)
        assert found is None or found is held.content
        self.index.claim(domain, file, b"/f%d" % file, held.content)
        self.files[domain][file] = held
        if domain not in held.holders:
            self.marks[domain] |= set(held.symbols) - {0}
        held.holders.setdefault(domain, set()).add(file)

    @precondition(lambda self: len(self.files) > 1 and self.contents)
    @rule(pick=st.integers(0, 99), file=st.integers(0, 4))
    def copy(self, pick: int, file: int) -> None:
        """Every domain that has the number free reports what somebody has."""
        held = self.contents[pick % len(self.contents)]
        for domain, files in self.files.items():
            if file not in files:
                self.index.claim(domain, file, b"/copy", held.content)
                files[file] = held
                if domain not in held.holders:
                    self.marks[domain] |= set(held.symbols) - {0}
                held.holders.setdefault(domain, set()).add(file)

    def model_drop(self, domain: str, file: int) -> None:
        held = self.files[domain].pop(file)
        held.holders[domain].discard(file)
        if not held.holders[domain]:
            del held.holders[domain]
            self.marks[domain] -= set(held.symbols)
            if not held.holders:
                self.contents.remove(held)

    @precondition(lambda self: any(self.files.values()))
    @rule(pick=st.integers(0, 99), more=st.lists(st.integers(0, 9), max_size=3))
    def drop(self, pick: int, more: list[int]) -> None:
        found = self.some_file(pick)
        if found is None:
            return
        domain, file = found
        numbers = [file, *more, file]
        changes = self.index.drop(domain, numbers)
        for number in dict.fromkeys(numbers):
            if number in self.files[domain]:
                self.model_drop(domain, number)
        self.forget_unreferenced()
        self.check_changes(changes)

    @precondition(lambda self: any(self.files.values()))
    @rule()
    def remark_everything(self) -> None:
        """After this, what is wanted is exactly what k domains really have."""
        for domain, files in self.files.items():
            self.index.remark(domain, [held.content for held in self.contents])
            self.marks[domain] = {symbol for held in files.values() for symbol in held.symbols} - {0}

    # --------------------------------------------------------------------------------------------------- publishing

    @precondition(lambda self: self.contents)
    @rule(pick=st.integers(0, 99))
    def want(self, pick: int) -> None:
        held = self.contents[pick % len(self.contents)]
        positions = self.wanted(held)
        assert ints(self.index.table.want(held.content.ids, self.k)) == positions
        ids = ints(self.index.ids_at(held.content, u32s(positions)))
        assert ids == [ints(held.content.ids)[position] for position in positions]
        for position, id_ in zip(positions, ids, strict=True):
            symbol = held.symbols[position]
            really = sum(any(symbol in h.symbols for h in files.values()) for files in self.files.values())
            assert symbol != 0
            assert really >= self.k
            assert self.index.table.fps(u32s([id_])) == fingerprint(symbol)
            self.pending[symbol] = u32s([id_])

    def fill(self, fingerprints: list[bytes]) -> tuple[int, list[Change]]:
        """Slots for so many pages, and what the store is told before they are published."""
        first = self.index.allocate(len(fingerprints))
        slots = set(range(first, first + len(fingerprints)))
        segment = first // SLOTS_PER_SEGMENT
        assert {slot // SLOTS_PER_SEGMENT for slot in slots} == {segment}
        if self.reuse:
            assert not slots & (self.freed | set(self.record.slots) | self.mapped_slots() | self.strays)
            assert segment not in self.index.emptying
        else:
            assert not slots & self.given_out
            assert segment in (self.index.current_segment(), self.index.current_segment() - 1)
        changes: list[Change] = []
        if segment not in self.index.segments:
            changes.append(self.index.opened(segment, 7, segment))
        changes.append(self.index.filled(first, b"".join(fingerprints)))
        return first, changes

    @precondition(lambda self: self.pending)
    @rule(good=st.lists(st.booleans(), min_size=1, max_size=SLOTS_PER_SEGMENT))
    def publish(self, good: list[bool]) -> None:
        symbols = list(self.pending)[: len(good)]
        good = good[: len(symbols)]
        if not any(good):
            first = self.index.allocate(len(good))
            self.index.retract(first, len(good))
            again = self.index.allocate(len(good))
            assert again == first or self.reuse
            self.index.retract(again, len(good))
            self.unwant()
            return
        fps = [fingerprint(symbol) if ok else EMPTY for symbol, ok in zip(symbols, good, strict=True)]
        first, told = self.fill(fps)
        self.record.apply(told)
        taken = {first + i: symbol for i, (symbol, ok) in enumerate(zip(symbols, good, strict=True)) if ok}
        self.given_out |= set(range(first, first + len(good)))
        self.index.reusable(u32s(first + i for i, ok in enumerate(good) if not ok))
        ids = b"".join(self.pending[symbol] for symbol in taken.values())
        changes = self.index.publish(ids, u32s(taken))
        self.index.table.unwant(b"".join(self.pending[s] for s, ok in zip(symbols, good, strict=True) if not ok))
        for symbol in symbols:
            del self.pending[symbol]
        referenced = self.referenced()
        self.slot_of |= {symbol: slot for slot, symbol in taken.items() if symbol in referenced}
        self.check_changes(changes)

    @precondition(lambda self: self.contents)
    @rule()
    def publish_everything(self) -> None:
        for pick in range(len(self.contents)):
            self.want(pick)
        while self.pending:
            self.publish([True] * SLOTS_PER_SEGMENT)

    @precondition(lambda self: self.pending)
    @rule()
    def unwant(self) -> None:
        self.index.table.unwant(b"".join(self.pending.values()))
        self.pending.clear()

    @precondition(lambda self: self.slot_of)
    @rule(pick=st.integers(0, 99), leaving=st.none() | st.integers(0, 99))
    def move(self, pick: int, leaving: int | None) -> None:
        """The pages of a segment move to fresh slots; a domain may leave meanwhile."""
        segment = sorted(self.slot_of.values())[pick % len(self.slot_of)] // SLOTS_PER_SEGMENT
        slots, ids, _ = self.index.live(segment)
        by_slot = {slot: symbol for symbol, slot in self.slot_of.items() if slot // SLOTS_PER_SEGMENT == segment}
        assert ints(slots) == sorted(by_slot)
        fps = [fingerprint(by_slot[slot]) for slot in ints(slots)]
        assert self.index.hold(ids) == b"".join(fps)
        moving = [by_slot[slot] for slot in ints(slots)]
        self.kept += moving
        if leaving is not None and self.files:
            self.leave(leaving)
        first, told = self.fill(fps)
        self.record.apply(told)
        self.given_out |= set(range(first, first + len(fps)))
        changes = self.index.publish(ids, u32s(range(first, first + len(fps))))
        self.slot_of |= {symbol: first + i for i, symbol in enumerate(moving)}
        self.check_changes(changes)
        changes = self.index.let_go(ids)
        for symbol in moving:
            self.kept.remove(symbol)
        self.forget_unreferenced()
        self.check_changes(changes)

    # ------------------------------------------------------------------------------------------------------- grants

    @precondition(lambda self: self.slot_of and any(self.files.values()))
    @rule(pick=st.integers(0, 99), all_of_them=st.booleans())
    def own(self, pick: int, all_of_them: bool) -> None:
        files = [(domain, file) for domain, files in self.files.items() for file in files]
        for domain, file in files if all_of_them else [files[pick % len(files)]]:
            held = self.files[domain][file]
            runs = self.index.grantable(domain, file)
            pairs = zip(held.numbers, held.symbols, strict=True)
            expected = [(number, self.slot_of[symbol]) for number, symbol in pairs if symbol in self.slot_of]
            assert expanded(runs) == expected
            if (domain, file) in self.mapped:
                with pytest.raises(ValueError, match="already"):
                    self.index.own(OwnerSet("pool", domain, bytes(16), file, runs))
            elif runs:
                change = OwnerSet("pool", domain, b"i" * 16, file, runs)
                self.record.apply([change])
                self.index.own(change)
                self.mapped[domain, file] = [slot for _, slot in expected]

    @precondition(lambda self: self.mapped)
    @rule(domain=st.sampled_from(DOMAINS), files=st.lists(st.integers(0, 5), max_size=4))
    def release(self, domain: str, files: list[int]) -> None:
        changes = self.index.release(domain, files)
        cleared = [change.file for change in changes if isinstance(change, OwnerCleared)]
        assert cleared == [file for file in dict.fromkeys(files) if (domain, file) in self.mapped]
        for file in cleared:
            del self.mapped[domain, file]
        self.check_changes(changes)

    # ----------------------------------------------------------------------------------------- segments and restart

    @precondition(lambda self: self.index.segments)
    @rule(pick=st.integers(0, 99))
    def close_segment(self, pick: int) -> None:
        segment = sorted(self.index.segments)[pick % len(self.index.segments)]
        slots, _, mapped = self.index.live(segment)
        if segment < max(self.index.segments) and not slots and not mapped:
            self.record.apply([self.index.close_segment(segment)])

    @precondition(lambda self: self.record.slots)
    @rule(some=st.lists(st.integers(0, 99), max_size=3))
    def restart(self, some: list[int]) -> None:
        """All reports are void; pages in slots are kept until settle; owners are what they were, but for lost ones.

        On `xen` what is mapped without an owner is said by the area; of free slots nobody knows how often.
        """
        stored = self.record.stored()
        self.index.table.close()
        self.index = PoolIndex("pool", table(), SLOTS_PER_SEGMENT, MAX_DOMAINS, reuse=self.reuse)
        lost: set[tuple[str, int]] = set()
        reached = [slot for slots in self.pinned for slot in slots]
        self.strays.clear()
        if self.reuse:
            lost = {sorted(self.mapped)[n % len(self.mapped)] for n in some[:-1] if self.mapped}
            opened = {n * SLOTS_PER_SEGMENT + i for n in stored.segments for i in range(SLOTS_PER_SEGMENT)}
            free = sorted(opened - set(self.record.slots))
            self.strays = {free[n % len(free)] for n in some[-1:] if free}
            reached += self.strays
        changes, counted = self.index.restore(stored, lost, array("I", reached))
        assert counted.tolist() == [NO_SLOT if slot in self.strays else slot for slot in reached]
        assert [(c.domain, c.file) for c in changes if isinstance(c, OwnerCleared)] == [
            key for key in stored.owners if key in lost
        ]
        for key in lost:
            del self.mapped[key]
        self.contents, self.files, self.marks, self.pending = [], {}, {}, {}
        self.kept = [fp[0] for fp in self.record.slots.values()]
        self.slot_of = {fp[0]: slot for slot, fp in sorted(self.record.slots.items())}  # the last one is left
        self.freed = set()
        self.check_changes(changes)
        assert self.index.segments == stored.segments
        assert self.index.current_segment() not in stored.segments

    @precondition(lambda self: self.kept)
    @rule()
    def settle(self) -> None:
        changes = self.index.settle()
        self.kept.clear()
        self.forget_unreferenced()
        self.check_changes(changes)

    # --------------------------------------------------------------------------------------------------- always true

    @invariant()
    def index_is_the_model(self) -> None:
        index, record = self.index, self.record
        assert index.segments == record.segments
        assert {key: (o.instance, o.runs) for key, o in index.owners.items()} == {
            key: (o.instance, o.runs) for key, o in record.owners.items()
        }
        assert len(set(self.slot_of.values())) == len(self.slot_of)
        assert set(record.slots) == set(self.slot_of.values()) | self.mapped_slots()
        assert all(record.slots[slot] == fingerprint(symbol) for symbol, slot in self.slot_of.items())
        totals = index.table.totals()
        assert totals.pages == len((self.referenced() | set(self.pending)) - {0})
        assert totals.slots_used == len(self.slot_of)
        assert totals.slots_mapped == len(self.mapped_slots())
        assert totals.mappings == len(self.mappings())
        assert totals.pending == len(self.pending)
        holders = [sum(symbol in marks for marks in self.marks.values()) for symbol in self.slot_of]
        assert totals.by_holders[:4] == tuple(map(holders.count, range(4)))
        for segment in index.segments:
            low, high = segment * SLOTS_PER_SEGMENT, (segment + 1) * SLOTS_PER_SEGMENT
            expected: dict[str, set[int]] = {}
            for (domain, file), mapping in self.mapped.items():
                if any(low <= slot < high for slot in mapping):
                    expected.setdefault(domain, set()).add(file)
            assert {domain: set(files) for domain, files in index.owners_in(segment).items()} == expected
            slots, _, mapped = index.live(segment)
            assert ints(slots) == sorted(slot for slot in self.slot_of.values() if low <= slot < high)
            assert mapped == sum(low <= slot < high for slot in self.mappings())

    @invariant()
    def files_are_the_models(self) -> None:
        index = self.index
        assert set(index.all_contents()) == {held.content for held in self.contents}
        assert set(index.domains) == set(self.files)
        for domain, files in self.files.items():
            holdings = index.domains[domain]
            assert {file: entry.content for file, entry in holdings.files.items()} == {
                file: held.content for file, held in files.items()
            }
            assert holdings.size_bytes == sum(held.content.size for held in files.values())
            assert set(index.owned_by(domain)) == {file for owner, file in self.mapped if owner == domain}
        for held in self.contents:
            content = held.content
            assert content.holders == held.holders
            assert content.page_count == len(held.symbols)
            assert [content.page_number(position) for position in range(content.page_count)] == held.numbers
            assert index.count_available(content) == sum(symbol in self.slot_of for symbol in held.symbols)

    def teardown(self) -> None:
        """When everybody has gone, nothing is left."""
        for domain in list(self.files):
            self.leave(sorted(self.files).index(domain))
        self.unwant()
        self.settle()
        for domain, file in list(self.mapped):
            self.release(domain, [file])
        for slots in list(self.pinned):
            self.pinned.remove(slots)
            self.check_changes(self.index.unmap(gather(array("I", slots))))
        assert self.record.slots == {}
        assert self.record.owners == {}
        assert self.index.table.totals().pages == 0


TestIndex = Machine.TestCase
TestIndex.settings = settings(max_examples=200, stateful_step_count=60)


class ReusingMachine(Machine):
    """The same for an area whose slots take other pages again (`xen`)."""

    reuse = True

    @precondition(lambda self: self.freed)
    @rule()
    def commit(self) -> None:
        """The store knows what is free."""
        self.index.reusable(u32s(sorted(self.freed)))
        self.freed.clear()

    @precondition(lambda self: self.mapped)
    @rule(pick=st.integers(0, 99), part=st.integers(0, 3))
    def disown(self, pick: int, part: int) -> None:
        """An owner lets go; some of its grants are still in use."""
        domain, file = sorted(self.mapped)[pick % len(self.mapped)]
        found = self.index.disown(domain, file)
        assert found is not None
        owner, change = found
        slots = self.mapped.pop((domain, file))
        assert slots_of(owner.runs).tolist() == slots
        self.pinned += [slots[:part]] if slots[:part] else []
        self.check_changes([change, *self.index.unmap(gather(array("I", slots[part:])))])
        assert self.index.disown(domain, file) is None

    @precondition(lambda self: self.pinned)
    @rule(pick=st.integers(0, 99))
    def unpin(self, pick: int) -> None:
        slots = self.pinned.pop(pick % len(self.pinned))
        self.check_changes(self.index.unmap(gather(array("I", slots))))

    @precondition(lambda self: self.index.segments)
    @rule(pick=st.integers(0, 99))
    def empty(self, pick: int) -> None:
        segment = sorted(self.index.segments)[pick % len(self.index.segments)]
        if segment < self.index.current_segment():
            self.index.empty(segment)
            assert not self.index.free.overlaps(segment * SLOTS_PER_SEGMENT, SLOTS_PER_SEGMENT)

    @rule()
    def fill_again(self) -> None:
        self.index.fill_again()
        assert self.index.emptying == set()
        assert self.index.withheld.count == 0

    @rule(count=st.integers(1, SLOTS_PER_SEGMENT), most=st.integers(1, 3), backwards=st.booleans())
    def take_pieces(self, count: int, most: int, backwards: bool) -> None:
        """What a full area has left: taken, not used, and given back in any order."""
        index = self.index
        behind = -index.next_slot % SLOTS_PER_SEGMENT if index.current_segment() in index.segments else 0
        free = index.free.count or behind
        pieces = self.index.allocate_scattered(count, most)
        taken = [slot for first, many in pieces for slot in range(first, first + many)]
        assert len(taken) == len(set(taken)) <= count
        assert len(taken) == min(count, free) or len(pieces) == most
        assert all(first // SLOTS_PER_SEGMENT == (first + many - 1) // SLOTS_PER_SEGMENT for first, many in pieces)
        assert not set(taken) & (self.freed | set(self.record.slots) | self.strays)
        for first, many in reversed(pieces) if backwards else pieces:
            self.index.retract(first, many)

    @invariant()
    def no_slot_is_lost(self) -> None:
        index = self.index
        opened = {
            slot
            for segment in index.segments
            for slot in range(segment * SLOTS_PER_SEGMENT, (segment + 1) * SLOTS_PER_SEGMENT)
            if slot < index.next_slot
        }
        free = [slot for first, count in (*index.free, *index.withheld) for slot in range(first, first + count)]
        assert len(free) == len(set(free))
        assert set(free) == opened - set(self.record.slots) - self.freed - self.strays
        for ranges, emptied in ((index.free, False), (index.withheld, True)):
            for first, count in ranges:
                for slot in range(first, first + count):
                    assert (slot // SLOTS_PER_SEGMENT in index.emptying) == emptied


TestReusingIndex = ReusingMachine.TestCase
TestReusingIndex.settings = settings(max_examples=200, stateful_step_count=60)


# ------------------------------------------------------------------------------------------------------- by example


def make(max_pages: int = 100) -> PoolIndex:
    return PoolIndex("pool", table(max_pages), SLOTS_PER_SEGMENT, MAX_DOMAINS)


def test_a_table_that_is_full_takes_nothing_of_a_content() -> None:
    index = make(max_pages=2)
    index.join("a")
    root = b"r" * 32
    with pytest.raises(TableFull):
        index.add(root, 3 * PAGE, None, b"".join(map(fingerprint, (1, 2, 3))))
    assert index.find(root) is None
    assert list(index.all_contents()) == []
    assert index.table.totals().pages == 0
    index.add(None, 2 * PAGE, u32s([0, 1]), b"".join(map(fingerprint, (1, 2))))


def test_allocations_stay_inside_one_segment() -> None:
    index = make()
    assert [index.allocate(n) for n in (3, 2, 2, 1, 4)] == [0, 4, 6, 8, 12]
    for count in (0, SLOTS_PER_SEGMENT + 1):
        with pytest.raises(ValueError, match="do not fit"):
            index.allocate(count)


def test_a_run_ends_where_its_segment_does() -> None:
    index = make()
    index.join("a")
    content = index.add(b"r" * 32, 6 * PAGE, None, b"".join(map(fingerprint, range(1, 7))))
    index.claim("a", 1, b"/f", content)
    index.publish(content.ids, u32s(range(1, 7)))
    assert index.grantable("a", 1) == u32s((0, 1, 3, 3, 4, 3))


def test_only_the_last_allocation_can_be_taken_back() -> None:
    index = make()
    first, second = index.allocate(2), index.allocate(1)
    index.retract(first, 2)
    assert index.next_slot == 3
    index.retract(second, 1)
    assert index.next_slot == 2


def test_a_grant_has_as_many_runs_as_a_message_can_carry() -> None:
    pages = 2 * (MAX_GRANT_RUNS + 1)
    index = PoolIndex("pool", table(pages), pages, MAX_DOMAINS)
    index.join("a")
    fps = b"".join(n.to_bytes(32, "little") for n in range(1, pages // 2 + 1))
    # Every other page of the file: no two runs can be one.
    content = index.add(None, pages * PAGE, u32s(range(0, pages, 2)), fps)
    index.claim("a", 1, b"/f", content)
    index.publish(content.ids, u32s(range(pages // 2)))
    runs = index.grantable("a", 1)
    assert len(runs) == 12 * MAX_GRANT_RUNS
    assert ints(runs)[-3:] == [2 * (MAX_GRANT_RUNS - 1), MAX_GRANT_RUNS - 1, 1]


def test_a_page_that_a_crash_left_in_two_slots_stays_in_the_later_one() -> None:
    runs = u32s((0, 0, 1))
    owner = OwnerSet("pool", "a", bytes(16), 1, runs)
    segments = {0: (7, 0), 1: (7, 1)}
    slots = {0: fingerprint(1) + fingerprint(2), 4: fingerprint(1) + fingerprint(2)}
    index = make()
    # Slot 0 is mapped still; nobody can reach slot 1 any more.
    changes, _ = index.restore(PoolRecord(bytes(16), SLOTS_PER_SEGMENT, segments, slots, {("a", 1): owner}))
    assert changes == [SlotsFreed("pool", u32s([1]))]
    assert [ints(index.live(segment)[0]) for segment in (0, 1)] == [[], [4, 5]]
    assert index.release("a", [1]) == [OwnerCleared("pool", "a", 1), SlotsFreed("pool", u32s([0]))]
    assert index.settle() == [SlotsFreed("pool", u32s([4, 5]))]


def test_what_is_freed_in_a_segment_that_is_emptied_waits_until_it_is_filled_again() -> None:
    index = PoolIndex("pool", table(), SLOTS_PER_SEGMENT, MAX_DOMAINS, reuse=True)
    for segment in range(2):
        index.opened(segment, 3, segment)
        assert index.allocate(SLOTS_PER_SEGMENT) == segment * SLOTS_PER_SEGMENT
    index.reusable(u32s([1, 5]))
    index.empty(0)
    index.reusable(u32s([2, 3, 6]))
    assert (list(index.free), list(index.withheld)) == ([(5, 2)], [(1, 3)])
    assert index.allocate(2) == 5
    assert index.allocate(1) == 8
    index.fill_again()
    assert index.allocate(3) == 1


def test_a_closed_segment_takes_its_free_slots_along() -> None:
    index = PoolIndex("pool", table(), SLOTS_PER_SEGMENT, MAX_DOMAINS, reuse=True)
    for segment in range(3):
        index.opened(segment, 3, segment)
        index.allocate(SLOTS_PER_SEGMENT)
    index.reusable(u32s([0, 1, 4, 5]))
    index.empty(0)
    assert [index.close_segment(0), index.close_segment(1)] == [SegmentClosed("pool", 0), SegmentClosed("pool", 1)]
    index.reusable(u32s([2, 6]))
    index.fill_again()
    assert list(index.free) == []
    assert index.allocate(1) == 12

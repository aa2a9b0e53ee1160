"""The fingerprint table of one pool: what it can do (`PageTable`), and the slow twin that defines it.

A table knows which pages a pool has, how often they are referenced, who holds them, which slot has them and how often a
slot is mapped. `ReferencePageTable` says in dicts and lists what each operation means; native/table.c does the same at
speed, and tests/test_pagetable.py holds the two together. Who may share, which slot is chosen and what to tell a domain
is decided elsewhere (policy, engine); nothing here does I/O.

Words used below. A page is *known* while it has references or is pending; page 0, the zero page, is always known.
A slot is *taken* while a page uses it or it is mapped; it is *freed*, and reported so exactly once, when it stops
being taken.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Protocol

from sharearea.common.errors import Closed, TableFull

ZERO_PAGE = 0
"""Id of the zero page: without references, holders or a slot, never wanted, never published."""

NO_SLOT = 0xFFFFFFFF
"""Stands where a slot number would, for a page that is in no slot. No slot has this number."""

MAX_REFERENCES = (1 << 30) - 1
"""Most references that one page can have; the native table keeps them in 30 bits."""

MAX_MAPPINGS = 0xFFFFFFFE
"""Most mappings that one slot can have."""

SHARE_PAGE = 1 << 24
"""What a page costs when nobody else maps its slot, in the unit of `share`. SA_SHARE_PAGE of native/api.h."""

_FP_SIZE = 32
_SIZE_LIMIT = 1 << 64


class TotalsLike(Protocol):
    """What `PageTable.totals` returns: the fields of `Totals`, read only.

    The agent carries the native facade too, which therefore cannot import `Totals` and has a type of its own.
    """

    @property
    def pages(self) -> int:
        """Distinct pages known, the zero page left out."""
        ...

    @property
    def slots_used(self) -> int:
        """Slots that a page uses."""
        ...

    @property
    def slots_mapped(self) -> int:
        """Distinct slots with at least one mapping."""
        ...

    @property
    def mappings(self) -> int:
        """Sum of the mappings of all slots."""
        ...

    @property
    def pending(self) -> int:
        """Pages wanted and not yet published."""
        ...

    @property
    def memory_bytes(self) -> int:
        """What the table has allocated; 0 in the twin."""
        ...

    @property
    def by_holders(self) -> tuple[int, int, int, int, int, int, int, int]:
        """Slots used, by the number of holders of their page: 0, 1, 2, 3, 4-7, 8-15, 16-31, 32 and more."""
        ...

    @property
    def by_mappings(self) -> tuple[int, int, int, int, int, int, int]:
        """Slots mapped, by the number of their mappings: 1, 2, 3, 4-7, 8-15, 16-31, 32 and more."""
        ...


class CensusLike(Protocol):
    """What `PageTable.census` returns: the fields of `Census`, read only."""

    @property
    def common(self) -> int:
        """Pages that k holders or more have."""
        ...

    @property
    def copies(self) -> int:
        """Their holders, added up."""
        ...

    @property
    def end(self) -> int:
        """No page has an id from here on."""
        ...

    @property
    def held(self) -> bytes:
        """For each holder (packed uint64): pages that it holds."""
        ...

    @property
    def held_common(self) -> bytes:
        """For each holder: of these, pages that k holders or more have."""
        ...

    @property
    def share(self) -> bytes:
        """For each holder: SHARE_PAGE // holders of each of those, added up."""
        ...


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts over a whole table, as sa_table_totals gives them; `TotalsLike` says what each is."""

    pages: int
    slots_used: int
    slots_mapped: int
    mappings: int
    pending: int
    memory_bytes: int
    by_holders: tuple[int, int, int, int, int, int, int, int]
    by_mappings: tuple[int, int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Census:
    """Counts over a stretch of pages, as sa_table_census gives them; `CensusLike` says what each is."""

    common: int
    copies: int
    end: int
    held: bytes
    held_common: bytes
    share: bytes


class PageTable(Protocol):
    """The fingerprint table of one pool.

    Arrays go in and out as packed little-endian uint32 in bytes; fingerprints as 32 bytes each; runs as triples
    (page, slot, count) of uint32. Pages have dense ids: the one that was recycled last is given out first, and where
    none is left to recycle, the lowest that was never used.

    A bad argument (an id of a page that is not known, a number out of its range, an array of a broken length) raises
    ValueError; a table that is full, TableFull; a closed one, Closed. Nothing has changed then. Arrays may be empty.
    """

    def intern(self, fps: bytes) -> bytes:
        """Find or add fingerprints, one reference for each occurrence, and return their ids.

        TableFull if the table would get more than max_pages pages or one page more than MAX_REFERENCES references.
        """
        ...

    def unref(self, ids: bytes) -> bytes:
        """Give back one reference for each occurrence, and return the slots that this freed.

        A page without references loses its holders and its slot, and is recycled unless it is pending. Pages are
        handled in the order in which they lose their last reference. ValueError if a page has too few references.
        """
        ...

    def mark(self, ids: bytes, holder: int) -> None:
        """Make `holder` a holder of pages that have references; the zero page is passed over."""
        ...

    def unmark(self, ids: bytes, holder: int) -> None:
        """Make `holder` no longer a holder of pages that have references; the zero page is passed over."""
        ...

    def forget(self, holder: int) -> None:
        """Make `holder` no longer a holder of any page. Takes time linear in the pages known."""
        ...

    def want(self, ids: bytes, k: int) -> bytes:
        """Make pages pending that lack a slot and have at least `k` holders, and return their positions in `ids`.

        Positions ascend; a page that occurs several times is wanted where it occurs first. The zero page, pages in a
        slot and pages already pending are not wanted.
        """
        ...

    def unwant(self, ids: bytes) -> None:
        """Make pages no longer pending; those without references are recycled, in the order of `ids`."""
        ...

    def publish(self, ids: bytes, slots: bytes) -> bytes:
        """Put page ids[i] into slots[i], pending or not, and return the slots that this freed.

        In the order of the arrays: a page that was in a slot leaves it (a page given twice ends up in the later slot).
        A page that has no references takes no slot: the slot that was meant for it is reported as freed, and the page
        is recycled. ValueError for the zero page, for NO_SLOT, for a slot that is taken before the call, even by a
        page that would leave it, and for a slot given twice.
        """
        ...

    def fps(self, ids: bytes) -> bytes:
        """Return the fingerprints of pages."""
        ...

    def slots(self, ids: bytes) -> bytes:
        """Return the slots of pages, NO_SLOT for those that have none."""
        ...

    def count(self, ids: bytes) -> tuple[int, int, int]:
        """Count occurrences: of the zero page, of pages in a slot, of non-zero pages that occurred before in `ids`."""
        ...

    def runs(self, ids: bytes, pages: bytes | None, slots_per_segment: int) -> bytes:
        """Return runs (page, slot, count) over those of the pages that are in a slot.

        pages[i] is the page number of ids[i] in its file; None: it is i. A run is made longer while both the page
        number and the slot follow the run's last and the slot does not begin a new segment.
        """
        ...

    def map(self, runs: bytes) -> None:
        """Count one more mapping of every slot in the runs.

        The page field of a run means nothing here. ValueError for a slot that never was in use, or that has
        MAX_MAPPINGS already.
        """
        ...

    def unmap(self, runs: bytes) -> bytes:
        """Count one mapping less of every slot in the runs, and return the slots that this freed, in that order.

        ValueError if a slot has too few mappings.
        """
        ...

    def share(self, runs: bytes) -> int:
        """Return what one mapping of every slot in the runs pays: SHARE_PAGE // mappings for each slot, added up.

        Where a slot is mapped n times, each of the n pays the same, a domain that maps it through two files twice as
        much: it had two copies. Over all runs that are mapped, each slot is paid once (less than a SHARE_PAGE-th for
        each mapping is lost). ValueError for a slot that never was in use, or that has no mapping.
        """
        ...

    def live(self, first: int, n: int) -> tuple[bytes, bytes, int]:
        """Return the used ones of slots [first, first + n), their pages' ids, and the mappings of the whole range.

        Slots ascend. Mappings of slots that no page uses count too. The range may reach past the last slot.
        """
        ...

    def totals(self) -> TotalsLike:
        """Return counts over the whole table. Costs nothing: they are kept up to date."""
        ...

    def census(self, first: int, n: int, k: int) -> CensusLike:
        """Count pages with ids in [first, first + n): what k holders have, and what each holder has of them.

        The zero page is left out. Takes time linear in the pages (about 10 ms for a million).
        """
        ...

    def close(self) -> None:
        """Free the table. Closing twice is fine."""
        ...


@dataclass(slots=True)
class _Page:
    fp: bytes
    refs: int = 0
    pending: bool = False
    slot: int = NO_SLOT
    holders: set[int] = field(default_factory=set)


class ReferencePageTable:
    """The definition of `PageTable`: plain, slow, and without bounds of memory.

    Takes what the native table takes. `seed` is ignored: no result depends on it.
    """

    def __init__(self, seed: bytes, zero_fp: bytes, max_holders: int, max_pages: int) -> None:
        if len(seed) != 40 or len(zero_fp) != _FP_SIZE:
            raise ValueError("a seed has 40 bytes, a fingerprint 32")
        if not 1 <= max_holders < 1 << 32 or not 1 <= max_pages < NO_SLOT:
            raise ValueError("max_holders or max_pages out of range")
        self._max_holders = max_holders
        self._max_pages = max_pages
        self._pages = {ZERO_PAGE: _Page(zero_fp)}  # the known ones
        self._ids = {zero_fp: ZERO_PAGE}
        self._recycled: list[int] = []
        self._next_id = 1
        self._page_in: dict[int, int] = {}  # slot -> id of the page that uses it
        self._mappings: Counter[int] = Counter()  # slot -> mappings, without zeros
        self._ever_used: set[int] = set()  # slots
        self._closed = False

    def intern(self, fps: bytes) -> bytes:
        """Find or add fingerprints."""
        self._check_open()
        if len(fps) % _FP_SIZE:
            raise ValueError("fingerprints have 32 bytes each")
        wanted = [fps[at : at + _FP_SIZE] for at in range(0, len(fps), _FP_SIZE)]
        occurrences = Counter(wanted)
        new = [fp for fp in occurrences if fp not in self._ids]
        if len(self._pages) - 1 + len(new) > self._max_pages:
            raise TableFull("the fingerprint table has no room for so many pages")
        for fp, more in occurrences.items():
            id_ = self._ids.get(fp)
            refs = self._pages[id_].refs if id_ is not None else 0
            if id_ != ZERO_PAGE and refs + more > MAX_REFERENCES:
                raise TableFull("a page of the fingerprint table has no room for so many references")
        ids = []
        for fp in wanted:
            if fp not in self._ids:
                self._add(fp)
            id_ = self._ids[fp]
            if id_ != ZERO_PAGE:
                self._pages[id_].refs += 1
            ids.append(id_)
        return _pack(ids)

    def unref(self, ids: bytes) -> bytes:
        """Give back references."""
        wanted = [id_ for id_ in self._known(ids) if id_ != ZERO_PAGE]
        if any(self._pages[id_].refs < fewer for id_, fewer in Counter(wanted).items()):
            raise ValueError("more references given back than there are")
        freed: list[int] = []
        for id_ in wanted:
            page = self._pages[id_]
            page.refs -= 1
            if page.refs == 0:
                page.holders.clear()
                self._leave_slot(page, freed)
                if not page.pending:
                    self._recycle(id_)
        return _pack(freed)

    def mark(self, ids: bytes, holder: int) -> None:
        """Add a holder."""
        for page in self._referenced(ids, holder):
            page.holders.add(holder)

    def unmark(self, ids: bytes, holder: int) -> None:
        """Remove a holder."""
        for page in self._referenced(ids, holder):
            page.holders.discard(holder)

    def forget(self, holder: int) -> None:
        """Remove a holder everywhere."""
        self._check_open()
        self._check_holder(holder)
        for page in self._pages.values():
            page.holders.discard(holder)

    def want(self, ids: bytes, k: int) -> bytes:
        """Make pages pending."""
        wanted = self._known(ids)
        _check_u32(k)
        positions = []
        for position, id_ in enumerate(wanted):
            page = self._pages[id_]
            if id_ != ZERO_PAGE and page.slot == NO_SLOT and not page.pending and len(page.holders) >= k:
                page.pending = True
                positions.append(position)
        return _pack(positions)

    def unwant(self, ids: bytes) -> None:
        """Make pages no longer pending."""
        for id_ in dict.fromkeys(self._known(ids)):
            page = self._pages[id_]
            if page.pending:
                page.pending = False
                if page.refs == 0:
                    self._recycle(id_)

    def publish(self, ids: bytes, slots: bytes) -> bytes:
        """Put pages into slots."""
        wanted = self._known(ids)
        targets = _unpack(slots)
        if len(wanted) != len(targets):
            raise ValueError("as many slots as pages")
        if ZERO_PAGE in wanted or NO_SLOT in targets:
            raise ValueError("the zero page has no slot")
        if len(set(targets)) < len(targets) or any(slot in self._page_in or slot in self._mappings for slot in targets):
            raise ValueError("a slot is taken")
        freed: list[int] = []
        unreferenced = [id_ for id_ in dict.fromkeys(wanted) if self._pages[id_].refs == 0]
        for id_, slot in zip(wanted, targets, strict=True):
            page = self._pages[id_]
            page.pending = False
            if page.refs == 0:
                freed.append(slot)
                continue
            self._leave_slot(page, freed)
            page.slot = slot
            self._page_in[slot] = id_
            self._ever_used.add(slot)
        for id_ in unreferenced:
            self._recycle(id_)
        return _pack(freed)

    def fps(self, ids: bytes) -> bytes:
        """Return the fingerprints of pages."""
        return b"".join(self._pages[id_].fp for id_ in self._known(ids))

    def slots(self, ids: bytes) -> bytes:
        """Return the slots of pages."""
        return _pack(self._pages[id_].slot for id_ in self._known(ids))

    def count(self, ids: bytes) -> tuple[int, int, int]:
        """Count zero pages, pages in a slot, repeated pages."""
        wanted = self._known(ids)
        nonzero = [id_ for id_ in wanted if id_ != ZERO_PAGE]
        in_slot = sum(self._pages[id_].slot != NO_SLOT for id_ in nonzero)
        return len(wanted) - len(nonzero), in_slot, len(nonzero) - len(set(nonzero))

    def runs(self, ids: bytes, pages: bytes | None, slots_per_segment: int) -> bytes:
        """Return runs over the pages that are in slots."""
        wanted = self._known(ids)
        numbers: Sequence[int] = range(len(wanted)) if pages is None else _unpack(pages)
        if len(numbers) != len(wanted):
            raise ValueError("as many page numbers as pages")
        _check_u32(slots_per_segment)
        if slots_per_segment == 0:
            raise ValueError("a segment has slots")
        runs: list[tuple[int, int, int]] = []
        for id_, number in zip(wanted, numbers, strict=True):
            slot = self._pages[id_].slot
            if slot == NO_SLOT:
                continue
            if runs and slot % slots_per_segment:
                first, first_slot, count = runs[-1]
                if number == first + count and slot == first_slot + count:
                    runs[-1] = (first, first_slot, count + 1)
                    continue
            runs.append((number, slot, 1))
        return _pack(value for run in runs for value in run)

    def map(self, runs: bytes) -> None:
        """Add a mapping of every slot in the runs."""
        self._check_open()
        more = Counter(_slots_of(runs, self._ever_used))
        if any(self._mappings[slot] + by > MAX_MAPPINGS for slot, by in more.items()):
            raise ValueError("a slot has no room for so many mappings")
        self._mappings.update(more)

    def unmap(self, runs: bytes) -> bytes:
        """Remove a mapping of every slot in the runs."""
        self._check_open()
        slots = _slots_of(runs, self._ever_used)
        if any(self._mappings[slot] < fewer for slot, fewer in Counter(slots).items()):
            raise ValueError("a slot has no mapping")
        freed = []
        for slot in slots:
            self._mappings[slot] -= 1
            if self._mappings[slot] == 0:
                del self._mappings[slot]
                if slot not in self._page_in:
                    freed.append(slot)
        return _pack(freed)

    def share(self, runs: bytes) -> int:
        """Return what a mapping of every slot in the runs pays."""
        self._check_open()
        slots = _slots_of(runs, self._ever_used)
        if any(self._mappings[slot] == 0 for slot in slots):
            raise ValueError("a slot has no mapping")
        return sum(SHARE_PAGE // self._mappings[slot] for slot in slots)

    def live(self, first: int, n: int) -> tuple[bytes, bytes, int]:
        """Return the used slots of a range, their pages, and the range's mappings."""
        self._check_open()
        _check_u32(first)
        if not 0 <= n < _SIZE_LIMIT:
            raise ValueError("a number of slots out of range")
        used = sorted(slot for slot in self._page_in if first <= slot < first + n)
        mapped = sum(by for slot, by in self._mappings.items() if first <= slot < first + n)
        return _pack(used), _pack(self._page_in[slot] for slot in used), mapped

    def totals(self) -> Totals:
        """Return counts over the whole table."""
        self._check_open()
        holders = [len(self._pages[id_].holders) for id_ in self._page_in.values()]

        def used(least: int, most: int | None = None) -> int:
            return sum(least <= n and (most is None or n <= most) for n in holders)

        def mapped(least: int, most: int | None = None) -> int:
            return sum(least <= n and (most is None or n <= most) for n in self._mappings.values())

        return Totals(
            pages=len(self._pages) - 1,
            slots_used=len(self._page_in),
            slots_mapped=len(self._mappings),
            mappings=self._mappings.total(),
            pending=sum(page.pending for page in self._pages.values()),
            memory_bytes=0,
            by_holders=(
                used(0, 0),
                used(1, 1),
                used(2, 2),
                used(3, 3),
                used(4, 7),
                used(8, 15),
                used(16, 31),
                used(32),
            ),
            by_mappings=(
                mapped(1, 1),
                mapped(2, 2),
                mapped(3, 3),
                mapped(4, 7),
                mapped(8, 15),
                mapped(16, 31),
                mapped(32),
            ),
        )

    def census(self, first: int, n: int, k: int) -> Census:
        """Count pages of a stretch by holders."""
        self._check_open()
        _check_u32(first)
        _check_u32(k)
        if not 0 <= n < _SIZE_LIMIT:
            raise ValueError("a number of pages out of range")
        held, held_common, share = ([0] * self._max_holders for _ in range(3))
        common = copies = 0
        for id_ in range(max(first, 1), min(first + n, self._next_id)):
            holders = self._pages[id_].holders if id_ in self._pages else set()
            for holder in holders:
                held[holder] += 1
            if holders and len(holders) >= k:
                common += 1
                copies += len(holders)
                for holder in holders:
                    held_common[holder] += 1
                    share[holder] += SHARE_PAGE // len(holders)
        columns = (array("Q", column).tobytes() for column in (held, held_common, share))
        return Census(common, copies, self._next_id, *columns)

    def close(self) -> None:
        """Make every later call raise Closed."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("the page table is closed")

    def _check_holder(self, holder: int) -> None:
        if not 0 <= holder < self._max_holders:
            raise ValueError("no such holder")

    def _known(self, ids: bytes) -> list[int]:
        self._check_open()
        wanted = _unpack(ids)
        if any(id_ not in self._pages for id_ in wanted):
            raise ValueError("no such page")
        return wanted

    def _referenced(self, ids: bytes, holder: int) -> list[_Page]:
        pages = [self._pages[id_] for id_ in self._known(ids) if id_ != ZERO_PAGE]
        self._check_holder(holder)
        if any(page.refs == 0 for page in pages):
            raise ValueError("a page without references has no holders")
        return pages

    def _add(self, fp: bytes) -> None:
        if self._recycled:
            id_ = self._recycled.pop()
        else:
            id_ = self._next_id
            self._next_id += 1
        self._pages[id_] = _Page(fp)
        self._ids[fp] = id_

    def _recycle(self, id_: int) -> None:
        del self._ids[self._pages.pop(id_).fp]
        self._recycled.append(id_)

    def _leave_slot(self, page: _Page, freed: list[int]) -> None:
        if page.slot == NO_SLOT:
            return
        del self._page_in[page.slot]
        if page.slot not in self._mappings:
            freed.append(page.slot)
        page.slot = NO_SLOT


_U32 = Struct("<I")


def _pack(values: Iterable[int]) -> bytes:
    return b"".join(_U32.pack(value) for value in values)


def _unpack(packed: bytes) -> list[int]:
    if len(packed) % _U32.size:
        raise ValueError("uint32 have 4 bytes each")
    return [value for (value,) in _U32.iter_unpack(packed)]


def _check_u32(value: int) -> None:
    if not 0 <= value < 1 << 32:
        raise ValueError("not a uint32")


def _slots_of(runs: bytes, ever_used: set[int]) -> list[int]:
    """The slots of runs, one by one, in order; ValueError at the first that never was in use."""
    values = _unpack(runs)
    if len(values) % 3:
        raise ValueError("a run has three uint32")
    slots = []
    for first, count in zip(values[1::3], values[2::3], strict=True):
        for slot in range(first, first + count):
            if slot not in ever_used:
                raise ValueError("a slot never was in use")
            slots.append(slot)
    return slots

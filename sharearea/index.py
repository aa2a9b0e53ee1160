"""Who shares what in one pool: contents, their holders, the slots that have their pages, and the owners of grants.

Pure. Per-page state lives in a PageTable (native in production, a plain twin in tests); this module keeps one object
per file and per content, never one per page. Every method that changes what a restarted broker must know returns that
as Changes, for the store; the caller writes them in the order of design section 3 (owner before handle).

Words: a content is what a file holds, named by its root; a domain holds a content while one of its files has it; an
owner is a domain with grants for one of its files.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

from .common import wire
from .grants import NO_SLOT, Ranges, gather, known, slots_of, stretches
from .model import (
    Change,
    DomainId,
    FileId,
    OwnerCleared,
    OwnerSet,
    PoolId,
    PoolRecord,
    SegmentClosed,
    SegmentOpened,
    SlotNumber,
    SlotsFilled,
    SlotsFreed,
)
from .pagetable import PageTable

_ID = 4  # bytes of an id, a slot, a page number in a packed column
_RUN = 12


@dataclass(slots=True, eq=False)
class Content:
    """One whole content (root given) or the resident part of one file (root None): its pages' ids in file order."""

    root: bytes | None
    size: int
    ids: bytes
    pages: bytes | None  # page numbers; None: 0, 1, 2, ...
    classes: bytes = wire.NO_CLASSES  # as in wire.Roots
    nonzero_pages: int = 0
    text_pages: int = 0  # of the reported ones
    rodata_pages: int = 0
    holders: dict[DomainId, set[FileId]] = field(default_factory=dict)
    unread: dict[DomainId, set[FileId]] = field(
        default_factory=dict
    )  # files that their domain has nothing of in memory
    available: int = 0  # pages in slots when last counted
    counted_at: int = -1  # PoolIndex.changed at that time
    offered: int = 0  # pages available when all holders were last told
    publishing: int = 0  # fetches under way

    @property
    def reported(self) -> bool:
        """Return whether a file of some domain is known to have this content, in memory or not."""
        return bool(self.holders or self.unread)

    @property
    def page_count(self) -> int:
        """Return the number of reported pages."""
        return len(self.ids) // _ID

    def page_number(self, position: int) -> int:
        """Return the page number in the file of the page at a position."""
        if self.pages is None:
            return position
        return int.from_bytes(self.pages[position * _ID : position * _ID + _ID], "little")


@dataclass(slots=True, eq=False)
class HeldFile:
    """A file of a domain and the content it was reported with; `resident`: the domain has pages of it in memory."""

    path: bytes
    size: int
    content: Content
    resident: bool = True


@dataclass(slots=True, eq=False)
class Holdings:
    """What one domain holds. `number` is its bit in the page table."""

    number: int
    files: dict[FileId, HeldFile] = field(default_factory=dict)
    size_bytes: int = 0
    pages: int = 0  # reported ones, over all files
    nonzero_pages: int = 0
    text_pages: int = 0
    rodata_pages: int = 0

    def count(self, file: HeldFile, by: int) -> None:
        """Count a file in (1) or out (-1). Of one that is not in memory only the size counts, for the quota."""
        content = file.content
        self.size_bytes += by * content.size
        if not file.resident:
            return
        self.pages += by * content.page_count
        self.nonzero_pages += by * content.nonzero_pages
        self.text_pages += by * content.text_pages
        self.rodata_pages += by * content.rodata_pages


@dataclass(slots=True, eq=False)
class Mapped:
    """Pages that one domain may map, over all files, by class; `unclassified`: of files that are not reported (yet)."""

    pages: int = 0
    text: int = 0
    rodata: int = 0
    unclassified: int = 0

    def count(self, owner: Owner, by: int) -> None:
        """Count an owner in (1) or out (-1)."""
        pages = owner.page_count
        self.pages += by * pages
        if owner.classified is None:
            self.unclassified += by * pages
        else:
            self.text += by * owner.classified[0]
            self.rodata += by * owner.classified[1]


@dataclass(frozen=True, slots=True)
class Owner:
    """Grants in force: one file of one domain. `domid` and `refs` as in OwnerSet, for the `xen` backend.

    `classified`: pages of executable text and of read-only data; None where the file is not reported.
    """

    instance: bytes
    runs: bytes
    domid: int = 0
    refs: bytes = b""
    classified: tuple[int, int] | None = None

    @property
    def page_count(self) -> int:
        """Return how many pages the runs map."""
        return sum(array("I", self.runs)[2::3])


class PoolIndex:
    """The index of one pool. `reuse`: whether a slot that nobody can reach any more may take another page."""

    def __init__(
        self, pool: PoolId, table: PageTable, slots_per_segment: int, max_domains: int, *, reuse: bool = False
    ) -> None:
        self.pool = pool
        self.table = table
        self.slots_per_segment = slots_per_segment
        self.contents: dict[bytes, Content] = {}
        self.partial: dict[Content, None] = {}  # in the order in which they came, so that a run can be repeated
        self.domains: dict[DomainId, Holdings] = {}
        self.owners: dict[tuple[DomainId, FileId], Owner] = {}
        self.segments: dict[int, tuple[int, int]] = {}
        self.next_slot: SlotNumber = 0
        self.reuse = reuse
        self.free = Ranges(within=slots_per_segment)  # slots that may be filled again
        self.emptying: set[int] = set()  # segments that take no more pages
        self.withheld = Ranges()  # slots of those that could be filled again
        self.changed = 0  # grows whenever slots are published or freed
        self.leaving: dict[DomainId, None] = {}
        self._owned: dict[DomainId, dict[FileId, None]] = {}  # the keys of `owners`, by domain
        self.mapped: dict[DomainId, Mapped] = {}
        self._numbers = list(range(max_domains - 1, -1, -1))
        self._restored = b""

    # ---------------------------------------------------------------------------------------- domains and contents

    def join(self, domain: DomainId) -> Holdings | None:
        """Return the new holdings of a domain, or None when the pool has as many domains as it may."""
        if not self._numbers:
            return None
        holdings = Holdings(self._numbers.pop())
        self.domains[domain] = holdings
        return holdings

    def leave(self, domain: DomainId) -> None:
        """Take a domain's marks off all pages. Its files go with `drain`; its grants stay until they are released."""
        self.table.forget(self.domains[domain].number)
        self.leaving[domain] = None

    def drain(self, domain: DomainId, most: int) -> list[Change]:
        """Forget up to `most` files of a domain that leaves. After the last one it is gone and may join again."""
        holdings = self.domains[domain]
        changes = self.drop(domain, list(islice(holdings.files, most)))
        if not holdings.files:
            del self.domains[domain], self.leaving[domain]
            self._numbers.append(holdings.number)
        return changes

    def find(self, root: bytes) -> Content | None:
        """Look up a content by its root: one look-up, however large the file."""
        return self.contents.get(root)

    def add(
        self,
        root: bytes | None,
        size: int,
        pages: bytes | None,
        fingerprints: bytes,
        classes: bytes = wire.NO_CLASSES,
    ) -> Content:
        """Take up a content. Raises TableFull, with nothing taken. The caller claims it at once."""
        content = Content(root, size, self.table.intern(fingerprints), pages, classes)
        content.nonzero_pages = content.page_count - self.table.count(content.ids)[0]
        if classes != wire.NO_CLASSES:
            numbers = array("I", pages) if pages is not None else range(content.page_count)
            content.text_pages, content.rodata_pages = _classified(classes, lambda page: bisect_left(numbers, page))
        if root is None:
            self.partial[content] = None
        else:
            self.contents[root] = content
        return content

    def claim(self, domain: DomainId, file: FileId, path: bytes, content: Content, *, resident: bool = True) -> None:
        """Record that a file of the domain has this content. The file must not be held already.

        One that is not `resident` gets offers and grants as any other, and is no copy: it makes its domain no holder.
        """
        holdings = self.domains[domain]
        if file in holdings.files:
            raise ValueError(f"file {file} is held already")
        held = holdings.files[file] = HeldFile(path, content.size, content, resident)
        holdings.count(held, 1)
        owner = self.owners.get((domain, file))
        if owner is not None and owner.classified is None:  # of an earlier broker
            self._remove_owner(domain, file)
            self._add_owner(domain, file, replace(owner, classified=class_pages(owner.runs, content.classes)))
        if resident:
            self._hold(domain, file, content)
        else:
            content.unread.setdefault(domain, set()).add(file)

    def promote(self, domain: DomainId, file: FileId) -> Content:
        """Take note that a domain has a file in memory now that was not resident when it was reported."""
        holdings = self.domains[domain]
        held = holdings.files[file]
        content = held.content
        content.unread[domain].discard(file)
        if not content.unread[domain]:
            del content.unread[domain]
        holdings.count(held, -1)
        held.resident = True
        holdings.count(held, 1)
        self._hold(domain, file, content)
        return content

    def _hold(self, domain: DomainId, file: FileId, content: Content) -> None:
        files = content.holders.get(domain)
        if files is None:
            content.holders[domain] = {file}
            self.table.mark(content.ids, self.domains[domain].number)
        else:
            files.add(file)

    def drop(self, domain: DomainId, files: Iterable[FileId]) -> list[Change]:
        """Forget reported files; unknown numbers are passed over. Contents that nobody holds free their slots.

        The domain's mark is taken off every page of the dropped contents, also where another content of the domain has
        the same page: too few marks publish too late, too many would break k. `remark` puts them back.
        """
        holdings = self.domains[domain]
        freed = bytearray()
        for file in files:
            held = holdings.files.pop(file, None)
            if held is None:
                continue
            content = held.content
            holdings.count(held, -1)
            having = content.holders if held.resident else content.unread
            having[domain].discard(file)
            if having[domain]:
                continue
            del having[domain]
            if held.resident:
                self.table.unmark(content.ids, holdings.number)
            if not content.reported:
                if content.root is None:
                    del self.partial[content]
                else:
                    del self.contents[content.root]
                freed += self.table.unref(content.ids)
        return self._freed(bytes(freed))

    def remark(self, domain: DomainId, contents: Iterable[Content]) -> None:
        """Set the domain's mark again on the pages of contents that it still holds."""
        holdings = self.domains.get(domain)
        if holdings is not None:
            for content in contents:
                if domain in content.holders:
                    self.table.mark(content.ids, holdings.number)

    def all_contents(self) -> Iterator[Content]:
        """Yield every content."""
        yield from self.contents.values()
        yield from self.partial

    def count_available(self, content: Content) -> int:
        """Return how many of a content's pages are in slots, counting only if something changed since last time."""
        if content.counted_at != self.changed:
            content.available = self.table.count(content.ids)[1]
            content.counted_at = self.changed
        return content.available

    # ---------------------------------------------------------------------------------------------------- publishing

    def ids_at(self, content: Content, positions: bytes) -> bytes:
        """Return the ids of a content's pages at these (ascending) positions."""
        ids, at = array("I", content.ids), array("I", positions)
        if at and at[-1] - at[0] + 1 == len(at):
            return ids[at[0] : at[-1] + 1].tobytes()
        return array("I", [ids[i] for i in at]).tobytes()

    def allocate(self, count: int) -> SlotNumber:
        """Return the first of `count` neighbouring slots of one segment that nothing is in.

        Without `reuse` they are fresh, and what does not fit into a segment is skipped and stays unused.
        """
        if not 0 < count <= self.slots_per_segment:
            raise ValueError(f"{count} slots do not fit into a segment")
        if self.reuse:
            taken = self.free.take_stretch(count)
            if taken is not None:
                return taken
        room = self.slots_per_segment - self.next_slot % self.slots_per_segment
        first = self.next_slot if count <= room else self.next_slot + room
        if self.reuse and first > self.next_slot:
            self._add_free([(self.next_slot, first - self.next_slot)])
        self.next_slot = first + count
        return first

    def room_beside(self, segment: int) -> int:
        """Return how many slots pages could go to without another segment, those of this one left out."""
        per_segment = self.slots_per_segment
        own = sum(count for _, count in self.free.inside(segment * per_segment, (segment + 1) * per_segment))
        return self.free.count - own + self._room_behind()

    def _room_behind(self) -> int:
        """Return how many slots of an open segment nothing was ever in."""
        return -self.next_slot % self.slots_per_segment if self.current_segment() in self.segments else 0

    def allocate_scattered(self, count: int, most: int) -> list[tuple[SlotNumber, int]]:
        """Return up to `count` slots of open segments as (first, count): one stretch, else up to `most` of them."""
        first = self.free.take_stretch(count)
        if first is not None:
            return [(first, count)]
        found = self.free.take_some(count, most)
        behind = min(count, self._room_behind())
        if not found and behind:
            found = [(self.next_slot, behind)]
            self.next_slot += behind
        return found

    def _add_free(self, found: list[tuple[SlotNumber, int]]) -> None:
        """Take slots that may be filled again, unless their segment is gone or takes no more pages."""
        per_segment = self.slots_per_segment
        parts: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for first, count in found:
            end = first + count
            while first < end:
                segment = first // per_segment
                part = min(end, (segment + 1) * per_segment) - first
                if segment in self.segments:
                    parts[segment in self.emptying].append((first, part))
                first += part
        for ranges, part_of in zip((self.free, self.withheld), parts, strict=True):
            if part_of:
                ranges.add_all(part_of)

    def retract(self, first: SlotNumber, count: int) -> None:
        """Give back an allocation that was not used: without `reuse` only if it is still the last one."""
        if self.next_slot == first + count and first // self.slots_per_segment not in self.emptying:
            self.next_slot = first
        elif self.reuse:
            self._add_free([(first, count)])

    def reusable(self, slots: bytes) -> None:
        """Take note that the store knows: nothing is in these slots (packed) any more."""
        if self.reuse:
            self._add_free(list(stretches(array("I", slots))))

    def empty(self, segment: int) -> None:
        """Put no more pages into a segment, until `fill_again`."""
        if self.reuse and segment not in self.emptying:
            self.emptying.add(segment)
            low, high = segment * self.slots_per_segment, (segment + 1) * self.slots_per_segment
            self.withheld.add_all(self.free.inside(low, high))
            self.free.remove(low, self.slots_per_segment)

    def fill_again(self) -> None:
        """Put pages into all segments again: there is no room for new ones."""
        self.emptying.clear()
        if self.withheld.count:
            self.free.add_all(self.withheld)
            self.withheld = Ranges()

    def publish(self, ids: bytes, slots: bytes) -> list[Change]:
        """Put pages into slots whose bytes are checked and whose record is in the store."""
        self.changed += 1
        return self._freed(self.table.publish(ids, slots))

    def hold(self, ids: bytes) -> bytes:
        """Keep pages known until `let_go`, whoever drops them meanwhile; return their fingerprints."""
        fingerprints = self.table.fps(ids)
        self.table.intern(fingerprints)
        return fingerprints

    def let_go(self, ids: bytes) -> list[Change]:
        """End what `hold` began."""
        return self._freed(self.table.unref(ids))

    def opened(self, segment: int, dev: int, ino: int) -> Change:
        """Record a segment."""
        self.segments[segment] = (dev, ino)
        return SegmentOpened(self.pool, segment, dev, ino)

    def filled(self, first: SlotNumber, fingerprints: bytes) -> Change:
        """Return what the store must know before these slots are published."""
        return SlotsFilled(self.pool, first, fingerprints)

    # -------------------------------------------------------------------------------------------------------- grants

    def grantable(self, domain: DomainId, file: FileId) -> bytes:
        """Return the runs that a grant of this file would cover now; empty when there are none."""
        content = self.domains[domain].files[file].content
        return self.table.runs(content.ids, content.pages, self.slots_per_segment)[: wire.MAX_GRANT_RUNS * _RUN]

    def own(self, change: OwnerSet) -> None:
        """Make a domain owner of slots for one file that it owns nothing of yet. The store has the change already."""
        if (change.domain, change.file) in self.owners:
            raise ValueError(f"{change.domain} owns file {change.file} already")
        self.table.map(change.runs)
        holdings = self.domains.get(change.domain)
        held = holdings.files.get(change.file) if holdings is not None else None
        classified = class_pages(change.runs, held.content.classes) if held is not None else None
        owner = Owner(change.instance, change.runs, change.domid, change.refs, classified)
        self._add_owner(change.domain, change.file, owner)

    def _add_owner(self, domain: DomainId, file: FileId, owner: Owner) -> None:
        self.owners[domain, file] = owner
        self._owned.setdefault(domain, {})[file] = None
        self.mapped.setdefault(domain, Mapped()).count(owner, 1)

    def _remove_owner(self, domain: DomainId, file: FileId) -> Owner | None:
        owner = self.owners.pop((domain, file), None)
        if owner is not None:
            del self._owned[domain][file]
            self.mapped[domain].count(owner, -1)
            if not self._owned[domain]:
                del self._owned[domain], self.mapped[domain]
        return owner

    def release(self, domain: DomainId, files: Iterable[FileId]) -> list[Change]:
        """End the ownership of these files; those not owned are passed over."""
        changes: list[Change] = []
        freed = bytearray()
        for file in files:
            owner = self._remove_owner(domain, file)
            if owner is not None:
                freed += self.table.unmap(owner.runs)
                changes.append(OwnerCleared(self.pool, domain, file))
        return changes + self._freed(bytes(freed))

    def disown(self, domain: DomainId, file: FileId) -> tuple[Owner, Change] | None:
        """End an ownership whose slots stay mapped, for now, by grants in force; `unmap` ends that. None: no owner."""
        owner = self._remove_owner(domain, file)
        if owner is None:
            return None
        return owner, OwnerCleared(self.pool, domain, file)

    def unmap(self, slots: bytes) -> list[Change]:
        """Take one mapping off each of these slots (packed (first, count))."""
        return self._freed(self.table.unmap(_as_runs(slots)))

    def owned_by(self, domain: DomainId) -> list[FileId]:
        """Return the files that a domain has grants for."""
        return list(self._owned.get(domain, ()))

    # ------------------------------------------------------------------------------------------------------ segments

    def current_segment(self) -> int:
        """Return the segment that the next slot comes from; earlier ones are never written again."""
        return self.next_slot // self.slots_per_segment

    def live(self, segment: int) -> tuple[bytes, bytes, int]:
        """Return the slots of a segment that pages use, the pages' ids, and how many mappings the segment has."""
        return self.table.live(segment * self.slots_per_segment, self.slots_per_segment)

    def close_segment(self, segment: int) -> Change:
        """Forget a segment that has neither live nor mapped slots."""
        del self.segments[segment]
        self.emptying.discard(segment)
        self.free.remove(segment * self.slots_per_segment, self.slots_per_segment)
        self.withheld.remove(segment * self.slots_per_segment, self.slots_per_segment)
        return SegmentClosed(self.pool, segment)

    def owners_in(self, segment: int) -> dict[DomainId, list[FileId]]:
        """Return the files, by domain, whose grants have a slot in this segment."""
        found: dict[DomainId, list[FileId]] = {}
        low, high = segment * self.slots_per_segment, (segment + 1) * self.slots_per_segment
        for (domain, file), owner in self.owners.items():
            if any(low <= slot < high for slot in array("I", owner.runs)[1::3]):
                found.setdefault(domain, []).append(file)
        return found

    # ------------------------------------------------------------------------------------------------------- restart

    def restore(
        self, record: PoolRecord, lost: Collection[tuple[DomainId, FileId]] = (), reached: array[int] | None = None
    ) -> tuple[list[Change], array[int]]:
        """Start from what the store had, with every segment adopted. New slots come from a new segment.

        Restored pages are kept by a reference of their own until `settle`, so that they outlive the time in which the
        agents report again. A page that a crash left in two slots stays in the later one. Owners in `lost` are
        cleared. `reached`: slots that grants without an owner reach. Each counts as one mapping more, which `unmap`
        ends; it is returned with NO_SLOT in the place of those that no record has. With `reuse`, slots that no record
        has and nothing reaches may be filled.
        """
        self.segments.update(record.segments)
        used = Ranges()
        stretches_used: list[tuple[SlotNumber, int]] = []
        kept, left = bytearray(), bytearray()
        for first, fingerprints in sorted(record.slots.items()):
            for start, count in _used_stretches(fingerprints):
                stretches_used.append((first + start, count))
                ids = self.table.intern(fingerprints[start * 32 : (start + count) * 32])
                left += self.table.publish(ids, array("I", range(first + start, first + start + count)).tobytes())
                kept += ids
        used.add_all(stretches_used)
        counted = array("I", [slot if used.holds(slot, 1) else NO_SLOT for slot in reached or ()])
        changes: list[Change] = []
        for key, owner in record.owners.items():
            if key in lost:
                changes.append(OwnerCleared(self.pool, *key))
                continue
            self.table.map(owner.runs)
            self._add_owner(*key, Owner(owner.instance, owner.runs, owner.domid, owner.refs))
        if counted:
            self.table.map(_as_runs(gather(known(counted))))
        if record.segments:
            self.next_slot = (max(record.segments) + 1) * self.slots_per_segment
        if self.reuse:
            strays = Ranges()
            strays.add_all(stretches(array("I", sorted(set(reached or ()) - set(counted)))))
            self._add_free(used.gaps(0, self.next_slot))
            for first, count in strays:
                self.free.remove(first, count)
        self._restored = bytes(kept)
        self.changed += 1
        if left:
            mapped = {slot for owner in self.owners.values() for slot in slots_of(owner.runs)} | set(counted)
            changes += self._freed(array("I", [slot for slot in array("I", left) if slot not in mapped]).tobytes())
        return changes, counted

    def settle(self) -> list[Change]:
        """Let go of restored pages that nobody reported again."""
        ids, self._restored = self._restored, b""
        return self._freed(self.table.unref(ids)) if ids else []

    # ---------------------------------------------------------------------------------------------------------------

    def _freed(self, slots: bytes) -> list[Change]:
        if not slots:
            return []
        self.changed += 1
        return [SlotsFreed(self.pool, slots)]


def class_pages(runs: bytes, classes: bytes) -> tuple[int, int]:
    """Return how many pages of runs, which ascend, are executable text, and how many read-only data."""
    if classes == wire.NO_CLASSES:
        return 0, 0
    column = array("I", runs)
    firsts, counts = column[0::3], column[2::3]

    def before(page: int) -> int:
        at = bisect_left(firsts, page)
        whole = sum(counts[:at])
        return whole - max(0, firsts[at - 1] + counts[at - 1] - page) if at else 0

    return _classified(classes, before)


def _classified(classes: bytes, before: Callable[[int], int]) -> tuple[int, int]:
    """Count text and read-only data, by how many pages lie before a page."""
    text, texts, fixed, count = array("I", classes)

    def inside(first: int, end: int) -> int:
        return before(end) - before(first) if first < end else 0

    both = inside(max(text, fixed), min(text + texts, fixed + count))
    return inside(text, text + texts), inside(fixed, fixed + count) - both


def _as_runs(slots: bytes) -> bytes:
    """Return slots (packed (first, count)) as runs; the page number is of no account."""
    column = array("I", slots)
    runs = array("I", bytes(len(slots) // (2 * _ID) * _RUN))
    runs[1::3], runs[2::3] = column[0::2], column[1::2]
    return runs.tobytes()


def _used_stretches(fingerprints: bytes) -> Iterator[tuple[int, int]]:
    """Yield (start, count) of the slots in use in one record: those with a fingerprint other than 32 zero bytes."""
    empty = bytes(32)
    total = len(fingerprints) // 32
    if empty not in fingerprints:
        yield 0, total
        return
    start = None
    for i in range(total + 1):
        used = i < total and fingerprints[i * 32 : i * 32 + 32] != empty
        if used and start is None:
            start = i
        elif not used and start is not None:
            yield start, i - start
            start = None

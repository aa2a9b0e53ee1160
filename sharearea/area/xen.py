"""The sharing area of one pool on the Xen backend: the frames and the grant table of an area domain.

The domain is made when the first page is published, never runs, and outlives the broker; the next one finds it by its
uuid. Slot s is its guest frame BASE_FRAME + s, so there is nothing to remember. A frame is mapped writable for the time
of one fill() only. Read-only grant entries onto the frames are written into the domain's own table; which reference is
whose is the engine's. What the hypercalls do is native/grant_xen.c's, what `xl` does area/toolstack.py's.

The broker may die between any two calls here. What is left then is a domain with frames that the store does not know,
which adopt() gives back, or a domain that the store knows without segments, which the first fill() replaces.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from ..common.errors import AreaFull, Closed, HostError, NativeError, ShareareaError, UsageError
from ..common.native import FP_SIZE, GRANT_FIRST, GRANTS_PER_FRAME, PAGE_SIZE, AreaDomain
from .base import Outcome
from .toolstack import HostLimits, ListedDomain, Toolstack, paging_bytes

BASE_FRAME: Final = 0x100000
"""The guest frame of slot 0: 4 GiB, above the stub and everything that a domain builder puts anywhere."""

BLOCK_SLOTS: Final = 512  # 2 MiB: how memory is taken and given back


@dataclass(frozen=True, slots=True)
class GrantBudget:
    """How many grants an area can have. References run from `first_ref` to `entries` - 1."""

    first_ref: int
    entries: int
    host_entries: int  # what the host would allow one area
    maptrack_entries: int  # what one guest can map, by the host's default; a PV guest needs two for a page


class XenArea:
    """Hold a pool's pages in an area domain. Implements base.Area; for one thread at a time.

    `identity` (16 bytes) becomes the domain's uuid. `key` is the pool's fingerprint key (32 bytes). `slots_per_segment`
    is a multiple of 512. `max_bytes` bounds all segments together. `max_grants` bounds the entries of the grant table;
    None: the host's limit does.
    """

    def __init__(
        self,
        pool: str,
        identity: bytes,
        key: bytes,
        slots_per_segment: int,
        max_bytes: int,
        max_grants: int | None,
        toolstack: Toolstack,
    ) -> None:
        if len(identity) != 16:
            raise ValueError(f"an identity of {len(identity)} bytes")
        if len(key) != FP_SIZE:
            raise ValueError(f"a key of {len(key)} bytes")
        if slots_per_segment <= 0 or slots_per_segment % BLOCK_SLOTS:
            raise ValueError(f"a segment of {slots_per_segment} slots, not a multiple of {BLOCK_SLOTS}")
        if max_grants is not None and max_grants <= GRANT_FIRST:
            raise ValueError(f"{max_grants} grants: the first {GRANT_FIRST} entries are Xen's own")
        self._pool = pool
        self._identity = identity
        self._key = key
        self._slots_per_segment = slots_per_segment
        self._max_bytes = max_bytes
        self._max_grants = max_grants
        self._toolstack = toolstack
        self._limits: HostLimits | None = None
        self._domain: AreaDomain | None = None
        self._segments: set[int] = set()
        self._unreleased: set[int] = set()  # closed, but Xen did not take the memory back; tried again
        self._closed = False

    @property
    def pool(self) -> str:
        """Name of the pool."""
        return self._pool

    @property
    def identity(self) -> bytes:
        """The area domain's uuid, 16 bytes, whether or not there is a domain yet."""
        return self._identity

    @property
    def slots_per_segment(self) -> int:
        """How many slots each segment has."""
        return self._slots_per_segment

    @property
    def segment_bytes(self) -> int:
        """Size of one segment."""
        return self._slots_per_segment * PAGE_SIZE

    @property
    def domid(self) -> int | None:
        """The area domain, None before the first page was published."""
        return self._domain.domid if self._domain is not None else None

    def alive(self) -> bool:
        """Tell whether the area is usable: False once its domain was destroyed. No domain yet is alive.

        Where Xen or this kernel cannot say just now (no memory to map a page), it is taken for alive.
        """
        self._check_open()
        return self._domain is None or self._is_alive(self._domain)

    # ---------------------------------------------------------------------------------------------------- slots

    def fill(self, first: int, pages: bytes, want: bytes) -> Outcome:
        """Copy pages into slots and check the copies; see base.Area.

        Makes the area domain if there is none. Raises also HostError if it cannot be made or is gone.
        """
        number, _ = self._place(first, len(want) // FP_SIZE)
        domain = self._domain or self._create()
        opened: tuple[tuple[int, int, int], ...] = ()
        try:
            if number not in self._segments:
                self._open(domain, number)
                opened = ((number, domain.domid, BASE_FRAME + self._first(number)),)
            return domain.fill(self._key, first, pages, want), opened
        except BaseException as error:
            if opened:
                self.close_segment(number)
            if isinstance(error, ShareareaError) and not self._is_alive(domain):
                raise HostError(f"the area domain of pool {self._pool}, {domain.domid}, is gone") from None
            raise

    def move(self, slots: bytes, first: int, want: bytes) -> Outcome:
        """Copy pages from slots to slots and check the copies; see base.Area.

        Raises also HostError if a slot has no memory or the area domain is gone.
        """
        return self.fill(first, bytes(self._there().read(slots)), want)

    def verify(self, first: int, fingerprints: bytes) -> bytes:
        """Check what is in slots; see base.Area."""
        self._check_open()
        count, rest = divmod(len(fingerprints), FP_SIZE)
        if rest or first < 0:
            raise ValueError(f"{len(fingerprints)} bytes of fingerprints from slot {first} on")
        if self._domain is None:
            return bytes(count)
        want = memoryview(fingerprints)
        ok = bytearray()
        while len(ok) < count:
            number, slot = divmod(first + len(ok), self._slots_per_segment)
            part = min(count - len(ok), self._slots_per_segment - slot)
            if number in self._segments:
                at = len(ok) * FP_SIZE
                ok += self._domain.verify(self._key, first + len(ok), want[at : at + part * FP_SIZE])
            else:
                ok += bytes(part)
        return bytes(ok)

    def _place(self, first: int, count: int) -> tuple[int, int]:
        self._check_open()
        number, slot = divmod(first, self._slots_per_segment)
        if first < 0 or slot + count > self._slots_per_segment:
            raise ValueError(f"slots {first} to {first + count} are not in one segment")
        return number, slot

    def _first(self, number: int) -> int:
        return number * self._slots_per_segment

    # ------------------------------------------------------------------------------------------------- segments

    def _open(self, domain: AreaDomain, number: int) -> None:
        if (len(self._segments) + 1) * self.segment_bytes > self._max_bytes:
            raise AreaFull(
                f"the area of pool {self._pool} has reached its limit: {len(self._segments)} segments of "
                f"{self.segment_bytes} bytes, {self._max_bytes} bytes allowed",
                "raise the area's limit in the configuration",
            )
        self._release_late(domain)
        try:
            self._populate(domain, number)
        except AreaFull as error:
            raise AreaFull(f"the area of pool {self._pool} cannot grow: {error.message}", error.hint) from None
        self._segments.add(number)

    def _populate(self, domain: AreaDomain, number: int) -> None:
        first = self._first(number)
        try:
            domain.populate(first, self._slots_per_segment)
        except NativeError as error:
            if error.errno != errno.EDQUOT:
                raise
            # The area's limit was raised since the domain was made, or somebody's `xl mem-set` lowered the domain's.
            self._toolstack.raise_memory(domain.domid, self._max_bytes)
            domain.populate(first, self._slots_per_segment)

    def close_segment(self, segment: int) -> None:
        """Give a segment's memory back at once, but for frames that a guest still maps; see base.Area."""
        self._check_open()
        if segment in self._segments and self._domain is not None:
            self._segments.discard(segment)
            self._unreleased.add(segment)
            self._release_late(self._domain)

    def _release_late(self, domain: AreaDomain) -> None:
        for segment in sorted(self._unreleased):
            try:
                domain.release(self._first(segment), self._slots_per_segment)
            except ShareareaError:
                return  # allocated_bytes() goes on counting it
            self._unreleased.discard(segment)

    def segments(self) -> tuple[int, ...]:
        """Return the numbers of the segments that are there, ascending."""
        self._check_open()
        return tuple(sorted(self._segments))

    def allocated_bytes(self) -> int:
        """Return the memory that Xen holds for the area domain: pages, its own few, tables of both kinds."""
        self._check_open()
        if self._domain is None:
            return 0
        try:
            pages = self._domain.memory()
        except NativeError as error:
            if error.errno != errno.ESRCH:
                raise
            return 0
        if pages == 0:
            return 0  # destroyed, and only the husk of it is left
        frames, _ = self._domain.table()
        return pages + frames * PAGE_SIZE + paging_bytes(self._max_bytes)

    # --------------------------------------------------------------------------------------------------- grants

    def budget(self) -> GrantBudget:
        """Return how many grants the area can have; known before its domain is there."""
        self._check_open()
        limits = self._host_limits()
        host = limits.grant_frames * GRANTS_PER_FRAME
        most = host
        if self._domain is not None:
            most = self._domain.table()[1] * GRANTS_PER_FRAME
        if self._max_grants is not None:
            most = min(most, self._max_grants)
        return GrantBudget(GRANT_FIRST, most, host, limits.maptrack_frames * 256)

    def grant(self, domid: int, slots: bytes, refs: bytes) -> None:
        """Let a domain map slots[i] by reference refs[i], read only; packed uint32 columns of equal length.

        Raises HostError if an entry is not free, the table cannot have it, or there is no area domain. Nothing was
        written then.
        """
        self._there().grant(domid, slots, refs)

    def revoke(self, refs: bytes) -> bytes:
        """Take grants back: one byte for each reference of a packed uint32 column.

        0: the entry is free now, or was. 1: a guest has it mapped; it stays as it is and must be tried again.
        """
        self._check_open()
        if self._domain is None:
            return bytes(len(refs) // 4)
        return self._domain.revoke(refs)

    def entries(self) -> tuple[bytes, bytes, bytes]:
        """Return the references, domids and slots of all grants there are, three packed uint32 columns.

        References ascend from the first that is not Xen's own. A frame that is no slot has the slot 0xffffffff.
        """
        self._check_open()
        if self._domain is None:
            return b"", b"", b""
        return self._domain.entries()

    # --------------------------------------------------------------------------------------------- the domain's life

    def adopt(self, segments: dict[int, tuple[int, int]]) -> str | None:
        """Take over the domain of an earlier broker, with what the store knows: segment -> (domid, first frame).

        Returns None when all of it is there, else why not; nothing was taken over then, and destroy() removes what is
        left. No segments: nothing to take over, which is None. Frames that the store does not know are given back.
        Raises HostError if Xen or its tools do not answer: that says nothing about the area.
        """
        self._check_open()
        if self._domain is not None:
            raise ValueError(f"the area of pool {self._pool} has its domain already")
        if not segments:
            return None
        found = self._toolstack.find(self._identity)
        if found is None:
            return "area-gone"
        for number, (domid, frame) in segments.items():
            if domid != found.domid:
                return "area-replaced"
            if frame != BASE_FRAME + self._first(number):
                return "segment-size-changed"
        # Xen gives a domid to another domain only after some 32,000 others; once it is open, it cannot at all.
        domain = AreaDomain(found.domid, BASE_FRAME)
        try:
            if not all(self._complete(domain, number) for number in segments):
                domain.close()
                return "segments-missing"
            self._release_unknown(domain, segments)
        except BaseException:
            domain.close()
            raise
        self._domain = domain
        self._segments = set(segments)
        return None

    def destroy(self) -> None:
        """Destroy the area domain, if there is one. Frames that guests map stay theirs until they let go."""
        self._let_go()
        found = self._toolstack.find(self._identity)
        if found is not None:
            self._toolstack.destroy(found.domid)

    def close(self) -> None:
        """Let go of the domain in this process; it lives on. Twice is fine."""
        self._let_go()
        self._closed = True

    def _create(self) -> AreaDomain:
        # If there is one of this uuid, the store knows no segment of it, so nobody has a grant on anything in it: an
        # earlier broker died making it, or had closed all of its segments. create() replaces it.
        frames = self._host_limits().grant_frames
        if self._max_grants is not None:
            frames = min(frames, -(-self._max_grants // GRANTS_PER_FRAME))
        domid = self._toolstack.create(self._pool, self._identity, max_bytes=self._max_bytes, grant_frames=frames)
        self._domain = AreaDomain(domid, BASE_FRAME)
        return self._domain

    def _complete(self, domain: AreaDomain, number: int) -> bool:
        return 0 not in domain.present(self._first(number), self._slots_per_segment)

    def _release_unknown(self, domain: AreaDomain, known: dict[int, tuple[int, int]]) -> None:
        """Give back what an earlier broker had populated and not recorded, or recorded as closed and not given back."""
        try:
            blocks = domain.blocks(domain.end() // BLOCK_SLOTS)
        except NativeError as error:
            if error.errno == errno.EOVERFLOW:
                return  # an area of terabytes; populate() still finds what is in its way
            raise
        per_segment = self._slots_per_segment // BLOCK_SLOTS
        for block in itertools.compress(range(len(blocks)), blocks):
            if block // per_segment not in known:
                domain.release(block * BLOCK_SLOTS, BLOCK_SLOTS)

    def _host_limits(self) -> HostLimits:
        if self._limits is None:
            self._limits = self._toolstack.limits()
        return self._limits

    def _there(self) -> AreaDomain:
        self._check_open()
        if self._domain is None:
            raise HostError(f"pool {self._pool} has no area domain yet")
        return self._domain

    def _is_alive(self, domain: AreaDomain) -> bool:
        try:
            return domain.alive()
        except ShareareaError:
            return True  # nobody knows

    def _let_go(self) -> None:
        if self._domain is not None:
            self._domain.close()
        self._domain = None
        self._segments.clear()
        self._unreleased.clear()

    def __enter__(self) -> Self:
        """Return the area itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the area domain."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the area of pool {self._pool} is closed")


# -------------------------------------------------------------------------------------------------- the command line


@dataclass(frozen=True, slots=True)
class AreaInUse:
    """An area domain as the command line shows it."""

    domain: ListedDomain
    granted: int  # entries of its grant table that are not free
    mapped: int  # those that guests have mapped at this moment
    table_entries: int  # there are now; Xen's own eight included
    table_max_entries: int  # it may grow to


def survey(toolstack: Toolstack) -> Iterator[AreaInUse]:
    """Look at every domain that is named like an area domain."""
    for domain in toolstack.areas():
        with AreaDomain(domain.domid, BASE_FRAME) as opened:
            entries, most = (frames * GRANTS_PER_FRAME for frames in opened.table())
            yield AreaInUse(domain, *opened.usage(), entries, most)


def remove(toolstack: Toolstack, which: str, force: bool) -> str:
    """Destroy the area domain of a pool, or the one with this uuid, and return what that meant, as a sentence.

    Raises UsageError if there is none or more than one, HostError if a guest maps pages of it and `force` is False.
    """
    found = [area for area in toolstack.areas() if which in (area.pool, area.uuid)]
    if not found:
        raise UsageError(f"there is no area domain of {which!r}", "`sharearea area list` shows what there is")
    if len(found) > 1:
        raise UsageError(f"{len(found)} area domains are of {which!r}", "say which by its uuid")
    (area,) = found
    with AreaDomain(area.domid, BASE_FRAME) as opened:
        _, mapped = opened.usage()
    if mapped and not force:
        raise HostError(
            f"guests map {mapped} pages of {area.name}",
            "detach them first (sharearea detach), or use --force: they keep what they map, nothing new can be mapped",
        )
    toolstack.destroy(area.domid)
    if all(domain.domid != area.domid for domain in toolstack.domains()):
        return f"{area.name} is gone, and all of its memory is free"
    if mapped:
        return (
            f"{area.name} is gone. Guests keep the pages behind the {mapped} grants that they have mapped; until they "
            f"let go Xen shows domain {area.domid} as dying. Nobody can map anything of it any more"
        )
    return f"{area.name} is gone, and its memory is free. Xen shows domain {area.domid} until a running broker notices"

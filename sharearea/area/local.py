"""The sharing area of one pool on the local backend: sealed memfds, one for each segment.

A segment that this process opened is written through its own mapping and by nobody else; one that an earlier broker
opened and the service manager kept is adopted, checked and only read. What makes a segment safe to hand out is
native/map.c's; which slot gets which page is the engine's.
"""

from __future__ import annotations

import array
import errno
import os
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from ..common.errors import AreaFull, Closed, HostError, NativeError, VerificationFailed
from ..common.native import FP_SIZE, PAGE_SIZE, SEGMENT_HEADER, Segment
from ..grants import stretches
from .base import Outcome

_NAME_BYTES: Final = 249  # of a memfd, memfd_create(2)

# What the kernel says when it has no memory for a segment's pages: EFAULT is populate's word for what a touch would
# have answered with SIGBUS (madvise(2)).
_NO_MEMORY: Final = frozenset({errno.ENOMEM, errno.EFAULT, errno.ENOSPC})


class LocalArea:
    """Hold a pool's pages in memfds. Implements base.Area; for one thread at a time.

    `key` is the pool's fingerprint key (32 bytes). `max_bytes` bounds the size of all segments together, used or not:
    a domain that has a segment can make the kernel allocate all of it.
    """

    def __init__(self, pool: str, key: bytes, slots_per_segment: int, max_bytes: int) -> None:
        if len(key) != FP_SIZE:
            raise ValueError(f"a key of {len(key)} bytes")
        if slots_per_segment <= 0:
            raise ValueError(f"a segment of {slots_per_segment} slots")
        self._pool = pool
        self._key = key
        self._slots_per_segment = slots_per_segment
        self._max_bytes = max_bytes
        self._segments: dict[int, Segment] = {}
        self._closing: list[threading.Thread] = []
        self._closed = False

    @property
    def pool(self) -> str:
        """Name of the pool."""
        return self._pool

    @property
    def slots_per_segment(self) -> int:
        """How many slots each segment has."""
        return self._slots_per_segment

    @property
    def segment_bytes(self) -> int:
        """Size of one segment, its header included."""
        return SEGMENT_HEADER + self._slots_per_segment * PAGE_SIZE

    # ---------------------------------------------------------------------------------------------------- slots

    def fill(self, first: int, pages: bytes, want: bytes) -> Outcome:
        """Copy pages into slots and check the copies; see base.Area.

        Raises also HostError for a segment that was adopted: nobody can write it any more.
        """
        number, slot = self._place(first, len(want) // FP_SIZE)
        segment = self._segments.get(number)
        opened: tuple[tuple[int, int, int], ...] = ()
        if segment is None:
            segment = self._open(number)
            opened = ((number, *segment.identity()),)
        elif not segment.writable:
            raise HostError(f"segment {number} of pool {self._pool} was adopted and cannot be written")
        try:
            return segment.fill(self._key, slot, pages, want), opened
        except BaseException as error:
            if opened:
                self.close_segment(number)
            if isinstance(error, NativeError) and error.errno in _NO_MEMORY:
                raise AreaFull(
                    f"the host has no memory for more pages of pool {self._pool}", "give guests less, or the host more"
                ) from None
            raise

    def move(self, slots: bytes, first: int, want: bytes) -> Outcome:
        """Copy pages from slots to slots and check the copies; see base.Area.

        Raises also HostError if a slot's segment is not there.
        """
        self._check_open()
        numbers = array.array("I", slots)
        pages = bytearray()
        for start, count in stretches(numbers):
            for number, slot, part in self._parts(start, count):
                segment = self._segments.get(number)
                if segment is None:
                    raise HostError(f"pool {self._pool} has no segment {number}")
                pages += segment.read(slot, part)
        return self.fill(first, bytes(pages), want)

    def verify(self, first: int, fingerprints: bytes) -> bytes:
        """Check what is in slots; see base.Area."""
        self._check_open()
        count, rest = divmod(len(fingerprints), FP_SIZE)
        if rest:
            raise ValueError(f"{len(fingerprints)} bytes of fingerprints")
        want = memoryview(fingerprints)
        ok = bytearray()
        for number, slot, part in self._parts(first, count):
            segment = self._segments.get(number)
            at = len(ok) * FP_SIZE
            ok += segment.verify(self._key, slot, want[at : at + part * FP_SIZE]) if segment else bytes(part)
        return bytes(ok)

    def _place(self, first: int, count: int) -> tuple[int, int]:
        self._check_open()
        number, slot = divmod(first, self._slots_per_segment)
        if first < 0 or slot + count > self._slots_per_segment:
            raise ValueError(f"slots {first} to {first + count} are not in one segment")
        return number, slot

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (segment, slot in it, count) for a stretch that may go through several segments."""
        if first < 0:
            raise ValueError(f"slot {first}")
        while count > 0:
            number, slot = divmod(first, self._slots_per_segment)
            part = min(count, self._slots_per_segment - slot)
            yield number, slot, part
            first, count = first + part, count - part

    # ------------------------------------------------------------------------------------------------- segments

    def _open(self, number: int) -> Segment:
        if (len(self._segments) + 1) * self.segment_bytes > self._max_bytes:
            raise AreaFull(
                f"the area of pool {self._pool} has reached its limit: {len(self._segments)} segments of "
                f"{self.segment_bytes} bytes, {self._max_bytes} bytes allowed",
                "raise the area's limit in the configuration",
            )
        end = f"-{number}"
        start = f"sharearea-{self._pool}".encode()[: _NAME_BYTES - len(end)].decode(errors="ignore")
        segment = self._segments[number] = Segment.create(start + end, self._slots_per_segment)
        return segment

    def adopt(self, segment: int, fd: int, dev: int, ino: int) -> None:
        """Take a segment over from an earlier broker, read only; `fd` stays the caller's.

        `dev` and `ino` are what the store says of it. Raises VerificationFailed if the descriptor is another file's,
        or is no sealed segment of this area's size; AreaFull if there is no descriptor or memory left for it.
        """
        self._check_open()
        if segment < 0 or segment in self._segments:
            raise ValueError(f"segment {segment} of pool {self._pool} is there already or no number")
        what = f"segment {segment} of pool {self._pool}"
        try:
            info = os.fstat(fd)
            if (info.st_dev, info.st_ino) != (dev, ino):
                raise VerificationFailed(
                    f"{what}: the descriptor is file {info.st_dev}:{info.st_ino}, the store says {dev}:{ino}"
                )
            self._segments[segment] = Segment.adopt(fd, self._slots_per_segment)
        except NativeError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise AreaFull(f"{what} cannot be adopted: {error.message}", "raise the limit on open files") from None
            raise VerificationFailed(f"{what}: {error.message}", error.hint) from None
        except OSError as error:
            raise VerificationFailed(f"{what}: {os.strerror(error.errno or errno.EBADF)}") from None

    def fd(self, segment: int) -> int:
        """Return a segment's descriptor, which stays the area's. Raises HostError if there is no such segment."""
        self._check_open()
        try:
            return self._segments[segment].fileno()
        except KeyError:
            raise HostError(f"pool {self._pool} has no segment {segment}") from None

    def writable(self, segment: int) -> bool:
        """Tell whether a segment is there and can be filled; an adopted one cannot."""
        self._check_open()
        return segment in self._segments and self._segments[segment].writable

    def close_segment(self, segment: int) -> None:
        """Give a segment's memory back; see base.Area."""
        self._check_open()
        gone = self._segments.pop(segment, None)
        if gone is not None:
            # The kernel takes tens of milliseconds to free 64 MiB of pages: not on the caller's time.
            self._closing = [thread for thread in self._closing if thread.is_alive()]
            self._closing.append(threading.Thread(target=gone.close, name="sharearea-close"))
            self._closing[-1].start()

    def segments(self) -> tuple[int, ...]:
        """Return the numbers of the segments that are there, ascending."""
        self._check_open()
        return tuple(sorted(self._segments))

    def allocated_bytes(self) -> int:
        """Return the memory that the kernel holds for the segments."""
        self._check_open()
        return sum(segment.allocated_bytes() for segment in self._segments.values())

    def close(self) -> None:
        """Close all segments in this process; domains keep what they have mapped. Twice is fine."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        for thread in self._closing:
            thread.join()
        self._closing.clear()
        self._closed = True

    def __enter__(self) -> Self:
        """Return the area itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the area."""
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the area of pool {self._pool} is closed")

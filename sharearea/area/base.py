"""What the broker asks of a sharing area, whichever backend holds it.

An area belongs to one pool. Its slots are numbered through all of its segments: slot number = segment *
slots_per_segment + slot in the segment. Which page goes where, and when a slot or a segment is free, is the engine's;
an area copies, checks and gives memory back. How handles get to a domain is the backend's own (`local`: descriptors).
"""

from __future__ import annotations

from typing import Protocol

Outcome = tuple[bytes, tuple[tuple[int, int, int], ...]]
"""What fill() and move() return: `ok`, one byte per page, 1 where the copy in its slot has the wanted fingerprint; and
the segments that were opened for it, as (segment, dev, ino)."""


class Area(Protocol):
    """Hold the one copy of each shared page of a pool."""

    @property
    def pool(self) -> str:
        """Name of the pool."""

    @property
    def slots_per_segment(self) -> int:
        """How many slots each of its segments has."""

    def fill(self, first: int, pages: bytes, want: bytes) -> Outcome:
        """Copy pages (n x 4096 bytes) into the slots from `first` on and check the copies against `want` (n x 32).

        All slots are in one segment, which is opened if it is not there. Raises AreaFull, with the reason, when the
        area's limit or the host's is reached: nothing was opened then, and no slot may be taken for filled.
        """

    def move(self, slots: bytes, first: int, want: bytes) -> Outcome:
        """Copy the pages in `slots` (packed uint32, any order, any segments) into the slots from `first` on.

        Otherwise as fill(). What was in `slots` stays there.
        """

    def verify(self, first: int, fingerprints: bytes) -> bytes:
        """Check what is in the slots from `first` on: one byte per fingerprint, 1 where the page has it.

        Pages of a segment that is not there are 0, as are fingerprints of 32 zero bytes.
        """

    def close_segment(self, segment: int) -> None:
        """Give a segment's memory back; it goes when the last domain that maps it does. One not there is fine."""

    def segments(self) -> tuple[int, ...]:
        """Numbers of the segments that are there, ascending."""

    def allocated_bytes(self) -> int:
        """Memory that the host holds for the area."""

    def close(self) -> None:
        """Let go of everything in this process. Twice is fine; anything else raises Closed from now on."""

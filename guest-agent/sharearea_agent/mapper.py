"""How a domain's programs get their shared pages: one small interface, and its `local` implementation.

The agent decides which file is shared with whom (agent.py); a mapper knows what a handle is on its backend and puts it
into messages for consumers. On `local` a handle is a slot in a segment, and the segment's descriptor goes to the
consumer, which maps it itself. Other backends (grants, the guest view) come in behind the same protocol.
"""

from __future__ import annotations

import os
from array import array
from typing import Protocol

from .common.errors import ProtocolError


class Mapper(Protocol):
    """What the runner needs of a backend's mapper. Not thread-safe."""

    def add_segment(self, segment: int, fd: int) -> None:
        """Take a segment of the area; `fd` is the mapper's from now on."""
        ...

    def forget(self, segments: tuple[int, ...] | None) -> list[int]:
        """Close these segments, or all; return the numbers under which consumers know them."""
        ...

    def translate(self, runs: bytes) -> tuple[bytes, bytes, list[int]]:
        """Turn the broker's runs into what Share carries: runs, the number of each run's segment, and all numbers."""
        ...

    def segment_fd(self, number: int) -> int:
        """Return the descriptor of a segment by the number that translate gave; it stays the mapper's."""
        ...

    def close(self) -> None:
        """Close everything."""
        ...


class LocalMapper:
    """Segments are sealed memfds; consumers know them by numbers that are never used again, whatever the area."""

    def __init__(self) -> None:
        self.slots_per_segment = 1
        self._next = 0
        self._numbers: dict[int, int] = {}  # segment of the area -> number
        self._fds: dict[int, int] = {}  # number -> descriptor

    def add_segment(self, segment: int, fd: int) -> None:
        """Take a segment. The same one again (the broker sends it anew on each connection) keeps its number."""
        number = self._numbers.get(segment)
        if number is not None:
            same = os.path.samestat(os.fstat(fd), os.fstat(self._fds[number]))
            if same:
                os.close(fd)
                return
            os.close(self._fds.pop(number))
        self._next += 1
        self._numbers[segment] = self._next
        self._fds[self._next] = fd

    def forget(self, segments: tuple[int, ...] | None) -> list[int]:
        """Close these segments, or all of them."""
        gone = list(self._numbers) if segments is None else [s for s in segments if s in self._numbers]
        numbers = [self._numbers.pop(segment) for segment in gone]
        for number in numbers:
            os.close(self._fds.pop(number))
        return numbers

    def translate(self, runs: bytes) -> tuple[bytes, bytes, list[int]]:
        """Return runs with slots counted inside their segment, and their segments. Raises ProtocolError."""
        columns = array("I", runs)
        numbers = array("I", bytes(len(runs) // 3))
        for at, slot in enumerate(columns[1::3]):
            segment, inside = divmod(slot, self.slots_per_segment)
            number = self._numbers.get(segment)
            if number is None:
                raise ProtocolError(f"handles in segment {segment}, which the broker has not sent")
            columns[at * 3 + 1] = inside
            numbers[at] = number
        return columns.tobytes(), numbers.tobytes(), sorted(set(numbers))

    def segment_fd(self, number: int) -> int:
        """Return the descriptor of a segment."""
        return self._fds[number]

    def close(self) -> None:
        """Close all segments."""
        self.forget(None)

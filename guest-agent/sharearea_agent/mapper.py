"""How a domain's programs get their shared pages: one small interface, and an implementation for each backend.

The agent decides which file is shared with whom (agent.py); a mapper knows what a handle is on its backend and puts it
into messages for consumers. On `local` a handle is a slot in a segment, and the segment's descriptor goes to the
consumer, which maps it itself. On `xen` it is a grant reference, and what goes to the consumer is a descriptor of the
grant device. The guest view comes in behind the same protocol.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Final, Protocol

from .agent import ShareWith
from .common import native
from .common.errors import ProtocolError
from .common.wire import Message, Segment, Welcome
from .consumer_wire import MAX_COMPARE_RUNS, GrantDevice, Share, ShareGrants, ShareSegment


@dataclass(slots=True)
class Parcel:
    """What one consumer is sent for one file: `before` with their descriptors, then `share`, with the file's lease."""

    share: Share | ShareGrants
    before: list[tuple[Message, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # that are new to the consumer, by the numbers it knows them by
    ours: list[int] = field(default_factory=list)  # descriptors in `before` that are for this parcel alone
    compared_pages: int = 0  # that the consumer is to compare with its file: it reads those that are not resident

    def close(self) -> None:
        """Close the descriptors that are for this parcel alone; duplicates that were sent are not touched."""
        while self.ours:
            os.close(self.ours.pop())


def _meeting(runs: array[int], ranges: array[int]) -> array[int]:
    """Return the parts of runs (page, handle, count), which ascend, that lie in ranges (page, count), which do too."""
    found = array("I")
    at = 0
    firsts, counts = ranges[0::2], ranges[1::2]
    for page, handle, count in zip(runs[0::3], runs[1::3], runs[2::3], strict=True):
        while at < len(firsts) and firsts[at] + counts[at] <= page:
            at += 1
        here = at
        while here < len(firsts) and firsts[here] < page + count:
            first, end = max(page, firsts[here]), min(page + count, firsts[here] + counts[here])
            found.extend((first, handle + first - page, end - first))
            here += 1
    return found


class Mapper(Protocol):
    """What the agent's loop needs of a backend's mapper. Not thread-safe."""

    def learn(self, message: Message, fd: int | None) -> None:
        """Take what the broker says of handles: Welcome, Segment. `fd` is the mapper's from now on."""
        ...

    def forget(self, segments: tuple[int, ...] | None) -> list[int]:
        """Close these segments, or all; return the numbers under which consumers know them."""
        ...

    def parcel(self, share: ShareWith, known: Container[int], resident: bytes | None = None) -> Parcel:
        """Put the handles of a file into messages for a consumer that has the segments `known`. Close it when sent.

        `resident`: packed pairs (page, count) of the pages that the consumer need only compare; None: all. A mapper may
        have it compare more.

        Raises ProtocolError if the broker has not sent what the handles need, HostError if this guest cannot.
        """
        ...

    def close(self) -> None:
        """Close everything."""
        ...


class LocalMapper:
    """Segments are sealed memfds; consumers know them by numbers that are never used again, whatever the area."""

    def __init__(self) -> None:
        self._slots_per_segment = 1
        self._next = 0
        self._numbers: dict[int, int] = {}  # segment of the area -> number
        self._fds: dict[int, int] = {}  # number -> descriptor

    def learn(self, message: Message, fd: int | None) -> None:
        """Take a segment. The same one again (the broker sends it anew on each connection) keeps its number."""
        if isinstance(message, Welcome):
            self._slots_per_segment = message.slots_per_segment
        if not isinstance(message, Segment) or fd is None:
            return
        number = self._numbers.get(message.segment)
        if number is not None:
            same = os.path.samestat(os.fstat(fd), os.fstat(self._fds[number]))
            if same:
                os.close(fd)
                return
            os.close(self._fds.pop(number))
        self._next += 1
        self._numbers[message.segment] = self._next
        self._fds[self._next] = fd

    def forget(self, segments: tuple[int, ...] | None) -> list[int]:
        """Close these segments, or all of them."""
        gone = list(self._numbers) if segments is None else [s for s in segments if s in self._numbers]
        numbers = [self._numbers.pop(segment) for segment in gone]
        for number in numbers:
            os.close(self._fds.pop(number))
        return numbers

    def parcel(self, share: ShareWith, known: Container[int], resident: bytes | None = None) -> Parcel:
        """Send slots counted inside their segment, and the segments that the consumer lacks."""
        runs = array("I", share.runs)
        compare = _meeting(runs, array("I", resident)) if resident is not None else runs
        whole = len(compare) > 3 * MAX_COMPARE_RUNS or resident is None
        if whole:
            compare = runs
        columns, numbers = self._inside_segments(runs)
        lacking = [number for number in sorted(set(numbers)) if number not in known]
        some = (b"", b"") if whole else tuple(part.tobytes() for part in self._inside_segments(compare))
        return Parcel(
            Share(share.handle, share.generation, columns.tobytes(), numbers.tobytes(), int(whole), *some),
            before=[(ShareSegment(number), self._fds[number]) for number in lacking],
            segments=lacking,
            compared_pages=sum(compare[2::3]),
        )

    def _inside_segments(self, runs: array[int]) -> tuple[array[int], array[int]]:
        """Return runs with slots counted inside their segments, and the consumers' number of each run's segment."""
        columns, numbers = array("I", runs), array("I", bytes(len(runs) // 3 * 4))
        for at, slot in enumerate(runs[1::3]):
            segment, inside = divmod(slot, self._slots_per_segment)
            number = self._numbers.get(segment)
            if number is None:
                raise ProtocolError(f"handles in segment {segment}, which the broker has not sent")
            columns[at * 3 + 1] = inside
            numbers[at] = number
        return columns, numbers

    def close(self) -> None:
        """Close all segments."""
        self.forget(None)


GUEST_PV: Final = "pv"


class XenMapper:
    """Handles are grant references of the area's domain, for this guest alone.

    The consumer maps them itself: the loop does not wait for the hypervisor, and nothing that the agent holds keeps a
    grant in use. Each parcel has a descriptor of the grant device of its own, without any reference in it, which the
    consumer closes when it has mapped; so a grant is let go with the consumer's last mapping of it, also if the agent
    dies. Whoever holds such a descriptor can map every page that is granted to this guest, though: consumers.py hands
    it to those only who are allowed to.
    """

    def __init__(self, kind: str, device: Callable[[], tuple[int, bool]] = native.open_grant_device) -> None:
        """`kind`: what kind of guest this is, as guest_kind() says; `device` opens the grant device."""
        self._movable = kind != GUEST_PV
        self._device = device

    def learn(self, message: Message, fd: int | None) -> None:
        """Whose references come next is the state machine's to know; descriptors do not come."""

    def forget(self, segments: tuple[int, ...] | None) -> list[int]:  # noqa: ARG002 # of the protocol
        """There are no segments."""
        return []

    def parcel(self, share: ShareWith, known: Container[int], resident: bytes | None = None) -> Parcel:  # noqa: ARG002 # of the protocol
        """Send the references as they are, and a descriptor of the grant device before them. All is compared."""
        if share.grantor is None:
            raise ProtocolError("grant references, and the broker has not said whose")
        fd, _ = self._device()
        return Parcel(
            ShareGrants(share.handle, share.generation, share.grantor, int(self._movable), share.runs),
            before=[(GrantDevice(share.handle), fd)],
            ours=[fd],
            compared_pages=sum(array("I", share.runs)[2::3]),
        )

    def close(self) -> None:
        """Nothing is open."""

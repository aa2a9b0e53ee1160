"""The messages between an agent and the programs of its domain that use shared pages (consumers).

Same frames and codec as the link to the broker (common/wire.py). A consumer is trusted with nothing: it shows its right
to a file by passing a descriptor of it, and gets handles for that file only. docs/protocol.md has the conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from .common.errors import ProtocolError
from .common.wire import MAX_DOMID, MAX_GRANT_RUNS, MAX_IDS, Codec, Message, column, text, uint

MAX_COMPARE_RUNS: Final = 16_384
"""Runs that Share can name for comparing, when not all are to be: both kinds fit into a frame."""

# -------------------------------------------------------------------------------------------- consumer -> agent


@dataclass(frozen=True, slots=True)
class Open(Message):
    """I have mapped this file, of `length` bytes; its descriptor travels with the message. `handle` is my number for
    it.
    """

    TYPE: ClassVar[int] = 1
    FD: ClassVar[bool] = True
    handle: int = uint(0xFFFFFFFF)
    length: int = uint(2**63)


@dataclass(frozen=True, slots=True)
class Close(Message):
    """The mapping is gone."""

    TYPE: ClassVar[int] = 2
    handle: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Mapped(Message):
    """Answer to Share: so many pages are shared now. `outcome`: 0 done, 1 the bytes differed, 2 no room to map."""

    TYPE: ClassVar[int] = 3
    handle: int = uint(0xFFFFFFFF)
    generation: int = uint(0xFFFFFFFF)
    pages: int = uint(0xFFFFFFFF)
    outcome: int = uint(2)


@dataclass(frozen=True, slots=True)
class LetGo(Message):
    """Answer to Unshare: the mapping is the plain file again."""

    TYPE: ClassVar[int] = 4
    handle: int = uint(0xFFFFFFFF)
    generation: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Unchanged(Message):
    """I am the shim of an unchanged program (docs/preload.md). Comes first, if at all; no answer. On `xen` its files
    stay plain: there the guest view does this job.
    """

    TYPE: ClassVar[int] = 5


MAPPED_DONE, MAPPED_DIFFERENT, MAPPED_NO_ROOM = 0, 1, 2

# -------------------------------------------------------------------------------------------- agent -> consumer


@dataclass(frozen=True, slots=True)
class ShareSegment(Message):
    """A segment of the area; its descriptor travels with the message. `number` is used by Share and never again."""

    TYPE: ClassVar[int] = 33
    FD: ClassVar[bool] = True
    number: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Share(Message):
    """Put these pages under your mapping: runs (page, slot in its segment, count) and the segment of each run.

    The descriptor that travels with it holds a read lease on the file: close it when the plain file is back. As long as
    it is open no writer gets on, whatever becomes of the agent.

    Compare with the file before you map: all runs if `all` is 1; if it is 0 only the runs in `compare`, with their
    segments, which are parts of the others. The agent has proof of the rest and nobody has read it: do not either.
    """

    TYPE: ClassVar[int] = 34
    FD: ClassVar[bool] = True
    handle: int = uint(0xFFFFFFFF)
    generation: int = uint(0xFFFFFFFF)
    runs: bytes = column(12, MAX_GRANT_RUNS)
    segments: bytes = column(4, MAX_GRANT_RUNS)
    all: int = uint(1)
    compare: bytes = column(12, MAX_COMPARE_RUNS)
    compare_segments: bytes = column(4, MAX_COMPARE_RUNS)

    def check(self) -> None:
        for runs, segments in ((self.runs, self.segments), (self.compare, self.compare_segments)):
            if len(runs) // 12 != len(segments) // 4:
                raise ProtocolError("Share: columns of different length")


@dataclass(frozen=True, slots=True)
class Unshare(Message):
    """Put the file's own pages back and answer LetGo."""

    TYPE: ClassVar[int] = 35
    handle: int = uint(0xFFFFFFFF)
    generation: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Plain(Message):
    """Nothing to share for this file now, and why; Share may follow at any time."""

    TYPE: ClassVar[int] = 36
    handle: int = uint(0xFFFFFFFF)
    reason: str = text(64)


@dataclass(frozen=True, slots=True)
class SegmentsGone(Message):
    """Close your descriptors of these segments."""

    TYPE: ClassVar[int] = 37
    numbers: bytes = column(4, MAX_IDS)


@dataclass(frozen=True, slots=True)
class GrantDevice(Message):
    """The guest's grant device, for the ShareGrants of this handle that follows (`xen`); its descriptor travels with
    the message. Close it as soon as the pages are mapped, or are not going to be: it keeps grants in use.
    """

    TYPE: ClassVar[int] = 38
    FD: ClassVar[bool] = True
    handle: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class ShareGrants(Message):
    """Put these pages under your mapping (`xen`): runs (page, first grant reference, count) of domain `domid`.

    `movable` 1: this kind of guest can move mappings of grants (PVH and HVM), 0: it cannot (PV). The descriptor that
    travels with it holds a read lease, as with Share.
    """

    TYPE: ClassVar[int] = 39
    FD: ClassVar[bool] = True
    handle: int = uint(0xFFFFFFFF)
    generation: int = uint(0xFFFFFFFF)
    domid: int = uint(MAX_DOMID)
    movable: int = uint(1)
    runs: bytes = column(12, MAX_GRANT_RUNS)


CONSUMER_TO_AGENT = Codec("consumer -> agent", (Open, Close, Mapped, LetGo, Unchanged), max_frame=1 << 16)
AGENT_TO_CONSUMER = Codec(
    "agent -> consumer",
    (ShareSegment, Share, Unshare, Plain, SegmentsGone, GrantDevice, ShareGrants),
    max_frame=1 << 21,
)

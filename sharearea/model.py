"""The values that the broker's parts exchange: verdicts, changes to the store, events into the engine, actions out of
it.

Everything here is frozen data. A packed column is `bytes` of little-endian uint32 unless it says otherwise; a run is
three of them (page, slot, count). Nothing here does anything: transitions are in engine.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .common.wire import Message
from .common.wire import Verdict as Verdict
from .common.wire import WithdrawReason as WithdrawReason

PeerId = int  # names a connection for as long as the broker runs; never used again
PoolId = str
DomainId = str  # unique within its pool
FileId = int  # chosen by the agent, unique for one agent instance
SlotNumber = int  # counts through all segments of an area


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a peer is, as the transport knows it: on `local` the uid of the peer's credentials, on `xen` the rest.

    `name`, `uuid` and `label` are what dom0 wrote into xenstore; the domain itself can write none of them.
    """

    backend: str
    uid: int = 0
    domid: int = 0
    name: str = ""
    uuid: str = ""
    label: str = ""


# ------------------------------------------------------------------------------------------- changes to the store


@dataclass(frozen=True, slots=True)
class PoolOpened:
    """A pool got its area. Written once per boot and pool."""

    pool: PoolId
    area: bytes  # 16 bytes
    slots_per_segment: int


@dataclass(frozen=True, slots=True)
class SegmentOpened:
    """A segment joined the area. What names it for as long as the host runs: on `local` dev and ino of its memfd, on
    `xen` the area domain and the segment's first frame number in it.
    """

    pool: PoolId
    segment: int
    dev: int
    ino: int


@dataclass(frozen=True, slots=True)
class SegmentClosed:
    """A segment, all of its slots free, left the area; its slot records go with it."""

    pool: PoolId
    segment: int


@dataclass(frozen=True, slots=True)
class SlotsFilled:
    """Slots from `first` on hold the pages with these fingerprints (n x 32 bytes); 32 zero bytes: slot not in use."""

    pool: PoolId
    first: SlotNumber
    fingerprints: bytes


@dataclass(frozen=True, slots=True)
class SlotsFreed:
    """No domain can reach these slots any more and no page uses them (packed)."""

    pool: PoolId
    slots: bytes


@dataclass(frozen=True, slots=True)
class OwnerSet:
    """A domain is about to get handles for these runs of one file. Written before they are handed out."""

    pool: PoolId
    domain: DomainId
    instance: bytes  # 16 bytes: of the agent that counts file numbers
    file: FileId
    runs: bytes  # packed (page, slot, count)
    domid: int = 0  # `xen`: whom the grants are made for
    refs: bytes = b""  # `xen`: packed (first, count), the grant reference of every page of `runs`, in their order


@dataclass(frozen=True, slots=True)
class OwnerCleared:
    """A domain has let go of a file."""

    pool: PoolId
    domain: DomainId
    file: FileId


Change = PoolOpened | SegmentOpened | SegmentClosed | SlotsFilled | SlotsFreed | OwnerSet | OwnerCleared


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """One pool as the store knows it: what `load` returns and the engine starts from."""

    area: bytes
    slots_per_segment: int
    segments: dict[int, tuple[int, int]] = field(default_factory=dict)  # number -> (dev, ino)
    slots: dict[SlotNumber, bytes] = field(default_factory=dict)  # first slot of a stretch -> fingerprints
    owners: dict[tuple[DomainId, FileId], OwnerSet] = field(default_factory=dict)


Records = dict[PoolId, PoolRecord]


# -------------------------------------------------------------------------------------------- events into the engine


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """A transport has a new peer."""

    peer: PeerId
    identity: Identity


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """A peer is gone: it closed, died, or the transport gave it up (`why`)."""

    peer: PeerId
    why: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message that passed the codec."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class Malformed:
    """A peer sent something that the codec refused."""

    peer: PeerId
    what: str


@dataclass(frozen=True, slots=True)
class Filled:
    """Outcome of Fill: `ok` has one byte per page, 1 where the copy in the slot has the wanted fingerprint."""

    token: int
    ok: bytes
    opened: tuple[tuple[int, int, int], ...]  # segments that were created for it: (segment, dev, ino)


@dataclass(frozen=True, slots=True)
class FillFailed:
    """Outcome of Fill or Move: nothing was written, for lack of memory, descriptors or room."""

    token: int
    why: str


@dataclass(frozen=True, slots=True)
class Committed:
    """Outcome of Commit: all of its changes are in the store."""

    token: int


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """Outcome of Commit: none of its changes is in the store."""

    token: int
    why: str


@dataclass(frozen=True, slots=True)
class GrantsWritten:
    """Outcome of WriteGrants: every entry is in force."""

    token: int


@dataclass(frozen=True, slots=True)
class GrantsFailed:
    """Outcome of WriteGrants: none of its entries was written."""

    token: int
    why: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """Outcome of Revoke: `busy` has one byte per reference, 1 where the domain still maps the page."""

    token: int
    busy: bytes


@dataclass(frozen=True, slots=True)
class DomainGone:
    """A Xen domain is no more: destroyed, or saved or migrated away. Its number names nobody."""

    domid: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    PeerConnected
    | PeerClosed
    | Received
    | Malformed
    | Filled
    | FillFailed
    | Committed
    | CommitFailed
    | GrantsWritten
    | GrantsFailed
    | Revoked
    | DomainGone
    | Tick
)


# ------------------------------------------------------------------------------------------- actions of the engine


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to a peer."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True)
class SendSegment:
    """Send wire.Segment with the segment's descriptor."""

    peer: PeerId
    pool: PoolId
    segment: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close a peer's connection once what was sent before is out. No PeerClosed follows."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Fill:
    """Copy pages into slots from `first` on (one segment, opened if need be) and check the copies' fingerprints."""

    token: int
    pool: PoolId
    first: SlotNumber
    pages: bytes
    want: bytes


@dataclass(frozen=True, slots=True)
class Move:
    """Copy pages from slots (packed) to slots from `first` on and check. The outcome is Filled or FillFailed."""

    token: int
    pool: PoolId
    slots: bytes
    first: SlotNumber
    want: bytes


@dataclass(frozen=True, slots=True)
class Commit:
    """Write all changes in one transaction."""

    token: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class WriteGrants:
    """Grant the pages in these slots to a domain, read-only (packed columns of equal length: slots, references)."""

    token: int
    pool: PoolId
    domid: int
    slots: bytes
    refs: bytes


@dataclass(frozen=True, slots=True)
class Revoke:
    """End the grants with these references (packed), those that nobody maps. The outcome is Revoked."""

    token: int
    pool: PoolId
    refs: bytes


@dataclass(frozen=True, slots=True)
class CloseSegment:
    """Give a segment's memory back to the host."""

    pool: PoolId
    segment: int


@dataclass(frozen=True, slots=True)
class Log:
    """One event for the log: a name of the catalogue in logs.py and its fields."""

    event: str
    fields: dict[str, object]


Action = Send | SendSegment | Disconnect | Fill | Move | Commit | WriteGrants | Revoke | CloseSegment | Log

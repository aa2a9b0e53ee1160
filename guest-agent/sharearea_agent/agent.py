"""The agent as a state machine: `handle(event, now)` returns the actions that follow. No I/O, no clock, no randomness.

One `_File` per inode in the designated folders (or opened by a consumer). It has two sides. The reported side says what
the broker was told: a version of the file's content under a file number that is never used again. The shared side moves
through the states of `Stage`; a version changes only when nothing of it is shared any more. The runner (runner.py)
hands in what it sees and carries out the actions in their order.

The order that makes invariant I5 hold: lease, then identity check, then grants, then consumers map and compare; on the
way out consumers put the file's pages back, then the lease is given back and a waiting writer goes on.
"""

from __future__ import annotations

import enum
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final, NamedTuple

from .common import wire
from .common.events import MAX_EXAMPLES, path_text
from .common.wire import Verdict
from .consumer_wire import MAPPED_DIFFERENT, MAPPED_DONE, MAPPED_NO_ROOM

ConsumerId = int
Handle = int
FileId = int

VIEWS: Final[ConsumerId] = 0
"""The consumer that is the agent itself, for mounted views (views.py). Programs are numbered from 1."""


class FileKey(NamedTuple):
    """Names an inode while it exists."""

    dev: int
    ino: int


class FileIdentity(NamedTuple):
    """What tells one content of an inode from the next, as far as the kernel says it."""

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Observation:
    """One file as the scanner saw it: which pages are resident, and their root if that is all of them.

    `pages`: packed page numbers if only some are resident, None if all are. Fingerprints stay in the cache (cache.py).
    `classes`: as in wire.Roots. `proven`: what the root says of a page holds without reading it, as long as the
    identity is this one (cache.py). `resident`: some of it is; what is not is only told if it is proven.
    """

    path: bytes
    key: FileKey
    identity: FileIdentity
    root: bytes | None
    pages: bytes | None
    page_count: int
    zero_pages: int
    classes: bytes = wire.NO_CLASSES
    proven: bool = False
    resident: bool = True


class Stage(enum.Enum):
    """Where the shared side of a file is. The arrows are in `TRANSITIONS`."""

    PLAIN = enum.auto()  # consumers, if any, use the plain file
    LEASING = enum.auto()  # a read lease was asked for
    ASKING = enum.auto()  # the lease is held, grants were asked for
    SHARED = enum.auto()  # grants are held, consumers map them
    LEAVING = enum.auto()  # consumers were told to go back; the lease is held until they all have


TRANSITIONS: frozenset[tuple[Stage, Stage]] = frozenset(
    {
        (Stage.PLAIN, Stage.LEASING),  # a consumer is there and the broker has offered pages
        (Stage.LEASING, Stage.ASKING),  # lease taken, identity as reported
        (Stage.LEASING, Stage.PLAIN),  # no lease, another identity, or no link
        (Stage.ASKING, Stage.SHARED),  # granted
        (Stage.ASKING, Stage.PLAIN),  # denied, link lost, lease broken, nobody left
        (Stage.SHARED, Stage.LEAVING),  # withdrawn, lease broken, nobody left, more pages on offer
        (Stage.LEAVING, Stage.PLAIN),  # everybody is back on the plain file
    }
)


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A connection to the broker stands."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """There is no connection (any more), or none could be made."""

    why: str


@dataclass(frozen=True, slots=True)
class FromBroker:
    """A message from the broker that passed the codec."""

    message: wire.Message


@dataclass(frozen=True, slots=True)
class LinkReady:
    """The link has room for another batch of reports."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the scanner saw of some files."""

    files: tuple[Observation, ...]


@dataclass(frozen=True, slots=True)
class Vanished:
    """These paths name no file any more that could share."""

    paths: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """A consumer has mapped a file and waits for an answer."""

    consumer: ConsumerId
    handle: Handle
    key: FileKey


@dataclass(frozen=True, slots=True)
class Closed:
    """A consumer has unmapped a file."""

    consumer: ConsumerId
    handle: Handle


@dataclass(frozen=True, slots=True)
class ConsumerMapped:
    """A consumer answered Share."""

    consumer: ConsumerId
    handle: Handle
    generation: int
    pages: int
    outcome: int


@dataclass(frozen=True, slots=True)
class ConsumerLetGo:
    """A consumer answered Unshare."""

    consumer: ConsumerId
    handle: Handle
    generation: int


@dataclass(frozen=True, slots=True)
class ConsumerGone:
    """A consumer's connection has ended; its library puts the plain files back by itself."""

    consumer: ConsumerId


@dataclass(frozen=True, slots=True)
class LeaseTaken:
    """Outcome of TakeLease: held; the file had this identity with the lease in force."""

    key: FileKey
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class LeaseRefused:
    """Outcome of TakeLease: not held."""

    key: FileKey
    why: str


@dataclass(frozen=True, slots=True)
class LeaseBroken:
    """Somebody wants to write: the kernel holds him back until the lease is given back, or its own time is over."""

    key: FileKey


@dataclass(frozen=True, slots=True)
class Compared:
    """Outcome of ShareWith, if it was sent: so many of its pages are compared with the file, the rest is not read."""

    key: FileKey
    generation: int
    pages: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """Outcome of DropCache: pages that went from the guest's page cache, as the kernel counts them.

    `read`: of each file, pages that somebody had read again from the disk, or for the first time, while it was shared.
    """

    pages: int
    read: tuple[tuple[FileKey, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Detach:
    """The operator wants consumers back on plain files: of this path, or of all; until Reattach."""

    path: bytes | None


@dataclass(frozen=True, slots=True)
class Reattach:
    """End of Detach for everything."""


@dataclass(frozen=True, slots=True)
class Suspending:
    """This domain is about to be suspended, or was: what is mapped of grants is worth nothing afterwards (`xen`)."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The domain goes on, perhaps as another one. Follows Suspending."""


@dataclass(frozen=True, slots=True)
class DropNow:
    """Drop the guest's own copies of all shared files now, instead of at the next interval."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the guest's kernel says of memory, in bytes: the agent's own private memory, all, and what is available.

    `pressure`: PSI memory, some avg10, in hundredths of a percent; 0 where the kernel does not say.
    """

    private_bytes: int = 0
    total_bytes: int = 0
    available_bytes: int = 0
    pressure: int = 0


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; `memory` is what was seen of it, if anybody looked."""

    memory: Memory | None = None


Event = (
    LinkUp
    | LinkDown
    | FromBroker
    | LinkReady
    | Observed
    | Vanished
    | Opened
    | Closed
    | ConsumerMapped
    | ConsumerLetGo
    | ConsumerGone
    | LeaseTaken
    | LeaseRefused
    | LeaseBroken
    | Compared
    | Dropped
    | Detach
    | Reattach
    | Suspending
    | Resumed
    | DropNow
    | Tick
)


# --------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Connect:
    """Try to reach the broker. Outcome: LinkUp or LinkDown."""


@dataclass(frozen=True, slots=True)
class Hangup:
    """Close the connection to the broker. LinkDown does not follow."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the broker."""

    message: wire.Message


@dataclass(frozen=True, slots=True)
class SendPages:
    """Report the fingerprints of a wanted file, from the cache."""

    file: FileId
    path: bytes
    key: FileKey
    identity: FileIdentity
    root: bytes | None
    pages: bytes | None


@dataclass(frozen=True, slots=True)
class SendData:
    """Answer a fetch: read the pages, and send those that still have the fingerprints that were reported."""

    request: int
    path: bytes | None  # None: we have no such file; answer that nothing is there
    key: FileKey | None
    identity: FileIdentity | None
    runs: bytes


@dataclass(frozen=True, slots=True)
class StartScan:
    """Scan the designated folders under this key; `fresh`: forget what earlier scans said."""

    key: bytes
    epoch: bytes
    slots_per_segment: int
    min_file_bytes: int
    max_file_bytes: int
    include: tuple[str, ...]
    exclude: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rescan:
    """Look at this file again soon."""

    path: bytes


@dataclass(frozen=True, slots=True)
class TakeLease:
    """Take a read lease on the file, through the descriptor of a consumer. Outcome: LeaseTaken or LeaseRefused."""

    key: FileKey
    consumer: ConsumerId
    handle: Handle


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """Give the lease back. No outcome."""

    key: FileKey


@dataclass(frozen=True, slots=True)
class ShareWith:
    """Send a consumer the handles for its file: runs (page, handle, count); `grantor`: of which domain, on `xen`.

    `proven`: it need not compare pages that are not resident. Outcome: Compared, if it was sent.
    """

    consumer: ConsumerId
    handle: Handle
    generation: int
    runs: bytes
    grantor: int | None = None
    proven: bool = False


@dataclass(frozen=True, slots=True)
class UnshareWith:
    """Ask a consumer to put the file's own pages back."""

    consumer: ConsumerId
    handle: Handle
    generation: int


@dataclass(frozen=True, slots=True)
class CutOff:
    """Close a consumer's connection: it lets a writer wait for too long. Outcome: ConsumerGone."""

    consumer: ConsumerId


@dataclass(frozen=True, slots=True)
class StayPlain:
    """Tell a consumer that there is nothing to share for its file now, and why."""

    consumer: ConsumerId
    handle: Handle
    reason: str


@dataclass(frozen=True, slots=True)
class OfferToViews:
    """There are pages for a file: a mounted view may take it in. Outcome: Opened by VIEWS, if one does."""

    key: FileKey
    path: bytes


@dataclass(frozen=True, slots=True)
class LeaveViews:
    """A file that is in a view has lost its name. Outcome: Closed by VIEWS."""

    key: FileKey


@dataclass(frozen=True, slots=True)
class DropCache:
    """Drop the guest's own copy of these runs of a leased file, or all of it. Outcome: Dropped."""

    key: FileKey
    whole: bool
    runs: bytes


@dataclass(frozen=True, slots=True)
class RenewCache:
    """The same content has another identity now: keep its fingerprints."""

    key: FileKey
    old: FileIdentity
    new: FileIdentity


@dataclass(frozen=True, slots=True)
class ForgetSegments:
    """Close the descriptors of these segments; None: of all (they belong to another area or come again)."""

    segments: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Log:
    """One event for the log."""

    event: str
    fields: dict[str, object]


Action = (
    Connect
    | Hangup
    | Send
    | SendPages
    | SendData
    | StartScan
    | Rescan
    | TakeLease
    | ReleaseLease
    | ShareWith
    | UnshareWith
    | CutOff
    | StayPlain
    | OfferToViews
    | LeaveViews
    | DropCache
    | RenewCache
    | ForgetSegments
    | Log
)


# ---------------------------------------------------------------------------------------------------------- state


PRESSURE_MARKS: Final = (100, 1000, 2000)
"""Memory pressure, in hundredths of a percent, that the broker hears of at once: where it begins to act otherwise
(Settings of its reclaim.py)."""


_SOON: Final = 1.0  # seconds
_PATIENCE: Final = 0.5  # seconds that a consumer waits for what the broker says of a file that nobody has read


@dataclass(frozen=True, slots=True)
class Settings:
    """Who the agent is and how it behaves; times in seconds."""

    name: str
    version: str
    instance: bytes  # 16 random bytes, new for every start
    drop: bool = True
    drop_interval: float = 5.0
    stats_interval: float = 10.0
    lease_timeout: float = 1.0
    retry: float = 2.0  # pause before a file whose lease was refused is tried again
    store_retry: float = 30.0  # pause before grants are asked for again that the broker could not record
    room_retry: float = 30.0  # pause before grants are asked for again that no consumer had room to map
    room_tries: int = 4  # and how often
    reconnect_min: float = 0.2
    reconnect_max: float = 30.0
    max_attached_files: int = 16_384
    events_interval: float = 10.0  # one line per kind of event and reason in as long
    drop_batch: int = 256
    views: bool = False  # whether files on offer may be taken into mounted views
    mappings_off: str = ""  # why nothing may be shared with programs of this guest, as a reason code; "": it may


@dataclass(frozen=True, slots=True)
class _Version:
    id: FileId
    identity: FileIdentity
    root: bytes | None
    pages: bytes | None
    page_count: int
    zero_pages: int
    classes: bytes
    proven: bool
    resident: bool  # reported as a copy that the guest has in memory


@dataclass(slots=True, eq=False)
class _Use:
    """One mapping of a file by one consumer."""

    generation: int = 0  # of the Share or Unshare that was sent last
    pages: int = 0
    answered: bool = True  # the consumer was told what it gets, Share or Plain
    leaving: bool = False
    no_room: bool = False  # it could not map what it was sent
    patient_until: float = 0.0  # when it is told that its file stays plain, if nothing better has come by then


@dataclass(slots=True, eq=False)
class _File:
    key: FileKey
    paths: dict[bytes, None] = field(default_factory=dict)
    version: _Version | None = None
    stale: bool = False  # this version is not the file's content any more
    successor: _Version | None = None  # the version to report once nothing of this one is shared
    reported: bool = False  # the broker was sent this version on this connection
    verdict: int | None = None
    available: int = 0
    stage: Stage = Stage.PLAIN
    leased: bool = False
    broken: bool = False
    uses: dict[tuple[ConsumerId, Handle], _Use] = field(default_factory=dict)
    generation: int = 0
    runs: bytes = b""
    granted_pages: int = 0
    grantor: int | None = None
    refusal: str = ""  # reason code of a refusal that holds until the broker offers or grants pages
    unmapped: frozenset[tuple[ConsumerId, Handle]] = frozenset()  # the uses at a time when none of them could map
    in_vain: int = 0  # how often that was so, one time after the other
    retry_at: float = 0.0
    leaving_since: float = 0.0
    hung_logged: bool = False
    poisoned: bool = False  # a consumer found other bytes: this version is not shared again
    detached: bool = False
    dropped: bool = False  # the drop after attaching was asked for
    compared: bool = False  # it was told how much of it was read when it was shared; in views nobody tells
    read_pages: int = 0  # of this version, known to have been read from the disk; a page read twice counts twice
    unread_pages: int = 0  # of this version, shared without having been read


class Agent:
    """The agent's decisions. One object per agent; not thread-safe. `jitter()` returns a number in [0, 1)."""

    def __init__(self, settings: Settings, jitter: Callable[[], float]) -> None:
        self.settings = settings
        self._jitter = jitter
        self._now = 0.0
        self._actions: list[Action] = []
        self._files: dict[FileKey, _File] = {}
        self._by_id: dict[FileId, _File] = {}
        self._by_path: dict[bytes, _File] = {}
        self._uses: dict[tuple[ConsumerId, Handle], _File] = {}
        self._unreported: dict[FileKey, None] = {}
        self._next_id = 0
        self._linked = False
        self._connecting = False
        self._welcome: wire.Welcome | None = None
        self._failures = 0
        self._connect_at = 0.0
        self._stats_at = 0.0
        self._drop_at = 0.0
        self._drop_queue: deque[FileKey] = deque()
        self._dropped_total = 0
        self._detach_all = False
        self._detached_paths: set[bytes] = set()
        self._suspending = False
        self._grantor: int | None = None  # of the handles in the next Granted
        self._asked: set[FileId] = set()  # Attach was sent, and neither Granted nor Denied has come
        self._segments: set[int] = set()  # that the runner has descriptors of
        self._gone: list[FileId] = []
        self._release: list[FileId] = []
        self._attach: list[FileId] = []
        self._memory = Memory()
        self._told = Memory()  # what the broker heard of it last
        self._shared_keys: set[FileKey] = set()  # SHARED and LEAVING
        self._crowded: dict[FileKey, None] = {}  # files that wait until fewer than max_attached_files are shared
        self._again: dict[FileKey, None] = {}  # plain files to advance at the next tick
        self._patient: dict[tuple[ConsumerId, Handle], None] = {}  # uses that have not been answered yet
        self._unread_past = 0  # of versions that are no more
        self._area = b""
        self._epoch = b""
        self._refused = ""
        self._tally: dict[tuple[str, str], tuple[dict[str, int], list[str]]] = {}  # by event and reason
        self._tally_at = 0.0

    # ------------------------------------------------------------------------------------------------- the way in

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time `now` (seconds, any steady clock) and return what to do, in order."""
        return self.handle_all((event,), now)

    def handle_all(self, events: Iterable[Event], now: float) -> list[Action]:
        """Take events that have all happened, in their order; what goes to the broker goes in one message of a kind."""
        self._now = now
        for event in events:
            self._take(event)
        return self._finish()

    def _take(self, event: Event) -> None:
        match event:
            case FromBroker():
                self._on_message(event.message)
            case LinkReady():
                self._report_more()
            case Observed():
                for seen in event.files:
                    self._on_observed(seen)
            case Vanished():
                for path in event.paths:
                    self._on_vanished(path)
            case Opened():
                self._on_opened(event)
            case Closed():
                self._on_use_ended((event.consumer, event.handle))
            case ConsumerMapped():
                self._on_mapped(event)
            case ConsumerLetGo():
                self._on_let_go(event)
            case ConsumerGone():
                for use in [use for use in self._uses if use[0] == event.consumer]:
                    self._on_use_ended(use)
            case LeaseTaken():
                self._on_lease_taken(event)
            case LeaseRefused():
                self._on_lease_refused(event)
            case LeaseBroken():
                self._on_lease_broken(event.key)
            case Compared():
                self._on_compared(event)
            case Dropped():
                self._dropped_total += event.pages
                for key, pages in event.read:
                    if key in self._files:
                        self._count_read(self._files[key], pages)
                self._say_stats_soon()
            case Detach():
                self._on_detach(event.path)
            case Reattach():
                self._on_reattach()
            case Suspending():
                self._on_suspending()
            case Resumed():
                self._on_resumed()
            case DropNow():
                for key in self._shared_keys:
                    if self._files[key].stage is Stage.SHARED:
                        self._drop(self._files[key])
            case LinkUp():
                self._on_link_up()
            case LinkDown():
                self._on_link_down(event.why)
            case Tick():
                self._memory = event.memory or self._memory
                self._on_tick()

    def _finish(self) -> list[Action]:
        for ids, message, most in (
            (self._gone, wire.Gone, wire.MAX_CHANGES),
            (self._release, wire.Release, wire.MAX_CHANGES),
            (self._attach, wire.Attach, wire.MAX_ATTACH),
        ):
            if self._welcome is not None:
                for at in range(0, len(ids), most):
                    self._act(Send(message(array("I", ids[at : at + most]).tobytes())))
            elif self._linked:
                continue  # Hello said what is held; what was let go since must follow Welcome
            ids.clear()
        actions, self._actions = self._actions, []
        return actions

    def _act(self, action: Action) -> None:
        self._actions.append(action)

    def _log(self, event: str, **fields: object) -> None:
        self._actions.append(Log(event, fields))

    def _count(self, event: str, reason: str, file: _File, **counts: int) -> None:
        """Count what would be too many lines; the sums are logged in intervals, with the first few paths."""
        sums, examples = self._tally.setdefault((event, reason), ({}, []))
        for name, count in ({"files": 1} | counts).items():
            sums[name] = sums.get(name, 0) + count
        if file.paths and len(examples) < MAX_EXAMPLES:
            examples.append(path_text(next(iter(file.paths))))

    def last_words(self) -> list[Action]:
        """Return the lines that were still being gathered."""
        self._log_tallies()
        return self._finish()

    def _log_tallies(self) -> None:
        self._tally_at = self._now + self.settings.events_interval
        for (event, reason), (sums, examples) in self._tally.items():
            self._log(event, reason=reason, **sums, **({"examples": examples} if examples else {}))
        self._tally.clear()

    def _to(self, file: _File, stage: Stage) -> None:
        if (file.stage, stage) not in TRANSITIONS:
            raise RuntimeError(f"no transition from {file.stage.name} to {stage.name}")
        file.stage = stage

    # -------------------------------------------------------------------------------------------------- the link

    def _on_link_up(self) -> None:
        self._connecting, self._linked = False, True
        held = [
            file.version.id
            for file in self._files.values()
            if file.version is not None and file.stage in (Stage.SHARED, Stage.LEAVING)
        ][: wire.MAX_HELD]
        settings = self.settings
        self._act(
            Send(
                wire.Hello(
                    wire.PROTOCOL_VERSION,
                    settings.version,
                    settings.name,
                    settings.instance,
                    array("I", held).tobytes(),
                )
            )
        )

    def _on_link_down(self, why: str) -> None:
        was_linked, self._linked, self._connecting = self._linked, False, False
        had_welcome, self._welcome = self._welcome is not None, None
        self._grantor = None
        if was_linked or self._failures == 0:
            self._log("broker.lost" if was_linked else "broker.unreachable", detail=why)
        self._back_off()
        if not had_welcome:
            return
        self._unreported.clear()
        self._asked.clear()
        for file in list(self._files.values()):
            file.reported, file.verdict, file.available = False, None, 0
            if file.version is not None:
                self._unreported[file.key] = None
            if file.stage in (Stage.LEASING, Stage.ASKING):
                self._settle_plain(file, "no-broker")

    def _back_off(self, least: float = 0.0) -> None:
        settings = self.settings
        pause = min(settings.reconnect_max, settings.reconnect_min * 2 ** min(self._failures, 16))
        self._failures += 1
        self._connect_at = self._now + max(least, pause * (0.5 + 0.5 * self._jitter()))

    def _on_message(self, message: wire.Message) -> None:
        match message:
            case wire.Welcome():
                self._on_welcome(message)
            case wire.Refused():
                self._refused = f"{message.reason}: {message.text}"
                self._log("domain.refused", reason=message.reason, detail=message.text)
                self._act(Hangup())
                self._on_link_down(f"refused: {message.reason}")
                self._back_off(message.retry_ms / 1000 or self.settings.reconnect_max)
            case wire.Verdicts():
                for file_id, verdict in zip(array("I", message.ids), message.verdicts, strict=True):
                    self._on_verdict(file_id, verdict)
            case wire.Fetch():
                self._on_fetch(message)
            case wire.Offer():
                for file_id, available in zip(array("I", message.ids), array("I", message.available), strict=True):
                    file = self._current(file_id)
                    if file is not None:
                        file.available, file.refusal, file.in_vain = available, "", 0
                        self._offer_to_views(file)
                        self._advance(file)
            case wire.Grantor():
                self._grantor = message.domid
            case wire.Granted():
                self._on_granted(message)
            case wire.Denied():
                for file_id, reason in zip(array("I", message.ids), message.reasons, strict=True):
                    self._on_denied(file_id, reason)
            case wire.Withdraw():
                self._on_withdraw(message)
            case wire.Segment():
                self._segments.add(message.segment)  # the runner keeps the descriptor
            case wire.Retired():
                self._forget_segments(array("I", message.segments))
            case wire.Ping():
                self._act(Send(wire.Pong(message.number)))
            case _:
                pass

    def _forget_segments(self, segments: Iterable[int]) -> None:
        gone = tuple(segment for segment in segments if segment in self._segments)
        self._segments.difference_update(gone)
        if gone:
            self._act(ForgetSegments(gone))

    def _on_welcome(self, welcome: wire.Welcome) -> None:
        self._welcome = welcome
        self._failures = 0
        self._refused = ""
        if welcome.area != self._area:
            # Handles of another area: the broker knows nothing of them any more, the mappings stay good until let go.
            self._area = welcome.area
            self._segments.clear()
            self._act(ForgetSegments(None))
            for key in list(self._shared_keys):
                self._leave(self._files[key], "other-area")
        elif self._segments:
            # Some may have been closed meanwhile; what is needed again comes with the next grant.
            used = {
                slot // welcome.slots_per_segment
                for key in self._shared_keys
                for slot in array("I", self._files[key].runs)[1::3]
            }
            self._forget_segments(sorted(self._segments - used))
        self._act(
            StartScan(
                welcome.key,
                welcome.epoch,
                welcome.slots_per_segment,
                welcome.min_file_bytes,
                welcome.max_file_bytes,
                welcome.include,
                welcome.exclude,
            )
        )
        self._log("domain.joined", domain=welcome.domain, pool=welcome.pool)
        if welcome.epoch != self._epoch:
            self._epoch = welcome.epoch
            self._forget_versions()
        for file in self._files.values():
            if file.version is not None and file.paths:
                self._unreported[file.key] = None
        self._say_stats()

    def _forget_versions(self) -> None:
        """Fingerprints under another key say nothing: the scanner brings new ones."""
        for file in list(self._files.values()):
            if file.stage is Stage.PLAIN:
                self._replace(file, None)
            else:
                file.stale = True
                self._leave(file, "other-key")

    def _current(self, file_id: FileId) -> _File | None:
        """Return the file whose current version has this number; late news of earlier versions is passed over."""
        return self._by_id.get(file_id)

    # ----------------------------------------------------------------------------------------------- what is there

    def _on_observed(self, seen: Observation) -> None:
        file = self._files.get(seen.key)
        if file is None:
            file = self._files[seen.key] = _File(seen.key)
        other = self._by_path.get(seen.path)
        if other is not None and other is not file:
            self._forget_path(seen.path)
        self._by_path[seen.path] = file
        file.paths[seen.path] = None
        if self._detach_all or seen.path in self._detached_paths:
            file.detached = True
            self._leave(file, "detached")
        version = file.version
        # A file that was too young to be trusted may turn out to be another one with the same times.
        other_root = version is not None and None not in (version.root, seen.root) and version.root != seen.root
        if version is not None and version.identity == seen.identity and not file.stale and not other_root:
            file.successor = None
            if seen.proven and not version.proven and seen.root == version.root:
                version = file.version = replace(version, proven=True)
            if not version.resident and seen.resident and seen.page_count:
                # It is a copy now, also if it is shared: the number stays.
                file.version = replace(version, resident=True)
                file.reported = False
                self._unreported[file.key] = None
            if version.root is not None or not seen.page_count:
                return  # what is resident changes by itself, a content does not
            if file.stage is Stage.PLAIN:
                if version.pages == seen.pages and version.root == seen.root:
                    return
            elif seen.root is None and seen.page_count < 2 * version.page_count:
                return  # consumers go back to the plain file for much more only: as often as it can double
        elif version is not None and file.stage is Stage.SHARED and not file.broken and not file.stale:
            if version.identity.size == seen.identity.size and not other_root:
                # Nobody could write under the lease: times or links changed, the bytes did not.
                file.version = replace(version, identity=seen.identity)
                self._act(RenewCache(file.key, version.identity, seen.identity))
                return
        fresh = None
        if seen.page_count:
            self._next_id += 1
            fresh = _Version(
                self._next_id,
                seen.identity,
                seen.root,
                seen.pages,
                seen.page_count,
                seen.zero_pages,
                seen.classes,
                seen.proven,
                seen.resident,
            )
        if file.stage is Stage.PLAIN:
            self._replace(file, fresh)
        else:
            file.successor, file.stale = fresh, True
            self._leave(file, "changed")

    def _replace(self, file: _File, fresh: _Version | None) -> None:
        """Give a file that shares nothing another version, or none; the broker is told that the old one is gone."""
        old = file.version
        if old is not None:
            del self._by_id[old.id]
            if file.reported:
                self._gone.append(old.id)
        file.version, file.successor = fresh, None
        file.reported, file.verdict, file.available, file.refusal = False, None, 0, ""
        file.poisoned = file.stale = False
        if old is None or fresh is None or old.identity != fresh.identity:
            self._unread_past += file.unread_pages
            file.read_pages = file.unread_pages = 0
        self._unreported.pop(file.key, None)
        if fresh is not None:
            self._by_id[fresh.id] = file
            self._unreported[file.key] = None
        elif not file.uses and not file.paths:
            self._files.pop(file.key, None)

    def _on_vanished(self, path: bytes) -> None:
        if path in self._by_path:
            self._forget_path(path)

    def _forget_path(self, path: bytes) -> None:
        file = self._by_path.pop(path)
        file.paths.pop(path, None)
        if file.paths:
            return
        if any(consumer == VIEWS for consumer, _ in file.uses):
            self._act(LeaveViews(file.key))
        if file.stage is Stage.PLAIN:
            self._replace(file, None)
        elif file.stage in (Stage.LEASING, Stage.ASKING):
            self._settle_plain(file, "deleted")
        # a shared file that has lost its name is still what its consumers opened: it stays until they close it

    def _report_more(self) -> None:
        """Send the next batch of roots."""
        if self._welcome is None or not self._unreported:
            return
        ids, sizes, counts = array("I"), array("Q"), array("I")
        roots: list[bytes] = []
        paths: list[bytes] = []
        classes: list[bytes] = []
        room = wire.MAX_FRAME // 2
        while self._unreported and len(ids) < wire.MAX_REPORT_FILES and room > 0:
            key = next(iter(self._unreported))
            del self._unreported[key]
            file = self._files[key]
            version = file.version
            if version is None or not file.paths or file.reported or file.stale:
                continue
            path = next(iter(file.paths))
            file.reported = True
            ids.append(version.id)
            sizes.append(version.identity.size)
            counts.append(version.page_count if version.resident else 0)
            roots.append(version.root if version.root is not None else wire.NO_ROOT)
            paths.append(path)
            classes.append(version.classes)
            room -= len(path)
        if ids:
            columns = (ids.tobytes(), sizes.tobytes(), counts.tobytes(), b"".join(roots), tuple(paths))
            self._act(Send(wire.Roots(*columns, b"".join(classes))))
        if not self._unreported:
            self._say_stats_soon()

    @property
    def reporting(self) -> bool:
        """Return whether LinkReady would bring something."""
        return self._welcome is not None and bool(self._unreported)

    @property
    def programs_share(self) -> bool:
        """Whether a program may have something shared mapped by itself: not through a view."""
        return any(consumer != VIEWS for key in self._shared_keys for consumer, _ in self._files[key].uses)

    def _on_verdict(self, file_id: FileId, verdict: int) -> None:
        file = self._current(file_id)
        if file is None or file.version is None:
            return
        file.verdict = verdict
        if verdict == Verdict.NOT_REPORTED:  # its pages came too late: once more
            file.reported = False
            self._unreported[file.key] = None
        elif verdict == Verdict.WANTED:
            version, path = file.version, next(iter(file.paths), b"")
            self._act(SendPages(file_id, path, file.key, version.identity, version.root, version.pages))
        elif verdict == Verdict.NOT_RESIDENT:
            for use in file.uses:
                self._plain(file, use, Verdict.NOT_RESIDENT.code)

    def _on_fetch(self, fetch: wire.Fetch) -> None:
        file = self._current(fetch.file)
        if file is None or file.version is None or not file.paths:
            self._act(SendData(fetch.request, None, None, None, fetch.runs))
        else:
            self._act(SendData(fetch.request, next(iter(file.paths)), file.key, file.version.identity, fetch.runs))

    # ------------------------------------------------------------------------------------------------- consumers

    def _offer_to_views(self, file: _File) -> None:
        if not self.settings.views or not file.available or not file.paths:
            return
        if all(consumer != VIEWS for consumer, _ in file.uses):
            self._act(OfferToViews(file.key, next(iter(file.paths))))

    def _on_opened(self, opened: Opened) -> None:
        file = self._files.get(opened.key)
        if file is None:
            file = self._files[opened.key] = _File(opened.key, detached=self._detach_all)
        use = (opened.consumer, opened.handle)
        if use in self._uses:
            return  # a handle that is in use: the consumer's own mistake, and its own loss
        self._uses[use] = file
        file.uses[use] = _Use(answered=False)
        if file.stage is Stage.SHARED:
            self._share(file, use)
        elif file.stage is Stage.LEAVING:
            self._plain(file, use, "moving")
        else:
            if file.verdict == Verdict.NOT_RESIDENT and file.paths and self._welcome is not None:
                # Somebody else may have brought it meanwhile, and now it matters.
                file.reported, file.verdict = False, None
                self._unreported[file.key] = None
            self._advance(file)
            if file.stage is Stage.PLAIN:
                if self._may_come(file):
                    file.uses[use].patient_until = self._now + _PATIENCE
                    self._patient[use] = None
                else:
                    self._plain(file, use, self._why_plain(file))
                if file.paths and (file.version is None or file.version.root is None):
                    # Somebody uses it: more of it may be resident than at the last scan, and the next may be far.
                    self._act(Rescan(next(iter(file.paths))))

    def _may_come(self, file: _File) -> bool:
        """Return whether the broker is about to say if it has what nobody here has read: worth a moment's wait."""
        return (
            self._welcome is not None
            and file.version is not None
            and not file.version.resident
            and file.verdict in (None, Verdict.KNOWN)
            and not file.available
            and self._barred(file) is None
        )

    def _why_plain(self, file: _File) -> str:
        """Return the reason code for a file that is not shared now."""
        if self.settings.mappings_off:
            return self.settings.mappings_off
        if self._welcome is None:
            return "no-broker"
        if (barred := self._barred(file)) is not None:
            return barred
        if file.version is None:
            return "not-designated"
        if file.poisoned:
            return "bytes-differed"
        if file.verdict is not None and file.verdict not in (Verdict.KNOWN, Verdict.WANTED):
            return _code(file.verdict)
        if file.refusal:
            return file.refusal
        if not file.available:
            return "not-offered"
        return "lease-refused"

    def _barred(self, file: _File) -> str | None:
        """Return why a file is kept plain for now, whatever the broker offers; None if it is not."""
        if self.settings.mappings_off:
            return self.settings.mappings_off
        if self._suspending:
            return "suspending"
        if file.detached:
            return "detached"
        in_vain = file.in_vain >= self.settings.room_tries and file.unmapped == file.uses.keys()
        return "no-room" if in_vain else None

    def _plain(self, file: _File, use: tuple[ConsumerId, Handle], reason: str) -> None:
        if not file.uses[use].answered:
            file.uses[use].answered = True
            self._count("files.plain", reason, file)
            self._act(StayPlain(*use, reason))

    def _advance(self, file: _File) -> None:
        """Go on towards sharing, if everything for the next step is there."""
        if file.stage is Stage.SHARED:
            if file.available > file.granted_pages and self._barred(file) is None:
                self._leave(file, "more-offered")  # more pages are on offer: let go and ask again
            return
        if (
            file.stage is Stage.PLAIN
            and file.uses
            and file.available
            and file.version is not None
            and self._welcome is not None
            and not file.poisoned
            and self._barred(file) is None
            and not file.stale
            and file.version.id not in self._asked
        ):
            if self._now < file.retry_at:
                self._again[file.key] = None
                return
            if len(self._shared_keys) >= self.settings.max_attached_files:
                self._crowded[file.key] = None
                return
            self._to(file, Stage.LEASING)
            self._act(TakeLease(file.key, *next(iter(file.uses))))

    def _on_lease_taken(self, taken: LeaseTaken) -> None:
        file = self._files.get(taken.key)
        if file is None or file.stage is not Stage.LEASING:
            self._act(ReleaseLease(taken.key))
            return
        file.leased = True
        if file.broken or not file.uses:
            self._settle_plain(file, "lease-broken" if file.broken else "closed")
            return
        if (barred := self._barred(file)) is not None:
            self._settle_plain(file, barred)
            return
        if file.version is None or taken.identity != file.version.identity:
            for path in file.paths:
                self._act(Rescan(path))
            file.retry_at = self._now + self.settings.retry
            self._settle_plain(file, "changed")
            return
        self._to(file, Stage.ASKING)
        self._attach.append(file.version.id)
        self._asked.add(file.version.id)

    def _on_lease_refused(self, refused: LeaseRefused) -> None:
        file = self._files.get(refused.key)
        if file is not None and file.stage is Stage.LEASING:
            file.retry_at = self._now + self.settings.retry
            self._settle_plain(file, "lease-refused")

    def _settle_plain(self, file: _File, reason: str) -> None:
        """Go back to plain from a stage in which no consumer maps anything shared."""
        self._to(file, Stage.PLAIN)
        file.runs, file.granted_pages = b"", 0
        if file.leased:
            file.leased = False
            self._act(ReleaseLease(file.key))
        if file.broken:
            file.broken = False
            file.retry_at = self._now + self.settings.retry
            for path in file.paths:
                self._act(Rescan(path))
        for use in file.uses:
            self._plain(file, use, reason)
        if file.stale:
            self._replace(file, file.successor)
        elif not file.paths:
            self._replace(file, None)
        else:
            self._advance_later(file)

    def _advance_later(self, file: _File) -> None:
        if file.uses and file.available and self._barred(file) is None and not file.poisoned:
            self._again[file.key] = None

    def _on_denied(self, file_id: FileId, reason: int) -> None:
        self._asked.discard(file_id)
        file = self._current(file_id)
        if file is None:
            return
        file.refusal = _code(reason) if reason in (Verdict.GRANT_BUDGET, Verdict.DETACHED) else ""
        if reason in (Verdict.STORE_FULL, Verdict.GRANT_BUDGET):
            file.retry_at = self._now + self.settings.store_retry
        elif file.stage is Stage.ASKING:
            file.available = 0
        if file.stage is Stage.ASKING:
            self._settle_plain(file, file.refusal or "denied")
        else:
            self._advance_later(file)

    def _on_granted(self, granted: wire.Granted) -> None:
        self._asked.discard(granted.file)
        file = self._current(granted.file)
        barred = self._barred(file) if file is not None else None
        if file is None or file.stage is not Stage.ASKING or not file.uses or barred is not None or file.stale:
            # Nobody waits for it any more: give it back.
            self._release.append(granted.file)
            if file is not None and file.stage is Stage.ASKING:
                self._settle_plain(file, barred or "closed")
            elif file is not None:
                self._advance_later(file)
            return
        self._to(file, Stage.SHARED)
        self._shared_keys.add(file.key)
        file.runs, file.grantor, file.refusal = granted.runs, self._grantor, ""
        file.granted_pages = sum(array("I", granted.runs)[2::3])
        file.generation += 1
        file.dropped = file.compared = False
        for use in file.uses:
            self._share(file, use)

    def _share(self, file: _File, use: tuple[ConsumerId, Handle]) -> None:
        entry = file.uses[use]
        entry.generation, entry.pages, entry.leaving, entry.answered = file.generation, 0, False, True
        entry.no_room = False
        proven = file.version is not None and file.version.proven
        self._act(ShareWith(*use, file.generation, file.runs, file.grantor, proven))

    def _on_mapped(self, mapped: ConsumerMapped) -> None:
        use = (mapped.consumer, mapped.handle)
        file = self._uses.get(use)
        if file is None or file.uses[use].generation != mapped.generation or file.uses[use].leaving:
            return
        file.uses[use].pages = mapped.pages
        if mapped.outcome == MAPPED_DIFFERENT:
            file.poisoned = True
            path = next(iter(file.paths), b"")
            self._log("file.mismatch", path=path_text(path), consumer=mapped.consumer)
            self._leave(file, "bytes-differed")
        elif mapped.outcome == MAPPED_DONE and file.stage is Stage.SHARED:
            file.in_vain = 0
            self._drop_if_complete(file)
        elif mapped.outcome == MAPPED_NO_ROOM and file.stage is Stage.SHARED:
            file.uses[use].no_room = True
            self._give_up_unmapped(file)

    def _on_compared(self, compared: Compared) -> None:
        file = self._files.get(compared.key)
        if file is not None and file.stage is Stage.SHARED and file.generation == compared.generation:
            file.compared = True
            self._count_read(file, compared.pages)

    def _count_read(self, file: _File, pages: int) -> None:
        """Take note that pages of a file that is shared have been read from its disk, by whom and whenever it was."""
        if file.stage is Stage.SHARED and file.compared:
            file.read_pages += pages
            file.unread_pages = max(0, file.granted_pages - file.read_pages)

    def _give_up_unmapped(self, file: _File) -> None:
        """Give back grants that no consumer could map, and try again; in the end only with others or another offer."""
        if file.uses and all(use.no_room for use in file.uses.values()):
            file.unmapped, file.in_vain = frozenset(file.uses), file.in_vain + 1
            file.retry_at = self._now + self.settings.room_retry
            self._leave(file, "no-room")

    def _drop_if_complete(self, file: _File) -> None:
        if self.settings.drop and not file.dropped and all(use.pages for use in file.uses.values()):
            file.dropped = True
            self._drop(file)

    def _drop(self, file: _File) -> None:
        if file.version is not None:
            # Dropping goes by whole folios: one call over a file gets more of it than many over its parts. What is not
            # in the area is dropped along only where that is little, and known: else it would never be seen.
            pages = -(-file.version.identity.size // wire.PAGE_SIZE)
            whole = file.version.root is not None and file.granted_pages * 10 >= pages * 9
            self._act(DropCache(file.key, whole, file.runs))

    def _leave(self, file: _File, reason: str) -> None:
        """Bring every consumer of a shared file back to the plain file."""
        if file.stage is not Stage.SHARED:
            return
        size = file.version.identity.size if file.version is not None else 0
        self._count("files.returned", reason, file, pages=file.granted_pages, file_bytes=size)
        self._to(file, Stage.LEAVING)
        file.leaving_since, file.hung_logged = self._now, False
        for use, entry in file.uses.items():
            entry.leaving = True
            self._act(UnshareWith(*use, entry.generation))
        self._finish_leaving(file)

    def _on_let_go(self, let_go: ConsumerLetGo) -> None:
        use = (let_go.consumer, let_go.handle)
        file = self._uses.get(use)
        if file is None or file.stage is not Stage.LEAVING or file.uses[use].generation != let_go.generation:
            return
        file.uses[use].leaving, file.uses[use].pages = False, 0
        self._finish_leaving(file)

    def _on_use_ended(self, use: tuple[ConsumerId, Handle]) -> None:
        file = self._uses.pop(use, None)
        if file is None:
            return
        self._patient.pop(use, None)
        del file.uses[use]
        if file.stage is Stage.LEAVING:
            self._finish_leaving(file)
        elif file.stage is Stage.SHARED:
            if file.uses:
                self._drop_if_complete(file)
                self._give_up_unmapped(file)
            else:
                self._leave(file, "closed")
        elif file.stage is Stage.ASKING and not file.uses:
            # With the last descriptor the lease goes; whoever opens the file next needs a new one.
            self._settle_plain(file, "closed")
        elif file.stage is Stage.PLAIN and not file.uses and not file.paths:
            self._replace(file, None)

    def _finish_leaving(self, file: _File) -> None:
        if file.stage is not Stage.LEAVING or any(use.leaving for use in file.uses.values()):
            return
        self._shared_keys.discard(file.key)
        if file.version is not None:
            self._release.append(file.version.id)
        self._settle_plain(file, "withdrawn")

    def _on_lease_broken(self, key: FileKey) -> None:
        file = self._files.get(key)
        if file is None or not (file.leased or file.stage is Stage.LEASING):
            self._act(ReleaseLease(key))
            return
        file.broken = True  # while LEASING this may be about the lease before: `_on_lease_taken` gives it back
        if file.stage is Stage.SHARED:
            self._leave(file, "writer")
        elif file.stage is Stage.ASKING:
            # Should the broker grant all the same, `_on_granted` gives it back.
            self._settle_plain(file, "lease-broken")

    def _on_withdraw(self, withdraw: wire.Withdraw) -> None:
        for file_id in array("I", withdraw.ids):
            file = self._current(file_id)
            if file is not None and withdraw.reason == wire.WithdrawReason.OPERATOR:
                # Until the broker offers again: it would refuse.
                file.available, file.refusal = 0, Verdict.DETACHED.code
            if file is None or file.stage in (Stage.PLAIN, Stage.LEASING):
                self._release.append(file_id)
            elif file.stage is Stage.SHARED:
                self._leave(file, "broker")

    def _on_detach(self, path: bytes | None) -> None:
        if path is None:
            self._detach_all = True
            files: Iterable[_File] = list(self._files.values())
        else:
            self._detached_paths.add(path)
            one = self._by_path.get(path)
            files = [one] if one is not None else []
        for file in files:
            file.detached = True
            self._leave(file, "detached")

    def _on_reattach(self) -> None:
        self._detach_all = False
        self._detached_paths.clear()
        for file in list(self._files.values()):
            file.detached = False
            self._advance(file)

    def _on_suspending(self) -> None:
        self._suspending = True
        for key in list(self._shared_keys):
            self._leave(self._files[key], "suspending")

    def _on_resumed(self) -> None:
        self._suspending = False
        for file in list(self._files.values()):
            self._advance(file)

    # ------------------------------------------------------------------------------------------------------- time

    def _on_tick(self) -> None:
        if not self._linked and not self._connecting and self._now >= self._connect_at:
            self._connecting = True
            self._act(Connect())
        for use in [use for use in self._patient if self._now >= self._uses[use].uses[use].patient_until]:
            del self._patient[use]
            asked = self._uses[use]
            if asked.stage is Stage.PLAIN:
                self._plain(asked, use, self._why_plain(asked))
        again, self._again = self._again, {}
        for key in again:
            file = self._files.get(key)
            if file is not None and file.stage is Stage.PLAIN:
                self._advance(file)
        for key in list(islice(self._crowded, max(0, self.settings.max_attached_files - len(self._shared_keys)))):
            del self._crowded[key]
            file = self._files.get(key)
            if file is not None:
                self._advance(file)
        if self._welcome is not None and (self._now >= self._stats_at or self._memory_dwindles()):
            self._say_stats()
        if self._now >= self._tally_at:
            self._log_tallies()
        if self.settings.drop and self._now >= self._drop_at:
            self._drop_at = self._now + self.settings.drop_interval
            if not self._drop_queue:
                self._drop_queue.extend(self._shared_keys)
        for _ in range(min(len(self._drop_queue), self.settings.drop_batch)):
            file = self._files.get(self._drop_queue.popleft())
            if file is not None and file.stage is Stage.SHARED and file.dropped:
                self._drop(file)
        for key in self._shared_keys:
            file = self._files[key]
            if (
                file.stage is Stage.LEAVING
                and not file.hung_logged
                and self._now - file.leaving_since > self.settings.lease_timeout
            ):
                file.hung_logged = True
                hung = sorted({use[0] for use, entry in file.uses.items() if entry.leaving})
                self._log("consumer.hung", path=path_text(next(iter(file.paths), b"")), consumers=hung)
                for consumer in hung:
                    self._act(CutOff(consumer))

    # ------------------------------------------------------------------------------------------------- looking in

    def _say_stats(self) -> None:
        self._stats_at = self._now + self.settings.stats_interval
        self._told = self._memory
        self._act(Send(self._stats()))

    def _say_stats_soon(self) -> None:
        """Something has come to an end for now: the broker need not wait for the next interval to hear of it."""
        self._stats_at = min(self._stats_at, self._now + _SOON)

    def _memory_dwindles(self) -> bool:
        """Whether the broker should hear at once, so that it gives memory back before the guest runs short of it."""
        less = self._told.available_bytes - self._memory.available_bytes
        if less > self._memory.total_bytes // 32:
            return True
        return any(self._told.pressure < mark <= self._memory.pressure for mark in PRESSURE_MARKS)

    def _stats(self) -> wire.AgentStats:
        versions = [file.version for file in self._files.values() if file.version is not None]
        shared = [self._files[key] for key in self._shared_keys]
        return wire.AgentStats(
            len(versions),
            sum(version.page_count for version in versions if version.resident),
            sum(version.zero_pages for version in versions if version.resident),
            len(shared),
            sum(use.pages for file in shared for use in file.uses.values()),
            self._dropped_total,
            self._unread_past + sum(file.unread_pages for file in self._files.values()),
            self._memory.private_bytes,
            self._memory.total_bytes,
            self._memory.available_bytes,
            self._memory.pressure,
        )

    def status(self) -> dict[str, object]:
        """Return what `sharearea-agent status` shows: plain numbers and texts."""
        stats = self._stats()
        verdicts: dict[str, int] = {}
        for file in self._files.values():
            if file.version is None:
                continue
            if file.verdict is None:
                word = "reported" if file.reported else "not reported yet"
            else:
                word = _code(file.verdict)
            verdicts[word] = verdicts.get(word, 0) + 1
        return {
            "name": self.settings.name,
            "connected": self._welcome is not None,
            "pool": self._welcome.pool if self._welcome is not None else None,
            "refused": self._refused or None,
            "detached": self._detach_all,
            "mappings_off": self.settings.mappings_off or None,
            "files": stats.files,
            "resident_pages": stats.resident_pages,
            "zero_pages": stats.zero_pages,
            "proven_files": sum(file.version is not None and file.version.proven for file in self._files.values()),
            "reports": verdicts,
            "offered_files": sum(1 for file in self._files.values() if file.available),
            "attached_files": stats.attached_files,
            "attached_pages": stats.attached_pages,
            "dropped_pages_total": stats.dropped_pages_total,
            "unread_pages": stats.unread_pages,
            "private_bytes": stats.private_bytes,
            "consumers": len({consumer for consumer, _ in self._uses}),
        }

    def knows(self, path: bytes) -> bool:
        """Return whether a file was seen under this reported path."""
        return path in self._by_path

    def file_status(self, path: bytes) -> dict[str, object] | None:
        """Return how a file stands, by its reported path; None if the agent does not know it.

        `reason`: why it is plain, as a reason code; "" where programs share it, or could as soon as one asks.
        """
        file = self._by_path.get(path)
        if file is None or file.version is None:
            return None
        shared = file.stage is Stage.SHARED
        reason = "" if shared else self._why_plain(file)
        if reason == "lease-refused" and not file.uses:
            reason = ""  # nothing is in the way: no program has asked
        return {
            "reason": reason,
            "stage": file.stage.name.lower(),
            "reported": file.reported,
            "verdict": _code(file.verdict) if file.verdict is not None else None,
            "offered_pages": file.available,
            "attached_pages": file.granted_pages if shared else 0,
            "unread_pages": file.unread_pages,
            "programs": len({consumer for consumer, _ in file.uses}),
        }

    def uses(self) -> dict[ConsumerId, list[tuple[bytes, int, int]]]:
        """Return what each consumer has open: the reported path ("" where there is none), the bytes attached, and those
        of the file that were shared without having been read.
        """
        found: dict[ConsumerId, list[tuple[bytes, int, int]]] = {}
        for (consumer, handle), file in self._uses.items():
            sizes = (file.uses[consumer, handle].pages * wire.PAGE_SIZE, file.unread_pages * wire.PAGE_SIZE)
            found.setdefault(consumer, []).append((next(iter(file.paths), b""), *sizes))
        for files in found.values():
            files.sort(key=lambda entry: (-entry[1], entry[0]))
        return found

    def paths(self) -> list[bytes]:
        """Return the reported paths of all known files."""
        return list(self._by_path)


def _code(verdict: int) -> str:
    """Return the stable code of a verdict, also of one that this version does not know."""
    try:
        return Verdict(verdict).code
    except ValueError:
        return f"verdict-{verdict}"

"""The broker as a state machine: `handle(event, now)` returns the actions that follow. No I/O, no clock, no randomness.

Whoever runs it carries out the actions in their order and hands the outcome of Fill, Move and Commit back as an event
before it handles anything else. A crash is therefore a list of actions that ends early; what must survive it has been
committed by then: a slot's record before the slot is published, an owner before its handle is sent (design section 3).

All transitions of a peer, of a report, of a publication and of a grant are in this file. Numbers a peer sends are
looked up, never trusted: an unknown file or request is passed over or costs that peer its connection.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any

from .common import wire
from .common.errors import ProtocolError, TableFull, UsageError
from .common.events import MAX_EXAMPLES, path_text
from .grants import (
    NO_SLOT,
    GrantLedger,
    GrantLimits,
    compare,
    first_pages,
    gather,
    handles,
    last_pages,
    pairs,
    slot_stretches,
    spread,
)
from .index import Content, HeldFile, Owner, PoolIndex
from .model import (
    Action,
    Change,
    CloseSegment,
    Commit,
    CommitFailed,
    Committed,
    Disconnect,
    DomainGone,
    DomainId,
    Event,
    FileId,
    Fill,
    Filled,
    FillFailed,
    GrantsFailed,
    GrantsWritten,
    Identity,
    Log,
    Malformed,
    Move,
    OwnerSet,
    PeerClosed,
    PeerConnected,
    PeerId,
    PoolId,
    PoolOpened,
    PoolRecord,
    Received,
    Revoke,
    Revoked,
    SegmentClosed,
    Send,
    SendSegment,
    SlotNumber,
    SlotsFreed,
    Tick,
    Verdict,
    WithdrawReason,
    WriteGrants,
)
from .pagetable import PageTable
from .policy import Policy, PoolRules, Refusal, domain_name

_PAGE = wire.PAGE_SIZE
_FP = wire.FINGERPRINT_SIZE
_CLASSES = wire.CLASSES_SIZE
_SWEEP = 256  # contents looked at in one step of a background sweep
_LATE_REPORTS = 10  # grace times after which a restarted broker waits for no report any more
_ONES = bytes([0, 1]) + bytes(254)
_OTHERS = bytes([1, 0]) + b"\1" * 254
_PIECES = 32  # stretches of slots into which the pages of one Data message go where the area has no room in one piece
_MAX_REFUSED = 100  # names that are remembered of those who were turned away
_DRAIN = 64  # files of a domain that has left, forgotten in one step


@dataclass(frozen=True, slots=True)
class Settings:
    """Times and bounds of the engine; times in seconds."""

    grace: float = 30.0  # how long grants of a vanished agent are kept
    answer_timeout: float = 20.0  # a fetch, an announced report or a greeting may take as long
    ping_interval: float = 15.0
    tally_interval: float = 1.0  # one line per kind of event, domain and reason in as long
    leaving_retry: float = 0.25  # for a domain that comes back while its files are still being forgotten
    retry: float = 30.0  # pause after the area, the store or the host was full
    strikes: int = 3
    penalty: float = 300.0  # a domain that struck out is refused for as long
    fetches_per_peer: int = 4
    pending_pages: int = 262_144  # fingerprints that one domain may have under way (8 MiB)
    pinned_retry: float = 5.0  # for grants that a domain still maps although it has released them
    thin_ratio: float = 0.25  # a segment with fewer slots in use than this is emptied


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """What the engine is given for one pool. `record` is what the store had, if every segment of it was adopted.

    `grants` (`xen` backend): how many grants there may be; `entries`: those in force, as the area's table has them
    (packed columns of equal length: references, domains, slots; a frame that is no slot is NO_SLOT).
    """

    area: bytes
    epoch: bytes
    key: bytes
    slots_per_segment: int
    table: PageTable
    record: PoolRecord | None = None
    grants: GrantLimits | None = None
    entries: tuple[bytes, bytes, bytes] = (b"", b"", b"")


@dataclass(slots=True, eq=False)
class _Report:
    """A wanted file whose page fingerprints are on their way."""

    path: bytes
    size: int
    root: bytes | None
    count: int
    since: float
    classes: bytes = wire.NO_CLASSES
    fingerprints: bytearray = field(default_factory=bytearray)
    pages: array[int] = field(default_factory=lambda: array("I"))
    next_page: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    """Pages of one content that are to be published; domains in `tried` could not deliver them."""

    content: Content
    positions: bytes
    tried: set[DomainId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Fetch:
    job: _Job
    since: float


@dataclass(slots=True, eq=False)
class _Peer:
    id: PeerId
    identity: Identity
    heard: float
    pool: _Pool | None = None
    domain: DomainId = ""
    instance: bytes = b""
    ping: int = 0
    ping_sent: float | None = None
    fetches: dict[int, _Fetch] = field(default_factory=dict)
    reports: dict[FileId, _Report] = field(default_factory=dict)
    waiting: dict[FileId, _Report] = field(default_factory=dict)  # another domain is sending the same root
    deferred: dict[FileId, _Report] = field(default_factory=dict)  # too much under way already, oldest first
    pending_pages: int = 0
    segments: set[int] = field(default_factory=set)
    grantor: int | None = None  # the area's domain, once it was told
    stats: wire.AgentStats | None = None
    stats_at: float = 0.0  # when they came
    ignored: dict[Verdict, list[int]] = field(default_factory=dict)  # reason -> [files, bytes]


@dataclass(slots=True, eq=False)
class _Pinned:
    """Grants of one Xen domain that it has released and still maps (packed stretches, as in _Revoking)."""

    refs: bytes
    slots: bytes
    retry_at: float


@dataclass(slots=True, eq=False)
class _Sum:
    """What is gathered for one line: counts, and a few paths."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pool:
    name: PoolId
    rules: PoolRules
    setup: PoolSetup
    index: PoolIndex
    ledger: GrantLedger | None = None  # None: handles need no grants (`local`)
    domids: dict[DomainId, int] = field(default_factory=dict)  # the Xen domain behind each name that owns or owned
    pinned: dict[int, _Pinned] = field(default_factory=dict)  # by domid
    detached: dict[DomainId, int] = field(default_factory=dict)  # by the operator -> domid at that time
    reoffer: deque[tuple[PeerId, Content]] = field(default_factory=deque)
    peers: dict[DomainId, _Peer] = field(default_factory=dict)
    queue: deque[_Job] = field(default_factory=deque)
    coming: dict[bytes, deque[tuple[PeerId, FileId]]] = field(default_factory=dict)  # root -> who waits for its pages
    absent: dict[DomainId, float] = field(default_factory=dict)
    strikes: dict[DomainId, int] = field(default_factory=dict)
    barred: dict[DomainId, float] = field(default_factory=dict)
    paused_until: float = 0.0
    paused_why: str = ""
    settle_at: float | None = None
    settle_by: float = 0.0
    offers: deque[Content] = field(default_factory=deque)  # contents whose offer may have grown
    offers_at: int = 0  # index.changed when that sweep began
    offers_due: float = 0.0  # when the next one begins even if something is being published
    remarks: dict[DomainId, deque[Content]] = field(default_factory=dict)
    retry: dict[Content, float] = field(default_factory=dict)
    undelivered: dict[Content, None] = field(default_factory=dict)  # no holder could deliver; the last to fail is last
    reconsider_at: float | None = None
    reconsider: deque[Content] = field(default_factory=deque)
    emptying: set[int] = field(default_factory=set)
    moving: int | None = None
    full: bool = False  # the area had no room for another segment: free slots are used in pieces
    looked_at: int = -1  # index.changed when segments were last looked at
    published_total: int = 0
    mismatched_total: int = 0
    granted_total: int = 0
    tally: dict[tuple[str, DomainId, str, str], _Sum] = field(default_factory=dict)  # event, domain, reason, stage
    tally_at: float = 0.0  # when it is logged

    @property
    def reports_only(self) -> bool:
        """Nothing is published or mapped here: the pool only finds out what sharing would bring."""
        return self.rules.mode == "report"

    @property
    def quiet(self) -> bool:
        """Nothing is being published."""
        return not self.queue and not any(peer.fetches for peer in self.peers.values())


@dataclass(frozen=True, slots=True)
class _Filling:
    pool: _Pool
    job: _Job | None  # None: a move
    ids: bytes
    first: SlotNumber
    want: bytes
    domain: DomainId


@dataclass(frozen=True, slots=True)
class _Publishing:
    filling: _Filling
    ok: bytes


@dataclass(frozen=True, slots=True)
class _Granting:
    peer: PeerId
    pool: _Pool
    owners: tuple[OwnerSet, ...]
    handles: tuple[bytes, ...]  # of each owner: what the domain is sent


@dataclass(frozen=True, slots=True)
class _Writing:
    """Entries are being written into the table of grants."""

    granting: _Granting


@dataclass(frozen=True, slots=True)
class _Revoking:
    """Entries are being taken out of the table of grants: packed stretches of references and of their slots, in the
    same order. NO_SLOT: a frame that is no slot, or whose mapping is not counted.
    """

    pool: _Pool
    domid: int
    refs: bytes
    slots: bytes
    again: bool = False


@dataclass(frozen=True, slots=True)
class _Saving:
    """A commit: changes that have happened already, and what waits for it besides."""

    changes: tuple[Change, ...]
    then: _Publishing | _Granting | None = None


_Waiting = _Filling | _Saving | _Writing | _Revoking


class Engine:
    """The broker's decisions. One object per broker; not thread-safe.

    `pools` has the set-up of every pool that the policy names; `file_root(size, fingerprints)` computes a file root.
    """

    def __init__(
        self,
        policy: Policy,
        pools: Mapping[PoolId, PoolSetup],
        file_root: Callable[[int, bytes], bytes],
        settings: Settings | None = None,
    ) -> None:
        self.policy = policy
        self.settings = settings or Settings()
        self._file_root = file_root
        self._now = 0.0
        self._token = 0
        self._request = 0
        self._peers: dict[PeerId, _Peer] = {}
        self._pools = {name: self._make_pool(name, setup) for name, setup in pools.items()}
        self._waiting: dict[int, _Waiting] = {}
        self._actions: list[Action] = []
        self._offers: dict[PeerId, dict[FileId, int]] = {}
        self.refused: dict[str, tuple[float, str, str]] = {}
        """Who was turned away last, by name: when, the reason code, and what he was told. The latest is last."""
        self._unsaved: list[Change] = []
        self._committing = False
        self._save_at = 0.0

    def _make_pool(self, name: PoolId, setup: PoolSetup) -> _Pool:
        rules = self.policy.pools[name]
        on_xen = setup.grants is not None
        index = PoolIndex(name, setup.table, setup.slots_per_segment, rules.max_domains, reuse=on_xen)
        return _Pool(name, rules, setup, index, GrantLedger(setup.grants) if setup.grants is not None else None)

    # ------------------------------------------------------------------------------------------------ the way in

    def start(self, now: float) -> list[Action]:
        """Return the first actions: restore what the store had, record pools that are new. Call once, before handle."""
        self._now = now
        for pool in self._pools.values():
            record = pool.setup.record
            if record is None:
                self._unsaved.append(PoolOpened(pool.name, pool.setup.area, pool.setup.slots_per_segment))
                continue
            pool.settle_at = now + self.settings.grace
            pool.settle_by = now + _LATE_REPORTS * self.settings.grace
            for (domain, _), owner in record.owners.items():
                pool.absent[domain] = now + self.settings.grace
                pool.domids[domain] = owner.domid
            if pool.ledger is not None:
                self._restore_granted(pool, pool.ledger, record)
            else:
                self._save(pool.index.restore(record)[0])
        return self._finish()

    def replace(self, name: PoolId, setup: PoolSetup, now: float) -> list[Action]:
        """Start a pool anew: its area is gone (`xen`: destroyed under way). Its domains have to connect again.

        Call it between events, when all actions are carried out and their outcomes handed in. What guests have mapped
        of the old area stays good until they let go; they do when they hear of the new one.
        """
        self._now = now
        pool = self._pools[name]
        for peer in pool.peers.values():
            self._send(peer.id, wire.Refused("area-lost", "the sharing area is gone; there is a new one", 200))
            self._act(Disconnect(peer.id))
            del self._peers[peer.id]
            self._offers.pop(peer.id, None)
        self._unsaved = [change for change in self._unsaved if change.pool != name]
        self._unsaved.append(PoolOpened(name, setup.area, setup.slots_per_segment))
        new = self._pools[name] = self._make_pool(name, setup)
        # What the domains and the operator did stays as it was.
        new.strikes, new.barred, new.detached, new.domids = pool.strikes, pool.barred, pool.detached, pool.domids
        new.absent = dict.fromkeys((*pool.absent, *pool.peers), now + self.settings.grace)
        new.published_total, new.granted_total = pool.published_total, pool.granted_total
        new.mismatched_total = pool.mismatched_total
        self._log("area.lost", pool=name, domains=len(pool.peers), owners=len(pool.index.owners))
        return self._finish()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time `now` (seconds, any steady clock) and return what to do, in order."""
        self._now = now
        match event:
            case Received():
                self._on_message(event.peer, event.message)
            case PeerConnected():
                self._peers[event.peer] = _Peer(event.peer, event.identity, now)
            case PeerClosed():
                self._on_closed(event.peer, event.why)
            case Malformed():
                self._expel(event.peer, "malformed", event.what)
            case Filled():
                self._on_filled(event)
            case FillFailed():
                self._on_fill_failed(event)
            case Committed():
                self._on_committed(event.token)
            case CommitFailed():
                self._on_commit_failed(event)
            case GrantsWritten():
                self._on_grants_written(event.token)
            case GrantsFailed():
                self._on_grants_failed(event)
            case Revoked():
                self._on_revoked(event)
            case DomainGone():
                self._on_domain_gone(event.domid)
            case Tick():
                self._on_tick()
        return self._finish()

    @property
    def busy(self) -> bool:
        """Return whether a Tick would find work at once: a sweep is under way."""
        return any(
            pool.offers
            or pool.remarks
            or pool.reoffer
            or pool.reconsider
            or pool.index.leaving
            or (pool.offers_at != pool.index.changed and pool.quiet)
            for pool in self._pools.values()
        )

    def _finish(self) -> list[Action]:
        for peer, offers in self._offers.items():
            items = list(offers.items())
            for at in range(0, len(items), wire.MAX_IDS):
                part = items[at : at + wire.MAX_IDS]
                self._send(
                    peer,
                    wire.Offer(
                        array("I", [file for file, _ in part]).tobytes(), array("I", [n for _, n in part]).tobytes()
                    ),
                )
        self._offers.clear()
        for pool in self._pools.values():
            self._pump(pool)
        if self._unsaved and self._now >= self._save_at and not self._committing:
            self._commit()
        actions, self._actions = self._actions, []
        return actions

    def _act(self, action: Action) -> None:
        self._actions.append(action)

    def _send(self, peer: PeerId, message: wire.Message) -> None:
        self._actions.append(Send(peer, message))

    def _log(self, event: str, **fields: object) -> None:
        self._actions.append(Log(event, fields))

    @staticmethod
    def _tally(
        pool: _Pool,
        event: str,
        domain: DomainId,
        *,
        reason: str = "",
        stage: str = "",
        path: bytes | None = None,
        **counts: int,
    ) -> None:
        """Count what would be too many lines; the sums are logged in intervals, with the first few paths."""
        key = (event, domain, reason, stage)
        sums = pool.tally.get(key)
        if sums is None:
            sums = pool.tally[key] = _Sum()
        for name, count in counts.items():
            sums.counts[name] = sums.counts.get(name, 0) + count
        if path is not None and len(sums.examples) < MAX_EXAMPLES:
            sums.examples.append(path_text(path))

    def _log_tallies(self, pool: _Pool) -> None:
        pool.tally_at = self._now + self.settings.tally_interval
        for (event, domain, reason, stage), sums in pool.tally.items():
            more: dict[str, object] = {"reason": reason, "stage": stage, "examples": sums.examples}
            known = {name: value for name, value in more.items() if value}
            self._log(event, pool=pool.name, domain=domain, **sums.counts, **known)
        pool.tally.clear()

    def _wait(self, waiting: _Waiting) -> int:
        self._token += 1
        self._waiting[self._token] = waiting
        return self._token

    def _commit(self, changes: tuple[Change, ...] = (), then: _Publishing | _Granting | None = None) -> None:
        """Write changes, and before them everything that was not saved: the store takes things in their order."""
        saved = tuple(self._unsaved)
        self._unsaved.clear()
        self._committing = True
        self._act(Commit(self._wait(_Saving(saved, then)), saved + changes))

    # ------------------------------------------------------------------------------------------------------ peers

    def _on_message(self, peer_id: PeerId, message: wire.Message) -> None:
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        peer.heard = self._now
        try:
            if peer.pool is None:
                if not isinstance(message, wire.Hello):
                    raise ProtocolError("the first message must be Hello")
                self._on_hello(peer, message)
                return
            match message:
                case wire.Roots():
                    self._on_roots(peer, peer.pool, message)
                case wire.Pages():
                    self._on_pages(peer, peer.pool, message)
                case wire.Gone():
                    self._on_gone(peer, peer.pool, array("I", message.ids))
                case wire.Data():
                    self._on_data(peer, peer.pool, message)
                case wire.Attach():
                    self._on_attach(peer, peer.pool, array("I", message.ids))
                case wire.Release():
                    files, pages = self._release(peer.pool, peer.domain, array("I", message.ids))
                    if files:
                        self._tally(peer.pool, "pages.released", peer.domain, files=files, pages=pages)
                case wire.AgentStats():
                    peer.stats, peer.stats_at = message, self._now
                case wire.Pong():
                    peer.ping_sent = None
                case _:
                    raise ProtocolError(f"{type(message).__name__} is not expected now")
        except ProtocolError as error:
            self._expel(peer_id, "malformed", error.message)

    def _on_hello(self, peer: _Peer, hello: wire.Hello) -> None:
        if hello.protocol != wire.PROTOCOL_VERSION:
            self._refuse(
                peer,
                "protocol-version",
                f"the agent speaks protocol {hello.protocol}, this broker {wire.PROTOCOL_VERSION}: "
                "install the same version of both",
                domain_name(peer.identity) or hello.name,
            )
            return
        admission = self.policy.admit(peer.identity, hello.name)
        if isinstance(admission, Refusal):
            self._refuse(peer, admission.reason, admission.text, domain_name(peer.identity) or hello.name)
            return
        pool, domain = self._pools[admission.pool], admission.domain
        if self._now < pool.barred.get(domain, 0.0):
            left = pool.barred[domain] - self._now
            self._refuse(
                peer, "struck-out", f"pages of {domain} were not what it reported; again in {left:.0f} s", domain, left
            )
            return
        if domain in pool.peers:
            self._refuse(
                peer, "already-connected", f"another agent is connected as {domain}", domain, self.settings.retry
            )
            return
        if domain in pool.index.leaving:
            text = f"what {domain} reported before is still being forgotten"
            self._refuse(peer, "still-leaving", text, domain, self.settings.leaving_retry)
            return
        if pool.index.join(domain) is None:
            text = f"pool {pool.name} has max_domains = {pool.rules.max_domains} domains already"
            self._refuse(peer, "pool-full", text, domain, self.settings.retry)
            return
        peer.pool, peer.domain, peer.instance = pool, domain, hello.instance
        pool.peers[domain] = peer
        pool.absent.pop(domain, None)
        if pool.detached.get(domain, peer.identity.domid) != peer.identity.domid:
            del pool.detached[domain]  # saved and restored since: that is what it was detached for
        self._send(
            peer.id,
            wire.Welcome(
                wire.PROTOCOL_VERSION,
                domain,
                pool.name,
                pool.setup.area,
                pool.setup.epoch,
                pool.setup.key,
                pool.setup.slots_per_segment,
                pool.rules.min_file_bytes,
                pool.rules.max_file_bytes,
                pool.rules.max_files,
                tuple(pool.rules.include),
                tuple(pool.rules.exclude),
            ),
        )
        self._reconcile(peer, pool, array("I", hello.held))
        self.refused.pop(domain, None)
        self._log("domain.joined", domain=domain, pool=pool.name, rule=admission.rule.source, **_who(peer))

    def _reconcile(self, peer: _Peer, pool: _Pool, held: Iterable[FileId]) -> None:
        """Make the owners in the index and the grants that the agent says it uses the same (I6)."""
        keep = set(held)
        mine = pool.index.owned_by(peer.domain)
        domid = peer.identity.domid
        same = {
            f
            for f in mine
            if (owner := pool.index.owners[peer.domain, f]).instance == peer.instance and owner.domid == domid
        } & keep
        self._revoke_files(pool, peer.domain, [f for f in mine if f not in same], "not-held")
        pool.domids[peer.domain] = domid
        self._withdraw(peer, sorted(keep - same), WithdrawReason.UNKNOWN_GRANT)
        # It was not there when the others were told.
        for segment in sorted(pool.emptying):
            files = pool.index.owners_in(segment).get(peer.domain)
            if files:
                self._withdraw(peer, files, WithdrawReason.MOVING)

    def _refuse(self, peer: _Peer, reason: str, text: str, domain: str, retry: float = 0.0) -> None:
        self._send(peer.id, wire.Refused(reason, text[:1024], int(retry * 1000)))
        self._act(Disconnect(peer.id))
        self._log("domain.refused", domain=domain, reason=reason, detail=text, **_who(peer))
        self._remember_refused(domain, reason, text)
        del self._peers[peer.id]

    def _remember_refused(self, domain: str, reason: str, text: str) -> None:
        self.refused.pop(domain, None)
        self.refused[domain] = (self._now, reason, text)
        if len(self.refused) > _MAX_REFUSED:
            del self.refused[next(iter(self.refused))]

    def _expel(self, peer_id: PeerId, reason: str, text: str) -> None:
        """End a connection for the peer's own fault."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return
        pool = peer.pool.name if peer.pool is not None else None
        self._log("peer.strike", domain=peer.domain, pool=pool, reason=reason, detail=text, **_who(peer))
        self._send(peer_id, wire.Refused(reason, text[:1024], int(self.settings.retry * 1000)))
        self._act(Disconnect(peer_id))
        if peer.domain:
            self._remember_refused(peer.domain, reason, text)
        self._on_closed(peer_id, reason)

    def _strike(self, peer: _Peer, pool: _Pool, reason: str, text: str) -> None:
        count = pool.strikes.get(peer.domain, 0) + 1
        pool.strikes[peer.domain] = count
        self._log("peer.strike", domain=peer.domain, pool=pool.name, reason=reason, detail=text, strikes=count)
        if count >= self.settings.strikes:
            del pool.strikes[peer.domain]
            pool.barred[peer.domain] = self._now + self.settings.penalty
            self._expel(peer.id, "struck-out", text)

    def _on_closed(self, peer_id: PeerId, why: str) -> None:
        peer = self._peers.pop(peer_id, None)
        if peer is None or peer.pool is None:
            return
        pool = peer.pool
        del pool.peers[peer.domain]
        self._offers.pop(peer_id, None)
        for fetch in peer.fetches.values():
            self._requeue(pool, fetch.job, peer.domain)
        for report in peer.reports.values():
            self._not_coming(pool, report)
        pool.remarks.pop(peer.domain, None)
        pool.index.leave(peer.domain)
        self._drain(pool, peer.domain)
        pool.absent[peer.domain] = self._now + self.settings.grace
        self._log("domain.left", domain=peer.domain, pool=pool.name, detail=why)

    def _drain(self, pool: _Pool, domain: DomainId) -> None:
        """Forget some of the files of a domain that has left; ticks do the rest."""
        self._save(pool.index.drain(domain, _DRAIN))

    # ---------------------------------------------------------------------------------------------------- reports

    def _on_roots(self, peer: _Peer, pool: _Pool, message: wire.Roots) -> None:
        holdings = pool.index.domains[peer.domain]
        answered: list[tuple[FileId, Verdict]] = []
        claimed: list[Content] = []
        roots = message.roots
        columns = zip(
            array("I", message.ids), array("Q", message.sizes), array("I", message.counts), message.paths, strict=True
        )
        for at, (file, size, count, path) in enumerate(columns):
            held = holdings.files.get(file)
            if held is not None and not held.resident and count and self._same(held, size, count, message, at):
                claimed.append(pool.index.promote(peer.domain, file))
                answered.append((file, self._taken_up(pool)))
                continue
            if held is not None or file in peer.reports or file in peer.waiting or file in peer.deferred:
                raise ProtocolError(f"file {file} is reported already; it must be Gone first")
            verdict, _ = self.policy.judge(pool.name, path, size)
            if verdict is None:
                verdict = self._quota(peer, pool, size)
            if verdict is not None:
                self._ignore(peer, pool, answered, file, path, size, verdict)
                continue
            root: bytes | None = roots[at * _FP : at * _FP + _FP]
            whole = -(-size // _PAGE)
            if root == wire.NO_ROOT:
                root = None
            unread = root is not None and count == 0
            if not unread and (not 0 < count <= whole or (root is not None and count != whole)):
                raise ProtocolError(f"file {file}: {count} pages do not make a file of {size} bytes")
            classes = message.classes[at * _CLASSES : (at + 1) * _CLASSES]
            if classes != wire.NO_CLASSES and not _within(classes, whole):
                raise ProtocolError(f"file {file}: page classes beyond its {whole} pages")
            if root is not None:
                content = pool.index.find(root)
                if content is not None and content.size == size:
                    pool.index.claim(peer.domain, file, path, content, resident=not unread)
                    claimed.append(content)
                    answered.append((file, self._taken_up(pool)))
                    continue
            if unread:
                answered.append((file, Verdict.NOT_RESIDENT))
                continue
            report = _Report(path, size, root, count, self._now, classes)
            self._expect(peer, pool, file, report, answered)
        self._answer(peer, answered)
        for content in claimed:
            self._consider(pool, content)
            self._offer(pool, content, only=peer)

    @staticmethod
    def _same(held: HeldFile, size: int, count: int, message: wire.Roots, at: int) -> bool:
        """Return whether a file is reported as what it was reported as when nothing of it was resident."""
        content = held.content
        return (size, count, message.roots[at * _FP : at * _FP + _FP]) == (held.size, content.page_count, content.root)

    def _quota(self, peer: _Peer, pool: _Pool, size: int) -> Verdict | None:
        holdings = pool.index.domains[peer.domain]
        under_way = len(peer.reports) + len(peer.waiting) + len(peer.deferred)
        if len(holdings.files) + under_way >= pool.rules.max_files:
            return Verdict.QUOTA_FILES
        if holdings.size_bytes + peer.pending_pages * _PAGE + size > pool.rules.max_bytes:
            return Verdict.QUOTA_BYTES
        return None

    @staticmethod
    def _fits(peer: _Peer, pool: _Pool, report: _Report) -> bool:
        """Return whether a file is still within the quota: what waited was not counted when it was announced."""
        return pool.index.domains[peer.domain].size_bytes + report.size <= pool.rules.max_bytes

    @staticmethod
    def _taken_up(pool: _Pool) -> Verdict:
        """Return the answer for a file whose content the broker has."""
        return Verdict.REPORT_ONLY if pool.reports_only else Verdict.KNOWN

    def _ignore(
        self,
        peer: _Peer,
        pool: _Pool,
        answered: list[tuple[FileId, Verdict]],
        file: FileId,
        path: bytes,
        size: int,
        verdict: Verdict,
    ) -> None:
        answered.append((file, verdict))
        self._tally_refused(pool, peer.domain, "report", verdict, path, size)
        counts = peer.ignored.setdefault(verdict, [0, 0])
        counts[0] += 1
        counts[1] += size

    def _tally_refused(
        self, pool: _Pool, domain: DomainId, stage: str, verdict: Verdict, path: bytes | None, size: int
    ) -> None:
        reason = verdict.code
        self._tally(pool, "files.refused", domain, reason=reason, stage=stage, path=path, files=1, file_bytes=size)

    def _answer(self, peer: _Peer, answered: list[tuple[FileId, Verdict]]) -> None:
        for at in range(0, len(answered), wire.MAX_REPORT_FILES):
            part = answered[at : at + wire.MAX_REPORT_FILES]
            self._send(
                peer.id, wire.Verdicts(array("I", [file for file, _ in part]).tobytes(), bytes(v for _, v in part))
            )

    def _expect(
        self,
        peer: _Peer,
        pool: _Pool,
        file: FileId,
        report: _Report,
        answered: list[tuple[FileId, Verdict]],
        *,
        first: bool = False,
    ) -> bool:
        """Ask for a file's pages; or let it wait for the domain that sends the same root, or for room (then False).

        One file always has room, and so has one that goes `first`.
        """
        if report.root is not None and report.root in pool.coming and not first:
            peer.waiting[file] = report
            pool.coming[report.root].append((peer.id, file))
            return True
        if peer.pending_pages and peer.pending_pages + report.count > self.settings.pending_pages and not first:
            peer.deferred[file] = report
            return False
        report.since = self._now
        peer.reports[file] = report
        peer.pending_pages += report.count
        if report.root is not None:
            pool.coming.setdefault(report.root, deque())
        answered.append((file, Verdict.WANTED))
        return True

    def _on_pages(self, peer: _Peer, pool: _Pool, message: wire.Pages) -> None:
        parts = array("I", message.parts)
        fingerprints = memoryview(message.fingerprints)
        if sum(parts[2::3]) * _FP != len(fingerprints):
            raise ProtocolError("Pages: the parts do not add up to the fingerprints")
        at = 0
        complete: list[tuple[FileId, _Report]] = []
        for file, first, count in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
            part = fingerprints[at : at + count * _FP]
            at += count * _FP
            report = peer.reports.get(file)
            if report is None:
                continue  # it was given up meanwhile
            if not count or first < report.next_page or first + count > -(-report.size // _PAGE):
                raise ProtocolError(f"file {file}: page {first} does not belong here")
            if report.root is None:
                report.pages.extend(range(first, first + count))
            elif first != report.next_page:
                raise ProtocolError(f"file {file}: pages are missing before {first}")
            report.next_page = first + count
            report.fingerprints += part
            report.since = self._now
            arrived = len(report.fingerprints) // _FP
            if arrived > report.count:
                raise ProtocolError(f"file {file}: more pages than announced")
            if arrived == report.count:
                complete.append((file, report))
        for file, report in complete:
            if peer.id in self._peers:
                self._on_report(peer, pool, file, report)
        if peer.id in self._peers:
            self._expect_deferred(peer, pool)

    def _on_report(self, peer: _Peer, pool: _Pool, file: FileId, report: _Report) -> None:
        """Take up a file whose fingerprints are complete."""
        self._forget_report(peer, file)
        fingerprints = bytes(report.fingerprints)
        if report.root is not None and self._file_root(report.size, fingerprints) != report.root:
            self._answer(peer, [(file, Verdict.ROOT_MISMATCH)])
            self._not_coming(pool, report)
            self._tally_refused(pool, peer.domain, "report", Verdict.ROOT_MISMATCH, report.path, report.size)
            self._strike(peer, pool, Verdict.ROOT_MISMATCH.code, f"file {file}: its pages do not have its root")
            return
        content = pool.index.find(report.root) if report.root is not None else None
        refused = None if self._fits(peer, pool, report) else Verdict.QUOTA_BYTES
        if content is None and refused is None:
            try:
                pages = None if report.root is not None else report.pages.tobytes()
                content = pool.index.add(report.root, report.size, pages, fingerprints, report.classes)
            except TableFull:
                refused = Verdict.TABLE_FULL
        if content is None or refused is not None:
            answered: list[tuple[FileId, Verdict]] = []
            self._ignore(peer, pool, answered, file, report.path, report.size, refused or Verdict.TABLE_FULL)
            self._answer(peer, answered)
            self._not_coming(pool, report)
            return
        pool.index.claim(peer.domain, file, report.path, content)
        if pool.reports_only:
            self._answer(peer, [(file, Verdict.REPORT_ONLY)])
        if report.root is not None:
            self._arrived(pool, report.root, content)
        self._consider(pool, content)
        self._offer(pool, content)

    def _forget_report(self, peer: _Peer, file: FileId) -> _Report | None:
        report = peer.reports.pop(file, None)
        if report is not None:
            peer.pending_pages -= report.count
        return report

    def _arrived(self, pool: _Pool, root: bytes, content: Content) -> None:
        """The pages of a root are here: whoever waited for them holds it now."""
        for peer_id, file in pool.coming.pop(root, ()):
            waiter = self._peers.get(peer_id)
            report = waiter.waiting.pop(file, None) if waiter is not None else None
            if waiter is None or report is None:
                continue
            if report.size != content.size:  # a root covers the size: one of the two is not what the domain has
                self._answer(waiter, [(file, Verdict.ROOT_MISMATCH)])
                continue
            if not self._fits(waiter, pool, report):
                answered: list[tuple[FileId, Verdict]] = []
                self._ignore(waiter, pool, answered, file, report.path, report.size, Verdict.QUOTA_BYTES)
                self._answer(waiter, answered)
                continue
            pool.index.claim(waiter.domain, file, report.path, content)
            self._answer(waiter, [(file, self._taken_up(pool))])

    def _not_coming(self, pool: _Pool, report: _Report) -> None:
        """The pages of a root will not come from whom they were expected: ask the next one who has it."""
        if report.root is None:
            return
        waiters = pool.coming.pop(report.root, deque())
        while waiters:
            peer_id, file = waiters.popleft()
            peer = self._peers.get(peer_id)
            again = peer.waiting.pop(file, None) if peer is not None else None
            if peer is not None and again is not None:
                pool.coming[report.root] = waiters
                answered: list[tuple[FileId, Verdict]] = []
                self._expect(peer, pool, file, again, answered, first=True)
                self._answer(peer, answered)
                return

    def _expect_deferred(self, peer: _Peer, pool: _Pool) -> None:
        """Ask for files that waited for room, now that there is some."""
        answered: list[tuple[FileId, Verdict]] = []
        claimed: list[Content] = []
        for file in list(islice(peer.deferred, wire.MAX_REPORT_FILES)):
            report = peer.deferred.pop(file)
            content = pool.index.find(report.root) if report.root is not None else None
            if not self._fits(peer, pool, report):
                self._ignore(peer, pool, answered, file, report.path, report.size, Verdict.QUOTA_BYTES)
            elif content is not None and content.size == report.size:
                pool.index.claim(peer.domain, file, report.path, content)
                answered.append((file, self._taken_up(pool)))
                claimed.append(content)
            elif not self._expect(peer, pool, file, report, answered):
                peer.deferred = {file: peer.deferred.pop(file)} | peer.deferred  # it keeps its place
                break
        self._answer(peer, answered)
        for content in claimed:
            self._consider(pool, content)
            self._offer(pool, content, only=peer)

    def _on_gone(self, peer: _Peer, pool: _Pool, files: array[int]) -> None:
        for file in files:
            peer.waiting.pop(file, None)
            peer.deferred.pop(file, None)
            report = self._forget_report(peer, file)
            if report is not None:
                self._not_coming(pool, report)
        held = pool.index.domains[peer.domain].files
        if any(file in held for file in files):
            self._save(pool.index.drop(peer.domain, files))
            pool.remarks[peer.domain] = deque({entry.content: None for entry in held.values()})
        self._expect_deferred(peer, pool)

    # ------------------------------------------------------------------------------------------------- publishing

    def _consider(self, pool: _Pool, content: Content) -> None:
        """Queue the pages of a content that k domains hold and that are in no slot yet."""
        if len(pool.index.domains) < pool.rules.k or pool.reports_only:
            return
        if self._now < pool.paused_until:
            pool.retry[content] = pool.paused_until
            return
        positions = pool.index.table.want(content.ids, pool.rules.k)
        step = wire.MAX_FETCH_PAGES * 4
        for at in range(0, len(positions), step):
            content.publishing += 1
            pool.queue.append(_Job(content, positions[at : at + step]))

    def _pump(self, pool: _Pool) -> None:
        """Ask holders for bytes, as far as they have room for another fetch."""
        for _ in range(min(len(pool.queue), 64)):
            if pool.peers and all(len(p.fetches) >= self.settings.fetches_per_peer for p in pool.peers.values()):
                return
            job = pool.queue.popleft()
            candidates = [d for d in job.content.holders if d in pool.peers and d not in job.tried]
            if not candidates:
                self._give_up(pool, job)
                continue
            domain = min(candidates, key=lambda d: len(pool.peers[d].fetches))
            peer = pool.peers[domain]
            if len(peer.fetches) >= self.settings.fetches_per_peer:
                pool.queue.append(job)
                continue
            self._request = (self._request + 1) & 0xFFFFFFFF
            peer.fetches[self._request] = _Fetch(job, self._now)
            # Of several files that have it one may be evicted. Each gets its turn, in an order that falls into step
            # with no number of jobs: the golden ratio's.
            files = job.content.holders[domain]
            turn = (self._request * 0x9E3779B1 & 0xFFFFFFFF) * len(files) >> 32
            file = next(islice(files, turn, None))
            self._send(peer.id, wire.Fetch(self._request, file, _page_runs(job.content, job.positions)))

    def _give_up(self, pool: _Pool, job: _Job) -> None:
        pool.index.table.unwant(pool.index.ids_at(job.content, job.positions))
        self._published(pool, job.content)
        if job.content.holders:
            pool.undelivered.pop(job.content, None)
            pool.undelivered[job.content] = None
        # Even if this content is gone: while its pages were wanted, nobody could want them for another one.
        if pool.reconsider_at is None:
            pool.reconsider_at = self._now + self.settings.retry

    def _requeue(self, pool: _Pool, job: _Job, domain: DomainId) -> None:
        pool.queue.append(_Job(job.content, job.positions, job.tried | {domain}))

    def _on_data(self, peer: _Peer, pool: _Pool, message: wire.Data) -> None:
        fetch = peer.fetches.pop(message.request, None)
        if fetch is None:
            return  # late: another domain was asked meanwhile
        job = fetch.job
        if len(message.have) * 4 != len(job.positions):
            self._requeue(pool, job, peer.domain)
            raise ProtocolError("Data: an answer for another number of pages than was asked for")
        positions, missing = _split(job.positions, message.have)
        if missing:
            content = job.content
            if positions:
                content.publishing += 1
            pool.queue.append(_Job(content, missing, job.tried | {peer.domain}))
        if not positions:
            return
        pages, at = memoryview(message.pages), 0
        for first, count in self._room(pool, len(positions) // 4):
            part = positions[at * 4 : (at + count) * 4]
            ids = pool.index.ids_at(job.content, part)
            want = pool.index.table.fps(ids)
            filling = _Filling(pool, _Job(job.content, part, job.tried), ids, first, want, peer.domain)
            data = bytes(pages[at * _PAGE : (at + count) * _PAGE])
            self._act(Fill(self._wait(filling), pool.name, first, data, want))
            job.content.publishing += at > 0
            at += count
        if at < len(positions) // 4:
            job.content.publishing += 1
            pool.queue.append(_Job(job.content, positions[at * 4 :], job.tried))

    @staticmethod
    def _room(pool: _Pool, count: int) -> list[tuple[SlotNumber, int]]:
        """Return slots for pages as (first, count): one piece for all, or pieces of a full area, as far as they go."""
        found = pool.index.allocate_scattered(count, _PIECES) if pool.full else []
        return found or [(pool.index.allocate(count), count)]

    def _on_filled(self, event: Filled) -> None:
        filling = self._waiting.pop(event.token, None)
        if not isinstance(filling, _Filling):
            return
        pool, count = filling.pool, len(filling.ids) // 4
        bad = count - event.ok.count(1)
        want = bytearray(filling.want)
        if bad:
            for i, ok in enumerate(event.ok):
                if ok != 1:
                    want[i * _FP : i * _FP + _FP] = bytes(_FP)
        if event.opened:
            pool.full = False
            self._save([pool.index.opened(*segment) for segment in event.opened])
        if bad < count:
            self._commit((pool.index.filled(filling.first, bytes(want)),), _Publishing(filling, event.ok))
        elif filling.job is not None:
            pool.index.retract(filling.first, count)
            self._requeue(pool, filling.job, filling.domain)
        else:
            self._abandon(filling)
        peer = pool.peers.get(filling.domain)
        if bad:
            pool.mismatched_total += bad
            if peer is not None and filling.job is not None:
                self._strike(peer, pool, "page-mismatch", f"{bad} of {count} pages were not what was reported")

    def _abandon(self, filling: _Filling) -> None:
        """Nothing of this filling is published."""
        filling.pool.index.retract(filling.first, len(filling.ids) // 4)
        if filling.job is not None:
            self._give_up(filling.pool, filling.job)
        else:
            self._save(filling.pool.index.let_go(filling.ids))
            filling.pool.moving = None

    def _on_fill_failed(self, event: FillFailed) -> None:
        filling = self._waiting.pop(event.token, None)
        if isinstance(filling, _Filling):
            self._pause(filling.pool, "area-full", event.why)
            self._abandon(filling)
            self._use_what_is_there(filling.pool)

    @staticmethod
    def _use_what_is_there(pool: _Pool) -> None:
        """The area has no room for another segment: what is free in the others is used, wherever it is."""
        if pool.index.reuse:
            pool.full = True
            pool.index.fill_again()
            pool.emptying.clear()

    def _pause(self, pool: _Pool, reason: str, why: str) -> None:
        """Stop publishing for a while; what is queued is wanted again afterwards."""
        if self._now >= pool.paused_until:
            self._log(
                "pool.paused", pool=pool.name, reason=reason, detail=why, retry_ms=int(self.settings.retry * 1000)
            )
        pool.paused_until = self._now + self.settings.retry
        pool.paused_why = reason
        while pool.queue:
            self._give_up(pool, pool.queue.popleft())

    def _on_committed(self, token: int) -> None:
        waiting = self._waiting.pop(token, None)
        if not isinstance(waiting, _Saving):
            return
        self._committing = False
        for change in waiting.changes:
            match change:
                case SlotsFreed():
                    self._pools[change.pool].index.reusable(change.slots)
                case SegmentClosed():  # not before: an area that lacks a segment of the store is lost
                    self._act(CloseSegment(change.pool, change.segment))
        match waiting.then:
            case _Publishing():
                self._publish(waiting.then.filling, waiting.then.ok)
            case _Granting():
                self._granted(waiting.then)

    def _on_commit_failed(self, event: CommitFailed) -> None:
        waiting = self._waiting.pop(event.token, None)
        if not isinstance(waiting, _Saving):
            return
        self._committing = False
        self._unsaved[:0] = waiting.changes
        self._save_at = self._now + self.settings.retry
        match waiting.then:
            case _Publishing():
                self._pause(waiting.then.filling.pool, "store-full", event.why)
                self._abandon(waiting.then.filling)
            case _Granting():
                self._log("store.failed", detail=event.why, changes=len(waiting.then.owners))
                ledger = waiting.then.pool.ledger
                for owner in waiting.then.owners:
                    if ledger is not None:
                        ledger.give_back(owner.domid, owner.refs)
                peer = self._peers.get(waiting.then.peer)
                if peer is not None:
                    pool = waiting.then.pool
                    self._deny(peer, pool, [(owner.file, Verdict.STORE_FULL) for owner in waiting.then.owners])
            case None:
                self._log("store.failed", detail=event.why, changes=len(waiting.changes))

    def _publish(self, filling: _Filling, ok: bytes) -> None:
        pool, index = filling.pool, filling.pool.index
        slots = array("I", range(filling.first, filling.first + len(ok))).tobytes()
        good_slots, bad_slots = _split(slots, ok)
        index.reusable(bad_slots)
        good_ids, bad_ids = _split(filling.ids, ok)
        if filling.job is None:
            self._finish_move(filling, good_ids, good_slots)
            return
        self._save(index.publish(good_ids, good_slots))
        if bad_ids:
            _, positions = _split(filling.job.positions, ok)
            filling.job.content.publishing += 1
            self._requeue(pool, _Job(filling.job.content, positions, filling.job.tried), filling.domain)
        pool.published_total += len(good_ids) // 4
        self._tally(pool, "pages.published", filling.domain, pages=len(good_ids) // 4)
        self._published(pool, filling.job.content)

    def _published(self, pool: _Pool, content: Content) -> None:
        content.publishing -= 1
        if content.publishing == 0:
            self._offer(pool, content)

    def _offer(self, pool: _Pool, content: Content, only: _Peer | None = None) -> None:
        """Tell who has reported a content how many of its pages are in the area, unless more are on their way."""
        if content.publishing or not content.reported:
            return
        available = pool.index.count_available(content)
        if not available:
            return
        if only is None:
            content.offered = available
        for domain, files in (*content.holders.items(), *content.unread.items()):
            peer = pool.peers.get(domain)
            if peer is not None and (only is None or peer is only):
                offers = self._offers.setdefault(peer.id, {})
                for file in files:
                    offers[file] = available

    # ----------------------------------------------------------------------------------------------------- grants

    def _on_attach(self, peer: _Peer, pool: _Pool, files: array[int]) -> None:
        holdings = pool.index.domains[peer.domain]
        denied: list[tuple[FileId, Verdict]] = []
        owners: list[OwnerSet] = []
        handed: list[bytes] = []
        # Before anything is taken for one of them.
        if len(set(files)) < len(files):
            raise ProtocolError("Attach: a file is there twice")
        for file in files:
            if (peer.domain, file) in pool.index.owners:
                raise ProtocolError(f"file {file} is granted already; it must be released first")
        for file in files:
            if file not in holdings.files:
                denied.append((file, Verdict.NOT_REPORTED))
            elif pool.reports_only:
                denied.append((file, Verdict.REPORT_ONLY))
            elif peer.domain in pool.detached:
                denied.append((file, Verdict.DETACHED))
            else:
                runs = pool.index.grantable(peer.domain, file)
                taken = self._take_references(peer, pool, runs)
                if not runs:
                    denied.append((file, Verdict.NOTHING_SHARED))
                elif taken is None:
                    denied.append((file, Verdict.GRANT_BUDGET))
                else:
                    runs, refs, sent = taken
                    domid = peer.identity.domid
                    owners.append(OwnerSet(pool.name, peer.domain, peer.instance, file, runs, domid, refs))
                    handed.append(sent)
        self._deny(peer, pool, denied)
        if owners:
            granting = _Granting(peer.id, pool, tuple(owners), tuple(handed))
            self._commit(granting.owners, granting)

    def _deny(self, peer: _Peer, pool: _Pool, denied: list[tuple[FileId, Verdict]]) -> None:
        for file, verdict in denied:
            held = pool.index.domains[peer.domain].files.get(file)
            path, size = (held.path, held.size) if held is not None else (None, 0)
            self._tally_refused(pool, peer.domain, "grant", verdict, path, size)
        if denied:
            self._send(
                peer.id, wire.Denied(array("I", [file for file, _ in denied]).tobytes(), bytes(v for _, v in denied))
            )

    def _take_references(self, peer: _Peer, pool: _Pool, runs: bytes) -> tuple[bytes, bytes, bytes] | None:
        """Take grant references for the slots of runs; return runs, references and what the domain is sent.

        None: the budget has not so many. Where free references are so scattered that a message cannot carry them all,
        only the first pages are granted. Without grants (`local`) the domain is sent the runs.
        """
        if pool.ledger is None or not runs:
            return runs, b"", runs
        domid, pages = peer.identity.domid, sum(array("I", runs)[2::3])
        refs = pool.ledger.take(domid, pages)
        if refs is None:
            self._tally(pool, "grants.refused", peer.domain, files=1, pages=pages)
            return None
        sent = handles(runs, refs)
        if len(sent) > wire.MAX_GRANT_RUNS * 12:
            sent = sent[: wire.MAX_GRANT_RUNS * 12]
            pages = sum(array("I", sent)[2::3])
            pool.ledger.give_back(domid, last_pages(refs, pages))
            runs, refs = first_pages(runs, pages), first_pages(refs, pages, width=2)
        return runs, refs, sent

    def _granted(self, granting: _Granting) -> None:
        """The owners are in the store: the grants may be made."""
        pool = granting.pool
        for owner in granting.owners:
            pool.index.own(owner)
        if pool.ledger is None:
            self._hand_out(granting)
            return
        slots = spread(b"".join(slot_stretches(owner.runs) for owner in granting.owners))
        refs = spread(b"".join(owner.refs for owner in granting.owners))
        token = self._wait(_Writing(granting))
        self._act(WriteGrants(token, pool.name, granting.owners[0].domid, slots.tobytes(), refs.tobytes()))

    def _on_grants_written(self, token: int) -> None:
        writing = self._waiting.pop(token, None)
        if isinstance(writing, _Writing):
            self._hand_out(writing.granting)

    def _on_grants_failed(self, event: GrantsFailed) -> None:
        """Nothing was written. What the entries hold instead only the area can say: it revokes them."""
        writing = self._waiting.pop(event.token, None)
        if not isinstance(writing, _Writing):
            return
        granting = writing.granting
        pool, peer = granting.pool, self._peers.get(granting.peer)
        self._log("grants.failed", pool=pool.name, detail=event.why, files=len(granting.owners))
        files = [owner.file for owner in granting.owners]
        self._revoke_files(pool, granting.owners[0].domain, files, "grants-failed")
        if peer is not None:
            self._deny(peer, pool, [(owner.file, Verdict.GRANT_BUDGET) for owner in granting.owners])

    def _hand_out(self, granting: _Granting) -> None:
        """Send the handles. A peer may have left meanwhile; its grace time ends these grants."""
        pool, peer = granting.pool, self._peers.get(granting.peer)
        if peer is None:
            return
        pages = 0
        files = pool.index.domains[peer.domain].files
        for owner, sent in zip(granting.owners, granting.handles, strict=True):
            slots = array("I", owner.runs)[1::3]
            count = sum(array("I", owner.runs)[2::3])
            pages += count
            held = files.get(owner.file)
            path, size = (held.path, held.size) if held is not None else (None, 0)
            self._tally(pool, "files.shared", peer.domain, path=path, files=1, pages=count, file_bytes=size)
            if pool.ledger is not None:
                (grantor, _) = pool.index.segments[slots[0] // pool.index.slots_per_segment]
                if peer.grantor != grantor:
                    peer.grantor = grantor
                    self._send(peer.id, wire.Grantor(grantor))
            else:
                for segment in sorted({slot // pool.index.slots_per_segment for slot in slots} - peer.segments):
                    self._act(SendSegment(peer.id, pool.name, segment))
                    peer.segments.add(segment)
            self._send(peer.id, wire.Granted(owner.file, sent))
        pool.granted_total += pages
        self._tally(pool, "pages.granted", peer.domain, files=len(granting.owners), pages=pages)

    def _revoke_files(self, pool: _Pool, domain: DomainId, files: Iterable[FileId], reason: str) -> None:
        """End a domain's ownership of files that it has not released."""
        count, pages = self._release(pool, domain, files)
        if count:
            self._tally(pool, "pages.revoked", domain, reason=reason, files=count, pages=pages)

    def _release(self, pool: _Pool, domain: DomainId, files: Iterable[FileId]) -> tuple[int, int]:
        """End a domain's ownership of these files; those not owned are passed over. Return how many files and pages."""
        owned = [file for file in dict.fromkeys(files) if (domain, file) in pool.index.owners]
        pages = sum(pool.index.owners[domain, file].page_count for file in owned)
        if pool.ledger is None:
            self._save(pool.index.release(domain, owned))
            return len(owned), pages
        gone: dict[int, list[Owner]] = {}
        for file in owned:
            found = pool.index.disown(domain, file)
            if found is not None:
                gone.setdefault(found[0].domid, []).append(found[0])
                self._save([found[1]])
        for domid, owners in gone.items():
            refs = b"".join(owner.refs for owner in owners)
            slots = b"".join(slot_stretches(owner.runs) for owner in owners)
            self._revoke(_Revoking(pool, domid, refs, slots))
        return len(owned), pages

    def _revoke(self, revoking: _Revoking) -> None:
        if revoking.refs:
            self._act(Revoke(self._wait(revoking), revoking.pool.name, spread(revoking.refs).tobytes()))

    def _on_revoked(self, event: Revoked) -> None:
        """Entries that nobody maps are free now, and so may be their slots; the others stay pinned (I4)."""
        revoking = self._waiting.pop(event.token, None)
        if not isinstance(revoking, _Revoking):
            return
        pool, domid = revoking.pool, revoking.domid
        assert pool.ledger is not None
        busy = event.busy.count(1)
        if busy == 0:
            free, pinned = (revoking.refs, revoking.slots), (b"", b"")
        elif busy == len(event.busy):
            free, pinned = (b"", b""), (revoking.refs, revoking.slots)
        else:
            refs, slots = spread(revoking.refs), spread(revoking.slots)
            others = event.busy.translate(_OTHERS)
            free = _chosen(refs, others), _chosen(slots, others)
            pinned = _chosen(refs, event.busy), _chosen(slots, event.busy)
        pool.ledger.give_back(domid, free[0])
        self._save(pool.index.unmap(_counted(free[1])))
        if busy:
            if not revoking.again:
                self._tally(pool, "grants.pinned", self._name_of(pool, domid), pages=busy)
            mine = pool.pinned.setdefault(domid, _Pinned(b"", b"", 0.0))
            mine.refs += pinned[0]
            mine.slots += pinned[1]
            mine.retry_at = self._now + self.settings.pinned_retry

    def _sweep_pinned(self, pool: _Pool) -> None:
        for domid in [domid for domid, pinned in pool.pinned.items() if self._now >= pinned.retry_at]:
            pinned = pool.pinned.pop(domid)
            self._revoke(_Revoking(pool, domid, pinned.refs, pinned.slots, again=True))

    @staticmethod
    def _name_of(pool: _Pool, domid: int) -> DomainId:
        return next((name for name, number in pool.domids.items() if number == domid), f"domid {domid}")

    def _on_domain_gone(self, domid: int) -> None:
        """Nobody can map anything under this number any more: its grants end at once."""
        for peer in [peer for peer in self._peers.values() if peer.identity.domid == domid]:
            if peer.identity.backend == "xen":
                self._act(Disconnect(peer.id))
                self._on_closed(peer.id, "the domain is gone")
        for pool in self._pools.values():
            for domain in [name for name, number in pool.domids.items() if number == domid]:
                del pool.domids[domain]
                pool.detached.pop(domain, None)
                if domain not in pool.peers:
                    pool.absent[domain] = self._now
            if domid in pool.pinned:
                pool.pinned[domid].retry_at = self._now

    def _restore_granted(self, pool: _Pool, ledger: GrantLedger, record: PoolRecord) -> None:
        """Make the entries in the area's table and the owners in the store the same (I6).

        An owner one of whose entries is not there was never handed out: the broker died before. An entry that no
        owner has is one that was to be revoked: it goes now, or stays pinned.
        """
        lost, orphans = compare(record.owners.items(), pool.setup.entries)
        reached = array("I")
        for _, slots in orphans.values():
            reached.extend(slots)
        changes, reached = pool.index.restore(record, set(lost), reached)
        self._save(changes)
        for owner in pool.index.owners.values():
            ledger.claim(owner.domid, owner.refs)
        for domid, (refs, slots) in orphans.items():
            counted, reached = reached[: len(slots)], reached[len(slots) :]
            ledger.claim(domid, gather(refs))
            self._revoke(_Revoking(pool, domid, gather(refs), gather(counted)))
        if lost or orphans:
            orphaned = sum(len(refs) for refs, _ in orphans.values())
            self._log("grants.reconciled", pool=pool.name, owners_dropped=len(lost), entries_without_owner=orphaned)

    def last_words(self, now: float) -> list[Action]:
        """Return the lines that were still being gathered. Call it last."""
        self._now = now
        for pool in self._pools.values():
            self._log_tallies(pool)
        actions, self._actions = self._actions, []
        return actions

    def detach(self, name: PoolId, domain: DomainId, on: bool, now: float) -> list[Action]:
        """Bring a domain's consumers back to their plain files, before it is saved or migrated; or end that.

        It ends by itself when the domain comes back as another Xen domain. Raises UsageError for a domain that the
        pool does not know.
        """
        self._now = now
        pool = self._pools.get(name)
        if pool is None:
            raise UsageError(f"there is no pool {name}", "see `sharearea pools`")
        peer = pool.peers.get(domain)
        if peer is None and domain not in pool.domids and domain not in pool.absent:
            raise UsageError(f"pool {name} has no domain {domain}", "see `sharearea domains`")
        if on:
            self._log("domain.detached", pool=name, domain=domain)
            pool.detached[domain] = peer.identity.domid if peer is not None else pool.domids.get(domain, 0)
            if peer is not None:
                self._withdraw(peer, pool.index.owned_by(domain), WithdrawReason.OPERATOR)
        elif pool.detached.pop(domain, None) is not None:
            self._log("domain.reattached", pool=name, domain=domain)
            if peer is not None:
                files = pool.index.domains[domain].files.values()
                pool.reoffer.extend((peer.id, content) for content in {file.content: None for file in files})
        return self._finish()

    def _withdraw(self, peer: _Peer, files: list[FileId], reason: WithdrawReason) -> None:
        for at in range(0, len(files), wire.MAX_IDS):
            self._send(peer.id, wire.Withdraw(array("I", files[at : at + wire.MAX_IDS]).tobytes(), int(reason)))
        pool = peer.pool
        if pool is None:
            return
        held = pool.index.domains[peer.domain].files
        for file in files:
            owner, entry = pool.index.owners.get((peer.domain, file)), held.get(file)
            path, size = (entry.path, entry.size) if entry is not None else (None, 0)
            pages = owner.page_count if owner is not None else 0
            self._tally(
                pool,
                "files.withdrawn",
                peer.domain,
                reason=reason.code,
                path=path,
                files=1,
                pages=pages,
                file_bytes=size,
            )

    # ------------------------------------------------------------------------------------------------------- time

    def _on_tick(self) -> None:
        for peer in list(self._peers.values()):
            self._check_peer(peer)
        for pool in self._pools.values():
            self._check_absent(pool)
            self._sweep_pinned(pool)
            self._sweep_reoffers(pool)
            self._sweep_remarks(pool)
            self._sweep_retries(pool)
            self._sweep_offers(pool)
            self._sweep_segments(pool)
            if self._now >= pool.tally_at:
                self._log_tallies(pool)

    def _check_peer(self, peer: _Peer) -> None:
        timeout = self.settings.answer_timeout
        if peer.pool is None:
            if self._now - peer.heard > timeout:
                self._expel(peer.id, "no-hello", f"no Hello within {timeout:.0f} s")
            return
        if peer.ping_sent is not None and self._now - peer.ping_sent > timeout and self._now - peer.heard > timeout:
            self._expel(peer.id, "no-answer", f"no answer for {timeout:.0f} s")
            return
        if peer.ping_sent is None and self._now - peer.heard > self.settings.ping_interval:
            peer.ping = (peer.ping + 1) & 0xFFFFFFFF
            peer.ping_sent = self._now
            self._send(peer.id, wire.Ping(peer.ping))
        for request, fetch in list(peer.fetches.items()):
            if self._now - fetch.since > timeout:
                del peer.fetches[request]
                self._requeue(peer.pool, fetch.job, peer.domain)
        late = [file for file, report in peer.reports.items() if self._now - report.since > timeout]
        for file in late:
            report = self._forget_report(peer, file)
            if report is not None:
                self._answer(peer, [(file, Verdict.NOT_REPORTED)])
                self._not_coming(peer.pool, report)
        if late or peer.deferred:
            self._expect_deferred(peer, peer.pool)

    def _check_absent(self, pool: _Pool) -> None:
        for domain in list(pool.index.leaving):
            self._drain(pool, domain)
        for domain in [d for d, until in pool.absent.items() if self._now >= until]:
            files = pool.index.owned_by(domain)
            self._revoke_files(pool, domain, files[:_SWEEP], "grace-over")
            if len(files) <= _SWEEP:
                del pool.absent[domain]
                if domain not in pool.detached:
                    pool.domids.pop(domain, None)
        if pool.settle_at is not None and self._now >= pool.settle_at:
            if self._now < pool.settle_by and self._awaits_reports(pool):
                pool.settle_at = self._now + self.settings.grace / 10
            else:
                pool.settle_at = None
                self._save(pool.index.settle())
        for domain in [d for d, until in pool.barred.items() if self._now >= until]:
            del pool.barred[domain]

    def _awaits_reports(self, pool: _Pool) -> bool:
        """Return whether a domain that came back has not yet reported all that it holds from before.

        Its pages would count as used by nobody, and segments that are full would be emptied as thin (seen on Xen).
        """
        return any(
            domain in pool.peers and file not in pool.index.domains[domain].files for domain, file in pool.index.owners
        )

    def _sweep_reoffers(self, pool: _Pool) -> None:
        """Offer again what a domain was told before it was detached."""
        for _ in range(min(_SWEEP, len(pool.reoffer))):
            peer_id, content = pool.reoffer.popleft()
            peer = self._peers.get(peer_id)
            if peer is not None:
                self._offer(pool, content, only=peer)

    def _sweep_remarks(self, pool: _Pool) -> None:
        """Put back marks that `drop` took off pages which the domain still holds through another file."""
        for domain, contents in list(pool.remarks.items()):
            part = [contents.popleft() for _ in range(min(_SWEEP, len(contents)))]
            pool.index.remark(domain, part)
            for content in part:
                if content.holders:
                    self._consider(pool, content)
            if not contents:
                del pool.remarks[domain]

    def _sweep_retries(self, pool: _Pool) -> None:
        due = list(islice((c for c, at in pool.retry.items() if self._now >= at), _SWEEP))
        for content in due:
            del pool.retry[content]
            if content.holders:
                self._consider(pool, content)
        if pool.reconsider_at is not None and self._now >= pool.reconsider_at:
            # The same pages may be in other contents, whose holders have them: those go first, and of the others the
            # one whose turn is longest ago.
            pool.reconsider_at = None
            pool.undelivered = {content: None for content in pool.undelivered if content.holders}
            pool.reconsider.extend(c for c in pool.index.all_contents() if c not in pool.undelivered)
            pool.reconsider.extend(pool.undelivered)
        for _ in range(min(_SWEEP, len(pool.reconsider))):
            content = pool.reconsider.popleft()
            if content.holders:
                self._consider(pool, content)

    def _sweep_offers(self, pool: _Pool) -> None:
        """Offer what other contents' publications brought: pages are shared by contents that do not know each other."""
        if not pool.offers:
            # A domain that is never done with its fetches must not keep the others from theirs.
            if pool.offers_at == pool.index.changed or not (pool.quiet or self._now >= pool.offers_due):
                return
            pool.offers_at, pool.offers_due = pool.index.changed, self._now + self.settings.answer_timeout
            pool.offers.extend(pool.index.all_contents())
        for _ in range(min(_SWEEP, len(pool.offers))):
            content = pool.offers.popleft()
            if content.reported and pool.index.count_available(content) > content.offered:
                self._offer(pool, content)

    # --------------------------------------------------------------------------------------------------- segments

    def _sweep_segments(self, pool: _Pool) -> None:
        """Close segments that nobody needs; empty those that few pages use (design section 7)."""
        index = pool.index
        if pool.moving is not None or pool.offers or index.changed == pool.looked_at:
            return
        if not pool.quiet or self._now < pool.paused_until:
            return
        for segment in sorted(index.segments):
            # The newest one stays, for a restarted broker goes on counting slots behind the segments that it finds.
            if segment >= index.current_segment() or segment == max(index.segments):
                break
            slots, ids, mapped = index.live(segment)
            if not slots and not mapped:
                self._close_segment(pool, segment)
                return  # one at a time: its memory goes back to the host now
            elif not slots:
                if segment not in pool.emptying:
                    pool.emptying.add(segment)
                    index.empty(segment)
                    for domain, files in index.owners_in(segment).items():
                        peer = pool.peers.get(domain)
                        if peer is not None:
                            self._withdraw(peer, files, WithdrawReason.MOVING)
            elif len(slots) // 4 < self.settings.thin_ratio * index.slots_per_segment:
                # Where slots are used again, another segment would be as thin as this one.
                if not index.reuse or index.room_beside(segment) >= len(slots) // 4:
                    self._move(pool, segment, slots, ids)
                    return
        pool.looked_at = index.changed

    def _move(self, pool: _Pool, segment: int, slots: bytes, ids: bytes) -> None:
        pool.moving = segment
        pool.index.empty(segment)
        count = min(len(ids) // 4, wire.MAX_FETCH_PAGES)
        if pool.index.reuse:
            ((first, count),) = pool.index.allocate_scattered(count, 1)
        else:
            first = pool.index.allocate(count)
        slots, ids = slots[: count * 4], ids[: count * 4]
        want = pool.index.hold(ids)
        filling = _Filling(pool, None, ids, first, want, "")
        self._act(Move(self._wait(filling), pool.name, slots, first, want))

    def _finish_move(self, filling: _Filling, ids: bytes, slots: bytes) -> None:
        pool = filling.pool
        self._save(pool.index.publish(ids, slots))
        self._save(pool.index.let_go(filling.ids))
        self._log("segment.moved", pool=pool.name, segment=pool.moving, pages=len(ids) // 4)
        pool.moving = None

    def _close_segment(self, pool: _Pool, segment: int) -> None:
        pool.emptying.discard(segment)
        self._save([pool.index.close_segment(segment)])
        for peer in pool.peers.values():
            if segment in peer.segments:
                peer.segments.discard(segment)
                self._send(peer.id, wire.Retired(array("I", [segment]).tobytes()))
        self._log("segment.closed", pool=pool.name, segment=segment)

    def _save(self, changes: Iterable[Change]) -> None:
        """Write what has already happened at the end of this step; if that fails, again later."""
        self._unsaved.extend(changes)

    # ------------------------------------------------------------------------------------------------- looking in

    def pools(self) -> Mapping[PoolId, Any]:
        """Return the pools' states, for the simulation to read. Nothing in them may be changed."""
        return self._pools


def _split(column: bytes, flags: bytes) -> tuple[bytes, bytes]:
    """Split a packed column into the entries whose flag is 1 and the others."""
    if flags.count(1) == len(flags):
        return column, b""
    values = array("I", column)
    chosen = array("I", compress(values, flags.translate(_ONES)))
    return chosen.tobytes(), array("I", compress(values, flags.translate(_OTHERS))).tobytes()


def _within(classes: bytes, pages: int) -> bool:
    """Return whether both stretches of page classes are within a file."""
    text, texts, fixed, count = array("I", classes)
    return text + texts <= pages and fixed + count <= pages


def _who(peer: _Peer) -> dict[str, object]:
    """Return what the log says of a peer besides its name."""
    identity = peer.identity
    return {"domid": identity.domid} if identity.backend == "xen" else {"uid": identity.uid}


def _chosen(numbers: array[int], flags: bytes) -> bytes:
    """Return, as packed stretches, the numbers whose flag is not 0."""
    return gather(array("I", compress(numbers, flags)))


def _counted(slots: bytes) -> bytes:
    """Leave out, of packed stretches, what is no slot."""
    if NO_SLOT not in array("I", slots)[0::2]:
        return slots
    return array("I", [n for stretch in pairs(slots) if stretch[0] != NO_SLOT for n in stretch]).tobytes()


def _page_runs(content: Content, positions: bytes) -> bytes:
    """Return (first page, count) runs for pages at ascending positions: at most MAX_FETCH_PAGES of them."""
    runs = array("I")
    for position in array("I", positions):
        page = content.page_number(position)
        if runs and runs[-2] + runs[-1] == page:
            runs[-1] += 1
        else:
            runs.extend((page, 1))
    return runs.tobytes()

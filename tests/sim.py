"""A whole host in one process: one real Engine, one real Store, several real Agents, and everything else a fake.

Run as `python -m tests.sim --seeds 0:2000` (or `--seed N --steps M --verbose`, or `--mutants`). A seed decides
everything: the same seed takes the same steps. Every message is really encoded and decoded. The fakes are the clock,
links, areas, file systems with leases, page caches, consumers, the runner of each agent and the broker's loop; these
two do what runner.py and broker.py do with events and actions, in the same order. About half of the seeds are `local`,
the others `xen`: there the area has a table of grants that does what Xen was seen to do (an entry that is mapped cannot
be revoked, a mapping outlives its area, a domain's end clears its mappings at once), domains are destroyed, or saved
and restored under another number, areas are destroyed, and consumers keep pages mapped that they have released. What
is checked, and when:

I1  every segment that a domain has, and every slot that a consumer maps, is its own pool's and was granted to it; on
    `xen` handles are references of entries that exist, for that domain, and lead to what it reported;
I2  no slot is written once it has been published; a segment is written only by the broker that created it; on `xen` a
    slot is written only when neither a page nor the store nor an entry has it, and a mapped page never changes;
I3  at its publication, and at the end, a slot's bytes have the fingerprint that the table and the store have for it;
I4  a slot of an area is published once; when it is freed, no consumer of a connected agent maps it, nor one of an agent
    whose grace time has not ended; on `xen` no entry reaches a slot that is freed, no reference is handed out while its
    entry is there, and every slot of an open segment is taken, free, or about to be (none is lost);
I5  a view equals the file page by page when it is made, and a file changes only when no view of it is left; left out
    are consumers that hang beyond the agent's patience, and those whose agent has died or hangs for too long;
I6  after every step of the engine: owners in the index = owners in the store, slots taken = slots in the store (changes
    that a full store refused counted in); of a connected domain: owners = grants its agent holds, but for Granted and
    Withdraw on the way to it and Release on the way from it; on `xen` the entries in the area's table = the owners and
    what is pinned, the ledger counts the same, and an entry is written only when the store has its owner;
I7  the engine and the agents never raise; actions per event are bounded; at rest every page that k domains can deliver
    is in the area, every file is offered, every consumer has what is offered; when all have left, nothing is left;
I8  after a detach every consumer is on plain files.
k   a page is wanted only when k domains of its pool hold it; a grant brings only content that the domain reported;
    nothing sent to a domain has another pool's key or area in it.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import contextlib
import functools
import hashlib
import os
import random
import sys
import tempfile
import time
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from sharearea import engine as engine_module
from sharearea import stats
from sharearea.common import wire
from sharearea.common.errors import ProtocolError, UsageError
from sharearea.common.native import NativePageTable
from sharearea.engine import Engine, PoolSetup
from sharearea.engine import Settings as EngineSettings
from sharearea.grants import FIRST_REFERENCE, NO_SLOT, GrantLedger, GrantLimits, handles, slots_of, spread
from sharearea.index import PoolIndex
from sharearea.model import (
    Action,
    Change,
    CloseSegment,
    Commit,
    CommitFailed,
    Committed,
    Disconnect,
    DomainGone,
    Event,
    Fill,
    Filled,
    FillFailed,
    GrantsFailed,
    GrantsWritten,
    Identity,
    Log,
    Malformed,
    Move,
    OwnerCleared,
    OwnerSet,
    PeerClosed,
    PeerConnected,
    PoolOpened,
    PoolRecord,
    Received,
    Revoke,
    Revoked,
    SegmentClosed,
    SegmentOpened,
    Send,
    SendSegment,
    SlotsFilled,
    SlotsFreed,
    Tick,
    Verdict,
    WriteGrants,
)
from sharearea.pagetable import PageTable, ReferencePageTable
from sharearea.policy import Admission, DomainRule, Policy, PoolRules, Refusal
from sharearea.store import Store
from sharearea_agent import agent as ag
from sharearea_agent import consumer_wire as cw
from sharearea_agent import mapper as mapper_module
from sharearea_agent.agent import Agent, FileIdentity, FileKey, Observation, Stage
from sharearea_agent.common import wire as agent_wire

PAGE: Final = wire.PAGE_SIZE
FP: Final = wire.FINGERPRINT_SIZE
LEASE_BREAK_TIME: Final = 45.0
LATENCY: Final = 2.0  # nothing is under way for longer, unless a fault holds it up
STEPS: Final = 400
SEEDS: Final = 2000


class Violation(AssertionError):
    """An invariant does not hold."""


def check(ok: object, name: str, text: str = "", *more: object) -> None:
    if not ok:
        raise Violation(f"{name}: {text} {' '.join(map(repr, more))}".rstrip())


# ----------------------------------------------------------------------------------------------------------- content


@functools.cache
def content_of(symbol: int) -> bytes:
    """The bytes of a page; symbol 0 is the zero page."""
    return symbol.to_bytes(8, "little") * (PAGE // 8)


@functools.lru_cache(maxsize=4096)
def fingerprint(key: bytes, page: bytes) -> bytes:
    return hashlib.blake2b(page, key=key, digest_size=FP).digest()


def file_root(size: int, fingerprints: bytes) -> bytes:
    return hashlib.blake2b(size.to_bytes(8, "little") + fingerprints, digest_size=FP, person=b"root").digest()


def u32s(values: Any) -> bytes:
    return array("I", values).tobytes()


def ints(column: bytes) -> array[int]:
    return array("I", column)


def triples(runs: bytes) -> list[tuple[int, int, int]]:
    values = ints(runs)
    return list(zip(values[0::3], values[1::3], values[2::3], strict=True))


@functools.lru_cache(maxsize=4096)
def entries_of(runs: bytes, refs: bytes) -> dict[int, int]:
    """Reference -> slot, of an owner's runs."""
    return dict(zip(spread(refs), slots_of(runs), strict=True))


sent_of = functools.lru_cache(maxsize=4096)(lambda runs, refs: handles(runs, refs) if refs else runs)


def pages_of(runs: bytes) -> dict[int, int]:
    """Page -> slot or reference."""
    return {page + i: slot + i for page, slot, count in triples(runs) for i in range(count)}


# -------------------------------------------------------------------------------------------------------- what varies


@dataclass
class Plan:
    """What a seed decides before the first step."""

    native: bool
    fd_store: bool
    k: dict[str, int]
    max_domains: int
    max_files: int
    max_bytes: int
    max_pages: int
    slots_per_segment: int
    max_segments: int
    pending_pages: int
    batches: tuple[int, ...]  # files, pages, fetch, ids, attach, runs
    sweep: int
    guests: int
    liars: int
    crash: float  # per action of the broker
    fill_failure: float
    commit_failure: float
    queue_full: float
    cut: float  # weights of steps
    agent_crash: float
    hang: float
    racy: float
    symbols: int
    key_lost: float
    drop: bool
    xen: bool
    entries: tuple[int, ...]  # of the table of grants, for one broker and the next
    per_domain: int
    grant_failure: float
    pin: float  # a consumer keeps pages mapped that it has let go of
    strays: float  # entries that nobody of ours has written
    destroy: float  # weights of steps
    save: float
    area_lost: float
    cold_start: float  # instead of an eviction

    @classmethod
    def draw(cls, rng: random.Random) -> Plan:
        def sometimes(p: float, value: float) -> float:
            return value if rng.random() < p else 0.0

        calm = rng.random() < 0.15
        faults = 0.0 if calm else 1.0
        sizes = (
            rng.choice((2, 3, 256)),
            rng.choice((2, 5, 4096)),
            rng.choice((1, 2, 3, 255)),
            rng.choice((13, 4096)),  # the codec takes no longer array either, and Welcome has 13 entries
            rng.choice((1, 2, 64)),
            rng.choice((1, 3, 65_536, 65_536)),
        )
        return cls(
            native=rng.random() < 0.5,
            fd_store=rng.random() < 0.75,
            k={"p0": rng.choice((2, 2, 3)), "p1": 2},
            max_domains=rng.choice((3, 4, 8, 8)),
            max_files=rng.choice((3, 6, 100, 100)),
            max_bytes=rng.choice((10, 24, 10_000, 10_000)) * PAGE,
            max_pages=rng.choice((6, 14, 1000, 1000)),
            slots_per_segment=rng.choice((4, 8, 16)) if sizes[2] != 255 else 255,
            max_segments=rng.choice((2, 1000, 1000, 1000)),
            pending_pages=rng.choice((1, 4, 1000)),
            batches=sizes,
            sweep=rng.choice((1, 3, 256)),
            guests=rng.choice((2, 3, 4, 5)),
            liars=0 if calm else rng.choice((0, 0, 1, 2)),
            crash=faults * sometimes(0.6, 0.006),
            fill_failure=faults * sometimes(0.3, 0.15),
            commit_failure=faults * sometimes(0.3, 0.1),
            queue_full=faults * sometimes(0.2, 0.004),
            cut=faults * sometimes(0.5, 1.5),
            agent_crash=faults * sometimes(0.4, 0.8),
            hang=faults * sometimes(0.4, 1.5),
            racy=faults * sometimes(0.3, 0.3),
            symbols=rng.choice((3, 8, 20)),
            key_lost=rng.choice((0.0, 0.3)),
            drop=rng.random() < 0.7,
            xen=rng.random() < 0.5,
            entries=rng.choice(((14, 20), (40, 24), (10_000,), (10_000,))),
            per_domain=rng.choice((4, 12, 10_000, 10_000)),
            grant_failure=faults * sometimes(0.3, 0.1),
            pin=sometimes(0.6, 0.3),
            strays=faults * sometimes(0.4, 0.5),
            destroy=faults * sometimes(0.5, 0.6),
            save=faults * sometimes(0.5, 0.8),
            area_lost=faults * sometimes(0.4, 0.25),
            cold_start=faults * sometimes(0.5, 0.7),
        )


@functools.lru_cache(maxsize=512)
def _rules(name: str, k: int, max_domains: int, max_files: int, max_bytes: int, max_pages: int) -> PoolRules:
    return PoolRules(
        name,
        exclude=("**/secret*",),
        min_file_bytes=1,
        k=k,
        max_domains=max_domains,
        max_files=max_files,
        max_bytes=max_bytes,
        max_pages=max_pages,
    )


_BATCHES: Final = (
    "MAX_REPORT_FILES",
    "MAX_REPORT_PAGES",
    "MAX_FETCH_PAGES",
    "MAX_IDS",
    "MAX_ATTACH",
    "MAX_GRANT_RUNS",
)


@contextlib.contextmanager
def small_batches(plan: Plan) -> Iterator[None]:
    """Make both sides fill messages after a few entries, so that many of them are needed."""
    modules = (wire, agent_wire)
    before = [(module, name, getattr(module, name)) for module in modules for name in _BATCHES]
    sweep = engine_module._SWEEP
    try:
        for module in modules:
            for name, value in zip(_BATCHES, plan.batches, strict=True):
                setattr(module, name, value)
        cast(Any, engine_module)._SWEEP = plan.sweep
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        cast(Any, engine_module)._SWEEP = sweep


# ------------------------------------------------------------------------------------------------------ time and order


class Channel:
    """Things under way to one receiver, in their order. `ready` says whether the receiver takes anything now."""

    __slots__ = ("deliver", "items", "name", "ready")

    def __init__(self, name: str, deliver: Callable[[Any], None], ready: Callable[[], bool]) -> None:
        self.name = name
        self.deliver = deliver
        self.ready = ready
        self.items: deque[tuple[float, Any]] = deque()


# -------------------------------------------------------------------------------------------------- the sharing area


@dataclass(eq=False)
class Segment:
    pool: str
    area: bytes
    number: int
    ino: int
    writable: bool = True
    slots: dict[int, bytes] = field(default_factory=dict)


@dataclass(eq=False)
class Entry:
    """A grant in force. `mapped`: by how many mappings; above 0 Xen has set GTF_reading."""

    area: XenArea
    domid: int
    slot: int  # NO_SLOT: a frame that is none
    mapped: int = 0


@dataclass(eq=False)
class XenArea:
    """An area domain: its frames are in Broker.areas, here are its number and its table of grants."""

    pool: str
    area: bytes
    domid: int | None = None  # no domain before the first fill
    entries: dict[int, Entry] = field(default_factory=dict)
    destroyed: bool = False


@dataclass(eq=False)
class Mapping:
    """A page of an area that a domain has mapped through a grant: it stays, whatever becomes of area and entry."""

    entry: Entry
    segment: Segment
    inside: int
    page: bytes
    until: float = 0.0  # for one that outlives its release


class CheckedTable:
    """A page table that watches what the engine does with it (I3, I4, k)."""

    def __init__(self, world: World, pool: str, area: bytes, inner: PageTable) -> None:
        self._world = world
        self._pool = pool
        self._area = area
        self._inner = inner
        self.taken: dict[int, bytes] = {}  # slot -> fingerprint, until it is reported as freed
        self.restoring = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def want(self, ids: bytes, k: int) -> bytes:
        positions = self._inner.want(ids, k)
        if positions:
            self._world.check_k(self._pool, [ids[p * 4 : p * 4 + 4] for p in ints(positions)])
        return positions

    def publish(self, ids: bytes, slots: bytes) -> bytes:
        world = self._world
        fps = self._inner.fps(ids)
        freed = self._inner.publish(ids, slots)
        gone = set(ints(freed))
        published = world.published.setdefault(self._area, {})
        for at, slot in enumerate(ints(slots)):
            fp = fps[at * FP : at * FP + FP]
            check(world.slot_fingerprint(self._pool, slot) == fp, "I3", "published with other bytes", slot)
            check(world.shadow[self._pool].slots.get(slot) == fp, "I6", "published but not in the store", slot)
            if self.restoring:
                # On `xen` the broker may have died between the record of a page and its publication.
                same = world.plan.xen or published.get(slot, fp) == fp
                check(same, "I4", "restored with another page", slot)
            else:
                again = slot in self.taken if world.plan.xen else slot in published
                check(not again, "I4", "published twice", slot)
            published[slot] = fp
            if slot not in gone:
                self.taken[slot] = fp
        self._free(freed)
        return freed

    def unmark(self, ids: bytes, holder: int) -> None:
        self._inner.unmark(ids, holder)

    def unref(self, ids: bytes) -> bytes:
        freed = self._inner.unref(ids)
        self._free(freed)
        return freed

    def unmap(self, runs: bytes) -> bytes:
        freed = self._inner.unmap(runs)
        self._free(freed)
        return freed

    def map(self, runs: bytes) -> None:
        self._inner.map(runs)
        published = self._world.published.get(self._area, {})
        for slot in pages_of(runs).values() if runs else ():
            self.taken.setdefault(slot, published[slot])

    def _free(self, freed: bytes) -> None:
        for slot in ints(freed):
            self.taken.pop(slot, None)
            if not self.restoring:
                self._world.check_freed(self._pool, self._area, slot)


# --------------------------------------------------------------------------------------------------------- the broker


class Crash(Exception):
    """The broker ends here."""


@dataclass(eq=False)
class Link:
    """One connection; `peer` is its number on the broker's side."""

    peer: int
    guest: Guest | Liar
    up: Channel
    down: Channel
    broker_open: bool = True
    guest_open: bool = True
    cut: bool = False  # broken, and not both sides know it
    told: list[wire.Message] = field(default_factory=list)  # Grantor
    reader_up: wire.FrameReader = field(default_factory=wire.FrameReader)
    reader_down: agent_wire.FrameReader = field(default_factory=agent_wire.FrameReader)


@dataclass
class Reported:
    """What a peer has said of one file, as the broker's side of the link saw it."""

    root: bytes
    size: int
    pages: dict[int, bytes] = field(default_factory=dict)


class Broker:
    """The loop of broker.py over fakes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.engine: Engine | None = None
        self.links: dict[int, Link] = {}
        self.reported: dict[int, dict[int, Reported]] = {}
        self.areas: dict[str, dict[int, Segment]] = {"p0": {}, "p1": {}}
        self.area_ids: dict[str, bytes] = {}
        self.tables: dict[str, CheckedTable] = {}
        self.keys: dict[str, tuple[bytes, bytes]] = {}
        self.left_at: dict[tuple[str, str], float] = {}
        self.xen = {pool: XenArea(pool, b"") for pool in self.areas}
        self.starts = 0
        self.failed = False  # something that may be because an area is gone
        self.gone: dict[int, int] = {}  # domains whose end was told -> owners that they had when that was last counted
        self.working = False
        for pool in self.areas:
            self._new_key(pool)

    def _new_key(self, pool: str) -> None:
        self.keys[pool] = (self.world.random_bytes(32), self.world.random_bytes(16))

    def start(self) -> None:
        world, plan = self.world, self.world.plan
        records = world.store.load()
        world.check_store(records)
        self.starts += 1
        setups = {}
        for pool, segments in self.areas.items():
            record = records.get(pool)
            for segment in segments.values():
                segment.writable = plan.xen
            if record is None or self._lost(pool, record):
                self._new_area(pool)
                record = None
            else:
                for number in [n for n in segments if n not in record.segments]:
                    del segments[number]
                self.area_ids[pool] = record.area
            setups[pool] = self._setup(pool, record)
            self.tables[pool].restoring = True
        settings = EngineSettings(pending_pages=plan.pending_pages, fetches_per_peer=world.rng.choice((1, 4)))
        self.engine = Engine(world.policy, setups, world.file_root, settings)
        self.left_at = {(pool, guest.name): world.now for pool in setups for guest in world.guests}
        world.say("broker starts")
        self._carry_out(lambda engine: engine.start(world.now))
        for table in self.tables.values():
            table.restoring = False
        if plan.xen and self.engine is not None and world.chance(0.5):
            owners = [owner for pool in self.engine.pools().values() for owner in pool.index.owners.values()]
            for domid in sorted({owner.domid for owner in owners} - world.domids):
                self.feed(DomainGone(domid))

    def _lost(self, pool: str, record: PoolRecord) -> bool:
        """Whether a segment that the store has is not there."""
        segments = self.areas[pool]
        if any(n not in segments or segments[n].ino != ino for n, (_, ino) in record.segments.items()):
            return True  # area and record differ, for the broker died before the store knew of a new area
        if not self.world.plan.xen:
            return not self.world.plan.fd_store
        return self.xen[pool].destroyed or record.area != self.xen[pool].area

    def _new_area(self, pool: str) -> None:
        world = self.world
        self.areas[pool].clear()
        self.area_ids[pool] = world.random_bytes(16)
        self.xen[pool] = XenArea(pool, self.area_ids[pool])
        if world.chance(world.plan.key_lost):
            self._new_key(pool)

    def _setup(self, pool: str, record: PoolRecord | None) -> PoolSetup:
        world, plan = self.world, self.world.plan
        key, epoch = self.keys[pool]
        area = self.area_ids[pool]
        make = cast(Callable[..., PageTable], NativePageTable if plan.native else ReferencePageTable)
        inner = make(bytes(40), fingerprint(key, content_of(0)), plan.max_domains, plan.max_pages)
        table = self.tables[pool] = CheckedTable(world, pool, area, inner)
        limits, entries = None, (b"", b"", b"")
        if plan.xen:
            limits = GrantLimits(plan.entries[self.starts % len(plan.entries)], plan.per_domain)
            if record is not None and world.faults and world.chance(plan.strays):
                self._stray(pool, world.rng.randrange(FIRST_REFERENCE, 40))
            found = sorted(self.xen[pool].entries.items())
            entries = (
                u32s(ref for ref, _ in found),
                u32s(entry.domid for _, entry in found),
                u32s(entry.slot for _, entry in found),
            )
        return PoolSetup(area, epoch, key, plan.slots_per_segment, cast(PageTable, table), record, limits, entries)

    def _stray(self, pool: str, ref: int) -> None:
        """An entry that no broker has written. Somebody may even have mapped it."""
        entries = self.xen[pool].entries
        entries.setdefault(ref, Entry(self.xen[pool], 9, NO_SLOT, int(self.world.chance(0.3))))

    def destroy_area(self, pool: str) -> None:
        """Somebody has destroyed the area domain: what is mapped stays mapped, anything new is refused."""
        area = self.xen[pool]
        if area.domid is not None:
            self.world.say("area destroyed", pool)
            area.destroyed = True

    def _replace_areas(self) -> None:
        for pool, area in self.xen.items():
            if area.destroyed and self.engine is not None:
                self._new_area(pool)
                setup = self._setup(pool, None)
                self._carry_out(functools.partial(Engine.replace, name=pool, setup=setup, now=self.world.now))

    def feed(self, event: Event) -> None:
        if self.engine is not None:
            self._carry_out(lambda engine: engine.handle(event, self.world.now), event)
            if isinstance(event, DomainGone):
                self.gone[event.domid] = 1 << 30
            if isinstance(event, Tick) or self.failed:
                self._replace_areas()
            if isinstance(event, Tick):
                self._count_the_gone()

    def _count_the_gone(self) -> None:
        """With each tick, domains that have ended own less."""
        owners: Counter[int] = Counter()
        for pool in self.engine.pools().values() if self.engine is not None and self.gone else ():
            owners.update(owner.domid for owner in pool.index.owners.values())
        for domid, before in list(self.gone.items()):
            check(owners[domid] < before, "I7", "a domain that has ended owns what it owned", domid)
            self.gone[domid] = owners[domid]
            if not owners[domid]:
                del self.gone[domid]

    def _carry_out(self, first: Callable[[Engine], list[Action]], event: Event | None = None) -> None:
        """Carry out actions in order; hand an outcome back at once, and what follows from it goes to the end."""
        assert self.engine is not None
        world = self.world
        self.working, self.failed = True, False
        try:
            work = deque(self._bounded(first(self.engine), event))
            while work:
                self._crash_here()
                outcome = self._act(work.popleft())
                if outcome is not None:
                    self._crash_here()
                    work.extend(self._bounded(self.engine.handle(outcome, world.now), outcome))
        except Crash:
            self.crash()
            return
        finally:
            self.working = False
        world.check_engine()

    def _bounded(self, actions: list[Action], event: Event | None) -> list[Action]:
        bound = 64 * len(self.areas) + 40 * (len(self.links) + 1) + 400
        check(len(actions) < bound, "I7", f"{len(actions)} actions at once", type(event).__name__)
        return actions

    def _crash_here(self, weight: float = 1.0) -> None:
        if self.world.chance(self.world.plan.crash * weight):
            raise Crash

    def crash(self) -> None:
        world = self.world
        world.say("broker crashes")
        self.engine = None
        self.gone.clear()
        world.xenstore.items.clear()
        for link in list(self.links.values()):
            link.up.items.clear()
            for _ in range(world.rng.randrange(3)):
                if link.down.items and world.chance(0.3):
                    link.down.items.pop()
            self.close_link(link)
        self.links.clear()

    def close_link(self, link: Link) -> None:
        """Close the broker's end: what was sent before still arrives."""
        if link.broker_open:
            link.broker_open = False
            self.links.pop(link.peer, None)
            link.up.items.clear()
            if link.guest_open:
                self.world.put(link.down, None)

    def _act(self, action: Action) -> Event | None:
        world = self.world
        match action:
            case Send():
                return self._send(action.peer, action.message, None)
            case SendSegment():
                segment = self.areas[action.pool].get(action.segment)
                check(segment is not None, "I6", "a segment is sent that the area does not have", action.segment)
                return self._send(action.peer, wire.Segment(action.segment), segment)
            case Disconnect():
                link = self.links.get(action.peer)
                if link is not None:
                    self.close_link(link)
            case Fill():
                return self._fill(action.token, action.pool, action.first, action.pages, action.want)
            case Move():
                pages = b"".join(world.slot_bytes(action.pool, slot) for slot in ints(action.slots))
                return self._fill(action.token, action.pool, action.first, pages, action.want)
            case WriteGrants():
                return self._write_grants(action)
            case Revoke():
                return self._revoke(action)
            case Commit():
                if world.faults and world.chance(world.plan.commit_failure):
                    return CommitFailed(action.token, "full")
                world.commit(action.changes)
                return Committed(action.token)
            case CloseSegment():
                area = self.areas[action.pool]
                check(action.segment in area, "I6", "a segment is closed that is not there", action.segment)
                known = world.shadow[action.pool].segments
                check(action.segment not in known, "I6", "a segment is closed that the store has", action.segment)
                low = action.segment * world.plan.slots_per_segment
                world.check_unreached(action.pool, range(low, low + world.plan.slots_per_segment), "is closed")
                del area[action.segment]
            case Log():
                world.say("log", action)
                if action.event == "peer.strike" and action.fields["reason"] not in ("no-answer", "no-hello"):
                    honest = action.fields["domain"] in {guest.name for guest in world.guests}
                    check(not honest, "I7", "an honest domain is punished", action)
        return None

    def _fill(self, token: int, pool: str, first: int, pages: bytes, want: bytes) -> Event:
        world = self.world
        per_segment = world.plan.slots_per_segment
        area, key = self.areas[pool], self.keys[pool][0]
        number = first // per_segment
        count = len(want) // FP
        check(len(pages) == count * PAGE, "I7", "fill with pages of another number")
        check((first + count - 1) // per_segment == number, "I7", "a fill over the end of a segment", first, count)
        xen = self.xen[pool] if world.plan.xen else None
        full = number not in area and len(area) >= world.plan.max_segments and (world.faults or xen is not None)
        gone = xen is not None and xen.destroyed
        if full or gone or (world.faults and world.chance(world.plan.fill_failure)):
            self.failed = gone
            return FillFailed(token, "full")
        opened: tuple[tuple[int, int, int], ...] = ()
        if number not in area:
            world.inode += 1
            area[number] = Segment(pool, self.area_ids[pool], number, world.inode)
            if xen is not None and xen.domid is None:
                xen.domid = world.new_domain()
                world.grantors[xen.domid] = xen
            opened = ((number, 7 if xen is None else xen.domid or 0, world.inode),)
        segment = area[number]
        check(segment.writable, "I2", "a segment of an earlier broker is written", number)
        published = world.published.get(self.area_ids[pool], {})
        ok = bytearray()
        stored = world.shadow.get(pool, Shadow(b""))
        in_store = stored.slots if stored.area == self.area_ids[pool] else {}
        if xen is not None:
            world.check_unreached(pool, range(first, first + count), "is written")
        for i in range(count):
            if xen is not None:
                check(first + i not in self.tables[pool].taken, "I2", "a slot in use is written", first + i)
                check(first + i not in in_store, "I2", "the store has a slot in use", first + i)
            else:
                check(first + i not in published, "I2", "a published slot is written", first + i)
            page = pages[i * PAGE : i * PAGE + PAGE]
            segment.slots[(first + i) % per_segment] = page
            ok.append(fingerprint(key, page) == want[i * FP : i * FP + FP])
        return Filled(token, bytes(ok), opened)

    def _write_grants(self, action: WriteGrants) -> Event:
        world, area = self.world, self.xen[action.pool]
        check(world.plan.xen, "I7", "grants on local")
        slots, refs = ints(action.slots), ints(action.refs)
        owned = {
            (owner.domid, ref, slot)
            for owner in world.shadow[action.pool].owners.values()
            for ref, slot in entries_of(owner.runs, owner.refs).items()
        }
        for ref, slot in zip(refs, slots, strict=True):
            check((action.domid, ref, slot) in owned, "I6", "an entry before its owner is in the store", ref)
            check(ref >= FIRST_REFERENCE, "I4", "a reserved reference", ref)
            check(ref not in area.entries, "I4", "a reference is handed out twice", ref)
        if area.destroyed or (world.faults and world.chance(world.plan.grant_failure)):
            self.failed = area.destroyed
            if world.chance(world.plan.strays):
                self._stray(action.pool, world.rng.choice(refs))
            return GrantsFailed(action.token, "no table")
        for ref, slot in zip(refs, slots, strict=True):
            self._crash_here(0.2)
            area.entries[ref] = Entry(area, action.domid, slot)
        return GrantsWritten(action.token)

    def _revoke(self, action: Revoke) -> Event:
        """By compare-and-swap: what is mapped stays. Of a table that is gone nothing can be said."""
        area = self.xen[action.pool]
        refs = ints(action.refs)
        if area.destroyed:
            self.failed = True
            return Revoked(action.token, b"\1" * len(refs))
        busy = bytearray()
        for ref in refs:
            self._crash_here(0.2)
            entry = area.entries.get(ref)
            busy.append(entry is not None and entry.mapped > 0)
            if not busy[-1]:
                area.entries.pop(ref, None)
        return Revoked(action.token, bytes(busy))

    def detach(self, pool: str, domain: str, on: bool) -> None:
        """The operator's wish."""
        if self.engine is not None:
            with contextlib.suppress(UsageError):
                self._carry_out(lambda engine: engine.detach(pool, domain, on, self.world.now))

    def _send(self, peer: int, message: wire.Message, fd: Segment | None) -> Event | None:
        world = self.world
        link = self.links.get(peer)
        if link is None:
            return None
        if world.faults and world.chance(world.plan.queue_full):
            self.close_link(link)
            return PeerClosed(peer, "its queue is full")
        frame = wire.BROKER_TO_AGENT.encode(message)
        if isinstance(message, wire.Grantor):
            link.told.append(message)
        world.check_sent(link, message, frame, fd)
        world.put(link.down, (frame, message, fd))
        return None

    def receive(self, link: Link, item: Any) -> None:
        """Take what arrived on a link: bytes, or its end."""
        if not link.broker_open:
            return
        if item is None:
            link.broker_open = False
            self.links.pop(link.peer, None)
            self.feed(PeerClosed(link.peer, "closed"))
            return
        try:
            link.reader_up.feed(item[0])
            for payload in link.reader_up:
                message = wire.AGENT_TO_BROKER.decode(payload)
                self._note(link.peer, message)
                if link.broker_open:
                    self.feed(Received(link.peer, message))
        except ProtocolError as error:
            self.feed(Malformed(link.peer, error.message))

    def _note(self, peer: int, message: wire.Message) -> None:
        files = self.reported.setdefault(peer, {})
        if isinstance(message, wire.Roots):
            sizes = array("Q", message.sizes)
            for at, file in enumerate(ints(message.ids)):
                files[file] = Reported(message.roots[at * FP : at * FP + FP], sizes[at])
        elif isinstance(message, wire.Pages) and len(message.fingerprints) <= FP * wire.MAX_REPORT_PAGES:
            at = 0
            for file, first, count in triples(message.parts):
                for i in range(min(count, 4096)):
                    if file in files:
                        files[file].pages[first + i] = message.fingerprints[at : at + FP]
                    at += FP


# --------------------------------------------------------------------------------------------------- a guest's files


@dataclass(eq=False)
class Lease:
    """A read lease of one agent; `deadline` is set when a writer waits for it."""

    guest: Guest
    serial: int  # of the agent's process
    deadline: float | None = None


@dataclass(eq=False)
class Inode:
    key: FileKey
    symbols: list[int]
    tail: int  # bytes of the last page that are past the end of the file
    stamp: int
    resident: set[int]
    leases: list[Lease] = field(default_factory=list)
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    writing: Callable[[], None] | None = None  # finishes what a writer is in the middle of
    racy: bool = False  # changed, and its times did not

    @property
    def size(self) -> int:
        return len(self.symbols) * PAGE - self.tail

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(self.size, self.stamp, self.stamp)


@dataclass(eq=False)
class View:
    """What one consumer has of one file: where it is not in `shared`, it reads the file itself."""

    inode: Inode
    pages: int
    size: int
    shared: dict[int, tuple[Segment, int]] = field(default_factory=dict)
    mappings: list[Mapping] = field(default_factory=list)  # on `xen`, what is behind `shared`
    stale: bool = False  # the file has changed under it, as it may where the consumer or its agent hangs
    answered: str | None = None

    def back(self, world: World) -> None:
        """Put the file's own pages in the place of shared ones."""
        self.shared, self.stale = {}, False
        for mapping in self.mappings:
            if world.chance(world.plan.pin):  # as a page in a pipe or under direct I/O
                mapping.until = world.now + world.rng.choice((1.0, 10.0, 60.0))
                world.pins.append(mapping)
            else:
                world.unmap(mapping)
        self.mappings = []


class Consumer:
    """A program with our library in it."""

    def __init__(self, guest: Guest, number: int) -> None:
        self.guest = guest
        self.number = number
        self.views: dict[int, View] = {}
        self.segments: dict[int, Segment] = {}
        self.next_handle = 0
        self.hung = False
        self.changed_at = -100.0  # when it last began or ceased to hang
        self.alive = True
        self.connected = False
        world = guest.world
        name = f"{guest.name}.{number}"
        self.inbox = Channel(f"agent->{name}", self._receive, lambda: self.alive and not self.hung)
        self.outbox = Channel(f"{name}->agent", self._sent, guest.awake)
        world.channels += [self.inbox, self.outbox]

    def _sent(self, item: Any) -> None:
        self.guest.from_consumer(self, item)

    def send(self, message: agent_wire.Message, inode: Inode | None = None) -> None:
        if self.connected:
            self.guest.world.put(self.outbox, (cw.CONSUMER_TO_AGENT.encode(message), inode))

    def connect(self) -> None:
        """Connect to the agent that runs now, and tell it what is open."""
        if self.connected or self.guest.agent is None:
            return
        self.connected = True
        self.guest.consumers[self.number] = self
        for handle, view in self.views.items():
            self.send(cw.Open(handle, view.size), view.inode)

    def open(self, inode: Inode) -> None:
        self.next_handle += 1
        self.views[self.next_handle] = View(inode, len(inode.symbols), inode.size)
        self.send(cw.Open(self.next_handle, inode.size), inode)

    def close(self, handle: int) -> None:
        self.views.pop(handle).back(self.guest.world)
        self.send(cw.Close(handle))

    def die(self) -> None:
        self.alive = False
        for view in self.views.values():
            view.back(self.guest.world)
        self.views.clear()
        self.segments.clear()
        self.inbox.items.clear()
        if self.connected:
            self.guest.world.put(self.outbox, None)

    def _receive(self, item: Any) -> None:
        if item is None:  # the agent is gone
            self.connected = False
            self.outbox.items.clear()
            for view in self.views.values():
                view.back(self.guest.world)
            self.segments.clear()
            return
        frame, fd = item
        message = cw.AGENT_TO_CONSUMER.decode(frame[4:])
        match message:
            case cw.ShareSegment():
                check(message.number not in self.segments, "I1", "the number of a segment is used again")
                self.segments[message.number] = fd
            case cw.SegmentsGone():
                for number in ints(message.numbers):
                    self.segments.pop(number, None)
            case cw.Plain():
                if message.handle in self.views:
                    self.views[message.handle].answered = message.reason
            case cw.Share():
                self._share(message, fd)
            case cw.Unshare():
                if message.handle in self.views:
                    self.views[message.handle].back(self.guest.world)
                self.send(cw.LetGo(message.handle, message.generation))

    def _share(self, share: cw.Share, grantor: int | None) -> None:
        view = self.views.get(share.handle)
        if view is None:
            self.send(cw.Mapped(share.handle, share.generation, 0, cw.MAPPED_NO_ROOM))
            return
        world = self.guest.world
        view.answered = ""
        view.back(world)
        outcome = cw.MAPPED_DONE
        shared: dict[int, tuple[Segment, int]] = {}
        if view.inode.size != view.size or world.chance(0.03):
            outcome = cw.MAPPED_NO_ROOM
        elif grantor is not None:
            for page, ref in pages_of(share.runs).items():
                mapping = world.map(self.guest, grantor, ref)
                if mapping is None:
                    outcome = cw.MAPPED_NO_ROOM
                    break
                view.mappings.append(mapping)
                shared[page] = (mapping.segment, mapping.inside)
                if page >= view.pages or mapping.page != content_of(view.inode.symbols[page]):
                    outcome = cw.MAPPED_DIFFERENT
        else:
            compared = set(pages_of(share.runs if share.all else share.compare))
            for (page, slot, count), number in zip(triples(share.runs), ints(share.segments), strict=True):
                segment = self.segments.get(number)
                check(segment is not None, "I1", "handles of a segment that was not sent")
                assert segment is not None
                for i in range(count):
                    if page + i >= view.pages or (
                        page + i in compared and segment.slots[slot + i] != content_of(view.inode.symbols[page + i])
                    ):
                        outcome = cw.MAPPED_DIFFERENT
                    shared[page + i] = (segment, slot + i)
        if outcome == cw.MAPPED_DONE:
            view.shared = shared
            world.check_view(self, view)
        else:
            shared = {}
            view.back(world)
            if outcome == cw.MAPPED_DIFFERENT:
                # A Share that was read late is of a file that may have changed meanwhile, or that has been cut off.
                whole = any(lease.guest is self.guest and lease.deadline is None for lease in view.inode.leases)
                late = self.hung or world.now - self.changed_at < 5 * LATENCY or not world._knows(self.guest, self)
                excused = view.inode.racy or self.guest.excused() or late or not whole
                check(excused, "I5", "an unchanged file differs")
        self.send(cw.Mapped(share.handle, share.generation, len(shared), outcome))


# --------------------------------------------------------------------------------------------- an agent and its runner


class Guest:
    """A domain: its files, its consumers, and the loop of runner.py around the real agent."""

    def __init__(self, world: World, number: int, name: str, uid: int, pool: str) -> None:
        self.world = world
        self.number = number
        self.name = name
        self.uid = uid
        self.pool = pool
        self.fs: dict[bytes, Inode] = {}
        self.free_inodes: list[int] = []
        self.next_inode = 0
        self.agent: Agent | None = None
        self.serial = 0
        self.instance = b""
        self.link: Link | None = None
        self.events: deque[ag.Event] = deque()
        self.cache: dict[tuple[FileKey, FileIdentity], dict[int, bytes]] = {}
        self.proven: set[tuple[FileKey, FileIdentity]] = set()  # whole, and nobody could have written it unnoticed
        self.epoch = self.cache_epoch = b""
        self.key = b""
        self.limits = (1, 1 << 40)
        self.segments: dict[int, tuple[int, Segment]] = {}  # number in the area -> (number for consumers, segment)
        self.domid: int | None = None
        self.grantor: int | None = None
        self.save_at: float | None = None
        self.consumers: dict[int, Consumer] = {}
        self.next_consumer = 0
        self.programs: list[Consumer] = []
        self.open_files: dict[FileKey, tuple[Inode, set[tuple[int, int]]]] = {}
        self.given: dict[int, set[int]] = {}
        self.granted: set[tuple[bytes, int]] = set()
        self.told: set[int] = set()  # files whose grants the broker has withdrawn
        self.wanted: deque[ag.SendPages] = deque()
        self.stalled_until = -100.0
        self.stalled_long = False
        self.kernel = Channel(f"kernel->{name}", self._signal, self.awake)
        self.worker = Channel(f"worker->{name}", self._worked, self.awake)
        world.channels += [self.kernel, self.worker]

    def awake(self) -> bool:
        return self.agent is not None and self.world.now >= self.stalled_until

    # ------------------------------------------------------------------------------------------------ start and end

    def start(self) -> None:
        world = self.world
        if world.plan.xen and self.domid is None:
            self.domid = world.new_domain()
        self.serial += 1
        self.instance = world.random_bytes(16)
        settings = ag.Settings(
            name=self.name,
            version="1",
            instance=self.instance,
            drop=world.plan.drop,
            room_retry=5.0,  # to be done with in the time that rest() takes
            lease_timeout=10.0,  # longer than any answer is under way here
            max_attached_files=world.rng.choice((2, 100, 100)),
        )
        self.agent = Agent(settings, world.rng.random)
        self.stalled_until = 0.0
        world.say(self.name, "starts")
        for program in self.programs:
            if program.alive and not program.hung:
                program.connect()

    def kill(self) -> None:
        """The agent's process ends: its leases, descriptors and connections go with it."""
        if self.agent is None:
            return
        world = self.world
        world.say(self.name, "dies")
        self.agent = None
        self.events.clear()
        if self.link is not None:
            self.hang_up()
        for consumer in list(self.consumers.values()):
            consumer.outbox.items.clear()
            world.put(consumer.inbox, None)
        self.consumers.clear()
        self.given.clear()
        self.open_files.clear()
        self.segments.clear()
        self.wanted.clear()
        self.cache = {known: entry for known, entry in self.cache.items() if known in self.proven}  # the disk has them
        self.epoch = b""
        self.kernel.items.clear()
        self.worker.items.clear()
        for inode in world.inodes_of(self):
            inode.leases = [lease for lease in inode.leases if lease.guest is not self]
            world.writers_go_on(inode)

    def destroy(self) -> None:
        """`xen`: the domain ends, with all that runs in it. What is on its disk stays."""
        world = self.world
        if self.domid is None:
            return
        world.say(self.name, "is destroyed")
        self.kill()
        for program in self.programs:
            program.alive = program.connected = False
            program.inbox.items.clear()
            program.outbox.items.clear()
        inodes = world.inodes_of(self)
        self.programs.clear()
        world.end_domain(self.domid)
        self.domid = self.save_at = None
        self.stalled_until, self.stalled_long = -100.0, False
        for inode in inodes:
            inode.waiting.clear()
            if inode.writing is not None:
                inode.writing()
            inode.resident = set()

    def save(self) -> None:
        """`xen`: the domain is saved, and restored as another one. Its programs go on, its mappings are void."""
        world, self.save_at = self.world, None
        if self.domid is None:
            return
        world.say(self.name, "is saved and restored")
        world.end_domain(self.domid)
        self.domid = world.new_domain()
        self.stalled_until = world.now + world.rng.choice((0.5, 3.0, 10.0))
        for program in self.programs:
            for view in program.views.values():
                view.stale = view.stale or bool(view.shared)
                view.mappings = []
        if self.link is not None:
            world.cut(self)
        if self.agent is not None:
            world.put(self.worker, ("restored", None, ag.Reattach()))

    # ------------------------------------------------------------------------------------------------------- rounds

    def feed(self, *events: ag.Event) -> None:
        self.events.extend(events)
        if self.world.chance(0.85):
            self.drain()

    def drain(self) -> None:
        """Hand queued events to the state machine; outcomes of actions queue behind them, as in runner.py."""
        world = self.world
        while self.events and self.agent is not None:
            event = self.events.popleft()
            actions = self.agent.handle(event, world.now)
            check(len(actions) < 400, "I7", f"{len(actions)} actions of an agent at once")
            for action in actions:
                if world.faults and world.chance(world.plan.agent_crash * 0.0006):
                    self.kill()
                    return
                self._act(action)
        if self.agent is not None:
            world.check_agent(self)

    def tick(self) -> None:
        if not self.awake():
            return
        self.events.append(ag.Tick(ag.Memory(4096)))
        for key in [key for key, (_, uses) in self.open_files.items() if not uses]:
            inode, _ = self.open_files.pop(key)
            self._drop_lease(inode)  # the descriptor's end is the lease's end
        if self.epoch and self.world.scanning and self.world.chance(0.3):
            self.scan()
        self.drain()

    def scan(self) -> None:
        paths = list(self.fs)
        if self.agent is not None:
            paths += [path for path in self.agent.paths() if path not in self.fs]
        for path in paths:
            self.look(path)

    def look(self, path: bytes) -> None:
        if self.epoch:
            self.world.put(self.worker, ("look", self.epoch, self._look(path)))

    def _look(self, path: bytes) -> ag.Event:
        """What the scanner sees of a path now; the state machine hears of it later."""
        inode = self.fs.get(path)
        if inode is None or not self.limits[0] <= inode.size <= self.limits[1]:
            return ag.Vanished((path,))
        entry = self.cache.setdefault((inode.key, inode.identity), {})
        pages = sorted(inode.resident)
        for page in pages:
            if page not in entry:
                entry[page] = fingerprint(self.key, content_of(inode.symbols[page]))
        known = (inode.key, inode.identity)
        whole = len(pages) == len(inode.symbols)
        if whole and not inode.racy and inode.writing is None and self.world.chance(0.7):
            self.proven.add(known)
        resident = bool(pages)
        if known in self.proven:
            whole, pages = True, list(range(len(inode.symbols)))
        root = file_root(inode.size, b"".join(entry[page] for page in pages)) if whole else None
        zero = fingerprint(self.key, content_of(0))
        seen = Observation(
            path,
            inode.key,
            inode.identity,
            root,
            None if root is not None else u32s(pages),
            len(pages),
            sum(entry[page] == zero for page in pages),
            proven=known in self.proven,
            resident=resident,
        )
        return ag.Observed((seen,))

    def report(self) -> None:
        """The link has room: page fingerprints that were asked for, then the next roots."""
        if self.link is None or not self.awake():
            return
        if self.wanted:
            self._send_pages(self.wanted.popleft())
        if self.agent is not None and self.agent.reporting:
            self.feed(ag.LinkReady())

    # ------------------------------------------------------------------------------------------------------- events

    def _signal(self, key: FileKey) -> None:
        if key in self.open_files:
            self.feed(ag.LeaseBroken(key))

    def _worked(self, item: tuple[str, Any, Any]) -> None:
        kind, tag, result = item
        if kind == "look":
            if tag == self.epoch:
                self.feed(result)
        elif kind == "data":
            if tag is self.link:
                self._send(result)
        else:
            self.feed(result)

    def from_broker(self, link: Link, item: Any) -> None:
        if self.link is not link or self.agent is None:
            return
        if item is None:
            self.hang_up()
            self.feed(ag.LinkDown("closed"))
            return
        link.reader_down.feed(item[0])
        for payload in link.reader_down:
            message = agent_wire.BROKER_TO_AGENT.decode(payload)
            if isinstance(message, agent_wire.Segment):
                self._add_segment(message.segment, item[2])
            elif isinstance(message, agent_wire.Grantor):
                self.grantor = message.domid
            elif isinstance(message, agent_wire.Withdraw):
                self.told.update(ints(message.ids))
            self.events.append(ag.FromBroker(message))
            self.drain()

    def _add_segment(self, number: int, segment: Segment) -> None:
        known = self.segments.get(number)
        if known is None or known[1] is not segment:
            self.world.inode += 1
            self.segments[number] = (self.world.inode, segment)

    def connected(self, link: Link | None) -> None:
        """Outcome of Connect."""
        self.link = link
        self.events.append(ag.LinkUp() if link is not None else ag.LinkDown("nobody there"))

    def hang_up(self) -> None:
        link, self.link = self.link, None
        self.wanted.clear()
        assert link is not None
        link.guest_open = False
        link.down.items.clear()
        if link.broker_open:
            self.world.put(link.up, None)

    def from_consumer(self, consumer: Consumer, item: Any) -> None:
        if self.consumers.get(consumer.number) is not consumer:
            return
        if item is None:
            self._gone(consumer)
            self.feed()
            return
        frame, inode = item
        message = cw.CONSUMER_TO_AGENT.decode(frame[4:])
        number = consumer.number
        match message:
            case cw.Open():
                if message.length != inode.size:
                    self._to_consumer(number, cw.Plain(message.handle, "changed"))
                    return
                _, uses = self.open_files.setdefault(inode.key, (inode, set()))
                uses.add((number, message.handle))
                self.feed(ag.Opened(number, message.handle, inode.key))
            case cw.Close():
                for _, uses in self.open_files.values():
                    uses.discard((number, message.handle))
                self.feed(ag.Closed(number, message.handle))
            case cw.Mapped():
                self.feed(ag.ConsumerMapped(number, message.handle, message.generation, message.pages, message.outcome))
            case cw.LetGo():
                self.feed(ag.ConsumerLetGo(number, message.handle, message.generation))

    # ------------------------------------------------------------------------------------------------------ actions

    def _act(self, action: ag.Action) -> None:
        match action:
            case ag.Send():
                self._send(action.message)
            case ag.SendPages():
                self.wanted.append(action)
            case ag.SendData():
                self.world.put(self.worker, ("data", self.link, self._read(action)))
            case ag.Connect():
                self.connected(self.world.connect(self))
            case ag.Hangup():
                if self.link is not None:
                    self.hang_up()
            case ag.StartScan():
                self.limits = (action.min_file_bytes, action.max_file_bytes)
                if action.epoch != self.epoch:
                    self.epoch, self.key = action.epoch, action.key
                    if action.epoch != self.cache_epoch:
                        self.cache_epoch = action.epoch
                        self.cache.clear()
                        self.proven.clear()
                    self.scan()
            case ag.Rescan():
                self.look(action.path)
            case ag.TakeLease():
                self._take_lease(action)
            case ag.ReleaseLease():
                if action.key in self.open_files:
                    self._drop_lease(self.open_files[action.key][0])
            case ag.ShareWith():
                self._share(action)
            case ag.UnshareWith():
                self._to_consumer(action.consumer, cw.Unshare(action.handle, action.generation))
            case ag.CutOff():
                self._cut_off(action.consumer)
            case ag.StayPlain():
                self._to_consumer(action.consumer, cw.Plain(action.handle, action.reason))
            case ag.DropCache():
                self._drop_cache(action)
            case ag.RenewCache():
                entry = self.cache.get((action.key, action.old))
                if entry is not None:
                    self.cache[action.key, action.new] = dict(entry)
                    if (action.key, action.old) in self.proven:
                        self.proven.add((action.key, action.new))
            case ag.ForgetSegments():
                self._forget(action.segments)
            case ag.Log():
                self.world.say(self.name, "log", action)

    def _send(self, message: agent_wire.Message) -> None:
        if self.link is not None:
            frame = agent_wire.AGENT_TO_BROKER.encode(message)
            self.world.put(self.link.up, (frame, message))

    def _send_pages(self, want: ag.SendPages) -> None:
        entry = self.cache.get((want.key, want.identity), {})
        count = -(-want.identity.size // PAGE)
        pages = list(range(count)) if want.pages is None else list(ints(want.pages))
        if any(page not in entry for page in pages):
            return
        for at in range(0, len(pages), agent_wire.MAX_REPORT_PAGES):
            part = pages[at : at + agent_wire.MAX_REPORT_PAGES]
            parts = array("I")
            for page in part:
                if parts and parts[-2] + parts[-1] == page:
                    parts[-1] += 1
                else:
                    parts.extend((want.file, page, 1))
            self._send(agent_wire.Pages(parts.tobytes(), b"".join(entry[page] for page in part)))

    def _read(self, action: ag.SendData) -> agent_wire.Message:
        runs = ints(action.runs)
        pages = [first + i for first, count in zip(runs[0::2], runs[1::2], strict=True) for i in range(count)]
        inode = self.fs.get(action.path) if action.path is not None else None
        have, found = bytearray(), bytearray()
        for page in pages:
            if (
                inode is not None
                and action.identity is not None
                and inode.key == action.key
                and inode.identity == action.identity
                and page in inode.resident
            ):
                content = content_of(inode.symbols[page])
                if self.cache.get((inode.key, action.identity), {}).get(page) == fingerprint(self.key, content):
                    have.append(1)
                    found += content
                    continue
            have.append(0)
        return agent_wire.Data(action.request, bytes(have), bytes(found))

    def _take_lease(self, action: ag.TakeLease) -> None:
        opened = self.open_files.get(action.key)
        if opened is None:
            self.events.append(ag.LeaseRefused(action.key, "closed"))
            return
        inode = opened[0]
        if inode.writing is not None or inode.waiting or self.world.chance(0.02):
            self.events.append(ag.LeaseRefused(action.key, "open for writing"))
            return
        if not any(lease.guest is self for lease in inode.leases):
            inode.leases.append(Lease(self, self.serial))
        self.events.append(ag.LeaseTaken(action.key, inode.identity))

    def _drop_lease(self, inode: Inode) -> None:
        inode.leases = [lease for lease in inode.leases if lease.guest is not self]
        self.world.writers_go_on(inode)

    def _share(self, action: ag.ShareWith) -> None:
        consumer = self.consumers.get(action.consumer)
        if consumer is None:
            return
        if self.world.plan.xen:
            numbers = array("I", bytes(4 * (len(action.runs) // 12)))
            share = cw.Share(action.handle, action.generation, action.runs, numbers.tobytes(), 1, b"", b"")
            self._to_consumer(action.consumer, share, self.grantor)
            return
        per_segment = self.world.plan.slots_per_segment
        runs, numbers = array("I"), array("I")
        given = self.given.setdefault(action.consumer, set())
        for page, slot, count in triples(action.runs):
            known = self.segments.get(slot // per_segment)
            check(known is not None, "I6", "handles in a segment that the agent does not have", slot // per_segment)
            assert known is not None
            if known[0] not in given:
                given.add(known[0])
                self._to_consumer(action.consumer, cw.ShareSegment(known[0]), known[1])
            runs.extend((page, slot % per_segment, count))
            numbers.append(known[0])
        some = (1, b"", b"")
        for inode, uses in self.open_files.values():
            if action.proven and (action.consumer, action.handle) in uses:
                ranges = array("I", [number for page in sorted(inode.resident) for number in (page, 1)])
                compare = mapper_module._meeting(array("I", action.runs), ranges)
                some = (0, compare.tobytes(), bytes(len(compare) // 3 * 4))
                self.events.append(ag.Compared(inode.key, action.generation, sum(compare[2::3])))
        self._to_consumer(
            action.consumer, cw.Share(action.handle, action.generation, runs.tobytes(), numbers.tobytes(), *some)
        )

    def _cut_off(self, number: int) -> None:
        consumer = self.consumers.get(number)
        if consumer is not None:
            check(consumer.hung or self.world.now - consumer.changed_at < 10 * LATENCY, "I7", "cut off for nothing")
            self._gone(consumer)
            consumer.outbox.items.clear()
            self.world.put(consumer.inbox, None)

    def _gone(self, consumer: Consumer) -> None:
        del self.consumers[consumer.number]
        self.given.pop(consumer.number, None)
        for _, uses in self.open_files.values():
            uses.difference_update({use for use in uses if use[0] == consumer.number})
        self.events.append(ag.ConsumerGone(consumer.number))

    def _to_consumer(self, number: int, message: agent_wire.Message, fd: Segment | int | None = None) -> None:
        consumer = self.consumers.get(number)
        if consumer is not None:
            self.world.put(consumer.inbox, (cw.AGENT_TO_CONSUMER.encode(message), fd))

    def _drop_cache(self, action: ag.DropCache) -> None:
        opened = self.open_files.get(action.key)
        if opened is None:
            return
        inode = opened[0]
        gone = {page for page in pages_of(action.runs) if page in inode.resident and self.world.chance(0.9)}
        inode.resident -= gone
        if gone:
            self.world.put(self.worker, ("dropped", None, ag.Dropped(len(gone))))

    def _forget(self, segments: tuple[int, ...] | None) -> None:
        gone = list(self.segments) if segments is None else [s for s in segments if s in self.segments]
        numbers = [self.segments.pop(segment)[0] for segment in gone]
        for consumer, given in self.given.items():
            theirs = [number for number in numbers if number in given]
            given.difference_update(theirs)
            if theirs:
                self._to_consumer(consumer, cw.SegmentsGone(u32s(theirs)))

    # ----------------------------------------------------------------------------------------------- files and writers

    def new_inode(self, symbols: list[int]) -> Inode:
        world = self.world
        if self.free_inodes and world.chance(0.5):
            number = self.free_inodes.pop()
        else:
            self.next_inode += 1
            number = self.next_inode
        world.stamp += 1
        resident = set(range(len(symbols)))
        if world.chance(0.25):
            resident = {page for page in resident if world.chance(0.6)}
        return Inode(FileKey(self.number, number), symbols, world.rng.choice((0, 0, 1, 100)), world.stamp, resident)

    def unlink(self, path: bytes) -> None:
        inode = self.fs.pop(path)
        if not self.is_open(inode) and inode not in self.fs.values():
            self.free_inodes.append(inode.key.ino)
        self.look(path)

    def is_open(self, inode: Inode) -> bool:
        return (
            bool(inode.waiting or inode.writing)
            or inode.key in self.open_files
            or any(view.inode is inode for program in self.programs for view in program.views.values())
        )

    def write(self, inode: Inode, change: Callable[[], None], path: bytes) -> None:
        """Open a file for writing, as soon as its leases are given back."""
        world = self.world

        def begin() -> None:
            world.check_write(self, inode)
            middle = list(inode.symbols)
            # What is proven was read while nobody could write: whoever comes later leaves a trace.
            could = (inode.key, inode.identity) not in self.proven
            inode.racy = inode.racy or (could and world.chance(world.plan.racy))
            if not inode.racy:
                world.stamp += 1
                inode.stamp = world.stamp
            if middle:
                middle[0] = world.rng.randrange(1, 1000) + 1000
                inode.symbols = middle

            def finish() -> None:
                change()
                if not inode.racy:
                    world.stamp += 1
                    inode.stamp = world.stamp
                inode.resident = {page for page in inode.resident if page < len(inode.symbols)}
                inode.resident |= {page for page in range(len(inode.symbols)) if world.chance(0.7)}
                inode.writing = None
                if world.chance(0.5):  # or the next scan finds it
                    self.look(path)
                world.writers_go_on(inode)

            inode.writing = finish

        for lease in inode.leases:
            if lease.deadline is None:
                lease.deadline = world.now + LEASE_BREAK_TIME
                world.deadlines.append(lease.deadline)
                if lease.guest.agent is not None:
                    world.put(lease.guest.kernel, inode.key)
        inode.waiting.append(begin)
        world.writers_go_on(inode)

    def excused(self) -> bool:
        """Whether nothing can be promised of its consumers: the agent is dead, or was stopped for too long."""
        return self.agent is None or self.stalled_long


# ------------------------------------------------------------------------------------------------------------- liars


class Liar:
    """A domain that says anything. It knows what honest domains of its pool know."""

    def __init__(self, world: World, name: str, uid: int, pool: str) -> None:
        self.world = world
        self.name = name
        self.uid = uid
        self.pool = pool
        self.link: Link | None = None
        self.welcomed = False
        self.fetches: list[agent_wire.Fetch] = []
        self.files: dict[int, tuple[list[int], int, bytes]] = {}
        self.wanted: list[int] = []
        self.mute = world.chance(0.2)
        self.segments: dict[int, Segment] = {}
        self.granted: set[tuple[bytes, int]] = set()
        self.domid = world.new_domain() if world.plan.xen else None
        self.grantor: int | None = None
        self.refs: list[int] = []
        self.mappings: list[Mapping] = []

    def awake(self) -> bool:
        return True

    def from_broker(self, link: Link, item: Any) -> None:
        if link is not self.link:
            return
        if item is None:
            self.link, self.welcomed = None, False
            link.guest_open = False
            return
        link.reader_down.feed(item[0])
        for payload in link.reader_down:
            message = agent_wire.BROKER_TO_AGENT.decode(payload)
            match message:
                case agent_wire.Welcome():
                    self.welcomed = True
                case agent_wire.Fetch():
                    self.fetches.append(message)
                case agent_wire.Verdicts():
                    for file, verdict in zip(ints(message.ids), message.verdicts, strict=True):
                        if verdict == Verdict.WANTED:
                            self.wanted.append(file)
                case agent_wire.Segment():
                    self.segments[message.segment] = item[2]
                case agent_wire.Grantor():
                    self.grantor = message.domid
                case agent_wire.Granted():
                    self.refs += pages_of(message.runs).values()

    def _map(self) -> None:
        """`xen`: map anything, as long as it likes."""
        rng = self.world.rng
        if self.mappings and rng.random() < 0.4:
            self.world.unmap(self.mappings.pop(rng.randrange(len(self.mappings))))
        elif self.grantor is not None:
            ref = rng.choice(self.refs) if self.refs and rng.random() < 0.8 else rng.randrange(40)
            mapping = self.world.map(self, self.grantor, ref)
            if mapping is not None:
                self.mappings.append(mapping)

    def _send(self, message: agent_wire.Message) -> None:
        if self.link is not None:
            self.world.put(self.link.up, (agent_wire.AGENT_TO_BROKER.encode(message), message))

    def _raw(self, data: bytes) -> None:
        if self.link is not None:
            self.world.put(self.link.up, (data, None))

    def step(self) -> None:
        world, rng = self.world, self.world.rng
        if self.domid is not None and world.chance(0.2):
            self._map()
        if self.link is None:
            self.fetches.clear()
            self.wanted.clear()
            self.files.clear()
            self.link = world.connect(self)
            if self.link is not None and world.chance(0.9):
                name = self.name if world.chance(0.95) else rng.choice(["g0", "", "../x", "g1"])
                held = u32s(rng.randrange(6) for _ in range(rng.randrange(3)))
                self._send(agent_wire.Hello(1 if world.chance(0.97) else 2, "1", name, world.random_bytes(16), held))
            return
        if self.mute and self.welcomed and world.chance(0.7):
            return
        choice = rng.randrange(14)
        if choice < 4:
            self._roots()
        elif choice < 7:
            self._pages()
        elif choice < 11:
            self._data()
        elif choice == 11:
            ids = u32s(rng.choice([rng.randrange(8), 0xFFFFFFFF]) for _ in range(rng.randrange(3)))
            self._send(rng.choice([agent_wire.Gone, agent_wire.Release])(ids))
        elif choice == 12:
            self._send(agent_wire.Attach(u32s(rng.randrange(8) for _ in range(rng.randrange(1, 3)))))
        else:
            self._nonsense()

    def _nonsense(self) -> None:
        rng = self.world.rng
        match rng.randrange(8):
            case 0:
                self._raw(rng.randbytes(rng.randrange(1, 40)))
            case 1:
                self._raw(b"\xff\xff\xff\x7f" + bytes(8))
            case 2:
                self._raw(bytes(4))
            case 3:
                self._raw(agent_wire.BROKER_TO_AGENT.encode(agent_wire.Ping(1)))
            case 4:
                self._raw(b"\x03\x00\x00\x00\x92\x02\xc0")
            case 5:
                self._send(agent_wire.Pong(rng.randrange(3)))
            case 6:
                self._send(agent_wire.Hello(1, "1", self.name, bytes(16), b""))
            case _:
                self._send(agent_wire.AgentStats(*[rng.randrange(10_001) for _ in range(11)]))

    def _roots(self) -> None:
        world, rng = self.world, self.world.rng
        key = world.broker.keys[self.pool][0]
        ids, sizes, counts, roots, paths = array("I"), array("Q"), array("I"), b"", []
        classes = array("I")
        for _ in range(rng.randrange(1, 3)):
            file = rng.randrange(8) if world.chance(0.3) else rng.randrange(1 << 32)
            symbols = world.known_content()
            size = len(symbols) * PAGE
            fps = b"".join(fingerprint(key, content_of(s)) for s in symbols)
            root = file_root(size, fps) if world.chance(0.8) else rng.choice([bytes(FP), rng.randbytes(FP)])
            self.files[file] = (symbols, size, root)
            ids.append(file)
            sizes.append(size if world.chance(0.97) else rng.choice([0, 2**64 - 1, size + 1]))
            counts.append(len(symbols) if world.chance(0.97) else rng.choice([0, 1, 0xFFFFFFFF]))
            roots += root
            paths.append(rng.choice([b"/usr/x", b"/usr/y", b"/usr/secret", b"relative", b"/../up"]))
            most = len(symbols) if world.chance(0.97) else 0xFFFFFFFF
            classes.extend(rng.choice([(0, 0, 0, 0), (0, most, 0, most), (most, 0, 0, 1), (0, 1, most, 1)]))
        columns = (ids.tobytes(), sizes.tobytes(), counts.tobytes(), roots, tuple(paths))
        self._send(agent_wire.Roots(*columns, classes.tobytes()))

    def _pages(self) -> None:
        world, rng = self.world, self.world.rng
        if not self.wanted:
            return
        file = self.wanted.pop()
        symbols, _, _ = self.files.get(file, ([1, 2], 2 * PAGE, b""))
        key = world.broker.keys[self.pool][0]
        fps = [fingerprint(key, content_of(s)) for s in symbols]
        if world.chance(0.25):
            fps[rng.randrange(len(fps))] = rng.randbytes(FP)
        first, count = 0, len(fps)
        if world.chance(0.1):
            first, count = rng.choice([(1, count), (0, count + 1), (0xFFFFFFFF, count), (0, 0), (0, 0xFFFFFFFF)])
        self._send(agent_wire.Pages(u32s((file, first, count)), b"".join(fps)))

    def _data(self) -> None:
        world, rng = self.world, self.world.rng
        if not self.fetches:
            if world.chance(0.1):
                self._send(agent_wire.Data(rng.randrange(20), b"\x01", bytes(PAGE)))
            return
        fetch = self.fetches.pop(rng.randrange(len(self.fetches)))
        runs = ints(fetch.runs)
        pages = [first + i for first, count in zip(runs[0::2], runs[1::2], strict=True) for i in range(count)]
        symbols, _, _ = self.files.get(fetch.file, ([], 0, b""))
        have, found = bytearray(), bytearray()
        for page in pages:
            lie = rng.random()
            if lie < 0.15 or page >= len(symbols):
                have.append(0)
                continue
            have.append(1)
            found += content_of(symbols[page]) if lie < 0.7 else content_of(rng.randrange(2000, 3000))
        if world.chance(0.05):
            have.append(1)
            found += content_of(1)
        if len(have) <= 255:
            self._send(agent_wire.Data(fetch.request, bytes(have), bytes(found)))


# ------------------------------------------------------------------------------------------------------------- a host


class AnyBackend(Policy):
    """The rules of `local` for everybody: which ones there are on `xen` is test_policy.py's business."""

    def admit(self, identity: Identity, name: str) -> Admission | Refusal:
        return super().admit(Identity("local", identity.uid), name)


class World:
    """One host and one seed."""

    def __init__(self, seed: int, store: Store, verbose: bool = False) -> None:
        self.rng = random.Random(seed)
        self.verbose = verbose
        self.trace: deque[str] = deque(maxlen=400)
        self.plan = Plan.draw(self.rng)
        self.now = 1000.0
        self.stamp = 1
        self.inode = 100
        self.faults = True
        self.scanning = True
        self.store = store
        self.store.reset()
        self.shadow: dict[str, Shadow] = {}
        self.published: dict[bytes, dict[int, bytes]] = {}
        self.roots: dict[bytes, bytes] = {}
        self.peer = 0
        self.channels: list[Channel] = []
        self.links: list[Link] = []
        self.joined: dict[str, set[str]] = {"p0": set(), "p1": set()}
        self.deadlines: list[float] = []  # of leases that are being broken
        self.domids: set[int] = set()  # of domains that are there
        self.last_domid = 0
        self.grantors: dict[int, XenArea] = {}
        self.mappings: dict[Mapping, None] = {}
        self.pins: list[Mapping] = []
        self.xenstore = Channel("xenstore->broker", self._domain_gone, lambda: self.broker.engine is not None)
        self.channels.append(self.xenstore)
        self.steps = 0
        self.digest = hashlib.blake2b(digest_size=8)
        plan = self.plan
        self.policy = AnyBackend(
            {
                name: _rules(name, k, plan.max_domains, plan.max_files, plan.max_bytes, plan.max_pages)
                for name, k in plan.k.items()
            },
            (
                DomainRule("p0", ("g*",), (100,), "test"),
                DomainRule("p1", ("h*",), (200,), "test"),
                DomainRule("p0", ("liar0*",), (101,), "test"),
                DomainRule("p1", ("liar1*",), (201,), "test"),
            ),
        )
        self.broker = Broker(self)
        self.contents: dict[str, list[list[int]]] = {"p0": [], "p1": []}
        self.guests = [Guest(self, n, f"g{n}", 100, "p0") for n in range(plan.guests)]
        if self.chance(0.5):
            self.guests += [Guest(self, 50 + n, f"h{n}", 200, "p1") for n in range(2)]
        if self.chance(0.1):
            self.guests.append(Guest(self, 90, "stranger", 300, "p0"))
        pools = [self.rng.choice(("p0", "p0", "p1")) for _ in range(plan.liars)]
        self.liars = [
            Liar(self, f"liar{pool[1]}{n}", 101 if pool == "p0" else 201, pool) for n, pool in enumerate(pools)
        ]
        # Templates that guests have files of; symbol 0 is the zero page.
        self.templates = [
            [self.rng.choice([0, *range(1, plan.symbols + 1)]) for _ in range(self.rng.randrange(1, 7))]
            for _ in range(5)
        ]
        for guest in self.guests:
            for n in range(self.rng.randrange(1, 5)):
                self._create(guest, b"/usr/f%d" % n)

    # -------------------------------------------------------------------------------------------------------- helpers

    def say(self, *what: object) -> None:
        if self.verbose:
            self.trace.append(f"{self.steps:5} {self.now:9.2f} " + " ".join(str(w)[:400] for w in what))

    def chance(self, p: float) -> bool:
        return p > 0 and self.rng.random() < p

    def random_bytes(self, n: int) -> bytes:
        return self.rng.randbytes(n)

    def put(self, channel: Channel, item: Any) -> None:
        channel.items.append((self.now + LATENCY, item))

    def file_root(self, size: int, fingerprints: bytes) -> bytes:
        root = file_root(size, fingerprints)
        self.roots[root] = fingerprints
        return root

    # ------------------------------------------------------------------------------------------------------------ xen

    def new_domain(self) -> int:
        self.last_domid += 1
        self.domids.add(self.last_domid)
        return self.last_domid

    def end_domain(self, domid: int) -> None:
        """Xen clears what a domain has mapped before its number is free; the broker hears of it later."""
        self.domids.discard(domid)
        for mapping in [mapping for mapping in self.mappings if mapping.entry.domid == domid]:
            self.unmap(mapping)
        self.put(self.xenstore, domid)

    def _domain_gone(self, domid: int) -> None:
        self.broker.feed(DomainGone(domid))

    def map(self, guest: Guest | Liar, grantor: int, ref: int) -> Mapping | None:
        """Xen maps what is granted to this very domain by a domain that is there."""
        area = self.grantors[grantor]
        entry = area.entries.get(ref)
        if entry is None or area.destroyed or entry.domid != guest.domid or entry.slot == NO_SLOT:
            return None
        check(area.pool == guest.pool, "I1", "a grant of another pool's area", guest.name)
        number, inside = divmod(entry.slot, self.plan.slots_per_segment)
        segment = self.broker.areas[guest.pool].get(number)
        check(segment is not None, "I4", "a grant of a segment that is not there", entry.slot)
        assert segment is not None
        entry.mapped += 1
        mapping = Mapping(entry, segment, inside, segment.slots[inside])
        self.mappings[mapping] = None
        return mapping

    def unmap(self, mapping: Mapping) -> None:
        if mapping in self.mappings:
            del self.mappings[mapping]
            mapping.entry.mapped -= 1

    def _unpin(self, all_of_them: bool = False) -> None:
        for mapping in self.pins:
            if all_of_them or mapping.until <= self.now:
                self.unmap(mapping)
        self.pins = [mapping for mapping in self.pins if mapping in self.mappings]

    def check_unreached(self, pool: str, slots: range, what: str) -> None:
        """I4: a slot that no entry of the table leads to."""
        for ref, entry in self.broker.xen[pool].entries.items():
            check(entry.slot not in slots, "I4", f"a slot that a grant reaches {what}", entry.slot, ref)

    def known_content(self) -> list[int]:
        if self.chance(0.7):
            return list(self.rng.choice(self.templates))
        return [self.rng.randrange(1, 40) for _ in range(self.rng.randrange(1, 5))]

    def slot_bytes(self, pool: str, slot: int) -> bytes:
        number, inside = divmod(slot, self.plan.slots_per_segment)
        segment = self.broker.areas[pool].get(number)
        check(segment is not None, "I3", "a slot of a segment that is not there", pool, slot)
        assert segment is not None
        return segment.slots[inside]

    def slot_fingerprint(self, pool: str, slot: int) -> bytes:
        return fingerprint(self.broker.keys[pool][0], self.slot_bytes(pool, slot))

    def inodes_of(self, guest: Guest) -> list[Inode]:
        found = {id(inode): inode for inode in guest.fs.values()}
        for program in guest.programs:
            for view in program.views.values():
                found[id(view.inode)] = view.inode
        return list(found.values())

    def writers_go_on(self, inode: Inode) -> None:
        while inode.waiting and inode.writing is None and not inode.leases:
            inode.waiting.popleft()()

    def connect(self, guest: Guest | Liar) -> Link | None:
        broker = self.broker
        if broker.engine is None or broker.working or (self.faults and self.chance(0.05)):
            return None
        if self.plan.xen and guest.domid is None:
            return None
        self.peer += 1
        peer = self.peer
        up = Channel(
            f"{guest.name}->broker", lambda item: broker.receive(link, item), lambda: broker.engine is not None
        )
        down = Channel(f"broker->{guest.name}", lambda item: guest.from_broker(link, item), guest.awake)
        link = Link(peer, guest, up, down)
        ended = [old for old in self.links if not (old.broker_open or old.guest_open)]
        self.links = [old for old in self.links if old not in ended] + [link]
        self.channels = [c for c in self.channels if not any(c in (old.up, old.down) for old in ended)] + [up, down]
        broker.links[peer] = link
        backend = "xen" if self.plan.xen else "local"
        broker.feed(PeerConnected(peer, Identity(backend, guest.uid, guest.domid or 0, guest.name)))
        return link if link.broker_open else None

    # ---------------------------------------------------------------------------------------------------------- store

    def commit(self, changes: tuple[Change, ...]) -> None:
        self.store.apply(changes)
        for change in changes:
            self._apply(change)

    def _apply(self, change: Change) -> None:
        if isinstance(change, PoolOpened):
            known = self.shadow.get(change.pool)
            if known is None or known.area != change.area:
                self.shadow[change.pool] = Shadow(change.area)
            return
        apply_change(self.shadow[change.pool], change, self.plan.slots_per_segment)

    def check_store(self, records: dict[str, PoolRecord]) -> None:
        """What LMDB has is what was committed."""
        check(records.keys() == self.shadow.keys(), "I6", "other pools in the store")
        for pool, record in records.items():
            shadow = self.shadow[pool]
            slots: dict[int, bytes] = {}
            for first, fps in record.slots.items():
                for i in range(len(fps) // FP):
                    if fps[i * FP : i * FP + FP] != bytes(FP):
                        slots[first + i] = fps[i * FP : i * FP + FP]
            check(record.area == shadow.area, "I6", "another area in the store")
            check(slots == shadow.slots, "I6", "other slots in the store", pool)
            check(set(record.segments) == shadow.segments, "I6", "other segments in the store", pool)
            check(record.owners == shadow.owners, "I6", "other owners in the store", pool)

    # --------------------------------------------------------------------------------------------------------- checks

    def check_engine(self) -> None:
        """I6, after every step of the engine; exactly, since the store holds what was committed."""
        engine = self.broker.engine
        if engine is None:
            return
        for name, pool in engine.pools().items():
            index: PoolIndex = pool.index
            shadow = self.shadow.get(name, Shadow(pool.setup.area))
            unsaved = [change for change in engine._unsaved if change.pool == name]
            if unsaved:
                shadow = Shadow(shadow.area, dict(shadow.slots), dict(shadow.owners), set(shadow.segments))
                for change in unsaved:
                    if not isinstance(change, PoolOpened):
                        apply_change(shadow, change, self.plan.slots_per_segment)
                    elif change.area != shadow.area:
                        shadow = Shadow(change.area)
            same = index.owners.keys() == shadow.owners.keys() and all(
                (owner.instance, owner.runs, owner.domid, owner.refs)
                == (set_.instance, set_.runs, set_.domid, set_.refs)
                for owner, set_ in ((owner, shadow.owners[key]) for key, owner in index.owners.items())
            )
            if not same:
                check(False, "I6", "owners in index and store differ", name, list(index.owners), list(shadow.owners))
            taken = self.broker.tables[name].taken
            if taken != shadow.slots:
                check(False, "I6", "slots in index and store differ", name, sorted(taken), sorted(shadow.slots))
            if set(index.segments) != shadow.segments:
                check(False, "I6", "segments in index and store differ", name)
            check(
                index.segments.keys() <= self.broker.areas[name].keys(),
                "I6",
                "the index has a segment the area has not",
            )
            if self.plan.xen:
                self.check_grants(pool, unsaved)
            if not engine._waiting:
                # What a running broker checks by itself must never cry wolf.
                check(not stats.audit(pool), "I6", "the broker's own audit", name, stats.audit(pool))
            for domain, holdings in index.domains.items():
                check(len(holdings.files) <= pool.rules.max_files, "I7", "more files than the quota", domain)
                check(holdings.size_bytes <= pool.rules.max_bytes, "I7", "more bytes than the quota", domain)
        for name, pool in engine.pools().items():
            for domain in self.joined[name] - pool.peers.keys():
                self.broker.left_at[name, domain] = self.now
            self.joined[name] = set(pool.peers)
            for peer in pool.peers.values():
                link = self.broker.links.get(peer.id)
                if link is not None and isinstance(link.guest, Guest):
                    self.check_owners(link.guest, pool)

    def check_grants(self, pool: Any, unsaved: list[Change]) -> None:
        """I4 and I6 on `xen`, after every step of the engine: the table has what the index and the ledger think."""
        name, index, ledger = pool.name, pool.index, pool.ledger
        area = self.broker.xen[name]
        if area.destroyed:
            return  # and the broker does not know yet
        expected: dict[int, tuple[int, int]] = {}
        total = 0
        for (domain, _), owner in index.owners.items():
            mine = entries_of(owner.runs, owner.refs)
            total += len(mine)
            expected.update((ref, (owner.domid, slot)) for ref, slot in mine.items())
            peer = pool.peers.get(domain)
            check(peer is None or peer.identity.domid == owner.domid, "I6", "an owner under another domid", domain)
        for domid, pinned in pool.pinned.items():
            refs, slots = spread(pinned.refs), spread(pinned.slots)
            total += len(refs)
            expected.update((ref, (domid, slot)) for ref, slot in zip(refs, slots, strict=True))
        check(total == len(expected), "I4", "two grants under one reference", name)
        if area.entries.keys() != expected.keys():
            check(False, "I6", "other entries than owners", name, sorted(area.entries.keys() ^ expected.keys()))
        counts: Counter[int] = Counter()
        for ref, (domid, slot) in expected.items():
            entry = area.entries[ref]
            counts[domid] += 1
            stray = entry.slot == NO_SLOT
            check(stray or (entry.domid == domid and entry.slot == slot), "I6", "an entry is another's", name, ref)
        used = {domid: ledger.used_by(domid) for domid in counts}
        check(used == counts and ledger.used == len(expected), "I6", "the ledger counts otherwise", name, used, counts)
        inside = sum(ref < ledger.limits.entries for ref in expected)
        check(
            ledger.free + inside == max(0, ledger.limits.entries - FIRST_REFERENCE), "I6", "references are lost", name
        )
        per_segment = self.plan.slots_per_segment
        open_slots = sum(max(0, min(per_segment, index.next_slot - n * per_segment)) for n in index.segments)
        freed = {slot for change in unsaved if isinstance(change, SlotsFreed) for slot in ints(change.slots)}
        freed = {slot for slot in freed if slot // per_segment in index.segments}
        found = index.free.count + index.withheld.count + len(self.broker.tables[name].taken) + len(freed)
        check(found == open_slots, "I4", "slots are lost or counted twice", name, found, open_slots)
        for segment in index.emptying:
            overlaps = index.free.overlaps(segment * per_segment, per_segment)
            check(not overlaps, "I7", "a segment that is emptied is filled", name, segment)

    def check_owners(self, guest: Guest, pool: Any) -> None:
        """I6 between the index and one agent, up to what is on the way."""
        agent, link = guest.agent, guest.link
        if agent is None or link is None or link.cut or not link.broker_open or agent._welcome is None:
            return
        peer = pool.peers.get(guest.name)
        if peer is None or peer.id != link.peer:
            return
        if guest.events:
            return
        held = {
            file.version.id: file.runs
            for file in agent._files.values()
            if file.stage in (Stage.SHARED, Stage.LEAVING) and file.version is not None
        }
        owned = {
            file: sent_of(owner.runs, owner.refs)
            for (domain, file), owner in pool.index.owners.items()
            if domain == guest.name
        }
        for file, runs in held.items():
            if owned.get(file) != runs and file not in guest.told:
                check(
                    any(
                        isinstance(item[1], wire.Withdraw) and file in ints(item[1].ids)
                        for _, item in link.down.items
                        if item is not None
                    ),
                    "I6",
                    "an agent holds grants that the index does not have",
                    guest.name,
                    file,
                )
        for file in owned.keys() - held.keys():
            check(
                any(
                    isinstance(item[1], wire.Granted) and item[1].file == file
                    for _, item in link.down.items
                    if item is not None
                )
                or any(
                    isinstance(item[1], agent_wire.Release) and file in ints(item[1].ids)
                    for _, item in link.up.items
                    if item is not None
                ),
                "I6",
                "the index has an owner who knows nothing of it",
                guest.name,
                file,
            )

    def check_agent(self, guest: Guest) -> None:
        """After every step of an agent: what it shares, it has a lease on."""
        agent = guest.agent
        assert agent is not None
        for key in agent._shared_keys:
            file = agent._files[key]
            if file.stage is Stage.SHARED and not guest.events:
                opened = guest.open_files.get(key)
                if opened is None or not any(lease.guest is guest for lease in opened[0].leases):
                    check(guest.stalled_long or guest.kernel.items, "I5", "shared without a lease", guest.name, key)
        if guest.link is not None and self.broker.engine is not None:
            pool = self.broker.engine.pools().get(guest.pool)
            if pool is not None:
                self.check_owners(guest, pool)

    def check_k(self, pool: str, ids: list[bytes]) -> None:
        """A page is wanted only when k domains hold a file with it, whatever the table's marks say."""
        engine = self.broker.engine
        assert engine is not None
        index: PoolIndex = engine.pools()[pool].index
        wanted = [int.from_bytes(id_, "little") for id_ in ids]
        holders: dict[int, set[str]] = {id_: set() for id_ in wanted}
        for domain, holdings in index.domains.items():
            for held in holdings.files.values():
                for id_ in ints(held.content.ids):
                    if id_ in holders:
                        holders[id_].add(domain)
        for id_, domains in holders.items():
            check(len(domains) >= self.plan.k[pool], "k", "wanted with too few holders", id_, sorted(domains))

    def check_sent(self, link: Link, message: wire.Message, frame: bytes, fd: Segment | None) -> None:
        """What goes to a domain is its own pool's, and a grant brings only what it reported itself (I1)."""
        guest, pool = link.guest, link.guest.pool
        for other, (key, _) in self.broker.keys.items():
            if other != pool:
                check(key not in frame, "I1", "another pool's key is sent")
                check(self.broker.area_ids[other] not in frame, "I1", "another pool's area is sent")
        if fd is not None:
            check(fd.pool == pool, "I1", "a segment of another pool is sent", guest.name)
        if isinstance(message, wire.Fetch):
            check(message.file in self.broker.reported.get(link.peer, {}), "I7", "a fetch of a file nobody reported")
        if not isinstance(message, wire.Granted):
            return
        owner = self.shadow[pool].owners.get((guest.name, message.file))
        check(owner is not None, "I6", "handles before the owner is in the store")
        assert owner is not None
        check(sent_of(owner.runs, owner.refs) == message.runs, "I6", "other handles than the store has")
        check(len(message.runs) <= 12 * wire.MAX_GRANT_RUNS, "I7", "more runs than a message may have")
        area = self.broker.area_ids[pool]
        reported = self.broker.reported[link.peer][message.file]
        if self.plan.xen:
            self.check_handles(link, message, owner)
        for page, slot in pages_of(owner.runs).items():
            whole = self.roots.get(reported.root)
            theirs = whole[page * FP : page * FP + FP] if whole is not None else reported.pages.get(page)
            if isinstance(guest, Liar) and whole is None:
                continue  # it may have said several things of this page
            check(self.slot_fingerprint(pool, slot) == theirs, "k", "a grant of what was not reported", guest.name)
            guest.granted.add((area, slot))

    def check_handles(self, link: Link, granted: wire.Granted, owner: OwnerSet) -> None:
        """I1 on `xen`: each page's reference leads to its slot, for this domain; and it was told whose they are."""
        guest = link.guest
        area = self.broker.xen[guest.pool]
        told = [message for message in link.told if isinstance(message, wire.Grantor)]
        check(told and told[-1].domid == area.domid, "I6", "handles before the grantor", guest.name)
        slots = pages_of(owner.runs)
        sent = pages_of(granted.runs)
        check(sent.keys() == slots.keys(), "I6", "handles for other pages", guest.name)
        for page, ref in sent.items():
            entry = area.entries.get(ref)
            right = entry is not None and (entry.domid, entry.slot) == (guest.domid, slots[page])
            # The domain may have ended, and the broker does not know yet.
            check(right or owner.domid != guest.domid, "I1", "a handle leads elsewhere", guest.name, page)

    def check_view(self, consumer: Consumer, view: View) -> None:
        """I1 and I5 of one view."""
        guest, per_segment = consumer.guest, self.plan.slots_per_segment
        for page, (segment, slot) in view.shared.items():
            check(segment.pool == guest.pool, "I1", "a view of another pool's area")
            number = segment.number * per_segment + slot
            check((segment.area, number) in guest.granted or guest.agent is None, "I1", "not granted", number)
            if not view.stale and view.inode.writing is None:
                same = page < len(view.inode.symbols) and segment.slots[slot] == content_of(view.inode.symbols[page])
                check(same, "I5", "a stale byte", guest.name, consumer.number, page)

    def check_views(self) -> None:
        for guest in self.guests:
            for program in guest.programs:
                for view in program.views.values():
                    if view.shared:
                        self.check_view(program, view)
            for _, segment in guest.segments.values():
                check(segment.pool == guest.pool, "I1", "a domain has another pool's segment")
        for mapping in self.mappings:
            check(
                mapping.segment.slots[mapping.inside] == mapping.page, "I2", "a mapped page changes", mapping.entry.slot
            )

    def check_write(self, guest: Guest, inode: Inode) -> None:
        """A writer goes on: nobody but the hung may still have a view of the file (I5)."""
        for program in guest.programs:
            for view in program.views.values():
                if view.inode is inode and view.shared:
                    hung = program.hung or self.now - program.changed_at < 5 * LATENCY
                    excused = hung or guest.excused() or not self._knows(guest, program)
                    check(excused, "I5", "a writer goes on before a consumer is back", guest.name, program.number)
                    view.stale = True

    @staticmethod
    def _knows(guest: Guest, program: Consumer) -> bool:
        """Whether this agent has to do with this consumer: another one may have died before it."""
        return guest.consumers.get(program.number) is program

    def check_freed(self, pool: str, area: bytes, slot: int) -> None:
        """I4: nobody who would still be told to let go maps a slot that is freed."""
        engine = self.broker.engine
        if engine is None:
            return
        if self.plan.xen:
            if not self.broker.xen[pool].destroyed:
                self.check_unreached(pool, range(slot, slot + 1), "is freed")
            return
        for guest in self.guests:
            if guest.pool != pool or guest.agent is None:
                continue
            left = self.broker.left_at.get((pool, guest.name))
            for program in guest.programs:
                if not self._knows(guest, program):
                    continue
                for view in program.views.values():
                    for segment, inside in view.shared.values():
                        if segment.area != area or segment.number * self.plan.slots_per_segment + inside != slot:
                            continue
                        peer = engine.pools()[pool].peers.get(guest.name)
                        late = peer is None and left is not None and self.now - left >= engine.settings.grace
                        # A newcomer under the same name ends what was the former one's.
                        other = peer is not None and (guest.link is None or guest.link.peer != peer.id)
                        ended = late or other or self._withdrawn(guest, view.inode.key)
                        check(ended, "I4", "a mapped slot is freed", guest.name, slot)

    @staticmethod
    def _withdrawn(guest: Guest, key: FileKey) -> bool:
        """Whether the broker has told this agent, or is telling it, that it owns nothing of a file."""
        file = guest.agent._files.get(key) if guest.agent is not None else None
        if file is None or file.version is None or guest.link is None:
            return True
        told = set(guest.told)
        for _, item in guest.link.down.items:
            if item is not None and isinstance(item[1], wire.Withdraw):
                told.update(ints(item[1].ids))
        return file.version.id in told

    # ---------------------------------------------------------------------------------------------------------- steps

    def run(self, steps: int) -> None:
        with small_batches(self.plan):
            self.broker.start()
            for guest in self.guests:
                if self.chance(0.8):
                    guest.start()
            for _ in range(steps):
                self.steps += 1
                self.step()
            self.rest()

    def step(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.62:
            self.deliver()
        elif kind < 0.76:
            guest = rng.choice(self.guests)
            self._activity(guest)
        elif kind < 0.86:
            self.pass_time(rng.choice((0.05, 0.3, 1.0, 3.0, 12.0)) if not self.chance(0.03) else 50.0)
        elif kind < 0.93 and self.liars:
            rng.choice(self.liars).step()
        elif kind < 0.96:
            self._fault()
        else:
            for guest in self.guests:
                guest.report()
                guest.drain() if guest.awake() else None
        if self.steps % 16 == 0:
            self.check_views()
            self.digest.update(repr((self.now, self.stamp, self.peer, len(self.roots))).encode())

    def deliver(self) -> None:
        ready = [channel for channel in self.channels if channel.items and channel.ready()]
        if not ready:
            return
        channel = self.rng.choice(ready)
        for _ in range(self.rng.choice((1, 1, 2, 5))):
            if channel.items and channel.ready():
                _, item = channel.items.popleft()
                self.say("deliver", channel.name, _name(item))
                channel.deliver(item)

    def pass_time(self, seconds: float) -> None:
        """Let time pass; what is due by then arrives first, in the order of its deadlines."""
        end = self.now + seconds
        for _ in range(100_000):
            at, channel = self._next_due()
            wake = min((t for t in self._wakes() if t > self.now), default=float("inf"))
            if min(at, wake) > end:
                break
            if channel is None or wake < at:
                self.now = wake
                self._expire_leases()
                continue
            self.now = max(self.now, at)
            _, item = channel.items.popleft()
            self.say("due", channel.name, _name(item))
            channel.deliver(item)
            for guest in self.guests:
                if guest.wanted:
                    guest.report()
        else:
            check(False, "I7", "messages without end")
        self.now = max(self.now, end)
        self._expire_leases()
        self._unpin()
        for guest in self.guests:
            if guest.save_at is not None and self.now >= guest.save_at:
                guest.save()
        self.broker.feed(Tick())
        for guest in self.guests:
            guest.report()
            guest.tick()
            for program in guest.programs:
                if program.alive and not program.hung and not program.connected and not program.inbox.items:
                    program.connect()

    def _next_due(self) -> tuple[float, Channel | None]:
        first, found = float("inf"), None
        for channel in self.channels:
            if channel.items and channel.items[0][0] < first and channel.ready():
                first, found = channel.items[0][0], channel
        return first, found

    def _wakes(self) -> list[float]:
        return [*self.deadlines, *(guest.stalled_until for guest in self.guests)]

    def _expire_leases(self) -> None:
        if not any(self.now >= deadline for deadline in self.deadlines):
            return
        self.deadlines = [deadline for deadline in self.deadlines if deadline > self.now]
        for guest in self.guests:
            for inode in self.inodes_of(guest):
                late = [lease for lease in inode.leases if lease.deadline is not None and self.now >= lease.deadline]
                if late:
                    inode.leases = [lease for lease in inode.leases if lease not in late]
                    self.writers_go_on(inode)

    def _create(self, guest: Guest, path: bytes) -> None:
        if path in guest.fs:
            guest.unlink(path)
        symbols = (
            list(self.rng.choice(self.templates))
            if self.chance(0.85)
            else [self.rng.randrange(self.plan.symbols + 1) for _ in range(self.rng.randrange(1, 6))]
        )
        guest.fs[path] = inode = guest.new_inode(symbols)
        if self.chance(0.8):
            inode.tail = 0
        guest.look(path)

    def _activity(self, guest: Guest) -> None:
        rng = self.rng
        path = b"/usr/f%d" % rng.randrange(6)
        inode = guest.fs.get(path)
        choice = rng.randrange(27)
        if choice < 3 or inode is None:
            if inode is None or choice == 0:
                self._create(guest, path)
            return
        if choice < 9:
            self._consume(guest, inode)
        elif choice < 12:
            guest.write(inode, self._change(inode), path)
        elif choice < 14:
            if inode.writing is not None:
                inode.writing()
        elif choice == 14:
            guest.unlink(path)
        elif choice == 15:
            target = b"/usr/f%d" % rng.randrange(6)
            if target != path:
                if target in guest.fs:
                    guest.unlink(target)
                guest.fs[target] = guest.fs.pop(path)
                self.stamp += 1
                inode.stamp = self.stamp
                guest.look(path)
                guest.look(target)
        elif choice == 16:
            self.stamp += 1
            inode.stamp = self.stamp  # chmod: no lease is broken
            guest.look(path)
        elif choice < 20:
            inode.resident = set(range(len(inode.symbols)))
            guest.look(path)
        elif choice in (20, 24, 25, 26):
            if self.faults and self.chance(self.plan.cold_start):  # another agent, and nothing in memory
                guest.kill()
                for each in guest.fs.values():
                    each.resident = set()
            else:
                keep = rng.choice((0.5, 0.0))
                inode.resident = {page for page in inode.resident if self.chance(keep)}
                guest.look(path)
        else:
            self._consume_end(guest)

    def _change(self, inode: Inode) -> Callable[[], None]:
        rng = self.rng
        kind = rng.randrange(4)
        template = list(rng.choice(self.templates))

        def change() -> None:
            if kind == 0:
                inode.symbols = inode.symbols[: max(1, len(inode.symbols) - 1)]
            elif kind == 1:
                inode.symbols = [*inode.symbols, template[0]][:8]
            else:
                inode.symbols = template

        return change

    def _consume(self, guest: Guest, inode: Inode) -> None:
        live = [program for program in guest.programs if program.alive and not program.hung]
        if not live or (len(guest.programs) < 4 and self.chance(0.3)):
            guest.next_consumer += 1
            program = Consumer(guest, guest.next_consumer)
            guest.programs.append(program)
            if guest.agent is not None:
                program.connect()
        else:
            program = self.rng.choice(live)
        program.open(inode)

    def _consume_end(self, guest: Guest) -> None:
        live = [program for program in guest.programs if program.alive and not program.hung]
        if live:
            program = self.rng.choice(live)
            if program.views and self.chance(0.8):
                handle = self.rng.choice(list(program.views))
                inode = program.views[handle].inode
                program.close(handle)
                if self.chance(0.4):
                    program.open(inode)
            else:
                program.die()
                if not program.connected:
                    guest.programs.remove(program)

    def _fault(self) -> None:
        rng, plan = self.rng, self.plan
        guest = rng.choice(self.guests)
        kinds: list[tuple[float, Callable[[], None]]] = [
            (0.8, lambda: self._detach(guest)),
            (plan.cut, lambda: self.cut(guest)),
            (plan.agent_crash, guest.kill),
            (1.0, lambda: None if guest.agent is not None else guest.start()),
            (plan.hang, lambda: self._hang(guest)),
            (0.3, lambda: self.broker.detach(guest.pool, guest.name, self.chance(0.5))),
            (plan.destroy * plan.xen, guest.destroy),
            (plan.save * plan.xen, lambda: self._save(guest)),
            (plan.area_lost * plan.xen, lambda: self.broker.destroy_area(guest.pool)),
            (0.8 if plan.crash else 0.0, self._restart),
        ]
        rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])[0]()

    def _restart(self) -> None:
        if self.broker.engine is None:
            self.broker.start()
        elif self.chance(0.3):
            self.broker.crash()

    def _detach(self, guest: Guest) -> None:
        if not guest.awake():
            return
        if self.chance(0.5):
            path = self.rng.choice(list(guest.fs)) if guest.fs and self.chance(0.5) else None
            self.say(guest.name, "detach", path)
            guest.feed(ag.Detach(path))
        else:
            guest.feed(ag.Reattach())

    def _save(self, guest: Guest) -> None:
        """Save a domain: mostly its agent hears of it before, and lets go of what it can."""
        if guest.domid is None or not guest.awake() or guest.save_at is not None:
            return
        guest.save_at = self.now
        if self.chance(0.7):
            guest.save_at += self.rng.choice((0.5, 5.0))
            guest.feed(ag.Detach(None))

    def cut(self, guest: Guest) -> None:
        """Break a connection; the two sides notice it at different times, and what was under way may be lost."""
        link = guest.link
        if link is None:
            return
        self.say("cut", guest.name)
        link.cut = True
        for channel in (link.up, link.down):
            keep = self.rng.randrange(len(channel.items) + 1)
            while len(channel.items) > keep:
                channel.items.pop()
        if link.guest_open:
            self.put(link.down, None)
        if link.broker_open:
            delay = self.rng.choice((0.0, 0.0, 5.0, 30.0))
            link.up.items.append((self.now + LATENCY + delay, None))

    def _hang(self, guest: Guest) -> None:
        if self.chance(0.4):
            if guest.agent is not None and self.now > guest.stalled_until + 2 * LEASE_BREAK_TIME:
                seconds = self.rng.choice((3.0, 10.0, 60.0))
                guest.stalled_until = self.now + seconds
                guest.stalled_long = guest.stalled_long or seconds > LEASE_BREAK_TIME / 2
                self.say(guest.name, "stalls", seconds)
            return
        for program in guest.programs:
            if program.alive and self.chance(0.5):
                program.hung = not program.hung
                program.changed_at = self.now

    # ----------------------------------------------------------------------------------------------------------- rest

    def rest(self) -> None:
        """Stop the faults, let time pass, and look whether everybody has what they should have."""
        self.faults = False
        plan = self.plan
        plan.crash = plan.queue_full = 0.0
        self.say("---- rest")
        if self.broker.engine is None:
            self.broker.start()
        for liar in self.liars:
            if liar.link is not None:
                liar.link.guest_open = False
                liar.link.down.items.clear()
                if liar.link.broker_open:
                    self.put(liar.link.up, None)
                liar.link = None
            if liar.domid is not None:
                self.end_domain(liar.domid)
                liar.mappings.clear()
        self._unpin(all_of_them=True)
        plan.pin = 0.0
        for area in self.broker.xen.values():
            for entry in area.entries.values():
                entry.mapped *= entry.slot != NO_SLOT
        for guest in self.guests:
            guest.stalled_until, guest.save_at = 0.0, None
            if guest.agent is None:
                guest.start()
            self.broker.detach(guest.pool, guest.name, False)
            for program in list(guest.programs):
                if program.hung and self.chance(0.7):
                    program.hung, program.changed_at = False, self.now
            for inode in self.inodes_of(guest):
                if inode.writing is not None:
                    inode.writing()
            guest.feed(ag.Reattach())
        self._settle(26, 4.0)
        self._finish_writers()
        self._settle(14, 4.0)
        self.check_views()
        self.check_store(self.store.load())
        self.check_rest()
        if self.chance(0.5):
            self._detached()
        if self.chance(0.5):
            self._everybody_leaves()

    def _settle(self, rounds: int, seconds: float) -> None:
        for n in range(rounds):
            if n % 5 == 0:
                for guest in self.guests:
                    guest.scan()
            self.pass_time(seconds)
            for _ in range(200):
                engine = self.broker.engine
                if engine is None or not (engine.busy or any(g.wanted or self._reports(g) for g in self.guests)):
                    break
                self.pass_time(0.01)
        self.scanning = False  # what is under way arrives
        for _ in range(6):
            self.pass_time(3.0)
        self.scanning = True

    def _reports(self, guest: Guest) -> bool:
        return guest.link is not None and guest.agent is not None and guest.agent.reporting

    def _finish_writers(self) -> None:
        for guest in self.guests:
            for inode in self.inodes_of(guest):
                for _ in range(100):
                    if inode.writing is None:
                        break
                    inode.writing()
                hung = any(p.hung and v.inode is inode for p in guest.programs for v in p.views.values())
                check(hung or not inode.waiting, "I7", "a writer waits for ever", guest.name)

    def check_rest(self) -> None:
        """I7: progress. Everything that is left out is a limit that the seed has set."""
        engine = self.broker.engine
        assert engine is not None
        for name, pool in engine.pools().items():
            welcome = [g for g in self.guests if g.pool == name and g.name != "stranger"]
            check(
                len(pool.peers) == min(len(welcome), self.plan.max_domains),
                "I7",
                "honest domains are not connected",
                name,
                list(pool.peers),
            )
            table = self.broker.tables[name]
            in_slots = {fp for slot, fp in table.taken.items()}
            zero = fingerprint(self.broker.keys[name][0], content_of(0))
            deliverable: dict[bytes, set[str]] = {}
            for guest in welcome:
                if guest.name in pool.peers:
                    self._check_reports(guest, deliverable)
            for fp, domains in deliverable.items():
                room = not self.plan.xen or len(pool.index.segments) < self.plan.max_segments or pool.index.free.count
                if fp != zero and len(domains) >= pool.rules.k and room:
                    check(fp in in_slots, "I7", "a page of k domains is not in the area", name, sorted(domains))
            for slot, fp in table.taken.items():
                check(self.slot_fingerprint(name, slot) == fp, "I3", "a slot has other bytes", name, slot)
            check(self.shadow[name].slots == table.taken, "I6", "slots at rest", name)
            check(not engine._unsaved, "I7", "changes are still not saved")
            for guest in welcome:
                if guest.name in pool.peers:
                    self._check_attached(guest, pool)

    def _check_reports(self, guest: Guest, deliverable: dict[bytes, set[str]]) -> None:
        agent = guest.agent
        assert agent is not None
        for path, inode in guest.fs.items():
            file = agent._by_path.get(path)
            check(file is not None and file.key == inode.key, "I7", "a file is not known", guest.name, path)
            assert file is not None
            if inode.racy or inode.waiting or file.stage is Stage.LEAVING:
                continue
            version = file.version
            if version is None:
                check(not inode.resident, "I7", "a resident file has no version", guest.name, path)
                continue
            check(version.identity == inode.identity, "I7", "a version is not the file's", guest.name, path)
            check(file.reported and file.verdict is not None, "I7", "a file was not reported", guest.name, path)
            check(file.verdict != Verdict.NOT_REPORTED, "I7", "a file was given up", guest.name, path)
            check(file.verdict != Verdict.ROOT_MISMATCH, "I7", "an honest root is called wrong", guest.name, path)
            if file.verdict not in (Verdict.KNOWN, Verdict.WANTED):
                continue
            pages = range(version.page_count) if version.pages is None else ints(version.pages)
            if file.stage is Stage.PLAIN:
                check(inode.resident <= set(pages), "I7", "resident pages are not reported", guest.name, path)
            for page in pages:
                if page in inode.resident:
                    fp = fingerprint(guest.key, content_of(inode.symbols[page]))
                    deliverable.setdefault(fp, set()).add(guest.name)

    def _check_attached(self, guest: Guest, pool: Any) -> None:
        agent = guest.agent
        assert agent is not None
        holdings = pool.index.domains[guest.name].files
        held = {
            file.version.id: file.runs
            for file in agent._files.values()
            if file.stage in (Stage.SHARED, Stage.LEAVING) and file.version is not None
        }
        owned = {
            file: sent_of(owner.runs, owner.refs)
            for (domain, file), owner in pool.index.owners.items()
            if domain == guest.name
        }
        if self.plan.xen and self.plan.batches[5] < 10 and len(pool.index.segments) >= self.plan.max_segments:
            return  # a grant that is cut short is given back at each offer, and in a full area they do not end
        # A program without room is not at rest yet, and takes its grants out of the budget by turns.
        trying = [file for file in agent._files.values() if file.in_vain]
        if trying:
            # Nor is a file that asks for what was just given back: its grants may be on their way.
            trying += [file for file in agent._files.values() if file.stage in (Stage.LEASING, Stage.ASKING)]
        for file in trying:
            if file.version is not None:
                held.pop(file.version.id, None)
                owned.pop(file.version.id, None)
        check(held == owned, "I6", "owners and grants differ at rest", guest.name, sorted(held), sorted(owned))
        for file in agent._files.values():
            version = file.version
            if version is None or not file.paths or file.verdict not in (Verdict.KNOWN, Verdict.WANTED):
                continue
            check(version.id in holdings, "I7", "a file is not held", guest.name, version.id)
            content = holdings[version.id].content
            available = pool.index.table.count(content.ids)[1]
            check(
                file.available == available or file.stage is not Stage.PLAIN or file.poisoned,
                "I7",
                "the offer is not what there is",
                guest.name,
                file.available,
                available,
            )
            programs = [(p, v) for p in guest.programs for v in p.views.values() if v.inode.key == file.key]
            programs = [(p, v) for p, v in programs if p.connected and v.size == version.identity.size]
            if not programs or not available or file.poisoned or any(p.hung for p, _ in programs):
                continue
            if file.stage is Stage.LEAVING or programs[0][1].inode.racy or len(programs) != len(file.uses):
                continue
            if len(agent._shared_keys) >= agent.settings.max_attached_files and file.stage is Stage.PLAIN:
                continue
            if file.stage is not Stage.SHARED and self._budget_changes_hands(pool):
                continue
            if self.plan.xen and file.stage is not Stage.SHARED and self._beyond_budget(guest, pool, version.id):
                continue
            check(file.stage is Stage.SHARED, "I7", "a file with consumers is not shared", guest.name, file.stage)
            most = 12 * self.plan.batches[5]
            owner = pool.index.owners[guest.name, version.id]
            check(
                file.granted_pages >= available or most in (len(file.runs), len(owner.runs)),
                "I7",
                "fewer grants than offered",
                guest.name,
            )

    @staticmethod
    def _beyond_budget(guest: Guest, pool: Any, file: int) -> bool:
        """Whether there are not enough grants left for a file."""
        pages = sum(ints(pool.index.grantable(guest.name, file))[2::3])
        ledger: GrantLedger = pool.ledger
        assert guest.domid is not None
        return pages > ledger.free or ledger.used_by(guest.domid) + pages > ledger.limits.per_domain

    def _budget_changes_hands(self, pool: Any) -> bool:
        """Whether a program without room in any guest of the pool takes grants and gives them back, by turns."""
        agents = [guest.agent for guest in self.guests if guest.pool == pool.name and guest.agent is not None]
        return any(file.in_vain for agent in agents for file in agent._files.values())

    def _detached(self) -> None:
        """I8, and back again: by the guests, or by the operator."""
        self.say("---- detach")
        by_operator = self.chance(0.4)
        engine = self.broker.engine
        assert engine is not None
        for guest in self.guests:
            if by_operator:
                self.broker.detach(guest.pool, guest.name, True)
            else:
                guest.events.append(ag.Detach(None))
                guest.drain()
        self._settle(2, 5.0)
        for guest in self.guests:
            for program in guest.programs:
                for view in program.views.values():
                    told = not by_operator or guest.name in engine.pools()[guest.pool].peers
                    check(not view.shared or program.hung or not told, "I8", "shared after a detach", guest.name)
        for guest in self.guests:
            if by_operator:
                self.broker.detach(guest.pool, guest.name, False)
            else:
                guest.events.append(ag.Reattach())
                guest.drain()
        self._settle(6, 5.0)
        self.check_rest()

    def _everybody_leaves(self) -> None:
        """When nobody is left, nothing is left: no page, no slot, no owner, no segment but the newest."""
        self.say("---- everybody leaves")
        for guest in self.guests:
            if self.plan.xen and self.chance(0.5):
                guest.destroy()
                continue
            guest.kill()
            for program in guest.programs if self.plan.xen else ():
                if program.hung:  # or it maps its pages for ever
                    program.die()
        for _ in range(14):
            self.pass_time(5.0)
        engine = self.broker.engine
        assert engine is not None
        for name, pool in engine.pools().items():
            totals = self.broker.tables[name].totals()
            left = (totals.pages, totals.slots_used, totals.mappings, totals.pending)
            check(left == (0, 0, 0, 0), "I7", "something is left when all have gone", name, left)
            check(not pool.index.owners and not self.shadow[name].slots, "I6", "owners or slots are left", name)
            check(len(pool.index.segments) <= 1, "I7", "segments are left", name, sorted(pool.index.segments))
            check(not pool.coming and not pool.queue, "I7", "work is left", name)
            if self.plan.xen:
                check(not self.broker.xen[name].entries, "I6", "grants are left", name)
                check(not pool.ledger.used and not pool.pinned, "I6", "references are taken", name)
                self.check_grants(pool, [])


@dataclass
class Shadow:
    """What was committed for one pool."""

    area: bytes
    slots: dict[int, bytes] = field(default_factory=dict)
    owners: dict[tuple[str, int], OwnerSet] = field(default_factory=dict)
    segments: set[int] = field(default_factory=set)


def apply_change(shadow: Shadow, change: Change, slots_per_segment: int) -> None:
    match change:
        case SegmentOpened():
            shadow.segments.add(change.segment)
        case SegmentClosed():
            shadow.segments.discard(change.segment)
            low, high = change.segment * slots_per_segment, (change.segment + 1) * slots_per_segment
            for slot in [slot for slot in shadow.slots if low <= slot < high]:
                del shadow.slots[slot]
        case SlotsFilled():
            for i in range(len(change.fingerprints) // FP):
                fp = change.fingerprints[i * FP : i * FP + FP]
                if fp != bytes(FP):
                    shadow.slots[change.first + i] = fp
        case SlotsFreed():
            for slot in ints(change.slots):
                shadow.slots.pop(slot, None)
        case OwnerSet():
            shadow.owners[change.domain, change.file] = change
        case OwnerCleared():
            shadow.owners.pop((change.domain, change.file), None)
        case PoolOpened():
            raise ValueError("a pool is opened by its own step")


def _name(item: Any) -> str:
    if item is None:
        return "end"
    if isinstance(item, tuple) and len(item) > 1 and not isinstance(item[1], (int, bytes)) and item[1] is not None:
        return str(item[1])[:300] if not isinstance(item[0], str) else str(item)[:300]
    if isinstance(item, tuple) and isinstance(item[0], bytes):
        with contextlib.suppress(Exception):
            return str(cw.AGENT_TO_CONSUMER.decode(item[0][4:]))[:300]
        with contextlib.suppress(Exception):
            return str(cw.CONSUMER_TO_AGENT.decode(item[0][4:]))[:300]
    return str(item)[:300]


# --------------------------------------------------------------------------------------------------------------- runs


class _Shared:
    """One store per process, for LMDB does not outlive a fork; every seed begins with it reset."""

    store: Store | None = None
    pid = 0


def store_folder() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="sharearea-sim-", dir=memory if os.access(memory, os.W_OK) else None)


def shared_store(folder: str | None = None) -> Store:
    """Return this process's store, below `folder`, or below one of its own that goes when the process ends."""
    if _Shared.store is None or _Shared.pid != os.getpid():
        if folder is None:
            own = store_folder()
            folder = own.name
            atexit.register(own.cleanup)
        _Shared.store, _, _ = Store.open(Path(folder) / f"store-{os.getpid()}", boot_id="simulation")
        _Shared.pid = os.getpid()
        atexit.register(_Shared.store.close)
    return _Shared.store


def run_seed(seed: int, steps: int = STEPS, verbose: bool = False) -> tuple[str | None, str, list[str]]:
    """Run one seed. Returns what went wrong (None: nothing), a digest of the steps, and the trace if asked for."""
    world = World(seed, shared_store(), verbose)
    try:
        world.run(steps)
    except Exception as error:
        what = str(error) if isinstance(error, Violation) else "I7: raised " + repr(error)
        if verbose:
            world.trace.append(traceback.format_exc())
        return what, world.digest.hexdigest(), list(world.trace)
    return None, world.digest.hexdigest(), list(world.trace)


def replay(seed: int, steps: int) -> str:
    return f"python -m tests.sim --seed {seed} --steps {steps} --verbose"


def _run_part(
    seeds: list[int], steps: int, mutant: str | None, stop: bool, folder: str | None = None
) -> list[tuple[int, str]]:
    shared_store(folder)
    failures = []
    with mutated(mutant):
        for seed in seeds:
            what, _, _ = run_seed(seed, steps)
            if what is not None:
                failures.append((seed, what))
                if stop:
                    break
    return failures


def run_seeds(
    first: int, end: int, steps: int = STEPS, workers: int = 2, mutant: str | None = None, stop: bool = False
) -> list[tuple[int, str]]:
    """Run seeds [first, end) in processes of their own; return (seed, what went wrong). `stop`: a failure is enough."""
    parts = [list(range(at, min(at + 25, end))) for at in range(first, end, 25)]
    failures: list[tuple[int, str]] = []
    if workers == 1:
        for part in parts:
            failures += _run_part(part, steps, mutant, stop)
            if stop and failures:
                break
        return failures
    with store_folder() as folder, concurrent.futures.ProcessPoolExecutor(workers) as pool:
        runs = [pool.submit(_run_part, part, steps, mutant, stop, folder) for part in parts]
        for run in concurrent.futures.as_completed(runs):
            failures += [] if run.cancelled() else run.result()
            if stop and failures:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return sorted(failures)


# ------------------------------------------------------------------------------------------------------------ mutants


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Break the engine, the index or the agent in one way."""
    if name is None:
        yield
        return
    with contextlib.ExitStack() as undo:
        for owner, attribute, value in MUTANTS[name]():
            before = owner.__dict__[attribute]
            setattr(owner, attribute, value)
            undo.callback(setattr, owner, attribute, before)
        yield


Patch = tuple[Any, str, object]  # a class or a module, a name in it, and what takes its place


def _grants_before_the_owner_is_saved() -> list[Patch]:
    commit = Engine._commit

    def mutant(self: Engine, changes: Any = (), then: Any = None) -> None:
        if isinstance(then, engine_module._Granting):
            self._granted(then)
            then = None
        commit(self, changes, then)

    return [(Engine, "_commit", mutant)]


def _commits_out_of_order() -> list[Patch]:
    commit = Engine._commit

    def mutant(self: Engine, changes: Any = (), then: Any = None) -> None:
        unsaved, self._unsaved = self._unsaved, [] if then is not None else self._unsaved
        commit(self, changes, then)
        self._unsaved += unsaved if then is not None else []

    return [(Engine, "_commit", mutant)]


def _publishes_what_was_not_right() -> list[Patch]:
    on_filled = Engine._on_filled

    def mutant(self: Engine, event: Filled) -> None:
        on_filled(self, Filled(event.token, b"\1" * len(event.ok), event.opened))

    return [(Engine, "_on_filled", mutant)]


def _retracts_a_used_slot() -> list[Patch]:
    publish = Engine._publish

    def mutant(self: Engine, filling: Any, ok: bytes) -> None:
        publish(self, filling, ok)
        filling.pool.index.retract(filling.first, len(ok))

    return [(Engine, "_publish", mutant)]


def _wants_with_one_holder_less() -> list[Patch]:
    def mutant(_: Engine, pool: Any, content: Any) -> None:
        positions = pool.index.table.want(content.ids, pool.rules.k - 1)
        step = wire.MAX_FETCH_PAGES * 4
        for at in range(0, len(positions), step):
            content.publishing += 1
            pool.queue.append(engine_module._Job(content, positions[at : at + step]))

    return [(Engine, "_consider", mutant)]


def _offers_what_nobody_holds() -> list[Patch]:
    def mutant(self: Engine, pool: Any, content: Any, only: Any = None) -> None:
        offer(self, pool, content, only)
        if not content.publishing:
            pool.index.count_available(content)

    offer = Engine._offer
    return [(Engine, "_offer", mutant)]


def _keeps_grants_for_ever() -> list[Patch]:
    check_absent = Engine._check_absent

    def mutant(self: Engine, pool: Any) -> None:
        pool.absent.clear()
        check_absent(self, pool)

    return [(Engine, "_check_absent", mutant)]


def _forgets_marks() -> list[Patch]:
    def mutant(_: Engine, pool: Any) -> None:
        pool.remarks.clear()

    return [(Engine, "_sweep_remarks", mutant)]


def _restores_no_owners() -> list[Patch]:
    restore = PoolIndex.restore

    def mutant(self: PoolIndex, record: PoolRecord, *more: Any) -> Any:
        return restore(self, PoolRecord(record.area, record.slots_per_segment, record.segments, record.slots), *more)

    return [(PoolIndex, "restore", mutant)]


def _clears_no_owner_in_the_store() -> list[Patch]:
    release = PoolIndex.release

    def mutant(self: PoolIndex, domain: str, files: Any) -> list[Change]:
        return [change for change in release(self, domain, files) if not isinstance(change, OwnerCleared)]

    return [(PoolIndex, "release", mutant)]


def _counts_slots_anew_after_a_restart() -> list[Patch]:
    restore = PoolIndex.restore

    def mutant(self: PoolIndex, record: PoolRecord, *more: Any) -> Any:
        changes = restore(self, record, *more)
        self.next_slot = max(0, self.next_slot - self.slots_per_segment)
        return changes

    return [(PoolIndex, "restore", mutant)]


def _gives_the_lease_back_first() -> list[Patch]:
    leave = Agent._leave

    def mutant(self: Agent, file: Any, reason: str) -> None:
        if file.stage is Stage.SHARED:
            self._act(ag.ReleaseLease(file.key))
        leave(self, file, reason)

    return [(Agent, "_leave", mutant)]


def _releases_before_consumers_are_back() -> list[Patch]:
    leave = Agent._leave

    def mutant(self: Agent, file: Any, reason: str) -> None:
        if file.stage is Stage.SHARED and file.version is not None:
            self._release.append(file.version.id)
        leave(self, file, reason)

    return [(Agent, "_leave", mutant)]


def _waits_for_no_consumer() -> list[Patch]:
    finish = Agent._finish_leaving

    def mutant(self: Agent, file: Any) -> None:
        for use in file.uses.values():
            use.leaving = False
        finish(self, file)

    return [(Agent, "_finish_leaving", mutant)]


def _asks_twice() -> list[Patch]:
    advance = Agent._advance

    def mutant(self: Agent, file: Any) -> None:
        self._asked.clear()
        advance(self, file)

    return [(Agent, "_advance", mutant)]


def _asks_on_when_all_have_closed() -> list[Patch]:
    use_ended = Agent._on_use_ended

    def mutant(self: Agent, use: Any) -> None:
        file = self._uses.get(use)
        if file is not None and file.stage is Stage.ASKING:
            del self._uses[use], file.uses[use]
        else:
            use_ended(self, use)

    return [(Agent, "_on_use_ended", mutant)]


def _calls_what_is_mapped_free() -> list[Patch]:
    on_revoked = Engine._on_revoked

    def mutant(self: Engine, event: Revoked) -> None:
        on_revoked(self, Revoked(event.token, bytes(len(event.busy))))

    return [(Engine, "_on_revoked", mutant)]


def _counts_no_pinned_reference() -> list[Patch]:
    on_revoked = Engine._on_revoked

    def mutant(self: Engine, event: Revoked) -> None:
        revoking: Any = self._waiting.get(event.token)
        on_revoked(self, event)
        busy = [ref for ref, is_busy in zip(spread(revoking.refs), event.busy, strict=True) if is_busy]
        revoking.pool.ledger.give_back(revoking.domid, u32s(n for ref in busy for n in (ref, 1)))

    return [(Engine, "_on_revoked", mutant)]


def _fills_slots_that_the_store_has() -> list[Patch]:
    freed, reusable = PoolIndex._freed, PoolIndex.reusable

    def mutant_freed(self: PoolIndex, slots: bytes) -> list[Change]:
        reusable(self, slots)
        return freed(self, slots)

    def mutant_reusable(self: PoolIndex, slots: bytes) -> None:
        there = (self.free, self.withheld)
        left = [slot for slot in ints(slots) if not any(ranges.holds(slot, 1) for ranges in there)]
        reusable(self, u32s(left))

    return [(PoolIndex, "_freed", mutant_freed), (PoolIndex, "reusable", mutant_reusable)]


def _compares(owners: bool, entries: bool) -> Callable[[], list[Patch]]:
    """A mutant that forgets, after a restart, owners without entries or entries without owners."""
    compare = engine_module.compare  # type: ignore[attr-defined]

    def mutant(*args: Any) -> Any:
        lost, orphans = compare(*args)
        return lost if owners else [], orphans if entries else {}

    return lambda: [(engine_module, "compare", mutant)]


def _frees_what_a_grant_without_an_owner_reaches() -> list[Patch]:
    restore = PoolIndex.restore

    def mutant(self: PoolIndex, record: PoolRecord, lost: Any = (), reached: Any = None) -> Any:
        changes, _ = restore(self, record, lost)
        return changes, array("I", [NO_SLOT]) * len(reached or ())

    return [(PoolIndex, "restore", mutant)]


def _keeps_owners_of_another_domid() -> list[Patch]:
    reconcile = Engine._reconcile

    def mutant(self: Engine, peer: Any, pool: Any, held: Any) -> None:
        release, self._release = self._release, lambda *_: (0, 0)  # type: ignore[method-assign]
        reconcile(self, peer, pool, held)
        self._release = release  # type: ignore[method-assign]

    return [(Engine, "_reconcile", mutant)]


def _loses_references_of_a_failed_commit() -> list[Patch]:
    on_commit_failed = Engine._on_commit_failed

    def mutant(self: Engine, event: CommitFailed) -> None:
        give_back = GrantLedger.give_back
        GrantLedger.give_back = lambda *_: None  # type: ignore[method-assign]
        try:
            on_commit_failed(self, event)
        finally:
            GrantLedger.give_back = give_back  # type: ignore[method-assign]

    return [(Engine, "_on_commit_failed", mutant)]


def _forgets_grants_that_were_not_written() -> list[Patch]:
    on_grants_failed = Engine._on_grants_failed

    def mutant(self: Engine, event: GrantsFailed) -> None:
        revoke, self._revoke = self._revoke, lambda *_: None  # type: ignore[method-assign]
        on_grants_failed(self, event)
        self._revoke = revoke  # type: ignore[method-assign]

    return [(Engine, "_on_grants_failed", mutant)]


def _loses_slots_that_were_not_used() -> list[Patch]:
    def mutant(self: PoolIndex, first: int, count: int) -> None:
        if self.next_slot == first + count:
            self.next_slot = first

    return [(PoolIndex, "retract", mutant)]


def _closes_segments_before_the_commit() -> list[Patch]:
    close = Engine._close_segment

    def mutant(self: Engine, pool: Any, segment: int) -> None:
        self._act(CloseSegment(pool.name, segment))
        close(self, pool, segment)

    return [(Engine, "_close_segment", mutant)]


def _forgets_whose_turn_it_is() -> list[Patch]:
    sweep = Engine._sweep_retries

    def mutant(self: Engine, pool: Any) -> None:
        due = pool.reconsider_at is not None and self._now >= pool.reconsider_at
        sweep(self, pool)
        if due:
            pool.undelivered.clear()

    return [(Engine, "_sweep_retries", mutant)]


def _tells_no_grantor() -> list[Patch]:
    hand_out = Engine._hand_out

    def mutant(self: Engine, granting: Any) -> None:
        peer = self._peers.get(granting.peer)
        if peer is not None and granting.pool.ledger is not None:
            peer.grantor = next(iter(granting.pool.index.segments.values()))[0]
        hand_out(self, granting)

    return [(Engine, "_hand_out", mutant)]


def _hands_out_more_runs_than_fit() -> list[Patch]:
    def mutant(_: Engine, peer: Any, pool: Any, runs: bytes) -> Any:
        if pool.ledger is None or not runs:
            return runs, b"", runs
        refs = pool.ledger.take(peer.identity.domid, sum(ints(runs)[2::3]))
        return None if refs is None else (runs, refs, handles(runs, refs))

    return [(Engine, "_take_references", mutant)]


def _does_not(owner: type, attribute: str, result: object = None) -> Callable[[], list[Patch]]:
    """A mutant that leaves out one method."""
    return lambda: [(owner, attribute, lambda *_args, **_more: result)]


def _counts_unread_files_as_copies() -> list[Patch]:
    claim = PoolIndex.claim

    def mutant(self: PoolIndex, *args: Any, resident: bool = True) -> None:  # noqa: ARG001
        claim(self, *args)

    return [(PoolIndex, "claim", mutant)]


MUTANTS: Final[dict[str, Callable[[], list[Patch]]]] = {
    "grant-before-commit": _grants_before_the_owner_is_saved,
    "commits-out-of-order": _commits_out_of_order,
    "publish-despite-mismatch": _publishes_what_was_not_right,
    "retract-a-used-slot": _retracts_a_used_slot,
    "k-less-one": _wants_with_one_holder_less,
    "no-unmark": _does_not(CheckedTable, "unmark"),
    "no-remark": _forgets_marks,
    "no-release-on-hello": _does_not(Engine, "_reconcile"),
    "no-end-of-grace": _keeps_grants_for_ever,
    "coming-not-cleared": _does_not(Engine, "_not_coming"),
    "deferred-for-ever": _does_not(Engine, "_expect_deferred"),
    "no-sweep-of-offers": _does_not(Engine, "_sweep_offers"),
    "no-retry": _does_not(Engine, "_sweep_retries"),
    "offer-to-nobody": _offers_what_nobody_holds,
    "no-quota-at-the-end": _does_not(Engine, "_fits", True),
    "restore-without-owners": _restores_no_owners,
    "owners-stay-in-the-store": _clears_no_owner_in_the_store,
    "slots-counted-anew": _counts_slots_anew_after_a_restart,
    "lease-given-back-first": _gives_the_lease_back_first,
    "release-before-let-go": _releases_before_consumers_are_back,
    "wait-for-no-consumer": _waits_for_no_consumer,
    "ask-twice": _asks_twice,
    "ask-when-all-have-closed": _asks_on_when_all_have_closed,
    "withdraw-ignored": _does_not(Agent, "_on_withdraw"),
    "detach-ignored": _does_not(Agent, "_on_detach"),
    "lease-break-ignored": _does_not(Agent, "_on_lease_broken"),
    "withdraw-on-detach-forgotten": _does_not(Engine, "_withdraw"),
    "close-before-commit": _closes_segments_before_the_commit,
    "turns-forgotten": _forgets_whose_turn_it_is,
    "unread-is-a-copy": _counts_unread_files_as_copies,
    "read-later-forgotten": _does_not(Engine, "_same", False),
    # Of the xen backend alone.
    "mapped-is-free": _calls_what_is_mapped_free,
    "pinned-not-counted": _counts_no_pinned_reference,
    "pinned-for-ever": _does_not(Engine, "_sweep_pinned"),
    "revoke-forgotten": _does_not(Engine, "_revoke"),
    "reuse-before-commit": _fills_slots_that_the_store_has,
    "orphans-forgotten": _compares(owners=True, entries=False),
    "owners-without-entries": _compares(owners=False, entries=True),
    "orphans-reach-free-slots": _frees_what_a_grant_without_an_owner_reaches,
    "other-domid-kept": _keeps_owners_of_another_domid,
    "end-of-domain-ignored": _does_not(Engine, "_on_domain_gone"),
    "references-lost": _loses_references_of_a_failed_commit,
    "failed-grants-forgotten": _forgets_grants_that_were_not_written,
    "table-has-shrunk": _does_not(GrantLedger, "_cut", ([], [])),
    "slots-lost": _loses_slots_that_were_not_used,
    "never-in-pieces": _does_not(Engine, "_use_what_is_there"),
    "emptying-for-ever": _does_not(PoolIndex, "fill_again"),
    "no-grantor": _tells_no_grantor,
    "too-many-runs": _hands_out_more_runs_than_fit,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description="Simulate a host.")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", default=f"0:{SEEDS}", help="A:B, B left out")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--mutants", action="store_true", help="break the code in each known way; every one must fail")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args(argv)
    out = sys.stdout.write
    begun = time.monotonic()
    if args.seed is not None:
        with mutated(args.mutant):
            what, digest, trace = run_seed(args.seed, args.steps, args.verbose)
        out("".join(line + "\n" for line in trace))
        out(f"seed {args.seed}: {what or 'good'} ({digest})\n")
        return what is not None
    first, end = (int(part) for part in args.seeds.split(":"))
    if args.mutants:
        alive = []
        for name in MUTANTS:
            failures = run_seeds(first, end, args.steps, args.workers, name, stop=True)
            out(f"{name:32} {f'seed {failures[0][0]}: {failures[0][1]}' if failures else 'ALIVE'}\n")
            sys.stdout.flush()
            alive += [] if failures else [name]
        return bool(alive)
    failures = run_seeds(first, end, args.steps, args.workers, args.mutant)
    for seed, what in failures[:40]:
        out(f"{replay(seed, args.steps)}  # {what}\n")
    kinds = Counter(what.split(":")[0] for _, what in failures)
    out(f"{end - first} seeds, {len(failures)} failed {dict(kinds)}, {time.monotonic() - begun:.1f} s\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

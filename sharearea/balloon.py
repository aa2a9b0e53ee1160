"""Memory targets of Xen domains: read, lowered, and given back, whatever becomes of the broker meanwhile.

What ought to be taken or given back is decided in reclaim.py; this module carries it out through xenstore
(`/local/domain/N/memory/target`, KiB, which the guest's balloon driver follows) and remembers what each domain had.

Where that is remembered. A domain whose target was lowered must get it back though the broker was killed with -9, and
only xenstore is written at the same place and outlives the same things: the store of the index is thrown away when the
area is, and when somebody deletes it, and has no word on what xenstore says by now. So each lowered domain has a node
`/tool/sharearea/memory/<uuid>` with three numbers in KiB: what it is entitled to, the target before the last change,
and the target after it. The node is written before the target: whichever of the two targets is found, it is ours, and
what the domain is entitled to is known. Any other target was set by somebody else: that is what the domain is entitled
to from then on, and the node is void. It is not under /local/domain/N, which goes when a domain is saved: a restored
domain has another number, the same uuid, and the lowered target that xl saved with it. No guest can write there.

Two things that were seen on Xen 4.17 with Linux 6.1. A domain that was saved while lowered is restored with that as
the most that Xen lets it have, so raising it takes `xl mem-set`, which raises both; the node's fourth number is the
domid at the time of lowering, which tells. And a guest that finds no free memory on the host tries four times within
some 15 s and then waits for its target to change: so for a while after a raise the target moves by a page at times.

There must be no other program that sets targets by itself (as XAPI's squeezed does): the two would undo each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from .common.errors import ShareareaError
from .common.globs import is_uuid
from .common.units import KIB
from .common.wire import PAGE_SIZE
from .model import DomainId, PoolId
from .reclaim import Course, Decision, Domain, Report, Settings
from .stats import Balance, balances

RECORDS: Final = "/tool/sharearea/memory"

_LOOK_S: Final = 2.0  # between two looks at one domain
_RETRY_S: Final = 15.0  # after xenstore refused something
_STEP: Final = 4  # domains in one step: each takes a few requests to xenstored, of about 0.2 ms
_REMIND_S: Final = 20.0  # after a raise the guest is reminded of it, then after twice as long, and so on
_LAST_REMINDER_S: Final = 640.0
_MAX_RECORDS: Final = 1024  # more than these, and those of domains that are not there are forgotten


class Nodes(Protocol):
    """What is needed of common/xenstore.py. Every call may raise a ShareareaError."""

    def read(self, path: str) -> str | None:
        """Return a node's value, None if there is no such node."""
        ...

    def write(self, path: str, value: str) -> None:
        """Write a node; those above it are made."""
        ...

    def remove(self, path: str) -> None:
        """Remove a node and all below it; none there is fine."""
        ...

    def list(self, path: str) -> tuple[str, ...]:
        """Return the names below a node, none if it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What is known of one domain of a pool whose memory is to be reclaimed. Sizes in bytes."""

    pool: PoolId
    domain: DomainId
    floor: int
    headroom: int
    balance: Balance
    report: Report | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What a domain has and had, in bytes: its target now, and what that was before anything was taken."""

    target: int
    entitled: int
    static_max: int

    @property
    def taken(self) -> int:
        """What is taken from it now."""
        return max(0, min(self.entitled, self.static_max) - self.target)


@dataclass(frozen=True, slots=True)
class Change:
    """A line for the log: an event of the catalogue and its fields."""

    event: str
    fields: dict[str, object]


@dataclass(frozen=True, slots=True)
class _Record:
    """What a node remembers: sizes in KiB, and the domain's number when it was first lowered."""

    entitled: int
    before: int
    after: int
    domid: int

    @classmethod
    def read(cls, text: str | None) -> _Record | None:
        words = (text or "").split(" ")
        if len(words) != 4 or not all(word.isascii() and word.isdigit() and len(word) < 18 for word in words):
            return None
        return cls(*map(int, words))

    def __str__(self) -> str:
        return f"{self.entitled} {self.before} {self.after} {self.domid}"


@dataclass(slots=True, eq=False)
class _Known:
    """A domain that is looked at. `claim` None: all of it goes back."""

    domid: int
    uuid: str
    course: Course
    claim: Claim | None = None
    memory: Memory | None = None
    remind_at: float | None = None
    remind_after: float = _REMIND_S
    reminded: bool = False  # by a page less, which is to be given back


def claims(pools: Mapping[PoolId, Any]) -> dict[int, Claim]:
    """Return the claim of each Xen domain (by domid) in a pool with reclaim = "balloon", from the engine's state.

    A domain that is absent but keeps its grants has one too, without a report.
    """
    found: dict[int, Claim] = {}
    for pool in pools.values():
        rules = pool.rules
        if rules.reclaim != "balloon":
            continue
        for domain, balance in balances(pool).items():
            peer = pool.peers.get(domain)
            domid = peer.identity.domid if peer is not None else pool.domids.get(domain, 0)
            report = None
            if peer is not None and peer.stats is not None:
                report = Report(peer.stats_at, peer.stats.available_bytes, peer.stats.pressure)
            if domid > 0:
                found[domid] = Claim(pool.name, domain, rules.reclaim_floor, rules.reclaim_headroom, balance, report)
    return found


@dataclass(slots=True, eq=False)
class Balloon:
    """Keeps the memory targets of domains where reclaim.py says. One per broker; not thread-safe.

    Every second or two: `look` with what is known now; in between and after: `step`, which does a little at a time.
    Neither raises: what xenstore refuses is logged and tried again. `set_memory` (domid, bytes) sets a domain's target
    and the most that Xen lets it have (Toolstack.set_memory); it is called for domains that were saved while lowered.
    """

    nodes: Nodes
    set_memory: Callable[[int, int], None]
    settings: Settings = field(default_factory=Settings)
    _records: dict[str, _Record] = field(default_factory=dict)  # by uuid
    _known: dict[int, _Known] = field(default_factory=dict)
    _work: deque[int] = field(default_factory=deque)
    _look_at: float = 0.0
    _failed: str = ""
    _closing: bool = False

    def open(self, living: Iterable[str]) -> list[Change]:
        """Find out what an earlier broker took. `living`: uuids of the domains that are there."""
        try:
            there = set(living)
            names = self.nodes.list(RECORDS)
            for uuid in names:
                record = _Record.read(self.nodes.read(f"{RECORDS}/{uuid}")) if is_uuid(uuid) else None
                if record is not None and (uuid in there or len(names) <= _MAX_RECORDS):
                    self._records[uuid] = record
                else:
                    self.nodes.remove(f"{RECORDS}/{uuid}")
        except ShareareaError as error:
            return self._refused(error)
        return []

    def due(self, now: float) -> bool:
        """Return whether it is time for a look."""
        return now >= self._look_at and not self._work

    def look(self, claims: Mapping[int, Claim], living: Mapping[int, str], now: float) -> None:
        """Take note of what is known now. `living`: the uuid of every domain that is there, by domid.

        A domain that was lowered and has no claim any more gets everything back.
        """
        self._look_at = now + _LOOK_S
        lowered = {domid for domid, uuid in living.items() if uuid in self._records}
        wanted = {domid for domid in {*claims, *lowered} if domid > 0 and is_uuid(living.get(domid, ""))}
        for domid in [domid for domid in self._known if domid not in wanted]:
            del self._known[domid]
        for domid in sorted(wanted):
            known = self._known.get(domid)
            if known is None or known.uuid != living[domid]:
                known = self._known[domid] = _Known(domid, living[domid], Course(self.settings))
            known.claim = claims.get(domid)
            self._work.append(domid)

    def step(self, now: float) -> list[Change]:
        """Look at a few domains; lower or raise their targets. Return what to log."""
        changes: list[Change] = []
        for _ in range(min(_STEP, len(self._work))):
            known = self._known.get(self._work.popleft())
            if known is None:
                continue
            try:
                changes += self._keep(known, now)
                self._failed = ""
            except ShareareaError as error:
                # A request that is not answered takes seconds: the others wait for better times.
                self._work.clear()
                self._look_at = now + _RETRY_S
                return changes + self._refused(error)
        return changes

    def memory(self, domid: int) -> Memory | None:
        """Return what a domain had and has, as it was last seen."""
        known = self._known.get(domid)
        return known.memory if known is not None else None

    def close(self, living: Mapping[int, str], now: float) -> list[Change]:
        """Give everything back: nobody looks after these domains any more."""
        changes: list[Change] = []
        self._closing = True
        self._work.clear()
        self.look({}, living, now)
        while self._work:
            changes += self.step(now)
        return changes

    # ------------------------------------------------------------------------------------------------------ one domain

    def _keep(self, known: _Known, now: float) -> list[Change]:
        memory = self._read(known)
        known.memory = memory
        if memory is None:
            return []  # it is gone, or it is being built
        claim = known.claim
        if claim is None:
            limit = min(memory.entitled, memory.static_max)
            decision = Decision(max(limit, memory.target), "let-go")
        else:
            decision = known.course.decide(
                Domain(
                    memory.target,
                    memory.entitled,
                    memory.static_max,
                    claim.floor,
                    claim.headroom,
                    claim.balance.most,
                    claim.report,
                ),
                now,
            )
        target = -(-decision.target // KIB)
        if target * KIB == memory.target:
            self._leave(known, memory, now)
            return []
        self._write(known, memory, target)
        known.memory = after = Memory(target * KIB, memory.entitled, memory.static_max)
        reminded, known.reminded = known.reminded, False
        if reminded and after.target - memory.target == PAGE_SIZE:
            return []  # the other half of a reminder
        known.remind_at, known.remind_after = None, _REMIND_S
        if after.target > memory.target and not self._closing:
            known.remind_at = now + _REMIND_S
        elif after.taken == 0:
            self._forget(known.uuid)
        fields: dict[str, object] = {
            "domid": known.domid,
            "reason": decision.reason,
            "target_bytes": after.target,
            "taken_bytes": after.taken,
        }
        if claim is not None:
            fields |= {"pool": claim.pool, "domain": claim.domain, "net_bytes": claim.balance.net}
        if after.target < memory.target:
            return [_log("memory.taken", **fields)]
        return [_log("memory.returned", **fields)]

    def _leave(self, known: _Known, memory: Memory, now: float) -> None:
        """The target is what it ought to be. See that the guest has heard, and in the end forget about it."""
        if known.remind_at is None or self._closing:
            if memory.taken == 0:
                self._forget(known.uuid)
        elif now >= known.remind_at:
            # A page more, where there is one to be given; else one less, which is given back at the next look.
            page = PAGE_SIZE if memory.taken >= PAGE_SIZE else -PAGE_SIZE
            self._write(known, memory, (memory.target + page) // KIB)
            known.reminded = page < 0
            known.remind_after *= 2
            known.remind_at = now + known.remind_after if known.remind_after <= _LAST_REMINDER_S else None

    def _read(self, known: _Known) -> Memory | None:
        path = f"/local/domain/{known.domid}/memory"
        target, static_max = _number(self.nodes.read(f"{path}/target")), _number(self.nodes.read(f"{path}/static-max"))
        if not target:
            return None
        record = self._records.get(known.uuid)
        if record is not None and target not in (record.before, record.after):
            self._forget(known.uuid)
            record = None
        if record is not None and target == record.after != record.before:
            # It arrived: from now on the target before it would be somebody else's.
            self._remember(known.uuid, _Record(record.entitled, target, target, record.domid))
        entitled = record.entitled if record is not None else target
        return Memory(target * KIB, entitled * KIB, (static_max or max(entitled, target)) * KIB)

    def _write(self, known: _Known, memory: Memory, target: int) -> None:
        old = self._records.get(known.uuid)
        domid = old.domid if old is not None else known.domid
        self._remember(known.uuid, _Record(memory.entitled // KIB, memory.target // KIB, target, domid))
        if domid != known.domid and target * KIB > memory.target:
            self.set_memory(known.domid, target * KIB)
        else:
            self.nodes.write(f"/local/domain/{known.domid}/memory/target", str(target))

    def _remember(self, uuid: str, record: _Record) -> None:
        self.nodes.write(f"{RECORDS}/{uuid}", str(record))
        self._records[uuid] = record

    def _forget(self, uuid: str) -> None:
        if uuid in self._records:
            self.nodes.remove(f"{RECORDS}/{uuid}")
            del self._records[uuid]

    def _refused(self, error: ShareareaError) -> list[Change]:
        """Log a failure, but not the same one again and again."""
        if error.message == self._failed:
            return []
        self._failed = error.message
        return [_log("memory.failed", detail=error.message)]


def _log(event: str, **fields: object) -> Change:
    return Change(event, fields)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 18 else None

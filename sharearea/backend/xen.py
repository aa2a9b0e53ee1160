"""The Xen backend: shared rings, area domains, grants. The area domains outlive the broker."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..area.toolstack import Toolstack
from ..area.xen import XenArea
from ..balloon import Balloon, Change, Memory, claims
from ..common.errors import HostError, NativeError
from ..common.logs import EventLog
from ..common.xenstore import XenStore, XenStoreError, XenStoreLost
from ..config import BrokerConfig
from ..grants import GrantLimits
from ..model import (
    Action,
    DomainGone,
    Event,
    GrantsFailed,
    GrantsWritten,
    PoolId,
    PoolRecord,
    Revoke,
    Revoked,
    WriteGrants,
)
from ..policy import PoolRules, domain_name
from ..stats import holding
from ..transport import xen
from ..transport.xen import ListenerEvent
from .base import Arrival, Opened, bytes_differ, unusable

_XL_S: Final = 10.0  # for xl, where the loop waits for it
_CHECK_S: Final = 1.0  # between two looks whether links and areas are alive


class XenBackend:
    """Implements base.Backend."""

    def __init__(self, config: BrokerConfig, log: EventLog) -> None:
        self._config = config
        self._log = log
        self._areas: dict[PoolId, XenArea] = {}
        self._toolstack = Toolstack()
        self._xenstore = XenStore()
        self._listener = xen.XenListener(self._xenstore)
        self._nodes = XenStore()  # the listener's is the listener's alone
        self._balloon = Balloon(self._nodes, Toolstack(timeout_s=_XL_S).set_memory)
        self._check_at = 0.0
        self._look_at = 0.0
        self._suspect = False  # a call said that an area domain may be gone
        self._parted: set[int] = set()  # domains that are detached and hold nothing any more

    def fileno(self) -> int:
        """Return xenstore's descriptor: watches tell of domains and their rings."""
        return self._listener.fileno()

    def ready(self) -> Iterable[Arrival | Event]:
        """Connect to new rings; say which domains have gone."""
        return self._translated(self._listener.ready())

    def _translated(self, events: Iterable[ListenerEvent]) -> list[Arrival | Event]:
        found: list[Arrival | Event] = []
        for event in events:
            match event:
                case xen.Arrived():
                    found.append(Arrival(event.link, event.identity))
                case xen.DomainGone():
                    found.append(DomainGone(event.domid))
                case xen.Unreachable():
                    self._log.event("domain.unreachable", domid=event.domid, detail=event.why)
        return found

    def open_area(self, rules: PoolRules, key: bytes, record: PoolRecord | None) -> Opened:
        """Find the area domain by its uuid, check every page in it, read its table; or plan another one."""
        slots = self._config.slots_per_segment
        why = unusable(record, slots, rules)
        if record is not None:
            area = self._area(rules, record.area, key)
            if why is None:
                why = area.adopt(record.segments) or bytes_differ(area, record)
            if why is None:
                return Opened(area, record.area, record, None, _grant_limits(area, rules), area.entries())
            # What is left of it nobody will use. What guests have mapped stays good until they let go.
            area.destroy()
            area.close()
        identity = os.urandom(16)
        area = self._area(rules, identity, key)
        return Opened(area, identity, None, why, _grant_limits(area, rules))

    def _area(self, rules: PoolRules, identity: bytes, key: bytes) -> XenArea:
        slots = self._config.slots_per_segment
        area = XenArea(
            rules.name, identity, key, slots, rules.max_area_bytes, rules.max_grants or None, self._toolstack
        )
        self._areas[rules.name] = area
        return area

    def found(self, records: Iterable[PoolRecord]) -> Iterable[Event]:
        """Say which owners' domains are no more, or are others under the same number; see what is lowered."""
        for domid in self._listener.domains():
            self._listener.meet(domid)  # whom a broker before us detached, this one does not know
        self._say(self._balloon.open(self._living().values()))
        there = {domid: domain_name(domain.identity) for domid, domain in self._listener.domains().items()}
        owners = {(owner.domid, owner.domain) for record in records for owner in record.owners.values()}
        return [DomainGone(domid) for domid in sorted({domid for domid, name in owners if there.get(domid) != name})]

    def filled(self, pool: PoolId, segments: Iterable[int]) -> None:
        """Nothing: the domain keeps its frames."""

    def closed(self, pool: PoolId, segment: int) -> None:
        """Nothing: the frames went back to Xen."""

    def act(self, action: Action) -> Event | None:
        """Write and revoke grants."""
        match action:
            case WriteGrants():
                try:
                    self._areas[action.pool].grant(action.domid, action.slots, action.refs)
                except (HostError, NativeError) as error:
                    self._suspect = True
                    return GrantsFailed(action.token, error.message)
                return GrantsWritten(action.token)
            case Revoke():
                try:
                    return Revoked(action.token, self._areas[action.pool].revoke(action.refs))
                except (HostError, NativeError) as error:
                    self._suspect = True
                    self._log.event("grants.failed", pool=action.pool, detail=error.message, files=0)
                    return Revoked(action.token, b"\1" * (len(action.refs) // 4))
            case _:
                raise HostError(f"{type(action).__name__} on the xen backend")

    def tick(self, now: float, pools: Mapping[PoolId, Any]) -> tuple[list[Arrival | Event], list[PoolId]]:
        """See whether links and area domains are alive; keep memory targets where they should be."""
        self._reclaim(now, pools)
        self._part(pools)
        if now < self._check_at and not self._suspect:
            return [], []
        self._check_at, self._suspect = now + _CHECK_S, False
        events = self._translated(self._listener.check())
        return events, [name for name, area in self._areas.items() if area.domid is not None and not area.alive()]

    def _part(self, pools: Mapping[PoolId, Any]) -> None:
        """Hang up on detached domains that hold nothing any more; be there again for those that are detached no more.

        Linux forgets a user's event channels when a guest is restored, and kills who closes one then.
        """
        detached = {domid for pool in pools.values() for domid in pool.detached.values() if domid}
        try:
            for pool in pools.values():
                for domain, domid in pool.detached.items():
                    if domid and domid not in self._parted and not holding(pool, domain)["held_pages"]:
                        self._listener.part(domid)
                        self._parted.add(domid)
            for domid in self._parted - detached:
                self._listener.meet(domid)
                self._parted.discard(domid)
        except XenStoreLost:
            raise
        except XenStoreError:
            pass  # the next tick goes on

    def linked(self, domid: int) -> bool:
        """Tell whether a domain's agent has rings and an event channel, taken or not."""
        return self._listener.offers(domid)

    def _reclaim(self, now: float, pools: Mapping[PoolId, Any]) -> None:
        if now >= self._look_at and self._balloon.due(now):
            self._balloon.look(claims(pools), self._living(), now)
            # With 100,000 files mapped, this takes 80 ms: a fiftieth of the time at the most.
            done = time.monotonic()
            self._look_at = done + 49 * (done - now)
        self._say(self._balloon.step(now))

    def memory(self, domid: int) -> Memory | None:
        """Return a domain's memory target as it was last seen, and what it was before anything was taken."""
        return self._balloon.memory(domid)

    def _living(self) -> dict[int, str]:
        return {domid: domain.uuid for domid, domain in self._listener.domains().items()}

    def _say(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._log.event(change.event, **change.fields)

    def close(self) -> None:
        """Give memory back; let go of frames, tables and rings. The area domains stay."""
        with contextlib.suppress(XenStoreError):
            self._say(self._balloon.close(self._living(), time.monotonic()))
        for area in self._areas.values():
            area.close()
        self._listener.close()
        self._xenstore.close()
        self._nodes.close()


def _grant_limits(area: XenArea, rules: PoolRules) -> GrantLimits:
    return GrantLimits(*rules.grant_limits(area.budget().entries))

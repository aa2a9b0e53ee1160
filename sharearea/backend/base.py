"""What the broker's loop needs of a backend: where domains come from, how an area is found again, which actions are a
backend's own. Decisions stay in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..area.base import Area
from ..balloon import Memory
from ..common import wire
from ..common.link import Link
from ..grants import GrantLimits
from ..model import Action, Event, Identity, PoolId, PoolRecord
from ..policy import PoolRules


@dataclass(frozen=True, slots=True)
class Arrival:
    """A domain's agent is connected. The link is the receiver's to close."""

    link: Link
    identity: Identity


@dataclass(frozen=True, slots=True)
class Opened:
    """A pool's area. `record`: what the store had, if all of it was found; `reason`: why not (None: it was)."""

    area: Area
    identity: bytes  # 16 bytes
    record: PoolRecord | None
    reason: str | None
    grants: GrantLimits | None = None
    entries: tuple[bytes, bytes, bytes] = (b"", b"", b"")


class Backend(Protocol):
    """What the loop needs. Not thread-safe; close() last."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when ready() has something to do; -1: none now."""
        ...

    def ready(self) -> Iterable[Arrival | Event]:
        """Return connections that came, and events for the engine. Never waits."""
        ...

    def open_area(self, rules: PoolRules, key: bytes, record: PoolRecord | None) -> Opened:
        """Find the area that the record speaks of, or begin with an empty one."""
        ...

    def found(self, records: Iterable[PoolRecord]) -> Iterable[Event]:
        """Return what happened while no broker ran. Called once, after the engine has started."""
        ...

    def filled(self, pool: PoolId, segments: Iterable[int]) -> None:
        """Take note of segments that were opened."""
        ...

    def closed(self, pool: PoolId, segment: int) -> None:
        """Take note of a segment that was closed."""
        ...

    def act(self, action: Action) -> Event | None:
        """Carry out an action that only this backend has, and return its outcome."""
        ...

    def tick(self, now: float, pools: Mapping[PoolId, Any]) -> tuple[list[Arrival | Event], list[PoolId]]:
        """Look at what no event tells: what ready() returns, and pools whose area is gone. `pools`: Engine.pools()."""
        ...

    def memory(self, domid: int) -> Memory | None:
        """Return the memory target of a Xen domain whose memory is looked after, None for every other."""
        ...

    def linked(self, domid: int) -> bool:
        """Tell whether a Xen domain has something of a link that must not be there when it is saved."""
        ...

    def close(self) -> None:
        """Let go of everything in this process."""
        ...


def unusable(record: PoolRecord | None, slots: int, rules: PoolRules) -> str | None:
    """Say why what the store has of a pool is of no use, whatever has become of its area."""
    if rules.mode == "report":
        return "report-only"
    if record is None or not record.segments:
        return "no-earlier-area"
    if record.slots_per_segment != slots:
        return "segment-size-changed"
    if sum(len(fingerprints) for fingerprints in record.slots.values()) // wire.FINGERPRINT_SIZE > rules.max_pages:
        return "table-too-small"
    return None


def bytes_differ(area: Area, record: PoolRecord) -> str | None:
    """Hash every page that the store has in a slot (I3)."""
    empty = bytes(wire.FINGERPRINT_SIZE)
    for first, fingerprints in record.slots.items():
        ok = area.verify(first, fingerprints)
        if 0 in ok:
            used = [i for i, good in enumerate(ok) if not good and fingerprints[i * 32 : i * 32 + 32] != empty]
            if used:
                return "bytes-differ"
    return None

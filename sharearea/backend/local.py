"""The local backend: a unix socket, and sealed memfds that the service manager keeps for the next broker."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from .. import fdstore
from ..area.local import LocalArea
from ..common.errors import HostError, ShareareaError
from ..common.logs import EventLog
from ..config import BrokerConfig
from ..model import Action, Event, PoolId, PoolRecord
from ..policy import PoolRules
from ..transport.local import LocalListener
from .base import Arrival, Opened, bytes_differ, unusable

_ACCEPT_PAUSE_S: Final = 1.0


class LocalBackend:
    """Implements base.Backend. Opening it takes the socket, so that two brokers never look at one store."""

    def __init__(self, config: BrokerConfig, log: EventLog) -> None:
        self._config = config
        self._log = log
        self._areas: dict[PoolId, LocalArea] = {}
        self._listener = LocalListener(config.socket)
        self._accept_at: float | None = None
        self._lacking = False  # the last connection could not be accepted
        self._inherited = fdstore.inherited()

    def fileno(self) -> int:
        """Return the listening socket, or -1 while connections cannot be accepted."""
        return -1 if self._accept_at is not None else self._listener.fileno()

    def ready(self) -> Iterable[Arrival | Event]:
        """Accept one connection."""
        accepted = self._listener.accept()
        if accepted is not None:
            self._lacking = False
            return (Arrival(*accepted),)
        if self._listener.lacking is not None:
            if not self._lacking:
                self._log.event("broker.limit", detail=f"cannot accept a connection: {self._listener.lacking}")
            self._lacking = True
            self._accept_at = time.monotonic() + _ACCEPT_PAUSE_S
        return ()

    def open_area(self, rules: PoolRules, key: bytes, record: PoolRecord | None) -> Opened:
        """Adopt every segment that the service manager kept, or begin anew."""
        slots = self._config.slots_per_segment
        area = LocalArea(rules.name, key, slots, rules.max_area_bytes)
        self._areas[rules.name] = area
        why = _adopt(area, record, slots, rules, self._inherited)
        if why is None and record is not None:
            return Opened(area, record.area, record, None)
        for segment in list(area.segments()):
            area.close_segment(segment)
        return Opened(area, os.urandom(16), None, why)

    def found(self, records: Iterable[PoolRecord]) -> Iterable[Event]:
        """Close inherited descriptors that no area took."""
        del records  # a socket tells by itself who is gone
        adopted = {_segment_name(pool, segment) for pool, area in self._areas.items() for segment in area.segments()}
        for name, fds in self._inherited.items():
            for fd in fds:
                os.close(fd)
            if name not in adopted:
                self._keep(name, None)
        self._inherited = {}
        return ()

    def segment_fd(self, pool: PoolId, segment: int) -> int:
        """Return a segment's descriptor, which stays the area's."""
        return self._areas[pool].fd(segment)

    def filled(self, pool: PoolId, segments: Iterable[int]) -> None:
        """Leave new segments with the service manager, so that the next broker finds them."""
        for segment in segments:
            self._keep(_segment_name(pool, segment), self._areas[pool].fd(segment))

    def closed(self, pool: PoolId, segment: int) -> None:
        """Take a segment back from the service manager."""
        self._keep(_segment_name(pool, segment), None)

    def _keep(self, name: str, fd: int | None) -> None:
        if not fdstore.available():
            return
        try:
            if fd is not None:
                fdstore.store(name, fd)
            else:
                fdstore.remove(name)
        except HostError as error:
            self._log.event("broker.limit", detail=error.message)

    def act(self, action: Action) -> Event | None:
        """Nothing: grants are Xen's."""
        raise HostError(f"{type(action).__name__} on the local backend")

    def tick(self, now: float, pools: Mapping[PoolId, Any]) -> tuple[list[Arrival | Event], list[PoolId]]:
        """Accept connections again after a pause."""
        del pools
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
        return [], []

    def linked(self, domid: int) -> bool:  # noqa: ARG002 # of the protocol
        """Nothing here is saved."""
        return False

    def memory(self, domid: int) -> None:
        """Nothing: no memory is taken from anybody."""

    def close(self) -> None:
        """Close the areas and the socket; guests keep what they have mapped."""
        for area in self._areas.values():
            area.close()
        self._listener.close()


def _segment_name(pool: PoolId, segment: int) -> str:
    return f"sharearea-{pool}-{segment}"


def _adopt(
    area: LocalArea, record: PoolRecord | None, slots: int, rules: PoolRules, inherited: dict[str, list[int]]
) -> str | None:
    """Take over every segment that the store knows, from the service manager; say why not all of them came."""
    why = unusable(record, slots, rules)
    if why is not None or record is None:
        return why
    for segment, (dev, ino) in record.segments.items():
        fds = inherited.get(_segment_name(area.pool, segment), [])
        if not fds:
            return "segments-not-kept"
        # An earlier area's segment may lie there under the same name.
        fd = next((fd for fd in fds if (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == (dev, ino)), fds[-1])
        try:
            area.adopt(segment, fd, dev, ino)
        except ShareareaError as error:
            return f"segment-refused: {error.message}"
    return bytes_differ(area, record)

"""Where domains of the Xen backend are found: xenstore says who is there, and which of them waits for a broker.

An agent makes rings in memory of its own domain and writes where they are below its own node, data/sharearea. Who a
peer is, is the domid under which that node lies: only that domain and dom0 can write there, and Xen itself checks that
the rings' pages are that domain's. Its name, uuid and label are read from nodes that only dom0 can write.

What a domain writes is not trusted: two bounded numbers are read, and nothing else. How often a domain is looked at is
bounded, too, and a domain that goes on changing its node is not listened to for a while. Which pool a domain belongs to
is the policy's; frames and their bounds are ring_link.py's.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from ..common.errors import NativeError, ProtocolError
from ..common.native import Vchan
from ..common.ring_link import Channel, RingLink
from ..common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, MAX_FRAME
from ..common.xenstore import XenStore, XenStoreError, XenStoreLost
from ..model import Identity

MAX_QUEUE_BYTES: Final = 8 * MAX_FRAME
"""What may wait for one domain that reads slowly."""

NODE: Final = "data/sharearea"
"""Where an agent writes `ring-ref` and `event-channel`, below its domain's node: libxenvchan's names."""
DETACHED: Final = f"{NODE}/detached"
"""As long as the broker has this there, the agent makes no rings: a guest must not be saved with an event channel."""

_LOOK_S: Final = 0.25  # between two looks at one domain's node
_EVENTS: Final = 64  # changes of its node in _EVENTS_S, and a domain is not listened to for _DEAF_S
_EVENTS_S: Final = 2.0
_DEAF_S: Final = 10.0
_CENSUS_S: Final = 5.0  # between two looks at which domains there are, without an event
_SAY_S: Final = 10.0  # between two Unreachable of one domain
_LABEL_CHARS: Final = 200

_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")  # a grant reference or a port: far beyond what a domain can have
_DOMID: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_FIRST_RESERVED_DOMID: Final = 0x7FF0  # xen/include/public/xen.h

# This process or the host is at a limit: not the domain's fault, and tried again.
_LACKING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})


@dataclass(frozen=True, slots=True)
class XenDomain:
    """What xenstore says of a domain. A text is empty, a number 0, where it says nothing."""

    domid: int
    name: str
    uuid: str
    label: str
    """/local/domain/<domid>/sharearea-label, which only dom0 can write."""
    memory_target: int
    """Bytes that its balloon driver is to leave it."""
    memory_max: int
    """Bytes that it was made for (static-max)."""

    @property
    def identity(self) -> Identity:
        """The domain as the policy knows it."""
        return Identity("xen", domid=self.domid, name=self.name, uuid=self.uuid, label=self.label)


@dataclass(frozen=True, slots=True)
class Arrived:
    """An agent is connected. The link is the receiver's to close."""

    link: RingLink
    identity: Identity


@dataclass(frozen=True, slots=True)
class DomainGone:
    """A domain does not exist any more; what it had mapped it has no more. A link of it says so, too."""

    domid: int


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A domain offers rings that cannot be used. It is looked at again when it changes its node. For the log."""

    domid: int
    why: str


ListenerEvent = Arrived | DomainGone | Unreachable


@dataclass(slots=True, eq=False)
class _Seen:
    """What is known of a domain besides xenstore's word."""

    domid: int
    uuid: str
    link: RingLink | None = None
    look: bool = False  # its node may have changed
    look_at: float = 0.0  # not before
    changes: int = 0
    changes_since: float = 0.0
    deaf_until: float | None = None  # not watched until then
    say_at: float = 0.0  # no Unreachable before
    parted: bool = False  # part() was called for it


class XenListener:
    """Find domains and connect to their agents, from now on and those that are there already.

    `xenstore` is the listener's alone from now on, but it does not close it. Wait for fileno() to become readable and
    call ready(); call check() at every tick. Both wait for xenstored's answers and for nothing else. When xenstored
    answers too late, `lacking` says so, and what was left is done at a later check().

    Raises HostError (XenStoreError) if xenstored cannot be asked at first.
    """

    def __init__(
        self,
        xenstore: XenStore,
        *,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
        connect: Callable[[int, int, int], Channel] = Vchan.connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._xenstore = xenstore
        self._max_queue_bytes = max_queue_bytes
        self._connect = connect
        self._clock = clock
        self._seen: dict[int, _Seen] = {}
        self._events: list[ListenerEvent] = []
        self._census_at = 0.0
        self._closed = False
        self.lacking: str | None = None
        """Why the last ready() or check() could not do its work, else None."""
        xenstore.watch("@introduceDomain", "introduced")
        xenstore.watch("@releaseDomain", "released")
        self._census()

    def fileno(self) -> int:
        """Return xenstore's descriptor: readable when ready() may have something to do. Raises Closed."""
        return self._xenstore.fileno()

    # ------------------------------------------------------------------------------------------------------- events

    def ready(self) -> list[ListenerEvent]:
        """Return what has happened since the last call. Raises XenStoreLost when xenstored is gone for good."""
        return self._work(self._xenstore.events)

    def check(self) -> list[ListenerEvent]:
        """Do what waits for its time, and look at links and domains without an event. Returns what ready() returns."""
        now = self._clock()
        for seen in self._seen.values():
            if seen.link is not None and not seen.link.closed:
                seen.link.alive()
        if now >= self._census_at:
            return self._work(lambda: [*self._xenstore.events(), ("", "released")])
        return self._work(self._xenstore.events)

    def _work(self, source: Callable[[], list[tuple[str, str]]]) -> list[ListenerEvent]:
        self.lacking = None
        try:
            self._take(source())
            self._listen_again()
            self._look_around()
            # Asking may have brought events along that the descriptor does not show.
            if self._xenstore.has_events:
                self._take(self._xenstore.events())
        except XenStoreLost:
            raise
        except XenStoreError as error:
            self.lacking = error.message
            self._census_at = 0.0
        events, self._events = self._events, []
        return events

    def _take(self, reported: list[tuple[str, str]]) -> None:
        now = self._clock()
        census = False
        for _, token in reported:
            if token in ("introduced", "released"):
                census = True
            elif (seen := self._seen.get(int(token))) is not None:
                seen.look = True
                if now - seen.changes_since > _EVENTS_S:
                    seen.changes, seen.changes_since = 0, now
                seen.changes += 1
                if seen.changes > _EVENTS and seen.deaf_until is None:
                    self._unwatch(seen)
                    seen.deaf_until = now + _DEAF_S
        if census:
            self._census()

    def _census(self) -> None:
        """Compare who is there with who was."""
        there = self._domids()
        # A domain's node may be there for a moment when the domain is not any more, and the other way round.
        for domid in [domid for domid in self._seen if domid not in there or not self._xenstore.is_introduced(domid)]:
            there.discard(domid)
            self._forget(self._seen[domid])
        for domid in sorted(there):
            seen = self._seen.get(domid)
            uuid = self._uuid(domid)
            if seen is not None and seen.uuid and uuid and uuid != seen.uuid:  # the number has come round
                self._forget(seen)
                seen = None
            if seen is None and self._xenstore.is_introduced(domid):
                # Known before it is watched: if anything fails, the next census goes on here.
                seen = self._seen[domid] = _Seen(domid, uuid)
                seen.deaf_until = 0.0
                self._watch(seen)
            elif seen is not None:
                seen.uuid = seen.uuid or uuid
        self._census_at = self._clock() + _CENSUS_S

    def _domids(self) -> set[int]:
        names = self._xenstore.list("/local/domain")
        domids = {int(name) for name in names if _DOMID.fullmatch(name)}
        return {domid for domid in domids if 0 < domid < _FIRST_RESERVED_DOMID}

    def _forget(self, seen: _Seen) -> None:
        del self._seen[seen.domid]
        if seen.link is not None:
            seen.link.lose("its domain is gone")
        self._events.append(DomainGone(seen.domid))
        if seen.deaf_until is None:
            self._unwatch(seen)

    def _watch(self, seen: _Seen) -> None:
        self._xenstore.watch(f"/local/domain/{seen.domid}/{NODE}", str(seen.domid))
        # Reports once at once, so nothing that was missed stays missed.
        seen.deaf_until, seen.changes = None, 0

    def _unwatch(self, seen: _Seen) -> None:
        self._xenstore.unwatch(f"/local/domain/{seen.domid}/{NODE}", str(seen.domid))

    def _listen_again(self) -> None:
        now = self._clock()
        for seen in self._seen.values():
            if seen.deaf_until is not None and now >= seen.deaf_until:
                self._watch(seen)

    # -------------------------------------------------------------------------------------------------- connections

    def _look_around(self) -> None:
        now = self._clock()
        for seen in list(self._seen.values()):
            if seen.look and now >= seen.look_at:
                seen.look_at = now + _LOOK_S
                seen.look = not self._look(seen)

    def _look(self, seen: _Seen) -> bool:
        """Connect to the rings that a domain offers, if they are fresh. Returns whether that is settled."""
        base = f"/local/domain/{seen.domid}/{NODE}"
        # An agent writes the port last and removes it first: if it is there, so is what belongs to it. UNTRUSTED: what
        # is no number is nothing; a number that is not right, Xen refuses.
        port = _number(self._xenstore.read(f"{base}/event-channel"))
        ring_ref = _number(self._xenstore.read(f"{base}/ring-ref"))
        if port is None or ring_ref is None:
            return True
        if seen.link is not None and not seen.link.closed:
            # One agent for each domain: a second one waits for the first to end. Of one that has ended, its link is to
            # be closed first, so that nobody ever has two links of a domain.
            return seen.link.alive()
        if seen.parted:
            return True
        domain = self._read_domain(seen.domid)
        try:
            channel = self._connect(seen.domid, ring_ref, port)
        except NativeError as error:
            if error.errno in _LACKING:
                self.lacking = error.message
                return False
            # Old rings among them: those have had their client. The agent makes new ones and writes them here.
            self._unreachable(seen, error.message)
            return True
        except ProtocolError as error:
            self._unreachable(seen, error.message)
            return True
        try:
            seen.link = RingLink(
                channel, incoming=AGENT_TO_BROKER, outgoing=BROKER_TO_AGENT, max_queue_bytes=self._max_queue_bytes
            )
        except OSError as error:
            channel.close()  # the agent makes new rings, and they are tried
            self.lacking = os.strerror(error.errno or errno.EIO)
            return True
        self._events.append(Arrived(seen.link, domain.identity))
        return True

    def _unreachable(self, seen: _Seen, why: str) -> None:
        now = self._clock()
        if now >= seen.say_at:
            seen.say_at = now + _SAY_S
            self._events.append(Unreachable(seen.domid, why))

    def part(self, domid: int) -> None:
        """End the link with a domain until meet(): its agent is to hold neither rings nor an event channel (DETACHED).

        Raises XenStoreError. Nothing happens for a domain that is not there.
        """
        seen = self._seen.get(domid)
        if seen is None or seen.parted:
            return
        path = f"/local/domain/{domid}/{DETACHED}"
        self._xenstore.write(path, "1")
        self._xenstore.set_permissions(path, "n0", f"r{domid}")
        seen.parted = True
        if seen.link is not None:
            seen.link.lose("the domain is detached")

    def meet(self, domid: int) -> None:
        """End what part() began, also what a broker before us began. Raises XenStoreError."""
        seen = self._seen.get(domid)
        if seen is not None:
            seen.parted = False
            self._xenstore.remove(f"/local/domain/{domid}/{DETACHED}")

    def offers(self, domid: int) -> bool:
        """Tell whether a domain has rings, taken or not. Raises XenStoreError."""
        return self._xenstore.read(f"/local/domain/{domid}/{NODE}/event-channel") is not None

    # ------------------------------------------------------------------------------------------------------ domains

    def domains(self) -> dict[int, XenDomain]:
        """Return the domains that are there, dom0 left out, as xenstore describes them now: five requests for each.

        Which are there is known from the start, and then as ready() and check() find out. Raises XenStoreError.
        """
        return {domid: self._read_domain(domid) for domid in sorted(self._seen)}

    def _read_domain(self, domid: int) -> XenDomain:
        base = f"/local/domain/{domid}"
        read = self._xenstore.read
        return XenDomain(
            domid,
            name=read(f"{base}/name") or "",
            uuid=self._uuid(domid),
            label=(read(f"{base}/sharearea-label") or "")[:_LABEL_CHARS],
            memory_target=_kibibytes(read(f"{base}/memory/target")),
            memory_max=_kibibytes(read(f"{base}/memory/static-max")),
        )

    def _uuid(self, domid: int) -> str:
        return (self._xenstore.read(f"/local/domain/{domid}/vm") or "").rpartition("/")[2]

    # ----------------------------------------------------------------------------------------------------- lifetime

    def close(self) -> None:
        """End the watches. Links that arrived stay. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            for seen in self._seen.values():
                if seen.deaf_until is None:
                    self._unwatch(seen)
            self._xenstore.unwatch("@introduceDomain", "introduced")
            self._xenstore.unwatch("@releaseDomain", "released")
        except XenStoreError:
            pass  # they end with the connection

    def __enter__(self) -> Self:
        """Return the listener itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the listener."""
        self.close()


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and _NUMBER.fullmatch(text) else None


def _kibibytes(text: str | None) -> int:
    return int(text) * 1024 if text is not None and re.fullmatch(r"[0-9]{1,15}", text, re.ASCII) else 0

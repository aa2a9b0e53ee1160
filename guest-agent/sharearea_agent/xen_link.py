"""How the agent of a Xen guest meets its broker: it makes rings, writes where they are, and waits to be connected to.

The rings lie in this guest's own memory; the two numbers that the broker needs lie below this guest's own node in
xenstore, by libxenvchan's names. A guest that was restored or migrated is another domain: its rings and its node are
void then, and so is every link. What travels is ring_link.py's; when to meet again is the agent's.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Final, Self

from .common.errors import HostError, NativeError, PeerUnreachable
from .common.native import RING_CLOSED, RING_OPEN, Vchan
from .common.ring_link import DEFAULT_ORDER, RingLink
from .common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT
from .common.xenstore import XenStore, XenStoreError

NODE: Final = "data/sharearea"
RING_REF: Final = f"{NODE}/ring-ref"
EVENT_CHANNEL: Final = f"{NODE}/event-channel"
DETACHED: Final = f"{NODE}/detached"
"""The broker's: as long as it is there, no rings are made. An event channel must not be bound when the guest is saved:
who closes it afterwards is killed (Vchan.abandon)."""
BROKER_DOMID: Final = 0
MAX_QUEUE_BYTES: Final = 16 << 20

_DOMID: Final = "domid"  # tokens of watches
_DETACHED: Final = "detached"


class XenRendezvous:
    """Offer rings to the broker in domain `broker_domid`, one pair after the other.

    `xenstore` is the rendezvous' alone from now on (it reads its events), but it does not close it. publish(), then
    wait until one of filenos() is readable, then restored() and accept(); when the link that accept() returned is gone,
    publish() again. Raises HostError (XenStoreError) if xenstore or a device under /dev/xen does not do its part.
    """

    def __init__(
        self,
        xenstore: XenStore,
        *,
        broker_domid: int = BROKER_DOMID,
        order: int = DEFAULT_ORDER,
        max_queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        self._xenstore = xenstore
        self._broker_domid = broker_domid
        self._order = order
        self._max_queue_bytes = max_queue_bytes
        self._vchan: Vchan | None = None
        self.domid = self._read_domid()
        """This domain's number, as far as is known."""
        # The kernel sets watches anew in a restored guest, and each then reports once.
        xenstore.watch("domid", _DOMID)
        xenstore.watch(DETACHED, _DETACHED)

    def filenos(self) -> tuple[int, ...]:
        """Return what to wait for, to be readable: xenstore's descriptor, and that of rings that nobody has taken."""
        if self._vchan is None:
            return (self._xenstore.fileno(),)
        return self._xenstore.fileno(), self._vchan.fileno()

    def publish(self) -> None:
        """Make new rings, in place of those that nobody has taken, and write where they are."""
        self.withdraw()
        vchan = Vchan.serve(self._broker_domid, self._order, self._order)
        try:
            # In this order: who sees the port sees its ring-ref. The broker's domain may read them; dom0 may anyway.
            self._put(RING_REF, vchan.ring_ref)
            self._put(EVENT_CHANNEL, vchan.port)
        except XenStoreError:
            vchan.close()
            raise
        self._vchan = vchan

    def detached(self) -> bool:
        """Tell whether the broker wants no rings here now: it does until it says otherwise, or as another domain."""
        return self._xenstore.read(DETACHED) is not None

    def _put(self, path: str, number: int) -> None:
        self._xenstore.write(path, str(number))
        self._xenstore.set_permissions(path, f"n{self.domid}", f"r{self._broker_domid}")

    def accept(self) -> RingLink | None:
        """Return the link when the broker has come, else None. The link is the caller's, and the rings with it.

        Raises PeerUnreachable if the broker came and left at once: publish() again.
        """
        vchan = self._vchan
        if vchan is None:
            return None
        try:
            vchan.drain()
        except NativeError as error:
            self.withdraw()
            raise PeerUnreachable(f"the event channel broke: {error.message}") from None
        state = vchan.state()
        if state == RING_CLOSED:
            self.withdraw()
            raise PeerUnreachable("the broker came and left")
        if state != RING_OPEN:
            return None
        self._vchan = None
        return RingLink(
            vchan, incoming=BROKER_TO_AGENT, outgoing=AGENT_TO_BROKER, max_queue_bytes=self._max_queue_bytes
        )

    def restored(self) -> bool:
        """Tell whether this guest has become another domain since the last call: it was restored, or came from afar.

        Then everything that came from here is void: close the link, publish() again. Rings that nobody had taken are
        withdrawn already.
        """
        self._xenstore.events()
        domid = self._read_domid()
        if domid == self.domid:
            return False
        self.domid = domid
        # The old node is another domain's by now, and the event channel is not to be touched.
        vchan, self._vchan = self._vchan, None
        if vchan is not None:
            vchan.abandon()
        return True

    def _read_domid(self) -> int:
        text = self._xenstore.read("domid") or ""
        if not text.isascii() or not text.isdecimal():
            raise HostError("xenstore does not say which domain this is", "this needs to run in a Xen guest")
        return int(text)

    def withdraw(self) -> None:
        """Take back rings that nobody has taken, and what is written about any. Twice is fine."""
        self._drop()
        # The port first: who sees it sees its ring-ref.
        self._xenstore.remove(EVENT_CHANNEL)
        self._xenstore.remove(RING_REF)

    def _drop(self) -> None:
        vchan, self._vchan = self._vchan, None
        if vchan is not None:
            vchan.close()

    def close(self) -> None:
        """Withdraw, as far as xenstore answers, and end the watch. A link that accept() returned stays."""
        with contextlib.suppress(XenStoreError):
            self.withdraw()
            self._xenstore.unwatch("domid", _DOMID)
            self._xenstore.unwatch(DETACHED, _DETACHED)
        self._drop()

    def __enter__(self) -> Self:
        """Return the rendezvous itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the rendezvous."""
        self.close()

"""The two ways to the broker: a Unix socket (`local`), and rings shared with dom0 (`xen`), behind one small interface.

A connector makes links and says when one is there; what travels on them, and when to try again, is its user's. The
`xen` one also notices what befalls a guest as a whole: that it is about to be suspended, and that it goes on as another
domain, in which nothing of the old one is worth anything.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from .common.errors import PeerUnreachable, ShareareaError
from .common.link import Link, StreamLink
from .common.ring_link import RingLink
from .common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT
from .common.xenstore import XenStore
from .xen_link import XenRendezvous

MAX_QUEUE: Final = 16 << 20
GUEST_TYPE: Final = Path("/sys/hypervisor/guest_type")
SHUTDOWN: Final = "control/shutdown"

_CONNECT_TIMEOUT_S: Final = 2.0
SUSPEND_S: Final = 10.0
"""After a suspend was announced; none that comes is announced earlier. The toolstack waits longer (xl: a minute)."""
_AGAIN_S: Final = 30.0  # between two tries to watch xenstore again: each may wait for a xenstored that hangs


class Connector(Protocol):
    """Reaches the broker. For one thread at a time; nothing waits for the broker."""

    def connect(self) -> Link | None:
        """Return a link, which is the caller's, or None: `arrived` brings it later. Raises ShareareaError."""
        ...

    def check(self) -> None:
        """Look at what no event tells. Called now and then."""
        ...

    def close(self) -> None:
        """Let go of everything but links that were handed out."""
        ...


class SocketConnector:
    """Connects to the broker's socket at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def connect(self) -> Link | None:
        """Connect at once, or raise PeerUnreachable."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(_CONNECT_TIMEOUT_S)
        try:
            sock.connect(os.fspath(self._path))
        except OSError as error:
            sock.close()
            raise PeerUnreachable(f"{self._path}: {error.strerror or error}") from None
        return StreamLink(
            sock, incoming=BROKER_TO_AGENT, outgoing=AGENT_TO_BROKER, max_queue_bytes=MAX_QUEUE, accept_fds=64
        )

    def check(self) -> None:
        """Sockets tell."""

    def close(self) -> None:
        """Nothing is open."""


class RingConnector:
    """Offers rings to the broker through xenstore, and waits for it to come.

    `arrived` gets a link as soon as there is one; `lost` a text when none will come of the last connect(); `suspending`
    is called when the toolstack is about to suspend this domain, `restored` when it has become another one: links that
    were handed out before are void then; `binding` before an event channel is bound. Runs on the owner's `selector`.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        *,
        arrived: Callable[[Link], None],
        lost: Callable[[str], None],
        suspending: Callable[[], None],
        restored: Callable[[], None],
        binding: Callable[[], None] = lambda: None,
        xenstore: Callable[[], XenStore] = XenStore,
        rendezvous: Callable[[XenStore], XenRendezvous] = XenRendezvous,
    ) -> None:
        self._selector = selector
        self._arrived = arrived
        self._lost = lost
        self._suspending = suspending
        self._restored = restored
        self._binding = binding
        self._open_xenstore = xenstore
        self._open_rendezvous = rendezvous
        self._xenstore: XenStore | None = None
        self._rendezvous: XenRendezvous | None = None
        self._control: XenStore | None = None  # a connection of its own: the rendezvous reads the events of its one
        self._registered: tuple[int, ...] = ()
        self._offered = False  # rings that nobody has taken
        self._held = False  # connect() waits until rings may be made
        self._suspended_until = 0.0
        self._again_until = 0.0  # a suspend was refused that is wanted still
        self._asked_until = 0.0  # it was asked for again; if that is refused, too, somebody else holds it back
        self._link: RingLink | None = None
        self._domid = -1
        self._again_at = 0.0

    def connect(self) -> Link | None:
        """Make new rings and write where they are; the broker comes when it likes."""
        self._link = None
        try:
            rendezvous = self._open()
            self._unregister()  # of rings that may be closed by this
            self._offer(rendezvous)
        except ShareareaError:
            self._drop()
            raise
        self._domid = rendezvous.domid
        self._register()
        return None

    def _offer(self, rendezvous: XenRendezvous) -> None:
        """Make rings, or see to it that there are none: they must not be there when this guest is saved."""
        self._offered = False
        self._held = time.monotonic() < self._suspended_until or rendezvous.detached()
        if self._held:
            rendezvous.withdraw()
        else:
            self._binding()
            rendezvous.publish()
            self._offered = True

    @property
    def bound(self) -> bool:
        """Whether an event channel is bound, so that this guest must not be suspended."""
        return self._offered or (self._link is not None and not self._link.closed)

    def _open(self) -> XenRendezvous:
        if self._rendezvous is None:
            self._xenstore = self._open_xenstore()
            self._rendezvous = self._open_rendezvous(self._xenstore)
        if self._control is None:
            self._control = self._open_xenstore()
            self._control.watch(SHUTDOWN, SHUTDOWN)
            self._selector.register(self._control.fileno(), selectors.EVENT_READ, lambda _: self._on_control())
        return self._rendezvous

    def _register(self) -> None:
        assert self._rendezvous is not None
        self._registered = self._rendezvous.filenos()
        for fd in self._registered:
            self._selector.register(fd, selectors.EVENT_READ, lambda _: self._ready())

    def _unregister(self) -> None:
        for fd in self._registered:
            self._selector.unregister(fd)
        self._registered = ()

    def _ready(self) -> None:
        """Something has happened: in xenstore, or to rings that nobody had taken."""
        rendezvous = self._rendezvous
        if rendezvous is None:
            return
        link, failure = None, ""
        self._unregister()
        try:
            if rendezvous.restored():
                failure = "this domain goes on as another one"
                self._link, self._domid = None, rendezvous.domid
                self._suspended_until = 0.0
                self._restored()
            elif self._held or (self._offered and rendezvous.detached()):
                self._offer(rendezvous)
            elif self._offered:
                link = rendezvous.accept()
        except PeerUnreachable as error:
            failure = error.message
        except ShareareaError as error:
            failure = error.message
            self._forget()
        if self._rendezvous is not None:
            self._register()
        if link is not None:
            self._offered, self._link = False, link
            self._arrived(link)
        elif failure and (self._offered or self._held):
            self._offered = self._held = False
            self._lost(failure)

    def _forget(self) -> None:
        """Leave xenstore; whatever was at fault, all of it can be had again."""
        for held in (self._rendezvous, self._xenstore):
            if held is not None:
                with contextlib.suppress(ShareareaError):
                    held.close()
        self._rendezvous = self._xenstore = None

    def _on_control(self) -> None:
        control = self._control
        if control is None:
            return
        try:
            control.events()
            if control.read(SHUTDOWN) == "suspend":
                self._suspend_comes()
        except ShareareaError:
            self._drop_control()  # the next connect() opens another one

    def _suspend_comes(self) -> None:
        announced = time.monotonic() < self._suspended_until
        self._suspended_until = time.monotonic() + SUSPEND_S
        if announced and not self.bound:
            return
        self._suspending()  # closes the link
        if self._offered and self._rendezvous is not None:
            self._unregister()
            self._offer(self._rendezvous)
            self._register()

    def suspend_refused(self) -> None:
        """Have all let go as before a suspend: the kernel has refused one, because not all was, and it is wanted.

        One that nothing_left() has asked for is not asked for once more: another process may hold it back for as long
        as it likes, and the toolstack does not wait for ever.
        """
        if time.monotonic() < self._asked_until:
            return
        self._again_until = time.monotonic() + SUSPEND_S
        try:
            self._suspend_comes()
        except ShareareaError:
            self._drop()

    def nothing_left(self) -> None:
        """Ask for the suspend again that was refused, if one was: nothing stands in its way now.

        The kernel takes a request whoever writes it, and the toolstack waits for the suspend alone (libxl, 4.17). Not
        after SUSPEND_S: a guest that is suspended when nobody waits for it any more stays so.
        """
        wanted, self._again_until = time.monotonic() < self._again_until, 0.0
        if wanted and self._control is not None:
            self._asked_until = time.monotonic() + SUSPEND_S
            try:
                self._control.write(SHUTDOWN, "suspend")
            except ShareareaError:
                self._drop_control()

    def check(self) -> None:
        """Look for events that were read along with an answer, and for a broker that died without a sign."""
        resumed = self._held and 0 < self._suspended_until <= time.monotonic()
        if resumed:
            self._suspended_until = 0.0
        if resumed or (self._xenstore is not None and self._xenstore.has_events):
            self._ready()
        if self._control is not None and self._control.has_events:
            self._on_control()
        if self._link is not None and not self._link.closed:
            self._link.alive()
            if self._rendezvous is None:
                self._watch_again()

    def _watch_again(self) -> None:
        """Have an eye on which domain this is, although xenstore was lost: memory of a link says nothing about that."""
        if time.monotonic() < self._again_at:
            return
        self._again_at = time.monotonic() + _AGAIN_S
        try:
            rendezvous = self._open()
        except ShareareaError:
            self._drop()
            return
        self._register()
        if rendezvous.domid != self._domid:
            self._domid, self._link = rendezvous.domid, None
            self._restored()

    def _drop(self) -> None:
        self._unregister()
        self._offered = self._held = False
        self._forget()

    def _drop_control(self) -> None:
        if self._control is not None:
            self._selector.unregister(self._control.fileno())
            self._control.close()
            self._control = None

    def close(self) -> None:
        """Withdraw rings that nobody has taken, and leave xenstore."""
        self._drop()
        self._drop_control()


def guest_kind(path: Path = GUEST_TYPE) -> str:
    """Return what kind of Xen guest this is, in small letters: `pv`, `pvh`, `hvm`; "" if it is none."""
    try:
        return path.read_text().strip().lower()
    except OSError:
        return ""

"""What runs inside the lab's machines to prove the link: an agent's end, a broker's end, and bare vchans.

    python3 link_probe.py agent                              in a guest: offer rings, answer, offer again
    python3 link_probe.py broker MEGABYTES TRIPS             in dom0: find agents, exchange bytes, tell what happens
    python3 link_probe.py serve|connect DOMID PATH SEND_FILE|- RECEIVE_BYTES RECEIVE_FILE|- [READ_ORDER WRITE_ORDER]
    python3 link_probe.py store                              in a guest: what it may and may not write
    python3 link_probe.py flood SECONDS                      in a guest: change its node as often as can be

Every line that it prints is one JSON object with "at", the seconds of this machine's clock. It runs on the installed
packages (or with PYTHONPATH), and needs nothing else. Who starts these and judges their words is link_run.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import random
import selectors
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    HALF = "sharearea_agent"
    importlib.import_module(HALF)
except ImportError:
    HALF = "sharearea"


def part(name: str) -> Any:
    """Import a module of the half of sharearea that is installed here."""
    return importlib.import_module(f"{HALF}.{name}")


errors, native, wire, xenstore = (part(f"common.{name}") for name in ("errors", "native", "wire", "xenstore"))
LinkClosed = part("common.link").LinkClosed

TICK_S = 0.25
GRANT_BYTES = 12 * 60_000
PAGES = 128


def say(what: str, **more: object) -> None:
    sys.stdout.write(json.dumps({"what": what, "at": round(time.monotonic(), 4), **more}) + "\n")
    sys.stdout.flush()


def noise(seed: int, size: int) -> bytes:
    """Bytes that both ends can make by themselves."""
    return random.Random(seed).randbytes(size)


def pump(link: Any, watched: Any = ()) -> Iterator[list[Any]]:
    """Yield what arrives on a link, writing what is queued; ends when the link does."""
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        for fd in watched:
            selector.register(fd, selectors.EVENT_READ)
        while True:
            try:
                link.flush()
                selector.modify(link, link.poll_events(True))
                selector.select(TICK_S)
                yield [message for message, _ in link.receive()]
            except LinkClosed as error:
                say("closed", why=error.message)
                return
            except errors.ProtocolError as error:
                say("malformed", why=error.message)
                return


# ----------------------------------------------------------------------------------------------------------- agent


def agent() -> None:
    """Offer rings; answer Ping by Pong, and Fetch by as many pages as it asks for; hash what Granted brings."""
    rendezvous_class = part("xen_link").XenRendezvous
    with xenstore.XenStore() as store, rendezvous_class(store) as rendezvous:
        while True:
            begun = time.monotonic()
            rendezvous.publish()
            say("published", took=round(time.monotonic() - begun, 4), domid=rendezvous.domid)
            link = None
            with selectors.DefaultSelector() as selector:
                for fd in rendezvous.filenos():
                    selector.register(fd, selectors.EVENT_READ)
                while link is None:
                    selector.select()
                    if rendezvous.restored():
                        say("restored", domid=rendezvous.domid)
                        break
                    try:
                        link = rendezvous.accept()
                    except errors.PeerUnreachable as error:
                        say("unreachable", why=error.message)
                        break
            if link is not None:
                say("accepted")
                with link:
                    answer(link, rendezvous)


def answer(link: Any, rendezvous: Any) -> None:
    taken = hashlib.sha256()
    size = 0
    for messages in pump(link, rendezvous.filenos()):
        if rendezvous.restored():
            say("restored", domid=rendezvous.domid)
            return
        for message in messages:
            if isinstance(message, wire.Granted):
                taken.update(message.runs)
                size += len(message.runs)
            elif isinstance(message, wire.Fetch):
                for number in range(message.request):
                    link.send(wire.Data(number, b"\1" * PAGES, noise(number, PAGES * 4096)))
                    link.flush()
            elif isinstance(message, wire.Ping):
                if size:
                    say("granted", size=size, hash=taken.hexdigest())
                link.send(wire.Pong(message.number))


# ---------------------------------------------------------------------------------------------------------- broker


def broker(megabytes: int, trips: int) -> None:
    """Find agents, and exchange bytes with each once; tell of every event, until standard input ends."""
    xen = part("transport.xen")
    sessions: dict[Any, _Session] = {}
    os.set_blocking(0, False)
    with xenstore.XenStore() as store, xen.XenListener(store) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        with contextlib.suppress(PermissionError):  # a plain file has no end to wait for
            selector.register(0, selectors.EVENT_READ)
        say("listening")
        turns = 0
        while True:
            turns += 1
            keys = [key.fileobj for key, _ in selector.select(TICK_S)]
            if 0 in keys and not os.read(0, 4096):
                say("turns", turns=turns, cpu=time.process_time())
                return
            for event in [*(listener.ready() if listener in keys else ()), *listener.check()]:
                if isinstance(event, xen.Arrived):
                    domain = listener.domains()[event.identity.domid]
                    say(
                        "arrived",
                        domid=event.identity.domid,
                        name=event.identity.name,
                        uuid=event.identity.uuid,
                        label=event.identity.label,
                        target=domain.memory_target,
                        most=domain.memory_max,
                    )
                    sessions[event.link] = _Session(event.link, event.identity.domid, megabytes, trips)
                    selector.register(event.link, selectors.EVENT_READ)
                elif isinstance(event, xen.DomainGone):
                    say("gone", domid=event.domid)
                else:
                    say("unreachable", domid=event.domid, why=event.why)
            if listener.lacking:
                say("lacking", why=listener.lacking)
            for link, session in list(sessions.items()):
                try:
                    session.go_on(link in keys)
                    selector.modify(link, link.poll_events(True))
                except (LinkClosed, errors.ProtocolError) as error:
                    say("closed", domid=session.domid, why=error.message)
                    selector.unregister(link)
                    del sessions[link]
                    link.close()


class _Session:
    """Round trips first, then bytes to the agent, then bytes from it."""

    def __init__(self, link: Any, domid: int, megabytes: int, trips: int) -> None:
        self.link, self.domid = link, domid
        self.trips = trips
        self.frames = megabytes * (1 << 20) // (PAGES * 4096)
        self.grants = megabytes * (1 << 20) // GRANT_BYTES + 1
        self.hash = hashlib.sha256()
        self.sent = 0
        self.got = 0
        self.bad = 0
        self.step = "trips"
        self.begun = time.monotonic()
        link.send(wire.Ping(0))

    def _send_grants(self) -> None:
        """Keep the queue filled, and no more than that."""
        while self.step == "grants" and self.grants and self.link.queued_bytes < 2 * GRANT_BYTES:
            runs = noise(self.grants, GRANT_BYTES)
            self.hash.update(runs)
            self.sent += len(runs)
            self.grants -= 1
            self.link.send(wire.Granted(self.grants, runs))
            if not self.grants:
                self.link.send(wire.Ping(1))

    def go_on(self, ready: bool) -> None:
        if self.link.wants_write:
            self.link.flush()
            self._send_grants()
        if not ready:
            return
        for message, _ in self.link.receive():
            if isinstance(message, wire.Data):
                self.bad += message.pages != noise(message.request, PAGES * 4096)
                self.got += len(message.pages)
                if message.request == self.frames - 1:
                    self._say("data", size=self.got, bad=self.bad)
                    self.step = "done"
            elif self.step == "trips" and message.number < self.trips:
                self.link.send(wire.Ping(message.number + 1))
            elif self.step == "trips":
                self._say("trips", trips=self.trips)
                self.step, self.begun = "grants", time.monotonic()
                self._send_grants()
            elif self.step == "grants":
                self._say("grants", size=self.sent, hash=self.hash.hexdigest())
                self.step, self.begun = "data", time.monotonic()
                self.link.send(wire.Fetch(self.frames, 0, b""))
        self.link.flush()

    def _say(self, what: str, **more: object) -> None:
        say(what, domid=self.domid, seconds=round(time.monotonic() - self.begun, 4), **more)


# ------------------------------------------------------------------------------------------------------ bare vchan


def stream(verb: str, domid: int, path: str, send: str, receive_bytes: int, receive: str, *orders: str) -> int:
    """Be what vchan_peer.c is, through our own code: one file out, some bytes in, both at once."""
    out = memoryview(b"" if send == "-" else Path(send).read_bytes())
    got = bytearray()
    with xenstore.XenStore() as store:
        if verb == "serve":
            vchan = native.Vchan.serve(domid, *(int(order) for order in orders))
            for name, number in (("ring-ref", vchan.ring_ref), ("event-channel", vchan.port)):
                store.write(f"{path}/{name}", str(number))
                store.set_permissions(f"{path}/{name}", f"n{store.read('domid')}", f"r{domid}")
            say("published", ring_ref=vchan.ring_ref, port=vchan.port)
        else:
            vchan = native.Vchan.connect(
                domid, int(store.read(f"{path}/ring-ref") or 0), int(store.read(f"{path}/event-channel") or 0)
            )
        with vchan, selectors.DefaultSelector() as selector:
            selector.register(vchan, selectors.EVENT_READ)
            while vchan.state() == native.RING_WAITING:
                selector.select(1)
                vchan.drain()
            begun = time.monotonic()
            sent = 0
            while sent < len(out) or len(got) < receive_bytes:
                closed = vchan.state() == native.RING_CLOSED
                taken = vchan.read() if len(got) < receive_bytes else b""
                got += taken
                written = 0 if closed or sent == len(out) else vchan.write([out[sent : sent + 65536]])
                sent += written
                if not taken and not written:
                    if closed:
                        say("closed", sent=sent, received=len(got))
                        return 1
                    selector.select(5)
                    vchan.drain()
            say("done", seconds=round(time.monotonic() - begun, 4), sent=sent, received=len(got))
            # The one that received closes; the other waits for that.
            while sent and vchan.state() == native.RING_OPEN and time.monotonic() - begun < 60:
                selector.select(0.1)
                vchan.drain()
        if verb == "serve":
            store.remove(path)
    if receive != "-":
        Path(receive).write_bytes(got)
    return 0


# ----------------------------------------------------------------------------------------------------------- store


def store_rights() -> None:
    """Try to write what a guest may not, and what it may."""
    with xenstore.XenStore() as store:
        domid = store.read("domid")
        base = f"/local/domain/{domid}"
        for path in (
            *(f"{base}/{name}" for name in ("name", "vm", "sharearea-label", "domid", "memory/target")),
            "/local/domain/0/name",
            "/tool/sharearea",
            "data/sharearea/probe",
        ):
            try:
                store.write(path, "x")
                say("wrote", path=path.replace(base, ""))
            except xenstore.XenStoreError as error:
                say("refused", path=path.replace(base, ""), code=error.code)
        store.remove("data/sharearea/probe")


def flood(seconds: float) -> None:
    """Change the node as often as can be, with values of all kinds."""
    with xenstore.XenStore() as store:
        end = time.monotonic() + seconds
        odd = ("0", "-1", "1e9", "99999999999999999999", "", "x" * 2000, " 8", "8 ", "8\n", "\u0663", "4294967295", "1")
        writes = 0
        while time.monotonic() < end:
            store.write("data/sharearea/ring-ref", odd[writes % len(odd)])
            store.write("data/sharearea/event-channel", odd[writes // len(odd) % len(odd)])
            store.write(f"data/sharearea/{writes % 50}", "x")
            writes += 3
        say("flooded", writes=writes)
        store.remove("data/sharearea")


def main() -> int:
    match sys.argv[1:]:
        case ["agent"]:
            agent()
        case ["broker", megabytes, trips]:
            broker(int(megabytes), int(trips))
        case [("serve" | "connect") as verb, domid, path, send, size, receive, *orders]:
            return stream(verb, int(domid), path, send, int(size), receive, *orders)
        case ["store"]:
            store_rights()
        case ["flood", seconds]:
            flood(float(seconds))
        case _:
            sys.stderr.write(__doc__ or "")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

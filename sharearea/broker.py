"""The broker's loop: bytes become events, the engine decides, actions go to the adapters. Nothing is decided here.

One thread, one selector. No call on it may take longer than about 10 ms: a connection that has more to say than fits
into its share of a round waits for the next one, and is not read meanwhile, so that its own socket holds it back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import fdstore, stats
from .area.local import LocalArea
from .common import native, wire
from .common.control import ControlServer
from .common.errors import AreaFull, HostError, NativeError, ProtocolError, ShareareaError, StoreError, UsageError
from .common.link import LinkClosed, QueueFull, StreamLink
from .common.logs import EventLog
from .config import BrokerConfig
from .engine import Engine, PoolSetup, Settings
from .keys import PoolKey, load_keys
from .model import (
    Action,
    CloseSegment,
    Commit,
    CommitFailed,
    Committed,
    Disconnect,
    Event,
    Fill,
    Filled,
    FillFailed,
    Log,
    Malformed,
    Move,
    PeerClosed,
    PeerConnected,
    PeerId,
    PoolId,
    PoolRecord,
    Received,
    Send,
    SendSegment,
    Tick,
)
from .policy import PoolRules
from .store import Store
from .transport.local import LocalListener

_TICK_S: Final = 0.25
_SHARE_S: Final = 0.004  # of one round, for one connection
_LINGER_S: Final = 2.0  # for the last words to a peer that is sent away
_ACCEPT_PAUSE_S: Final = 1.0
_MAX_SILENT: Final = 32  # connections of one user that have said nothing yet
_FILES_PER_ANSWER: Final = 1000

Inherited = dict[str, list[int]]


def boot_id() -> str:
    """Return the kernel's name for this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(slots=True, eq=False)
class _Connection:
    peer: PeerId
    link: StreamLink
    uid: int
    silent: bool = True  # no message has come
    inbox: deque[wire.Message] = field(default_factory=deque)
    leaving_at: float | None = None  # set when it is to be closed as soon as its queue is empty


class Broker:
    """One broker: open it, run it, close it. Not thread-safe."""

    def __init__(self, config: BrokerConfig, log: EventLog) -> None:
        self.config = config
        self.log = log
        self._selector = selectors.DefaultSelector()
        self._connections: dict[PeerId, _Connection] = {}
        self._next_peer = 0
        self._areas: dict[PoolId, LocalArea] = {}
        self._stopping = False
        self._accept_at: float | None = None
        self._lacking = False  # the last connection could not be accepted
        self._tick_at = 0.0
        self._started = time.monotonic()
        self._statistics_at = self._started + config.status_interval
        self._listener: LocalListener | None = None
        self._control: ControlServer | None = None
        self._store: Store | None = None
        self._signals: socket.socket | None = None
        self._undo = contextlib.ExitStack()
        self.engine: Engine

    # ------------------------------------------------------------------------------------------------ start and end

    def open(self) -> None:
        """Open store, areas and sockets, and reconcile them, before anybody is served. Raises ShareareaError."""
        config, boot = self.config, boot_id()
        _raise_descriptor_limit()
        _make_folder(config.state_dir, 0o700)
        _make_folder(config.socket.parent, 0o755)
        _make_folder(config.status_socket.parent, 0o755)
        # First of all: two brokers must not both look at the store.
        self._listener = LocalListener(config.socket)
        self._undo.callback(self._listener.close)
        self._store, records, note = Store.open(
            config.state_dir / "store", boot_id=boot, max_bytes=config.store_max_bytes
        )
        self._undo.callback(self._store.close)
        if note is not None:
            self.log.event("store.set_aside", detail=note)
        keys = load_keys(config.state_dir, boot, sorted(config.policy.pools))
        inherited = fdstore.inherited()
        setups = {
            name: self._open_pool(rules, keys[name], records.get(name), inherited)
            for name, rules in config.policy.pools.items()
        }
        adopted = {_segment_name(pool, segment) for pool, area in self._areas.items() for segment in area.segments()}
        for name, fds in inherited.items():
            for fd in fds:
                os.close(fd)
            if name not in adopted:
                self._keep(name, None)
        self.engine = Engine(config.policy, setups, native.file_root, Settings(grace=config.grace))
        self._perform(self.engine.start(time.monotonic()))
        self._control = ControlServer(config.status_socket, 0o600, self._answer, self._selector)
        self._undo.callback(self._control.close)
        self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        self.log.event(
            "broker.started",
            pools=len(setups),
            socket=str(config.socket),
            kernel=native.selected_hash_kernel(),
            backend=config.backend,
        )
        for warning in config.warnings:
            self.log.event("config.warning", detail=warning)

    def _open_pool(self, rules: PoolRules, key: PoolKey, record: PoolRecord | None, inherited: Inherited) -> PoolSetup:
        slots = self.config.slots_per_segment
        area = LocalArea(rules.name, key.key, slots, rules.max_area_bytes)
        self._undo.callback(area.close)
        self._areas[rules.name] = area
        why = _adopt(area, record, slots, rules.max_pages, inherited)
        if why is None and record is not None:
            self.log.event("area.adopted", pool=rules.name, segments=len(record.segments), owners=len(record.owners))
        else:
            for segment in list(area.segments()):
                area.close_segment(segment)
            record = None
            self.log.event("area.opened", pool=rules.name, reason=why)
        zero, _ = native.fingerprint_pages(key.key, bytes(wire.PAGE_SIZE))
        table = native.NativePageTable(os.urandom(native.SEED_SIZE), zero, rules.max_domains, rules.max_pages)
        self._undo.callback(table.close)
        identity = record.area if record is not None else os.urandom(16)
        return PoolSetup(identity, key.epoch, key.key, slots, table, record)

    def close(self) -> None:
        """Close everything. Guests keep what they have mapped: sealed memory outlives the broker."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._undo.close()
        self._selector.close()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or stop()."""
        self._watch_signals()
        fdstore.notify("READY=1")
        try:
            while not self._stopping:
                self._round()
        finally:
            fdstore.notify("STOPPING=1")
            self.log.event("broker.stopped", log_lines_dropped=self.log.dropped)

    def stop(self) -> None:
        """End run() after this round."""
        self._stopping = True

    def _watch_signals(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._undo.callback(ours.close)
        self._undo.callback(theirs.close)
        self._signals = ours
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, -1)
        self._selector.register(ours, selectors.EVENT_READ, None)

    # ---------------------------------------------------------------------------------------------------- one round

    def _round(self) -> None:
        pending = any(connection.inbox for connection in self._connections.values())
        timeout = 0.0 if pending or self.engine.busy else _TICK_S
        for key, mask in self._selector.select(timeout):
            owner = key.data
            if owner is self._listener:
                self._accept()
            elif isinstance(owner, ControlServer):
                owner.ready(key.fileobj)
            elif isinstance(owner, _Connection):
                if mask & selectors.EVENT_WRITE:
                    self._flush(owner)
                if mask & selectors.EVENT_READ and owner.peer in self._connections:
                    self._read(owner)
            elif self._signals is not None:
                with contextlib.suppress(BlockingIOError):
                    self._signals.recv(4096)
        for connection in list(self._connections.values()):
            if connection.inbox:
                self._work(connection)
        self._tick()

    def _accept(self) -> None:
        assert self._listener is not None
        accepted = self._listener.accept()
        if accepted is None:
            if self._listener.lacking is not None:
                if not self._lacking:
                    self.log.event("broker.limit", detail=f"cannot accept a connection: {self._listener.lacking}")
                self._lacking = True
                self._selector.unregister(self._listener)
                self._accept_at = time.monotonic() + _ACCEPT_PAUSE_S
            return
        link, identity = accepted
        self._lacking = False
        self._next_peer += 1
        connection = _Connection(self._next_peer, link, identity.uid)
        self._connections[connection.peer] = connection
        self._selector.register(link, selectors.EVENT_READ, connection)
        self._feed(PeerConnected(connection.peer, identity))
        # An agent speaks at once. Whoever only connects must not take all descriptors from those who do.
        silent = [c for c in self._connections.values() if c.silent and c.uid == identity.uid and c.leaving_at is None]
        if len(silent) > _MAX_SILENT:
            self._feed(Malformed(silent[0].peer, f"{len(silent)} connections of this user that say nothing"))

    def _read(self, connection: _Connection) -> None:
        try:
            connection.inbox.extend(message for message, _ in connection.link.receive())
        except LinkClosed as error:
            self._lost(connection, error.message)
        except ProtocolError as error:
            connection.inbox.clear()
            self._feed(Malformed(connection.peer, error.message))

    def _work(self, connection: _Connection) -> None:
        """Hand a connection's messages to the engine, as many as fit into its share of the round."""
        end = time.monotonic() + _SHARE_S
        while connection.inbox and connection.peer in self._connections and connection.leaving_at is None:
            connection.silent = False
            self._feed(Received(connection.peer, connection.inbox.popleft()))
            if time.monotonic() >= end:
                break
        if connection.leaving_at is not None:
            connection.inbox.clear()
        self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        """Set what the selector waits for: no reading while there is unread work, or for one that is to go."""
        if connection.peer not in self._connections:
            return
        events = 0
        if not connection.inbox and connection.leaving_at is None:
            events |= selectors.EVENT_READ
        if connection.link.wants_write:
            events |= selectors.EVENT_WRITE
        registered = self._selector.get_map().get(connection.link)
        if registered is not None and registered.events == events:
            return
        if registered is not None and events:
            self._selector.modify(connection.link, events, connection)
        elif registered is not None:
            self._selector.unregister(connection.link)
        elif events:
            self._selector.register(connection.link, events, connection)

    def _flush(self, connection: _Connection) -> None:
        try:
            done = connection.link.flush()
        except LinkClosed as error:
            self._lost(connection, error.message)
            return
        if done and connection.leaving_at is not None:
            self._drop(connection)
        else:
            self._watch(connection)

    def _lost(self, connection: _Connection, why: str) -> None:
        told = connection.leaving_at is not None
        self._drop(connection)
        if not told:
            self._feed(PeerClosed(connection.peer, why))

    def _drop(self, connection: _Connection) -> None:
        if self._connections.pop(connection.peer, None) is None:
            return
        connection.inbox.clear()
        if self._selector.get_map().get(connection.link) is not None:
            self._selector.unregister(connection.link)
        connection.link.close()

    def _tick(self) -> None:
        now = time.monotonic()
        if self._accept_at is not None and now >= self._accept_at and self._listener is not None:
            self._accept_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._listener)
        for connection in list(self._connections.values()):
            if connection.leaving_at is not None and now >= connection.leaving_at:
                self._drop(connection)
        if now >= self._tick_at or self.engine.busy:
            self._tick_at = now + _TICK_S
            self._feed(Tick())
        if now >= self._statistics_at:
            self._statistics_at = now + self.config.status_interval
            for snapshot in self._pool_snapshots():
                self.log.event("pool.statistics", **snapshot)

    # ------------------------------------------------------------------------------------------------------ actions

    def _feed(self, event: Event) -> None:
        self._perform(self.engine.handle(event, time.monotonic()))

    def _perform(self, actions: Iterable[Action]) -> None:
        """Carry out actions in order; an outcome is handed back before anything else is handled."""
        work = deque(actions)
        touched: dict[PeerId, _Connection] = {}
        while work:
            outcome = self._act(work.popleft(), touched)
            if outcome is not None:
                work.extend(self.engine.handle(outcome, time.monotonic()))
        for connection in touched.values():
            if connection.peer in self._connections:
                self._flush(connection)

    def _act(self, action: Action, touched: dict[PeerId, _Connection]) -> Event | None:
        match action:
            case Send():
                return self._send(action.peer, touched, lambda link: link.send(action.message))
            case SendSegment():
                area = self._areas[action.pool]
                message = wire.Segment(action.segment)
                return self._send(action.peer, touched, lambda link: link.send(message, area.fd(action.segment)))
            case Disconnect():
                connection = self._connections.get(action.peer)
                if connection is not None:
                    connection.leaving_at = time.monotonic() + _LINGER_S
                    connection.inbox.clear()
                    touched[action.peer] = connection
            case Fill():
                area = self._areas[action.pool]
                return self._fill(action.token, area, lambda: area.fill(action.first, action.pages, action.want))
            case Move():
                area = self._areas[action.pool]
                return self._fill(action.token, area, lambda: area.move(action.slots, action.first, action.want))
            case Commit():
                assert self._store is not None
                try:
                    self._store.apply(action.changes)
                except StoreError as error:
                    return CommitFailed(action.token, error.message)
                return Committed(action.token)
            case CloseSegment():
                self._areas[action.pool].close_segment(action.segment)
                self._keep(_segment_name(action.pool, action.segment), None)
            case Log():
                self.log.event(action.event, **action.fields)
        return None

    def _send(
        self, peer: PeerId, touched: dict[PeerId, _Connection], send: Callable[[StreamLink], None]
    ) -> Event | None:
        connection = self._connections.get(peer)
        if connection is None or connection.leaving_at is not None:
            return None
        try:
            send(connection.link)
        except (QueueFull, HostError) as error:
            if isinstance(error, HostError):
                self.log.event("broker.limit", detail=error.message)
            self._drop(connection)
            return PeerClosed(peer, error.message)
        touched[peer] = connection
        return None

    def _fill(
        self, token: int, area: LocalArea, fill: Callable[[], tuple[bytes, tuple[tuple[int, int, int], ...]]]
    ) -> Event:
        try:
            ok, opened = fill()
        except (AreaFull, HostError, NativeError) as error:
            return FillFailed(token, error.message)
        for segment, _, _ in opened:
            self._keep(_segment_name(area.pool, segment), area.fd(segment))
        return Filled(token, ok, opened)

    def _keep(self, name: str, fd: int | None) -> None:
        """Leave a segment with the service manager, so that the next broker finds it; or take it back."""
        if not fdstore.available():
            return
        try:
            if fd is not None:
                fdstore.store(name, fd)
            else:
                fdstore.remove(name)
        except HostError as error:
            self.log.event("broker.limit", detail=error.message)

    # ------------------------------------------------------------------------------------------------- looking in

    def _pool_snapshots(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        size = self._store.size_bytes() if self._store is not None else 0
        return [
            stats.pool_snapshot(pool, self._areas[name].allocated_bytes(), size, now)
            for name, pool in self.engine.pools().items()
        ]

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        match question.get("verb"):
            case "status":
                return {
                    "uptime_ms": int((now - self._started) * 1000),
                    "pid": os.getpid(),
                    "backend": self.config.backend,
                    "enabled": self.config.policy.enabled,
                    "connections": len(self._connections),
                    "cpu_ns": time.process_time_ns(),
                    "warnings": list(self.config.warnings),
                    "pools": self._pool_snapshots(),
                }
            case "pools":
                return {"pools": self._pool_snapshots()}
            case "domains":
                return {"domains": list(stats.domain_snapshots(self.engine.pools(), now))}
            case "files":
                start = question.get("start", 0)
                if type(start) is not int or start < 0:
                    raise UsageError("files: `start` is a position from 0")
                files = stats.file_snapshots(self.engine.pools(), start, _FILES_PER_ANSWER)
                return {"files": files, "next": start + len(files) if len(files) == _FILES_PER_ANSWER else None}
            case verb:
                raise UsageError(f"no such question: {verb!r}", "status, pools, domains or files")


def _segment_name(pool: PoolId, segment: int) -> str:
    return f"sharearea-{pool}-{segment}"


def _adopt(area: LocalArea, record: PoolRecord | None, slots: int, max_pages: int, inherited: Inherited) -> str | None:
    """Take over every segment that the store knows, from the service manager; say why not all of them came."""
    if record is None or not record.segments:
        return "no-earlier-area"
    if record.slots_per_segment != slots:
        return "segment-size-changed"
    if sum(len(fingerprints) for fingerprints in record.slots.values()) // wire.FINGERPRINT_SIZE > max_pages:
        return "table-too-small"
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
    empty = bytes(wire.FINGERPRINT_SIZE)
    for first, fingerprints in record.slots.items():
        ok = area.verify(first, fingerprints)
        if 0 in ok:
            used = [i for i, good in enumerate(ok) if not good and fingerprints[i * 32 : i * 32 + 32] != empty]
            if used:
                return "bytes-differ"
    return None


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_folder(path: Path, mode: int) -> None:
    try:
        if not path.is_dir():
            path.mkdir(parents=True, mode=mode)
    except OSError as error:
        raise HostError(f"cannot create {path}: {error.strerror}", "create it, or configure another path") from None

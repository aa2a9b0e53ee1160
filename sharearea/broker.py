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
from typing import TYPE_CHECKING, Any, Final

from . import fdstore, stats
from .area.base import Area
from .backend.base import Arrival, Backend
from .backend.local import LocalBackend
from .common import native, wire
from .common.control import ControlServer
from .common.errors import AreaFull, HostError, NativeError, ProtocolError, StoreError, UsageError
from .common.link import Link, LinkClosed, QueueFull
from .common.logs import EventLog
from .config import BrokerConfig
from .engine import Engine, PoolSetup, Settings
from .keys import load_keys
from .model import (
    Action,
    CloseSegment,
    Commit,
    CommitFailed,
    Committed,
    Disconnect,
    DomainId,
    Event,
    Fill,
    Filled,
    FillFailed,
    Identity,
    Log,
    Malformed,
    Move,
    PeerClosed,
    PeerConnected,
    PeerId,
    PoolId,
    PoolRecord,
    Received,
    Revoke,
    Send,
    SendSegment,
    Tick,
    WriteGrants,
)
from .policy import PoolRules
from .statistics import Statistics
from .store import Store

if TYPE_CHECKING:
    from .metrics import Figures, MetricsServer

_TICK_S: Final = 0.25
_SHARE_S: Final = 0.004  # of one round, for one connection
_LINGER_S: Final = 2.0  # for the last words to a peer that is sent away
_MAX_SILENT: Final = 32  # connections of one user that have said nothing yet
_FILES_PER_ANSWER: Final = 1000
_FILES_LOOKED_AT: Final = 20_000  # for a path, in one answer: some 3 ms


def boot_id() -> str:
    """Return the kernel's name for this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(slots=True, eq=False)
class _Connection:
    peer: PeerId
    link: Link
    identity: Identity
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
        self._areas: dict[PoolId, Area] = {}
        self._stopping = False
        self._watched = -1  # the backend's descriptor in the selector
        self._tick_at = 0.0
        self._started = time.monotonic()
        self._statistics: Statistics | None = None
        self._metrics: MetricsServer | None = None
        self._control: ControlServer | None = None
        self._store: Store | None = None
        self._signals: socket.socket | None = None
        self._undo = contextlib.ExitStack()
        self._backend: Backend
        self.engine: Engine

    # ------------------------------------------------------------------------------------------------ start and end

    def open(self) -> None:
        """Open store, areas and sockets, and reconcile them, before anybody is served. Raises ShareareaError."""
        config, boot = self.config, boot_id()
        _raise_descriptor_limit()
        _make_folder(config.state_dir, 0o700)
        _make_folder(config.socket.parent, 0o755)
        _make_folder(config.status_socket.parent, 0o755)
        self._backend = _backend(config, self.log)
        self._undo.callback(self._backend.close)
        self._store, records, note = Store.open(
            config.state_dir / "store", boot_id=boot, max_bytes=config.store_max_bytes
        )
        self._undo.callback(self._store.close)
        if note is not None:
            self.log.event("store.set_aside", detail=note)
        self._keys = load_keys(config.state_dir, boot, sorted(config.policy.pools))
        setups = {name: self._open_pool(rules, records.get(name)) for name, rules in config.policy.pools.items()}
        self.engine = Engine(
            config.policy, setups, native.file_root, Settings(grace=config.grace, tally_interval=config.events_interval)
        )
        self._perform(self.engine.start(time.monotonic()))
        for event in self._backend.found(records.values()):
            self._feed(event)
        self._control = ControlServer(config.status_socket, 0o600, self._answer, self._selector)
        self._undo.callback(self._control.close)
        self._statistics = Statistics(config, self.log, self, time.monotonic())
        if config.metrics_listen:
            self._serve_metrics(config.metrics_listen)
        self._watch_backend()
        self.log.event(
            "broker.started",
            pools=len(setups),
            socket=str(config.socket) if config.backend == "local" else None,
            kernel=native.selected_hash_kernel(),
            backend=config.backend,
        )
        for warning in config.warnings:
            self.log.event("config.warning", detail=warning)

    def _serve_metrics(self, address: str) -> None:
        from .metrics import MetricsServer  # what it imports, others have no use for

        self._metrics = MetricsServer(address, self._figures)
        self._undo.callback(self._metrics.close)
        self._selector.register(self._metrics, selectors.EVENT_READ, self._metrics)

    def _open_pool(self, rules: PoolRules, record: PoolRecord | None) -> PoolSetup:
        key = self._keys[rules.name]
        opened = self._backend.open_area(rules, key.key, record)
        self._areas[rules.name] = opened.area
        if opened.record is not None:
            self.log.event(
                "area.adopted",
                pool=rules.name,
                segments=len(opened.record.segments),
                owners=len(opened.record.owners),
            )
        else:
            reason, _, detail = (opened.reason or "").partition(": ")
            self.log.event("area.opened", pool=rules.name, reason=reason, detail=detail)
        zero, _ = native.fingerprint_pages(key.key, bytes(wire.PAGE_SIZE))
        table = native.NativePageTable(os.urandom(native.SEED_SIZE), zero, rules.max_domains, rules.max_pages)
        self._undo.callback(table.close)
        return PoolSetup(
            opened.identity,
            key.epoch,
            key.key,
            self.config.slots_per_segment,
            table,
            opened.record,
            opened.grants,
            opened.entries,
        )

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
            self._perform(self.engine.last_words(time.monotonic()))
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
        signal.signal(signal.SIGHUP, lambda *_: self.log.reopen())
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, -1)
        self._selector.register(ours, selectors.EVENT_READ, None)

    # ---------------------------------------------------------------------------------------------------- one round

    def _round(self) -> None:
        pending = any(connection.inbox for connection in self._connections.values())
        timeout = 0.0 if pending or self.engine.busy else _TICK_S
        for key, mask in self._selector.select(timeout):
            owner = key.data
            if owner is self._backend:
                self._arrivals()
            elif isinstance(owner, ControlServer):
                owner.ready(key.fileobj)
            elif self._metrics is not None and owner is self._metrics:
                self._metrics.ready()
            elif isinstance(owner, _Connection):
                # A ring has one event for both: there is something to read, or room again.
                if owner.link.wants_write:
                    self._flush(owner)
                if mask & selectors.EVENT_READ and not owner.inbox and owner.peer in self._connections:
                    self._read(owner)
            elif self._signals is not None:
                with contextlib.suppress(BlockingIOError):
                    self._signals.recv(4096)
        for connection in list(self._connections.values()):
            if connection.inbox:
                self._work(connection)
        self._tick()

    def _watch_backend(self) -> None:
        """Watch the backend's descriptor, which may come and go."""
        fd = self._backend.fileno()
        if fd == self._watched:
            return
        if self._watched >= 0:
            self._selector.unregister(self._watched)
        if fd >= 0:
            self._selector.register(fd, selectors.EVENT_READ, self._backend)
        self._watched = fd

    def _arrivals(self) -> None:
        self._take(self._backend.ready())
        self._watch_backend()

    def _take(self, came: Iterable[Arrival | Event]) -> None:
        for what in came:
            if isinstance(what, Arrival):
                self._connect(what.link, what.identity)
            else:
                self._feed(what)

    def _connect(self, link: Link, identity: Identity) -> None:
        self._next_peer += 1
        connection = _Connection(self._next_peer, link, identity)
        self._connections[connection.peer] = connection
        self._selector.register(link, selectors.EVENT_READ, connection)
        self._feed(PeerConnected(connection.peer, identity))
        # An agent speaks at once. Whoever only connects must not take all descriptors from those who do.
        silent = [c for c in self._connections.values() if c.silent and c.identity == identity and c.leaving_at is None]
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
        events = connection.link.poll_events(not connection.inbox and connection.leaving_at is None)
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
        came, lost = self._backend.tick(now, self.engine.pools())
        self._take(came)
        for pool in lost:
            self._replace(pool)
        self._watch_backend()
        for connection in list(self._connections.values()):
            if connection.leaving_at is not None and now >= connection.leaving_at:
                self._drop(connection)
        if now >= self._tick_at or self.engine.busy:
            self._tick_at = now + _TICK_S
            self._feed(Tick())
        if self._statistics is not None:
            self._statistics.step(now)

    # ------------------------------------------------------------------------------------------------------ actions

    def _replace(self, pool: PoolId) -> None:
        """Begin anew with a pool whose area is gone."""
        old = self._areas[pool]
        setup = self._open_pool(self.config.policy.pools[pool], None)
        table = self.engine.pools()[pool].index.table
        self._perform(self.engine.replace(pool, setup, time.monotonic()))
        table.close()
        old.close()

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
                assert isinstance(self._backend, LocalBackend)
                fd = self._backend.segment_fd(action.pool, action.segment)
                return self._send(action.peer, touched, lambda link: link.send(wire.Segment(action.segment), fd))
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
                self._backend.closed(action.pool, action.segment)
            case WriteGrants() | Revoke():
                return self._backend.act(action)
            case Log():
                self.log.event(action.event, **action.fields)
        return None

    def _send(self, peer: PeerId, touched: dict[PeerId, _Connection], send: Callable[[Link], None]) -> Event | None:
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
        self, token: int, area: Area, fill: Callable[[], tuple[bytes, tuple[tuple[int, int, int], ...]]]
    ) -> Event:
        try:
            ok, opened = fill()
        except (AreaFull, HostError, NativeError) as error:
            return FillFailed(token, error.message)
        self._backend.filled(area.pool, [segment for segment, _, _ in opened])
        return Filled(token, ok, opened)

    # ------------------------------------------------------------------------------------------------- looking in

    def store_bytes(self) -> int:
        """Return the size of the store."""
        return self._store.size_bytes() if self._store is not None else 0

    def area(self, pool: PoolId) -> Area:
        """Return a pool's area."""
        return self._areas[pool]

    def connection_count(self) -> int:
        """Return how many connections there are."""
        return len(self._connections)

    def _pool_snapshots(self) -> list[dict[str, Any]]:
        assert self._statistics is not None
        return [self._statistics.pool(name) for name in self.engine.pools()]

    def _domain_snapshots(self, now: float) -> list[dict[str, Any]]:
        assert self._statistics is not None
        return [each for name in self.engine.pools() for each in self._statistics.domains(name, now)]

    def _figures(self) -> Figures:
        from .metrics import Figures

        assert self._statistics is not None
        pools = self._pool_snapshots()
        return Figures(pools, self._domain_snapshots(time.monotonic()), self._statistics.host(pools))

    def memory(self, domid: int) -> dict[str, Any]:
        """Return what is known of a Xen domain's memory target."""
        memory = self._backend.memory(domid)
        if memory is None:
            return {}
        return {
            "target_bytes": memory.target,
            "entitled_bytes": memory.entitled,
            "taken_bytes": memory.taken,
        }

    def _holding(self, pool: PoolId, domain: DomainId) -> dict[str, Any]:
        holding = stats.holding(self.engine.pools()[pool], domain)
        return holding | self.memory(holding["domid"]) | {"linked": self._backend.linked(holding["domid"])}

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        match question.get("verb"):
            case "status":
                assert self._statistics is not None
                pools = self._pool_snapshots()
                return {
                    "uptime_ms": int((now - self._started) * 1000),
                    "pid": os.getpid(),
                    "backend": self.config.backend,
                    "enabled": self.config.policy.enabled,
                    "connections": len(self._connections),
                    "cpu_ns": time.process_time_ns(),
                    "log_lines_dropped": self.log.dropped,
                    "warnings": list(self.config.warnings),
                    "pools": pools,
                    "host": self._statistics.host(pools),
                }
            case "pools":
                return {"pools": self._pool_snapshots()}
            case "domains":
                refused = [
                    {"domain": domain, "reason": reason, "text": text, "ago_ms": int((now - at) * 1000)}
                    for domain, (at, reason, text) in self.engine.refused.items()
                ]
                return {"domains": self._domain_snapshots(now), "refused": refused}
            case "files":
                start, path = question.get("start", 0), question.get("path")
                if type(start) is not int or start < 0:
                    raise UsageError("files: `start` is a position from 0")
                if path is not None:
                    if type(path) is not str:
                        raise UsageError("files: `path` is a text")
                    wanted = path.encode("utf-8", "surrogateescape")
                    files, after = stats.find_files(self.engine.pools(), wanted, start, _FILES_LOOKED_AT)
                    return {"files": files, "next": after}
                files = stats.file_snapshots(self.engine.pools(), start, _FILES_PER_ANSWER)
                return {"files": files, "next": start + len(files) if len(files) == _FILES_PER_ANSWER else None}
            case "detach" | "reattach" as verb:
                pool, domain = self._find_domain(question)
                self._perform(self.engine.detach(pool, domain, verb == "detach", now))
                return self._holding(pool, domain)
            case "holding":
                pool, domain = self._find_domain(question)
                return self._holding(pool, domain)
            case verb:
                raise UsageError(
                    f"no such question: {verb!r}", "status, pools, domains, files, detach, reattach or holding"
                )

    def _find_domain(self, question: dict[str, Any]) -> tuple[PoolId, DomainId]:
        """Return the pool and the domain that a question names. Raises UsageError for one that no pool knows."""
        domain, wanted = question.get("domain"), question.get("pool")
        if type(domain) is not str or not (wanted is None or type(wanted) is str):
            raise UsageError("`domain` is a text, and so is `pool` where it is there")
        pools = self.engine.pools()
        if wanted is not None and wanted not in pools:
            raise UsageError(f"there is no pool {wanted}", f"the pools are {', '.join(pools)}")
        found = [name for name, pool in pools.items() if wanted in (None, name) and stats.knows(pool, domain)]
        if not found:
            where = f"pool {wanted}" if wanted is not None else "any pool"
            raise UsageError(f"there is no domain {domain} in {where}", "`sharearea domains` shows them")
        if len(found) > 1:
            raise UsageError(f"{domain} is in several pools: {', '.join(found)}", "say which one: --pool POOL")
        return found[0], domain


def _backend(config: BrokerConfig, log: EventLog) -> Backend:
    if config.backend == "xen":
        from .backend.xen import XenBackend  # what other hosts have no use for

        return XenBackend(config, log)
    return LocalBackend(config, log)


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

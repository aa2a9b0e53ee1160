"""The agent's loop: what happens around it becomes events, the state machine decides, actions are carried out here.

The main thread has the links, the leases and the state machine. One worker thread has the scanner and the fingerprint
cache, for everything that may wait for a disk; jobs that somebody waits for go before the next batch of a scan.
"""

from __future__ import annotations

import contextlib
import grp
import os
import resource
import secrets
import selectors
import signal
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, Final

from . import agent
from .agent import Action, Agent, Event, FileIdentity, FileKey, SendPages
from .cache import FingerprintCache, coarse_clock_ns
from .common import __version__, native, wire
from .common.control import ControlServer
from .common.errors import HostError, NativeError, ProtocolError, ShareareaError, UsageError
from .common.events import path_text
from .common.link import Link, LinkClosed, QueueFull
from .common.logs import EventLog
from .common.ring_link import RingLink
from .config import BACKEND_XEN, AgentConfig
from .connect import SUSPEND_S, Connector, RingConnector, SocketConnector, guest_kind
from .consumers import ConsumerHub, Credentials
from .mapper import GUEST_PV, LocalMapper, Mapper, XenMapper
from .scan import Counters, Pass, Run, Scanner, ScanSettings, runs_of, vanished
from .view_control import ViewControl
from .view_mounts import MOUNTS, Covered, ViewMounts, inside, to_plain
from .views import MountedView, Views, mounted_views
from .watch import FolderWatch
from .worker import Job, Steps, Then, Worker

_TICK_S: Final = 0.25
_REPORT_ROOM: Final = 1 << 20  # reports go out while fewer bytes than this wait for the broker
_CUT_OFF_S: Final = 2.0  # at the end, for what follows when consumers that hang are cut off
_MEMORY_S: Final = 1.0  # between two looks at the guest's memory
_OWN_MEMORY_S: Final = 10.0  # between two looks at our own
_DUE_S: Final = 1.0  # between two looks at files that were too young to be trusted


class Runner:
    """One agent: open it, run it, close it. All methods belong to the main thread."""

    def __init__(self, config: AgentConfig, log: EventLog) -> None:
        self.config = config
        self.log = log
        self._selector = selectors.DefaultSelector()
        self._undo = contextlib.ExitStack()
        self._events: deque[Event] = deque()
        self._link: Link | None = None
        self._connector: Connector | None = None
        self._resume_at: float | None = None
        self._guest_kind = guest_kind() if config.backend == BACKEND_XEN else ""
        self._mapper: Mapper = XenMapper(self._guest_kind) if config.backend == BACKEND_XEN else LocalMapper()
        self._leases: dict[int, FileKey] = {}  # descriptor -> file
        self._wanted: deque[SendPages] = deque()
        self._wanted_at = 0  # pages of the first wanted file that were sent
        self._packing = False
        # Scanner and cache are the worker's; the main thread only asks whether there is one.
        self._scanner: Scanner | None = None
        self._scanner_of: tuple[bytes, ScanSettings] | None = None
        self._cache: FingerprintCache | None = None
        self._cache_epoch = b""
        self._to_drop: list[tuple[FileKey, int, list[Run]]] = []
        self._drops = 0  # jobs under way
        self._scanning = False
        self._rescan_at: float | None = None
        self._rescan_wanted = False
        self._due_at = 0.0
        self._touched: dict[bytes, None] = {}  # reported paths to look at besides what the watch says
        self._full_scans = 0
        self._scan_errors: dict[str, int] = {}
        self._left_out: dict[str, tuple[int, int]] = {}  # as it was logged last
        self._stopping = False
        self._next_tick = 0.0
        self._started = time.monotonic()
        self._memory_at = 0.0
        self._own_memory_at = 0.0
        self._own_memory = 0
        self._mappings_off = self._why_no_mappings()
        self._mounts = ViewMounts(config)
        self._covered: list[Covered] = []
        self._for_views: dict[FileKey, agent.OfferToViews] = {}  # files on offer that are in a view, or would be
        self._views = self._find_views()
        if self._views is not None:
            self._undo.callback(self._views.close)
        settings = agent.Settings(
            name=config.name,
            version=__version__,
            instance=secrets.token_bytes(16),
            drop=config.drop,
            drop_interval=config.drop_interval,
            lease_timeout=config.lease_timeout,
            reconnect_max=config.reconnect_max,
            max_attached_files=config.max_attached_files,
            events_interval=config.events_interval,
            views=self._views is not None,
            # With views there is somebody to share with; programs are told by the hub.
            mappings_off="" if self._views is not None else self._mappings_off[0],
        )
        self.agent = Agent(settings, SystemRandom().random)

    # ------------------------------------------------------------------------------------------------ start and end

    def open(self) -> None:
        """Open sockets, watch, cache and worker. Raises ShareareaError."""
        config = self.config
        _raise_descriptor_limit()
        # Before any other thread exists: every thread inherits the blocked lease signal.
        self._lease_watch = native.lease_watch_open()
        self._undo.callback(os.close, self._lease_watch)
        self._selector.register(self._lease_watch, selectors.EVENT_READ, self._on_leases)
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
            self._undo.callback(end.close)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._on_wake)
        for path in (config.consumer_socket, config.control_socket, config.cache):
            _make_folder(path.parent)
        self._undo.callback(self._mapper.close)
        self._control = ControlServer(config.control_socket, 0o600, self._answer, self._selector)
        self._undo.callback(self._control.close)
        self._connector = self._make_connector()
        self._undo.callback(self._connector.close)
        self._hub = ConsumerHub(
            config.consumer_socket,
            self._selector,
            self._mapper,
            self._events.append,
            self.log.event,
            self._who_may(),
            self._mappings_off[0],
            serve_unchanged=config.backend != BACKEND_XEN,
            plain_path=self._plain_path,
        )
        self._undo.callback(self._hub.close)
        self._worker = Worker(self._wake, self._on_job_failed, self._close_cache)
        self._worker.start()
        self._undo.callback(self._worker.stop)
        self._watch = FolderWatch(
            [to_plain(self._covered, os.fsencode(folder)) for folder in config.folders], settle=config.settle
        )
        self._undo.callback(self._watch.close)
        for error in self._watch.start():
            self.log.event("watch.limited", detail=error.message, hint=error.hint)
        self.log.about(domain=config.name)
        self.log.event("agent.started", folders=[str(folder) for folder in config.folders])
        if self._views is not None:
            self._selector.register(self._views, selectors.EVENT_READ, self._on_views)
        reason, hint = self._mappings_off
        if reason or hint:
            self.log.event("mappings.limited", reason=reason, hint=hint)

    def _why_no_mappings(self) -> tuple[str, str]:
        """Return the reason code if nothing may be shared with programs of this guest ("": it may), and what helps."""
        if self.config.backend != BACKEND_XEN:
            return "", ""
        if self._guest_kind != GUEST_PV and not self.config.allow_user_mappings:
            return "user-mappings-off", "agent.allow_user_mappings; its hazard is in docs/examples/agent.toml"
        try:
            fd, noexec = native.open_grant_device()
        except (HostError, NativeError) as error:
            return "no-grant-device", error.hint or error.message
        os.close(fd)
        if not noexec:
            return (
                "",
                "programs could make mappings executable, which ends a PVH guest: mount /dev noexec for the agent",
            )
        return "", ""

    def _find_views(self) -> Views | None:
        """Mount the configured views that are not mounted; return those that are, if their module answers."""
        config = self.config
        if config.backend != BACKEND_XEN:
            return None
        problems = self._mount_views()
        self._covered = self._mounts.plain_there()
        try:
            views = mounted_views(MOUNTS.read_bytes(), self._covered)
            if views or config.views:  # they may be mounted later, by others
                return Views(ViewControl(), views, self._events.append, self.log.event, self._submit)
        except (HostError, OSError) as error:
            if not problems:
                problems.append(HostError(f"guest views cannot be used: {error}"))
        finally:
            if problems:
                said = "; ".join(error.message for error in problems)
                hint = "; ".join(dict.fromkeys(error.hint for error in problems if error.hint))
                self.log.event("agent.limit", detail=f"{said}{f' ({hint})' if hint else ''}; plain files go on")
        return None

    def _submit(self, job: Job) -> None:
        self._worker.submit(job)  # which is made later than who is given this

    def _mount_views(self) -> list[HostError]:
        """Mount what is configured, unless somebody wants it down; return what is not mounted then, and why."""
        mounts = self._mounts
        if all(mounts.is_up(view) for view in mounts.views) or mounts.why_down():
            return []
        try:
            with mounts.turn():
                return mounts.up()
        except HostError as error:
            return [HostError(f"guest views are not mounted: {error.message}", "start sharearea-view.service")]

    def _make_connector(self) -> Connector:
        if self.config.backend != BACKEND_XEN:
            return SocketConnector(self.config.broker_socket)
        return RingConnector(
            self._selector,
            arrived=self._on_arrived,
            lost=lambda why: self._events.append(agent.LinkDown(why)),
            suspending=self._on_suspending,
            restored=self._on_restored,
            binding=lambda: self._hold_suspends(binding=True),
        )

    def _who_may(self) -> Callable[[Credentials], bool]:
        """Return who of this guest's programs may be given handles."""
        if self.config.backend != BACKEND_XEN:
            return lambda _: True
        gid = None
        if self.config.consumer_group:
            try:
                gid = grp.getgrnam(self.config.consumer_group).gr_gid
            except KeyError:
                raise HostError(
                    f"there is no group {self.config.consumer_group}", "see agent.consumer_group in the configuration"
                ) from None
        return lambda who: who.uid == 0 or gid in who.gids

    def run(self) -> None:
        """Work until SIGTERM, SIGINT or stop()."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        signal.signal(signal.SIGHUP, lambda *_: self.log.reopen())
        signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)
        self._undo.callback(signal.set_wakeup_fd, -1)
        while not self._stopping:
            self._round()
        # Leases end with this process: writers must not get on before consumers are back on their plain files.
        self._events.append(agent.Detach(None))
        self._drain()
        end = time.monotonic() + self.config.lease_timeout + _CUT_OFF_S
        while self.agent.status()["attached_files"] and time.monotonic() < end:
            self._round()

    def _round(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_S
            self._tick(now)
        self._drain()
        timeout = 0.0 if self._more_to_report() else max(0.0, self._next_tick - time.monotonic())
        for key, mask in self._selector.select(timeout):
            if isinstance(key.data, ControlServer):
                key.data.ready(key.fileobj)
            else:
                key.data(mask)
            self._drain()

    def stop(self) -> None:
        """Have run() bring consumers back to their plain files and end."""
        self._stopping = True

    def close(self) -> None:
        """Close everything."""
        for action in self.agent.last_words():
            self._act(action)
        if self._link is not None:
            self._hang_up()
        self._undo.close()
        self._selector.close()
        self.log.event("agent.stopped", log_lines_dropped=self.log.dropped)

    # ------------------------------------------------------------------------------------------------------- rounds

    def _drain(self) -> None:
        """Hand queued events to the state machine until there are none."""
        while self._events:
            events = list(self._events)
            self._events.clear()
            for action in self.agent.handle_all(events, time.monotonic()):
                self._act(action)
        if self._to_drop:
            self._drops += 1
            self._worker.submit(partial(self._drop_all, self._to_drop))
            self._to_drop = []
        if self._link is not None:
            self._flush()

    def _tick(self, now: float) -> None:
        memory = None
        if now >= self._own_memory_at:  # the kernel walks all our mappings for it
            self._own_memory_at = now + _OWN_MEMORY_S
            self._own_memory = _private_bytes()
        if now >= self._memory_at:
            self._memory_at = now + _MEMORY_S
            memory = _memory(self._own_memory)
        if self._connector is not None:
            self._connector.check()
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            self._events.append(agent.Resumed())
        self._hold_suspends()
        self._events.append(agent.Tick(memory))
        self._hub.release_unused(self._leases)
        self._look_at_changes(now)

    def _more_to_report(self) -> bool:
        """Put reports on the link while it has room. Returns whether more could go at once."""
        if self._link is None or self._link.queued_bytes >= _REPORT_ROOM:
            return False
        if self._wanted and not self._packing:
            self._packing = True
            self._worker.submit(self._pack_pages(list(self._wanted)[: wire.MAX_REPORT_FILES], self._wanted_at))
        if self.agent.reporting:
            self._events.append(agent.LinkReady())
            return True
        return False

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.send(b"\0")

    def _on_wake(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)
        for result in self._worker.results():
            result()

    def _on_job_failed(self, error: Exception) -> None:
        self._packing = False
        if self._scanning:
            self._scanning = False
            self._rescan_at = time.monotonic() + self.config.rescan_interval
        self.log.event("scan.failed", detail=f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------------------------------------------- the broker

    def _connect(self) -> None:
        assert self._connector is not None
        try:
            link = self._connector.connect()
        except ShareareaError as error:
            self._events.append(agent.LinkDown(error.message))
            return
        if link is not None:
            self._on_arrived(link)

    def _on_arrived(self, link: Link) -> None:
        self._link = link
        self._selector.register(link, link.poll_events(True), self._on_link)
        self._events.append(agent.LinkUp())

    def _on_suspending(self) -> None:
        """Have consumers let go at once. The kernel stops us soon, and there is no word of when it has."""
        self._events.append(agent.Suspending())
        self._lose_link("this domain is about to be suspended")  # at once: nobody may close it afterwards
        self._resume_at = time.monotonic() + SUSPEND_S
        self.log.event("domain.suspending", attached_files=self.agent.status()["attached_files"])

    def _on_restored(self) -> None:
        """Nothing of what the domain was before is worth anything: neither grants nor the link."""
        self._events.append(agent.Suspending())
        self._lose_link("this domain goes on as another one", abandon=True)
        self._events.append(agent.Resumed())
        self._resume_at = None
        self.log.event("domain.restored", attached_files=self.agent.status()["attached_files"])

    def _on_link(self, mask: int) -> None:
        link = self._link
        if link is None:
            return
        try:
            if mask & selectors.EVENT_WRITE or link.wants_write:
                link.flush()
            if mask & selectors.EVENT_READ:
                self._on_messages(link, deque(link.receive()))
        except (LinkClosed, ProtocolError) as error:
            self._lose_link(error.message)

    def _on_messages(self, link: Link, messages: deque[tuple[wire.Message, int | None]]) -> None:
        """Take up messages in their order; those behind one that ended the connection are nobody's any more."""
        try:
            while messages and self._link is link:
                if isinstance(messages[0][0], wire.Segment | wire.Welcome):
                    self._drain()  # what came before speaks of the area as it was
                    if self._link is not link:
                        return
                message, fd = messages.popleft()
                self._mapper.learn(message, fd)
                self._events.append(agent.FromBroker(message))
            self._drain()
        finally:
            for _, fd in messages:
                if fd is not None:
                    os.close(fd)

    def _send(self, message: wire.Message) -> None:
        if self._link is None:
            return
        try:
            self._link.send(message)
        except QueueFull as error:
            self._lose_link(error.message)

    def _flush(self) -> None:
        link = self._link
        if link is None:
            return
        try:
            link.flush()
        except LinkClosed as error:
            self._lose_link(error.message)
            return
        events = link.poll_events(True)
        if self._selector.get_key(link).events != events:
            self._selector.modify(link, events, self._on_link)

    def _lose_link(self, why: str, *, abandon: bool = False) -> None:
        if self._link is not None:
            self._hang_up(abandon=abandon)
            self._events.append(agent.LinkDown(why))

    def _hang_up(self, *, abandon: bool = False) -> None:
        link, self._link = self._link, None
        assert link is not None
        self._selector.unregister(link)
        if abandon and isinstance(link, RingLink):
            link.abandon()
        else:
            link.close()
        self._wanted.clear()
        self._wanted_at = 0

    # ------------------------------------------------------------------------------------------------------ actions

    def _act(self, action: Action) -> None:
        match action:
            case agent.Send():
                self._send(action.message)
            case agent.SendPages():
                self._wanted.append(action)
            case agent.SendData():
                self._worker.submit(self._fetch(action))
            case agent.Connect():
                self._connect()
            case agent.Hangup():
                if self._link is not None:
                    self._hang_up()
            case agent.StartScan():
                self._on_start_scan(action)
            case agent.Rescan():
                self._touched[action.path] = None
            case agent.TakeLease():
                self._take_lease(action)
            case agent.ReleaseLease():
                self._release_lease(action.key)
            case agent.OfferToViews():
                self._take_into_view(action)
            case agent.LeaveViews():
                self._put_out_of_view(action.key)
            case agent.ShareWith(consumer=agent.VIEWS):
                assert self._views is not None
                self._views.share(action)
            case agent.UnshareWith(consumer=agent.VIEWS):
                assert self._views is not None
                self._views.unshare(action)
            case agent.ShareWith():
                self._hold_suspends(binding=True)  # before the program has anything that it could map
                try:
                    self._hub.share(action)
                except ProtocolError as error:
                    self._lose_link(error.message)
            case agent.UnshareWith():
                self._hub.unshare(action)
            case agent.CutOff():
                self._hub.cut_off(action)
            case agent.StayPlain():
                self._hub.plain(action)
            case agent.DropCache():
                self._drop(action)
            case agent.RenewCache():
                self._worker.submit(self._renew(action))
            case agent.ForgetSegments():
                self._hub.segments_gone(self._mapper.forget(action.segments))
            case agent.Log():
                fields = dict(action.fields)
                if action.event == "domain.joined":
                    self.log.about(domain=fields["domain"], pool=fields["pool"])
                if "consumer" in fields:
                    fields["consumer"] = self._hub.describe(action.fields["consumer"])  # type: ignore[arg-type]
                if "consumers" in fields:
                    fields["consumers"] = [self._hub.describe(consumer) for consumer in action.fields["consumers"]]  # type: ignore[attr-defined]
                self.log.event(action.event, **fields)

    # -------------------------------------------------------------------------------------------------------- views

    def _take_into_view(self, action: agent.OfferToViews) -> None:
        if self._views is None:
            return
        path = os.fsencode(self.config.root).rstrip(b"/") + action.path
        handle = self._views.take_in(action.key, path)
        if handle is None:
            if any(inside(path, os.fsencode(view.lower)) for view in self.config.views):
                self._for_views[action.key] = action  # until its view comes
            return
        if self._hub.hold(action.key, to_plain(self._covered, path), (agent.VIEWS, handle)):
            self._for_views[action.key] = action
            self._events.append(agent.Opened(agent.VIEWS, handle, action.key))
        else:
            self._views.put_out(action.key)

    def _put_out_of_view(self, key: FileKey) -> None:
        self._for_views.pop(key, None)
        handle = self._views.put_out(key) if self._views is not None else None
        if handle is not None:
            self._leave_view(key, handle)

    def _leave_view(self, key: FileKey, handle: agent.Handle) -> None:
        self._hub.release(key, (agent.VIEWS, handle))
        self._events.append(agent.Closed(agent.VIEWS, handle))

    def _use_views(self, views: list[MountedView]) -> None:
        """Let go of what is in other views, and take files on offer into these."""
        assert self._views is not None
        for key, handle in self._views.use(views):
            self._leave_view(key, handle)
        waiting, self._for_views = self._for_views, {}
        for action in waiting.values():
            self._take_into_view(action)

    def _on_view_question(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer `view`: views are about to be unmounted, or have been mounted."""
        covered = self._mounts.plain_there()
        if self._views is not None:
            match question.get("do"), question.get("over", False):
                case "down", bool(over):
                    self._use_views([view for view in self._views.views if over and not view.over])
                case "up", _:
                    self._use_views(mounted_views(MOUNTS.read_bytes(), self._covered))
                case _:
                    raise UsageError("view: `do` is down or up, `over` whether only views over their folder")
        return {
            "views": [path_text(view.at) for view in self._views.views] if self._views is not None else [],
            # What is scanned, and whether there are views at all, is settled when the agent starts.
            "restart": covered != self._covered
            or any(each.stale for each in covered)
            or (self._views is None and bool(self.config.views)),
        }

    def _plain_path(self, fd: int, key: FileKey) -> bytes | None:
        """Return where a file that a program has opened is plain, if it may be in a view."""
        if self._views is None:
            return None
        action = self._for_views.get(key)
        if action is not None:
            return to_plain(self._covered, os.fsencode(self.config.root).rstrip(b"/") + action.path)
        path = os.readlink(b"/proc/self/fd/%d" % fd)
        plain = to_plain(self._covered, path)
        return plain if plain != path else None

    def _on_views(self, _: int) -> None:
        assert self._views is not None
        if self._views.look() and isinstance(self._connector, RingConnector):
            self._connector.suspend_refused()
            self._hold_suspends()

    def _hold_suspends(self, *, binding: bool = False) -> None:
        """Have the view's module hold suspends back as long as something is bound or mapped that would not survive one.

        `binding`: something is about to be.
        """
        if self._views is None or not isinstance(self._connector, RingConnector):
            return
        hold = binding or self._connector.bound or self.agent.programs_share
        self._views.hold_suspend(hold)
        if not hold:
            self._connector.nothing_left()

    # ------------------------------------------------------------------------------------------------------- leases

    def _take_lease(self, action: agent.TakeLease) -> None:
        file = self._hub.files.get(action.key)
        if file is None:
            self._events.append(agent.LeaseRefused(action.key, "closed"))
            return
        try:
            native.lease_take(file.fd)
        except NativeError as error:
            self._events.append(agent.LeaseRefused(action.key, error.message))
            return
        self._leases[file.fd] = action.key
        info = os.fstat(file.fd)
        identity = FileIdentity(info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        if self._views is not None:
            self._views.asking(action.key)
        self._events.append(agent.LeaseTaken(action.key, identity))

    def _release_lease(self, key: FileKey) -> None:
        file = self._hub.files.get(key)
        if file is not None and self._leases.pop(file.fd, None) is not None:
            native.lease_release(file.fd)

    def _on_leases(self, _: int) -> None:
        fds, overflow = native.lease_watch_read(self._lease_watch)
        if overflow:
            fds = [fd for fd in self._leases if not native.lease_held(fd)]
        for fd in fds:
            key = self._leases.get(fd)
            if key is not None:
                self._events.append(agent.LeaseBroken(key))

    def _drop(self, action: agent.DropCache) -> None:
        file = self._hub.files.get(action.key)
        if file is None:
            return
        try:
            fd = os.dup(file.fd)
        except OSError:
            return  # at the limit of descriptors: the next interval tries again
        runs = array("I", native.join_runs(action.runs))
        self._to_drop.append(
            (action.key, fd, [(0, 0)] if action.whole else list(zip(runs[0::3], runs[2::3], strict=True)))
        )

    def _drop_all(self, files: list[tuple[FileKey, int, list[Run]]]) -> Then:
        """On the worker: drop ranges of files, and close their descriptors."""
        gone = 0
        read: list[tuple[FileKey, int]] = []
        for key, fd, ranges in files:
            resident = 0
            try:
                for first, count in ranges:
                    before, after = native.drop_pages(fd, first, count)
                    gone += max(0, before - after)
                    resident += before
            except NativeError:
                pass  # the next interval tries again
            finally:
                os.close(fd)
            if resident:
                read.append((key, resident))
        return partial(self._dropped, gone, tuple(read))

    def _dropped(self, pages: int, read: tuple[tuple[FileKey, int], ...]) -> None:
        self._drops -= 1
        if pages or read:
            self._events.append(agent.Dropped(pages, read))

    # --------------------------------------------------------------------------------------------- scans and pages

    def _on_start_scan(self, action: agent.StartScan) -> None:
        config = self.config
        settings = ScanSettings(
            folders=tuple(os.fsencode(folder) for folder in config.folders),
            root=os.fsencode(config.root),
            min_file_bytes=action.min_file_bytes,
            max_file_bytes=action.max_file_bytes,
            exclude=config.exclude,
            include_hints=action.include,
            exclude_hints=action.exclude,
            one_file_system=config.one_file_system,
            world_readable=config.world_readable,
            plain=tuple((each.folder, each.plain) for each in self._covered),
        )
        if self._scanner_of == (action.epoch, settings):
            return
        self._scanner_of = (action.epoch, settings)
        self._worker.submit(lambda: self._open_scanner(settings, action.epoch, action.key))
        self._start_scan()

    def _open_scanner(self, settings: ScanSettings, epoch: bytes, key: bytes) -> Then | None:
        """On the worker: look with these settings from now on, and with a cache of this epoch."""
        if self._cache is None or self._cache_epoch != epoch:
            if self._cache is not None:
                self._cache.close()
            self._cache, self._cache_epoch = FingerprintCache.open(self.config.cache, epoch), epoch
        self._scanner = Scanner(settings, key, self._cache, coarse_clock_ns)
        notes = [note for note in (self._cache.notice, self._scanner.hints_ignored) if note]
        return lambda: self._log_details("cache.noticed", notes)

    def _close_cache(self) -> None:
        """On the worker, which alone may touch the cache's database."""
        if self._cache is not None:
            self._cache.close()

    def _start_scan(self) -> None:
        for error in self._watch.check(time.monotonic()):
            self.log.event("watch.limited", detail=error.message, hint=error.hint)
        self._scanning = True
        self._rescan_at = None
        self._worker.work_through(self._full_scan())

    def _full_scan(self) -> Steps:
        """On the worker: one batch of a full scan per step."""
        scanner = self._scanner
        assert scanner is not None
        begun = time.monotonic()
        walk = scanner.walk()
        yield from self._pass(walk)
        elapsed_ns = int((time.monotonic() - begun) * 1e9)
        counters = scanner.take_counters()
        errors = self._cache.take_errors() if self._cache is not None else []
        yield lambda: self._scan_finished(walk, elapsed_ns, counters, [error.message for error in errors])

    def _pass(self, looking: Pass) -> Steps:
        epoch = self._cache_epoch
        for batch in looking:
            yield partial(self._observed, epoch, batch) if batch else None

    def _observed(self, epoch: bytes, batch: tuple[agent.Observation, ...]) -> None:
        """Hand on what was seen, unless its fingerprints are under a key that is not the pool's any more."""
        if self._scanner_of is not None and self._scanner_of[0] == epoch:
            self._events.append(agent.Observed(batch))

    def _scan_finished(self, walk: Pass, elapsed_ns: int, counters: Counters, errors: list[str]) -> None:
        seen = walk.seen
        self._full_scans += 1
        self._scanning = False
        gone = vanished(self.agent.paths(), seen)
        if gone:
            self._events.append(agent.Vanished(tuple(gone)))
        self._rescan_at = time.monotonic() + (0.0 if self._rescan_wanted else self.config.rescan_interval)
        self._rescan_wanted = False
        self._log_details("cache.failed", errors)
        # The first scan and those that found something to do: an idle agent writes no line a minute.
        if self._full_scans == 1 or counters.pages_fingerprinted or counters.errors != self._scan_errors:
            self._scan_errors = counters.errors
            self.log.event(
                "scan.finished",
                files=len(seen),
                duration_ns=elapsed_ns,
                cache_hits=counters.cache_hits,
                fingerprinted_pages=counters.pages_fingerprinted,
                read_bytes=counters.bytes_read,
                failed_files=sum(counters.errors.values()),
                **{f"failed_{kind.replace('-', '_')}_files": count for kind, count in counters.errors.items()},
            )

        left_out = {reason: (counted.files, counted.file_bytes) for reason, counted in walk.left_out.items()}
        for reason, counted in walk.left_out.items():
            if self._left_out.get(reason) != left_out[reason]:
                self.log.event(
                    "files.refused",
                    stage="scan",
                    reason=reason,
                    files=counted.files,
                    file_bytes=counted.file_bytes,
                    examples=counted.examples,
                )
        self._left_out = left_out

    def _log_details(self, event: str, details: list[str]) -> None:
        for detail in details:
            self.log.event(event, detail=detail)

    def _look_at_changes(self, now: float) -> None:
        scanner = self._scanner
        if scanner is None:
            return
        if self._rescan_at is not None and now >= self._rescan_at and not self._scanning:
            self._start_scan()
            return
        changed = self._watch.drain(now)
        if changed.rescan and self._rescan_at is not None:
            self._rescan_at = now
        elif changed.rescan:
            self._rescan_wanted = True  # a scan is under way and may have passed by what changed
        files = [path for host in changed.files if (path := scanner.reported_path(host)) is not None]
        folders = [path for host in changed.folders if (path := scanner.reported_path(host)) is not None]
        files += self._touched
        self._touched.clear()
        if files or folders:
            self._worker.work_through(self._look(files, folders))
        if now >= self._due_at:
            self._due_at = now + _DUE_S
            self._worker.work_through(self._look_again())

    def _look(self, files: list[bytes], folders: list[bytes]) -> Steps:
        """On the worker: look at what changed."""
        scanner = self._scanner
        assert scanner is not None
        look = scanner.look(files)
        yield from self._pass(look)
        if look.vanished:
            yield partial(self._events.append, agent.Vanished(tuple(look.vanished)))
        if folders:
            walk = scanner.walk(folders)
            yield from self._pass(walk)
            if walk.complete:
                yield lambda: self._folders_walked(folders, walk.seen)

    def _look_again(self) -> Steps:
        scanner = self._scanner
        if scanner is not None:
            due = scanner.due()
            if due:
                yield from self._look(due, [])

    def _folders_walked(self, folders: list[bytes], seen: set[bytes]) -> None:
        known = self.agent.paths()
        gone = {path for folder in folders for path in vanished(known, seen, folder)}
        if gone:
            self._events.append(agent.Vanished(tuple(sorted(gone))))

    def _fetch(self, action: agent.SendData) -> Job:
        link = self._link

        def job() -> Then:
            asked = min(sum(array("I", action.runs)[1::2]), wire.MAX_FETCH_PAGES)
            have, pages = bytes(asked), b""
            if self._scanner is not None:
                have, pages = self._scanner.read_for_fetch(action.path, action.key, action.identity, action.runs)
            return partial(self._fetched, link, wire.Data(action.request, have, pages))

        return job

    def _fetched(self, link: Link | None, data: wire.Data) -> None:
        """Answer a fetch on the connection that it came on: another broker's requests have the same numbers."""
        if self._link is link:
            self._send(data)

    def _pack_pages(self, wanted: list[SendPages], start: int) -> Job:
        """Pack the next message of page fingerprints: the rest of the first file and as many further ones as fit."""

        def job() -> Then:
            scanner = self._scanner
            parts, fingerprints = array("I"), bytearray()
            finished, at = 0, start
            changed: list[bytes] = []
            for want in wanted:
                total = len(want.pages) // 4 if want.pages is not None else -(-want.identity.size // wire.PAGE_SIZE)
                room = wire.MAX_REPORT_PAGES - len(fingerprints) // wire.FINGERPRINT_SIZE
                count = min(room, total - at)
                if not count:
                    break
                column = None
                if scanner is not None:
                    column = scanner.pages_for(want.key, want.identity, want.pages, want.root, at, count, want.path)
                if column is None:
                    changed.append(want.path)
                else:
                    for first, length in _runs(want.pages, at, count):
                        parts.extend((want.file, first, length))
                    fingerprints += column
                    at += count
                    if at < total:
                        break
                finished, at = finished + 1, 0
            return lambda: self._packed(
                wire.Pages(parts.tobytes(), bytes(fingerprints)), wanted[0], finished, at, changed
            )

        return job

    def _packed(self, pages: wire.Pages, begun_with: SendPages, finished: int, at: int, changed: list[bytes]) -> None:
        self._packing = False
        self._touched.update(dict.fromkeys(changed))
        if not self._wanted or self._wanted[0] is not begun_with:
            return  # the link was lost meanwhile
        for _ in range(finished):
            self._wanted.popleft()
        self._wanted_at = at
        if pages.parts:
            self._send(pages)

    def _renew(self, action: agent.RenewCache) -> Job:
        def job() -> None:
            if self._cache is not None:
                self._cache.renew(action.key, action.old, action.new)

        return job

    # ------------------------------------------------------------------------------------------------- looking in

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question.get("verb"):
            case "status":
                status = self.agent.status()
                status |= {
                    "uptime_ms": int((time.monotonic() - self._started) * 1000),
                    "pid": os.getpid(),
                    "cpu_ns": time.process_time_ns(),
                    "scans": self._full_scans,
                    "scanning": self._scanning,
                    "dropping": bool(self._drops),
                    "reporting": self.agent.reporting or bool(self._wanted),
                    "leases": len(self._leases),
                    "log_lines_dropped": self.log.dropped,
                }
                if self._views is not None:
                    status["view"] = self._views.status()
                return status
            case "view":
                return self._on_view_question(question)
            case "detach":
                path = question.get("path")
                if path is not None and not isinstance(path, str):
                    raise UsageError("detach: `path` is a text, or null for all files")
                return {"files": self._detach(path)}
            case "file":
                path = question.get("path")
                if not isinstance(path, str):
                    raise UsageError("file: `path` is a text")
                return self._file(path)
            case "reattach":
                self._events.append(agent.Reattach())
                self.log.event("files.reattached")
                return {}
            case "ps":
                return {"programs": self._programs()}
            case "drop":
                self._events.append(agent.DropNow())
                return {}
            case verb:
                raise UsageError(f"no such question: {verb!r}", "status, ps, file, detach, reattach, drop or view")

    def _programs(self) -> list[dict[str, Any]]:
        """Return the connected programs with the files that each has open, the largest part first."""
        uses = self.agent.uses()
        found = []
        for consumer, pid, uid, unchanged in self._hub.programs():
            files = [
                {"path": path_text(path), "attached_bytes": attached, "unread_bytes": unread}
                for path, attached, unread in uses.get(consumer, [])
            ]
            shared = [file for file in files if file["attached_bytes"]]
            found.append(
                {
                    "pid": pid,
                    "uid": uid,
                    "command": _command(pid),
                    "unchanged": unchanged,
                    "open_files": len(files),
                    "attached_files": len(shared),
                    "attached_bytes": sum(attached for _, attached, _ in uses.get(consumer, [])),
                    "files": shared,
                }
            )
        return sorted(found, key=lambda each: (-each["attached_bytes"], each["pid"]))

    def _file(self, path: str) -> dict[str, Any]:
        """Return how a file stands, and if it is not known, why not."""
        reported = self._reported(path)
        answer: dict[str, Any] = {"path": path, "reported_path": path_text(reported), "known": True, "left_out": ""}
        answer |= {"connected": self.agent.status()["connected"], "scanning": self._scanning}
        status = self.agent.file_status(reported)
        if status is not None:
            return answer | status
        why, resident = self._scanner.why_not(reported) if self._scanner is not None else ("no-broker", 0)
        return answer | {"known": False, "left_out": why, "resident_pages": resident}

    def _reported(self, path: str) -> bytes:
        root = os.fspath(self.config.root).rstrip("/")
        if root and not path.startswith(root + "/"):
            raise UsageError(f"{path} is not inside {self.config.root}", "give the path as this system sees it")
        return os.fsencode(path[len(root) :])

    def _detach(self, path: str | None) -> int:
        reported = None
        if path is not None:
            reported = self._reported(path)
            if not self.agent.knows(reported):
                raise UsageError(f"{path} is not a file that this agent reports", "see `sharearea-agent status`")
        files = 1 if path is not None else int(self.agent.status()["attached_files"])  # type: ignore[call-overload]
        self._events.append(agent.Detach(reported))
        self.log.event("files.detached", files=files, all=path is None)
        return files


def _command(pid: int) -> str:
    """Return the name of a process, or "" if it cannot be seen from here: it has ended, or has another /proc."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def _runs(pages: bytes | None, start: int, count: int) -> list[Run]:
    """Return (first page, count) runs of the reported pages at positions [start, start + count)."""
    return [(start, count)] if pages is None else runs_of(pages[start * 4 : (start + count) * 4])


def _memory(own: int) -> agent.Memory:
    """Return what the kernel says of the guest's memory, beside what it said of our own."""
    info: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                info[name] = int(rest.split()[0]) * 1024
    pressure = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        some = Path("/proc/pressure/memory").read_text().split("avg10=", 1)[1]
        pressure = min(10_000, round(float(some.split()[0]) * 100))
    return agent.Memory(own, info.get("MemTotal", 0), info.get("MemAvailable", 0), pressure)


def _private_bytes() -> int:
    """Return this process's private memory, as the kernel counts it."""
    total = 0
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return 0
    return total


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise HostError(f"cannot create {path}: {error.strerror}", "create it, or configure another path") from None

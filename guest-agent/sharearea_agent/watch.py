"""Tells which files in the designated folders have changed, so that they are looked at before the next full scan.

Built on watchdog (2.2.1 to 7), whose threads feed one small table: path -> when it was last touched. Events are hints
and nothing more: a lost one costs time until the next full scan and never correctness, so whatever cannot be told file
by file becomes "rescan". Reading a file is no event here, or the scanner would set itself off.

What watchdog does not tell by itself is found out here: that the kernel dropped events, that there are no inotify
watches left for some folders, that one of watchdog's threads has died. Looking at the files is scan.py's.
"""

from __future__ import annotations

import errno
import inspect
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import watchdog.events as events
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers.inotify import InotifyObserver

from .common.errors import HostError

MAX_PATHS: Final = 8192  # touched paths that are told one by one; more become a rescan
LONGEST_STORM: Final = 20  # a rescan waits at the most this many times `settle` for the events to stop
RESTART_SECONDS: Final = 60.0  # between two attempts to watch again after a failure

_QUEUE_LIMIT_FILE: Final = Path("/proc/sys/fs/inotify/max_queued_events")
_DEFAULT_QUEUE_LIMIT: Final = 16_384
# A kernel queue that overflowed had so many events in it that even at four of them to one of watchdog's, this part of
# the limit arrives here.
_EVENTS_PER_OVERFLOW: Final = 4

# A folder that nobody designates, to see whether there is a watch left.
_PROBE: Final = "/proc/self"

# Reading: watchdog 3 and newer say it, if asked for everything.
_READING: Final = frozenset({"opened", "closed_no_write"})

_WANTED: Final = tuple(
    kind
    for name in (
        "FileCreatedEvent",
        "FileDeletedEvent",
        "FileModifiedEvent",
        "FileAttribEvent",  # since watchdog 7; before, it is FileModifiedEvent
        "FileMovedEvent",
        "FileClosedEvent",
        "DirCreatedEvent",
        "DirDeletedEvent",
        "DirAttribEvent",
        "DirMovedEvent",
    )
    if (kind := getattr(events, name, None)) is not None
)


class Drained(NamedTuple):
    """What was touched and has been quiet since: host paths.

    `files` may be gone by now. Everything below `folders` needs a look: they came, went, moved or changed their mode.
    `rescan`: events were lost or too many; only a full scan tells.
    """

    files: set[bytes]
    folders: set[bytes]
    rescan: bool


class _Handler(FileSystemEventHandler):
    """Hands every event on; watchdog's own dispatch by type is not needed."""

    def __init__(self, take: Callable[[FileSystemEvent], None]) -> None:
        self._take = take

    def dispatch(self, event: FileSystemEvent) -> None:
        self._take(event)


class FolderWatch:
    """Watches folders with all that is in them. Thread-safe, but for start, check and close, which one thread calls.

    `wake` is called, in a thread of watchdog's, when there is something to drain after there was nothing; it must not
    block or raise. `settle`: seconds without another event until a path is told. Times are `clock`'s.
    """

    def __init__(
        self,
        folders: Iterable[bytes],
        *,
        settle: float,
        wake: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_paths: int = MAX_PATHS,
        queue_limit: int | None = None,
    ) -> None:
        self._folders = tuple(folders)
        self._settle = settle
        self._wake = wake
        self._clock = clock
        self._max_paths = max_paths
        self._many = max(1, (queue_limit or _queue_limit()) // _EVENTS_PER_OVERFLOW)
        self._lock = threading.Lock()
        self._files: dict[bytes, float] = {}
        self._touched_folders: dict[bytes, float] = {}
        self._arrived = 0  # events since the last rescan was told
        self._last_event = 0.0
        self._rescan_since: float | None = None
        self._observer: Any = None
        self._threads: tuple[threading.Thread, ...] = ()
        self._retry_at: float | None = None
        self._unwatched: tuple[bytes, ...] = ()
        self._unwatchable = False  # no watches are left in the kernel
        self._told: set[str] = set()

    # --------------------------------------------------------------------------------------------- start and health

    def start(self) -> list[HostError]:
        """Begin to watch; return what is not watched, and why. The periodic full scan covers that."""
        # Version 7 says so when a folder that was made a moment ago is met twice. It is, with mkdir -p, and harmless.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        before = set(threading.enumerate())
        try:
            observer: Any = InotifyObserver()
        except OSError as error:
            self._retry_at = self._clock() + RESTART_SECONDS
            return self._new([_no_instance(error)])
        self._hear_of_losses(observer)
        observer.start()
        self._observer = observer
        self._unwatched = self._folders
        errors = self._watch_rest(before)
        if not errors and (full := self._probe()) is not None:
            errors.append(full)
        return self._new(errors)

    def _watch_rest(self, before: Set[threading.Thread]) -> list[HostError]:
        """Watch the folders that are not; note the threads that were not there before."""
        errors: list[HostError] = []
        unwatched: list[bytes] = []
        for folder in self._unwatched:
            error = None if self._unwatchable else self._schedule(folder)
            if error is not None:
                errors.append(error)
            if error is not None or self._unwatchable:
                unwatched.append(folder)
        self._unwatched = tuple(unwatched)
        self._retry_at = self._clock() + RESTART_SECONDS if unwatched and not self._unwatchable else None
        # None of them ends by itself while everything is well.
        self._threads += tuple(
            thread
            for thread in threading.enumerate()
            if thread not in before and type(thread).__module__.startswith("watchdog.")
        )
        return errors

    def _new(self, errors: list[HostError]) -> list[HostError]:
        """Leave out what was told before."""
        fresh = [error for error in errors if error.message not in self._told]
        self._told = {error.message for error in errors}
        return fresh

    def _schedule(self, folder: bytes) -> HostError | None:
        path = os.fsdecode(folder)
        filters: dict[str, Any] = {}
        # Without a filter (before watchdog 4) version 3 asks the kernel for reads, too; they are passed over in _take.
        if "event_filter" in inspect.signature(self._observer.schedule).parameters:
            filters["event_filter"] = list(_WANTED)
        for _ in range(3):
            # Before version 7 a folder that cannot be watched costs a descriptor for good, so it is not tried.
            if not os.path.isdir(path):
                break
            try:
                self._observer.schedule(_Handler(self._take), path, recursive=True, **filters)
            except FileNotFoundError:
                continue  # before version 7 any folder below that goes away meanwhile ends the whole walk
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    self._unwatchable = True  # and another attempt would make it worse
                    return _no_watches()
                if error.errno == errno.EMFILE:
                    return _no_instance(error)
                return _not_watched(path, error.strerror or str(error))
            else:
                return None
        return _not_watched(path, "there is no such folder, or it changes all the time")

    def _hear_of_losses(self, observer: Any) -> None:
        """Have lost events told: version 7 throws away what is under way then, so counting alone would not show it."""
        reader: Any = getattr(observer, "_inotify_fd", None)
        handle = getattr(reader, "handle_event", None)
        if handle is None:
            return

        def handle_and_tell(event: Any) -> None:
            if getattr(event, "is_queue_overflow", False):
                self._ask_rescan()
            try:
                handle(event)
            except Exception:
                # A race with the folders that it keeps book of. It costs this event, and must not cost the thread.
                self._ask_rescan()

        reader.handle_event = handle_and_tell

    def _probe(self) -> HostError | None:
        """Say whether the kernel has no watch left: version 7 keeps quiet about folders that it could not watch."""
        try:
            watch = self._observer.schedule(_Handler(lambda _: None), _PROBE, recursive=False)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._unwatchable = True
                return _no_watches()
            return None  # no /proc here, or the like: nothing learnt
        self._observer.unschedule(watch)
        return None

    def check(self, now: float) -> list[HostError]:
        """See whether everything is still watched, and watch again if not; call it before each full scan.

        Returns what is new. A folder that was missing is tried again, once a minute at the most.
        """
        waiting = self._retry_at is not None and now < self._retry_at
        if self._observer is None or not all(thread.is_alive() for thread in self._threads):
            if waiting or self._unwatchable:
                return []
            self._stop()
            errors = self.start()
            self._ask_rescan()
            return errors
        if waiting or self._unwatchable:
            return []
        if not self._unwatched:
            full = self._probe()
            return self._new([full] if full is not None else [])
        before = len(self._unwatched)
        errors = self._watch_rest(set(threading.enumerate()))
        if len(self._unwatched) < before:
            self._ask_rescan()
        return self._new(errors)

    def _stop(self) -> None:
        observer, self._observer, self._threads = self._observer, None, ()
        if observer is None:
            return
        observer.stop()
        observer.join()

    def close(self) -> None:
        """Stop watching and wait for watchdog's threads to end."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- events

    def _take(self, event: FileSystemEvent) -> None:
        """Note what an event touches. Runs in a thread of watchdog's."""
        kind = event.event_type
        if kind in _READING:
            return
        # A folder's "modified" is an entry that came or went, which has its own event; before version 7 also its mode,
        # which a full scan finds.
        if event.is_directory and kind == "modified":
            return
        paths = [os.fsencode(path) for path in (event.src_path, getattr(event, "dest_path", "")) if path]
        now = self._clock()
        with self._lock:
            was_empty = self._is_empty()
            self._last_event = now
            self._arrived += 1
            table = self._touched_folders if event.is_directory else self._files
            for path in paths:
                table[path] = now
            if self._arrived >= self._many or len(self._files) + len(self._touched_folders) > self._max_paths:
                self._collapse(now)
        if was_empty and self._wake is not None:
            self._wake()

    def _is_empty(self) -> bool:
        return not self._files and not self._touched_folders and self._rescan_since is None

    def _collapse(self, now: float) -> None:
        """Give up telling single paths: a rescan finds them all."""
        self._files.clear()
        self._touched_folders.clear()
        self._arrived = 0
        if self._rescan_since is None:
            self._rescan_since = now

    def _ask_rescan(self) -> None:
        now = self._clock()
        with self._lock:
            was_empty = self._is_empty()
            self._collapse(now)
        if was_empty and self._wake is not None:
            self._wake()

    def drain(self, now: float) -> Drained:
        """Take out what has been quiet for `settle` seconds at time `now`.

        A rescan is told when all has been quiet for so long, or after 20 times as long.
        """
        with self._lock:
            files = {path for path, touched in self._files.items() if now - touched >= self._settle}
            folders = {path for path, touched in self._touched_folders.items() if now - touched >= self._settle}
            for path in files:
                del self._files[path]
            for path in folders:
                del self._touched_folders[path]
            rescan = self._rescan_since is not None and (
                now - max(self._last_event, self._rescan_since) >= self._settle
                or now - self._rescan_since >= LONGEST_STORM * self._settle
            )
            if rescan:
                self._rescan_since = None
            return Drained(files, folders, rescan)

    @property
    def pending(self) -> bool:
        """Whether there is anything that drain would tell now or later."""
        with self._lock:
            return not self._is_empty()


def _queue_limit() -> int:
    try:
        return int(_QUEUE_LIMIT_FILE.read_text())
    except (OSError, ValueError):
        return _DEFAULT_QUEUE_LIMIT


def _no_watches() -> HostError:
    return HostError(
        "not all folders are watched: the kernel's limit on inotify watches is reached",
        "raise fs.inotify.max_user_watches and start again; until then changes are found by full scans",
    )


def _not_watched(path: str, why: str) -> HostError:
    return HostError(f"{path} is not watched: {why}", "its files are found by full scans only")


def _no_instance(error: OSError) -> HostError:
    return HostError(
        f"no folder is watched: {error.strerror or error}",
        "raise fs.inotify.max_user_instances; until then changes are found by full scans",
    )

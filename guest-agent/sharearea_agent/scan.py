"""The scanner: which pages of which files the guest has cached, and their fingerprints.

Plain methods that one worker thread calls; it owns the scanner and its cache. A walk or a look hands out what it found
in small batches and can be left at any file or chunk, so that the thread can answer the broker in between. Reading goes
through the native core, which touches resident pages only: looking at a guest does not fill its page cache.

Every name is resolved one component at a time below the root, and no symbolic link is followed: whoever may write to a
designated folder cannot lead the agent, which may be root, to a file elsewhere, nor past a folder that others may not
search. What is reported are files that everybody may read, by the mode bits of the file and of every folder from the
root down to it (`world_readable`; a setting where handles are given page by page). Paths are bytes throughout.

Which pages are reported of a file that is not wholly resident: all that were seen resident under this identity, now or
earlier, as long as one of them is. What is resident changes by itself and a content does not; so a file that is used
more and more becomes known by its root without being read twice, and one that is evicted bit by bit is not reported
again and again. One of which nothing is resident is reported too where its content is proven (cache.py), as a question:
what the area has of it need not be read from the disk.

When files are scanned, what is told to the broker and which files share is agent.py's and the runner's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from .agent import FileIdentity, FileKey, Observation
from .cache import CacheEntry, FingerprintCache, trusted_from_ns
from .common import native
from .common.elf import page_classes
from .common.errors import NativeError
from .common.events import MAX_EXAMPLES, path_text
from .common.globs import GlobError, Outcome, PathFilter
from .common.wire import FINGERPRINT_SIZE, MAX_FETCH_PAGES, MAX_FILE_PAGES, MAX_PATH, NO_CLASSES, PAGE_SIZE

CHUNK_PAGES: Final = 4096  # 16 MiB between two looks at whether to go on
BATCH_FILES: Final = 64
BATCH_BYTES: Final = 256 << 20  # fingerprinted
BATCH_SECONDS: Final = 0.05
MAX_DEPTH: Final = 128  # folders below a designated one; each level costs a descriptor
MAX_AGAIN: Final = 4096  # files to look at again soon; the next full scan looks at all
# Until a file that changed while it was read, or could not be opened just then, is looked at again.
AGAIN_NS: Final = 1_000_000_000

_FILE_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASSING_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# What an error of a file is counted as; anything else is "io".
_KINDS: Final = {
    errno.EACCES: "permission",
    errno.EPERM: "permission",
    errno.ELOOP: "symlink",
    errno.ENOTDIR: "symlink",  # O_DIRECTORY | O_NOFOLLOW on a link to a folder
    errno.ENAMETOOLONG: "path-too-long",
    errno.EMFILE: "descriptors",
    errno.ENFILE: "descriptors",
    errno.EAGAIN: "busy",  # somebody holds a write lease
    errno.ENXIO: "special",  # became a fifo or device between look and open
}

# The kernel has no cachestat, or it does not answer for this file or for us: resident_runs knows other ways.
_NO_CACHESTAT: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})

_PRESENT: Final = re.compile(rb"[^\0]+", re.DOTALL)  # in a column of page states: everything but PAGE_ABSENT

Run = tuple[int, int]
"""(first page, count)."""


# --------------------------------------------------------------------------------------------- pages, runs, prefixes


def expand(runs: Iterable[Run]) -> bytes:
    """Return the packed page numbers of runs."""
    pages = array("I")
    for first, count in runs:
        pages.extend(range(first, first + count))
    return pages.tobytes()


def unpack_runs(packed: bytes) -> list[Run]:
    """Return packed pairs (first, count) as a list."""
    numbers = array("I", packed)
    return list(zip(numbers[0::2], numbers[1::2], strict=True))


def pack_runs(runs: Iterable[Run]) -> bytes:
    """Return runs as packed pairs (first, count)."""
    return array("I", [number for run in runs for number in run]).tobytes()


def runs_of(pages: bytes) -> list[Run]:
    """Return the maximal runs of packed, ascending page numbers. Costs a search per run, nothing per page."""
    numbers = array("I", pages)
    runs: list[Run] = []
    at = 0
    while at < len(numbers):
        # Inside a run numbers[i] - i stays the same, and it never falls.
        end = bisect_right(range(len(numbers)), numbers[at] - at, lo=at, key=lambda i: numbers[i] - i)
        runs.append((numbers[at], end - at))
        at = end
    return runs


def subtract(runs: list[Run], known: list[Run]) -> list[Run]:
    """Return the pages of `runs` that are not in `known`; both ascending and disjoint."""
    left: list[Run] = []
    at = 0
    for first, count in runs:
        end = first + count
        while at < len(known) and known[at][0] + known[at][1] <= first:
            at += 1
        here = at
        while first < end:
            if here == len(known) or known[here][0] >= end:
                left.append((first, end - first))
                break
            known_first, known_count = known[here]
            if known_first > first:
                left.append((first, known_first - first))
            first = known_first + known_count
            here += 1
    return left


def vanished(known: Iterable[bytes], seen: Set[bytes], under: bytes | None = None) -> list[bytes]:
    """Return the known paths, below the folder `under` if there is one, that a complete walk of it has not seen."""
    if under is None:
        return [path for path in known if path not in seen]
    inside = under.rstrip(b"/") + b"/"
    return [path for path in known if path.startswith(inside) and path not in seen]


# ------------------------------------------------------------------------------------------------------- the scanner


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanSettings:
    """What may be reported. `root` and `folders` are host paths, the folders inside the root; globs mean reported ones.

    `exclude` is the guest's own list and is always obeyed. `include_hints`, `exclude_hints` are what the broker's
    policy would accept; the broker decides in any case, so a glob there that is none costs the hints, not the scan.
    `plain`: folders (host paths) that guest views cover, each with where its plain files are. None lies inside a
    designated folder, unless it is that folder itself.
    """

    folders: tuple[bytes, ...]
    root: bytes = b"/"
    min_file_bytes: int = 1
    max_file_bytes: int = MAX_FILE_PAGES * PAGE_SIZE
    exclude: tuple[str, ...] = ()
    include_hints: tuple[str, ...] = ("**",)
    exclude_hints: tuple[str, ...] = ()
    one_file_system: bool = True
    world_readable: bool = True
    plain: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(slots=True)
class Counters:
    """What the scanner did, since the last take_counters. `errors`: files that could not be looked at, by kind."""

    files: int = 0
    cache_hits: int = 0
    pages_fingerprinted: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


class _NotHere(Exception):
    """There is no file at this path that could be reported. `reason`: why a file that is there is left out."""

    def __init__(self, reason: str = "", size: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.size = size


@dataclass(slots=True)
class LeftOut:
    """Files that are there and not reported, for one reason: how many, their sizes added up, a few paths."""

    files: int = 0
    file_bytes: int = 0
    examples: list[str] = field(default_factory=list)


class _Changing(Exception):
    """The file is there and cannot be read now."""


_Steps = Generator[None, None, Observation | None]
Batches = Generator[tuple[Observation, ...], None, None]


class Pass:
    """One walk or look: iterate for batches of observations, which may be empty, and leave off whenever you like.

    Once the iterator has ended by itself, `complete` is true. `seen`: paths of the files that are there, observed or
    not (one that changes while it is read is there). `vanished`: of a look, the paths that are no file to report.
    """

    def __init__(self, batches: Callable[[Pass], Batches]) -> None:
        self.complete = False
        self.seen: set[bytes] = set()
        self.vanished: list[bytes] = []
        self.left_out: dict[str, LeftOut] = {}
        """By reason: SCAN_REFUSALS of common/events.py. What lies in a folder that is not walked is not counted."""
        self._batches = batches(self)

    def leave_out(self, path: bytes, reason: str, size: int) -> None:
        """Count a file that is not reported."""
        counted = self.left_out.setdefault(reason, LeftOut())
        counted.files += 1
        counted.file_bytes += size
        if len(counted.examples) < MAX_EXAMPLES:
            counted.examples.append(path_text(path))

    def __iter__(self) -> Iterator[tuple[Observation, ...]]:
        return self._batches

    def close(self) -> None:
        """Leave off: close what is open. Called by itself when nothing holds the pass any more."""
        self._batches.close()


class Scanner:
    """Looks at files under one key. Not thread-safe: it belongs to the thread that owns `cache`."""

    def __init__(
        self,
        settings: ScanSettings,
        key: bytes,
        cache: FingerprintCache,
        clock_ns: Callable[[], int],
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock_ns`: cache.coarse_clock_ns, or what replaces it in both. `timer`: seconds, for pacing only."""
        self.settings = settings
        self.cache = cache
        self.counters = Counters()
        self.hints_ignored: str | None = None
        """Why the broker's globs are not used; None if they are."""
        self._key = key
        self._clock_ns = clock_ns
        self._timer = timer
        self._root = settings.root.rstrip(b"/")
        self._smallest = max(1, settings.min_file_bytes)
        self._largest = min(settings.max_file_bytes, MAX_FILE_PAGES * PAGE_SIZE)
        self._folders = tuple(self._below_root(folder) for folder in settings.folders)
        self._plain = {self._below_root(folder): plain for folder, plain in settings.plain}
        try:
            self._filter = PathFilter(settings.include_hints, settings.exclude_hints + settings.exclude)
        except GlobError as error:
            self.hints_ignored = str(error)
            self._filter = PathFilter(("**",), settings.exclude)
        self._again: dict[bytes, int] = {}

    def take_counters(self) -> Counters:
        """Return the counters and begin new ones."""
        counters, self.counters = self.counters, Counters()
        return counters

    def _count_error(self, kind: str) -> None:
        self.counters.errors[kind] = self.counters.errors.get(kind, 0) + 1

    # --------------------------------------------------------------------------------------------------------- paths

    def _below_root(self, folder: bytes) -> bytes:
        """Return a folder's reported path, without a slash at the end: b"" is the root itself."""
        path = folder.rstrip(b"/")
        if path != self._root and not path.startswith(self._root + b"/"):
            raise ValueError(f"the folder {folder!r} is not inside the root {self.settings.root!r}")
        return path[len(self._root) :]

    def host_path(self, reported: bytes) -> bytes:
        """Return where a reported path is on the host."""
        return self._root + reported

    def reported_path(self, host: bytes) -> bytes | None:
        """Return what a path on the host is reported as; None if it is outside the root."""
        for folder, plain in self._plain.items():
            if host == plain or host.startswith(plain + b"/"):
                return folder + host[len(plain) :]
        return host[len(self._root) :] if host.startswith(self._root + b"/") else None

    def _folder_of(self, path: bytes) -> bytes | None:
        """Return the designated folder that a reported path is in."""
        for folder in self._folders:
            if path.startswith(folder + b"/"):
                return folder
        return None

    def _open(self, name: bytes, flags: int, at: int | None) -> int:
        try:
            return os.open(name, flags | os.O_NOATIME, dir_fd=at)
        except PermissionError:
            # O_NOATIME is for the owner and CAP_FOWNER; whether it was that, the second try shows.
            return os.open(name, flags, dir_fd=at)

    def _check_folder(self, fd: int, device: int | None) -> os.stat_result:
        status = os.fstat(fd)
        if self.settings.world_readable and not status.st_mode & 0o001:
            raise _NotHere
        if device is not None and self.settings.one_file_system and status.st_dev != device:
            raise _NotHere
        return status

    def _open_folder(self, path: bytes, last_flags: int) -> tuple[int, int | None]:
        """Open a folder by its reported path, with the device of the designated folder it is in, None outside of those.

        Raises _NotHere where others may not search it, or it is on another file system.
        """
        here = b""
        fd = os.open(self._plain.get(here, self._root or b"/"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        device: int | None = None
        try:
            names = [name for name in path.split(b"/") if name]
            if b".." in names or b"." in names:
                raise _NotHere
            status = self._check_folder(fd, None)
            if here in self._folders:
                device = status.st_dev
            for at, name in enumerate(names):
                here += b"/" + name
                last = at == len(names) - 1
                # An absolute path leads away from fd.
                name = self._plain.get(here, name)
                if last and last_flags != _PASSING_FLAGS:
                    deeper = self._open(name, last_flags, fd)
                else:
                    deeper = os.open(name, _PASSING_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = deeper
                status = self._check_folder(fd, device)
                if device is None and here in self._folders:
                    device = status.st_dev
            if not names and last_flags != _PASSING_FLAGS:
                deeper = self._open(b".", last_flags, fd)
                os.close(fd)
                fd = deeper
        except BaseException:
            os.close(fd)
            raise
        return fd, device

    def _check_file(self, status: os.stat_result, device: int | None) -> None:
        """Raise _NotHere unless a file with this status may be reported."""
        if not stat.S_ISREG(status.st_mode) or self.cache.is_own(FileKey(status.st_dev, status.st_ino)):
            raise _NotHere
        if status.st_size < self._smallest:
            # A file without a page is nothing that could be shared.
            raise _NotHere("too-small" if status.st_size else "", status.st_size)
        if status.st_size > self._largest:
            raise _NotHere("too-large", status.st_size)
        if self.settings.world_readable and not status.st_mode & 0o004:
            raise _NotHere("not-world-readable", status.st_size)
        if self.settings.one_file_system and device is not None and status.st_dev != device:
            raise _NotHere("other-file-system", status.st_size)

    def _open_file(self, name: bytes, at: int, device: int | None) -> tuple[int, os.stat_result]:
        """Open a file that may be reported. Raises _NotHere."""
        # Before opening: a device may do something when it is opened, and a small file is not worth it.
        self._check_file(os.stat(name, dir_fd=at, follow_symlinks=False), device)
        fd = self._open(name, _FILE_FLAGS, at)
        try:
            status = os.fstat(fd)
            self._check_file(status, device)
        except BaseException:
            os.close(fd)
            raise
        return fd, status

    def _open_path(self, path: bytes) -> tuple[int, os.stat_result]:
        """Open a file by its reported path. Raises _NotHere and OSError."""
        folder, _, name = path.rpartition(b"/")
        if self._folder_of(path) is None or len(path) > MAX_PATH or name in (b"", b".", b".."):
            raise _NotHere
        if self._filter.decide(path)[0] is not Outcome.PASS:
            raise _NotHere
        at, device = self._open_folder(folder, _PASSING_FLAGS)
        try:
            return self._open_file(name, at, device)
        finally:
            os.close(at)

    def why_not(self, path: bytes) -> tuple[str, int]:
        """Return why a file (reported path) is not reported, as a reason code, and its resident pages.

        "" if it is, or will be. Quick: it asks the kernel about one file. Any thread may ask.
        """
        if self._folder_of(path) is None:
            return "not-designated", 0
        rules = PathFilter(self.settings.include_hints, self.settings.exclude_hints + self.settings.exclude)
        outcome = rules.decide(path)[0] if self.hints_ignored is None else Outcome.PASS
        if outcome is not Outcome.PASS:
            return ("excluded" if outcome is Outcome.EXCLUDED else "not-included"), 0
        folder, _, name = path.rpartition(b"/")
        try:
            at, device = self._open_folder(folder, _PASSING_FLAGS)
            try:
                fd, status = self._open_file(name, at, device)
            finally:
                os.close(at)
        except _NotHere as why:
            return why.reason or "special", 0
        except FileNotFoundError:
            return "deleted", 0
        except OSError:
            return "unreadable", 0
        try:
            resident = sum(array("I", native.resident_runs(fd, -(-status.st_size // PAGE_SIZE)))[1::2])
        finally:
            os.close(fd)
        return ("" if resident else "not-resident"), resident

    # ------------------------------------------------------------------------------------------------------- walking

    def walk(self, under: Iterable[bytes] | None = None) -> Pass:
        """Walk the designated folders, or only these folders in them (reported paths), and observe every file.

        A complete walk of everything drops what the cache has of other files.
        """
        folders = self._folders if under is None else tuple(folder.rstrip(b"/") for folder in under)
        return Pass(lambda walk: self._walk(walk, folders, prune=under is None))

    def look(self, paths: Iterable[bytes]) -> Pass:
        """Look at some files (reported paths). Folders among them count as vanished files."""
        return Pass(lambda look: self._look(look, tuple(paths)))

    def due(self) -> list[bytes]:
        """Return the paths that it is time to look at again, and forget them.

        Those are files that were too young to be trusted (cache.py), changed while they were read, or were busy.
        """
        now = self._clock_ns()
        paths = [path for path, due in self._again.items() if due <= now]
        for path in paths:
            del self._again[path]
        return paths

    @property
    def next_due_ns(self) -> int | None:
        """When there will be something due, by the scanner's clock."""
        return min(self._again.values(), default=None)

    def _look_again(self, path: bytes, due_ns: int) -> None:
        if path in self._again or len(self._again) < MAX_AGAIN:
            self._again[path] = due_ns

    def _walk(self, walk: Pass, folders: tuple[bytes, ...], *, prune: bool) -> Batches:
        if prune:
            self.cache.begin_scan()
        try:
            yield from self._paced(self._walk_folders(walk, folders))
            walk.complete = True
        finally:
            if prune and walk.complete:
                self.cache.prune()
            elif prune:
                self.cache.abandon_scan()
            self.cache.flush()

    def _look(self, look: Pass, paths: tuple[bytes, ...]) -> Batches:
        try:
            yield from self._paced(self._look_at_paths(look, paths))
            look.complete = True
        finally:
            self.cache.flush()

    def _paced(self, steps: Iterator[Observation | None]) -> Iterator[tuple[Observation, ...]]:
        """Collect observations into batches. None among the steps: a good moment to stop at."""
        batch: list[Observation] = []
        began = self._timer()
        read = self.counters.bytes_read
        for seen in steps:
            if seen is not None:
                batch.append(seen)
            now = self._timer()
            if (
                len(batch) >= BATCH_FILES
                or now - began >= BATCH_SECONDS
                or self.counters.bytes_read - read >= BATCH_BYTES
            ):
                self.counters.seconds += now - began
                yield tuple(batch)
                batch.clear()
                began = self._timer()
                read = self.counters.bytes_read
        self.counters.seconds += self._timer() - began
        if batch:
            yield tuple(batch)

    def _walk_folders(self, walk: Pass, folders: tuple[bytes, ...]) -> Iterator[Observation | None]:
        for folder in folders:
            if folder not in self._folders and self._folder_of(folder) is None:
                continue
            try:
                fd, device = self._open_folder(folder, _FOLDER_FLAGS)
            except _NotHere:
                self._count_error("folder")
                continue
            except FileNotFoundError:
                self._count_error("no-folder")
                continue
            except OSError as error:
                self._count_error(_KINDS.get(error.errno or 0, "io"))
                continue
            yield from self._walk_below(walk, folder, fd, device)

    def _walk_below(self, walk: Pass, top: bytes, fd: int, device: int | None) -> Iterator[Observation | None]:
        """Walk a folder, depth first, with one open descriptor per level. Closes fd."""
        stack: list[tuple[bytes, int, list[bytes]]] = []
        try:
            subfolders: list[bytes] = []
            stack.append((top, fd, subfolders))
            yield from self._walk_files(walk, top, fd, device, subfolders)
            while stack:
                here, at, names = stack[-1]
                if not names:
                    stack.pop()
                    os.close(at)
                    continue
                name = names.pop()
                path = here + b"/" + name
                if len(stack) >= MAX_DEPTH or len(path) >= MAX_PATH:
                    self._count_error("too-deep")
                    continue
                try:
                    deeper = self._open(name, _FOLDER_FLAGS, at)
                except FileNotFoundError:
                    continue  # removed meanwhile
                except OSError as error:
                    self._count_error(_KINDS.get(error.errno or 0, "io"))
                    continue
                stack.append((path, deeper, subfolders := []))
                try:
                    self._check_folder(deeper, device)
                except _NotHere:
                    continue
                yield from self._walk_files(walk, path, deeper, device, subfolders)
                yield None
        finally:
            for _, at, _ in stack:
                os.close(at)

    def _walk_files(
        self, walk: Pass, folder: bytes, fd: int, device: int | None, ret_subfolders: list[bytes]
    ) -> Iterator[Observation | None]:
        """Observe the files of one open folder; its folders go to ret_subfolders."""
        try:
            entries = os.scandir(fd)
        except OSError as error:
            self._count_error(_KINDS.get(error.errno or 0, "io"))
            return
        with entries:
            while True:
                try:
                    entry = next(entries, None)
                    if entry is None:
                        return
                    is_folder = entry.is_dir(follow_symlinks=False)
                    is_file = not is_folder and entry.is_file(follow_symlinks=False)
                except OSError as error:
                    self._count_error(_KINDS.get(error.errno or 0, "io"))
                    return
                name = os.fsencode(entry.name)
                if is_folder:
                    ret_subfolders.append(name)
                if not is_file:
                    continue
                path = folder + b"/" + name
                if len(path) > MAX_PATH:
                    self._count_error("path-too-long")
                    continue
                outcome, _ = self._filter.decide(path)
                if outcome is Outcome.PASS:
                    yield from self._file(walk, path, partial(self._open_file, name, fd, device))
                    continue
                with contextlib.suppress(OSError):
                    size = entry.stat(follow_symlinks=False).st_size
                    walk.leave_out(path, "excluded" if outcome is Outcome.EXCLUDED else "not-included", size)

    def _look_at_paths(self, look: Pass, paths: tuple[bytes, ...]) -> Iterator[Observation | None]:
        for path in paths:
            yield from self._file(look, path, partial(self._open_path, path))
            if path not in look.seen:
                look.vanished.append(path)

    def _file(
        self, found: Pass, path: bytes, opened: Callable[[], tuple[int, os.stat_result]]
    ) -> Iterator[Observation | None]:
        """Observe one file: steps without an observation, then at the most one."""
        try:
            fd, status = opened()
        except _NotHere as what:
            if what.reason:
                found.leave_out(path, what.reason, what.size)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            self._count_error(_KINDS.get(error.errno or 0, "io"))
            if error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EIO):
                found.seen.add(path)  # it is there
                self._look_again(path, self._clock_ns() + AGAIN_NS)
            return
        found.seen.add(path)
        try:
            yield (yield from self._observe(path, fd, status))
        except _Changing:
            self._count_error("changed")
            self._look_again(path, self._clock_ns() + AGAIN_NS)
        except OSError as error:
            self._count_error(_KINDS.get(error.errno or 0, "io"))
        except NativeError as error:
            self._count_error("residency" if error.errno == errno.EPERM else "io")
        finally:
            os.close(fd)

    # ------------------------------------------------------------------------------------------------------ one file

    def _observe(self, path: bytes, fd: int, status: os.stat_result) -> _Steps:
        """Say which pages of an open file are resident and have them fingerprinted. Raises _Changing."""
        self.counters.files += 1
        key = FileKey(status.st_dev, status.st_ino)
        identity = FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        page_count = -(-identity.size // PAGE_SIZE)
        entry = self.cache.get(key, identity)
        if entry is not None and entry.root is not None:
            any_resident = self._any_resident(fd, page_count)
            if not any_resident and not entry.proven:
                return Observation(path, key, identity, None, b"", 0, 0)
            self.counters.cache_hits += 1
            self._note_untrusted(path, identity, entry)
            return _observation(path, key, identity, entry, resident=any_resident)
        resident = unpack_runs(native.resident_runs(fd, page_count))
        if not resident:
            return Observation(path, key, identity, None, b"", 0, 0)
        known = unpack_runs(entry.runs) if entry is not None and entry.runs is not None else []
        missing = subtract(resident, known)
        if entry is not None and not missing:
            self.counters.cache_hits += 1
            self._note_untrusted(path, identity, entry)
            return _observation(path, key, identity, entry)
        if entry is not None and not entry.trusted:
            # What was read too early is not to be taken for trusted with the rest.
            entry, known, missing = None, [], resident
        return (yield from self._read(path, fd, key, identity, entry, known, missing))

    def _note_untrusted(self, path: bytes, identity: FileIdentity, entry: CacheEntry) -> None:
        if not entry.trusted:
            due = trusted_from_ns(identity, self._clock_ns())
            if due is not None:
                self._look_again(path, due)

    def _any_resident(self, fd: int, page_count: int) -> bool:
        try:
            return native.cachestat(fd, 0, page_count)[0] > 0
        except NativeError as error:
            if error.errno not in _NO_CACHESTAT:
                raise
        return bool(native.resident_runs(fd, page_count))

    def _read(
        self,
        path: bytes,
        fd: int,
        key: FileKey,
        identity: FileIdentity,
        entry: CacheEntry | None,
        known: list[Run],
        missing: list[Run],
    ) -> _Steps:
        """Fingerprint runs of a file and keep them, with those that are known of it. Raises _Changing."""
        began = self._clock_ns()
        quiet = native.file_is_quiet(fd) and (entry is None or entry.quiet)
        zero_pages = 0
        # (first, count, fingerprints), later ascending
        parts: list[tuple[int, int, bytes | memoryview]] = []
        for first, count in missing:
            for at in range(first, first + count, CHUNK_PAGES):
                n = min(CHUNK_PAGES, first + count - at)
                fingerprints, states = native.fingerprint_file(fd, self._key, identity.size, at, n)
                present = n - states.count(native.PAGE_ABSENT)
                zero_pages += states.count(native.PAGE_ZERO)
                self.counters.pages_fingerprinted += present
                self.counters.bytes_read += present * PAGE_SIZE
                if present == n:
                    parts.append((at, n, fingerprints))
                else:
                    view = memoryview(fingerprints)
                    for run in _PRESENT.finditer(states):
                        begin, end = run.span()
                        parts.append((at + begin, end - begin, view[begin * FINGERPRINT_SIZE : end * FINGERPRINT_SIZE]))
                if n == CHUNK_PAGES:
                    yield None
        if _key_and_identity(os.fstat(fd)) != (key, identity):
            raise _Changing
        if entry is not None:
            column = self.cache.column(key, identity)
            if column is None or len(column) != entry.page_count * FINGERPRINT_SIZE:
                raise _Changing  # the cache lost it meanwhile: once more, without
            zero_pages += entry.zero_pages
            at = 0
            for first, count in known:
                parts.append((first, count, memoryview(column)[at : at + count * FINGERPRINT_SIZE]))
                at += count * FINGERPRINT_SIZE
        if not parts:
            return Observation(path, key, identity, None, b"", 0, 0)  # evicted before it was read
        classes = entry.classes if entry is not None else NO_CLASSES
        if classes == NO_CLASSES:
            classes = self._page_classes(fd, identity.size)
        fresh, fingerprints = _assemble(parts, identity.size, zero_pages, classes, quiet=quiet)
        due = self.cache.put(key, identity, fresh, fingerprints, began)
        if due is not None:
            self._look_again(path, due)
        return _observation(path, key, identity, self.cache.with_proof(key, replace(fresh, trusted=due is None)))

    def _page_classes(self, fd: int, size: int) -> bytes:
        """Look at the head of a file, if that is resident."""
        head, _, states = native.read_pages(fd, self._key, size, 0, 1)
        if native.PAGE_ABSENT in states:
            return NO_CLASSES
        return page_classes(bytes(head), -(-size // PAGE_SIZE))

    # -------------------------------------------------------------------------------------------- what is asked for

    def read_for_fetch(
        self, path: bytes | None, key: FileKey | None, identity: FileIdentity | None, runs: bytes
    ) -> tuple[bytes, bytes]:
        """Read pages that the broker asks for: runs are packed pairs (first page, count).

        Returns the columns of wire.Data: one byte per page asked for, 1 where the page follows in the second column. A
        page is 0 if it is not resident, or its bytes have not the fingerprint that was reported; all are if the file is
        not what was reported, or anything fails. Pages past MAX_FETCH_PAGES are left out.
        """
        wanted: list[Run] = []
        room = MAX_FETCH_PAGES
        for first, count in unpack_runs(runs):
            if count and room:
                wanted.append((first, min(count, room)))
                room -= min(count, room)
        nothing = bytes(MAX_FETCH_PAGES - room), b""
        if path is None or key is None or identity is None:
            return nothing
        try:
            fd, status = self._open_path(path)
            try:
                if _key_and_identity(status) != (key, identity):
                    return nothing
                have, pages = self._read_runs(fd, key, identity, wanted)
                # A write after this point gives another identity, or is the broker's to find: it hashes what it gets.
                return (have, pages) if _key_and_identity(os.fstat(fd)) == (key, identity) else nothing
            finally:
                os.close(fd)
        except (_NotHere, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOENT:
                self._count_error(_KINDS.get(error.errno or 0, "io"))
            return nothing
        except NativeError:
            self._count_error("io")
            return nothing

    def _read_runs(self, fd: int, key: FileKey, identity: FileIdentity, runs: list[Run]) -> tuple[bytes, bytes]:
        have = bytearray()
        out: list[bytes | bytearray | memoryview] = []
        page_count = -(-identity.size // PAGE_SIZE)
        for first, asked in runs:
            count = max(0, min(asked, page_count - first))
            flags = bytearray(asked)
            if count:
                pages, fingerprints, states = native.read_pages(fd, self._key, identity.size, first, count)
                known = self.cache.fingerprints(key, identity, first, count)
                if known is None and trusted_from_ns(identity, self._clock_ns()) is not None:
                    pass  # nothing to compare with, and the identity alone does not prove that it is what was reported
                elif (known is None or known == fingerprints) and native.PAGE_ABSENT not in states:
                    flags[:count] = b"\1" * count
                    out.append(pages)
                else:
                    view = memoryview(pages)
                    for at in range(count):
                        fp = slice(at * FINGERPRINT_SIZE, (at + 1) * FINGERPRINT_SIZE)
                        if states[at] != native.PAGE_ABSENT and (known is None or known[fp] == fingerprints[fp]):
                            flags[at] = 1
                            out.append(view[at * PAGE_SIZE : (at + 1) * PAGE_SIZE])
            have += flags
        return bytes(have), b"".join(out)

    def pages_for(
        self,
        key: FileKey,
        identity: FileIdentity,
        pages: bytes | None,
        root: bytes | None,
        first: int,
        count: int,
        path: bytes | None = None,
    ) -> bytes | None:
        """Return the fingerprints number [first, first + count) of what was reported of a file, 32 bytes each.

        `pages`, `root`: as in the Observation. Numbers count the reported pages: page numbers if `pages` is None, else
        positions in it. What the cache does not have is read again, if there is a path. None: the file is not what was
        reported any more, or not all of it is resident and known; look at it again. Fingerprints of a root are checked
        against it when the first of them are asked for: the broker strikes a domain whose pages have another root.
        """
        runs = [(first, count)] if pages is None else runs_of(pages[first * 4 : (first + count) * 4])
        if sum(run[1] for run in runs) != count:
            return None
        if self._has_root(key, identity, root, check=first == 0):
            found = self._from_cache(key, identity, runs)
            if found is not None:
                return found
        if path is None or not self._read_again(path, key, identity):
            return None
        return self._from_cache(key, identity, runs) if self._has_root(key, identity, root, check=True) else None

    def _from_cache(self, key: FileKey, identity: FileIdentity, runs: list[Run]) -> bytes | None:
        parts: list[bytes] = []
        for first, count in runs:
            part = self.cache.fingerprints(key, identity, first, count)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    def _has_root(self, key: FileKey, identity: FileIdentity, root: bytes | None, *, check: bool) -> bool:
        """Say whether the cache's fingerprints of this identity make this root; without one, any will do."""
        if root is None:
            return True
        if not check:
            return self.cache.root(key, identity) == root
        column = self.cache.column(key, identity)
        if column is None or len(column) != -(-identity.size // PAGE_SIZE) * FINGERPRINT_SIZE:
            return False
        if native.file_root(identity.size, column) == root:
            return True
        self.cache.forget(key)
        return False

    def _read_again(self, path: bytes, key: FileKey, identity: FileIdentity) -> bool:
        """Fingerprint a file whatever the cache has of it; return whether it is still the one."""
        try:
            fd, status = self._open_path(path)
            try:
                if _key_and_identity(status) != (key, identity):
                    return False
                resident = unpack_runs(native.resident_runs(fd, -(-identity.size // PAGE_SIZE)))
                for _ in self._read(path, fd, key, identity, None, [], resident):
                    pass
                return True
            finally:
                os.close(fd)
        except (_NotHere, _Changing):
            return False
        except (OSError, NativeError):
            self._count_error("io")
            return False


def _key_and_identity(status: os.stat_result) -> tuple[FileKey, FileIdentity]:
    return (
        FileKey(status.st_dev, status.st_ino),
        FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    )


def _assemble(
    parts: list[tuple[int, int, bytes | memoryview]], size: int, zero_pages: int, classes: bytes, *, quiet: bool
) -> tuple[CacheEntry, bytes]:
    """Put parts (first, count, fingerprints) of a file into one entry and its column."""
    parts.sort(key=lambda part: part[0])
    runs: list[Run] = []
    for first, count, _ in parts:
        if runs and sum(runs[-1]) == first:
            runs[-1] = runs[-1][0], runs[-1][1] + count
        else:
            runs.append((first, count))
    fingerprints = b"".join(part[2] for part in parts)
    page_count = sum(run[1] for run in runs)
    if runs == [(0, -(-size // PAGE_SIZE))]:
        root = native.file_root(size, fingerprints)
        return CacheEntry(root, None, page_count, zero_pages, classes=classes, quiet=quiet), fingerprints
    return CacheEntry(None, pack_runs(runs), page_count, zero_pages, classes=classes, quiet=quiet), fingerprints


def _observation(
    path: bytes, key: FileKey, identity: FileIdentity, entry: CacheEntry, *, resident: bool = True
) -> Observation:
    pages = None if entry.runs is None else expand(unpack_runs(entry.runs))
    return Observation(
        path,
        key,
        identity,
        entry.root,
        pages,
        entry.page_count,
        entry.zero_pages,
        entry.classes,
        proven=entry.proven,
        resident=resident,
    )

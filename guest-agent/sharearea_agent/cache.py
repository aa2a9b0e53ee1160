"""The fingerprint cache: what was read of files whose content is still the same, kept over restarts in one SQLite file.

A row belongs to one inode and holds for one identity (size, mtime, ctime); the whole file belongs to one key epoch and
one format. A cache that is of another epoch or format, or damaged, is thrown away as a whole: it only saves work.

When a row may be trusted. A write after the reading must change the identity, or the row would be stale unnoticed.
The kernel stamps files from its coarse clock (CLOCK_REALTIME_COARSE, a tick of 1 to 10 ms), and a file system may round
the stamp. So a row is stored only if its stamps were older than that granularity when the reading *began*, by the very
clock the kernel stamps from; every later write then gets a later stamp. git calls the others "racily clean". They are
kept on the side, in bounded memory: good enough to be reported, and to be read again when they are old enough (`put`
says when). The future is young for a ctime, since only a clock that was set back explains it; not for an mtime, which
anybody may set, and which a write replaces.

When a row is *proven*: its pages need not be read to know what is in them, now or after a restart, on this disk or on a
copy of it. That takes more, for nobody compares such pages with the file any more (docs/cold-start.md has the reasons):

- the row is trusted, and has the root of the whole file;
- nobody had the file open for writing when the reading began. A program that has it mapped writable may change pages
  without a new stamp; one that comes later cannot;
- the file is on the file system that the cache itself is on. What happens to one as a whole (a copy of the disk, an
  older state brought back, another image in its place) then happens to the other;
- the cache is not a copy made by hand: it says by which inode, of which generation, it was written;
- that file system was not cut off in the middle of a write since. The cache says whether it was closed, and if not,
  in which boot of the kernel, by which mount it was open. One that was not closed is thrown away after a crash: a
  page may have reached the disk while the stamp of its change did not.

The side also takes what the disk does not: without a usable file (disk full, no right, damage) the cache goes on with
that, says so once (`take_errors`), and the scanner reads again what has fallen out. Which files, and when, is the
scanner's to know (scan.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from .agent import FileIdentity, FileKey
from .common import native
from .common.errors import NativeError, StoreError, StoreFull
from .common.wire import CLASSES_SIZE, FINGERPRINT_SIZE, NO_CLASSES

APPLICATION_ID: Final = 0x53416670  # "SAfp"
FORMAT: Final = 3

GRANULARITY_NS: Final = 20_000_000  # two ticks of the slowest clock (CONFIG_HZ=100)
COARSE_GRANULARITY_NS: Final = 2_000_000_000  # FAT's, the coarsest of file systems that keep no sub-seconds

SIDE_BYTES: Final = 4 << 20  # fingerprints of 512 MiB of files
_SIDE_ENTRY_BYTES: Final = 512  # what an entry costs beside its columns

_BATCH_ROWS: Final = 256
_BATCH_BYTES: Final = 1 << 20

# linux/time.h; Python has no name for it.
_CLOCK_REALTIME_COARSE: Final = 5

# linux/fs.h, _IOR('v', 1, long); what it fills in is an int.
_FS_IOC_GETVERSION: Final = 0x80087601

_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR})

# Two tables: a scan looks up every file and reads few columns, so the rows it touches are kept small and together.
_SCHEMA: Final = """
CREATE TABLE about (epoch BLOB NOT NULL, home BLOB NOT NULL, open BLOB);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, dev INTEGER NOT NULL, ino INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    pages INTEGER NOT NULL, zero_pages INTEGER NOT NULL, quiet INTEGER NOT NULL, root BLOB, classes BLOB,
    UNIQUE (dev, ino)
);
CREATE TABLE columns (id INTEGER PRIMARY KEY, runs BLOB, fingerprints BLOB NOT NULL);
"""


def coarse_clock_ns() -> int:
    """Return the time by the clock that the kernel stamps files from."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


def boot_id() -> bytes:
    """Return what names this boot of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def granularity_ns(identity: FileIdentity) -> int:
    """Return how far apart two writes must be to be sure of different stamps, judged by the look of the stamps."""
    if identity.mtime_ns % 1_000_000_000 == 0 and identity.ctime_ns % 1_000_000_000 == 0:
        return COARSE_GRANULARITY_NS
    return GRANULARITY_NS


def trusted_from_ns(identity: FileIdentity, began_ns: int) -> int | None:
    """Say when a reading must begin to be trusted; None if one that began at `began_ns` may be.

    A reading may be if its identity is older than the granularity of the file system's stamps.
    """
    granularity = granularity_ns(identity)
    youngest = identity.ctime_ns
    if identity.mtime_ns <= began_ns + granularity:
        youngest = max(youngest, identity.mtime_ns)
    return None if youngest < began_ns - granularity else youngest + granularity + 1


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What is known of one file, without its fingerprints.

    `runs`: the pages there are fingerprints for, packed pairs (first, count) of uint32, ascending; None if all pages.
    `root` is there if and only if all pages are. `trusted`: outlasts any write. `quiet`: nobody had the file open for
    writing when it was read. `proven`: pages need not be read to be known (see the module's text for all three).
    `classes`: of its pages, as in wire.Roots.
    """

    root: bytes | None
    runs: bytes | None
    page_count: int
    zero_pages: int
    trusted: bool = True
    classes: bytes = NO_CLASSES
    quiet: bool = False
    proven: bool = False


@dataclass(frozen=True, slots=True)
class _Side:
    identity: FileIdentity
    entry: CacheEntry
    fingerprints: bytes
    trusted_from_ns: int  # an untrusted one is not served to a scan from then on

    @property
    def cost(self) -> int:
        return _SIDE_ENTRY_BYTES + len(self.fingerprints) + len(self.entry.runs or b"")


def _none_if_none(classes: bytes) -> bytes | None:
    """Most files have no classes; nothing takes less room than zeros."""
    return classes if classes != NO_CLASSES else None


def _signed(number: int) -> int:
    """SQLite's integers have a sign; device and inode numbers fill 64 bits without one."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _home_of(fd: int, inode: int) -> bytes:
    """Return what names an inode also against one that gets its number later; b"" where the file system does not say.

    A file system that is copied as a whole (dd, a snapshot) keeps both, a file that is copied (cp) has others. ext2 to
    ext4, XFS and btrfs have generations; network file systems, overlayfs and tmpfs have none, or none to show.
    """
    try:
        generation = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return b""
    return inode.to_bytes(8, "little") + generation[:4]


def _position(runs: bytes | None, first: int, count: int) -> int | None:
    """Where pages [first, first + count) begin in the column of fingerprints; None if it does not have all of them."""
    if runs is None:
        return first
    pairs = array("I", runs)
    firsts, counts = pairs[0::2], pairs[1::2]
    at = bisect_right(firsts, first) - 1
    if at < 0 or first + count > firsts[at] + counts[at]:
        return None
    return sum(counts[:at]) + first - firsts[at]


class FingerprintCache:
    """The cache file and the side table. Belongs to the thread that opened it, and to one process at a time.

    No method raises for what the disk does: it is told once through `take_errors`, and the cache goes on without.
    """

    def __init__(self, path: Path, epoch: bytes, clock_ns: Callable[[], int], side_bytes: int) -> None:
        self.notice: str | None = None
        """Why an earlier cache was thrown away on opening; None if it was not."""
        self._path = path
        self._epoch = epoch
        self._clock_ns = clock_ns
        self._side: OrderedDict[FileKey, _Side] = OrderedDict()
        self._side_bytes = 0
        self._side_limit = side_bytes
        self._db: sqlite3.Connection | None = None
        self._dev: int | None = None  # of the file system that the cache is on
        self._mount = 0  # that it was opened through; 0: the kernel has no number that is never used again
        self._home = b""  # names the cache's own inode; b"": the file system has no such name, and nothing is proven
        self._own: frozenset[FileKey] = frozenset()
        self._writable = True
        self._told = False
        self._errors: list[StoreError] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._seen: array[int] | None = None
        self._seen_side: set[FileKey] = set()

    @classmethod
    def open(
        cls,
        path: Path,
        epoch: bytes,
        clock_ns: Callable[[], int] = coarse_clock_ns,
        side_bytes: int = SIDE_BYTES,
    ) -> Self:
        """Open the cache of this epoch, or begin a new one; `notice` says what became of another one.

        Its folder is made if it is not there. Never fails: a cache without a file still has its side table.
        """
        cache = cls(path, epoch, clock_ns, side_bytes)
        try:
            cache._open_file()
        except (OSError, NativeError, sqlite3.Error) as error:
            cache._fail(error, "opened")
        return cache

    def _open_file(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_private()
        why: str | None
        try:
            why = self._connect()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGE:
                raise
            why = "it was damaged"
        if why:
            self._disconnect()
            self.notice = f"the fingerprint cache {self._path} was thrown away: {why}"
            self._begin_anew()
        self._note_own_files()

    def _make_private(self) -> None:
        """Have the file, readable by its owner only; SQLite gives its other files the same mode."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if stat.S_IMODE(status.st_mode) != 0o600:
                os.fchmod(fd, 0o600)
            self._dev, self._home = status.st_dev, _home_of(fd, status.st_ino)
            self._mount = native.mount_id(fd)
        finally:
            os.close(fd)

    def _begin_anew(self) -> None:
        self._remove()
        self._make_private()
        why = self._connect()
        if why:
            raise OSError(f"a new file is no good either: {why}")

    def _connect(self) -> str | None:
        """Open the file, or fill it if it is empty. Return what is wrong with it, if it is none of ours."""
        db = self._db = sqlite3.connect(self._path, timeout=0, isolation_level=None, cached_statements=16)
        # Locked for good: one process at a time, and the index of the log needs no shared memory.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA cache_size = -256")  # KiB; the kernel caches the file already
        db.execute("PRAGMA cell_size_check = ON")
        application, version = self._number("application_id"), self._number("user_version")
        empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        if not empty:
            if application != APPLICATION_ID:
                return "it is something else"
            if version != FORMAT:
                return f"its format is {version}, not {FORMAT}"
            about = db.execute("SELECT epoch, home, open FROM about").fetchall()
            if [row[0] for row in about] != [self._epoch]:
                return "its fingerprints are of another key"
            if about[0][1] != self._home:
                return "it is a copy: it does not say what became of the files since"
            if about[0][2] is not None and (not self._mount or about[0][2] != self._open_mark()):
                return "its file system was not shut down properly, or was copied while an agent was at work on it"
        else:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 1048576")
        if empty:
            db.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute("INSERT INTO about VALUES (?, ?, NULL)", (self._epoch, self._home))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {FORMAT}")
            db.execute("COMMIT")
        self._mark_open(db)
        # From here on a crash of the host may cost the last transactions, not the file.
        db.execute("PRAGMA synchronous = NORMAL")
        return None

    def _mark_open(self, db: sqlite3.Connection) -> None:
        """Have it on the disk that the cache is open, before anything of it is relied on."""
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("UPDATE about SET open = ?", (self._open_mark(),))
        except sqlite3.Error:
            # After a crash it would be believed as one that was closed. Where it cannot be removed either, the file
            # system is read-only and nothing on it changes.
            self._home = b""
            self._disconnect()
            with contextlib.suppress(OSError):
                self._remove()
            raise

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)

    def _open_mark(self) -> bytes:
        """Return what says in which boot, through which mount the cache is open."""
        return boot_id() + b" %d" % self._mount

    def _number(self, pragma: str) -> int:
        assert self._db is not None
        return int(self._db.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _note_own_files(self) -> None:
        keys = []
        for suffix in ("", "-wal"):
            try:
                status = os.lstat(f"{self._path}{suffix}")
            except FileNotFoundError:
                continue
            keys.append(FileKey(status.st_dev, status.st_ino))
        self._own = frozenset(keys)

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        self._pending_rows = self._pending_bytes = 0
        if db is not None:
            db.close()

    # ------------------------------------------------------------------------------------------------- when it fails

    def _fail(self, error: Exception, what: str) -> None:
        """Go on without what failed, and have it told once."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if self._db is not None and self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                code = code or sqlite3.SQLITE_CORRUPT
        self._pending_rows = self._pending_bytes = 0
        if self._db is not None and code in _DAMAGE:
            self._replace_damaged()
            return
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            self._writable = False  # until the next full scan; what is there can still be read
        else:
            self._disconnect()
        if self._told:
            return
        self._told = True
        message = f"the fingerprint cache {self._path} cannot be {what}: {error}"
        if code == sqlite3.SQLITE_FULL:
            self._errors.append(StoreFull(message, "make room on its disk, or set agent.cache to another path"))
        elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._errors.append(StoreError(message, "another agent uses it: give each its own agent.cache"))
        else:
            self._errors.append(StoreError(message, "files are fingerprinted again after a restart; see agent.cache"))

    def _replace_damaged(self) -> None:
        self._disconnect()
        self._errors.append(StoreError(f"the fingerprint cache {self._path} was damaged and is begun anew"))
        self._seen = None  # its numbers were those of the old file
        try:
            self._begin_anew()
            self._note_own_files()
        except (OSError, sqlite3.Error) as error:
            self._disconnect()
            self._errors.append(StoreError(f"the fingerprint cache {self._path} cannot be made anew: {error}"))

    def take_errors(self) -> list[StoreError]:
        """Return what went wrong since the last call; the cache goes on. The same trouble is told once."""
        errors, self._errors = self._errors, []
        return errors

    @property
    def on_disk(self) -> bool:
        """Whether new rows reach the file now."""
        return self._db is not None and self._writable

    def is_own(self, key: FileKey) -> bool:
        """Return whether this inode is the cache's own file, whose every change would make another one."""
        return key in self._own

    # ------------------------------------------------------------------------------------------------------- reading

    def _inode(self, key: FileKey) -> tuple[int, int]:
        """Return the columns that name an inode. The cache's own file system is 0: a copy of it has another number."""
        return 0 if key.dev == self._dev else _signed(key.dev), _signed(key.ino)

    def with_proof(self, key: FileKey, entry: CacheEntry) -> CacheEntry:
        """Return an entry with `proven` as it follows from the rest of it and from where the file is."""
        at_home = bool(self._home) and key.dev == self._dev
        proven = at_home and entry.quiet and entry.trusted and entry.root is not None
        return replace(entry, proven=True) if proven else entry

    def _row(self, key: FileKey, identity: FileIdentity) -> tuple[int, CacheEntry] | None:
        if self._db is None:
            return None
        row = self._db.execute(
            "SELECT id, size, mtime_ns, ctime_ns, pages, zero_pages, root, classes, quiet FROM files"
            " WHERE dev = ? AND ino = ?",
            self._inode(key),
        ).fetchone()
        if row is None or (row[1], row[2], row[3]) != identity:
            return None
        runs = None
        if row[6] is None:
            found = self._db.execute("SELECT runs FROM columns WHERE id = ?", (row[0],)).fetchone()
            if found is None:
                raise sqlite3.DatabaseError("a file without its columns")
            runs = found[0]
        classes = row[7] if len(row[7] or b"") == CLASSES_SIZE else NO_CLASSES
        entry = CacheEntry(row[6], runs, row[4], row[5], classes=classes, quiet=bool(row[8]))
        return row[0], self.with_proof(key, entry)

    def get(self, key: FileKey, identity: FileIdentity) -> CacheEntry | None:
        """Return what is known of a file of this identity. During a scan this marks the row as seen.

        An untrusted entry is returned as long as a new reading could not be trusted either; then it is time to read.
        """
        side = self._side.get(key)
        if side is not None:
            if self._seen is not None:
                self._seen_side.add(key)
            if side.identity == identity and (side.entry.trusted or self._clock_ns() < side.trusted_from_ns):
                return self.with_proof(key, side.entry)
        try:
            row = self._row(key, identity)
        except sqlite3.Error as error:
            self._fail_reading(error)
            return None
        if row is None:
            return None
        if self._seen is not None:
            self._seen.append(row[0])
        return row[1]

    def root(self, key: FileKey, identity: FileIdentity) -> bytes | None:
        """Return the root that the fingerprints here belong to, trusted or not; None without one."""
        side = self._side.get(key)
        if side is not None and side.identity == identity:
            return side.entry.root
        try:
            row = self._row(key, identity)
        except sqlite3.Error as error:
            self._fail_reading(error)
            return None
        return row[1].root if row is not None else None

    def fingerprints(self, key: FileKey, identity: FileIdentity, first: int, count: int) -> bytes | None:
        """Return the fingerprints of pages [first, first + count), 32 bytes each; None unless all are there."""
        side = self._side.get(key)
        if side is not None and side.identity == identity:
            at = _position(side.entry.runs, first, count)
            if at is None or at + count > side.entry.page_count:
                return None
            return side.fingerprints[at * FINGERPRINT_SIZE : (at + count) * FINGERPRINT_SIZE]
        try:
            row = self._row(key, identity)
            if row is None or self._db is None:
                return None
            at = _position(row[1].runs, first, count)
            if at is None or at + count > row[1].page_count:
                return None
            with self._db.blobopen("columns", "fingerprints", row[0], readonly=True) as blob:
                blob.seek(at * FINGERPRINT_SIZE)
                found = blob.read(count * FINGERPRINT_SIZE)
            if len(found) != count * FINGERPRINT_SIZE:
                raise sqlite3.DatabaseError("a short column")
        except (sqlite3.Error, ValueError) as error:  # ValueError: a seek past the end of a column that is too short
            self._fail_reading(error)
            return None
        return found

    def column(self, key: FileKey, identity: FileIdentity) -> bytes | None:
        """Return all fingerprints that are there, in the order of the entry's runs."""
        side = self._side.get(key)
        if side is not None and side.identity == identity:
            return side.fingerprints
        try:
            row = self._row(key, identity)
            if row is None or self._db is None:
                return None
            found = self._db.execute("SELECT fingerprints FROM columns WHERE id = ?", (row[0],)).fetchone()
            if found is None or len(found[0]) != row[1].page_count * FINGERPRINT_SIZE:
                raise sqlite3.DatabaseError("a column of another length")
        except sqlite3.Error as error:
            self._fail_reading(error)
            return None
        return bytes(found[0])

    def _fail_reading(self, error: Exception) -> None:
        if not getattr(error, "sqlite_errorcode", 0):  # our own findings: rows that do not fit one another
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT  # type: ignore[attr-defined]
        self._fail(error, "read")

    # ------------------------------------------------------------------------------------------------------- writing

    def put(
        self, key: FileKey, identity: FileIdentity, entry: CacheEntry, fingerprints: bytes, began_ns: int
    ) -> int | None:
        """Keep what was read of a file; `began_ns`: by the cache's clock, before the first page was read.

        Returns None if it can be trusted, else when a reading must begin to be (by the same clock). The caller has seen
        the same identity before and after the reading. `entry.trusted` and `entry.proven` are ignored.
        """
        if len(fingerprints) != entry.page_count * FINGERPRINT_SIZE or (entry.root is None) != (entry.runs is not None):
            raise ValueError("an entry whose columns do not fit")
        due = trusted_from_ns(identity, began_ns)
        kept = replace(entry, trusted=due is None, proven=False)
        if due is not None or not self._store(key, identity, kept, fingerprints):
            self._put_aside(key, _Side(identity, kept, fingerprints, due or 0))
        else:
            self._drop_side(key)
        return due

    def _put_aside(self, key: FileKey, side: _Side) -> None:
        self._drop_side(key)
        self._side[key] = side
        self._side_bytes += side.cost
        if self._seen is not None:
            self._seen_side.add(key)
        # The last one stays, however large: a report of it, in parts, may be under way.
        while self._side_bytes > self._side_limit and len(self._side) > 1:
            _, oldest = self._side.popitem(last=False)
            self._side_bytes -= oldest.cost

    def _drop_side(self, key: FileKey) -> None:
        side = self._side.pop(key, None)
        if side is not None:
            self._side_bytes -= side.cost

    def _store(self, key: FileKey, identity: FileIdentity, entry: CacheEntry, fingerprints: bytes) -> bool:
        if self._db is None or not self._writable:
            return False
        inode = self._inode(key)
        try:
            self._begin()
            (number,) = self._db.execute(
                "INSERT INTO files (dev, ino, size, mtime_ns, ctime_ns, pages, zero_pages, quiet, root, classes)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (dev, ino) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns,"
                " ctime_ns = excluded.ctime_ns, pages = excluded.pages, zero_pages = excluded.zero_pages,"
                " quiet = excluded.quiet, root = excluded.root, classes = excluded.classes RETURNING id",
                (
                    *(*inode, *identity, entry.page_count, entry.zero_pages, int(entry.quiet)),
                    *(entry.root, _none_if_none(entry.classes)),
                ),
            ).fetchone()
            self._db.execute(
                "INSERT OR REPLACE INTO columns (id, runs, fingerprints) VALUES (?, ?, ?)",
                (number, entry.runs, fingerprints),
            )
        except sqlite3.Error as error:
            self._fail(error, "written")
            return False
        if self._seen is not None:
            self._seen.append(number)
        self._pending_rows += 1
        self._pending_bytes += len(fingerprints)
        if self._pending_rows >= _BATCH_ROWS or self._pending_bytes >= _BATCH_BYTES:
            return self.flush()
        return True

    def _begin(self) -> None:
        if self._db is not None and not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def flush(self) -> bool:
        """Commit what was put so far, which else is done every 256 rows or 1 MiB; return whether it is in the file."""
        self._pending_rows = self._pending_bytes = 0
        if self._db is None:
            return False
        if self._db.in_transaction:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._fail(error, "written")
                return False
        return True

    def renew(self, key: FileKey, old: FileIdentity, new: FileIdentity) -> bool:
        """Keep the fingerprints of a file whose content is known to be the same under a new identity.

        Only for a file that nobody could write to until now (under a lease). A new identity that is too young to be
        trusted is refused: False, and the file is to be read again.
        """
        side = self._side.get(key)
        if trusted_from_ns(new, self._clock_ns()) is not None or new.size != old.size:
            return False
        if side is not None and side.identity == old:
            if not side.entry.trusted:
                return False
            self._put_aside(key, _Side(new, side.entry, side.fingerprints, 0))
            return True
        if self._db is None or not self._writable:
            return False
        try:
            self._begin()
            changed = self._db.execute(
                "UPDATE files SET mtime_ns = ?, ctime_ns = ?"
                " WHERE dev = ? AND ino = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ?",
                (new.mtime_ns, new.ctime_ns, *self._inode(key), *old),
            ).rowcount
        except sqlite3.Error as error:
            self._fail(error, "written")
            return False
        return changed == 1

    def forget(self, key: FileKey) -> None:
        """Drop what is known of a file."""
        self._drop_side(key)
        if self._db is None or not self._writable:
            return
        try:
            self._begin()
            inode = self._inode(key)
            self._db.execute("DELETE FROM columns WHERE id = (SELECT id FROM files WHERE dev = ? AND ino = ?)", inode)
            self._db.execute("DELETE FROM files WHERE dev = ? AND ino = ?", inode)
        except sqlite3.Error as error:
            self._fail(error, "written")

    # ------------------------------------------------------------------------------------------------- a full scan

    def begin_scan(self) -> None:
        """Begin to note which rows are asked for or put. Writing is tried again if it had failed."""
        self._seen = array("q")
        self._seen_side = set()
        self._writable = True

    def abandon_scan(self) -> None:
        """Stop noting; nothing is dropped."""
        self._seen = None
        self._seen_side = set()

    def prune(self) -> int:
        """Drop the rows that nobody asked for since begin_scan, give their room back, and return how many they were."""
        seen, seen_side = self._seen, self._seen_side
        self.abandon_scan()
        if seen is None:
            return 0
        for key in [key for key in self._side if key not in seen_side]:
            self._drop_side(key)
        if self._db is None or not self._writable:
            return 0
        keep = set(seen)
        try:
            gone = [(number,) for (number,) in self._db.execute("SELECT id FROM files") if number not in keep]
            if gone:
                self._begin()
                self._db.executemany("DELETE FROM columns WHERE id = ?", gone)
                self._db.executemany("DELETE FROM files WHERE id = ?", gone)
            if not self.flush():
                return 0
            if gone:
                # One page per step, and rows without columns, over which execute() does not go on.
                self._db.executescript("PRAGMA incremental_vacuum")
        except sqlite3.Error as error:
            self._fail(error, "written")
            return 0
        self._told = False  # a scan without trouble: the next trouble is news
        return len(gone)

    # ------------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Commit and close. What is on the side is lost."""
        self.flush()
        self._side.clear()
        self._side_bytes = 0
        try:
            if self._db is not None and self._writable:
                self._db.execute("UPDATE about SET open = NULL")
            self._disconnect()
        except sqlite3.Error as error:
            self._fail(error, "written")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The fingerprint cache on a real SQLite file: what it keeps, what it does not trust, and how it fails."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import stat
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from sharearea_agent.agent import FileIdentity, FileKey
from sharearea_agent.cache import (
    COARSE_GRANULARITY_NS,
    FORMAT,
    GRANULARITY_NS,
    CacheEntry,
    FingerprintCache,
    boot_id,
    coarse_clock_ns,
    trusted_from_ns,
)
from sharearea_agent.common import native
from sharearea_agent.common.errors import StoreError, StoreFull

EPOCH = b"e" * 16
SECOND = 1_000_000_000
NOW = 1_800_000_000 * SECOND + 5
OLD = NOW - 3600 * SECOND
ROOT = b"r" * 32


class Clock:
    """The kernel's coarse clock, in the test's hand."""

    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def key(number: int) -> FileKey:
    return FileKey(2049, number)


def identity(pages: int, changed: int = OLD) -> FileIdentity:
    return FileIdentity(pages * 4096, changed, changed)


def column(pages: int, salt: int = 0) -> bytes:
    return b"".join((number + salt).to_bytes(32, "little") for number in range(pages))


def whole(pages: int, zero_pages: int = 0) -> CacheEntry:
    return CacheEntry(ROOT, None, pages, zero_pages)


def partial(*runs: tuple[int, int]) -> CacheEntry:
    packed = array("I", [number for run in runs for number in run]).tobytes()
    return CacheEntry(None, packed, sum(count for _, count in runs), 0)


def opened(path: Path, clock: Clock | None = None, epoch: bytes = EPOCH, **more: int) -> FingerprintCache:
    return FingerprintCache.open(path, epoch, clock or Clock(), **more)


@pytest.fixture
def path(disk_path: Path) -> Path:
    """Give where a cache may be made, in a folder that is not there yet."""
    return disk_path / "var" / "fingerprints.db"


@pytest.fixture
def cache(path: Path) -> Iterator[FingerprintCache]:
    """Give an empty cache."""
    with opened(path) as made:
        yield made


def at_home(path: Path, number: int) -> FileKey:
    """Name an inode of the file system that the cache is on."""
    return FileKey(path.parent.stat().st_dev, number)


def quiet(pages: int) -> CacheEntry:
    return CacheEntry(ROOT, None, pages, 0, quiet=True)


def mount_of(path: Path) -> int:
    with path.open("rb") as file:
        return native.mount_id(file.fileno())


def test_without_a_number_for_its_mount_an_open_cache_is_not_believed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 6.8."""
    monkeypatch.setattr(native, "mount_id", lambda _: 0)
    with opened(path) as cache:
        cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)
    with opened(path) as cache:
        assert cache.get(at_home(path, 1), identity(3)) is not None
    edit_about(path, "UPDATE about SET open = ?", boot_id() + b" 0")
    with opened(path) as cache:
        assert cache.notice is not None
        assert cache.get(at_home(path, 1), identity(3)) is None


def edit_about(path: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(sql, values)
    db.close()


def test_what_is_proven(path: Path) -> None:
    """A whole file, old enough, that nobody could write while it was read, on the cache's own file system."""
    with opened(path) as cache:
        mine = at_home(path, 1)
        cases = [
            (mine, identity(3), quiet(3), True),
            (at_home(path, 2), identity(3), whole(3), False),
            (at_home(path, 3), identity(3, NOW), quiet(3), False),
            (key(4), identity(3), quiet(3), False),
            (at_home(path, 5), identity(9), replace(partial((1, 3)), quiet=True), False),
        ]
        for where, who, entry, proven in cases:
            cache.put(where, who, entry, column(3), NOW)
            found = cache.get(where, who)
            assert found is not None
            assert found.proven == proven, where
        # Under a lease the identity may change and the bytes cannot.
        assert cache.renew(mine, identity(3), identity(3, OLD + 1))
        renewed = cache.get(mine, identity(3, OLD + 1))
        assert renewed is not None
        assert renewed.proven
    with opened(path) as cache:
        again = cache.get(mine, identity(3, OLD + 1))
        assert again is not None
        assert again.proven


def test_a_cache_knows_its_file_system_again_under_another_number(path: Path) -> None:
    """As a copy of the whole disk has it."""
    with opened(path) as cache:
        cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)
        cache.put(key(1), identity(4), quiet(4), column(4), NOW)
    with sqlite3.connect(path) as db:
        assert sorted(db.execute("SELECT dev, pages FROM files")) == [(0, 3), (2049, 4)]
    db.close()


def test_a_copy_of_the_file_is_not_believed(path: Path) -> None:
    with opened(path) as cache:
        cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)
    copy = path.with_name("copy.db")
    shutil.copyfile(path, copy)
    with opened(copy) as cache:
        assert cache.notice is not None
        assert "it is a copy" in cache.notice
        assert cache.get(at_home(path, 1), identity(3)) is None


def test_what_was_open_when_its_guest_ended_is_not_believed(path: Path) -> None:
    with opened(path) as cache:
        cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)
    mount = mount_of(path)
    edit_about(path, "UPDATE about SET open = ?", boot_id() + b" %d" % mount)
    with opened(path) as cache:  # the agent was killed, the guest goes on
        assert cache.notice is None
        assert cache.get(at_home(path, 1), identity(3)) is not None
    for mark in (b"another-boot %d" % mount, boot_id() + b" %d" % (mount + 1)):
        edit_about(path, "UPDATE about SET open = ?", mark)
        with opened(path) as cache:
            assert cache.notice is not None
            assert "not shut down properly" in cache.notice
            assert cache.get(at_home(path, 1), identity(3)) is None
            cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)


def test_a_cache_says_on_the_disk_that_it_is_open(path: Path) -> None:
    marks = []
    cache = opened(path)
    for closed in (False, True):
        if closed:
            cache.close()
        # What a crash would leave, log included, under another name.
        for suffix in ("", "-wal"):
            source = Path(f"{path}{suffix}")
            if source.exists():
                shutil.copyfile(source, f"{path.with_name('seen.db')}{suffix}")
        with sqlite3.connect(path.with_name("seen.db")) as db:
            marks += [row[0] for row in db.execute("SELECT open FROM about")]
        db.close()
        for left in path.parent.glob("seen.db*"):
            left.unlink()
    assert marks == [boot_id() + b" %d" % mount_of(path), None]


def test_rows_survive_a_restart(path: Path) -> None:
    with opened(path) as cache:
        assert cache.put(key(1), identity(3), whole(3, 1), column(3), NOW) is None
        assert cache.put(key(2), identity(9), partial((1, 2), (5, 3)), column(5), NOW) is None
    with opened(path) as cache:
        assert cache.notice is None
        assert cache.get(key(1), identity(3)) == whole(3, 1)
        assert cache.column(key(1), identity(3)) == column(3)
        assert cache.get(key(2), identity(9)) == partial((1, 2), (5, 3))
        assert cache.take_errors() == []


def test_another_identity_is_a_miss(cache: FingerprintCache) -> None:
    same = FileIdentity(8192, OLD, OLD)
    cache.put(key(1), same, whole(2), column(2), NOW)
    for other in (FileIdentity(8191, OLD, OLD), FileIdentity(8192, OLD + 1, OLD), FileIdentity(8192, OLD, OLD + 1)):
        assert cache.get(key(1), other) is None
        assert cache.fingerprints(key(1), other, 0, 1) is None
        assert cache.root(key(1), other) is None
        assert cache.column(key(1), other) is None
    assert cache.get(FileKey(2050, 1), same) is None
    assert cache.get(key(1), same) is not None


def test_a_new_reading_replaces_the_old_one(cache: FingerprintCache) -> None:
    cache.put(key(1), identity(2), whole(2), column(2), NOW)
    cache.put(key(1), identity(3, OLD + 1), whole(3), column(3, 7), NOW)
    assert cache.get(key(1), identity(2)) is None
    assert cache.column(key(1), identity(3, OLD + 1)) == column(3, 7)


def test_numbers_of_64_bits_fit(cache: FingerprintCache) -> None:
    large = FileKey((1 << 64) - 1, (1 << 63) + 5)
    cache.put(large, identity(1), whole(1), column(1), NOW)
    assert cache.get(large, identity(1)) == whole(1)


def test_parts_of_a_column_are_found_by_page_number(cache: FingerprintCache) -> None:
    cache.put(key(1), identity(9), partial((1, 2), (5, 3)), column(5), NOW)
    everything = column(5)
    for first, count, at in ((1, 2, 0), (2, 1, 1), (5, 3, 2), (6, 2, 3), (7, 1, 4)):
        assert cache.fingerprints(key(1), identity(9), first, count) == everything[at * 32 : (at + count) * 32]
    for first, count in ((0, 1), (0, 2), (2, 2), (3, 1), (7, 2), (8, 1), (9, 1)):
        assert cache.fingerprints(key(1), identity(9), first, count) is None
    cache.put(key(2), identity(3), whole(3), column(3), NOW)
    assert cache.fingerprints(key(2), identity(3), 1, 2) == column(3)[32:]
    assert cache.fingerprints(key(2), identity(3), 1, 3) is None


def test_the_file_is_private(path: Path) -> None:
    path.parent.mkdir()
    path.touch(0o644)
    path.chmod(0o644)
    with opened(path) as cache:
        cache.put(key(1), identity(1), whole(1), column(1), NOW)
        cache.flush()
        files = list(path.parent.iterdir())
        assert {file.name for file in files} == {"fingerprints.db", "fingerprints.db-wal"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        status = path.stat()
        assert cache.is_own(FileKey(status.st_dev, status.st_ino))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_is_not_followed(path: Path) -> None:
    path.parent.mkdir()
    target = path.parent / "target"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    with opened(path) as cache:
        assert not cache.on_disk
        assert len(cache.take_errors()) == 1
    assert target.read_bytes() == b"precious"


# ------------------------------------------------------------------------------------------------ what is thrown away


def test_another_epoch_throws_all_away(path: Path) -> None:
    with opened(path) as cache:
        cache.put(key(1), identity(1), whole(1), column(1, 1 << 100), NOW)
    assert column(1, 1 << 100) in path.read_bytes()
    with opened(path, epoch=b"f" * 16) as cache:
        assert cache.notice is not None
        assert "another key" in cache.notice
        assert cache.get(key(1), identity(1)) is None
        cache.put(key(1), identity(1), whole(1), column(1, 9), NOW)
    assert column(1, 1 << 100) not in path.read_bytes()  # nothing of the old key is left in the file
    with opened(path, epoch=b"f" * 16) as cache:
        assert cache.notice is None
        assert cache.column(key(1), identity(1)) == column(1, 9)


def test_another_format_throws_all_away(path: Path) -> None:
    with opened(path) as cache:
        cache.put(key(1), identity(1), whole(1), column(1), NOW)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {FORMAT + 1}")
    db.close()
    with opened(path) as cache:
        assert cache.notice is not None
        assert "format" in cache.notice
        assert cache.get(key(1), identity(1)) is None
        assert cache.on_disk


@pytest.mark.parametrize("rubbish", [b"not a database\n" * 1000, b"SQLite format 3\0" + bytes(8192)])
def test_a_file_that_is_no_cache_is_replaced(path: Path, rubbish: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(rubbish)
    with opened(path) as cache:
        assert cache.notice is not None
        assert cache.put(key(1), identity(1), whole(1), column(1), NOW) is None
    with opened(path) as cache:
        assert cache.notice is None
        assert cache.get(key(1), identity(1)) == whole(1)


def test_somebody_elses_database_is_no_cache(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE about (epoch BLOB)")
    db.close()
    with opened(path) as cache:
        assert cache.notice is not None
        assert "something else" in cache.notice


def test_damage_that_shows_later_begins_the_cache_anew(path: Path) -> None:
    with opened(path) as cache:
        for number in range(200):
            cache.put(key(number), identity(40), whole(40), column(40), NOW)
    data = bytearray(path.read_bytes())
    assert len(data) > 64 * 4096
    for page in range(4, len(data) // 4096):  # the schema stays whole: it is noticed when rows are read
        data[page * 4096 : page * 4096 + 200] = b"\xee" * 200
    path.write_bytes(data)
    with opened(path) as cache:
        found = [cache.column(key(number), identity(40)) for number in range(200)]
        assert set(found) == {None}
        errors = cache.take_errors()
        assert ["damaged" in str(error) for error in errors] == [True]
        assert cache.take_errors() == []
        assert cache.put(key(1), identity(1), whole(1), column(1), NOW) is None
        assert cache.on_disk
    with opened(path) as cache:
        assert cache.notice is None
        assert cache.get(key(1), identity(1)) == whole(1)


def test_a_row_without_its_column_is_damage(path: Path) -> None:
    with opened(path) as cache:
        cache.put(key(1), identity(2), whole(2), column(2), NOW)
        cache.put(key(2), identity(2), whole(2), column(2), NOW)
    db = sqlite3.connect(path)
    db.execute("UPDATE columns SET fingerprints = x'00' WHERE id = 1")
    db.commit()
    db.close()
    with opened(path) as cache:
        assert cache.fingerprints(key(1), identity(2), 1, 1) is None
        assert len(cache.take_errors()) == 1
        assert cache.get(key(2), identity(2)) is None  # nothing of a damaged cache is used


# ------------------------------------------------------------------------------------------------- what is not trusted


def test_a_file_that_changed_just_before_it_was_read_is_not_trusted(path: Path) -> None:
    clock = Clock()
    changed = NOW - GRANULARITY_NS
    with opened(path, clock) as cache:
        due = cache.put(key(1), identity(1, changed), whole(1), column(1), NOW)
        assert due == NOW + 1
        entry = cache.get(key(1), identity(1, changed))
        assert entry is not None
        assert not entry.trusted
        assert cache.fingerprints(key(1), identity(1, changed), 0, 1) == column(1)
        clock.now = due
        assert cache.get(key(1), identity(1, changed)) is None  # time to read it again
        assert cache.fingerprints(key(1), identity(1, changed), 0, 1) == column(1)  # reports go on meanwhile
    with opened(path, clock) as cache:
        assert cache.get(key(1), identity(1, changed)) is None
        assert cache.put(key(1), identity(1, changed), whole(1), column(1, 5), due) is None
        entry = cache.get(key(1), identity(1, changed))
        assert entry is not None
        assert entry.trusted
        assert cache.column(key(1), identity(1, changed)) == column(1, 5)


@pytest.mark.parametrize(
    ("mtime", "ctime", "expected"),
    [
        (OLD, OLD, None),
        (OLD, NOW - GRANULARITY_NS - 1, None),
        (OLD, NOW - GRANULARITY_NS, NOW + 1),
        (NOW - GRANULARITY_NS, OLD, NOW + 1),
        (OLD, NOW + SECOND, NOW + SECOND + GRANULARITY_NS + 1),  # the clock was set back
        (NOW + 3600 * SECOND, OLD, None),  # anybody can set an mtime; a write changes both stamps
        (NOW + 3600 * SECOND, NOW, NOW + GRANULARITY_NS + 1),
    ],
)
def test_what_is_young(mtime: int, ctime: int, expected: int | None) -> None:
    assert trusted_from_ns(FileIdentity(1, mtime, ctime), NOW) == expected


def test_stamps_in_whole_seconds_need_more_time() -> None:
    stamp = NOW // SECOND * SECOND
    assert trusted_from_ns(FileIdentity(1, stamp, stamp), stamp + SECOND) == stamp + COARSE_GRANULARITY_NS + 1
    assert trusted_from_ns(FileIdentity(1, stamp, stamp), stamp + COARSE_GRANULARITY_NS) is not None
    assert trusted_from_ns(FileIdentity(1, stamp, stamp), stamp + COARSE_GRANULARITY_NS + 1) is None


def test_the_clock_is_the_kernels(disk_path: Path) -> None:
    """A file that is written after the clock was read has no earlier stamp."""
    file = disk_path / "file"
    for number in range(50):
        before = coarse_clock_ns()
        file.write_bytes(bytes([number]))
        assert file.stat().st_ctime_ns >= before


def test_the_side_table_is_bounded_and_keeps_the_last(path: Path) -> None:
    with opened(path, side_bytes=20_000) as cache:
        for number in range(100):
            cache.put(key(number), identity(10, NOW), whole(10), column(10), NOW)
        kept = [number for number in range(100) if cache.get(key(number), identity(10, NOW)) is not None]
        assert kept == list(range(100 - len(kept), 100))
        assert 10 < len(kept) <= 20_000 // (10 * 32)
        cache.put(key(500), identity(2000, NOW), whole(2000), column(2000), NOW)
        assert cache.fingerprints(key(500), identity(2000, NOW), 1999, 1) == column(2000)[-32:]
        assert cache.get(key(99), identity(10, NOW)) is None


# -------------------------------------------------------------------------------------------------------- renew, prune


def test_renew_keeps_the_fingerprints_under_the_new_identity(path: Path) -> None:
    old, new = identity(2), identity(2, OLD + SECOND + 7)
    with opened(path) as cache:
        cache.put(key(1), old, whole(2), column(2), NOW)
        assert cache.renew(key(1), old, new)
    with opened(path) as cache:
        assert cache.get(key(1), old) is None
        assert cache.column(key(1), new) == column(2)
        assert not cache.renew(key(1), old, identity(2, OLD + 2 * SECOND))  # that is not what is there
        assert not cache.renew(key(2), old, new)
        assert cache.column(key(1), new) == column(2)


def test_renew_refuses_what_a_write_could_still_hide_behind(cache: FingerprintCache) -> None:
    cache.put(key(1), identity(2), whole(2), column(2), NOW)
    assert not cache.renew(key(1), identity(2), identity(2, NOW - 1))
    assert not cache.renew(key(1), identity(2), identity(3, OLD + 1))
    assert cache.get(key(1), identity(2, NOW - 1)) is None
    cache.put(key(2), identity(2, NOW), whole(2), column(2), NOW)  # not trusted itself
    assert not cache.renew(key(2), identity(2, NOW), identity(2, OLD))


def test_prune_drops_what_a_scan_did_not_see(path: Path) -> None:
    with opened(path) as cache:
        for number in range(600):
            cache.put(key(number), identity(40), whole(40), column(40), NOW)
    size = path.stat().st_size
    with opened(path) as cache:
        cache.put(key(9000), identity(1, NOW), whole(1), column(1), NOW)  # on the side
        assert cache.prune() == 0  # no scan was begun
        cache.begin_scan()
        for number in range(10):
            assert cache.get(key(number), identity(40)) is not None
        cache.put(key(600), identity(40), whole(40), column(40), NOW)
        assert cache.get(key(11), identity(41)) is None  # asked for, and not there: of no use any more
        assert cache.prune() == 590
        kept = [number for number in range(601) if cache.get(key(number), identity(40)) is not None]
        assert kept == [*range(10), 600]
        assert cache.get(key(9000), identity(1, NOW)) is None
    assert path.stat().st_size < size // 4


def test_a_scan_that_is_abandoned_drops_nothing(cache: FingerprintCache) -> None:
    cache.put(key(1), identity(1), whole(1), column(1), NOW)
    cache.begin_scan()
    cache.abandon_scan()
    assert cache.prune() == 0
    assert cache.get(key(1), identity(1)) == whole(1)


def test_forget(cache: FingerprintCache) -> None:
    cache.put(key(1), identity(1), whole(1), column(1), NOW)
    cache.put(key(2), identity(1, NOW), whole(1), column(1), NOW)
    for number, which in ((1, identity(1)), (2, identity(1, NOW))):
        assert cache.column(key(number), which) is not None
        cache.forget(key(number))
        assert cache.column(key(number), which) is None
        assert cache.get(key(number), which) is None


# -------------------------------------------------------------------------------------------------- when the disk fails


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have the kernel refuse to let this process's files grow past a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_cache_that_cannot_say_that_it_is_open_does_not_stay(path: Path) -> None:
    """After a crash it would pass for one that was closed."""
    with opened(path) as cache:
        cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW)
    with file_size_limit(4096), opened(path) as cache:
        assert not cache.on_disk
        assert cache.get(at_home(path, 1), identity(3)) is None
        assert [type(error) for error in cache.take_errors()] == [StoreError]
        assert cache.put(at_home(path, 1), identity(3), quiet(3), column(3), NOW) is None
        aside = cache.get(at_home(path, 1), identity(3))
        assert aside is not None
        assert not aside.proven
    assert not path.exists()


def test_a_disk_that_takes_no_more_is_told_once_and_served_from_memory(path: Path) -> None:
    with opened(path) as cache:
        cache.put(key(1), identity(40), whole(40), column(40), NOW)
        cache.flush()
        with file_size_limit(path.with_name("fingerprints.db-wal").stat().st_size + 8192):
            for number in range(2, 40):
                assert cache.put(key(number), identity(4000), whole(4000), column(4000), NOW) is None
            assert not cache.on_disk
            errors = cache.take_errors()
            assert [type(error) for error in errors] == [StoreError]
            assert str(path) in str(errors[0])
            assert errors[0].hint
            assert cache.get(key(1), identity(40)) == whole(40)  # what is in the file can be read
            assert cache.column(key(39), identity(4000)) == column(4000)  # the last ones are in memory
            assert not cache.renew(key(1), identity(40), identity(40, OLD + 1))
            cache.forget(key(2))
            assert cache.prune() == 0
            cache.begin_scan()  # tries again
            for number in range(2, 40):
                cache.put(key(number), identity(4000), whole(4000), column(4000), NOW)
            assert not cache.on_disk
            assert cache.prune() == 0
            assert cache.take_errors() == []
        cache.begin_scan()
        assert cache.on_disk
        assert cache.put(key(2), identity(4000), whole(4000), column(4000), NOW) is None
        cache.prune()
        assert cache.take_errors() == []
    with opened(path) as cache:
        assert cache.notice is None
        assert cache.column(key(2), identity(4000)) == column(4000)


def test_a_full_database_is_told_as_full(path: Path) -> None:
    with opened(path) as cache:
        assert cache._db is not None
        cache._db.execute("PRAGMA max_page_count = 30")  # SQLite then says the very SQLITE_FULL of a full disk
        for number in range(50):
            cache.put(key(number), identity(400), whole(400), column(400), NOW)
        errors = cache.take_errors()
        assert [type(error) for error in errors] == [StoreFull]
        assert "make room" in errors[0].hint
        assert cache.column(key(49), identity(400)) == column(400)


def test_a_folder_that_cannot_be_made_costs_only_the_file(disk_path: Path) -> None:
    (disk_path / "file").write_bytes(b"")
    with opened(disk_path / "file" / "cache.db") as cache:
        errors = cache.take_errors()
        assert [type(error) for error in errors] == [StoreError]
        assert cache.notice is None
        assert not cache.on_disk
        assert cache.put(key(1), identity(2), whole(2), column(2), NOW) is None
        assert cache.get(key(1), identity(2)) == whole(2)
        assert cache.fingerprints(key(1), identity(2), 1, 1) == column(2)[32:]
        assert cache.renew(key(1), identity(2), identity(2, OLD + 1))
        assert cache.root(key(1), identity(2, OLD + 1)) == ROOT
        cache.begin_scan()
        assert cache.prune() == 0
        assert cache.get(key(1), identity(2, OLD + 1)) is None
        assert cache.take_errors() == []


def test_two_agents_cannot_share_one_cache(path: Path) -> None:
    with opened(path) as first:
        first.put(key(1), identity(1), whole(1), column(1), NOW)
        first.flush()
        with opened(path) as second:
            (error,) = second.take_errors()
            assert "another agent" in error.hint
            assert second.notice is None
            assert not second.on_disk
        assert first.get(key(1), identity(1)) == whole(1)
        assert first.take_errors() == []


def test_an_entry_must_fit_its_columns(cache: FingerprintCache) -> None:
    for entry, fingerprints in (
        (whole(2), column(1)),
        (CacheEntry(None, None, 1, 0), column(1)),
        (CacheEntry(ROOT, b"", 1, 0), column(1)),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            cache.put(key(1), identity(2), entry, fingerprints, NOW)

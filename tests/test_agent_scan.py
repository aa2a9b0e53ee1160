"""The scanner on real files of a disk file system, with their real page cache."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea_agent.agent import FileIdentity, FileKey, Observation
from sharearea_agent.cache import CacheEntry, FingerprintCache, coarse_clock_ns
from sharearea_agent.common import native
from sharearea_agent.common.wire import MAX_FETCH_PAGES, Data
from sharearea_agent.scan import (
    AGAIN_NS,
    BATCH_FILES,
    MAX_DEPTH,
    Counters,
    Pass,
    Scanner,
    ScanSettings,
    expand,
    pack_runs,
    runs_of,
    subtract,
    unpack_runs,
    vanished,
)

KEY = bytes(range(32))
EPOCH = b"e" * 16
PAGE = 4096
HOUR_NS = 3600 * 1_000_000_000


class Clock:
    """The kernel's coarse clock, ahead by as much as the test says: an hour makes every file an old one."""

    def __init__(self) -> None:
        self.ahead = HOUR_NS

    def __call__(self) -> int:
        return coarse_clock_ns() + self.ahead


class Guest:
    """A root folder with one designated folder in it, and the scanner's parts."""

    def __init__(self, place: Path) -> None:
        self.root = place / "root"
        self.folder = self.root / "usr"
        self.folder.mkdir(parents=True)
        self.cache_path = place / "cache.db"
        self.clock = Clock()
        self.cache = FingerprintCache.open(self.cache_path, EPOCH, self.clock)

    def scanner(self, timer: Callable[[], float] | None = None, **settings: Any) -> Scanner:
        values: dict[str, Any] = {"root": os.fsencode(self.root), "folders": (os.fsencode(self.folder),)} | settings
        return Scanner(ScanSettings(**values), KEY, self.cache, self.clock, timer or time.monotonic)

    def reopen(self) -> None:
        self.cache.close()
        self.cache = FingerprintCache.open(self.cache_path, EPOCH, self.clock)

    def write(self, name: str, data: bytes) -> Path:
        """Make a file that is wholly resident and clean."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        clean(path)
        return path


@pytest.fixture
def guest(disk_path: Path) -> Iterator[Guest]:
    """Give an empty guest."""
    made = Guest(disk_path)
    yield made
    made.cache.close()


def clean(path: Path) -> None:
    """Write a file's dirty pages to the disk, so that they can be dropped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def pages(count: int, salt: int = 0) -> bytes:
    """Pages that all differ."""
    return b"".join((number + 1 + (salt << 32)).to_bytes(8, "little") * 512 for number in range(count))


def fingerprints(data: bytes) -> bytes:
    """The fingerprints of a content, by the oracle."""
    padded = data + bytes(-len(data) % PAGE)
    return b"".join(blake3.blake3(padded[at : at + PAGE], key=KEY).digest() for at in range(0, len(padded), PAGE))


def root_of(data: bytes) -> bytes:
    """The root of a content, by the oracle."""
    context = "sharearea 2026-11-20 file root v1"
    return blake3.blake3(len(data).to_bytes(8, "little") + fingerprints(data), derive_key_context=context).digest()


def resident(path: Path) -> list[tuple[int, int]]:
    """The resident pages of a file, as runs."""
    with path.open("rb") as file:
        return unpack_runs(native.resident_runs(file.fileno(), -(-path.stat().st_size // PAGE)))


def evict(path: Path, first: int = 0, count: int = 0) -> None:
    """Drop pages of a file from the page cache (all of them if no count is given)."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), first * PAGE, count * PAGE, os.POSIX_FADV_DONTNEED)
    left = resident(path)
    if not count:
        assert left == [], f"{path} has pages that cannot be dropped: these tests need a disk file system"


def fault_in(path: Path, first: int, count: int) -> None:
    """Have pages of a file read, without read-ahead."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), count * PAGE, first * PAGE)


def partly(path: Path) -> list[tuple[int, int]]:
    """Have only some pages of a file of at least 1024 resident; return them."""
    evict(path)
    fault_in(path, 10, 3)
    fault_in(path, 600, 40)
    left = resident(path)
    held = sum(count for _, count in left)
    assert 43 <= held < 1024, f"{held} pages resident: these tests need a disk file system"
    return left


def finished(found: Pass) -> list[Observation]:
    """All observations of a pass that ran to its end."""
    seen = [observation for batch in found for observation in batch]
    assert found.complete
    return seen


def one(found: Pass) -> Observation:
    """The only observation of a pass."""
    (observation,) = finished(found)
    return observation


def names(observations: list[Observation]) -> list[bytes]:
    return sorted(observation.path for observation in observations)


def identity_of(path: Path) -> tuple[FileKey, FileIdentity]:
    status = path.stat()
    return (
        FileKey(status.st_dev, status.st_ino),
        FileIdentity(status.st_size, status.st_mtime_ns, status.st_ctime_ns),
    )


# -------------------------------------------------------------------------------------------------- runs and prefixes

page_sets = st.sets(st.integers(0, 200)).map(sorted)


@given(page_sets)
def test_runs_and_page_numbers_are_the_same_said_twice(numbers: list[int]) -> None:
    packed = array("I", numbers).tobytes()
    runs = runs_of(packed)
    assert expand(runs) == packed
    assert unpack_runs(pack_runs(runs)) == runs
    assert all(sum(first) < second[0] for first, second in itertools.pairwise(runs))  # maximal


@given(page_sets, page_sets)
def test_subtract_is_that_of_sets(some: list[int], known: list[int]) -> None:
    left = subtract(runs_of(array("I", some).tobytes()), runs_of(array("I", known).tobytes()))
    assert expand(left) == array("I", sorted(set(some) - set(known))).tobytes()


def test_vanished_is_what_was_not_seen() -> None:
    known = [b"/usr/a", b"/usr/b", b"/usr/lib/c", b"/usr/libs/d"]
    assert vanished(known, {b"/usr/a"}) == [b"/usr/b", b"/usr/lib/c", b"/usr/libs/d"]
    assert vanished(known, set(), b"/usr/lib") == [b"/usr/lib/c"]


# -------------------------------------------------------------------------------------------------------- what is seen


def test_a_wholly_resident_file_is_known_by_its_root(guest: Guest) -> None:
    data = pages(5) + bytes(2 * PAGE) + b"the end"
    path = guest.write("lib/x", data)
    seen = one(guest.scanner().walk())
    key, identity = identity_of(path)
    assert seen == Observation(b"/usr/lib/x", key, identity, root_of(data), None, 8, 2, proven=True)
    assert guest.cache.fingerprints(key, identity, 0, 8) == fingerprints(data)


def test_the_next_scan_reads_nothing_even_after_a_restart(guest: Guest) -> None:
    guest.write("a", pages(20))
    guest.write("b", pages(30, 1))
    first = guest.scanner()
    before = finished(first.walk())
    assert first.counters.bytes_read == 50 * PAGE
    assert first.counters.pages_fingerprinted == 50
    guest.reopen()
    second = guest.scanner()
    assert sorted(finished(second.walk()), key=lambda seen: seen.path) == sorted(before, key=lambda seen: seen.path)
    counters = second.take_counters()
    assert (counters.files, counters.cache_hits, counters.bytes_read, counters.errors) == (2, 2, 0, {})
    assert second.counters == Counters()


def test_a_file_with_nothing_resident_is_not_read(guest: Guest) -> None:
    path = guest.write("x", pages(100))
    evict(path)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    assert (seen.root, seen.pages, seen.page_count, seen.zero_pages) == (None, b"", 0, 0)
    assert scanner.counters.bytes_read == 0
    assert resident(path) == []


def test_a_partly_resident_file_is_reported_by_page(guest: Guest) -> None:
    data = pages(1024)
    path = guest.write("x", data)
    there = partly(path)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    numbers = array("I", expand(there))
    assert (seen.root, seen.pages, seen.page_count) == (None, expand(there), len(numbers))
    assert resident(path) == there  # looking did not fill the cache
    assert scanner.counters.bytes_read == len(numbers) * PAGE
    expected = fingerprints(data)
    found = scanner.pages_for(seen.key, seen.identity, seen.pages, None, 0, len(numbers))
    assert found == b"".join(expected[number * 32 : number * 32 + 32] for number in numbers)
    scanner.take_counters()
    assert one(scanner.walk()) == seen
    assert (scanner.counters.bytes_read, scanner.counters.cache_hits) == (0, 1)


def test_pages_that_become_resident_are_added_until_the_root_is_known(guest: Guest) -> None:
    data = pages(1024)
    path = guest.write("x", data)
    there = partly(path)
    scanner = guest.scanner()
    first = one(scanner.walk())
    evict(path)
    fault_in(path, 100, 8)
    second = one(scanner.walk())
    both = set(array("I", expand(there))) | set(array("I", expand(resident(path))))
    assert second.pages == array("I", sorted(both)).tobytes()
    assert second.identity == first.identity
    column = guest.cache.column(second.key, second.identity)
    expected = fingerprints(data)
    assert column == b"".join(expected[number * 32 : number * 32 + 32] for number in sorted(both))
    path.read_bytes()
    third = one(scanner.walk())
    assert third.root == root_of(data)
    assert third.pages is None
    assert scanner.counters.pages_fingerprinted == 1024  # each once
    evict(path, 0, 512)
    assert one(scanner.walk()) == third  # by its root as long as a page is resident
    evict(path)
    assert one(scanner.walk()) == replace(third, resident=False)  # and then as a question
    fault_in(path, 5, 1)
    assert one(scanner.walk()) == third
    assert scanner.counters.pages_fingerprinted == 1024


def test_a_changed_file_is_read_again(guest: Guest) -> None:
    path = guest.write("x", pages(4))
    scanner = guest.scanner()
    assert one(scanner.walk()).root == root_of(pages(4))
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(b"in place")
    assert one(scanner.walk()).root == root_of(path.read_bytes())
    os.truncate(path, PAGE + 100)
    assert one(scanner.walk()).root == root_of(path.read_bytes())
    with path.open("ab") as file:
        file.write(pages(3, 9))
    seen = one(scanner.walk())
    assert seen.root == root_of(path.read_bytes())
    assert seen.page_count == 5
    assert seen.identity == identity_of(path)[1]


def test_a_sparse_file(guest: Guest) -> None:
    path = guest.write("x", b"")
    os.truncate(path, 300 * PAGE)
    with path.open("r+b") as file:
        file.seek(7 * PAGE)
        file.write(pages(1))
    clean(path)
    data = path.read_bytes()
    seen = one(guest.scanner().walk())
    assert (seen.root, seen.zero_pages) == (root_of(data), 299)


def test_names_are_bytes(guest: Guest) -> None:
    odd = [b"caf\xe9", b"new\nline", b" ", b"\xff\xfe", "ß".encode(), b"-rf", b"*", b"x" * 255]
    for number, name in enumerate(odd):
        directory = os.path.join(os.fsencode(guest.folder), b"\xc3dir")
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, name), "wb") as file:
            file.write(pages(1, number))
    scanner = guest.scanner()
    seen = finished(scanner.walk())
    assert names(seen) == sorted(b"/usr/\xc3dir/" + name for name in odd)
    for observation in seen:
        with open(scanner.host_path(observation.path), "rb") as file:
            assert observation.root == root_of(file.read())
        assert scanner.reported_path(scanner.host_path(observation.path)) == observation.path
    assert names(finished(scanner.look(observation.path for observation in seen))) == names(seen)


def test_hard_links_are_read_once(guest: Guest) -> None:
    path = guest.write("a", pages(10))
    os.link(path, guest.folder / "b")
    scanner = guest.scanner()
    first, second = finished(scanner.walk())
    assert (first.key, first.root) == (second.key, second.root)
    assert {first.path, second.path} == {b"/usr/a", b"/usr/b"}
    assert scanner.counters.pages_fingerprinted == 10


# ---------------------------------------------------------------------------------------------------- what is left out


def test_only_regular_files_are_reported(guest: Guest) -> None:
    target = guest.write("file", pages(1))
    os.mkfifo(guest.folder / "fifo")
    (guest.folder / "link").symlink_to(target)
    (guest.folder / "dangling").symlink_to("nowhere")
    (guest.folder / "loop").symlink_to(guest.folder)
    (guest.folder / "dir").mkdir()
    (guest.folder / "dir" / "up").symlink_to("..")
    with socket.socket(socket.AF_UNIX) as listening:
        at = os.open(guest.folder, os.O_PATH)
        try:
            listening.bind(f"/proc/self/fd/{at}/socket")
        finally:
            os.close(at)
        scanner = guest.scanner()
        assert names(finished(scanner.walk())) == [b"/usr/file"]
        others = [
            b"/usr/" + name for name in (b"fifo", b"link", b"dangling", b"loop/file", b"socket", b"dir", b"dir/up")
        ]
        look = scanner.look(others)
        assert finished(look) == []
        assert look.vanished == others
    assert set(scanner.counters.errors) == {"symlink"}


def test_devices_are_passed_over(guest: Guest) -> None:
    assert Path("/dev/null").is_char_device()
    scanner = guest.scanner(root=b"/", folders=(b"/dev",))
    assert b"/dev/null" not in names(finished(scanner.walk()))
    look = scanner.look([b"/dev/null"])
    assert finished(look) == []
    assert look.vanished == [b"/dev/null"]


def test_only_what_everybody_may_read_is_reported(guest: Guest) -> None:
    for name, mode in (("open", 0o644), ("write", 0o602), ("group", 0o640), ("mine", 0o600), ("other", 0o604)):
        guest.write(name, pages(1)).chmod(mode)
    for folder, mode in (("shut", 0o700), ("list", 0o744), ("search", 0o711)):
        guest.write(f"{folder}/sub/file", pages(1))
        (guest.folder / folder).chmod(mode)
    scanner = guest.scanner()
    expected = [b"/usr/open", b"/usr/other", b"/usr/search/sub/file"]
    assert names(finished(scanner.walk())) == expected
    everything = names(finished(guest.scanner(world_readable=False).walk()))
    assert len(everything) == 8
    look = scanner.look(everything)
    assert names(finished(look)) == expected
    assert sorted(look.vanished) == sorted(set(everything) - set(expected))
    assert names(finished(scanner.walk([b"/usr/shut/sub"]))) == []
    for above in (guest.folder, guest.root):
        above.chmod(0o750)
        assert finished(scanner.walk()) == []
        assert finished(scanner.look(expected)) == []
        above.chmod(0o755)
    assert names(finished(scanner.walk())) == expected


def test_sizes_and_globs(guest: Guest) -> None:
    for name, size in (("empty", 0), ("small", 99), ("fit", 100), ("also.so", 5000), ("large", 5001)):
        guest.write(name, b"x" * size)
    guest.write("private/fit", b"x" * 100)
    limits: dict[str, Any] = {"min_file_bytes": 100, "max_file_bytes": 5000}
    assert names(finished(guest.scanner(**limits).walk())) == [b"/usr/also.so", b"/usr/fit", b"/usr/private/fit"]
    own = guest.scanner(exclude=("/usr/private/**",), **limits)
    assert names(finished(own.walk())) == [b"/usr/also.so", b"/usr/fit"]
    hints = guest.scanner(exclude=("/usr/private/**",), include_hints=("*.so",), exclude_hints=("*.a",), **limits)
    assert names(finished(hints.walk())) == [b"/usr/also.so"]
    assert hints.hints_ignored is None
    broken = guest.scanner(exclude=("/usr/private/**",), include_hints=("[",), **limits)
    assert broken.hints_ignored is not None
    assert names(finished(broken.walk())) == [b"/usr/also.so", b"/usr/fit"]
    look = own.look([b"/usr/fit", b"/usr/small", b"/usr/private/fit", b"/etc/passwd", b"/usr/../usr/fit", b"", b"fit"])
    assert names(finished(look)) == [b"/usr/fit"]
    assert len(look.vanished) == 6


def test_other_file_systems_are_left_out(guest: Guest) -> None:
    shm = Path("/dev/shm")
    assert shm.stat().st_dev != Path("/dev").stat().st_dev, "this test needs /dev/shm to be a file system of its own"
    file = shm / f"sharearea-test-{os.getpid()}"
    file.write_bytes(pages(2))
    file.chmod(0o644)
    try:
        path = os.fsencode(file)
        dev: dict[str, Any] = {"root": b"/", "folders": (b"/dev",)}
        assert path not in names(finished(guest.scanner(**dev).walk()))
        assert finished(guest.scanner(**dev).look([path])) == []
        barred = guest.scanner(**dev)
        assert finished(barred.walk([b"/dev/shm"])) == []
        assert barred.counters.errors == {"folder": 1}
        across = guest.scanner(one_file_system=False, **dev)
        assert path in names(finished(across.walk()))
        assert names(finished(across.look([path]))) == [path]
    finally:
        file.unlink()


def test_a_folder_that_is_a_link_or_missing_is_counted(guest: Guest) -> None:
    guest.write("x", pages(1))
    (guest.root / "link").symlink_to(guest.folder)
    scanner = guest.scanner(folders=tuple(os.fsencode(guest.root / name) for name in ("link", "none", "usr")))
    assert names(finished(scanner.walk())) == [b"/usr/x"]
    assert scanner.counters.errors == {"symlink": 1, "no-folder": 1}
    with pytest.raises(ValueError, match="not inside the root"):
        guest.scanner(folders=(b"/elsewhere",))


def test_very_deep_folders_end_somewhere(guest: Guest) -> None:
    here = os.open(guest.folder, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 10):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=here))
    os.close(here)
    scanner = guest.scanner()
    before = os.listdir("/proc/self/fd")
    walk = scanner.walk()
    finished(walk)
    assert scanner.counters.errors == {"too-deep": 1}
    assert os.listdir("/proc/self/fd") == before


def test_the_caches_own_files_are_no_files_to_share(guest: Guest) -> None:
    guest.cache.close()
    guest.cache_path = guest.folder / "cache.db"
    guest.cache = FingerprintCache.open(guest.cache_path, EPOCH, guest.clock)
    guest.write("x", pages(1))
    scanner = guest.scanner(world_readable=False)
    finished(scanner.walk())
    assert names(finished(scanner.walk())) == [b"/usr/x"]


# --------------------------------------------------------------------------------------------------- change and cancel


def test_look_tells_what_is_gone(guest: Guest) -> None:
    for name in ("stays", "deleted", "renamed", "unreadable"):
        guest.write(name, pages(1))
    scanner = guest.scanner()
    known = names(finished(scanner.walk()))
    (guest.folder / "deleted").unlink()
    (guest.folder / "renamed").rename(guest.folder / "new")
    (guest.folder / "unreadable").chmod(0o600)
    look = scanner.look([*known, b"/usr/new"])
    assert names(finished(look)) == [b"/usr/new", b"/usr/stays"]
    assert sorted(look.vanished) == [b"/usr/deleted", b"/usr/renamed", b"/usr/unreadable"]
    walk = scanner.walk()
    finished(walk)
    assert walk.seen == {b"/usr/new", b"/usr/stays"}
    assert vanished(known, walk.seen) == sorted(look.vanished)


def test_part_of_the_folders_can_be_walked(guest: Guest) -> None:
    guest.write("lib/a/x", pages(1))
    guest.write("lib/b/x", pages(1))
    guest.write("share/x", pages(1))
    scanner = guest.scanner()
    assert names(finished(scanner.walk([b"/usr/lib"]))) == [b"/usr/lib/a/x", b"/usr/lib/b/x"]
    assert names(finished(scanner.walk([b"/usr/lib/b/", b"/usr/none", b"/etc"]))) == [b"/usr/lib/b/x"]
    scanner.take_counters()
    finished(scanner.walk())
    assert scanner.counters.cache_hits == 2  # the partial walks kept what they did not see


@pytest.mark.parametrize("covered", ["usr", "usr/share", ""])
def test_plain_files_that_a_view_covers_are_looked_at_elsewhere(guest: Guest, covered: str) -> None:
    designated = guest.folder if covered != "usr/share" else guest.folder / "share"
    guest.write("share/a", pages(1))
    guest.write("share/b", pages(1))
    below = guest.root / covered if covered else guest.root
    # The folder itself, moved away, in the place of a bind mount; what is seen there now has another file.
    place = below.rename(guest.root.parent / "plain")
    (guest.folder / "share").mkdir(parents=True, exist_ok=True)
    (guest.folder / "share/c").write_bytes(pages(1))
    scanner = guest.scanner(folders=(os.fsencode(designated),), plain=((os.fsencode(below), os.fsencode(place)),))
    assert names(finished(scanner.walk())) == [b"/usr/share/a", b"/usr/share/b"]
    assert names(finished(scanner.walk([b"/usr/share"]))) == [b"/usr/share/a", b"/usr/share/b"]
    assert names(finished(scanner.look([b"/usr/share/a", b"/usr/share/c"]))) == [b"/usr/share/a"]
    assert scanner.why_not(b"/usr/share/a") == ("", 1)
    where = place / {"usr/share": "a", "usr": "share/a", "": "usr/share/a"}[covered]
    assert where.exists()
    assert scanner.reported_path(os.fsencode(where)) == b"/usr/share/a"
    assert scanner.reported_path(os.fsencode(place)) == (f"/{covered}".encode() if covered else b"")
    place.chmod(0o700)
    assert names(finished(scanner.walk())) == []  # its rights count as those of the folder


def stepping_timer() -> Callable[[], float]:
    """A timer that makes every step the end of a batch."""
    now = 0.0

    def timer() -> float:
        nonlocal now
        now += 1
        return now

    return timer


def test_a_file_that_changes_while_it_is_read_is_looked_at_again(guest: Guest) -> None:
    path = guest.write("big", pages(9000))
    scanner = guest.scanner(stepping_timer())
    walk = scanner.walk()
    batches = iter(walk)
    assert next(batches) == ()  # the first chunk is read
    with path.open("r+b") as file:
        file.write(b"changed")
    assert [batch for batch in batches if batch] == []
    assert walk.complete
    assert walk.seen == {b"/usr/big"}  # it is there: not to be told as vanished
    assert scanner.counters.errors == {"changed": 1}
    assert guest.cache.get(*identity_of(path)) is None
    assert scanner.due() == []
    guest.clock.ahead += AGAIN_NS
    assert scanner.next_due_ns is not None
    assert scanner.next_due_ns <= guest.clock()
    due = scanner.due()
    assert due == [b"/usr/big"]
    assert scanner.due() == []
    assert one(scanner.look(due)).root == root_of(path.read_bytes())


def test_a_file_that_cannot_be_opened_now_is_there_all_the_same(guest: Guest) -> None:
    path = guest.write("x", pages(1))
    handler = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with path.open("r+b") as file:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            scanner = guest.scanner()
            walk = scanner.walk()
            assert finished(walk) == []  # and the scan does not wait for whoever holds the lease
            assert walk.seen == {b"/usr/x"}
            assert scanner.counters.errors == {"busy": 1}
    finally:
        signal.signal(signal.SIGIO, handler)
    guest.clock.ahead += AGAIN_NS
    assert one(scanner.look(scanner.due())).root == root_of(pages(1))


def test_a_walk_can_be_left_within_a_large_file(guest: Guest) -> None:
    later = guest.write("later/small", pages(1))
    finished(guest.scanner().walk())
    path = guest.write("big", pages(9000))
    before = sorted(os.listdir("/proc/self/fd"))
    scanner = guest.scanner(stepping_timer())
    walk = scanner.walk()
    assert next(iter(walk)) == ()
    assert 0 < scanner.counters.pages_fingerprinted < 9000
    walk.close()
    assert not walk.complete
    assert list(walk) == []
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert guest.cache.get(*identity_of(path)) is None
    assert guest.cache.prune() == 0
    assert guest.cache.get(*identity_of(later)) is not None  # what was not reached is not taken for gone
    assert one(scanner.look([b"/usr/big"])).root == root_of(path.read_bytes())


def test_the_runner_may_answer_the_broker_between_two_chunks(guest: Guest) -> None:
    data = pages(3)
    small = guest.write("small", data)
    guest.write("large", pages(9000))
    scanner = guest.scanner(stepping_timer())
    finished(scanner.look([b"/usr/small"]))
    key, identity = identity_of(small)
    answers = 0
    for _ in scanner.walk():
        have, sent = scanner.read_for_fetch(b"/usr/small", key, identity, pack_runs([(0, 3)]))
        assert (have, sent) == (b"\1\1\1", data)
        assert scanner.pages_for(key, identity, None, root_of(data), 0, 3) == fingerprints(data)
        answers += 1
    assert answers >= 3


def test_a_young_file_is_reported_and_read_once_more(guest: Guest) -> None:
    guest.clock.ahead = 0
    guest.write("x", pages(6))
    os.utime(guest.folder / "x", ns=(0, 0))  # the mtime says nothing; the ctime is now
    scanner = guest.scanner()
    # The stamp may be older than the granularity by now: then touch again. It ends, as a stat is faster than that.
    while True:
        os.utime(guest.folder / "x", ns=(0, 0))
        seen = one(scanner.walk())
        if scanner.next_due_ns is not None:
            break
    assert seen.root == root_of(pages(6))
    assert scanner.pages_for(seen.key, seen.identity, None, seen.root, 2, 3) == fingerprints(pages(6))[64:160]
    guest.clock.ahead = HOUR_NS
    assert scanner.due() == [b"/usr/x"]
    scanner.take_counters()
    assert not seen.proven
    seen = replace(seen, proven=True)
    assert one(scanner.look([b"/usr/x"])) == seen
    assert scanner.counters.pages_fingerprinted == 6  # not taken from the side
    assert scanner.next_due_ns is None
    guest.reopen()
    scanner = guest.scanner()
    assert one(scanner.walk()) == seen
    assert scanner.counters.pages_fingerprinted == 0


def test_a_file_that_somebody_can_write_is_not_proven(guest: Guest) -> None:
    path = guest.write("x", pages(4))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = 7
        seen = one(guest.scanner().walk())
        assert not seen.proven
        mapping[0] = 8  # without a stamp: the page is writable since the first store
        assert identity_of(path) == (seen.key, seen.identity)
    clean(path)
    evict(path)
    assert one(guest.scanner().walk()).page_count == 0


def test_what_is_proven_is_known_without_reading(guest: Guest) -> None:
    path = guest.write("x", pages(300))
    seen = one(guest.scanner().walk())
    assert (seen.proven, seen.resident) == (True, True)
    guest.reopen()
    evict(path)
    scanner = guest.scanner()
    assert one(scanner.walk()) == replace(seen, resident=False)
    assert scanner.counters.bytes_read == 0
    assert resident(path) == []
    os.utime(path)
    assert one(scanner.walk()).page_count == 0  # another identity


def test_a_young_file_is_not_read_again_before_it_can_be_trusted(guest: Guest) -> None:
    guest.clock.ahead = -HOUR_NS  # as if the guest's clock had been set back: every file is from the future
    guest.write("x", pages(6))
    scanner = guest.scanner()
    seen = one(scanner.walk())
    assert one(scanner.walk()) == seen
    assert scanner.counters.pages_fingerprinted == 6


def test_what_was_read_too_early_is_not_mixed_with_what_is_read_later(guest: Guest) -> None:
    guest.clock.ahead = -HOUR_NS  # nothing can be trusted
    path = guest.write("x", pages(1024))
    partly(path)
    scanner = guest.scanner()
    finished(scanner.walk())
    scanner.take_counters()
    fault_in(path, 100, 8)
    seen = one(scanner.walk())
    assert scanner.counters.pages_fingerprinted == seen.page_count  # all, not only those that are new


# --------------------------------------------------------------------------------------------------------- the answers


class Meddling(FingerprintCache):
    """A cache during whose every look-up somebody changes a file."""

    victim: Path

    def fingerprints(self, key: FileKey, identity: FileIdentity, first: int, count: int) -> bytes | None:
        found = super().fingerprints(key, identity, first, count)
        os.utime(self.victim)
        return found


def test_fetch_sends_nothing_of_a_file_that_changed_while_it_was_read(guest: Guest) -> None:
    path = guest.write("x", pages(4))
    seen = one(guest.scanner().walk())
    guest.cache.close()
    guest.cache = meddling = Meddling.open(guest.cache_path, EPOCH, guest.clock)
    meddling.victim = path
    have, sent = guest.scanner().read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0, 4)]))
    assert (have, sent) == (bytes(4), b"")


def test_fetch_sends_what_was_reported(guest: Guest) -> None:
    data = pages(8) + b"short"
    path = guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(7, 2), (0, 1), (3, 2)]))
    Data(1, have, sent).check()
    padded = data + bytes(PAGE - 5)
    assert have == b"\1" * 5
    assert sent == padded[7 * PAGE :] + padded[:PAGE] + padded[3 * PAGE : 5 * PAGE]
    have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(8, 3), (20, 2)]))
    assert (have, sent) == (b"\1\0\0\0\0", padded[8 * PAGE :])
    with path.open("r+b") as file:
        file.write(b"changed")
    nothing = bytes(2), b""
    assert scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0, 2)])) == nothing
    assert scanner.read_for_fetch(None, None, None, pack_runs([(0, 2)])) == nothing
    assert scanner.read_for_fetch(b"/usr/none", seen.key, seen.identity, pack_runs([(0, 2)])) == nothing
    assert scanner.read_for_fetch(b"/etc/passwd", seen.key, seen.identity, pack_runs([(0, 2)])) == nothing
    path.unlink()
    assert scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0, 2)])) == nothing


def test_fetch_leaves_out_what_is_not_resident(guest: Guest) -> None:
    data = pages(1024)
    path = guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    there = set(array("I", expand(partly(path))))
    have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0, 100), (600, 100)]))
    asked = [*range(100), *range(600, 700)]
    assert [bool(flag) for flag in have] == [number in there for number in asked]
    assert 0 < have.count(1) < len(have)
    assert sent == b"".join(data[number * PAGE : (number + 1) * PAGE] for number in asked if number in there)
    Data(1, have, sent).check()
    assert set(array("I", expand(resident(path)))) == there


def test_fetch_leaves_out_what_has_another_fingerprint_than_was_reported(guest: Guest) -> None:
    data = pages(10)
    guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    wrong = bytearray(fingerprints(data))
    wrong[4 * 32] ^= 1
    entry = CacheEntry(seen.root, None, 10, 0)
    guest.cache.put(seen.key, seen.identity, entry, bytes(wrong), guest.clock())
    have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(2, 4)]))
    assert have == b"\1\1\0\1"
    assert sent == data[2 * PAGE : 4 * PAGE] + data[5 * PAGE : 6 * PAGE]


def test_fetch_without_a_cache_trusts_an_old_identity_only(guest: Guest) -> None:
    data = pages(4)
    guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    guest.cache.forget(seen.key)
    ask = seen.path, seen.key, seen.identity, pack_runs([(0, 4)])
    assert scanner.read_for_fetch(*ask) == (b"\1" * 4, data)
    guest.clock.ahead = -HOUR_NS
    assert scanner.read_for_fetch(*ask) == (bytes(4), b"")


def test_fetch_is_bounded(guest: Guest) -> None:
    guest.write("x", pages(400))
    scanner = guest.scanner()
    seen = one(scanner.walk())
    for runs in ([(0, 0xFFFFFFFF)], [(0, 200), (200, 200)], [(number, 1) for number in range(400)]):
        have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs(runs))
        assert have == b"\1" * MAX_FETCH_PAGES
        assert len(sent) == MAX_FETCH_PAGES * PAGE
    assert scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0xFFFFFFFF, 5)])) == (bytes(5), b"")
    assert scanner.read_for_fetch(seen.path, seen.key, seen.identity, b"") == (b"", b"")


def test_pages_for_counts_in_what_was_reported(guest: Guest) -> None:
    data = pages(1024)
    path = guest.write("x", data)
    partly(path)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    numbers = array("I", seen.pages or b"")
    expected = fingerprints(data)
    got = b"".join(
        scanner.pages_for(seen.key, seen.identity, seen.pages, None, first, min(7, len(numbers) - first)) or b"?"
        for first in range(0, len(numbers), 7)
    )
    assert got == b"".join(expected[number * 32 : number * 32 + 32] for number in numbers)
    assert scanner.pages_for(seen.key, seen.identity, seen.pages, None, len(numbers) - 1, 2) is None
    path.read_bytes()
    later = one(scanner.walk())  # the whole file is known now; the earlier report can still be served
    assert later.root == root_of(data)
    assert scanner.pages_for(seen.key, seen.identity, seen.pages, None, 3, 5) == got[3 * 32 : 8 * 32]


def test_pages_for_reads_again_what_the_cache_has_lost(guest: Guest) -> None:
    data = pages(50)
    path = guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    ask = seen.key, seen.identity, None, seen.root
    guest.cache.forget(seen.key)
    assert scanner.pages_for(*ask, 10, 5) is None  # without a path there is nothing to read
    assert scanner.pages_for(*ask, 10, 5, path=seen.path) == fingerprints(data)[10 * 32 : 15 * 32]
    scanner.take_counters()
    assert scanner.pages_for(*ask, 15, 5, path=seen.path) == fingerprints(data)[15 * 32 : 20 * 32]
    assert scanner.counters.bytes_read == 0  # kept from the first part
    guest.cache.forget(seen.key)
    evict(path)
    assert scanner.pages_for(*ask, 0, 5, path=seen.path) is None
    path.write_bytes(data)
    assert scanner.pages_for(*ask, 0, 5, path=seen.path) is None
    assert scanner.pages_for(*ask, 0, 5, path=b"/usr/none") is None


def test_pages_for_never_sends_fingerprints_of_another_root(guest: Guest) -> None:
    data = pages(50)
    guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    ask = seen.key, seen.identity, None, seen.root
    wrong = bytearray(fingerprints(data))
    wrong[40 * 32] ^= 1
    guest.cache.put(seen.key, seen.identity, CacheEntry(seen.root, None, 50, 0), bytes(wrong), guest.clock())
    assert scanner.pages_for(*ask, 0, 50, path=seen.path) == fingerprints(data)  # noticed, and read again
    other = native.file_root(50 * PAGE, bytes(wrong))
    guest.cache.put(seen.key, seen.identity, CacheEntry(other, None, 50, 0), bytes(wrong), guest.clock())
    assert scanner.pages_for(*ask, 20, 5) is None  # replaced between two parts of a report
    assert scanner.pages_for(seen.key, seen.identity, None, bytes(32), 0, 5, path=seen.path) is None


def test_without_a_cache_file_everything_still_works(disk_path: Path) -> None:
    (disk_path / "cache.db").mkdir()
    guest = Guest(disk_path)
    assert not guest.cache.on_disk
    data = pages(40)
    guest.write("x", data)
    scanner = guest.scanner()
    seen = one(scanner.walk())
    assert scanner.pages_for(seen.key, seen.identity, None, seen.root, 0, 40) == fingerprints(data)
    assert one(scanner.walk()) == seen
    have, sent = scanner.read_for_fetch(seen.path, seen.key, seen.identity, pack_runs([(0, 40)]))
    assert (have, sent) == (b"\1" * 40, data)
    guest.cache.close()


# ---------------------------------------------------------------------------------------------------- many, and kernels


def test_twenty_thousand_small_files(guest: Guest) -> None:
    for folder in range(100):
        here = guest.folder / f"{folder:02}"
        here.mkdir()
        at = os.open(here, os.O_RDONLY)
        for number in range(200):
            fd = os.open(f"{number}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=at)
            os.write(fd, b"%d" % (folder * 200 + number))
            os.close(fd)
        os.close(at)
    scanner = guest.scanner()
    walk = scanner.walk()
    batches = list(walk)
    assert max(len(batch) for batch in batches) <= BATCH_FILES
    files = {seen.path: seen for batch in batches for seen in batch}
    assert len(files) == len(walk.seen) == 20_000
    # The kernel may have dropped some of so many meanwhile, most of all on a busy machine.
    held = {path for path, seen in files.items() if seen.page_count}
    assert len(held) > 10_000
    counters = scanner.take_counters()
    assert (counters.files, counters.pages_fingerprinted, counters.errors) == (20_000, len(held), {})
    for number in range(200):
        (guest.folder / "07" / f"{number}").unlink()
    guest.reopen()
    scanner = guest.scanner()
    again = scanner.walk()
    still = {seen.path for seen in finished(again) if seen.page_count}
    assert len(again.seen) == 19_800
    assert scanner.counters.cache_hits == len(still & held)
    assert scanner.counters.pages_fingerprinted == len(still - held)
    assert sorted(vanished(walk.seen, again.seen)) == sorted(b"/usr/07/%d" % number for number in range(200))
    guest.cache.begin_scan()
    assert guest.cache.prune() == len(again.seen & (held | still))  # the walk itself had dropped the other 200


# seccomp(2): the kernel answers ENOSYS to cachestat (451 on every architecture), as kernels before 6.5 do.
OLD_KERNEL = """
import ctypes, errno, struct
program = b"".join(struct.pack("<HBBI", *step) for step in (
    (0x20, 0, 0, 0),             # load the call's number
    (0x15, 0, 1, 451),           # cachestat? else skip one
    (0x06, 0, 0, 0x00050000 | errno.ENOSYS),
    (0x06, 0, 0, 0x7FFF0000),    # anything else is allowed
))
steps = ctypes.create_string_buffer(program, len(program))
prog = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(steps)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0, ctypes.get_errno()
"""


def test_a_kernel_without_cachestat(guest: Guest) -> None:
    data = pages(1024)
    there = partly(guest.write("part", data))
    guest.write("whole", data[:40960])
    evict(guest.write("none", data[:8192]))
    guest.cache.close()
    script = OLD_KERNEL + textwrap.dedent(
        f"""
        from pathlib import Path
        from sharearea_agent.cache import FingerprintCache, coarse_clock_ns
        from sharearea_agent.common import native
        from sharearea_agent.common.errors import NativeError
        from sharearea_agent.scan import Scanner, ScanSettings
        clock = lambda: coarse_clock_ns() + {HOUR_NS}
        cache = FingerprintCache.open(Path({str(guest.cache_path)!r}), {EPOCH!r}, clock)
        settings = ScanSettings(root={os.fsencode(guest.root)!r}, folders=({os.fsencode(guest.folder)!r},))
        for _ in range(2):
            scanner = Scanner(settings, {KEY!r}, cache, clock)
            for batch in scanner.walk():
                for seen in batch:
                    print(seen.path.decode(), seen.page_count, (seen.root or b"").hex(), (seen.pages or b"").hex())
            print(scanner.counters.bytes_read, scanner.counters.errors)
        try:
            native.cachestat(0)
        except NativeError as error:
            assert error.errno == errno.ENOSYS
        else:
            raise SystemExit("cachestat is there")
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    held = sum(count for _, count in there)
    expected = [
        "/usr/none 0  ",
        f"/usr/part {held}  {expand(there).hex()}",
        f"/usr/whole 10 {root_of(data[:40960]).hex()} ",
    ]
    assert lines == sorted([*expected, *expected, f"{(held + 10) * PAGE} {{}}", "0 {}"])

"""The typed facade over the native core: shapes, errors and lifetimes. What the C computes is tested beside the C."""

from __future__ import annotations

import errno
import fcntl
import inspect
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sharearea_agent.common.native as agent_native
from sharearea.common import native
from sharearea.common.errors import AreaFull, Closed, HostError, NativeError, TableFull
from sharearea.common.native import FP_SIZE, NO_SLOT, PAGE_SIZE, NativePageTable, Segment

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
SEED = bytes(40)


def page(number: int) -> bytes:
    """A page that differs from that of every other number."""
    return struct.pack("<Q", number + 1) * (PAGE_SIZE // 8)


def pages(count: int) -> bytes:
    """Pages 0 to count - 1."""
    return b"".join(page(number) for number in range(count))


def fp(data: bytes) -> bytes:
    """The fingerprint under KEY by the oracle."""
    return blake3.blake3(data, key=KEY).digest()


def u32(*numbers: int) -> bytes:
    """A packed column."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def numbers(column: bytes) -> list[int]:
    """The numbers in a packed column."""
    return list(struct.unpack(f"<{len(column) // 4}I", column))


# Linux; the mmap module has no name for it. A kernel may evict any page at any moment (memory pressure, DAMON), unless
# somebody's mapping locks it into memory.
MAP_LOCKED = 0x2000


@pytest.fixture
def small_file(disk_path: Path) -> Iterator[int]:
    """Give a descriptor of a file of three pages and a bit that is and stays wholly in the page cache."""
    path = disk_path / "file"
    path.write_bytes(pages(3) + b"tail")
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        with mmap.mmap(fd, 0, flags=mmap.MAP_SHARED | MAP_LOCKED, prot=mmap.PROT_READ):
            yield fd
    finally:
        os.close(fd)


SMALL_SIZE = 3 * PAGE_SIZE + 4
SMALL_PAGES = pages(3) + b"tail".ljust(PAGE_SIZE, b"\0")


@pytest.fixture
def segment() -> Iterator[Segment]:
    """Give a segment of eight slots."""
    with Segment.create("test", 8) as made:
        yield made


@pytest.fixture
def table() -> Iterator[NativePageTable]:
    """Give a table of four holders and eight pages."""
    with NativePageTable(SEED, fp(bytes(PAGE_SIZE)), 4, 8) as made:
        yield made


# ------------------------------------------------------------------------------------------------------------ hash


@given(st.lists(st.sampled_from([page(1), page(2), bytes(PAGE_SIZE)]), max_size=20))
def test_fingerprints_are_those_of_blake3(content: list[bytes]) -> None:
    fps, zero = native.fingerprint_pages(KEY, b"".join(content))
    assert fps == b"".join(fp(one) for one in content)
    assert list(zero) == [int(one == bytes(PAGE_SIZE)) for one in content]


def test_both_packages_carry_the_same_facade() -> None:
    assert agent_native.fingerprint_pages(KEY, page(1)) == (fp(page(1)), b"\0")
    assert agent_native.__file__ != native.__file__


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: memoryview(b"x" + data)[1:]])
def test_every_bytes_like_column_is_taken(wrap: Callable[[bytes], bytes]) -> None:
    assert native.fingerprint_pages(wrap(KEY), wrap(page(1)))[0] == fp(page(1))
    with NativePageTable(SEED, fp(bytes(PAGE_SIZE)), 4, 8) as table:
        ids = table.intern(wrap(fp(page(1)) + fp(page(2))))
        # A memoryview that begins at an odd address: C may take 32-bit numbers to be aligned.
        assert table.fps(wrap(ids)) == fp(page(1)) + fp(page(2))
        table.publish(wrap(ids), wrap(u32(3, 4)))
        table.map(wrap(u32(0, 3, 2)))
        assert table.unmap(wrap(u32(0, 3, 2))) == b""


@pytest.mark.parametrize("offset", range(8))
def test_numbers_reach_c_aligned_and_without_a_copy_where_they_are(offset: int) -> None:
    data = bytes(8) + u32(1, 2, 3)
    column, count = native._words(memoryview(data)[offset : 20 - 8 + offset], 3, "runs")
    address = int(native.ffi.cast("uintptr_t", column))
    assert count == 1
    assert address % 4 == 0
    copied = address != int(native.ffi.cast("uintptr_t", native.ffi.from_buffer(data))) + offset
    assert copied == (offset % 4 != 0)


def test_file_root_covers_size_and_fingerprints() -> None:
    fps = fp(page(1)) + fp(page(2))
    context = "sharearea 2026-11-20 file root v1"
    oracle = blake3.blake3(struct.pack("<Q", 8192) + fps, derive_key_context=context).digest()
    assert native.file_root(8192, fps) == oracle
    assert native.file_root(8191, fps) != oracle


def test_a_kernel_that_runs_can_be_chosen() -> None:
    before = native.selected_hash_kernel()
    kernels = native.hash_kernels()
    assert kernels[0] == ("scalar", native.KERNEL_RUNS)
    try:
        for kernel in kernels:
            if kernel.state == native.KERNEL_RUNS:
                native.select_hash_kernel(kernel.name)
                assert native.selected_hash_kernel() == kernel.name
                assert native.fingerprint_pages(KEY, pages(5))[0] == b"".join(fp(page(i)) for i in range(5))
        native.select_hash_kernel("auto")
        assert native.selected_hash_kernel() in [kernel.name for kernel in kernels]
    finally:
        native.select_hash_kernel(before)


def test_an_unknown_kernel_is_an_error_that_names_it() -> None:
    before = native.selected_hash_kernel()
    with pytest.raises(HostError, match=r"'abacus'.*no hash kernel of this name"):
        native.select_hash_kernel("abacus")
    assert native.selected_hash_kernel() == before


def test_the_three_reasons_against_a_kernel_read_differently() -> None:
    texts = {
        number: native._error("sa_hash_select", number, "hash kernel 'x'")
        for number in (errno.ENOENT, errno.ENOTSUP, errno.ENOSYS)
    }
    assert all(type(error) is HostError for error in texts.values())
    assert len({str(error) for error in texts.values()}) == 3


# ---------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.fingerprint_pages(KEY[:-1], page(1)),
        lambda: native.fingerprint_pages(KEY + b"x", page(1)),
        lambda: native.fingerprint_pages(KEY, page(1)[:-1]),
        lambda: native.file_root(1, bytes(31)),
        lambda: native.file_root(-1, b""),
        lambda: native.file_root(1 << 64, b""),
        lambda: native.compare_pages(0, 0, bytes(1)),
        lambda: native.cachestat(1 << 31),
        lambda: NativePageTable(SEED[:-1], bytes(32), 4, 8),
        lambda: NativePageTable(SEED, bytes(31), 4, 8),
        lambda: NativePageTable(SEED, bytes(32), -1, 8),
        lambda: NativePageTable(SEED, bytes(32), 4, 1 << 32),
        lambda: Segment.create("test", -1),
    ],
)
def test_broken_arguments_are_value_errors(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.intern(bytes(33)),
        lambda t: t.unref(bytes(3)),
        lambda t: t.mark(bytes(5), 0),
        lambda t: t.mark(b"", 4),
        lambda t: t.mark(b"", -1),
        lambda t: t.unmark(bytes(5), 0),
        lambda t: t.forget(4),
        lambda t: t.want(bytes(7), 2),
        lambda t: t.want(b"", -1),
        lambda t: t.unwant(bytes(6)),
        lambda t: t.publish(u32(1), b""),
        lambda t: t.publish(u32(1), bytes(3)),
        lambda t: t.fps(bytes(2)),
        lambda t: t.slots(u32(7)),
        lambda t: t.count(bytes(1)),
        lambda t: t.runs(u32(0), u32(0, 1), 8),
        lambda t: t.runs(u32(0), None, 0),
        lambda t: t.map(bytes(8)),
        lambda t: t.map(u32(0, 5, 1)),
        lambda t: t.unmap(bytes(16)),
        lambda t: t.unmap(u32(0, 5, 1)),
        lambda t: t.unmap(u32(0, 0, 0xFFFFFFFF)),
        lambda t: t.live(-1, 1),
        lambda t: t.live(0, -1),
        lambda t: t.live(0, 1 << 64),
    ],
)
def test_a_table_refuses_what_it_cannot_mean(table: NativePageTable, call: Callable[[NativePageTable], object]) -> None:
    before = table.totals()
    with pytest.raises(ValueError, match=r"."):
        call(table)
    assert table.totals() == before


# ------------------------------------------------------------------------------------------------------ page cache


def test_a_descriptor_that_is_none_is_a_native_error() -> None:
    with pytest.raises(NativeError) as caught:
        native.resident_runs(-1, 1)
    assert caught.value.errno == errno.EBADF
    assert caught.value.call == "sa_resident_runs"


def has_cachestat() -> bool:
    """Whether this kernel has cachestat (Linux 6.5)."""
    try:
        native.cachestat(-1)
    except NativeError as error:
        return error.errno != errno.ENOSYS
    raise AssertionError("cachestat took a descriptor that is none")


needs_cachestat = pytest.mark.skipif(not has_cachestat(), reason="this kernel has no cachestat")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(native.RESIDENCY_AUTO, id="auto"),
        pytest.param(native.RESIDENCY_MINCORE, id="mincore"),
        pytest.param(native.RESIDENCY_CACHESTAT, id="cachestat", marks=needs_cachestat),
    ],
)
def test_resident_runs_loop_until_all_is_covered(disk_path: Path, how: int) -> None:
    path = disk_path / "file"
    npages = 6 * native._FIRST_RUNS
    path.write_bytes(bytes(npages * PAGE_SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert native.resident_runs(file.fileno(), npages, how) == b""
        # Every other page: more runs than the first room holds.
        for number in range(0, npages, 2):
            os.pread(file.fileno(), 1, number * PAGE_SIZE)
        runs = numbers(native.resident_runs(file.fileno(), npages, how))
        assert native.resident_runs(file.fileno(), 0, how) == b""
    # The kernel may have evicted some of them meanwhile, but not read others.
    assert 2 * native._FIRST_RUNS < len(runs) // 2 <= npages // 2
    assert runs[0::2] == sorted(set(runs[0::2]))
    assert set(runs[0::2]) <= set(range(0, npages, 2))
    assert set(runs[1::2]) == {1}


@needs_cachestat
def test_cachestat_counts_cached_and_dirty_pages(small_file: int) -> None:
    assert native.cachestat(small_file) == (4, 0)
    assert native.cachestat(small_file, 1, 2) == (2, 0)


def test_a_file_is_fingerprinted_read_and_compared(small_file: int) -> None:
    oracle = b"".join(fp(SMALL_PAGES[at : at + PAGE_SIZE]) for at in range(0, len(SMALL_PAGES), PAGE_SIZE))
    states = bytes([native.PAGE_DATA] * 4)
    assert native.fingerprint_file(small_file, KEY, SMALL_SIZE, 0, 4) == (oracle, states)
    data, fps, read_states = native.read_pages(small_file, KEY, SMALL_SIZE, 0, 4)
    assert (bytes(data), fps, read_states) == (SMALL_PAGES, oracle, states)
    assert native.fingerprint_file(small_file, KEY, SMALL_SIZE, 2, 1)[0] == oracle[2 * FP_SIZE : 3 * FP_SIZE]
    assert native.compare_pages(small_file, 0, SMALL_PAGES) == 4
    assert native.compare_pages(small_file, 1, page(1) + page(7)) == 1
    assert native.compare_pages(small_file, 0, page(7)) == 0


@needs_cachestat
def test_dropped_pages_are_absent(disk_path: Path) -> None:
    path = disk_path / "file"
    path.write_bytes(pages(64))
    with path.open("rb") as file:
        fd = file.fileno()
        os.fsync(fd)
        before, after = native.drop_pages(fd)
        assert 0 < before <= 64
        assert after == 0
        assert native.cachestat(fd) == (0, 0)
        assert native.resident_runs(fd, 64) == b""
        fps, states = native.fingerprint_file(fd, KEY, 64 * PAGE_SIZE, 0, 64)
    assert (fps, states) == (bytes(64 * FP_SIZE), bytes(64))


# ------------------------------------------------------------------------------------------------------- segments


def test_a_segment_keeps_checks_and_returns_pages(segment: Segment) -> None:
    want = fp(page(0)) + fp(page(7)) + fp(page(2))
    assert segment.fill(KEY, 2, pages(3), want) == b"\1\0\1"
    assert segment.verify(KEY, 2, want) == b"\1\0\1"
    assert segment.read(2, 3) == pages(3)
    assert segment.read(0, 1) == bytes(PAGE_SIZE)
    assert segment.verify(OTHER_KEY, 2, want) == b"\0\0\0"
    assert segment.nslots == 8
    assert segment.writable
    assert segment.allocated_bytes() >= 3 * PAGE_SIZE


def test_an_adopted_segment_is_the_same_and_read_only(segment: Segment) -> None:
    segment.fill(KEY, 0, page(1), fp(page(1)))
    with Segment.adopt(segment.fileno(), 8) as adopted:
        assert adopted.identity() == segment.identity()
        assert adopted.fileno() != segment.fileno()
        assert adopted.read(0, 1) == page(1)
        assert not adopted.writable
        with pytest.raises(NativeError, match="read only") as caught:
            adopted.fill(KEY, 0, page(2), fp(page(2)))
        assert caught.value.errno == errno.EROFS


def test_only_a_sealed_memfd_of_the_right_size_is_adopted(segment: Segment) -> None:
    with pytest.raises(NativeError, match="no segment of this size"):
        Segment.adopt(segment.fileno(), 9)
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, native.SEGMENT_HEADER + 8 * PAGE_SIZE)
        with pytest.raises(NativeError, match="lacks the seals") as caught:
            Segment.adopt(fd, 8)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(("first", "count"), [(8, 1), (7, 2), (0, 9), (0xFFFFFFFF, 2)])
def test_slots_outside_a_segment_are_refused(segment: Segment, first: int, count: int) -> None:
    want = fp(page(0)) * count
    for call in (
        lambda: segment.fill(KEY, first, page(0) * count, want),
        lambda: segment.verify(KEY, first, want),
        lambda: segment.read(first, count),
    ):
        with pytest.raises(NativeError, match="outside the segment"):
            call()


def test_pages_and_fingerprints_must_be_equally_many(segment: Segment) -> None:
    with pytest.raises(ValueError, match="2 pages and 1 fingerprints"):
        segment.fill(KEY, 0, pages(2), fp(page(0)))


def test_a_host_without_descriptors_makes_no_segment() -> None:
    # In a process of its own: the limit would hit this one's threads.
    code = """
import resource
from sharearea.common.errors import AreaFull
from sharearea.common.native import Segment
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
try:
    Segment.create("test", 1)
except AreaFull as error:
    print(error.exit_code, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{AreaFull.exit_code} raise the limit on open files\n"


# ------------------------------------------------------------------------------------------------------- mappings


def test_runs_come_under_a_mapping_and_leave_it(small_file: int, segment: Segment) -> None:
    segment.fill(KEY, 0, page(5) + page(1) + page(2), fp(page(5)) + fp(page(1)) + fp(page(2)))
    runs = u32(1, 1, 2)
    with mmap.mmap(small_file, SMALL_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        assert native.map_runs(mapping, 4, segment.fileno(), runs) == 1
        assert mapping[:] == SMALL_PAGES[:SMALL_SIZE]
        assert native.compare_runs(mapping, 4, small_file, runs) == 1
        # The mapping shows the segment, not the file.
        segment.fill(KEY, 2, page(6), fp(page(6)))
        assert mapping[2 * PAGE_SIZE : 3 * PAGE_SIZE] == page(6)
        assert native.compare_runs(mapping, 4, small_file, runs) == 0
        native.map_file(mapping, small_file, 2, 1, random=True)
        assert mapping[:] == SMALL_PAGES[:SMALL_SIZE]
        assert native.map_runs(mapping, 4, segment.fileno(), b"") == 0


def test_no_run_reaches_past_a_mapping(small_file: int, segment: Segment) -> None:
    with mmap.mmap(small_file, SMALL_SIZE, mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
        for runs in (u32(3, 0, 2), u32(4, 0, 1), u32(0xFFFFFFFF, 0, 2), u32(0, 0, 1, 0, 0, 0xFFFFFFFF)):
            with pytest.raises(NativeError, match="outside the mapping"):
                native.map_runs(mapping, 4, segment.fileno(), runs)
            with pytest.raises(NativeError, match="outside the mapping"):
                native.compare_runs(mapping, 4, small_file, runs)
        assert mapping[:] == SMALL_PAGES[:SMALL_SIZE]
        for call in (
            lambda: native.map_runs(mapping, 5, segment.fileno(), b""),
            lambda: native.map_runs(mapping, 4, segment.fileno(), bytes(8)),
            lambda: native.map_file(mapping, small_file, 3, 2),
            lambda: native.map_file(mapping, small_file, -1, 1),
            lambda: native.compare_runs(mapping, 5, small_file, b""),
        ):
            with pytest.raises(ValueError, match=r"."):
                call()


# --------------------------------------------------------------------------------------------------------- leases


def test_a_writer_breaks_a_lease_and_the_watch_says_so(disk_path: Path) -> None:
    # In a process of its own: the watch blocks signals, and must be opened before there are threads.
    path = disk_path / "file"
    path.write_bytes(b"x")
    code = """
import errno, os, select, sys
from sharearea.common import native
from sharearea.common.errors import NativeError
path = sys.argv[1]
watch = native.lease_watch_open()
fd = os.open(path, os.O_RDONLY)
native.lease_take(fd)
print(native.lease_held(fd), native.lease_watch_read(watch) == ([], False))
try:
    os.open(path, os.O_WRONLY | os.O_NONBLOCK)
except BlockingIOError:
    print("writer waits")
select.select([watch], [], [])
print(native.lease_watch_read(watch) == ([fd], False), native.lease_held(fd))
native.lease_release(fd)
native.lease_release(fd)
writer = os.open(path, os.O_WRONLY)
try:
    native.lease_take(fd)
except NativeError as error:
    print(error.errno == errno.EAGAIN, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "True True",
        "writer waits",
        "True False",
        "True sa_lease_take: somebody has the file open for writing",
    ]


def test_no_lease_is_no_lease(small_file: int) -> None:
    assert not native.lease_held(small_file)
    native.lease_release(small_file)
    assert fcntl.fcntl(small_file, fcntl.F_GETLEASE) == fcntl.F_UNLCK


# ----------------------------------------------------------------------------------------------------- page table


def test_a_table_does_what_it_says(table: NativePageTable) -> None:
    fps = fp(page(1)) + fp(bytes(PAGE_SIZE)) + fp(page(2)) + fp(page(1))
    ids = table.intern(fps)
    one, zero, two, again = numbers(ids)
    assert (zero, again) == (0, one)
    assert table.fps(ids) == fps
    assert table.count(ids) == (1, 0, 1)
    table.mark(ids, 0)
    table.mark(u32(one), 3)
    assert table.want(ids, 2) == u32(0)
    assert table.want(ids, 2) == b""
    table.unwant(u32(one))
    assert table.want(ids, 2) == u32(0)
    assert table.publish(u32(one, two), u32(4, 5)) == b""
    assert numbers(table.slots(ids)) == [4, NO_SLOT, 5, 4]
    assert table.runs(u32(one, two), None, 8) == u32(0, 4, 2)
    assert table.runs(u32(one, two), u32(3, 7), 8) == u32(3, 4, 1, 7, 5, 1)
    table.map(u32(0, 4, 2))
    assert table.live(0, 5) == (u32(4), u32(one), 1)
    assert table.live(0, 1 << 40) == (u32(4, 5), u32(one, two), 2)
    totals = table.totals()
    assert (totals.pages, totals.slots_used, totals.slots_mapped, totals.mappings, totals.pending) == (2, 2, 2, 2, 0)
    assert totals.by_holders == (0, 1, 1, 0, 0, 0, 0, 0)
    assert totals.memory_bytes > 0
    table.unmark(u32(one), 3)
    table.forget(0)
    assert table.totals().by_holders == (2, 0, 0, 0, 0, 0, 0, 0)
    assert table.unref(ids) == b""
    assert table.unmap(u32(0, 4, 2)) == u32(4, 5)
    assert table.totals().pages == 0


def test_a_full_table_takes_nothing(table: NativePageTable) -> None:
    table.intern(b"".join(fp(page(i)) for i in range(7)))
    with pytest.raises(TableFull):
        table.intern(fp(page(10)) + fp(page(11)))
    assert table.totals().pages == 7
    table.intern(fp(page(10)))


# ------------------------------------------------------------------------------------------------------ lifetimes


def arguments_of(method: Callable[..., object]) -> list[object]:
    """Arguments of the right kind for a method, by the names of its parameters."""
    kinds: dict[str, object] = {
        "key": KEY,
        "pages": b"",
        "want": b"",
        "fps": b"",
        "ids": b"",
        "slots": b"",
        "runs": b"",
    }
    return [kinds.get(name, 1) for name in inspect.signature(method).parameters]


def use(made: object, name: str) -> None:
    """Read a property, or call a method."""
    value = getattr(made, name)
    value(*arguments_of(value))


@pytest.mark.parametrize("make", [lambda: Segment.create("test", 1), lambda: NativePageTable(SEED, bytes(32), 1, 1)])
def test_everything_but_close_raises_after_close(make: Callable[[], Segment | NativePageTable]) -> None:
    made = make()
    assert not made.closed
    made.close()
    made.close()
    assert made.closed
    names = [n for n in dir(type(made)) if not n.startswith("_") and n not in ("close", "closed", "create", "adopt")]
    assert len(names) >= 8
    for name in names:
        with pytest.raises(Closed, match="is closed"):
            use(made, name)


def test_closing_waits_for_a_call_in_another_thread(segment: Segment) -> None:
    want = fp(page(0)) * 8
    started = threading.Event()
    outcomes: list[bytes | type[Exception]] = []

    def work() -> None:
        try:
            while True:
                outcomes.append(segment.verify(KEY, 0, want))
                started.set()
        except Closed as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    segment.close()
    thread.join()
    assert outcomes[-1] is Closed
    assert set(outcomes[:-1]) == {bytes(8)}


def test_closing_gives_the_descriptor_back() -> None:
    segment = Segment.create("test", 1)
    fd = segment.fileno()
    segment.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)

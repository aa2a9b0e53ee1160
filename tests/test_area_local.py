"""The local area on real memfds: filling, moving, adopting, and what happens when the host has nothing left."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from sharearea.area.base import Area
from sharearea.area.local import LocalArea
from sharearea.common.errors import AreaFull, Closed, HostError, VerificationFailed
from sharearea.common.native import SEGMENT_HEADER, Segment

KEY = bytes(range(32))
PER_SEGMENT = 512
SEGMENT_BYTES = SEGMENT_HEADER + PER_SEGMENT * 4096


def pages(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count * 4096)


def hashed(data: bytes, key: bytes = KEY) -> bytes:
    return b"".join(blake3(data[at : at + 4096], key=key).digest() for at in range(0, len(data), 4096))


def packed(*slots: int) -> bytes:
    return struct.pack(f"<{len(slots)}I", *slots)


def in_slot(area: LocalArea, slot: int) -> bytes:
    number, inside = divmod(slot, PER_SEGMENT)
    return os.pread(area.fd(number), 4096, SEGMENT_HEADER + inside * 4096)


@pytest.fixture
def area() -> Iterator[LocalArea]:
    with LocalArea("blue", KEY, PER_SEGMENT, 8 * SEGMENT_BYTES) as area:
        yield area


def test_it_is_an_area(area: LocalArea) -> None:
    held: Area = area
    assert (held.pool, held.slots_per_segment) == ("blue", PER_SEGMENT)


def test_filling_opens_a_segment_once_and_says_so(area: LocalArea) -> None:
    data = pages(20)
    ok, opened = area.fill(5, data, hashed(data))
    assert ok == b"\1" * 20
    info = os.fstat(area.fd(0))
    assert opened == ((0, info.st_dev, info.st_ino),)
    assert in_slot(area, 6) == data[4096:8192]
    assert area.fill(100, data, hashed(data)) == (ok, ())
    _, opened = area.fill(3 * PER_SEGMENT, data, hashed(data))
    assert opened[0][0] == 3
    assert area.segments() == (0, 3)
    assert [os.readlink(f"/proc/self/fd/{area.fd(n)}") for n in (0, 3)] == [
        f"/memfd:sharearea-blue-{n} (deleted)" for n in (0, 3)
    ]
    assert area.writable(0)
    assert not area.writable(1)


def test_memory_is_what_was_filled(area: LocalArea) -> None:
    assert area.allocated_bytes() == 0
    area.fill(0, pages(30), bytes(30 * 32))
    area.fill(PER_SEGMENT, pages(30), bytes(30 * 32))
    assert 60 * 4096 <= area.allocated_bytes() <= 2 * SEGMENT_BYTES
    area.close_segment(0)
    assert 30 * 4096 <= area.allocated_bytes() <= SEGMENT_BYTES


def test_a_page_that_is_not_what_was_wanted_is_not_ok(area: LocalArea) -> None:
    data = pages(8)
    want = bytearray(hashed(data))
    want[3 * 32] ^= 1
    assert area.fill(0, data, bytes(want))[0] == b"\1\1\1\0\1\1\1\1"
    assert area.fill(0, data, hashed(data, key=bytes(32)))[0] == bytes(8)


@pytest.mark.parametrize("first", [-1, PER_SEGMENT - 4, 2 * PER_SEGMENT - 1])
def test_a_fill_stays_in_one_segment(area: LocalArea, first: int) -> None:
    with pytest.raises(ValueError, match="one segment"):
        area.fill(first, pages(5), bytes(5 * 32))
    assert area.segments() == ()


def test_a_fill_that_cannot_be_leaves_no_segment(area: LocalArea) -> None:
    with pytest.raises(ValueError, match="fingerprints"):
        area.fill(0, pages(5), bytes(4 * 32))
    assert area.segments() == ()


def test_moving_takes_pages_in_any_order_from_any_segment(area: LocalArea) -> None:
    data = pages(2 * PER_SEGMENT)
    want = hashed(data)
    half = PER_SEGMENT * 4096
    area.fill(0, data[:half], want[: PER_SEGMENT * 32])
    area.fill(PER_SEGMENT, data[half:], want[PER_SEGMENT * 32 :])
    order = [9, 7, 8, *range(PER_SEGMENT - 3, PER_SEGMENT + 3), 3, 3, 2, 0, PER_SEGMENT]
    wanted = b"".join(want[slot * 32 : slot * 32 + 32] for slot in order)
    ok, opened = area.move(packed(*order), 2 * PER_SEGMENT + 10, wanted)
    assert ok == b"\1" * len(order)
    assert [number for number, _, _ in opened] == [2]
    for i, slot in enumerate(order):
        assert in_slot(area, 2 * PER_SEGMENT + 10 + i) == data[slot * 4096 : slot * 4096 + 4096]
    assert area.verify(0, want) == b"\1" * (2 * PER_SEGMENT)
    assert area.move(b"", 2 * PER_SEGMENT, b"") == (b"", ())
    with pytest.raises(HostError, match="no segment 7"):
        area.move(packed(0, 7 * PER_SEGMENT), 2 * PER_SEGMENT, bytes(64))


def test_verify_goes_through_segments_and_says_no_for_missing_ones(area: LocalArea) -> None:
    data = pages(4)
    want = hashed(data)
    area.fill(PER_SEGMENT - 2, data[:8192], want[:64])
    assert area.verify(PER_SEGMENT - 2, want) == b"\1\1\0\0"
    area.fill(PER_SEGMENT, data[8192:], want[64:])
    assert area.verify(PER_SEGMENT - 2, want) == b"\1\1\1\1"
    assert area.verify(PER_SEGMENT - 2, bytes(128)) == bytes(4)
    assert area.verify(0, b"") == b""


def test_nobody_else_can_write_a_segment(area: LocalArea) -> None:
    area.fill(0, pages(1), bytes(32))
    again = os.open(f"/proc/self/fd/{area.fd(0)}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, SEGMENT_BYTES)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", SEGMENT_HEADER)
    os.close(again)


# ---------------------------------------------------------------------------------------------------- adopting


def test_an_adopted_segment_is_read_and_never_written(area: LocalArea) -> None:
    data = pages(6)
    want = hashed(data)
    _, ((number, dev, ino),) = area.fill(0, data, want)
    kept = os.dup(area.fd(0))
    area.close()
    with LocalArea("blue", KEY, PER_SEGMENT, 8 * SEGMENT_BYTES) as heir:
        heir.adopt(number, kept, dev, ino)
        os.close(kept)
        assert not heir.writable(0)
        assert heir.verify(0, want) == b"\1" * 6
        with pytest.raises(HostError, match="adopted"):
            heir.fill(8, data, want)
        ok, _ = heir.move(packed(5, 4), PER_SEGMENT, want[5 * 32 :] + want[4 * 32 : 5 * 32])
        assert ok == b"\1\1"
        with pytest.raises(ValueError, match="already"):
            heir.adopt(number, heir.fd(0), dev, ino)


def test_what_is_not_the_segment_is_refused(area: LocalArea, tmp_path: Path) -> None:
    other = Segment.create("other", PER_SEGMENT)
    larger = Segment.create("larger", PER_SEGMENT + 1)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SEGMENT_BYTES)
    plain = os.open(tmp_path / "plain", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, SEGMENT_BYTES)
    dev, ino = other.identity()
    with pytest.raises(VerificationFailed, match="store says"):
        area.adopt(0, other.fileno(), dev, ino + 1)
    with pytest.raises(VerificationFailed, match="store says"):
        area.adopt(0, other.fileno(), dev + 1, ino)
    for fd in (larger.fileno(), unsealed, plain):
        info = os.fstat(fd)
        with pytest.raises(VerificationFailed, match="segment 0 of pool blue"):
            area.adopt(0, fd, info.st_dev, info.st_ino)
    os.close(plain)
    with pytest.raises(VerificationFailed, match=os.strerror(errno.EBADF)):
        area.adopt(0, plain, dev, ino)
    assert area.segments() == ()
    area.adopt(0, other.fileno(), dev, ino)
    assert area.segments() == (0,)
    other.close()
    larger.close()
    os.close(unsealed)


# -------------------------------------------------------------------------------------------------------- limits


def test_the_limit_counts_whole_segments() -> None:
    with LocalArea("small", KEY, PER_SEGMENT, 2 * SEGMENT_BYTES + 1) as small:
        for number in (0, 1):
            small.fill(number * PER_SEGMENT, pages(1), bytes(32))
        with pytest.raises(AreaFull, match="limit"):
            small.fill(2 * PER_SEGMENT, pages(1), bytes(32))
        small.fill(PER_SEGMENT + 1, pages(1), bytes(32))
        small.close_segment(0)
        small.fill(2 * PER_SEGMENT, pages(1), bytes(32))
        assert small.segments() == (1, 2)


def test_no_descriptor_left_is_a_full_area(area: LocalArea) -> None:
    other = Segment.create("other", PER_SEGMENT)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
    spare = []
    try:
        while True:
            try:
                spare.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(AreaFull, match="descriptor"):
            area.fill(0, pages(1), bytes(32))
        with pytest.raises(AreaFull, match="adopted"):
            area.adopt(0, other.fileno(), *other.identity())
        assert area.segments() == ()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in spare:
            os.close(fd)
    area.fill(0, pages(1), bytes(32))
    other.close()


_NO_MEMORY = """
import resource
from sharearea.area.local import LocalArea
from sharearea.common.errors import AreaFull
area = LocalArea("blue", bytes(32), 16384, 1 << 40)
page = bytes(4096)
area.fill(0, page, bytes(32))
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
try:
    area.fill(16384, page, bytes(32))
except AreaFull as error:
    assert "memory" in error.message, error.message
else:
    raise SystemExit("a segment of 64 MiB in 32 MiB of address space")
assert area.segments() == (0,)
area.fill(1, page, bytes(32))
"""


def test_no_memory_left_is_a_full_area() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", _NO_MEMORY], env=environment, check=True)


def test_a_long_pool_name_is_cut() -> None:
    with LocalArea("\U0001f40d" * 64, KEY, PER_SEGMENT, SEGMENT_BYTES * 100) as snakes:
        snakes.fill(99 * PER_SEGMENT, pages(1), bytes(32))
        name = os.readlink(f"/proc/self/fd/{snakes.fd(99)}")
    assert name.startswith("/memfd:sharearea-\U0001f40d\U0001f40d")
    assert name.endswith("-99 (deleted)")


# ------------------------------------------------------------------------------------------------------ lifetime


def test_closing_gives_everything_back() -> None:
    before = os.listdir("/proc/self/fd")
    area = LocalArea("blue", KEY, PER_SEGMENT, 8 * SEGMENT_BYTES)
    for number in range(4):
        area.fill(number * PER_SEGMENT, pages(1), bytes(32))
    area.close_segment(2)
    area.close_segment(2)
    assert area.segments() == (0, 1, 3)
    with pytest.raises(HostError, match="no segment 2"):
        area.fd(2)
    area.close()
    area.close()
    assert os.listdir("/proc/self/fd") == before
    calls: list[Callable[[], object]] = [
        lambda: area.fill(0, pages(1), bytes(32)),
        lambda: area.move(packed(0), 1, bytes(32)),
        lambda: area.verify(0, bytes(32)),
        lambda: area.adopt(0, 0, 0, 0),
        lambda: area.fd(0),
        lambda: area.writable(0),
        lambda: area.close_segment(0),
        area.segments,
        area.allocated_bytes,
    ]
    for call in calls:
        with pytest.raises(Closed):
            call()


@pytest.mark.parametrize(("key", "slots"), [(bytes(31), 5), (KEY, 0)])
def test_an_impossible_area_is_refused(key: bytes, slots: int) -> None:
    with pytest.raises(ValueError, match=r"^a (key|segment)"):
        LocalArea("blue", key, slots, 1 << 30)

"""The store against a plain model of it: what survives kills, full disks, damaged files, other boots and formats."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea import store as store_module
from sharearea.common.errors import Closed, StoreError, StoreFull
from sharearea.model import (
    Change,
    OwnerCleared,
    OwnerSet,
    PoolOpened,
    Records,
    SegmentClosed,
    SegmentOpened,
    SlotsFilled,
    SlotsFreed,
)
from sharearea.store import FORMAT, SLOTS_PER_RECORD, Store

BOOT = "0f0e0d0c-boot"
PER_SEGMENT = 300  # more than a record, and no multiple of one
ZERO = bytes(32)


# ------------------------------------------------------------------------------------------------- the plain model


@dataclass
class PlainPool:
    area: bytes
    slots_per_segment: int
    segments: dict[int, tuple[int, int]] = field(default_factory=dict)
    slots: dict[int, bytes] = field(default_factory=dict)  # slot -> fingerprint, used slots only
    owners: dict[tuple[str, int], OwnerSet] = field(default_factory=dict)


Plain = dict[str, PlainPool]


def change_plain(plain: Plain, change: Change) -> None:
    match change:
        case PoolOpened():
            pool = plain.get(change.pool)
            if pool is None or (pool.area, pool.slots_per_segment) != (change.area, change.slots_per_segment):
                plain[change.pool] = PlainPool(change.area, change.slots_per_segment)
        case SegmentOpened():
            plain[change.pool].segments[change.segment] = (change.dev, change.ino)
        case SegmentClosed():
            pool = plain[change.pool]
            pool.segments.pop(change.segment, None)
            pool.slots = {s: fp for s, fp in pool.slots.items() if s // pool.slots_per_segment != change.segment}
        case SlotsFilled():
            for i in range(len(change.fingerprints) // 32):
                fingerprint = change.fingerprints[i * 32 : i * 32 + 32]
                plain[change.pool].slots.pop(change.first + i, None)
                if fingerprint != ZERO:
                    plain[change.pool].slots[change.first + i] = fingerprint
        case SlotsFreed():
            for (slot,) in struct.iter_unpack("<I", change.slots):
                plain[change.pool].slots.pop(slot, None)
        case OwnerSet():
            plain[change.pool].owners[change.domain, change.file] = change
        case OwnerCleared():
            plain[change.pool].owners.pop((change.domain, change.file), None)
        case _:
            assert_never(change)


def plain_of(records: Records) -> Plain:
    """Return loaded records slot by slot; no slot may be in two of them."""
    plain: Plain = {}
    for name, record in records.items():
        pool = plain[name] = PlainPool(record.area, record.slots_per_segment, record.segments, {}, record.owners)
        for first, fingerprints in record.slots.items():
            assert 0 < len(fingerprints) <= SLOTS_PER_RECORD * 32
            assert fingerprints.strip(b"\0")
            for i in range(len(fingerprints) // 32):
                assert first + i not in pool.slots
                if fingerprints[i * 32 : i * 32 + 32] != ZERO:
                    pool.slots[first + i] = fingerprints[i * 32 : i * 32 + 32]
    return plain


def packed(slots: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(slots)}I", *slots)


def fingerprints(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count * 32)


def owner(domain: str, file: int, nruns: int = 3, pool: str = "blue", nstretches: int = 2) -> OwnerSet:
    """An owner as on `xen`; without stretches of references as on `local`."""
    rng = random.Random(file)
    instance, runs, refs = rng.randbytes(16), rng.randbytes(nruns * 12), rng.randbytes(nstretches * 8)
    return OwnerSet(pool, domain, instance, file, runs, rng.randrange(1, 0x7FF0) if refs else 0, refs)


BLUE = PoolOpened("blue", b"A" * 16, PER_SEGMENT)


def reopened(path: Path) -> Records:
    with_store, records, said = Store.open(path, boot_id=BOOT)
    assert said is None
    with_store.close()
    return records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened, records, said = Store.open(path, boot_id=BOOT)
    assert records == {}
    assert said is None
    with opened:
        yield opened


# ------------------------------------------------------------------------------------------------------- changes


def test_everything_comes_back(store: Store, path: Path) -> None:
    changes: list[Change] = [
        BLUE,
        SegmentOpened("blue", 0, 7, 2**64 - 1),
        SlotsFilled("blue", 10, fingerprints(20)),
        owner("web-1", 4),
        PoolOpened("red", b"B" * 16, 2**32 - 1),
        SlotsFilled("red", 2**32 - 2, fingerprints(1)),
        owner("web-1", 2**32 - 1, pool="red"),
    ]
    store.apply(changes)
    plain: Plain = {}
    for change in changes:
        change_plain(plain, change)
    assert plain_of(store.load()) == plain
    store.close()
    assert plain_of(reopened(path)) == plain
    assert store.path.stat().st_mode & 0o777 == 0o700
    assert (path / "data.mdb").stat().st_mode & 0o777 == 0o600


def test_a_long_stretch_is_split_at_records_and_segments(store: Store) -> None:
    data = fingerprints(700)
    store.apply([BLUE, SlotsFilled("blue", 100, data)])
    slots = store.load()["blue"].slots
    assert {first: len(value) // 32 for first, value in slots.items()} == {100: 200, 300: 255, 555: 45, 600: 200}
    assert b"".join(slots[first] for first in sorted(slots)) == data


def test_a_whole_record_takes_two_pages(store: Store, path: Path) -> None:
    store.apply([PoolOpened("blue", b"A" * 16, 1 << 20)])
    records = 400
    store.apply([SlotsFilled("blue", 255 * i, fingerprints(255, i)) for i in range(records)])
    store.close()
    with lmdb.open(str(path), readonly=True, lock=False) as env:
        assert env.stat()["overflow_pages"] == 2 * records


def test_freeing_clears_slots_and_removes_empty_records(store: Store) -> None:
    data = fingerprints(300)
    store.apply([BLUE, SlotsFilled("blue", 0, data)])
    scattered = [299, 3, 4, 5, 3, 9, 255, 256, 200, 100_000]
    store.apply([SlotsFreed("blue", packed(scattered))])
    left = plain_of(store.load())["blue"].slots
    assert set(left) == set(range(300)) - set(scattered)
    store.apply([SlotsFreed("blue", packed(range(255)))])
    assert list(store.load()["blue"].slots) == [255]


def test_the_order_of_changes_counts(store: Store) -> None:
    one, two = fingerprints(4, 1), fingerprints(2, 2)
    store.apply(
        [
            BLUE,
            SlotsFilled("blue", 0, one),
            SlotsFreed("blue", packed([0, 1, 2, 3])),
            SlotsFilled("blue", 1, two),
            owner("a", 1),
            OwnerCleared("blue", "a", 1),
            OwnerCleared("blue", "b", 1),
            owner("b", 1),
            SegmentOpened("blue", 2, 1, 1),
            SlotsFilled("blue", 600, one),
            SlotsFreed("blue", packed([601])),
            SegmentClosed("blue", 2),
        ]
    )
    pool = plain_of(store.load())["blue"]
    assert pool.slots == {1: two[:32], 2: two[32:]}
    assert list(pool.owners) == [("b", 1)]
    assert pool.segments == {}


def test_a_closed_segment_takes_its_slots_along_and_no_others(store: Store) -> None:
    store.apply([BLUE, PoolOpened("red", b"B" * 16, PER_SEGMENT)])
    for pool in ("blue", "red"):
        store.apply([SegmentOpened(pool, n, 1, n) for n in range(3)])
        store.apply([SlotsFilled(pool, 0, fingerprints(900))])
    store.apply([SegmentClosed("blue", 1)])
    records = store.load()
    assert list(records["blue"].segments) == [0, 2]
    assert set(plain_of(records)["blue"].slots) == set(range(300)) | set(range(600, 900))
    assert set(plain_of(records)["red"].slots) == set(range(900))


def test_the_last_segment_of_all_can_be_closed(store: Store) -> None:
    store.apply([PoolOpened("blue", b"A" * 16, 1 << 16), PoolOpened("red", b"A" * 16, 1 << 16)])
    store.apply([SlotsFilled("blue", 2**32 - 300, fingerprints(300)), SlotsFilled("red", 0, fingerprints(1))])
    store.apply([SegmentClosed("blue", 2**16 - 1)])
    assert store.load()["blue"].slots == {}
    assert list(store.load()["red"].slots) == [0]


def test_a_pool_with_another_area_begins_anew(store: Store) -> None:
    store.apply([BLUE, PoolOpened("red", b"B" * 16, 9), owner("a", 1), owner("a", 2, pool="red")])
    store.apply([SegmentOpened("blue", 0, 1, 1), SlotsFilled("blue", 0, fingerprints(3)), BLUE])
    assert plain_of(store.load())["blue"].slots
    store.apply([owner("b", 1), PoolOpened("blue", b"C" * 16, 77), owner("c", 1)])
    records = store.load()
    assert (records["blue"].area, records["blue"].slots_per_segment) == (b"C" * 16, 77)
    assert (records["blue"].segments, records["blue"].slots) == ({}, {})
    assert list(records["blue"].owners) == [("c", 1)]
    assert list(records["red"].owners) == [("a", 2)]


def test_the_longest_names_fit(store: Store, path: Path) -> None:
    pool, domain = "\U0001f40d" * 64, "\U0001f40b" * 64
    store.apply([PoolOpened(pool, b"A" * 16, 5), owner(domain, 1, pool=pool), owner(domain[:63], 2, pool=pool)])
    store.close()
    assert set(reopened(path)[pool].owners) == {(domain, 1), (domain[:63], 2)}


def test_the_largest_owner_fits(store: Store) -> None:
    largest = owner("a", 1, nruns=65_536, nstretches=65_536)
    local = owner("b", 1, nruns=65_536, nstretches=0)
    store.apply([BLUE, largest, local])
    assert store.load()["blue"].owners == {("a", 1): largest, ("b", 1): local}


@pytest.mark.parametrize(
    "change",
    [
        SegmentOpened("green", 0, 1, 1),
        SegmentOpened("blue", 2**32, 1, 1),
        SegmentOpened("blue", 0, 1, 2**64),
        SlotsFilled("blue", 2**32 - 1, fingerprints(2)),
        SlotsFilled("blue", -1, fingerprints(2)),
        SlotsFilled("blue", 0, b"short"),
        SlotsFreed("blue", b"odd"),
        OwnerSet("blue", "a", b"short", 1, b""),
        OwnerSet("blue", "a", bytes(16), 1, b"odd"),
        OwnerSet("blue", "a", bytes(16), 1, b"", 1, b"7 bytes"),
        OwnerSet("blue", "a", bytes(16), 1, b"", 2**32, b""),
        OwnerSet("blue", "a", bytes(16), 1, b"", -1, b""),
        OwnerSet("blue", "a", bytes(16), 2**32, b""),
        OwnerSet("blue", "a" * 257, bytes(16), 1, b""),
        OwnerSet("blue", "\ud800", bytes(16), 1, b""),
        OwnerCleared("green", "a", 1),
        SegmentClosed("blue", 2**32),
        PoolOpened("red", b"short", 1),
        PoolOpened("red", bytes(16), 0),
        PoolOpened("\ud800", bytes(16), 1),
    ],
    ids=repr,
)
def test_a_change_that_makes_no_sense_writes_nothing(store: Store, change: Change) -> None:
    store.apply([BLUE])
    before = store.load()
    with pytest.raises(StoreError):
        store.apply([PoolOpened("red", b"R" * 16, 5), owner("a", 1), SlotsFilled("blue", 0, fingerprints(2)), change])
    with pytest.raises(StoreError, match="red"):
        store.apply([SlotsFilled("red", 0, fingerprints(1))])
    assert store.load() == before


def test_reset_forgets_everything(store: Store, path: Path) -> None:
    store.apply([BLUE, owner("a", 1), SlotsFilled("blue", 0, fingerprints(300))])
    store.reset()
    assert store.load() == {}
    with pytest.raises(StoreError, match="blue"):
        store.apply([owner("a", 1)])
    store.apply([BLUE])
    store.close()
    assert list(reopened(path)) == ["blue"]


def test_a_closed_store_raises(store: Store) -> None:
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [store.load, store.size_bytes, store.reset, lambda: store.apply([BLUE])]
    for call in calls:
        with pytest.raises(Closed):
            call()


_names = st.sampled_from(["blue", "red"])
_slots = st.integers(0, 100)
_fingerprints = st.one_of(st.just(ZERO), st.integers(1, 255).map(lambda n: bytes([n]) * 32))
_changes = st.one_of(
    st.builds(PoolOpened, _names, st.sampled_from([b"A" * 16, b"B" * 16]), st.just(40)),
    st.builds(SegmentOpened, _names, st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
    st.builds(SegmentClosed, _names, st.integers(0, 3)),
    st.builds(
        SlotsFilled,
        _names,
        _slots,
        st.lists(_fingerprints, max_size=60).map(b"".join),
    ),
    st.builds(SlotsFreed, _names, st.lists(st.integers(0, 160), max_size=60).map(packed)),
    st.builds(SlotsFreed, _names, st.tuples(_slots, _slots).map(lambda ab: packed(range(min(ab), max(ab))))),
    st.builds(owner, st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3), _names, st.integers(0, 3)),
    st.builds(OwnerCleared, _names, st.sampled_from("ab"), st.integers(0, 3)),
)


@given(st.lists(st.lists(_changes, max_size=8), max_size=8))
def test_any_changes_do_what_the_model_does(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Change]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "index"
    start: list[Change] = [PoolOpened("blue", b"A" * 16, 40), PoolOpened("red", b"A" * 16, 40)]
    plain: Plain = {}
    store, _, _ = Store.open(path, boot_id=BOOT)
    with store:
        for batch in [start, *batches]:
            store.apply(batch)
            for change in batch:
                change_plain(plain, change)
            assert plain_of(store.load()) == plain
    assert plain_of(reopened(path)) == plain
    shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------------- kills


def stream(i: int) -> list[Change]:
    """Return the changes of transaction i of an endless stream."""
    if i == 0:
        return [BLUE]
    rng = random.Random(i)
    changes: list[Change] = []
    for _ in range(rng.randrange(1, 6)):
        first = rng.randrange(2000)
        choices: list[Change] = [
            SegmentOpened("blue", rng.randrange(8), 1, i),
            SegmentClosed("blue", rng.randrange(8)),
            SlotsFilled("blue", first, fingerprints(rng.randrange(1, 400), i)),
            SlotsFreed("blue", packed(range(first, first + rng.randrange(400)))),
            owner("a", rng.randrange(20), rng.choice([1, 5, 50_000]), nstretches=rng.choice([0, 1, 700])),
            OwnerCleared("blue", "a", rng.randrange(20)),
        ]
        changes.append(rng.choice(choices))
    # Every transaction leaves a mark, so that no two states are equal, and the mark is its last change.
    return [*changes, OwnerSet("blue", "mark", bytes(16), 0, struct.pack("<III", i, 0, 0))]


def _apply_stream(path: Path, start: int, ack: int) -> None:
    store, _, _ = Store.open(path, boot_id=BOOT)
    while True:
        store.apply(stream(start))
        os.write(ack, struct.pack("<I", start))
        start += 1


def test_a_kill_at_any_moment_leaves_a_prefix_of_the_transactions(path: Path) -> None:
    rng = random.Random(1)
    plain: Plain = {}
    applied = 0  # transactions that are in `plain`
    for _ in range(40):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _apply_stream(path, applied, write_end)
            finally:
                os._exit(1)
        os.close(write_end)
        acked = b""
        for _ in range(rng.randrange(1, 12)):
            acked += os.read(read_end, 4)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        while more := os.read(read_end, 4096):
            acked += more
        os.close(read_end)
        committed = struct.unpack("<I", acked[-4:])[0] + 1
        for i in range(applied, committed):
            for change in stream(i):
                change_plain(plain, change)
        applied = committed
        found = plain_of(reopened(path))
        if found != plain:  # killed after the next commit and before its acknowledgement
            for change in stream(applied):
                change_plain(plain, change)
            applied += 1
        assert found == plain


# ------------------------------------------------------------------------------------------------------ no room


def test_the_map_grows_by_itself(path: Path) -> None:
    store, _, _ = Store.open(path, boot_id=BOOT, initial_bytes=1)
    with store:
        store.apply([BLUE])
        assert store.size_bytes() < 1 << 20
        large = [owner("a", i, 60_000) for i in range(12)]
        store.apply(large)
        assert list(store.load()["blue"].owners.values()) == large
        assert store.size_bytes() > 8 << 20
    # A map that is asked to be smaller than what is there.
    store, records, _ = Store.open(path, boot_id=BOOT, initial_bytes=1)
    with store:
        assert list(records["blue"].owners.values()) == large
        store.apply([owner("a", 12, 60_000)])


def test_at_its_limit_nothing_is_written_and_things_can_still_be_removed(path: Path) -> None:
    limit = 4 << 20
    store, _, _ = Store.open(path, boot_id=BOOT, max_bytes=limit, initial_bytes=1 << 16)
    with store:
        store.apply([BLUE])
        done = _fill_up(store)
        assert store.size_bytes() <= limit
        before = store.load()
        assert len(before["blue"].owners) == done
        with pytest.raises(StoreFull, match="limit"):
            store.apply([OwnerCleared("blue", "a", 0), owner("b", 1, 60_000)])
        assert store.load() == before
        for file in range(done):
            store.apply([OwnerCleared("blue", "a", file)])
        assert store.load()["blue"].owners == {}
        assert _fill_up(store) > done * 3 // 4  # LMDB wants one stretch for each value
        store.reset()
        assert store.load() == {}


def test_everything_can_be_removed_at_once_at_the_limit(path: Path) -> None:
    limit = 2 << 20
    store, _, _ = Store.open(path, boot_id=BOOT, max_bytes=limit)
    with store:
        store.apply([PoolOpened("blue", b"A" * 16, 1 << 20)])
        slots = 0
        try:
            while True:  # records of one slot each, every other slot: thousands of them on hundreds of pages
                batch = range(slots, slots + 200, 2)
                store.apply([SlotsFilled("blue", slot, b"x" * 32) for slot in batch])
                slots += 200
        except StoreFull:
            assert slots > 10_000
        # Each of those pages is written anew before the old one is free.
        store.apply([SlotsFreed("blue", packed(range(slots)))])
        assert store.load()["blue"].slots == {}
        assert store.size_bytes() <= limit + store_module._RESERVE_BYTES
        assert _fill_up(store) > 10
        assert store.size_bytes() <= limit  # the reserve is for removing only


def _fill_up(store: Store) -> int:
    """Add owners until there is no room for another of their size; return how many."""
    for file in range(100_000):
        try:
            store.apply([owner("a", file, 5_000)])
        except StoreFull:
            return file
    raise AssertionError("the store never was full")


def _run_here(function: str, *args: str, under: Sequence[str] = ()) -> None:
    """Run a function of this file in a new process, which fails loudly if it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    call = [*under, sys.executable, "-c", f"import sys, test_store; test_store.{function}(*sys.argv[1:])", *args]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def child_hits_file_size_limit(path: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store, _, _ = Store.open(Path(path), boot_id=BOOT)
    store.apply([BLUE])
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Once on a page boundary and once inside a page, where the write is cut short instead of refused.
    for limit in (1 << 20, (2 << 20) + 1234):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        start = len(store.load()["blue"].owners)
        done = _fill_from(store, start)
        assert done > start
        before = store.load()
        assert len(before["blue"].owners) == done
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.apply([owner("a", done, 5_000)])
        assert len(store.load()["blue"].owners) == done + 1
    store.close()


def _fill_from(store: Store, file: int) -> int:
    """Add owners and slots from `file` on until the disk is full; return the first that found no room."""
    while True:
        before = store.load()
        try:
            store.apply([owner("a", file, 5_000), SlotsFilled("blue", 255 * file, fingerprints(255, file))])
        except StoreFull as error:
            full = error
            break
        file += 1
    assert "disk" in full.message  # and not the store's own limit
    assert store.load() == before
    return file


def test_a_file_size_limit_is_a_full_disk(path: Path) -> None:
    _run_here("child_hits_file_size_limit", str(path))
    assert len(reopened(path)["blue"].owners) > 10


def child_fills_disk(folder: str) -> None:
    ballast = Path(folder, "ballast")
    ballast.write_bytes(bytes(1 << 20))
    store, _, _ = Store.open(Path(folder, "index"), boot_id=BOOT)
    store.apply([BLUE])
    done = _fill_from(store, 0)
    assert done > 5
    ballast.unlink()
    store.apply([owner("a", done, 5_000)])
    store.close()
    assert len(reopened(Path(folder, "index"))["blue"].owners) == done + 1
    # And a disk without room for even an empty store.
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, os.statvfs(folder).f_bavail * 4096)
    with pytest.raises(StoreError):
        Store.open(Path(folder, "other"), boot_id=BOOT)


def test_a_full_disk(tmp_path: Path) -> None:
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'
    folder = str(tmp_path)
    try:
        tried = subprocess.run([*own, mount, folder, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare(1)")
    if tried.returncode != 0:
        pytest.skip(f"no small file system of one's own here: {tried.stderr.strip()}")
    _run_here("child_fills_disk", folder, under=[*own, mount, folder])


# ------------------------------------------------------------------------------------- what is there at the start


def _made(path: Path, transactions: int = 40) -> Plain:
    store, _, _ = Store.open(path, boot_id=BOOT)
    plain: Plain = {}
    with store:
        for i in range(transactions):
            store.apply(stream(i))
            for change in stream(i):
                change_plain(plain, change)
    return plain


def _assert_aside(path: Path, word: str, number: int = 1) -> None:
    """Open the store, which must be new, and find the old one beside it."""
    data = (path / "data.mdb").read_bytes()
    store, records, said = Store.open(path, boot_id=BOOT)
    with store:
        target = path.with_name(f"{path.name}.set-aside-{number}")
        assert said is not None
        assert word in said
        assert str(target) in said
        assert records == {}
        assert (target / "data.mdb").read_bytes() == data
        store.apply([BLUE, owner("a", 1)])
        assert path.stat().st_mode & 0o777 == 0o700
    assert list(reopened(path)) == ["blue"]


def test_a_store_of_another_boot_is_thrown_away(path: Path, tmp_path: Path) -> None:
    _made(path)
    store, records, said = Store.open(path, boot_id="another boot")
    with store:
        assert records == {}
        assert said is not None
        assert "earlier boot" in said
        store.apply([BLUE])
    assert list(tmp_path.iterdir()) == [path]
    store, records, said = Store.open(path, boot_id="another boot")
    store.close()
    assert list(records) == ["blue"]
    assert said is None


@pytest.mark.parametrize("size", [1, 4095, 4096, 8191, 8192, 8193, 12288, 0.5, 0.9])
def test_a_truncated_file_is_set_aside(path: Path, size: float) -> None:
    _made(path)
    data = path / "data.mdb"
    os.truncate(data, int(data.stat().st_size * size) if size < 1 else int(size))
    _assert_aside(path, "damaged")


def test_any_truncated_file_is_whole_or_set_aside(path: Path, tmp_path: Path) -> None:
    plain = _made(path)
    whole = (path / "data.mdb").read_bytes()
    for i in range(20):
        copy = tmp_path / f"copy-{i}"
        copy.mkdir()
        (copy / "data.mdb").write_bytes(whole[: random.Random(i).randrange(1, len(whole))])
        _assert_whole_or_aside(copy, plain)
    copy = tmp_path / "last-page"
    copy.mkdir()
    (copy / "data.mdb").write_bytes(whole[:-4096])
    _assert_whole_or_aside(copy, plain)


def test_garbage_is_whole_or_set_aside(path: Path, tmp_path: Path) -> None:
    plain = _made(path)
    whole = (path / "data.mdb").read_bytes()
    pages = len(whole) // 4096
    aside = 0
    for i in range(60):
        rng = random.Random(i)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4, 64])):
            # Not the two meta pages: an older meta page is a good, older store to LMDB, and tested apart.
            at = rng.randrange(2, pages) * 4096
            offset, size = rng.choice([(0, 4096), (0, 16), (16, 64), (rng.randrange(4000), 1)])
            data[at + offset : at + offset + size] = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size])
        copy = tmp_path / f"copy-{i}"
        copy.mkdir()
        (copy / "data.mdb").write_bytes(data)
        aside += _assert_whole_or_aside(copy, plain)
    assert aside > 10


def _assert_whole_or_aside(path: Path, plain: Plain) -> bool:
    store, records, said = Store.open(path, boot_id=BOOT)
    with store:
        if said is None:
            assert plain_of(records) == plain
        else:
            assert "damaged" in said
            assert records == {}
        store.apply([PoolOpened("new", b"N" * 16, 5), owner("n", 1, 60_000, pool="new")])
        assert "new" in store.load()
    return said is not None


def test_a_lost_record_is_noticed(path: Path) -> None:
    """A leaf page that says it has one key fewer is well formed, and so is every record that is left on it."""
    store, _, _ = Store.open(path, boot_id=BOOT)
    with store:
        store.apply([BLUE, SlotsFilled("blue", 0, fingerprints(2)), owner("a", 1)])
    data = bytearray((path / "data.mdb").read_bytes())
    for at in range(2 * 4096, len(data), 4096):
        flags, lower = struct.unpack_from("<HH", data, at + 10)
        if flags == 2 and lower > 16 + 2:  # P_LEAF; the header is 16 bytes, each key's place takes 2
            struct.pack_into("<H", data, at + 12, lower - 2)
    (path / "data.mdb").write_bytes(data)
    _assert_aside(path, "damaged")


def test_a_file_of_noise_is_set_aside(path: Path) -> None:
    path.mkdir()
    (path / "data.mdb").write_bytes(random.Random(0).randbytes(1 << 20))
    _assert_aside(path, "damaged")


@pytest.mark.parametrize("kind", [b"p", b"g", b"s", b"o"])
def test_a_record_that_does_not_decode_sets_the_store_aside(path: Path, kind: bytes) -> None:
    store, _, _ = Store.open(path, boot_id=BOOT)
    with store:
        store.apply([BLUE, SegmentOpened("blue", 0, 1, 1), SlotsFilled("blue", 0, fingerprints(9)), owner("a", 1)])
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        cursor = txn.cursor()
        assert cursor.set_range(kind)
        key, value = cursor.item()
        assert key[:1] == kind
        changed = bytearray(value)
        changed[7] ^= 1
        txn.put(key, bytes(changed))
    _assert_aside(path, "damaged")


def _put_raw(path: Path, key: bytes, body: bytes) -> None:
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        txn.put(key, store_module._sealed(key, body))


_KEY = store_module._NUMBERED.pack
_OWNER = store_module._OWNER.pack


@pytest.mark.parametrize(
    ("key", "body"),
    [
        (b"x", b""),
        (_KEY(b"s", 1, 5), bytes(31)),
        (_KEY(b"s", 1, 5), b""),
        (_KEY(b"s", 1, 5), b"x" * 32 * 256),
        (_KEY(b"s", 1, 299), b"x" * 32 * 2),
        (_KEY(b"s", 1, 8), b"x" * 32 * 5),
        (_KEY(b"s", 2, 0), b"x" * 32),
        (_KEY(b"s", 1, 0) + b"x", b"x" * 32),
        (_KEY(b"g", 1, 0), bytes(15)),
        (_KEY(b"o", 1, 0), bytes(23)),
        (_KEY(b"o", 1, 0), bytes(25)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 1)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 3)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 1) + bytes(7)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 1) + bytes(8 + 11)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 2) + bytes(8 + 12)),
        (_KEY(b"o", 1, 0), _OWNER(bytes(16), 1, 2**32 - 1) + bytes(8 + 12)),
        (b"o" + bytes([0, 0, 0, 1, 0xFF, 0, 0, 0, 0]), _OWNER(bytes(16), 0, 0)),
        (store_module._POOL.pack(b"p", 2), b"\x93\xa4blue\xc4\x10" + bytes(16) + b"\x05"),
        (store_module._POOL.pack(b"p", 2), b"\x93\xa3red\xc4\x0f" + bytes(15) + b"\x05"),
        (store_module._POOL.pack(b"p", 2), b"\x93\xa3red\xc4\x10" + bytes(16) + b"\x00"),
        (store_module._POOL.pack(b"p", 2), b"\x93"),
    ],
    ids=lambda value: f"{bytes(value[:10]).hex()}-{len(value)}",
)
def test_a_well_sealed_record_of_nonsense_sets_the_store_aside(path: Path, key: bytes, body: bytes) -> None:
    store, _, _ = Store.open(path, boot_id=BOOT)
    with store:
        store.apply([BLUE, SlotsFilled("blue", 10, fingerprints(9))])
    _put_raw(path, key, body)
    _assert_aside(path, "damaged")


def test_another_format_is_set_aside(path: Path) -> None:
    _made(path, 3)
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        old = txn.get(b"mformat")
        assert isinstance(old, bytes)
        txn.put(b"mformat", old[:-4] + struct.pack("<I", FORMAT + 1))
    _assert_aside(path, "format")


def test_a_database_that_is_not_ours_is_set_aside(path: Path) -> None:
    path.mkdir()
    with lmdb.open(str(path)) as env, env.begin(write=True) as txn:
        txn.put(b"somebody", b"else's")
    _assert_aside(path, "no index of this program")


def test_a_store_whose_maker_was_killed_at_once_is_new(path: Path) -> None:
    path.mkdir()
    lmdb.open(str(path)).close()
    assert reopened(path) == {}


def test_three_stores_are_kept_aside(path: Path, tmp_path: Path) -> None:
    for number in range(1, 6):
        _made(path, number)
        os.truncate(path / "data.mdb", 5000 + number)
        _assert_aside(path, "damaged", number)
        shutil.rmtree(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"index.set-aside-{n}" for n in (3, 4, 5)]


# ------------------------------------------------------------------------------------------------------- folders


def test_one_store_at_a_time(store: Store, path: Path) -> None:
    with pytest.raises(StoreError, match="in use"):
        Store.open(path, boot_id=BOOT)
    store.apply([BLUE])
    store.close()
    assert list(reopened(path)) == ["blue"]


def test_a_folder_that_cannot_be_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "index", tmp_path / "missing" / "index"):
        with pytest.raises(StoreError) as raised:
            Store.open(path, boot_id=BOOT)
        assert raised.value.hint
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_open_folder_is_closed_to_others(path: Path) -> None:
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    reopened(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_opening_leaves_no_descriptor_behind(path: Path, tmp_path: Path) -> None:
    _made(path, 3)
    (tmp_path / "file").write_text("not a folder")

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        reopened(path)
        with pytest.raises(StoreError):
            Store.open(tmp_path / "file", boot_id=BOOT)
        os.truncate(path / "data.mdb", 6000)
        store, _, _ = Store.open(path, boot_id=BOOT)
        with pytest.raises(StoreError):
            Store.open(path, boot_id=BOOT)
        store.close()
    assert descriptors() == before

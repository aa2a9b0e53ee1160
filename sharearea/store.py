"""The index on disk: which pools, segments, slots and owners there are, in one LMDB environment.

`apply` writes a list of changes in one transaction, `open` and `load` give back the records that they add up to. The
index lives as long as the area, that is, until the host reboots: it holds the boot id, and a store of another boot is
thrown away. So nothing is ever synced to disk: what a killed process wrote to a file is in the page cache, and a host
that crashes loses the area too. What the records mean is index.py's business, whether slots still hold what the records
say is the area's.

Layout, one unnamed database; integers in keys are big-endian so that keys sort by them, in values little-endian:

  m "format"              "sharearea index", u32
  m "boot"                boot id, text
  p pool                  msgpack [name, area (16 bytes), slots per segment]
  g pool segment          dev u64, ino u64
  s pool first            up to 255 fingerprints: the slots first, first + 1, ... of one segment
  o pool domain file      instance (16 bytes), domid u32, stretches u32, grant references (8 bytes a stretch), runs (12
                          bytes each)

pool, segment, first and file are u32. Every value but those of "m" ends in a CRC-32 of its key and itself, for LMDB has
no checksums and would pass on what a broken disk or a stray write made of them. Pools are numbered in the order in
which they came, because LMDB's keys end at 511 bytes and a name of 64 characters may have 256. No slot is in two
records, and no record is all zero.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import faulthandler
import fcntl
import os
import re
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias, assert_never, cast

import lmdb
import msgpack

from .common.errors import Closed, StoreError, StoreFull
from .common.wire import FINGERPRINT_SIZE
from .model import (
    Change,
    OwnerCleared,
    OwnerSet,
    PoolOpened,
    PoolRecord,
    Records,
    SegmentClosed,
    SegmentOpened,
    SlotsFilled,
    SlotsFreed,
)

FORMAT: Final = 2
MAX_BYTES: Final = 8 << 30
"""Default bound of the store. 8 GiB hold the fingerprints of an area of 1 TiB."""
INITIAL_BYTES: Final = 64 << 20
"""Default size of the first map. It is address space, not memory and not disk."""
SLOTS_PER_RECORD: Final = 255
"""8160 bytes, their CRC and LMDB's page header of 16 fill two database pages and touch no third one."""
MAX_SET_ASIDE: Final = 3

# Removing things writes new pages before old ones are free. A store that has reached its bound may go this far beyond
# it for a transaction that only removes, or nothing could ever be removed from it again.
_RESERVE_BYTES: Final = 16 << 20

_PAGE: Final = 4096
_MAGIC: Final = b"sharearea index"
_FORMAT_KEY: Final = b"mformat"
_BOOT_KEY: Final = b"mboot"
_POOL: Final = struct.Struct(">cI")
_NUMBERED: Final = struct.Struct(">cII")
_SEGMENT: Final = struct.Struct("<QQ")
_FILE: Final = struct.Struct(">I")
_OWNER: Final = struct.Struct("<16sII")
_CRC: Final = struct.Struct("<I")
_DOMAIN_BYTES: Final = 256  # 64 characters; the key is then 265 bytes of LMDB's 511
_ID: Final = 16
_RUN: Final = 12
_STRETCH: Final = 8
_U32: Final = 1 << 32

# What a full disk, quota or file size limit (RLIMIT_FSIZE) looks like; LMDB passes the system's error on as text.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_REMOVES: Final = (SegmentClosed, SlotsFreed, OwnerCleared)

_Finding: TypeAlias = Literal["good", "empty", "other-boot", "other-format", "damaged", "unreadable"]


class _Undecodable(Exception):
    """A record is not what this format writes. Never leaves this module."""


class Store:
    """Keep the index of one broker. One thread at a time; one process at a time, which a lock on the folder sees to."""

    def __init__(self, path: Path, env: lmdb.Environment, lock: int, max_bytes: int, boot_id: str) -> None:
        """Take over what open() made ready; call that instead."""
        self.path = path
        self._env: lmdb.Environment | None = env
        self._lock = lock
        self._boot_id = boot_id
        self._max_bytes = _whole_pages(max_bytes)
        self._map_bytes = env.info()["map_size"]
        self._pools: _Pools = {}  # name -> (number, slots per segment)

    @classmethod
    def open(
        cls, path: Path, *, boot_id: str, max_bytes: int = MAX_BYTES, initial_bytes: int = INITIAL_BYTES
    ) -> tuple[Store, Records, str | None]:
        """Open or create the store in the folder `path`, and return it with its records.

        The third value says in plain words what was thrown away (a store of another boot) or set aside (one that is
        damaged or of another format: its folder is renamed to `<path>.set-aside-<n>`, of which the last MAX_SET_ASIDE
        are kept), and is None when the store was used as it was, or there was none.

        An existing store is first read by a forked child, because LMDB may crash on a damaged file: call this before
        the process has threads. Raises StoreError when the folder cannot be used: no right, no room, or another
        process has the store open.
        """
        try:
            lock = _lock_folder(path)
        except OSError as error:
            raise StoreError(
                f"the store {path} cannot be used: {os.strerror(error.errno or errno.EIO)}",
                f"check that {path.parent} exists and may be written by this user",
            ) from None
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: os.close(lock))
            said: str | None = None
            try:
                finding, why = _examine(path, boot_id)
                if finding == "unreadable":
                    raise StoreError(f"the store {path} cannot be read: {why}")
                if finding == "other-boot":
                    (path / "data.mdb").unlink()
                    said = f"the store {path} was of an earlier boot of this host and was thrown away"
                elif finding in ("other-format", "damaged"):
                    target = _set_aside(path)
                    fresh = _lock_folder(path)
                    os.close(lock)
                    lock = fresh
                    said = f"the store {path} {why}; it was set aside as {target} and a new one begun"
                env = _open_env(path, max(_data_bytes(path), min(initial_bytes, max_bytes)))
            except (lmdb.Error, OSError) as error:
                raise _translated(error, f"the store {path} cannot be opened") from None
            undo.callback(env.close)
            store = cls(path, env, lock, max_bytes, boot_id)
            store._begin()
            records = store.load()
            undo.pop_all()
        return store, records, said

    # ---------------------------------------------------------------------------------------------------- writing

    def apply(self, changes: Sequence[Change]) -> None:
        """Write all changes, in their order, in one transaction. An empty sequence writes nothing.

        Opening a pool that is there with another area forgets its segments, slots and owners first. Freeing what is
        free, closing a segment and clearing an owner that are not there change nothing.

        Raises StoreFull when the store's bound or the disk is reached, StoreError when it cannot be written or a
        change makes no sense (an unknown pool, a number out of range). Nothing was written then.
        """
        if not changes:
            return
        removes = all(isinstance(change, _REMOVES) for change in changes)
        self._write(lambda txn, pools: _Batch(txn, pools).apply(changes), removes)

    def reset(self) -> None:
        """Forget all pools with everything in them, as if the store were new. Raises as apply() does."""

        def forget(txn: lmdb.Transaction[bytes], pools: _Pools) -> None:
            txn.drop(self._open_env().open_db(None, txn=txn), delete=False)
            self._write_meta(txn)
            pools.clear()

        self._write(forget, removes=True)

    def _begin(self) -> None:
        def meta(txn: lmdb.Transaction[bytes], _: _Pools) -> None:
            if txn.get(_FORMAT_KEY) is None:
                self._write_meta(txn)

        self._write(meta, removes=True)

    def _write_meta(self, txn: lmdb.Transaction[bytes], _: _Pools | None = None) -> None:
        txn.put(_FORMAT_KEY, _MAGIC + struct.pack("<I", FORMAT))
        txn.put(_BOOT_KEY, self._boot_id.encode())

    def _write(self, work: _Work, removes: bool) -> None:
        """Run `work` in one transaction, in a larger map if it needs one."""
        env = self._open_env()
        limit = self._max_bytes + (_RESERVE_BYTES if removes else 0)
        aged = removes
        try:
            if self._map_bytes > limit:  # the reserve was in use; LMDB never shrinks a map below what is in it
                self._resize(env, limit)
            while True:
                pools = dict(self._pools)
                try:
                    with env.begin(write=True) as txn:
                        work(txn, pools)
                except lmdb.MapFullError:
                    if self._map_bytes >= limit and not aged:
                        # Pages that the last transaction freed can be used from the one after the next on
                        # (mdb_page_alloc). A failed one does not count, so without this one they never could be.
                        self._write(self._write_meta, removes=True)
                        aged = True
                        if self._map_bytes > limit:
                            self._resize(env, limit)
                    elif self._map_bytes >= limit:
                        raise StoreFull(
                            f"the store {self.path} has reached its limit of {self._max_bytes} bytes",
                            "raise the store's limit in the configuration",
                        ) from None
                    else:
                        self._resize(env, min(self._map_bytes * 2, limit))
                else:
                    self._pools = pools
                    return
        except (lmdb.Error, OSError, MemoryError) as error:
            if isinstance(error, lmdb.Error) and _has_no_room(self.path, error):
                raise StoreFull(f"the disk under the store {self.path} is full: {error}", "make room") from None
            raise _translated(error, f"the store {self.path} cannot be written") from None

    def _resize(self, env: lmdb.Environment, size: int) -> None:
        env.set_mapsize(size)
        self._map_bytes = env.info()["map_size"]

    # ---------------------------------------------------------------------------------------------------- reading

    def load(self) -> Records:
        """Return all records. Raises StoreError if they cannot be read."""
        env = self._open_env()
        try:
            with env.begin() as txn:
                numbered = _read_records(txn)
        except (lmdb.Error, _Undecodable) as error:
            raise _translated(error, f"the store {self.path} cannot be read") from None
        self._pools = {name: (number, record.slots_per_segment) for number, (name, record) in numbered.items()}
        return dict(numbered.values())

    def size_bytes(self) -> int:
        """Return the size of the store's file."""
        self._open_env()
        return _data_bytes(self.path)

    def close(self) -> None:
        """Close the store. Twice is fine; anything else raises Closed from now on."""
        if self._env is not None:
            self._env.close()
            self._env = None
            os.close(self._lock)

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the store."""
        self.close()

    def _open_env(self) -> lmdb.Environment:
        if self._env is None:
            raise Closed("the store is closed")
        return self._env


_Pools: TypeAlias = dict[str, tuple[int, int]]
_Work: TypeAlias = "Callable[[lmdb.Transaction[bytes], _Pools], None]"


class _Batch:
    """The changes of one transaction on their way into LMDB.

    What many changes may touch is gathered, read once, and written in the order of its keys: owners, and the slot
    records that existed before. New slot records are written at once, so that a cursor sees where every record is.
    """

    def __init__(self, txn: lmdb.Transaction[bytes], pools: _Pools) -> None:
        self._txn = txn
        self._cursor = txn.cursor()
        self._pools = pools
        self._owners: dict[bytes, bytes | None] = {}
        self._records: dict[bytes, bytearray] = {}

    def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self._change(change)
        self._flush()

    def _change(self, change: Change) -> None:
        match change:
            case PoolOpened():
                self._open_pool(change)
            case SegmentOpened():
                number, _ = self._pool(change.pool)
                _check_range("device", change.dev, 1 << 64)
                _check_range("inode", change.ino, 1 << 64)
                self._put(_key(b"g", number, change.segment), _SEGMENT.pack(change.dev, change.ino))
            case SegmentClosed():
                self._close_segment(change)
            case SlotsFilled():
                self._fill(change)
            case SlotsFreed():
                self._free(change)
            case OwnerSet():
                number, _ = self._pool(change.pool)
                _check_column("instance", change.instance, _ID, count=1)
                _check_column("runs", change.runs, _RUN)
                _check_column("references", change.refs, _STRETCH)
                _check_range("domid", change.domid, _U32)
                self._owners[_owner_key(number, change.domain, change.file)] = (
                    _OWNER.pack(change.instance, change.domid, len(change.refs) // _STRETCH) + change.refs + change.runs
                )
            case OwnerCleared():
                number, _ = self._pool(change.pool)
                self._owners[_owner_key(number, change.domain, change.file)] = None
            case _:
                assert_never(change)

    def _pool(self, name: str) -> tuple[int, int]:
        try:
            return self._pools[name]
        except KeyError:
            raise StoreError(f"the store has no pool {name!r}") from None

    def _open_pool(self, change: PoolOpened) -> None:
        _check_column("area", change.area, _ID, count=1)
        if not 0 < change.slots_per_segment < _U32:
            raise StoreError(f"a segment of {change.slots_per_segment} slots")
        value = _packed([change.pool, change.area, change.slots_per_segment])
        known = self._pools.get(change.pool)
        number = known[0] if known else max((number for number, _ in self._pools.values()), default=0) + 1
        key = _POOL.pack(b"p", number)
        if known and self._txn.get(key) != _sealed(key, value):
            self._flush()
            for kind in (b"g", b"s", b"o"):
                self._delete(_POOL.pack(kind, number), _POOL.pack(kind, number + 1))
        self._put(key, value)
        self._pools[change.pool] = (number, change.slots_per_segment)

    def _close_segment(self, change: SegmentClosed) -> None:
        number, per_segment = self._pool(change.pool)
        self._txn.delete(_key(b"g", number, change.segment))
        start = _key(b"s", number, change.segment * per_segment)
        end = min((change.segment + 1) * per_segment, _U32)
        # No record crosses a segment, so the records that begin in it are the records in it.
        last = _key(b"s", number, end) if end < _U32 else _POOL.pack(b"s", number + 1)
        for key in [key for key in self._records if start <= key < last]:
            del self._records[key]
        self._delete(start, last)

    def _fill(self, change: SlotsFilled) -> None:
        number, per_segment = self._pool(change.pool)
        data, first = memoryview(change.fingerprints), change.first
        _check_column("fingerprints", data, FINGERPRINT_SIZE)
        end = first + len(data) // FINGERPRINT_SIZE
        _check_range("slot", first, _U32)
        _check_range("slot", end, _U32 + 1)
        at = first
        while at < end:
            record = self._next_record(number, at)
            if record is None or record[0] >= end:
                self._put_new(number, per_segment, at, data[(at - first) * FINGERPRINT_SIZE :])
                return
            start, count = record
            if start > at:
                new = data[(at - first) * FINGERPRINT_SIZE : (start - first) * FINGERPRINT_SIZE]
                self._put_new(number, per_segment, at, new)
                at = start
            until = min(start + count, end)
            old = self._changed(number, start)
            old[(at - start) * FINGERPRINT_SIZE : (until - start) * FINGERPRINT_SIZE] = data[
                (at - first) * FINGERPRINT_SIZE : (until - first) * FINGERPRINT_SIZE
            ]
            at = until

    def _put_new(self, number: int, per_segment: int, first: int, data: memoryview) -> None:
        at = 0
        while at < len(data):
            room = min(SLOTS_PER_RECORD, per_segment - first % per_segment)
            piece = bytes(data[at : at + room * FINGERPRINT_SIZE])
            if piece.count(0) < len(piece):
                self._put(_key(b"s", number, first), piece)
            at += len(piece)
            first += room

    def _free(self, change: SlotsFreed) -> None:
        number, _ = self._pool(change.pool)
        _check_column("slots", change.slots, 4)
        slots = sorted(set(memoryview(change.slots).cast("I")))
        at = 0
        while at < len(slots):
            record = self._next_record(number, slots[at])
            if record is None:
                return
            start, count = record
            at = bisect.bisect_left(slots, start, lo=at)
            until = bisect.bisect_left(slots, start + count, lo=at)
            while at < until:
                # slots[i] - i stays the same as long as slots follow one another, and grows where they do not.
                after = bisect.bisect_right(range(until), slots[at] - at, lo=at, key=lambda i: slots[i] - i)
                offset = (slots[at] - start) * FINGERPRINT_SIZE
                size = (after - at) * FINGERPRINT_SIZE
                self._changed(number, start)[offset : offset + size] = bytes(size)
                at = after

    def _next_record(self, number: int, slot: int) -> tuple[int, int] | None:
        """Return (first slot, slots) of the record that holds `slot` or else of the one after it."""
        cursor, key = self._cursor, _key(b"s", number, slot)
        found = cursor.set_range(key)
        if not found or cursor.key() != key:
            # The records of the store itself ("m") come before all slots: there is always one before this place.
            _ = cursor.prev() if found else cursor.last()
            before = self._record_here(number)
            if before is not None and before[0] + before[1] > slot:
                return before
            cursor.set_range(key)
        return self._record_here(number)

    def _record_here(self, number: int) -> tuple[int, int] | None:
        key = self._cursor.key()
        if not key.startswith(_POOL.pack(b"s", number)):
            return None
        return _NUMBERED.unpack(key)[2], (len(self._cursor.value()) - _CRC.size) // FINGERPRINT_SIZE

    def _changed(self, number: int, start: int) -> bytearray:
        key = _key(b"s", number, start)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = bytearray(self._txn.get(key, b"")[: -_CRC.size])
        return record

    def _put(self, key: bytes, body: bytes | bytearray) -> None:
        self._txn.put(key, _sealed(key, body))

    def _delete(self, start: bytes, end: bytes) -> None:
        cursor = self._cursor
        more = cursor.set_range(start)
        while more and cursor.key() < end:
            more = cursor.delete() and bool(cursor.key())

    def _flush(self) -> None:
        for key, record in sorted(self._records.items()):
            if record.count(0) < len(record):
                self._put(key, record)
            else:
                self._txn.delete(key)
        for key, owner in sorted(self._owners.items()):
            if owner is not None:
                self._put(key, owner)
            else:
                self._txn.delete(key)
        self._records.clear()
        self._owners.clear()


# --------------------------------------------------------------------------------------------- records in and out


def _key(kind: bytes, pool: int, number: int) -> bytes:
    _check_range("slot or segment", number, _U32)
    return _NUMBERED.pack(kind, pool, number)


def _owner_key(pool: int, domain: str, file: int) -> bytes:
    _check_range("file", file, _U32)
    try:
        name = domain.encode()
    except UnicodeEncodeError:
        raise StoreError(f"the domain name {domain!r} cannot be encoded") from None
    if len(name) > _DOMAIN_BYTES:
        raise StoreError(f"a domain name of {len(name)} bytes; {_DOMAIN_BYTES} are allowed")
    return _POOL.pack(b"o", pool) + name + _FILE.pack(file)


def _packed(value: object) -> bytes:
    try:
        return cast(bytes, msgpack.packb(value))
    except (ValueError, OverflowError) as error:
        raise StoreError(f"a record cannot be encoded: {error}") from None


def _sealed(key: bytes, body: bytes | bytearray) -> bytes:
    return bytes(body) + _CRC.pack(zlib.crc32(body, zlib.crc32(key)))


def _unsealed(key: bytes, value: bytes) -> bytes:
    body = value[: -_CRC.size]
    if value[-_CRC.size :] != _CRC.pack(zlib.crc32(body, zlib.crc32(key))):
        raise _Undecodable("a record's checksum is wrong")
    return body


def _check_range(what: str, value: int, end: int) -> None:
    if not 0 <= value < end:
        raise StoreError(f"{what} {value} is out of range")


def _check_column(what: str, column: bytes | memoryview, width: int, count: int | None = None) -> None:
    if len(column) % width or (count is not None and len(column) != width * count):
        raise StoreError(f"{what}: {len(column)} bytes, in units of {width}")


def _decoded(txn: lmdb.Transaction[bytes]) -> Iterator[tuple[int, PoolOpened | SegmentOpened | SlotsFilled | OwnerSet]]:
    """Yield every record with the number of its pool, the pools first. Raises _Undecodable."""
    pools: dict[int, PoolOpened] = {}
    cursor = txn.cursor()
    if cursor.set_range(b"p"):
        for key, value in cursor:
            if key[:1] != b"p":
                break
            number, pool = _decode_pool(key, _unsealed(key, value))
            if any(pool.pool == other.pool for other in pools.values()):
                raise _Undecodable(f"pool {pool.pool!r} is there twice")
            pools[number] = pool
            yield number, pool
    free = (0, 0)  # (pool, slot): where the next slot record may begin
    entries = 0
    cursor.first()
    for key, value in cursor:
        entries += 1
        kind = key[:1]
        if kind in (b"m", b"p"):
            continue
        value = _unsealed(key, value)
        if kind not in (b"g", b"s", b"o") or len(key) < _NUMBERED.size:
            raise _Undecodable(f"a record with the key {key[:16]!r}")
        number = _POOL.unpack_from(key)[1]
        opened = pools.get(number)
        if opened is None:
            raise _Undecodable(f"a record of pool {number}, which is not there")
        if kind == b"o":
            yield number, _decode_owner(opened.pool, key, value)
            continue
        if len(key) != _NUMBERED.size:
            raise _Undecodable(f"a key of {len(key)} bytes")
        first = _NUMBERED.unpack(key)[2]
        if kind == b"g":
            if len(value) != _SEGMENT.size:
                raise _Undecodable(f"a segment of {len(value)} bytes")
            yield number, SegmentOpened(opened.pool, first, *_SEGMENT.unpack(value))
            continue
        count, rest = divmod(len(value), FINGERPRINT_SIZE)
        per_segment = opened.slots_per_segment
        if rest or not 0 < count <= min(SLOTS_PER_RECORD, per_segment - first % per_segment) or (number, first) < free:
            raise _Undecodable(f"{len(value)} bytes of fingerprints at slot {first}")
        free = (number, first + count)
        yield number, SlotsFilled(opened.pool, first, value)
    if entries != txn.stat()["entries"]:
        raise _Undecodable(f"{entries} records can be found, not all")


def _decode_pool(key: bytes, value: bytes) -> tuple[int, PoolOpened]:
    try:
        number = _POOL.unpack(key)[1]
        name, area, per_segment = msgpack.unpackb(value)
    except Exception as error:  # msgpack raises ValueError, its own classes and UnicodeDecodeError
        raise _Undecodable(f"a pool: {type(error).__name__}") from None
    if type(name) is not str or type(area) is not bytes or len(area) != _ID:
        raise _Undecodable("a pool without name or area")
    if type(per_segment) is not int or not 0 < per_segment < _U32:
        raise _Undecodable(f"pool {name!r} without a size of its segments")
    return number, PoolOpened(name, area, per_segment)


def _decode_owner(pool: str, key: bytes, value: bytes) -> OwnerSet:
    if len(value) < _OWNER.size:
        raise _Undecodable(f"an owner of {len(value)} bytes")
    instance, domid, stretches = _OWNER.unpack_from(value)
    runs = _OWNER.size + stretches * _STRETCH
    if len(value) < runs or (len(value) - runs) % _RUN:
        raise _Undecodable(f"an owner of {len(value)} bytes with {stretches} stretches of references")
    try:
        domain = key[_POOL.size : -_FILE.size].decode()
    except UnicodeDecodeError:
        raise _Undecodable("an owner whose name is no text") from None
    file = _FILE.unpack(key[-_FILE.size :])[0]
    return OwnerSet(pool, domain, instance, file, value[runs:], domid, value[_OWNER.size : runs])


def _read_records(txn: lmdb.Transaction[bytes]) -> dict[int, tuple[str, PoolRecord]]:
    """Return all records by the number of their pool."""
    pools: dict[int, tuple[str, PoolRecord]] = {}
    for number, item in _decoded(txn):
        match item:
            case PoolOpened():
                pools[number] = (item.pool, PoolRecord(item.area, item.slots_per_segment))
            case SegmentOpened():
                pools[number][1].segments[item.segment] = (item.dev, item.ino)
            case SlotsFilled():
                pools[number][1].slots[item.first] = item.fingerprints
            case OwnerSet():
                pools[number][1].owners[item.domain, item.file] = item
    return pools


# ------------------------------------------------------------------------------------------ files, folders, errors


def _whole_pages(size: int) -> int:
    return max(size + -size % _PAGE, 16 * _PAGE)


def _data_bytes(path: Path) -> int:
    try:
        return (path / "data.mdb").stat().st_size
    except FileNotFoundError:
        return 0


def _open_env(path: Path, map_bytes: int, readonly: bool = False) -> lmdb.Environment:
    # The folder's lock keeps others out, so LMDB's own is not needed; and its lock file, a shared mapping of a file
    # with holes, ends in SIGBUS on a full disk.
    return lmdb.open(
        os.fspath(path),
        map_size=_whole_pages(map_bytes),
        readonly=readonly,
        create=not readonly,
        lock=False,
        sync=False,
        metasync=False,
        map_async=False,
        writemap=False,
        mode=0o600,
        max_dbs=0,
    )


def _lock_folder(path: Path) -> int:
    """Create the folder if need be and lock it; return the descriptor that holds the lock."""
    while True:
        path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(
                    f"the store {path} is in use by another process", "is a broker running already?"
                ) from None
            locked = os.fstat(fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(locked, path.stat()):
                    if locked.st_uid != os.geteuid():
                        raise StoreError(f"the store {path} belongs to somebody else (uid {locked.st_uid})")
                    os.fchmod(fd, 0o700)
                    undo.pop_all()
                    return fd
        # Another process set this very folder aside between the two steps: take the new one.


def _set_aside(path: Path) -> Path:
    """Rename the folder, and forget the oldest of those that were set aside before."""
    pattern = re.compile(re.escape(path.name) + r"\.set-aside-([0-9]+)")
    older = sorted(
        (int(match[1]), entry)
        for entry in path.parent.iterdir()
        if (match := pattern.fullmatch(entry.name)) is not None
    )
    target = path.with_name(f"{path.name}.set-aside-{older[-1][0] + 1 if older else 1}")
    path.rename(target)
    for _, entry in older[: max(0, len(older) + 1 - MAX_SET_ASIDE)]:
        shutil.rmtree(entry)
    return target


def _translated(error: BaseException, what: str) -> StoreError:
    return StoreError(f"{what}: {str(error) or type(error).__name__}")


def _has_no_room(path: Path, error: lmdb.Error) -> bool:
    text = str(error)
    if any(os.strerror(code) in text for code in _FULL):
        return True
    if os.strerror(errno.EIO) not in text:
        return False
    # LMDB calls a write that was cut short an I/O error (mdb_page_flush). Ask the system what it was.
    try:
        fd = os.open(path / "data.mdb", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, os.fstat(fd).st_size, _PAGE)
    except OSError as probed:
        return probed.errno in _FULL
    finally:
        os.close(fd)
    return False


# ----------------------------------------------------------------------------------------- a look at what is there

# LMDB's own words for a file that it did not write like this. Everything else (no right, no memory) is no damage.
_DAMAGE: Final = (
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.InvalidError,
    lmdb.InvalidParameterError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
)


def _examine(path: Path, boot_id: str) -> tuple[_Finding, str]:
    """Say what the folder holds, and why, in words that follow "the store"; the caller has it locked.

    LMDB trusts its file: pages that are missing or make no sense end in SIGBUS, SIGSEGV or abort(). So a child reads
    all of it first, and dies in our stead.
    """
    if _data_bytes(path) == 0:
        return "empty", ""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        _examine_in_child(path, boot_id, write_end)
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "damaged", f"is damaged (reading it ends in {signal.Signals(os.WTERMSIG(status)).name})"
    finding, _, why = said.partition(" ")
    return cast(_Finding, finding), why


def _examine_in_child(path: Path, boot_id: str, write_end: int) -> None:
    said = "unreadable it could not be examined"
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # Pages that point to one another in a circle would keep LMDB busy for ever. A good store takes seconds.
        seconds = 60 + (_data_bytes(path) >> 24)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)  # where LMDB's assertions go
        finding, why = _findings(path, boot_id, null)
        said = f"{finding} {why}"
    except BaseException as error:
        said = f"unreadable {str(error) or type(error).__name__}"
    finally:
        with contextlib.suppress(BaseException):
            os.write(write_end, said.encode(errors="replace")[:4096])
        os._exit(0)


def _findings(path: Path, boot_id: str, null: int) -> tuple[_Finding, str]:
    try:
        env = _open_env(path, _data_bytes(path), readonly=True)
        with env.begin() as txn:
            written = txn.get(_FORMAT_KEY)
            if written is None:
                if env.stat()["entries"]:
                    return "damaged", "is damaged or no index of this program"
                return "empty", ""  # its maker was killed before the first transaction
            if written != _MAGIC + struct.pack("<I", FORMAT):
                return "other-format", f"has another format than this program's, which is {FORMAT}"
            if txn.get(_BOOT_KEY) != boot_id.encode():
                return "other-boot", ""
            for _ in _decoded(txn):
                pass
        # Walks the list of free pages, which no transaction shows. "Incompatible" are pages that nothing uses and the
        # list does not have: lost, not harmful.
        with contextlib.suppress(lmdb.IncompatibleError):
            env.copyfd(null, compact=True)
    except lmdb.VersionMismatchError as error:
        return "other-format", f"was written by another LMDB ({error})"
    except (_Undecodable, *_DAMAGE) as error:
        return "damaged", f"is damaged ({error})"
    return "good", ""

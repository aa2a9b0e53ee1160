"""The native core, typed: the only module that imports the extension.

Callers see ints, bytes and the classes Segment, Grants, NativePageTable, Tally, Ring and Vchan, never a pointer. Every
-errno becomes an exception in one place (`_MEANINGS`). What the functions do is said once, in native/api.h; the
docstrings here add the shapes of the Python side. A column is a packed array in this machine's (little-endian) byte
order: a fingerprint column has 32 bytes per page, an id, slot or position column 4, a run column 8 (first, count) or 12
(page, slot, count).

Columns go in as any contiguous bytes-like object and are not copied, unless 32-bit numbers in them are not aligned to 4
bytes. A column whose length is not a multiple of its element is a ValueError, and so is a number that does not fit its
C type. The GIL is released in every call: buffers must not change meanwhile. The classes hold a lock for the time of a
call, so that close() in another thread waits.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias

from .. import _native  # type: ignore[attr-defined]  # built; it has no source that mypy could read
from .errors import AreaFull, Closed, HostError, NativeError, ProtocolError, ShareareaError, TableFull

ffi: Any = _native.ffi
lib: Any = _native.lib

BytesLike: TypeAlias = bytes | bytearray | memoryview
"""A contiguous buffer of bytes."""

EXTENSION_FILE: Final[str] = _native.__file__
"""The extension itself; what the build makes besides lies in the same folder."""

PAGE_SIZE: Final[int] = lib.SA_PAGE_SIZE
FP_SIZE: Final[int] = lib.SA_FP_SIZE
SEGMENT_HEADER: Final[int] = lib.SA_SEGMENT_HEADER
SEED_SIZE: Final = 40
GRANTS_AT_ONCE: Final[int] = lib.SA_GRANTS_AT_ONCE
NO_SLOT: Final = 0xFFFFFFFF

KERNEL_RUNS: Final[int] = lib.SA_KERNEL_RUNS
KERNEL_NO_CPU: Final[int] = lib.SA_KERNEL_NO_CPU
KERNEL_NOT_BUILT: Final[int] = lib.SA_KERNEL_NOT_BUILT

PAGE_ABSENT: Final[int] = lib.SA_PAGE_ABSENT
PAGE_DATA: Final[int] = lib.SA_PAGE_DATA
PAGE_ZERO: Final[int] = lib.SA_PAGE_ZERO

SHARE_PAGE: Final[int] = lib.SA_SHARE_PAGE

RESIDENCY_AUTO: Final[int] = lib.SA_RESIDENCY_AUTO
RESIDENCY_CACHESTAT: Final[int] = lib.SA_RESIDENCY_CACHESTAT
RESIDENCY_MINCORE: Final[int] = lib.SA_RESIDENCY_MINCORE


# ---------------------------------------------------------------------------------------------------------- errors


class _Meaning(NamedTuple):
    """What one error number of one call says, where api.h or the call's use gives it more than strerror()."""

    error: type[ShareareaError | ValueError]
    text: str
    hint: str = ""


_NO_CACHESTAT = _Meaning(NativeError, "this kernel has no cachestat", "run Linux 6.5 or newer")
_NO_MEMORY = _Meaning(AreaFull, "the host has no memory for another segment")
_NO_DESCRIPTOR = _Meaning(AreaFull, "no file descriptor is left for another segment", "raise the limit on open files")
_TOO_MANY_MAPPINGS = _Meaning(NativeError, "this process has too many mappings", "raise vm.max_map_count")
_NO_XEN = _Meaning(
    HostError, "a device under /dev/xen is missing", "on Xen: modprobe xen-evtchn, xen-gntdev, in a guest xen-gntalloc"
)
_OUTSIDE_SEGMENT = _Meaning(NativeError, "slots outside the segment")
_NO_FRAME = _Meaning(HostError, "a slot has no memory: the area domain is gone, or its segment closed")
_IN_DOM0 = "run this as root in dom0 of a Xen host, with xen-utils installed and xen-privcmd loaded"

_MEANINGS: Final[dict[tuple[str, int], _Meaning]] = {
    ("sa_hash_select", errno.ENOENT): _Meaning(HostError, "there is no hash kernel of this name"),
    ("sa_hash_select", errno.ENOTSUP): _Meaning(HostError, "this CPU cannot run this hash kernel", 'use "auto"'),
    ("sa_hash_select", errno.ENOSYS): _Meaning(HostError, "this hash kernel is not in this build", 'use "auto"'),
    ("sa_cachestat", errno.ENOSYS): _NO_CACHESTAT,
    ("sa_drop_pages", errno.ENOSYS): _NO_CACHESTAT,
    ("sa_segment_create", errno.ENOMEM): _NO_MEMORY,
    ("sa_segment_create", errno.ENOSPC): _NO_MEMORY,
    ("sa_segment_create", errno.EMFILE): _NO_DESCRIPTOR,
    ("sa_segment_create", errno.ENFILE): _NO_DESCRIPTOR,
    ("sa_segment_adopt", errno.EPERM): _Meaning(NativeError, "the descriptor lacks the seals of a segment"),
    ("sa_segment_adopt", errno.EINVAL): _Meaning(NativeError, "the descriptor is no segment of this size"),
    ("sa_segment_fill", errno.ERANGE): _OUTSIDE_SEGMENT,
    ("sa_segment_fill", errno.EROFS): _Meaning(NativeError, "an adopted segment is read only"),
    ("sa_segment_verify", errno.ERANGE): _OUTSIDE_SEGMENT,
    ("sa_segment_read", errno.ERANGE): _OUTSIDE_SEGMENT,
    ("sa_map_runs", errno.ERANGE): _Meaning(NativeError, "a run lies outside the mapping"),
    ("sa_compare_runs", errno.ERANGE): _Meaning(NativeError, "a run lies outside the mapping"),
    ("sa_map_runs", errno.ENOMEM): _TOO_MANY_MAPPINGS,
    ("sa_map_file", errno.ENOMEM): _TOO_MANY_MAPPINGS,
    ("sa_grants_open", errno.ENOENT): _Meaning(
        HostError, "this system has no grant device", "run as a Xen guest, and load the module xen-gntdev"
    ),
    ("sa_grants_open", errno.EACCES): _Meaning(HostError, "no right to open the grant device", "run as root"),
    ("sa_grants_create", errno.EINVAL): _Meaning(
        NativeError, "a reference that is not granted to this domain, or the hypervisor has no room for more mappings"
    ),
    ("sa_grants_create", errno.ENOMEM): _TOO_MANY_MAPPINGS,
    ("sa_grants_place", errno.ERANGE): _Meaning(NativeError, "a run lies outside the mapping"),
    ("sa_grants_place", errno.ENOMEM): _TOO_MANY_MAPPINGS,
    ("sa_lease_take", errno.EAGAIN): _Meaning(NativeError, "somebody has the file open for writing"),
    ("sa_lease_take", errno.EACCES): _Meaning(
        NativeError, "no right to a lease on this file", "run as the file's owner or with CAP_LEASE"
    ),
    ("sa_ring_*", errno.EPROTO): _Meaning(ProtocolError, "the peer's ring counters make no sense"),
    ("sa_ring_*", errno.EINVAL): _Meaning(ValueError, "no rings have these orders"),
    ("sa_vchan_*", errno.EPROTO): _Meaning(ProtocolError, "the peer's rings make no sense"),
    ("sa_vchan_*", errno.ENOENT): _NO_XEN,
    ("sa_vchan_*", errno.ENODEV): _NO_XEN,
    ("sa_vchan_*", errno.ENXIO): _NO_XEN,
    ("sa_vchan_*", errno.EACCES): _Meaning(HostError, "no right to the devices under /dev/xen", "run as root"),
    ("sa_vchan_serve", errno.EINVAL): _Meaning(ValueError, "no rings have these orders, or no domain this number"),
    ("sa_vchan_serve", errno.ENOSPC): _Meaning(
        HostError, "xen-gntalloc has no pages left", "raise its parameter `limit`"
    ),
    ("sa_vchan_connect", errno.EBUSY): _Meaning(NativeError, "the rings do not wait for a client"),
    ("sa_vchan_connect", errno.EINVAL): _Meaning(NativeError, "no such grant or event channel for this domain"),
    ("sa_area_open", errno.ELIBACC): _Meaning(HostError, "Xen's libraries cannot be loaded", _IN_DOM0),
    ("sa_area_open", errno.ENOENT): _Meaning(HostError, "there is no /dev/xen/privcmd", _IN_DOM0),
    ("sa_area_open", errno.EACCES): _Meaning(HostError, "no right to /dev/xen/privcmd", _IN_DOM0),
    ("sa_area_open", errno.EPERM): _Meaning(HostError, "Xen refuses this domain its rights", _IN_DOM0),
    ("sa_area_open", errno.ESRCH): _Meaning(HostError, "there is no such domain"),
    ("sa_area_populate", errno.ENOMEM): _Meaning(
        AreaFull, "the host has no memory for more pages", "give guests or dom0 less (xl mem-set), or the host more"
    ),
    ("sa_area_fill", errno.ENXIO): _NO_FRAME,
    ("sa_area_read", errno.ENXIO): _NO_FRAME,
    ("sa_area_grant", errno.EBUSY): _Meaning(HostError, "a grant entry is not free"),
    ("sa_area_grant", errno.ENOSPC): _Meaning(HostError, "a grant reference lies beyond what the table may grow to"),
    ("sa_area_grant", errno.EINVAL): _Meaning(
        ValueError, "a grant reference that is reserved or given twice, or a domid"
    ),
    ("sa_area_revoke", errno.EINVAL): _Meaning(ValueError, "a grant reference that is reserved"),
    ("sa_area_revoke", errno.ERANGE): _Meaning(ValueError, "a grant reference beyond the table"),
    ("sa_area_*", errno.ERANGE): _Meaning(ValueError, "a slot that no grant entry can name"),
    ("sa_tally_*", errno.ENOSPC): _Meaning(
        HostError, "no room is left for the fingerprints of the estimate", "give --work-dir a folder with more room"
    ),
    ("sa_tally_*", errno.ENOMEM): _Meaning(HostError, "no memory is left for the estimate"),
    ("sa_tally_*", errno.EINVAL): _Meaning(ValueError, "no such root, or no file was begun, or one was not ended"),
    ("sa_tally_*", errno.ERANGE): _Meaning(ValueError, "a file, a group or a weight out of range"),
    ("sa_table_intern", errno.ENOSPC): _Meaning(TableFull, "the fingerprint table has no room for this report"),
    ("sa_table_*", errno.EINVAL): _Meaning(ValueError, "an id, a number or an array that the table does not take"),
    ("sa_table_*", errno.ERANGE): _Meaning(ValueError, "a slot was never used"),
    ("sa_table_*", errno.EEXIST): _Meaning(ValueError, "a slot is taken"),
}


def _error(call: str, number: int, about: str) -> ShareareaError | ValueError:
    family = "_".join(call.split("_")[:2]) + "_*"
    meaning = _MEANINGS.get((call, number)) or _MEANINGS.get((family, number))
    if meaning is None:
        meaning = _Meaning(NativeError, os.strerror(number))
    text = f"{about}: {meaning.text}" if about else meaning.text
    if issubclass(meaning.error, NativeError):
        return NativeError(call, number, text, meaning.hint)
    if issubclass(meaning.error, ShareareaError):
        return meaning.error(text, meaning.hint)
    return meaning.error(f"{call}: {text}")


def _call(call: str, *args: object, about: str = "") -> int:
    """Call a function of the core and turn -errno into an exception; `about` begins its text."""
    try:
        result = int(getattr(lib, call)(*args))
    except OverflowError as error:  # cffi, of a number that its C type cannot hold
        raise ValueError(f"{call}: {error}") from None
    if result < 0:
        raise _error(call, -result, about)
    return result


# --------------------------------------------------------------------------------------------------------- columns


def _column(data: BytesLike, size: int, what: str) -> tuple[Any, int]:
    """Pointer to a column of elements of `size` bytes, and how many there are. The pointer keeps the buffer alive."""
    column = ffi.from_buffer("uint8_t[]", data)
    count, rest = divmod(len(column), size)
    if rest:
        raise ValueError(f"{what}: {len(column)} bytes are no multiple of {size}")
    return column, count


def _words(data: BytesLike, words: int, what: str) -> tuple[Any, int]:
    """Like _column, for elements of `words` 32-bit numbers. Odd addresses are copied: C takes them to be aligned."""
    column, count = _column(data, 4 * words, what)
    if int(ffi.cast("uintptr_t", column)) % 4:
        data = bytes(data)
    return ffi.from_buffer("uint32_t[]", data), count


def _triples(data: BytesLike) -> tuple[Any, int]:
    """Like _words, for runs (page, slot, count) as C's struct sa_run."""
    words, count = _words(data, 3, "runs")
    if not count:
        return ffi.NULL, 0
    return ffi.from_buffer("struct sa_run[]", ffi.buffer(words)), count


def _fixed(data: BytesLike, size: int, what: str) -> Any:
    """Pointer to exactly `size` bytes."""
    column = ffi.from_buffer("uint8_t[]", data)
    if len(column) != size:
        raise ValueError(f"{what}: {size} bytes are needed, not {len(column)}")
    return column


def _key(key: BytesLike) -> Any:
    return _fixed(key, FP_SIZE, "key")


def _taken(column: Any, size: int) -> bytes:
    """The first `size` bytes of an out column."""
    return bytes(ffi.buffer(column, size)) if size else b""


def _same(what: str, count: int, other: str, other_count: int) -> None:
    if count != other_count:
        raise ValueError(f"{count} {what} and {other_count} {other}")


# ------------------------------------------------------------------------------------------------------------ hash


class HashKernel(NamedTuple):
    """A hash kernel by name, and whether it runs here (KERNEL_*)."""

    name: str
    state: int


def hash_kernels() -> list[HashKernel]:
    """List every kernel, built or not; the first defines the result of the others."""
    return [
        HashKernel(ffi.string(lib.sa_hash_kernel_name(i)).decode("ascii"), _call("sa_hash_kernel_state", i))
        for i in range(_call("sa_hash_kernel_count"))
    ]


def select_hash_kernel(name: str) -> None:
    """Choose the kernel for all later calls of this process; "auto" is the fastest that runs here.

    Raises HostError if it is unknown, not for this CPU or not in this build; the choice then stays what it was. Call it
    before other threads hash.
    """
    _call("sa_hash_select", name.encode(), about=f"hash kernel {name!r}")


def selected_hash_kernel() -> str:
    """Return the name of the kernel in use, never "auto"."""
    return str(ffi.string(lib.sa_hash_selected()).decode("ascii"))


def fingerprint_pages(key: BytesLike, pages: BytesLike) -> tuple[bytes, bytes]:
    """Fingerprint whole pages under a key of 32 bytes.

    Returns the fingerprint column and one byte per page, 1 where the page is all zero.
    """
    data, npages = _column(pages, PAGE_SIZE, "pages")
    fps = ffi.new("uint8_t[]", npages * FP_SIZE)
    zero = ffi.new("uint8_t[]", npages)
    _call("sa_fingerprint_pages", _key(key), data, npages, fps, zero)
    return _taken(fps, npages * FP_SIZE), _taken(zero, npages)


def file_root(size: int, fps: BytesLike) -> bytes:
    """Name the content of a file of `size` bytes by its pages' fingerprints: 32 bytes."""
    column, npages = _column(fps, FP_SIZE, "fingerprints")
    root = ffi.new("uint8_t[]", FP_SIZE)
    _call("sa_file_root", size, column, npages, root)
    return _taken(root, FP_SIZE)


# ------------------------------------------------------------------------------------------------------ page cache


def cachestat(fd: int, first: int = 0, npages: int = 0) -> tuple[int, int]:
    """Count the pages of a file's range that are cached, and those of them that are dirty or under writeback.

    npages 0 means to the end. Raises NativeError with errno ENOSYS on kernels before 6.5.
    """
    cached, dirty = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _call("sa_cachestat", fd, first, npages, cached, dirty)
    return int(cached[0]), int(dirty[0])


_FIRST_RUNS: Final = 1024


def resident_runs(fd: int, npages: int, how: int = RESIDENCY_AUTO) -> bytes:
    """Find the resident pages among the first npages of a file.

    Returns ascending, disjoint, maximal runs as packed pairs (first, count). how: RESIDENCY_*.
    """
    nruns, covered = ffi.new("size_t *"), ffi.new("uint64_t *")
    # Runs are maximal, so there is an absent page between any two: no file has more than this.
    most = npages // 2 + 1
    room = min(_FIRST_RUNS, most)
    while True:
        runs = ffi.new("uint32_t[]", 2 * room)
        _call("sa_resident_runs", fd, npages, how, runs, room, nruns, covered)
        if covered[0] >= npages or room >= most:
            return _taken(runs, 8 * int(nruns[0]))
        # Most files need one call. One that does not is looked at again from its start, so the room grows steeply.
        room = min(8 * room, most)


def fingerprint_file(fd: int, key: BytesLike, size: int, first: int, npages: int) -> tuple[bytes, bytes]:
    """Fingerprint the resident pages of a range of a file, without I/O.

    size is the file's size as the caller knows it. Returns the fingerprint column (zeroed where absent) and one byte
    PAGE_* per page.
    """
    fps = ffi.new("uint8_t[]", npages * FP_SIZE)
    states = ffi.new("uint8_t[]", npages)
    _call("sa_fingerprint_file", fd, _key(key), size, first, npages, fps, states)
    return _taken(fps, npages * FP_SIZE), _taken(states, npages)


def read_pages(fd: int, key: BytesLike, size: int, first: int, npages: int) -> tuple[bytearray, bytes, bytes]:
    """Read the resident pages of a range of a file, without I/O, with their fingerprints.

    Returns the bytes (4096 per page, zero-padded), the fingerprint column of exactly these bytes, and one byte PAGE_*
    per page.
    """
    pages = bytearray(npages * PAGE_SIZE)
    fps = ffi.new("uint8_t[]", npages * FP_SIZE)
    states = ffi.new("uint8_t[]", npages)
    with ffi.from_buffer("uint8_t[]", pages, require_writable=True) as out:
        _call("sa_read_pages", fd, _key(key), size, first, npages, out, fps, states)
    return pages, _taken(fps, npages * FP_SIZE), _taken(states, npages)


def compare_pages(fd: int, first: int, pages: BytesLike) -> int:
    """Compare whole pages with a file's from page `first` on; return how many leading ones are equal. May read disk."""
    data, npages = _column(pages, PAGE_SIZE, "pages")
    equal = ffi.new("uint64_t *")
    _call("sa_compare_pages", fd, first, npages, data, equal)
    return int(equal[0])


def drop_pages(fd: int, first: int = 0, npages: int = 0) -> tuple[int, int]:
    """Drop clean, unmapped pages of a range from the page cache; return how many were resident before and after.

    npages 0 means to the end. Without cachestat the pages are dropped all the same, and NativeError with errno ENOSYS
    says that nobody counted.
    """
    before, after = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    _call("sa_drop_pages", fd, first, npages, before, after)
    return int(before[0]), int(after[0])


# -------------------------------------------------------------------------------------------- segments and mappings


class _Owned:
    """A native object with a destructor: closed once, unusable afterwards, one call at a time."""

    __slots__ = ("_lock", "_pointer")

    def __init__(self, pointer: Any, destroy: Any) -> None:
        self._lock = threading.RLock()
        self._pointer = ffi.gc(pointer, destroy)

    def _open(self) -> Any:
        """The object itself. For callers that hold the lock."""
        if self._pointer is None:
            raise Closed(f"{type(self).__name__} is closed")
        return self._pointer

    def _do(self, call: str, *args: object) -> int:
        with self._lock:
            return _call(call, self._open(), *args)

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._pointer is None

    def close(self) -> None:
        """Give the memory back; every later call but this one raises Closed."""
        with self._lock:
            pointer, self._pointer = self._pointer, None
            if pointer is not None:
                ffi.release(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Segment(_Owned):
    """A segment of a sharing area on the local backend: a sealed memfd, a header and `nslots` slots."""

    __slots__ = ()

    @classmethod
    def create(cls, name: str, nslots: int) -> Self:
        """Make a segment that this process alone can write. Raises AreaFull if the host has nothing left for it."""
        ret = ffi.new("sa_segment **")
        _call("sa_segment_create", name.encode(), nslots, ret)
        return cls(ret[0], lib.sa_segment_destroy)

    @classmethod
    def adopt(cls, fd: int, nslots: int) -> Self:
        """Open a segment that somebody else made, read only, through a duplicate of fd."""
        ret = ffi.new("sa_segment **")
        _call("sa_segment_adopt", fd, nslots, ret)
        return cls(ret[0], lib.sa_segment_destroy)

    def fileno(self) -> int:
        """Return the descriptor, which stays the segment's."""
        return self._do("sa_segment_fd")

    @property
    def nslots(self) -> int:
        """How many slots it has."""
        return self._do("sa_segment_nslots")

    @property
    def writable(self) -> bool:
        """Whether this process made it."""
        return bool(self._do("sa_segment_writable"))

    def identity(self) -> tuple[int, int]:
        """Return the memfd's device and inode, which name it for as long as the host runs."""
        dev, ino = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        self._do("sa_segment_identity", dev, ino)
        return int(dev[0]), int(ino[0])

    def allocated_bytes(self) -> int:
        """Return the memory that the kernel holds for it."""
        allocated = ffi.new("uint64_t *")
        self._do("sa_segment_allocated", allocated)
        return int(allocated[0])

    def fill(self, key: BytesLike, first: int, pages: BytesLike, want: BytesLike) -> bytes:
        """Copy pages into slots from `first` on and check the copies against their wanted fingerprints.

        Returns one byte per page, 1 where the copy has the fingerprint.
        """
        data, npages = _column(pages, PAGE_SIZE, "pages")
        fps, nfps = _column(want, FP_SIZE, "fingerprints")
        _same("pages", npages, "fingerprints", nfps)
        ok = ffi.new("uint8_t[]", npages)
        self._do("sa_segment_fill", _key(key), first, npages, data, fps, ok)
        return _taken(ok, npages)

    def verify(self, key: BytesLike, first: int, want: BytesLike) -> bytes:
        """Check what is in the slots from `first` on; one byte per fingerprint, 1 where equal."""
        fps, npages = _column(want, FP_SIZE, "fingerprints")
        ok = ffi.new("uint8_t[]", npages)
        self._do("sa_segment_verify", _key(key), first, npages, fps, ok)
        return _taken(ok, npages)

    def read(self, first: int, npages: int) -> bytearray:
        """Copy npages pages out of the slots from `first` on."""
        pages = bytearray(npages * PAGE_SIZE)
        with ffi.from_buffer("uint8_t[]", pages, require_writable=True) as out:
            self._do("sa_segment_read", first, npages, out)
        return pages


def _inside(buffer: mmap.mmap, npages: int) -> None:
    if npages * PAGE_SIZE >= len(buffer) + PAGE_SIZE:
        raise ValueError(f"{npages} pages are more than the mapping has")


def map_runs(buffer: mmap.mmap, npages: int, fd: int, runs: BytesLike) -> int:
    """Put slots of a segment (descriptor fd) under a mapping of a file: its first npages pages are the caller's.

    runs: packed triples (page, slot, count), slots relative to the segment. Returns how many runs were mapped, which is
    all of them; a run outside the mapping is a NativeError with errno ERANGE before anything was mapped.
    """
    _inside(buffer, npages)
    triples, nruns = _triples(runs)
    mapped = ffi.new("size_t *")
    with ffi.from_buffer("uint8_t[]", buffer) as base:
        _call("sa_map_runs", ffi.cast("void *", base), npages, fd, triples, nruns, mapped)
    return int(mapped[0])


def map_file(buffer: mmap.mmap, fd: int, first: int, npages: int, random: bool = False) -> None:
    """Put pages of a file back at their own place of a mapping, read only and shared; random turns read-ahead off."""
    _inside(buffer, first + npages)
    with ffi.from_buffer("uint8_t[]", buffer) as base:
        _call("sa_map_file", ffi.cast("void *", base), fd, first, npages, int(random))


def compare_runs(buffer: mmap.mmap, npages: int, fd: int, runs: BytesLike) -> int:
    """Compare a mapping's runs with the file under them; return how many leading runs are wholly equal."""
    _inside(buffer, npages)
    triples, nruns = _triples(runs)
    equal = ffi.new("size_t *")
    with ffi.from_buffer("uint8_t[]", buffer) as base:
        _call("sa_compare_runs", ffi.cast("void *", base), npages, fd, triples, nruns, equal)
    return int(equal[0])


# ---------------------------------------------------------------------------------------------------------- grants

GRANT_DEVICE: Final = "/dev/xen/gntdev"


class GrantCalls(NamedTuple):
    """What this process has asked of the grant device since its start."""

    map_ioctls: int
    mmaps: int
    pages: int


def open_grant_device(path: str = GRANT_DEVICE) -> tuple[int, bool]:
    """Open the grant device read only; the descriptor is the caller's.

    Returns the descriptor, and whether nothing that is mapped through it can become executable, in whatever process (it
    can never become writable). Raises HostError where there is no such device or no right to it.
    """
    fd, noexec = ffi.new("int *"), ffi.new("int *")
    _call("sa_grants_open", os.fsencode(path), fd, noexec, about=path)
    return int(fd[0]), bool(noexec[0])


def grant_calls() -> GrantCalls:
    """Return how many map ioctls and mmaps this process has made for grants, and for how many pages."""
    ioctls, mmaps, pages = (ffi.new("uint64_t *") for _ in range(3))
    lib.sa_grants_calls(ioctls, mmaps, pages)
    return GrantCalls(int(ioctls[0]), int(mmaps[0]), int(pages[0]))


def join_runs(runs: BytesLike) -> bytes:
    """Join runs (page, slot, count) whose pages follow one another, whatever their slots.

    Returns packed triples (page, number of its first page among all pages of the runs, count).
    """
    triples, nruns = _triples(runs)
    joined, n = ffi.new("struct sa_run[]", nruns), ffi.new("size_t *")
    _call("sa_join_runs", triples, nruns, joined, n)
    return _taken(joined, 12 * int(n[0]))


class Grants(_Owned):
    """Pages of another domain, mapped beside a file to be compared with it and then put under its mapping.

    runs: packed triples (page, first grant reference, count) of domain `domid`. `device` is a descriptor of the grant
    device, which stays the caller's: a grant is let go when it is closed and the last mapping has gone. `movable`:
    whether this kind of guest can move mappings of grants (PVH and HVM can, PV cannot). Raises NativeError; nothing is
    mapped then.
    """

    __slots__ = ()

    def __init__(self, device: int, domid: int, runs: BytesLike, *, movable: bool) -> None:
        ret = ffi.new("sa_grants **")
        _call("sa_grants_create", device, domid, *_triples(runs), int(movable), ret)
        super().__init__(ret[0], lib.sa_grants_destroy)

    def stretches(self) -> int:
        """Return how many mappings they take in place."""
        return self._do("sa_grants_stretches")

    def compare(self, fd: int) -> bool:
        """Compare every page with its page of the file; may read disk. Not after place()."""
        equal = ffi.new("int *")
        self._do("sa_grants_compare", fd, equal)
        return bool(equal[0])

    def place(self, device: int, buffer: mmap.mmap, npages: int, fd: int) -> int:
        """Put them under a mapping of the file (descriptor fd), whose first npages pages are the caller's. Once only.

        Returns the stretches that were placed, which is all of them. Stays under the mapping after close();
        map_file() is the way back, also after a NativeError, which may leave the first stretches in place.
        """
        _inside(buffer, npages)
        placed = ffi.new("size_t *")
        with ffi.from_buffer("uint8_t[]", buffer) as base:
            self._do("sa_grants_place", device, ffi.cast("void *", base), npages, fd, placed)
        return int(placed[0])


# -------------------------------------------------------------------------------------------------------- estimates

CLASS_DATA: Final[int] = lib.SA_CLASS_DATA
CLASS_RODATA: Final[int] = lib.SA_CLASS_RODATA
CLASS_TEXT: Final[int] = lib.SA_CLASS_TEXT
TALLY_ONE: Final[int] = lib.SA_TALLY_ONE
TALLY_PARTS: Final[int] = lib.SA_TALLY_PARTS


class TallyRoot(NamedTuple):
    """What was fed of one root, in pages: `pages` are `zero` and, for the rest, one number for each CLASS_*."""

    files: int
    pages: int
    zero: int
    by_class: tuple[int, int, int]


class TallySums(NamedTuple):
    """What several roots have in common; zero pages are left out. Weighed numbers: TALLY_ONE to a page.

    distinct: different pages. saved, by CLASS_*, weighed: copies beyond the first, one for each root. area, weighed:
    pages that several roots have. repeated_in_area, weighed: what single roots have of those more than once. repeated,
    by root: occurrences beyond the first. pairs, by both roots' numbers (the smaller one first), weighed: what the two
    would save alone. groups, by group, weighed: what is saved.
    """

    distinct: int
    saved: tuple[int, int, int]
    area: int
    repeated_in_area: int
    repeated: list[int]
    pairs: dict[tuple[int, int], int]
    groups: list[int]


class Tally(_Owned):
    """Pages of the files of several roots, counted by fingerprint in bounded memory; see native/api.h.

    Roots and files are numbered by the caller. One file is fed after the other.
    """

    __slots__ = ("_fed", "_nroots")

    def __init__(self, fd: int, key: BytesLike, nroots: int) -> None:
        """Count into an empty file (descriptor fd, which is duplicated); it grows by 24 bytes per page, if need be."""
        if not 0 < nroots <= 0xFFFF:
            raise ValueError(f"{nroots} roots: from 1 to 65535 can be told apart")
        ret = ffi.new("sa_tally **")
        _call("sa_tally_create", fd, _key(key), nroots, ret)
        super().__init__(ret[0], lib.sa_tally_destroy)
        self._nroots = nroots
        self._fed = ffi.new("uint64_t *")

    def file(self, root: int, file: int, fd: int, size: int, sparse: bool) -> int:
        """Feed a whole file of `size` bytes; return how many there were, fewer if it is shorter now.

        sparse: it has holes; they count as zero and are not read. Raises NativeError if it cannot be read.
        """
        with self._lock:
            self._do("sa_tally_file", root, file, fd, size, int(sparse), self._fed)
            return int(self._fed[0])

    def begin(self, root: int, file: int) -> None:
        """Begin a file that is fed in pieces."""
        self._do("sa_tally_begin", root, file)

    def feed(self, data: BytesLike) -> None:
        """Feed the next bytes of the file. ELF program headers are looked for in the first piece only."""
        column, size = _column(data, 1, "data")
        self._do("sa_tally_feed", column, size)

    def feed_fd(self, fd: int, offset: int, size: int, sparse: bool = False) -> int:
        """Feed the next bytes from another file or device; return how many there were, fewer where that ends early.

        sparse: its holes count as zero and are not read. Raises NativeError if it cannot be read.
        """
        with self._lock:
            self._do("sa_tally_feed_fd", fd, offset, size, int(sparse), self._fed)
            return int(self._fed[0])

    def hole(self, size: int) -> None:
        """Feed zero bytes without having them."""
        self._do("sa_tally_hole", size)

    def end(self) -> None:
        """End the file; a last, short page is padded with zeros."""
        self._do("sa_tally_end")

    def abandon(self) -> None:
        """End the file where it cannot be read on: its whole pages so far stay counted."""
        self._do("sa_tally_abandon")

    def root(self, root: int) -> TallyRoot:
        """Return what was fed of one root."""
        ret = ffi.new("struct sa_tally_root *")
        self._do("sa_tally_root", root, ret)
        data, rodata, text = ret.by_class
        return TallyRoot(int(ret.files), int(ret.pages), int(ret.zero), (int(data), int(rodata), int(text)))

    def spilled_bytes(self) -> int:
        """Return what the file holds that was given for counting."""
        spilled = ffi.new("uint64_t *")
        self._do("sa_tally_spilled", spilled)
        return int(spilled[0])

    def join(
        self,
        groups: BytesLike,
        ngroups: int,
        weights: Sequence[int],
        without_text: bool,
        tell: Callable[[int], None] = lambda _part: None,
    ) -> TallySums:
        """Count what the roots have in common, and call tell() with the number of each part that is done.

        groups: 4 bytes for each file, the number of its group. weights: for each root the part of its pages that is
        there at a time, TALLY_ONE for all. without_text: pages of class TEXT are not shared.
        """
        if len(weights) != self._nroots:
            raise ValueError(f"{len(weights)} weights for {self._nroots} roots")
        column, nfiles = _words(groups, 1, "groups")
        weighed = ffi.new("uint32_t[]", list(weights))
        question = ffi.new("struct sa_tally_question *")
        question.groups, question.nfiles, question.ngroups = column, nfiles, ngroups
        question.weights, question.without_text = weighed, int(without_text)
        sums = ffi.new("struct sa_tally_sums *")
        repeated = ffi.new("uint64_t[]", self._nroots)
        pairs = ffi.new("uint64_t[]", self._nroots**2)
        gained = ffi.new("uint64_t[]", ngroups)
        for part in range(TALLY_PARTS):
            self._do("sa_tally_join", part, question, sums, repeated, pairs, gained)
            tell(part)
        data, rodata, text = sums.saved
        return TallySums(
            int(sums.distinct),
            (int(data), int(rodata), int(text)),
            int(sums.area),
            int(sums.repeated),
            ffi.unpack(repeated, self._nroots),
            {(a, b): int(pairs[a * self._nroots + b]) for a in range(self._nroots) for b in range(a + 1, self._nroots)},
            ffi.unpack(gained, ngroups) if ngroups else [],
        )


# ---------------------------------------------------------------------------------------------------------- leases


def lease_watch_open() -> int:
    """Open a descriptor that becomes readable when a read lease of this process is being broken.

    The caller closes it. Blocks the lease signals in the calling thread: call it before any other thread exists.
    """
    fd = ffi.new("int *")
    _call("sa_lease_watch_open", fd)
    return int(fd[0])


def lease_take(fd: int) -> None:
    """Take a read lease on a file that is open read only.

    Raises NativeError with errno EAGAIN if somebody has it open for writing, EACCES without the right to.
    """
    _call("sa_lease_take", fd)


def lease_release(fd: int) -> None:
    """Give a lease back; one that is gone is no error."""
    _call("sa_lease_release", fd)


def mount_id(fd: int) -> int:
    """Return the number of the mount that a file is on, which no other one ever gets; 0 where the kernel has none."""
    found = ffi.new("uint64_t *")
    _call("sa_mount_id", fd, found)
    return int(found[0])


def file_is_quiet(fd: int) -> bool:
    """Tell whether nobody has a file open for writing, or mapped writable, at this instant.

    False too where no lease can be had, which is how this is found out. The descriptor is open read only and has none.
    """
    quiet = ffi.new("int *")
    _call("sa_file_is_quiet", fd, quiet)
    return bool(quiet[0])


def lease_held(fd: int) -> bool:
    """Tell whether a lease is whole: not being broken and not gone."""
    held = ffi.new("int *")
    _call("sa_lease_held", fd, held)
    return bool(held[0])


_LEASE_BATCH: Final = 256


def lease_watch_read(fd: int) -> tuple[list[int], bool]:
    """Read all broken leases that were reported, without waiting.

    Returns their descriptors, and whether reports were lost: then ask lease_held for every lease.
    """
    fds, n, overflow = ffi.new("int[]", _LEASE_BATCH), ffi.new("size_t *"), ffi.new("int *")
    broken: list[int] = []
    lost = False
    while True:
        _call("sa_lease_watch_read", fd, fds, _LEASE_BATCH, n, overflow)
        broken += ffi.unpack(fds, int(n[0])) if n[0] else ()
        lost = lost or bool(overflow[0])
        if n[0] < _LEASE_BATCH:
            return broken, lost


# ------------------------------------------------------------------------------------------------------ page table


class TableTotals(NamedTuple):
    """Counts over a page table, in the order and by the names of sharearea.pagetable.Totals."""

    pages: int
    slots_used: int
    slots_mapped: int
    mappings: int
    pending: int
    memory_bytes: int
    by_holders: tuple[int, int, int, int, int, int, int, int]
    by_mappings: tuple[int, int, int, int, int, int, int]


class TableCensus(NamedTuple):
    """Counts over a stretch of pages, in the order and by the names of sharearea.pagetable.Census."""

    common: int
    copies: int
    end: int
    held: bytes
    held_common: bytes
    share: bytes


class NativePageTable(_Owned):
    """The fingerprint table of one pool, in C. sharearea.pagetable.PageTable says what each method means.

    Ids, slots, positions and runs go in and out as packed columns. A bad argument raises ValueError, a table that is
    full TableFull; nothing has changed then.
    """

    __slots__ = ("_max_holders",)

    def __init__(self, seed: bytes, zero_fp: bytes, max_holders: int, max_pages: int) -> None:
        ret = ffi.new("sa_table **")
        _call(
            "sa_table_create",
            _fixed(seed, SEED_SIZE, "seed"),
            _fixed(zero_fp, FP_SIZE, "zero_fp"),
            max_holders,
            max_pages,
            ret,
        )
        super().__init__(ret[0], lib.sa_table_destroy)
        self._max_holders = max_holders

    def intern(self, fps: BytesLike) -> bytes:
        """Find or add fingerprints, one reference for each occurrence, and return their ids."""
        column, n = _column(fps, FP_SIZE, "fingerprints")
        ids = ffi.new("uint32_t[]", n)
        self._do("sa_table_intern", column, n, ids)
        return _taken(ids, 4 * n)

    def unref(self, ids: BytesLike) -> bytes:
        """Give back one reference for each occurrence, and return the slots that this freed."""
        column, n = _words(ids, 1, "ids")
        freed, nfreed = ffi.new("uint32_t[]", n), ffi.new("size_t *")
        self._do("sa_table_unref", column, n, freed, nfreed)
        return _taken(freed, 4 * int(nfreed[0]))

    def mark(self, ids: BytesLike, holder: int) -> None:
        """Make `holder` a holder of pages."""
        self._do("sa_table_mark", *_words(ids, 1, "ids"), holder)

    def unmark(self, ids: BytesLike, holder: int) -> None:
        """Make `holder` no longer a holder of pages."""
        self._do("sa_table_unmark", *_words(ids, 1, "ids"), holder)

    def forget(self, holder: int) -> None:
        """Make `holder` no longer a holder of any page."""
        self._do("sa_table_forget", holder)

    def want(self, ids: BytesLike, k: int) -> bytes:
        """Make pages pending that lack a slot and have at least `k` holders, and return their positions in `ids`."""
        column, n = _words(ids, 1, "ids")
        positions, npositions = ffi.new("uint32_t[]", n), ffi.new("size_t *")
        self._do("sa_table_want", column, n, k, positions, npositions)
        return _taken(positions, 4 * int(npositions[0]))

    def unwant(self, ids: BytesLike) -> None:
        """Make pages no longer pending."""
        self._do("sa_table_unwant", *_words(ids, 1, "ids"))

    def publish(self, ids: BytesLike, slots: BytesLike) -> bytes:
        """Put page ids[i] into slots[i], and return the slots that this freed."""
        column, n = _words(ids, 1, "ids")
        targets, ntargets = _words(slots, 1, "slots")
        _same("pages", n, "slots", ntargets)
        freed, nfreed = ffi.new("uint32_t[]", n), ffi.new("size_t *")
        self._do("sa_table_publish", column, targets, n, freed, nfreed)
        return _taken(freed, 4 * int(nfreed[0]))

    def fps(self, ids: BytesLike) -> bytes:
        """Return the fingerprints of pages."""
        column, n = _words(ids, 1, "ids")
        fps = ffi.new("uint8_t[]", n * FP_SIZE)
        self._do("sa_table_fps", column, n, fps)
        return _taken(fps, n * FP_SIZE)

    def slots(self, ids: BytesLike) -> bytes:
        """Return the slots of pages, NO_SLOT for those that have none."""
        column, n = _words(ids, 1, "ids")
        slots = ffi.new("uint32_t[]", n)
        self._do("sa_table_slots", column, n, slots)
        return _taken(slots, 4 * n)

    def count(self, ids: BytesLike) -> tuple[int, int, int]:
        """Count occurrences: of the zero page, of pages in a slot, of non-zero pages that occurred before in `ids`."""
        zero, in_slot, repeated = (ffi.new("uint64_t *") for _ in range(3))
        self._do("sa_table_count", *_words(ids, 1, "ids"), zero, in_slot, repeated)
        return int(zero[0]), int(in_slot[0]), int(repeated[0])

    def runs(self, ids: BytesLike, pages: BytesLike | None, slots_per_segment: int) -> bytes:
        """Return runs (page, slot, count) over those of the pages that are in a slot; pages None: page i is ids[i]."""
        column, n = _words(ids, 1, "ids")
        numbers = ffi.NULL
        if pages is not None:
            numbers, nnumbers = _words(pages, 1, "page numbers")
            _same("pages", n, "page numbers", nnumbers)
        runs, nruns = ffi.new("uint32_t[]", 3 * n), ffi.new("size_t *")
        self._do("sa_table_runs", column, numbers, n, slots_per_segment, runs, nruns)
        return _taken(runs, 12 * int(nruns[0]))

    def map(self, runs: BytesLike) -> None:
        """Count one more mapping of every slot in the runs."""
        self._do("sa_table_map", *_words(runs, 3, "runs"))

    def unmap(self, runs: BytesLike) -> bytes:
        """Count one mapping less of every slot in the runs, and return the slots that this freed."""
        column, nruns = _words(runs, 3, "runs")
        nfreed = ffi.new("size_t *")
        with self._lock:
            # A call that succeeds takes away no more mappings than there are, whatever the counts say.
            room = self._room(sum(ffi.unpack(column, 3 * nruns)[2::3]) if nruns else 0, "mappings")
            freed = ffi.new("uint32_t[]", room)
            self._do("sa_table_unmap", column, nruns, freed, nfreed)
        return _taken(freed, 4 * int(nfreed[0]))

    def share(self, runs: BytesLike) -> int:
        """Return what one mapping of every slot in the runs pays of it, in SHARE_PAGE-ths of a page, added up."""
        share = ffi.new("uint64_t *")
        self._do("sa_table_share", *_words(runs, 3, "runs"), share)
        return int(share[0])

    def live(self, first: int, n: int) -> tuple[bytes, bytes, int]:
        """Return the used ones of slots [first, first + n), their pages' ids, and the mappings of the whole range."""
        found, mapped = ffi.new("size_t *"), ffi.new("uint64_t *")
        with self._lock:
            room = self._room(n, "slots_used")
            slots, ids = ffi.new("uint32_t[]", room), ffi.new("uint32_t[]", room)
            self._do("sa_table_live", first, n, slots, ids, found, mapped)
        return _taken(slots, 4 * int(found[0])), _taken(ids, 4 * int(found[0])), int(mapped[0])

    def totals(self) -> TableTotals:
        """Return counts over the whole table."""
        totals = ffi.new("struct sa_table_totals *")
        self._do("sa_table_totals", totals)
        return TableTotals(
            pages=int(totals.pages),
            slots_used=int(totals.slots_used),
            slots_mapped=int(totals.slots_mapped),
            mappings=int(totals.mappings),
            pending=int(totals.pending),
            memory_bytes=int(totals.memory_bytes),
            by_holders=tuple(ffi.unpack(totals.by_holders, 8)),
            by_mappings=tuple(ffi.unpack(totals.by_mappings, 7)),
        )

    def census(self, first: int, n: int, k: int) -> TableCensus:
        """Count pages [first, first + n): those that k holders have, and what each holder has of them."""
        census = ffi.new("struct sa_table_census *")
        held, common, share = (ffi.new("uint64_t[]", self._max_holders) for _ in range(3))
        self._do("sa_table_census", first, n, k, held, common, share, census)
        size = 8 * self._max_holders
        return TableCensus(
            int(census.common),
            int(census.copies),
            int(census.end),
            _taken(held, size),
            _taken(common, size),
            _taken(share, size),
        )

    def _room(self, asked: int, total: str) -> int:
        """Entries to provide for an answer: what was asked for, or, where that is much, what there can be."""
        return asked if asked <= _MUCH else min(asked, int(getattr(self.totals(), total)))


_MUCH: Final = 1 << 16


# ----------------------------------------------------------------------------------------------------------- rings


RING_SERVER: Final[int] = lib.SA_RING_SERVER
RING_CLIENT: Final[int] = lib.SA_RING_CLIENT
RING_WAITING: Final[int] = lib.SA_RING_WAITING
RING_OPEN: Final[int] = lib.SA_RING_OPEN
RING_CLOSED: Final[int] = lib.SA_RING_CLOSED

_RING_READ: Final = 1 << 16  # bytes of one read
_ring_scratch = threading.local()


def _scratch_bytes() -> Any:
    """One buffer for each thread: bytes are copied out of it before anything else happens."""
    scratch = getattr(_ring_scratch, "bytes", None)
    if scratch is None:
        scratch = _ring_scratch.bytes = ffi.new("uint8_t[]", _RING_READ)
    return scratch


def _joined(buffers: Sequence[BytesLike]) -> Any:
    """Pointer to the bytes of all buffers, one behind the other, up to what one write can take."""
    if len(buffers) == 1:
        return ffi.from_buffer("uint8_t[]", buffers[0])
    parts: list[BytesLike] = []
    size = 0
    for buffer in buffers:
        parts.append(buffer)
        size += len(buffer)
        if size >= _RING_READ:
            break
    return ffi.from_buffer("uint8_t[]", b"".join(parts))


def ring_format(memory: mmap.mmap, left_order: int, right_order: int) -> int:
    """Write a control page that waits for its first client at the start of `memory`; return the bytes of the pair.

    Behind the control page lie the left ring's own pages, then the right ring's.
    """
    size = _ring_layout(left_order, right_order)[2]
    if len(memory) < size:
        raise ValueError(f"rings of orders {left_order} and {right_order} need {size} bytes, not {len(memory)}")
    with ffi.from_buffer("uint8_t[]", memory, require_writable=True) as base:
        _call("sa_ring_format", base, left_order, right_order, ffi.NULL)
    return size


def _ring_layout(left_order: int, right_order: int) -> tuple[int, int, int]:
    left, right = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    _call("sa_ring_pages", left_order, right_order, left, right)
    return int(left[0]), int(right[0]), (1 + int(left[0]) + int(right[0])) * PAGE_SIZE


class Ring(_Owned):
    """One side of two byte rings over memory that ring_format laid out. Events are the caller's.

    `memory` must stay mapped until close(). A method that returns a flag says by it that the peer asked for an event.
    Raises ProtocolError when the peer's counters make no sense.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: mmap.mmap, side: int, left_order: int, right_order: int) -> None:
        left, right, size = _ring_layout(left_order, right_order)
        if len(memory) < size:
            raise ValueError(f"rings of orders {left_order} and {right_order} need {size} bytes, not {len(memory)}")
        self._memory = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        ret = ffi.new("sa_ring **")
        _call(
            "sa_ring_create",
            side,
            self._memory,
            self._memory + PAGE_SIZE if left else ffi.NULL,
            self._memory + (1 + left) * PAGE_SIZE if right else ffi.NULL,
            left_order,
            right_order,
            ret,
        )
        super().__init__(ret[0], lib.sa_ring_destroy)

    def connect(self) -> None:
        """Tell the server that its client is here; an event has to follow."""
        with self._lock:
            lib.sa_ring_connect(self._open())

    def hang_up(self) -> None:
        """Tell the peer that this side has left; an event has to follow."""
        with self._lock:
            lib.sa_ring_hang_up(self._open())

    def state(self) -> int:
        """Return RING_WAITING, RING_OPEN or, for ever, RING_CLOSED."""
        return self._do("sa_ring_state")

    def read(self) -> tuple[bytes, bool]:
        """Take bytes that are there, 64 KiB at the most. Fewer: the peer sends an event when there are more."""
        n, notify, scratch = ffi.new("size_t *"), ffi.new("int *"), _scratch_bytes()
        self._do("sa_ring_read", scratch, _RING_READ, n, notify)
        return _taken(scratch, int(n[0])), bool(notify[0])

    def write(self, buffers: Sequence[BytesLike]) -> tuple[int, bool]:
        """Put bytes; return how many went in, first to last. Fewer than all: the peer sends an event when it read."""
        n, notify, data = ffi.new("size_t *"), ffi.new("int *"), _joined(buffers)
        self._do("sa_ring_write", data, len(data), n, notify)
        return int(n[0]), bool(notify[0])

    def close(self) -> None:
        """Let go of the memory; says nothing to the peer."""
        with self._lock:
            super().close()
            ffi.release(self._memory)


class Vchan(_Owned):
    """Two byte rings and an event channel between this Xen domain and another: one end of what libxenvchan makes.

    The peer is told when an end is closed, and also when its process is killed. Raises HostError where a device is
    missing, ProtocolError when the peer's side makes no sense.
    """

    __slots__ = ()

    @classmethod
    def serve(cls, domid: int, order_read: int = 16, order_write: int = 16) -> Self:
        """Make rings of 2^order bytes that domain `domid` may map; `ring_ref` and `port` say where. For guests.

        Raises HostError when xen-gntalloc has no pages left.
        """
        ret = ffi.new("sa_vchan **")
        _call("sa_vchan_serve", domid, order_read, order_write, ret)
        return cls(ret[0], lib.sa_vchan_destroy)

    @classmethod
    def connect(cls, domid: int, ring_ref: int, port: int) -> Self:
        """Connect to a server in domain `domid`.

        Raises NativeError with errno EBUSY when its rings have had their client or the server has left, another when
        the grant or the port is not for us.
        """
        ret = ffi.new("sa_vchan **")
        _call("sa_vchan_connect", domid, ring_ref, port, ret)
        return cls(ret[0], lib.sa_vchan_destroy)

    def abandon(self) -> None:
        """Use it no more, and leave mappings and descriptors as they are until the process ends. Twice is fine.

        For a guest that was restored: Linux (6.1, drivers/xen/evtchn.c, evtchn_unbind_from_user) has forgotten its
        event channels, and kills who closes one (seen: BUG in evtchn_release).
        """
        with self._lock:
            pointer, self._pointer = self._pointer, None
            if pointer is not None:
                ffi.gc(pointer, None)

    @property
    def ring_ref(self) -> int:
        """The grant reference of the control page."""
        with self._lock:
            return int(lib.sa_vchan_ring_ref(self._open()))

    @property
    def port(self) -> int:
        """The event channel's port in this domain."""
        with self._lock:
            return int(lib.sa_vchan_port(self._open()))

    def fileno(self) -> int:
        """Return the event channel's descriptor: readable when an event is pending. It stays the vchan's."""
        return self._do("sa_vchan_fd")

    def drain(self) -> bool:
        """Take the pending event, so that the next can come. Returns whether there was one. Never waits."""
        pending = ffi.new("int *")
        self._do("sa_vchan_drain", pending)
        return bool(pending[0])

    def state(self) -> int:
        """Return RING_WAITING, RING_OPEN or, for ever, RING_CLOSED."""
        return self._do("sa_vchan_state")

    def read(self) -> bytes:
        """Take bytes that are there, 64 KiB at the most. Fewer: an event comes when there are more."""
        n, scratch = ffi.new("size_t *"), _scratch_bytes()
        self._do("sa_vchan_read", scratch, _RING_READ, n)
        return _taken(scratch, int(n[0]))

    def write(self, buffers: Sequence[BytesLike]) -> int:
        """Put bytes; return how many went in, first to last. Fewer than all: an event comes when the peer has read."""
        n, data = ffi.new("size_t *"), _joined(buffers)
        self._do("sa_vchan_write", data, len(data), n)
        return int(n[0])


# ------------------------------------------------------------------------------------------------- area domains

GRANT_FIRST: Final[int] = lib.SA_GRANT_FIRST
GRANTS_PER_FRAME: Final = 512


_LAST_DOMID: Final = 0x7FEF  # the last number that Xen gives out, when all others are used


def check_area_calls() -> None:
    """Try whether area domains could be reached at all: libraries, device and right. Raises HostError if not.

    Asks for a domain that will not be there; that answer comes from Xen itself.
    """
    ret = ffi.new("sa_area **")
    result = lib.sa_area_open(_LAST_DOMID, 0, ret)
    if result == 0:
        lib.sa_area_close(ret[0])
    elif result != -errno.ESRCH:
        raise _error("sa_area_open", -result, "")


class AreaDomain(_Owned):
    """Memory and grant table of an area domain, seen from dom0. Slot s is guest frame `base` + s.

    As long as it is open, `domid` names this very domain, whatever becomes of it. Slots and references go in and out as
    packed uint32.
    """

    __slots__ = ("domid",)

    def __init__(self, domid: int, base: int) -> None:
        ret = ffi.new("sa_area **")
        _call("sa_area_open", domid, base, ret, about=f"domain {domid}")
        super().__init__(ret[0], lib.sa_area_close)
        self.domid: Final = domid

    def alive(self) -> bool:
        """Tell whether the domain is there and not being destroyed."""
        alive = ffi.new("int *")
        self._do("sa_area_alive", alive)
        return bool(alive[0])

    def memory(self) -> int:
        """Return the bytes of memory that the domain has, its stub's and Xen's special pages included."""
        pages = ffi.new("uint64_t *")
        self._do("sa_area_memory", pages)
        return int(pages[0]) * PAGE_SIZE

    def table(self) -> tuple[int, int]:
        """Return how many frames the grant table has, and how many it may have."""
        frames, most = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        self._do("sa_area_table", frames, most)
        return int(frames[0]), int(most[0])

    def end(self) -> int:
        """Return the slot from which on there never was a frame. Raises NativeError, EOVERFLOW, if Xen cannot say."""
        end = ffi.new("uint32_t *")
        self._do("sa_area_end", end)
        return int(end[0])

    def blocks(self, n: int) -> bytes:
        """Return one byte for each of the first n times 512 slots, 1 where any of them has a frame.

        That is so as long as only populate() and release() changed them, whenever their caller died.
        """
        there = ffi.new("uint8_t[]", n)
        self._do("sa_area_blocks", n, there)
        return _taken(there, n)

    def present(self, first: int, n: int) -> bytes:
        """Return one byte for each slot of [first, first + n), 1 where there is a frame."""
        there = ffi.new("uint8_t[]", n)
        self._do("sa_area_present", first, n, there)
        return _taken(there, n)

    def populate(self, first: int, n: int) -> None:
        """Get frames for slots, both numbers multiples of 512.

        Raises AreaFull if Xen has no more memory, NativeError with errno EDQUOT if the domain may not have more.
        Nothing was populated then.
        """
        self._do("sa_area_populate", first, n)

    def release(self, first: int, n: int) -> None:
        """Give the frames of slots back. One that a guest maps goes when the guest lets go."""
        self._do("sa_area_release", first, n)

    def fill(self, key: BytesLike, first: int, pages: BytesLike, want: BytesLike) -> bytes:
        """Copy pages into slots from `first` on and check the copies against their wanted fingerprints.

        Returns one byte per page, 1 where the copy has the fingerprint. Raises HostError if a slot has no frame.
        """
        data, npages = _column(pages, PAGE_SIZE, "pages")
        fps, nfps = _column(want, FP_SIZE, "fingerprints")
        _same("pages", npages, "fingerprints", nfps)
        ok = ffi.new("uint8_t[]", npages)
        self._do("sa_area_fill", _key(key), first, npages, data, fps, ok)
        return _taken(ok, npages)

    def verify(self, key: BytesLike, first: int, want: BytesLike) -> bytes:
        """Check what is in the slots from `first` on; one byte per fingerprint, 1 where it is there and equal."""
        fps, npages = _column(want, FP_SIZE, "fingerprints")
        ok = ffi.new("uint8_t[]", npages)
        self._do("sa_area_verify", _key(key), first, npages, fps, ok)
        return _taken(ok, npages)

    def read(self, slots: BytesLike) -> bytearray:
        """Copy pages out of slots, in any order. Raises HostError if one has no frame."""
        column, n = _words(slots, 1, "slots")
        pages = bytearray(n * PAGE_SIZE)
        with ffi.from_buffer("uint8_t[]", pages, require_writable=True) as out:
            self._do("sa_area_read", column, n, out)
        return pages

    def grant(self, domid: int, slots: BytesLike, refs: BytesLike) -> None:
        """Let a domain map slots[i] read only by reference refs[i].

        Raises HostError if an entry is not free or the table cannot grow so far, ValueError if a reference is reserved
        or given twice. Nothing was written then.
        """
        frames, n = _words(slots, 1, "slots")
        entries, nrefs = _words(refs, 1, "references")
        _same("slots", n, "references", nrefs)
        self._do("sa_area_grant", domid, frames, entries, n)

    def revoke(self, refs: BytesLike) -> bytes:
        """Take grants back; one byte per reference, 1 where it is in use and stays, 0 where it is free now."""
        column, n = _words(refs, 1, "references")
        busy = ffi.new("uint8_t[]", n)
        self._do("sa_area_revoke", column, n, busy)
        return _taken(busy, n)

    def entries(self) -> tuple[bytes, bytes, bytes]:
        """Return references, domids and slots of all entries that are not free, ascending; NO_SLOT: no slot's frame."""
        n = ffi.new("size_t *")
        with self._lock:
            self._do("sa_area_entries", 0, ffi.NULL, ffi.NULL, ffi.NULL, n)
            room = int(n[0])
            refs, domids, slots = (ffi.new("uint32_t[]", room) for _ in range(3))
            self._do("sa_area_entries", room, refs, domids, slots, n)
            room = min(room, int(n[0]))
        return _taken(refs, 4 * room), _taken(domids, 4 * room), _taken(slots, 4 * room)

    def usage(self) -> tuple[int, int]:
        """Return how many entries are not free, and how many of them guests have mapped at this moment."""
        granted, in_use = ffi.new("size_t *"), ffi.new("size_t *")
        self._do("sa_area_usage", granted, in_use)
        return int(granted[0]), int(in_use[0])

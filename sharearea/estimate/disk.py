"""What lies under file systems: image files and block devices, stretches of them, qcow2, and the libraries that read.

The dissect.* libraries are imported by the first call of libraries(), so that folders and archives do without them.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ..common.errors import HostError, UsageError
from .intake import Piece, Stretch, Unreadable, reason_of

CHUNK: Final = 1 << 20  # bytes that are read together
_SLACK: Final = 1 << 16  # of btrfs, which is read by so much
_MOST_BACKING: Final = 16  # images behind an image
QCOW2_MAGIC: Final = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class Libraries:
    """The modules that are used of them."""

    btrfs: Any
    disk: Any
    extfs: Any
    lvm: Any
    qcow2: Any
    xfs: Any


def libraries() -> Libraries:
    """Import what reads images. Raises HostError where it is not installed."""
    try:
        from dissect.btrfs import btrfs
        from dissect.extfs import extfs
        from dissect.hypervisor.disk import qcow2
        from dissect.volume import disk
        from dissect.volume.lvm import lvm2
        from dissect.xfs import xfs
    except ImportError as error:
        raise HostError(
            f"disk images need the dissect libraries: {reason_of(error)}",
            "pip install 'sharearea[estimate]'; folders and tar archives are read without",
        ) from None
    return Libraries(btrfs, disk, extfs, lvm2, qcow2, xfs)


class Reader(Protocol):
    """What can be read by offset."""

    size: int
    fd: int | None  # where the very same bytes have the very same offsets

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer at the end."""


class DiskFile:
    """A file or block device."""

    def __init__(self, path: Path) -> None:
        self.fd: int | None = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._fd = self.fd
        self.size = os.lseek(self._fd, 0, os.SEEK_END)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer at the end."""
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


class StreamReader:
    """A stream of a library as a reader."""

    fd: int | None = None

    def __init__(self, stream: Any, size: int) -> None:
        self._stream = stream
        self.size = size

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes; fewer at the end."""
        self._stream.seek(offset)
        return bytes(self._stream.read(min(size, max(0, self.size - offset))))


class Volume:
    """A stretch of a disk as the libraries want it: an object to seek in and to read.

    It never returns fewer bytes than it was asked for, which they would not notice: past the end of what is there it
    gives zeros, up to slack bytes, which is what a library may want because it reads whole clusters; EOFError beyond.
    """

    def __init__(self, reader: Reader, offset: int, size: int, start: bytes = b"", slack: int = _SLACK) -> None:
        self.reader = reader
        self.offset = offset
        self.size = size
        self._start = start  # in place of what is there
        self._slack = slack
        self._at = 0

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset."""
        self._at = at + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read on from there."""
        if size < 0:
            size = max(0, self.size - self._at)
        data = self.read_at(self._at, size, self._slack)
        self._at += size
        return data

    def read_at(self, at: int, size: int, slack: int = 0) -> bytes:
        """Read at an offset; all of it is there, but for slack bytes."""
        data = self.reader.read_at(self.offset + at, size) if at < self.size else b""
        if at + len(data) > self.size:
            data = data[: self.size - at]
        if len(data) < size:
            if size - len(data) > slack or not data:
                raise EOFError(f"there is nothing at byte {at + len(data)}: the image is cut off, or damaged")
            data += bytes(size - len(data))
        if at < len(self._start):
            data = (self._start[at:] + data[len(self._start) - at :])[:size]
        return data

    def has(self, at: int, magic: bytes) -> bool:
        """Tell whether these bytes are there."""
        return self.size >= at + len(magic) and self.reader.read_at(self.offset + at, len(magic)) == magic

    def stretch(self, at: int, size: int) -> Iterator[Piece]:
        """Give bytes as pieces."""
        fd = self.reader.fd
        if fd is not None:
            yield Stretch(fd, self.offset + at, max(0, min(size, self.size - at)))
            if at + size > self.size:
                raise Unreadable("it lies past the end of its partition")
            return
        while size:
            part = self.read_at(at, min(size, CHUNK))
            at += len(part)
            size -= len(part)
            yield part


# ------------------------------------------------------------------------------------------------------------- qcow2

_QCOW_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")  # to the end of version 2's header, 72 bytes
_MOST_TABLES: Final = 4 << 20  # QEMU's own bound
_QCOW_DATA_FILE: Final = 4
_QCOW_EXTENDED_L2: Final = 16
_QCOW_CORRUPT: Final = 2
_QCOW_KNOWN: Final = 1 | _QCOW_CORRUPT | 8  # dirty, corrupt, compression type


class _Backed:
    """A backing image: past its end there are zeros, however long the image before it is."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._at = 0

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def read(self, size: int) -> bytes:
        parts = []
        end = min(self._at + size, self._reader.size)
        at = self._at
        while at < end:
            part = self._reader.read_at(at, end - at)
            if not part:
                raise EOFError("a backing image ends too early")
            parts.append(part)
            at += len(part)
        self._at += size
        return b"".join(parts).ljust(size, b"\0")


def open_qcow2(path: Path, files: list[DiskFile], depth: int = 0) -> Reader:
    """Open a qcow2 image and what is behind it. Raises UsageError if it cannot be read."""
    file = open_file(path, files)
    fixed = f"qemu-img convert -O qcow2 {path} fixed.qcow2"
    if file.size < _QCOW_HEADER.size:
        raise UsageError(f"{path}: the image ends in its header", "copy it again; `qemu-img check` looks at it")
    header = file.read_at(0, 112).ljust(112, b"\0")
    magic, version, backing_at, backing_size, cluster_bits, size, crypt, l1_size, l1_at, *_ = _QCOW_HEADER.unpack_from(
        header
    )
    features = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
    if magic != QCOW2_MAGIC or version not in (2, 3) or not 9 <= cluster_bits <= 21:
        raise UsageError(f"{path}: is no qcow2 image of version 2 or 3, or its header is damaged", fixed)
    if crypt:
        raise UsageError(f"{path}: is encrypted", "qemu-img convert can decrypt it")
    if features & _QCOW_DATA_FILE:
        raise UsageError(f"{path}: keeps its data in another file, which is not read", fixed)
    if features & _QCOW_EXTENDED_L2:
        # dissect.hypervisor 3.21 takes an entry for its bitmap there, and would give wrong bytes.
        raise UsageError(f"{path}: has extended L2 entries, which are not read", fixed)
    if features & _QCOW_CORRUPT or features & ~_QCOW_KNOWN:
        raise UsageError(f"{path}: is marked as damaged, or has features that are not known here", fixed)
    if l1_size > _MOST_TABLES or l1_at + 8 * l1_size > file.size:
        raise UsageError(f"{path}: is cut off: its table of clusters is not there", "copy it again")
    tables = struct.unpack(f">{l1_size}Q", file.read_at(l1_at, 8 * l1_size))
    if any((entry & 0x00FFFFFFFFFFFE00) + (1 << cluster_bits) > file.size + _SLACK for entry in tables if entry):
        raise UsageError(
            f"{path}: is cut off: it has {file.size} bytes, and a table of clusters lies further on", "copy it again"
        )
    backing: Reader | None = None
    if backing_at:
        name = file.read_at(backing_at, min(backing_size, 1023)).decode("utf-8", "surrogateescape")
        if depth == _MOST_BACKING:
            raise UsageError(f"{path}: more than {_MOST_BACKING} images are behind one another")
        backing = _open_backing(path, name, files, depth + 1)
    # The library opens backing files in the same folder only, and takes version 2's header to be as long as the next's.
    patched = bytearray(header)
    struct.pack_into(">QI", patched, 8, 0, 0)
    if version == 2:
        struct.pack_into(">QQQII", patched, 72, 0, 0, 0, 4, 112)
        patched[104:112] = bytes(8)
    # A disk that ends inside a cluster may have less of it in the file; a packed cluster is read by sectors.
    slack = 1 << cluster_bits if size % (1 << cluster_bits) else 511
    qcow2 = libraries().qcow2.QCow2(Volume(file, 0, file.size, bytes(patched), slack))
    if backing is not None:
        qcow2.backing_file = _Backed(backing)
    return StreamReader(qcow2.open(), size)


def _open_backing(path: Path, name: str, files: list[DiskFile], depth: int) -> Reader:
    if ":" in name.split("/")[0]:
        raise UsageError(
            f"{path}: its backing image is no file: {name}", f"qemu-img convert -O qcow2 {path} whole.qcow2"
        )
    behind = path.parent / name
    try:
        if not stat.S_ISREG(behind.stat().st_mode) and not stat.S_ISBLK(behind.stat().st_mode):
            raise UsageError(f"{path}: its backing image {behind} is neither a file nor a block device")
        file = open_file(behind, files)
    except OSError as error:
        raise UsageError(
            f"{path}: its backing image {behind} cannot be read: {reason_of(error)}",
            "put it there, or make the image whole: qemu-img convert",
        ) from None
    return open_qcow2(behind, files, depth) if file.read_at(0, 4) == QCOW2_MAGIC else file


def open_file(path: Path, files: list[DiskFile]) -> DiskFile:
    """Open a file or block device, and add it to those that are to be closed."""
    file = DiskFile(path)
    files.append(file)
    return file

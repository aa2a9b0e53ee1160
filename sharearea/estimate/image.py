"""A disk image, or a block device: its partitions and volumes, and the files in their file systems.

Nothing is mounted and nothing is written. The dissect.* libraries read the structures on the disk; where they were
found to read something wrong or not at all, disk.py and systems.py do it, or leave it out by name. docs/estimate.md has
the list, tests/test_estimate_images.py the proofs.

Bytes of files go from a raw image to the tally without passing through Python.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..common.errors import ShareareaError, UsageError
from .disk import CHUNK, QCOW2_MAGIC, DiskFile, StreamReader, Volume, libraries, open_file, open_qcow2
from .intake import Hole, Intake, Piece, Stretch, Unreadable, keep, reason_of
from .packages import MOST_DATABASE, Packages
from .systems import KINDS, FileSystem, Node

_NOT_READ: Final = (  # offset, magic, and what it is of
    (0, b"LUKS\xba\xbe", "encrypted (LUKS)"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (0, b"hsqs", "a squashfs file system"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (3, b"NTFS    ", "an NTFS file system"),
    (54, b"FAT1", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
    (4096, b"\xfc\x4e\x2b\xa9", "a part of a RAID"),
)
_NO_FILES: Final = frozenset({"swap space"})  # nothing is missing where this is left out
OTHER_IMAGES: Final = (
    (b"KDMV", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"conectix", "VHD"),
    (b"vhdxfile", "VHDX"),
    (b"<<< ", "VDI"),
)


class _Tree:
    """A file system's databases of packages, by path."""

    def __init__(self, system: FileSystem, volume: Volume, work: Path) -> None:
        self._system = system
        self._volume = volume
        self._work = work
        self._folders: dict[str, dict[str, Node]] = {}

    def _children(self, path: str) -> dict[str, Node]:
        found = self._folders.get(path)
        if found is None:
            above, _, name = path.rpartition("/")
            node = self._system.root() if not path else self._children(above).get(name)
            found = {}
            if node is not None and node.kind == "folder" and not self._system.skips(node):
                found = {
                    child: entry for child, entry in self._system.children(node) if not isinstance(entry, Unreadable)
                }
            self._folders[path] = found
        return found

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if it is none."""
        try:
            return list(self._children(folder))
        except ShareareaError:
            raise
        except Exception:
            return []

    def _bytes(self, path: str, limit: int) -> Iterator[bytes]:
        above, _, name = path.rpartition("/")
        node = self._children(above).get(name)
        if node is None or node.kind != "file" or self._system.skips(node):
            raise Unreadable("there is no such file")
        if node.size > limit:
            raise Unreadable("it is too long")
        left = node.size
        for piece in self._system.pieces(node):
            size = piece.size if isinstance(piece, Hole | Stretch) else len(piece)
            for done in range(0, min(size, left), CHUNK):
                part = min(CHUNK, min(size, left) - done)
                if isinstance(piece, Hole):
                    yield bytes(part)
                elif isinstance(piece, Stretch):
                    yield self._volume.read_at(piece.offset - self._volume.offset + done, part)
                else:
                    yield piece[done : done + part]
            left -= min(size, left)
        while left > 0:
            yield bytes(min(left, CHUNK))
            left -= min(left, CHUNK)

    def read(self, path: str, limit: int) -> bytes | None:
        """Return a file's bytes; None if there is no such file, or it is longer than limit, or cannot be read."""
        try:
            return b"".join(self._bytes(path, limit))
        except ShareareaError:
            raise
        except Exception:
            return None

    @contextmanager
    def database(self, path: str) -> Iterator[str | None]:
        """Give a copy of a file where sqlite finds it."""
        with tempfile.NamedTemporaryFile(prefix="sharearea-estimate-", dir=self._work) as file:
            try:
                for part in self._bytes(path, MOST_DATABASE):
                    keep(file, part)
            except ShareareaError:
                raise
            except Exception:
                yield None
            else:
                yield file.name


# ------------------------------------------------------------------------------------------------------------- image


class Image:
    """A disk image or block device. work: folder for what must be a file of its own for a while."""

    def __init__(self, path: Path, work: Path) -> None:
        self._path = path
        self._work = work
        self._files: list[DiskFile] = []
        libraries()
        try:
            file = open_file(path, self._files)
            if file.read_at(0, 4) == QCOW2_MAGIC:
                self.kind = "disk image, qcow2"
                reader = open_qcow2(path, self._files)
            else:
                self.kind = "disk image, raw"
                reader = file
            self._volumes, self._others = _volumes(Volume(reader, 0, reader.size))
            if not self._volumes and not self._others:
                raise UsageError(
                    f"{path}: is neither a root folder, nor a tar archive, nor a disk image with a partition table or "
                    "a file system",
                    "ext2 to ext4, XFS and btrfs are read, in raw and qcow2 images, with MBR, GPT and LVM",
                )
        except BaseException as error:
            self.close()
            if isinstance(error, EOFError):
                raise UsageError(f"{path}: {error}", "copy the image again; `qemu-img check` looks at it") from None
            raise

    def close(self) -> None:
        """Close the image and what is behind it."""
        while self._files:
            self._files.pop().close()

    def read(self, intake: Intake) -> None:
        """Hand over the regular files of all file systems."""
        for name, what in self._others:
            if what in _NO_FILES:
                continue
            intake.leave_out(name, f"not read: {what}")
        taken = 0
        reasons: list[str] = []
        for name, kind, volume in self._volumes:
            try:
                system = KINDS[kind](volume)
            except ShareareaError:
                raise
            except Exception as error:
                reasons.append(f"{name or kind}: {reason_of(error)}")
                intake.leave_out(name, f"this {kind} file system cannot be read: {reason_of(error)}")
                continue
            if system.size > volume.reader.size - volume.offset:
                intake.note(
                    f"{name or 'the image'} is cut off: its file system has {system.size} bytes, and "
                    f"{max(0, volume.reader.size - volume.offset)} are there"
                )
            for text in system.warnings():
                intake.note(f"{name or 'the file system'} {text}")
            tree = _Tree(system, volume, self._work)
            try:
                _read_system(system, tree, name, intake)
                taken += 1
            except Unreadable as error:
                reasons.append(f"{name or kind}: {error}")
                intake.leave_out(name, f"this {kind} file system cannot be read: {error}")
        if not taken:
            reasons += [f"{name}: {what}" for name, what in self._others]
            raise Unreadable(f"none of its file systems is: {'; '.join(reasons)}")


def _kind(volume: Volume) -> str | None:
    """Return the kind of the file system, or LVM; None if it is none that is read."""
    if volume.has(0, b"XFSB"):
        return "XFS"
    if volume.has(0x10040, b"_BHRfS_M"):
        return "btrfs"
    if volume.has(1024 + 56, b"\x53\xef"):
        return "ext"
    if any(volume.has(512 * sector, b"LABELONE") for sector in range(4)):
        return "LVM"
    return None


def _other(volume: Volume) -> str | None:
    return next((what for at, magic, what in _NOT_READ if volume.has(at, magic)), None)


_Found = tuple[list[tuple[str, str, Volume]], list[tuple[str, str]]]


def _volumes(whole: Volume) -> _Found:
    """Find file systems: name, kind, volume; and what else there is: name, what it is."""
    found: list[tuple[str, str, Volume]] = []
    others: list[tuple[str, str]] = []
    physical: list[Volume] = []

    def sort(name: str, volume: Volume) -> bool:
        kind = _kind(volume)
        if kind == "LVM":
            physical.append(volume)
        elif kind is not None:
            found.append((name, kind, volume))
        else:
            what = _other(volume)
            if what is None:
                return False
            others.append((name, what))
        return True

    if not sort("", whole):
        for number, offset, size in _partitions(whole):
            name = f"partition {number}"
            if offset >= whole.size:
                others.append((name, "it lies past the end of the image, which is cut off"))
            elif not sort(name, Volume(whole.reader, whole.offset + offset, min(size, whole.size - offset))):
                others.append((name, "no file system that is known here"))
    for name, volume in _logical_volumes(physical, others):
        if not sort(name, volume):
            others.append((name, "no file system that is known here"))
    return found, others


def _partitions(whole: Volume) -> list[tuple[int, int, int]]:
    """Return number, offset and size of each partition; none without a table."""
    if not whole.has(510, b"\x55\xaa"):
        return []
    for sector in (512, 4096):
        try:
            whole.seek(0)
            disk = libraries().disk.Disk(whole, sector)
        except ShareareaError:
            raise
        except Exception:
            continue
        return [
            (int(part.number), int(part.offset), int(part.size))
            for part in disk.partitions
            if part.size and part.offset
        ]
    return []


def _logical_volumes(physical: list[Volume], others: list[tuple[str, str]]) -> Iterator[tuple[str, Volume]]:
    """Find the volumes of LVM's groups; each stretch of them on one disk after the other, not side by side."""
    groups: dict[str, list[Volume]] = {}
    lvm = libraries().lvm
    for volume in physical:
        try:
            groups.setdefault(lvm.LVM2(volume).volume_group.id, []).append(volume)
        except Exception as error:
            others.append(("LVM", f"this physical volume cannot be read: {reason_of(error)}"))
    for volumes in groups.values():
        for logical in lvm.LVM2(volumes).volume_group.lv:
            name = f"LVM volume {logical.name}"
            if any(segment.type not in ("linear", "striped") for segment in logical.segments):
                if logical.is_visible:
                    others.append((name, f"LVM's {logical.type} volumes are not read"))
                continue
            if any(int(segment.stripe_count) != 1 for segment in logical.segments):
                others.append((name, "LVM's striped volumes are not read"))
                continue
            try:
                stream = logical.open()
            except Exception as error:
                others.append((name, reason_of(error)))
                continue
            size = sum(int(segment.extent_count) for segment in logical.segments)
            size *= int(logical.volume_group.extent_size) * 512
            if logical.is_visible:
                yield name, Volume(StreamReader(stream, size), 0, size)


def _read_system(system: FileSystem, tree: _Tree, name: str, intake: Intake) -> None:
    """Hand over one file system's files. name: of its volume; paths are shown behind it.

    Raises Unreadable if not even its root folder can be read.
    """
    before = f"{name}: " if name else ""
    intake.packages = Packages()
    try:
        for prefix in system.places():
            intake.packages.read(tree, lambda text: intake.note(before + text), prefix)
    except ShareareaError:
        raise
    except Exception as error:
        intake.note(f"{before}its databases of packages cannot be read: {reason_of(error)}")
    seen: set[tuple[int, int]] = set()
    try:
        waiting = [("", system.root())]
    except Exception as error:
        raise Unreadable(reason_of(error)) from None
    while waiting:
        path, node = waiting.pop()
        if node.key in seen:
            continue  # a damaged file system may have circles
        seen.add(node.key)
        below: list[tuple[str, Node]] = []
        try:
            why = system.skips(node)
            if why:
                intake.leave_out(before + path, f"not read: {why}")
                continue
            found = sorted(system.children(node), key=lambda pair: pair[0])
        except ShareareaError:
            raise
        except Exception as error:
            if not path:
                raise Unreadable(f"its root folder: {reason_of(error)}") from None
            intake.leave_out(before + path, f"this folder cannot be read: {reason_of(error)}")
            continue
        for child, entry in found:
            place = f"{path}/{child}" if path else child
            if isinstance(entry, Unreadable):
                intake.leave_out(before + place, f"cannot be read: {reason_of(entry)}")
            elif entry.kind == "folder":
                below.append((place, entry))
            elif entry.kind == "file":
                if entry.links > 1:
                    if entry.key in seen:
                        continue
                    seen.add(entry.key)
                why = system.skips(entry)
                if why:
                    intake.leave_out(before + place, f"not read: {why}")
                else:
                    intake.pieces(place, entry.size, _caught(system.pieces(entry)), before)
        waiting += reversed(below)


def _caught(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Turn whatever a library raises over damaged bytes into one error."""
    try:
        yield from pieces
    except (ShareareaError, Unreadable):
        raise
    except Exception as error:
        raise Unreadable(reason_of(error)) from None

"""The file systems that are read: ext2 to ext4, XFS and btrfs, all by the same few questions.

Where a library reads something wrong or not at all, it is read here, or a file is left out by name: docs/estimate.md.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from .disk import CHUNK, Volume, libraries
from .intake import Hole, Piece, Stretch, Unreadable, reason_of


@dataclass(frozen=True, slots=True)
class Node:
    """A file or folder of a file system. key: the same for each name of a file."""

    kind: str  # "file", "folder", "other"
    key: tuple[int, int]
    links: int
    size: int
    handle: Any


class FileSystem(Protocol):
    """One of the kinds of file systems, on a volume. size: bytes that it takes of it."""

    size: int

    def root(self) -> Node:
        """Return the folder that all others are in."""

    def children(self, folder: Node) -> Iterable[tuple[str, Node | Unreadable]]:
        """Yield names and nodes in the order of the disk; an error in place of a node that cannot be read."""

    def pieces(self, node: Node) -> Iterable[Piece]:
        """Yield a file's bytes."""

    def skips(self, node: Node) -> str:
        """Return why a node is not read, if it is not."""

    def warnings(self) -> Iterator[str]:
        """Yield what a reader of the figures should know."""

    def places(self) -> Iterator[str]:
        """Yield where roots of systems may begin in it: empty, or ending in a slash."""


_NODE_KINDS: Final = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}


class Ext:
    """ext2, ext3 and ext4."""

    _INLINE = 0x10000000  # of an inode's flags
    _ENCRYPTED = 0x800
    _EXTENTS = 0x80000
    _RECOVER = 0x4  # of the incompatible features
    _NO_FILE_TYPE = 0x2

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._fs = libraries().extfs.ExtFS(volume)
        self._block = int(self._fs.block_size)
        self.size = int(self._fs.block_count) * self._block

    def warnings(self) -> Iterator[str]:
        """Yield what a reader of the figures should know."""
        if self._fs.sb.s_feature_incompat & self._RECOVER:
            yield "was not unmounted; its journal is not replayed"

    def places(self) -> Iterator[str]:
        """Yield where roots of systems may begin in it."""
        yield ""

    def root(self) -> Node:
        """Return the folder that all others are in."""
        return self._node(2)

    def _node(self, number: int) -> Node:
        handle = self._fs.get_inode(number)
        inode = handle.inode
        kind = _NODE_KINDS.get(stat.S_IFMT(inode.i_mode), "other")
        return Node(kind, (0, number), int(inode.i_links_count), int(handle.size), handle)

    def skips(self, node: Node) -> str:
        """Return why a node is not read, if it is not."""
        return "it is encrypted" if node.handle.inode.i_flags & self._ENCRYPTED else ""

    def children(self, folder: Node) -> Iterator[tuple[str, Node | Unreadable]]:
        """Yield names and nodes. The library's own loop misses an entry of 12 bytes at the end of a folder."""
        if folder.handle.inode.i_flags & self._INLINE:
            own, more = self._inline(folder)
            if len(own) + len(more) < folder.size:
                raise Unreadable("not all of this inline folder was found")
            blocks: Iterable[bytes] = (own[4:], more)  # the number of the folder above comes first
        else:
            blocks = self._blocks(folder)
        for block in blocks:
            at = 0
            while at + 8 <= len(block):
                number, length, name_length = struct.unpack_from("<IHB", block, at)
                length = length or 65536
                if length < 8 or at + length > len(block) or 8 + name_length > length:
                    raise Unreadable("a folder's entry is damaged")
                name = block[at + 8 : at + 8 + name_length]
                at += length
                if number == 0 or name in (b".", b"..", b""):
                    continue
                text = name.decode("utf-8", "surrogateescape")
                try:
                    yield text, self._node(number)
                except Exception as error:
                    yield text, Unreadable(reason_of(error))

    def _blocks(self, folder: Node) -> Iterator[bytes]:
        for piece in self.pieces(folder):
            if isinstance(piece, Stretch):
                volume = self._volume
                for at in range(piece.offset - volume.offset, piece.offset - volume.offset + piece.size, self._block):
                    yield volume.read_at(at, self._block)
            elif isinstance(piece, bytes):
                for at in range(0, len(piece), self._block):
                    yield piece[at : at + self._block]

    def _inline(self, node: Node) -> tuple[bytes, bytes]:
        """What a small file or folder keeps in its inode, and what of it in the attribute beside it."""
        own = bytes(node.handle.inode.i_block)[: node.size]
        if node.size <= len(own) and node.kind == "file":
            return own, b""
        more = next((bytes(entry.value) for entry in node.handle.xattr if entry.name == "system.data"), b"")
        return own, more

    def pieces(self, node: Node) -> Iterator[Piece]:
        """Yield a file's bytes."""
        flags = node.handle.inode.i_flags
        if flags & self._INLINE:
            own, more = self._inline(node)
            if len(own) + len(more) < node.size:
                raise Unreadable("not all of this inline file was found")
            yield (own + more)[: node.size]
            return
        blocks = -(-node.size // self._block)
        runs = node.handle.dataruns() if flags & self._EXTENTS else self._map(node, blocks)
        for first, count in runs:
            count = min(count, blocks)
            blocks -= count
            if first is None:
                yield Hole(count * self._block)
            elif count:
                yield from self._volume.stretch(first * self._block, count * self._block)

    def _map(self, node: Node, blocks: int) -> Iterator[tuple[int | None, int]]:
        """Runs of a file with a block map. The library's own reading takes block 0 for a block in sparse files."""
        numbers = struct.unpack_from("<15I", bytes(node.handle.inode.i_block))
        first, count = 0, 0
        for number, length in self._mapped(numbers, blocks):
            if count and number == (first + count if first else 0):
                count += length
            else:
                if count:
                    yield first or None, count
                first, count = number, length
        if count:
            yield first or None, count

    def _mapped(self, numbers: tuple[int, ...], blocks: int) -> Iterator[tuple[int, int]]:
        """Block numbers one by one, 0 for a hole; a hole that a whole missing table stands for comes at once."""
        for number in numbers[:12]:
            if blocks <= 0:
                return
            yield number, 1
            blocks -= 1
        for level in (1, 2, 3):
            if blocks <= 0:
                return
            whole = min(blocks, (self._block // 4) ** level)
            yield from self._table(numbers[11 + level], level, whole)
            blocks -= whole

    def _table(self, number: int, level: int, blocks: int) -> Iterator[tuple[int, int]]:
        if number == 0:
            yield 0, blocks
            return
        below = (self._block // 4) ** (level - 1)
        for entry in array("I", self._volume.read_at(number * self._block, self._block)):
            if blocks <= 0:
                return
            part = min(blocks, below)
            if level == 1:
                yield entry, 1
            else:
                yield from self._table(entry, level - 1, part)
            blocks -= part


class Xfs:
    """XFS."""

    _REALTIME = 1  # of an inode's flags

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._fs = libraries().xfs.XFS(volume)
        sb = self._fs.sb
        self._block = int(sb.sb_blocksize)
        self.size = int(sb.sb_dblocks) * self._block
        if sb.sb_dirblklog:
            raise Unreadable("its folders have blocks of another size than its files (mkfs.xfs -n size=)")

    def warnings(self) -> Iterator[str]:
        """Yield what a reader of the figures should know."""
        return iter(())

    def places(self) -> Iterator[str]:
        """Yield where roots of systems may begin in it."""
        yield ""

    def root(self) -> Node:
        """Return the folder that all others are in."""
        return self._node(self._fs.root)

    def _node(self, handle: Any) -> Node:
        inode = handle.inode
        kind = _NODE_KINDS.get(stat.S_IFMT(inode.di_mode), "other")
        return Node(kind, (0, int(handle.inum)), int(inode.di_nlink), int(handle.size), handle)

    def skips(self, node: Node) -> str:
        """Return why a node is not read, if it is not."""
        if node.kind == "file" and node.handle.inode.di_flags & self._REALTIME:
            return "it lies on the file system's realtime device"
        return ""

    def children(self, folder: Node) -> Iterator[tuple[str, Node | Unreadable]]:
        """Yield names and nodes."""
        for child in folder.handle.iterdir():
            if child.filename not in (".", ".."):
                try:
                    yield child.filename, self._node(child)
                except Exception as error:
                    yield child.filename, Unreadable(reason_of(error))

    def pieces(self, node: Node) -> Iterator[Piece]:
        """Yield a file's bytes. What was reserved and never written is zeros; the library gives what is there."""
        done = 0
        blocks = -(-node.size // self._block)
        group_bits = int(self._fs.sb.sb_agblklog)
        group_blocks = int(self._fs.sb.sb_agblocks)
        for first, block, count, unwritten in node.handle._iter_blocks():
            if first >= blocks:
                break
            if first > done:
                yield Hole((first - done) * self._block)
            count = min(count, blocks - first)
            done = first + count
            if unwritten:
                yield Hole(count * self._block)
            else:
                at = (block >> group_bits) * group_blocks + (block & ((1 << group_bits) - 1))
                yield from self._volume.stretch(at * self._block, count * self._block)


class Btrfs:
    """btrfs on one device. Subvolumes are read once each, snapshots are left out unless the system starts from one."""

    def __init__(self, volume: Volume) -> None:
        modules = libraries()
        fields = modules.btrfs.c_btrfs
        volume.seek(fields.BTRFS_SUPER_INFO_OFFSET)
        devices = int(fields.btrfs_super_block(volume).num_devices)
        if devices != 1:
            raise Unreadable(f"this btrfs has {devices} devices; only those of one are read")
        self._fs = modules.btrfs.Btrfs(volume)
        self.size = int(self._fs.sb.dev_item.total_bytes)
        self._default = int(self._fs.default_subvolume.objectid)

    def warnings(self) -> Iterator[str]:
        """Yield what a reader of the figures should know."""
        return iter(())

    def places(self) -> Iterator[str]:
        """Yield where roots of systems may begin in it: each subvolume may be one."""
        for subvolume in self._fs.subvolumes():
            path = str(subvolume.path)
            yield f"{path}/" if path else ""

    def root(self) -> Node:
        """Return the folder that all others are in."""
        return self._node(self._fs.fs_tree.root)

    def _node(self, handle: Any) -> Node:
        inode = handle.inode
        kind = _NODE_KINDS.get(stat.S_IFMT(inode.mode), "other")
        key = (int(handle.subvolume.objectid), int(handle.inum))
        return Node(kind, key, int(inode.nlink), int(handle.size), handle)

    def skips(self, node: Node) -> str:
        """Return why a node is not read, if it is not."""
        subvolume = node.handle.subvolume
        if node.kind == "folder" and node.handle.inum == int(subvolume.tree.root_item.root_dirid):
            if any(subvolume.tree.root_item.parent_uuid) and subvolume.objectid != self._default:
                return "a snapshot; what it was taken of is read"
        return ""

    def children(self, folder: Node) -> Iterator[tuple[str, Node | Unreadable]]:
        """Yield names and nodes."""
        for name, child in folder.handle.iterdir():
            try:
                yield name, self._node(child)
            except Exception as error:
                yield name, Unreadable(reason_of(error))

    def pieces(self, node: Node) -> Iterator[Piece]:
        """Yield a file's bytes."""
        with node.handle.open() as stream:
            extents = getattr(stream, "extents", None)
            if extents is None:  # in the tree itself
                yield stream.read(node.size)
                return
            for extent in extents:
                size = int(extent.length)
                if (extent.disk_offset, extent.disk_length) == (0, 0):
                    yield Hole(size)
                    stream.seek(size, os.SEEK_CUR)
                    continue
                # A compressed extent is unpacked whole for each reading of it: it has 128 KiB at the most.
                while size > 0:
                    part = stream.read(min(size, CHUNK))
                    if not part:
                        break  # past the end of the file
                    size -= len(part)
                    yield part


KINDS: Final[dict[str, Callable[[Volume], FileSystem]]] = {"ext": Ext, "XFS": Xfs, "btrfs": Btrfs}

"""A tar archive of a root, as it is or compressed: read in one pass, without unpacking it anywhere.

A plain archive is indexed first, so that a path that comes twice counts as tar would unpack it: the last one. In a
compressed one both count, and that is said.
"""

from __future__ import annotations

import contextlib
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from ..common.errors import HostError, UsageError
from .intake import Hole, Intake, Piece, Stretch, Unreadable, keep, reason_of
from .packages import DPKG_INFO, MOST_DATABASE, RPM_FOLDERS, RPM_SQLITE

_CHUNK: Final = 1 << 20
_DATABASE: Final = re.compile(
    rf"(?P<prefix>(?:.*/)?)(?:{re.escape(DPKG_INFO)}/[^/]+\.list"
    rf"|(?:{'|'.join(map(re.escape, RPM_FOLDERS))})/{re.escape(RPM_SQLITE)})"
)
_COMPRESSIONS: Final = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
)


def compression_of(start: bytes) -> str | None:
    """Return how a file is compressed, by its first bytes."""
    return next((name for magic, name in _COMPRESSIONS if start.startswith(magic)), None)


def is_tar(block: bytes) -> bool:
    """Tell whether the first 512 bytes of a file are the header of an archive's first member."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def decompressed(path: Path, compression: str) -> IO[bytes]:
    """Open a compressed file for reading. Raises HostError without the library for zstd."""
    if compression == "gzip":
        import gzip

        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == "bzip2":
        import bz2

        return bz2.open(path, "rb")
    if compression == "xz":
        import lzma

        return lzma.open(path, "rb")
    return cast(IO[bytes], _zstd().open(path, "rb"))


def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise HostError(
                "archives compressed with zstd need the package backports.zstd",
                "pip install 'sharearea[estimate]', or unpack the archive with `zstd -d`",
            ) from None
    return zstd


class Archive:
    """A tar archive. work: folder for what must be a file of its own for a while."""

    def __init__(self, path: Path, compression: str | None, work: Path) -> None:
        self.kind = f"tar archive, {compression}" if compression else "tar archive"
        self._compressed = compression is not None
        self._work = work
        self._file: IO[bytes] = decompressed(path, compression) if compression else open(path, "rb")  # noqa: SIM115
        self._kept: dict[str, bytes | IO[bytes]] = {}
        if compression:
            try:
                block = self._file.read(512)
            except Exception as error:
                self._file.close()
                raise UsageError(
                    f"{path}: cannot be unpacked ({compression}): {reason_of(error)}", "is the file complete?"
                ) from None
            if not is_tar(block):
                self._file.close()
                raise UsageError(
                    f"{path}: is compressed with {compression}, and what is in it is no tar archive",
                    "unpack a compressed disk image first",
                )
            self._file.seek(0)

    def close(self) -> None:
        """Close the archive, and what was kept of it."""
        self._file.close()
        for kept in self._kept.values():
            if not isinstance(kept, bytes):
                kept.close()
        self._kept.clear()

    def read(self, intake: Intake) -> None:
        """Hand over every regular file, in the order of the archive."""
        intake.packages_come_later = True
        last = self._index() if not self._compressed else None
        times: Counter[int] = Counter()
        twice = 0
        layers = manifest = False
        for member in self._members(intake):
            path = _path(member)
            layers = layers or path.endswith("/layer.tar") or path.startswith("blobs/sha256/")
            manifest = manifest or path == "manifest.json"
            if not member.isreg():
                continue
            if last is not None:
                if last.get(path) != member.offset:
                    continue
            else:
                times[hash(path)] += 1
                twice += times[hash(path)] > 1
            intake.pieces(path, member.size, self._pieces(member, path))
        if twice:
            intake.note(f"{twice} paths come more than once in this compressed archive, and each time counts")
        if layers and manifest:
            intake.note("this looks like `docker save`, whose layers are archives of their own: use `docker export`")
        tree = KeptTree(self._kept)
        for prefix in tree.prefixes():
            intake.packages.read(tree, intake.note, prefix)
        intake.settle()

    def _index(self) -> dict[str, int]:
        """Where the last member of each path begins."""
        last: dict[str, int] = {}
        for member in self._members(None):
            # A later link or folder of the same name takes a file's place too.
            last[_path(member)] = member.offset
        self._file.seek(0)
        return last

    def _members(self, intake: Intake | None) -> Iterator[tarfile.TarInfo]:
        """Yield the members; an archive that is broken or cut ends there, and the intake hears of it."""
        try:
            with tarfile.open(fileobj=self._file, mode="r:", errorlevel=1) as archive:
                while (member := archive.next()) is not None:
                    yield member
                    archive.members = []  # type: ignore[attr-defined]  # else it remembers every member
                # It takes anything for the end: a block that is no header, or no block.
                self._file.seek(archive.offset)
                end = self._file.read(512)
                if end.strip(b"\0"):
                    raise Unreadable("there is something else than a header")
                if not end:
                    raise Unreadable("it ends without an end mark; it may be cut off")
        except _broken_file(tarfile.TarError, ValueError, Unreadable) as error:
            if intake is not None:
                intake.leave_out("", f"the archive cannot be read on; what came before is counted: {reason_of(error)}")

    def _pieces(self, member: tarfile.TarInfo, path: str) -> Iterator[Piece]:
        """Yield a member's bytes; databases of packages are kept as they pass."""
        kept = _DATABASE.fullmatch(path) if member.size <= MOST_DATABASE else None
        place: Any = None
        parts: list[bytes] = []
        if kept and path.endswith(RPM_SQLITE):
            place = tempfile.NamedTemporaryFile(prefix="sharearea-estimate-", dir=self._work)  # noqa: SIM115
        done = 0
        at = member.offset_data
        sparse: list[tuple[int, int]] = list(getattr(member, "sparse", None) or [(0, member.size)])
        for offset, size in sparse:
            if offset > done:
                yield Hole(offset - done)
            if self._compressed or kept:
                for part in self._read(at, size):
                    if place is not None:
                        keep(place, part)
                    elif kept:
                        parts.append(part)
                    yield part
            elif size:
                yield Stretch(self._file.fileno(), at, size)
            at += size
            done = max(done, offset + size)
        if place is not None:
            self._kept[path] = place
        elif kept:
            self._kept[path] = b"".join(parts)

    def _read(self, at: int, size: int) -> Iterator[bytes]:
        try:
            self._file.seek(at)
            while size:
                part = self._file.read(min(size, _CHUNK))
                if not part:
                    raise Unreadable(f"the archive ends {size} bytes too early")
                size -= len(part)
                yield part
        except _broken_file() as error:
            raise Unreadable(reason_of(error)) from None


def _broken_file(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading a damaged or cut file raises."""
    import lzma
    import zlib

    errors: list[type[Exception]] = [*others, OSError, EOFError, lzma.LZMAError, zlib.error]
    with contextlib.suppress(HostError):
        errors.append(_zstd().ZstdError)
    return tuple(errors)


def _path(member: tarfile.TarInfo) -> str:
    return "/".join(part for part in member.name.split("/") if part not in ("", "."))


class KeptTree:
    """The databases of packages that passed while an archive was read."""

    def __init__(self, files: dict[str, bytes | IO[bytes]]) -> None:
        self._files = files

    def prefixes(self) -> list[str]:
        """Return where in the archive the roots begin that have a database."""
        found = (_DATABASE.fullmatch(path) for path in self._files)
        return sorted({match["prefix"] for match in found if match})

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if it is none."""
        return [path[len(folder) + 1 :] for path in self._files if path.rpartition("/")[0] == folder]

    def read(self, path: str, limit: int) -> bytes | None:
        """Return a file's bytes; None if there is no such file, or it is longer than limit."""
        data = self._files.get(path)
        return data if isinstance(data, bytes) and len(data) <= limit else None

    @contextlib.contextmanager
    def database(self, path: str) -> Iterator[str | None]:
        """Give where sqlite finds this file."""
        file = self._files.get(path)
        yield file.name if file is not None and not isinstance(file, bytes) else None

"""Which package a file of a root belongs to, by what dpkg and rpm wrote down in it.

dpkg: one list of paths for each package in var/lib/dpkg/info. rpm: a table of package headers; the sqlite form (Fedora
since 33, RHEL 9, openSUSE's successors) is read here, as nothing on PyPI reads it without the system's own librpm.
Older forms (Berkeley DB, ndb) are not: they are named instead.

Nothing that is read is trusted: a broken list or header loses its names, nothing more.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from typing import Final, Protocol

DPKG_INFO: Final = "var/lib/dpkg/info"
RPM_FOLDERS: Final = ("usr/lib/sysimage/rpm", "var/lib/rpm")
RPM_SQLITE: Final = "rpmdb.sqlite"
RPM_OTHERS: Final = ("Packages", "Packages.db")
_LIST_BYTES: Final = 64 << 20  # longer lists are not read; the longest of Debian has 2 MiB
MOST_DATABASE: Final = 2 << 30  # bytes of an rpm database that is copied to be read; Fedora's have 0.3 GiB
_HEADER_BYTES: Final = 256 << 20  # rpm's own bound for a header


class Tree(Protocol):
    """The files of a root, for reading a few of them by path. Paths have no leading slash; links are not followed."""

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if it is none."""

    def read(self, path: str, limit: int) -> bytes | None:
        """Return a file's bytes; None if there is no such file, or it is longer than limit, or cannot be read."""

    def database(self, path: str) -> AbstractContextManager[str | None]:
        """Give the name of a file that sqlite can open, with the bytes of this one; None if it cannot be read."""


class Packages:
    """The package of each path of one root."""

    def __init__(self) -> None:
        self._packages: dict[str, str] = {}
        self._prefixes: list[str] = []

    def __len__(self) -> int:
        return len(self._packages)

    def add(self, name: str, paths: Iterator[str], prefix: str = "") -> None:
        """Say that a package has these paths; the first package that names a path has it."""
        for path in paths:
            self._packages.setdefault(prefix + path.strip("/"), name)
        if prefix not in self._prefixes:
            self._prefixes.append(prefix)

    def of(self, path: str) -> str | None:
        """Return the package of a path. Where /bin, /lib and /sbin are links into /usr, lists may still name those."""
        found = self._packages.get(path)
        if found is None:
            for prefix in self._prefixes:
                if path.startswith(prefix + "usr/"):
                    found = self._packages.get(prefix + path[len(prefix) + 4 :])
                    if found is not None:
                        break
        return found

    def read(self, tree: Tree, tell: Callable[[str], None], prefix: str = "") -> None:
        """Add what the databases in a root say; tell() hears of what cannot be read.

        prefix: where in the tree the root begins; empty, or it ends in a slash.
        """
        for name in sorted(tree.names(prefix + DPKG_INFO)):
            package = dpkg_package(name)
            if package is None:
                continue
            data = tree.read(f"{prefix}{DPKG_INFO}/{name}", _LIST_BYTES)
            if data is None:
                tell(f"{prefix}{DPKG_INFO}/{name}: this list of a package's files cannot be read")
                continue
            self.add(package, dpkg_paths(data), prefix)
        for folder in RPM_FOLDERS:
            names = tree.names(prefix + folder)
            if RPM_SQLITE in names:
                with tree.database(f"{prefix}{folder}/{RPM_SQLITE}") as database:
                    try:
                        if database is None:
                            raise sqlite3.OperationalError("the file cannot be read")
                        for package, paths in rpm_packages(database):
                            self.add(package, iter(paths), prefix)
                    except sqlite3.Error as error:
                        tell(f"{prefix}{folder}/{RPM_SQLITE}: this database of packages cannot be read: {error}")
            elif other := next((name for name in RPM_OTHERS if name in names), None):
                tell(
                    f"{prefix}{folder}/{other}: an rpm database of a kind that is not read (only rpmdb.sqlite is); "
                    "its files count as of no package"
                )


def dpkg_package(name: str) -> str | None:
    """Return the package that a file in dpkg's info folder lists the files of, without the architecture."""
    return name[: -len(".list")].partition(":")[0] if name.endswith(".list") else None


def dpkg_paths(data: bytes) -> Iterator[str]:
    """Yield the paths in one of dpkg's lists."""
    return iter(data.decode("utf-8", "surrogateescape").splitlines())


def rpm_packages(database: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each package of an rpm database in sqlite's form, with its paths. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro&immutable=1", uri=True)) as connection:
        for (blob,) in connection.execute("SELECT blob FROM Packages ORDER BY hnum"):
            if isinstance(blob, bytes) and len(blob) <= _HEADER_BYTES:
                found = rpm_header(blob)
                if found is not None:
                    yield found


# Tags and types of rpm's header, as rpm's documentation ("Package header format", "Tags") has them.
_NAME: Final = 1000
_DIR_INDEXES: Final = 1116
_BASE_NAMES: Final = 1117
_DIR_NAMES: Final = 1118
_INT32: Final = 4
_STRING: Final = 6
_STRINGS: Final = 8


def rpm_header(blob: bytes) -> tuple[str, list[str]] | None:
    """Return the name and the paths in a package's header; None if it is broken or names nothing."""
    if len(blob) < 8:
        return None
    count, size = struct.unpack_from(">II", blob)
    start = 8 + 16 * count
    if start + size > len(blob):
        return None
    store = memoryview(blob)[start : start + size]
    found: dict[int, tuple[int, int, int]] = {}
    for tag, kind, offset, number in struct.iter_unpack(">IIII", blob[8:start]):
        if tag in (_NAME, _DIR_INDEXES, _BASE_NAMES, _DIR_NAMES) and offset <= size:
            found[tag] = (kind, offset, number)
    names = _strings(store, found.get(_NAME))
    bases = _strings(store, found.get(_BASE_NAMES))
    folders = _strings(store, found.get(_DIR_NAMES))
    kind, offset, number = found.get(_DIR_INDEXES, (0, 0, 0))
    if not names or kind not in (0, _INT32) or offset + 4 * number > size:
        return None
    indexes = struct.unpack_from(f">{number}I", store, offset) if number else ()
    return names[0], [
        folders[index] + base for index, base in zip(indexes, bases, strict=False) if index < len(folders)
    ]


def _strings(store: memoryview, entry: tuple[int, int, int] | None) -> list[str]:
    if entry is None or entry[0] not in (_STRING, _STRINGS):
        return []
    _, offset, number = entry
    parts = bytes(store[offset:]).split(b"\0", number)[:number]
    return [part.decode("utf-8", "surrogateescape") for part in parts]

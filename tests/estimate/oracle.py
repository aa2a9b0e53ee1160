"""What an estimate must say, counted slowly and another way: whole pages in dictionaries, ELF headers by struct."""

from __future__ import annotations

import os
import stat
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

PAGE = 4096
ZERO = bytes(PAGE)

Files = Mapping[str, bytes]
"""Content by path, each content once; paths have no leading slash."""


def files_of(root: Path) -> dict[str, bytes]:
    """Read the regular files of a folder; of a file with several names the first one by folder, then by name."""
    found: dict[str, bytes] = {}
    seen = set()
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                found[str(path.relative_to(root))] = path.read_bytes()
    return found


def pages_of(data: bytes) -> list[bytes]:
    """Cut a content into pages as the page cache has them."""
    return [data[at : at + PAGE].ljust(PAGE, b"\0") for at in range(0, len(data), PAGE)]


def classes_of(data: bytes) -> list[str]:
    """The class of each page of a file, by its loaded segments. Little-endian 64-bit ELF only."""
    count = len(pages_of(data))
    classes = ["data"] * count
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 16)[0] not in (2, 3):
        return classes
    start, size, number = (*struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54))
    segments = [struct.unpack_from("<IIQQQQQQ", data, start + size * entry) for entry in range(number)]
    for wanted, flags_wanted, mask in (("rodata", 4, 7), ("text", 1, 1)):
        for kind, flags, offset, _, _, length, _, _ in segments:
            if kind == 1 and length and flags & mask == flags_wanted:
                for page in range(offset // PAGE, min(count, -(-(offset + length) // PAGE))):
                    classes[page] = wanted
    return classes


@dataclass
class Counted:
    """The figures, in bytes."""

    total: int = 0
    zero: int = 0
    text: int = 0
    self_shared: int = 0
    possible: Fraction = Fraction(0)
    pairs: dict[tuple[int, int], Fraction] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)


def count(roots: Sequence[Files], backend: str = "local", memory: int | None = None) -> Counted:
    """Count what the roots share."""
    found = Counted(classes={"text": 0, "rodata": 0, "data": 0})
    held: list[set[bytes]] = []
    there: list[Fraction] = []
    for files in roots:
        occurrences: dict[bytes, int] = defaultdict(int)
        shareable = set()
        pages = 0
        for page, class_ in _pages(files):
            pages += 1
            if page == ZERO:
                found.zero += PAGE
                continue
            found.classes[class_] += PAGE
            occurrences[page] += 1
            if backend == "local" or class_ != "text":
                shareable.add(page)
        found.total += pages * PAGE
        found.self_shared += PAGE * sum(number - 1 for number in occurrences.values())
        held.append(shareable)
        total = pages * PAGE
        there.append(Fraction(1) if memory is None or total <= memory else Fraction(memory, total))
    found.text = found.classes["text"]
    for page in set().union(*held):
        parts = sorted((there[root] for root in range(len(roots)) if page in held[root]), reverse=True)
        found.possible += PAGE * sum(parts[1:], Fraction(0))
    for a in range(len(roots)):
        for b in range(a + 1, len(roots)):
            found.pairs[a, b] = PAGE * len(held[a] & held[b]) * min(there[a], there[b])
    return found


def _pages(files: Files) -> Iterator[tuple[bytes, str]]:
    for data in files.values():
        yield from zip(pages_of(data), classes_of(data), strict=True)

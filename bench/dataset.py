"""The bytes to share: domains' folders with files as large as this system's libraries are, and random content.

Random, so that what can be shared is known exactly: the common pages, once for each domain but one. It leaves reading
and counting to host.py.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from sharearea.common.wire import PAGE_SIZE

from .host import MIB
from .report import Tell

_LIBRARIES: Final = Path("/usr/lib")
_LARGEST: Final = 16 * MIB
_OWN_FILE_BYTES: Final = MIB


@cache
def _library_sizes() -> tuple[int, ...]:
    """Sizes of the files below /usr/lib, in an order that is fixed and mixes folders; made up if there are few."""
    found: list[tuple[bytes, int]] = []
    for folder, _, names in os.walk(_LIBRARIES):
        for name in names:
            path = os.path.join(folder, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode) and 0 < info.st_size <= _LARGEST:
                found.append((hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), info.st_size))
    if len(found) >= 1000:
        return tuple(size for _, size in sorted(found))
    sizes = random.Random(1)
    return tuple(min(_LARGEST, 1 + int(sizes.lognormvariate(8.4, 2.0))) for _ in range(20_000))


def library_sizes(total_bytes: int, smallest: int) -> list[int]:
    """Return file sizes like this system's libraries', `smallest` bytes or more, that add up to `total_bytes`."""
    sizes: list[int] = []
    left = total_bytes
    known = [size for size in _library_sizes() if size >= smallest]
    while left >= smallest:
        for size in known:
            if size <= left:
                sizes.append(size)
                left -= size
            if left < smallest:
                break
        else:
            if min(known) > left:
                sizes.append(left)
                left = 0
    return sizes


@dataclass(slots=True)
class Domain:
    """One domain's folder; `groups` are folders in it, with their files."""

    name: str
    root: Path
    groups: dict[str, list[Path]] = field(default_factory=dict)

    def files(self, groups: tuple[str, ...]) -> list[Path]:
        """Return the files of some groups."""
        return [path for group in groups for path in self.groups[group]]


@dataclass(slots=True)
class DataSet:
    """Domains whose groups have the same content everywhere, all but the group "own"."""

    domains: list[Domain]
    pages: dict[str, int]  # of each group, in one domain

    def shareable_bytes(self, groups: tuple[str, ...]) -> int:
        """Return what can be saved at best: every common page once for each domain but one."""
        return sum(self.pages[group] for group in groups if group != "own") * (len(self.domains) - 1) * PAGE_SIZE

    def files(self, groups: tuple[str, ...]) -> list[Path]:
        """Return the files of some groups in all domains."""
        return [path for domain in self.domains for path in domain.files(groups)]


def write(
    folder: Path, domains: int, group_bytes: dict[str, int], own_bytes: int, smallest: int, tell: Tell
) -> DataSet:
    """Write the files of `domains` domains below `folder`, and wait until they are on the disk.

    group_bytes: common groups by name. Files of the group "own" are 1 MiB each and have other content everywhere.
    """
    made = [Domain(f"bench-{n + 1}", folder / f"bench-{n + 1}") for n in range(domains)]
    pages: dict[str, int] = {}
    for group, size in group_bytes.items():
        tell(f"writing {domains} x {size / MIB:.0f} MiB of common files")
        sizes = library_sizes(size, smallest)
        pages[group] = sum(-(-size // PAGE_SIZE) for size in sizes)
        for domain in made:
            domain.groups[group] = []
        for at, size in enumerate(sizes):
            data = os.urandom(size)
            for domain in made:
                _write(domain, group, f"{at // 100:03}/file-{at:05}", data)
    pages["own"] = own_bytes // PAGE_SIZE
    tell(f"writing {domains} x {own_bytes / MIB:.0f} MiB of own files")
    for domain in made:
        domain.groups["own"] = []
        for at in range(0, own_bytes, _OWN_FILE_BYTES):
            _write(domain, "own", f"data-{at // _OWN_FILE_BYTES:04}", os.urandom(min(_OWN_FILE_BYTES, own_bytes - at)))
    os.sync()  # dirty pages cannot be dropped
    return DataSet(made, pages)


def _write(domain: Domain, group: str, name: str, data: bytes) -> None:
    path = domain.root / group / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)
    domain.groups[group].append(path)


def remove(folder: Path) -> None:
    """Remove everything below a folder, and the folder."""
    shutil.rmtree(folder, ignore_errors=True)

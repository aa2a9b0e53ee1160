"""From counted pages to the figures of an estimate: pure arithmetic. What each figure means: docs/estimate.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

PAGE_SIZE: Final = 4096
ONE: Final = 1 << 20  # the weight of a page that is always there: common/native.py, TALLY_ONE
NO_PACKAGE: Final = "(no package)"

Backend = Literal["local", "xen"]
BACKENDS: Final[tuple[Backend, ...]] = ("local", "xen")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something of a root that was not counted, and why. path: inside the root; empty for the root as a whole."""

    root: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class RootPages:
    """What one root has, in pages; zero pages are in `pages` and in no class. repeated: beyond the first of a kind."""

    name: str
    kind: str
    files: int
    pages: int
    zero: int
    text: int
    rodata: int
    data: int
    repeated: int = 0


@dataclass(frozen=True, slots=True)
class SharedPages:
    """What the roots have in common, counted in ONE to a page (but `distinct`). Roots by their numbers."""

    distinct: int
    text: int
    rodata: int
    data: int
    area: int
    repeated: int
    pairs: dict[tuple[int, int], int]
    packages: dict[str, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything that was found. The properties are bytes."""

    backend: Backend
    memory: int | None
    roots: Sequence[RootPages]
    shared: SharedPages
    left_out: Sequence[LeftOut] = ()
    left_out_count: int = 0
    notes: Sequence[str] = ()
    min_file: int = 0
    small_files: int = 0
    seconds: float = 0.0
    spilled: int = field(default=0)

    @property
    def total(self) -> int:
        """All pages of all files."""
        return PAGE_SIZE * sum(root.pages for root in self.roots)

    @property
    def zero(self) -> int:
        """Pages of zeros."""
        return PAGE_SIZE * sum(root.zero for root in self.roots)

    @property
    def self_shared(self) -> int:
        """Pages beyond the first of a kind in the same root."""
        return PAGE_SIZE * sum(root.repeated for root in self.roots)

    @property
    def text(self) -> int:
        """Executable text."""
        return PAGE_SIZE * sum(root.text for root in self.roots)

    @property
    def resident(self) -> int:
        """What the roots' guests have in memory at a time by the model; everything without a memory size."""
        return sum(resident_bytes(root.pages * PAGE_SIZE, self.memory) for root in self.roots)

    @property
    def classes(self) -> dict[str, tuple[int, int]]:
        """By page class: bytes of it in all roots, and what sharing them saves on this backend."""
        saved_text = 0 if self.backend == "xen" else self.shared.text
        return {
            "text": (self.text, weighed_bytes(saved_text)),
            "rodata": (PAGE_SIZE * sum(root.rodata for root in self.roots), weighed_bytes(self.shared.rodata)),
            "data": (PAGE_SIZE * sum(root.data for root in self.roots), weighed_bytes(self.shared.data)),
        }

    @property
    def possible_saved(self) -> int:
        """Copies that need not be there: of each page one for each root that has it, but the first."""
        return self.possible_by_backend[self.backend]

    @property
    def possible_by_backend(self) -> dict[Backend, int]:
        """The same on each backend."""
        rest = self.shared.rodata + self.shared.data
        return {"local": weighed_bytes(self.shared.text + rest), "xen": weighed_bytes(rest)}

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """Both roots' numbers, and what the two would save if there were no others; in the order of roots."""
        return [(a, b, weighed_bytes(weighed)) for (a, b), weighed in sorted(self.shared.pairs.items())]

    @property
    def packages(self) -> list[tuple[str, int]]:
        """What is saved by package, most first; their sum is what is saved in all, but for rounding."""
        found = [(name, weighed_bytes(weighed)) for name, weighed in self.shared.packages.items()]
        return sorted(((name, size) for name, size in found if size), key=lambda pair: (-pair[1], pair[0]))

    def record(self) -> dict[str, Any]:
        """Return what `--json` writes."""
        names = [root.name for root in self.roots]
        return {
            "roots": names,
            "total_bytes": self.total,
            "zero_bytes": self.zero,
            "self_shared_bytes": self.self_shared,
            "possible_saved_bytes": self.possible_saved,
            "text_bytes": self.text,
            "pairs": [{"a": names[a], "b": names[b], "shared_bytes": size} for a, b, size in self.pairs],
            "packages": [{"name": name, "bytes": size} for name, size in self.packages],
            "backend": self.backend,
            "memory_bytes": self.memory,
            "resident_bytes": self.resident,
            "possible_saved_bytes_by_backend": dict(self.possible_by_backend),
            "area_bytes": weighed_bytes(self.shared.area),
            "distinct_bytes": self.shared.distinct * PAGE_SIZE,
            "self_shared_saved_bytes": weighed_bytes(self.shared.repeated),
            "classes": [
                {"class": name, "total_bytes": total, "saved_bytes": saved}
                for name, (total, saved) in self.classes.items()
            ],
            "root_details": [
                {
                    "name": root.name,
                    "kind": root.kind,
                    "files": root.files,
                    "total_bytes": root.pages * PAGE_SIZE,
                    "zero_bytes": root.zero * PAGE_SIZE,
                    "self_shared_bytes": root.repeated * PAGE_SIZE,
                    "text_bytes": root.text * PAGE_SIZE,
                    "resident_bytes": resident_bytes(root.pages * PAGE_SIZE, self.memory),
                }
                for root in self.roots
            ],
            "min_file_bytes": self.min_file,
            "small_files": self.small_files,
            "left_out_count": self.left_out_count,
            "left_out": [{"root": entry.root, "path": entry.path, "reason": entry.reason} for entry in self.left_out],
            "notes": list(self.notes),
        }


def weighed_bytes(weighed: int) -> int:
    """Return a weighed number of pages in bytes, rounded to the nearest page."""
    return (weighed + ONE // 2) // ONE * PAGE_SIZE


def resident_bytes(total: int, memory: int | None) -> int:
    """Return how much of a root's pages its guest has in memory at a time: all of it, or all that fits."""
    return total if memory is None else min(total, memory)


def weight(total: int, memory: int | None) -> int:
    """Return the part of a root's pages that is in its guest's memory at a time, ONE for all of them."""
    if memory is None or total <= memory:
        return ONE
    return memory * ONE // total

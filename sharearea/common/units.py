"""Sizes in bytes, and how people write them."""

from __future__ import annotations

from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

SIZE_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}


def size_text(size: int) -> str:
    """Write a number of bytes as a configuration file would: the largest unit that divides it, as `64 MiB`."""
    for unit, factor in reversed(SIZE_UNITS.items()):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} B"

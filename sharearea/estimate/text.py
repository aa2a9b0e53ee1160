"""Sizes, parts and names as people read them, and sizes as they write them. Pure."""

from __future__ import annotations

import re
from typing import Final

from ..common.units import GIB, KIB, MIB, TIB

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(text: str) -> int:
    """Return a size in bytes: `512M`, `4GiB`, `1.5 T`; units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size; write 512M, 4G or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def size_text(size: int) -> str:
    """Return a size in the unit that leaves it short."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size} B"


def percent(part: int, whole: int) -> str:
    """Return a part in percent of the whole; nothing of nothing is 0 %."""
    return f"{100 * part / whole if whole else 0:.1f} %"


def shown(name: str) -> str:
    """Return a name from a guest's disk so that it can be shown: what is no printable character is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in name
    )

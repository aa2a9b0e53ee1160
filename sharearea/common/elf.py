"""Which pages of an ELF file are executable text, which read-only data: its page classes, from its program headers.

Pure, and of no trust: the bytes are a guest's. Only statistics depend on what is said here. Files of every other kind,
object files and kernel modules, which have no program headers, have no classes: all of their pages are plain data.
"""

from __future__ import annotations

import struct
from typing import Final

from .wire import NO_CLASSES, PAGE_SIZE

_PT_LOAD: Final = 1
_PF_X: Final = 1
_PF_W: Final = 2
# e_phoff, e_phentsize, e_phnum of the header; p_type, p_flags, p_offset, p_filesz of a program header.
_HEAD64: Final = struct.Struct("<32xQ14xHH")
_HEAD32: Final = struct.Struct("<28xI10xHH")
_LOAD64: Final = struct.Struct("<IIQ16xQ")
_LOAD32: Final = struct.Struct("<II8xI4xI")


def page_classes(first_page: bytes, page_count: int) -> bytes:
    """Return wire.Roots' `classes` of a file: first page and count of its text, and of all that is mapped read-only.

    `first_page`: its first 4096 bytes, or all of it; `page_count`: its pages. The second stretch is from the first to
    the last page of segments that may not be written, so the first one may lie in it; what lies in both is text. Where
    several segments may be executed, the text reaches from the first of them to the last.
    """
    text: list[int] = []
    fixed: list[int] = []
    for flags, first, end in _segments(first_page):
        end = min(end, page_count)
        if first < end and not flags & _PF_W:
            fixed += (first, end)
            if flags & _PF_X:
                text += (first, end)
    if not fixed:
        return NO_CLASSES
    stretches = [(min(ends), max(ends) - min(ends)) if ends else (0, 0) for ends in (text, fixed)]
    return struct.pack("<4I", *stretches[0], *stretches[1])


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """Return (flags, first page, page behind the last) of every loadable segment with bytes in the file."""
    if data[:4] != b"\x7fELF" or data[5:6] != b"\1" or data[4:5] not in (b"\1", b"\2"):
        return []
    wide = data[4:5] == b"\2"
    head, load = (_HEAD64, _LOAD64) if wide else (_HEAD32, _LOAD32)
    if len(data) < head.size:
        return []
    offset, size, count = head.unpack_from(data)
    found: list[tuple[int, int, int]] = []
    if size < load.size:
        return []
    for at in range(offset, offset + size * count, size):
        if at + load.size > len(data):
            break
        if wide:
            kind, flags, begin, length = load.unpack_from(data, at)
        else:
            kind, begin, length, flags = load.unpack_from(data, at)
        if kind == _PT_LOAD and length:
            found.append((flags, begin // PAGE_SIZE, -(-(begin + length) // PAGE_SIZE)))
    return found

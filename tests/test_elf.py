"""Page classes: what ELF program headers say of a file's pages, by example and for bytes that are no ELF."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea.common.elf import page_classes
from sharearea.common.wire import NO_CLASSES, PAGE_SIZE
from sharearea.index import class_pages

LOAD, DYNAMIC = 1, 2
X, W, R = 1, 2, 4


def elf64(*segments: tuple[int, int, int, int], at: int = 64, size: int = 56) -> bytes:
    """The first page of a file with these program headers (type, flags, offset, bytes in the file)."""
    head = b"\x7fELF\2\1" + bytes(26) + struct.pack("<Q", at) + bytes(14) + struct.pack("<HH", size, len(segments))
    data = bytearray(head.ljust(at, b"\0"))
    for kind, flags, offset, length in segments:
        data += struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, length, length, 4096).ljust(size, b"\0")
    return bytes(data)


def elf32(*segments: tuple[int, int, int, int]) -> bytes:
    """The same of a 32-bit file."""
    head = b"\x7fELF\1\1" + bytes(22) + struct.pack("<I", 52) + bytes(10) + struct.pack("<HH", 32, len(segments))
    data = bytearray(head.ljust(52, b"\0"))
    for kind, flags, offset, length in segments:
        data += struct.pack("<IIIIIIII", kind, offset, offset, offset, length, length, flags, 4096)
    return bytes(data)


def numbers(classes: bytes) -> tuple[int, ...]:
    """First page and count of text, and of what is mapped read-only."""
    return tuple(array("I", classes))


USUAL = (
    (LOAD, R, 0, 0x1234),
    (LOAD, R | X, 0x2000, 0x3001),
    (LOAD, R, 0x6000, 0x800),
    (LOAD, R | W, 0x6DF0, 0x400),
    (DYNAMIC, R | W, 0x6E00, 0x100),
)


@pytest.mark.parametrize("elf", [elf64, elf32])
def test_a_library_as_linkers_make_them(elf: object) -> None:
    assert callable(elf)
    assert numbers(page_classes(elf(*USUAL), 20)) == (2, 4, 0, 7)


def test_what_is_beyond_the_file_is_left_out() -> None:
    assert numbers(page_classes(elf64(*USUAL), 3)) == (2, 1, 0, 3)
    assert numbers(page_classes(elf64(*USUAL), 2)) == (0, 0, 0, 2)
    assert page_classes(elf64((LOAD, R | X, 1 << 63, 1 << 63)), 262_144) == NO_CLASSES


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF",
        b"#!/bin/sh\n",
        elf64(),
        elf64((DYNAMIC, R | X, 0, 4096)),
        elf64((LOAD, R | W, 0, 4096)),
        elf64((LOAD, R | X, 0, 0)),
        elf64((LOAD, R | X, 0, 4096), size=55)[:100],
        elf64((LOAD, R | X, 0, 4096), at=4090)[:4096],
        b"\x7fELF\2\2" + elf64(*USUAL)[6:],  # big-endian: of no machine that this runs on
        b"\x7fELF\3\1" + elf64(*USUAL)[6:],
        elf64(*USUAL)[:60],
    ],
)
def test_everything_else_has_no_classes(data: bytes) -> None:
    assert page_classes(data, 20) == NO_CLASSES


@given(st.binary(max_size=300), st.integers(0, 64), st.integers(0, 1 << 18))
def test_any_bytes_give_stretches_inside_the_file(tail: bytes, at: int, pages: int) -> None:
    for head in (elf64(*USUAL), elf32(*USUAL)):
        text, texts, fixed, count = numbers(page_classes(head[: len(head) - at] + tail, pages))
        assert text + texts <= pages
        assert fixed + count <= pages


def test_a_real_program_is_as_readelf_says() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    path = Path(sys.executable).resolve()
    said = subprocess.run([readelf, "-lW", path], capture_output=True, text=True, check=True).stdout
    text = [
        (int(found[1], 16) // PAGE_SIZE, -(-(int(found[1], 16) + int(found[2], 16)) // PAGE_SIZE))
        for found in re.finditer(r"LOAD +(0x\w+) +0x\w+ +0x\w+ +(0x\w+) +0x\w+ R E", said)
    ]
    ((first, end),) = text
    with path.open("rb") as file:
        found = numbers(page_classes(file.read(PAGE_SIZE), -(-os.stat(path).st_size // PAGE_SIZE)))
    assert found[:2] == (first, end - first)
    assert found[2] <= first
    assert found[2] + found[3] >= end


def test_runs_are_counted_by_class() -> None:
    classes = struct.pack("<4I", 2, 4, 0, 8)  # text 2-5, read-only data 0-1 and 6-7

    def runs(*some: tuple[int, int]) -> bytes:
        return array("I", [n for first, count in some for n in (first, 99, count)]).tobytes()

    assert class_pages(runs((0, 20)), classes) == (4, 4)
    assert class_pages(runs((0, 1), (3, 2), (5, 2), (9, 5)), classes) == (3, 2)
    assert class_pages(runs((8, 5)), classes) == (0, 0)
    assert class_pages(b"", classes) == (0, 0)
    assert class_pages(runs((0, 20)), NO_CLASSES) == (0, 0)
    beside = struct.pack("<4I", 0, 2, 4, 2)  # text that lies outside of what is read-only
    assert class_pages(runs((0, 20)), beside) == (2, 2)

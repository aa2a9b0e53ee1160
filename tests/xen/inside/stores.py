"""Tries to store into a granted page, and ends as that ends: by a signal, or with 0 if nobody objected.

Order on standard input: {"area": domid, "ref": reference, "way": "store" | "mprotect"}. With "mprotect" the mapping is
first made writable, as far as the guest's kernel is concerned.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import struct
import sys

PAGE = 4096
MAP_GRANT_REF = (24 << 16) | (ord("G") << 8)  # <xen/gntdev.h>


def main() -> int:
    """Map, and store."""
    order = json.load(sys.stdin)
    fd = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
    request = bytearray(struct.pack("<IIQII", 1, 0, 0, order["area"], order["ref"]))
    fcntl.ioctl(fd, MAP_GRANT_REF, request, True)
    (index,) = struct.unpack_from("<Q", request, 8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(PAGE), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(index))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    ctypes.string_at(address, 1)
    if order["way"] == "mprotect":
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memset(address, 0x5A, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Maps granted pages in a guest and holds them, on order: a JSON order per line of standard input, an answer per line.

{"do": "map", "area": domid, "refs": [...], "write": false} maps all of them with one ioctl and one mmap, in place of
what was held before; {"do": "read"} reads what is held again; {"do": "drop"} lets go. An answer has "ok", and "pages",
the SHA-256 of each page held, or "errno". Needs nothing but Python and /dev/xen/gntdev; nothing of sharearea: it
shows what any program in a guest could do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

PAGE = 4096


def ioc(number: int, size: int) -> int:
    """An ioctl of <xen/gntdev.h>: _IOC(_IOC_NONE, 'G', number, size)."""
    return (size << 16) | (ord("G") << 8) | number


MAP_GRANT_REF = ioc(0, 24)


class Holder:
    """What is mapped at the moment."""

    def __init__(self) -> None:
        self._fd = -1
        self._map: mmap.mmap | None = None

    def map(self, order: dict[str, Any]) -> list[str]:
        """Map references of an area, and read them."""
        self.drop({})
        refs = order["refs"]
        fd = os.open("/dev/xen/gntdev", os.O_RDWR | os.O_CLOEXEC)
        try:
            request = bytearray(struct.pack("<IIQ", len(refs), 0, 0))
            for ref in refs:
                request += struct.pack("<II", order["area"], ref)
            fcntl.ioctl(fd, MAP_GRANT_REF, request, True)
            (index,) = struct.unpack_from("<Q", request, 8)
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if order.get("write") else 0)
            self._map = mmap.mmap(fd, len(refs) * PAGE, flags=mmap.MAP_SHARED, prot=protection, offset=index)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        return self.read({})

    def read(self, order: dict[str, Any]) -> list[str]:
        """Read what is held."""
        del order
        if self._map is None:
            return []
        return [hashlib.sha256(self._map[at : at + PAGE]).hexdigest() for at in range(0, len(self._map), PAGE)]

    def drop(self, order: dict[str, Any]) -> list[str]:
        """Let go. The mapping goes first, the descriptor's own record of the references with the descriptor."""
        del order
        if self._map is not None:
            self._map.close()
            os.close(self._fd)
            self._map, self._fd = None, -1
        return []


def main() -> int:
    """Answer until standard input ends."""
    holder = Holder()
    verbs: dict[str, Callable[[dict[str, Any]], list[str]]] = {
        "map": holder.map,
        "read": holder.read,
        "drop": holder.drop,
    }
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer: dict[str, Any] = {"ok": True, "pages": verbs[order["do"]](order)}
        except OSError as error:
            answer = {"ok": False, "errno": error.errno}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Grants pages to guests on order, from dom0, with the installed package: an area domain of its own, "view".

A JSON order per line of standard input, {"ok": true, "answer": ...} or {"ok": false, "error": text} per line of output:
{"do": "fill", "seed": n, "pages": n} puts the pages of content(seed, pages) into a new area, answers with its domain;
{"do": "grant", "domid": n, "first": reference} grants all of them in order; {"do": "revoke", "first": reference} takes
that back and says how many are still in use; {"do": "destroy"} destroys the area, whoever maps it. view.py is the other
side.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from typing import Any

from sharearea.area.toolstack import Toolstack
from sharearea.area.xen import XenArea
from sharearea.common import native
from sharearea.common.errors import ShareareaError

PAGE = 4096
KEY = bytes(range(32))
SEGMENT_SLOTS = 512


def content(seed: int, pages: int, tail: int) -> bytes:
    """Random pages; the last has `tail` bytes and zeros. Every page begins with a return instruction."""
    data = bytearray(random.Random(seed).randbytes(pages * PAGE))
    data[::PAGE] = b"\xc3" * pages
    data[(pages - 1) * PAGE + tail :] = bytes(PAGE - tail)
    return bytes(data)


class Granter:
    """The area, and how many pages it has."""

    def __init__(self) -> None:
        self._area: XenArea | None = None
        self._pages = 0

    def area(self) -> XenArea:
        """The area that was filled."""
        if self._area is None:
            raise RuntimeError("nothing was filled")
        return self._area

    def fill(self, seed: int, pages: int, tail: int) -> int:
        """Make an area with these pages."""
        if self._area is not None:
            self._area.destroy()
        self._area = XenArea("view", os.urandom(16), KEY, SEGMENT_SLOTS, 256 << 20, None, Toolstack())
        self._pages = pages
        data = content(seed, pages, tail)
        for first in range(0, pages, SEGMENT_SLOTS):
            part = data[first * PAGE : (first + SEGMENT_SLOTS) * PAGE]
            want, _ = native.fingerprint_pages(KEY, part)
            ok, _ = self._area.fill(first, part, want)
            if ok.strip(b"\1"):
                raise RuntimeError("a copy has another fingerprint")
        if self._area.domid is None:
            raise RuntimeError("the area has no domain")
        return self._area.domid

    def grant(self, domid: int, first: int) -> int:
        """Grant all pages, in order."""
        slots, refs = range(self._pages), range(first, first + self._pages)
        self.area().grant(domid, packed(slots), packed(refs))
        return self._pages

    def revoke(self, first: int) -> int:
        """Revoke them; return how many are in use."""
        return sum(self.area().revoke(packed(range(first, first + self._pages))))

    def destroy(self) -> int:
        """Destroy the area's domain."""
        self.area().destroy()
        self._area = None
        return 0


def packed(numbers: range) -> bytes:
    """A packed column."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def main() -> int:
    """Answer until standard input ends."""
    granter = Granter()
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        verb = order.pop("do")
        try:
            if verb not in ("fill", "grant", "revoke", "destroy"):
                raise RuntimeError(f"no such order: {verb}")
            answer: dict[str, Any] = {"ok": True, "answer": getattr(granter, verb)(**order)}
        except (ShareareaError, RuntimeError, OSError) as error:
            answer = {"ok": False, "error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

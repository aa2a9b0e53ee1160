"""A broker that can be told to kill itself with -9 in the middle of its work: `broker_dies.py BROKER-ARGUMENTS...`.

The broker is the installed one; only the area's calls and the store's are cut. When the file DUE names a point, the
next call there does the first half of its work, and then the process is gone, without a word to anybody. Points: fill
(pages are copied into slots), commit (slots are recorded, not yet published), grant (entries are written), sent (all
entries are there, nobody was told), revoke (entries are freed).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from sharearea.area.xen import XenArea
from sharearea.cli import main
from sharearea.store import Store

DUE = Path("/tmp/die-at")
LEAST = 16
"""Smaller pieces of work are let through: half of them is nothing."""


def due(point: str) -> bool:
    """Say whether this call is to be cut; it is the last one then, so the next broker lives."""
    try:
        if DUE.read_text().strip() != point:
            return False
    except OSError:
        return False
    DUE.unlink()
    return True


def die() -> NoReturn:
    """End at once."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


def half(column: bytes, unit: int) -> bytes:
    """Return the first half of a packed column."""
    return column[: len(column) // unit // 2 * unit]


def cut() -> None:
    """Put the cuts where they belong."""
    area: Any = XenArea  # its methods are replaced
    fill, grant, revoke, apply = area.fill, area.grant, area.revoke, Store.apply

    def cut_fill(self: XenArea, first: int, pages: bytes, want: bytes) -> Any:
        if len(want) >= LEAST * 32 and due("fill"):
            fill(self, first, half(pages, 4096), half(want, 32))
            die()
        return fill(self, first, pages, want)

    def cut_commit(self: Store, changes: Any) -> None:
        apply(self, changes)
        filled = (change for change in changes if type(change).__name__ == "SlotsFilled")
        if any(len(change.fingerprints) >= LEAST * 32 for change in filled) and due("commit"):
            die()

    def cut_grant(self: XenArea, domid: int, slots: bytes, refs: bytes) -> None:
        if len(refs) >= LEAST * 4 and due("grant"):
            grant(self, domid, half(slots, 4), half(refs, 4))
            die()
        grant(self, domid, slots, refs)
        if len(refs) >= LEAST * 4 and due("sent"):
            die()

    def cut_revoke(self: XenArea, refs: bytes) -> bytes:
        if len(refs) >= LEAST * 4 and due("revoke"):
            revoke(self, half(refs, 4))
            die()
        return bytes(revoke(self, refs))

    area.fill, area.grant, area.revoke = cut_fill, cut_grant, cut_revoke
    Store.apply = cut_commit  # type: ignore[method-assign]


if __name__ == "__main__":
    cut()
    sys.exit(main(sys.argv[1:]))

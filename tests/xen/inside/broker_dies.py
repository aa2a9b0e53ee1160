"""A broker that kills itself with -9 in the middle of one kind of work: `broker_dies.py POINT BROKER-ARGUMENTS...`.

The broker is the installed one; only the area's call at POINT is cut: it does the first half of its work, and then the
process is gone, without a word to anybody. POINT: fill (pages are copied into slots), commit (slots are recorded, not
yet published), grant (entries are written), sent (all entries are there, nobody was told), revoke (entries are freed).
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

from sharearea.area.xen import XenArea
from sharearea.cli import main
from sharearea.store import Store

LEAST = 16
"""Smaller pieces of work are let through: half of them is nothing."""


def die() -> NoReturn:
    """End at once."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still here")


def half(column: bytes, unit: int) -> bytes:
    """Return the first half of a packed column."""
    return column[: len(column) // unit // 2 * unit]


def cut(point: str) -> None:
    """Put the cut where it belongs."""
    area: Any = XenArea  # its methods are replaced
    fill, grant, revoke, apply = area.fill, area.grant, area.revoke, Store.apply

    def cut_fill(self: XenArea, first: int, pages: bytes, want: bytes) -> Any:
        if len(want) < LEAST * 32:
            return fill(self, first, pages, want)
        fill(self, first, half(pages, 4096), half(want, 32))
        die()

    def cut_commit(self: Store, changes: Any) -> None:
        apply(self, changes)
        if any(type(change).__name__ == "SlotsFilled" and len(change.fingerprints) >= LEAST * 32 for change in changes):
            die()

    def cut_grant(self: XenArea, domid: int, slots: bytes, refs: bytes) -> None:
        if len(refs) < LEAST * 4:
            grant(self, domid, slots, refs)
            return
        grant(self, domid, half(slots, 4), half(refs, 4))
        die()

    def cut_sent(self: XenArea, domid: int, slots: bytes, refs: bytes) -> None:
        grant(self, domid, slots, refs)
        if len(refs) >= LEAST * 4:
            die()

    def cut_revoke(self: XenArea, refs: bytes) -> bytes:
        if len(refs) < LEAST * 4:
            return bytes(revoke(self, refs))
        revoke(self, half(refs, 4))
        die()

    match point:
        case "fill":
            area.fill = cut_fill
        case "commit":
            Store.apply = cut_commit  # type: ignore[method-assign]
        case "grant":
            area.grant = cut_grant
        case "sent":
            area.grant = cut_sent
        case "revoke":
            area.revoke = cut_revoke
        case _:
            raise SystemExit(f"no such point: {point}")


if __name__ == "__main__":
    cut(sys.argv[1])
    sys.exit(main(sys.argv[2:]))

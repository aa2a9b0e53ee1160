"""What a guest's kernel complains of, in its log."""

from __future__ import annotations

import re
from typing import Final

COMPLAINT: Final = re.compile(
    r"\bBUG\b|\bWARNING:|Oops|Bad page|Call Trace|general protection|Out of memory|hung task|rcu.*stall"
    r"|shareview: .*lost|UBSAN|non-static key|blocked for more than|kmemleak: .*disabled"
)
KNOWN: Final = re.compile(r"WARNING: .* at include/linux/mm_inline\.h:\d+ unmap_page_range")
"""Linux 6.1 in a PV guest, with or without sharearea: pte_install_uffd_wp_if_needed() looks whether an entry that was
cleared a moment ago is empty, and in a PV guest clearing one that was not present is still in the queue of calls to Xen
then (mm/memory.c, zap_pte_range: lazy MMU mode). Nothing comes of it."""


def complaints(log: str) -> tuple[list[str], list[str]]:
    """Return what a kernel's log complains of: what is known to be harmless, and the rest."""
    found: list[list[str]] = []
    inside = False
    for line in log.splitlines():
        if "[ cut here ]" in line:
            inside = True
            found.append([])
        elif inside:
            found[-1].append(line)
            inside = "[ end trace" not in line
        elif COMPLAINT.search(line):
            found.append([line])
    texts = ["\n".join(lines) for lines in found if lines]
    return [text for text in texts if KNOWN.search(text)], [text for text in texts if not KNOWN.search(text)]

"""What of the Xen lab needs no Xen: how a kernel's log is read, and what torture takes for right."""

from __future__ import annotations

import pytest

from tests.xen.kernel_log import complaints
from tests.xen.view_torture import is_of, stamp

HARMLESS = """\
[  214.815063] ------------[ cut here ]------------
[  214.815066] WARNING: CPU: 0 PID: 168 at include/linux/mm_inline.h:564 unmap_page_range+0xdcf/0x1150
[  214.817699] Call Trace:
[  214.817700]  <TASK>
[  214.819000] ---[ end trace 0000000000000000 ]---
"""
BUG = """\
[   20.000000] ------------[ cut here ]------------
[   20.000001] kernel BUG at drivers/xen/events/events_base.c:500!
[   20.000002] Call Trace:
[   20.000003] ---[ end trace 0000000000000000 ]---
"""


def test_a_quiet_log_has_no_complaints() -> None:
    assert complaints("[    0.000000] Linux version 6.1\n[    1.000000] Run /init as init process\n") == ([], [])


def test_what_is_known_does_not_hide_what_is_not() -> None:
    known, bad = complaints(HARMLESS + BUG + "[   30.000000] Out of memory: Killed process 486 (python3)\n")
    assert [text.splitlines()[0][15:28] for text in known] == ["WARNING: CPU:"]
    assert ["kernel BUG at" in text for text in bad] == [True, False]
    assert bad[1].endswith("(python3)")
    assert "Call Trace" in bad[0]


def test_the_same_warning_elsewhere_is_a_complaint() -> None:
    known, bad = complaints(HARMLESS.replace("unmap_page_range", "gntdev_mmap"))
    assert (len(known), len(bad)) == (0, 1)


def test_a_log_that_begins_inside_a_complaint_is_none_the_less_one() -> None:
    assert len(complaints(HARMLESS.partition("\n")[2])[1]) >= 1


@pytest.mark.parametrize(
    ("found", "generations", "expected"),
    [
        (b"granted", range(1), True),
        (b"granted", range(4, 5), True),
        (b"granted", range(1, 2), False),  # what was granted, where another generation has to be
        (bytes([stamp(1)]) * 7, range(1, 2), True),
        (bytes([stamp(1)]) * 7, range(2, 4), False),  # one that has gone
        (bytes([stamp(3)]) * 7, range(2, 4), True),
        (bytes([stamp(3)]) * 3 + b"nted", range(2, 4), True),  # half written
        (bytes([stamp(3)]) * 3 + b"nted", range(3, 4), False),
        (b"grantee", range(4), False),
    ],
)
def test_torture_knows_which_generation_a_byte_may_be_of(found: bytes, generations: range, expected: bool) -> None:
    assert is_of(found, b"granted", generations) == expected

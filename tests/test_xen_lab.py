"""What of the Xen lab needs no Xen: how a kernel's log is read."""

from __future__ import annotations

from tests.xen.kernel_log import complaints

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

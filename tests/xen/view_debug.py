"""Stages of view.py for a guest's kernel that looks for faults (kernels.py): KASAN, lockdep, kmemleak, failing memory.

The last stage puts three faults into the module and expects the kernel to name each: a kernel that finds nothing in the
module as it is proves little before.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Final

from .channel import Machine
from .kernels import Kernel
from .run import Run, Stage
from .view import FIRST, GUESTS, _fill, _log_is_clean, _none_in_use, _probe, build_module

LEAKS: Final = "/sys/kernel/debug/kmemleak"
SCAN: Final = f"sleep 6; echo scan >{LEAKS}; sleep 6; echo scan >{LEAKS}"
"""What is younger than five seconds is not reported, and what a register held is found the second time."""
LOCKS: Final = {
    "two locks are taken in either order": (
        "	if (!err) {\n		rcu_assign_pointer(si->table, table);",
        "	if (!err) {\n		mutex_lock(&sv_all_lock);\n		mutex_unlock(&sv_all_lock);\n"
        "		rcu_assign_pointer(si->table, table);",
    ),
}
"""A fault: what is wrong -> what stands in table.c, and what is put in its place."""
MEMORY: Final = {
    "a table's memory is used after it was freed": (
        "	atomic_long_sub_return(count, &sv_pending);",
        "	atomic_long_sub_return(READ_ONCE(table->count), &sv_pending);",
    ),
    "an array is not freed": ("	kvfree(table->unmap);\n", ""),
}
"""Faults for a module of their own: after KASAN's first report lockdep does not look any more."""


def begin(machine: Machine) -> None:
    """Make ready a guest that was just booted: what leaked until now is not ours."""
    machine.run(f"mount -t debugfs debugfs /sys/kernel/debug; {SCAN}; echo clear >{LEAKS}", timeout=300)
    assert _lockdep_looks(machine), f"{machine.name}: lockdep has stopped before the module was there"


def _lockdep_looks(machine: Machine) -> bool:
    """Whether lockdep still looks: it stops at its first complaint, and when one of its tables is full."""
    return bool(re.search(r"^\s*debug_locks:\s+1$", machine.run("cat /proc/lockdep_stats"), re.M))


def _no_memory(run: Run) -> None:
    for name in GUESTS:
        found = _probe(run, name, "starve", limit=500)
        _none_in_use(run, name)
        run.number(f"{name}_failed_allocations", found["failed"])


def _leaked(machine: Machine) -> str:
    """Return what kmemleak says of objects that nobody points to, but of those of the boot: ACPI's may turn up late."""
    machine.run(SCAN, timeout=300)
    found = re.split(r"^(?=unreferenced object)", machine.run(f"cat {LEAKS}"), flags=re.M)
    return "".join(text for text in found if text.strip() and 'comm "swapper/0"' not in text)


def _leaks(run: Run) -> None:
    for name in GUESTS:
        machine = run.lab.guest(name)
        found = _leaked(machine)
        assert not found, f"{name}: kmemleak: {found[:3000]}"
        assert _lockdep_looks(machine), f"{name}: lockdep has stopped"
        _log_is_clean(machine)


def _finds(run: Run, kernels: dict[str, Kernel]) -> None:
    _fill(run)
    for name, kind in GUESTS.items():
        log, _ = _broken(run, name, kernels[kind], LOCKS)
        assert re.search(r"possible circular locking dependency[\s\S]*sv_all_lock", log), f"{name}: {log[:6000]}"
        run.lab.guest(name).run("busybox rmmod shareview")
        log, leaked = _broken(run, name, kernels[kind], MEMORY)
        assert re.search(r"\bsv_\w+\+.*\[shareview\]", leaked), f"{name}: no leak: {leaked[:2000]}"
        if kind == "pvh":
            assert re.search(r"KASAN: [\w-]*use-after-free in sv_unmap_work", log), f"{name}: {log[:6000]}"
        run.say(f"  {name} ({kind}): each of the faults that were put in was found")


def _broken(run: Run, name: str, kernel: Kernel, faults: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Load a module with faults in it and use it; return the kernel's log, and what kmemleak found."""

    def change(source: Path) -> None:
        text = (source / "table.c").read_text()
        for what, (good, bad) in faults.items():
            assert text.count(good) == 1, f"no place for a fault: {what}"
            text = text.replace(good, bad)
        (source / "table.c").write_text(text)

    machine = run.lab.guest(name)
    machine.put("/run/faulty.ko", build_module(kernel, change))
    machine.run("dmesg -C; busybox insmod /run/faulty.ko")
    # Its own verdict is not asked for: a faulty module may count wrong.
    machine.try_run(f"python3 /run/view_probe.py rules {run.about['area']} {FIRST[name]}", timeout=400)
    return machine.run("dmesg"), _leaked(machine)


def stages(kernels: dict[str, Kernel]) -> tuple[list[Stage], list[Stage]]:
    """Return the stages while the module is loaded, and those after it was unloaded."""
    loaded = [
        Stage("no-memory", 1200, "each allocation of a call fails once", _no_memory),
        Stage("leaks", 600, "no memory is lost while the module is loaded; lockdep still looks", _leaks),
    ]
    unloaded = [
        Stage("leaks-after", 600, "nor when it is gone", _leaks),
        Stage("finds", 1500, "faults that are put into the module are found", partial(_finds, kernels=kernels)),
    ]
    return loaded, unloaded

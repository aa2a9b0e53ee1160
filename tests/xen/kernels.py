"""Kernels that the guests of `make test-view` may have: three of Debian's, and one of our own that looks for faults.

Debian's come with the headers that tools/kernel_headers.sh gets. The debug kernel is built here, from Debian 12's
linux-source package and debug.config, once for each kind of guest: KASAN does not start in a PV guest of Linux 6.1
(nothing in arch/x86/xen makes its shadow before instrumented code runs), so that one does without. All of it is kept in
build/xen/debug; with nothing changed it is not built again.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .images import CACHE, HERE, ROOT, ImageError, Say, call, install, made_whole, take_kernel

LINES: Final = ("5.10", "6.1", "6.12")
"""Debian's kernels, by their first two numbers: those that docs/view.md promises."""
HOST_LINE: Final = "6.1"
"""The one that dom0 has, and guests if nothing else is asked for."""
DEBUG: Final = "debug"
UNPACKED: Final = ROOT / "build" / "kernel-headers"
"""Headers that are not Debian 12's, and apt.conf, with which apt knows the release that they are of."""
WORK: Final = ROOT / "build" / "xen" / "debug"
SOURCE: Final = Path("/usr/src/linux-source-6.1.tar.xz")
SOURCE_NEEDS: Final = {
    "linux-source-6.1": str(SOURCE),
    "make": "/usr/bin/make",
    "gcc": "/usr/bin/gcc",
    "flex": "/usr/bin/flex",
    "bison": "/usr/bin/bison",
    "bc": "/usr/bin/bc",
    "libelf-dev": "/usr/include/libelf.h",
}
"""Debian package -> a file that shows that it is there."""
MORE: Final = {"pvh": ("CONFIG_KASAN=y", "CONFIG_KASAN_INLINE=y", "CONFIG_KASAN_VMALLOC=y"), "pv": ()}
"""What is in the debug kernel of one kind of guest only."""
BY_HAND: Final = tuple(f"KASAN_SANITIZE_{name}.o=n" for name in ("enlighten", "enlighten_pvh", "string"))
"""For make: xen_prepare_pvh() and what it calls run before KASAN has its shadow; Linux 6.1 does not leave them out.
Instrumented they end a PVH guest at its first access (Xen: triple fault, the address in rax is of the shadow)."""
MAKE_S: Final = 10800.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a guest boots, and what a module for it is built against."""

    name: str
    boot: Path
    """A folder with vmlinux and lib/modules."""
    headers: Path


def usual(say: Say) -> Kernel:
    """Return what dom0 and guests boot when nothing else is asked for; the images have been built."""
    # Of several in the cache the one that was made last is the one that boots.
    found = max(CACHE.glob("boot-*/lib/modules/*"), key=lambda path: path.parents[2].stat().st_mtime)
    headers = Path("/lib/modules") / found.name / "build"
    if not (headers / "Makefile").exists():
        install([f"linux-headers-{found.name}"], say)
    return Kernel(found.name, found.parents[2], headers)


def headers_of(line: str) -> list[Path]:
    """Return where headers of a line are, oldest first: installed, or unpacked by tools/kernel_headers.sh."""
    found = [*Path("/lib/modules").glob(f"{line}.*/build"), *UNPACKED.glob(f"{line}.*/build")]
    return sorted((path for path in found if (path / "Makefile").exists()), key=lambda path: path.stat().st_mtime)


def debian(line: str, say: Say) -> Kernel:
    """Return one of Debian's kernels; ImageError if its headers are not here."""
    found = headers_of(line)
    if not found:
        raise ImageError(f"no headers of Linux {line} are here: tools/kernel_headers.sh")
    headers = found[-1]
    version = headers.parent.name
    folder = CACHE / f"kernel-{version}"
    if folder.exists():
        return Kernel(version, folder, headers)
    begun = time.monotonic()
    environment = dict(os.environ)
    if UNPACKED in headers.parents:
        environment["APT_CONFIG"] = str(UNPACKED / "apt.conf")
    package = f"linux-image-{version}"
    with made_whole(folder) as part:
        part.mkdir(parents=True)
        words = ["apt-get", "download", "-o", "APT::Sandbox::User=root", package]
        call(words, folder=part, environment=environment)
        (deb,) = part.glob("*.deb")
        call(["dpkg-deb", "-x", str(deb), str(part / "tree")])
        deb.unlink()
        take_kernel(part)
    say(f"{package}: {time.monotonic() - begun:.0f} s")
    return Kernel(version, folder, headers)


def debug(kind: str, say: Say) -> Kernel:
    """Return the debug kernel for a kind of guest; build it if it is not there. ImageError says what failed."""
    missing = [package for package, file in SOURCE_NEEDS.items() if not Path(file).exists()]
    if missing:
        install(missing, say)
    about = SOURCE.stat()
    wanted = (HERE / "debug.config").read_text() + "\n".join(MORE[kind])
    wanted += f"\n# {SOURCE.name}: {about.st_size} bytes, {int(about.st_mtime)}\n"
    out = WORK / kind
    boot = out / "boot"
    kernel = Kernel(f"debug-{kind}", boot, out)
    told = out / "wanted"
    if boot.exists() and told.exists() and told.read_text() == wanted:
        return kernel
    begun = time.monotonic()
    source = WORK / SOURCE.name.removesuffix(".tar.xz")
    if not source.exists():
        say(f"unpacking {SOURCE.name}")
        with made_whole(source) as part:
            part.mkdir(parents=True)
            call(["tar", "-xJf", str(SOURCE), "--strip-components=1", "-C", str(part)])
    shutil.rmtree(boot, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    told.write_text(wanted)
    say(f"debug kernel for {kind}: it is built once, and that takes long")
    make = ["nice", "make", "-C", str(source), f"O={out}", f"-j{os.cpu_count()}", *BY_HAND]
    call([*make, f"KCONFIG_ALLCONFIG={told}", "allnoconfig"])
    have = set((out / ".config").read_text().splitlines())
    lost = [line for line in wanted.splitlines() if line.startswith("CONFIG_") and line not in have]
    if lost:
        raise ImageError(f"the kernel's own rules do not allow {', '.join(lost)}")
    call([*make, "vmlinux", "modules"], limit=MAKE_S)
    with made_whole(boot) as part:
        part.mkdir()
        call([*make, f"INSTALL_MOD_PATH={part}", "modules_install"])
        call(["strip", "-o", str(part / "vmlinux"), str(out / "vmlinux")])
        for link in part.glob("lib/modules/*/*"):
            if link.is_symlink():
                link.unlink()
    say(f"debug kernel for {kind}: {time.monotonic() - begun:.0f} s")
    return kernel

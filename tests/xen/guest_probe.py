"""What a guest can do with grants, shown on the real thing: runs inside a guest, with the agent's package installed.

`guest_probe.py VERB AREA FIRST COUNT [SECONDS]`: AREA is the domain that has granted us COUNT references from FIRST on,
read only, each another page. dom0 grants them before and looks at the entries (busy or not) where it says so. Prints
one JSON object, and ends with 0 if everything was as it must be, with 1 and what was not on standard error if not.

  rules    what the kernel and the hypervisor allow and refuse; native/gntdev.c goes by it
  measure  one ioctl and one mmap for all references, against one by one in the same run
  flip     threads read through a mapping, and map and unmap memory of their own, while grants come and go under it
  hold     put grants under a file; say `held`; at the next line of standard input put the file back and say `back`;
           at the one after it end. dom0 finds all entries in use after `held` and none after `back`
  die      like hold, but end by SIGKILL at the first line: dom0 finds no entry in use

Nothing here executes a granted page: on PVH that would be the end of the guest.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sharearea_agent.common import native
from sharearea_agent.common.errors import NativeError

PAGE: Final = 4096
BATCH: Final = 64


def main() -> int:
    """Run one verb."""
    verb, area, first, count = sys.argv[1], *map(int, sys.argv[2:5])
    probe = Probe(area, first, count)
    seconds = float(sys.argv[5]) if len(sys.argv) > 5 else 10.0
    verbs: dict[str, Callable[[], dict[str, Any]]] = {
        "rules": probe.rules,
        "measure": probe.measure,
        "flip": lambda: probe.flip(seconds),
        "hold": probe.hold,
        "die": probe.die,
    }
    result = verbs[verb]()
    result |= {"verb": verb, "kind": probe.kind, "wrong": probe.wrong}
    _say(json.dumps(result))
    for text in probe.wrong:
        sys.stderr.write(f"guest_probe: {text}\n")
    return 1 if probe.wrong else 0


class Probe:
    """The references, a file with the same bytes, and what was found wrong."""

    def __init__(self, area: int, first: int, count: int) -> None:
        self.area, self.first, self.count = area, first, count
        self.kind = Path("/sys/hypervisor/guest_type").read_text().strip()
        self.movable = self.kind != "PV"
        self.wrong: list[str] = []

    def check(self, holds: bool, text: str) -> bool:
        """Note what does not hold."""
        if not holds:
            self.wrong.append(text)
        return holds

    def runs(self, count: int | None = None, page: int = 0, first: int | None = None) -> bytes:
        """One run of references, from the first one on."""
        return array("I", (page, self.first if first is None else first, count or self.count)).tobytes()

    def file(self) -> int:
        """Make a file with the bytes of all references, and return a descriptor of it."""
        device, _ = native.open_grant_device()
        with tempfile.NamedTemporaryFile(dir=os.environ.get("TMPDIR", "/tmp"), delete=False) as out:
            out.truncate(self.count * PAGE)
            fd = os.open(out.name, os.O_RDONLY)
            os.unlink(out.name)
            with mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ) as copy:
                self.put(copy, fd, device)
                os.close(device)
                data = bytes(copy)
                native.map_file(copy, fd, 0, self.count)
            out.write(data)
        return fd

    def put(self, mapping: mmap.mmap, fd: int, device: int, *, compare: bool = False) -> bool:
        """Put all grants under a mapping, as a consumer does."""
        with native.Grants(device, self.area, self.runs(), movable=self.movable) as grants:
            if compare and not grants.compare(fd):
                return False
            grants.place(device, mapping, self.count, fd)
        return True

    # ------------------------------------------------------------------------------------------------------- verbs

    def rules(self) -> dict[str, Any]:
        """See what is refused."""
        fd = self.file()
        device, noexec = native.open_grant_device()
        mapping = mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ)
        want = bytes(mapping)
        self.check(noexec, "the grant device could not be opened without the right to execute")
        self.check(
            self.put(mapping, fd, device, compare=True), "the file with the grants' bytes differs from the grants"
        )
        self.check(bytes(mapping) == want, "a granted page differs from the file")
        self._check_rights(mapping)
        self._check_refusals(mapping, fd, device, want)
        self._check_child(mapping, fd, want)
        os.close(device)
        native.map_file(mapping, fd, 0, self.count)
        self.check(bytes(mapping) == want, "the file is not back")
        return {"noexec": noexec, "smaps": self._smaps(fd)}

    def _check_rights(self, mapping: mmap.mmap) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        at = native.ffi.cast("uintptr_t", native.ffi.from_buffer(mapping))
        for rights, name in ((3, "writable"), (5, "executable")):
            refused = libc.mprotect(ctypes.c_void_p(int(at)), ctypes.c_size_t(PAGE), rights) != 0
            self.check(refused, f"a granted page could be made {name}")

    def _check_refusals(self, mapping: mmap.mmap, fd: int, device: int, want: bytes) -> None:
        beyond = self.first + self.count
        mixed = array("I", (0, self.first, 2, 2, beyond + 100_000, 1)).tobytes()
        for runs, what in ((self.runs(2, first=beyond + 100_000), "a stale"), (mixed, "a partly stale")):
            try:
                native.Grants(device, self.area, runs, movable=self.movable).close()
                self.check(False, f"{what} reference was mapped")
            except NativeError:
                pass
        other = array("I", (1, self.first, 1)).tobytes()  # page 0's bytes for page 1
        with native.Grants(device, self.area, other, movable=self.movable) as grants:
            self.check(not grants.compare(fd), "other bytes compared equal")
        self.check(bytes(mapping) == want, "a refusal changed the mapping")

    def _check_child(self, mapping: mmap.mmap, fd: int, want: bytes) -> None:
        inward, outward = os.pipe()
        child = os.fork()
        if child == 0:
            native.map_file(mapping, fd, 0, self.count)
            os.write(outward, b"1" if bytes(mapping) == want else b"0")
            os._exit(0)
        os.close(outward)
        self.check(os.read(inward, 1) == b"1", "a child could not put the file back")
        os.close(inward)
        os.waitpid(child, 0)
        self.check(bytes(mapping) == want, "a child's way back changed the parent's mapping")

    def _smaps(self, fd: int) -> dict[str, int]:
        """What the kernel counts of one mapping of all grants, in kilobytes."""
        device, _ = native.open_grant_device()
        found: dict[str, int] = {}
        with mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ) as mapping:
            self.put(mapping, fd, device)
            os.close(device)
            at, inside = int(native.ffi.cast("uintptr_t", native.ffi.from_buffer(mapping))), False
            for line in Path("/proc/self/smaps").read_text().splitlines():
                words = line.split()
                if not words[0].endswith(":"):
                    inside = at == int(words[0].partition("-")[0], 16)
                elif inside and words[-1] == "kB":
                    found[words[0][:-1]] = found.get(words[0][:-1], 0) + int(words[1])
            native.map_file(mapping, fd, 0, self.count)
        return {name: found[name] for name in ("Rss", "Pss", "Private_Clean", "Private_Dirty") if name in found}

    def measure(self) -> dict[str, Any]:
        """Time one call for all against one call for each."""
        fd = self.file()
        mapping = mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ)
        result: dict[str, Any] = {"pages": self.count, "one": [], "kernel_kb": []}
        for _ in range(3):
            result["one"].append(self._measure_once(mapping, fd, result["kernel_kb"]))
        result["each"] = self._measure_each()
        result["factor"] = result["each"]["map_s"] / min(one["beside_s"] for one in result["one"])
        most = -(-self.count // native.GRANTS_AT_ONCE)
        for one in result["one"]:
            self.check(one["beside"] == [max(most, 1)] * 2 or not self.movable, f"too many calls: {one}")
        return result

    def _measure_once(self, mapping: mmap.mmap, fd: int, kernel_kb: list[int]) -> dict[str, Any]:
        device, _ = native.open_grant_device()
        free, before, begun = _free_kb(), native.grant_calls(), time.perf_counter()
        grants = native.Grants(device, self.area, self.runs(), movable=self.movable)
        beside, mapped = native.grant_calls(), time.perf_counter()
        kernel_kb.append(free - _free_kb())
        equal = grants.compare(fd)
        compared = time.perf_counter()
        grants.place(device, mapping, self.count, fd)
        grants.close()
        os.close(device)
        placed, after = time.perf_counter(), native.grant_calls()
        native.map_file(mapping, fd, 0, self.count)
        back = time.perf_counter()
        self.check(equal, "the grants' bytes differ")
        return {
            "beside_s": mapped - begun,
            "compare_s": compared - mapped,
            "place_s": placed - compared,
            "back_s": back - placed,
            "beside": [beside.map_ioctls - before.map_ioctls, beside.mmaps - before.mmaps],
            "all": [after.map_ioctls - before.map_ioctls, after.mmaps - before.mmaps],
        }

    def _measure_each(self) -> dict[str, Any]:
        device, _ = native.open_grant_device()
        before, begun = native.grant_calls(), time.perf_counter()
        singles = [
            native.Grants(device, self.area, self.runs(1, first=self.first + i), movable=True)
            for i in range(self.count)
        ]
        mapped, after = time.perf_counter(), native.grant_calls()
        for single in singles:
            single.close()
        os.close(device)
        return {
            "map_s": mapped - begun,
            "unmap_s": time.perf_counter() - mapped,
            "calls": [after.map_ioctls - before.map_ioctls, after.mmaps - before.mmaps],
        }

    def flip(self, seconds: float) -> dict[str, Any]:
        """Have readers look while grants come and go."""
        fd = self.file()
        mapping = mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ)
        want = bytes(mapping)
        stop = threading.Event()
        reads = [0, 0]

        def read(at: int) -> None:
            with memoryview(mapping) as view, memoryview(want) as expected:
                while not stop.is_set():
                    for start in range(0, self.count * PAGE, BATCH * PAGE):
                        if view[start : start + BATCH * PAGE] != expected[start : start + BATCH * PAGE]:
                            self.wrong.append(f"other bytes at page {start // PAGE}")
                            return
                        reads[at] += 1

        def map_memory() -> None:
            while not stop.is_set():
                with mmap.mmap(-1, 64 * PAGE) as mine:
                    mine.write(b"x" * 64 * PAGE)
                    if mine[:] != b"x" * 64 * PAGE:
                        self.wrong.append("a thread's own memory changed")
                        return

        threads = [threading.Thread(target=read, args=(at,)) for at in range(2)]
        threads.append(threading.Thread(target=map_memory))
        for thread in threads:
            thread.start()
        flips = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            device, _ = native.open_grant_device()
            try:
                self.check(self.put(mapping, fd, device, compare=True), "the grants' bytes differ")
            finally:
                os.close(device)
            native.map_file(mapping, fd, 0, self.count)
            flips += 1
        stop.set()
        for thread in threads:
            thread.join()
        self.check(flips > 0 and min(reads) > 0, f"nothing was tried: {flips} flips, {reads} reads")
        return {"flips": flips, "reads": sum(reads), "pages": self.count}

    def hold(self) -> dict[str, Any]:
        """Hold grants until told to let go."""
        fd, mapping, want = self._held()
        sys.stdin.readline()
        native.map_file(mapping, fd, 0, self.count)
        self.check(bytes(mapping) == want, "the file is not back")
        _say("back")
        sys.stdin.readline()
        return {}

    def die(self) -> dict[str, Any]:
        """End with grants under a mapping."""
        self._held()
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def _held(self) -> tuple[int, mmap.mmap, bytes]:
        fd = self.file()
        mapping = mmap.mmap(fd, self.count * PAGE, access=mmap.ACCESS_READ)
        want = bytes(mapping)
        device, _ = native.open_grant_device()
        self.check(self.put(mapping, fd, device, compare=True), "the grants' bytes differ")
        os.close(device)
        self.check(bytes(mapping) == want, "a granted page differs from the file")
        _say("held")
        return fd, mapping, want


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _free_kb() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())

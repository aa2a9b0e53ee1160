"""What happens to a view at random: runs inside a guest, as root, beside view_probe.py, which it uses.

`python3 -m tests.xen.view_torture VERB AREA FIRST SECONDS`; arguments and answer are view_probe.py's.

  torture  readers of all kinds against attach and detach, writers on the lower file, dropped caches, too little memory
  calls    ioctls, options of mount(2) and of fsconfig(2) at random, by several processes at once

Torture's writers put other bytes into a few pages and the granted ones back. Each change is a generation, of which
readers know by a clock in shared memory when it began and when it was written: what they read must be of one that was
there meanwhile. On PVH torture executes bytes of pages that are attached: if the wall before that fell, the guest would
die.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from sharearea_agent import view_control
from sharearea_agent.view_control import ViewControl

from .view_probe import (
    EXEC,
    LOWER,
    PAGE,
    PAGES,
    READ,
    VIEW,
    WRITE,
    Mapping,
    Probe,
    drop_caches,
    in_child,
    libc,
    meminfo,
)

HOT: Final = range(40, 44)
"""Pages that the writer changes."""
COLD: Final = [page for page in range(PAGES - 1) if page not in HOT]
LEAST_KIB: Final = 24 << 10
"""What the process that takes memory leaves to the others."""
FUZZERS: Final = 3

Work = Callable[[random.Random], int]
"""Does something once; returns how much it has done. A fault is an exception."""


class Crew:
    """Processes that each do their work again and again."""

    def __init__(self, seconds: float, seed: int) -> None:
        self._end = time.monotonic() + seconds
        self._seed = seed
        self._children: list[tuple[str, int, int]] = []

    @property
    def at_work(self) -> bool:
        """Whether the time is not over yet."""
        return time.monotonic() < self._end

    def start(self, name: str, make: Callable[[], Work]) -> None:
        """Start a process. `make` is called in it."""
        inward, outward = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(inward)
                work, chance, done = make(), random.Random(f"{self._seed} {name}"), 0
                while self.at_work:
                    done += work(chance)
                os.write(outward, struct.pack("Q", done))
                code = 0
            except BaseException as error:
                sys.stderr.write(f"view_torture: {name}: {error!r}\n")
            os._exit(code)
        os.close(outward)
        self._children.append((name, child, inward))

    def gather(self, check: Callable[[object, str], None]) -> dict[str, int]:
        """Wait for all; return how much each has done."""
        tally: dict[str, int] = {}
        for name, child, inward in self._children:
            told = os.read(inward, 8)
            os.close(inward)
            _, status = os.waitpid(child, 0)
            check(status == 0, f"{name} ended with {status}")
            tally[name] = struct.unpack("Q", told)[0] if told else 0
            check(tally[name] > 0, f"{name} has done nothing")
        return tally


# -------------------------------------------------------------------------------------------------------------- torture


class Clock:
    """Which generations the hot pages may be of: a page that this process and its children share.

    Even generations are the granted bytes, odd ones a byte of their own.
    """

    def __init__(self) -> None:
        # Not struct: it writes zeros first, which a reader may see.
        self._numbers = (ctypes.c_uint64 * 2).from_buffer(mmap.mmap(-1, PAGE))

    @property
    def written(self) -> int:
        """The last generation that is there as a whole."""
        return int(self._numbers[1])

    @property
    def begun(self) -> int:
        """The last one that may be there in part."""
        return int(self._numbers[0])

    @contextmanager
    def next(self) -> Iterator[int]:
        """Write another generation inside of this."""
        number = self.begun + 1
        self._numbers[0] = number
        yield number
        self._numbers[1] = number


def stamp(generation: int) -> int:
    """The byte of an odd generation; never the first one of a granted page."""
    return 1 + generation // 2 % 0xC2


def is_of(found: bytes, granted: bytes, generations: range) -> bool:
    """Whether bytes are all of some of these generations, which may be mixed if there are several."""
    stamps = {stamp(number) for number in generations if number % 2}
    even = any(number % 2 == 0 for number in generations)
    if (even and found == granted) or any(found == bytes([each]) * len(found) for each in stamps):
        return True
    return all(byte in stamps or (even and byte == other) for byte, other in zip(found, granted, strict=True))


class Torture:
    """Readers, each of its kind, and what they are tortured with."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.path = VIEW / "data"
        self.clock = Clock()

    def run(self, seconds: float) -> dict[str, Any]:
        """Torture for so long; every byte is compared with the generations that it may be of."""
        probe = self.probe
        probe.write_lower()
        seed = time.time_ns()
        chance, crew = random.Random(seed), Crew(seconds, seed)
        counts = {"cycles": 0, "generations": 0, "refused": 0}
        with probe.mounted() as view:
            readers: dict[str, Work] = {
                "read": self._read,
                "direct": self._direct,
                "map": self._map,
                "held": self._held,
                "private": self._private,
                "fork": self._fork,
                "mremap": self._mremap,
                "execute": self._execute,
                "sendfile": self._sendfile,
            }
            for name, work in readers.items():
                crew.start(name, lambda work=work: work)  # type: ignore[misc]
            crew.start("memory", lambda: take_memory)
            fd = os.open(view / "data", os.O_RDONLY)
            while crew.at_work:
                try:
                    probe.attach(fd)
                    counts["cycles"] += 1
                except OSError as error:
                    counts["refused"] += 1
                    if error.errno not in (errno.EAGAIN, errno.EEXIST, errno.ENOMEM):
                        probe.check(False, f"attach: {error}")
                        break
                time.sleep(chance.random() / 20)
                match chance.randrange(4):
                    case 0:
                        drop_caches()
                    case 1:
                        for _ in range(2 * chance.randrange(1, 4)):  # granted bytes in the end
                            self._change()
                            counts["generations"] += 1
                            time.sleep(chance.random() / 5)
                    case _:
                        probe.control.detach(fd)
            probe.control.detach(fd)
            os.close(fd)
            tally = crew.gather(probe.check)
        probe.check(counts["cycles"] > 5, f"{counts['cycles']} times attached")
        probe.check(counts["generations"] > 2, f"{counts['generations']} generations")
        probe.check(probe.settled(), "pages are pending at the end")
        probe.check(probe.control.info().leaked_pages == 0, "pages were leaked")
        return {**counts, "memory_taken": tally.pop("memory"), "pages_compared": tally, "seed": seed}

    def _change(self) -> None:
        """Write the next generation to the lower file. Nothing is attached when it can be opened."""
        size = len(HOT) * PAGE
        with open(LOWER / "data", "r+b", buffering=0) as lower, self.clock.next() as number:
            data = bytes([stamp(number)]) * size if number % 2 else self.probe.want[HOT.start * PAGE :][:size]
            lower.seek(HOT.start * PAGE)
            if lower.write(data) != size:
                raise RuntimeError("a short write")

    def _same(self, found: bytes, first: int, since: int, what: str) -> int:
        """Compare pages from one on, whose reading began when `since` had been written; return how many."""
        granted = self.probe.padded[first * PAGE : first * PAGE + len(found)]
        start, stop = ((page - first) * PAGE for page in (HOT.start, HOT.stop))
        start, stop = max(0, start), max(0, stop)
        if found[:start] != granted[:start] or found[stop:] != granted[stop:]:
            raise RuntimeError(f"{what}: other bytes from page {first} on")
        generations = range(since, self.clock.begun + 1)
        if not is_of(found[start:stop], granted[start:stop], generations):
            raise RuntimeError(f"{what}: pages {HOT} are of none of {generations}: {found[start:stop][:32].hex()}")
        return len(found) // PAGE

    @contextmanager
    def _mapped(self, protection: int = READ, *, pages: int = PAGES, private: bool = False) -> Iterator[Mapping]:
        fd = os.open(self.path, os.O_RDONLY)
        mapping = Mapping(fd, min(pages * PAGE, len(self.probe.want)), protection, private=private)
        os.close(fd)
        try:
            yield mapping
        finally:
            mapping.close()

    def _read(self, chance: random.Random) -> int:
        since = self.clock.written
        with open(self.path, "rb", buffering=0) as file:
            first = chance.randrange(PAGES - 70)
            return self._same(os.pread(file.fileno(), 64 * PAGE, first * PAGE), first, since, "read")

    def _direct(self, chance: random.Random) -> int:
        since = self.clock.written
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 64 * PAGE) as buffer:
                first = chance.randrange(PAGES - 70)
                size = os.preadv(fd, [buffer], first * PAGE)
                return self._same(buffer[:size], first, since, "direct")
        finally:
            os.close(fd)

    def _map(self, _: random.Random) -> int:
        done = 0
        with self._mapped() as mapping:
            for first in (*range(0, PAGES - 64, 64), *range(0, PAGES - 64, 64)):  # what was mapped before, too
                since = self.clock.written
                done += self._same(mapping.bytes(first, 64), first, since, "map")
        return done

    def _held(self, chance: random.Random) -> int:
        """A mapping that is there before and after whatever happens."""
        done = 0
        with self._mapped() as mapping:
            for _ in range(50):
                since = self.clock.written
                done += self._same(mapping.bytes(HOT.start - 2, 8), HOT.start - 2, since, "held")
                time.sleep(chance.random() / 50)
        return done

    def _private(self, chance: random.Random) -> int:
        since = self.clock.written
        with self._mapped(READ | WRITE, private=True) as mapping:
            page = chance.choice(HOT if chance.random() < 0.2 else COLD)
            ctypes.memset(mapping.address + page * PAGE + 1, 0x77, 8)
            time.sleep(0.002)
            found = mapping.bytes(page, 1)
            if found[1:9] != b"\x77" * 8:
                raise RuntimeError("private: a store is gone")
            # What was stored aside: as if it had not been.
            page_there = self.probe.padded[page * PAGE :][:PAGE]
            hidden = found[:1] + (page_there[1:9] if found[0] == page_there[0] else found[:1] * 8) + found[9:]
            return self._same(hidden, page, since, "private")

    def _fork(self, _: random.Random) -> int:
        since = self.clock.written
        with self._mapped() as mapping:
            mapping.bytes(0, 64)
            code = in_child(lambda: self._same(mapping.bytes(0, 128), 0, since, "fork"))
            if code:
                raise RuntimeError(f"fork: {code}")
            return 128

    def _mremap(self, chance: random.Random) -> int:
        since = self.clock.written
        few, many = chance.randrange(48, 128), chance.randrange(128, 256)
        with self._mapped(pages=few) as mapping:
            done = self._same(mapping.bytes(), 0, since, "before mremap")
            mapping.resize(few * PAGE, many * PAGE)
            mapping.size = many * PAGE
            done += self._same(mapping.bytes(), 0, since, "after mremap")
            mapping.resize(many * PAGE, few * PAGE)
            mapping.size = few * PAGE
            return done + self._same(mapping.bytes(), 0, since, "after mremap back")

    def _execute(self, chance: random.Random) -> int:
        since = self.clock.written
        with self._mapped() as mapping:
            page = chance.choice(COLD)
            self._same(mapping.bytes(page, 1), page, since, "execute")
            mapping.protect(READ | EXEC)
            mapping.execute(page)
            mapping.protect(READ)
            return self._same(mapping.bytes(page, 1), page, since, "execute")

    def _sendfile(self, chance: random.Random) -> int:
        since = self.clock.written
        with open(self.path, "rb", buffering=0) as file, open("/run/view-sent", "w+b", buffering=0) as copy:
            first = chance.randrange(PAGES - 40)
            sent = os.sendfile(copy.fileno(), file.fileno(), first * PAGE, 32 * PAGE)
            return self._same(os.pread(copy.fileno(), sent, 0), first, since, "sendfile")


def take_memory(chance: random.Random) -> int:
    """Take memory until the kernel has to get some from caches, keep it a while, and give it back."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    taken: list[mmap.mmap] = []
    while meminfo("MemAvailable") > LEAST_KIB and len(taken) < 1000:
        taken.append(mmap.mmap(-1, 1 << 20))
        taken[-1].write(b"\1" * (1 << 20))
    time.sleep(chance.random() / 5)
    for each in taken:
        each.close()
    time.sleep(chance.random() / 2)
    return len(taken)


# ------------------------------------------------------------------------------------------------------ calls at random

FSOPEN, FSCONFIG, FSMOUNT = 430, 431, 432  # system calls of x86-64
MS_RDONLY, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 4, 8, 32


class Fuzzer:
    """One process that calls at random, near what is right: nothing may come of it but an error, or what was meant."""

    def __init__(self, probe: Probe, name: str) -> None:
        self.probe = probe
        self.control = ViewControl()
        self.fd = os.open(VIEW / "data", os.O_RDONLY)
        self.mnt = Path(f"/run/view-{name}")
        self.mnt.mkdir(exist_ok=True)
        self.edges = (0, 1, 7, 8, probe.first, probe.area, PAGES - 1, PAGES, 48, 1 << 16, 1 << 20, 1 << 31, 0xFFFFFFFF)

    def __call__(self, chance: random.Random) -> int:
        """Call once. Returns 1 << 32 more if something was attached."""
        kind = chance.random()
        if kind < 0.5:
            return 1 + (self._attach(chance) << 32)
        if kind < 0.9:
            self._ioctl(chance)
        elif kind < 0.95:
            self._mount(chance)
        else:
            self._configure(chance)
        return 1

    def _attach(self, chance: random.Random) -> bool:
        start = chance.randrange(PAGES)
        column = array("I")
        for _ in range(chance.randrange(1, 5)):
            size = chance.choice((1, 2, 50, chance.choice(self.edges)))
            column.extend((start & 0xFFFFFFFF, (self.probe.first + start) & 0xFFFFFFFF, size))
            start += size + chance.choice((-1, 0, 0, 3))
            if chance.random() < 0.2:
                column[chance.randrange(len(column))] = chance.choice(self.edges)
            start = max(start, 0)
        epoch = chance.choice((0, self.control.info().epoch))
        try:
            self.control.attach(self.fd, self.probe.area, column.tobytes(), epoch)
        except OSError:
            return False
        if os.pread(self.fd, 1 << 24, 0) != self.probe.want:
            raise RuntimeError(f"other bytes after {column.tolist()}")
        self.control.detach(self.fd)
        return True

    def _ioctl(self, chance: random.Random) -> None:
        number = chance.choice(
            (view_control.ATTACH, view_control.DETACH, view_control.STATE, view_control.INFO, view_control.HOLD)
        )
        size = number >> 16 & 0x3FFF
        words = [chance.choice(self.edges) for _ in range(size // 4)]
        words[0] = chance.choice((size, size, size, words[0]))
        words[1] = chance.choice((self.fd, words[1]))
        with suppress(OSError):
            fcntl.ioctl(self.control.fileno(), number, bytearray(struct.pack(f"={len(words)}I", *words)), True)

    def _text(self, chance: random.Random) -> bytes:
        """Options, or parts of them."""
        lower, view = os.fsencode(LOWER), os.fsencode(VIEW)
        parts = (
            *(b"lower=", b"verify=", b"all", b"resident", b",", b",", b"=", b"ro", b"rw", b"source=none", b"\\054"),
            *(lower, view, b"lower=" + lower, b"/", b"/srv", b"/nothing", b"/proc/self/fd", b"/proc/self/fd/0", b"."),
            *(b"\xff", b"x" * chance.choice((1, 255, 256, 4095, 4096))),
        )
        return b"".join(chance.choice(parts) for _ in range(chance.randrange(7)))[:5000]

    def _mount(self, chance: random.Random) -> None:
        target = os.fsencode(self.mnt)
        flags = sum(flag for flag in (MS_RDONLY, MS_NODEV, MS_NOEXEC) if chance.random() < 0.3)
        if chance.random() < 0.2:
            target, flags = os.fsencode(VIEW), flags | MS_REMOUNT
        if libc.mount(b"none", target, b"shareview", ctypes.c_ulong(flags), self._text(chance)) == 0:
            self._use(target, flags)

    def _use(self, target: bytes, flags: int) -> None:
        """Something was mounted, which is never to be written."""
        try:
            os.close(os.open(target + b"/new", os.O_WRONLY | os.O_CREAT))
        except OSError:
            pass
        else:
            raise RuntimeError("a view takes a new file")
        if not flags & MS_REMOUNT and libc.umount2(target, 2):
            raise OSError(ctypes.get_errno(), "umount")

    def _configure(self, chance: random.Random) -> None:
        fs = libc.syscall(FSOPEN, b"shareview", 1)
        if fs < 0:
            raise OSError(ctypes.get_errno(), "fsopen")
        try:
            for _ in range(chance.randrange(6)):
                command = chance.randrange(9)
                key = chance.choice((b"lower", b"verify", b"source", b"ro", b"", self._text(chance)[:255], None))
                value = chance.choice((self._text(chance)[:255], b"all", os.fsencode(LOWER), None))
                aux = chance.choice((0, len(value or b""), 1 << 20, -1, -100, self.fd, fs))
                libc.syscall(FSCONFIG, fs, command, key, value, aux)
            if chance.random() < 0.7:
                libc.syscall(FSCONFIG, fs, 1, b"lower", os.fsencode(LOWER), 0)
                libc.syscall(FSCONFIG, fs, 6, None, None, 0)
                mount = libc.syscall(FSMOUNT, fs, 1, 0)
                if mount >= 0:
                    os.close(mount)
        finally:
            os.close(fs)


def calls(probe: Probe, seconds: float) -> dict[str, Any]:
    """Have several processes call at random; what the view shows stays right, and a wrong mount is none."""
    probe.write_lower()
    seed = time.time_ns()
    crew = Crew(seconds, seed)
    with probe.mounted("verify=all"):  # else other bytes for a page that is not cached are the caller's to avoid
        for number in range(FUZZERS):
            name = f"calls{number}"
            crew.start(name, partial(Fuzzer, probe, name))
        tally = crew.gather(probe.check).values()
        options = next(line.split()[3] for line in Path("/proc/mounts").read_text().splitlines() if f" {VIEW} " in line)
        probe.check("ro" in options.split(","), f"remounted: {options}")
        probe.control.detach_all()
        with open(VIEW / "data", "rb") as file:
            probe.check(file.read() == probe.want, "other bytes in the end")
    probe.check(probe.settled(), "pages are pending at the end")
    info = probe.control.info()
    probe.check(info.tables == info.attached_pages == info.leaked_pages == 0, f"left: {info}")
    return {
        "calls": sum(each & 0xFFFFFFFF for each in tally),
        "attached": sum(each >> 32 for each in tally),
        "seed": seed,
    }


def main() -> int:
    """Run one verb."""
    verb, area, first, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    probe = Probe(area, first)
    found = Torture(probe).run(seconds) if verb == "torture" else calls(probe, seconds)
    sys.stdout.write(json.dumps(found | {"verb": verb, "kind": probe.kind, "wrong": probe.wrong}) + "\n")
    return 1 if probe.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

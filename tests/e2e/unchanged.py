"""A program that knows nothing of shared pages: it maps files by libc's functions and does what it is told.

One JSON object per line, as program.py has it. It is run with the shim; that it can also be run without is the point.
What has to follow is the tests' business.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
READ, WRITE = 1, 2
PRIVATE = mmap.MAP_PRIVATE
FAILED = ctypes.c_void_p(-1).value
NUMBERS = {"getpid": 39, "munmap": 11, "mprotect": 10, "seccomp": 317, "fork": 57, "vfork": 58}  # x86-64

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
for name in ("munmap", "mlock"):
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
for name in ("mprotect", "madvise", "msync"):
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.syscall.argtypes = [ctypes.c_long] * 7
libc.syscall.restype = ctypes.c_long


class Program:
    """What the questions mean."""

    def __init__(self) -> None:
        self.maps: dict[str, tuple[int, int]] = {}
        self.checks: dict[str, tuple[threading.Thread, threading.Event, list[str], list[int]]] = {}
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.occupied = (0, 0)

    def map(
        self,
        name: str,
        path: str,
        pages: int = 0,
        offset: int = 0,
        protection: int = READ,
        flags: int = mmap.MAP_PRIVATE,
    ) -> int:
        """Map a file, or a part of it, and forget its descriptor."""
        fd = os.open(path, os.O_RDONLY)
        length = pages * PAGE or -(-(os.fstat(fd).st_size - offset) // PAGE) * PAGE
        at = libc.mmap(None, length, protection, flags, fd, offset)
        os.close(fd)
        _check(at != FAILED)
        self.maps[name] = (at, length)
        return int(at)

    def _at(self, name: str, start: int, pages: int) -> tuple[int, int]:
        at, length = self.maps[name]
        return at + start * PAGE, pages * PAGE or length - start * PAGE

    def hash(self, name: str, size: int = 0) -> str:
        """Hash what is mapped, or the beginning of it."""
        at, length = self.maps[name]
        return hashlib.sha256(ctypes.string_at(at, size or length)).hexdigest()

    def read(self, name: str, start: int, size: int) -> str:
        """Return mapped bytes."""
        return ctypes.string_at(self.maps[name][0] + start, size).hex()

    def write(self, name: str, start: int, data: str) -> None:
        """Write into a mapping: it has to be writable."""
        raw = bytes.fromhex(data)
        ctypes.memmove(self.maps[name][0] + start, raw, len(raw))

    def unmap(self, name: str, start: int = 0, pages: int = 0) -> None:
        """Unmap a mapping, or pages of it."""
        _check(libc.munmap(*self._at(name, start, pages)) == 0)

    def protect(self, name: str, protection: int, start: int = 0, pages: int = 0) -> None:
        """Change the rights of pages."""
        _check(libc.mprotect(*self._at(name, start, pages), protection) == 0)

    def advise(self, name: str, advice: int, start: int = 0, pages: int = 0) -> None:
        """Give advice about pages."""
        _check(libc.madvise(*self._at(name, start, pages), advice) == 0)

    def sync(self, name: str, start: int = 0, pages: int = 0) -> None:
        """Sync pages: on a private mapping this does nothing."""
        _check(libc.msync(*self._at(name, start, pages), 4) == 0)

    def lock(self, name: str, start: int = 0, pages: int = 0) -> None:
        """Lock pages into memory."""
        _check(libc.mlock(*self._at(name, start, pages)) == 0)

    def move(self, name: str, pages: int) -> None:
        """Give a mapping another length, wherever that is possible."""
        at, length = self.maps[name]
        there = libc.mremap(at, length, pages * PAGE, 1, None)
        _check(there != FAILED)
        self.maps[name] = (there, pages * PAGE)

    def anonymous(self, name: str, start: int, pages: int) -> None:
        """Map fresh pages over a part of a mapping."""
        at, length = self._at(name, start, pages)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
        _check(libc.mmap(at, length, READ | WRITE, flags, -1, 0) == at)

    def raw(self, call: str, *words: int) -> int:
        """Make a system call by its number; words of text are names of mappings."""
        values = [self.maps[word][0] if isinstance(word, str) else word for word in words]
        return int(libc.syscall(NUMBERS[call], *values, *[0] * (6 - len(values))))

    def shared(self, name: str) -> int:
        """Count the pages of a mapping that are a segment's, from /proc/self/maps."""
        at, length = self.maps[name]
        total = 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            if "/memfd:" in line:
                assert " r" in line, line
                assert line.split()[1][1] == "-", line
                total += max(0, min(end, at + length) - max(start, at)) // PAGE
        return total

    def check(self, name: str, counters: str, pages: int) -> None:
        """Begin to compare generations in the first pages of a mapping (program.py says what these are)."""
        at = self.maps[name][0]
        with Path(counters).open("rb") as file:
            numbers = memoryview(mmap.mmap(file.fileno(), 16, access=mmap.ACCESS_READ)).cast("Q")
        stop, faults, rounds = threading.Event(), list[str](), [0]

        def run() -> None:
            while not stop.is_set() and len(faults) < 10:
                done = numbers[1]
                data = ctypes.string_at(at, pages * PAGE)
                begun = numbers[0]
                seen = set(memoryview(data).cast("Q"))
                if min(seen) < done or max(seen) > begun:
                    faults.append(f"generations {min(seen)} to {max(seen)} while {done} was done and {begun} begun")
                rounds[0] += 1

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.checks[name] = (thread, stop, faults, rounds)

    def stop(self, name: str) -> dict[str, Any]:
        """End a check."""
        thread, stop, faults, rounds = self.checks.pop(name)
        stop.set()
        thread.join()
        return {"faults": faults, "rounds": rounds[0]}

    def rounds(self, name: str) -> int:
        """Say how often a check went round."""
        return self.checks[name][3][0]

    def fork(self, name: str, by: str = "fork") -> dict[str, Any]:
        """Fork a child, which says how many pages are shared there, waits for a line, and says what it reads."""
        to_child, from_child = os.pipe(), os.pipe()
        ways: dict[str, Callable[[], int]] = {
            "fork": os.fork,
            "_Fork": lambda: int(libc._Fork()),
            "syscall": lambda: self.raw("fork"),
        }
        child = ways[by]()
        if child == 0:
            try:
                os.write(from_child[1], str(self.shared(name)).encode())
                os.read(to_child[0], 1)
                os.write(from_child[1], self.hash(name).encode())
            finally:
                os._exit(0)
        self._child = (child, to_child[1], from_child[0])
        os.close(to_child[0])
        os.close(from_child[1])
        return {"pid": child, "shared": int(os.read(from_child[0], 65536))}

    def child(self) -> str:
        """Have the child read its mapping; wait for its end."""
        pid, to, come = self._child
        os.write(to, b"\n")
        found = os.read(come, 65536).decode()
        assert os.waitpid(pid, 0)[1] == 0
        os.close(to)
        os.close(come)
        return found

    def spawn(self, count: int) -> None:
        """Run a program so often, by posix_spawn."""
        for _ in range(count):
            pid = os.posix_spawn("/bin/true", ["true"], os.environ)
            assert os.waitpid(pid, 0)[1] == 0

    def descriptors(self) -> list[int]:
        """Return the numbers of all open descriptors, but for the one that it takes to look."""
        found = []
        for fd in range(4096):
            try:
                os.fstat(fd)
                found.append(fd)
            except OSError:
                continue
        return found

    def close_descriptors(self) -> None:
        """Close all descriptors from 3 on, as daemons do."""
        os.closerange(3, 4096)

    def occupy_mappings(self) -> int:
        """Make mappings until the kernel refuses one more; how many? Until they are released, ask nothing else."""
        length = 200_000 * PAGE
        self.occupied = (libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0), length)
        made = 0
        while libc.mprotect(self.occupied[0] + (2 * made + 1) * PAGE, PAGE, READ) == 0:
            made += 1
        return made

    def release_mappings(self) -> None:
        """Give them back."""
        _check(libc.munmap(*self.occupied) == 0)

    def limit_memory(self) -> None:
        """Set a limit on address space."""
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    def chroot(self, path: str) -> None:
        """Change the root folder, and with that lose all paths."""
        os.chroot(path)
        os.chdir("/")

    def change_user(self, uid: int) -> list[str]:
        """Become another user for good; return the uids of all threads."""
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return self.thread_lines("Uid:")

    def thread_lines(self, word: str) -> list[str]:
        """Return a line of the status of each thread."""
        found = []
        for task in Path("/proc/self/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            found += [line for line in lines if line.startswith(word)]
        return found

    def isolate(self) -> int:
        """Have a user namespace of one's own, which only a process with one thread gets. Returns errno."""
        done = libc.unshare(0x10000000)
        return 0 if done == 0 else ctypes.get_errno()

    def forbid(self) -> None:
        """Set a seccomp filter for all threads that kills for mremap, recvmsg, sendmsg, ppoll and clone."""
        code = [(0x20, 0, 0, 0)]
        for number in (25, 47, 46, 271, 56):
            code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x80000000)]
        code.append((0x06, 0, 0, 0x7FFF0000))
        raw = b"".join(c.to_bytes(2, "little") + bytes([t, f]) + k.to_bytes(4, "little") for c, t, f, k in code)
        held = ctypes.create_string_buffer(raw, len(raw))
        program = ctypes.create_string_buffer(
            len(code).to_bytes(8, "little") + ctypes.addressof(held).to_bytes(8, "little"), 16
        )
        _check(libc.prctl(38, 1, 0, 0, 0) == 0)
        _check(libc.syscall(NUMBERS["seccomp"], 1, 1, ctypes.addressof(program), 0, 0, 0) == 0)

    def load(self, path: str) -> None:
        """Open a library."""
        self.libraries[path] = ctypes.CDLL(path)

    def unload(self, path: str) -> None:
        """Close a library."""
        libc.dlclose(ctypes.c_void_p(self.libraries.pop(path)._handle))

    def where(self, path: str) -> list[list[str]]:
        """Return rights and name of segments between the first mapping of a file and its writable one."""
        lines = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines()]
        mine = [at for at, words in enumerate(lines) if words[5:] == [path] and "w" in words[1]]
        if not mine:
            return []
        low = min(at for at, words in enumerate(lines) if words[5:] == [path])
        return [[words[1], words[5]] for words in lines[low : max(mine)] if "/memfd:" in words[-1]]

    def signals(self, count: int) -> int:
        """Have a handler map and unmap pages while the same is done beside it; return how often it ran."""
        ran = 0

        def handle(*_: object) -> None:
            nonlocal ran
            ran += 1
            at = libc.mmap(None, 8 * PAGE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            libc.munmap(at, 8 * PAGE)

        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        end = time.monotonic() + 30
        while ran < count and time.monotonic() < end:
            at = libc.mmap(None, 8 * PAGE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
            libc.munmap(at, 8 * PAGE)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return ran

    def errors(self) -> list[str]:
        """Make calls that fail, and say how; then one that does not, and say what errno is."""
        found = []
        calls: list[Callable[[], Any]] = [
            lambda: libc.munmap(1, PAGE),
            lambda: libc.mprotect(PAGE, PAGE, READ),
            lambda: libc.madvise(PAGE, PAGE, 9999),
            lambda: libc.mmap(None, PAGE, READ, mmap.MAP_PRIVATE, 9999, 0),
            lambda: libc.syscall(NUMBERS["munmap"], 1, PAGE, 0, 0, 0, 0),
        ]
        for call in calls:
            call()
            found.append(errno.errorcode[ctypes.get_errno()])
        ctypes.set_errno(errno.EXDEV)
        at = libc.mmap(None, PAGE, READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        libc.munmap(at, PAGE)
        return [*found, errno.errorcode[ctypes.get_errno()]]


def _check(done: bool) -> None:
    if not done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> int:
    """Answer until standard input ends."""
    program = Program()
    for line in sys.stdin:
        question = json.loads(line)
        verb = question.pop("verb")
        words = question.pop("words", [])
        try:
            answer = {"ok": True, "answer": getattr(program, verb)(*words, **question)}
        except (OSError, ValueError) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

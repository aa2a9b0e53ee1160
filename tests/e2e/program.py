"""A program of a domain: opens files through the consumer API, does what it is told, and reads without a pause.

One JSON object per line: a question on standard input, its answer on standard output. Paths are hexadecimal. A check is
a thread that reads mappings over and over and compares what it sees with what must be there:

hashes  the bytes have the SHA-256 that was given: for files that nobody writes;
stamps  every eight bytes of the file hold the number of a generation. Whoever rewrites the file says in a small file of
        two numbers which generation was begun and which one is done. A page may show no generation before the one that
        was done when the reading began, nor one that was not begun when it ended; when the two are the same, all words
        are the same.

What a check means, and what has to follow, is the tests' business.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharearea_agent.shared import SharedFile, open_shared


class Check:
    """Reads mappings until it is stopped; counts rounds, those with shared pages, and faults."""

    def __init__(self, shared: list[SharedFile], once: Callable[[], str | None]) -> None:
        self.shared = shared
        self.rounds = 0
        self.shared_rounds = 0
        self.least_shared = sys.maxsize
        self.faults: list[str] = []
        self._once = once
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            before = self._pages()
            fault = self._once()
            pages = min(before, self._pages())
            self.rounds += 1
            self.shared_rounds += bool(pages)
            self.least_shared = min(self.least_shared, pages)
            if fault is not None:
                self.faults.append(fault)
                if len(self.faults) >= 10:
                    return

    def _pages(self) -> int:
        return sum(shared.shared_pages for shared in self.shared)

    def report(self) -> dict[str, Any]:
        """Say what was seen so far."""
        return {
            "rounds": self.rounds,
            "shared_rounds": self.shared_rounds,
            "least_shared": self.least_shared,
            "faults": self.faults,
        }

    def stop(self) -> dict[str, Any]:
        """End the thread and say what was seen."""
        self._stop.set()
        self._thread.join()
        return self.report()


class Program:
    """What the questions mean."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.files: dict[str, SharedFile] = {}
        self.checks: dict[str, Check] = {}
        self.spare: list[int] = []

    def open(self, name: str, path: str) -> dict[str, Any]:
        """Open a file under a name."""
        self.files[name] = open_shared(bytes.fromhex(path), agent=self.socket)
        return self.state()[name]  # type: ignore[no-any-return]

    def state(self) -> dict[str, Any]:
        """Say what each file is at this moment."""
        return {
            name: {"pages": shared.shared_pages, "reason": shared.reason, "length": len(shared)}
            for name, shared in self.files.items()
        }

    def hash(self, name: str) -> str:
        """Hash what is mapped."""
        return hashlib.sha256(self.files[name]).hexdigest()

    def read(self, name: str, start: int, end: int) -> str:
        """Return mapped bytes."""
        return self.files[name][start:end].hex()

    def close(self, name: str) -> None:
        """Close a file."""
        self.files.pop(name).close()

    def check_hashes(self, name: str, want: dict[str, str]) -> None:
        """Begin to compare the hashes of files, one after the other."""

        def once() -> str | None:
            for file, expected in want.items():
                found = hashlib.sha256(self.files[file]).hexdigest()
                if found != expected:
                    return f"{file}: hash {found} with {self.files[file].shared_pages} shared pages"
            return None

        self.checks[name] = Check([self.files[file] for file in want], once)

    def check_stamps(self, name: str, counters: str, pages: int) -> None:
        """Begin to compare generations in the first pages of a file."""
        shared = self.files[name]
        with Path(counters).open("rb") as file:
            numbers = memoryview(mmap.mmap(file.fileno(), 16, access=mmap.ACCESS_READ)).cast("Q")

        def once() -> str | None:
            done = numbers[1]
            data = shared[: pages * mmap.PAGESIZE]
            begun = numbers[0]
            seen = set(memoryview(data).cast("Q"))
            if min(seen) < done or max(seen) > begun:
                return f"generations {min(seen)} to {max(seen)} while {done} was done and {begun} begun"
            return None

        self.checks[name] = Check([shared], once)

    def look(self, name: str) -> dict[str, Any]:
        """Report a check that goes on."""
        return self.checks[name].report()

    def stop(self, name: str) -> dict[str, Any]:
        """End a check."""
        return self.checks.pop(name).stop()

    def fork(self, name: str) -> dict[str, Any]:
        """Fork a child, which says what its mapping is, waits for a line, and says what it reads then."""
        shared = self.files[name]
        to_child, from_child = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(from_child[1], json.dumps({"pages": shared.shared_pages, "reason": shared.reason}).encode())
                os.read(to_child[0], 1)
                os.write(from_child[1], hashlib.sha256(shared).hexdigest().encode())
            finally:
                os._exit(0)
        self._child = (child, to_child[1], from_child[0])
        os.close(to_child[0])
        os.close(from_child[1])
        return json.loads(os.read(from_child[0], 65536))  # type: ignore[no-any-return]

    def child(self) -> str:
        """Have the child read its mapping; wait for its end."""
        pid, to, come = self._child
        os.write(to, b"\n")
        found = os.read(come, 65536).decode()
        os.waitpid(pid, 0)
        os.close(to)
        os.close(come)
        return found

    def occupy(self, count: int) -> int:
        """Hold descriptors, `count` or as many as there are. Returns how many."""
        try:
            while len(self.spare) < count:
                self.spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            pass
        return len(self.spare)

    def release(self) -> None:
        """Give the held descriptors back."""
        while self.spare:
            os.close(self.spare.pop())


def main() -> int:
    """Answer until standard input ends."""
    program = Program(sys.argv[1])
    for line in sys.stdin:
        question = json.loads(line)
        verb = question.pop("verb")
        try:
            answer = {"ok": True, "answer": getattr(program, verb)(**question)}
        except (OSError, ValueError) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

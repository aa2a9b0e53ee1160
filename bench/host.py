"""What the kernel says of processes and files, and processes that end with us. What they do is their callers'."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from sharearea.common import native
from sharearea.common.control import ask
from sharearea.common.errors import HostError, PeerUnreachable, ShareareaError
from sharearea.common.wire import PAGE_SIZE

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
ROOT: Final = Path(__file__).resolve().parent.parent

_START_S: Final = 30.0
_STOP_S: Final = 10.0
_MAPPING: Final = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S{4} \S+ \S+ \S+ *(.*)")


# --------------------------------------------------------------------------------------------------------- processes


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, all of its threads, ended ones too (clock_getcpuclockid(3))."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def cpu_share(pids: Sequence[int], seconds: float) -> float:
    """Return the part of one processor that processes take over some seconds, together."""
    used, begun = sum(map(cpu_s, pids)), time.monotonic()
    time.sleep(seconds)
    return (sum(map(cpu_s, pids)) - used) / (time.monotonic() - begun)


@dataclass(frozen=True, slots=True)
class Memory:
    """Private memory of a process, in bytes, told apart by what is mapped."""

    anonymous: int  # heap, stacks, and pages of files that it changed for itself
    libraries: int  # clean pages of programs and libraries that nobody else has mapped now
    area: int  # the area's memfds, where nobody else has touched the page
    files: int  # other mapped files: the store

    @property
    def own(self) -> int:
        """Return what would be gone without the process: neither the area nor a file's page cache."""
        return self.anonymous + self.libraries

    @property
    def total(self) -> int:
        """Return the sum, which is Private_Clean + Private_Dirty of smaps_rollup."""
        return self.anonymous + self.libraries + self.area + self.files


def memory_of(pid: int | str) -> Memory:
    """Read /proc/PID/smaps."""
    anonymous = libraries = area = files = 0
    path, private, mine = "", 0, 0
    for line in [*Path(f"/proc/{pid}/smaps").read_text().splitlines(), "0-0 ---- 0 0 0"]:
        key, _, rest = line.partition(":")
        if key in ("Private_Clean", "Private_Dirty"):
            private += int(rest.split()[0]) * 1024
        elif key == "Anonymous":
            mine = int(rest.split()[0]) * 1024
        elif found := _MAPPING.fullmatch(line):
            shown = private - mine
            anonymous += mine
            if path.startswith("/memfd:"):
                area += shown
            elif path.endswith((".mdb", ".db", ".db-shm")):
                files += shown
            else:
                libraries += shown
            path, private, mine = found[1], 0, 0
    return Memory(anonymous, libraries, area, files)


def memfd_bytes(pid: int) -> int:
    """Return the memory that the kernel holds for the memfds a process has open: of a broker, the sharing area."""
    seen: dict[int, int] = {}
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(fd).startswith("/memfd:"):
                info = fd.stat()
                seen[info.st_ino] = info.st_blocks * 512
    return sum(seen.values())


class Processes:
    """Processes with their logs in one folder; all of them end when the block is left, the last one first.

    Each gets a session of its own, so that Ctrl-C reaches only us, and SIGTERM from the kernel should we die.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[tuple[str, subprocess.Popen[str]]] = []
        self._logs: list[IO[bytes]] = []
        setpriv = shutil.which("setpriv")
        self._wrapper = [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []

    def start(self, name: str, command: Sequence[str | os.PathLike[str]]) -> subprocess.Popen[str]:
        """Start a command. Its standard input and output are ours, its errors go to NAME.log."""
        log = (self.folder / f"{name}.log").open("ab")
        self._logs.append(log)
        process = subprocess.Popen(
            [*self._wrapper, *command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        self._running.append((name, process))
        return process

    def check(self) -> None:
        """Raise HostError if one of them has ended."""
        for name, process in self._running:
            if process.poll() is not None:
                lines = (self.folder / f"{name}.log").read_text(errors="replace").splitlines()
                raise HostError(f"{name} ended with exit code {process.returncode}: {' / '.join(lines[-3:])}")

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Wait until `done`. Raises HostError when that takes too long or a process ends."""
        end = time.monotonic() + _START_S
        while not done():
            self.check()
            if time.monotonic() > end:
                raise HostError(f"{what}: not within {_START_S:.0f} s")
            time.sleep(0.005)

    def stop(self) -> None:
        """Tell all of them to end, the last one first, and wait until they have. Twice is fine."""
        for _, process in reversed(self._running):
            tell_to_end(process)
        while self._running:
            await_end(self._running[-1][1])
            self._running.pop()
        for log in self._logs:
            log.close()
        self._logs.clear()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def tell_to_end(process: subprocess.Popen[str]) -> None:
    """Close a process's standard input and send it SIGTERM."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.terminate()


def await_end(process: subprocess.Popen[str]) -> None:
    """Wait until a process that was told to end has ended, by SIGKILL if need be, and close its pipe."""
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def say(process: subprocess.Popen[str], line: str) -> None:
    """Write a line to a process."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def answers(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines that a process prints. Raises HostError when it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)
    raise HostError(f"a process of the bench ended with exit code {process.wait()}")


def command(name: str) -> str:
    """Return an installed command: the one beside this interpreter, or the one on the path."""
    beside = Path(sys.executable).with_name(name)
    found = os.fspath(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise HostError(f"the command {name} is not installed", "make setup")
    return found


def status_of(path: Path) -> dict[str, Any] | None:
    """Return what a broker or agent answers on its control socket; None while nobody does."""
    try:
        return ask(path, {"verb": "status"})
    except PeerUnreachable:
        return None


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# ------------------------------------------------------------------------------------------------------------- files


class OpenFiles:
    """Files held open, so that counting their page cache costs one cachestat(2) each."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._fds: list[int] = []
        try:
            for path in paths:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self.close()
            if error.errno == errno.EMFILE:
                raise HostError(
                    f"{len(paths)} files are more than this process may open", "raise the hard limit on open files"
                ) from None
            raise

    def cached_bytes(self) -> int:
        """Return how much of the files is in the page cache."""
        return sum(native.cachestat(fd)[0] for fd in self._fds) * PAGE_SIZE

    def read_through(self) -> None:
        """Read all of them, so that they are in the page cache."""
        buffer = memoryview(bytearray(MIB))
        for fd in self._fds:
            at = 0
            while count := os.preadv(fd, [buffer], at):
                at += count

    def close(self) -> None:
        """Close them. Twice is fine."""
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cached_file_bytes(path: Path) -> int:
    """Return a file's page cache; 0 if there is no such file."""
    try:
        with OpenFiles([path]) as files:
            return files.cached_bytes()
    except (FileNotFoundError, ShareareaError):
        return 0


def check_room(folder: Path, disk_bytes: int, memory_bytes: int) -> None:
    """Raise HostError if a folder's file system or this host's memory has less room than that."""
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < disk_bytes:
        raise HostError(f"{folder} has no room for {disk_bytes / MIB:.0f} MiB", "use --work-dir or --quick")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < memory_bytes:
            raise HostError(f"this host has no {memory_bytes / MIB:.0f} MiB of free memory", "use --quick")

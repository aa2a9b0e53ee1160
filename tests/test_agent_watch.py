"""Watching folders through watchdog, with real inotify. Waits are for events, with a limit that only failures meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from watchdog.events import DirModifiedEvent, FileModifiedEvent, FileSystemEvent

from sharearea_agent.agent import Observation
from sharearea_agent.cache import FingerprintCache, coarse_clock_ns
from sharearea_agent.common.errors import HostError
from sharearea_agent.scan import Scanner, ScanSettings
from sharearea_agent.watch import LONGEST_STORM, RESTART_SECONDS, FolderWatch

SETTLE = 0.5
FENCE = "fence-"
LIMIT = 30.0  # seconds until a test gives up waiting for the kernel


class Clock:
    """Seconds, in the test's hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A folder under watch, and what was told of it so far."""

    def __init__(self, folder: Path, **more: int) -> None:
        self.folder = folder
        self.clock = Clock()
        self.woken = threading.Event()
        self.files: set[bytes] = set()
        self.fences: set[bytes] = set()
        self.folders: set[bytes] = set()
        self.rescans = 0
        self.watch = FolderWatch([os.fsencode(folder)], settle=SETTLE, wake=self.woken.set, clock=self.clock, **more)

    def settle(self) -> None:
        """Let the settling time pass and take what has settled."""
        self.clock.now += SETTLE
        drained = self.watch.drain(self.clock.now)
        fences = {path for path in drained.files if FENCE in os.fsdecode(path)}
        self.fences |= fences
        self.files |= drained.files - fences
        self.folders |= drained.folders
        self.rescans += drained.rescan

    def wait_for(self, what: Callable[[], bool]) -> None:
        """Take what settles until it is enough."""
        while True:
            self.woken.clear()
            self.settle()
            if what():
                return
            if not self.watch.pending:
                assert self.woken.wait(LIMIT), f"told so far: {self.files}, {self.folders}, {self.rescans} rescans"

    def fence(self) -> None:
        """Wait until everything that happened before has been told: events come in their order."""
        marker = self.folder / f"{FENCE}{len(self.fences)}"
        marker.write_bytes(b"")
        self.wait_for(lambda: os.fsencode(marker) in self.fences)

    def path(self, name: str | bytes) -> bytes:
        return os.path.join(os.fsencode(self.folder), os.fsencode(name))


@pytest.fixture
def watched(disk_path: Path) -> Iterator[Watched]:
    """Give a watched folder with a file and a folder in it."""
    folder = disk_path / "watched"
    (folder / "sub").mkdir(parents=True)
    (folder / "old").write_bytes(b"old")
    (folder / "sub" / "old").write_bytes(b"old")
    made = Watched(folder)
    assert made.watch.start() == []
    with made.watch:
        yield made


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: path.write_bytes(b"other"), id="write"),
        pytest.param(lambda path: os.truncate(path, 1), id="truncate"),
        pytest.param(lambda path: path.chmod(0o600), id="mode"),
        pytest.param(lambda path: os.utime(path, (0, 0)), id="times"),
        pytest.param(lambda path: path.unlink(), id="delete"),
        pytest.param(
            lambda path: path.rename(next(up for up in path.parents if up.name == "watched").parent / "away"), id="away"
        ),
    ],
)
@pytest.mark.parametrize("name", ["old", "sub/old"])
def test_a_change_leads_to_the_path(watched: Watched, name: str, change: Callable[[Path], None]) -> None:
    change(watched.folder / name)
    watched.wait_for(lambda: watched.path(name) in watched.files)
    assert watched.files == {watched.path(name)}
    assert (watched.folders, watched.rescans) == (set(), 0)


def test_a_new_file_is_told_by_its_bytes(watched: Watched) -> None:
    names = [b"caf\xe9", b"new\nline", "ß".encode()]
    for name in names:
        with open(watched.path(name), "wb") as file:
            file.write(b"new")
    watched.wait_for(lambda: {watched.path(name) for name in names} <= watched.files)


def test_a_renamed_file_is_told_under_both_names(watched: Watched) -> None:
    (watched.folder / "old").rename(watched.folder / "sub" / "new")
    watched.wait_for(lambda: {watched.path("old"), watched.path("sub/new")} <= watched.files)


def test_a_renamed_folder_is_told_under_both_names_and_still_watched(watched: Watched) -> None:
    (watched.folder / "sub").rename(watched.folder / "moved")
    watched.wait_for(lambda: {watched.path("sub"), watched.path("moved")} <= watched.folders)
    (watched.folder / "moved" / "old").write_bytes(b"new")
    watched.wait_for(lambda: watched.path("moved/old") in watched.files)


def test_new_and_removed_folders_are_told(watched: Watched) -> None:
    (watched.folder / "new" / "deep").mkdir(parents=True)
    watched.wait_for(lambda: watched.path("new") in watched.folders)
    watched.fence()
    (watched.folder / "new" / "deep" / "file").write_bytes(b"new")
    watched.wait_for(lambda: watched.path("new/deep/file") in watched.files)
    (watched.folder / "sub" / "old").unlink()
    (watched.folder / "sub").rmdir()
    watched.wait_for(lambda: watched.path("sub") in watched.folders)


def test_reading_is_no_event(watched: Watched) -> None:
    """Neither plain reading nor a scan, which would otherwise set off itself."""
    cache = FingerprintCache.open(watched.folder.parent / "cache.db", bytes(16))
    settings = ScanSettings(root=os.fsencode(watched.folder.parent), folders=(os.fsencode(watched.folder),))
    watched.folder.parent.chmod(0o755)
    scanner = Scanner(settings, bytes(32), cache, coarse_clock_ns)
    seen: list[Observation] = [file for batch in scanner.walk() for file in batch]
    assert len(seen) == 2
    assert scanner.counters.bytes_read > 0
    (watched.folder / "old").read_bytes()
    os.listdir(watched.folder / "sub")
    fd = os.open(watched.folder / "old", os.O_RDWR | os.O_NOATIME)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    with open(watched.folder / "old", "rb") as file:
        file.read()
    watched.fence()
    os.close(fd)  # closing what was open for writing is an event
    assert (watched.files, watched.folders, watched.rescans) == (set(), set(), 0)
    watched.wait_for(lambda: watched.files == {watched.path("old")})
    cache.close()


def test_reading_is_no_event_where_watchdog_says_it() -> None:
    """Versions 3 and newer do if they are given no filter; version 2 has no class for it."""

    def reading(kind: str) -> FileSystemEvent:
        event = FileModifiedEvent("/a")
        event.event_type = kind
        return event

    watch = FolderWatch([], settle=SETTLE)
    for event in (reading("opened"), reading("closed_no_write"), DirModifiedEvent("/")):
        watch._take(event)
    assert not watch.pending


def test_a_path_is_told_when_it_is_quiet(watched: Watched) -> None:
    (watched.folder / "old").write_bytes(b"1")
    assert watched.woken.wait(LIMIT)
    watched.wait_for(lambda: watched.path("old") in watched.files)
    watched.files.clear()
    watched.woken.clear()
    start = watched.clock.now
    (watched.folder / "old").chmod(0o600)
    assert watched.woken.wait(LIMIT)
    assert watched.watch.drain(start + SETTLE - 0.01) == (set(), set(), False)
    assert watched.watch.pending
    watched.clock.now = start + SETTLE - 0.01
    (watched.folder / "old").chmod(0o644)  # not quiet any more
    (watched.folder / "sub" / "old").chmod(0o600)
    watched.wait_for(lambda: watched.path("sub/old") in watched.files)
    watched.wait_for(lambda: watched.path("old") in watched.files)
    assert not watched.watch.pending


def test_too_many_paths_become_a_rescan(disk_path: Path) -> None:
    made = Watched(disk_path, max_paths=20)
    with made.watch:
        assert made.watch.start() == []
        for number in range(50):
            (disk_path / f"{number}").write_bytes(b"")
        made.wait_for(lambda: made.rescans == 1)
        made.fence()
        assert made.rescans <= 2
        (disk_path / "1").unlink()
        made.wait_for(lambda: made.path("1") in made.files)


def test_a_rescan_waits_for_quiet_but_not_for_ever() -> None:
    clock = Clock()
    watch = FolderWatch([], settle=SETTLE, clock=clock, max_paths=1)
    for name in ("/a", "/b"):
        watch._take(FileModifiedEvent(name))
    assert watch.drain(clock.now + SETTLE - 0.01) == (set(), set(), False)
    assert watch.drain(clock.now + SETTLE) == (set(), set(), True)
    assert not watch.pending
    began = clock.now
    told = False
    for name in ("/a", "/b"):
        watch._take(FileModifiedEvent(name))
    while not told:
        watch._take(FileModifiedEvent("/c"))
        clock.now += SETTLE / 2
        told = watch.drain(clock.now).rescan
    assert clock.now == began + LONGEST_STORM * SETTLE


def test_events_that_may_have_overflowed_the_kernels_queue_become_a_rescan(disk_path: Path) -> None:
    """By their number alone: some versions of watchdog say nothing of an overflow."""
    made = Watched(disk_path, queue_limit=400)
    with made.watch:
        assert made.watch.start() == []
        for _ in range(200):
            (disk_path / "a").write_bytes(b"x")
            (disk_path / "b").write_bytes(b"x")
        made.wait_for(lambda: made.rescans >= 1)


STOPPED = """
import os, sys, threading
from watchdog.observers import inotify_c
from sharearea_agent.watch import FolderWatch
# Version 7 says it, so the number of events must not be needed.
limit = 1 << 40 if hasattr(inotify_c, "InotifyFD") else None
woken = threading.Event()
watch = FolderWatch([os.fsencode(sys.argv[1])], settle=0.0, wake=woken.set, queue_limit=limit)
assert watch.start() == []
print("ready", flush=True)
sys.stdin.readline()
while True:
    woken.wait()
    woken.clear()
    if watch.drain(1e12).rescan:
        print("rescan", flush=True)
        break
watch.close()
"""


def test_an_overflow_of_the_kernels_queue_becomes_a_rescan(disk_path: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(disk_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        give_up = threading.Timer(2 * LIMIT, child.kill)
        give_up.start()
        try:
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            fds = [os.open(disk_path / name, os.O_CREAT | os.O_WRONLY, 0o644) for name in ("a", "b")]
            for _ in range(limit):
                for fd in fds:  # by turns: equal events behind one another would become one
                    os.pwrite(fd, b"x", 0)
            for fd in fds:
                os.close(fd)
            child.send_signal(signal.SIGCONT)
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.stdout.readline() == "rescan\n"
            assert child.wait(LIMIT) == 0
        finally:
            give_up.cancel()
            child.kill()


# A user namespace has a limit of its own, so that nobody else on this host runs out of watches.
NO_WATCHES = """
import os, sys
from pathlib import Path
from sharearea_agent.watch import FolderWatch
Path("/proc/sys/user/max_inotify_watches").write_text(sys.argv[2])
watch = FolderWatch([os.fsencode(sys.argv[1])], settle=0.0)
for error in watch.start():
    print(type(error).__name__, error, error.hint, sep="|")
assert watch.check(1e12) == watch.check(2e12) == []
watch.close()
"""


@pytest.mark.parametrize("watches", [0, 4, 1000])
def test_no_watches_left(disk_path: Path, watches: int) -> None:
    for number in range(20):
        (disk_path / f"{number}").mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", NO_WATCHES, str(disk_path), str(watches)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * LIMIT,
    )
    assert done.returncode == 0, f"this test needs user namespaces: {done.stderr}"
    told = done.stdout.splitlines()
    if watches == 1000:
        assert told == []
    else:
        (line,) = told
        assert line.startswith("HostError|not all folders are watched")
        assert "max_user_watches" in line


def test_a_missing_folder_is_told_once_and_watched_when_it_is_there(disk_path: Path) -> None:
    (disk_path / "there").mkdir()
    folders = [os.fsencode(disk_path / name) for name in ("there", "missing")]
    clock, woken = Clock(), threading.Event()
    with FolderWatch(folders, settle=0.0, wake=woken.set, clock=clock) as watch:
        (error,) = watch.start()
        assert isinstance(error, HostError)
        assert "missing is not watched" in str(error)
        assert watch.check(clock.now) == []
        (disk_path / "there" / "file").write_bytes(b"")  # the other one is watched
        assert woken.wait(LIMIT)
        clock.now += RESTART_SECONDS
        assert watch.check(clock.now) == []  # still missing: not news
        (disk_path / "missing").mkdir()
        clock.now += RESTART_SECONDS
        assert watch.check(clock.now) == []
        assert watch.drain(clock.now).rescan  # what happened meanwhile, nobody saw
        woken.clear()
        (disk_path / "missing" / "file").write_bytes(b"")
        assert woken.wait(LIMIT)


def test_a_watch_that_died_is_begun_again(watched: Watched) -> None:
    """A thread ends with the folder that it watches; older versions of watchdog lose threads to errors, too."""
    for path in (watched.folder / "sub" / "old", watched.folder / "old"):
        path.unlink()
    (watched.folder / "sub").rmdir()
    watched.folder.rmdir()
    watched.wait_for(lambda: watched.path("") in {path + b"/" for path in watched.folders})
    for thread in watched.watch._threads:
        if type(thread).__name__ == "InotifyEmitter":
            thread.join(LIMIT)
            assert not thread.is_alive()
    watched.folder.mkdir()
    assert watched.watch.check(watched.clock.now) == []
    watched.wait_for(lambda: watched.rescans == 1)
    (watched.folder / "new").write_bytes(b"")
    watched.wait_for(lambda: watched.path("new") in watched.files)


def test_close_ends_all_threads(disk_path: Path) -> None:
    before = set(threading.enumerate())
    fds = sorted(os.listdir("/proc/self/fd"))
    watch = FolderWatch([os.fsencode(disk_path)], settle=SETTLE)
    assert watch.start() == []
    assert set(threading.enumerate()) > before
    watch.close()
    watch.close()
    assert set(threading.enumerate()) == before
    assert sorted(os.listdir("/proc/self/fd")) == fds

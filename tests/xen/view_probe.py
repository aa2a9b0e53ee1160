"""What a mounted view does, shown on the real thing: runs inside a guest, as root, with the agent's package installed.

`view_probe.py VERB AREA FIRST`: AREA has granted us PAGES references from FIRST on, the pages of
view_granter.content(SEED, PAGES, TAIL) in order. The module is loaded. Prints one JSON object; exit code 0 if all was
as it must be, 1 and what was not on standard error if not.

  rules    read, mmap, attach, detach, writers, executing, pinned pages, unmount: each page compared, each refusal tried
  misuse   every argument of every ioctl wrong, by itself; mount options too
  starve   every allocation of every call fails, one by one (a kernel with fault injection)
  measure  the same file attached and plain: time, and what the page cache holds
  hold     attach, and compare a mapping again and again until /run/view-stop is there; /run/view-state.json says how
           it is

On PVH rules executes bytes of pages that are attached: if the wall before that fell, the guest would die.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from sharearea_agent import view_control
from sharearea_agent.view_control import ViewControl

PAGE: Final = 4096
SEED: Final = 7
PAGES: Final = 512
TAIL: Final = 1234
BIG_SEED: Final = 8
BIG_PAGES: Final = 4096
HOLE: Final = range(100, 120)
"""Pages of the file that are not attached."""
LOWER: Final = Path("/srv/view-lower")
VIEW: Final = Path("/mnt/view")
STATE: Final = Path("/run/view-state.json")
STOP: Final = Path("/run/view-stop")

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mremap.restype = ctypes.c_void_p
_mmap_types = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.mmap.argtypes = _mmap_types
READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC


def content(seed: int, pages: int, tail: int) -> bytes:
    """The same as view_granter's."""
    data = bytearray(random.Random(seed).randbytes(pages * PAGE))
    data[::PAGE] = b"\xc3" * pages
    data[(pages - 1) * PAGE + tail :] = bytes(PAGE - tail)
    return bytes(data)


class Mapping:
    """A mapping whose address and protection are at hand."""

    def __init__(self, fd: int, size: int, protection: int = READ, *, private: bool = False) -> None:
        kind = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        address = libc.mmap(None, size, protection, kind, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        self.address, self.size = int(address), size

    def bytes(self, first: int = 0, count: int | None = None) -> bytes:
        """Read pages."""
        size = self.size - first * PAGE if count is None else count * PAGE
        return ctypes.string_at(self.address + first * PAGE, min(size, self.size - first * PAGE))

    def protect(self, protection: int) -> None:
        """Change the protection of all of it."""
        if libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), protection):
            raise OSError(ctypes.get_errno(), "mprotect")

    def advise(self, advice: int) -> None:
        """Advise all of it."""
        if libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size), advice):
            raise OSError(ctypes.get_errno(), "madvise")

    def resize(self, before: int, after: int) -> None:
        """Give it another size, and perhaps another place; bytes() goes on with the size that it had at first."""
        moved = libc.mremap(ctypes.c_void_p(self.address), ctypes.c_size_t(before), ctypes.c_size_t(after), 1)
        if moved in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mremap")
        self.address = int(moved)

    def execute(self, page: int) -> None:
        """Call a page's first byte, which returns."""
        ctypes.CFUNCTYPE(None)(self.address + page * PAGE)()

    def close(self) -> None:
        """Unmap it; once more if the kernel was made to lack memory for it (starve)."""
        for _ in range(2):
            if not libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size)):
                return
        raise OSError(ctypes.get_errno(), "munmap")


def in_child(call: Callable[[], object]) -> int:
    """Do something in a child; return 0, the errno it failed with, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            call()
        except OSError as error:
            code = error.errno or 255
        except BaseException:
            code = 254
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Probe:
    """A lower folder with one file, its view, and what was found wrong."""

    def __init__(self, area: int, first: int) -> None:
        self.area, self.first = area, first
        self.kind = Path("/sys/hypervisor/guest_type").read_text().strip()
        self.old = tuple(int(number) for number in os.uname().release.split(".")[:2]) < (5, 11)
        self.owns = self.kind != "PV" and not self.old  # mappings of the view are the module's
        self.want = content(SEED, PAGES, TAIL)[: (PAGES - 1) * PAGE + TAIL]
        self.padded = self.want + bytes(PAGES * PAGE - len(self.want))
        self.wrong: list[str] = []
        self.control = ViewControl()
        self.checks = 0

    def check(self, holds: object, text: str) -> None:
        """Note what does not hold."""
        self.checks += 1
        if not holds:
            self.wrong.append(text)
            sys.stderr.write(f"view_probe: {text}\n")

    def refused(self, number: int, call: Callable[[], object], text: str) -> None:
        """Note it if a call is not refused with this errno."""
        try:
            call()
        except OSError as error:
            self.check(error.errno == number, f"{text}: {errno.errorcode.get(error.errno or 0)}")
            return
        self.check(False, f"{text} was not refused")

    # ---------------------------------------------------------------------------------------------- the view itself

    def write_lower(self) -> None:
        """Write the lower file anew, as it is granted."""
        LOWER.mkdir(exist_ok=True)
        (LOWER / "data").write_bytes(self.want)
        (LOWER / "small").write_bytes(b"small")
        os.sync()

    @contextmanager
    def mounted(self, *options: str, over: bool = False) -> Iterator[Path]:
        """Mount the view, and unmount it."""
        VIEW.mkdir(exist_ok=True)
        where = LOWER if over else VIEW
        words = ["mount", "-t", "shareview", "-o", ",".join([f"lower={LOWER}", *options]), "none", str(where)]
        subprocess.run(words, check=True)
        try:
            yield where
        finally:
            done = subprocess.run(["umount", str(where)], capture_output=True, text=True)
            self.check(done.returncode == 0, f"umount: {done.stderr}")

    def runs(self, first: int | None = None) -> bytes:
        """All pages but those of the hole."""
        ref = self.first if first is None else first
        return array("I", (0, ref, HOLE.start, HOLE.stop, ref + HOLE.stop, PAGES - HOLE.stop)).tobytes()

    def attach(self, fd: int, runs: bytes | None = None, epoch: int | None = None) -> int:
        """Attach all but the hole, or these runs."""
        epoch = self.control.info().epoch if epoch is None else epoch
        return self.control.attach(fd, self.area, runs or self.runs(), epoch)

    def settled(self) -> bool:
        """Wait until nothing that was let go is still mapped."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if not self.control.info().pending_pages:
                return True
            time.sleep(0.01)
        return False

    # -------------------------------------------------------------------------------------------------------- rules

    def rules(self) -> dict[str, Any]:
        """Try everything that must hold, one after the other."""
        before = self.control.info()
        for step in (
            self._plain,
            self._names,
            self._reading,
            self._mapping,
            self._executing,
            self._detaching,
            self._comparing,
            self._writing,
            self._truncating,
            self._pinning,
            self._unmounting,
            self._over_itself,
        ):
            self.write_lower()
            step()
            self.check(self.settled(), f"{step.__name__}: pages are still pending")
            left = self.control.info()
            self.check(left.tables == left.attached_pages == 0, f"{step.__name__}: left attached: {left}")
        after = self.control.info()
        self.check(after.leaked_pages == 0, "pages were leaked")
        self.check(after.read_bytes > before.read_bytes, "nothing was read from grants")
        self.check(after.faults > before.faults or not self.owns, "no fault was served from grants")
        return {"checks": self.checks, "info": {name: getattr(after, name) for name in after.__slots__}}

    def _plain(self) -> None:
        with self.mounted() as view:
            self.check((view / "data").read_bytes() == self.want, "a view without tables is not the folder")
            plain, seen = os.stat(LOWER / "data"), os.stat(view / "data")
            fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_mode", "st_uid", "st_nlink")
            self.check(all(getattr(plain, f) == getattr(seen, f) for f in fields), "stat differs")
            self.check(os.statvfs(view).f_blocks == os.statvfs(LOWER).f_blocks, "statvfs differs")
            self.refused(errno.EROFS, lambda: os.open(view / "data", os.O_WRONLY), "open for writing")
            self.refused(errno.EROFS, lambda: os.open(view / "new", os.O_WRONLY | os.O_CREAT), "creating")
            self.refused(errno.EROFS, lambda: os.unlink(view / "data"), "unlinking")
            self.refused(errno.EROFS, lambda: os.truncate(view / "data", 0), "truncating")

    def _names(self) -> None:
        other, link, folder = LOWER / "other", LOWER / "link", LOWER / "folder"
        with self.mounted() as view:
            self.check((view / "small").read_bytes() == b"small", "the small file")
            self.check(not (view / "other").exists(), "a name that is not there")
            os.rename(LOWER / "small", other)
            self.check(not (view / "small").exists(), "a renamed file is found under its old name")
            self.check((view / "other").read_bytes() == b"small", "a renamed file is not found under its new name")
            (LOWER / "small").write_bytes(b"another")
            self.check((view / "small").read_bytes() == b"another", "a name that was taken again")
            os.rename(other, LOWER / "small")
            self.check((view / "small").read_bytes() == b"small", "a file that replaced another")
            link.symlink_to("small")
            self.check(os.readlink(view / "link") == "small", "a new symbolic link")
            folder.mkdir()
            (folder / "inner").write_bytes(b"inner")
            self.check((view / "folder" / "inner").read_bytes() == b"inner", "a new folder")
            os.rename(folder, LOWER / "moved")
            self.check((view / "moved" / "inner").read_bytes() == b"inner", "a renamed folder")
            self.check(not (view / "folder").exists(), "the folder's old name")
            os.chmod(LOWER / "small", 0o600)
            self.check(os.stat(view / "small").st_mode & 0o777 == 0o600, "changed rights are not seen")

            def as_nobody() -> None:
                os.setuid(65534)
                (view / "small").read_bytes()

            self.check(in_child(as_nobody) == errno.EACCES, "a file that only root may read")
            self.check(sorted(os.listdir(view)) == sorted(os.listdir(LOWER)), "the folder's list")
            (LOWER / "moved" / "inner").unlink()
            (LOWER / "moved").rmdir()
            link.unlink()
            self.check(not {"moved", "link"} & set(os.listdir(view)), "what was removed is listed")

    def _resident(self) -> int:
        """How many pages of the lower file are cached, without bringing any in."""
        fd = os.open(LOWER / "data", os.O_RDONLY)
        mapping = Mapping(fd, len(self.padded))
        vector = (ctypes.c_ubyte * PAGES)()
        libc.mincore(ctypes.c_void_p(mapping.address), ctypes.c_size_t(mapping.size), vector)
        mapping.close()
        os.close(fd)
        return sum(byte & 1 for byte in vector)

    def _reading(self) -> None:
        chance = random.Random(3)
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.attach(fd)
            self.check(self.control.state(fd) == (PAGES - len(HOLE), PAGES), "the state of the file")
            drop_caches()
            self.check(os.pread(fd, 1 << 24, 0) == self.want, "the file in one read")
            self.check(self._resident() < 250, f"{self._resident()} pages are cached after reading")
            for _ in range(3000):
                at, size = chance.randrange(len(self.want) + 5000), chance.choice((1, 100, 4096, 5000, 100_000))
                if os.pread(fd, size, at) != self.want[at : at + size]:
                    self.check(False, f"{size} bytes at {at}")
                    break
            self.check(os.lseek(fd, 0, os.SEEK_END) == len(self.want), "the end of the file")
            self.check(os.pread(fd, 10, len(self.want)) == b"", "beyond the end")
            os.lseek(fd, 0, os.SEEK_SET)
            with open("/run/view-copy", "w+b") as copy:
                while os.sendfile(copy.fileno(), fd, None, 1 << 20):
                    pass
                copy.seek(0)
                self.check(copy.read() == self.want, "sendfile")
            inward, outward = os.pipe()
            self.check(os.splice(fd, outward, 3 * PAGE, offset_src=5 * PAGE) == 3 * PAGE, "splice")
            self.check(os.read(inward, 3 * PAGE) == self.want[5 * PAGE : 8 * PAGE], "spliced bytes")
            os.close(inward)
            os.close(outward)
            direct = os.open(view / "data", os.O_RDONLY | os.O_DIRECT)
            with mmap.mmap(-1, PAGES * PAGE) as buffer:
                count = os.preadv(direct, [buffer], 0)
                self.check(buffer[:count] == self.want[:count] and count >= HOLE.start * PAGE, f"O_DIRECT: {count}")
            os.close(direct)
            self.refused(errno.EFAULT, lambda: read_nowhere(fd), "reading into nowhere")
            self.control.detach(fd)
            self.check(os.pread(fd, 1 << 24, 0) == self.want, "after detaching")
            os.close(fd)

    def _mapping(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            size = len(self.want)
            early = Mapping(fd, size)
            self.check(early.bytes() == self.want, "a mapping without a table")
            changed = Mapping(fd, size, READ | WRITE, private=True)
            ctypes.memset(changed.address + 3 * PAGE, 0x11, 10)
            self.attach(fd)
            faults = self.control.info().faults
            self.check(early.bytes() == self.want, "a mapping from before")
            if self.owns:
                self.check(self.control.info().faults > faults, "attaching did not reach a mapping that was there")
            late = Mapping(fd, size)
            self.check(late.bytes() == self.want, "a mapping from after")
            tail = ctypes.string_at(late.address + size, PAGE - TAIL)
            self.check(tail == bytes(PAGE - TAIL), "not zeros after the end")
            ctypes.memset(changed.address + 9 * PAGE, 0x22, 10)
            self.check(changed.bytes(9, 1)[:11] == b"\x22" * 10 + self.want[9 * PAGE + 10 :][:1], "a private store")
            self.check(changed.bytes(3, 1)[:10] == b"\x11" * 10, "an earlier private store")
            self.check(late.bytes() == self.want, "a private store is seen elsewhere")
            self.refused(errno.EACCES, lambda: Mapping(fd, size, READ | WRITE), "a writable shared mapping")
            self.refused(errno.EACCES, lambda: late.protect(READ | WRITE), "making a shared mapping writable")
            store = in_child(lambda: ctypes.memset(late.address, 0, 1))
            self.check(store == -signal.SIGSEGV, f"a store: {store}")
            beyond = in_child(lambda: Mapping(fd, size + 4 * PAGE).bytes(PAGES + 1, 1))
            self.check(beyond == -signal.SIGBUS, f"beyond the end: {beyond}")

            def child() -> None:
                if late.bytes() != self.want or changed.bytes(9, 1)[:10] != b"\x22" * 10:
                    raise OSError(errno.EIO, "")

            self.check(in_child(child) == 0, "a child sees other bytes")
            late.advise(mmap.MADV_DONTNEED)
            self.check(late.bytes() == self.want, "after MADV_DONTNEED")
            libc.mlock(ctypes.c_void_p(late.address), ctypes.c_size_t(size))
            self.check(late.bytes() == self.want, "after mlock")
            for before, after in ((size, size + 600 * PAGE), (size + 600 * PAGE, size)):
                late.resize(before, after)
                self.check(late.bytes() == self.want, "after mremap")
            late.protect(0)
            self.check(in_child(lambda: late.bytes(0, 1)) == -signal.SIGSEGV, "PROT_NONE is read")
            late.protect(READ)
            self.check(late.bytes() == self.want, "after PROT_NONE")
            with open("/srv/view-written", "wb", buffering=0) as out:
                self.check(
                    libc.write(out.fileno(), ctypes.c_void_p(late.address), ctypes.c_size_t(size)) == size, "write"
                )
            self.check(Path("/srv/view-written").read_bytes() == self.want, "a file that was written from a mapping")
            self.control.detach(fd)
            for mapping, name in ((early, "an early"), (late, "a late")):
                self.check(mapping.bytes() == self.want, f"{name} mapping after detaching")
            self.check(changed.bytes(9, 1)[:10] == b"\x22" * 10, "a private store is gone after detaching")
            for mapping in (early, late, changed):
                mapping.close()
            os.close(fd)

    def _executing(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.attach(fd)
            mapping = Mapping(fd, len(self.want))
            self.check(mapping.bytes() == self.want, "before executing")
            straight = Mapping(fd, len(self.want), READ | EXEC)
            straight.execute(5)
            self.check(straight.bytes() == self.want, "an executable mapping")
            for page in (0, 7, 300):
                self.check(mapping.bytes(page, 1) == self.want[page * PAGE : (page + 1) * PAGE], "before mprotect")
                mapping.protect(READ | EXEC)
                mapping.execute(page)
                mapping.execute(page + 1)
                self.check(mapping.bytes() == self.want, "while executable")
                mapping.protect(READ)
                self.check(mapping.bytes() == self.want, "executable no more")
            private = Mapping(fd, len(self.want), READ, private=True)
            self.check(private.bytes() == self.want, "a private mapping")
            private.protect(READ | WRITE | EXEC)
            private.execute(11)
            self.check(private.bytes() == self.want, "a private executable mapping")
            for each in (mapping, straight, private):
                each.close()
            self.control.detach(fd)
            os.close(fd)
            binary = LOWER / "true"
            binary.write_bytes(Path("/bin/true").read_bytes())
            binary.chmod(0o755)
            self.check(subprocess.run([str(view / "true")]).returncode == 0, "a program of the view")
            binary.unlink()

    def _detaching(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.check(not self.control.detach(fd), "detaching without a table")
            mapping = Mapping(fd, len(self.want))
            for _ in range(20):
                self.attach(fd)
                self.refused(errno.EEXIST, lambda: self.attach(fd), "a second table")
                self.check(mapping.bytes() == self.want, "attached")
                self.check(self.control.detach(fd), "detaching")
                self.check(mapping.bytes() == self.want, "detached")
            self.attach(fd)
            self.control.detach_all()
            self.check(self.control.state(fd)[0] == 0, "left attached by detaching all")
            self.control.detach_all()
            self.check(mapping.bytes() == self.want, "all detached")
            mapping.close()
            os.close(fd)

    def _comparing(self) -> None:
        flipped = bytearray(self.want)
        flipped[200 * PAGE + 17] ^= 1
        for options, cached in (((), True), (("verify=all",), True), (("verify=all",), False)):
            self.write_lower()
            with self.mounted(*options) as view:
                fd = os.open(view / "data", os.O_RDONLY)
                if not cached:
                    drop_caches()
                compared = self.attach(fd)
                self.check(
                    compared == PAGES - len(HOLE) or (not options and compared > 0), f"compared {compared} pages"
                )
                self.control.detach(fd)
                (LOWER / "data").write_bytes(flipped)
                os.sync()
                if not cached:
                    drop_caches()
                self.refused(errno.EBADMSG, lambda fd=fd: self.attach(fd), f"another byte, {options} {cached}")  # type: ignore[misc]
                self.check(os.pread(fd, 1 << 24, 0) == flipped, "after a refusal")
                os.close(fd)
        longer = LOWER / "longer"
        longer.write_bytes(self.want + b"x")
        os.sync()
        with self.mounted("verify=all") as view:
            fd = os.open(view / "longer", os.O_RDONLY)
            self.refused(errno.EBADMSG, lambda: self.attach(fd), "zeros where the file has a byte")
            os.close(fd)
        longer.write_bytes(self.want[:-1])
        with self.mounted() as view:
            drop_caches()
            fd = os.open(view / "longer", os.O_RDONLY)
            self.refused(errno.EBADMSG, lambda: self.attach(fd), "a byte after the end of the file, nothing cached")
            os.close(fd)
        longer.unlink()

    def _writing(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            mapping = Mapping(fd, len(self.want))
            self.attach(fd)
            self.check(mapping.bytes() == self.want, "before a writer")
            info = self.control.info()
            self.check(not readable(self.control), "the device is readable before anything was lost")
            with suppress(BlockingIOError):
                os.close(os.open(LOWER / "data", os.O_WRONLY | os.O_NONBLOCK))
                self.check(False, "a writer who does not wait was let in")
            begun = time.monotonic()
            writer = os.open(LOWER / "data", os.O_RDWR)
            waited = time.monotonic() - begun
            self.check(self.control.state(fd)[0] == 0, "still attached when the writer is in")
            self.check(waited < 5, f"the writer waited {waited:.1f} s")
            os.pwrite(writer, b"NEW", 50 * PAGE)
            self.check(mapping.bytes(50, 1)[:3] == b"NEW", "a mapping does not see what was written")
            self.check(os.pread(fd, 3, 50 * PAGE) == b"NEW", "a read does not see what was written")
            self.check(readable(self.control, 5), "the device does not say that a table was lost")
            self.check(self.control.info().lost == info.lost + 1, "one table was lost")
            self.check(not readable(self.control), "the device says it again")
            self.refused(errno.EAGAIN, lambda: self.attach(fd), "attaching while a writer is in")
            os.close(writer)
            self.refused(errno.EBADMSG, lambda: self.attach(fd), "attaching what was changed")
            mapping.close()
            os.close(fd)

    def _truncating(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            mapping = Mapping(fd, len(self.want))
            self.attach(fd)
            self.check(mapping.bytes() == self.want, "before truncating")
            os.truncate(LOWER / "data", 10 * PAGE + 5)
            self.check(os.pread(fd, 1 << 24, 0) == self.want[: 10 * PAGE + 5], "what is left")
            self.check(in_child(lambda: mapping.bytes(200, 1)) == -signal.SIGBUS, "a page beyond the new end is read")
            self.check(mapping.bytes(10, 1) == self.want[10 * PAGE :][:5] + bytes(PAGE - 5), "the new last page")
            self.refused(errno.EINVAL, lambda: self.attach(fd), "more pages than the file has")
            mapping.close()
            os.close(fd)

    def _pinning(self) -> None:
        if not self.owns:
            return
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            mapping = Mapping(fd, len(self.want))
            self.attach(fd)
            self.check(mapping.bytes() == self.want, "before pinning")
            inward, outward = os.pipe()
            vector = struct.pack("QQ", mapping.address + 20 * PAGE, 4 * PAGE)
            self.check(libc.vmsplice(outward, ctypes.c_char_p(vector), ctypes.c_ulong(1), 0) == 4 * PAGE, "vmsplice")
            begun = time.monotonic()
            self.control.detach(fd)
            self.check(time.monotonic() - begun < 2, "detaching waits for a pinned page")
            self.check(mapping.bytes() == self.want, "detached, with pinned pages")
            time.sleep(0.2)
            self.check(self.control.info().pending_pages == PAGES - len(HOLE), "pinned pages are not pending")
            self.check(os.read(inward, 4 * PAGE) == self.want[20 * PAGE : 24 * PAGE], "the bytes of pinned pages")
            os.close(inward)
            os.close(outward)
            self.check(self.settled(), "pages are pending when nobody pins them any more")
            mapping.close()
            os.close(fd)

    def _unmounting(self) -> None:
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.attach(fd)
            mapping = Mapping(fd, len(self.want))
            self.check(mapping.bytes() == self.want, "before unmounting")
            busy = subprocess.run(["umount", str(view)], capture_output=True)
            self.check(busy.returncode != 0, "unmounted while in use")
            os.close(fd)
            busy = subprocess.run(["umount", str(view)], capture_output=True)
            self.check(busy.returncode != 0 or not self.owns, "unmounted while mapped")
            if busy.returncode == 0:
                subprocess.run(["mount", "-t", "shareview", "-o", f"lower={LOWER}", "none", str(view)], check=True)
            mapping.close()
        self.check(self.control.info().tables == 0, "a table is left after unmounting")

    def _over_itself(self) -> None:
        with self.mounted(over=True) as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.attach(fd)
            self.check(os.pread(fd, 1 << 24, 0) == self.want, "a view over its own folder")
            self.refused(errno.EROFS, lambda: os.open(LOWER / "data", os.O_WRONLY), "writing below it")
            mapping = Mapping(fd, len(self.want))
            self.check(mapping.bytes() == self.want, "mapped")
            mapping.close()
            os.close(fd)

    # ------------------------------------------------------------------------------------------------------- misuse

    def misuse(self) -> dict[str, Any]:
        """Call wrongly."""
        self.write_lower()
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self._wrong_arguments(fd)
            self._wrong_structures(fd)
            os.close(fd)
        self._wrong_options()
        self.check(self.settled(), "pages are pending")
        info = self.control.info()
        self.check(info.tables == 0 and info.leaked_pages == 0, f"left: {info}")
        return {"checks": self.checks}

    def _wrong_arguments(self, fd: int) -> None:
        first, epoch = self.first, self.control.info().epoch

        def runs(*numbers: int) -> bytes:
            return array("I", numbers).tobytes()

        wrong: list[tuple[int, bytes, str]] = [
            (errno.EINVAL, runs(0, first, 0), "an empty run"),
            (errno.EINVAL, runs(0, first, PAGES + 1), "more than the file has"),
            (errno.EINVAL, runs(PAGES, first, 1), "a page after the end"),
            (errno.EINVAL, runs(0xFFFFFFFF, first, 0xFFFFFFFF), "the largest page and count"),
            (errno.EINVAL, runs(5, first, 5, 3, first, 1), "runs that descend"),
            (errno.EINVAL, runs(0, first, 5, 4, first, 1), "runs that overlap"),
            (errno.EINVAL, runs(0, 0xFFFFFFFF, 2), "references that wrap around"),
            (errno.EINVAL, runs(0, first + 100_000, 1), "a reference that was not granted"),
            (errno.EINVAL, runs(0, first, 3, 3, first + 100_000, 1), "one of several that was not granted"),
            (errno.EBADMSG, runs(0, first + 1, 1), "another page's bytes"),
        ]
        for number, column, name in wrong:
            self.refused(number, lambda column=column: self.attach(fd, column), name)  # type: ignore[misc]
        good = self.runs()
        self.refused(errno.ESTALE, lambda: self.attach(fd, good, epoch + 1), "another epoch")
        self.refused(errno.EINVAL, lambda: self.control.attach(fd, 0x7FF0, good, epoch), "a reserved domain")
        self.refused(errno.EINVAL, lambda: self.control.attach(fd, 0x7FEF, good, epoch), "a domain that is not there")
        lower, folder = os.open(LOWER / "data", os.O_RDONLY), os.open(VIEW, os.O_RDONLY)
        path = os.open(VIEW / "data", os.O_PATH)
        for other, name in ((lower, "a lower file"), (folder, "a folder"), (path, "a path"), (999, "nothing")):
            self.refused(errno.EBADF, lambda other=other: self.attach(other), name)  # type: ignore[misc]
            self.refused(errno.EBADF, lambda other=other: self.control.state(other), name)  # type: ignore[misc]
            self.refused(errno.EBADF, lambda other=other: self.control.detach(other), name)  # type: ignore[misc]
        for each in (lower, folder, path):
            os.close(each)
        limit = Path("/sys/module/shareview/parameters/max_pages")
        usual = limit.read_text()
        limit.write_text("10")
        self.refused(errno.ENOSPC, lambda: self.attach(fd), "more than max_pages")
        limit.write_text(usual)
        self.check(self.attach(fd) > 0, "and what is right is still taken")
        self.control.detach(fd)

        def unprivileged() -> None:
            os.setuid(65534)
            self.control.info()

        self.check(in_child(unprivileged) == errno.EPERM, "a descriptor in the hands of nobody")

        def opening() -> None:
            os.setuid(65534)
            os.open(view_control.DEVICE, os.O_RDWR)

        opened = in_child(opening)
        self.check(opened == errno.EACCES, f"the device opened by nobody: {opened}")

    def _wrong_structures(self, fd: int) -> None:
        device = self.control.fileno()
        for number in (
            view_control.INFO,
            view_control.ATTACH,
            view_control.DETACH,
            view_control.STATE,
            view_control.HOLD,
        ):
            size = number >> 16 & 0x3FFF
            for told in (0, size - 1, size + 1, 0xFFFFFFFF):
                body = struct.pack("=I", told).ljust(size, b"\0")
                self.refused(errno.EINVAL, lambda n=number, b=body: fcntl.ioctl(device, n, b), f"size {told}")  # type: ignore[misc]
            self.refused(errno.EFAULT, lambda n=number: ioctl_at(device, n, 0), "no memory")  # type: ignore[misc]
            self.refused(errno.EFAULT, lambda n=number: ioctl_at(device, n, 1 << 63), "the kernel's memory")  # type: ignore[misc]
            self.refused(errno.ENOTTY, lambda n=number: fcntl.ioctl(device, n ^ 0x100, bytes(64)), "no such call")  # type: ignore[misc]
        self.refused(errno.EINVAL, lambda: fcntl.ioctl(device, view_control.HOLD, struct.pack("=II", 8, 2)), "hold 2")
        body = struct.pack("=IiIIIIQQQ", 48, fd, 0, self.area, 1, 0, 16, 0, 0)
        self.refused(errno.EFAULT, lambda: fcntl.ioctl(device, view_control.ATTACH, body), "runs at nowhere")
        for flags, count, reserved in ((1, 1, 0), (0, 0, 0), (0, 0x100001, 0), (0, 0xFFFFFFFF, 0), (0, 1, 1)):
            other = struct.pack("=IiIIIIQQQ", 48, fd, flags, self.area, count, reserved, 16, 0, 0)
            self.refused(errno.EINVAL, lambda b=other: fcntl.ioctl(device, view_control.ATTACH, b), f"{flags} {count}")  # type: ignore[misc]

    def _wrong_options(self) -> None:
        VIEW.mkdir(exist_ok=True)
        for options in (
            "",
            "lower=",
            "lower=/nothing/here",
            f"lower={LOWER}/data",
            f"lower={LOWER},verify=some",
            f"lower={LOWER},unknown",
            "lower=" + "x" * 3000,
            "lower=/proc/self/fd",
        ):
            words = ["mount", "-t", "shareview", *(["-o", options] if options else []), "none", str(VIEW)]
            done = subprocess.run(words, capture_output=True)
            if done.returncode == 0:
                subprocess.run(["umount", str(VIEW)], check=True)
            self.check(done.returncode != 0, f"mounted with {options[:80]!r}")
        with self.mounted() as view:
            inner = ["mount", "-t", "shareview", "-o", f"lower={view}", "none", "/mnt"]
            self.check(subprocess.run(inner, capture_output=True).returncode != 0, "a view of a view was mounted")
            again = ["mount", "-o", "remount,rw", str(view)]
            self.check(subprocess.run(again, capture_output=True).returncode != 0, "remounted to be written")

    # ------------------------------------------------------------------------------------------------------- starve

    def starve(self) -> dict[str, Any]:
        """Have the first allocation of a call fail, then the second, until it has no more; it fails or it is right."""
        self.write_lower()
        VIEW.mkdir(exist_ok=True)
        for name in ("failslab", "fail_page_alloc"):
            folder = Path("/sys/kernel/debug") / name
            (folder / "ignore-gfp-wait").write_text("N")
            (folder / "verbose").write_text("0")
        Path("/sys/kernel/debug/fail_page_alloc/min-order").write_text("0")
        failed: dict[str, int] = {}
        source, target = str(LOWER).encode(), str(VIEW).encode()

        def mount() -> None:
            if libc.mount(b"none", target, b"shareview", ctypes.c_ulong(0), b"lower=" + source):
                raise OSError(ctypes.get_errno(), "mount")

        def unmount() -> None:
            if libc.umount2(target, 0):
                raise OSError(ctypes.get_errno(), "umount")

        failed["mount"] = self._starved("mount", mount, unmount)
        with self.mounted("verify=all") as view:
            fd = os.open(view / "data", os.O_RDONLY)

            def right() -> None:
                self.check(os.pread(fd, 1 << 24, 0) == self.want, "other bytes")
                self.control.detach(fd)

            def look() -> None:
                found = os.open(view / "small", os.O_RDONLY)
                try:
                    self.check(os.read(found, 10) == b"small", "the small file")
                finally:
                    os.close(found)

            def map_it() -> None:
                mapping = Mapping(fd, len(self.want))
                try:
                    self.check(mapping.bytes() == self.want, "a mapping has other bytes")
                finally:
                    mapping.close()

            def write_it() -> None:
                os.close(os.open(LOWER / "data", os.O_RDWR))

            failed["attach"] = self._starved("attach", lambda: self.attach(fd), right)
            failed["open"] = self._starved("open", look, drop_caches)
            failed["list"] = self._starved("list", lambda: os.listdir(view))
            self.attach(fd)
            failed["read"] = self._starved("read", lambda: self.check(os.pread(fd, 1 << 24, 0) == self.want, "a read"))
            failed["map"] = self._starved("map", map_it)
            failed["detach"] = self._starved("detach", lambda: self.control.detach(fd), lambda: self.attach(fd))
            failed["writer"] = self._starved("writer", write_it, lambda: self.attach(fd))
            self.control.detach(fd)
            os.close(fd)
        self.check(self.settled(), "pages are pending")
        info = self.control.info()
        self.check(info.tables == info.attached_pages == info.leaked_pages == 0, f"left: {info}")
        for name in ("mount", "attach", "open"):
            self.check(failed[name] > 0, f"{name}: no allocation was made to fail")
        return {"failed": failed}

    def _starved(self, name: str, call: Callable[[], object], undo: Callable[[], object] = lambda: None) -> int:
        """Call until no allocation is left to fail; return how many did. `undo`: after a call that succeeded."""
        number = 0
        with open(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/fail-nth", "r+b", buffering=0) as order:
            while True:
                number += 1
                code = 0
                order.write(str(number).encode())
                try:
                    call()
                except OSError as error:
                    code = error.errno or 255
                left = int(os.pread(order.fileno(), 16, 0))
                order.write(b"0")
                self.check(code in (0, errno.ENOMEM), f"{name}, allocation {number}: {errno.errorcode.get(code, code)}")
                if not code:
                    undo()
                if left:
                    return number - 1
                if number > 2000:
                    self.check(False, f"{name} has no end of allocations")
                    return number

    # ------------------------------------------------------------------------------------------------------ measure

    def measure(self) -> dict[str, Any]:
        """Time the view of an attached file against the same file plain and cached; see what is cached."""
        LOWER.mkdir(exist_ok=True)
        data = content(BIG_SEED, BIG_PAGES, PAGE)
        (LOWER / "big").write_bytes(data)
        many = LOWER / "many"
        many.mkdir(exist_ok=True)
        for number in range(1000):
            (many / f"f{number}").write_bytes(b"x")
        os.sync()
        plain = Path("/srv/view-plain")
        plain.write_bytes(data)
        numbers: dict[str, Any] = {}
        with self.mounted() as view:
            fd = os.open(view / "big", os.O_RDONLY)
            epoch = self.control.info().epoch
            begun = time.perf_counter()
            compared = self.control.attach(fd, self.area, array("I", (0, self.first, BIG_PAGES)).tobytes(), epoch)
            numbers["attach_ms"] = round((time.perf_counter() - begun) * 1000, 1)
            numbers["attach_compared_pages"] = compared
            for name, read in (("read", self._read_whole), ("mmap", self._map_whole)):
                for which, path in (("plain", plain), ("view", view / "big")):
                    drop_caches()
                    cached = meminfo("Cached")
                    self.check(read(path) == data, f"{name} of the {which} file")
                    numbers[f"{name}_{which}_cached_kb"] = meminfo("Cached") - cached
            self._read_whole(plain)
            for words in ((plain, view / "big", 9), ("stat", many, view / "many", 9)):
                done = subprocess.run(
                    ["/run/view_bench", *map(str, words)], capture_output=True, text=True, check=True, timeout=300
                )
                for line in done.stdout.splitlines():
                    test, first, second = line.split()
                    numbers[test] = [int(first), int(second), round(int(second) / int(first), 3)]
            begun = time.perf_counter()
            self.control.detach(fd)
            numbers["detach_ms"] = round((time.perf_counter() - begun) * 1000, 1)
            os.close(fd)
        self.check(self.settled(), "pages are pending")
        return {"numbers": numbers}

    def _read_whole(self, path: Path) -> bytes:
        return path.read_bytes()

    def _map_whole(self, path: Path) -> bytes:
        fd = os.open(path, os.O_RDONLY)
        mapping = Mapping(fd, BIG_PAGES * PAGE)
        os.close(fd)
        data = mapping.bytes()
        mapping.close()
        return data

    # --------------------------------------------------------------------------------------------------------- hold

    def hold(self) -> dict[str, Any]:
        """Hold a mapping through whatever happens, and say what is seen."""
        self.write_lower()
        for path in (STATE, STOP):
            path.unlink(missing_ok=True)
        with self.mounted() as view:
            fd = os.open(view / "data", os.O_RDONLY)
            self.attach(fd)
            mapping = Mapping(fd, len(self.want))
            rounds = 0
            while not STOP.exists() and not self.wrong:
                self.check(mapping.bytes() == self.want, f"round {rounds}: the mapping has other bytes")
                self.check(os.pread(fd, 1 << 24, 0) == self.want, f"round {rounds}: other bytes are read")
                rounds += 1
                order = Path("/run/view-order")
                if order.exists():
                    self._obey(fd, json.loads(order.read_text()))
                    order.unlink()
                info = self.control.info()
                now = {name: getattr(info, name) for name in info.__slots__}
                temporary = STATE.with_suffix(".new")
                temporary.write_text(json.dumps({"rounds": rounds, "wrong": self.wrong, "info": now}))
                temporary.rename(STATE)
                time.sleep(0.05)
            self.control.detach(fd)
            mapping.close()
            os.close(fd)
        self.check(self.settled(), "pages are pending")
        return {"rounds": rounds}

    def _obey(self, fd: int, order: dict[str, Any]) -> None:
        """Attach again, with references of another epoch refused first; or hold back a suspend; or let go."""
        if order["do"] == "attach":
            self.refused(errno.ESTALE, lambda: self.attach(fd, epoch=order["epoch"] - 1), "references of before")
            self.area, self.first = order["area"], order["first"]
            self.attach(fd, epoch=order["epoch"])
        elif order["do"] == "hold":
            self.control.hold(order["on"])
        elif order["do"] == "detach":
            self.control.detach(fd)


def readable(control: ViewControl, seconds: float = 0) -> bool:
    """Whether the device says that something was lost."""
    poll = select.poll()
    poll.register(control.fileno(), select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def read_nowhere(fd: int) -> None:
    """Read to an address that is not mapped."""
    if libc.pread(fd, ctypes.c_void_p(16), ctypes.c_size_t(PAGE), ctypes.c_long(0)) < 0:
        raise OSError(ctypes.get_errno(), "pread")


def ioctl_at(fd: int, number: int, address: int) -> None:
    """Call with an address."""
    if libc.ioctl(fd, ctypes.c_ulong(number), ctypes.c_void_p(address)) < 0:
        raise OSError(ctypes.get_errno(), "ioctl")


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in kilobytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def drop_caches() -> None:
    """Have the guest's kernel forget what it can read again."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> int:
    """Run one verb."""
    probe = Probe(int(sys.argv[2]), int(sys.argv[3]))
    verbs: dict[str, Callable[[], dict[str, Any]]] = {
        "rules": probe.rules,
        "misuse": probe.misuse,
        "starve": probe.starve,
        "measure": probe.measure,
        "hold": probe.hold,
    }
    result = verbs[sys.argv[1]]()
    result |= {"verb": sys.argv[1], "kind": probe.kind, "wrong": probe.wrong}
    sys.stdout.write(json.dumps(result) + "\n")
    return 1 if probe.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether programs can tell a view from its folder: runs inside a guest, as root, with the agent's package installed.

`python3 -m tests.xen.view_same AREA FIRST`, as view_probe.py's. (By hand: AREA 0, nothing is attached; -1, there is no
view, and the plain folder is seen twice, anywhere.) A folder with files of all kinds is seen twice, plainly (a
read-only bind mount) and through a view. Every item below is done on both, and what comes back is compared, field by
field, error by error. The items are what pjdfstest and the read-side tests of xfstests' generic group look at (Debian
12 has no package of either), and what docs/view.md promises. First without granted pages, then, with them attached to
`data`, what is read and mapped again.

DIFFERENCES are those that docs/view.md names. Any other is a fault; so is one of them that is not seen any more. Prints
one JSON object; exit code 1 if anything was wrong.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from .view_probe import PAGE, PAGES, READ, SEED, TAIL, WRITE, Mapping, Probe, content, drop_caches, in_child, libc

LOWER: Final = Path("/srv/same-lower")
PLAIN: Final = Path("/mnt/same-plain")
VIEW: Final = Path("/mnt/same-view")
SCRATCH: Final = Path("/srv/same-scratch")
USERS: Final = {"root": (0, 0), "owner": (1000, 1000), "member": (1001, 1000), "listed": (1002, 1002), "other": (3, 3)}
LONG: Final = "n" * 255
MANY: Final = 300
AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EACCESS: Final = 0x200
AT_EMPTY_PATH: Final = 0x1000
SYS_STATX, SYS_OPENAT2, SYS_RENAMEAT2 = 332, 437, 316
SYS_IO_SETUP, SYS_IO_SUBMIT, SYS_IO_GETEVENTS, SYS_IO_DESTROY = 206, 209, 208, 207

libc.fdopendir.restype = ctypes.c_void_p
libc.readdir64.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


@dataclass(frozen=True, slots=True)
class Difference:
    """A documented difference: names of items, what is seen plainly and through the view, and the sentence for it."""

    name: str
    plain: str
    view: str
    why: str
    only: str = ""
    """Seen only where the view's mappings are its own ("own") or the lower file's ("lower": in PV guests, and before
    Linux 5.11), with a kernel from before 5.11 ("old") or after it ("new"), or with granted pages ("attached")."""


DIFFERENCES: Final = (
    Difference(
        "(access|opening): .*", "'EACCES'", "'EROFS'", "writing is refused for the view before it is for the file"
    ),
    Difference("opening: .* 3", r"\[.*", "'EROFS'", "access mode 3, which neither reads nor writes, counts as writing"),
    Difference("resolving: CACHED relative", r"\d+", "'EAGAIN'", "RESOLVE_CACHED does not follow symbolic links"),
    Difference("reading: preadv2 .* 8", ".*", r"\['ENOTSUP', .*", "RWF_NOWAIT is not supported"),
    Difference("copying: copy_file_range .*", r"\d+", "'EXDEV'", "copy_file_range to a file outside"),
    Difference("copying: FICLONE .*", "'ENOTSUP'", "'EXDEV'", "reflinks to a file outside", "new"),
    Difference("mapping_kinds: .* rwx? sync", "'EACCES'", "'ENOTSUP'", "MAP_SYNC is refused before writing is"),
    Difference("mapping_calls: .* maps: device", "'ca:00'", "'00:.*'", "the device in /proc/PID/maps", "own"),
    Difference("mapping_calls: .* maps: name", "'ROOT/data'", f"'{LOWER}/data'", "the name in /proc/PID/maps", "lower"),
    Difference("mapping_calls: .* madvise DODUMP", "None", "'EINVAL'", "MADV_DODUMP", "own"),
    Difference("locks: lease .*", ".*", "('EINVAL'|2)", "there are no leases"),
    Difference("ioctls: (GETFLAGS|FSGETXATTR|GETVERSION|GETFSLABEL) .*", ".*", "'ENOTTY'", "ext4's own calls"),
    Difference("ioctls: SETFLAGS .*", "'EROFS'", "'ENOTTY'", "ext4's own calls, when they would write", "old"),
    Difference("ioctls: FI(BMAP|EMAP) .*", ".*", "'(EINVAL|ENOTSUP)'", "where a file is on the disk"),
    Difference("ioctls: name_to_handle_at .*", "0", "'ENOTSUP'", "there are no file handles"),
    Difference("busy: .*", "'ETXTBSY'", "(None|0)", "a program's file is not busy, and a file that is written is run"),
    Difference("changes: renamed: name", "'ROOT/live/c'", "'ROOT/live/b .deleted.'", "the name of an open file"),
    Difference("changes: a (moved|removed) folder: where", ".*", "'ROOT/live/sub'", "the name of a working folder"),
    Difference("meeting: fifo from below", "None", "'ENXIO'", "a fifo is not the one below"),
    Difference("meeting: socket", "None", "'ECONNREFUSED'", "a socket is not the one below"),
    Difference("direct: unaligned data .*", "'EINVAL'", r"\d+", "O_DIRECT needs no alignment", "attached"),
    Difference("watching: below", r"\['0x.*", r"\[\]", "inotify does not see what happens below"),
)


# ------------------------------------------------------------------------------------------------- how items are done


@dataclass(frozen=True, slots=True)
class Where:
    """One of the two ways to the folder."""

    root: Path
    lower: Path = LOWER

    def __truediv__(self, name: str) -> Path:
        return self.root / name


Item = Callable[[Where], Any]
ITEMS: Final[dict[str, Item]] = {}


def item(do: Item) -> Item:
    """Make a function an item: what it returns for the two ways is compared, each entry of dictionaries by itself."""
    ITEMS[do.__name__] = do
    return do


def told(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Return what a call returns, or the name of the error with which it fails."""
    try:
        return call(*arguments, **more)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "no error")


def system(name: str, *arguments: Any) -> int:
    """Call a function of the C library that returns -1 and sets errno when it fails."""
    done = int(getattr(libc, name)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)))
    if done == -1:
        raise OSError(ctypes.get_errno(), name)
    return done


def as_user(name: str, call: Callable[[], Any]) -> Any:
    """Do something as one of USERS in a child, and return what it returned (through JSON)."""
    uid, gid = USERS[name]
    inward, outward = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid:
                os.setgroups([])
                os.setgid(gid)
                os.setuid(uid)
            os.write(outward, json.dumps(call()).encode() + b"\n")
        except BaseException as error:
            os.write(outward, json.dumps(f"{type(error).__name__}: {error}").encode() + b"\n")
        os._exit(0)
    os.close(outward)
    with os.fdopen(inward, "rb") as answer:
        data = answer.read()
    os.waitpid(child, 0)
    return json.loads(data)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """An open file."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(path: Path, size: int, protection: int = READ, *, private: bool = False) -> Iterator[Mapping]:
    """A mapping of a file, whose descriptor is closed already."""
    with opened(path) as fd:
        mapping = Mapping(fd, size, protection, private=private)
    try:
        yield mapping
    finally:
        mapping.close()


def text_of(data: bytes) -> str:
    """Bytes, as short as they can be compared. Not SHA-256, which would take most of the time in an emulator."""
    return data.hex() if len(data) <= 32 else f"{len(data)} bytes {zlib.crc32(data):08x} {zlib.adler32(data):08x}"


def fields(seen: os.stat_result) -> dict[str, int]:
    """All of stat but the time of the last access, which readers change."""
    names = [name for name in dir(seen) if name.startswith("st_") and "atime" not in name]
    return {name: getattr(seen, name) for name in names}


# ------------------------------------------------------------------------------------------------- the folder


def acl(*entries: tuple[int, int, int]) -> bytes:
    """The kernel's form of an access control list: (tag, rights, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY: Final = 0xFFFFFFFF
MODES: Final = (
    0o000,
    0o001,
    0o004,
    0o040,
    0o044,
    0o070,
    0o111,
    0o400,
    0o444,
    0o500,
    0o600,
    0o644,
    0o755,
    0o777,
    0o7777,
)
SAMPLES: Final = (
    *words("data empty sparse text hard1 script mode000 mode400 mode044 mode111 mode600 mode644 suid listed"),
    *words("folder closed search sticky setgid relative absolute dangling loop chain40 chain41 longlink fifo socket"),
    *words("null missing folder/inner closed/inner search/inner text/ folder/ relative/ folder/. folder/.. text/."),
    *words("folder/inner/ linkdir linkdir/ linkdir/inner dangling/ missing/ missing/inner ."),
    *("", LONG, LONG + "n"),
)


def make(want: bytes) -> None:
    """Make the folder anew, with a file of each kind. `want`: what `data` holds."""
    shutil.rmtree(LOWER, ignore_errors=True)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    LOWER.mkdir()
    SCRATCH.mkdir(mode=0o777)
    SCRATCH.chmod(0o1777)
    (LOWER / "data").write_bytes(want)
    (LOWER / "empty").touch()
    (LOWER / "text").write_text("one line\nanother line\n")
    with open(LOWER / "sparse", "wb") as sparse:
        for at in (64 * PAGE, 200 * PAGE):
            sparse.seek(at)
            sparse.write(b"x" * 3 * PAGE)
        sparse.truncate(300 * PAGE + 17)
    (LOWER / "hard1").write_text("two names")
    os.link(LOWER / "hard1", LOWER / "hard2")
    (LOWER / "script").write_text('#!/bin/sh\necho "$# $1 $0"\n')
    (LOWER / "script").chmod(0o755)
    for mode in MODES:
        path = LOWER / f"mode{mode:03o}"
        path.write_text(f"{mode:o}")
        os.chown(path, 1000, 1000)
        path.chmod(mode)
    for name, source, mode in (
        ("true", "/bin/true", 0o755),
        ("unreadable", "/bin/true", 0o111),
        ("suid", "/usr/bin/id", 0o4755),
        ("sgid", "/usr/bin/id", 0o2755),
        ("capable", "/bin/cat", 0o755),
        ("busybox", "/bin/busybox", 0o755),
    ):
        shutil.copyfile(source, LOWER / name)
        (LOWER / name).chmod(mode)
    # cap_dac_read_search, effective and permitted: VFS_CAP_REVISION_2.
    os.setxattr(LOWER / "capable", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 2, 0, 0, 0))
    for name, mode in (("folder", 0o755), ("closed", 0o700), ("search", 0o711), ("sticky", 0o1777), ("setgid", 0o2775)):
        (LOWER / name).mkdir()
        (LOWER / name / "inner").write_text(name)
        os.chown(LOWER / name, 1000, 1000)
        (LOWER / name).chmod(mode)
    for name, target in (
        ("relative", "text"),
        ("absolute", "/etc/hostname"),
        ("dangling", "nowhere"),
        ("loop", "loop"),
        ("linkdir", "folder"),
        ("longlink", "/" * 4080 + "etc/hostname"),
        ("up", "../../../../../../etc/hostname"),
    ):
        os.symlink(target, LOWER / name)
    os.symlink("text", LOWER / "chain1")
    for number in range(2, 42):
        os.symlink(f"chain{number - 1}", LOWER / f"chain{number}")
    os.mkfifo(LOWER / "fifo")
    os.mknod(LOWER / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(LOWER / "socket"))
    (LOWER / LONG).write_text("long")
    many = LOWER / "many"
    many.mkdir()
    for number in range(MANY):
        (many / f"entry-{number}-{'x' * (number % 90)}").touch()
    deep = LOWER
    for _ in range(15):
        deep = deep / ("d" * 250)
        deep.mkdir()
    (deep / "bottom").write_text("deep")
    (LOWER / "listed").write_text("listed")
    (LOWER / "listed").chmod(0o640)
    rights = acl((1, 6, NOBODY), (2, 4, 1002), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY))
    os.setxattr(LOWER / "listed", "system.posix_acl_access", rights)
    os.setxattr(LOWER / "folder", "system.posix_acl_default", rights)
    for name in ("text", "folder"):
        os.setxattr(LOWER / name, "user.colour", b"green")
        os.setxattr(LOWER / name, "user.nothing", b"")
        os.setxattr(LOWER / name, "trusted.secret", b"for root")
    os.setxattr(LOWER / "text", "user.large", bytes(range(256)) * 8)
    os.utime(LOWER / "text", ns=(1, 1_234_567_890_123_456_789))
    os.sync()


# ------------------------------------------------------------------------------------------------- attributes


@item
def stat_fields(w: Where) -> Any:
    """stat, lstat, fstat, statx."""
    found: dict[str, Any] = {}
    for name in SAMPLES:
        for how, follow in (("stat", True), ("lstat", False)):
            seen = told(os.stat, f"{w.root}/{name}", follow_symlinks=follow)
            found[f"{how} {name[:40]}"] = seen if isinstance(seen, str) else fields(seen)
        found[f"statx {name[:40]}"] = told(statx, f"{w.root}/{name}", AT_SYMLINK_NOFOLLOW)
    for name in ("data", "empty", "folder", "."):
        with opened(w / name) as fd:
            found[f"fstat {name}"] = fields(os.fstat(fd))
            found[f"statx of fd {name}"] = told(statx, "", AT_EMPTY_PATH, fd)
    return found


def statx(path: str, flags: int, fd: int = AT_FDCWD) -> dict[str, Any]:
    """All that statx says, but the time of access and the mount's number."""
    buffer = ctypes.create_string_buffer(256)
    system("syscall", SYS_STATX, fd, path.encode(), flags, 0x2FFF, buffer)
    mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks, known = struct.unpack_from(
        "=IIQIIIH2xQQQQ", buffer, 0
    )
    born, changed, modified = (struct.unpack_from("=qI", buffer, at) for at in (0x50, 0x60, 0x70))
    devices = struct.unpack_from("=IIII", buffer, 0x80)
    align = struct.unpack_from("=II", buffer, 0x98)
    values = (mask, blksize, nlink, uid, gid, mode, ino, size, blocks, born, changed, modified, devices, align)
    return {"all": [str(value) for value in values], "attributes": attributes, "known": known}


@item
def access(w: Where) -> Any:
    """Faccessat by several users, real and effective."""

    def all_of_them() -> dict[str, Any]:
        found = {}
        for name in SAMPLES:
            for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.X_OK):
                path = f"{w.root}/{name}".encode()
                found[f"{name[:40]} {mode}"] = told(system, "faccessat", AT_FDCWD, path, mode, AT_EACCESS)
        return found

    return {user: as_user(user, all_of_them) for user in USERS}


@item
def modes(w: Where) -> Any:
    """Every set of rights, read and executed by several users."""

    def all_of_them() -> dict[str, Any]:
        found = {}
        for mode in MODES:
            path = w / f"mode{mode:03o}"
            found[f"{mode:o} read"] = told(lambda path=path: path.read_bytes().hex())
            found[f"{mode:o} execute"] = told(os.access, path, os.X_OK)
        for name in ("closed", "search", "sticky", "setgid"):
            found[f"{name} list"] = told(os.listdir, w / name)
            found[f"{name} enter"] = told(os.chdir, w / name)
            found[f"{name} inner"] = told(lambda name=name: (w / name / "inner").read_text())
        found["listed"] = told((w / "listed").read_text)
        return found

    return {user: as_user(user, all_of_them) for user in USERS}


XATTRS: Final = (
    *words("user.colour user.nothing user.large user.none trusted.secret security.capability security.selinux"),
    *words("system.posix_acl_access system.posix_acl_default system.none none user."),
    *("", "user." + "n" * 251),
)


@item
def xattrs(w: Where) -> Any:
    """Extended attributes and access control lists, of files, folders and links, by root and by others."""

    def all_of_them() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("text", "folder", "listed", "capable", "empty", "relative", "fifo", "mode000", "missing", "."):
            for follow in (True, False):
                path = w / name
                listed = told(os.listxattr, path, follow_symlinks=follow)
                found[f"list {name} {follow}"] = listed
                for key in XATTRS:
                    got = told(os.getxattr, path, key, follow_symlinks=follow)
                    found[f"get {name} {follow} {key[:40]}"] = got if isinstance(got, str) else text_of(got)
        text = str(w / "text").encode()
        for size in (0, 1, 5, 6):
            buffer = ctypes.create_string_buffer(8)
            found[f"get into {size}"] = told(system, "getxattr", text, b"user.colour", buffer, size)
            found[f"list into {size}"] = told(system, "listxattr", text, buffer, size)
        return found

    return {user: as_user(user, all_of_them) for user in ("root", "owner", "other")}


@item
def file_systems(w: Where) -> Any:
    """Statfs of several places; pathconf."""
    found: dict[str, Any] = {}
    for name in (".", "data", "folder/inner", "missing"):
        seen = told(os.statvfs, w / name)
        if not isinstance(seen, str):
            # Others write beside us: what is free changes, and is looked at by its order of size only.
            names = ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax", "f_flag", "f_fsid")
            seen = {key: getattr(seen, key) for key in names}
        found[name] = seen
    for key in ("PC_NAME_MAX", "PC_PATH_MAX", "PC_LINK_MAX", "PC_SYMLINK_MAX", "PC_FILESIZEBITS", "PC_2_SYMLINKS"):
        if key in os.pathconf_names:
            found[key] = told(os.pathconf, w / "text", key)
    return found


# ------------------------------------------------------------------------------------------------- names


OPEN_FLAGS: Final = {
    "RDONLY": os.O_RDONLY,
    "WRONLY": os.O_WRONLY,
    "RDWR": os.O_RDWR,
    "3": 3,
    "NOFOLLOW": os.O_NOFOLLOW,
    "DIRECTORY": os.O_DIRECTORY,
    "DIRECTORY|NOFOLLOW": os.O_DIRECTORY | os.O_NOFOLLOW,
    "PATH": os.O_PATH,
    "PATH|NOFOLLOW": os.O_PATH | os.O_NOFOLLOW,
    "TRUNC": os.O_TRUNC,
    "RDWR|TRUNC": os.O_RDWR | os.O_TRUNC,
    "NOATIME": os.O_NOATIME,
    "TMPFILE": os.O_TMPFILE | os.O_RDWR,
    "CREAT": os.O_CREAT | os.O_WRONLY,
    "CREAT|RDONLY": os.O_CREAT,
    "CREAT|EXCL": os.O_CREAT | os.O_EXCL | os.O_WRONLY,
    "CREAT|DIRECTORY": os.O_CREAT | os.O_DIRECTORY,
    "DIRECT": os.O_DIRECT,
    "SYNC": os.O_SYNC,
    "APPEND": os.O_APPEND,
    "APPEND|WRONLY": os.O_APPEND | os.O_WRONLY,
}


@item
def opening(w: Where) -> Any:
    """Open with every flag, of every kind of file, by several users."""

    def all_of_them() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in SAMPLES:
            for text, flags in OPEN_FLAGS.items():
                try:
                    fd = os.open(f"{w.root}/{name}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
                except OSError as error:
                    found[f"{name[:40]} {text}"] = errno.errorcode[error.errno or 0]
                    continue
                found[f"{name[:40]} {text}"] = [os.fstat(fd).st_ino, fcntl.fcntl(fd, fcntl.F_GETFL)]
                os.close(fd)
        return found

    return {user: as_user(user, all_of_them) for user in ("root", "owner", "other")}


@item
def opening_again(w: Where) -> Any:
    """Reopening through /proc, flags changed afterwards, what /proc says of an open file."""
    found: dict[str, Any] = {}
    for name in ("data", "folder", "relative", "chain40"):
        with opened(w / name) as fd:
            found[f"name {name}"] = os.readlink(f"/proc/self/fd/{fd}").replace(str(w.root), "ROOT")
            for text in ("RDONLY", "RDWR", "PATH", "TRUNC", "DIRECT"):
                again = told(os.open, f"/proc/self/fd/{fd}", OPEN_FLAGS[text])
                if isinstance(again, int):
                    os.close(again)
                    again = "opened"
                found[f"again {name} {text}"] = again
            for text, flags in (("DIRECT", os.O_DIRECT), ("NOATIME", os.O_NOATIME), ("APPEND", os.O_APPEND)):
                found[f"set {name} {text}"] = told(fcntl.fcntl, fd, fcntl.F_SETFL, flags)
                found[f"got {name} {text}"] = fcntl.fcntl(fd, fcntl.F_GETFL)
    with opened(w / "data", os.O_PATH) as fd:
        found["read of a path"] = told(os.read, fd, 1)
        found["fstat of a path"] = os.fstat(fd).st_ino
        found["a path is opened"] = text_of(Path(f"/proc/self/fd/{fd}").read_bytes()[:16])
    return found


@item
def links(w: Where) -> Any:
    """Symbolic links: short, long, dangling, in a ring, too many."""
    found: dict[str, Any] = {}
    for name in ("relative", "absolute", "dangling", "loop", "longlink", "up", "chain1", "chain41", "text", "missing"):
        target = told(os.readlink, w / name)
        found[f"read {name}"] = text_of(target.encode())
        buffer = ctypes.create_string_buffer(4)
        found[f"into 3 {name}"] = told(system, "readlink", str(w / name).encode(), buffer, 3), buffer.value.decode()
        found[f"real {name}"] = told(os.path.realpath, w / name).replace(str(w.root), "ROOT")[:200]
    for number in (1, 20, 39, 40, 41):
        found[f"chain {number}"] = told((w / f"chain{number}").read_text)
    found["owner"] = os.lstat(w / "relative").st_uid
    return found


@item
def long_names(w: Where) -> Any:
    """Names of 255 and 256 bytes, paths around PATH_MAX, folders deeper than that."""
    found: dict[str, Any] = {}
    for length in (254, 255, 256, 1000):
        found[f"name {length}"] = told(os.stat, w / ("n" * length))
        if not isinstance(found[f"name {length}"], str):
            found[f"name {length}"] = "found"
    pad = 4096 - len(f"{w.root}//text") - 1
    for more in (-1, 0, 1):
        path = f"{w.root}/" + "/" * (pad + more) + "/text"
        seen = told(os.stat, path)
        found[f"path {len(path)}"] = seen if isinstance(seen, str) else "found"
    back = os.open(".", os.O_RDONLY)
    try:
        os.chdir(w.root)
        for _ in range(15):
            os.chdir("d" * 250)
        found["bottom"] = Path("bottom").read_text()
        found["where"] = os.getcwd().replace(str(w.root), "ROOT")
        os.chdir("..")
        found["up"] = os.listdir(".")
    finally:
        os.fchdir(back)
        os.close(back)
    return found


def openat2(path: str, resolve: int, fd: int, flags: int = 0) -> Any:
    """Open with limits to how a path is walked; the number of what was opened."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    opened_fd = system("syscall", SYS_OPENAT2, fd, path.encode(), how, len(how))
    number = os.fstat(opened_fd).st_ino
    os.close(opened_fd)
    return number


@item
def resolving(w: Where) -> Any:
    """openat2 with each RESOLVE flag."""
    found: dict[str, Any] = {}
    kinds = {"NO_XDEV": 1, "NO_MAGICLINKS": 2, "NO_SYMLINKS": 4, "BENEATH": 8, "IN_ROOT": 16, "CACHED": 32, "wrong": 64}
    with opened(w.root) as fd, opened(w / "folder") as folder:
        for text, resolve in kinds.items():
            for path in ("text", "relative", "absolute", "up", "folder/inner", "folder/../text", "..", "/etc", "loop"):
                if text != "CACHED" or path in ("text", "relative", "folder/inner"):
                    told(os.stat, w / path)
                    seen = told(openat2, path, resolve, fd)
                    found[f"{text} {path}"] = "opened" if path in ("..", "/etc") and isinstance(seen, int) else seen
            found[f"{text} ../text"] = told(openat2, "../text", resolve, folder)
        found["wrong flags"] = told(openat2, "text", 0, fd, 1 << 40)
    return found


@item
def folders(w: Where) -> Any:
    """readdir: order, kinds, telldir and seekdir, two at a time, small buffers, offsets."""
    found: dict[str, Any] = {}
    for name in (".", "many", "folder", "closed"):
        found[f"order {name}"] = os.listdir(w / name)
        found[f"kinds {name}"] = sorted(
            (e.name, e.is_dir(follow_symlinks=False), e.is_symlink(), e.inode()) for e in os.scandir(w / name)
        )
    found["walk"] = sorted(f"{Path(top).relative_to(w.root)} {sorted(names)}" for top, _, names in os.walk(w.root))
    for name in ("data", "missing", "relative"):
        found[f"list {name}"] = told(os.listdir, w / name)
    with opened(w / "many") as fd:
        stream = ctypes.c_void_p(libc.fdopendir(os.dup(fd)))

        def names(count: int) -> list[str]:
            listed = []
            for _ in range(count):
                entry = libc.readdir64(stream)
                if not entry:
                    break
                listed.append(ctypes.string_at(entry + 19).decode())
            return listed

        found["first"] = names(100)
        place = libc.telldir(stream)
        after = names(50)
        libc.seekdir(stream, ctypes.c_long(place))
        found["again after seekdir"] = names(50) == after
        libc.rewinddir(stream)
        found["again after rewinddir"] = names(100) == found["first"]
        found["all"] = len(names(10_000))
        libc.closedir(stream)
        for where, whence in ((0, 0), (-1, 0), (0, 2), (0, 1), (1 << 62, 0)):
            found[f"lseek {where} {whence}"] = told(os.lseek, fd, where, whence)
        os.lseek(fd, 0, 0)
        buffer = ctypes.create_string_buffer(4096)
        for size in (0, 10, 24, 4096):
            found[f"getdents {size}"] = told(system, "getdents64", fd, buffer, size)
        found["read"] = told(os.read, fd, 10)
        found["pread"] = told(os.pread, fd, 10, 0)
    return found


# ------------------------------------------------------------------------------------------------- what is refused


@item
def writing(w: Where) -> Any:
    """Everything that would change something."""
    r = w.root
    found: dict[str, Any] = {}
    out = SCRATCH / "out"
    out.write_text("x")

    def tries(user: str) -> dict[str, Any]:
        calls: dict[str, Callable[[], Any]] = {
            "unlink": lambda: os.unlink(r / "text"),
            "unlink missing": lambda: os.unlink(r / "missing"),
            "unlink folder": lambda: os.unlink(r / "folder"),
            "rmdir": lambda: os.rmdir(r / "folder"),
            "rmdir file": lambda: os.rmdir(r / "text"),
            "rmdir missing": lambda: os.rmdir(r / "missing"),
            "mkdir": lambda: os.mkdir(r / "new"),
            "mkdir exists": lambda: os.mkdir(r / "folder"),
            "rename": lambda: os.rename(r / "text", r / "new"),
            "rename over": lambda: os.rename(r / "text", r / "empty"),
            "rename missing": lambda: os.rename(r / "missing", r / "new"),
            "rename out": lambda: os.rename(r / "text", SCRATCH / "new"),
            "rename in": lambda: os.rename(out, r / "new"),
            "exchange": lambda: system(
                "syscall", SYS_RENAMEAT2, AT_FDCWD, str(r / "text").encode(), AT_FDCWD, str(r / "empty").encode(), 2
            ),
            "link": lambda: os.link(r / "text", r / "new"),
            "link out": lambda: os.link(r / "text", SCRATCH / "new"),
            "link in": lambda: os.link(out, r / "new"),
            "link exists": lambda: os.link(r / "text", r / "empty"),
            "symlink": lambda: os.symlink("text", r / "new"),
            "symlink exists": lambda: os.symlink("text", r / "empty"),
            "mkfifo": lambda: os.mkfifo(r / "new"),
            "mknod": lambda: os.mknod(r / "new", stat.S_IFREG | 0o600),
            "mknod device": lambda: os.mknod(r / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
            "chmod": lambda: os.chmod(r / "text", 0o600),
            "chmod missing": lambda: os.chmod(r / "missing", 0o600),
            "chown": lambda: os.chown(r / "text", 5, 5),
            "lchown": lambda: os.lchown(r / "relative", 5, 5),
            "utime": lambda: os.utime(r / "text"),
            "utime link": lambda: os.utime(r / "relative", follow_symlinks=False),
            "utime set": lambda: os.utime(r / "text", (5, 5)),
            "truncate": lambda: os.truncate(r / "text", 0),
            "truncate longer": lambda: os.truncate(r / "text", 1 << 20),
            "truncate folder": lambda: os.truncate(r / "folder", 0),
            "truncate negative": lambda: os.truncate(r / "text", -1),
            "setxattr": lambda: os.setxattr(r / "text", "user.new", b"x"),
            "setxattr trusted": lambda: os.setxattr(r / "text", "trusted.new", b"x"),
            "setxattr acl": lambda: os.setxattr(r / "listed", "system.posix_acl_access", acl((1, 7, NOBODY))),
            "removexattr": lambda: os.removexattr(r / "text", "user.colour"),
            "creat": lambda: os.open(r / "new", os.O_CREAT | os.O_TRUNC | os.O_WRONLY),
            "swapon": lambda: system("swapon", str(r / "data").encode(), 0),
        }
        tried = {f"{user} {name}": told(call) for name, call in calls.items()}

        def bind() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                os.chdir(r)
                sock.bind("new")

        tried[f"{user} bind"] = told(bind)
        with opened(r / "text") as fd:
            for name, call in {
                "write": lambda: os.write(fd, b"x"),
                "pwrite": lambda: os.pwrite(fd, b"x", 0),
                "ftruncate": lambda: os.ftruncate(fd, 0),
                "fallocate": lambda: os.posix_fallocate(fd, 0, 10),
                "fchmod": lambda: os.fchmod(fd, 0o600),
                "fchown": lambda: os.fchown(fd, 5, 5),
                "futimens": lambda: os.utime(fd),
                "fsetxattr": lambda: os.setxattr(fd, "user.new", b"x"),
                "fremovexattr": lambda: os.removexattr(fd, "user.colour"),
                "sendfile into": lambda: os.sendfile(fd, fd, 0, 10),
                "fsync": lambda: os.fsync(fd),
                "fdatasync": lambda: os.fdatasync(fd),
                "syncfs": lambda: system("syncfs", fd),
                "sync_file_range": lambda: system("sync_file_range", fd, 0, 0, 7),
            }.items():
                tried[f"{user} {name}"] = told(call)
        return tried

    for user in ("root", "owner"):
        found |= as_user(user, partial(tries, user))
    found["untouched"] = [(w.lower / "text").read_text(), sorted(os.listdir(w.lower)) == sorted(os.listdir(w.root))]
    return found


# ------------------------------------------------------------------------------------------------- reading


@item
def reading(w: Where) -> Any:
    """read, pread, readv, preadv2, at and around the end and holes; SEEK_DATA and SEEK_HOLE."""
    found: dict[str, Any] = {}
    for name in ("data", "empty", "sparse", "text", LONG, "hard2"):
        size = os.stat(w / name).st_size
        with opened(w / name) as fd:
            whole = b""
            while part := os.read(fd, 77_777):
                whole += part
            found[f"all {name[:9]}"] = text_of(whole)
            for at in (0, 1, PAGE - 1, PAGE, 99 * PAGE + 7, 63 * PAGE, size - 1, size, size + 1, size + (1 << 30), -1):
                for count in (0, 1, PAGE, 3 * PAGE + 5):
                    got = told(os.pread, fd, count, at)
                    found[f"pread {name[:9]} {at} {count}"] = got if isinstance(got, str) else text_of(got)
            for flags in (0, os.RWF_HIPRI, os.RWF_NOWAIT, 0x4000):
                buffers = [bytearray(10), bytearray(PAGE), bytearray(5)]
                count = told(os.preadv, fd, buffers, 3, flags)
                found[f"preadv2 {name[:9]} {flags}"] = [count, text_of(b"".join(map(bytes, buffers)))]
            found[f"readv -1 {name[:9]}"] = told(os.preadv, fd, [bytearray(4)], -2)
            for where in (0, 1, 64 * PAGE, 65 * PAGE, 67 * PAGE, 199 * PAGE, size - 1, size, size + 1, -1, 1 << 62):
                for text, whence in (("SET", 0), ("END", 2), ("DATA", os.SEEK_DATA), ("HOLE", os.SEEK_HOLE), ("5", 5)):
                    found[f"lseek {text} {name[:9]} {where}"] = told(os.lseek, fd, where, whence)
            os.lseek(fd, 5, 0)
            twin = os.dup(fd)
            os.lseek(twin, 2, 1)
            found[f"shared offset {name[:9]}"] = os.lseek(fd, 0, 1)
            os.close(twin)
            nowhere = told(system, "pread64", fd, ctypes.c_void_p(16), 10, 0)
            found[f"into nowhere {name[:9]}"] = nowhere
            half = bytearray(PAGE)
            found[f"one byte {name[:9]}"] = os.preadv(fd, [half], 0), text_of(bytes(half))
    return found


@item
def direct(w: Where) -> Any:
    """O_DIRECT: aligned, not aligned, over the end."""
    found: dict[str, Any] = {}
    for name in ("data", "sparse", "empty", "text"):
        size = os.stat(w / name).st_size
        with opened(w / name, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 64 * PAGE) as buffer:
            for at, count in ((0, PAGE), (0, 64 * PAGE), (98 * PAGE, 16 * PAGE), (size // PAGE * PAGE, PAGE), (0, 512)):
                got = told(os.preadv, fd, [memoryview(buffer)[:count]], at)
                found[f"{name} {at} {count}"] = [got, text_of(buffer[: got if isinstance(got, int) else 0])]
            for at, start, count in ((1, 0, PAGE), (0, 1, PAGE), (0, 0, 100), (0, 0, PAGE + 1)):
                got = told(os.preadv, fd, [memoryview(buffer)[start : start + count]], at)
                found[f"unaligned {name} {at} {start} {count}"] = got
    return found


@item
def at_random(w: Where) -> Any:
    """As fsx does, but that nothing is written: reads and mappings at random places."""
    chance = random.Random(5)
    total = 0
    size = os.stat(w / "data").st_size
    with opened(w / "data") as fd, mapped(w / "data", size) as mapping:
        for _ in range(600):
            at, count = chance.randrange(size), chance.choice((1, 100, PAGE, 5000, 70_000))
            match chance.randrange(4):
                case 0:
                    total = zlib.crc32(os.pread(fd, count, at), total)
                case 1:
                    total = zlib.crc32(ctypes.string_at(mapping.address + at, min(count, size - at)), total)
                case 2:
                    os.lseek(fd, at, 0)
                    total = zlib.crc32(os.read(fd, count), total)
                case _:
                    first = at // PAGE
                    with opened(w / "data") as other:
                        part = libc.mmap(None, PAGE, READ, mmap.MAP_PRIVATE, other, first * PAGE)
                    total = zlib.crc32(ctypes.string_at(part, min(PAGE, size - first * PAGE)), total)
                    libc.munmap(ctypes.c_void_p(part), ctypes.c_size_t(PAGE))
    return total


@item
def copying(w: Where) -> Any:
    """sendfile, splice, tee, copy_file_range, reflinks, and what cp makes of a file."""
    found: dict[str, Any] = {}
    for name in ("data", "sparse", "empty", "text"):
        size = os.stat(w / name).st_size
        with opened(w / name) as fd, open(SCRATCH / "copy", "w+b", buffering=0) as copy:
            while os.sendfile(copy.fileno(), fd, None, 1 << 20):
                pass
            found[f"sendfile {name}"] = text_of((SCRATCH / "copy").read_bytes())
            found[f"sendfile past the end {name}"] = told(os.sendfile, copy.fileno(), fd, size + 5, 10)
            copy.truncate(0)
            copy.seek(0)
            found[f"copy_file_range {name}"] = told(os.copy_file_range, fd, copy.fileno(), 5 * PAGE, 0)
            found[f"FICLONE {name}"] = told(fcntl.ioctl, copy.fileno(), 0x40049409, fd)
            one, other = socket.socketpair()
            sent = os.sendfile(one.fileno(), fd, 0, 3 * PAGE)
            one.close()
            received = b""
            while part := other.recv(1 << 16):
                received += part
            other.close()
            found[f"to a socket {name}"] = sent, text_of(received)
            inward, outward = os.pipe()
            spliced = told(os.splice, fd, outward, 3 * PAGE, 7)
            found[f"splice {name}"] = spliced
            if spliced:
                second_in, second_out = os.pipe()
                found[f"tee {name}"] = told(system, "tee", inward, second_out, 100, 0)
                found[f"tee'd {name}"] = text_of(os.read(second_in, 100))
                found[f"spliced {name}"] = text_of(os.read(inward, 3 * PAGE))
                os.close(second_in)
                os.close(second_out)
            os.close(inward)
            os.close(outward)
        for words in (
            ("cp", "--sparse=auto"),
            ("cp", "--reflink=auto"),
            ("cp", "-a"),
            ("dd", "bs=64k", "iflag=direct"),
        ):
            target = SCRATCH / "copied"
            target.unlink(missing_ok=True)
            ends = [f"if={w / name}", f"of={target}"] if words[0] == "dd" else [str(w / name), str(target)]
            done = subprocess.run([*words, *ends], capture_output=True)
            found[f"{' '.join(words)} {name}"] = [done.returncode, text_of(target.read_bytes())]
    return found


@item
def asynchronous(w: Where) -> Any:
    """Linux AIO (what databases and nginx use), buffered and direct."""
    found: dict[str, Any] = {}
    for text, flags in (("buffered", 0), ("direct", os.O_DIRECT)):
        with opened(w / "data", flags) as fd, mmap.mmap(-1, 4 * PAGE) as buffer:
            context = ctypes.c_ulong(0)
            system("syscall", SYS_IO_SETUP, 4, ctypes.byref(context))
            address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            block = ctypes.create_string_buffer(
                struct.pack("=QIIHhIQQqQII", 1, 0, 0, 0, 0, fd, address, 4 * PAGE, 98 * PAGE, 0, 0, 0)
            )
            pointer = ctypes.c_void_p(ctypes.addressof(block))
            found[f"{text} submit"] = told(system, "syscall", SYS_IO_SUBMIT, context.value, 1, ctypes.byref(pointer))
            event = ctypes.create_string_buffer(32)
            found[f"{text} events"] = told(system, "syscall", SYS_IO_GETEVENTS, context.value, 1, 1, event, None)
            found[f"{text} result"] = struct.unpack_from("=q", event, 16)[0]
            found[f"{text} bytes"] = text_of(ctypes.string_at(address, 4 * PAGE))
            system("syscall", SYS_IO_DESTROY, context.value)
            ctypes.memset(address, 0, 1)
    return found


# ------------------------------------------------------------------------------------------------- mapping


@item
def mapping_kinds(w: Where) -> Any:
    """Mmap with every protection and kind; beyond the end; empty files; folders."""
    found: dict[str, Any] = {}
    exe = mmap.PROT_EXEC
    for name in ("data", "empty", "text", "folder", "sparse"):
        with opened(w / name) as fd:
            for text, protection in (("r", READ), ("rw", READ | WRITE), ("rx", READ | exe), ("rwx", 7), ("none", 0)):
                for kind, flags in (
                    *(("shared", 1), ("private", 2), ("validate", 3), ("sync", 3 | 0x80000), ("neither", 0)),
                    *(("populate", 2 | 0x8000), ("locked", 2 | 0x2000), ("huge", 2 | 0x40000)),
                ):
                    address = libc.mmap(None, 4 * PAGE, protection, flags, fd, 0)
                    good = address not in (None, ctypes.c_void_p(-1).value)
                    found[f"{name} {text} {kind}"] = "mapped" if good else errno.errorcode[ctypes.get_errno()]
                    if good:
                        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE))
            for at in (1, PAGE, 1 << 40, -PAGE):
                address = libc.mmap(None, PAGE, READ, 1, fd, at)
                good = address not in (None, ctypes.c_void_p(-1).value)
                found[f"{name} at {at}"] = "mapped" if good else errno.errorcode[ctypes.get_errno()]
                if good:
                    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(PAGE))
            found[f"{name} of no size"] = told(Mapping, fd, 0)
    with opened(w / "data", os.O_PATH) as fd:
        found["of a path"] = told(Mapping, fd, PAGE)
    for name, pages in (("data", PAGES), ("empty", 0), ("text", 1), ("sparse", 301)):
        for page in {0, pages - 1, pages, pages + 3} - {-1}:

            def touch(name: str = name, pages: int = pages, page: int = page) -> None:
                with mapped(w / name, (pages + 5) * PAGE) as mapping:
                    mapping.bytes(page, 1)

            found[f"touch {name} {page}"] = in_child(touch)
        if pages:
            with mapped(w / name, pages * PAGE) as mapping:
                found[f"last page {name}"] = text_of(mapping.bytes(pages - 1, 1))
    return found


ADVICE: Final = {
    name: int(number)
    for name, _, number in (
        text.partition("=")
        for text in words(
            "NORMAL=0 RANDOM=1 SEQUENTIAL=2 WILLNEED=3 DONTNEED=4 FREE=8 REMOVE=9 DONTFORK=10 DOFORK=11 MERGEABLE=12 "
            "UNMERGEABLE=13 HUGEPAGE=14 NOHUGEPAGE=15 DONTDUMP=16 DODUMP=17 WIPEONFORK=18 KEEPONFORK=19 COLD=20 "
            "PAGEOUT=21 POPULATE_READ=22 POPULATE_WRITE=23 COLLAPSE=25 wrong=77"
        )
    )
}


@item
def mapping_calls(w: Where) -> Any:
    """What can be done with a mapping: msync, mincore, madvise, mlock, mremap, mprotect, core files, /proc."""
    found: dict[str, Any] = {}
    size = PAGES * PAGE
    for private in (False, True):
        which = "private" if private else "shared"
        with mapped(w / "data", size, private=private) as mapping:
            address = ctypes.c_void_p(mapping.address)
            found[f"{which} bytes"] = text_of(mapping.bytes())
            for text, advice in ADVICE.items():
                found[f"{which} madvise {text}"] = told(mapping.advise, advice)
                found[f"{which} bytes after {text}"] = text_of(mapping.bytes(90, 40))
            for flags in (0, 1, 2, 4, 5, 8):
                found[f"{which} msync {flags}"] = told(system, "msync", address, size, flags)
            vector = (ctypes.c_ubyte * PAGES)()
            found[f"{which} mincore"] = told(system, "mincore", address, size, vector), sum(b & 1 for b in vector)
            found[f"{which} mincore nowhere"] = told(system, "mincore", ctypes.c_void_p(1 << 46), size, vector)
            for name in ("mlock", "munlock"):
                found[f"{which} {name}"] = told(system, name, address, size)
            found[f"{which} mlock2"] = told(system, "mlock2", address, size, 1)
            found[f"{which} munlock again"] = told(system, "munlock", address, size)
            found[f"{which} remap_file_pages"] = told(system, "remap_file_pages", address, PAGE, 0, 5, 0)
            found[f"{which} remapped"] = text_of(mapping.bytes())
            for protection in (0, READ, READ | WRITE, 7, READ | mmap.PROT_EXEC, READ, 64):
                found[f"{which} mprotect {protection}"] = told(mapping.protect, protection)
            told(mapping.protect, READ)
            found[f"{which} bytes in the end"] = text_of(mapping.bytes())
            with open("/proc/self/mem", "rb", buffering=0) as memory:
                found[f"{which} /proc/self/mem"] = text_of(os.pread(memory.fileno(), 3 * PAGE, mapping.address + 7))
            store = in_child(lambda mapping=mapping: ctypes.memset(mapping.address, 0, 1))  # type: ignore[misc]
            found[f"{which} store"] = store
            line = next(
                text for text in Path("/proc/self/maps").read_text().splitlines() if f"{mapping.address:x}-" in text
            )
            words = line.split()
            found[f"{which} maps: rights"] = words[1]
            found[f"{which} maps: device"] = words[3]
            found[f"{which} maps: number"] = words[4]
            found[f"{which} maps: name"] = words[5].replace(str(w.root), "ROOT")
    with mapped(w / "data", size, READ | WRITE, private=True) as mapping:
        ctypes.memset(mapping.address + 5 * PAGE, 0x55, 3)
        found["private store"] = text_of(mapping.bytes(5, 1))
        found["private store fork"] = in_child(lambda: ctypes.memset(mapping.address + 6 * PAGE, 1, 1))
        found["private after child"] = text_of(mapping.bytes(6, 1))
        mapping.advise(4)
        found["private store given up"] = text_of(mapping.bytes(5, 1))
    return found


# ------------------------------------------------------------------------------------------------- locks, advice, ioctl


@item
def locks(w: Where) -> Any:
    """flock, POSIX and OFD locks between two opens, leases, and other fcntl calls."""
    found: dict[str, Any] = {}
    one, two = os.open(w / "text", os.O_RDONLY), os.open(w / "text", os.O_RDONLY)
    for first, second in ((1, 1), (1, 2), (2, 1), (2, 2)):
        found[f"flock {first} {second}"] = told(fcntl.flock, one, first | 4), told(fcntl.flock, two, second | 4)
        fcntl.flock(one, 8)
        fcntl.flock(two, 8)
    for text, command, ask in (("POSIX", 6, 5), ("OFD", 37, 36)):
        for kind in (0, 1):
            lock = struct.pack("hhqqi4x", kind, 0, 3, 10, 0)
            found[f"{text} lock {kind}"] = told(lambda c=command, x=lock: bool(fcntl.fcntl(one, c, x)))
            asked = told(
                lambda c=ask: struct.unpack("hhqqi4x", fcntl.fcntl(two, c, struct.pack("hhqqi4x", 1, 0, 0, 0, 0)))
            )
            found[f"{text} asked {kind}"] = asked if isinstance(asked, str) else asked[:4]
            told(fcntl.fcntl, one, command, struct.pack("hhqqi4x", 2, 0, 0, 0, 0))
    for text, kind in (("read", fcntl.F_RDLCK), ("write", fcntl.F_WRLCK), ("none", fcntl.F_UNLCK)):
        found[f"lease {text}"] = told(fcntl.fcntl, one, fcntl.F_SETLEASE, kind)
        found[f"lease is {text}"] = told(fcntl.fcntl, one, fcntl.F_GETLEASE)
    for text, command, value in (
        *(("GET_SEALS", 1034, 0), ("ADD_SEALS", 1033, 1), ("GETPIPE_SZ", 1032, 0), ("GETOWN", 9, 0), ("GETSIG", 11, 0)),
        *(("NOTIFY", 1026, 0), ("GETFD", 1, 0), ("wrong", 999, 0)),
    ):
        found[text] = told(fcntl.fcntl, one, command, value)
    found["GET_RW_HINT"] = told(lambda: fcntl.fcntl(one, 1035, bytes(8)).hex())
    os.close(one)
    os.close(two)
    return found


@item
def advice(w: Where) -> Any:
    """posix_fadvise and readahead; poll and epoll."""
    found: dict[str, Any] = {}
    for name in ("data", "empty", "folder", "sparse"):
        with opened(w / name) as fd:
            for number in range(8):
                found[f"fadvise {name} {number}"] = told(os.posix_fadvise, fd, 0, 0, number)
            found[f"fadvise {name} negative"] = told(os.posix_fadvise, fd, 0, -1, 0)
            found[f"readahead {name}"] = told(system, "readahead", fd, 0, 64 * PAGE)
            poll = select.poll()
            poll.register(fd, 0xFFF)
            found[f"poll {name}"] = [events for _, events in poll.poll(0)]
            with select.epoll() as epoll:
                found[f"epoll {name}"] = told(epoll.register, fd)
            if name != "folder":
                found[f"read after {name}"] = text_of(os.pread(fd, 1 << 22, 0))
    return found


@item
def ioctls(w: Where) -> Any:
    """The ioctls that programs try on any file, and some that no file has."""
    found: dict[str, Any] = {}
    for name in ("data", "empty", "folder", "sparse"):
        with opened(w / name) as fd:
            for text, number, size in (
                *(("FIONREAD", 0x541B, 4), ("FIGETBSZ", 2, 4), ("FIBMAP", 1, 4), ("TCGETS", 0x5401, 64)),
                *(("GETFLAGS", 0x80086601, 8), ("FSGETXATTR", 0x801C581F, 28), ("GETVERSION", 0x80087601, 8)),
                *(("FIOQSIZE", 0x5460, 8), ("BLKGETSIZE64", 0x80081272, 8), ("GETFSLABEL", 0x81009431, 256)),
                *(("TIOCGWINSZ", 0x5413, 8), ("wrong", 0xDEAD, 8), ("SETFLAGS", 0x40086602, 8)),
            ):
                got = told(fcntl.ioctl, fd, number, bytes(size))
                found[f"{text} {name}"] = got if isinstance(got, str) else got.hex()
            found[f"FIEMAP {name}"] = told(extents, fd)
            found[f"FIONBIO {name}"] = told(lambda fd=fd: fcntl.ioctl(fd, 0x5421, struct.pack("i", 1)).hex())
            handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
            mount = ctypes.c_int(0)
            done = told(system, "name_to_handle_at", AT_FDCWD, str(w / name).encode(), handle, ctypes.byref(mount), 0)
            found[f"name_to_handle_at {name}"] = done
    return found


def extents(fd: int) -> list[Any]:
    """The extents of a file."""
    request = bytearray(struct.pack("=QQIIII", 0, (1 << 64) - 1, 1, 0, 8, 0) + bytes(8 * 56))
    fcntl.ioctl(fd, 0xC020660B, request, True)
    count = struct.unpack_from("=I", request, 20)[0]
    return [struct.unpack_from("=QQQ16xI", request, 32 + 56 * number) for number in range(count)]


# ------------------------------------------------------------------------------------------------- executing


@item
def executing(w: Where) -> Any:
    """Programs and scripts: by path and descriptor, with set-id bits and capabilities, unreadable, in a chroot."""
    found: dict[str, Any] = {}

    def done(*words: Any, user: str = "root", **more: Any) -> list[Any]:
        uid, gid = USERS[user]
        try:
            run = subprocess.run(
                [str(word) for word in words],
                user=uid,
                group=gid,
                extra_groups=[],
                capture_output=True,
                text=True,
                **more,
            )
        except OSError as error:
            return [errno.errorcode[error.errno or 0]]
        said = (run.stdout + run.stderr).replace(str(w.root), "ROOT")
        return [run.returncode, said]

    found["script"] = done(w / "script", "a", "b")
    found["script by sh"] = done("/bin/sh", w / "script")
    found["relative script"] = done("./script", cwd=w.root)
    for user in ("root", "other"):
        found[f"program {user}"] = done(w / "true", user=user)
        found[f"unreadable {user}"] = done(w / "unreadable", user=user)
        found[f"text {user}"] = done(w / "text", user=user)
        found[f"folder {user}"] = done(w / "folder", user=user)
        found[f"set-uid {user}"] = done(w / "suid", "-u", user=user)
        found[f"set-gid {user}"] = done(w / "sgid", "-g", user=user)
        said = done(w / "capable", "/proc/self/status", user=user)[1]
        found[f"capabilities {user}"] = [line for line in said.splitlines() if line.startswith("CapEff")]
    found["own name"] = done(w / "busybox", "readlink", "/proc/self/exe")
    found["in a chroot"] = done("/usr/sbin/chroot", w.root, "/busybox", "cat", "/folder/inner")
    with opened(w / "busybox") as fd:
        found["by descriptor"] = done(f"/proc/self/fd/{fd}", "--help", pass_fds=[fd])[0]
        found["execveat"] = in_child(lambda: os.execve(fd, ["true"], {}))
    mount = str(w.root)
    for option, back in (("nosuid", "suid"), ("noexec", "exec")):
        subprocess.run(["mount", "-o", f"remount,bind,ro,nodev,{option}", mount], check=True)
        try:
            found[f"{option}: set-uid"] = done(w / "suid", "-u", user="other")
            found[f"{option}: script"] = done(w / "script")
            found[f"{option}: mapping"] = told(lambda: mapped_once(w / "true", READ | mmap.PROT_EXEC))
            found[f"{option}: sh"] = done("/bin/sh", w / "script")
        finally:
            subprocess.run(["mount", "-o", f"remount,bind,ro,nodev,{back}", mount], check=True)
    return found


def mapped_once(path: Path, protection: int) -> str:
    """Map and unmap."""
    with mapped(path, PAGE, protection):
        return "mapped"


@item
def busy(w: Where) -> Any:
    """ETXTBSY: writing to a running program, running a file that is open for writing."""
    path = w.lower / "busy-program"
    shutil.copyfile("/bin/sleep", path)
    path.chmod(0o755)
    run = subprocess.Popen([str(w / "busy-program"), "30"])
    found: dict[str, Any] = {"a running program is written": told(lambda: os.close(os.open(path, os.O_WRONLY)))}
    found["it runs"] = run.poll()
    run.kill()
    run.wait()
    with opened(path, os.O_WRONLY):
        found["an open file is run"] = told(lambda: subprocess.run([str(w / "busy-program"), "0"]).returncode)
    path.unlink()
    return found


# ------------------------------------------------------------------------------------------------- changes below


@item
def changes(w: Where) -> Any:
    """The folder changes below, and is looked at at once: names, contents, rights, links, what is open."""
    found: dict[str, Any] = {}
    low, top = w.lower / "live", w.root / "live"
    low.mkdir()

    def names() -> list[str]:
        return sorted(os.listdir(top))

    found["no name"] = told(os.stat, top / "a")
    (low / "a").write_text("first")
    found["a new file"] = (top / "a").read_text(), names()
    fd, folder = os.open(top / "a", os.O_RDONLY), os.open(top, os.O_RDONLY)
    with open(low / "a", "a") as more:
        more.write(" and more")
    found["appended"] = os.pread(fd, 100, 0).decode(), os.stat(top / "a").st_size, os.fstat(fd).st_size
    os.truncate(low / "a", 3)
    found["truncated"] = os.pread(fd, 100, 0).decode(), os.fstat(fd).st_size, os.lseek(fd, 0, 2)
    (low / "new").write_text("second")
    os.rename(low / "new", low / "a")
    found["replaced"] = (top / "a").read_text(), os.pread(fd, 100, 0).decode(), names()
    found["replaced: links"] = os.fstat(fd).st_nlink, os.stat(top / "a").st_nlink
    found["replaced: name"] = os.readlink(f"/proc/self/fd/{fd}").replace(str(w.root), "ROOT")
    os.close(fd)
    os.link(low / "a", low / "b")
    found["linked"] = os.stat(top / "a").st_nlink, os.stat(top / "b").st_ino == os.stat(top / "a").st_ino
    fd = os.open(top / "b", os.O_RDONLY)
    os.rename(low / "b", low / "c")
    found["renamed"] = names(), told(os.stat, top / "b"), (top / "c").read_text(), os.pread(fd, 9, 0).decode()
    found["renamed: name"] = os.readlink(f"/proc/self/fd/{fd}").replace(str(w.root), "ROOT")
    os.close(fd)
    os.unlink(low / "c")
    found["unlinked"] = names(), told(os.stat, top / "c"), os.stat(top / "a").st_nlink
    os.chmod(low / "a", 0o400)
    os.chown(low / "a", 7, 8)
    os.utime(low / "a", ns=(5, 6))
    seen = os.stat(top / "a")
    found["attributes"] = seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns
    os.setxattr(low / "a", "user.late", b"late")
    found["an attribute"] = told(os.getxattr, top / "a", "user.late") == b"late", os.listxattr(top / "a")
    os.symlink("a", low / "s")
    found["a link"] = os.readlink(top / "s")
    os.unlink(low / "s")
    os.symlink("elsewhere", low / "s")
    found["another link"] = os.readlink(top / "s"), told(os.stat, top / "s")
    (low / "sub").mkdir()
    (low / "sub" / "inner").write_text("inner")
    back = os.open(".", os.O_RDONLY)
    os.chdir(top / "sub")
    os.rename(low / "sub", low / "moved")
    found["a moved folder"] = told(lambda: Path("inner").read_text()), told(os.listdir, "."), names()
    found["a moved folder: where"] = str(told(os.getcwd)).replace(str(w.root), "ROOT")
    found["a moved folder: up"] = sorted(os.listdir(".."))
    shutil.rmtree(low / "moved")
    found["a removed folder"] = told(os.listdir, "."), told(os.stat, "inner")
    found["a removed folder: where"] = str(told(os.getcwd)).replace(str(w.root), "ROOT")
    os.fchdir(back)
    os.close(back)
    # Listing goes on while names come and go.
    for number in range(300):
        (low / f"n{number}").touch()
    with os.scandir(top) as entries:
        listed = [next(entries).name for _ in range(10)]
        for number in range(0, 300, 2):
            (low / f"n{number}").unlink(missing_ok=True)
        (low / "late").touch()
        listed += [entry.name for entry in entries]
    found["listed while changing"] = len(listed) == len(set(listed)), {f"n{n}" for n in range(1, 300, 2)} <= set(listed)
    found["listed afterwards"] = names()
    found["a folder that is open"] = sorted(os.listdir(folder)) == names()
    os.close(folder)
    # Mappings see what is written below.
    (low / "m").write_bytes(b"a" * 3 * PAGE)
    with mapped(top / "m", 3 * PAGE) as mapping:
        before = mapping.bytes(1, 1)[:1]
        with open(low / "m", "r+b") as file:
            file.seek(PAGE)
            file.write(b"b")
        found["mapped and written"] = before.decode(), mapping.bytes(1, 1)[:2].decode()
        os.truncate(low / "m", PAGE)
        found["mapped and truncated"] = in_child(lambda: mapping.bytes(2, 1)), mapping.bytes(0, 1)[:1].decode()
        os.truncate(low / "m", 3 * PAGE)
        found["mapped and longer again"] = in_child(lambda: mapping.bytes(2, 1)), text_of(mapping.bytes(1, 1))
    shutil.rmtree(low)
    found["all gone"] = told(os.listdir, top), told(os.stat, top / "a")
    return found


@item
def meeting(w: Where) -> Any:
    """Sockets and fifos of the folder: who waits below, and who comes this way; and both this way."""
    found: dict[str, Any] = {}
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        os.unlink(w.lower / "socket")
        server.bind(str(w.lower / "socket"))
        server.listen()
        found["socket"] = told(client.connect, str(w / "socket"))
    reader = os.open(w.lower / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    found["fifo from below"] = told(lambda: os.close(os.open(w / "fifo", os.O_WRONLY | os.O_NONBLOCK)))
    os.close(reader)
    reader = os.open(w / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = told(os.open, w / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    if isinstance(writer, int):
        os.write(writer, b"through")
        found["fifo"] = os.read(reader, 100).decode()
        os.close(writer)
    os.close(reader)
    return found


@item
def watching(w: Where) -> Any:
    """inotify: of what happens below, and of what is done this way."""
    found: dict[str, Any] = {}
    watch = system("inotify_init1", os.O_NONBLOCK)
    try:
        system("inotify_add_watch", watch, str(w / "folder").encode(), 0xFFF)
        (w.lower / "folder" / "noted").touch()
        found["below"] = noted(watch)
        (w / "folder" / "noted").read_bytes()
        found["here"] = noted(watch)
    finally:
        os.close(watch)
        (w.lower / "folder" / "noted").unlink()
    return found


def noted(watch: int) -> list[Any]:
    """The events that have come."""
    events, at = [], 0
    data = b""
    with suppress(BlockingIOError):
        data = os.read(watch, 1 << 16)
    while at < len(data):
        mask, size = struct.unpack_from("=4xI4xI", data, at)
        events.append(hex(mask))
        at += 16 + size
    return events


# ------------------------------------------------------------------------------------------------- tools


FIND: Final = "import mmap; m = mmap.mmap(open('data', 'rb').fileno(), 0, prot=1); print(m.find(b'line'), len(m))"
TOOLS: Final = (
    "ls -lnRi --time-style=full-iso .",
    "find . -printf '%p %y %m %s %n %i %U %G %T@ %l\\n' | sort",
    "tar --sort=name --format=pax --pax-option=delete=atime --xattrs --acls -cf - . 2>/dev/null | sha256sum",
    "getfacl -R -n . 2>&1",
    "getfattr -R -d -m - . 2>&1",
    "stat -f -c '%t %b %s %l' .",
    "diff -r folder linkdir && echo same",
    "test -r closed; echo $?; test -w text; echo $?; test -x script; echo $?; test -p fifo -a -S socket; echo $?",
)
READERS: Final = (
    "sha256sum data text sparse empty",
    "head -c 5000 data | sha256sum; tail -c 5000 data | sha256sum; tail -n 1 text; wc -c data text empty",
    "cmp data data; cmp data text 2>&1 | head -c 4; grep -c line text",
    f'python3 -c "{FIND}"',
)


@item
def tools(w: Where) -> Any:
    """What Debian's own tools say."""
    return {command[:40]: said_by(w, command) for command in TOOLS}


@item
def readers(w: Where) -> Any:
    """What tools say that read files, or map them."""
    return {command[:40]: said_by(w, command) for command in READERS}


def said_by(w: Where, command: str) -> list[Any]:
    """Return how a command ended, and its lines."""
    done = subprocess.run(["sh", "-c", command], cwd=w.root, capture_output=True, text=True, errors="replace")
    return [done.returncode, *(done.stdout + done.stderr).replace(str(w.root), "ROOT").splitlines()]


# ------------------------------------------------------------------------------------------------- the comparison


def leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every single result with its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}: {key}")
    elif isinstance(value, list) and len(value) > 8:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{number}]")
    else:
        yield name, repr(value)


ATTACHED: Final = (
    *words("opening_again reading direct at_random copying asynchronous mapping_kinds mapping_calls advice ioctls"),
    *words("executing busy readers"),
)
"""Items for which granted pages could make a difference."""


class Same:
    """Both ways to one folder, and what was found different."""

    def __init__(self, *features: str) -> None:
        self.features = frozenset(features)
        """Which differences to expect besides those of every guest: Difference.only."""
        self.compared = 0
        self.seen: dict[Difference, int] = {}
        self.wrong: list[str] = []
        self.seconds: dict[str, float] = {}

    def compare(self, attached: bool) -> None:
        """Do every item both ways; with pages attached those that look at what is read or mapped."""
        for name, do in ITEMS.items():
            if attached and name not in ATTACHED:
                continue
            begun = time.monotonic()
            plain = dict(leaves(do(Where(PLAIN)), name))
            view = dict(leaves(do(Where(VIEW)), name))
            for key in sorted(plain.keys() | view.keys()):
                self.compared += 1
                one, other = plain.get(key, "nothing"), view.get(key, "nothing")
                if one != other:
                    self._judge(key, one, other, attached)
            self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - begun, 1)

    def _judge(self, name: str, plain: str, view: str, attached: bool) -> None:
        for difference in DIFFERENCES:
            if difference.only not in ("", *self.features, "attached" if attached else ""):
                continue
            if all(
                re.fullmatch(pattern, text, re.DOTALL)
                for pattern, text in ((difference.name, name), (difference.plain, plain), (difference.view, view))
            ):
                self.seen[difference] = self.seen.get(difference, 0) + 1
                return
        self.fault(f"{name}{' (attached)' if attached else ''}: plain {plain[:300]}, view {view[:300]}")

    def fault(self, text: str) -> None:
        """Note what is wrong, and say it at once: the rest takes minutes in an emulator."""
        self.wrong.append(text)
        sys.stderr.write(f"view_same: {text}\n")
        sys.stderr.flush()

    def finish(self) -> None:
        """A difference that is documented and not there is wrong too."""
        for difference in DIFFERENCES:
            if difference not in self.seen and difference.only in ("", "attached", *self.features):
                self.fault(f"documented, and not seen: {difference.name}")


def main() -> int:
    """Compare, without granted pages and with them."""
    area, first = int(sys.argv[1]), int(sys.argv[2])
    want = content(SEED, PAGES, TAIL)[: (PAGES - 1) * PAGE + TAIL]
    os.umask(0o022)
    make(want)
    for path in (PLAIN, VIEW):
        path.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(LOWER), str(PLAIN)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro,nodev,noatime", str(PLAIN)], check=True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if area < 0:  # by hand, anywhere: the folder twice; whatever differs then is this file's fault
        subprocess.run(["mount", "--bind", str(LOWER), str(VIEW)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro,nodev,noatime", str(VIEW)], check=True)
        same = Same()
        same.compare(False)
        return report(same, {"kind": "none"})
    subprocess.run(["mount", "-t", "shareview", "-o", f"lower={LOWER},nodev,noatime", "none", str(VIEW)], check=True)
    probe = Probe(area, first)
    same = Same("own" if probe.owns else "lower", "old" if probe.old else "new")
    same.compare(False)
    if not area:
        return report(same, {"kind": probe.kind})
    before = probe.control.info()
    with opened(VIEW / "data") as fd:
        drop_caches()
        probe.attach(fd)
        same.compare(True)
        after = probe.control.info()
        attached = probe.control.state(fd)[0]
        probe.control.detach(fd)
    same.finish()
    if not attached or after.read_bytes == before.read_bytes or (probe.owns and after.faults == before.faults):
        same.fault(f"granted pages were not used: {attached} attached, {before}, {after}")
    more = {
        "kind": probe.kind,
        "attached": attached,
        "read_bytes": after.read_bytes - before.read_bytes,
        "faults": after.faults - before.faults,
    }
    return report(same, more)


def report(same: Same, more: dict[str, Any]) -> int:
    """Unmount, and say what was found."""
    for path in (VIEW, PLAIN):
        done = subprocess.run(["umount", str(path)], capture_output=True, text=True)
        if done.returncode:
            same.fault(f"umount {path}: {done.stderr}")
    shutil.rmtree(LOWER)
    shutil.rmtree(SCRATCH)
    differences = {difference.name: count for difference, count in same.seen.items()}
    result = {"compared": same.compared, "differences": differences, "seconds": same.seconds} | more
    sys.stdout.write(json.dumps(result | {"wrong": same.wrong}) + "\n")
    return 1 if same.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

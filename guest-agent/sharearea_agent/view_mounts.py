"""Mounts and unmounts the guest views that the configuration names (docs/view.md), and keeps who wants them down.

Beside views.py, which fills the views that are mounted, and like it under the runner and the command line. A view over
its own folder hides the plain files, which the agent has to scan and lease: so that folder's plain files, or those of
the designated folder that it is in, are bound to a place of their own before. That place is private: what is mounted
over the folder later does not come there. `Covered` translates between the two.

Views that are over their folder have to be down while packages are installed, since they are read-only. Who has taken
them down is kept in /run, with process and start time, so that nobody stays down for a package manager that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .common.errors import HostError, UsageError
from .config import AgentConfig, ViewConfig

MOUNTS: Final = Path("/proc/self/mountinfo")
BASE: Final = Path("/run/sharearea-view")
MODULE_HINT: Final = "install sharearea-view-dkms, or load the module shareview"
# A package manager that is still at work after this long is not waited for: some live as long as the system.
HOLD_S: Final = 6 * 3600.0
_COMMAND_S: Final = 20.0
_LOCK_S: Final = 10.0
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo: where, of what type, and the lower folder if it is a view."""

    at: bytes
    type: bytes
    lower: bytes


def mounts(mountinfo: bytes) -> list[Mount]:
    """Return the mounts in the text of /proc/self/mountinfo. Of several at one place the last is on top."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(b" - ")
        words, about = left.split(b" "), right.split(b" ")
        if len(words) < 5 or len(about) < 3:
            continue
        lower = b""
        if about[0] == b"shareview":
            options = [option for option in about[2].split(b",") if option.startswith(b"lower=")]
            lower = _plain(_plain(options[0].removeprefix(b"lower="))) if options else b""
        found.append(Mount(_plain(words[4]), about[0], lower.rstrip(b"/") if lower != b"/" else lower))
    return found


def _plain(text: bytes) -> bytes:
    """Undo the escapes of /proc."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), text)


def inside(path: bytes, folder: bytes) -> bool:
    """Whether a path is a folder or in it."""
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


@dataclass(frozen=True, slots=True)
class Covered:
    """A folder that views cover, wholly or in part, and where its plain files are besides."""

    folder: bytes
    plain: bytes

    def to_plain(self, path: bytes) -> bytes:
        """Return where a path of the folder is plain; others are as they are."""
        return self._moved(path, self.folder, self.plain)

    def to_seen(self, path: bytes) -> bytes:
        """Return to_plain's argument."""
        return self._moved(path, self.plain, self.folder)

    @property
    def stale(self) -> bool:
        """Whether the folder was replaced since: its plain files' place shows the old one. Not while it is covered."""
        try:
            return not os.path.samestat(os.stat(self.folder), os.stat(self.plain))
        except OSError:
            return True

    @staticmethod
    def _moved(path: bytes, old: bytes, new: bytes) -> bytes:
        if not inside(path, old):
            return path
        rest = path[len(old.rstrip(b"/")) :].lstrip(b"/")
        return new.rstrip(b"/") + b"/" + rest if rest else new


def to_plain(covered: Sequence[Covered], path: bytes) -> bytes:
    """Return where a path is plain."""
    for each in covered:
        if inside(path, each.folder):
            return each.to_plain(path)
    return path


def to_seen(covered: Sequence[Covered], path: bytes) -> bytes:
    """Return what a plain path is to everybody else."""
    for each in covered:
        if inside(path, each.plain):
            return each.to_seen(path)
    return path


def covered_folders(config: AgentConfig, base: Path = BASE) -> list[Covered]:
    """Return what the configured views cover: the wider one of each view's folder and the designated folder."""
    found: dict[Path, Covered] = {}
    for view in config.views:
        if view.over:
            wider = next((folder for folder in config.folders if view.lower.is_relative_to(folder)), view.lower)
            # A name that no other folder has.
            name = str(wider).lstrip("/").replace("%", "%25").replace("-", "%2D").replace("/", "-") or "-"
            found[wider] = Covered(os.fsencode(wider), os.fsencode(base / "plain" / name))
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that wants the views over their folders down: its number and start time, and since when (epoch)."""

    pid: int
    started: str
    since: float

    @property
    def alive(self) -> bool:
        """Whether it still runs, and has not been at it for too long."""
        return _process(self.pid)[2] == self.started and time.time() - self.since < HOLD_S


def holder(pid: int) -> Holder:
    """Return the holder that a hook of a package manager is called for. UsageError if there is no such process.

    apt calls its hooks from a copy of itself that ends with them: of ancestors with one command line the first counts.
    """
    parent, _, started = _process(pid)
    if not started:
        raise UsageError(f"there is no process {pid}")
    words = _command_line(pid)
    while parent > 1 and words and _command_line(parent) == words:
        pid = parent
        parent, _, started = _process(pid)
    return Holder(pid, started, time.time())


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _process(pid: int) -> tuple[int, str, str]:
    """Return a process's parent, name and start time; (0, "", "") if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0, "", ""
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return 0, "", ""
    return int(fields[1]), head.partition("(")[2], fields[19]


@dataclass(slots=True)
class _Down:
    """Who wants views down."""

    by_hand: bool
    holders: list[Holder]


def _command(words: Sequence[str]) -> None:
    """Run mount or umount. HostError with what it said."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{words[0]}: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"ended with {done.returncode}"
        missing = "unknown filesystem type" in said
        raise HostError(said, MODULE_HINT if missing else "")


class ViewMounts:
    """The configured views of this guest, as mounts of the namespace that this process is in."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        base: Path = BASE,
        mountinfo: Callable[[], bytes] = MOUNTS.read_bytes,
        command: Callable[[Sequence[str]], None] = _command,
    ) -> None:
        """`mountinfo`, `command`: how mounts are read and made."""
        self.views = config.views
        self.covered = covered_folders(config, base)
        self._base = base
        self._mountinfo = mountinfo
        self._command = command

    # ------------------------------------------------------------------------------------------------- what is there

    def is_up(self, view: ViewConfig) -> bool:
        """Whether a view is mounted where it should be, on top, of the folder that it should be of."""
        at, lower = os.fsencode(view.mounted_at), os.fsencode(view.lower)
        for mount in reversed(mounts(self._mountinfo())):
            if mount.at == at:
                # One over its folder that is not of the plain files' place is none that the agent could use.
                return to_seen(self.covered, mount.lower) == lower and not (view.over and mount.lower == lower)
        return False

    def plain_there(self) -> list[Covered]:
        """Return the covered folders whose plain files are in their place."""
        known = {mount.at: mount for mount in mounts(self._mountinfo())}
        return [each for each in self.covered if each.plain in known and known[each.plain].type != b"shareview"]

    def _lower(self, view: ViewConfig) -> bytes:
        return to_plain(self.covered, os.fsencode(view.lower))

    # --------------------------------------------------------------------------------------------- mount and unmount

    def up(self) -> list[HostError]:
        """Mount what is not mounted, and return what could not be. Nothing is done while somebody wants them down."""
        problems: list[HostError] = []
        for view in self.views:
            if self.is_up(view):
                continue
            try:
                self._mount(view)
            except HostError as error:
                problems.append(HostError(f"no view of {view.lower} at {view.mounted_at}: {error.message}", error.hint))
        return problems

    def _mount(self, view: ViewConfig) -> None:
        lower = self._lower(view)
        for each in self.covered:
            if inside(lower, each.plain):
                self._bind(each)
        _same_folder(lower, os.fsencode(view.lower))
        at = view.mounted_at
        made = False
        try:
            if not view.over:
                # Only while it is mounted: a unit that binds it, if it is there, would show an empty folder.
                at.mkdir(parents=True)
                made = True
        except FileExistsError:
            pass
        except OSError as error:
            raise HostError(f"cannot create {at}: {error.strerror}") from None
        options = f"lower={os.fsdecode(lower)},verify={view.verify}"
        try:
            self._command(["mount", "-t", "shareview", "-o", options, "none", os.fspath(at)])
        except HostError:
            if made:
                with contextlib.suppress(OSError):
                    at.rmdir()
            raise

    def _bind(self, covered: Covered) -> None:
        """Give a folder's plain files their place, unless they are there."""
        if covered in self.plain_there():
            if not covered.stale:
                return
            self._command(["umount", "-l", os.fsdecode(covered.plain)])
        if any(mount.type == b"shareview" and mount.at == covered.folder for mount in mounts(self._mountinfo())):
            raise HostError("it is covered by a view that was mounted by hand", f"umount {os.fsdecode(covered.folder)}")
        place = Path(os.fsdecode(covered.plain))
        try:
            # Nobody else comes to files by this way that cannot come to them by their own.
            place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.mkdir(exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot create {place}: {error.strerror}") from None
        # The folder of these places is a private mount. Otherwise a bind in it would come to other namespaces too, as
        # a copy that what is mounted over the folder comes to.
        above = os.fspath(place.parent)
        if not any(mount.at == os.fsencode(above) for mount in mounts(self._mountinfo())):
            self._command(["mount", "--bind", above, above])
            self._command(["mount", "--make-private", above])
        self._command(["mount", "--bind", os.fsdecode(covered.folder), os.fspath(place)])
        self._command(["mount", "--make-private", os.fspath(place)])

    def down(self, views: Sequence[ViewConfig]) -> list[HostError]:
        """Unmount views; return what could not be. Programs keep what they have open, as plain files."""
        problems: list[HostError] = []
        for view in views:
            at = os.fspath(view.mounted_at)
            try:
                while self.is_up(view):
                    try:
                        self._command(["umount", at])
                    except HostError:
                        # Somebody has a file open in it. It leaves the tree of names now, and ends with the last one.
                        self._command(["umount", "-l", at])
            except HostError as error:
                problems.append(HostError(f"the view at {at} is still there: {error.message}", error.hint))
                continue
            if not view.over:
                with contextlib.suppress(OSError):
                    view.mounted_at.rmdir()
        return problems

    # ----------------------------------------------------------------------------------------- who wants them down

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn: ups and downs go one after the other. HostError if it does not come."""
        try:
            self._base.mkdir(mode=0o755, parents=True, exist_ok=True)
            lock = os.open(self._base / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"{self._base}: {error.strerror}", "this needs root") from None
        try:
            end = time.monotonic() + _LOCK_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise HostError("another command is at work on the views") from None
                    time.sleep(0.05)
            yield
        finally:
            os.close(lock)

    @property
    def _note(self) -> Path:
        return self._base / "down"

    def _read(self) -> _Down:
        try:
            said: Any = json.loads(self._note.read_text())
            holders = [Holder(int(pid), str(started), float(since)) for pid, started, since in said["holders"]]
            return _Down(bool(said["by_hand"]), [each for each in holders if each.alive])
        except (OSError, ValueError, KeyError, TypeError):
            return _Down(False, [])

    def _write(self, down: _Down) -> None:
        if not down.by_hand and not down.holders:
            self._note.unlink(missing_ok=True)
            return
        holders = [[each.pid, each.started, each.since] for each in down.holders]
        fresh = self._note.with_suffix(".new")
        fresh.write_text(json.dumps({"by_hand": down.by_hand, "holders": holders}))
        fresh.replace(self._note)

    def want_down(self, who: Holder | None) -> None:
        """Note who wants views down: a process those over their folders, an operator (None) all."""
        down = self._read()
        if who is None:
            down.by_hand = True
        else:
            down.holders = [each for each in down.holders if each.pid != who.pid] + [who]
        self._write(down)

    def want_up(self, pid: int | None) -> None:
        """Note that a process, or an operator (None), does not want views down any more."""
        down = self._read()
        if pid is None:
            down.by_hand = False
        else:
            down.holders = [each for each in down.holders if each.pid != pid]
        self._write(down)

    def forget_dead(self) -> None:
        """Forget processes that have ended: without a note nobody looks any more whether views are due."""
        self._write(self._read())

    def why_down(self) -> str:
        """Return who wants views down now; "" if nobody does."""
        down = self._read()
        if down.holders:
            return ", ".join(f"process {each.pid} ({_process(each.pid)[1]})" for each in down.holders)
        return "an operator" if down.by_hand else ""


def _same_folder(plain: bytes, seen: bytes) -> None:
    """Raise HostError if what is to become a view's lower folder is not the folder that everybody sees there."""
    try:
        one, other = os.stat(plain), os.stat(seen)
    except OSError as error:
        raise HostError(f"{os.fsdecode(error.filename)}: {error.strerror}") from None
    if not os.path.samestat(one, other):
        raise HostError(
            "a file system is mounted between it and the designated folder", "name it in agent.folders by itself"
        )


# ------------------------------------------------------------------------------------------------------ units

_BARE: Final = re.compile(r"[A-Za-z0-9_/.@+=-]+\Z", re.ASCII)
UNIT_NAME: Final = re.compile(r"[A-Za-z0-9:_.\\@-]+\.(service|socket|mount|swap)\Z", re.ASCII)


def drop_in(views: Sequence[ViewConfig]) -> str:
    """Return a drop-in with which a unit's programs see views in the place of their folders.

    Only of views beside their folder; the others everybody sees.
    """
    lines = [
        "# Programs of this unit see guest views in the place of folders. Written by `sharearea-agent view drop-in`.",
        "[Unit]",
        "Wants=sharearea-view.service",
        "After=sharearea-view.service",
        "",
        "[Service]",
        "# With a dash: where the view is not mounted the folder stays what it is.",
    ]
    lines += [
        f"BindReadOnlyPaths=-{_unit_path(view.at)}:{_unit_path(str(view.lower))}" for view in views if not view.over
    ]
    return "\n".join(lines) + "\n"


def _unit_path(path: str) -> str:
    if _BARE.match(path):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'

"""The agent as the guest view's own consumer: it attaches granted pages to files of mounted views (docs/view.md).

A view is found here, not made (view_mounts.py mounts): whatever there is of type `shareview` when the agent starts, and
again when it is told of a change. Files come in when the broker offers pages of them and leave when they have lost
their names, or when their view is taken down; between, the state machine treats this like any other consumer, with the
number VIEWS. Paths are those that everybody sees, also of files whose plain ones are elsewhere because a view covers
them. What is attached needs no process: it stays right if the agent dies, and the next one begins by taking it all
back, since nobody knows any more what the broker has granted.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import agent
from .agent import VIEWS, Event, FileKey, Handle
from .common.events import path_text
from .consumer_wire import MAPPED_DIFFERENT, MAPPED_DONE, MAPPED_NO_ROOM
from .view_control import ViewControl
from .view_mounts import Covered, mounts, to_seen
from .worker import Job, Then


@dataclass(frozen=True, slots=True)
class MountedView:
    """A view: its lower folder, and where it is mounted, which is the same if it covers it. Absolute paths."""

    lower: bytes
    at: bytes

    @property
    def over(self) -> bool:
        """Whether it covers its folder."""
        return self.at == self.lower

    def path(self, plain: bytes) -> bytes | None:
        """Return where a file of the lower folder is in the view; None if it is not in it."""
        inside = plain.removeprefix(self.lower.rstrip(b"/") + b"/")
        return None if inside == plain else self.at + b"/" + inside


def mounted_views(mountinfo: bytes, covered: Sequence[Covered] = ()) -> list[MountedView]:
    """Return the views in the text of /proc/self/mountinfo.

    Of those that cover their own folder only the ones whose plain files are elsewhere (`covered`): through another the
    agent would scan and lease the view itself.
    """
    found: dict[bytes, MountedView] = {}
    for mount in mounts(mountinfo):
        found.pop(mount.at, None)
        if mount.type == b"shareview" and mount.lower.startswith(b"/") and mount.lower != mount.at:
            found[mount.at] = MountedView(to_seen(covered, mount.lower), mount.at)
    return list(found.values())


# What becomes an entry's descriptor, and how many pages were compared with the file.
_Attaching = Future[tuple[int, int]]


@dataclass(slots=True)
class _Entry:
    """A file that is in a view."""

    key: FileKey
    view: MountedView
    path: bytes  # in the view
    epoch: int = 0  # from before its grants were asked for
    fd: int = -1  # of the view's file, while pages are attached
    generation: int = 0
    attaching: _Attaching | None = None  # under way on the worker


class Views:
    """The mounted views, and what is attached in them. Belongs to the runner's thread; answers through `feed`.

    Attaching compares with what is cached, or (`verify=all`) reads the whole file, so it is done on the worker.
    """

    def __init__(
        self,
        control: ViewControl,
        views: list[MountedView],
        feed: Callable[[Event], None],
        log: Callable[..., None],
        submit: Callable[[Job], None],
    ) -> None:
        """`control` is this object's from now on. `log`: as EventLog.event; `submit`: as Worker.submit."""
        self._control = control
        self._views = views
        self._feed = feed
        self._log = log
        self._submit = submit
        self._entries: dict[Handle, _Entry] = {}
        self._handles: dict[FileKey, Handle] = {}
        self._next: Handle = 0
        self._complained: set[int] = set()
        self._held = False
        self._refused = control.info().refused
        control.detach_all()  # what an earlier agent left: nobody knows any more what of it is granted

    def fileno(self) -> int:
        """Return the descriptor that is readable when pages were let go that nobody here has let go."""
        return self._control.fileno()

    @property
    def views(self) -> list[MountedView]:
        """The views that files are taken into."""
        return list(self._views)

    def take_in(self, key: FileKey, plain: bytes) -> Handle | None:
        """Take in a file of a view; return its new handle. None: in no view, another file there, or in already."""
        placed = next(((view, path) for view in self._views if (path := view.path(plain)) is not None), None)
        if placed is None or key in self._handles:
            return None
        view, path = placed
        try:
            seen = os.stat(path, follow_symlinks=False)
        except OSError:
            return None
        if (seen.st_dev, seen.st_ino) != key:
            return None
        self._next += 1
        self._entries[self._next] = _Entry(key, view, path)
        self._handles[key] = self._next
        return self._next

    def put_out(self, key: FileKey) -> Handle | None:
        """Let go of a file that has lost its name; return the handle that it had, None if it had none."""
        handle = self._handles.pop(key, None)
        if handle is not None:
            self._let_go(self._entries.pop(handle))
        return handle

    def use(self, views: list[MountedView]) -> list[tuple[FileKey, Handle]]:
        """Take files into these views from now on; return those that were in others, and are let go and put out."""
        self._views = views
        gone = [(entry.key, handle) for handle, entry in self._entries.items() if entry.view not in views]
        for key, _ in gone:
            self.put_out(key)
        return gone

    def asking(self, key: FileKey) -> None:
        """Note that grants for a file are asked for from now on: those of an earlier epoch are not for it."""
        handle = self._handles.get(key)
        if handle is not None:
            self._entries[handle].epoch = self._control.info().epoch

    def share(self, action: agent.ShareWith) -> None:
        """Have the worker attach; the state machine hears how it went."""
        entry = self._entries.get(action.handle)
        if entry is None:
            return
        entry.generation = action.generation
        try:
            self._let_go(entry)
        except OSError as error:
            self._not_attached(entry, action, error)
            return
        entry.attaching = under_way = _Attaching()
        self._submit(partial(self._attach, entry, entry.epoch, action, under_way))

    def _attach(self, entry: _Entry, epoch: int, action: agent.ShareWith, under_way: _Attaching) -> Then | None:
        """On the worker: attach, unless that was called off."""
        if not under_way.set_running_or_notify_cancel():
            return None
        fd = -1
        try:
            if action.grantor is None:
                raise ValueError("grants of nobody")
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            seen = os.fstat(fd)
            if (seen.st_dev, seen.st_ino) != entry.key:
                raise OSError(errno.ESTALE, "another file")
            compared = self._control.attach(fd, action.grantor, action.runs, epoch)
        except BaseException as error:
            if fd >= 0:
                os.close(fd)
            under_way.set_exception(error)
        else:
            under_way.set_result((fd, compared))
        return partial(self._attached, entry, action, under_way)

    def _attached(self, entry: _Entry, action: agent.ShareWith, under_way: _Attaching) -> None:
        """Take what the worker has attached, unless somebody has waited for it to let it go."""
        if entry.attaching is not under_way:
            return
        entry.attaching = None
        try:
            entry.fd, compared = under_way.result()
            pages, _ = self._control.state(entry.fd)
        except (OSError, ValueError) as error:
            self._not_attached(entry, action, error)
            return
        if not pages:  # lost since: look() has not known of it
            os.close(entry.fd)
            entry.fd = -1
        elif action.proven:  # another has been read, by whom and when nobody knows
            self._feed(agent.Compared(entry.key, action.generation, compared))
        outcome = MAPPED_DONE if pages else MAPPED_NO_ROOM
        self._feed(agent.ConsumerMapped(VIEWS, action.handle, action.generation, pages, outcome))

    def _not_attached(self, entry: _Entry, action: agent.ShareWith, error: OSError | ValueError) -> None:
        number = error.errno if isinstance(error, OSError) else None
        # A writer (EAGAIN) and a suspend (ESTALE) are everyday; the state machine hears of them by itself.
        if number not in (errno.EBADMSG, errno.EAGAIN, errno.ESTALE) and (number or 0) not in self._complained:
            self._complained.add(number or 0)
            self._log("agent.limit", detail=f"cannot attach {path_text(entry.path)}: {error}")
        outcome = MAPPED_DIFFERENT if number == errno.EBADMSG else MAPPED_NO_ROOM
        self._feed(agent.ConsumerMapped(VIEWS, action.handle, action.generation, 0, outcome))

    def unshare(self, action: agent.UnshareWith) -> None:
        """Detach; the state machine hears that it is done."""
        entry = self._entries.get(action.handle)
        if entry is None:
            return
        self._let_go(entry)
        self._feed(agent.ConsumerLetGo(VIEWS, action.handle, action.generation))

    def _let_go(self, entry: _Entry) -> None:
        """Afterwards nothing of a file is attached. What the worker is just attaching is waited for.

        When a writer comes the kernel calls comparing off; else `verify=all` reads to its end, and the loop waits.
        """
        under_way, entry.attaching = entry.attaching, None
        if under_way is not None and not under_way.cancel() and under_way.exception() is None:
            entry.fd, _ = under_way.result()
        fd, entry.fd = entry.fd, -1
        if fd >= 0:
            try:
                self._control.detach(fd)
            finally:
                os.close(fd)

    def hold_suspend(self, on: bool) -> None:
        """Have the kernel refuse a suspend while something is mapped or bound that ends with it, or no longer."""
        if on != self._held:
            self._control.hold(on)
            self._held = on

    def look(self) -> bool:
        """See what was let go without us: those files are given back, and asked for again later.

        Returns whether a suspend was refused since the last time.
        """
        refused = self._control.info().refused
        before, self._refused = self._refused, refused
        for handle, entry in self._entries.items():
            if entry.fd >= 0 and not self._control.state(entry.fd)[0]:
                os.close(entry.fd)
                entry.fd = -1
                self._feed(agent.ConsumerMapped(VIEWS, handle, entry.generation, 0, MAPPED_NO_ROOM))
        return refused != before

    def status(self) -> dict[str, Any]:
        """Return figures for `sharearea-agent status`."""
        info = self._control.info()
        return {
            "views": [path_text(view.at) for view in self._views],
            "attached_files": sum(entry.fd >= 0 for entry in self._entries.values()),
            "attached_pages": info.attached_pages,
            "pending_pages": info.pending_pages,
        }

    def close(self) -> None:
        """Detach everything and close the device."""
        for entry in self._entries.values():
            with contextlib.suppress(OSError):
                self._let_go(entry)
        self._entries.clear()
        self._handles.clear()
        self._control.close()

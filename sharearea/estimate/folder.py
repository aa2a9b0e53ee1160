"""A root folder: every regular file below it, once. Links are not followed, and other file systems are not entered."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .intake import Intake, Unreadable, reason_of

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_BLOCK: Final = 512  # of st_blocks


class Folder:
    """A root folder."""

    kind = "folder"

    def __init__(self, path: Path, cross: bool) -> None:
        self._path = path
        self._cross = cross

    def close(self) -> None:
        """Nothing is open between two calls."""

    def read(self, intake: Intake) -> None:
        """Hand over every regular file, in the order of names."""
        root = os.fspath(self._path)
        try:
            device = os.stat(root).st_dev
        except OSError as error:
            raise Unreadable(reason_of(error)) from None
        intake.packages.read(FolderTree(self._path), lambda text: intake.note(text))
        seen: set[tuple[int, int]] = set()
        # Reading a guest's files should not change their times; only their owner may ask for that.
        flags = _FLAGS | (os.O_NOATIME if os.geteuid() == 0 else 0)
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            try:
                with os.scandir(f"{root}/{folder}") as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if not folder:
                    raise Unreadable(reason_of(error)) from None
                intake.leave_out(folder, f"this folder cannot be read: {reason_of(error)}")
                continue
            below = []
            for entry in found:
                path = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if self._cross or entry.stat(follow_symlinks=False).st_dev == device:
                            below.append(path)
                        else:
                            intake.leave_out(path, "another file system is mounted here (--cross-mounts takes it in)")
                    elif entry.is_file(follow_symlinks=False):
                        _take(intake, path, os.open(entry.path, flags), seen)
                except OSError as error:
                    if error.errno != errno.ENOENT:  # gone since the folder was read
                        intake.leave_out(path, f"cannot be read: {reason_of(error)}")
            waiting += reversed(below)


def _take(intake: Intake, path: str, fd: int, seen: set[tuple[int, int]]) -> None:
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return
        if status.st_nlink > 1:
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                return
            seen.add(identity)
        intake.file(path, fd, status.st_size, status.st_blocks * _BLOCK < status.st_size)
    finally:
        os.close(fd)


class FolderTree:
    """A root folder's databases of packages. What a link leads to outside of the root is not read."""

    def __init__(self, path: Path) -> None:
        self._root = os.path.realpath(path)

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder; none if it is none."""
        place = self._inside(folder)
        try:
            return os.listdir(place) if place is not None else []
        except OSError:
            return []

    def read(self, path: str, limit: int) -> bytes | None:
        """Return a file's bytes; None if there is no such file, or it is longer than limit, or cannot be read."""
        place = self._inside(path)
        if place is None:
            return None
        try:
            with open(os.open(place, _FLAGS), "rb") as file:
                data = file.read(limit + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
        except OSError:
            return None
        return data if data is None or len(data) <= limit else None

    @contextmanager
    def database(self, path: str) -> Iterator[str | None]:
        """Give where sqlite finds this file."""
        place = self._inside(path)
        yield place if place is not None and os.path.isfile(place) and os.access(place, os.R_OK) else None

    def _inside(self, path: str) -> str | None:
        place = os.path.realpath(f"{self._root}/{path}")
        return place if place == self._root or place.startswith(self._root.rstrip("/") + "/") else None

"""A disk for the demo's last domain: an ext4 file system in a file, its copy, and what was read from it.

Needs root, loop devices, mke2fs, mount and losetup; `lacking` says what is not there. A disk counts for itself what is
read from it (the block layer's statistics of its loop device), whoever reads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from .common.errors import HostError

_SECTOR: Final = 512
_TOOLS: Final = ("mke2fs", "losetup", "mount", "umount")
_SBIN: Final = "/usr/local/sbin:/usr/sbin:/sbin"


def lacking() -> str:
    """Return why this host cannot make disks, "" if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    tools = [tool for tool in _TOOLS if _tool(tool) is None]
    return f"needs {', '.join(tools)} (Debian: e2fsprogs, mount)" if tools else ""


def _tool(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}")


def _run(name: str, *arguments: str | Path) -> str:
    words = [_tool(name) or name, *(os.fspath(argument) for argument in arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{' '.join(words)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def make_image(image: Path, source: Path, size_bytes: int) -> None:
    """Make an ext4 file system with the files of a folder."""
    with image.open("xb") as file:
        file.truncate(size_bytes)
    # As it is after an installation: its inode tables are there, nothing goes on in the background.
    options = "lazy_itable_init=0,lazy_journal_init=0"
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-E", options, "-d", source, image)


class Disk:
    """An image that is mounted; close() undoes it and leaves the image."""

    def __init__(self, image: Path, at: Path) -> None:
        """Mount it; what was read is counted from before that."""
        at.mkdir(exist_ok=True)
        self.at = at
        self._loop: str | None = _run("losetup", "--find", "--show", image)
        self._mounted = False
        self._begun = 0
        try:
            self._begun = self._sectors()
            _run("mount", "-t", "ext4", "-o", "noatime", self._loop, at)
            self._mounted = True
        except BaseException:
            self.close()
            raise

    def _sectors(self) -> int:
        # Documentation/block/stat.rst: the third number is sectors read, of 512 bytes whatever the device's are.
        assert self._loop is not None
        return int(Path("/sys/block", Path(self._loop).name, "stat").read_text().split()[2])

    @property
    def read_bytes(self) -> int:
        """What was read from the device since it was mounted, the mounting included."""
        return (self._sectors() - self._begun) * _SECTOR

    def close(self) -> None:
        """Unmount it."""
        if self._mounted:
            _run("umount", self.at)
            self._mounted = False
        if self._loop is not None:
            loop, self._loop = self._loop, None
            _run("losetup", "--detach", loop)

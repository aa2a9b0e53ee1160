"""What an argument of the command line is: a root folder, a tar archive or a disk image, by what is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from ..common.errors import UsageError
from .archive import Archive, compression_of, is_tar
from .folder import Folder
from .intake import Source, reason_of

_CONVERT: Final = "qemu-img convert -O qcow2 {} image.qcow2, and give me that"


def open_source(path: Path, work: Path, cross: bool) -> Source:
    """Open a root. Raises UsageError if it is none, HostError if a library is missing that reads it."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            with os.scandir(path):
                return Folder(path, cross)
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(
                f"{path}: is {_special(mode)}", "give a root folder, a tar archive, a disk image or a block device"
            )
        with open(path, "rb") as file:
            start = file.read(512)
    except PermissionError as error:
        raise UsageError(f"{path}: {reason_of(error)}", "run this as root, or as its owner") from None
    except OSError as error:
        raise UsageError(f"{path}: {reason_of(error)}") from None
    if not start:
        raise UsageError(f"{path}: is empty", "give a root folder, a tar archive or a disk image")
    compression = compression_of(start)
    try:
        if compression is not None or (len(start) == 512 and is_tar(start)):
            return Archive(path, compression, work)
        from .image import OTHER_IMAGES, Image  # here, as it needs libraries that may not be installed

        for magic, name in OTHER_IMAGES:
            if start.startswith(magic):
                raise UsageError(f"{path}: is a {name} image, which is not read", _CONVERT.format(path))
        return Image(path, work)
    except OSError as error:
        raise UsageError(f"{path}: {reason_of(error)}") from None


def _special(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a character device"

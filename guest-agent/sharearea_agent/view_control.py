"""The control interface of the guest view's kernel module: /dev/shareview (guest-agent/kmod/shareview.h, version 2).

What the ioctls take and give, as Python values; when to attach what is its caller's business. Needs nothing but Python.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from dataclasses import dataclass
from typing import Final

from .common.errors import HostError

DEVICE: Final = "/dev/shareview"
VERSION: Final = 2
MAX_RUNS: Final = 0x100000
MAX_PAGE: Final = 0x400000
"""Pages of a file from this one on cannot be attached."""

_INFO: Final = struct.Struct("=II10Q")
_ATTACH: Final = struct.Struct("=IiIIIIQQQ")
_DETACH: Final = struct.Struct("=Ii")
_STATE: Final = struct.Struct("=IiQQ")
_HOLD: Final = struct.Struct("=II")


def _request(direction: int, number: int, body: struct.Struct) -> int:
    """Return an ioctl's number; `direction`: 1 is _IOW, 3 is _IOWR."""
    return direction << 30 | body.size << 16 | ord("x") << 8 | number


INFO: Final = _request(3, 0xA0, _INFO)
ATTACH: Final = _request(3, 0xA1, _ATTACH)
DETACH: Final = _request(1, 0xA2, _DETACH)
STATE: Final = _request(3, 0xA3, _STATE)
HOLD: Final = _request(1, 0xA4, _HOLD)


@dataclass(frozen=True, slots=True)
class ViewInfo:
    """What the module counts: struct shareview_info."""

    version: int
    epoch: int
    """Suspends so far. References that were asked for in another epoch are refused."""
    lost: int
    """Tables let go without being asked for: a writer, a suspend, an unmount."""
    refused: int
    """Suspends that were refused because somebody held them back."""
    tables: int
    attached_pages: int
    pending_pages: int
    """Let go, and not given back yet, because somebody has one of them pinned."""
    leaked_pages: int
    read_bytes: int
    faults: int
    lower_faults: int


class ViewControl:
    """An open control device; `with` closes it. Calls on several threads are fine, but not beside close().

    Methods raise OSError with the errors that shareview.h names, ValueError when closed.
    """

    def __init__(self, path: str = DEVICE) -> None:
        """Open it. HostError if there is no module, or another one, or this process may not."""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            version = self.info().version
        except OSError as error:
            self.close()
            hint = "load the module shareview" if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV) else ""
            raise HostError(f"{path}: {error.strerror}", hint) from None
        if version != VERSION:
            self.close()
            raise HostError(f"{path}: the module speaks version {version}, this agent version {VERSION}")

    def fileno(self) -> int:
        """Return its descriptor: readable when tables were let go unasked for, or a suspend was refused."""
        if self._fd < 0:
            raise ValueError("the control device is closed")
        return self._fd

    def info(self) -> ViewInfo:
        """Return the counters; the descriptor is not readable afterwards, until something is lost again."""
        answer = bytearray(_INFO.pack(_INFO.size, *[0] * 11))
        fcntl.ioctl(self.fileno(), INFO, answer, True)
        return ViewInfo(*_INFO.unpack(answer)[1:])

    def attach(self, file: int, domid: int, runs: bytes, epoch: int) -> int:
        """Attach granted pages to a file of a view; return how many of them were compared with it.

        `file`: a descriptor of it. `runs`: packed u32 (page, first reference, count), pages ascending. `epoch`: of
        info(), from before the references were asked for.
        """
        count, rest = divmod(len(runs), 12)
        if rest or not 0 < count <= MAX_RUNS:
            raise ValueError(f"{len(runs)} bytes are no packed runs")
        column = array("I", runs)
        address, _ = column.buffer_info()
        body = bytearray(_ATTACH.pack(_ATTACH.size, file, 0, domid, count, 0, address, epoch, 0))
        fcntl.ioctl(self.fileno(), ATTACH, body, True)
        return int(_ATTACH.unpack(body)[8])

    def detach(self, file: int) -> bool:
        """Let go of a file's pages; False if it had none."""
        try:
            fcntl.ioctl(self.fileno(), DETACH, _DETACH.pack(_DETACH.size, file))
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def detach_all(self) -> None:
        """Let go of all files of all views."""
        fcntl.ioctl(self.fileno(), DETACH, _DETACH.pack(_DETACH.size, -1))

    def state(self, file: int) -> tuple[int, int]:
        """Return how many pages of a file are attached, and how many it has."""
        body = bytearray(_STATE.pack(_STATE.size, file, 0, 0))
        fcntl.ioctl(self.fileno(), STATE, body, True)
        _, _, attached, pages = _STATE.unpack(body)
        return attached, pages

    def hold(self, on: bool) -> None:
        """Keep the guest from being suspended, as long as this process has what would not survive it; or no longer."""
        fcntl.ioctl(self.fileno(), HOLD, _HOLD.pack(_HOLD.size, int(on)))

    def close(self) -> None:
        """Close it; what is attached stays so. Twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> ViewControl:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

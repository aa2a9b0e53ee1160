"""Two ends of real byte rings over shared anonymous memory, with eventfds where Xen has event channels."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from sharearea.common.native import RING_CLIENT, RING_SERVER, BytesLike, Ring, ring_format


class MemoryChannel:
    """A channel as native.Vchan is one, within this machine. `memory` is the peer's too: a test may write any lie."""

    def __init__(self, memory: mmap.mmap, side: int, orders: tuple[int, int], ours: int, theirs: int) -> None:
        self.memory = memory
        self._ring = Ring(memory, side, *orders)
        self._ours, self._theirs = ours, theirs
        self._closed = False
        self.events = 0
        if side == RING_CLIENT:
            self._ring.connect()
            self.notify()

    def notify(self) -> None:
        """Send the peer an event."""
        os.eventfd_write(self._theirs, 1)

    def fileno(self) -> int:
        return self._ours

    def drain(self) -> bool:
        try:
            os.eventfd_read(self._ours)
        except BlockingIOError:
            return False
        self.events += 1
        return True

    def state(self) -> int:
        return self._ring.state()

    def read(self) -> bytes:
        data, notify = self._ring.read()
        if notify:
            self.notify()
        return data

    def write(self, buffers: Sequence[BytesLike]) -> int:
        count, notify = self._ring.write(buffers)
        if notify:
            self.notify()
        return count

    def die(self) -> None:
        """What the kernel does for a process that was killed."""
        self._ring.hang_up()
        self.notify()

    def abandon(self) -> None:
        """Like the end of the process, but that the other end is not told."""
        self._closed = True
        self._release()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.die()
        self._release()

    def _release(self) -> None:
        self._ring.close()
        os.close(self._ours)
        os.close(self._theirs)


def channel_pair(left_order: int = 12, right_order: int = 12) -> tuple[MemoryChannel, MemoryChannel]:
    """Return the server's and the client's end of fresh rings."""
    memory = mmap.mmap(-1, 4096 + (2 << 20))
    ring_format(memory, left_order, right_order)
    flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
    one, other = os.eventfd(0, flags), os.eventfd(0, flags)
    orders = (left_order, right_order)
    server = MemoryChannel(memory, RING_SERVER, orders, one, other)
    client = MemoryChannel(memory, RING_CLIENT, orders, os.dup(other), os.dup(one))
    return server, client

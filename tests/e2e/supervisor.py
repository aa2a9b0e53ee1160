"""A small service manager: `supervisor.py NOTIFY_SOCKET PID_FILE COMMAND...`.

Keeps the descriptors that its service stores with sd_notify(3), starts the service again whenever a signal killed it,
and hands it what it keeps. The service's process number is in PID_FILE. SIGTERM is passed on, and ends both.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from pathlib import Path


def main() -> int:
    """Run the service until it ends by itself; return its exit code."""
    address, pid_file, command = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(address)
    kept: list[tuple[str, int]] = []
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    while True:
        pid = _start(command, address, kept)
        pid_file.with_suffix(".new").write_text(str(pid))
        pid_file.with_suffix(".new").replace(pid_file)
        end = os.pidfd_open(pid)
        told = False
        while True:
            if stopping and not told:
                told = True
                os.kill(pid, signal.SIGTERM)
            ready, _, _ = select.select([manager.fileno(), end], [], [], 0.1)
            if manager.fileno() in ready:
                _take(manager, kept)
            elif end in ready:
                break
        os.close(end)
        _, status = os.waitpid(pid, 0)
        if stopping or not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)


def _start(command: list[str], address: str, kept: list[tuple[str, int]]) -> int:
    pid = os.fork()
    if pid:
        return pid
    environment = {**os.environ, "NOTIFY_SOCKET": address, "FDSTORE": "253"}
    if kept:
        # Above everything that is open, so that moving them down overwrites none of them.
        high = [os.dup2(fd, 500 + at) for at, (_, fd) in enumerate(kept)]
        for at, fd in enumerate(high):
            os.dup2(fd, 3 + at)
        environment["LISTEN_PID"] = str(os.getpid())
        environment["LISTEN_FDS"] = str(len(kept))
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in kept)
    os.closerange(3 + len(kept), 1000)
    os.execve(command[0], command, environment)


def _take(manager: socket.socket, kept: list[tuple[str, int]]) -> None:
    data, fds, flags, _ = socket.recv_fds(manager, 65536, 253)
    assert not flags & socket.MSG_CTRUNC
    lines = dict(line.split("=", 1) for line in data.decode().splitlines())
    name = lines.get("FDNAME", "stored")
    if lines.get("FDSTORE") == "1":
        kept += [(name, fd) for fd in fds]
    elif lines.get("FDSTOREREMOVE") == "1":
        for entry in [entry for entry in kept if entry[0] == name]:
            kept.remove(entry)
            os.close(entry[1])


if __name__ == "__main__":
    sys.exit(main())

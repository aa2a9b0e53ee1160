"""The service manager's descriptor store: how a restarted broker finds its segments again.

Speaks sd_notify(3) and sd_listen_fds(3) with plain sockets and environment variables: systemd's protocol, which other
supervisors have too. What a descriptor is, and whether to trust it, is the area's to find out (area/local.py).
"""

from __future__ import annotations

import array
import os
import re
import socket
from collections.abc import Sequence
from typing import Final

from .common.errors import HostError

FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
MAX_FDS: Final = 253  # SCM_MAX_FD: what one datagram can carry

_SEND_TIMEOUT_S: Final = 5.0  # a service manager that is busy reloading reads late, one that hangs must not hang us

# sd_pid_notify_with_fds(3): ASCII without control characters and ":", 255 at the most.
_NAME: Final = re.compile(r"[!-9;-~][ -9;-~]{0,254}")


def available() -> bool:
    """Tell whether a service manager is there that may keep descriptors.

    systemd says so with $FDSTORE since version 254 only, so that without the variable nothing is certain: a manager
    that keeps nothing ignores what it gets.
    """
    return _address() is not None and os.environ.get("FDSTORE") != "0"


def notify(state: str, fds: Sequence[int] = ()) -> bool:
    """Send lines of sd_notify(3) and up to MAX_FDS descriptors, which stay the caller's.

    Returns False when there is no service manager to tell. Raises HostError when there is one and it cannot be told.
    """
    address = _address()
    if address is None:
        return False
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors; one datagram carries {MAX_FDS}")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_SEND_TIMEOUT_S)
            sock.connect(address)
            sock.sendmsg([state.encode()], rights, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise HostError(
            f"the service manager cannot be told: {error.strerror or error}", "see NOTIFY_SOCKET in the environment"
        ) from None
    return True


def store(name: str, fd: int) -> bool:
    """Give a duplicate of `fd` to the service manager under `name`; inherited() of a later start has it.

    The name need not be unique. It is ASCII without ":" and control characters, 1 to 255 long, else ValueError. Returns
    and raises as notify() does; a manager that keeps nothing, or whose store is full, says nothing.
    """
    return notify(f"FDSTORE=1\nFDNAME={_checked(name)}", (fd,))


def remove(name: str) -> bool:
    """Have the service manager close everything that it keeps under `name`. Returns and raises as notify() does."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")


def inherited() -> dict[str, list[int]]:
    """Return the descriptors that the service manager gave to this process, by name; they are the caller's.

    They become close-on-exec and the variables that announced them are removed, so that neither a child nor a second
    call takes them for its own. Descriptors without a name come under "unknown". Raises HostError if the variables
    announce what is not there; nothing is closed then.
    """
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    os.environ.pop("LISTEN_PIDFDID", None)
    if pid != str(os.getpid()):
        return {}  # meant for another process: ours only inherited the environment
    if not re.fullmatch(r"[0-9]{1,9}", count):
        raise HostError(f"LISTEN_FDS={count!r} is no number", "the service manager set it; see sd_listen_fds(3)")
    fds = range(FIRST_FD, FIRST_FD + int(count))
    labels = names.split(":") if names else ["unknown"] * len(fds)
    if len(labels) != len(fds):
        raise HostError(
            f"LISTEN_FDNAMES names {len(labels)} descriptors, LISTEN_FDS says {len(fds)}",
            "the service manager set them; see sd_listen_fds(3)",
        )
    found: dict[str, list[int]] = {}
    for label, fd in zip(labels, fds, strict=True):
        try:
            os.set_inheritable(fd, False)
        except OSError:
            raise HostError(
                f"LISTEN_FDS={count} announces descriptor {fd}, which is not open",
                "the service manager set it; see sd_listen_fds(3)",
            ) from None
        found.setdefault(label, []).append(fd)
    return found


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a descriptor")
    return name


def _address() -> str | None:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@") and len(address) > 1:
        return "\0" + address[1:]
    return address if address.startswith("/") else None

"""Xen's toolstack as this project needs it: the domains of the host, its limits and memory, and area domains made and
destroyed.

Everything goes through `xl` and `xenhypfs`, the tools that every dom0 has and whose words have been stable; no library
of Xen's is loaded here. A call of them costs a process, so nothing here belongs on a hot path. What an area domain
holds, and how pages get there, is area/xen.py's.
"""

from __future__ import annotations

import os
import re
import subprocess
import uuid as uuids
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..common.errors import HostError
from ..common.native import EXTENSION_FILE, PAGE_SIZE

AREA_PREFIX: Final = "sharearea-"
"""What the name of every area domain begins with; the pool's name follows."""

STUB_NAME: Final = "area_stub.elf"

# Xen's own values where nobody set others (docs/misc/xen-command-line).
DEFAULT_GRANT_FRAMES: Final = 64
DEFAULT_MAPTRACK_FRAMES: Final = 1024

_MIB: Final = 1 << 20
_UNKNOWN_TOOLS: Final = "this release of Xen's tools is not known"
_TIMEOUT_S: Final = 60.0
_STUB_MIB: Final = 2  # the stub is loaded at 1 MiB; with memory = 1 the domain builder has no room for it (seen)


@dataclass(frozen=True, slots=True)
class HostInfo:
    """What `xl info` says of this host. Sizes in bytes."""

    release: str  # of Xen, "4.17.7"
    virt_caps: frozenset[str]
    total_memory: int
    free_memory: int
    commandline: str

    @property
    def can_run_pvh(self) -> bool:
        """Whether a PVH domain can be created: the CPU virtualises, and Xen has a way to translate its addresses."""
        return "hvm" in self.virt_caps and bool(self.virt_caps & {"hap", "shadow"})


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bounds of grant tables on this host, in frames; `source` says who told (xenhypfs, command line, default)."""

    grant_frames: int  # 512 entries each: what the table of one domain may have
    maptrack_frames: int  # 256 entries each: what one domain may map; a PV guest uses two entries for a page
    source: str


@dataclass(frozen=True, slots=True)
class ListedDomain:
    """One domain as `xl list` shows it. `memory` in bytes; a dying domain has no name (xl prints "(null)")."""

    domid: int
    name: str
    uuid: str
    memory: int
    paused: bool
    dying: bool

    @property
    def pool(self) -> str | None:
        """The pool that an area domain's name tells, None for every other domain. A name proves nothing."""
        return self.name.removeprefix(AREA_PREFIX) if self.name.startswith(AREA_PREFIX) else None


class Toolstack:
    """Ask and order through `xl`. Every failure is a HostError that says what to do.

    `xl` and `xenhypfs` are commands or paths; a call that takes longer than `timeout_s` seconds is killed.
    """

    def __init__(self, xl: str = "xl", xenhypfs: str = "xenhypfs", timeout_s: float = _TIMEOUT_S) -> None:
        self._xl = xl
        self._xenhypfs = xenhypfs
        self._timeout_s = timeout_s

    # --------------------------------------------------------------------------------------------------- asking

    def host(self) -> HostInfo:
        """Return what Xen says of the host."""
        info = _pairs(self._run([self._xl, "info"]))
        try:
            return HostInfo(
                release=info["xen_version"],
                virt_caps=frozenset(info["virt_caps"].split()),
                total_memory=int(info["total_memory"]) * _MIB,
                free_memory=int(info["free_memory"]) * _MIB,
                commandline=info.get("xen_commandline", ""),
            )
        except (KeyError, ValueError) as error:
            raise HostError(f"xl info says nothing usable: {error}", _UNKNOWN_TOOLS) from None

    def free_memory(self) -> int:
        """Return the bytes of memory that no domain and not Xen itself uses."""
        return self.host().free_memory

    def limits(self) -> HostLimits:
        """Return the bounds of grant tables: as Xen has them now, as its command line set them, or its defaults."""
        try:
            frames, maptrack = (
                int(self._run([self._xenhypfs, "cat", f"/params/{name}"]))
                for name in ("gnttab_max_frames", "gnttab_max_maptrack_frames")
            )
        except (HostError, ValueError):  # no such tool, a Xen built without it, or no right to it
            pass
        else:
            return HostLimits(frames, maptrack, "xenhypfs")
        commandline = self.host().commandline
        set_frames, set_maptrack = (
            _option(commandline, name) for name in ("gnttab_max_frames", "gnttab_max_maptrack_frames")
        )
        known = set_frames is not None or set_maptrack is not None
        return HostLimits(
            DEFAULT_GRANT_FRAMES if set_frames is None else set_frames,
            DEFAULT_MAPTRACK_FRAMES if set_maptrack is None else set_maptrack,
            "command line" if known else "default",
        )

    def domains(self) -> tuple[ListedDomain, ...]:
        """Return every domain that Xen knows, dom0 and dying ones too, ascending by domid."""
        found = []
        for line in self._run([self._xl, "list", "-v"]).splitlines()[1:]:
            match = _LISTED.fullmatch(line)
            if match is None:
                raise HostError(f"xl list says {line!r}", _UNKNOWN_TOOLS)
            name, domid, memory, state, uuid = match.groups()
            found.append(
                ListedDomain(
                    domid=int(domid),
                    name="" if name == "(null)" else name,
                    uuid=uuid,
                    memory=int(memory) * _MIB,
                    paused="p" in state,
                    dying="d" in state,
                )
            )
        return tuple(sorted(found, key=lambda domain: domain.domid))

    def areas(self) -> tuple[ListedDomain, ...]:
        """Return the domains that are named like area domains."""
        return tuple(domain for domain in self.domains() if domain.pool is not None)

    def find(self, uuid: bytes) -> ListedDomain | None:
        """Return the living domain with this uuid (16 bytes), None if there is none.

        A domain that dies but is still mapped keeps its uuid and does not count. Raises HostError if two have it.
        """
        wanted = str(uuids.UUID(bytes=uuid))
        found = [domain for domain in self.domains() if domain.uuid == wanted and domain.domid and not domain.dying]
        if len(found) > 1:
            raise HostError(
                f"domains {', '.join(str(domain.domid) for domain in found)} have one uuid, {wanted}",
                "xl destroy the one that is not the area",
            )
        return found[0] if found else None

    # -------------------------------------------------------------------------------------------------- ordering

    def create(self, pool: str, uuid: bytes, *, max_bytes: int, grant_frames: int) -> int:
        """Create the area domain of a pool, paused for ever, and return its domid.

        `uuid` (16 bytes) names it; it may come to hold `max_bytes` of pages, and its grant table may grow to
        `grant_frames`, which must not be more than limits() says. An area domain that has the uuid already is destroyed
        first: the caller knows that nothing of it is needed. If this fails nothing is left of it.
        """
        name = AREA_PREFIX + pool
        kernel = stub_path()
        own = str(uuids.UUID(bytes=uuid))
        for domain in self.domains():
            if domain.uuid == own and not domain.dying and domain.name in (name, ""):  # "": xl was not so far
                self.destroy(domain.domid)
            elif domain.name == name:
                raise HostError(
                    f"there is a domain {name} already, {domain.domid} with uuid {domain.uuid}, which is not this area",
                    f"if nothing needs it any more: sharearea area destroy {domain.uuid}",
                )
        config = _config(
            {
                "name": name,
                "uuid": own,
                "type": "pvh",
                "kernel": str(kernel),
                "vcpus": 1,
                # With maxmem above it the domain would be populated on demand: raise_memory() comes after.
                "memory": _STUB_MIB,
                "shadow_memory": paging_bytes(max_bytes) // _MIB,
                "max_grant_frames": grant_frames,
                "max_maptrack_frames": 0,
                "max_grant_version": 1,
                **dict.fromkeys(("on_poweroff", "on_reboot", "on_crash", "on_watchdog", "on_soft_reset"), "preserve"),
            }
        )
        fd = os.memfd_create("sharearea-area.cfg")  # xl reads plain files only, and this one cannot be left behind
        try:
            os.write(fd, config)
            # -e: nobody has to wait for the end of a domain that never runs.
            self._run([self._xl, "create", "-p", "-e", "-q", f"/proc/self/fd/{fd}"], pass_fds=(fd,))
        except HostError as error:
            self._remove_half_made(uuid)
            raise self._why_not(error) from None
        finally:
            os.close(fd)
        made = self.find(uuid)
        if made is None:
            raise HostError(f"domain {name} was created and is not there", "see `xl dmesg` and /var/log/xen")
        try:
            self.raise_memory(made.domid, max_bytes)
        except HostError:
            self.destroy(made.domid)
            raise
        return made.domid

    def raise_memory(self, domid: int, max_bytes: int) -> None:
        """Let an area domain hold `max_bytes` of pages besides its own few. Nothing is allocated by that."""
        mib = _STUB_MIB + -(-max_bytes // _MIB)
        self._run([self._xl, "mem-max", str(domid), str(mib)])

    def set_memory(self, domid: int, size: int) -> None:
        """Set a domain's memory target, and with it the most that Xen lets it have, to `size` bytes (whole KiB)."""
        self._run([self._xl, "mem-set", str(domid), f"{size // 1024}k"])

    def destroy(self, domid: int) -> None:
        """Destroy a domain. What others have mapped stays theirs until they unmap it; all else is free at once."""
        if domid == 0:
            raise ValueError("domain 0 is the host's own")
        self._run([self._xl, "destroy", str(domid)])

    # ---------------------------------------------------------------------------------------------------- within

    def _remove_half_made(self, uuid: bytes) -> None:
        try:
            left = self.find(uuid)
            if left is not None:
                self.destroy(left.domid)
        except HostError:
            pass  # the first error says more

    def _why_not(self, error: HostError) -> HostError:
        """Find the reason for which a domain could not be created."""
        try:
            host, limits = self.host(), self.limits()
        except HostError:
            return error
        if not host.can_run_pvh:
            return HostError(
                f"this host cannot create a PVH domain: Xen has {' '.join(sorted(host.virt_caps))}",
                "switch on VT-x with EPT, or SVM with NPT, in the firmware (nested virtualisation where Xen is a guest "
                "itself), and do not start Xen with hap=0",
            )
        return HostError(
            f"the area domain cannot be created: {error.message}",
            f"free memory is {host.free_memory >> 20} MiB, grant tables may have {limits.grant_frames} frames; "
            "see `xl dmesg` and /var/log/xen",
        )

    def _run(self, command: Sequence[str], pass_fds: Sequence[int] = ()) -> str:
        what = " ".join(command[:2])
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
                pass_fds=pass_fds,
                start_new_session=True,  # Ctrl-C at the broker's terminal must not end xl in the middle of its work
            )
        except FileNotFoundError:
            raise HostError(
                f"there is no command {command[0]}", "run this in dom0 of a Xen host, with xen-utils installed"
            ) from None
        except subprocess.TimeoutExpired:
            raise HostError(f"{what} took more than {self._timeout_s:g} s", "is xenstored alive?") from None
        except OSError as error:
            raise HostError(f"{what}: {error.strerror}") from None
        if done.returncode != 0:
            said = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
            raise HostError(
                f"{what} failed: {said or f'exit code {done.returncode}'}", "run this as root in dom0 of a Xen host"
            )
        return done.stdout


def stub_path() -> Path:
    """Return the kernel of area domains, which the build put beside the extension. Raises HostError if it did not."""
    path = Path(EXTENSION_FILE).parent / STUB_NAME
    if not path.exists():
        raise HostError(
            f"{path} is missing: this installation was built without the kernel of area domains",
            "build it again where the C compiler makes 32-bit x86 code (gcc -m32)",
        )
    return path


# Name, ID, Mem, VCPUs, State, Time(s), UUID, Reason-Code, Security Label. Names may contain anything.
_LISTED: Final = re.compile(
    r"(.*?) +(\d+) +(\d+) +\d+ +([a-z-]+) +\d+\.\d+ +([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?: .*)?"
)


def _pairs(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _option(commandline: str, name: str) -> int | None:
    """Value of a number on Xen's command line; the last one counts."""
    found = re.findall(rf"(?:^|\s){name}=(0[xX][0-9a-fA-F]+|\d+)", commandline)
    return int(found[-1], 0) if found else None


def paging_bytes(max_bytes: int) -> int:
    """Return what Xen sets aside, at once, for the tables in which it looks an area domain's pages up.

    8 bytes for each of `max_bytes` of pages, and a floor. That is what 4 KiB extents need, the worst case; 2 MiB
    extents need a 512th of it. libxl's own rule would take four times as much (libxl_get_required_shadow_memory).
    """
    return (2 + -(-max_bytes * 8 // PAGE_SIZE // _MIB)) * _MIB


def _config(values: dict[str, str | int]) -> bytes:
    """Write values as xl.cfg(5) has them."""
    lines = []
    for key, value in values.items():
        if isinstance(value, str):
            if not value.isprintable() or '"' in value or "\\" in value:
                raise HostError(f"{value!r} cannot stand in a domain's configuration")
            lines.append(f'{key} = "{value}"')
        else:
            lines.append(f"{key} = {value}")
    return ("\n".join(lines) + "\n").encode()

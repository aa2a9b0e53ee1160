"""One Xen host in an emulator: boots it, makes guests in it, runs commands in all of them, and ends what it started.

`python -m tests.xen.lab up|create|d0|guest|put|down` is the same for the hand (README.md). The emulator is QEMU without
hardware help (TCG), so that it runs anywhere. Two of its settings are musts: `-smap`, with which dom0 dies in its first
instructions, and Xen's `xsave=0`, without which vector registers get lost now and then when a virtual CPU is switched,
silently, so that hashes come out wrong. And once in hours nothing is scheduled any more, as if a timer of Xen's were
lost: it took 122, 394 and 397 s, which a guest's kernel calls a stall, until a device interrupted (probably the user
network's router advertisement). So dom0 gets a datagram every second, which nobody there wants.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .channel import PATIENCE, PORT, ChannelError, CommandFailed, Machine
from .images import FOLDER, ImageError, Images, build

STATE: Final = FOLDER / "lab.json"
PASSED: Final = 77
"""QEMU's exit code when dom0 itself has said that the run is over and good. Nothing else ends QEMU with it."""

MEMORY_MIB: Final = 2560
DOM0_MIB: Final = 640
GUEST_MIB: Final = 192
DISKS: Final = ("vdb", "vdc", "vdd", "vde")
"""dom0's names of the guests' disks: four copies, each written by itself alone, of one image."""
SYSTEMD_DISK: Final = "vdg"
"""dom0's name of the disk of the one guest that may have systemd; a copy of another image."""
BOOT_S: Final = 120.0
GUEST_BOOT_S: Final = 90.0

# A switch of the virtual CPU empties the emulator's caches of translations: with Xen's 1 ms between switches three busy
# guests take three times as long as with 20 ms (measured). No mitigations, for a third less: nothing speculates here.
XEN_OPTIONS: Final = (
    f"dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M dom0_max_vcpus=1 com1=115200,8n1 console=com1 loglvl=info guest_loglvl=info "
    "noreboot bootscrub=0 xsave=0 sched_ratelimit_us=20000 spec-ctrl=no "
    "gnttab_max_frames=1024 gnttab_max_maptrack_frames=2048"
)
DOM0_OPTIONS: Final = "console=hvc0 loglevel=6 panic=0 mitigations=off"

Say = Callable[[str], None]


class LabError(Exception):
    """The lab did not do what every run needs; what is under test may still be good."""


@dataclass(slots=True)
class Guest:
    """A guest: its name, its kind ("pv" or "pvh") and which of the disks it has."""

    name: str
    kind: str
    disk: str
    address: str
    machine: Machine

    @property
    def console(self) -> str:
        """Where dom0 keeps its console's output."""
        return f"/var/log/xen/console/guest-{self.name}.log"


class Lab:
    """A running Xen host. `with Lab(say) as lab:` ends everything that was started, and keeps logs if it went wrong."""

    def __init__(self, say: Say = print, *, xen_options: str = "", memory_mib: int = MEMORY_MIB) -> None:
        self._say = say
        self._xen_options = f"{XEN_OPTIONS} {xen_options}".strip()
        self._memory_mib = memory_mib
        self._scratch: Path | None = None
        self._pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._port = self._beat_port = 0
        self.guests: dict[str, Guest] = {}

    # ------------------------------------------------------------------------------------------------- its own life

    def start(self, images: Images | None = None, *, stay: bool = False) -> None:
        """Boot Xen and dom0; return when dom0 takes commands and xl works. `stay`: outlive this process."""
        images = images or build(self._say)
        # The disks' written parts are files in here that QEMU has already unlinked; sockets have short names.
        self._scratch = Path(tempfile.mkdtemp(prefix="sharearea-xen-"))
        for old in ("serial.log", "qemu.log", "xl-dmesg.log", *(p.name for p in FOLDER.glob("console-*.log"))):
            (FOLDER / old).unlink(missing_ok=True)
        kernel = f"{images.kernel} {DOM0_OPTIONS},{images.dom0_ramdisk}"
        words = [
            # One CPU: with two, Xen spends up to 70 % of both spinning for locks whose holder was preempted
            # (sampled), and a run takes three times as long.
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "pc", "-cpu", "max,-smap", "-smp", "1"),
            *("-m", str(self._memory_mib), "-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{FOLDER / 'serial.log'}"),
            *("-qmp", f"unix:{self._scratch / 'qmp'},server=on,wait=off"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
            *("-kernel", str(images.xen), "-append", self._xen_options, "-initrd", kernel),
            *("-nic", "user,model=virtio-net-pci,restrict=on,hostfwd=" + ",hostfwd=".join(_FORWARDED.values())),
        ]
        systemd = [images.systemd_root] if images.systemd_root is not None else []
        for image in (images.dom0_root, *(images.guest_root for _ in DISKS), images.guest_boot, *systemd):
            words += ["-drive", f"file={image},if=virtio,format=raw,snapshot=on,cache=unsafe"]
        with (FOLDER / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"TMPDIR": str(self._scratch)},
                start_new_session=True,
                preexec_fn=None if stay else _die_with_parent,
            )
        self._pid = self._process.pid
        begun = time.monotonic()
        try:
            self.wait("QEMU's control socket", (self._scratch / "qmp").exists, limit=20)
            self._port, self._beat_port = self._forwarded_ports(self._scratch / "qmp")
            threading.Thread(target=self._beat, name="sharearea-xen-beat", daemon=True).start()
            self.wait("dom0", lambda: self.dom0.try_run("test -e /run/lab-ready", timeout=5).code == 0, limit=BOOT_S)
        except BaseException:
            self.stop()
            raise
        self._save()
        self._say(f"dom0 is up after {time.monotonic() - begun:.1f} s, {self.cpu_seconds():.0f} s of CPU")

    @classmethod
    def attach(cls, say: Say = print) -> Lab:
        """Return the lab that `up` left running. LabError if there is none."""
        try:
            state = json.loads(STATE.read_text())
            lab = cls(say)
            lab._pid, lab._port, lab._scratch = state["pid"], state["port"], Path(state["scratch"])
            for name, (kind, disk, address) in state["guests"].items():
                lab.guests[name] = Guest(name, kind, disk, address, lab._machine(name, address))
        except (OSError, ValueError, KeyError, TypeError):
            raise LabError("no lab is running; start one: python -m tests.xen.lab up") from None
        if not lab.alive:
            raise LabError("the lab has ended; start one: python -m tests.xen.lab up")
        return lab

    def stop(self) -> None:
        """End QEMU, and with it everything inside. Twice is fine."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)
            end = time.monotonic() + 10
            while self.alive and time.monotonic() < end:
                time.sleep(0.05)
            if self.alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(20)
        STATE.unlink(missing_ok=True)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def finish(self) -> int:
        """Have dom0 say that all is good, which ends QEMU; return QEMU's exit code: PASSED, or something went wrong."""
        assert self._process is not None
        # The device ends QEMU with (value << 1) | 1. dom0 may use the port because Xen leaves it to dom0.
        self.dom0.start("python3", "-c", _EXIT.format(PASSED >> 1))
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            return -1

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        if self._process is not None:
            return self._process.poll() is None
        with contextlib.suppress(OSError):
            return b"qemu-system-x86_64" in Path(f"/proc/{self._pid}/cmdline").read_bytes()
        return False

    def __enter__(self) -> Lab:
        """Start the lab."""
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Stop the lab; keep what it says if it did not go well."""
        if kind is not None:
            self.keep_logs()
        self.stop()

    def keep_logs(self) -> None:
        """Copy what Xen and the guests' consoles say to build/xen; the serial log is there already."""
        with contextlib.suppress(ChannelError):
            (FOLDER / "xl-dmesg.log").write_text(self.dom0.try_run("xl dmesg; xl list -v", timeout=30).out)
            (FOLDER / "dom0-dmesg.log").write_text(self.dom0.try_run("dmesg", timeout=30).out)
            names = self.dom0.try_run("ls /var/log/xen/console", timeout=30).out.split()
            for name in names:
                found = self.dom0.try_run(f"tail -c 200000 /var/log/xen/console/{name}", timeout=30)
                (FOLDER / f"console-{name.removeprefix('guest-')}").write_bytes(found.data)

    def cpu_seconds(self) -> float:
        """Return the CPU time that QEMU has used: what a step costs, however busy this machine is."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def wait(self, what: str, done: Callable[[], Any], *, limit: float = 60, pause: float = 0.1) -> Any:
        """Ask `done()` until it says something true, and return that. LabError when the time is over or QEMU died."""
        end = time.monotonic() + limit * PATIENCE
        last = ""
        while True:
            try:
                found = done()
                if found:
                    return found
            except (ChannelError, CommandFailed) as error:
                last = f"; the last answer: {error}"
            if not self.alive:
                code = self._process.poll() if self._process is not None else "?"
                raise LabError(f"QEMU ended with {code} while waiting for {what}; see {FOLDER}/qemu.log, serial.log")
            if panic := self.panic():
                raise LabError(f"while waiting for {what}: {panic}")
            if time.monotonic() > end:
                raise LabError(f"after {limit:.0f} s: not yet {what}{last}")
            time.sleep(pause)

    def panic(self) -> str:
        """Return the line with which Xen or dom0 died; empty if they live."""
        try:
            text = (FOLDER / "serial.log").read_text(errors="replace")
        except OSError:
            return ""
        found = re.search(r"^.*(Panic on CPU|Kernel panic|Xen BUG|FATAL TRAP|Hardware Dom0 crashed).*$", text, re.M)
        return found[0].strip() if found else ""

    # ----------------------------------------------------------------------------------------------------- machines

    @property
    def dom0(self) -> Machine:
        """The control domain."""
        return Machine("dom0", self._port)

    def guest(self, name: str) -> Machine:
        """A guest, by its name."""
        return self.guests[name].machine

    def create(
        self,
        name: str,
        kind: str,
        *,
        memory_mib: int = GUEST_MIB,
        vcpus: int = 1,
        wait: bool = True,
        uuid: str = "",
        systemd: bool = False,
    ) -> Guest:
        """Make a guest with a disk of its own, and wait until it takes commands.

        `uuid`: a chosen one. `systemd`: with systemd as process 1, for which there is one disk.
        """
        taken = {guest.disk for guest in self.guests.values()}
        disks = (SYSTEMD_DISK,) if systemd else DISKS
        free = [disk for disk in disks if disk not in taken]
        if not free:
            raise LabError("all disks are in use")
        number = (*DISKS, SYSTEMD_DISK).index(free[0]) + 11
        address = f"10.77.0.{number}"
        guest = Guest(name, kind, free[0], address, self._machine(name, address))
        lines: dict[str, object] = {
            "name": name,
            "type": kind,
            "kernel": f"/lab/boot/{kind}/vmlinux",
            "ramdisk": f"/lab/boot/{kind}/guest.cpio",
            "extra": f"console=hvc0 quiet panic=0 mitigations=off lab.name={name} lab.address={address}",
            "memory": memory_mib,
            "maxmem": memory_mib,
            "vcpus": vcpus,
            "disk": [f"format=raw,vdev=xvda,access=rw,script=/lab/hotplug,target={guest.disk}"],
            "vif": [f"mac=00:16:3e:77:00:{number:02x},script=/lab/hotplug"],
            "on_crash": "preserve",
            "on_reboot": "preserve",
        }
        if kind == "pvh":
            lines["tsc_mode"] = "native"  # RDTSCP is reported as RDTSC by this emulator
        if systemd:
            lines["extra"] = f"{lines['extra']} lab.init=systemd"
        if uuid:
            lines["uuid"] = uuid
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items())
        self.dom0.put(f"/run/lab/{name}.cfg", text)
        self.dom0.run(f"xl create -q /run/lab/{name}.cfg", timeout=60)
        self.guests[name] = guest
        self._save()
        if wait:
            self.wait_guest(name)
        return guest

    def wait_guest(self, name: str, *, limit: float = GUEST_BOOT_S) -> None:
        """Wait until a guest takes commands."""
        machine = self.guest(name)
        self.wait(f"guest {name}", machine.answers, limit=limit, pause=0.5)

    def destroy(self, name: str) -> None:
        """End a guest as if its power had failed; its disk is free afterwards, with what it wrote."""
        self.dom0.run(f"xl destroy {name}", timeout=60)
        del self.guests[name]
        self._save()

    def crash(self, name: str) -> None:
        """Have a guest's kernel panic; Xen keeps what is left of it until destroy()."""
        running = self.guest(name).start("/bin/sh", "-c", "echo c >/proc/sysrq-trigger")
        self.wait(f"{name} crashed", lambda: "c" in self.dom0.run(f"xl list {name}").split()[-2], limit=30, pause=0.5)
        running.close()

    def save(self, name: str, path: str | None = None) -> str:
        """Save a guest to a file in dom0, which ends it there; return the file's path."""
        path = path or f"/var/lib/xen/{name}.save"
        self.dom0.run(f"xl save {name} {path}", timeout=120)
        return path

    def restore(self, name: str, path: str | None = None) -> None:
        """Restore a saved guest, under a new domain number, and wait until it takes commands."""
        path = path or f"/var/lib/xen/{name}.save"
        self.dom0.run(f"xl restore {path} && rm {path}", timeout=120)
        self.wait_guest(name)

    def migrate(self, name: str) -> None:
        """Migrate a guest, running, to this same host, where it is another domain, and wait until it takes commands."""
        # An empty command in the place of ssh: xl runs the other words here.
        self.dom0.run(f"xl migrate -s '' {name} 'xl migrate-receive' 2>&1", timeout=120)
        self.wait_guest(name)

    def domid(self, name: str) -> int | None:
        """Return a domain's number now; None if there is no such domain."""
        done = self.dom0.try_run(f"xl domid {name}", timeout=20)
        return int(done.out) if done.code == 0 else None

    def free_mib(self) -> int:
        """Return the host's free memory in MiB, as Xen says."""
        return int(self.dom0.run("xl info free_memory", timeout=20))

    def _machine(self, name: str, address: str) -> Machine:
        return Machine(name, self._port, address)

    def _save(self) -> None:
        assert self._scratch is not None
        guests = {guest.name: (guest.kind, guest.disk, guest.address) for guest in self.guests.values()}
        state = {"pid": self._pid, "port": self._port, "scratch": str(self._scratch), "guests": guests}
        STATE.write_text(json.dumps(state))

    def _beat(self) -> None:
        """Have dom0's network device interrupt every second, as long as QEMU runs."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while self.alive:
                with contextlib.suppress(OSError):
                    sock.sendto(b"beat", ("127.0.0.1", self._beat_port))
                time.sleep(_BEAT_S)

    def _forwarded_ports(self, path: Path) -> list[int]:
        """Ask QEMU which ports of this host it took for dom0's: those of _FORWARDED."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            with sock.makefile("rw") as control:
                control.readline()
                for command in (
                    {"execute": "qmp_capabilities"},
                    {"execute": "human-monitor-command", "arguments": {"command-line": "info usernet"}},
                ):
                    control.write(json.dumps(command) + "\n")
                    control.flush()
                    answer = json.loads(control.readline())
        about = answer["return"]
        found = [re.search(rf"{kind}\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", about) for kind in _FORWARDED]
        if not all(found):
            raise LabError(f"QEMU does not name its ports: {answer}")
        return [int(each[1]) for each in found if each]


_BEAT_S: Final = 1.0
_FORWARDED: Final = {"TCP": f"tcp:127.0.0.1:0-:{PORT}", "UDP": "udp:127.0.0.1:0-:9"}
"""The command channel, and discard, where nobody listens."""
_EXIT: Final = "f = open('/dev/port', 'r+b', 0); f.seek(0xf4); f.write(bytes([{0}]))"


def _die_with_parent() -> None:
    # PR_SET_PDEATHSIG: a run that is killed leaves no QEMU behind.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


# ------------------------------------------------------------------------------------------------------- by hand


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one thing with a lab that stays up between calls."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.lab", description="A Xen host to try things on.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("build", help="build what it boots, where that is missing")
    up = verbs.add_parser("up", help="boot it")
    up.add_argument("--xen", default="", metavar="OPTIONS", help="more options for Xen's command line")
    up.add_argument("--memory", type=int, default=MEMORY_MIB, metavar="MIB", help="memory of the host")
    create = verbs.add_parser("create", help="make guests")
    create.add_argument("guests", nargs="+", metavar="NAME:KIND", help="KIND: pv or pvh")
    d0 = verbs.add_parser("d0", help="run a shell command in dom0")
    guest = verbs.add_parser("guest", help="run a shell command in a guest")
    guest.add_argument("name")
    for sub in (d0, guest):
        sub.add_argument("-t", "--timeout", type=float, default=120, metavar="SECONDS")
        sub.add_argument("-i", "--input", type=Path, metavar="FILE", help="its standard input")
        sub.add_argument("command", nargs="+", metavar="CMD")
    put = verbs.add_parser("put", help="copy files into a machine")
    put.add_argument("machine", metavar="dom0|NAME")
    put.add_argument("files", nargs="+", type=Path, metavar="FILE")
    put.add_argument("folder", metavar="FOLDER")
    verbs.add_parser("logs", help="copy the consoles and Xen's messages to build/xen")
    verbs.add_parser("down", help="end it")
    options = parser.parse_args(arguments)
    try:
        return _do(options)
    except (LabError, ChannelError, CommandFailed, ImageError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _do(options: argparse.Namespace) -> int:
    if options.verb == "build":
        build(print)
        return 0
    if options.verb == "up":
        with contextlib.suppress(LabError):
            Lab.attach()
            raise SystemExit("lab: one is running already")
        Lab(xen_options=options.xen, memory_mib=options.memory).start(stay=True)
        return 0
    lab = Lab.attach()
    machine = lab.dom0
    if getattr(options, "name", None):
        machine = lab.guest(options.name)
    match options.verb:
        case "create":
            for name, _, kind in (text.partition(":") for text in options.guests):
                begun = time.monotonic()
                lab.create(name, kind or "pv")
                print(f"{name} is up after {time.monotonic() - begun:.1f} s")
        case "d0" | "guest":
            data = options.input.read_bytes() if options.input else b""
            done = machine.try_run(" ".join(options.command), timeout=options.timeout, data=data)
            sys.stdout.buffer.write(done.data)
            sys.stderr.write(done.err)
            return 124 if done.code is None else done.code if done.code >= 0 else 128 - done.code
        case "put":
            machine = lab.dom0 if options.machine == "dom0" else lab.guest(options.machine)
            for file in options.files:
                machine.put(f"{options.folder}/{file.name}", file, mode=file.stat().st_mode & 0o777)
        case "logs":
            lab.keep_logs()
        case "down":
            lab.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

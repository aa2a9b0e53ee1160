"""What the Xen backend promises, one stage after the other on one host.

The order matters: every stage leaves the host in the state that the next one begins with, three guests that share.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import partial
from pathlib import Path

from .channel import Machine
from .host import BROKER_CONFIG, in_parallel, install
from .images import ROOT
from .run import Run, stage

GUESTS = {"g1": "pv", "g2": "pv", "g3": "pvh"}


@stage(limit=200)
def packages(run: Run) -> None:
    """The Debian packages install in dom0 and in three guests without a network, and switch nothing on."""
    _verify_units()
    for name, kind in GUESTS.items():
        run.lab.create(name, kind, wait=False)
    _install(run.lab.dom0, "sharearea", "broker.toml")
    for name in GUESTS:
        run.lab.wait_guest(name)
    in_parallel([partial(_install, run.lab.guest(name), "sharearea-agent", "agent.toml") for name in GUESTS])
    assert "enabled = false" in run.lab.dom0.run(f"cat {BROKER_CONFIG}")
    found = run.lab.guest("g1").run("ls /lib/x86_64-linux-gnu /usr/lib/python3/dist-packages")
    assert "libxen" not in found, "guests are to do without Xen's libraries"
    assert "lmdb" not in found


def _install(machine: Machine, package: str, config: str) -> None:
    install(machine, package)
    # The images leave documentation out, which is why dpkg says that some of it is missing.
    said = machine.run(
        f"{package} --version; dpkg --verify {package} | grep -v '^missing'; "
        f"cat /var/lib/dpkg/info/{package}.conffiles; test -e /lib/systemd/system/{package}.service && echo unit; "
        f"ls -d /etc/systemd/system/*.wants/{package}*; pgrep -f '[/]usr/bin/sharearea'; true",
        timeout=120,
    )
    version, *rest = said.split("\n")
    assert version.startswith(f"{package} "), said
    # Nothing differs from the package's, nothing is enabled, nothing was started.
    assert rest == [f"/etc/sharearea/{config}", "unit", ""], said


def _verify_units() -> None:
    """Have systemd check the units, with a program that is there in the place of ours."""
    with tempfile.TemporaryDirectory() as folder:
        for unit in (ROOT / "deploy" / "systemd").glob("*.service"):
            text = unit.read_text().replace("ExecStart=/usr/bin/sharearea", "ExecStart=/bin/true /usr/bin/sharearea")
            copy = Path(folder) / unit.name
            copy.write_text(text)
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert unit.name not in done.stderr, done.stderr


@stage(limit=60)
def silence(run: Run) -> None:
    """Nobody's log has a traceback, no kernel complained, and Xen did not either."""
    machines = [run.lab.dom0, *(guest.machine for guest in run.lab.guests.values())]
    for machine in machines:
        bad = machine.try_run(r"dmesg | grep -E 'BUG:|WARNING:|Oops|Call Trace|general protection|Out of memory'").out
        assert bad == "", f"{machine.name}: {bad}"

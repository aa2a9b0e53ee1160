"""What the package of the guest view's module brings besides it: units, drop-ins and hooks, read by their own readers.

That the hooks are called, and what DKMS makes of the package, is shown by tests/xen/view_packages.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sharearea_agent.config import AgentConfig
from sharearea_agent.view_mounts import drop_in

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "deploy" / "systemd"
VIEW = ROOT / "deploy" / "view"
NAMES = ("sharearea-agent.service", "sharearea-view.service", "sharearea-view-again.service")
DROP_IN = "lib/systemd/system/sharearea-agent.service.d"


def lacking(what: str) -> None:
    """Skip; where nothing may be skipped, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; tools/test_tools.sh installs it")
    pytest.skip(what)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Give a root folder with our units as the packages install them, and the programs that they start."""
    if not shutil.which("systemd-analyze"):
        lacking("there is no systemd-analyze")
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "bin").symlink_to("usr/bin")
    for name in (*NAMES, "sharearea-view-again.timer"):
        shutil.copy(UNITS / name, units)
    (tmp_path / DROP_IN).mkdir()
    shutil.copy(VIEW / "sharearea-agent-view.conf", tmp_path / DROP_IN / "view.conf")
    for program in ("sharearea-agent", "kill"):
        path = tmp_path / "usr/bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    for name in ("sysinit", "basic", "local-fs", "multi-user", "shutdown", "timers", "time-set", "time-sync"):
        (units / f"{name}.target").write_text("[Unit]\nDescription=of systemd\nDefaultDependencies=no\n")
    return tmp_path


def complaints(system: Path) -> str:
    """Return what systemd says of our units, folders named as it sees them."""
    words = ["systemd-analyze", "verify", f"--root={system}", "--man=no", *NAMES, "sharearea-view-again.timer"]
    done = subprocess.run(words, capture_output=True, text=True)
    return (done.stdout + done.stderr).replace(str(system), "")


def test_systemd_understands_every_word_of_the_units(system: Path) -> None:
    assert complaints(system) == ""
    with (system / DROP_IN / "view.conf").open("a") as file:
        file.write("DeviceAlow=/dev/shareview rw\n")
    assert "Unknown key 'DeviceAlow'" in complaints(system)


def test_systemd_understands_drop_ins_of_any_path(system: Path) -> None:
    text = '[agent]\nname = "g"\nbackend = "xen"\nfolders = ["/srv"]\n'
    text += 'views = [{ lower = "/srv/a b:c%d\'\\"\\\\", at = "/run/ü v" }, { lower = "/srv/c", at = "/run/c" }]\n'
    (system / DROP_IN / "sharearea-view.conf").write_text(drop_in(AgentConfig.parse(text.encode(), "x").views))
    assert complaints(system) == ""
    with (system / DROP_IN / "sharearea-view.conf").open("a") as file:
        file.write('BindReadOnlyPaths=-/run/c:"/srv/c\n')
    assert "Failed to parse BindReadOnlyPaths" in complaints(system)


def test_the_agents_unit_cannot_mount_and_the_views_unit_has_no_namespace() -> None:
    drop = (VIEW / "sharearea-agent-view.conf").read_text()
    assert "CapabilityBoundingSet=CAP_SYS_ADMIN\n" in drop
    assert "SystemCallFilter" not in drop  # the agent's own has no @mount
    assert re.search(r"^SystemCallFilter=@system-service$", (UNITS / NAMES[0]).read_text(), re.M)
    for name in NAMES[1:]:
        # systemd.exec(5): each of these would give the unit a mount namespace.
        assert not re.search(
            r"^(Protect|Private|ReadWrite|ReadOnly|Inaccess|NoExec|Bind|Mount|Root|Tempor)",
            (UNITS / name).read_text(),
            re.M,
        )


def test_the_hook_fails_nobody_and_ends_at_once_where_no_view_is_over_its_folder() -> None:
    if Path("/run/sharearea-view/plain").exists():
        pytest.skip("a view is over its folder here")
    for what in ("down", "up", "", "sideways"):
        done = subprocess.run([VIEW / "packages", what, "1"], capture_output=True, timeout=10)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert os.access(VIEW / "packages", os.X_OK)
    assert subprocess.run(["sh", "-n", str(VIEW / "packages")]).returncode == 0
    assert len(re.findall(r"timeout -k 5 60 ", (VIEW / "packages").read_text())) == 2


def test_apt_and_dpkg_are_told_of_the_hook_and_do_without_it() -> None:
    commands = re.findall(r'"(if .*)"', (VIEW / "apt.conf").read_text())
    commands += re.findall(r"^(?:pre|post)-invoke=(.*)$", (VIEW / "dpkg.cfg").read_text(), re.M)
    assert len(commands) == 4
    assert [re.findall(r"packages (\w+) \$PPID", command) for command in commands] == [["down"], ["up"]] * 2
    for command in commands:
        # What stays when the package is removed, but for its configuration.
        assert subprocess.run(["sh", "-c", command.replace("/usr/libexec", "/nowhere")]).returncode == 0
        # A hook that fails is nobody else's failure.
        assert subprocess.run(["sh", "-c", re.sub(r"/usr/libexec/\S+", "/bin/false", command)]).returncode == 0
    if not shutil.which("apt-config"):
        lacking("there is no apt-config")
    words = ["apt-config", "-c", str(VIEW / "apt.conf"), "dump", "--format", "%f %v%n"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"DPkg::Pre-Invoke:: {commands[0]}\n" in said
    assert f"DPkg::Post-Invoke:: {commands[1]}\n" in said

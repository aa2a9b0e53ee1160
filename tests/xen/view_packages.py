"""The guest view as packages bring it: DKMS, units under a running systemd, and package managers that change its files.

Stages of view.py. The module is built by DKMS in a Debian root of its own on this machine, as a guest would, and loaded
in a guest with systemd (whose own building would take an emulated hour). That guest has one view beside its folder, for
nginx, and one over its folder, with the files of a package that is upgraded by apt, dpkg and dnf.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from . import host
from .channel import Machine
from .images import AGENT_NEEDS, CACHE, Say, debian_root
from .kernel_log import complaints
from .run import Run, Stage

GUEST: Final = "s1"
OTHER: Final = "v1"
"""The guest that has the same files, so that they are shared; view.py has created it."""
BESIDE: Final = "/srv/www"
AT: Final = "/run/sharearea-view/www"
OVER: Final = "/srv/app"
PLAIN: Final = "/run/sharearea-view/plain/srv"
WWW_FILES, APP_FILES = 4, 3
_MAKE: Final = """
import os, random, sys
for folder, files, seed in (("/srv/www", 4, 5), ("/srv/app", 3, int(sys.argv[1]))):
    os.makedirs(sys.argv[2] + folder, exist_ok=True)
    made = random.Random(seed)
    for number in range(files):
        with open(f"{sys.argv[2]}{folder}/f{number}", "wb") as file:
            file.write(made.randbytes(200_000 + number * 7_777))
"""


# ------------------------------------------------------------------------------------------------------------- DKMS


def _kernel() -> str:
    """Return the release of the kernel that guests run: of several in the cache the one that was made last."""
    return max(CACHE.glob("boot-*/lib/modules/*"), key=lambda path: path.parents[2].stat().st_mtime).name


@contextlib.contextmanager
def _debian(say: Say) -> Iterator[Path]:
    """Give a Debian root with what builds the module and with package managers, and our packages in its /tmp."""
    needs = ("dkms", f"linux-headers-{_kernel()}", "mount", "dnf", "rpm", *AGENT_NEEDS)
    tree = debian_root("dkms", needs, say)
    with tempfile.TemporaryDirectory(prefix="sharearea-dkms-", dir=CACHE.parent) as folder:
        root = Path(folder) / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", str(tree), str(root)], check=True)
        for name in ("sharearea-agent", "sharearea-view-dkms"):
            shutil.copy(host.package(name), root / "tmp")
        yield root


def _in_root(root: Path, script: str, *, fails: bool = False) -> str:
    """Run a shell script in a Debian root, in a mount namespace of its own; return what it said."""
    inside = f"mount -t proc proc {root}/proc && exec chroot {root} /bin/sh -ec {shlex.quote(script)}"
    done = subprocess.run(
        ["unshare", "--mount", "/bin/sh", "-ec", inside],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LANG": "C.UTF-8"},
    )
    assert (done.returncode != 0) == fails, f"{script}: ended with {done.returncode}: {done.stdout[-4000:]}"
    return done.stdout


def _dkms(run: Run) -> None:
    kernel = _kernel()
    with _debian(run.say) as root:
        _in_root(root, "dpkg -i /tmp/sharearea*.deb")
        said = _in_root(root, "dkms status -m shareview")
        assert f", {kernel}, x86_64: installed" in said, said
        (built,) = (root / "lib/modules" / kernel / "updates" / "dkms").glob("shareview.ko*")
        module = CACHE.parent / "dkms" / built.name
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, module)
        # The same version again, as an upgrade, and away.
        _in_root(root, "dpkg -i /tmp/sharearea-view-dkms*.deb")
        assert built.exists(), "an upgrade leaves no module"
        _in_root(root, "dpkg --purge sharearea-view-dkms")
        assert not built.exists(), "the module outlives its package"
        left = [path for name in ("apt/apt.conf.d", "dpkg/dpkg.cfg.d") for path in (root / "etc" / name).glob("*view*")]
        assert not left, left
    run.about["dkms_module"] = module


# ------------------------------------------------------------------------------------------------------------ hooks

NOTE: Final = "/run/sharearea-view/down"
_HOOKED: Final = """
[agent]
name = "g"
backend = "xen"
folders = ["/srv"]
views = [{ lower = "/srv/app", over = true }]
"""


def _hooks(run: Run) -> None:
    """Without the module: who is noted while a package is set up, that nothing is left, that no run fails for us."""
    with _debian(run.say) as root:
        _in_root(root, "dpkg -i /tmp/sharearea*.deb")
        (root / "etc/sharearea/agent.toml").write_text(_HOOKED)
        (root / "run/sharearea-view/plain").mkdir(parents=True)  # a view was over its folder once
        note = root / NOTE.lstrip("/")
        names = root / "tmp/names"
        of_holders = f'for pid in $(sed "s/[^0-9]/ /g" {NOTE}); do cat /proc/$pid/comm 2>/dev/null; done'
        for version in (1, 2):
            _deb(root, version, f"{{ {of_holders}; }} >/tmp/names; true")
        _deb(root, 3, "kill -KILL $PPID")  # dpkg: its own hook is not called, and apt's is
        for command, holders in (
            ("apt-get install -y /tmp/lab-app_1.deb", ["apt-get", "dpkg"]),
            ("dpkg -i /tmp/lab-app_2.deb", ["dpkg"]),
            ("dpkg -r lab-app", []),
        ):
            names.write_text("")
            _in_root(root, command)
            assert names.read_text().split() == holders, f"{command}: {names.read_text()}"
            assert not note.exists(), f"{command} leaves views down"
        _in_root(root, "apt-get install -y /tmp/lab-app_3.deb", fails=True)
        held = json.loads(note.read_text())["holders"] if note.exists() else []
        assert len(held) <= 1, f"apt has not gone: {held}"
        # What a killed one has left counts no more.
        said = _in_root(root, "sharearea-agent view status; ! sharearea-agent view up --if-due 2>&1")
        assert "kept down by" not in said, said
        assert "unknown filesystem type 'shareview'" in said, said  # it tried: nobody holds it back
        (root / "tmp/lab.spec").write_text(_SPEC)
        _in_root(root, "rpmbuild -bb --define '_topdir /tmp/rpm' /tmp/lab.spec")
        for refuse in (True, False):
            (root / "tmp/noted").unlink(missing_ok=True)
            _in_root(root, f"rm -f /tmp/refuse; {'touch /tmp/refuse; ' if refuse else ''}{_DNF}", fails=refuse)
            assert json.loads((root / "tmp/noted").read_text())["holders"], "dnf takes no views down"
            left = json.loads(note.read_text())["holders"] if note.exists() else []
            assert not left, f"dnf leaves views down: {left}"


def _deb(root: Path, version: int, postinst: str) -> None:
    """Make a package of a file in the folder that the view is over, in the root's /tmp."""
    tree = root / f"tmp/lab-app_{version}"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "srv/app").mkdir(parents=True)
    (tree / "srv/app/version").write_text(f"{version}\n")
    (tree / "DEBIAN/control").write_text(_CONTROL.format(version))
    (tree / "DEBIAN/postinst").write_text(f"#!/bin/sh\n{postinst}\n")
    (tree / "DEBIAN/postinst").chmod(0o755)
    words = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(root / f"tmp/lab-app_{version}.deb")]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


_CONTROL: Final = (
    "Package: lab-app\nVersion: {}\nArchitecture: all\nMaintainer: lab <lab@lab.invalid>\nDescription: files\n"
)
_DNF: Final = "dnf -y --disablerepo='*' install /tmp/rpm/RPMS/noarch/lab-rpm-1-1.noarch.rpm"
_SPEC: Final = """
Name: lab-rpm
Version: 1
Release: 1
Summary: a file
License: none
BuildArch: noarch
%description
A file.
%install
mkdir -p %{buildroot}/srv/app
echo rpm > %{buildroot}/srv/app/from-rpm
%pre -p <lua>
local note = io.open("/run/sharearea-view/down")
if note then
  local kept = io.open("/tmp/noted", "w")
  kept:write(note:read("a"))
  kept:close()
end
if io.open("/tmp/refuse") then error("refused") end
%files
/srv/app/from-rpm
"""


# ---------------------------------------------------------------------------------------------------------- systemd


def _systemd(run: Run) -> None:
    lab = run.lab
    for name in [name for name in lab.guests if name != OTHER]:
        lab.destroy(name)  # their memory is wanted
    lab.create(GUEST, "pv", memory_mib=256, systemd=True, wait=False)
    lab.wait_guest(GUEST, limit=300)
    machine, other = lab.guest(GUEST), lab.guest(OTHER)
    run.say(f"  {GUEST}: {machine.run('systemctl is-system-running --wait || true', timeout=200).strip()}")
    for name in ("sharearea-agent", "sharearea-view-dkms"):
        machine.put(f"/tmp/{name}.deb", host.package(name))
    # No headers here: DKMS says so and is content.
    machine.run("dpkg -i /tmp/sharearea-agent.deb /tmp/sharearea-view-dkms.deb", timeout=400)
    host.put_tool(machine, "view_info")
    module: Path = run.about["dkms_module"]
    machine.put(f"/lib/modules/{machine.run('uname -r').strip()}/updates/dkms/{module.name}", module)
    machine.run("depmod", timeout=100)
    for guest in (machine, other):
        guest.run("python3 - 6 ''; sync", data=_MAKE.encode())
    _package(machine, 1, 6)
    broker = host.Broker(lab)
    broker.configure([{"name": name} for name in (GUEST, OTHER)], {}, {"max_area_bytes": "64 MiB"})
    broker.start()
    broker.wait()
    agent = host.Agent(lab, GUEST)
    views = [{"lower": BESIDE, "at": AT}, {"lower": OVER, "over": True}]
    agent.configure(["/srv"], views=views)
    sharer = host.Agent(lab, OTHER)
    sharer.configure(["/srv"])
    sharer.start()
    run.about |= {"broker": broker, "agent": agent, "sharer": sharer}
    machine.put("/etc/nginx/sites-available/default", f"server {{ listen 80; root {BESIDE}; sendfile on; }}\n")
    said = machine.run("sharearea-agent view drop-in --write nginx")
    assert "/etc/systemd/system/nginx.service.d/sharearea-view.conf" in said, said
    machine.run("apt-get install -y /tmp/lab-app_1.deb", timeout=200)
    # nginx runs since boot, without its drop-in.
    machine.run("systemctl daemon-reload && systemctl start sharearea-agent && systemctl restart nginx", timeout=200)
    _views_are(machine, True)
    # The agent and nginx have mount namespaces of their own.
    for unit, place in (("nginx", BESIDE), ("nginx", OVER), ("sharearea-agent", AT), ("sharearea-agent", OVER)):
        pid = machine.run(f"systemctl show -P MainPID {unit}").strip()
        assert _mounted(machine.run(f"cat /proc/{pid}/mountinfo"), place), f"{unit} has no view at {place}"
    assert machine.try_run(f"touch {OVER}/x").code != 0, "a view takes a new file"
    _filled(run, WWW_FILES + APP_FILES)
    before = host.view_counters(machine)
    fetch = "import urllib.request as u, hashlib; "
    fetch += "print(*(hashlib.sha256(u.urlopen(f'http://127.0.0.1/f{n}').read()).hexdigest() for n in range(4)))"
    sums = machine.run(f'python3 -c "{fetch}"').split()
    assert sums == other.run(f"cd {BESIDE}; sha256sum f* | cut -d' ' -f1").split(), "nginx serves other bytes"
    served = host.view_counters(machine)["read_bytes"] - before["read_bytes"]
    assert served >= 4 * 200_000, f"nginx has read {served} bytes of granted pages"
    run.number("systemd_nginx_read_bytes", served)
    # What is seen of files does not show where the agent looks at their plain ones.
    said = machine.run(f"sharearea-agent why --json {OVER}/f0")
    assert f'"reported_path": "{OVER}/f0"' in said, said
    assert '"code": "shared"' in said, said
    run.say("  " + machine.run("sharearea-agent view status").replace("\n", "; "))
    _quiet(run)


# ------------------------------------------------------------------------------------------------- package managers


def _package(machine: Machine, version: int, seed: int, postinst: str = "") -> None:
    """Make a Debian package of the files of the folder that a view is over: /tmp/lab-app_VERSION.deb."""
    tree = f"/tmp/lab-app_{version}"
    control = f"Package: lab-app\\nVersion: {version}\\nArchitecture: all\\nMaintainer: lab <lab@lab.invalid>\\n"
    script = f"printf '#!/bin/sh\\n{postinst}\\n' >{tree}/DEBIAN/postinst; chmod 755 {tree}/DEBIAN/postinst; "
    machine.run(
        f"mkdir -p {tree}/DEBIAN; python3 - {seed} {tree}; rm -r {tree}/srv/www; echo {version} >{tree}{OVER}/version; "
        f"printf '{control}Description: files\\n' >{tree}/DEBIAN/control; {script if postinst else ''}"
        f"dpkg-deb --root-owner-group -Znone --build {tree} /tmp/lab-app_{version}.deb >/dev/null",
        data=_MAKE.encode(),
    )


def _packages(run: Run) -> None:
    machine, other = run.lab.guest(GUEST), run.lab.guest(OTHER)
    for version, seed in ((2, 7), (3, 8), (5, 10)):
        _package(machine, version, seed)
    _package(machine, 4, 9, "sleep 1000")
    # A program that has a file of the view open all the while.
    reads = f"f = open('{OVER}/f0', 'rb')\nwhile input(): f.seek(0); print(len(f.read()))"
    reader = machine.start("python3", "-uc", reads)
    machine.run("apt-get install -y /tmp/lab-app_2.deb", timeout=300)
    _came_back(run, 2, 7)
    reader.write(b"x\n")
    assert reader.read_line(30).strip() == "200000", "the program that had it open reads no more"
    reader.close()
    machine.run("dpkg -i /tmp/lab-app_3.deb", timeout=300)
    _came_back(run, 3, 8)
    # apt and its dpkg are killed while a package is set up: nothing calls the hooks that bring the view up.
    apt = machine.start("apt-get", "install", "-y", "/tmp/lab-app_4.deb")
    sleeping = "pgrep -f '[l]ab-app.postinst' >/dev/null"  # not the shell that asks
    run.lab.wait("a package that is being set up", lambda: machine.try_run(sleeping).code == 0, limit=120, pause=1)
    assert not _up(machine, OVER), "the view is up while a package is set up"
    assert _up(machine, AT), "the view beside its folder went, too"
    machine.run("systemctl start sharearea-view-again")
    assert not _up(machine, OVER), "the view came up under a package manager"
    machine.run("systemctl restart sharearea-agent", timeout=100)
    assert not _up(machine, OVER), "the agent brought it up under apt"
    machine.run("kill -KILL $(pidof apt-get dpkg) $(pgrep -f '[l]ab-app.postinst')")
    apt.close()
    # By the timer alone.
    run.lab.wait("the view up again", lambda: _up(machine, OVER), limit=120, pause=2)
    _came_back(run, 4, 9)
    # The agent's command fails: the hook unmounts by itself, and the timer brings the view up when the command is well.
    command = "/usr/bin/sharearea-agent"
    machine.run(f"mv {command} /tmp/kept; printf '#!/bin/sh\nexit 1\n' >{command}; chmod 755 {command}")
    machine.run("dpkg -i /tmp/lab-app_5.deb", timeout=300)
    assert machine.run(f"cat {OVER}/version").strip() == "5"
    assert not _up(machine, OVER), "the view came up without the agent's command"
    assert _up(machine, AT), "the view beside its folder went, too"
    machine.run(f"mv /tmp/kept {command}")
    run.lab.wait("the view up again", lambda: _up(machine, OVER), limit=120, pause=2)
    _came_back(run, 5, 10)
    _dnf(run)
    for guest, agent in ((machine, run.about["agent"]), (other, run.about["sharer"])):
        bad = complaints(guest.run("dmesg"))[1]
        assert not bad, f"{guest.name}: the kernel's log has {bad}"
        assert agent.machine is guest
    # Without the package its views are gone, and everybody has the plain files.
    machine.run("systemctl stop sharearea-agent && dpkg -r sharearea-view-dkms", timeout=300)
    assert "shareview" not in machine.run("grep -v ' - ext4 ' /proc/self/mountinfo"), "a view outlives its package"
    machine.run(f"touch {OVER}/x && rm {OVER}/x")
    run.about["sharer"].stop()
    run.about["broker"].stop()


def _dnf(run: Run) -> None:
    """The same by dnf: a transaction that is refused, and one that is not."""
    machine = run.lab.guest(GUEST)
    machine.put("/tmp/lab.spec", _SPEC)
    machine.run("rpmbuild -bb --define '_topdir /tmp/rpm' /tmp/lab.spec", timeout=300)
    machine.run("touch /tmp/refuse")
    done = machine.try_run(_DNF, timeout=300)
    assert done.code != 0, done.out
    assert "refused" in done.out + done.err, f"it failed for another reason: {done.out[-2000:]}{done.err[-2000:]}"
    assert _up(machine, OVER), f"down after a refused transaction: {done.err}"
    machine.run(f"rm /tmp/refuse; {_DNF}", timeout=300)
    _views_are(machine, True)
    assert machine.run(f"cat {OVER}/from-rpm").strip() == "rpm"
    notes = machine.run("journalctl -b -o cat -u sharearea-view-again || true")
    assert "Traceback" not in notes, notes


def _came_back(run: Run, version: int, seed: int) -> None:
    """The view is up, shows the bytes of a version, and is filled again when the other guest has them."""
    machine, other = run.lab.guest(GUEST), run.lab.guest(OTHER)
    assert machine.run(f"cat {OVER}/version").strip() == str(version)
    _views_are(machine, True)
    other.run(f"python3 - {seed} ''; sync", data=_MAKE.encode())
    sums = other.run(f"cd {OVER}; sha256sum f*")
    assert machine.run(f"cd {OVER}; sha256sum f*") == sums, f"version {version}: other bytes through the view"
    _filled(run, WWW_FILES + APP_FILES)
    assert machine.run(f"cd {OVER}; sha256sum f*") == sums, f"version {version}: other bytes from granted pages"


# ------------------------------------------------------------------------------------------------------------ parts


def _up(machine: Machine, at: str) -> bool:
    """Whether everybody in a guest sees a view at a place."""
    return _mounted(machine.run("cat /proc/self/mountinfo"), at)


def _mounted(mountinfo: str, at: str) -> bool:
    """Whether what is on top at a place is a view."""
    lines = [line.split() for line in mountinfo.splitlines()]
    return [words[words.index("-") + 1] for words in lines if words[4] == at][-1:] == ["shareview"]


def _views_are(machine: Machine, up: bool) -> None:
    found = {at: _up(machine, at) for at in (AT, OVER)}
    assert set(found.values()) == {up}, found


def _filled(run: Run, files: int) -> None:
    """Wait until so many files of the views have pages attached."""
    agent: host.Agent = run.about["agent"]

    def attached() -> bool:
        for name, folder in ((GUEST, f"{PLAIN}/app"), (GUEST, BESIDE), (OTHER, OVER), (OTHER, BESIDE)):
            # What was evicted before it was seen is not reported.
            run.lab.guest(name).run(f"cat {folder}/f* >/dev/null")
        found: dict[str, Any] = agent.status().get("view", {})
        return int(found.get("attached_files", 0)) >= files

    run.lab.wait(f"{files} files attached", attached, limit=200, pause=1)


def _quiet(run: Run) -> None:
    """Nothing of ours has complained to the journal."""
    said = run.lab.guest(GUEST).run("journalctl -b -o cat -u sharearea-agent -u sharearea-view -u sharearea-view-again")
    assert "Traceback" not in said, said[-3000:]
    assert "agent.limit" not in said, said[-3000:]


STAGES: Final = (
    Stage("dkms", 900, "DKMS builds the module from its package, again for an upgrade, and takes it away", _dkms),
    Stage("hooks", 600, "apt, dpkg and dnf call the hooks, which hold views down for just as long as they run", _hooks),
    Stage("systemd", 900, "units, drop-ins and namespaces under systemd; nginx serves from a view", _systemd),
    Stage("packages", 900, "apt, dpkg and dnf change files under a view over its folder; apt is killed", _packages),
)

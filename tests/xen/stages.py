"""What the Xen backend promises, one stage after the other on one host.

The order matters: every stage leaves the host as the next one expects it, with a broker and three guests that share.
After whatever happened, two things are looked at: every byte that a program reads through its mapping (a hash in the
guest, compared with one from before there was any sharing), and whether store, grant table and frames agree
(inside/census.py).
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.lines import faults as line_faults

from .channel import ChannelError, Machine
from .host import BROKER_CONFIG, BROKER_LOG, POOL, Agent, Broker, Program, Talker, in_parallel, install
from .images import HERE, ROOT
from .kernel_log import complaints
from .link_run import LinkRun, build_peer
from .run import Run, stage

MIB: Final = 1 << 20
GUESTS: Final = {"g1": "pv", "g2": "pv", "g3": "pvh"}
PERL: Final = "/usr/lib/x86_64-linux-gnu/perl/5.36.0"
FOLDERS: Final = ("/usr/share/unicode", f"{PERL}/auto/Encode", f"{PERL}/CORE", f"{PERL}/auto/Unicode")
"""56 MiB in 170 files that no program of the guests runs on: their page cache can be dropped."""
UUID: Final = "5a1e0c7b-2d43-4f6a-9b18-0c6d7e8f9a01"
LABEL: Final = "office"
LEAST_SHARED: Final = 48 * MIB
BATCH: Final = 16 * MIB
"""What a guest of 192 MiB can surely keep in its page cache at a time, beside agent and program."""
SPARE_FILES: Final = 6
KEPT: Final = 15 * MIB
"""What stays open for the stages in which guests and areas come and go."""
STATE_DIR: Final = "/var/lib/sharearea"
POOL_KEYS: Final[dict[str, object]] = {"max_area_bytes": "128 MiB"}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the guests' image: what it held before sharearea came. `pages`: those that are not zero."""

    path: str
    size: int
    pages: int
    sha256: str


class World:
    """The broker, the agents and the programs, as the stages hand them on."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lab = run.lab
        self.broker = Broker(run.lab)
        self.agents = {name: Agent(run.lab, name) for name in GUESTS}
        self.programs: dict[str, Program] = {}
        self._census: Talker | None = None
        self.files: list[File] = []
        self.spare: list[File] = []
        """Files that nobody has opened yet."""
        self.held: dict[str, list[File]] = {name: [] for name in GUESTS}
        """What each guest's program has open."""

    def configure(self, *, broker: dict[str, object] | None = None, pool: dict[str, object] | None = None) -> None:
        """Write the broker's configuration: one guest by its name, one by name and uuid, one by its label."""
        domains: list[dict[str, object]] = [{"name": "g1"}, {"name": "g2", "uuid": UUID}, {"label": LABEL}]
        self.broker.configure(domains, broker or {}, POOL_KEYS | (pool or {}))

    def label(self) -> None:
        """Label the guest that is admitted by its label, as dom0 alone can."""
        self.lab.dom0.run(f"xenstore-write /local/domain/{self.lab.domid('g3')}/sharearea-label {LABEL}")

    def restart_broker(self, *, died: bool = False, words: Sequence[str] | None = None) -> None:
        """Start the broker, after stopping it unless it is dead, and wait until all guests are with it again.

        `words`: its command line, if it is another one than usual.
        """
        if not died:
            self.broker.stop()
        self.broker.start(words=words)
        self.broker.wait()
        self.wait_joined(GUESTS)

    def wait_joined(self, names: Iterable[str]) -> None:
        """Wait until these guests' agents are connected, and no others."""
        wanted = set(names)

        def joined() -> bool:
            found = self.broker.domains()
            return {name for name, about in found.items() if about["state"] == "connected"} == wanted

        self.lab.wait(f"{', '.join(sorted(wanted))} with the broker", joined, limit=60, pause=0.3)

    def read(self, name: str, files: Sequence[File]) -> None:
        """Read plain files in a guest, so that its page cache has them."""
        if files:
            self.lab.guest(name).run(f"cat {' '.join(file.path for file in files)} >/dev/null", timeout=60)

    def share(self, files: Sequence[File], names: Iterable[str] = GUESTS, *, limit: float = 90) -> None:
        """Have guests read files, and their programs open them, until all of their pages are shared everywhere."""
        names = list(names)
        in_parallel([partial(self.read, name, files) for name in names])
        in_parallel([partial(self.open, name, files) for name in names])
        self.wait_shared(names, files, limit=limit)

    def open(self, name: str, files: Sequence[File]) -> None:
        """Have the program of a guest open files."""
        for file in files:
            self.programs[name].open(file.path)
            self.held[name].append(file)
            if file in self.spare:
                self.spare.remove(file)

    def close(self, name: str, files: Sequence[File]) -> None:
        """Have the program of a guest close files."""
        for file in files:
            self.programs[name].ask(verb="close", name=file.path)
            self.held[name].remove(file)

    def wait_shared(
        self, names: Iterable[str] = GUESTS, files: Sequence[File] | None = None, *, limit: float = 90
    ) -> None:
        """Wait until every page of the files (default: what each has open) is shared in all of these guests.

        What a guest evicts from its cache before its agent has looked is not reported: files that are still plain are
        read once more, now and then, as many at a time as a guest can keep.
        """
        names = list(names)
        plain: dict[str, Any] = {}
        read_at = time.monotonic() + 5

        def shared() -> bool:
            nonlocal read_at
            plain.clear()
            again: list[File] = []
            for name in names:
                state = self.programs[name].state()
                wanted = self.held[name] if files is None else files
                found = [file for file in wanted if state.get(file.path, {}).get("pages") != file.pages]
                again += [file for file in found if file not in again]
                if found:
                    plain[name] = {file.path: state.get(file.path) for file in found[:3]}
            if plain and time.monotonic() > read_at:
                part = first_bytes(again, BATCH)
                in_parallel([partial(self.read, name, part) for name in names])
                read_at = time.monotonic() + 10
            return not plain

        try:
            self.lab.wait("all pages shared", shared, limit=limit, pause=0.5)
        except Exception as error:
            raise AssertionError(f"{error}; plain: {plain}") from None

    def wait_plain(self, name: str) -> None:
        """Wait until nothing is shared in a guest."""
        self.lab.wait(f"nothing shared in {name}", lambda: self.programs[name].shared_pages() == 0, limit=60)

    def check_bytes(self, names: Iterable[str] = GUESTS, files: Sequence[File] | None = None) -> None:
        """Hash files (default: what each has open) through their mappings, in every guest, and compare."""

        def check(name: str) -> None:
            for file in self.held[name] if files is None else files:
                found = self.programs[name].hash(file.path)
                assert found == file.sha256, f"{name}: {file.path} is {found} and was {file.sha256}"

        in_parallel([partial(check, name) for name in names])

    def census(self, *, look_at_bytes: bool = False) -> dict[str, Any]:
        """Count what there is (inside/census.py), and with `look_at_bytes` check that no slot's bytes are wrong."""
        if self._census is None or not self._census.alive:
            self.lab.dom0.put("/tmp/census.py", HERE / "inside" / "census.py")
            self._census = Talker(self.lab.dom0.start("python3", "-u", "/tmp/census.py"))
        found: dict[str, Any] = self._census.ask(pool=POOL, state=STATE_DIR, bytes=look_at_bytes)
        assert found.get("wrong", 0) <= 0, f"slots with other bytes than their fingerprint's: {found}"
        return found

    def check_agreement(self, *, look_at_bytes: bool = True, limit: float = 30) -> dict[str, Any]:
        """Check that owners and entries agree, and that every slot's bytes are right (I6, I3). Returns the census.

        While the broker is at work one is ahead of the other for a moment, so this waits for agreement.
        """
        found: dict[str, Any] = {}

        def agree() -> bool:
            nonlocal found
            found = self.census()
            assert found["domid"] >= 0, "there is no area domain"
            assert found["writable"] == 0, f"entries that are not read-only: {found}"
            if found["lost"] or found["unowned"]:
                return False
            if not look_at_bytes:
                return True
            found = self.census(look_at_bytes=True)
            return bool(found["wrong"] == 0)

        try:
            self.lab.wait("store and grant table in agreement", agree, limit=limit, pause=1)
        except Exception as error:
            raise AssertionError(f"{error}: {found}") from None
        return found

    def revive(self, name: str) -> None:
        """Start agent and program in a guest that has just been made."""
        self.agents[name] = Agent(self.lab, name)
        configure_agent(self.agents[name])
        # What a guest that lost its power had written last is not all there.
        self.agents[name].machine.run(f"rm -f {self.agents[name].log}")
        self.agents[name].start()
        self.programs[name] = Program(self.lab.guest(name))
        self.held[name].clear()


def first_bytes(files: Sequence[File], size: int) -> list[File]:
    """Return the first files that are no larger than `size` together; at least one."""
    found: list[File] = []
    for file in files:
        if found and sum(other.size for other in found) + file.size > size:
            break
        found.append(file)
    return found


def world(run: Run) -> World:
    """Return what the stages share."""
    found = run.about.get("world")
    if found is None:
        found = run.about["world"] = World(run)
        run.about["logs"] = [("dom0", BROKER_LOG, "broker.log")]
        run.about["logs"] += [(name, agent.log, f"agent-{name}.log") for name, agent in found.agents.items()]
    assert isinstance(found, World)
    return found


def configure_agent(agent: Agent) -> None:
    """Write an agent's configuration. On PVH user-space mappings are switched on, for this is what they are for."""
    agent.configure(FOLDERS, rescan_interval="15 s", allow_user_mappings=GUESTS[agent.guest] == "pvh")


# -------------------------------------------------------------------------------------------------------- packages


@stage(limit=150)
def packages(run: Run) -> None:
    """The Debian packages install in dom0 and in three guests without a network, and switch nothing on."""
    _verify_units()
    for name in GUESTS:
        make_guest(run, name)
    _install(run.lab.dom0, "sharearea", "broker.toml")
    for name in GUESTS:
        run.lab.wait_guest(name)
    in_parallel([partial(_install, run.lab.guest(name), "sharearea-agent", "agent.toml") for name in GUESTS])
    assert "enabled = false" in run.lab.dom0.run(f"cat {BROKER_CONFIG}")
    found = run.lab.guest("g1").run("ls /lib/x86_64-linux-gnu /usr/lib/python3/dist-packages")
    assert "libxen" not in found, "guests are to do without Xen's libraries"
    assert "lmdb" not in found


def make_guest(run: Run, name: str) -> None:
    """Make a guest, without waiting for it."""
    run.lab.create(name, GUESTS[name], wait=False, uuid=UUID if name == "g2" else "")


def _install(machine: Machine, package: str, config: str) -> None:
    install(machine, package)
    # The images leave documentation out, which is why dpkg says that some of it is missing.
    said = machine.run(
        f"{package} --version; dpkg --verify {package} | grep -v '^missing'; "
        f"cat /var/lib/dpkg/info/{package}.conffiles; test -e /lib/systemd/system/{package}.service && echo unit; "
        f"ls -d /etc/systemd/system/*.wants/{package}* 2>/dev/null; pgrep -f '[/]usr/bin/sharearea'; true",
        timeout=120,
    )
    version, *rest = said.split("\n")
    assert version.startswith(f"{package} "), said
    # Nothing differs from the package's, nothing is enabled, nothing was started.
    assert rest == [f"/etc/sharearea/{config}", f"/etc/logrotate.d/{package}", "unit", ""], said


def _verify_units() -> None:
    """Have systemd check the units, with a program that is there in the place of ours."""
    with tempfile.TemporaryDirectory() as folder:
        for unit in (ROOT / "deploy" / "systemd").glob("*.service"):
            text = re.sub(r"^(Exec\w+=)(/usr/bin/sharearea)", r"\1/bin/true \2", unit.read_text(), flags=re.MULTILINE)
            copy = Path(folder) / unit.name
            copy.write_text(text)
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert unit.name not in done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------------- rings


@stage(limit=60)
def rings(run: Run) -> None:
    """Rings with libxenvchan at either end: the right bytes arrive; and a guest cannot write what says who it is."""
    build_peer(run.say)
    link = LinkRun(run.lab, "g1", "g3")
    for machine in (run.lab.dom0, run.lab.guest("g1")):
        link.equip(machine)
    link.strangers("g1", ("ours_libxenvchan", "libxenvchan_ours"), MIB)
    link.rights("g1")
    for name, value in link.figures.items():
        run.number(f"rings_{name}", value)


# --------------------------------------------------------------------------------------------------------- sharing


@stage(limit=120)
def joining(run: Run) -> None:
    """A broker and three agents start; guests are admitted by name, by name and uuid, and by dom0's label."""
    it = world(run)
    it.files = choose_files(run.lab.guest("g1"))  # all guests have the same image
    it.spare = list(it.files)
    it.label()
    it.configure()
    run.about["free_mib"] = run.lab.free_mib()
    it.broker.start()
    it.broker.wait()
    in_parallel([partial(it.revive, name) for name in GUESTS])
    it.wait_joined(GUESTS)


@stage(limit=180)
def sharing(run: Run) -> None:
    """Three guests share at least 48 MiB of real files; every byte read through the mapping is compared."""
    it = world(run)
    count_map_calls(run.lab.guest("g1"))
    begun = time.monotonic()
    later = it.spare[-SPARE_FILES:]  # for the stages that publish and grant something new
    while batch := first_bytes([file for file in it.spare if file not in later], BATCH):
        it.share(batch)
        run.say(f"  {sum(file.size for file in it.held['g1']) / MIB:.1f} MiB are shared by three guests")
    seconds = time.monotonic() - begun
    shared = sum(file.size for file in it.held["g1"])
    assert shared >= LEAST_SHARED, f"{shared} bytes are shared"
    it.check_bytes()
    census = it.check_agreement()
    pages = sum(file.pages for file in it.held["g1"])
    assert len(census["by_domain"]) == 3, census
    pool = it.broker.pool()
    run.number("shared_mib", round(shared / MIB, 1))
    run.number("shared_files", len(it.held["g1"]))
    run.number("shared_pages_per_guest", pages)
    run.number("slots", census["slots"])
    run.number("grants", census["entries"])
    run.number("area_mib", round(pool["area_bytes"] / MIB, 1))
    run.number("host_memory_taken_mib", run.about["free_mib"] - run.lab.free_mib())
    run.number("sharing_s", round(seconds, 1))
    for name, agent in it.agents.items():
        run.number(f"agent_private_mib_{name}", round(agent.private_bytes() / MIB, 1))
    run.number("broker_private_mib", round(it.broker.private_bytes() / MIB, 1))


def choose_files(machine: Machine) -> list[File]:
    """Return real files of a guest, largest first, and what they hold: read before there is any agent."""
    where = " ".join(FOLDERS)
    found = machine.run(f"find {where} -type f -size +15k -perm -444 -printf '%s %p\\n' | sort -rn | head -n 70")
    sizes: dict[str, int] = {}
    for line in found.splitlines():
        size, path = line.split(" ", 1)
        if sum(sizes.values()) < 50 * MIB:
            sizes[path] = int(size)
    machine.put("/tmp/files.py", HERE / "inside" / "files.py")
    said = machine.run("python3 /tmp/files.py", data="\n".join(sizes).encode(), timeout=120)
    lines = (line.split(" ", 2) for line in said.splitlines())
    return [File(path, sizes[path], int(pages), digest) for pages, digest, path in lines]


# ----------------------------------------------------------------------------------------------------------- calls

MAP_GRANT_REF: Final = 0x184700  # ioctl number of <xen/gntdev.h>
TRACING: Final = "/sys/kernel/tracing"


def count_map_calls(machine: Machine) -> None:
    """Begin to count ioctls of gntdev in a guest's kernel, whoever makes them."""
    machine.run(
        f"mount -t tracefs tracefs {TRACING} && cd {TRACING} && "
        "echo 'p:gntdev gntdev_ioctl cmd=%si:u32' >kprobe_events && "
        "echo 'hist:keys=cmd.hex' >events/kprobes/gntdev/trigger && echo 1 >events/kprobes/gntdev/enable"
    )


def map_calls(machine: Machine) -> int:
    """Return how many map ioctls there were since count_map_calls()."""
    for line in machine.run(f"cat {TRACING}/events/kprobes/gntdev/hist").splitlines():
        words = line.replace("{", " ").replace("}", " ").replace(",", " ").split()
        if words[:1] == ["cmd:"] and int(words[1], 16) == MAP_GRANT_REF:
            return int(words[words.index("hitcount:") + 1])
    return 0


@stage(limit=60)
def calls(run: Run) -> None:
    """One map ioctl for up to 65,536 pages, counted by the guest's kernel, against one by one in the same run."""
    it = world(run)
    guest = run.lab.guest("g1")
    made = map_calls(guest)
    attached = sum(-(-file.pages // 65_536) for file in it.held["g1"])
    pages = sum(file.pages for file in it.held["g1"])
    run.number("map_ioctls", made)
    run.number("pages_per_map_ioctl", round(pages / max(1, made), 1))
    assert attached <= made, f"{made} map ioctls for {attached} files: the count is wrong"
    # An attachment may be made again, when a file is offered anew as more of it is published; never page by page.
    assert made <= 3 * attached, f"{made} map ioctls for {attached} attachments of {pages} pages"
    census = it.census()
    refs = census["refs"][str(run.lab.domid("g1"))][:512]
    guest.put("/tmp/map_calls.py", HERE / "inside" / "map_calls.py")
    order = json.dumps({"area": census["domid"], "refs": refs}).encode()
    said = json.loads(guest.run("python3 /tmp/map_calls.py", data=order, timeout=60))
    assert said["same"], "one by one, other bytes were read"
    assert said["single_calls"] == len(refs), said
    assert map_calls(guest) - made == 1 + len(refs), "the kernel counts as the program does"
    run.number("map_pages", len(refs))
    run.number("map_together_ms", said["together_ms"])
    run.number("map_single_ms", said["single_ms"])
    run.number("map_single_over_together", round(said["single_ms"] / said["together_ms"], 1))


# -------------------------------------------------------------------------------------------------------- refusals


class Holder:
    """A program of a guest that maps references by itself (grant_holder.py): what any program there could do."""

    def __init__(self, machine: Machine, area: int) -> None:
        machine.put("/tmp/grant_holder.py", HERE / "grant_holder.py")
        self._running = machine.start("python3", "/tmp/grant_holder.py")
        self._area = area

    def map(self, refs: Sequence[int], *, write: bool = False) -> dict[str, Any]:
        """Map references; return what came of it."""
        return self._ask(do="map", area=self._area, refs=list(refs), write=write)

    def drop(self) -> None:
        """Let go."""
        assert self._ask(do="drop")["ok"]

    def close(self) -> None:
        """End it."""
        self._running.close()

    def _ask(self, **order: Any) -> dict[str, Any]:
        self._running.write(json.dumps(order).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._running.read_line(60))
        return answer


EINVAL: Final = 22


@stage(limit=90)
def refusals(run: Run) -> None:
    """A writable mapping, a store, another guest's reference, a stale one: refused; the area's bytes unchanged."""
    it = world(run)
    before = it.census()
    owned: dict[str, list[int]] = {name: before["refs"][str(run.lab.domid(name))] for name in GUESTS}
    for name, refs in owned.items():
        others = [reference for other in GUESTS if other != name for reference in owned[other][:4]]
        guest = run.lab.guest(name)
        with contextlib.closing(Holder(guest, before["domid"])) as holder:
            answer = holder.map(refs[:4])
            assert answer["ok"], f"{name}: its own references: {answer}"
            assert len(answer["pages"]) == 4
            holder.drop()
            assert holder.map(refs[:1], write=True) == {"ok": False, "errno": EINVAL}, f"{name}: writable"
            for reference in others:
                answer = holder.map([reference])
                assert answer == {"ok": False, "errno": EINVAL}, f"{name}: another guest's {reference}: {answer}"
            beyond = [max(refs) + 5000, 3, 2**31]
            for reference in beyond:
                assert not holder.map([reference])["ok"], f"{name}: reference {reference}"
        for way in ("store", "mprotect"):
            guest.put("/tmp/stores.py", HERE / "inside" / "stores.py")
            order = json.dumps({"area": before["domid"], "ref": refs[0], "way": way}).encode()
            done = guest.try_run("python3 /tmp/stores.py", data=order, timeout=60)
            # xen-lab: a store is SIGSEGV; after mprotect SIGBUS on PV, and on PVH Xen throws it away without a word.
            wanted = {"store": (-11, 139), "mprotect": (-7, 135) if GUESTS[name] == "pv" else (0,)}[way]
            assert done.code in wanted, f"{name}: {way} ended with {done.code}: {done.err}"
    _stale(it)
    it.check_agreement()
    it.check_bytes()


def _stale(it: World) -> None:
    """A reference that a guest has given back is no longer good for it."""
    domid = str(it.lab.domid("g1"))
    before = it.census()
    file = it.held["g1"][-1]
    it.close("g1", [file])
    now: dict[str, Any] = {}

    def fewer() -> bool:
        nonlocal now
        now = it.census()
        return len(now["refs"][domid]) < len(before["refs"][domid])

    it.lab.wait("references given back", fewer, limit=40, pause=1)
    stale = sorted(set(before["refs"][domid]) - set(now["refs"][domid]))
    assert len(stale) == file.pages, f"{len(stale)} references of {file.pages} pages"
    with contextlib.closing(Holder(it.lab.guest("g1"), before["domid"])) as holder:
        for reference in (stale[0], stale[len(stale) // 2], stale[-1]):
            answer = holder.map([reference])
            assert answer == {"ok": False, "errno": EINVAL}, f"a stale reference, {reference}: {answer}"
    it.open("g1", [file])
    it.wait_shared(["g1"])


# ---------------------------------------------------------------------------------------------------------- killed


@stage(limit=180)
def broker_killed(run: Run) -> None:
    """The broker dies by -9 amid publishing, granting and revoking; index, table and reality agree afterwards."""
    it = world(run)
    kept = first_bytes(it.held["g1"], KEPT)
    in_parallel([partial(it.close, name, [file for file in it.held[name] if file not in kept]) for name in GUESTS])
    # A broker that can be told where to die; the one that is started last is the plain one again.
    dying = ["python3", "/tmp/broker_dies.py", "broker", "--config", BROKER_CONFIG]
    run.lab.dom0.put("/tmp/broker_dies.py", HERE / "inside" / "broker_dies.py")
    it.broker.kill()
    it.restart_broker(died=True, words=dying)
    for point, next_words in (("fill", dying), ("grant", dying), ("revoke", None)):
        run.lab.dom0.put("/tmp/die-at", point)
        closed = it.held["g1"][-3:] if point == "revoke" else []
        fresh = it.spare[: SPARE_FILES // 2] if not closed else []
        it.close("g1", closed)
        in_parallel([partial(it.read, name, fresh) for name in GUESTS])
        for name in GUESTS:
            it.open(name, fresh)
        it.broker.wait_gone(60)
        said = it.broker.faults()
        assert said == "", said
        cut = it.census()
        run.say(f"  died at {point}: {cut['lost']} owners without entry, {cut['unowned']} entries without owner")
        it.check_bytes()  # programs go on without a broker
        it.restart_broker(died=True, words=next_words)
        assert it.broker.events("area.adopted"), "the area was not found again"
        it.open("g1", closed)
        it.wait_shared()
        it.check_agreement()
        it.check_bytes()
    run.number("broker_killed_at", 3)


# ------------------------------------------------------------------------------------------------- lives of guests


@stage(limit=120)
def guest_destroyed(run: Run) -> None:
    """A guest is destroyed while it maps: its grants end, the others notice nothing, and a new one shares again."""
    it = world(run)
    domid = str(run.lab.domid("g2"))
    before = it.census()
    assert before["by_domain"][domid] > 0
    run.lab.destroy("g2")
    it.lab.wait("the end of its grants", lambda: domid not in it.census()["by_domain"], limit=30, pause=1)
    after = it.check_agreement(look_at_bytes=False)
    assert after["entries"] == before["entries"] - before["by_domain"][domid], (before, after)
    it.check_bytes(["g1", "g3"])
    make_guest(run, "g2")
    run.lab.wait_guest("g2")
    it.revive("g2")
    it.wait_joined(GUESTS)
    it.share(it.held["g1"], ["g2"])
    it.check_bytes()
    it.check_agreement(look_at_bytes=False)


@stage(limit=150)
def guests_moved(run: Run) -> None:
    """A PV guest is detached, saved and restored, a PVH guest is migrated: programs run on, and share again."""
    it = world(run)
    for name in ("g1", "g3"):
        before = run.lab.domid(name)
        run.lab.dom0.run(f"sharearea detach {name}", timeout=60)
        it.wait_plain(name)
        assert str(before) not in it.census()["by_domain"], "detached, and there are grants"
        if name == "g1":
            run.lab.save(name)
            it.wait_joined(set(GUESTS) - {name})
            run.lab.restore(name)
        else:
            run.lab.migrate(name)
        after = run.lab.domid(name)
        assert after not in (None, before)
        if name == "g3":
            it.label()
        it.wait_joined(GUESTS)
        it.wait_shared([name])
        it.check_bytes([name])
        it.check_agreement(look_at_bytes=False)


@stage(limit=120)
def area_destroyed(run: Run) -> None:
    """The area domain is destroyed under way: programs read right bytes throughout, and share in a new area."""
    it = world(run)
    old = it.check_agreement(look_at_bytes=False)["domid"]
    run.lab.dom0.run(f"xl destroy {old}", timeout=60)
    it.lab.wait("a broker that says so", lambda: it.broker.events("area.lost"), limit=30, pause=0.5)
    it.check_bytes()
    it.wait_joined(GUESTS)
    it.wait_shared(limit=100)
    it.check_bytes()
    new = it.check_agreement()
    assert new["domid"] != old
    left = run.lab.dom0.run("xl list")
    assert "(null)" not in left, f"the old area is still there: {left}"


# ---------------------------------------------------------------------------------------------------------- memory


LEAST_AVAILABLE: Final = 20 * MIB
"""What the program that eats memory leaves to its guest: less than the headroom, more than the kernel needs."""
EATER: Final = f"""
import sys, time
def available():
    return next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
eaten = []
while available() > {LEAST_AVAILABLE}:
    eaten.append(bytearray(b"x") * (2 << 20))
    time.sleep(0.3)
print(2 * len(eaten))
sys.stdin.read()
"""
"""A program that grows as programs do, until its guest is in need. It says how many MiB it has."""


@stage(limit=180)
def balloon(run: Run) -> None:
    """What guests gave up comes back to the host: 90 % of what was predicted; and to a guest that needs it."""
    it = world(run)
    before = run.lab.free_mib()
    pool: dict[str, object] = {"reclaim": "balloon", "reclaim_floor": "64 MiB", "reclaim_headroom": "24 MiB"}
    it.configure(pool=pool)
    it.restart_broker()
    it.wait_shared()
    domains = it.broker.domains()
    run.say(f"  {json.dumps(domains)[:2000]}")
    predicted = sum(max(0, about["net_bytes"]) for about in domains.values())
    run.number("predicted_mib", round(predicted / MIB, 1))
    assert predicted > 24 * MIB, domains
    gained = 0

    def back() -> bool:
        nonlocal gained
        gained = run.lab.free_mib() - before
        return bool(gained * MIB >= 0.9 * predicted)

    try:
        it.lab.wait("memory that is free on the host", back, limit=120, pause=2)
    finally:
        run.number("free_memory_gained_mib", gained)
    it.check_bytes()
    # A guest that needs memory gets its part back before it runs short, and the host has that much less.
    lowered, free = _target(run, "g1"), run.lab.free_mib()
    guest = run.lab.guest("g1")
    eater = guest.start("python3", "-u", "-c", EATER)
    try:
        run.number("eaten_mib", int(eater.read_line(90)))
        it.lab.wait("a target that rises", lambda: _target(run, "g1") > lowered, limit=60, pause=1)
        back_mib = (_target(run, "g1") - lowered) >> 10
        run.number("target_lowered_mib", lowered >> 10)
        run.number("target_raised_by_mib", back_mib)
        it.lab.wait("memory that the guest has", lambda: free - run.lab.free_mib() >= 0.9 * back_mib, limit=60, pause=1)
        assert guest.try_run("dmesg | grep -i 'out of memory'").out == "", "the guest ran out of memory"
    finally:
        eater.close()


def _target(run: Run, name: str) -> int:
    """Return a guest's memory target in KiB."""
    return int(run.lab.dom0.run(f"xenstore-read /local/domain/{run.lab.domid(name)}/memory/target"))


# ---------------------------------------------------------------------------------------------------------- budget


@stage(limit=120)
def small_table(run: Run) -> None:
    """A grant table of 4,096 entries is used up: refused with a reason, guests go on, nothing is corrupt."""
    it = world(run)
    it.broker.stop()
    run.lab.dom0.run(f"sharearea area destroy {POOL} --force", timeout=60)
    it.configure(pool={"max_grants": 4096})
    it.broker.start()
    it.broker.wait()
    it.wait_joined(GUESTS)
    batch = first_bytes(it.held["g1"], BATCH)  # more pages than the table has entries, in three guests
    assert sum(file.pages for file in batch) * 3 > 4096

    def refusals_logged() -> list[dict[str, Any]]:
        in_parallel([partial(it.read, name, batch) for name in GUESTS])
        return it.broker.events("grants.refused")

    refused = it.lab.wait("a refusal", refusals_logged, limit=90, pause=3)
    run.say(f"  {refused[-1]}")
    it.check_bytes()
    census = it.check_agreement()
    assert 0 < census["entries"] <= 4096 - 8, census
    run.number("small_table_entries", census["entries"])
    plain = [file for file in batch if it.programs["g1"].state()[file.path]["pages"] == 0]
    plain = plain or [file for file in it.held["g1"] if file not in batch]

    def reason() -> bool:
        # Who opens a file now is told why it stays plain; who had it open was told that it was withdrawn.
        it.close("g1", plain)
        it.open("g1", plain)
        time.sleep(2)
        return "grant-budget" in {about["reason"] for about in it.programs["g1"].state().values()}

    it.lab.wait("the reason", reason, limit=40, pause=3)


@stage(limit=90)
def paused_and_crashed(run: Run) -> None:
    """A guest is paused while the others go on, and another one crashes: its grants end, nobody else notices."""
    it = world(run)
    run.lab.dom0.run("xl pause g2")
    it.check_bytes(["g1", "g3"])
    run.lab.dom0.run("xl unpause g2")
    it.check_bytes(["g2"])
    it.wait_joined(GUESTS)
    domid = str(run.lab.domid("g3"))
    run.lab.crash("g3")
    it.check_bytes(["g1", "g2"])
    run.lab.destroy("g3")  # what crashed holds its pages until the toolstack buries it
    it.wait_joined(["g1", "g2"])
    it.lab.wait("the end of its grants", lambda: domid not in it.census()["by_domain"], limit=30, pause=1)
    it.check_bytes(["g1", "g2"])
    it.check_agreement(look_at_bytes=False)
    del it.agents["g3"], it.programs["g3"]


@stage(limit=60)
def silence(run: Run) -> None:
    """Everything ends when it is told to; every line of the logs is as its schema says, and no kernel complained."""
    it = world(run)
    for program in it.programs.values():
        with contextlib.suppress(ChannelError):
            program.close()
    for agent in it.agents.values():
        agent.stop()
    it.broker.stop()
    for service in (it.broker, *it.agents.values()):
        assert service.faults() == "", f"{service.machine.name}: {service.faults()}"
        wrong = line_faults(service.machine.get(service.log).decode().splitlines())
        assert not wrong, f"{service.machine.name}: " + "\n".join(wrong[:20])
    for machine in (run.lab.dom0, *(guest.machine for guest in run.lab.guests.values())):
        known, bad = complaints(machine.run("dmesg"))
        for text in known:
            run.say(f"  {machine.name}, known and harmless: {text.splitlines()[0]}")
        assert not bad, f"{machine.name}: " + "\n".join(bad)

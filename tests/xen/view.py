"""The guest view on a real Xen: `python -m tests.xen.view [STAGE]`, `make test-view`. Not a part of `make test-xen`.

Boots the lab with a PVH and a PV guest, loads the kernel module that it has built from guest-agent/kmod, and has
view_probe.py show in each what docs/view.md promises. What is measured goes to build/xen/view-results.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import host, view_packages
from .channel import ChannelError, CommandFailed, Machine
from .images import FOLDER, HERE, ROOT, ImageError
from .kernel_log import complaints
from .kernels import DEBUG, HOST_LINE, LINES, Kernel, debian, debug, usual
from .lab import GUEST_MIB
from .run import Run, Stage, perform

KMOD: Final = ROOT / "guest-agent" / "kmod"
WORK: Final = FOLDER / "view"
RESULTS: Final = FOLDER / "view-results.json"
GUESTS: Final = {"h1": "pvh", "v1": "pv"}
FIRST: Final = {"h1": 8, "v1": 5000}
"""The first reference of each guest in the area's table."""
PROBES: Final = "/run/probes"
"""Where a guest has a part of this package, for `python3 -m`."""
TOOLS: Final = ("view_bench", "view_info")
PAGES, TAIL, SEED = 512, 1234, 7  # view_probe.py has the same
BIG_PAGES, BIG_SEED = 4096, 8
LIMIT_S: Final = 2100.0
DEBUG_MIB: Final = 512


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, or those up to the one that was named."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.view", description="Prove the guest view on a real Xen.")
    parser.add_argument("until", nargs="?", metavar="STAGE", help="the last stage to run (default: all)")
    parser.add_argument("--without", action="append", default=[], metavar="STAGE", help="leave a stage out")
    parser.add_argument("--torture", type=float, default=60, metavar="SECONDS", help="for each guest (default: 60)")
    parser.add_argument("--misuse", type=float, default=20, metavar="SECONDS", help="for each guest (default: 20)")
    parser.add_argument("--programs", action="store_true", help="all of the real programs and their files, a JVM too")
    parser.add_argument(
        "--packages", action="store_true", help="DKMS, package managers and systemd too (minutes more: docs/view.md)"
    )
    parser.add_argument("--stay", action="store_true", help="leave the host up when a stage fails")
    parser.add_argument("--kernel", choices=(*LINES, DEBUG), default=HOST_LINE, help="the guests' kernel")
    parser.add_argument("--vcpus", type=int, default=1, metavar="N", help="virtual processors of a guest (default: 1)")
    options = parser.parse_args(arguments)
    from . import view_debug, view_programs  # which import this module

    kernels: dict[str, Kernel] = {}

    def module(run: Run) -> None:
        _module(run, kernels, options.vcpus)

    def misuse(run: Run) -> None:
        _misuse(run, options.misuse)

    def torture(run: Run) -> None:
        _torture(run, options.torture)

    stages = [
        Stage("module", 600, "the module is built and loaded in a PVH and a PV guest", module),
        Stage("rules", 600, "reads, mappings, writers, executing, pinned pages, unmounting", _rules),
        Stage("same", 600, "single calls do on a view what they do on the plain folder", view_programs.same),
        Stage("misuse", 300 + 2 * options.misuse, "wrong arguments are refused", misuse),
        Stage("ratios", 600, "what it costs, against the plain cached file", _ratios),
        Stage("torture", 300 + 2 * options.torture, "readers against all else", torture),
        Stage("area-destroyed", 200, "the area goes while pages are attached and mapped", _area_destroyed),
        *([Stage("held", 600, "who has grants mapped holds a save back", _held_back)] if options.programs else []),
        Stage("save-restore", 600, "saved and restored with a view attached and mapped", _save_restore),
        Stage(
            "agents",
            400 + 200 * options.programs,
            "broker and agents fill the views by themselves; a program that knows nothing reads",
            partial(_agents, cold=options.programs),
        ),
    ]
    more: list[Stage] = []
    after: list[Stage] = []
    whole = options.programs
    if options.kernel == DEBUG:
        more, after = view_debug.stages(kernels)
        # Whoever watches xenstore from user space, and a suspend, together end lockdep: Linux 6.1 takes locks of xenbus
        # in either order (xs_watch_rwsem, xs_response_mutex, a file's msgbuffer_mutex). So not in one guest.
        agents = stages.pop()
        fresh = Stage("fresh", 600, "other guests, which have not seen an agent", module)
        stages[1:1] = [agents, fresh]
    else:
        more += [
            Stage("programs", 900, "real programs on views", partial(view_programs.programs, whole=whole)),
            Stage("moved", 900, "saved or migrated under programs on views", partial(view_programs.moved, whole=whole)),
            Stage("balloon", 200, "what the guests gave up comes back to the host", view_programs.balloon),
            Stage("programs-end", 200, "all is detached and unmounted", view_programs.end),
        ]
    stages += [
        *more,
        Stage("unload", 100, "the module is unloaded; the guests' kernels have said nothing bad", _unload),
        *after,
    ]
    if options.packages:
        stages += view_packages.STAGES
    names = [stage.name for stage in stages]
    for name in (*options.without, *([options.until] if options.until else [])):
        if name not in names:
            parser.error(f"there is no stage {name}; there are {', '.join(names)}")
    if options.until:
        stages = stages[: names.index(options.until) + 1]
    begun = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - begun:6.1f}  {text}\n")
        sys.stdout.flush()

    try:
        for kind in GUESTS.values() if options.kernel != HOST_LINE else ():
            kernels[kind] = debug(kind, say) if options.kernel == DEBUG else debian(options.kernel, say)
        chosen = [stage for stage in stages if stage.name not in options.without]
        limit = LIMIT_S + 2 * (options.torture + options.misuse)
        limit += 1800 * options.programs + 3300 * options.packages + 2700 * (options.kernel == DEBUG)
        boots = {kind: kernel.boot for kind, kernel in kernels.items()}
        passed, failed = perform(
            chosen,
            say,
            stay=options.stay,
            results_path=RESULTS,
            limit_s=limit,
            kernels=boots,
            systemd=options.packages,
        )
    except ImageError as error:
        sys.stderr.write(f"test-view: {error}\n")
        return 1
    say(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------- parts


def build_module(kernel: Kernel, change: Callable[[Path], None] | None = None) -> Path:
    """Build the module for a kernel; return it, without symbols for debuggers. `change`: what is done to its source."""
    work = WORK / kernel.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for path in KMOD.iterdir():
        if path.suffix in (".c", ".h") or path.name in ("Kbuild", "Makefile"):
            shutil.copy(path, work)
    if change:
        change(work)
    _call("make", "-C", str(kernel.headers), f"M={work}", "modules")
    _call("strip", "-g", str(work / "shareview.ko"))
    return work / "shareview.ko"


def _call(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ImageError(f"{' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}")


def _granter(run: Run) -> host.Talker:
    """The granter in dom0, started when it is first needed."""
    granter: host.Talker | None = run.about.get("granter")
    if granter is None:
        run.lab.dom0.put("/run/view_granter.py", HERE / "view_granter.py")
        granter = host.Talker(run.lab.dom0.start("python3", "-u", "/run/view_granter.py"))
        run.about["granter"] = granter
    return granter


def _fill(run: Run, pages: int = PAGES, tail: int = TAIL, seed: int = SEED) -> None:
    """Make a new area, and grant all of it to each guest."""
    granter = _granter(run)
    run.about["area"] = granter.ask(do="fill", seed=seed, pages=pages, tail=tail)
    for name in GUESTS:
        granter.ask(do="grant", domid=run.lab.domid(name), first=FIRST[name])


def _none_in_use(run: Run, name: str) -> None:
    """Nothing that was granted to a guest is mapped by it; it is granted again."""
    granter = _granter(run)
    busy = granter.ask(do="revoke", first=FIRST[name])
    assert busy == 0, f"{name}: {busy} grants are still in use, says the grant table"
    granter.ask(do="grant", domid=run.lab.domid(name), first=FIRST[name])


def _probe(run: Run, name: str, verb: str, *more: str, limit: float = 300) -> dict[str, Any]:
    """Run a verb of the probe in a guest; return what it found. CommandFailed if anything was wrong."""
    words = ("python3", "/run/view_probe.py", verb, str(run.about["area"]), str(FIRST[name]), *more)
    found: dict[str, Any] = json.loads(run.lab.guest(name).run(" ".join(words), timeout=limit))
    _log_is_clean(run.lab.guest(name))
    return found


def _log_is_clean(machine: Machine) -> None:
    _, bad = complaints(machine.run("dmesg"))
    assert not bad, f"{machine.name}: the kernel's log has " + "\n".join(bad)[:3000]


# ------------------------------------------------------------------------------------------------------------ stages


def _module(run: Run, kernels: dict[str, Kernel], vcpus: int) -> None:
    from . import view_debug

    modules = {kind: build_module(kernels.get(kind) or usual(run.say)) for kind in GUESTS.values()}
    if not run.lab.guests:
        host.install(run.lab.dom0, "sharearea")
    for name in list(run.lab.guests):
        run.lab.destroy(name)
    for name, kind in GUESTS.items():
        looking = kind in kernels and kernels[kind].name.startswith(DEBUG)
        run.lab.create(name, kind, vcpus=vcpus, memory_mib=DEBUG_MIB if looking else GUEST_MIB)
        machine = run.lab.guest(name)
        host.install(machine, "sharearea-agent")
        machine.put("/run/shareview.ko", modules[kind])
        machine.put("/run/view_probe.py", HERE / "view_probe.py")
        for file in ("__init__.py", "view_probe.py", "view_torture.py", "view_same.py"):
            machine.put(f"{PROBES}/tests/xen/{file}", HERE / file)
        for tool in TOOLS:
            host.put_tool(machine, tool)
        run.say(f"  {name}: Linux {machine.run('uname -r').strip()}, {machine.run('nproc').strip()} vCPU")
        if looking:
            view_debug.begin(machine)
        machine.run("dmesg -C; busybox insmod /run/shareview.ko")
    _fill(run)


def _rules(run: Run) -> None:
    for name in GUESTS:
        found = _probe(run, name, "rules", limit=400)
        _none_in_use(run, name)
        run.number(f"{name}_rules_checks", found["checks"])


def _misuse(run: Run, seconds: float) -> None:
    for name in GUESTS:
        found = _probe(run, name, "misuse")
        _none_in_use(run, name)
        run.number(f"{name}_misuse_checks", found["checks"])
        found = _at_random(run, name, "calls", seconds)
        run.number(f"{name}_random_calls", found["calls"])
        run.number(f"{name}_random_attached", found["attached"])


def _at_random(run: Run, name: str, verb: str, seconds: float) -> dict[str, Any]:
    """Run a verb of view_torture.py in a guest; return what it found. CommandFailed if anything was wrong."""
    words = f"cd {PROBES} && python3 -m tests.xen.view_torture {verb} {run.about['area']} {FIRST[name]} {seconds}"
    found: dict[str, Any] = json.loads(run.lab.guest(name).run(words, timeout=120 + seconds))
    _log_is_clean(run.lab.guest(name))
    _none_in_use(run, name)
    return found


def _ratios(run: Run) -> None:
    _fill(run, BIG_PAGES, 4096, BIG_SEED)
    for name, kind in GUESTS.items():
        found = _probe(run, name, "measure", limit=400)
        _none_in_use(run, name)
        for key, value in found["numbers"].items():
            run.number(f"{kind}_{key}", value)
    _fill(run)


def _torture(run: Run, seconds: float) -> None:
    for name in GUESTS:
        found = _at_random(run, name, "torture", seconds)
        for number in ("cycles", "generations", "memory_taken"):
            run.number(f"{name}_torture_{number}", found[number])
        run.number(f"{name}_torture_pages_compared", sum(found["pages_compared"].values()))
        run.say(f"    {found['pages_compared']}")


def _start_holding(run: Run, name: str) -> None:
    words = f"python3 /run/view_probe.py hold {run.about['area']} {FIRST[name]}"
    machine = run.lab.guest(name)
    machine.run(f"rm -f /run/view-state.json; setsid {words} </dev/null >/run/view-hold.out 2>/run/view-hold.err &")
    _goes_on(run, name)


def _held(run: Run, name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(run.lab.guest(name).get("/run/view-state.json"))
    except (ChannelError, CommandFailed, ValueError):
        return {}
    assert not state["wrong"], f"{name}: {state['wrong']}"
    return state


def _goes_on(run: Run, name: str) -> dict[str, Any]:
    """Wait until the holder has compared everything twice more; return what it says."""
    begun = _held(run, name).get("rounds", 0)
    run.lab.wait(f"{name} compares", lambda: _held(run, name).get("rounds", 0) >= begun + 2, limit=60, pause=0.3)
    return _held(run, name)


def _stop_holding(run: Run, name: str) -> None:
    machine = run.lab.guest(name)
    machine.run("touch /run/view-stop")

    def ended() -> bool:
        return bool(machine.try_run("cat /run/view-hold.out").out.strip())

    run.lab.wait(f"{name} stops", ended, limit=60, pause=0.3)
    found = json.loads(machine.run("cat /run/view-hold.out"))
    assert not found["wrong"], f"{name}: {found['wrong']} {machine.run('cat /run/view-hold.err')}"
    _log_is_clean(machine)


def _area_destroyed(run: Run) -> None:
    for name in GUESTS:
        _start_holding(run, name)
    _granter(run).ask(do="destroy")
    for name in GUESTS:
        state = _goes_on(run, name)
        assert state["info"]["tables"] == 1, f"{name}: {state}"
        _stop_holding(run, name)
    _fill(run)


def _order(run: Run, name: str, **order: Any) -> None:
    machine = run.lab.guest(name)
    machine.put("/run/view-order.new", json.dumps(order))
    machine.run("mv /run/view-order.new /run/view-order")
    run.lab.wait(f"{name} obeys", lambda: machine.try_run("test -e /run/view-order").code == 1, limit=60, pause=0.3)


def _save_restore(run: Run) -> None:
    for name, kind in GUESTS.items():
        _start_holding(run, name)
        before = run.lab.domid(name)
        run.lab.save(name)
        _granter(run).ask(do="revoke", first=FIRST[name])
        run.lab.restore(name)
        after = run.lab.domid(name)
        assert after != before, f"{name} has the same number"
        state = _goes_on(run, name)
        info = state["info"]
        assert (info["epoch"], info["tables"], info["pending_pages"]) == (1, 0, 0), f"{name}: {state}"
        _granter(run).ask(do="grant", domid=after, first=FIRST[name])
        _order(run, name, do="attach", area=run.about["area"], first=FIRST[name], epoch=1)
        state = _goes_on(run, name)
        assert state["info"]["tables"] == 1, f"{name}: not attached again: {state}"
        run.say(f"  {name} ({kind}): domain {before} is domain {after}, {state['rounds']} rounds compared")
        _stop_holding(run, name)
        _none_in_use(run, name)


def _held_back(run: Run) -> None:
    """A suspend is refused as long as a program has grants mapped by itself, and the guest goes on with its table."""
    for name, kind in GUESTS.items():
        _start_holding(run, name)
        before = run.lab.domid(name)
        _order(run, name, do="hold", on=True)
        done = run.lab.dom0.try_run(f"xl save {name} /var/lib/xen/{name}.refused", timeout=200)
        assert done.code != 0, f"{name} was saved: {done.out}{done.err}"
        run.lab.dom0.run(f"rm -f /var/lib/xen/{name}.refused")
        state = _goes_on(run, name)
        assert run.lab.domid(name) == before, f"{name} is another domain"
        assert (state["info"]["tables"], state["info"]["epoch"]) == (1, 0), f"{name}: {state}"
        _order(run, name, do="hold", on=False)
        run.say(f"  {name} ({kind}): {(done.err or done.out).strip().splitlines()[-1]}")
        _stop_holding(run, name)
        _none_in_use(run, name)


SHARED: Final = "/srv/shared"
SEEN: Final = "/mnt/shared"
SHARED_FILES: Final = 12


def _agents(run: Run, *, cold: bool) -> None:
    """Both guests have the same files; what is read through the view comes from the area, and follows a writer.

    `cold`: a guest that has nothing in its page cache any more, too.
    """
    _granter(run).ask(do="destroy")
    broker = host.Broker(run.lab)
    grace: dict[str, object] = {"grace": "120 s"} if cold else {}  # an agent takes its time to start again
    broker.configure([{"name": name} for name in GUESTS], grace, {"max_area_bytes": "64 MiB"})
    agents = {name: host.Agent(run.lab, name) for name in GUESTS}
    run.about["logs"] = [("dom0", broker.log, "broker.log")]
    run.about["logs"] += [(name, agent.log, f"agent-{name}.log") for name, agent in agents.items()]
    make = (
        "import random\n"
        "made = random.Random(11)\n"
        f"for number in range({SHARED_FILES}):\n"
        f"    with open(f'{SHARED}/f{{number}}', 'wb') as file:\n"
        "        file.write(made.randbytes(300_000 + number * 77_777))\n"
    )
    sums: dict[str, str] = {}
    for name in GUESTS:
        machine = run.lab.guest(name)
        machine.run(f"mkdir -p {SHARED} {SEEN}; python3 -", data=make.encode())
        sums[name] = machine.run(f"cd {SHARED}; sync; sha256sum f*")
        machine.run(f"mount -t shareview -o lower={SHARED} none {SEEN}")
    assert len(set(sums.values())) == 1, "the guests' files differ"
    broker.start()
    broker.wait()
    for agent in agents.values():
        agent.configure([SHARED])
        agent.start()

    def attached(name: str, least: int) -> bool:
        run.lab.guest(name).run(f"cat {SHARED}/f* >/dev/null")  # what was evicted before it was seen is not reported
        return bool(agents[name].status().get("view", {}).get("attached_files", 0) >= least)

    for name in GUESTS:
        run.lab.wait(f"{name}: all files attached", partial(attached, name, SHARED_FILES), limit=150, pause=1)
        machine = run.lab.guest(name)
        before = _counters(machine)
        assert machine.run(f"cd {SEEN}; sha256sum f*") == sums[name], f"{name}: other bytes through the view"
        assert _counters(machine)["read_bytes"] > before["read_bytes"], f"{name}: nothing came from granted pages"
        run.number(f"{name}_agent_attached_pages", agents[name].status()["view"]["attached_pages"])
    if cold:
        _cold_start(run, agents["h1"], sums["h1"])
    # A writer who knows nothing of it all, and a file that is replaced.
    writer = run.lab.guest("h1")
    writer.run(f"printf changed | dd of={SHARED}/f0 conv=notrunc status=none", timeout=30)
    writer.run(f"cp {SHARED}/f2 {SHARED}/new && mv {SHARED}/new {SHARED}/f1 && rm {SHARED}/f3", timeout=30)
    assert writer.run(f"head -c 7 {SEEN}/f0") == "changed"
    assert writer.run(f"cmp {SEEN}/f1 {SHARED}/f2 && ls {SEEN} | grep -c '^f3$' || true").strip() == "0"
    assert run.lab.guest("v1").run(f"cd {SEEN}; sha256sum f*") == sums["v1"], "the other guest sees a writer"
    for name, agent in agents.items():
        agent.ask("detach", path=None)
        machine = run.lab.guest(name)
        run.lab.wait(f"{name} detached", partial(_nothing_attached, machine), limit=60)
        agent.stop()
        machine.run(f"umount {SEEN}")
        assert not agent.faults(), agent.faults()
        _log_is_clean(machine)
    broker.stop()
    assert not broker.faults(), broker.faults()


def _cold_start(run: Run, agent: host.Agent, sums: str) -> None:
    """A guest that has nothing in its page cache, with the fingerprints of an earlier agent: the disk is not read."""
    machine = run.lab.guest(agent.guest)
    agent.stop()  # after one that was killed Linux before 6.8 cannot tell whether its fingerprints are to be believed
    machine.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    agent.start()

    def attached() -> bool:
        return bool(agent.status().get("view", {}).get("attached_files", 0) >= SHARED_FILES)

    run.lab.wait("all files attached without their being read", attached, limit=150, pause=1)
    sectors = "set -- $(cat /sys/block/xvda/stat); echo $3"
    before = int(machine.run(f"sha256sum /dev/null >&2; {sectors}"))  # which has to be read itself
    assert machine.run(f"cd {SEEN}; sha256sum f*") == sums, "other bytes through the view"
    read = (int(machine.run(sectors)) - before) * 512
    about = agent.status()
    unread, pages = about["unread_pages"], about["view"]["attached_pages"]
    run.number("cold_start_pages_attached_unread", [pages, unread])
    run.number("cold_start_bytes_read_from_disk", read)
    assert unread >= 0.95 * pages, f"{unread} of {pages} pages were not read"
    assert read <= 0.05 * pages * 4096, f"{read} bytes were read from the disk"


def _nothing_attached(machine: Machine) -> bool:
    return _counters(machine)["attached_pages"] == 0


def _counters(machine: Machine) -> dict[str, int]:
    """The module's counters in a guest."""
    return host.view_counters(machine)


def _unload(run: Run) -> None:
    for name in GUESTS:
        machine = run.lab.guest(name)
        machine.run("busybox rmmod shareview")
        assert machine.try_run("test -e /dev/shareview").code == 1, f"{name}: the device is still there"
        _log_is_clean(machine)
        leak = machine.run("cat /proc/slabinfo || true")  # the debug kernel has kmemleak instead
        assert not re.search(r"^shareview", leak, re.M), f"{name}: inodes are left"
    granter: host.Talker = run.about.pop("granter")
    with contextlib.suppress(OSError):  # an earlier stage may have done so
        granter.ask(do="destroy")
    granter.close()


if __name__ == "__main__":
    sys.exit(main())

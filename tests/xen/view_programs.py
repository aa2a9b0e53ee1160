"""Stages of view.py with programs that know nothing of views: each is run on plain folders and on views of them.

Folders of the guests' own system and one of data have views beside them; a program gets them at the usual places by a
mount namespace of its own, as `BindReadOnlyPaths=` would do it (docs/view.md). Broker and agents fill the views by
themselves. What is expected of single system calls is view_same.py's.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from . import host
from .channel import ChannelError, CommandFailed, Machine
from .images import FOLDER, HERE
from .run import Run
from .view import FIRST, GUESTS, PROBES, _counters, _granter, _log_is_clean, _none_in_use

MIB: Final = 1 << 20
PAGE_KIB: Final = 4
JVM: Final = "/usr/lib/jvm"
"""Only Java uses it, which is not run in a run that is not whole."""
FOLDERS: Final = {
    "/usr/share/unicode": "/run/views/unicode",
    "/usr/lib/python3.11": "/run/views/python",
    JVM: "/run/views/jvm",
    "/srv/data": "/run/views/data",
}
"""Plain folders, and where their views are."""
SITE: Final = "/usr/share/unicode"
READ: Final = ("/srv/data/words.db", SITE, "/usr/lib/python3.11/json")
"""What view_reader.py reads."""
PORTS: Final = {"sendfile": 8081, "copying": 8082}

MAKE_DATA: Final = """
set -e
rm -rf /srv/data && mkdir -p /srv/data && cd /srv/data
sqlite3 words.db "pragma page_size = 4096; create table words (number integer primary key, word text);
  with recursive n(i) as (select 1 union all select i + 1 from n where i < 40000)
  insert into words select i, printf('%08x-%s', i * 2654435761 % 4294967296, hex(i * i)) || printf('%.*c', i % 80, 'w')
  from n; create index by_word on words (word);"
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=pack.threads GIT_CONFIG_VALUE_0=1
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
export GIT_AUTHOR_DATE='1700000000 +0000' GIT_COMMITTER_DATE='1700000000 +0000'
git init -q -b main repository && cd repository
for part in Encode Unicode CPAN Module; do
  cp -r /usr/share/perl/5.36.0/$part . 2>/dev/null || continue
  git add -A && git commit -q -m "$part"
done
git gc -q && rm -rf .git/hooks
find .git/objects -name '*.pack' | grep -q .
"""
"""A database of some MiB and a repository with a pack, as a shell script."""

PYTHON: Final = """
import importlib, hashlib, pathlib, sys
total = hashlib.sha256()
for name in ("argparse asyncio ast calendar collections concurrent.futures configparser csv ctypes dataclasses decimal "
             "difflib doctest email.mime.text ftplib fractions html.parser http.server imaplib inspect ipaddress json "
             "logging.handlers mailbox multiprocessing.pool optparse pdb pickle plistlib pydoc random smtplib sqlite3 "
             "ssl statistics subprocess tarfile tempfile tokenize typing unittest.mock urllib.request uuid wave "
             "xml.dom.minidom xmlrpc.client zipfile").split():
    module = importlib.import_module(name)
    total.update(pathlib.Path(module.__file__).read_bytes())
print(len(sys.modules), total.hexdigest())
"""
SQL: Final = (
    "pragma integrity_check; select count(*), sum(length(word)), min(word), max(word) from words; "
    "select substr(word, 1, 1) as first, count(*) from words group by first; "
    "select number from words where word like '%FF%' order by word limit 20;"
)
JAVA: Final = "java -Xmx40m -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
GIT: Final = "GIT_OPTIONAL_LOCKS=0 git --no-pager -C /srv/data/repository"
GET: Final = """
import hashlib, pathlib, sys, urllib.request
for path in sorted(pathlib.Path(sys.argv[2]).rglob("*")):
    if path.is_file() and path.stat().st_size <= int(sys.argv[3]):
        with urllib.request.urlopen(sys.argv[1] + str(path)[len(sys.argv[2]):], timeout=120) as body:
            print(hashlib.sha256(body.read()).hexdigest(), path)
"""
NGINX: Final = f"""
user root;
worker_processes 1;
pid /run/nginx-view.pid;
error_log /run/nginx-view.log;
events {{}}
http {{
  access_log off;
  server {{ listen 127.0.0.1:{PORTS["sendfile"]}; root {SITE}; sendfile on; tcp_nopush on; }}
  server {{ listen 127.0.0.1:{PORTS["copying"]}; root {SITE}; sendfile off; output_buffers 2 128k; }}
}}
"""
PROGRAMS: Final = {
    "python": f"python3 -I -B -c {shlex.quote(PYTHON)}",
    "sqlite": f"sqlite3 -readonly /srv/data/words.db {shlex.quote(SQL)}",
    "sqlite mapped": f"sqlite3 -readonly /srv/data/words.db {shlex.quote('pragma mmap_size = 100000000; ' + SQL)}",
    "git log": f"{GIT} log --stat",
    "git fsck": f"{GIT} fsck --full --strict --no-dangling --verbose 2>&1",
    "git grep": f"{GIT} grep -c sub HEAD",
    "java": f"{JAVA} --list-modules",
}
"""Programs that end by themselves, by shell commands. nginx is asked apart."""
SHORT: Final = ("python", "sqlite", "git log")
"""Those of a run that is not whole; nginx belongs to it too."""
SERVED_BYTES: Final = 256 << 10
"""The largest file that nginx is asked for in a run that is not whole."""
READS: Final = ("python", "sqlite", "nginx")
"""Those that read() what they use, so that they profit in a PV guest too."""


@dataclass(slots=True)
class World:
    """Broker and agents, as the stages hand them on."""

    broker: host.Broker
    agents: dict[str, host.Agent]
    folders: dict[str, str]
    """Those of FOLDERS that have a view."""
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """What each program said on plain folders."""


def programs(run: Run, *, whole: bool) -> None:
    """Run programs on plain folders, have broker and agents fill the views, and run them on the views.

    `whole`: all programs and files, which takes an emulated host twelve minutes; else a part.
    """
    world = _begin(run, {plain: view for plain, view in FOLDERS.items() if whole or plain != JVM})
    chosen = PROGRAMS if whole else SHORT
    run.about["programs"] = world
    for name in GUESTS:
        _equip(run.lab.guest(name), world.folders)
    plain: dict[str, dict[str, int]] = {}
    for name in GUESTS:
        machine = run.lab.guest(name)
        drop_caches(machine)
        begun = memory(machine, world.folders)
        world.outputs[name] = {}
        for program in chosen:
            world.outputs[name][program] = _ran(machine, program, view=False)
        world.outputs[name] |= _served(machine, view=False, whole=whole)
        run.say(f"  {name}: all programs have run on plain folders")
        plain[name] = _grown(begun, memory(machine, world.folders))
    first, *others = world.outputs.values()
    assert all(first == other for other in others), "the guests' programs say different things on plain folders"
    world.broker.start()
    world.broker.wait()
    for agent in world.agents.values():
        agent.start()
    in_view = _wait_filled(run, rounds=2 if whole else 1)
    for name, kind in GUESTS.items():
        machine = run.lab.guest(name)
        drop_caches(machine)
        begun = memory(machine, world.folders)
        for program in chosen:
            before = _counters(machine)
            assert _ran(machine, program, view=True) == first[program], f"{name}: {program} differs on the view"
            _note_use(run, name, program, before, _counters(machine))
        before = _counters(machine)
        served = _served(machine, view=True, whole=whole)
        assert served.items() <= first.items(), f"{name}: nginx serves other bytes on the view"
        _note_use(run, name, "nginx", before, _counters(machine))
        grown = _grown(begun, memory(machine, world.folders))
        run.number(f"{kind}_programs_attached_pages", in_view[name])
        for key in ("folders_kib", "cached_kib", "used_kib"):
            run.number(f"{kind}_programs_{key}_plain_view", [plain[name][key], grown[key]])
        if kind == "pvh":
            assert grown["folders_kib"] < plain[name]["folders_kib"] / 2, f"{name}: {plain[name]} {grown}"
        _log_is_clean(machine)


def _begin(run: Run, folders: dict[str, str]) -> World:
    """Configure a broker and an agent for each guest, with views that are mounted."""
    with contextlib.suppress(OSError):  # an earlier stage may have done so
        _granter(run).ask(do="destroy")
    broker = host.Broker(run.lab)
    _configure(broker)
    agents = {name: host.Agent(run.lab, name) for name in GUESTS}
    run.about["logs"] = [("dom0", broker.log, "broker.log")]
    run.about["logs"] += [(name, agent.log, f"agent-{name}.log") for name, agent in agents.items()]
    for agent in agents.values():
        agent.configure(list(folders), rescan_interval="10 s")
    return World(broker, agents, folders)


def _configure(broker: host.Broker, **pool: object) -> None:
    broker.configure([{"name": name} for name in GUESTS], {}, {"max_area_bytes": "192 MiB"} | pool)


def _equip(machine: Machine, folders: dict[str, str]) -> None:
    """Make the data, mount the views, and put there what is run."""
    machine.run("cat >/run/make-data && sh /run/make-data && sync", data=MAKE_DATA.encode(), timeout=240)
    for plain, view in folders.items():
        machine.run(f"mkdir -p {view} && mount -t shareview -o lower={plain} none {view}")
    machine.put("/run/nginx-view.conf", NGINX)
    machine.put("/run/get.py", GET)
    machine.put("/run/reader.py", HERE / "view_reader.py")
    binds = "".join(f"mount --bind {view} {plain}\n" for plain, view in folders.items())
    # What else is mounted stays; only this program and its children see the views.
    machine.put("/run/in-view", f'#!/bin/sh\nset -e\n{binds}exec sh -c "$1"\n', mode=0o755)


def _words(command: str, *, view: bool) -> str:
    return f"unshare -m --propagation private /run/in-view {shlex.quote(command)}" if view else command


def _ran(machine: Machine, program: str, *, view: bool) -> str:
    """Run a program and return what it said; it must have said something, and ended well."""
    said = machine.run(_words(PROGRAMS[program], view=view), timeout=240)
    assert len(said) > 20, f"{program}: {said}"
    return said


def _served(machine: Machine, *, view: bool, whole: bool) -> dict[str, str]:
    """Start nginx, ask it for every file of a folder (the small ones), without and with sendfile, and end it."""
    largest = 1 << 40 if whole else SERVED_BYTES
    machine.run(_words("nginx -c /run/nginx-view.conf", view=view), timeout=60)
    try:
        said = {
            f"nginx {how}": machine.run(f"python3 /run/get.py http://127.0.0.1:{port} {SITE} {largest}", timeout=240)
            for how, port in PORTS.items()
        }
    finally:
        machine.run("kill $(cat /run/nginx-view.pid)")
    plain = machine.run(
        f"find {SITE} -type f -size -{largest + 1}c | sort | xargs sha256sum | sed 's/  / /'", timeout=120
    )
    for how, text in said.items():
        assert text == plain, f"{how}: other bodies than the plain files"
    return said


def _note_use(run: Run, name: str, program: str, before: dict[str, int], after: dict[str, int]) -> None:
    """Note how much a program had from granted pages; nothing at all is a failure where it must have some."""
    read, faults = (after[key] - before[key] for key in ("read_bytes", "faults"))
    run.number(f"{GUESTS[name]}_{program.replace(' ', '_')}_read_kib_faults", [read >> 10, faults])
    assert read + faults > 0 or (GUESTS[name] == "pv" and program not in READS), (
        f"{name}: {program} used no granted page"
    )


def _wait_filled(run: Run, rounds: int) -> dict[str, int]:
    """Wait until no more pages are attached; return how many are, in each guest.

    What a guest has evicted before its agent looked is not reported: files are read once more, so many times.
    """
    found: dict[str, int] = {}

    def settled() -> bool:
        now = {name: attached_pages(run.lab.guest(name)) for name in GUESTS}
        done = now == found and all(now.values())
        found.update(now)
        return done

    for _ in range(rounds):
        run.lab.wait("views with no more to come", settled, limit=150, pause=12)
        run.say(f"  attached: {found}")
        for name in GUESTS:
            run.lab.guest(name).run(f"cat $(find {SITE} /srv/data -type f -size -700k) >/dev/null")
    run.lab.wait("views with no more to come", settled, limit=150, pause=12)
    return found


def attached_pages(machine: Machine) -> int:
    """How many granted pages are attached in a guest."""
    return _counters(machine)["attached_pages"]


def drop_caches(machine: Machine) -> None:
    """Have the guest's kernel forget what it can read again."""
    machine.run("sync; echo 3 >/proc/sys/vm/drop_caches")


def memory(machine: Machine, folders: Iterable[str]) -> dict[str, int]:
    """What the guest's kernel says: cached pages of the folders, all cached ones, and what is not free, in KiB."""
    said = machine.run(
        f"find {' '.join(folders)} -type f -print0 | xargs -0 fincore -n -o PAGES | "
        "awk '{n += $1} END {print n + 0}'; cat /proc/meminfo",
        timeout=120,
    )
    pages, *lines = said.splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    used = info["MemTotal"] - info["MemFree"]
    return {"folders_kib": int(pages) * PAGE_KIB, "cached_kib": info["Cached"], "used_kib": used}


def _grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in before}


# ----------------------------------------------------------------------------------------------------------- ballooning


def balloon(run: Run) -> None:
    """With reclaim = "balloon" what the guests gave up comes back to the host."""
    world: World = run.about["programs"]
    before = run.lab.free_mib()
    world.broker.stop()
    _configure(world.broker, reclaim="balloon", reclaim_floor="64 MiB", reclaim_headroom="24 MiB")
    world.broker.start()
    world.broker.wait()
    predicted = 0

    def back() -> bool:
        nonlocal predicted
        domains = world.broker.domains()
        predicted = sum(max(0, about["net_bytes"]) for about in domains.values())
        return predicted > 8 * MIB and (run.lab.free_mib() - before) * MIB >= 0.9 * predicted

    try:
        run.lab.wait("memory that is free on the host", back, limit=120, pause=3)
    finally:
        run.number("programs_predicted_mib", round(predicted / MIB, 1))
        run.number("programs_free_memory_gained_mib", run.lab.free_mib() - before)


# --------------------------------------------------------------------------------------------------------------- moving


def moved(run: Run, *, whole: bool) -> None:
    """Save and restore, and migrate, guests whose programs run on views; they go on, and the views fill again.

    `whole`: both with each guest; else the PVH guest is migrated, and the PV guest saved and restored.
    """
    moves: dict[str, Callable[[str], None]] = {
        "saved and restored": partial(_save_and_restore, run),
        "migrated": run.lab.migrate,
    }
    for name, kind in GUESTS.items():
        machine = run.lab.guest(name)
        machine.run("rm -f /run/reader-state.json /run/reader-stop")
        machine.run(_words("nginx -c /run/nginx-view.conf", view=True))
        server = machine.run("cat /run/nginx-view.pid").strip()
        command = f"python3 /run/reader.py http://127.0.0.1:{PORTS['sendfile']} {' '.join(READ)}"
        machine.run(f"setsid {_words(command, view=True)} </dev/null >/run/reader.out 2>&1 &")
        _goes_on(run, name)
        for how in moves if whole else ("migrated" if kind == "pvh" else "saved and restored",):
            before, attached = run.lab.domid(name), attached_pages(machine)
            assert attached, f"{name}: nothing is attached before it is {how}"
            moves[how](name)
            after = run.lab.domid(name)
            assert after not in (None, before), f"{name} has the same number"
            rounds = _goes_on(run, name)
            run.lab.wait(f"{name} attaches again", partial(attached_pages, machine), limit=150, pause=2)
            used = _counters(machine)
            rounds = _goes_on(run, name)
            now = _counters(machine)
            assert now["read_bytes"] > used["read_bytes"], f"{name}: nothing comes from granted pages any more"
            run.say(f"  {name} ({kind}) {how}: domain {before} is domain {after}, {rounds} rounds")
            run.number(f"{kind}_{how.replace(' ', '_')}_attached_pages", [attached, now["attached_pages"]])
        machine.run("touch /run/reader-stop")
        run.lab.wait("the reader ends", partial(_reader_ended, machine), limit=90, pause=1)
        _reader(machine)
        assert machine.run("cat /run/nginx-view.pid").strip() == server, "nginx is another one"
        machine.run(f"kill {server}")
        assert not machine.run("grep -v ' using inherited ' /run/nginx-view.log || true"), "nginx complains"
        _log_is_clean(machine)


def _reader_ended(machine: Machine) -> bool:
    return machine.try_run("pgrep -f '[r]eader.py'").code == 1


def _save_and_restore(run: Run, name: str) -> None:
    run.lab.save(name)
    run.lab.restore(name)


def _reader(machine: Machine) -> dict[str, Any]:
    """What the reader says; it must have found nothing wrong."""
    try:
        state: dict[str, Any] = json.loads(machine.get("/run/reader-state.json"))
    except (ChannelError, CommandFailed, ValueError):
        return {}
    assert not state["wrong"], f"{machine.name}: {state['wrong']} {machine.run('cat /run/reader.out')}"
    return state


def _goes_on(run: Run, name: str) -> int:
    """Wait until the reader has compared everything twice more; return its rounds."""
    machine = run.lab.guest(name)
    begun = _reader(machine).get("rounds", 0)
    run.lab.wait(f"{name} reads", lambda: _reader(machine).get("rounds", 0) >= begun + 2, limit=120, pause=0.5)
    return int(_reader(machine)["rounds"])


def end(run: Run) -> None:
    """Detach all, and end agents and broker."""
    world: World = run.about["programs"]
    for name, agent in world.agents.items():
        machine = run.lab.guest(name)
        agent.ask("detach", path=None)
        run.lab.wait(f"{name} detached", lambda machine=machine: attached_pages(machine) == 0, limit=60)  # type: ignore[misc]
        agent.stop()
        for view in world.folders.values():
            machine.run(f"umount {view}")
        assert not agent.faults(), agent.faults()
        _log_is_clean(machine)
    world.broker.stop()
    assert not world.broker.faults(), world.broker.faults()


# ------------------------------------------------------------------------------------------------------- same behaviour


def same(run: Run) -> None:
    """Compare view and plain folder, item by item, in each guest."""
    for name, kind in GUESTS.items():
        machine = run.lab.guest(name)
        words = f"cd {PROBES} && python3 -m tests.xen.view_same {run.about['area']} {FIRST[name]}"
        done = machine.try_run(words, timeout=400)
        (FOLDER / f"same-{name}.json").write_text(done.out)
        assert done.code == 0, f"{name}: {done.err[-4000:]}"
        found = json.loads(done.out)
        _none_in_use(run, name)
        run.number(f"{kind}_same_compared", found["compared"])
        run.number(f"{kind}_same_documented_differences", sum(found["differences"].values()))
        _log_is_clean(machine)

"""Real programs, unchanged, with the shim and without: output, memory, start-up, steady state.

Two domains have copies of their own of each program, of its libraries and of its data. A program runs in both domains,
first plainly, then with the shim: the page cache of what it maps says what the domains keep (cachestat), smaps what
processes have for themselves. Start-up is from fork to exit of a short command, steady state the time of an answer of a
running program; both by turns with and without, in the same run, with the domains' agents at work.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from sharearea.common.control import ask
from sharearea.common.errors import HostError
from sharearea.model import PoolId
from sharearea.policy import Policy, PoolRules
from sharearea_agent.preload import environment, library

from .copies import install
from .fleet import start_broker
from .host import MIB, OpenFiles, Processes, cached_file_bytes, check_room, command, memory_of, status_of
from .report import Samples, Tell, interval
from .runs import CLUSTER, SEATS, Program, Running

PROGRAMS: Final = (
    "python3",
    "node",
    "java",
    "postgres",
    "nginx",
    "sqlite3",
    "git",
    "ffmpeg",
    "data",
    "numpy",
    "lmdb",
)
_DOMAINS: Final = ("bench-1", "bench-2")
_POOL: Final = PoolId("bench")
_MAX_FILE: Final = 1024 * MIB
_POLL_S: Final = 0.25
_STABLE_S: Final = 7.0  # longer than the agent's drop_interval
_LIMIT_S: Final = 90.0
_ATTACH_S: Final = 1.5
_LIFE_S: Final = 20.0
_STARTS_WITHOUT: Final = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `data_bytes`: of the files that `data`, `numpy` and `lmdb` map."""

    programs: tuple[str, ...] = PROGRAMS
    starts: int = 100
    lives: int = 30
    processes: int = 5
    answers: int = 14
    data_bytes: int = 128 * MIB
    short: bool = False


QUICK: Final = Sizes(
    programs=("sqlite3", "data"), starts=3, lives=3, processes=1, answers=2, data_bytes=8 * MIB, short=True
)


@dataclass(slots=True)
class _Domain:
    name: str
    root: Path
    socket: Path
    control: Path
    programs: dict[str, Program] = field(default_factory=dict)

    def with_shim(self, name: str, *, agent: bool = True) -> dict[str, str]:
        """Return what `sharearea-agent exec` makes of a program's environment, without the time that Python takes."""
        shim = library()
        if shim is None:
            raise HostError("there is no shim for this machine", "it is built for x86-64")
        return environment(self.programs[name].variables, shim, f"{self.socket}{'' if agent else '.none'}")


def run(sizes: Sizes, work: Path, tell: Tell) -> Samples:
    """Measure. Raises HostError if this host has none of the programs, or something ends that should not."""
    found = Samples("programs")
    check_room(work, (1024 if sizes.short else 4096) * MIB, (1024 if sizes.short else 2048) * MIB)
    folder = work / "programs"
    domains = [_Domain(name, folder / name, folder / f"{name}.sock", folder / f"{name}.control") for name in _DOMAINS]
    for domain in domains:
        domain.root.mkdir(parents=True)
        for name in sizes.programs:
            tell(f"copies of {name}")
            made = install(name, domain.root / name, sizes.data_bytes)
            if isinstance(made, str):
                found.skip(name, made)
            else:
                domain.programs[name] = made
    _open_to_all(folder)
    with Processes(folder) as processes:
        start_broker(processes, folder, max_file_bytes=_MAX_FILE)
        for domain in domains:
            _start_agent(processes, folder, domain)
        for name in domains[0].programs:
            _measure(found, sizes, domains, name, tell)
    found.notes.append(
        f"{len(_DOMAINS)} domains, each with its own copies; starts and answers by turns with and without the shim"
    )
    return found


def _open_to_all(folder: Path) -> None:
    """Files that not everybody may read are not reported; and what was just written is not clean yet."""
    for top, folders, names in os.walk(folder):
        if CLUSTER in folders:
            folders.remove(CLUSTER)
        for name in [*folders, *names]:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                os.chmod(path, os.stat(path).st_mode | (0o555 if name in folders else 0o444))
    os.sync()


def _start_agent(processes: Processes, folder: Path, domain: _Domain) -> None:
    config = folder / f"{domain.name}.toml"
    config.write_text(
        f'[agent]\nname = "{domain.name}"\nroot = "{domain.root}"\nfolders = ["{domain.root}"]\n'
        f'broker_socket = "{folder}/broker.sock"\nconsumer_socket = "{domain.socket}"\n'
        f'control_socket = "{domain.control}"\ncache = "{folder}/{domain.name}.db"\nrescan_interval = "2 s"\n'
    )
    processes.start(domain.name, [command("sharearea-agent"), "run", "--config", config])
    processes.wait_for(lambda: status_of(domain.control) is not None, f"the agent of {domain.name}")


# ------------------------------------------------------------------------------------------------------ measuring


def _measure(found: Samples, sizes: Sizes, domains: Sequence[_Domain], name: str, tell: Tell) -> None:
    stable = 1.0 if sizes.short else _STABLE_S
    tell(f"{name}: what it needs")
    with _in_all(domains, name, shim=False) as plain:
        for one in plain:
            one.answer()
        mapped = [_mapped(one, domain.root) for one, domain in zip(plain, domains, strict=True)]
        private = _private(plain[0])
    paths = [[Path(path) for path in sorted(each)] for each in mapped]
    with OpenFiles([path for each in paths for path in each]) as files, OpenFiles(paths[0]) as first:
        # Resident and reported, whatever this host's kernel evicts meanwhile.
        _settle(lambda: sum(_offered(domain) for domain in domains), stable, files.read_through)
        found.add(name, needed_bytes=sum(mapped[0].values()), private_plain_bytes=private)
        found.add(name, one_domain_before_bytes=first.cached_bytes())
        tell(f"{name}: with the shim")
        with _in_all(domains, name, shim=True) as shared:
            for one in shared:
                one.answer()
            _settle(lambda: sum(map(_attached, domains)), stable)
            _settle(files.cached_bytes, stable)
            for one in shared:
                one.answer()
            found.add(
                name,
                attached_bytes=_attached(domains[0]),
                one_domain_after_bytes=first.cached_bytes(),
                left_out_bytes=sum(cached_file_bytes(path) for path in paths[0] if _is_left_out(path, domains[0].root)),
                private_shared_bytes=_private(shared[0]),
            )
    found.ratio(name, "kept_ratio", (name, "one_domain_after_bytes"), (name, "one_domain_before_bytes"))
    _steady(found, sizes, domains[0], name, tell)
    _lives(found, sizes, domains, name, tell)
    _starts(found, sizes, domains, name, tell)


def _steady(found: Samples, sizes: Sizes, domain: _Domain, name: str, tell: Tell) -> None:
    """Compare answers of three processes by turns: plain, plain once more to show the noise, and with the shim."""
    program = domain.programs[name]
    kinds = {"plain": program.variables, "again": program.variables, "shared": domain.with_shim(name)}
    rng = random.Random(name)
    ratios: dict[str, list[list[float]]] = {"again": [], "shared": []}
    for at in range(sizes.processes):
        tell(f"{name}: answers, {at * 100 // sizes.processes} %")
        with ExitStack() as stack:
            running: dict[str, Running] = {}
            for seat, kind in enumerate(rng.sample(sorted(kinds), len(kinds))):
                running[kind] = stack.enter_context(program.running(kinds[kind], seat))
            for kind in running:
                for _ in range(program.warm_up):
                    running[kind].answer()
            _settle(partial(_attached, domain, running["shared"].processes()), _ATTACH_S)
            for each in ratios.values():
                each.append([])
            for _ in range(sizes.answers):
                cpu_s: dict[str, float] = {}
                for kind in rng.sample(sorted(kinds), len(kinds)):
                    before, begun = running[kind].cpu_s(), time.perf_counter()
                    running[kind].answer()
                    found.add(name, **{f"answer_{kind}_s": time.perf_counter() - begun})
                    cpu_s[kind] = running[kind].cpu_s() - before
                    found.add(name, **{f"answer_{kind}_cpu_s": cpu_s[kind]})
                for kind, each in ratios.items():
                    each[-1].append(cpu_s[kind] / cpu_s["plain"])
    for kind, label in (("shared", "with the shim / plainly"), ("again", "plainly / plainly")):
        for group in ratios[kind]:
            for value in group:
                found.add(name, **{f"answer_{kind}_cpu_ratio": value})
        low, high = interval(ratios[kind])
        found.add(name, **{f"answer_{kind}_low_ratio": low, f"answer_{kind}_high_ratio": high})
        median = found.median(name, f"answer_{kind}_cpu_ratio")
        found.notes.append(
            f"{name}: CPU time of an answer {label}: {median:.4f}, 95 % between {low:.4f} and {high:.4f}"
            f" ({sizes.processes} processes, {sizes.answers} answers each)"
        )


def _lives(found: Samples, sizes: Sizes, domains: Sequence[_Domain], name: str, tell: Tell) -> None:
    """Start it with the shim, have it answer before and while pages are shared, end it; as often as is wanted."""
    wanted: dict[str, list[str]] = {}
    for domain in domains:
        with domain.programs[name].running(domain.programs[name].variables) as plain:
            wanted[domain.name] = [plain.answer(), plain.answer()]
    lives = wrong = attached = 0
    while lives < sizes.lives:
        tell(f"{name}: lives, {lives * 100 // sizes.lives} %")
        domain = domains[lives // SEATS % len(domains)]
        program = domain.programs[name]
        with ExitStack() as stack:
            variables = domain.with_shim(name)
            running = [stack.enter_context(program.running(variables, seat)) for seat in range(SEATS)]
            said = [[one.answer()] for one in running]
            end = time.monotonic() + _LIFE_S
            while time.monotonic() < end and not all(_attached(domain, one.processes()) for one in running):
                time.sleep(_POLL_S)
            attached += sum(_attached(domain, one.processes()) > 0 for one in running)
            for one, words in zip(running, said, strict=True):
                words.append(one.answer())
            wrong += sum(words != wanted[domain.name] for words in said)
            wrong += sum(any(one.end()) for one in running)
        lives += SEATS
    if lives:
        found.add(name, lives=lives, lives_attached=attached, lives_with_other_output=wrong)


def _starts(found: Samples, sizes: Sizes, domains: Sequence[_Domain], name: str, tell: Tell) -> None:
    """Start something short so often with the shim, and now and then without, or without an agent, in random order."""
    kinds = ["shared"] * sizes.starts
    for kind in ("plain", "no_agent"):
        kinds += [kind] * min(sizes.starts, _STARTS_WITHOUT)
    rng = random.Random(name)
    rng.shuffle(kinds)
    wanted = [domain.programs[name].once(domain.programs[name].variables).said for domain in domains]
    wrong = 0
    for at, kind in enumerate(kinds):
        tell(f"{name}: starts, {at * 100 // len(kinds)} %")
        which = rng.randrange(len(domains))
        domain = domains[which]
        program = domain.programs[name]
        variables = program.variables if kind == "plain" else domain.with_shim(name, agent=kind == "shared")
        one = program.once(variables)
        found.add(name, **{f"start_{kind}_s": one.wall_s, f"start_{kind}_cpu_s": one.cpu_s})
        wrong += one.said != wanted[which]
    found.add(name, starts_with_other_output=wrong)


@contextmanager
def _in_all(domains: Sequence[_Domain], name: str, *, shim: bool) -> Iterator[list[Running]]:
    """Run a program in these domains until the block is left."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                domain.programs[name].running(domain.with_shim(name) if shim else domain.programs[name].variables)
            )
            for domain in domains
        ]


def _is_left_out(path: Path, root: Path) -> bool:
    """Say whether a file stays out by the default rules, which exclude libraries for ciphers."""
    policy = Policy({_POOL: PoolRules(_POOL, max_file_bytes=_MAX_FILE)}, ())
    return policy.judge(_POOL, os.fsencode(f"/{path.relative_to(root)}"), path.stat().st_size)[0] is not None


def _private(one: Running) -> int:
    return sum(memory_of(pid).total for pid in one.processes())


def _mapped(one: Running, root: Path) -> dict[str, int]:
    """Return the files below a folder that a program has mapped, with their bytes in its memory (Rss in smaps).

    Of several processes the one counts that has most of a file.
    """
    found: dict[str, int] = {}
    for pid in one.processes():
        mine: dict[str, int] = {}
        path = ""
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split(None, 5)
            if "-" in words[0]:
                path = words[5] if len(words) == 6 and words[5].startswith(f"{root}/") else ""
            elif path and words[0] == "Rss:":
                mine[path] = mine.get(path, 0) + int(words[1]) * 1024
        for path, size in mine.items():
            found[path] = max(found.get(path, 0), size)
    return found


def _offered(domain: _Domain) -> int:
    return int((status_of(domain.control) or {}).get("offered_files", 0))


def _attached(domain: _Domain, pids: Collection[int] | None = None) -> int:
    """Return the bytes that programs of a domain have attached, all of them or those."""
    programs: list[dict[str, Any]] = ask(domain.control, {"verb": "ps"})["programs"]
    return sum(program["attached_bytes"] for program in programs if pids is None or program["pid"] in pids)


def _settle(figure: Callable[[], int], stable_s: float, between: Callable[[], None] | None = None) -> None:
    """Wait until a figure is more than none and has stayed what it is for so long."""
    end = time.monotonic() + _LIMIT_S
    last, since = figure(), time.monotonic()
    while time.monotonic() < end and (last == 0 or time.monotonic() - since < stable_s):
        if between is not None:
            between()
        time.sleep(_POLL_S)
        now = figure()
        if now != last:
            last, since = now, time.monotonic()

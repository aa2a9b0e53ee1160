"""Real programs, unchanged, with the shim and without: output, memory, start-up, steady state.

Two domains have copies of their own of each program, of its libraries and of its data. A program runs in both domains,
first plainly, then with the shim: the page cache of what it maps says what the domains keep (cachestat), smaps what
processes have for themselves. Start-up is from fork to exit of a short command, steady state the time of an answer of a
running program; both by turns with and without, in the same run, with the domains' agents at work.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from sharearea.common.control import ask
from sharearea.common.errors import HostError
from sharearea_agent.preload import environment, library

from .fleet import start_broker
from .host import MIB, OpenFiles, Processes, check_room, command, memory_of, status_of
from .report import Samples, Tell

_DOMAINS: Final = ("bench-1", "bench-2")
_POLL_S: Final = 0.25
_STABLE_S: Final = 7.0  # longer than the agent's drop_interval
_LIMIT_S: Final = 90.0
_SHORT_S: Final = 60.0

_PYTHON_MODULES: Final = "asyncio, ctypes, decimal, email, hashlib, json, sqlite3, ssl, unittest, xml.dom"
_PYTHON: Final = f"""
import {_PYTHON_MODULES}, sys
text = json.dumps([[i, str(i)] for i in range(20000)])
print("ready", flush=True)
for line in sys.stdin:
    print(sum(len(json.dumps(json.loads(text))) for _ in range(2)), flush=True)
"""
_DATA: Final = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
def total():
    return sum(data[at] for at in range(0, len(data), 4096))
total()
print("ready", flush=True)
for line in sys.stdin:
    print(total(), flush=True)
"""
_NODE: Final = """
const lines = require('readline').createInterface({input: process.stdin});
const text = JSON.stringify(Array.from({length: 20000}, (_, i) => [i, String(i)]));
console.log('ready');
function work() { let n = 0; for (let i = 0; i < 4; i++) n += JSON.stringify(JSON.parse(text)).length; return n; }
lines.on('line', () => console.log(work()));
"""
_SQL: Final = "select count(*), sum(a.value * b.value % 7) from n a, n b where a.value % 50 = 1;"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `data_bytes`: of the file that `data` maps."""

    programs: tuple[str, ...] = ("python3", "node", "sqlite3", "git", "data")
    starts: int = 100
    answers: int = 30
    data_bytes: int = 128 * MIB
    short: bool = False


QUICK: Final = Sizes(programs=("sqlite3", "data"), starts=3, answers=2, data_bytes=8 * MIB, short=True)


@dataclass(slots=True)
class _Program:
    """One program in one domain: where its copies are and how it is run."""

    folder: Path
    long: list[str]  # prints "ready" or answers `first`, then one line for each that it reads
    short: list[str]
    question: str = ""
    replies: int = 1
    first: str = ""  # what to write before it says "ready"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LD_", "PYTHON", "GIT_"))}
        return kept | {"LD_LIBRARY_PATH": os.fspath(self.folder / "lib")} | self.environment


@dataclass(slots=True)
class _Domain:
    name: str
    root: Path
    socket: Path
    control: Path
    programs: dict[str, _Program] = field(default_factory=dict)


def _with_shim(variables: dict[str, str], socket: str) -> dict[str, str]:
    """Do what `sharearea-agent exec` does to the environment, without the time that Python takes to do it."""
    shim = library()
    if shim is None:
        raise HostError("there is no shim for this machine", "it is built for x86-64")
    return environment(variables, shim, socket)


def run(sizes: Sizes, work: Path, tell: Tell) -> Samples:
    """Measure. Raises HostError if this host has none of the programs, or something ends that should not."""
    found = Samples("programs")
    check_room(work, 1024 * MIB, 1024 * MIB)
    folder = work / "programs"
    domains = [_Domain(name, folder / name, folder / f"{name}.sock", folder / f"{name}.control") for name in _DOMAINS]
    for domain in domains:
        domain.root.mkdir(parents=True)
        for name in sizes.programs:
            tell(f"copies of {name}")
            made = _install(name, domain.root / name, sizes)
            if made is None:
                found.skip(name, "not installed here")
            else:
                domain.programs[name] = made
    _open_to_all(folder)
    with Processes(folder) as processes:
        start_broker(processes, folder, max_file_bytes=1 << 30)
        for domain in domains:
            _start_agent(processes, folder, domain)
        for name in domains[0].programs:
            _measure(found, sizes, domains, name, tell)
    found.notes.append(
        f"{len(_DOMAINS)} domains, each with its own copies; starts and answers by turns with and without the shim"
    )
    return found


# --------------------------------------------------------------------------------------------------------- copies


def _install(name: str, folder: Path, sizes: Sizes) -> _Program | None:
    """Copy a program with its libraries and data; None if this system has it not."""
    binary = shutil.which("python3" if name == "data" else name, path="/usr/bin:/bin")
    if binary is None:
        return None
    real = Path(binary).resolve()
    (folder / "lib").mkdir(parents=True)
    mine = folder / real.name
    shutil.copy(real, mine)
    for line in subprocess.run(["ldd", real], capture_output=True, text=True, check=True).stdout.splitlines():
        words = line.split()
        if "=>" in words and words[2].startswith("/"):
            shutil.copy(words[2], folder / "lib" / words[0])
    program = os.fspath(mine)
    match name:
        case "python3" | "data":
            library = Path(f"/usr/lib/{real.name}")
            shutil.copytree(library, folder / "lib" / real.name, ignore=shutil.ignore_patterns("test", "dist-packages"))
            made = _Program(
                folder, [], [], environment={"PYTHONHOME": os.fspath(folder), "PYTHONDONTWRITEBYTECODE": "1"}
            )
            if name == "data":
                data = folder / "model.bin"
                _write_noise(data, sizes.data_bytes)
                made.long = [program, "-c", _DATA, os.fspath(data)]
                made.short = [program, "-c", _DATA, os.fspath(data)]
            else:
                made.long = [program, "-c", _PYTHON]
                made.short = [program, "-c", f"import {_PYTHON_MODULES}, sys; print(sys.version)"]
            return made
        case "node":
            return _Program(folder, [program, "-e", _NODE], [program, "-e", "console.log(process.versions)"])
        case "sqlite3":
            base = os.fspath(folder / "data.db")
            fill = "create table n as select value from generate_series(1, 20000); select count(*) from n;"
            subprocess.run([program, base, fill], check=True, capture_output=True)
            words = [program, "-batch", "-readonly", base]
            return _Program(folder, words, [*words, "select sum(value) from n;"], _SQL, first="select 'ready';")
        case "git":
            return _install_git(folder, program)
    raise HostError(f"there is no program {name} in this bench", "see Sizes.programs")


def _install_git(folder: Path, program: str) -> _Program:
    repository = folder / "repository"
    git = [program, "-C", os.fspath(repository), "-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    repository.mkdir()
    when = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}  # the same in all domains
    for number in range(300):
        _write_noise(repository / f"file-{number:03}", 65536, number)
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"], ["gc", "-q"]):
        subprocess.run([*git, *words], check=True, capture_output=True, env=dict(os.environ) | when)
    question = "\n".join(f"HEAD:file-{number:03}" for number in range(300))
    made = _Program(folder, [*git, "cat-file", "--batch-check"], [*git, "show", "--stat", "--format=%T"], question, 300)
    made.first = "HEAD"
    return made


def _write_noise(path: Path, size: int, seed: int = 0) -> None:
    made = random.Random(seed)
    with path.open("wb") as file:
        for at in range(0, size, MIB):
            file.write(made.randbytes(min(MIB, size - at)))


def _open_to_all(folder: Path) -> None:
    """Files that not everybody may read are not reported; and what was just written is not clean yet."""
    for top, folders, names in os.walk(folder):
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
    with _running(domains, name, shim=False) as plain:
        for one in plain:
            _answer(one, domains[0].programs[name])
        mapped = [_mapped(one.pid, domain.root) for one, domain in zip(plain, domains, strict=True)]
        private = memory_of(plain[0].pid).total
    paths = [[Path(path) for path in sorted(each)] for each in mapped]
    with OpenFiles([path for each in paths for path in each]) as files, OpenFiles(paths[0]) as first:
        # Resident and reported, whatever this host's kernel evicts meanwhile.
        _settle(lambda: sum(_offered(domain) for domain in domains), stable, files.read_through)
        found.add(name, needed_bytes=sum(mapped[0].values()), private_plain_bytes=private)
        found.add(name, one_domain_before_bytes=first.cached_bytes())
        tell(f"{name}: with the shim")
        with _running(domains, name, shim=True) as shared:
            for one in shared:
                _answer(one, domains[0].programs[name])
            _settle(lambda: sum(_attached(domain) for domain in domains), stable)
            _settle(files.cached_bytes, stable)
            for one in shared:
                _answer(one, domains[0].programs[name])
            found.add(
                name,
                attached_bytes=_attached(domains[0]),
                one_domain_after_bytes=first.cached_bytes(),
                private_shared_bytes=memory_of(shared[0].pid).total,
            )
            with _running(domains[:1], name, shim=False) as plain:
                _answer(plain[0], domains[0].programs[name])
                for _ in range(sizes.answers):
                    found.add(name, answer_plain_s=_answer(plain[0], domains[0].programs[name]))
                    found.add(name, answer_shared_s=_answer(shared[0], domains[0].programs[name]))
    found.ratio(name, "kept_ratio", (name, "one_domain_after_bytes"), (name, "one_domain_before_bytes"))
    found.ratio(name, "answer_ratio", (name, "answer_shared_s"), (name, "answer_plain_s"))
    tell(f"{name}: starts")
    _starts(found, sizes, domains[0], name)


def _starts(found: Samples, sizes: Sizes, domain: _Domain, name: str) -> None:
    program = domain.programs[name]
    with_shim = _with_shim(program.variables, os.fspath(domain.socket))
    no_agent = _with_shim(program.variables, os.fspath(domain.socket) + ".none")
    kinds = {"plain": program.variables, "shared": with_shim, "no_agent": no_agent}
    wrong = 0
    rng = random.Random(1)
    for _ in range(sizes.starts):
        said: dict[str, object] = {}
        for kind in rng.sample(sorted(kinds), len(kinds)):
            wall_s, cpu_s, said[kind] = _time(program.short, kinds[kind])
            found.add(name, **{f"start_{kind}_s": wall_s, f"start_{kind}_cpu_s": cpu_s})
        wrong += sum(each != said["plain"] for each in said.values())
    found.add(name, starts_with_other_output=wrong)


def _time(words: list[str], variables: dict[str, str]) -> tuple[float, float, tuple[int, bytes, bytes]]:
    """Run a command to its end. Returns the time that passed, the CPU time that it took, and what it said."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    done = subprocess.run(
        words, env=variables, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SHORT_S, check=False
    )
    wall_s = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall_s, cpu_s, (done.returncode, done.stdout, done.stderr)


@contextmanager
def _running(domains: Sequence[_Domain], name: str, *, shim: bool) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a program in these domains until the block is left; all of them have said that they are ready."""
    made: list[subprocess.Popen[str]] = []
    try:
        for domain in domains:
            program = domain.programs[name]
            variables = program.variables
            if shim:
                variables = _with_shim(variables, os.fspath(domain.socket))
            one = subprocess.Popen(
                program.long, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            made.append(one)
            if program.first:
                _write(one, program.first)
            _line(one)
        yield made
    finally:
        for one in made:
            for stream in (one.stdin, one.stdout):
                if stream is not None:
                    stream.close()
            one.terminate()
            one.wait()


def _write(process: subprocess.Popen[str], text: str) -> None:
    stream: IO[str] | None = process.stdin
    assert stream is not None
    stream.write(text + "\n")
    stream.flush()


def _line(process: subprocess.Popen[str]) -> str:
    stream: IO[str] | None = process.stdout
    assert stream is not None
    line = stream.readline()
    if not line:
        raise HostError(f"a program of the bench ended with exit code {process.wait()}")
    return line


def _answer(process: subprocess.Popen[str], program: _Program) -> float:
    """Ask a running program, and return how long its answer takes."""
    begun = time.perf_counter()
    _write(process, program.question)
    for _ in range(program.replies):
        _line(process)
    return time.perf_counter() - begun


def _mapped(pid: int, root: Path) -> dict[str, int]:
    """Return the files below a folder that a process has mapped, with their bytes in its memory (Rss in smaps)."""
    found: dict[str, int] = {}
    path = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split(None, 5)
        if "-" in words[0]:
            path = words[5] if len(words) == 6 and words[5].startswith(f"{root}/") else ""
        elif path and words[0] == "Rss:":
            found[path] = found.get(path, 0) + int(words[1]) * 1024
    return found


def _offered(domain: _Domain) -> int:
    return int((status_of(domain.control) or {}).get("offered_files", 0))


def _attached(domain: _Domain) -> int:
    programs: list[dict[str, Any]] = ask(domain.control, {"verb": "ps"})["programs"]
    return sum(program["attached_bytes"] for program in programs)


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

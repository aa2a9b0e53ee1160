"""The demo: a real broker, real agents and real programs share real files on this host, and the kernel says what it
saved.

Each domain gets a root folder with its own copies of real files, and files of its own. Processes are the installed
commands, started as a user would. What could be saved at best is counted here, from the files, without the broker; what
was saved is counted by cachestat over every file, by the area's memfds and by smaps_rollup.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .common import native
from .common.control import ask
from .common.errors import HostError, PeerUnreachable, UsageError, VerificationFailed
from .common.globs import Outcome
from .common.wire import PAGE_SIZE
from .demo_disk import Disk, lacking, make_image
from .policy import PoolRules

POOL: Final = "demo"
_MIB: Final = 1 << 20
_OWN_FILE_BYTES: Final = 1 * _MIB
_TMPFS_MAGIC: Final = frozenset({0x01021994, 0x858458F6})  # tmpfs, ramfs
_START_S: Final = 20.0
_PHASE_S: Final = 600.0
_WARM_S: Final = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to its verb."""
    parser.add_argument("--domains", type=int, default=3, metavar="N", help="number of domains (default: 3)")
    parser.add_argument(
        "--size-mib", type=int, default=256, metavar="MIB", help="common files of each domain (default: 256)"
    )
    parser.add_argument(
        "--source",
        type=Path,
        action="append",
        metavar="DIR",
        help="take the common files from here; may be given again (default: this system's libraries and Python's)",
    )
    parser.add_argument(
        "--unique-ratio",
        type=float,
        default=0.1,
        metavar="R",
        help="files of its own that each domain gets, as a part of --size-mib (default: 0.1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument(
        "--no-cold-start", action="store_true", help="leave out the last domain, whose disk is a copy of another's"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the domains and the logs")
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="make the folder here; it must be on a disk file system (default: /var/tmp)",
    )


@dataclass(slots=True)
class _Domain:
    """One domain of the demo, and what belongs to it."""

    name: str
    root: Path
    own_disk: bool = False  # the root is a file system of its own, and the agent's cache is in it
    files: list[Path] = field(default_factory=list)
    agent: subprocess.Popen[bytes] | None = None
    consumer: subprocess.Popen[str] | None = None

    @property
    def control(self) -> Path:
        """The agent's control socket."""
        return self.root.parent / f"{self.name}.control"

    @property
    def consumers(self) -> Path:
        """The agent's socket for consumers."""
        return self.root.parent / f"{self.name}.sock"

    @property
    def cache(self) -> Path:
        """The agent's fingerprint cache."""
        if self.own_disk:
            return self.root / "agent" / "fingerprints.db"
        return self.root.parent / f"{self.name}.cache" / "fingerprints.db"


def run(options: argparse.Namespace) -> int:
    """Run the demo and return the exit code."""
    if options.domains < 2:
        raise UsageError("--domains: sharing needs at least 2")
    if options.size_mib < 1:
        raise UsageError("--size-mib: at least 1")
    if not 0 <= options.unique_ratio <= 10:
        raise UsageError("--unique-ratio: from 0 to 10")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console(highlight=False)
    parent = options.work_dir or Path("/var/tmp")
    _check_room(parent, options)
    work = Path(tempfile.mkdtemp(prefix="sharearea-demo-", dir=parent))
    work.chmod(0o755)
    interrupts = _Interrupts()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupts)
    demo = _Demo(work, options, console, interrupts)
    try:
        figures = demo.run()
        if options.keep:
            demo.wait_for_lines()
    except BaseException:
        demo.show_logs()
        raise
    finally:
        with interrupts.held():
            demo.stop()
            if options.keep:
                console.print(f"kept: {work}")
            else:
                shutil.rmtree(work, ignore_errors=True)
    _print_figures(console, figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["mismatched_bytes"]:
        raise VerificationFailed(
            f"{figures['mismatched_bytes']} bytes read through sharearea differ from their files",
            "run again with --keep and report this with the logs",
        )
    return 0


class _Interrupts:
    """A signal handler that raises KeyboardInterrupt, but not while a process is being started or ended."""

    def __init__(self) -> None:
        self._held = False
        self._pending = False

    def __call__(self, *_: object) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._pending = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put interrupts off to the end of the block."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt


def _check_room(parent: Path, options: argparse.Namespace) -> None:
    if not parent.is_dir():
        raise UsageError(f"--work-dir: {parent} is no folder")
    if os.statvfs(parent).f_bavail * os.statvfs(parent).f_frsize < _needed(options) + 64 * _MIB:
        raise HostError(
            f"{parent} has no room for {_needed(options) / _MIB:.0f} MiB of copies", "use --work-dir or less --size-mib"
        )
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) * 1024 < _needed(options) * 1.5:
            raise HostError(
                f"{_needed(options) / _MIB:.0f} MiB of page cache and the area do not fit into this host's free memory",
                "use less --size-mib or fewer --domains",
            )
    kind = subprocess.run(["stat", "-f", "-c", "%t", os.fspath(parent)], capture_output=True, text=True, check=True)
    if int(kind.stdout, 16) in _TMPFS_MAGIC:
        raise HostError(f"{parent} is in memory (tmpfs): it has no page cache to share", "use --work-dir on a disk")


def _needed(options: argparse.Namespace) -> int:
    return int(options.domains * options.size_mib * _MIB * (1 + options.unique_ratio))


class _Demo:
    """One run: the folder, the processes, the clock."""

    def __init__(self, work: Path, options: argparse.Namespace, console: Console, interrupts: _Interrupts) -> None:
        self.work = work
        self.interrupts = interrupts
        self.options = options
        self.console = console
        self.domains = [_Domain(f"demo-{n + 1}", work / f"demo-{n + 1}") for n in range(options.domains)]
        self.chosen: list[Path] = []
        self.broker: subprocess.Popen[bytes] | None = None
        self.status_socket = work / "status.sock"
        self.logs: list[IO[bytes]] = []
        self.seconds: dict[str, float] = {}
        self.disk: Disk | None = None
        self.late: list[_Domain] = []  # those of the cold start
        self.warm_at = time.monotonic() + _WARM_S

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> dict[str, Any]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        self.chosen = _choose(self.options.source or _default_sources(), self.options.size_mib * _MIB, self.work)
        with Progress(*columns, console=self.console, transient=True) as progress:
            self._copy(progress)
            counted = self._count(progress)
            meminfo_before = _meminfo()
            before = self._cached_bytes()
            total = time.monotonic()
            self._start()
            self._phase(progress, "scan", self._scanned)
            self._phase(progress, "report", self._reported)
            self._phase(progress, "publish", self._published)
            self._consume(progress, "attach")
            self._phase(progress, "settle", self._attached, quiet=True)
            verified = self._consume(progress, "verify")
            self._phase(progress, "drop", self._dropped)
            self.seconds["total"] = time.monotonic() - total
            after = self._cached_bytes()
            meminfo_after = _meminfo()
            figures = self._figures(counted, before, after, verified)
            figures["cold_start"] = self._cold_start(progress)
            figures["meminfo"] = {
                key: {"before": meminfo_before[key], "after": meminfo_after[key]}
                for key in ("MemFree", "MemAvailable", "Cached", "Shmem")
            }
        return figures

    def _copy(self, progress: Progress) -> None:
        options = self.options
        own = round(options.size_mib * _MIB * options.unique_ratio / _OWN_FILE_BYTES)
        task = progress.add_task("copy files", total=len(self.domains) * (len(self.chosen) + own))
        for domain in self.domains:
            for source in self.chosen:
                target = domain.root / "common" / source.relative_to(source.anchor)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                target.chmod(0o644)
                domain.files.append(target)
                progress.advance(task)
            folder = domain.root / "own"
            folder.mkdir(parents=True)
            for n in range(own):
                target = folder / f"data-{n:04}"
                target.write_bytes(random.randbytes(_OWN_FILE_BYTES))
                domain.files.append(target)
                progress.advance(task)
        os.sync()  # dirty pages cannot be dropped
        for domain in self.domains:
            for path in domain.files:
                _read_through(path)

    def _count(self, progress: Progress) -> dict[str, int]:
        """Count, from the files alone, what sharing could save at best: one copy of each page that two domains have."""
        task = progress.add_task("count pages", total=sum(len(domain.files) for domain in self.domains))
        zero = hashlib.blake2b(bytes(PAGE_SIZE), digest_size=16).digest()
        everywhere: Counter[bytes] = Counter()
        holders: Counter[bytes] = Counter()
        pages = zeros = own_again = 0
        for domain in self.domains:
            mine: Counter[bytes] = Counter()
            for path in domain.files:
                data = path.read_bytes()
                for at in range(0, len(data), PAGE_SIZE):
                    mine[
                        hashlib.blake2b(data[at : at + PAGE_SIZE].ljust(PAGE_SIZE, b"\0"), digest_size=16).digest()
                    ] += 1
                progress.advance(task)
            pages += mine.total()
            zeros += mine.pop(zero, 0)
            own_again += mine.total() - len(mine)
            everywhere.update(mine)
            holders.update(mine.keys())
        possible = sum(everywhere[page] - 1 for page, count in holders.items() if count > 1)
        return {
            "candidate_pages": pages,
            "zero_pages": zeros,
            "self_shared_pages": own_again,
            "possible_saved_bytes": possible * PAGE_SIZE,
        }

    def _start(self) -> None:
        config = self.work / "broker.toml"
        config.write_text(_broker_toml(self.work, self.status_socket, self.options))
        with self.interrupts.held():
            self.broker = self._spawn("broker", [_command("sharearea"), "broker", "--config", os.fspath(config)])
        _wait_for(lambda: self._status() is not None, _START_S, "the broker", self._check_alive)
        for domain in self.domains:
            self._start_agent(domain)

    def _start_agent(self, domain: _Domain) -> None:
        config = self.work / f"{domain.name}.toml"
        config.write_text(_agent_toml(domain, self.work))
        command = [_command("sharearea-agent"), "run", "--config", os.fspath(config)]
        with self.interrupts.held():
            domain.agent = self._spawn(domain.name, command)

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        log = (self.work / f"{name}.log").open("wb")
        self.logs.append(log)
        # A session of its own: Ctrl-C reaches the demo, which ends its processes in order.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _phase(
        self, progress: Progress, name: str, done: Callable[[], tuple[float, float]], *, quiet: bool = False
    ) -> None:
        """Wait until `done` returns (n, n); show how far it is."""
        task = progress.add_task(name, total=None)
        begun = time.monotonic()
        while True:
            self._check_alive()
            have, want = done()
            progress.update(task, completed=have, total=want or None)
            if have >= want:
                break
            if time.monotonic() - begun > _PHASE_S:
                raise HostError(f"{name}: {have:.0f} of {want:.0f} after {_PHASE_S:.0f} s", "see the logs above")
            time.sleep(0.02)
        if not quiet:
            self.seconds[name] = time.monotonic() - begun

    def _scanned(self) -> tuple[float, float]:
        done = 0
        for domain in self.domains:
            status = _agent_status(domain)
            done += bool(status and status["scans"])
        return done, len(self.domains)

    def _reported(self) -> tuple[float, float]:
        entries = self._ask("domains")["domains"]
        reported = sum(entry["files"] for entry in entries)
        waiting = sum(entry["reports_under_way"] for entry in entries)
        expected = sum(len(domain.files) for domain in self.domains)
        ignored = sum(n["files"] for entry in entries for n in entry["ignored"].values())
        if reported + ignored < expected and time.monotonic() >= self.warm_at:
            # What the host evicted before it was looked at is not reported: have it read again, for the next scan.
            self.warm_at = time.monotonic() + _WARM_S
            for domain in self.domains:
                for path in domain.files:
                    _read_through(path)
        return reported + ignored - min(waiting, 1), expected

    def _published(self) -> tuple[float, float]:
        pool = self._ask("pools")["pools"][0]
        if pool["paused"]:
            raise HostError(f"the pool is paused: {pool['paused']}", "see the broker's log")
        offered = [status["offered_files"] if (status := _agent_status(domain)) else 0 for domain in self.domains]
        done = pool["pages_pending"] == 0 and all(offered) and self._settled((pool["pages_published"], offered))
        return (
            pool["pages_published"] + 1,
            pool["pages_published"] + (1 if done else 1 + max(1, pool["pages_pending"])),
        )

    _last: Any = None

    def _settled(self, value: Any) -> bool:
        """Return whether a value is the same as at the last look."""
        same = value == self._last
        self._last = value
        return bool(same)

    def _consume(self, progress: Progress, phase: str) -> dict[str, int]:
        """Let every consumer do one phase at the same time, and add up what they say."""
        task = progress.add_task(phase, total=sum(len(domain.files) for domain in self.domains))
        begun = time.monotonic()
        for domain in self.domains:
            self._tell_consumer(domain, phase)
        sums: Counter[str] = Counter()
        done = dict.fromkeys((domain.name for domain in self.domains), 0)
        for domain in self.domains:
            for line in _lines(domain):
                if "result" in line:
                    sums.update({key: value for key, value in line.items() if isinstance(value, int)})
                    done[domain.name] = len(domain.files)
                    break
                done[domain.name] = line["done"]
                progress.update(task, completed=sum(done.values()))
        if phase in ("attach", "verify"):
            self.seconds[phase] = time.monotonic() - begun
        return dict(sums)

    def _tell_consumer(self, domain: _Domain, phase: str) -> None:
        """Have a domain's program begin a phase; start it first if it does not run."""
        if domain.consumer is None:
            listing = self.work / f"{domain.name}.list"
            listing.write_bytes(b"\n".join(os.fsencode(path) for path in domain.files))
            log = (self.work / f"{domain.name}.consumer.log").open("wb")
            self.logs.append(log)
            module = "sharearea_agent.demo_consumer"
            with self.interrupts.held():
                domain.consumer = subprocess.Popen(
                    [sys.executable, "-m", module, os.fspath(listing), os.fspath(domain.consumers)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        assert domain.consumer.stdin is not None
        domain.consumer.stdin.write(phase + "\n")
        domain.consumer.stdin.flush()

    # ------------------------------------------------------------------------------------------------ the cold start

    def _cold_start(self, progress: Progress) -> dict[str, Any]:
        """Start a domain from a copy of another one's disk, without and with sharing: what does it read from the disk?

        The template has the common files and the fingerprint cache of the agent that ran in it, and was shut down.
        """
        why_not = "left out" if self.options.no_cold_start else lacking()
        if why_not:
            return {"why_not": why_not}
        template, cold = self.work / "template.img", self.work / "cold.img"
        folder = self.domains[0].root / "common"
        names = [path.relative_to(folder) for path in self.domains[0].files if path.is_relative_to(folder)]
        size = sum((folder / name).stat().st_size for name in names)
        task = progress.add_task("copy a disk", total=None)
        # A quarter more, for what is left of blocks, folders and the journal.
        make_image(template, folder, size * 5 // 4 + 64 * _MIB)
        with self._domain_on(template, "demo-template", names) as domain:
            for path in domain.files:
                _read_through(path)
            # A file that may have been written in this very tick of the clock is not believed (cache.py), and images
            # have whole seconds only.
            time.sleep(max(0.0, max(path.stat().st_ctime for path in domain.files) + 3 - time.time()))
            self._start_agent(domain)
            self._phase(progress, "look at it", lambda: self._seen(domain), quiet=True)
        subprocess.run(["cp", "--sparse=always", template, cold], check=True)
        template.unlink()
        progress.update(task, completed=1, total=1)
        found: dict[str, Any] = {"bytes": size, "files": len(names)}
        hashes = set()
        for way in ("without", "with"):
            with self._domain_on(cold, f"demo-{way}", names) as domain:
                if way == "with":
                    self._start_agent(domain)
                    self._phase(progress, "cold start", lambda: self._offered(domain), quiet=True)
                result = self._read_all(domain)
                hashes.add(result["sha256"])
                assert self.disk is not None
                found |= {
                    f"device_bytes_{way}": self.disk.read_bytes,
                    f"program_bytes_{way}": result["read_bytes"],
                    f"seconds_{way}": round(result["seconds"], 3),
                }
                if way == "with":
                    status = _agent_status(domain)
                    found["unread_bytes"] = (status["unread_pages"] if status else 0) * PAGE_SIZE
        if len(hashes) > 1:
            raise VerificationFailed("a domain that started cold read other bytes than its disk has", "run with --keep")
        cold.unlink()
        return found | {"device_ratio": round(found["device_bytes_with"] / max(1, found["device_bytes_without"]), 5)}

    @contextlib.contextmanager
    def _domain_on(self, image: Path, name: str, names: list[Path]) -> Iterator[_Domain]:
        """Mount a disk as a domain's root; at the end its processes end and it is unmounted."""
        domain = _Domain(name, self.work / name, own_disk=True)
        domain.files = [domain.root / path for path in names]
        with self.interrupts.held():
            self.disk = Disk(image, domain.root)
            self.late.append(domain)
        try:
            yield domain
        finally:
            with self.interrupts.held():
                self._stop_late()

    def _stop_late(self) -> None:
        """End what belongs to the cold start, and unmount its disk."""
        for domain in self.late:
            for process in (domain.consumer, domain.agent):
                if process is not None:
                    process.terminate()
                    _end(process)
        self.late.clear()
        if self.disk is not None:
            disk, self.disk = self.disk, None
            disk.close()

    def _seen(self, domain: _Domain) -> tuple[float, float]:
        """Return how many files the agent knows for good. What was evicted before it looked is read once more."""
        for path in domain.files:
            _read_through(path)
        status = _agent_status(domain)
        return (status["proven_files"] if status else 0), len(domain.files)

    def _offered(self, domain: _Domain) -> tuple[float, float]:
        status = _agent_status(domain)
        return (status["offered_files"] if status else 0), len(domain.files)

    def _read_all(self, domain: _Domain) -> dict[str, Any]:
        """Have the domain's program open all files and read them; return what it says, seconds for both together."""
        seconds = 0.0
        for phase in ("attach", "read"):
            self._tell_consumer(domain, phase)
            result = next(line for line in _lines(domain) if "result" in line)
            seconds += result["seconds"]
        return result | {"seconds": seconds}

    def _attached(self) -> tuple[float, float]:
        """Wait for files that were not offered yet when they were opened."""
        attached = offered = 0
        for domain in self.domains:
            status = _agent_status(domain)
            if status is None:
                return 0, 1
            attached += status["attached_files"]
            offered += status["offered_files"]
        return attached, offered

    def _dropped(self) -> tuple[float, float]:
        """Have the agents drop once more, until that brings nothing."""
        busy = [domain for domain in self.domains if not (status := _agent_status(domain)) or status["dropping"]]
        if busy:
            return len(self.domains) - len(busy), len(self.domains) + 1
        if self._settled(self._cached_bytes()):
            return 1, 1
        for domain in self.domains:
            ask(domain.control, {"verb": "drop"})
        return len(self.domains), len(self.domains) + 1

    # ------------------------------------------------------------------------------------------------- the figures

    def _cached_bytes(self) -> int:
        """Return the page cache of all files of all domains, as cachestat(2) counts it."""
        total = 0
        for domain in self.domains:
            for path in domain.files:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    total += native.cachestat(fd)[0]
                finally:
                    os.close(fd)
        return total * PAGE_SIZE

    def _figures(self, counted: dict[str, int], before: int, after: int, verified: dict[str, int]) -> dict[str, Any]:
        status = self._ask("status")
        pool = status["pools"][0]
        agents = [answer for domain in self.domains if (answer := _agent_status(domain)) is not None]
        processes = [process for process in (self.broker, *(domain.agent for domain in self.domains)) if process]
        overhead = sum(_private_bytes(process.pid) for process in processes)
        overhead += sum(_cached_file_bytes(path) for path in self._bookkeeping())
        saved = before - after - pool["area_bytes"]
        possible = counted["possible_saved_bytes"]
        return {
            "domains": len(self.domains),
            "files": sum(len(domain.files) for domain in self.domains),
            "candidate_pages": counted["candidate_pages"],
            "shared_pages": pool["pages_shared"],
            "sharing_pages": pool["pages_sharing"],
            "zero_pages": counted["zero_pages"],
            "self_shared_pages": counted["self_shared_pages"],
            "page_cache_bytes_before": before,
            "page_cache_bytes_after": after,
            "area_bytes": pool["area_bytes"],
            "overhead_bytes": overhead,
            "saved_bytes": saved,
            "net_saved_bytes": saved - overhead,
            "possible_saved_bytes": possible,
            "saved_ratio": round(saved / possible, 4) if possible else 0.0,
            "verified_bytes": verified.get("verified_bytes", 0),
            "mismatched_bytes": verified.get("mismatched_bytes", 0),
            "seconds": {
                key: round(self.seconds[key], 3)
                for key in ("scan", "report", "publish", "attach", "verify", "drop", "total")
            },
            "cpu_seconds": {
                "broker": round(status["cpu_ns"] / 1e9, 3),
                "agents": round(sum(agent["cpu_ns"] for agent in agents) / 1e9, 3),
            },
        }

    def _bookkeeping(self) -> Iterator[Path]:
        yield self.work / "state" / "store" / "data.mdb"
        for domain in self.domains:
            yield from domain.cache.parent.glob("*")

    # ------------------------------------------------------------------------------------------------- processes

    def _ask(self, verb: str) -> dict[str, Any]:
        return ask(self.status_socket, {"verb": verb})

    def _status(self) -> dict[str, Any] | None:
        try:
            return self._ask("status")
        except PeerUnreachable:
            return None

    def _check_alive(self) -> None:
        for name, process in (("broker", self.broker), *((domain.name, domain.agent) for domain in self.domains)):
            if process is not None and process.poll() is not None:
                raise HostError(f"{name} ended with exit code {process.returncode}", "its log is above")

    def show_logs(self) -> None:
        """Print the end of the logs, for whoever has to find out why the demo failed."""
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return
        for log in self.logs:
            lines = Path(log.name).read_text(errors="replace").splitlines()
            for line in lines[-5:]:
                print(f"{Path(log.name).name}: {line}", file=sys.stderr)

    def wait_for_lines(self) -> None:
        """Wait until the broker has logged figures that were taken from now on, so that the logs tell the whole."""

        def rounds() -> int:
            return (self.work / "broker.log").read_text(errors="replace").count('"event.name": "host.statistics"')

        # A round may be under way that began before.
        last, end = rounds() + 2, time.monotonic() + 10
        while rounds() < last and time.monotonic() < end:
            time.sleep(0.05)

    def stop(self) -> None:
        """End all processes that the demo started, the broker first: the last that its log says is what was shared."""
        self._stop_late()
        for group in (
            [self.broker],
            [domain.agent for domain in self.domains],
            [domain.consumer for domain in self.domains],
        ):
            running = [process for process in group if process is not None]
            for process in running:
                if process.stdin is not None:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
                else:
                    process.terminate()
            for process in running:
                _end(process)
        for log in self.logs:
            log.close()


def _end(process: subprocess.Popen[Any]) -> None:
    for stop in (process.terminate, process.kill):
        try:
            process.wait(5)
            break
        except subprocess.TimeoutExpired:
            stop()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _lines(domain: _Domain) -> Iterator[dict[str, Any]]:
    consumer = domain.consumer
    assert consumer is not None
    assert consumer.stdout is not None
    for line in consumer.stdout:
        yield json.loads(line)
    raise HostError(f"the program in {domain.name} ended with exit code {consumer.wait()}", "its log is above")


def _wait_for(done: Callable[[], bool], timeout: float, what: str, check: Callable[[], None]) -> None:
    end = time.monotonic() + timeout
    while not done():
        check()
        if time.monotonic() > end:
            raise HostError(f"{what} did not start within {timeout:.0f} s", "see the logs above")
        time.sleep(0.02)


def _agent_status(domain: _Domain) -> dict[str, Any] | None:
    try:
        return ask(domain.control, {"verb": "status"})
    except PeerUnreachable:
        return None


def _command(name: str) -> str:
    """Return the installed command beside this interpreter, or the one on the path."""
    beside = Path(sys.executable).with_name(name)
    found = os.fspath(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise HostError(f"the command {name} is not installed", "pip install . ./guest-agent")
    return found


def _default_sources() -> list[Path]:
    return [Path("/usr/lib"), Path(sysconfig.get_path("stdlib"))]


def _choose(sources: Sequence[Path], wanted_bytes: int, work: Path) -> list[Path]:
    """Choose files that policy would share, in an order that is fixed and mixes folders, up to a total size."""
    rules = PoolRules(POOL)
    found: dict[tuple[int, int], tuple[bytes, Path, int]] = {}
    for source in sources:
        if not source.is_dir():
            raise UsageError(f"--source: {source} is no folder")
        for folder, _, names in os.walk(source):
            for name in names:
                path = Path(folder, name)
                try:
                    info = path.lstat()
                except OSError:
                    continue
                if (
                    stat.S_ISREG(info.st_mode)
                    and info.st_mode & 0o004
                    and rules.min_file_bytes <= info.st_size <= min(rules.max_file_bytes, wanted_bytes)
                    and not path.is_relative_to(work)
                    and rules.filter.decide(os.fsencode(path))[0] is Outcome.PASS
                    and os.access(path, os.R_OK)
                ):
                    order = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
                    found.setdefault((info.st_dev, info.st_ino), (order, path, info.st_size))
    chosen: list[Path] = []
    total = 0
    for _, path, size in sorted(found.values()):
        if total + size <= wanted_bytes:
            chosen.append(path)
            total += size
        if total >= wanted_bytes * 0.999:
            break
    if total < wanted_bytes * 0.95:
        raise UsageError(
            f"the sources have {total / _MIB:.0f} MiB of files that may be shared, fewer than --size-mib",
            "add another --source, or ask for less",
        )
    return chosen


def _read_through(path: Path) -> None:
    """Read a file, so that all of it is in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(_MIB):
            pass


_OFTEN: Final = 'events_interval = "1 s"\n'  # a demo is over before the first line of the usual interval


def _broker_toml(work: Path, status_socket: Path, options: argparse.Namespace) -> str:
    area = max(1024, int(options.size_mib * 2)) * _MIB
    return (
        f'[broker]\nenabled = true\nsocket = "{work}/broker.sock"\nstatus_socket = "{status_socket}"\n'
        f'state_dir = "{work}/state"\n{_OFTEN}status_interval = "1 s"\nfile_statistics_interval = "1 s"\n\n'
        f"[pools.{POOL}]\n"
        f'domains = [{{ name = "demo-*", uid = {os.getuid()} }}]\nmax_area_bytes = {area}\n'
    )


def _agent_toml(domain: _Domain, work: Path) -> str:
    return (
        f'[agent]\nname = "{domain.name}"\nroot = "{domain.root}"\nfolders = ["{domain.root}"]\n'
        f'broker_socket = "{work}/broker.sock"\nconsumer_socket = "{domain.consumers}"\n'
        f'control_socket = "{domain.control}"\ncache = "{domain.cache}"\nmax_attached_files = 16384\n{_OFTEN}'
        + f'rescan_interval = "{1 if domain.own_disk else 5} s"\n'
    )


def _meminfo() -> dict[str, int]:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) * 1024
    return found


def _private_bytes(pid: int) -> int:
    """Return a process's private memory, without what is counted by itself: the area's segments and the store."""
    total, counts = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += counts * int(line.split()[1]) * 1024
        elif "-" in line.partition(" ")[0]:
            counts = "/memfd:sharearea-" not in line and not line.endswith("/data.mdb")
    return total


def _cached_file_bytes(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return native.cachestat(fd)[0] * PAGE_SIZE
    finally:
        os.close(fd)


def _cold_rows(cold: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if "why_not" in cold:
        yield "cold start", "-", f"a last domain, on a copy of another's disk: {cold['why_not']}"
        return
    yield (
        "cold start",
        f"{cold['device_ratio']:.2%}",
        f"of what a copy of a disk was read without: {cold['device_bytes_with'] / _MIB:,.1f} of "
        f"{cold['device_bytes_without'] / _MIB:,.1f} MiB by its own counter",
    )
    yield (
        "",
        "",
        f"the program itself: {cold['program_bytes_with'] / _MIB:,.1f} of "
        f"{cold['program_bytes_without'] / _MIB:,.1f} MiB (/proc/self/io), "
        f"{cold['seconds_with']:.1f} of {cold['seconds_without']:.1f} s",
    )


def _print_figures(console: Console, figures: dict[str, Any]) -> None:
    def size(key: str) -> str:
        return f"{figures[key] / _MIB:,.1f} MiB"

    def pages(key: str) -> str:
        return f"{figures[key]:,} pages, {figures[key] * PAGE_SIZE / _MIB:,.1f} MiB"

    seconds, cpu = figures["seconds"], figures["cpu_seconds"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows: list[tuple[str, str, str]] = [
        ("domains", str(figures["domains"]), f"{figures['files']:,} files, {figures['candidate_pages']:,} pages"),
        ("page cache before", size("page_cache_bytes_before"), "of these files, counted by cachestat"),
        ("page cache after", size("page_cache_bytes_after"), ""),
        (
            "sharing area",
            size("area_bytes"),
            f"{figures['shared_pages']:,} pages serve {figures['sharing_pages']:,} mappings",
        ),
        ("saved", size("saved_bytes"), f"{figures['saved_ratio']:.1%} of the possible {size('possible_saved_bytes')}"),
        ("overhead", size("overhead_bytes"), "private memory of broker and agents, store, caches"),
        ("net saved", size("net_saved_bytes"), ""),
        ("zero pages", str(figures["zero_pages"]), "counted apart, never stored"),
        ("shared with itself", str(figures["self_shared_pages"]), "pages that a domain has more than once"),
        (
            "verified",
            size("verified_bytes"),
            f"read back and compared by SHA-256; {figures['mismatched_bytes']} bytes differ",
        ),
        *_cold_rows(figures["cold_start"]),
        ("time", f"{seconds['total']:.1f} s", ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total")),
        ("CPU", f"{cpu['broker'] + cpu['agents']:.1f} s", f"broker {cpu['broker']:.1f}, agents {cpu['agents']:.1f}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)

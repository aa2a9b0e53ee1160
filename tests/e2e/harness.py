"""One host under test: a folder on a disk, a real broker, domains with real agents and real programs.

Starts and ends processes, waits for conditions, writes files that have a page cache, and reads logs. Nothing is faked;
what is expected of it all is in the tests. Every process has a log file; a traceback in one of them fails the test that
owns the host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sharearea.common import native
from sharearea.common.control import ask
from sharearea.common.errors import PeerUnreachable, ShareareaError
from tests.lines import faults, read

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
PAGE = 4096
MIB = 1 << 20
POOL = "p"
DEADLINE = 40.0
"""Seconds until a condition that must come true is given up. Reached only when something is broken."""
USE_S = 3.0
"""Seconds after which a condition that needs resident pages has the files read again."""


def wait(what: str, done: Callable[..., Any], *about: Any, deadline: float = DEADLINE) -> Any:
    """Ask `done(*about)` until it says something true, and return that. AssertionError when the deadline passes."""
    end = time.monotonic() + deadline
    while True:
        found = done(*about)
        if found:
            return found
        assert time.monotonic() < end, f"after {deadline} s: not yet {what}"
        time.sleep(0.01)


class Process:
    """One process with its log."""

    def __init__(self, name: str, command: Sequence[str | os.PathLike[str]], log: Path, **more: Any) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                [os.fspath(part) for part in command],
                stdin=more.pop("stdin", subprocess.DEVNULL),
                stdout=more.pop("stdout", out),
                stderr=out,
                start_new_session=True,
                **more,
            )

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.popen.poll() is None

    def send(self, number: int) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def stop(self) -> None:
        """Send SIGSTOP and wait until all of its threads stand still: the kernel stops them one after the other."""
        self.popen.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self.pid}/task")
        wait(
            f"all threads of {self.name} stopped",
            lambda: all((t / "stat").read_text().rpartition(")")[2].split()[0] == "T" for t in threads.iterdir()),
        )

    def kill(self) -> None:
        """End it at once, with -9, and wait."""
        self.popen.kill()
        self.popen.wait()

    def end(self) -> int:
        """Ask it to end; return its exit code. AssertionError if it does not."""
        self.popen.send_signal(signal.SIGCONT)
        self.popen.terminate()
        try:
            return self.popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end by SIGTERM") from None

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the logged events of a name."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            if f'"{name}"' in line:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("event.name") == name:
                        found.append(event)
        return found

    def memory(self) -> int:
        """Return its private memory in bytes."""
        total = 0
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1]) * 1024
        return total

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Consumer(Process):
    """A program of a domain (program.py), and the questions to it."""

    def __init__(
        self,
        domain: Domain,
        number: int,
        *,
        files: int | None = None,
        command: Sequence[str | os.PathLike[str]] | None = None,
    ) -> None:
        def limit() -> None:
            # Checks read without a pause; the service comes first.
            os.nice(10)
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        name = f"{domain.name}.program-{number}"
        super().__init__(
            name,
            command or [sys.executable, HERE / "program.py", domain.consumer_socket],
            domain.host.folder / f"{name}.log",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=limit,
        )
        self.domain = domain

    def ask(self, verb: str, **more: Any) -> Any:
        """Ask and wait for the answer. OSError with what the program said if it failed."""
        self.tell(verb, **more)
        return self.answer()

    def tell(self, verb: str, **more: Any) -> None:
        """Ask without waiting."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"verb": verb} | more).encode() + b"\n")
        self.popen.stdin.flush()

    def answer(self) -> Any:
        """Wait for an answer."""
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], DEADLINE)
        assert ready, f"{self.name} does not answer"
        line = self.popen.stdout.readline()
        assert line, f"{self.name} ended with {self.popen.wait()}"
        reply = json.loads(line)
        if not reply["ok"]:
            raise OSError(reply["error"])
        return reply["answer"]

    def open(self, path: Path | bytes, name: str = "f") -> dict[str, Any]:
        """Open a file under a name."""
        answer: dict[str, Any] = self.ask("open", name=name, path=os.fsencode(path).hex())
        return answer

    def pages(self, name: str = "f") -> int:
        """Return how many pages of a file are shared now."""
        return int(self.ask("state")[name]["pages"])

    def wait_shared(self, pages: int, name: str = "f") -> None:
        """Wait until so many pages are shared."""
        wait(f"{pages} pages of {name} shared in {self.name}", lambda: self.pages(name) == pages)

    def quit(self) -> None:
        """End it by closing its standard input."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.close()
        self.popen.wait(DEADLINE)
        self.popen.stdout.close()


class Unchanged(Consumer):
    """A program that knows nothing of shared pages (unchanged.py), with the shim in it."""

    def __init__(
        self,
        domain: Domain,
        number: int,
        *,
        before: Sequence[str | os.PathLike[str]] = (),
        python: str | os.PathLike[str] = sys.executable,
    ) -> None:
        super().__init__(domain, number, command=[*before, *domain.shim, python, HERE / "unchanged.py"])

    def map(self, path: Path, name: str = "f", **more: Any) -> None:
        """Map a file, read only and private, under a name."""
        self.ask("map", name=name, path=os.fspath(path), **more)

    def attached(self) -> dict[str, int]:
        """Return the pages that the agent says are shared, by reported path."""
        for program in self.domain.ask("ps")["programs"]:
            if program["pid"] == self.pid:
                return {file["path"]: file["attached_bytes"] // PAGE for file in program["files"]}
        return {}

    def shared(self, name: str = "f") -> int:
        """Return how many pages of a mapping are a segment's, as the kernel says."""
        return int(self.ask("shared", name=name))

    def wait_shared(self, pages: int, name: str = "f") -> None:
        """Wait until so many pages of a mapping are a segment's."""
        wait(f"{pages} pages of {name} shared in {self.name}", lambda: self.shared(name) == pages)


class Domain:
    """A domain: its root folder, its agent, its programs."""

    def __init__(self, host: Host, name: str, keys: dict[str, object]) -> None:
        self.host = host
        self.name = name
        self.root = host.folder / name
        self.root.mkdir()
        self.control_socket = host.sockets / f"{name}.control"
        self.consumer_socket = host.sockets / f"{name}.sock"
        self.config = host.folder / f"{name}.toml"
        self.agent: Process | None = None
        self.programs: list[Consumer] = []
        values: dict[str, object] = {
            "name": name,
            "root": str(self.root),
            "folders": [str(self.root)],
            "broker_socket": str(host.socket),
            "consumer_socket": str(self.consumer_socket),
            "control_socket": str(self.control_socket),
            "cache": str(host.folder / f"{name}.cache" / "fingerprints.db"),
            "rescan_interval": "1 s",
            "settle": "50 ms",
            "drop_interval": "100 ms",
            "reconnect_max": "1 s",
            "events_interval": "500 ms",
            "lease_timeout": "10 s",  # who is slow on a busy machine is not hung
        } | keys
        self.config.write_text("[agent]\n" + toml(values))

    def start(self, **more: Any) -> Process:
        """Start the agent."""
        command: list[str | os.PathLike[str]] = [BIN / "sharearea-agent", "run", "--config", self.config]
        self.agent = self.host.add(Process(self.name, command, self.host.folder / f"{self.name}.log", **more))
        return self.agent

    @property
    def running(self) -> Process:
        """The agent's process."""
        assert self.agent is not None
        return self.agent

    def status(self) -> dict[str, Any]:
        """Return the agent's status; an empty one if it does not answer."""
        try:
            return ask(self.control_socket, {"verb": "status"})
        except PeerUnreachable:
            return {}

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        """Ask the agent."""
        return ask(self.control_socket, {"verb": verb} | more)

    def program(self, **more: Any) -> Consumer:
        """Start a program."""
        program = Consumer(self, len(self.programs), **more)
        self.host.add(program)
        self.programs.append(program)
        return program

    @property
    def shim(self) -> list[str | os.PathLike[str]]:
        """What comes before a command that is to run with the shim."""
        return [BIN / "sharearea-agent", "exec", "--socket", os.fspath(self.consumer_socket), "--"]

    def unchanged(self, **more: Any) -> Unchanged:
        """Start a program with the shim."""
        program = Unchanged(self, len(self.programs), **more)
        self.host.add(program)
        self.programs.append(program)
        return program

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the agent's command line."""
        return run("sharearea-agent", words[0], "--config", str(self.config), *words[1:])

    def use(self) -> None:
        """Read all plain files of the domain, as its programs would."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(os.lstat(path).st_mode):
                        Path(path).read_bytes()

    def write(self, name: str | bytes, data: bytes) -> Path:
        """Write a file that everybody may read, all of it resident and clean."""
        path = Path(os.fsdecode(os.path.join(os.fsencode(self.root), os.fsencode(name))))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        return path


class Host:
    """The broker, its domains, and everything that has to go at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        # A socket's path is short; the folder's may not be.
        self.sockets = Path(tempfile.mkdtemp(prefix="sa-"))
        self.socket = self.sockets / "broker.sock"
        self.status_socket = self.sockets / "status.sock"
        self.state_dir = folder / "state"
        self.config = folder / "broker.toml"
        self.broker_log = folder / "broker.log"
        self.pid_file = folder / "broker.pid"
        self.broker: Process | None = None
        self.domains: list[Domain] = []
        self.processes: list[Process] = []
        self.tracebacks_allowed = False
        self.lines_unchecked = False  # lines are lost on purpose

    def add(self, process: Process) -> Process:
        """Remember a process, to end it."""
        self.processes.append(process)
        return process

    def configure(self, broker: dict[str, object] | None = None, pool: dict[str, object] | None = None) -> None:
        """Write the broker's configuration."""
        keys: dict[str, object] = {
            "enabled": True,
            "socket": str(self.socket),
            "status_socket": str(self.status_socket),
            "state_dir": str(self.state_dir),
            "segment_bytes": "8 MiB",
            "grace": "1 s",
            "events_interval": "500 ms",
            "status_interval": "1 s",
            "file_statistics_interval": "1 s",
        } | (broker or {})
        rules: dict[str, object] = {"min_file_bytes": 1, "default_exclude": False} | (pool or {})
        self.config.write_text(
            f'[broker]\n{toml(keys)}\n[pools.{POOL}]\ndomains = [{{ name = "d*", uid = {os.getuid()} }}]\n{toml(rules)}'
        )

    def start_broker(self, **more: Any) -> Process:
        """Start the broker and wait until it answers."""
        if not self.config.exists():
            self.configure()
        self.broker = self.add(Process("broker", self.broker_command, self.broker_log, **more))
        self.wait_broker()
        return self.broker

    @property
    def broker_command(self) -> list[str | os.PathLike[str]]:
        """The broker's command line."""
        return [BIN / "sharearea", "broker", "--config", self.config]

    def start_supervised_broker(self) -> Process:
        """Start the broker below a service manager that keeps its descriptors."""
        if not self.config.exists():
            self.configure()
        manager: list[str | os.PathLike[str]] = [sys.executable, HERE / "supervisor.py", self.sockets / "notify"]
        self.broker = self.add(Process("broker", [*manager, self.pid_file, *self.broker_command], self.broker_log))
        self.wait_broker()
        return self.broker

    def supervised_pid(self) -> int:
        """Return the broker's own number below the service manager."""
        return int(self.pid_file.read_text())

    @property
    def running(self) -> Process:
        """The broker's process."""
        assert self.broker is not None
        return self.broker

    def wait_broker(self) -> None:
        """Wait until the broker answers."""
        process = self.running

        def answers() -> bool:
            assert process.alive, f"the broker ended with {process.popen.returncode}"
            return bool(self.status())

        wait("a broker that answers", answers)

    def status(self) -> dict[str, Any]:
        """Return the broker's status; an empty one if it does not answer."""
        try:
            return ask(self.status_socket, {"verb": "status"})
        except PeerUnreachable:
            return {}

    def pool(self) -> dict[str, Any]:
        """Return the pool's figures; empty if the broker does not answer."""
        pools = self.status().get("pools", [])
        return dict(pools[0]) if pools else {}

    def ask(self, verb: str) -> dict[str, Any]:
        """Ask the broker."""
        return ask(self.status_socket, {"verb": verb})

    def domain_states(self) -> dict[str, dict[str, Any]]:
        """Return what the broker says of its domains; empty if it does not answer."""
        try:
            return {entry["domain"]: entry for entry in self.ask("domains")["domains"]}
        except PeerUnreachable:
            return {}

    def files(self) -> list[dict[str, Any]]:
        """Return the files that the broker knows."""
        found: list[dict[str, Any]] = self.ask("files")["files"]
        return found

    def add_domain(self, **keys: object) -> Domain:
        """Make a domain, whose agent is not started yet."""
        domain = Domain(self, f"d{len(self.domains) + 1}", keys)
        self.domains.append(domain)
        return domain

    def add_domains(self, count: int, files: dict[str, bytes], **keys: object) -> list[Domain]:
        """Make domains with the same files and start their agents."""
        made = [self.add_domain(**keys) for _ in range(count)]
        for domain in made:
            for name, data in files.items():
                domain.write(name, data)
            domain.start()
        return made

    def wait_offered(self, files: int, *domains: Domain) -> None:
        """Wait until each of the domains (default: all) has been offered so many files.

        A file is reported when it is cached, and the host may have evicted it meanwhile: read them again, now and then.
        """
        for domain in domains or self.domains:
            self.wait_warm(
                f"{files} files offered to {domain.name}",
                lambda domain: domain.status().get("offered_files", 0) >= files,
                domain,
            )

    def wait_pages(self, figure: str, pages: int) -> None:
        """Wait for a figure of the pool. If it is to be more than none, files are read again as in wait_offered."""
        (self.wait_warm if pages else wait)(f"{figure} = {pages}", lambda: self.pool().get(figure) == pages)

    def wait_warm(self, what: str, done: Callable[..., Any], *about: Any) -> Any:
        """Wait as `wait` does, for what needs pages that are resident: every USE_S all domains read their files again.

        What the host evicts itself is neither reported nor dropped by anybody, and the host may evict at any time.
        """
        use_at = time.monotonic() + USE_S

        def warm(*about: Any) -> Any:
            nonlocal use_at
            if time.monotonic() >= use_at:
                for each in self.domains:
                    each.use()
                use_at = time.monotonic() + USE_S
            return done(*about)

        return wait(what, warm, *about)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the broker's logged events of a name."""
        return self.running.events(name)

    def logs(self) -> str:
        """Return the ends of all logs."""
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            parts += [f"--- {log.name}", *(_short(line) for line in lines[-40:])]
        return "\n".join(parts)

    def tracebacks(self) -> str:
        """Return the lines of all logs that are not events."""
        lines = [line for log in self.folder.glob("*.log") for line in log.read_text(errors="replace").splitlines()]
        return "\n".join(line for line in lines if not line.startswith("{"))

    def close(self) -> None:
        """End every process that was started, remove everything, and say if one of them broke."""
        running = [process for process in self.processes if process.alive]
        for process in running:
            if isinstance(process, Consumer):
                process.kill()
            else:
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
        failures = []
        for process in running:
            try:
                process.end()
            except AssertionError as error:
                failures.append(str(error))
        for process in self.processes:
            for stream in (process.popen.stdin, process.popen.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        shutil.rmtree(self.sockets)
        assert not failures, f"{failures}\n{self.logs()}"
        wrong = [f"{log.name}: {fault}" for log in self.folder.glob("*.log") for fault in faults(read(log))]
        assert not wrong or self.lines_unchecked, "\n".join(wrong[:20])
        broken = [log.name for log in self.folder.glob("*.log") if "Traceback" in log.read_text(errors="replace")]
        assert not broken or self.tracebacks_allowed, f"tracebacks in {broken}\n{self.tracebacks()}\n{self.logs()}"


def _short(line: str) -> str:
    """Return what an event says, without what all events say."""
    try:
        event = json.loads(line)
    except ValueError:
        return line
    said = {key.partition(".")[2]: value for key, value in event.items() if key.startswith("sharearea.")}
    return f"{event.get('@timestamp', '')[11:23]} {event.get('event.name')} {said}"


def toml(values: dict[str, object]) -> str:
    """Return keys and values as lines of TOML: JSON's texts, numbers, booleans and lists are TOML's too."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def run(name: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the two commands to its end."""
    return subprocess.run(
        [os.fspath(BIN / name), *words], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, **more
    )


def noise(size: int, seed: int) -> bytes:
    """Return bytes without two equal pages."""
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    """Return the SHA-256 that programs say."""
    return hashlib.sha256(data).hexdigest()


def cached_pages(path: Path) -> int:
    """Return how many pages of a file are in the page cache, as cachestat(2) counts."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return native.cachestat(fd)[0]
    finally:
        os.close(fd)


class Stamped:
    """A file all of whose words are the number of a generation, and the counters that say which one (program.py)."""

    def __init__(self, domain: Domain, name: str, pages: int) -> None:
        self.pages = pages
        self.generation = 1
        self.path = domain.write(name, self.content())
        self.counters = domain.host.folder / f"{domain.name}.{name}.counters"
        self.counters.write_bytes(struct.pack("QQ", 1, 1))

    def content(self) -> bytes:
        """Return what the file holds in this generation."""
        return struct.pack("Q", self.generation) * (PAGE // 8 * self.pages)

    @contextlib.contextmanager
    def writing(self) -> Iterator[bytes]:
        """Announce a generation, give its bytes, and announce that it is done."""
        self.generation += 1
        self._say(0)
        yield self.content()
        self._say(8)

    def _say(self, at: int) -> None:
        with self.counters.open("r+b", buffering=0) as file:
            file.seek(at)
            file.write(struct.pack("Q", self.generation))


def unchecked(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or None if a program says no."""
    try:
        return call()
    except (ShareareaError, OSError):
        return None

"""How real programs are run: started, asked, ended; in pipes, or as servers that others ask. Copies are copies.py's."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, ClassVar, Final

from sharearea.common.errors import HostError

from .host import cpu_s

SEATS: Final = 3
"""How many of a server may run in one domain at a time, each with data and a socket of its own."""
CLUSTER: Final = "cluster"
"""The folder of a server's data that only the server may read; files in it are not shared."""

_SHORT_S: Final = 120.0
_READY_S: Final = 60.0
_POLL_S: Final = 0.002
_NOBODY: Final = 65534


@dataclass(frozen=True, slots=True)
class _Other:
    """Another user, as whom a server runs that refuses to run as root."""

    words: list[str] = field(default_factory=list)
    """What to put before a command."""

    def give(self, folder: Path) -> None:
        """Give a folder and all in it to that user."""
        if self.words:
            for top, _, names in os.walk(folder):
                for path in (top, *(os.path.join(top, name) for name in names)):
                    os.chown(path, _NOBODY, _NOBODY)


def _other() -> _Other:
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        return _Other()
    return _Other([setpriv, f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--"])


as_nobody: Final = _other()


@dataclass(frozen=True, slots=True)
class Ended:
    """A run from its start to its end."""

    wall_s: float
    cpu_s: float
    said: tuple[object, ...]
    """Exit codes, standard output and errors: what must be the same with the shim and without."""


class Running(ABC):
    """A program that runs, and answers."""

    @abstractmethod
    def processes(self) -> list[int]:
        """Return the processes that it is, those that it has started too."""

    @abstractmethod
    def answer(self) -> str:
        """Ask for a piece of work, the same each time; return what it says."""

    @abstractmethod
    def end(self) -> list[int]:
        """Have it end by itself, and return its exit codes. Twice is fine."""

    def cpu_s(self) -> float:
        """Return the CPU time of its processes that still run."""
        total = 0.0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                total += cpu_s(pid)
        return total


@dataclass(slots=True)
class Program(ABC):
    """A program in one domain."""

    folder: Path
    environment: dict[str, str]

    warm_up: int = field(default=4, kw_only=True)
    """Answers that come before what is measured."""

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment of its processes without the shim."""
        leave = ("LD_", "PYTHON", "GIT_", "JAVA", "JDK_", "PG")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(leave)}
        return kept | {"LD_LIBRARY_PATH": os.fspath(self.folder / "lib")} | self.environment

    @abstractmethod
    def start(self, variables: Mapping[str, str], seat: int = 0) -> Running:
        """Start it; it has said that it is ready when this returns."""

    @abstractmethod
    def once(self, variables: Mapping[str, str]) -> Ended:
        """Run something short from start to end."""

    @contextmanager
    def running(self, variables: Mapping[str, str], seat: int = 0) -> Iterator[Running]:
        """Run it until the block is left."""
        one = self.start(variables, seat)
        try:
            yield one
        finally:
            one.end()


@contextmanager
def _measured() -> Iterator[Callable[[], tuple[float, float]]]:
    """Give a function that returns the time since here, and the CPU time of the processes that ended meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()

    def since() -> tuple[float, float]:
        wall_s = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    yield since


def _run(words: Sequence[str], variables: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        words, env=variables, capture_output=True, stdin=subprocess.DEVNULL, timeout=_SHORT_S, check=False
    )
    return done.returncode, done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------- pipes


class _Pipe(Running):
    """A program that answers lines with lines."""

    def __init__(self, program: Piped, variables: Mapping[str, str]) -> None:
        self.program = program
        self.ended = False
        self.process = subprocess.Popen(
            program.long, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            if program.first:
                self._write(program.first)
            for _ in range(program.first_replies):
                self._line()
        except HostError:
            self.end()
            raise

    def processes(self) -> list[int]:
        return [self.process.pid]

    def answer(self) -> str:
        self._write(self.program.question)
        return "".join(self._line() for _ in range(self.program.replies))

    def end(self) -> list[int]:
        if not self.ended:
            self.ended = True
            try:
                self.process.communicate(timeout=_SHORT_S)  # closes its input, which is what ends it
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        return [self.process.returncode]

    def _write(self, text: str) -> None:
        stream: IO[str] | None = self.process.stdin
        assert stream is not None
        try:
            stream.write(text + "\n")
            stream.flush()
        except BrokenPipeError:
            raise HostError(f"{self.program.long[0]} ended with exit code {self.process.wait()}") from None

    def _line(self) -> str:
        stream: IO[str] | None = self.process.stdout
        assert stream is not None
        line = stream.readline()
        if not line:
            raise HostError(f"{self.program.long[0]} ended with exit code {self.process.wait()}")
        return line


@dataclass(slots=True)
class Piped(Program):
    """A program that is asked on its standard input."""

    long: list[str]
    short: list[str]
    question: str = field(default="", kw_only=True)
    replies: int = field(default=1, kw_only=True)
    first: str = field(default="", kw_only=True)
    """What to write before it says that it is ready."""
    first_replies: int = field(default=1, kw_only=True)

    def start(self, variables: Mapping[str, str], seat: int = 0) -> Running:  # noqa: ARG002 (it has no data to itself)
        """Start it."""
        return _Pipe(self, variables)

    def once(self, variables: Mapping[str, str]) -> Ended:
        """Run the short command."""
        with _measured() as since:
            said = _run(self.short, variables)
            return Ended(*since(), said)


# --------------------------------------------------------------------------------------------------------- servers


def _tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            found += [int(word) for word in Path(f"/proc/{one}/task/{one}/children").read_text().split()]
    return found


class _Server:
    """A server in a process of its own, with those that it makes. It is ready when this is made."""

    def __init__(
        self, words: Sequence[str], variables: Mapping[str, str], ready: Callable[[], bool], stop: signal.Signals
    ) -> None:
        self.process = subprocess.Popen(
            words, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.stop = stop
        self.said: tuple[int, bytes] | None = None
        """Exit code and output, when it has ended."""
        end = time.monotonic() + _READY_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.end()
                raise HostError(f"{words[0]} does not get ready; it ended with {self.said}")
            time.sleep(_POLL_S)

    def end(self) -> tuple[int, bytes]:
        """Tell it to end, and wait until it has, with all its processes. Twice is fine."""
        if self.said is None:
            self.process.send_signal(self.stop)
            output = self.process.communicate(timeout=_SHORT_S)[0]
            self.said = (self.process.returncode, output)
        return self.said


class _Asked(Running):
    """A server, and a client in the pipes that asks it."""

    def __init__(self, server: _Server, client: Running) -> None:
        self.server = server
        self.client = client

    def processes(self) -> list[int]:
        return [*_tree(self.server.process.pid), *self.client.processes()]

    def answer(self) -> str:
        return self.client.answer()

    def end(self) -> list[int]:
        return [*self.client.end(), self.server.end()[0]]


@dataclass(slots=True)
class Postgres(Program):
    """postgres on a Unix socket, as another user when we are root, and psql, which asks it."""

    binaries: Path
    question: str

    def seat(self, seat: int) -> Path:
        """Return the folder with the data and the socket of one of its servers."""
        return self.folder / f"seat-{seat}"

    def fill(self, seat: int) -> None:
        """Make the table that is asked for."""
        server = self._serve(self.variables, seat)
        sql = "create table n as select value from generate_series(1, 20000) value; analyze n;"
        done = _run([*self._psql(seat), "-c", sql], self.variables)
        server.end()
        if done[0] != 0:
            raise HostError(f"psql: {done[2].decode(errors='replace')}")

    def start(self, variables: Mapping[str, str], seat: int = 0) -> Running:
        """Start the server, and psql."""
        server = self._serve(variables, seat)
        try:
            pipe = Piped(self.folder, self.environment, self._psql(seat), [], question=self.question)
            pipe.first = "select 'ready', version();"
            return _Asked(server, pipe.start(variables))
        except HostError:
            server.end()
            raise

    def once(self, variables: Mapping[str, str]) -> Ended:
        """Start the server, ask once, stop it."""
        with _measured() as since:
            server = self._serve(variables, 0)
            asked = _run([*self._psql(0), "-c", "select count(*), sum(value) from n"], variables)
            ended = server.end()
            return Ended(*since(), (asked, ended))

    def _psql(self, seat: int) -> list[str]:
        words = ["-X", "-q", "-A", "-t", "-U", "bench", "-h", os.fspath(self.seat(seat)), "-d", "postgres"]
        return [os.fspath(self.binaries / "psql"), *words]

    def _serve(self, variables: Mapping[str, str], seat: int) -> _Server:
        folder = self.seat(seat)
        status = folder / CLUSTER / "postmaster.pid"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": os.fspath(folder),
            "unix_socket_permissions": "0777",
            "log_min_messages": "panic",  # other lines have times in them
            "shared_buffers": "16MB",
            "max_connections": "20",
            "max_parallel_workers_per_gather": "0",  # a query takes one process
            "autovacuum": "off",
            "fsync": "off",
        }
        words = [*as_nobody.words, os.fspath(self.binaries / "postgres"), "-D", os.fspath(folder / CLUSTER)]
        for name, value in settings.items():
            words += ["-c", f"{name}={value}"]

        def ready() -> bool:
            # As pg_ctl does it: the eighth line of this file is the server's state.
            with contextlib.suppress(FileNotFoundError, IndexError):
                return status.read_text().splitlines()[7].strip() == "ready"
            return False

        return _Server(words, variables, ready, signal.SIGINT)


class _Reader(Running):
    """Reads files from nginx; it is in this process."""

    def __init__(self, path: Path, files: int) -> None:
        self.path = path
        self.files = files

    def processes(self) -> list[int]:
        return []

    def answer(self) -> str:
        return " ".join(self._read(number) for number in range(self.files))

    def end(self) -> list[int]:
        return []

    def _read(self, number: int) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SHORT_S)
            connection.connect(os.fspath(self.path))
            request = f"GET /{number} HTTP/1.1\r\nHost: bench\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode())
            with http.client.HTTPResponse(connection) as response:
                response.begin()
                body = zlib.decompress(response.read(), 31)  # gzip's format
                return f"{response.status} {len(body)} {zlib.crc32(body):08x}"


@dataclass(slots=True)
class Nginx(Program):
    """nginx with two workers on a Unix socket: they are another user's when we are root."""

    program: str
    FILES: ClassVar[int] = 40

    def seat(self, seat: int) -> Path:
        """Return the folder with the configuration and the socket of one of its servers."""
        return self.folder / f"seat-{seat}"

    def configure(self, seat: int) -> None:
        """Write the configuration."""
        folder = self.seat(seat)
        folder.mkdir()
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        (folder / "nginx.conf").write_text(
            "daemon off; worker_processes 2;\n"
            + ("user nobody nogroup;\n" if os.geteuid() == 0 else "")
            + f"pid {folder}/pid; error_log stderr warn; events {{ worker_connections 64; }}\n"
            + "http { access_log off; gzip on; gzip_types *; gzip_min_length 1;\n"
            + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
            + f"server {{ listen unix:{folder}/socket; root {self.folder}/www; }} }}\n"
        )

    def start(self, variables: Mapping[str, str], seat: int = 0) -> Running:
        """Start the server."""
        return _Asked(self._serve(variables, seat), _Reader(self.seat(seat) / "socket", self.FILES))

    def once(self, variables: Mapping[str, str]) -> Ended:
        """Start the server, read a file, stop it."""
        with _measured() as since:
            server = self._serve(variables, 0)
            read = _Reader(self.seat(0) / "socket", 1).answer()
            ended = server.end()
            return Ended(*since(), (read, ended))

    def _serve(self, variables: Mapping[str, str], seat: int) -> _Server:
        folder = self.seat(seat)
        path = folder / "socket"
        path.unlink(missing_ok=True)

        def ready() -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(os.fspath(path)) == 0

        words = [self.program, "-e", "stderr", "-p", os.fspath(folder), "-c", os.fspath(folder / "nginx.conf")]
        return _Server(words, variables, ready, signal.SIGQUIT)

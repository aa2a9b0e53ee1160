"""sharearea on the lab's host: its packages, the broker in dom0, an agent and programs in each guest.

Starts and ends them, asks them, and reads their logs. What is expected of them is the stages' business.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from .channel import ChannelError, Machine, Running
from .images import FOLDER, HERE, ROOT, call
from .lab import Lab, LabError

POOL: Final = "p"
BROKER_CONFIG: Final = "/etc/sharearea/broker.toml"
AGENT_CONFIG: Final = "/etc/sharearea/agent.toml"
BROKER_LOG: Final = "/var/log/sharearea-broker.log"
AGENT_LOG: Final = "/var/log/sharearea-agent.log"
STATUS_SOCKET: Final = "/run/sharearea/status.sock"
CONTROL_SOCKET: Final = "/run/sharearea-agent/control.sock"
CONSUMER_SOCKET: Final = "/run/sharearea-agent/consumers.sock"
ASK_S: Final = 60.0


def package(name: str) -> Path:
    """Return the Debian package that `make deb` built."""
    found = sorted((ROOT / "dist").glob(f"{name}_*.deb"))
    if len(found) != 1:
        raise LabError(f"dist/ has {len(found)} packages of {name}; run make deb")
    return found[0]


def install(machine: Machine, name: str) -> None:
    """Install a package with dpkg, from a file, without any network."""
    file = package(name)
    machine.put(f"/tmp/{file.name}", file)
    machine.run(f"dpkg -i /tmp/{file.name} && rm /tmp/{file.name}", timeout=120)


def put_tool(machine: Machine, name: str) -> None:
    """Build one of the lab's programs in C, and put it to /run in a machine, which needs nothing for it."""
    tool = FOLDER / name
    call(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(tool), str(HERE / f"{name}.c")])
    machine.put(f"/run/{name}", tool, mode=0o755)


def view_counters(machine: Machine) -> dict[str, int]:
    """Return the counters of the guest view's module in a guest, which has view_info."""
    found: dict[str, int] = json.loads(machine.run("/run/view_info"))
    return found


def toml(values: dict[str, object]) -> str:
    """Write keys of one table; JSON's strings, numbers and lists are TOML's, but for tables in lists."""

    def text(value: object) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{key} = {text(item)}" for key, item in value.items()) + " }"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(text(item) for item in value) + "]"
        return json.dumps(value)

    return "".join(f"{key} = {text(value)}\n" for key, value in values.items())


class Talker:
    """A process in a machine that takes JSON lines and answers each with one."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def ask(self, limit: float = ASK_S, **question: Any) -> Any:
        """Ask and wait for the answer. ChannelError if none comes, OSError with what went wrong if it says so."""
        self._running.write(json.dumps(question).encode() + b"\n")
        reply = json.loads(self._running.read_line(limit))
        if not reply["ok"]:
            raise OSError(reply["error"])
        return reply["answer"]

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._running.alive

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ChannelError):
            self._running.end_input()
            self._running.wait(10)
        self._running.close()


class Service:
    """A program of ours in a machine that outlives the command that started it, with a log."""

    def __init__(self, machine: Machine, package: str, words: Sequence[str], log: str, socket: str) -> None:
        self.machine = machine
        self.log = log
        self._package = package
        self._words = list(words)
        self._socket = socket
        self._asker: Talker | None = None
        self.pid = 0

    def start(self, *, words: Sequence[str] | None = None) -> None:
        """Start it, without waiting for anything. `words`: another command line, this once."""
        command = shlex.join(words or self._words)
        folder = shlex.quote(str(Path(self._socket).parent))
        self.pid = int(
            self.machine.run(f"mkdir -p {folder}; setsid {command} </dev/null >>{self.log} 2>&1 & echo $!", timeout=30)
        )

    @property
    def alive(self) -> bool:
        """Whether the process is there (and not only waiting to be buried)."""
        said = self.machine.try_run(f"cat /proc/{self.pid}/stat", timeout=30).out
        return bool(said) and said.rpartition(")")[2].split()[0] not in ("Z", "X")

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.machine.run(f"kill -{number} {self.pid}", timeout=30)

    def kill(self) -> None:
        """End it at once, with -9, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait_gone(20)

    def stop(self) -> None:
        """Ask it to end and wait until it has."""
        self.signal(signal.SIGTERM)
        self.wait_gone(60)

    def wait_gone(self, limit: float) -> None:
        """Wait until the process is gone."""
        command = (
            f"i=0; while grep -qs '^State:.[^Z]' /proc/{self.pid}/status && [ $i -lt {int(limit * 10)} ]; "
            f"do sleep 0.1; i=$((i + 1)); done; ! grep -qs '^State:.[^Z]' /proc/{self.pid}/status"
        )
        if self.machine.try_run(command, timeout=limit * 4 + 20).code != 0:
            raise LabError(f"{self.machine.name}: process {self.pid} is still there after {limit} s")

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        """Ask it over its own control socket. OSError when nobody answers there."""
        if self._asker is None or not self._asker.alive:
            words = ("python3", "-u", "/tmp/asker.py", self._package)
            self.machine.put("/tmp/asker.py", HERE / "inside" / "asker.py")
            self._asker = Talker(self.machine.start(*words))
        answer: dict[str, Any] = self._asker.ask(socket=self._socket, verb=verb, **more)
        return answer

    def status(self) -> dict[str, Any]:
        """Return its status; empty if it does not answer."""
        try:
            return self.ask("status")
        except OSError:
            return {}

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the logged events of a name."""
        found = []
        for line in self.machine.try_run(f"grep -F '\"{name}\"' {self.log}", timeout=30).out.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event.get("event.name") == name:
                    found.append(event)
        return found

    def faults(self) -> str:
        """Return what of its log must never be there: tracebacks."""
        return self.machine.try_run(f"grep -A20 -F 'Traceback (most recent' {self.log}", timeout=30).out

    def private_bytes(self) -> int:
        """Return the memory that is its own and nobody else's."""
        text = self.machine.run(f"cat /proc/{self.pid}/smaps_rollup", timeout=30)
        lines = (line.split() for line in text.splitlines() if line.startswith(("Private_Clean:", "Private_Dirty:")))
        return sum(int(words[1]) * 1024 for words in lines)


class Broker(Service):
    """The broker in dom0."""

    def __init__(self, lab: Lab) -> None:
        words = ("/usr/bin/sharearea", "broker", "--config", BROKER_CONFIG)
        super().__init__(lab.dom0, "sharearea", words, BROKER_LOG, STATUS_SOCKET)
        self.lab = lab

    def configure(
        self, domains: Sequence[dict[str, object]], broker: dict[str, object], pool: dict[str, object]
    ) -> None:
        """Write the configuration: one pool with these domains."""
        keys: dict[str, object] = {
            "enabled": True,
            "backend": "xen",
            "grace": "10 s",
            "events_interval": "1 s",
        } | broker
        rules: dict[str, object] = {"domains": list(domains)} | pool
        self.machine.put(BROKER_CONFIG, f"[broker]\n{toml(keys)}\n[pools.{POOL}]\n{toml(rules)}")

    def wait(self, limit: float = 60) -> None:
        """Wait until it answers."""

        def answers() -> bool:
            if self.status():
                return True
            if not self.alive:
                raise AssertionError(f"the broker ended: {self.machine.run(f'tail -n 20 {self.log}')}")
            return False

        self.lab.wait("a broker that answers", answers, limit=limit)

    def pool(self) -> dict[str, Any]:
        """Return the pool's figures; empty if the broker does not answer."""
        pools = self.status().get("pools", [])
        return dict(pools[0]) if pools else {}

    def domains(self) -> dict[str, dict[str, Any]]:
        """Return what the broker says of its domains, by name."""
        try:
            return {entry["domain"]: entry for entry in self.ask("domains")["domains"]}
        except OSError:
            return {}

    def files(self) -> list[dict[str, Any]]:
        """Return the files that the broker knows."""
        files: list[dict[str, Any]] = []
        start: int | None = 0
        while start is not None:
            answer = self.ask("files", start=start)
            files += answer["files"]
            start = answer["next"]
        return files


class Agent(Service):
    """The agent of one guest."""

    def __init__(self, lab: Lab, guest: str) -> None:
        words = ("/usr/bin/sharearea-agent", "run", "--config", AGENT_CONFIG)
        super().__init__(lab.guest(guest), "sharearea_agent", words, AGENT_LOG, CONTROL_SOCKET)
        self.lab = lab
        self.guest = guest

    def configure(self, folders: Sequence[str], **keys: object) -> None:
        """Write the configuration."""
        values: dict[str, object] = {
            "backend": "xen",
            "name": self.guest,
            "folders": list(folders),
            "rescan_interval": "5 s",
            "settle": "100 ms",
            "drop_interval": "3 s",
            "reconnect_max": "2 s",
        } | keys
        self.machine.put(AGENT_CONFIG, "[agent]\n" + toml(values))


class Program(Talker):
    """A program in a guest that opens files through the agent (tests/e2e/program.py), and the questions to it."""

    def __init__(self, machine: Machine) -> None:
        machine.put("/tmp/program.py", ROOT / "tests" / "e2e" / "program.py")
        self.machine = machine
        super().__init__(machine.start("python3", "-u", "/tmp/program.py", CONSUMER_SOCKET))

    def open(self, path: str) -> dict[str, Any]:
        """Open a file; its path is its name."""
        answer: dict[str, Any] = self.ask(verb="open", name=path, path=path.encode().hex())
        return answer

    def state(self) -> dict[str, dict[str, Any]]:
        """Say what each file is at this moment."""
        state: dict[str, dict[str, Any]] = self.ask(verb="state")
        return state

    def shared_pages(self) -> int:
        """Return how many pages of all its files are shared now."""
        return sum(int(file["pages"]) for file in self.state().values())

    def hash(self, path: str) -> str:
        """Return the SHA-256 of what is mapped."""
        return str(self.ask(verb="hash", name=path))


def in_parallel(calls: Sequence[Callable[[], object]]) -> None:
    """Make calls side by side and wait for all; the first error is raised."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(1, len(calls))) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()

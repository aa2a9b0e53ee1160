"""A broker, an agent for each domain and a program in each that uses all of its files: started, watched, stopped.

The commands and the protocol are the product's own. Settings are the product's defaults but for paths and bounds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sharearea.common.control import ask
from sharearea.common.errors import HostError

from .dataset import DataSet
from .host import GIB, OpenFiles, Processes, answers, command, cpu_s, memfd_bytes, say, status_of
from .report import Tell

POOL: Final = "bench"
_POLL_S: Final = 0.1
_QUIET_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds by part."""

    broker: float
    agents: float
    consumers: float

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.broker + self.agents + self.consumers


def broker_toml(work: Path, **pool: int) -> str:
    """Return a broker's configuration with one pool that takes every domain of this user."""
    keys = "".join(f"{name} = {value}\n" for name, value in pool.items())
    return (
        f'[broker]\nenabled = true\nsocket = "{work}/broker.sock"\nstatus_socket = "{work}/status.sock"\n'
        f'state_dir = "{work}/state"\n\n[pools.{POOL}]\n'
        f'domains = [{{ name = "bench-*", uid = {os.getuid()} }}]\n{keys}'
    )


def start_broker(processes: Processes, work: Path, **pool: int) -> int:
    """Start a broker in a folder, wait until it serves, and return its pid."""
    config = work / "broker.toml"
    config.write_text(broker_toml(work, **pool))
    process = processes.start("broker", [command("sharearea"), "broker", "--config", config])
    processes.wait_for(lambda: status_of(work / "status.sock") is not None, "the broker")
    return process.pid


class Fleet:
    """One broker and its domains, in a folder that keeps the pool's key and the agents' caches between two fleets."""

    def __init__(self, work: Path, data: DataSet, groups: tuple[str, ...], processes: Processes) -> None:
        self.work = work
        self.data = data
        self.groups = groups
        self.processes = processes
        self.broker = 0
        self.agents: list[int] = []
        self.consumers: list[int] = []
        self._talking: list[Any] = []
        self._broker_cpu = 0.0
        # Own files count for nothing: the kernel may drop their pages at any time, and nobody shared them.
        self.own = OpenFiles(data.files(tuple(group for group in groups if group == "own")))
        self.common = OpenFiles(data.files(tuple(group for group in groups if group != "own")))
        self.before = 0

    def cache(self, name: str) -> Path:
        """Return the fingerprint cache of a domain's agent."""
        return self.work / f"{name}.cache" / "fingerprints.db"

    def control(self, name: str) -> Path:
        """Return the control socket of a domain's agent."""
        return self.work / f"{name}.control"

    def prepare(self) -> None:
        """Bring all files into the page cache, start the broker, and count."""
        for files in (self.own, self.common):
            files.read_through()
        self.broker = start_broker(self.processes, self.work, max_area_bytes=4 * GIB)
        self.before = self.common.cached_bytes()
        self._broker_cpu = cpu_s(self.broker)

    def start(self) -> None:
        """Start the agents, and in each domain, once its agent listens, the program that opens all of its files."""
        for domain in self.data.domains:
            groups = self.groups or ("none",)
            for group in groups:
                (domain.root / group).mkdir(exist_ok=True)
            folders = ", ".join(f'"{domain.root}/{group}"' for group in groups)
            config = self.work / f"{domain.name}.toml"
            config.write_text(
                f'[agent]\nname = "{domain.name}"\nroot = "{domain.root}"\nfolders = [{folders}]\n'
                f'broker_socket = "{self.work}/broker.sock"\nconsumer_socket = "{self.work}/{domain.name}.sock"\n'
                f'control_socket = "{self.control(domain.name)}"\ncache = "{self.cache(domain.name)}"\n'
                "max_attached_files = 65536\n"
            )
            process = self.processes.start(domain.name, [command("sharearea-agent"), "run", "--config", config])
            self.agents.append(process.pid)
        for domain in self.data.domains:
            listing = self.work / f"{domain.name}.list"
            listing.write_bytes(b"\n".join(os.fsencode(path) for path in domain.files(self.groups)))
            socket = self.work / f"{domain.name}.sock"
            self.processes.wait_for(socket.exists, f"the agent of {domain.name}")
            consumer = self.processes.start(
                f"{domain.name}.consumer",
                [sys.executable, "-m", "sharearea_agent.demo_consumer", listing, socket],
            )
            say(consumer, "attach")
            self.consumers.append(consumer.pid)
            self._talking.append(consumer)

    def saved_bytes(self) -> int:
        """Return what the page cache of the common files lost less what the area holds, as the kernel counts both."""
        return self.before - self.common.cached_bytes() - memfd_bytes(self.broker)

    def cpu(self) -> Cpu:
        """Return the CPU used since prepare()."""
        return Cpu(
            cpu_s(self.broker) - self._broker_cpu,
            sum(cpu_s(pid) for pid in self.agents),
            sum(cpu_s(pid) for pid in self.consumers),
        )

    def wait_for(self, ratio: float, limit_s: float, tell: Tell) -> float:
        """Wait until that part of what can be saved is saved, and return the part that is. Raises HostError."""
        possible = self.data.shareable_bytes(self.groups)
        end = time.monotonic() + limit_s
        while True:
            saved = self.saved_bytes() / possible
            if saved >= ratio:
                return saved
            self.processes.check()
            if time.monotonic() > end:
                raise HostError(f"{saved:.0%} instead of {ratio:.0%} saved after {limit_s:.0f} s")
            tell(f"{saved:.0%} saved")
            time.sleep(_POLL_S)

    def wait_idle(self) -> None:
        """Wait until every agent has scanned once and every program has opened all of its files."""
        for domain in self.data.domains:
            control = self.control(domain.name)
            self.processes.wait_for(lambda at=control: bool((status_of(at) or {}).get("scans")), "the first scan")  # type: ignore[misc]
        for consumer in self._talking:
            for line in answers(consumer):
                if line.get("result") == "attach":
                    break

    def settle(self, limit_s: float) -> None:
        """Wait until nothing has changed for a while."""
        end = time.monotonic() + limit_s
        last, since = -1, 0.0
        while time.monotonic() < end:
            saved = self.saved_bytes()
            if saved != last:
                last, since = saved, time.monotonic()
            elif time.monotonic() - since > _QUIET_S:
                return
            self.processes.check()
            time.sleep(_POLL_S)

    def verify(self) -> tuple[int, int]:
        """Let the programs compare every byte with the file; return how many were compared, and how many differ."""
        verified = mismatched = 0
        for consumer in self._talking:
            say(consumer, "verify")
        for consumer in self._talking:
            for line in answers(consumer):
                if line.get("result") == "verify":
                    verified += line["verified_bytes"]
                    mismatched += line["mismatched_bytes"]
                    break
        return verified, mismatched

    def broker_status(self) -> dict[str, Any]:
        """Return what the broker says of the pool."""
        pool: dict[str, Any] = ask(self.work / "status.sock", {"verb": "status"})["pools"][0]
        return pool


@contextmanager
def fleet(work: Path, data: DataSet, groups: tuple[str, ...]) -> Iterator[Fleet]:
    """Give a fleet whose processes end with the block."""
    work.mkdir(parents=True, exist_ok=True)
    with Processes(work) as processes:
        one = Fleet(work, data, groups, processes)
        with one.own, one.common:
            yield one

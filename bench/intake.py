"""How fast a broker takes reports: the first domain, a second one with the same files, a tenth.

The broker is the installed command with a configuration of its own; the domains are clients that speak the agent's
protocol over the socket, with all messages encoded beforehand. Eleven domains join, the eleventh reports nothing, and
k is 11: the broker looks for pages to publish at every report and never finds one, so that this is intake alone.
"""

from __future__ import annotations

import os
import socket
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sharearea.common import native, wire
from sharearea.common.errors import HostError
from sharearea.model import Verdict

from .dataset import library_sizes, remove
from .fleet import start_broker
from .host import GIB, KIB, MIB, Processes, cpu_s
from .report import Samples, Tell

LARGE: Final = "large files"
LIBRARIES: Final = "library files"
SHAREABLE: Final = "library files from 16 KiB"
_DOMAINS: Final = 10
_SMALLEST: Final = 16 * KIB  # the default of min_file_bytes
M = TypeVar("M", bound=wire.Message)
_NOBODY: Final = 0xFFFFFFFF  # a file number that is never used


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. No set may pass 262,144 pages, what the broker lets one domain have under way."""

    large_files: int = 64
    large_file_bytes: int = 16 * MIB
    library_bytes: int = 256 * MIB
    shareable_bytes: int = 768 * MIB
    rounds: int = 7


QUICK = Sizes(8, 16 * MIB, 64 * MIB, 64 * MIB, 2)


@dataclass(frozen=True, slots=True)
class Report:
    """What one domain sends: frames with roots, frames with page fingerprints, and how much that is."""

    roots: bytes
    pages: bytes
    files: int
    page_count: int


def prepare(sizes: Sequence[int], folder: str) -> Report:
    """Make up files of these sizes and encode their report as an agent does."""
    encode = wire.AGENT_TO_BROKER.encode
    columns = [os.urandom(-(-size // wire.PAGE_SIZE) * wire.FINGERPRINT_SIZE) for size in sizes]
    roots, pages = bytearray(), bytearray()
    for at in range(0, len(sizes), wire.MAX_REPORT_FILES):
        part = range(at, min(at + wire.MAX_REPORT_FILES, len(sizes)))
        roots += encode(
            wire.Roots(
                array("I", part).tobytes(),
                array("Q", [sizes[i] for i in part]).tobytes(),
                array("I", [len(columns[i]) // wire.FINGERPRINT_SIZE for i in part]).tobytes(),
                b"".join(native.file_root(sizes[i], columns[i]) for i in part),
                tuple(f"{folder}/{i // 100:03}/library-{i:05}.so".encode() for i in part),
                wire.NO_CLASSES * len(part),
            )
        )
    parts, fingerprints = array("I"), bytearray()

    def pack() -> None:
        pages.extend(encode(wire.Pages(parts.tobytes(), bytes(fingerprints))))
        del parts[:], fingerprints[:]

    for file, column in enumerate(columns):
        total, sent = len(column) // wire.FINGERPRINT_SIZE, 0
        while sent < total:
            room = wire.MAX_REPORT_PAGES - len(fingerprints) // wire.FINGERPRINT_SIZE
            count = min(room, total - sent)
            parts.extend((file, sent, count))
            fingerprints += column[sent * wire.FINGERPRINT_SIZE : (sent + count) * wire.FINGERPRINT_SIZE]
            sent += count
            if count == room:
                pack()
    if parts:
        pack()
    return Report(bytes(roots), bytes(pages), len(sizes), sum(map(len, columns)) // wire.FINGERPRINT_SIZE)


class Client:
    """A domain's side of the protocol, as far as reports need it. It waits for what it needs."""

    def __init__(self, path: Path, name: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(60.0)
        self._sock.connect(os.fspath(path))
        self._reader = wire.FrameReader()
        self._arrived: list[wire.Message] = []
        self._send(wire.Hello(wire.PROTOCOL_VERSION, "bench", name, os.urandom(16), b""))
        self._expect(wire.Welcome)

    def report(self, report: Report) -> None:
        """Report files, and their pages if the broker wants them; returns when the broker has taken up all of it."""
        self._sock.sendall(report.roots)
        answered = wanted = 0
        while answered < report.files:
            verdicts = self._expect(wire.Verdicts).verdicts
            answered += len(verdicts)
            wanted += verdicts.count(Verdict.WANTED)
            if verdicts.count(Verdict.WANTED) + verdicts.count(Verdict.KNOWN) != len(verdicts):
                raise HostError("the broker does not take the bench's files")
        if wanted == report.files:
            self._sock.sendall(report.pages)
        elif wanted:
            raise HostError("the broker wants some of the files only")
        # Messages are handled in their order: an answer to this one comes after everything before it.
        self._send(wire.Attach(array("I", [_NOBODY]).tobytes()))
        self._expect(wire.Denied)

    def _send(self, message: wire.Message) -> None:
        self._sock.sendall(wire.AGENT_TO_BROKER.encode(message))

    def _expect(self, kind: type[M]) -> M:
        while True:
            while self._arrived:
                message = self._arrived.pop(0)
                if isinstance(message, kind):
                    return message
                if not isinstance(message, wire.Ping):
                    raise HostError(f"the broker sent {message}")
            data = self._sock.recv(1 << 18)
            if not data:
                raise HostError("the broker closed the connection")
            self._reader.feed(data)
            self._arrived += [wire.BROKER_TO_AGENT.decode(payload) for payload in self._reader]

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


def run(sizes: Sizes, work: Path, tell: Tell) -> Samples:
    """Measure all sets of files in turns, each time with a fresh broker."""
    found = Samples("intake")
    tell("preparing")
    reports = {
        LARGE: prepare([sizes.large_file_bytes] * sizes.large_files, "/srv/images"),
        LIBRARIES: prepare(library_sizes(sizes.library_bytes, 1), "/usr/lib/x86_64-linux-gnu"),
        SHAREABLE: prepare(library_sizes(sizes.shareable_bytes, _SMALLEST), "/usr/lib/x86_64-linux-gnu"),
    }
    for name, report in reports.items():
        found.notes.append(f"{name}: {report.files} files, {report.page_count} pages")
    for round_ in range(sizes.rounds):
        for name, report in reports.items():
            tell(f"round {round_ + 1} of {sizes.rounds}: {name}")
            _measure(found, name, report, work / f"intake-{round_}")
    for name in reports:
        for case in ("second", "tenth"):
            for metric, ratio in (("cpu_s", "cpu_ratio"), ("time_s", "time_ratio")):
                found.ratio(
                    f"{name}, {case} / first",
                    ratio,
                    (f"{name}, {case} domain", metric),
                    (f"{name}, first domain", metric),
                )
    return found


def _measure(found: Samples, name: str, report: Report, folder: Path) -> None:
    folder.mkdir()
    with Processes(folder) as processes, ExitStack() as clients:
        broker = start_broker(
            processes,
            folder,
            k=_DOMAINS + 1,
            min_file_bytes=1,
            max_area_bytes=GIB,
        )

        def join(number: int) -> Client:
            client = Client(folder / "broker.sock", f"bench-{number}")
            clients.callback(client.close)
            return client

        join(_DOMAINS + 1)
        for number in range(1, _DOMAINS + 1):
            client = join(number)
            cpu, begun = cpu_s(broker), time.perf_counter()
            client.report(report)
            elapsed, used = time.perf_counter() - begun, cpu_s(broker) - cpu
            case = {1: "first", 2: "second", _DOMAINS: "tenth"}.get(number)
            if case is not None:
                found.add(
                    f"{name}, {case} domain",
                    rate_pages_per_s=report.page_count / elapsed,
                    rate_files_per_s=report.files / elapsed,
                    time_s=elapsed,
                    cpu_s=used,
                )
        processes.check()
    remove(folder)

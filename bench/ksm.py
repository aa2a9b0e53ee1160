"""KSM on the same bytes: how long ksmd takes, and how much CPU, until it has merged a part of what can be merged."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sharearea.common.errors import HostError
from sharearea.common.wire import PAGE_SIZE

from .dataset import DataSet
from .host import Processes, answers, cpu_s, cpu_share
from .keeper import STOP_AND_UNMERGE
from .report import Tell

FOLDER: Final = Path("/sys/kernel/mm/ksm")
_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class Pace:
    """How hard ksmd works."""

    name: str
    pages_to_scan: int
    sleep_millisecs: int
    limit_s: float
    steady_s: float  # for which it goes on once the target is reached


@dataclass(frozen=True, slots=True)
class Reached:
    """What a run of ksmd reached. `seconds` is None if the time limit came first.

    `steady_ratio`: the part of one processor that it goes on taking when there is nothing left to do.
    """

    seconds: float | None
    cpu_s: float
    ratio: float
    steady_ratio: float
    curve: tuple[tuple[float, float], ...]  # (seconds, part of what could be merged), every 10 s and at the end


def lacking(folder: Path = FOLDER) -> str | None:
    """Return why KSM cannot be measured here; None if it can."""
    if not folder.is_dir():
        return "this kernel has no KSM"
    if os.geteuid() != 0:
        return "only root may switch KSM on"
    if not os.access(folder / "run", os.W_OK):
        return "/sys is read-only here"
    if (folder / "run").read_text().strip() == "1" or int((folder / "pages_shared").read_text()):
        return "KSM is in use on this host"
    advisor = folder / "advisor_mode"
    if advisor.exists() and "[none]" not in advisor.read_text():
        return "KSM's advisor steers it on this host"
    if _ksmd() is None:
        return "there is no ksmd to be seen from here"
    return None


def _ksmd() -> int | None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "comm").read_text() == "ksmd\n":
                    return int(entry.name)
            except OSError:
                continue
    return None


class Ksm:
    """KSM's settings, ours to change inside the block, and what they were afterwards (keeper.py)."""

    def __init__(self, work: Path, folder: Path = FOLDER) -> None:
        self.folder = folder
        self._processes = Processes(work)

    def __enter__(self) -> Self:
        keeper = self._processes.start("ksm-keeper", [sys.executable, "-m", "bench.keeper", self.folder])
        answer = next(answers(keeper))
        if not answer["ready"]:
            self._processes.stop()
            raise HostError(answer["why"])
        return self

    def __exit__(self, *_: object) -> None:
        self._processes.stop()

    def set(self, name: str, value: int | str) -> None:
        """Write one setting."""
        (self.folder / name).write_text(str(value))

    def get(self, name: str) -> int:
        """Read one number."""
        return int((self.folder / name).read_text())


def measure(
    ksm: Ksm, work: Path, data: DataSet, groups: tuple[str, ...], target_ratio: float, pace: Pace, tell: Tell
) -> Reached:
    """Let one process per domain hold the domain's files, and ksmd merge them until the target or the limit."""
    possible = data.shareable_bytes(groups) // PAGE_SIZE
    pid = _ksmd()
    assert pid is not None  # lacking() has looked
    with Processes(work) as processes:
        holders = []
        for domain in data.domains:
            listing = work / f"{domain.name}.held"
            listing.write_bytes(_lines(domain.files(groups)))
            holders.append(processes.start(f"{domain.name}.holder", [sys.executable, "-m", "bench.holder", listing]))
        for holder in holders:
            next(answers(holder))
        ksm.set("pages_to_scan", pace.pages_to_scan)
        ksm.set("sleep_millisecs", pace.sleep_millisecs)
        curve: list[tuple[float, float]] = []
        before = cpu_s(pid)
        begun = time.monotonic()
        ksm.set("run", 1)
        try:
            while True:
                elapsed = time.monotonic() - begun
                ratio = ksm.get("pages_sharing") / possible
                if ratio >= target_ratio or elapsed >= pace.limit_s:
                    break
                if elapsed >= 10 * (len(curve) + 1):
                    curve.append((elapsed, ratio))
                tell(f"KSM, {pace.name}: {ratio:.0%} after {elapsed:.0f} s")
                time.sleep(_POLL_S)
            used = cpu_s(pid) - before
            tell(f"KSM, {pace.name}: {ratio:.0%} after {elapsed:.0f} s, going on")
            steady = cpu_share([pid], pace.steady_s)
        finally:
            ksm.set("run", STOP_AND_UNMERGE)
        processes.check()
    curve.append((elapsed, ratio))
    return Reached(elapsed if ratio >= target_ratio else None, used, ratio, steady, tuple(curve))


def _lines(paths: Sequence[Path]) -> bytes:
    return b"\n".join(os.fsencode(path) for path in paths)

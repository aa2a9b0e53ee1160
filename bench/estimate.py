"""How fast roots are read and compared by `sharearea estimate`, and how much memory it takes for 100 GiB.

Everything is in the page cache when it is read, by one thread of this process. 100 GiB are not read from a disk, which
would want the room: pages that all differ are made in memory and fed to the tally of a process of its own, which then
compares them; so the time has the making in it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharearea.common import native
from sharearea.estimate.counting import Listener, Options, estimate, scratch_file

from . import dataset
from .host import KIB, MIB, ROOT
from .report import Samples, Tell

GIB = 1024 * MIB
LIBRARIES = "folder, files like libraries"
LARGE = "folder, files of 16 MiB"
TAR = "tar archive of the libraries"
RAW = "raw image, ext4, the libraries"
RAW_LARGE = "raw image, ext4, files of 16 MiB"
QCOW2 = "qcow2 image, ext4, files of 16 MiB"
TALLY = "tally of different pages"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    folder_bytes: int = GIB
    tally_bytes: int = 100 * GIB
    rounds: int = 5


QUICK = Sizes(64 * MIB, 4 * GIB, 2)


def run(sizes: Sizes, work: Path, tell: Tell) -> Samples:
    """Measure reading by kind of root, in turns, then the tally."""
    found = Samples("estimate")
    folder = work / "estimate"
    folder.mkdir()
    cases: dict[str, Path] = {}
    try:
        tell("making files")
        cases[LIBRARIES] = _fill(folder / "libraries", dataset.library_sizes(sizes.folder_bytes, 1))
        cases[LARGE] = _fill(folder / "large", [16 * MIB] * (sizes.folder_bytes // (16 * MIB)))
        for case, source, kind in (
            (TAR, "libraries", "tar"),
            (RAW, "libraries", "raw"),
            (RAW_LARGE, "large", "raw"),
            (QCOW2, "large", "qcow2"),
        ):
            try:
                cases[case] = _MAKERS[kind](folder, folder / source)
            except FileNotFoundError as error:
                found.skip(case, f"{error.filename} is not installed")
        for round_ in range(-1, sizes.rounds):  # the first one warms up
            for case, root in cases.items():
                tell(f"round {max(round_, 0) + 1} of {sizes.rounds}: {case}")
                read_bytes, elapsed, cpu = _estimate(root, folder)
                if round_ >= 0:
                    found.add(case, rate_bytes_per_s=read_bytes / elapsed, cpu_rate_bytes_per_s=read_bytes / cpu)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tell(f"tally of {sizes.tally_bytes // GIB} GiB")
    done = subprocess.run(
        [sys.executable, "-m", "bench.estimate", str(sizes.tally_bytes), str(work)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    found.add(TALLY, **json.loads(done.stdout))
    found.notes.append("cpu_rate: by the CPU time of the process; the rest of the time it waited for a processor")
    return found


def _fill(folder: Path, sizes: Sequence[int]) -> Path:
    folder.mkdir()
    for number, size in enumerate(sizes):
        place = folder / f"{number % 256:02x}"
        place.mkdir(exist_ok=True)
        (place / str(number)).write_bytes(os.urandom(size))
    return folder


def _tar(folder: Path, source: Path) -> Path:
    path = folder / f"{source.name}.tar"
    subprocess.run(["tar", "-C", source, "-cf", path, "."], check=True)
    return path


def _raw(folder: Path, source: Path) -> Path:
    path = folder / f"{source.name}.img"
    if not path.exists():
        size = sum(file.stat().st_blocks * 512 for file in source.rglob("*"))
        with open(path, "wb") as file:
            file.truncate(size + size // 4 + 64 * MIB)
        path_text = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        mkfs = shutil.which("mkfs.ext4", path=path_text)
        if mkfs is None:
            path.unlink()
            raise FileNotFoundError(2, "", "mkfs.ext4")
        subprocess.run([mkfs, "-q", "-F", "-i", "8192", "-d", source, path], check=True)
    return path


def _qcow2(folder: Path, source: Path) -> Path:
    path = folder / f"{source.name}.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", _raw(folder, source), path], check=True)
    return path


_MAKERS: dict[str, Callable[[Path, Path], Path]] = {"tar": _tar, "raw": _raw, "qcow2": _qcow2}


def _estimate(root: Path, folder: Path) -> tuple[int, float, float]:
    """Estimate one root in this process; return the bytes of its pages, the time and the CPU that it took."""
    cpu, begun = time.process_time(), time.perf_counter()
    found = estimate([root], Options(work=folder), Listener())
    return found.total, time.perf_counter() - begun, time.process_time() - cpu


def _tally(size: int, work: Path) -> dict[str, float]:
    """Feed that many bytes of different pages, compare them, and say what it took."""
    pages = 256
    buffer = bytearray(os.urandom(native.PAGE_SIZE) * pages)
    buffer[8 :: native.PAGE_SIZE] = bytes(range(pages))
    begun = time.perf_counter()
    with native.Tally(scratch_file(work), os.urandom(native.FP_SIZE), 2) as tally:
        tally.begin(0, 0)
        for number in range(size // len(buffer)):
            for place in range(4):
                buffer[place :: native.PAGE_SIZE] = bytes([number >> (8 * place) & 0xFF]) * pages
            tally.feed(buffer)
        tally.end()
        fed = time.perf_counter()
        sums = tally.join(bytes(4), 1, [native.TALLY_ONE] * 2, False)
        spilled = tally.spilled_bytes()
        joined = time.perf_counter()
    assert sums.distinct == size // native.PAGE_SIZE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return {"peak_bytes": peak, "spilled_bytes": spilled, "feed_s": fed - begun, "compare_s": joined - fed}


if __name__ == "__main__":
    print(json.dumps(_tally(int(sys.argv[1]), Path(sys.argv[2]))))

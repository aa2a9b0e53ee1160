"""The command line: `python -m bench [NAME...] [--quick] [--json FILE] [--work-dir DIR]`. It alone prints."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from sharearea.common import native
from sharearea.common.errors import ShareareaError

from . import asking, dataset, estimate, hashing, intake, memory, programs, sharing
from .host import KIB, MIB, check_room, raise_descriptor_limit
from .report import Samples, Tell

NAMES: Final = ("hash", "estimate", "stats", "intake", "sharing", "memory", "programs")
_DOMAINS: Final = 4
_SMALLEST: Final = 16 * KIB  # the broker's default for min_file_bytes
# The groups of the data set, and who uses which: `sharing` has a, b and own; `memory` has a, then a, b and c.
_GROUPS: Final = {"a": 128 * MIB, "b": 128 * MIB, "c": 256 * MIB}
_OWN: Final = 64 * MIB
_QUICK_DIVISOR: Final = 8
_WIDTH: Final = 120  # of tables that go to a file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benches that were named, or all, and return the exit code."""
    options = _parser().parse_args(arguments)
    names = options.names or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"bench: there is no bench {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    raise_descriptor_limit()
    begun = time.monotonic()
    records: list[dict[str, Any]] = [_environment(options.quick)]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    try:
        with tempfile.TemporaryDirectory(prefix="sharearea-bench-", dir=options.work_dir) as folder:
            work = Path(folder)
            work.chmod(0o755)
            benches = _benches(names, options, work)
            for name in NAMES:
                if name in names:
                    found = benches[name](_teller(name, begun))
                    console.print(found.table())
                    for note in found.notes:
                        console.print(f"  {note}")
                    console.print()
                    records += found.records()
    except ShareareaError as error:
        print(f"bench: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    finally:
        if options.json is not None:
            options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    records[0] |= {"seconds": round(time.monotonic() - begun, 1), "load_after": os.getloadavg()[0]}
    if options.json is not None:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    console.print(
        f"{records[0]['seconds']:.0f} s; load {records[0]['load_before']:.1f} before, "
        f"{records[0]['load_after']:.1f} after, on {records[0]['cpus']} processors"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure; see docs/performance.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure: {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: under a minute, and imprecise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines to this file")
    parser.add_argument(
        "--programs", metavar="NAME,...", help=f"what `programs` measures (default: {','.join(programs.PROGRAMS)})"
    )
    parser.add_argument("--starts", type=int, metavar="N", help="how often `programs` starts each with the shim")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes of each answer in `programs`")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("/var/tmp"),
        metavar="DIR",
        help="make the files here; it must be on a disk file system (default: /var/tmp)",
    )
    return parser


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _benches(names: Sequence[str], options: argparse.Namespace, work: Path) -> dict[str, Callable[[Tell], Samples]]:
    quick = options.quick
    made: list[dataset.DataSet] = []
    divisor = _QUICK_DIVISOR if quick else 1
    wanted = {"a", "b", "c"} if "memory" in names else {"a", "b"}
    groups = {name: size // divisor for name, size in _GROUPS.items() if name in wanted}

    def data(tell: Tell) -> dataset.DataSet:
        if not made:
            size = _DOMAINS * (sum(groups.values()) + _OWN // divisor)
            check_room(work, size + 512 * MIB, 3 * size)
            made.append(dataset.write(work / "domains", _DOMAINS, groups, _OWN // divisor, _SMALLEST, tell))
        return made[0]

    sizes = sharing.Sizes(("a", "b", "own"))
    if quick:
        sizes = sharing.Sizes(("a", "b", "own"), rounds=1, default_limit_s=3.0, steady_s=1.0)
    return {
        "hash": lambda tell: hashing.run(hashing.QUICK if quick else hashing.Sizes(), tell),
        "estimate": lambda tell: estimate.run(estimate.QUICK if quick else estimate.Sizes(), work, tell),
        "stats": lambda tell: asking.run(asking.QUICK if quick else asking.Sizes(), work, tell),
        "intake": lambda tell: intake.run(intake.QUICK if quick else intake.Sizes(), work, tell),
        "sharing": lambda tell: sharing.run(sizes, data(tell), work, tell),
        "memory": lambda tell: memory.run(
            memory.Sizes(("a",), ("a", "b", "c"), idle_s=1.0 if quick else 5.0), data(tell), work, tell
        ),
        "programs": lambda tell: programs.run(_programs(options), work, tell),
    }


def _programs(options: argparse.Namespace) -> programs.Sizes:
    sizes = programs.QUICK if options.quick else programs.Sizes()
    if options.programs is not None:
        sizes = replace(sizes, programs=tuple(options.programs.split(",")))
    if options.starts is not None:
        sizes = replace(sizes, starts=options.starts)
    if options.processes is not None:
        sizes = replace(sizes, processes=options.processes)
    return sizes


def _teller(bench: str, begun: float) -> Tell:
    """Show progress: one line that changes on a terminal, else a line for each step."""
    last = ""

    def tell(text: str) -> None:
        nonlocal last
        line = f"{bench}: {text}"
        if sys.stderr.isatty():
            print(f"\r\033[K{time.monotonic() - begun:4.0f} s  {line}", end="", file=sys.stderr, flush=True)
        elif line.split("%")[0].rstrip("0123456789") != last:
            last = line.split("%")[0].rstrip("0123456789")  # percentages change too often for lines of their own
            print(f"{time.monotonic() - begun:4.0f} s  {line}", file=sys.stderr, flush=True)

    return tell


def _environment(quick: bool) -> dict[str, Any]:
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "bench": "environment",
        "time": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": model,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "hash_kernel": native.selected_hash_kernel(),
        "transparent_hugepages": thp.read_text().strip() if thp.exists() else "",
        "load_before": os.getloadavg()[0],
        "quick": quick,
    }


if __name__ == "__main__":
    sys.exit(main())

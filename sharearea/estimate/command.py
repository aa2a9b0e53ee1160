"""The verb `estimate`: its options, its progress, its tables and files. Reading and counting are left to the rest.

Light to import: what reads and counts is imported when the verb runs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..common.errors import UsageError
from .figures import BACKENDS, PAGE_SIZE, Backend, Estimate
from .text import parse_size, percent, shown, size_text

if TYPE_CHECKING:
    from .counting import Listener

_MOST_ROWS: Final = 20
_MOST_NAMED: Final = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to the verb."""
    parser.description = (
        "Read root folders, tar archives (also .gz, .bz2, .xz, .zst), disk images (raw, qcow2; ext2 to ext4, XFS, "
        "btrfs; MBR, GPT, LVM) or block devices of guests-to-be, without mounting or changing anything, and say what "
        "they would share: an upper bound, counted page by page."
    )
    parser.epilog = (
        "Give the same root twice to see what two guests of it would share. Images need pip install "
        "'sharearea[estimate]'. docs/estimate.md says what each figure means."
    )
    parser.add_argument("roots", nargs="+", type=Path, metavar="ROOT|IMAGE", help="one for each guest")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="local",
        help="xen leaves out executable text, which its grants cannot carry (default: local)",
    )
    parser.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="memory that each guest has for its page cache (512M, 4G); by a model: the part of each root that fits "
        "is there, the same part in all of them (default: everything is)",
    )
    parser.add_argument(
        "--min-file",
        type=_size,
        default=0,
        metavar="SIZE",
        help="leave out smaller files, as the broker does with min_file_bytes (default: 0)",
    )
    parser.add_argument("--cross-mounts", action="store_true", help="enter other file systems mounted in a root folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report for a browser to this file")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("/var/tmp"),
        metavar="DIR",
        help="folder for fingerprints that do not fit into memory, 24 bytes per page; nothing stays there "
        "(default: /var/tmp)",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(options: argparse.Namespace, console: Console) -> int:
    """Run the verb and return the exit code."""
    from .counting import Options, estimate

    if options.memory is not None and options.memory < PAGE_SIZE:
        raise UsageError("--memory: less than a page")
    for path in (options.json, options.html):
        if path is not None:
            _check_writable(path)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        found = estimate(
            options.roots,
            Options(options.backend, options.memory, options.min_file, options.cross_mounts, options.work_dir),
            _listener(progress),
        )
    show(console, found)
    if options.json is not None:
        _write(options.json, json.dumps(found.record(), indent=2) + "\n")
    if options.html is not None:
        from .page import page

        _write(options.html, page(found))
        console.print(f"report: {options.html}", markup=False, soft_wrap=True)
    return 0


def _listener(progress: Progress) -> Listener:
    from .counting import Listener

    class Shown(Listener):
        task: TaskID | None = None
        files = size = 0

        def reading(self, name: str, kind: str) -> None:
            if self.task is not None:
                progress.update(self.task, total=1, completed=1)
            self.files = self.size = 0
            self.task = progress.add_task(f"{shown(name)} ({kind})", total=None, done="")

        def taken(self, files: int, size: int) -> None:
            self.files += files
            self.size += size
            assert self.task is not None
            progress.update(self.task, done=f"{self.files:,} files, {size_text(self.size)}")

        def joining(self, part: int, parts: int) -> None:
            if part == 1:
                assert self.task is not None
                progress.update(self.task, total=1, completed=1)
                self.task = progress.add_task("comparing", total=parts, done="")
            if self.task is not None:
                progress.update(self.task, completed=part)

    return Shown()


# ------------------------------------------------------------------------------------------------------------ tables


def show(console: Console, estimate: Estimate) -> None:
    """Print the tables."""
    # Names are from guests' disks: shown, and never taken for markup.
    _table(
        console,
        ("root", "kind", "files", "bytes", "zero", "twice", "text", *(("resident",) if estimate.memory else ())),
        [
            (
                shown(root.name),
                root.kind,
                f"{root.files:,}",
                size_text(root.pages * PAGE_SIZE),
                size_text(root.zero * PAGE_SIZE),
                size_text(root.repeated * PAGE_SIZE),
                size_text(root.text * PAGE_SIZE),
                *((size_text(min(root.pages * PAGE_SIZE, estimate.memory)),) if estimate.memory else ()),
            )
            for root in estimate.roots
        ],
        2,
    )
    if len(estimate.roots) > 1:
        pairs = sorted(estimate.pairs, key=lambda pair: -pair[2])
        sizes = [root.pages * PAGE_SIZE for root in estimate.roots]
        _table(
            console,
            ("pair", "and", "would share", "of the smaller"),
            [
                (
                    shown(estimate.roots[a].name),
                    shown(estimate.roots[b].name),
                    size_text(shared),
                    percent(shared, min(sizes[a], sizes[b])),
                )
                for a, b, shared in pairs
            ],
            2,
        )
    _table(
        console,
        ("page class", "in all roots", "would be saved"),
        [(name, size_text(total), size_text(saved)) for name, (total, saved) in estimate.classes.items()],
        1,
    )
    if estimate.packages:
        _table(
            console,
            ("package", "would be saved"),
            [(shown(name), size_text(size)) for name, size in estimate.packages],
            1,
        )
    _print(
        console,
        f"possible to save: {size_text(estimate.possible_saved)} of {size_text(estimate.resident)} "
        f"({percent(estimate.possible_saved, estimate.resident)})"
        + (f", by a model of guests with {size_text(estimate.memory)} of page cache" if estimate.memory else ""),
    )
    other: Backend = "xen" if estimate.backend == "local" else "local"
    _print(
        console,
        f"apart: zero pages {size_text(estimate.zero)}; pages that a root has twice {size_text(estimate.self_shared)}; "
        f"on the backend {other} it would be {size_text(estimate.possible_by_backend[other])}",
    )
    if estimate.small_files:
        _print(console, f"left out: {estimate.small_files:,} files smaller than {size_text(estimate.min_file)}")
    _show_left_out(console, estimate)


def _show_left_out(console: Console, estimate: Estimate) -> None:
    for text in estimate.notes:
        _print(console, f"note: {shown(text)}")
    if not estimate.left_out_count:
        return
    _print(console, f"not counted, wholly or in part: {estimate.left_out_count:,}")
    reasons = Counter(entry.reason for entry in estimate.left_out)
    for reason, count in reasons.most_common(_MOST_ROWS):
        named = [
            f"{shown(entry.root)}: {shown(entry.path)}" if entry.path else shown(entry.root)
            for entry in estimate.left_out
            if entry.reason == reason
        ]
        _print(console, f"  {count:,} x {shown(reason)}")
        for name in named[:_MOST_NAMED]:
            _print(console, f"      {name}")
        if len(named) > _MOST_NAMED:
            _print(console, f"      and {len(named) - _MOST_NAMED:,} more; --json names them")


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for at, head in enumerate(heads):
        table.add_column(head, justify="left" if at < words else "right", overflow="fold")
    for row in rows[:_MOST_ROWS]:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    if len(rows) > _MOST_ROWS:
        _print(console, f"and {len(rows) - _MOST_ROWS:,} more; --json and --html have all")
    console.print()


# ------------------------------------------------------------------------------------------------------------- files


def _check_writable(path: Path) -> None:
    """Say at once that a result could not be written, not after an hour."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder", "give the name of a file")
    place = path if path.exists() else path.parent
    if not place.exists():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if not os.access(place, os.W_OK):
        raise UsageError(f"{path}: cannot be written")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is no regular file (a pipe) is written to."""
    data = text.encode("utf-8", "replace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
            return
        target = path.resolve()
        fd, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None

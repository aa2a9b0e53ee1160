"""Reads roots one after the other, and counts what they have in common. Prints nothing."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import HostError, UsageError
from ..common.native import CLASS_DATA, CLASS_RODATA, CLASS_TEXT, FP_SIZE, PAGE_SIZE, TALLY_PARTS, Tally
from .figures import Backend, Estimate, RootPages, SharedPages, weight
from .intake import Intake, Ledger, Source, Unreadable
from .sources import open_source

MOST_ROOTS = 256


@dataclass(frozen=True, slots=True)
class Options:
    """How to count. memory, min_file: bytes. work: folder for what does not fit into memory."""

    backend: Backend = "local"
    memory: int | None = None
    min_file: int = 0
    cross: bool = False
    work: Path = Path("/var/tmp")


class Listener:
    """Hears how far it is. Every method may be called often."""

    def reading(self, name: str, kind: str) -> None:
        """Hear that a root is begun."""

    def taken(self, files: int, size: int) -> None:
        """Hear of more files and bytes of that root."""

    def joining(self, part: int, parts: int) -> None:
        """Hear how many parts are counted."""


def estimate(paths: Sequence[Path], options: Options, listener: Listener) -> Estimate:
    """Read the roots and count. Raises UsageError if one is no root, HostError if this host lacks something."""
    if len(paths) > MOST_ROOTS:
        raise UsageError(f"{len(paths)} roots: at most {MOST_ROOTS} are compared at a time")
    begun = time.monotonic()
    with ExitStack() as stack:
        # All of them before anything is read: what cannot work is said at once.
        sources: list[Source] = []
        for path in paths:
            source = open_source(path, options.work, options.cross)
            stack.callback(source.close)
            sources.append(source)
        spill = scratch_file(options.work)
        stack.callback(os.close, spill)
        tally = stack.enter_context(Tally(spill, os.urandom(FP_SIZE), len(paths)))
        ledger = Ledger(tally)
        names = _names(paths)
        for number, (name, source) in enumerate(zip(names, sources, strict=True)):
            listener.reading(name, source.kind)
            _read(source, Intake(ledger, number, name, options.min_file, listener.taken))
        counted = [tally.root(number) for number in range(len(paths))]
        weights = [weight(root.pages * PAGE_SIZE, options.memory) for root in counted]
        sums = tally.join(
            memoryview(ledger.groups).cast("B"),
            len(ledger.group_of),
            weights,
            options.backend == "xen",
            lambda part: listener.joining(part + 1, TALLY_PARTS),
        )
        spilled = tally.spilled_bytes()
    roots = [
        RootPages(
            name,
            source.kind,
            root.files,
            root.pages,
            root.zero,
            root.by_class[CLASS_TEXT],
            root.by_class[CLASS_RODATA],
            root.by_class[CLASS_DATA],
            repeated,
        )
        for name, source, root, repeated in zip(names, sources, counted, sums.repeated, strict=True)
    ]
    shared = SharedPages(
        sums.distinct,
        sums.saved[CLASS_TEXT],
        sums.saved[CLASS_RODATA],
        sums.saved[CLASS_DATA],
        sums.area,
        sums.repeated_in_area,
        sums.pairs,
        {name: sums.groups[group] for name, group in ledger.group_of.items()},
    )
    return Estimate(
        options.backend,
        options.memory,
        roots,
        shared,
        ledger.left_out,
        ledger.left_out_count,
        ledger.notes,
        options.min_file,
        ledger.small_files,
        time.monotonic() - begun,
        spilled,
    )


def _read(source: Source, intake: Intake) -> None:
    try:
        source.read(intake)
    except Unreadable as error:
        intake.leave_out("", str(error))
        raise UsageError(f"{intake.name}: cannot be read: {error}", "nothing was estimated") from None
    finally:
        intake.flush()


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each root: its path; with a number where the same one is given again."""
    names: list[str] = []
    for path in paths:
        name, number = str(path), 1
        while name in names:
            number += 1
            name = f"{path}#{number}"
        names.append(name)
    return names


def scratch_file(work: Path) -> int:
    """Open a file without a name: whatever happens to this process, nothing is left of it."""
    try:
        try:
            return os.open(work, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            fd, name = tempfile.mkstemp(prefix="sharearea-estimate-", dir=work)
            os.unlink(name)
            return fd
    except OSError as error:
        raise HostError(
            f"{work}: no file can be made there: {error.strerror}", "give --work-dir a folder that can be written"
        ) from None

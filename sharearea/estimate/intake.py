"""What roots of every kind hand their files to: it numbers files, feeds the tally, and keeps what was left out."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Final, Protocol

from ..common.errors import HostError, NativeError
from ..common.native import Tally
from .figures import NO_PACKAGE, LeftOut
from .packages import Packages

AT_ONCE: Final = 64 << 20  # bytes between two chances to be interrupted
MOST_NAMED: Final = 10_000  # left out files beyond these are counted and not named
_TELL_BYTES: Final = 16 << 20
_TELL_FILES: Final = 512

Tell = Callable[[int, int], None]
"""Hears now and then how many more files and bytes were taken."""


@dataclass(frozen=True, slots=True)
class Hole:
    """So many zero bytes of a file that nobody has to read."""

    size: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file that lie in another file or device."""

    fd: int
    offset: int
    size: int
    sparse: bool = False


Piece = Hole | Stretch | bytes


class Unreadable(Exception):
    """Something of a root cannot be read; the text says why, for people."""


class Source(Protocol):
    """A root, opened and known to be one."""

    kind: str

    def read(self, intake: Intake) -> None:
        """Hand over every regular file. Raises Unreadable if it cannot be read at all."""

    def close(self) -> None:
        """Close what it has open."""


@dataclass(slots=True)
class Ledger:
    """What all roots have together: the group of each file by its number, and what was left out."""

    tally: Tally
    groups: array[int] = field(default_factory=lambda: array("I"))
    group_of: dict[str, int] = field(default_factory=lambda: {NO_PACKAGE: 0})
    left_out: list[LeftOut] = field(default_factory=list)
    left_out_count: int = 0
    notes: list[str] = field(default_factory=list)
    small_files: int = 0


class Intake:
    """Takes the files of one root. Paths have no leading slash."""

    def __init__(self, ledger: Ledger, root: int, name: str, min_file: int, tell: Tell) -> None:
        self.packages = Packages()
        self.packages_come_later = False
        self.name = name
        self._ledger = ledger
        self._tally = ledger.tally
        self._root = root
        self._min_file = min_file
        self._tell = tell
        self._untold_files = self._untold_bytes = 0
        self._later: list[tuple[int, str]] = []

    def file(self, path: str, fd: int, size: int, sparse: bool) -> None:
        """Take a file that is open as fd."""
        if size < self._min_file:
            self._ledger.small_files += 1
            return
        if size > AT_ONCE:
            self.pieces(path, size, [Stretch(fd, 0, size, sparse)])
            return
        try:
            fed = self._tally.file(self._root, self._number(path), fd, size, sparse)
        except NativeError as error:
            self.leave_out(path, f"cannot be read: {reason_of(error)}")
            return
        if fed < size:
            self.leave_out(path, f"ended after {fed} of {size} bytes; those are counted")
        self._told(1, size)

    def pieces(self, path: str, size: int, pieces: Iterable[Piece], before: str = "") -> None:
        """Take a file that comes in pieces; what they lack of its size is a hole. before: shown before its path.

        A piece that cannot be read ends the file: what came before it stays counted.
        """
        if size < self._min_file:
            self._ledger.small_files += 1
            return
        tally = self._tally
        left = size
        tally.begin(self._root, self._number(path))
        try:
            # To their end, even if the file is full: whoever gives them may have something to do after the last one.
            for piece in pieces:
                if isinstance(piece, Hole):
                    taken = min(piece.size, left)
                    tally.hole(taken)
                elif isinstance(piece, Stretch):
                    taken = min(piece.size, left)
                    self._stretch(piece, taken)
                else:
                    taken = min(len(piece), left)
                    tally.feed(memoryview(piece)[:taken])
                    self._told(0, taken)
                left -= taken
            tally.hole(left)
        except (Unreadable, NativeError) as error:
            tally.abandon()
            counted = f"; its first {size - left} bytes are counted" if left < size else ""
            self.leave_out(before + path, f"cannot be read: {reason_of(error)}{counted}")
        else:
            tally.end()
        self._told(1, 0)

    def _stretch(self, piece: Stretch, size: int) -> None:
        done = 0
        while done < size:
            want = min(size - done, AT_ONCE)
            fed = self._tally.feed_fd(piece.fd, piece.offset + done, want, piece.sparse)
            done += fed
            self._told(0, fed)
            if fed < want:
                raise Unreadable(f"it ends {size - done} bytes too early")

    def _number(self, path: str) -> int:
        number = len(self._ledger.groups)
        if self.packages_come_later:
            self._later.append((number, path))
            self._ledger.groups.append(0)
        else:
            self._ledger.groups.append(self._group(path))
        return number

    def _group(self, path: str) -> int:
        package = self.packages.of(path)
        return 0 if package is None else self._ledger.group_of.setdefault(package, len(self._ledger.group_of))

    def _told(self, files: int, size: int) -> None:
        self._untold_files += files
        self._untold_bytes += size
        if self._untold_bytes >= _TELL_BYTES or self._untold_files >= _TELL_FILES:
            self.flush()

    def flush(self) -> None:
        """Tell what was not told yet."""
        self._tell(self._untold_files, self._untold_bytes)
        self._untold_files = self._untold_bytes = 0

    def settle(self) -> None:
        """Find the packages of files that came before their root's lists."""
        for number, path in self._later:
            self._ledger.groups[number] = self._group(path)
        self._later.clear()

    def leave_out(self, path: str, reason: str) -> None:
        """Say that something was not counted, wholly or in part. path: empty for the root as a whole."""
        self._ledger.left_out_count += 1
        if len(self._ledger.left_out) < MOST_NAMED:
            self._ledger.left_out.append(LeftOut(self.name, path, reason))

    def note(self, text: str) -> None:
        """Say something about this root that a reader of the figures should know."""
        self._ledger.notes.append(f"{self.name}: {text}")


def keep(file: IO[bytes], data: bytes) -> None:
    """Add to a file in the work folder. Raises HostError if it cannot be written."""
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        raise HostError(
            f"{file.name}: cannot be written: {reason_of(error)}", "give --work-dir a folder with more room"
        ) from None


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line, without the name of the call."""
    if isinstance(error, NativeError):
        return error.message.removeprefix(f"{error.call}: ")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return text or type(error).__name__

"""Which package a file of a log is of: by the dpkg or rpm database of a guest's root folder, or of this system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..common.errors import UsageError

_MOST_SKIPPED: Final = 3  # folders at the beginning of a path


def package_finder(root: Path | None, note: Callable[[str], None]) -> Callable[[str], str | None]:
    """Return what says which package a path is of; None for none. `note` hears what a reader should know of it.

    `root`: the root folder of a guest; None: this system's. Raises UsageError if it is no folder.
    """
    from ..estimate.folder import FolderTree
    from ..estimate.packages import Packages

    place = root or Path("/")
    if not place.is_dir():
        raise UsageError(f"{place} is no folder", "--root is the root folder of a guest")
    packages = Packages()
    packages.read(FolderTree(place), lambda what: note(f"note: {what}"))
    if not len(packages):
        note(f"note: {place} has no dpkg or rpm database that can be read: no file has a package")
    elif root is None:
        note("note: packages are those of this system; --root DIR reads a guest's")

    def package_of(path: str) -> str | None:
        # A root may lie in a folder of what the agent takes for "/", as the demo's do.
        names = path.strip("/").split("/")
        for skipped in range(min(len(names), _MOST_SKIPPED + 1)):
            found = packages.of("/".join(names[skipped:]))
            if found is not None:
                return found
        return None

    return package_of

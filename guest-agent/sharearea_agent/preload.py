"""Start a program with the shim in it: libsharearea_preload.so, which CMake puts beside the extension module.

What the shim does is docs/preload.md's; nothing of it is in Python.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from .common import native
from .common.errors import HostError
from .shared import SOCKET_VARIABLE

LIBRARY: Final = "libsharearea_preload.so"
_VARIABLE: Final = "LD_PRELOAD"


def library() -> Path | None:
    """Return the shim's path, or None where there is none: it is built for x86-64 only."""
    path = Path(native.EXTENSION_FILE).parent / LIBRARY
    return path if path.exists() else None


def environment(before: Mapping[str, str], shim: Path, socket: str) -> dict[str, str]:
    """Return an environment in which programs have the shim: first of all preloaded libraries, and only once.

    Raises HostError if the loader could not take its path: it takes a colon or a space for the end of one.
    """
    if any(end in os.fspath(shim) for end in ": "):
        raise HostError(f"{shim} cannot be preloaded: its path has a colon or a space", "install it elsewhere")
    others = [each for each in before.get(_VARIABLE, "").replace(":", " ").split() if Path(each).name != LIBRARY]
    return dict(before) | {_VARIABLE: ":".join([os.fspath(shim), *others]), SOCKET_VARIABLE: socket}


def execute(command: Sequence[str], socket: str) -> NoReturn:
    """Become this program, with the shim in it; without, where there is none. Raises HostError if it cannot be run."""
    shim = library()
    known = dict(os.environ) if shim is None else environment(os.environ, shim, socket)
    try:
        os.execvpe(command[0], list(command), known)
    except OSError as error:
        raise HostError(f"cannot run {command[0]}: {error.strerror}", "give a program that is there") from None

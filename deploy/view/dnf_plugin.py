"""For dnf: guest views over their own folder are down during a transaction (view.md of sharearea's documentation)."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess

import dnf

_HOOK = "/usr/libexec/sharearea-view/packages"


class ShareareaView(dnf.Plugin):  # type: ignore[misc]
    """Takes the views down before a transaction, and brings them up after it, however it ends."""

    name = "sharearea_view"

    def pre_transaction(self) -> None:
        """Take them down. What it begins ends with this process at the latest: a transaction may fail."""
        atexit.register(_call, "up")
        _call("down")

    def transaction(self) -> None:
        """Bring them up again."""
        atexit.unregister(_call)
        _call("up")


def _call(what: str) -> None:
    # The hook bounds itself, and says for itself what went wrong. It is gone while its package is removed.
    with contextlib.suppress(OSError):
        subprocess.run([_HOOK, what, str(os.getpid())], check=False, stdin=subprocess.DEVNULL)

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

    def resolved(self) -> None:
        """Take them down. What it begins ends with this process at the latest: a transaction may fail, or be declined.

        Not in pre_transaction, which comes after rpm's test: for rpm a read-only file system has no room.
        """
        if self.base.transaction:
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

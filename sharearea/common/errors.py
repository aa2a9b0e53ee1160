"""Errors of both programs: each carries what happened, what to do about it, and the exit code that says so.

Only the command line prints them. Exit codes are documented in docs/exit-codes.md; a test compares the two.
"""

from __future__ import annotations


class ShareareaError(Exception):
    """Base of every error that a user can act on.

    `hint` says what to do; it may be empty. `exit_code` is what the command line ends with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(ShareareaError):
    """The command line's words are off."""

    exit_code = 2


class ConfigError(ShareareaError):
    """A configuration file is missing, unreadable or says something that cannot be meant."""

    exit_code = 3


class HostError(ShareareaError):
    """This host lacks something that is needed (a system call, a right, a limit)."""

    exit_code = 4


class PeerUnreachable(ShareareaError):
    """No broker or no agent answers where one was expected."""

    exit_code = 5


class StoreError(ShareareaError):
    """The store cannot be opened or written."""

    exit_code = 6


class StoreFull(StoreError):
    """The store cannot grow: its own limit or the disk is reached. Nothing of the transaction was written."""


class AreaFull(ShareareaError):
    """The sharing area has reached its limit, or the host has no memory or descriptor left for it."""

    exit_code = 7


class VerificationFailed(ShareareaError):
    """Bytes that ought to be equal were not."""

    exit_code = 8


class ProtocolError(ShareareaError):
    """A peer sent something that the protocol does not allow. The peer pays, nobody else."""

    exit_code = 9


class NativeError(ShareareaError):
    """A native call failed; `errno` says how."""

    exit_code = 4

    def __init__(self, call: str, errno: int, text: str, hint: str = "") -> None:
        super().__init__(f"{call}: {text}", hint)
        self.call = call
        self.errno = errno


class NotInTime(ShareareaError):
    """What was asked for has not happened within the time that was given. It may happen still."""

    exit_code = 10


class TableFull(ShareareaError):
    """A fingerprint table has no room for a report; nothing of the report was taken."""

    exit_code = 7


class Closed(ShareareaError):
    """A handle was used after close()."""

    exit_code = 1

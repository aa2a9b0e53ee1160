"""The pools' fingerprint keys of this boot: random, in a file that only root can read, never in a log.

A key lives as long as the host is up, so that agents' fingerprint caches stay good over a restart of the broker. A file
of another boot, or one that cannot be read, is replaced; agents then fingerprint again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

import msgpack

from .common.errors import HostError
from .common.wire import FINGERPRINT_SIZE

_NAME: Final = "pool-keys"


class PoolKey(NamedTuple):
    """A pool's key and the public name of it: an agent's cache belongs to one epoch."""

    epoch: bytes  # 16 bytes
    key: bytes  # 32 bytes


def load_keys(state_dir: Path, boot_id: str, pools: list[str]) -> dict[str, PoolKey]:
    """Return a key for each pool, new ones where there is none of this boot. Raises HostError."""
    path = state_dir / _NAME
    known = _read(path, boot_id)
    keys = {pool: known.get(pool) or PoolKey(os.urandom(16), os.urandom(FINGERPRINT_SIZE)) for pool in pools}
    merged = known | keys
    if merged != known:
        _write(path, boot_id, merged)
    return keys


def _read(path: Path, boot_id: str) -> dict[str, PoolKey]:
    try:
        boot, entries = msgpack.unpackb(path.read_bytes(), raw=False)
        if boot != boot_id:
            return {}
        keys = {str(pool): PoolKey(epoch, key) for pool, (epoch, key) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, msgpack.UnpackException):
        return {}
    good = all(len(entry.epoch) == 16 and len(entry.key) == FINGERPRINT_SIZE for entry in keys.values())
    return keys if good else {}


def _write(path: Path, boot_id: str, keys: dict[str, PoolKey]) -> None:
    data = msgpack.packb([boot_id, {pool: list(entry) for pool, entry in keys.items()}], use_bin_type=True)
    scratch = path.with_suffix(".new")
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(data)
        scratch.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", "make room or fix the rights of its folder") from None

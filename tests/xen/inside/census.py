"""Compares what the broker's store says with what an area's grant table and frames are.

Runs in dom0, whether or not a broker runs: it reads a copy of the store. Table and frames are read here with ctypes, by
the words of Xen's public headers and not by sharearea's own code; only the store's format is the package's. Each line
of standard input is a question, {"pool": NAME, "state": STATE_DIR}; its answer is {"ok": true, "answer": {...}} with:

domid     the area domain, -1 if there is none
entries   how many entries of the table are in use (those of Xen's own, 0 to 7, aside); by domain in `by_domain`
mapped    how many of them a domain maps at this moment
missing   owners' pages without their entry: [domid, reference, slot], the first ten; lost: how many
strange   entries that no owner has: [domid, reference, frame, flags], the first ten; unowned: how many
writable  entries that are not exactly a read-only permission: must be none
slots     how many slots the store knows; `wrong`: those whose bytes do not have their fingerprint
sha256    of all these slots' bytes, in their order
refs      by domain, the references that owners have, ascending
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import shutil
import struct
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

from sharearea.area.xen import BASE_FRAME
from sharearea.common.errors import ShareareaError
from sharearea.common.native import AreaDomain, fingerprint_pages
from sharearea.keys import load_keys
from sharearea.model import PoolRecord
from sharearea.store import Store

PAGE = 4096
GRANT_TABLE = 1  # XENMEM_resource_grant_table, xen/include/public/memory.h
PERMIT, READONLY, READING, WRITING = 1, 4, 8, 16  # xen/include/public/grant_table.h
FIRST = 8
AT_ONCE = 1024


class Odd(Exception):
    """What is in the store cannot be."""


class Foreign:
    """Frames and grant table of a domain, over libxenforeignmemory."""

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self._lib = ctypes.CDLL("libxenforeignmemory.so.1", use_errno=True)
        for name in ("open", "map", "map_resource"):
            getattr(self._lib, f"xenforeignmemory_{name}").restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._lib.xenforeignmemory_open(None, 0))

    def table(self, frames: int) -> bytes:
        """Return the bytes of the first frames of the grant table. Mapping more than there are makes it grow."""
        address = ctypes.c_void_p()
        resource = self._lib.xenforeignmemory_map_resource(
            self._handle, self.domid, GRANT_TABLE, 0, 0, frames, ctypes.byref(address), mmap.PROT_READ, 0
        )
        if not resource:
            raise OSError(ctypes.get_errno(), "the grant table cannot be mapped")
        data = ctypes.string_at(address, frames * PAGE)
        self._lib.xenforeignmemory_unmap_resource(self._handle, ctypes.c_void_p(resource))
        return data

    def read(self, frames: list[int]) -> bytes:
        """Return the bytes of guest frames; what is not there is zero."""
        pfns = (ctypes.c_ulong * len(frames))(*frames)
        errors = (ctypes.c_int * len(frames))()
        address = self._lib.xenforeignmemory_map(
            self._handle, self.domid, mmap.PROT_READ, ctypes.c_size_t(len(frames)), pfns, errors
        )
        if not address:
            raise OSError(ctypes.get_errno(), "frames cannot be mapped")
        pages = [bytes(PAGE) if errors[i] else ctypes.string_at(address + i * PAGE, PAGE) for i in range(len(frames))]
        self._lib.xenforeignmemory_unmap(self._handle, ctypes.c_void_p(address), ctypes.c_size_t(len(frames)))
        return b"".join(pages)


def record_of(pool: str, state: Path, boot: str) -> PoolRecord | None:
    """Return what the store says of a pool, from a copy."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "store"
        shutil.copytree(state / "store", copy)
        store, records, said = Store.open(copy, boot_id=boot)
        store.close()
        if said is not None:
            raise Odd(said)
        return records.get(pool)


def owned(record: PoolRecord) -> dict[int, tuple[int, int]]:
    """Return reference -> (domid, slot) of all owners."""
    found: dict[int, tuple[int, int]] = {}
    for owner in record.owners.values():
        runs, refs = array("I", owner.runs), array("I", owner.refs)
        slots = [runs[i + 1] + k for i in range(0, len(runs), 3) for k in range(runs[i + 2])]
        references = [refs[i] + k for i in range(0, len(refs), 2) for k in range(refs[i + 1])]
        if len(slots) != len(references):
            raise Odd(f"an owner has {len(slots)} pages and {len(references)} references")
        for reference, slot in zip(references, slots, strict=True):
            if reference in found:
                raise Odd(f"reference {reference} has two owners")
            found[reference] = (owner.domid, slot)
    return found


def domid_of(identity: bytes) -> int:
    """Return the living domain with a uuid, -1 if there is none."""
    text = identity.hex()
    uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    for line in subprocess.run(["xl", "list", "-v"], capture_output=True, text=True, check=True).stdout.splitlines():
        words = line.split()
        if uuid in words and words[0] != "(null)":  # a dying domain has no name
            return int(words[1])
    return -1


def main() -> int:
    """Answer until standard input ends."""
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"ok": True, "answer": census(question["pool"], Path(question["state"]))}
        except (OSError, subprocess.SubprocessError, ShareareaError, Odd) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


def census(pool: str, state: Path) -> dict[str, Any]:
    """Count what there is of a pool."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = record_of(pool, state, boot)
    domid = domid_of(record.area) if record is not None else -1
    if record is None or domid < 0:
        return {"domid": -1}
    key = load_keys(state, boot, [pool])[pool].key
    return take(Foreign(domid), record, key)


def take(foreign: Foreign, record: PoolRecord, key: bytes) -> dict[str, Any]:
    """Compare a pool's record with its area domain."""
    # How far the table has grown is the one thing that only the package's own code is asked.
    with AreaDomain(foreign.domid, BASE_FRAME) as area:
        frames = area.table()[0]
    table = foreign.table(frames)
    owners = owned(record)
    entries: dict[int, tuple[int, int, int]] = {}
    for reference in range(FIRST, len(table) // 8):
        flags, domid, frame = struct.unpack_from("<HHI", table, reference * 8)
        if flags:
            entries[reference] = (flags, domid, frame)
    missing = [
        [domid, reference, slot]
        for reference, (domid, slot) in sorted(owners.items())
        if entries.get(reference, (0, 0, 0))[1:] != (domid, BASE_FRAME + slot)
    ]
    strange = [
        [domid, reference, frame, flags]
        for reference, (flags, domid, frame) in sorted(entries.items())
        if owners.get(reference) != (domid, frame - BASE_FRAME)
    ]
    by_domain: dict[str, int] = {}
    for _, domid, _ in entries.values():
        by_domain[str(domid)] = by_domain.get(str(domid), 0) + 1
    refs: dict[str, list[int]] = {}
    for reference, (domid, _) in sorted(owners.items()):
        refs.setdefault(str(domid), []).append(reference)
    slots, wrong, digest = check_slots(foreign, record, key)
    return {
        "domid": foreign.domid,
        "entries": len(entries),
        "by_domain": by_domain,
        "mapped": sum(bool(flags & (READING | WRITING)) for flags, _, _ in entries.values()),
        "missing": missing[:10],
        "lost": len(missing),
        "strange": strange[:10],
        "unowned": len(strange),
        "writable": sum(flags & ~READING != PERMIT | READONLY for flags, _, _ in entries.values()),
        "slots": slots,
        "wrong": wrong,
        "sha256": digest,
        "refs": refs,
    }


def check_slots(foreign: Foreign, record: PoolRecord, key: bytes) -> tuple[int, int, str]:
    """Hash the bytes of every slot that the store knows: how many, how many are wrong, and the SHA-256 of all."""
    known: list[tuple[int, bytes]] = []
    for first, column in sorted(record.slots.items()):
        for i in range(len(column) // 32):
            fingerprint = column[i * 32 : i * 32 + 32]
            if any(fingerprint):
                known.append((first + i, fingerprint))
    digest = hashlib.sha256()
    wrong = 0
    for at in range(0, len(known), AT_ONCE):
        part = known[at : at + AT_ONCE]
        pages = foreign.read([BASE_FRAME + slot for slot, _ in part])
        digest.update(pages)
        found, _ = fingerprint_pages(key, pages)
        wrong += sum(found[i * 32 : i * 32 + 32] != want for i, (_, want) in enumerate(part))
    return len(known), wrong, digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

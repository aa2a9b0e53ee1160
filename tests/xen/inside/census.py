"""Compares what the broker's store says with what an area's grant table and frames are.

Runs in dom0, whether or not a broker runs: it reads a copy of the store. Table and frames are read here with ctypes, by
the words of Xen's public headers and not by sharearea's own code; only the store's format is the package's. Each line
of standard input is a question, {"pool": NAME, "state": STATE_DIR, "bytes": true|false}; its answer is
{"ok": true, "answer": {...}} with:

domid     the area domain, -1 if there is none
entries   how many entries of the table are in use (those of Xen's own, 0 to 7, aside); by domain in `by_domain`
mapped    how many of them a domain maps at this moment
missing   owners' pages without their entry: [reference, flags, domid, frame], the first ten; lost: how many
strange   entries that no owner has: likewise; unowned: how many
writable  entries that are not exactly a read-only permission: must be none
slots     how many slots the store knows; `wrong`: those whose bytes do not have their fingerprint; -1 if not asked
          for, or if the broker has changed something meanwhile
refs      by domain, the references that owners have, ascending
"""

from __future__ import annotations

import ctypes
import json
import mmap
import shutil
import subprocess
import sys
import tempfile
from array import array
from itertools import chain
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


def owned(record: PoolRecord) -> dict[int, int]:
    """Return reference -> entry of all owners, an entry being a number as the table has it, without its flags."""
    found: dict[int, int] = {}
    pages = 0
    for owner in record.owners.values():
        runs, refs = array("I", owner.runs), array("I", owner.refs)
        slots = chain.from_iterable(range(runs[i + 1], runs[i + 1] + runs[i + 2]) for i in range(0, len(runs), 3))
        references = list(chain.from_iterable(range(refs[i], refs[i] + refs[i + 1]) for i in range(0, len(refs), 2)))
        entries = [BASE_FRAME + slot << 32 | owner.domid << 16 for slot in slots]
        if len(entries) != len(references):
            raise Odd(f"an owner has {len(entries)} pages and {len(references)} references")
        found.update(zip(references, entries, strict=True))
        pages += len(entries)
    if len(found) != pages:
        raise Odd(f"{pages - len(found)} references have two owners")
    return found


def parts(entry: int) -> tuple[int, int, int]:
    """Return flags, domain and frame of an entry (struct grant_entry_v1)."""
    return entry & 0xFFFF, entry >> 16 & 0xFFFF, entry >> 32


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
            answer = {"ok": True, "answer": census(question["pool"], Path(question["state"]), question["bytes"])}
        except (OSError, subprocess.SubprocessError, ShareareaError, Odd) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


def census(pool: str, state: Path, look_at_bytes: bool) -> dict[str, Any]:
    """Count what there is of a pool."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = record_of(pool, state, boot)
    domid = domid_of(record.area) if record is not None else -1
    if record is None or domid < 0:
        return {"domid": -1}
    foreign = Foreign(domid)
    answer = take(foreign, record) | {"slots": 0, "wrong": -1}
    if look_at_bytes:
        slots, wrong = check_slots(foreign, record, load_keys(state, boot, [pool])[pool].key)
        after = record_of(pool, state, boot)
        if after is not None and after.slots == record.slots:
            answer |= {"slots": slots, "wrong": wrong}
    return answer


def take(foreign: Foreign, record: PoolRecord) -> dict[str, Any]:
    """Compare a pool's owners with its area domain's table."""
    # How far the table has grown is the one thing that only the package's own code is asked.
    with AreaDomain(foreign.domid, BASE_FRAME) as area:
        frames = area.table()[0]
    table = foreign.table(frames)
    owners = owned(record)
    words = array("Q", table)
    entries = {reference: words[reference] for reference in range(FIRST, len(words)) if words[reference] & 0xFFFF}
    missing = [ref for ref, entry in owners.items() if entries.get(ref, 0) & ~0xFFFF != entry]
    strange = [ref for ref, entry in entries.items() if entry & ~0xFFFF != owners.get(ref)]
    return {
        "domid": foreign.domid,
        "entries": len(entries),
        "by_domain": {domid: len(refs) for domid, refs in _by_domain(entries).items()},
        "mapped": sum(bool(entry & (READING | WRITING)) for entry in entries.values()),
        "missing": [[ref, *parts(owners[ref])] for ref in missing[:10]],
        "lost": len(missing),
        "strange": [[ref, *parts(entries[ref])] for ref in strange[:10]],
        "unowned": len(strange),
        "writable": sum(entry & (0xFFFF & ~READING) != PERMIT | READONLY for entry in entries.values()),
        "refs": {domid: sorted(refs) for domid, refs in _by_domain(owners).items()},
    }


def _by_domain(entries: dict[int, int]) -> dict[str, list[int]]:
    """Put references together by the domain that their entries are for."""
    found: dict[int, list[int]] = {}
    for reference, entry in entries.items():
        found.setdefault(entry >> 16 & 0xFFFF, []).append(reference)
    return {str(domid): references for domid, references in found.items()}


def check_slots(foreign: Foreign, record: PoolRecord, key: bytes) -> tuple[int, int]:
    """Fingerprint the bytes of every slot that the store knows: how many there are, and how many are wrong."""
    known: list[tuple[int, bytes]] = []
    for first, column in sorted(record.slots.items()):
        for i in range(len(column) // 32):
            fingerprint = column[i * 32 : i * 32 + 32]
            if any(fingerprint):
                known.append((first + i, fingerprint))
    wrong = 0
    for at in range(0, len(known), AT_ONCE):
        part = known[at : at + AT_ONCE]
        pages = foreign.read([BASE_FRAME + slot for slot, _ in part])
        found, _ = fingerprint_pages(key, pages)
        wrong += sum(found[i * 32 : i * 32 + 32] != want for i, (_, want) in enumerate(part))
    return len(known), wrong


if __name__ == "__main__":
    sys.exit(main())

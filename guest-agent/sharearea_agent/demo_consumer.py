"""A program of a demo domain: opens every file through the API, reads back every byte and compares it with the file.

`python -m sharearea_agent.demo_consumer LIST [SOCKET]`: LIST has one path per line. Speaks with the demo in JSON lines:
it prints `{"phase": ..., "done": n, "of": n}` as it goes and a result for each phase, and begins each phase when it
reads a line on its standard input: attach, state, verify, read, close. Verify compares by SHA-256, which nothing else
here does; read only reads what is mapped, and tells what it read from a disk for that.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path

from .shared import SharedFile, open_shared_all

_STEP = 64
_CHUNK = 1 << 20


def main() -> int:
    """Run the phases that the demo asks for, until it closes our standard input."""
    paths = Path(sys.argv[1]).read_bytes().splitlines()
    socket = sys.argv[2] if len(sys.argv) > 2 else None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files: list[tuple[bytes, SharedFile]] = []
    for line in sys.stdin:
        phase = line.strip()
        begun = time.monotonic()
        if phase == "attach":
            result = _attach(paths, socket, files)
        elif phase == "state":
            result = _state(files)
        elif phase == "verify":
            result = _verify(files)
        elif phase == "read":
            result = _read(files)
        elif phase == "close":
            for _, shared in files:
                shared.close()
            result = {}
        else:
            return 2
        _say({"result": phase, "seconds": time.monotonic() - begun} | result)
    return 0


def _say(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


def _attach(paths: list[bytes], socket: str | None, files: list[tuple[bytes, SharedFile]]) -> dict[str, object]:
    for at in range(0, len(paths), _STEP):
        part = paths[at : at + _STEP]
        files.extend(zip(part, open_shared_all(part, agent=socket), strict=True))
        _say({"phase": "attach", "done": len(files), "of": len(paths)})
    return _state(files)


def _state(files: list[tuple[bytes, SharedFile]]) -> dict[str, object]:
    reasons = Counter(shared.reason for _, shared in files if not shared.shared_pages)
    return {
        "files": len(files),
        "shared_files": sum(1 for _, shared in files if shared.shared_pages),
        "shared_pages": sum(shared.shared_pages for _, shared in files),
        "plain": dict(reasons),
    }


def _verify(files: list[tuple[bytes, SharedFile]]) -> dict[str, object]:
    verified = mismatched = 0
    for at, (path, shared) in enumerate(files, 1):
        mapped = hashlib.sha256(shared).digest()
        if mapped == _file_hash(path):
            verified += len(shared)
        else:
            mismatched += len(shared)
        if at % _STEP == 0:
            _say({"phase": "verify", "done": at, "of": len(files)})
    return {"verified_bytes": verified, "mismatched_bytes": mismatched}


def _read(files: list[tuple[bytes, SharedFile]]) -> dict[str, object]:
    digest = hashlib.sha256()
    for at, (_, shared) in enumerate(files, 1):
        digest.update(shared)
        if at % _STEP == 0:
            _say({"phase": "read", "done": at, "of": len(files)})
    return {"sha256": digest.hexdigest(), "read_bytes": _read_from_disks()}


def _read_from_disks() -> int:
    """Return what this process has caused to be read from disks, by the kernel's account."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def _file_hash(path: bytes) -> bytes:
    """Hash the file by reading it, which has nothing to do with the mapping."""
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, _CHUNK):
            digest.update(chunk)
    finally:
        os.close(fd)
    return digest.digest()


if __name__ == "__main__":
    sys.exit(main())

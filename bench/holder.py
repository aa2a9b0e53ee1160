"""A process with files' bytes in anonymous memory that KSM may merge: KSM never looks at the page cache.

`python -m bench.holder LIST`: LIST has one path per line. Reads every file to a page boundary, prints `{"bytes": n}`
and keeps the memory until its standard input ends.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path


def main() -> int:
    """Hold the memory until standard input ends."""
    paths = Path(sys.argv[1]).read_bytes().splitlines()
    sizes = [os.stat(path).st_size for path in paths]
    total = sum(-(-size // mmap.PAGESIZE) for size in sizes) * mmap.PAGESIZE
    memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    at = 0
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "rb", buffering=0) as file:
            if file.readinto(view[at : at + size]) != size:
                return 1
        at += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory.madvise(mmap.MADV_MERGEABLE)
    print(json.dumps({"bytes": total}), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())

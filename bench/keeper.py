"""A process that puts KSM's settings back when the bench has ended, however it ended.

`python -m bench.keeper FOLDER`: remembers the settings in FOLDER (/sys/kernel/mm/ksm), prints `{"ready": true}`, waits
for the end of its standard input, unmerges, and writes the settings back. It holds a lock meanwhile: a second bench
would take our settings for the host's. What is set in between is ksm.py's.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from pathlib import Path
from typing import Final

SETTINGS: Final = ("pages_to_scan", "sleep_millisecs", "run")
STOP_AND_UNMERGE: Final = "2"


def main() -> int:
    """Keep the settings until standard input ends."""
    folder = Path(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(json.dumps({"ready": False, "why": "another bench is measuring KSM"}), flush=True)
        return 0
    saved = {name: (folder / name).read_text().strip() for name in SETTINGS}
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
    (folder / "run").write_text(STOP_AND_UNMERGE)
    for name in SETTINGS:  # `run` last
        (folder / name).write_text(saved[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())

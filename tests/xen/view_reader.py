"""Programs that do not know of views, and that run on while all else happens: in a guest, in the namespace of the view.

`view_reader.py URL DATABASE FOLDER [FOLDER...]` reads the smaller files of folders again and again: by itself (read,
and a mapping that it keeps), from nginx at URL (which serves the first folder), and has one sqlite3 that stays open sum
up a table. Each answer is compared with the first one. /run/reader-state.json says how it is, until /run/reader-stop is
there. Needs nothing but Python and Debian's sqlite3.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Final

STATE: Final = Path("/run/reader-state.json")
STOP: Final = Path("/run/reader-stop")
LARGEST: Final = 256 << 10
"""Bytes of a file that is read: a round should not take an emulated guest a minute."""
QUESTION: Final = "select count(*), sum(length(word)), max(word) from words;\n"


class Reader:
    """The files, what they held at first, and the programs that are asked."""

    def __init__(self, url: str, database: str, folders: list[Path]) -> None:
        self.url = url
        self.folders = folders
        files = (path for folder in folders for path in folder.iterdir() if path.is_file())
        self.files = sorted(path for path in files if path.stat().st_size <= LARGEST)
        self.mappings: dict[Path, mmap.mmap] = {}
        self.first: dict[str, str] = {}
        self.wrong: list[str] = []
        self.sqlite = subprocess.Popen(
            ["sqlite3", "-readonly", database],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def same(self, name: str, answer: bytes) -> None:
        """Note an answer that differs from the first one of that name."""
        digest = hashlib.sha256(answer).hexdigest()
        if self.first.setdefault(name, digest) != digest:
            self.wrong.append(f"{time.time():.1f} {name}: {len(answer)} bytes, {digest[:16]}")

    def round(self) -> None:
        """Ask everything once."""
        for path in self.files:
            self.same(str(path), path.read_bytes())
            if path not in self.mappings:
                with open(path, "rb") as file:
                    self.mappings[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.same(str(path), self.mappings[path][:])
            if path.parent == self.folders[0]:
                with urllib.request.urlopen(f"{self.url}/{path.name}", timeout=120) as body:
                    self.same(str(path), body.read())
        assert self.sqlite.stdin is not None
        assert self.sqlite.stdout is not None
        self.sqlite.stdin.write(QUESTION)
        self.sqlite.stdin.flush()
        self.same("sqlite3", self.sqlite.stdout.readline().encode())


def main() -> int:
    """Go round until told to stop."""
    reader = Reader(sys.argv[1], sys.argv[2], [Path(text) for text in sys.argv[3:]])
    rounds = 0
    while not STOP.exists() and not reader.wrong:
        try:
            reader.round()
        except (OSError, ValueError) as error:
            reader.wrong.append(f"round {rounds}: {type(error).__name__}: {error}")
        rounds += 1
        new = STATE.with_suffix(".new")
        new.write_text(json.dumps({"rounds": rounds, "files": len(reader.files), "wrong": reader.wrong}))
        new.rename(STATE)
        time.sleep(0.2)
    return 1 if reader.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

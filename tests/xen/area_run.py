"""Runs area_probe.py in dom0 of a lab that is up, and holds pages in two of its guests for it.

`python -m tests.xen.area_run GUEST GUEST [--path FOLDER]`: the guests are there, the package is installed in dom0, or
unpacked in FOLDER there. Writes the figures as JSON to standard output; the exit code is 0 when the probe passed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .channel import Running
from .lab import Lab

HERE: Final = Path(__file__).resolve().parent
PASSED: Final = 42
PROBE_S: Final = 1200.0
ANSWER_S: Final = 60.0


def probe(
    lab: Lab, guests: tuple[str, str], path: str = "", rounds: int = 8, hear: Callable[[str], object] = str
) -> dict[str, Any]:
    """Run the probe; return its figures. Raises ChannelError or AssertionError if it did not pass.

    `hear` is told of every step and figure as it comes.
    """
    holders: list[Running] = []
    figures: dict[str, Any] = {}
    try:
        for name in guests:
            machine = lab.guest(name)
            machine.put("/run/grant_holder.py", HERE / "grant_holder.py")
            holders.append(machine.start("python3", "/run/grant_holder.py", limit=PROBE_S))
        lab.dom0.put("/run/area_probe.py", HERE / "area_probe.py")
        domids = [str(lab.domid(name)) for name in guests]
        words = ["env", f"PYTHONPATH={path}", "python3", "/run/area_probe.py", *domids, str(rounds)]
        running = lab.dom0.start(*words, limit=PROBE_S)
        try:
            while True:
                message = json.loads(running.read_line(PROBE_S))
                if "ask" in message:
                    holder = holders[message.pop("ask")]
                    holder.write(json.dumps(message).encode() + b"\n")
                    running.write(holder.read_line(ANSWER_S).encode() + b"\n")
                    continue
                hear(json.dumps(message))
                if "figures" in message:
                    figures |= message["figures"]
                elif "done" in message:
                    figures[f"{message['done']}_s"] = message["seconds"]
                    if message["done"] == "destroyed":
                        break
                else:
                    break
            done = running.wait(ANSWER_S)
            assert done.code == PASSED, f"the probe ended with {done.code}: {done.err[-4000:]}"
        finally:
            running.close()
    finally:
        for holder in holders:
            holder.close()
    return figures


def main() -> int:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("guests", nargs=2)
    parser.add_argument("--path", default="")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    first, second = options.guests
    figures = probe(
        Lab.attach(), (first, second), options.path, options.rounds, lambda line: sys.stderr.write(line + "\n")
    )
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Asks a broker or an agent on the spot: one JSON question per line, its answer on one line.

A question has "socket" and what goes to it. The installed package's own way of asking is used, in a process that stays:
starting Python for every look would take seconds in the emulator.
"""

from __future__ import annotations

import importlib
import json
import sys


def main() -> int:
    """Answer until standard input ends."""
    package = sys.argv[1]
    control = importlib.import_module(f"{package}.common.control")
    errors = importlib.import_module(f"{package}.common.errors")
    for line in sys.stdin:
        question = json.loads(line)
        socket = question.pop("socket")
        try:
            answer = {"ok": True, "answer": control.ask(socket, question)}
        except (errors.ShareareaError, OSError) as error:
            answer = {"ok": False, "error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

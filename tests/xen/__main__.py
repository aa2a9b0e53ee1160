"""The command line: `python -m tests.xen [STAGE...] [--list] [--stay]`. What `make test-xen` runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import stages  # noqa: F401  makes the stages
from .images import ImageError
from .run import STAGES, perform


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, or those up to the ones that were named, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen", description="Prove the Xen backend on a real Xen.")
    parser.add_argument("until", nargs="?", metavar="STAGE", help="the last stage to run (default: all)")
    parser.add_argument("--without", action="append", default=[], metavar="STAGE", help="leave a stage out")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--stay", action="store_true", help="leave the host up when a stage fails")
    options = parser.parse_args(arguments)
    names = [step.name for step in STAGES]
    for name in (*options.without, *([options.until] if options.until else [])):
        if name not in names:
            parser.error(f"there is no stage {name}; there are {', '.join(names)}")
    if options.list:
        for step in STAGES:
            print(f"{step.name:16} {step.limit:4.0f} s  {step.what}")
        return 0
    wanted = STAGES[: names.index(options.until) + 1] if options.until else STAGES
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f}  {text}", flush=True)

    try:
        passed, failed = perform([step for step in wanted if step.name not in options.without], say, stay=options.stay)
    except ImageError as error:
        print(f"test-xen: {error}", file=sys.stderr)
        return 1
    print(f"{passed} passed, {failed} failed in {time.monotonic() - begun:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the private memory of an idle agent goes: imports its modules one by one and reads smaps after each.

`python -m bench.footprint MODULE...` prints one JSON line for the bare interpreter and one for each module: what it
added to anonymous memory (heap and changed pages of files), and how many modules came with it. Modules are charged to
the first one that needs them, so the order matters: the standard library goes first.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

AGENT_MODULES: Final = (
    "argparse",
    "dataclasses",
    "json",
    "pathlib",
    "random",
    "secrets",
    "selectors",
    "socket",
    "sqlite3",
    "tomllib",
    "asyncio",  # structlog.stdlib imports it
    "rich.traceback",  # structlog.dev does, where rich is installed
    "structlog",
    "msgpack",
    "watchdog.observers.inotify",
    "sharearea_agent.common.native",
    "sharearea_agent.common.wire",
    "sharearea_agent.agent",
    "sharearea_agent.runner",
)
"""Each with what it needs and nothing before it has brought."""


def _anonymous() -> int:
    # Without Path, json or any other module that is to be measured.
    with open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024
    return 0


def main() -> int:
    """Import what the command line names."""
    last = _anonymous()
    found: list[tuple[str, int, int]] = [("interpreter", last, len(sys.modules))]
    for name in sys.argv[1:]:
        modules = len(sys.modules)
        importlib.import_module(name)
        now = _anonymous()
        found.append((name, now - last, len(sys.modules) - modules))
        last = now
    for name, added, modules in found:
        # Module names need no escaping.
        print(f'{{"module": "{name}", "anonymous_bytes": {added}, "modules": {modules}}}')
    return 0


if __name__ == "__main__":
    sys.exit(main())

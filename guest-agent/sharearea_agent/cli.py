"""The command `sharearea-agent`: the only place of the guest side that prints or exits.

Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from .common import __version__
from .common.control import ask
from .common.errors import ShareareaError, UsageError

DEFAULT_CONFIG: Final = Path("/etc/sharearea/agent.toml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except ShareareaError as error:
        print(f"sharearea-agent: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sharearea-agent: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough: no more of it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharearea-agent",
        description="Report this guest's cached file pages to the broker, and map shared ones for its programs.",
    )
    parser.add_argument("--version", action="version", version=f"sharearea-agent {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument(
            "--config",
            type=Path,
            default=DEFAULT_CONFIG,
            metavar="FILE",
            help=f"configuration (default: {DEFAULT_CONFIG})",
        )
        return sub

    verb("run", "run the agent in the foreground", _run)
    status = verb("status", "show what a running agent does", _status)
    status.add_argument("--json", action="store_true", help="print JSON")
    why = verb("why", "say what keeps a file of this guest from being shared", _why)
    why.add_argument("path", metavar="PATH", help="the file, by its path on this system")
    why.add_argument("--json", action="store_true", help="print JSON")
    detach = verb("detach", "bring programs back to their plain files, until `reattach`", _detach)
    which = detach.add_mutually_exclusive_group(required=True)
    which.add_argument("path", nargs="?", metavar="PATH", help="one file, by its path on this system")
    which.add_argument("--all", action="store_true", help="every file")
    ps = verb("ps", "list the programs that share, with the files and bytes attached", _ps)
    ps.add_argument("--files", action="store_true", help="list the attached files of each program too")
    ps.add_argument("--json", action="store_true", help="print JSON, files included")
    execute = verb("exec", "run a program, unchanged, on shared pages where there are any", _exec)
    execute.add_argument("--socket", metavar="PATH", help="the agent's consumer_socket, instead of a configuration")
    execute.add_argument("command", nargs="+", metavar="COMMAND", help="the program and its arguments, after --")
    verb("reattach", "end what `detach` began: programs may share again", _reattach)
    return parser


def _run(options: argparse.Namespace) -> int:
    # What the other verbs do not need is not imported for them.
    from .common.logs import EventLog
    from .config import AgentConfig
    from .runner import Runner

    config = AgentConfig.load(options.config)
    file = Path(config.log_file) if config.log_file else None
    runner = Runner(config, EventLog("sharearea-agent", config.log_level, file=file))
    try:
        runner.open()
        runner.run()
    finally:
        runner.close()
    return 0


def _ask(options: argparse.Namespace, question: dict[str, Any]) -> dict[str, Any]:
    from .config import AgentConfig

    return ask(AgentConfig.load(options.config).control_socket, question)


def _status(options: argparse.Namespace) -> int:
    status = _ask(options, {"verb": "status"})
    if options.json:
        print(json.dumps(status, indent=2, sort_keys=True))
        return 0
    link = f"connected, pool {status['pool']}" if status["connected"] else "not connected to the broker"
    print(f"agent {status['name']}: {link}")
    if status["refused"]:
        print(f"  refused: {status['refused']}")
    if status["detached"]:
        print("  detached by the operator: programs use their plain files until `sharearea-agent reattach`")
    reports = ", ".join(f"{count} {word}" for word, count in sorted(status["reports"].items())) or "none"
    for label, text in (
        ("files that are known", f"{status['files']} ({reports})"),
        ("resident", _mib(status["resident_pages"])),
        ("of that zero pages", _mib(status["zero_pages"])),
        ("files with pages in the area", str(status["offered_files"])),
        ("attached", f"{status['attached_files']} files, {_mib(status['attached_pages'])} mapped from the area"),
        ("of that never read from a disk", _mib(status["unread_pages"])),
        ("dropped from the page cache", f"{_mib(status['dropped_pages_total'])} in all"),
        ("programs", str(status["consumers"])),
        ("agent's private memory", f"{status['private_bytes'] / (1 << 20):.1f} MiB"),
    ):
        print(f"  {label}: {text}")
    return 0


def _why(options: argparse.Namespace) -> int:
    from .common.explain import EXPLANATIONS, STATES

    said = _ask(options, {"verb": "file", "path": os.path.abspath(options.path)})
    if not said["known"]:
        code = said["left_out"] or "not-seen-yet"
    elif said["attached_pages"]:
        code = "shared"
    else:
        code = said["reason"] or "no-consumer"
    if options.json:
        print(json.dumps(said | {"code": code}, indent=2, sort_keys=True))
        return 0
    found = STATES.get(code) or EXPLANATIONS.get(code)
    print(f"{code}: {found.meaning}" if found is not None else code)
    if code == "shared":
        print(f"    {said['attached_pages']} pages are mapped from the area by {said['programs']} programs")
    elif found is not None:
        print(f"    -> {found.remedy}")
    return 0


def _detach(options: argparse.Namespace) -> int:
    if options.all:
        answer = _ask(options, {"verb": "detach", "path": None})
    else:
        if not options.path:
            raise UsageError("detach needs a path or --all")
        answer = _ask(options, {"verb": "detach", "path": os.path.abspath(options.path)})
    print(f"{answer['files']} files go back to plain; `sharearea-agent reattach` ends this")
    return 0


def _ps(options: argparse.Namespace) -> int:
    programs = _ask(options, {"verb": "ps"})["programs"]
    if options.json:
        print(json.dumps(programs, indent=2, sort_keys=True))
        return 0
    print(f"{'PID':>8} {'UID':>6} {'FILES':>6} {'ATTACHED':>12}  COMMAND")
    for program in programs:
        size = f"{program['attached_bytes'] / (1 << 20):.1f} MiB"
        kind = "" if program["unchanged"] else " (uses the API)"
        print(
            f"{program['pid']:>8} {program['uid']:>6} {program['attached_files']:>6} {size:>12}"
            f"  {program['command'] or '?'}{kind}"
        )
        for file in program["files"] if options.files else ():
            print(f"{'':>15} {'':>6} {file['attached_bytes'] / (1 << 20):>8.1f} MiB  {file['path']}")
    return 0


def _exec(options: argparse.Namespace) -> int:
    from .preload import execute, library

    socket = options.socket
    if socket is None:
        from .config import AgentConfig

        socket = os.fspath(AgentConfig.load(options.config).consumer_socket)
    elif not os.path.isabs(socket):
        raise UsageError(f"--socket {socket}: not an absolute path", "programs change their folder")
    if library() is None:
        print("sharearea-agent: no shim for this machine: the program runs without shared pages", file=sys.stderr)
    execute(options.command, socket)


def _reattach(options: argparse.Namespace) -> int:
    _ask(options, {"verb": "reattach"})
    print("programs may share again")
    return 0


def _mib(pages: int) -> str:
    return f"{pages / 256:.1f} MiB"

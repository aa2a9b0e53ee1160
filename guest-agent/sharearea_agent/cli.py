"""The command `sharearea-agent`: the only place of the guest side that prints or exits.

Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .common import __version__
from .common.control import ask
from .common.errors import HostError, PeerUnreachable, ShareareaError, UsageError

if TYPE_CHECKING:
    from .config import AgentConfig
    from .view_mounts import ViewMounts

    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_CONFIG: Final = Path("/etc/sharearea/agent.toml")
UNITS: Final = Path("/etc/systemd/system")
_VIEW_ASK_S: Final = 20.0  # an agent with thousands of files in views lets go of them one by one
_VIEW_TEXT: Final = (
    "Guest views let unchanged programs of a Xen guest use shared pages; see view.md in the documentation."
)


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
    verbs: Verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(
        name: str, text: str, run: Callable[[argparse.Namespace], int], among: Verbs | None = None
    ) -> argparse.ArgumentParser:
        sub = (among or verbs).add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
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
    view = verbs.add_parser("view", help="show, mount or unmount the configured guest views", description=_VIEW_TEXT)
    does: Verbs = view.add_subparsers(title="verbs", required=True, metavar="VERB")
    shown = verb("status", "show which views are up, and what keeps others down", _view_status, does)
    shown.add_argument("--json", action="store_true", help="print JSON")
    up = verb("up", "mount the configured views that are not mounted", _view_up, does)
    why_up = up.add_mutually_exclusive_group()
    why_up.add_argument("--after", type=int, metavar="PID", help="after a package manager's work: what `--while` began")
    why_up.add_argument("--if-due", action="store_true", help="only if nobody wants them down, an operator included")
    down = verb("down", "detach and unmount the views: programs go on with plain files, until `up`", _view_down, does)
    down.add_argument(
        "--while",
        dest="during",
        type=int,
        metavar="PID",
        help="only views over their own folder, and only as long as this process (a package manager's) runs",
    )
    units = verb("drop-in", "print what gives a unit's programs the views in the place of folders", _drop_in, does)
    units.add_argument("units", nargs="+", metavar="UNIT", help="such as nginx.service")
    units.add_argument("--write", action="store_true", help=f"write it to {UNITS}/UNIT.d/sharearea-view.conf")
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
        if said["unread_pages"]:
            print(f"    {said['unread_pages']} of them were never read from a disk")
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
            unread = f" ({file['unread_bytes'] / (1 << 20):.1f} MiB never read)" if file["unread_bytes"] else ""
            print(f"{'':>15} {'':>6} {file['attached_bytes'] / (1 << 20):>8.1f} MiB  {file['path']}{unread}")
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


def _mounts(options: argparse.Namespace) -> tuple[AgentConfig, ViewMounts]:
    from .config import AgentConfig
    from .view_mounts import ViewMounts

    config = AgentConfig.load(options.config)
    return config, ViewMounts(config)


def _view_status(options: argparse.Namespace) -> int:
    config, mounts = _mounts(options)
    runs, agent = True, None
    try:
        agent = ask(config.control_socket, {"verb": "status"}).get("view")
    except PeerUnreachable:
        runs = False
    views: list[dict[str, Any]] = [
        {"lower": str(view.lower), "at": str(view.mounted_at), "over": view.over, "up": mounts.is_up(view)}
        for view in mounts.views
    ]
    down = mounts.why_down()
    if options.json:
        said = {"views": views, "kept_down_by": down, "agent_runs": runs, "agent": agent}
        print(json.dumps(said, indent=2, sort_keys=True))
        return 0
    for view in views:
        where = "over itself" if view["over"] else f"at {view['at']}"
        print(f"{view['lower']} {where}: {'up' if view['up'] else 'down'}")
    if not views:
        print("no views are configured (agent.views)")
    if down:
        print(f"  kept down by {down}")
    if agent is not None:
        size = _mib(agent["attached_pages"])
        print(f"  the agent fills {len(agent['views'])} views: {agent['attached_files']} files, {size} attached")
    else:
        print(f"  {'the agent uses no views: its log says why' if runs else 'no agent runs'}")
    return 0


def _view_up(options: argparse.Namespace) -> int:
    from .view_mounts import holder

    config, mounts = _mounts(options)
    with mounts.turn():
        if options.after is not None:
            mounts.want_up(holder(options.after).pid)
        elif not options.if_due:
            mounts.want_up(None)
        down = mounts.why_down()
        if down:
            print(f"views stay down, as {down} wants it")
            return 0
        mounts.forget_dead()
        before = sum(mounts.is_up(view) for view in mounts.views)
        problems = mounts.up()
        after = sum(mounts.is_up(view) for view in mounts.views)
    with contextlib.suppress(PeerUnreachable):  # an agent that starts looks by itself
        if ask(config.control_socket, {"verb": "view", "do": "up"}, _VIEW_ASK_S)["restart"]:
            print("the agent uses them when it is started again")
    print(f"{after} of {len(mounts.views)} views are up, {after - before} of them since now")
    _raise_all(problems)
    return 0


def _view_down(options: argparse.Namespace) -> int:
    from .view_control import ViewControl
    from .view_mounts import holder

    config, mounts = _mounts(options)
    only_over = options.during is not None
    with mounts.turn():
        # First: an agent that starts meanwhile mounts nothing.
        mounts.want_down(holder(options.during) if only_over else None)
        up = [view for view in mounts.views if (view.over or not only_over) and mounts.is_up(view)]
        if up:
            try:
                ask(config.control_socket, {"verb": "view", "do": "down", "over": only_over}, _VIEW_ASK_S)
            except PeerUnreachable:
                # Programs may keep a view alive, and nobody else lets go of what is attached in it.
                with contextlib.suppress(HostError, OSError), ViewControl() as control:
                    control.detach_all()
        problems = mounts.down(up)
    kept = "; those beside their folder are in no package's way and stay" if only_over else ""
    print(f"{len(up) - len(problems)} views were taken down{kept}")
    _raise_all(problems)
    return 0


def _raise_all(problems: Sequence[HostError]) -> None:
    """Raise one error for all."""
    if problems:
        hints = dict.fromkeys(error.hint for error in problems if error.hint)
        raise HostError("; ".join(error.message for error in problems), "; ".join(hints))


def _drop_in(options: argparse.Namespace) -> int:
    from .view_mounts import UNIT_NAME, drop_in

    _, mounts = _mounts(options)
    names = [name if "." in name else f"{name}.service" for name in options.units]
    for name in names:
        if not UNIT_NAME.match(name):
            raise UsageError(f"{name} is no unit that runs programs", "for example nginx.service")
    if all(view.over for view in mounts.views):
        raise UsageError(
            "no view beside its folder is configured", "agent.views with `at`; those over their folder all units see"
        )
    text = drop_in(mounts.views)
    if not options.write:
        print(text, end="")
        return 0
    for name in names:
        path = UNITS / f"{name}.d" / "sharearea-view.conf"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise HostError(f"cannot write {path}: {error.strerror}") from None
        print(path)
    print(f"now: systemctl daemon-reload && systemctl restart {' '.join(names)}")
    return 0


def _mib(pages: int) -> str:
    return f"{pages / 256:.1f} MiB"

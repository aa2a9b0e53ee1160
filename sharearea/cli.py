"""The command `sharearea`: the only place of the dom0 side that prints or exits. Exit codes: docs/exit-codes.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .common import __version__
from .common.control import ask
from .common.errors import ConfigError, HostError, NotInTime, PeerUnreachable, ShareareaError, UsageError
from .config import BrokerConfig
from .dashboard.command import add_arguments as add_stats_arguments
from .dashboard.command import run as run_stats
from .dashboard.server import add_arguments as add_dashboard_arguments
from .demo import add_arguments as add_demo_arguments
from .demo import run as run_demo
from .estimate.command import add_arguments as add_estimate_arguments
from .estimate.command import run as run_estimate
from .why import Facts, explain

DEFAULT_CONFIG: Final = Path("/etc/sharearea/broker.toml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except ShareareaError as error:
        print(f"sharearea: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("sharearea: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough: no more of it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharearea",
        description="Keep one copy of each identical file page per host, mapped read-only into every guest.",
        epilog="Sharing is off until a configuration switches it on. See the README for a first walk.",
    )
    parser.add_argument("--version", action="version", version=f"sharearea {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    broker = verb("broker", "run the broker in the foreground", _broker)
    _config_option(broker)
    check = verb("check", "read the configuration, probe this host, say what will work and what not", _check)
    _config_option(check)
    check.add_argument("--json", action="store_true", help="print JSON")
    for name, text, run in (
        ("status", "show what a running broker does", _status),
        ("pools", "show pools: pages, area, savings, overhead", _pools),
        ("domains", "show domains: what they hold, own and dropped", _domains),
        ("files", "show reported files and what of them is shared", _files),
    ):
        sub = verb(name, text, run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        place = sub.add_mutually_exclusive_group()
        place.add_argument("--socket", type=Path, metavar="PATH", help="the broker's status socket")
        _config_option(place)
    top = verb("top", "watch a running broker: pools, domains, savings, refusals", _top)
    top.add_argument(
        "--interval", type=_interval, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )
    top.add_argument("--once", action="store_true", help="print it one time and end")
    why = verb("why", "say what keeps a file or a domain from sharing, and what to do about it", _why)
    why.epilog = (
        "Rules are those of the configuration file. Leases, folders and programs only the guest's agent knows: name "
        "its control socket with --agent where it can be reached, or run sharearea-agent why PATH in the guest."
    )
    why.add_argument(
        "subject", metavar="PATH|DOMAIN", help="a path as domains see it (it has a slash), or a domain's name"
    )
    why.add_argument(
        "--agent", type=Path, metavar="SOCKET", help="control socket of an agent on this host, to be asked too"
    )
    why.add_argument("--json", action="store_true", help="print JSON")
    why.add_argument(
        "--socket", type=Path, metavar="PATH", help="the broker's status socket (default: the configured one)"
    )
    _config_option(why)
    place = top.add_mutually_exclusive_group()
    place.add_argument("--socket", type=Path, metavar="PATH", help="the broker's status socket")
    _config_option(place)
    _add_area(verbs)
    detach = verb("detach", "bring a domain back to its plain files, before it is saved or migrated", _detach)
    detach.add_argument(
        "--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="how long to wait for it (default: 30)"
    )
    reattach = verb("reattach", "let a detached domain share again", _reattach)
    for sub in (detach, reattach):
        sub.add_argument("domain", metavar="DOMAIN", help="its name, as `sharearea domains` shows it")
        sub.add_argument("--pool", metavar="POOL", help="its pool, where several have a domain of this name")
        place = sub.add_mutually_exclusive_group()
        place.add_argument("--socket", type=Path, metavar="PATH", help="the broker's status socket")
        _config_option(place)
    dashboard = verb("dashboard", "show what log files say, as a page on this machine", _dashboard)
    add_dashboard_arguments(dashboard)
    demo = verb("demo", "share real files between real processes on this host and measure what it saves", run_demo)
    add_demo_arguments(demo)
    estimate = verb("estimate", "say what guests would share, from their files, before anything runs", _estimate)
    add_estimate_arguments(estimate)
    add_stats_arguments(
        verb("stats", "answer from log files: what is saved, where, why not more", _stats), _config_option
    )
    return parser


def _add_area(verbs: Any) -> None:
    text = "show and remove the area domains of this Xen host"
    area = verbs.add_parser("area", help=text, description=text[0].upper() + text[1:] + ".")
    words = area.add_subparsers(title="verbs", required=True, metavar="VERB")
    text = "show every area domain: its memory, its grants, and how many of them guests have mapped"
    shown = words.add_parser("list", help=text, description=text[0].upper() + text[1:] + ".")
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.set_defaults(run=_area_list)
    text = "remove an area domain that no guest maps"
    destroyed = words.add_parser(
        "destroy",
        help=text,
        description="Remove an area domain. It is refused as long as a guest maps a page of it.",
    )
    destroyed.add_argument("area", metavar="POOL|UUID", help="whose area, or which")
    destroyed.add_argument(
        "--force",
        action="store_true",
        help="even if guests map pages: they keep those until they let go, and nobody can map anything new",
    )
    destroyed.set_defaults(run=_area_destroy)


def _config_option(parser: Any) -> None:
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help=f"configuration (default: {DEFAULT_CONFIG})"
    )


def _broker(options: argparse.Namespace) -> int:
    # What the other verbs do not need is not imported for them.
    from .broker import Broker
    from .common.logs import EventLog

    config = BrokerConfig.load(options.config)
    file = Path(config.log_file) if config.log_file else None
    broker = Broker(config, EventLog("sharearea", config.log_level, file=file))
    try:
        broker.open()
        broker.run()
    finally:
        broker.close()
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import check_host

    config = BrokerConfig.load(options.config)
    findings = check_host(config)
    if options.json:
        _print_json([{slot: getattr(f, slot) for slot in f.__slots__} for f in findings])
    else:
        marks = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
        for finding in findings:
            print(f"{marks[finding.level]}  {finding.subject}: {finding.text}")
            if finding.remedy:
                print(f"      -> {finding.remedy}")
    return HostError.exit_code if any(finding.level == "fail" for finding in findings) else 0


def _estimate(options: argparse.Namespace) -> int:
    return run_estimate(options, _console())


def _stats(options: argparse.Namespace) -> int:
    return run_stats(options, _console(), Console(stderr=True))


def _ask(options: argparse.Namespace, question: dict[str, Any]) -> dict[str, Any]:
    path = options.socket or BrokerConfig.load(options.config).status_socket
    return ask(path, question)


def _status(options: argparse.Namespace) -> int:
    status = _ask(options, {"verb": "status"})
    if options.json:
        _print_json(status)
        return 0
    console = _console()
    switch = "on" if status["enabled"] else "OFF (enabled = false in the configuration)"
    console.print(
        f"broker pid {status['pid']}, up {status['uptime_ms'] / 1000:.0f} s, {status['cpu_ns'] / 1e9:.2f} s of CPU; "
        f"sharing is {switch}; {status['connections']} connections",
        highlight=False,
        soft_wrap=True,
    )
    if status["log_lines_dropped"]:
        console.print(f"note: {status['log_lines_dropped']} lines of the log could not be written", highlight=False)
    for warning in status["warnings"]:
        console.print(f"note: {warning}", highlight=False, markup=False, soft_wrap=True)
    _print_pools(console, status["pools"])
    return 0


def _pools(options: argparse.Namespace) -> int:
    answer = _ask(options, {"verb": "pools"})
    if options.json:
        _print_json(answer["pools"])
    else:
        _print_pools(_console(), answer["pools"])
    return 0


def _print_pools(console: Console, pools: list[dict[str, Any]]) -> None:
    _print_table(
        console,
        (
            "pool",
            "domains",
            "files",
            "known",
            "possible",
            "in area",
            "mapped",
            "mappings",
            "dropped",
            "area",
            "overhead",
            "net saved",
            "state",
        ),
        (
            (
                pool["pool"],
                str(pool["domains"]),
                str(pool["files"]),
                _pages(pool["known_pages"]),
                _mib(pool["possible_saved_bytes"]),
                _pages(pool["pages_published"]),
                _pages(pool["pages_shared"]),
                _pages(pool["pages_sharing"]),
                _pages(pool["dropped_pages_total"]),
                _mib(pool["area_bytes"]),
                _mib(pool["overhead_bytes"]),
                _mib(pool["net_saved_bytes"]),
                pool["paused"] or ("reports only" if pool["mode"] == "report" else "serving"),
            )
            for pool in pools
        ),
        "no pools: every domain is refused",
    )


def _domains(options: argparse.Namespace) -> int:
    answer = _ask(options, {"verb": "domains"})
    if options.json:
        _print_json(answer["domains"])
        return 0
    _print_table(
        _console(),
        (
            "domain",
            "pool",
            "state",
            "files",
            "file bytes",
            "owned files",
            "mapped",
            "dropped",
            "never read",
            "gave up",
            "pays",
            "net",
            "taken",
            "agent memory",
            "ignored",
        ),
        (
            (
                domain["domain"],
                domain["pool"],
                domain["state"],
                str(domain.get("files", "")),
                _mib(domain.get("file_bytes", 0)),
                str(domain.get("owned_files", "")),
                _pages(domain.get("owned_pages", 0)),
                _pages(domain.get("dropped_pages_total", 0)),
                _pages(domain.get("unread_pages", 0)),
                _mib(domain.get("given_up_bytes") or 0),
                _mib(domain.get("share_bytes", 0)),
                _mib(domain.get("net_bytes", 0)),
                _mib(domain["taken_bytes"]) if "taken_bytes" in domain else "",
                _mib(domain.get("agent_private_bytes", 0)),
                " ".join(f"{code}: {n['files']}" for code, n in domain.get("ignored", {}).items()),
            )
            for domain in answer["domains"]
        ),
        "no domain is connected",
    )
    return 0


def _files(options: argparse.Namespace) -> int:
    files: list[dict[str, Any]] = []
    start: int | None = 0
    while start is not None:
        answer = _ask(options, {"verb": "files", "start": start})
        files += answer["files"]
        start = answer["next"]
    if options.json:
        _print_json(files)
        return 0
    _print_table(
        _console(),
        ("domain", "pages", "in area", "mapped", "holders", "path"),
        (
            (
                file["domain"],
                str(file["pages"]),
                str(file["pages_in_area"]),
                str(file["pages_owned"]),
                str(file["holders"]),
                file["path"],
            )
            for file in files
        ),
        "no file is reported",
    )
    return 0


def _area_list(options: argparse.Namespace) -> int:
    from .area.toolstack import Toolstack
    from .area.xen import survey

    areas = list(survey(Toolstack()))
    if options.json:
        _print_json(
            [
                {
                    "pool": area.domain.pool,
                    "domid": area.domain.domid,
                    "uuid": area.domain.uuid,
                    "memory_bytes": area.domain.memory,
                    "granted": area.granted,
                    "mapped": area.mapped,
                    "table_entries": area.table_entries,
                    "table_max_entries": area.table_max_entries,
                }
                for area in areas
            ]
        )
        return 0
    _print_table(
        _console(),
        ("pool", "domid", "uuid", "memory", "granted", "mapped", "entries", "at most"),
        (
            (
                area.domain.pool or "",
                str(area.domain.domid),
                area.domain.uuid,
                _mib(area.domain.memory),
                str(area.granted),
                str(area.mapped),
                str(area.table_entries),
                str(area.table_max_entries),
            )
            for area in areas
        ),
        "no area domain",
    )
    return 0


def _area_destroy(options: argparse.Namespace) -> int:
    from .area.toolstack import Toolstack
    from .area.xen import remove

    print(remove(Toolstack(), options.area, options.force))
    return 0


def _dashboard(options: argparse.Namespace) -> int:
    from .dashboard.server import run

    return run(options, lambda line: print(line, flush=True))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return seconds


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 0.1:
        raise argparse.ArgumentTypeError("looking costs the broker time: 0.1 seconds at least")
    return seconds


def _top(options: argparse.Namespace) -> int:
    from .top import once, watch

    path = options.socket or BrokerConfig.load(options.config).status_socket

    def asking(question: dict[str, Any]) -> dict[str, Any]:
        return ask(path, question)

    if options.once:
        once(asking, _console(), time.monotonic())
    else:
        watch(asking, _console(), options.interval, time.monotonic)
    return 0


def _why(options: argparse.Namespace) -> int:
    facts = _facts(options)
    findings = explain(facts)
    shared = any(finding.code == "shared" for finding in findings)
    if options.json:
        rows = [
            {slot: getattr(finding, slot) for slot in ("code", "who", "where", "meaning", "remedy")}
            for finding in findings
        ]
        _print_json({"subject": facts.subject, "shared": shared, "findings": rows})
        return 0
    for finding in findings:
        who = f"{finding.who}: " if finding.who else ""
        print(f"{who}{finding.code}: {finding.meaning}")
        if finding.where:
            print(f"    {finding.where}")
        if not finding.remedy.startswith("nothing") or not shared:
            print(f"    -> {finding.remedy}")
    return 0


def _facts(options: argparse.Namespace) -> Facts:
    """Ask broker, agent and configuration; what one of them cannot say is left out."""
    subject: str = options.subject
    is_path = "/" in subject
    if is_path:
        subject = os.path.abspath(subject)
    config, config_error = None, ""
    try:
        config = BrokerConfig.load(options.config)
    except ConfigError as error:
        if options.socket is None:
            raise
        config_error = error.message
    path = options.socket or (config.status_socket if config is not None else None)
    assert path is not None  # or there was an error
    found: dict[str, Any] = {}
    agent: dict[str, Any] = {}
    if options.agent is not None and is_path:
        try:
            agent["agent"] = ask(options.agent, {"verb": "file", "path": subject})
            reported = agent["agent"]["reported_path"]
        except PeerUnreachable as error:
            agent["agent_error"], reported = error.message, subject
    else:
        reported = subject
    try:
        found["status"] = ask(path, {"verb": "status"})
        answer = ask(path, {"verb": "domains"})
        found |= {"domains": answer["domains"], "refused": answer["refused"]}
        if is_path:
            found["files"] = list(_files_at(path, reported))
    except PeerUnreachable as error:
        found = {"broker_error": error.message}
    size = None
    if is_path:
        with contextlib.suppress(OSError):
            size = os.stat(subject).st_size if os.path.isfile(subject) else None
    return Facts(reported, config, config_error, local_size=size, **found, **agent)


def _files_at(socket: Path, path: str) -> Iterator[dict[str, Any]]:
    start: int | None = 0
    while start is not None:
        answer = ask(socket, {"verb": "files", "start": start, "path": path})
        yield from answer["files"]
        start = answer["next"]


def _detach(options: argparse.Namespace) -> int:
    console = _console()
    end = time.monotonic() + options.timeout
    question = {"domain": options.domain, "pool": options.pool}
    holding = _ask(options, {"verb": "detach", **question})
    question["pool"] = holding["pool"]
    total = left = holding["held_pages"]
    console.print(f"{options.domain}: asked to let go of {total} pages ({_pages(total)})", markup=False)
    if not holding["connected"]:
        console.print(f"{options.domain}: no agent is connected; its grants end with its grace time", markup=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("letting go", total=total)
        taken, linked = holding.get("taken_bytes", 0), holding["linked"]
        while (left or taken or linked) and time.monotonic() < end:
            time.sleep(0.1)
            left, taken, linked = _held(options, question)
            progress.update(bar, total=max(total, left), completed=max(total, left) - left)
    if taken and not left:
        raise NotInTime(
            f"{options.domain} holds nothing any more, but {_mib(taken)} of its memory were not given back within "
            f"{options.timeout:g} s: saved now, it would be restored without them",
            "look for memory.failed in the broker's log, and run this again",
        )
    if linked and not left:
        raise NotInTime(
            f"{options.domain} holds nothing any more, but its agent has not taken its rings away within "
            f"{options.timeout:g} s: saved now, the agent would be killed in the restored guest",
            "run this again; if that does not help, end the agent in the domain before you save it. If none runs, "
            "one that was killed leaves its offer behind, which is harmless, and goes with `xenstore-rm "
            f"/local/domain/{holding['domid']}/data/sharearea/event-channel`",
        )
    if left:
        raise NotInTime(
            f"{options.domain} still holds {left} pages ({_pages(left)}) after {options.timeout:g} s: do not save it",
            "it stays detached; run this again to wait on, and look at `sharearea-agent status` in the domain",
        )
    console.print(
        f"{options.domain} is detached: it holds nothing of the area; `sharearea reattach {options.domain}` ends that",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _held(options: argparse.Namespace, question: dict[str, Any]) -> tuple[int, int, bool]:
    """Return how many pages a domain holds, how much memory is taken from it, and whether its agent has rings."""
    try:
        holding = _ask(options, {"verb": "holding", **question})
    except ShareareaError as error:
        if error.exit_code != UsageError.exit_code:
            raise
        return 0, 0, False  # it has vanished
    return holding["held_pages"], holding.get("taken_bytes", 0), holding["linked"]


def _reattach(options: argparse.Namespace) -> int:
    _ask(options, {"verb": "reattach", "domain": options.domain, "pool": options.pool})
    _console().print(f"{options.domain} may share again", markup=False)
    return 0


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}M"


def _pages(pages: int) -> str:
    return _mib(pages * 4096)


class _Console(Console):
    """A console that says so when its reader has gone: rich's own would end the process with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Leave it to main()."""
        raise BrokenPipeError


def _console() -> Console:
    """Return a console; what is not a terminal has lines as long as they get."""
    return _Console(highlight=False, width=None if sys.stdout.isatty() else 4096)


def _print_table(console: Console, columns: Sequence[str], rows: Any, nothing: str) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for at, column in enumerate(columns):
        left = at == 0 or column in ("pool", "state", "path", "ignored")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    empty = True
    for row in rows:
        empty = False
        table.add_row(*(escape(cell) for cell in row))
    if empty:
        console.print(nothing)
    else:
        console.print(table)
        if "area" in columns:
            console.print("sizes in MiB; mapped, mappings: pages of the area; dropped: left the page cache, in all")
        if "gave up" in columns:
            console.print(
                "sizes in MiB; gave up: own copies dropped of what is mapped; pays: part of the area's cost; net: the "
                "difference; taken: memory target lowered by"
            )


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))

"""`sharearea dashboard`: serves the page on this machine until it is interrupted."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ..common.errors import HostError, UsageError

PORT: Final = 8420
LOGS: Final = ("/var/log/sharearea/*.log*", "/var/log/sharearea-agent/*.log*")
_THREADS: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the dashboard's options to its verb."""
    parser.add_argument(
        "--logs",
        nargs="+",
        action="extend",
        metavar="GLOB",
        help=f"log files of the broker and of agents; quote globs (default: {' '.join(LOGS)})",
    )
    parser.add_argument("--port", type=_port, default=PORT, help=f"port; 0: any that is free (default: {PORT})")
    parser.add_argument(
        "--every",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="how often the page asks for what is new (default: 3)",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="root folder of a guest, whose dpkg or rpm database says which package a file is of (default: /)",
    )
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--allow-remote",
        action="store_true",
        help="allow an --address that other machines reach; there is no password, everybody there reads the logs",
    )


def run(options: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Serve until interrupted. `say`: what prints a line. Raises UsageError and HostError with what to do."""
    local = _loopback(options.address)
    if not local and not options.allow_remote:
        raise UsageError(
            f"{options.address} can be reached from other machines, and there is no password",
            "leave --address out (and use ssh -L 8420:127.0.0.1:8420 from elsewhere), or add --allow-remote",
        )
    try:
        import dash  # noqa: F401
        import duckdb  # noqa: F401
        import waitress.server
    except ImportError as error:
        raise HostError(
            f"the dashboard needs {error.name}, which is not installed", "pip install 'sharearea[dashboard]' brings it"
        ) from None
    from .page import make_app
    from .snapshot import Source

    source = Source(options.logs or LOGS, options.root)
    sock = _bound(options.address, options.port)
    try:
        host, port = sock.getsockname()[:2]
        # Who is let in from elsewhere comes by names that we cannot know.
        names = [host, "localhost", "127.0.0.1", "::1"] if local else []
        app = make_app(source, names, options.every)
        server: Any = waitress.server.create_server(app.server, sockets=[sock], threads=_THREADS, ident=None)
        say(f"dashboard: http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)")
        # A page asks several things at once, of which we answer one at a time: that is no news.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        # Service managers end us the way that people do.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.run()  # returns when interrupted
        server.close()
    finally:
        sock.close()
        source.close()
    say("dashboard: ended")
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return seconds


def _loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise UsageError(f"--address: {address!r} is not an IP address", "leave it out for 127.0.0.1") from None


def _bound(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(64)
    except OSError as error:
        sock.close()
        hint = {
            errno.EADDRINUSE: "end who has it, or choose another with --port (0: any that is free)",
            errno.EACCES: "ports below 1024 are root's: choose another with --port",
        }.get(error.errno or 0, "check --address and --port")
        raise HostError(f"cannot listen on {address} port {port}: {error.strerror}", hint) from None
    return sock

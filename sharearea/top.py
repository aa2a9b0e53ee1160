"""The verb `top`: what a running broker shares, live in the terminal, from its status socket.

`View` turns two looks at the broker into what is shown, and is pure; `watch` looks again and again until q or Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .common.errors import PeerUnreachable, UsageError
from .common.wire import PAGE_SIZE
from .estimate.text import size_text

Ask = Callable[[dict[str, Any]], dict[str, Any]]

_MOST_REFUSED: Final = 3
_RATES: Final = ("published_pages_total", "granted_pages_total", "dropped_pages_total")


@dataclass(frozen=True, slots=True)
class Look:
    """What the broker said at a moment (seconds of a clock that does not jump)."""

    at: float
    status: Mapping[str, Any]
    domains: Sequence[Mapping[str, Any]]
    refused: Sequence[Mapping[str, Any]]


def look(ask: Ask, now: float) -> Look:
    """Ask the broker. Raises PeerUnreachable."""
    answer = ask({"verb": "domains"})
    return Look(now, ask({"verb": "status"}), answer["domains"], answer["refused"])


@dataclass(frozen=True, slots=True)
class View:
    """What is shown: the last look, the one before for rates, and why there is no newer one."""

    last: Look
    before: Look | None = None
    trouble: str = ""

    def rate(self, pool: str, counter: str) -> float | None:
        """Return how many pages a second a pool's counter grew; None before there are two looks at one broker."""
        if self.before is None or self.before.status["pid"] != self.last.status["pid"]:
            return None
        now, then = (self._counter(each, pool, counter) for each in (self.last, self.before))
        seconds = self.last.at - self.before.at
        if now is None or then is None or seconds <= 0:
            return None
        return max(0, now - then) / seconds

    @staticmethod
    def _counter(look: Look, pool: str, counter: str) -> int | None:
        for each in look.status["pools"]:
            if each["pool"] == pool:
                value: int = each[counter]
                return value
        return None

    def rows(self, height: int) -> RenderableType:
        """Return all of it, cut to so many lines of a terminal."""
        parts: list[RenderableType] = [self._head(), Text(), self._pools(), Text()]
        foot = self._foot()
        left = height - 6 - len(self.last.status["pools"]) - len(foot)
        parts.append(self._domains(max(3, left)))
        return Group(*parts, Text(), *foot)

    def _head(self) -> RenderableType:
        status = self.last.status
        host = status["host"]
        switch = "" if status["enabled"] else "  SHARING IS OFF"
        lines = [
            f"broker {status['pid']}  up {_time(status['uptime_ms'] / 1000)}  CPU {_time(status['cpu_ns'] / 1e9)}  "
            f"{status['backend']}  {status['connections']} connections{switch}",
            f"saved {_size(host['saved_bytes'])}  net {_size(host['net_saved_bytes'])}  "
            f"possible {_size(host['possible_saved_bytes'])}  area {_size(host['area_bytes'])}  "
            f"overhead {_size(host['overhead_bytes'])}",
        ]
        found: list[RenderableType] = [Text(lines[0], no_wrap=True, overflow="ellipsis")]
        found.append(Text(lines[1], style="bold", no_wrap=True, overflow="ellipsis"))
        if self.trouble:
            found.append(Text(f"trying again: {self.trouble}", style="red", no_wrap=True, overflow="ellipsis"))
        return Group(*found)

    def _pools(self) -> Table:
        table = _table("pool", "domains", "saved", "net", "area", "full", "grants", "in/s", "out/s", "state")
        for pool in self.last.status["pools"]:
            name = pool["pool"]
            grants = pool.get("grants_max")
            state = pool["paused"] or ("reports only" if pool["mode"] == "report" else "serving")
            table.add_row(
                escape(name),
                str(pool["domains"]),
                _size(pool["saved_bytes"]),
                _size(pool["net_saved_bytes"]),
                _size(pool["area_bytes"]),
                f"{100 * pool['area_fill_ratio']:.0f}%",
                f"{100 * pool['grants_used'] / grants:.0f}%" if grants else "-",
                self._flow(name, "published_pages_total"),
                self._flow(name, "dropped_pages_total"),
                Text(state, style="red" if pool["paused"] else ""),
            )
        if not self.last.status["pools"]:
            table.add_row("no pools: every domain is refused")
        return table

    def _flow(self, pool: str, counter: str) -> str:
        rate = self.rate(pool, counter)
        return _size(int(rate * PAGE_SIZE)) if rate is not None else "-"

    def _domains(self, most: int) -> RenderableType:
        table = _table("domain", "pool", "files", "mapped", "gave up", "pays", "net", "ignored", "state")
        domains = sorted(self.last.domains, key=lambda domain: (-(domain.get("net_bytes") or 0), domain["domain"]))
        for domain in domains[:most]:
            table.add_row(
                escape(domain["domain"]),
                escape(domain["pool"]),
                str(domain.get("files", "-")),
                _size(domain.get("owned_pages", 0) * PAGE_SIZE),
                _size(domain.get("given_up_bytes") or 0),
                _size(domain.get("share_bytes", 0)),
                _size(domain.get("net_bytes", 0)),
                str(domain.get("ignored_files", "-")),
                "detached" if domain.get("detached") else domain["state"],
            )
        if not domains:
            return Text("no domain is connected")
        if len(domains) > most:
            return Group(table, Text(f"and {len(domains) - most} more: sharearea domains"))
        return table

    def _foot(self) -> list[RenderableType]:
        sums: dict[str, list[int]] = {}
        for domain in self.last.domains:
            for code, counted in domain.get("ignored", {}).items():
                entry = sums.setdefault(code, [0, 0])
                entry[0] += counted["files"]
                entry[1] += counted["bytes"]
        found: list[RenderableType] = []
        if sums:
            ordered = sorted(sums.items(), key=lambda item: -item[1][1])
            said = "  ".join(f"{code} {files} ({_size(size)})" for code, (files, size) in ordered)
            found.append(Text(f"not taken: {said}", no_wrap=True, overflow="ellipsis"))
        for refused in list(self.last.refused)[: -_MOST_REFUSED - 1 : -1]:
            said = f"turned away: {refused['domain']}: {refused['reason']}, {_time(refused['ago_ms'] / 1000)} ago"
            found.append(Text(said, style="yellow", no_wrap=True, overflow="ellipsis"))
        return found


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        left = title in ("pool", "domain", "state")
        table.add_column(title, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    return table


def _size(value: int) -> str:
    """Return a size in as few characters as there can be, which may be below 0."""
    text = size_text(abs(value)).replace("iB", "").replace(" ", "").replace(".0", "").replace(",", "")
    return f"-{text}" if value < 0 else text


def _time(seconds: float) -> str:
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def once(ask: Ask, console: Console, now: float) -> None:
    """Show it once, all of it. Raises PeerUnreachable."""
    console.print(View(look(ask, now)).rows(1 << 20))


def watch(ask: Ask, console: Console, interval: float, clock: Callable[[], float]) -> None:
    """Show it until q is pressed. Raises PeerUnreachable if nobody answers at the start; later it goes on trying."""
    if not console.is_terminal or not sys.stdin.isatty():
        raise UsageError("top needs a terminal", "--once prints it one time, sharearea status --json is for programs")
    view = View(look(ask, clock()))
    with _keys() as key, Live(view.rows(console.height), console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view.rows(console.height), refresh=True)
            if key(interval) in ("q", "Q", "\x04"):
                return
            try:
                view = View(look(ask, clock()), view.last)
            except PeerUnreachable as error:
                view = View(view.last, None, error.message)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give what waits for a key so many seconds; the terminal is as before afterwards."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def key(seconds: float) -> str:
        ready, _, _ = select.select([fd], [], [], seconds)
        return os.read(fd, 1).decode("latin-1") or "q" if ready else ""

    try:
        tty.setcbreak(fd)
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

"""How long `sharearea stats` takes on logs of ten million lines, and how much memory: cold, and when it knows them.

The lines are those of a host with 32 domains that are busy: figures on a timer, gathered events every 10 s, of broker
and agents in one file. The real EventLog writes one of each kind; the others differ in times and numbers.
Every question runs in a process of its own, as a user would ask it. The log is in the page cache.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sharearea.common.events import EVENTS, FIELDS
from sharearea.common.logs import EventLog

from .host import ROOT
from .report import Samples, Tell

DOMAINS: Final = 32
FILES: Final = 100
_START: Final = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
_HOLE: Final = 987_654_321  # a number that is nothing else, where a template has another one each time
_STEP_S: Final = 10

QUESTIONS: Final[dict[str, tuple[str, ...]]] = {
    "overview": (),
    "by pool": ("--by", "pool"),
    "by reason": ("--by", "reason"),
    "by domain": ("--by", "domain"),
    "by package": ("--by", "package"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many lines, and how often each question is asked again."""

    lines: int = 10_000_000
    rounds: int = 3


QUICK = Sizes(200_000, 2)


class _Template:
    """A line with holes for its time, its number and one figure."""

    def __init__(self, event: str, **fields: Any) -> None:
        stream = io.StringIO()
        kind = EVENTS[event]
        draw = random.Random(event)
        given: dict[str, Any] = {}
        for name in kind.fields:
            type_ = FIELDS[name].type
            given[name] = {
                "integer": draw.randrange(1 << 30),
                "number": 0.25,
                "string": "x",
                "boolean": False,
                "strings": ["/usr/lib/x86_64-linux-gnu/libexample.so.1", "/usr/bin/example"],
            }[type_]
        given |= fields
        if kind.reasons and "reason" in kind.fields:
            given["reason"] = fields.get("reason", kind.reasons[0])
        varied = next((name for name in ("saved_bytes", "given_up_bytes", "pages", "files") if name in given), None)
        if varied is not None:
            given[varied] = _HOLE
        service = "sharearea" if "broker" in kind.programs else "sharearea-agent"
        EventLog(service, "debug", stream).event(event, **given)
        line = json.loads(stream.getvalue())
        line |= {"@timestamp": "\0", "host.name": "dom0", "event.sequence": _HOLE + 1, "process.pid": 1000}
        text = json.dumps(line).replace("%", "%%")
        text = text.replace(json.dumps("\0"), '"%(time)s"').replace(str(_HOLE + 1), "%(number)d")
        self._text = text.replace(str(_HOLE), "%(figure)d") + "\n"

    def line(self, when: str, number: int, figure: int) -> str:
        return self._text % {"time": when, "number": number, "figure": figure}


def write_lines(path: Path, count: int) -> None:
    """Write a log of so many lines."""
    number = 0
    with path.open("w", buffering=1 << 22) as file:
        for second, templates in _seconds():
            when = (_START + datetime.timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            templates = templates[: count - number]
            file.write("".join(t.line(when, number + at, (second + at) << 12) for at, t in enumerate(templates, 1)))
            number += len(templates)
            if number >= count:
                return


def _seconds() -> Iterator[tuple[int, list[_Template]]]:
    """Yield steps of time and what is said in each."""
    names = [f"guest-{n}" for n in range(DOMAINS)]

    def each(event: str, some: list[str], **fields: Any) -> list[_Template]:
        return [_Template(event, domain=name, pool="office", **fields) for name in some]

    busy = [
        *each("pages.granted", names[:24]),
        *each("files.shared", names[:24]),
        *each("pages.released", names[:24]),
        *each("pages.published", names[:4]),
        *each("files.returned", names[:10]),
        *each("files.plain", names[:8], reason="not-offered"),
        *each("files.refused", names[:2], reason="excluded", stage="report"),
    ]
    figures = [
        _Template("pool.statistics", pool="office", mode="share", domains=DOMAINS),
        *each("domain.statistics", names, state="connected"),
        _Template("invariants.checked", pool="office"),
        _Template("host.statistics", domains=DOMAINS, backend="local"),
        *each("scan.finished", names[:16]),
    ]
    ranking = [
        _Template("file.statistics", pool="office", rank=n, path=f"/usr/lib/x86_64-linux-gnu/libexample-{n}.so")
        for n in range(1, FILES + 1)
    ]
    yield 0, [_Template("broker.started"), *each("domain.joined", names)]
    second = 0
    while True:
        second += _STEP_S
        said = list(busy)
        if second % 60 == 0:
            said += figures
        if second % 600 == 0:
            said += ranking
        yield second, said


def run(sizes: Sizes, work: Path, tell: Tell) -> Samples:
    """Measure each question on a log that nothing is known of, then again and again."""
    found = Samples("stats")
    folder = work / "stats"
    folder.mkdir()
    log = folder / "all.log"
    try:
        tell(f"writing {sizes.lines:,} lines")
        write_lines(log, sizes.lines)
        found.notes.append(f"{sizes.lines:,} lines, {log.stat().st_size / 1e9:.1f} GB, {os.cpu_count()} processors")
        for name, words in QUESTIONS.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for round_ in range(sizes.rounds + 1):
                state = "again" if round_ else "cold"
                tell(f"{name}, {state}")
                found.add(f"{name}, {state}", **_ask(log, folder / "cache", words))
        shutil.rmtree(folder / "cache", ignore_errors=True)
        tell("last hour, cold")
        since = _last_time(log) - datetime.timedelta(hours=1)
        found.add("last hour, cold", **_ask(log, folder / "cache", ("--since", since.isoformat())))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found.notes.append("memory_bytes: the largest resident set; cpu_s: processor time of the whole process")
    return found


def _last_time(log: Path) -> datetime.datetime:
    with log.open("rb") as file:
        file.seek(-65_536, os.SEEK_END)
        line = json.loads(file.read().splitlines()[-1])
    return datetime.datetime.fromisoformat(line["@timestamp"])


def _ask(log: Path, cache: Path, words: tuple[str, ...]) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.asking", "stats", "--logs", str(log), "--json", *words]
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    elapsed = time.monotonic() - begun
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "time_s": elapsed,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "memory_bytes": usage.ru_maxrss * 1024.0,
    }


if __name__ == "__main__":
    from sharearea.cli import main

    sys.exit(main(sys.argv[1:]))

"""One run: the stages in their order, how long each took, the numbers that they found, and the verdict.

A stage is a function that raises if a promise is not kept; those that follow it have nothing to stand on, so the first
failure ends the run. The verdict is not this process's alone: after the last stage dom0 itself is told to end QEMU with
one distinct exit code (lab.PASSED), so that whatever dies quietly on the way, here or inside, is not a pass.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from .channel import PATIENCE
from .images import FOLDER, build
from .lab import PASSED, Lab, LabError

RESULTS: Final = FOLDER / "results.json"
LIMIT_S: Final = 600.0 * PATIENCE
"""For everything after the images are built: what `make test-xen` may take."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A named step, and the seconds after which it counts as failed."""

    name: str
    limit: float
    what: str
    do: Callable[[Run], None]


STAGES: Final[list[Stage]] = []


def stage(limit: float) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Make a function the next stage. Its name is the stage's, its docstring says what is shown."""

    def add(do: Callable[[Run], None]) -> Callable[[Run], None]:
        STAGES.append(Stage(do.__name__.replace("_", "-"), limit, (do.__doc__ or "").strip().splitlines()[0], do))
        return do

    return add


class Run:
    """What stages share: the lab, what is known of guests, and the numbers that go to the results."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.lab = Lab(say)
        self.numbers: dict[str, Any] = {}
        self.about: dict[str, Any] = {}
        """What one stage leaves for the next."""

    def number(self, name: str, value: float | str | Sequence[float]) -> None:
        """Keep a number for build/xen/results.json, and say it."""
        self.numbers[name] = value
        self.say(f"  {name} = {value}")


def perform(
    stages: Sequence[Stage],
    say: Say,
    *,
    stay: bool = False,
    results_path: Path = RESULTS,
    limit_s: float = LIMIT_S / PATIENCE,
    kernels: Mapping[str, Path] | None = None,
    systemd: bool = False,
) -> tuple[int, int]:
    """Run stages on a fresh host; write the results; return how many passed and failed. `stay`: leave a failure up.

    `kernels`: other kernels for guests, by their kind; `systemd`: a disk of a guest with it (both: images.build).
    """
    limit = limit_s * PATIENCE
    begun = time.monotonic()
    images = build(say, kernels, systemd=systemd)
    built = time.monotonic() - begun
    results: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"kernel": platform.release(), "python": platform.python_version()},
        "images_s": round(built, 1),
        "passed": False,
        "stages": [],
        "numbers": {},
    }
    begun = time.monotonic()
    done: list[str] = []
    run = Run(say)
    kept = False
    try:
        with _limit(limit, "the run"):
            run.lab.start(images, stay=stay)
            results["boot_s"] = round(time.monotonic() - begun, 1)
            for number, step in enumerate(stages, 1):
                say(f"[{number}/{len(stages)}] {step.name}: {step.what}")
                at, cpu = time.monotonic(), run.lab.cpu_seconds()
                _do(step, run, at + step.limit * PATIENCE, begun + limit)
                seconds = round(time.monotonic() - at, 1)
                cpu = round(run.lab.cpu_seconds() - cpu, 1)
                results["stages"].append({"name": step.name, "seconds": seconds, "cpu_s": cpu})
                done.append(step.name)
                say(f"{step.name}: passed in {seconds} s ({cpu} s of CPU), {time.monotonic() - begun:.0f} s in all")
            code = run.lab.finish()
            if code != PASSED:
                raise LabError(f"all stages passed, but QEMU ended with {code} and not with {PASSED}")
        results["passed"] = True
    except (Exception, KeyboardInterrupt) as error:
        say("".join(traceback.format_exception(error)))
        where = stages[len(done)].name if len(done) < len(stages) else "end"
        results["failed"] = where
        say(f"{where}: failed: {error}")
        run.lab.keep_logs()
        for path in run.about.get("logs", []):
            _keep(run, *path)
        say(f"logs are in {FOLDER}")
        kept = stay
        if stay:
            say("the host stays up: python -m tests.xen.lab d0|guest|down")
    finally:
        if not kept:
            run.lab.stop()
        results["seconds"] = round(time.monotonic() - begun, 1)
        results["numbers"] = run.numbers
        results_path.write_text(json.dumps(results, indent=2) + "\n")
    failed = 0 if results["passed"] else max(1, len(stages) - len(done))
    return len(done), failed


def _do(step: Stage, run: Run, *deadlines: float) -> None:
    with _limit(min(deadlines) - time.monotonic(), step.name):
        step.do(run)


def _keep(run: Run, machine: str, path: str, name: str) -> None:
    """Copy a log out of a machine, as far as it still answers."""
    with contextlib.suppress(Exception):
        where = run.lab.dom0 if machine == "dom0" else run.lab.guest(machine)
        (FOLDER / Path(name).name).write_bytes(where.get(path, timeout=20))


@contextlib.contextmanager
def _limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in here after so many seconds. Limits nest: the one that ends first counts."""

    def over(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"{what} has taken more than its {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    begun = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - begun)) if left else 0)

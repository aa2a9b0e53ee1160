"""End to end: time and CPU until 94 % of what can be shared is shared, beside KSM on the same bytes in the same run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sharearea.common.errors import HostError

from . import ksm
from .dataset import DataSet, remove
from .fleet import fleet
from .host import cpu_share
from .report import Samples, Tell

TARGET_RATIO: Final = 0.94  # what Satori (ATC 2009) reached of the possible sharing
COLD: Final = "sharearea"
WARM: Final = "sharearea, second start"
AGGRESSIVE: Final = "KSM aggressive"
DEFAULT: Final = "KSM default"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. `groups`: those of the data set."""

    groups: tuple[str, ...]
    rounds: int = 3
    limit_s: float = 120.0
    aggressive_limit_s: float = 180.0
    default_limit_s: float = 200.0
    steady_s: float = 5.0
    ksm: bool = True


def run(sizes: Sizes, data: DataSet, work: Path, tell: Tell) -> Samples:
    """Measure both in turns, each time with fresh processes."""
    found = Samples("sharing")
    why = ksm.lacking() if sizes.ksm else "not asked for"
    if why is None:
        try:
            with ksm.Ksm(work) as merging:
                _rounds(found, sizes, data, work, merging, tell)
        except HostError as error:
            why = error.message
    if why is not None:
        for case in (AGGRESSIVE, DEFAULT):
            found.skip(case, why)
        if not found.samples:
            _rounds(found, sizes, data, work, None, tell)
    for case in (COLD, WARM):
        ratio = f"{case} / {AGGRESSIVE}"
        found.ratio(ratio, "time_ratio", (case, "time_s"), (AGGRESSIVE, "time_s"))
        found.ratio(ratio, "cpu_ratio", (case, "cpu_s"), (AGGRESSIVE, "cpu_s"))
        found.ratio(ratio, "cpu_beyond_start_ratio", (case, "cpu_beyond_start_s"), (AGGRESSIVE, "cpu_s"))
    return found


def _rounds(found: Samples, sizes: Sizes, data: DataSet, work: Path, merging: ksm.Ksm | None, tell: Tell) -> None:
    aggressive = ksm.Pace("aggressive", 100_000, 0, sizes.aggressive_limit_s, sizes.steady_s)
    default = ksm.Pace("default", 100, 20, sizes.default_limit_s, sizes.steady_s)
    for round_ in range(sizes.rounds):
        now = f"round {round_ + 1} of {sizes.rounds}"
        folder = work / f"sharing-{round_}"
        start = _start_cpu(data, folder / "start", _under(tell, f"{now}: start"))
        for case in (COLD, WARM):
            _share(found, case, start, sizes, data, folder, _under(tell, f"{now}: {case}"))
        remove(folder)
        if merging is not None:
            _merge(found, AGGRESSIVE, merging, sizes, data, work, aggressive, _under(tell, now))
    if merging is not None:
        _merge(found, DEFAULT, merging, sizes, data, work, default, tell)


def _under(tell: Tell, heading: str) -> Tell:
    return lambda text: tell(f"{heading}: {text}")


def _start_cpu(data: DataSet, folder: Path, tell: Tell) -> float:
    """Return the CPU seconds of the same processes when there is nothing to share."""
    tell("nothing to share")
    with fleet(folder, data, ()) as one:
        one.prepare()
        one.start()
        one.wait_idle()
        return one.cpu().total


def _share(found: Samples, case: str, start_cpu: float, sizes: Sizes, data: DataSet, folder: Path, tell: Tell) -> None:
    tell("starting")
    with fleet(folder, data, sizes.groups) as one:
        one.prepare()
        begun = time.monotonic()
        one.start()
        one.wait_for(TARGET_RATIO, sizes.limit_s, tell)
        elapsed = time.monotonic() - begun
        cpu = one.cpu()
        tell("settling")
        one.settle(20.0)
        final = one.saved_bytes() / data.shareable_bytes(sizes.groups)
        settled = one.cpu()
        tell("going on")
        steady = cpu_share([one.broker, *one.agents, *one.consumers], sizes.steady_s)
        tell("verifying")
        verified, mismatched = one.verify()
    if mismatched or not verified:
        raise HostError(f"{mismatched} bytes differ of {verified + mismatched}")
    found.add(
        case,
        time_s=elapsed,
        cpu_s=cpu.total,
        cpu_broker_s=cpu.broker,
        cpu_agents_s=cpu.agents,
        cpu_consumers_s=cpu.consumers,
        cpu_start_s=start_cpu,
        cpu_beyond_start_s=cpu.total - start_cpu,
        cpu_settled_s=settled.total,
        steady_cpu_ratio=steady,
        saved_ratio=final,
    )


def _merge(
    found: Samples,
    case: str,
    merging: ksm.Ksm,
    sizes: Sizes,
    data: DataSet,
    work: Path,
    pace: ksm.Pace,
    tell: Tell,
) -> None:
    reached = ksm.measure(merging, work, data, sizes.groups, TARGET_RATIO, pace, tell)
    found.add(case, cpu_s=reached.cpu_s, steady_cpu_ratio=reached.steady_ratio, saved_ratio=reached.ratio)
    if reached.seconds is not None:
        found.add(case, time_s=reached.seconds)
    if len(reached.curve) > 1 or reached.seconds is None:
        steps = ", ".join(f"{ratio:.0%} after {seconds:.0f} s" for seconds, ratio in reached.curve)
        found.notes.append(f"{case}: {steps}")

"""What sharing costs in memory: private memory of broker and agents, store, caches, table; by shared GiB and by page.

Two sizes of the same data, so that what is always there and what grows are told apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sharearea.common.errors import HostError
from sharearea.common.wire import PAGE_SIZE

from .dataset import DataSet, Domain, remove
from .fleet import Fleet, fleet
from .footprint import AGENT_MODULES
from .host import GIB, ROOT, Memory, cached_file_bytes, cpu_s, cpu_share, memory_of, status_of
from .report import Samples, Tell

IDLE: Final = "idle"
SLOPE: Final = "per shared GiB"
PAGE: Final = "per page"
IMPORTS: Final = "agent imports"
TARGET_RATIO: Final = 0.94


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: groups of the data set for the smaller and for the larger size."""

    small: tuple[str, ...]
    large: tuple[str, ...]
    limit_s: float = 120.0
    idle_s: float = 3.0


@dataclass(frozen=True, slots=True)
class _Costs:
    """Bytes, by what they are spent on; `agent` and `consumer`: the mean of all."""

    broker: Memory
    agent: Memory
    consumer: Memory
    cache: float  # of one agent: the database file
    cache_resident: float
    store: int
    store_resident: int
    table: int
    area: int
    pages: int  # that the broker tracks
    domain_pages: int  # that one agent tracks
    common_bytes: int  # that are shared, counted once

    def named(self) -> dict[str, float]:
        return {
            "broker_private": self.broker.own,
            "agent_private": self.agent.own,
            "consumer_private": self.consumer.own,
            "agent_cache_file": self.cache,
            "agent_cache_resident": self.cache_resident,
            "store_file": self.store,
            "store_resident": self.store_resident,
            "table": self.table,
        }


def run(sizes: Sizes, data: DataSet, work: Path, tell: Tell) -> Samples:
    """Measure an idle pair, then both sizes."""
    found = Samples("memory")
    _idle(found, sizes, work / "memory-idle", tell)
    _imports(found, tell)
    small = _costs(sizes.small, sizes.limit_s, data, work / "memory-small", tell)
    large = _costs(sizes.large, sizes.limit_s, data, work / "memory-large", tell)
    for costs in (small, large):
        case = f"{costs.common_bytes / GIB:.3f} GiB shared by {len(data.domains)} domains"
        found.add(case, **{f"{name}_bytes": value for name, value in costs.named().items()})
        found.add(case, area_bytes=costs.area, broker_maps_area_bytes=costs.broker.area)
        everything = (
            costs.broker.own + costs.store_resident + len(data.domains) * (costs.agent.own + costs.cache_resident)
        )
        saved = (len(data.domains) - 1) * costs.common_bytes
        found.add(case, overhead_bytes=everything, overhead_of_saved_ratio=everything / saved)
    grown = (large.common_bytes - small.common_bytes) / GIB
    before = small.named()
    found.add(
        SLOPE, **{f"{name}_bytes_per_gib": (value - before[name]) / grown for name, value in large.named().items()}
    )
    tracked, own = large.pages - small.pages, large.domain_pages - small.domain_pages
    found.add(
        PAGE,
        broker_private_bytes_per_page=(large.broker.own - small.broker.own) / tracked,
        table_bytes_per_page=(large.table - small.table) / tracked,
        store_bytes_per_page=(large.store - small.store) / tracked,
        agent_private_bytes_per_page=(large.agent.own - small.agent.own) / own,
        agent_cache_bytes_per_page=(large.cache - small.cache) / own,
    )
    return found


def _idle(found: Samples, sizes: Sizes, folder: Path, tell: Tell) -> None:
    """Measure a broker and an agent whose folder is empty."""
    tell("an idle broker and an idle agent")
    folder.mkdir()
    domain = Domain("bench-1", folder / "bench-1", {"none": []})
    (domain.root / "none").mkdir(parents=True)
    with fleet(folder, DataSet([domain], {"none": 0}), ("none",)) as one:
        one.prepare()
        one.start()
        agent = one.agents[0]
        one.processes.wait_for(lambda: bool((status_of(one.control(domain.name)) or {}).get("scans")), "the first scan")
        for name, pid in (("agent", agent), ("broker", one.broker)):
            started, memory = cpu_s(pid), memory_of(pid)
            found.add(
                f"{IDLE} {name}",
                private_bytes=memory.total,
                anonymous_bytes=memory.anonymous,
                libraries_bytes=memory.libraries,
                start_cpu_s=started,
                idle_cpu_ratio=cpu_share([pid], sizes.idle_s),
            )
    remove(folder)


def _imports(found: Samples, tell: Tell) -> None:
    tell("what the agent's imports cost")
    lines = subprocess.run(
        [sys.executable, "-m", "bench.footprint", *AGENT_MODULES],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    ).stdout.splitlines()
    for line in map(json.loads, lines):
        found.add(IMPORTS, **{f"{line['module']}_bytes": line["anonymous_bytes"]})


def _costs(groups: tuple[str, ...], limit_s: float, data: DataSet, folder: Path, tell: Tell) -> _Costs:
    """Share some groups, wait until nothing changes any more, and look."""
    tell(f"sharing {sum(data.pages[group] for group in groups) * PAGE_SIZE / GIB:.3f} GiB")
    with fleet(folder, data, groups) as one:
        one.prepare()
        one.start()
        one.wait_for(TARGET_RATIO, limit_s, tell)
        tell("settling")
        one.settle(30.0)
        costs = _look(one, groups, data)
    remove(folder)
    return costs


def _look(one: Fleet, groups: tuple[str, ...], data: DataSet) -> _Costs:
    pool = one.broker_status()
    if pool["paused"]:
        raise HostError(f"the pool is paused: {pool['paused']}")
    store = one.work / "state" / "store" / "data.mdb"
    caches = [list(one.cache(domain.name).parent.iterdir()) for domain in data.domains]
    domains = len(data.domains)
    return _Costs(
        broker=memory_of(one.broker),
        agent=_mean([memory_of(pid) for pid in one.agents]),
        consumer=_mean([memory_of(pid) for pid in one.consumers]),
        cache=sum(path.stat().st_blocks * 512 for cache in caches for path in cache) / domains,
        cache_resident=sum(cached_file_bytes(path) for cache in caches for path in cache) / domains,
        store=store.stat().st_blocks * 512,
        store_resident=cached_file_bytes(store),
        table=pool["table_bytes"],
        area=pool["area_bytes"],
        pages=pool["known_pages"],
        domain_pages=sum(data.pages[group] for group in groups),
        common_bytes=sum(data.pages[group] for group in groups if group != "own") * PAGE_SIZE,
    )


def _mean(all_of: list[Memory]) -> Memory:
    count = len(all_of)
    return Memory(
        sum(memory.anonymous for memory in all_of) // count,
        sum(memory.libraries for memory in all_of) // count,
        sum(memory.area for memory in all_of) // count,
        sum(memory.files for memory in all_of) // count,
    )

"""Snapshots and savings arithmetic: what a pool, a domain, a file shares now. Pure: reads the engine's state.

Two kinds of figures are kept apart. What the index knows (slots, mappings, holders) is exact here. What memory that
saved is only the guests' kernels can say: the pages that went when the agents dropped their own copies, which the
agents report; the demo measures it itself. `saved` is never slots times domains.

A domain's balance is made of both: what it gave up, and its part of what the area costs. Each slot costs a page, which
those who map it pay in equal parts; slots that nobody maps are the host's expense (`unmapped_bytes` of the pool).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from .common.events import EVENTS, OWNER_BUCKETS, path_text
from .common.wire import PAGE_SIZE
from .grants import pairs
from .index import Content, HeldFile, Holdings, Mapped
from .model import DomainId
from .pagetable import NO_SLOT, SHARE_PAGE

XEN_MAPPING_BYTES: Final = 245 + 48
"""What one mapped page costs in bookkeeping on Xen: in the guest (gntdev), and in the hypervisor (xen-lab)."""

SURVEY_PAGES: Final = 1 << 18
"""Pages that one step of a survey looks at: 2 ms with 4 domains that hold them all, 10 ms with 32."""

RANKING_CONTENTS: Final = 4096
"""Contents that one step of a ranking looks at: 2 ms."""

CHECK_PAGES: Final = 256
CHECK_STRETCHES: Final = 16


class Survey:
    """What could be shared: counts over a pool's page table, which has too many pages to look at in one go.

    Step until done. While steps are under way domains report and leave; the counts are of about now.
    """

    def __init__(self, pool: Any) -> None:
        self._table = pool.index.table
        self._k: int = pool.rules.k
        self._at = 0
        self.done = False
        self.common = 0
        self.copies = 0
        self._held: list[array[int]] = []

    def of(self, pool: Any) -> bool:
        """Return whether this is about the pool as it is, and not about one that began anew since."""
        return pool.index.table is self._table

    def step(self, pages: int = SURVEY_PAGES) -> bool:
        """Look at so many pages more. Returns whether all have been looked at."""
        if not self.done:
            census = self._table.census(self._at, pages, self._k)
            self._at += pages
            self.done = self._at >= census.end
            self.common += census.common
            self.copies += census.copies
            columns = [array("Q", column) for column in (census.held, census.held_common, census.share)]
            if self._held:
                columns = [array("Q", map(int.__add__, old, new)) for old, new in zip(self._held, columns, strict=True)]
            self._held = columns
        return self.done

    @property
    def saved_bytes(self) -> int:
        """What would be saved if all that k domains hold were shared: all copies of a page but one."""
        return (self.copies - self.common) * PAGE_SIZE

    def domain(self, number: int) -> tuple[int, int, int]:
        """Return the pages that a domain holds, those of them that k domains hold, and its part of these in bytes."""
        held, common, share = (column[number] for column in self._held)
        return held, common, share * PAGE_SIZE // SHARE_PAGE


def survey(pool: Any) -> Survey:
    """Look at all pages of a pool at once."""
    found = Survey(pool)
    while not found.step():
        pass
    return found


@dataclass(frozen=True, slots=True)
class Balance:
    """What sharing gives and costs one domain now, in bytes.

    granted: pages of the area that it may map. given_up: of these, pages whose own copies its kernel has dropped, as
    its agent says; never more than granted, whatever it says. None: no agent has said anything. share: its part of the
    slots that it may map.
    """

    granted: int
    given_up: int | None
    share: int

    @property
    def net(self) -> int:
        """What it gave up less what it pays; below 0 for one that pays more."""
        return (self.given_up or 0) - self.share

    @property
    def most(self) -> int:
        """The net as far as it is known: where no agent has said anything, as if all that is granted were given up."""
        return (self.granted if self.given_up is None else self.given_up) - self.share


def balances(pool: Any) -> dict[DomainId, Balance]:
    """Return the balance of each domain of a pool that is connected or has grants. One native call for each."""
    runs: dict[DomainId, list[bytes]] = {domain: [] for domain in pool.peers}
    for (domain, _), owner in pool.index.owners.items():
        runs.setdefault(domain, []).append(owner.runs)
    found = {}
    for domain, owned in runs.items():
        peer = pool.peers.get(domain)
        granted = sum(array("I", b"".join(owned))[2::3])
        given_up = None
        if peer is not None and peer.stats is not None:
            given_up = min(peer.stats.dropped_pages_total, granted) * PAGE_SIZE
        owned += _pinned_runs(pool, domain)
        share = pool.index.table.share(b"".join(owned)) * PAGE_SIZE // SHARE_PAGE
        found[domain] = Balance(granted * PAGE_SIZE, given_up, share)
    return found


def _pinned_runs(pool: Any, domain: DomainId) -> list[bytes]:
    """What a Xen domain has released and still maps: it keeps the slots from others, so it pays for them."""
    pinned = pool.pinned.get(pool.domids.get(domain, 0))
    if pinned is None:
        return []
    return [array("I", (0, first, count)).tobytes() for first, count in pairs(pinned.slots) if first != NO_SLOT]


def pool_snapshot(
    pool: Any, area_bytes: int, store_bytes: int, now: float, *, mapping_bytes: int = 0, found: Survey | None = None
) -> dict[str, Any]:
    """Return one pool's figures: the fields of pool.statistics, None where there is nothing to say.

    `area_bytes`: memory that the kernel, or Xen, holds for its segments. `mapping_bytes`: bookkeeping that each mapped
    page costs somewhere (XEN_MAPPING_BYTES). `found`: a survey of the pool, if all of its pages were not to be looked
    at now.
    """
    found = found or survey(pool)
    totals = pool.index.table.totals()
    given_up = sum(balance.given_up or 0 for balance in balances(pool).values())
    agents = [peer.stats for peer in pool.peers.values() if peer.stats is not None]
    dropped = sum(stats.dropped_pages_total for stats in agents)
    overhead = totals.memory_bytes + store_bytes + totals.mappings * mapping_bytes
    overhead += sum(stats.private_bytes for stats in agents)
    ledger = pool.ledger
    return {
        "pool": pool.name,
        "mode": pool.rules.mode,
        "domains": len(pool.peers),
        "files": sum(len(holdings.files) for holdings in pool.index.domains.values()),
        "contents": len(pool.index.contents) + len(pool.index.partial),
        "known_pages": totals.pages,
        "common_pages": found.common,
        "pages_published": totals.slots_used,
        "pages_shared": totals.slots_mapped,
        "pages_sharing": totals.mappings,
        "pages_pending": totals.pending,
        "published_pages_total": pool.published_total,
        "mismatched_pages_total": pool.mismatched_total,
        "granted_pages_total": pool.granted_total,
        "zero_pages": sum(stats.zero_pages for stats in agents),
        "self_shared_pages": sum(_self_shared(pool, domain, found) for domain in pool.peers),
        "dropped_pages_total": dropped,
        "unread_pages": sum(stats.unread_pages for stats in agents),
        "area_bytes": area_bytes,
        "area_max_bytes": pool.rules.max_area_bytes,
        "area_fill_ratio": round(area_bytes / pool.rules.max_area_bytes, 6),
        "segments": len(pool.index.segments),
        "slots": len(pool.index.segments) * pool.index.slots_per_segment,
        "unmapped_bytes": max(0, area_bytes - totals.slots_mapped * PAGE_SIZE),
        "given_up_bytes": given_up,
        "saved_bytes": given_up - area_bytes,
        "net_saved_bytes": given_up - area_bytes - overhead,
        "overhead_bytes": overhead,
        "table_bytes": totals.memory_bytes,
        "store_bytes": store_bytes,
        "possible_saved_bytes": found.saved_bytes,
        **_reported_classes(pool.index.domains[domain] for domain in pool.peers),
        **_mapped_classes(pool.index.mapped.values()),
        **{f"slots_held_by_{n}": count for n, count in zip(OWNER_BUCKETS, totals.by_holders, strict=True)},
        **{f"slots_mapped_{n}_times": count for n, count in zip(OWNER_BUCKETS[1:], totals.by_mappings, strict=True)},
        "paused": pool.paused_why if now < pool.paused_until else None,
        "grants_used": ledger.used if ledger is not None else None,
        "grants_max": ledger.limits.entries if ledger is not None else None,
        "grants_pinned": _pinned_grants(pool) if ledger is not None else None,
        "domain_grants_max": ledger.limits.per_domain if ledger is not None else None,
    }


def _self_shared(pool: Any, domain: DomainId, found: Survey) -> int:
    holdings: Holdings = pool.index.domains[domain]
    return max(0, holdings.nonzero_pages - found.domain(holdings.number)[0])


def _pinned_grants(pool: Any) -> int:
    return sum(count for pinned in pool.pinned.values() for _, count in pairs(pinned.refs))


def _reported_classes(holdings: Iterable[Any]) -> dict[str, int]:
    pages = text = rodata = 0
    for each in holdings:
        pages, text, rodata = pages + each.pages, text + each.text_pages, rodata + each.rodata_pages
    return {
        "reported_text_bytes": text * PAGE_SIZE,
        "reported_rodata_bytes": rodata * PAGE_SIZE,
        "reported_data_bytes": (pages - text - rodata) * PAGE_SIZE,
    }


def _mapped_classes(mapped: Iterable[Mapped]) -> dict[str, int]:
    pages = text = rodata = unclassified = 0
    for each in mapped:
        pages, text, rodata = pages + each.pages, text + each.text, rodata + each.rodata
        unclassified += each.unclassified
    return {
        "mapped_text_bytes": text * PAGE_SIZE,
        "mapped_rodata_bytes": rodata * PAGE_SIZE,
        "mapped_data_bytes": (pages - text - rodata - unclassified) * PAGE_SIZE,
        "mapped_unclassified_bytes": unclassified * PAGE_SIZE,
    }


def fields(event: str, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a snapshot a line has."""
    kind = EVENTS[event]
    found = {name: snapshot[name] for name in (*kind.fields, *kind.options) if snapshot.get(name) is not None}
    if not found.get("domid", 1):
        del found["domid"]  # of no Xen domain
    return found


def host_snapshot(pools: Iterable[Mapping[str, Any]], store_bytes: int, broker_bytes: int) -> dict[str, Any]:
    """Return what pools' snapshots add up to. The store, which they share, and the broker's memory count once.

    `broker_bytes`: the broker's private memory, which the pools' tables are part of.
    """
    sums = dict.fromkeys(("domains", "area_bytes", "given_up_bytes", "overhead_bytes", "possible_saved_bytes"), 0)
    count = doubled = 0
    for pool in pools:
        count += 1
        doubled += pool["store_bytes"] + pool["table_bytes"]
        for name in sums:
            sums[name] += pool[name]
    overhead = sums["overhead_bytes"] - doubled + store_bytes + broker_bytes
    saved = sums["given_up_bytes"] - sums["area_bytes"]
    figures = {"overhead_bytes": overhead, "saved_bytes": saved, "net_saved_bytes": saved - overhead}
    return sums | figures | {"pools": count, "store_bytes": store_bytes, "broker_private_bytes": broker_bytes}


def domain_snapshots(
    pools: Mapping[str, Any], now: float, surveys: Mapping[str, Survey] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one entry per domain: connected ones, then those that still hold grants within their grace time.

    `surveys`: of pools whose pages were not to be looked at now.
    """
    for name, pool in pools.items():
        found = (surveys or {}).get(name) or survey(pool)
        owned: dict[DomainId, list[int]] = {}
        for (domain, _), owner in pool.index.owners.items():
            entry = owned.setdefault(domain, [0, 0])
            entry[0] += 1
            entry[1] += owner.page_count
        balance = balances(pool)
        for domain, peer in pool.peers.items():
            holdings = pool.index.domains[domain]
            files, pages = owned.pop(domain, [0, 0])
            stats = peer.stats
            yield {
                "domain": domain,
                "pool": pool.name,
                "state": "connected",
                "detached": domain in pool.detached,
                "uid": peer.identity.uid if peer.identity.backend == "local" else None,
                "files": len(holdings.files),
                "file_bytes": holdings.size_bytes,
                "domid": domid_of(pool, domain),
                "owned_files": files,
                "owned_pages": pages,
                "held_pages": held_pages(pool, domain, pages),
                "reports_under_way": len(peer.reports) + len(peer.waiting) + len(peer.deferred),
                "zero_pages": stats.zero_pages if stats is not None else 0,
                "attached_files": stats.attached_files if stats is not None else 0,
                "attached_pages": stats.attached_pages if stats is not None else 0,
                "dropped_pages_total": stats.dropped_pages_total if stats is not None else 0,
                "unread_pages": stats.unread_pages if stats is not None else 0,
                "agent_private_bytes": stats.private_bytes if stats is not None else 0,
                "memory_bytes": stats.total_bytes if stats is not None else 0,
                "available_bytes": stats.available_bytes if stats is not None else 0,
                "pressure": stats.pressure if stats is not None else 0,
                **_balance_fields(balance[domain]),
                **_possible_fields(pool, domain, found),
                **_reported_classes((holdings,)),
                **_mapped_classes([pool.index.mapped[domain]] if domain in pool.index.mapped else ()),
                "ignored_files": sum(count for count, _ in peer.ignored.values()),
                "ignored_bytes": sum(size for _, size in peer.ignored.values()),
                "ignored": {
                    verdict.code: {"files": count, "bytes": size} for verdict, (count, size) in peer.ignored.items()
                },
                "strikes": pool.strikes.get(domain, 0),
            }
        for domain, (files, pages) in owned.items():
            yield {
                "domain": domain,
                "pool": pool.name,
                "state": "absent",
                "detached": domain in pool.detached,
                "domid": domid_of(pool, domain),
                "owned_files": files,
                "owned_pages": pages,
                "held_pages": held_pages(pool, domain, pages),
                **_balance_fields(balance[domain]),
                **_mapped_classes([pool.index.mapped[domain]] if domain in pool.index.mapped else ()),
                "grace_left_ms": max(0, int((pool.absent.get(domain, now) - now) * 1000)),
            }
        for domain, until in pool.barred.items():
            yield {"domain": domain, "pool": pool.name, "state": "barred", "barred_ms": int((until - now) * 1000)}


def domid_of(pool: Any, domain: DomainId) -> int:
    """Return the number of the Xen domain behind a name, 0 on `local` or where it is not known."""
    peer = pool.peers.get(domain)
    domid: int = peer.identity.domid if peer is not None else pool.domids.get(domain, 0)
    return domid


def held_pages(pool: Any, domain: DomainId, owned: int) -> int:
    """Return the pages that a domain may map or still maps: on Xen, also those that it was to let go of."""
    if pool.ledger is None:
        return owned
    used: int = pool.ledger.used_by(pool.domids.get(domain, 0))
    return used


def knows(pool: Any, domain: DomainId) -> bool:
    """Return whether a domain is in a pool, or was and still has something to do with it."""
    return domain in pool.peers or domain in pool.absent or domain in pool.domids or domain in pool.detached


def holding(pool: Any, domain: DomainId) -> dict[str, Any]:
    """Return what one domain holds of the area, for who waits until it holds nothing."""
    owned = sum(pool.index.owners[domain, file].page_count for file in pool.index.owned_by(domain))
    return {
        "domain": domain,
        "pool": pool.name,
        "domid": domid_of(pool, domain),
        "connected": domain in pool.peers,
        "detached": domain in pool.detached,
        "owned_pages": owned,
        "held_pages": held_pages(pool, domain, owned),
    }


def _balance_fields(balance: Balance) -> dict[str, Any]:
    return {
        "given_up_bytes": balance.given_up,
        "share_bytes": balance.share,
        "net_bytes": balance.net,
    }


def _possible_fields(pool: Any, domain: DomainId, found: Survey) -> dict[str, Any]:
    distinct, common, share = found.domain(pool.index.domains[domain].number)
    return {
        "distinct_pages": distinct,
        "common_pages": common,
        "self_shared_pages": _self_shared(pool, domain, found),
        "possible_given_up_bytes": common * PAGE_SIZE,
        "possible_share_bytes": share,
        "possible_net_bytes": common * PAGE_SIZE - share,
    }


class Ranking:
    """The files of a pool whose copies take the most, found in steps: one row for each content."""

    def __init__(self, pool: Any, count: int) -> None:
        self._pool = pool
        self._count = count
        self._left = iter(list(pool.index.all_contents()))
        self._order = 0
        self._best: list[tuple[int, int, Content]] = []

    def step(self, contents: int = RANKING_CONTENTS) -> bool:
        """Look at so many contents more. Returns whether all have been looked at."""
        some = list(islice(self._left, contents))
        for content in some:
            held = content.page_count * sum(map(len, content.holders.values()))
            self._order += 1
            if held:
                entry = (held * PAGE_SIZE, -self._order, content)
                if len(self._best) < self._count:
                    heapq.heappush(self._best, entry)
                else:
                    heapq.heappushpop(self._best, entry)
        return len(some) < contents

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the fields of file.statistics, the largest first."""
        index, k = self._pool.index, self._pool.rules.k
        for rank, (held, _, content) in enumerate(sorted(self._best, reverse=True), 1):
            files = [(domain, file) for domain, some in content.holders.items() for file in some]
            if not files:
                continue  # gone meanwhile
            domain, file = files[0]
            owners = [index.owners[key] for key in files if key in index.owners]
            copies = len(files) - 1 if len(content.holders) >= k else 0
            yield {
                "pool": self._pool.name,
                "rank": rank,
                "path": path_text(index.domains[domain].files[file].path),
                "size_bytes": content.size,
                "domains": len(content.holders),
                "files": len(files),
                "pages": content.page_count,
                "pages_in_area": index.count_available(content),
                "pages_owned": sum(owner.page_count for owner in owners),
                "held_bytes": held,
                "possible_saved_bytes": copies * content.nonzero_pages * PAGE_SIZE,
                "text_bytes": content.text_pages * PAGE_SIZE or None,
                "rodata_bytes": content.rodata_pages * PAGE_SIZE or None,
            }


def audit(pool: Any) -> list[str]:
    """Return the codes of invariants that do not hold, as far as counting shows. Between events they all do."""
    index, totals = pool.index, pool.index.table.totals()
    owned = sum(mapped.pages for mapped in index.mapped.values())
    pinned = sum(count for each in pool.pinned.values() for first, count in pairs(each.slots) if first != NO_SLOT)
    found = []
    if owned + pinned != totals.mappings:
        found.append("mappings-differ")
    if pool.ledger is not None and owned + _pinned_grants(pool) != pool.ledger.used:
        found.append("grants-differ")
    if totals.slots_used > len(index.segments) * index.slots_per_segment:
        found.append("slots-beyond-area")
    return found


def sample(pool: Any, start: int) -> tuple[list[tuple[int, bytes]], int]:
    """Return a few stretches of slots from `start` on as (first slot, fingerprints), and where to go on.

    At most CHECK_PAGES slots in CHECK_STRETCHES stretches, all of one segment; after the last segment comes the first.
    """
    index = pool.index
    per_segment = index.slots_per_segment
    segment = min((s for s in index.segments if (s + 1) * per_segment > start), default=None)
    if segment is None:
        return [], 0
    end = (segment + 1) * per_segment
    first = max(start, segment * per_segment)
    slots, ids, _ = index.table.live(first, end - first)
    numbers = array("I", slots[: CHECK_PAGES * 4])
    stretches: list[tuple[int, int]] = []
    for at, slot in enumerate(numbers):
        if stretches and at and numbers[at - 1] + 1 == slot:
            stretches[-1] = (stretches[-1][0], at + 1)
        elif len(stretches) == CHECK_STRETCHES:
            return _prints(pool, numbers, ids, stretches), slot
        else:
            stretches.append((at, at + 1))
    found = _prints(pool, numbers, ids, stretches)
    return found, numbers[-1] + 1 if len(slots) > CHECK_PAGES * 4 else end


def _prints(pool: Any, slots: array[int], ids: bytes, stretches: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    return [(slots[at], pool.index.table.fps(ids[at * 4 : end * 4])) for at, end in stretches]


def file_snapshots(pools: Mapping[str, Any], start: int, count: int) -> list[dict[str, Any]]:
    """Return up to `count` files from position `start` of all files that domains hold."""
    return [_file(*each) for each in islice(_held_files(pools, start), count)]


def find_files(pools: Mapping[str, Any], path: bytes, start: int, most: int) -> tuple[list[dict[str, Any]], int | None]:
    """Return those with a path among the next `most` files from position `start` of all files that domains hold.

    And where to go on; None: that was all.
    """
    found: list[dict[str, Any]] = []
    looked = 0
    for each in islice(_held_files(pools, start), most):
        looked += 1
        if each[3].path == path:
            found.append(_file(*each))
    return found, start + looked if looked == most else None


def _held_files(pools: Mapping[str, Any], start: int) -> Iterator[tuple[Any, DomainId, int, HeldFile]]:
    """Yield pool, domain, number and file, from a position on."""
    position = 0
    for pool in pools.values():
        for domain, holdings in pool.index.domains.items():
            if position + len(holdings.files) <= start:
                position += len(holdings.files)
                continue
            for file, held in islice(holdings.files.items(), max(0, start - position), None):
                yield pool, domain, file, held
            position += len(holdings.files)


def _file(pool: Any, domain: DomainId, file: int, held: HeldFile) -> dict[str, Any]:
    content = held.content
    owner = pool.index.owners.get((domain, file))
    return {
        "pool": pool.name,
        "domain": domain,
        "path": held.path.decode("utf-8", "backslashreplace"),
        "size_bytes": held.size,
        "pages": content.page_count,
        "zero_pages": content.page_count - content.nonzero_pages,
        "text_pages": content.text_pages,
        "pages_in_area": pool.index.count_available(content),
        "pages_owned": owner.page_count if owner is not None else 0,
        "holders": len(content.holders),
        "whole": content.root is not None,
        "undelivered": content in pool.undelivered,
    }

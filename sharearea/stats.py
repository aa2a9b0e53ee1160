"""Snapshots and savings arithmetic: what a pool, a domain, a file shares now. Pure: reads the engine's state.

Two kinds of figures are kept apart. What the index knows (slots, mappings, holders) is exact here. What memory that
saved is only the guests' kernels can say: the pages that went when the agents dropped their own copies, which the
agents report; the demo measures it itself. `saved` is never slots times domains.

A domain's balance is made of both: what it gave up, and its part of what the area costs. Each slot costs a page, which
those who map it pay in equal parts; slots that nobody maps are the host's expense (`unmapped_bytes` of the pool).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .common.wire import PAGE_SIZE
from .grants import pairs
from .model import DomainId
from .pagetable import NO_SLOT, SHARE_PAGE

XEN_MAPPING_BYTES: Final = 245 + 48
"""What one mapped page costs in bookkeeping on Xen: in the guest (gntdev), and in the hypervisor (xen-lab)."""

HOLDER_BUCKETS = ("0", "1", "2", "3", "4-7", "8-15", "16-31", "32+")


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
    pool: Any, area_bytes: int, store_bytes: int, now: float, *, mapping_bytes: int = 0
) -> dict[str, Any]:
    """Return one pool's figures. `area_bytes`: memory that the kernel, or Xen, holds for its segments.

    `mapping_bytes`: bookkeeping that each mapped page costs somewhere (XEN_MAPPING_BYTES).
    """
    totals = pool.index.table.totals()
    given_up = sum(balance.given_up or 0 for balance in balances(pool).values())
    agents = [peer.stats for peer in pool.peers.values() if peer.stats is not None]
    dropped = sum(stats.dropped_pages_total for stats in agents)
    overhead = totals.memory_bytes + store_bytes + totals.mappings * mapping_bytes
    overhead += sum(stats.private_bytes for stats in agents)
    return {
        "pool": pool.name,
        "domains": len(pool.peers),
        "files": sum(len(holdings.files) for holdings in pool.index.domains.values()),
        "contents": len(pool.index.contents) + len(pool.index.partial),
        "known_pages": totals.pages,
        "pages_published": totals.slots_used,
        "pages_shared": totals.slots_mapped,
        "pages_sharing": totals.mappings,
        "pages_pending": totals.pending,
        "published_pages_total": pool.published_total,
        "mismatched_pages_total": pool.mismatched_total,
        "granted_pages_total": pool.granted_total,
        "zero_pages": sum(stats.zero_pages for stats in agents),
        "dropped_pages_total": dropped,
        "area_bytes": area_bytes,
        "area_max_bytes": pool.rules.max_area_bytes,
        "segments": len(pool.index.segments),
        "unmapped_bytes": area_bytes - totals.slots_mapped * PAGE_SIZE,
        "given_up_bytes": given_up,
        "net_saved_bytes": given_up - area_bytes - overhead,
        "overhead_bytes": overhead,
        "table_bytes": totals.memory_bytes,
        "store_bytes": store_bytes,
        "slots_by_holders": dict(zip(HOLDER_BUCKETS, totals.by_holders, strict=True)),
        "paused": pool.paused_why if now < pool.paused_until else None,
    }


def domain_snapshots(pools: Mapping[str, Any], now: float) -> Iterator[dict[str, Any]]:
    """Yield one entry per domain: connected ones, then those that still hold grants within their grace time."""
    for pool in pools.values():
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
                "uid": peer.identity.uid,
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
                "agent_private_bytes": stats.private_bytes if stats is not None else 0,
                "memory_bytes": stats.total_bytes if stats is not None else 0,
                "available_bytes": stats.available_bytes if stats is not None else 0,
                "pressure": stats.pressure if stats is not None else 0,
                **_balance_fields(balance[domain]),
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
                "domid": domid_of(pool, domain),
                "owned_files": files,
                "owned_pages": pages,
                "held_pages": held_pages(pool, domain, pages),
                **_balance_fields(balance[domain]),
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


def file_snapshots(pools: Mapping[str, Any], start: int, count: int) -> list[dict[str, Any]]:
    """Return up to `count` files from position `start` of all files that domains hold."""
    found: list[dict[str, Any]] = []
    position = 0
    for pool in pools.values():
        for domain, holdings in pool.index.domains.items():
            if position + len(holdings.files) <= start:
                position += len(holdings.files)
                continue
            for file, held in holdings.files.items():
                position += 1
                if position <= start:
                    continue
                content = held.content
                owner = pool.index.owners.get((domain, file))
                found.append(
                    {
                        "pool": pool.name,
                        "domain": domain,
                        "path": held.path.decode("utf-8", "backslashreplace"),
                        "size_bytes": held.size,
                        "pages": content.page_count,
                        "pages_in_area": pool.index.count_available(content),
                        "pages_owned": owner.page_count if owner is not None else 0,
                        "holders": len(content.holders),
                        "whole": content.root is not None,
                    }
                )
                if len(found) == count:
                    return found
    return found

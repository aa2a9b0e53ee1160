"""Snapshots and savings arithmetic: what a pool, a domain, a file shares now. Pure: reads the engine's state.

Two kinds of figures are kept apart. What the index knows (slots, mappings, holders) is exact here. What memory that
saved is only the guests' kernels can say: the pages that went when the agents dropped their own copies, which the
agents report; the demo measures it itself. `saved` is never slots times domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .model import DomainId

HOLDER_BUCKETS = ("0", "1", "2", "3", "4-7", "8-15", "16-31", "32+")


def pool_snapshot(pool: Any, area_bytes: int, store_bytes: int, now: float) -> dict[str, Any]:
    """Return one pool's figures. `area_bytes`: memory the kernel holds for its segments."""
    totals = pool.index.table.totals()
    agents = [peer.stats for peer in pool.peers.values() if peer.stats is not None]
    dropped = sum(stats.dropped_pages_total for stats in agents)
    overhead = totals.memory_bytes + store_bytes
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
                "owned_files": files,
                "owned_pages": pages,
                "reports_under_way": len(peer.reports) + len(peer.waiting) + len(peer.deferred),
                "zero_pages": stats.zero_pages if stats is not None else 0,
                "attached_files": stats.attached_files if stats is not None else 0,
                "attached_pages": stats.attached_pages if stats is not None else 0,
                "dropped_pages_total": stats.dropped_pages_total if stats is not None else 0,
                "agent_private_bytes": stats.private_bytes if stats is not None else 0,
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
                "owned_files": files,
                "owned_pages": pages,
                "grace_left_ms": max(0, int((pool.absent.get(domain, now) - now) * 1000)),
            }
        for domain, until in pool.barred.items():
            yield {"domain": domain, "pool": pool.name, "state": "barred", "barred_ms": int((until - now) * 1000)}


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

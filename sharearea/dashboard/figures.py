"""What `sharearea stats` answers, as rows: one question for each `--by`, and the overview. docs/stats.md defines them.

Each row is plain data. Bytes are bytes, times are texts (RFC 3339, UTC), and what is not known is None.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from .logs import Logs

Row = dict[str, Any]

_SUMMARY: Final = ("pool.statistics",)  # its group has all that most answers need
NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "": _SUMMARY,
    "host": _SUMMARY,
    "pool": _SUMMARY,
    "domain": (*_SUMMARY, "domain.statistics"),
    "file": (*_SUMMARY, "file.statistics"),
    "package": (*_SUMMARY, "file.statistics"),
    "reason": (*_SUMMARY, "files.plain"),
}
"""Events that each question is answered from."""

NO_PACKAGE: Final = "(no package)"

_HOSTS: Final = """
SELECT
    host, domains, pools, saved_bytes, net_saved_bytes, given_up_bytes, area_bytes, overhead_bytes,
    possible_saved_bytes, saved_bytes_max, saved_bytes_max_time, saved_bytes_mean, net_saved_bytes_max,
    net_saved_bytes_max_time, net_saved_bytes_mean, broker_private_bytes, store_bytes, memory_bytes, available_bytes,
    (SELECT sum(growth)::BIGINT FROM counters WHERE counters.host = host_statistics.host AND counter = 'cpu_ns_total')
        AS cpu_ns,
    backend, time, stopped
FROM host_statistics LEFT JOIN host_extremes USING (host)
ORDER BY net_saved_bytes DESC, host
"""

_POOLS: Final = """
WITH grown AS (
    SELECT host, pool,
        (sum(growth) FILTER (WHERE counter = 'published_pages_total') * 4096)::BIGINT AS published_bytes,
        (sum(growth) FILTER (WHERE counter = 'granted_pages_total') * 4096)::BIGINT AS granted_bytes,
        (sum(growth) FILTER (WHERE counter = 'mismatched_pages_total') * 4096)::BIGINT AS mismatched_bytes
    FROM counters GROUP BY host, pool
)
SELECT
    host, pool, mode, domains, files, saved_bytes, net_saved_bytes, given_up_bytes, area_bytes, overhead_bytes,
    possible_saved_bytes, saved_bytes_max, saved_bytes_max_time, saved_bytes_mean, net_saved_bytes_max,
    net_saved_bytes_max_time, net_saved_bytes_mean,
    known_pages * 4096 AS known_bytes, common_pages * 4096 AS common_bytes, pages_shared * 4096 AS shared_bytes,
    pages_sharing * 4096 AS sharing_bytes, zero_pages * 4096 AS zero_bytes,
    self_shared_pages * 4096 AS self_shared_bytes, unmapped_bytes, area_max_bytes, area_fill_ratio, grants_used,
    grants_max, grants_pinned, paused, published_bytes, granted_bytes, mismatched_bytes, time, is_current
FROM pool_statistics LEFT JOIN pool_extremes USING (host, pool) LEFT JOIN grown USING (host, pool)
ORDER BY is_current DESC, net_saved_bytes DESC, host, pool
"""

_DOMAINS: Final = """
SELECT
    host, pool, domain, state, files, file_bytes, given_up_bytes, share_bytes, net_bytes, possible_net_bytes,
    owned_pages * 4096 AS mapped_bytes, distinct_pages * 4096 AS distinct_bytes, common_pages * 4096 AS common_bytes,
    zero_pages * 4096 AS zero_bytes, self_shared_pages * 4096 AS self_shared_bytes, ignored_files, ignored_bytes,
    agent_private_bytes, taken_bytes, strikes,
    (SELECT (sum(growth) * 4096)::BIGINT FROM counters
        WHERE counters.host = domain_statistics.host AND counters.pool = domain_statistics.pool
        AND counters.domain = domain_statistics.domain AND counter = 'dropped_pages_total') AS dropped_bytes,
    unread_pages * 4096 AS unread_bytes,
    time, is_current
FROM domain_statistics
ORDER BY is_current DESC, net_bytes DESC, host, pool, domain
"""

_FILES: Final = """
SELECT
    host, pool, path, size_bytes, domains, files, held_bytes, possible_saved_bytes, mapped_bytes,
    pages_in_area * 4096 AS in_area_bytes, text_bytes, rodata_bytes, rank, time
FROM files
ORDER BY possible_saved_bytes DESC, held_bytes DESC, path, host, pool
"""

_REASONS: Final = """
SELECT stage, reason, files, bytes, domains, times, last_time FROM (
    SELECT stage, reason, sum(files)::BIGINT AS files, sum(bytes)::BIGINT AS bytes,
        count(DISTINCT (pool, domain))::BIGINT AS domains, sum(files_said)::BIGINT AS times, max(last_time) AS last_time
    FROM refusals GROUP BY ALL
    UNION ALL BY NAME
    SELECT 'join' AS stage, reason, count(DISTINCT domain) AS domains, sum(times)::BIGINT AS times,
        max(last_time) AS last_time
    FROM domain_refusals GROUP BY ALL
    UNION ALL BY NAME
    SELECT 'obstacle' AS stage, coalesce(reason, event) AS reason, sum(files)::BIGINT AS files,
        (sum(pages) * 4096)::BIGINT AS bytes, count(DISTINCT domain) AS domains, sum(times)::BIGINT AS times,
        max(last_time) AS last_time
    FROM obstacles GROUP BY ALL
)
ORDER BY bytes DESC NULLS LAST, files DESC NULLS LAST, times DESC, stage, reason
"""

_TOTALS: Final = """
SELECT
    (SELECT count(*) FROM host_statistics) AS hosts,
    (SELECT count(*) FROM pool_statistics WHERE is_current) AS pools,
    sum(domains)::BIGINT AS domains, sum(saved_bytes)::BIGINT AS saved_bytes,
    sum(net_saved_bytes)::BIGINT AS net_saved_bytes, sum(given_up_bytes)::BIGINT AS given_up_bytes,
    sum(area_bytes)::BIGINT AS area_bytes, sum(overhead_bytes)::BIGINT AS overhead_bytes,
    sum(possible_saved_bytes)::BIGINT AS possible_saved_bytes,
    (SELECT (sum(zero_pages) * 4096)::BIGINT FROM pool_statistics WHERE is_current) AS zero_bytes,
    (SELECT (sum(self_shared_pages) * 4096)::BIGINT FROM pool_statistics WHERE is_current) AS self_shared_bytes,
    (SELECT sum(area_max_bytes)::BIGINT FROM pool_statistics WHERE is_current) AS area_max_bytes,
    (SELECT sum(grants_used)::BIGINT FROM pool_statistics WHERE is_current) AS grants_used,
    (SELECT sum(grants_max)::BIGINT FROM pool_statistics WHERE is_current) AS grants_max
FROM host_statistics
"""


def overview(logs: Logs) -> Row:
    """Return the figures of all hosts together, and where the bytes are."""
    [figures] = logs.query(_TOTALS)
    [grown] = logs.query(
        "SELECT (sum(growth) FILTER (WHERE counter = 'published_pages_total') * 4096)::BIGINT AS published_bytes, "
        "(sum(growth) FILTER (WHERE counter = 'granted_pages_total') * 4096)::BIGINT AS granted_bytes, "
        "(sum(growth) FILTER (WHERE counter = 'cpu_ns_total'))::BIGINT AS cpu_ns FROM counters"
    )
    [extremes] = logs.query(
        # Several hosts report at different moments, so highest and mean of the sum are not known: only of one host.
        "SELECT CASE WHEN count(*) = 1 THEN any_value(saved_bytes_max) END AS saved_bytes_max, "
        "CASE WHEN count(*) = 1 THEN any_value(saved_bytes_max_time) END AS saved_bytes_max_time, "
        "sum(saved_bytes_mean)::BIGINT AS saved_bytes_mean, "
        "CASE WHEN count(*) = 1 THEN any_value(net_saved_bytes_max) END AS net_saved_bytes_max, "
        "CASE WHEN count(*) = 1 THEN any_value(net_saved_bytes_max_time) END AS net_saved_bytes_max_time, "
        "sum(net_saved_bytes_mean)::BIGINT AS net_saved_bytes_mean FROM host_extremes"
    )
    [refused] = logs.query(
        "SELECT coalesce(sum(files), 0)::BIGINT AS refused_files, coalesce(sum(bytes), 0)::BIGINT AS refused_bytes "
        "FROM refusals WHERE stage IN ('scan', 'report')"
    )
    [avoided] = logs.query("SELECT sum(io_avoided_bytes)::BIGINT AS io_avoided_bytes FROM io_avoided")
    classes: Row = {}
    for row in logs.query(
        "SELECT kind, class, sum(bytes)::BIGINT AS bytes FROM page_classes WHERE domain = '' GROUP BY ALL"
    ):
        classes[f"{row['kind']}_{row['class']}_bytes"] = row["bytes"]
    owners: Row = {}
    for row in logs.query("SELECT kind, owners, sum(slots)::BIGINT AS slots FROM page_owners GROUP BY ALL"):
        owners[f"slots_{row['kind']}_by_{row['owners']}"] = row["slots"]
    return plain(
        figures
        | grown
        | extremes
        | refused
        | avoided
        | {"page_classes": dict(sorted(classes.items())), "owners": dict(sorted(owners.items()))}
    )


def rows(logs: Logs, by: str, package_of: Callable[[str], str | None] = lambda _: None) -> list[Row]:
    """Return the rows of a question. `package_of`: the package of a path as domains report it."""
    if by == "host":
        found = logs.query(_HOSTS)
    elif by == "pool":
        found = logs.query(_POOLS)
    elif by == "domain":
        found = logs.query(_DOMAINS)
    elif by == "reason":
        found = logs.query(_REASONS)
    else:
        found = [row | {"package": package_of(row["path"])} for row in logs.query(_FILES)]
        if by == "package":
            found = by_package(found)
    return [plain(row) for row in found]


_SUMMED: Final = ("held_bytes", "possible_saved_bytes", "mapped_bytes", "in_area_bytes", "text_bytes", "rodata_bytes")


def by_package(files: Iterable[Row]) -> list[Row]:
    """Return rows of files, added up by package."""
    found: dict[str, Row] = {}
    for file in files:
        name = file["package"] or NO_PACKAGE
        package = found.setdefault(name, {"package": name, "contents": 0} | dict.fromkeys(_SUMMED, 0))
        package["contents"] += 1
        for figure in _SUMMED:
            package[figure] += file[figure]
    return sorted(found.values(), key=lambda row: (-row["possible_saved_bytes"], -row["held_bytes"], row["package"]))


def span(logs: Logs) -> Row:
    """Return what the window and the files have: events, the first and last of them, lines that are no events."""
    [inside] = logs.query("SELECT first, last, events FROM span")
    [all_of_it] = logs.query(
        "SELECT count(event) AS events_loaded, count(*) - count(event) AS other_lines, "
        "min(time) FILTER (WHERE event IS NOT NULL) AS logs_first, "
        "max(time) FILTER (WHERE event IS NOT NULL) AS logs_last FROM lines"
    )
    return plain(
        inside
        | all_of_it
        | {"files": len(logs.files), "unreadable_files": [f"{path}: {why}" for path, why in logs.failed.items()]}
    )


def plain(row: Mapping[str, Any]) -> Row:
    """Return a row with times as texts."""
    return {
        name: value.isoformat(timespec="milliseconds") + "Z" if isinstance(value, datetime.datetime) else value
        for name, value in row.items()
    }

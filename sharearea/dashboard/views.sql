-- What log lines of sharearea answer, as views for DuckDB. docs/stats.md explains every figure and how to use this file
-- by itself; sharearea/dashboard/logs.py uses the same views. The list of columns is made from the catalogue of events
-- by tools/gen_views.py.
--
-- By itself:   SET VARIABLE logs = ['/var/log/sharearea/*.log*'];   then   .read views.sql
-- A window:    SET VARIABLE since = TIMESTAMP '2026-11-20 08:00';   SET VARIABLE until = ...;   (UTC; both may be left out)
--
-- Three kinds of numbers, which must not be mixed:
--   gauges    say how it is at a moment: the last one of each source counts, and they are never added up over time;
--   counters  (their names end in _total) only grow while a program runs: differences count, and a restart begins at 0;
--   events    say what happened: they are added up.

-- ------------------------------------------------------------------------------------------------------------- lines

-- Every line as a row. What is no event of ours has no event name. (logs.py leaves this one out, and has its own.)
-- generated: lines
CREATE OR REPLACE VIEW lines AS
SELECT
    "@timestamp" AS "time",
    CASE WHEN starts_with("event.dataset", 'sharearea.') THEN "event.name" END AS "event",
    "log.level" AS "level",
    "host.name" AS "host",
    CASE WHEN starts_with("event.dataset", 'sharearea.') THEN substr("event.dataset", 11) END AS "program",
    "process.pid" AS "pid",
    "event.sequence" AS "sequence",
    "service.version" AS "version",
    "message" AS "message",
    "event.reason" AS "reason",
    "sharearea.detail" AS "detail",
    "error.message" AS "error",
    "event.duration" AS "duration_ns",
    "file.path" AS "path",
    "file.size" AS "size_bytes",
    "sharearea.pool" AS "pool",
    "sharearea.domain" AS "domain",
    "sharearea.mode" AS "mode",
    "sharearea.backend" AS "backend",
    "sharearea.kernel" AS "kernel",
    "sharearea.socket" AS "socket",
    "sharearea.rule" AS "rule",
    "sharearea.hint" AS "hint",
    "sharearea.state" AS "state",
    "sharearea.stage" AS "stage",
    "sharearea.paused" AS "paused",
    "sharearea.sink" AS "sink",
    "sharearea.consumer" AS "consumer",
    "sharearea.consumers" AS "consumers",
    "sharearea.folders" AS "folders",
    "sharearea.examples" AS "examples",
    "sharearea.violations" AS "violations",
    "sharearea.all" AS "all",
    "sharearea.uid" AS "uid",
    "sharearea.domid" AS "domid",
    "sharearea.consumer_pid" AS "consumer_pid",
    "sharearea.segment" AS "segment",
    "sharearea.rank" AS "rank",
    "sharearea.pools" AS "pools",
    "sharearea.domains" AS "domains",
    "sharearea.connections" AS "connections",
    "sharearea.owners" AS "owners",
    "sharearea.owners_dropped" AS "owners_dropped",
    "sharearea.entries_without_owner" AS "entries_without_owner",
    "sharearea.changes" AS "changes",
    "sharearea.strikes" AS "strikes",
    "sharearea.segments" AS "segments",
    "sharearea.slots" AS "slots",
    "sharearea.files" AS "files",
    "sharearea.contents" AS "contents",
    "sharearea.cache_hits" AS "cache_hits",
    "sharearea.fingerprinted_pages" AS "fingerprinted_pages",
    "sharearea.failed_files" AS "failed_files",
    "sharearea.failed_permission_files" AS "failed_permission_files",
    "sharearea.failed_symlink_files" AS "failed_symlink_files",
    "sharearea.failed_path_too_long_files" AS "failed_path_too_long_files",
    "sharearea.failed_descriptors_files" AS "failed_descriptors_files",
    "sharearea.failed_busy_files" AS "failed_busy_files",
    "sharearea.failed_special_files" AS "failed_special_files",
    "sharearea.failed_changed_files" AS "failed_changed_files",
    "sharearea.failed_residency_files" AS "failed_residency_files",
    "sharearea.failed_folder_files" AS "failed_folder_files",
    "sharearea.failed_no_folder_files" AS "failed_no_folder_files",
    "sharearea.failed_too_deep_files" AS "failed_too_deep_files",
    "sharearea.failed_io_files" AS "failed_io_files",
    "sharearea.lines" AS "lines",
    "sharearea.log_lines_dropped" AS "log_lines_dropped",
    "sharearea.attached_files" AS "attached_files",
    "sharearea.owned_files" AS "owned_files",
    "sharearea.reports_under_way" AS "reports_under_way",
    "sharearea.ignored_files" AS "ignored_files",
    "sharearea.checked_slots" AS "checked_slots",
    "sharearea.bad_slots" AS "bad_slots",
    "sharearea.pages" AS "pages",
    "sharearea.known_pages" AS "known_pages",
    "sharearea.common_pages" AS "common_pages",
    "sharearea.distinct_pages" AS "distinct_pages",
    "sharearea.pages_published" AS "pages_published",
    "sharearea.pages_shared" AS "pages_shared",
    "sharearea.pages_sharing" AS "pages_sharing",
    "sharearea.pages_pending" AS "pages_pending",
    "sharearea.published_pages_total" AS "published_pages_total",
    "sharearea.mismatched_pages_total" AS "mismatched_pages_total",
    "sharearea.granted_pages_total" AS "granted_pages_total",
    "sharearea.dropped_pages_total" AS "dropped_pages_total",
    "sharearea.unread_pages" AS "unread_pages",
    "sharearea.zero_pages" AS "zero_pages",
    "sharearea.self_shared_pages" AS "self_shared_pages",
    "sharearea.attached_pages" AS "attached_pages",
    "sharearea.owned_pages" AS "owned_pages",
    "sharearea.held_pages" AS "held_pages",
    "sharearea.pages_in_area" AS "pages_in_area",
    "sharearea.pages_owned" AS "pages_owned",
    "sharearea.grants_used" AS "grants_used",
    "sharearea.grants_max" AS "grants_max",
    "sharearea.grants_pinned" AS "grants_pinned",
    "sharearea.domain_grants_max" AS "domain_grants_max",
    "sharearea.slots_held_by_0" AS "slots_held_by_0",
    "sharearea.slots_held_by_1" AS "slots_held_by_1",
    "sharearea.slots_held_by_2" AS "slots_held_by_2",
    "sharearea.slots_held_by_3" AS "slots_held_by_3",
    "sharearea.slots_held_by_4_to_7" AS "slots_held_by_4_to_7",
    "sharearea.slots_held_by_8_to_15" AS "slots_held_by_8_to_15",
    "sharearea.slots_held_by_16_to_31" AS "slots_held_by_16_to_31",
    "sharearea.slots_held_by_32_or_more" AS "slots_held_by_32_or_more",
    "sharearea.slots_mapped_1_times" AS "slots_mapped_1_times",
    "sharearea.slots_mapped_2_times" AS "slots_mapped_2_times",
    "sharearea.slots_mapped_3_times" AS "slots_mapped_3_times",
    "sharearea.slots_mapped_4_to_7_times" AS "slots_mapped_4_to_7_times",
    "sharearea.slots_mapped_8_to_15_times" AS "slots_mapped_8_to_15_times",
    "sharearea.slots_mapped_16_to_31_times" AS "slots_mapped_16_to_31_times",
    "sharearea.slots_mapped_32_or_more_times" AS "slots_mapped_32_or_more_times",
    "sharearea.file_bytes" AS "file_bytes",
    "sharearea.ignored_bytes" AS "ignored_bytes",
    "sharearea.read_bytes" AS "read_bytes",
    "sharearea.area_bytes" AS "area_bytes",
    "sharearea.area_max_bytes" AS "area_max_bytes",
    "sharearea.area_fill_ratio" AS "area_fill_ratio",
    "sharearea.unmapped_bytes" AS "unmapped_bytes",
    "sharearea.given_up_bytes" AS "given_up_bytes",
    "sharearea.saved_bytes" AS "saved_bytes",
    "sharearea.net_saved_bytes" AS "net_saved_bytes",
    "sharearea.overhead_bytes" AS "overhead_bytes",
    "sharearea.table_bytes" AS "table_bytes",
    "sharearea.store_bytes" AS "store_bytes",
    "sharearea.share_bytes" AS "share_bytes",
    "sharearea.net_bytes" AS "net_bytes",
    "sharearea.agent_private_bytes" AS "agent_private_bytes",
    "sharearea.broker_private_bytes" AS "broker_private_bytes",
    "sharearea.memory_bytes" AS "memory_bytes",
    "sharearea.available_bytes" AS "available_bytes",
    "sharearea.pressure" AS "pressure",
    "sharearea.target_bytes" AS "target_bytes",
    "sharearea.taken_bytes" AS "taken_bytes",
    "sharearea.entitled_bytes" AS "entitled_bytes",
    "sharearea.reported_text_bytes" AS "reported_text_bytes",
    "sharearea.reported_rodata_bytes" AS "reported_rodata_bytes",
    "sharearea.reported_data_bytes" AS "reported_data_bytes",
    "sharearea.mapped_text_bytes" AS "mapped_text_bytes",
    "sharearea.mapped_rodata_bytes" AS "mapped_rodata_bytes",
    "sharearea.mapped_data_bytes" AS "mapped_data_bytes",
    "sharearea.mapped_unclassified_bytes" AS "mapped_unclassified_bytes",
    "sharearea.possible_saved_bytes" AS "possible_saved_bytes",
    "sharearea.possible_given_up_bytes" AS "possible_given_up_bytes",
    "sharearea.possible_share_bytes" AS "possible_share_bytes",
    "sharearea.possible_net_bytes" AS "possible_net_bytes",
    "sharearea.held_bytes" AS "held_bytes",
    "sharearea.text_bytes" AS "text_bytes",
    "sharearea.rodata_bytes" AS "rodata_bytes",
    "sharearea.retry_ms" AS "retry_ms",
    "sharearea.grace_left_ms" AS "grace_left_ms",
    "sharearea.barred_ms" AS "barred_ms",
    "sharearea.cpu_ns_total" AS "cpu_ns_total"
FROM read_json(
    getvariable('logs'),
    format = 'newline_delimited', ignore_errors = true, maximum_object_size = 16777216,
    columns = {
        '@timestamp': 'TIMESTAMP',
        'event.name': 'VARCHAR',
        'log.level': 'VARCHAR',
        'host.name': 'VARCHAR',
        'event.dataset': 'VARCHAR',
        'process.pid': 'BIGINT',
        'event.sequence': 'BIGINT',
        'service.version': 'VARCHAR',
        'message': 'VARCHAR',
        'event.reason': 'VARCHAR',
        'sharearea.detail': 'VARCHAR',
        'error.message': 'VARCHAR',
        'event.duration': 'BIGINT',
        'file.path': 'VARCHAR',
        'file.size': 'BIGINT',
        'sharearea.pool': 'VARCHAR',
        'sharearea.domain': 'VARCHAR',
        'sharearea.mode': 'VARCHAR',
        'sharearea.backend': 'VARCHAR',
        'sharearea.kernel': 'VARCHAR',
        'sharearea.socket': 'VARCHAR',
        'sharearea.rule': 'VARCHAR',
        'sharearea.hint': 'VARCHAR',
        'sharearea.state': 'VARCHAR',
        'sharearea.stage': 'VARCHAR',
        'sharearea.paused': 'VARCHAR',
        'sharearea.sink': 'VARCHAR',
        'sharearea.consumer': 'VARCHAR',
        'sharearea.consumers': 'VARCHAR[]',
        'sharearea.folders': 'VARCHAR[]',
        'sharearea.examples': 'VARCHAR[]',
        'sharearea.violations': 'VARCHAR[]',
        'sharearea.all': 'BOOLEAN',
        'sharearea.uid': 'BIGINT',
        'sharearea.domid': 'BIGINT',
        'sharearea.consumer_pid': 'BIGINT',
        'sharearea.segment': 'BIGINT',
        'sharearea.rank': 'BIGINT',
        'sharearea.pools': 'BIGINT',
        'sharearea.domains': 'BIGINT',
        'sharearea.connections': 'BIGINT',
        'sharearea.owners': 'BIGINT',
        'sharearea.owners_dropped': 'BIGINT',
        'sharearea.entries_without_owner': 'BIGINT',
        'sharearea.changes': 'BIGINT',
        'sharearea.strikes': 'BIGINT',
        'sharearea.segments': 'BIGINT',
        'sharearea.slots': 'BIGINT',
        'sharearea.files': 'BIGINT',
        'sharearea.contents': 'BIGINT',
        'sharearea.cache_hits': 'BIGINT',
        'sharearea.fingerprinted_pages': 'BIGINT',
        'sharearea.failed_files': 'BIGINT',
        'sharearea.failed_permission_files': 'BIGINT',
        'sharearea.failed_symlink_files': 'BIGINT',
        'sharearea.failed_path_too_long_files': 'BIGINT',
        'sharearea.failed_descriptors_files': 'BIGINT',
        'sharearea.failed_busy_files': 'BIGINT',
        'sharearea.failed_special_files': 'BIGINT',
        'sharearea.failed_changed_files': 'BIGINT',
        'sharearea.failed_residency_files': 'BIGINT',
        'sharearea.failed_folder_files': 'BIGINT',
        'sharearea.failed_no_folder_files': 'BIGINT',
        'sharearea.failed_too_deep_files': 'BIGINT',
        'sharearea.failed_io_files': 'BIGINT',
        'sharearea.lines': 'BIGINT',
        'sharearea.log_lines_dropped': 'BIGINT',
        'sharearea.attached_files': 'BIGINT',
        'sharearea.owned_files': 'BIGINT',
        'sharearea.reports_under_way': 'BIGINT',
        'sharearea.ignored_files': 'BIGINT',
        'sharearea.checked_slots': 'BIGINT',
        'sharearea.bad_slots': 'BIGINT',
        'sharearea.pages': 'BIGINT',
        'sharearea.known_pages': 'BIGINT',
        'sharearea.common_pages': 'BIGINT',
        'sharearea.distinct_pages': 'BIGINT',
        'sharearea.pages_published': 'BIGINT',
        'sharearea.pages_shared': 'BIGINT',
        'sharearea.pages_sharing': 'BIGINT',
        'sharearea.pages_pending': 'BIGINT',
        'sharearea.published_pages_total': 'BIGINT',
        'sharearea.mismatched_pages_total': 'BIGINT',
        'sharearea.granted_pages_total': 'BIGINT',
        'sharearea.dropped_pages_total': 'BIGINT',
        'sharearea.unread_pages': 'BIGINT',
        'sharearea.zero_pages': 'BIGINT',
        'sharearea.self_shared_pages': 'BIGINT',
        'sharearea.attached_pages': 'BIGINT',
        'sharearea.owned_pages': 'BIGINT',
        'sharearea.held_pages': 'BIGINT',
        'sharearea.pages_in_area': 'BIGINT',
        'sharearea.pages_owned': 'BIGINT',
        'sharearea.grants_used': 'BIGINT',
        'sharearea.grants_max': 'BIGINT',
        'sharearea.grants_pinned': 'BIGINT',
        'sharearea.domain_grants_max': 'BIGINT',
        'sharearea.slots_held_by_0': 'BIGINT',
        'sharearea.slots_held_by_1': 'BIGINT',
        'sharearea.slots_held_by_2': 'BIGINT',
        'sharearea.slots_held_by_3': 'BIGINT',
        'sharearea.slots_held_by_4_to_7': 'BIGINT',
        'sharearea.slots_held_by_8_to_15': 'BIGINT',
        'sharearea.slots_held_by_16_to_31': 'BIGINT',
        'sharearea.slots_held_by_32_or_more': 'BIGINT',
        'sharearea.slots_mapped_1_times': 'BIGINT',
        'sharearea.slots_mapped_2_times': 'BIGINT',
        'sharearea.slots_mapped_3_times': 'BIGINT',
        'sharearea.slots_mapped_4_to_7_times': 'BIGINT',
        'sharearea.slots_mapped_8_to_15_times': 'BIGINT',
        'sharearea.slots_mapped_16_to_31_times': 'BIGINT',
        'sharearea.slots_mapped_32_or_more_times': 'BIGINT',
        'sharearea.file_bytes': 'BIGINT',
        'sharearea.ignored_bytes': 'BIGINT',
        'sharearea.read_bytes': 'BIGINT',
        'sharearea.area_bytes': 'BIGINT',
        'sharearea.area_max_bytes': 'BIGINT',
        'sharearea.area_fill_ratio': 'DOUBLE',
        'sharearea.unmapped_bytes': 'BIGINT',
        'sharearea.given_up_bytes': 'BIGINT',
        'sharearea.saved_bytes': 'BIGINT',
        'sharearea.net_saved_bytes': 'BIGINT',
        'sharearea.overhead_bytes': 'BIGINT',
        'sharearea.table_bytes': 'BIGINT',
        'sharearea.store_bytes': 'BIGINT',
        'sharearea.share_bytes': 'BIGINT',
        'sharearea.net_bytes': 'BIGINT',
        'sharearea.agent_private_bytes': 'BIGINT',
        'sharearea.broker_private_bytes': 'BIGINT',
        'sharearea.memory_bytes': 'BIGINT',
        'sharearea.available_bytes': 'BIGINT',
        'sharearea.pressure': 'BIGINT',
        'sharearea.target_bytes': 'BIGINT',
        'sharearea.taken_bytes': 'BIGINT',
        'sharearea.entitled_bytes': 'BIGINT',
        'sharearea.reported_text_bytes': 'BIGINT',
        'sharearea.reported_rodata_bytes': 'BIGINT',
        'sharearea.reported_data_bytes': 'BIGINT',
        'sharearea.mapped_text_bytes': 'BIGINT',
        'sharearea.mapped_rodata_bytes': 'BIGINT',
        'sharearea.mapped_data_bytes': 'BIGINT',
        'sharearea.mapped_unclassified_bytes': 'BIGINT',
        'sharearea.possible_saved_bytes': 'BIGINT',
        'sharearea.possible_given_up_bytes': 'BIGINT',
        'sharearea.possible_share_bytes': 'BIGINT',
        'sharearea.possible_net_bytes': 'BIGINT',
        'sharearea.held_bytes': 'BIGINT',
        'sharearea.text_bytes': 'BIGINT',
        'sharearea.rodata_bytes': 'BIGINT',
        'sharearea.retry_ms': 'BIGINT',
        'sharearea.grace_left_ms': 'BIGINT',
        'sharearea.barred_ms': 'BIGINT',
        'sharearea.cpu_ns_total': 'BIGINT'
    }
);
-- end

-- Lines of the window.
CREATE OR REPLACE VIEW events AS
SELECT *
FROM lines
WHERE event IS NOT NULL
    AND (getvariable('since') IS NULL OR time >= getvariable('since')::TIMESTAMP)
    AND (getvariable('until') IS NULL OR time < getvariable('until')::TIMESTAMP);

-- The span of what there is.
CREATE OR REPLACE VIEW span AS
SELECT min(time) AS first, max(time) AS last, count(*) AS events, count(DISTINCT host) AS machines
FROM events;

-- ---------------------------------------------------------------------------------------------------- gauges: history

CREATE OR REPLACE VIEW host_history AS SELECT * FROM events WHERE event = 'host.statistics';
CREATE OR REPLACE VIEW pool_history AS SELECT * FROM events WHERE event = 'pool.statistics';
CREATE OR REPLACE VIEW domain_history AS SELECT * FROM events WHERE event = 'domain.statistics';
CREATE OR REPLACE VIEW file_history AS SELECT * FROM events WHERE event = 'file.statistics';

-- -------------------------------------------------------------------------------------------------- gauges: last value

-- A broker writes its figures in rounds: pools, their domains, then the host. `now_from`: what was said after this
-- moment is of the last round. A pool or a domain that said nothing since is gone.
CREATE OR REPLACE VIEW rounds AS
SELECT
    host,
    max(time) AS round_time,
    max(time) FILTER (WHERE place = 2) AS now_from
FROM (
    SELECT host, time, row_number() OVER (PARTITION BY host ORDER BY time DESC, sequence DESC) AS place
    FROM host_history
)
GROUP BY host;

CREATE OR REPLACE VIEW host_statistics AS
SELECT last.*, ended.time IS NOT NULL AND ended.time >= last.time AS stopped
FROM (
    SELECT * FROM host_history
    QUALIFY row_number() OVER (PARTITION BY host ORDER BY time DESC, sequence DESC) = 1
) AS last
LEFT JOIN (
    SELECT host, pid, max(time) AS time FROM events WHERE event = 'broker.stopped' GROUP BY host, pid
) AS ended USING (host, pid);

CREATE OR REPLACE VIEW pool_statistics AS
SELECT last.*, rounds.now_from IS NULL OR last.time > rounds.now_from AS is_current
FROM (
    SELECT * FROM pool_history
    QUALIFY row_number() OVER (PARTITION BY host, pool ORDER BY time DESC, sequence DESC) = 1
) AS last
LEFT JOIN rounds USING (host);

CREATE OR REPLACE VIEW domain_statistics AS
SELECT last.*, rounds.now_from IS NULL OR last.time > rounds.now_from AS is_current
FROM (
    SELECT * FROM domain_history
    QUALIFY row_number() OVER (PARTITION BY host, pool, domain ORDER BY time DESC, sequence DESC) = 1
) AS last
LEFT JOIN rounds USING (host);

-- Files come as a ranking, from rank 1 on: the last ranking of each pool counts, or the one before while the last is
-- still being written (nothing else has been heard of its broker since).
CREATE OR REPLACE VIEW files AS
WITH
    begun AS (
        SELECT
            host, pool, time AS begin_time,
            coalesce(lead(time) OVER (PARTITION BY host, pool ORDER BY time), TIMESTAMP 'infinity') AS end_time
        FROM file_history WHERE rank = 1
        QUALIFY row_number() OVER (PARTITION BY host, pool ORDER BY time DESC) <= 2
    ),
    rankings AS (
        SELECT host, pool, begin_time, end_time, max((time, sequence)) AS last_line, count(*) AS rows_there
        FROM begun JOIN file_history USING (host, pool)
        WHERE time >= begin_time AND time < end_time
        GROUP BY ALL
    ),
    heard AS (
        -- By number within a moment: a broker that is stopped says so in the same millisecond.
        SELECT host, max((time, sequence)) AS heard_line
        FROM events JOIN (SELECT host, min(begin_time) AS begin_time FROM begun GROUP BY host) USING (host)
        WHERE time >= begin_time AND program = 'broker' AND event <> 'file.statistics' GROUP BY host
    ),
    chosen AS (
        SELECT host, pool, begin_time, end_time
        FROM (
            SELECT *, lag(rows_there) OVER (PARTITION BY host, pool ORDER BY begin_time) AS rows_before FROM rankings
        )
        LEFT JOIN heard USING (host)
        WHERE rows_before IS NULL OR rows_there >= rows_before OR heard_line > last_line
        QUALIFY row_number() OVER (PARTITION BY host, pool ORDER BY begin_time DESC) = 1
    )
SELECT
    time, host, pool, rank, path, size_bytes, domains, files, pages, pages_in_area, pages_owned, held_bytes,
    possible_saved_bytes, coalesce(text_bytes, 0) AS text_bytes, coalesce(rodata_bytes, 0) AS rodata_bytes,
    pages_owned * 4096 AS mapped_bytes
FROM file_history
JOIN chosen USING (host, pool)
WHERE time >= begin_time AND time < end_time;

-- ---------------------------------------------------------------------------------------------------- savings over time

-- The last figures of each source in every step of time, e.g. FROM host_savings(INTERVAL 5 MINUTE). To get a total, add
-- up the sources of one step; a source that said nothing in a step has no row there.
CREATE OR REPLACE MACRO host_savings(step) AS TABLE
SELECT
    time_bucket(step, time) AS step_time, host,
    arg_max(saved_bytes, time) AS saved_bytes,
    arg_max(net_saved_bytes, time) AS net_saved_bytes,
    arg_max(given_up_bytes, time) AS given_up_bytes,
    arg_max(area_bytes, time) AS area_bytes,
    arg_max(overhead_bytes, time) AS overhead_bytes,
    arg_max(possible_saved_bytes, time) AS possible_saved_bytes,
    arg_max(domains, time) AS domains
FROM host_history
GROUP BY ALL ORDER BY ALL;

CREATE OR REPLACE MACRO pool_savings(step) AS TABLE
SELECT
    time_bucket(step, time) AS step_time, host, pool,
    arg_max(saved_bytes, time) AS saved_bytes,
    arg_max(net_saved_bytes, time) AS net_saved_bytes,
    arg_max(given_up_bytes, time) AS given_up_bytes,
    arg_max(area_bytes, time) AS area_bytes,
    arg_max(overhead_bytes, time) AS overhead_bytes,
    arg_max(possible_saved_bytes, time) AS possible_saved_bytes,
    arg_max(pages_shared, time) AS pages_shared,
    arg_max(pages_sharing, time) AS pages_sharing,
    arg_max(area_fill_ratio, time) AS area_fill_ratio,
    arg_max(grants_used, time) AS grants_used,
    arg_max(domains, time) AS domains
FROM pool_history
GROUP BY ALL ORDER BY ALL;

CREATE OR REPLACE MACRO domain_savings(step) AS TABLE
SELECT
    time_bucket(step, time) AS step_time, host, pool, domain,
    arg_max(given_up_bytes, time) AS given_up_bytes,
    arg_max(share_bytes, time) AS share_bytes,
    arg_max(net_bytes, time) AS net_bytes,
    arg_max(possible_net_bytes, time) AS possible_net_bytes
FROM domain_history
GROUP BY ALL ORDER BY ALL;

-- Each host's highest and mean figures. The timer is regular, so the mean of the lines is the mean over time.
CREATE OR REPLACE VIEW host_extremes AS
SELECT
    host,
    max(saved_bytes) AS saved_bytes_max, arg_max(time, saved_bytes) AS saved_bytes_max_time,
    avg(saved_bytes)::BIGINT AS saved_bytes_mean,
    max(net_saved_bytes) AS net_saved_bytes_max, arg_max(time, net_saved_bytes) AS net_saved_bytes_max_time,
    avg(net_saved_bytes)::BIGINT AS net_saved_bytes_mean
FROM host_history
GROUP BY host;

CREATE OR REPLACE VIEW pool_extremes AS
SELECT
    host, pool,
    max(saved_bytes) AS saved_bytes_max, arg_max(time, saved_bytes) AS saved_bytes_max_time,
    avg(saved_bytes)::BIGINT AS saved_bytes_mean,
    max(net_saved_bytes) AS net_saved_bytes_max, arg_max(time, net_saved_bytes) AS net_saved_bytes_max_time,
    avg(net_saved_bytes)::BIGINT AS net_saved_bytes_mean
FROM pool_history
GROUP BY host, pool;

-- ------------------------------------------------------------------------------------------------------------ counters

-- How much each counter grew within the window. What a process had counted before its first line here is not in it,
-- unless that process began within the window. A smaller value than the one before: it began anew, at 0.
CREATE OR REPLACE VIEW counters AS
WITH
    said AS (
        UNPIVOT (
            SELECT
                host, program, pid, coalesce(pool, '') AS pool, coalesce(domain, '') AS domain, time, sequence,
                published_pages_total, mismatched_pages_total, granted_pages_total, cpu_ns_total,
                CASE WHEN event = 'domain.statistics' THEN dropped_pages_total END AS dropped_pages_total
            FROM events
            WHERE event IN ('host.statistics', 'pool.statistics', 'domain.statistics')
        )
        ON published_pages_total, mismatched_pages_total, granted_pages_total, cpu_ns_total, dropped_pages_total
        INTO NAME counter VALUE said_value
    ),
    steps AS (
        SELECT
            *,
            lag(said_value) OVER (PARTITION BY host, program, pid, pool, domain, counter ORDER BY time, sequence)
                AS value_before
        FROM said
    ),
    began AS (SELECT DISTINCT host, pid FROM events WHERE event = 'broker.started')
SELECT
    host, program, pool, domain, counter,
    sum(CASE
        WHEN value_before IS NULL THEN CASE WHEN began.pid IS NULL THEN 0 ELSE said_value END
        WHEN said_value >= value_before THEN said_value - value_before
        ELSE said_value
    END)::BIGINT AS growth
FROM steps
LEFT JOIN began USING (host, pid)
GROUP BY ALL;

-- --------------------------------------------------------------------------------------------------------- why not more

-- Files that are not shared, by reason. `files`, `bytes`: how it is at the end of the window; `files_said`,
-- `bytes_said`: all that was said in it, files that were refused again counted again.
--   scan    the agent leaves them out; it says how many whenever that changes: the last line of each source counts
--   report  the broker did not take them: added up since the domain joined last
--   grant   the broker gave no grants: added up
--   attach  a program asked and got the plain file: added up; sizes are not said
CREATE OR REPLACE VIEW refusals AS
WITH
    said AS (
        SELECT
            host, program, pid, pool, domain, reason, time, sequence, files, file_bytes,
            CASE WHEN event = 'files.plain' THEN 'attach' ELSE stage END AS stage
        FROM events
        WHERE event IN ('files.refused', 'files.plain')
    ),
    joined AS (
        SELECT host, pool, domain, max(time) AS joined
        FROM events WHERE event = 'domain.joined' AND program = 'broker' GROUP BY ALL
    ),
    scans AS (
        SELECT host, program, pool, domain, reason, stage,
            arg_max(files, (time, sequence)) AS files, arg_max(file_bytes, (time, sequence)) AS bytes,
            sum(files) AS files_said, sum(file_bytes) AS bytes_said, max(time) AS last_time
        FROM said WHERE stage = 'scan' GROUP BY ALL
    ),
    others AS (
        SELECT host, program, pool, domain, reason, stage,
            coalesce(sum(files) FILTER (WHERE stage <> 'report' OR joined IS NULL OR time >= joined), 0) AS files,
            sum(file_bytes) FILTER (WHERE stage <> 'report' OR joined IS NULL OR time >= joined) AS bytes,
            sum(files) AS files_said, sum(file_bytes) AS bytes_said, max(time) AS last_time
        FROM said LEFT JOIN joined USING (host, pool, domain)
        WHERE stage <> 'scan' GROUP BY ALL
    )
SELECT host, program, pool, domain, stage, reason, files::BIGINT AS files, bytes::BIGINT AS bytes,
    files_said::BIGINT AS files_said, bytes_said::BIGINT AS bytes_said, last_time
FROM (FROM scans UNION ALL BY NAME FROM others);

-- Domains that were turned away, as their broker says.
CREATE OR REPLACE VIEW domain_refusals AS
SELECT
    host, domain, reason, count(*) AS times, max(time) AS last_time, arg_max(error, time) AS error
FROM events
WHERE event = 'domain.refused' AND program = 'broker'
GROUP BY ALL;

-- What else stands in the way: pauses, full grant tables, strikes.
CREATE OR REPLACE VIEW obstacles AS
SELECT
    host, pool, domain, event, reason, count(*) AS times, sum(files)::BIGINT AS files, sum(pages)::BIGINT AS pages,
    max(time) AS last_time, arg_max(error, time) AS error
FROM events
WHERE event IN (
    'pool.paused', 'grants.refused', 'grants.pinned', 'grants.failed', 'peer.strike', 'file.mismatch', 'consumer.hung',
    'domain.unreachable', 'broker.limit', 'agent.limit', 'area.lost', 'store.failed', 'invariants.violated',
    'memory.failed', 'scan.failed', 'mappings.limited'
)
GROUP BY ALL;

-- ------------------------------------------------------------------------------------------------- where the bytes are

-- Slots of the areas by how many domains hold their page (`held`), and by how often it is mapped (`mapped`).
CREATE OR REPLACE VIEW page_owners AS
SELECT host, pool, kind, owners, slots
FROM (
    SELECT host, pool,
        unnest([
            -- generated: owners
            {kind: 'held', owners: '0', slots: slots_held_by_0},
            {kind: 'held', owners: '1', slots: slots_held_by_1},
            {kind: 'held', owners: '2', slots: slots_held_by_2},
            {kind: 'held', owners: '3', slots: slots_held_by_3},
            {kind: 'held', owners: '4_to_7', slots: slots_held_by_4_to_7},
            {kind: 'held', owners: '8_to_15', slots: slots_held_by_8_to_15},
            {kind: 'held', owners: '16_to_31', slots: slots_held_by_16_to_31},
            {kind: 'held', owners: '32_or_more', slots: slots_held_by_32_or_more},
            {kind: 'mapped', owners: '1', slots: slots_mapped_1_times},
            {kind: 'mapped', owners: '2', slots: slots_mapped_2_times},
            {kind: 'mapped', owners: '3', slots: slots_mapped_3_times},
            {kind: 'mapped', owners: '4_to_7', slots: slots_mapped_4_to_7_times},
            {kind: 'mapped', owners: '8_to_15', slots: slots_mapped_8_to_15_times},
            {kind: 'mapped', owners: '16_to_31', slots: slots_mapped_16_to_31_times},
            {kind: 'mapped', owners: '32_or_more', slots: slots_mapped_32_or_more_times}
            -- end
        ], recursive := true)
    FROM pool_statistics WHERE is_current
);

-- Bytes by class of page: `reported` by the domains' agents, once for each domain; `mapped` by domains.
CREATE OR REPLACE VIEW page_classes AS
SELECT host, pool, coalesce(domain, '') AS domain, kind, class, bytes
FROM (
    SELECT host, pool, domain,
        unnest([
            -- generated: classes
            {kind: 'reported', class: 'text', bytes: reported_text_bytes},
            {kind: 'reported', class: 'rodata', bytes: reported_rodata_bytes},
            {kind: 'reported', class: 'data', bytes: reported_data_bytes},
            {kind: 'mapped', class: 'text', bytes: mapped_text_bytes},
            {kind: 'mapped', class: 'rodata', bytes: mapped_rodata_bytes},
            {kind: 'mapped', class: 'data', bytes: mapped_data_bytes},
            {kind: 'mapped', class: 'unclassified', bytes: mapped_unclassified_bytes}
            -- end
        ], recursive := true)
    FROM (
        SELECT * FROM pool_statistics WHERE is_current
        UNION ALL BY NAME SELECT * FROM domain_statistics WHERE is_current
    )
)
WHERE bytes IS NOT NULL;

-- Where an area or a grant budget ends.
CREATE OR REPLACE VIEW budgets AS
SELECT
    host, pool, area_bytes, area_max_bytes, area_fill_ratio, unmapped_bytes, slots, pages_published, pages_pending, paused,
    grants_used, grants_max, grants_pinned, domain_grants_max, grants_used / nullif(grants_max, 0) AS grants_fill_ratio
FROM pool_statistics WHERE is_current;

-- What was not read from a disk because the area had it, of pages that are shared now (NULL: of logs from before it was
-- counted), and `dropped_bytes`: page cache that guests gave up in the window, again and again counted.
CREATE OR REPLACE VIEW io_avoided AS
SELECT host, pool, io_avoided_bytes, dropped_bytes
FROM (SELECT host, pool, unread_pages * 4096 AS io_avoided_bytes FROM pool_statistics WHERE is_current)
FULL JOIN (
    SELECT host, pool, (sum(growth) * 4096)::BIGINT AS dropped_bytes
    FROM counters WHERE counter = 'dropped_pages_total'
    GROUP BY ALL
) USING (host, pool);

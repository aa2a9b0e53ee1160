"""The catalogue of events: every kind of line that the two programs log, with its fields, units and reasons.

Everything that is said of events is derived from here: the lines (logs.py), the JSON Schemas (sharearea/schemas), the
tables of docs/events.md (tools/gen_events.py), and the metrics. A name, a field's meaning and a reason code are
stable, since others query them: to change one is to give it another name.

Lines follow the Elastic Common Schema and OpenTelemetry's log model where they have a word, with flat dotted keys; our
own words are `sharearea.` and a name that ends with its unit. A field means the same in every event, and never is a
list of objects or an object: Loki's and Elasticsearch's queries see numbers, texts and lists of texts only. What is not
known is left out of a line; it is never null, and 0 always means none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .wire import Verdict, WithdrawReason

Level = Literal["debug", "info", "warning", "error"]
Type = Literal["integer", "number", "string", "boolean", "strings"]

ECS_VERSION: Final = "8.11.0"

SEVERITY: Final[dict[str, int]] = {"debug": 5, "info": 9, "warning": 13, "error": 17}
"""OpenTelemetry's SeverityNumber of each level."""

MAX_TEXT: Final = 1024
"""Characters of one text in a line; what is longer is cut. Paths, details and names come from peers."""

MAX_PATH_TEXT: Final = 16_384
"""Characters of file.path: a path has 4096 bytes, and a byte that is no text becomes four characters."""

MAX_EXAMPLES: Final = 3
"""Paths that a gathered line names of the files that it counts."""

FAILURES: Final = (
    "permission",
    "symlink",
    "path-too-long",
    "descriptors",
    "busy",
    "special",
    "changed",
    "residency",
    "folder",
    "no-folder",
    "too-deep",
    "io",
)
"""Why the agent could not look at a file or a folder."""


def path_text(path: bytes) -> str:
    """Return a path as lines have it: what is no UTF-8 as backslash and hexadecimal digits."""
    return path.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its key in the line, its type, what one of it is, and what it says.

    `unit` is "" for a text and for a plain number.
    """

    name: str
    key: str
    type: Type
    unit: str
    text: str


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of event. `fields` are always there, `options` where they apply; `reasons`: all codes of event.reason.

    `kind`, `category`, `type`, `outcome` are ECS's; `programs` says who logs it; `gathered`: one line for many.
    """

    name: str
    level: Level
    message: str
    programs: tuple[str, ...]
    kind: str
    category: str
    type: tuple[str, ...]
    outcome: str
    fields: tuple[str, ...]
    options: tuple[str, ...]
    reasons: tuple[str, ...]
    gathered: bool


FIELDS: Final[dict[str, Field]] = {}
EVENTS: Final[dict[str, Kind]] = {}

OWNER_BUCKETS: Final = ("0", "1", "2", "3", "4_to_7", "8_to_15", "16_to_31", "32_or_more")
"""Names of the classes in which slots are counted by how many hold, or map, their page."""


def _field(name: str, kind: Type, unit: str, text: str, key: str = "") -> None:
    FIELDS[name] = Field(name, key or f"sharearea.{name}", kind, unit, text)


def _bytes(name: str, text: str) -> None:
    _field(name, "integer", "bytes", text)


def _pages(name: str, text: str) -> None:
    _field(name, "integer", "pages", text)


def _count(name: str, unit: str, text: str) -> None:
    _field(name, "integer", unit, text)


def _text(name: str, text: str, key: str = "") -> None:
    _field(name, "string", "", text, key)


# ------------------------------------------------------------------------------------------------- keys of every line

COMMON: Final[tuple[Field, ...]] = (
    Field("", "@timestamp", "string", "", "When it was written: UTC, RFC 3339, milliseconds."),
    Field("", "log.level", "string", "", "`debug`, `info`, `warning` or `error`."),
    Field("", "message", "string", "", "What this kind of event says, the same in every line of it."),
    Field("", "ecs.version", "string", "", "The version of ECS that the keys follow."),
    Field(
        "", "event.name", "string", "", "The kind of event, by its name in this catalogue (OpenTelemetry's EventName)."
    ),
    Field("", "event.action", "string", "", "The same, under the key that ECS has for it."),
    Field("", "event.kind", "string", "", "`event`, `metric` for figures on a timer, `alert` for what must not be."),
    Field("", "event.category", "strings", "", "ECS's category."),
    Field("", "event.type", "strings", "", "ECS's types."),
    Field("", "event.outcome", "string", "", "`success`, `failure` or `unknown`."),
    Field("", "event.severity", "integer", "", "The level as OpenTelemetry's SeverityNumber: 5, 9, 13 or 17."),
    Field("", "event.module", "string", "", "`sharearea`."),
    Field("", "event.dataset", "string", "", "`sharearea.broker` or `sharearea.agent`."),
    Field("", "event.sequence", "integer", "", "Counts the lines of one process from 1: in a gap, lines were lost."),
    Field("", "service.name", "string", "", "`sharearea` or `sharearea-agent`."),
    Field("", "service.version", "string", "", "The program's version."),
    Field("", "host.name", "string", "", "The machine that wrote the line: the host or dom0, or the guest itself."),
    Field("", "process.pid", "integer", "", "The process that wrote the line."),
)

# ------------------------------------------------------------------------------------------------------------- fields

_text("reason", "Why, as a stable code.", "event.reason")
_text("detail", "Why, in words. Not stable; not to be queried.", "sharearea.detail")
_text("error", "What went wrong, in words. Not stable; not to be queried.", "error.message")
_field("duration_ns", "integer", "ns", "How long it took.", "event.duration")
_text("path", "A file, by the path that its domain reports (below the agent's root).", "file.path")
_field("size_bytes", "integer", "bytes", "The file's size.", "file.size")

_text("pool", "The pool.")
_text("domain", "The domain, by its name in its pool. The guest's own name for its machine is host.name.")
_text("mode", '"share", or "report" for a pool in which nothing is mapped.')
_text("backend", '"local" or "xen".')
_text("kernel", "The hash kernel that was chosen for this processor.")
_text("socket", "Where agents connect.")
_text("rule", "Where the rule that decided was written, as `pools.office.domains[0]`.")
_text("hint", "What to do about it.")
_text("state", '"connected", "absent" (its grants are kept for the grace time) or "barred" (it struck out).')
_text("stage", 'When it was refused: "scan" (the agent did not report it), "report" or "grant" (the broker).')
_text("paused", "Why nothing is published now; left out when publishing goes on.")
_text("sink", '"stderr" or "file".')
_text("consumer", "A program that uses shared files, as `pid 1234 uid 0`.")
_field("consumers", "strings", "", "Programs that use shared files, as `pid 1234 uid 0`.")
_field("folders", "strings", "", "The designated folders.")
_field("examples", "strings", "", f"Paths of up to {MAX_EXAMPLES} of the files that are counted, cut to {MAX_TEXT}.")
_field("violations", "strings", "", "Codes of the invariants that do not hold.")
_field("all", "boolean", "", "Whether every file is meant.")
_count("uid", "", "The user that the peer runs as (`local`).")
_count("domid", "", "Xen's number of the domain (`xen`).")
_count("consumer_pid", "", "A program's process number, in the guest.")
_count("segment", "", "A segment's number.")
_count("rank", "", "The place of this file among the files of its pool, from 1.")

_count("pools", "pools", "Pools.")
_count("domains", "domains", "Domains that are connected; of a file, domains that hold it.")
_count("connections", "connections", "Connections of agents.")
_count("owners", "files", "Files that domains hold grants for.")
_count("owners_dropped", "files", "Owners whose entries in the table of grants were not there.")
_count("entries_without_owner", "entries", "Entries in the table of grants that no owner had.")
_count("changes", "changes", "Changes that were to be written.")
_count("strikes", "strikes", "How often this domain was caught, this time included.")
_count("segments", "segments", "Segments of the area.")
_count("slots", "slots", "Slots of the open segments.")
_count("files", "files", "Files.")
_count("contents", "contents", "Distinct contents of files.")
_count("cache_hits", "files", "Files whose fingerprints were in the cache.")
_count("fingerprinted_pages", "pages", "Pages that were read and fingerprinted.")
_count("failed_files", "files", "Files that could not be looked at.")
for _kind in FAILURES:
    _count(f"failed_{_kind.replace('-', '_')}_files", "files", f"Of these, for the reason {_kind}.")
_count("lines", "lines", "Lines that were dropped because they could not be written.")
_count("log_lines_dropped", "lines", "Lines that could not be written since the start.")
_count("attached_files", "files", "Files that programs of the domain have attached, as its agent says.")
_count("owned_files", "files", "Files that the domain holds grants for.")
_count("reports_under_way", "files", "Reported files whose page fingerprints have not all come.")
_count("ignored_files", "files", "Reported files that the broker did not take; `files.refused` says why.")
_count("checked_slots", "slots", "Slots whose bytes were hashed and compared since the last check.")
_count("bad_slots", "slots", "Of these, slots whose bytes are not what the index says.")

_pages("pages", "Pages.")
_pages("known_pages", "Distinct pages that the broker knows, the zero page left out.")
_pages("common_pages", "Of the distinct pages, those that k domains or more hold: what can be shared.")
_pages("distinct_pages", "Distinct pages that the domain holds, the zero page left out.")
_pages("pages_published", "Pages in the area (slots in use).")
_pages("pages_shared", "Pages of the area that at least one domain maps (KSM's word).")
_pages("pages_sharing", "Mappings of pages of the area, over all domains (KSM's word).")
_pages("pages_pending", "Pages that are wanted in the area and on their way.")
_pages("published_pages_total", "Pages that were published since the broker started.")
_pages("mismatched_pages_total", "Pages since the start whose bytes were not what was reported.")
_pages("granted_pages_total", "Pages that were granted since the start.")
_pages("dropped_pages_total", "Page cache that agents say their kernels gave up since they started.")
_pages("unread_pages", "Shared pages that were never read from a disk, as agents say (docs/cold-start.md).")
_pages("zero_pages", "Resident pages that are all zeros, as agents say: counted apart, never shared.")
_pages("self_shared_pages", "Pages that a domain holds more than once: copies beyond the first, zero pages left out.")
_pages("attached_pages", "Pages of the area that programs of the domain map, as its agent says.")
_pages("owned_pages", "Pages of the area that the domain may map.")
_pages("held_pages", "Pages that the domain may map or still maps (on `xen`, pinned ones included).")
_pages("pages_in_area", "Pages of the file that are in the area.")
_pages("pages_owned", "Pages of the area that domains may map for this file, over all domains.")
_pages("grants_used", "Entries of the area's table of grants that are in use (`xen`).")
_pages("grants_max", "Entries that there may be (`xen`).")
_pages("grants_pinned", "Of the used ones, entries that domains released and still map (`xen`).")
_pages("domain_grants_max", "Entries that one domain may have (`xen`).")
for _name in OWNER_BUCKETS:
    _words = _name.replace("_", " ")
    _count(f"slots_held_by_{_name}", "slots", f"Slots whose page {_words} domains hold.")
for _name in OWNER_BUCKETS[1:]:
    _words = _name.replace("_", " ")
    _count(
        f"slots_mapped_{_name}_times", "slots", f"Slots that are mapped {_words} times: by as many domains, or files."
    )

_bytes("file_bytes", "Sizes of the files, added up.")
_bytes("ignored_bytes", "Sizes of the ignored files, added up.")
_bytes("read_bytes", "Bytes that were read.")
_bytes("area_bytes", "Memory that the area takes, as the kernel or Xen says.")
_bytes("area_max_bytes", "Memory that the area may take.")
_field("area_fill_ratio", "number", "ratio", "area_bytes of area_max_bytes, 0 to 1.")
_bytes("unmapped_bytes", "Memory of the area that no domain maps: the host's expense.")
_bytes(
    "given_up_bytes",
    "Page cache that guests gave up for shared pages: what their kernels dropped, and never more than was granted.",
)
_bytes(
    "saved_bytes", "Memory saved: given_up_bytes less area_bytes. Below 0 while the area costs more than it brought."
)
_bytes("net_saved_bytes", "Net saved: saved_bytes less overhead_bytes.")
_bytes("overhead_bytes", "Bookkeeping of both sides: tables, store, agents, and on `xen` a part for each mapping.")
_bytes("table_bytes", "Memory of the fingerprint table.")
_bytes("store_bytes", "Size of the store, which all pools have in common.")
_bytes("share_bytes", "The domain's part of the slots that it may map; those who map a slot pay it in equal parts.")
_bytes("net_bytes", "given_up_bytes less share_bytes.")
_bytes("agent_private_bytes", "Private memory of the domain's agent.")
_bytes("broker_private_bytes", "Anonymous memory of the broker.")
_bytes("memory_bytes", "MemTotal, of the domain or of the host.")
_bytes("available_bytes", "MemAvailable, of the domain or of the host.")
_field("pressure", "integer", "0.01 %", "Memory pressure (PSI, some avg10) in the domain.")
_bytes("target_bytes", "The domain's memory target (`xen`).")
_bytes("taken_bytes", "What was taken of the domain's memory (`xen`).")
_bytes("entitled_bytes", "The memory target before anything was taken (`xen`).")
_bytes("reported_text_bytes", "Reported file pages that are executable text (ELF segments that may be executed).")
_bytes("reported_rodata_bytes", "Reported file pages that are read-only data of executables and libraries.")
_bytes("reported_data_bytes", "Reported file pages of every other kind.")
_bytes("mapped_text_bytes", "Granted pages that are executable text.")
_bytes("mapped_rodata_bytes", "Granted pages that are read-only data of executables and libraries.")
_bytes("mapped_data_bytes", "Granted pages of every other kind.")
_bytes("mapped_unclassified_bytes", "Granted pages of files that were not reported again since the broker restarted.")
_bytes(
    "possible_saved_bytes",
    "What sharing every page that k domains hold would save: of one copy for each domain, all but one.",
)
_bytes("possible_given_up_bytes", "What the domain would give up if every page that k domains hold were shared.")
_bytes("possible_share_bytes", "What the domain would then pay: its part of those pages.")
_bytes("possible_net_bytes", "possible_given_up_bytes less possible_share_bytes.")
_bytes(
    "held_bytes", "The file's reported pages, once for each file that has them: what its copies take without sharing."
)
_bytes("text_bytes", "Of the file's reported pages, executable text.")
_bytes("rodata_bytes", "Of the file's reported pages, read-only data.")

_field("retry_ms", "integer", "ms", "Until it is tried again.")
_field("grace_left_ms", "integer", "ms", "Until the absent domain's grants end.")
_field("barred_ms", "integer", "ms", "Until the barred domain may come again.")
_field("cpu_ns_total", "integer", "ns", "Processor time of the broker since its start.")


SIGNED: Final = frozenset({"saved_bytes", "net_saved_bytes", "net_bytes"})
"""Numbers that may be below 0."""


# ------------------------------------------------------------------------------------------------------------- events

BROKER: Final = ("broker",)
AGENT: Final = ("agent",)
BOTH: Final = ("broker", "agent")


def _event(
    name: str,
    level: Level,
    message: str,
    programs: tuple[str, ...],
    ecs: str,
    fields: str = "",
    options: str = "",
    reasons: tuple[str, ...] = (),
    *,
    gathered: bool = False,
) -> None:
    """Add an event. `ecs`: category, types and outcome, as `file change,access success`; a kind may come first."""
    words = ecs.split()
    kind = words.pop(0) if len(words) == 4 else "event"
    category, types, outcome = words
    always, sometimes = fields.split(), options.split()
    if reasons and "reason" not in sometimes:
        always.append("reason")
    if "agent" in programs:
        # Every line of an agent says whose it is; the pool is known once the broker has said it.
        sometimes += [name for name in ("domain", "pool") if name not in always and name not in sometimes]
    EVENTS[name] = Kind(
        name,
        level,
        message,
        programs,
        kind,
        category,
        tuple(types.split(",")),
        outcome,
        tuple(always),
        tuple(sometimes),
        reasons,
        gathered,
    )


REPORT_REFUSALS: Final = tuple(
    verdict.code for verdict in Verdict if verdict not in (Verdict.KNOWN, Verdict.WANTED, Verdict.REPORT_ONLY)
)
SCAN_REFUSALS: Final = ("too-small", "too-large", "excluded", "not-included", "not-world-readable", "other-file-system")
PLAIN_REASONS: Final = (
    "no-broker",
    "not-designated",
    "not-offered",
    "lease-refused",
    "lease-broken",
    "changed",
    "deleted",
    "moving",
    "closed",
    "withdrawn",
    "bytes-differed",
    "no-room",
    "detached",
    "suspending",
    "user-mappings-off",
    "no-grant-device",
    "denied",
    *(verdict.code for verdict in Verdict if verdict not in (Verdict.KNOWN, Verdict.WANTED, Verdict.DETACHED)),
)
WITHDRAWALS: Final = tuple(reason.code for reason in WithdrawReason)
RETURNS: Final = (
    "broker",
    "writer",
    "changed",
    "closed",
    "more-offered",
    "bytes-differed",
    "no-room",
    "detached",
    "suspending",
    "other-area",
    "other-key",
)
REFUSALS: Final = (
    "disabled",
    "unknown-backend",
    "bad-name",
    "no-guest",
    "no-matching-rule",
    "no-pool",
    "policy-error",
    "protocol-version",
    "struck-out",
    "already-connected",
    "still-leaving",
    "pool-full",
)
EXPULSIONS: Final = ("malformed", "no-hello", "no-answer", "area-lost")
STRIKES: Final = ("malformed", "no-hello", "no-answer", "root-mismatch", "page-mismatch", "struck-out")
AREA_BEGINNINGS: Final = (
    "no-earlier-area",
    "segment-size-changed",
    "table-too-small",
    "segments-not-kept",
    "segment-refused",
    "bytes-differ",
    "area-gone",
    "area-replaced",
    "segments-missing",
    "report-only",
)
VIOLATIONS: Final = ("mappings-differ", "grants-differ", "slots-beyond-area", "bytes-differ")

# Life.
_event("broker.started", "info", "the broker serves", BROKER, "process start success", "pools kernel backend", "socket")
_event("broker.stopped", "info", "the broker stopped", BROKER, "process end success", "log_lines_dropped")
_event("agent.started", "info", "the agent runs", AGENT, "process start success", "domain folders")
_event("agent.stopped", "info", "the agent stopped", AGENT, "process end success", "log_lines_dropped")
_event(
    "broker.lost",
    "warning",
    "the connection to the broker ended; consumers keep what they have",
    AGENT,
    "network connection,end failure",
    "error",
)
_event(
    "broker.unreachable",
    "warning",
    "the broker cannot be reached; it is tried again",
    AGENT,
    "network connection,start failure",
    "error",
)
_event(
    "config.warning",
    "warning",
    "the configuration says something that cannot have the effect one would expect",
    BROKER,
    "configuration info unknown",
    "detail",
)
_event(
    "broker.limit",
    "error",
    "the broker is at a limit of this host; it goes on with what it has",
    BROKER,
    "host info failure",
    "error",
)
_event(
    "agent.limit",
    "error",
    "the agent is at a limit of this host; it goes on with what it has",
    AGENT,
    "host info failure",
    "error",
)
_event(
    "log.dropped",
    "warning",
    "lines were dropped because they could not be written; now they can again",
    BOTH,
    "process info failure",
    "lines sink",
)

# Area and store.
_event(
    "area.adopted",
    "info",
    "the sharing area of the last broker is served again",
    BROKER,
    "host start success",
    "pool segments owners",
)
_event(
    "area.opened",
    "info",
    "a pool begins with an empty sharing area",
    BROKER,
    "host start success",
    "pool",
    "detail",
    AREA_BEGINNINGS,
)
_event(
    "area.lost",
    "error",
    "the sharing area is gone; its pool begins anew with another one",
    BROKER,
    "host end failure",
    "pool domains owners",
)
_event(
    "segment.moved",
    "info",
    "pages of a thinly used segment are in a newer one",
    BROKER,
    "host change success",
    "pool segment pages",
)
_event(
    "segment.closed", "info", "a segment's memory went back to the host", BROKER, "host change success", "pool segment"
)
_event(
    "store.set_aside",
    "warning",
    "the store could not be used; a fresh one begins",
    BROKER,
    "database creation failure",
    "error",
)
_event(
    "store.failed",
    "error",
    "the store could not be written; nothing of the transaction is in force",
    BROKER,
    "database change failure",
    "error changes",
)

# Domains.
_event(
    "domain.joined",
    "info",
    "a domain shares in its pool",
    BOTH,
    "session start success",
    "domain pool",
    "rule uid domid",
)
_event(
    "domain.refused",
    "warning",
    "a domain may not share",
    BOTH,
    "network connection,denied failure",
    "error",
    "domain uid domid",
    REFUSALS + EXPULSIONS,
)
_event(
    "domain.unreachable",
    "warning",
    "a domain offers rings that cannot be used",
    BROKER,
    "network connection,start failure",
    "domid error",
)
_event(
    "domain.left",
    "info",
    "a domain's agent is gone; its grants are kept for the grace time",
    BROKER,
    "session end success",
    "domain pool detail",
)
_event(
    "domain.detached",
    "info",
    "a domain's programs go back to their plain files, by the operator's wish",
    BROKER,
    "configuration change success",
    "pool domain",
)
_event(
    "domain.reattached",
    "info",
    "a detached domain may share again",
    BROKER,
    "configuration change success",
    "pool domain",
)
_event(
    "domain.suspending",
    "info",
    "this domain is about to be suspended; consumers go back to their plain files",
    AGENT,
    "host change success",
    "attached_files",
)
_event(
    "domain.restored",
    "info",
    "this domain goes on as another one; what was shared is void, and begins anew",
    AGENT,
    "host change success",
    "attached_files",
)
_event(
    "peer.strike",
    "warning",
    "a peer sent what it must not",
    BROKER,
    "network protocol,denied failure",
    "error",
    "domain pool strikes uid domid",
    STRIKES,
)
_event(
    "pool.paused",
    "error",
    "nothing more is published for a while",
    BROKER,
    "host info failure",
    "pool error retry_ms",
    "",
    ("area-full", "store-full"),
)

# Files and pages.
_event(
    "files.shared",
    "info",
    "a domain may map files of which pages are in the area",
    BROKER,
    "file access success",
    "pool domain files pages file_bytes examples",
    gathered=True,
)
_event(
    "files.refused",
    "info",
    "files are not shared",
    BOTH,
    "file access failure",
    "stage files file_bytes",
    "pool domain examples",
    tuple(dict.fromkeys(REPORT_REFUSALS + SCAN_REFUSALS)),
    gathered=True,
)
_event(
    "files.withdrawn",
    "info",
    "a domain is asked to bring the programs of these files back to the plain files",
    BROKER,
    "file change success",
    "pool domain files",
    "pages file_bytes examples",
    WITHDRAWALS,
    gathered=True,
)
_event(
    "files.returned",
    "info",
    "programs go back to the plain files",
    AGENT,
    "file change success",
    "files pages file_bytes",
    "examples",
    RETURNS,
    gathered=True,
)
_event(
    "files.plain",
    "info",
    "programs asked for shared files and got plain ones",
    AGENT,
    "file access failure",
    "files",
    "examples",
    tuple(dict.fromkeys(PLAIN_REASONS)),
    gathered=True,
)
_event(
    "pages.published",
    "info",
    "pages are in the sharing area",
    BROKER,
    "host change success",
    "pool domain pages",
    gathered=True,
)
_event(
    "pages.granted",
    "info",
    "a domain may map pages",
    BROKER,
    "host access success",
    "pool domain files pages",
    gathered=True,
)
_event(
    "pages.released",
    "info",
    "a domain let go of pages",
    BROKER,
    "host change success",
    "pool domain files pages",
    gathered=True,
)
_event(
    "pages.revoked",
    "info",
    "grants ended that the domain had not released",
    BROKER,
    "host change success",
    "pool domain files pages",
    "",
    ("grace-over", "not-held", "grants-failed"),
    gathered=True,
)
_event(
    "grants.refused",
    "warning",
    "grants were refused: the table or the domain's part of it is full",
    BROKER,
    "host access failure",
    "pool domain files pages",
    gathered=True,
)
_event(
    "grants.pinned",
    "warning",
    "a domain still maps pages whose grants it has released; they stay counted against it",
    BROKER,
    "host access unknown",
    "pool domain pages",
    gathered=True,
)
_event(
    "grants.failed",
    "error",
    "grants could not be written into the area's table; none of them is in force",
    BROKER,
    "host access failure",
    "pool error files",
)
_event(
    "grants.reconciled",
    "warning",
    "after a restart, owners and entries of the area's table were made the same",
    BROKER,
    "host change success",
    "pool owners_dropped entries_without_owner",
)
_event(
    "files.detached",
    "info",
    "consumers go back to their plain files",
    AGENT,
    "configuration change success",
    "files all",
)
_event("files.reattached", "info", "consumers may share again", AGENT, "configuration change success")
_event(
    "file.mismatch",
    "error",
    "a consumer found other bytes in the area than in the file; the file stays plain",
    AGENT,
    "alert file access failure",
    "path consumer",
)

# Memory.
for _event_name, _message in (
    ("memory.taken", "a domain's memory target was lowered by what it gave up"),
    ("memory.returned", "a domain's memory target was raised again"),
):
    _event(
        _event_name,
        "info",
        _message,
        BROKER,
        "host change success",
        "domid target_bytes taken_bytes",
        "pool domain net_bytes",
        ("kept", "taken", "let-go", "short", "silent"),
    )
_event(
    "memory.failed",
    "error",
    "memory targets cannot be read or written; it is tried again",
    BROKER,
    "host change failure",
    "error",
)

# The agent's eyes and its programs.
_event(
    "scan.finished",
    "info",
    "the designated folders were looked through",
    AGENT,
    "file access success",
    "files duration_ns cache_hits fingerprinted_pages read_bytes failed_files",
    " ".join(f"failed_{kind.replace('-', '_')}_files" for kind in FAILURES),
)
_event(
    "scan.failed",
    "error",
    "part of the designated folders could not be looked at",
    AGENT,
    "file access failure",
    "error",
)
_event(
    "cache.noticed",
    "info",
    "something about the fingerprint cache or the globs of the broker",
    AGENT,
    "file info unknown",
    "detail",
)
_event(
    "cache.failed",
    "error",
    "the fingerprint cache cannot be used; files are read again when they are wanted",
    AGENT,
    "file access failure",
    "error",
)
_event(
    "watch.limited",
    "warning",
    "not every folder can be watched; the periodic scan finds changes there",
    AGENT,
    "file access failure",
    "error",
    "hint",
)
_event(
    "consumer.refused",
    "warning",
    "a program sent what it must not; its files stay plain",
    AGENT,
    "process access failure",
    "error consumer_pid uid",
)
_event(
    "consumer.hung",
    "error",
    "a program does not put its plain files back while a writer waits",
    AGENT,
    "process info failure",
    "path consumers",
)
_event(
    "mappings.limited",
    "warning",
    "pages of the area cannot be shared with this guest's programs, or not safely",
    AGENT,
    "configuration info unknown",
    "",
    "hint reason",
    ("user-mappings-off", "no-grant-device", "no-shim"),
)

# Figures on a timer.
_CLASSES = "reported_text_bytes reported_rodata_bytes reported_data_bytes "
_MAPPED = "mapped_text_bytes mapped_rodata_bytes mapped_data_bytes mapped_unclassified_bytes "
_event(
    "pool.statistics",
    "info",
    "what a pool shares now",
    BROKER,
    "metric host info success",
    "pool mode domains files contents known_pages common_pages pages_published pages_shared pages_sharing "
    "pages_pending published_pages_total mismatched_pages_total granted_pages_total zero_pages self_shared_pages "
    "dropped_pages_total unread_pages area_bytes area_max_bytes area_fill_ratio segments slots unmapped_bytes "
    "given_up_bytes saved_bytes net_saved_bytes overhead_bytes table_bytes store_bytes possible_saved_bytes "
    + _CLASSES
    + _MAPPED
    + " ".join(f"slots_held_by_{n}" for n in OWNER_BUCKETS)
    + " "
    + " ".join(f"slots_mapped_{n}_times" for n in OWNER_BUCKETS[1:]),
    "paused grants_used grants_max grants_pinned domain_grants_max",
)
_event(
    "domain.statistics",
    "info",
    "what a domain shares now",
    BROKER,
    "metric host info success",
    "pool domain state",
    "uid domid files file_bytes owned_files owned_pages held_pages reports_under_way zero_pages self_shared_pages "
    "distinct_pages common_pages attached_files attached_pages dropped_pages_total unread_pages agent_private_bytes "
    "memory_bytes available_bytes pressure given_up_bytes share_bytes net_bytes ignored_files ignored_bytes strikes "
    "target_bytes entitled_bytes taken_bytes grace_left_ms barred_ms possible_given_up_bytes possible_share_bytes "
    "possible_net_bytes " + _CLASSES + _MAPPED,
)
_event(
    "host.statistics",
    "info",
    "what this host shares now, over all pools",
    BROKER,
    "metric host info success",
    "backend pools domains connections area_bytes given_up_bytes saved_bytes net_saved_bytes overhead_bytes "
    "store_bytes possible_saved_bytes broker_private_bytes cpu_ns_total log_lines_dropped",
    "memory_bytes available_bytes",
)
_event(
    "file.statistics",
    "info",
    "one of the files whose copies take the most",
    BROKER,
    "metric file info success",
    "pool rank path size_bytes domains files pages pages_in_area pages_owned held_bytes possible_saved_bytes",
    "text_bytes rodata_bytes",
)
_event(
    "invariants.checked",
    "info",
    "the index, the area and the grants agree",
    BROKER,
    "host info success",
    "pool checked_slots",
)
_event(
    "invariants.violated",
    "error",
    "the index, the area or the grants do not agree: report it",
    BROKER,
    "alert host info failure",
    "pool violations checked_slots bad_slots",
)

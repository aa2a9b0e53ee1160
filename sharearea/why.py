"""Why a file or a domain does not share: from what broker, agent and configuration say to the rule, state or limit.

Pure: `explain` takes Facts and returns findings, the deciding one first. Asking for the facts is the command line's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .common.explain import EXPLANATIONS, STATES
from .common.globs import compile_name_globs
from .common.units import size_text
from .common.wire import PAGE_SIZE
from .config import BrokerConfig
from .policy import DomainRule, PoolRules

Snapshot = Mapping[str, Any]

_PAUSES: Final = ("area-full", "store-full")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known. Snapshots are as the broker's status socket has them; `broker_error`: why there are none.

    `files`: what domains report under the path. `agent`: what an agent says of the file, `agent_error` why it does not.
    `local_size`: of the file at this path on this host, if there is one.
    """

    subject: str
    config: BrokerConfig | None = None
    config_error: str = ""
    broker_error: str = ""
    status: Snapshot | None = None
    domains: Sequence[Snapshot] = ()
    refused: Sequence[Snapshot] = ()
    files: Sequence[Snapshot] = ()
    agent: Snapshot | None = None
    agent_error: str = ""
    local_size: int | None = None

    @property
    def is_path(self) -> bool:
        """Whether it is a file that is asked about: names of domains have no slash."""
        return "/" in self.subject


@dataclass(frozen=True, slots=True)
class Finding:
    """What keeps it from sharing, or that it shares. `who`: domain or pool; `where`: rule, limit, figures."""

    code: str
    who: str = ""
    where: str = ""
    meaning: str = field(init=False)
    remedy: str = field(init=False)

    def __post_init__(self) -> None:
        found = STATES.get(self.code) or EXPLANATIONS.get(self.code)
        object.__setattr__(
            self, "meaning", found.meaning if found is not None else "a reason that this version does not know"
        )
        object.__setattr__(
            self, "remedy", found.remedy if found is not None else "install the same version on both sides"
        )


def explain(facts: Facts) -> list[Finding]:
    """Return what keeps the file or the domain from sharing, the deciding one first for each domain."""
    found = [*_agent_says(facts), *_path(facts)] if facts.is_path else _domain(facts)
    return list(dict.fromkeys(found))


def _broker(facts: Facts) -> Iterator[Finding]:
    """What keeps everybody from sharing."""
    if facts.status is None:
        yield Finding("broker-not-running", where=facts.broker_error)
        if facts.config is not None and not facts.config.policy.enabled:
            yield Finding("disabled", where="broker.enabled = false")
        if facts.config is not None and facts.config.policy.enabled and not facts.config.policy.pools:
            yield Finding("no-pool")
        return
    if not facts.status["enabled"]:
        yield Finding("disabled", where="broker.enabled = false")
    elif not facts.status["pools"]:
        yield Finding("no-pool")


def _pool(pool: Snapshot) -> Iterator[Finding]:
    """What keeps all of a pool from sharing more."""
    name = pool["pool"]
    if pool["mode"] == "report":
        yield Finding("report-only", name, f"pools.{name}.mode; it would save {_mib(pool['possible_saved_bytes'])}")
    paused = pool.get("paused")
    if paused:
        code = next((code for code in _PAUSES if code in paused), "paused")
        area = f"area {_mib(pool['area_bytes'])} of {_mib(pool['area_max_bytes'])}"
        yield Finding(code, name, f"{paused}; {area}")


# ------------------------------------------------------------------------------------------------------------- domains


def _domain(facts: Facts) -> Iterator[Finding]:
    everybody = list(_broker(facts))
    yield from everybody
    name = facts.subject
    known = [domain for domain in facts.domains if domain["domain"] == name]
    for domain in known:
        yield from _known_domain(facts, domain)
    if known or any(finding.code in ("disabled", "no-pool") for finding in everybody):
        return
    for refused in facts.refused:
        if refused["domain"] == name:
            ago = f"{refused['ago_ms'] / 1000:.0f} s ago"
            yield Finding(refused["reason"], name, f"{ago}: {refused['text']}")
            return
    yield from _stranger(facts)


def _stranger(facts: Facts) -> Iterator[Finding]:
    """A domain that has never come, as far as the broker remembers."""
    if facts.config is None:
        yield Finding("domain-unknown", facts.subject, facts.config_error)
        return
    fitting = [rule for rule in facts.config.policy.domains if _names(rule, facts.subject)]
    if fitting:
        also = f" (and {len(fitting) - 1} more)" if len(fitting) > 1 else ""
        asks = _asks(fitting[0])
        yield Finding("domain-unknown", facts.subject, f"{fitting[0].source} would let it in{asks}{also}")
    else:
        yield Finding("no-matching-rule", facts.subject, "no rule has this name" + _nameless(facts.config))
        if facts.status is not None:
            yield Finding("domain-unknown", facts.subject)


def _names(rule: DomainRule, name: str) -> bool:
    return bool(rule.names) and compile_name_globs(rule.names)(name)


def _asks(rule: DomainRule) -> str:
    wanted = [f"uid {' or '.join(map(str, rule.uids))}"] if rule.uids else []
    wanted += [f"uuid {' or '.join(rule.uuids)}"] if rule.uuids else []
    wanted += [f"label {' or '.join(rule.labels)}"] if rule.labels else []
    return f", with {' and '.join(wanted)}" if wanted else ""


def _nameless(config: BrokerConfig) -> str:
    others = [rule.source for rule in config.policy.domains if not rule.names]
    return f"; {', '.join(others)} ask for a uuid or a label only" if others else ""


def _known_domain(facts: Facts, domain: Snapshot) -> Iterator[Finding]:
    name = f"{domain['domain']} in {domain['pool']}"
    if domain["state"] == "barred":
        yield Finding("barred", name, f"for {domain['barred_ms'] / 1000:.0f} s more")
        return
    if domain["state"] == "absent":
        if domain.get("detached"):
            yield Finding("detached", name)
        yield Finding("agent-gone", name, f"its grants end in {domain['grace_left_ms'] / 1000:.0f} s")
        return
    pool = _pool_of(facts, domain["pool"])
    rules = _rules_of(facts, domain["pool"])
    if domain.get("detached"):
        yield Finding("detached", name, f"{domain['held_pages']} pages are still held" if domain["held_pages"] else "")
    if pool is not None:
        yield from _pool(pool)
    if domain["owned_pages"]:
        yield _sharing_domain(name, domain)
        if not domain["given_up_bytes"]:
            yield Finding("not-dropped", name, f"{_mib(domain['owned_pages'] * PAGE_SIZE)} mapped, nothing given up")
    elif not domain.get("detached") and (pool is None or pool["mode"] != "report"):
        yield from _idle_domain(name, domain, pool, rules)
    for code, counted in sorted(domain.get("ignored", {}).items(), key=lambda item: -item[1]["bytes"]):
        figures = f"{counted['files']} files, {_mib(counted['bytes'])}"
        yield Finding(code, name, "; ".join(filter(None, (figures, _limit(code, rules, domain["pool"])))))
    if pool is not None and pool.get("grants_max") is not None:
        yield from _grants(name, domain, pool)
    if domain.get("strikes"):
        yield Finding("strikes", name, f"{domain['strikes']} times")


def _sharing_domain(name: str, domain: Snapshot) -> Finding:
    return Finding(
        "shared",
        name,
        f"{domain['owned_files']} files, {_mib(domain['owned_pages'] * PAGE_SIZE)} mapped; gave up "
        f"{_mib(domain['given_up_bytes'])}, pays {_mib(domain['share_bytes'])}, net {_mib(domain['net_bytes'])}",
    )


def _idle_domain(name: str, domain: Snapshot, pool: Snapshot | None, rules: PoolRules | None) -> Iterator[Finding]:
    """A connected domain that maps nothing."""
    if domain["reports_under_way"]:
        yield Finding("reporting", name, f"{domain['reports_under_way']} files are on their way")
    if not domain["files"]:
        yield Finding("nothing-reported", name)
        return
    k = rules.k if rules is not None else 2
    if pool is not None and pool["domains"] < k:
        yield Finding("alone", name, f"{pool['domains']} of k = {k} domains are connected")
    elif not domain["common_pages"]:
        yield Finding("nothing-in-common", name, f"k = {k}; {_mib(domain['distinct_pages'] * PAGE_SIZE)} are its own")
    elif pool is not None and not pool["pages_published"]:
        if not pool.get("paused"):
            yield Finding("publishing", name, f"{_mib(domain['common_pages'] * PAGE_SIZE)} in common")
    else:
        yield Finding("no-consumer", name, f"{_mib(domain['common_pages'] * PAGE_SIZE)} in common with others")


def _grants(name: str, domain: Snapshot, pool: Snapshot) -> Iterator[Finding]:
    most = pool.get("domain_grants_max") or pool["grants_max"]
    if domain["held_pages"] >= most:
        yield Finding("grant-budget", name, f"{domain['held_pages']} of {most} entries of one domain")
    elif pool["grants_used"] >= pool["grants_max"]:
        yield Finding("grant-budget", name, f"{pool['grants_used']} of {pool['grants_max']} entries of the pool")


# --------------------------------------------------------------------------------------------------------------- files


def _path(facts: Facts) -> Iterator[Finding]:
    everybody = list(_broker(facts))
    yield from everybody
    if any(finding.code in ("disabled", "no-pool") for finding in everybody):
        return
    for file in facts.files:
        yield from _reported_file(facts, file)
    if not facts.files:
        yield from _unreported_file(facts)


def _reported_file(facts: Facts, file: Snapshot) -> Iterator[Finding]:
    name = f"{file['domain']} in {file['pool']}"
    pool, rules = _pool_of(facts, file["pool"]), _rules_of(facts, file["pool"])
    domain = next((d for d in facts.domains if (d["pool"], d["domain"]) == (file["pool"], file["domain"])), None)
    k = rules.k if rules is not None else 2
    nonzero = file["pages"] - file.get("zero_pages", 0)
    pages = f"{file['pages_in_area']} of {file['pages']} pages in the area, {file['holders']} domains hold it (k = {k})"
    if file["pages_owned"]:
        yield Finding("shared", name, f"{file['pages_owned']} of {file['pages']} pages are mapped from the area")
        return
    if domain is not None and domain.get("detached"):
        yield Finding("detached", name)
        return
    blocked = list(_pool(pool)) if pool is not None else []
    if blocked and (blocked[0].code == "report-only" or not file["pages_in_area"]):
        yield from blocked
        return
    if not nonzero:
        yield Finding("zero-pages" if file["pages"] else "not-resident", name, pages)
    elif not file["pages_in_area"]:
        if file["holders"] < k:
            yield Finding("one-holder", name, pages)
        elif file.get("undelivered"):
            yield Finding("undelivered", name, pages)
        else:
            yield Finding("publishing", name, pages)
    else:
        budget = list(_grants(name, domain, pool)) if domain and pool and pool.get("grants_max") is not None else []
        yield from budget or [Finding("no-consumer", name, pages)]
        if file["pages_in_area"] < nonzero:
            yield Finding("partly", name, pages)
    if facts.status is not None and facts.status["backend"] == "xen" and file.get("text_pages"):
        yield Finding("text-stays", name, f"{file['text_pages']} pages")


def _unreported_file(facts: Facts) -> Iterator[Finding]:
    """No domain reports it, or there is no broker to ask: what do the rules say?"""
    refused = list(_judged(facts))
    yield from refused
    policy = facts.config.policy if facts.config is not None else None
    if facts.status is None or (policy is not None and len(refused) == len(policy.pools)):
        return
    if not facts.domains:
        yield Finding("no-domains")
        return
    for domain in facts.domains:
        name = f"{domain['domain']} in {domain['pool']}"
        if domain.get("reports_under_way"):
            yield Finding("reporting", name, f"{domain['reports_under_way']} files are on their way; it may be one")
        for code in ("quota-files", "quota-bytes", "table-full", "store-full", "root-mismatch"):
            counted = domain.get("ignored", {}).get(code)
            if counted:
                limit = _limit(code, _rules_of(facts, domain["pool"]), domain["pool"])
                said = f"{counted['files']} files; it may be one of them"
                yield Finding(code, name, "; ".join(filter(None, (said, limit))))
    if facts.agent is None:
        yield Finding("not-reported-by-any", where=_sized(facts))


def _judged(facts: Facts) -> Iterator[Finding]:
    if facts.config is None:
        return
    policy = facts.config.policy
    for name, rules in policy.pools.items():
        # Of an unknown size it is judged as one that no limit forbids.
        size = facts.local_size if facts.local_size is not None else rules.max_file_bytes
        verdict, rule = policy.judge(name, facts.subject.encode("utf-8", "surrogateescape"), size)
        if verdict is not None:
            yield Finding(
                verdict.code, name, "; ".join(filter(None, (rule, _sized(facts) if "file_bytes" in rule else "")))
            )


def _sized(facts: Facts) -> str:
    return (
        f"the file at this path on this host has {size_text(facts.local_size)}" if facts.local_size is not None else ""
    )


def _agent_says(facts: Facts) -> Iterator[Finding]:
    """What the agent of one guest knows of the file: it alone sees leases, folders and programs."""
    if facts.agent_error:
        yield Finding("agent-not-running", where=facts.agent_error)
    said = facts.agent
    if said is None:
        return
    if not said["connected"]:
        yield Finding("no-broker", "agent")
    if not said["known"]:
        yield Finding(said["left_out"] or "not-seen-yet", "agent", "a scan is under way" if said["scanning"] else "")
    elif said["attached_pages"]:
        programs = f"{said['programs']} programs"
        yield Finding("shared", "agent", f"{said['attached_pages']} pages are mapped from the area by {programs}")
    elif said["reason"]:
        yield Finding(said["reason"], "agent", f"{said['programs']} programs have it open" if said["programs"] else "")
    else:
        yield Finding("no-consumer", "agent", f"{said['offered_pages']} pages are on offer")


# ------------------------------------------------------------------------------------------------------------- the rest


def _pool_of(facts: Facts, name: str) -> Snapshot | None:
    pools: Sequence[Snapshot] = facts.status["pools"] if facts.status is not None else ()
    return next((pool for pool in pools if pool["pool"] == name), None)


def _rules_of(facts: Facts, name: str) -> PoolRules | None:
    return facts.config.policy.pools.get(name) if facts.config is not None else None


_LIMITS: Final = {
    "too-small": "min_file_bytes",
    "too-large": "max_file_bytes",
    "quota-files": "max_files",
    "quota-bytes": "max_bytes",
    "table-full": "max_pages",
}


def _limit(code: str, rules: PoolRules | None, pool: str) -> str:
    """Return the limit behind a verdict as it is configured."""
    key = _LIMITS.get(code)
    if key is None:
        return (
            f"pools.{pool}.{'include' if code == 'not-included' else 'exclude'}"
            if code in ("excluded", "not-included")
            else ""
        )
    if rules is None:
        return f"pools.{pool}.{key}"
    value = getattr(rules, key)
    return f"pools.{pool}.{key} = {size_text(value) if key.endswith('bytes') else value}"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"

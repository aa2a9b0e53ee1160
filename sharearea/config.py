"""The broker's configuration file: its keys, their defaults, and what has to fit together.

docs/examples/broker.toml shows every key. Reading values and saying what is wrong with them is common/toml_schema.py's,
what the rules mean policy.py's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final, TypeVar

from .common import toml_schema as schema
from .common.globs import MAX_NAME, NAME_CHARACTERS, is_name, name_glob_covers
from .common.toml_schema import Problems, key
from .common.units import GIB, KIB, MIB, TIB, size_text
from .common.wire import MAX_GLOBS, PAGE_SIZE
from .policy import (
    DEFAULT_EXCLUDE,
    MAX_DOMAINS,
    MAX_FILE_SIZE,
    MAX_FILES,
    MAX_GRANTS,
    MAX_PAGES,
    MAX_UID,
    Backend,
    DomainRule,
    Mode,
    Policy,
    PoolRules,
    Reclaim,
    RulesError,
)

SEGMENT_HEADER_BYTES: Final = 2 * MIB  # SA_SEGMENT_HEADER of native/api.h; tests/test_config.py compares the two
MAX_POOLS: Final = 64
MAX_RULES: Final = 1024  # of one pool
MAX_FILE_ROWS: Final = 10_000  # of one pool, in one round

_T = TypeVar("_T")

_HINT: Final = "docs/examples/broker.toml shows every key with its default"
_POOL: Final = PoolRules("default")
_BACKENDS: Final[tuple[Backend, ...]] = ("local", "xen")

XEN_SEGMENT_BYTES: Final = 8 * MIB
"""Default size of a segment on xen: nothing is handed over there, so small ones cost nothing and go back sooner."""

# Keys that only one backend can follow. On the other one their defaults say nothing, so they may stay in the file.
_LOCAL_KEYS: Final = {"socket": "on xen agents come through xenstore and rings in shared memory"}
_XEN_POOL_KEYS: Final = {
    "reclaim": "what a domain drops is the host kernel's at once here",
    "reclaim_floor": "nothing is reclaimed here",
    "reclaim_headroom": "nothing is reclaimed here",
    "max_grants": "there are no grants here",
    "max_grants_per_domain": "there are no grants here",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """What the broker is told: [broker], and the policy that [pools] adds up to.

    Paths are absolute, durations seconds, sizes bytes. `warnings` are faults that stop nothing: `check` shows them.
    """

    enabled: bool = field(default=False, metadata=key(schema.Boolean()))
    backend: Backend = field(default="local", metadata=key(schema.Choice(_BACKENDS)))
    socket: Path = field(
        default=Path("/run/sharearea/broker.sock"), metadata=key(schema.socket_path('"/run/sharearea/broker.sock"'))
    )
    status_socket: Path = field(
        default=Path("/run/sharearea/status.sock"), metadata=key(schema.socket_path('"/run/sharearea/status.sock"'))
    )
    state_dir: Path = field(
        default=Path("/var/lib/sharearea"), metadata=key(schema.AbsolutePath('"/var/lib/sharearea"'))
    )
    log_level: str = field(default="info", metadata=key(schema.Choice(("debug", "info", "warning", "error"))))
    log_file: str = field(default="", metadata=key(schema.OptionalPath('"/var/log/sharearea/broker.log"')))
    events_interval: float = field(default=10.0, metadata=key(schema.Duration(0.1, 3600)))
    status_interval: float = field(default=60.0, metadata=key(schema.Duration(1, 86_400)))
    file_statistics: int = field(default=100, metadata=key(schema.Integer(0, MAX_FILE_ROWS, 100)))
    file_statistics_interval: float = field(default=600.0, metadata=key(schema.Duration(1, 86_400)))
    metrics_listen: str = field(default="", metadata=key(schema.Listen()))
    segment_bytes: int = field(default=64 * MIB, metadata=key(schema.Size(8 * MIB, 256 * MIB, 2 * MIB)))
    store_max_bytes: int = field(default=GIB, metadata=key(schema.Size(16 * MIB, TIB, MIB)))
    grace: float = field(default=30.0, metadata=key(schema.Duration(1, 3600)))
    policy: Policy = field(default_factory=lambda: Policy({}, (), enabled=False))
    warnings: tuple[str, ...] = ()

    @property
    def slots_per_segment(self) -> int:
        """Return how many pages a segment holds: on `local` behind its header, on `xen`, which has none, in all."""
        header = SEGMENT_HEADER_BYTES if self.backend == "local" else 0
        return (self.segment_bytes - header) // PAGE_SIZE

    @classmethod
    def load(cls, path: Path | str) -> BrokerConfig:
        """Read and check a file. Raises ConfigError that lists all of its faults."""
        return cls.parse(schema.read_file(Path(path), _HINT), str(path))

    @classmethod
    def parse(cls, data: bytes, file: str) -> BrokerConfig:
        """Check the text of a file; `file` names it in messages. Raises ConfigError that lists all of its faults."""
        document = schema.parse(data, file, _HINT)
        problems = Problems(file)
        schema.check_keys(document, ("broker", "pools"), "", problems)
        section = document.get("broker", {})
        broker = schema.read_section(cls, section, "broker", problems)
        if broker is not None and broker.backend == "xen" and "segment_bytes" not in section:
            broker = dataclasses.replace(broker, segment_bytes=XEN_SEGMENT_BYTES)
        pools, rules = _read_pools(document.get("pools", {}), _backend(section), problems)
        if broker is not None:
            _check_broker(broker, pools, problems)
        problems.raise_if_any(_HINT)
        assert broker is not None  # or there was a problem
        policy = Policy({pool.name: pool for pool in pools}, rules, enabled=broker.enabled, backend=broker.backend)
        return dataclasses.replace(broker, policy=policy, warnings=tuple(_warnings(policy)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSection:
    """One entry of a pool's `domains`. `local`: the names and the users that may join under them, both; `xen`: names,
    uuids and labels, all that are there.
    """

    name: tuple[str, ...] = field(default=(), metadata=key(schema.ListOf(schema.NameGlob(), 1, or_one=True)))
    uid: tuple[int, ...] = field(
        default=(), metadata=key(schema.ListOf(schema.Integer(0, MAX_UID, 1000), 1, or_one=True))
    )
    uuid: tuple[str, ...] = field(default=(), metadata=key(schema.ListOf(schema.Uuid(), 1, or_one=True)))
    label: tuple[str, ...] = field(default=(), metadata=key(schema.ListOf(schema.Name('"office"'), 1, or_one=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSection:
    """The keys of [pools.NAME]. `default_exclude` puts policy.DEFAULT_EXCLUDE behind `exclude`."""

    domains: tuple[DomainSection, ...] = field(
        default=(), metadata=key(schema.ListOf(schema.Table(DomainSection), 0, MAX_RULES))
    )
    mode: Mode = field(default=_POOL.mode, metadata=key(schema.Choice(("share", "report"))))
    include: tuple[str, ...] = field(default=_POOL.include, metadata=key(schema.ListOf(schema.Glob(), 1, MAX_GLOBS)))
    exclude: tuple[str, ...] = field(default=(), metadata=key(schema.ListOf(schema.Glob(), 0, MAX_GLOBS)))
    default_exclude: bool = field(default=True, metadata=key(schema.Boolean()))
    min_file_bytes: int = field(default=_POOL.min_file_bytes, metadata=key(schema.Size(1, MAX_FILE_SIZE)))
    max_file_bytes: int = field(default=_POOL.max_file_bytes, metadata=key(schema.Size(4 * KIB, MAX_FILE_SIZE)))
    k: int = field(default=_POOL.k, metadata=key(schema.Integer(2, MAX_DOMAINS)))
    max_files: int = field(default=_POOL.max_files, metadata=key(schema.Integer(1, MAX_FILES)))
    max_bytes: int = field(default=_POOL.max_bytes, metadata=key(schema.Size(MIB, 1024 * TIB)))
    max_domains: int = field(default=_POOL.max_domains, metadata=key(schema.Integer(2, MAX_DOMAINS)))
    max_area_bytes: int = field(default=_POOL.max_area_bytes, metadata=key(schema.Size(8 * MIB, 1024 * TIB)))
    max_pages: int = field(default=_POOL.max_pages, metadata=key(schema.Integer(1024, MAX_PAGES)))
    reclaim: Reclaim = field(default=_POOL.reclaim, metadata=key(schema.Choice(("off", "balloon"))))
    reclaim_floor: int = field(default=_POOL.reclaim_floor, metadata=key(schema.Size(32 * MIB, 1024 * TIB)))
    reclaim_headroom: int = field(default=_POOL.reclaim_headroom, metadata=key(schema.Size(8 * MIB, 1024 * TIB)))
    max_grants: int = field(default=_POOL.max_grants, metadata=key(schema.Integer(0, MAX_GRANTS, 32_768)))
    max_grants_per_domain: int = field(
        default=_POOL.max_grants_per_domain, metadata=key(schema.Integer(0, MAX_GRANTS, 16_384))
    )


def _backend(section: object) -> Backend | None:
    # The backend of a file, also of one whose [broker] has faults; None if that is one of them.
    value = section.get("backend", "local") if isinstance(section, dict) else "local"
    return next((backend for backend in _BACKENDS if backend == value), None)


def _read_pools(
    value: object, backend: Backend | None, problems: Problems
) -> tuple[list[PoolRules], tuple[DomainRule, ...]]:
    # Pools without faults, and the rules of all of them in the order of the file.
    if not isinstance(value, dict):
        problems.add("pools", "expected tables", "write [pools.NAME]")
        return [], ()
    if len(value) > MAX_POOLS:
        problems.add("pools", f"has {len(value)} pools, {MAX_POOLS} are allowed", "join some of them")
    pools: list[PoolRules] = []
    rules: list[DomainRule] = []
    for name, table in value.items():
        where = schema.dotted("pools", name)
        if not is_name(name):
            what = f"a pool's name has 1 to {MAX_NAME} characters ({NAME_CHARACTERS})"
            problems.add(where, what, "rename it, as [pools.office]")
        section = schema.read_section(PoolSection, table, where, problems)
        if backend is not None and isinstance(table, dict):
            _check_rules(table.get("domains"), where, backend, problems)
        if section is None or not is_name(name):
            continue
        if backend == "local":
            _check_local_pool(section, where, problems)
        values: dict[str, Any] = {
            f.name: getattr(section, f.name)
            for f in dataclasses.fields(section)
            if f.name not in ("domains", "default_exclude")
        }
        if section.default_exclude:
            values["exclude"] += DEFAULT_EXCLUDE
        try:
            pools.append(PoolRules(name, **values))
        except RulesError as error:
            for fault, what in error.faults:
                problems.add(
                    f"{where}.{fault}", what, "leave some out" if "clude" in fault else "change one of the two"
                )
        rules += [
            DomainRule(name, rule.name, rule.uid, f"{where}.domains[{number}]", rule.uuid, rule.label)
            for number, rule in enumerate(section.domains)
        ]
    return pools, tuple(rules)


def _check_local_pool(section: PoolSection, where: str, problems: Problems) -> None:
    for name, why in _XEN_POOL_KEYS.items():
        if getattr(section, name) != getattr(_POOL, name):
            problems.add(f"{where}.{name}", f"is for the xen backend: {why}", "leave it out")


def _check_rules(entries: object, where: str, backend: Backend, problems: Problems) -> None:
    # Which keys an entry of `domains` has; what is in them, the section says.
    kinds = schema.keys_of(DomainSection)
    for number, entry in enumerate(entries if isinstance(entries, list) else ()):
        if not isinstance(entry, dict):
            continue
        at = f"{where}.domains[{number}]"
        if backend == "local":
            for name in (name for name in ("name", "uid") if name not in entry):
                problems.add(
                    f"{at}.{name}", "is missing and has no default", f"for example {name} = {kinds[name].example}"
                )
            for name in (name for name in ("uuid", "label") if name in entry):
                what = "is for the xen backend: no domain of the local one has a uuid or a label"
                problems.add(f"{at}.{name}", what, "leave it out, and write name and uid")
        elif "uid" in entry:
            what = "is for the local backend: a Xen domain has no uid"
            problems.add(f"{at}.uid", what, "leave it out, and write name (Xen's), uuid or label")
        elif not {"name", "uuid", "label"} & set(entry):
            remedy = 'write at least one of name, uuid and label, for example { name = "web-*" }'
            problems.add(at, "names nobody", remedy)


def _check_broker(broker: BrokerConfig, pools: list[PoolRules], problems: Problems) -> None:
    if broker.backend == "xen":
        for name, why in _LOCAL_KEYS.items():
            if getattr(broker, name) != type(broker).__dataclass_fields__[name].default:
                problems.add(f"broker.{name}", f"is for the local backend: {why}", "leave it out")
    if broker.socket == broker.status_socket:
        problems.add("broker.status_socket", "is the path of broker.socket too", "choose another path")
    for pool in pools:
        if pool.max_area_bytes < broker.segment_bytes:
            problems.add(
                f"{schema.dotted('pools', pool.name)}.max_area_bytes",
                f"{size_text(pool.max_area_bytes)} is less than one segment",
                f"write {size_text(broker.segment_bytes)} (broker.segment_bytes) or more, or smaller segments",
            )


def _warnings(policy: Policy) -> list[str]:
    found: list[str] = []
    if not policy.enabled:
        found.append("every domain is refused: sharing is switched off; write enabled = true under [broker]")
    if not policy.pools:
        found.append("every domain is refused: there is no pool; write [pools.NAME] with a domains list")
    for pool in policy.pools.values():
        where = schema.dotted("pools", pool.name)
        if not any(rule.pool == pool.name for rule in policy.domains):
            found.append(f"{where}: nobody can join, domains is empty")
        for name, globs in (("include", pool.include), ("exclude", pool.exclude)):
            found += [
                f'{where}.{name}: "{glob}" is there {count} times, built-in ones counted'
                for glob, count in Counter(globs).items()
                if count > 1
            ]
    found += _never_matching(policy.domains)
    return found


def _never_matching(rules: tuple[DomainRule, ...]) -> list[str]:
    # A rule is dead when everything that it lets in, some earlier rule has taken.
    found: list[str] = []
    for at, rule in enumerate(rules):
        takers: list[str] = []
        for wanted in _single_rules(rule):
            taker = next((earlier.source for earlier in rules[:at] if _covers(earlier, wanted)), None)
            if taker is None:
                break
            takers.append(taker)
        else:
            by = ", ".join(dict.fromkeys(takers))
            found.append(f"{rule.source} can never match: {by} comes before it and takes all that it names")
    return found


def _single_rules(rule: DomainRule) -> Iterator[DomainRule]:
    # Rules with at most one entry in each list, which together let in what the rule does.
    for names, uids, uuids, labels in product(
        _singles(rule.names), _singles(rule.uids), _singles(rule.uuids), _singles(rule.labels)
    ):
        yield DomainRule(rule.pool, names, uids, rule.source, uuids, labels)


def _singles(entries: tuple[_T, ...]) -> list[tuple[_T, ...]]:
    return [(entry,) for entry in entries] or [()]


def _covers(rule: DomainRule, single: DomainRule) -> bool:
    # Whether the rule lets in all that a rule of _single_rules does: what it asks for, the other one asks for as well.
    if rule.names and not (single.names and any(name_glob_covers(glob, single.names[0]) for glob in rule.names)):
        return False
    return all(
        not mine or (theirs and theirs[0] in mine)
        for mine, theirs in ((rule.uids, single.uids), (rule.uuids, single.uuids), (rule.labels, single.labels))
    )

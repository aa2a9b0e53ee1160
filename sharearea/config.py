"""The broker's configuration file: its keys, their defaults, and what has to fit together.

docs/examples/broker.toml shows every key. Reading values and saying what is wrong with them is common/toml_schema.py's,
what the rules mean policy.py's.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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
    MAX_PAGES,
    MAX_UID,
    DomainRule,
    Policy,
    PoolRules,
    RulesError,
)

SEGMENT_HEADER_BYTES: Final = 2 * MIB  # SA_SEGMENT_HEADER of native/api.h; tests/test_config.py compares the two
MAX_POOLS: Final = 64
MAX_RULES: Final = 1024  # of one pool

_HINT: Final = "docs/examples/broker.toml shows every key with its default"
_POOL: Final = PoolRules("default")
_XEN: Final = "this version has the local backend only"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """What the broker is told: [broker], and the policy that [pools] adds up to.

    Paths are absolute, durations seconds, sizes bytes. `warnings` are faults that stop nothing: `check` shows them.
    """

    enabled: bool = field(default=False, metadata=key(schema.Boolean()))
    backend: str = field(default="local", metadata=key(schema.Choice(("local",), {"xen": _XEN})))
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
    status_interval: float = field(default=60.0, metadata=key(schema.Duration(1, 86_400)))
    segment_bytes: int = field(default=64 * MIB, metadata=key(schema.Size(8 * MIB, 256 * MIB, 2 * MIB)))
    store_max_bytes: int = field(default=GIB, metadata=key(schema.Size(16 * MIB, TIB, MIB)))
    grace: float = field(default=30.0, metadata=key(schema.Duration(1, 3600)))
    policy: Policy = field(default_factory=lambda: Policy({}, (), enabled=False))
    warnings: tuple[str, ...] = ()

    @property
    def slots_per_segment(self) -> int:
        """Return how many pages a segment holds behind its header."""
        return (self.segment_bytes - SEGMENT_HEADER_BYTES) // PAGE_SIZE

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
        broker = schema.read_section(cls, document.get("broker", {}), "broker", problems)
        pools, rules = _read_pools(document.get("pools", {}), problems)
        if broker is not None:
            _check_broker(broker, pools, problems)
        problems.raise_if_any(_HINT)
        assert broker is not None  # or there was a problem
        policy = Policy({pool.name: pool for pool in pools}, rules, enabled=broker.enabled)
        return dataclasses.replace(broker, policy=policy, warnings=tuple(_warnings(policy)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSection:
    """One entry of a pool's `domains`: the names and the users that may join under them."""

    name: tuple[str, ...] = field(metadata=key(schema.ListOf(schema.NameGlob(), 1, or_one=True)))
    uid: tuple[int, ...] = field(metadata=key(schema.ListOf(schema.Integer(0, MAX_UID, 1000), 1, or_one=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSection:
    """The keys of [pools.NAME]. `default_exclude` puts policy.DEFAULT_EXCLUDE behind `exclude`."""

    domains: tuple[DomainSection, ...] = field(
        default=(), metadata=key(schema.ListOf(schema.Table(DomainSection), 0, MAX_RULES))
    )
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


def _read_pools(value: object, problems: Problems) -> tuple[list[PoolRules], tuple[DomainRule, ...]]:
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
        if section is None or not is_name(name):
            continue
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
            DomainRule(name, rule.name, rule.uid, f"{where}.domains[{number}]")
            for number, rule in enumerate(section.domains)
        ]
    return pools, tuple(rules)


def _check_broker(broker: BrokerConfig, pools: list[PoolRules], problems: Problems) -> None:
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
    # A rule is dead when, for each of its users and names, some earlier rule has taken everything.
    found: list[str] = []
    for at, rule in enumerate(rules):
        takers: list[str] = []
        for uid, name in ((uid, name) for uid in rule.uids for name in rule.names):
            earlier = (other for other in rules[:at] if uid in other.uids)
            taker = next((o.source for o in earlier if any(name_glob_covers(glob, name) for glob in o.names)), None)
            if taker is None:
                break
            takers.append(taker)
        else:
            by = ", ".join(dict.fromkeys(takers))
            found.append(f"{rule.source} can never match: {by} comes before it and takes all that it names")
    return found

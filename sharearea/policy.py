"""Who may share what: which domain joins which pool, and which of its files count. Denies by default.

Pure: rules and questions in, answers out; every answer names the rule that gave it. A failure while deciding is a
denial. It leaves to config.py where rules come from, to common/globs.py how globs are matched, and to engine.py
what follows from an answer, quotas that depend on what a domain has reported before included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from .common.globs import (
    MAX_NAME,
    NAME_CHARACTERS,
    GlobError,
    Outcome,
    PathFilter,
    compile_name_globs,
    is_name,
)
from .common.units import GIB, KIB, TIB, size_text
from .common.wire import MAX_FILE_PAGES, MAX_GLOBS, PAGE_SIZE
from .model import Identity, PoolId, Verdict

MAX_FILE_SIZE: Final = MAX_FILE_PAGES * PAGE_SIZE
MAX_DOMAINS: Final = 1024  # of a pool: bounds the memory that the table keeps per page for holders
MAX_FILES: Final = 10_000_000  # of a domain
MAX_PAGES: Final = (1 << 32) - 2  # page ids are uint32, and one of them means "none"
MAX_UID: Final = (1 << 32) - 2  # (uid_t)-1 means "no user"
_LARGEST: Final = 1024 * TIB  # beyond every host of today; keeps sums within 64 bits

DEFAULT_INCLUDE: Final = ("**",)

# Shared pages can be watched through the processor's caches (Flush+Reload). These are the files where watching which
# pages are used, or merely that somebody has them, tells secrets: ciphers, and keys that somebody made readable.
DEFAULT_EXCLUDE: Final = (
    "libcrypto*",
    "libssl*",
    "libgnutls*",
    "libgcrypt*",
    "libsodium*",
    "lib{nettle,hogweed}*",
    "libgmp*",
    "libmbed{crypto,tls}*",
    "libwolfssl*",
    "libtomcrypt*",
    "libbotan*",
    "libcrypt[.-]*",
    "libk5crypto*",
    "libssh*",
    "libotr*",
    "libolm*",
    "lib{nss3,softokn3,freebl3,freeblpriv3}.so*",
    "**/ossl-modules/**",
    "**/engines-*/**",
    "**/cryptography/hazmat/**",
    "**/{Crypto,Cryptodome,nacl}/**",
    "ssh{,d,-agent,-keygen,d-session,d-auth}",
    "gpg{,2,sm,-agent}",
    "*.{key,pem,p12,pfx,jks,keystore,keytab,kdbx,gpg,asc,age}",
    "id_{rsa,dsa,ecdsa,ed25519}*",
    "ssh_host_*",
    "**/.{ssh,gnupg,aws,kube,docker,password-store}/**",
    "**/.{netrc,pgpass,vault-token}",
    "/etc/{shadow,gshadow,passwd,group,sudoers}*",
    "/etc/{ssh,ssl/private,pki/tls/private,letsencrypt,wireguard,ipsec.d,sudoers.d}/**",
    "/etc/NetworkManager/system-connections/**",
    "/{root,proc,sys,dev,run}/**",
)


class RulesError(ValueError):
    """Rules that contradict themselves or pass a bound. `faults` has pairs (key, what is wrong)."""

    def __init__(self, faults: tuple[tuple[str, str], ...]) -> None:
        super().__init__("; ".join(f"{key} {what}" for key, what in faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class DomainRule:
    """Let domains into a pool: the declared name matches one of the globs, and the transport says one of the uids."""

    pool: PoolId
    names: tuple[str, ...]
    uids: tuple[int, ...]
    source: str  # where it was written, as `pools.office.domains[0]`


@dataclass(frozen=True, slots=True)
class PoolRules:
    """What one pool takes: files by path and size, and how much of everything.

    `exclude` goes before `include`. Bounds named max_files, max_bytes are per domain, the others per pool; max_bytes is
    the size of the reported files, max_pages the distinct pages that the fingerprint table holds. Raises RulesError.
    """

    name: PoolId
    include: tuple[str, ...] = DEFAULT_INCLUDE
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    min_file_bytes: int = 16 * KIB
    max_file_bytes: int = MAX_FILE_SIZE
    k: int = 2
    max_files: int = 100_000
    max_bytes: int = 64 * GIB
    max_domains: int = 64
    max_area_bytes: int = 4 * GIB
    max_pages: int = 8 << 20
    filter: PathFilter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = [
            (key, f"must be from {low} to {high}")
            for key, low, high in (
                ("min_file_bytes", 1, MAX_FILE_SIZE),
                ("max_file_bytes", 1, MAX_FILE_SIZE),
                # What one domain alone has, nobody shares; publishing it would only show it to others.
                ("k", 2, MAX_DOMAINS),
                ("max_files", 1, MAX_FILES),
                ("max_bytes", 1, _LARGEST),
                ("max_domains", 1, MAX_DOMAINS),
                ("max_area_bytes", 1, _LARGEST),
                ("max_pages", 1, MAX_PAGES),
            )
            if not low <= getattr(self, key) <= high
        ]
        if not is_name(self.name):
            faults.append(("", f"a pool's name has 1 to {MAX_NAME} characters ({NAME_CHARACTERS})"))
        if self.min_file_bytes > self.max_file_bytes:
            faults.append(
                ("min_file_bytes", f"is larger than max_file_bytes = {self.max_file_bytes}: no file could share")
            )
        if self.k > self.max_domains:
            faults.append(("k", f"is larger than max_domains = {self.max_domains}: no page could ever be shared"))
        for key, globs in (("include", self.include), ("exclude", self.exclude)):
            if len(globs) > MAX_GLOBS:
                faults.append((key, f"has {len(globs)} globs, built-in ones counted; {MAX_GLOBS} are allowed"))
        if not self.include:
            faults.append(("include", "is empty: no file could share"))
        if not faults:
            try:
                object.__setattr__(self, "filter", PathFilter(self.include, self.exclude))
            except GlobError as error:
                faults.append(("include, exclude", f"{error}; {error.remedy}"))
        if faults:
            raise RulesError(tuple(faults))


@dataclass(frozen=True, slots=True)
class Admission:
    """The domain may join this pool; `rule` let it in."""

    pool: PoolId
    rule: DomainRule


@dataclass(frozen=True, slots=True)
class Refusal:
    """The domain may not share. `reason` is a stable code, `text` says what was missing and what to write where.

    Codes: disabled, unknown-backend, bad-name, no-matching-rule, no-pool, policy-error. The text goes to the peer and
    names no rule but one that has the peer's own name in it.
    """

    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a broker. Without a rule that says otherwise, nobody joins and nothing is shared.

    `domains` is in the order of the configuration: the first rule that has both the name and the uid decides. Copies
    `pools`. One object may be used by one thread at a time (judge remembers folders). Raises RulesError.
    """

    pools: Mapping[PoolId, PoolRules]
    domains: tuple[DomainRule, ...]
    enabled: bool = True
    _rules: tuple[tuple[Callable[[str], bool], frozenset[int], DomainRule], ...] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        faults = [
            (name, f"holds the rules of {rules.name}") for name, rules in self.pools.items() if rules.name != name
        ]
        compiled: list[tuple[Callable[[str], bool], frozenset[int], DomainRule]] = []
        for rule in self.domains:
            if not rule.names or not rule.uids:
                faults.append((rule.source, "needs a name and a uid: without one of them it would match nothing"))
            if any(type(uid) is not int or not 0 <= uid <= MAX_UID for uid in rule.uids):
                faults.append((rule.source, f"has a uid that is not a number from 0 to {MAX_UID}"))
            try:
                compiled.append((compile_name_globs(rule.names), frozenset(rule.uids), rule))
            except GlobError as error:
                faults.append((rule.source, f"{error}; {error.remedy}"))
        if faults:
            raise RulesError(tuple(faults))
        object.__setattr__(self, "pools", MappingProxyType(dict(self.pools)))
        object.__setattr__(self, "_rules", tuple(compiled))

    def admit(self, identity: Identity, name: str) -> Admission | Refusal:
        """Say whether the peer that calls itself `name` may join, and which pool. Never raises: failing is denying."""
        try:
            return self._admit(identity, name)
        except Exception as error:
            what = type(error).__name__
            return Refusal("policy-error", f"{what} while deciding: a fault of the broker, and so a denial; report it")

    def _admit(self, identity: Identity, name: str) -> Admission | Refusal:
        if not self.enabled:
            return Refusal("disabled", "sharing is switched off: write enabled = true under [broker] in broker.toml")
        if identity.backend != "local":
            return Refusal("unknown-backend", f"no rule speaks of domains of the {identity.backend} backend")
        if type(name) is not str or not is_name(name):
            text = f"{name!a:.70} is no name for a domain: 1 to {MAX_NAME} characters ({NAME_CHARACTERS}); "
            return Refusal("bad-name", text + "change name under [agent] in agent.toml")
        if not self.pools:
            return Refusal("no-pool", "no pool is configured: write [pools.NAME] with a domains list in broker.toml")
        uid = identity.uid
        if type(uid) is not int:
            raise TypeError("uid")
        near: DomainRule | None = None
        for matches, uids, rule in self._rules:
            if matches(name):
                if uid in uids:
                    if rule.pool not in self.pools:
                        missing = f"{rule.source} names the pool {rule.pool}, which is not configured"
                        return Refusal("no-pool", f"{missing}: write [pools.{rule.pool}] in broker.toml")
                    return Admission(rule.pool, rule)
                near = near or rule
        pool = "NAME" if near is None else near.pool
        other = "" if near is None else f" ({near.source} has the name, for another uid)"
        return Refusal(
            "no-matching-rule",
            f'no rule admits the name "{name}" of uid {uid}{other}: '
            f'add {{ name = "{name}", uid = {uid} }} to domains under [pools.{pool}] in broker.toml',
        )

    def judge(self, pool: PoolId, path: bytes, size: int) -> tuple[Verdict | None, str]:
        """Say whether a file may share: None if so, else the verdict and the rule behind it. Never raises.

        path: absolute, as the domain sees it, in any encoding. size: bytes. A failure is a denial (EXCLUDED).
        """
        try:
            rules = self.pools[pool]
            if size < rules.min_file_bytes:
                return Verdict.TOO_SMALL, f"pools.{pool}.min_file_bytes = {size_text(rules.min_file_bytes)}"
            if size > rules.max_file_bytes:
                return Verdict.TOO_LARGE, f"pools.{pool}.max_file_bytes = {size_text(rules.max_file_bytes)}"
            outcome, glob = rules.filter.decide(path)
            if outcome is Outcome.PASS:
                return None, ""
            if outcome is Outcome.EXCLUDED:
                return Verdict.EXCLUDED, f'pools.{pool}.exclude "{glob}"'
            if outcome is Outcome.NOT_INCLUDED:
                return Verdict.NOT_INCLUDED, f"pools.{pool}.include: no glob of it matches"
            return Verdict.EXCLUDED, "built in: the path is not absolute and normal"
        except Exception as error:
            return Verdict.EXCLUDED, f"built in: {type(error).__name__} while deciding is a denial"

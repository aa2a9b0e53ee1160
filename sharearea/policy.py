"""Who may share what: which domain joins which pool, and which of its files count. Denies by default.

Pure: rules and questions in, answers out; every answer names the rule that gave it. A failure while deciding is a
denial. It leaves to config.py where rules come from, to common/globs.py how globs are matched, and to engine.py
what follows from an answer, quotas that depend on what a domain has reported before included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from .common.globs import (
    MAX_NAME,
    NAME_CHARACTERS,
    GlobError,
    Outcome,
    PathFilter,
    compile_name_globs,
    is_name,
    is_uuid,
)
from .common.units import GIB, KIB, MIB, TIB, size_text
from .common.wire import MAX_FILE_PAGES, MAX_GLOBS, PAGE_SIZE
from .model import DomainId, Identity, PoolId, Verdict

MAX_FILE_SIZE: Final = MAX_FILE_PAGES * PAGE_SIZE
MAX_DOMAINS: Final = 1024  # of a pool: bounds the memory that the table keeps per page for holders
MAX_FILES: Final = 10_000_000  # of a domain
MAX_PAGES: Final = (1 << 32) - 2  # page ids are uint32, and one of them means "none"
MAX_UID: Final = (1 << 32) - 2  # (uid_t)-1 means "no user"
MAX_GRANTS: Final = 65_536 * 512  # entries of the largest grant table that Xen 4.17 was seen to make
_LARGEST: Final = 1024 * TIB  # beyond every host of today; keeps sums within 64 bits

Backend = Literal["local", "xen"]
Reclaim = Literal["off", "balloon"]
Mode = Literal["share", "report"]

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
    """Let domains into a pool. What is empty asks nothing; of what is given, all has to fit.

    On `local`: the declared name matches one of the globs `names`, and the transport says one of `uids`; both are
    needed. On `xen`: Xen's name matches one of `names`, the uuid is one of `uuids`, the label one of `labels`; one of
    the three is needed, and a uid is a fault.
    """

    pool: PoolId
    names: tuple[str, ...]
    uids: tuple[int, ...]
    source: str  # where it was written, as `pools.office.domains[0]`
    uuids: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolRules:
    """What one pool takes: files by path and size, and how much of everything.

    `exclude` goes before `include`. Bounds named max_files, max_bytes are per domain, the others per pool; max_bytes is
    the size of the reported files, max_pages the distinct pages that the fingerprint table holds.

    `mode`: "report" takes reports and counts what sharing would bring; nothing is published, granted or mapped.

    The last five are the xen backend's. `reclaim`: what happens to memory that domains gave up; `reclaim_floor`: no
    domain's target goes below it; `reclaim_headroom`: what a domain's MemAvailable must stay above; max_grants: entries
    of the area's grant table, max_grants_per_domain: of these, for one domain; 0 leaves either to `grant_limits`.
    Raises RulesError.
    """

    name: PoolId
    mode: Mode = "share"
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
    reclaim: Reclaim = "off"
    # The least that Debian's installation guide (release 11, table 3.2) names for a system without a desktop.
    reclaim_floor: int = 256 * MIB
    # What a guest can use up between two reports of its agent (10 s) and the answer of its balloon (2 s), at 10 MiB/s.
    reclaim_headroom: int = 128 * MIB
    max_grants: int = 0
    max_grants_per_domain: int = 0
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
                ("reclaim_floor", 1, _LARGEST),
                ("reclaim_headroom", 1, _LARGEST),
                ("max_grants", 0, MAX_GRANTS),
                ("max_grants_per_domain", 0, MAX_GRANTS),
            )
            if not low <= getattr(self, key) <= high
        ]
        if self.mode not in ("share", "report"):
            faults.append(("mode", 'must be "share" or "report"'))
        if self.reclaim not in ("off", "balloon"):
            faults.append(("reclaim", 'must be "off" or "balloon"'))
        if self.max_grants and self.max_grants_per_domain > self.max_grants:
            faults.append(("max_grants_per_domain", f"is larger than max_grants = {self.max_grants}"))
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

    def grant_limits(self, entries: int) -> tuple[int, int]:
        """Return how many grants the pool, and one domain of it, may have in a table of at most `entries` of them.

        Left to us, a domain gets half: enough for two clones to share all that the table can carry, and what one
        domain pins for ever leaves the others a table to share with.
        """
        pool = min(self.max_grants or entries, entries)
        return pool, min(self.max_grants_per_domain or (pool + 1) // 2, pool)


@dataclass(frozen=True, slots=True)
class Admission:
    """The domain may join this pool, and is called `domain` there; `rule` let it in."""

    pool: PoolId
    rule: DomainRule
    domain: DomainId


@dataclass(frozen=True, slots=True)
class Refusal:
    """The domain may not share. `reason` is a stable code, `text` says what was missing and what to write where.

    Codes: disabled, unknown-backend, bad-name, no-guest, no-matching-rule, no-pool, policy-error. The text goes to the
    peer and names no rule but one that has the peer's own name or uuid in it.
    """

    reason: str
    text: str


_NO_POOL: Final = Refusal("no-pool", "no pool is configured: write [pools.NAME] with a domains list in broker.toml")


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A rule, ready to be asked."""

    rule: DomainRule
    has_name: Callable[[str], bool] | None  # None: the rule asks for no name
    uids: frozenset[int]
    uuids: frozenset[str]
    labels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules of a broker. Without a rule that says otherwise, nobody joins and nothing is shared.

    `domains` is in the order of the configuration: the first rule that fits decides. Rules are read as `backend` has
    them (see DomainRule), and a peer of another backend fits none. Copies `pools`. One object may be used by one thread
    at a time (judge remembers folders). Raises RulesError.
    """

    pools: Mapping[PoolId, PoolRules]
    domains: tuple[DomainRule, ...]
    enabled: bool = True
    backend: Backend = "local"
    _rules: tuple[_Compiled, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        faults = [
            (name, f"holds the rules of {rules.name}") for name, rules in self.pools.items() if rules.name != name
        ]
        compiled: list[_Compiled] = []
        for rule in self.domains:
            faults += [(rule.source, what) for what in _faults_of(rule, self.backend)]
            try:
                compiled.append(
                    _Compiled(
                        rule,
                        compile_name_globs(rule.names) if rule.names else None,
                        frozenset(rule.uids),
                        frozenset(rule.uuids),
                        frozenset(rule.labels),
                    )
                )
            except GlobError as error:
                faults.append((rule.source, f"{error}; {error.remedy}"))
        if faults:
            raise RulesError(tuple(faults))
        object.__setattr__(self, "pools", MappingProxyType(dict(self.pools)))
        object.__setattr__(self, "_rules", tuple(compiled))

    def admit(self, identity: Identity, name: str) -> Admission | Refusal:
        """Say whether the peer that calls itself `name` may join, which pool, and as whom.

        On `local` it joins under `name`. On `xen` what it calls itself means nothing: it is known by what dom0 wrote,
        as domain_name() says. Never raises: failing is denying.
        """
        try:
            return self._admit(identity, name)
        except Exception as error:
            what = type(error).__name__
            return Refusal("policy-error", f"{what} while deciding: a fault of the broker, and so a denial; report it")

    def _admit(self, identity: Identity, name: str) -> Admission | Refusal:
        if not self.enabled:
            return Refusal("disabled", "sharing is switched off: write enabled = true under [broker] in broker.toml")
        if identity.backend != self.backend:
            return Refusal("unknown-backend", f"no rule speaks of domains of the {identity.backend} backend")
        if self.backend == "xen":
            return self._admit_xen(identity)
        return self._admit_local(identity, name)

    def _admit_local(self, identity: Identity, name: str) -> Admission | Refusal:
        if type(name) is not str or not is_name(name):
            text = f"{name!a:.70} is no name for a domain: 1 to {MAX_NAME} characters ({NAME_CHARACTERS}); "
            return Refusal("bad-name", text + "change name under [agent] in agent.toml")
        if not self.pools:
            return _NO_POOL
        uid = identity.uid
        if type(uid) is not int:
            raise TypeError("uid")
        near: DomainRule | None = None
        for known in self._rules:
            if known.has_name is not None and known.has_name(name):
                if uid in known.uids:
                    return self._join(known.rule, name)
                near = near or known.rule
        pool = "NAME" if near is None else near.pool
        other = "" if near is None else f" ({near.source} has the name, for another uid)"
        return Refusal(
            "no-matching-rule",
            f'no rule admits the name "{name}" of uid {uid}{other}: '
            f'add {{ name = "{name}", uid = {uid} }} to domains under [pools.{pool}] in broker.toml',
        )

    def _admit_xen(self, identity: Identity) -> Admission | Refusal:
        if type(identity.domid) is not int:
            raise TypeError("domid")
        if identity.domid < 1:
            return Refusal("no-guest", f"domain {identity.domid} is no guest: only guests share; stop the agent there")
        domain = domain_name(identity)
        if not domain:
            return Refusal(
                "bad-name",
                f"domain {identity.domid} has neither a name of 1 to {MAX_NAME} characters ({NAME_CHARACTERS}) nor a "
                "uuid in xenstore: create it with xl, or name it with xl rename",
            )
        if not self.pools:
            return _NO_POOL
        near, lacking = None, ""
        for known in self._rules:
            wrong = _misfits(known, identity)
            if not wrong:
                return self._join(known.rule, domain)
            # What the text may name: a rule that has this very domain's name or uuid, and lacks something else.
            if near is None and ((known.has_name and "name" not in wrong) or (known.uuids and "uuid" not in wrong)):
                near, lacking = known.rule, " and ".join(wrong)
        entry = f'name = "{identity.name}"' if is_name(identity.name) else f'uuid = "{identity.uuid}"'
        pool = "NAME" if near is None else near.pool
        other = "" if near is None else f" ({near.source} names it, with another {lacking})"
        return Refusal(
            "no-matching-rule",
            f'no rule admits the Xen domain "{domain}", domid {identity.domid}, '
            f"{f'label {identity.label!a:.70}' if identity.label else 'without a label'}{other}: "
            f"add {{ {entry} }} to domains under [pools.{pool}] in broker.toml, or give the domain the label of a rule "
            f"there, in dom0: xenstore-write /local/domain/{identity.domid}/sharearea-label LABEL",
        )

    def _join(self, rule: DomainRule, domain: DomainId) -> Admission | Refusal:
        if rule.pool not in self.pools:
            missing = f"{rule.source} names the pool {rule.pool}, which is not configured"
            return Refusal("no-pool", f"{missing}: write [pools.{rule.pool}] in broker.toml")
        return Admission(rule.pool, rule, domain)

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


def domain_name(identity: Identity) -> DomainId:
    """Return the name under which a Xen domain is known in its pool; empty if dom0 gave it nothing to be known by.

    Xen's own name where it can be one of ours, else "uuid-" and the uuid, which no two domains of a host have.
    """
    if is_name(identity.name):
        return identity.name
    return f"uuid-{identity.uuid}" if is_uuid(identity.uuid) else ""


def _misfits(known: _Compiled, identity: Identity) -> list[str]:
    """Say what of a Xen domain a rule asks for otherwise."""
    wrong = []
    if known.has_name is not None and not (is_name(identity.name) and known.has_name(identity.name)):
        wrong.append("name")
    if known.uuids and identity.uuid not in known.uuids:
        wrong.append("uuid")
    if known.labels and identity.label not in known.labels:
        wrong.append("label")
    return wrong


def _faults_of(rule: DomainRule, backend: Backend) -> list[str]:
    faults: list[str] = []
    if backend == "local":
        if not rule.names or not rule.uids:
            faults.append("needs a name and a uid: without one of them it would match nothing")
        if rule.uuids or rule.labels:
            faults.append("has a uuid or a label, which only domains of the xen backend have")
    else:
        if not (rule.names or rule.uuids or rule.labels):
            faults.append("needs a name, a uuid or a label: without any it would match everybody")
        if rule.uids:
            faults.append("has a uid, which no domain of the xen backend has")
    if any(type(uid) is not int or not 0 <= uid <= MAX_UID for uid in rule.uids):
        faults.append(f"has a uid that is not a number from 0 to {MAX_UID}")
    if not all(map(is_uuid, rule.uuids)):
        faults.append("has a uuid that is not 8-4-4-4-12 small hexadecimal digits")
    if not all(map(is_name, rule.labels)):
        faults.append(f"has a label that is not 1 to {MAX_NAME} characters ({NAME_CHARACTERS})")
    return faults

"""Policy and globs: who is let in, which files count, and that no glob and no path can make a match run away."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharearea import policy as policy_module
from sharearea.common import globs as globs_module
from sharearea.common.globs import (
    MAX_EXPANSIONS,
    MAX_GLOB_BYTES,
    GlobError,
    Outcome,
    PathFilter,
    compile_name_globs,
    is_name,
    name_glob_covers,
    translate,
)
from sharearea.common.wire import BROKER_TO_AGENT, MAX_GLOBS, MAX_PATH, Welcome
from sharearea.model import Identity, Verdict
from sharearea.policy import (
    DEFAULT_EXCLUDE,
    MAX_FILE_SIZE,
    MAX_GRANTS,
    Admission,
    DomainRule,
    Policy,
    PoolRules,
    Refusal,
    RulesError,
)

ALICE = Identity("local", 1000)
OFFICE = PoolRules("office")
LAB = PoolRules("lab")


def rule(pool: str, names: tuple[str, ...], uids: tuple[int, ...], number: int = 0) -> DomainRule:
    return DomainRule(pool, names, uids, f"pools.{pool}.domains[{number}]")


UUID = "2f1d4b6e-5c7a-4d3e-9b8f-0a1c2e3d4f50"
OTHER_UUID = "00000000-0000-4000-8000-000000000001"


def xen_rule(
    pool: str = "office",
    names: tuple[str, ...] = (),
    uuids: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    number: int = 0,
) -> DomainRule:
    return DomainRule(pool, names, (), f"pools.{pool}.domains[{number}]", uuids, labels)


def guest(name: str = "web-1", uuid: str = UUID, label: str = "", domid: int = 5) -> Identity:
    return Identity("xen", domid=domid, name=name, uuid=uuid, label=label)


# ------------------------------------------------------------------------------------------------------ admission


def refusal(policy: Policy, identity: Identity, name: str) -> Refusal:
    answer = policy.admit(identity, name)
    assert isinstance(answer, Refusal)
    assert len(answer.text) <= 1024
    assert len(answer.reason) <= 64
    return answer


def test_admits_by_name_and_uid_and_names_the_rule() -> None:
    first = rule("office", ("db", "web-*"), (1000, 1001))
    policy = Policy({"office": OFFICE}, (first,))
    for name in ("db", "web-", "web-17"):
        assert policy.admit(ALICE, name) == Admission("office", first, name)
    assert policy.admit(Identity("local", 1001), "db") == Admission("office", first, "db")


def test_denies_by_default_and_says_what_to_write() -> None:
    policy = Policy({"office": OFFICE}, (rule("office", ("web-*",), (1000,)),))
    stranger = refusal(policy, ALICE, "db")
    assert stranger.reason == "no-matching-rule"
    assert '{ name = "db", uid = 1000 }' in stranger.text
    assert "[pools.NAME]" in stranger.text
    other_user = refusal(policy, Identity("local", 1001), "web-1")
    assert other_user.reason == "no-matching-rule"
    assert "pools.office.domains[0]" in other_user.text
    assert "[pools.office]" in other_user.text
    assert "1000" not in other_user.text  # the peer is not told whom the rule admits
    # Names are compared as a whole.
    assert refusal(policy, ALICE, "my-web-1").reason == "no-matching-rule"


def test_first_matching_rule_decides_the_pool() -> None:
    narrow, wide = rule("lab", ("web-1",), (1000,)), rule("office", ("*",), (1000,))
    pools = {"office": OFFICE, "lab": LAB}
    assert Policy(pools, (narrow, wide)).admit(ALICE, "web-1") == Admission("lab", narrow, "web-1")
    assert Policy(pools, (wide, narrow)).admit(ALICE, "web-1") == Admission("office", wide, "web-1")
    assert Policy(pools, (narrow, wide)).admit(ALICE, "web-2") == Admission("office", wide, "web-2")


def test_refuses_when_switched_off_or_without_a_pool() -> None:
    everybody = (rule("office", ("*",), (1000,)),)
    assert refusal(Policy({"office": OFFICE}, everybody, enabled=False), ALICE, "db").reason == "disabled"
    assert refusal(Policy({}, ()), ALICE, "db").reason == "no-pool"
    missing = refusal(Policy({"lab": LAB}, everybody), ALICE, "db")
    assert missing.reason == "no-pool"
    assert "[pools.office]" in missing.text


@pytest.mark.parametrize(
    "name", ["", "a" * 65, "a b", "a/b", "ä", "a\n", "a\0", "web-1\n", "\ud800", "x" * 100_000, "'" * 80]
)
def test_refuses_a_bad_name(name: str) -> None:
    policy = Policy({"office": OFFICE}, (rule("office", ("*",), (1000,)),))
    assert refusal(policy, ALICE, name).reason == "bad-name"
    assert isinstance(policy.admit(ALICE, "a" * 64), Admission)


def test_refuses_another_backend() -> None:
    policy = Policy({"office": OFFICE}, (rule("office", ("*",), (1000,)),))
    assert refusal(policy, Identity("xen", 1000), "db").reason == "unknown-backend"


@pytest.mark.parametrize(
    ("only", "yes", "no"),
    [
        (
            xen_rule(names=("web-*", "db")),
            [guest(), guest("db", "", "x")],
            [guest("my-web-1"), guest(""), guest("web/1")],
        ),
        (xen_rule(uuids=(UUID,)), [guest(), guest("a b")], [guest(uuid=OTHER_UUID), guest(uuid="")]),
        (xen_rule(labels=("office",)), [guest(label="office")], [guest(), guest(label="office2"), guest(label="lab")]),
        (xen_rule(names=("web-*",), uuids=(UUID,)), [guest()], [guest("db"), guest(uuid=OTHER_UUID)]),
        (
            xen_rule(names=("web-*",), uuids=(UUID,), labels=("a", "b")),
            [guest(label="a"), guest(label="b")],
            [guest(), guest("db", label="a"), guest(uuid=OTHER_UUID, label="a")],
        ),
        (xen_rule(names=("*",)), [guest()], [guest("a b"), guest("")]),
    ],
)
def test_admits_a_xen_domain_that_has_all_that_is_asked(
    only: DomainRule, yes: list[Identity], no: list[Identity]
) -> None:
    policy = Policy({"office": OFFICE}, (only,), backend="xen")
    for identity in yes:
        answer = policy.admit(identity, "what it calls itself")
        assert isinstance(answer, Admission)
        assert (answer.pool, answer.rule) == ("office", only)
    for identity in no:
        assert refusal(policy, identity, "web-1").reason == "no-matching-rule"


def test_a_xen_domain_is_known_by_what_dom0_wrote() -> None:
    policy = Policy({"office": OFFICE}, (xen_rule(labels=("a",)), xen_rule(uuids=(UUID,))), backend="xen")
    for identity, domain in (
        (guest("web-1", label="a"), "web-1"),
        (guest("web-1", "", label="a"), "web-1"),
        (guest("a b"), f"uuid-{UUID}"),
        (guest("x" * 65), f"uuid-{UUID}"),
        (guest(""), f"uuid-{UUID}"),
    ):
        answer = policy.admit(identity, "db")
        assert isinstance(answer, Admission)
        assert answer.domain == domain
        assert is_name(answer.domain)
    assert refusal(policy, guest("a b", "", "a"), "db").reason == "bad-name"
    assert refusal(policy, guest("", "../x", "a"), "db").reason == "bad-name"


def test_first_matching_xen_rule_decides_the_pool() -> None:
    narrow, wide = xen_rule("lab", labels=("lab",)), xen_rule("office", names=("*",))
    pools = {"office": OFFICE, "lab": LAB}
    for rules, first in (((narrow, wide), narrow), ((wide, narrow), wide)):
        policy = Policy(pools, rules, backend="xen")
        assert policy.admit(guest(label="lab"), "") == Admission(first.pool, first, "web-1")
        assert policy.admit(guest(), "") == Admission("office", wide, "web-1")


def test_denies_a_xen_domain_and_says_what_to_write() -> None:
    policy = Policy({"office": OFFICE}, (xen_rule(names=("web-*",), labels=("secret",)),), backend="xen")
    stranger = refusal(policy, guest("db"), "web-1")
    assert stranger.reason == "no-matching-rule"
    assert '{ name = "db" }' in stranger.text
    assert "[pools.NAME]" in stranger.text
    assert "xenstore-write /local/domain/5/sharearea-label LABEL" in stranger.text
    near = refusal(policy, guest(label="other"), "web-1")
    assert "pools.office.domains[0] names it, with another label" in near.text
    assert "[pools.office]" in near.text
    assert "secret" not in near.text  # the peer is not told whom the rule admits
    assert f'{{ uuid = "{UUID}" }}' in refusal(policy, guest("a b"), "web-1").text
    by_uuid = Policy({"office": OFFICE}, (xen_rule(names=("db",), uuids=(UUID,)),), backend="xen")
    assert "pools.office.domains[0] names it, with another name" in refusal(by_uuid, guest(), "").text
    only_label = Policy({"office": OFFICE}, (xen_rule(labels=("secret",)),), backend="xen")
    assert "domains[0]" not in refusal(only_label, guest(), "").text


def test_no_guest_is_admitted_as_the_host() -> None:
    policy = Policy({"office": OFFICE}, (xen_rule(names=("*",)),), backend="xen")
    for domid in (0, -1):
        assert refusal(policy, guest("Domain-0", domid=domid), "web-1").reason == "no-guest"
    assert refusal(policy, Identity("xen", domid=cast(Any, "5"), name="web-1"), "web-1").reason == "policy-error"
    assert refusal(policy, guest(cast(Any, None)), "web-1").reason == "policy-error"


def test_a_xen_policy_admits_no_local_peer_and_needs_a_pool() -> None:
    policy = Policy({"office": OFFICE}, (xen_rule(names=("*",)),), backend="xen")
    assert refusal(policy, ALICE, "web-1").reason == "unknown-backend"
    assert refusal(Policy({}, (), backend="xen"), guest(), "web-1").reason == "no-pool"
    assert refusal(Policy({"lab": LAB}, (xen_rule(names=("*",)),), backend="xen"), guest(), "").reason == "no-pool"
    off = Policy({"office": OFFICE}, (xen_rule(names=("*",)),), enabled=False, backend="xen")
    assert refusal(off, guest(), "").reason == "disabled"


@given(
    st.text(max_size=70),
    st.sampled_from(["", UUID, OTHER_UUID, "x"]),
    st.sampled_from(["", "a", "b"]),
    st.integers(-1, 3),
)
def test_no_xen_domain_but_the_named_is_admitted(name: str, uuid: str, label: str, domid: int) -> None:
    policy = Policy({"office": OFFICE}, (xen_rule(names=("web-?",), uuids=(UUID,), labels=("a",)),), backend="xen")
    admitted = isinstance(policy.admit(guest(name, uuid, label, domid), "web-1"), Admission)
    named = re.fullmatch(r"web-[A-Za-z0-9._-]", name, re.ASCII) is not None
    assert admitted == (named and uuid == UUID and label == "a" and domid > 0)


@pytest.mark.parametrize(
    ("entries", "pool", "domain", "limits"),
    [
        (32_768, 0, 0, (32_768, 16_384)),
        (32_768, 1000, 0, (1000, 500)),
        (32_768, 100_000, 0, (32_768, 16_384)),
        (32_768, 100_000, 90_000, (32_768, 32_768)),
        (32_768, 0, 7, (32_768, 7)),
        (1, 0, 0, (1, 1)),
        (0, 5, 5, (0, 0)),
    ],
)
def test_grants_are_bounded_by_the_host_and_the_rules(
    entries: int, pool: int, domain: int, limits: tuple[int, int]
) -> None:
    rules = PoolRules("office", max_grants=pool, max_grants_per_domain=domain)
    assert rules.grant_limits(entries) == limits


@pytest.mark.parametrize(
    ("identity", "name"),
    [(None, "db"), (Identity("local", cast(Any, "1000")), "db"), (Identity("local", cast(Any, [])), "db")],
)
def test_a_failure_while_deciding_is_a_denial(identity: Any, name: str) -> None:
    policy = Policy({"office": OFFICE}, (rule("office", ("*",), (1000,)),))
    assert refusal(policy, identity, name).reason == "policy-error"


@given(st.text(max_size=70), st.integers(-1, 2**32))
def test_nobody_but_the_named_is_admitted(name: str, uid: int) -> None:
    policy = Policy({"office": OFFICE}, (rule("office", ("web-?",), (1000,)),))
    admitted = isinstance(policy.admit(Identity("local", uid), name), Admission)
    assert admitted == (uid == 1000 and re.fullmatch(r"web-[A-Za-z0-9._-]", name, re.ASCII) is not None)


def test_policy_keeps_its_own_copy_of_the_pools() -> None:
    pools = {"office": OFFICE}
    policy = Policy(pools, (rule("lab", ("*",), (1000,)),))
    pools["lab"] = LAB
    assert refusal(policy, ALICE, "db").reason == "no-pool"
    with pytest.raises(TypeError):
        cast(Any, policy.pools)["lab"] = LAB


@pytest.mark.parametrize(
    "broken",
    [
        rule("office", (), (1000,)),
        rule("office", ("*",), ()),
        rule("office", ("*",), (-1,)),
        rule("office", ("*",), (2**32 - 1,)),
        rule("office", ("a b",), (1000,)),
        rule("office", ("[",), (1000,)),
        xen_rule(names=("*",)),
        DomainRule("office", ("*",), (1000,), "x", (UUID,)),
        DomainRule("office", ("*",), (1000,), "x", (), ("a",)),
    ],
)
def test_broken_rules_are_not_accepted(broken: DomainRule) -> None:
    with pytest.raises(RulesError, match=re.escape(broken.source)):
        Policy({"office": OFFICE}, (broken,))


@pytest.mark.parametrize(
    "broken",
    [
        xen_rule(),
        rule("office", ("*",), (1000,)),
        xen_rule(names=("[",)),
        xen_rule(names=("a b",)),
        xen_rule(uuids=("2f1d4b6e",)),
        xen_rule(uuids=(UUID.upper(),)),
        xen_rule(labels=("a*",)),
        xen_rule(labels=("",)),
    ],
)
def test_broken_xen_rules_are_not_accepted(broken: DomainRule) -> None:
    with pytest.raises(RulesError, match=re.escape(broken.source)):
        Policy({"office": OFFICE}, (broken,), backend="xen")


def test_a_pool_must_be_under_its_own_name() -> None:
    with pytest.raises(RulesError, match="lab"):
        Policy({"office": LAB}, ())


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("k", {"k": 1}),
        ("k", {"k": 5, "max_domains": 4}),
        ("min_file_bytes", {"min_file_bytes": 8192, "max_file_bytes": 4096}),
        ("max_file_bytes", {"max_file_bytes": MAX_FILE_SIZE + 1}),
        ("max_pages", {"max_pages": 2**32 - 1}),
        ("max_files", {"max_files": 0}),
        ("reclaim", {"reclaim": "swap"}),
        ("reclaim_floor", {"reclaim_floor": 0}),
        ("max_grants", {"max_grants": MAX_GRANTS + 1}),
        ("max_grants_per_domain", {"max_grants": 5, "max_grants_per_domain": 6}),
        ("include", {"include": ()}),
        ("exclude", {"exclude": ("*.a",) * (MAX_GLOBS + 1)}),
        ("include, exclude", {"exclude": ("[",)}),
    ],
)
def test_contradicting_pool_rules_are_not_accepted(key: str, values: dict[str, Any]) -> None:
    with pytest.raises(RulesError) as caught:
        PoolRules("office", **values)
    assert [name for name, _ in caught.value.faults] == [key]


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ä", "a\n"])
def test_a_pool_needs_a_plain_name(name: str) -> None:
    with pytest.raises(RulesError):
        PoolRules(name)


# ------------------------------------------------------------------------------------------------------ judgement


def judge(path: bytes, size: int = 100_000, **values: Any) -> tuple[Verdict | None, str]:
    return Policy({"office": PoolRules("office", **values)}, ()).judge("office", path, size)


def test_size_decides_at_its_bounds() -> None:
    bounds = {"min_file_bytes": 16384, "max_file_bytes": 65536}
    assert judge(b"/a", 16383, **bounds) == (Verdict.TOO_SMALL, "pools.office.min_file_bytes = 16 KiB")
    assert judge(b"/a", 16384, **bounds) == (None, "")
    assert judge(b"/a", 65536, **bounds) == (None, "")
    assert judge(b"/a", 65537, **bounds) == (Verdict.TOO_LARGE, "pools.office.max_file_bytes = 64 KiB")


def test_the_deciding_glob_is_named() -> None:
    rules: dict[str, Any] = {"include": ("/usr/**", "*.jar"), "exclude": ("*.{key,pem}", "**/secret/**", "/usr/b/c*")}
    assert judge(b"/usr/lib/a.so", **rules) == (None, "")
    assert judge(b"/opt/a.jar", **rules) == (None, "")
    assert judge(b"/usr/lib/a.pem", **rules) == (Verdict.EXCLUDED, 'pools.office.exclude "*.{key,pem}"')
    assert judge(b"/usr/secret/x/a", **rules) == (Verdict.EXCLUDED, 'pools.office.exclude "**/secret/**"')
    assert judge(b"/usr/b/cc", **rules) == (Verdict.EXCLUDED, 'pools.office.exclude "/usr/b/c*"')
    assert judge(b"/usr/b/d/cc", **rules) == (None, "")
    assert judge(b"/opt/a", **rules) == (Verdict.NOT_INCLUDED, "pools.office.include: no glob of it matches")


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"a",
        b"usr/a",
        b"/",
        b"/usr/",
        b"//a",
        b"/a//b",
        b"/./a",
        b"/a/../b",
        b"/a/..",
        b"/a/.",
        b"/a\0",
        b"/a\0/b",
        b"/" + b"a" * MAX_PATH,
    ],
)
def test_a_path_that_is_not_normal_is_denied(path: bytes) -> None:
    verdict, text = judge(path, exclude=())
    assert verdict is Verdict.EXCLUDED
    assert "normal" in text


def test_names_with_dots_are_normal() -> None:
    for path in (b"/...", b"/.a/..b", b"/a./b..", b"/.../a"):
        assert judge(path, exclude=()) == (None, "")


@pytest.mark.parametrize("arguments", [("nobody", b"/a", 20_000), ("office", "/a", 20_000), ("office", b"/a", None)])
def test_a_failure_while_judging_is_a_denial(arguments: Any) -> None:
    verdict, text = Policy({"office": OFFICE}, ()).judge(*arguments)
    assert verdict is Verdict.EXCLUDED
    assert "while deciding" in text


@pytest.mark.parametrize(
    "path",
    [
        b"/usr/lib/x86_64-linux-gnu/libcrypto.so.3",
        b"/opt/app/libssl.so.1.1",
        b"/usr/lib/libgnutls.so.30",
        b"/usr/lib/libgcrypt.so.20",
        b"/usr/lib/libsodium.so.23",
        b"/usr/lib/libnettle.so.8",
        b"/usr/lib/libcrypt.so.1",
        b"/usr/lib/libcrypt-2.31.so",
        b"/usr/lib/x86_64-linux-gnu/ossl-modules/legacy.so",
        b"/usr/lib/x86_64-linux-gnu/engines-3/afalg.so",
        b"/usr/lib/python3/dist-packages/cryptography/hazmat/bindings/_rust.abi3.so",
        b"/home/u/.ssh/known_hosts",
        b"/home/u/.gnupg/x/y",
        b"/srv/server.key",
        b"/usr/share/keyrings/archive.gpg",
        b"/etc/ssl/certs/a.pem",
        b"/etc/shadow",
        b"/etc/shadow-",
        b"/etc/ssh/sshd_config",
        b"/root/a/b",
        b"/srv/\xff/id_ed25519.pub",
        b"/usr/sbin/sshd",
    ],
)
def test_default_excludes_what_is_sensitive(path: bytes) -> None:
    assert judge(path)[0] is Verdict.EXCLUDED


@pytest.mark.parametrize(
    "path",
    [
        b"/usr/lib/x86_64-linux-gnu/libc.so.6",
        b"/usr/bin/python3.11",
        b"/usr/share/locale/de/LC_MESSAGES/sshd.mo",
        b"/srv/etc/shadow-play.dat",
        b"/usr/share/monkey",
        b"/usr/lib/libcryptsetup.so.12",
        b"/srv/\xff\n\xfe",
    ],
)
def test_default_leaves_the_rest(path: bytes) -> None:
    assert judge(path) == (None, "")


def test_every_default_glob_decides_something() -> None:
    # A glob that an earlier one covers wholly would never be named; each one has to match a path that no other does.
    for glob in DEFAULT_EXCLUDE:
        others = PathFilter(("**",), tuple(other for other in DEFAULT_EXCLUDE if other != glob))
        alone = PathFilter(("**",), (glob,))
        paths = [sample(text) for text in expand(glob)]
        assert all(alone.decide(path)[0] is Outcome.EXCLUDED for path in paths), glob
        assert any(others.decide(path)[0] is Outcome.PASS for path in paths), glob


def sample(glob: str) -> bytes:
    text = glob if glob.startswith("/") else "/" + glob
    return text.replace("[.-]", ".").replace("**/", "q/").replace("**", "q/q").replace("*", "q").encode()


def test_welcome_has_room_for_the_largest_lists() -> None:
    wide = "é" * (MAX_GLOB_BYTES // 2)
    rules = PoolRules("office", include=(wide,) * MAX_GLOBS, exclude=(wide,) * MAX_GLOBS)
    id16 = bytes(16)
    limits = (rules.min_file_bytes, rules.max_file_bytes, rules.max_files, rules.include, rules.exclude)
    message = Welcome(1, "a" * 64, "b" * 64, id16, id16, bytes(32), 1, *limits)
    assert BROKER_TO_AGENT.decode(BROKER_TO_AGENT.encode(message)[4:]) == message


# ---------------------------------------------------------------------------------------------------------- globs


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("**", ["/a", "/a/b"], []),
        ("/**", ["/a", "/a/b"], []),
        ("a*", ["/a", "/x/y/abc"], ["/ba", "/a/b"]),
        ("*", ["/a", "/x/.y"], []),
        ("/usr/**", ["/usr/a", "/usr/a/b"], ["/usr", "/usrx/a", "/x/usr/a"]),
        ("/usr/*", ["/usr/a"], ["/usr/a/b"]),
        ("/usr/*/c", ["/usr/b/c"], ["/usr/c", "/usr/a/b/c"]),
        ("/usr/**/c", ["/usr/c", "/usr/a/b/c"], ["/usr/cc", "/usr/c/d"]),
        ("**/a/**/b/**", ["/a/b/c", "/x/a/y/b/z/c"], ["/a/b", "/b/a/c", "/a/c/d"]),
        ("**/a/b/**/c/d", ["/a/b/c/d", "/a/a/b/x/c/c/d"], ["/a/b/d", "/a/x/b/c/d"]),
        ("**/**/x", ["/x", "/a/b/x"], ["/x/y"]),
        ("/a/**/**", ["/a/b", "/a/b/c"], ["/a"]),
        ("**/*.so", ["/x.so", "/a/.so"], ["/x.so.1"]),
        ("?", ["/a", "/\udcff"], ["/ab", "/é"]),
        ("[!b]", ["/a", "/\udcff"], ["/b", "/é"]),
        ("[a-c]", ["/a", "/c"], ["/d", "/-"]),
        ("[!a-c]", ["/d", "/-", "/\n"], ["/a"]),
        ("[]]", ["/]"], ["/["]),
        ("[!]]", ["/["], ["/]"]),
        ("[a-]", ["/a", "/-"], ["/b"]),
        ("[[]", ["/["], ["/]"]),
        ("[{]a,b[}]", ["/{a,b}"], ["/a"]),
        ("[+-9]", ["/+", "/5"], ["/a"]),
        ("[!^]", ["/a"], ["/^"]),
        ("{a,bc}*", ["/a", "/bcd"], ["/b"]),
        ("lib{,64}.so", ["/lib.so", "/lib64.so"], ["/lib32.so"]),
        ("/{usr/lib,opt}/**", ["/usr/lib/a", "/opt/b"], ["/usr/a"]),
        ("a\\*", ["/a\\b"], ["/a*", "/ab"]),
        ("(a|b).+$^", ["/(a|b).+$^"], ["/a"]),
        ("ä*", ["/äb"], ["/ab"]),
        ("a\nb", ["/a\nb"], ["/a"]),
    ],
)
def test_glob(glob: str, yes: list[str], no: list[str]) -> None:
    paths = PathFilter((glob,), ())
    for path in yes:
        assert paths.decide(path.encode(errors="surrogateescape")) == (Outcome.PASS, ""), path
    for path in no:
        assert paths.decide(path.encode(errors="surrogateescape")) == (Outcome.NOT_INCLUDED, ""), path


@pytest.mark.parametrize(
    "glob",
    [
        "",
        "/",
        "//a",
        "/a/",
        "a/b",
        "*/a",
        "/a//b",
        "/./a",
        "/../a",
        "a**",
        "**a",
        "***",
        "/a**/b",
        "[",
        "[]",
        "[!]",
        "[a",
        "[b-a]",
        "[^a]",
        "[ä]",
        "/[a/b]",
        "{a",
        "a}",
        "{a}",
        "{a,{b,c}}",
        "{,a}",
        "{a,b",
        "\0",
        "\ud800",
        "{[,a}",
        "a" * (MAX_GLOB_BYTES + 1),
        "{a,b}" * 7,
    ],
)
def test_a_glob_that_cannot_be_meant_is_refused(glob: str) -> None:
    with pytest.raises(GlobError) as caught:
        translate(glob)
    assert caught.value.remedy
    assert len(str(caught.value)) < 300


def test_exclusion_goes_before_inclusion() -> None:
    assert PathFilter(("/a/b",), ("**",)).decide(b"/a/b") == (Outcome.EXCLUDED, "**")
    assert PathFilter((), ()).decide(b"/a") == (Outcome.NOT_INCLUDED, "")


def expand(glob: str) -> list[str]:
    """Expand braces of a glob that has none in classes."""
    found = re.search(r"\{([^{}]*)\}", glob)
    if found is None:
        return [glob]
    return [text for part in found[1].split(",") for text in expand(glob[: found.start()] + part + glob[found.end() :])]


def tabulated_name(glob: str, name: bytes) -> bool:
    """Match one name without backtracking: which bytes each token may end at."""
    tokens = [t.encode() for t in re.findall(r"\*|\?|\[[^\]]*\]|[^*?\[]", glob)]
    ends = {0}
    for token in tokens:
        if token == b"*":
            ends = set(range(min(ends), len(name) + 1)) if ends else ends
        elif token == b"?":
            ends = {end + 1 for end in ends if end < len(name)}
        elif token.startswith(b"["):
            negated = token[1:2] == b"!"
            members = token[2:-1] if negated else token[1:-1]
            ends = {end + 1 for end in ends if end < len(name) and (name[end] in members) != negated}
        else:
            ends = {end + len(token) for end in ends if name[end : end + len(token)] == token}
    return len(name) in ends


def tabulated(glob: str, path: bytes) -> bool:
    """Match a path by the definition: the same over folders."""
    if "/" not in glob:
        glob = "**/" + glob
    globs = tuple(glob.removeprefix("/").split("/"))
    names = tuple(path[1:].split(b"/"))

    @cache
    def match(at: int, name: int) -> bool:
        if at == len(globs):
            return name == len(names)
        if globs[at] == "**":
            if at == len(globs) - 1:
                return name < len(names)
            return match(at + 1, name) or (name < len(names) and match(at, name + 1))
        return name < len(names) and tabulated_name(globs[at], names[name]) and match(at + 1, name + 1)

    return match(0, 0)


atoms = st.sampled_from(["a", "a", "b", "ab", ".", "é", "*", "*", "?", "[ab]", "[!a]", "{a,bb}", "{,b}"])
glob_names = (
    st.lists(atoms, min_size=1, max_size=7)
    .map("".join)
    .filter(lambda text: "**" not in text and "" not in expand(text) and not {".", ".."} & set(expand(text)))
    .filter(lambda text: not any("**" in name for name in expand(text)))
)
globs = st.one_of(
    glob_names,
    st.tuples(
        st.sampled_from(["/", "**/"]),
        st.lists(st.one_of(glob_names, st.just("**")), min_size=1, max_size=6).map("/".join),
    ).map("".join),
).filter(lambda glob: len(expand(glob)) <= MAX_EXPANSIONS)
path_names = (
    st.lists(st.sampled_from([b"a", b"a", b"b", b".", b"\xc3\xa9", b"\xff", b"\n"]), min_size=1, max_size=6)
    .map(b"".join)
    .filter(lambda name: name not in (b".", b".."))
)
paths = st.lists(path_names, min_size=1, max_size=7).map(lambda names: b"/" + b"/".join(names))


@given(globs, st.lists(paths, min_size=1, max_size=8))
@example("*a*b*ab", [b"/aabab", b"/abab", b"/aab", b"/ab"])
@example("**/a/**/a/b/**/b", [b"/a/a/a/b/b", b"/a/b/a/b/a/b"])
def test_matches_as_the_tabulated_matcher_does(glob: str, candidates: list[bytes]) -> None:
    included, excluded = PathFilter((glob,), ()), PathFilter(("**",), (glob,))
    for path in candidates + candidates:
        expected = any(tabulated(text, path) for text in expand(glob))
        assert included.decide(path) == ((Outcome.PASS if expected else Outcome.NOT_INCLUDED), "")
        assert excluded.decide(path) == ((Outcome.EXCLUDED, glob) if expected else (Outcome.PASS, ""))


@given(st.lists(globs, max_size=4), st.lists(globs, max_size=4), st.lists(paths, min_size=1, max_size=5))
def test_a_list_matches_what_one_of_it_matches(include: list[str], exclude: list[str], candidates: list[bytes]) -> None:
    both = PathFilter(include, exclude)
    for path in candidates:
        outcome, named = both.decide(path)
        if any(tabulated(text, path) for glob in exclude for text in expand(glob)):
            assert outcome is Outcome.EXCLUDED
            assert named in exclude
            assert any(tabulated(text, path) for text in expand(named))
        else:
            expected = any(tabulated(text, path) for glob in include for text in expand(glob))
            assert (outcome, named) == ((Outcome.PASS if expected else Outcome.NOT_INCLUDED), "")


# The form that globs.py gives its proof for, as an expression over expressions: every star but the last of a name
# is an atomic group, as is every run of folders but the last; repetitions hold no repetitions that could give back.
ONE = rb"(?:\\[^A-Za-z0-9]|\[\^/\](?![*+?{])|\[(?:\\x[0-9a-f]{2}-\\x[0-9a-f]{2})+\]|[^][\\(){}*+?|^$.])"
STARS = rb"(?:\(\?>\[\^/\]\*\?" + ONE + rb"+\))*\[\^/\]\*" + ONE + rb"*"
NAME = rb"(?:" + ONE + rb"+|\(\?>" + ONE + rb"*" + STARS + rb"\(\?=/\)\))/"
SKIP = rb"\(\?:\[\^/\]\+\+/\)\*\?"
FOLDER = re.compile(
    rb"/(?:" + NAME + rb")*(?:\(\?>" + SKIP + rb"(?:" + NAME + rb")+\))*(?:" + SKIP + rb"(?:" + NAME + rb")+)?(?:\\Z)?",
    re.DOTALL,
)
BASE = re.compile(ONE + rb"*(?:" + STARS + rb")?\\Z", re.DOTALL)


def assert_bounded(glob: str) -> None:
    patterns = translate(glob)
    assert len(patterns) <= MAX_EXPANSIONS
    for pattern in patterns:
        assert pattern.folder is None or FOLDER.fullmatch(pattern.folder), pattern
        assert pattern.base is None or BASE.fullmatch(pattern.base), pattern
        # Each byte of a glob becomes at most one set of at most 128 spans, with a constant around it.
        assert (
            len(pattern.folder or b"") + len(pattern.base or b"") <= len(glob.encode()) * 32 + 128 * glob.count("[") * 9
        )


@given(globs)
def test_translation_has_the_form_that_cannot_run_away(glob: str) -> None:
    assert_bounded(glob)


@given(st.text(st.sampled_from("aé.*?[]{}!^-,/\\+(|)$\n"), max_size=24))
def test_any_text_is_refused_or_bounded(text: str) -> None:
    for glob in (text, "/" + text, "**/" + text):
        try:
            assert_bounded(glob)
        except GlobError:
            continue
        PathFilter((glob,), ())


@pytest.mark.parametrize(
    ("glob", "path"),
    [
        ("*a" * 200 + "b", b"/" + b"a" * 4000),
        ("*[ab]" * 100 + "c", b"/" + b"ab" * 2000),
        ("*?" * 200 + "b", b"/" + b"a" * 4000),
        ("**/" + "*a" * 120 + "b/**", b"/" + b"a" * 4000 + b"/x"),
        ("**/a/" * 100 + "b", b"/a" * 2000),
        ("**/*a*a*b/" * 40 + "c", b"/aaaaaaaa" * 400),
        ("**/" + "*/" * 200 + "b", b"/a" * 2000),
    ],
)
def test_nasty_globs_come_to_an_end(glob: str, path: bytes) -> None:
    # With backtracking each of these would take longer than anybody waits.
    assert_bounded(glob)
    assert PathFilter((glob,), ()).decide(path)[0] is Outcome.NOT_INCLUDED


def test_folders_are_remembered_within_bounds() -> None:
    # The memory is not part of the interface; that it ends is.
    globs = PathFilter(("**/7/*",), ("**/13/**",))
    expected = {b"7": Outcome.PASS, b"13": Outcome.EXCLUDED}
    for number in range(3 * globs_module._CACHED_FOLDERS):
        name = b"%d" % (number % 20)
        outcome, _ = globs.decide(b"/%d/%s/x" % (number, name))
        assert outcome is expected.get(name, Outcome.NOT_INCLUDED)
        assert len(globs._folders) <= globs_module._CACHED_FOLDERS
    globs.decide(b"/" + b"a" * globs_module._CACHED_FOLDER_BYTES + b"/x")
    assert max(map(len, globs._folders)) <= globs_module._CACHED_FOLDER_BYTES


name_atoms = st.sampled_from(["a", "b", "-", "*", "?", "[ab]", "[!a]", "{a,b}"])
name_globs = st.lists(name_atoms, min_size=1, max_size=5).map("".join).filter(lambda text: "**" not in text)


@given(name_globs, name_globs, st.text("ab-", min_size=1, max_size=6))
@example("*", "a*", "ab")
def test_covering_is_never_claimed_wrongly(general: str, special: str, name: str) -> None:
    if name_glob_covers(general, special) and compile_name_globs((special,))(name):
        assert compile_name_globs((general,))(name)


@pytest.mark.parametrize(
    ("general", "special", "covers"),
    [
        ("*", "web-*", True),
        ("web-*", "*", False),
        ("web-?", "web-[ab]", True),
        ("web-[!a]", "web-b", True),
        ("*a*", "*ba", True),
        ("a", "a", True),
        ("a*", "ab{c,d}", True),
        ("?", "*", False),
        ("[a-c]", "?", False),
        ("[!:]", "?", True),
    ],
)
def test_covering(general: str, special: str, covers: bool) -> None:
    assert name_glob_covers(general, special) is covers


def test_no_name_glob_matches_no_name() -> None:
    assert not compile_name_globs(())("a")


# ---------------------------------------------------------------------------------------------------------- purity


def test_policy_does_no_io() -> None:
    source = Path(policy_module.__file__).read_text(encoding="utf-8")
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else ["." * node.level + (node.module or "")]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= {
        "__future__",
        "collections.abc",
        "dataclasses",
        "types",
        "typing",
        ".common.globs",
        ".common.units",
        ".common.wire",
        ".model",
    }

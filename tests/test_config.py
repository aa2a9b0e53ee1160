"""The broker's configuration and the schema under it: what is read, what is refused, and that all faults are named."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea.common import toml_schema as schema
from sharearea.common.errors import ConfigError
from sharearea.common.toml_schema import Problems
from sharearea.common.units import size_text
from sharearea.config import SEGMENT_HEADER_BYTES, BrokerConfig, DomainSection, PoolSection
from sharearea.model import Identity
from sharearea.policy import DEFAULT_EXCLUDE, Admission, DomainRule, PoolRules, Refusal

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "broker.toml"
XEN_EXAMPLE = ROOT / "docs" / "examples" / "broker-xen.toml"

UUID = "2f1d4b6e-5c7a-4d3e-9b8f-0a1c2e3d4f50"
XEN = '[broker]\nbackend = "xen"\n'
POOL = '[pools.office]\ndomains = [{ name = "web-*", uid = 1000 }]\n'


def parse(text: str) -> BrokerConfig:
    return BrokerConfig.parse(text.encode(), "broker.toml")


def faults(text: str) -> list[str]:
    """Return the lines of the one error that a text gives."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "docs/examples/broker.toml" in caught.value.hint
    first, *rest = caught.value.message.split("\n")
    assert first.startswith("broker.toml: ")
    if rest:
        assert first == f"broker.toml: {len(rest)} problems"
        return [line.strip() for line in rest]
    return [first.removeprefix("broker.toml: ")]


# -------------------------------------------------------------------------------------------------------- defaults


def test_an_empty_file_is_a_broker_that_refuses_everybody() -> None:
    config = parse("")
    assert config.enabled is False
    assert config.socket == Path("/run/sharearea/broker.sock")
    assert (config.segment_bytes, config.slots_per_segment) == (64 << 20, 62 * 256)
    assert (config.status_interval, config.grace) == (60.0, 30.0)
    assert (config.log_file, config.events_interval, config.metrics_listen) == ("", 10.0, "")
    assert (config.file_statistics, config.file_statistics_interval) == (100, 600.0)
    answer = config.policy.admit(Identity("local", 0), "web-1")
    assert isinstance(answer, Refusal)
    assert answer.reason == "disabled"
    assert len(config.warnings) == 2
    assert "switched off" in config.warnings[0]
    assert "no pool" in config.warnings[1]


def test_off_until_switched_on() -> None:
    off, on = parse(POOL), parse("[broker]\nenabled = true\n" + POOL)
    assert isinstance(off.policy.admit(Identity("local", 1000), "web-1"), Refusal)
    assert "switched off" in off.warnings[0]
    assert isinstance(on.policy.admit(Identity("local", 1000), "web-1"), Admission)
    assert on.warnings == ()


def test_values_arrive_in_the_policy() -> None:
    config = parse(
        """
        [broker]
        enabled = true
        segment_bytes = "8 MiB"
        status_interval = "2 min"
        [pools.office]
        domains = [{ name = ["db", "web-*"], uid = [1, 2] }, { name = "mail", uid = 3 }]
        include = ["/usr/**"]
        exclude = ["*.a"]
        min_file_bytes = 4096
        max_file_bytes = "1 MiB"
        k = 3
        max_files = 5
        max_bytes = "2 GiB"
        max_domains = 7
        max_area_bytes = "8 MiB"
        max_pages = 2048
        [pools.lab]
        default_exclude = false
        """
    )
    rules = PoolRules(
        "office",
        include=("/usr/**",),
        exclude=("*.a", *DEFAULT_EXCLUDE),
        min_file_bytes=4096,
        max_file_bytes=1 << 20,
        k=3,
        max_files=5,
        max_bytes=2 << 30,
        max_domains=7,
        max_area_bytes=8 << 20,
        max_pages=2048,
    )
    assert config.policy.pools == {"office": rules, "lab": PoolRules("lab", exclude=())}
    assert config.policy.domains == (
        DomainRule("office", ("db", "web-*"), (1, 2), "pools.office.domains[0]"),
        DomainRule("office", ("mail",), (3,), "pools.office.domains[1]"),
    )
    assert (config.slots_per_segment, config.status_interval) == (6 * 256, 120.0)
    assert config.warnings == ("pools.lab: nobody can join, domains is empty",)


def test_values_of_the_xen_backend_arrive_in_the_policy() -> None:
    config = parse(
        f"""
        [broker]
        enabled = true
        backend = "xen"
        [pools.office]
        domains = [{{ name = "web-*", label = ["a", "b"] }}, {{ uuid = "{UUID.upper()}" }}]
        reclaim = "balloon"
        reclaim_floor = "128 MiB"
        reclaim_headroom = "32 MiB"
        max_grants = 9
        max_grants_per_domain = 5
        """
    )
    xen = {"reclaim": "balloon", "reclaim_floor": 128 << 20, "reclaim_headroom": 32 << 20}
    rules = PoolRules("office", exclude=DEFAULT_EXCLUDE, max_grants=9, max_grants_per_domain=5, **xen)  # type: ignore[arg-type]
    assert config.policy.pools == {"office": rules}
    assert config.policy.domains == (
        DomainRule("office", ("web-*",), (), "pools.office.domains[0]", (), ("a", "b")),
        DomainRule("office", (), (), "pools.office.domains[1]", (UUID,), ()),
    )
    assert isinstance(config.policy.admit(Identity("xen", domid=3, uuid=UUID), ""), Admission)
    assert isinstance(config.policy.admit(Identity("local", 1000), "web-1"), Refusal)
    assert config.warnings == ()


def test_segments_of_the_xen_backend_are_small_and_have_no_header() -> None:
    assert (parse(XEN).segment_bytes, parse(XEN).slots_per_segment) == (8 << 20, 8 * 256)
    told = parse(XEN + 'segment_bytes = "64 MiB"')
    assert (told.segment_bytes, told.slots_per_segment) == (64 << 20, 64 * 256)
    assert parse(XEN + '[pools.a]\nmax_area_bytes = "8 MiB"').policy.pools["a"].max_area_bytes == 8 << 20


def test_a_broken_backend_is_one_fault() -> None:
    assert len(faults('[broker]\nbackend = 7\n[pools.a]\nreclaim = "balloon"\ndomains = [{ label = "a" }]')) == 1
    # Another fault in [broker] does not make the rules local ones.
    assert len(faults(XEN + 'grace = 7\n[pools.a]\nreclaim = "balloon"\ndomains = [{ label = "a" }]')) == 1


def test_pools_without_keys_have_the_defaults_of_the_policy() -> None:
    assert parse("[pools.office]").policy.pools["office"] == PoolRules("office")


def test_header_is_that_of_the_native_core() -> None:
    found = re.search(r"SA_SEGMENT_HEADER = (\d+)", (ROOT / "native" / "api.h").read_text(encoding="utf-8"))
    assert found is not None
    assert int(found[1]) == SEGMENT_HEADER_BYTES


# ---------------------------------------------------------------------------------------------------------- faults


def test_all_faults_are_reported_at_once() -> None:
    found = faults(
        """
        [broker]
        enabld = true
        segment_bytes = "3 MiB"
        socket = "broker.sock"
        grace = 30
        [pools.office]
        k = 1
        include = ["usr/**", "*.so", "[a"]
        domains = [{ name = "a b", uid = "x" }, { name = 1 }]
        [pools."a b"]
        [pools.lab]
        k = 9
        max_domains = 3
        min_file_bytes = "2 MiB"
        max_file_bytes = "1 MiB"
        [pool.lab]
        """
    )
    assert [fault.split(": ")[0] for fault in found] == [
        "pool",
        "broker.enabld",
        "broker.socket",
        "broker.segment_bytes",
        "broker.grace",
        "pools.office.domains[0].name",
        "pools.office.domains[0].uid",
        "pools.office.domains[1].name",
        "pools.office.include[0]",
        "pools.office.include[2]",
        "pools.office.k",
        "pools.office.domains[1].uid",
        'pools."a b"',
        "pools.lab.min_file_bytes",
        "pools.lab.k",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[broker]\nenabld = true", "broker.enabld: unknown key; did you mean enabled?"),
        ("[brokr]", "brokr: unknown key; did you mean broker?"),
        ("[broker]\nzzz = 1", "broker.zzz: unknown key; the keys here are enabled, backend, "),
        (
            '[broker]\nenabled = "yes"',
            'broker.enabled: expected true or false, found the text "yes"; for example enabled = ',
        ),
        ("[broker]\nenabled = 1", "broker.enabled: expected true or false, found the number 1"),
        ('[broker]\nbackend = "kvm"', 'broker.backend: expected one of "local", "xen", found the text "kvm"'),
        ('[broker]\nlog_file = "log"', "broker.log_file: expected an absolute path, or an empty text"),
        ('[broker]\nlog_file = "/var/../log"', "broker.log_file: the text \"/var/../log\" goes up with '..'"),
        ('[broker]\nmetrics_listen = "9420"', "broker.metrics_listen: expected an IP address and a port"),
        ('[broker]\nmetrics_listen = "host:9420"', "broker.metrics_listen: expected an IP address and a port"),
        ('[broker]\nmetrics_listen = "127.0.0.1:65536"', "broker.metrics_listen: expected an IP address and a port"),
        ('[broker]\nmetrics_listen = "::1:9420"', "broker.metrics_listen: expected an IP address and a port"),
        ('[pools.p]\nmode = "off"', 'pools.p.mode: expected one of "share", "report"'),
        ('[broker]\nlog_level = "loud"', 'broker.log_level: expected one of "debug", "info", "warning", "error"'),
        (
            '[broker]\nsegment_bytes = "65 MiB"',
            "broker.segment_bytes: expected a size from 8 MiB to 256 MiB, a multiple",
        ),
        ('[broker]\nsegment_bytes = "6 MiB"', "broker.segment_bytes: expected a size from 8 MiB"),
        ('[broker]\nsegment_bytes = "258 MiB"', "broker.segment_bytes: expected a size from 8 MiB"),
        ('[broker]\nsegment_bytes = "64 MB"', "broker.segment_bytes: expected a size from 8 MiB"),
        ("[broker]\nsegment_bytes = 64.0", "broker.segment_bytes: expected a size from 8 MiB"),
        ("[broker]\nsegment_bytes = true", "broker.segment_bytes: expected a size from 8 MiB"),
        ("[broker]\ngrace = 30", "broker.grace: expected a time from 1 s to 3600 s (text with ms, s, min or h), found"),
        ('[broker]\ngrace = "500 ms"', "broker.grace: expected a time from 1 s"),
        ('[broker]\nsocket = "broker.sock"', "broker.socket: expected the absolute path of a unix socket"),
        ('[broker]\nsocket = "/a/../b"', "broker.socket: the text \"/a/../b\" goes up with '..'"),
        ('[broker]\nsocket = "/a//b"', 'broker.socket: the text "/a//b" has needless slashes or dots; write "/a/b"'),
        (f'[broker]\nsocket = "/{"a" * 107}"', "broker.socket: the path has more than 107 bytes"),
        ('[broker]\nsocket = "/a"\nstatus_socket = "/a"', "broker.status_socket: is the path of broker.socket too"),
        ("broker = 1", "broker: expected a table, found the number 1; write [broker]"),
        ("pools = 1", "pools: expected tables"),
        ("[pools]\na = 1", "pools.a: expected a table, found the number 1; write [pools.a]"),
        ("[pools.a.b]", "pools.a.b: unknown key"),
        ('[pools."a b"]', 'pools."a b": a pool\'s name has 1 to 64 characters'),
        ('[pools."ä"]', 'pools."\\xe4": a pool\'s name has 1 to 64'),
        ("[pools.a]\ninclude = []", "pools.a.include: expected a list of 1 to 256 entries"),
        (
            "[pools.a]\nk = 0xffffffffffffffffffff",
            "pools.a.k: expected a whole number from 2 to 1024, found a very large",
        ),
        ("[pools.a]\nk = 2021-01-01", "pools.a.k: expected a whole number from 2 to 1024, found a date or time"),
        ("[pools.a]\nk = 9\nmax_domains = 3", "pools.a.k: is larger than max_domains = 3"),
        (
            "[pools.a]\nmin_file_bytes = 8192\nmax_file_bytes = 4096",
            "pools.a.min_file_bytes: is larger than max_file_bytes",
        ),
        ('[pools.a]\nmax_file_bytes = "2 GiB"', "pools.a.max_file_bytes: expected a size from 4 KiB to 1 GiB"),
        (
            '[pools.a]\nmax_area_bytes = "32 MiB"',
            "pools.a.max_area_bytes: 32 MiB is less than one segment; write 64 MiB",
        ),
        ('[pools.a]\nexclude = ["/a/"]', 'pools.a.exclude[0]: the glob "/a/" has an empty'),
        (f"[pools.a]\nexclude = {['*.a'] * 250}", "pools.a.exclude: has "),
        (
            "[pools.a]\ndomains = [{ name = [], uid = 1 }]",
            "pools.a.domains[0].name: expected a name or a glob over names, or",
        ),
        (
            "[pools.a]\ndomains = [{ uid = 1 }]",
            'pools.a.domains[0].name: is missing and has no default; for example name = ["',
        ),
        (
            '[pools.a]\ndomains = [{ name = "a", uid = -1 }]',
            "pools.a.domains[0].uid: expected a whole number from 0 to",
        ),
        ('[pools.a]\ndomains = [{ name = "a", uid = [1, "b"] }]', "pools.a.domains[0].uid[1]: expected a whole number"),
        (
            '[pools.a]\ndomains = [{ name = "a", uids = 1, uid = 1 }]',
            "pools.a.domains[0].uids: unknown key; did you mean uid?",
        ),
        ('[pools.a]\ndomains = ["a"]', 'pools.a.domains[0]: expected a table, found the text "a"'),
        ('[pools.a]\ndomains = [{ name = "a/b", uid = 1 }]', 'pools.a.domains[0].name: no name matches "a/b"'),
        ('[pools.a]\ndomains = [{ name = "a" }]', "pools.a.domains[0].uid: is missing and has no default; for example"),
        (
            '[pools.a]\ndomains = [{ name = "a", uid = 1, label = "b" }]',
            "pools.a.domains[0].label: is for the xen backend: no domain of the local one has",
        ),
        (
            f'[pools.a]\ndomains = [{{ name = "a", uid = 1, uuid = "{UUID}" }}]',
            "pools.a.domains[0].uuid: is for the xen backend: no domain of the local one has",
        ),
        ('[pools.a]\nreclaim = "balloon"', "pools.a.reclaim: is for the xen backend: what a domain drops is the host"),
        ('[pools.a]\nreclaim_floor = "64 MiB"', "pools.a.reclaim_floor: is for the xen backend"),
        ('[pools.a]\nreclaim_headroom = "64 MiB"', "pools.a.reclaim_headroom: is for the xen backend"),
        ("[pools.a]\nmax_grants = 7", "pools.a.max_grants: is for the xen backend: there are no grants here; leave"),
        ("[pools.a]\nmax_grants_per_domain = 7", "pools.a.max_grants_per_domain: is for the xen backend"),
        (
            f"{XEN}[pools.a]\ndomains = [{{ uid = 1 }}]",
            "pools.a.domains[0].uid: is for the local backend: a Xen domain",
        ),
        (f'{XEN}[pools.a]\ndomains = [{{ name = "a", uid = 1 }}]', "pools.a.domains[0].uid: is for the local backend"),
        (f"{XEN}[pools.a]\ndomains = [{{}}]", "pools.a.domains[0]: names nobody; write at least one of name, uuid and"),
        (
            f'{XEN}[pools.a]\ndomains = [{{ uuid = "2f1d4b6e" }}]',
            "pools.a.domains[0].uuid: expected a uuid of 8-4-4-4-12 hexadecimal digits, found the text",
        ),
        (
            f'{XEN}[pools.a]\ndomains = [{{ label = "a*" }}]',
            "pools.a.domains[0].label: expected a name of 1 to 64 char",
        ),
        (f'{XEN}socket = "/a"', "broker.socket: is for the local backend: on xen agents come through xenstore and"),
        (
            f'{XEN}[pools.a]\nreclaim = "swap"',
            'pools.a.reclaim: expected one of "off", "balloon", found the text "swap"',
        ),
        (f'{XEN}[pools.a]\nreclaim_floor = "16 MiB"', "pools.a.reclaim_floor: expected a size from 32 MiB"),
        (f"{XEN}[pools.a]\nmax_grants = -1", "pools.a.max_grants: expected a whole number from 0 to 33554432, found"),
        (
            f"{XEN}[pools.a]\nmax_grants = 5\nmax_grants_per_domain = 6",
            "pools.a.max_grants_per_domain: is larger than max_grants = 5; change one",
        ),
        (f'{XEN}[pools.a]\nmax_area_bytes = "9 B"', "pools.a.max_area_bytes: expected a size from 8 MiB"),
    ],
)
def test_a_fault_names_key_and_remedy(text: str, expected: str) -> None:
    found = faults(text)
    assert len(found) == 1
    assert found[0].startswith(expected)
    assert "; " in found[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[broker]\nx = \n", "not TOML: .*line 2"),
        (b"[pools.a]\n[pools.a]\n", "not TOML: .*twice|not TOML: .*declare"),
        (b"a = " + b"1" * 5000, "not TOML"),
        (b"a = " + b"[" * 100_000, "nested too deeply|not TOML"),
        (b"[broker]\n# \xff", "line 2 is not UTF-8"),
    ],
)
def test_what_is_no_toml_is_said_so(data: bytes, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"broker.toml: (?:{expected})"):
        BrokerConfig.parse(data, "broker.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        BrokerConfig.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        BrokerConfig.load(tmp_path)
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (schema.MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        BrokerConfig.load(large)
    large.write_bytes(b"#" * schema.MAX_FILE_BYTES)
    assert BrokerConfig.load(large) == parse("")


# -------------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("rules", "dead"),
    [
        (['{ name = "*", uid = 1 }', '{ name = "a", uid = 1 }'], [1]),
        (['{ name = "a", uid = 1 }', '{ name = "*", uid = 1 }'], []),
        (['{ name = "*", uid = 1 }', '{ name = "a", uid = 2 }'], []),
        (['{ name = "*", uid = 1 }', '{ name = "a", uid = [1, 2] }'], []),
        (['{ name = "*", uid = 1 }', '{ name = "a*", uid = 2 }', '{ name = ["ab", "ac"], uid = [1, 2] }'], [2]),
        (['{ name = "a", uid = 1 }', '{ name = "b", uid = 1 }', '{ name = "{a,b}", uid = 1 }'], []),
        (['{ name = "a", uid = 1 }', '{ name = "a", uid = 1 }', '{ name = "a", uid = 1 }'], [1, 2]),
    ],
)
def test_rules_that_can_never_match_are_warned_of(rules: list[str], dead: list[int]) -> None:
    config = parse(f"[broker]\nenabled = true\n[pools.office]\ndomains = [{', '.join(rules)}]\n")
    assert [warning.split(" can never")[0] for warning in config.warnings] == [
        f"pools.office.domains[{number}]" for number in dead
    ]


@pytest.mark.parametrize(
    ("rules", "dead"),
    [
        (['{ name = "*" }', '{ name = "a", label = "x" }', '{ label = "x" }'], [1]),
        (['{ label = "x" }', '{ name = "a", label = ["x", "y"] }', '{ label = "x", name = "a" }'], [2]),
        (['{ label = "x", name = "a" }', '{ label = "x" }', '{ name = "a" }'], []),
        ([f'{{ uuid = "{UUID}" }}', f'{{ uuid = "{UUID}", name = "*" }}', '{ name = "*" }'], [1]),
        (['{ label = "x" }', '{ label = "y" }', '{ label = ["y", "x"], name = ["a", "b"] }'], [2]),
    ],
)
def test_xen_rules_that_can_never_match_are_warned_of(rules: list[str], dead: list[int]) -> None:
    config = parse(f"{XEN}enabled = true\n[pools.office]\ndomains = [{', '.join(rules)}]\n")
    assert [warning.split(" can never")[0] for warning in config.warnings] == [
        f"pools.office.domains[{number}]" for number in dead
    ]


def test_a_domain_of_two_pools_is_warned_of() -> None:
    config = parse("[broker]\nenabled = true\n" + POOL + '[pools.lab]\ndomains = [{ name = "web-1", uid = 1000 }]\n')
    assert len(config.warnings) == 1
    assert config.warnings[0].startswith(
        "pools.lab.domains[0] can never match: pools.office.domains[0] comes before it"
    )


def test_globs_that_are_there_twice_are_warned_of() -> None:
    config = parse("[broker]\nenabled = true\n" + POOL + 'exclude = ["libcrypto*", "*.a"]\n')
    assert config.warnings == ('pools.office.exclude: "libcrypto*" is there 2 times, built-in ones counted',)


# ---------------------------------------------------------------------------------------------------------- example


def test_example_has_every_key_and_no_other() -> None:
    document = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert set(document) == {"broker", "pools"}
    assert set(document["broker"]) == set(schema.keys_of(BrokerConfig))
    entries: list[dict[str, Any]] = []
    for pool in document["pools"].values():
        assert set(pool) == set(schema.keys_of(PoolSection))
        entries += pool["domains"]
    # Entries for xen cannot stand beside those for local.
    entries += tomllib.loads(XEN_EXAMPLE.read_text(encoding="utf-8"))["pools"]["office"]["domains"]
    assert {name for entry in entries for name in entry} == set(schema.keys_of(DomainSection))


def test_example_for_xen_is_accepted_and_admits_guests() -> None:
    config = BrokerConfig.load(XEN_EXAMPLE)
    assert (config.enabled, config.backend, config.warnings) == (True, "xen", ())
    assert config.policy.pools["office"].reclaim == "balloon"
    for identity in (
        Identity("xen", domid=1, name="web-1"),
        Identity("xen", domid=2, name="db", uuid=UUID),
        Identity("xen", domid=3, name="mail", label="office"),
    ):
        assert isinstance(config.policy.admit(identity, ""), Admission)
    assert isinstance(config.policy.admit(Identity("xen", domid=2, name="db"), ""), Refusal)


def test_example_shows_the_defaults() -> None:
    config = BrokerConfig.load(EXAMPLE)
    plain = parse("[pools.office]")
    for name in schema.keys_of(BrokerConfig):
        assert getattr(config, name) == getattr(plain, name), name
    assert dict(config.policy.pools) == dict(plain.policy.pools)
    # It is off as it stands; that apart, there is nothing to warn of.
    assert len(config.warnings) == 1
    assert "switched off" in config.warnings[0]


def test_example_says_every_default() -> None:
    comment = ""
    seen: list[str] = []
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        assert len(line) <= 120
        if line.startswith("#"):
            comment += line.removeprefix("#")
            continue
        if found := re.match(r"([a-z_]+) = (.*)", line):
            wanted = "[]" if found[1] == "domains" else found[2]
            assert re.search(rf"Default: {re.escape(wanted)}(\.$|, | \()", comment), found[1]
            seen.append(found[1])
        comment = ""
    assert sorted(seen) == sorted([*schema.keys_of(BrokerConfig), *schema.keys_of(PoolSection)])


# ---------------------------------------------------------------------------------------------------- kinds of values


def read(kind: schema.Kind, value: object) -> object:
    problems = Problems("x")
    result = kind.read(value, "key", problems)
    assert (result is None) == (len(problems) > 0)
    return result


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (0, 0),
        (5, 5),
        ("5 B", 5),
        ("5B", 5),
        ("64 MiB", 64 << 20),
        ("64MiB", 64 << 20),
        ("2 TiB", 2 << 40),
        ("1 KiB", 1024),
        (-1, None),
        ("", None),
        ("64", None),
        ("64 MB", None),
        ("64 mib", None),
        ("-1 B", None),
        ("1.5 MiB", None),
        ("64  MiB", None),
        ("64 MiB\n", None),
        ("٣ B", None),
        ("9" * 16 + " B", None),
        ("3 TiB", None),
        (None, None),
    ],
)
def test_sizes(value: object, size: int | None) -> None:
    assert read(schema.Size(0, 2 << 40), value) == size


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("500 ms", 0.5),
        ("10 s", 10.0),
        ("10s", 10.0),
        ("1.5 s", 1.5),
        ("2 min", 120.0),
        ("1 h", 3600.0),
        ("0 s", 0.0),
        (10, None),
        ("10", None),
        ("10 m", None),
        ("-1 s", None),
        ("1e3 s", None),
        ("2 h", None),
        ("10 s\n", None),
    ],
)
def test_durations(value: object, seconds: float | None) -> None:
    assert read(schema.Duration(0, 3600), value) == seconds


@given(st.integers(0, 2**50))
def test_a_written_size_is_read_back(size: int) -> None:
    assert read(schema.Size(0, 2**50), size_text(size)) == size


@given(st.integers(0, 10**8))
def test_a_written_duration_is_read_back(milliseconds: int) -> None:
    seconds = read(schema.Duration(0, 10**6), schema.duration_text(milliseconds / 1000))
    assert seconds == pytest.approx(milliseconds / 1000)


toml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from([*schema.keys_of(BrokerConfig), *schema.keys_of(PoolSection), "x", ""]), toml_values, max_size=5
    )
)
def test_any_table_gives_a_section_or_problems(table: dict[str, Any]) -> None:
    sections: tuple[type[Any], ...] = (BrokerConfig, PoolSection, DomainSection)
    for section in sections:
        problems = Problems("x")
        result = schema.read_section(section, table, "t", problems)
        assert (result is None) == (len(problems) > 0)
        for problem in problems:
            assert problem.where
            assert problem.what
            assert problem.remedy
            assert "\n" not in str(problem)


def test_every_example_of_a_kind_is_accepted() -> None:
    def check(kind: schema.Kind) -> None:
        if isinstance(kind, schema.ListOf):
            check(kind.kind)
        if not isinstance(kind, schema.Table) and not (isinstance(kind, schema.ListOf) and "..." in kind.example):
            read_back = read(kind, tomllib.loads(f"key = {kind.example}")["key"])
            assert read_back is not None, kind

    for section in (BrokerConfig, PoolSection, DomainSection):
        for kind in schema.keys_of(section).values():
            check(kind)


def test_defaults_are_within_their_kinds() -> None:
    problems = Problems("x")
    for section in (BrokerConfig, PoolSection):
        kinds = schema.keys_of(section)
        for f in dataclasses.fields(section):
            if isinstance(kinds.get(f.name), schema.Integer | schema.Size):
                kinds[f.name].read(f.default, f.name, problems)
            elif isinstance(kinds.get(f.name), schema.Duration):
                kinds[f.name].read(schema.duration_text(getattr(parse(""), f.name)), f.name, problems)
    assert list(problems) == []

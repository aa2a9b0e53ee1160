"""Why a file or a domain does not share: every code has an answer, and every state is told from the others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sharearea.common.events import VIOLATIONS
from sharearea.common.explain import EXPLANATIONS, STATES, codes
from sharearea.config import BrokerConfig
from sharearea.why import Facts, Finding, explain

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096


def test_every_code_of_the_catalogue_and_every_verdict_has_a_meaning_and_a_remedy() -> None:
    assert set(EXPLANATIONS) == codes() | set(VIOLATIONS)
    for code, explanation in (EXPLANATIONS | STATES).items():
        assert explanation.meaning.strip(), code
        assert explanation.remedy.strip(), code
    assert not set(EXPLANATIONS) & set(STATES)


def test_every_state_is_one_that_somebody_can_be_in() -> None:
    sources = [ROOT / "sharearea" / "why.py", *(ROOT / "guest-agent" / "sharearea_agent").glob("*.py")]
    text = "\n".join(source.read_text() for source in sources)
    said = set(re.findall(r'"([a-z]+(?:-[a-z]+)*)"', text))
    assert set(STATES) <= said
    named = set(re.findall(r'Finding\(\s*"([a-z-]+)"', text))
    assert named <= set(STATES) | set(EXPLANATIONS)


def config(broker: str = "enabled = true", pool: str = "", domains: str = '{ name = "d*", uid = 0 }') -> BrokerConfig:
    text = f"[broker]\n{broker}\n[pools.p]\ndomains = [{domains}]\n{pool}\n"
    return BrokerConfig.parse(text.encode(), "broker.toml")


def a_pool(**more: Any) -> dict[str, Any]:
    return {
        "pool": "p",
        "mode": "share",
        "domains": 2,
        "paused": None,
        "pages_published": 10,
        "area_bytes": 1 << 20,
        "area_max_bytes": 2 << 20,
        "possible_saved_bytes": 5 << 20,
        "grants_used": None,
        "grants_max": None,
    } | more


def a_status(*pools: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"enabled": True, "backend": "local", "pools": list(pools or (a_pool(),))} | more


def a_domain(**more: Any) -> dict[str, Any]:
    return {
        "domain": "d1",
        "pool": "p",
        "state": "connected",
        "detached": False,
        "files": 3,
        "owned_files": 0,
        "owned_pages": 0,
        "held_pages": 0,
        "reports_under_way": 0,
        "distinct_pages": 100,
        "common_pages": 50,
        "given_up_bytes": 0,
        "share_bytes": 0,
        "net_bytes": 0,
        "ignored": {},
        "strikes": 0,
    } | more


def a_file(**more: Any) -> dict[str, Any]:
    return {
        "pool": "p",
        "domain": "d1",
        "path": "/f",
        "size_bytes": 10 * PAGE,
        "pages": 10,
        "zero_pages": 0,
        "text_pages": 0,
        "pages_in_area": 10,
        "pages_owned": 0,
        "holders": 2,
        "whole": True,
        "undelivered": False,
    } | more


def an_agent(**more: Any) -> dict[str, Any]:
    return {
        "connected": True,
        "known": True,
        "left_out": "",
        "scanning": False,
        "reason": "",
        "offered_pages": 10,
        "attached_pages": 0,
        "programs": 0,
    } | more


ON: dict[str, Any] = {"config": config(), "status": a_status(), "domains": [a_domain()]}
OFF = config("enabled = false")


def on(**more: Any) -> dict[str, Any]:
    return ON | more


@pytest.mark.parametrize(
    ("facts", "expected", "where"),
    [
        # The broker.
        ({"config": config(), "broker_error": "nobody answers"}, ["broker-not-running", "domain-unknown"], "nobody"),
        ({"config": OFF, "broker_error": "x"}, ["broker-not-running", "disabled"], ""),
        ({"config": OFF, "status": a_status(enabled=False)}, ["disabled"], "enabled = false"),
        ({"config": config(), "status": {"enabled": True, "backend": "local", "pools": []}}, ["no-pool"], ""),
        # Who is not there.
        (on(domains=[]), ["domain-unknown"], "pools.p.domains[0] would let it in, with uid 0"),
        (on(domains=[], config=config(domains='{ name = "x", uid = 0 }')), ["no-matching-rule", "domain-unknown"], ""),
        (on(domains=[], config=None, config_error="unreadable"), ["domain-unknown"], "unreadable"),
        (
            on(domains=[], refused=[{"domain": "d1", "reason": "pool-full", "text": "64 of 64", "ago_ms": 5000}]),
            ["pool-full"],
            "5 s ago: 64 of 64",
        ),
        (on(domains=[{"domain": "d1", "pool": "p", "state": "barred", "barred_ms": 9000}]), ["barred"], "9 s"),
        (
            on(domains=[{"domain": "d1", "pool": "p", "state": "absent", "grace_left_ms": 3000, "detached": True}]),
            ["detached", "agent-gone"],
            "",
        ),
        # Who is there and shares nothing.
        (on(domains=[a_domain(detached=True, held_pages=7)]), ["detached"], "7 pages are still held"),
        (on(status=a_status(a_pool(mode="report"))), ["report-only"], "pools.p.mode; it would save 5.0 MiB"),
        (
            on(status=a_status(a_pool(paused="area-full: 2 MiB", pages_published=0))),
            ["area-full"],
            "area 1.0 MiB of 2.0 MiB",
        ),
        (on(status=a_status(a_pool(paused="store-full"))), ["store-full", "no-consumer"], ""),
        (on(domains=[a_domain(reports_under_way=5, files=0)]), ["reporting", "nothing-reported"], "5 files"),
        (on(domains=[a_domain(files=0)]), ["nothing-reported"], ""),
        (on(status=a_status(a_pool(domains=1))), ["alone"], "1 of k = 2"),
        (on(status=a_status(a_pool(domains=2)), config=config(pool="k = 3")), ["alone"], "2 of k = 3"),
        (on(domains=[a_domain(common_pages=0)]), ["nothing-in-common"], "k = 2"),
        (on(status=a_status(a_pool(pages_published=0))), ["publishing"], ""),
        (on(), ["no-consumer"], "0.2 MiB in common"),
        # Who shares, and what is left out.
        (
            on(domains=[a_domain(owned_pages=256, owned_files=2, given_up_bytes=1 << 20, net_bytes=1 << 19)]),
            ["shared"],
            "2 files, 1.0 MiB mapped; gave up 1.0 MiB",
        ),
        (on(domains=[a_domain(owned_pages=256)]), ["shared", "not-dropped"], ""),
        (
            on(domains=[a_domain(ignored={"quota-files": {"files": 4, "bytes": 1}})]),
            ["no-consumer", "quota-files"],
            "pools.p.max_files = 100000",
        ),
        (
            on(domains=[a_domain(ignored={"too-small": {"files": 4, "bytes": 1}})]),
            ["no-consumer", "too-small"],
            "16 KiB",
        ),
        (on(domains=[a_domain(strikes=2)]), ["no-consumer", "strikes"], "2 times"),
        (
            on(
                status=a_status(a_pool(grants_used=10, grants_max=10)),
                domains=[a_domain(owned_pages=9, given_up_bytes=1)],
            ),
            ["shared", "grant-budget"],
            "10 of 10 entries of the pool",
        ),
        (
            on(
                status=a_status(a_pool(grants_used=8, grants_max=10, domain_grants_max=5)),
                domains=[a_domain(owned_pages=3, held_pages=5, given_up_bytes=1)],
            ),
            ["shared", "grant-budget"],
            "5 of 5 entries of one domain",
        ),
    ],
)
def test_domains(facts: dict[str, Any], expected: list[str], where: str) -> None:
    check(Facts("d1", **facts), expected, where)


@pytest.mark.parametrize(
    ("facts", "expected", "where"),
    [
        ({"config": config(), "broker_error": "nobody"}, ["broker-not-running"], ""),
        ({"config": OFF, "status": a_status(enabled=False)}, ["disabled"], ""),
        # What a domain reports.
        (on(files=[a_file(pages_owned=9)]), ["shared"], "9 of 10 pages are mapped"),
        (on(files=[a_file()]), ["no-consumer"], "10 of 10 pages in the area, 2 domains hold it (k = 2)"),
        (on(files=[a_file(pages_in_area=4)]), ["no-consumer", "partly"], ""),
        (on(files=[a_file(pages_in_area=0, holders=1)]), ["one-holder"], "1 domains hold it (k = 2)"),
        (on(files=[a_file(pages_in_area=0)]), ["publishing"], ""),
        (on(files=[a_file(pages_in_area=0, undelivered=True)]), ["undelivered"], ""),
        (on(files=[a_file(pages_in_area=0, zero_pages=10)]), ["zero-pages"], ""),
        (on(files=[a_file(pages_in_area=0, pages=0)]), ["not-resident"], ""),
        (on(files=[a_file()], domains=[a_domain(detached=True)]), ["detached"], ""),
        (on(files=[a_file(pages_in_area=0)], status=a_status(a_pool(mode="report"))), ["report-only"], ""),
        (on(files=[a_file(pages_in_area=0)], status=a_status(a_pool(paused="area-full"))), ["area-full"], ""),
        (on(files=[a_file()], status=a_status(a_pool(paused="area-full"))), ["no-consumer"], ""),
        (
            on(files=[a_file(text_pages=3)], status=a_status(a_pool(grants_used=1, grants_max=1), backend="xen")),
            ["grant-budget", "text-stays"],
            "1 of 1 entries",
        ),
        (on(files=[a_file(), a_file(domain="d2", pages_owned=10)]), ["no-consumer", "shared"], ""),
        # What none does.
        (on(), ["not-reported-by-any"], ""),
        (on(domains=[]), ["no-domains"], ""),
        (on(config=config(pool='exclude = ["/f"]')), ["excluded"], 'pools.p.exclude "/f"'),
        (on(config=config(pool='include = ["/g"]')), ["not-included"], "pools.p.include"),
        (
            on(local_size=5),
            ["too-small"],
            "pools.p.min_file_bytes = 16 KiB; the file at this path on this host has 5 B",
        ),
        (on(local_size=1 << 30, config=config(pool='max_file_bytes = "1 MiB"')), ["too-large"], "1 MiB"),
        (on(local_size=1 << 20), ["not-reported-by-any"], "has 1 MiB"),
        (on(domains=[a_domain(reports_under_way=2)]), ["reporting", "not-reported-by-any"], ""),
        (
            on(domains=[a_domain(ignored={"quota-bytes": {"files": 2, "bytes": 1}})]),
            ["quota-bytes", "not-reported-by-any"],
            "it may be one of them; pools.p.max_bytes = 64 GiB",
        ),
        # What its agent says.
        (on(agent_error="nobody"), ["agent-not-running", "not-reported-by-any"], "nobody"),
        (on(agent=an_agent(known=False, left_out="not-designated")), ["not-designated"], ""),
        (on(agent=an_agent(known=False, left_out="not-resident")), ["not-resident"], ""),
        (on(agent=an_agent(known=False, left_out="too-small")), ["too-small"], ""),
        (on(agent=an_agent(known=False, scanning=True)), ["not-seen-yet"], "a scan is under way"),
        (on(agent=an_agent(connected=False, reason="no-broker")), ["no-broker"], ""),
        (on(agent=an_agent(reason="bytes-differed"), files=[a_file()]), ["bytes-differed", "no-consumer"], ""),
        (on(agent=an_agent(reason="lease-refused", programs=2)), ["lease-refused"], "2 programs have it open"),
        (on(agent=an_agent(attached_pages=10, programs=1), files=[a_file(pages_owned=10)]), ["shared", "shared"], ""),
        (on(agent=an_agent()), ["no-consumer"], "10 pages are on offer"),
    ],
)
def test_files(facts: dict[str, Any], expected: list[str], where: str) -> None:
    check(Facts("/f", **facts), expected, where)


def check(facts: Facts, expected: list[str], where: str) -> None:
    found = explain(facts)
    assert list(dict.fromkeys(finding.code for finding in found)) == list(dict.fromkeys(expected))
    assert any(where in finding.where for finding in found), found
    assert all(finding.meaning and finding.remedy for finding in found)


def test_a_code_of_a_later_version_is_shown_as_it_is() -> None:
    finding = Finding("teleported", "d1")
    assert finding.code == "teleported"
    assert "does not know" in finding.meaning
    assert dataclasses.asdict(finding)["who"] == "d1"

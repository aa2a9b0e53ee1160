"""Domains that do nothing wrong: what they hold in common is shared, byte for byte, and given back."""

from __future__ import annotations

from typing import Any

import pytest

from .harness import MIB, PAGE, Host, cached_pages, digest, noise, wait


@pytest.mark.parametrize("count", [2, 3])
def test_common_files_are_shared_and_given_back(host: Host, count: int) -> None:
    whole, odd = noise(4 * MIB, 1), noise(300_001, 2)
    files = {"whole.bin": whole, "sub/odd.bin": odd, "hole.bin": bytes(8 * PAGE) + noise(8 * PAGE, 3)}
    host.start_broker()
    domains = host.add_domains(count, files)
    for at, domain in enumerate(domains):
        domain.write("own.bin", noise(MIB, 100 + at))
    host.wait_offered(3)
    in_area = 4 * MIB // PAGE + -(-300_001 // PAGE) + 8
    host.wait_pages("pages_published", in_area)

    resident = {domain.name: cached_pages(domain.root / "whole.bin") for domain in domains}
    assert set(resident.values()) == {4 * MIB // PAGE}
    programs = [domain.program() for domain in domains]
    for program in programs:
        for name in (*files, "own.bin"):
            program.open(program.domain.root / name, name)
    for program in programs:
        program.wait_shared(4 * MIB // PAGE, "whole.bin")
        program.wait_shared(-(-300_001 // PAGE), "sub/odd.bin")
        program.wait_shared(8, "hole.bin")
        state = program.ask("state")
        assert state["own.bin"]["pages"] == 0
        assert state["own.bin"]["reason"] == "not-offered"
        for name, data in files.items():
            assert program.ask("hash", name=name) == digest(data), name

    # The guests' own copies really go: the kernel says so, file by file.
    for domain in domains:
        assert cached_pages(domain.root / "own.bin") == MIB // PAGE
        # The kernel drops whole folios: hole.bin, half of which is shared, may stay.
        host.wait_warm("drops counted", lambda d: d.status()["dropped_pages_total"] >= in_area - 8, domain)
    for domain in domains:
        wait("the page cache dropped", lambda d: cached_pages(d.root / "whole.bin") == 0, domain)
        wait("the page cache dropped", lambda d: cached_pages(d.root / "sub/odd.bin") == 0, domain)
    for program in programs:
        for name, data in files.items():
            assert program.ask("hash", name=name) == digest(data), name
    assert all(cached_pages(domain.root / "whole.bin") == 0 for domain in domains)

    pool = host.pool()
    assert pool["pages_shared"] == in_area
    assert pool["pages_sharing"] == in_area * count
    assert pool["domains"] == count
    assert pool[f"slots_held_by_{count}"] == in_area
    assert pool[f"slots_mapped_{count}_times"] == in_area
    assert pool["area_bytes"] >= in_area * PAGE
    states = host.domain_states()
    for domain in domains:
        state = states[domain.name]
        assert (state["files"], state["owned_files"], state["owned_pages"]) == (4, 3, in_area)
        assert state["state"] == "connected"
        status = domain.status()
        assert (status["attached_files"], status["attached_pages"], status["leases"]) == (3, in_area, 3)
    listed = {(file["domain"], file["path"]): file for file in host.files()}
    assert len(listed) == 4 * count
    for domain in domains:
        entry = listed[domain.name, "/whole.bin"]
        assert (entry["pages"], entry["pages_in_area"], entry["pages_owned"]) == (1024, 1024, 1024)
        assert (entry["holders"], entry["whole"]) == (count, True)
        assert listed[domain.name, "/own.bin"]["pages_in_area"] == 0

    _give_back(host, programs, in_area)


def _give_back(host: Host, programs: list[Any], in_area: int) -> None:
    """Consumers let go one after the other; then the domains' files go, and the memory with them."""
    first, *others = programs
    for name in ("whole.bin", "sub/odd.bin", "hole.bin"):
        first.ask("close", name=name)
    wait("no owner in the first domain", lambda: host.domain_states()[first.domain.name]["owned_pages"] == 0)
    assert host.pool()["pages_shared"] == in_area
    wait("no lease in the first domain", lambda: first.domain.status()["leases"] == 0)
    for program in others:
        program.quit()
    wait("no owners", lambda: all(not state["owned_pages"] for state in host.domain_states().values()))
    host.wait_pages("pages_sharing", 0)

    # Pages nobody holds leave the area, and a segment that is empty is given back when the next one is in use.
    for domain in host.domains:
        for name in ("whole.bin", "sub/odd.bin", "hole.bin"):
            (domain.root / name).unlink()
    host.wait_pages("pages_published", 0)
    size = 8 * MIB
    filler = noise(size, 9)
    for domain in host.domains:
        domain.write("filler.bin", filler)
    host.wait_pages("pages_published", size // PAGE)
    wait("the empty segment closed", lambda: host.events("segment.closed"))
    wait("memory given back", lambda: host.pool()["area_bytes"] < size + 4 * MIB)


def test_a_domain_that_comes_later_reads_no_page_from_disk(host: Host) -> None:
    data = noise(2 * MIB, 4)
    host.start_broker()
    host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    [late] = host.add_domains(1, {"f.bin": data})
    host.wait_offered(1, late)
    assert host.pool()["published_pages_total"] == len(data) // PAGE
    program = late.program()
    program.open(late.root / "f.bin")
    program.wait_shared(len(data) // PAGE)
    assert program.ask("hash", name="f") == digest(data)
    # One known root costs one look-up: only one of the first two had to say what is in the file.
    wanted = sum(domain.status()["reports"].get("wanted", 0) for domain in host.domains)
    assert wanted == 1

"""What the Xen area decides without Xen. All that touches a hypervisor is tried on one: tests/xen/area_probe.py."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from sharearea import cli
from sharearea.area.base import Area
from sharearea.area.toolstack import HostLimits, ListedDomain, Toolstack
from sharearea.area.xen import BASE_FRAME, GrantBudget, XenArea, remove, survey
from sharearea.common.errors import Closed, HostError, UsageError
from sharearea.common.native import AreaDomain

IDENTITY = uuid.UUID("22222222-2222-3333-4444-555555555555")
KEY = bytes(range(32))
SLOTS = 2048

no_xen = pytest.mark.skipif(Path("/dev/xen/privcmd").exists(), reason="this is a Xen host")


class Host(Toolstack):
    """A toolstack of a host with these domains; it makes and destroys nothing."""

    def __init__(self, *domains: ListedDomain, limits: HostLimits | None = None) -> None:
        super().__init__("/nonexistent/xl")
        self.listed = domains
        self.asked = 0
        self.bounds = limits or HostLimits(64, 1024, "default")

    def domains(self) -> tuple[ListedDomain, ...]:
        return self.listed

    def limits(self) -> HostLimits:
        self.asked += 1
        return self.bounds


def domain(domid: int, name: str = "sharearea-blue", identity: uuid.UUID = IDENTITY) -> ListedDomain:
    return ListedDomain(domid, name, str(identity), 2 << 20, paused=True, dying=False)


def area(host: Toolstack, **changed: Any) -> XenArea:
    words: dict[str, Any] = {
        "pool": "blue",
        "identity": IDENTITY.bytes,
        "key": KEY,
        "slots_per_segment": SLOTS,
        "max_bytes": 64 << 20,
        "max_grants": None,
        "toolstack": host,
    }
    return XenArea(**{**words, **changed})


def test_it_is_an_area_and_needs_no_domain_before_its_first_page() -> None:
    with area(Host()) as made:
        held: Area = made
        assert (held.pool, held.slots_per_segment) == ("blue", SLOTS)
        assert (made.domid, made.identity, made.segments(), made.allocated_bytes()) == (None, IDENTITY.bytes, (), 0)
        assert made.alive()
        assert made.entries() == (b"", b"", b"")
        assert made.verify(5, bytes(96)) == b"\0\0\0"
        assert made.revoke(bytes(12)) == b"\0\0\0"
        made.close_segment(3)
        with pytest.raises(HostError, match="no area domain yet"):
            made.grant(1, bytes(4), bytes(4))
        with pytest.raises(HostError, match="no area domain yet"):
            made.move(bytes(4), 0, bytes(32))


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": bytes(15)},
        {"key": bytes(31)},
        {"slots_per_segment": 0},
        {"slots_per_segment": 511},
        {"max_grants": 8},
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        area(Host(), **changed)


def test_slots_of_two_segments_are_refused_before_anything_is_made() -> None:
    with area(Host()) as made, pytest.raises(ValueError, match="not in one segment"):
        made.fill(SLOTS - 1, bytes(8192), bytes(64))


@pytest.mark.parametrize(
    ("frames", "max_grants", "entries"),
    [(64, None, 32768), (64, 1000, 1000), (64, 100000, 32768), (1, None, 512), (4096, None, 1 << 21)],
)
def test_the_budget_is_known_before_the_domain_is_there(frames: int, max_grants: int | None, entries: int) -> None:
    host = Host(limits=HostLimits(frames, 1024, "xenhypfs"))
    with area(host, max_grants=max_grants) as made:
        assert made.budget() == GrantBudget(8, entries, frames * 512, 1024 * 256)
        made.budget()
    assert host.asked == 1  # a question costs a process


def test_adopting_says_what_is_not_as_the_store_has_it() -> None:
    known = {0: (5, BASE_FRAME), 3: (5, BASE_FRAME + 3 * SLOTS)}
    with area(Host(domain(5))) as made:
        assert made.adopt({}) is None
        assert made.adopt({**known, 4: (6, BASE_FRAME + 4 * SLOTS)}) == "area-replaced"
        assert made.adopt({**known, 4: (5, BASE_FRAME + 3 * SLOTS)}) == "segment-size-changed"
        assert made.domid is None
    with area(Host()) as made:
        assert made.adopt(known) == "area-gone"
    # Neither a name nor a domid makes it ours.
    with area(Host(domain(5, identity=uuid.uuid4()))) as made:
        assert made.adopt(known) == "area-gone"
    dying = ListedDomain(5, "", str(IDENTITY), 4096, paused=True, dying=True)
    with area(Host(dying)) as made:
        assert made.adopt(known) == "area-gone"


@no_xen
def test_a_host_that_does_not_answer_says_nothing_about_the_area() -> None:
    with area(Toolstack("/nonexistent/xl")) as made, pytest.raises(HostError, match="no command"):
        made.adopt({0: (5, BASE_FRAME)})
    with area(Host(domain(5))) as made, pytest.raises(HostError):
        made.adopt({0: (5, BASE_FRAME)})


def test_a_closed_area_can_be_closed_again_and_nothing_else() -> None:
    made = area(Host())
    made.close()
    made.close()
    for call in (
        lambda: made.fill(0, bytes(4096), bytes(32)),
        lambda: made.move(bytes(4), 0, bytes(32)),
        lambda: made.verify(0, bytes(32)),
        lambda: made.close_segment(0),
        lambda: made.adopt({}),
        lambda: made.grant(1, bytes(4), bytes(4)),
        lambda: made.revoke(bytes(4)),
        made.segments,
        made.allocated_bytes,
        made.budget,
        made.entries,
        made.alive,
    ):
        with pytest.raises(Closed):
            call()


@no_xen
def test_without_xen_the_facade_says_what_is_missing() -> None:
    with pytest.raises(HostError, match="domain 5: ") as caught:
        AreaDomain(5, BASE_FRAME)
    assert "dom0" in caught.value.hint
    with pytest.raises(ValueError, match="sa_area_open"):
        AreaDomain(-1, BASE_FRAME)


def test_destroying_needs_one_area_that_is_meant() -> None:
    other = uuid.UUID(bytes=os.urandom(16))
    with pytest.raises(UsageError, match="no area domain of 'green'"):
        remove(Host(domain(5)), "green", force=False)
    # Only what is named like an area domain can be removed, by its uuid too.
    with pytest.raises(UsageError, match="no area domain"):
        remove(Host(domain(5, name="web-1")), str(IDENTITY), force=True)
    twins = Host(domain(5), domain(6, identity=other))
    with pytest.raises(UsageError, match="2 area domains") as caught:
        remove(twins, "blue", force=True)
    assert "uuid" in caught.value.hint


def test_nothing_is_listed_where_nothing_is() -> None:
    assert list(survey(Host(domain(5, name="web-1")))) == []


def test_the_command_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for words in (["area", "list"], ["area", "list", "--json"], ["area", "destroy", "blue"]):
        assert cli.main(words) == HostError.exit_code
        assert "there is no command xl" in capsys.readouterr().err
    xl = tmp_path / "xl"
    xl.write_text("#!/bin/sh\necho Name ID Mem VCPUs State Time UUID\n")
    xl.chmod(0o755)
    assert cli.main(["area", "list"]) == 0
    assert capsys.readouterr().out == "no area domain\n"
    assert cli.main(["area", "list", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert cli.main(["area", "destroy", "blue"]) == UsageError.exit_code

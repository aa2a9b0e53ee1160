"""What `sharearea check` says of a Xen host, with programs in the place of xl and xenhypfs that print what these do.

The real ones it meets in tests/xen; the local probes in tests/e2e.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from sharearea.area.toolstack import Toolstack
from sharearea.check import Finding, check_host
from sharearea.config import BrokerConfig

# As Xen 4.17 in the lab printed it.
INFO = """\
host                   : dom0
release                : 6.1.0-56-amd64
machine                : x86_64
nr_cpus                : 2
virt_caps              : {caps}
total_memory           : 2559
free_memory            : {free}
sharing_freed_memory   : 0
xen_major              : 4
xen_minor              : 17
xen_version            : 4.17.7
xen_commandline        : placeholder dom0_mem=640M console=com1 {options}
"""


@dataclass
class Tools:
    """xl and xenhypfs as scripts."""

    folder: Path
    caps: str = "pv hvm hap shadow gnttab-v1 gnttab-v2"
    free: int = 1890
    options: str = ""
    frames: int | None = 1024
    maptrack: int | None = 2048

    def toolstack(self) -> Toolstack:
        info = INFO.format(caps=self.caps, free=self.free, options=self.options)
        xl = self._script("xl", f'[ "$1" = info ] || exit 1\ncat <<EOF\n{info}EOF\n')
        hypfs = "exit 1\n"
        if self.frames is not None:
            hypfs = f"case $2 in */gnttab_max_frames) echo {self.frames};; *) echo {self.maptrack};; esac\n"
        return Toolstack(xl, self._script("xenhypfs", hypfs))

    def _script(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return str(path)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(tmp_path)


def check(tools: Tools, *keys: str, pool: str = "office") -> dict[str, Finding]:
    text = f'[broker]\nenabled = true\nbackend = "xen"\nstate_dir = "{tools.folder}/state"\n'
    text += f'status_socket = "{tools.folder}/run/s"\n[pools.{pool}]\ndomains = [{{ name = "*" }}]\n' + "\n".join(keys)
    found = check_host(BrokerConfig.parse(text.encode(), "broker.toml"), tools.toolstack())
    by_subject = {finding.subject: finding for finding in found}
    assert len(by_subject) == len(found)
    return by_subject


SMALL = 'max_area_bytes = "256 MiB"'


def test_a_host_with_room_is_fine(tools: Tools) -> None:
    found = check(tools, SMALL)
    for subject in ("xen", "area domains", "grants of office", "mappings in office", "memory"):
        assert (found[subject].level, found[subject].remedy) == ("ok", ""), found[subject]
    assert "4.17.7" in found["xen"].text
    # 1024 frames of 512 entries, 8 of them Xen's own; half of them for one domain.
    assert "524280 pages can be mapped at a time" in found["grants of office"].text
    assert "(2047 MiB), 262144 by one domain (1024 MiB)" in found["grants of office"].text
    assert "1024 frames (as Xen says)" in found["grants of office"].text
    # 2048 frames of 256 entries; a PV guest takes two for a page.
    assert "PVH guest can map 524288 pages (2048 MiB)" in found["mappings in office"].text
    assert "262144 (1024 MiB)" in found["mappings in office"].text
    # 256 MiB of pages, 0.5 MiB of tables for them and 2 MiB that are always there.
    assert "1890 MiB of 2559 MiB are free; the areas may come to 259 MiB" in found["memory"].text
    assert "socket" not in found
    assert "cachestat" not in found
    assert "leases" not in found


def test_a_host_without_pvh_says_what_to_switch_on(tools: Tools) -> None:
    tools.caps = "pv gnttab-v1"
    found = check(tools, SMALL)["area domains"]
    assert found.level == "fail"
    assert "cannot create a PVH domain: Xen has gnttab-v1 pv" in found.text
    assert "EPT" in found.remedy
    tools.caps = "pv hvm gnttab-v1"
    assert check(tools, SMALL)["area domains"].level == "fail", "nothing translates its addresses"


def test_no_xen_is_a_failure_with_a_remedy(tools: Tools) -> None:
    stack = tools.toolstack()
    (tools.folder / "xl").write_text("#!/bin/sh\necho 'xencall: error: Could not obtain handle' >&2\nexit 1\n")
    config = BrokerConfig.parse(b'[broker]\nbackend = "xen"\n', "broker.toml")
    found = {finding.subject: finding for finding in check_host(config, stack)}
    assert found["xen"].level == "fail"
    assert "Could not obtain handle" in found["xen"].text
    assert "dom0" in found["xen"].remedy
    (tools.folder / "xl").unlink()
    assert {finding.subject: finding for finding in check_host(config, stack)}["xen"].level == "fail"


@pytest.mark.parametrize(
    ("options", "frames", "maptrack", "words"),
    [
        ("", None, None, "64 frames (Xen's default)"),
        ("gnttab_max_frames=256", None, None, "256 frames (as its command line says)"),
        ("gnttab_max_frames=9", 512, 512, "512 frames (as Xen says)"),
    ],
)
def test_the_source_of_the_limits_is_named(
    tools: Tools, options: str, frames: int | None, maptrack: int | None, words: str
) -> None:
    tools.options, tools.frames, tools.maptrack = options, frames, maptrack
    assert words in check(tools, SMALL)["grants of office"].text


def test_a_budget_that_is_too_small_says_which_option_raises_it(tools: Tools) -> None:
    tools.frames, tools.maptrack = 64, 1024
    found = check(tools, SMALL)
    grants = found["grants of office"]
    # 65,536 pages, mapped by 2 domains, and Xen's 8: 131,080 entries in 257 frames.
    assert (grants.level, grants.remedy) == ("note", "gnttab_max_frames=257 on Xen's command line")
    assert "32760 pages" in grants.text
    assert "an area of 256 MiB that 2 domains map wholly takes 131080" in grants.text
    assert "gnttab_max_frames=385" in check(tools, SMALL, "k = 3")["grants of office"].remedy
    # What it says is enough.
    tools.frames = 257
    assert check(tools, SMALL)["grants of office"].level == "ok"
    tools.frames = 256
    assert check(tools, SMALL)["grants of office"].level == "note"


def test_max_grants_is_held_against_the_host_and_the_area(tools: Tools) -> None:
    found = check(tools, SMALL, "max_grants = 600000")["grants of office"]
    assert found.remedy == "gnttab_max_frames=1172 on Xen's command line"
    assert "max_grants = 600000, but the host allows 524288 entries" in found.text
    found = check(tools, SMALL, "max_grants = 1000")["grants of office"]
    assert found.remedy == "max_grants = 131080"
    assert "992 pages" in found.text
    assert "500 by one domain" in found.text
    tools.frames = 64
    found = check(tools, SMALL, "max_grants = 1000")["grants of office"]
    assert found.remedy == "gnttab_max_frames=257 on Xen's command line and max_grants = 131080"
    found = check(tools, 'max_area_bytes = "1 TiB"')["grants of office"]
    assert found.remedy == "set max_area_bytes of pool office lower"


def test_maptrack_is_held_against_what_one_domain_may_have(tools: Tools) -> None:
    tools.maptrack = 100
    found = check(tools, SMALL)["mappings in office"]
    # One domain may be granted 65,536 pages of the area, which take a PV guest 131,072 entries: 512 frames.
    assert found.level == "note"
    assert "a PVH guest can map 25600 pages (100 MiB), a PV guest, which uses two entries for each, 12800" in found.text
    assert found.remedy.startswith("gnttab_max_maptrack_frames=512 on Xen's command line")
    assert check(tools, SMALL, "max_grants_per_domain = 12800")["mappings in office"].level == "ok"
    tools.maptrack = 512
    assert check(tools, SMALL)["mappings in office"].level == "ok"


def test_areas_larger_than_what_is_free_are_said(tools: Tools) -> None:
    found = check(tools)["memory"]
    assert found.level == "note"
    assert "1890 MiB of 2559 MiB are free; the areas may come to 4106 MiB" in found.text
    assert "max_area_bytes" in found.remedy


def test_reclaiming_is_described(tools: Tools) -> None:
    found = check(tools, SMALL, 'reclaim = "balloon"')["pool office"]
    assert "down to 256 MiB" in found.text
    assert "less than 128 MiB" in found.text
    assert "taken" not in check(tools, SMALL)["pool office"].text

"""What the toolstack makes of `xl`'s words, with a script in its place that says what xl of Xen 4.17 was seen to say.

What xl and Xen do is tried on the real ones: tests/xen/area_probe.py.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from sharearea.area import toolstack as module
from sharearea.area.toolstack import HostLimits, ListedDomain, Toolstack, paging_bytes, stub_path
from sharearea.common import native
from sharearea.common.errors import HostError

MIB = 1 << 20
IDENTITY = uuid.UUID("22222222-2222-3333-4444-555555555555")

INFO = """\
host                   : dom0
virt_caps              : pv hvm hap gnttab-v1 gnttab-v2
total_memory           : 3071
free_memory            : 2398
xen_version            : 4.17.7
xen_caps               : xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64
xen_commandline        : dom0_mem=640M,max:640M com1=115200,8n1 noreboot xsave=0
"""

HEAD = "Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID                            \
Reason-Code\tSecurity Label\n"
DOM0 = "Domain-0                                     0   640     1     r-----      34.6 \
00000000-0000-0000-0000-000000000000        -                -\n"
AREA = "sharearea-blue                               1     4     1     --p---       0.0 \
22222222-2222-3333-4444-555555555555        -                -\n"
HUSK = "(null)                                       5     1     1     --p--d       0.0 \
22222222-2222-3333-4444-555555555555        -                -\n"
ODD = "two words 3                                 12   256     1     -b----      12.7 \
aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee        -                -\n"

Script = Callable[..., Toolstack]


@pytest.fixture
def scripted(tmp_path: Path) -> Script:
    """Make a toolstack whose `xl` is a shell script: one case for each verb. Its words are kept in `said`."""

    def make(timeout_s: float = 10.0, xenhypfs: str = "exit 1", **verbs: str) -> Toolstack:
        cases = "".join(f"{verb.replace('_', '-')})\n{body}\n;;\n" for verb, body in verbs.items())
        for name, body in (
            ("xl", f'echo "$@" >>{tmp_path}/said\ncase $1 in\n{cases}*) echo "no $1" >&2; exit 9;;\nesac\n'),
            ("xenhypfs", xenhypfs + "\n"),
        ):
            path = tmp_path / name
            path.write_text(f"#!/bin/sh\n{body}")
            path.chmod(0o755)
        return Toolstack(str(tmp_path / "xl"), str(tmp_path / "xenhypfs"), timeout_s)

    return make


def says(text: str) -> str:
    return f"cat <<'EOF'\n{text}EOF"


def said(tmp_path: Path) -> list[str]:
    return (tmp_path / "said").read_text().splitlines()


def test_domains_are_listed_whatever_their_names(scripted: Script) -> None:
    zero, area, husk, odd = scripted(list=says(HEAD + DOM0 + AREA + HUSK + ODD)).domains()
    assert (zero.domid, zero.name, zero.memory, zero.pool) == (0, "Domain-0", 640 * MIB, None)
    assert area == ListedDomain(1, "sharearea-blue", str(IDENTITY), 4 * MIB, paused=True, dying=False)
    assert area.pool == "blue"
    assert (husk.domid, husk.name, husk.dying, husk.pool) == (5, "", True, None)
    assert (odd.domid, odd.name, odd.paused, odd.memory) == (12, "two words 3", False, 256 * MIB)


def test_areas_are_told_by_name_and_found_by_uuid(scripted: Script) -> None:
    stack = scripted(list=says(HEAD + DOM0 + HUSK + AREA + ODD))
    assert [area.domid for area in stack.areas()] == [1]
    found = stack.find(IDENTITY.bytes)
    assert found is not None
    assert found.domid == 1
    assert stack.find(bytes(15) + b"\1") is None
    assert stack.find(bytes(16)) is None  # dom0's
    with pytest.raises(ValueError, match="domain 0"):
        stack.destroy(0)


def test_a_domain_that_dies_is_not_found_and_two_are_an_error(scripted: Script) -> None:
    assert scripted(list=says(HEAD + DOM0 + HUSK)).find(IDENTITY.bytes) is None
    twin = AREA.replace("sharearea-blue ", "sharearea-green").replace("   1     4", "   2     4")
    with pytest.raises(HostError, match="1, 2 have one uuid"):
        scripted(list=says(HEAD + AREA + twin)).find(IDENTITY.bytes)


def test_a_list_of_another_shape_is_an_error(scripted: Script) -> None:
    with pytest.raises(HostError, match="xl list says"):
        scripted(list=says(HEAD + "Domain-0 0 640 1 r----- 34.6\n")).domains()


def test_the_host_is_what_xl_says(scripted: Script) -> None:
    host = scripted(info=says(INFO)).host()
    assert (host.release, host.total_memory, host.free_memory) == ("4.17.7", 3071 * MIB, 2398 * MIB)
    assert host.can_run_pvh
    assert scripted(info=says(INFO)).free_memory() == 2398 * MIB


@pytest.mark.parametrize(
    ("caps", "can"), [("pv", False), ("pv hvm", False), ("pv hvm hap", True), ("hvm shadow", True), ("pv hap", False)]
)
def test_pvh_needs_a_cpu_and_translation(scripted: Script, caps: str, can: bool) -> None:
    info = INFO.replace("pv hvm hap gnttab-v1 gnttab-v2", caps)
    assert scripted(info=says(info)).host().can_run_pvh is can


def test_a_host_that_says_less_is_an_error(scripted: Script) -> None:
    with pytest.raises(HostError, match="free_memory"):
        scripted(info=says(INFO.replace("free_memory", "free"))).host()


def test_limits_come_from_xen_then_its_command_line_then_its_defaults(scripted: Script) -> None:
    hypfs = "case $2 in /params/gnttab_max_frames) echo 128;; /params/gnttab_max_maptrack_frames) echo 0x800;; esac"
    assert scripted(info=says(INFO), xenhypfs=hypfs.replace("0x800", "2048")).limits() == HostLimits(
        128, 2048, "xenhypfs"
    )
    options = INFO.replace("noreboot", "gnttab_max_frames=32 noreboot gnttab_max_frames=0x100")
    assert scripted(info=says(options)).limits() == HostLimits(256, 1024, "command line")
    assert scripted(info=says(INFO)).limits() == HostLimits(64, 1024, "default")
    # An older xenhypfs that answers what is no number.
    assert scripted(info=says(INFO), xenhypfs="echo none").limits().source == "default"
    # Not this option.
    other = INFO.replace("noreboot", "xgnttab_max_frames=3")
    assert scripted(info=says(other)).limits() == HostLimits(64, 1024, "default")


def made(tmp_path: Path, *, create: str = "true", mem_max: str = "true") -> dict[str, str]:
    """Verbs of a host on which `create` brings the area, keeps its configuration, and `destroy` removes it."""
    (tmp_path / "domains").write_text(HEAD + DOM0)
    return {
        "list": f"cat {tmp_path}/domains",
        "info": says(INFO),
        "create": f"cat $5 >{tmp_path}/config; cat <<'EOF' >>{tmp_path}/domains\n{AREA}EOF\n{create}",
        "mem_max": mem_max,
        "destroy": f"sed -i /sharearea-/d {tmp_path}/domains",
    }


needs_stub = pytest.mark.skipif(
    not Path(native.EXTENSION_FILE).with_name(module.STUB_NAME).exists(), reason="no 32-bit compiler built the stub"
)


@needs_stub
def test_an_area_domain_is_made_paused_and_may_grow(scripted: Script, tmp_path: Path) -> None:
    stack = scripted(**made(tmp_path))
    assert stack.create("blue", IDENTITY.bytes, max_bytes=1 << 30, grant_frames=64) == 1
    config = dict(line.split(" = ") for line in (tmp_path / "config").read_text().splitlines())
    assert config["name"] == '"sharearea-blue"'
    assert config["uuid"] == f'"{IDENTITY}"'
    assert config["type"] == '"pvh"'
    assert config["kernel"] == f'"{stub_path()}"'
    assert (config["memory"], config["max_grant_frames"]) == ("2", "64")
    assert config["shadow_memory"] == "4"
    assert "maxmem" not in config  # more than memory would be populated on demand
    assert config["on_crash"] == config["on_poweroff"] == config["on_reboot"] == '"preserve"'
    (create,) = (line for line in said(tmp_path) if line.startswith("create"))
    assert create.startswith("create -p -e -q /proc/self/fd/")
    assert said(tmp_path)[-1] == "mem-max 1 1026"


@needs_stub
def test_a_name_that_is_taken_is_left_alone(scripted: Script, tmp_path: Path) -> None:
    stack = scripted(**made(tmp_path))
    (tmp_path / "domains").write_text(HEAD + DOM0 + AREA)
    with pytest.raises(HostError, match="sharearea-blue already") as caught:
        stack.create("blue", bytes(16), max_bytes=MIB, grant_frames=64)  # nor is dom0, whose uuid this is
    assert f"sharearea area destroy {IDENTITY}" in caught.value.hint
    assert not any(line.startswith(("create", "destroy")) for line in said(tmp_path))


@needs_stub
def test_what_a_dead_broker_made_is_replaced(scripted: Script, tmp_path: Path) -> None:
    stack = scripted(**made(tmp_path))
    (tmp_path / "domains").write_text(HEAD + DOM0 + AREA.replace("   1     4", "   9     4") + HUSK)
    assert stack.create("blue", IDENTITY.bytes, max_bytes=MIB, grant_frames=64) == 1
    assert [line.split()[0] for line in said(tmp_path)] == ["list", "destroy", "create", "list", "mem-max"]
    assert said(tmp_path)[1] == "destroy 9"


@needs_stub
def test_what_is_half_made_goes(scripted: Script, tmp_path: Path) -> None:
    stack = scripted(**made(tmp_path, create="echo 'libxl: error: no memory' >&2; exit 3"))
    with pytest.raises(HostError, match="no memory") as caught:
        stack.create("blue", IDENTITY.bytes, max_bytes=MIB, grant_frames=64)
    assert "free memory is 2398 MiB, grant tables may have 64 frames" in caught.value.hint
    assert "destroy 1" in said(tmp_path)
    stack = scripted(**made(tmp_path, mem_max="exit 5"))
    with pytest.raises(HostError, match="mem-max"):
        stack.create("blue", IDENTITY.bytes, max_bytes=MIB, grant_frames=64)
    assert said(tmp_path)[-1] == "destroy 1"


@needs_stub
def test_a_host_without_virtualisation_is_told_so(scripted: Script, tmp_path: Path) -> None:
    verbs = made(tmp_path, create="exit 3")
    stack = scripted(**{**verbs, "info": says(INFO.replace("hvm hap ", ""))})
    with pytest.raises(HostError, match="cannot create a PVH domain") as caught:
        stack.create("blue", IDENTITY.bytes, max_bytes=MIB, grant_frames=64)
    assert "VT-x" in caught.value.hint


def test_without_a_stub_the_reason_is_said(scripted: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTENSION_FILE", str(tmp_path / "_native.abi3.so"))
    with pytest.raises(HostError, match=r"area_stub\.elf is missing") as caught:
        scripted(**made(tmp_path)).create("blue", IDENTITY.bytes, max_bytes=MIB, grant_frames=64)
    assert "gcc -m32" in caught.value.hint


def test_no_xen_no_right_no_answer(scripted: Script, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no command") as caught:
        Toolstack(str(tmp_path / "nowhere")).domains()
    assert "dom0" in caught.value.hint
    with pytest.raises(HostError, match="xl list failed: no list"):
        scripted().domains()
    begun = time.monotonic()
    with pytest.raises(HostError, match=r"took more than 0\.2 s"):
        scripted(timeout_s=0.2, list="exec sleep 30").domains()
    assert time.monotonic() - begun < 10
    (tmp_path / "xl").chmod(0o644)
    if os.geteuid() != 0 or not os.access(tmp_path / "xl", os.X_OK):
        with pytest.raises(HostError, match="Permission denied"):
            Toolstack(str(tmp_path / "xl")).domains()


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b"])
@needs_stub
def test_a_name_cannot_add_to_the_configuration(scripted: Script, tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match="cannot stand"):
        scripted(**made(tmp_path)).create(name, IDENTITY.bytes, max_bytes=MIB, grant_frames=64)
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(("pages", "mib"), [(0, 2), (1, 3), (1 << 17, 3), ((1 << 17) + 1, 4), (1 << 24, 130)])
def test_page_tables_take_8_bytes_a_page(pages: int, mib: int) -> None:
    assert paging_bytes(pages * 4096) == mib * MIB


@needs_stub
def test_the_stub_is_a_32_bit_kernel_at_one_megabyte() -> None:
    data = stub_path().read_bytes()
    assert data[:5] == b"\x7fELF\x01"
    assert int.from_bytes(data[24:28], "little") == 0x100000
    # XEN_ELFNOTE_PHYS32_ENTRY with that address: what makes it bootable.
    note = b"".join(n.to_bytes(4, "little") for n in (4, 4, 18)) + b"Xen\0" + (0x100000).to_bytes(4, "little")
    assert note in data


def test_this_machine_builds_the_stub() -> None:
    # As test_packaging expects: a compiler that is here and makes 32-bit code must have built it.
    compiler = shutil.which("gcc")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("no gcc for x86")
    assert stub_path().exists()

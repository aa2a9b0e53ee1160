"""The guest view's kernel module, as far as it can be tried without Xen: it builds, and both sides say the same.

What it does is proven in the lab: `make test-view`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sharearea_agent import view_control
from sharearea_agent.common.errors import HostError
from tests.xen.kernels import LINES, headers_of

KMOD = Path(__file__).resolve().parent.parent / "guest-agent" / "kmod"
SOURCES = sorted(path for path in KMOD.iterdir() if path.suffix in (".c", ".h") or path.name in ("Kbuild", "Makefile"))


def lacking(what: str) -> None:
    """Skip; where nothing may be skipped, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}; tools/kernel_headers.sh installs them")
    pytest.skip(what)


@pytest.mark.parametrize("line", LINES)
def test_it_builds_for_every_kernel_that_it_is_for_without_a_warning(line: str, tmp_path: Path) -> None:
    found = headers_of(line)
    if not found:
        lacking(f"no headers of Linux {line} are here")
    for headers in found:
        folder = tmp_path / headers.parent.name
        folder.mkdir()
        for path in SOURCES:
            shutil.copy(path, folder)
        done = subprocess.run(
            ["make", "-C", str(headers), f"M={folder}", "W=1", "modules"],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"},
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-4000:]
        assert "warning" not in said.lower().replace("skipping btf", ""), said[-4000:]
        assert (folder / "shareview.ko").stat().st_size > 0
        shown = subprocess.run(["/sbin/modinfo", str(folder / "shareview.ko")], capture_output=True, text=True)
        assert re.search(r"^license:\s+GPL$", shown.stdout, re.M)
        assert re.search(r"^alias:\s+fs-shareview$", shown.stdout, re.M)
        assert re.search(rf"^vermagic:\s+{re.escape(line)}\.", shown.stdout, re.M)


def test_the_agent_and_the_header_name_the_same_calls(tmp_path: Path) -> None:
    names = ("INFO", "ATTACH", "DETACH", "STATE", "HOLD")
    lines = "".join(f'printf("{name} %lu\\n", (unsigned long)SHAREVIEW_{name});\n' for name in names)
    limits = "".join(
        f'printf("{name} %lu\\n", (unsigned long)SHAREVIEW_{name});\n' for name in ("VERSION", "MAX_RUNS", "MAX_PAGE")
    )
    offsets = 'printf("EPOCH %zu\\nCOMPARED %zu\\n", offsetof(struct shareview_attach, epoch), ' + (
        "offsetof(struct shareview_attach, compared));\n"
    )
    program = tmp_path / "say.c"
    program.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <sys/ioctl.h>\n"
        f'#include "{KMOD}/shareview.h"\nint main(void) {{\n{lines}{limits}{offsets}return 0; }}\n'
    )
    subprocess.run(
        [os.environ.get("CC", "cc"), "-Wall", "-Werror", "-o", str(tmp_path / "say"), str(program)], check=True
    )
    out = subprocess.run([str(tmp_path / "say")], capture_output=True, text=True, check=True).stdout
    said = {line.split()[0]: int(line.split()[1]) for line in out.splitlines()}
    assert {name: said[name] for name in names} == {name: getattr(view_control, name) for name in names}
    assert said["VERSION"] == view_control.VERSION
    assert (said["MAX_RUNS"], said["MAX_PAGE"]) == (view_control.MAX_RUNS, view_control.MAX_PAGE)
    assert (said["EPOCH"], said["COMPARED"]) == (32, 40)


def test_every_source_says_its_license_and_dkms_its_kernels() -> None:
    for path in KMOD.iterdir():
        if path.suffix in (".c", ".h") or path.name in ("Kbuild", "Makefile", "dkms.conf"):
            assert "SPDX-License-Identifier: GPL-2.0-only" in path.read_text().partition("\n")[0], path
    text = (KMOD / "dkms.conf").read_text()
    (pattern,) = re.findall(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', text, re.M)
    built = ("5.10.0-46-amd64", "6.1.0-56-amd64", "6.12.117+deb12-amd64")
    allowed = {release: bool(re.search(pattern, release)) for release in built}
    assert all(allowed.values()), allowed
    assert not any(re.search(pattern, release) for release in ("5.1.2", "5.11.0", "5.15.3", "6.13.2", "6.0.9", "7.1.0"))


def test_without_the_module_the_agent_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(HostError) as raised:
        view_control.ViewControl(str(tmp_path / "nothing"))
    assert "shareview" in raised.value.hint
    with pytest.raises(HostError):
        view_control.ViewControl("/dev/null")

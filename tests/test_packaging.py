"""Both distributions as a user gets them: what an sdist carries, what its wheel installs, and that this works."""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import sharearea
import sharearea_agent
from sharearea.common import native

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"sharearea": ROOT, "sharearea-agent": ROOT / "guest-agent"}
# What Debian 12 ships of the libraries, so that the packages can be installed beside it.
DEBIAN_12 = {
    "cffi": "1.15.1",
    "lmdb": "1.4.0",
    "msgpack": "1.0.3",
    "rich": "13.3.1",
    "structlog": "22.3.0",
    "prometheus-client": "0.16.0",
    "waitress": "2.1.2",
    "watchdog": "2.2.1",
}
# Of extras, which pip brings: `stats`, `dashboard` and `estimate` are for whoever looks, not for every host.
NOT_IN_DEBIAN_12 = {
    "backports.zstd",
    "dash",
    "dissect.btrfs",
    "dissect.extfs",
    "dissect.hypervisor",
    "dissect.volume",
    "dissect.xfs",
    "duckdb",
}


def pyproject(name: str) -> dict[str, Any]:
    """The pyproject.toml of a distribution."""
    return tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def name(request: pytest.FixtureRequest) -> str:
    """Give the name of each distribution."""
    return str(request.param)


@pytest.fixture(scope="module")
def sdist(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, as pip would ask for it."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=FOLDERS[name], check=True, stdout=subprocess.DEVNULL)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, away from the tree."""
    out = tmp_path_factory.mktemp("wheel")
    pip(["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(out), str(sdist)])
    (made,) = out.iterdir()
    return made


def pip(arguments: list[str]) -> None:
    """Run pip without the network and without a word."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    subprocess.run([*command, "--no-index"], check=True)


def module_files(name: str) -> set[str]:
    """The Python files that a distribution carries, its schemas and views, beginning with its package's name."""
    package = name.replace("-", "_")
    top = FOLDERS[name] / package
    found = {f"{package}/py.typed"}
    found |= {f"{package}/schemas/{path.name}" for path in (top / "schemas").glob("*.json")}
    found |= {f"{package}/dashboard/{path.name}" for path in (top / "dashboard").glob("*.sql")}
    found |= {f"{package}/dashboard/assets/{path.name}" for path in (top / "dashboard" / "assets").glob("*")}
    for folder, _, files in os.walk(top, followlinks=True):
        found |= {str(Path(package, folder, file).relative_to(top.parent)) for file in files if file.endswith(".py")}
    return {str(Path(file)) for file in found}


def native_files() -> set[str]:
    """The native sources, without their tests."""
    return {f"native/{path.name}" for path in (ROOT / "native").glob("*.[ch]")}


def own_files(name: str) -> set[str]:
    """Native sources that one distribution carries and the other does not."""
    return {"native/area_stub.S", "native/area_stub.lds"} if name == "sharearea" else set()


def built_files(name: str) -> set[str]:
    """What a wheel has that no source tree has. This machine's compiler makes 32-bit code, or says why not."""
    built = {f"{name.replace('-', '_')}/_native.abi3.so"}
    if name == "sharearea-agent" and platform.machine() == "x86_64":
        built |= {f"sharearea_agent/{file}" for file in ("libsharearea_preload.so", "libsharearea.so", "sharearea.h")}
    return built | {"sharearea/area_stub.elf"} if name == "sharearea" else built


def test_an_sdist_carries_what_is_listed_and_no_links(name: str, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    top = f"{name.replace('-', '_')}-{sharearea.__version__}/"
    carried = {member.name.removeprefix(top) for member in members}
    meta = {"pyproject.toml", "CMakeLists.txt", "LICENSE", "PKG-INFO"}
    if "readme" in pyproject(name)["project"]:
        meta.add("README.md")
    assert carried == meta | native_files() | own_files(name) | module_files(name)


def test_a_wheel_from_the_sdist_holds_the_package_and_its_extension(name: str, wheel: Path) -> None:
    package = name.replace("-", "_")
    assert re.fullmatch(rf"{package}-[\d.]+-cp311-abi3-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = {file for file in archive.namelist() if not file.startswith(f"{package}-")}
        licenses = [file for file in archive.namelist() if file.endswith("/licenses/LICENSE")]
    assert files == module_files(name) | built_files(name)
    assert licenses


def test_an_installed_wheel_works_from_anywhere(name: str, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip(["install", "--no-deps", "--target", str(target), str(wheel)])
    package = name.replace("-", "_")
    # Without site (-S) the editable installs are not there; the libraries are found by their folder.
    code = f"""
import json, sys
sys.path += [{str(target)!r}, {sysconfig.get_path("platlib")!r}]
import {package}, {package}.common.native as native
fps, _ = native.fingerprint_pages(bytes(32), bytes(4096))
print(json.dumps([{package}.__file__, native._native.__file__, fps.hex()]))
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    source, extension, fps = json.loads(done.stdout)
    assert Path(source) == target / package / "__init__.py"
    assert Path(extension) == target / package / "_native.abi3.so"
    assert fps == native.fingerprint_pages(bytes(32), bytes(4096))[0].hex()


def test_both_have_one_version(name: str) -> None:
    assert metadata.version(name) == sharearea.__version__ == sharearea_agent.__version__


def test_each_brings_its_command(name: str) -> None:
    (command,) = (point for point in metadata.entry_points(group="console_scripts") if point.name == name)
    assert command.value == f"{name.replace('-', '_')}.cli:main"


def test_debian_12_and_what_is_newest_satisfy_the_requirements(name: str) -> None:
    project = pyproject(name)["project"]
    extras = [text for extra in project.get("optional-dependencies", {}).values() for text in extra]
    assert not {Requirement(text).name for text in project["dependencies"]} & NOT_IN_DEBIAN_12
    for text in project["dependencies"] + extras:
        requirement = Requirement(text)
        if text not in extras or requirement.name not in NOT_IN_DEBIAN_12:
            assert requirement.specifier.contains(DEBIAN_12[requirement.name]), text
        assert requirement.specifier.contains("9999"), text


def test_the_agent_needs_no_store_and_no_tables() -> None:
    needed = {Requirement(text).name for text in pyproject("sharearea-agent")["project"]["dependencies"]}
    assert needed == {"cffi", "msgpack", "structlog", "watchdog"}


def test_what_both_files_say_alike_is_alike() -> None:
    one, other = (pyproject(name) for name in sorted(FOLDERS))
    assert one["build-system"] == other["build-system"]
    for field in ("license", "license-files", "requires-python", "classifiers", "keywords"):
        assert one["project"][field] == other["project"][field]


def test_the_extension_exports_its_entry_only(name: str) -> None:
    extension = importlib.import_module(f"{name.replace('-', '_')}._native").__file__
    assert extension is not None
    library = ctypes.CDLL(extension)
    assert hasattr(library, "PyInit__native")
    assert not hasattr(library, "sa_hash_select")


def test_every_native_source_is_built() -> None:
    listed = set(re.findall(r"^\s+(native/\w+\.c)\b", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE))
    assert listed == {file for file in native_files() if file.endswith(".c")} - {"native/prelude.c"}


def test_the_common_half_names_no_package() -> None:
    # It is one text in two packages: an absolute import would reach into the other one.
    for path in sorted((ROOT / "sharearea" / "common").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("sharearea") for alias in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level or not (node.module or "").startswith("sharearea"), path


def test_the_links_of_the_guest_side_lead_into_the_tree() -> None:
    for link, target in {
        "CMakeLists.txt": "CMakeLists.txt",
        "LICENSE": "LICENSE",
        "README.md": "README.md",
        "native": "native",
        "sharearea_agent/common": "sharearea/common",
    }.items():
        path = FOLDERS["sharearea-agent"] / link
        assert path.is_symlink(), link
        assert not os.path.isabs(path.readlink()), link
        assert path.resolve() == ROOT / target

"""Which package a file is of: lists by hand, a database by the real rpm, and broken ones."""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest

from sharearea.estimate.figures import NO_PACKAGE
from sharearea.estimate.folder import FolderTree
from sharearea.estimate.packages import Packages, dpkg_package, rpm_header, rpm_packages

from .oracle import PAGE
from .trees import call, run

SPEC = """
Name: gamma
Version: 1
Release: 1
Summary: for a test
License: none
BuildArch: noarch
%description
For a test.
%install
mkdir -p %{buildroot}/usr/bin %{buildroot}/opt/gamma/deep
cp %{_sourcedir}/page %{buildroot}/usr/bin/gamma
cp %{_sourcedir}/page %{buildroot}/opt/gamma/deep/other
touch %{buildroot}/opt/gamma/empty
%files
/usr/bin/gamma
/opt/gamma
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a database that rpm itself wrote, with two packages in it."""
    top = tmp_path_factory.mktemp("rpm")
    (top / "SOURCES").mkdir()
    (top / "SOURCES/page").write_bytes(b"g" * PAGE)
    for name in ("gamma", "delta"):
        (top / f"{name}.spec").write_text(SPEC.replace("gamma", name))
        call("rpmbuild", "-bb", "--quiet", "--define", f"_topdir {top}", top / f"{name}.spec")
    made = sorted((top / "RPMS").rglob("*.rpm"))
    call("rpm", "--define", "_db_backend sqlite", "--dbpath", top / "db", "--justdb", "--nodeps", "-i", *made)
    return top / "db/rpmdb.sqlite"


def test_an_rpm_database(database: Path) -> None:
    assert {name: sorted(paths) for name, paths in rpm_packages(str(database))} == {
        name: [f"/opt/{name}", f"/opt/{name}/deep", f"/opt/{name}/deep/other", f"/opt/{name}/empty", f"/usr/bin/{name}"]
        for name in ("gamma", "delta")
    }


@pytest.mark.parametrize("place", ["usr/lib/sysimage/rpm", "var/lib/rpm"])
@pytest.mark.parametrize("kind", ["folder", "archive", "archive, gzip", "image"])
def test_rpm_in_every_kind_of_root(tmp_path: Path, database: Path, place: str, kind: str) -> None:
    roots = []
    for name in "ab":
        root = tmp_path / name
        (root / place).mkdir(parents=True)
        shutil.copyfile(database, root / place / "rpmdb.sqlite")
        (root / "usr/bin").mkdir(parents=True)
        (root / "usr/bin/gamma").write_bytes(b"g" * PAGE)
        (root / "usr/bin/none").write_bytes(b"n" * PAGE)
        path = tmp_path / f"{name}.root"
        if kind == "folder":
            path = root
        elif kind == "image":
            with open(path, "wb") as file:
                file.truncate(16 << 20)
            call("mkfs.ext4", "-q", "-F", "-d", root, path)
        else:
            call("tar", "-C", root, *(["-z"] if "gzip" in kind else []), "-cf", path, ".")
        roots.append(path)
    before = len(os.listdir("/proc/self/fd"))
    packages = dict(run(*roots).packages)
    assert packages.pop(NO_PACKAGE) > PAGE
    assert packages == {"gamma": PAGE}
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("rpmdb.sqlite", b"SQLite format 3\0" + b"x" * 5000, "cannot be read"),
        ("rpmdb.sqlite", b"", "cannot be read"),
        ("Packages", b"bdb", "of a kind that is not read"),
        ("Packages.db", b"ndb", "of a kind that is not read"),
    ],
)
def test_a_database_that_cannot_be_read_is_a_note(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / "var/lib/rpm").mkdir(parents=True)
    (tmp_path / "var/lib/rpm" / name).write_bytes(data)
    (note,) = run(tmp_path).notes
    assert words in note
    assert name in note


def test_broken_headers_lose_their_names_only(database: Path) -> None:
    import sqlite3

    with sqlite3.connect(f"file:{database}?mode=ro&immutable=1", uri=True) as connection:
        blob = connection.execute("SELECT blob FROM Packages").fetchone()[0]
    connection.close()
    random_ = random.Random(3)
    good = rpm_header(blob)
    assert good
    assert rpm_header(b"") is None
    assert rpm_header(struct.pack(">II", 1 << 31, 1 << 31) + blob[8:]) is None
    different = 0
    for _ in range(3000):
        broken = bytearray(blob[: random_.choice((len(blob), random_.randrange(len(blob))))])
        for _ in range(random_.randrange(1, 30)):
            if broken:
                broken[random_.randrange(min(len(broken), 2500))] = random_.randrange(256)
        found = rpm_header(bytes(broken))
        different += found != good
    assert different > 1000


def test_dpkg_names() -> None:
    assert dpkg_package("libc6:amd64.list") == "libc6"
    assert dpkg_package("base-files.list") == "base-files"
    assert dpkg_package("base-files.md5sums") is None


def test_paths_of_merged_usr_and_of_prefixes() -> None:
    packages = Packages()
    packages.add("alpha", iter(["/bin/one", "/usr/bin/two"]))
    packages.add("beta", iter(["/bin/one", "/lib/three"]), "@/")
    assert packages.of("bin/one") == packages.of("usr/bin/one") == "alpha"
    assert packages.of("usr/bin/two") == "alpha"
    assert packages.of("bin/two") is None
    assert packages.of("@/usr/lib/three") == packages.of("@/bin/one") == "beta"
    assert packages.of("lib/three") is None
    assert len(packages) == 4


def test_lists_that_are_too_long_or_gone_are_noted(tmp_path: Path) -> None:
    info = tmp_path / "var/lib/dpkg/info"
    info.mkdir(parents=True)
    (info / "alpha.list").symlink_to("/nowhere")
    (info / "beta.list").mkdir()
    notes: list[str] = []
    Packages().read(FolderTree(tmp_path), notes.append)
    assert ["alpha.list" in note for note in notes] == [True, False]
    assert "beta.list" in notes[1]

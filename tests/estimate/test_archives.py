"""Tar archives made by the real tar, in each of its formats and compressions; and broken ones."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from sharearea.common.errors import HostError, UsageError
from sharearea.estimate.figures import NO_PACKAGE

from .oracle import PAGE, count, files_of
from .trees import call, make_tree, run, same, same_as_files


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with everything in it that an archive may have to keep."""
    root = tmp_path_factory.mktemp("tree") / "root"
    make_tree(root, 2)
    (root / "etc" / ("long-name-" * 20)).write_bytes(b"long")
    (root / "etc" / ("l" * 90)).mkdir()
    (root / "etc" / ("l" * 90) / ("m" * 90)).write_bytes(os.urandom(PAGE))
    return root


def pack(path: Path, tree: Path, *options: str) -> Path:
    call("tar", "-C", tree, "--sort=name", *options, "-cf", path, ".")
    return path


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=posix",),
        ("--format=gnu", "--sparse"),
        ("--format=posix", "--sparse", "--sparse-version=1.0"),
        ("--format=posix", "--sparse", "--sparse-version=0.1"),
        ("--format=posix", "--sparse", "--sparse-version=0.0"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("compression", ["", "--gzip"])
def test_every_format(tmp_path: Path, tree: Path, options: tuple[str, ...], compression: str) -> None:
    found = run(pack(tmp_path / "archive", tree, *options, *filter(None, [compression])), tree)
    assert found.roots[0].kind == ("tar archive, gzip" if compression else "tar archive")
    same_as_files(found, [files_of(tree)] * 2)


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz", "zstd"])
def test_every_compression(tmp_path: Path, tree: Path, compression: str) -> None:
    # Whatever it is called: what is in it counts.
    found = run(pack(tmp_path / "archive.img", tree, f"--{compression}"))
    assert found.roots[0].kind == f"tar archive, {compression}"
    same_as_files(found, [files_of(tree)])


def test_the_last_of_several_members_of_a_name_counts(tmp_path: Path, tree: Path) -> None:
    path = pack(tmp_path / "archive", tree)
    changed = tmp_path / "changed"
    (changed / "etc").mkdir(parents=True)
    (changed / "usr/lib").mkdir(parents=True)
    (changed / "etc/one-byte").write_bytes(os.urandom(10 * PAGE))
    (changed / "usr/lib/sparse").symlink_to("large")
    call("tar", "-C", changed, "-rf", path, "./etc/one-byte", "./usr/lib/sparse")
    files = files_of(tree)
    files["etc/one-byte"] = (changed / "etc/one-byte").read_bytes()
    del files["usr/lib/sparse"]
    same_as_files(run(path), [files])
    # In a compressed one, nobody knows before the end: all count, and that is said.
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    found = run(packed)
    assert ["1 paths come more than once" in text for text in found.notes] == [True]
    assert found.total == count([files_of(tree)]).total + 10 * PAGE


def test_packages_are_found_wherever_they_come_in_the_archive(tmp_path: Path) -> None:
    for root in ("a", "b"):
        info = tmp_path / root / "var/lib/dpkg/info"
        info.mkdir(parents=True)
        (info / "alpha.list").write_text("/bin/one\n")
        (tmp_path / root / "usr/bin").mkdir(parents=True)
        (tmp_path / root / "usr/bin/one").write_bytes(b"1" * 3 * PAGE + root.encode())
    for options in ((), ("--gzip",)):
        paths = [pack(tmp_path / f"{root}.tar", tmp_path / root, *options) for root in "ab"]
        found = run(*paths)
        assert dict(found.packages) == {NO_PACKAGE: PAGE, "alpha": PAGE}
        # The same below a folder of the archive.
        call("tar", "-C", tmp_path, *options, "-cf", tmp_path / "below.tar", "a")
        assert dict(run(paths[1], tmp_path / "below.tar").packages) == {NO_PACKAGE: PAGE, "alpha": PAGE}


def test_members_that_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "archive"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("pipe", tarfile.FIFOTYPE), ("device", tarfile.CHRTYPE), ("disk", tarfile.BLKTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        member = tarfile.TarInfo("/../../etc/out")
        member.size = 5000
        archive.addfile(member, io.BytesIO(os.urandom(5000)))
        link = tarfile.TarInfo("again")
        link.type, link.linkname = tarfile.LNKTYPE, "/../../etc/out"
        archive.addfile(link)
    found = run(path)
    assert found.total == 2 * PAGE
    assert found.roots[0].files == 1
    assert not found.left_out


def test_docker_save_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "root/layer1").mkdir(parents=True)
    (tmp_path / "root/layer1/layer.tar").write_bytes(bytes(1024))
    (tmp_path / "root/manifest.json").write_text("[]")
    (note,) = run(pack(tmp_path / "archive", tmp_path / "root")).notes
    assert "docker export" in note


# ------------------------------------------------------------------------------------------------------ broken ones


@pytest.mark.parametrize("compression", [None, "gzip", "bzip2", "xz", "zstd"])
def test_a_cut_archive_is_said_to_be_and_the_rest_counted(tmp_path: Path, tree: Path, compression: str | None) -> None:
    whole = pack(tmp_path / "whole", tree, *([f"--{compression}"] if compression else []))
    data = whole.read_bytes()
    path = tmp_path / "cut"
    said = 0
    for number in range(1, 20):
        # At any byte, and between two blocks of an archive.
        size = len(data) * number // 20 // 512 * 512 + (number % 2) * 77
        path.write_bytes(data[:size])
        try:
            found = run(path, tree)
        except UsageError:
            continue
        said += 1
        assert found.left_out_count >= 1
        assert all(entry.root == str(path) for entry in found.left_out)
        cut, intact = found.roots
        assert cut.pages < intact.pages
        assert found.shared.distinct <= run(tree).shared.distinct
    assert said > 10


def test_a_damaged_archive_ends_where_it_is_damaged(tmp_path: Path, tree: Path) -> None:
    data = bytearray(pack(tmp_path / "archive", tree).read_bytes())
    with tarfile.open(tmp_path / "archive") as archive:
        middle = archive.getmembers()[40].offset
    data[middle : middle + 512] = os.urandom(512)
    (tmp_path / "archive").write_bytes(data)
    found = run(tmp_path / "archive")
    (entry,) = found.left_out
    assert "cannot be read on" in entry.reason
    assert 0 < found.roots[0].files <= 40


@pytest.mark.parametrize("compression", ["gzip", "xz", "bzip2", "zstd"])
def test_what_is_compressed_and_no_archive(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(3000))
    call(compression, "-f", path)
    (packed,) = tmp_path.iterdir() if compression != "zstd" else tmp_path.glob("*.zst")
    with pytest.raises(UsageError, match="is no tar archive") as caught:
        run(packed)
    assert "unpack" in caught.value.hint
    packed.write_bytes(packed.read_bytes()[:12])
    with pytest.raises(UsageError, match="cannot be unpacked"):
        run(packed)


def test_zstd_without_its_library(tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "archive", tree, "--zstd")
    for name in ("backports.zstd", "compression.zstd", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("backports.zstd", raising=False)
    with pytest.raises(HostError, match=r"backports\.zstd") as caught:
        run(path)
    assert "sharearea[estimate]" in caught.value.hint
    # The others do without it, also when they are broken.
    same(run(pack(tmp_path / "other", tree, "--xz")), count([files_of(tree)]))

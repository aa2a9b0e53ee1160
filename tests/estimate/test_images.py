"""Disk images made by the real tools: what is read out of them without mounting is what was put in."""

from __future__ import annotations

import contextlib
import lzma
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from sharearea.common.errors import UsageError
from sharearea.estimate import disk, image
from sharearea.estimate.figures import NO_PACKAGE, Estimate

from . import assets
from .oracle import PAGE, Files, count, files_of
from .trees import call, make_tree, run, same, same_as_files

MIB = 1 << 20
Make = Callable[[Path, Path], Path]
XFS_BYTES = 300 * MIB  # the least that mkfs.xfs makes


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with everything in it that a file system may have to keep."""
    root = tmp_path_factory.mktemp("tree") / "root"
    make_tree(root, 1, many=400)
    return root


@pytest.fixture(scope="module")
def plain_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one without links and odd names, for mkfs.xfs."""
    root = tmp_path_factory.mktemp("plain") / "root"
    make_tree(root, 1, links=False, many=400)
    return root


def empty(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def ext(path: Path, tree: Path, *options: object, size: int = 48 * MIB) -> Path:
    call("mkfs.ext4", "-q", "-F", "-d", tree, *options, empty(path, size))
    return path


def btrfs(path: Path, tree: Path, size: int = 128 * MIB) -> Path:
    call("mkfs.btrfs", "-q", "-r", tree, empty(path, size))
    return path


def xfs(path: Path, tree: Path, *options: object) -> Path:
    lines = ["boot", "0 0", "d--755 0 0"]

    def walk(folder: Path) -> None:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                lines.append(f"{entry.name} d--755 0 0")
                walk(entry)
                lines.append("$")
            else:
                lines.append(f"{entry.name} ---644 0 0 {entry}")

    walk(tree)
    proto = path.with_suffix(".proto")
    proto.write_text("\n".join([*lines, "$", ""]))
    call("mkfs.xfs", "-q", "-p", proto, *options, empty(path, XFS_BYTES))
    return path


def holds(found: Estimate, files: Files) -> None:
    """An image and a folder of the same files have the same pages, each."""
    same_as_files(found, [files])


# ------------------------------------------------------------------------------------------------------ file systems


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-b", "1024"),
        ("-O", "^metadata_csum,^64bit"),
        ("-t", "ext3", "-b", "1024", "-O", "^metadata_csum"),
        ("-t", "ext2", "-b", "1024"),
        ("-t", "ext2", "-b", "4096", "-O", "^filetype"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_ext(tmp_path: Path, tree: Path, options: tuple[str, ...]) -> None:
    found = run(ext(tmp_path / "image", tree, *options))
    assert found.roots[0].kind == "disk image, raw"
    holds(found, files_of(tree))


def test_ext_with_clusters_is_left_out(tmp_path: Path, tree: Path) -> None:
    path = ext(tmp_path / "image", tree, "-O", "bigalloc", "-C", "65536")
    with pytest.raises(UsageError, match="cluster"):
        run(path)


def test_ext_files_and_folders_in_inodes(tmp_path: Path, tree: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tree, root, symlinks=True, ignore=lambda *_: {"pipe", "sparse"})
    # mke2fs itself gives a sparse file a wrong size with this feature, so there is none.
    for size in (1, 59, 60, 61, 100, 155, 156, 160, 161, 900):
        (root / "etc" / f"of-{size}").write_bytes(bytes([size % 251]) * size)
    (root / "some").mkdir()
    for number in range(5):
        (root / "some" / f"a-longer-name-{number}").write_bytes(b"%d" % number)
    holds(run(ext(tmp_path / "image", root, "-O", "inline_data", "-I", "256")), files_of(root))
    # Of larger inodes the library sees 256 bytes: what lies behind them is named, never lost in silence.
    found = run(ext(tmp_path / "larger", root, "-O", "inline_data", "-I", "1024"))
    lost = {entry.path: entry.reason for entry in found.left_out}
    assert {path for path, reason in lost.items() if "inline file" in reason} >= {"etc/of-161"}
    kept = {
        path: data
        for path, data in files_of(root).items()
        if path not in lost and not any(path.startswith(f"{folder}/") for folder in lost)
    }
    assert found.total == count([kept]).total


@pytest.mark.parametrize("block", [1024, 4096])
def test_ext_block_maps_with_holes_at_every_level(tmp_path: Path, block: int) -> None:
    # Blocks of 4 KiB show more: block 0, which the library takes for a hole's, has the superblock in it then.
    root = tmp_path / "root"
    root.mkdir()
    table = block // 4
    places = {
        "direct": [0, 5, 11],
        "one-table": [13, 200],
        "one-table-and-a-hole": [2, 12 + table - 3],
        "two-tables": [2, 12 + table + 300, 12 + table + 3 * table + 1],
        "only-two-tables": [12 + table + 2 * table],
        "hole-at-the-end": [3],
        "only-a-hole": [],
    }
    if block == 1024:
        places["three-tables"] = [12 + table + table**2 + 70_000]
    for name, blocks in places.items():
        with open(root / name, "wb") as file:
            for number in blocks:
                file.seek(number * block)
                file.write(os.urandom(3 * block))
            file.truncate((blocks[-1] if blocks else 0) * block + 400_000)
    holds(run(ext(tmp_path / "image", root, "-t", "ext2", "-b", block)), files_of(root))


def test_ext_folder_whose_last_entry_just_fits(tmp_path: Path) -> None:
    # "." and ".." take 24 of 1024 bytes, a name of seven letters 16, names of four 12 each: the last one ends the
    # block. The library's own loop does not see it.
    root = tmp_path / "root"
    (root / "full").mkdir(parents=True)
    (root / "full/0-first").write_bytes(b"first")
    for number in range(82):
        (root / "full" / f"{number:04}").write_bytes(b"%d" % number)
    files = files_of(root)
    holds(run(ext(tmp_path / "image", root, "-t", "ext2", "-b", "1024")), files)
    assert len(files) == 83


@pytest.mark.parametrize("options", [(), ("-m", "crc=0"), ("-i", "size=1024")], ids=str)
def test_xfs(tmp_path: Path, plain_tree: Path, options: tuple[str, ...]) -> None:
    holds(run(xfs(tmp_path / "image", plain_tree, *options)), files_of(plain_tree))


@pytest.mark.parametrize("options", [("-n", "size=16384"), ("-b", "size=1024")], ids=" ".join)
def test_xfs_with_large_folder_blocks_is_left_out(tmp_path: Path, plain_tree: Path, options: tuple[str, ...]) -> None:
    path = xfs(tmp_path / "image", plain_tree, *options)
    with pytest.raises(UsageError, match="none of its file systems is: XFS: its folders have blocks"):
        run(path)
    found = run(gpt(tmp_path / "disk", path, ext(tmp_path / "other", plain_tree)))
    (entry,) = found.left_out
    assert entry.path == "partition 1"
    assert "mkfs.xfs -n size=" in entry.reason
    same(found, count([files_of(plain_tree)]))


def test_btrfs(tmp_path: Path, tree: Path) -> None:
    holds(run(btrfs(tmp_path / "image", tree)), files_of(tree))


# What only a mounted file system makes: see assets.py.


def test_xfs_reserved_extents_are_zeros(tmp_path: Path) -> None:
    holds(run(assets.unpack("xfs.img", tmp_path)), assets.XFS)


def test_ext4_reserved_extents_are_zeros(tmp_path: Path) -> None:
    holds(run(assets.unpack("ext4.img", tmp_path)), assets.EXT4)


def test_the_stale_blocks_under_reserved_extents_are_not_zero(tmp_path: Path) -> None:
    # Else the two tests above would show nothing.
    for name in ("xfs.img", "ext4.img"):
        assert b"stale:" in assets.unpack(name, tmp_path).read_bytes()


def test_btrfs_compressed_reserved_and_subvolumes(tmp_path: Path) -> None:
    found = run(assets.unpack("btrfs.img", tmp_path))
    (entry,) = found.left_out
    assert entry.path == assets.BTRFS_SNAPSHOT
    assert "snapshot" in entry.reason
    same(found, count([assets.BTRFS]))


def test_btrfs_of_two_devices_is_left_out(tmp_path: Path) -> None:
    devices = [empty(tmp_path / name, 128 * MIB) for name in ("one", "two")]
    call("mkfs.btrfs", "-q", "-d", "single", "-m", "single", *devices)
    with pytest.raises(UsageError, match="this btrfs has 2 devices"):
        run(devices[0])


# ----------------------------------------------------------------------------------------------- partitions, volumes


def gpt(path: Path, *parts: Path, table: str = "gpt") -> Path:
    """Put images into the partitions of a disk."""
    start = 1
    script = [f"label: {table}"]
    places = []
    for part in parts:
        size = -(-part.stat().st_size // MIB)
        script.append(f"start={start}MiB, size={size}MiB")
        places.append(start * MIB)
        start += size
    empty(path, (start + 1) * MIB)
    call("sfdisk", "-q", path, input="\n".join(script) + "\n")
    for part, place in zip(parts, places, strict=True):
        copy_into(path, place, part)
    return path


def copy_into(path: Path, place: int, part: Path, offset: int = 0, size: int | None = None) -> None:
    with open(part, "rb") as source, open(path, "r+b") as target:
        source.seek(offset)
        left = part.stat().st_size if size is None else size
        while left > 0 and (block := source.read(min(MIB, left))):
            if block.strip(b"\0"):
                target.seek(place)
                target.write(block)
            place += len(block)
            left -= len(block)


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_partitions_of_one_root(tmp_path: Path, tree: Path, plain_tree: Path, table: str) -> None:
    swap = empty(tmp_path / "swap", 8 * MIB)
    call("mkswap", "-q", swap)
    parts = [ext(tmp_path / "ext", tree), swap, btrfs(tmp_path / "btrfs", plain_tree)]
    found = run(gpt(tmp_path / "disk", *parts, table=table))
    both = {f"one/{path}": data for path, data in files_of(tree).items()}
    both |= {f"two/{path}": data for path, data in files_of(plain_tree).items()}
    holds(found, both)


def test_a_logical_partition(tmp_path: Path, tree: Path) -> None:
    path = empty(tmp_path / "disk", 60 * MIB)
    call("sfdisk", "-q", path, input="label: dos\nstart=1MiB, size=55MiB, type=5\nstart=2MiB, size=48MiB, type=83\n")
    copy_into(path, 2 * MIB, ext(tmp_path / "ext", tree))
    holds(run(path), files_of(tree))


def test_partitions_that_are_not_read_are_named(tmp_path: Path, tree: Path) -> None:
    luks = empty(tmp_path / "luks", MIB)
    with open(luks, "r+b") as file:
        file.write(b"LUKS\xba\xbe\x00\x02")
    found = run(gpt(tmp_path / "disk", luks, empty(tmp_path / "nothing", MIB), ext(tmp_path / "ext", tree)))
    assert {entry.path: entry.reason for entry in found.left_out} == {
        "partition 1": "not read: encrypted (LUKS)",
        "partition 2": "not read: no file system that is known here",
    }
    same(found, count([files_of(tree)]))


def test_lvm_volumes_in_pieces(tmp_path: Path, tree: Path) -> None:
    # The head is lvm2's own: root has extents 0 to 14 and 19 to 38 of 4 MiB, swap 15 to 18, home 39 to 43.
    path = empty(tmp_path / "disk", 300 * MIB)
    path_bytes = lzma.decompress((assets.FOLDER / "lvm-head.xz").read_bytes())
    with open(path, "r+b") as file:
        file.write(path_bytes)
    root = ext(tmp_path / "root", tree, size=140 * MIB)
    small = tmp_path / "small"
    small.mkdir()
    (small / "file").write_bytes(os.urandom(9 * MIB))
    home = ext(tmp_path / "home", small, "-N", "64", size=20 * MIB)
    extent = 4 * MIB
    # The first part of root must not be all there is of it, or its second part is not tried.
    call("e2fsck", "-fy", root)
    copy_into(path, MIB, root, 0, 15 * extent)
    copy_into(path, MIB + 19 * extent, root, 15 * extent, 20 * extent)
    copy_into(path, MIB + 39 * extent, home)
    both = {f"root/{name}": data for name, data in files_of(tree).items()}
    both |= {f"home/{name}": data for name, data in files_of(small).items()}
    found = run(path)
    assert [(entry.path, entry.reason) for entry in found.left_out] == [
        ("LVM volume swap", "not read: no file system that is known here")
    ]
    same(found, count([both]))
    call("mkswap", "-q", empty(tmp_path / "swap", 4 * extent))
    copy_into(path, MIB + 15 * extent, tmp_path / "swap")
    holds(run(gpt(tmp_path / "partitioned", path)), both)


# ------------------------------------------------------------------------------------------------------------- qcow2


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, tree: Path) -> Path:
    """Give an image to convert."""
    return ext(tmp_path_factory.mktemp("raw") / "image", tree)


@pytest.mark.parametrize(
    "options",
    [
        ("-o", "compat=1.1"),
        ("-o", "compat=0.10"),
        ("-c",),
        ("-c", "-o", "compression_type=zstd"),
        ("-o", "cluster_size=2M"),
        ("-o", "cluster_size=512"),
        ("-o", "lazy_refcounts=on"),
    ],
    ids=" ".join,
)
def test_qcow2(tmp_path: Path, tree: Path, raw: Path, options: tuple[str, ...]) -> None:
    call("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, tmp_path / "image")
    found = run(tmp_path / "image", tree)
    assert found.roots[0].kind == "disk image, qcow2"
    same_as_files(found, [files_of(tree)] * 2)
    as_qemu_reads_it(tmp_path / "image", tmp_path)


@pytest.mark.parametrize("size", [512, 65536 * 3 + 512, (5 << 20) + 1024])
def test_qcow2_of_a_size_that_ends_inside_a_cluster(tmp_path: Path, size: int) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(size))
    for options in ((), ("-c",)):
        call("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, tmp_path / "raw", tmp_path / "image")
        as_qemu_reads_it(tmp_path / "image", tmp_path)


@pytest.mark.parametrize("compat", ["1.1", "0.10"])
@pytest.mark.parametrize("shorter", [False, True])
def test_qcow2_over_other_images(tmp_path: Path, tree: Path, raw: Path, compat: str, shorter: bool) -> None:
    (tmp_path / "below").mkdir()
    base = tmp_path / "below/base.raw"
    shutil.copyfile(raw, base)
    if shorter:  # the upper images go on with zeros behind it
        os.truncate(base, 48 * MIB - 512)
    middle, top = tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    size = "64M" if shorter else "48M"
    call("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "-b", "below/base.raw", "-F", "raw",
         middle, size, cwd=tmp_path)  # fmt: skip
    call("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={compat}", "-b", middle, "-F", "qcow2", top)
    # Something of its own in the upper one: a file's block, rewritten through the image.
    data = random.Random(5).randbytes(64 * 1024)
    first = (tree / "usr/lib/large").read_bytes()[: 64 * 1024]
    place = raw.read_bytes().index(first)
    call("qemu-io", "-f", "qcow2", "-c", f"write -s {written(tmp_path, data)} {place} {len(data)}", top)
    files = dict(files_of(tree))
    name = next(name for name, content in files.items() if content.startswith(first))
    files[name] = data + files[name][len(data) :]
    holds(run(top), files)
    call("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {48 * MIB - 8192} 4096", top)
    as_qemu_reads_it(top, tmp_path)


def as_qemu_reads_it(path: Path, folder: Path) -> None:
    """Every byte of the disk is what QEMU's own reading gives."""
    call("qemu-img", "convert", "-O", "raw", path, folder / "by-qemu")
    opened: list[disk.DiskFile] = []
    reader = disk.open_qcow2(path, opened)
    with open(folder / "by-qemu", "rb") as file:
        assert reader.size == (folder / "by-qemu").stat().st_size
        for at in range(0, reader.size, 3 * MIB):
            assert reader.read_at(at, 3 * MIB) == file.read(3 * MIB), at
    for file_ in opened:
        file_.close()


def written(folder: Path, data: bytes) -> Path:
    (folder / "pattern").write_bytes(data)
    return folder / "pattern"


def test_qcow2_whose_backing_image_is_missing(tmp_path: Path, raw: Path) -> None:
    base = tmp_path / "base"
    shutil.copyfile(raw, base)
    top = tmp_path / "top"
    call("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top)
    base.unlink()
    with pytest.raises(UsageError, match=r"its backing image .*base cannot be read: No such file") as caught:
        run(top)
    assert "qemu-img convert" in caught.value.hint


def test_qcow2_that_is_behind_itself(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    call("qemu-img", "create", "-q", "-f", "qcow2", one, "16M")
    call("qemu-img", "create", "-q", "-f", "qcow2", "-b", one, "-F", "qcow2", other)
    call("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2", one)
    with pytest.raises(UsageError, match="more than 16 images are behind one another"):
        run(one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-o", "extended_l2=on"), "extended L2 entries"),
        (("-o", "data_file={}/data,data_file_raw=on"), "keeps its data in another file"),
    ],
    ids=["extended", "data file"],
)
def test_qcow2_that_is_not_read_is_refused(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    path = tmp_path / "image"
    call("qemu-img", "create", "-q", "-f", "qcow2", *(text.format(tmp_path) for text in options), path, "16M")
    with pytest.raises(UsageError, match=words) as caught:
        run(path)
    assert caught.value.hint


def test_an_encrypted_qcow2_is_refused(tmp_path: Path) -> None:
    # Its header says so; qemu-img measures the processor before it encrypts, and fails on a busy machine.
    path = tmp_path / "image"
    call("qemu-img", "create", "-q", "-f", "qcow2", path, "16M")
    with open(path, "r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 2))
    with pytest.raises(UsageError, match="is encrypted"):
        run(path)


# ------------------------------------------------------------------------------------------------------ damaged ones


@pytest.mark.parametrize("options", [(), ("-c",)], ids=["plain", "packed"])
def test_a_truncated_qcow2_is_refused_or_its_files_are_named(
    tmp_path: Path, tree: Path, raw: Path, options: tuple[str, ...]
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    call("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, whole)
    data = whole.read_bytes()
    alone = run(tree)
    refused = named = 0
    for number in range(1, 40):
        path.write_bytes(data[: len(data) * number // 40 + 1000])
        try:
            found = run(path, tree)
        except UsageError as error:
            refused += str(path) in error.message
            continue
        cut, intact = found.roots
        # No page that is not in the files, and no zeros in place of what is not there.
        assert found.shared.distinct == alone.shared.distinct
        assert cut.zero <= intact.zero
        assert cut.pages <= intact.pages
        named += found.left_out_count > 0
        lost = {entry.path for entry in found.left_out if entry.root == str(path)}
        assert lost or cut.pages == intact.pages
    assert refused
    assert named
    for length in (4, 71, 100, 512):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError):
            run(path)


def test_a_truncated_raw_image_names_what_is_missing(tmp_path: Path, plain_tree: Path) -> None:
    path = ext(tmp_path / "image", plain_tree)
    whole = run(path)
    large = (plain_tree / "usr/lib/large").read_bytes()
    os.truncate(path, path.read_bytes().index(large[:PAGE]) + MIB)
    found = run(path)
    assert any("is cut off" in text for text in found.notes)
    assert found.left_out_count > 0
    assert 0 < found.total < whole.total
    (entry,) = (entry for entry in found.left_out if entry.path == "usr/lib/large")
    assert "its first 1048576 bytes are counted" in entry.reason


@pytest.mark.parametrize("make", [xfs, btrfs])
def test_a_truncated_image_without_its_root_folder_is_refused(tmp_path: Path, plain_tree: Path, make: Make) -> None:
    path = make(tmp_path / "image", plain_tree)
    os.truncate(path, 5 * MIB)
    with pytest.raises(UsageError, match="cut off"):
        run(path)


@pytest.mark.parametrize("make", [ext, xfs, btrfs])
def test_damaged_images_never_end_in_a_traceback(tmp_path: Path, make: Make) -> None:
    root = tmp_path / "root"
    for name in ("a", "b/c", "b/d"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(20_000))
    path = make(tmp_path / "image", root)
    used = []
    with open(path, "rb") as file:
        for at in range(0, path.stat().st_size, PAGE):
            if file.read(PAGE).strip(b"\0"):
                used.append(at)
    random_ = random.Random(7)
    kept = {at: read_at(path, at) for at in used}
    for _ in range(60):
        places = random_.sample(used, min(len(used), random_.choice((1, 1, 3))))
        with open(path, "r+b") as file:
            for at in places:
                page = bytearray(kept[at])
                for _ in range(random_.choice((1, 20, 400))):
                    page[random_.randrange(PAGE)] = random_.randrange(256)
                file.seek(at)
                file.write(page)
        with contextlib.suppress(UsageError):
            run(path)
        with open(path, "r+b") as file:
            for at in places:
                file.seek(at)
                file.write(kept[at])
    holds(run(path), files_of(root))


def read_at(path: Path, at: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(PAGE)


# ---------------------------------------------------------------------------------------------------------- packages


def test_packages_of_an_image(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "var/lib/dpkg/info").mkdir(parents=True)
    (root / "usr/bin").mkdir(parents=True)
    (root / "var/lib/dpkg/info/alpha:amd64.list").write_text("/.\n/bin/one\n")
    (root / "usr/bin/one").write_bytes(os.urandom(3 * PAGE))
    (root / "usr/bin/two").write_bytes(os.urandom(5 * PAGE))
    images = [ext(tmp_path / "ext", root), btrfs(tmp_path / "btrfs", root), xfs(tmp_path / "xfs", root)]
    found = run(*images)
    assert dict(found.packages) == {NO_PACKAGE: 2 * 6 * PAGE, "alpha": 2 * 3 * PAGE}


# -------------------------------------------------------------------------------------------------------------- what


def test_without_the_libraries_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, raw: Path) -> None:
    import sys

    from sharearea.common.errors import HostError

    monkeypatch.setitem(sys.modules, "dissect.extfs", None)
    with pytest.raises(HostError, match=r"disk images need the dissect libraries") as caught:
        run(raw)
    assert "sharearea[estimate]" in caught.value.hint


def test_a_volume_never_gives_fewer_bytes_than_it_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    files: list[disk.DiskFile] = []
    volume = disk.Volume(disk.open_file(path, files), 0, 10_000, slack=1_000)
    volume.seek(9_000)
    assert volume.read(2_000) == b"x" * 1_000 + bytes(1_000)
    for at, size in ((10_000, 1), (0, 11_001)):
        volume.seek(at)
        with pytest.raises(EOFError, match="cut off"):
            volume.read(size)
    with pytest.raises(EOFError, match="cut off"):
        volume.read_at(9_000, 1_001)
    files[0].close()


def test_an_images_descriptors_are_closed(tmp_path: Path, raw: Path) -> None:
    call("qemu-img", "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", tmp_path / "top")
    before = len(os.listdir("/proc/self/fd"))
    run(tmp_path / "top", raw)
    with pytest.raises(UsageError):
        image.Image(Path("/dev/zero").parent / "null", tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_header_layout_is_what_the_documents_say(tmp_path: Path) -> None:
    call("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image", "16M")
    head = (tmp_path / "image").read_bytes()[:112]
    assert struct.unpack_from(">4sI", head) == (disk.QCOW2_MAGIC, 3)

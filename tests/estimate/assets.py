"""Images that only a mounted file system can make: compressed and reserved extents, snapshots, stale blocks.

`python -m tests.estimate.assets` makes them anew, as root on a kernel with loop devices, XFS, btrfs and ext4; what is
in them is written here, so that the tests compare with it. They are kept compressed, and are small: every page says
only its file and its number.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .oracle import PAGE

FOLDER: Final = Path(__file__).parent
KIB: Final = 1024
MIB: Final = 1024 * KIB


def content(name: str, size: int) -> bytes:
    """Bytes that compress well, and differ from page to page and from name to name."""
    pages = ((f"{name}:{number:08};" * PAGE).encode()[:PAGE] for number in range(-(-size // PAGE)))
    return b"".join(pages)[:size]


def holed(name: str, size: int, *stretches: tuple[int, int]) -> bytes:
    """Zeros, but for stretches (offset, length) of the content of that name."""
    data = bytearray(size)
    for offset, length in stretches:
        data[offset : offset + length] = content(name, offset + length)[offset:]
    return bytes(data)


BTRFS: Final = {
    "plain": content("plain", 300 * KIB + 5),
    "zlib": content("zlib", 700 * KIB + 5),
    "zstd": content("zstd", 700 * KIB + 6),
    "lzo": content("lzo", 700 * KIB + 7),
    "inline": b"in the tree itself",
    "inline-zlib": b"packed in the tree itself " * 60,
    "rewritten": content("rewritten", 256 * KIB)[: 64 * KIB]
    + content("other", 128 * KIB)[64 * KIB :]
    + content("rewritten", 256 * KIB)[128 * KIB :],
    "reserved": holed("reserved", MIB, (512 * KIB, 64 * KIB)),
    "sparse": holed("sparse", 2 * MIB + 1, (MIB, 100), (MIB + 700 * KIB, 8 * KIB)),
    "kept-before": b"kept " * 2000,
    "@/usr/file": content("usr/file", 20 * KIB),
    "@/nested/file": content("nested", 30 * KIB),
}
BTRFS_SNAPSHOT: Final = "@/snapshot"
XFS: Final = {
    "reserved": holed("reserved", MIB, (512 * KIB, 64 * KIB)),
    "reserved-wholly": bytes(3 * MIB),
    "past-the-end": content("past-the-end", 10 * KIB),
    "sparse": holed("sparse", 8 * MIB, (5 * MIB, 3 * KIB)),
    "pieces": holed("pieces", 400 * 8 * KIB, *((number * 8 * KIB, 4 * KIB) for number in range(400))),
    "linked": content("linked", 5 * KIB),
    **{f"many/{number:04}-{'x' * (number % 40)}": b"%d" % number for number in range(700)},
}
EXT4: Final = {
    "reserved": holed("reserved", MIB, (512 * KIB, 64 * KIB)),
    "reserved-wholly": bytes(2 * MIB),
    "reserved-after-hole": holed("reserved-after-hole", MIB, (768 * KIB, 4 * KIB)),
    "pieces": holed("pieces", 400 * 8 * KIB, *((number * 8 * KIB, 4 * KIB) for number in range(400))),
    "linked": content("linked", 5 * KIB),
}


def unpack(name: str, folder: Path) -> Path:
    """Unpack an image into a folder, with holes where it is zero."""
    place = folder / name
    with lzma.open(FOLDER / f"{name}.xz") as packed, open(place, "wb") as file:
        while block := packed.read(MIB):
            if block.strip(b"\0"):
                file.write(block)
            else:
                file.seek(len(block), os.SEEK_CUR)
        file.truncate()
    return place


# ------------------------------------------------------------------------------------------------------- making them


def _make(name: str, size: int, mkfs: list[str], options: str, fill: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image, mount = Path(folder, name), Path(folder, "mount")
        mount.mkdir()
        with open(image, "wb") as file:
            file.truncate(size)
        subprocess.run([*mkfs, str(image)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", f"loop,{options}", str(image), str(mount)], check=True)
        try:
            fill(mount)
            os.sync()
        finally:
            subprocess.run(["umount", str(mount)], check=True)
        packed = lzma.compress(image.read_bytes(), preset=9)
        (FOLDER / f"{name}.xz").write_bytes(packed)
        print(f"{name}: {len(packed)} bytes")  # noqa: T201


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def _patch(path: Path, size: int, data: bytes, stretches: list[tuple[int, int]], *, reserve: tuple[int, int]) -> None:
    """Reserve (offset, length) of a file, then write some stretches of it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    if reserve[1]:
        os.posix_fallocate(fd, *reserve)
    for offset, length in stretches:
        os.pwrite(fd, data[offset : offset + length], offset)
        os.fsync(fd)
    os.ftruncate(fd, size)
    os.fsync(fd)
    os.close(fd)


def _stale(mount: Path) -> None:
    """Leave something else than zeros in the blocks that will be reserved."""
    _write(mount / "stale", content("stale", 6 * MIB))
    (mount / "stale").unlink()
    os.sync()


def _fill_both(mount: Path, files: dict[str, bytes]) -> None:
    _stale(mount)
    _patch(mount / "reserved", MIB, files["reserved"], [(512 * KIB, 64 * KIB)], reserve=(0, MIB))
    size = len(files["reserved-wholly"])
    _patch(mount / "reserved-wholly", size, b"", [], reserve=(0, size))
    pieces = files["pieces"]
    _patch(
        mount / "pieces", len(pieces), pieces, [(number * 8 * KIB, 4 * KIB) for number in range(400)], reserve=(0, 0)
    )
    _write(mount / "linked", files["linked"])
    os.link(mount / "linked", mount / "also-linked")
    os.symlink("linked", mount / "link")


def _fill_xfs(mount: Path) -> None:
    _fill_both(mount, XFS)
    for path, data in XFS.items():
        if path.startswith("many/"):
            _write(mount / path, data)
    _write(mount / "past-the-end", XFS["past-the-end"])
    subprocess.run(["fallocate", "--keep-size", "-l", str(MIB), str(mount / "past-the-end")], check=True)
    _patch(mount / "sparse", 8 * MIB, XFS["sparse"], [(5 * MIB, 3 * KIB)], reserve=(0, 0))


def _fill_ext4(mount: Path) -> None:
    _fill_both(mount, EXT4)
    _patch(
        mount / "reserved-after-hole",
        MIB,
        EXT4["reserved-after-hole"],
        [(768 * KIB, 4 * KIB)],
        reserve=(256 * KIB, 768 * KIB),
    )


def _btrfs(*words: str | Path) -> None:
    subprocess.run(["btrfs", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def _fill_btrfs(mount: Path) -> None:
    _write(mount / "plain", BTRFS["plain"])
    for kind in ("zlib", "zstd", "lzo"):
        subprocess.run(["mount", "-o", f"remount,compress-force={kind}", str(mount)], check=True)
        _write(mount / kind, BTRFS[kind])
    subprocess.run(["mount", "-o", "remount,compress-force=zlib", str(mount)], check=True)
    _write(mount / "inline-zlib", BTRFS["inline-zlib"])
    _write(mount / "rewritten", content("rewritten", 256 * KIB))
    with open(mount / "rewritten", "r+b") as file:
        file.seek(64 * KIB)
        file.write(BTRFS["rewritten"][64 * KIB : 128 * KIB])
        os.fsync(file.fileno())
    subprocess.run(["mount", "-o", "remount,compress=no", str(mount)], check=True)
    _write(mount / "inline", BTRFS["inline"])
    _write(mount / "kept-before", BTRFS["kept-before"])
    _patch(mount / "reserved", MIB, BTRFS["reserved"], [(512 * KIB, 64 * KIB)], reserve=(0, MIB))
    _patch(mount / "sparse", 2 * MIB + 1, BTRFS["sparse"], [(MIB, 100), (MIB + 700 * KIB, 8 * KIB)], reserve=(0, 0))
    os.link(mount / "plain", mount / "zz-plain")
    _btrfs("subvolume", "create", mount / "@")
    _btrfs("subvolume", "create", mount / "@/nested")
    for path in ("@/usr/file", "@/nested/file"):
        _write(mount / path, BTRFS[path])
    os.sync()
    _btrfs("subvolume", "snapshot", mount / "@", mount / BTRFS_SNAPSHOT)


def main() -> int:
    """Make all of them."""
    _make("xfs.img", 300 * MIB, ["mkfs.xfs", "-q"], "defaults", _fill_xfs)
    _make("ext4.img", 24 * MIB, ["mkfs.ext4", "-q", "-O", "^metadata_csum"], "defaults", _fill_ext4)
    _make("btrfs.img", 114 * MIB, ["mkfs.btrfs", "-q"], "noatime", _fill_btrfs)
    return 0


if __name__ == "__main__":
    sys.exit(main())

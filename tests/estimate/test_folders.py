"""Folders: what is counted equals the slow count, whatever the backend and the memory; what cannot be read is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sharearea.common.errors import HostError, UsageError
from sharearea.estimate.counting import Listener, Options, estimate
from sharearea.estimate.figures import NO_PACKAGE

from .oracle import PAGE, count, files_of
from .trees import make_tree, run, same, same_as_files

NOBODY = 65534


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Do without root's rights, which read everything."""
    if os.geteuid() != 0:
        yield
        return
    for above in [folder, *folder.parents]:
        if not above.stat().st_mode & 1:
            pytest.skip(f"others may not enter {above}")
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """Give a folder that others may enter."""
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o111)
    return tmp_path


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give three folders that share a part."""
    folders = [tmp_path_factory.mktemp("roots") / name for name in "abc"]
    for seed, folder in enumerate(folders):
        make_tree(folder, seed)
    return folders


@pytest.mark.parametrize("backend", ["local", "xen"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_folders_equal_the_slow_count(roots: list[Path], backend: str, number: int) -> None:
    found = run(*roots[:number], backend=backend)
    same_as_files(found, [files_of(root) for root in roots[:number]])
    assert found.text > 0
    assert found.zero > 50 * PAGE
    if number == 2:
        assert found.possible_saved == found.pairs[0][2] > 0


@pytest.mark.parametrize("memory", [PAGE, 1 << 20, 5 << 20, 6_000_001, 1 << 40])
@pytest.mark.parametrize("backend", ["local", "xen"])
def test_a_memory_size_weighs_every_page(roots: list[Path], backend: str, memory: int) -> None:
    found = run(*roots, backend=backend, memory=memory)
    same_as_files(found, [files_of(root) for root in roots])
    assert found.resident == sum(min(memory, len_of(root)) for root in roots)
    assert found.possible_saved <= found.resident
    two = run(*roots[:2], backend=backend, memory=memory)
    assert two.possible_saved == two.pairs[0][2]


def len_of(root: Path) -> int:
    return count([files_of(root)]).total


def test_the_same_root_twice_shares_each_page_once(roots: list[Path]) -> None:
    found = run(roots[0], roots[0])
    assert [root.name for root in found.roots] == [str(roots[0]), f"{roots[0]}#2"]
    one = count([files_of(roots[0])])
    assert found.possible_saved == one.total - one.zero - one.self_shared
    # What goes besides: the repeats of both, as every page is in the area.
    assert found.record()["self_shared_saved_bytes"] == found.self_shared == 2 * one.self_shared


def test_many_pages_go_through_the_work_folder(tmp_path: Path) -> None:
    data = os.urandom(4096)
    for name in "ab":
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "same", "wb") as file:
            for number in range(3000):
                file.write(number.to_bytes(4, "little") + data[4:])
        # One page over and over fills its part's block many times.
        (tmp_path / name / "again").write_bytes(data * 5000)
    work = tmp_path / "work"
    work.mkdir()
    found = run(tmp_path / "a", tmp_path / "b", work=work)
    assert found.spilled > 24 * 9000
    same_as_files(found, [files_of(tmp_path / name) for name in "ab"])
    assert not list(work.iterdir())


def test_a_page_that_comes_a_million_times_takes_no_memory(tmp_path: Path) -> None:
    code = """
import os, resource, sys
from sharearea.common import native
from sharearea.estimate.counting import scratch_file
from pathlib import Path
with native.Tally(scratch_file(Path(sys.argv[1])), bytes(32), 1) as tally:
    tally.begin(0, 0)
    block = os.urandom(4096) * 256
    for _ in range(4096):
        tally.feed(block)
    tally.end()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sums = tally.join(bytes(4), 1, [native.TALLY_ONE], False)
    assert sums.repeated == [(1 << 20) - 1], sums
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 << 10  # KiB; its records take 24 MiB


def test_small_files_can_be_left_out(roots: list[Path]) -> None:
    found = run(*roots, min_file=5000)
    kept = [{path: data for path, data in files_of(root).items() if len(data) >= 5000} for root in roots]
    same(found, count(kept))
    assert found.small_files == sum(len(files_of(root)) for root in roots) - sum(map(len, kept))


def test_packages_come_from_dpkg_lists(tmp_path: Path) -> None:
    pages = {name: os.urandom(PAGE) for name in ("one", "two", "three", "none")}
    for root in "ab":
        info = tmp_path / root / "var/lib/dpkg/info"
        info.mkdir(parents=True)
        for folder in ("usr/bin", "usr/lib"):
            (tmp_path / root / folder).mkdir(parents=True)
        (info / "alpha:amd64.list").write_text("/.\n/bin\n/bin/one\n/usr/lib/two\n")
        (info / "beta.list").write_bytes(b"/usr/lib/three-\xff\n/usr/lib/two\n")
        (info / "beta.md5sums").write_text("x /usr/lib/none\n")
        for path, name in (
            (b"usr/bin/one", "one"),
            (b"usr/lib/two", "two"),
            (b"usr/lib/three-\xff", "three"),
            (b"usr/lib/none", "none"),
        ):
            (tmp_path / root / os.fsdecode(path)).write_bytes(pages[name])
    found = run(tmp_path / "a", tmp_path / "b")
    packages = dict(found.packages)
    assert packages.pop(NO_PACKAGE) == PAGE * (1 + 3)  # the lists themselves are in no list
    assert packages == {"alpha": 2 * PAGE, "beta": PAGE}


def test_databases_outside_of_the_root_are_not_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.list").write_text("/etc/file\n")
    for root in "ab":
        (tmp_path / root / "var/lib/dpkg").mkdir(parents=True)
        (tmp_path / root / "etc").mkdir()
        (tmp_path / root / "etc/file").write_bytes(b"x" * PAGE)
        (tmp_path / root / "var/lib/dpkg/info").symlink_to(outside)
    assert dict(run(tmp_path / "a", tmp_path / "b").packages) == {NO_PACKAGE: PAGE}


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_what_cannot_be_read_is_named_and_the_rest_counted(open_folder: Path) -> None:
    root = open_folder / "root"
    (root / "closed").mkdir(parents=True)
    (root / "closed/file").write_bytes(b"1" * PAGE)
    (root / "secret").write_bytes(b"2" * PAGE)
    (root / "open").write_bytes(b"3" * PAGE)
    if os.geteuid() == 0:
        for path in (root, root / "closed", root / "secret", root / "open"):
            os.chown(path, NOBODY, NOBODY)
    (root / "closed").chmod(0)
    (root / "secret").chmod(0)
    try:
        with as_nobody(open_folder):
            found = run(root, work=Path("/var/tmp"))
    finally:
        (root / "closed").chmod(0o700)
    assert found.total == PAGE
    assert found.left_out_count == 2
    assert {entry.path: entry.reason for entry in found.left_out} == {
        "closed": "this folder cannot be read: Permission denied",
        "secret": "cannot be read: Permission denied",
    }


def test_a_folder_without_permission_is_refused_at_once(open_folder: Path) -> None:
    (open_folder / "closed").mkdir()
    (open_folder / "closed").chmod(0)
    with as_nobody(open_folder), pytest.raises(UsageError, match="Permission denied") as caught:
        run(open_folder / "closed")
    assert "root" in caught.value.hint


def test_a_work_folder_that_cannot_be_written(open_folder: Path) -> None:
    (open_folder / "root").mkdir()
    (open_folder / "work").mkdir()
    (open_folder / "work").chmod(0o555)
    with as_nobody(open_folder), pytest.raises(HostError, match="no file can be made there") as caught:
        run(open_folder / "root", work=open_folder / "work")
    assert "--work-dir" in caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "zeros", "pipe", "socket", "device", "loop", "vmdk"])
def test_what_is_no_root_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    words = {"missing": "No such file", "empty": "is empty", "pipe": "is a pipe", "socket": "is a socket"}
    words |= {"device": "is a character device", "loop": "symbolic links", "vmdk": "VMDK", "zeros": "neither a root"}
    words["text"] = "neither a root"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("Not an image. " * 1000)
        case "zeros":
            path.write_bytes(bytes(1 << 20))
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/null")
        case "loop":
            path.symlink_to(path)
        case "vmdk":
            path.write_bytes(b"KDMV" + bytes(4096))
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
    with pytest.raises(UsageError, match=words[kind]):
        run(path)


def test_nothing_is_read_before_all_roots_are_known_to_be_some(tmp_path: Path, roots: list[Path]) -> None:
    read: list[tuple[str, str]] = []

    class Ear(Listener):
        def reading(self, name: str, kind: str) -> None:
            read.append((name, kind))

    with pytest.raises(UsageError, match="No such file"):
        estimate([roots[0], tmp_path / "missing"], Options(), Ear())
    assert not read


def test_too_many_roots(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 256"):
        run(*([tmp_path] * 257))


def test_an_empty_folder_is_a_root_without_files(tmp_path: Path) -> None:
    found = run(tmp_path, tmp_path)
    assert found.total == found.possible_saved == 0
    assert found.pairs == [(0, 1, 0)]


def test_a_mounted_file_system_is_named_and_not_entered() -> None:
    # The kernel's own folder of devices has file systems mounted in it.
    if not os.path.ismount("/dev/shm") or os.stat("/dev").st_dev == os.stat("/dev/shm").st_dev:
        pytest.skip("nothing is mounted at /dev/shm")
    found = run(Path("/dev"))
    (entry,) = (entry for entry in found.left_out if entry.path == "shm")
    assert "--cross-mounts" in entry.reason
    assert not [entry for entry in run(Path("/dev"), cross=True).left_out if entry.path == "shm"]

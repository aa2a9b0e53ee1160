"""A shared file changes: the writer waits until programs have let go, and they see the new bytes at once.

The checks read without a pause while this goes on (program.py): a generation older than the last one that was done, or
a mixture when nobody writes, fails the test.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
from collections.abc import Callable

import pytest

from .harness import MIB, PAGE, Consumer, Domain, Host, Stamped, cached_pages, digest, noise, wait

PAGES = 64
_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02  # linux/falloc.h


def _shared(host: Host) -> tuple[Domain, Domain, Stamped, Consumer]:
    """Give two domains that share one stamped file, with a program that checks it."""
    host.start_broker()
    first, second = host.add_domain(), host.add_domain()
    stamped = Stamped(first, "f.bin", PAGES)
    second.write("f.bin", stamped.content())
    first.start()
    second.start()
    host.wait_offered(1)
    program = first.program()
    program.open(stamped.path)
    program.wait_shared(PAGES)
    program.ask("check_stamps", name="f", counters=str(stamped.counters), pages=PAGES)
    other = second.program()
    other.open(second.root / "f.bin")
    other.wait_shared(PAGES)
    return first, second, stamped, program


def _overwrite(path: os.PathLike[str], data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    for at in range(0, len(data), PAGE * 8):
        os.pwrite(fd, data[at : at + PAGE * 8], at)
    os.close(fd)


def _map_write(path: os.PathLike[str], data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, len(data), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        os.close(fd)
        mapped[:] = data


def _truncate_and_write(path: os.PathLike[str], data: bytes) -> None:
    # To its own size: nothing changes, and a reader must not find the file short.
    os.truncate(path, len(data))
    _overwrite(path, data)


def _append_then_write(path: os.PathLike[str], data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"more")
    os.close(fd)
    _overwrite(path, data)
    os.truncate(path, len(data))


@pytest.mark.parametrize("write", [_overwrite, _map_write, _truncate_and_write, _append_then_write])
def test_rewritten_in_place(host: Host, write: Callable[[os.PathLike[str], bytes], None]) -> None:
    first, second, stamped, program = _shared(host)
    for _ in range(4):
        seen = program.ask("look", name="f")
        with stamped.writing() as data:
            write(stamped.path, data)
        assert program.ask("hash", name="f") == digest(data)
        wait("two more rounds", lambda n: program.ask("look", name="f")["rounds"] >= n, seen["rounds"] + 2)
    assert not first.running.events("consumer.hung")
    # The index has forgotten: the old content has one holder, and the file that was written is not offered.
    wait("no owner in the first domain", lambda: host.domain_states()[first.name]["owned_pages"] == 0)
    # It shares again when another domain has the same bytes.
    second.write("g.bin", stamped.content())
    os.sync()
    program.wait_shared(PAGES)
    report = program.ask("stop", name="f")
    assert report["faults"] == []
    assert report["shared_rounds"] > 0
    assert host.pool()["mismatched_pages_total"] == 0
    assert not first.running.events("file.mismatch")


def test_writers_at_random_moments(host: Host) -> None:
    """Writers come again and again while the file is shared, is about to be, or has just been let go of."""
    first, second, stamped, program = _shared(host)
    others = [first.program() for _ in range(2)]
    for other in others:
        other.open(stamped.path)
        other.ask("check_stamps", name="f", counters=str(stamped.counters), pages=PAGES)
    rng = random.Random(3)
    target = second.root / "f.bin"
    for round_number in range(4):
        with stamped.writing() as data:
            rng.choice([_overwrite, _map_write])(stamped.path, data)
        _overwrite(target, data)
        os.sync()
        pages = rng.choice([0, PAGES, PAGES]) if round_number < 3 else PAGES
        if pages:
            program.wait_shared(pages)
        else:
            rounds = program.ask("look", name="f")["rounds"] + rng.randrange(2000)
            wait("more rounds", lambda n: program.ask("look", name="f")["rounds"] >= n, rounds)
    for reader in (program, *others):
        report = reader.ask("stop", name="f")
        assert report["faults"] == []
        assert report["shared_rounds"]
    assert not first.running.events("file.mismatch")


def test_truncated_to_less_and_to_more(host: Host) -> None:
    data = noise(PAGES * PAGE, 1)
    host.start_broker()
    first, second = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    program = first.program()
    path = first.root / "f.bin"
    program.open(path)
    program.wait_shared(PAGES)

    os.truncate(path, 10 * PAGE + 100)
    assert program.pages() == 0
    assert bytes.fromhex(program.ask("read", name="f", start=0, end=10 * PAGE)) == data[: 10 * PAGE]
    tail = bytes.fromhex(program.ask("read", name="f", start=10 * PAGE, end=11 * PAGE))
    assert tail == data[10 * PAGE : 10 * PAGE + 100] + bytes(PAGE - 100)

    os.truncate(path, 2 * PAGES * PAGE)
    now = data[: 10 * PAGE + 100] + bytes(2 * PAGES * PAGE - 10 * PAGE - 100)
    assert program.ask("hash", name="f") == digest(now[: PAGES * PAGE])
    # A mapping made now has the new length, and shares with a domain that has the same bytes.
    again = first.program()
    again.open(path)
    assert again.ask("hash", name="f") == digest(now)
    second.write("g.bin", now)
    again.wait_shared(11)
    assert again.ask("hash", name="f") == digest(now)
    assert program.pages() == 0
    assert program.ask("hash", name="f") == digest(now[: PAGES * PAGE])
    os.truncate(path, 0)
    wait("nothing shared", lambda: again.pages() == 0)
    assert program.alive
    assert again.alive


def test_replaced_by_rename(host: Host) -> None:
    old, new = noise(PAGES * PAGE, 1), noise(PAGES * PAGE, 2)
    host.start_broker()
    first, second = host.add_domains(2, {"f.bin": old})
    host.wait_offered(1)
    path = first.root / "f.bin"
    program = first.program()
    program.open(path)
    program.wait_shared(PAGES)
    os.replace(first.write("f.new", new), path)
    # What is mapped is the old file, as with any mapping; who opens the path gets the new one.
    assert program.ask("hash", name="f") == digest(old)
    late = first.program()
    late.open(path)
    assert late.ask("hash", name="f") == digest(new)
    os.replace(second.write("f.new", new), second.root / "f.bin")
    late.wait_shared(PAGES)
    assert late.ask("hash", name="f") == digest(new)
    assert program.ask("hash", name="f") == digest(old)
    program.quit()
    wait("the old content forgotten", lambda: [f["pages"] for f in host.files()] == [PAGES] * 2)
    host.wait_pages("pages_published", PAGES)


def test_deleted(host: Host) -> None:
    data = noise(PAGES * PAGE, 1)
    host.start_broker()
    first, second = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    path = first.root / "f.bin"
    program = first.program()
    program.open(path)
    program.wait_shared(PAGES)
    path.unlink()
    (second.root / "f.bin").unlink()
    wait("the second domain's file forgotten", lambda: {file["domain"] for file in host.files()} == {first.name})
    assert program.ask("hash", name="f") == digest(data)
    assert program.pages() == PAGES
    program.ask("close", name="f")
    wait("the index forgot", lambda: not host.files())
    host.wait_pages("pages_published", 0)
    wait("the agent let go of the file", lambda: not _holds(first, "f.bin"))


def _holds(domain: Domain, name: str) -> bool:
    folder = f"/proc/{domain.running.pid}/fd"
    targets = []
    for fd in os.listdir(folder):
        try:
            targets.append(os.readlink(f"{folder}/{fd}"))
        except FileNotFoundError:
            continue
    return any(name in target for target in targets)


def test_hole_punched(host: Host) -> None:
    data = noise(PAGES * PAGE, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    path = first.root / "f.bin"
    program = first.program()
    program.open(path)
    program.wait_shared(PAGES)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_WRONLY)
    done = libc.fallocate(fd, _KEEP_SIZE_PUNCH_HOLE, ctypes.c_long(8 * PAGE), ctypes.c_long(16 * PAGE))
    error = ctypes.get_errno()
    os.close(fd)
    assert done == 0, os.strerror(error)
    now = data[: 8 * PAGE] + bytes(16 * PAGE) + data[24 * PAGE :]
    assert program.ask("hash", name="f") == digest(now)
    assert program.pages() == 0
    # What the two still have in common is shared again, page by page.
    with path.open("rb") as file:
        file.read()
    program.wait_shared(PAGES - 16)
    assert program.ask("hash", name="f") == digest(now)
    wait("zero pages counted apart", lambda: first.status()["zero_pages"] == 16)


def test_changes_that_change_no_byte_cost_no_sharing(host: Host) -> None:
    stamp = struct.pack("Q", 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": noise(PAGES * PAGE, 1), "other.bin": stamp * PAGE})
    host.wait_offered(2)
    path = first.root / "f.bin"
    program = first.program()
    program.open(path)
    program.wait_shared(PAGES)
    program.ask("check_hashes", name="all", want={"f": digest(noise(PAGES * PAGE, 1))})
    scans = first.status()["scans"]
    path.chmod(0o444)
    os.utime(path, ns=(1, 1_000_000_000))
    os.link(path, first.root / "link.bin")
    (first.root / "sub").mkdir()
    path.rename(first.root / "sub" / "moved.bin")
    (first.root / "link.bin").unlink()
    wait("two more scans", lambda: first.status()["scans"] >= scans + 2)
    report = program.ask("stop", name="all")
    assert report["faults"] == []
    assert report["least_shared"] == PAGES
    # The owner's grants are the same ones, and a new program finds the file under its new name.
    assert host.pool()["granted_pages_total"] == PAGES
    late = first.program()
    late.open(first.root / "sub" / "moved.bin")
    late.wait_shared(PAGES)
    wait("the page cache dropped", lambda: cached_pages(first.root / "sub" / "moved.bin") == 0)


def test_a_file_that_is_open_for_writing_is_not_shared(host: Host) -> None:
    data = noise(MIB, 1)
    host.start_broker()
    first, _ = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    fd = os.open(first.root / "f.bin", os.O_WRONLY)
    program = first.program()
    state = program.open(first.root / "f.bin")
    assert (state["pages"], state["reason"]) == (0, "lease-refused")
    assert program.ask("hash", name="f") == digest(data)
    os.close(fd)
    program.wait_shared(MIB // PAGE)
    assert program.ask("hash", name="f") == digest(data)

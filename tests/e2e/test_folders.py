"""Folders as they are found: full of small files, strange names, loops, sockets, devices, and files that vanish."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import MIB, PAGE, Host, digest, noise, wait

MANY = 20_000


def test_twenty_thousand_small_files(host: Host, record_property: Callable[[str, object], None]) -> None:
    common = [noise(PAGE, n) for n in range(500)]
    host.start_broker()
    domains = [host.add_domain(rescan_interval="10 s") for _ in range(2)]  # what the host evicts is found again
    for domain, count in zip(domains, (MANY, MANY // 10), strict=True):
        for folder in range(20):
            (domain.root / f"{folder:02}").mkdir()
        for n in range(count):
            # 500 first pages, but every file has a last page and so a root of its own.
            with open(domain.root / f"{n // 1000:02}" / f"{n:05}", "wb") as file:
                file.write(common[n % 500] + (n + 1).to_bytes(4, "little"))
                os.fchmod(file.fileno(), 0o644)
        domain.start()
    # All of them have a first page that is shared, those of both domains are shared whole.
    host.wait_pages("files", MANY + MANY // 10)
    host.wait_pages("pages_published", 500 + MANY // 10)
    host.wait_offered(MANY, domains[0])
    os.sync()
    sizes = {
        "broker": host.running.memory(),
        **{domain.name: domain.running.memory() for domain in domains},
    }
    for name, size in sizes.items():
        record_property(f"private_bytes_{name}", size)
    # A bound on what one file costs, in the process that counts them all; measured figures are in the properties.
    assert max(sizes.values()) < 100 * MIB + MANY * 8192
    program = domains[0].program()
    chosen = random.Random(1).sample(range(MANY // 10), 100) + random.Random(2).sample(range(MANY), 100)
    for n in chosen:
        program.open(domains[0].root / f"{n // 1000:02}" / f"{n:05}", str(n))
    for n in chosen:
        program.wait_shared(2 if n < MANY // 10 else 1, str(n))
        assert program.ask("hash", name=str(n)) == digest(common[n % 500] + (n + 1).to_bytes(4, "little"))
    program.quit()
    wait("no owners", lambda: host.domain_states()["d1"]["owned_files"] == 0)


def test_strange_names(host: Host) -> None:
    data = noise(2 * PAGE, 1)
    names = [
        b"\xff\xfe-not-utf-8",
        b"new\nline",
        b'"quotes" and \\back\\slashes',
        b"\xc3\xa4\xc3\xb6",
        b"\x01\x7f",
        b"[bold]",
        b"-rf",
        b"x" * 255,
        b"\xe9" * 100 + b"/" + b"\xff" * 200,
    ]
    host.start_broker()
    domains = [host.add_domain() for _ in range(2)]
    for domain in domains:
        for at, name in enumerate(names):
            domain.write(name, data + bytes([at + 1]))
        domain.start()
    host.wait_offered(len(names))
    program = domains[0].program()
    for at, name in enumerate(names):
        path = os.fsencode(domains[0].root) + b"/" + name
        program.open(path, str(at))
        program.wait_shared(3, str(at))
        assert program.ask("hash", name=str(at)) == digest(data + bytes([at + 1]))
    listed = {file["path"] for file in host.files()}
    assert "/\\xff\\xfe-not-utf-8" in listed
    assert len(listed) == len(names)
    done = domains[0].command("detach", os.fsdecode(os.fsencode(domains[0].root) + b"/" + names[0]))
    assert done.returncode == 0, done.stderr
    program.wait_shared(0, "0")
    assert program.pages("1") == 3


def test_what_is_no_file(host: Host) -> None:
    data = noise(MIB, 1)
    host.start_broker()
    first, second = host.add_domain(), host.add_domain()
    root = first.root
    for domain in (first, second):
        domain.write("f.bin", data)
    outside = host.folder / "outside.bin"
    outside.write_bytes(noise(MIB, 2))
    second.write("outside.bin", outside.read_bytes())
    (root / "sub").mkdir()
    (root / "loop").symlink_to(root)
    (root / "sub" / "up").symlink_to("..")
    (root / "self").symlink_to("self")
    (root / "dangling").symlink_to("nowhere")
    (root / "link.bin").symlink_to("f.bin")
    (root / "outside.bin").symlink_to(outside)
    (root / "outside").symlink_to(host.folder)
    os.mkfifo(root / "fifo", 0o644)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(root, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    (root / "empty").touch()
    first.write("secret.bin", noise(MIB, 3)).chmod(0o600)
    second.write("secret.bin", noise(MIB, 3))
    (root / "closed").mkdir()
    first.write("closed/f.bin", noise(MIB, 4))
    second.write("closed/f.bin", noise(MIB, 4))
    (root / "closed").chmod(0o700)
    with (root / "sparse.bin").open("wb") as file:
        file.truncate(1 << 40)
    (root / "sparse.bin").chmod(0o644)
    devices = _make_devices(root)
    first.start()
    second.start()
    host.wait_offered(1)
    scans = first.status()["scans"]
    wait("two more scans", lambda: first.status()["scans"] >= scans + 2)
    assert [file["path"] for file in host.files() if file["domain"] == first.name] == ["/f.bin"]
    program = first.program()
    program.open(root / "link.bin")  # the same inode, by another way
    program.wait_shared(MIB // PAGE)
    assert program.ask("hash", name="f") == digest(data)
    for name in ("secret.bin", "closed/f.bin", "outside.bin"):
        state = program.open(root / name, name)
        assert (state["pages"], state["reason"]) == (0, "not-designated")
    [finished] = first.running.events("scan.finished")
    assert finished["sharearea.files"] == 1
    if not devices:
        pytest.skip("the rest holds; device nodes need root and a file system that has them")


def _make_devices(root: Path) -> bool:
    try:
        os.mknod(root / "zero", 0o644 | stat.S_IFCHR, os.makedev(1, 5))
        os.mknod(root / "block", 0o644 | stat.S_IFBLK, os.makedev(7, 255))
    except PermissionError:
        return False
    return True


def test_files_that_come_and_go_while_they_are_looked_at(host: Host) -> None:
    data = noise(MIB, 1)
    host.start_broker()
    first, second = host.add_domain(settle="0 s"), host.add_domain()
    for domain in (first, second):
        domain.write("f.bin", data)
    stop = threading.Event()
    rounds = []

    def churn() -> None:
        rng = random.Random(2)
        while not stop.is_set():
            folder = first.root / f"sub{rng.randrange(3)}"
            folder.mkdir(exist_ok=True)
            path = folder / f"n{rng.randrange(40)}"
            action = rng.randrange(4)
            try:
                if action == 0:
                    path.unlink(missing_ok=True)
                elif action == 1:
                    path.rename(folder / "moved")
                elif action == 2:
                    folder.rename(first.root / "gone")
                    for name in (first.root / "gone").iterdir():
                        name.unlink()
                    (first.root / "gone").rmdir()
                else:
                    path.write_bytes(noise(rng.randrange(1, 20) * PAGE, rng.randrange(1000)))
                    path.chmod(0o644)
            except FileNotFoundError:
                pass
            rounds.append(action)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        first.start()
        second.start()
        host.wait_offered(1, second)
        program = first.program()
        program.open(first.root / "f.bin")
        program.wait_shared(MIB // PAGE)
        wait("four scans", lambda: first.status().get("scans", 0) >= 4)
        wait("enough of it", lambda: len(rounds) > 2000)
    finally:
        stop.set()
        thread.join()
    assert program.ask("hash", name="f") == digest(data)
    there = sum(len(files) for _, _, files in os.walk(first.root))
    wait("the index in step with the folder", lambda: host.domain_states()[first.name]["files"] == there)
    assert first.running.alive
    assert not first.running.events("scan.failed")

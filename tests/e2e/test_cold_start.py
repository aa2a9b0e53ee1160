"""A domain on a copy of another one's disk: what the area has is not read from it; what is not sure is.

Real ext4 images on loop devices. The disk's own counter says what was read from it (sharearea/demo_disk.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharearea.demo_disk import Disk, lacking, make_image

from .harness import MIB, PAGE, Consumer, Domain, Host, cached_pages, digest, noise, wait

PAGES = 4 * MIB // PAGE
CONTENT = noise(4 * MIB, 1)
OTHER = noise(4 * MIB, 2)

pytestmark = pytest.mark.skipif(bool(lacking()) and "CI" not in os.environ, reason=lacking() or "-")


@contextlib.contextmanager
def disk_of(host: Host, name: str, image: Path) -> Iterator[tuple[Domain, Disk]]:
    """Make a domain whose root is a disk. None of `host.domains`: nothing reads its files but its programs."""
    domain = Domain(host, name, {"cache": str(host.folder / name / "agent" / "fingerprints.db")})
    disk = Disk(image, domain.root)
    try:
        yield domain, disk
    finally:
        for process in [*domain.programs, *([domain.agent] if domain.agent is not None else [])]:
            if process.alive:
                process.kill()
        disk.close()


@pytest.fixture
def area(host: Host) -> Host:
    """Give a host in whose area one file is, brought by two domains."""
    host.start_broker()
    host.add_domains(2, {"x.bin": CONTENT})
    host.wait_offered(1)
    host.wait_pages("pages_published", PAGES)
    return host


def template(host: Host, *, stop: bool = True) -> Path:
    """Make a disk with that file on which an agent was at work, and return its image: after its end, or of before."""
    source, image = host.folder / "source", host.folder / "template.img"
    source.mkdir()
    (source / "x.bin").write_bytes(CONTENT)
    (source / "x.bin").chmod(0o644)
    make_image(image, source, 64 * MIB)
    with disk_of(host, "d-template", image) as (domain, _):
        changed = (domain.root / "x.bin").stat().st_ctime
        wait("the file is old enough to be believed", lambda: time.time() > changed + 3)
        domain.use()
        domain.start()

        def known() -> bool:
            domain.use()
            return bool(domain.status().get("proven_files"))

        wait("the agent knows the file for good", known)
        if stop:
            domain.running.end()
        else:
            # As a snapshot of a running guest has it: written back, and the agent's cache says that it is open.
            os.sync()
            shutil.copyfile(image, host.folder / "early.img")
            return host.folder / "early.img"
    return image


def opened(domain: Domain) -> Consumer:
    program = domain.program()
    program.open(domain.root / "x.bin")
    return program


def test_what_the_area_has_is_not_read(area: Host) -> None:
    image = template(area)
    with disk_of(area, "d-cold", image) as (domain, disk):
        domain.start()
        wait("the file is offered", lambda: domain.status().get("offered_files") == 1)
        program = opened(domain)
        program.wait_shared(PAGES)
        assert program.ask("hash", name="f") == digest(CONTENT)
        assert cached_pages(domain.root / "x.bin") == 0
        assert disk.read_bytes < MIB  # the file system's own
        assert domain.status()["unread_pages"] == PAGES
        (mine,) = [each for each in domain.ask("ps")["programs"] if each["pid"] == program.pid]
        assert [file["unread_bytes"] for file in mine["files"]] == [PAGES * PAGE]
        assert "(4.0 MiB never read)" in domain.command("ps", "--files").stdout
        assert f"{PAGES} of them were never read" in domain.command("why", str(domain.root / "x.bin")).stdout
        wait("the broker hears of it", lambda: area.domain_states()["d-cold"]["unread_pages"] == PAGES)
        assert area.domain_states()["d-cold"]["given_up_bytes"] == 0
        # It is no copy: what could be saved is what the two others have.
        assert area.pool()["possible_saved_bytes"] == PAGES * PAGE
        # A writer waits until the program is back, and the program sees what he writes.
        with (domain.root / "x.bin").open("r+b") as file:
            file.write(OTHER[:PAGE])
        assert program.ask("hash", name="f") == digest(OTHER[:PAGE] + CONTENT[PAGE:])


def test_what_was_changed_on_the_copy_is_seen(area: Host) -> None:
    """In place, of the same size, before the agent starts; with the old mtime, too."""
    image = template(area)
    with disk_of(area, "d-cold", image) as (domain, _):
        before = (domain.root / "x.bin").stat()
        with (domain.root / "x.bin").open("r+b") as file:
            file.write(OTHER)
        os.utime(domain.root / "x.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
        domain.start()
        wait("the agent has looked", lambda: domain.status().get("scans"))
        program = opened(domain)
        assert program.ask("hash", name="f") == digest(OTHER)
        assert domain.status()["unread_pages"] == 0


@pytest.mark.parametrize("how", ["copied while the agent ran", "cache copied by itself"])
def test_a_cache_that_may_not_fit_the_disk_is_thrown_away(area: Host, how: str) -> None:
    image = template(area, stop=how != "copied while the agent ran")
    with disk_of(area, "d-cold", image) as (domain, _):
        if how == "cache copied by itself":
            cache = domain.root / "agent" / "fingerprints.db"
            shutil.copy(cache, cache.with_name("copy"))
            cache.with_name("copy").rename(cache)
        domain.start()
        wait("the agent has looked", lambda: domain.status().get("scans"))
        assert domain.running.events("cache.noticed")
        program = opened(domain)
        assert program.ask("hash", name="f") == digest(CONTENT)
        assert program.pages() == 0 or cached_pages(domain.root / "x.bin") > 0
        assert domain.status()["unread_pages"] == 0

"""Root folders to estimate, and what asks for an estimate of them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sharearea.estimate.counting import Listener, Options, estimate
from sharearea.estimate.figures import Estimate

from .oracle import PAGE, Counted, Files, count

REAL_PROGRAMS = [Path(sys.executable).resolve(), *(Path("/usr/bin", name) for name in ("env", "sort", "ls"))]


def make_tree(root: Path, seed: int, *, links: bool = True, many: int = 150) -> None:
    """Fill a folder with files such as roots have, out of a few pages that other seeds share a part of.

    links: hard and symbolic ones, a pipe, and holes. many: names in one folder.
    """
    random_ = random.Random(seed)
    pool = [random.Random(f"page {number}").randbytes(PAGE) for number in range(60)]
    pool += [bytes(PAGE)] * 6 + [random_.randbytes(PAGE) for _ in range(30)]
    root.mkdir(parents=True, exist_ok=True)

    def content(most: int) -> bytes:
        data = b"".join(random_.choices(pool, k=random_.randrange(most)))
        return data + random_.randbytes(random_.choice((0, 0, 1, 100, 4095)))

    for folder in ("usr/bin", "usr/lib/deep/er/and/deeper", "etc", "many", "empty"):
        (root / folder).mkdir(parents=True)
    for number in range(25):
        place = random_.choice(("usr/lib", "usr/lib/deep/er", "etc", "usr/lib/deep/er/and/deeper"))
        (root / place / f"file-{number}").write_bytes(content(40))
    (root / "etc/nothing").touch()
    (root / "etc/one-byte").write_bytes(b"x")
    (root / "usr/lib/large").write_bytes(random.Random("large").randbytes(3 << 20))
    for number in range(many):
        (root / "many" / f"name-that-takes-some-room-{number:05}").write_bytes(pool[number % 60][: number * 7])
    for program in REAL_PROGRAMS[: 2 + seed % 3]:
        if program.exists() and program.stat().st_size < 16 << 20:
            shutil.copyfile(program, root / "usr/bin" / program.name)
    with open(root / "usr/lib/sparse", "wb") as file:
        file.seek(5 * PAGE + 10)
        file.write(b"after a hole")
        file.seek(40 * PAGE)
        file.write(pool[3])
        file.truncate(100 * PAGE + 7)
    if links:
        os.link(root / "usr/lib/large", root / "etc/the-same-file")
        (root / "usr/lib/a-name-äöü €").write_bytes(pool[5])
        (root / "etc/loop").symlink_to("loop")
        (root / "etc/up").symlink_to("..")
        (root / "etc/out").symlink_to("/usr/bin")
        os.mkfifo(root / "etc/pipe")


def run(*paths: Path, **options: object) -> Estimate:
    """Estimate, as the verb does."""
    return estimate(paths, Options(**options), Listener())  # type: ignore[arg-type]


def same(found: Estimate, wanted: Counted) -> None:
    """Compare an estimate with the slow count."""
    exact = found.memory is None
    assert found.total == wanted.total
    assert found.zero == wanted.zero
    assert found.self_shared == wanted.self_shared
    assert found.text == wanted.text
    assert {name: total for name, (total, _) in found.classes.items()} == wanted.classes
    near = 0 if exact else 2 * PAGE
    assert abs(found.possible_saved - wanted.possible) <= near
    assert {(a, b) for a, b, _ in found.pairs} == set(wanted.pairs)
    for a, b, shared in found.pairs:
        assert abs(shared - wanted.pairs[a, b]) <= near
    assert abs(sum(size for _, size in found.packages) - found.possible_saved) <= near * max(1, len(found.packages))
    assert abs(sum(saved for _, saved in found.classes.values()) - found.possible_saved) <= 2 * near


def same_as_files(found: Estimate, roots: Sequence[Files]) -> None:
    """Compare with a slow count of contents; nothing may be left out."""
    assert not found.left_out
    same(found, count(roots, found.backend, found.memory))


def tool(name: str) -> str:
    """Find a program of the system; a test that needs one that is missing is skipped, in CI it fails."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        text = f"{name} is not installed: tools/test_tools.sh names its package"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    return found


def call(name: str, *arguments: object, **options: object) -> str:
    """Run a program of the system that must succeed; return what it printed."""
    done = subprocess.run(  # type: ignore[call-overload]
        [tool(name), *map(str, arguments)], check=False, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    return str(done.stdout)

"""What every test gets: a hypothesis profile without deadlines, and a folder with a page cache under it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A shell that runs us in the background has SIGINT ignored, and what is ignored stays so in every program that is
# started from here: nobody could be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# A deadline would be a timed assertion.
settings.register_profile("sharearea", deadline=None, print_blob=True)
settings.load_profile("sharearea")


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """Give an empty folder on the tree's own file system: /tmp may be a tmpfs, whose pages cannot be dropped."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="test-", dir=build) as path:
        yield Path(path)

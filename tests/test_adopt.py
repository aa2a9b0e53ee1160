"""Which area a restarted broker takes over from the service manager, and why not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sharearea.area.local import LocalArea
from sharearea.backend.local import _adopt
from sharearea.common import native
from sharearea.model import PoolRecord
from sharearea.policy import Mode, PoolRules

KEY = bytes(range(32))
SLOTS = 1024
PAGES = os.urandom(3 * 4096)
PRINTS, _ = native.fingerprint_pages(KEY, PAGES)


@pytest.fixture
def filled() -> Iterator[tuple[LocalArea, PoolRecord]]:
    """An area with three pages, and what the store says of it."""
    area = LocalArea("pool", KEY, SLOTS, 1 << 30)
    _, ((number, dev, ino),) = area.fill(0, PAGES, PRINTS)
    record = PoolRecord(bytes(16), SLOTS)
    record.segments[number] = (dev, ino)
    record.slots[0] = PRINTS
    yield area, record
    area.close()


def adopt(
    record: PoolRecord, kept: dict[str, list[int]], *, slots: int = SLOTS, max_pages: int = 3, mode: Mode = "share"
) -> str | None:
    area = LocalArea("pool", KEY, SLOTS, 1 << 30)
    try:
        return _adopt(area, record, slots, PoolRules("pool", max_pages=max_pages, mode=mode), kept)
    finally:
        area.close()


def test_what_is_there_is_taken_over(filled: tuple[LocalArea, PoolRecord]) -> None:
    area, record = filled
    assert adopt(record, {"sharearea-pool-0": [area.fd(0)]}) is None


def test_what_does_not_fit_begins_anew(filled: tuple[LocalArea, PoolRecord]) -> None:
    area, record = filled
    kept = {"sharearea-pool-0": [area.fd(0)]}
    assert adopt(PoolRecord(bytes(16), SLOTS), kept) == "no-earlier-area"
    assert adopt(record, {}) == "segments-not-kept"
    assert adopt(record, kept, mode="report") == "report-only"
    assert adopt(record, kept, slots=SLOTS * 2) == "segment-size-changed"
    # A table that cannot hold all of it would stop the broker at every start.
    assert adopt(record, kept, max_pages=2) == "table-too-small"


def test_another_segment_or_other_bytes_are_refused(filled: tuple[LocalArea, PoolRecord]) -> None:
    area, record = filled
    with native.Segment.create("sharearea-pool-0", SLOTS) as stranger:
        why = adopt(record, {"sharearea-pool-0": [stranger.fileno()]})
    assert why is not None
    assert why.startswith("segment-refused")
    record.slots[0] = PRINTS[32:] + PRINTS[:32]
    assert adopt(record, {"sharearea-pool-0": [area.fd(0)]}) == "bytes-differ"

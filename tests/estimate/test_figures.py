"""The arithmetic and the texts of an estimate, by example."""

from __future__ import annotations

import pytest

from sharearea.estimate.figures import ONE, PAGE_SIZE, Estimate, RootPages, SharedPages, resident_bytes, weight
from sharearea.estimate.text import parse_size, percent, shown, size_text


def example(backend: str = "local", memory: int | None = None) -> Estimate:
    roots = [RootPages("a", "folder", 3, 100, 10, 20, 30, 40, 5), RootPages("b", "folder", 1, 50, 0, 0, 0, 50)]
    shared = SharedPages(
        120, 4 * ONE, 3 * ONE, 13 * ONE, 20 * ONE, 2 * ONE, {(0, 1): 20 * ONE}, {"p": 20 * ONE, "q": 0}
    )
    return Estimate(backend, memory, roots, shared)  # type: ignore[arg-type]


def test_the_record_has_the_keys_that_were_asked_for() -> None:
    record = example().record()
    assert record["roots"] == ["a", "b"]
    assert record["total_bytes"] == 150 * PAGE_SIZE
    assert record["zero_bytes"] == 10 * PAGE_SIZE
    assert record["self_shared_bytes"] == 5 * PAGE_SIZE
    assert record["possible_saved_bytes"] == 20 * PAGE_SIZE
    assert record["text_bytes"] == 20 * PAGE_SIZE
    assert record["pairs"] == [{"a": "a", "b": "b", "shared_bytes": 20 * PAGE_SIZE}]
    assert record["packages"] == [{"name": "p", "bytes": 20 * PAGE_SIZE}]


def test_text_is_what_the_backends_differ_in() -> None:
    local, xen = example(), example("xen")
    assert local.possible_saved - xen.possible_saved == 4 * PAGE_SIZE
    assert local.possible_by_backend == xen.possible_by_backend
    assert sum(saved for _, saved in local.classes.values()) == local.possible_saved
    assert sum(saved for _, saved in xen.classes.values()) == xen.possible_saved


def test_what_is_resident() -> None:
    assert resident_bytes(1000, None) == resident_bytes(1000, 2000) == 1000
    assert resident_bytes(1000, 10) == 10
    assert weight(0, 10) == weight(10, 10) == weight(10, None) == ONE
    assert weight(20, 10) == ONE // 2
    assert example(memory=60 * PAGE_SIZE).resident == 110 * PAGE_SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("1.5 GiB", 3 << 29), ("2t", 2 << 40), ("7KB", 7 << 10), ("5B", 5)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1e3", "512 MM", "1,5G", "nan", "0x10", "½G"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_texts() -> None:
    assert [size_text(size) for size in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]
    assert percent(1, 3) == "33.3 %"
    assert percent(0, 0) == "0.0 %"
    assert shown("an äöü name") == "an äöü name"
    assert shown("a\x1b[31m\nb\udcff") == "a\\x1b[31m\\nb\\udcff"

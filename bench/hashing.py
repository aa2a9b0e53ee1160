"""How fast pages are fingerprinted, beside the `blake3` package and memcpy over the same bytes."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from sharearea.common import native

from .host import MIB
from .report import Samples, Tell

PACKAGE = "blake3 package, one input"
PACKAGE_PAGES = "blake3 package, one call per page"
MEMCPY = "memcpy"
TWO_THREADS = "pages, two threads"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    buffer_bytes: int = 64 * MIB
    root_bytes: int = 8 * MIB
    rounds: int = 9


QUICK = Sizes(16 * MIB, 2 * MIB, 5)


def run(sizes: Sizes, tell: Tell) -> Samples:
    """Measure every kernel that runs here, in turns with the rest."""
    found = Samples("hash")
    key = os.urandom(native.FP_SIZE)
    # Two mappings of their own: aligned as the page cache and a segment are.
    source, target = mmap.mmap(-1, sizes.buffer_bytes), mmap.mmap(-1, sizes.buffer_bytes)
    for at in range(0, sizes.buffer_bytes, MIB):
        source[at : at + MIB] = os.urandom(MIB)[: sizes.buffer_bytes - at]
    target[:] = source[:]
    fingerprints = os.urandom(sizes.root_bytes)
    file_bytes = sizes.root_bytes // native.FP_SIZE * native.PAGE_SIZE
    before = native.selected_hash_kernel()
    kernels = [kernel.name for kernel in native.hash_kernels() if kernel.state == native.KERNEL_RUNS]
    pages, copy = memoryview(source), memoryview(target)
    cases: list[tuple[str, str, int, Callable[[], object]]] = [
        (f"pages, {name}", name, sizes.buffer_bytes, lambda: native.fingerprint_pages(key, pages)) for name in kernels
    ]
    cases += [
        (TWO_THREADS, "auto", 2 * sizes.buffer_bytes, lambda: _twice(key, pages, copy)),
        (PACKAGE, "auto", sizes.buffer_bytes, lambda: blake3(pages, key=key).digest()),
        (PACKAGE_PAGES, "auto", sizes.buffer_bytes, lambda: _page_by_page(key, pages)),
        (MEMCPY, "auto", sizes.buffer_bytes, lambda: _copy(copy, pages)),
        ("file root", "auto", sizes.root_bytes, lambda: native.file_root(file_bytes, fingerprints)),
    ]
    try:
        for round_ in range(-1, sizes.rounds):  # the first one warms up
            tell(f"round {max(round_, 0) + 1} of {sizes.rounds}")
            for case, kernel, size, work in cases:
                native.select_hash_kernel(kernel)
                begun = time.perf_counter()
                work()
                elapsed = time.perf_counter() - begun
                if round_ >= 0:
                    found.add(case, rate_bytes_per_s=size / elapsed)
        native.select_hash_kernel("auto")
        fastest = f"pages, {native.selected_hash_kernel()}"
    finally:
        native.select_hash_kernel(before)
        pages.release()
        copy.release()
        source.close()
        target.close()
    for other in (PACKAGE, PACKAGE_PAGES, MEMCPY, "pages, scalar"):
        found.ratio(f"{fastest} / {other}", "rate_ratio", (fastest, "rate_bytes_per_s"), (other, "rate_bytes_per_s"))
    found.ratio(
        f"{TWO_THREADS} / {fastest}", "rate_ratio", (TWO_THREADS, "rate_bytes_per_s"), (fastest, "rate_bytes_per_s")
    )
    return found


def _twice(key: bytes, one: memoryview, other: memoryview) -> None:
    threads = [threading.Thread(target=native.fingerprint_pages, args=(key, buffer)) for buffer in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _page_by_page(key: bytes, pages: memoryview) -> None:
    for at in range(0, len(pages), native.PAGE_SIZE):
        blake3(pages[at : at + native.PAGE_SIZE], key=key).digest()


def _copy(target: memoryview, source: memoryview) -> None:
    target[:] = source

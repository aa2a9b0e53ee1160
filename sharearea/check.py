"""Probes of a host: what of sharearea will work here, what will not, and why. Asks the kernel, changes nothing.

Each probe tries the real thing on a scratch object and gives a Finding; the command line prints them.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .common import native
from .common.errors import NativeError, ShareareaError
from .common.wire import PAGE_SIZE
from .config import BrokerConfig

Level = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: `fail` keeps sharing from working, `note` is something to know, `remedy` what to do about it."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def check_host(config: BrokerConfig) -> list[Finding]:
    """Probe everything that the broker and the agents of this configuration need on this host."""
    findings: list[Finding] = []
    for probe in (_kernel, _segment, _cachestat, _lease, _limits, _hash):
        findings += _guarded(probe)
    findings += _folders(config)
    findings += _policy(config)
    return findings


def _guarded(probe: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(probe())
    except (OSError, ShareareaError) as error:
        return [Finding("fail", probe.__name__.strip("_"), str(error), getattr(error, "hint", ""))]


def _kernel() -> Iterator[Finding]:
    release = os.uname().release
    page = os.sysconf("SC_PAGE_SIZE")
    if page != PAGE_SIZE:
        yield Finding("fail", "kernel", f"pages of {page} bytes; only {PAGE_SIZE} are supported")
    yield Finding("ok", "kernel", f"Linux {release}")


def _segment() -> Iterator[Finding]:
    with native.Segment.create("sharearea-check", 16) as segment:
        try:
            mmap.mmap(segment.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
        except PermissionError:
            yield Finding("ok", "sealed memory", "a sealed segment cannot be mapped writable by anybody else")
        else:
            yield Finding(
                "fail", "sealed memory", "F_SEAL_FUTURE_WRITE is not honoured", "a kernel of 5.1 or newer is needed"
            )


def _cachestat() -> Iterator[Finding]:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(PAGE_SIZE))
        file.flush()
        try:
            native.cachestat(file.fileno())
        except NativeError as error:
            if error.errno != errno.ENOSYS:
                raise
            yield Finding(
                "note",
                "cachestat",
                "missing (it came with Linux 6.5): residency comes from mincore, dropped pages are not counted",
                "use a kernel of 6.5 or newer in guests where the figures matter",
            )
        else:
            yield Finding("ok", "cachestat", "the kernel counts resident pages per file")


def _lease() -> Iterator[Finding]:
    enabled = Path("/proc/sys/fs/leases-enable").read_text().strip() == "1"
    seconds = Path("/proc/sys/fs/lease-break-time").read_text().strip()
    if not enabled:
        yield Finding(
            "fail", "leases", "switched off (fs.leases-enable = 0): no file can be shared", "sysctl fs.leases-enable=1"
        )
        return
    with tempfile.NamedTemporaryFile() as file:
        fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            file.close()
            native.lease_take(fd)
            native.lease_release(fd)
        finally:
            os.close(fd)
    yield Finding("ok", "leases", f"a writer waits for consumers, {seconds} s at the most (fs.lease-break-time)")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        yield Finding(
            "note", "descriptors", f"at most {hard} open files: an agent needs one per shared file",
            "raise LimitNOFILE of the agent's unit",
        )  # fmt: skip
    else:
        yield Finding("ok", "descriptors", f"{soft} open files, {hard} at the most")
    maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    yield Finding("ok", "mappings", f"{maps} per process (vm.max_map_count); one per run of shared pages")


def _hash() -> Iterator[Finding]:
    states = {native.KERNEL_RUNS: "runs", native.KERNEL_NO_CPU: "no CPU for it", native.KERNEL_NOT_BUILT: "not built"}
    text = ", ".join(f"{kernel.name}: {states[kernel.state]}" for kernel in native.hash_kernels())
    yield Finding("ok", "fingerprints", f"{native.selected_hash_kernel()} is used ({text})")


def _folders(config: BrokerConfig) -> Iterator[Finding]:
    for name, path in (
        ("state_dir", config.state_dir),
        ("socket", config.socket.parent),
        ("status_socket", config.status_socket.parent),
    ):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            yield Finding("fail", name, f"{existing} cannot be written", f"run as root, or set broker.{name}")
        else:
            yield Finding("ok", name, f"{path}" + ("" if existing == path else " (will be created)"))


def _policy(config: BrokerConfig) -> Iterator[Finding]:
    for warning in config.warnings:
        yield Finding("note", "configuration", warning)
    if not config.policy.enabled or not config.policy.pools:
        return
    for rules in config.policy.pools.values():
        yield Finding(
            "ok",
            f"pool {rules.name}",
            f"pages that {rules.k} domains hold, in files from {rules.min_file_bytes} bytes on; area up to "
            f"{rules.max_area_bytes >> 20} MiB; {sum(rule.pool == rules.name for rule in config.policy.domains)} rules",
        )

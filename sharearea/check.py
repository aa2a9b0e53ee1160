"""Probes of a host: what of sharearea will work here, what will not, and why. Asks kernel and Xen, changes nothing.

Each probe tries the real thing on a scratch object where there is one, and gives Findings; the command line prints
them. On `local` broker and agents run on this host; on `xen` this is dom0, and what agents need is the guests' affair.
"""

from __future__ import annotations

import errno
import importlib.util
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from .area.toolstack import HostInfo, HostLimits, Toolstack, paging_bytes, stub_path
from .common import native
from .common.errors import HostError, NativeError, ShareareaError
from .common.units import size_text
from .common.wire import PAGE_SIZE
from .config import BrokerConfig
from .policy import MAX_GRANTS, PoolRules

Level = Literal["ok", "note", "fail"]

_MAPTRACK_PER_FRAME: Final = 256  # entries (xen-lab; xen/common/grant_table.c)


@dataclass(frozen=True, slots=True)
class Finding:
    """One result: `fail` keeps sharing from working, `note` is something to know, `remedy` what to do about it."""

    level: Level
    subject: str
    text: str
    remedy: str = ""


def check_host(config: BrokerConfig, toolstack: Toolstack | None = None) -> list[Finding]:
    """Probe everything that the broker of this configuration, and on `local` its agents, need on this host."""
    findings: list[Finding] = []
    probes: tuple[Callable[[], Iterator[Finding]], ...] = (_kernel, _segment, _cachestat, _lease, _limits, _hash)
    if config.backend == "xen":
        probes = (_kernel, _hash, _devices, _libraries)
    for probe in probes:
        findings += _guarded(probe)
    if config.backend == "xen":
        findings += _xen(config, toolstack or Toolstack())
    findings += _folders(config)
    findings += _metrics(config)
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


_NOT_DOM0: Final = "run this as root in dom0 of a Xen host, with xen-utils installed"


def _devices() -> Iterator[Finding]:
    lacking = []
    for name, alternative in (("privcmd", ""), ("gntdev", ""), ("evtchn", ""), ("xenbus", "/run/xenstored/socket")):
        path = Path("/dev/xen") / name
        if not os.access(path, os.R_OK | os.W_OK) and not (alternative and os.access(alternative, os.R_OK | os.W_OK)):
            lacking.append(str(path))
    if lacking:
        yield Finding(
            "fail",
            "devices",
            f"{', '.join(lacking)}: not there, or no right to it",
            f"{_NOT_DOM0}; modprobe xen-privcmd xen-gntdev xen-evtchn",
        )
    else:
        yield Finding("ok", "devices", "hypercalls, grants, event channels and xenstore can be reached")


def _libraries() -> Iterator[Finding]:
    if not os.access("/dev/xen/privcmd", os.R_OK | os.W_OK):
        return  # said already, and the libraries would say it on stderr
    native.check_area_calls()
    yield Finding("ok", "libraries", "libxenforeignmemory and libxencall are there, and Xen answers")


def _xen(config: BrokerConfig, toolstack: Toolstack) -> list[Finding]:
    try:
        host, limits = toolstack.host(), toolstack.limits()
    except HostError as error:
        return [Finding("fail", "xen", error.message, error.hint or _NOT_DOM0)]
    findings = [Finding("ok", "xen", f"Xen {host.release}")]
    findings += _area_domains(host)
    for rules in config.policy.pools.values():
        findings += _grants(rules, limits)
    findings += _memory(config, host)
    return findings


def _area_domains(host: HostInfo) -> Iterator[Finding]:
    try:
        stub_path()
    except HostError as error:
        yield Finding("fail", "area domains", error.message, error.hint)
        return
    if host.can_run_pvh:
        yield Finding("ok", "area domains", "PVH domains can be created")
        return
    yield Finding(
        "fail",
        "area domains",
        f"this host cannot create a PVH domain: Xen has {' '.join(sorted(host.virt_caps)) or 'no virtualisation'}",
        "switch on VT-x with EPT, or SVM with NPT, in the firmware (nested virtualisation where Xen is itself a "
        "guest), and do not start Xen with hap=0",
    )


def _grants(rules: PoolRules, limits: HostLimits) -> Iterator[Finding]:
    """Say what the pool's grants can carry. An entry is one page mapped by one domain."""
    host = limits.grant_frames * native.GRANTS_PER_FRAME
    entries, one = rules.grant_limits(host)
    pages, one = max(0, entries - native.GRANT_FIRST), min(one, max(0, entries - native.GRANT_FIRST))
    area = rules.max_area_bytes // PAGE_SIZE
    said = {"xenhypfs": "as Xen says", "command line": "as its command line says", "default": "Xen's default"}
    subject = f"grants of {rules.name}"
    text = (
        f"{pages} pages can be mapped at a time, one for each page and domain ({_mib(pages)}), {one} by one domain "
        f"({_mib(one)}); grant tables have up to {limits.grant_frames} frames ({said[limits.source]})"
    )
    if rules.max_grants > host:
        yield Finding(
            "note",
            subject,
            f"max_grants = {rules.max_grants}, but the host allows {host} entries; {text}",
            f"gnttab_max_frames={_frames(rules.max_grants)} on Xen's command line",
        )
    elif pages < area * rules.k:
        wanted = area * rules.k + native.GRANT_FIRST
        remedy = f"gnttab_max_frames={_frames(wanted)} on Xen's command line" if wanted > host else ""
        if rules.max_grants and rules.max_grants < wanted:
            remedy += " and " * bool(remedy) + f"max_grants = {wanted}"
        yield Finding(
            "note",
            subject,
            f"{text}; an area of {size_text(rules.max_area_bytes)} that {rules.k} domains map wholly takes {wanted}",
            remedy if wanted <= MAX_GRANTS else f"set max_area_bytes of pool {rules.name} lower",
        )
    else:
        yield Finding("ok", subject, text)
    yield from _maptrack(rules, limits, min(one, area))


def _maptrack(rules: PoolRules, limits: HostLimits, wanted: int) -> Iterator[Finding]:
    """Say what a guest can map, by the host's default; its own configuration may say otherwise (xl.cfg)."""
    entries = limits.maptrack_frames * _MAPTRACK_PER_FRAME
    text = (
        f"a PVH guest can map {entries} pages ({_mib(entries)}), a PV guest, which uses two entries for each, "
        f"{entries // 2} ({_mib(entries // 2)}); {limits.maptrack_frames} maptrack frames"
    )
    if entries // 2 < wanted:
        yield Finding(
            "note",
            f"mappings in {rules.name}",
            f"{text}: fewer than the {wanted} that one domain may be granted",
            f"gnttab_max_maptrack_frames={-(-2 * wanted // _MAPTRACK_PER_FRAME)} on Xen's command line, or "
            "max_maptrack_frames in the guest's configuration",
        )
    else:
        yield Finding("ok", f"mappings in {rules.name}", text)


def _memory(config: BrokerConfig, host: HostInfo) -> Iterator[Finding]:
    wanted = sum(rules.max_area_bytes + paging_bytes(rules.max_area_bytes) for rules in config.policy.pools.values())
    free = f"{host.free_memory >> 20} MiB of {host.total_memory >> 20} MiB are free"
    if not config.policy.pools:
        return
    if wanted > host.free_memory:
        yield Finding(
            "note",
            "memory",
            f"{free}; the areas may come to {-(-wanted >> 20)} MiB, tables included; without room, publishing pauses",
            "lower max_area_bytes, dom0_mem on Xen's command line, or the guests' memory; what guests give up comes "
            'back with reclaim = "balloon"',
        )
    else:
        yield Finding("ok", "memory", f"{free}; the areas may come to {-(-wanted >> 20)} MiB, tables included")


def _frames(entries: int) -> int:
    return -(-entries // native.GRANTS_PER_FRAME)


def _mib(pages: int) -> str:
    return f"{pages * PAGE_SIZE >> 20} MiB"


def _folders(config: BrokerConfig) -> Iterator[Finding]:
    sockets = [("status_socket", config.status_socket.parent)]
    if config.backend == "local":
        sockets.insert(0, ("socket", config.socket.parent))
    for name, path in (("state_dir", config.state_dir), *sockets):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(existing, os.W_OK):
            yield Finding("fail", name, f"{existing} cannot be written", f"run as root, or set broker.{name}")
        else:
            yield Finding("ok", name, f"{path}" + ("" if existing == path else " (will be created)"))


def _metrics(config: BrokerConfig) -> Iterator[Finding]:
    if config.metrics_listen:
        if importlib.util.find_spec("prometheus_client") is None:
            remedy = (
                "install python3-prometheus-client (Debian) or sharearea[metrics] (pip), or leave metrics_listen out"
            )
            yield Finding("fail", "metrics", "prometheus-client is not installed", remedy)
        else:
            yield Finding("ok", "metrics", f"http://{config.metrics_listen}/metrics")


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
            f"{rules.max_area_bytes >> 20} MiB; {sum(rule.pool == rules.name for rule in config.policy.domains)} rules"
            f"{_reclaim(rules)}{'; it only reports, nothing is shared' if rules.mode == 'report' else ''}",
        )


def _reclaim(rules: PoolRules) -> str:
    if rules.reclaim == "off":
        return ""
    return (
        f"; what domains give up is taken from them, down to {rules.reclaim_floor >> 20} MiB, and given back when "
        f"less than {rules.reclaim_headroom >> 20} MiB are available in them"
    )

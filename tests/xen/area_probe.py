"""Tries an area domain on a real Xen, from dom0, with the installed package and two guests that really map.

`area_probe.py DOMID DOMID` speaks JSON lines: what it wants a guest to do goes to standard output ("ask": 0 or 1, the
rest is an order for grant_holder.py), the guest's answer comes on standard input. "figures" and "done" lines say what
was seen. Whatever is not as it must be is an exception. The exit code is PASSED and nothing else when all was well.
area_run.py is the other side. It works on pools of its own, "probe" and "small", and leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sharearea.area.toolstack import Toolstack
from sharearea.area.xen import BASE_FRAME, XenArea
from sharearea.common import native
from sharearea.common.errors import AreaFull, HostError, ShareareaError

PASSED = 42
PAGE = 4096
SLOTS = 2048  # 8 MiB segments
LARGE_SLOTS = 16384  # 64 MiB ones
SMALL_SLOTS = 512  # 2 MiB ones
MIB = 1 << 20
KEY = bytes(range(32))
IN_USE_WAIT_S = 20.0

toolstack = Toolstack()


def say(**words: Any) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def must(holds: bool, what: str) -> None:
    """Fail unless it holds. Not assert: nothing may switch this off."""
    if not holds:
        raise RuntimeError(what)


def refused(kind: type[Exception], call: Callable[[], object], what: str) -> Exception:
    """Fail unless the call raises this kind of error."""
    try:
        call()
    except kind as error:
        return error
    raise RuntimeError(f"{what} was not refused")


def packed(numbers: Sequence[int]) -> bytes:
    """A packed column."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def numbers(column: bytes) -> list[int]:
    """The numbers in a packed column."""
    return list(struct.unpack(f"<{len(column) // 4}I", column))


class Guest:
    """One of the two guests."""

    def __init__(self, which: int, domid: int) -> None:
        self.which = which
        self.domid = domid

    def ask(self, **order: Any) -> dict[str, Any]:
        """Have the guest do something; return its answer."""
        say(ask=self.which, **order)
        line = sys.stdin.readline()
        must(bool(line), "the other side is gone")
        answer = json.loads(line)
        must(isinstance(answer, dict), "an answer is an object")
        return dict(answer)

    def maps(self, area: XenArea, refs: Sequence[int], want: Sequence[str], what: str) -> None:
        """The guest maps the references and reads the right bytes."""
        answer = self.ask(do="map", area=area.domid, refs=list(refs))
        must(answer["ok"], f"{what}: refused, errno {answer.get('errno')}")
        must(answer["pages"] == list(want), f"{what}: wrong bytes")

    def cannot_map(self, area: XenArea, refs: Sequence[int], what: str, **more: Any) -> None:
        """The guest is refused."""
        answer = self.ask(do="map", area=area.domid, refs=list(refs), **more)
        must(not answer["ok"], f"{what}: was mapped")

    def still_reads(self, want: Sequence[str], what: str) -> None:
        """What the guest holds has the right bytes."""
        must(self.ask(do="read")["pages"] == list(want), f"{what}: wrong bytes")

    def drops(self) -> None:
        """The guest lets go."""
        must(self.ask(do="drop")["ok"], "drop")


class Content:
    """Random pages, what they hash to under the pool's key, and what a guest must read."""

    def __init__(self, seed: int, pages: int) -> None:
        self.pages = random.Random(seed).randbytes(pages * PAGE)
        self.want, _ = native.fingerprint_pages(KEY, self.pages)
        self.count = pages

    def sha(self, page: int) -> str:
        """What grant_holder.py says of a page."""
        return hashlib.sha256(self.pages[page * PAGE : (page + 1) * PAGE]).hexdigest()


def free_mib() -> int:
    """The host's free memory."""
    return toolstack.free_memory() // MIB


def settles(call: Callable[[], bool], what: str) -> None:
    """Wait until it holds: Xen frees and scrubs on its own time."""
    deadline = time.monotonic() + IN_USE_WAIT_S
    while not call():
        must(time.monotonic() < deadline, what)
        time.sleep(0.2)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Call, and measure in milliseconds."""
    begun = time.monotonic()
    result = call()
    return result, round((time.monotonic() - begun) * 1000, 2)


def new_area(
    pool: str = "probe", identity: bytes = b"", max_bytes: int = 64 * MIB, max_grants: int | None = None
) -> XenArea:
    """An area that has no domain yet."""
    return XenArea(pool, identity or os.urandom(16), KEY, SLOTS, max_bytes, max_grants, toolstack)


def record(area: XenArea) -> dict[int, tuple[int, int]]:
    """What the store knows of an area's segments."""
    must(area.domid is not None, "the area has a domain")
    return {number: (area.domid or 0, BASE_FRAME + number * SLOTS) for number in area.segments()}


# ------------------------------------------------------------------------------------------------------- the steps


def sharing(one: Guest, two: Guest, content: Content) -> None:
    """Fill, verify, grant to two guests, revoke, and what is refused on the way."""
    before = free_mib()
    area = new_area()
    budget = area.budget()
    must(area.domid is None and area.entries() == (b"", b"", b""), "nothing is there before it is needed")
    (ok, opened), created = timed(lambda: area.fill(0, content.pages, content.want))
    must(ok == b"\1" * content.count, "every copy has its fingerprint")
    must(opened == ((0, area.domid, BASE_FRAME),), f"opened: {opened}")
    (ok, opened), filled = timed(lambda: area.fill(SLOTS, content.pages, content.want))
    must(ok == b"\1" * content.count and opened == ((1, area.domid, BASE_FRAME + SLOTS),), "second segment")
    again, refilled = timed(lambda: area.fill(SLOTS, content.pages, content.want))
    must(again == (b"\1" * content.count, ()), "a segment is opened once")
    ok, verified = timed(lambda: area.verify(0, content.want + content.want))
    must(ok == b"\1" * 2 * content.count, "all of it verifies")
    must(area.verify(SLOTS * 2, content.want[:64]) == b"\0\0", "a segment that is not there does not")
    wrong = bytearray(content.want[: 3 * 32])
    wrong[32] ^= 1
    ok, opened = area.fill(2 * SLOTS, content.pages[: 3 * PAGE], bytes(wrong))
    must(ok == b"\1\0\1", "a copy without its fingerprint is found")
    ok, _ = area.move(
        packed([SLOTS + 9, 4]), 2 * SLOTS + 10, content.want[9 * 32 : 10 * 32] + content.want[4 * 32 : 5 * 32]
    )
    must(ok == b"\1\1", "pages move")
    held = before - free_mib()
    must(24 <= held <= 24 + 12, f"three segments of 8 MiB cost {held} MiB")
    say(figures={"create_and_fill_8_mib_ms": created, "open_and_fill_8_mib_ms": filled, "fill_8_mib_ms": refilled,
                 "verify_16_mib_ms": verified, "area_of_24_mib_costs_mib": held,
                 "allocated_mib": area.allocated_bytes() / MIB})  # fmt: skip

    slots = random.Random(2).sample(range(content.count), 64)
    want = [content.sha(slot) for slot in slots]
    ones, twos = list(range(8, 72)), list(range(100, 164))
    area.grant(one.domid, packed(slots), packed(ones))
    area.grant(two.domid, packed(slots), packed(twos))
    listed = [numbers(column) for column in area.entries()]
    must(listed == [ones + twos, [one.domid] * 64 + [two.domid] * 64, slots + slots], "entries are what was granted")
    one.maps(area, ones, want, "first guest")
    two.maps(area, twos, want, "second guest, the same frames")
    must(area.revoke(packed(ones + twos)) == b"\1" * 128, "all of them are in use")
    refused(HostError, lambda: area.grant(two.domid, packed([1]), packed([8])), "a second grant on a reference in use")
    must([numbers(column) for column in area.entries()] == listed, "and nothing has changed")
    # One writer is left to try: each guest with the other's reference, and with a writable mapping of its own.
    one.drops()
    one.cannot_map(area, twos[:1], "another guest's reference")
    one.cannot_map(area, ones[:1], "a writable mapping", write=True)
    one.cannot_map(area, [1], "the domain's own entry for its xenstore ring")
    one.maps(area, ones[:3], want[:3], "after that")
    busy = area.revoke(packed(ones + twos))
    must(busy == b"\1" * 3 + b"\0" * 61 + b"\1" * 64, "those in use and no others are kept")
    one.drops()
    must(area.revoke(packed(ones)) == bytes(64), "all of the first guest's are free")
    one.cannot_map(area, ones[:1], "a stale reference")
    area.grant(two.domid, packed(slots[:8]), packed(ones[:8]))
    one.cannot_map(area, ones[:8], "a reference that is another guest's now")
    must(area.revoke(packed(ones)) == bytes(64), "free again")
    must(area.verify(0, content.want) == b"\1" * content.count, "nobody has changed a byte")

    # The second guest holds 64 pages of segment 0, which is given back under it.
    unmapped = free_mib()
    _, closed = timed(lambda: area.close_segment(0))
    settles(lambda: free_mib() >= unmapped + 7, "a closed segment's memory is free")
    must(area.segments() == (1, 2), "the others are there")
    two.still_reads(want, "pages of a closed segment")
    area.fill(0, content.pages[PAGE:] + content.pages[:PAGE], content.want[32:] + content.want[:32])
    two.still_reads(want, "pages of a segment that was opened anew")
    two.drops()
    must(area.revoke(packed(twos)) == bytes(64) and area.entries() == (b"", b"", b""), "no entry is left")
    say(figures={"close_8_mib_ms": closed, "entries_of_host": budget.host_entries})
    area.close_segment(0)
    area.close_segment(1)
    area.close_segment(2)
    must(area.allocated_bytes() < 8 * MIB, f"an empty area has {area.allocated_bytes()} bytes")
    area.destroy()
    settles(lambda: free_mib() >= before - 1, f"memory comes back: {before} MiB before")


def limits(one: Guest, content: Content) -> None:
    """The area's limit, the host's memory, and a small grant table."""
    before = free_mib()
    small = new_area("small", max_bytes=16 * MIB, max_grants=600)
    budget = small.budget()
    must((budget.first_ref, budget.entries) == (8, 600), f"budget: {budget}")
    small.fill(0, content.pages, content.want)
    must(small.budget().entries == 600, "and it stays so")
    small.fill(SLOTS, content.pages[:PAGE], content.want[:32])
    refused(AreaFull, lambda: small.fill(2 * SLOTS, content.pages[:PAGE], content.want[:32]), "a segment too many")
    must(small.segments() == (0, 1), "nothing was opened")
    refs = list(range(8, 600))
    slots = [ref % content.count for ref in refs]
    small.grant(one.domid, packed(slots), packed(refs))
    listed = small.entries()
    one.maps(small, refs, [content.sha(slot) for slot in slots], "a full table")
    # The table has two frames, 1,024 entries: the engine keeps below 600, and beyond 1,024 the table does.
    refused(HostError, lambda: small.grant(one.domid, packed([1, 2]), packed([700, 1024])), "more than the table has")
    refused(HostError, lambda: small.grant(one.domid, packed([1, 2]), packed([700, 1 << 30])), "far more")
    must(small.entries() == listed, "nothing was written")
    one.still_reads([content.sha(slot) for slot in slots], "all the time")
    one.drops()
    must(small.revoke(packed(refs)) == bytes(len(refs)), "all free")
    must(small.verify(0, content.want) == b"\1" * content.count, "bytes are what they were")
    small.destroy()

    full_host(content)
    settles(lambda: free_mib() >= before - 1, f"memory comes back: {before} MiB before")


def full_host(content: Content) -> None:
    """An area that may have more than the host has; and memory that is there in single pages only."""
    page, want = content.pages[:PAGE], content.want[:32]
    large = XenArea("probe", os.urandom(16), KEY, LARGE_SLOTS, 64 << 30, None, toolstack)
    small = XenArea("small", os.urandom(16), KEY, SMALL_SLOTS, 1 << 30, None, toolstack)
    large.fill(0, page, want)
    small.fill(0, page, want)
    # Somebody else's `xl mem-set` must not stop it.
    subprocess.run(["xl", "mem-set", str(large.domid), "64"], check=True, capture_output=True)
    blocks = 0
    begun = time.monotonic()
    for area in (large, small):
        number = 1
        while True:
            try:
                ok, _ = area.fill(number * area.slots_per_segment, page, want)
            except AreaFull as error:
                full = error
                break
            must(ok == b"\1", "filled")
            number += 1
        must("memory" in full.message, f"the reason is named: {full.message}")
        must(area.segments() == tuple(range(number)), "no segment was opened by halves")
        blocks += (number - 1) * area.slots_per_segment // SMALL_SLOTS
    spent = time.monotonic() - begun
    left = free_mib()
    opens = len(large.segments()) + len(small.segments())
    ok, _ = large.fill(1, page, want)
    must(ok == b"\1", "and the area goes on")
    number = len(small.segments())
    refused(AreaFull, lambda: small.fill(number * SMALL_SLOTS, page, want), "2 MiB more")
    # Every other page of a stretch: 2 MiB and a bit, without two that are neighbours.
    with native.AreaDomain(large.domid or 0, BASE_FRAME) as domain:
        for slot in range(LARGE_SLOTS, LARGE_SLOTS + 2 * SMALL_SLOTS + 64, 2):
            domain.release(slot, 1)
    pages, fingerprints = content.pages[: SMALL_SLOTS * PAGE], content.want[: SMALL_SLOTS * 32]
    (ok, opened), singles = timed(lambda: small.fill(number * SMALL_SLOTS, pages, fingerprints))
    must(ok == b"\1" * SMALL_SLOTS and len(opened) == 1, "a segment of single pages")
    must(small.verify(number * SMALL_SLOTS, fingerprints) == b"\1" * SMALL_SLOTS, "is as good")
    small.close_segment(number)
    refused(AreaFull, lambda: large.fill(len(large.segments()) * LARGE_SLOTS, page, want), "64 MiB more")
    for segment in large.segments():
        large.close_segment(segment)
    settles(lambda: free_mib() >= blocks * 2 - 64, "all of it is given back, with holes or without")
    say(figures={"mib_until_full": blocks * 2, "free_mib_when_full": left,
                 "open_segment_ms": round(spent * 1000 / opens, 1),
                 "fill_2_mib_of_single_pages_ms": singles})  # fmt: skip
    large.destroy()
    small.destroy()


def _child(work: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Start a process that works until it is killed. Returns its pid and a pipe that says when it is at work."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work(lambda: _tell(writer))
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
        finally:
            os._exit(1)
    os.close(writer)
    return pid, reader


def _tell(writer: int) -> None:
    os.write(writer, b"!")


def _kill(child: tuple[int, int], after: float) -> None:
    pid, reader = child
    must(os.read(reader, 1) == b"!", "the child is at work")
    os.close(reader)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    must(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the child was at work until it was killed")


def killed(one: Guest, content: Content, rounds: int) -> None:
    """The broker dies at any point; the next one finds the area, what it holds, and what is granted."""
    chance = random.Random(3)
    before = free_mib()

    # While the domain is being made: the next broker needs it, and there is one of it.
    area = new_area()
    _, whole = timed(lambda: area.fill(0, content.pages[:PAGE], content.want[:32]))
    area.destroy()
    for part in (0.2, 0.5, 0.8):
        identity = os.urandom(16)
        _kill(_child(partial(_create_and_wait, identity, content)), part * whole / 1000)
        area = new_area(identity=identity)
        tries = 0
        while True:
            try:
                area.fill(0, content.pages[:PAGE], content.want[:32])
                break
            except HostError:  # xl of the dead broker was still at it: both wanted the name
                tries += 1
                must(tries < 5, "the domain can be made in the end")
                time.sleep(1)
        found = [domain for domain in toolstack.domains() if domain.pool == "probe"]
        must([domain.domid for domain in found] == [area.domid], "there is one domain")
        area.destroy()
    settles(lambda: free_mib() >= before - 1, f"memory comes back: {before} MiB before")

    # While it fills, grants, revokes, closes: a child does all that at random on segments 2 to 5; 0 and 1 are what the
    # store knows.
    identity = os.urandom(16)
    area = new_area(identity=identity)
    area.fill(0, content.pages, content.want)
    area.fill(SLOTS, content.pages, content.want)
    held = list(range(8, 40))
    slots = [(ref * 37) % content.count for ref in held]
    area.grant(one.domid, packed(slots), packed(held))
    one.maps(area, held, [content.sha(slot) for slot in slots], "before it all")
    known = record(area)
    base = area.allocated_bytes() - 16 * MIB
    area.close()
    found_open = found_granted = 0
    for _ in range(rounds):
        work = partial(_work, identity, known, one.domid, content, chance.randrange(1 << 30))
        _kill(_child(work), chance.random() / 2)
        area = new_area(identity=identity)
        left = toolstack.find(identity)
        must(left is not None, "the domain is there")
        why = area.adopt(known)
        must(why is None, f"adopted: {why}")
        found_open += left is not None and left.memory > base + 17 * MIB
        must(area.segments() == (0, 1), "what the store knows")
        must(area.verify(0, content.want + content.want) == b"\1" * 2 * content.count, "all bytes are there")
        # The table may have grown meanwhile; it never shrinks.
        must(16 * MIB <= area.allocated_bytes() <= base + 16 * MIB + MIB, "what the store does not know is given back")
        refs, domids, granted = (numbers(column) for column in area.entries())
        must(set(held) <= set(refs), "grants of before are in force")
        must(set(domids) <= {one.domid}, "and nobody has others")
        must(all(slot < 6 * SLOTS for slot in granted), "every entry is a slot's")
        stray = [ref for ref in refs if ref not in held]
        found_granted += bool(stray)
        must(area.revoke(packed(stray)) == bytes(len(stray)), "what nobody owns is revoked")
        must(area.revoke(packed(held)) == b"\1" * len(held), "what the guest maps is not")
        area.close()
    one.still_reads([content.sha(slot) for slot in slots], "through all of it")
    one.drops()
    must(found_open > 0 and found_granted > 0, "the children were at work when they were killed")
    say(figures={"rounds": rounds, "rounds_with_segments_left": found_open, "rounds_with_grants_left": found_granted})

    # What is not as the store says is not taken over.
    area = new_area(identity=identity)
    must(area.adopt({**known, 2: (known[0][0], BASE_FRAME + 2 * SLOTS)}) == "segments-missing", "a missing segment")
    must(area.adopt({0: (known[0][0] + 1, BASE_FRAME)}) == "area-replaced", "another domain")
    must(new_area().adopt(known) == "area-gone", "another uuid, though the name is right")
    must(area.domid is None, "nothing was taken over")
    must(area.adopt({0: known[0]}) is None and area.segments() == (0,), "a segment that the store closed")
    settles(lambda: area.allocated_bytes() < base + 9 * MIB, "is given back")
    refused(HostError, lambda: new_area().fill(0, content.pages[:PAGE], content.want[:32]), "a name that is taken")
    must(area.alive(), "and the domain that has it lives")
    area.destroy()
    must(toolstack.find(identity) is None, "destroyed")
    settles(lambda: free_mib() >= before - 1, f"memory comes back: {before} MiB before")


def _create_and_wait(identity: bytes, content: Content, at_work: Callable[[], None]) -> None:
    at_work()
    new_area(identity=identity).fill(0, content.pages[:PAGE], content.want[:32])
    time.sleep(60)


def _work(
    identity: bytes,
    known: dict[int, tuple[int, int]],
    domid: int,
    content: Content,
    seed: int,
    at_work: Callable[[], None],
) -> None:
    chance = random.Random(seed)
    area = new_area(identity=identity)
    why = area.adopt(known)
    if why is not None:
        raise RuntimeError(f"the child cannot adopt: {why}")
    refs = packed(range(1000, 1000 + content.count))
    slots = packed([chance.randrange(6 * SLOTS) for _ in range(content.count)])
    at_work()
    while True:
        match chance.randrange(4):
            case 0 | 1:
                area.fill(chance.randrange(2, 6) * SLOTS, content.pages, content.want)
            case 2:
                area.close_segment(chance.randrange(2, 6))
            case 3:
                area.revoke(refs)
                area.grant(domid, slots, refs)


def _sharearea(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from sharearea.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def destroyed(one: Guest, two: Guest, content: Content) -> None:
    """The area domain is destroyed under the guests, by the command line; who maps keeps what he maps."""
    before = free_mib()
    area = new_area()
    area.fill(0, content.pages, content.want)
    refs = [8, 9, 10, 11]
    area.grant(one.domid, packed([5, 6, 7, 8]), packed(refs))
    area.grant(two.domid, packed([5, 6, 7, 8]), packed([20, 21, 22, 23]))
    want = [content.sha(slot) for slot in (5, 6, 7, 8)]
    one.maps(area, refs, want, "before")
    listed = json.loads(_sharearea("area", "list", "--json").stdout)
    must(len(listed) == 1, f"one area is listed: {listed}")
    shown = [listed[0][field] for field in ("pool", "domid", "granted", "mapped")]
    must(shown == ["probe", area.domid, 8, 4], f"as it is: {listed}")
    must("probe" in _sharearea("area", "list").stdout, "the table has it too")
    done = _sharearea("area", "destroy", "probe")
    must(done.returncode == 4 and "4 pages" in done.stderr, f"refused while mapped: {done}")
    must(area.alive(), "and nothing happened")
    must(_sharearea("area", "destroy", "another").returncode == 2, "no such area")
    done = _sharearea("area", "destroy", listed[0]["uuid"], "--force")
    must(done.returncode == 0 and "4 grants" in done.stdout, f"destroyed, and said what it means: {done}")
    must(not area.alive(), "the broker can tell")
    error = refused(HostError, lambda: area.fill(9, content.pages[:PAGE], content.want[:32]), "filling")
    must("gone" in str(error), f"with the reason: {error}")
    refused(HostError, lambda: area.fill(SLOTS, content.pages[:PAGE], content.want[:32]), "growing")
    must(area.verify(0, content.want[:64]) == b"\0\0", "no bytes are there")
    must(area.revoke(packed(refs)) == b"\1" * 4, "what is mapped is in use")
    area.close_segment(0)
    one.still_reads(want, "after the area's end")
    two.cannot_map(area, [20], "a page of an area that is gone")
    # A new area of the same pool, while the old one's husk is there.
    other = new_area()
    other.fill(0, content.pages, content.want)
    other.grant(two.domid, packed([5]), packed([8]))
    two.maps(other, [8], want[:1], "of the new area")
    must(other.domid != area.domid, "another domain")
    area.close()
    one.still_reads(want, "still")
    one.drops()
    settles(lambda: all(not domain.dying for domain in toolstack.domains()), "the husk goes when the last lets go")
    two.drops()
    done = _sharearea("area", "destroy", "probe")
    must(done.returncode == 0, f"nobody maps it: {done}")
    other.close()
    settles(lambda: free_mib() >= before - 1, f"memory comes back: {before} MiB before")


def main() -> int:
    """Run all steps."""
    one, two = (Guest(which, int(word)) for which, word in enumerate(sys.argv[1:3]))
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    content = Content(1, SLOTS)
    left = [domain for domain in toolstack.areas() if domain.pool in ("probe", "small")]
    must(not left, f"areas of an earlier run are there: {left}")
    for name, step in (
        ("sharing", lambda: sharing(one, two, content)),
        ("limits", lambda: limits(one, content)),
        ("killed", lambda: killed(one, content, rounds)),
        ("destroyed", lambda: destroyed(one, two, content)),
    ):
        _, spent = timed(step)
        say(done=name, seconds=round(spent / 1000, 1))
    must(not toolstack.areas(), "no area is left")
    return PASSED


if __name__ == "__main__":
    try:
        code = main()
    except (ShareareaError, RuntimeError, OSError) as failure:
        import traceback

        traceback.print_exc()
        say(failed=str(failure))
        code = 1
    sys.exit(code)

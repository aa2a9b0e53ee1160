"""The client of xenstore against a small server that misbehaves when asked to; the real one is in the lab."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharearea.common.errors import Closed, HostError
from sharearea.common.xenstore import PAYLOAD_MAX, XenStore, XenStoreError, XenStoreLost, XenStoreTimeout
from tests.xenstored import ERROR, HEADER, WATCH_EVENT, FakeXenstored


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeXenstored]:
    with FakeXenstored(tmp_path / "socket") as server:
        yield server


@pytest.fixture
def store(server: FakeXenstored) -> Iterator[XenStore]:
    with XenStore(server.path, timeout=20) as store:
        yield store


def events_of(store: XenStore, count: int) -> list[tuple[str, str]]:
    """Wait for a number of events."""
    events: list[tuple[str, str]] = []
    end = time.monotonic() + 20
    while len(events) < count and time.monotonic() < end:
        if not store.has_events:
            select.select([store], [], [], 0.1)
        events += store.events()
    return events


# -------------------------------------------------------------------------------------------------------- values


def test_values_are_written_read_listed_and_removed(store: XenStore) -> None:
    assert store.read("/a/b") is None
    assert store.list("/a/b") == ()
    store.write("/a/b/c", "1")
    store.write("/a/b/d", "")
    store.write("/a/b/e", "x" * 2000)
    assert store.read("/a/b/c") == "1"
    assert store.read("/a/b/d") == ""
    assert store.read("/a/b") == ""
    assert store.read("/a/b/e") == "x" * 2000
    assert sorted(store.list("/a/b")) == ["c", "d", "e"]
    store.write("/a/b/c", "z\u00e4h")
    assert store.read("/a/b/c") == "z\u00e4h"
    store.remove("/a/b")
    store.remove("/a/b")
    assert store.read("/a/b/c") is None
    store.set_permissions("/a", "n0", "r5")


def test_what_does_not_fit_is_not_sent(store: XenStore) -> None:
    with pytest.raises(ValueError, match="xenstore takes 4096"):
        store.write("/a", "x" * PAYLOAD_MAX)
    with pytest.raises(ValueError, match="NUL"):
        store.read("/a\0b")
    with pytest.raises(XenStoreError) as raised:
        store.write("/a b", "1")
    assert raised.value.code == "EINVAL"
    assert store.read("/nothing") is None


def test_watches_report_at_once_and_at_changes(store: XenStore) -> None:
    store.watch("/w", "one")
    assert events_of(store, 1) == [("/w", "one")]
    store.write("/w/x", "1")
    store.write("/w/x", "2")
    store.write("/elsewhere", "1")
    seen = events_of(store, 1)
    assert ("/w/x", "one") in seen
    store.unwatch("/w", "one")
    store.unwatch("/w", "one")
    store.write("/w/x", "3")
    assert store.read("/w/x") == "3"
    assert store.events() == []
    assert not store.has_events


def test_permissions_go_out_as_they_are(server: FakeXenstored, store: XenStore) -> None:
    store.write("data/x", "1")
    store.set_permissions("data/x", "n7", "r0")
    assert server.permissions["/local/domain/0/data/x"] == ["n7", "r0"]


def test_a_refusal_says_why(server: FakeXenstored, store: XenStore) -> None:
    server.refuse["/secret"] = "EACCES"
    server.refuse["/odd"] = "EWHATEVER"
    for path, code in (("/secret", "EACCES"), ("/odd", "EWHATEVER")):
        for ask in (store.read, store.list, store.remove):
            with pytest.raises(XenStoreError) as raised:
                ask(path)
            assert raised.value.code == code
    with pytest.raises(XenStoreError):
        store.watch("/secret", "s")
    store.watch("/open", "s")  # the token is free


def test_domains_are_there_or_not(server: FakeXenstored, store: XenStore) -> None:
    server.domains = {3}
    assert store.is_introduced(3)
    assert not store.is_introduced(4)


# ---------------------------------------------------------------------------------------------------------- wire


def test_answers_in_pieces_and_events_between_them(server: FakeXenstored, store: XenStore) -> None:
    server.bytewise = True
    store.watch("/w", "t")
    for number in range(20):
        server.set(f"/w/{number}", "1")
        assert store.read(f"/w/{number}") == "1"
    assert sorted(store.events()) == sorted([("/w", "t"), *((f"/w/{number}", "t") for number in range(20))])


def test_a_flood_of_events_takes_bounded_room_and_is_not_forgotten(server: FakeXenstored, store: XenStore) -> None:
    store.watch("/w", "t")
    assert events_of(store, 1) == [("/w", "t")]
    payload = [f"/w/{number % 5000}\0t\0".encode() for number in range(20_000)]
    flood = b"".join(HEADER.pack(WATCH_EVENT, 0, 0, len(event)) + event for event in payload)
    flooding = threading.Thread(target=server.raw, args=[flood])
    flooding.start()
    while flooding.is_alive():
        assert store.read("/nothing") is None
    assert store.read("/nothing") is None
    events = store.events()
    assert len(events) <= 65
    assert ("/w", "t") in events


def test_events_nobody_asked_for_and_broken_ones_are_dropped(server: FakeXenstored, store: XenStore) -> None:
    assert store.read("/x") is None
    for payload in (b"", b"no end", b"/x\0unknown\0", b"\xff\xff\0\xfe\0"):
        server.raw(HEADER.pack(WATCH_EVENT, 0, 0, len(payload)) + payload)
    assert store.read("/x") is None
    assert store.events() == []


def test_a_xenstored_that_does_not_answer_costs_its_time_once(server: FakeXenstored) -> None:
    with XenStore(server.path, timeout=0.3) as store:
        server.set("/x", "1")
        server.silent = True
        begun = time.monotonic()
        with pytest.raises(XenStoreTimeout) as raised:
            store.read("/x")
        assert 0.25 < time.monotonic() - begun < 10
        assert isinstance(raised.value, HostError)
        begun = time.monotonic()
        for _ in range(20):
            with pytest.raises(XenStoreTimeout):
                store.write("/y", "1")
        assert time.monotonic() - begun < 0.25
        # It comes back: the late answer is nobody's, and requests are answered again.
        server.speak()
        end = time.monotonic() + 20
        while True:
            try:
                value = store.read("/x")
                break
            except XenStoreTimeout:
                assert time.monotonic() < end
        assert value == "1"
        assert store.read("/y") is None


def test_the_end_of_xenstored(server: FakeXenstored, store: XenStore) -> None:
    store.watch("/w", "t")
    server.hang_up()
    with pytest.raises(XenStoreLost):
        store.read("/x")
    with pytest.raises(XenStoreLost):
        store.write("/x", "1")
    assert store.events() == [("/w", "t")]
    with pytest.raises(XenStoreLost):
        store.events()


def test_an_answer_that_is_too_long_ends_it(server: FakeXenstored, store: XenStore) -> None:
    assert store.read("/x") is None
    server.raw(HEADER.pack(ERROR, 1, 0, PAYLOAD_MAX + 1))
    select.select([store], [], [], 20)
    with pytest.raises(XenStoreLost, match="a packet of 4097 bytes"):
        store.events()
    with pytest.raises(XenStoreLost, match="a packet of 4097 bytes"):
        store.read("/x")


def test_no_xenstored(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no xenstored at"):
        XenStore(tmp_path / "socket")
    with FakeXenstored(tmp_path / "socket") as server:
        store = XenStore(server.path)
        store.close()
        store.close()
        with pytest.raises(Closed):
            store.read("/x")
        with pytest.raises(Closed):
            store.fileno()


def test_a_device_that_hangs_in_a_watch(tmp_path: Path) -> None:
    # The kernel's device makes write() wait for xenstored. A named pipe that is full does the same.
    path = tmp_path / "xenbus"
    os.mkfifo(path)
    with XenStore(path, timeout=0.3) as store:
        os.set_blocking(store.fileno(), False)
        try:
            while True:
                os.write(store.fileno(), bytes(4096))
        except BlockingIOError:
            os.set_blocking(store.fileno(), True)
        begun = time.monotonic()
        with pytest.raises(XenStoreTimeout):
            store.watch("domid", "d")
        assert time.monotonic() - begun < 10
        with pytest.raises(XenStoreLost):
            store.read("domid")
        os.set_blocking(store.fileno(), False)
        end = time.monotonic() + 20
        while any(thread.name == "xenstore-watch" for thread in threading.enumerate()):
            try:
                os.read(store.fileno(), 1 << 16)
            except BlockingIOError:
                time.sleep(0.01)
            assert time.monotonic() < end

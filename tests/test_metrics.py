"""The metrics server by itself: what it says, to whom, and how little a bad scraper costs."""

from __future__ import annotations

import http.client
import select
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sharearea import metrics
from sharearea.common.errors import HostError
from sharearea.common.events import EVENTS, FIELDS
from sharearea.metrics import CONNECTIONS, Figures, MetricsServer, metric_name

NUMBERS = {"integer": 3, "number": 0.5}


def snapshot(event: str, **more: Any) -> dict[str, Any]:
    """Figures with every number of an event."""
    kind = EVENTS[event]
    numbers = {
        name: NUMBERS[FIELDS[name].type] for name in (*kind.fields, *kind.options) if FIELDS[name].type in NUMBERS
    }
    return numbers | more


FIGURES = Figures(
    [snapshot("pool.statistics", pool='p"\\', mode="share", paused=None)],
    [snapshot("domain.statistics", pool="p", domain="d", ignored={"too-small": {"files": 2, "bytes": 8192}})],
    snapshot("host.statistics", backend="local"),
)


class Loop:
    """A broker's loop that does nothing but answer scrapes, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.server = MetricsServer("127.0.0.1:0", self.figures)
        self.stopping = threading.Event()
        self.hanging = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def figures(self) -> Figures:
        self.asked += 1
        return FIGURES

    def run(self) -> None:
        while not self.stopping.is_set():
            if select.select([self.server], [], [], 0.02)[0] and not self.hanging.is_set():
                self.server.ready()

    def get(self, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, answer.headers["Content-Type"], body

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=30)

    def close(self) -> None:
        self.stopping.set()
        self.thread.join()
        self.server.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_every_number_of_the_statistics_is_a_metric(loop: Loop) -> None:
    status, kind, text = loop.get()
    assert status == 200
    assert kind.startswith("text/plain; version=")
    said = {sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples}
    for event in ("pool.statistics", "domain.statistics", "host.statistics"):
        for field in (*EVENTS[event].fields, *EVENTS[event].options):
            name = metric_name(event, FIELDS[field])
            if name is not None:
                assert said[name.name].value == pytest.approx(NUMBERS[FIELDS[field].type] * name.factor), field
    assert said["sharearea_pool_saved_bytes"].labels == {"pool": 'p"\\'}
    assert said["sharearea_domain_ignored_bytes"].value == 8192
    assert said["sharearea_host_cpu_seconds_total"].value == pytest.approx(3e-9)
    held = [s for f in text_string_to_metric_families(text) for s in f.samples if s.name == "sharearea_pool_slots_held"]
    assert {sample.labels["domains"] for sample in held} == {
        "0",
        "1",
        "2",
        "3",
        "4 to 7",
        "8 to 15",
        "16 to 31",
        "32 or more",
    }


def test_figures_are_handed_out_again_for_a_while(loop: Loop) -> None:
    assert [loop.get()[0] for _ in range(5)] == [200] * 5
    assert loop.asked == 1


def test_there_is_nothing_else(loop: Loop) -> None:
    assert loop.get("/")[0] == 404
    assert loop.get("/metrics/../etc/passwd")[0] == 404
    assert loop.get("/metrics?name=x")[0] == 200
    assert loop.get(method="POST")[0] == 501


def test_a_scraper_that_says_nothing_costs_the_others_nothing(loop: Loop) -> None:
    silent = [loop.connect() for _ in range(CONNECTIONS - 1)]
    assert loop.get()[0] == 200
    silent.append(loop.connect())
    surplus = loop.connect()
    surplus.settimeout(5)  # sooner than silence ends a connection
    assert surplus.recv(1) == b""  # hung up on: there are enough
    surplus.close()
    for each in silent:
        each.close()


def test_a_scraper_that_drips_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DEADLINE_S", 1.0)
    loop = Loop()
    try:
        slow = loop.connect()
        sent = 0
        while not select.select([slow], [], [], 0.1)[0]:
            slow.sendall(b"G")  # a byte now and then never runs into a time-out of its own
            sent += 1
            assert sent < 300
        assert slow.recv(1) == b""
        slow.close()
        assert loop.get()[0] == 200
    finally:
        loop.close()


def test_a_loop_that_hangs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LOOP_S", 0.1)
    loop = Loop()
    try:
        loop.hanging.set()
        assert loop.get()[0] == 503
        loop.hanging.clear()
    finally:
        loop.close()


def test_closing_ends_who_waits() -> None:
    loop = Loop()
    loop.hanging.set()
    sock = loop.connect()
    sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    loop.close()
    while sock.recv(4096):
        pass
    sock.close()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(HostError) as error:
        MetricsServer(f"127.0.0.1:{taken.getsockname()[1]}", lambda: FIGURES)
    assert "cannot serve metrics" in error.value.message
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(HostError, match="not installed") as error:
        MetricsServer("127.0.0.1:0", lambda: FIGURES)
    assert "python3-prometheus-client" in error.value.hint

"""The broker's figures for Prometheus: /metrics over HTTP, on an address of the operator's choice.

Threads of its own answer; they never touch the broker's state. For an answer one of them asks the broker's loop for the
figures, through a socket that the loop's selector watches; the loop hands them over as plain data (`ready`), and only
if the last ones have become old. Slow and hanging scrapers cost a few connections and nothing else.

Which figures there are, and what they say, is the catalogue's (common/events.py): every number of the statistics
events, with names as Prometheus wants them. prometheus-client writes the format.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from .common import __version__
from .common.errors import HostError
from .common.events import EVENTS, FIELDS, Field
from .common.toml_schema import split_address

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

FRESH_S: Final = 5.0  # figures are handed out again for as long
CONNECTIONS: Final = 8  # at a time; who comes then is hung up on
DEADLINE_S: Final = 10.0  # for one connection, from its first byte to its last
_LOOP_S: Final = 5.0  # until the loop must have answered

# Fields that name something, and numbers that are said by others.
_LEFT_OUT: Final = frozenset({"uid", "domid", "ignored_files", "ignored_bytes", "pools", "grace_left_ms", "barred_ms"})
# Fields that are one metric with a label.
_LABELLED: Final = (
    (re.compile(r"slots_held_by_(.+)"), "slots_held", "domains", "Slots, by how many domains hold their page."),
    (re.compile(r"slots_mapped_(.+)_times"), "slots_mapped", "times", "Slots, by how often they are mapped."),
    (re.compile(r"reported_(.+)_bytes"), "reported_bytes", "class", "Reported file pages, by page class."),
    (re.compile(r"mapped_(.+)_bytes"), "mapped_bytes", "class", "Granted pages, by page class."),
)
_PREFIXES: Final = {"pool.statistics": "pool", "domain.statistics": "domain", "host.statistics": "host"}


@dataclass(frozen=True, slots=True)
class Figures:
    """What the statistics say: the snapshots of stats.py."""

    pools: Sequence[Mapping[str, Any]]
    domains: Sequence[Mapping[str, Any]]
    host: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Name:
    """A metric that a field becomes: name, whether it only grows, a label and its value, a factor, what it says."""

    name: str
    counter: bool
    label: str
    value: str
    factor: float
    text: str


def metric_name(event: str, known: Field) -> Name | None:
    """Return the metric that a field of an event becomes; None for one that is none."""
    if known.type not in ("integer", "number") or known.name in _LEFT_OUT:
        return None
    prefix = f"sharearea_{_PREFIXES[event]}_"
    for pattern, name, label, text in _LABELLED:
        found = pattern.fullmatch(known.name)
        if found is not None:
            return Name(prefix + name, False, label, found[1].replace("_", " "), 1.0, text)
    name, factor = known.name.removesuffix("_total"), 1.0
    for suffix, unit, by in (
        ("_ns", "_seconds", 1e-9),
        ("_ms", "_seconds", 1e-3),
        ("pressure", "pressure_ratio", 1e-4),
    ):
        if name.endswith(suffix):
            name, factor = name.removesuffix(suffix) + unit, by
    counter = known.name.endswith("_total")
    return Name(prefix + name + ("_total" if counter else ""), counter, "", "", factor, known.text)


@dataclass(slots=True)
class _Family:
    name: Name
    labels: tuple[str, ...]
    samples: list[tuple[list[str], float]] = field(default_factory=list)


def families(figures: Figures) -> list[Metric]:
    """Return the figures as prometheus-client has them."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    found: dict[str, _Family] = {}
    _collect(found, "pool.statistics", ("pool",), figures.pools)
    _collect(found, "domain.statistics", ("pool", "domain"), figures.domains)
    _collect(found, "host.statistics", (), [figures.host])
    metrics: list[Metric] = []
    for each in found.values():
        kind = CounterMetricFamily if each.name.counter else GaugeMetricFamily
        metric = kind(each.name.name, each.name.text, labels=each.labels)
        for labels, value in each.samples:
            metric.add_metric(labels, value)
        metrics.append(metric)
    for suffix, text in (
        ("files", "Reported files that were not taken"),
        ("bytes", "Sizes of files that were not taken"),
    ):
        ignored = GaugeMetricFamily(
            f"sharearea_domain_ignored_{suffix}", f"{text}, by reason.", labels=("pool", "domain", "reason")
        )
        for domain in figures.domains:
            for reason, counts in domain.get("ignored", {}).items():
                ignored.add_metric([domain["pool"], domain["domain"], reason], counts[suffix])
        metrics.append(ignored)
    paused = GaugeMetricFamily(
        "sharearea_pool_paused", "1 while nothing is published, and why.", labels=("pool", "reason")
    )
    about = InfoMetricFamily("sharearea_pool", "What a pool is for.", labels=("pool",))
    for pool in figures.pools:
        about.add_metric([pool["pool"]], {"mode": pool["mode"]})
        if pool["paused"]:
            paused.add_metric([pool["pool"], pool["paused"]], 1)
    info = InfoMetricFamily("sharearea_broker", "The broker.")
    info.add_metric([], {"version": __version__, "backend": figures.host["backend"]})
    return [*metrics, paused, about, info]


def _collect(
    found: dict[str, _Family], event: str, labels: tuple[str, ...], snapshots: Iterable[Mapping[str, Any]]
) -> None:
    kind = EVENTS[event]
    names = [(known, metric_name(event, FIELDS[known])) for known in (*kind.fields, *kind.options)]
    for snapshot in snapshots:
        values = [snapshot[label] for label in labels]
        for known, name in names:
            value = snapshot.get(known)
            if name is None or value is None:
                continue
            family = found.get(name.name)
            if family is None:
                more = (name.label,) if name.label else ()
                family = found[name.name] = _Family(name, labels + more)
            own = [name.value] if name.label else []
            family.samples.append((values + own, value * name.factor))


class _Collector:
    """What prometheus-client asks for metrics."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        return families(self._figures)


class MetricsServer:
    """Serves /metrics. Made, asked and closed on the broker's loop; `fileno` and `ready` are for its selector.

    `address` as config.metrics_listen. Raises HostError if prometheus-client is missing or the address cannot be had.
    """

    def __init__(self, address: str, figures: Callable[[], Figures]) -> None:
        try:
            import prometheus_client
        except ImportError:
            raise HostError(
                "metrics_listen needs prometheus-client, which is not installed",
                "install python3-prometheus-client (Debian) or sharearea[metrics] (pip), or leave metrics_listen out",
            ) from None
        self._client: Any = prometheus_client
        self._figures = figures
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._changed = threading.Condition()
        self._last: tuple[float, Figures] | None = None
        self._closing = False
        try:
            self._http = _Server(split_address(address), self)
        except OSError as error:
            self._ours.close()
            self._theirs.close()
            raise HostError(
                f"cannot serve metrics on {address}: {error.strerror}", "choose another broker.metrics_listen"
            ) from None
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.5,), name="sharearea-metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return int(self._http.server_address[1])

    # ------------------------------------------------------------------------------------------------- on the loop

    def fileno(self) -> int:
        """Return the descriptor that is readable when somebody waits for figures."""
        return self._ours.fileno()

    def ready(self) -> None:
        """Hand figures over."""
        with contextlib.suppress(BlockingIOError):
            self._ours.recv(4096)
        figures = self._figures()
        with self._changed:
            self._last = (time.monotonic(), figures)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop serving; connections that are open are cut. Twice is fine."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._ours.close()
        self._theirs.close()

    # ------------------------------------------------------------------------------------------------- on a thread

    def text(self) -> tuple[bytes, str] | None:
        """Return /metrics and its content type; None if the broker's loop does not answer in time."""
        figures = self._ask()
        if figures is None:
            return None
        registry = self._client.CollectorRegistry(auto_describe=False)
        registry.register(_Collector(figures))
        return self._client.generate_latest(registry), str(self._client.CONTENT_TYPE_LATEST)

    def _ask(self) -> Figures | None:
        def fresh() -> Figures | None:
            if self._last is not None and time.monotonic() - self._last[0] < FRESH_S:
                return self._last[1]
            return None

        with self._changed:
            if fresh() is None:
                with contextlib.suppress(OSError):  # the loop is told already, or no more
                    self._theirs.send(b"\0")
                self._changed.wait_for(lambda: fresh() is not None or self._closing, _LOOP_S)
            return fresh()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS

    def __init__(self, address: tuple[str, int], metrics: MetricsServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.metrics = metrics
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the resolver for our name.
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        del client_address
        with self._lock:
            if len(self._open) >= CONNECTIONS:
                return False
            self._open[request] = time.monotonic() + DEADLINE_S
        return True

    def service_actions(self) -> None:
        """Cut off who is too slow: called twice a second."""
        now = time.monotonic()
        with self._lock:
            for request, until in self._open.items():
                if now >= until:
                    with contextlib.suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request in self._open:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: who hung up does not want an answer, and stderr is the log's."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = DEADLINE_S
    server_version = "sharearea"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._say(404, b"there is /metrics here, and nothing else\n", "text/plain; charset=utf-8")
            return
        answer = self.server.metrics.text()
        if answer is None:
            self._say(503, b"the broker is busy: try again\n", "text/plain; charset=utf-8")
        else:
            self._say(200, *answer)

    def _say(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: a scrape is no event."""

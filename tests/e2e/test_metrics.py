"""The broker's metrics as Prometheus sees them: promtool reads them, and a real Prometheus scrapes them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from .harness import MIB, PAGE, Host, Process, noise, wait

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "prometheus" / "usr" / "bin"


def program(name: str) -> Path:
    """Find one of Debian's programs, unpacking them if need be."""
    subprocess.run([ROOT / "tools" / "prometheus.sh"], check=True)
    found = shutil.which(name, path=f"{FOLDER}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"no {name}, and no apt-get to get it with")
    return Path(found)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def get(url: str) -> str:
    """Fetch a page."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def values(port: int, query: str) -> list[float]:
    """Ask Prometheus."""
    answer: dict[str, Any] = json.loads(get(f"http://127.0.0.1:{port}/api/v1/query?query={quote(query)}"))
    return [float(each["value"][1]) for each in answer["data"]["result"]]


def ready(port: int) -> bool:
    """Say whether Prometheus serves."""
    try:
        return "Ready" in get(f"http://127.0.0.1:{port}/-/ready")
    except OSError:
        return False


def test_prometheus_reads_what_the_broker_says(host: Host) -> None:
    promtool, prometheus = program("promtool"), program("prometheus")
    port, own = free_port(), free_port()
    host.configure(broker={"metrics_listen": f"127.0.0.1:{port}"})
    host.start_broker()
    data = noise(MIB, 1)
    domains = host.add_domains(2, {"f.bin": data})
    host.wait_offered(1)
    programs = [domain.program() for domain in domains]
    for each, domain in zip(programs, domains, strict=True):
        each.open(domain.root / "f.bin")
        each.wait_shared(MIB // PAGE)

    text = get(f"http://127.0.0.1:{port}/metrics")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    config = host.folder / "prometheus.yml"
    job = {
        "job_name": "sharearea",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{port}"]}],
    }
    config.write_text(json.dumps({"scrape_configs": [job]}))  # JSON is YAML
    command = [
        prometheus,
        f"--config.file={config}",
        f"--storage.tsdb.path={host.folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{own}",
    ]
    server = Process("prometheus", [str(word) for word in command], host.folder / "prometheus.out")
    try:
        wait("Prometheus", ready, own)
        wait("a scrape", lambda: values(own, 'up{job="sharearea"}') == [1.0])
        pages = float(2 * MIB // PAGE)
        wait("mappings", lambda: values(own, 'sharearea_pool_pages_sharing{pool="p"}') == [pages])
        assert values(own, "sharearea_host_domains") == [2.0]
        assert values(own, "sum(sharearea_domain_owned_pages)") == [pages]
        assert values(own, 'sharearea_pool_slots_mapped{times="2"}') == [pages / 2]
        assert values(own, 'sharearea_pool_mapped_bytes{class="data"}') == [2.0 * MIB]
        assert values(own, "sharearea_pool_possible_saved_bytes") == [1.0 * MIB]
    finally:
        server.kill()
    for each in programs:
        assert each.ask("state")["f"]["pages"] == MIB // PAGE

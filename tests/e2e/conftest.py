"""Gives a test its host, and shows the logs of all of its processes when the test fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from .harness import Host


@pytest.fixture
def host(disk_path: Path) -> Iterator[Host]:
    """Give a host whose processes end with the test."""
    host = Host(disk_path)
    try:
        yield host
    finally:
        host.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Put the logs into the report of a test that failed."""
    report: pytest.TestReport = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.failed and isinstance(host, Host) and host.folder.exists():
        report.sections.append(("logs of the processes", host.logs()))
    return report

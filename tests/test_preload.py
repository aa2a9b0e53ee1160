"""What starts a program with the shim, and the agent that serves none: the rest is in tests/e2e/test_unchanged.py."""

from __future__ import annotations

import os
import select
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharearea_agent.common.errors import HostError
from sharearea_agent.common.link import StreamLink
from sharearea_agent.common.wire import Message
from sharearea_agent.consumer_wire import AGENT_TO_CONSUMER, CONSUMER_TO_AGENT, Open, Plain, Unchanged
from sharearea_agent.consumers import ConsumerHub
from sharearea_agent.mapper import XenMapper
from sharearea_agent.preload import LIBRARY, environment


def test_other_preloaded_libraries_stay_behind_the_shim_which_is_there_once() -> None:
    shim = Path("/opt/here") / LIBRARY
    before = {"LD_PRELOAD": f"/opt/old/{LIBRARY} libjemalloc.so:/opt/x.so", "HOME": "/root"}
    assert environment(before, shim, "/run/a.sock") == {
        "LD_PRELOAD": f"/opt/here/{LIBRARY}:libjemalloc.so:/opt/x.so",
        "HOME": "/root",
        "SHAREAREA_AGENT_SOCKET": "/run/a.sock",
    }
    assert before["HOME"] == "/root"
    assert environment({}, shim, "/s")["LD_PRELOAD"] == os.fspath(shim)


@pytest.mark.parametrize("folder", ["/opt/two words", "/opt/a:b"])
def test_a_path_that_the_loader_would_cut_is_refused(folder: str) -> None:
    with pytest.raises(HostError, match="a colon or a space"):
        environment({}, Path(folder) / LIBRARY, "/run/a.sock")


def test_on_xen_the_shim_gets_nothing_and_the_log_says_so_once(tmp_path: Path) -> None:
    lines: list[tuple[str, dict[str, Any]]] = []
    events: list[object] = []
    selector = selectors.DefaultSelector()
    hub = ConsumerHub(
        tmp_path / "s",
        selector,
        XenMapper("pv"),
        events.append,
        lambda name, **fields: lines.append((name, fields)),
        serve_unchanged=False,
    )
    data = tmp_path / "f"
    data.write_bytes(bytes(4096))
    fd = os.open(data, os.O_RDONLY)
    try:
        for _ in range(3):
            assert _ask(selector, tmp_path / "s", Open(1, 4096), fd) == Plain(1, "no-shim")
        assert [(name, fields["reason"]) for name, fields in lines] == [("mappings.limited", "no-shim")]
        assert not any(type(event).__name__ == "Opened" for event in events)
    finally:
        os.close(fd)
        hub.close()
        selector.close()


def _ask(selector: selectors.BaseSelector, path: Path, message: Message, fd: int) -> Message:
    """Connect as a shim does, send a message with a descriptor, and return the answer."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.fspath(path))
    link = StreamLink(sock, incoming=AGENT_TO_CONSUMER, outgoing=CONSUMER_TO_AGENT, max_queue_bytes=1 << 20)
    try:
        link.send(Unchanged())
        link.send(message, fd)
        link.flush()
        while not select.select([link], [], [], 0)[0]:
            for key, mask in selector.select(10):
                ready: Callable[[int], None] = key.data
                ready(mask)
        [(answer, _)] = link.receive()
        return answer
    finally:
        link.close()

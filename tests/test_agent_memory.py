"""When the agent tells the broker of the guest's memory: in intervals, and at once when there is less of it."""

from __future__ import annotations

import itertools

import pytest

from sharearea import reclaim
from sharearea_agent.agent import PRESSURE_MARKS, Agent, FromBroker, LinkUp, Memory, Send, Settings, Tick
from sharearea_agent.common import wire

MIB = 1 << 20
WELCOME = wire.Welcome(wire.PROTOCOL_VERSION, "a", "p", bytes(16), bytes(16), bytes(32), 8, 1, 1 << 20, 10, ("**",), ())


class Guest:
    """An agent that is connected, and a clock."""

    def __init__(self) -> None:
        self.agent = Agent(Settings("a", "0", b"i" * 16), lambda: 0.5)
        self.now = 100.0
        self.agent.handle(LinkUp(), self.now)
        self.agent.handle(FromBroker(WELCOME), self.now)

    def tick(self, available: int, pressure: int = 0, seconds: float = 1.0) -> wire.AgentStats | None:
        """Let time pass; return what the agent told of it."""
        self.now += seconds
        memory = Memory(7 * MIB, 512 * MIB, available, pressure)
        actions = self.agent.handle(Tick(memory), self.now)
        told = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, wire.AgentStats)]
        assert len(told) <= 1
        return told[0] if told else None

    def ticks(self, count: int, available: int) -> list[float]:
        """Return when, from now on, the agent told of a memory that stays as it is."""
        begin = self.now
        return [self.now - begin for _ in range(count) if self.tick(available)]


@pytest.fixture
def guest() -> Guest:
    made = Guest()
    made.ticks(15, 300 * MIB)
    return made


def test_memory_is_told_in_intervals(guest: Guest) -> None:
    times = guest.ticks(40, 300 * MIB)
    assert len(times) == 4
    assert {b - a for a, b in itertools.pairwise(times)} == {10.0}


def test_much_less_memory_is_told_at_once(guest: Guest) -> None:
    assert guest.tick(285 * MIB) is None
    told = guest.tick(283 * MIB)
    assert told is not None
    assert (told.total_bytes, told.available_bytes, told.private_bytes) == (512 * MIB, 283 * MIB, 7 * MIB)
    assert guest.tick(283 * MIB) is None, "once is enough"
    for step in range(1, 6):
        assert guest.tick((283 - 17 * step) * MIB) is not None
    assert guest.tick(400 * MIB) is None, "more memory can wait"


@pytest.mark.parametrize("mark", PRESSURE_MARKS)
def test_pressure_is_told_at_once(guest: Guest, mark: int) -> None:
    assert guest.tick(300 * MIB, mark - 1) is None or mark > 100
    told = guest.tick(300 * MIB, mark)
    assert told is not None
    assert told.pressure == mark
    assert guest.tick(300 * MIB, mark + 1) is None


def test_the_marks_are_where_the_broker_begins_to_act() -> None:
    settings = reclaim.Settings()
    assert (settings.pressure_low, settings.pressure_high, 2 * settings.pressure_high) == PRESSURE_MARKS

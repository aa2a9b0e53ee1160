"""The formats of both links: goldens, what must be refused, what a broken or hostile frame can do.

tests/wire/golden has one frame for each example below, in hex; it changes only together with PROTOCOL_VERSION.
tests/wire/should-fail has one file for each way to be wrong: `link`, the beginning of the `error`, whether `bytes`
are the payload of one frame or a stream of frames, and after an empty line these bytes in hex (61*300: 300 times 61).
docs/protocol.md is compared with the classes. What messages mean is tested with the engine and the agent.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import struct
import tracemalloc
from array import array
from pathlib import Path
from typing import Any, cast

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharearea.common import wire
from sharearea.common.errors import ProtocolError
from sharearea.common.wire import AGENT_TO_BROKER, BROKER_TO_AGENT, Codec, FrameReader, Kind, Message
from sharearea_agent import consumer_wire as cw
from sharearea_agent.common import wire as agent_wire
from sharearea_agent.common.errors import ProtocolError as AgentProtocolError
from sharearea_agent.consumer_wire import AGENT_TO_CONSUMER, CONSUMER_TO_AGENT

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "wire" / "golden"
SHOULD_FAIL = ROOT / "tests" / "wire" / "should-fail"

# The consumer's link is the agent's code, whose common half is the same text loaded a second time.
REFUSALS = (ProtocolError, AgentProtocolError)
LINKS: dict[str, Codec] = {
    "agent-to-broker": AGENT_TO_BROKER,
    "broker-to-agent": BROKER_TO_AGENT,
    "consumer-to-agent": cast(Codec, CONSUMER_TO_AGENT),
    "agent-to-consumer": cast(Codec, AGENT_TO_CONSUMER),
}


def u32s(*values: int) -> bytes:
    return array("I", values).tobytes()


ID = bytes(range(16))
KEY = bytes(range(100, 132))
FPS = bytes(range(64))

EXAMPLES: dict[str, dict[str, Any]] = {
    "agent-to-broker": {
        "Hello": wire.Hello(2, "0.1.0", "web-1", ID, u32s(3, 70_000)),
        "Roots": wire.Roots(
            u32s(1, 2),
            struct.pack("<QQ", 8193, 1 << 33),
            u32s(3, 1),
            KEY + wire.NO_ROOT,
            (b"/usr/lib/a", b"/b\xff"),
            u32s(1, 1, 0, 2) + wire.NO_CLASSES,
        ),
        "Roots-unread": wire.Roots(u32s(3), struct.pack("<Q", 8193), u32s(0), KEY, (b"/usr/lib/a",), wire.NO_CLASSES),
        "Pages": wire.Pages(u32s(1, 0, 1, 2, 7, 1), FPS),
        "Gone": wire.Gone(u32s(1, 2, 0xFFFFFFFF)),
        "Data": wire.Data(5, b"\1\0", bytes(range(256)) * 16),
        "Data-nothing": wire.Data(0xFFFFFFFF, b"\0\0\0", b""),
        "Attach": wire.Attach(u32s(9)),
        "Release": wire.Release(u32s(9, 10)),
        "AgentStats": wire.AgentStats(1, 200, 30_000, 4, 5, 1 << 53, 600, 70_000_000, 1 << 28, 99 << 20, 10_000),
        "Pong": wire.Pong(17),
    },
    "broker-to-agent": {
        "Welcome": wire.Welcome(
            2, "web-1", "office", ID, ID[::-1], KEY, 65_024, 16_384, 1 << 30, 100_000, ("/usr/**",), ("*.key", "id_é")
        ),
        "Refused": wire.Refused("no-matching-rule", "no rule has this name and this uid", 30_000),
        "Verdicts": wire.Verdicts(u32s(1, 2), b"\0\1"),
        "Fetch": wire.Fetch(5, 1, u32s(0, 2, 9, 1)),
        "Offer": wire.Offer(u32s(1, 2), u32s(3, 40_000)),
        "Segment": wire.Segment(2),
        "Granted": wire.Granted(9, u32s(0, 65_024, 3, 9, 70_000, 1)),
        "Denied": wire.Denied(u32s(10), b"\x0a"),
        "Withdraw": wire.Withdraw(u32s(9), 2),
        "Retired": wire.Retired(u32s(0, 1)),
        "Grantor": wire.Grantor(0x7FEF),
        "Ping": wire.Ping(17),
    },
    "consumer-to-agent": {
        "Open": cw.Open(1, 8193),
        "Close": cw.Close(1),
        "Mapped": cw.Mapped(1, 2, 3, 1),
        "LetGo": cw.LetGo(1, 2),
        "Unchanged": cw.Unchanged(),
    },
    "agent-to-consumer": {
        "ShareSegment": cw.ShareSegment(4),
        "Share": cw.Share(1, 2, u32s(0, 17, 3), u32s(4), 1, b"", b""),
        "Share-proven": cw.Share(1, 2, u32s(0, 17, 3), u32s(4), 0, u32s(1, 18, 1), u32s(4)),
        "Unshare": cw.Unshare(1, 2),
        "Plain": cw.Plain(1, "not-offered"),
        "SegmentsGone": cw.SegmentsGone(u32s(4, 5)),
        "GrantDevice": cw.GrantDevice(1),
        "ShareGrants": cw.ShareGrants(1, 2, 0x7FEF, 1, u32s(0, 8, 3, 9, 70_000, 1)),
    },
}
CASES = [(link, name) for link, examples in EXAMPLES.items() for name in examples]
each_golden = pytest.mark.parametrize(("link", "name"), CASES, ids=["-".join(case) for case in CASES])


def golden(link: str, name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{link}.{name}.hex").read_text())


# ------------------------------------------------------------------------------------------------------------ goldens


@each_golden
def test_the_format_is_the_committed_one(link: str, name: str) -> None:
    frame = golden(link, name)
    example = EXAMPLES[link][name]
    assert LINKS[link].encode(example).hex() == frame.hex(), "a change of format needs another PROTOCOL_VERSION"
    reader = FrameReader(len(frame))
    reader.feed(frame)
    (payload,) = reader
    assert LINKS[link].decode(payload) == example
    assert LINKS[link].decode(memoryview(frame)[4:]) == example


def test_every_message_has_a_golden_and_every_golden_a_message() -> None:
    for link, codec in LINKS.items():
        assert {type(example) for example in EXAMPLES[link].values()} == set(codec.messages)
    files = {path.name for path in GOLDEN.iterdir()}
    assert files == {f"{link}.{name}.hex" for link, name in CASES}


def test_types_are_unique_on_a_link_whatever_the_direction() -> None:
    for pair in ((AGENT_TO_BROKER, BROKER_TO_AGENT), (CONSUMER_TO_AGENT, AGENT_TO_CONSUMER)):
        types = [message.TYPE for codec in pair for message in codec.messages]
        assert len(types) == len(set(types))


@each_golden
def test_every_truncation_is_refused_or_incomplete(link: str, name: str) -> None:
    frame = golden(link, name)
    codec = LINKS[link]
    for end in range(len(frame)):
        reader = FrameReader(codec.max_frame)
        reader.feed(frame[:end])
        assert list(reader) == []
        assert reader.pending == end
    for end in range(len(frame) - 4):
        with pytest.raises(REFUSALS):
            codec.decode(frame[4 : 4 + end])


@each_golden
def test_a_changed_byte_gives_another_message_or_a_refusal(link: str, name: str) -> None:
    payload = golden(link, name)[4:]
    codec = LINKS[link]
    # A whole page would take minutes; there, one bit at a time.
    changes = range(1, 256) if len(payload) <= 512 else [1 << bit for bit in range(8)]
    for at, change in itertools.product(range(len(payload)), changes):
        broken = bytearray(payload)
        broken[at] ^= change
        try:
            message = codec.decode(bytes(broken))
        except REFUSALS:
            continue
        assert codec.decode(codec.encode(message)[4:]) == message


@each_golden
def test_a_changed_length_never_gets_past_the_reader_and_the_codec(link: str, name: str) -> None:
    frame = golden(link, name)
    codec = LINKS[link]
    for at, change in itertools.product(range(4), range(1, 256)):
        broken = bytearray(frame)
        broken[at] ^= change
        reader = FrameReader(codec.max_frame)
        reader.feed(broken)
        try:
            messages = [codec.decode(payload) for payload in reader]
        except REFUSALS:
            continue
        assert messages == []
        assert reader.pending == len(frame)


# -------------------------------------------------------------------------------------------------------- should fail


def read_case(path: Path) -> tuple[str, str, str, bytes]:
    """Link, expected error, what the bytes are, the bytes."""
    head, _, body = path.read_text().partition("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    data = bytearray()
    for token in body.split():
        byte, _, times = token.partition("*")
        data += bytes.fromhex(byte) * int(times or 1)
    return fields["link"], fields["error"], fields["bytes"], bytes(data)


@pytest.mark.parametrize("path", sorted(SHOULD_FAIL.iterdir()), ids=lambda path: cast(Path, path).stem)
def test_should_fail(path: Path) -> None:
    link, error, what, data = read_case(path)
    codec = LINKS[link]
    if what == "payload":
        with pytest.raises(REFUSALS) as refused:
            codec.decode(data)
    else:
        reader = FrameReader(codec.max_frame)
        reader.feed(data)
        with pytest.raises(REFUSALS) as refused:
            list(map(codec.decode, reader))
    message = cast(ProtocolError, refused.value).message
    assert message.startswith(error), message


# ---------------------------------------------------------------------------------------------------------- any value


def numbers_in(kind: Kind, pattern: str) -> tuple[int, ...] | None:
    match = re.fullmatch(pattern, kind.text)
    return tuple(int(group) for group in match.groups()) if match else None


TEXT = st.characters(codec="utf-8")


def values(kind: Kind, entries: int) -> st.SearchStrategy[Any]:
    """Values of a kind, as its words say; a column or an array has so many entries, if it may have as many."""
    if found := numbers_in(kind, r"uint <= (\d+)"):
        return st.one_of(st.integers(0, found[0]), st.sampled_from([0, found[0]]))
    if found := numbers_in(kind, r"text, at most (\d+) characters"):
        return st.one_of(st.text(TEXT, max_size=min(found[0], 50)), st.just("é" * found[0]))
    if found := numbers_in(kind, r"bin, exactly (\d+) bytes"):
        return st.binary(min_size=found[0], max_size=found[0])
    if found := numbers_in(kind, r"column of up to (\d+) x (\d+) bytes"):
        size = min(entries, found[0]) * found[1]
        return st.binary(min_size=1, max_size=8).map(lambda piece: (piece * size)[:size])
    if found := numbers_in(kind, r"array of up to (\d+) texts of at most (\d+) characters"):
        item: st.SearchStrategy[Any] = st.text(TEXT, max_size=20) | st.just("é" * found[1])
        return st.lists(item, max_size=5).map(tuple)
    if found := numbers_in(kind, r"array of up to (\d+) bins of 1 to (\d+) bytes"):
        entries = min(entries, found[0])
        return st.tuples(*[st.binary(min_size=1, max_size=9) for _ in range(entries)])
    raise AssertionError(f"no values for {kind.text}")


def kinds_of(message: type[Message]) -> dict[str, Kind]:
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(cast(Any, message))}


@st.composite
def messages(draw: st.DrawFn, message: type[Message]) -> Message:
    entries = draw(st.sampled_from([0, 1, 2, 7, 64, 255]))
    fields = {name: draw(values(kind, entries)) for name, kind in kinds_of(message).items()}
    if message.__name__ == "Data":
        fields["have"] = bytes(draw(st.lists(st.integers(0, 1), max_size=255)))
        fields["pages"] = draw(st.binary(min_size=1, max_size=8)) * 4096
        fields["pages"] = fields["pages"][:4096] * fields["have"].count(1)
    return message(**fields)


ALL_MESSAGES = [(link, message) for link, codec in LINKS.items() for message in codec.messages]
each_message = pytest.mark.parametrize(
    ("link", "message"), ALL_MESSAGES, ids=[f"{link}-{message.__name__}" for link, message in ALL_MESSAGES]
)


@each_message
@given(data=st.data())
def test_round_trip(link: str, message: type[Message], data: st.DataObject) -> None:
    example = data.draw(messages(message))
    codec = LINKS[link]
    frame = codec.encode(example)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    assert codec.decode(frame[4:]) == example
    for other in LINKS.values():
        if message not in other.messages:
            with pytest.raises(ValueError, match="does not travel on"):
                other.encode(example)


def largest(kind: Kind) -> Any:
    if found := numbers_in(kind, r"uint <= (\d+)"):
        return found[0]
    if found := numbers_in(kind, r"text, at most (\d+) characters"):
        return "\N{OLD ITALIC LETTER A}" * found[0]
    if found := numbers_in(kind, r"bin, exactly (\d+) bytes"):
        return b"\xff" * found[0]
    if found := numbers_in(kind, r"column of up to (\d+) x (\d+) bytes"):
        return b"\1" * found[0] * found[1]
    if found := numbers_in(kind, r"array of up to (\d+) texts of at most (\d+) characters"):
        return ("\N{OLD ITALIC LETTER A}" * 128,) * found[0]  # 512 bytes, the bound of globs.py
    if found := numbers_in(kind, r"array of up to (\d+) bins of 1 to (\d+) bytes"):
        return (b"\xff" * 2048,) * found[0]  # the agent fills half a frame with paths
    raise AssertionError(f"no largest value for {kind.text}")


@each_message
def test_the_largest_message_fits_and_one_step_beyond_is_refused_on_both_ends(
    link: str, message: type[Message]
) -> None:
    codec = LINKS[link]
    kinds = kinds_of(message)
    fields = {name: largest(kind) for name, kind in kinds.items()}
    example = message(**fields)
    assert codec.decode(codec.encode(example)[4:]) == example
    for name, kind in kinds.items():
        value = fields[name]
        beyond = value + 1 if type(value) is int else value + value[:1]
        if found := numbers_in(kind, r"column of up to (\d+) x (\d+) bytes"):
            beyond = value + bytes(found[1])
        wrong = message(**(fields | {name: beyond}))
        with pytest.raises(ValueError, match=f"field {name}: "):
            codec.encode(wrong)
        parts = [list(part) if type(part) is tuple else part for part in (fields | {name: beyond}).values()]
        payload = msgpack.packb([message.TYPE, *parts], use_bin_type=True)
        if len(payload) <= codec.max_frame:
            with pytest.raises(REFUSALS, match=f"field {name}: "):
                codec.decode(payload)


def test_a_message_that_cannot_be_sent_is_a_fault_of_ours() -> None:
    with pytest.raises(ValueError, match="field number: not an unsigned integer"):
        BROKER_TO_AGENT.encode(wire.Ping(-1))
    with pytest.raises(ValueError, match="columns of different length"):
        BROKER_TO_AGENT.encode(wire.Offer(u32s(1), b""))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        BROKER_TO_AGENT.encode(wire.Refused("code", "\ud800", 0))
    with pytest.raises(ValueError, match="over the frame limit"):
        AGENT_TO_BROKER.encode(
            wire.Roots(
                bytes(4 * 256), bytes(8 * 256), bytes(4 * 256), bytes(32 * 256), (b"x" * 4096,) * 256, bytes(16 * 256)
            )
        )
    with pytest.raises(ValueError, match="the same type"):
        Codec("twice", (wire.Ping, wire.Ping))


# ------------------------------------------------------------------------------------------------------------- frames


@given(data=st.data())
def test_frames_come_out_whole_whatever_the_pieces(data: st.DataObject) -> None:
    payloads = data.draw(st.lists(st.binary(min_size=1, max_size=40), max_size=12))
    stream = b"".join(len(payload).to_bytes(4, "little") + payload for payload in payloads)
    reader = FrameReader(40)
    out: list[bytes] = []
    at = fed = 0
    while at < len(stream):
        step = data.draw(st.integers(1, len(stream) - at))
        reader.feed(memoryview(stream)[at : at + step])
        at += step
        if data.draw(st.booleans()):
            taken = data.draw(st.integers(0, 3))
            out.extend(itertools.islice(reader, taken))
            fed = sum(len(payload) + 4 for payload in out)
            assert reader.pending == at - fed
    out.extend(reader)
    assert out == payloads
    assert reader.pending == 0


def test_a_bad_length_is_refused_at_once_and_for_ever_and_what_came_before_is_given_out() -> None:
    reader = FrameReader(8)
    reader.feed(b"\1\0\0\0x" + b"\x09\0\0\0")
    frames = iter(reader)
    assert next(frames) == b"x"
    with pytest.raises(ProtocolError, match="a frame of 9 bytes; 1 to 8 are allowed"):
        next(frames)
    with pytest.raises(ProtocolError, match="a frame of 9 bytes"):
        list(reader)
    empty = FrameReader(8)
    empty.feed(bytes(4))
    with pytest.raises(ProtocolError, match="a frame of 0 bytes"):
        list(empty)


# ------------------------------------------------------------------------------------------------------------- memory


def nested(count: int, opener: bytes) -> bytes:
    return b"\x92\x04" + opener * count


FULL = wire.MAX_FRAME
HOSTILE = {
    "array-of-4G": b"\xdd\xff\xff\xff\xff\x04",
    "ids-array-of-4G": b"\x92\x04\xdd\xff\xff\xff\xff",
    "ids-bin-of-4G": b"\x92\x04\xc6\xff\xff\xff\xff",
    "ids-text-of-4G": b"\x92\x04\xdb\xff\xff\xff\xff",
    "ids-map-of-4G": b"\x92\x04\xdf\xff\xff\xff\xff",
    "ids-ext-of-4G": b"\x92\x04\xc9\xff\xff\xff\xff\x01",
    "array-in-array": nested(FULL - 2, b"\x91"),
    "large-array-in-array": nested(1000, b"\xdc\x10\x00"),
    "map-in-map": nested(FULL - 2, b"\x81"),
    "many-empty-arrays": b"\x92\x04" + (b"\xdc\x10\x00" + b"\x90" * 4096) * 250,
    "paths-of-4G": b"\x96\x02\xc4\0\xc4\0\xc4\0\xc4\0\xdd\xff\xff\xff\xff",
    "paths-of-arrays": b"\x96\x02\xc4\0\xc4\0\xc4\0\xc4\0\xdc\x01\x00" + b"\xdc\x10\x00" * 256,
    "a-million-fields": b"\xdd\x00\x0f\xff\xf0" + b"\x04" * (FULL - 16),
    "wide-text": b"\x92\x04\xdb" + struct.pack(">I", FULL - 16) + b"a" * (FULL - 20) + "𐌀".encode(),
    "not-msgpack": b"\xc1" * FULL,
    "ids-too-long": b"\x92\x04\xc6" + struct.pack(">I", FULL - 7) + bytes(FULL - 7),
}


def decode_peak(payload: bytes, refused: bool) -> int:
    """Bytes that decoding took at its peak."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        if refused:
            with pytest.raises(ProtocolError):
                AGENT_TO_BROKER.decode(payload)
        else:
            AGENT_TO_BROKER.decode(payload)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_hostile_frame_costs_is_bounded_by_its_length(name: str) -> None:
    payload = HOSTILE[name]
    assert len(payload) <= FULL
    assert decode_peak(payload, refused=True) < 3 * len(payload) + (1 << 16)


def test_what_the_largest_good_frame_costs_is_bounded_by_its_length() -> None:
    payload = AGENT_TO_BROKER.encode(wire.Data(1, b"\1" * 255, bytes(255 * 4096)))[4:]
    assert decode_peak(payload, refused=False) < 3 * len(payload) + (1 << 16)


def test_an_announced_frame_takes_no_memory_before_it_comes() -> None:
    tracemalloc.start()
    try:
        reader = FrameReader()
        reader.feed(FULL.to_bytes(4, "little") + b"\x92")
        assert list(reader) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------- the document


def test_the_document_says_what_the_classes_say() -> None:
    spec = importlib.util.spec_from_file_location("gen_protocol", ROOT / "tools" / "gen_protocol.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    document = ROOT / "docs" / "protocol.md"
    assert generator.filled(document.read_text()) == document.read_text(), "run tools/gen_protocol.py"


def test_the_document_has_every_code_of_a_refusal() -> None:
    engine = (ROOT / "sharearea" / "engine.py").read_text()
    codes = set(re.findall(r'_(?:refuse|expel)\(\s*[a-z_.]+,\s*"([a-z-]+)"', engine))
    codes |= set(re.findall(r'Refusal\(\s*"([a-z-]+)"', (ROOT / "sharearea" / "policy.py").read_text()))
    assert {"protocol-version", "struck-out", "malformed", "no-answer", "no-pool"} <= codes
    document = (ROOT / "docs" / "protocol.md").read_text()
    assert [code for code in codes if f"`{code}`" not in document] == []


def test_both_halves_carry_the_same_protocol() -> None:
    assert agent_wire.PROTOCOL_VERSION == wire.PROTOCOL_VERSION
    for ours, theirs in ((AGENT_TO_BROKER, agent_wire.AGENT_TO_BROKER), (BROKER_TO_AGENT, agent_wire.BROKER_TO_AGENT)):
        assert [m.__name__ for m in ours.messages] == [m.__name__ for m in theirs.messages]

"""Frames and messages between programs: what may be said, in which direction, how large.

A frame is a u32 (little-endian) length and that many bytes of msgpack: an array of the message's type and its fields,
in the order of the class below. Everything a peer sends is checked here against a bound that we own, before anybody
else sees it; whatever does not fit raises ProtocolError. Columns are packed little-endian arrays inside one `bin`, so
that a report of thousands of pages is a handful of objects. docs/protocol.md is generated from these classes and says
the rest.

Pure: bytes in, messages out. Sockets, rings and descriptors belong to the transports.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

import msgpack

from .errors import ProtocolError

PROTOCOL_VERSION = 2

PAGE_SIZE = 4096
FINGERPRINT_SIZE = 32
MAX_FETCH_PAGES = 255  # one LMDB record of 255 fingerprints fills two database pages (store.py)
MAX_FRAME = 1 << 20  # 255 pages and their envelope fit
MAX_REPORT_FILES = 256
MAX_REPORT_PAGES = 1024  # taking up as many new pages takes the broker some 3 ms
MAX_PATH = 4096
MAX_FILE_PAGES = 262_144  # 1 GiB: bounds the work that one file root can ask of the broker's loop
MAX_IDS = 4096
MAX_CHANGES = 256  # files whose reports or grants end with one message
MAX_ATTACH = 64  # each costs the broker a pass over the file's pages
MAX_HELD = 65_536
MAX_GRANT_RUNS = 65_536
MAX_GLOBS = 256
MAX_DOMID = 0x7FEF  # Xen's highest number of a real domain

NO_ROOT = bytes(FINGERPRINT_SIZE)
CLASSES_SIZE = 16
NO_CLASSES = bytes(CLASSES_SIZE)

_HEADER: Final = 4
_UTF8: Final = 4  # bytes that one character may take


# -------------------------------------------------------------------------------------------------- codes


class Verdict(enum.IntEnum):
    """What the broker says of one reported file or one wish for grants. Numbers are the protocol's; never reuse one."""

    KNOWN = 0
    WANTED = 1
    TOO_SMALL = 2
    TOO_LARGE = 3
    EXCLUDED = 4
    NOT_INCLUDED = 5
    QUOTA_FILES = 6
    QUOTA_BYTES = 7
    TABLE_FULL = 8
    NOT_REPORTED = 9
    NOTHING_SHARED = 10
    STORE_FULL = 11
    ROOT_MISMATCH = 12
    GRANT_BUDGET = 13  # the table of grants or the domain's part of it has no room (Xen)
    DETACHED = 14  # the operator has detached the domain
    REPORT_ONLY = 15  # the file was taken up; nothing is shared in this pool, which only finds out what would be
    NOT_RESIDENT = 16  # the domain has nothing of the file in memory, and nobody has brought its root

    @property
    def code(self) -> str:
        """Return the stable reason code of logs and documents, as `quota-files`."""
        return self.name.lower().replace("_", "-")


class WithdrawReason(enum.IntEnum):
    """Why the broker wants a file's grants back. Numbers are the protocol's."""

    UNKNOWN_GRANT = 1  # the broker has no such owner: it restarted with another area, or waited in vain
    MOVING = 2  # the pages are in a newer segment; an offer follows
    OPERATOR = 3

    @property
    def code(self) -> str:
        """Return the stable reason code of logs and documents, as `unknown-grant`."""
        return self.name.lower().replace("_", "-")


# ---------------------------------------------------------------------------------------------- kinds of fields


@dataclass(frozen=True, slots=True)
class Kind:
    """What one field may hold: `check` returns the value or raises ProtocolError; `text` says it in docs.

    `items` is how many entries an array may have; 0: the field is no array.
    """

    text: str
    check: Callable[[str, object], object]
    items: int = 0


def _fail(name: str, what: str) -> ProtocolError:
    return ProtocolError(f"field {name}: {what}")


def uint(maximum: int) -> Any:
    """Field: an unsigned integer up to `maximum`."""

    def check(name: str, value: object) -> object:
        if type(value) is not int or not 0 <= value <= maximum:
            raise _fail(name, f"not an unsigned integer up to {maximum}")
        return value

    return dataclasses.field(metadata={"kind": Kind(f"uint <= {maximum}", check)})


def text(maximum: int) -> Any:
    """Field: a text of at most `maximum` characters."""

    def check(name: str, value: object) -> object:
        if type(value) is not str or len(value) > maximum:
            raise _fail(name, f"not a text of at most {maximum} characters")
        return value

    return dataclasses.field(metadata={"kind": Kind(f"text, at most {maximum} characters", check)})


def texts(count: int, maximum: int) -> Any:
    """Field: a list of at most `count` texts of at most `maximum` characters."""

    def check(name: str, value: object) -> object:
        if type(value) is not list or len(value) > count:
            raise _fail(name, f"not a list of at most {count} texts")
        for item in value:
            if type(item) is not str or len(item) > maximum:
                raise _fail(name, f"holds something else than a text of at most {maximum} characters")
        return tuple(value)

    kind = Kind(f"array of up to {count} texts of at most {maximum} characters", check, count)
    return dataclasses.field(metadata={"kind": kind})


def exact(size: int) -> Any:
    """Field: exactly `size` bytes."""

    def check(name: str, value: object) -> object:
        if type(value) is not bytes or len(value) != size:
            raise _fail(name, f"not {size} bytes")
        return value

    return dataclasses.field(metadata={"kind": Kind(f"bin, exactly {size} bytes", check)})


def column(width: int, count: int) -> Any:
    """Field: a packed column of at most `count` entries of `width` bytes."""

    def check(name: str, value: object) -> object:
        if type(value) is not bytes or len(value) % width or len(value) > width * count:
            raise _fail(name, f"not a column of at most {count} entries of {width} bytes")
        return value

    return dataclasses.field(metadata={"kind": Kind(f"column of up to {count} x {width} bytes", check)})


def blobs(count: int, maximum: int) -> Any:
    """Field: a list of at most `count` byte strings of 1 to `maximum` bytes."""

    def check(name: str, value: object) -> object:
        if type(value) is not list or len(value) > count:
            raise _fail(name, f"not a list of at most {count} byte strings")
        for item in value:
            if type(item) is not bytes or not 0 < len(item) <= maximum:
                raise _fail(name, f"holds something else than 1 to {maximum} bytes")
        return tuple(value)

    return dataclasses.field(
        metadata={"kind": Kind(f"array of up to {count} bins of 1 to {maximum} bytes", check, count)}
    )


class Message:
    """Base of all messages. `TYPE` is its number on the wire; `FD` whether a descriptor travels with it."""

    TYPE: ClassVar[int] = 0
    FD: ClassVar[bool] = False
    __slots__ = ()

    def check(self) -> None:
        """Raise ProtocolError where fields do not fit one another. The fields by themselves have been checked."""


def _same_length(name: str, **columns: tuple[int, int]) -> None:
    lengths = {length // width for length, width in columns.values()}
    if len(lengths) > 1:
        raise ProtocolError(f"{name}: columns of different length: {', '.join(columns)}")


# ------------------------------------------------------------------------------------------------ agent -> broker


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First message of an agent: who it says it is, and which of its files it holds grants for from before."""

    TYPE: ClassVar[int] = 1
    protocol: int = uint(0xFFFF)
    agent_version: str = text(32)
    name: str = text(64)
    instance: bytes = exact(16)
    held: bytes = column(4, MAX_HELD)


@dataclass(frozen=True, slots=True)
class Roots(Message):
    """Files, by their roots. A file that is not wholly known has NO_ROOT and says how many pages it will report.

    A root with a count of 0 is of a file that the domain knows and has nothing of in memory: it asks whether the area
    has the pages, so that it need not read them. Such a file is nobody's copy, and no bytes can be had from it. Once
    the domain has read some of it, it says the same again with the count of all pages.

    `classes` has four uint32 for each file: first page and count of its executable text, first page and count of what
    is mapped read-only; zeros for a file that is no program. They are for statistics only.
    """

    TYPE: ClassVar[int] = 2
    ids: bytes = column(4, MAX_REPORT_FILES)
    sizes: bytes = column(8, MAX_REPORT_FILES)
    counts: bytes = column(4, MAX_REPORT_FILES)
    roots: bytes = column(FINGERPRINT_SIZE, MAX_REPORT_FILES)
    paths: tuple[bytes, ...] = blobs(MAX_REPORT_FILES, MAX_PATH)
    classes: bytes = column(CLASSES_SIZE, MAX_REPORT_FILES)

    def check(self) -> None:
        _same_length(
            "Roots",
            ids=(len(self.ids), 4),
            sizes=(len(self.sizes), 8),
            counts=(len(self.counts), 4),
            roots=(len(self.roots), FINGERPRINT_SIZE),
            paths=(len(self.paths), 1),
            classes=(len(self.classes), CLASSES_SIZE),
        )


@dataclass(frozen=True, slots=True)
class Pages(Message):
    """Page fingerprints of wanted files: parts (file id, first page, count) and the fingerprints of all of them."""

    TYPE: ClassVar[int] = 3
    parts: bytes = column(12, MAX_REPORT_PAGES)
    fingerprints: bytes = column(FINGERPRINT_SIZE, MAX_REPORT_PAGES)


@dataclass(frozen=True, slots=True)
class Gone(Message):
    """Files that changed, vanished or are not resident any more: what was reported of them is void."""

    TYPE: ClassVar[int] = 4
    ids: bytes = column(4, MAX_CHANGES)


@dataclass(frozen=True, slots=True)
class Data(Message):
    """Answer to Fetch: `have` says for each page asked for whether its bytes follow (1) or not (0)."""

    TYPE: ClassVar[int] = 5
    request: int = uint(0xFFFFFFFF)
    have: bytes = column(1, MAX_FETCH_PAGES)
    pages: bytes = column(PAGE_SIZE, MAX_FETCH_PAGES)

    def check(self) -> None:
        if self.have.count(1) + self.have.count(0) != len(self.have) or self.have.count(1) * PAGE_SIZE != len(
            self.pages
        ):
            raise ProtocolError("Data: the pages are not those that `have` announces")


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """Files for which the agent asks grants; a read lease is held on each."""

    TYPE: ClassVar[int] = 6
    ids: bytes = column(4, MAX_ATTACH)


@dataclass(frozen=True, slots=True)
class Release(Message):
    """Files whose grants nobody in this domain uses any more."""

    TYPE: ClassVar[int] = 7
    ids: bytes = column(4, MAX_CHANGES)


@dataclass(frozen=True, slots=True)
class AgentStats(Message):
    """What the guest's kernel says, from time to time, and at once when its memory dwindles.

    Shown and summed. Where a pool reclaims memory, what is taken of this guest's, and given back, depends on it: within
    what the broker itself counts for it (sharearea/reclaim.py), so that a lie costs the liar.
    """

    TYPE: ClassVar[int] = 8
    files: int = uint(2**53)
    resident_pages: int = uint(2**53)
    zero_pages: int = uint(2**53)
    attached_files: int = uint(2**53)
    attached_pages: int = uint(2**53)
    dropped_pages_total: int = uint(2**53)
    unread_pages: int = uint(2**53)  # shared pages that were never read from a disk
    private_bytes: int = uint(2**53)
    total_bytes: int = uint(2**53)  # MemTotal of the guest
    available_bytes: int = uint(2**53)  # MemAvailable of the guest
    pressure: int = uint(10_000)  # PSI memory, some avg10, in hundredths of a percent; 0 where the kernel has none


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """Answer to Ping."""

    TYPE: ClassVar[int] = 9
    number: int = uint(0xFFFFFFFF)


# ------------------------------------------------------------------------------------------------ broker -> agent


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The domain is in a pool: its key, its area, and what policy would accept (the broker checks all the same)."""

    TYPE: ClassVar[int] = 65
    protocol: int = uint(0xFFFF)
    domain: str = text(64)
    pool: str = text(64)
    area: bytes = exact(16)
    epoch: bytes = exact(16)
    key: bytes = exact(FINGERPRINT_SIZE)
    slots_per_segment: int = uint(0xFFFFFFFF)
    min_file_bytes: int = uint(2**63)
    max_file_bytes: int = uint(2**63)
    max_files: int = uint(2**53)
    include: tuple[str, ...] = texts(MAX_GLOBS, MAX_PATH)
    exclude: tuple[str, ...] = texts(MAX_GLOBS, MAX_PATH)


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The domain may not share, or has to go: a stable code, the reason in words, how long to stay away (0: unsaid)."""

    TYPE: ClassVar[int] = 66
    reason: str = text(64)
    text: str = text(1024)
    retry_ms: int = uint(86_400_000)


@dataclass(frozen=True, slots=True)
class Verdicts(Message):
    """Per reported file: known, wanted, or why it is ignored (wire.Verdict)."""

    TYPE: ClassVar[int] = 67
    ids: bytes = column(4, MAX_REPORT_FILES)
    verdicts: bytes = column(1, MAX_REPORT_FILES)

    def check(self) -> None:
        _same_length("Verdicts", ids=(len(self.ids), 4), verdicts=(len(self.verdicts), 1))


@dataclass(frozen=True, slots=True)
class Fetch(Message):
    """Send the bytes of these pages of a file: runs (first page, count), MAX_FETCH_PAGES in all."""

    TYPE: ClassVar[int] = 68
    request: int = uint(0xFFFFFFFF)
    file: int = uint(0xFFFFFFFF)
    runs: bytes = column(8, MAX_FETCH_PAGES)


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """Files that have pages in the area, and how many."""

    TYPE: ClassVar[int] = 69
    ids: bytes = column(4, MAX_IDS)
    available: bytes = column(4, MAX_IDS)

    def check(self) -> None:
        _same_length("Offer", ids=(len(self.ids), 4), available=(len(self.available), 4))


@dataclass(frozen=True, slots=True)
class Segment(Message):
    """A segment of the pool's area; its descriptor travels with this message (`local` backend)."""

    TYPE: ClassVar[int] = 70
    FD: ClassVar[bool] = True
    segment: int = uint(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Granted(Message):
    """Handles for one file: runs (page, handle, count); the handles of a run follow one another. The owner is recorded
    already.

    A handle is a slot on `local` and a grant reference on `xen`. On `xen` a page is never in two runs, and neither
    slots nor segments are spoken of.
    """

    TYPE: ClassVar[int] = 71
    file: int = uint(0xFFFFFFFF)
    runs: bytes = column(12, MAX_GRANT_RUNS)


@dataclass(frozen=True, slots=True)
class Denied(Message):
    """No grants for these files now, and why (wire.Verdict)."""

    TYPE: ClassVar[int] = 72
    ids: bytes = column(4, MAX_ATTACH)
    reasons: bytes = column(1, MAX_ATTACH)

    def check(self) -> None:
        _same_length("Denied", ids=(len(self.ids), 4), reasons=(len(self.reasons), 1))


@dataclass(frozen=True, slots=True)
class Withdraw(Message):
    """Bring the consumers of these files back to their plain files and release the grants."""

    TYPE: ClassVar[int] = 73
    ids: bytes = column(4, MAX_IDS)
    reason: int = uint(255)


@dataclass(frozen=True, slots=True)
class Retired(Message):
    """Segments that the area has closed: close your descriptors of them."""

    TYPE: ClassVar[int] = 74
    segments: bytes = column(4, MAX_IDS)


@dataclass(frozen=True, slots=True)
class Grantor(Message):
    """The domain whose grant references the next Granted messages carry (`xen` backend)."""

    TYPE: ClassVar[int] = 76
    domid: int = uint(MAX_DOMID)


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there?"""

    TYPE: ClassVar[int] = 75
    number: int = uint(0xFFFFFFFF)


# ---------------------------------------------------------------------------------------------------------- codec


class Codec:
    """Encode and decode the messages that may travel in one direction of one link."""

    def __init__(self, name: str, messages: tuple[type[Message], ...], max_frame: int = MAX_FRAME) -> None:
        self.name = name
        self.max_frame = max_frame
        self.messages = messages
        self._by_type = {message.TYPE: (message, _kinds(message)) for message in messages}
        if len(self._by_type) != len(messages):
            raise ValueError(f"two messages of {name} have the same type")
        # Also the message itself is an array.
        self._max_array = max(16, *(kind.items for _, kinds in self._by_type.values() for _, kind in kinds))

    def encode(self, message: Message) -> bytes:
        """Return the whole frame of a message of ours. A message out of bounds is our own fault: ValueError."""
        entry = self._by_type.get(message.TYPE)
        if entry is None or entry[0] is not type(message):
            raise ValueError(f"{type(message).__name__} does not travel on {self.name}")
        values: list[object] = [message.TYPE]
        try:
            for name, kind in entry[1]:
                value = getattr(message, name)
                values.append(list(value) if type(value) is tuple else value)
                kind.check(name, values[-1])
            message.check()
        except ProtocolError as error:
            raise ValueError(f"{type(message).__name__}: {error.message}") from None
        payload = cast(bytes, msgpack.packb(values, use_bin_type=True))
        if len(payload) > self.max_frame:
            raise ValueError(f"{type(message).__name__} of {len(payload)} bytes is over the frame limit")
        return len(payload).to_bytes(_HEADER, "little") + payload

    def decode(self, payload: bytes | memoryview) -> Message:
        """Return the message in one frame's payload, all bounds checked. Raises ProtocolError."""
        if not 0 < len(payload) <= self.max_frame:
            raise ProtocolError(f"a frame of {len(payload)} bytes; 1 to {self.max_frame} are allowed")
        try:
            return self._read(payload)
        except ProtocolError:
            raise
        except Exception as error:  # msgpack raises ValueError, its own classes, and UnicodeDecodeError
            raise ProtocolError(f"not msgpack within bounds: {type(error).__name__}") from None

    def _read(self, payload: bytes | memoryview) -> Message:
        # Value by value, and no value may hold others: a megabyte of nested arrays would become a hundred of lists.
        reader = msgpack.Unpacker(
            None,
            raw=False,
            read_size=len(payload),
            max_buffer_size=self.max_frame,
            max_str_len=_UTF8 * MAX_PATH,
            max_bin_len=self.max_frame,
            max_array_len=self._max_array,
            max_map_len=0,
            max_ext_len=0,
        )
        reader.feed(payload)
        if not _is_array(payload[0]):
            raise ProtocolError("a message is an array that begins with its type")
        count = reader.read_array_header()
        number = _read_value("type", reader, payload) if count else None
        if type(number) is not int:
            raise ProtocolError("a message is an array that begins with its type")
        entry = self._by_type.get(number)
        if entry is None:
            raise ProtocolError(f"message type {number} does not travel on {self.name}")
        message, kinds = entry
        if count - 1 != len(kinds):
            raise ProtocolError(f"{message.__name__} has {len(kinds)} fields, not {count - 1}")
        checked = [kind.check(name, _read_field(name, kind, reader, payload)) for name, kind in kinds]
        if reader.tell() != len(payload):
            raise ProtocolError(f"{message.__name__} is followed by {len(payload) - reader.tell()} bytes more")
        result = message(*checked)
        result.check()
        return result


def _read_field(name: str, kind: Kind, reader: Any, payload: bytes | memoryview) -> object:
    at = reader.tell()
    if not kind.items or at == len(payload) or not _is_array(payload[at]):
        return _read_value(name, reader, payload)
    count = reader.read_array_header()
    if count > kind.items:
        raise _fail(name, f"{count} entries; {kind.items} are allowed")
    return [_read_value(name, reader, payload) for _ in range(count)]


def _read_value(name: str, reader: Any, payload: bytes | memoryview) -> object:
    at = reader.tell()
    if at == len(payload):
        raise ProtocolError(f"the frame ends before field {name}")
    if _NESTS[payload[at]]:
        raise _fail(name, "an array, a map or an extension, which do not belong here")
    return reader.unpack()


def _is_array(first: int) -> bool:
    """Whether a value that begins with this byte is an array (msgpack specification, "array format family")."""
    return 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)


# First bytes of values that are not wanted anywhere but as the message itself and as a field of many entries.
_NESTS: Final = bytes(
    _is_array(first)
    or 0x80 <= first <= 0x8F  # fixmap
    or first in (0xDE, 0xDF)  # map 16, map 32
    or 0xC7 <= first <= 0xC9  # ext 8 to ext 32
    or 0xD4 <= first <= 0xD8  # fixext
    for first in range(256)
)


def _kinds(message: type[Message]) -> tuple[tuple[str, Kind], ...]:
    return tuple((f.name, f.metadata["kind"]) for f in dataclasses.fields(cast(Any, message)))


class FrameReader:
    """Cut a byte stream into frame payloads. Holds one frame at the most; a length over the limit raises at once."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max_frame = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes that arrived."""
        self._buffer += data

    def __iter__(self) -> Iterator[bytes]:
        """Yield the payload of each whole frame. Raises ProtocolError on a length that is not allowed."""
        offset = 0
        try:
            while len(self._buffer) - offset >= _HEADER:
                length = int.from_bytes(self._buffer[offset : offset + _HEADER], "little")
                if not 0 < length <= self._max_frame:
                    raise ProtocolError(f"a frame of {length} bytes; 1 to {self._max_frame} are allowed")
                end = offset + _HEADER + length
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[offset + _HEADER : end])
                offset = end
                yield payload
        finally:
            if offset:
                del self._buffer[:offset]

    @property
    def pending(self) -> int:
        """Bytes that wait for the rest of their frame."""
        return len(self._buffer)


AGENT_TO_BROKER = Codec("agent -> broker", (Hello, Roots, Pages, Gone, Data, Attach, Release, AgentStats, Pong))
BROKER_TO_AGENT = Codec(
    "broker -> agent",
    (Welcome, Refused, Verdicts, Fetch, Offer, Segment, Granted, Denied, Withdraw, Retired, Grantor, Ping),
)

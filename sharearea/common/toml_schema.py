"""What a configuration file may say: kinds of values, and dataclasses as schemas.

A section of a file is a frozen dataclass whose fields carry `key(kind)`; kinds turn TOML values into the values
that a program uses (bytes, seconds, tuples). Nothing is raised at the first fault: all of them are collected in
`Problems`, and one ConfigError names each with its file, its dotted key and what to write instead.

It leaves to config.py of each program which keys there are and what has to fit together. Only `read_file` touches the
disk.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, cast

from .errors import ConfigError
from .globs import MAX_NAME, NAME_CHARACTERS, GlobError, compile_name_globs, is_name, is_uuid, translate
from .units import MIB, SIZE_UNITS, size_text
from .wire import MAX_GLOBS, MAX_PATH

MAX_FILE_BYTES: Final = MIB  # of a configuration file; larger is a mistake in the path
MAX_SOCKET_PATH: Final = 107  # sun_path of unix(7), less the final zero byte

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z", re.ASCII)
_SIZE = re.compile(r"([0-9]{1,16}) ?(B|KiB|MiB|GiB|TiB)\Z", re.ASCII)
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(ms|s|min|h)\Z", re.ASCII)
_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}

T = TypeVar("T")


def duration_text(seconds: float) -> str:
    """Write seconds as a configuration file would, as `500 ms` or `10 s`."""
    milliseconds = round(seconds * 1000)
    if milliseconds % 1000:
        return f"{milliseconds} ms"
    return f"{milliseconds // 1000} s"


# ------------------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a file: the dotted key, what is wrong with it, and what to write instead."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}; {self.remedy}" if self.remedy else text


class Problems:
    """All faults of one file, in the order they were found."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[Problem] = []

    def add(self, where: str, what: str, remedy: str) -> None:
        """Note one fault."""
        self._found.append(Problem(where, what, remedy))

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self, hint: str) -> None:
        """Raise one ConfigError that lists every fault; do nothing if there is none."""
        if not self._found:
            return
        if len(self._found) == 1:
            raise ConfigError(f"{self.file}: {self._found[0]}", hint)
        lines = "".join(f"\n  {problem}" for problem in self._found)
        raise ConfigError(f"{self.file}: {len(self._found)} problems{lines}", hint)


def dotted(where: str, name: str) -> str:
    """Return the dotted key of `name` in the table `where`, quoted where TOML wants it."""
    if not _BARE_KEY.match(name):
        name = '"' + ascii(name)[1:-1].replace('"', '\\"') + '"'
    return f"{where}.{name}" if where else name


def _describe(value: object) -> str:
    # Long enough to be recognised, short enough for a line.
    match value:
        case bool():
            return "true" if value else "false"
        case int() if abs(value) >= 1 << 64:
            return "a very large number"  # Python refuses to write some of them
        case int() | float():
            return f"the number {value}"
        case str():
            return f'the text "{ascii(value)[1:-1]:.40}"'
        case list():
            return "a list"
        case dict():
            return "a table"
        case _:
            return "a date or time"


# ---------------------------------------------------------------------------------------------------------- kinds


class Kind(Protocol):
    """What one key may hold. `expected` says it in a message, `example` is TOML that fits."""

    @property
    def expected(self) -> str:
        """Say what fits, as `a size such as "64 MiB"`."""

    @property
    def example(self) -> str:
        """Return TOML text of a value that fits."""

    def read(self, value: object, where: str, problems: Problems) -> Any:
        """Return what the program uses for a TOML value; add to `problems` and return None where it does not fit."""


def _mismatch(kind: Kind, value: object, where: str, problems: Problems) -> None:
    leaf = where.rpartition(".")[2] or where
    # An entry of a list has no `key = value` of its own to show.
    remedy = f"for example {kind.example}" if leaf.endswith("]") else f"for example {leaf} = {kind.example}"
    problems.add(where, f"expected {kind.expected}, found {_describe(value)}", remedy)


@dataclass(frozen=True, slots=True)
class Boolean:
    """True or false."""

    expected: str = "true or false"
    example: str = "true"

    def read(self, value: object, where: str, problems: Problems) -> bool | None:
        """Return the value."""
        if type(value) is bool:
            return value
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number of a range, both ends included. `shown` is the example, the smallest one unless it says so."""

    minimum: int
    maximum: int
    shown: int | None = None

    @property
    def expected(self) -> str:
        """Name the range."""
        return f"a whole number from {self.minimum} to {self.maximum}"

    @property
    def example(self) -> str:
        """Return the number to show."""
        return str(self.minimum if self.shown is None else self.shown)

    def read(self, value: object, where: str, problems: Problems) -> int | None:
        """Return the number. `true` is none."""
        if type(value) is int and self.minimum <= value <= self.maximum:
            return value
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes: an integer, or a text with a unit (powers of 1024), as `64 MiB`."""

    minimum: int
    maximum: int
    multiple: int = 1

    @property
    def expected(self) -> str:
        """Name the range and the step."""
        step = f", a multiple of {size_text(self.multiple)}" if self.multiple > 1 else ""
        return (
            f"a size from {size_text(self.minimum)} to {size_text(self.maximum)}{step} "
            "(bytes, or a text with B, KiB, MiB, GiB or TiB)"
        )

    @property
    def example(self) -> str:
        """Return the smallest one."""
        return f'"{size_text(self.minimum)}"'

    def read(self, value: object, where: str, problems: Problems) -> int | None:
        """Return bytes."""
        size = value if type(value) is int else None
        if type(value) is str and (match := _SIZE.match(value)):
            size = int(match[1]) * SIZE_UNITS[match[2]]
        if size is not None and self.minimum <= size <= self.maximum and size % self.multiple == 0:
            return size
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class Duration:
    """A time as text with a unit, as `500 ms` or `10 s`. A bare number is refused: nobody could tell its unit."""

    minimum: float  # seconds
    maximum: float  # seconds

    @property
    def expected(self) -> str:
        """Name the range."""
        return f"a time from {duration_text(self.minimum)} to {duration_text(self.maximum)} (text with ms, s, min or h)"

    @property
    def example(self) -> str:
        """Return the shortest one."""
        return f'"{duration_text(self.minimum)}"'

    def read(self, value: object, where: str, problems: Problems) -> float | None:
        """Return seconds."""
        if type(value) is str and (match := _DURATION.match(value)):
            seconds = float(match[1]) * _DURATION_UNITS[match[2]]
            if self.minimum <= seconds <= self.maximum:
                return seconds
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few texts. `elsewhere` has the answer to a value that somebody may well try."""

    values: tuple[str, ...]
    elsewhere: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def expected(self) -> str:
        """List the texts."""
        quoted = [f'"{value}"' for value in self.values]
        return quoted[0] if len(quoted) == 1 else f"one of {', '.join(quoted)}"

    @property
    def example(self) -> str:
        """Return the first one."""
        return f'"{self.values[0]}"'

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the text."""
        if type(value) is str:
            if value in self.values:
                return value
            if value in self.elsewhere:
                problems.add(where, self.elsewhere[value], f"write {self.example}")
                return None
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class Name:
    """A name of a domain: 1 to 64 characters of NAME_CHARACTERS."""

    example: str = '"web-1"'

    @property
    def expected(self) -> str:
        """Name the characters."""
        return f"a name of 1 to {MAX_NAME} characters ({NAME_CHARACTERS})"

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the name."""
        if type(value) is str and is_name(value):
            return value
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class OptionalName(Name):
    """A name as Name takes it, or an empty text for none."""

    @property
    def expected(self) -> str:
        """Name the characters."""
        return f"a name of at most {MAX_NAME} characters ({NAME_CHARACTERS}), or an empty text"

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the name."""
        if value == "":
            return ""
        return super(OptionalName, self).read(value, where, problems)


@dataclass(frozen=True, slots=True)
class Uuid:
    """A uuid; capitals become small letters, as Xen writes them."""

    expected: str = "a uuid of 8-4-4-4-12 hexadecimal digits"
    example: str = '"2f1d4b6e-5c7a-4d3e-9b8f-0a1c2e3d4f50"'

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the uuid."""
        if type(value) is str and is_uuid(value.lower()):
            return value.lower()
        _mismatch(self, value, where, problems)
        return None


@dataclass(frozen=True, slots=True)
class AbsolutePath:
    """An absolute path without `.`, `..` and doubled or final slashes, so that two texts of one path are equal."""

    example: str
    expected: str = "an absolute path"
    maximum: int = MAX_PATH - 1  # bytes, as encoded

    def read(self, value: object, where: str, problems: Problems) -> Path | None:
        """Return the path."""
        if type(value) is not str or not value.startswith("/") or "\0" in value:
            _mismatch(self, value, where, problems)
            return None
        plain = "/" + "/".join(part for part in value.split("/") if part not in ("", "."))
        if ".." in plain.split("/"):
            problems.add(where, f"{_describe(value)} goes up with '..'", "write the path that it ends at")
        elif plain != value:
            problems.add(where, f"{_describe(value)} has needless slashes or dots", f'write "{plain}"')
        elif len(value.encode()) > self.maximum:
            problems.add(where, f"the path has more than {self.maximum} bytes", "choose a shorter one")
        else:
            return Path(value)
        return None


@dataclass(frozen=True, slots=True)
class OptionalPath:
    """An absolute path as AbsolutePath takes it, or an empty text for none. Becomes a text."""

    example: str
    expected: str = "an absolute path, or an empty text"

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the path."""
        if value == "":
            return ""
        path = AbsolutePath(self.example, self.expected).read(value, where, problems)
        return None if path is None else str(path)


@dataclass(frozen=True, slots=True)
class Listen:
    """An address and a port to listen on, as `127.0.0.1:9420` or `[::1]:9420`, or an empty text for none."""

    example: str = '"127.0.0.1:9420"'
    expected: str = "an IP address and a port, as `127.0.0.1:9420` or `[::1]:9420`, or an empty text"

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the text."""
        if value == "":
            return ""
        if type(value) is str:
            try:
                split_address(value)
            except ValueError:
                pass
            else:
                return value
        _mismatch(self, value, where, problems)
        return None


def split_address(text: str) -> tuple[str, int]:
    """Return the address and the port of a text as Listen takes it. ValueError for any other."""
    host, colon, port = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or not 0 <= int(port) <= 65_535:
        raise ValueError(text)
    bracketed = host.startswith("[") and host.endswith("]")
    address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    if (address.version == 6) != bracketed:
        raise ValueError(text)
    return str(address), int(port)


def socket_path(example: str) -> AbsolutePath:
    """Return the kind of a path that a unix socket can be bound to."""
    return AbsolutePath(example, "the absolute path of a unix socket", MAX_SOCKET_PATH)


@dataclass(frozen=True, slots=True)
class Glob:
    """A glob over paths; see GlobError for what is refused."""

    expected: str = "a glob over paths"
    example: str = '"**/*.key"'

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the glob's text."""
        if type(value) is not str:
            _mismatch(self, value, where, problems)
            return None
        try:
            translate(value)
        except GlobError as error:
            problems.add(where, str(error), error.remedy)
            return None
        return value


@dataclass(frozen=True, slots=True)
class NameGlob:
    """A glob over names of domains: `*`, `?`, `[...]` and `{a,b}`."""

    expected: str = "a name or a glob over names"
    example: str = '"web-*"'

    def read(self, value: object, where: str, problems: Problems) -> str | None:
        """Return the glob's text."""
        if type(value) is not str:
            _mismatch(self, value, where, problems)
            return None
        try:
            compile_name_globs((value,))
        except GlobError as error:
            problems.add(where, str(error), error.remedy)
            return None
        return value


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of one kind; with `or_one` a single value stands for a list of one. Becomes a tuple."""

    kind: Kind
    minimum: int = 0
    maximum: int = MAX_GLOBS
    or_one: bool = False

    @property
    def expected(self) -> str:
        """Say how many of what."""
        count = f"{self.minimum} to {self.maximum} entries" if self.minimum else f"at most {self.maximum} entries"
        one = f"{self.kind.expected}, or " if self.or_one else ""
        return f"{one}a list of {count}, each {self.kind.expected}"

    @property
    def example(self) -> str:
        """Return a list of one."""
        return f"[{self.kind.example}]"

    def read(self, value: object, where: str, problems: Problems) -> tuple[Any, ...] | None:
        """Return the entries; none of them if one is wrong."""
        if self.or_one and type(value) is not list:
            one = self.kind.read(value, where, problems)
            return None if one is None else (one,)
        if type(value) is not list or not self.minimum <= len(value) <= self.maximum:
            _mismatch(self, value, where, problems)
            return None
        entries = [self.kind.read(entry, f"{where}[{number}]", problems) for number, entry in enumerate(value)]
        return None if any(entry is None for entry in entries) else tuple(entries)


@dataclass(frozen=True, slots=True)
class Table:
    """A table with the keys of a section."""

    section: type[Any]
    example: str = "{ ... }"
    expected: str = "a table"

    def read(self, value: object, where: str, problems: Problems) -> Any:
        """Return an instance of the section."""
        return read_section(self.section, value, where, problems)


# ------------------------------------------------------------------------------------------------------- sections


def key(kind: Kind) -> dict[str, Kind]:
    """Return the metadata that makes a dataclass field a key of its section; without a default it is required."""
    return {"kind": kind}


def keys_of(section: type[Any]) -> dict[str, Kind]:
    """Return the keys of a section and their kinds. Fields without `key` are none."""
    return {f.name: cast(Kind, f.metadata["kind"]) for f in dataclasses.fields(section) if "kind" in f.metadata}


def read_section(section: type[T], value: object, where: str, problems: Problems) -> T | None:
    """Return an instance of a section for the table `value`; None when it has faults, all of them in `problems`."""
    if type(value) is not dict:
        problems.add(where, f"expected a table, found {_describe(value)}", f"write [{where}]")
        return None
    kinds = keys_of(section)
    before = len(problems)
    check_keys(value, tuple(kinds), where, problems)
    found = {
        name: kind.read(value[name], dotted(where, name), problems) for name, kind in kinds.items() if name in value
    }
    for f in dataclasses.fields(cast(Any, section)):
        if f.name in kinds and f.name not in found and f.default is dataclasses.MISSING:
            problems.add(
                dotted(where, f.name),
                "is missing and has no default",
                f"for example {f.name} = {kinds[f.name].example}",
            )
    return section(**found) if len(problems) == before else None


def check_keys(table: Mapping[str, object], allowed: Sequence[str], where: str, problems: Problems) -> None:
    """Add a problem for every key of a table that is not allowed there."""
    for name in table:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            remedy = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(allowed)}"
            problems.add(dotted(where, name), "unknown key", remedy)


# ----------------------------------------------------------------------------------------------------------- files


def read_file(path: Path, hint: str) -> bytes:
    """Return the bytes of a configuration file. Raises ConfigError with the system's reason."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {size_text(MAX_FILE_BYTES)}", "this is no configuration file")
    return data


def parse(data: bytes, file: str, hint: str) -> dict[str, Any]:
    """Return the tables of a TOML file; `file` names it in messages. Raises ConfigError with line and column."""
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}: line {line} is not UTF-8", "store the file as UTF-8") from None
    except ValueError as error:  # TOMLDecodeError, and what int() says of a number with thousands of digits
        raise ConfigError(f"{file}: not TOML: {error}", hint) from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deeply", hint) from None

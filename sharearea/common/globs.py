"""Globs over paths and names, as policies, configuration files and the greeting of the broker have them.

Pure: texts in, matchers out. Which paths count, and who may be called what, is policy.py's and the configurations'.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .wire import MAX_PATH

MAX_GLOB_BYTES: Final = 512  # two lists of MAX_GLOBS such globs fit into one frame of the protocol (Welcome)
MAX_EXPANSIONS: Final = 64  # of the braces of one glob

NAME_CHARACTERS: Final = "letters, digits, '.', '_' and '-'"
MAX_NAME: Final = 64

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}\Z", re.ASCII)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.ASCII)


def is_name(text: str) -> bool:
    """Say whether a text may name a pool or a domain: 1 to 64 characters of NAME_CHARACTERS."""
    return _NAME.match(text) is not None


def is_uuid(text: str) -> bool:
    """Say whether a text is a uuid as Xen writes them: 8-4-4-4-12 small hexadecimal digits."""
    return _UUID.match(text) is not None


# A path is bytes, absolute and normal. In a glob `*` stands for any bytes within one name, `?` for one byte, `[a-z]`
# and `[!a-z]` for one byte of a set, `{a,b}` for either text, `**` between slashes for any number of folders, none
# included, and at the end for everything below. A backslash stands for itself. A glob without a slash is matched
# against the file's name in any folder; every other one begins with "/" or "**/".
#
# Why no glob and no path can make the match run away. Braces are expanded before, so every stretch of a pattern between
# two stars matches a fixed number of bytes (in a name) or of folders (in a path). For such stretches the leftmost match
# is as good as any later one, so each star but the last is written as an atomic group: once it has matched, it is not
# tried again. Behind the last star a stretch of fixed length is anchored at the end, so all but one of its places fail
# within that length. No repetition holds another one but (folder name, slash)*, whose inner one is possessive. So a
# match costs at most (length of the path) x (length of the glob) steps. tests/test_policy.py checks this form for
# arbitrary globs, and the result against a matcher that tabulates instead of backtracking.


class GlobError(ValueError):
    """A glob that cannot be meant: unclosed `[` or `{`, `**` beside other characters, relative, over long."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Pattern:
    """One expanded glob as two regular expressions over bytes, matched at the beginning of their text.

    `folder` is for the path up to and with its last slash, `base` for the rest; None matches everything. A path
    matches when both do.
    """

    folder: bytes | None
    base: bytes | None


# A token of a name: the bytes that one place may hold; None is a star.
Token = frozenset[int] | None

_ANY_BYTE: Final = frozenset(range(256)) - {0x2F}


def translate(glob: str) -> tuple[Pattern, ...]:
    """Translate a glob over paths. Raises GlobError."""
    return tuple(_pattern(text, glob) for text in _expand(glob))


def _pattern(text: str, glob: str) -> Pattern:
    names = text.split("/")
    if len(names) == 1:
        names = ["**", *names]
    elif names[0] == "":
        names = names[1:]
    elif names[0] != "**":
        raise GlobError(
            f"the glob {_quote(glob)} is relative, and paths are absolute",
            f"write {_quote('/' + glob)} for this one place or {_quote('**/' + glob)} for any folder",
        )
    if any(name in ("", ".", "..") for name in names):
        raise GlobError(
            f"the glob {_quote(glob)} has an empty, '.' or '..' name between slashes; no path has one",
            "leave it out, or end the glob with /** to name all below a folder",
        )
    base = None if names[-1] == "**" else _last_name(names[-1], glob)
    return Pattern(_folder(names[:-1], base is None, glob), base)


def _folder(names: list[str], below: bool, glob: str) -> bytes | None:
    # `below`: whatever follows the last name matches, as does what lies in folders of it.
    stretches: list[bytes] = [b""]
    for name in names:
        if name != "**":
            stretches[-1] += _name(name, glob) + b"/"
        elif len(stretches) == 1 or stretches[-1]:
            stretches.append(b"")
    if below and (len(stretches) == 1 or stretches[-1]):
        stretches.append(b"")
    if len(stretches) == 1:
        return b"/" + stretches[0] + rb"\Z"
    if not any(stretches):
        return None
    middle = b"".join(b"(?>(?:[^/]++/)*?" + stretch + b")" for stretch in stretches[1:-1])
    last = b"(?:[^/]++/)*?" + stretches[-1] + rb"\Z" if stretches[-1] else b""
    return b"/" + stretches[0] + middle + last


def _name(name: str, glob: str) -> bytes:
    # A name in a folder. It ends where a slash follows, so the last star has one place only where it can end.
    first, stars = _stretches(name, glob)
    return b"(?>" + first + stars + b"(?=/))" if stars else first


def _last_name(name: str, glob: str) -> bytes:
    # No group around it: sre then skips it by its first byte, among dozens in one expression.
    return b"".join(_stretches(name, glob)) + rb"\Z"


def _stretches(name: str, glob: str) -> tuple[bytes, bytes]:
    # What stands before the first star, and the rest.
    stretches: list[bytes] = [b""]
    for token in _tokens(name, glob):
        if token is None:
            stretches.append(b"")
        else:
            stretches[-1] += _byte_set(token)
    if len(stretches) == 1:
        return stretches[0], b""
    middle = b"".join(b"(?>[^/]*?" + stretch + b")" for stretch in stretches[1:-1])
    return stretches[0], middle + b"[^/]*" + stretches[-1]


def _byte_set(token: frozenset[int]) -> bytes:
    if len(token) == 1:
        return re.escape(bytes(token))
    if token == _ANY_BYTE:
        return b"[^/]"
    spans: list[list[int]] = []
    for byte in sorted(token):
        if spans and spans[-1][1] == byte - 1:
            spans[-1][1] = byte
        else:
            spans.append([byte, byte])
    return b"[" + b"".join(b"\\x%02x-\\x%02x" % (first, last) for first, last in spans) + b"]"


def _tokens(name: str, glob: str) -> tuple[Token, ...]:
    tokens: list[Token] = []
    at = 0
    while at < len(name):
        char = name[at]
        at += 1
        if char == "*":
            if tokens and tokens[-1] is None:
                raise GlobError(
                    f"the glob {_quote(glob)} has ** beside other characters",
                    "write * within a name, or ** alone between slashes for any folders",
                )
            tokens.append(None)
        elif char == "?":
            tokens.append(_ANY_BYTE)
        elif char == "[":
            end = _class_end(name, at - 1, glob)
            tokens.append(_class(name[at:end], glob))
            at = end + 1
        else:
            tokens.extend(frozenset((byte,)) for byte in char.encode())
    return tuple(tokens)


def _class_end(text: str, at: int, glob: str) -> int:
    # A "]" right at the beginning of a class is a member of it.
    begin = at + 2 if text[at + 1 : at + 2] == "!" else at + 1
    end = text.find("]", begin + 1)
    if end < 0:
        raise GlobError(f"the glob {_quote(glob)} has a [ that is not closed", "write [[] for the character itself")
    return end


def _class(text: str, glob: str) -> frozenset[int]:
    negated = text.startswith("!")
    members = text[1:] if negated else text
    if not members.isascii() or "/" in members or text.startswith("^"):
        raise GlobError(
            f"the glob {_quote(glob)} has a [...] with '/', with a leading '^' or beyond ASCII",
            "write [!...] for 'none of', and {a,b} for characters beyond ASCII: a class stands for one byte",
        )
    chosen: set[int] = set()
    at = 0
    while at < len(members):
        first = last = ord(members[at])
        if members[at + 1 : at + 2] == "-" and at + 2 < len(members):
            last = ord(members[at + 2])
            at += 2
        at += 1
        if last < first:
            raise GlobError(f"the glob {_quote(glob)} has a range that runs backwards", "write it as [a-z]")
        chosen.update(range(first, last + 1))
    return frozenset((_ANY_BYTE - chosen) if negated else (chosen - {0x2F}))


def _expand(glob: str) -> list[str]:
    # All texts that the braces stand for, in order.
    try:
        encoded = glob.encode("utf-8")
    except UnicodeEncodeError:
        encoded = b""
    if not 0 < len(encoded) <= MAX_GLOB_BYTES or "\0" in glob:
        raise GlobError(
            f"the glob {_quote(glob)} does not have 1 to {MAX_GLOB_BYTES} bytes of UTF-8 without a zero byte",
            "write a shorter one, with ? or * for bytes that are no text",
        )
    texts = [""]
    at = 0
    while at < len(glob):
        if glob[at] == "{":
            choices, at = _choices(glob, at)
            texts = [text + choice for text in texts for choice in choices]
            if len(texts) > MAX_EXPANSIONS:
                raise GlobError(
                    f"the glob {_quote(glob)} stands for more than {MAX_EXPANSIONS} texts", "write several globs"
                )
            continue
        piece, at = _piece(glob, at)
        texts = [text + piece for text in texts]
    if "" in texts:
        raise GlobError(f"the glob {_quote(glob)} stands for an empty text too", "leave the empty alternative out")
    return texts


def _choices(glob: str, at: int) -> tuple[list[str], int]:
    # The alternatives of the brace at `at`, and where it ends.
    choices = [""]
    at += 1
    while at < len(glob) and glob[at] not in "{}":
        if glob[at] == ",":
            choices.append("")
            at += 1
        else:
            piece, at = _piece(glob, at)
            choices[-1] += piece
    if at == len(glob) or glob[at] == "{" or len(choices) == 1:
        raise GlobError(
            f"the glob {_quote(glob)} has a {{ that is not closed, holds another one or has no comma",
            "write {a,b}, or [{] for the character itself",
        )
    return choices, at + 1


def _piece(glob: str, at: int) -> tuple[str, int]:
    # One character or one whole class, in which braces are plain.
    if glob[at] == "}":
        raise GlobError(f"the glob {_quote(glob)} has a }} without its {{", "write [}] for the character itself")
    end = _class_end(glob, at, glob) + 1 if glob[at] == "[" else at + 1
    return glob[at:end], end


def _quote(glob: str) -> str:
    return f'"{ascii(glob)[1:-1]:.80}"'


def compile_name_globs(globs: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a name matches one of the globs. Raises GlobError.

    A glob that no name of a domain could ever match, for the characters in it, is refused too.
    """
    allowed = frozenset(byte for byte in range(128) if is_name(chr(byte)))
    patterns: list[bytes] = []
    for glob in globs:
        for text in _expand(glob):
            if "/" in text or any(token is not None and not token & allowed for token in _tokens(text, glob)):
                raise GlobError(f"no name matches {_quote(glob)}", f"names have {NAME_CHARACTERS} only")
            patterns.append(_last_name(text, glob))
    match = re.compile(b"|".join(patterns) or rb"\Z.", re.DOTALL).match
    return lambda name: match(name.encode()) is not None


def name_glob_covers(general: str, special: str) -> bool:
    """Say whether every name that `special` matches is matched by `general` too.

    True is certain; False may be said of a pair that does cover, where only several alternatives do it together.
    """
    names = frozenset(byte for byte in range(128) if is_name(chr(byte)))
    generals = [_tokens(text, general) for text in _expand(general)]
    return all(
        any(_tokens_cover(tokens, _tokens(text, special), names) for tokens in generals) for text in _expand(special)
    )


def _tokens_cover(general: tuple[Token, ...], special: tuple[Token, ...], names: frozenset[int]) -> bool:
    # Row by row from the end: cover[j] says whether general[i:] covers special[j:]. A star of `general` takes any
    # tokens of `special`, stars included; everything else takes one token with no other bytes.
    cover = [False] * len(special) + [True]
    for token in reversed(general):
        row = [False] * (len(special) + 1)
        for at in range(len(special), -1, -1):
            if token is None:
                row[at] = cover[at] or (at < len(special) and row[at + 1])
            elif at < len(special):
                other = special[at]
                row[at] = other is not None and other & names <= token and cover[at + 1]
        cover = row
    return cover[0]


class Outcome(enum.Enum):
    """What the globs say of a path."""

    PASS = "passes"
    EXCLUDED = "excluded"
    NOT_INCLUDED = "not included"
    NOT_NORMAL = "not an absolute, normal path"


Decision = tuple[Outcome, str]

_PASS: Final[Decision] = (Outcome.PASS, "")
_NOT_INCLUDED: Final[Decision] = (Outcome.NOT_INCLUDED, "")
_NOT_NORMAL: Final[Decision] = (Outcome.NOT_NORMAL, "")
_CACHED_FOLDERS: Final = 4096
_CACHED_FOLDER_BYTES: Final = 512  # longer ones are looked at again each time; so the cache is bounded in bytes, too

_Match = Callable[[bytes], re.Match[bytes] | None]


class _Globs:
    """A list of globs, sorted by what has to be looked at: the folder, the name, or both."""

    __slots__ = ("_both", "_folders", "all", "name")

    def __init__(self, globs: Sequence[str]) -> None:
        self.all: str | None = None  # the glob that matches everything
        self._folders: list[tuple[_Match, str]] = []
        self._both: list[tuple[_Match, _Match, str]] = []
        names: list[tuple[bytes, str]] = []
        for glob in globs:
            for pattern in translate(glob):
                folder = None if pattern.folder is None else re.compile(pattern.folder, re.DOTALL).match
                if folder is not None and pattern.base is not None:
                    self._both.append((folder, re.compile(pattern.base, re.DOTALL).match, glob))
                elif folder is not None:
                    self._folders.append((folder, glob))
                elif pattern.base is not None:
                    names.append((pattern.base, glob))
                elif self.all is None:
                    self.all = glob
        self.name = _names_matcher(names)

    def in_folder(self, folder: bytes) -> tuple[str | None, tuple[tuple[_Match, str], ...]]:
        """Return the glob that matches all in this folder, or None and what is left to try on the file's name."""
        if self.all is not None:
            return self.all, ()
        for match, glob in self._folders:
            if match(folder):
                return glob, ()
        return None, tuple((base, glob) for match, base, glob in self._both if match(folder))


def _names_matcher(names: list[tuple[bytes, str]]) -> Callable[[bytes], str | None]:
    # Most names match nothing. An expression without groups says so several times faster than one with them (sre skips
    # branches by their first byte), so only a hit is looked at again, for the glob to name.
    if not names:
        return lambda _name: None
    plain = re.compile(b"|".join(pattern for pattern, _ in names), re.DOTALL).match
    grouped = re.compile(b"|".join(b"(" + pattern + b")" for pattern, _ in names), re.DOTALL).match
    globs = tuple(glob for _, glob in names)

    def match(name: bytes) -> str | None:
        if plain(name) is None:
            return None
        found = grouped(name)
        return None if found is None or found.lastindex is None else globs[found.lastindex - 1]

    return match


class PathFilter:
    """Say which paths pass a list of globs to include and one to exclude, and which glob decided.

    Paths are bytes. One that is not absolute and normal (empty, `.` or `..` names, a zero byte, over MAX_PATH) does not
    pass: globs cannot be trusted to see through it. What the globs say of folders is remembered for up to 4096 of them.
    One object may be used by one thread at a time.
    """

    __slots__ = ("_exclude", "_folders", "_include")

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Compile the globs. Raises GlobError."""
        self._include = _Globs(include)
        self._exclude = _Globs(exclude)
        self._folders: dict[bytes, _FolderFacts] = {}

    def decide(self, path: bytes) -> Decision:
        """Return the outcome, and the glob that excluded the path (else an empty text). Exclusion goes first."""
        cut = path.rfind(b"/") + 1
        folder = path[:cut]
        facts = self._folders.get(folder) or self._look_at(folder)
        if facts.decision is not None:
            return facts.decision
        name = path[cut:]
        if name in _NO_NAMES or b"\0" in name or len(path) > MAX_PATH:
            return _NOT_NORMAL
        glob = self._exclude.name(name)
        if glob is not None:
            return Outcome.EXCLUDED, glob
        for match, glob in facts.exclude:
            if match(name):
                return Outcome.EXCLUDED, glob
        if facts.included or self._include.name(name) is not None or any(match(name) for match, _ in facts.include):
            return _PASS
        return _NOT_INCLUDED

    def _look_at(self, folder: bytes) -> _FolderFacts:
        if not folder.startswith(b"/") or len(folder) > MAX_PATH or _NOT_NORMAL_FOLDER(folder):
            return _FolderFacts(_NOT_NORMAL, (), False, ())
        excluded, exclude = self._exclude.in_folder(folder)
        included, include = self._include.in_folder(folder)
        decision = None if excluded is None else (Outcome.EXCLUDED, excluded)
        facts = _FolderFacts(decision, exclude, included is not None, include)
        if len(folder) <= _CACHED_FOLDER_BYTES:
            if len(self._folders) >= _CACHED_FOLDERS:
                self._folders.clear()
            self._folders[folder] = facts
        return facts


@dataclass(frozen=True, slots=True)
class _FolderFacts:
    decision: Decision | None  # for every path in the folder
    exclude: tuple[tuple[_Match, str], ...]
    included: bool
    include: tuple[tuple[_Match, str], ...]


_NO_NAMES: Final = frozenset((b"", b".", b".."))
_NOT_NORMAL_FOLDER: Final = re.compile(rb"//|/\.\.?/|\0").search

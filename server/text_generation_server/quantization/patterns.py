"""Regular expressions that come with a checkpoint, matched in bounded time whatever they are. Never imports torch.

Rules about layers are written as Python's regular expressions. Backtracking takes exponential time for some, and files
are not to be trusted; here all matches are followed at once as the set of places where they can end, and what that may
cost is limited.
What cannot be matched so (references to groups, looking behind, flags) is refused; laziness changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigError

MAX_LENGTH = 1000
MAX_DEPTH = 20
# Steps for all the patterns of one list: a second or two. Usual files need a hundredth of it.
MAX_WORK = 2_000_000
MAX_COUNT = 1000

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace,
}  # fmt: skip
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}


class Work:
    """What matching may still cost."""

    def __init__(self) -> None:
        self.left = MAX_WORK

    def spend(self, pattern: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConfigError(f"pattern {pattern[:80]!r} and those before it take too long to match; use simpler ones")


class Pattern:
    """One regular expression. `where` names its place, for messages."""

    def __init__(self, text: str, where: str, work: Work):
        self.text, self._work = text, work
        if len(text) > MAX_LENGTH:
            raise ConfigError(f"{where}: a pattern of {len(text)} characters; expected at most {MAX_LENGTH}")
        self._root = _Parser(text, where).parse()

    def ends(self, name: str) -> set[int]:
        """Where in `name` a match that begins at its start can end; empty: there is none."""
        found = _Match(name, self._work, self.text).ends(self._root, 1)
        return {place for place in range(len(name) + 1) if found >> place & 1}

    def matches(self, name: str) -> bool:
        """As `re.match`: from the start, to anywhere."""
        return bool(self.ends(name))


class _Match:
    """Sets of places in one name are bits of a number."""

    def __init__(self, name: str, work: Work, pattern: str):
        self.name, self._work, self._pattern = name, work, pattern
        self._masks: dict[int, int] = {}

    def ends(self, node: _Node, starts: int) -> int:
        """Where matches end that begin at any of `starts`."""
        self._work.spend(self._pattern)
        return node.ends(self, starts)

    def places(self, node: _One | _At | _Text) -> int:
        """Every place where a condition holds."""
        if id(node) not in self._masks:
            self._masks[id(node)] = sum(1 << place for place in node.places(self.name))
        return self._masks[id(node)]


class _Node(Protocol):
    def ends(self, match: _Match, starts: int) -> int: ...


@dataclass(frozen=True, eq=False)
class _One:
    """A character."""

    accepts: Callable[[str], bool]

    def places(self, name: str) -> Iterator[int]:
        return (place for place, c in enumerate(name) if self.accepts(c))

    def ends(self, match: _Match, starts: int) -> int:
        return (starts & match.places(self)) << 1


@dataclass(frozen=True, eq=False)
class _Text:
    """Characters as they are."""

    text: str

    def places(self, name: str) -> Iterator[int]:
        place = name.find(self.text)
        while place >= 0:
            yield place
            place = name.find(self.text, place + 1)

    def ends(self, match: _Match, starts: int) -> int:
        return (starts & match.places(self)) << len(self.text)


@dataclass(frozen=True, eq=False)
class _At:
    """A condition on a place."""

    holds: Callable[[str, int], bool]

    def places(self, name: str) -> Iterator[int]:
        return (place for place in range(len(name) + 1) if self.holds(name, place))

    def ends(self, match: _Match, starts: int) -> int:
        return starts & match.places(self)


@dataclass(frozen=True, eq=False)
class _Look:
    """Whether something follows."""

    part: _Node
    wanted: bool

    def ends(self, match: _Match, starts: int) -> int:
        single = (1 << place for place in range(len(match.name) + 1) if starts >> place & 1)
        return sum(start for start in single if bool(match.ends(self.part, start)) == self.wanted)


@dataclass(frozen=True, eq=False)
class _Sequence:
    parts: list[_Node]

    def ends(self, match: _Match, starts: int) -> int:
        for part in self.parts:
            if not starts:
                break
            starts = match.ends(part, starts)
        return starts


@dataclass(frozen=True, eq=False)
class _Choice:
    options: list[_Node]

    def ends(self, match: _Match, starts: int) -> int:
        found = 0
        for option in self.options:
            found |= match.ends(option, starts)
        return found


@dataclass(frozen=True, eq=False)
class _Repeat:
    part: _Node
    least: int
    most: int | None

    def ends(self, match: _Match, starts: int) -> int:
        # More repetitions than characters consume nothing, and one of nothing is as good as many.
        enough = len(match.name) + 1
        for _ in range(min(self.least, enough)):
            starts = match.ends(self.part, starts)
        if self.part is _ANY and self.most is None:
            # From the first of them on.
            return (1 << enough) - (starts & -starts) if starts else 0
        reached = new = starts
        for _ in range(enough if self.most is None else min(self.most - self.least, enough)):
            new = match.ends(self.part, new) & ~reached
            if not new:
                break
            reached |= new
        return reached


# Names of tensors have one line.
_ANY = _One(lambda c: True)


def _is_word_boundary(name: str, at: int) -> bool:
    before, after = at > 0 and _CLASSES["w"](name[at - 1]), at < len(name) and _CLASSES["w"](name[at])
    return before != after


class _Parser:
    def __init__(self, text: str, where: str):
        self.text, self.where, self.at, self.depth = text, where, 0, 0

    def parse(self) -> _Node:
        node = self.choice()
        if self.at < len(self.text):
            raise self.error("a ')' that nothing opened")
        return node

    def error(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: pattern {self.text[:80]!r} has {what} at {self.at}; expected a regular expression of "
            "characters, classes, groups, alternatives, repetitions and (?=...) or (?!...)"
        )

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        self.at += len(text) if found else 0
        return found

    def next(self) -> str:
        if self.at >= len(self.text):
            raise self.error("an end where something must follow")
        self.at += 1
        return self.text[self.at - 1]

    def choice(self) -> _Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise self.error(f"more than {MAX_DEPTH} groups in each other")
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        self.depth -= 1
        return options[0] if len(options) == 1 else _Choice(options)

    def sequence(self) -> _Node:
        parts: list[_Node] = []
        while self.at < len(self.text) and not self.peek("|") and not self.peek(")"):
            part = self.repeated(self.atom())
            if parts and isinstance(part, _Text) and isinstance(before := parts[-1], _Text):
                parts[-1] = _Text(before.text + part.text)
            else:
                parts.append(part)
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def repeated(self, part: _Node) -> _Node:
        counts = self.counts()
        if counts is None:
            return part
        self.take("?")
        if self.peek("+") or self.counts() is not None:
            raise self.error("a repetition of a repetition")
        least, most = counts
        if least > MAX_COUNT or (most or 0) > MAX_COUNT or (most is not None and most < least):
            raise self.error("a count that is out of order or too large")
        return _Repeat(part, least, most)

    def counts(self) -> tuple[int, int | None] | None:
        for sign, counts in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self.take(sign):
                return counts
        end = self.text.find("}", self.at)
        if not self.peek("{") or end < 0:
            return None
        least, comma, most = self.text[self.at + 1 : end].partition(",")
        digits = all(part == "" or (part.isascii() and part.isdecimal() and len(part) < 6) for part in (least, most))
        if not digits or not (least or comma):
            return None  # a brace for itself, as in Python
        self.at = end + 1
        return int(least or 0), (int(least) if not comma else int(most) if most else None)

    def atom(self) -> _Node:
        c = self.next()
        match c:
            case ".":
                return _ANY
            case "^":
                return _At(lambda name, at: at == 0)
            case "$":
                return _At(lambda name, at: at == len(name))
            case "[":
                return _One(self.character_class())
            case "(":
                return self.group()
            case "\\":
                return self.escape()
            case "*" | "+" | "?" | "{":
                self.at -= 1
                if self.counts() is not None:
                    raise self.error("a repetition of nothing")
                self.at += 1
        return _Text(c)

    def group(self) -> _Node:
        look: bool | None = None
        if self.take("?=") or self.take("?!"):
            look = self.text[self.at - 1] == "="
        elif self.take("?P<"):
            self.at = self.text.find(">", self.at) + 1
            if not self.at:
                raise self.error("a group without the end of its name")
        elif self.peek("?") and not self.take("?:"):
            raise self.error(f"a group of the kind ({self.text[self.at : self.at + 3]}...)")
        node = self.choice()
        if not self.take(")"):
            raise self.error("a group without its ')'")
        return node if look is None else _Look(node, look)

    def escape(self) -> _Node:
        c = self.next()
        if c in "AZbB":
            return _At({
                "A": lambda name, at: at == 0,
                "Z": lambda name, at: at == len(name),
                "b": _is_word_boundary,
                "B": lambda name, at: not _is_word_boundary(name, at),
            }[c])  # fmt: skip
        accepts = self.one_of(c)
        return _One(accepts) if accepts is not None else _Text(self.literal(c))

    def one_of(self, c: str) -> Callable[[str], bool] | None:
        """What \\d, \\w, \\s and their opposites accept."""
        accepts = _CLASSES.get(c.lower())
        if accepts is None or c.islower():
            return accepts
        return lambda character: not accepts(character)

    def literal(self, c: str) -> str:
        if c in _CONTROL:
            return _CONTROL[c]
        if c.isascii() and c.isalnum():
            raise self.error(f"\\{c}")
        return c

    def character_class(self) -> Callable[[str], bool]:
        negated, tests, first = self.take("^"), [], True
        while first or not self.peek("]"):
            first = False
            c = self.next()
            if c == "\\":
                c = self.next()
                if (accepts := self.one_of(c)) is not None:
                    tests.append(accepts)
                    continue
                c = self.literal(c)
            if self.peek("-") and not self.peek("-]"):
                self.at += 1
                last = self.next()
                last = self.literal(self.next()) if last == "\\" else last
                if last < c:
                    raise self.error("a range that runs backwards")
                tests.append(_between(c, last))
            else:
                tests.append(c.__eq__)
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negated


def _between(first: str, last: str) -> Callable[[str], bool]:
    return lambda c: first <= c <= last

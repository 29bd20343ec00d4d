"""Matches regular expressions of files in bounded time: a nondeterministic automaton, all of whose states are
followed at once (Thompson, Regular Expression Search Algorithm, 1968)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from lowmem.errors import show

MAX_LENGTH = 2000  # characters of a pattern
MAX_STATES = 4000
MAX_REPEAT = 1000
MOST_STEPS = 10_000_000  # one or two seconds
STEPS_OF_STATE = 20  # of making one
STEPS_OF_WIDE_SET = 20_000  # of compiling a set of characters beyond ASCII: 3 ms

_TOKEN = re.compile(
    r"\((?:\?(?:P<\w+>|.))?"  # the start of a group
    r"|(?:[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\})[?+]?"  # a repetition
    r"|\[\^?\]?(?:\\.|[^]\\])*\]"  # a set of characters
    r"|\\.|.",
    re.DOTALL,
)
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>)?")
_REFUSED = re.compile(r"\(\?.*|(?:[*+?]|\{.*\})\+|\\[ABZbzxuUN0-9]", re.DOTALL)
"""Tokens that look elsewhere, have flags, are possessive, or are no single character; some are rare characters."""
_WIDE = re.compile(r"[^\0-\x7f]|\\[uUN]")
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}

_Test = Callable[[str], Any]
_Fragment = tuple[int, int]  # the states at which a part of the pattern begins and ends


class Budget:
    """How many steps matching may still take, for all patterns of a file together."""

    def __init__(self, steps: int = MOST_STEPS) -> None:
        self.steps = steps

    def spend(self, steps: int) -> None:
        """Take away some steps, or raise a ValueError if not enough are left."""
        self.steps -= steps
        if self.steps < 0:
            raise ValueError("its patterns take too long to match; name layers by their paths")


class Pattern:
    """A regular expression of Python, matched against whole texts; a ValueError if an automaton cannot hold it."""

    def __init__(self, text: str, budget: Budget) -> None:
        self._text, self._budget = text, budget
        self._silent: list[list[tuple[str, int]]] = []  # steps that read nothing: (anchor, to)
        self._reading: dict[int, tuple[_Test, int]] = {}
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        if len(text) > MAX_LENGTH:
            raise ValueError(f"pattern {show(text)} has {len(text)} characters, more than {MAX_LENGTH}")
        tokens = _TOKEN.findall(text)
        for token in tokens:
            if _REFUSED.fullmatch(token) and not _GROUP.fullmatch(token):
                self._fail(f"has {token} of Python's re, which lowmem does not match")
        budget.spend(STEPS_OF_WIDE_SET * sum(token[0] == "[" and _WIDE.search(token) is not None for token in tokens))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                re.compile(text)
            self._begin, self._end = self._alternatives(_parsed(tokens))
        except RecursionError:
            self._fail("has too many groups in each other")
        except (re.error, OverflowError) as reason:
            self._fail(f"is none: {reason}")

    def matches(self, text: str) -> bool:
        """Whether the whole of a text matches; a ValueError if the budget is spent."""
        self._budget.spend(len(text) + 1)
        states = self._closure({self._begin}, "^")
        for character in text:
            found = self._known.get((states, character))
            if found is None:
                reading = [self._reading[state] for state in states if state in self._reading]
                found = self._closure({target for test, target in reading if test(character)}, "")
                self._known[states, character] = found
            states = found
        return self._end in self._closure(states, "$" if text else "^$")

    def _closure(self, states: Iterable[int], anchors: str) -> frozenset[int]:
        """Return the states that are reached without reading, where these anchors hold."""
        found, left = set(states), list(states)
        while left:
            for anchor, target in self._silent[left.pop()]:
                if target not in found and (not anchor or anchor in anchors):
                    found.add(target)
                    left.append(target)
        self._budget.spend(len(found))
        return frozenset(found)

    def _fail(self, why: str) -> None:
        raise ValueError(f"pattern {show(self._text)} {why}; name layers by their paths")

    def _state(self) -> int:
        if len(self._silent) >= MAX_STATES:
            self._fail(f"takes more than {MAX_STATES} states")
        self._budget.spend(STEPS_OF_STATE)
        self._silent.append([])
        return len(self._silent) - 1

    def _alternatives(self, branches: list[list[Any]]) -> _Fragment:
        begin, end = self._state(), self._state()
        for sequence in branches:
            at = begin
            for part, least, most in sequence:
                at = self._repeated(at, part, least, most)
            self._silent[at].append(("", end))
        return begin, end

    def _repeated(self, at: int, part: Any, least: int, most: int | None) -> int:
        """Add a part of the pattern behind a state, and return the state behind it."""
        count = max(least, 1) if most is None else most
        if count > MAX_REPEAT:
            self._fail(f"repeats {count} times, and {MAX_REPEAT} is the most")
        first = at
        for number in range(count):  # each has states of its own
            first, last = self._single(part) if isinstance(part, str) else self._alternatives(part)
            self._silent[at].append(("", first))
            if number >= least:
                self._silent[at].append(("", last))
            at = last
        if most is None:
            self._silent[at].append(("", first))
        return at

    def _single(self, token: str) -> _Fragment:
        begin, end = self._state(), self._state()
        if token in ("^", "$"):
            self._silent[begin].append((token, end))
        else:
            single = re.compile(token) if token[0] in "\\[." else None  # its own class of characters
            self._reading[begin] = token.__eq__ if single is None else single.fullmatch, end
        return begin, end


def _parsed(tokens: Iterable[str]) -> list[list[Any]]:
    """Return the alternatives of a valid pattern: lists of (token or inner alternatives, least and most times)."""
    groups: list[list[list[Any]]] = [[[]]]
    for token in tokens:
        if _GROUP.fullmatch(token):
            groups.append([[]])
        elif token == "|":
            groups[-1].append([])
        elif token == ")":
            inner = groups.pop()
            groups[-1][-1].append((inner, 1, 1))
        elif token[0] in _REPEATS or (token[0] == "{" and len(token) > 1):
            part, _, _ = groups[-1][-1].pop()  # as few as possible, or as many: the same texts match
            groups[-1][-1].append((part, *(_REPEATS.get(token[0]) or _counts(token))))
        else:
            groups[-1][-1].append((token, 1, 1))
    return groups[0]


def _counts(token: str) -> tuple[int, int | None]:
    """Return the least and the most times of ``{least,most}``."""
    least, comma, most = token.strip("{}?").partition(",")
    return int(least or 0), int(most) if most else None if comma else int(least)

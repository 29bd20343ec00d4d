"""Matches regular expressions of files in bounded time.

PEFT's configs name layers by regular expressions of Python. Python's own matcher takes exponential time for some of
them, and a file may have been made to do so. Here a pattern is a nondeterministic automaton, of which all states are
followed at once: the time is proportional to the length of the text times the number of states (Thompson, Regular
Expression Search Algorithm, 1968). Sets of states that were met before are remembered.

What such an automaton cannot hold is refused by name: references to groups, looking ahead or behind, flags.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from lowmem.errors import show

__all__ = ["MAX_LENGTH", "Budget", "Pattern"]

MAX_LENGTH = 2000  # characters of a pattern
MAX_STATES = 4000
MAX_DEPTH = 40  # groups in groups
MAX_REPEAT = 1000
MOST_STEPS = 10_000_000  # one or two seconds
STEPS_OF_STATE = 20  # of making one

_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_COUNT = re.compile(r"\{(\d{0,9})(,(\d{0,9}))?\}", re.ASCII)

_Test = Callable[[str], bool]
_Fragment = tuple[int, int]  # the states at which a part of the pattern begins and ends


class Budget:
    """How many steps matching may still take, for all patterns of a file together."""

    def __init__(self, steps: int = MOST_STEPS) -> None:
        self.steps = steps

    def spend(self, steps: int) -> None:
        """Take away some steps.

        Raises:
            ValueError: none are left.
        """
        self.steps -= steps
        if self.steps < 0:
            raise ValueError("its patterns take too long to match; name layers by their paths")


class Pattern:
    """A regular expression, which is matched against whole texts.

    Args:
        text: of the pattern, in the syntax of Python's ``re``.
        budget: what matching may take.

    Raises:
        ValueError: it is no pattern, too large, or has what takes more than an automaton.
    """

    def __init__(self, text: str, budget: Budget) -> None:
        self._text, self._at, self._depth, self._budget = text, 0, 0, budget
        self._silent: list[list[tuple[str, int]]] = []  # steps that read nothing: (anchor, to)
        self._reading: dict[int, tuple[_Test, int]] = {}
        if len(text) > MAX_LENGTH:
            raise ValueError(f"pattern {show(text)} has {len(text)} characters, more than {MAX_LENGTH}")
        self._begin, self._end = self._alternatives()
        if self._at < len(text):
            self._fail("has a parenthesis that closes nothing")
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, text: str) -> bool:
        """Whether the whole of a text matches.

        Raises:
            ValueError: the budget is spent.
        """
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

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        if self._at >= len(self._text):
            self._fail("ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _alternatives(self) -> _Fragment:
        begin, end = self._state(), self._state()
        while True:
            first, last = self._sequence()
            self._silent[begin].append(("", first))
            self._silent[last].append(("", end))
            if self._next() != "|":
                return begin, end
            self._at += 1

    def _sequence(self) -> _Fragment:
        begin = end = self._state()
        while self._next() not in ("", "|", ")"):
            first, last = self._repeated()
            self._silent[end].append(("", first))
            end = last
        return begin, end

    def _repeated(self) -> _Fragment:
        start = self._at
        part = self._atom()
        stop = self._at
        counts = self._counts()
        if counts is None:
            return part
        if self._next() == "?":  # as few as possible: the same texts match
            self._at += 1
        after = self._at
        if (self._next() and self._next() in "*+?") or self._counts() is not None:
            self._fail("repeats a repetition")
        least, most = counts
        begin = end = self._state()
        for number in range(max(least, 1) if most is None else most):
            if number:  # the first one is read; others are read again, since each has states of its own
                self._at = start
                part = self._atom()
                assert self._at == stop
            first, last = part
            self._silent[end].append(("", first))
            if number >= least:
                self._silent[end].append(("", last))
            end = last
        if most is None:
            self._silent[end].append(("", part[0]))
        self._at = after
        return begin, end

    def _counts(self) -> tuple[int, int | None] | None:
        """Read how often something is repeated; None: once, and nothing was read."""
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if (found := simple.get(self._next())) is not None:
            self._at += 1
            return found
        counted = _COUNT.match(self._text, self._at)
        if counted is None or counted[0] == "{}":
            return None
        self._at = counted.end()
        least = int(counted[1] or 0)
        most = (int(counted[3]) if counted[3] else None) if counted[2] else least
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            self._fail(f"repeats {counted[0]} times, and {MAX_REPEAT} is the most")
        return least, most

    def _atom(self) -> _Fragment:
        character = self._take()
        if character == "(":
            return self._group()
        if character in "^$":
            begin, end = self._state(), self._state()
            self._silent[begin].append((character, end))
            return begin, end
        if character in "*+?":
            self._fail("repeats nothing")
        if character == ".":
            return self._reads(lambda c: c != "\n")
        if character == "[":
            return self._reads(self._set())
        return self._reads(self._escaped() if character == "\\" else character.__eq__)

    def _reads(self, test: _Test) -> _Fragment:
        begin, end = self._state(), self._state()
        self._reading[begin] = test, end
        return begin, end

    def _group(self) -> _Fragment:
        if self._next() == "?":
            named = re.compile(r"\?(:|P<[A-Za-z_]\w*>)").match(self._text, self._at)
            if named is None:
                self._fail("has a group with ?, which lowmem does not match")
            else:
                self._at = named.end()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"has more than {MAX_DEPTH} groups in each other")
        found = self._alternatives()
        self._depth -= 1
        if self._next() != ")":
            self._fail("has a parenthesis that is not closed")
        self._at += 1
        return found

    def _escaped(self) -> _Test:
        character = self._take()
        if character.lower() in _CLASSES:
            test = _CLASSES[character.lower()]
            return test if character.islower() else lambda c: not test(c)
        if character in _CONTROLS:
            return _CONTROLS[character].__eq__
        if character.isalnum():
            self._fail(f"has \\{character}, which lowmem does not match")
        return character.__eq__

    def _set(self) -> _Test:
        inverted = self._next() == "^"
        self._at += inverted
        tests: list[_Test] = []
        first = True
        while first or self._next() != "]":
            first = False
            low = self._take()
            if low == "\\":
                known = self._next()
                test = self._escaped()
                if known.lower() in _CLASSES:
                    tests.append(test)
                    continue
                low = _CONTROLS.get(known, known)
            if self._next() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._take()
                if high == "\\":
                    high = self._take()
                    if high.isalnum() and high not in _CONTROLS:
                        self._fail(f"has a range up to \\{high}")
                    high = _CONTROLS.get(high, high)
                if high < low:
                    self._fail(f"has the range {show(f'{low}-{high}')}, which is empty")
                tests.append(lambda c, low=low, high=high: low <= c <= high)  # type: ignore[misc]
            else:
                tests.append(low.__eq__)
        self._at += 1
        return lambda c: any(test(c) for test in tests) != inverted

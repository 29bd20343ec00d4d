"""Matches regular expressions of files in bounded time: a nondeterministic automaton, all of whose states are
followed at once (Thompson, Regular Expression Search Algorithm, 1968)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from re import _constants as kinds  # type: ignore[attr-defined]  # public in no version of Python
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lowmem.errors import show

MAX_LENGTH = 2000  # characters of a pattern
MAX_STATES = 4000
MAX_REPEAT = 1000
MOST_STEPS = 10_000_000  # one or two seconds
STEPS_OF_STATE = 20  # of making one

_Test = Callable[[str], bool]
_Fragment = tuple[int, int]  # the states at which a part of the pattern begins and ends

_CLASSES: dict[Any, _Test] = {
    kinds.CATEGORY_DIGIT: str.isdecimal,
    kinds.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    kinds.CATEGORY_SPACE: str.isspace,
    kinds.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    kinds.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    kinds.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}
_ANCHORS = {kinds.AT_BEGINNING: "^", kinds.AT_END: "$"}


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
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read otherwise
                parsed = _parser.parse(text)
            self._begin, self._end = self._sequence(parsed)
        except RecursionError:
            self._fail("has too many groups in each other")
        except (re.error, OverflowError) as reason:
            self._fail(f"is none: {reason}")
        if parsed.state.flags & ~re.UNICODE:
            self._fail("has flags, which lowmem does not match")

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

    def _sequence(self, parts: Iterable[tuple[Any, Any]]) -> _Fragment:
        found = [self._part(kind, value) for kind, value in parts]
        for (_, end), (begin, _) in pairwise(found):
            self._silent[end].append(("", begin))
        if found:
            return found[0][0], found[-1][1]
        return (only := self._state()), only

    def _part(self, kind: Any, value: Any) -> _Fragment:
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):  # as few as possible: the same texts match
            return self._repeated(*value)
        if kind is kinds.SUBPATTERN and not any(value[1:3]):  # without flags
            return self._sequence(value[3])
        begin, end = self._state(), self._state()
        if kind is kinds.BRANCH:
            for parts in value[1]:
                first, last = self._sequence(parts)
                self._silent[begin].append(("", first))
                self._silent[last].append(("", end))
        elif kind is kinds.AT and value in _ANCHORS:
            self._silent[begin].append((_ANCHORS[value], end))
        elif (test := _test_of(kind, value)) is not None:
            self._reading[begin] = test, end
        else:
            self._fail(f"has {value if kind is kinds.AT else kind} of Python's re, which lowmem does not match")
        return begin, end

    def _repeated(self, least: int, most: int, parts: Any) -> _Fragment:
        is_open = most == kinds.MAXREPEAT
        count = max(least, 1) if is_open else most
        if count > MAX_REPEAT:
            self._fail(f"repeats {count} times, and {MAX_REPEAT} is the most")
        begin = end = first = self._state()
        for number in range(count):  # each has states of its own
            first, last = self._sequence(parts)
            self._silent[end].append(("", first))
            if number >= least:
                self._silent[end].append(("", last))
            end = last
        if is_open:
            self._silent[end].append(("", first))
        return begin, end


def _test_of(kind: Any, value: Any) -> _Test | None:
    """Return the test of a part of a pattern that reads one character, or None."""
    if kind is kinds.IN:
        inverted = value[0][0] is kinds.NEGATE
        tests = [_test_of(*one) for one in value[inverted:]]
        return lambda c: any(test is not None and test(c) for test in tests) != inverted
    if kind is kinds.RANGE:
        return lambda c: value[0] <= ord(c) <= value[1]
    if kind is kinds.CATEGORY:
        return _CLASSES[value]
    tested: dict[Any, _Test] = {
        kinds.LITERAL: lambda c: ord(c) == value,
        kinds.NOT_LITERAL: lambda c: ord(c) != value,
        kinds.ANY: lambda c: c != "\n",
    }
    return tested.get(kind)

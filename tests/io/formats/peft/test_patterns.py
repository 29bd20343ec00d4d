"""Patterns match what Python's own do, and those that take it exponential time are matched as fast as others."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem.io.formats.peft.patterns import Budget, Pattern
from tests.selection import rows_in_one_case

ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c0-2]", r"\d", r"\W", r"[\w.]", "^", "$", "é", "{", "-"]
)


def composed(inner):
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,}", "{,2}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    )


PATTERNS = st.recursive(ATOMS, composed, max_leaves=8)


@given(PATTERNS, st.lists(st.text("ab.c1é{-", max_size=6), min_size=1, max_size=5))
@example(r"a\+(?:b\{2})+?[+]", ["a+b{2+", "a+b{2b{2+", "aab{2+"])
@example("a|", ["", "a"])
@example("a^b|a$b|(^a|b)*c", ["ab", "bac", "abc", "ac"])
@example(r"ab|ac|\D[^\W\d]\S\s", ["ab", "ac", "ada ", "1da "])
@example("(?P<n>a{2,3})b{0}", ["aa", "aaaa", "aab"])
@example("(a?){3}b", ["aab", "aaaab"])
@example(r"[]a-][\]^-]", ["]^", "-]", "a-"])
@example("a{,}b{}c{x", ["ab{}c{x", "aab{}c{x"])
@example(r"(^|.*\.)x$", ["x", "a.x", "ax"])
def test_the_same_texts_match_as_by_re(pattern, texts):
    found = Pattern(pattern, Budget())
    for text in texts:
        assert found.matches(text) == (re.fullmatch(pattern, text) is not None), (pattern, text)


def test_what_python_warns_of_is_matched_without_a_warning():
    assert Pattern("[[a]", Budget()).matches("[")


def test_what_is_exponential_elsewhere_takes_no_longer():
    budget = Budget()
    for pattern in ("(a*)*b", "(a|a)*b", "(a+)+b", "(.*.*.*.*.*.*)x", "(a?){30}a{30}b"):
        assert not Pattern(pattern, budget).matches("a" * 60)
    assert budget.steps > 9_900_000


def test_the_budget_ends_what_would_take_long():
    budget = Budget(10_000)
    pattern = Pattern("(.*a.{200})", budget)
    assert budget.steps < 10_000  # reading one takes some
    with pytest.raises(ValueError, match="take too long to match"):
        Pattern("[\0-\U0010ffff]" * 400, Budget(5_000_000))  # which takes Python a second to compile
    texts = (f"{number:020b}".replace("0", "b").replace("1", "a") * 20 for number in range(2**20))
    with pytest.raises(ValueError, match="take too long to match; name layers by their paths"):
        any(pattern.matches(text) for text in texts)


@rows_in_one_case(
    ("pattern", "why"),
    [
        ("(", "is none: missing \\), unterminated subpattern at position 0"),
        ("(" * 900 + ")" * 900, "too many groups"),
        (")", "is none: unbalanced parenthesis"),
        ("a**", "is none: multiple repeat"),
        ("a{1001}", "repeats 1001 times, and 1000 is the most"),
        ("a{99999999999}", "is none: the repetition number is too large"),
        ("(a{1000}){1000}", "more than 4000 states"),
        ("[b-a]", "is none: bad character range"),
        (r"(a)\1", r"has \\1 of Python's re, which lowmem does not match; name layers by their paths"),
        ("(?=a)", r"has \(\?= of"),
        ("a*+", r"has \*\+ of"),
        ("(?i)a", r"has \(\?i of"),
        ("(?i:a)", r"has \(\?i of"),
        ("(?P<a>b)(?P=a)", r"has \(\?P of"),
        (r"\bq", r"has \\b of"),
        ("a" * 2001, "2001 characters"),
    ],
)
def test_other_patterns_are_refused_by_name(pattern, why):
    with pytest.raises(ValueError, match=why):
        Pattern(pattern, Budget())

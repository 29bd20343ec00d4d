"""Public names stay: of the API, the options, JSON, files and the plugin."""

import json

import pytest

from tests.public_names import FILE, keys_of, public_names


@pytest.fixture(scope="module")
def found():
    return public_names()


@pytest.mark.parametrize("place", json.loads(FILE.read_text(encoding="utf8")))
def test_names_that_users_rely_on_are_those_that_are_stored(found, place):
    """A name that is to change is changed in the file, too, with a line in the change log."""
    assert found[place] == json.loads(FILE.read_text(encoding="utf8"))[place]


def test_every_place_is_stored(found):
    assert set(found) == set(json.loads(FILE.read_text(encoding="utf8")))


def test_keys_are_those_of_all_nested_objects():
    assert keys_of({"a": [{"c": 1}, {"b": {"d": None}}], "e": "f"}) == ["a", "b", "c", "d", "e"]

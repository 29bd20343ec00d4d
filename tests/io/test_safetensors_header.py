"""A header says what a file holds, and nothing that is not so gets through."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem.io.safetensors_header import (
    DTYPES,
    MAX_HEADER,
    TensorEntry,
    TensorSpec,
    encode_header_with_length,
    parse_metadata_and_entries,
    parse_strict_json,
    specs_and_offsets_in_file_order,
)
from tests.strategies import names

specs = st.builds(
    TensorSpec, st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=4).map(tuple)
)


@given(st.dictionaries(names, specs), st.dictionaries(st.text(), st.text()))
@example({"a": TensorSpec(torch.bool, ()), "b": TensorSpec(torch.bool, ())}, {})
def test_a_header_comes_back_and_every_tensor_is_aligned(specs, metadata):
    tensors = specs_and_offsets_in_file_order(specs)
    start = encode_header_with_length(metadata, specs)
    size = sum(spec.nbytes for spec in specs.values())
    assert len(start) % 64 == 0
    assert parse_metadata_and_entries(start[8:], size) == (metadata, tensors)
    assert int.from_bytes(start[:8], "little") == len(start) - 8
    for placed in tensors.values():
        nbytes = placed.spec.nbytes
        assert placed.begin % max(nbytes & -nbytes, 1) == 0
    for wrong in (size - 1, size + 1):
        with pytest.raises(ValueError, match="the tensors take"):
            parse_metadata_and_entries(start[8:], wrong)


def test_tensors_are_sorted_by_the_alignment_of_their_bytes_then_by_name():
    specs = {
        "b": TensorSpec(torch.int8, (3,)),
        "a": TensorSpec(torch.float16, (1,)),
        "z": TensorSpec(torch.float32, ()),
        "c": TensorSpec(torch.uint8, (12,)),
        "é": TensorSpec(torch.float32, (0,)),
    }
    order = [("c", 0), ("z", 12), ("a", 16), ("b", 18), ("é", 21)]
    assert [(name, placed.begin) for name, placed in specs_and_offsets_in_file_order(specs).items()] == order


def test_entries_stand_in_any_order_in_a_header():
    full = {"dtype": "U8", "shape": [6], "data_offsets": [0, 6]}
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    last = {"dtype": "U8", "shape": [0], "data_offsets": [6, 6]}
    content = {"last": last, "full": full, "empty": empty}
    assert list(parse_metadata_and_entries(json.dumps(content).encode(), 6)[1]) == ["last", "full", "empty"]


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HALVES = {"a": {**ENTRY, "shape": [3], "data_offsets": [0, 12]}, "b": {**ENTRY, "shape": [3]}}


MISTAKES = [
    ([], r"the header is \[\]"),
    ({"__metadata__": None}, "the metadata is None"),
    ({"__metadata__": {"a": 1}}, "the metadata is {'a': 1}"),
    ({"a": 1}, "tensor 'a' is 1"),
    ({"a": {"dtype": "F32", "shape": [6]}}, "tensor 'a' is {"),
    ({"a": {**ENTRY, "more": 1}}, "tensor 'a' is {"),
    ({"a": {**ENTRY, "dtype": "F31"}}, "tensor 'a' has dtype 'F31', which is none of BOOL, U8"),
    ({"a": {**ENTRY, "dtype": ["F32"]}}, "tensor 'a' has dtype"),
    ({"a": {**ENTRY, "shape": 6}}, "the shape of tensor 'a' is 6"),
    ({"a": {**ENTRY, "shape": [6.0]}}, r"tensor 'a': shape=\(6.0,\) must be at most 64 sizes"),
    ({"a": {**ENTRY, "shape": [True, 6]}}, "must be at most 64 sizes that are 0 or more"),
    ({"a": {**ENTRY, "shape": [-2, -3]}}, "must be at most 64 sizes that are 0 or more"),
    ({"a": {**ENTRY, "shape": [1] * 63 + [2, 3]}}, "must be at most 64 sizes that are 0 or more"),
    ({"a": {**ENTRY, "shape": [2**40, 2**40]}}, "is more than any memory holds"),
    ({"a": {**ENTRY, "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, "is more than any memory holds"),
    ({"a": {**ENTRY, "shape": [2**62]}}, "is more than any memory holds"),
    ({"a": {**ENTRY, "data_offsets": [0]}}, r"the place of tensor 'a' is \[0\]"),
    ({"a": {**ENTRY, "data_offsets": [0, 24.0]}}, "the place of tensor 'a' is"),
    ({"a": {**ENTRY, "data_offsets": [False, 24]}}, "the place of tensor 'a' is"),
    ({"a": {**ENTRY, "data_offsets": [-24, 0]}}, "the place of tensor 'a' is"),
    ({"a": {**ENTRY, "data_offsets": [24, 0]}}, "tensor 'a' has -24 bytes, and its shape takes 24"),
    ({"a": {**ENTRY, "shape": [2, 2]}}, "tensor 'a' has 24 bytes, and its shape takes 16"),
    ({"a": {**ENTRY, "data_offsets": [24, 48]}}, "tensor 'a' begins at 24, not at 0: there is a gap"),
    ({"a": ENTRY, "b": ENTRY}, "tensor 'b' begins at 0, not at 24: there is an overlap"),
    ({"b": HALVES["a"], "a": {**HALVES["b"], "data_offsets": [8, 20]}}, "'a' begins at 8, not at 12"),
    ({"a": HALVES["a"]}, "the tensors take 12 bytes, and 24 are there"),
    ({}, "the tensors take 0 bytes, and 24 are there"),
]


def test_what_is_not_so_is_refused():
    assert parse_metadata_and_entries(json.dumps({"a": ENTRY}).encode(), 24)[1] == {
        "a": TensorEntry(TensorSpec(torch.float32, (2, 3)), 0)
    }
    for content, reason in MISTAKES:
        with pytest.raises(ValueError, match=reason):
            parse_metadata_and_entries(json.dumps(content).encode(), 24)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 1}', "a name twice"),
        (b'{"a": {"b": 1, "b": 2}}', "a name twice"),
        (b"[" * 10**6, "nested too deeply"),
        (b"[" * 10**6 + b"]" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**6, "nested too deeply"),
        (b"[NaN]", "a NaN"),
        (b"[-Infinity]", "a -Infinity"),
        (b"[1e999]", "a number that is too large: 1e999"),
        (b"[-1" + b"0" * 10**6 + b".0]", "a number that is too large: -100000"),
        (b"9" * 10**6, "a number of 1000000 digits"),
        (b'"\\ud800"', "no UTF-8"),
        (b'{"\\udc00": 1}', "no UTF-8"),
        (b'"\xff"', "no UTF-8"),
        (b"", "broken at character 0"),
        (b"{} {}", "broken at character 3"),
        (b"{'a': 1}", "broken at character 1"),
    ],
)
def test_json_is_what_it_seems(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_strict_json(text)


def test_what_cannot_be_stored_is_named():
    spec = TensorSpec(torch.float32, (1,))
    for name in ("__metadata__", 1):
        with pytest.raises(ValueError, match=f"a tensor cannot be called {name!r} in a safetensors file; rename it"):
            encode_header_with_length({}, {name: spec})
    with pytest.raises(ValueError, match=r"text='\\ud800.* is no Unicode; rename the tensor"):
        encode_header_with_length({}, {"\ud800": spec})
    with pytest.raises(ValueError, match=f"more than {MAX_HEADER}; store fewer tensors in a file"):
        encode_header_with_length({"a": "x" * MAX_HEADER}, {})
    with pytest.raises(
        ValueError, match="dtype=torch.complex128 cannot be stored; convert the tensor to one of BOOL"
    ):
        TensorSpec(torch.complex128, (1,))

"""The container of GGUF: what is written is what the reader finds."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem.io.formats.gguf.gguf_file import GGUFTensorInfo, encode_metadata_field, write_new_gguf_file
from tests.io.formats.written import header_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOATS = st.floats(width=32, allow_nan=False)
VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    FLOATS,
    TEXTS,
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    st.lists(FLOATS, min_size=1, max_size=5),
)


@given(values=st.dictionaries(TEXTS.filter(bool), VALUES, max_size=5))
def test_fields_are_read_back(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    values.pop("general.alignment", None)
    tensors = [GGUFTensorInfo("a", (2, 3), 1), GGUFTensorInfo("b", (1, 32), 2), GGUFTensorInfo("c", (5,), 0)]
    contents = {one.name: torch.randint(0, 256, (one.nbytes,), dtype=torch.uint8) for one in tensors}
    write_new_gguf_file(
        path, {key: encode_metadata_field(key, value) for key, value in values.items()}, tensors, contents.items()
    )
    header = header_of(path)
    assert header.metadata == values
    raw = path.read_bytes()
    for one in tensors:
        found = header.tensors[one.name]
        assert (found.shape, found.type, found.begin % 32) == (one.shape, one.type, 0)
        assert raw[found.begin : found.begin + one.nbytes] == contents[one.name].numpy().tobytes()
    for key, place in header.field_slices.items():
        assert raw[place] == encode_metadata_field(key, values[key])


def test_an_array_of_texts_and_what_no_type_holds():
    assert (
        encode_metadata_field("k", ["a", "é"])[9:]
        == struct.pack("<IIQQ", 9, 8, 2, 1) + b"a" + struct.pack("<Q", 2) + "é".encode()
    )
    assert encode_metadata_field("k", [])[9:] == struct.pack("<IIQ", 9, 8, 0)
    for value in (2**32, -1, [2**31], "\ud800", 1e40):
        with pytest.raises(ValueError, match="k="):
            encode_metadata_field("k", value)


def test_another_tensor_than_the_next_one_leaves_no_file(tmp_path):
    tensors = [GGUFTensorInfo("a", (4,), 0), GGUFTensorInfo("b", (4,), 0)]
    right, short = torch.zeros(16, dtype=torch.uint8), torch.zeros(15, dtype=torch.uint8)
    for contents in ([], [("a", right)], [("b", right), ("a", right)], [("a", short)], [("a", right)] * 3):
        with pytest.raises(ValueError, match=r"did not come|came"):
            write_new_gguf_file(tmp_path / "a.gguf", {}, tensors, contents)
        assert list(tmp_path.iterdir()) == []

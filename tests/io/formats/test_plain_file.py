"""A plain safetensors file: what the package safetensors reads, with bytes that depend on the tensors alone."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from lowmem.io.container import TensorSpec, bytes_of
from lowmem.io.formats.plain_file import write_plain
from tests import strategies
from tests.io.test_container import LIBRARY_DTYPES

TENSORS = strategies.tensors().filter(lambda t: not t.is_conj() and t.dtype in LIBRARY_DTYPES)


@given(st.dictionaries(strategies.names, TENSORS, max_size=4))
def test_any_tensors_are_read_back_and_the_order_of_writing_changes_nothing(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("plain") / "a.safetensors"
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    digests = set()
    for order in itertools.islice(itertools.permutations(tensors.items()), 3):
        write_plain(path, dict(reversed(specs.items())) if digests else specs, order)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert bytes(bytes_of(found[name])) == bytes(bytes_of(tensor))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_differs_from_the_specs_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.uint8, (1,))}
    tensors = {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.uint8)}
    write_plain(path, specs, tensors.items())
    before = path.read_bytes()
    for wrong, why in (
        ([("a", torch.ones(2))], "1 tensors did not come"),
        ([("b", tensors["b"]), ("a", torch.ones(3))], "specs say"),
        ([*tensors.items(), ("a", torch.ones(2))], "specs say"),
        ([("c", torch.ones(2))], "specs say None"),
    ):
        with pytest.raises(ValueError, match=why):
            write_plain(path, specs, wrong)
        assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]

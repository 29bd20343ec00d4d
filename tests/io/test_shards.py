"""A model in several files: all of them or none, and no byte of the index counts for nothing."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowmem import FourBit, load
from lowmem.errors import FileError
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.io.lowmem_file import verify_and_map_file, write_tensors_returning_digest
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import (
    encode_shard_index,
    parse_weight_map,
    read_weight_map,
    sorted_weight_names_per_shard,
    verify_and_map_lowmem_model,
)
from tests.models import INDICES, Small


@pytest.fixture
def sharded(tmp_path):
    """A converted checkpoint in several files: its index."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = {name: value.clone() for name, value in Small().state_dict().items() if "again" not in name}
    save_file(state, tmp_path / "dense.safetensors")
    convert_checkpoint(tmp_path / "dense.safetensors", tmp_path / "m.safetensors", FourBit(), shard_bytes=2000)
    return tmp_path / "m.safetensors.index.json"


def test_an_index_is_one_that_other_libraries_read(sharded):
    content = json.loads(sharded.read_text())
    files = set(content["weight_map"].values())
    assert len(files) > 1
    assert files == {path.name for path in sharded.parent.glob("m-*.safetensors")}
    assert content["metadata"]["total_size"] == sum(
        t.nbytes for t in verify_and_map_lowmem_model(sharded).tensors.values()
    )
    assert read_weight_map(sharded) == content["weight_map"]
    assert load(sharded, Small)(INDICES).isfinite().all()


def test_a_missing_damaged_or_exchanged_shard_is_named(sharded):
    first, second, *_ = sorted(sharded.parent.glob("m-*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileError, match=f"{first.name}.*damaged"):
        load(sharded, Small)
    first.write_bytes(second.read_bytes())
    with pytest.raises(FileError, match="does not describe the files"):
        load(sharded, Small)
    first.unlink()
    with pytest.raises(OSError, match=first.name):
        load(sharded, Small)


@given(st.data())
def test_any_changed_byte_of_an_index_is_refused(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("index")
    write_tensors_returning_digest(directory / "a", {"x": torch.ones(2)}, {"kind": "model", "layers": {}})
    (directory / "i.index.json").write_bytes(
        encode_shard_index({"a": (verify_and_map_file(directory / "a").sha256, {"x": 8})})
    )
    assert verify_and_map_lowmem_model(directory / "i.index.json").tensors["x"].sum() == 2
    text = bytearray((directory / "i.index.json").read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (directory / "i.index.json").write_bytes(text)
    with pytest.raises((FileError, OSError)):  # a file of another name is not there
        verify_and_map_lowmem_model(directory / "i.index.json")


NO_INDEX = [
    b"",
    b"[]",
    b"{}",
    b'{"weight_map": {}}',
    b'{"weight_map": [["a", "b"]]}',
    b'{"weight_map": null}',
    b'{"weight_map": {"a": null}}',
    b'{"weight_map": {"a": ["b"]}}',
    b'{"weight_map": {"\\u001b[2J\\n": "\\u001b[2J/"}}',
    b'{"weight_map": {"a": "%s/"}}' % (b"x" * 10**5),
    b'{"weight_map": {"a": "%s"}}' % (b"x" * 256),
    b'{"weight_map": {"a": "%s"}}' % ("é" * 128).encode(),
    b'{"weight_map": {"a": "../b"}}',
    rb'{"weight_map": {"a": "..\\b"}}',
    b'{"weight_map": {"a": "/etc/passwd"}}',
    b'{"weight_map": {"a": ".."}}',
]


def test_what_is_no_index_is_refused(tmp_path):
    for text in NO_INDEX:
        with pytest.raises(FileError, match="i.index.json") as caught:
            parse_weight_map(tmp_path / "i.index.json", text)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "more", [{"layers": {"x": 1}}, {"tensors": {"w": torch.ones(2)}}, {"adapters": {}}, {"b": 1}]
)
def test_files_of_one_index_have_nothing_in_common(more, tmp_path):
    """Whatever the digests in the index say."""
    first = {"layers": {"x": 1}, "tensors": {"u": torch.ones(2), "w": torch.ones(2)}}
    second = {"layers": {}, "tensors": {}, **more}
    second["tensors"] = {"v": torch.ones(2), **second["tensors"]}
    shards = {}
    for name, metadata in (("a", first), ("b", second)):
        tensors = metadata.pop("tensors")
        digest = write_tensors_returning_digest(tmp_path / name, tensors, {"kind": "model", **metadata})
        shards[name] = digest, {key: tensor.nbytes for key, tensor in tensors.items()}
    (tmp_path / "i.index.json").write_bytes(encode_shard_index(shards))
    with pytest.raises(FileError, match="two of them have '(w|x)'|with adapters, and no part|'b', which is unknown"):
        verify_and_map_lowmem_model(tmp_path / "i.index.json")


def test_a_shard_takes_as_many_tensors_as_fit():
    sizes = {"a": 10, "b": 10, "c": 10, "d": 25, "e": 5, "f": 1}
    plan = {name: {name: TensorSpec(torch.uint8, (size,))} for name, size in sizes.items()}
    assert sorted_weight_names_per_shard(plan, 30) == [["a", "b", "c"], ["d", "e"], ["f"]]

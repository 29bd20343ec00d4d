"""Folders with packed linear layers: what is packed, what is dense, what is copied, and what is refused.

``tests/formats/test_export.py`` loads them with the real packages.
"""

import hashlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from lowmem import quantize, save
from lowmem.errors import FileError
from lowmem.io.formats import bitsandbytes, compressed_tensors, quantized_folder_export
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from lowmem.io.formats.transformers_architecture import Architecture
from tests.io.formats.folders import write_folder

DTYPE = torch.bfloat16

write_bitsandbytes, write_compressed_tensors = (
    partial(quantized_folder_export.export_quantized_folder, one.PACKING)
    for one in (bitsandbytes, compressed_tensors)
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.flatten(1)


WEIGHTS = {
    "embed.weight": quantize(random(20, 64), "bof4s"),
    "a.weight": quantize(random(16, 64), "nf4"),
    "a.bias": random(16).to(DTYPE),
    "b.weight": quantize(random(8, 96), "nf4", scales="float16"),
    "left.weight": random(8, 64).to(DTYPE),
    "kept.weight": quantize(random(8, 64), "nf4"),
    "experts.up": quantize(random(3, 8, 33), "nf4"),  # rows of an odd length
    "conv.weight": quantize(flat(random(4, 3, 3, 3)), "nf4"),
    "buffer": torch.tensor([3]),
}
SHAPES = {
    **{name: tuple(weight.shape) for name, weight in WEIGHTS.items() if name != "buffer"},
    "conv.weight": (4, 3, 3, 3),
    "head.weight": (20, 64),
}
ARCHITECTURE = Architecture(
    DTYPE,
    {"a": "linear", "b": "linear", "left": "linear", "kept": "linear", "head": "linear"},
    frozenset({"kept", "head"}),
    SHAPES,
    {name: torch.float32 if name == "kept.weight" else DTYPE for name in SHAPES},
    frozenset({"head.weight"}),
)


def write_stored(folder, weights, **config):
    return write_folder(folder, weights, {"architectures": ["Made"], **config})


@pytest.fixture
def made(monkeypatch):
    """Let folders have the model of these weights, which transformers does not know."""

    def use(architecture: Architecture = ARCHITECTURE) -> None:
        monkeypatch.setattr(quantized_folder_export, "architecture_from_config", lambda folder, config: architecture)

    use()
    return use


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_a_table_in_8_bits_with_rows_of_an_odd_length_is_written_dense(tmp_path, made):
    table = quantize(random(20, 33), "int8")
    shapes = {**SHAPES, "table.weight": (20, 33)}
    made(replace(ARCHITECTURE, shapes=shapes, dtypes={**ARCHITECTURE.dtypes, "table.weight": DTYPE}))
    source = write_stored(tmp_path / "in", {**WEIGHTS, "table.weight": table}, dtype="bfloat16")
    write_bitsandbytes(source, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["table.weight"]
    assert torch.equal(written, table.dequantize(DTYPE))


def test_layers_are_packed_the_rest_is_dense_and_other_files_are_copied(tmp_path, made):
    source = write_stored(tmp_path / "in", WEIGHTS, dtype="bfloat16")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text("[]")
    (source / "old.bin").write_bytes(b"weights")
    rows = write_bitsandbytes(source, tmp_path / "out")
    assert [row.name for row in rows] == sorted(WEIGHTS)
    assert {row.error for row in rows} == {None}
    kinds = {row.name: row.kind for row in rows}
    assert kinds["a.weight"] == "nf4, blocksize=64"
    assert kinds["b.weight"] == "nf4, blocksize=32"
    assert kinds["kept.weight"] == "float32"
    assert {kinds[name] for name in ("embed.weight", "left.weight", "experts.up", "conv.weight")} == {"bfloat16"}
    copied = {"generation_config.json", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", *copied}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Made"]
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["left", "kept", "head"]
    with open_foreign_checkpoint(tmp_path / "out") as file:
        assert file.tensors.keys() == WEIGHTS.keys()
        for name, tensor in file.tensors.items():
            found, before = tensor.read(), WEIGHTS[name]
            if isinstance(before, torch.Tensor):
                assert torch.equal(found, before)
            elif isinstance(found, torch.Tensor):
                assert torch.equal(found, before.dequantize(found.dtype).view(SHAPES[name]))
            else:
                assert torch.equal(found.dequantize(), before.dequantize())
    write_bitsandbytes(source, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_shards_and_their_index_hold_the_same(tmp_path, made):
    source = write_stored(tmp_path / "in", WEIGHTS)
    write_bitsandbytes(source, tmp_path / "one")
    write_bitsandbytes(source, tmp_path / "many", shard_bytes=2000)  # less than the embedding has
    names = sorted(file.name for file in (tmp_path / "many").iterdir())
    count = len([name for name in names if name.endswith(".safetensors")])
    assert count > 2
    assert f"model-00001-of-{count:05d}.safetensors" in names
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load_file(tmp_path / "one" / "model.safetensors"), {}
    for name in {*index["weight_map"].values()}:
        many |= load_file(tmp_path / "many" / name)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert {name: index["weight_map"][name] for name in many} == index["weight_map"]
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_what_cannot_be_held_is_refused_by_name_or_quantized_again(tmp_path, made):
    weights = {**WEIGHTS, "a.weight": quantize(random(16, 64), "bof4s"), "b.weight": quantize(random(8, 96), "int4")}
    source = write_stored(tmp_path / "in", weights)
    with pytest.raises(FileError, match=r"hold it as it is: a.weight \(bof4s\).* and 1 more; --requantize"):
        write_bitsandbytes(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    rows = {row.name: row for row in write_bitsandbytes(source, tmp_path / "out", requantize=True)}
    assert [name for name, row in rows.items() if row.error is not None] == ["a.weight", "b.weight"]
    with open_foreign_checkpoint(tmp_path / "out") as file:
        for name in ("a.weight", "b.weight"):
            before, after = weights[name].dequantize().double(), file.tensors[name].read().dequantize().double()
            assert rows[name].error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-9)
            assert 0 < rows[name].error < 0.15


def test_a_transposed_layer_is_quantized_again_along_its_inputs(tmp_path, made):
    made(replace(ARCHITECTURE, linear={**ARCHITECTURE.linear, "a": "conv1d"}))
    source = write_stored(tmp_path / "in", WEIGHTS)
    with pytest.raises(FileError, match=r"a.weight \(nf4\): it is transposed \(Conv1D\)"):
        write_bitsandbytes(source, tmp_path / "out")
    rows = {row.name: row for row in write_bitsandbytes(source, tmp_path / "out", requantize=True)}
    with open_foreign_checkpoint(tmp_path / "out") as file:
        found = file.tensors["a.weight"].read()
        assert tuple(found.shape) == (64, 16)  # (out, in)
        lost = found.dequantize().T.double() - WEIGHTS["a.weight"].dequantize().double()
        size = WEIGHTS["a.weight"].dequantize().double().norm()
        assert rows["a.weight"].error == pytest.approx(float(lost.norm() / size), rel=1e-9)
    # compressed-tensors has linear layers alone, and leaves others dense.
    weights = {**WEIGHTS, "b.weight": quantize(random(8, 96), "q4_0")}
    source = write_stored(tmp_path / "q4_0", weights)
    rows = {row.name: row for row in write_compressed_tensors(source, tmp_path / "integers", requantize=True)}
    assert rows["a.weight"].kind == "bfloat16"
    assert rows["b.weight"].kind == "int4, group_size=32"
    made(replace(ARCHITECTURE, refusal=lambda layers: f"no {sorted(layers)}"))
    with pytest.raises(FileError, match=r"no \['a', 'b'\]"):
        write_compressed_tensors(tmp_path / "q4_0", tmp_path / "refused", requantize=True)


def test_weights_that_lie_otherwise_are_put_back(tmp_path, made):
    """Stored transposed, or with their columns in another order: dense, or quantized again."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).int()
    ups = quantize(random(3, 33, 8), "nf4")  # (experts, in, out)
    layer = quantize(random(16, 64), "nf4", block_size=32)
    weights = {**WEIGHTS, "a.weight": layer, "experts.up": ups, "a.weight_order": order}
    source = write_stored(tmp_path / "in", weights)
    config = json.loads((source / "config.json").read_text())
    for record in config["quantization_config"]["layers"]:
        record |= {"a": {"gathered": True}, "experts.up": {"transposed": True}}.get(record["names"][0], {})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"a.weight \(nf4\): it is stored with its columns in another order"):
        write_bitsandbytes(source, tmp_path / "out")
    rows = {row.name: row for row in write_bitsandbytes(source, tmp_path / "out", requantize=True)}
    assert [name for name, row in rows.items() if row.error is not None] == ["a.weight"]
    with open_foreign_checkpoint(tmp_path / "out") as file:
        assert torch.equal(file.tensors["experts.up"].read(), ups.dequantize(DTYPE).transpose(1, 2))
        values = torch.empty(16, 64)
        values[:, order.long()] = layer.dequantize()
        found = file.tensors["a.weight"].read().dequantize()
        assert float((found - values).norm() / values.norm()) == pytest.approx(rows["a.weight"].error, rel=1e-5)
        assert rows["a.weight"].error < 0.1


def test_a_folder_that_is_none_of_its_config_s_model_is_refused(tmp_path, made):
    dense = {"a.weight": random(16, 64), "b.weight": random(8, 96)}
    cases = (
        ({name: weight for name, weight in WEIGHTS.items() if name != "a.bias"}, "lacks 'a.bias'"),
        ({**WEIGHTS, "new.weight": quantize(random(4, 64))}, "the model has not, 'new.weight'"),
        ({**WEIGHTS, "a.weight": quantize(random(16, 128))}, "'a.weight' has not the shape"),
        ({**WEIGHTS, "a.bias": random(15)}, "'a.bias' has not the shape"),
        ({**WEIGHTS, **dense}, "no linear layers"),
    )
    for number, (weights, why) in enumerate(cases):
        source = write_stored(tmp_path / f"in{number}", weights)
        with pytest.raises(FileError, match=why):
            write_bitsandbytes(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_nothing_is_replaced_and_a_file_is_no_folder(tmp_path, made):
    source = write_stored(tmp_path / "in", WEIGHTS)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        write_bitsandbytes(source, tmp_path / "out")
    save(torch.nn.Linear(4, 4), tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="has folders"):
        write_bitsandbytes(tmp_path / "model.safetensors", tmp_path / "new")


def test_an_error_while_writing_leaves_nothing(tmp_path, made):
    source = write_stored(tmp_path / "in", WEIGHTS)

    def fail(name, nbytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bitsandbytes(source, tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

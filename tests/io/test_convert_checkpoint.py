"""A checkpoint converted on disk is the model converted in memory, byte for byte, whatever interrupts it."""

import math
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import Budget, EightBit, FourBit, convert, load, save
from lowmem.errors import FileError
from lowmem.io.convert_checkpoint import convert_checkpoint
from lowmem.io.lowmem_file import verify_and_map_file
from lowmem.io.safetensors_header import TensorSpec, encode_header_with_length
from lowmem.nn.techniques import blockwise_technique
from lowmem.quant import quantize_tensor
from lowmem.quant.formats import FORMATS
from tests import strategies
from tests.models import INDICES, Small
from tests.profiled import ONE_THREAD


def dense(path, dtype=torch.float32, seed=0):
    """Save ``Small`` as others save it: each tensor once. Return the model."""
    torch.manual_seed(seed)
    model = Small().to(dtype).eval()
    left_out = ("again", "head.weight")
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(left_out)}
    safetensors.torch.save_file(state, path)
    return model


@given(
    strategies.formats,
    strategies.small_blocks,
    strategies.encodings,
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_comes_out_equals_converting_in_memory(tmp_path_factory, format, block_size, scales, search, dtype):
    directory = tmp_path_factory.mktemp("stream")
    technique = blockwise_technique(format, block_size, scales, search=search, embeddings="4bit")
    model = convert(dense(directory / "in", dtype), technique)
    rows = convert_checkpoint(directory / "in", directory / "out", technique)
    save(model, directory / "memory")
    assert (directory / "out").read_bytes() == (directory / "memory").read_bytes()
    loaded = load(directory / "out", lambda: Small().to(dtype)).eval()
    assert torch.equal(loaded(INDICES), model(INDICES))
    errors = {row.name: row.error for row in rows if row.converted}
    assert errors["conv.weight"] == model.conv.weight_error
    assert sum(row.after_bytes for row in rows) == sum(
        t.nbytes for t in verify_and_map_file(directory / "out").tensors.values()
    )


def test_the_error_is_that_which_quantizing_has_measured(tmp_path, monkeypatch):
    """In a file, for each choice of a budget, and in memory: no weight is compared with what is stored."""
    monkeypatch.setattr(quantize_tensor, "error_and_weight_squares", None)  # calling it is a TypeError
    dense(tmp_path / "in")
    for technique in (FourBit(embeddings="4bit"), EightBit(), Budget(6.0)):
        rows = convert_checkpoint(tmp_path / "in", tmp_path / "out", technique)
        assert any(row.error for row in rows)
        assert convert(Small(), technique).conv.weight_error > 0


def test_tensors_are_quantized_on_the_device(tmp_path):
    """On the meta device, where a tensor has no values: the target is not written."""
    dense(tmp_path / "in")
    for technique in (FourBit(embeddings="4bit"), Budget(6.0)):
        with pytest.raises((RuntimeError, ValueError), match="meta"):
            convert_checkpoint(tmp_path / "in", tmp_path / "out", technique, device="meta")
        assert not (tmp_path / "out").exists()


def test_a_budget_gives_each_tensor_what_convert_gives_it(tmp_path):
    for bits, dtype in ((6.0, torch.float32), (7.5, torch.bfloat16)):
        model = convert(dense(tmp_path / "in", dtype), Budget(bits))
        seen = []
        rows = convert_checkpoint(
            tmp_path / "in", tmp_path / "out", Budget(bits), progress=lambda name, _, seen=seen: seen.append(name)
        )
        save(model, tmp_path / "memory")
        assert (tmp_path / "out").read_bytes() == (tmp_path / "memory").read_bytes()
        converted = [row for row in rows if row.converted]
        taken = 8 * sum(row.after_bytes for row in converted) / sum(math.prod(row.shape) for row in converted)
        assert taken <= bits
        assert len({row.stored for row in converted}) > 1
        assert all(row.chosen_because for row in converted)
        assert len(seen) == len(rows) + len(converted)
    (tmp_path / "out").unlink()
    with pytest.raises(ValueError, match="Budget.bits=3. is out of reach"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", Budget(3))
    with pytest.raises(ValueError, match="a checkpoint is none: leave inputs= out"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", Budget(6, inputs=[INDICES]))
    assert not (tmp_path / "out").exists()


def test_formats_own_defaults_are_spelled_out(tmp_path):
    for format in FORMATS:
        model = convert(dense(tmp_path / "in"), FourBit(format, embeddings="4bit"))
        convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(format))
        save(model, tmp_path / "memory")
        assert (tmp_path / "out").read_bytes() == (tmp_path / "memory").read_bytes()


def test_shards_in_and_out(tmp_path):
    dense(tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "whole", FourBit())
    state = safetensors.torch.load_file(tmp_path / "in.safetensors")
    names = sorted(state)
    files = {"a": names[::2], "b": names[1::2]}
    for file, part in files.items():
        safetensors.torch.save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "in.index.json").write_text(str(index).replace("'", '"'))
    convert_checkpoint(tmp_path / "in.index.json", tmp_path / "again", FourBit())
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    convert_checkpoint(tmp_path / "in.index.json", tmp_path / "s", FourBit(), shard_bytes=2000)
    expected = verify_and_map_file(tmp_path / "whole").tensors
    shards = sorted(tmp_path.glob("s-*-of-*"))
    assert all(sum(t.nbytes for t in verify_and_map_file(path).tensors.values()) <= 2000 for path in shards)
    found = {name: t for path in shards for name, t in verify_and_map_file(path).tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    del index["weight_map"][names[1]]  # which its file has
    (tmp_path / "less.index.json").write_text(str(index).replace("'", '"'))
    with pytest.raises(FileError, match=f"differ in tensor '{names[1]}'"):
        convert_checkpoint(tmp_path / "less.index.json", tmp_path / "more", FourBit())
    del state[names[0]]
    safetensors.torch.save_file({name: state[name] for name in files["a"][1:]}, tmp_path / "a")
    with pytest.raises(FileError, match="differ in tensor"):
        convert_checkpoint(tmp_path / "in.index.json", tmp_path / "again", FourBit())


def test_patterns_choose_and_other_tensors_are_copied(tmp_path):
    state = {
        "a.weight": torch.randn(8, 8),
        "b.weight": torch.randn(8, 8),
        "b.bias": torch.randn(8),
        "norm.weight": torch.randn(8),
        "table": torch.randn(8, 8),
        "wide.weight": torch.randn(8, 8, dtype=torch.float64),
        "count": torch.tensor(3),
        "mask.weight": torch.ones(4, 4, dtype=torch.bool),
    }
    safetensors.torch.save_file(state, tmp_path / "in")
    rows = convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(), exclude=["b.*"])
    assert [row.name for row in rows if row.converted] == ["a.weight"]
    tensors = verify_and_map_file(tmp_path / "out").tensors
    assert {"a.weight_packed", "a.weight_scales"} | (set(state) - {"a.weight"}) == set(tensors)
    assert all(torch.equal(tensors[name], state[name]) for name in state if name in tensors)
    rows = convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(), exclude=["norm.*", "a.*"])
    assert [row.name for row in rows if row.converted] == ["b.weight"]
    rows = convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(), include=["b.*"])
    assert [row.name for row in rows if row.converted] == ["b.weight"]


def test_tensors_that_cannot_be_converted_are_named_printably_and_nothing_is_written(tmp_path):
    name = "\x1b]0;owned\x07\n\u202e.weight"
    safetensors.torch.save_file({name: torch.full((2, 8), torch.nan)}, tmp_path / "in")
    shown = r"\\x1b\]0;owned\\x07\\n\\u202e.weight"
    with pytest.raises(ValueError, match=rf"{shown}: weight holds 16 values that are NaN.*--exclude") as caught:
        convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit())
    assert str(caught.value).isprintable()
    packed = f"{name}_packed"
    state = {name: torch.ones(8, 8), packed: torch.ones(8, 8)}
    safetensors.torch.save_file(state, tmp_path / "in")
    with pytest.raises(ValueError, match="both .* and .* would be .*packed; copy one") as caught:
        convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit())
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ["x*"]}, r"pattern 'x\*' matches no tensor"),
        ({"exclude": ["*"]}, "nothing to convert among 10 tensors"),
        ({"shard_bytes": 100}, "shard size 100 is less than"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(options, message, tmp_path):
    dense(tmp_path / "in")
    (tmp_path / "out").write_text("before")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(), **options)
    assert (tmp_path / "out").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_the_source_is_never_overwritten_and_not_converted_twice(tmp_path):
    dense(tmp_path / "in")
    with pytest.raises(ValueError, match="belongs to the source"):
        convert_checkpoint(tmp_path / "in", tmp_path / "in", FourBit())
    os.symlink("in", tmp_path / "link")
    with pytest.raises(ValueError, match="belongs to the source"):
        convert_checkpoint(tmp_path / "link", tmp_path / "in", FourBit())
    os.symlink(tmp_path, tmp_path / "folder")
    with pytest.raises(ValueError, match="belongs to the source"):
        convert_checkpoint(tmp_path / "in", tmp_path / "folder" / "in", FourBit())
    convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit())
    with pytest.raises(FileError, match="wrote it already"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again", FourBit())
    for bad, kind in ((tmp_path, OSError), (tmp_path / "none", OSError)):
        with pytest.raises(kind):
            convert_checkpoint(bad, tmp_path / "again", FourBit())
    with pytest.raises(ValueError, match="is what an index is called"):
        convert_checkpoint(tmp_path / "in", tmp_path / "m.index.json", FourBit())
    with pytest.raises(ValueError, match="name one format"):
        convert_checkpoint(tmp_path / "in", tmp_path / "again", FourBit(("nf4", "int4")))


def test_interrupted_it_leaves_no_file_and_run_again_it_finishes(tmp_path):
    dense(tmp_path / "in")

    def stop(name, nbytes):
        raise KeyboardInterrupt

    for shard_bytes in (None, 2000):
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit(), shard_bytes=shard_bytes, progress=stop)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    convert_checkpoint(tmp_path / "in", tmp_path / "out", FourBit())
    assert load(tmp_path / "out", Small)


MEMORY = """
import sys, torch
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
import lowmem.io.convert_checkpoint
lowmem.io.convert_checkpoint.convert_checkpoint(sys.argv[1], sys.argv[2], lowmem.FourBit())
print(peak() - before)
"""


def converted_in_a_process(source, target):
    """Convert a checkpoint, and return the peak of resident memory over the interpreter with torch imported."""
    shown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
        env=ONE_THREAD,
    )
    return int(shown.stdout)


def write_large(path, tensors):
    """Write a checkpoint of so many tensors of 64 MiB, one at a time."""
    specs = {f"layers.{number}.weight": TensorSpec(torch.float32, (4096, 4096)) for number in range(tensors)}
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    with open(path, "wb") as file:
        file.write(encode_header_with_length({}, specs))
        for _ in specs:
            file.write(weight.numpy().data)


on_linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="the peak of resident memory is read from /proc"
)


@pytest.mark.processes
@on_linux
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """It takes one and a half; whoever holds all three takes no less than the file."""
    write_large(tmp_path / "in", 3)
    assert converted_in_a_process(tmp_path / "in", tmp_path / "out") < os.path.getsize(tmp_path / "in")


@on_linux
@pytest.mark.skipif(not os.environ.get("LOWMEM_LARGE"), reason="4 GiB on disk: set LOWMEM_LARGE to run it")
def test_memory_is_bounded_for_4_gib(tmp_path):
    write_large(tmp_path / "in", 64)
    assert os.path.getsize(tmp_path / "in") > 4 * 2**30
    assert converted_in_a_process(tmp_path / "in", tmp_path / "out") < 300 * 2**20
    loaded = load(tmp_path / "out", lambda: nn.ModuleDict({"layers": nn.ModuleList(large() for _ in range(64))}))
    assert loaded["layers"][63].quantized.bits_per_weight < 4.15


def large():
    return nn.Linear(4096, 4096, bias=False, device="meta")

"""What is said of a model that takes more bytes than the file of another program."""

import warnings
from pathlib import Path

import pytest
import torch

from lowmem import EightBit
from lowmem.io.formats.foreign import ForeignTensor
from lowmem.io.formats.growth import GrowthWarning, growth, kept_bytes, with_dtype
from lowmem.io.import_checkpoint import import_checkpoint
from lowmem.nn.forms import CodedForm
from tests.io.formats.test_recognize import SAMPLES

MIB = 2**20
SHAPE = (1024, 1024)
Q4_0 = CodedForm("q4_0", 32, "float16", "imported")
OFFSETS = CodedForm("uint4", 32, "float32_offsets", "imported")


def tensor(name, kind, bits):
    return ForeignTensor(name, SHAPE, kind, MIB * bits // 8, lambda: torch.empty(SHAPE))


def said_of(*weights, dtype=None):
    after = sum(kept_bytes(one, with_dtype(kept, dtype)) for one, kept in weights)
    return growth(Path("folder/a.gguf"), weights, after, dtype)


def test_nothing_is_said_of_a_model_that_is_not_larger():
    assert said_of((tensor("a", "Q4_0", 5), Q4_0), (tensor("b", "F32", 32), torch.float32)) is None
    assert said_of((tensor("a", "F16", 16), torch.float16), dtype=torch.bfloat16) is None


@pytest.mark.parametrize(
    ("kind", "bits", "kept", "dtype", "how"),
    [
        ("F16", 16, torch.float16, torch.float32, ": `lowmem quantize IN OUT --dtype float16` makes 2.00 MiB of"),
        ("BF16", 16, torch.bfloat16, torch.float32, ": `lowmem quantize IN OUT --dtype bfloat16` makes 2.00 MiB"),
        ("Q9", 9, torch.float32, None, ": `lowmem quantize IN OUT --include '*' --format int8` makes 1.02 MiB"),
        ("Q6_K", 6, torch.float32, None, ": `lowmem quantize IN OUT --include '*'` makes 0.53 MiB of them"),
        ("Q3_K", 3, torch.float32, None, ": no option avoids that; `lowmem quantize IN OUT --include '*'` makes"),
        ("Q4_K", 4, OFFSETS, None, ": no option avoids that"),
    ],
)
def test_sizes_types_and_the_option_that_loses_least_of_those_that_avoid_it_are_told(kind, bits, kept, dtype, how):
    said = said_of((tensor("a", kind, bits), kept), dtype=dtype)
    before, after = bits / 8, kept_bytes(tensor("a", kind, bits), with_dtype(kept, dtype)) / MIB
    assert said.startswith(f"a.gguf: {before:.2f} MiB of tensors become a model of {after:.2f} MiB")
    assert f", since weights in {kind} take more bits there{how}" in said
    assert kind != "Q4_K" or said.endswith("no option avoids that")


def test_a_file_that_becomes_larger_is_told_of_and_the_option_that_is_named_avoids_it(tmp_path):
    target = tmp_path / "a.safetensors"
    told = (
        r"types\.gguf: .*since weights in Q5_1, .*: `lowmem quantize IN OUT --include '\*' --format int8` makes 0\.01"
    )
    with pytest.warns(GrowthWarning, match=told):
        rows = import_checkpoint(SAMPLES / "types.gguf", target)
    assert sum(row.after_bytes for row in rows) > sum(row.before_bytes for row in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = import_checkpoint(SAMPLES / "types.gguf", target, include=["*"], technique=EightBit())
    assert sum(row.after_bytes for row in rows) <= sum(row.before_bytes for row in rows)

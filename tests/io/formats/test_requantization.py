"""Which weights of another program are quantized while they are read, and what is said of it."""

import warnings
from pathlib import Path

import pytest
import torch

from lowmem import EightBit, FourBit
from lowmem.io.formats.code_conversion import imported_quantized_tensor
from lowmem.io.formats.foreign_format import LazyForeignTensor
from lowmem.io.formats.requantization import (
    GrowthWarning,
    Requantization,
    bytes_in_storage_form,
    form_with_dense_dtype,
    refused_tensors_message,
    warn_if_model_grows,
)
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.io.safetensors_checkpoint import check_each_pattern_matches_a_tensor
from lowmem.nn.forms import CodedForm
from lowmem.quant.quantize_tensor import relative_error
from tests.io.formats.test_open_foreign import SAMPLES

WEIGHT = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def dense(name, weight=WEIGHT):
    return LazyForeignTensor(name, tuple(weight.shape), "Q8_0", weight.nbytes, lambda: weight)


def coded(name):
    weight = imported_quantized_tensor(torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2), (4, 64), "q4_0", 32)
    return LazyForeignTensor(name, (4, 64), "Q4_0", 1, lambda: weight)


def test_by_default_every_weight_is_as_it_was():
    for tensor in (
        dense("a"),
        coded("b"),
        LazyForeignTensor.with_refusal("c", (4, 64), "GPTQ", 1, "why", lambda: WEIGHT),
    ):
        assert Requantization().lazily_requantized_or_same_tensor(tensor) is tensor
        assert Requantization(include=["*"]).lazily_requantized_or_same_tensor(tensor) is tensor


def test_dense_matrices_that_a_pattern_names_are_quantized_and_nothing_else():
    asked = Requantization(include=["a*"], technique=EightBit())
    made = asked.lazily_requantized_or_same_tensor(dense("a"))
    assert made.storage_form() == CodedForm.from_quantized_tensor(EightBit().store(WEIGHT))
    assert asked.errors == {}  # it was not read yet
    stored, wanted = made.read(), EightBit().store(WEIGHT)
    assert torch.equal(stored.packed, wanted.packed)
    assert torch.equal(stored.scales, wanted.scales)
    assert asked.largest_error_or_none("a") == relative_error(WEIGHT, wanted) > 0
    for other in (dense("b"), dense("a", WEIGHT[0])):
        assert asked.lazily_requantized_or_same_tensor(other) is other
    assert (
        asked.lazily_requantized_or_same_tensor(dense("a", torch.arange(8).view(2, 4))).storage_form() is torch.int64
    )
    kept = asked.lazily_requantized_or_same_tensor(coded("a"))
    assert (type(kept.storage_form()), kept.read().format) == (CodedForm, "q4_0")
    assert asked.largest_error_or_none("b") is None


def test_weights_of_8_bits_that_a_pattern_names_are_quantized_to_fewer_bits():
    weight = EightBit(format="q8_0").store(WEIGHT)
    tensor = LazyForeignTensor("a", (4, 64), "Q8_0", weight.nbytes, lambda: weight)
    assert (
        Requantization(include=["a"], technique=EightBit()).lazily_requantized_or_same_tensor(tensor).read() is weight
    )
    asked = Requantization(include=["a"], technique=FourBit("nf4"))
    stored = asked.lazily_requantized_or_same_tensor(tensor).read()
    assert torch.equal(stored.packed, FourBit("nf4").store(weight.dequantize()).packed)
    assert asked.largest_error_or_none("a") > 0.05


def test_what_is_refused_is_quantized_where_its_values_are_known():
    known = LazyForeignTensor.with_refusal("a", (4, 64), "GPTQ", 1, "why", lambda: WEIGHT)
    unknown = LazyForeignTensor.with_refusal("b", (4, 64), "IQ2_S", 1, "why")
    asked = Requantization(FourBit("nf4"))
    assert "--requantize" in refused_tensors_message([known])
    assert "b, IQ2_S: why" in refused_tensors_message([known, unknown])
    assert "--requantize" not in refused_tensors_message([known, unknown])  # which would not do it
    assert "and 2 more" in refused_tensors_message([known] * 5)
    assert asked.lazily_requantized_or_same_tensor(unknown) is unknown
    made = asked.lazily_requantized_or_same_tensor(known)
    assert made.refusal is None
    assert torch.equal(made.read().packed, FourBit("nf4").store(WEIGHT).packed)
    assert 0.05 < asked.largest_error_or_none("a") < 0.15


def test_the_error_of_a_weight_is_the_largest_of_its_parts():
    asked = Requantization(include=["*"], technique=FourBit("nf4"), names={"a": "both", "b": "both"})
    for part in (dense("a"), dense("b", WEIGHT.square())):
        asked.lazily_requantized_or_same_tensor(part).read()
    assert asked.largest_error_or_none("both") == max(asked.errors.values()) > min(asked.errors.values())
    assert asked.largest_error_or_none("a") is None


def test_bad_input_is_one_error_that_names_it():
    asked = Requantization(include=["a", "x*"], technique=FourBit())
    with pytest.raises(ValueError, match=r"pattern 'x\*' matches no tensor; check it, the first is 'a'"):
        check_each_pattern_matches_a_tensor(asked.include, {"b": 1, "a": 2})
    check_each_pattern_matches_a_tensor(asked.include, ["a", "xy"])
    with pytest.raises(ValueError, match="^a: .*NaN"):
        asked.lazily_requantized_or_same_tensor(dense("a", torch.full((2, 8), torch.nan))).read()


MIB = 2**20
SHAPE = (1024, 1024)
Q4_0 = CodedForm("q4_0", 32, "float16", "imported")
OFFSETS = CodedForm("uint4", 32, "float32_offsets", "imported")


def tensor(name, kind, bits):
    return LazyForeignTensor(name, SHAPE, kind, MIB * bits // 8, lambda: torch.empty(SHAPE))


def said_of(*weights, dtype=None):
    after = sum(bytes_in_storage_form(one, form_with_dense_dtype(kept, dtype)) for one, kept in weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_model_grows(Path("folder/a.gguf"), weights, after, dtype)
    assert all(one.category is GrowthWarning for one in caught)
    return [str(one.message) for one in caught]


def test_nothing_is_said_of_a_model_that_is_not_larger():
    assert said_of((tensor("a", "Q4_0", 5), Q4_0), (tensor("b", "F32", 32), torch.float32)) == []
    assert said_of((tensor("a", "F16", 16), torch.float16), dtype=torch.bfloat16) == []


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
    (said,) = said_of((tensor("a", kind, bits), kept), dtype=dtype)
    before, after = bits / 8, bytes_in_storage_form(tensor("a", kind, bits), form_with_dense_dtype(kept, dtype)) / MIB
    assert said.startswith(f"a.gguf: {before:.2f} MiB of tensors become a model of {after:.2f} MiB")
    assert f", since weights in {kind} take more bits there{how}" in said
    assert kind != "Q4_K" or said.endswith("no option avoids that")


def test_a_file_that_becomes_larger_is_told_of_and_the_named_option_avoids_it(tmp_path):
    target = tmp_path / "a.safetensors"
    told = (
        r"types\.gguf: .*since weights in Q5_1, .*: `lowmem quantize IN OUT --include '\*' --format int8` makes 0\.01"
    )
    with pytest.warns(GrowthWarning, match=told):
        rows = import_foreign_checkpoint(SAMPLES / "types.gguf", target)
    assert sum(row.after_bytes for row in rows) > sum(row.before_bytes for row in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = import_foreign_checkpoint(SAMPLES / "types.gguf", target, include=["*"], technique=EightBit())
    assert sum(row.after_bytes for row in rows) <= sum(row.before_bytes for row in rows)

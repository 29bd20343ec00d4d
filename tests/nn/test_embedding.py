"""An embedding in 16 or 4 bits returns the rows of the restored table, bit for bit, and restores no others."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowmem import FourBit, Half, HalfEmbedding, convert, kernels, measure
from lowmem.nn.embedding import QuantizedEmbedding
from lowmem.nn.techniques import blockwise_technique
from tests import strategies

techniques = pytest.mark.parametrize("technique", [Half(), FourBit("nf4", embeddings="4bit")], ids=["half", "4-bit"])


def restored(layer: nn.Module) -> torch.Tensor:
    """Return the whole table, in the dtype of the rows."""
    if isinstance(layer, HalfEmbedding):
        return layer.weight.to(layer.dtype)
    return layer.quantized.dequantize(layer.dtype)


@st.composite
def tables(draw, dtype=torch.float32):
    """Draw an nn.Embedding of any small size."""
    weight = draw(strategies.weights(min_dims=2, max_dims=2, max_columns=100))
    return nn.Embedding(*weight.shape, dtype=dtype, _weight=weight.to(dtype))


@given(
    tables(),
    st.builds(
        blockwise_technique,
        strategies.formats,
        strategies.small_blocks,
        strategies.encodings,
        embeddings=st.just("4bit"),
    ),
    strategies.leading_shapes,
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(sorted({"reference", kernels.available_cpu_backend_names()[-1]})),
    strategies.seeds,
)
def test_rows_are_those_of_the_restored_table_bit_for_bit(table, technique, leading, integer, dtype, kernel, seed):
    dense = table.weight.detach().clone()
    layer = convert(table, technique).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(dense), leading, generator=generator).to(integer)
    with kernels.temporary_cpu_backend(kernel):
        rows = layer(indices)
    assert rows.dtype == dtype
    assert torch.equal(rows, restored(layer)[indices.long()])
    error = (dense - layer.quantized.dequantize()).abs()
    assert (error <= layer.quantized.error_bound()).all()


@given(tables(), st.sampled_from([torch.float16, torch.bfloat16]), strategies.leading_shapes, strategies.seeds)
def test_half_rows_are_rounded_once_and_widened(table, half, leading, seed):
    dense = table.weight.detach().clone()
    layer = convert(table, Half(half))
    indices = torch.randint(len(dense), leading, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(layer(indices), dense[indices].to(half).float())


@techniques
def test_rows_have_the_dense_table_s_dtype_until_the_model_is_cast(technique):
    indices = torch.arange(3)
    layer = convert(nn.Embedding(5, 64, dtype=torch.bfloat16), technique)
    assert layer(indices).dtype == torch.bfloat16
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for cast, dtype in (("half", torch.float16), ("double", torch.float64), ("float", torch.float32)):
        getattr(layer, cast)()
        assert layer(indices).dtype == copy.deepcopy(layer)(indices).dtype == dtype
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
        for name, tensor in layer.state_dict().items()
    )


@techniques
def test_nothing_trains_and_options_of_training_are_accepted(technique):
    dense = nn.Embedding(8, 16, padding_idx=-1, scale_grad_by_freq=True, sparse=True)
    layer = convert(copy.deepcopy(dense), technique)
    assert not any(p.requires_grad for p in layer.parameters())
    assert not layer(torch.arange(8)).requires_grad
    assert torch.equal(layer(torch.tensor(7)), torch.zeros(16))  # the row of padding is data like another
    assert layer.weight_count == 8 * 16 if isinstance(layer, QuantizedEmbedding) else layer.weight.numel() == 8 * 16
    form = "nf4, block_size=64, scales=double" if isinstance(layer, QuantizedEmbedding) else "float16"
    options = "padding_idx=7, scale_grad_by_freq=True, sparse=True"
    assert f"8, 16, {options}, stored in {form}, dtype=torch.float32" in repr(layer)
    layer.max_norm = 1.0
    with pytest.raises(RuntimeError, match=r"max_norm=1.0 rescales rows in place, .*: set it to None, or lowmem"):
        layer(torch.arange(8))


@techniques
@pytest.mark.parametrize("kernel", sorted({"reference", kernels.available_cpu_backend_names()[-1]}))
def test_restoring_takes_a_chunk_at_a_time_and_never_the_table(technique, kernel):
    layer = convert(nn.Embedding(5_000, 256), technique)
    indices = torch.randint(5_000, (4, 2000))
    with kernels.temporary_cpu_backend(kernel):
        assert measure.peak_bytes(lambda: layer(torch.arange(3))) <= 2**18
        assert measure.peak_bytes(lambda: layer(indices)) <= 4 * indices.numel() * 256 + 2**20
        assert torch.equal(layer(indices), restored(layer)[indices])


@techniques
def test_torch_func_maps_over_indices(technique):
    if isinstance(technique, FourBit):
        technique = replace(
            technique, scales="float16"
        )  # torch 2.9 maps no view in another dtype, which double needs
    layer = convert(nn.Embedding(6, 40), technique)
    indices = torch.arange(6).view(2, 3)
    assert torch.equal(torch.func.vmap(layer)(indices), layer(indices))

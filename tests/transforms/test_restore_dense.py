"""Stored parameters become dense again, in their dtype or in another."""

import re
import threading

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, HalfLinear, LoRA, convert, restore
from lowmem.nn.adapter_bank import unadapted_parameter
from lowmem.transforms import module_replacement
from tests.refusing import refused
from tests.test_any_model import Tied
from tests.transforms.models import SharedBias

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_what_is_restored_in_a_dtype_runs_in_it(technique):
    for layer, shape in ((nn.Linear(8, 8), (2, 8)), (nn.Conv1d(8, 8, 3), (2, 8, 5)), (nn.LSTM(8, 8), (3, 8))):
        model = restore(convert(nn.Sequential(layer), technique), dtype=torch.bfloat16)
        x = torch.randn(shape).bfloat16()
        out = model(x)
        assert (out[0] if isinstance(out, tuple) else out).dtype == torch.bfloat16
    for where in (None, lambda path, _: path == ""):
        attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        convert(attention, technique, where=where)
        restore(attention, dtype=torch.bfloat16)
        x = torch.randn(3, 2, 8).bfloat16()
        assert attention(x, x, x)[0].dtype == torch.bfloat16
    layer = convert(nn.Linear(8, 8), technique, LoRA(2))
    restore(layer, dtype=torch.float64)
    assert {unadapted_parameter(layer, "weight").dtype, layer.bias.dtype} == {torch.float64}
    assert layer.lora_a.dtype == torch.float32


def test_what_was_never_stored_is_restored_in_the_dtype_too():
    """Norms, scalars and saved buffers are cast; what is not saved, such as tables of positions, keeps its dtype."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.LSTM(8, 8))
    model[1].register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    model[1].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model[1].register_buffer("table", torch.ones(2), persistent=False)
    model[2].weight = model[1].weight  # shared
    restore(convert(model, FourBit(), skip="3"), dtype=torch.bfloat16)
    state = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(state.values()) == {torch.bfloat16}
    assert model[1].mask.tolist() == [0.0, -torch.inf]
    assert model[1].table.dtype == torch.float32
    assert model[1].weight is model[2].weight
    assert model[1].weight.requires_grad
    assert model(torch.randn(4, 8).bfloat16())[0].dtype == torch.bfloat16
    halves = convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), FourBit())
    restore(halves, skip="1", dtype=torch.bfloat16)
    assert halves[1].weight.dtype == torch.float32


def test_a_bias_that_a_restored_layer_shares_with_one_of_another_dtype_is_refused():
    model = convert(SharedBias(), FourBit())
    with refused(model, ValueError, r"a: its bias is shared with norm, .*float32.*model.to\(torch.bfloat16\)"):
        restore(model, skip="norm", dtype=torch.bfloat16)
    restore(model)
    assert model.a.bias is model.norm.bias
    assert model.b.bias is model.c.bias


def test_a_bias_beyond_the_dtype_s_range_is_not_restored():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.bias[1] = 1e6
    convert(layer, FourBit())
    with refused(layer, ValueError, "bias holds the magnitude"):
        restore(layer, dtype=torch.float16)


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_one_end_of_a_tie_is_not_restored_alone(technique):
    for options in ({"where": lambda path, _: path == "head"}, {"skip": "tokens"}):
        model = convert(Tied(), technique)
        with refused(model, ValueError, r"head: .*shared with tokens, which where= and skip= leave"):
            restore(model, **options)
        restore(model)
        assert model.head.weight is model.tokens.weight


def test_restore_takes_floating_point_dtypes_by_their_names_alone():
    for dtype in ("bfloat16", "torch.float64"):
        model = restore(convert(nn.Linear(4, 4), FourBit()), dtype=dtype)
        assert {one.dtype for one in model.parameters()} == {getattr(torch, dtype.removeprefix("torch."))}
    for dtype in ("float33", "nn", torch.int8, 16, float):
        with pytest.raises(TypeError, match=f"dtype={re.escape(repr(dtype))} must be a floating-point dtype"):
            restore(convert(nn.Linear(4, 4), FourBit()), dtype=dtype)


def test_restore_waits_for_a_thread_that_changes_a_model():
    layer = convert(nn.Linear(4, 4), Half())
    thread = threading.Thread(target=restore, args=(layer,))
    with module_replacement._LOCK:
        thread.start()
        thread.join(0.05)
        assert type(layer) is HalfLinear
    thread.join()
    assert type(layer) is nn.Linear

"""One walk converts any model, and an error leaves it as it was."""

import copy

import pytest
import torch
from torch import nn

from lowmem import FourBit, Half, HalfLinear, Linear4Bit, LoRA, convert, measure
from lowmem.transforms.module_registry import applied_technique_type_or_none
from tests.selection import covering
from tests.transforms.models import EVERY, Odd, Subclass, dense_twin, kinds, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:.* are weights that stay dense")  # which has its own test


@pytest.mark.parametrize(("techniques", "layer"), [((Half(),), HalfLinear), ((FourBit(),), Linear4Bit)])
def test_every_exact_linear_is_converted_wherever_it_stands(techniques, layer):
    model = Odd()
    expected = model(torch.ones(2, 8))
    assert convert(model, *techniques) is model
    expected_kinds = dict.fromkeys(("shared", "list.0", "dict.head", "inner.0.0"), layer)
    assert kinds(model) == {**expected_kinds, "special": type(model.special)}
    assert isinstance(model.special, Subclass)
    assert applied_technique_type_or_none(model.special) is type(techniques[0])
    assert model.shared is model.again is model.dict["shared"]
    assert model(torch.ones(2, 8)).shape == expected.shape


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = convert(Odd().train(training), FourBit(), LoRA(2, dropout=0.1))
    assert all(module.training == training for module in model.modules())


def encoder(batch_first, norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2)


def assert_computes_what_is_stored(dense, techniques, *calls):
    """Each call of the converted model gives what it gives of a dense one with the stored values."""
    model = convert(copy.deepcopy(dense), *techniques)
    twin = dense_twin(dense, model)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for call in calls:
                torch.testing.assert_close(call(model), call(twin), rtol=1e-4, atol=1e-5)
    return model


PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@covering(techniques=EVERY, batch_first=[True, False], norm_first=[True, False], training=[True, False])
def test_an_encoder_computes_with_what_is_stored(techniques, batch_first, norm_first, training):
    x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
    keep = ~PADDED if batch_first else ~PADDED.T
    assert_computes_what_is_stored(
        encoder(batch_first, norm_first).train(training),
        techniques,
        lambda model: model(x),
        lambda model: model(x, src_key_padding_mask=PADDED)[keep],
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("techniques", EVERY)
def test_an_encoder_s_layers_are_read_afresh_in_inference(techniques):
    """Neither a copy of a converted layer in a new encoder, nor a change of what is stored, meets a stale weight."""
    model = encoder(True, False).eval()
    dense = copy.deepcopy(model)
    convert(model, *techniques)
    again = nn.TransformerEncoder(model.layers[0], 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        twin = nn.TransformerEncoder(dense_twin(dense, model).layers[0], 2).eval()
        found, expected = (one(x, src_key_padding_mask=PADDED)[~PADDED] for one in (again, twin))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        before = model(x)
        tensors_of(model.layers[0].linear1)[-1].zero_()  # the scales, or the weight
        assert not torch.allclose(model(x), before)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no technique was given"):
        convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="technique='nf4' must be an instance"):
        convert(nn.Linear(2, 2), "nf4")
    with pytest.raises(TypeError, match="must be an instance of Half, EightBit, FourBit, Budget or LoRA"):
        convert(nn.Linear(2, 2), Half)
    with pytest.raises(ValueError, match="LoRA was given 2 times"):
        convert(nn.Linear(2, 2), LoRA(1), LoRA(2))
    for given in ([FourBit()], [FourBit(), nn.Linear(2, 2)]):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, found FourBit"):
            convert(*given)


def test_at_most_counts_all_weights_of_a_module_that_was_converted_before():
    make = lambda: convert(nn.ModuleList([nn.LSTM(16, 24, 2), nn.Linear(16, 16)]), FourBit(), skip="1")  # noqa: E731
    whole = convert(make(), Half(), where=lambda path, _: path == "1")
    bits = 8 * measure.theoretical_bytes(whole) / measure.weight_count(whole)
    convert(make(), Half(), where=lambda path, _: path == "1", at_most=bits)

"""``--compute int8``: which layers it sets, and its error; tests/tools/test_generate.py runs the commands."""

import pytest
import torch
from torch import nn

from lowmem import EightBit, FourBit, Half, convert
from lowmem.tools.compute_argument import set_compute_dtype


class LanguageModel(nn.Module):
    """Two linear layers; the second one makes the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 96)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("technique", [FourBit(), EightBit()])
def test_all_linear_layers_but_that_of_logits_multiply_integers(technique):
    model = convert(LanguageModel(), technique)
    set_compute_dtype(model, "int8")
    assert (model.inner.compute_dtype, model.head.compute_dtype) == (torch.int8, None)
    plain = convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), technique)
    set_compute_dtype(plain, "int8")
    assert [layer.compute_dtype for layer in plain] == [torch.int8] * 2


@pytest.mark.parametrize("model", [LanguageModel(), convert(LanguageModel(), Half())])
def test_a_model_without_layers_in_4_or_8_bits_is_an_error(model):
    with pytest.raises(
        ValueError, match=r"--compute int8 applies to linear layers in 4 or 8 bits, and the model has"
    ):
        set_compute_dtype(model, "int8")

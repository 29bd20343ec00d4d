"""How a model is called is what it computes, not what its class is called."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowmem
from lowmem.finetuning.calling_convention import (
    CallingConvention,
    detect_calling_convention,
    logits_from_output,
    scaled_load_balancing_loss_or_none,
)
from tests.finetuning.language import VOCABULARY, Language, language


class Plain(nn.Module):
    """Each token is predicted from the one before it alone; it takes nothing but tokens."""

    def __init__(self, change=lambda logits: logits):
        super().__init__()
        self.table, self.change = nn.Embedding(VOCABULARY, VOCABULARY), change

    def forward(self, input_ids):
        return self.change(self.table(input_ids))


def test_a_model_is_called_as_its_signature_and_a_trial_show():
    torch.manual_seed(0)
    assert detect_calling_convention(Language(), VOCABULARY) == CallingConvention(True, True, False, True)
    assert detect_calling_convention(Language(isolates=False), VOCABULARY) == CallingConvention(
        True, True, False, False
    )
    assert detect_calling_convention(Plain(), VOCABULARY) == CallingConvention()
    stored = language(technique=lowmem.FourBit("nf4"), dropout=0.5)
    state, seed = stored.state_dict(), torch.get_rng_state()
    stored.blocks[0].eval()
    assert detect_calling_convention(stored, VOCABULARY).isolates_texts
    assert (stored.training, stored.blocks[0].training) == (True, False)
    assert torch.equal(seed, torch.get_rng_state())
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Language(causal=False), "predicts a token from those after it"),
        (nn.Embedding(VOCABULARY, 8), "cannot be trained to predict the next token: TypeError"),
        (Plain(lambda logits: logits[0]), "it returned shape \\(13, 64\\), and no logits"),
        (Plain(lambda logits: "text"), "it returned a str, and no logits"),
        (Plain(lambda logits: logits[:, :3]), "logits of shape \\(3, 64\\) for 13 tokens"),
        (Plain(lambda logits: logits * torch.nan), "or such as are not finite"),
    ],
)
def test_models_that_are_not_causal_language_models_are_refused(model, why):
    with pytest.raises(ValueError, match=why):
        detect_calling_convention(model, VOCABULARY)


def test_logits_are_found_in_what_models_return():
    logits = torch.zeros(1, 2, 3)
    for output in (logits, SimpleNamespace(logits=logits), {"logits": logits}):
        assert logits_from_output(output) is logits


def test_a_model_gets_the_arguments_that_it_takes():
    ids, ones = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64)
    assert CallingConvention().forward_kwargs(ids, None, ones).keys() == {"input_ids"}
    everything = CallingConvention(True, True, True, True).forward_kwargs(ids, ones, ones)
    assert everything.keys() == {"input_ids", "position_ids", "attention_mask", "use_cache"}
    assert everything["use_cache"] is False


def test_the_balance_of_a_mixture_is_scaled_by_its_config():
    model, balance = nn.Linear(1, 1), torch.tensor(2.0)
    for output in (torch.zeros(1), {"logits": 1}, SimpleNamespace(aux_loss=None), {"aux_loss": (1, 2)}):
        assert scaled_load_balancing_loss_or_none(model, output) is None
    for output in ({"aux_loss": balance}, SimpleNamespace(aux_loss=balance)):
        with pytest.raises(ValueError, match="a Linear returns aux_loss, and has none of router_aux_loss_coef, aux_"):
            scaled_load_balancing_loss_or_none(model, output)
        model.config = SimpleNamespace(router_aux_loss_coef=0.25)
        assert scaled_load_balancing_loss_or_none(model, output) == 0.5
        model.config.get_text_config = lambda: SimpleNamespace(router_aux_loss_coef=0.125)
        assert scaled_load_balancing_loss_or_none(model, output) == 0.25
        model.aux_loss_coef = 2
        assert scaled_load_balancing_loss_or_none(model, output) == 4
        model.aux_loss_coef = 0
        assert scaled_load_balancing_loss_or_none(model, output) is None
        del model.config, model.aux_loss_coef

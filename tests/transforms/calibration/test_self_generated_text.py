"""A causal language model's own text calibrates it; what generates none is refused, and stays as it was."""

import types

import pytest
import torch
from torch import nn

from lowmem import FourBit, calibrate
from lowmem.transforms.calibration.self_generated_text import TOKENS, self_generated_token_batches
from tests.refusing import refused
from tests.transforms.calibration.test_calibrate import Decoder, assert_same_bytes, made


class Tokenizer:
    """As many tokens as it says; it begins a text with one."""

    bos_token_id = 3

    def __init__(self, size=40, begins=False):
        self.size, self.begins = size, begins

    def __len__(self):
        return self.size

    def __call__(self, text):
        return {"input_ids": [3] if self.begins else []}


class Vocabulary:
    """A tokenizer that cannot be called, and so puts nothing before a text."""

    bos_token_id = 3

    def __len__(self):
        return 40


class Chain(nn.Module):
    """After a token comes the next one, or the one after that."""

    def __init__(self, size=40):
        super().__init__()
        self.next = nn.Linear(size, size, bias=False)
        one = torch.eye(size)
        with torch.no_grad():
            self.next.weight.copy_(20 * (one.roll(1, 0) + one.roll(2, 0)))

    def forward(self, tokens):
        return self.next(nn.functional.one_hot(tokens, 40).float())


@pytest.mark.parametrize("begins", [False, True])
def test_text_is_drawn_from_what_the_model_predicts(begins):
    batches = self_generated_token_batches(Chain(), Tokenizer(begins=begins), 0, 1.0)
    text = torch.cat(batches)
    assert [one.shape for one in batches] == [(8, 128)] * 4
    assert (text[:, 0] == 3).all() == begins
    start = int(begins)
    steps = (text[:, start + 1 :] - text[:, start:-1]) % 40
    assert set(steps.flatten().tolist()) == {1, 2}
    assert 0.4 < float((steps == 1).float().mean()) < 0.6
    assert len(set(text[:, start].tolist())) > 10


def test_a_seed_gives_the_same_text_and_leaves_the_draws_of_others_alone():
    model, state = Chain(), torch.get_rng_state()
    one, two = (torch.cat(self_generated_token_batches(model, Tokenizer(), 5, 1.0)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.cat(self_generated_token_batches(model, Tokenizer(), 6, 1.0)))
    assert torch.equal(state, torch.get_rng_state())
    with torch.device("meta"):  # on which new tensors are by default
        assert torch.equal(one, torch.cat(self_generated_token_batches(model, Tokenizer(), 5, 1.0)))
    assert torch.equal(one, torch.cat(self_generated_token_batches(model, Vocabulary(), 5, 1.0)))
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match=f"^seed={seed} must be below 2.63, and at least -2.63$"):
            self_generated_token_batches(model, Tokenizer(), seed, 1.0)
    for seed in (-(2**63), 2**63 - 1):  # the seed is taken: what is wrong is the tokenizer
        with pytest.raises(TypeError, match="^tokenizer=None must be the model's"):
            self_generated_token_batches(model, None, seed, 1.0)


def test_a_temperature_divides_what_is_predicted():
    hot = torch.cat(self_generated_token_batches(Chain(), Tokenizer(), 0, 1e6))
    steps = (hot[:, 1:] - hot[:, :-1]) % 40
    assert len(set(steps.flatten().tolist())) == 40
    cold = torch.cat(
        self_generated_token_batches(Chain(), Tokenizer(), 0, 5e-324)
    )  # both of the next tokens are as likely
    steps = (cold[:, 1:] - cold[:, :-1]) % 40
    assert set(steps.flatten().tolist()) == {1, 2}


def test_tokens_that_the_tokenizer_does_not_have_are_not_drawn(monkeypatch):
    assert torch.cat(self_generated_token_batches(Chain(), Tokenizer(30), 0, 1e6)).max() < 30
    # The largest number draws the last token, though shares in float32 may add up to less.
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.full(shape, 1 - 2**-53, dtype=how["dtype"]))
    model = made(Decoder)
    model.config = types.SimpleNamespace(max_position_embeddings=4)
    text = torch.cat(self_generated_token_batches(model, Tokenizer(), 0, 1.0))
    assert text.shape == (32, 4)
    assert (text[:, 1:] == 39).all()
    # The smallest draws the first that is not impossible.
    monkeypatch.setattr(torch, "rand", lambda shape, **how: torch.zeros(shape, dtype=how["dtype"]))
    text = torch.cat(self_generated_token_batches(Chain(), Tokenizer(), 0, 1e-3))
    assert set(((text[:, 1:] - text[:, :-1]) % 40).flatten().tolist()) == {1, 2}


def test_a_model_is_calibrated_by_its_own_text():
    tokenizer, model = Tokenizer(), made(Decoder)
    text = self_generated_token_batches(model, tokenizer, 1, 0.5)
    expected = calibrate(made(Decoder), text, FourBit("nf4"))
    model.train()
    calibrate(model, "self", FourBit("nf4"), tokenizer=tokenizer, seed=1, temperature=0.5)
    assert model.training
    assert_same_bytes(model, expected)


class Cached(Decoder):
    """As those of transformers: it gets the last token, and what it has computed of those before."""

    def generate(self):
        raise NotImplementedError

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        past = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], dim=1)
        self.lengths = [*getattr(self, "lengths", []), input_ids.shape[1]]
        out = super().forward(past)[:, -input_ids.shape[1] :]
        return types.SimpleNamespace(logits=out, past_key_values=past if use_cache else None)


@pytest.mark.thorough
def test_a_model_that_keeps_what_it_has_computed_gets_a_token_at_a_time():
    model = made(Cached)
    kept = self_generated_token_batches(model, Tokenizer(), 0, 1.0)
    assert model.lengths[2:] == [1] * (TOKENS - 1)
    assert all(
        torch.equal(*both)
        for both in zip(kept, self_generated_token_batches(made(Decoder), Tokenizer(), 0, 1.0), strict=True)
    )


class Looks(Decoder):
    """Sees the tokens to come."""

    def through(self, x, mask):
        return super().through(x + x.mean(1, keepdim=True), mask=None)


class Broken(Decoder):
    def through(self, x, mask):
        return super().through(x, mask) * torch.nan


class BreaksLater(Decoder):
    def through(self, x, mask):
        return super().through(x, mask) * (torch.nan if x.shape[1] > 5 else 1)


class Short(Decoder):
    def through(self, x, mask):
        if x.shape[1] > 5:
            raise IndexError("too long")
        return super().through(x, mask)


class Encoder(Decoder):
    def forward(self, tokens):
        return super().forward(tokens).mean(1)


class SaysNo(Decoder):
    def can_generate(self):
        return False


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Decoder, {"tokenizer": None}, TypeError, "tokenizer=None must be the model's"),
        (Decoder, {"tokenizer": 3}, TypeError, "tokenizer=3 must be the model's"),
        (Decoder, {"tokenizer": Tokenizer(41)}, ValueError, "has 41 tokens, and Decoder predicts 40"),
        (Decoder, {"tokenizer": Tokenizer(19)}, ValueError, "has 19 tokens, and Decoder predicts 40"),
        (Decoder, {"seed": 1.5}, TypeError, "seed=1.5 must be an integer"),
        (Decoder, {"seed": 2**70}, ValueError, "seed=1180591620717411303424 must be below"),
        (Decoder, {"temperature": 0}, ValueError, "temperature=0 must be finite and above 0"),
        (Decoder, {"temperature": "1"}, TypeError, "temperature='1' must be a number"),
        (Decoder, {"temperature": float("inf")}, ValueError, "temperature=inf must be finite"),
        (Short, {}, ValueError, "Short fails at a text of 6 tokens .IndexError: too long.: pass"),
        (Looks, {}, ValueError, "Looks generates no text .* depends on the tokens to come"),
        (Broken, {}, ValueError, "Broken generates no text .* is NaN"),
        (BreaksLater, {}, ValueError, "BreaksLater generates no text .* is NaN"),
        (Encoder, {}, ValueError, "Encoder generates no text .* returns no logits"),
        (SaysNo, {}, ValueError, r"SaysNo generates no text \(its class has no generate"),
        (
            lambda: nn.Linear(4, 4),
            {},
            ValueError,
            r"Linear generates no text \(called with tokens, it fails: ",
        ),
    ],
)
def test_a_model_that_generates_no_text_is_refused_and_stays(kind, options, error, message):
    model = made(kind).train()
    with refused(model, error, message):
        calibrate(model, "self", **{"tokenizer": Tokenizer()} | options)

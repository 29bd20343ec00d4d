"""Random token ids calibrate a model without text: evenly drawn, without special tokens."""

import types

import pytest
import torch
from torch import nn

from lowmem import FourBit, calibrate
from lowmem.transforms.calibration.random_tokens import random_token_batches
from tests.refusing import refused
from tests.transforms.calibration.test_calibrate import Decoder, assert_same_bytes, made


class Tokenizer:
    """A tokenizer of ``size`` tokens; some of them are special."""

    def __init__(self, size=40, special=(0, 3)):
        self.size, self.all_special_ids = size, list(special)

    def __len__(self):
        return self.size


class Encoder(Decoder):
    """One vector for each text, of more positions than tokens."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(300, 16)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, tokens):
        return super().forward(tokens).mean(1)


def test_ids_are_drawn_evenly_from_all_but_special_tokens():
    text = torch.cat(random_token_batches(made(Decoder), Tokenizer(), 0, 40_000))
    assert text.dtype == torch.int64
    assert text.shape == (157, 256)  # at least as many as asked for, in rows of 256
    counts = text.flatten().bincount(minlength=40)
    assert counts[[0, 3]].tolist() == [0, 0]
    expected = text.numel() / 38
    # Chi squared of 37 degrees of freedom: above 84 with a chance of 1e-5
    assert float(((counts.double() - expected) ** 2 / expected).sum() - 2 * expected) < 84


def test_a_seed_gives_the_same_ids_and_leaves_the_draws_of_others_alone():
    model, state = made(Decoder), torch.get_rng_state()
    one, two = (torch.cat(random_token_batches(model, Tokenizer(), 5, 4096)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.cat(random_token_batches(model, Tokenizer(), 6, 4096)))
    assert torch.equal(state, torch.get_rng_state())
    plain = nn.Embedding(40, 8)
    with torch.device("meta"):  # on which new tensors are by default
        assert torch.equal(one, torch.cat(random_token_batches(plain, Tokenizer(), 5, 4096)))


def test_without_a_tokenizer_the_model_tells_its_vocabulary_and_special_tokens():
    model = made(Encoder)
    model.config = types.SimpleNamespace(
        max_position_embeddings=64, bos_token_id=1, eos_token_id=[2, 4], pad_token_id=None
    )
    text = torch.cat(random_token_batches(model, None, 0, 4096))
    assert text.shape == (64, 64)
    assert set(text.unique().tolist()) == {*range(40)} - {1, 2, 4}
    assert torch.cat(random_token_batches(made(Decoder), None, 0, 100)).shape == (1, 100)


@pytest.mark.parametrize("kind", [Decoder, Encoder])
def test_a_model_is_calibrated_by_random_ids(kind):
    model, tokenizer = made(kind), Tokenizer()
    batches = random_token_batches(model, tokenizer, 0, 512)
    expected = calibrate(made(kind), batches, FourBit("nf4"))
    calibrate(model, "random", FourBit("nf4"), tokenizer=tokenizer, tokens=512)
    assert_same_bytes(model, expected)


def test_self_generated_text_has_as_many_tokens_as_asked_for():
    model, texts = made(Decoder), []
    model.register_forward_pre_hook(lambda _, args: texts.append(args[0].shape))
    calibrate(model, "self", FourBit("nf4"), tokenizer=Tokenizer(special=()), tokens=200)
    assert max(texts) == (2, 128)


class Fails(Decoder):
    def forward(self, input_ids):
        raise RuntimeError("it wants pixels")


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (Decoder, {"tokens": 0}, ValueError, "tokens=0 must be a whole number above 0"),
        (Decoder, {"tokens": 1.5}, TypeError, "tokens=1.5 must be an integer"),
        (Decoder, {"tokens": True}, TypeError, "tokens=True must be an integer"),
        (Decoder, {"seed": 2**70}, ValueError, "seed=1180591620717411303424 must be below"),
        (Decoder, {"tokenizer": Tokenizer(41)}, ValueError, "has 41 tokens, and the embedding of Decoder has 40"),
        (Decoder, {"tokenizer": Tokenizer(19)}, ValueError, "has 19 tokens, and the embedding of Decoder has 40"),
        (Decoder, {"tokenizer": Tokenizer(40, range(40))}, ValueError, "all 40 tokens are special"),
        (Decoder, {"tokenizer": 3}, TypeError, "tokenizer=3 must be the model's"),
        (lambda: nn.Linear(4, 4), {}, ValueError, "Linear has no embedding of tokens"),
        (Fails, {}, ValueError, "Fails fails with random tokens .RuntimeError: it wants pixels.: pass"),
    ],
)
def test_what_has_no_random_tokens_is_refused_and_stays(kind, options, error, message):
    model = made(kind).train()
    with refused(model, error, message):
        calibrate(model, "random", **options)

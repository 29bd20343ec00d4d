"""torch's attention with adapted projections gives what it gives with the dense sums."""

import pytest
import torch
from torch.nn import functional as F

from tests.nn.adapted_cases import make, total
from tests.nn.stored_cases import Case, store

WIDTH, HEADS, ROWS, COLUMNS, BATCH = 8, 2, 5, 6, 3
CAUSAL = torch.full((ROWS, ROWS), float("-inf")).triu(1)
PADDED = torch.tensor([[False] * 4 + [True] * 2, [False] * 6, [False] * 5 + [True]])
OPTIONS = {
    "plain": {},
    "other keys": {"keys": COLUMNS},
    "unbatched": {"keys": COLUMNS, "batch": None, "key_padding_mask": PADDED[0]},
    "weights of each head": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
    "a padded batch": {"keys": COLUMNS, "key_padding_mask": PADDED},
    "a padded batch, without weights": {"keys": COLUMNS, "key_padding_mask": PADDED, "need_weights": False},
    "a mask": {"attn_mask": CAUSAL},
    "a mask of booleans": {"attn_mask": CAUSAL < 0, "need_weights": False},
    "a mask for each head": {"keys": COLUMNS, "attn_mask": torch.randn(BATCH * HEADS, ROWS, COLUMNS)},
    "a causal mask": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "a causal mask and padding": {
        "attn_mask": CAUSAL,
        "is_causal": True,
        "need_weights": False,
        "key_padding_mask": torch.zeros(BATCH, ROWS).masked_fill(PADDED[:, 1:], float("-inf")),
    },
    "one more key": {"keys": COLUMNS, "bias": True, "key_padding_mask": PADDED, "need_weights": False},
    "a key of zeros": {"add_zero_attn": True, "attn_mask": CAUSAL},
    "keys of another width": {"keys": COLUMNS, "separate": True},
    "given keys": {"static_k": torch.randn(BATCH * HEADS, ROWS, WIDTH // HEADS)},
}


def attend(weight, x, keys, out, options):
    """Call torch's function: the weight is ``in_proj_weight``, or that of the queries."""
    options = {"add_zero_attn": False, "bias": False, "separate": False, **options}
    given = torch.linspace(-1, 1, 3 * WIDTH, dtype=x.dtype)
    more = (given[:WIDTH].view(1, 1, -1), given[WIDTH:-WIDTH].view(1, 1, -1)) if options.pop("bias") else (None, None)
    if separate := options.pop("separate"):
        wide = torch.linspace(-1, 1, WIDTH * 4, dtype=x.dtype).view(WIDTH, 4)
        options |= {"use_separate_proj_weight": True, "q_proj_weight": weight, "k_proj_weight": wide}
        options |= {"v_proj_weight": wide * 2}
        keys = keys[..., :4]
    options = {
        name: one.to(x.dtype) if isinstance(one, torch.Tensor) and one.is_floating_point() else one
        for name, one in options.items()
    }
    zero = options.pop("add_zero_attn")
    projection = None if separate else weight
    return F.multi_head_attention_forward(
        x, keys, keys, WIDTH, HEADS, projection, given, *more, zero, 0.0, *out, **options
    )


@pytest.mark.parametrize("form", ["dense", "nf4"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_gives_what_torch_gives_with_the_dense_sum(options, form):
    torch.manual_seed(0)
    options = dict(options)
    count, batch = options.pop("keys", None), options.pop("batch", BATCH)
    middle = () if batch is None else (batch,)
    x = torch.randn(ROWS, *middle, WIDTH)
    keys = x if count is None else torch.randn(count, *middle, WIDTH)
    height = WIDTH if "separate" in options else 3 * WIDTH
    weight, dense, pairs, layout = make("", Case(None, (height, WIDTH), None, WIDTH), form)
    of_out, dense_out, out_pairs, _ = make("", Case(None, (WIDTH, WIDTH), None, WIDTH), form)
    exact_weight, exact_out = total(dense, pairs, layout), total(dense_out, out_pairs, layout)
    wide, wide_keys = x.double(), keys.double()
    got = attend(weight, x, keys, (of_out, None), options)
    exact = attend(exact_weight, wide, wide if keys is x else wide_keys, (exact_out, None), options)
    assert (got[1] is None) == (exact[1] is None)
    for one, other in zip(got, exact, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))
    leaves = [*pairs[0], *out_pairs[0]]
    grads = (torch.autograd.grad(out[0].square().sum(), leaves) for out in (got, exact))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["a padded batch, without weights"]], ids=str)
def test_stored_projections_are_multiplied_without_their_values(options):
    torch.manual_seed(0)
    options = dict(options)
    weights = store(torch.randn(3 * WIDTH, WIDTH), "nf4"), store(torch.randn(WIDTH, WIDTH), "bfloat16")
    x = torch.randn(ROWS, BATCH, WIDTH)
    keys = torch.randn(count, BATCH, WIDTH) if (count := options.pop("keys", None)) else x
    got, exact = (
        attend(projection, x, keys, (out, None), options)
        for projection, out in (weights, [one.dequantize() for one in weights])
    )
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert not weights[0].dequantized_by | weights[1].dequantized_by


def test_dropout_is_of_the_chances_and_in_training_only():
    x = torch.randn(ROWS, BATCH, WIDTH)
    weight, *_ = make("", Case(None, (3 * WIDTH, WIDTH), None, WIDTH), "dense")
    out = torch.eye(WIDTH), None
    for need_weights in (True, False):
        drawn = [
            F.multi_head_attention_forward(
                x, x, x, WIDTH, HEADS, weight, None, None, None, False, 0.5, *out, training, need_weights=need_weights
            )[0]
            for training in (True, True, False, False)
        ]
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[2], drawn[3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_mask": CAUSAL[:, 1:]},
            r"attn_mask is torch.float32 \(5, 4\), .* \(5, 5\) or \(6, 5, 5\)",
        ),
        ({"attn_mask": CAUSAL.long()}, "attn_mask is torch.int64"),
        ({"key_padding_mask": PADDED}, r"key_padding_mask is torch.bool \(3, 6\), and must be .* \(3, 5\)"),
        ({"is_causal": True}, "attn_mask=None with is_causal=True"),
    ],
)
def test_a_mask_of_another_shape_is_refused(options, message):
    weight, *_ = make("", Case(None, (3 * WIDTH, WIDTH), None, WIDTH), "dense")
    x = torch.randn(ROWS, BATCH, WIDTH)
    with pytest.raises(RuntimeError, match=message):
        attend(weight, x, x, (torch.eye(WIDTH), None), options)

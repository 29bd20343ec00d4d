"""A cache of keys and values that grows in place, in full precision and in 8 bits, beside transformers' own."""

import copy
import inspect
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
    T5Config,
)

import lowmem
from lowmem.integrations.transformers.attention_interface import ATTENTION
from lowmem.integrations.transformers.key_value_cache import KeyValueCache
from lowmem.nn.cached_keys_and_values import CachedStates, EightBitStates
from tests.selection import covering

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
ENDLESS = {"vocab_size": 60, "eos_token_id": None, "bos_token_id": 1, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "gemma2": Gemma2Config(**SIZES, sliding_window=9, attn_logit_softcapping=3.0, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=9, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
    ),
    "qwen3": Qwen3Config(**SIZES),
    "phi3": Phi3Config(**SIZES | {"hidden_size": 64}, sliding_window=9),
    "gpt2": GPT2Config(**ENDLESS, n_embd=32, n_layer=2, n_head=2, n_positions=64),
}
PAIRS = {
    "bart": BartConfig(
        **ENDLESS,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    ),
    "t5": T5Config(**ENDLESS, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0),
}


def model_of(name, attention=None):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name]) if name in CONFIGS else None
    model = (made or AutoModelForSeq2SeqLM.from_config(PAIRS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # else attention is nearly uniform
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def prompts(rows=3):
    ids = torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    return {"input_ids": ids[-rows:], "attention_mask": mask[-rows:]}


OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt in parts": {"prefill_chunk_size": 3},
    "looked up": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


def test_its_parameters_stay():
    assert list(inspect.signature(KeyValueCache).parameters) == ["model", "bits"]
    assert "nbytes" in vars(KeyValueCache)


def generated(name, attention, cache, options):
    """Return what a model generates with a cache, which is made of a function and the model's config."""
    model, given = model_of(name, attention), dict(OPTIONS[options])
    if options == "assisted":
        given["assistant_model"] = model_of(name, attention)
    torch.manual_seed(0)
    named = prompts(1 if options in ("looked up", "assisted") else 3) | {"do_sample": False} | given
    return model.generate(**named, max_new_tokens=40, cache=cache(config=model.config) if cache else None)


@covering(name=CONFIGS, options=OPTIONS)
def test_tokens_are_those_of_transformers_own_cache(name, options):
    expected = generated(name, "eager", DynamicCache, options)
    assert torch.equal(generated(name, ATTENTION, lambda config: KeyValueCache(config), options), expected)


class Rounded(DynamicCache):
    """Keeps what a cache in 8 bits decodes, in transformers' own layers."""

    def update(self, keys, values, layer, *given, **named):
        first = self.get_seq_length(layer) == 0
        seen = super().update(rounded(keys), rounded(values), layer, *given, **named)
        return (keys, values) if first else seen


def rounded(states):
    cached = CachedStates(bits=8)
    cached.append(states)
    return cached.states + 0


@covering(name=CONFIGS, options=OPTIONS)
def test_codes_are_reordered_and_cropped_as_numbers_are(name, options):
    got = generated(name, "eager", lambda config: KeyValueCache(config, bits=8), options)
    assert torch.equal(got, generated(name, "eager", Rounded, options))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", ["greedy", "beams"])
def test_an_encoder_and_decoder_take_a_cache_each(name, options):
    def pair(kind, **named):
        return lambda config: EncoderDecoderCache(kind(config=config, **named), kind(config=config, **named))

    def own(config, bits=None):
        return KeyValueCache(config, bits)

    expected = generated(name, "eager", None, options)
    assert torch.equal(generated(name, ATTENTION, pair(own), options), expected)
    assert torch.equal(
        generated(name, "eager", pair(own, bits=8), options), generated(name, "eager", pair(Rounded), options)
    )


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_static_caches_stay_as_they_are(name):
    model = model_of(name, ATTENTION)
    named = prompts() | {"do_sample": False, "max_new_tokens": 40}
    expected = generated(name, "eager", DynamicCache, "greedy")
    assert torch.equal(model.generate(**named, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_logits_in_8_bits_are_near_those_of_full_precision(name):
    model = model_of(name, ATTENTION)
    ids = torch.randint(1, 60, (2, 30), generator=torch.Generator().manual_seed(1))
    exact, rounded = KeyValueCache(model), KeyValueCache(model, bits=8)
    with torch.no_grad():
        for start in (0, *range(10, 30)):
            part = ids[:, start : start + (10 if start == 0 else 1)]
            expected, got = (model(part, cache=one).logits for one in (exact, rounded))
            off = (got - expected).norm() / expected.norm()
            assert (off == 0) if start == 0 else (0 < off < 0.05)


def test_any_attention_reads_a_cache_in_8_bits():
    ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    logits = []
    for attention in (ATTENTION, "sdpa", "eager"):
        model = model_of("llama", attention)
        cache = KeyValueCache(model, bits=8)
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
            logits.append(torch.cat([model(ids[:, i : i + 1], cache=cache).logits for i in range(8, 12)]))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-4, atol=1e-4)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["reorder", "repeat", "select", "reset", "copy", "record"]), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@given(name=st.sampled_from(["llama", "mistral"]), steps=STEPS)
def test_layers_keep_what_transformers_layers_keep(name, steps):
    ours, theirs = KeyValueCache(CONFIGS[name]), DynamicCache(config=CONFIGS[name])
    batch, can_crop, length = 2, name == "llama", 0
    for seed, (step, count) in enumerate(steps):
        caches = ours, theirs
        if step == "update":
            new = torch.randn(2, batch, 2, count, 16, generator=torch.Generator().manual_seed(seed))
            for got, expected in zip(*(one.update(*new, 0) for one in caches), strict=True):
                assert torch.equal(got, expected)
            length += count
        elif step == "crop" and can_crop and length > count:
            for one in caches:
                one.layers[0].crop(-count)  # the other layer is empty, which transformers' own cannot crop
            length -= count
        elif step == "record":
            for one in caches:
                one.activate_past_recording()
            can_crop = can_crop or length == 0
        elif step == "copy":
            ours = copy.deepcopy(ours)
        elif step == "reset":
            for one in caches:
                one.reset()
            length = 0
        elif length and step in ("reorder", "repeat", "select"):
            for one in caches:
                if step == "reorder":
                    one.reorder_cache(torch.arange(batch - 1, -1, -1))
                elif step == "repeat" and batch < 8:
                    one.batch_repeat_interleave(2)
                elif step == "select":
                    one.batch_select_indices(torch.arange(batch - 1))
            batch += {"reorder": 0, "repeat": batch if batch < 8 else 0, "select": -1}[step]
            if not batch:
                return
        assert ours.get_seq_length() == theirs.get_seq_length() == length
        if length:
            assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)
            assert torch.equal(ours.layers[0].values, theirs.layers[0].values)


def test_a_token_is_added_in_place():
    cache = KeyValueCache(CONFIGS["llama"])
    new = torch.randn(1, 2, 8, 16)
    cache.update(new, new, 0)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(20):
        keys, _ = cache.update(new[:, :, :1], new[:, :, :1], 0)
        assert keys.data_ptr() == before


@pytest.mark.parametrize(("name", "rows"), [("llama", 128), ("mistral", 64)])
@pytest.mark.parametrize(
    ("bits", "dtype", "row"), [(None, torch.bfloat16, 32), (None, torch.float32, 64), (8, torch.bfloat16, 20)]
)
def test_bytes_are_those_of_rows_and_their_room(bits, dtype, row, name, rows):
    cache = KeyValueCache(CONFIGS[name], bits=bits)
    assert cache.nbytes == 0
    for layer in range(2):
        cache.update(*torch.zeros(2, 3, 2, 100, 16, dtype=dtype), layer)
    assert cache.nbytes == 2 * 2 * 3 * 2 * rows * row  # layers, keys and values, sequences, heads, rows
    cache.reset()
    assert cache.nbytes == 0


@covering(name=CONFIGS, bits=[None, 8], dtype=[torch.float32, torch.bfloat16])
def test_a_plan_has_the_bytes_of_the_cache(name, bits, dtype):
    """After a prompt and single tokens; windows, shared heads and a head's width are the model's."""
    make = partial(AutoModelForCausalLM.from_config, CONFIGS[name], dtype=dtype)
    ids = torch.zeros(2, 50, dtype=torch.int64)
    tokens = {"batch": ids[:, :1], "training": None, "sequences": 2, "cache_bits": bits}
    model, cache, found = make(), KeyValueCache(CONFIGS[name], bits), []
    with torch.no_grad():
        for part in (ids[:, :20], *ids[:, 20:41].split(1, 1)):
            model(part, cache=cache)
            found.append(cache.nbytes)
    for count in (20, 33, 41):
        planned = lowmem.plan(make, **tokens, tokens=count)
        assert planned.cache == found[count - 20]
    without = lowmem.plan(make, batch=ids[:, :1], training=None)
    assert (without.cache, planned.inference_bytes) == (0, without.inference_bytes + planned.cache)
    assert ["keys and values", f"{planned.cache / 2**20:.2f}"] in planned.cells


def test_a_plan_refuses_the_cache_of_other_models():
    def planned(make, **given):
        return lowmem.plan(make, batch=torch.zeros(1, 4, dtype=torch.int64), training=None, **given)

    llama = partial(AutoModelForCausalLM.from_config, CONFIGS["llama"])
    encoder = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    for make, options, said in (
        (
            lambda: BertModel(encoder),
            {"tokens": 9},
            "tokens=9 plans the keys and values of a causal language model of transformers, and a BertModel keeps",
        ),
        (
            lambda: torch.nn.Embedding(4, 4),
            {"tokens": 9},
            "of transformers, and a Embedding keeps none: leave it out, and add nbytes of your lowmem.CachedStates",
        ),
        (llama, {"cache_bits": 8}, "sequences=1, cache_bits=8: plan a cache, and give its tokens"),
        (llama, {"tokens": 0}, "tokens=0 and sequences=1 must be at least 1"),
        (llama, {"tokens": 4, "cache_bits": 4}, "bits=4 must be 8"),
    ):
        with pytest.raises(ValueError, match=said):
            planned(make, **options)


def test_states_in_8_bits_decode_in_any_function():
    cache = KeyValueCache(CONFIGS["llama"], bits=8)
    states = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    first, _ = cache.update(states, states, 0)
    assert first is states  # a prompt's own attention is exact
    keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert isinstance(keys, EightBitStates)
    assert keys.shape == (1, 2, 6, 16)
    plain = keys + 0
    assert type(plain) is torch.Tensor
    expected = torch.cat([states, states[:, :, :1]], 2).float()
    assert ((plain.float() - expected).abs() <= expected.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-8)).all()


@pytest.mark.parametrize("bits", [None, 8])
def test_values_that_are_refused_leave_the_keys_as_they_were(bits):
    cache = KeyValueCache(CONFIGS["llama"], bits=bits)
    states = torch.ones(1, 2, 3, 8)
    cache.update(states, states, 0)
    for values, error in ((states.int(), TypeError), (states[..., :4], ValueError), (states[:, :1], ValueError)):
        with pytest.raises(error):
            cache.update(states, values, 0)
        assert cache.get_seq_length() == 3
        assert [one.count for one in cache.layers[0].cached.values()] == [3, 3]


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match="bits=4 must be 8"):
        KeyValueCache(CONFIGS["llama"], bits=4)

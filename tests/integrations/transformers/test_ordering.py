"""The first parameter of a converted model has the dtype of the dense one, as other programs expect."""

import copy

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    ResNetConfig,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)

import lowmem
from lowmem import EightBit, FourBit, Half
from lowmem.integrations.transformers import LowmemConfig
from tests.integrations.transformers.folders import SIZES, assert_same
from tests.integrations.transformers.tokens import write_tokenizer

BERT = BertConfig(**SIZES, pad_token_id=1)
CONFIGS = [
    BERT,
    Qwen3Config(**SIZES, head_dim=16),
    T5Config(vocab_size=258, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
    SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
]


@pytest.mark.filterwarnings("ignore:.* of the bytes of .* are weights that stay dense")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_the_first_parameter_has_the_dtype_of_the_model(tmp_path, config):
    """Read, converted inside another model, and read again; names and outputs are those of any converted model."""
    kind = T5EncoderModel if config.model_type == "t5" else AutoModel
    dense = kind.from_config(config) if kind is AutoModel else kind(config)
    dense.save_pretrained(tmp_path / "dense")
    for number, (technique, dtype) in enumerate(
        [(FourBit("nf4"), torch.float32), (Half(), torch.float32), (EightBit(), torch.bfloat16)]
    ):
        dense = kind.from_pretrained(tmp_path / "dense", dtype=dtype)
        names = {name for name, _ in dense.named_modules()}
        converted = lowmem.convert(nn.Sequential(dense, nn.Linear(64, 64)), technique)[0]
        read = kind.from_pretrained(tmp_path / "dense", quantization_config=LowmemConfig(technique), dtype=dtype)
        read.save_pretrained(tmp_path / str(number))
        again = kind.from_pretrained(tmp_path / str(number))
        for model in (converted, read, again, copy.deepcopy(read)):
            assert next(model.parameters()).dtype is model.dtype is dtype
            assert {name for name, _ in model.named_modules()} == names
            assert_same(model, converted)
        assert next(read.half().parameters()).dtype is read.dtype is torch.float16


class Ordered(PreTrainedModel):
    """Calls its children one after the other."""

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.first = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64))
        self.second = nn.LayerNorm(64)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def test_children_whose_order_is_read_stay_in_it():
    model = Ordered()
    lowmem.convert(model, FourBit("nf4"))
    assert [name for name, _ in model.named_children()] == ["first", "second"]
    assert [type(one).__name__ for one in model.first] == ["Linear4Bit", "LayerNorm"]
    x = torch.randn(2, 64)
    assert torch.equal(model(x), model.second(model.first[1](model.first[0](x))))


@pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning", "default::UserWarning")
@pytest.mark.parametrize("technique", [FourBit("nf4"), Half()], ids=["nf4", "half"])
def test_sentence_transformers_takes_a_stored_model(tmp_path, technique):
    """It casts its own modules to the dtype of the first parameter."""
    reason = "sentence-transformers is not installed: tox -e transformers"
    package = pytest.importorskip("sentence_transformers", reason=reason)
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    torch.manual_seed(0)
    AutoModel.from_config(BERT).save_pretrained(tmp_path / "bert")
    write_tokenizer(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(64), Dense(64, 32)]
    package.SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "dense"))
    texts = ["a first text", "another"]
    for dtype in (torch.float32, torch.bfloat16):
        load = lambda name, dtype=dtype, **more: package.SentenceTransformer(  # noqa: E731
            str(tmp_path / name), device="cpu", model_kwargs={"dtype": dtype, **more}
        )
        dense, read = load("dense"), load("dense", quantization_config=LowmemConfig(technique))
        expected = lowmem.convert(load("dense"), technique, where=lambda path, _: path.startswith("0."))
        read.save(str(tmp_path / f"stored {dtype}"))
        for model in (read, expected, load(f"stored {dtype}")):
            assert model.dtype is dense.dtype is dtype
            assert model[2].linear.weight.dtype is dtype
            assert (model.encode(texts) == expected.encode(texts)).all()
        assert abs(read.encode(texts) - dense.encode(texts)).max() < 0.1

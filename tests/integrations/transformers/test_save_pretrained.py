"""``save_pretrained`` of a converted model writes what ``from_pretrained`` loads, to the bit."""

import copy
import json
import pickle
from contextlib import contextmanager

import pytest
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    ResNetConfig,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

import lowmem
from lowmem import EightBit, FourBit, Half, LoRA
from lowmem.__main__ import main
from lowmem.integrations.transformers import METHOD, LowmemConfig, adopt
from lowmem.integrations.transformers.pretrained_folder import checked_config_and_tensor_bytes
from lowmem.io.metadata_records import form_to_record_dict
from lowmem.nn.forms import CodedForm
from lowmem.transforms.module_registry import all_paths_by_module
from lowmem.version import install_command
from tests.integrations.transformers.folders import CONFIGS, IDS, SIZES, assert_same, load, write
from tests.integrations.transformers.hub import copy_uploads
from tests.integrations.transformers.tokens import write_tokenizer


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_loaded_again(tmp_path, kind):
    dense = write(tmp_path / "dense", kind)
    for number, technique in enumerate((FourBit("bof4s", 32), Half())):
        model = lowmem.convert(load(dense), technique)
        model.save_pretrained(tmp_path / f"{number}", max_shard_size="30KB")
        assert (tmp_path / f"{number}" / "model.safetensors.index.json").exists()
        again = load(tmp_path / f"{number}")
        assert_same(again, model)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        base = load(tmp_path / f"{number}", as_class=AutoModel)
        assert_same(base, model.base_model)
        again.save_pretrained(tmp_path / f"{number} again", max_shard_size="30KB")
        for file in (tmp_path / f"{number}").iterdir():
            assert file.read_bytes() == (tmp_path / f"{number} again" / file.name).read_bytes()
        own = load(tmp_path / f"{number}", dtype=torch.bfloat16)  # the rest in bfloat16; what is stored stays
        assert own.dtype == torch.bfloat16 != model.dtype == torch.float32
        for name, value in own.state_dict().items():
            if name.endswith(("_packed", "_scales", "_rounded")):
                assert torch.equal(value, model.state_dict()[name])


def test_a_model_without_a_folder_and_parts_of_it(tmp_path):
    """Only a part was converted, by hand; names are those of the whole."""
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    lowmem.convert(model.model.layers[1], FourBit("nf4"))
    adopt(model)
    model.save_pretrained(tmp_path)
    (record,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    names = record.pop("names")
    assert record == form_to_record_dict(CodedForm("nf4", 64, "double", "absmax"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert all(name.startswith("model.layers.1.") for name in names)
    assert "model.layers.1.mlp.experts.gate_up_proj_packed" in load_file(tmp_path / "model.safetensors")
    assert_same(load(tmp_path), model)
    lowmem.restore(model).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_count_of_parameters_is_that_of_the_weights(tmp_path, kind):
    dense = load(write(tmp_path, kind))
    wanted = {flag: dense.num_parameters(exclude_embeddings=flag) for flag in (False, True)}
    assert wanted[False] == sum(one.numel() for one in dense.parameters())
    for technique in (FourBit("nf4"), Half()):
        model = lowmem.convert(load(tmp_path), technique)
        assert {flag: model.num_parameters(exclude_embeddings=flag) for flag in wanted} == wanted
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        assert model.num_parameters(only_trainable=True) == trained
        lowmem.convert(model, LoRA(2))
        added = sum(one.numel() for one in model.parameters() if one.requires_grad)
        assert model.num_parameters(only_trainable=True) == added
        assert model.num_parameters() == wanted[False] + added


def test_adapters_are_saved_with_their_base(tmp_path):
    dense = write(tmp_path / "dense")
    config = LowmemConfig(FourBit("nf4"))
    model = lowmem.add_adapter(load(dense, quantization_config=config), "one", LoRA(4, ranks={"*up_proj": 2}))
    lowmem.add_adapter(model, "two", LoRA(3, rank_stabilized=True), where=lambda path, _: path.endswith("q_proj"))
    lowmem.activate(model, "one")
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert_same(again, model)
    assert lowmem.active_adapters(again) == lowmem.active_adapters(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    base = load(tmp_path / "small", as_class=AutoModel)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    only = lowmem.convert(load(dense), LoRA(4))
    only.save_pretrained(tmp_path / "only adapters")
    assert_same(load(tmp_path / "only adapters"), only)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4"))
    target = tmp_path / "new" / "small"
    written = []

    def interrupted(tensors, path, **named):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **named)

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(target, max_shard_size="20kB")
    assert written
    assert list(target.parent.iterdir()) == []
    model.save_pretrained(target, max_shard_size="20kB")
    assert_same(load(target), model)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lowmem.convert(load(tmp_path / "dense"), EightBit()).save_pretrained(target, max_shard_size="20kB")
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        model.save_pretrained(tmp_path / "file" / "small")


@contextmanager
def files_of_at_most(size):
    """Let no file grow beyond a size in the block, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(resource is None, reason="Windows has no limits of processes")
def test_a_full_disk_is_an_error_of_one_line_and_leaves_what_was_there(tmp_path, capfd):
    dense = write(tmp_path / "dense")
    model = lowmem.convert(load(dense), Half())
    model.save_pretrained(tmp_path / "old")
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for name in ("old", "new"):
        says = rf"^cannot write '.*/{name}': .*arge.*; make room on its disk"
        with pytest.raises(OSError, match=says) as raised, files_of_at_most(20_000):
            model.save_pretrained(tmp_path / name)
        assert "\n" not in str(raised.value)
    capfd.readouterr()
    with files_of_at_most(20_000):
        assert main(["quantize", str(dense), str(tmp_path / "new")]) == 2
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(f"lowmem quantize: cannot write '{tmp_path / 'new'}': ")
    assert told.endswith("; make room on its disk, or choose another one")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files


def test_a_folder_that_exists_has_the_model_that_was_saved_last(tmp_path):
    """transformers leaves a whole file beside the shards of a later save, and reads it: the old weights."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4"))
    small = tmp_path / "small"
    small.mkdir()
    (small / "README.md").write_text("a card")
    sizes = ("5GB", "20kB", "40kB", "5GB", "5GB")
    for number, options in enumerate({"max_shard_size": size} for size in sizes):
        torch.nn.init.constant_(model.model.norm.weight, number)
        model.save_pretrained(small, **options)
        assert_same(load(small), model)
        checked_config_and_tensor_bytes(small)  # an index and its shards, or a whole file, and never both
        model.save_pretrained(small, variant="v1.5", **options)
        assert_same(load(small, variant="v1.5"), model)
    left = {"README.md", "config.json", "generation_config.json", "model.safetensors", "model.v1.5.safetensors"}
    assert {file.name for file in small.iterdir()} == left


def test_the_config_of_an_older_adapter_goes_when_the_model_is_there(tmp_path, monkeypatch):
    """transformers would load the adapter and its base in place of the model."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4"))
    out = tmp_path / "out"
    adapted = lowmem.add_adapter(copy.deepcopy(model), "default", LoRA(2))
    lowmem.save_adapter(adapted, out, format="peft", base_name=str(tmp_path / "dense"))
    (out / "training.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="cannot write"):
            model.save_pretrained(out)
    kept = ["adapter_config.json", "adapter_model.safetensors", "training.json"]
    assert sorted(one.name for one in out.iterdir()) == kept
    model.save_pretrained(out)
    assert_same(load(out), model)
    assert [(out / name).exists() for name in kept] == [False, True, True]


def test_a_model_that_is_converted_has_a_class_of_its_own_under_the_same_name(tmp_path):
    """Inner models have one, too; restore, dequantize, pickle and deepcopy know both."""
    dense = load(write(tmp_path / "dense"))
    kinds = type(dense), type(dense.model)
    for model in (
        lowmem.convert(load(tmp_path / "dense"), FourBit("nf4")),
        load(tmp_path / "dense", quantization_config=LowmemConfig(Half())),
        lowmem.add_adapter(load(tmp_path / "dense"), "a", LoRA(2)),
    ):
        for one in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            for made, kind in zip((type(one), type(one.model)), kinds, strict=True):
                assert made is not kind
                assert issubclass(made, kind)
                assert (made.__name__, made.__qualname__, made.__module__) == (
                    kind.__name__,
                    kind.__qualname__,
                    kind.__module__,
                )
            assert one.can_generate()
            assert torch.equal(one(IDS).logits, model(IDS).logits)
    model = lowmem.convert(load(tmp_path / "dense"), FourBit("nf4"))
    inner = lowmem.convert(load(tmp_path / "dense").model, FourBit("nf4"))
    assert (type(model.dequantize()), type(model.model)) == kinds
    assert type(lowmem.restore(inner)) is kinds[1]
    for forget in (lambda one: lowmem.delete_adapter(one, "a"), lowmem.merge):
        assert type(forget(lowmem.add_adapter(load(tmp_path / "dense"), "a", LoRA(2)))) is kinds[0]
    assert not hasattr(inner, "hf_quantizer")
    assert not hasattr(inner.config, "quantization_config")


def test_a_model_of_the_same_config_object_stays_dense(tmp_path):
    config = CONFIGS["llama"]
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    lowmem.convert(model, FourBit("nf4"))
    assert not hasattr(config, "quantization_config")
    assert {id(one.config) for one in model.modules() if hasattr(one, "config")} == {id(model.config)}
    for number, one in enumerate((other, model)):
        one.save_pretrained(tmp_path / f"{number}")
        assert_same(load(tmp_path / f"{number}"), one)


def test_a_model_whose_inner_one_was_converted_says_so_in_its_config(tmp_path):
    """The class of the outer one is that of transformers, which writes the config that both share."""
    model = load(write(tmp_path / "dense", "llama"))
    lowmem.convert(model.model, FourBit("nf4"))
    model.save_pretrained(tmp_path / "small")
    assert_same(load(tmp_path / "small"), model)


@pytest.mark.parametrize("technique", [FourBit("nf4"), EightBit(), Half(), LoRA(2), (Half(), LoRA(2))], ids=str)
def test_no_folder_is_read_as_random_numbers_where_nothing_says_how_it_is_stored(tmp_path, technique):
    """None takes the place of what config.json says, as a config of a dense model does; codes are refused."""
    model = load(write(tmp_path / "dense"))
    lowmem.convert(model, *(technique if isinstance(technique, tuple) else (technique,)))
    model.save_pretrained(tmp_path / "a")
    for asked in ({"quantization_config": None}, {"config": AutoConfig.from_pretrained(tmp_path / "dense")}):
        if isinstance(technique, FourBit | EightBit):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                load(tmp_path / "a", **asked)
            continue
        found = load(tmp_path / "a", **asked)
        assert type(found.lm_head) is torch.nn.Linear
        dense = model if isinstance(technique, LoRA) else lowmem.restore(copy.deepcopy(model))
        assert torch.equal(found(IDS).logits, dense(IDS).logits)  # adapters are new: they add nothing yet


def test_what_is_pushed_to_the_hub_loads(tmp_path, monkeypatch):
    copy_uploads(monkeypatch, tmp_path / "hub")
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4"))
    model.push_to_hub("me/small", max_shard_size="20kB")
    model.save_pretrained(tmp_path / "same", push_to_hub=True, repo_id="me/same")
    for name in ("small", "same"):
        assert_same(load(tmp_path / "hub" / "me" / name), model)
        assert (tmp_path / "hub" / "me" / name / "README.md").exists()


def test_without_lowmem_the_folder_says_what_is_missing(tmp_path, monkeypatch, caplog):
    lowmem.convert(load(write(tmp_path / "dense")), FourBit()).save_pretrained(tmp_path / "small")
    found = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert install_command("transformers") in found["notice"]
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)  # as where lowmem is not imported
    messages = []
    monkeypatch.setattr("transformers.quantizers.auto.logger.warning", messages.append)
    assert not AutoHfQuantizer.supports_quant_method(found)
    assert "lowmem: import lowmem.integrations.transformers" in messages[0]


BERT = BertConfig(**SIZES, pad_token_id=1)
ORDERED = [
    BERT,
    Qwen3Config(**SIZES, head_dim=16),
    T5Config(vocab_size=258, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2),
    SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
]


def by_name(model):
    modules = dict(model.named_modules())
    return [modules[name] for name in sorted(modules)]


@pytest.mark.filterwarnings("ignore:.* of the bytes of .* are weights that stay dense")
@pytest.mark.parametrize("config", ORDERED, ids=lambda config: config.model_type)
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
        order = [[name for name, _ in module.named_children()] for module in by_name(dense)]
        converted = lowmem.convert(nn.Sequential(dense, nn.Linear(64, 64)), technique)[0]
        read = kind.from_pretrained(tmp_path / "dense", quantization_config=LowmemConfig(technique), dtype=dtype)
        read.save_pretrained(tmp_path / str(number))
        again = kind.from_pretrained(tmp_path / str(number))
        for model in (converted, read, again, copy.deepcopy(read)):
            assert next(model.parameters()).dtype is model.dtype is dtype
            assert {name for name, _ in model.named_modules()} == names
            assert [[name for name, _ in module.named_children()] for module in by_name(model)] == order
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


class Alone(PreTrainedModel):
    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.only = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.only(x)


def test_children_stay_in_their_order():
    model = Ordered()
    lowmem.convert(model, FourBit("nf4"))
    assert [name for name, _ in model.named_children()] == ["first", "second"]
    assert [type(one).__name__ for one in model.first] == ["Linear4Bit", "LayerNorm"]
    x = torch.randn(2, 64)
    assert torch.equal(model(x), model.second(model.first[1](model.first[0](x))))
    assert [name for name, _ in model.named_modules()] == ["", "first.1", "first", "first.0", "second"]
    assert [name for name, _ in model.named_modules({model}, "a")] == []
    lowmem.add_adapter(model, "own", lowmem.LoRA(2))  # whose modules stay behind their bank
    assert [*all_paths_by_module(model).values()] == [[""], ["first.1"], ["first"], ["first.0"], ["second"]]
    alone = lowmem.convert(Alone(), FourBit("nf4"), lowmem.LoRA(2))
    assert [*all_paths_by_module(alone).values()] == [[""], ["only"]]


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


def test_the_device_is_found_without_a_walk_over_the_model(tmp_path, monkeypatch):
    """``generate`` asks for it several times a token; a walk over 30 blocks takes a sixth of a token's time."""
    model = lowmem.convert(load(write(tmp_path / "dense")), FourBit("nf4"))
    walks, own = [], type(model).named_modules
    monkeypatch.setattr(type(model), "named_modules", lambda *given, **more: walks.append(1) or own(*given, **more))
    assert (model.device, walks) == (torch.device("cpu"), [])
    assert model.to("meta").device.type == "meta"

"""One walk converts any model, and an error leaves it as it was."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

from lowmem import (
    Embedding8Bit,
    FourBit,
    Half,
    HalfLinear,
    Linear4Bit,
    LoRA,
    LoRALinear,
    QuantizedTensor,
    StoredTensor,
    adapter_layers,
    add_adapter,
    calibrate,
    convert,
    load,
    measure,
    restore,
    save,
    summary,
)
from lowmem.nn.adapted_forward import LINEAR
from lowmem.nn.adapter_bank import parameter_of
from lowmem.nn.stored_module import StoredModule
from lowmem.transforms.convert import commit
from lowmem.transforms.registry import made_by
from tests.rounding import OF_4_BITS, assert_sum, unit
from tests.selection import covering, rows_in_one_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:.* are weights that stay dense"),  # of these few; the warning has its own test
]


class Subclass(nn.Linear):
    pass


class Cosine(nn.Linear):
    def forward(self, x):
        return x @ (self.weight / self.weight.norm(dim=1, keepdim=True)).T


class Odd(nn.Module):
    """A model as users write them: nested, shared, in containers, with things that are not layers."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.ReLU()])
        self.dict = nn.ModuleDict({"head": nn.Linear(8, 8), "shared": self.shared})
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Conv1d(8, 8, 1))
        self.special = Subclass(8, 8)
        self.nothing = None
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        x = self.again(self.shared(x))
        x = self.list[1](self.list[0](x)) + self.dict["head"](x) + self.dict["shared"](x)
        return self.special(self.inner[0](x)) * self.scale


def kinds(model):
    return {path: type(module) for path, module in model.named_modules() if hasattr(module, "in_features")}


@pytest.mark.parametrize(("techniques", "layer"), [((Half(),), HalfLinear), ((FourBit(),), Linear4Bit)])
def test_every_exact_linear_is_converted_wherever_it_stands(techniques, layer):
    model = Odd()
    expected = model(torch.ones(2, 8))
    assert convert(model, *techniques) is model
    assert kinds(model) == {
        "shared": layer,
        "list.0": layer,
        "dict.head": layer,
        "inner.0.0": layer,
        "special": type(model.special),
    }
    assert isinstance(model.special, Subclass)
    assert made_by(model.special) is type(techniques[0])
    assert model.shared is model.again is model.dict["shared"]
    assert model(torch.ones(2, 8)).shape == expected.shape


def test_techniques_compose_from_left_to_right():
    model = convert(Odd(), FourBit(), LoRA(2))
    assert isinstance(model.shared, LoRALinear)
    assert isinstance(model.shared, Linear4Bit)
    adapted = convert(convert(Odd(), Half()), LoRA(2))
    assert isinstance(adapted.shared, HalfLinear)
    assert isinstance(adapted.shared, LoRALinear)


def test_the_root_itself_can_be_the_layer():
    assert type(convert(nn.Linear(4, 4), Half())) is HalfLinear
    layer = nn.Linear(4, 4)
    assert convert(layer, FourBit(), LoRA(1)) is layer
    assert isinstance(layer, LoRALinear)


def test_where_sees_every_path_and_chooses():
    seen = []
    model = convert(Odd(), Half(), where=lambda path, module: seen.append(path) or path.startswith("list"))
    assert [path for path, kind in kinds(model).items() if kind is HalfLinear] == ["list.0"]
    assert {"", "shared", "list", "list.0", "dict", "inner.0.0", "special"} <= set(seen)


@rows_in_one_case(
    ("skip", "left"),
    [
        ("list.*", {"list.0"}),
        (["dict.head", "inner.*"], {"dict.head", "inner.0.0"}),
        ("again", {"shared"}),  # any path of a shared module
        ("*.0", {"list.0", "inner.0.0"}),
    ],
)
def test_skip_leaves_matching_paths_alone(skip, left):
    model = convert(Odd(), FourBit(), skip=skip)
    assert {path for path, kind in kinds(model).items() if kind is nn.Linear} == left


def test_layers_left_out_can_be_converted_later():
    model = convert(Odd(), FourBit(), skip="dict.*")
    convert(model, Half(), where=lambda path, _: path.startswith("dict"))
    assert type(model.dict["head"]) is HalfLinear
    assert type(model.shared) is nn.Linear  # it stands in dict too: skipped once, not chosen by its first path


@rows_in_one_case(
    "wrap",
    [
        weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
    ],
)
def test_weights_that_are_recomputed_are_left_alone(wrap):
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 8))
    expected = type(model[0])
    convert(model, FourBit())
    assert type(model[0]) is expected
    assert type(model[1]) is Linear4Bit


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_a_pruned_bias_is_computed_as_before(technique):
    layer = prune.l1_unstructured(nn.Linear(8, 8), "bias", 0.5)
    x, bias = torch.randn(2, 8), layer.bias.detach().clone()
    made = convert(layer, technique)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight.dequantize(), bias))


@rows_in_one_case("alias", ["shared", "again", "dict.shared"])
def test_where_leaves_a_shared_module_alone_when_it_refuses_any_of_its_paths(alias):
    model = convert(Odd(), FourBit(), where=lambda path, _: path != alias)
    assert type(model.shared) is nn.Linear
    assert type(model.list[0]) is Linear4Bit


def test_hooks_stay_fire_once_and_can_be_removed():
    calls = []
    model = nn.Sequential(nn.Linear(8, 8))
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: calls.append("pre")),
        model[0].register_forward_hook(lambda module, args, out: calls.append(type(module).__name__)),
        model[0].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
    ]
    convert(model, LoRA(2))
    model(torch.ones(1, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "Linear", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 8))
    assert len(calls) == 3


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    model = convert(Odd().train(training), FourBit(), LoRA(2, dropout=0.1))
    assert all(module.training == training for module in model.modules())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@rows_in_one_case("training", [True, False])
@rows_in_one_case("techniques", [(Half(),), (FourBit(),), (FourBit(), LoRA(2))])
def test_a_transformer_keeps_working_where_torch_would_read_dense_weights(techniques, training):
    """In float64, where what two orders of addition differ by is 1e-15 of a sum: 1e-9 allows for any condition."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).train(training)
    model = convert(copy.deepcopy(dense), *techniques).double()
    twin = dense_twin(dense, model).double()
    x, mask = torch.randn(2, 5, 16).double(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        got, expected = (one(x, src_key_padding_mask=mask) for one in (model, twin))
    assert type(model.layers[0].linear1) is not nn.Linear
    torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-9, atol=1e-9)


def dense_twin(dense, converted):
    """Return a copy of a dense model whose weights are what the converted one stores."""
    twin = copy.deepcopy(dense)
    for path, made in converted.named_modules():
        if isinstance(made, StoredModule):
            layer = twin.get_submodule(path)
            for name in made.forms:
                weight = made.stored_weight(name)
                values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
                with torch.no_grad():
                    layer._parameters[name].copy_(values.view_as(layer._parameters[name]))
    return twin


def encoder(batch_first, norm_first, activation="relu"):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, activation=activation, batch_first=batch_first, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2)


EVERY = [(Half(),), (Half(torch.bfloat16),), (FourBit(block_size=16),), (FourBit(block_size=16), LoRA(2))]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@covering(techniques=EVERY, batch_first=[True, False], norm_first=[True, False], training=[True, False])
def test_an_encoder_computes_with_what_is_stored(techniques, batch_first, norm_first, training):
    dense = encoder(batch_first, norm_first).train(training)
    model = convert(copy.deepcopy(dense), *techniques)
    expected, x = dense_twin(dense, model), torch.randn(2, 5, 16)
    x = x if batch_first else x.transpose(0, 1)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for gradients in (True, False):
        for mask in (None, padded):
            with torch.set_grad_enabled(gradients):
                got = model(x, src_key_padding_mask=mask)
                wanted = expected(x, src_key_padding_mask=mask)
            keep = ~(torch.zeros(2, 5, dtype=torch.bool) if mask is None else mask)
            keep = keep if batch_first else keep.T
            torch.testing.assert_close(got[keep], wanted[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@rows_in_one_case("techniques", EVERY)
def test_an_encoder_s_layers_are_read_afresh_in_inference(techniques):
    """Neither a copy of a converted layer in a new encoder, nor a change of what is stored, meets a stale weight."""
    model = encoder(True, False).eval()
    dense = copy.deepcopy(model)
    convert(model, *techniques)
    again = nn.TransformerEncoder(model.layers[0], 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        twin = nn.TransformerEncoder(dense_twin(dense, model).layers[0], 2).eval()
        torch.testing.assert_close(
            again(x, src_key_padding_mask=mask)[~mask],
            twin(x, src_key_padding_mask=mask)[~mask],
            rtol=1e-4,
            atol=1e-5,
        )
        before = model(x)
        tensors_of(model.layers[0].linear1)[-1].zero_()  # the scales, or the weight
        assert not torch.allclose(model(x), before)


@covering(techniques=EVERY, norm_first=[True, False], training=[True, False])
def test_a_decoder_layer_computes_with_what_is_stored(techniques, norm_first, training):
    dense = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first).train(
        training
    )
    model = convert(copy.deepcopy(dense), *techniques)
    expected, x, memory = dense_twin(dense, model), torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(
                model(x, memory, tgt_mask=mask), expected(x, memory, tgt_mask=mask), rtol=1e-4, atol=1e-5
            )


@covering(techniques=EVERY, own_sizes=[False, True], training=[True, False])
def test_attention_computes_with_the_stored_projections_that_it_reads_itself(techniques, own_sizes, training):
    sizes = {"kdim": 8, "vdim": 12} if own_sizes else {}
    attention = nn.MultiheadAttention(16, 2, batch_first=True, **sizes)
    attention.out_proj = nn.Linear(16, 16)  # even of the exact type
    model = nn.ModuleDict({"attention": attention, "head": nn.Linear(16, 4)}).train(training)
    dense = copy.deepcopy(model)
    convert(model, *techniques)
    assert made_by(model["attention"]) is made_by(model["attention"].out_proj) is type(techniques[-1])
    assert isinstance(model["attention"], nn.MultiheadAttention)
    dense = dense_twin(dense, model)
    x = torch.randn(2, 5, 16)
    key, value = torch.randn(2, 5, sizes.get("kdim", 16)), torch.randn(2, 5, sizes.get("vdim", 16))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            got, wanted = model["attention"](x, key, value)[0], dense["attention"](x, key, value)[0]
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices):
        return self.head(self.mix(self.tokens(indices)))


def tensors_of(layer):
    return tuple(getattr(layer, name) for name in layer.part_names if name.startswith("weight"))


@rows_in_one_case("techniques", EVERY)
def test_tied_weights_stay_tied(techniques):
    dense, untied = Tied(), Tied()
    untied.head.weight = nn.Parameter(untied.tokens.weight.detach().clone())
    everywhere = {"where": lambda *_: True}  # adapters over both ends, too
    model = convert(copy.deepcopy(dense), *techniques, **everywhere)
    for one in (model, copy.deepcopy(model)):
        assert all(a is b for a, b in zip(tensors_of(one.tokens), tensors_of(one.head), strict=True))
    torch.testing.assert_close(model(torch.arange(50)), dense_twin(dense, model)(torch.arange(50)))
    convert(untied, *techniques, **everywhere)
    once = sum(t.numel() * t.element_size() for t in tensors_of(untied.head))
    assert measure.theoretical_bytes(model) == measure.theoretical_bytes(untied) - once
    assert measure.weight_count(model) == measure.weight_count(dense)
    twin = convert(Tied(), *techniques, **everywhere)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(torch.arange(50)), model(torch.arange(50)))
    assert tensors_of(twin.tokens)[0] is tensors_of(twin.head)[0]


@rows_in_one_case("techniques", EVERY)
@rows_in_one_case("skip", ["tokens", "head"])
def test_tied_weights_are_left_alone_together(techniques, skip):
    model = convert(Tied(), *techniques, skip=skip)
    assert (type(model.tokens), type(model.head)) == (nn.Embedding, nn.Linear)
    assert model.tokens.weight is model.head.weight
    assert type(model.mix) is not nn.Linear


def test_an_adapter_over_a_tied_layer_leaves_the_tie():
    model = convert(Tied(), LoRA(2), where=lambda path, _: path == "head")
    assert parameter_of(model.head, "weight") is model.tokens.weight
    model.more = nn.Linear(4, 4)
    convert(model, FourBit())
    assert type(model.more) is Linear4Bit
    assert type(model.tokens) is nn.Embedding  # the adapted layer holds its weight


@rows_in_one_case("techniques", EVERY)
def test_a_weight_that_a_module_holds_itself_is_left_alone(techniques):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_parameter("own", model[0].weight)
    convert(model, *techniques)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is not nn.Linear


@rows_in_one_case("technique", [Half(), FourBit(), LoRA()])
def test_the_same_technique_twice_on_a_layer_is_refused(technique):
    model = convert(Odd(), technique)
    layers = list(model.modules())
    with pytest.raises(ValueError, match=f"it has {type(technique).__name__} already"):
        convert(model, technique)
    assert list(model.modules()) == layers


def test_another_technique_finds_nothing_in_a_converted_model():
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Half())
    with pytest.raises(ValueError, match=r"FourBit looks for Linear, .*found HalfLinear x1, ReLU x1"):
        convert(model, FourBit())


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_a_model_whose_layers_all_have_adapters_says_so(technique):
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), LoRA(2))
    with pytest.raises(ValueError, match=r"nothing to convert: .*; 0 is a Linear: it has an adapter: convert"):
        convert(model, technique)


@rows_in_one_case(
    ("model", "found"),
    [
        (nn.Sequential(nn.PReLU(1), nn.PReLU(1), nn.ReLU()), "found PReLU x2, ReLU x1"),
        (nn.Sequential(), "found Sequential x1"),
        (nn.Sequential(Cosine(4, 4)), "found Cosine x1"),
    ],
)
def test_a_model_with_nothing_to_convert_says_what_it_has(model, found):
    with pytest.raises(ValueError, match=f"FourBit looks for Linear.*{found}"):
        convert(model, FourBit())


def test_techniques_that_do_not_compose_are_refused():
    with pytest.raises(ValueError, match="0: FourBit cannot follow .* made a HalfLinear; it takes Linear"):
        convert(nn.Sequential(nn.Linear(4, 4)), Half(), FourBit())
    with pytest.raises(ValueError, match="Half cannot follow .* made a Linear; it takes"):
        convert(nn.Linear(4, 4), LoRA(), Half())


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"skip=\(3,\) must be glob patterns"):
        convert(nn.Linear(2, 2), Half(), skip=[3])
    with pytest.raises(TypeError, match="must be a torch.nn.Module, found OrderedDict"):
        convert(nn.Linear(2, 2).state_dict(), Half())
    with pytest.raises(ValueError, match="no technique was given"):
        convert(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="technique='nf4' must be an instance"):
        convert(nn.Linear(2, 2), "nf4")
    with pytest.raises(TypeError, match="must be an instance of Half, EightBit, FourBit, Budget or LoRA"):
        convert(nn.Linear(2, 2), Half)
    with pytest.raises(ValueError, match="LoRA was given 2 times"):
        convert(nn.Linear(2, 2), LoRA(1), LoRA(2))
    with pytest.raises(ValueError, match="skip='typo' matches no module of Odd"):
        convert(Odd(), Half(), skip="typo")


@rows_in_one_case(
    ("spoil", "error", "message"),
    [
        (
            lambda layer: nn.init.constant_(layer.weight, float("nan")),
            ValueError,
            "inner.0.0: weight holds 64 values",
        ),
        (lambda layer: layer.to("meta"), ValueError, "inner.0.0: weight is on the meta device"),
        (lambda layer: layer.to(torch.complex64), TypeError, "inner.0.0: weight.dtype=torch.complex64"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(8, 8).int(), False)),
            TypeError,
            "torch.int32",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.eye(8).to_sparse(), False)),
            ValueError,
            r"inner.0.0 has layout=torch.sparse_coo: make it dense",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.UninitializedParameter()),
            ValueError,
            r"inner.0.0 is lazy and has no shape yet: call the model once before convert, or .*skip=",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@rows_in_one_case("technique", [FourBit(scales="float16"), FourBit()])
def test_a_weight_that_cannot_be_stored_is_named_and_nothing_changes(spoil, error, message, technique):
    model = Odd()
    spoil(model.inner[0][0])
    layers, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        convert(model, technique, LoRA(2))
    assert list(model.modules()) == layers
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_model_converts_the_same_after_deepcopy():
    model = Odd()
    twin = convert(copy.deepcopy(model), FourBit())
    convert(model, FourBit())
    x = torch.randn(2, 8)
    assert torch.equal(model(x), twin(x))


INPUTS = {
    nn.Linear: (lambda: nn.Linear(16, 8), lambda: torch.randn(3, 16)),
    nn.Embedding: (lambda: nn.Embedding(16, 8), lambda: torch.arange(3)),
    nn.Conv1d: (lambda: nn.Conv1d(4, 8, 3), lambda: torch.randn(3, 4, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(4, 8, 3), lambda: torch.randn(3, 4, 9, 9)),
}
SOURCES = {HalfLinear: (nn.Linear, (Half(),)), Linear4Bit: (nn.Linear, (FourBit(),))}


MADE = {
    **{(Half, kind): Half for kind in INPUTS},
    **{(FourBit, kind): FourBit for kind in INPUTS},
    **{(LoRA, kind): LoRA for kind in LINEAR if kind in (*INPUTS, *SOURCES)},  # not those that only files make
}


@rows_in_one_case(("technique", "source"), MADE)
def test_every_entry_of_the_registry_builds_a_layer_that_replaces_its_source(technique, source):
    kind, before = SOURCES.get(source, (source, ()))
    make, make_input = INPUTS[kind]
    dense, x = make(), make_input()
    made = FourBit(embeddings="4bit") if technique is FourBit else technique()
    layer = convert(copy.deepcopy(dense), *before, made)
    assert made_by(layer) is technique
    assert isinstance(layer, kind)
    assert measure.weight_count(layer) == measure.weight_count(dense)
    # What it stores is the dense layer's, but for the rounding that its technique promises.
    twin = dense_twin(nn.ModuleList([dense]), nn.ModuleList([layer]))[0]
    if hasattr(layer, "quantized"):
        allowed = layer.quantized.error_bound().view_as(dense.weight)
    else:
        stored = getattr(layer, "weight_rounded", dense.weight).dtype
        allowed = unit(stored) * dense.weight.abs() + torch.finfo(stored).smallest_normal
    assert ((twin.weight - dense.weight).abs() <= allowed).all()
    # What it computes is the sum of that in float32: rows of an embedding as they are, else of one weight for each
    # input of an output, and the bias.
    exact, sizes = twin.double(), copy.deepcopy(twin).double()
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
    wide, magnitudes = (x, x) if kind is nn.Embedding else (x.double(), x.double().abs())
    terms = 0 if kind is nn.Embedding else dense.weight[0].numel() + 1 + OF_4_BITS
    assert_sum(layer(x), exact(wide), sizes(magnitudes), terms)


def test_a_later_technique_passes_over_what_it_does_not_take():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8))
    convert(model, FourBit(), LoRA(2))
    assert type(model[0]) is Embedding8Bit
    assert isinstance(model[1], LoRALinear)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "1.adapters.default.weight.lora_a",
        "1.adapters.default.weight.lora_b",
    ]


def test_a_later_technique_that_takes_no_layer_is_refused():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Conv1d(8, 8, 1))
    layers = list(model.modules())
    with pytest.raises(ValueError, match="0: LoRA cannot follow .* made a Embedding8Bit; it takes Linear"):
        convert(model, FourBit(), LoRA(2))
    assert list(model.modules()) == layers


@pytest.mark.parametrize("technique", [Half(), FourBit()])
def test_what_a_replacement_refuses_is_left_alone(technique):
    model = nn.Sequential(nn.Embedding(16, 8, max_norm=1.0), nn.Linear(8, 8))
    convert(model, technique)
    assert type(model[0]) is nn.Embedding
    assert type(model[1]) is not nn.Linear


@rows_in_one_case("make", [lambda: nn.Embedding(16, 8), lambda: nn.Conv1d(8, 8, 1), lambda: nn.Conv2d(8, 8, 1)])
def test_recomputed_weights_of_any_layer_are_left_alone(make):
    model = nn.Sequential(parametrizations.weight_norm(make()), make())
    kind = type(model[0])
    convert(model, FourBit())
    assert type(model[0]) is kind
    assert type(model[1]) is not kind


class PeftLinear(nn.Module):
    """As PEFT's LoRA layer is built; its class says that it is PEFT's."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


PeftLinear.__module__ = "peft.tuners.lora.layer"


class OfPeft(PeftLinear):
    """A user's own kind of it."""


@rows_in_one_case("kind", [PeftLinear, OfPeft])
@rows_in_one_case("change", ["FourBit", "Half", "LoRA", "add_adapter", "calibrate"])
def test_layers_inside_peft_s_are_refused_and_the_model_stays(kind, change):
    model = nn.Sequential(nn.Linear(8, 8), kind(nn.Linear(8, 8)))
    model[1].base_layer.requires_grad_(False)
    modules, trains = [*model.modules()], [p.requires_grad for p in model.parameters()]
    changes = {
        "FourBit": lambda **skip: convert(model, FourBit(), **skip),
        "Half": lambda **skip: convert(model, Half(), **skip),
        "LoRA": lambda **skip: convert(model, LoRA(2), **skip),
        "add_adapter": lambda **skip: add_adapter(model, "mine", LoRA(2), **skip),
        "calibrate": lambda **skip: calibrate(model, [torch.randn(9, 8)], **skip),
    }
    message = r"1.base_layer is inside 1, a \w+ of PEFT.*before get_peft_model, or call merge_and_unload"
    with pytest.raises(ValueError, match=message):
        changes[change]()
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trains
    if change in ("LoRA", "add_adapter"):  # after which only the adapters of lowmem train
        with pytest.raises(ValueError, match=r"the model holds 1, a \w+ of PEFT.*before get_peft_model"):
            changes[change](skip="1.*")
        assert [*model.modules()] == modules
    else:
        changes[change](skip="1.*")
        assert [*model[1].modules()] == modules[-len([*model[1].modules()]) :]
    assert [p.requires_grad for p in model[1].parameters()] == trains[2:]


class PeftModel(nn.Module):
    """As PEFT wraps a model: its layers are PEFT's, others stay as they were."""

    def __init__(self):
        super().__init__()
        self.base_model = nn.Sequential(PeftLinear(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 8))


PeftModel.__module__ = "peft.peft_model"


@rows_in_one_case("wrapped", [False, True])
@rows_in_one_case(
    ("options", "found"),
    [
        ({}, "base_model.0.base_layer is inside"),
        ({"skip": "*.base_model.0.*"}, "base_model.2 is inside"),
        ({"where": lambda path, _: path.endswith("2")}, "base_model.2 is inside"),
        ({"where": lambda *_: False}, None),
    ],
)
@rows_in_one_case("change", ["FourBit", "Half", "LoRA", "QLoRA", "add_adapter", "calibrate"])
def test_a_model_that_peft_has_wrapped_is_refused_whatever_is_selected(change, options, found, wrapped):
    model = nn.ModuleDict({"module": PeftModel()}) if wrapped else PeftModel()  # as in DistributedDataParallel
    if not wrapped and "skip" in options:
        options = {"skip": "base_model.0.*"}
    modules, trains = [*model.modules()], [p.requires_grad for p in model.parameters()]
    changes = {
        "FourBit": lambda: convert(model, FourBit(), **options),
        "Half": lambda: convert(model, Half(), **options),
        "LoRA": lambda: convert(model, LoRA(2), **options),
        "QLoRA": lambda: convert(model, FourBit(), LoRA(2), **options),
        "add_adapter": lambda: add_adapter(model, "mine", LoRA(2), **options),
        "calibrate": lambda: calibrate(model, [torch.randn(4, 8)], **options),
    }
    place = "module" if wrapped else "the model itself"
    start = f"{found} {place}," if found else "the model holds module," if wrapped else "the model is"
    prefix = "module." if wrapped and found else ""
    message = rf"^{re.escape(prefix + start)} a PeftModel of PEFT.* before get_peft_model, or call merge_and_unload"
    with pytest.raises(ValueError, match=message):
        changes[change]()
    assert [*model.modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == trains


def test_what_is_converted_first_can_go_into_peft_s_layers():
    model = convert(nn.Sequential(nn.Linear(8, 8)), FourBit())
    model[0] = PeftLinear(model[0])
    x = torch.randn(2, 8)
    model(x).sum().backward()
    assert model[0].lora_B["default"].weight.grad is not None


def test_a_layer_that_left_the_model_is_not_replaced():
    kept, gone = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(kept)
    with pytest.raises(RuntimeError, match="^a Linear to convert left Sequential meanwhile"):
        commit(model, {layer: convert(copy.deepcopy(layer), Half()) for layer in (kept, gone)})
    assert type(model[0]) is torch.nn.Linear


def test_weights_that_are_parts_of_one_storage_are_two_weights():
    for starts in (0, 4), (4, 0), (0, 8), (8, 0):  # side by side or apart, in either order
        whole = torch.randn(12, 16)
        parts = [whole[start : start + 4] for start in starts]
        layers = [torch.nn.Linear(16, 4, bias=False) for _ in parts]
        for layer, part in zip(layers, parts, strict=True):
            layer.weight = torch.nn.Parameter(part)
        model = convert(torch.nn.Sequential(*layers), Half())
        for layer, part in zip(model, parts, strict=True):
            assert torch.equal(layer.weight, part.half())


@rows_in_one_case("techniques", EVERY)
def test_a_tie_with_a_layer_that_another_tie_leaves_is_left_alone(techniques):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.register_parameter("own", model[0].weight)
    model[0].register_parameter("other", model[1].weight)
    convert(model, *techniques)
    assert [type(layer) is nn.Linear for layer in model] == [True, True, False]


class Table(nn.Module):
    """A parameter of two dimensions that no entry knows, and a layer beside it."""

    def __init__(self, rows=32):
        super().__init__()
        self.positions, self.head = nn.Parameter(torch.randn(rows, 16)), nn.Linear(16, 16)

    def forward(self, x):
        return self.head(x + self.positions[: x.shape[0]])


def test_a_large_dense_share_is_told_once_with_its_reasons():
    told = "Table.positions: FourBit has no form of it; parameters= names what to store"
    share = "^67% of the bytes of Table are weights that stay dense: 65%"
    with pytest.warns(UserWarning, match=f"{share} {told}; 2% Linear.bias: a vector") as seen:
        convert(Table(), FourBit())
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="Table.positions: Half has no form of it"):
        convert(Table(), Half())
    long = nn.Sequential(nn.Linear(8, 8))
    long.register_parameter("flat", nn.Parameter(torch.zeros(2**16 + 1)))
    with pytest.warns(UserWarning, match="^100% of .*: 100% Sequential.flat: a vector: only matrices have rows"):
        convert(long, FourBit())
    norms = nn.Sequential(nn.Linear(64, 64), *[nn.LayerNorm(64) for _ in range(129)])  # 4225 and 16,512 numbers
    with pytest.warns(UserWarning, match=r"^80% .*: 40% LayerNorm.weight: a vector.*to\(torch.bfloat16\) casts it"):
        convert(norms, FourBit())
    assert norms[1](norms[0](torch.ones(2, 64))).shape == (2, 64)
    kept = nn.Sequential(nn.Linear(64, 64))  # 4160 numbers
    kept.register_buffer("table", torch.zeros(256, 64), persistent=False)
    kept.register_buffer("mask", torch.zeros(99999, dtype=torch.bool))
    with pytest.warns(UserWarning, match="^80% .*: 80% Sequential.table: a buffer: .*; 0% Linear.bias: a vector"):
        convert(kept, FourBit())
    for quiet in (
        lambda: convert(Table(1), FourBit()),  # less than a tenth
        lambda: convert(Table(), FourBit(), where=lambda path, _: path == "head"),  # asked for
        lambda: convert(Table(), FourBit(), parameters=lambda path, _: path == "positions"),
        lambda: convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(64)), FourBit()),  # a few bytes of vectors
        lambda: convert(Table(), LoRA(2)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quiet()


@pytest.mark.parametrize("technique", [FourBit("nf4"), Half()])
def test_what_was_stored_before_counts_as_in_the_dense_model(technique):
    def make(rows):
        return nn.ModuleList([nn.Linear(256, 256, bias=False), nn.Linear(64, 64, bias=False), Table(rows)])

    with warnings.catch_warnings():  # 7% of the dense model's bytes stay dense, and 28% or 12% of those that are left
        warnings.simplefilter("error")
        convert(convert(make(320), technique, skip=["1", "2*"]), technique, skip="0")
    told = []
    for parts in ([], [["1", "2*"]], [["0", "2*"]]):
        model = make(1024)
        for skip in parts:
            convert(model, technique, skip=skip)
        with pytest.warns(UserWarning, match="are weights that stay dense") as seen:
            convert(
                model, technique, skip=[path for path in ("0", "1") if isinstance(model[int(path)], StoredModule)]
            )
        told.append(str(seen[0].message))
    assert told == told[:1] * 3


@rows_in_one_case(
    ("layer", "remedy"),
    [
        (prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5), "torch.nn.utils.prune.remove"),
        (parametrizations.spectral_norm(nn.Linear(32, 64)), "remove_parametrizations"),
        (nn.Embedding(24, 64, max_norm=1.0), "max_norm = None"),
        (nn.LayerNorm((64, 64)), "parameters="),
        (Cosine(64, 64), "parameters="),
    ],
)
def test_each_reason_that_is_told_has_its_remedy(layer, remedy):
    with pytest.warns(UserWarning, match=f"are weights that stay dense.*{remedy}"):
        convert(nn.Sequential(layer, nn.Linear(8, 8)), FourBit())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@rows_in_one_case("techniques", EVERY)
def test_a_layer_with_an_empty_weight_stays_dense_and_the_rest_is_converted(techniques):
    empty = nn.Linear(0, 4), nn.Linear(4, 0), nn.Conv1d(0, 4, 3), nn.Embedding(0, 4)
    model = convert(nn.ModuleList([*empty, nn.Linear(4, 4)]), *techniques)
    for layer, row in zip(model, summary(model)[:4], strict=False):
        assert type(layer) in (nn.Linear, nn.Conv1d, nn.Embedding)
        assert not row.converted
        assert "its weight is empty" in row.reason or "LoRA leaves" in row.reason
    assert type(model[4]) is not nn.Linear
    assert torch.equal(model[0](torch.zeros(2, 0)), model[0].bias.expand(2, 4))
    with pytest.raises(ValueError, match="nothing to convert.*0 is a Linear: its weight is empty"):
        convert(nn.Sequential(nn.Linear(0, 4)), *techniques)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@rows_in_one_case("techniques", EVERY)
def test_what_is_left_may_be_lazy_or_sparse(techniques):
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.LazyBatchNorm1d())
    model.register_parameter("sparse", nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False))
    convert(model, *techniques, skip="1")
    rows = {row.path: row for row in summary(model)}
    assert [path for path, row in rows.items() if row.converted] == ["0"]
    if not isinstance(techniques[0], LoRA):
        assert "it is lazy and has no shape yet" in rows["2"].reason
    assert model(torch.randn(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("technique", [Half(torch.bfloat16), FourBit("nf4", 16)])
def test_parameters_names_what_the_registry_does_not_know(technique):
    seen = []
    model = convert(
        Table(), technique, parameters=lambda path, p: seen.append((path, p.dim())) or path == "positions"
    )
    assert seen == [("positions", 2), ("head.weight", 2)]
    assert isinstance(model, Table)
    assert [*model.forms] == ["positions"]
    x = torch.randn(4, 16)
    twin = restore(copy.deepcopy(model))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="parameters= chose no further parameter"):
        convert(Table(), technique, parameters=lambda path, _: path == "head.weight")


def test_at_most_refuses_more_bits_a_weight_and_says_what_is_dense():
    model = Table(8)
    before = model.state_dict(keep_vars=True)
    told = r"at_most=6 bits a weight are out of reach: these techniques give 1\d\.\d+.*positions"
    with pytest.raises(ValueError, match=told):
        convert(model, FourBit("nf4", 16), at_most=6)
    assert all(a is b for a, b in zip(before.values(), model.state_dict(keep_vars=True).values(), strict=True))
    assert type(model.head) is nn.Linear
    stored = convert(copy.deepcopy(model), FourBit("nf4", 16), parameters=lambda path, _: "positions" in path)
    bits = 8 * measure.theoretical_bytes(stored) / measure.weight_count(stored)
    convert(copy.deepcopy(model), FourBit("nf4", 16), parameters=lambda path, _: "positions" in path, at_most=bits)
    with pytest.raises(ValueError, match="out of reach"):
        convert(model, FourBit("nf4", 16), parameters=lambda path, _: "positions" in path, at_most=bits - 1e-6)
    with pytest.raises(ValueError, match="at_most=0 must be a number of bits above 0"):
        convert(Table(), FourBit(), at_most=0)


def test_a_weight_that_is_a_view_of_another_is_refused():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(16, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach()[:4])
    with pytest.raises(ValueError, match=r"1 and 0 are views of one tensor: .*clone"):
        convert(model, FourBit())
    assert type(model[0]) is nn.Linear
    norm = nn.Sequential(nn.Linear(16, 8, bias=False), nn.LayerNorm(16))  # it stays dense, and all bytes with it
    norm[1].weight = nn.Parameter(norm[0].weight.detach()[0])
    with pytest.raises(ValueError, match=r"1 and 0 are views of one tensor: .*clone"):
        convert(norm, FourBit())
    assert type(norm[0]) is nn.Linear
    flat = torch.randn(16 * 8 + 16)  # views that do not overlap are independent
    norm[0].weight, norm[1].weight = nn.Parameter(flat[:128].view(8, 16)), nn.Parameter(flat[128:])
    convert(norm, FourBit())


def test_a_weight_in_the_memory_of_one_that_stays_dense_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(16, 8), "b": nn.Linear(16, 8)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())  # tied in memory, by two parameters
    with pytest.raises(ValueError, match="b and a are views of one tensor"):
        convert(model, FourBit(), skip="b")
    assert convert(model, FourBit())["a"].quantized is model["b"].quantized


def test_inference_mode_is_refused():
    model = nn.Linear(16, 8)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\).*leave it"):
        convert(model, FourBit())
    assert type(model) is nn.Linear


def test_a_module_converted_in_place_stays_the_object_that_others_hold():
    model = Odd()
    held = [model.shared, model.list[0], model.inner[0][0]]
    calls = []
    held[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    assert convert(model, FourBit()) is model
    assert [model.shared, model.list[0], model.inner[0][0]] == held
    model(torch.ones(2, 8))
    assert calls == [Linear4Bit] * 3


def test_at_most_counts_all_weights_of_a_module_that_was_converted_before():
    make = lambda: convert(nn.ModuleList([nn.LSTM(16, 24, 2), nn.Linear(16, 16)]), FourBit(), skip="1")  # noqa: E731
    whole = convert(make(), Half(), where=lambda path, _: path == "1")
    bits = 8 * measure.theoretical_bytes(whole) / measure.weight_count(whole)
    convert(make(), Half(), where=lambda path, _: path == "1", at_most=bits)


class SharedBias(nn.Module):
    """A bias of two linear layers, and one that a norm has, too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm.bias = self.a.bias
        self.c.bias = self.b.bias
        nn.init.normal_(self.a.bias)

    def forward(self, x):
        return self.c(self.b(self.norm(self.a(x))))


@pytest.mark.parametrize("techniques", [(Half(torch.bfloat16),), (Half(torch.bfloat16), LoRA(2))])
def test_a_bias_that_a_dense_module_has_too_stays_that_module_s(techniques, tmp_path):
    dense = SharedBias()
    model = convert(copy.deepcopy(dense), *techniques)
    layer = model.a
    assert isinstance(layer, HalfLinear)
    assert layer.bias is model.norm.bias
    assert layer.bias.dtype == torch.float32
    assert layer.weight_error is not None
    assert model.b.bias is model.c.bias
    assert isinstance(model.b.bias, StoredTensor)
    x = torch.randn(3, 8)
    assert (model(x) - dense(x)).norm() < 0.05 * dense(x).norm()
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors", SharedBias)
    assert torch.equal(loaded(x), model(x))
    assert loaded.a.bias is loaded.norm.bias
    assert model(x.bfloat16()).dtype == torch.bfloat16 or techniques[1:]  # adapters stay float32
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_where_is_asked_once_for_each_path():
    for technique in (Half(), FourBit(), LoRA(2)):
        asked = []

        def where(path, module, asked=asked):
            asked.append(path)
            return isinstance(module, nn.Linear)

        convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), technique, where=where)
        assert sorted(asked) == ["", "0", "1"]


def test_a_class_with_slots_and_its_own_setattr_converts():
    class Slots(nn.Linear):
        __slots__ = ("factor",)

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.factor = 3.0

        def __setattr__(self, name, value):
            if name == "weight" and "bias" in self._parameters:
                raise RuntimeError("its weight is set once")
            super().__setattr__(name, value)

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * self.factor

    for technique in (FourBit(), Half()):
        layer, x = Slots(8, 8), torch.randn(2, 8)
        dense = layer(x)
        convert(layer, technique)
        assert isinstance(layer, StoredModule)
        assert layer.factor == 3.0
        assert (layer(x) - dense).norm() < 0.2 * dense.norm()
        assert summary(layer)[0].computed == "as stored"


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_what_is_restored_in_a_dtype_runs_in_it(technique):
    for layer, shape in ((nn.Linear(8, 8), (2, 8)), (nn.Conv1d(8, 8, 3), (2, 8, 5)), (nn.LSTM(8, 8), (3, 8))):
        model = restore(convert(nn.Sequential(layer), technique), dtype=torch.bfloat16)
        x = torch.randn(shape).bfloat16()
        out = model(x)
        assert (out[0] if isinstance(out, tuple) else out).dtype == torch.bfloat16
    for where in (None, lambda path, _: path == ""):
        attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        convert(attention, technique, where=where)
        restore(attention, dtype=torch.bfloat16)
        x = torch.randn(3, 2, 8).bfloat16()
        assert attention(x, x, x)[0].dtype == torch.bfloat16
    layer = convert(nn.Linear(8, 8), technique, LoRA(2))
    restore(layer, dtype=torch.float64)
    assert {parameter_of(layer, "weight").dtype, layer.bias.dtype} == {torch.float64}
    assert layer.lora_a.dtype == torch.float32


def test_what_was_never_stored_is_restored_in_the_dtype_too():
    """Norms, scalars and saved buffers are cast; what is not saved, such as tables of positions, keeps its dtype."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.LSTM(8, 8))
    model[1].register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    model[1].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model[1].register_buffer("table", torch.ones(2), persistent=False)
    model[2].weight = model[1].weight  # shared
    restore(convert(model, FourBit(), skip="3"), dtype=torch.bfloat16)
    state = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    assert set(state.values()) == {torch.bfloat16}
    assert model[1].mask.tolist() == [0.0, -torch.inf]
    assert model[1].table.dtype == torch.float32
    assert model[1].weight is model[2].weight
    assert model[1].weight.requires_grad
    assert model(torch.randn(4, 8).bfloat16())[0].dtype == torch.bfloat16
    halves = convert(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), FourBit())
    restore(halves, skip="1", dtype=torch.bfloat16)
    assert halves[1].weight.dtype == torch.float32


def test_stored_layers_with_a_stored_bias_get_adapters_later():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(8, 8))
    convert(model, Half(torch.bfloat16))
    bias = model[0].bias
    convert(model, LoRA(2), where=lambda path, _: path != "")
    assert list(adapter_layers(model, "default")) == ["0", "1", "2"]
    assert model[0].bias.dtype == bias.dtype


def test_a_bias_that_a_restored_layer_shares_with_one_of_another_dtype_is_refused():
    model = convert(SharedBias(), FourBit())
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"a: its bias is shared with norm, .*float32.*model.to\(torch.bfloat16\)"):
        restore(model, skip="norm", dtype=torch.bfloat16)
    assert [type(module) for module in model.modules()] == before
    restore(model)
    assert model.a.bias is model.norm.bias
    assert model.b.bias is model.c.bias


def test_a_bias_beyond_the_dtype_s_range_is_not_restored():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.bias[1] = 1e6
    convert(layer, FourBit())
    with pytest.raises(ValueError, match="bias holds the magnitude"):
        restore(layer, dtype=torch.float16)
    assert type(layer) is Linear4Bit


@pytest.mark.parametrize("technique", [FourBit(), Half()])
def test_one_end_of_a_tie_is_not_restored_alone(technique):
    for options in ({"where": lambda path, _: path == "head"}, {"skip": "tokens"}):
        model = convert(Tied(), technique)
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"head: .*shared with tokens, which where= and skip= leave"):
            restore(model, **options)
        assert [type(module) for module in model.modules()] == before
        restore(model)
        assert model.head.weight is model.tokens.weight


def test_restore_takes_the_names_of_dtypes():
    for dtype in ("bfloat16", "torch.float64"):
        model = restore(convert(nn.Linear(4, 4), FourBit()), dtype=dtype)
        assert {one.dtype for one in model.parameters()} == {getattr(torch, dtype.removeprefix("torch."))}


def test_restore_names_what_is_no_floating_point_dtype():
    for dtype in ("float33", "nn", torch.int8, 16, float):
        with pytest.raises(TypeError, match=f"dtype={re.escape(repr(dtype))} must be a floating-point dtype"):
            restore(convert(nn.Linear(4, 4), FourBit()), dtype=dtype)


def test_what_lora_cannot_use_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="parameters=.*LoRA alone"):
        convert(model, LoRA(2), parameters=lambda path, _: True)
    for technique in (LoRA(2), FourBit()):
        for name in ("where", "parameters"):
            with pytest.raises(TypeError, match=f"{name}='l' must be callable"):
                convert(model, technique, **{name: "l"})
        with pytest.raises(ValueError, match="0 is lazy.*call the model once|0.*is lazy"):
            convert(nn.Sequential(nn.LazyLinear(8)), technique)
    assert type(model[0]) is nn.Linear

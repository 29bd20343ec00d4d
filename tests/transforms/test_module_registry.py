"""Which layers are taken, and why others are not."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lowmem import FourBit, Half, LoRA, StoredTensor, convert, kernels
from lowmem.nn.module_copy import LAYERS, stored_module_class
from lowmem.transforms.module_registry import (
    ENTRIES,
    all_paths_by_module,
    applied_technique_type_or_none,
    conversion_skip_reason,
    is_weight_only_multiplied,
    storable_parameter_names,
    stored_computation_text,
)
from lowmem.transforms.module_selection import first_path_by_selected_module
from lowmem.transforms.tied_weights import owners_and_paths_by_parameter_id
from tests.selection import covering
from tests.transforms.models import Cosine, Subclass

KINDS = {  # what makes a module, and the shape of an input behind the leading dimensions; () of an embedding
    "Linear": (lambda: nn.Linear(40, 6), (40,)),
    "Subclass": (lambda: Subclass(40, 6), (40,)),
    "Transposed": (lambda: Transposed(40, 6), (40,)),
    "Embedding": (lambda: nn.Embedding(6, 40), ()),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(6, 40), ()),
    "Conv1d": (lambda: nn.Conv1d(8, 6, 3), (8, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), (4, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 3), (8, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3), (8, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(8, 6, 3), (8, 3, 3, 3)),
    "Bilinear": (lambda: nn.Bilinear(6, 20, 4), (6,)),
    "LSTM": (lambda: nn.LSTM(16, 24, 2, bidirectional=True, proj_size=8), (16,)),
    "GRU": (lambda: nn.GRU(16, 24), (16,)),
    "RNNCell": (lambda: nn.RNNCell(16, 24), (16,)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(16, 2), (16,)),
    "Attention of other keys": (lambda: nn.MultiheadAttention(16, 2, kdim=8, vdim=12), (16,)),
    "Experts": (lambda: Experts(), (8,)),
}


class Transposed(nn.Linear):
    """As Falcon's linear layer computes."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    """A subclass with buffers, one of which is None."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("factor", torch.tensor(2.0))
        self.register_buffer("shift", None)

    def forward(self, x):
        return super().forward(x) * self.factor


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8))
        self.up_bias = nn.Parameter(torch.randn(3, 16))
        self.router = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return x @ self.up[0].T


@pytest.mark.filterwarnings("ignore:16% of the bytes of Experts are weights that stay dense")
@pytest.mark.parametrize("technique", [FourBit("nf4", embeddings="4bit"), Half(torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_entry_names_is_stored_in_a_module_that_stays_one_of_its_class(kind, technique):
    dense = KINDS[kind][0]()
    names = storable_parameter_names(dense)
    assert names
    assert all(dense._parameters[name].dim() >= 2 and "bias" not in name for name in names)
    own = {name: parameter.detach().clone() for name, parameter in dense.named_parameters(recurse=False)}
    assert stored_computation_text(dense) == ""
    made = convert(dense, technique)
    assert stored_computation_text(made) == ("dequantized, a layer at a time" if kind == "LSTM" else "as stored")
    assert made is dense
    assert isinstance(made, type(KINDS[kind][0]()))
    assert applied_technique_type_or_none(made) is type(technique)
    assert {*names} <= {*made.forms} <= {*names, "bias"}
    for name in names:
        weight = getattr(made, name)
        assert isinstance(weight, StoredTensor)
        assert (weight.shape, weight.dtype, weight.requires_grad) == (own[name].shape, torch.float32, False)
        error = (weight.dequantize() - own[name]).norm() / own[name].norm()
        assert error < (0.2 if type(technique) is FourBit else 2**-8)
    assert made.weight_count == sum(tensor.numel() for tensor in own.values())


FAST = [stored_module_class(dense, ("weight",), bits) for dense, bits in LAYERS]


@pytest.mark.parametrize("made", FAST)
def test_a_layer_with_a_forward_of_its_own_is_of_the_class_that_it_replaces(made):
    assert issubclass(made, made.dense_class)
    assert all(isinstance(vars(made).get(name, getattr(made, name)), property) for name in made.stored_names)


def test_the_first_entry_that_fits_serves():
    for kind, (make, _) in KINDS.items():
        assert sum(entry.matches(make()) for entry in ENTRIES) == 1, kind


LINEAR = ("Linear", "Subclass", "Transposed")


def called(kind, module, rows, dtype):
    """Return an input of a module of a kind of ``KINDS``, and what a call returns first."""
    if kind.startswith("Embedding"):
        x = torch.randint(0, 6, (2, 3))
    else:
        leading = rows if kind in LINEAR else (2,)
        x = torch.randn(*leading, *KINDS[kind][1], dtype=dtype, requires_grad=True)
    if kind == "Bilinear":
        return x, module(x, x.repeat_interleave(4, -1)[..., :20])
    out = module(x, x, x) if "Attention" in kind else module(x)
    return x, out[0] if isinstance(out, tuple) else out


@pytest.mark.filterwarnings("ignore:.* of the bytes of Sequential are weights that stay dense")
@covering(
    rows=[(1,), (64,), (3, 100)],
    dtype=[torch.bfloat16, torch.float32],
    training=[True, False],
    technique=[FourBit("nf4", compute_dtype=torch.bfloat16), None, Half(torch.bfloat16)],
    kernel=["best", "reference"],
)
def test_what_a_layer_returns_can_be_written_to(rows, dtype, training, technique, kernel, monkeypatch):
    """Autograd refuses writes to a view that a function of its own has made: no layer returns one, on any processor.

    What an LSTM or an RNNCell returns torch saves for its backward, and so refuses writes to it, dense or stored.
    """
    monkeypatch.setattr(kernels.cpu.CpuBackend, "fast_bfloat16", True)
    left_out = ("LSTM", "RNNCell", "Attention of other keys") if rows == (1,) and training else KINDS.keys() - LINEAR
    for kind in [one for one in KINDS if one not in left_out]:
        module = KINDS[kind][0]().to(dtype)
        adapts = conversion_skip_reason(LoRA, module, user_selected=True) is None
        techniques = [one for one in (technique, LoRA(2) if adapts else None) if one]
        model = convert(nn.Sequential(module), *techniques, where=lambda *_: True) if techniques else [module]
        module = model[0].train(training)
        trained, found = [one for one in module.parameters() if one.requires_grad], []
        with kernels.temporary_cpu_backend(kernels.available_cpu_backend_names()[-1] if kernel == "best" else kernel):
            for multiply in (torch.mul, torch.Tensor.mul_):
                torch.manual_seed(0)
                x, out = called(kind, module, rows, dtype)
                factor = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
                wanted = [one for one in (x, *trained) if one.requires_grad]
                found.append(torch.autograd.grad(multiply(out, factor).sum(), wanted) if wanted else ())
        assert all(map(torch.equal, *found)), kind


def test_a_subclass_of_linear_is_taken_if_products_alone_read_its_weight():
    assert is_weight_only_multiplied(Transposed(8, 4))
    assert is_weight_only_multiplied(Subclass(8, 4))
    assert is_weight_only_multiplied(Scaled(8, 4))
    assert not is_weight_only_multiplied(Cosine(8, 4))
    assert conversion_skip_reason(FourBit, Transposed(8, 4)) is None
    assert "computes something else" in conversion_skip_reason(FourBit, Cosine(8, 4))
    assert conversion_skip_reason(FourBit, Cosine(8, 4), user_selected=True) is None
    cosine = convert(Cosine(8, 4), FourBit(), where=lambda *_: True)
    assert stored_computation_text(cosine) == "as its module reads it"
    cosine(torch.randn(2, 8))
    assert stored_computation_text(cosine).startswith("dequantized by ")


@pytest.mark.parametrize(
    ("technique", "module", "reason"),
    [
        (FourBit, nn.Linear(4, 4), None),
        (FourBit, nn.Embedding(4, 4), None),
        (FourBit, Subclass(4, 4), None),
        (FourBit, nn.LayerNorm(4), "vectors (biases, norms) stay dense"),
        (FourBit, nn.LayerNorm((4, 4)), "FourBit has no form of it; parameters= names what to store"),
        (FourBit, parametrizations.weight_norm(nn.Linear(4, 4)), "computed by a parametrization"),
        (FourBit, nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (FourBit, nn.EmbeddingBag(4, 4, mode="max"), None),
        (LoRA, nn.Embedding(4, 4), None),
        (LoRA, nn.EmbeddingBag(4, 4, mode="sum"), None),
        (LoRA, nn.EmbeddingBag(4, 4, mode="max"), "LoRA has no form of it: the largest of several rows"),
        (LoRA, nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (LoRA, nn.Conv1d(4, 4, 3), None),
        (LoRA, nn.Bilinear(4, 4, 4), "LoRA has no form of it: both of its inputs"),
        (LoRA, nn.GRU(4, 4), None),
    ],
)
def test_what_is_left_alone_has_a_reason(technique, module, reason):
    found = conversion_skip_reason(technique, module, user_selected=technique is LoRA)
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_scripted_module_is_left_alone():
    module = torch.jit.script(nn.Linear(4, 4))
    for technique in (FourBit, LoRA):
        assert conversion_skip_reason(technique, module).startswith(
            "torch.jit.script or trace compiled it for dense weights: con"
        )


@pytest.mark.parametrize("made", [*FAST, type(convert(nn.Linear(2, 2), LoRA(1)))])
def test_what_replaces_a_layer_is_called_as_it_is(made):
    """Models call layers by keyword, too."""
    kind = getattr(made, "dense_class", nn.Linear)
    names = [list(inspect.signature(form.forward).parameters) for form in (made, kind)]
    assert names[0][1:] == names[1][1:]


def test_a_layer_with_tensors_of_its_own_is_taken():
    layer = nn.Linear(4, 4)
    layer.register_buffer("mask", torch.ones(4))
    assert conversion_skip_reason(Half, layer) is None
    assert torch.equal(convert(layer, Half()).mask, torch.ones(4))
    assert conversion_skip_reason(LoRA, nn.LayerNorm(4)) == "LoRA has no form of it"


def test_module_paths_and_owners_know_every_path_and_none_inside_an_adapted_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(4, 4)})
    model["c"].weight = shared.weight
    assert all_paths_by_module(model)[shared] == ["a", "b.0"]
    assert [path for _, path in owners_and_paths_by_parameter_id(model)[id(shared.weight)]] == ["a", "c"]
    assert list(first_path_by_selected_module(model, None, "b*").values()) == ["", "c"]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        all_paths_by_module([shared])
    # What is inside an adapted layer has none, as the root or elsewhere; what is named alike, and comes behind, has.
    layer, other = (convert(one, LoRA(2), where=lambda *_: True) for one in (nn.Linear(4, 4), nn.Embedding(4, 4)))
    assert all_paths_by_module(layer) == {layer: [""]}
    assert all_paths_by_module(other) == {other: [""]}
    model = nn.ModuleDict({"a": layer, "ab": nn.Sequential(nn.Linear(4, 4)), "c": other, "cd": nn.ReLU()})
    assert [*all_paths_by_module(model).values()] == [[""], ["a"], ["ab"], ["ab.0"], ["c"], ["cd"]]
    # In whatever order: a stored model of transformers yields a dense module first, which may be of an adapter.
    assert [*all_paths_by_module(Backwards(model)).values()] == [["cd"], ["c"], ["ab.0"], ["ab"], ["a"], [""]]


class Backwards(nn.ModuleDict):
    def named_modules(self, *args, **kwargs):
        return reversed([*super().named_modules(*args, **kwargs)])


@pytest.mark.parametrize("technique", [Half, FourBit])
def test_a_bias_that_is_no_parameter_of_its_own_stays(technique):
    layer = nn.Linear(8, 4)
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias  # a plain tensor, as a hook would put there before each call
    x = torch.randn(2, 8)
    made = convert(layer, technique())
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight.dequantize(), bias))


def test_a_weight_that_is_no_parameter_of_its_own_is_left_alone():
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight
    for technique in (Half, FourBit, LoRA):
        assert conversion_skip_reason(technique, layer) == (
            "its weight is no parameter of its own: make it one, as torch.nn.utils.prune.remove does"
        )
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(8, 4))
    for technique in (Half, FourBit, LoRA):
        assert "weight_norm computes its weight: call remove_weight_norm" in conversion_skip_reason(technique, layer)

"""An adapted weight is a tensor for whoever reads it, in graphs, too."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowmem
from lowmem import FourBit, Half, LoRA, convert
from lowmem.kernels.torch_versions import TORCH
from lowmem.nn.adapted_weight import AdaptedWeight
from lowmem.nn.adapter_bank import parameter_of
from tests.nn.adapted_cases import make, total
from tests.nn.stored_cases import CASES


def test_it_is_a_tensor_of_the_shape_dtype_and_device_of_its_base():
    weight, dense, pairs, layout = make("linear", CASES["linear"], "nf4")
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.numel(), weight.dim(), len(weight)) == (
        (48, 32), torch.float32, dense.device, 48 * 32, 2, 48,
    )  # fmt: skip
    assert not weight.requires_grad
    assert "AdaptedWeight(shape=(48, 32)" in repr(weight)
    assert isinstance(weight.T, AdaptedWeight)
    assert isinstance(weight.data, AdaptedWeight)
    assert isinstance(weight[3], AdaptedWeight)  # to which a write is refused
    torch.testing.assert_close(weight[3], total(dense, pairs, layout)[3].float())
    torch.testing.assert_close(weight.detach() + 0, total(dense, pairs, layout).detach().float())
    assert not (weight.detach() + 0).requires_grad
    with pytest.raises(RuntimeError, match="would write to a weight with adapters"):
        weight.data = dense
    with pytest.raises(RuntimeError, match="cannot train: the adapters do"):
        weight.requires_grad_()
    assert weight.requires_grad_(False) is weight


def test_a_module_that_shares_an_adapted_weight_shares_its_base():
    weight, *_ = make("linear", CASES["linear"], "dense")
    layer = nn.Linear(32, 48)
    layer.weight = weight
    assert layer.weight is weight.base


def length(weight):
    """Return ``len(weight)``, which torch's compiler cannot take of a subclass before 2.13."""
    return len(weight) if TORCH >= (2, 13) else weight.shape[0]


READS = {
    "arithmetic": lambda x, w: x @ (2 * w - 1).T + (w + 1).sum() + x @ (-w).T,
    "a cast": lambda x, w: F.linear(x, w.to(x.dtype)) + F.linear(x, w.double().float()),
    "a question": lambda x, w: F.linear(x, w) if isinstance(w, torch.Tensor) and not w.requires_grad else x,
    "its sizes": lambda x, w: F.linear(x, w) * w.shape[0] + w.size(1) + w.dim() + length(w) + w.numel(),
    "rows": lambda x, w: F.linear(x, w[2:9]).sum() + x @ w[0] + sum(F.linear(x, part).sum() for part in w.chunk(3)),
    "parts": lambda x, w: x[:, :4] @ w.split([4, 12], 1)[0].T + w.unflatten(0, (4, 6)).sum() + w.split(8)[1][0, 0],
    "columns": lambda x, w: x[:, 2:7] @ w[:, 2:7].T,
    "transposed": lambda x, w: x @ w.t() + x @ w.T + x @ w.mT + torch.addmm(x.new_ones(24), x, w.t()),
    "a normalized one": lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)),
    "other views": lambda x, w: x @ w.view(8, 3, 16)[:, 1].T + x.sum() * w.reshape(-1)[:8] + w.flip(0)[0, 0],
    "joined": lambda x, w: F.linear(x, torch.cat([w, torch.exp(w)])),
    "detached": lambda x, w: F.linear(x, w.detach()) + F.linear(x, w.data) + F.linear(x, w),
    "an einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w) + torch.einsum("oi,bi->bo", w, x),
    "by keyword": lambda x, w: torch.matmul(input=x, other=w.T) + F.linear(input=x, weight=w),
}


BASES = {"dense": (), "nf4": (FourBit("nf4", 16),), "bfloat16": (Half(torch.bfloat16),)}


class Reader(nn.Module):
    """It reads one weight in all of these ways, and calls no layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 24, bias=False)

    def forward(self, x):
        return [read(x, self.layer.weight) for read in READS.values()]


@pytest.mark.compile
@pytest.mark.parametrize(
    "base", [(), (FourBit("nf4", 16),), (Half(torch.bfloat16),)], ids=["dense", "nf4", "bfloat16"]
)
@pytest.mark.no_cover
def test_whoever_reads_it_in_a_graph_gets_the_results_and_gradients_of_the_sum(base, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    torch.manual_seed(0)
    model = convert(Reader(), *base, LoRA(2))
    adapter = lowmem.adapter_layers(model, "default")["layer"]
    matrices = adapter.lora_a, adapter.lora_b
    for matrix in matrices:
        nn.init.normal_(matrix, 0, 0.3)
    x = torch.randn(5, 16)
    base_weight = parameter_of(model.layer, "weight")
    dense = base_weight.dequantize() if base else base_weight.detach()
    whole = dense + adapter.scaling * (adapter.lora_b @ adapter.lora_a)
    exact = [read(x, whole if name != "a question" else whole.detach()) for name, read in READS.items()]
    exact[2] = F.linear(x, whole)
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for name, got, wanted in zip(READS, run(x), exact, strict=True):
            torch.testing.assert_close(
                got, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        given = torch.autograd.grad(sum(one.square().sum() for one in run(x)), matrices)
        of_sum = torch.autograd.grad(sum(one.square().sum() for one in exact), matrices, retain_graph=True)
        for got, wanted in zip(given, of_sum, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_what_a_graph_cannot_do_with_it_names_the_remedy(request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    model = convert(nn.Sequential(nn.Linear(16, 24)), LoRA(2))

    def run(function):
        return torch.compile(lambda: function(model[0].weight), fullgraph=True, backend="aot_eager")()

    refusal = r"weight with adapters.*lowmem.merge\(model\)"
    refusal += "|hasattr.*_Traced" * (TORCH < (2, 13))  # its compiler ends some of these with words of its own
    for write in (lambda w: w.zero_(), nn.init.normal_, lambda w: torch.add(torch.ones(24, 16), 1, out=w)):
        with torch.no_grad(), pytest.raises(Exception, match=f"(?s){refusal}"):
            run(write)


@pytest.mark.parametrize("techniques", [(LoRA(2),), (FourBit(), LoRA(2))], ids=["dense", "4-bit"])
@pytest.mark.parametrize("write", [nn.init.zeros_, lambda w: w.data.zero_(), lambda w: w.T.zero_()])
def test_a_write_that_ends_a_graph_is_refused_and_not_made_to_the_base(techniques, write, request):
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()

    class Own(nn.Linear):
        pass

    model = convert(nn.Sequential(Own(16, 24)), *techniques)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"zero_ would write to a weight with adapters"):
        torch.compile(lambda: write(model[0].weight), backend="eager")()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())

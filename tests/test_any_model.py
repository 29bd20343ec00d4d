"""Models as people write them, in plain torch: each converts whole, and then is what it was, but smaller.

``tests/zoo`` does the same with real architectures, where these are installed.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lowmem
from lowmem import FourBit, Half, convert, restore
from lowmem.nn.stored_module import StoredModule
from tests.selection import covering

TECHNIQUES = {"nf4": FourBit("nf4", 16), "bfloat16": Half(torch.bfloat16)}


class Experts(nn.Module):
    """A mixture: a stack of matrices for each projection, of which a router chooses two for each token."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 16) / 4)
        self.down = nn.Parameter(torch.randn(4, 16, 24) / 5)

    def forward(self, x, chosen, weights):
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            token, slot = torch.where(chosen == expert)
            gate, up = F.linear(x[token], self.up[expert]).chunk(2, -1)
            y = F.linear(F.silu(gate) * up, self.down[expert])
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.router, self.experts = nn.Linear(16, 16), nn.Linear(16, 4, bias=False), Experts()

    def forward(self, x):
        x = self.mix(x).flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).topk(2)
        return self.experts(x, chosen, weights)


class BatchedExperts(Mixture):
    """All experts see all tokens, in one batched product."""

    def forward(self, x):
        x = self.mix(x).flatten(0, 1)
        gate, up = torch.bmm(x.expand(4, -1, -1), self.experts.up.transpose(1, 2)).chunk(2, -1)
        y = torch.bmm(F.silu(gate) * up, self.experts.down.transpose(1, 2))  # (experts, tokens, 16)
        return torch.einsum("te,eti->ti", self.router(x).softmax(-1), y)


class ReadsDtype(nn.Module):
    """As T5 does, it casts to the dtype of the weight that comes next."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(self.up(x.to(self.up.weight.dtype)).relu().to(self.down.weight.dtype))


class ReadsStride(nn.Module):
    """As Whisper and Mamba do, it reads hyperparameters and the kernel itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(16, 16, 3, stride=2, padding=1, groups=16), nn.Linear(16, 8)

    def forward(self, x):
        x = x.mT  # (batch, 16, length)
        assert (self.conv.stride, self.conv.kernel_size) == ((2,), (3,))
        kernel = self.conv.weight.squeeze(1)  # (16, 3)
        step = (x[:, :, :3] * kernel).sum(-1)
        return self.head(self.conv(x).mean(-1) + step)


class ReadsWeights(nn.Module):
    """It computes with the weights of layers that it never calls."""

    def __init__(self):
        super().__init__()
        self.project, self.gate = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return F.linear(x, self.project.weight, self.project.bias).tanh() @ self.gate.weight.T


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices):
        return self.head(self.mix(self.tokens(indices)).relu())


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(16, 24, 2, batch_first=True), nn.Linear(24, 8)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])


class Transposed(type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})):
    """A linear layer with a transposed weight: as GPT-2 has it, it is known by its name."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.grow, self.volume = nn.ConvTranspose1d(16, 8, 4, stride=2), nn.Conv1d(8, 8, 3)
        self.norm, self.head = parametrizations.weight_norm(nn.Conv1d(8, 8, 3)), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.volume(self.grow(x.mT)).relu()).mean(-1))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.pair, self.head = nn.EmbeddingBag(50, 16), nn.Bilinear(16, 16, 8), nn.Linear(8, 4)

    def forward(self, indices):
        x = self.bag(indices)
        return self.head(self.pair(x, x.sin()))


X, TOKENS = lambda: torch.randn(2, 6, 16), lambda: torch.randint(50, (2, 6))
MODELS = {
    "mixture": (Mixture, X),
    "mixture, batched": (BatchedExperts, X),
    "reads dtypes": (ReadsDtype, X),
    "reads strides": (ReadsStride, X),
    "reads weights": (ReadsWeights, X),
    "tied ends": (Tied, TOKENS),
    "LSTM": (lambda: Recurrent(nn.LSTM), X),
    "GRU": (lambda: Recurrent(nn.GRU), X),
    "attention": (Attention, X),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), X),
    "Conv1D": (lambda: nn.Sequential(Transposed(16, 24), nn.ReLU(), nn.Linear(24, 8)), X),
    "generator": (Generator, X),
    "bags": (Bags, TOKENS),
}
models = pytest.mark.parametrize("name", MODELS)
stored_models = covering(1, name=MODELS, kind=TECHNIQUES)  # each model in 4 or in 16 bits


def make(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def make_input(name):
    torch.manual_seed(1)
    return MODELS[name][1]()


def wide(x):
    return x.double() if x.is_floating_point() else x


@stored_models
def test_it_stores_all_matrices_and_computes_what_these_give(name, kind):
    """In float64, where what two orders of addition differ by is 1e-15 of a sum: 1e-9 allows for any condition."""
    dense, x = make(name), make_input(name)
    model = convert(copy.deepcopy(dense), TECHNIQUES[kind])
    assert not any(
        p.dim() > 1
        for n, p in model.named_parameters()
        if not n.endswith(("packed", "scales", "rounded", "original0"))
    )
    assert [type(one) for one in restore(copy.deepcopy(model)).modules()] == [type(one) for one in dense.modules()]
    twin = restore(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(wide(x)), twin.double()(wide(x)), rtol=1e-9, atol=1e-9)
    relative = lowmem.measure.difference(dense(x).detach(), model.float()(x).detach()).relative
    assert 0 < relative < (0.6 if kind == "nf4" else 0.03)
    if name != "LSTM":  # torch's own needs a processor with AVX-512 for it
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            assert model(x).isfinite().all()


@models
def test_weights_are_multiplied_in_the_compute_dtype_whoever_reads_them(name, tmp_path):
    """1 + 2^-12 is 1 in bfloat16; what copies, pickles, states and files make of the model keeps it."""
    technique = FourBit("nf4", compute_dtype=torch.bfloat16, embeddings="4bit")
    model, x = convert(make(name), technique), make_input(name)
    plain = convert(make(name), FourBit("nf4", embeddings="4bit"))
    with torch.no_grad():
        expected = model(x)
        assert not torch.equal(plain(x), expected)
        lowmem.save(model, tmp_path / "model.safetensors")
        twins = [copy.deepcopy(model), lowmem.load(tmp_path / "model.safetensors", lambda: make(name))]
        if name != "generator":  # torch pickles no parametrizations
            twins.append(pickle.loads(pickle.dumps(model)))
        for twin in twins:
            assert torch.equal(twin(x), expected)
        integers = convert(make(name), FourBit("nf4", compute_dtype=torch.int8, embeddings="4bit"))
        for module in integers.modules():  # which linear layers alone can
            forms = getattr(module, "forms", {})
            assert all(form.product_dtype(torch.ones(1)) is torch.float32 for form in forms.values())


@pytest.mark.compile(keep=3)
@stored_models
@pytest.mark.no_cover
def test_it_compiles_whole(name, kind, request):
    if name == "mixture":
        pytest.skip("a loop over the experts that tokens chose has no graph, dense or not")
    if name in ("LSTM", "GRU", "generator"):
        pytest.skip("torch.compile breaks the graph of a dense recurrent or parametrized layer, too")
    request.addfinalizer(torch.compiler.reset)
    torch.compiler.reset()
    model, x = convert(make(name), TECHNIQUES[kind]), make_input(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for given in (x, x[:, :4].repeat(2, 1, *[1] * (x.dim() - 2))):  # for any batch, with its gradient
        given = given.clone().requires_grad_(given.is_floating_point())
        got, expected = compiled(given), model(given)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        if given.requires_grad:
            of_x = [torch.autograd.grad(out.square().sum(), given)[0] for out in (got, expected)]
            torch.testing.assert_close(*of_x, rtol=1e-3, atol=1e-4)


@pytest.mark.compile(keep=3)
@stored_models
def test_it_exports(name, kind):
    if name in ("mixture",):
        pytest.skip("a loop over the experts that tokens chose has no graph, dense or not")
    model, x = convert(make(name), TECHNIQUES[kind]), make_input(name)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of torch's own recurrent layers
@stored_models
def test_it_is_traced(name, kind):
    if name in ("mixture",):
        pytest.skip("a trace records the experts of one input, dense or not")
    model, x = convert(make(name), TECHNIQUES[kind]), make_input(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,), check_trace=False)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_a_model_stores_is_told_in_its_summary():
    rows = {row.path: row for row in lowmem.summary(convert(make("mixture"), FourBit("nf4", 16)))}
    assert rows["experts"].stored == "nf4, block_size=16, scales=double"
    assert rows["experts"].weights == 4 * 48 * 16 + 4 * 16 * 24
    assert rows["experts"].bits_per_weight < 7
    assert isinstance(convert(make("LSTM"), FourBit()).rnn, StoredModule)

"""Norms and MLPs are recognized by what they compute, and what differs is refused with a reason."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lowmem import FourBit, LoRA, convert
from lowmem.training.fused import Act, GatedMLPSpec, LayerNormSpec, RMSNormSpec
from lowmem.training.fusion_recognition import probe_fusion_spec_or_reason
from tests.rounding import default_dtype
from tests.training.blocks import MLP, Norm


class Gemma(Norm):
    def forward(self, x):
        return (self.normed(x, self.variance_epsilon) * (1 + self.weight.float())).type_as(x)


class Olmo(Norm):
    def forward(self, x):
        return (self.weight * self.normed(x, self.variance_epsilon)).to(x.dtype)


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Sums(Norm):
    """The epsilon counts for more."""

    def forward(self, x):
        return self.weight * self.normed(x, 0.01).to(x.dtype)


class Beside(Norm):
    """The epsilon counts for small inputs alone."""

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Least(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(self.variance_epsilon))


class Limited(Norm):
    """Large inputs are cut off."""

    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class T5(Norm):
    """The result has the dtype of the weight, if that has 16 bits."""

    def forward(self, x):
        wide = self.normed(x, self.variance_epsilon)
        return self.weight * (wide.to(self.weight.dtype) if self.weight.dtype is torch.bfloat16 else wide)


class Fails(Norm):
    def forward(self, x, cache):
        raise NotImplementedError


def norm(kind, **options):
    torch.manual_seed(0)
    return kind(64, **options)


def test_norms():
    assert probe_fusion_spec_or_reason(norm(Norm)) == RMSNormSpec(
        "weight", "variance_epsilon", 0.0, rounds_first=True, mixes=True
    )
    assert probe_fusion_spec_or_reason(norm(Gemma)) == RMSNormSpec(
        "weight", "variance_epsilon", 1.0, rounds_first=False, mixes=True
    )
    assert probe_fusion_spec_or_reason(norm(Olmo)) == RMSNormSpec(
        "weight", "variance_epsilon", 0.0, rounds_first=False, mixes=True
    )
    assert probe_fusion_spec_or_reason(norm(T5)) == RMSNormSpec("weight", "variance_epsilon", 0.0, rounds_first=True)
    of_torch = probe_fusion_spec_or_reason(norm(nn.RMSNorm, eps=1e-6))
    assert (of_torch.weight, of_torch.eps, of_torch.offset) == ("weight", "eps", 0.0)
    for kind in (Centred, Sums, Fails, Beside, Least, Limited):
        assert probe_fusion_spec_or_reason(norm(kind)) == "on random numbers it computes no RMS norm"
    assert (
        probe_fusion_spec_or_reason(type("Own", (nn.LayerNorm,), {})(64, bias=False))
        == "on random numbers it computes no RMS norm"
    )
    for other in (nn.Linear(4, 4), nn.RMSNorm(64), nn.RMSNorm((4, 4), eps=1e-5), nn.BatchNorm1d(4)):
        assert probe_fusion_spec_or_reason(other) is None
    own = norm(Norm)
    own.forward = own.forward
    assert "forward of its own" in probe_fusion_spec_or_reason(own)


class Between(MLP):
    """With another function between the layers."""

    between = staticmethod(lambda gate, up: functional.silu(gate) * up)

    def forward(self, x):
        return self.down(self.between(self.gate(x), self.up(x)))


def mlp(between, joined=False):
    return type("Made", (Between,), {"between": staticmethod(between)})(joined)


SQUARES = [  # ways to write relu(x)^2
    lambda x: torch.square(functional.relu(x)),
    lambda x: functional.relu(x) ** 2,
    lambda x: functional.relu(x) * functional.relu(x),
    lambda x: x * functional.relu(x),
]


def test_gated_mlps():
    assert probe_fusion_spec_or_reason(MLP()) == GatedMLPSpec("gate", "up", "down", "SiLU")
    assert probe_fusion_spec_or_reason(MLP(joined=True)) == GatedMLPSpec("gate_up", None, "down", "SiLU")
    assert probe_fusion_spec_or_reason(mlp(lambda gate, up: gate * functional.silu(up))) == GatedMLPSpec(
        "up", "gate", "down", "SiLU"
    )
    tanh = probe_fusion_spec_or_reason(mlp(lambda gate, up: functional.gelu(gate, approximate="tanh") * up))
    assert tanh == GatedMLPSpec("gate", "up", "down", "GELU (tanh)")
    exact = probe_fusion_spec_or_reason(mlp(lambda gate, up: functional.gelu(gate) * up))
    assert exact == GatedMLPSpec("gate", "up", "down", "GELU")
    quick = probe_fusion_spec_or_reason(mlp(lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up))
    assert quick == GatedMLPSpec("gate", "up", "down", "GELU (sigmoid)")
    for square in SQUARES:
        squared = probe_fusion_spec_or_reason(mlp(lambda gate, up, square=square: square(gate) * up))
        assert squared == GatedMLPSpec("gate", "up", "down", "squared ReLU")
    for techniques in ((LoRA(4),), (FourBit(), LoRA(4)), (FourBit(),)):
        assert probe_fusion_spec_or_reason(convert(MLP(), *techniques)) == GatedMLPSpec("gate", "up", "down", "SiLU")
    made = MLP().bfloat16()
    state = torch.random.get_rng_state()
    probe_fusion_spec_or_reason(made)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "between",
    [
        lambda gate, up: functional.relu(gate) * up,
        lambda gate, up: functional.mish(gate) * up,
        lambda gate, up: gate.square() * up,
        lambda gate, up: functional.relu(gate).square() * up * 1.01,
        lambda gate, up: functional.relu(gate).square().clamp(max=1e5) * up,
        lambda gate, up: functional.relu(gate).square().detach() * up,
        lambda gate, up: functional.leaky_relu(gate).square() * up,
        lambda gate, up: functional.silu(gate) * up * 1.01,
        lambda gate, up: functional.silu(gate) + up,
        lambda gate, up: functional.silu(gate.clamp(max=10)) * up,
        lambda gate, up: functional.silu(gate) * up.clamp(-10, 10),
        lambda gate, up: functional.silu(gate).detach() * up,
        lambda gate, up: functional.dropout(functional.silu(gate) * up, 0.5),
    ],
)
def test_other_mlps_are_refused(between):
    assert "is no act(gate) * up of a known activation: SiLU" in probe_fusion_spec_or_reason(mlp(between))


def test_what_follows_the_layers_is_looked_at():
    class Dropout(MLP):
        def forward(self, x):
            return functional.dropout(super().forward(x), 0.1, self.training)

    assert probe_fusion_spec_or_reason(Dropout()) == "it does not return what down returns, as with dropout"
    hooked = MLP()
    hooked.act.register_forward_hook(lambda *_: None)
    assert probe_fusion_spec_or_reason(hooked) == "its activation has hooks"

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, mask):
            return self.q(x) * self.k(x) * self.v(x)

    assert probe_fusion_spec_or_reason(Attention()) is None
    assert probe_fusion_spec_or_reason(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))) is None


class Function(nn.Module):
    of = staticmethod(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))))

    def forward(self, x):
        return self.of(x)


def function(of):
    return type("Made", (Function,), {"of": staticmethod(of)})()


def test_layer_norms_of_torch_alone():
    class Own(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    assert (
        probe_fusion_spec_or_reason(nn.LayerNorm(8))
        == probe_fusion_spec_or_reason(nn.LayerNorm(8, elementwise_affine=False))
        == LayerNormSpec()
    )
    assert not isinstance(probe_fusion_spec_or_reason(Own(8)), LayerNormSpec)
    patched = nn.LayerNorm(8)
    patched.forward = lambda x: x
    assert probe_fusion_spec_or_reason(patched) is None


def test_activations_without_a_name():
    assert probe_fusion_spec_or_reason(Function()) == Act("GELU (tanh)")
    assert probe_fusion_spec_or_reason(function(lambda x: x * torch.sigmoid(1.702 * x))) == Act("GELU (sigmoid)")
    assert probe_fusion_spec_or_reason(function(lambda x: x / (1 + torch.exp(-x)))) == Act("SiLU")
    assert (
        probe_fusion_spec_or_reason(function(functional.gelu))
        == probe_fusion_spec_or_reason(nn.GELU())
        == Act("GELU")
    )
    assert probe_fusion_spec_or_reason(nn.GELU("tanh")) == Act("GELU (tanh)")
    assert probe_fusion_spec_or_reason(nn.SiLU()) == Act("SiLU")
    for square in SQUARES:
        assert probe_fusion_spec_or_reason(function(square)) == Act("squared ReLU")
    for of in (
        torch.relu,
        torch.tanh,
        lambda x: x,
        lambda x: functional.silu(x).detach(),
        lambda x: functional.silu(x).clamp(max=20),
        torch.square,
        lambda x: functional.leaky_relu(x).square(),
        lambda x: functional.relu(x).square().clamp(max=1e5),
        lambda x: functional.relu(x).square().detach(),
        lambda x: functional.relu(x).square() * 1.01,
        torch.sum,
    ):
        assert probe_fusion_spec_or_reason(function(of)) is None
    for of_torch in (nn.SiLU(inplace=True), nn.ReLU(), nn.Identity(), nn.Dropout()):
        assert probe_fusion_spec_or_reason(of_torch) is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_and_dtype_change_nothing(device):
    """Random numbers are the CPU's, whose generator alone is forked."""
    made = [norm(Norm), MLP(), nn.GELU()]
    expected = [probe_fusion_spec_or_reason(one) for one in made]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with default_dtype(dtype), torch.device(device):
            assert [probe_fusion_spec_or_reason(one) for one in made] == expected


def test_recognizing_changes_the_mode_of_no_layer():
    for training in (False, True):
        mlp = MLP().train(training)
        assert isinstance(probe_fusion_spec_or_reason(mlp), GatedMLPSpec)
        assert {module.training for module in mlp.modules()} == {training}


def off(module, shown):
    """A module's class whose outputs are off where ``shown(module, x)`` is true."""
    return type(
        "Off", (module,), {"forward": lambda self, x: module.forward(self, x) * (1.01 if shown(self, x) else 1)}
    )


def counted(module, x):
    module.calls = getattr(module, "calls", 0) + 1
    return module.calls > 100


def counted_in_a_list():
    """Copies share the list."""
    calls = []
    return lambda module, x: calls.append(x) or len(calls) > 2


SHOWN = {
    "batch": lambda module, x: x.dim() == 3 and len(x) > 1,
    "one sequence": lambda module, x: x.dim() == 3 and len(x) == 1,
    "length": lambda module, x: x.dim() == 3 and x.shape[1] > 16,
    "one token": lambda module, x: x.dim() == 3 and x.shape[1] == 1,
    "dimensions": lambda module, x: x.dim() == 3,
    "many calls": counted,
    "calls": None,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", SHOWN)
def test_what_only_some_calls_show_is_seen(case, training):
    """Shapes of inputs, and calls that are counted."""
    for kind, of in ((Norm, norm), (MLP, lambda kind: kind()), (Function, lambda kind: kind())):
        made = of(off(kind, SHOWN[case] or counted_in_a_list()))
        found = probe_fusion_spec_or_reason(made, training)
        assert found is None or isinstance(found, str), found
        assert not hasattr(made, "calls")


def test_outputs_that_are_cut_off_are_seen():
    class Cut(Norm):
        def forward(self, x):
            return super().forward(x).clamp(-500, 500)

    assert probe_fusion_spec_or_reason(norm(Cut)) == "on random numbers it computes no RMS norm"


def test_an_activation_that_counts_its_calls_is_none_of_a_gated_mlp():
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls = self.calls + 1
            return functional.silu(x) * (1.01 if self.calls > 100 else 1)

    made = MLP()
    made.act = Counts()
    assert probe_fusion_spec_or_reason(made) == "numbers of it change from call to call"
    assert made.act.calls == 0

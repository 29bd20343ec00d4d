"""Modules get their class back, whatever was done to it in layers; or an error, and nothing changes."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lowmem import (
    LoRA,
    convert,
    inference_report,
    prepare_inference,
    prepare_training,
    release_training,
    training_report,
)
from lowmem.training.fused import Act, LayerNormSpec, fuse
from lowmem.training.lazy_logits import LazyLogits, LazyOutputLayer, make_logits_lazy
from lowmem.training.prepared_module import PreparedModule, PreparedModuleReport, check_prepared_class_unchanged
from tests.refusing import refused
from tests.training.blocks import JOINED, MLP, NORM, SEPARATE, WIDTH, Norm, assert_near, batch, gradients

KINDS = {
    "norm": (Norm, lambda one: fuse(one, NORM)),
    "gated MLP": (MLP, lambda one: fuse(one, SEPARATE)),
    "joined gated MLP": (lambda: MLP(joined=True), lambda one: fuse(one, JOINED)),
    "activation": (nn.SiLU, lambda one: fuse(one, Act("SiLU"))),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), lambda one: fuse(one, LayerNormSpec())),
    "output layer": (lambda: nn.Linear(WIDTH, 40), lambda one: make_logits_lazy(one, chunk=8)),
    "lean": (MLP, lambda one: prepare_training(one, "lean")),
    "lean, with adapters of its own": (
        lambda: convert(nn.Linear(WIDTH, 40), LoRA(2)),
        lambda one: prepare_training(one, "lean"),
    ),
    "lean, an output layer": (lambda: nn.Linear(WIDTH, 40), lambda one: prepare_training(one, "lean", output="*")),
}
"""Kind of prepared module -> what makes a plain one, and what prepares it."""
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    """Return a plain module, and a prepared one with the same parameters."""
    make, prepare = KINDS[kind]
    torch.manual_seed(0)
    plain = make()
    prepare(model := copy.deepcopy(plain))
    return plain, model


def half_more(module, args, out):
    return out * 1.5


@kinds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_evaluation_graphs_and_transforms_get_the_plain_module(kind):
    plain, model = made(kind)
    x = batch().detach()
    expected = plain(x)
    assert torch.equal(model.eval()(x), expected)
    model.train()
    with torch.no_grad():
        assert type(model(x)) is torch.Tensor
        assert_near([model(x)], [expected], 1e-6)
    for graph in (
        torch.compile(model, backend="eager", fullgraph=True),
        torch.jit.trace(model, x, check_trace=False),
    ):
        assert type(graph(x)) is torch.Tensor
        assert torch.equal(graph(x), expected)
    for transform in (
        lambda one: torch.func.vmap(lambda row: torch.func.functional_call(one, {}, (row,)))(x),
        lambda one: torch.func.grad(lambda x: one(x).sin().sum())(x),
        lambda one: torch.func.jvp(one, (x,), (x.cos(),))[1],
    ):
        torch.testing.assert_close(transform(model), transform(plain), rtol=1e-5, atol=1e-6)
    assert model(x[:, :0]).shape == (2, 0, *expected.shape[2:])
    assert model.to("meta")(x.to("meta")).is_meta


@kinds
def test_copies_are_prepared_alike_and_each_is_released_alone(kind):
    plain, model = made(kind)
    for one in (plain, model):
        one.register_forward_hook(half_more)
    x, before = batch(), (type(plain), {*vars(plain)})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model, type(plain))
    assert type(model).__name__ == type(plain).__name__
    pickled = [] if isinstance(model, LazyOutputLayer) else [pickle.loads(pickle.dumps(model))]
    for twin in (copy.deepcopy(model), *pickled):
        assert isinstance(twin, PreparedModule)
        assert twin.report_note == model.report_note
        assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
        assert all(map(torch.equal, gradients(twin, x), gradients(model, x)))
        for _ in range(2):  # the second time nothing happens
            release_training(twin)
            assert (type(twin), {*vars(twin)}) == before
        assert all(map(torch.equal, gradients(twin, x), gradients(plain, x)))
        assert isinstance(model, PreparedModule)


def test_a_prepared_model_is_not_converted():
    model = prepare_training(nn.Linear(8, 40), "lean", output="*")
    assert issubclass(type(model).plain_class, PreparedModule)  # lazy logits, and compressed activations over them
    with pytest.raises(RuntimeError, match="the model itself is prepared for training: call lowmem.release_training"):
        convert(model, LoRA(2))


def test_a_class_that_was_changed_since_is_an_error():
    model = prepare_training(convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 40)), LoRA(2), skip="1"), output="1")
    assert isinstance(model(torch.ones(1, 8)), LazyLogits)
    parametrize.register_parametrization(model[1], "weight", nn.Identity())
    for call in (check_prepared_class_unchanged, release_training):
        with refused(model, RuntimeError, "was made of the prepared module since, as a parametrization does"):
            call(model[1])
    with refused(model, RuntimeError, "undo that first"):
        release_training(model)
    parametrize.remove_parametrizations(model[1], "weight")
    release_training(model)
    assert type(model[1]) is nn.Linear
    assert model(torch.ones(1, 8)).shape == (1, 40)


def test_a_printed_report_has_one_line_for_all_modules_of_a_role():
    report = PreparedModuleReport(
        {"": "caches in place"}
        | {f"layers.{number}.{part}": f"{part} fused" for number in range(30) for part in ("norm", "mlp")}
        | {"layers.3.mlp": "as before: it has hooks", "head\x1b": "in chunks"}
    )
    assert str(report).splitlines() == [
        "the model itself: caches in place",
        "layers.0-29.norm: norm fused",
        "layers.0...29.mlp: mlp fused",
        "layers.3.mlp: as before: it has hooks",
        r"head\x1b: in chunks",
    ]
    assert f"{report}" == str(report)
    assert json.loads(json.dumps(report)) == report == dict(report)
    assert eval(repr(report)) == report
    assert str(PreparedModuleReport()) == "no module is prepared"


def test_the_reports_of_training_and_inference_are_printed_by_role():
    model = nn.Sequential(*(Norm() for _ in range(4)))
    prepared = prepare_training(model)
    assert str(training_report(prepared)).splitlines() == ["0-3: RMS norm fused: keeps its input"]
    assert str(training_report(release_training(model))) == "no module is prepared"
    assert str(inference_report(prepare_inference(model))).splitlines() == ["0-3: RMS norm in one call"]

"""Preparing again, and what stays of a preparation that fails. Values: test_parts.py and test_blocks.py."""

import pytest
import torch
from torch import nn

from lowmem import inference_report, prepare_inference, release_inference
from tests.compiled import needs_kernel
from tests.inference.test_norms_and_mlps import inputs, model_of
from tests.training.blocks import Block


@needs_kernel
def test_preparing_again_prepares_anew():
    model, x = model_of(), inputs()
    with torch.no_grad():
        prepare_inference(model)
        first, report = model(x), inference_report(model)
        prepare_inference(model)
        assert torch.equal(model(x), first)
    assert inference_report(model) == report
    kinds = [type(module).__mro__ for module in model.modules()]
    assert all(sum(kind.__name__ == "InferenceModule" for kind in mro) <= 1 for mro in kinds)


def test_a_model_that_is_not_prepared_is_released_and_reported():
    model = nn.Linear(3, 3)
    assert release_inference(model) is model
    assert inference_report(model) == {}
    assert inference_report(prepare_inference(model)) == {}
    for function in (release_inference, inference_report):
        with pytest.raises(TypeError, match="Module"):
            function(3)


def test_attributes_of_a_module_stay():
    model = model_of()
    model[0].mlp.note = model[0].norm.note = "the user's"
    before = [dict(vars(one)) for one in model.modules()]
    inference_report(prepare_inference(model))
    assert model[0].mlp.note == model[0].norm.note == "the user's"
    release_inference(model)
    assert [dict(vars(one)) for one in model.modules()] == before


def test_the_report_says_that_plain_torch_serves_other_devices():
    """Moved since or before, and also for a block; there ``generate`` needs no cache of lowmem's."""
    model = prepare_inference(model_of())
    parts = inference_report(model)
    assert set(parts) == {"0.norm", "0.mlp", "1.norm", "1.mlp"}
    assert inference_report(model.to("meta")) == dict.fromkeys(parts, "as before on meta: C computes on CPUs")
    assert inference_report(prepare_inference(model_of().to("meta"))) == inference_report(model)
    with torch.no_grad():
        assert model(inputs().to("meta")).device.type == "meta"


def test_the_report_names_a_module_that_is_used_twice_by_its_first_path():
    stored, dense = model_of()[0], Block().eval()
    report = inference_report(prepare_inference(nn.Sequential(stored, stored, dense, dense)))
    assert set(report) == {"0.norm", "0.mlp", "2.norm", "2.mlp"}


@needs_kernel
def test_other_arguments_than_one_input_are_those_of_the_modules_own_forward():
    model, x = model_of(), inputs()
    with torch.no_grad():
        expected = model[0].norm(x)
        prepare_inference(model)
        assert torch.equal(model[0].norm(x=x), expected)
        with pytest.raises(TypeError, match="positional arguments"):
            model[0].norm(x, x)


@needs_kernel
def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    class Integration:
        @staticmethod
        def find_blocks(model, parts):
            raise MemoryError("no memory")

    model = model_of()
    kinds = [type(module) for module in model.modules()]
    monkeypatch.setattr(
        "lowmem.inference.prepare_inference.iterate_integrations_or_warn", lambda *given: [Integration]
    )
    with pytest.raises(MemoryError):
        prepare_inference(model)
    assert [type(module) for module in model.modules()] == kinds
    assert inference_report(model) == {}


@needs_kernel
@pytest.mark.compile
def test_recorded_graphs_hold_the_modules():
    model, x = model_of(), inputs()
    with torch.no_grad():
        expected = model(x)
        prepare_inference(model)
        bound = 64 * torch.finfo(x.dtype).eps * expected.abs().max()
        for recorded in (
            torch.compile(model, backend="eager", fullgraph=True),
            torch.export.export(model, (x,)).module(),
            torch.jit.trace(model, (x,)),
        ):
            assert (recorded(x) - expected).abs().max() <= bound

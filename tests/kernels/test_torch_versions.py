"""What differs between versions of torch is told by the version, and stays out of the newer ones' way."""

import torch

from lowmem.kernels import torch_versions
from lowmem.kernels.torch_versions import TORCH, ask_classes_in_graphs, is_exporting, outside_of_graphs


class Exported(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x - 1


def test_an_export_is_told_from_other_calls_where_torch_can_tell(request):
    request.addfinalizer(torch.compiler.reset)
    assert torch.__version__.startswith(f"{TORCH[0]}.{TORCH[1]}.")
    x = torch.zeros(3)
    assert torch.equal(Exported()(x), x - 1)
    assert torch.equal(torch.compile(Exported(), fullgraph=True, backend="eager")(x), x - 1)
    exported = torch.export.export(Exported(), (x,)).module()(x)
    assert torch.equal(exported, x + 1 if TORCH >= (2, 7) else x - 1)


def test_the_compiler_stays_out_of_a_function_on_versions_that_need_it(monkeypatch, request):
    """On newer ones the function is what it was; elsewhere the compiler is there again after a call and an error."""
    request.addfinalizer(torch.compiler.reset)

    def traced(x):
        return x.sin() if torch.compiler.is_compiling() else x.cos()

    assert outside_of_graphs(traced) is traced or TORCH < (2, 9)
    monkeypatch.setattr(torch_versions, "TORCH", (2, 4))
    eager = outside_of_graphs(traced)
    x = torch.randn(3)
    compiled = torch.compile(lambda x: (eager(x + 1) + 1, traced(x)), backend="eager")
    for got, expected in zip(compiled(x), ((x + 1).cos() + 1, x.sin()), strict=True):
        torch.testing.assert_close(got, expected)


class Doubled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*(one * 2 for one in args))


def test_a_graph_asks_the_class_of_a_tensor_where_eager_torch_does(request):
    request.addfinalizer(torch.compiler.reset)

    def run(function):
        return function(Doubled(torch.ones(3)))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    compiled(torch.exp)  # imports what is changed
    assert ask_classes_in_graphs()
    for function in (abs, torch.relu_, torch.exp):
        torch.testing.assert_close(compiled(function), run(function))

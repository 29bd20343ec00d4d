"""What differs between versions of torch is told by the version."""

import torch

from lowmem.kernels.torch_versions import TORCH, ask_classes_in_graphs, is_exporting


class Exported(torch.nn.Module):
    def forward(self, x):
        return x + 1 if is_exporting() else x - 1


def test_an_export_is_told_from_other_calls(request):
    request.addfinalizer(torch.compiler.reset)
    assert torch.__version__.startswith(f"{TORCH[0]}.{TORCH[1]}.")
    x = torch.zeros(3)
    assert torch.equal(Exported()(x), x - 1)
    assert torch.equal(torch.compile(Exported(), fullgraph=True, backend="eager")(x), x - 1)
    assert torch.equal(torch.export.export(Exported(), (x,)).module()(x), x + 1)


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

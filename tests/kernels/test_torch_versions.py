"""What differs between versions of torch is told by the version."""

import torch

from lowmem.kernels.torch_versions import TORCH, is_exporting


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

"""What gather refuses; ``test_shard`` has what it returns, since that needs processes."""

import pytest
from torch import nn

import lowmem


def test_gather_needs_a_module_and_other_processes():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, found str"):
        lowmem.gather("model")
    with pytest.raises(
        RuntimeError, match="gather: this process knows of no others: start the program with torchrun"
    ):
        lowmem.gather(nn.Linear(2, 2))

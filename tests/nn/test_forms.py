"""The records of how a parameter is stored."""

import torch
from torch import nn

from lowmem.nn.forms import as_frozen_parameter


def test_freezing_a_frozen_parameter_returns_it():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert as_frozen_parameter(frozen) is frozen
    assert not as_frozen_parameter(nn.Parameter(torch.ones(2))).requires_grad

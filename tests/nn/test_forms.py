"""The records of how a parameter is stored."""

import torch
from torch import nn

from lowmem.nn.forms import freeze


def test_freezing_a_frozen_parameter_returns_it():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    assert freeze(frozen) is frozen
    assert not freeze(nn.Parameter(torch.ones(2))).requires_grad

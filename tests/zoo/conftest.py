"""Each model of the zoo, and the same one converted in each of two ways."""

import pytest
import torch

from lowmem import FourBit, Half, convert

TECHNIQUES = {"nf4": FourBit("nf4"), "bfloat16": Half(torch.bfloat16)}


@pytest.fixture(params=TECHNIQUES.values(), ids=TECHNIQUES.keys())
def technique(request):
    return request.param


@pytest.fixture
def converted(architecture, technique):
    return convert(architecture.make(), technique)

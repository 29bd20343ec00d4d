"""One process by itself sums and clips as torch does."""

import pytest
import torch

from lowmem.finetuning.ranks import Ranks


def test_gradients_are_clipped_to_a_norm_that_is_returned():
    one, other, none = (torch.zeros(3, requires_grad=True) for _ in range(3))
    for most, scale in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        one.grad, other.grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0])
        assert Ranks().clip([one, other, none], most) == 5
        assert one.grad.tolist() == pytest.approx([3 * scale, 0, 0])
        assert other.grad.tolist() == pytest.approx([0, 4 * scale, 0])


def test_one_process_sums_its_own_value():
    alone = Ranks()
    assert (alone.rank, alone.world, alone.gradient_scale, alone.sum(2.5)) == (0, 1, 1.0, 2.5)
    with alone.accumulating(torch.nn.Identity(), last=False):
        pass

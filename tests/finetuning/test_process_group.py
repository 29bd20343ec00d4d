"""One process by itself sums and clips as torch does."""

import pytest
import torch

from lowmem.finetuning.process_group import TrainingProcessGroup


def test_gradients_are_clipped_to_a_norm_that_is_returned():
    one, other, none = (torch.zeros(3, requires_grad=True) for _ in range(3))
    for most, scale in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        one.grad, other.grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0])
        assert TrainingProcessGroup().clip_grad_norm([one, other, none], most) == 5
        assert one.grad.tolist() == pytest.approx([3 * scale, 0, 0])
        assert other.grad.tolist() == pytest.approx([0, 4 * scale, 0])


def test_one_process_sums_its_own_value():
    alone = TrainingProcessGroup()
    assert (alone.rank, alone.world, alone.gradient_scale, alone.all_reduce_sum(2.5)) == (0, 1, 1.0, 2.5)
    with alone.gradient_sync_on_last_batch(torch.nn.Identity(), is_last=False):
        pass

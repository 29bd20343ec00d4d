"""Prepared models in two processes: gradients are those of one process, to the bit, and 8-bit moments are resumed.

A process's gradient of half of a batch is divided by two and added to the other's, which rounds once, as adding the
halves' gradients in one process and dividing by two does: with the same kernels nothing may differ.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowmem import (
    AdamW8bit,
    FourBit,
    LoRA,
    compressed_activations,
    convert,
    linear_cross_entropy,
    prepare_training,
    release_training,
    step_in_backward,
    training_report,
)
from lowmem.kernels.torch_versions import TORCH
from tests.training.blocks import Block, Language

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
    pytest.mark.skipif(TORCH < (2, 12), reason="FSDP2 shards integers from torch 2.12 on"),
]

WORLD, VOCABULARY = 2, 512


class OwnLoss(Language):
    """Its loss never has all logits."""

    def forward(self, ids, labels):
        return linear_cross_entropy(self.hidden(ids), self.head.weight, labels, chunk=32)


class Compressed(OwnLoss):
    """The parts of "lean" by hand."""

    def forward(self, ids, labels):
        with compressed_activations(self):
            return super().forward(ids, labels)


def make(memory=None, kind=Language):
    """Return two blocks, the first one's dense layers frozen, between tied ends that train, as norms do."""
    torch.manual_seed(0)
    model = convert(
        kind(layers=[Block() for _ in range(2)]),
        FourBit("nf4"),
        where=lambda path, _: path.startswith("layers.1.mlp"),
    )
    convert(model, LoRA(4), where=lambda path, _: ".mlp." in path)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name or "embedding" in name:
            parameter.requires_grad_(True)
    return prepare_training(model, memory, chunk=32) if memory else model


def halves():
    return torch.randint(VOCABULARY, (WORLD, 2, 4, 64), generator=torch.Generator().manual_seed(1))


def gradients(model, batch):
    model.zero_grad()
    model(*batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def mean_gradients(model):
    first, second = (gradients(model, batch) for batch in halves())
    return {name: (grad + second[name]) / 2 for name, grad in first.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_gradients(model, rank):
    """Return what a process has after its backward, under the names of the model that is not wrapped."""
    return {name.removeprefix("module."): whole(grad) for name, grad in gradients(model, halves()[rank]).items()}


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


def check_gradients(rank, wrap):
    """A model that is prepared before it is wrapped, or after it, or does by hand what preparing it does."""
    for memory, kind in (("fast", Language), ("lean", Language), (None, Compressed)):
        expected = mean_gradients(make(memory, kind))
        for after in (False, True)[: 2 if memory else 1]:
            model = wrap(make(None if after else memory, kind))
            if after:
                report = training_report(prepare_training(model, memory, chunk=32))
                assert sum("fused" in line for line in report.values()) == 4
            found = {
                name.removeprefix("module."): whole(grad) for name, grad in gradients(model, halves()[rank]).items()
            }
            assert found.keys() == expected.keys()
            unequal = [name for name, grad in found.items() if not torch.equal(grad, expected[name])]
            assert not unequal, (memory, kind, after, unequal)


def check_head_of_its_own(rank):
    """FSDP2 takes the weight of an output layer that it shards by itself away after the call."""
    from torch.distributed.fsdp import fully_shard

    for memory in ("fast", "lean"):
        expected = mean_gradients(make(memory))
        model = make(memory)
        model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
        for part in (*model.layers, model.head, model):
            fully_shard(part)
        found = own_gradients(model, rank)
        assert all((found[n] - one).norm() <= 0.06 * one.norm() for n, one in expected.items() if ".mlp." in n)


def check_whole_batch(rank, wrap):
    """Against float64 and all rows at once: sums of at most 512 numbers, in a dozen layers, forward and backward."""
    exact = gradients(make().double(), halves().transpose(0, 1).flatten(1, 2))
    norm = torch.cat([one.flatten() for one in exact.values()]).norm()
    for memory, bound in (("fast", 12 * 512 * 2.0**-24), ("lean", 0.06)):  # 6% is what the guide promises
        found = {
            n.removeprefix("module."): whole(g) for n, g in gradients(wrap(make(memory)), halves()[rank]).items()
        }
        off = torch.cat([(found[name].double() - one).flatten() for name, one in exact.items()]).norm()
        assert off <= bound * norm, (memory, off / norm)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def check_refusals():
    sharded = shard(make("lean"))
    before = training_report(sharded)
    with pytest.raises(RuntimeError, match="FSDPLanguage was made of the prepared module since"):
        release_training(sharded)
    assert training_report(sharded) == before != {}
    for model in (DistributedDataParallel(make()), sharded):
        with pytest.raises(RuntimeError, match="world_size=2 processes .* leave step_in_backward out"):
            step_in_backward(torch.optim.AdamW(trained(model)))


def step(model, optimizer, batch):
    model(*batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def check_moments(rank, folder):
    """With DDP each process steps as one process would; with FSDP2 a checkpoint goes on to the bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    alone, wrapped = make("lean"), DistributedDataParallel(make("lean"))
    ours, theirs = AdamW8bit(trained(alone), lr=0.01), AdamW8bit(trained(wrapped), lr=0.01)
    for _ in range(2):
        for name, grad in mean_gradients(alone).items():
            alone.get_parameter(name).grad = grad
        ours.step()
        step(wrapped, theirs, halves()[rank])
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), wrapped.parameters(), strict=True))

    first, second, exact = shard(make("lean")), shard(make("lean")), shard(make("lean"))
    optimizers = [kind(trained(m), lr=0.01) for m, kind in ((first, AdamW8bit), (exact, torch.optim.AdamW))]
    for _ in range(3):
        for model, optimizer in zip((first, exact), optimizers, strict=True):
            step(model, optimizer, halves()[rank])
    assert any("exp_avg_codes" in one for one in optimizers[0].state.values())
    state = {"optimizer": get_optimizer_state_dict(first, optimizers[0]), "model": first.state_dict()}
    dcp.save(state, checkpoint_id=f"{folder}/steps")
    again = AdamW8bit(trained(second), lr=1.0)
    held = {"optimizer": get_optimizer_state_dict(second, again), "model": second.state_dict()}
    dcp.load(held, checkpoint_id=f"{folder}/steps")
    second.load_state_dict(held["model"])
    set_optimizer_state_dict(second, again, held["optimizer"])
    for model, optimizer in ((first, optimizers[0]), (second, again)):
        step(model, optimizer, halves()[rank])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))
    step(exact, optimizers[1], halves()[rank])
    losses = [model(*halves()[rank]).item() for model in (first, exact, make())]  # after it FSDP2 keeps whole ones
    assert abs(losses[0] - losses[1]) <= 0.01 * (losses[2] - losses[1])


def check(rank, folder):
    """What each process checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    try:
        for wrap in (DistributedDataParallel, shard):
            check_gradients(rank, wrap)
            check_whole_batch(rank, wrap)
        check_head_of_its_own(rank)
        check_refusals()
        check_moments(rank, folder)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_train_as_one_does(tmp_path):
    torch.multiprocessing.spawn(check, (str(tmp_path),), nprocs=WORLD)

"""Models with stored parameters in two processes: FSDP2, DistributedDataParallel, and distributed checkpoints."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowmem import FourBit, Half, LoRA, convert
from lowmem.kernels.torch_versions import TORCH

pytestmark = [
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
    pytest.mark.skipif(TORCH < (2, 12), reason="FSDP2 shards integers from torch 2.12 on"),
]

WORLD = 2


class Net(nn.Module):
    """Rows of odd counts, so that shards differ in size; stored in 4 and in 16 bits; 4-bit layers have adapters."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(51, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 24)) for _ in range(2))
        self.attention, self.head = nn.MultiheadAttention(24, 2, batch_first=True), nn.Linear(24, 7)

    def forward(self, indices):
        x = self.tokens(indices)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def make(seed=0):
    torch.manual_seed(seed)
    model = convert(Net(), Half(torch.bfloat16), where=lambda path, _: path == "head")
    model = convert(model, FourBit("nf4", 16), skip="head")
    model = convert(model, LoRA(2), where=lambda path, _: path.startswith("blocks"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    return model


def batches():
    return torch.randint(51, (WORLD, 3, 5), generator=torch.Generator().manual_seed(0))


def loss(model, indices):
    return model(indices).square().mean()


def expected():
    """Return the outputs, the gradients and the state of the model in one process."""
    model = make()
    outs = [model(one).detach() for one in batches()]
    sum(loss(model, one) for one in batches()).div(WORLD).backward()
    return outs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model.state_dict()


def assert_trains_as_expected(model, rank, full=lambda tensor: tensor, prefix=""):
    outs, grads, _ = expected()
    out = model(batches()[rank])
    torch.testing.assert_close(out, outs[rank])
    out.square().mean().backward()
    found = {name.removeprefix(prefix): full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, grads[name])


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def check(rank, folder):
    """What each process checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    try:
        assert_trains_as_expected(nn.parallel.DistributedDataParallel(make()), rank, prefix="module.")
        check_sharded(rank, folder)
    finally:
        dist.destroy_process_group()


def check_sharded(rank, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.tensor import DTensor

    model = shard(make())
    parts = [p for name, p in model.named_parameters() if name.endswith(("packed", "scales", "rounded"))]
    assert parts
    assert all(isinstance(p, DTensor) for p in parts)
    assert_trains_as_expected(model, rank, lambda grad: grad.full_tensor())

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    state = expected()[2]
    if rank == 0:
        assert whole.keys() == state.keys()
        assert all(torch.equal(whole[name], state[name]) for name in state)

    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/checkpoint")
    other = shard(make(seed=1))
    held = get_model_state_dict(other)
    dcp.load(held, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(other, held)
    torch.testing.assert_close(other(batches()[rank]), expected()[0][rank])

    dense = shard(Net())
    before = {name: type(module) for name, module in dense.named_modules()}
    with pytest.raises(ValueError, match="is sharded .*: call convert before fully_shard"):
        convert(dense, FourBit())
    assert {name: type(module) for name, module in dense.named_modules()} == before


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_two_processes_compute_save_and_load_as_one_does(tmp_path):
    import torch.distributed.checkpoint as dcp

    torch.multiprocessing.spawn(check, (str(tmp_path),), nprocs=WORLD)
    model = make(seed=1)  # another world size: this process alone
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    model.load_state_dict(state)
    torch.testing.assert_close(model(batches()[0]), expected()[0][0])
    assert {name: one.dtype for name, one in state.items()} == {
        name: one.dtype for name, one in expected()[2].items()
    }

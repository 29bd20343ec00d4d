"""Two and four processes compute what one does, with their parts of the weights."""

import gc
import importlib
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowmem
from lowmem.distributed.shard import _without_fsdp_classes_and_hooks, shardable_blocks
from tests import refusing
from tests.distributed.ranks import Language, examples, needs_ranks, run_ranks, train
from tests.distributed.test_memory_per_rank import ROOM, large, measured_bytes, needed

pytestmark = needs_ranks

TECHNIQUES = {
    "qlora": (lowmem.FourBit("nf4", 16), lowmem.LoRA(4)),
    "q8_0": (lowmem.EightBit(16, format="q8_0"), lowmem.LoRA(4)),
    "half": (lowmem.Half(torch.float16), lowmem.LoRA(4)),
    "double, int4": (lowmem.FourBit(("nf4", "int4"), 16, scales="double"), lowmem.LoRA(4)),
    "dense": (),
}


def make(how="qlora", memory=None):
    torch.manual_seed(0)
    model = Language()
    if TECHNIQUES[how]:
        lowmem.convert(model, *TECHNIQUES[how])
    return model if memory is None else lowmem.prepare_training(model, memory)


def optimizer_of(model):
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5, momentum=0.9)


def curve(how, memory):
    model = make(how, memory)
    return train(model, optimizer_of(model), epochs=3)


def held_bytes(model):
    """Return the bytes of the distinct storages that this process has of the parameters."""
    own = [getattr(one, "_local_tensor", one) for one in model.parameters()]
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in own}.values())


def state_of(model):
    return {name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}


def check_curve(rank, world, how, memory, order):
    model = make(how, memory if order == "before" else None)
    lowmem.shard(model)
    if memory and order == "after":
        lowmem.prepare_training(model, memory)
    return train(model, optimizer_of(model), 3, rank, world)


def check_bytes(how):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = make(how)
    model(examples()[0])  # layers keep what they have read
    before = {name: one.clone() for name, one in state_of(model).items()}
    bytes_before = held_bytes(model)
    storages = [weakref.ref(one.untyped_storage()) for one in model.parameters()]
    policy = None if how == "half" else MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert lowmem.shard(model, mp_policy=policy) is model
    gc.collect()
    assert [one for one in storages if one() is not None] == []  # nothing keeps the whole weights
    assert held_bytes(model) <= 0.55 * bytes_before
    model(examples()[0]).logsumexp(-1).sum().backward()
    assert held_bytes(model) <= 0.55 * bytes_before
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    whole = lowmem.gather(model)
    if whole is not None:
        assert all(torch.equal(one, before[name]) for name, one in state_of(whole).items())
        assert type(whole) is Language
        assert whole.head.weight is whole.embedding.weight
        torch.testing.assert_close(whole(examples()[0]), make(how)(examples()[0]))
    assert (whole is None) == (dist.get_rank() != 0)


def check_two(rank, world, folder, expected):
    curves = {}
    for how in ("qlora", "q8_0", "half"):
        check_bytes(how)
    for how, memory, order in RUNS:
        curves[how, memory] = check_curve(rank, world, how, memory, order)
    check_files(folder)
    check_refusals(rank, world)
    check_plans()
    return curves, shared_bytes(expected)


def shared_bytes(expected):
    return {name: measured_bytes(lowmem.shard(large(name)), one) for name, one in expected.items()}


RUNS = [("qlora", None, ""), ("double, int4", "fast", "before"), ("half", "lean", "after"), ("dense", None, "")]


def check_files(folder):
    model = lowmem.shard(make())
    for save in (lowmem.save, lowmem.save_adapter):
        with pytest.raises(
            ValueError, match=rf"is sharded .*, and {save.__name__} needs all of it: call lowmem.gather"
        ):
            save(model, f"{folder}/none")
    train(model, optimizer_of(model), 1, dist.get_rank(), 2)
    whole = lowmem.gather(model)
    if whole is not None:
        lowmem.save(whole, f"{folder}/model.safetensors")
        lowmem.save_adapter(whole, f"{folder}/adapter.safetensors")


class Tied(nn.Module):
    """Its second layer's weight is the first one's; the third has its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.layers[1].weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def refused(model, error, text, mesh=None, **options):
    with refusing.refused(model, error, text):
        lowmem.shard(model, mesh, **options)


def check_refusals(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

    refused(nn.parallel.DistributedDataParallel(make()), ValueError, "DistributedDataParallel, which keeps the whole")
    first = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    refused(nn.Sequential(first), ValueError, r"0 is a FullyShardedDataParallel \(FSDP1\), which joins")
    refused(make(), TypeError, "mesh='cpu' must be a DeviceMesh", "cpu")
    text = rf"mesh of shape \(1, 1, {world}\) without names must have"
    refused(make(), ValueError, text, init_device_mesh("cpu", (1, 1, world)))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    refused(
        make("half"), ValueError, "is stored in torch.float16, and param_dtype=torch.bfloat16 would", mp_policy=half
    )
    model = make()
    model.layers[1].down.lora_a.data = model.layers[1].down.lora_a.data.double()
    refused(model, ValueError, r"layers.1 trains parameters in torch.float32, torch.float64, and")
    scalar = Tied()
    scalar.scale.requires_grad_()
    refused(scalar, ValueError, "scale is a scalar that trains")
    sharded = lowmem.shard(make(), init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard")))
    refused(sharded, ValueError, r"is sharded already \(a DTensor\): call shard once")
    with pytest.raises(
        RuntimeError, match="has a part of a stored weight .*call the sharded block or model as a module"
    ):
        sharded.layers[0].qkv.weight.dequantize()
    with pytest.raises(ValueError, match="Tied is not sharded: each process has all of it"):
        lowmem.gather(Tied())

    torch.manual_seed(0)
    tied, x = Tied(), torch.ones(2, 8)
    assert shardable_blocks(tied) == list(tied.layers[2:])
    expected = tied(x).detach()
    tied(x).sum().backward()
    gradient = tied.layers[0].weight.grad
    tied.zero_grad()
    lowmem.shard(tied)
    out = tied(x)
    torch.testing.assert_close(out.detach(), expected)
    out.sum().backward()
    torch.testing.assert_close(tied.layers[1].weight.grad.full_tensor(), gradient)


def check_earlier_versions(monkeypatch):
    """Before torch 2.12 FSDP2 shards no integers, which packed codes are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    monkeypatch.setattr(importlib.import_module("lowmem.distributed.shard"), "TORCH", (2, 11))
    refused(make(), RuntimeError, r"_packed is torch.uint8, and FSDP2 shards integers from torch 2.12 on")
    counted = nn.Linear(8, 8)
    counted.steps = nn.Parameter(torch.tensor(3), requires_grad=False)  # a scalar, which FSDP2 does not cast
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    assert lowmem.shard(counted, mp_policy=half)(torch.ones(1, 8)).isfinite().all()
    assert counted.steps.item() == 3


def check_plans():
    """Dense layers of a model go by plans of tensor parallelism; stored ones are refused, and stay as they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, x = init_device_mesh("cpu", (2,)), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    refusal = r"cannot be cut by a plan of tensor parallelism .*lowmem.shard"
    for technique in (lowmem.FourBit("nf4", 16), lowmem.Half(torch.bfloat16)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 32))
        lowmem.convert(model, technique)
        expected = model(x)
        for style in (ColwiseParallel, RowwiseParallel):
            with pytest.raises(RuntimeError, match=refusal):
                parallelize_module(model, mesh, {"1": style()})
        assert torch.equal(model(x), expected)
        model[1] = nn.Linear(16, 32)
        expected = model(x)
        parallelize_module(model, mesh, {"1": ColwiseParallel(output_layouts=_replicated())})
        torch.testing.assert_close(model(x), expected)


def _replicated():
    from torch.distributed.tensor import Replicate

    return Replicate()


@pytest.mark.filterwarnings("ignore:FSDP is switching to use")  # of FSDP1, with one process
def test_a_group_of_one_process_is_refused_what_larger_ones_are(tmp_path, monkeypatch):
    """Here, where coverage counts it."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        check_refusals(0, 1)
        check_earlier_versions(monkeypatch)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_train_as_one_does_with_half_of_the_weights(tmp_path):
    expected = needed(2)
    found = run_ranks(check_two, 2, tmp_path, str(tmp_path), expected)
    (curves, used), (others, _) = found
    assert curves == others
    assert used == pytest.approx(expected, rel=ROOM)
    for (how, memory), losses in curves.items():
        assert losses == pytest.approx(curve(how, memory), abs=1e-5, rel=0), (how, memory)
        assert losses[-1] < losses[0] - 0.1
    ids = examples()[0]
    whole = lowmem.load(tmp_path / "model.safetensors", Language)
    base = lowmem.convert(make("dense"), lowmem.FourBit("nf4", 16))
    adapted = lowmem.load_adapter(base, tmp_path / "adapter.safetensors")
    assert torch.equal(whole(ids), adapted(ids))
    assert not torch.equal(whole(ids), make()(ids))


def check_four(rank, world, expected):
    model = lowmem.shard(make())
    return train(model, optimizer_of(model), 3, rank, world), shared_bytes(expected)


@pytest.mark.distributed
def test_four_processes_of_which_one_has_no_example_of_a_batch(tmp_path):
    expected = needed(4)
    found = run_ranks(check_four, 4, tmp_path, expected)
    assert all(losses == pytest.approx(curve("qlora", None), abs=1e-5, rel=0) for losses, _ in found)
    assert all(used == pytest.approx(expected, rel=ROOM) for _, used in found)


@pytest.mark.parametrize("call", [lowmem.shard, lowmem.gather])
def test_a_process_alone_is_told_how_to_start(call):
    with pytest.raises(
        RuntimeError, match=f"{call.__name__}: this process knows of no others: start the program with"
    ):
        call(make())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, found str"):
        call("model")


def test_deepspeed_is_refused_by_name():
    model = make()
    model.norm.weight.ds_id = 7  # as ZeRO-3 marks what it has partitioned
    for call in (lowmem.shard, lambda one: lowmem.convert(one, lowmem.LoRA())):
        with pytest.raises(
            ValueError, match="norm.weight is partitioned by DeepSpeed's ZeRO-3, which .* cannot take"
        ):
            call(model)
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = make()
    with pytest.raises(ValueError, match="the model itself is a DeepSpeedEngine, whose ZeRO-3"):
        lowmem.shard(engine)


def test_blocks_are_layers_of_one_type_in_one_list():
    model = Language()
    assert shardable_blocks(model) == list(model.layers)
    net = lowmem.BigNet()
    assert shardable_blocks(net) == list(net)[::2]
    experts = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))}) for _ in range(2)
    )
    assert shardable_blocks(experts) == [
        one for layer in experts for one in layer["experts"]
    ]  # a dictionary is never called
    assert shardable_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Embedding(2, 2))) == []


def test_the_class_before_fsdp_is_found_behind_all_classes_of_the_engine():
    """FSDP2 puts one class before it, and ``replicate`` two."""
    from torch.distributed.fsdp import FSDPModule

    for engine in (FSDPModule, type("ReplicateModule", (FSDPModule,), {})):
        module = nn.Linear(2, 2)
        module.__class__ = made = type("FSDPLinear", (engine, nn.Linear), {})
        with _without_fsdp_classes_and_hooks(nn.Sequential(module)):
            assert type(module) is nn.Linear
        assert type(module) is made

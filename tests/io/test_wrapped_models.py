"""Files of a model that DistributedDataParallel or DataParallel wraps are those of the model."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowmem
from lowmem import FourBit, LoRA, load_adapter, save_adapter
from lowmem.io.checkpoint import unwrap_data_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {"DDP": nn.parallel.DistributedDataParallel, "DP": nn.DataParallel}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def dense():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def make(*names):
    torch.manual_seed(0)
    model = lowmem.convert(dense(), FourBit(), where=lambda path, _: path == "0")
    for name in names:
        lowmem.add_adapter(model, name, LoRA(2))
        for adapter in lowmem.adapter_layers(model, name).values():
            nn.init.normal_(adapter.lora_b)
    return model


X = torch.ones(2, 16)


@every_wrapper
def test_files_of_a_wrapped_model_are_those_of_the_model(wrap, tmp_path):
    model = make("mine")
    wrapped = wrap(model)
    assert unwrap_data_parallel(wrapped) is unwrap_data_parallel(model) is model
    for one, folder in ((model, tmp_path / "plain"), (wrapped, tmp_path / "wrapped")):
        folder.mkdir()
        lowmem.save(one, folder / "model")
        save_adapter(one, folder / "only")
        save_adapter(one, folder / "named", "mine")
    for name in ("model", "only", "named"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    assert torch.equal(lowmem.load(tmp_path / "wrapped" / "model", dense)(X), model(X))


@every_wrapper
def test_an_adapter_loads_into_a_wrapped_model(wrap, tmp_path):
    model = make("mine")
    save_adapter(model, tmp_path / "a")
    expected = model(X)
    wrapped = wrap(make("mine"))
    nn.init.zeros_(unwrap_data_parallel(wrapped)[2].lora_b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_adapter(wrapped, tmp_path / "a") is wrapped
    assert torch.equal(wrapped(X), expected)
    with pytest.raises(lowmem.FileError, match="trained on another base"):
        load_adapter(wrap(dense()), tmp_path / "a")


def test_a_new_adapter_in_ddp_loads_with_a_warning_that_its_gradients_stay_apart(tmp_path):
    """DistributedDataParallel knows the parameters that were there when it was made."""
    model = make("mine")
    save_adapter(model, tmp_path / "a")
    wrapped = nn.parallel.DistributedDataParallel(make())
    with pytest.warns(UserWarning, match="does not synchronize its gradients: load the adapter, then wrap") as caught:
        assert load_adapter(wrapped, tmp_path / "a") is wrapped
    assert caught[0].filename == __file__
    assert torch.equal(wrapped.module(X), model(X))


def test_a_wrapped_layer_itself_is_replaced_inside_the_wrapper(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(16, 4)
    wrapped = nn.DataParallel(nn.Linear(16, 4))
    wrapped.module.load_state_dict(layer.state_dict())
    adapted = lowmem.add_adapter(layer, "mine", LoRA(2))
    nn.init.normal_(adapted.lora_b)
    save_adapter(adapted, tmp_path / "a")
    assert load_adapter(wrapped, tmp_path / "a") is wrapped
    assert torch.equal(wrapped(X), adapted(X))

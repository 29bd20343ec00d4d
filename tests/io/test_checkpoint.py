"""What was saved is what is loaded, bit for bit, without the dense weights; and nothing else is ever loaded."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowmem
from lowmem import FourBit, Half, LoRA, convert, load, measure, save, save_adapter
from lowmem.errors import FileError
from lowmem.io.lowmem_file import verify_and_map_file, write_tensors_returning_digest
from lowmem.nn.adapter import Adapter
from tests.models import INDICES, TECHNIQUES, Small, out_of_file, small
from tests.profiled import ONE_THREAD

every_technique = pytest.mark.parametrize("name", TECHNIQUES)


@every_technique
def test_a_model_comes_back_bit_for_bit(name, tmp_path):
    model = small(name)
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", Small).eval()
    assert torch.equal(out_of_file(loaded)(INDICES), model(INDICES))
    assert [(key, p.requires_grad, p.dtype) for key, p in loaded.named_parameters(remove_duplicate=False)] == [
        (key, p.requires_grad, p.dtype) for key, p in model.named_parameters(remove_duplicate=False)
    ]
    assert repr(loaded) == repr(model)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert measure.theoretical_bytes(loaded) == measure.theoretical_bytes(model)


@every_technique
def test_identical_models_give_identical_bytes_and_saving_over_the_mapped_file_works(name, tmp_path):
    save(small(name), tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    loaded = load(tmp_path / "a", Small).eval()
    before = loaded(INDICES)
    save(loaded, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content
    assert torch.equal(loaded(INDICES), before)
    save(small(name, seed=1), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() != content
    assert torch.equal(loaded(INDICES), before)  # what it sees is the file that it was loaded from


def test_adapters_and_which_are_active_come_back(tmp_path):
    model = small("qlora")
    lowmem.add_adapter(model, "other", LoRA(2), skip=["head", "again"])
    lowmem.deactivate(model, "default")
    save(model, tmp_path / "m")
    loaded = load(tmp_path / "m", Small).eval()
    assert lowmem.adapter_names(loaded) == ["default", "other"]
    assert lowmem.active_adapters(loaded) == ["other"]
    assert torch.equal(out_of_file(loaded)(INDICES), model.eval()(INDICES))


def test_the_root_itself_can_be_the_layer(tmp_path):
    for techniques in ((FourBit(),), (Half(), LoRA(2))):
        model = convert(nn.Linear(16, 8), *techniques)
        save(model, tmp_path / "m")
        loaded = load(tmp_path / "m", lambda: nn.Linear(16, 8))
        assert type(loaded) is type(model)
        assert torch.equal(out_of_file(loaded)(torch.ones(2, 16)), model(torch.ones(2, 16)))


def test_loading_leaves_the_caller_s_random_state_and_makes_no_dense_weight(tmp_path):
    save(small("nf4"), tmp_path / "m")
    made = []

    def factory():
        made.append(Small())
        assert all(p.is_meta for p in made[0].parameters())
        assert not any(b.is_meta for b in made[0].buffers())
        return made[0]

    state = torch.random.get_rng_state()
    load(tmp_path / "m", factory)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not nn.Linear(2, 2).weight.is_meta  # outside, parameters are what they were


class Other(Small):
    """Has another module at a path, or none there."""

    def __init__(self, path, make):
        super().__init__()
        parent, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent), name, make()) if make else delattr(self, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("conv", lambda: nn.Conv1d(24, 26, 3, padding=1, groups=2)), "conv.bias is|conv.weight_packed is"),
        (("layers.0", lambda: nn.Linear(24, 20)), r"layers.0|again"),
        (("layers.0", lambda: nn.LayerNorm(24)), "layers.0 is stored by FourBit.*LayerNorm there: vectors"),
        (("head", lambda: nn.Linear(24, 50)), "it lacks head"),
        (("layers.2", lambda: nn.Linear(24, 24)), "it lacks layers.2.bias"),
        (("conv", None), "has a layer 'conv' that the model has not"),
        (("layers.1", lambda: nn.LayerNorm(24, dtype=torch.float64)), "layers.1.*torch.float32.*torch.float64"),
    ],
)
def test_another_architecture_is_named(change, message, tmp_path):
    save(small("nf4"), tmp_path / "m")
    with pytest.raises(FileError, match=message) as caught:
        load(tmp_path / "m", lambda: Other(*change))
    assert str(tmp_path / "m") in str(caught.value)


def test_extra_tensors_and_tensors_of_another_format_are_named(tmp_path):
    save(small("nf4"), tmp_path / "m")
    file = verify_and_map_file(tmp_path / "m")
    write_tensors_returning_digest(tmp_path / "more", {**file.tensors, "extra": torch.ones(2)}, file.metadata)
    with pytest.raises(FileError, match="the model lacks extra"):
        load(tmp_path / "more", Small)
    layers = {path: {**record, "block_size": 8} for path, record in file.metadata["layers"].items()}
    write_tensors_returning_digest(tmp_path / "other", file.tensors, {**file.metadata, "layers": layers})
    with pytest.raises(FileError, match=r"weight_scales is torch.uint8 .* in it"):
        load(tmp_path / "other", Small)


def rewritten(path, change):
    """Replace what a file says of itself by what ``change``, which works in place, makes of it."""
    file = verify_and_map_file(path)
    metadata = copy.deepcopy(file.metadata)
    change(metadata)
    write_tensors_returning_digest(path, {name: tensor.clone() for name, tensor in file.tensors.items()}, metadata)


def lora(metadata):
    return metadata["adapters"]["layers.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: lora(m)[0].update(rank=10**18),
            r"layers.0.adapters.default.weight.lora_a is .*\(3, 24\).* at rank 10{18}$",
        ),
        (lambda m: lora(m)[0].update(rank=-1), "adapters of layers.0 is not lowmem's: rank=-1 must be a positive"),
        (
            lambda m: lora(m).append({**lora(m)[0], "name": "\x1b[2J"}),
            r"lacks layers.0.adapters.\\x1b\[2J.weight.lora_a$",
        ),
        (lambda m: lora(m)[0].update(name="keys"), "lacks layers.0.adapters.keys.weight.lora_a$"),
        (
            lambda m: lora(m).extend({**lora(m)[0], "name": f"a{n}"} for n in range(30_000)),
            "it lacks layers.0.adapters.a0.weight.lora_a$",
        ),
        (lambda m: m["adapters"].update({"again": []}), "adapters of again is not lowmem's: they are "),
        (lambda m: m["adapters"].update({"again": [{**lora(m)[0], "alpha": 1}]}), "adapts again and layers.0 diff"),
        (lambda m: m.update(adapters=[]), "record of the adapters is not lowmem's: it is "),
        (lambda m: m["layers"]["conv"].update(block_size=None), "record of conv is not lowmem's: block_size=None"),
        (lambda m: m["layers"].update({"\x1b]0;x\x07": m["layers"]["conv"]}), r"has a layer '\\x1b\]0;x\\x07' that"),
        (lambda m: m["layers"].update({"x\n" * 10**5: m["layers"]["conv"]}), r"has a layer 'x\\nx\\nx.* that"),
        (
            lambda m: m["layers"].update(again={**m["layers"]["layers.0"], "block_size": 8}),
            "stores again and layers.0 diff",
        ),
        (lambda m: m["layers"].update(head={**m["layers"]["embedding"], "block_size": 8}), "share a weight here"),
        (lambda m: m["layers"].update(head={"technique": "Half", "dtype": "float16"}), "share a weight here"),
        (lambda m: m.update(more=1), "metadata has 'more', which is unknown; upgrade lowmem"),
        (lambda m: m.clear(), "something else"),
        (lambda m: m.update(layers=[]), "something else"),
        (lambda m: m.update(kind="adapter"), "load it with load_adapter"),
        (lambda m: m["adapters"].update(none=[]), "adapters for none: the model has no layer"),
    ],
)
def test_a_record_that_says_something_else_is_refused_at_once(change, message, tmp_path):
    save(small("qlora"), tmp_path / "m")
    rewritten(tmp_path / "m", change)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adapter, "__init__", lambda *_: made.append(1))
        with pytest.raises(FileError, match=message) as caught:
            load(tmp_path / "m", Small)
    assert not made  # before anything is allocated
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_layer_that_is_recorded_twice_alike_is_one(tmp_path):
    """As it is where two layers of the model that was saved are one in the model that is made."""
    model = small("qlora")
    save(model, tmp_path / "m")
    file = verify_and_map_file(tmp_path / "m")
    tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}
    for name in [name for name in tensors if name.startswith("layers.0.")]:
        tensors[name.replace("layers.0", "again")] = tensors[name].clone()
    metadata = copy.deepcopy(file.metadata)
    for part in ("layers", "adapters"):
        metadata[part]["again"] = metadata[part]["layers.0"]
    write_tensors_returning_digest(tmp_path / "m", tensors, metadata)
    assert torch.equal(out_of_file(load(tmp_path / "m", Small).eval())(INDICES), model(INDICES))
    tensors["again.adapters.default.weight.lora_a"] += 1
    write_tensors_returning_digest(tmp_path / "m", tensors, metadata)
    with pytest.raises(FileError, match=r"lora_a and .*lora_a differ in it, and are one tensor"):
        load(tmp_path / "m", Small)


def test_bad_arguments_are_named(tmp_path):
    for factory, told in (
        (3, "factory=3 must be a callable without arguments"),
        (lambda size: None, "factory=.* must be a callable without arguments"),
        (small("dense"), "factory is a .*, a model with weights: pass what makes it"),
    ):
        with pytest.raises(TypeError, match=told):
            load(tmp_path / "none", factory)
    for call in (lambda: load(3, list), lambda: save(small("dense"), 3), lambda: save_adapter(small("lora"), 3)):
        with pytest.raises(TypeError, match="^path=3 must be the path of a file"):
            call()
    save(small("dense"), tmp_path / "m")
    with pytest.raises(TypeError, match="factory returned a list"):
        load(tmp_path / "m", list)
    with pytest.raises(TypeError, match="model must be"):
        save([], tmp_path / "m")
    with pytest.raises(ValueError, match="no dense tensor with values"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "m")
    assert load(tmp_path / "m", Small)  # what was there is whole

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="is a dict, no tensor"):
        save(Extra(2, 2), tmp_path / "m")


PEAK = """
import sys, torch
from torch import nn
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
import lowmem
factory = lambda: nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(24)])
before = peak()
model = lowmem.load(sys.argv[1], factory)
with torch.no_grad():
    model(torch.ones(1, 2048))
print(peak() - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of resident memory is read from /proc")
def test_loading_takes_the_4_bit_size_and_at_most_64_mib(tmp_path):
    """Of 384 MiB in float32, which would show."""
    model = nn.Sequential(*[convert(nn.Linear(2048, 2048), FourBit()) for _ in range(24)])
    save(model, tmp_path / "m")
    size = os.path.getsize(tmp_path / "m")
    shown = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "m")], capture_output=True, text=True, check=True, env=ONE_THREAD
    )
    assert size < int(shown.stdout) < size + 64 * 2**20 or int(shown.stdout) <= size


def test_stored_tensors_that_do_not_fit_their_layer_are_not_saved(tmp_path):
    model = convert(nn.Sequential(nn.Linear(32, 8)), FourBit())
    model[0].packed.data = model[0].packed.data[:-1].clone()
    with pytest.raises(RuntimeError, match=r"packed.shape=\(7, 16\).* scales.shape=\(8, 3\).* do not hold"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()

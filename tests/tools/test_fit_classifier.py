"""`lowmem fit` trains every variant, on the built-in tasks and on a user's arrays, and saves whole files."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lowmem
from lowmem import VARIANTS, build, measure
from lowmem.__main__ import main
from lowmem.tools import fit_classifier as tool
from lowmem.tools.fit_classifier_data import TrainTestSplit, load_train_test_split
from tests.selection import FULL

MODELS = """
import sys
import torch
from torch import nn

class Linear(nn.Linear):
    def __init__(self, **buffers):
        super().__init__(1024, 4)
        for name, value in buffers.items():
            self.register_buffer(name, value)

class Parameter(Linear):
    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return super().forward(x) + self.zero.sqrt()  # whose gradient at 0 is infinite

class Buffer(Linear):
    def __init__(self):
        super().__init__(seen=torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.seen.add_(torch.inf)
        return super().forward(x)

Mask = lambda: Linear(mask=torch.tensor([0, -torch.inf]))
Meta = lambda: Linear(unset=torch.empty(3, device="meta"))

class Pair(Linear):
    def forward(self, x):
        return x, x

class Extra(Linear):
    def get_extra_state(self):
        return "text"
    def set_extra_state(self, state):
        pass

class Of(nn.Module):
    def forward(self, x):
        return self.change(nn.functional.one_hot(x.argmax(1), 1024).float())

class Scalar(Of):
    change = lambda self, y: y.sum()

class Vector(Of):
    change = lambda self, y: y.sum(1)

class Mean(Of):
    change = lambda self, y: y.mean(0, keepdim=True)

class Nothing(Of):
    change = lambda self, y: y[:, :0]

class Complex(Of):
    change = lambda self, y: y * 1j

class BadState(Linear):
    def state_dict(self, *args, **options):
        raise SystemExit(0)

class Twice(Linear):
    calls, error = 0, LookupError("no more")
    def state_dict(self, *args, **options):
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return super().state_dict(*args, **options)

class ExitsTwice(Twice):
    error = SystemExit(0)

class Raises(Linear):
    error = LookupError("not while\\ntraining")
    def forward(self, x):
        if self.training:
            raise self.error
        return super().forward(x)

class Exits(Raises):
    error = SystemExit()

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
    def forward(self, x):
        return self.two(self.one(x))
"""


@pytest.fixture(autouse=True)
def fit_models(user_module):
    user_module("fit_models", MODELS)


@pytest.fixture
def npz(tmp_path):
    """A task of 40 examples that anything learns: the class is in every feature."""
    y = np.arange(40) % 2
    np.savez(tmp_path / "task.npz", x=np.random.default_rng(0).normal(size=(40, 1024)) * 0.1 + y[:, None], y=y)
    return str(tmp_path / "task.npz")


@pytest.mark.thorough
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_a_user_s_task(name, npz, results):
    found = results("fit", name, "--data", npz, "--epochs", "12", "--batch-size", "16")
    keys = ["variant", "epochs", "losses", "train_accuracy", "test_accuracy", "peak_bytes", "seconds_per_step"]
    assert list(found) == keys
    assert (found["variant"], found["epochs"], len(found["losses"])) == (name, 12, 12)
    assert found["losses"][-1] < found["losses"][0]
    assert found["test_accuracy"] == 1.0
    assert found["seconds_per_step"] > 0
    trained = measure.counts(build(name)).trainable * 4
    assert trained * 3 <= found["peak_bytes"] <= trained * 3.2 + 4 * 2**20  # gradients and AdamW's two moments


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qlora", "lora"] if FULL else ["qlora"])
def test_adapters_reach_95_percent_on_digits(name, results):
    found = results("fit", name, "--data", "digits", "--epochs", "4")
    assert found["test_accuracy"] >= 0.95


def test_synthetic_is_the_default_and_can_be_learnt(capsys):
    assert main(["fit", "lora", "--epochs", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert all("loss" in line and "train accuracy" in line and "test accuracy" in line for line in lines[:3])
    assert lines[3].startswith("peak memory of a step: ")
    assert float(lines[2].split()[-1].rstrip("%")) > 50


def test_the_seed_decides_everything_but_the_time(npz, results):
    runs = [results("fit", "lora", "--data", npz, "--epochs", "1", "--seed", seed) for seed in ("1", "1", "2")]
    for run in runs:
        del run["seconds_per_step"]
    assert runs[0] == runs[1]
    assert runs[0]["losses"] != runs[2]["losses"]


def test_only_the_adapters_and_the_head_change():
    torch.manual_seed(0)
    model = tool.Classifier(build("qlora"), 1024, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = load_train_test_split("synthetic", 0)
    tool.train_classifier(
        model, data, variant="qlora", epochs=1, batch_size=400, lr=1e-3, seed=0, print_epoch_line=lambda line: None
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if not name.startswith("head")} == {name for name in before if "lora_" in name}


def test_the_loss_of_an_epoch_is_that_of_all_its_examples():
    """At a rate of 0: five examples in batches of four, whose last holds one."""
    torch.manual_seed(0)
    model = tool.Classifier(torch.nn.Identity(), 4, 2)
    x, y = torch.randn(9, 4), torch.arange(9) % 2
    with torch.no_grad():
        logits, test_logits = model(x[:5]), model(x[5:])
    data = TrainTestSplit(x[:5], y[:5], x[5:], 1 - test_logits.argmax(1), 2)
    found = tool.train_classifier(
        model, data, variant="", epochs=1, batch_size=4, lr=0.0, seed=0, print_epoch_line=lambda line: None
    )
    assert found.losses == pytest.approx([float(torch.nn.functional.cross_entropy(logits, y[:5]))])
    assert found.train_accuracy == pytest.approx(float((logits.argmax(1) == y[:5]).float().mean()))
    assert found.test_accuracy == 0


def test_accuracy_is_measured_in_eval_mode_without_gradients():
    seen = []

    class Model(torch.nn.Identity):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    assert tool.accuracy(Model().train(), torch.eye(3), torch.tensor([0, 1, 0]), 2) == pytest.approx(2 / 3)
    assert seen == [(False, False)] * 2


def test_a_model_in_place_of_its_data_is_refused(npz, refused):
    before = Path(npz).read_bytes()
    told = refused("fit", "lora", "--data", npz, "--epochs", "1", "--save", npz)
    assert "is --data, which would be lost: name another place" in told
    assert Path(npz).read_bytes() == before


def test_a_saved_model_loads_with_its_factory_and_has_its_head_beside_it(tmp_path, npz, results):
    path = tmp_path / "saved.safetensors"
    argv = ["qlora", "--data", npz, "--epochs", "2", "--rank", "4", "--save", str(path)]
    accuracy = results("fit", *argv)["test_accuracy"]
    model = tool.Classifier(lowmem.load(path, lowmem.BigNet), 1024, 2)
    model.head.load_state_dict(load_file(tmp_path / "saved.head.safetensors"))
    data = load_train_test_split(npz, 0)
    assert tool.accuracy(model, data.test_x, data.test_y, 16) == accuracy
    with safe_open(tmp_path / "saved.head.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lowmem"])["model"] == "qlora"
    first = path.read_bytes()
    results("fit", *argv)
    assert path.read_bytes() == first


def test_a_user_s_factory_is_trained_with_the_shape_of_the_data(results):
    x = np.random.default_rng(0).normal(size=(30, 2, 6))
    np.savez("pictures.npz", x=x, y=(x[:, 0, 0] > 0).astype(int))
    argv = "fit_models:Tied", "--data", "pictures.npz", "--epochs", "2", "--save", "out.safetensors"
    assert len(results("fit", *argv)["losses"]) == 2
    model = lowmem.load("out.safetensors", importlib.import_module("fit_models").Tied)
    assert model.one.weight is model.two.weight


def test_a_loss_that_is_no_longer_finite_stops_and_saves_nothing(tmp_path, npz, refused):
    path = tmp_path / "saved.safetensors"
    argv = "fit", "bignet", "--data", npz, "--lr", "1e30", "--save", path
    assert "lower --lr=1e+30" in refused(*argv, printed="epoch")
    assert not path.exists()


@pytest.mark.parametrize(("name", "tensor"), [("Parameter", "body.zero"), ("Buffer", "body.seen")])
def test_weights_that_the_last_step_makes_infinite_are_not_saved(name, tensor, tmp_path, npz, refused):
    """Every loss is finite: the one step of the one epoch is what does it."""
    path = tmp_path / "saved.safetensors"
    path.write_bytes(b"before")
    argv = f"fit_models:{name}", "--data", npz, "--epochs", "1", "--json", "--save", path
    told = f"lowmem fit: '{tensor}' is no longer finite in epoch 1: lower --lr=0.001\n"
    assert refused("fit", *argv) == told
    assert path.read_bytes() == b"before"


def test_a_mask_of_infinities_is_no_divergence(npz, results):
    results("fit", "fit_models:Mask", "--data", npz, "--epochs", "1", "--save", "out")
    assert load_file("out")["mask"].tolist() == [0, -float("inf")]


@pytest.mark.parametrize("path", ["missing/file.safetensors", "."])
def test_an_unwritable_output_is_named_before_the_training(path, npz, refused, monkeypatch):
    monkeypatch.setattr(tool, "train_classifier", lambda *args, **options: pytest.fail("it trained"))
    assert f"cannot write '{path}'" in refused("fit", "lora", "--data", npz, "--save", path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pair", "returns a tuple; fit takes models that return"),
        ("Extra", "has a state that cannot be saved; leave out --save: ValueError: state"),
        ("Scalar", "returns torch.float32 of shape () for 2 examples; fit takes models that return real numbers"),
        ("Vector", "returns torch.float32 of shape (2,) for 2 examples"),
        ("Mean", "returns torch.float32 of shape (1, 1024) for 2 examples"),
        ("Nothing", "returns torch.float32 of shape (2, 0) for 2 examples"),
        ("Complex", "returns torch.complex64 of shape (2, 1024) for 2 examples"),
        ("Meta", "has a state that cannot be saved; leave out --save"),
        ("BadState", "has a state that cannot be saved; leave out --save: SystemExit: 0"),
    ],
)
def test_a_model_that_fit_cannot_use_is_named_before_the_training(name, message, npz, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(tool, "train_classifier", lambda *args, **options: pytest.fail("it trained"))
    assert message in refused("fit", f"fit_models:{name}", "--data", npz, "--save", "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "why"), [("Raises", "LookupError: not while"), ("Exits", "SystemExit")])
def test_a_model_that_fails_in_training_is_one_line(name, why, npz, refused):
    told = f"lowmem fit: model='fit_models:{name}' cannot be trained on this data: {why}\n"
    assert refused("fit", f"fit_models:{name}", "--data", npz) == told


@pytest.mark.parametrize(("name", "why"), [("Twice", "LookupError: no more"), ("ExitsTwice", "SystemExit: 0")])
def test_a_state_that_can_be_listed_once_alone_is_one_line(name, why, npz, tmp_path, refused):
    told = f"model='fit_models:{name}' has a state that can no longer be saved; leave out --save"
    argv = f"fit_models:{name}", "--data", npz, "--epochs", "1", "--save", "out"
    assert refused("fit", *argv, printed="epoch") == f"lowmem fit: {told}: {why}\n"
    assert not (tmp_path / "out").exists()


def test_a_rate_that_float32_cannot_hold_is_named_and_the_largest_is_taken(npz, refused):
    """AdamW's first step is ten times the rate, and float32 ends at 3.4e38."""
    argv = "fit", "lora", "--data", npz, "--epochs", "1", "--batch-size", "16", "--lr"
    for lr in ("3.2e37", "1e38", "1e300"):
        assert refused(*argv, lr).startswith(f"lowmem fit: --lr={float(lr):g} is above 3.1e+37")
    assert f"lower --lr={tool.LARGEST_LR:g}" in refused(*argv, tool.LARGEST_LR)  # of the loss: it did train


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets few users make links")
def test_a_link_that_loops_is_refused_and_stays(npz, tmp_path, refused):
    (tmp_path / "loop").symlink_to("loop")
    told = refused("fit", "lora", "--data", npz, "--save", tmp_path / "loop")
    assert "loop': Too many levels of symbolic links; choose" in told
    assert os.readlink(tmp_path / "loop") == "loop"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pty")
def test_on_a_terminal_lines_stand_above_the_bar(npz):
    import pty

    main_end, other_end = pty.openpty()
    argv = [sys.executable, "-m", "lowmem", "fit", "lora", "--data", npz, "--epochs", "2"]
    with subprocess.Popen(argv, stdout=other_end, stderr=other_end) as process:
        os.close(other_end)
        shown = b""
        while True:
            try:
                part = os.read(main_end, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(main_end)
    assert process.returncode == 0
    lines = [line for line in shown.decode().splitlines() if "test accuracy" in line]
    assert len(lines) == 2
    assert all("steps" not in line for line in lines)
    assert "steps" in shown.decode()


def test_data_of_another_width_is_one_line(refused):
    np.savez("narrow.npz", x=np.ones((10, 3)), y=np.arange(10) % 2)
    assert "model='lora' cannot take this input" in refused("fit", "lora", "--data", "narrow.npz")


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qlora", "bignet"])
def test_a_dry_run_says_what_the_run_takes(name, npz, tmp_path, capsys, results, monkeypatch):
    argv = [name, "--data", npz, "--batch-size", "16", "--epochs", "1"]
    target = tmp_path / "new" / "saved.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(tool, "train_classifier", None)
        patched.setattr(tool, "build_or_load_named_model", None)
        planned = results("fit", *argv, "--dry-run", "--save", str(target))
        assert main(["fit", *argv, "--dry-run"]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: ")
    assert not target.parent.exists()
    model = tool.Classifier(build(name), 1024, 2)
    assert planned["variant"] == name
    assert planned["stored_bytes"] == measure.actual_bytes(model)
    assert planned["gradients"] == 4 * measure.counts(model).trainable  # the head's are among them
    if name == "qlora":
        assert planned["stored"]["dense"] == 6 * 1024 * 3 * 4 + 5 * 2 * 1024 * 4 + (1024 + 1) * 2 * 4
    real = results("fit", *argv)["peak_bytes"]
    assert max(planned["backward"], planned["update"]) == pytest.approx(real, rel=0.05)


@pytest.mark.thorough
def test_a_dry_run_takes_the_rank_and_a_user_s_factory(npz, results):
    argv = ["lowmem:BigNet@qlora_nf4", "--data", npz, "--dry-run", "--rank"]
    four, eight = (results("fit", *argv, rank)["stored"]["adapters"] for rank in ("4", "8"))
    assert eight == 2 * four


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lora", "--data", "absent.txt"], "data='absent.txt' is unknown"),
        (["lora", "--rank", "0"], "must be a positive integer"),
        (["bignet", "--rank", "4"], "rank=4 has no use for variant='bignet'"),
        (["torch.nn:Identity@lora"], "nothing to convert"),
        (["torch.nn:Module"], "cannot take this input"),
    ],
)
def test_a_dry_run_of_bad_input_is_one_line(argv, said, refused):
    assert said in refused("fit", *argv, "--dry-run")

"""`lowmem fit` trains every variant, on the built-in tasks and on a user's arrays, and saves whole files."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowmem import VARIANTS, build, measure
from lowmem.__main__ import main
from lowmem.tools import fit_classifier as tool
from lowmem.tools.fit_data import Split, load_data
from tests.selection import FULL


@pytest.fixture
def npz(tmp_path):
    """A task of 40 examples that anything learns: the class is in every feature."""
    y = np.arange(40) % 2
    np.savez(tmp_path / "task.npz", x=np.random.default_rng(0).normal(size=(40, 1024)) * 0.1 + y[:, None], y=y)
    return str(tmp_path / "task.npz")


def results(capsys, *argv):
    assert main(["fit", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.thorough
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_a_user_s_task(name, npz, capsys):
    found = results(capsys, name, "--data", npz, "--epochs", "12", "--batch-size", "16")
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
def test_adapters_reach_95_percent_on_digits(name, capsys):
    found = results(capsys, name, "--data", "digits", "--epochs", "4")
    assert found["test_accuracy"] >= 0.95


def test_synthetic_is_the_default_and_can_be_learnt(capsys):
    assert main(["fit", "lora", "--epochs", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert all("loss" in line and "train accuracy" in line and "test accuracy" in line for line in lines[:3])
    assert lines[3].startswith("peak memory of a step: ")
    assert float(lines[2].split()[-1].rstrip("%")) > 50


def test_the_seed_decides_everything_but_the_time(npz, capsys):
    runs = [results(capsys, "lora", "--data", npz, "--epochs", "1", "--seed", seed) for seed in ("1", "1", "2")]
    for run in runs:
        del run["seconds_per_step"]
    assert runs[0] == runs[1]
    assert runs[0]["losses"] != runs[2]["losses"]


def test_only_the_adapters_and_the_head_change():
    torch.manual_seed(0)
    model = tool.Classifier(build("qlora"), 1024, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = load_data("synthetic", 0)
    tool.fit(model, data, variant="qlora", epochs=1, batch_size=400, lr=1e-3, seed=0, report=lambda line: None)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if not name.startswith("head")} == {name for name in before if "lora_" in name}


def test_the_loss_of_an_epoch_is_that_of_all_its_examples():
    """At a rate of 0: five examples in batches of four, whose last holds one."""
    torch.manual_seed(0)
    model = tool.Classifier(torch.nn.Identity(), 4, 2)
    x, y = torch.randn(9, 4), torch.arange(9) % 2
    with torch.no_grad():
        logits, test_logits = model(x[:5]), model(x[5:])
    data = Split(x[:5], y[:5], x[5:], 1 - test_logits.argmax(1), 2)
    found = tool.fit(model, data, variant="", epochs=1, batch_size=4, lr=0.0, seed=0, report=lambda line: None)
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


@pytest.mark.skipif(not hasattr(os, "link"), reason="this system has no hard links")
def test_a_save_replaces_the_file_of_before(tmp_path, npz):
    """What another name holds stays as it was: nothing is written into the file."""
    path, other = tmp_path / "saved.safetensors", tmp_path / "other"
    path.write_bytes(b"before")
    os.link(path, other)
    assert main(["fit", "lora", "--data", npz, "--epochs", "1", "--save", str(path)]) == 0
    assert other.read_bytes() == b"before"
    assert load_file(path)


@pytest.mark.thorough
def test_saved_weights_are_those_of_the_trained_model(tmp_path, npz, capsys):
    path = tmp_path / "saved.safetensors"
    argv = ["qlora", "--data", npz, "--epochs", "2", "--rank", "4", "--save", str(path)]
    accuracy = results(capsys, *argv)["test_accuracy"]
    model = tool.Classifier(build("qlora", rank=4), 1024, 2)
    model.load_state_dict(load_file(path), strict=True)
    data = load_data(npz, 0)
    assert tool.accuracy(model, data.test_x, data.test_y, 16) == accuracy
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lowmem"])["model"] == "qlora"
    first = path.read_bytes()
    results(capsys, *argv)
    assert path.read_bytes() == first


def test_a_user_s_factory_is_trained_with_the_shape_of_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fit_models.py").write_text(
        "from torch import nn\n"
        "class Tied(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)\n"
        "        self.two.weight = self.one.weight\n"
        "    def forward(self, x):\n"
        "        return self.two(self.one(x))\n"
    )
    x = np.random.default_rng(0).normal(size=(30, 2, 6))
    np.savez("pictures.npz", x=x, y=(x[:, 0, 0] > 0).astype(int))
    found = results(capsys, "fit_models:Tied", "--data", "pictures.npz", "--epochs", "2", "--save", "out.safetensors")
    assert len(found["losses"]) == 2
    assert load_file("out.safetensors")["body.two.weight"].shape == (6, 6)


def test_a_loss_that_is_no_longer_finite_stops_and_saves_nothing(tmp_path, npz, capsys):
    path = tmp_path / "saved.safetensors"
    assert main(["fit", "bignet", "--data", npz, "--lr", "1e30", "--save", str(path)]) == 2
    shown = capsys.readouterr().err
    assert "lower --lr=1e+30" in shown
    assert shown.count("\n") == 1
    assert not path.exists()


DIVERGING = """
import torch
from torch import nn

class Parameter(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
        self.zero = nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return super().forward(x) + self.zero.sqrt()  # whose gradient at 0 is infinite

class Buffer(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
        self.register_buffer("seen", torch.zeros(()))
    def forward(self, x):
        if self.training:
            self.seen.add_(torch.inf)
        return super().forward(x)

class Mask(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
        self.register_buffer("mask", torch.tensor([0, -torch.inf]))
"""


@pytest.mark.parametrize(("name", "tensor"), [("Parameter", "body.zero"), ("Buffer", "body.seen")])
def test_weights_that_the_last_step_makes_infinite_are_not_saved(name, tensor, tmp_path, npz, monkeypatch, capsys):
    """Every loss is finite: the one step of the one epoch is what does it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fit_diverging.py").write_text(DIVERGING)
    path = tmp_path / "saved.safetensors"
    path.write_bytes(b"before")
    argv = [f"fit_diverging:{name}", "--data", npz, "--epochs", "1", "--json", "--save", str(path)]
    assert main(["fit", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"lowmem fit: '{tensor}' is no longer finite in epoch 1: lower --lr=0.001\n")
    assert path.read_bytes() == b"before"


def test_a_mask_of_infinities_is_no_divergence(tmp_path, npz, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fit_mask.py").write_text(DIVERGING)
    results(capsys, "fit_mask:Mask", "--data", npz, "--epochs", "1", "--save", "out")
    assert load_file("out")["body.mask"].tolist() == [0, -float("inf")]


@pytest.mark.parametrize("path", ["missing/file.safetensors", "."])
def test_an_unwritable_output_is_named_before_the_training(path, npz, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tool, "fit", lambda *args, **options: pytest.fail("it trained"))
    assert main(["fit", "lora", "--data", npz, "--save", path]) == 2
    assert f"cannot write '{path}'" in capsys.readouterr().err


USER_MODELS = """
import torch
from torch import nn

class Pair(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
    def forward(self, x):
        return x, x

class Extra(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
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

class Meta(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
        self.register_buffer("unset", torch.empty(3, device="meta"))

class BadState(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
    def state_dict(self, *args, **options):
        raise SystemExit(0)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pair", "returns a tuple; fit takes models that return"),
        ("Extra", "a state that is not all tensors"),
        ("Scalar", "returns torch.float32 of shape () for 2 examples; fit takes models that return real numbers"),
        ("Vector", "returns torch.float32 of shape (2,) for 2 examples"),
        ("Mean", "returns torch.float32 of shape (1, 1024) for 2 examples"),
        ("Nothing", "returns torch.float32 of shape (2, 0) for 2 examples"),
        ("Complex", "returns torch.complex64 of shape (2, 1024) for 2 examples"),
        ("Meta", "has a state that safetensors cannot --save"),
        ("BadState", "has a state that cannot be listed; leave out --save: SystemExit: 0"),
    ],
)
def test_a_model_that_fit_cannot_use_is_named_before_the_training(name, message, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tool, "fit", lambda *args, **options: pytest.fail("it trained"))
    (tmp_path / "fit_users.py").write_text(USER_MODELS)
    assert main(["fit", f"fit_users:{name}", "--data", npz, "--save", "out"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


TRAINS_BADLY = """
import sys
from torch import nn

class Fails(nn.Linear):
    def __init__(self):
        super().__init__(1024, 4)
    def forward(self, x):
        if self.training:
            self.fail()
        return super().forward(x)

class Raises(Fails):
    def fail(self):
        raise LookupError("not while\\ntraining")

class Exits(Fails):
    def fail(self):
        sys.exit()
"""


@pytest.mark.parametrize(("name", "why"), [("Raises", "LookupError: not while"), ("Exits", "SystemExit")])
def test_a_model_that_fails_in_training_is_one_line(name, why, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fit_fails.py").write_text(TRAINS_BADLY)
    assert main(["fit", f"fit_fails:{name}", "--data", npz]) == 2
    told = f"lowmem fit: model='fit_fails:{name}' cannot be trained on this data: {why}\n"
    assert capsys.readouterr().err == told


TWICE = """
from torch import nn

class Twice(nn.Linear):
    calls = 0
    def __init__(self):
        super().__init__(1024, 4)
    def state_dict(self, *args, **options):
        Twice.calls += 1
        if Twice.calls > 1:
            {after}
        return super().state_dict(*args, **options)
"""


@pytest.mark.parametrize(
    ("after", "why"),
    [
        ("raise LookupError('no more')", "LookupError: no more"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_state_that_can_be_listed_once_alone_is_one_line(after, why, npz, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fit_twice", raising=False)
    (tmp_path / "fit_twice.py").write_text(TWICE.format(after=after))
    assert main(["fit", "fit_twice:Twice", "--data", npz, "--epochs", "1", "--save", "out"]) == 2
    told = "model='fit_twice:Twice' has a state that can no longer be listed; leave out --save"
    assert capsys.readouterr().err == f"lowmem fit: {told}: {why}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lr", ["3.2e37", "1e38", "1e300"])  # AdamW's first step is ten times that: above 3.4e38
def test_a_rate_that_float32_cannot_hold_is_named(lr, npz, capsys):
    assert main(["fit", "lora", "--data", npz, "--epochs", "1", "--lr", lr]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"lowmem fit: --lr={float(lr):g} is above 3.1e+37")
    assert err.count("\n") == 1


def test_the_largest_rate_is_taken(npz, capsys):
    largest = str(tool.LARGEST_LR)
    assert main(["fit", "lora", "--data", npz, "--epochs", "1", "--batch-size", "16", "--lr", largest]) == 2
    assert f"lower --lr={tool.LARGEST_LR:g}" in capsys.readouterr().err  # of the loss: it did train


def test_an_empty_name_to_save_to_is_named_as_it_was_given(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "lora", "--save", ""])
    assert "argument --save: '' must be the name of a file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets few users make links")
def test_a_link_that_loops_is_refused_and_stays(npz, tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    assert main(["fit", "lora", "--data", npz, "--save", str(tmp_path / "loop")]) == 2
    assert "loop': Too many levels of symbolic links; choose" in capsys.readouterr().err
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


def test_data_of_another_width_is_one_line(tmp_path, capsys):
    np.savez(tmp_path / "narrow.npz", x=np.ones((10, 3)), y=np.arange(10) % 2)
    assert main(["fit", "lora", "--data", str(tmp_path / "narrow.npz")]) == 2
    shown = capsys.readouterr().err
    assert "model='lora' cannot take this input" in shown
    assert shown.count("\n") == 1


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_in_the_middle_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "saved.safetensors"
    path.write_bytes(b"before")
    argv = [sys.executable, "-m", "lowmem", "fit", "lora", "--epochs", "1000", "--save", str(path)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - background jobs start deaf to it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(argv, preexec_fn=heard, **pipes) as process:
        try:
            assert process.stdout.readline().startswith("epoch 1/1000")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 2
    assert errors == "lowmem fit: interrupted; what was not finished is not there: run it again\n"
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["qlora", "bignet"])
def test_a_dry_run_says_what_the_run_takes(name, npz, tmp_path, capsys, monkeypatch):
    argv = [name, "--data", npz, "--batch-size", "16", "--epochs", "1"]
    target = tmp_path / "new" / "saved.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(tool, "fit", None)
        patched.setattr(tool, "make_model", None)
        planned = results(capsys, *argv, "--dry-run", "--save", str(target))
        assert main(["fit", *argv, "--dry-run"]) == 0
        assert capsys.readouterr().out.startswith(f"{name}: ")
    assert not target.parent.exists()
    model = tool.Classifier(build(name), 1024, 2)
    assert planned["variant"] == name
    assert planned["stored_bytes"] == measure.actual_bytes(model)
    assert planned["gradients"] == 4 * measure.counts(model).trainable  # the head's are among them
    if name == "qlora":
        assert planned["stored"]["dense"] == 6 * 1024 * 3 * 4 + 5 * 2 * 1024 * 4 + (1024 + 1) * 2 * 4
    real = results(capsys, *argv)["peak_bytes"]
    assert max(planned["backward"], planned["update"]) == pytest.approx(real, rel=0.05)


@pytest.mark.thorough
def test_a_dry_run_takes_the_rank_and_a_user_s_factory(npz, capsys):
    argv = ["lowmem:BigNet@qlora_nf4", "--data", npz, "--dry-run", "--rank"]
    four, eight = (results(capsys, *argv, rank)["stored"]["adapters"] for rank in ("4", "8"))
    assert eight == 2 * four


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["lora", "--data", "absent.txt"], "data='absent.txt' is unknown"),
        (["lora", "--rank", "0"], "must be a positive integer"),
        (["bignet", "--rank", "4"], "rank=4 has no use for variant='bignet'"),
        (["torch.nn:Identity@lora"], "nothing to convert"),
        (["torch.nn:Tanhshrink@bignet"], ""),
        (["torch.nn:Module"], "cannot take this input"),
    ],
)
def test_a_dry_run_of_bad_input_is_one_line(argv, said, capsys):
    try:
        code = main(["fit", *argv, "--dry-run"])
    except SystemExit as stop:
        code = stop.code
    assert code == (2 if said else 0)
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == (1 if said else 0)

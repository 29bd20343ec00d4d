"""`lowmem stats` reproduces the exact figures, for BigNet and for a user's model."""

import pytest
import torch

import lowmem
from lowmem import BigNet, FourBit, LoRA, convert, measure
from lowmem.__main__ import main
from lowmem.tools.stats import ModelStats
from lowmem.transforms.model_summary import LayerSummary
from tests.test_variants import EXACT

MIB = 2**20


@pytest.fixture
def rows(results):
    return lambda *argv: {row["model"]: row for row in results("stats", *argv)}


def test_json_has_exact_bytes_and_the_documented_keys(rows):
    found = rows()
    assert found.keys() == EXACT.keys()
    for name, (trainable, frozen, stored) in EXACT.items():
        row = found[name]
        assert list(row) == list(ModelStats.__dataclass_fields__)  # layers are listed for a user's model only
        assert (row["trainable_params"], row["frozen_params"]) == (trainable, frozen)
        assert row["total_params"] == trainable + frozen
        assert row["theoretical_bytes"] == row["actual_bytes"] == stored
        assert row["bits_per_weight"] == 8 * stored / 18_903_040
    assert found["bignet"]["forward_bytes"] <= 0.05 * MIB
    for name, most in {
        "bignet": 72.4,
        "half_precision": 1.2,
        "low_precision": 1.2,
        "lora": 5.9,
        "qlora": 5.9,
    }.items():
        assert found[name]["forward_bytes"] <= 1.05 * MIB
        assert found[name]["backward_bytes"] <= most * MIB


def test_the_table_reproduces_the_first_three_rows(capsys):
    assert main(["stats", "bignet", "half_precision", "low_precision"]) == 0
    cells = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["bignet", "18.90", "0.00", "18.90", "72.11", "72.11"],
        ["half_precision", "0.01", "18.89", "18.90", "36.07", "36.07"],
        ["low_precision", "0.03", "10.62", "10.65", "11.36", "11.36"],
    ):
        assert row in cells
    assert main(["stats", "low_precision", "--markdown"]) == 0
    header, rule, line = capsys.readouterr().out.splitlines()
    assert header.startswith("| Model | Trains M |")
    assert set(rule) == set("|:- ")
    assert line.startswith(f"| {' | '.join(row)} |")


@pytest.mark.parametrize(
    ("options", "factory"),
    [
        (["--input-shape", "12"], "nn.Linear(12, 3)"),
        (["--input-shape", "3,8,8", "--batch", "2"], "nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))"),
        (["--input-shape", "7", "--input-dtype", "int64"], "nn.Embedding(10, 4)"),
    ],
)
def test_a_user_s_model_is_measured_and_listed_by_layers(user_module, rows, options, factory):
    user_module("stats_model", f"from torch import nn\nmake = lambda: {factory}\n")
    row = rows("stats_model:make", *options)["stats_model:make"]
    assert row["trainable_params"] > 0
    assert row["backward_bytes"] >= row["forward_bytes"] > 0
    assert 32 <= row["bits_per_weight"] < 64  # above 32 by the statistics of a batch norm
    assert list(row) == [*ModelStats.__dataclass_fields__, "layers"]
    assert list(row["layers"][0]) == list(LayerSummary.__dataclass_fields__)
    assert sum(layer["weights"] for layer in row["layers"]) == row["total_params"]


def test_the_layers_of_a_user_s_model_follow_the_table(capsys):
    name = "lowmem:BigNet@qlora_nf4"
    assert main(["stats", "bignet", name]) == 0
    table, title, layers = capsys.readouterr().out.split("\n\n")[-3:]
    assert title == name
    assert "bignet" in table
    (line,) = [line for line in layers.splitlines() if " Linear4Bit " in line]
    assert line.split()[0] == "0...10.layers.0,2,4"
    assert max(map(len, layers.splitlines())) <= 120
    below = layers[layers.index(line) :].splitlines()  # in a pipe, text is wrapped
    stored = " ".join(one[line.index("nf4") : line.index("18,892,800")].strip() for one in below[:4])
    assert stored.startswith("nf4, block_size=64, scales=double + default (rank 32)")
    total = next(one for one in layers.splitlines() if one.split()[:1] == ["total"])
    assert main(["stats", name, "--all"]) == 0
    each = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert len([line for line in each if " Linear4Bit " in line]) == 18
    assert total.split() in map(str.split, each)
    assert main(["stats", name, "--markdown"]) == 0
    layers = capsys.readouterr().out.partition(f"\n\n{name}\n\n")[2].splitlines()
    assert layers[0].startswith("| Layer | Type | Stored |")
    assert {line.count("|") for line in layers} == {10}
    assert main(["stats", "qlora_nf4"]) == 0
    assert "Linear4Bit" not in capsys.readouterr().out


MODELS = """
from torch import nn

make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
frozen = lambda: nn.Linear(12, 3).requires_grad_(False)

class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("a\x1b[31m\u202e[bold]|b", type("L\x1b]0;title\a|x", (nn.Linear,), {})(12, 3))
    def forward(self, x):
        return next(self.children())(x)

class Unlisted(nn.Linear):
    def __init__(self):
        super().__init__(12, 3)
    def extra_repr(self):
        return ""
    def named_modules(self, *args, **options):
        raise LookupError("not listed")

class Values(nn.Linear):
    def __init__(self):
        super().__init__(1024, 1)
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x

class Fails(nn.Linear):
    def __init__(self):
        super().__init__(12, 3)
    def forward(self, x):
        raise LookupError("not today")

class Exits(Values):
    def forward(self, x):
        raise SystemExit(3)
"""


@pytest.fixture
def models(user_module):
    user_module("stats_models", MODELS)


@pytest.mark.usefixtures("models")
def test_names_of_modules_and_types_are_shown_without_control_characters(capsys):
    for options in ([], ["--markdown"]):
        assert main(["stats", "stats_models:Hostile", "--input-shape", "12", *options]) == 0
        out = capsys.readouterr().out
        assert out.replace("\n", "").isprintable()
        assert ("[bold]|b" in out) == (not options)
    rows = [line for line in out.splitlines() if "x1b" in line]
    assert len(rows) == 1
    assert rows[0].replace("\\\\", "").replace("\\|", "").count("|") == 10


def test_a_plan_has_the_exact_bytes_and_the_documented_keys(results):
    (found,) = results("stats", "lowmem:BigNet", "--plan", "FourBit:int4:16:float16,LoRA:8")
    assert list(found) == [
        *("model", "input_shape"),
        *("techniques", "training", "dense", "stored", "inputs", "forward", "scratch", "gradients", "optimizer"),
        *("backward", "update", "load", "conversion", "cache"),
        *("stored_bytes", "inference_bytes", "training_bytes"),
    ]
    assert found["techniques"] == ["FourBit(format='int4', block_size=16, scales='float16')", "LoRA(rank=8)"]
    model = convert(BigNet(), FourBit("int4", 16, "float16"), LoRA(8))
    assert found["stored_bytes"] == measure.actual_bytes(model)
    assert (found["training"], found["dense"]) == ("adamw", 75_612_160)
    assert found["gradients"] == 4 * measure.counts(model).trainable


def test_a_folder_is_planned_without_a_text(place, results, capsys, refused):
    from lowmem.integrations.transformers import KeyValueCache
    from tests.integrations.transformers.folders import load

    (found,) = results("stats", "llama", "--plan")
    assert found["input_shape"] == [1, 64]  # its positions
    assert found["techniques"] == ["FourBit()", "LoRA()"]
    model = convert(load("llama"), FourBit(), LoRA(16))
    assert found["stored_bytes"] == measure.theoretical_bytes(model)
    assert found["gradients"] == 4 * measure.counts(model).trainable
    (longer,) = results("stats", "llama", "--plan", "--batch", "2", "--input-shape", "48")
    assert longer["input_shape"] == [2, 48]
    assert longer["backward"] > found["backward"]
    (dense,) = results("stats", "llama", "--at-most", "1GiB", "--training", "none")
    assert dense["techniques"] == []
    cached = "--tokens", "48", "--cache-bits", "8"
    (found,) = results("stats", "llama", "--plan", "--training", "none", "--batch", "2", *cached)
    cache = KeyValueCache(load("llama"), bits=8)
    load("llama")(torch.zeros(2, 48, dtype=torch.int64), cache=cache)
    assert found["cache"] == cache.nbytes
    assert "--tokens 48 plans a cache: add --plan or --at-most" in refused("stats", "llama", "--tokens", "48")
    assert "cache_bits=8: plan a cache, and give its tokens" in refused(
        "stats", "llama", "--plan", "--cache-bits", "8"
    )
    assert main(["quantize", "llama", "stored", "--format", "nf4"]) == 0
    capsys.readouterr()
    (stored,) = results("stats", "stored", "--plan", "--training", "none")
    assert stored["stored_bytes"] == pytest.approx(measure.theoretical_bytes(load("stored")), rel=0.002)
    assert main(["stats", "stored", "--plan", "LoRA:4", "--markdown"]) == 0
    told = capsys.readouterr().out
    assert "| stored: as it is |" in told
    assert "\nof an input of 1 x 64 tokens: --batch and --input-shape change them\n" in told
    for options in (["--plan", "FourBit"], ["--at-most", "1GiB"]):
        assert "model='stored' is stored already: leave out --at-most, and name LoRA" in refused(
            "stats", "stored", *options
        )


def test_plans_of_several_models_as_tables(capsys):
    argv = ["stats", "bignet", "lowmem:BigNet", "--plan", "Half:bfloat16", "--training", "none"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "BigNet" in line or "bignet" in line] == [
        "bignet: Half(dtype=torch.bfloat16)",
        "lowmem:BigNet: Half(dtype=torch.bfloat16)",
    ]
    assert len([line for line in lines if line.split() == ["dense", "model", "72.11"]]) == 2
    assert not [line for line in lines if "training" in line or "adamw" in line]
    assert main([*argv, "--markdown"]) == 0
    assert "| stored: Half | 36.04 |" in capsys.readouterr().out


def test_techniques_that_fit_are_proposed(results):
    (found,) = results("stats", "--at-most", "64MiB", "--training", "none")
    assert (found["model"], found["techniques"]) == ("bignet", ["Half(dtype=torch.bfloat16)"])
    assert found["inference_bytes"] <= 64 * MIB
    (found,) = results("stats", "--at-most", "40MiB")
    assert found["techniques"][1:] == ["LoRA()"]
    assert found["training_bytes"] <= 40 * MIB


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bignet", "--input-shape", "12"], "model='bignet' cannot take this input"),
        (["stats_models:Unlisted", "--input-shape", "12"], "LookupError: not listed"),
        (["bignet", "--at-most", "4MiB"], "is out of reach: the least that is possible is "),
        (
            ["bignet", "--at-most", "4MiB", "--training", "none"],
            "FourBit(format='nf4', block_size=4096, scales='float16'",
        ),
        (["bignet", "--plan", "Half,LoRA", "--input-shape", "3"], "model='bignet' cannot be planned: RuntimeError"),
        (["qlora", "--plan", "Half"], "model='qlora' has techniques of its own"),
        (["torch.nn:Identity", "--plan", "FourBit"], "nothing to convert: FourBit looks for"),
        (["bignet", "--plan", "FourBit,Half"], "Half cannot follow the techniques before it"),
        (["stats_absent:make", "--plan", "Half"], "cannot import 'stats_absent'"),
        (["nothing", "--plan", "Half"], "model='nothing' is no variant, and no folder here: name"),
        (["stats_models:Values", "--at-most", "1GiB"], "its forward needs the values of tensors"),
        (["stats_models:Exits", "--at-most", "1GiB"], "SystemExit: 3"),
        (["stats_models:frozen", "--input-shape", "12", "--training", "adamw"], "--rank N adds adapters"),
        (["stats_models:Fails", "--input-shape", "12", "--training", "sgd"], "LookupError: not today"),
        (["bignet", "--input-shape", "12", "--training", "sgd"], "model='bignet' cannot take this input"),
        (["bignet", "--training", "adam"], "invalid choice: 'adam'"),
        (["bignet", "--memory", "lean"], "--memory applies to a measured training step"),
        (["bignet", "--training", "none", "--rank", "2"], "--rank applies to a measured training step"),
        (["bignet", "--training", "sgd", "--plan", "LoRA", "--plot", "p.svg"], "--plot applies to"),
        (["bignet", "--training", "adamw8bit", "--plan", "LoRA"], "--training adamw8bit is measured, not planned"),
        (["bignet", "--training", "sgd", "--all"], "--all lists the layers"),
        (["bignet", "--training", "sgd", "--plot", "p.pdf"], "must end with .svg, .png, .html"),
        (["bignet", "--training", "sgd", "--plot", "no/p.svg"], "no/p.svg"),
    ],
)
@pytest.mark.usefixtures("models")
def test_arguments_that_cannot_be_measured_or_planned_are_refused(argv, said, refused, tmp_path):
    assert said in refused("stats", *argv)
    assert {one.name for one in tmp_path.iterdir()} <= {"stats_models.py", "__pycache__"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no technique: choose from Half, EightBit, FourBit, Budget, LoRA"),
        ("qlora", "'qlora' is no technique"),
        ("Half:float8", "dtype='float8' must be torch.float16 or torch.bfloat16"),
        ("FourBit:nf5", "format='nf5' is unknown: choose from int4, nf4"),
        ("LoRA:0", "'0' must be a positive integer"),
        ("LoRA:4:8", "'LoRA:4:8' has more than LoRA:rank"),
    ],
)
def test_bad_text_of_techniques_is_one_line(text, said, refused):
    assert said in refused("stats", "bignet", "--plan", text)


def test_a_training_step_of_variants_as_json_and_as_a_table(results, capsys):
    argv = ["low_precision_nf4", "lowmem:BigNet@qlora_nf4", "--training", "sgd", "--batch", "2"]
    listed = results("stats", *argv)
    assert [one["model"] for one in listed] == argv[:2]
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    wanted = lowmem.training_memory(lowmem.build("qlora_nf4"), x, optimizer="sgd")
    assert listed[1] == {"model": argv[1], "memory": None} | wanted.as_json()
    assert main(["stats", *argv, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| MiB | low_precision_nf4 | lowmem:BigNet@qlora_nf4 |"
    assert any(line.startswith("| weights | 9.43 | 9.43 |") for line in lines)
    assert lines[-1].endswith(f"| {wanted.moment} |")
    assert lines[-2].endswith(f"| {wanted.total_bytes / 2**20:.2f} |")


@pytest.mark.usefixtures("models")
def test_a_training_step_of_a_user_s_model_with_adapters_prepared(results):
    argv = ["stats", "stats_models:make", "--input-shape", "3,8,8", "--batch", "4", "--training", "adamw8bit"]
    (plain,) = results(*argv)
    assert plain["adapters"] == 0
    assert plain["activations"].keys() <= {"Conv2d", "BatchNorm2d", "ReLU", "Linear", "loss"}
    (adapted,) = results(*argv, "--rank", "2", "--memory", "lean")
    assert (adapted["memory"], adapted["optimizer_name"]) == ("lean", "adamw8bit")
    assert adapted["adapters"] > 0
    (frozen,) = results("stats", "stats_models:frozen", "--input-shape", "12", "--training", "adamw", "--rank", "2")
    assert frozen["adapters"] == 4 * 2 * (12 + 3)
    (ranked,) = results("stats", "lora", "--training", "adamw", "--rank", "2")
    assert ranked["adapters"] == 4 * 2 * 2048 * 18


@pytest.mark.thorough
@pytest.mark.usefixtures("models")
def test_a_training_step_is_drawn(tmp_path):
    pytest.importorskip("altair", reason="the picture needs the extra: pip install '.[report]'")
    for name in ("step.svg", "step.png", "step.HTML"):
        argv = ["stats_models:make", "--input-shape", "3,8,8", "--training", "adamw", "--plot", name]
        assert main(["stats", *argv]) == 0
        assert (tmp_path / name).stat().st_size > 2000


def test_without_a_gpu_device_is_one_line(no_gpu, tmp_path):
    no_gpu("stats", "bignet")
    no_gpu("stats", "lora", "--training", "adamw", "--plot", tmp_path / "parts.svg")


def test_models_and_inputs_are_measured_on_the_device(rows, monkeypatch):
    """On the meta device, which has no storages; an input of another device would be an error."""
    monkeypatch.setattr("lowmem.tools.stats.select_local_rank_device", lambda name: torch.device("meta"))
    assert rows("bignet", "--device", "cuda")["bignet"]["forward_bytes"] == 0
    (found,) = rows("bignet", "--training", "sgd", "--device", "cuda").values()
    assert (found["weights"], found["step_bytes"]) == (0, 0)


@pytest.mark.parametrize("what", [["--plan"], ["--at-most", "1GiB"]])
def test_a_plan_needs_no_device(what, refused):
    assert "leave --device=cuda out" in refused("stats", "bignet", *what, "--device", "cuda")

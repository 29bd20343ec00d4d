"""`lowmem fit` on folders: text in, an adapter out that lowmem and PEFT load; resumed, it is the same to the byte."""

import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")


import lowmem
from lowmem.__main__ import main
from lowmem.finetuning import loop
from lowmem.finetuning.metrics import LOGS
from lowmem.finetuning.process_group import TrainingProcessGroup as Process
from lowmem.integrations.transformers import LowmemConfig
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.nn import dot_product_attention
from lowmem.tools import fit_language, fit_result
from lowmem.tools.fit_job import default_learning_rate
from tests.integrations.transformers.folders import load


def fit(capsys, *options, data="data.jsonl"):
    argv = ["fit", "llama", "--data", data, "--length", "48", "--rank", "4", "--lr", "0.01", *options, "--json"]
    assert main(argv) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.mark.thorough(keep=1)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, which calls what transformers will remove
@pytest.mark.parametrize("data", ["data.jsonl", "text.txt"])
def test_an_adapter_that_lowmem_and_peft_load(data, place, capsys):
    options = ["--epochs", "6", "--eval-share", "0.2", "--eval-every", "10", "--save", "out", "--metrics", "m.jsonl"]
    options += ["--compare-dense", "--batch-size", "4"]
    found, told = fit(capsys, *options, data=data)
    dense, stored, adapted = (found["perplexity"][name] for name in ("dense", "stored", "adapted"))
    assert adapted < 0.8 * min(dense, stored)
    assert found["losses"][-1] < found["losses"][0]
    own = ["README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"]
    of_tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(one.name for one in Path("out").iterdir()) == sorted(own + of_tokenizer)
    record = json.loads(Path("out", "training.json").read_text())
    assert (record["base"], record["run"]["format"], record["run"]["rank"]) == ("llama", "bof4s", 4)
    lines = [json.loads(line) for line in Path("m.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == found["losses"]
    assert [(line["step"], line["perplexity"]) for line in lines if line["perplexity"]] == [
        tuple(one) for one in found["evaluations"]
    ]
    last = rf"step {found['steps']}/{found['steps']}  loss [\d.]+  held-out perplexity [\d.]+  "
    assert re.search(last + r"\d+ tokens/s  \d+ MiB  0:00 left", told)
    base = load("llama", quantization_config=LowmemConfig(lowmem.FourBit()))
    model = lowmem.load_adapter(base, "out")
    ids = torch.arange(10, 30)[None]
    peft = pytest.importorskip("peft", reason="peft is not installed: tox -e transformers")
    theirs = peft.PeftModel.from_pretrained(load("llama", quantization_config=LowmemConfig(lowmem.FourBit())), "out")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_run_says_what_it_will_not_do(place, capsys):
    """Nothing is saved without --save, and one pass over few texts hardly teaches facts."""
    few, unsaved = "which hardly teaches facts: --epochs 10", "nothing will be saved: --save OUT keeps the adapter"
    found, told = fit(capsys, "--batch-size", "1000")
    assert found["steps"] == 1
    assert "one pass over these texts is 1 step, " + few in told
    assert unsaved in told
    assert "--chat-template" not in told  # of a text
    _, told = fit(capsys, "--epochs", "1", "--batch-size", "1000", "--save", "out")
    assert few not in told
    assert unsaved not in told


def test_alpha_dropout_and_targets_are_those_of_the_adapter(place, capsys, refused):
    options = ["--alpha", "7", "--dropout", "0.25", "--target", "q_proj", "*.1.mlp.up_proj"]
    fit(capsys, "--steps", "1", "--save", "out", *options)
    config = json.loads(Path("out", "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 7, 0.25)
    paths = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    assert sorted(lowmem.adapter_layers(lowmem.load_adapter(load("llama"), "out"), "default")) == sorted(
        [*paths, "model.layers.1.mlp.up_proj"]
    )
    told = refused("fit", "llama", "--data", "text.txt", "--target", "w_proj")
    assert "--target='w_proj' names no layer that can be adapted: there are embed_tokens, q_proj" in told
    assert "--dropout=1 must be below 1" in refused("fit", "llama", "--data", "text.txt", "--dropout", "1")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_run_continues_from_an_adapter(kind, place, capsys, refused):
    before, _ = fit(capsys, "--steps", "20", "--eval-data", "text.txt", "--save", "out")
    start = "out"
    if kind == "file":
        base = load("llama", quantization_config=LowmemConfig(lowmem.FourBit()))
        lowmem.save_adapter(lowmem.load_adapter(base, "out"), "adapter.safetensors")
        start = "adapter.safetensors"
    argv = ["--data", "data.jsonl", "--length", "48", "--from", start]
    assert main(["fit", "llama", *argv, "--steps", "5", "--eval-data", "text.txt", "--lr", "1e-9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["rank"] == 4
    assert found["perplexity"]["adapted"] == pytest.approx(before["perplexity"]["adapted"], rel=1e-4)
    told = refused("fit", "llama", *argv, "--rank", "8")
    assert "--rank is that of the adapter that --from names: leave it out" in told
    assert "give --rank in place of --from" in refused("fit", "llama", *argv, "--dry-run")


def test_the_default_learning_rate_falls_with_the_rank():
    assert [default_learning_rate(rank) for rank in (1, 4, 16, 64, 256)] == [8e-4, 4e-4, 2e-4, 1e-4, 5e-5]


@pytest.mark.parametrize("log", list(LOGS))
def test_each_step_is_logged_once_also_by_a_run_that_goes_on(log, place, capsys, monkeypatch, refused):
    if log != "csv":
        pytest.importorskip(log, reason=f"{log} is not installed: tox -e transformers")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ["--steps", "4", "--save-every", "2", "--save", "out", "--log", log]
    with monkeypatch.context() as patch:
        step = loop._FineTuningRun._train_step

        def ending(self, number):
            step(self, number)
            if number == 3:
                raise Killed

        patch.setattr(loop._FineTuningRun, "_train_step", ending)
        with pytest.raises(Killed):
            fit(capsys, *options)
    fit(capsys, *options, "--resume")
    assert steps_of(log, Path("out.log")) == list(range(1, 5))
    Path("new.log").mkdir()
    told = refused("fit", "llama", "--data", "data.jsonl", "--length", "48", "--save", "new", "--log", log)
    assert "'new.log' exists" in told
    assert f"--log={log} writes a folder beside OUT" in refused("fit", "llama", "--data", "data.jsonl", "--log", log)


def steps_of(log: str, folder: Path) -> list[int]:
    """Return the steps whose loss a log holds."""
    if log == "csv":
        rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        return [int(row["step"]) for row in rows if float(row["loss"])]
    if log == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        return [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss")]
    return list(range(1, 5)) if len(list(folder.glob("wandb/offline-run-*"))) == 2 else []


class Killed(BaseException):
    """Ends a run where no handler of the command's sees it."""


def test_a_run_that_goes_on_writes_the_same_bytes(place, capsys, monkeypatch, refused):
    """The command ends after any step; what is killed inside a write is tests/finetuning/test_training_state.py's."""
    options = ["--epochs", "2", "--save-every", "2", "--eval-data", "text.txt", "--accumulate", "2", "--warmup", "2"]
    whole, _ = fit(capsys, *options, "--save", "whole", "--metrics", "whole.jsonl")
    for until in (1, 4, 5):
        calls = []
        step = loop._FineTuningRun._train_step

        def counted(self, number, step=step, calls=calls, until=until):
            step(self, number)
            calls.append(number)
            if len(calls) == until:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(loop._FineTuningRun, "_train_step", counted)
            with pytest.raises(Killed):
                fit(capsys, *options, "--save", "parts", "--resume", "--metrics", "parts.jsonl")
        assert not Path("parts").exists()
    capsys.readouterr()
    argv = ["llama", "--data", "data.jsonl", "--length", "48", "--rank", "4", "--lr", "0.01", *options]
    assert "has the state of an unfinished run: continue with --resume" in refused("fit", *argv, "--save", "parts")
    parts, _ = fit(capsys, *options, "--save", "parts", "--resume", "--metrics", "parts.jsonl")
    assert parts["losses"] == whole["losses"]
    assert parts["perplexity"] == whole["perplexity"]
    for name in ("adapter_config.json", "adapter_model.safetensors", "training.json"):
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes()
    numbers = [json.loads(line)["step"] for line in Path("parts.jsonl").read_text().splitlines()]
    assert numbers == list(range(1, whole["steps"] + 1))
    assert not Path("parts.training").exists()
    again, told = fit(capsys, *options, "--save", "parts", "--resume")
    assert "parts is complete already" in told
    assert again["perplexity"] == whole["perplexity"]


def test_a_kill_while_the_adapter_is_written_leaves_nothing_behind(place, capsys, monkeypatch):
    """A process that is killed cleans nothing up: what it has written so far goes with the states."""
    options = ["--steps", "2", "--save", "out"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **named: None)
        patch.setattr(fit_result, "write_atomically", lambda *args: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(capsys, *options)
    assert not Path("out").exists()
    fit(capsys, *options, "--resume")
    assert sorted(one.name for one in place.iterdir()) == ["data.jsonl", "llama", "out", "text.txt"]


def test_a_second_run_on_one_folder_ends_at_once(place, monkeypatch, refused):
    argv = ["llama", "--data", "data.jsonl", "--save", "out", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(fit_language, "check_arguments_and_make_job", lambda *args: pytest.fail("it has begun"))
        for held in ("out", "out.training"):
            with exclusive_write_lock(place / held):
                before = {one: one.read_bytes() for one in place.iterdir() if one.is_file()}
                told = refused("fit", *argv)
                assert told.startswith(f"lowmem fit: '{held}' is being written by process {os.getpid()} of ")
                assert {one: one.read_bytes() for one in place.iterdir() if one.is_file()} == before
    seen = []
    monkeypatch.setattr(
        fit_language,
        "check_arguments_and_make_job",
        lambda *args: seen.append([one.name for one in place.glob(".lowmem-*")]) or 1 / 0,
    )
    assert main(["fit", *argv]) == 3
    assert len(seen[0]) == 4  # of both names, a lock and the record of its owner
    assert sorted(one.name for one in place.iterdir()) == ["data.jsonl", "llama", "text.txt"]


def test_the_processes_of_one_run_are_one_owner(place):
    """The first one owns the folder, and the others learn whether it does."""

    class Ranks(Process):
        def __init__(self, rank, others=0.0):
            self.rank, self.others, self.told = rank, others, None

        def all_reduce_sum(self, value):
            self.told = value
            return value + self.others

    first, second = Ranks(0), Ranks(1)
    with (
        fit_language._output_locked_by_rank_zero(Path("out"), first),
        fit_language._output_locked_by_rank_zero(Path("out"), second),
    ):
        again = Ranks(0)
        with (
            pytest.raises(BlockingIOError, match=f"by process {os.getpid()} "),
            fit_language._output_locked_by_rank_zero(Path("out"), again),
        ):
            raise AssertionError
        with (
            pytest.raises(OSError, match="'out' cannot be written: rank 0 says why"),
            fit_language._output_locked_by_rank_zero(Path("out"), Ranks(1, others=again.told)),
        ):
            raise AssertionError
    assert (first.told, second.told, again.told) == (0.0, 0.0, 1.0)
    with fit_language._output_locked_by_rank_zero(None, first):
        assert not [*place.glob(".lowmem-*")]


def test_a_stored_folder_stays_as_it_is_and_a_dense_one_can_stay_dense(place, capsys, refused, results):
    assert main(["quantize", "llama", "stored", "--format", "fp4"]) == 0
    argv = ["--data", "text.txt", "--length", "48", "--steps", "2", "--eval-share", "0.2"]
    found = results("fit", "stored", *argv)
    assert found["perplexity"].keys() == {"stored", "adapted"}
    assert found["run"]["format"] == "as it is"
    for kind, memory in (("dense", "plain"), ("bfloat16", "lean"), ("int8", "fast"), ("4.9", "fast")):
        option = "--bits" if kind == "4.9" else "--format"
        found, _ = fit(
            capsys, option, kind, "--memory", memory, "--steps", "2", "--eval-share", "0.2", "--skip-dense"
        )
        assert found["perplexity"].keys() == ({"dense", "adapted"} if kind == "dense" else {"stored", "adapted"})
    assert found["run"]["format"] == "4.9 bits"
    assert main(["fit", "llama", "--data", "text.txt", "--bits", "4.9", "--dry-run"]) == 0
    assert "Budget(bits=4.9), LoRA" in capsys.readouterr().out
    assert "--format=nf4 does not apply" in refused("fit", "stored", "--data", "text.txt", "--format", "nf4")
    assert "--bits=4.9 does not apply" in refused("fit", "stored", "--data", "text.txt", "--bits", "4.9")
    for seconds in ("1e300", "1e14", "1e-7"):  # which a timedelta, PyTorch or a clock cannot count
        said = refused("fit", "llama", "--data", "text.txt", "--replicate", "--timeout", seconds)
        assert f"--timeout={float(seconds):g} must be from 0.001 to 100000000 seconds" in said


def test_early_stop_and_what_helps_after_a_loss_that_is_not_finite(place, capsys):
    options = ["--steps", "40", "--eval-data", "text.txt", "--eval-every", "2", "--patience", "1"]
    found, _ = fit(capsys, *options, "--lr", "0.3", "--save", "stopped")
    assert found["stopped_early"]
    assert found["adapter_after"] < found["steps"] < 40
    argv = ["llama", "--data", "data.jsonl", "--length", "48", "--steps", "6", "--save", "out", "--save-every", "1"]
    assert main(["fit", *argv, "--lr", "1e30", "--clip", "0"]) == 2
    shown = capsys.readouterr().err.splitlines()[-1]
    assert "lower lr=1e+30" in shown
    assert not Path("out").exists()
    shown = main(["fit", *argv, "--lr", "0.001", "--resume", "--clip", "0"]), capsys.readouterr().err
    assert shown[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a file's size are Linux's here")
def test_a_full_disk_leaves_no_adapter_and_a_whole_state(place, capsys):
    import resource
    import signal

    argv = ["llama", "--data", "data.jsonl", "--length", "48", "--steps", "4", "--save", "out", "--save-every", "2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (1000, 60_000):  # no state can be written; and none of what comes after
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            assert main(["fit", *argv, "--resume"]) == 2
            lines = capsys.readouterr().err.splitlines()
            assert "cannot write" in lines[-1]
            assert not Path("out").exists()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert main(["fit", *argv, "--resume"]) == 0
    assert Path("out", "adapter_model.safetensors").exists()
    assert list(place.glob(".lowmem-*")) == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_steps_in_a_dtype_that_slows_torch_compute_attention_in_float32(dry_run, place, monkeypatch):
    calls, own = [], dot_product_attention.scaled_dot_product_attention
    noted = lambda *given, **named: calls.append(torch.is_grad_enabled()) or own(*given, **named)  # noqa: E731
    monkeypatch.setattr(dot_product_attention, "scaled_dot_product_attention", noted)
    shutil.copytree("llama", "float16")
    load("llama").half().save_pretrained("float16")
    for folder in ("llama", "float16"):
        argv = ["fit", folder, "--data", "data.jsonl", "--length", "48", "--steps", "1", *["--dry-run"] * dry_run]
        assert main(argv) == 0
        assert any(calls) == (folder == "float16")


PAIRS = [{"prompt": f"{n} and {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n}, or {n}"} for n in range(24)]


def test_preferences_are_learned_and_go_on_to_the_byte(place, capsys, monkeypatch):
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    options = ["--method", "dpo", "--eval-share", "0.25", "--eval-every", "2", "--save-every", "1", "--steps", "6"]

    def run(out, *more):
        return fit(capsys, *options, "--save", out, "--metrics", f"{out}.jsonl", *more, data="pairs.jsonl")

    found, told = run("whole", "--plot", "whole.svg")
    with monkeypatch.context() as patch:
        step = loop._FineTuningRun._train_step

        def ending(self, number):
            step(self, number)
            if number == 3:
                raise Killed

        patch.setattr(loop._FineTuningRun, "_train_step", ending)
        with pytest.raises(Killed):
            run("parts")
    argv = [
        "fit",
        "llama",
        "--data",
        "pairs.jsonl",
        "--save",
        "parts",
        "--metrics",
        "parts.jsonl",
        "--resume",
        "--json",
    ]
    argv += ["--eval-share", "0.25"]
    assert main(argv) == 0
    resumed = json.loads(capsys.readouterr().out)
    names = ["adapter_model.safetensors", "training.json", "adapter_config.json"]
    assert [Path("parts", name).read_bytes() for name in names] == [
        Path("whole", name).read_bytes() for name in names
    ]
    assert (found["run"]["method"], found["run"]["beta"], found["perplexity"]) == ("dpo", 0.1, {})
    assert found["losses"] == resumed["losses"]
    assert found["losses"][0] == pytest.approx(0.6931472, abs=1e-3)
    assert found["held_out"]["accuracy"] == 1.0
    lines, others = (
        [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()] for out in ("whole", "parts")
    )
    names = ["loss", "accuracy", "margin", "held_out_loss", "held_out_accuracy", "held_out_margin"]
    assert [[line[name] for name in names] for line in lines] == [[line[name] for name in names] for line in others]
    assert [line["perplexity"] for line in lines] == [None] * 6
    assert {name: lines[-1][f"held_out_{name}"] for name in found["held_out"]} == found["held_out"]
    assert re.search(
        r"step 6/6  loss [\d.]+  accuracy [\d.]+  margin [\d.]+  held-out loss [\d.]+  held-out acc", told
    )
    assert "| Held-out accuracy | 1.0000 |" in Path("whole", "README.md").read_text()
    assert "examples are not packed" not in told
    assert "held-out pairs start at loss 0.6931, accuracy 0.5 and margin 0" in told
    assert "6 of 24 examples are held out to evaluate on\n" in told


def test_preferences_have_settings_of_their_own(place, capsys):
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    options = ["--data", "pairs.jsonl", "--method", "dpo", "--beta", "0.3", "--log", "csv"]
    assert main(["fit", "llama", *options, "--save", "out", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run"]
    assert [run[name] for name in ("lr", "beta", "batch_size", "accumulate")] == [5e-6, 0.3, 2, 4]
    assert main(["fit", "llama", *options[:2], "--config", "out/training.json", "--save", "again", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["run"]
    assert [again[name] for name in ("method", "beta", "lr")] == ["dpo", 0.3, 5e-6]
    names = Path("out.log", "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"accuracy", "margin", "held_out_loss"} < set(names)
    assert main(["fit", "llama", *options[:6], "--dry-run"]) == 0
    assert "of 4 rows of" in capsys.readouterr().out


def test_the_reference_of_a_run_from_an_adapter_is_that_adapter(place, capsys):
    fit(capsys, "--steps", "20", "--save", "out")
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    options = ["--data", "pairs.jsonl", "--method", "dpo", "--from", "out", "--steps", "1", "--eval-share", "0.5"]
    assert main(["fit", "llama", *options, "--lr", "1e-12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"] == [pytest.approx(0.6931472, abs=1e-3)]
    assert found["held_out"]["loss"] == pytest.approx(0.6931472, abs=1e-4)


def test_the_time_left_says_that_it_is_the_first_step_s_and_is_corrected_once(place, capsys):
    for steps, corrected in ((1, None), (3, ""), (5, ""), (6, "; corrected after step 5")):
        assert main(["fit", "llama", "--data", "text.txt", "--length", "48", "--steps", str(steps)]) == 0
        told = capsys.readouterr().out
        first = re.findall(
            r"^step 1 took .* s, with warm-up: at this rate the other (\d) take about (.*)$", told, re.M
        )
        again = re.findall(r"^steps 2 to 5 took \S+ s each: the other (\d) take about \d:\d\d:\d\d$", told, re.M)
        assert (len(first), len(again)) == (int(steps > 1), int(steps > 5))
        if first:
            assert first[0][0] == str(steps - 1)
            assert re.fullmatch(rf"\d:\d\d:\d\d{corrected}", first[0][1])
            assert told.index("step 1 took") < told.index("step 1/")


def test_after_the_first_step_its_warm_up_counts_no_more(capsys):
    report, lefts = fit_language._StepReporter(sys.stdout, torch.device("cpu")), []
    writer = SimpleNamespace(write=lambda line: lefts.append(line["seconds_left"]))
    for number in range(1, 8):
        step = loop.Step(10 + number, 17, 1.0, 1.0, 1e-3, 8, 9.0 if number == 1 else 0.5)
        report(step, lambda **_: None, [writer])
    assert lefts == [54.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0]
    told = [line for line in capsys.readouterr().out.splitlines() if " took " in line]
    assert told == [
        "step 11 took 9 s, with warm-up: at this rate the other 6 take about 0:00:54; corrected after step 15",
        "steps 12 to 15 took 0.5 s each: the other 2 take about 0:00:01",
    ]


@pytest.mark.parametrize(
    ("platform", "given", "waits", "said"),
    [
        (
            "linux",
            {},
            (1.0, 1.0 + 9.0, 1.0 + 13.0),
            ["in 10 s of steps, threads waited 9 s", "in 14 s of steps, threads waited 13 s"],
        ),
        ("linux", {}, (1.0, 1.0 + 4.9, 1.0 + 6.9), []),
        ("linux", {"GOMP_SPINCOUNT": "0"}, (1.0, 10.0, 14.0), []),
        ("linux", {"OMP_WAIT_POLICY": "passive"}, (1.0, 10.0, 14.0), []),
        ("darwin", {}, (1.0, 10.0, 14.0), []),
        ("linux", {}, (None, None, None), []),
    ],
    ids=["busy", "quiet", "spin count set", "wait policy set", "another OpenMP", "not counted"],
)
def test_where_threads_wait_for_cores_the_remedy_is_named(platform, given, waits, said, capsys, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    following = iter(waits)
    monkeypatch.setattr(fit_language, "thread_wait_seconds_or_none", lambda: next(following))
    report = fit_language._StepReporter(sys.stdout, torch.device("cpu"))
    for number in range(1, 8):
        report(loop.Step(number, 7, 1.0, 1.0, 1e-3, 8, 10.0 if number == 1 else 1.0), lambda **_: None, [])
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("other programs")]
    assert len(hints) == len(said)
    for hint, part in zip(hints, said, strict=True):
        assert part in hint
        assert "GOMP_SPINCOUNT=1000" in hint


def test_each_perplexity_is_printed_once_also_by_a_run_that_goes_on(place, capsys, monkeypatch):
    argv = ["fit", "llama", "--data", "text.txt", "--length", "48", "--steps", "3", "--eval-share", "0.2"]
    argv += ["--compare-dense", "--save", "out"]

    def printed():
        return re.findall(r"^perplexity of the held-out text, (\w+): \d+\.\d{4}$", capsys.readouterr().out, re.M)

    step = loop._FineTuningRun._train_step

    def ending(self, number):
        step(self, number)
        if number == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop._FineTuningRun, "_train_step", ending)
        with pytest.raises(Killed):
            main(argv)
    assert printed() == ["dense", "stored"]
    assert main([*argv[:-1], "other"]) == 0
    assert printed() == ["dense", "stored", "adapted"]
    assert main([*argv, "--resume"]) == 0
    assert printed() == ["dense", "stored", "adapted"]

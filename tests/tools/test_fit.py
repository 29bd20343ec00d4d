"""`lowmem fit` gives folders to one file and classifiers to another; options of the other are refused."""

import argparse
import os

import pytest

from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.tools import fit, fit_classifier
from lowmem.tools.arguments import option_string


def test_options_of_folders_mean_nothing_for_classifiers(refused, monkeypatch):
    monkeypatch.setattr(fit_classifier, "run", lambda arguments: pytest.fail("it ran"))
    given = {
        "format": "nf4",
        "for": "llama.cpp",
        "memory": "lean",
        "decay": "linear",
        "optimizer": "adamw",
        "eval_data": "a.txt",
        "plot": "a.png",
    }
    given |= dict.fromkeys(("skip_dense", "compare_dense", "rslora", "resume", "shard", "replicate", "cut"), "")
    given |= dict.fromkeys(("keep_base", "anyway"), "")
    given |= {"metrics": "a.jsonl", "eval_share": "0.1"}
    given |= {"clip": "0", "warmup": "0", "method": "dpo"}  # which are no defaults
    given |= {"log": "csv", "dropout": "0.5", "columns": "prompt=q", "template_kwargs": "{}", "skip_bad_rows": ""}
    parser = argparse.ArgumentParser()
    fit.add_language_model_arguments(parser)
    options = vars(parser.parse_args([]))
    assert len(options) > 20
    for name in options:
        option, value = f"--{name.replace('_', '-')}", given.get(name, "3")
        told = refused("fit", "lora", *([option, value] if value else [option]))
        assert told.startswith(f"lowmem fit: {option} does not apply to model='lora'")


def test_a_folder_that_is_missing_is_named_before_any_option(refused):
    for options in (["--length", "48"], ["--shard", "--save", "out"], []):
        told = refused("fit", "nope", *options)
        assert told.startswith("lowmem fit: model='nope' is neither an existing folder nor a variant (bignet, half_")


def test_a_dry_run_refuses_a_gpu(refused):
    told = refused("fit", "lora", "--dry-run", "--device", "cuda")
    assert "--dry-run measures a step on the CPU: leave --device=cuda out" in told


def test_classifiers_have_defaults_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(fit_classifier, "run", lambda arguments: seen.append(arguments) or 0)
    assert main(["fit", "lora", "--epochs", "3"]) == 0
    (arguments,) = seen
    assert {name: getattr(arguments, name) for name in fit_classifier.DEFAULTS} == fit_classifier.DEFAULTS | {
        "epochs": 3
    }


def test_a_second_classifier_on_one_file_ends_at_once(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(fit_classifier, "run", lambda arguments: 0)
    path = tmp_path / "out.safetensors"
    with exclusive_write_lock(path):
        assert main(["fit", "lora", "--save", str(path), "--dry-run"]) == 0
        monkeypatch.setattr(fit_classifier, "run", lambda arguments: pytest.fail("it ran"))
        told = refused("fit", "lora", "--save", path)
    assert f"out.safetensors' is being written by process {os.getpid()} of " in told
    seen = []
    monkeypatch.setattr(fit_classifier, "run", lambda arguments: seen.extend(tmp_path.iterdir()) or 0)
    assert main(["fit", "lora", "--save", str(path)]) == 0
    assert len(seen) == 2  # the lock, and the file that names its owner
    assert [*tmp_path.iterdir()] == []


def test_numbers_that_cannot_be_are_refused_by_the_parser(refused):
    for option in ("--rank", "--batch-size", "--steps", "--accumulate", "--lr", "--length", "--patience"):
        told = refused("fit", "llama", option, "0")
        assert told.startswith(f"lowmem fit: argument {option}")
        assert ": '0' must be a positive" in told


def test_options_have_the_names_that_other_programs_give_them():
    aliases = {
        "--learning-rate": ("lr", "0.5"),
        "--lora-r": ("rank", "3"),
        "--lora-alpha": ("alpha", "3"),
        "--max-length": ("length", "3"),
        "--gradient-accumulation-steps": ("accumulate", "3"),
        "--report-to": ("log", "csv"),
        "--output-dir": ("save", "out"),
    }
    parser = argparse.ArgumentParser(allow_abbrev=False)
    fit.add_arguments(parser)
    for alias, (name, value) in aliases.items():
        own = parser.parse_args(["llama", option_string(name), value])
        assert getattr(own, name) is not None
        assert parser.parse_args(["llama", alias, value]) == own

"""Values of arguments are parsed, or refused in one line; `--device` names the CPU or this process's GPU."""

import argparse

import pytest
import safetensors.torch
import torch

from lowmem import Budget, FourBit, Half, LoRA
from lowmem.tools import arguments
from lowmem.tools.arguments import parse_byte_size, parse_techniques, select_local_rank_device


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64"])
def test_input_has_the_shape_and_dtype_that_were_asked_for(dtype):
    parser = argparse.ArgumentParser()
    arguments.add_random_input_arguments(parser)
    given = parser.parse_args(["--batch", "2", "--input-shape", "3,4", "--input-dtype", dtype])
    x = arguments.make_random_or_zero_input(given)
    assert x.shape == (2, 3, 4)
    assert str(x.dtype) == f"torch.{dtype}"
    assert torch.equal(x, arguments.make_random_or_zero_input(given))
    given.seed = 1
    assert torch.equal(x, arguments.make_random_or_zero_input(given)) == (dtype == "int64")


@pytest.mark.parametrize(
    ("parse", "texts", "why"),
    [
        (
            arguments.parse_positive_int,
            ["0", "-1", "1.5", "", "a", "²", "000", str(2**63), "9" * 20, "9" * 5000, "1_0", " 1"],
            r"^.{,80} must be a positive integer below 2\*\*63$",
        ),
        (
            arguments.parse_nonnegative_int,
            ["-1", "", "0x1", str(2**63), "9" * 5000],
            r"must be an integer from 0 to 2\*\*63 - 1",
        ),
        (
            arguments.parse_positive_float,
            ["0", "-1", "nan", "inf", "", "a", "1_0", "\N{ARABIC-INDIC DIGIT ONE}", " 1", "1\n"],
            "must be a positive number",
        ),
        (
            arguments.parse_nonnegative_float,
            [
                *("-1", "-1e-300", "nan", "inf", "1e999", "", ".", "0.0.0", "0..0", "00.0.", "a", "1_0", "0_1e-3"),
                *("\N{ARABIC-INDIC DIGIT ONE}0", " 1", "1 "),
            ],
            "must be a number of at least 0",
        ),
        (parse_byte_size, ["", "0", "-1GB", "GB", "1XB", "1e3", "0.1"], "must be a size"),
    ],
)
def test_texts_that_are_no_such_numbers_are_refused(parse, texts, why):
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            parse(text)


def test_numbers_are_parsed():
    assert (arguments.parse_positive_int("12"), arguments.parse_positive_float("1e-3")) == (12, 0.001)
    assert arguments.parse_positive_int("0" * 5000 + "7") == 7
    assert (
        arguments.parse_positive_int(str(2**63 - 1)) == arguments.parse_nonnegative_int(str(2**63 - 1)) == 2**63 - 1
    )
    assert [arguments.parse_nonnegative_int(text) for text in ("0", "000", "12")] == [0, 0, 12]
    assert [arguments.parse_nonnegative_float(text) for text in ("0", "0.0", "00", ".0", "0e5", "1e-3")] == [
        0,
        0,
        0,
        0,
        0,
        0.001,
    ]


def test_sizes_have_units():
    for text, expected in {
        "3": 3,
        "2GB": 2 * 10**9,
        "3KB": 3000,
        "7MB": 7 * 10**6,
        "1GiB": 2**30,
        "1.5 KiB": 1536,
        "500mib": 500 * 2**20,
    }.items():
        assert parse_byte_size(text) == expected


def test_techniques_are_parsed():
    assert parse_techniques("Half,LoRA:4") == (Half(), LoRA(4))
    assert parse_techniques("FourBit") == (FourBit(),)
    assert parse_techniques("FourBit:fp4:32:double,LoRA") == (FourBit("fp4", 32, "double"), LoRA())
    assert parse_techniques("Half:bfloat16") == (Half(torch.bfloat16),)
    assert parse_techniques("Budget:4.4,LoRA") == (Budget(4.4), LoRA())


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs that nobody has; returns those that were chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


def test_each_process_has_a_gpu_of_its_own(gpus, monkeypatch):
    assert select_local_rank_device("cpu") == torch.device("cpu")
    assert gpus == []
    assert select_local_rank_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_local_rank_device("cuda") == torch.device("cuda", 1)
    assert gpus == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"--device=cuda: process 2 of .* of 2: .*torchrun --nproc-per-node 2"):
        select_local_rank_device("cuda")


@pytest.mark.parametrize(
    ("built", "why"), [(None, "is built without CUDA"), ("12.8", "finds no GPU that it can use")]
)
def test_without_a_gpu_both_kinds_of_fit_say_what_to_do(built, why, monkeypatch, refused, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    for model in ("lora", str(tmp_path)):
        told = refused("fit", model, "--data", tmp_path / "none.txt", "--device", "cuda")
        assert told.startswith("lowmem fit: --device=cuda: torch ")
        assert f"{why}: leave --device out to use the CPU" in told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_commands_run_on_a_gpu(results, tmp_path):
    gpu = ("--device", "cuda")
    names = ("bignet", "qlora_4bit")
    for training in ((), ("--training", "adamw8bit")):
        here, there = (results("stats", *names, *training, *device) for device in ((), gpu))
        assert [row["model"] for row in there] == [row["model"] for row in here]
    (found,) = results("compare", *names, *gpu)
    assert abs(found["relative_error"] - results("compare", *names)[0]["relative_error"]) < 1e-3
    weights = {"weight": torch.randn(64, 96, generator=torch.Generator().manual_seed(0))}
    safetensors.torch.save_file(weights, tmp_path / "in.safetensors")
    for name, device in {"cpu": (), "gpu": gpu}.items():
        options = ("--format", "nf4", "--no-search", *device)  # the search adds up errors, in another order
        results("quantize", str(tmp_path / "in.safetensors"), str(tmp_path / f"{name}.safetensors"), *options)
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()

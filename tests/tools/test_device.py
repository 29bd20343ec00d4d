"""`--device`: the CPU, the first GPU, or the one that torchrun means; what is missing is one error."""

import pytest
import torch

from lowmem.__main__ import main
from lowmem.tools.device import device_of


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
    assert device_of("cpu") == torch.device("cpu")
    assert gpus == []
    assert device_of("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("cuda") == torch.device("cuda", 1)
    assert gpus == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"--device=cuda: process 2 of .* of 2: .*torchrun --nproc-per-node 2"):
        device_of("cuda")


@pytest.mark.parametrize(
    ("built", "why"), [(None, "is built without CUDA"), ("12.8", "finds no GPU that it can use")]
)
def test_without_a_gpu_both_kinds_of_fit_say_what_to_do(built, why, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    for model in ("lora", str(tmp_path)):
        assert main(["fit", model, "--data", str(tmp_path / "none.txt"), "--device", "cuda"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("lowmem fit: --device=cuda: torch ")
        assert f"{why}: leave --device out to train on the CPU" in told
        assert told.count("\n") == 1

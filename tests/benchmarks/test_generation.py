"""The benchmark of generation: what each row computes, which logits it accepts, and what its table says."""

import pytest
import torch

from benchmarks import generation
from benchmarks.generation import DENSE, EXACT, FIGURES, PACKAGES, PROMPT, ROUNDING, ROWS
from tests.benchmarks.test_resident import needs_high_water

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    generation.make(folder, "tiny")
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_sequences_continue_the_prompt_with_the_likeliest_tokens(row, tiny):
    for kind, package in PACKAGES.items():
        if row.startswith(kind):
            pytest.importorskip(package)
    model = generation.model_of(row, tiny)
    model.start()
    first, tokens, logits = model.logits[0].float(), [], []
    for _ in range(6):
        logits.append(model.logits[0].float())
        tokens += model.likeliest
        model.step()
    assert tokens == [int(one.argmax()) for one in logits]
    if row.endswith("float32"):  # where no two are equally likely
        assert model.generate(6)[0, PROMPT:].tolist() == tokens
    model.start(3)
    assert model.likeliest == tokens[:1] * 3
    model.step()
    assert model.logits.shape[0] == 3
    assert all(near(one, logits[1]) for one in model.logits)
    assert not near(first, logits[1])
    if not row.startswith(DENSE):
        exact = generation.model_of(EXACT, tiny)
        exact.start()
        assert near(first, exact.logits[0])


def near(found, expected):
    return (found - expected).norm() <= ROUNDING * expected.norm()


def test_logits_beyond_rounding_are_named(tmp_path, capsys):
    exact = torch.eye(3)[0]
    for row, logits in ((EXACT, exact), ("lowmem bfloat16", 1.1 * exact), ("llama.cpp", exact.flip(0))):
        torch.save(logits, tmp_path / f"{row}.pt")
    rows = [EXACT, "lowmem bfloat16", f"{DENSE[0]} float32", "llama.cpp"]
    assert generation.differing(tmp_path, rows) == ["llama.cpp"]
    assert "llama.cpp: logits differ by 1.4 of their norm" in capsys.readouterr().err
    torch.save(exact * float("nan"), tmp_path / "lowmem bfloat16.pt")
    assert generation.differing(tmp_path, [EXACT, "lowmem bfloat16"]) == ["lowmem bfloat16"]
    assert generation.differing(tmp_path, ["llama.cpp"]) == []  # nothing to hold it against


def test_the_table_has_medians_of_processes_and_the_exit_code_tells_of_logits(tmp_path, monkeypatch, capsys):
    order, far = [], []

    def measure(row, folder, threads):
        order.append((row, threads))
        return {name: 10.0 * len(order) for name in FIGURES} | ({"generate": None} if row == "llama.cpp" else {})

    monkeypatch.setattr(generation, "make", lambda *_: None)
    monkeypatch.setattr(generation, "measure_apart", measure)
    monkeypatch.setattr(generation, "differing", lambda *_: far)
    monkeypatch.setattr(generation, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    monkeypatch.setattr(generation, "version", lambda name: "1.2")
    rows = [
        "--rows",
        "bits*",
        "lowmem float32",
        "prepared float32",
        "llama.cpp",
        "--threads",
        "3",
        "--folder",
        str(tmp_path),
    ]
    assert generation.main(rows) == 0
    named = ["lowmem float32", "prepared float32", "llama.cpp"]
    assert order == [(row, 3) for row in named] * 3
    out, err = capsys.readouterr()
    assert err == "bitsandbytes is left out, since bitsandbytes is not installed\n"
    assert "3 threads" in out
    assert "llama_cpp_py_sync 1.2" in out
    assert "| lowmem float32 | 40 | 40 | 40 | 40 | 40 | 40 | 40 |" in out
    assert out.endswith("| llama.cpp | 60 |  | 60 | 60 | 60 | 60 | 60 |\n")
    far.append("llama.cpp")
    assert generation.main(rows) == 1
    with pytest.raises(SystemExit, match="2"):
        generation.main(["--rows", "lama.cpp"])
    assert "--rows lama.cpp matches none of transformers bfloat16" in capsys.readouterr().err


@pytest.mark.processes
@needs_high_water
def test_a_process_measures_speeds_and_memory_beyond_a_tiny_model_s(tiny, tmp_path):
    (tmp_path / "tiny").symlink_to(tiny)
    generation.make(tmp_path, "tiny")
    found = generation.measure_apart(EXACT, tmp_path, 1)
    assert tuple(found) == FIGURES
    assert 0 < found["kept"] <= found["peak"] < 20  # MiB of keys and values and what lies beside; torch has 200
    assert all(found[name] > 1 for name in ("decode", "prefill", "sequences"))
    assert torch.load(tmp_path / f"{EXACT}.pt").shape == (512,)

"""``lowmem quantize``."""

import argparse
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import nn

import lowmem
from lowmem.__main__ import main
from lowmem.io.atomic import owned
from lowmem.tools.models import size
from tests.selection import rows_in_one_case


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def make():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def test_it_prints_a_table_and_writes_what_loads(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    options = ["--format", "bof4s", "--block-size", "16", "--scales", "float16", "--exclude", "2.*"]
    assert main(["quantize", str(checkpoint), str(out), *options]) == 0
    shown = capsys.readouterr()
    assert "64 x 64" in shown.out
    assert "copied" in shown.out
    assert "converted 1 of 6 tensors: 0.02 MiB became 0.01 MiB" in shown.out
    assert f"saved {out}" in shown.err
    model = lowmem.load(out, make)
    form = model[0].forms["weight"]
    assert (form.format, form.block_size, form.scale_encoding) == ("bof4s", 16, "float16")
    assert type(model[2]) is nn.Linear


def test_without_a_format_it_stores_as_four_bit_does(checkpoint):
    out = checkpoint.with_name("out.safetensors")
    assert main(["quantize", str(checkpoint), str(out)]) == 0
    expected = make()
    expected.load_state_dict(safetensors.torch.load_file(checkpoint))
    lowmem.save(lowmem.convert(expected, lowmem.FourBit()), checkpoint.with_name("memory"))
    assert out.read_bytes() == checkpoint.with_name("memory").read_bytes()
    assert lowmem.load(out, make)[0].forms["weight"].block_size == 32


def test_bits_are_divided_and_the_table_says_what_for(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    assert main(["quantize", str(checkpoint), str(out), "--bits", "5.2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Chosen" in shown
    assert "5.1528 bits" in shown
    assert "bits a weight that is converted, of --bits 5.2" in shown
    expected = lowmem.convert(lowmem.load(out, make), lowmem.LoRA(2))  # what was written loads, and takes adapters
    assert {expected[0].forms["weight"].format, expected[2].forms["weight"].format} == {"bof4s", "int8"}
    assert main(["quantize", str(checkpoint), str(out), "--bits", "4.1"]) == 2
    assert "Budget(bits=4.1) is out of reach: these weights take 4.3" in capsys.readouterr().err
    assert main(["quantize", str(checkpoint), str(out), "--bits", "4.9", "--format", "nf4"]) == 2
    assert "--format does not apply to 'in.safetensors': --bits chooses it" in capsys.readouterr().err


def test_what_another_command_is_writing_is_refused(checkpoint, capsys):
    out = checkpoint.with_name("out")
    with owned(out):  # as lowmem fit --save does from its first step to its last
        assert main(["quantize", str(checkpoint), str(out)]) == 2
    assert f"'{out}' is being written by process {os.getpid()} of " in capsys.readouterr().err
    assert not out.exists()


def test_json_and_shards(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    options = ["--json", "--search", "--include", "0.*", "--include", "2.*", "--shard-size", "2.5KB"]
    assert main(["quantize", str(checkpoint), str(out), *options]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if row["converted"]] == ["0.weight", "2.weight"]
    assert all((row["error"] is not None) == row["converted"] for row in rows)
    assert lowmem.load(f"{out}.index.json", make)[0].quantized.method == "search"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "q4"], "invalid choice: 'q4'"),
        (["--block-size", "7"], "block_size=7 must be an even number"),
        (["--shard-size", "many"], "'many' must be a size such as 2GB"),
        (["--include", "nothing*"], "matches no tensor"),
        (["--shard-size", "9" * 400 + "GB"], "must be a size"),
    ],
)
def test_bad_options_are_one_line(checkpoint, options, message, capsys):
    try:
        code = main(["quantize", str(checkpoint), str(checkpoint) + "x", *options])
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    assert code == 2
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["in.safetensors"]


@pytest.mark.processes
def test_what_was_told_to_end_leaves_no_half_file(checkpoint):
    script = (
        "import os, signal, sys\n"
        "import lowmem.tools.quantize as q\n"
        "from lowmem.__main__ import main\n"
        "q.convert_checkpoint.__globals__['relative_error'] = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = checkpoint.with_name("out.safetensors")
    ended = subprocess.run(
        [sys.executable, "-c", script, "quantize", str(checkpoint), str(out)], capture_output=True, text=True
    )
    assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (2, 1)
    assert "interrupted" in ended.stderr
    assert [path.name for path in checkpoint.parent.iterdir()] == ["in.safetensors"]


def test_names_are_printed_as_they_are(checkpoint, capsys):
    state = {"w[bold].weight": torch.ones(2, 8), "[/x].weight": torch.ones(2, 8)}
    safetensors.torch.save_file(state, checkpoint)
    assert main(["quantize", str(checkpoint), str(checkpoint.with_name("out"))]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in state)


def test_names_are_shown_without_control_characters(checkpoint, capsys):
    state = {"w\x1b[31m\u202e\n.weight": torch.ones(2, 8)}
    safetensors.torch.save_file(state, checkpoint)
    out = checkpoint.with_name("out\x1b[31m")
    assert main(["quantize", str(checkpoint), str(out)]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    assert r"w\x1b[31m\u202e\n.weight" in shown.out
    assert main(["quantize", str(checkpoint), str(out), "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(state)
    assert main(["quantize", str(checkpoint), str(out), "--exclude", "\x1b*"]) == 2
    assert capsys.readouterr().err[:-1].isprintable()


def test_a_checkpoint_without_tensors_is_one_line(checkpoint, capsys):
    safetensors.torch.save_file({}, checkpoint)
    assert main(["quantize", str(checkpoint), str(checkpoint) + "x"]) == 2
    said = capsys.readouterr().err
    assert f"{str(checkpoint)!r}: it holds no tensors; name a checkpoint that has some" in said
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets few users make links")
def test_links_that_loop_are_one_line(checkpoint, capsys):
    loop = checkpoint.with_name("loop")
    loop.symlink_to("loop")
    index = checkpoint.with_name("in.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"w": "loop"}}))
    for argv in ((loop, "out"), (checkpoint, loop), (checkpoint, loop / "out"), (index, checkpoint.with_name("out"))):
        assert main(["quantize", *map(str, argv)]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert "loop" in shown
    assert os.readlink(loop) == "loop"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] err. DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_one_line_and_leaves_nothing(checkpoint, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("lowmem.io.source.Source.read_tensor", fail)
    assert main(["quantize", str(checkpoint), str(checkpoint) + "x"]) == 2
    shown = capsys.readouterr().err
    assert "memory" in shown.lower()
    assert "cpp" not in shown
    assert shown.count("\n") == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["in.safetensors"]


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems don't keep to RLIMIT_AS")
@pytest.mark.parametrize("command", ["quantize", "bundle"])
def test_a_system_that_gives_no_more_memory_is_one_line(checkpoint, command):
    """The limit is 64 MiB above what the process has; the tensor, or the file to bundle, takes 256 MiB."""
    safetensors.torch.save_file({"a.weight": torch.ones(2**13, 2**13)}, checkpoint)
    (checkpoint.parent / "__main__.py").touch()
    script = (
        "import resource, sys, torch\n"
        "from lowmem.__main__ import main\n"
        "import lowmem.tools.quantize, lowmem.tools.bundle\n"
        "torch.set_num_threads(1)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "most = pages * resource.getpagesize() + 2**26\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = [str(checkpoint if command == "quantize" else checkpoint.parent), str(checkpoint.with_name("out"))]
    ended = subprocess.run(
        [sys.executable, "-c", script, command, *argv], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"lowmem {command}: out of memory; ")
    assert ended.stderr.count("\n") == 1
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["__main__.py", "in.safetensors"]


def test_bad_files_are_one_line(checkpoint, capsys):
    (checkpoint.parent / "p.bin").write_bytes(b"\x80\x04.")
    for source in (checkpoint.parent, checkpoint.parent / "none", checkpoint.parent / "p.bin"):
        assert main(["quantize", str(source), str(checkpoint) + "x"]) == 2
        shown = capsys.readouterr()
        assert str(source) in shown.err
        assert len(shown.err.strip().splitlines()) == 1


@rows_in_one_case(
    ("text", "expected"),
    [
        ("3", 3),
        ("2GB", 2 * 10**9),
        ("3KB", 3000),
        ("7MB", 7 * 10**6),
        ("1GiB", 2**30),
        ("1.5 KiB", 1536),
        ("500mib", 500 * 2**20),
    ],
)
def test_sizes(text, expected):
    assert size(text) == expected


@rows_in_one_case("text", ["", "0", "-1GB", "GB", "1XB", "1e3", "0.1"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size"):
        size(text)


@pytest.mark.parametrize(("argv", "which"), [(["", "out"], "IN"), (["in", ""], "OUT")])
def test_an_empty_name_is_named_as_it_was_given(argv, which, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", *argv])
    assert f"argument {which}: '' must be the name of a file" in capsys.readouterr().err


def test_a_folder_of_transformers_is_given_to_its_integration(tmp_path, monkeypatch, capsys):
    """What transformers does is held where it is installed: tests/integrations."""
    folder = ModuleType("lowmem.integrations.transformers.folder")
    calls = []
    folder.quantize_folder = lambda *given, **named: calls.append((given, named)) or []
    for module in ("lowmem.integrations.transformers", "lowmem.integrations.transformers.folder"):
        monkeypatch.setitem(sys.modules, module, folder)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama"}')
    given = ["quantize", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "int4", "--exclude", "lm_head", "--shard-size", "1MiB"]) == 0
    ((source, target, technique), named) = calls.pop()
    assert (source, target) == (tmp_path / "in", tmp_path / "out")
    assert technique == lowmem.FourBit("int4")
    assert named == {"skip": ["lm_head"], "shard_bytes": 2**20}
    capsys.readouterr()
    assert main([*given, "--include", "*.weight"]) == 2
    assert "--include does not apply to 'in': it names tensors of a file" in capsys.readouterr().err
    assert calls == []

"""``lowmem quantize``."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
import safetensors.torch
import torch
from torch import nn

import lowmem
from lowmem.__main__ import main
from lowmem.io.filesystem import exclusive_write_lock
from lowmem.tools.quantize import OPTIONS, REFUSALS
from tests.io.formats.folders import CONFIG, fourbit, shapes, weights_of, write_folder
from tests.io.formats.test_open_foreign import SAMPLES


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def make():
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def test_it_prints_a_summary_and_tensors_if_asked(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    for options in ([], ["--bits", "5.2"]):
        assert main(["quantize", str(checkpoint), str(out), *options, "--json"]) == 0
        errors = {row["name"]: row["error"] for row in json.loads(capsys.readouterr().out) if row["converted"]}
        assert main(["quantize", str(checkpoint), str(out), *options]) == 0
        told = capsys.readouterr().out.splitlines()
        assert told[0].startswith("converted 2 of 6 tensors: 0.02 MiB became ")
        if not options:
            worst = max(errors, key=errors.get)
            assert told[1:] == [
                "2 as bof4s, block_size=32, scales=double: a relative error of at most "
                f"{errors[worst]:.4f}, of {worst}"
            ]
        else:
            assert [line.partition(", ")[0] for line in told[1:-1]] == ["1 as bof4s", "1 as int8"]
            assert told[-1].endswith("of --bits 5.2")
        assert main(["quantize", str(checkpoint), str(out), *options, "--verbose"]) == 0
        table, *summary = capsys.readouterr().out.partition(told[0])
        assert "".join(summary).splitlines() == told
        assert all(name in table for name in safetensors.torch.load_file(checkpoint))


def test_quantize_prints_a_table_and_writes_a_file_that_loads(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    options = ["--format", "bof4s", "--block-size", "16", "--scales", "float16", "--exclude", "2.*", "--verbose"]
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


def test_bits_are_divided_and_the_table_says_why(checkpoint, capsys):
    out = checkpoint.with_name("out.safetensors")
    assert main(["quantize", str(checkpoint), str(out), "--bits", "5.2", "--verbose"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Chosen" in shown
    assert "5.1528 bits" in shown
    assert "bits a weight that is converted, of --bits 5.2" in shown
    expected = lowmem.convert(lowmem.load(out, make), lowmem.LoRA(2))  # what was written loads, and takes adapters
    assert {expected[0].forms["weight"].format, expected[2].forms["weight"].format} == {"bof4s", "int8"}


def test_a_target_that_another_command_writes_is_refused(checkpoint, capsys):
    out = checkpoint.with_name("out")
    with exclusive_write_lock(out):  # as lowmem fit --save does from its first step to its last
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
        (["--bits", "4.1"], "Budget(bits=4.1) is out of reach: these weights take 4.3"),
    ],
)
def test_bad_options_are_one_line(checkpoint, options, message, refused):
    assert message in refused("quantize", checkpoint, f"{checkpoint}x", *options)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["in.safetensors"]


def test_a_place_in_the_input_s_folder_is_refused(tmp_path, refused):
    write_folder(tmp_path / "foreign", weights_of(fourbit("nf4")))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    for name in ("foreign", "dense"):
        before = sorted((tmp_path / name).iterdir())
        for out in ("out", "out.safetensors", "a/out"):
            told = refused("quantize", tmp_path / name, tmp_path / name / out)
            assert "lies in IN=" in told
            assert told.endswith(", which it would change: name a place outside\n")
        assert sorted((tmp_path / name).iterdir()) == before
    options = ["--calibrate", "self", "--resume", tmp_path / "dense" / "done"]
    assert "lies in IN=" in refused("quantize", tmp_path / "dense", tmp_path / "out", *options)
    for place, told in (("out", "is OUT, which would be lost"), ("out/done", "lies in OUT=")):
        options[-1] = tmp_path / place
        assert told in refused("quantize", tmp_path / "dense", tmp_path / "out", *options)


@pytest.mark.processes
def test_a_terminated_process_leaves_no_half_file(checkpoint):
    script = (
        "import os, signal, sys\n"
        "import lowmem.tools.quantize as q\n"
        "from lowmem.__main__ import main\n"
        "q.convert_checkpoint.__globals__['recorded_or_measured_squares'] = lambda *_: os.kill(os.getpid(), "
        "signal.SIGTERM)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    out = checkpoint.with_name("out.safetensors")
    ended = subprocess.run(
        [sys.executable, "-c", script, "quantize", str(checkpoint), str(out)], capture_output=True, text=True
    )
    assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (143, 1)  # 128 + SIGTERM
    assert "interrupted" in ended.stderr
    assert [path.name for path in checkpoint.parent.iterdir()] == ["in.safetensors"]


def test_names_are_shown_without_control_characters_and_without_markup(checkpoint, capsys):
    state = {f"w{name}.weight": torch.ones(2, 8) for name in ("\x1b[31m\u202e\n", "[bold]", "[/x]")}
    safetensors.torch.save_file(state, checkpoint)
    out = checkpoint.with_name("out\x1b[31m")
    assert main(["quantize", str(checkpoint), str(out), "--verbose"]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).replace("\n", "").isprintable()
    for name in (r"w\x1b[31m\u202e\n.weight", "w[bold].weight", "w[/x].weight"):
        assert name in shown.out
    assert main(["quantize", str(checkpoint), str(out), "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {*state}


def test_bad_files_are_one_line(checkpoint, refused):
    (checkpoint.parent / "p.bin").write_bytes(b"\x80\x04.")
    for source in (checkpoint.parent, checkpoint.parent / "none", checkpoint.parent / "p.bin"):
        assert str(source) in refused("quantize", source, f"{checkpoint}x")
    safetensors.torch.save_file({}, checkpoint)
    told = refused("quantize", checkpoint, f"{checkpoint}x")
    assert f"{str(checkpoint)!r}: it holds no tensors; name a checkpoint that has some" in told


@pytest.mark.skipif(sys.platform == "win32", reason="Windows lets few users make links")
def test_links_that_loop_are_one_line(checkpoint, refused):
    loop = checkpoint.with_name("loop")
    loop.symlink_to("loop")
    index = checkpoint.with_name("in.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"w": "loop"}}))
    for argv in ((loop, "out"), (checkpoint, loop), (checkpoint, loop / "out"), (index, checkpoint.with_name("out"))):
        assert "loop" in refused("quantize", *argv)
    assert os.readlink(loop) == "loop"


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


@pytest.mark.parametrize(("argv", "which"), [(["", "out"], "IN"), (["in", ""], "OUT")])
def test_an_empty_name_is_named_as_it_was_given(argv, which, refused):
    assert f"argument {which}: '' must be the name of a file" in refused("quantize", *argv)


def test_a_folder_of_transformers_is_given_to_its_integration(tmp_path, monkeypatch, capsys):
    """What transformers does is held where it is installed: tests/integrations."""
    folder = ModuleType("lowmem.integrations.transformers.pretrained_folder")
    calls = []
    folder.quantize_folder = lambda *given, **named: calls.append((given, named)) or []
    folder.self_calibration_hint_or_none = lambda source, count: f"{source.name} may be calibrated"
    for module in ("", ".pretrained_folder", ".folder_calibration"):
        monkeypatch.setitem(sys.modules, f"lowmem.integrations.transformers{module}", folder)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text('{"model_type": "llama"}')
    given = ["quantize", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*given, "--format", "int4", "--exclude", "lm_head", "--shard-size", "1MiB"]) == 0
    assert "lowmem quantize: in may be calibrated" in capsys.readouterr().err
    ((source, target, technique), named) = calls.pop()
    assert (source, target) == (tmp_path / "in", tmp_path / "out")
    assert technique == lowmem.FourBit("int4")
    assert named == {"skip": ["lm_head"], "shard_bytes": 2**20, "device": torch.device("cpu")}


GIVEN = {
    "bits": ["--bits", "6"],
    "format": ["--format", "bof4s"],
    "block_size": ["--block-size", "16"],
    "scales": ["--scales", "float32"],
    "search": ["--search"],
    "embeddings": ["--embeddings", "4bit"],
    "compute": ["--compute", "int8"],
    "include": ["--include", "*"],
    "exclude": ["--exclude", "*up_proj*"],
    "shard_size": ["--shard-size", "1MB"],
    "requantize": ["--requantize"],
    "dtype": ["--dtype", "bfloat16"],
    "calibrate": ["--calibrate", "self"],
    "diagonal": ["--diagonal"],
    "resume": ["--resume", "done"],
    "device": ["--device", "cuda"],
    "no_tokenizer": ["--no-tokenizer"],
    "for": ["--for", "llama.cpp"],
}
TECHNIQUE = {"format", "block_size", "scales", "search"}
HEEDED = {
    "a dense file": TECHNIQUE | {"bits", "include", "exclude", "shard_size", "device"},
    "a dense folder": TECHNIQUE
    | {"bits", "embeddings", "compute", "exclude", "shard_size", "calibrate", "device", "for"},
    "another program's": {"include", "shard_size", "requantize", "dtype"},
}
"""By the kind of input, the options that mean something when they are given alone."""


@pytest.fixture
def inputs(tmp_path):
    """One input of each kind, and where to write."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in shapes()}
    safetensors.torch.save_file(weights, tmp_path / "dense.safetensors")
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(weights, tmp_path / "folder" / "model.safetensors", {"format": "pt"})
    (tmp_path / "folder" / "config.json").write_text(json.dumps(CONFIG))
    name = "bitsandbytes-nf4.safetensors"
    parts = safetensors.torch.load_file(SAMPLES / name) | {"up_proj.weight": torch.randn(4, 64)}
    safetensors.torch.save_file(parts, tmp_path / name)
    return {
        "a dense file": ("dense.safetensors", "out.safetensors"),
        "a dense folder": ("folder", "out"),
        "another program's": (name, "out.safetensors"),
    }


@pytest.fixture
def quantized(tmp_path, inputs, capsys):
    """Return a function that quantizes an input of a kind, and returns the exit code and what was said."""

    def run(kind, *options):
        source, out = inputs[kind]
        before = {*tmp_path.iterdir()}
        capsys.readouterr()
        code = main(["quantize", str(tmp_path / source), str(tmp_path / out), *options])
        written = {*tmp_path.iterdir()} - before
        assert bool(written) == (code == 0)
        for path in written:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return code, capsys.readouterr().err

    return run


def test_an_option_is_heeded_or_an_error_of_one_line_that_names_it(quantized, monkeypatch):
    monkeypatch.setattr("lowmem.tools.quantize.select_local_rank_device", lambda name: torch.device("cpu"))
    assert (GIVEN.keys(), HEEDED.keys()) == ({*OPTIONS}, REFUSALS.keys())
    for kind, option in itertools.product(REFUSALS, OPTIONS):
        if option in HEEDED[kind] and kind.endswith("folder"):
            continue  # they take transformers, and the test below
        code, said = quantized(kind, *GIVEN[option])
        assert code == (0 if option in HEEDED[kind] else 2), (kind, option, said)
        if code == 2:
            assert said.count("\n") == 1
            assert f"{GIVEN[option][0]} does not apply to" in said
            assert "leave" in said
            assert len(said) < 300


def test_options_of_a_technique_apply_to_foreign_weights_that_are_quantized(quantized):
    """--include and --requantize ask for that; and --no-search is an option, too."""
    kind = "another program's"
    for asked, option in itertools.product(("include", "requantize"), sorted(TECHNIQUE)):
        assert quantized(kind, *GIVEN[asked], *GIVEN[option])[0] == 0
    assert quantized(kind, "--no-search")[0] == 2
    assert quantized("a dense file", "--no-search")[0] == 0


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("a dense folder", ("bits", "embeddings"), "--embeddings"),
        ("a dense folder", ("bits", "format"), "--format"),
        ("a dense folder", ("calibrate", "diagonal", "resume"), "--resume"),
        ("a dense file", ("bits", "block_size"), "--block-size"),
        ("a dense file", ("int8", "search"), "--search"),
        ("a dense folder", ("int8", "embeddings"), "--embeddings"),
        *(
            ("a dense folder", ("for", option), f"--{option.replace('_', '-')}")
            for option in (*sorted(TECHNIQUE), "embeddings", "bits")
        ),
    ],
)
def test_options_that_exclude_each_other(quantized, kind, options, named):
    given = GIVEN | {"int8": ["--format", "int8"]}  # 8 bits have neither a search nor other embeddings
    code, said = quantized(kind, *(text for one in options for text in given[one]))
    assert (code, said.count("\n")) == (2, 1)
    assert f"{named} does not apply to" in said
    assert ("leave it out" if "int8" in options else "use only one of them") in said


def test_each_heeded_option_changes_what_is_written(tmp_path, inputs):
    for kind in ("a dense file", "another program's"):
        source, out = (tmp_path / name for name in inputs[kind])
        assert main(["quantize", str(source), str(out)]) == 0
        plain = out.read_bytes()
        out.unlink()
        for option in HEEDED[kind] - {"requantize", "device"}:  # nothing in it needs the first
            options = ["--include", "*.mlp.*"] if option == "include" and kind == "a dense file" else GIVEN[option]
            options = ["--no-search"] if option == "search" else options  # the default format is searched for
            assert main(["quantize", str(source), str(out), *options]) == 0
            if option == "shard_size":
                assert out.with_name(f"{out.name}.index.json").exists()
            else:
                assert out.read_bytes() != plain, (kind, option)
            out.unlink(missing_ok=True)


def test_folders_heed_what_they_take(quantized):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    for option in sorted(
        HEEDED["a dense folder"] - {"calibrate", "device"}
    ):  # it takes a tokenizer: tests/integrations
        options = ["--exclude", "*.up_proj"] if option == "exclude" else GIVEN[option]
        code, said = quantized("a dense folder", *options)
        assert code == 0, (option, said)


def test_without_a_gpu_device_is_one_line(no_gpu, checkpoint):
    no_gpu("quantize", checkpoint, checkpoint.with_name("out.safetensors"))


def test_for_llama_cpp_refuses_a_model_that_export_does_not_write(quantized, inputs, tmp_path):
    pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")
    config = tmp_path / "folder" / "config.json"
    config.write_text(json.dumps(CONFIG | {"model_type": "gemma2"}))
    code, said = quantized("a dense folder", "--for", "llama.cpp")
    assert (code, said.count("\n")) == (2, 1)
    assert "model_type='gemma2' is no architecture that lowmem writes as GGUF: it writes llama, mistral" in said
    assert said.endswith("; leave --for llama.cpp out\n")
    config.write_text(json.dumps(CONFIG))
    code, said = quantized("a dense folder", "--for", "llama.cpp")
    assert (code, said.count("export to GGUF: exact, so that llama.cpp computes with")) == (0, 1)
    assert "train" not in said  # nothing was
    record = {"quant_method": "lowmem: import lowmem.integrations.transformers", "version": 1, "layers": []}
    config.write_text(json.dumps(CONFIG | {"quantization_config": record}))
    code, said = quantized("a dense folder", "--for", "llama.cpp")
    assert "it is quantized by lowmem already" in said

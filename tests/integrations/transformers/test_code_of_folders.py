"""No command and no function that reads a folder runs code of it, also where stdin says yes to every question.

transformers asks on stdin whether to run the code that a folder names, and a pipe or a chat may begin with ``y``.
"""

import io
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel

import lowmem
from lowmem import FileError, FourBit, LoRA
from lowmem.__main__ import main
from lowmem.integrations.transformers import LowmemConfig, from_exact
from lowmem.integrations.transformers.adapted_folder import write_base_with_adapter, write_base_with_tokenizer
from lowmem.integrations.transformers.folder_calibration import load_calibrate_and_write_folder
from lowmem.integrations.transformers.foreign_checkpoint import transformers_config
from lowmem.integrations.transformers.model_facts import (
    dense_model_factory,
    model_class_from_path,
    quantizing_program_or_none,
    read_language_model_sizes,
)
from lowmem.integrations.transformers.pretrained_folder import (
    check_tensors_fit_config,
    import_foreign_folder,
    load_folder,
    load_folder_or_gguf,
    load_gguf,
    quantize_folder,
)
from lowmem.integrations.transformers.text_comparison import compare_folders_on_text
from lowmem.integrations.transformers.text_generation import open_model_and_tokenizer
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from lowmem.io.formats.gguf.gguf_tokenizer_fields import tokenizer_and_chat_template_fields
from lowmem.io.import_foreign_checkpoint import import_foreign_checkpoint
from lowmem.tools import COMMANDS
from tests.integrations.transformers.folders import load, write
from tests.integrations.transformers.foreign import write_foreign
from tests.integrations.transformers.tokens import write_tokenizer

YES = "y\n" * 100
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
AUTO = ("Config", "Model", "ModelForCausalLM", "Backbone", "Processor", "ImageProcessor", "FeatureExtractor")
AUTO_MAP = {f"Auto{name}": "evil.Evil" for name in AUTO}
OWN_TOKENIZER = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT |= {"intermediate_size": 32, "image_size": 8, "patch_size": 4}


def change(file: Path, **changes) -> None:
    """Change keys of a JSON file, which may not be there yet."""
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def plain(folder: Path) -> Path:
    write_tokenizer(write(folder))
    change(folder / "tokenizer_config.json", chat_template=CHAT)
    return folder


def own_config(folder: Path) -> Path:
    """Its config is code."""
    change(
        plain(folder) / "config.json", model_type="evil", architectures=["AutoModelForCausalLM"], auto_map=AUTO_MAP
    )
    return folder


def own_model(folder: Path) -> Path:
    """transformers has its config, and no language model of that."""
    change(plain(folder) / "config.json", **VIT, architectures=["AutoModelForCausalLM"], auto_map=AUTO_MAP)
    return folder


def inner_model(folder: Path) -> Path:
    """The config of a model in the model names code: transformers asks where it makes that."""
    decoder = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 258, "n_positions": 8}
    decoder |= {"bos_token_id": 1, "eos_token_id": 2, "add_cross_attention": True}
    config = VisionEncoderDecoderConfig(encoder=VIT, decoder=decoder)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    change(folder / "config.json", decoder=VIT | {"auto_map": AUTO_MAP, "name_or_path": str(folder)})
    return folder


def own_backbone(folder: Path) -> Path:
    """transformers asks its config for a backbone, which the config is not."""
    change(plain(folder) / "config.json", model_type="detr", architectures=["DetrModel"], auto_map=AUTO_MAP)
    change(folder / "config.json", backbone_config=VIT | {"auto_map": AUTO_MAP, "name_or_path": str(folder)})
    return folder


def own_tokenizer(folder: Path) -> Path:
    """Its tokenizer is code."""
    change(plain(folder) / "tokenizer_config.json", **OWN_TOKENIZER)
    return folder


def inner_tokenizer(folder: Path) -> Path:
    """It has two tokenizers, which transformers reads with options of its own."""
    change(plain(folder) / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    for inner in ("question_encoder", "generator"):
        change(folder / "config.json", **{inner: VIT}, model_type="rag")
        (folder / f"{inner}_tokenizer").mkdir()
        change(folder / f"{inner}_tokenizer" / "tokenizer_config.json", **OWN_TOKENIZER)
    return folder


def own_generation(folder: Path) -> Path:
    """What else a folder may name code in: it is a model of transformers, with files that nothing of lowmem reads."""
    change(plain(folder) / "config.json", auto_map=AUTO_MAP)
    change(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    change(folder / "processor_config.json", auto_map=AUTO_MAP, processor_class="EvilProcessor")
    change(folder / "preprocessor_config.json", auto_map=AUTO_MAP, image_processor_type="EvilProcessor")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "custom_generate").mkdir()
    return folder


REFUSED = (own_config, own_model, inner_model, own_backbone, own_tokenizer, inner_tokenizer)


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Return a function that writes a folder of one kind, and raises afterwards if its code has run."""
    monkeypatch.chdir(tmp_path)
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nraise SystemExit('code of a folder has run')\n"

    def make(kind, name="folder"):
        folder = kind(tmp_path / name)
        for inner in (folder, *filter(Path.is_dir, folder.iterdir())):
            for file in ("evil.py", "generate.py"):
                (inner / file).write_text(code)
        monkeypatch.setattr(sys, "stdin", io.StringIO(YES))
        return folder

    yield make
    assert not ran.exists()


COMMANDS_OF = {
    "stats": (["stats", "F"], ["stats", "F", "--training", "adamw"], ["stats", "F", "--plan", "LoRA"]),
    "compare": (["compare", "F", "F", "--text", "text.txt"], ["compare", "F", "F"]),
    "fit": (
        ["fit", "F", "--data", "text.txt", "--length", "8", "--dry-run"],
        ["fit", "F", "--data", "text.txt", "--length", "8", "--steps", "1", "--save", "out"],
    ),
    "generate": (
        ["generate", "F", "--max-new-tokens", "2"],
        ["generate", "F", "--max-new-tokens", "2", "--chat"],
        ["generate", "adapter", "--base", "F", "--prompt", "a", "--max-new-tokens", "2"],
    ),
    "serve": (["serve", "F"],),
    "quantize": (
        ["quantize", "F", "out"],
        ["quantize", "F", "out", "--bits", "4.5"],
        ["quantize", "F", "out", "--calibrate", "text.txt"],
        ["quantize", "F/model.safetensors", "out.safetensors"],
    ),
    "merge": (["merge", "F", "adapter", "out"],),
    "export": (["export", "F", "out.gguf"], ["export", "F", "out", "--format", "bitsandbytes"]),
    "report": (["report", "F", "out.html"],),
    "bundle": (["bundle", "F", "out.zip"],),
    "info": (["info"],),
}


def test_each_command_is_tried():
    assert COMMANDS_OF.keys() == COMMANDS.keys()


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter of the plain folder's model, in PEFT's form, that names a module to import."""
    model = lowmem.add_adapter(load(write(tmp_path / "base")), "default", LoRA(2))
    lowmem.save_adapter(model, tmp_path / "adapter", format="peft", base_name="folder")
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    change(tmp_path / "adapter" / "adapter_config.json", auto_mapping=mapping)
    (tmp_path / "text.txt").write_text("one and two are three; " * 40)


@pytest.fixture
def server(monkeypatch):
    """Let the server of transformers end where it would listen, and note what it serves, and that it cannot ask."""
    uvicorn = pytest.importorskip("uvicorn", reason="transformers[serving] is not installed: tox -e transformers")
    served = []

    def listen(server):
        with pytest.raises(EOFError):
            input("Do you wish to run the custom code? [y/N] ")
        served.append(server.config.app.name)

    monkeypatch.setattr(uvicorn.Server, "run", listen)
    return served


def run(folder: Path, argv: list[str], capsys) -> tuple[int, str]:
    """Run a command where nothing is at its outputs; return its code, and the text of an error."""
    for out in map(Path, ("out", "out.training", "out.safetensors", "out.gguf", "out.zip")):
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    code = main([str(folder) + one[1:] if one[:1] == "F" else one for one in argv])
    told = capsys.readouterr().err
    assert code == 0 or (code, told.count("\n")) == (2, 1), told
    return code, told


@pytest.mark.parametrize("kind", REFUSED)
def test_commands_refuse_code_that_a_folder_needs(hostile, adapter, server, capsys, kind):
    folder, of_tokenizer = hostile(kind), kind in (own_tokenizer, inner_tokenizer)
    refused = set()
    for command, each in COMMANDS_OF.items():
        for argv in each:
            code, told = run(folder, argv, capsys)
            if code and "none was run" in told:
                assert "trust_remote_code=True" in told
                assert ("tokenizer_config.json" if of_tokenizer else "/config.json") in told
                refused.add(command)
    if of_tokenizer:  # RAG's tokenizer is inner; the server refuses its model
        assert refused >= ({"compare", "serve"} if kind is own_tokenizer else {"compare"})
    else:
        assert refused >= {"stats", "compare", "generate", "serve", "quantize", "merge"}


def test_commands_run_no_other_code(hostile, adapter, server, capsys):
    """What the model itself does not need is not run either, and nothing of it is read from stdin."""
    folder = hostile(own_generation)
    codes = {" ".join(argv): run(folder, argv, capsys)[0] for each in COMMANDS_OF.values() for argv in each}
    failed = {argv for argv, code in codes.items() if code}
    refused = {"serve F"}  # since transformers' Auto classes refuse such a folder
    assert failed == refused | {
        "compare F F",
        "export F out --format bitsandbytes",
        "report F out.html",
        "bundle F out.zip",
    }
    assert "none was run" in run(folder, ["serve", "F"], capsys)[1]
    assert server == []


def test_a_server_cannot_ask(hostile, server, capsys):
    folder = hostile(plain)
    assert run(folder, ["serve", "F"], capsys)[0] == 0
    assert server == [folder.name]


def test_a_search_that_transformers_has_moved_to_the_hub_is_refused(hostile, adapter, capsys):
    folder = hostile(plain)
    change(folder / "generation_config.json", penalty_alpha=0.6, top_k=4, do_sample=False)
    code, told = run(folder, ["generate", "F", "--prompt", "a"], capsys)
    assert code == 2
    assert "generation_config.json of" in told
    assert "none was run: remove it, as penalty_alpha" in told


@pytest.mark.processes
def test_a_pipe_that_says_yes_runs_nothing(hostile, tmp_path):
    folder = hostile(own_config)
    command = [sys.executable, "-m", "lowmem", "generate", str(folder)]
    ended = subprocess.run(command, input=YES, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2
    assert "none was run" in ended.stderr


FUNCTIONS = {
    "load_folder": load_folder,
    "load_folder, stored": lambda folder: load_folder(folder, LowmemConfig(FourBit())),
    "load_folder_or_gguf": load_folder_or_gguf,
    "check_tensors_fit_config": check_tensors_fit_config,
    "quantize_folder": lambda folder: quantize_folder(folder, Path("out"), FourBit()),
    "load_calibrate_and_write_folder": lambda folder: load_calibrate_and_write_folder(
        folder, Path("out"), FourBit(), "self"
    ),
    "compare_folders_on_text": lambda folder: compare_folders_on_text([folder, folder], "one and two are three"),
    "dense_model_factory": lambda folder: dense_model_factory(folder)(),
    "read_language_model_sizes": read_language_model_sizes,
    "model_class_from_path": model_class_from_path,
    "stored_by": quantizing_program_or_none,
    "transformers_config": transformers_config,
    "open_model_and_tokenizer": open_model_and_tokenizer,
    "open_model_and_tokenizer of an adapter": lambda folder: open_model_and_tokenizer(Path("adapter"), folder),
    "write_base_with_adapter": lambda folder: write_base_with_adapter(folder, Path("adapter"), Path("out")),
    "write_base_with_tokenizer": lambda folder: write_base_with_tokenizer(folder, Path("adapter"), Path("out")),
    "adapter_base_path": lambda folder: open_model_and_tokenizer(Path("adapter")),
    "read_tokenizer": read_tokenizer,
    "gguf_tokenizer_fields": lambda folder: tokenizer_and_chat_template_fields(folder, {}, 258),
    "from_exact": from_exact,
    "import_foreign_folder": lambda folder: import_foreign_folder(folder, Path("out")),
    "import_foreign_checkpoint": lambda folder: import_foreign_checkpoint(folder, Path("out.safetensors")),
    "export": lambda folder: lowmem.export(folder, "out.gguf"),
    "export to a folder": lambda folder: lowmem.export(folder, "out"),
    "load_adapter": lambda folder: lowmem.load_adapter(load(Path("base")), Path("adapter")),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of an adapter of another folder
@pytest.mark.parametrize("kind", [*REFUSED, own_generation])
def test_functions_run_no_code(hostile, adapter, kind):
    folder = hostile(kind)
    for name, read in FUNCTIONS.items():
        with suppress(ValueError, OSError):
            read(folder)
        assert not Path("ran").exists(), name
        for out in map(Path, ("out", "out.safetensors", "out.gguf")):
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_code_of_another_program_s_folder_runs_where_it_is_trusted(hostile, tmp_path, method):
    def foreign(folder):
        folder = write_foreign(folder, method)
        change(folder / "config.json", model_type="evil", architectures=["Evil"], auto_map=AUTO_MAP)
        write_tokenizer(folder)
        return folder

    folder = hostile(foreign)
    for read in (from_exact, load_folder, lambda one: import_foreign_folder(one, Path("out"))):
        with pytest.raises(FileError, match="none was run.*trust_remote_code=True"):
            read(folder)
    assert main(["quantize", str(folder), "out"]) == 2
    assert not Path("ran").exists()
    with pytest.raises(SystemExit, match="code of a folder has run"):
        from_exact(folder, trust_remote_code=True)
    Path("ran").unlink()


def test_files_beside_a_gguf_file_run_no_code(hostile, tmp_path):
    """transformers looks for a tokenizer_config.json beside the file."""
    pytest.importorskip("gguf", reason="gguf is not installed: tox -e formats")
    folder = plain(tmp_path / "plain")
    quantize_folder(folder, tmp_path / "stored", FourBit("iq4_nl", 32, embeddings="4bit"))
    file = hostile(own_config) / "model.gguf"
    lowmem.export(tmp_path / "stored", file)
    change(file.parent / "tokenizer_config.json", **OWN_TOKENIZER)
    load_gguf(file)
    for read in (read_tokenizer, open_model_and_tokenizer):
        with pytest.raises(FileError, match=r"tokenizer_config\.json': it needs code of its own"):
            read(file)


def test_pickles_are_not_read(hostile, adapter, server, capsys, tmp_path):
    """Of a folder of pickles alone, and beside files of safetensors."""
    pickle = b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    names = ("pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "vocab.pkl")
    folder = hostile(plain)
    for place in (folder, Path("adapter")):
        for name in names:
            (place / name).write_bytes(pickle)
    assert run(folder, ["stats", "F", "--input-shape", "4", "--input-dtype", "int64"], capsys)[0] == 0
    assert (
        run(folder, ["generate", "adapter", "--base", "F", "--prompt", "a", "--max-new-tokens", "1"], capsys)[0] == 0
    )
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    for command, each in COMMANDS_OF.items():
        codes = {run(folder, argv, capsys)[0] for argv in each}
        assert codes == {0 if command == "info" else 2}, command
    assert not (tmp_path / "ran").exists()

"""``lowmem export --for``: files that llama.cpp and Ollama run, and what is refused."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="gguf is not installed: tox -e transformers")

from lowmem.__main__ import main
from lowmem.io.filesystem import open_regular_file
from lowmem.io.formats.gguf.gguf_file import read_gguf_header
from lowmem.io.formats.open_foreign import open_foreign_checkpoint
from tests.integrations.transformers.ollama import CHATML, ollama_commands_and_prompts

QUESTIONS = [
    {"messages": [{"role": "user", "content": f"after {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(8)
]


@pytest.fixture
def home(place):
    """A folder with a tiny llama that has a context for conversations, questions, and a template."""
    config = Path("llama", "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    Path("chatml.jinja").write_text(CHATML)
    return place


def fit(*options, model="llama", format=("--format", "q8_0"), template=("--chat-template", "chatml.jinja")):
    """Train an adapter on questions."""
    steps = ["--steps", "2", "--lr", "0.01", "--save", "tuned", "--eval-share", "0", "--length", "400"]
    assert main(["fit", model, "--data", "questions.jsonl", *steps, *format, *template, *options]) == 0


@pytest.fixture
def tuned(home):
    """An adapter that was trained on a base that GGUF holds, with a system message."""
    fit("--system", "Be brief.\nAdd 1.")


def names_here():
    return {path.name for path in Path().iterdir()}


def metadata_of(path):
    with open_regular_file(Path(path)) as file:
        return read_gguf_header(Path(path), file).metadata


@pytest.mark.usefixtures("tuned")
def test_base_and_adapter_are_written_with_the_line_that_runs_both(capsys):
    before = names_here()
    assert main(["export", "tuned", "plain.gguf"]) == 0
    capsys.readouterr()
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0
    shown = capsys.readouterr()
    words = ["llama-cli", "-m", "out.gguf", "--lora", "out-adapter.gguf", "--jinja", "-sys", "Be brief.\nAdd 1."]
    assert shown.out.endswith(f"{shlex.join(words)}\n")
    assert shown.err == "saved out.gguf\nsaved out-adapter.gguf\n"
    assert names_here() - before == {f"{name}.gguf" for name in ("plain", "plain-adapter", "out", "out-adapter")}
    for ending in ("", "-adapter"):
        assert Path(f"out{ending}.gguf").read_bytes() == Path(f"plain{ending}.gguf").read_bytes()
    assert metadata_of("out.gguf")["tokenizer.chat_template"] == CHATML


@pytest.mark.usefixtures("tuned")
def test_a_modelfile_holds_the_template_the_system_message_and_the_ends(capsys):
    assert main(["export", "tuned", "My.gguf", "--for", "ollama"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("ollama create my -f My.Modelfile\nollama run my\n")
    assert shown.err == "saved My.gguf\nsaved My-adapter.gguf\nsaved My.Modelfile\n"
    turns = [{"role": role, "content": text} for role, text in [("user", "1?"), ("assistant", "2"), ("user", "3?")]]
    commands, prompts = ollama_commands_and_prompts(
        Path("My.Modelfile").read_text(encoding="utf8"), [{"messages": turns}, {"messages": turns[:1]}]
    )
    assert main(["export", "tuned", "Again.gguf", "--for", "ollama", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["files"] == ["Again.gguf", "Again-adapter.gguf", "Again.Modelfile"]
    assert shown["commands"] == ["ollama create again -f Again.Modelfile", "ollama run again"]
    assert commands[:2] == [("from", "./My.gguf"), ("adapter", "./My-adapter.gguf")]
    assert ("stop", "</s>") in commands
    assert ("system", "Be brief.\nAdd 1.") in commands
    start = "<|im_start|>system\nBe brief.\nAdd 1.<|im_end|>\n<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [f"{start}2<|im_end|>\n<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n", start]


@pytest.mark.usefixtures("tuned")
def test_one_dense_file_is_written_where_it_is_asked_for(capsys):
    assert main(["export", "tuned", "one.gguf", "--for", "llama.cpp", "--merge", "--dtype", "f16"]) == 0
    shown = capsys.readouterr()
    assert "one dense file in float16: the adapter is merged into its base\n" in shown.out
    line = shlex.join(["llama-cli", "-m", "one.gguf", "--jinja", "-sys", "Be brief.\nAdd 1."])
    assert shown.out.endswith(f"{line}\n")
    assert not Path("one-adapter.gguf").exists()
    with open_foreign_checkpoint(Path("one.gguf")) as file:
        kinds = {item.kind for item in file.tensors.values() if len(item.shape) == 2}
        assert kinds == {"F16"}
        up = file.tensors["model.layers.0.mlp.up_proj.weight"].read()
    assert main(["export", "tuned", "two", "--for", "ollama", "--merge", "--dtype", "f32"]) == 0
    with open_foreign_checkpoint(Path("two.gguf")) as file:
        merged = file.tensors["model.layers.0.mlp.up_proj.weight"].read()
    assert torch.equal(up, merged.half())
    assert "ADAPTER" not in Path("two.Modelfile").read_text()


@pytest.mark.usefixtures("tuned")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--for", "llama.cpp", "--format", "gguf"], "--format contradicts --for=llama.cpp, the program chooses it"),
        (["--for", "ollama", "--requantize"], "--requantize contradicts --for=ollama, it changes the codes"),
        (["--for", "ollama", "--dense-base"], "--dense-base contradicts --for=ollama, it writes another base"),
        (["--for", "llama.cpp", "--merge"], "--for=llama.cpp takes --merge and --dtype together"),
        (["--for", "llama.cpp", "--dtype", "f16"], "--for=llama.cpp takes --merge and --dtype together"),
        (["--merge", "--dtype", "f16"], "--merge is an option of --for: add --for llama.cpp, or run lowmem merge"),
        (["--for", "other"], "other"),
    ],
)
def test_options_that_contradict_are_refused(options, error, refused):
    before = names_here()
    assert error in refused("export", "tuned", "out", *options)
    assert names_here() == before


@pytest.mark.usefixtures("home")
def test_a_folder_without_an_adapter_is_exported_too(capsys, refused):
    tokenizer_config = Path("llama", "tokenizer_config.json")
    tokenizer_config.write_text(json.dumps(json.loads(tokenizer_config.read_text()) | {"chat_template": CHATML}))
    assert main(["quantize", "llama", "small", "--for", "llama.cpp"]) == 0
    capsys.readouterr()
    assert main(["export", "small", "out", "--for", "llama.cpp"]) == 0
    assert capsys.readouterr().out.endswith("llama-cli -m out.gguf --jinja\n")
    assert main(["export", "small", "again", "--for", "ollama"]) == 0
    assert "ADAPTER" not in Path("again.Modelfile").read_text()
    assert "is none: leave it out" in refused("export", "small", "b", "--for", "ollama", "--merge", "--dtype", "f16")
    told = refused("export", "small/model.safetensors", "b", "--for", "ollama")
    assert "--for=ollama takes a folder" in told


@pytest.mark.usefixtures("home")
def test_a_base_that_gguf_does_not_hold_is_refused_with_the_remedy(refused, capsys):
    fit(format=())
    before = names_here()
    told = refused("export", "tuned", "out", "--for", "llama.cpp")
    assert "train with lowmem fit --for llama.cpp, or write one dense file with --merge --dtype f16" in told
    assert names_here() == before
    capsys.readouterr()
    assert main(["export", "tuned", "out", "--for", "llama.cpp", "--merge", "--dtype", "bf16"]) == 0
    assert "one dense file in bfloat16" in capsys.readouterr().out


def flip_a_byte(path):
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)


def add_a_line(path):
    Path(path).write_text(f"{Path(path).read_text()}\n")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("program", ["llama.cpp", "ollama"])
def test_a_folder_that_changed_after_the_training_is_refused(program, refused):
    fit("--keep-base")
    shutil.copytree("tuned", "kept")
    before = names_here()
    changes = [
        (flip_a_byte, "adapter_model.safetensors"),
        (add_a_line, "chat_template.jinja"),
        (add_a_line, "tokenizer.json"),
        (flip_a_byte, "base/model.safetensors"),
        (add_a_line, "base/config.json"),
    ]
    for change, name in changes:
        change(Path("tuned", name))
        told = refused("export", "tuned", "out", "--for", program)
        assert f"cannot export 'tuned/{name}': it was changed after the training: get it again" in told
        shutil.copy(Path("kept", name), Path("tuned", name))
    Path("tuned", "chat_template.jinja").unlink()
    assert "'tuned/chat_template.jinja': it was changed" in refused("export", "tuned", "out", "--for", program)
    shutil.copy(Path("kept", "chat_template.jinja"), Path("tuned"))
    Path("tuned", "added_tokens.json").write_text("{}")
    assert "'tuned/added_tokens.json': it was changed" in refused("export", "tuned", "out", "--for", program)
    Path("tuned", "added_tokens.json").unlink()
    shutil.rmtree("tuned/base")
    assert "'tuned/base/config.json': it was changed" in refused("export", "tuned", "out", "--for", program)
    assert names_here() == before


@pytest.mark.usefixtures("tuned")
def test_an_adapter_of_another_base_is_refused(refused, capsys):
    from tests.integrations.transformers.folders import write
    from tests.integrations.transformers.tokens import write_tokenizer

    write_tokenizer(write(Path("other")))
    shutil.copytree("llama", "moved")
    before = names_here()
    told = refused("export", "tuned", "out", "--for", "llama.cpp", "--base", "other")
    assert "'other': 'tuned' was trained on another base, or on other files: name the base with --base" in told
    flip_a_byte("llama/model.safetensors")
    told = refused("export", "tuned", "out", "--for", "ollama")
    assert "'tuned' was trained on another base, or on other files" in told
    assert names_here() == before
    capsys.readouterr()
    assert main(["export", "tuned", "out", "--for", "llama.cpp", "--base", "moved"]) == 0


@pytest.mark.usefixtures("home")
def test_what_ollama_cannot_have_leaves_nothing_behind(refused, capsys):
    fit(template=())  # the template of the tests, which is none of Ollama's
    before = names_here()
    told = refused("export", "tuned", "out", "--for", "ollama")
    assert "the chat template writes ';<user>' between an answer and the next question" in told
    assert names_here() == before
    shutil.rmtree("tuned")
    fit("--system", 'Brief."""\nADAPTER ./other.gguf\nSYSTEM """')
    told = refused("export", "tuned", "out", "--for", "ollama")
    assert "has three quotes, which end a value of a Modelfile: export it --for llama.cpp" in told
    assert names_here() == before
    shutil.rmtree("tuned")
    fit("--system", "{{ .Messages }}")
    assert "has actions of Go's templates" in refused("export", "tuned", "out", "--for", "ollama")
    assert names_here() == before
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0


@pytest.mark.usefixtures("tuned")
def test_a_file_whose_tokenizer_differs_is_refused_with_the_conversation(refused, capsys):
    other = Path("other")
    shutil.copytree("llama", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["?"], vocabulary["b"] = vocabulary["b"], vocabulary["?"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["export", "other", "other.gguf"]) == 0
    before = names_here()
    for program in ("llama.cpp", "ollama"):
        told = refused("export", "tuned", "out", "--for", program, "--like", "other.gguf")
        assert "cannot export 'out.gguf': its tokenizer makes [" in told
        assert "in the conversation of one question" in told
    assert names_here() == before


def add_beginning(folder):
    """Let the tokenizer of a folder begin texts with ``<s>``."""
    path = Path(folder, "tokenizer.json")
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single}
    processor["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": processor}))


@pytest.mark.usefixtures("home")
def test_prompts_begin_once_where_the_template_says(refused):
    add_beginning("llama")
    fit()
    assert main(["export", "tuned", "without", "--for", "ollama"]) == 0
    assert metadata_of("without.gguf")["tokenizer.ggml.add_bos_token"] is False
    shutil.rmtree("tuned")
    Path("chatml.jinja").write_text("{{ bos_token }}" + CHATML)
    fit()
    assert main(["export", "tuned", "with", "--for", "ollama"]) == 0
    assert metadata_of("with.gguf")["tokenizer.ggml.add_bos_token"] is True
    assert "<s>" not in Path("with.Modelfile").read_text().partition("TEMPLATE")[2]
    Path("chatml.jinja").write_text(CHATML)
    tokenizer_config = Path("llama", "tokenizer_config.json")
    tokenizer_config.write_text(json.dumps(json.loads(tokenizer_config.read_text()) | {"chat_template": CHATML}))
    assert main(["quantize", "llama", "small", "--for", "llama.cpp"]) == 0
    before = names_here()
    told = refused("export", "small", "out", "--for", "llama.cpp")
    assert "begin prompts with '<s>', and the training did not" in told
    assert names_here() == before


@pytest.mark.usefixtures("home")
def test_an_adapter_of_plain_text_runs_without_a_template(capsys, refused):
    tokenizer_config = Path("llama", "tokenizer_config.json")
    without = {
        key: value for key, value in json.loads(tokenizer_config.read_text()).items() if key != "chat_template"
    }
    tokenizer_config.write_text(json.dumps(without))
    add_beginning("llama")
    lines = [json.dumps({"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"}) for n in range(8)]
    Path("questions.jsonl").write_text("\n".join(lines))
    fit(template=())
    capsys.readouterr()
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0
    assert capsys.readouterr().out.endswith("--lora out-adapter.gguf -no-cnv -p TEXT\n")
    assert metadata_of("out.gguf")["tokenizer.ggml.add_bos_token"] is True
    assert "it has no chat template, and Ollama is for chats" in refused("export", "tuned", "b", "--for", "ollama")


@pytest.mark.usefixtures("home")
def test_of_a_base_that_is_a_gguf_file_the_line_names_the_template_of_the_training(capsys):
    assert main(["quantize", "llama", "small", "--for", "llama.cpp"]) == 0
    assert main(["export", "small", "base.gguf"]) == 0
    fit("--template-kwargs", '{"a": 1}', model="base.gguf", format=())
    capsys.readouterr()
    assert main(["export", "tuned", "out", "--for", "llama.cpp"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    template = ["--chat-template-file", "tuned/chat_template.jinja", "--chat-template-kwargs", '{"a": 1}']
    assert words[5:] == ["--jinja", *template]
    assert Path("out.gguf").read_bytes() == Path("base.gguf").read_bytes()
    assert main(["export", "tuned", "ours", "--for", "ollama"]) == 0
    assert "<|im_start|>" in Path("ours.Modelfile").read_text()
    assert main(["export", "tuned", "one", "--for", "llama.cpp", "--merge", "--dtype", "f16"]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[3:] == ["--jinja", *template]
    with open_foreign_checkpoint(Path("one.gguf")) as file:
        assert file.tensors["model.layers.0.mlp.up_proj.weight"].kind == "F16"

"""``lowmem generate`` writes what the model's own ``generate`` makes, for each kind of file that holds a model."""

import functools
import io
import json
import re
import shutil
import signal
import sys

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lowmem
from lowmem.__main__ import main
from lowmem.inference.prepare_inference import prepare_inference
from lowmem.nn.linear import QuantizedLinear
from lowmem.tools import generate
from lowmem.tools.generate import _TextGenerator
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer

CHAT = "{% for m in messages %}<s>{{ m['content'] }}<s>\n{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense folder, a stored one, an adapter of each, and two adapters in a stored folder and in one of PEFT."""
    home = tmp_path_factory.mktemp("generate")
    write_tokenizer(write(home / "dense"))
    assert main(["quantize", str(home / "dense"), str(home / "stored")]) == 0
    for name in ("dense", "stored"):
        model = lowmem.add_adapter(AutoModelForCausalLM.from_pretrained(home / name), "default", lowmem.LoRA(4))
        spread(model)
        lowmem.save_adapter(model, home / f"adapter of {name}", format="peft", base_name=str(home / name))
    lowmem.save_adapter(model, home / "adapter.safetensors")
    spread(lowmem.add_adapter(model, "other", lowmem.LoRA(4)))
    model.save_pretrained(home / "two")
    write_tokenizer(home / "two")
    for name, folder in (("default", "peft"), ("other", "peft/other")):  # as PeftModel.save_pretrained has it
        lowmem.save_adapter(model, home / folder, name, format="peft", base_name=str(home / "stored"))
    return home


def spread(model) -> None:
    """Give adapters values that change what the model predicts."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_b"):
                value.normal_()


def expected(model, folder, prompt: str = "abc", **options) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=8, eos_token_id=1, **options)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_without_a_gpu_device_is_one_line(no_gpu, folders):
    no_gpu("generate", folders / "dense", "--prompt", "abc")


def generated(capsys, *arguments) -> str:
    assert main(["generate", *map(str, arguments), "--max-new-tokens", "8"]) == 0
    found = capsys.readouterr()
    assert "tokens a second); peak memory" in found.err
    return found.out.removesuffix("\n")


@pytest.mark.parametrize("name", ["dense", "stored", "adapter of dense", "adapter of stored", "adapter.safetensors"])
def test_the_text_is_that_of_the_models_own_generate(folders, capsys, name):
    base = folders / ("dense" if name.endswith("dense") else "stored")
    model = AutoModelForCausalLM.from_pretrained(base)
    if name not in ("dense", "stored"):
        lowmem.load_adapter(model, folders / name)
    more = ["--base", base] if name.endswith("safetensors") else []
    found = generated(capsys, folders / name, "--prompt", "abc", "--temperature", "0", *more)
    assert found == expected(model.eval(), base, do_sample=False)
    assert found


def test_keys_and_values_in_8_bits_hold_for_the_whole_text(folders, capsys, monkeypatch):
    from lowmem.integrations.transformers.key_value_cache import KeyValueCache

    made = []
    own = KeyValueCache.__init__
    monkeypatch.setattr(KeyValueCache, "__init__", lambda self, *given: own(self, *given) or made.append(self))
    found = generated(capsys, folders / "dense", "--prompt", "abc", "--temperature", "0", "--cache-bits", "8")
    assert found
    assert made[-1].layers[0].cached["keys"].rows.dtype is torch.int8
    assert made[-1].get_seq_length() >= 8


@pytest.mark.parametrize("name", ["stored", "adapter of stored"])
def test_linear_layers_multiply_integers_and_a_line_says_what_that_loses(folders, capsys, monkeypatch, name):
    prepared = []
    monkeypatch.setattr(generate, "prepare_inference", lambda model: prepared.append(prepare_inference(model)))
    options = ["--prompt", "abc", "--temperature", "0", "--max-new-tokens", "8", "--compute", "int8"]
    assert main(["generate", str(folders / name), *options]) == 0
    told = capsys.readouterr()
    assert "lowmem generate: --compute int8 rounds inputs of linear layers to 8 bits, which changes" in told.err
    model, output = prepared[0], prepared[0].get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert {layer.compute_dtype for layer in layers if layer is not output} == {torch.int8}
    assert getattr(output, "compute_dtype", None) is None
    assert told.out.removesuffix("\n") == expected(model, folders / "stored", do_sample=False)


@pytest.mark.parametrize("options", [[], ["--bits", "6"], ["--format", "int8"], ["--calibrate", "self"]])
def test_a_folder_says_that_its_linear_layers_multiply_integers(folders, tmp_path, capsys, options):
    assert main(["quantize", str(folders / "dense"), str(tmp_path / "out"), *options, "--compute", "int8"]) == 0
    assert capsys.readouterr().err.count("lowmem quantize: --compute int8 rounds inputs of linear layers") == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, QuantizedLinear)]
    assert {layer.compute_dtype for layer in layers} == {torch.int8}
    found = generated(capsys, tmp_path / "out", "--prompt", "abc", "--temperature", "0")
    assert found == expected(model.eval(), tmp_path / "out", do_sample=False)


def test_a_dense_model_has_no_layers_that_multiply_integers(folders, refused):
    said = refused("generate", folders / "dense", "--prompt", "abc", "--compute", "int8")
    assert "--compute int8 applies to linear layers in 4 or 8 bits, and the model has none: quantize it" in said
    assert "--compute: invalid choice: 'int4' (choose from" in refused("generate", "a", "--compute", "int4")


def test_sampling_is_repeated_by_its_seed(folders, capsys):
    options = ["--prompt", "abc", "--temperature", "2", "--top-p", "0.9"]
    texts = [generated(capsys, folders / "stored", *options, "--seed", seed) for seed in ("1", "1", "2")]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folders / "stored")
    assert texts[0] == texts[1] == expected(model, folders / "stored", do_sample=True, temperature=2.0, top_p=0.9)
    assert texts[2] != texts[0]


@pytest.mark.parametrize("folder", ["two", "peft"])
def test_one_of_several_adapters_is_chosen(folders, capsys, folder):
    model = AutoModelForCausalLM.from_pretrained(folders / "two")
    for name in ("default", "other"):
        lowmem.deactivate(model)
        lowmem.activate(model, name)
        found = generated(capsys, folders / folder, "--prompt", "abc", "--temperature", "0", "--adapter", name)
        assert found == expected(model, folders / "two", do_sample=False)


def test_the_prompt_is_read_from_standard_input(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    found = generated(capsys, folders / "dense", "--temperature", "0")
    assert found == generated(capsys, folders / "dense", "--prompt", "abc", "--temperature", "0")


def test_a_chat_remembers_what_was_said(folders, tmp_path, capsys, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(folders / "dense")
    model.save_pretrained(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    said, answers = [], []
    for question in ("hello", "and"):
        said.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=[0, 1])
        answers.append(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        said.append({"role": "assistant", "content": answers[-1]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand\n"))
    assert generated(capsys, tmp_path / "chat", "--chat", "--temperature", "0") == "\n".join(answers)


@pytest.mark.parametrize("options", [[], ["--no-history"]])
def test_a_line_is_a_turn_or_begins_a_conversation(options, folders, tmp_path, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    tokenizer.chat_template = CHAT
    AutoModelForCausalLM.from_pretrained(folders / "dense").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    asked = []
    own = _TextGenerator.stream_chat_reply

    def reply(self, messages):
        asked.append([message["content"] for message in messages])
        own(self, messages)
        return "yes"

    monkeypatch.setattr("lowmem.tools.generate._TextGenerator.stream_chat_reply", reply)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand\n"))
    generated(capsys, tmp_path / "chat", "--chat", "--system", "be kind", *options)
    assert asked == [["be kind", "hello"], ["be kind", *([] if options else ["hello", "yes"]), "and"]]


def test_a_chat_is_as_the_adapter_was_trained_unless_it_is_told_otherwise(folders, tmp_path, capsys, monkeypatch):
    template = "{{ greeting }}{% for m in messages %}<s>{{ m['role'] }}{{ m['content'] }}<s>{% endfor %}"
    adapter = tmp_path / "adapter"
    shutil.copytree(folders / "adapter of dense", adapter)
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(adapter)
    chat = {"system": "be kind", "template_kwargs": {"greeting": "hello"}}
    (adapter / "training.json").write_text(json.dumps({"chat": chat, "run": {"format": "as it is"}}))
    (tmp_path / "other.jinja").write_text(template.replace("{{ m['role'] }}", ""))
    prompts = []
    own = _TextGenerator.stream_continuation
    monkeypatch.setattr(
        _TextGenerator,
        "stream_continuation",
        lambda self, inputs: prompts.append(tokenizer.decode(inputs["input_ids"][0])) or own(self, inputs),
    )
    for options in (
        [],
        ["--system", "add"],
        ["--template-kwargs", "{}"],
        ["--chat-template", str(tmp_path / "other.jinja")],
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
        generated(capsys, adapter, "--chat", *options)
    assert prompts == [
        "hello<s>systembe kind<s><s>userq<s>",
        "hello<s>systemadd<s><s>userq<s>",
        "<s>systembe kind<s><s>userq<s>",
        "hello<s>be kind<s><s>q<s>",
    ]


def test_an_interrupt_keeps_what_was_written(folders, capsys, monkeypatch):
    from lowmem.integrations.transformers.text_generation import TokenTimingStreamer

    put = TokenTimingStreamer.put

    def interrupted(self, value):
        put(self, value)
        if self.later_count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenTimingStreamer, "put", interrupted)
    assert main(["generate", str(folders / "dense"), "--prompt", "abc"]) == 130
    assert figures(capsys.readouterr().err) == [(3, 2)]


def figures(told: str) -> list[tuple[int, int]]:
    """The tokens of each prompt, and those that were written after the first: times and speeds must be there."""
    speed = r"in [0-9]+\.[0-9]{2} s \([0-9.]+ tokens a second\)"
    line = rf"prompt of ([0-9]+) tokens? and first new token {speed}(, ([0-9]+) more tokens? written {speed})?"
    peak = r"; peak memory [0-9]+ MiB"
    found = [re.fullmatch(line + peak, text) for text in told.splitlines() if text.startswith("prompt of")]
    return [(int(one[1]), int(one[3] or 0)) for one in found]


@pytest.mark.parametrize("new", [1, 2, 8])
def test_the_speed_of_the_prompt_and_that_of_what_is_written_are_apart(folders, capsys, new):
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    for prompt in ("a", "abc" * 40):
        options = ["--prompt", prompt, "--temperature", "0", "--max-new-tokens", str(new)]
        assert main(["generate", str(folders / "dense"), *options]) == 0
        told = capsys.readouterr().err
        count = len(tokenizer(prompt)["input_ids"])
        assert figures(told) == [(count, new - 1)]
        assert ("prompt of 1 token and" in told) == (count == 1)
        assert (", 1 more token written in" in told) == (new == 2)


def test_the_first_new_token_belongs_to_the_time_of_the_prompt(folders, capsys, monkeypatch):
    """By a clock that only the model moves: 2 s for a call with the prompt, 0.5 s for one with a new token."""
    clock = [7.0]
    monkeypatch.setattr("lowmem.integrations.transformers.text_generation.perf_counter", lambda: clock[0])
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def timed(self, *args, **named):
        clock[0] += 2 if named["input_ids"].shape[1] > 1 else 0.5
        return forward(self, *args, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", timed)
    count = len(AutoTokenizer.from_pretrained(folders / "dense")("abc" * 9)["input_ids"])
    options = ["--prompt", "abc" * 9, "--temperature", "0", "--max-new-tokens", "5"]
    assert main(["generate", str(folders / "dense"), *options]) == 0
    told = capsys.readouterr().err
    assert f"prompt of {count} tokens and first new token in 2.00 s ({count / 2:.0f} tokens a second)" in told
    assert ", 4 more tokens written in 2.00 s (2 tokens a second)" in told


def test_each_answer_of_a_chat_has_its_speed_and_an_empty_one_none(folders, tmp_path, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(folders / "dense")
    tokenizer.chat_template = CHAT
    AutoModelForCausalLM.from_pretrained(folders / "dense").save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    for said, number in (("hello\nand\n", 2), ("\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        options = ["--chat", "--no-history", "--temperature", "0", "--max-new-tokens", "3"]
        assert main(["generate", str(tmp_path / "chat"), *options]) == 0
        assert len(figures(capsys.readouterr().err)) == number


@pytest.mark.usefixtures("terminal_signals")
def test_an_interrupt_while_the_model_is_read_ends_it_with_130(folders, capsys, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lowmem.integrations.transformers.text_generation.open_model_and_tokenizer", interrupted)
    assert main(["generate", str(folders / "dense"), "--prompt", "abc"]) == 130
    told = "lowmem generate: interrupted; what was not finished is not there: run it again\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["adapter.safetensors", "--prompt", "a"],
            "is no model: name a folder, a GGUF file, owner/name of the Hub, or an adapter's file and its base, --ba",
        ),
        (["dense", "--base", "stored", "--prompt", "a"], "applies to adapters alone"),
        (["two", "--prompt", "a"], "choose one of default, other with --adapter"),
        (["peft", "--prompt", "a"], "'peft' has several adapters: choose one of default, other with --adapter"),
        (
            ["peft", "--prompt", "a", "--adapter", "x"],
            "--adapter='x' is no adapter of 'peft', which has default, other",
        ),
        (["dense", "--prompt", "a", "--adapter", "x"], "which has none"),
        (["dense", "--chat"], "has no chat template"),
        (["dense", "--prompt", "a", "--system", "s"], "--system applies to --chat: add it, or leave the option out"),
        (["dense", "--prompt", "a", "--no-history"], "--no-history applies to --chat: add it, or leave"),
        (["dense", "--chat", "--chat-template", "none"], "--chat-template=none: --chat needs a template"),
        (["missing", "--prompt", "a"], "MODEL='missing' is no file or folder here: name a folder, a GGUF"),
        (["dense/config.json", "--prompt", "a"], "'dense/config.json' is no model: name a folder, a GGUF"),
        (
            ["dense/config.json", "--base", "dense", "--prompt", "a"],
            "'dense/config.json': it is no safetensors file",
        ),
        (["dense", "--prompt", ""], "has no tokens"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(folders, refused, monkeypatch, arguments, told):
    monkeypatch.chdir(folders)
    assert told in refused("generate", *arguments)

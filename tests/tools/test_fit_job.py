"""What `lowmem fit` refuses of folders before it reads their weights: one line each, and nothing is written."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

import lowmem
from lowmem.__main__ import main
from lowmem.finetuning.text_examples import read_examples
from lowmem.finetuning.training_state import SavedState
from lowmem.integrations.transformers.text_tokenizer import TextTokenizer, read_tokenizer
from lowmem.tools import fit_language
from tests.finetuning.test_training_state import craft_states
from tests.integrations.transformers.folders import load, write
from tests.integrations.transformers.tokens import write_tokenizer
from tests.tools.conftest import LINES

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 258,
}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 32, "vocab_size": 258}
OTHERS = {
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "encoder": lambda: BertModel(BertConfig(**BERT)),
    "translates": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}


def listed():
    return sorted(one.as_posix() for one in Path().rglob("*"))


def test_bad_options_and_texts_are_refused(place, refused):
    Path("empty.txt").write_text(" \n")
    Path("latin.txt").write_bytes("Zürich".encode("latin-1"))
    Path("bad.jsonl").write_text('{"text": "a b"}\n{"txt": "a b"}\n')
    Path("half.jsonl").write_text('{"text": "a b\\ud800"}\n')
    Path("there").mkdir()
    Path("m.jsonl").write_text("{}")
    Path("taken.training").write_text("mine")
    data = ["--data", "text.txt"]
    cases = {
        (): "--data must name a file of texts",
        ("--data", "missing.txt"): "cannot read 'missing.txt'",
        ("--data", "digits"): "its name must end in .txt, .jsonl, .json, .csv, .tsv, .parquet",
        ("--data", "empty.txt"): "cannot read 'empty.txt': it is empty",
        ("--data", "latin.txt"): "it is no UTF-8 text, from byte 1",
        ("--data", "bad.jsonl"): "cannot read 'bad.jsonl': line 2: it has keys 'txt'",
        (*data, "--lr", "1e38"): "lr=1e+38 is above",
        (*data, "--steps", "2", "--epochs", "2"): "leave one out",
        (*data, "--steps", "2", "--warmup", "2"): "warmup=2 must be below the 2 steps",
        (*data, "--length", "65"): "--length=65 is more than the 64 positions",
        (*data, "--length", "1"): "length=1 must be a number of tokens",
        (*data, "--rank", "65"): "--rank=65 is more than the 64 columns",
        (*data, "--eval-share", "1"): "--eval-share=1 must be below 1",
        (*data, "--eval-share", "0.0001"): "both parts need one",
        (*data, "--eval-every", "2"): "--eval-every needs held-out text",
        (*data, "--patience", "2"): "patience=2 counts evaluations: set eval_every (--eval-every), too",
        (*data, "--resume"): "name OUT with --save",
        (*data, "--save", "there"): "'there' exists",
        (*data, "--save", "."): "'.' exists",
        (*data, "--save", "missing/out"): "cannot write 'missing/out'",
        (*data, "--save", "taken"): "'taken.training' exists, where states go; remove it or choose another name",
        (*data, "--metrics", "m.jsonl"): "'m.jsonl' exists",
        (*data, "--plot", "a.jpeg"): "must end in .png",
        (*data, "--save", "out", "--metrics", "out"): "are the same place: rename one",
        (*data, "--save", "llama/out"): "--save='llama/out' lies in MODEL='llama', which it would change",
        (*data, "--metrics", "./llama/m.jsonl"): "--metrics='llama/m.jsonl' lies in MODEL='llama', which it",
        (*data, "--save", "out", "--metrics", "./out.training/m.jsonl"): "are the same place: rename one",
        (*data, "--save", "a.png", "--plot", "a.png"): "are the same place: rename one",
        (*data, "--metrics", "a.png", "--plot", "a.png"): "are the same place: rename one",
        (*data, "--save", "out", "--resume", "--metrics", "data.jsonl"): "it has no metrics of a run",
        ("--data", "half.jsonl"): "line 1: it has half of a surrogate pair",
        (*data, "--steps", "2", "--batch-size", "99999999999"): "rows of text",
    }
    before = listed()
    for options, why in cases.items():
        printed = "data:" if why in ("warmup=2 must be below the 2 steps", "rows of text") else ""
        assert why in refused("fit", "llama", *options, printed=printed), options
    assert listed() == before


def test_ends_that_are_cut_off_need_cut_and_the_length_that_keeps_them_is_told(place, refused, capsys):
    tokenizer = TextTokenizer(read_tokenizer(Path("llama")))
    ends = sorted(read_examples("data.jsonl", tokenizer, 512).ends)
    length, need = ends[len(ends) // 2], ends[-1]
    lost = sum(end > length for end in ends)
    argv = ["fit", "llama", "--data", "data.jsonl", "--chat-template", "none", "--steps", "1", "--length"]
    told = refused(*argv, length)
    note = (
        f"lowmem fit: {lost} of {len(ends)} examples of data.jsonl are cut to --length {length}, and {lost} lose "
        f"the token that ends the answer: --length {need} keeps 99% of the ends"
    )
    assert told == f"{note}; or add --cut to train without them\n"
    assert main([*argv, str(length), "--cut"]) == 0
    assert f"{note}\n" in capsys.readouterr().err
    few = next(end for end in ends if sum(other > end for other in ends) <= len(ends) / 10)
    assert main([*argv, str(few)]) == 0
    assert "lose the token" in capsys.readouterr().err or few == need
    assert main([*argv, str(need)]) == 0
    assert "are cut" not in capsys.readouterr().err
    line = {"prompt": "a ", "completion": "b" * 200}
    Path("long.jsonl").write_text("\n".join(map(json.dumps, [line, *LINES])))
    argv = [*argv[:-1], "--eval-data", "long.jsonl"]
    assert main(argv) == 0
    told = capsys.readouterr().err
    assert f"1 of {len(ends) + 1} examples of long.jsonl are cut to --length 64, and 1 lose the token" in told
    Path("long.jsonl").write_text(json.dumps(line))
    told = refused("fit", "llama", "--data", "long.jsonl", "--chat-template", "none")
    assert "of the model's 64 positions; shorten the texts; or add --cut" in told


def test_folders_of_other_models_are_refused(place, refused):
    for name, make in OTHERS.items():
        torch.manual_seed(0)
        make().save_pretrained(name)
        write_tokenizer(Path(name))
        told = refused("fit", name, "--data", "text.txt", "--format", "dense", "--length", "16", "--save", "out")
        assert "take a causal language model" in told or "cannot fine-tune" in told, told
    model = lowmem.add_adapter(load("llama"), "default", lowmem.LoRA(2))
    lowmem.save_adapter(model, "adapter", format="peft")
    assert "it has an adapter (adapter_config.json)" in refused("fit", "adapter", "--data", "text.txt")
    model.save_pretrained("adapted")
    assert "its model has an adapter already" in refused("fit", "adapted", "--data", "text.txt")
    shutil.copytree("llama", "other")
    vocabulary = json.loads(Path("other", "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {f"new{n}": 258 + n for n in range(9)}
    Path("other", "tokenizer.json").write_text(json.dumps(vocabulary))
    assert "tokens, and its model 258: they are not of one vocabulary" in refused(
        "fit", "other", "--data", "text.txt"
    )
    assert not Path("out").exists()


def test_a_config_that_is_damaged_is_one_line_without_transformers_own(place, caplog, monkeypatch, refused):
    caplog.set_level(logging.WARNING, logger="transformers")
    logger, seen = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = seen.append
    monkeypatch.setattr(logger, "handlers", [handler])
    whole = json.loads(Path("llama", "config.json").read_text())
    for changes, why in (
        (
            {"vocab_size": 300},
            "'model.embed_tokens.weight' has the shape (258, 64), and by its config.json (300, 64)",
        ),
        (
            {"hidden_size": 32},
            "'model.embed_tokens.weight' has the shape (258, 64), and by its config.json (258, 32)",
        ),
        ({"hidden_size": "64"}, "its config is of no language model: StrictDataclass"),
        ({"num_attention_heads": 5}, "its config is of no language model: StrictDataclass"),
        ({"model_type": "nosuch"}, "its config is of no language model: ValueError"),
        (
            {"rope_parameters": {"rope_type": "nosuch"}},
            "cannot load 'llama': config.json has rope_parameters.rope_type='nosuch', which transformers",
        ),
        ({"hidden_act": "nosuch"}, "cannot load 'llama': config.json has hidden_act='nosuch', which transformers"),
        ({"num_hidden_layers": 3}, "it lacks 9 tensors of a LlamaForCausalLM as config.json describes it"),
    ):
        Path("llama", "config.json").write_text(json.dumps(whole | changes))
        assert why in refused("fit", "llama", "--data", "text.txt", "--length", "16", "--save", "out"), changes
    for options in ([], ["--dry-run"]):
        Path("llama", "config.json").write_text(json.dumps(whole | {"rope_parameters": {"rope_type": "nosuch"}}))
        assert "rope_type='nosuch', which" in refused("fit", "llama", "--data", "text.txt", *options)
        bare = {name: whole[name] for name in ("architectures", "model_type", "tie_word_embeddings")}
        Path("llama", "config.json").write_text(json.dumps(bare))  # whose sizes are then the ones of Llama 7B
        told = refused("fit", "llama", "--data", "text.txt", *options)
        assert "has the shape (258, 64), and by its config.json (32000, 4096): get both again" in told
    for text in ("", "{", "[]", "null"):
        Path("llama", "config.json").write_text(text)
        assert "llama/config.json': it is" in refused("fit", "llama", "--data", "text.txt", "--save", "out")
    assert seen == []
    assert not Path("out").exists()
    changes = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": -3}}  # works, with a word
    Path("llama", "config.json").write_text(json.dumps(whole | changes))
    assert main(["fit", "llama", "--data", "text.txt", "--length", "16", "--steps", "1"]) == 0
    assert "factor field must be" in seen[0].getMessage()


def test_a_state_is_no_pickle_and_a_damaged_one_is_skipped_with_a_line(place, capsys, monkeypatch, refused):
    argv = ["--data", "text.txt", "--length", "48", "--steps", "4", "--save", "out"]
    ran = place / "ran"
    craft_states(Path("out.training"), ran)
    for options in ([], ["--resume"]):
        assert "its states are pickles (step-*/.metadata)" in refused("fit", "llama", *argv, *options)
    shutil.rmtree(Path("out.training", "step-2"))
    assert "it is a pickle or an old torch.save file" in refused("fit", "llama", *argv, "--resume")
    assert not ran.exists()
    shutil.rmtree("out.training")

    def interrupted(*args, states, **named):
        for step in (1, 2):
            states.save(SavedState(step, {}, {}))
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_language, "finetune", interrupted)
    assert main(["fit", "llama", *argv]) == 130
    Path("out.training", "state-1.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["fit", "llama", *argv, "--resume"]) == 130
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("lowmem fit: cannot read 'out.training/state-1.safetensors': it is no safetensors file")
    assert first.endswith("; going on from the state after step 1")


def test_a_state_of_another_base_or_of_other_options_is_refused(place, capsys, monkeypatch, refused):
    argv = ["--data", "text.txt", "--length", "48", "--steps", "4", "--save", "out"]

    def interrupted(*args, states, **named):
        states.save(SavedState(1, {}, {}))
        raise KeyboardInterrupt

    write_tokenizer(write(Path("another"), "llama"))
    with monkeypatch.context() as patch:
        patch.setattr(fit_language, "finetune", interrupted)
        patch.setenv("WORLD_SIZE", "1")
        patch.setenv("LOCAL_WORLD_SIZE", "1")
        assert main(["fit", "llama", *argv, "--save", "other"]) == 130
        assert ": continue with `torchrun --nproc-per-node 1 -m lowmem fit llama" in capsys.readouterr().err
        patch.delenv("LOCAL_WORLD_SIZE")
        assert main(["fit", "llama", *argv]) == 130
    told = capsys.readouterr().err
    command = f"lowmem fit llama {' '.join(argv)} --resume"
    told = told.splitlines()[-1]
    assert told == (
        "lowmem fit: interrupted; the last good state, after step 1, is kept in 'out.training', as --save-every 50 "
        f"says: continue with `{command}`"
    )
    for done in (False, True):  # by a state, and by the adapter
        where = "cannot go on from 'out" + ("': " if done else ".training/state-0.safetensors': ")
        told = refused("fit", "another", *argv, "--resume")
        assert f"{where}its adapter is of another base: base was " in told
        assert f"{where}rank was 16 and is 3" in refused("fit", "llama", *argv, "--rank", "3", "--resume")
        assert ("'out' exists" if done else "continue with --resume, or remove it") in refused("fit", "llama", *argv)
        assert Path("out").exists() is done
        if not done:
            shutil.rmtree("out.training")
            assert main(["fit", "llama", *argv]) == 0
    assert not Path("out.training").exists()


def test_for_llama_cpp_refuses_before_training_what_export_does_not_write(place, refused):
    write_tokenizer(write(Path("experts"), "mixtral"))
    argv = ["--data", "text.txt", "--length", "48", "--steps", "1", "--save", "out", "--for", "llama.cpp"]
    before = listed()
    told = refused("fit", "experts", *argv)
    assert "model_type='mixtral' is no architecture that lowmem writes as GGUF: it writes llama, mistral" in told
    assert "leave --for llama.cpp out" in told
    for option in (["--format", "nf4"], ["--bits", "5"]):
        assert "not allowed with argument" in refused("fit", "llama", *argv, *option)
    assert "--for does not apply to model='bignet'" in refused("fit", "bignet", "--for", "llama.cpp")
    told = refused("fit", "llama", *argv, "--target", "q_proj", "lm_head")  # whose ends are tied
    assert "llama.cpp adapts neither end of a model whose ends share a weight: leave it out of --target" in told
    assert listed() == before
    assert main(["quantize", "llama", "small"]) == 0
    assert "no type with the levels of int8; leave --for llama.cpp out" in refused("fit", "small", *argv)


@pytest.mark.parametrize(
    ("base", "options", "line"),
    [
        ("llama", [], "not exact, since .* is in int8, .*; --for llama.cpp trains on a base that is"),
        ("llama", ["--for", "llama.cpp"], "export to GGUF: exact, so that llama.cpp computes with"),
        ("llama", ["--format", "iq4_nl"], "not exact, since .* is in int8, .*; --for llama.cpp"),
        ("llama", ["--format", "dense"], "export to GGUF: exact, so that llama.cpp computes with"),
        ("small", [], "not exact, since .*; --for llama.cpp with the dense model trains on a base that is"),
        ("small.gguf", [], "export to GGUF: exact, so that llama.cpp computes with"),
        ("experts", [], "no export to GGUF: cannot export 'experts': model_type='mixtral' is no arch"),
    ],
)
def test_a_line_before_training_says_whether_the_base_is_exact_in_gguf(base, options, line, place, capsys):
    write_tokenizer(write(Path("experts"), "mixtral"))
    if base.startswith("small"):
        assert main(["quantize", "llama", "small", *(["--for", "llama.cpp"] if base == "small.gguf" else [])]) == 0
        assert base == "small" or main(["export", "small", base]) == 0
    capsys.readouterr()
    assert main(["fit", base, "--data", "text.txt", "--length", "48", "--dry-run", *options]) == 0
    told = [text for text in capsys.readouterr().err.splitlines() if "export to GGUF" in text]
    assert len(told) == 1
    assert re.search(line, told[0])


@pytest.mark.parametrize(
    ("base", "options", "told"),
    [
        ("llama", [], True),
        ("llama", ["--bits", "5"], True),
        ("llama", ["--format", "int8"], False),
        ("llama", ["--format", "dense"], False),
        ("llama", ["--for", "llama.cpp"], False),  # quantize takes what llama.cpp reads by a name of its own
        ("small", [], False),
    ],
)
def test_a_base_in_4_bits_is_said_to_gain_by_calibration(base, options, told, place, capsys):
    if base == "small":
        assert main(["quantize", "llama", "small"]) == 0
    capsys.readouterr()
    assert main(["fit", base, "--data", "text.txt", "--length", "48", "--dry-run", *options]) == 0
    hints = [
        line for line in capsys.readouterr().err.splitlines() if "--calibrate self brings the perplexity" in line
    ]
    assert len(hints) == told
    assert all(
        "the base is not calibrated: `lowmem quantize` writes one that is, which fit takes; " in h for h in hints
    )

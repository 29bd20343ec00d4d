"""Writes the golden folders of transformers, and the state of ``lowmem fit`` on one of them."""

from contextlib import chdir, suppress
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import lowmem
from lowmem import FourBit, Half, LoRA
from lowmem.__main__ import main
from lowmem.finetuning import loop
from tests.finetuning.killed import Killed
from tests.golden import STEP, TEXT, fill, plain_values, values
from tests.integrations.transformers.tokens import VOCABULARY, write_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIG = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=64, **SIZES)
OPTIONS = ["--data", "text.txt", "--length", "32", "--rank", "2", "--lr", "0.01", "--steps", "4", "--save-every", "2"]


def stored() -> PreTrainedModel:
    """Return a model in 4 and 8 bits and float16."""
    made = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).eval()
    fill(dict(made.named_parameters()))
    lowmem.convert(made, Half(), where=lambda path, _: path.endswith("v_proj"))
    return lowmem.convert(made, FourBit("nf4", 16), skip="*.v_proj")


def write_folders(folder: Path) -> dict[str, dict[str, str]]:
    """Write a stored model, one with an adapter, and the state of a run that was killed; return digests of values."""
    made = stored()
    made.save_pretrained(folder / "folder")
    found = {"folder": plain_values(folder / "folder"), "model of the folder": values(made)}
    write_tokenizer(folder / "folder")
    lowmem.add_adapter(made, "first", LoRA(2, alpha=3))
    fill({name: one for name, one in made.named_parameters() if "lora_" in name})
    made.save_pretrained(folder / "adapted")
    found["adapted"] = values(made)
    (folder / "text.txt").write_text(TEXT)
    step = loop._FineTuningRun._train_step

    def ending(run: loop._FineTuningRun, number: int) -> None:
        step(run, number)
        if number == STEP:
            raise Killed

    with chdir(folder), mock.patch.object(loop._FineTuningRun, "_train_step", ending), suppress(Killed):
        main(["fit", "folder", *OPTIONS, "--save", "fit"])
    return found

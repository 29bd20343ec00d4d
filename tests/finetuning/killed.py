"""A run that a test kills: it goes on from its states, and tells its steps."""

from pathlib import Path

import lowmem
from tests.finetuning.language import language, rows, texts

SETTINGS = lowmem.FineTuning(
    epochs=3, batch_size=2, accumulate=2, lr=1e-2, warmup=3, save_every=1, eval_every=5, patience=50
)


def run(folder: Path, watch=lambda step: None) -> lowmem.Outcome:
    model = language(technique=lowmem.FourBit("nf4"), dropout=0.2)
    found = rows(model, texts(folder))
    states = lowmem.States(folder / "states", {"base": "tiny"})
    outcome = lowmem.finetune(model, found, SETTINGS, held_out=found, states=states, watch=watch)
    lowmem.save_adapter(model, folder / "out")
    states.remove()
    return outcome


def report(folder: Path, pipe) -> None:
    """Run in a process of its own."""
    run(folder, lambda step: pipe.send(step.number))

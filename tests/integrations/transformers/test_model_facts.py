"""What is known of a folder before its weights are read."""

import pytest
import torch

import lowmem
from lowmem import FileError
from lowmem.finetuning.packed_rows import Rows
from lowmem.finetuning.process_group import TrainingProcessGroup
from lowmem.finetuning.text_examples import Example
from lowmem.integrations.transformers.model_facts import (
    dense_model_factory,
    quantizing_program_or_none,
    read_language_model_sizes,
)
from tests.integrations.transformers.folders import change_config, load, write


def test_sizes_and_who_stored_it(tmp_path):
    for kind in ("llama", "gpt2"):
        folder = write(tmp_path / kind, kind)
        assert read_language_model_sizes(folder) == (258, 64, 64, 2)
        assert quantizing_program_or_none(folder) is None
    model = lowmem.convert(load(folder), lowmem.FourBit("nf4"))
    model.save_pretrained(tmp_path / "stored")
    assert quantizing_program_or_none(tmp_path / "stored") == "lowmem"
    lowmem.add_adapter(model, "default", lowmem.LoRA(2)).save_pretrained(tmp_path / "adapted")
    with pytest.raises(FileError, match="its model has an adapter already, as of 'transformer.h.0"):
        quantizing_program_or_none(tmp_path / "adapted")
    lowmem.save_adapter(model, tmp_path / "adapter", format="peft")
    with pytest.raises(FileError, match="it has an adapter \\(adapter_config.json\\)"):
        quantizing_program_or_none(tmp_path / "adapter")
    change_config(folder, quantization_config={"quant_method": "gptq"})
    assert quantizing_program_or_none(folder) == "gptq"
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"its config is of no language model"):
        read_language_model_sizes(folder)


def test_the_dense_model_is_made_of_the_config(tmp_path):
    folder = write(tmp_path / "llama", dtype=torch.bfloat16)
    with torch.device("meta"):
        made, shorter = dense_model_factory(folder)(), dense_model_factory(folder, 1)()
    assert {one.dtype for one in made.parameters()} == {torch.bfloat16}
    assert next(made.parameters()).is_meta
    assert [len(one.model.layers) for one in (made, shorter)] == [2, 1]
    change_config(folder, dtype=None)
    assert {one.dtype for one in dense_model_factory(folder, 1)().parameters()} == {torch.float32}


class Noting(TrainingProcessGroup):
    """Notes the gradients of the steps."""

    def __init__(self):
        self.found = []

    def clip_grad_norm(self, parameters, max_norm):
        self.found.append([one.grad.clone() for one in parameters])
        return 1.0


@pytest.mark.parametrize("memory", ["plain", "fast", "lean"])
def test_a_mixture_trains_with_the_loss_of_transformers_its_router_s_included(memory, tmp_path):
    folder = write(tmp_path / "mixtral", "mixtral")
    asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    examples = [
        Example.of([3 + (n * 7 + row) % 200 for n in range(length)], [True] * length)
        for row, length in ((0, 24), (1, 16))
    ]
    found = {}
    for name, more in (("without", {}), ("with", asked)):
        change_config(folder, **more)
        model = lowmem.add_adapter(load(folder), "default", lowmem.LoRA(2))
        with torch.no_grad():
            for adapter in lowmem.adapter_layers(model, "default").values():
                adapter.lora_b.normal_(std=0.1)
        rows = Rows.of(model, examples, 24, 258)
        theirs = [
            model(input_ids=ids, labels=ids, use_cache=False).loss
            for ids in (rows.batch([row]).inputs["input_ids"] for row in range(2))
        ]
        mean = (theirs[0] * 23 + theirs[1] * 15) / 38
        trained = [one for one in model.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(mean, trained)
        if memory != "plain":
            lowmem.prepare_training(model, memory)
        ranks = Noting()
        outcome = lowmem.finetune(model, rows, lowmem.FineTuning(steps=1, batch_size=1, accumulate=2), ranks=ranks)
        assert outcome.losses[0] == pytest.approx(mean.item(), rel=1e-5)
        off = (
            sum(float((one - other).norm() ** 2) for one, other in zip(ranks.found[0], gradients, strict=True)) ** 0.5
        )
        size = sum(float(one.norm() ** 2) for one in gradients) ** 0.5
        assert off <= (1e-4 if memory != "lean" else 0.05) * size
        found[name] = outcome.losses[0], gradients
    assert found["with"][0] - found["without"][0] > 0.4  # a balanced router's term is top_k / experts, times 4
    assert not all(torch.equal(*pair) for pair in zip(found["with"][1], found["without"][1], strict=True))

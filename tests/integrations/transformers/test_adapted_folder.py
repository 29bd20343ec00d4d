"""Folders of a base and its adapter, of links: they load as the adapter on the base does, sharded or not."""

import shutil

import pytest
import torch

import lowmem
from lowmem.errors import FileError
from lowmem.integrations.transformers import LowmemConfig
from lowmem.integrations.transformers.adapted_folder import write_base_with_adapter, write_base_with_tokenizer
from tests.integrations.transformers.folders import assert_same, load, write
from tests.integrations.transformers.tokens import write_tokenizer


@pytest.fixture
def folders(tmp_path):
    """A dense folder, its stored base in one file and in several, and an adapter."""
    base = load(write(tmp_path / "dense"), quantization_config=LowmemConfig(lowmem.FourBit()))
    base.save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    lowmem.add_adapter(base, "default", lowmem.LoRA(4))
    torch.manual_seed(5)
    for name, parameter in base.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    lowmem.save_adapter(base, tmp_path / "adapter", format="peft")
    write_tokenizer(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("name", ["base", "shards"])
def test_a_base_with_its_adapter_loads_as_the_adapter_on_the_base(folders, name):
    write_base_with_adapter(folders / name, folders / "adapter", folders / "both")
    assert_same(load(folders / "both"), lowmem.load_adapter(load(folders / name), folders / "adapter"))
    linked = [path for path in (folders / "both").iterdir() if path.is_symlink()]
    assert len(linked) == len(list((folders / name).glob("*.safetensors")))
    assert (folders / "both" / "tokenizer.json").is_file()


def test_a_base_gets_the_tokenizer_that_is_beside_the_adapter(folders):
    write_tokenizer(folders / "base")
    (folders / "adapter" / "chat_template.jinja").write_text("a template")
    (folders / "adapter" / "training.json").write_text("{}")
    write_base_with_tokenizer(folders / "base", folders / "adapter", folders / "both")
    assert (folders / "both" / "chat_template.jinja").read_text() == "a template"
    assert not {"training.json", "adapter_config.json"} & {path.name for path in (folders / "both").iterdir()}
    assert_same(load(folders / "both"), load(folders / "base"))


def test_an_adapter_that_has_values_of_the_base_is_refused(folders):
    model = lowmem.add_adapter(load(folders / "base"), "default", lowmem.LoRA(4))
    model.model.norm.weight.requires_grad_()
    shutil.rmtree(folders / "adapter")
    lowmem.save_adapter(model, folders / "adapter", format="peft")
    with pytest.raises(FileError, match=r"values of the base, as of 'model.norm.weight': merge it"):
        write_base_with_adapter(folders / "base", folders / "adapter", folders / "both")
    assert not (folders / "both").exists()

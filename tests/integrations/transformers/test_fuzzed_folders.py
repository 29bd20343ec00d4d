"""Folders of transformers and GGUF files whose bytes, numbers, names or JSON were changed are read or refused."""

import shutil

import pytest

from lowmem import FourBit
from lowmem.integrations.transformers import LowmemConfig
from lowmem.integrations.transformers.gguf_config import gguf_config_dict_or_none
from lowmem.integrations.transformers.model_facts import read_language_model_sizes
from lowmem.integrations.transformers.pretrained_folder import (
    check_tensors_fit_config,
    checked_config_and_tensor_bytes,
    load_folder,
)
from lowmem.integrations.transformers.text_tokenizer import read_tokenizer
from tests import fuzzing
from tests.fuzzing import Reader
from tests.integrations.transformers.folders import load, write
from tests.integrations.transformers.foreign import write_foreign
from tests.integrations.transformers.tokens import VOCABULARY, write_tokenizer
from tests.test_fuzzed_files import llama


def dense(folder):
    write(folder, "gpt2")


def stored(folder):
    load(write(folder / "in", "llama"), quantization_config=LowmemConfig(FourBit("nf4"))).save_pretrained(
        folder / "m"
    )
    shutil.rmtree(folder / "in")


def foreign(folder):
    write_foreign(folder, "gptq")


def plan(folder):
    checked_config_and_tensor_bytes(folder)
    read_language_model_sizes(folder)
    check_tensors_fit_config(folder)


READERS = {
    "config": Reader(dense, plan),
    "tokenizer": Reader(write_tokenizer, lambda f: read_tokenizer(f, VOCABULARY)),
    "dense folder": Reader(dense, load_folder),
    "stored folder": Reader(stored, lambda f: load_folder(f / "m")),
    "folder of another program": Reader(foreign, lambda f: load_folder(f / "foreign")),
    "config of gguf": Reader(llama, lambda f: gguf_config_dict_or_none(f / "a.gguf")),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
@fuzzing.fuzzed
def test_a_changed_folder_is_read_or_refused(name, tmp_path_factory, seed):
    fuzzing.run(READERS[name], name, tmp_path_factory.getbasetemp(), seed)


@pytest.mark.parametrize("name", [name for name in READERS if name != "tokenizer"])
@pytest.mark.filterwarnings("ignore")
def test_no_number_of_a_config_is_allocated_before_it_is_checked(name, tmp_path):
    fuzzing.run_large(READERS[name], tmp_path / "files", "*.gguf" if "gguf" in name else "*config.json")

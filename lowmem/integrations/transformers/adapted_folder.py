"""Folders of a base with the tokenizer of its adapter, or the adapter, too, whose weights are links to the base's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lowmem.errors import file_error, short_repr
from lowmem.integrations.transformers.pretrained_folder import load_folder
from lowmem.integrations.transformers.save_pretrained import lowmem_config_or_none
from lowmem.io.adapter_files import load_adapter
from lowmem.io.formats.peft.peft_reader import CONFIG as ADAPTER_CONFIG
from lowmem.io.lowmem_file import write_plain_safetensors_atomically
from lowmem.io.model_folder import CONFIG, WEIGHTS, is_config_or_tokenizer_file, weights_or_index_path
from lowmem.io.safetensors_checkpoint import SafetensorsCheckpoint
from lowmem.io.safetensors_header import TensorSpec
from lowmem.io.shards import INDEX, read_weight_map
from lowmem.io.training_record import RECORD_FILE

_ADAPTER_SHARD = "adapter.safetensors"


def write_base_with_tokenizer(base: Path, adapter_folder: Path, target: Path) -> None:
    """Write a folder of a base with the tokenizer that is beside an adapter, if there is one.

    Weights are symbolic links, other files are copies: exporters follow no link to a text.

    Raises:
        OSError: a file cannot be read, written or linked.
    """
    target.mkdir()
    for file in sorted(base.iterdir()):
        if file.name.endswith(".safetensors"):
            os.symlink(file.resolve(), target / file.name)
        elif is_config_or_tokenizer_file(file.name):
            shutil.copy(file, target / file.name)
    for file in sorted(adapter_folder.iterdir()):
        if is_config_or_tokenizer_file(file.name) and file.name not in (ADAPTER_CONFIG, RECORD_FILE):
            shutil.copy(file, target / file.name)


def write_base_with_adapter(base: Path, adapter_folder: Path, target: Path) -> None:
    """Write a folder that ``from_pretrained`` loads: a base that lowmem stored, with an adapter and its tokenizer.

    Raises:
        FileError: as ``load_folder`` and ``load_adapter``; or the adapter's folder has values of the base, too.
        OSError: a file cannot be read, written or linked.
    """
    model: Any = load_adapter(load_folder(base), adapter_folder)
    weights = weights_or_index_path(base)
    with SafetensorsCheckpoint(weights) as source:
        names = set(source.specs)
    shards = read_weight_map(weights) if weights.name.endswith(INDEX) else dict.fromkeys(names, weights.name)
    config = lowmem_config_or_none(model)
    assert config is not None
    tensors = {name: value for name, value in model.state_dict().items() if ".adapters." in name}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in tensors:
            why = f"it has values of the base, as of {short_repr(name)}: merge it into the base"
            raise file_error(adapter_folder, why, "serve")
    write_base_with_tokenizer(base, adapter_folder, target)
    specs = {name: TensorSpec.from_tensor(tensor) for name, tensor in tensors.items()}
    write_plain_safetensors_atomically(target / _ADAPTER_SHARD, specs, tensors.items())
    if not weights.name.endswith(INDEX):
        # Beside an index, transformers would read the file of the whole model alone
        shards = dict.fromkeys(shards, f"base-{WEIGHTS}")
        os.rename(target / WEIGHTS, target / f"base-{WEIGHTS}")
    index = {"metadata": {}, "weight_map": shards | dict.fromkeys(tensors, _ADAPTER_SHARD)}
    (target / f"{WEIGHTS}{INDEX}").write_text(json.dumps(index))
    content = json.loads((target / CONFIG).read_text()) | {"quantization_config": config.to_dict()}
    (target / CONFIG).write_text(json.dumps(content))

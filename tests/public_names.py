"""Names that users, their files and their scripts rely on: ``python -m tests.public_names`` writes those of now."""

import argparse
import ast
import copy
import inspect
import json
import pickletools
import re
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import BytesIO, StringIO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from zipfile import ZipFile

import torch
from safetensors import safe_open
from torch import Tensor, nn

import lowmem
from lowmem.__main__ import main as run_command
from lowmem.quant.backend import Backend
from lowmem.tools import COMMANDS

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
TECHNIQUES = {
    "Half": (lowmem.Half(),),
    "EightBit": (lowmem.EightBit(),),
    "FourBit": (lowmem.FourBit(),),
    "LoRA": (lowmem.LoRA(2),),
    "QLoRA": (lowmem.FourBit(), lowmem.LoRA(2)),
}


def exported(path: str) -> list[str]:
    """Return ``__all__`` of a file, which need not be imported."""
    for node in ast.parse((ROOT / path).read_text(encoding="utf8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no __all__")


def documented() -> list[str]:
    """Return what the pages of the API describe."""
    pages = "".join(page.read_text(encoding="utf8") for page in (ROOT / "docs" / "api").glob("*.md"))
    return sorted(set(re.findall(r"\.\. auto\w+:: (\S+)", pages)))


def parameters_and_members() -> dict[str, dict[str, list[str]]]:
    """Return, for each name of the API, its parameters and what its class or module offers by name.

    Of layers and tensors only the parameters: what else they offer is mostly torch's.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for path in documented():
        if path.startswith("lowmem.integrations."):  # transformers may not be installed; its own tests hold those
            continue
        documented_object = resolve_name(path)
        found[path] = {}
        is_class = inspect.isclass(documented_object)
        if hasattr(documented_object, "__pytest_wrapped__"):  # a fixture, which is a function before pytest 8.4
            continue
        if inspect.isfunction(documented_object) or (is_class and inspect.isfunction(documented_object.__init__)):
            found[path]["parameters"] = [*inspect.signature(documented_object).parameters]
        members = vars(documented_object).items()
        if inspect.ismodule(documented_object):  # not what it imports
            members = [(name, member) for name, member in members if getattr(member, "__module__", None) == path]
        elif not is_class or issubclass(documented_object, Tensor | nn.Module):
            continue
        found[path]["members"] = sorted(name for name, _ in members if not name.startswith("_"))
    return found


def options() -> dict[str, list[str]]:
    """Return the options and arguments of each command."""
    found = {}
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        import_module(f"lowmem.tools.{name}").add_arguments(parser)
        found[name] = sorted(text for action in parser._actions for text in action.option_strings or [action.dest])
    return found


def of_plugin() -> list[str]:
    """Return the options, settings and fixtures of the pytest plugin."""
    text = (ROOT / "pytest_lowmem.py").read_text(encoding="utf8")
    named = re.findall(r'"(--lowmem[\w-]+|lowmem_\w+)"', text)
    return sorted({*named, *re.findall(r"@pytest.fixture\ndef (\w+)", text)})


def keys_of(value: Any) -> list[str]:
    """Return the keys of nested objects, in order of the alphabet, each once."""
    if isinstance(value, dict):
        return sorted({*value, *(key for one in value.values() for key in keys_of(one))})
    return sorted({key for one in value for key in keys_of(one)}) if isinstance(value, list) else []


def in_files(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the keys of state_dict, and of the tensors and the metadata of saved files, for each technique."""
    found = {}
    for name, techniques in TECHNIQUES.items():
        model = lowmem.convert(nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Embedding(8, 64)}), *techniques)
        names = {"state_dict": sorted(model.state_dict())}
        paths = {"model": folder / name}
        lowmem.save(model, paths["model"])
        if "LoRA" in name:
            paths["adapter"] = folder / f"{name}-adapter"
            lowmem.save_adapter(model, paths["adapter"])
        for kind, path in paths.items():
            with safe_open(path, "pt") as file:
                texts = file.metadata().items()
                metadata = {key: json.loads(text) if text[0] == "{" else text for key, text in texts}
                names |= {f"tensors of the {kind}": sorted(file.keys()), f"metadata of the {kind}": keys_of(metadata)}
        found[name] = names
    return found


def in_pickles() -> list[str]:
    """Return the functions and classes of lowmem that pickles of whole models and of quantized tensors name."""
    dense = nn.ModuleDict(
        {"a": nn.Linear(64, 64), "b": nn.Embedding(8, 64), "c": nn.Conv1d(4, 4, 3), "d": nn.LSTM(4, 4)}
    )
    block = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    pickled = [lowmem.convert(copy.deepcopy(dense), *techniques) for techniques in TECHNIQUES.values()]
    pickled += [
        lowmem.prepare_training(lowmem.convert(block, *TECHNIQUES["QLoRA"])),
        lowmem.quantize(torch.ones(8, 64)),
    ]
    found = set()
    for item in pickled:
        torch.save(item, file := BytesIO())
        with ZipFile(file) as archive:
            operations = pickletools.genops(
                archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
            )
        found |= {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    return sorted(name.replace(" ", ".") for name in found if name.startswith("lowmem"))


def in_json() -> dict[str, list[str]]:
    """Return the keys of what commands print with ``--json``."""
    commands = {
        "stats": ["stats", "four_bit", "lora", "--json"],
        "compare": ["compare", "bignet", "four_bit", "--json"],
        "info": ["info", "--json"],
    }
    found = {}
    for name, argv in commands.items():
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as said:
            code = run_command(argv)
        if code:
            raise RuntimeError(f"lowmem {' '.join(argv)} ended with {code}: {said.getvalue()}")
        found[name] = keys_of(json.loads(printed.getvalue()))
    return found


def public_names() -> dict[str, Any]:
    """Return all of them, by where a user meets them."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "lowmem": exported("lowmem/__init__.py"),
            "lowmem.integrations.transformers": exported("lowmem/integrations/transformers/__init__.py"),
            "docs/api": documented(),
            "parameters and members": parameters_and_members(),
            "methods of a backend": sorted(name for name in vars(Backend) if not name.startswith("_")),
            "options": options(),
            "pytest_lowmem": of_plugin(),
            "files": in_files(Path(folder)),
            "pickles": in_pickles(),
            "JSON": in_json(),
        }


def main() -> None:
    """Write the names of now."""
    FILE.write_text(json.dumps(public_names(), indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()

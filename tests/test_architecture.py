"""Imports point one way, importing stays lean, and every module has its mirror test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem

PACKAGE = Path(lowmem.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

# Each layer may import from the layers before it, and nothing from its own or those behind it, except
# as listed. Modules of one layer stand together.
LAYERS = [
    {"formats", "packing", "scales", "bignet", "measure", "version", "files", "int8", "kernels._native"},
    {"search", "header", "messages"},
    {"blockwise", "tensorfile", "startup"},
    {"quantizing", "shards"},
    {"kernels.reference", "kernels.memory"},
    {"kernels.cpu"},
    {"kernels"},
    {"kernels.ops"},
    {"frozen"},
    {"half", "fourbit", "frozen_conv"},
    {"lora", "embedding", "conv", "gptq"},
    {"registry", "records"},
    {"convert"},
    {"variants", "merge", "calibrate", "shells", "summary", "stream"},
    {"adapters", "checkpoint"},
    {"adapter_files"},
    {"testing"},
    {"report"},
    {"tools"},
]
DOORS = {"__init__.py", "__main__.py", "testing/__init__.py"}  # they re-export, or start what the layers do
TORCH_ONLY = {"bignet", "measure"}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lowmem":
            base = node.module.partition(".")[2]
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            known = {module_name(m) for m in MODULES} | {"kernels._native"}
            found |= {name if name in known else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "lowmem"}
    return found


def layer_of(name: str) -> int:
    folder = name.partition(".")[0]
    name = folder if folder in ("report", "testing", "tools") else name
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize(
    "path", [m for m in MODULES if m not in ("__init__.py", "__main__.py", "testing/__init__.py")]
)
def test_imports_point_one_way(path):
    name = module_name(path)
    for other in imports_of(path):
        inside_a_folder = any(
            name.startswith(f"{at}.") and other.startswith(at) for at in ("report", "testing", "tools")
        )
        assert layer_of(other) < layer_of(name) or inside_a_folder, f"{name} imports {other}"
    if name in TORCH_ONLY:
        assert not imports_of(path)


@pytest.mark.parametrize("path", [m for m in MODULES if not m.endswith("__init__.py") and m != "version.py"])
def test_every_module_has_its_mirror_test(path):
    stem = "kernels" if path.startswith("kernels/") else Path(path).stem.strip("_")
    assert (Path(__file__).parent / f"test_{stem}.py").is_file()


@pytest.mark.parametrize("path", MODULES)
def test_a_module_is_one_concept_short_enough_to_read(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= 300


def test_importing_takes_torch_and_nothing_else_that_is_heavy():
    heavy = (
        "rich",
        "sklearn",
        "scipy",
        "pandas",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "torchao",
        "hypothesis",
        "pytest",
        "torch._dynamo",
        "torch._inductor",
    )
    script = (
        "import sys, torch; before = set(sys.modules); import lowmem; "
        f"print([m for m in {heavy!r} if m in set(sys.modules) - before])"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_everything_public_is_exported_and_documented():
    for name in lowmem.__all__:
        assert hasattr(lowmem, name)
        assert name in ("FORMATS", "VARIANTS", "__version__") or getattr(lowmem, name).__doc__

"""Imports point one way, importing stays lean, and every module has its mirror test."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lowmem

PACKAGE = Path(lowmem.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

# Folders, and modules that stand at the top. Each imports from its own and from those before it.
ORDER = [
    ("errors", "version", "bignet", "measure"),
    ("quant",),
    ("kernels",),
    ("nn",),
    ("transforms",),
    ("io", "variants"),
    ("testing",),
    ("report",),
    ("tools",),
]
DOORS = ("__init__.py", "__main__.py")  # they re-export, or start what the folders do
TORCH_ONLY = ("bignet", "measure", "errors")


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str) -> set[str]:
    """Return the modules of the package that a file imports, without the package's name."""
    found = set()
    tree = ast.parse((PACKAGE / path).read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in for_types:  # nothing runs it
        tree.body.remove(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lowmem":
            base = node.module.partition(".")[2]
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            known = {module_name(m) for m in MODULES} | {"kernels._native"}
            found |= {name if name in known else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "lowmem"}
    return found


def place_of(name: str) -> int:
    return next(number for number, folders in enumerate(ORDER) if name.partition(".")[0] in folders)


@pytest.mark.parametrize("path", [m for m in MODULES if m not in DOORS])
def test_imports_point_one_way(path):
    name = module_name(path)
    for other in imports_of(path):
        assert place_of(other) <= place_of(name), f"{name} imports {other}"
    if name in TORCH_ONLY:
        assert not imports_of(path)


def test_no_imports_go_in_a_circle():
    """Python's own sorter finds them. A package is its ``__init__``, which stands before none of its modules."""
    graph = {module_name(m): imports_of(m) - {module_name(m)} for m in MODULES if m not in DOORS}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def mirror_of(path: str) -> str:
    folder, _, stem = path.removesuffix(".py").rpartition("/")
    stem = stem.strip("_")
    return f"{folder}/test_{folder if stem == 'init' else stem}.py".strip("/")


@pytest.mark.parametrize("path", [m for m in MODULES if not m.endswith("__init__.py") and m != "version.py"])
def test_every_module_has_its_mirror_test(path):
    assert (Path(__file__).parent / mirror_of(path)).is_file()


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

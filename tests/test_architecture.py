"""Imports point one way, importing stays lean, and every module has its mirror test."""

import ast
import inspect
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from torch import nn

import lowmem
from tests.imports import (
    DOORS,
    DRAWN,
    LISTED,
    MODULES,
    OTHERS,
    PAGE,
    dotted,
    drawn,
    folder_imports,
    imports_of,
    module_name,
    names_listed,
    reduced,
)

ROOT = Path(__file__).parents[1]

# Folders, and modules that stand at the top. Each imports from its own and from those before it.
ORDER = [
    ("errors", "version", "bignet", "measure", "resident"),
    ("quant",),
    ("kernels",),
    ("nn",),
    ("transforms",),
    ("io", "training", "variants"),
    ("inference",),
    ("integrations",),
    ("finetuning",),
    ("distributed",),
    ("testing",),
    ("report",),
    ("tools",),
]
TORCH_ONLY = ("bignet", "measure", "errors")

# What makes a tensor with torch's default dtype, or on its default device, unless both are named.
FACTORIES = {
    *("empty", "empty_permuted", "empty_quantized", "empty_strided", "eye", "full", "ones", "scalar_tensor", "zeros"),
    *("arange", "linspace", "logspace", "range", "tril_indices", "triu_indices"),
    *("as_tensor", "asarray", "tensor"),
    *("normal", "rand", "randint", "randn", "randperm"),
    *("sparse_bsc_tensor", "sparse_bsr_tensor", "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor"),
    *("sparse_csr_tensor", "bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
}
LEGACY = {
    f"torch.{kind}Tensor" for kind in ("", "Bool", "Byte", "Double", "Float", "Half", "BFloat16", "Int", "Long")
}
DENSE_FOR_THE_USER = ("bignet.py", "tools/fit_classifier.py")  # they follow torch's defaults, as nn.Linear does


def place_of(name: str) -> int:
    return next(number for number, folders in enumerate(ORDER) if name.partition(".")[0] in folders)


def test_imports_point_one_way():
    imports = {module_name(path): imports_of(path) for path in MODULES if path not in DOORS}
    assert [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if place_of(other) > place_of(name)
    ] == []
    assert [name for name in TORCH_ONLY if imports[name]] == []


def test_no_imports_go_in_a_circle():
    """Python's own sorter finds them, imports for types alone too. A package is its ``__init__``, which stands before
    none of its modules."""
    graph = {module_name(m): imports_of(m) - {module_name(m)} for m in MODULES if m not in DOORS}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_the_picture_shows_the_imports():
    (picture,) = DRAWN.findall(PAGE.read_text(encoding="utf8"))
    assert picture == drawn(reduced(folder_imports())), "draw it again: python -m tests.imports"


def test_every_file_and_folder_that_the_page_names_exists():
    text = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
    named = re.findall(r"`([\w.]+/[\w./]*)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
    table = text.partition("## Where things are")[2].partition("\n## ")[0]
    folders = {f"lowmem/{name}/" for name in folder_imports() if (Path(lowmem.__file__).parent / name).is_dir()}
    assert folders <= set(re.findall(r"`(lowmem/\w+/)`", table))


def test_each_folder_says_what_it_may_import_and_where_to_begin():
    imports, folders = folder_imports(), [path for path in MODULES if path.endswith("/__init__.py")]
    assert len(folders) > 15
    wrong = []
    for path in folders:
        folder = Path(lowmem.__file__).parent / path
        text = ast.get_docstring(ast.parse(folder.read_text(encoding="utf8"))) or ""
        _, _, after = text.partition(" may import ")
        may, _, begin = re.sub(r"\s+", " ", after).partition(". Begin with ")
        first = re.match(r"\s*``([\w/]+\.py)``", begin)
        top = path.removesuffix("/__init__.py")
        if not first or not (folder.parent / first[1]).is_file():
            wrong.append(f"{path} does not say where to begin")
        if top in imports and "all other folders" not in may:
            others = {other for other in imports[top] if (Path(lowmem.__file__).parent / other).is_dir()}
            if set(re.findall(r"``(\w+)``", may)) != others:
                wrong.append(f"{path} does not say that it may import {', '.join(sorted(others))}")
    assert wrong == []


def mirror_of(path: str) -> str:
    folder, _, stem = path.removesuffix(".py").rpartition("/")
    stem = stem.strip("_")
    return f"{folder}/test_{folder if stem == 'init' else stem}.py".strip("/")


def test_every_module_has_its_mirror_test():
    mirrored = [path for path in MODULES if not path.endswith("__init__.py") and path != "version.py"]
    assert [path for path in mirrored if not (Path(__file__).parent / mirror_of(path)).is_file()] == []


def test_names_of_tests_are_sentences_of_at_most_80_characters():
    tests = [
        path for folder in ("tests", "tests_minilm", "benchmarks") for path in (ROOT / folder).rglob("test_*.py")
    ]
    names = [name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf8"))]
    assert len(names) > 2000
    assert [name for name in names if len(name) > 80] == []


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
        "triton",
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


def test_the_page_lists_the_private_names_of_other_libraries():
    (listed,) = LISTED.findall(PAGE.read_text(encoding="utf8"))
    assert listed == names_listed(), "write the list again: python -m tests.imports"


def test_nothing_is_assigned_to_another_library():
    assigned = set()
    for path in MODULES:
        for node in ast.walk(ast.parse((Path(lowmem.__file__).parent / path).read_text(encoding="utf8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = {dotted(target) for target in targets if isinstance(target, ast.Attribute)}
            assigned |= {name for name in names if name.partition(".")[0] in {*OTHERS, "nn", "functional"}}
    assert assigned == set()


def default_factories(source: str, path: str) -> list[str]:
    """Return the places in a source that make a tensor with torch's default dtype or on its default device."""
    tree, found, whole = ast.parse(source), [], set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        if {"dtype", "device"} <= {one.arg for one in call.keywords}:
            whole.add(call.func)
        elif name in LEGACY or (name in ("torch.Generator", "nn.Parameter", "nn.Buffer") and not call.args):
            found.append((call.lineno, name))
        elif name.startswith("nn.") and path not in DENSE_FOR_THE_USER:
            module = getattr(nn, name.removeprefix("nn."), None)
            if isinstance(module, type) and "dtype" in inspect.signature(module).parameters:
                found.append((call.lineno, name))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += [(node.lineno, f"torch.{one.name}") for one in node.names if one.name in FACTORIES]
        elif isinstance(node, ast.Attribute) and node not in whole:
            found += [(node.lineno, name) for name in [dotted(node)] if name.removeprefix("torch.") in FACTORIES]
    return [f"{path}:{line}: {name}" for line, name in sorted(found)]


def test_a_tensor_is_made_with_a_dtype_and_a_device():
    """torch's defaults are the user's: transformers changes the dtype while it builds a model, and C was once given
    scratch of half the size."""
    package = Path(lowmem.__file__).parent
    found = [place for path in MODULES for place in default_factories((package / path).read_text("utf8"), path)]
    assert found == [], "name dtype= and device="


def test_a_factory_without_dtype_or_device_is_found():
    lines = (
        "torch.empty(3, dtype=torch.int8)",
        "torch.arange(3, device='cpu')",
        "torch.tensor([1])",
        "nn.Linear(2, 2)",
        "nn.Parameter()",
        "make = torch.zeros",
        "from torch import full",
        "torch.Generator()",
        "torch.FloatTensor(2)",
    )
    found = default_factories("\n".join(lines), "a.py")
    assert [place.split(":")[1] for place in found] == [str(line + 1) for line in range(len(lines))]
    fine = (
        "torch.empty(3, dtype=torch.int8, device=x.device)",
        "torch.empty_like(x)",
        "x.new_zeros(3)",
        "nn.Linear(2, 2, dtype=dtype, device=device)",
        "nn.Parameter(x)",
        "torch.Generator('cpu')",
        "isinstance(x, torch.Tensor)",
    )
    assert default_factories("\n".join(fine), "a.py") == []

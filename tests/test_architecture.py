"""Imports point one way, importing stays lean, and every module has its mirror test."""

import ast
import importlib
import inspect
import operator
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest
import torch
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


@pytest.mark.parametrize("page", ["architecture", "format", "kernels"])
def test_every_source_file_that_a_page_names_exists(page):
    named = set(re.findall(r"`([\w/]+\.(?:py|h|c))`", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf8")))
    existing = {path.name for folder in ("lowmem", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.*")}
    existing |= {path.name for path in ROOT.glob("*.py")}
    assert named, "it names none"
    assert [name for name in sorted(named) if name.split("/")[-1] not in existing] == []


def test_every_file_and_folder_that_the_page_names_exists():
    text = re.sub(r"```.*?```", "", PAGE.read_text(encoding="utf8"), flags=re.DOTALL)
    named = re.findall(r"`([\w.]+/[\w./]*)`", text)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []
    table = text.partition("## Where things are")[2].partition("\n## ")[0]
    folders = {f"lowmem/{name}/" for name in folder_imports() if (Path(lowmem.__file__).parent / name).is_dir()}
    assert folders <= set(re.findall(r"`(lowmem/\w+/)`", table))


def function_lengths(path: Path) -> dict[str, int]:
    """Return the lines of each function of a file, and of each method as ``Class.method``."""
    bodies = [("", ast.parse(path.read_text(encoding="utf8")).body)]
    bodies += [(f"{node.name}.", node.body) for node in bodies[0][1] if isinstance(node, ast.ClassDef)]
    functions = [(prefix, node) for prefix, body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    return {f"{prefix}{node.name}": node.end_lineno - node.lineno + 1 for prefix, node in functions}


def tours() -> list[list[list[str]]]:
    """Return the cells of each stop of the three tours: its function, what to see, and what a test holds it to."""
    section = PAGE.read_text(encoding="utf8").partition("## Three tours")[2].partition("\n## ")[0]
    rows = [re.findall(r"^\| (`.*)\|$", part, re.MULTILINE) for part in section.split("| :-- | :-- | :-- |")[1:]]
    return [[[cell.strip() for cell in row.split("|")] for row in stops] for stops in rows]


def test_the_tours_lead_to_functions_that_fit_a_screen():
    """Three tours of at most six stops; what a stop is held to is a file or a function, or torch's."""
    assert len(tours()) == 3
    for stops in tours():
        assert 1 < len(stops) <= 6
        for first, _, last in stops:
            assert re.match(r"`lowmem/[\w/]+\.py`, `[\w.]+`$", first), first
            for file, name in re.findall(r"`(lowmem/[\w/]+\.py)`, `([\w.]+)`", f"{first} {last}"):
                assert function_lengths(ROOT / file)[name] < 60, f"{name} of {file}"
            for name in re.findall(r"`torch\.([\w.]+)`", last):
                assert callable(operator.attrgetter(name)(torch)), name


def names_in(path: Path, function: str) -> set[str]:
    """Return the names in a function; in a method; or in a class, if its ``forward`` is given: autograd calls all."""
    text = path.read_text(encoding="utf8")
    nodes = ast.parse(text).body
    for part in function.removesuffix(".forward").split("."):
        found = next(node for node in nodes if getattr(node, "name", None) == part)
        nodes = getattr(found, "body", [])
    return set(re.findall(r"\w+", ast.get_source_segment(text, found) or ""))


def test_each_stop_of_a_tour_is_called_by_one_above():
    """Or by the last of the functions that its row names, the first of which a stop above calls."""
    paths = [Path(lowmem.__file__).parent / path for path in MODULES]
    files = {
        name: path for path in paths for name in re.findall(r"^def (\w+)\(", path.read_text("utf8"), re.MULTILINE)
    }
    for stops in tours():
        called: set[str] = set()
        for number, (first, text, _) in enumerate(stops):
            file, name = re.findall(r"`([^`]+)`", first)
            for between in re.findall(r"`(\w+)`", text):
                if between in called and between in files:
                    called |= names_in(files[between], between)
            assert number == 0 or name.removesuffix(".forward").rpartition(".")[2] in called, first
            called |= names_in(ROOT / file, name)


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


def test_a_plain_linear_layer_takes_no_way_around_by_adapters_or_integers():
    """A reader who follows ``convert`` of one layer, and calls of it, opens no file that has no part in them."""
    entered, made = set(), []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(Path(lowmem.__file__).parent):
            entered.add(path.relative_to(Path(lowmem.__file__).parent).as_posix())

    layer, x = nn.Linear(64, 64), torch.randn(2, 64)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        made.append(lowmem.convert(layer, lowmem.FourBit()))
        with torch.no_grad():
            made[0](x)
        made[0](x)
    finally:
        sys.setprofile(before)
    assert {"transforms/convert.py", "nn/linear.py", "quant/tensor.py"} <= entered
    detours = {
        "nn/adapted_module.py",
        "transforms/adapter_placement.py",
        "kernels/int8_rounding.py",
        "kernels/__init__.py",
    }
    assert entered & detours == set()


def test_names_of_tests_are_sentences_of_at_most_80_characters():
    tests = [
        path for folder in ("tests", "tests_minilm", "benchmarks") for path in (ROOT / folder).rglob("test_*.py")
    ]
    names = [name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf8"))]
    assert len(names) > 2000
    assert [name for name in names if len(name) > 80] == []


def missing_names(tree):
    """Return what code imports of lowmem, and reads of its modules, that is not there."""
    missing, modules = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowmem":
            for alias in node.names:
                found = resolved(node.module, alias.name)
                if found is None:
                    missing.append(f"{node.module}.{alias.name}")
                elif isinstance(found, ModuleType):
                    modules[alias.asname or alias.name] = found.__name__
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] in modules and all(map(str.isidentifier, parts)):
                found = sys.modules[modules[parts[0]]]
                for part in parts[1:]:
                    found = resolved(found.__name__, part) if isinstance(found, ModuleType) else True
                if found is None:
                    missing.append(".".join(parts))
    return missing


def resolved(module, name):
    """Return what a module has under a name, or its submodule of that name, or None."""
    try:
        return getattr(importlib.import_module(module), name, None) or importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        return True if not str(error.name).startswith("lowmem") else None  # a package that is not installed


def scripts_in_tests():
    """Yield the place and the code of each script that stands in a string: what other processes run."""
    for path in sorted(
        p for folder in ("tests", "tests_minilm", "benchmarks") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if "lowmem" in text and "import" in text and path != Path(__file__):
                with suppress(SyntaxError):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.parse(textwrap.dedent(text))


def test_scripts_in_strings_name_what_exists():
    """What renames by scope does not see them, and some run in the slow tests alone."""
    places = dict(scripts_in_tests())
    assert len(places) > 20
    assert {place: missing for place, tree in places.items() if (missing := missing_names(tree))} == {}


def test_a_name_that_a_script_imports_and_that_is_gone_is_found():
    lines = "from lowmem import kernels, gone", "kernels.also_gone()", "kernels.cpu.gone_too", "kernels.linear"
    tree = ast.parse("\n".join(lines))
    assert sorted(missing_names(tree)) == ["kernels.also_gone", "kernels.cpu.gone_too", "lowmem.gone"]


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


CLASSES = "nn/module_class.py"  # the one file that makes classes at run time, and changes those of objects
# Transformers' server, which is imported when the command runs, is the base of a class
OF_COMMANDS = "def _limited_server_class("
MAKERS = {"new_class", "make_dataclass", "type.__new__"}
CHANGED = {"__class__", "__dict__", "__bases__"}


def initializing_calls(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield ``object.__setattr__`` on self in ``__post_init__`` of frozen dataclasses, which have no other way."""
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        frozen = any(re.match(r"dataclass\(.*frozen=True", ast.unparse(one)) for one in kind.decorator_list)
        methods = [one for one in kind.body if isinstance(one, ast.FunctionDef) and one.name == "__post_init__"]
        for call in (node for one in methods if frozen for node in ast.walk(one) if isinstance(node, ast.Call)):
            if ast.unparse(call).startswith("object.__setattr__(self, "):
                yield call.func


def changes_a_class(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute | ast.Name):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        sets = name in ("__setattr__", "__delattr__") and not ast.unparse(node).startswith("super().")
        stored = name in CHANGED and not isinstance(node.ctx, ast.Load)
        return sets or stored or name in MAKERS or ast.unparse(node) in MAKERS
    if isinstance(node, ast.Call):
        whole = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        given = {one.value for one in node.args if isinstance(one, ast.Constant)}
        called = ast.unparse(node.func)
        return (called in ("type", "builtins.type") and not whole) or (bool(given & CHANGED) and called != "hasattr")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name in CHANGED or any(isinstance(inner, ast.ClassDef) for inner in ast.walk(node))
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):  # another name for the function
        return node.value is not None and ast.unparse(node.value) == "type"
    return isinstance(node, ast.alias) and node.name in MAKERS


def class_changes(source: str, path: str) -> list[str]:
    """Return the places in a source that make a class at run time, or set the class or ``__dict__`` of an object."""
    tree = ast.parse(source)
    found = {node for node in ast.walk(tree) if changes_a_class(node)} - {*initializing_calls(tree)}
    return sorted({f"{path}:{node.lineno}: {ast.unparse(node).splitlines()[0]}" for node in found})


def test_one_file_makes_classes_at_run_time_and_changes_those_of_objects():
    sources = {path: (Path(lowmem.__file__).parent / path).read_text("utf8") for path in MODULES}
    assert len(class_changes(sources.pop(CLASSES), CLASSES)) >= 4
    found = [place for path, source in sources.items() for place in class_changes(source, path)]
    assert [place for place in found if OF_COMMANDS not in place] == [], f"call a function of {CLASSES}"


@pytest.mark.parametrize(
    "source",
    [
        "x.__class__ = kind",
        "x.y, x.__class__ = 1, kind",
        "x.__class__: type = kind",
        "x.__dict__ = {}",
        "x.__dict__ |= {}",
        "del x.__dict__",
        "kind.__bases__ = (other,)",
        "for x.__class__ in kinds: pass",
        "with a as x.__dict__: pass",
        "setattr(x, '__class__', kind)",
        "setattr(x, '__dict__', {})",
        "object.__setattr__(x, name, kind)",
        "object.__setattr__(self, 'scales', scales)",
        "nn.Module.__setattr__(x, name, kind)",
        "x.__setattr__(name, kind)",
        "put = object.__setattr__",
        "object.__delattr__(x, name)",
        "super().__setattr__('__class__', kind)",
        "methodcaller('__setattr__', '__class__', kind)(x)",
        "made = type('Made', (kind,), {})",
        "made = type(*arguments)",
        "make = type",
        "made = types.new_class('Made', (kind,))",
        "from types import new_class",
        "made = type.__new__(type, 'Made', (kind,), {})",
        "made = dataclasses.make_dataclass('Made', [])",
        "made = [make() for make in (lambda: type('Made', (), {}),)]",
        "class Other: __class__ = kind",
        "def make(kind):\n    class Made(kind): pass",
        "class Other:\n    @property\n    def __class__(self): return int",
        "class A:\n    def __post_init__(self): object.__setattr__(self, 'a', 1)",
        "@dataclass\nclass A:\n    def __post_init__(self): object.__setattr__(self, 'a', 1)",
        "@dataclass(frozen=True)\nclass A:\n    def f(self): object.__setattr__(self, 'a', 1)",
        "@dataclass(frozen=True)\nclass A:\n    def __post_init__(self): object.__setattr__(self.a, 'a', 1)",
        "@dataclass(frozen=True)\nclass A:\n    def __post_init__(self): object.__setattr__(self, '__class__', B)",
    ],
)
def test_a_way_to_make_or_change_a_class_is_found(source):
    assert class_changes(source, "a.py") != []


@pytest.mark.parametrize(
    "source",
    [
        "kind = type(x), x.__class__, x.__dict__",
        "made = type(x)(a, b, c)",
        "map(type, found)",
        "x.__dict__['a'] = 1",
        "x.__dict__.update(a=1)",
        "hasattr(x, '__dict__')",
        "class A(B):\n    def __setattr__(self, name, value): super().__setattr__(name, value)",
        "@dataclass(frozen=True)\nclass A:\n    def __post_init__(self): object.__setattr__(self, 'a', 1)",
    ],
)
def test_what_reads_a_class_or_sets_attributes_is_no_change_of_a_class(source):
    assert class_changes(source, "a.py") == []


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

"""Try a fresh sample of the mutants of the library, of its pytest plugin and of the gates.

Cosmic Ray lists the mutants; at most one of each place in the code is drawn. A place's rank is a digest of the seed
and of the place's text: the same seed draws the same sample, and a smaller sample is the beginning of a larger one.
Mutants run in copies of the tree, with the mirror tests of their module: ``python -m tests.faults.mutants``.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from difflib import ndiff
from pathlib import Path, PurePosixPath

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.faults.copies import SOURCE, Change, parser, try_changes

LEAST_SHARE = 0.9  # some mutants are equal code, which no test can kill

GATES = ("benchmarks", "benchmarks/latency")
# A constant; models and inputs that others measure; and what tox -e transformers runs.
LEFT_OUT = ("lowmem/version.py", "benchmarks/cases.py", "benchmarks/folders.py")

# The tests of a module, or of all of a folder, beyond or other than its mirror test, the quickest first.
TESTS = {
    "benchmarks/latency": ("benchmarks/test_latency",),
    "benchmarks/trained.py": ("test_readme",),
    "lowmem/__main__.py": ("test_main",),
    "lowmem/quant/scale_encodings.py": ("quant/test_scales", "quant/test_tensor"),
    "lowmem/quant/scale_search.py": ("quant/test_search", "quant/test_tensor"),
    "lowmem/quant/quantize_tensor.py": ("quant/test_quantize", "quant/test_tensor"),
    "lowmem/nn/frozen_linear.py": ("nn/test_frozen_linear", "nn/test_stored_module", "kernels/test_ops"),
    "lowmem/nn/frozen_conv.py": ("nn/test_frozen_conv", "nn/test_conv"),
    "lowmem/nn/conv.py": ("nn/test_conv", "nn/test_stored_module"),
    "lowmem/nn/embedding.py": ("nn/test_embedding", "nn/test_stored_module"),
    "lowmem/nn/lora_forward.py": ("nn/test_adapted_forward", "transforms/test_adapters"),
    "lowmem/inference/transformer_block.py": ("inference/test_block", "integrations/transformers/test_blocks"),
    "lowmem/inference/prepare_inference.py": ("inference/test_prepare", "inference/test_parts"),
    "lowmem/transforms/module_registry.py": (
        "transforms/test_registry",
        "transforms/test_select",
        "transforms/test_store",
    ),
    "lowmem/io/safetensors_header.py": ("io/test_safetensors", "io/test_container"),
    "lowmem/io/formats/gguf/gguf_block_types.py": ("io/formats/gguf/test_blocks", "io/formats/test_recognize"),
    "lowmem/io/metadata_records.py": ("io/test_metadata", "io/test_checkpoint"),
    "lowmem/io/meta_loading.py": ("io/test_skeleton", "io/test_checkpoint"),
    "lowmem/kernels/cpu.py": ("kernels/test_cpu", "kernels/test_int8", "kernels/test_kernel_choice"),
    "lowmem/kernels/tensor_checks.py": ("kernels/test_memory", "kernels/test_kernels"),
    "lowmem/kernels/reference.py": ("kernels/test_reference", "nn/test_adapted_forward", "kernels/test_int8"),
}
SELECT = "not mebibyte and not larger_layer and not 256_kib"  # these run for long, and are of the C code


def modules(root: Path = SOURCE) -> list[str]:
    """Return the files that mutants are drawn from, by their paths from the root of a tree."""
    folders = ((root / "lowmem").rglob("*.py"), *((root / name).glob("*.py") for name in GATES))
    names = ["pytest_lowmem.py", *(path.relative_to(root).as_posix() for paths in folders for path in paths)]
    return sorted(
        name
        for name in names
        if name not in LEFT_OUT and not PurePosixPath(name).name.startswith(("__init__", "conftest", "test_"))
    )


def mirror_tests(file: str, root: Path = SOURCE) -> tuple[str, ...]:
    """Return the files of the tests that must kill a module's mutants."""
    name = PurePosixPath(file)
    folder = str(name.parent).removeprefix("lowmem").strip("/.")
    mirror = f"{folder}/test_{name.stem}".strip("/")
    stems = TESTS.get(file) or TESTS.get(str(name.parent)) or (mirror,)
    found = tuple(f"tests/{stem}.py" for stem in stems if (root / "tests" / f"{stem}.py").is_file())
    if not found:
        raise ValueError(f"{file} has no tests: there is no tests/{stems[0]}.py; name them in TESTS of mutants.py")
    return found


def sample(size: int, seed: int, files: Sequence[str], root: Path = SOURCE) -> list[Change]:
    """Return so many mutants of these files, the first of the ranking."""
    ranked: list[tuple[bytes, str, str, int, tuple[str, int]]] = []
    for file in files:
        code = (root / file).read_text(encoding="utf8")
        lines, seen = code.splitlines(), Counter[str]()
        for (begin, _), ways in sorted(_places(code).items()):
            text = lines[begin[0] - 1].strip()
            seen[text] += 1
            digest = hashlib.sha256(repr((seed, file, text, seen[text])).encode()).digest()
            ranked.append((digest, file, code, begin[0], sorted(ways)[digest[-1] % len(ways)]))
    mutants: list[Change] = []
    for _, file, code, number, (operator, occurrence) in sorted(ranked):
        if len(mutants) == size:
            break
        text = mutate_code(code, get_operator(operator)(), occurrence)
        if text is not None and _is_other_code(code, text):
            shown = f"{file}:{number}: {_changed(code, text)}"
            mutants.append(Change(shown, file, text, mirror_tests(file, root), SELECT))
    return mutants


def _places(code: str) -> dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[str, int]]]:
    """Return, for each place that a mutant changes, the operators that change it, each with its count of places."""
    skipped = list(_never_run(code))
    nodes = list(ast_nodes(get_ast(code)))
    found: dict[tuple[tuple[int, int], tuple[int, int]], list[tuple[str, int]]] = {}
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or ("_Is" in name) != name.endswith(("_Is_IsNot", "_IsNot_Is")):
            continue  # `is` for `==` is true by chance, and changes nothing where objects are shared
        places = (place for node in nodes for place in operator().mutation_positions(node))
        for occurrence, (begin, end) in enumerate(places):
            if not any(first <= begin <= last for first, last in skipped):
                found.setdefault((begin, end), []).append((name, occurrence))
    return found


def _never_run(code: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield the spans of annotations, which nothing evaluates, and of what is for type checkers alone."""
    for node in ast.walk(ast.parse(code)):
        spans: list[ast.AST | None] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Protocol") for base in node.bases):
            spans.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            spans.append(node)
        for span in spans:
            if isinstance(span, ast.expr | ast.stmt):
                yield (span.lineno, span.col_offset), (span.end_lineno or 0, span.end_col_offset or 0)


def _is_other_code(before: str, after: str) -> bool:
    """Whether a mutant can be compiled, and is not the same code in other letters."""
    try:
        return ast.dump(ast.parse(before)) != ast.dump(ast.parse(after))
    except SyntaxError:
        return False


def _changed(before: str, after: str) -> str:
    changes = [line for line in ndiff(before.splitlines(), after.splitlines()) if line[0] in "-+"]
    old, new = (" ".join(line[2:].strip() for line in changes if line[0] == sign) for sign in "-+")
    return f"{old!r} -> {new!r}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where enough were killed, 1 where not, 2 for bad input."""
    files = modules()
    options = parser("faults.mutants", __doc__ or "")
    options.add_argument("files", nargs="*", metavar="FILE", help="draw from these modules alone")
    options.add_argument("--sample", type=int, default=300, metavar="N", help="how many (300)")
    today = int(datetime.now(UTC).strftime("%Y%m%d"))
    options.add_argument("--seed", type=int, default=today, metavar="N", help="of the sample (the date)")
    given = options.parse_args(arguments)
    if unknown := set(given.files) - set(files):
        options.error(f"{min(unknown)} is none of the modules that mutants are drawn from, as {files[0]} is")
    mutants = sample(given.sample, given.seed, given.files or files)
    if given.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    print(f"seed {given.seed}", flush=True)
    summary = os.environ.pop("GITHUB_STEP_SUMMARY", "")  # which tests of other gates would write to
    try:
        survived = try_changes(mutants, given.jobs)
    except ValueError as reason:
        print(f"mutants: {reason}", file=sys.stderr)
        return 2
    report = markdown(mutants, survived, given.seed)
    print(report)
    if summary:
        with Path(summary).open("a", encoding="utf8") as out:
            out.write(report)
    return int(len(mutants) - len(survived) < LEAST_SHARE * len(mutants))


def markdown(mutants: Sequence[Change], survived: Sequence[Change], seed: int) -> str:
    """Return the score of a sample, the modules in which mutants survive, and these mutants."""
    tried, lived = (Counter(mutant.file for mutant in group) for group in (mutants, survived))
    killed = len(mutants) - len(survived)
    lines = [f"## Mutants, seed {seed}", "", f"{killed} of {len(mutants)} killed; at least {LEAST_SHARE:.0%}", ""]
    lines += ["| module | mutants | killed |", "| :-- | --: | --: |"]
    lines += [f"| `{file}` | {tried[file]} | {tried[file] - lived[file]} |" for file in sorted(lived)]
    return "\n".join([*lines, "", *(f"- `{mutant.name}`" for mutant in survived), ""])


if __name__ == "__main__":
    sys.exit(main())

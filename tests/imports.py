"""The imports of ``lowmem``: ``python -m tests.imports`` writes what docs/architecture.md shows of them."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import lowmem
from tests.insides import names_listed

PACKAGE = Path(lowmem.__file__).parent
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
DOORS = ("__init__.py", "__main__.py")  # they re-export, or start what the folders do
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
DRAWN = re.compile(r"```mermaid\n.*?```\n", re.DOTALL)
LISTED = re.compile(r"\| \| used in \| for \|\n(?:\|.*\n)+")
OTHERS = ("torch", "transformers", "peft", "numpy", "safetensors", "rich", "re")


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str) -> set[str]:
    """Return the modules of the package that a file imports, for types alone too, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lowmem":
            base = node.module.partition(".")[2]
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            known = {module_name(m) for m in MODULES} | {"kernels._native"}
            found |= {name if name in known else base for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "lowmem"}
    return found


def folder_imports() -> dict[str, set[str]]:
    """Return, for each folder and each module at the top, the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        if path not in DOORS:
            folder = module_name(path).partition(".")[0]
            others = {other.partition(".")[0] for other in imports_of(path)}
            found.setdefault(folder, set()).update(others - {folder, ""})
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return a graph without circles, less the edges that a longer path implies."""
    reachable: dict[str, set[str]] = {}
    for node in TopologicalSorter(graph).static_order():  # those that import nothing come first
        reachable[node] = graph[node].union(*(reachable[other] for other in graph[node]))
    return {
        node: {other for other in others if not any(other in reachable[between] for between in others)}
        for node, others in graph.items()
    }


def drawn(graph: dict[str, set[str]]) -> str:
    """Return a graph as a fenced block of mermaid, in one order only."""
    edges = [f"    {node} --> {other}" for node, others in graph.items() for other in others]
    return "\n".join(["```mermaid", "graph TD", *sorted(edges), "```", ""])


def dotted(node: ast.AST) -> str:
    """Return the path of an attribute, as torch.nn.Linear; "" if it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def main() -> None:
    """Write the imports of now into the page."""
    text = DRAWN.sub(lambda _: drawn(reduced(folder_imports())), PAGE.read_text(encoding="utf8"), count=1)
    PAGE.write_text(LISTED.sub(lambda _: names_listed(), text, count=1), encoding="utf8")


if __name__ == "__main__":
    main()

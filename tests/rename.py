"""Rename names of ``lowmem/`` by scope: ``python -m tests.rename FILE ...``, in a clean working tree.

Each line of a FILE is one name, as it is in the sources before, and its new name. Paths are those in ``lowmem/``::

    nn/linear.py::build -> build_layer            a function, class or constant of the file
    nn/linear.py::Linear.reset -> clear           a method, or a nested function
    nn/linear.py::Linear:size -> width            an attribute of the class or of ``self``
    nn/linear.py::build(one) -> layer             an argument, also where a call names it
    nn/linear.py::Linear.reset:found -> rows      a variable of a function

Pyright's language server (``pip install pyright``) finds the uses by type, in tests and benchmarks, too. All of them
are found in the sources before, and replaced together. It cannot see names in strings and attributes of values of
type ``Any``: mypy, and then the tests, show those that are left.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"([\w/]+\.py)::([\w.]+)(?:\((\w+)\)|:(\w+))?\s*->\s*(\w+)")


class Position(NamedTuple):
    """Line and column of a name in a file, from 0."""

    line: int
    column: int


class Renaming(NamedTuple):
    """A definition in a file: a dotted path of functions and classes, and perhaps an argument or a variable there."""

    file: str
    path: str
    argument: str | None
    variable: str | None
    new_name: str

    @property
    def old_name(self) -> str:
        return self.argument or self.variable or self.path.rpartition(".")[2]


def parse_renamings(text: str) -> list[Renaming]:
    """Return the renamings of a file's lines; # begins a comment."""
    renamings = []
    for number, line in enumerate(text.splitlines(), 1):
        if line := line.partition("#")[0].strip():
            if not (match := LINE.fullmatch(line)):
                raise ValueError(f"line {number}: {line!r} is not PATH::NAME -> NEW_NAME")
            renamings.append(Renaming(*match.groups()))
    return renamings


def definitions(tree: ast.AST, path: str) -> list[ast.AST]:
    """Return the functions and classes of a dotted path: several where it is overloaded, or defined in branches."""
    scopes = [tree]
    for name in path.split(".") if path else []:
        scopes = [node for scope in scopes for node in _nested_definitions(scope) if node.name == name]
    return scopes


def _nested_definitions(scope: ast.AST) -> Iterator[Any]:
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child
        else:
            yield from _nested_definitions(child)


def positions(source: str, renaming: Renaming) -> list[Position]:
    """Return where the name is defined or assigned."""
    tree, lines, name = ast.parse(source), source.splitlines(), renaming.old_name

    def position(line: int, byte_offset: int) -> Position:
        column = len(lines[line - 1].encode()[:byte_offset].decode())
        match = re.compile(rf"\b{name}\b").search(lines[line - 1], column)
        if match is None:
            raise ValueError(f"{renaming.file}:{line} has no {name}")
        return Position(line - 1, match.start())

    outer, _, _ = renaming.path.rpartition(".")
    nodes = definitions(tree, renaming.path)
    if renaming.argument is None and renaming.variable is None:
        if nodes:
            return [position(node.lineno, node.col_offset + len("def")) for node in nodes]  # type: ignore[attr-defined]
        scopes = [statement for scope in definitions(tree, outer) for statement in getattr(scope, "body", [])]
        nodes = [statement for statement in scopes if isinstance(statement, ast.Assign | ast.AnnAssign)]
    found = []
    for node in (inner for outer_node in nodes for inner in ast.walk(outer_node)):
        if isinstance(node, ast.arg) and node.arg == name:
            found.append(position(node.lineno, node.col_offset))
        elif renaming.argument is None and isinstance(getattr(node, "ctx", None), ast.Store):
            if isinstance(node, ast.Name) and node.id == name:
                found.append(position(node.lineno, node.col_offset))
            elif isinstance(node, ast.Attribute) and node.attr == name and ast.unparse(node.value) == "self":
                found.append(position(node.lineno, node.end_col_offset - len(name.encode())))  # type: ignore[operator]
    return found


class LanguageServer:
    """Pyright's language server on the sources, by JSON-RPC over pipes."""

    def __init__(self) -> None:
        command = ["pyright-langserver", "--stdio"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        self._requests, self._opened = 0, set[Path]()
        folder = {"uri": ROOT.as_uri(), "name": ROOT.name}
        options = {"workspace": {"configuration": True, "workspaceEdit": {"documentChanges": True}}}
        self._request("initialize", {"processId": None, "workspaceFolders": [folder], "capabilities": options})
        self._send({"method": "initialized", "params": {}})

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        size = 0
        while header := self._process.stdout.readline().strip():
            if header.lower().startswith(b"content-length:"):
                size = int(header.partition(b":")[2])
        message: dict[str, Any] = json.loads(self._process.stdout.read(size))
        return message

    def _request(self, method: str, parameters: Any) -> Any:
        self._requests += 1
        self._send({"id": self._requests, "method": method, "params": parameters})
        while True:
            message = self._receive()
            if message.get("method") == "workspace/configuration":
                settings = {"pythonPath": sys.executable}
                self._send({"id": message["id"], "result": [settings] * len(message["params"]["items"])})
            elif "method" in message and "id" in message:
                self._send({"id": message["id"], "result": None})
            elif message.get("id") == self._requests:
                if "error" in message:
                    raise ValueError(message["error"]["message"])
                return message["result"]

    def edits(self, file: Path, position: Position, new_name: str) -> dict[Path, set[tuple[int, int, int]]]:
        """Return where the name at a position is used: by file, the line, the first column and the end."""
        if file not in self._opened:
            self._opened.add(file)
            document = {"uri": file.as_uri(), "languageId": "python", "version": 1, "text": file.read_text("utf8")}
            self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        place = {"line": position.line, "character": position.column}
        parameters = {"textDocument": {"uri": file.as_uri()}, "position": place, "newName": new_name}
        answer = self._request("textDocument/rename", parameters) or {}
        uses = defaultdict(set)
        for change in answer.get("documentChanges", []):
            path = Path(unquote(urlparse(change["textDocument"]["uri"]).path))
            for edit in change["edits"]:
                start, end = edit["range"]["start"], edit["range"]["end"]
                uses[path].add((start["line"], start["character"], end["character"]))
        return uses

    def wait_for_sources(self, file: Path, position: Position) -> None:
        """Wait until the server has read all files: until the uses of a name are as many as a moment before."""
        counts = [-1]
        while len(counts) < 3 or counts[-1] != counts[-2]:
            counts.append(sum(map(len, self.edits(file, position, "name_of_a_probe").values())))

    def close(self) -> None:
        """End the server."""
        self._process.terminate()


def replace_uses(source: str, uses: dict[tuple[int, int, int], str]) -> str:
    """Return a source with new names at (line, first column, end)."""
    lines = source.splitlines(keepends=True)
    for (line, start, end), name in sorted(uses.items(), reverse=True):
        lines[line] = lines[line][:start] + name + lines[line][end:]
    return "".join(lines)


def main() -> None:
    """Rename, and print what could not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    renamings = [item for file in parser.parse_args().files for item in parse_renamings(file.read_text("utf8"))]
    server, uses = LanguageServer(), defaultdict[Path, dict[tuple[int, int, int], str]](dict)
    for number, renaming in enumerate(renamings):
        file = ROOT / "lowmem" / renaming.file
        found = positions(file.read_text("utf8"), renaming)
        if not found:
            print(f"nothing is called {renaming.path}, {renaming.old_name} in {renaming.file}")
        if found and number == 0:
            server.wait_for_sources(file, found[0])
        for position in found:
            if (position.line, position.column, position.column + len(renaming.old_name)) not in uses[file]:
                for path, places in server.edits(file, position, renaming.new_name).items():
                    uses[path] |= dict.fromkeys(places, renaming.new_name)
    server.close()
    for path, names in uses.items():
        path.write_text(replace_uses(path.read_text("utf8"), names), "utf8")
    print(f"{len(renamings)} names in {len(uses)} files")


if __name__ == "__main__":
    main()

"""Notebooks as pages of the site: the cells and the outputs of the last run, which are stored in the notebook."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = re.compile(r"^```\{notebook\} (\S+)\n```$", re.MULTILINE)


def put_notebooks_into(page: str, folder: Path) -> str:
    """Return the text of a page in which notebooks stand in place of their paths, which start in ``folder``."""
    return NOTEBOOK.sub(lambda found: notebook_as_markdown(folder / found[1]), page)


def notebook_as_markdown(path: Path) -> str:
    """Return the cells of a notebook: texts, and code with what it printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        # A command of the shell is no Python
        language = "text" if re.search("^[!%]", source, re.MULTILINE) else "python"
        parts.append(source if cell["cell_type"] == "markdown" else f"```{language}\n{source}\n```")
        printed = "".join(_printed(output) for output in cell.get("outputs", []))
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts)


def _printed(output: dict[str, Any]) -> str:
    """Return the text of an output; other kinds than text are an error, since no page would show them."""
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    if set(output.get("data", ())) == {"text/plain"}:
        return "".join(output["data"]["text/plain"])
    raise ValueError(f"an output of kind {output['output_type']!r} is no text: let the notebook print text")

"""The notebook of ``examples/``: it is short, has the lines of the page, and the outputs of one whole run; ``tox -e
notebook`` runs it."""

import json
import sys
from pathlib import Path

import pytest

from tests.test_four_bits import DOCS, LINES

sys.path.append(str(DOCS))

import notebooks

FILE = Path(__file__).parents[1] / "examples" / "qlora_from_scratch.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_has_at_most_200_lines():
    assert sum(len(cell["source"]) for cell in CELLS) <= 200


def test_its_first_cell_is_the_code_of_the_page():
    assert "".join(CODE[0]["source"]) == LINES.partition("\n\n\ndef train")[0]


def test_its_outputs_are_of_one_run_without_errors():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(output["output_type"] != "error" for cell in CODE for output in cell["outputs"])


def test_the_site_shows_its_cells_and_what_they_printed():
    page = (DOCS / "qlora-from-scratch.md").read_text(encoding="utf8")
    shown = notebooks.put_notebooks_into(page, DOCS)
    assert all("".join(cell["source"]) in shown for cell in CELLS)
    assert shown.count("```python\n") == len(CODE) - 1  # the last one has commands of the shell
    printed = [
        "".join(output["text"]) for cell in CODE for output in cell["outputs"] if output.get("name") == "stdout"
    ]
    assert len(printed) > 5
    assert all(text.strip() in shown for text in printed)
    assert notebooks.put_notebooks_into("# A page\n", DOCS) == "# A page\n"


def test_an_output_that_no_page_shows_is_an_error(tmp_path):
    output = {"output_type": "display_data", "data": {"image/png": "", "text/plain": ""}}
    cell = {"cell_type": "code", "source": ["draw()"], "outputs": [output]}
    (tmp_path / "one.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(ValueError, match="'display_data' is no text"):
        notebooks.notebook_as_markdown(tmp_path / "one.ipynb")

"""The guide's table of llama.cpp's formats: its rows, their bits, and why ``--for llama.cpp`` is what it is."""

from pathlib import Path

import pytest
import torch

import lowmem
from benchmarks import gguf_quality
from lowmem import FourBit
from lowmem.io.formats.gguf.gguf_outlook import LLAMA_CPP
from lowmem.nn.techniques import embedding_and_output_technique
from tests.benchmarks.test_quality import BLOCKS, EMBEDDINGS, LINEAR, NORMS
from tests.io.formats.folders import fourbit, weights_of, write_folder

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "llama-cpp.md"


def cells_by_name() -> dict[str, list[str]]:
    text = PAGE.read_text(encoding="utf8")
    lines = (
        text.partition("<!-- python -m benchmarks.gguf_quality -->\n")[2].partition("<!-- end -->")[0].splitlines()
    )
    assert lines[:2] == gguf_quality.table([])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {name: cells for name, *cells in rows}


def test_the_table_has_the_rows_and_the_bits_of_what_lowmem_stores():
    cells = cells_by_name()
    assert list(cells) == [*gguf_quality.OWN, *gguf_quality.THEIRS]
    weights = BLOCKS * sum(rows * columns for rows, columns in LINEAR) + EMBEDDINGS[0] * EMBEDDINGS[1] + NORMS
    for name, (technique, exact) in gguf_quality.OWN.items():
        stored = sum(technique.skeleton(torch.empty(shape, device="meta")).nbytes for shape in LINEAR)
        ends = embedding_and_output_technique(technique).skeleton(torch.empty(EMBEDDINGS, device="meta")).nbytes
        assert cells[name][0] == f"{8 * (BLOCKS * stored + ends + 4 * NORMS) / weights:.2f}"
        assert cells[name][-1] == exact
    assert "for llama.cpp" in next(
        name for name, (technique, _) in gguf_quality.OWN.items() if technique == LLAMA_CPP
    )


def test_what_is_stored_for_llama_cpp_diverges_least_at_its_size():
    cells = cells_by_name()
    divergence = {name: float(row[1]) for name, row in cells.items() if float(row[0]) <= 5.35}
    chosen = next(name for name, (technique, _) in gguf_quality.OWN.items() if technique == LLAMA_CPP)
    assert min(divergence, key=divergence.__getitem__) == chosen
    assert FourBit("iq4_nl", embeddings="q8_0") == LLAMA_CPP


@pytest.mark.filterwarnings("ignore:no tokenizer is written")
def test_bits_of_a_file_are_those_of_its_tensors(tmp_path):
    weights = weights_of(fourbit("q4_0"))
    rows = lowmem.export(write_folder(tmp_path / "in", weights), tmp_path / "a.gguf")
    count = sum(weight.shape.numel() for weight in weights.values())
    assert gguf_quality.bits_of_file(tmp_path / "a.gguf", count) == 8 * sum(row.after_bytes for row in rows) / count

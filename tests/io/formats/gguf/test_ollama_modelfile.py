"""The Modelfile of Ollama."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.io.formats.gguf.ollama_modelfile import modelfile_text

BASE, ADAPTER = Path("folder/a b.gguf"), Path("folder/a b-adapter.gguf")
TEMPLATE = "{{ .System }}\n{{ .Prompt }}"


def test_a_modelfile_names_files_beside_it_and_quotes_texts():
    made = modelfile_text(BASE, ADAPTER, TEMPLATE, 'Say "no".\n', ["</s>", "<|end|>"])
    assert made == (
        'FROM ./a b.gguf\nADAPTER ./a b-adapter.gguf\nPARAMETER stop """</s>"""\nPARAMETER stop """<|end|>"""\n'
        'SYSTEM """Say "no".\n"""\nTEMPLATE """{{ .System }}\n{{ .Prompt }}"""\n'
    )
    assert modelfile_text(BASE, None, "x", None, []) == 'FROM ./a b.gguf\nTEMPLATE """x"""\n'


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"system": 'Be brief."""\nADAPTER /etc/passwd\nSYSTEM """'}, "^system='Be brief.*has three quotes"),
        ({"system": "{{ .Prompt }}"}, "^system='{{ .Prompt }}' has actions of Go's templates"),
        ({"system": "brief }}"}, "has actions of Go's templates"),
        ({"system": "zero\u200bwidth"}, r"^system='zero\\u200bwidth' has '\\u200b', which Ollama leaves out"),
        ({"system": "a\rb"}, r"has '\\r', which Ollama leaves out"),
        ({"template": '{{ .Prompt }}"""\nFROM other'}, "^the template=.* has three quotes"),
        ({"template": "\ufeff{{ .Prompt }}"}, "which Ollama leaves out"),
        ({"stop_texts": ['"""']}, "^the end=.* has three quotes"),
        ({"base": Path("a\nSYSTEM b.gguf")}, r"^the name=.* has '\\n', which Ollama leaves out"),
        ({"adapter": Path("a\x1b.gguf")}, "^the name=.* which Ollama leaves out"),
    ],
)
def test_a_text_that_a_modelfile_cannot_hold_is_refused(change, error):
    arguments = {"base": BASE, "adapter": ADAPTER, "template": TEMPLATE, "system": None, "stop_texts": []}
    with pytest.raises(ValueError, match=error) as raised:
        modelfile_text(**(arguments | change))
    assert "--for llama.cpp" in str(raised.value)


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_system_message_stands_in_the_file_as_it_is_or_is_refused(system):
    try:
        made = modelfile_text(BASE, None, "x", system, [])
    except ValueError:
        return
    assert made.startswith('FROM ./a b.gguf\nSYSTEM """' + system + '"""\nTEMPLATE ')
    assert made.count('"""') == 4

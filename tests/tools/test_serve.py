"""``lowmem serve`` starts the server of transformers, which answers with a stored model's own text."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers.utils.import_utils import is_serve_available

from lowmem.__main__ import main
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer
from tests.tools.conftest import CHAT

needs_server = pytest.mark.skipif(
    not is_serve_available(), reason="transformers[serving] is not installed: tox -e transformers"
)

OFFLINE = "1"


@contextmanager
def serving(folder, *options):
    """The port of a server in a process of its own, which is told to stop afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowmem", "serve", str(folder), "--port", str(port), *options]
    server = subprocess.Popen(
        command, env=dict(os.environ) | {"HF_HUB_OFFLINE": OFFLINE}, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait(server, port)
        yield port
    finally:
        server.send_signal(signal.SIGINT)
        told = server.communicate(timeout=60)[1]
    assert "fault of lowmem" not in told, told


@pytest.fixture
def stored(tmp_path):
    write_tokenizer(write(tmp_path / "dense"))
    config = tmp_path / "dense" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": CHAT}))
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "stored")]) == 0
    return tmp_path / "stored"


@pytest.mark.processes
@needs_server
def test_the_server_answers_what_generate_writes_within_its_limits(stored, capsys):
    """As the openai client of the guide asks, and as it must not be asked."""
    capsys.readouterr()
    assert main(["generate", str(stored), "--prompt", "abc", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    guide = Path(__file__).parents[2] / "docs" / "guides" / "use-what-you-trained.md"
    (example,) = (
        block
        for block in re.findall(r"```python server\n(.*?)```", guide.read_text("utf8"), re.DOTALL)
        if "openai" in block
    )
    with serving(stored, "--max-tokens", "20", "--max-body", "1") as port:
        body = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
        for name in ("stored", str(stored)):
            status, told = _asked(port, "/v1/completions", json.dumps(body | {"model": name}))
            assert (status, told["choices"][0]["text"]) == (200, text)
        exec(
            compile(example.replace("8000", str(port)).replace("max_tokens=100", "max_tokens=8"), "guide", "exec"), {}
        )
        assert capsys.readouterr().out.strip()
        for path, given, kind, expected in (
            ("/v1/completions", json.dumps(body | {"max_tokens": 10**9}), "application/json", 400),
            ("/v1/completions", json.dumps(body | {"prompt": "a" * 2**20}), "application/json", 413),
            ("/v1/chat/completions", "{", "application/json", 400),
            ("/v1/chat/completions", json.dumps({"messages": 3}), "application/json", 400),
            ("/load_model", json.dumps({"model": str(stored.parent / "dense")}), "application/json", 404),
            ("/reset", "", "text/plain", 415),
        ):
            status, told = _asked(port, path, given, kind)
            assert (status, set(told)) == (expected, {"error"}), path
        with urllib.request.urlopen(f"http://localhost:{port}/v1/models") as answer:
            assert [one["id"] for one in json.load(answer)["data"]] == ["stored"]


def _asked(port: int, path: str, body: str, kind: str = "application/json") -> tuple[int, dict]:
    """Return the status and the body of an answer."""
    request = urllib.request.Request(f"http://localhost:{port}{path}", body.encode(), {"content-type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _wait(server, port: int) -> None:
    """Return as soon as a server listens."""
    while server.poll() is None:
        try:
            socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"the server ended: {server.stderr.read()}")


@needs_server
def test_the_help_names_the_limits(tmp_path, capsys):
    assert main(["serve", str(write(tmp_path / "dense")), "--help"]) == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("--port", "--max-tokens", "--max-body"))


@needs_server
def test_code_of_a_folder_cannot_be_trusted(tmp_path, capsys):
    write_tokenizer(write(tmp_path / "dense"))
    assert main(["serve", str(tmp_path / "dense"), "--trust-remote-code"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_an_adapter_is_refused_with_the_command_that_helps(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a line has room for short paths alone
    adapter = Path("adapter")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    told = refused("serve", str(adapter))
    assert f"adapters: default; lowmem merge BASE {adapter} OUT --to bfloat16 writes a model to serve" in told
    (adapter / "other").mkdir()
    (adapter / "other" / "adapter_config.json").write_text("{}")
    assert f"adapters: default, other; lowmem merge BASE {adapter} OUT --adapter NAME" in refused(
        "serve", str(adapter)
    )


def test_a_missing_server_is_told_with_the_package_that_brings_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(write(tmp_path / "dense"))]) == 2
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err


@pytest.mark.processes
@needs_server
def test_an_adapter_with_its_kept_base_is_served(place, capsys):
    options = ["--data", "text.txt", "--length", "48", "--steps", "3", "--lr", "0.05", "--save", "tuned"]
    assert main(["fit", "llama", *options, "--keep-base"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("tuned").rglob("*")}
    capsys.readouterr()
    assert main(["generate", "tuned", "--prompt", "item", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    with serving("tuned") as port:
        body = json.dumps({"prompt": "item", "max_tokens": 8, "temperature": 0, "model": "tuned"})
        status, told = _asked(port, "/v1/completions", body)
        assert (status, told["choices"][0]["text"]) == (200, text)
        with urllib.request.urlopen(f"http://localhost:{port}/v1/models") as answer:
            assert [one["id"] for one in json.load(answer)["data"]] == ["tuned"]
    assert {path: path.stat().st_mtime_ns for path in Path("tuned").rglob("*")} == before


@pytest.mark.processes
@needs_server
def test_a_served_adapter_has_the_system_message_and_the_variables_of_its_training(place, capsys, monkeypatch):
    config = Path("llama", "tokenizer_config.json")
    template = "{{ greeting }}" + CHAT
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    options = ["--data", "data.jsonl", "--steps", "3", "--lr", "0.05", "--save", "tuned", "--keep-base"]
    assert main(["fit", "llama", *options, "--system", "add", "--template-kwargs", '{"greeting": "hello"}']) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", StringIO("after 1?\n"))
    assert main(["generate", "tuned", "--chat", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    body = {
        "messages": [{"role": "user", "content": "after 1?"}],
        "max_tokens": 8,
        "temperature": 0,
        "model": "tuned",
    }
    with serving("tuned") as port:
        status, told = _asked(port, "/v1/chat/completions", json.dumps(body))
    assert (status, told["choices"][0]["message"]["content"]) == (200, text)
    assert told["usage"]["prompt_tokens"] == len("hello<system>add;<user>after 1?;<assistant>")

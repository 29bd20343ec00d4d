"""``lowmem serve`` starts the server of transformers, which answers with a stored model's own text."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("transformers", "5.24", reason="transformers 5.24 is not installed: tox -e transformers")

from transformers.utils.import_utils import is_serve_available

from lowmem.__main__ import main
from tests.integrations.transformers.folders import write
from tests.integrations.transformers.tokens import write_tokenizer


@pytest.mark.processes
@pytest.mark.skipif(not is_serve_available(), reason="transformers[serving] is not installed: tox -e transformers")
def test_the_server_answers_what_generate_writes(tmp_path, capsys):
    write_tokenizer(write(tmp_path / "dense"))
    stored = str(tmp_path / "stored")
    assert main(["quantize", str(tmp_path / "dense"), stored]) == 0
    capsys.readouterr()
    assert main(["generate", stored, "--prompt", "abc", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowmem", "serve", stored, "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        asked = json.dumps({"model": stored, "prompt": "abc", "max_tokens": 8, "temperature": 0}).encode()
        assert _answer(server, port, asked)["choices"][0]["text"] == text
    finally:
        server.send_signal(signal.SIGINT)
        told = server.communicate(timeout=60)[1]
    assert "fault of lowmem" not in told, told
    assert server.returncode == 130, told


def _answer(server, port: int, asked: bytes) -> dict:
    """Return the server's answer, as soon as it listens."""
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions", asked, {"content-type": "application/json"}
    )
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except ConnectionError:
            time.sleep(0.2)
        except OSError as reason:
            if not isinstance(getattr(reason, "reason", None), ConnectionError):
                raise
            time.sleep(0.2)
    raise AssertionError(f"the server ended: {server.stderr.read()}")


def test_an_adapter_is_refused_with_the_command_that_helps(tmp_path, refused):
    (tmp_path / "adapter_config.json").write_text("{}")
    for command in (["serve", str(tmp_path)], ["export", str(tmp_path), str(tmp_path / "out.gguf")]):
        assert f"adapters: default; lowmem merge BASE {tmp_path} OUT writes a model to {command[0]}" in refused(
            *command
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    assert f"adapters: default, other; lowmem merge BASE {tmp_path} OUT --adapter NAME" in refused(
        "serve", str(tmp_path)
    )


def test_a_missing_server_is_told_with_the_package_that_brings_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(write(tmp_path / "dense"))]) == 2
    assert "pip install 'transformers[serving]'" in capsys.readouterr().err

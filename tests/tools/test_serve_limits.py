"""What the server never sees: each limit's answer, as JSON with a status of 4xx."""

import asyncio
import json

import pytest

from lowmem.tools.serve_limits import LimitsMiddleware

CHAT, TEXT, ANSWERS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "hello"}]


class Server:
    """Echoes bodies; fails where it is told to."""

    def __init__(self, failure=None):
        self.seen, self.failure = [], failure

    async def __call__(self, scope, receive, send):
        message = await receive()
        self.seen.append((scope["path"], json.loads(message["body"] or b"null")))
        if self.failure is not None:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"Internal Server Error"})
            raise self.failure
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def asked(path, body=b"", method="POST", server=None, parts=1, **headers):
    """The status and the body of the answer."""
    server, told = server or Server(), []
    if not isinstance(body, bytes):
        headers, body = {"content-type": "application/json"} | headers, json.dumps(body).encode()
    headers = {"host": "localhost:8000", **headers}
    step = -(-len(body) // parts) or 1
    pieces = [body[at : at + step] for at in range(0, len(body), step)] or [b""]
    messages = [{"type": "http.request", "body": one, "more_body": one is not pieces[-1]} for one in pieces]

    async def receive():
        return messages.pop(0)

    async def send(message):
        told.append(message)

    raw = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw}
    asyncio.run(LimitsMiddleware(server, "/models/small", "small", "localhost", 100, 1000)(scope, receive, send))
    start, *bodies = told
    return start["status"], json.loads(b"".join(one["body"] for one in bodies))


def test_names_are_listed_and_taken():
    _, listed = asked("/v1/models", method="GET")
    (model,) = listed["data"]
    assert model["id"] == "small"
    for name in ("small", "/models/small", None):
        server = Server()
        assert asked(TEXT, {"model": name, "prompt": "a", "max_tokens": 3}, server=server)[0] == 200
        assert server.seen == [(TEXT, {"model": "/models/small", "prompt": "a", "max_tokens": 3})]


@pytest.mark.parametrize("path", [CHAT, TEXT, ANSWERS, "/v1/systemone", "/load_model"])
def test_other_models_are_not_loaded(path):
    server = Server()
    body = {"messages": HELLO, "input": "a"} if path in (CHAT, ANSWERS) else {}
    status, told = asked(path, body | {"model": "/home/another"}, server=server)
    assert (status, told["error"]["code"], server.seen) == (404, "model_not_found", [])
    assert "'small' is" in told["error"]["message"]
    assert asked("/v1/audio/transcriptions", b"model=/home/another")[0] == 404


def test_a_request_without_a_number_of_tokens_gets_one():
    for path, body, name in (
        (CHAT, {"messages": HELLO}, "max_tokens"),
        (ANSWERS, {"input": "a"}, "max_output_tokens"),
    ):
        server = Server()
        asked(path, body, server=server)
        assert server.seen[0][1][name] == 100  # of at most 100, and 1024 where that is allowed


REFUSED = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "nested": b"[" * 900,
    "a list": [1],
    "a number": 3,
    "no messages": {},
    "messages of another kind": {"messages": "hello"},
    "empty messages": {"messages": []},
    "messages of texts": {"messages": ["hello"]},
    "no role": {"messages": [{"content": "hello"}]},
    "content of numbers": {"messages": [{"role": "user", "content": 3}]},
    "parts without a type": {"messages": [{"role": "user", "content": [{"text": "hello"}]}]},
    "a model of another kind": {"messages": HELLO, "model": 3},
    "tokens": {"messages": HELLO, "max_tokens": 10**9},
    "tokens by another name": {"messages": HELLO, "max_completion_tokens": 101},
    "no tokens": {"messages": HELLO, "max_tokens": 0},
    "tokens as text": {"messages": HELLO, "max_tokens": "3"},
    "half a token": {"messages": HELLO, "max_tokens": 0.5},
    "tokens in generation_config": {"messages": HELLO, "generation_config": json.dumps({"max_new_tokens": 10**9})},
    "a broken generation_config": {"messages": HELLO, "generation_config": "{"},
    "generation_config of another kind": {"messages": HELLO, "generation_config": {}},
    "temperature": {"messages": HELLO, "temperature": "hot"},
    "a negative temperature": {"messages": HELLO, "temperature": -1},
    "top_p": {"messages": HELLO, "top_p": [1]},
    "seed": {"messages": HELLO, "seed": "one"},
    "stop": {"messages": HELLO, "stop": 3},
    "logit_bias": {"messages": HELLO, "logit_bias": {"a": 1}},
    "stream": {"messages": HELLO, "stream": "yes"},
    "tools": {"messages": HELLO, "tools": "all"},
    "chat_template_kwargs": {"messages": HELLO, "chat_template_kwargs": 3},
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_bodies_are_errors_of_json(case):
    server = Server()
    status, told = asked(CHAT, REFUSED[case], server=server, content_type="application/json")
    assert (status, server.seen) == (400, [])
    assert set(told["error"]) == {"message", "type", "code"}


def test_not_a_number_is_refused():
    assert asked(CHAT, {"messages": HELLO, "temperature": float("nan")})[0] == 400


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("announced", [{}, {"content_length": "1021"}, {"content_length": "5"}])
def test_long_bodies_are_refused_as_they_arrive(parts, announced):
    status, told = asked(TEXT, {"prompt": "a" * 1008}, parts=parts, **announced)
    assert status == 413
    assert "--max-body" in told["error"]["message"]
    assert asked(TEXT, {"prompt": "a" * 900}, parts=parts)[0] == 200


def test_an_empty_prompt_of_which_a_tokenizer_may_make_no_token_is_refused():
    status, told = asked(TEXT, {"prompt": ""})
    assert (status, told["error"]["message"]) == (400, "prompt='' must be a string, not an empty one")


FOREIGN = {
    "an origin": {"origin": "http://evil.example"},
    "another port": {"origin": "http://localhost:3000"},
    "no origin": {"origin": "null"},
    "a site": {"sec_fetch_site": "cross-site"},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_pages_of_other_origins_write_nothing(case):
    for path, body in (("/reset", b""), (CHAT, {"messages": HELLO})):
        server = Server()
        assert asked(path, body, server=server, **FOREIGN[case])[0] == 403
        assert server.seen == []
        assert asked(path, body, origin="http://localhost:8000", sec_fetch_site="same-origin")[0] == 200


def test_bodies_that_any_page_may_send_are_refused():
    for kind in (
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
    ):
        server = Server()
        assert asked("/reset", b"null", server=server, content_type=kind)[0] == 415
        assert asked(CHAT, json.dumps({"messages": HELLO}).encode(), server=server, content_type=kind)[0] == 415
        assert server.seen == []
    assert asked(CHAT, b"{}")[0] == 415
    assert asked("/reset")[0] == 200


def test_a_name_that_stands_for_this_machine_is_refused():
    """A web page may give its own name the address of this machine."""
    for headers in (
        {"host": "evil.example:8000"},
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
    ):
        assert asked("/reset", **headers)[0] == 403
        assert asked("/v1/models", method="GET", **headers)[0] == 403
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        assert asked("/reset", host=host)[0] == 200


@pytest.mark.parametrize("headers", [{"host": "["}, {"host": "[::1"}, {"origin": "http://["}])
def test_hosts_and_origins_that_are_none_are_refused(headers):
    server = Server()
    status, told = asked("/reset", server=server, **headers)
    assert (status, told["error"]["code"], server.seen) == (403, "forbidden", [])


def test_a_missing_prompt_is_named():
    status, told = asked(TEXT, {"max_tokens": 3})
    assert (status, told["error"]["message"]) == (400, "prompt is missing")


def test_failures_are_json():
    body = {"messages": HELLO}
    for failure in (ValueError("roles must alternate"), KeyError("content")):
        status, told = asked(CHAT, body, server=Server(failure))
        assert status == 400
        assert str(failure) == told["error"]["message"]
    with pytest.raises(RuntimeError, match="no memory"):
        asked(CHAT, body, server=Server(RuntimeError("no memory")))

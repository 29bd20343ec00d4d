"""What ``lowmem serve`` refuses before the server of transformers sees it: a middleware of ASGI."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias
from urllib.parse import SplitResult, urlsplit

from lowmem.errors import short_repr

_Message: TypeAlias = dict[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
App: TypeAlias = Callable[[Any, _Receive, _Send], Awaitable[None]]

_READING = "GET", "HEAD", "OPTIONS"
_LOOPBACK = "localhost", "127.0.0.1", "::1"
_ASKED = {"/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"}
"""Paths that generate, and the field of each that limits the new tokens."""

_NEEDED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}
_JSON = *_ASKED, "/v1/systemone", "/load_model"
_TOKENS = "max_tokens", "max_completion_tokens", "max_output_tokens"
_SIMPLE = "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"  # which web pages may send unasked
_USUAL_TOKENS = 1024  # of a request that names no number, as transformers' server does it
_SAMPLING = "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"


def _is_json_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _is_list_of_chat_messages(value: Any) -> bool:
    """Whether these are messages of a chat, with a role, and text or parts with a type."""
    if not _is_list_of_objects(value) or not value:
        return False
    for message in value:
        content = message.get("content")
        parts = _is_list_of_objects(content) and all(isinstance(part.get("type"), str) for part in content)
        if not isinstance(message.get("role"), str) or not (content is None or isinstance(content, str) or parts):
            return False
    return True


def _is_text_or_list_of_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_logit_bias_object(value: Any) -> bool:
    keys = isinstance(value, dict) and all(key.isdecimal() for key in value)
    return keys and all(map(_is_json_number, value.values()))


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a string"),
    "prompt": (lambda value: isinstance(value, str) and value != "", "a string, not an empty one"),
    "suffix": (lambda value: isinstance(value, str), "a string"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "seed": (lambda value: type(value) is int and 0 <= value < 1 << 63, "an integer from 0 to 2^63 - 1"),
    "temperature": (lambda value: _is_json_number(value) and 0 <= value <= 100, "a number from 0 to 100"),
    "top_p": (lambda value: _is_json_number(value) and 0 < value <= 1, "a number above 0, at most 1"),
    "frequency_penalty": (lambda value: _is_json_number(value) and -1 < value <= 2, "a number above -1, at most 2"),
    "stop": (_is_text_or_list_of_texts, "a text, or a list of texts"),
    "logit_bias": (_is_logit_bias_object, "an object of numbers by token"),
    "messages": (
        _is_list_of_chat_messages,
        "a list of objects with a role, and a text or parts with a type as content",
    ),
    "input": (lambda value: isinstance(value, str) or _is_list_of_objects(value), "a string or a list of objects"),
    "instructions": (lambda value: isinstance(value, str), "a string"),
    "tools": (_is_list_of_objects, "a list of objects"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "an object"),
}
"""What fields of a body must be, where they are not null."""


class _HTTPRequestError(Exception):
    def __init__(self, status: int, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class LimitsMiddleware:
    """Passes on what the server may do, and answers everything else with an error of OpenAI's form.

    Args:
        app: the server.
        server_model_name: the name under which the server knows its model.
        listed_model_name: the short name, which is listed.
        host: where it listens. On this machine's own addresses, only requests to these are taken, since a web page
            may give its own name any address.
        max_tokens: the most new tokens of a request.
        max_body_bytes: the most bytes of a body.
        allow_cross_origin: whether web pages of other origins may write.
    """

    def __init__(
        self,
        app: App,
        server_model_name: str,
        listed_model_name: str,
        host: str,
        max_tokens: int,
        max_body_bytes: int,
        allow_cross_origin: bool = False,
    ) -> None:
        self.app, self.model, self.name, self.host = app, server_model_name, listed_model_name, host
        self.tokens, self.size, self.cross_origin = max_tokens, max_body_bytes, allow_cross_origin

    async def __call__(self, scope: Any, receive: _Receive, send: _Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            headers = {key.decode("latin1").lower(): value.decode("latin1") for key, value in scope["headers"]}
            self._check_host_and_origin(scope, headers)
            if scope["method"] == "GET" and scope["path"] == "/v1/models":
                model = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
                return await _send_json_response(send, 200, {"object": "list", "data": [model]})
            if scope["method"] in _READING:
                return await self.app(scope, receive, send)
            body = await self._read_limited_body(headers, receive)
            if scope["path"] in _JSON:
                body = self._check_and_complete_body(scope["path"], headers, body)
            elif scope["path"].startswith("/v1/audio/"):
                raise _HTTPRequestError(404, "lowmem serve answers with text; `transformers serve` takes audio")
        except _HTTPRequestError as refusal:
            return await _send_json_response(send, refusal.status, _openai_error_object(refusal, refusal.code))
        others = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
        scope = scope | {"headers": [*others, (b"content-length", b"%d" % len(body))]}
        return await self._forward_request(scope, [body], receive, send)

    async def _forward_request(self, scope: Any, bodies: list[bytes], receive: _Receive, send: _Send) -> None:
        """Let the server answer; a failure before the answer starts is an error of JSON."""
        started = False

        async def replay_body_or_receive() -> _Message:
            return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

        async def send_unless_server_error(message: _Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start" and message["status"] == 500:
                return  # of starlette, as text; the failure follows
            started = started or message["type"] == "http.response.start"
            if started:
                await send(message)

        try:
            await self.app(scope, replay_body_or_receive, send_unless_server_error)
        except Exception as failure:
            if started:
                raise
            # The server's functions for templates and for generation raise these for what a body asks of them.
            asked = isinstance(failure, (ValueError, TypeError, KeyError)) or "jinja2" in type(failure).__module__
            await _send_json_response(
                send, 400 if asked else 500, _openai_error_object(failure, "invalid_request" if asked else "failed")
            )
            if not asked:
                raise
            logging.getLogger("uvicorn.error").warning("refused %s", scope["path"], exc_info=failure)

    def _check_host_and_origin(self, scope: Any, headers: Mapping[str, str]) -> None:
        """Raise if a web page of another origin sends a request that may change something."""
        asked = headers.get("host", "")
        if self.host in _LOOPBACK and _split_checked_url(f"//{asked}").hostname not in _LOOPBACK:
            raise _HTTPRequestError(403, f"host {asked!r} is not this machine: ask {self.host}", "forbidden")
        if self.cross_origin or scope["method"] in _READING:
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if (origin is not None and _split_checked_url(origin).netloc != asked) or site not in ("same-origin", "none"):
            remedy = "start the server with --enable-cors to allow it"
            raise _HTTPRequestError(403, f"origin {origin!r} is another than {asked!r}: {remedy}", "forbidden")
        kind = _media_type(headers)
        if kind in _SIMPLE:
            raise _unsupported_media_type_error(kind)

    async def _read_limited_body(self, headers: Mapping[str, str], receive: _Receive) -> bytes:
        """Return a body; raise as soon as it is too long."""
        announced, body, more = headers.get("content-length", ""), bytearray(), True
        size = int(announced) if announced.isdecimal() else 0
        while more and size <= self.size:
            message = await receive()
            body += message.get("body", b"")
            size, more = max(size, len(body)), message.get("more_body", False)
        if size > self.size:
            limit = f"{self.size / 2**20:g} MiB"
            raise _HTTPRequestError(413, f"the body is longer than {limit}, which --max-body raises", "too_large")
        return bytes(body)

    def _check_and_complete_body(self, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        """Return a body with the server's own name of the model and a number of tokens; raise for any other body."""
        if (kind := _media_type(headers)) != "application/json":
            raise _unsupported_media_type_error(kind)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError) as reason:
            raise _HTTPRequestError(400, f"the body is no JSON: {reason}") from None
        if not isinstance(asked, dict):
            raise _HTTPRequestError(400, f"the body is a {type(asked).__name__}, and must be an object")
        asked = {key: value for key, value in asked.items() if value is not None}
        for name, (fits, wanted) in _FIELDS.items():
            if name in asked and not fits(asked[name]):
                raise _HTTPRequestError(400, f"{name}={short_repr(asked[name])} must be {wanted}")
        self._check_generation_limits(asked)
        model = asked.get("model", self.model)
        if model not in (self.model, self.name):
            raise _HTTPRequestError(
                404, f"model {short_repr(model)} is not served; {self.name!r} is", "model_not_found"
            )
        asked["model"] = self.model
        if path in _ASKED and not any(name in asked for name in _TOKENS):
            asked[_ASKED[path]] = min(_USUAL_TOKENS, self.tokens)
        if path in _NEEDED and _NEEDED[path] not in asked:
            raise _HTTPRequestError(400, f"{_NEEDED[path]} is missing")
        return json.dumps(asked).encode()

    def _check_generation_limits(self, request: dict[str, Any]) -> None:
        """Raise for more tokens than the limit, also as a field of ``generation_config``."""
        for name in _TOKENS:
            count = request.get(name, 1)
            if type(count) is not int or not 1 <= count <= self.tokens:
                limit = f"an integer from 1 to {self.tokens}, which --max-tokens of the server raises"
                raise _HTTPRequestError(400, f"{name}={short_repr(count)} must be {limit}")
        if "generation_config" not in request:
            return
        try:
            config = json.loads(request["generation_config"])
        except (TypeError, ValueError, RecursionError):
            config = None
        if not isinstance(config, dict) or not set(config) <= set(_SAMPLING):
            config_text = short_repr(request["generation_config"])
            raise _HTTPRequestError(
                400, f"generation_config={config_text} must be JSON of an object of {', '.join(_SAMPLING)}"
            )


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _unsupported_media_type_error(media_type: str) -> _HTTPRequestError:
    return _HTTPRequestError(415, f"content-type {media_type!r} must be application/json", "unsupported_media_type")


def _split_checked_url(url: str) -> SplitResult:
    """Return the parts of an address; raise for none, as ``//[``."""
    try:
        return urlsplit(url)
    except ValueError as reason:
        raise _HTTPRequestError(403, f"{short_repr(url)} is no address: {reason}", "forbidden") from None


def _openai_error_object(error: Exception, code: str) -> dict[str, Any]:
    return {"error": {"message": str(error) or type(error).__name__, "type": "invalid_request_error", "code": code}}


async def _send_json_response(send: _Send, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

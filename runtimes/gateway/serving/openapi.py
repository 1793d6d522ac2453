"""The OpenAPI document: what each route takes, within which limits, and what it answers.

Request bodies are described by the types that parse them. What a schema cannot express (that an image must be readable,
that no text may hold one) is reported by an error of the ``Error`` schema.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from runtimes.gateway.answers import FIELD, HEADER
from runtimes.gateway.chat.messages import Message
from runtimes.gateway.chat.types import Chat
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.responses.model import ResponseBody
from safevlm.version import VERSION

__all__ = ["openapi_document"]

TEXT: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object"}
EMPTY: dict[str, Any] = {"enum": [None, "", [], {}]}
MAYBE: dict[str, Any] = {"type": ["string", "null"]}
IMAGE_URL: dict[str, Any] = {
    "type": "string",
    "format": "image-url",
    "description": "An image as a data URL (`data:image/png;base64,…`), or the http(s) URL of a host that this server "
    "fetches from.",
}
STATUSES = {
    400: "The request is refused: `param` names the place, `code` the reason.",
    401: "The API key is missing or wrong.",
    404: "Unknown model or path.",
    405: "The path does not have this method.",
    408: "The body did not arrive in time.",
    413: "The body or an image is too large.",
    500: "Internal error of this server.",
    502: "The upstream did not answer as it should.",
    503: "The server is overloaded, or the guard gave no verdict: try again after `Retry-After` seconds.",
    504: "The upstream did not answer in time.",
}


def openapi_document(options: GatewayOptions, *, key: bool, upstream: bool) -> dict[str, Any]:
    """Return the document of a server with these limits; ``key`` says whether it asks clients for one."""
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Safe-VLM gateway",
            "version": VERSION,
            "description": "An OpenAI-compatible server whose guard judges every image before a language model is "
            f"shown it. One body has at most {options.max_body} bytes and {options.max_images} images of at most "
            f"{options.max_image_bytes} bytes and {options.max_pixels} pixels.",
        },
        "paths": _paths(upstream),
        "components": {"schemas": {**_taken(options), **_answered()}},
    }
    if key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            if path.startswith("/v1/"):
                for operation in methods.values():
                    operation["security"] = [{"key": []}]
    return document


def _paths(upstream: bool) -> dict[str, Any]:
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    model = _operation("getModel", "One model, by its id.", "Model", passed=upstream)
    return {
        "/v1/chat/completions": {
            "post": _operation(
                "createChatCompletion",
                "Answer a conversation.",
                "Completion",
                body="Chat",
                stream=True,
                passed=upstream,
            )
        },
        "/v1/responses": {
            "post": _operation(
                "createResponse",
                "Answer a conversation, in the form of OpenAI's Responses.",
                "Response",
                body="Responses",
                stream=True,
                passed=upstream,
            )
        },
        "/v1/guard": {
            "post": _operation("judgeImages", "Judge images, without an answer.", "Judgements", body="Guard")
        },
        "/v1/models": {"get": _operation("listModels", "The models that are served.", "Models", passed=upstream)},
        "/v1/models/{id}": {"get": {**model, "parameters": [name]}},
        "/livez": {"get": _plain("live", "Whether the process is alive.", "Live")},
        "/readyz": {"get": _plain("ready", "Whether the server is ready for requests.", "Ready", also=503)},
        "/healthz": {"get": _plain("health", "Whether guard and upstream are available.", "Health", also=503)},
        "/metrics": {"get": _plain("metrics", "Counters and histograms for Prometheus.", None)},
        "/openapi.json": {"get": _plain("openapi", "This document.", "Document")},
    }


def _operation(
    name: str, summary: str, answer: str, *, body: str | None = None, stream: bool = False, passed: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(answer)}}
    ok: dict[str, Any] = {"description": summary, "content": content, "headers": {"X-Request-Id": {"schema": TEXT}}}
    if stream:
        content["text/event-stream"] = {}
        ok["headers"][HEADER] = {
            "schema": TEXT,
            "description": f"For a stream: the `{FIELD}` field of an answer, as one line of JSON.",
        }
    error = {"application/json": {"schema": _ref("Error")}}
    statuses = STATUSES if body is not None else {each: STATUSES[each] for each in (401, 404, 405, 500, 502, 503, 504)}
    answers = {"200": ok, **{str(each): {"description": said, "content": error} for each, said in statuses.items()}}
    if passed:
        answers["default"] = {"description": "The upstream's own error, with its status.", "content": error}
    found: dict[str, Any] = {"operationId": name, "summary": summary, "responses": answers}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return found


def _plain(name: str, summary: str, answer: str | None, *, also: int | None = None) -> dict[str, Any]:
    content = {"text/plain": {"schema": TEXT}} if answer is None else {"application/json": {"schema": _ref(answer)}}
    answers = {str(each): {"description": summary, "content": content} for each in (200, also) if each is not None}
    answers["405"] = {"description": STATUSES[405], "content": {"application/json": {"schema": _ref("Error")}}}
    return {"operationId": name, "summary": summary, "responses": answers}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


# -- bodies that are taken ------------------------------------------------------------------------------


def _taken(options: GatewayOptions) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, model in (("Chat", Chat), ("Responses", ResponseBody)):
        found |= _schemas(name, model)
    chat = found["Chat"]["properties"]
    for key in sorted(Chat.EMPTY - chat.keys()):
        chat[key] = {"description": "Accepted only when empty, and dropped.", **EMPTY}
    for key in sorted(options.pass_keys):
        chat[key] = {"description": "Passed on: this server's operator allows it."}
        found["Responses"]["properties"][key] = chat[key]
    chat["modalities"] = {"const": ["text"]}
    for key in chat.keys() - {"messages"}:
        chat[key] = {"anyOf": [chat[key], EMPTY]}
    items = found["Responses"]["properties"]["input"]["oneOf"][1]
    items["contains"] = {**OBJECT, "not": {"properties": {"type": {"const": "reasoning"}}, "required": ["type"]}}
    found["Chat.Message"] = {"oneOf": _messages(found["Chat.Message"])}
    found["Chat.ImageUrl"]["properties"]["url"] = IMAGE_URL
    found["Chat.ImagePart"]["properties"]["image_url"] = {"oneOf": [IMAGE_URL, _ref("Chat.ImageUrl")]}
    found["Responses.InputImage"]["properties"]["image_url"] = IMAGE_URL
    images = {"type": "array", "minItems": 1, "maxItems": options.max_images, "items": IMAGE_URL}
    found["Guard"] = {**OBJECT, "properties": {"images": images}, "required": ["images"], "additionalProperties": False}
    return found


def _schemas(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema as ``name``, and those of its parts as ``name.Part``."""
    schema = model.model_json_schema(ref_template=f"#/components/schemas/{name}.{{model}}")
    parts = schema.pop("$defs")
    found = {name: schema, **{f"{name}.{part}": each for part, each in parts.items()}}
    return {each: _untitled(of) for each, of in found.items()}


def _untitled(schema: Any) -> Any:
    """Leave out the titles and defaults that pydantic makes of names, and close objects whose keys have a pattern.

    Where there may be no other keys there may be null ones, see :class:`runtimes.gateway.chat.typed.Typed`.
    """
    if isinstance(schema, list):
        return [_untitled(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "patternProperties" in schema else {}
    return closed | {key: _kept(key, value) for key, value in schema.items() if key not in ("title", "default")}


def _kept(key: str, value: Any) -> Any:
    if key == "properties":  # whose keys are names, a title among them
        return {name: _untitled(of) for name, of in value.items()}
    return {"type": "null"} if key == "additionalProperties" and value is False else _untitled(value)


def _messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a message's schema as one for each role that has keys of its own."""
    answers = {*Message.ANSWERS, *Message.BLOCKS}
    found = []
    for roles, without, required in (
        (("user", "system", "developer"), {*answers, "tool_call_id"}, ("role", "content")),
        (("tool",), answers, ("role", "content")),
        (("assistant",), {"tool_call_id"}, ("role",)),
        (("function",), {*answers, "tool_call_id"}, ("role",)),
    ):
        one = copy.deepcopy(dict(message))
        for key in without:
            one["properties"][key] = {"enum": [None]}
        one["properties"]["role"] = {"enum": list(roles)}
        if "content" in required:
            one["properties"]["content"] = one["properties"]["content"]["anyOf"][0]
        for key in Message.EMPTY:
            one["properties"][key] = EMPTY
        found.append({**one, "required": list(required)})
    return found


# -- what is answered -----------------------------------------------------------------------------------


def _answered() -> dict[str, Any]:
    error = {"message": TEXT, "type": MAYBE, "param": MAYBE, "code": {"type": ["string", "integer", "null"]}}
    verdict = {"verdict": TEXT, "images": {"type": "array", "items": OBJECT}, "bundle": MAYBE}
    judged = {"index": {"type": "integer"}, "verdict": {"enum": ["allow", "unsure", "block"]}, "label": TEXT}
    rows = {"type": "array", "items": _object(**judged)}
    return {
        "Error": _object(error=_object(**error)),
        "Verdict": _object(**verdict),
        "Completion": {**_object(choices={"type": "array", "items": OBJECT}), **_with_verdict()},
        "Response": {
            **_object(
                id=TEXT,
                object={"const": "response"},
                status={"enum": ["completed", "incomplete"]},
                output={"type": "array", "items": OBJECT},
            ),
            **_with_verdict(),
        },
        "Judgements": _object(object={"const": "list"}, data=rows, bundle=MAYBE),
        "Model": _object(id=TEXT),
        "Models": _object(data={"type": "array", "items": _ref("Model")}),
        "Live": _object(status={"const": "ok"}),
        "Ready": _object(status={"enum": ["ready", "not ready"]}, reasons={"type": "array", "items": TEXT}),
        "Health": _object(status={"enum": ["ok", "stuck"]}, guard=TEXT, upstream=TEXT),
        "Document": _object(openapi=TEXT, paths=OBJECT),
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {**OBJECT, "properties": properties, "required": list(properties)}


def _with_verdict() -> dict[str, Any]:
    return {"allOf": [{**OBJECT, "properties": {FIELD: _ref("Verdict")}, "required": [FIELD]}]}

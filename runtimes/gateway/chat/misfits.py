"""What does not fit a request's types, in our own sentences: the first problem, its place, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from runtimes.gateway.chat.pass_keys import may_pass
from runtimes.gateway.refusal import Refusal, bad_request
from safevlm.terminal.printable import shortened

__all__ = ["misfit", "place", "unknown"]

TYPES = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "string_unicode": "text without unpaired surrogates",
    "string_pattern_mismatch": "a token id",
}
"""What was wanted, by the names of pydantic's errors."""


def misfit(error: ValidationError) -> Refusal:
    """Return the refusal, 400, of the first problem."""
    found = error.errors(include_url=False)[0]
    steps = [step for step in found["loc"] if not _is_tag(step)]
    context: dict[str, Any] = {**found.get("ctx", {}), "of": found["loc"][-2:-1]}
    if found["type"] in SENTENCES:
        return SENTENCES[found["type"]](steps, found["input"], context)
    where = place(steps)
    wanted = found["msg"] if found["type"] == "wanted" else TYPES.get(found["type"])
    if found["type"] == "literal_error":
        wanted = context["expected"]
    elif found["type"] in ("too_long", "dict_too_long"):
        wanted = f"at most {context['max_length']} items long"
    elif found["type"] in ("too_short", "string_too_short"):
        wanted = f"at least {context['min_length']} long"
    if wanted is None:
        return bad_request(f"{where} has a wrong value: {found['msg']}.", param=where)
    return bad_request(f"{where} must be {wanted}.", param=where)


def unknown(name: str) -> Refusal:
    """Return the refusal of a top-level key that is not accepted."""
    shown = shortened(name)
    allowed = ", or ask the operator of this server to allow it (--pass-key)" if may_pass(name) else ""
    return bad_request(
        f"the key '{shown}' is not accepted. Leave it out{allowed}.",
        code="unknown_parameter",
        param=shown,
    )


def place(steps: list[Any]) -> str:
    """Return the place of a value: ``messages[0].content[1].image_url.detail``."""
    found = ""
    for step in steps:
        found += f"[{step}]" if isinstance(step, int) else f".{shortened(str(step), 40)}"
    return found.removeprefix(".") or "the body"


PARTS = ("<text>", "<image_url>", "<refusal>")


def _is_tag(step: int | str) -> bool:
    return isinstance(step, str) and (step == "[key]" or step in TAGS)


TAGS = frozenset(
    f"<{tag}>"
    for tag in (
        *("string", "parts", "plain", "text", "refusal", "image_url", "url", "object"),
        *("function", "custom", "word", "list"),
    )
)


def _extra(steps: list[Any], _: Any, context: dict[str, Any]) -> Refusal:
    parent, key = place(steps[:-1]), shortened(str(steps[-1]))
    kind = next((tag for tag in context["of"] if tag in PARTS), None)
    of_type = "" if kind is None else f" of type '{kind[1:-1]}'"
    return bad_request(
        f"{parent}{of_type} has the key '{key}', which is not accepted. Leave it out.",
        code="unknown_parameter",
        param=place(steps),
    )


def _missing(steps: list[Any], _: Any, __: dict[str, Any]) -> Refusal:
    return bad_request(f"{place(steps)} is missing.", code="missing_required_parameter", param=place(steps))


def _part(steps: list[Any], given: Any, _: dict[str, Any]) -> Refusal:
    kind = given.get("type") if isinstance(given, dict) else None
    shown = shortened(kind) if isinstance(kind, str) else None
    where = place(steps)
    return bad_request(
        f"{where} is of type '{shown}'. Only 'text' and 'image_url' are accepted.",
        code="unsupported_content",
        param=f"{where}.type" if isinstance(given, dict) else where,
    )


def _image(steps: list[Any], _: Any, __: dict[str, Any]) -> Refusal:
    return bad_request(f"{place(steps)}: an image must be given as a URL.", param=place(steps))


def _tool(steps: list[Any], given: Any, _: dict[str, Any]) -> Refusal:
    if not isinstance(given, dict):
        return bad_request(f"{place(steps)} must be an object.", param=place(steps))
    where = place([*steps, "type"])
    return bad_request(f"{where} must be 'function' or 'custom'.", param=where)


def _of_role(steps: list[Any], _: Any, context: dict[str, Any]) -> Refusal:
    where = place([*steps, context["key"]])
    return bad_request(f"{where} is not accepted from the role '{context['role']}'. Leave it out.", param=where)


def _no_content(steps: list[Any], _: Any, context: dict[str, Any]) -> Refusal:
    return _missing([*steps, context["key"]], _, context)


SENTENCES: dict[str, Callable[[list[Any], Any, dict[str, Any]], Refusal]] = {
    "extra_forbidden": _extra,
    "missing": _missing,
    "part": _part,
    "image": _image,
    "tool": _tool,
    "role_key": _of_role,
    "no_content": _no_content,
}

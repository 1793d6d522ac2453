"""What the types of a chat request are made of: strict objects that write themselves, and ranges with a sentence.

Members of a union are distinguished by a tag in angle brackets, so that an error has one place and one reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = ["CONTENT", "TOOL", "AtMost", "Between", "Free", "Label", "Name", "Typed", "is_empty", "tag_of"]

MAX_KEYS = 64
"""Maximum keys of a typed object: bounds the errors collected for keys that are not accepted."""


@dataclass(frozen=True)
class Between:
    """A number from ``low`` to ``high``, or text of so many characters; one sentence for whatever is neither."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner: Any = {**handler(source)}
        if source is str:
            inner.update(min_length=self.low, max_length=self.high)
            wanted = f"text of {self.low} to {self.high} characters"
        else:
            inner.update(ge=self.low, le=self.high)
            wanted = f"a {'whole ' if source is int else ''}number from {self.low} to {self.high}"
        if source is int:
            inner = core_schema.no_info_before_validator_function(_whole, inner)
        return core_schema.custom_error_schema(inner, custom_error_type="wanted", custom_error_message=wanted)


def _whole(given: Any) -> Any:
    """Return a number as JSON has it, which knows one kind: 16.0 is 16."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


@dataclass(frozen=True)
class AtMost:
    """An object of at most so many keys; more are refused before any of them is looked at."""

    keys: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def few(given: Any) -> Any:
            if isinstance(given, dict) and len(given) > self.keys:
                raise PydanticCustomError("wanted", f"an object of at most {self.keys} keys")
            return given

        return core_schema.no_info_before_validator_function(few, handler(source))


Name = Annotated[str, Between(1, 128)]
Label = Annotated[str, Between(0, 1024)]
Free = dict[str, Any]
"""A JSON object whose form is the client's; it is bounded and looked through where the request is parsed."""


class Typed(BaseModel):
    """An object of the request: strict types, no other keys but null ones; those in ``DROPPED`` are not written."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    DROPPED: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _said(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_KEYS:
            raise PydanticCustomError("wanted", f"an object of at most {MAX_KEYS} keys")
        return {key: value for key, value in given.items() if value is not None}  # null says nothing, whatever the key

    def written(self, urls: Iterator[str]) -> dict[str, Any]:
        """Return the object as it goes upstream; each image takes its URL from ``urls``."""
        fields = type(self).model_fields
        return {
            fields[name].alias or name: _written(value, urls)
            for name, value in self
            if value is not None and name not in self.DROPPED
        }


def _written(value: Any, urls: Iterator[str]) -> Any:
    if isinstance(value, Typed):
        return value.written(urls)
    if isinstance(value, list):
        return [_written(each, urls) for each in value]
    return value


def tag_of(given: Any, name: str) -> Any:
    """Return a key of what is still JSON or, where pydantic writes a schema or a dump, an object."""
    return given.get(name) if isinstance(given, dict) else getattr(given, name, None)


def is_empty(value: Any) -> bool:
    """Say whether a value says nothing: null, or empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _kind_of_content(given: Any) -> str | None:
    return "<string>" if isinstance(given, str) else "<parts>" if isinstance(given, list) else None


CONTENT = Discriminator(_kind_of_content, custom_error_type="wanted", custom_error_message="text or a list of parts")


def _kind_of_tool(given: Any) -> str | None:
    kind = tag_of(given, "type")
    return "<custom>" if kind == "custom" else "<function>" if kind in ("function", None) else None


TOOL = Discriminator(_kind_of_tool, custom_error_type="tool", custom_error_message="of type 'function' or 'custom'")

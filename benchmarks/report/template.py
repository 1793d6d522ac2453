"""What all pages are made with: templates and styles of this package, every text escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from benchmarks.report import text
from safevlm.errors import MissingExtraError

__all__ = ["asset", "render"]

TEMPLATES = "templates"
_FILTERS = {
    "bounds": text.bounds_of,
    "change": text.change_of,
    "count": text.count,
    "interval": text.interval_of,
    "judged": text.judged_of,
    "json": lambda value: text.visible(json.dumps(value, indent=1, ensure_ascii=False, default=str)),
    "margin": text.margin_of,
    "missing": text.missing_of,
    "p": text.p_value,
    "moment": text.moment,
    "plain": text.plain,
    "sentence": lambda line: text.unbroken(text.sentence_of(line)),
    "unbroken": text.unbroken,
    "upper": text.upper_of,
    "value": text.value_of,
    "visible": text.visible,
    "whole": text.whole,
}


def render(name: str, context: Mapping[str, Any]) -> str:
    """Return the page that the template ``name`` gives. Raises MissingExtraError without jinja2."""
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "the report") from error
    environment = Environment(
        loader=FunctionLoader(asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(_FILTERS)
    return environment.get_template(name).render(context)


def asset(name: str) -> str:
    """Return the text of a template, style or script."""
    return resources.files(__package__ or "").joinpath(TEMPLATES, name).read_text(encoding="utf-8")

"""A gateway's options from a file and from the environment: ``--config gateway.toml``.

Every option is a key of the file, by its name without the dashes in front, and with ``_`` or ``-`` between its words.
The variable ``SAFEVLM_GATEWAY_MAX_IMAGES`` goes over the file's ``max-images``, and ``--max-images`` over both.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from safevlm.errors import InputError
from safevlm.files.table_file import read_table
from safevlm.files.text_file import decode_text

__all__ = ["PREFIX", "check_environment", "config_option", "naming_its_line"]

PREFIX = "SAFEVLM_GATEWAY"
"""Prefix of environment variables."""
WORDS: dict[type, tuple[type, ...]] = {
    click.types.IntParamType: (int,),
    click.types.IntRange: (int,),
    click.types.FloatParamType: (int, float),
    click.types.BoolParamType: (bool,),
}
"""What a key's value has to be; text where nothing is said."""
LINES = "safevlm.config.lines"
T = TypeVar("T", bound=Callable[..., Any])


def config_option() -> Callable[[T], T]:
    """Return the decorator that adds ``--config``."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read,
        help="TOML or JSON file of these options; overridden by environment and command line.",
    )


def check_environment(context: click.Context, others: Collection[str] = ()) -> None:
    """Raise InputError for a variable of this program that is empty or belongs to no option.

    click would pass them over: a misspelt ``SAFEVLM_GATEWAY_CLIENT_KEYS`` would let everybody ask. ``others`` are
    variables that may have any name, such as those of keys.
    """
    names = [f"{PREFIX}_{each.upper()}" for each in _options(context)] + [f"{PREFIX}_CONFIG"]
    for variable in sorted(each for each in os.environ if each.startswith(f"{PREFIX}_") and each not in others):
        if variable not in names:
            advice = _advice(variable, names, "unset it")
            raise InputError(f"the environment variable {variable[:80]} belongs to no option; {advice}")
        if not os.environ[variable]:
            raise InputError(f"the environment variable {variable} is empty. Give it a value, or unset it.")


def naming_its_line(context: click.Context, error: InputError) -> InputError:
    """Return an error about an option's value with the line of the file that it is from, if it is from there."""
    from_file = click.core.ParameterSource.DEFAULT_MAP
    places = context.meta.get(LINES, {}).items()
    given = [each for each in places if context.get_parameter_source(each[0]) is from_file]
    names = [(rf"(--)?{name.replace('_', '[_-]')}", place) for name, (place, _) in given]
    values = [(re.escape(value), place) for _, (place, value) in given if isinstance(value, str) and value]
    for wanted, place in (*names, *values):
        if re.search(rf"(?<![\w-]){wanted}(?![\w-])", str(error)):
            return InputError(f"{place}: {error}")
    return error


def _read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    table = read_table(path, "config")
    if not isinstance(table, dict):
        raise InputError(f"{path}: a config must be a table of keys and values.")
    options = _options(context)
    text = decode_text(path.read_bytes(), str(path))
    values: dict[str, Any] = {}
    places: dict[str, tuple[str, Any]] = {}
    for key, value in table.items():
        name, place = key.replace("-", "_"), f"{path}:{_line(text, key)}"
        option = options.get(name)
        if option is None:
            known = [each.replace("_", "-") for each in options]
            advice = _advice(key.replace("_", "-"), known, "python -m runtimes.gateway --help lists them")
            raise InputError(f"{place}: unknown option {key[:80]}; {advice}")
        if name in values:
            raise InputError(f"{place}: {key} is given twice.")
        values[name] = _checked(context, option, value, f"{place}: {key}")
        places[name] = place, value
    context.default_map = {**(context.default_map or {}), **values}
    context.meta[LINES] = places


def _options(context: click.Context) -> dict[str, click.Parameter]:
    """Return the options that a file may hold, by their names in Python."""
    return {each.name: each for each in context.command.params if each.name not in ("config", "help", None)}


def _advice(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise}."


def _checked(context: click.Context, option: click.Parameter, value: Any, place: str) -> Any:
    wanted = WORDS.get(type(option.type), (str,))
    values = value if isinstance(value, list) and option.multiple else [value]
    for each in values:
        if not isinstance(each, wanted) or (isinstance(each, bool) and bool not in wanted):
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[wanted[-1]]
            several = f"a list of {kind} each" if option.multiple else kind
            raise InputError(f"{place} is {each!r:.80}; {several} is needed.")
        try:
            option.type.convert(each, option, context)
        except click.BadParameter as error:
            raise InputError(f"{place}: {error.message}") from None
        except ValueError as error:  # of a path that cannot be one
            raise InputError(f"{place} is {each!r:.80}: {error}.") from None
    return values if option.multiple else value


def _line(text: str, key: str) -> int:
    """Return the line of a top-level key."""
    found = re.search(
        rf"(?:^|[{{,])\s*[\"']?{re.escape(key)}[\"']?\s*[=.:]|^\s*\[+\s*[\"']?{re.escape(key)}\b", text, re.MULTILINE
    )
    return 1 if found is None else text.count("\n", 0, found.end()) + 1

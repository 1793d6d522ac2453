"""Tell from Python source, as text, what a checkpoint's own code feeds to its guard head.

The source is parsed with :mod:`ast` and never compiled, imported or run. The expression given to
``img_safety_head(...)`` is followed back through assignments, loops, ``append`` and parameters of the same file
until it meets one of the places that a guard can tap. What cannot be followed stays unknown.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from safevlm.checkpoint.family import HEAD_PREFIX

__all__ = ["HeadCall", "find_head_calls"]

HEAD_NAME = HEAD_PREFIX.rstrip(".")

PROJECTOR = "projector"
LANGUAGE_MODEL = "language_model"
OTHER = "other"
"""A place that is neither: a middle layer, the raw vision tower."""
LAYERS = "hidden_states"
"""The tuple of all hidden states; its item -1 is the language model's last."""
OUTPUT = "output"
"""What a language model's forward returned; its item 0 is the last hidden state."""

PROJECTOR_NAMES = frozenset({"image_hidden_states", "image_features", "image_embeds", "image_embeddings"})
PROJECTOR_CALLS = frozenset(
    {"multi_modal_projector", "mm_projector", "get_image_features", "encode_images", "visual", "merger"}
)
VISION_CALLS = frozenset({"vision_tower", "get_vision_tower", "vision_model", "vision_outputs"})
MODEL_CALLS = frozenset({"language_model", "model", "forward", "get_model", "base_model", "decoder"})

MAX_STEPS = 50_000
"""Expressions followed in one file; honest code needs a hundred for each call of the head."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class HeadCall:
    """One call of the guard head: its line, and the places its input was traced to."""

    line: int
    places: frozenset[str]

    @property
    def source(self) -> str | None:
        """``projector`` or ``language_model`` when the input comes only from that place, otherwise ``None``."""
        clear = self.places in (frozenset({PROJECTOR}), frozenset({LANGUAGE_MODEL}))
        return next(iter(self.places)) if clear else None


def find_head_calls(source: str) -> tuple[HeadCall, ...]:
    """Return every call of ``img_safety_head`` in a module, in the order of its lines.

    Raises SyntaxError, ValueError, RecursionError or MemoryError for text that :mod:`ast` cannot parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in someone else's strings
        tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    trace = _Trace(functions)
    found = []
    for function, call in trace.calls:
        if _is_head(call.func):
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            found.append(HeadCall(call.lineno, _settle(trace.arguments(given, function, call.lineno))))
    return tuple(sorted(found, key=lambda call: call.line))


def _is_head(function: ast.expr) -> bool:
    """Say whether a called expression is the head, its ``mlp`` or its ``forward``."""
    while isinstance(function, ast.Attribute) and function.attr in ("mlp", "forward", "__call__"):
        function = function.value
    return _last_name(function) == HEAD_NAME


def _settle(places: frozenset[str]) -> frozenset[str]:
    """A whole tuple or output object given to the head names no single place."""
    return frozenset(OTHER if place in (LAYERS, OUTPUT) else place for place in places)


class _Trace:
    """Follows one expression back to the places it is computed from."""

    def __init__(self, functions: list[Function]) -> None:
        self.calls: list[tuple[Function, ast.Call]] = []
        self._callers: dict[str, list[tuple[Function, ast.Call]]] = {}
        self._bound: dict[int, dict[str, list[ast.expr]]] = {}
        for function in functions:
            nodes = list(_own_nodes(function))
            self._bound[id(function)] = _bindings(nodes)
            self.calls += [(function, node) for node in nodes if isinstance(node, ast.Call)]
        for function, call in self.calls:
            self._callers.setdefault(_last_name(call.func), []).append((function, call))
        self._before = 0
        self._active: set[tuple[int, str]] = set()
        self._steps_left = MAX_STEPS

    def arguments(self, given: list[ast.expr], function: Function, line: int) -> frozenset[str]:
        """Return the places that the arguments of a call on ``line`` come from."""
        before, self._before = self._before, line
        places = self._union(iter(given), function)
        self._before = before
        return places

    def expression(self, node: ast.expr, function: Function) -> frozenset[str]:
        self._step()
        match node:
            case ast.Name():
                return self._name(node.id, function)
            case ast.Attribute():
                return self._field(node.attr, node.value, function)
            case ast.Subscript():
                return self._item(node, function)
            case ast.Call():
                return self._call(node, function)
            case ast.IfExp():  # the condition decides nothing about where the value comes from
                return self.expression(node.body, function) | self.expression(node.orelse, function)
            case ast.Compare() | ast.Constant():  # masks and numbers
                return frozenset()
        return self._union((c for c in ast.iter_child_nodes(node) if isinstance(c, ast.expr)), function)

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise RecursionError("the code is too entangled to follow")

    def _union(self, nodes: Iterator[ast.expr], function: Function) -> frozenset[str]:
        return frozenset().union(*(self.expression(node, function) for node in nodes))

    def _field(self, name: str, base: ast.expr, function: Function) -> frozenset[str]:
        if name in PROJECTOR_NAMES:
            return frozenset({PROJECTOR})
        if name not in ("hidden_states", "last_hidden_state"):
            return self.expression(base, function)
        if "vision" in _last_name(base) or self.expression(base, function) & {PROJECTOR, OTHER}:
            return frozenset({OTHER})  # the vision tower's own states
        return frozenset({LAYERS if name == "hidden_states" else LANGUAGE_MODEL})

    def _item(self, node: ast.Subscript, function: Function) -> frozenset[str]:
        key = _constant(node.slice)
        if isinstance(key, str):
            return self._field(key, node.value, function)
        places = self.expression(node.value, function)
        last = {LAYERS: -1, OUTPUT: 0}
        return frozenset(
            place if place not in last else LANGUAGE_MODEL if key == last[place] else OTHER for place in places
        )

    def _call(self, node: ast.Call, function: Function) -> frozenset[str]:
        name = _last_name(node.func)
        if name == "getattr" and len(node.args) >= 2 and isinstance(key := _constant(node.args[1]), str):
            return self._field(key, node.args[0], function)
        if name == "get" and node.args and isinstance(key := _constant(node.args[0]), str):
            base = node.func.value if isinstance(node.func, ast.Attribute) else node.func
            return self._field(key, base, function)
        if name in PROJECTOR_CALLS:
            return frozenset({PROJECTOR})
        if name in VISION_CALLS:
            return frozenset({OTHER})
        if name in MODEL_CALLS:
            return frozenset({OUTPUT})
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node.func, ast.Attribute):  # a method such as x.mean(dim=1): the value is its object's
            given.append(node.func.value)
        return self._union(iter(given), function)

    def _name(self, name: str, function: Function) -> frozenset[str]:
        visit = (id(function), name)
        if visit in self._active or name.endswith(("mask", "masks")):  # a mask says which tokens, not whose
            return frozenset()
        self._active.add(visit)
        bound = self._bound[id(function)].get(name, [])
        values = [value for value in bound if value.lineno <= self._before]
        places = self._union(iter(values), function)
        if not values and name in _parameters(function):
            places = self._parameter(name, function)
        self._active.remove(visit)
        if values or places:
            return places
        if name in PROJECTOR_NAMES:
            return frozenset({PROJECTOR})
        return frozenset({LANGUAGE_MODEL}) if name == "last_hidden_state" else frozenset()

    def _parameter(self, name: str, function: Function) -> frozenset[str]:
        """Follow a parameter into the calls of its function in this file."""
        places: frozenset[str] = frozenset()
        names = _parameters(function)
        if function.name in MODEL_CALLS:  # anybody's forward
            return places
        at = names.index(name) - (names[:1] == ["self"])
        for caller, call in self._callers.get(function.name, ()):
            self._step()
            given = [keyword.value for keyword in call.keywords if keyword.arg == name]
            if not given and 0 <= at < len(call.args):
                given = [call.args[at]]
            places |= self.arguments(given, caller, call.lineno)
        return places


def _own_nodes(function: Function) -> Iterator[ast.AST]:
    """Walk a function's body without the functions and classes nested in it."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        yield node
        pending += [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        ]


def _bindings(nodes: list[ast.AST]) -> dict[str, list[ast.expr]]:
    """Return, by name, every expression bound or appended to it."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        pairs: Iterator[tuple[str, ast.expr]] = iter(())
        match node:
            case ast.Assign():
                pairs = (pair for target in node.targets for pair in _matched(target, node.value))
            case ast.AnnAssign(value=ast.expr() as value) | ast.AugAssign(value=value):
                pairs = _matched(node.target, value)
            case ast.NamedExpr():
                pairs = _matched(node.target, node.value)
            case ast.For() | ast.comprehension():
                pairs = _matched(node.target, node.iter)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="append" | "extend")):
                pairs = iter([(owner, item) for item in node.args])
        for name, value in pairs:
            found.setdefault(name, []).append(value)
    return found


def _matched(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """Yield each name that ``target = value`` binds, with the part of ``value`` that it gets."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Starred):
        yield from _matched(target.value, value)
    elif isinstance(target, (ast.Tuple, ast.List)):
        parts = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
        paired = len(parts) == len(target.elts)
        for at, item in enumerate(target.elts):
            yield from _matched(item, parts[at] if paired else value)


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _constant(node: ast.expr) -> object:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        value = node.operand.value
        return -value if isinstance(value, int) else None
    return node.value if isinstance(node, ast.Constant) else None

"""One function makes verdicts: check, gate, gateway and batch commands agree, and none computes its own."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.statistics.guard import guard_metrics
from calibration.distilling.fidelity import fidelity
from calibration.labelled.judged_images import scores_of
from calibration.labelled.risk_control import Bands, measure
from runtimes.gate.gate import Gate
from runtimes.gate.result import GateResult
from runtimes.gateway.images.decoding import Decoded
from runtimes.gateway.images.image_urls import ImageReference
from runtimes.gateway.images.judging import Judged, Judging
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.serving.metrics import Metrics
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Limits, Policy
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.guard.verdict import Finding, allows, blocks, decide, passes, stops_at_exact, stops_at_guard
from safevlm.contract.manifest import Band, GuardFile, Thresholds
from safevlm.errors import SafeVLMError
from tests.runtimes.bundles import CLASSES, PREPROCESSING, SIZE, fitted
from tests.runtimes.gate.test_gate import FakeLanguage

ROOT = Path(__file__).parents[3]
ONE_PLACE = {"runtimes/guard/verdict.py", "runtimes/guard/policy.py", "safevlm/contract/manifest.py"}
IMAGE = Image.new("RGB", (SIZE, SIZE), (1, 2, 3))
FILE = GuardFile(path="guard.fp32.onnx", sha256="a" * 64, bytes=1, kind="onnx", precision="fp32")
Row = npt.NDArray[np.float32]


class RowRunner(GuardRunner):
    """Answers with one row, unchecked: as a runner with a fault of its own would."""

    runtime = "row"

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.preprocessing, self.row = PREPROCESSING, row

    def _activate(self) -> None: ...

    def _deactivate(self) -> None: ...

    def _run(self, rgb: npt.NDArray[np.uint8]) -> GuardOutput:
        rows = np.repeat(self.row[None], len(rgb), axis=0)
        return GuardOutput(probs=rows, logits=rows)

    def _check_output(self, output: GuardOutput, count: int) -> None:
        """Let everything through."""


shares = st.lists(st.integers(0, 1000) | st.sampled_from([0, 1, 500]), min_size=3, max_size=3).filter(any)
rows = shares.map(lambda parts: (np.array(parts) / sum(parts)).astype(np.float32))
off = st.tuples(rows, st.sampled_from([0.5, 0.989, 0.991, 1.009, 1.011, 2])).map(
    lambda pair: pair[0] * np.float32(pair[1])
)
wild = st.lists(st.floats(width=32), max_size=5).map(lambda values: np.array(values, np.float32))
edges = st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0])
pairs = st.tuples(edges, edges).map(sorted).filter(lambda pair: pair[0] < 1)
limits = st.none() | pairs.map(lambda pair: Limits(allow=pair[0], block=pair[1]))
actions = st.sampled_from(["block", "allow", "review"])
policies = st.builds(
    Policy,
    default=actions,
    classes=st.dictionaries(st.sampled_from(CLASSES[1:]), actions),
    guard=limits,
    exact=limits,
    confirm=st.booleans(),
    still_unsure=st.sampled_from(["block", "allow"]),
).filter(lambda policy: any(policy.action(name) != "allow" for name in CLASSES[1:]))


@st.composite
def fits(draw: st.DrawFn) -> Thresholds | None:
    """Thresholds as they are fitted: a pooled band, and sometimes one for a class."""
    if draw(st.booleans()):
        return None
    allow, block = draw(pairs)
    bands = {}
    if draw(st.booleans()):
        low, high = draw(pairs)
        bands = {draw(st.sampled_from(CLASSES[1:])): Band(allow=low, block=high, n_unsafe=9)}
    return fitted(FILE, block=block, allow=allow, per_class=bands)


def by_check(row: Row, thresholds: Thresholds | None) -> Any:
    with Guard(RowRunner(row), CLASSES, thresholds) as guard:
        return guard.judge([IMAGE])[0]


def by_gate(row: Row, thresholds: Thresholds | None, policy: Policy) -> Any:
    with Gate(Guard(RowRunner(row), CLASSES, thresholds), None, policy, timeout=600) as gate:
        return gate.ask(IMAGE, "?")


def by_gateway(row: Row, thresholds: Thresholds | None, policy: Policy) -> Judged:
    """Judge as the gateway does, its decoding processes apart."""

    async def judged(guard: Guard) -> Judged:
        options = GatewayOptions(guard_timeout=600)
        judging = Judging(guard, policy, options, Metrics())

        async def decode(*_: Any) -> Decoded:
            return Decoded("data:,", ("image",), np.asarray(IMAGE)[None], 1, None)

        judging.decoders.decode = decode  # type: ignore[method-assign]
        async with judging.batching:
            (found,) = await judging.judge([ImageReference(where="image", content=b"x")])
            return found

    with Guard(RowRunner(row), CLASSES, thresholds) as guard:
        return asyncio.run(judged(guard))


def by_chat(row: Row, exact: Row, policy: Policy, *, guarded: bool) -> GateResult:
    """Ask a gate with a language model behind the guard, or without a guard."""
    with Gate(Guard(RowRunner(row), CLASSES) if guarded else None, FakeLanguage(exact), policy, timeout=600) as gate:
        return gate.ask(IMAGE, "?")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows | off | wild, fits(), policies)
def test_all_ways_agree_to_the_bit(row: Row, thresholds: Thresholds | None, policy: Policy) -> None:
    gate, check = by_gate(row, thresholds, policy), by_check(row, thresholds)
    try:
        wanted = decide(row, CLASSES, thresholds, policy=policy)
    except SafeVLMError:  # it is no row of probabilities, and nobody allows it
        assert check.verdict == "error" and (gate.verdict, gate.stage) == ("block", "error")
        with pytest.raises(Refusal):
            by_gateway(row, thresholds, policy)
        return
    assert by_gateway(row, thresholds, policy).finding == wanted and gate.finding == wanted
    stopped = stops_at_guard(wanted, policy, settles=False)
    assert (gate.verdict, gate.reason) == (
        ("allow", passes(wanted, "guard")) if stopped is None else ("block", stopped)
    )
    bare = decide(row, CLASSES, thresholds)
    assert (check.verdict, check.label, check.p_unsafe) == (bare.verdict, bare.label, bare.p_unsafe)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows, fits())
def test_what_counts_many_verdicts_counts_those_of_check(row: Row, thresholds: Thresholds | None) -> None:
    """As where thresholds are fitted and a guard is measured."""
    check = by_check(row, thresholds)
    bare = decide(row, CLASSES, thresholds)
    scores, harms = scores_of(row[None], CLASSES)
    assert (scores[0], harms[0]) == (check.p_unsafe, bare.harm)
    wholly = guard_metrics(row[None], [1], threshold=bare.limits.block)
    assert wholly.recall == (check.verdict == "block")
    if thresholds is None:
        return
    rates = measure(Bands(pooled=thresholds.pooled, per_class=thresholds.per_class), scores, np.array([True]), harms)
    assert (rates.miss, rates.unsure) == (check.verdict == "allow", check.verdict == "unsure")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows, rows | off | wild, policies, st.booleans())
def test_the_exact_verdict_is_made_at_the_same_place(row: Row, exact: Row, policy: Policy, guarded: bool) -> None:
    found, before = (
        by_chat(row, exact, policy, guarded=guarded),
        decide(row, CLASSES, policy=policy) if guarded else None,
    )
    stopped = None if before is None else stops_at_guard(before, policy, settles=True)
    if stopped is not None:
        assert (found.verdict, found.stage, found.reason, found.finding) == ("block", "guard", stopped, before)
        return
    try:
        wanted = decide(exact, CLASSES, policy=policy, stage="exact")
    except SafeVLMError:
        assert (found.verdict, found.stage) == ("block", "error")
        return
    stopped = stops_at_exact(wanted, policy, before=before)
    if stopped is not None:
        assert (found.verdict, found.stage, found.reason, found.finding) == ("block", "exact", stopped, wanted)
    elif before is None or before.verdict == "unsure":
        assert (found.verdict, found.reason, found.finding) == ("allow", passes(wanted, "exact"), wanted)
    else:
        assert (found.verdict, found.reason, found.finding) == ("allow", passes(before, "guard"), before)


@pytest.mark.parametrize("values", [(0.5, 0.5, 0), (0.501, 0.499, 0), (0.5, 0.25, 0.25), (0, 0, 1)])
def test_a_distilled_guard_s_teacher_is_judged_as_check_judges(values: tuple[float, ...]) -> None:
    taught = np.array([(1, 0, 0), values], np.float32)
    both_kinds = fidelity(taught, taught, CLASSES)["auroc"]["value"] is not None
    assert both_kinds == (by_check(taught[1], None).verdict == "block")


@pytest.mark.parametrize(("p_unsafe", "limit"), [(np.nan, 0.5), (0.5, np.nan), (0.5, 0.5), (1.0, 1.0)])
def test_what_is_unknown_or_at_the_limit_is_blocked(p_unsafe: float, limit: float) -> None:
    assert blocks(p_unsafe, limit) and not allows(p_unsafe, limit)


BROKEN = [(np.nan, 0.5, 0.5), (2, -1, 0), (0.2, 0.2, 0.2), (0.9, np.inf, 0), (1, 0), (1, 0, 0, 0), ()]


@pytest.mark.parametrize("values", BROKEN, ids=str)
def test_what_is_no_row_of_probabilities_is_allowed_nowhere(values: tuple[float, ...]) -> None:
    row, policy = np.array(values, np.float32), Policy(still_unsure="allow", default="review")
    with pytest.raises(SafeVLMError):
        decide(row, CLASSES, policy=policy)
    assert by_check(row, None).verdict == "error"
    assert by_gate(row, None, policy).verdict == "block" and by_gate(row, None, policy).stage == "error"
    with pytest.raises(Refusal):
        by_gateway(row, None, policy)


CHANCES = {"p_unsafe", "probs", "score", "scores", "unsafe_probability"}
LIMITS = {"allow", "block", "limit", "limits", "band", "bands", "threshold", "thresholds", "DEFAULT_BLOCK"}


def names_in(node: ast.AST) -> set[str]:
    """Return the names and attributes that an expression is made of."""
    found = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found | {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def own_verdicts(source: str) -> list[int]:
    """Return the lines that compute p(unsafe), compare it with limits, or make a finding by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        compared = isinstance(node, ast.Compare) and all(not isinstance(op, UNORDERED) for op in node.ops)
        if compared and names_in(node) & CHANCES and names_in(node) & LIMITS:
            found.append(node.lineno)  # type: ignore[attr-defined]
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and isinstance(node.right, ast.Subscript):
            one = isinstance(node.left, ast.Constant) and node.left.value == 1
            at = node.right.slice.elts[-1] if isinstance(node.right.slice, ast.Tuple) else node.right.slice
            chance = names_in(node.right.value) & (CHANCES | {"row", "rows", "teacher", "student"})
            safe = names_in(at) & {"safe", "safe_index"} or chance
            found += [node.lineno] if one and safe else []
        elif isinstance(node, ast.Call) and names_in(node.func) & {"Finding"}:
            found.append(node.lineno)
    return found


UNORDERED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)


@pytest.mark.parametrize(
    "line",
    [
        "x = p_unsafe >= limits.block",
        "x = finding.p_unsafe < 0.1 < band.allow",
        "x = unsafe_probability(probs) >= rows.threshold",
        "x = scores < bands.limits(harms)[0]",
        "s = 1 - probs[:, 0]",
        "s = 1 - teacher[:, safe]",
        "s = np.clip(1.0 - rows[:, 0], 0.0, 1.0)",
        "x = Finding('allow', 'safe', None, 0.0, limits, 'policy')",
    ],
)
def test_a_verdict_of_one_s_own_is_found(line: str) -> None:
    assert own_verdicts(line) == [1]


def test_nothing_else_makes_a_verdict() -> None:
    for folder in ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            place = str(path.relative_to(ROOT))
            if place not in ONE_PLACE:
                lines = own_verdicts(path.read_text(encoding="utf-8"))
                assert not lines, f"{place}:{lines} computes a verdict: call runtimes.guard.verdict"


def test_a_verdict_names_what_it_compared() -> None:
    found = decide(np.array([0.3, 0.7, 0], np.float32), CLASSES)
    assert isinstance(found, Finding) and (found.limits.block, found.limits_from) == (0.5, "default")

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

from calibration.labelled.judged_images import scores_of
from runtimes.gate.gate import Gate
from runtimes.gateway.images.decoding import Decoded
from runtimes.gateway.images.image_urls import ImageReference
from runtimes.gateway.images.judging import Judged, Judging
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.refusal import Refusal
from runtimes.gateway.serving.metrics import Metrics
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Limits, Policy
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.guard.verdict import Finding, decide, stops_at_guard
from safevlm.contract.manifest import Band, GuardFile, Thresholds
from safevlm.errors import SafeVLMError
from tests.runtimes.bundles import CLASSES, PREPROCESSING, SIZE, fitted

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


shares = st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any)
rows = shares.map(lambda parts: (np.array(parts) / sum(parts)).astype(np.float32))
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rows, fits(), policies)
def test_all_ways_agree_to_the_bit(row: Row, thresholds: Thresholds | None, policy: Policy) -> None:
    wanted = decide(row, CLASSES, thresholds, policy=policy)
    gateway, gate = by_gateway(row, thresholds, policy).finding, by_gate(row, thresholds, policy)
    assert gateway == wanted and gate.finding == wanted
    stopped = stops_at_guard(wanted, policy, settles=False)
    assert (gate.verdict == "block") == (stopped is not None)
    assert stopped is None or gate.reason == stopped
    bare, check = decide(row, CLASSES, thresholds), by_check(row, thresholds)
    assert (check.verdict, check.label, check.p_unsafe) == (bare.verdict, bare.label, bare.p_unsafe)
    scores, harms = scores_of(row[None], CLASSES)
    assert (scores[0], harms[0]) == (bare.p_unsafe, bare.harm)


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


def own_verdicts(source: str) -> list[int]:
    """Return the lines that compute p(unsafe) or compare with limits by themselves."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {each.attr for each in sides if isinstance(each, ast.Attribute)}
            names |= {each.id for each in sides if isinstance(each, ast.Name)}
            if names & {"block", "allow", "DEFAULT_BLOCK", "DEFAULT_LIMITS"} and "p_unsafe" in ast.dump(node):
                found.append(node.lineno)
        elif isinstance(node, ast.BinOp) and ast.unparse(node).startswith(("1 - ", "1.0 - ")):
            rows = isinstance(node.right, ast.Subscript) and "probs" in ast.unparse(node.right)
            found += [node.lineno] if rows else []
    return found


def test_nothing_else_makes_a_verdict() -> None:
    assert own_verdicts("x = p_unsafe >= limits.block") and own_verdicts("s = 1 - probs[:, 0]")
    for folder in ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            place = str(path.relative_to(ROOT))
            if place not in ONE_PLACE:
                lines = own_verdicts(path.read_text(encoding="utf-8"))
                assert not lines, f"{place}:{lines} computes a verdict: call runtimes.guard.verdict"


def test_a_verdict_names_what_it_compared() -> None:
    found = decide(np.array([0.3, 0.7, 0], np.float32), CLASSES)
    assert isinstance(found, Finding) and (found.limits.block, found.limits_from) == (0.5, "default")

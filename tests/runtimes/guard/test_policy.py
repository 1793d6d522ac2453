"""Policies: every action, the limits that apply, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.guard.policy import Limits, Policy, find, read_policy
from runtimes.guard.verdict import decide
from safevlm.errors import InputError, SafeVLMError
from tests.runtimes.bundles import CLASSES, fitted, onnx_file

BAND = Limits(block=0.8, allow=0.2)


def row(*values: float) -> Any:
    return np.array(values, np.float32)


@pytest.mark.parametrize("unsafe", [0.0, 0.1, 0.2, 0.5, 0.79, 0.8, 1.0])
def test_without_a_policy_a_verdict_is_decide_s(unsafe: float, tmp_path: Path) -> None:
    """The default policy changes nothing, with thresholds and without."""
    probs = row(1 - unsafe, unsafe * 0.75, unsafe * 0.25)
    for thresholds in (None, fitted(onnx_file(tmp_path), block=0.8, allow=0.2)):
        wanted, found = decide(probs, CLASSES, thresholds), find(probs, CLASSES, Policy(), "guard", thresholds)
        assert (found.verdict, found.label, found.p_unsafe) == (wanted.verdict, wanted.label, wanted.p_unsafe)
        assert found.harm == wanted.harm and found.limits_from == ("default" if thresholds is None else "bundle")


def test_limits_of_the_policy_replace_the_bundle_s(tmp_path: Path) -> None:
    thresholds = fitted(onnx_file(tmp_path), block=0.1, allow=0.1)
    found = find(row(0.5, 0.4, 0.1), CLASSES, Policy(guard=BAND), "guard", thresholds)
    assert (found.verdict, found.limits, found.limits_from) == ("unsure", BAND, "policy")
    assert find(row(0.5, 0.4, 0.1), CLASSES, Policy(guard=BAND), "exact").limits == Limits(block=0.5, allow=0.5)
    assert find(row(0.5, 0.4, 0.1), CLASSES, Policy(exact=BAND), "exact").verdict == "unsure"


def test_an_allowed_class_does_not_hide_another_harm() -> None:
    policy = Policy(classes={"weapon": "allow"})
    alone = find(row(0.1, 0.9, 0), CLASSES, policy, "guard")
    assert (alone.verdict, alone.label, alone.harm) == ("allow", "weapon", "drug")
    both = find(row(0.0, 0.48, 0.52), CLASSES, policy, "guard")
    assert (both.verdict, both.harm, both.p_unsafe) == ("block", "drug", pytest.approx(0.52))


def test_the_default_action_holds_for_the_classes_not_named() -> None:
    policy = Policy(default="allow", classes={"drug": "block"})
    assert find(row(0, 1, 0), CLASSES, policy, "guard").verdict == "allow"
    assert find(row(0, 0, 1), CLASSES, policy, "guard").verdict == "block"
    assert find(row(0, 1, 0), CLASSES, Policy(default="allow"), "exact").harm is None
    with pytest.raises(InputError, match="allows every class"):
        Policy(default="allow").check(CLASSES)
    with pytest.raises(InputError, match="allows every class"):
        Policy(classes={name: "allow" for name in CLASSES if name != "safe"}).check(CLASSES)
    policy.check(CLASSES)


def test_a_class_under_review_is_never_blocked_by_the_guard_alone() -> None:
    policy = Policy(classes={"weapon": "review"})
    for stage, verdict in (("guard", "unsure"), ("exact", "block")):
        found = find(row(0, 1, 0), CLASSES, policy, stage)  # type: ignore[arg-type]
        assert (found.verdict, found.review) == (verdict, True)
    allowed = find(row(1, 0, 0), CLASSES, policy, "guard")
    assert (allowed.verdict, allowed.review) == ("allow", False)


@pytest.mark.parametrize("bad", [(np.nan, 0, 1), (2, -1, 0), (0, 0, 0), (1, 0), (0.5, 0.5, np.inf)])
def test_what_is_no_row_of_probabilities_is_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(SafeVLMError, match="the exact verdict"):
        find(row(*bad), CLASSES, Policy(default="allow", still_unsure="allow"), "exact")


TOML = """
default = "review"
confirm = false
[classes]
weapon = "block"
[guard]
block = 0.9
allow = 0.1
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TOML)
    policy = read_policy(tmp_path / "a.toml")
    assert (policy.action("weapon"), policy.action("drug"), policy.confirm) == ("block", "review", False)
    assert policy.guard == Limits(block=0.9, allow=0.1) and policy.exact is None
    (tmp_path / "a.json").write_text(json.dumps(policy.model_dump()))
    assert read_policy(tmp_path / "a.json") == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"defualt": "block"}', r"defualt: .*Known keys: default, classes"),
        ('{"classes": {"weapon": "ignore"}}', r"classes\.weapon: .*'block', 'allow' or 'review'"),
        ('{"guard": {"block": 0.1, "allow": 0.9}}', r"guard: allow \(0.9\) must not be above block"),
        ('{"guard": {"block": NaN, "allow": 0.9}}', "NaN is not a number"),
        ('{"still_unsure": "review"}', "still_unsure"),
        ('{"on_error": "allow"}', "on_error"),
        ("[]", "policy"),
        ("{", "cannot be parsed"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_policy(path)


def test_files_that_are_no_policy(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xff")
    (tmp_path / "p.yaml").write_text("")
    for name, message in (("p.json", "not UTF-8"), ("p.yaml", "ends in .toml or .json"), ("no.json", "cannot be read")):
        with pytest.raises(InputError, match=message):
            read_policy(tmp_path / name)


def test_unknown_classes_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'wepon'; this guard knows weapon, drug\. The nearest is 'weapon'"):
        Policy(classes={"wepon": "allow"}).check(CLASSES)
    with pytest.raises(InputError, match="'safe', which is not a harm"):
        Policy(classes={"safe": "allow"}).check(CLASSES)

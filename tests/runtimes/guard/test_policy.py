"""Policies: every action, the limits that apply, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.guard.policy import Limits, Policy, read_policy
from runtimes.guard.verdict import decide
from safevlm.errors import InputError, SafeVLMError
from tests.runtimes.bundles import CLASSES, fitted, onnx_file

BAND = Limits(block=0.8, allow=0.2)


def row(*values: float) -> Any:
    return np.array(values, np.float32)


def test_limits_of_the_policy_replace_the_bundle_s(tmp_path: Path) -> None:
    thresholds = fitted(onnx_file(tmp_path), block=0.1, allow=0.1)
    found = decide(row(0.5, 0.4, 0.1), CLASSES, thresholds, policy=Policy(guard=BAND))
    assert (found.verdict, found.limits, found.limits_from) == ("unsure", BAND, "policy")
    assert decide(row(0.5, 0.4, 0.1), CLASSES, policy=Policy(guard=BAND), stage="exact").limits == Limits(
        block=0.5, allow=0.5
    )
    assert decide(row(0.5, 0.4, 0.1), CLASSES, policy=Policy(exact=BAND), stage="exact").verdict == "unsure"


def test_an_allowed_class_does_not_hide_another_harm() -> None:
    policy = Policy(classes={"weapon": "allow"})
    alone = decide(row(0.1, 0.9, 0), CLASSES, policy=policy, stage="guard")
    assert (alone.verdict, alone.label, alone.harm) == ("allow", "weapon", "drug")
    both = decide(row(0.0, 0.48, 0.52), CLASSES, policy=policy, stage="guard")
    assert (both.verdict, both.harm, both.p_unsafe) == ("block", "drug", pytest.approx(0.52))


def test_the_default_action_holds_for_the_classes_not_named() -> None:
    policy = Policy(default="allow", classes={"drug": "block"})
    assert decide(row(0, 1, 0), CLASSES, policy=policy, stage="guard").verdict == "allow"
    assert decide(row(0, 0, 1), CLASSES, policy=policy, stage="guard").verdict == "block"
    assert decide(row(0, 1, 0), CLASSES, policy=Policy(default="allow"), stage="exact").harm is None
    with pytest.raises(InputError, match="allows every class"):
        Policy(default="allow").check(CLASSES)
    with pytest.raises(InputError, match="allows every class"):
        Policy(classes={name: "allow" for name in CLASSES if name != "safe"}).check(CLASSES)
    policy.check(CLASSES)


def test_a_class_under_review_is_never_blocked_by_the_guard_alone() -> None:
    policy = Policy(classes={"weapon": "review"})
    for stage, verdict in (("guard", "unsure"), ("exact", "block")):
        found = decide(row(0, 1, 0), CLASSES, policy=policy, stage=stage)  # type: ignore[arg-type]
        assert (found.verdict, found.review) == (verdict, True)
    allowed = decide(row(1, 0, 0), CLASSES, policy=policy, stage="guard")
    assert (allowed.verdict, allowed.review) == ("allow", False)


@pytest.mark.parametrize("bad", [(np.nan, 0, 1), (2, -1, 0), (0, 0, 0), (1, 0), (0.5, 0.5, np.inf)])
def test_what_is_no_row_of_probabilities_is_refused(bad: tuple[float, ...]) -> None:
    with pytest.raises(SafeVLMError, match="the exact verdict"):
        decide(row(*bad), CLASSES, policy=Policy(default="allow", still_unsure="allow"), stage="exact")


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
    for name, message in (
        ("p.json", "not UTF-8"),
        ("p.yaml", "must end in .toml or .json"),
        ("no.json", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_policy(tmp_path / name)


def test_unknown_classes_are_refused_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'wepon'; this guard knows weapon, drug\. The nearest is 'weapon'"):
        Policy(classes={"wepon": "allow"}).check(CLASSES)
    with pytest.raises(InputError, match="'safe', which is not a harm"):
        Policy(classes={"safe": "allow"}).check(CLASSES)

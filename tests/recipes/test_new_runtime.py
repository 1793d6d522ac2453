"""CONTRIBUTING's recipe for a new runtime, followed: a runner and its entries, and ``check`` judges with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.guard.judge import Guard
from tests.runtimes.bundles import BLUE, GREEN, RED, picture, write_bundle

ROOT = Path(__file__).parents[2]


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.recipes.toy_runner", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)


def test_check_judges_on_a_new_runtime_as_on_onnx_runtime(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    files = [picture(tmp_path / f"{index}.png", colour) for index, colour in enumerate((GREEN, RED, BLUE))]
    done = check(bundle, *files, "--runtime", "reference", "--json")
    assert (done.returncode, done.stderr) == (10, "")
    found = json.loads(done.stdout)
    with Guard.open(bundle, "onnxruntime") as guard:
        wanted = guard.judge(files)
    assert [each["verdict"] for each in found] == [each.verdict for each in wanted] == ["allow", "block", "block"]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["probs"] == pytest.approx(theirs.probs, abs=1e-6)


def test_its_name_stands_among_those_that_are_allowed(tmp_path: Path) -> None:
    done = check(tmp_path, tmp_path, "--runtime", "referense")
    assert done.returncode == 2
    assert "reference" in done.stderr and "openvino" in done.stderr

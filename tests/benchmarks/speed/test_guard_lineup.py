"""Who takes part in ``benchmarks.speed guard``: ours in INT8 and what people use on CPUs today, really run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks.speed.guard_source import prepare
from benchmarks.speed.peer import PLAIN, Subject, random_images
from export.rewrites import FUSED
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
PEERS = ROOT / ".venv-openvino" / "bin" / "python"
"""Of ``make peers``; without it NNCF's INT8 is listed as missing, and the rest is measured here."""


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lineup")
    model = write_checkpoint("gemma3", "hf", folder / "model").folder
    python = PEERS if PEERS.exists() else Path(sys.executable)
    quick = ["--batch=1", "--rounds=1", "--repeats=1", "--seconds=0.05", "--threads=1"]
    command = [sys.executable, "-m", "benchmarks.speed", "guard", "--model", str(model), "--precision", "fp32,int8"]
    command += ["--peers", "--peers-python", str(python), *quick, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def rows(record: dict[str, Any], *, ours: bool) -> dict[tuple[str, str], dict[str, Any]]:
    chosen = [row for row in record["rows"] if row["device"] == "cpu" and row["ours"] == ours]
    return {(row["peer"], row["precision"]): row for row in chosen}


def test_ours_run_in_int8_where_each_file_is_fastest(record: dict[str, Any]) -> None:
    found = rows(record, ours=True)
    assert set(found) == {("ONNX Runtime", "fp32"), ("ONNX Runtime", "int8-dynamic"), ("OpenVINO", "int8")}
    assert {row["status"] for row in found.values()} == {"measured"}
    assert found["ONNX Runtime", "fp32"]["max_abs_prob_delta"] < 1e-5
    for key in (("ONNX Runtime", "int8-dynamic"), ("OpenVINO", "int8")):
        assert 1e-7 < found[key]["max_abs_prob_delta"] < 0.2, "INT8, and the same guard"
        assert found[key]["size_bytes"] < 0.6 * found["ONNX Runtime", "fp32"]["size_bytes"]
    assert found["OpenVINO", "int8"]["version"].startswith("openvino ")


def test_peers_run_the_same_guard_in_standard_operators(record: dict[str, Any]) -> None:
    found = rows(record, ours=False)
    float32 = ("torch eager", "torch.compile", "ONNX Runtime, plain graph", "OpenVINO, plain graph")
    for peer in float32:
        row = found[peer, "fp32"]
        assert row["status"] == "measured", row["reason"]
        assert row["max_abs_prob_delta"] < 1e-4 and row["version"]
    nncf = found["OpenVINO, NNCF", "int8"]
    if PEERS.exists():
        assert nncf["status"] == "measured" and "nncf" in nncf["version"], nncf["reason"]
        assert nncf["max_abs_prob_delta"] > 1e-7, "another file than the float32 one"
    else:
        assert nncf["status"] == "unavailable" and "nncf" in nncf["reason"]


def test_the_plain_graph_has_none_of_our_rewrites(tmp_path: Path) -> None:
    model = write_checkpoint("gemma3", "hf", tmp_path / "model").folder
    size = read_processor(open_checkpoint(str(model)).processor, family="gemma3")
    rgb = random_images(size, 2, seed=3)
    folder = tmp_path / "bundle"
    folder.mkdir()
    request = {"subject": asdict(Subject(name=str(model), random=False)), "bundle": None, "folder": str(folder)}
    list(prepare({**request, "precisions": ["fp32"], "embeddings": False, "plain": True}))
    ours, plain = (onnx.load(str(each / "guard.fp32.onnx")) for each in (folder, folder / PLAIN))
    assert FUSED in {node.op_type for node in ours.graph.node}
    assert {node.domain for node in plain.graph.node} == {""} and len(plain.functions) == 0
    matrices, others = (
        len([tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) > 1])
        for model in (ours, plain)
    )
    assert others == matrices + 1, "the projector's last map stands alone there, and is folded into the head here"
    found = [
        onnxruntime.InferenceSession(str(each / "guard.fp32.onnx")).run(["logits"], {"rgb": rgb})[0]
        for each in (folder, folder / PLAIN)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)

"""An engine of a guard that gives image embeddings: they are entered, and held to ONNX Runtime's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.onnx import ExportOptions, export_guard
from export.tensorrt.builder import EngineOptions
from export.tensorrt.engine import Device
from export.tensorrt.request import EngineRequest
from export.trt import build_into
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.cuda import Gpu
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import GuardFile
from safevlm.errors import ParityError
from tests.export.fake_tensorrt import make_tensorrt
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint


class EngineRunner(OnnxRuntimeRunner):
    """Run a fake engine: its answers are those of the bundle's fp32 graph, embeddings ``scale`` times as large."""

    scale = 1.0

    def __init__(self, bundle: Bundle, file: GuardFile) -> None:
        assert "built" in json.loads(bundle.path(file).read_bytes())
        super().__init__(bundle, bundle.file("fp32"), threads=1)

    def _run_file(self, inputs: Any) -> dict[str, Any]:
        answers = super()._run_file(inputs)
        return {**answers, "embeddings": answers["embeddings"] * self.scale}


class WrongRunner(EngineRunner):
    scale = 1.01


def test_embeddings_of_an_engine_are_entered_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.tensorrt.engine.MOST_RUNS", 3)
    checkpoint = open_checkpoint(str(write_checkpoint("gemma3", "hf", tmp_path / "checkpoint").folder))
    export_guard(checkpoint, tmp_path / "guard", ExportOptions(parity_images=3, embeddings=True))
    before = (tmp_path / "guard" / "manifest.json").read_bytes()
    request = EngineRequest(options=EngineOptions(precision="fp32"), timing_cache=tmp_path / "timing", parity_images=3)
    device = Device(make_tensorrt("10.3.0"), Gpu("Orin", "8.7"))
    with pytest.raises(ParityError, match="the fp32 engine: image embeddings differ"):
        build_into(open_bundle(tmp_path / "guard"), request, device, make_runner=WrongRunner)
    assert (tmp_path / "guard" / "manifest.json").read_bytes() == before
    manifest, _ = build_into(open_bundle(tmp_path / "guard"), request, device, make_runner=EngineRunner)
    engine, source = manifest.files[-1], manifest.files[0]
    assert engine.kind == "engine" and engine.outputs == source.outputs
    assert [output.name for output in engine.outputs] == ["probs", "logits", "embeddings"]
    assert engine.parity is not None and engine.parity.max_rel_embedding_delta == 0

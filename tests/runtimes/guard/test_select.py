"""Which runner a bundle gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.guard.bundle import open_bundle
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.select import select_runner
from safevlm.errors import InputError
from tests.runtimes.bundles import write_bundle


def test_onnx_runtime_is_chosen_where_there_is_no_engine(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    runner = select_runner(bundle, threads=2)
    assert isinstance(runner, OnnxRuntimeRunner) and runner.threads == 2
    assert runner.file == bundle.file()


@pytest.mark.parametrize(
    ("runtime", "options", "said"),
    [
        ("cuda", {}, "unknown runtime 'cuda'; allowed: auto, onnxruntime, openvino, tensorrt, torch"),
        ("auto", {"threads": 0}, "threads must be at least 1"),
        ("torch", {"precision": "fp16"}, "leave --precision out"),
    ],
)
def test_what_cannot_be_had_is_said(tmp_path: Path, runtime: str, options: dict[str, object], said: str) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "bundle"))
    with pytest.raises(InputError, match=said):
        select_runner(bundle, runtime, **options)  # type: ignore[arg-type]

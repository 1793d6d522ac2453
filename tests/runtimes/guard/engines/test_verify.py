"""An engine that was never run judges nothing before it answered as the bundle's own ONNX file, on this device."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.check import main as check
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.engines.proof import FOLDER
from runtimes.guard.engines.verify import IMAGES
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.select import select_runner
from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine
from safevlm.errors import BundleError, EngineRefusedError
from safevlm.files.user_cache import user_cache
from safevlm.images.drawn import drawn_images
from tests.runtimes.bundles import (
    PREPROCESSING,
    RTX,
    SIZE,
    engine_file,
    fitted,
    onnx_file,
    part_files,
    write_bundle,
    write_parts,
)
from tests.runtimes.guard.fake_tensorrt import FakeCuda, FakeRtxEngine, install, mean_colour
from tests.runtimes.guard.hanging_runners import judged

RGB = np.random.default_rng(2).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
Change = Callable[[dict[str, Any]], object]


def right(rgb: Any) -> dict[str, Any]:
    """Answer as the bundle's ONNX file does, up to rounding as float16 may."""
    probs, logits = judged(rgb)
    return {"probs": probs + np.float32(1e-3) * np.array([1, -1, 0], np.float32), "logits": logits}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def compares(engine: FakeRtxEngine, bundle: Bundle) -> bool:
    """Open the engine; say whether it was run for that."""
    before = engine.runs
    with TensorRTRunner(bundle):
        return engine.runs > before


def proofs(cache: Path) -> list[Path]:
    return sorted((cache / FOLDER).glob("*.json"))


def test_the_first_opening_compares_and_the_next_one_need_not(
    engine: FakeRtxEngine, bundle: Bundle, cache: Path
) -> None:
    before = content(bundle.folder)
    runner = select_runner(bundle)
    assert isinstance(runner, TensorRTRunner) and len(proofs(cache)) == 1
    with runner:
        assert engine.context.batches == [] and runner.proof is not None and runner.proof.holds
        found = runner.infer(RGB)
    assert np.allclose(found.logits, judged(RGB)[1], atol=1e-5)
    assert content(bundle.folder) == before, "a bundle is not changed by who opens it"
    assert runner.proof.parity.max_abs_prob_delta == pytest.approx(1e-3, abs=1e-4)


def test_an_engine_that_judges_without_the_bundle_s_thresholds_says_so(
    engine: FakeRtxEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "b"
    thresholds = (fitted(onnx_file(folder), block=0.05, allow=0.01),)
    bundle = open_bundle(write_bundle(folder, engine_file(folder, **RTX), thresholds=thresholds))
    assert Guard.open(bundle).thresholds is None
    (line,) = [line for line in caplog.messages if "thresholds" in line]
    assert line.startswith("engines/guard.fp16.plan judges, and the bundle's thresholds were fitted on guard.fp32.onnx")
    caplog.clear()
    assert Guard.open(bundle, "onnxruntime").thresholds == thresholds[0]
    Guard.open(write_bundle(tmp_path / "plain", engine_file(tmp_path / "plain", **RTX)))
    assert not any("thresholds" in line for line in caplog.messages)


def test_every_batch_size_judges_every_image(engine: FakeRtxEngine, bundle: Bundle) -> None:
    seen: dict[int, set[bytes]] = {}

    def answer(rgb: Any) -> dict[str, Any]:
        seen.setdefault(len(rgb), set()).update(image.tobytes() for image in rgb)
        return right(rgb)

    engine.answer = answer
    assert compares(engine, bundle)
    wanted = {image.tobytes() for image in drawn_images(PREPROCESSING, 5, IMAGES)}
    assert seen == dict.fromkeys((1, 2, 3, 4), wanted)


@pytest.mark.parametrize("wrong_at", [1, 3, 4])
def test_an_engine_that_differs_is_refused_with_by_how_much_and_onnx_runtime_judges(
    engine: FakeRtxEngine, bundle: Bundle, caplog: pytest.LogCaptureFixture, wrong_at: int
) -> None:
    engine.answer = lambda rgb: mean_colour(rgb) if len(rgb) == wrong_at else right(rgb)
    told = (
        r"on Orin it differs from ONNX Runtime with guard\.fp32\.onnx: 8 images, max \|Δp\| \d\.\d\de-01 "
        r"\(at most 2e-02 is allowed\), \d labels changed"
    )
    with pytest.raises(EngineRefusedError, match=told):
        usable_engine(bundle)
    runs = engine.runs
    with pytest.raises(EngineRefusedError, match=told):
        TensorRTRunner(bundle, bundle.file(kind="engine")).activate()
    assert engine.runs == runs, "the figures are known from the first time"
    caplog.clear()
    with caplog.at_level(logging.WARNING), Guard.open(bundle) as guard:
        assert isinstance(guard.runner, OnnxRuntimeRunner)
    (line,) = caplog.messages
    assert line.startswith("ONNX Runtime judges: ") and "max |Δp|" in line and "\n" not in line


@pytest.mark.parametrize("name", ["probs", "logits"])
def test_an_engine_without_finite_answers_is_refused(engine: FakeRtxEngine, bundle: Bundle, name: str) -> None:
    engine.answer = lambda rgb: right(rgb) | {name: np.full((len(rgb), 3), np.nan)}
    with pytest.raises(EngineRefusedError, match=f"gave {name} that are not finite numbers"):
        TensorRTRunner(bundle).activate()


def test_an_engine_that_does_not_run_is_refused(
    engine: FakeRtxEngine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runtimes.guard.fake_tensorrt.FakeContext.execute_async_v3", lambda self, stream: True)
    with pytest.raises(EngineRefusedError, match="not finite numbers"):
        TensorRTRunner(bundle).activate()


CHANGES: dict[str, Change] = {
    "another engine": lambda told: told["compared"].update(engine_sha256="0" * 64),
    "another ONNX file": lambda told: told["compared"].update(reference_sha256=["0" * 64]),
    "another GPU": lambda told: told["compared"].update(gpu_name="Thor"),
    "another driver": lambda told: told["compared"].update(driver="CUDA 13.0"),
    "another version": lambda told: told["compared"].update(version="1.8.0"),
    "another seed": lambda told: told["compared"].update(seed=6),
    "a word more": lambda told: told.update(verified=True),
    "a later schema": lambda told: told.update(schema_version=2),
    "no figures": lambda told: told.update(parity=None),
    "a figure less": lambda told: told["parity"].update(max_abs_prob_delta=None),
    "no count of labels": lambda told: told["parity"].update(label_flips=None),
    "fewer images": lambda told: told["parity"].update(images=7),
    "a negative figure": lambda told: told["parity"].update(max_abs_prob_delta=-1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_proof_of_something_else_is_none(engine: FakeRtxEngine, bundle: Bundle, cache: Path, change: Change) -> None:
    assert compares(engine, bundle) and not compares(engine, bundle)
    (path,) = proofs(cache)
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    assert compares(engine, bundle) and not compares(engine, bundle)


@pytest.mark.parametrize("damage", [b"", b"{", b"\0" * 100, b"[]", b"x" * 2**17])
def test_a_damaged_proof_is_none(engine: FakeRtxEngine, bundle: Bundle, cache: Path, damage: bytes) -> None:
    assert compares(engine, bundle)
    (path,) = proofs(cache)
    path.write_bytes(damage)
    assert compares(engine, bundle) and not compares(engine, bundle)


def test_a_proof_that_others_may_write_is_none(engine: FakeRtxEngine, bundle: Bundle, cache: Path) -> None:
    assert compares(engine, bundle)
    (path,) = proofs(cache)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    for mode in (0o620, 0o602):
        path.chmod(mode)
        assert compares(engine, bundle) and not compares(engine, bundle)
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        assert compares(engine, bundle)


def test_a_proof_is_of_one_device(
    installed: tuple[FakeCuda, FakeRtxEngine], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, engine = installed
    assert compares(engine, bundle)
    cuda.driver = 12080
    assert compares(engine, bundle) and not compares(engine, bundle)
    monkeypatch.setattr("runtimes.guard.engines.library.driver_version", lambda _: "CUDA 12.8, 570.86.15")
    assert compares(engine, bundle) and not compares(engine, bundle)


def test_where_no_proof_can_be_kept_every_opening_compares_and_says_so(
    engine: FakeRtxEngine,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        caplog.clear()
        assert compares(engine, bundle)
        assert any("the proof of an engine cannot be saved" in line for line in caplog.messages)


def test_an_engine_that_has_nothing_to_be_compared_with_is_refused(
    engine: FakeRtxEngine, tmp_path: Path, bundle: Bundle
) -> None:
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    manifest["files"][0]["precision"] = "int8"
    (bundle.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="there is no guard file of precision fp32 to compare it with"):
        usable_engine(open_bundle(bundle.folder))


def test_an_engine_of_more_than_its_manifest_says_is_refused(
    engine: FakeRtxEngine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRtxEngine, "most", 32)
    with pytest.raises(BundleError, match="of 32 images at once, but its manifest says logits, probs of 4"):
        TensorRTRunner(bundle).activate()


STATED: dict[str, dict[str, Any]] = {
    "verified by hand": RTX | {"verified": True},
    "its targets taken out": RTX
    | {"verified": True, "targets": (), "gpu_name": "Orin", "compute_capability": "8.7", "parity_seed": None},
}
PORTABLE: dict[str, dict[str, Any]] = {
    "of another GPU": {"gpu_name": "A10", "compute_capability": "8.6", "options": {"hardware_compatible": True}},
    "of the same name and another capability": {"compute_capability": "8.9", "options": {"hardware_compatible": True}},
    "of an older version": {"tensorrt_version": "10.2.0", "options": {"version_compatible": True}},
}


@pytest.mark.parametrize("info", STATED.values(), ids=STATED)
def test_what_a_manifest_says_of_an_engine_of_rtx_replaces_no_comparison(
    engine: FakeRtxEngine, tmp_path: Path, info: dict[str, Any]
) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "b", engine_file(tmp_path / "b", **info)))
    assert compares(engine, bundle) and not compares(engine, bundle)
    engine.answer = mean_colour
    with pytest.raises(EngineRefusedError, match="it differs from ONNX Runtime"):
        TensorRTRunner(bundle, verify=True).activate()
    with pytest.raises(EngineRefusedError, match="it differs from ONNX Runtime"):
        usable_engine(bundle)


@pytest.mark.parametrize("info", PORTABLE.values(), ids=PORTABLE)
def test_a_portable_engine_is_compared_where_it_was_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any]
) -> None:
    _, engine = install(monkeypatch)
    engine.answer = mean_colour  # type: ignore[method-assign]
    at_home, elsewhere = (
        open_bundle(write_bundle(tmp_path / name, engine_file(tmp_path / name, **stated)))
        for name, stated in (("home", {}), ("elsewhere", info))
    )
    assert usable_engine(at_home) and engine.runs == 0
    with pytest.raises(EngineRefusedError, match="it differs from ONNX Runtime"):
        usable_engine(elsewhere)
    engine.answer = right  # type: ignore[method-assign]
    with TensorRTRunner(elsewhere, elsewhere.file(kind="engine"), verify=True):
        assert engine.runs
    assert usable_engine(elsewhere)


# -- the parts of a guard behind the language model -------------------------------------------------------


def parts_bundle(folder: Path) -> Bundle:
    others = [engine_file(folder, role=role, precision="fp32", **RTX) for role in ("vision", "head")]
    return open_bundle(write_parts(folder, *others))


@pytest.mark.parametrize("role", ["vision", "head"])
def test_a_part_is_compared_with_the_part_that_it_was_built_of(
    engine: FakeRtxEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Any
) -> None:
    bundle = parts_bundle(tmp_path / "bundle")
    vision, head = part_files(tmp_path / "files")
    source = {"vision": vision, "head": head}[role]
    given = {"vision": RGB, "head": np.random.default_rng(1).normal(size=(3, 6, 2)).astype(np.float32)}[role]
    with OnnxRuntimeRunner(bundle, bundle.files("onnx", role)[0], providers=["CPUExecutionProvider"]) as onnx:
        monkeypatch.setattr(FakeRtxEngine, "names", tuple(each.name for each in (*source.inputs, *source.outputs)))
        monkeypatch.setattr(FakeRtxEngine, "input_type", given.dtype.type)
        engine.answer = lambda inputs: onnx.run_file(inputs)
        with TensorRTRunner(bundle, usable_engine(bundle, role=role)) as runner:
            found = runner.run_file(given)
            assert {name: values.shape for name, values in found.items()} == {
                each.name: (3, *each.shape[1:]) for each in source.outputs
            }
        engine.answer = lambda inputs: {name: values + 0.1 for name, values in onnx.run_file(inputs).items()}
        with pytest.raises(EngineRefusedError, match=f"differs from ONNX Runtime with {role}.fp32.onnx"):
            TensorRTRunner(bundle, usable_engine(bundle, role=role), verify=True).activate()


# -- the command ------------------------------------------------------------------------------------------


def verify(bundle: Bundle, *options: str) -> int:
    code = check.main([str(bundle.folder), "--verify", *options], standalone_mode=False)
    assert isinstance(code, int)
    return code


def test_verify_compares_anew_and_prints_the_figures(
    engine: FakeRtxEngine, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compares(engine, bundle)
    assert verify(bundle) == 0 and engine.context.batches
    assert "verified engines/guard.fp16.plan: 8 images, max |Δp| 1.00e-03 (at most 2e-02" in capsys.readouterr().out
    engine.answer = mean_colour
    assert verify(bundle) == 2
    assert "refused  engines/guard.fp16.plan: on Orin it differs" in capsys.readouterr().out
    with pytest.raises(EngineRefusedError):
        TensorRTRunner(bundle).activate()
    engine.answer = right
    assert verify(bundle, "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "verified" and told["label_flips"] == 0 and told["driver"] == "CUDA 12.2"
    assert not compares(engine, bundle)


def test_verify_passes_engines_of_other_devices_over(
    engine: FakeRtxEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    bundle = open_bundle(write_bundle(folder, engine_file(folder, **(RTX | {"targets": ("sm120",)}))))
    assert verify(bundle) == 2
    assert "it was built for sm120, but this GPU is Orin (sm87)" in capsys.readouterr().out

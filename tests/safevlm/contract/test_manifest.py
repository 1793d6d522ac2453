"""A manifest survives its own text, and a bad one is refused with the place of its first problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from safevlm.contract.manifest import Band, Latency, Manifest, Parity
from safevlm.errors import BundleError
from tests.runtimes.bundles import engine_file, fitted, listed, manifest_of, onnx_file


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    measured = {
        "parity": Parity(images=12, max_abs_prob_delta=1e-6, label_flips=0, reference="torch"),
        "latency": Latency(median_ms=3.0, p95_ms=4.0, batch=1, runtime="onnxruntime", machine="laptop"),
    }
    files = [onnx_file(tmp_path).model_copy(update=measured), engine_file(tmp_path)]
    weapon = {"weapon": Band(block=0.3, allow=0.1, n_unsafe=40)}
    return manifest_of(files, thresholds=(fitted(files[0], 0.7, 0.2, per_class=weapon),), fidelity={"agreement": 0.99})


def stated(manifest: Manifest) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(manifest.to_json())
    return content


def test_a_manifest_survives_its_own_text(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert Manifest.read(path) == manifest == Manifest.read(tmp_path)
    assert manifest.to_json().endswith("}\n") and stated(manifest)["schema_version"] == 1


def test_a_manifest_from_before_random_weights_were_marked_is_read(manifest: Manifest) -> None:
    old = stated(manifest)
    assert old["source"].pop("random_weights") is False
    assert Manifest.from_bytes(json.dumps(old).encode(), where="manifest.json") == manifest
    marked = json.dumps({**old, "source": {**old["source"], "random_weights": True}}).encode()
    assert Manifest.from_bytes(marked, where="manifest.json").source.random_weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, r"schema_version 2 is unknown; this release reads 1.*export it again"),
        ({"schema_version": True}, "schema_version True is unknown"),
        ({"surprise": 1}, r"surprise: Extra inputs are not permitted"),
        ({"classes": ["safe"]}, r"classes: .*at least 2"),
        ({"classes": ["safe", "safe"]}, r"classes: a name appears twice"),
        ({"default_file": "other.onnx"}, r"default_file 'other.onnx' is not among guard.fp32.onnx"),
        (
            {"preprocessing": {"height": 3}},
            r"preprocessing\.width: Field required \(and \d more problems\)",
        ),
        ({"files": []}, "files: "),
        ({"tap": None}, "tap: "),
        ({"created": None}, r"manifest.json: created: .*Copy the bundle again"),
    ],
)
def test_a_wrong_field_is_refused_with_its_place(manifest: Manifest, change: dict[str, Any], message: str) -> None:
    text = json.dumps(stated(manifest) | change).encode()
    with pytest.raises(BundleError, match=message) as caught:
        Manifest.from_bytes(text, where="manifest.json")
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../guard.onnx", "a/../../b", "a\\b", "C:b", ".", "", "./a", "a//b", "a\0b"]
)
def test_a_path_that_is_not_plain_and_inside_is_refused(manifest: Manifest, path: str) -> None:
    content = stated(manifest)
    content["files"][0]["path"] = path
    with pytest.raises(BundleError, match=r"files\.0\.path: .*relative path inside the bundle"):
        Manifest.from_bytes(json.dumps(content).encode(), where="manifest.json")


def test_a_path_listed_twice_is_refused(manifest: Manifest) -> None:
    content = stated(manifest)
    content["files"].append(content["files"][0])
    with pytest.raises(BundleError, match="a name appears twice"):
        Manifest.from_bytes(json.dumps(content).encode(), where="manifest.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b"{}", "schema_version None is unknown"),
    ],
)
def test_what_is_no_json_object_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(text, where="manifest.json")


def test_a_number_that_is_none_is_refused(manifest: Manifest) -> None:
    text = manifest.to_json().replace('"alpha": 0.05', '"alpha": NaN')
    with pytest.raises(BundleError, match=r"not valid JSON .NaN is not a number that JSON allows"):
        Manifest.from_bytes(text.encode(), where="manifest.json")


def test_a_missing_and_a_giant_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is missing\. A guard bundle is a folder.*export\.onnx"):
        Manifest.read(tmp_path / "manifest.json")
    with (tmp_path / "manifest.json").open("wb") as stream:
        stream.truncate(2**24 + 1)
    with pytest.raises(BundleError, match="is larger than"):
        Manifest.read(tmp_path)


def test_what_a_writer_states_is_checked_where_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="must not be above block"):
        fitted(onnx_file(tmp_path), 0.2, 0.7)
    with pytest.raises(ValidationError, match="batch sizes must rise"):
        engine_file(tmp_path, min_batch=3)
    with pytest.raises(ValidationError, match="'engine' is for files of kind"):
        listed(tmp_path, "a.plan", b"", kind="engine", precision="fp16")
    with pytest.raises(ValidationError, match="classes that do not exist: gun"):
        gun = {"gun": Band(block=0.1, allow=0.1, n_unsafe=40)}
        manifest_of([onnx_file(tmp_path)], thresholds=(fitted(onnx_file(tmp_path), 0.5, 0.5, per_class=gun),))
    with pytest.raises(ValidationError, match="fitted on a different version of that file"):
        manifest_of([onnx_file(tmp_path)], thresholds=(fitted(engine_file(tmp_path), 0.5, 0.5),))

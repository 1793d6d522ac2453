"""A bundle opens as it was written, and not at all once anything in it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from runtimes.guard.bundle import open_bundle
from safevlm.contract.manifest import Source
from safevlm.errors import BundleError, SafeVLMError
from tests.runtimes.bundles import (
    PREPROCESSING,
    engine_file,
    guard_file_for,
    listed,
    manifest_of,
    onnx_file,
    picture,
    write_bundle,
)


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bundle_opens_as_written(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", onnx_file(tmp_path / "b", "guard.fp16.onnx", "fp16"))
    bundle = open_bundle(str(folder))
    assert bundle.digest == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert bundle.file().precision == "fp32" and bundle.file("fp16").path == "guard.fp16.onnx"
    assert bundle.path(bundle.file()).read_bytes() == (folder / "guard.fp32.onnx").read_bytes()


def test_the_default_file_comes_first_whatever_the_order(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, onnx_file(tmp_path, "z.onnx", "fp16"), default_file="z.onnx")
    assert open_bundle(folder).file().path == "z.onnx"


def test_a_precision_or_kind_that_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    with pytest.raises(BundleError, match=r"no onnx file of precision 'int8'.*fp32 \(guard\.fp32\.onnx\)"):
        bundle.file("int8")
    with pytest.raises(BundleError, match=r"no engine file\. Build one .*export\.trt --bundle"):
        bundle.file(kind="engine")


def test_an_altered_file_is_refused_by_size_and_by_hash(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    path = folder / "guard.fp32.onnx"
    content = bytearray(path.read_bytes())
    at = content.find(b"scale")
    content[at] ^= 0x20
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"guard\.fp32\.onnx was altered: its SHA-256 is .*export it again"):
        open_bundle(folder)
    assert open_bundle(folder, verify=False).file().path == "guard.fp32.onnx"
    path.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"was altered: it has \d+ bytes, the manifest says"):
        open_bundle(folder, verify=False)


def test_altered_weights_beside_the_graph_are_refused(tmp_path: Path) -> None:
    data = listed(tmp_path, "guard.fp32.onnx.data", b"weights", kind="onnx_data", precision="fp32")
    folder = write_bundle(tmp_path, data)
    open_bundle(folder)
    (folder / data.path).write_bytes(b"weighty")
    with pytest.raises(BundleError, match=r"guard\.fp32\.onnx\.data was altered"):
        open_bundle(folder)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, engine_file(tmp_path))
    (folder / "engines/guard.fp16.plan").unlink()
    with pytest.raises(BundleError, match=r"plan is listed in the manifest but missing"):
        open_bundle(folder)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    path = folder / "guard.fp32.onnx"
    path.rename(tmp_path / "outside.onnx")
    path.symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(BundleError, match=r"leads out of the bundle, to .*outside\.onnx"):
        open_bundle(folder)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(BundleError, match=r"cannot be followed|missing"):
        open_bundle(folder)


def test_a_folder_that_links_out_is_refused_too(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b", engine_file(tmp_path / "b"))
    (folder / "engines").rename(tmp_path / "engines")
    (folder / "engines").symlink_to(tmp_path / "engines")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        open_bundle(folder)


def test_links_within_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    (folder / "guard.fp32.onnx").rename(folder / "blob")
    (folder / "guard.fp32.onnx").symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    open_bundle(tmp_path / "link")


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd"])
def test_a_listed_path_outside_is_refused(tmp_path: Path, path: str) -> None:
    folder = write_bundle(tmp_path)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    rewrite(folder, files=[files[0] | {"path": path}])
    with pytest.raises(BundleError, match="not a plain relative path inside the bundle"):
        open_bundle(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "none", "is missing"),
        (Path(__file__), "is a file"),
        (tmp_path, "manifest.json is missing"),
    ]:
        with pytest.raises(BundleError, match=reason):
            open_bundle(path)
    rewrite(write_bundle(tmp_path), schema_version=99)
    with pytest.raises(BundleError, match="schema_version 99 is unknown"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("standalone", [True, False])
@pytest.mark.parametrize("way", ["check", "gate", "gateway", "run"])
def test_a_bundle_is_opened_once_by_each_command(
    way: str, standalone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads twice may judge by one bundle and tell of another."""
    from benchmarks.runs.answering.bundle import BundleAnswerer
    from runtimes.gate.open import open_told
    from runtimes.gateway.gateway import Gateway
    from safevlm.checkpoint.checkpoint import open_checkpoint
    from safevlm.contract import manifest as manifests

    checkpoint = open_checkpoint("tiny-safegem")
    source = Source(checkpoint="tiny-safegem", sha256="0" * 64, family="gemma3", standalone=standalone)
    classes = checkpoint.classes
    (tmp_path / "bundle").mkdir()
    file = guard_file_for(tmp_path / "bundle", len(classes), PREPROCESSING)
    manifest_of([file], classes=classes, source=source).write(tmp_path / "bundle")
    image = picture(tmp_path / "image.png", (0, 255, 0))
    read: list[Path] = []
    true = manifests.manifest_bytes

    def counted(place: Path) -> bytes:
        read.append(place)
        return true(place)

    bundles = import_module("runtimes.guard.bundle")
    hashed: list[Any] = []
    sha256 = bundles._sha256
    monkeypatch.setattr(bundles, "_sha256", lambda stream: (hashed.append(stream.name), sha256(stream))[1])
    for module in (manifests, bundles):
        monkeypatch.setattr(module, "manifest_bytes", counted)
    with contextlib.suppress(SafeVLMError):  # not every way takes a guard behind the language model
        if way == "check":
            import_module("runtimes.check").main.main([str(tmp_path / "bundle"), str(image)], standalone_mode=False)
        elif way == "gate":
            open_told(tmp_path / "bundle", None, None)
        elif way == "gateway":
            Gateway.open(tmp_path / "bundle", upstream="http://127.0.0.1:9/v1" if standalone else None)
        else:
            BundleAnswerer(tmp_path / "bundle", classes, batch=1).describe()
    assert len(read) == 1 and len(hashed) == 1

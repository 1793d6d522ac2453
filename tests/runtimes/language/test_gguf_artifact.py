"""Folders of GGUF files: what a reader refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.language.gguf_artifact import HeadWeights, is_gguf, open_gguf
from runtimes.language.head import head_logits, pooled, softmax
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import BundleError
from safevlm.network.head import GuardHead, build_head
from safevlm.network.pooling import POOLINGS, pool

Folder = Callable[[str], Path]


@pytest.fixture
def folder(gguf_folder: Folder, tmp_path: Path) -> Path:
    shutil.copytree(gguf_folder("tiny-safegem"), tmp_path / "gguf")
    return tmp_path / "gguf"


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    stated = json.loads((folder / "gguf.json").read_text())
    edit(stated)
    (folder / "gguf.json").write_text(json.dumps(stated))


def test_a_folder_or_its_model_opens(folder: Path) -> None:
    assert is_gguf(folder) and is_gguf(folder / "model.f16.gguf") and not is_gguf(folder.parent)
    assert open_gguf(folder / "model.f16.gguf").digest == open_gguf(folder).digest
    with pytest.raises(BundleError, match=r"mmproj\.f16\.gguf is not the language model"):
        open_gguf(folder / "mmproj.f16.gguf")


def test_random_weights_are_read_where_older_folders_state_them(folder: Path) -> None:
    assert not open_gguf(folder).manifest.random_weights

    def older(stated: dict[str, Any]) -> None:
        del stated["source"]["random_weights"]
        stated["random_weights"] = True

    change(folder, older)
    assert open_gguf(folder).manifest.random_weights


def test_what_is_missing_or_altered_is_named(folder: Path) -> None:
    (folder / "guard.exact.safetensors").rename(folder / "elsewhere")
    with pytest.raises(BundleError, match=r"guard\.exact\.safetensors is listed in gguf\.json but missing"):
        open_gguf(folder)
    (folder / "elsewhere").rename(folder / "guard.exact.safetensors")
    with (folder / "model.f16.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(BundleError, match="is not the language model of this folder: it has SHA-256"):
        open_gguf(folder)
    open_gguf(folder, verify=False)
    (folder / "gguf.json").unlink()
    with pytest.raises(BundleError, match=r"gguf\.json is missing"):
        open_gguf(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda stated: stated.update(schema_version=2), "schema_version 2 is unknown"),
        (lambda stated: stated["files"].pop(0), "one model and one mmproj"),
        (lambda stated: stated["files"][0].update(path="../model.f16.gguf"), "not a plain relative path"),
        (lambda stated: stated["heads"][0].update(file="other"), "is not listed among the files"),
        (lambda stated: stated["heads"][0].update(widths=[256, 128, 3]), "has 3 outputs, but there are 20 classes"),
        (lambda stated: stated["heads"][0].update(kind="distilled"), "one exact head is needed"),
        (lambda stated: stated.update(probe=[0.0]), "at least 16"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, edit: Any, message: str) -> None:
    change(folder, edit)
    with pytest.raises(BundleError, match=message):
        open_gguf(folder)


def test_a_manifest_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "gguf.json").write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        open_gguf(folder)


def test_the_head_is_the_checkpoints_own(folder: Path) -> None:
    artifact = open_gguf(folder)
    head = artifact.manifest.heads[0]
    weights = artifact.weights(head)
    own = build_head(open_checkpoint("tiny-safegem"))
    features = torch.randn(5, 256)
    with torch.no_grad():
        wanted = own(features.mean(dim=0, keepdim=True))[0].numpy()
    np.testing.assert_allclose(head_logits(weights, pooled(features.numpy(), "mean")), wanted, atol=1e-4)
    wrong = head.model_copy(update={"widths": (256, 100, 20)})
    with pytest.raises(BundleError, match=r"mlp\.0\.weight' is F32 \(128, 256\), but must be F32 \(100, 256\)"):
        artifact.weights(wrong)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_numpys_head_is_torchs(pooling: Any) -> None:
    torch.manual_seed(0)
    features = torch.randn(7, 12) * 3
    head = GuardHead((12 if pooling == "mean" else 36, 9, 6, 4)).eval()
    layers = tuple((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in head.mlp[::3])  # type: ignore[union-attr, operator]
    with torch.no_grad():
        wanted = torch.softmax(head(pool(features[None], pooling)), dim=-1)[0].numpy()
    found = softmax(head_logits(HeadWeights(layers=layers), pooled(features.numpy(), pooling)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)

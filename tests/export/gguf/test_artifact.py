"""The whole export: what llama.cpp computes of the files is what the checkpoint computes on torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from calibration.sets.mix import Mix
from calibration.sets.samples import CalibrationOptions
from export.gguf import artifact as module
from export.gguf import parity
from export.gguf.__main__ import main
from export.gguf.artifact import GgufOptions, export_gguf
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.hub import TINY_CHECKPOINTS
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.errors import CheckpointError, InputError, ParityError
from safevlm.network.distilled_head import DistilledHead
from safevlm.network.head import GuardHead
from safevlm.network.loading import load_safe_vlm
from safevlm.network.pooling import pooled_width
from safevlm.network.reference import guard_sha256
from safevlm.terminal.commandline import run
from tests.safevlm.checkpoint.random_checkpoints import stand_in

SUITE = build_suite("test", pairs=100, questions=20)
SCENES = {picture.path: picture.scene for picture in SUITE.pictures}
TINY = sorted(TINY_CHECKPOINTS)


def spread(count: int) -> list[Any]:
    """Return rows of the built-in suite, as many of each kind as there are."""
    rows = [*SUITE.pairs, *SUITE.questions]
    return [rows[at].row for at in np.linspace(0, len(rows) - 1, count).astype(int)]


@pytest.mark.parametrize("name", TINY)
def test_logits_answers_and_verdicts_are_those_of_torch(name: str, gguf_folder: Callable[[str], Path]) -> None:
    vlm = load_safe_vlm(open_checkpoint(name))
    rows, same, cosines, deltas = spread(40), 0, [], []
    with LlamaCppLanguageRunner(gguf_folder(name)) as runner:
        for row in rows:
            rgb = vlm.preprocessing.apply(draw(SCENES[row["image"]]))
            prefilled = runner.prefill(rgb, row["query"])
            logits = prefilled.handle[0].copy()
            answer = runner.generate(prefilled.handle, 48)
            begun = vlm.begin(torch.from_numpy(rgb[None].copy()), [row["query"]])
            wanted = vlm.token_logits(begun.last_hidden)[0, 0].detach().numpy()
            cosines.append(float(logits @ wanted / np.linalg.norm(logits) / np.linalg.norm(wanted)))
            deltas.append(float(np.abs(prefilled.exact_probs - begun.guard_probs[0]).max()))
            same += answer == vlm.finish(begun, 48)[0]
    assert min(cosines) >= 0.999
    assert same >= 0.95 * len(rows)
    assert max(deltas) <= 0.02


def test_the_manifest_says_what_was_written(gguf_folder: Callable[[str], Path]) -> None:
    checkpoint, folder = open_checkpoint("tiny-safeqwen"), gguf_folder("tiny-safeqwen")
    manifest = GgufManifest.read(folder)
    assert {file.role: file.path for file in manifest.files} == {
        "model": "model.f16.gguf",
        "mmproj": "mmproj.f16.gguf",
        "head": "guard.exact.safetensors",
    }
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f.path for f in manifest.files), "gguf.json"])
    assert manifest.source.sha256 == guard_sha256(checkpoint) and not manifest.source.standalone
    assert (manifest.classes, manifest.tap.source) == (checkpoint.classes, "language_model")
    assert manifest.prompt.format() == checkpoint.family.prompt
    assert manifest.parity is not None and manifest.parity.images == 2
    assert manifest.image_tokens == 36 and manifest.importance is None


def test_random_weights_are_marked_once(tmp_path: Path) -> None:
    folder = stand_in(open_checkpoint("tiny-safegem").folder, tmp_path / "checkpoint")
    manifest = export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type="f16", parity_images=0))
    assert manifest.random_weights and GgufManifest.read(tmp_path / "out") == manifest
    assert (tmp_path / "out" / "gguf.json").read_text().count("random_weights") == 1


def test_llava_is_written_for_the_llama_cpp_that_is_here(gguf_folder: Callable[[str], Path]) -> None:
    """Its class token stands behind the patches in this version; whichever it is, the embeddings agree."""
    last = GgufManifest.read(gguf_folder("tiny-safellava")).class_token_last
    assert last, "this llama.cpp puts the class token first: llama.cpp issue 25814 is mended, the workaround can go"


def test_quantized_with_importance_is_smaller_and_still_the_same_guard(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("tiny-safellava")
    importance = CalibrationOptions(mix=Mix(samples=16))
    manifest = export_gguf(
        checkpoint, tmp_path / "out", GgufOptions(type="q4_k_m", importance=importance, parity_images=4)
    )
    assert manifest.importance is not None and manifest.importance.samples == 16
    assert manifest.file("model").bytes < 1.6 * 2**20
    assert manifest.parity is not None and manifest.parity.label_flips == 0
    assert not list(tmp_path.glob("**/*.partial*")) and not list((tmp_path / "out").glob("model.f16*"))


def test_a_gptq_checkpoint_goes_through_its_dequantized_weights(tmp_path: Path) -> None:
    from quantize.gptq import gptq_plan
    from quantize.methods.grid import Scheme
    from quantize.methods.settings import RunOptions
    from quantize.streamed.compress import compress

    checkpoint = open_checkpoint("tiny-safellava")
    plan = gptq_plan(checkpoint, Scheme(bits=8, group_size=64, symmetric=True), nearest=True)
    compress(checkpoint, tmp_path / "gptq", plan, CalibrationOptions(mix=Mix(samples=5)), RunOptions(guard_images=0))
    manifest = export_gguf(
        open_checkpoint(tmp_path / "gptq"), tmp_path / "out", GgufOptions(type="f16", parity_images=2)
    )
    assert manifest.source_quantization == "gptq"
    assert manifest.parity is not None and (manifest.parity.max_abs_prob_delta or 1) <= 0.02


def distilled(name: str, size: tuple[int, int], sha256: str | None = None) -> DistilledHead:
    checkpoint = open_checkpoint(name)
    torch.manual_seed(0)
    width = pooled_width("mean_max_std", checkpoint.hidden_size)
    head = GuardHead((width, 32, len(checkpoint.classes))).requires_grad_(False).eval()
    return DistilledHead(
        head=head,
        pooling="mean_max_std",
        classes=checkpoint.classes,
        checkpoint=name,
        source_sha256=sha256 or guard_sha256(checkpoint),
        size=size,
        fidelity={"n": 1},
    )


def test_a_distilled_head_travels_and_judges_as_on_torch(tmp_path: Path) -> None:
    from runtimes.guard.llamacpp_guard import LlamaCppGuardRunner
    from runtimes.language.llamacpp_language import open_session
    from safevlm.network.pooling import pool
    from safevlm.network.reference import build_vision

    head = distilled("tiny-safellava", (84, 84))
    checkpoint = open_checkpoint("tiny-safellava")
    manifest = export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="q8_0", distilled=head, parity_images=0))
    assert manifest.source.standalone and manifest.parity is None
    artifact = open_gguf(tmp_path / "out")
    rgb = np.random.default_rng(1).integers(0, 256, (2, 84, 84, 3), np.uint8)
    with torch.no_grad():
        features = build_vision(checkpoint)(torch.from_numpy(rgb))
        wanted = torch.softmax(head.head(pool(features, "mean_max_std")), dim=-1).numpy()
    with LlamaCppGuardRunner(artifact, open_session(artifact)) as guard:
        output = guard.infer(rgb, embeddings=True)
    np.testing.assert_allclose(output.probs, wanted, atol=0.01)
    assert output.embeddings is not None and output.embeddings.shape == tuple(features.shape)


def test_a_head_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    options = GgufOptions(type="f16", distilled=distilled("tiny-safellava", (84, 84), "0" * 64))
    with pytest.raises(CheckpointError, match="was made for"):
        export_gguf(open_checkpoint("tiny-safellava"), tmp_path / "out", options)


def test_what_is_refused_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("tiny-safellava")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"there already exists\. Give --out"):
        export_gguf(checkpoint, tmp_path / "there", GgufOptions(type="f16"))
    with pytest.raises(InputError, match=r"is unknown\. Allowed: f32"):
        GgufOptions(type="q9_z")
    with pytest.raises(InputError, match="iq2_xs needs an importance matrix"):
        GgufOptions(type="iq2_xs")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"MiB are needed, but the file system .* has only 1 bytes free"):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_llama_cpp_that_computes_something_else_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint("tiny-safegem")
    encode = module.LlamaCpp.encode
    monkeypatch.setattr(module.LlamaCpp, "encode", lambda self, rgb: encode(self, rgb) * 1.2)
    with pytest.raises(ParityError, match="image embeddings are off by"):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16"))
    monkeypatch.undo()
    monkeypatch.setattr(parity, "exact_probs", lambda *_, **__: torch.full((2, 20), 0.05))
    with pytest.raises(ParityError, match="probabilities differ by 0"):
        export_gguf(checkpoint, tmp_path / "out", GgufOptions(type="f16", parity_images=2))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(open_checkpoint("tiny-safegem").folder, folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing: llama\.cpp needs"):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type="f16"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer can be read"):
        export_gguf(open_checkpoint(folder), tmp_path / "out", GgufOptions(type="f16"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [
        "--model",
        "tiny-safegem",
        "--type",
        "q8_0",
        "--out",
        str(out),
        "--parity-images",
        "1",
        "--samples",
        "5",
    ]
    with pytest.raises(SystemExit) as ended:
        run(main, [*arguments, "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["importance"]["samples"] == 5
    with pytest.raises(SystemExit) as ended:
        run(main, arguments)
    assert ended.value.code == 2 and "exists" in capsys.readouterr().err

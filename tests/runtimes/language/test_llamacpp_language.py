"""The llama.cpp runner behind its contract: one prefill, an image read once, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtimes.gate.gate import Gate
from runtimes.guard.judge import Guard
from runtimes.guard.llamacpp_guard import LlamaCppGuardRunner, has_standalone_guard
from runtimes.guard.policy import Limits, Policy
from runtimes.language.gguf_artifact import open_gguf
from runtimes.language.llamacpp import LlamaCpp
from runtimes.language.llamacpp_language import LlamaCppLanguageRunner, open_session
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.gguf_manifest import GgufManifest
from safevlm.errors import BundleError, InputError, SafeVLMError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import SafeVLM

QUESTION = "Where is the square?"
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def vlm() -> SafeVLM:
    return load_safe_vlm(open_checkpoint("tiny-safellava"))


@pytest.fixture(scope="module")
def runner(gguf_folder: Folder) -> Iterator[LlamaCppLanguageRunner]:
    with LlamaCppLanguageRunner(gguf_folder("tiny-safellava")) as runner:
        yield runner


def picture(seed: int, size: int = 84) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


class Counted:
    """Counts the calls of a session's methods while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded, self.images, self.texts = 0, 0, []
        encode, image, text = LlamaCpp.encode, LlamaCpp.read_image, LlamaCpp.read_text

        def counted_encode(session: LlamaCpp, rgb: Any) -> Any:
            self.encoded += 1
            return encode(session, rgb)

        def counted_image(session: LlamaCpp, rgb: Any, embeddings: Any, *, tapped: bool) -> Any:
            self.images += 1
            return image(session, rgb, embeddings, tapped=tapped)

        def counted_text(session: LlamaCpp, ids: Any) -> Any:
            self.texts.append(len(ids))
            return text(session, ids)

        monkeypatch.setattr(LlamaCpp, "encode", counted_encode)
        monkeypatch.setattr(LlamaCpp, "read_image", counted_image)
        monkeypatch.setattr(LlamaCpp, "read_text", counted_text)


def test_verdict_and_answer_come_out_of_one_prefill(
    runner: LlamaCppLanguageRunner, vlm: SafeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = picture(0)
    wanted = vlm.answer(torch.from_numpy(rgb[None].copy()), [QUESTION], max_new_tokens=12)[0]
    counted = Counted(monkeypatch)
    prefilled = runner.prefill(rgb, QUESTION)
    assert (counted.encoded, counted.images, len(counted.texts)) == (1, 1, 2)
    assert prefilled.exact_probs is not None
    np.testing.assert_allclose(prefilled.exact_probs, wanted.guard_probs, atol=0.02)
    pieces = list(runner.stream(prefilled.handle, 12))
    assert "".join(pieces) == wanted.text and len(pieces) > 1
    assert (counted.encoded, counted.images) == (1, 1)
    with pytest.raises(InputError, match="answered already"):
        runner.generate(prefilled.handle, 12)


def test_a_second_question_reads_its_own_tokens_alone(
    runner: LlamaCppLanguageRunner, vlm: SafeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb, other = picture(1), "What colour is the circle?"
    first = runner.prefill(rgb, QUESTION)
    runner.generate(first.handle, 8)
    counted = Counted(monkeypatch)
    second = runner.prefill(rgb.copy(), other)
    assert (counted.encoded, counted.images, len(counted.texts)) == (0, 0, 1)
    np.testing.assert_array_equal(first.exact_probs, second.exact_probs)
    wanted = vlm.answer(torch.from_numpy(rgb[None].copy()), [other], max_new_tokens=12)[0].text
    assert runner.generate(second.handle, 12) == wanted
    changed = rgb.copy()
    changed[0, 0, 0] ^= 1
    runner.prefill(changed, other)
    assert (counted.encoded, counted.images) == (1, 1), "another picture by one bit is another picture"


def test_embeddings_stand_in_for_the_picture(
    runner: LlamaCppLanguageRunner, vlm: SafeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb = picture(2)
    features = vlm.image_features(torch.from_numpy(rgb[None].copy()))[0].numpy()
    counted = Counted(monkeypatch)
    given = runner.prefill(rgb, QUESTION, features)
    assert counted.encoded == 0
    exact = vlm.guard(torch.from_numpy(rgb[None].copy()))[0][0].numpy()
    np.testing.assert_allclose(given.exact_probs, exact, atol=5e-3)
    with pytest.raises(InputError, match=r"shape \(35, 256\) were given; \(36, 256\)"):
        runner.prefill(picture(3), QUESTION, features[:35])
    assert runner.prefill(rgb, QUESTION).exact_probs is not None, "a failure leaves nothing half read"


def test_an_older_handle_and_a_token_for_the_image_are_refused(runner: LlamaCppLanguageRunner) -> None:
    older = runner.prefill(picture(4), QUESTION)
    runner.prefill(picture(5), QUESTION)
    with pytest.raises(InputError, match="a later one replaced it"):
        runner.generate(older.handle, 4)
    with pytest.raises(InputError, match="contains '<image>'"):
        runner.prefill(picture(4), "what is <image>?")
    with pytest.raises(InputError, match="must be uint8 of shape 84 x 84"):
        runner.prefill(picture(4, size=90), QUESTION)


def test_a_prompt_beyond_the_context_is_refused_and_the_runner_goes_on(gguf_folder: Folder) -> None:
    with LlamaCppLanguageRunner(gguf_folder("tiny-safegem"), context=64) as runner:
        with pytest.raises(InputError, match="the context is 64"):
            runner.prefill(picture(0, 112), "why " * 80)
        prefilled = runner.prefill(picture(0, 112), "Why?")
        answer = runner.generate(prefilled.handle, 500)  # ends with the context at the latest
        assert isinstance(answer, str)


@pytest.mark.parametrize("name", ["tiny-safeqwen", "tiny-safegem"])
def test_the_prefix_cache_is_right_in_every_family(name: str, gguf_folder: Folder) -> None:
    """Three-axis positions, and a sliding window that must not have lost the image."""
    with LlamaCppLanguageRunner(gguf_folder(name)) as runner:
        size = runner.artifact.manifest.preprocessing.height
        questions = ["Where is the square?", "What colour is the circle, and is it safe to stand next to it?", "Why?"]
        again = [runner.generate(runner.prefill(picture(7, size), q).handle, 24) for q in questions]
        fresh = []
        for question in questions:
            runner.prefill(picture(8, size), "")
            fresh.append(runner.generate(runner.prefill(picture(7, size), question).handle, 24))
        assert again == fresh


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_a_projector_of_another_model_is_refused_by_its_hash(gguf_folder: Folder, tmp_path: Path) -> None:
    folder = copied(gguf_folder("tiny-safellava"), tmp_path / "mixed")
    shutil.copyfile(gguf_folder("tiny-safegem") / "mmproj.f16.gguf", folder / "mmproj.f16.gguf")
    with pytest.raises(BundleError, match=r"mmproj\.f16\.gguf is not the projector of this folder"):
        open_gguf(folder)


def test_a_projector_of_the_same_size_is_told_by_what_it_computes(gguf_folder: Folder, tmp_path: Path) -> None:
    """Someone who writes the hash anew has changed the manifest by hand; the probe still knows."""
    from export.gguf.vision import vision_tensors
    from export.gguf.vision_keys import vision_keys
    from export.gguf.writing import write_gguf

    folder = copied(gguf_folder("tiny-safegem"), tmp_path / "other")
    checkpoint, manifest = open_checkpoint("tiny-safegem"), GgufManifest.read(folder)
    tensors = vision_tensors(checkpoint, "f16")
    first = tensors[0]
    tensors[0] = replace(first, read=lambda: first.read() * 1.5)
    write_gguf(
        folder / "mmproj.f16.gguf", "clip", lambda w: vision_keys(checkpoint, manifest.preprocessing, w), tensors
    )
    from runtimes.guard.bundle import sha256_of

    stated = json.loads((folder / "gguf.json").read_text())
    for file in stated["files"]:
        if file["role"] == "mmproj":
            path = folder / file["path"]
            file |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    (folder / "gguf.json").write_text(json.dumps(stated))
    with pytest.raises(BundleError, match="computes different image embeddings"), LlamaCppLanguageRunner(folder):
        pass


def test_a_damaged_file_gets_llama_cpps_own_words(gguf_folder: Folder, tmp_path: Path) -> None:
    folder = copied(gguf_folder("tiny-safegem"), tmp_path / "cut")
    path = folder / "model.f16.gguf"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\0" * (len(content) - len(content) // 2))
    with pytest.raises(BundleError, match="language model of this folder"):
        open_gguf(folder)
    path.write_bytes(b"nonsense" + content[8:])
    artifact = open_gguf(folder, verify=False)
    with pytest.raises(BundleError, match=r"llama\.cpp cannot load it: \w+"), LlamaCppLanguageRunner(artifact):
        pass


def test_guard_and_answer_share_one_model_and_one_vision_pass(
    gguf_folder: Folder, vlm: SafeVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = open_gguf(gguf_folder("tiny-safegem"))
    assert has_standalone_guard(artifact) and not has_standalone_guard(open_gguf(gguf_folder("tiny-safellava")))
    session = open_session(artifact)
    guard = Guard(LlamaCppGuardRunner(artifact, session), artifact.manifest.classes)
    limits = Limits.model_construct(block=2.0, allow=2.0)
    never = Policy(guard=limits, exact=limits)
    with Gate(guard, LlamaCppLanguageRunner(artifact, session=session), never) as gate:
        counted = Counted(monkeypatch)
        pieces: list[str] = []
        result = gate.ask(Path(__file__).parent / "no such file", QUESTION)
        assert result.verdict == "block" and counted.encoded == 0
        from PIL import Image

        result = gate.ask(Image.fromarray(picture(3, 112)), QUESTION, max_new_tokens=12, on_text=pieces.append)
        assert result.verdict == "allow" and result.answer == "".join(pieces)
        assert counted.encoded == 1
        assert result.probs is not None and result.exact_probs is not None
        assert result.probs == pytest.approx(result.exact_probs, abs=1e-5)
    with pytest.raises(SafeVLMError, match="not active"):
        guard.runner.infer(picture(3, 112)[None])


def test_a_guard_behind_the_language_model_cannot_judge_alone(gguf_folder: Folder) -> None:
    artifact = open_gguf(gguf_folder("tiny-safellava"))
    with pytest.raises(BundleError, match="no guard head that reads the projector"):
        LlamaCppGuardRunner(artifact, open_session(artifact))


def test_a_prompt_of_another_version_is_refused(gguf_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Its verdicts were fitted to that prompt, and further turns would be written in another format."""
    folder = tmp_path / "gguf"
    shutil.copytree(gguf_folder("tiny-safellava"), folder)
    stated = json.loads((folder / "gguf.json").read_text())
    stated["prompt"]["before_image"] += "Look: "
    (folder / "gguf.json").write_text(json.dumps(stated))
    with pytest.raises(
        BundleError, match=r"the prompt in gguf.json differs from this release's prompt of the family 'llava'"
    ):
        LlamaCppLanguageRunner(folder)

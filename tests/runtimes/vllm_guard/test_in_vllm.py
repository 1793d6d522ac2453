"""vLLM, unmodified and on a CPU, gives the torch path's verdicts with its answers, whatever becomes of a request.

``make peers`` makes ``.venv-vllm``; without it these tests skip, except where CI is set.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.holisafe_mini.scene import draw
from calibration.holisafe_mini.suite import build_suite
from export.hf import export_hf
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import SafeVLM
from tests.quantize.streamed.test_consumers import ROOT, peer
from tests.runtimes.vllm_guard.warm import Ask, asking, failing

MODELS = ("tiny-safellava", "tiny-safeqwen")
IMAGES = 12
CLOSE = 1e-5
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    with asking(tmp_path_factory.mktemp("vllm")) as answer:
        yield answer


class Case:
    """A checkpoint, images at its size, and what the torch path says of them."""

    def __init__(self, model: str, folder: Path) -> None:
        self.folder = export_hf(open_checkpoint(model), folder / "model").out
        self.vlm: SafeVLM = load_safe_vlm(open_checkpoint(self.folder))
        suite = build_suite(pairs=100, questions=0)
        safe, unsafe = (
            [each.scene for each in suite.pictures if (each.scene.label == 0) is kind] for kind in (True, False)
        )
        scenes = [*safe[: IMAGES // 2], *unsafe[: IMAGES // 2]]
        self.pixels = [self.vlm.preprocessing.apply(draw(scene)) for scene in scenes]
        self.paths = [str(folder / f"{at}.png") for at in range(len(self.pixels))]
        for path, pixels in zip(self.paths, self.pixels, strict=True):
            Image.fromarray(pixels).save(path)
        self.probs = self.vlm.guard(torch.from_numpy(np.stack(self.pixels)))[0].numpy()
        self.rows: list[Any] = [[{"image": path}, {"text": QUESTION}] for path in self.paths]

    def agrees(self, said: Any, at: int, image: int = 0) -> bool:
        """Say whether a verdict is that of the torch path on image ``at``."""
        found = said["params"]["safe_vlm"]["images"][image]
        probs = np.array([found["probs"][name] for name in self.vlm.classes])
        close = bool(np.abs(probs - self.probs[at]).max() <= CLOSE)
        return close and found["label"] == self.vlm.classes[int(self.probs[at].argmax())] and found["usual"] is True


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def found(model: str) -> Case:
        if model not in made:
            made[model] = Case(model, tmp_path_factory.mktemp(model))
        return made[model]

    return found


@pytest.fixture(scope="module")
def everything(ask: Ask, case: Callable[[str], Case]) -> Callable[[str], dict[str, Any]]:
    """Return what came of everything that may go wrong: one engine a model, its prompts computed in chunks."""
    done: dict[str, dict[str, Any]] = {}

    def found(model: str) -> dict[str, Any]:
        if model not in done:
            subject = case(model)
            first, second = ({"image": path} for path in subject.paths[:2])
            two = [first, second, {"text": QUESTION}]
            later = [
                {"role": "user", "content": "Be bold: everything is safe."},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": [first, {"text": QUESTION}]},
            ]
            rows = [*subject.rows, two, later]
            engine = {"max_num_batched_tokens": 48, "limit_mm_per_prompt": {"image": 2}}
            done[model] = ask({"folder": str(subject.folder), "engine": engine, "scenario": "everything", "rows": rows})
            assert "error" not in done[model], done[model]["error"]
        return done[model]

    return found


def test_verdicts_are_those_of_the_torch_path(
    everything: Callable[[str], dict[str, Any]], case: Callable[[str], Case]
) -> None:
    for model in MODELS:
        subject, found = case(model), everything(model)
        assert len({int(row.argmax()) for row in subject.probs}) > 1, "else the labels prove little"
        for key in ("at_once", "long"):  # in chunks, then behind a known prefix
            assert all(subject.agrees(found[key][at], at) for at in range(IMAGES)), (model, key)
        assert all(each["cached"] > 0 for each in found["long"]), "the second time, prefixes were known"
        assert min(len(each["prompt"]) for each in found["at_once"]) > 48, "no prompt fits into one step"
        said = found["at_once"][0]["params"]["safe_vlm"]
        assert said["classes"] == list(subject.vlm.classes) and len(said["head"]) == 64
        assert found["text"]["params"]["safe_vlm"]["images"] == []


def test_each_of_several_images_has_its_verdict(
    everything: Callable[[str], dict[str, Any]], case: Callable[[str], Case]
) -> None:
    """The first one is as usual; the second stands behind other tokens, which is stated."""
    for model in MODELS:
        subject, two = case(model), everything(model)["at_once"][IMAGES]
        images = two["params"]["safe_vlm"]["images"]
        assert len(images) == 2 and subject.agrees(two, 0) and images[1]["usual"] is False
        assert np.isclose(sum(images[1]["probs"].values()), 1)


def test_an_image_behind_other_turns_is_stated_as_such(everything: Callable[[str], dict[str, Any]]) -> None:
    for model in MODELS:
        (image,) = everything(model)["at_once"][IMAGES + 1]["params"]["safe_vlm"]["images"]
        assert image["usual"] is False


def test_what_is_aborted_leaves_nothing_behind(
    everything: Callable[[str], dict[str, Any]], case: Callable[[str], Case]
) -> None:
    for model in MODELS:
        found = everything(model)
        assert found["after_abort"] == [] and case(model).agrees(found["after"], 0)
        assert found["files"] == [] and found["known"] == 0


def test_a_storage_that_fills_or_vanishes_is_an_error_and_no_verdict(
    everything: Callable[[str], dict[str, Any]], case: Callable[[str], Case]
) -> None:
    for model in MODELS:
        found = everything(model)
        for broken in ("full", "gone"):
            said = found[broken]["params"]["safe_vlm"]
            assert "images" not in said and "wrote no verdict" in said["error"], broken
        for mended in ("after_full", "back"):
            assert case(model).agrees(found[mended], 0), mended


def test_preempted_requests_keep_their_verdicts(ask: Ask, case: Callable[[str], Case]) -> None:
    subject = case("tiny-safellava")
    job = {"folder": str(subject.folder), "engine": {"num_gpu_blocks_override": 34}, "rows": subject.rows}
    found = ask({**job, "scenario": "preemption"})
    assert "error" not in found, found["error"]
    assert found["preempted"] > 0 and found["files"] == []
    assert all(subject.agrees(each, at) for at, each in enumerate(found["found"]))


def test_states_that_vllm_left_out_are_an_error_and_are_not_used_again(ask: Ask, case: Callable[[str], Case]) -> None:
    """Where vLLM does not run its drafter, another request's states are in the cache."""
    subject = case("tiny-safellava")
    found = ask({"folder": str(subject.folder), "scenario": "left_out", "rows": subject.rows[:4]})
    assert "error" not in found, found["error"]
    for each in found["left_out"]:
        (image,) = each["params"]["safe_vlm"]["images"]
        assert list(image) == ["error"]
    assert all(subject.agrees(each, at) for at, each in enumerate(found["again"], 1)) and found["files"] == []


def test_what_cannot_be_served_is_said_at_the_start(ask: Ask, case: Callable[[str], Case], tmp_path: Path) -> None:
    folder = str(case("tiny-safellava").folder)
    (tmp_path / "file").write_text("")
    assert "cannot hold verdicts" in failing(
        ask, {"folder": folder, "connector": {"shared_storage_path": str(tmp_path / "file")}}
    )
    assert "another checkpoint than its guard" in failing(
        ask, {"folder": folder, "connector": {"head_sha256": "0" * 64}}
    )


def test_an_engine_without_the_connector_gives_no_verdict(ask: Ask, case: Callable[[str], Case]) -> None:
    subject = case("tiny-safellava")
    removed = {"speculative_config": None, "kv_transfer_config": None}
    found = ask({"folder": str(subject.folder), "engine": removed, "scenario": "verdicts", "rows": subject.rows[:1]})
    assert "error" not in found, found["error"]
    assert found["at_once"][0]["params"] is None


def test_the_command_refuses_gemma_with_what_to_do_instead(tmp_path: Path) -> None:
    folder = export_hf(open_checkpoint("tiny-safegem"), tmp_path / "model").out
    command = [sys.executable, "-m", "runtimes.vllm", "--model", str(folder), "--python", peer("vllm")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "splits off exactly" in done.stderr, done.stderr

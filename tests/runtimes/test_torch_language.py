"""The torch language runner behind its contract, and behind the gate with a real guard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoint import open_checkpoint
from models.errors import InputError, SafeVLMError
from models.reference import build_reference_guard
from models.safe_vlm import SafeVLM, load_safe_vlm
from runtimes.gate import Gate
from runtimes.judge import Guard
from runtimes.policy import Limits, Policy
from runtimes.runner import GuardOutput, GuardRunner
from runtimes.torch_language import TorchLanguageRunner
from tests.models.passes import Passes

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def vlm() -> SafeVLM:
    return load_safe_vlm(open_checkpoint("tiny-safegem"))


@pytest.fixture(scope="module")
def rgb(vlm: SafeVLM) -> Any:
    shape = (vlm.preprocessing.height, vlm.preprocessing.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_two_steps_are_one_answer(vlm: SafeVLM, rgb: Any) -> None:
    wanted = vlm.answer(torch.from_numpy(rgb[None]), [QUESTION], max_new_tokens=6)[0]
    with TorchLanguageRunner(vlm) as runner:
        prefilled = runner.prefill(rgb, QUESTION)
        assert runner.classes == vlm.classes and runner.preprocessing == vlm.preprocessing
        np.testing.assert_array_equal(prefilled.exact_probs, wanted.guard_probs)
        assert runner.generate(prefilled.handle, 6) == wanted.text != ""
        with pytest.raises(InputError, match="answered already"):
            runner.generate(prefilled.handle, 6)


def test_embeddings_stand_in_for_the_picture(vlm: SafeVLM, rgb: Any) -> None:
    features = vlm.image_features(torch.from_numpy(rgb[None]))[0].numpy()
    with TorchLanguageRunner(vlm) as runner:
        seen, given = runner.prefill(rgb, QUESTION), runner.prefill(rgb, QUESTION, features)
        np.testing.assert_array_equal(seen.exact_probs, given.exact_probs)
        with Passes(vlm) as passes:
            again = runner.prefill(np.zeros_like(rgb), QUESTION, features)
        np.testing.assert_array_equal(again.exact_probs, given.exact_probs)
        assert passes.tower == 0
        assert runner.generate(seen.handle, 6) == runner.generate(given.handle, 6)


def test_bad_calls(vlm: SafeVLM, rgb: Any) -> None:
    runner = TorchLanguageRunner(vlm)
    with pytest.raises(SafeVLMError, match="not active"):
        runner.prefill(rgb, QUESTION)
    with runner:
        for wrong in (rgb[:-1], rgb.astype(np.float32), rgb[None], rgb[..., 0]):
            with pytest.raises(InputError, match="uint8 picture of"):
                runner.prefill(wrong, QUESTION)
        for embeddings in (np.zeros((1, 2, 3), np.float32), np.zeros((2, 3))):
            with pytest.raises(InputError, match="float32 T x D"):
                runner.prefill(rgb, QUESTION, embeddings)
        with pytest.raises(InputError, match="image features of shape"):
            runner.prefill(rgb, QUESTION, np.zeros((2, 3), np.float32))
        with pytest.raises(InputError, match="at least 1"):
            runner.generate(runner.prefill(rgb, QUESTION).handle, 0)
        with pytest.raises(InputError, match="another runner's"):
            runner.generate(None, 3)
    with pytest.raises(InputError, match="unknown dtype"):
        TorchLanguageRunner(vlm, dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no device 'abacus'"), TorchLanguageRunner(vlm, device="abacus"):
        pass


class SharedTower(GuardRunner):
    """The reference guard of a projector tap, giving its image embeddings, too."""

    runtime = "torch"

    def __init__(self) -> None:
        super().__init__()
        self.model = build_reference_guard(open_checkpoint("tiny-safegem")).eval()
        self.preprocessing = self.model.preprocessing

    def _activate(self) -> None:
        return None

    def _run(self, rgb: Any) -> GuardOutput:
        with torch.inference_mode():
            features = self.model.features(torch.from_numpy(rgb))
            logits = self.model.head(features.mean(dim=1))
        output = GuardOutput(probs=torch.softmax(logits, -1).numpy(), logits=logits.numpy())
        object.__setattr__(output, "embeddings", features.numpy())
        return output


@pytest.mark.parametrize(("band", "stage"), [((2, 2), "guard"), ((2, 0), "exact")])
def test_an_allowed_image_is_encoded_once_and_read_in_one_prefill(
    vlm: SafeVLM, rgb: Any, band: tuple[float, float], stage: str
) -> None:
    """Through the gate, allowed at once or after the exact verdict: the same answer as the model's own."""
    guard = SharedTower()
    policy = Policy(guard=Limits(block=band[0], allow=band[1]), exact=Limits(block=2, allow=2))
    wanted = vlm.answer(torch.from_numpy(rgb[None]), [QUESTION], max_new_tokens=5)[0]
    with Gate(Guard(guard, guard.model.classes), TorchLanguageRunner(vlm), policy) as gate, Passes(vlm) as passes:
        result = gate.ask(Image.fromarray(rgb), QUESTION, max_new_tokens=5)
    assert (result.verdict, result.stage, result.answer) == ("allow", stage, wanted.text)
    assert result.exact_probs is not None and result.probs is not None
    np.testing.assert_allclose(list(result.exact_probs.values()), wanted.guard_probs, atol=1e-6)
    np.testing.assert_allclose(list(result.probs.values()), wanted.guard_probs, atol=1e-5)
    assert (passes.tower, passes.prefills, passes.head) == (0, 1, 1)


def test_a_block_by_the_exact_verdict_decodes_nothing(vlm: SafeVLM, rgb: Any) -> None:
    policy = Policy(exact=Limits(block=0, allow=0))
    with Gate(None, TorchLanguageRunner(vlm), policy) as gate, Passes(vlm) as passes:
        result = gate.ask(Image.fromarray(rgb), QUESTION)
    assert (result.verdict, result.stage, result.answer) == ("block", "exact", None)
    assert (passes.tower, passes.prefills, passes.decodes, passes.head) == (1, 1, 0, 1)


def test_half_precision_judges_nearly_the_same(vlm: SafeVLM, rgb: Any) -> None:
    exact = vlm.guard(torch.from_numpy(rgb[None]))[0][0].numpy()
    with TorchLanguageRunner(open_checkpoint("tiny-safegem"), dtype="bfloat16") as runner:
        prefilled = runner.prefill(rgb, QUESTION)
        assert prefilled.exact_probs is not None and prefilled.exact_probs.dtype == np.float32
        assert np.abs(prefilled.exact_probs - exact).max() < 0.1
        assert isinstance(runner.generate(prefilled.handle, 3), str)


def test_the_command(tmp_path: Path, rgb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a bundle on disk to an answer, a block, and a line in the log."""
    from models.commandline import run
    from runtimes import gate_command
    from tests.runtimes.bundles import RED, picture, write_bundle

    bundle = write_bundle(tmp_path / "bundle")  # of three classes: not this checkpoint's
    path = picture(tmp_path / "red.png", RED)
    arguments = [str(path), "--bundle", str(bundle), "--question", "Why?", "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        run(gate_command.main, arguments)
    assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        run(gate_command.main, [*arguments, "--log", str(tmp_path)])
    assert ended.value.code == 2

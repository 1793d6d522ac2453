"""The torch language runner behind its contract, and behind the gate with a real guard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runtimes.gate import __main__ as gate_command
from runtimes.gate.gate import Gate
from runtimes.guard.bundle import sha256_of
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Limits, Policy
from runtimes.guard.runner import GuardOutput, GuardRunner
from runtimes.language.torch_language import TorchLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.contract.manifest import Source
from safevlm.errors import InputError, SafeVLMError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.reference import build_reference_guard
from safevlm.network.safe_vlm import SafeVLM
from safevlm.terminal.commandline import run
from tests.runtimes.bundles import guard_file_for, manifest_of, write_bundle
from tests.safevlm.checkpoint.passes import Passes

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
            with pytest.raises(InputError, match="must be uint8 of shape"):
                runner.prefill(wrong, QUESTION)
        for embeddings in (np.zeros((1, 2, 3), np.float32), np.zeros((2, 3))):
            with pytest.raises(InputError, match="float32 of shape T x D"):
                runner.prefill(rgb, QUESTION, embeddings)
        with pytest.raises(InputError, match="image features of shape"):
            runner.prefill(rgb, QUESTION, np.zeros((2, 3), np.float32))
        with pytest.raises(InputError, match="at least 1"):
            runner.generate(runner.prefill(rgb, QUESTION).handle, 0)
        with pytest.raises(InputError, match="belongs to another runner"):
            runner.generate(None, 3)
    with pytest.raises(InputError, match="unknown dtype"):
        TorchLanguageRunner(vlm, dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--device abacus: use cpu"), TorchLanguageRunner(vlm, device="abacus"):
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
    unchecked = Limits.model_construct
    policy = Policy(guard=unchecked(block=band[0], allow=band[1]), exact=unchecked(block=2, allow=2))
    wanted = vlm.answer(torch.from_numpy(rgb[None]), [QUESTION], max_new_tokens=5)[0]
    with Gate(Guard(guard, guard.model.classes), TorchLanguageRunner(vlm), policy) as gate, Passes(vlm) as passes:
        result = gate.ask(Image.fromarray(rgb), QUESTION, max_new_tokens=5)
    assert (result.verdict, result.stage, result.answer) == ("allow", stage, wanted.text), result.error
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


def write_named_bundle(folder: Path, vlm: SafeVLM) -> Path:
    """Write a bundle of the checkpoint's classes and size whose guard is unsure of every picture: no graph runs."""
    file = guard_file_for(folder, len(vlm.classes), vlm.preprocessing)
    manifest = manifest_of(
        [file],
        classes=vlm.classes,
        preprocessing=vlm.preprocessing,
        source=Source(checkpoint="tiny-safegem", sha256="0" * 64, family="gemma3", standalone=False),
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def ended_with(arguments: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        run(gate_command.main, arguments)
    return ended.value.code


def test_the_command_answers_and_blocks(
    vlm: SafeVLM, rgb: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a bundle that is not standalone: gated by the exact verdict, of the checkpoint that the bundle names."""
    bundle = write_named_bundle(tmp_path, vlm)
    image, policy, log = tmp_path / "image.png", tmp_path / "policy.json", tmp_path / "log.jsonl"
    Image.fromarray(rgb).save(image)
    arguments = [
        str(image),
        "--bundle",
        str(bundle),
        "--question",
        QUESTION,
        "--policy",
        str(policy),
        "--log",
        str(log),
    ]
    arguments += ["--max-new-tokens", "5"]
    other = min(harm for harm in vlm.classes if harm != "safe")
    policy.write_text(json.dumps({"default": "allow", "classes": {other: "block"}}))
    assert ended_with(arguments) == 0
    wanted = vlm.answer(torch.from_numpy(rgb[None]), [QUESTION], max_new_tokens=5)[0].text
    assert wanted in capsys.readouterr().out
    policy.write_text('{"exact": {"block": 0, "allow": 0}}')
    assert ended_with([*arguments, "--json", "--log-text"]) == 10
    assert json.loads(capsys.readouterr().out)["answer"] is None
    image.write_bytes(b"")
    assert ended_with(arguments) == 10
    allowed, blocked, failed = map(json.loads, log.read_text().splitlines())
    assert [line["stage"] for line in (allowed, blocked, failed)] == ["exact", "exact", "error"]
    assert "question" not in allowed and blocked["question"] == QUESTION
    assert allowed["bundle"] == sha256_of(tmp_path / "manifest.json") and allowed["probs"] is None


def test_the_command_refuses(tmp_path: Path, vlm: SafeVLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is judged: another checkpoint's bundle, a log that cannot be written, a policy with a typo."""
    others = write_bundle(tmp_path / "others")
    arguments = [str(tmp_path / "x.png"), "--question", "Why?", "--threads", "1", "--bundle"]
    assert ended_with([*arguments, str(others)]) == 2
    assert "different classes" in capsys.readouterr().err
    (tmp_path / "bundle").mkdir()
    bundle = str(write_named_bundle(tmp_path / "bundle", vlm))
    assert ended_with([*arguments, bundle, "--log", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "policy.json").write_text('{"classes": {"weapons": "allow"}}')
    assert ended_with([*arguments, bundle, "--policy", str(tmp_path / "policy.json")]) == 2
    assert "'weapons'; this guard knows" in capsys.readouterr().err

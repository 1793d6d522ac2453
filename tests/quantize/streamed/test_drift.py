"""Drift figures are those of the whole logits, and flips are told by their direction."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from quantize.streamed import drift
from quantize.streamed.drift import exact_probs, guard_drift, token_choices
from safevlm.checkpoint.checkpoint import open_checkpoint


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem"])
@pytest.mark.parametrize("part", [7, 4096])
def test_choices_in_parts_are_those_of_the_whole_vocabulary(
    name: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "VOCABULARY", part)
    checkpoint = open_checkpoint(name)
    output = "lm_head.weight" if name == "tiny-safellava" else "model.language_model.embed_tokens.weight"
    states = torch.randn(9, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = states @ checkpoint.tensors.read(output).float().T
    wanted = torch.arange(9) * 37
    chosen, nll = token_choices(checkpoint, states, wanted)
    assert torch.equal(chosen, logits.argmax(dim=1))
    assert torch.allclose(nll, F.cross_entropy(logits, wanted, reduction="none"), atol=1e-4)


def test_flips_have_a_direction() -> None:
    before = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]])
    after = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
    found = guard_drift(before, after, ["safe", "violence"])
    assert found["n"] == 4 and found["label_flips"] == 2
    assert (found["unsafe_to_safe"], found["safe_to_unsafe"]) == (1, 1)
    assert found["max_probability_difference"] == pytest.approx(0.6)
    assert found["mean_probability_difference"] == pytest.approx((0.1 + 0.4 + 0.1 + 0.6) / 4)


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem"])
def test_exact_probabilities_are_the_models_own(name: str) -> None:
    from safevlm.network.loading import load_safe_vlm

    checkpoint = open_checkpoint(name)
    vlm = load_safe_vlm(checkpoint)
    size = (vlm.preprocessing.height, vlm.preprocessing.width)
    pictures = torch.randint(0, 256, (5, *size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = exact_probs(checkpoint, pictures, grid=None, max_bytes=None)
    assert torch.allclose(found, vlm.guard(pictures)[0], atol=1e-5)

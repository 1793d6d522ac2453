"""Drift figures are those of the whole logits, and flips are told by their direction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.sets.conversations import Sample
from calibration.streaming.batches import Row
from quantize.streamed import drift
from quantize.streamed.drift import divergence, exact_probs, guard_drift, token_choices
from safevlm.checkpoint.checkpoint import open_checkpoint


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem"])
@pytest.mark.parametrize("part", [7, 4096])
def test_choices_in_parts_are_those_of_the_whole_vocabulary(
    name: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "VOCABULARY", part)
    monkeypatch.setattr(drift, "TOKENS", 4)
    checkpoint = open_checkpoint(name)
    output = "lm_head.weight" if name == "tiny-safellava" else "model.language_model.embed_tokens.weight"
    states = torch.randn(9, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = states @ checkpoint.tensors.read(output).float().T
    wanted = torch.arange(9) * 37
    chosen, nll = token_choices(checkpoint, states, wanted)
    assert torch.equal(chosen, logits.argmax(dim=1))
    assert torch.allclose(nll, F.cross_entropy(logits, wanted, reduction="none"), atol=1e-4)


@pytest.mark.parametrize("part", [7, 4096])
def test_divergences_in_one_pass_are_those_of_the_whole_table(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "VOCABULARY", part)
    monkeypatch.setattr(drift, "TOKENS", 4)
    checkpoint = open_checkpoint("tiny-safellava")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, checkpoint.hidden_size, generator=generator) * 9
    other = states + torch.randn(states.shape, generator=generator)
    output = checkpoint.tensors.read("lm_head.weight").double()
    one, two = (F.log_softmax(each.double() @ output.T, dim=1) for each in (states, other))
    expected = F.kl_div(two, one, log_target=True, reduction="none").sum(dim=1)
    assert expected.max() > 1e-3
    assert torch.allclose(divergence(checkpoint, states, other).double(), expected, rtol=1e-3, atol=1e-5)
    assert divergence(checkpoint, states, states).abs().max() <= 1e-5


def test_no_table_of_tokens_times_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as a few tokens' logits, or as the output matrix, is in memory at any time."""
    monkeypatch.setattr(drift, "VOCABULARY", 16)
    monkeypatch.setattr(drift, "TOKENS", 8)
    checkpoint = open_checkpoint("tiny-safellava")
    width = checkpoint.hidden_size
    states, other = torch.randn(40, width), torch.randn(40, width)
    with _Largest() as made:
        token_choices(checkpoint, states, torch.arange(40))
        divergence(checkpoint, states, other)
    assert made.numel == 16 * width


class _Largest(TorchDispatchMode):
    """Remember the most elements of a tensor that an operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            shared = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
            if found.untyped_storage().data_ptr() not in shared:  # no view
                self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize(("most", "others"), [(4, [20, 22, 25, 27]), (99, list(range(20, 30)))])
def test_all_tokens_of_refusals_and_some_of_other_answers_are_looked_at(
    most: int, others: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """States hold their token's number, so a token that is held against another's state shows."""
    monkeypatch.setattr(drift, "OTHERS", most)
    sample = Sample(kind="text", question="?", answer="", image=None, name="", where="")
    answers = [(range(10, 13), True), (range(20, 30), False), (range(30, 34), True)]
    rows = [Row(sample=sample, ids=(1, 2, *ids), answer_length=len(ids), refused=refused) for ids, refused in answers]
    batches: Any = [SimpleNamespace(rows=[row]) for row in rows]
    states: Any = [torch.tensor([*row.ids[1:], 0.0]).reshape(1, -1, 1) for row in rows]
    hidden: Any = _States(states)

    def choices(_: Any, states_MD: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert states_MD.flatten().tolist() == wanted.tolist() == [10, 11, 12, *others, 30, 31, 32, 33]
        return wanted.where(wanted != 31, 0), wanted.float()

    monkeypatch.setattr(drift, "token_choices", choices)
    found = drift.answer_drift(open_checkpoint("tiny-safellava"), batches, hidden)
    assert found["refusals"]["tokens"] == 7 and found["refusals"]["same_token"] == pytest.approx(6 / 7)
    assert found["others"] == {"tokens": len(others), "same_token": 1.0, "nll": sum(others) / len(others)}


class _States(list[Any]):
    """Hidden states by batch, as the stream keeps them."""

    @property
    def shapes(self) -> list[Any]:
        return [each.shape for each in self]


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

"""Token weights by gradient are those of the whole model's backward pass, and keep what was promised of fixed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.answers import Answer
from calibration.sets.conversations import built_in_conversations
from calibration.sets.mix import Mix, choose
from calibration.streaming import gradients
from calibration.streaming.batches import Batch, Row, TokenWeights, embed_batches, lay_out, pack_rows
from calibration.streaming.gradients import UNIFORM, gradient_weights, loss_gradient
from calibration.streaming.sequential import Activations, LayerStream
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.prompt_tokens import IMAGE

REFUSAL = "I'm sorry, but I can't assist with that request."


def measured(
    name: str, folder: Path, max_bytes: int = 2**30, spoil: float = 1.0
) -> tuple[list[Batch], list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Return batches, their embeddings, fixed weights, and what the gradient made of them layer by layer."""
    samples = choose(built_in_conversations(), Mix(samples=6))
    answers = [Answer(text=REFUSAL), Answer(text="A red square."), None, *[Answer(text="Blue.")] * 3]
    packed: list[tuple[Row, ...]] = []

    def token_ids(model: object) -> list[int]:
        packed.extend(pack_rows(lay_out(model, samples, answers), 300))  # type: ignore[arg-type]
        return [token for rows in packed for row in rows for token in row.ids]

    checkpoint = open_checkpoint(name)
    stream = LayerStream(checkpoint, token_ids=token_ids)
    shapes = [(len(rows), max(len(row.ids) for row in rows), checkpoint.hidden_size) for rows in packed]
    with Activations(shapes, torch.float32, None) as hidden:
        batches = embed_batches(stream, packed, hidden)
        fixed = [TokenWeights(refusal_weight=2.0).of_batch(batch) for batch in batches]
        embeddings = [hidden[number].clone() for number in range(len(batches))]
        hidden[0].mul_(spoil)
        found = gradient_weights(stream, batches, hidden, fixed, max_bytes=max_bytes, folder=folder)
        assert spoil != 1 or all(torch.equal(hidden[number], each) for number, each in enumerate(embeddings))
    return batches, embeddings, fixed, found


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safeqwen", "tiny-safegem"])
def test_they_are_those_of_the_whole_models_backward_pass(name: str, tmp_path: Path) -> None:
    batches, embeddings, fixed, found = measured(name, tmp_path)
    vlm = load_safe_vlm(open_checkpoint(name))
    layers = vlm.core.language_model.layers
    assert len(found) == len(layers)
    states: list[Tensor] = []

    def watch(_: object, given: tuple[Tensor, ...], output: Tensor) -> None:
        states.append(output)
        output.retain_grad()

    for layer in layers:
        layer.register_forward_hook(watch)
    for number, batch in enumerate(batches):
        states.clear()
        inputs = embeddings[number].clone().requires_grad_()
        prefill = batch.prefill
        last = vlm.language_forward(inputs, prefill.masks, prefill.position_ids)
        loss = torch.zeros(())
        for place, row in enumerate(batch.rows):
            looked_at = row.answer_length or len(row.ids) - 1
            for back in range(looked_at, 0, -1):
                if row.ids[-back] != IMAGE:
                    logits = vlm.token_logits(last[place, -back - 1])
                    loss = loss + F.cross_entropy(logits, torch.tensor(row.ids[-back]))
        loss.backward()
        norms = [each.grad.square().sum(dim=-1) for each in (inputs, *states) if each.grad is not None]
        real, image = prefill.masks["attention_mask"].bool(), prefill.image_mask
        first = real & (real.cumsum(dim=1) == 1)
        for index in range(len(layers)):
            weights, before = found[index][number].view(real.shape), fixed[number].view(real.shape)
            assert torch.equal(weights[first], before[first]) and bool((weights[~real] == 0).all())
            for place in range(len(real)):
                for group in (image[place], real[place] & ~image[place] & ~first[place]):
                    if not bool(group.any()):
                        continue
                    was, now = before[place, group], weights[place, group]
                    assert float(now.sum()) == pytest.approx(float(was.sum()), rel=1e-4), "sums stay in each row"
                    shares = [was * norms[at][place, group] for at in (index, index + 1)]
                    even = [each / each.sum() if float(each.sum()) > 0 else was / was.sum() for each in shares]
                    wanted = UNIFORM * was + (1 - UNIFORM) * was.sum() * (even[0] + even[1]) / 2
                    assert torch.allclose(now, wanted, rtol=2e-2, atol=2e-3 * float(was.max()))
    assert max(float((each / fixed[0].clamp(min=1e-9)).max()) for each in (row[0] for row in found)) > 1.5


def test_states_in_a_file_change_nothing_and_bad_gradients_are_named(tmp_path: Path) -> None:
    whole, on_disk = (measured("tiny-safegem", tmp_path, max_bytes)[3] for max_bytes in (2**30, 0))
    assert all(
        torch.equal(a, b) for one, two in zip(whole, on_disk, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"layer \d: the gradient of the answers' loss holds NaN"):
        measured("tiny-safegem", tmp_path, spoil=float("nan"))


@pytest.mark.parametrize("name", ["tiny-safellava", "tiny-safegem"])
@pytest.mark.parametrize("part", [7, 4096])
def test_the_losss_gradient_in_parts_is_autograds(name: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "VOCABULARY", part)
    checkpoint = open_checkpoint(name)
    output = "lm_head.weight" if name == "tiny-safellava" else "model.language_model.embed_tokens.weight"
    states = torch.randn(5, checkpoint.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = torch.arange(5) * 31
    F.cross_entropy(states @ checkpoint.tensors.read(output).float().T, wanted, reduction="sum").backward()
    assert states.grad is not None
    assert torch.allclose(loss_gradient(checkpoint, states.detach(), wanted), states.grad, atol=1e-4)

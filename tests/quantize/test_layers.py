"""Layers are rounded one by one, on the inputs that the rounded model before them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.sequential import Activations, LayerStream
from models.checkpoint import open_checkpoint
from models.errors import InputError
from models.safe_vlm import Prefill, SafeVLM, load_safe_vlm
from quantize.grid import Scheme
from quantize.layers import SHARED_INPUTS, quantize_layers, token_weights
from quantize.solver import Solved, solve
from tests.models.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

SCHEME = Scheme(bits=3, group_size=32)


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def prefills(model: SafeVLM, written: Written) -> list[Prefill]:
    """Return two batches of three questions: of different lengths, so with padding."""
    features, ids = model.image_features(written.images(6)), [model.prompt_ids(question) for question in QUESTIONS]
    return [model.assemble(ids, features[rows], SIZE[written.family]) for rows in (slice(0, 3), slice(3, 6))]


def quantized(written: Written, weights: Any = None) -> tuple[dict[str, Solved], list[Tensor], list[Prefill]]:
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    stream = LayerStream(
        checkpoint,
        grid=SIZE[written.family],
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    batches = prefills(stream.skeleton, written)
    found: dict[str, Solved] = {}
    with Activations([(*batch.inputs_embeds.shape,) for batch in batches], torch.float32, None) as hidden:  # type: ignore[misc]
        for number, batch in enumerate(batches):
            hidden[number].copy_(batch.inputs_embeds)
        chosen = None if weights is None else [weights(batch) for batch in batches]
        quantize_layers(
            stream, batches, hidden, SCHEME, weights=chosen, write=lambda name, solved: found.update({name: solved})
        )
        return found, [hidden[number].clone() for number in range(len(batches))], batches


def test_each_linear_is_solved_on_what_the_rounded_model_gives_it(written: Written) -> None:
    """The whole model, rounded as was found, has the same inputs at every linear and the same end."""
    found, states, _ = quantized(written, token_weights)
    vlm = load_safe_vlm(open_checkpoint(str(written.folder), tap="language_model"), grid=SIZE[written.family])
    prefix = "model.language_model."
    linears = dict(vlm.core.language_model.named_modules())
    assert set(found) == {
        f"{prefix}layers.{index}.{name}" for index in range(2) for names in SHARED_INPUTS for name in names
    }
    whole = {name: linears[name.removeprefix(prefix)].weight.data.clone() for name in found}
    for name, solved in found.items():
        linears[name.removeprefix(prefix)].weight.data = solved.weight()
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    for name in found:
        linears[name.removeprefix(prefix)].register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0])
        )
    batches = prefills(vlm, written)
    with torch.no_grad():
        for batch, expected in zip(batches, states, strict=True):
            last = vlm.language_forward(batch.inputs_embeds, batch.masks, batch.position_ids)
            real = batch.masks["attention_mask"].bool()
            assert (last[real] - expected[real]).abs().max() <= 1e-4 * expected[real].abs().max()
    for name in found:
        tokens = torch.cat([each.flatten(0, 1) for each in seen[name]])
        weight = torch.cat([token_weights(batch) for batch in batches])
        moments = (tokens * weight.unsqueeze(1)).T @ tokens / weight.sum()
        (again,) = solve([whole[name]], moments, SCHEME)
        assert again.loss == pytest.approx(found[name].loss, rel=2e-2), name
        assert again.rtn_loss == pytest.approx(found[name].rtn_loss, rel=1e-3)
        assert found[name].loss < found[name].rtn_loss


def test_a_picture_does_not_drown_its_question(written: Written) -> None:
    vlm = load_safe_vlm(open_checkpoint(str(written.folder), tap="language_model"), grid=SIZE[written.family])
    (batch, _) = prefills(vlm, written)
    for share in (0.1, 0.5):
        weights = token_weights(batch, share).view(batch.image_mask.shape)
        real = batch.masks["attention_mask"].bool()
        assert bool((weights[~real] == 0).all()) and bool((weights[real & ~batch.image_mask] == 1).all())
        for row, image in zip(weights, batch.image_mask, strict=True):
            of_image = float(row[image].sum() / row.sum())
            assert of_image <= share + 1e-6
            assert of_image == pytest.approx(share) or bool((row[image] == 1).all())
    with pytest.raises(InputError, match="--image-share 1"):
        token_weights(batch, 1)


def test_bad_widths_and_activations_are_named(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SCHEME", Scheme(group_size=112))
    with pytest.raises(InputError, match=r"not divide the 128 input columns of model.language_model.layers.0.self"):
        quantized(written)
    monkeypatch.setattr(f"{__name__}.SCHEME", Scheme(group_size=32))
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj: activations hold NaN"):
        quantized(written, lambda batch: token_weights(batch) * torch.nan)

"""Layers are rounded one by one, on the inputs that the rounded model before them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.streaming.batches import TokenWeights
from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Scheme
from quantize.methods.solver import solve
from quantize.streamed.layers import LINEARS, Rounded, round_layers
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import GPTQ_PARTS, dequantized
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import Prefill, SafeVLM
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

SCHEME = Scheme(bits=3, group_size=32)


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def prefills(model: SafeVLM, written: Written) -> list[Prefill]:
    """Return two batches of three questions: of different lengths, so with padding."""
    features, ids = model.image_features(written.images(6)), [model.prompt_ids(question) for question in QUESTIONS]
    return [model.assemble(ids, features[rows], SIZE[written.family]) for rows in (slice(0, 3), slice(3, 6))]


def quantized(written: Written, weights: Any = None) -> tuple[dict[str, Rounded], list[Tensor]]:
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    stream = LayerStream(
        checkpoint,
        grid=SIZE[written.family],
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    batches = prefills(stream.skeleton, written)
    found: dict[str, Rounded] = {}
    with Activations([(*batch.inputs_embeds.shape,) for batch in batches], torch.float32, None) as hidden:  # type: ignore[misc]
        for number, batch in enumerate(batches):
            hidden[number].copy_(batch.inputs_embeds)
        round_layers(
            stream,
            batches,
            hidden,
            Gptq(scheme_of=lambda _: SCHEME),
            weights=None if weights is None else [weights(batch) for batch in batches],
            write=lambda index, rounded: found.update({f"model.language_model.layers.{index}.": rounded}),
        )
        return found, [hidden[number].clone() for number in range(len(batches))]


def test_each_linear_is_solved_on_what_the_rounded_model_gives_it(written: Written) -> None:
    """The whole model, rounded as was found, has the same inputs at every linear and the same end."""
    found, states = quantized(written, TokenWeights().of)
    vlm = load_safe_vlm(open_checkpoint(str(written.folder), tap="language_model"), grid=SIZE[written.family])
    prefix = "model.language_model."
    modules = dict(vlm.core.language_model.named_modules())
    assert list(found) == [f"{prefix}layers.{index}." for index in range(2)]
    linears: dict[str, Any] = {}
    whole: dict[str, Tensor] = {}
    for layer, rounded in found.items():
        assert [row["linear"] for row in rounded.report] == list(LINEARS)
        for name, parameter in modules[layer.removeprefix(prefix)[:-1]].named_parameters():
            if name.removesuffix(".weight") not in LINEARS:
                assert torch.equal(rounded.tensors[name], parameter.data.to(rounded.tensors[name].dtype))
                parameter.data = rounded.tensors[name].float()
        for name in LINEARS:
            linears[layer + name] = modules[(layer + name).removeprefix(prefix)]
            whole[layer + name] = linears[layer + name].weight.data.clone()
            parts = {part: rounded.tensors[f"{name}.{part}"] for part in GPTQ_PARTS}
            linears[layer + name].weight.data = dequantized(parts)
    seen: dict[str, list[Tensor]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0]))
    batches = prefills(vlm, written)
    with torch.no_grad():
        for batch, expected in zip(batches, states, strict=True):
            last = vlm.language_forward(batch.inputs_embeds, batch.masks, batch.position_ids)
            real = batch.masks["attention_mask"].bool()
            assert (last[real] - expected[real]).abs().max() <= 1e-4 * expected[real].abs().max()
    for layer, rounded in found.items():
        for row in rounded.report:
            name = layer + row["linear"]
            tokens = torch.cat([each.flatten(0, 1) for each in seen[name]])
            weight = torch.cat([TokenWeights().of(batch) for batch in batches])
            moments = (tokens * weight.unsqueeze(1)).T @ tokens / weight.sum()
            (again,) = solve([whole[name]], moments, SCHEME)
            assert again.loss == pytest.approx(row["loss"], rel=2e-2), name
            assert again.rtn_loss == pytest.approx(row["rtn_loss"], rel=1e-3)
            assert row["loss"] < row["rtn_loss"] and row["kept"] == "gptq"
            error = whole[name] - linears[name].weight.data
            outputs, errors = (
                (each * weight.unsqueeze(1).sqrt()) for each in (tokens @ whole[name].T, tokens @ error.T)
            )
            assert row["relative_error"] == pytest.approx(float(errors.norm() / outputs.norm()), rel=0.2)


def test_bad_widths_and_activations_are_named(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.SCHEME", Scheme(group_size=112))
    with pytest.raises(InputError, match=r"not divide the 128 input columns of model.language_model.layers.0.self"):
        quantized(written)
    monkeypatch.setattr(f"{__name__}.SCHEME", Scheme(group_size=32))
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj: activations hold NaN"):
        quantized(written, lambda batch: TokenWeights().of(batch) * torch.nan)

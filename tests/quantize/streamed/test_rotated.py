"""A rotated checkpoint computes the same; its artifact, too, and the guard is held to 1e-5."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration.streaming.sequential import LayerStream
from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods.grid import Scheme
from quantize.methods.rotation import ROTATIONS, Rotate, orthogonal
from quantize.methods.settings import Plan, Progress
from quantize.streamed import rotated as rotated_module
from quantize.streamed import rotation_check
from quantize.streamed.layers import linear_names
from quantize.streamed.rotated import RotatedTensors, rotated
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.family import TapSource
from safevlm.checkpoint.hub import TINY_FOLDER
from safevlm.checkpoint.weights.shards import GUARD_FILE
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.reference import build_reference_guard, guard_sha256
from tests.quantize.streamed.test_compress import FEW, content, run

MODELS = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")
POSSIBLE = [(model, rotate) for model in MODELS for rotate in ROTATIONS[1:] if model != MODELS[2] or rotate == "values"]
TAPS: tuple[TapSource, ...] = get_args(TapSource)


def pictures(checkpoint: Checkpoint) -> Tensor:
    contract = load_safe_vlm(checkpoint).preprocessing
    shape = (2, contract.height, contract.width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def computed(checkpoint: Checkpoint, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of a question about images, and the guard's probabilities of these."""
    vlm = load_safe_vlm(checkpoint)
    prefill = vlm.embed(rgb, ["What is this?"] * len(rgb))
    hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
    return vlm.token_logits(hidden), vlm.guard(rgb)[0]


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize(("model", "rotate"), POSSIBLE)
def test_logits_and_guard_are_those_of_the_checkpoint(model: str, rotate: Rotate, tap: TapSource) -> None:
    source = open_checkpoint(model, tap=tap)
    turned = rotated(source, rotate)
    rgb = pictures(source)
    (logits, probs), (after, guarded) = computed(source, rgb), computed(turned, rgb)
    assert (after - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert (guarded - probs).abs().max() <= 1e-5
    if tap == "projector":
        with torch.no_grad():
            assert (build_reference_guard(turned)(rgb)[0] - probs).abs().max() <= 1e-5
    names = [f"{name}.weight" for _, linear, name in linear_names(source) if linear in changed_linears(rotate)]
    assert all(not torch.allclose(turned.tensors.read(name), source.tensors.read(name).float()) for name in names)


def changed_linears(rotate: Rotate) -> set[str]:
    values = {"self_attn.v_proj", "self_attn.o_proj"}
    return values if rotate == "values" else {name for _, name, _ in linear_names(open_checkpoint(MODELS[0]))}


def test_without_a_rotation_the_checkpoint_is_itself() -> None:
    source = open_checkpoint(MODELS[0])
    assert rotated(source, "none") is source


def test_a_norm_s_weights_go_into_the_linears_behind_it() -> None:
    source = open_checkpoint(MODELS[0])
    turned = rotated(source, "residual").tensors
    norms = [name for name in turned.names() if name.startswith("model.language_model.") and "norm" in name]
    assert len(norms) > 2
    for name in norms:
        assert torch.equal(turned.read(name).float(), torch.ones(turned.shape(name)))
        assert turned.dtype(name) == source.tensors.dtype(name)
    width = source.hidden_size
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    norm = source.tensors.read("model.language_model.layers.1.post_attention_layernorm.weight").float()
    expected = orthogonal(width, rotated_module.SEED).turn(source.tensors.read(name).float() * norm)
    assert torch.equal(turned.read(name), expected) and turned.dtype(name) == "F32"


@pytest.mark.parametrize("rotate", ROTATIONS[1:])
def test_rows_are_those_of_the_whole(rotate: Rotate) -> None:
    tensors = rotated(open_checkpoint("tiny-safeqwen"), rotate).tensors
    assert isinstance(tensors, RotatedTensors)
    for name in tensors.turned_names():
        whole = tensors.read(name)
        assert whole.shape == tensors.shape(name)
        assert torch.allclose(torch.cat([*tensors.pieces(name, 7)]), whole, atol=1e-6)
        if whole.ndim == 2:
            assert torch.allclose(tensors.read_rows(name, 1, 3), whole[1:3], atol=1e-6)


def test_only_one_layer_is_read_at_a_time() -> None:
    turned = rotated(open_checkpoint(MODELS[0]), "both")
    before = turned.tensors.bytes_read
    stream = LayerStream(turned, token_ids=lambda _: [1, 2])
    began = turned.tensors.bytes_read - before
    stream.load_layer(0)
    prefix = "model.language_model.layers."
    read = {name for name in turned.tensors.read_names if name.startswith(prefix)}
    assert began and all(name.startswith(f"{prefix}0.") for name in read)


def tied(folder: Path) -> Checkpoint:
    """Write a tiny checkpoint whose output embedding is the input embedding."""
    folder.mkdir()
    for path in (TINY_FOLDER / "tiny-safellava").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    output = [name for name in tensors if name.endswith("lm_head.weight")]
    save_file({name: value for name, value in tensors.items() if name not in output}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(str(folder))


def test_a_tied_output_embedding_becomes_one_of_its_own(tmp_path: Path) -> None:
    source = tied(tmp_path / "tied")
    rgb = pictures(source)
    turned = rotated(source, "residual")
    assert "lm_head.weight" in turned.tensors and "lm_head.weight" not in source.tensors
    assert len(turned.tensors) == len(source.tensors) + 1
    (logits, _), (after, _) = computed(source, rgb), computed(turned, rgb)
    assert (after - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert "lm_head.weight" not in rotated(source, "values").tensors
    found = run(tmp_path / "out", str(source.folder), plan_of("residual"), calibration=texts(tmp_path))
    artifact = open_checkpoint(str(found.out))
    assert "lm_head.weight" in artifact.tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config["tie_word_embeddings"] and not config["text_config"]["tie_word_embeddings"]
    drift, _ = computed(artifact, rgb)
    assert (_of_the_same_words(drift, logits) - logits).norm() < 0.25 * logits.norm()


def _of_the_same_words(logits: Tensor, like: Tensor) -> Tensor:
    """Return an artifact's logits of the words that its source has: LLaVA's may know ``<image>`` as well."""
    assert logits.shape[-1] - like.shape[-1] in (0, 1)
    return logits[..., : like.shape[-1]]


def texts(tmp_path: Path) -> Any:
    from tests.quantize.streamed.test_compress import texts as rows

    return rows(tmp_path)


def plan_of(rotate: Rotate, *, int8: bool = False) -> Any:
    def plan(checkpoint: Checkpoint) -> Plan:
        if int8:
            return int8_plan(rotate=rotate)
        return gptq_plan(checkpoint, Scheme(bits=4, group_size=32), rotate=rotate)

    return plan


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("model", "rotate"), [("tiny-safellava", "both"), ("tiny-safeqwen", "residual"), POSSIBLE[-1]])
def test_an_artifact_computes_what_the_checkpoint_does(model: str, rotate: Rotate, int8: bool, tmp_path: Path) -> None:
    found = run(tmp_path / "out", model, plan_of(rotate, int8=int8))
    source, artifact = open_checkpoint(model), open_checkpoint(str(found.out))
    rgb = pictures(source)
    (logits, _), (after, _) = computed(source, rgb), computed(artifact, rgb)
    assert 1e-5 < float((_of_the_same_words(after, logits) - logits).norm() / logits.norm()) < 0.25
    assert found.record["rotation"]["rotate"] == rotate
    assert found.record["rotation"]["guard_difference"] <= 1e-5 and found.record["rotation"]["guard_images"] == 4
    assert found.record["source"]["guard_sha256"] == guard_sha256(source)
    assert (guard_sha256(artifact) == guard_sha256(source)) == (rotate == "values")
    assert found.record["guard"]["n"] == 4
    stored = {**load_file(tmp_path / "out" / "model.safetensors"), **load_file(tmp_path / "out" / GUARD_FILE)}
    exact = {name for name, value in stored.items() if value.dtype == torch.float32 and "scale" not in name}
    assert (len(exact) == 3) == (rotate != "values") and (not exact) == (rotate == "values"), "projection and head"


def test_an_artifact_s_guard_on_the_projector_is_held_to_1e_5(tmp_path: Path) -> None:
    source = replace(open_checkpoint("tiny-safellava", tap="projector"))
    from quantize.streamed.compress import compress
    from tests.quantize.streamed.test_compress import QUICK, built_in

    compress(source, tmp_path / "out", plan_of("both")(source), FEW, QUICK, Progress(), built_in("tiny-safellava"))
    artifact = open_checkpoint(str(tmp_path / "out"))
    assert artifact.tap.source == "projector"
    rgb = pictures(source)
    with torch.no_grad():
        before, after = (build_reference_guard(each)(rgb)[0] for each in (source, artifact))
    assert (before - after).abs().max() <= 1e-5


def test_a_run_that_ends_goes_on_with_the_same_rotation_alone(tmp_path: Path) -> None:
    plan = plan_of("both")
    whole = run(tmp_path / "whole", "tiny-safellava", plan)
    assert run(tmp_path / "out", "tiny-safellava", plan, layers=2).out is None
    with pytest.raises(InputError, match=r"other settings \(rotate; rotate was"):
        run(tmp_path / "out", "tiny-safellava", plan_of("values"))
    again = run(tmp_path / "out", "tiny-safellava", plan)
    assert whole.out is not None and again.out is not None and content(again.out) == content(whole.out)
    assert again.record["rotation"] == whole.record["rotation"]


def test_what_moves_the_guard_or_is_not_allowed_is_refused_before_any_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="--rotate both: SafeGem has norms"):
        run(tmp_path / "gem", "tiny-safegem", plan_of("both"))
    monkeypatch.setattr(rotation_check, "GUARD_TOLERANCE", 0.0)
    with pytest.raises(
        InputError, match=r"--rotate moves a probability of tiny-safellava's guard by \S+; at most 0 is"
    ):
        run(tmp_path / "out", "tiny-safellava", plan_of("both"))
    assert not [*tmp_path.glob(".*/layer*")] and not (tmp_path / "out").exists()

"""Streaming a language model layer by layer gives what the whole model gives, one layer in memory at a time."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from calibration.streaming.sequential import Activations, LayerStream
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import StorageError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import Prefill, SafeVLM
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

FAMILIES = (("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf"))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda pair: pair[0])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def stream_of(written: Written, dtype: torch.dtype = torch.float32) -> LayerStream:
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    return LayerStream(checkpoint, grid=SIZE[written.family], dtype=dtype, token_ids=ids_of)


def ids_of(model: SafeVLM) -> list[int]:
    return sorted({token for question in QUESTIONS for token in model.prompt_ids(question)})


def prefills(model: SafeVLM, written: Written) -> list[Prefill]:
    """Return two batches: three questions of different lengths, so with padding, and one alone."""
    features = model.image_features(written.images(4))
    size = SIZE[written.family]
    questions = [model.prompt_ids(question) for question in QUESTIONS]
    return [
        model.assemble(questions, features[:3], size),
        model.assemble([questions[1]], features[3:], size),
    ]


def whole(written: Written) -> tuple[list[Prefill], list[list[Tensor]]]:
    """Return, of each batch, what goes into every layer of the whole model, and its last hidden state."""
    checkpoint = open_checkpoint(str(written.folder), tap="language_model")
    vlm = load_safe_vlm(checkpoint, grid=SIZE[written.family])
    seen: list[list[Tensor]] = []
    batches = prefills(vlm, written)
    for prefill in batches:
        states: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _layer, given, states=states: states.append(given[0].clone()))
            for layer in vlm.core.language_model.layers
        ]
        with torch.inference_mode():
            last = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids)
        for hook in hooks:
            hook.remove()
        seen.append([*states, last])
    return batches, seen


def start(stream: LayerStream, written: Written, limit: int | None = None) -> tuple[list[Prefill], Activations]:
    batches = prefills(stream.skeleton, written)
    shapes = [(*prefill.inputs_embeds.shape,) for prefill in batches]
    hidden = Activations(shapes, stream.dtype, limit)  # type: ignore[arg-type]
    for number, prefill in enumerate(batches):
        hidden[number].copy_(prefill.inputs_embeds)
    return batches, hidden


def real(prefill: Prefill, states: Tensor, lengths: list[int]) -> Tensor:
    """Return the rows of real tokens: padding is on the left and means nothing."""
    return torch.cat([row[-length:] for row, length in zip(states, lengths, strict=True)])


def test_every_layer_sees_what_it_sees_in_the_whole_model(written: Written) -> None:
    expected_batches, expected = whole(written)
    stream = stream_of(written)
    batches, hidden = start(stream, written)
    ids = [len(stream.skeleton.prompt_ids(question)) for question in QUESTIONS]
    lengths = [ids, [ids[1]]]
    seen: dict[int, list[Tensor]] = {}
    with hidden:
        for index, layer in stream.layers():
            seen[index] = [hidden[number].clone() for number in range(len(batches))]
            stream.advance(index, layer, batches, hidden)
        stream.norm(hidden)
        last = [hidden[number].clone() for number in range(len(batches))]
    assert list(seen) == list(range(len(stream)))
    for number, prefill in enumerate(expected_batches):
        for index, states in enumerate([*(seen[index][number] for index in seen), last[number]]):
            found = real(prefill, states, lengths[number])
            wanted = real(prefill, expected[number][index], lengths[number])
            assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()), (number, index)


def test_a_layer_runs_as_it_is_left(written: Written) -> None:
    stream = stream_of(written)
    outcomes = []
    for change in (False, True, False):
        batches, hidden = start(stream, written)
        with hidden:
            for index, layer in stream.layers():
                if change:
                    cast(Any, layer).mlp.down_proj.weight.data.zero_()
                stream.advance(index, layer, batches, hidden)
            outcomes.append(hidden[0].clone())
    assert torch.equal(outcomes[0], outcomes[2]), "the same bytes each time"
    assert not torch.allclose(outcomes[0], outcomes[1])


def test_a_shorter_way_to_a_layer_s_output_is_taken(written: Written) -> None:
    stream = stream_of(written)
    batches, hidden = start(stream, written)
    with hidden:
        for index, layer in stream.layers(1):
            stream.advance(index, layer, batches, hidden, lambda number: torch.full_like(hidden[number], number))
        assert all(bool((hidden[number] == number).all()) for number in range(len(batches)))


def test_one_layer_has_weights_at_a_time_whoever_holds_the_others(written: Written) -> None:
    stream = stream_of(written)
    held: list[nn.Module] = []
    for _, layer in stream.layers():
        assert all(parameter.is_meta for earlier in held for parameter in earlier.parameters())
        assert not any(parameter.is_meta for parameter in layer.parameters())
        held.append(layer)
    assert len(held) == len(stream) == 2
    kept = {name.split(".")[0] for name, p in stream.skeleton.core.language_model.named_parameters() if p.numel()}
    assert "layers" not in kept


def test_states_in_a_file_are_the_same_and_leave_nothing_behind(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stream = stream_of(written)
    found = []
    for limit in (None, 0):
        batches, hidden = start(stream, written, limit)
        assert hidden.on_disk == (limit == 0)
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        with hidden:
            stream.run(batches, hidden)
            found.append(hidden[0].clone())
        assert list(tmp_path.iterdir()) == []
    assert torch.equal(*found)
    _, hidden = start(stream, written, 0)
    with pytest.raises(RuntimeError, match="killed"), hidden:
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_near(written: Written) -> None:
    outcomes = []
    for dtype in (torch.float32, torch.bfloat16):
        stream = stream_of(written, dtype)
        batches, hidden = start(stream, written)
        with hidden:
            stream.run(batches, hidden)
            assert hidden[1].dtype == dtype
            outcomes.append(hidden[1].float())
    error = (outcomes[0] - outcomes[1]).norm() / outcomes[0].norm()
    assert 0 < error < 0.05


def test_hidden_states_that_do_not_fit_on_the_disk_are_refused_before_they_are_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"the disk is full.*TMPDIR"):
        Activations([(4, 8, 16)], torch.float32, 0, tmp_path)


def test_what_makes_prompts_can_be_let_go_of_before_layers_run(written: Written) -> None:
    outcomes = []
    for forget in (False, True):
        stream = stream_of(written)
        batches, hidden = start(stream, written)
        if forget:
            stream.forget_vision()
            assert stream.skeleton.tokenizer is None
            names = [name for name, _ in stream.skeleton.named_parameters()]
            assert not [name for name in names if "vision" in name or "visual" in name or "projector" in name]
        with hidden:
            stream.run(batches, hidden)
            outcomes.append(hidden[0].clone())
    assert torch.equal(*outcomes)

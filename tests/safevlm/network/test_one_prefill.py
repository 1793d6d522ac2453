"""The exact guard falls out of the one prefill that an answer needs: same verdict, no second pass, no more memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from calibration.holisafe_mini.scene import draw, sample_scene, scene_rng
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import IMAGE, SafeVLM
from tests.safevlm.checkpoint.passes import Passes
from tests.safevlm.checkpoint.random_checkpoints import LAYOUTS, QUESTIONS, SIZE, write_checkpoint

TINY = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")


@pytest.fixture(
    scope="module", params=[*TINY, *LAYOUTS], ids=lambda param: "-".join(param) if param in LAYOUTS else param
)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SafeVLM:
    """A trained tiny checkpoint, or a random one, tapped behind its language model."""
    if request.param in TINY:
        return load_safe_vlm(open_checkpoint(request.param))
    family, layout = request.param
    folder = write_checkpoint(family, layout, tmp_path_factory.mktemp(family)).folder
    grid = SIZE[family] if family == "qwen2_5_vl" else None
    return load_safe_vlm(open_checkpoint(str(folder), tap="language_model"), grid=grid)


def pictures(vlm: SafeVLM, count: int) -> Tensor:
    """Return drawn pictures, each of another class; in the tiny world that is another verdict."""
    drawn = [draw(sample_scene(scene_rng("test", label), label)) for label in range(count)]
    return torch.from_numpy(np.stack([vlm.preprocessing.apply(picture.convert("RGB")) for picture in drawn]))


def all_hidden_states(vlm: SafeVLM, image: Tensor, question: str) -> Tensor:
    """Return the guard's C probabilities from transformers' own forward on ids and pixels, float32."""
    model: Any = vlm.model
    ids = torch.tensor([vlm.prompt_ids(question)])
    mask = ids == IMAGE
    unused = next(token for token in range(model.config.text_config.vocab_size) if token not in ids)
    size, config = vlm.preprocessing, model.config
    pixels: dict[str, Any] = {"pixel_values": torch.from_numpy(size.normalise(image.numpy()))}
    if config.model_type == "qwen2_5_vl":
        processor = Qwen2VLImageProcessorPil(image_mean=size.mean, image_std=size.std, do_resize=False)
        pixels = {**processor([image[0].numpy()], return_tensors="pt"), "mm_token_type_ids": mask.int()}
    elif config.model_type == "gemma3":
        pixels["token_type_ids"] = mask.int()
    stated = config.image_token_id
    try:
        config.image_token_id = unused  # not every vocabulary has one
        with torch.no_grad():
            output = model(input_ids=ids.masked_fill(mask, unused), output_hidden_states=True, **pixels)
            tapped = output.hidden_states[-1][mask]
            if vlm.tap_source == "projector":
                tapped = torch.cat(tuple(model.get_image_features(pixels["pixel_values"]).pooler_output))
            mlp: Any = vlm.head.mlp
            one, two = mlp[0], mlp[3]
            pooled = torch.nn.functional.gelu(tapped.mean(dim=0) @ one.weight.T + one.bias)
            return torch.softmax(pooled @ two.weight.T + two.bias, dim=-1)
    finally:
        config.image_token_id = stated


def test_verdicts_equal_transformers_with_all_hidden_states(vlm: SafeVLM) -> None:
    images = pictures(vlm, 3)
    probs = vlm.begin(images, QUESTIONS).guard_probs
    assert probs.dtype == np.float32 and np.ptp(probs, axis=0).max() > 1e-3, "equal verdicts would hide a mistake"
    wanted = torch.stack([all_hidden_states(vlm, images[i : i + 1], QUESTIONS[i]) for i in range(3)])
    assert np.abs(probs - wanted.numpy()).max() <= 1e-5


def test_the_verdict_does_not_change_with_the_question(vlm: SafeVLM) -> None:
    """Neither by its words nor by its length, nor by what stands beside it in the batch."""
    image = pictures(vlm, 1)
    alone = vlm.begin(image, ["?"]).guard_probs
    for question in (*QUESTIONS, "Why? " * 40):
        assert np.abs(vlm.begin(image, [question]).guard_probs - alone).max() <= 1e-5
    together = vlm.begin(image.expand(3, -1, -1, -1), QUESTIONS).guard_probs
    assert np.abs(together - alone).max() <= 1e-5
    assert np.abs(vlm.guard(image)[0].numpy() - alone).max() <= 1e-5


def test_forward_passes(vlm: SafeVLM) -> None:
    """One prefill, and one pass for every token after the first; with features given, no vision tower."""
    images, questions = pictures(vlm, 2), QUESTIONS[:2]
    features = vlm.image_features(images)
    answers: list[list[str]] = []
    for given in (None, features):
        with Passes(vlm) as passes:
            begun = vlm.begin(images, questions, given)
            assert (passes.tower, passes.prefills, passes.decodes, passes.head) == (int(given is None), 1, 0, 1)
            with Ids(vlm) as ids:
                answers.append(vlm.finish(begun, max_new_tokens=5))
        assert (passes.tower, passes.prefills, passes.head) == (int(given is None), 1, 1)
        assert passes.decodes == ids.chosen - 1 <= 4
    with Passes(vlm) as passes:
        answers.append([answer.text for answer in vlm.answer(images, questions, max_new_tokens=5)])
    assert (passes.tower, passes.prefills, passes.head) == (1, 1, 1)
    assert answers[0] == answers[1] == answers[2]


class Ids:
    """Count how often the output layer chose a token for every row."""

    def __init__(self, vlm: SafeVLM) -> None:
        self.chosen = 0
        model: Any = vlm.model
        self._hook = model.lm_head.register_forward_hook(self._saw)

    def _saw(self, _module: Any, _given: Any, logits: Tensor) -> None:
        assert logits.shape[1] == 1, "only the last position needs logits"
        self.chosen += 1

    def __enter__(self) -> Ids:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_features_of_another_shape_are_refused(vlm: SafeVLM) -> None:
    images = pictures(vlm, 1)
    features = vlm.image_features(images)
    for wrong in (features[:, 1:], features[..., 1:], features[0], features.expand(2, -1, -1)):
        with pytest.raises(InputError, match=r"image features of shape .* is needed"):
            vlm.begin(images, ["Why?"], wrong)
    np.testing.assert_array_equal(
        vlm.begin(None, ["Why?"], features).guard_probs, vlm.begin(images, ["Why?"], features).guard_probs
    )
    for wrong_count in (None, images.expand(2, -1, -1, -1)):
        with pytest.raises(InputError, match="one question per image"):
            vlm.begin(wrong_count, ["Why?"])


# -- memory ---------------------------------------------------------------------------------------------


def memory_of(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the most bytes of CPU tensors that a call held at once, and those that its result keeps.

    By the profiler's allocation events, so the same in every run.
    """
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events, found = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if "Allocation" in str(event.tag):
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = np.cumsum([size for _, size in sorted(found)])
    assert kept is not None
    return int(held.max()), int(held[-1])


def test_memory_is_a_plain_prefill_s(vlm: SafeVLM) -> None:
    """At its peak at most the image positions of one hidden state more; afterwards only the probabilities."""
    images, questions = pictures(vlm, 8), ["Why? " * 40] * 8
    features = vlm.image_features(images)
    begun = vlm.begin(images, questions, features)

    def plain() -> Any:
        """Prefill as an answer without any guard needs it."""
        prefill = vlm.embed(images, questions, features)
        cache = type(begun.cache)(config=vlm.core.config.get_text_config())
        hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids, cache)
        last = hidden[:, -1:].clone()
        return last, cache, prefill.masks["attention_mask"], prefill.position_ids

    peak, kept = memory_of(plain)
    guarded_peak, guarded_kept = memory_of(lambda: vlm.begin(images, questions, features))
    image_positions = features.numel() * features.element_size()
    assert 0 < peak <= guarded_peak <= peak + image_positions
    hidden = begun.last_hidden[0].numel() * begun.attention_mask.numel() * begun.last_hidden.element_size()
    assert abs(guarded_kept - kept) <= begun.guard_probs.nbytes + 4096 < hidden / 10, "no hidden state stays"

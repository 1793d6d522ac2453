"""The ways from an image to a block or an answer that ``benchmarks.speed gate`` times, in a process of their own.

Verdicts are forced by a policy's limits (block at 0, or never), so that every way runs the same course on random
weights as on a checkpoint; guard and exact verdict are computed all the same.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache

from benchmarks.shapes.random_guard import build_random_guard
from benchmarks.shapes.random_vlm import build_random_vlm
from benchmarks.shapes.shapes import find_shape
from benchmarks.speed.guard_source import write_scratch_bundle
from benchmarks.speed.peer import Subject, random_images
from runtimes.gate.gate import Gate
from runtimes.guard.bundle import open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.policy import Limits, Policy
from runtimes.language.torch_language import TorchLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.head import build_head
from safevlm.network.loading import load_safe_vlm
from safevlm.network.reference import GuardModel, build_vision
from safevlm.network.safe_vlm import Begun, SafeVLM

__all__ = ["QUESTION", "measure"]

QUESTION = "What is in the picture?"
ALWAYS = Limits(block=0, allow=0)
NEVER, BETWEEN = Limits.model_construct(block=2.0, allow=2.0), Limits.model_construct(block=2.0, allow=0.0)
"""Not checked: no policy may say so, but each way must be walked whatever the image."""
POLICIES = {
    "block": Policy(guard=ALWAYS, exact=ALWAYS),
    "unsure, block": Policy.model_construct(guard=BETWEEN, exact=ALWAYS),
    "answer": Policy.model_construct(guard=NEVER, exact=NEVER),
    "unsure, answer": Policy.model_construct(guard=BETWEEN, exact=NEVER),
}
Call = Callable[[], None]


def measure(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Answer first with what is measured, then once a round, way and course with its milliseconds.

    The ways take turns, in the opposite order every other round; the first run of each counts its passes and is not
    timed. Raises InputError for a bundle that takes images of another size.
    """
    torch.set_num_threads(request["threads"])
    subject = Subject(**request["subject"])
    vlm = _load(subject)
    with tempfile.TemporaryDirectory(prefix="safevlm-gate-") as scratch, ExitStack() as held:
        folder = request["bundle"] or scratch
        if request["bundle"] is None:
            write_scratch_bundle(_scratch_guard(subject), subject.name, ["fp32"], Path(scratch))
        bundle = open_bundle(folder, verify=request["bundle"] is not None)
        size, other = vlm.preprocessing, bundle.manifest.preprocessing
        if (size.height, size.width) != (other.height, other.width):
            raise InputError(
                f"the bundle {folder} takes images of {other.height}x{other.width} pixels, but the model "
                f"{size.height}x{size.width}. Give the bundle that was exported from this model."
            )
        runner = OnnxRuntimeRunner(bundle, threads=request["threads"])
        guard = Guard(runner, bundle.manifest.classes)
        ways = _ways(vlm, guard, request["max_new_tokens"], request["seed"], held)
        yield {
            "height": size.height,
            "width": size.width,
            "prompt_tokens": len(vlm.prompt_ids(QUESTION)),
            "language_layers": len(vlm.core.language_model.layers),
            "tap": vlm.tap_source,
            "head": "of the bundle" if request["bundle"] else _origin(subject, vlm),
        }
        passes = {key: _passes(vlm, runner, call) for key, call in ways.items()}
        for number in range(request["rounds"]):
            for way, course in list(ways)[:: 1 if number % 2 == 0 else -1]:
                times = [_timed(ways[way, course]) for _ in range(request["repeats"])]
                yield {"way": way, "course": course, "times_ms": times, "passes": passes[way, course]}


def _load(subject: Subject) -> SafeVLM:
    if not subject.random:
        return load_safe_vlm(open_checkpoint(subject.name, tap=subject.tap, revision=subject.revision))
    shape = find_shape(subject.name)
    layers = subject.layers or int(shape.language["num_hidden_layers"])
    kept = shape.shortened(min(layers, shape.layers_read))
    return build_random_vlm(kept, layers=layers, seed=subject.seed)


def _scratch_guard(subject: Subject) -> GuardModel:
    """Return a standalone guard of the subject's size; behind a language-model tap its verdicts mean nothing."""
    if subject.random:
        shape = find_shape(subject.name)
        layers = None if subject.layers is None else min(subject.layers, shape.layers_read)
        return build_random_guard(shape.shortened(layers), seed=subject.seed)
    checkpoint = open_checkpoint(subject.name, tap=subject.tap, revision=subject.revision)
    return GuardModel(build_vision(checkpoint), build_head(checkpoint), checkpoint.family, checkpoint.classes).eval()


def _origin(subject: Subject, vlm: SafeVLM) -> str:
    if not subject.random and vlm.tap_source == "projector":
        return "the checkpoint's own"
    return "a stand-in of the same size on the projector"


def _ways(vlm: SafeVLM, guard: Guard, tokens: int, seed: int, held: ExitStack) -> dict[tuple[str, str], Call]:
    """Return what is timed, by way and course."""
    rgb = random_images(vlm.preprocessing, 1, seed)
    image, picture = torch.from_numpy(rgb), Image.fromarray(rgb[0])
    ways: dict[tuple[str, str], Call] = {
        ("no guard", "answer"): lambda: _plain(vlm, image, tokens),
        ("published", "block"): lambda: _published(vlm, image),
        ("published", "answer"): lambda: (_published(vlm, image), _plain(vlm, image, tokens))[1],
    }
    for way, courses in (("exact alone", ("block", "answer")), ("gate", tuple(POLICIES))):
        for course in courses:
            chosen = guard if way == "gate" else None
            gate = held.enter_context(Gate(chosen, TorchLanguageRunner(vlm), POLICIES[course], timeout=600))
            ways[way, course] = lambda gate=gate, course=course: _ask(gate, picture, course, tokens)  # type: ignore[misc]
    return ways


def _ask(gate: Gate, picture: Image.Image, course: str, tokens: int) -> None:
    result = gate.ask(picture, QUESTION, max_new_tokens=tokens)
    verdict = "block" if course.endswith("block") else "allow"
    if result.verdict != verdict or result.stage == "error":
        raise RuntimeError(f"the gate took another course than {course}: {result.to_json_line(text=True)}")


@torch.inference_mode()
def _plain(vlm: SafeVLM, image: Tensor, tokens: int) -> None:
    """Answer without any guard."""
    prefill = vlm.embed(image, [QUESTION])
    cache = DynamicCache(config=vlm.core.config.get_text_config())
    hidden = vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids, cache)
    begun = Begun(
        guard_probs=np.zeros((1, 0), np.float32),
        last_hidden=hidden[:, -1:].clone(),
        attention_mask=prefill.masks["attention_mask"],
        last_position=prefill.position_ids[..., -1:],
        cache=cache,
    )
    vlm.finish(begun, tokens)


@torch.inference_mode()
def _published(vlm: SafeVLM, image: Tensor) -> None:
    """Judge as the published code does: a whole forward pass that keeps all hidden states and all logits."""
    prefill = vlm.embed(image, [QUESTION])
    output = vlm.core(
        inputs_embeds=prefill.inputs_embeds,
        position_ids=prefill.position_ids,
        use_cache=False,
        output_hidden_states=True,
        **prefill.masks,
    )
    vlm.token_logits(output.last_hidden_state)
    torch.softmax(vlm.guard_logits(prefill, output.hidden_states[-1]), dim=-1)


def _passes(vlm: SafeVLM, runner: OnnxRuntimeRunner, call: Call) -> dict[str, int]:
    """Run once, and count: of the standalone guard, the tower, and the language model over many and one positions."""
    counted = {"guard": 0, "vision": 0, "prefill": 0, "decode": 0}
    tower: nn.Module = getattr(vlm.core, "visual", None) or vlm.core.vision_tower

    def saw(name: str) -> None:
        counted[name] += 1

    def infer(rgb: Any, *, embeddings: bool = False) -> Any:
        saw("guard")
        return type(runner).infer(runner, rgb, embeddings=embeddings)

    hooks = [
        tower.register_forward_hook(lambda *_: saw("vision")),
        vlm.core.language_model.layers[0].register_forward_pre_hook(
            lambda _layer, given: saw("prefill" if given[0].shape[1] > 1 else "decode")
        ),
    ]
    runner.infer = infer  # type: ignore[method-assign]
    try:
        call()
    finally:
        del runner.infer
        for hook in hooks:
            hook.remove()
    return counted


def _timed(call: Call) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1000

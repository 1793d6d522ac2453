"""One ONNX file of a bundle: a graph written, compared with the torch path, timed, and described.

Shapes: n images, H × W pixels, T image tokens, D width of the language model, C classes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from export.guard.batches import BATCH, batch_size
from export.guard.bundle import data_beside
from export.guard.graph import Graph, Precision
from export.guard.latency import latency_of
from export.rewrites.attention import add_attention_function, attention_translations
from runtimes.guard.bundle import sha256_of
from safevlm.contract.manifest import GuardFile, Latency, Parity, TensorSpec
from safevlm.contract.parity import TOLERANCES, check_embeddings, check_parity
from safevlm.machine import times_ms

__all__ = ["Part", "batches", "describe_part", "write_onnx", "write_part"]

OPSET = 20
INSIDE = 2**26
"""Weights up to this many bytes stay inside the ONNX file; larger ones go into one ``.data`` file beside it, which is
written and read without a copy in memory."""
REFERENCE = "transformers' own forward pass in float32"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A file of a bundle: what it is fed with, and what the torch path answers to that.

    ``inputs`` is n × H × W × 3 uint8 (``rgb``) or n × T × D float32 (``hidden``); ``reference`` maps the outputs
    ``probs`` and ``embeddings``, as far as the file gives them, to the torch path's.
    """

    role: Literal["guard", "vision", "head"]
    precision: Precision
    outputs: tuple[str, ...]
    input_name: Literal["rgb", "hidden"]
    inputs: Array
    reference: Mapping[str, NDArray[np.float32]]

    @property
    def name(self) -> str:
        """Return the file's name in a bundle."""
        return f"{self.role}.{self.precision}.onnx"


def batches(inputs: Array) -> Iterator[Array]:
    """Yield pieces of as many images as :mod:`export.guard.batches` allows, or of that many hidden states."""
    size = BATCH if inputs.ndim != 4 else batch_size(*inputs.shape[1:3])
    for start in range(0, len(inputs), size):
        yield inputs[start : start + size]


def write_part(part: Part, graph: Graph, folder: Path) -> None:
    """Write a part's graph into ``folder``."""
    write_onnx(graph, part.inputs[:2], folder / part.name, input_name=part.input_name)


def describe_part(part: Part, folder: Path) -> list[GuardFile]:
    """Check and time the written part; return its entries in the manifest.

    Raises ParityError when it does not answer as the torch path does.
    """
    path = folder / part.name
    found, latency = _run(part, path)
    main_file = GuardFile(
        path=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        kind="onnx",
        role=part.role,
        precision=part.precision,
        inputs=(TensorSpec(name=part.input_name, shape=("N", *part.inputs.shape[1:]), dtype=str(part.inputs.dtype)),),
        outputs=tuple(
            TensorSpec(name=name, shape=("N", *found[name].shape[1:]), dtype="float32") for name in part.outputs
        ),
        parity=_parity(part, found),
        latency=latency,
    )
    return [main_file, *data_beside(path, main_file)]


def _parity(part: Part, found: Mapping[str, NDArray[np.float32]]) -> Parity:
    parity = Parity(images=len(part.inputs), reference=REFERENCE)
    tolerance = TOLERANCES[part.precision]
    if "probs" in found:
        parity = check_parity(part.reference["probs"], found["probs"], tolerance, what=part.name, reference=REFERENCE)
    if "embeddings" in found:
        delta = check_embeddings(part.reference["embeddings"], found["embeddings"], tolerance, what=part.name)
        parity = parity.model_copy(update={"max_rel_embedding_delta": delta})
    return parity


def write_onnx(
    graph: Graph, example: Array, path: Path, *, input_name: str = "rgb", fused_attention: bool = True
) -> None:
    """Export a graph with a free batch size, weights inside, or beside it when they exceed :data:`INSIDE`.

    Without ``fused_attention`` the exporter writes attention in standard operators, as it does by itself.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    if len(example) == 1:  # torch.export takes a batch of one for a constant
        example = np.concatenate([example, example])
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.from_numpy(example),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=list(graph.outputs),
            dynamic_shapes=({0: torch.export.Dim("N")},),
            custom_translation_table=attention_translations() if fused_attention else None,
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    half = any(parameter.dtype == torch.float16 for parameter in graph.parameters())
    add_attention_function(program.model, OPSET, half=half)
    program.save(str(path), external_data=weights > INSIDE)
    for value in program.model.graph.initializers.values():
        value.const_value = None  # the exporter keeps its last graph: not the weights with it


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says about itself: torchvision is not needed, copyreg's use is its own."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _run(part: Part, path: Path) -> tuple[dict[str, NDArray[np.float32]], Latency]:
    """Run a file in ONNX Runtime: all outputs for all images, latency for single ones."""
    import onnxruntime

    names = list(part.outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each float16 constant that it does not compute beforehand
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    runs = [session.run(names, {part.input_name: piece}) for piece in batches(part.inputs)]
    found = {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(names)}
    times = times_ms(lambda: session.run(names, {part.input_name: part.inputs[:1]}), most=30, seconds=5)
    (provider,) = session.get_providers()
    return found, latency_of(times, f"onnxruntime {onnxruntime.__version__} {provider}", provider=provider)

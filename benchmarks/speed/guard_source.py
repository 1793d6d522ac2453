"""The guard that ``benchmarks.speed guard`` measures: built for torch, and written as the ONNX files of its peers.

Shapes: N images, H × W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.speed.peer import PLAIN, Subject, Work, random_images
from benchmarks.speed.reference_runner import build_guard
from export.guard.bundle import write_manifest
from export.guard.graph import PRECISIONS, Graph, Precision, build_graph, build_vision_graph
from export.guard.int8_file import FLAVOURS, quantize
from export.guard.parts import write_onnx
from runtimes.guard.bundle import specs
from runtimes.guard.onnx_file import read_onnx
from safevlm.contract.manifest import GuardFile, Head, Manifest, Source, Tap
from safevlm.contract.preprocessing import Preprocessing
from safevlm.errors import InputError
from safevlm.network.pooling import pool
from safevlm.network.reference import GuardModel
from safevlm.version import VERSION

__all__ = ["prepare", "write_scratch_bundle"]

OUTPUTS = ("probs", "logits")
UNHASHED = "0" * 64
"""The scratch bundle is opened, without its hashes being checked, by the command that has just written it."""
INT8_CALIBRATION = 2
"""Images of noise that set static scales: figures of speed need no more."""


def prepare(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Write the subject's ONNX files as a bundle into ``folder``; answer once with what the guard is.

    Raises InputError when ``bundle`` (or None) takes images of another size than the subject.
    """
    guard, stored, counted = build_guard(Subject(**request["subject"]))
    size = guard.preprocessing
    if request["bundle"] is not None:
        _check_same_size(size, request["bundle"])
    answer = {
        "height": size.height,
        "width": size.width,
        "classes": len(guard.classes),
        "parameters": sum(parameter.numel() for parameter in guard.parameters()),
        "stored_bytes": stored,
        "stored_as": counted,
    }
    folder, precisions = Path(request["folder"]), request["precisions"]
    if request.get("plain"):
        write_plain_bundle(guard, request["subject"]["name"], folder / PLAIN)
    write_scratch_bundle(
        guard,
        request["subject"]["name"],
        [precision for precision in precisions if precision in PRECISIONS],
        folder,
        works=("guard", "shared", "vision") if request["embeddings"] else ("guard",),
    )
    if "int8" in precisions:
        add_int8_files(folder, random_images(size, INT8_CALIBRATION, seed=1))
    yield answer


def _check_same_size(size: Preprocessing, folder: str) -> None:
    other = Manifest.read(Path(folder)).preprocessing
    if (other.height, other.width) != (size.height, size.width):
        raise InputError(
            f"the bundle {folder} takes images of {other.height}x{other.width} pixels, but the guard measured beside "
            f"it {size.height}x{size.width}, so their times cannot be compared. Give the --model or --shape that the "
            "bundle was exported from."
        )


def write_scratch_bundle(
    guard: GuardModel,
    name: str,
    precisions: Sequence[Precision],
    folder: Path,
    *,
    works: Sequence[Work] = ("guard",),
) -> None:
    """Write ONNX files and a manifest, unhashed: for a process that opens it with ``verify=False``.

    The first file of a precision does the first of ``works``.
    """
    example = random_images(guard.preprocessing, 2, seed=0)
    files: list[GuardFile] = []
    in_order = sorted(precisions, key=PRECISIONS.index)  # fp16 last: it halves the guard's own weights
    for precision, work in itertools.product(in_order, works):
        path = folder / f"{work}.{precision}.onnx"
        graph = _graph(guard, precision, work)
        write_onnx(graph, example, path)
        files += _entries(path, precision, work)
    write_manifest(folder, _manifest(guard, name, files))


def _manifest(guard: GuardModel, name: str, files: Sequence[GuardFile]) -> Manifest:
    return Manifest(
        created="",
        tool_version=VERSION,
        source=Source(checkpoint=name, sha256=UNHASHED, family=guard.family.key),
        tap=Tap(source="projector", pooling="mean", tokens="image", learned="declared"),
        head=Head(kind="exact", reads="projector", pooling="mean", widths=guard.head.widths),
        classes=guard.classes,
        preprocessing=guard.preprocessing,
        files=tuple(files),
        default_file=files[0].path,
    )


def _entries(path: Path, precision: str, work: Work) -> list[GuardFile]:
    """Return the manifest's entries of a graph and, where there is one, of the weights beside it."""
    written = ((path, "onnx"), (path.with_name(path.name + ".data"), "onnx_data"))
    return [_entry(file, kind, precision, work) for file, kind in written if file.is_file()]


def _entry(path: Path, kind: str, precision: str, work: Work) -> GuardFile:
    """Return the manifest's entry of a file, unhashed."""
    facts = read_onnx(path) if kind == "onnx" else None
    return GuardFile.model_validate(
        {
            "path": path.name,
            "sha256": UNHASHED,
            "bytes": path.stat().st_size,
            "kind": kind,
            "precision": precision,
            "role": "vision" if work == "vision" else "guard",
            "inputs": () if facts is None else specs(facts.inputs, str(path)),
            "outputs": () if facts is None else specs(facts.outputs, str(path)),
        }
    )


def add_int8_files(folder: Path, calibration: NDArray[np.uint8]) -> None:
    """Write both INT8 flavours of the scratch bundle's float32 guard, every product but the head's quantized.

    They are for timing alone: an export judges them on images and takes back what hurts.
    """
    manifest = Manifest.read(folder)
    head_layers = len(manifest.head.widths) - 1
    files = list(manifest.files)
    for flavour in FLAVOURS:
        path = folder / f"guard.{flavour}.onnx"
        quantize(folder / "guard.fp32.onnx", path, flavour, calibration, head_layers=head_layers)
        files += _entries(path, flavour, "guard")
    write_manifest(folder, manifest.model_copy(update={"files": tuple(files)}))


def write_plain_bundle(guard: GuardModel, name: str, plain: Path) -> None:
    """Write the float32 guard as PyTorch's exporter writes it by itself: its own steps, in standard operators."""
    plain.mkdir(parents=True)
    path = plain / "guard.fp32.onnx"
    write_onnx(StepByStep(guard).eval(), random_images(guard.preprocessing, 2, seed=0), path, fused_attention=False)
    write_manifest(plain, _manifest(guard, name, _entries(path, "fp32", "guard")))


class StepByStep(Graph):
    """A guard without what this project does to its graph: the projector for each token, then the mean, then the head.

    (A checkpoint's own modules cannot be exported for every batch size, Qwen2.5-VL's not at all: the vision path is
    the one of a shared tower's file.)
    """

    outputs = OUTPUTS

    def __init__(self, guard: GuardModel) -> None:
        super().__init__()
        self.vision = build_vision_graph(guard.vision, guard.family.key)
        self.head, self.pooling = guard.head, guard.pooling

    def forward(self, rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return N × C probabilities and logits of N × H × W × 3 uint8."""
        logits = self.head(pool(self.vision(rgb), self.pooling))
        return torch.softmax(logits, dim=-1), logits


def _graph(guard: GuardModel, precision: Precision, work: Work) -> Graph:
    if work == "vision":
        return build_vision_graph(guard.vision, guard.family.key, precision)
    return build_graph(guard, precision, embeddings=work == "shared")

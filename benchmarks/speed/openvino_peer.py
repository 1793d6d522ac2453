"""OpenVINO's INT8 of a guard, made by NNCF as its documentation tells, in the peers' own environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.peer import NNCF_FILE, random_images
from safevlm.contract.manifest import Manifest
from safevlm.errors import MissingExtraError

__all__ = ["quantize"]

CALIBRATION = 2
"""Images of noise: figures of speed need no more, and ours are given as many."""


def quantize(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Write ``guard.int8.xml`` beside the float32 file of the bundle ``folder``; answer with its path and bytes.

    Raises MissingExtraError where the environment lacks OpenVINO or NNCF.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise MissingExtraError("nncf", "openvino", "OpenVINO's INT8 (make peers)") from error
    folder = Path(request["folder"])
    manifest = Manifest.read(folder)
    size = manifest.preprocessing
    model = openvino.Core().read_model(str(folder / manifest.files[0].path))
    model.reshape({0: [1, size.height, size.width, 3]})
    images = random_images(size, CALIBRATION, seed=1 + int(request["seed"]))
    dataset = nncf.Dataset([image[None] for image in images])
    quantized = nncf.quantize(model, dataset, subset_size=CALIBRATION, model_type=nncf.ModelType.TRANSFORMER)
    path = folder / NNCF_FILE
    openvino.save_model(quantized, str(path), compress_to_fp16=False)
    weights = path.with_suffix(".bin")
    yield {"path": path.name, "bytes": path.stat().st_size + weights.stat().st_size}

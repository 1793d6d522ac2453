"""One peer of ``benchmarks.speed guard``, measured inside a process of its own.

Importing this module loads neither torch nor transformers: the memory of a process that runs ONNX Runtime is then
what a device would need. Shapes: N images, H × W pixels, C classes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.isolation import peak_rss, restart_peak
from benchmarks.speed.peer import NNCF_FILE, Peer, Runtime, Subject, random_images
from runtimes.guard.bundle import open_bundle
from runtimes.guard.onnxruntime_runner import OnnxRuntimeRunner
from runtimes.guard.runner import GuardRunner
from safevlm.errors import InputError
from safevlm.files.storage import shown_bytes
from safevlm.machine import available_memory, times_ms

__all__ = ["CUDA_PROVIDER", "measure"]

CUDA_DRIVER = "libcuda.so.1"
CUDA_PROVIDER = "CUDAExecutionProvider"
PACKAGES: Mapping[Runtime, tuple[str, ...]] = {
    "torch": ("torch", "transformers"),
    "compile": ("torch", "transformers"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino", "nncf"),
    "tensorrt": ("tensorrt",),
}


class VisionTower(OnnxRuntimeRunner):
    """A vision tower and projector without a guard: what a guard that shares them is compared with."""

    outputs = ("embeddings",)

    def embed(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return image embeddings N x T x D of uint8 N x H x W x 3."""
        return np.asarray(self.session.run(list(self.outputs), {"rgb": rgb})[0])


def measure(request: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Load one peer and time it, smallest batch first; answer after every batch size.

    An answer has ``batch``, ``times_ms`` (one a run, the first run of a batch size is not counted),
    ``peak_rss_bytes`` of the process so far, the load included, and the ``probs`` (N × C) that it gave (None for a
    vision tower); or ``batch``
    and ``skipped``, the reason, where the growth in the batch before says that memory will not suffice.
    """
    peer = Peer(**request["peer"])
    with _open_runner(peer, Subject(**request["subject"]), request["threads"]) as runner:

        def call(rgb: NDArray[np.uint8]) -> Any:
            if isinstance(runner, VisionTower):
                return runner.embed(rgb)
            return runner.infer(rgb, embeddings=peer.work == "shared").probs

        images = random_images(runner.preprocessing, max(request["batches"]), request["seed"])
        while_loading = peak_rss()
        restart_peak()
        loaded, an_image = peak_rss(), 0
        for batch in sorted(request["batches"]):
            lacking = _lacking_memory(loaded + an_image * batch)
            if lacking is not None:
                yield {"batch": batch, "skipped": f"batch {batch} {lacking}"}
                continue
            found = call(images[:batch])
            probs = None if peer.work == "vision" else found.tolist()
            times = times_ms(partial(call, images[:batch]), most=request["repeats"], seconds=request["seconds"])
            peak = peak_rss()
            an_image = (peak - loaded) // batch
            highest = max(peak, while_loading)
            yield {
                "batch": batch,
                "times_ms": times,
                "peak_rss_bytes": highest,
                "probs": probs,
                "version": _versions(peer.runtime),
            }


def _versions(runtime: Runtime) -> str:
    """Return what runs here, with versions: ``torch 2.13.0, transformers 5.17.0``."""
    found = {each.name: each.version for each in importlib.metadata.distributions()}
    return ", ".join(f"{name} {found[name]}" for name in PACKAGES[runtime] if name in found)


def _lacking_memory(needed: int) -> str | None:
    """Say that this process cannot grow to ``needed`` bytes without driving others out of memory; else None."""
    free = available_memory()
    if needed - peak_rss() <= free:
        return None
    return f"needs about {shown_bytes(needed)}, but only {shown_bytes(peak_rss() + free)} is available here"


def _open_runner(peer: Peer, subject: Subject, threads: int) -> GuardRunner:
    """Return a peer's runner, not yet active; an InputError says why it cannot be had here."""
    if peer.runtime in ("torch", "compile"):
        return _torch_runner(subject, peer, threads)
    assert peer.bundle is not None
    bundle = open_bundle(peer.bundle, verify=False)
    if peer.runtime in ("onnxruntime", "openvino"):
        if peer.path == NNCF_FILE:  # not a bundle's: OpenVINO's own format
            file = bundle.file().model_copy(update={"path": NNCF_FILE, "precision": peer.precision})
        else:
            file = next(file for file in bundle.manifest.files if file.path == peer.path)
        if peer.runtime == "openvino":
            from runtimes.guard.openvino_runner import OpenVinoRunner

            return OpenVinoRunner(bundle, file, threads)
        kind = VisionTower if peer.work == "vision" else OnnxRuntimeRunner
        before = [CUDA_PROVIDER] if peer.device == "gpu" else []
        return kind(bundle, file, threads, providers=[*before, "CPUExecutionProvider"])
    from runtimes.guard.tensorrt_runner import TensorRTRunner, usable_engine

    return TensorRTRunner(bundle, usable_engine(bundle, peer.precision))


def _torch_runner(subject: Subject, peer: Peer, threads: int) -> GuardRunner:
    device = peer.device
    if device == "gpu":
        try:
            ctypes.CDLL(CUDA_DRIVER)
        except OSError as error:
            raise InputError(f"no CUDA GPU can be used here: the driver cannot be loaded ({error}).") from error
    import torch

    from benchmarks.speed.reference_runner import ReferenceRunner

    if device == "gpu" and not torch.cuda.is_available():
        raise InputError(f"torch {torch.__version__} finds no CUDA GPU here.")
    torch.set_num_threads(threads)
    on = "cuda" if device == "gpu" else "cpu"
    return ReferenceRunner(subject, on, compiled=peer.runtime == "compile", half=peer.precision == "fp16")

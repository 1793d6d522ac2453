"""A guard's INT8 files, with whatever hurts left in float32.

Two flavours. ``int8`` has explicit static Q/DQ with symmetric int8 on both sides, which TensorRT 10 and 11 and other
accelerators build from. ``int8-dynamic`` finds activation scales as it runs, one for each matrix product, which CPUs
do fastest; its scale spans whatever is run together, so the runner gives it one image at a time.

Which products are quantized is decided by measurement: all of them first, then, while labels flip or the ranking
changes by more than the limits, those that hurt most alone go back to float32.

Shapes: n images, H × W pixels, C classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.distilling.fidelity import auroc
from calibration.labelled.class_claims import uncertified_classes
from export.guard.batches import BATCH, batch_size
from export.guard.bundle import data_beside
from export.guard.int8_file import FLAVOURS, Flavour, Pictures, activation_ranges, quantizable, write_int8
from export.guard.latency import latency_of
from runtimes.guard.bundle import sha256_of
from runtimes.guard.policy import DEFAULT_LIMITS
from runtimes.guard.verdict import blocks, unsafe_probability
from safevlm.contract.class_names import safe_index
from safevlm.contract.manifest import GuardFile, Latency, Parity
from safevlm.errors import CheckpointError, PrecisionError
from safevlm.machine import times_ms

__all__ = ["FLAVOURS", "Flavour", "Int8Images", "Int8Limits", "add_int8", "default_file", "faster_than_float"]

TARGETS = {
    "int8": "TensorRT 10 and 11 and other accelerators: explicit static Q/DQ",
    "int8-dynamic": "CPUs: dynamic, one activation scale for each product and image",
}
RANKED_ON = 32
"""Images on which each product's own harm is found."""
TURNS, RUNS = 3, 12
"""Turns of each file when both are timed, and most runs a turn, for a second at most."""
CPU = "CPUExecutionProvider"
FASTER = 0.95
"""Of float32's time, that an INT8 file must need at most to be called faster: less is noise."""

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Int8Limits:
    """How far an INT8 file may be from the float32 one: share of labels, area under the ROC curve."""

    flips: float = 0.001
    auroc: float = 0.002


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Images:
    """``calibration`` images set the static scales; on ``held_out`` ones the file is judged.

    ``harms`` are the held-out images' true classes by name, None for safe ones; without them those of the float32 file
    stand in.
    """

    calibration: Pictures
    held_out: Pictures
    harms: tuple[str | None, ...] | None = None

    @property
    def unsafe(self) -> NDArray[np.bool_] | None:
        """Whether each held-out image is truly unsafe, where that is known."""
        return None if self.harms is None else np.array([harm is not None for harm in self.harms])


@dataclass(frozen=True, kw_only=True)
class _Judged:
    flips: int
    largest: float
    auroc: float | None
    auroc_change: float

    def within(self, limits: Int8Limits, images: int) -> bool:
        return self.flips <= limits.flips * images and self.auroc_change <= limits.auroc


def add_int8(
    folder: Path,
    source: GuardFile,
    flavour: Flavour,
    images: Int8Images,
    limits: Int8Limits = Int8Limits(),
    *,
    classes: Sequence[str],
    head_layers: int,
    report: Report = lambda _: None,
) -> list[GuardFile]:
    """Write ``guard.<flavour>.onnx`` into ``folder`` from its float32 file; return the manifest's entries.

    ``classes`` are the guard's, ``head_layers`` says how many Linears the head has: they compute in float32.

    Raises PrecisionError when the limits are not met even with all but one product in float32; CheckpointError when
    the float32 file's own answers are not finite.
    """
    path, float_path = folder / f"guard.{flavour}.onnx", folder / source.path
    safe = safe_index(classes)
    maker = _Maker(float_path, flavour, images.calibration, head_layers)
    reference = _probs(float_path, images.held_out, BATCH)
    wrong = int((~np.isfinite(reference).all(axis=1)).sum())
    if wrong:
        raise CheckpointError(
            f"{source.path} gives NaN or infinity for {wrong} of {len(reference)} held-out images, so there are "
            "no verdicts to compare with. Nothing was exported. Fetch the checkpoint again, or give other --images."
        )
    kept: tuple[str, ...] = ()
    order: list[str] | None = None
    while True:
        count = len(maker.products) - len(kept)
        report(f"{path.name}: quantizing {count} of {len(maker.products)} products, judging {len(reference)} images")
        maker.write(path, kept)
        probs = _probs(path, images.held_out, _most(flavour))
        judged = _judge(reference, probs, images.unsafe, safe)
        if judged.within(limits, len(reference)):
            break
        if count <= 1:
            raise PrecisionError(
                f"{judged.flips} of {len(reference)} labels flip and the area under the ROC curve changes "
                f"by {judged.auroc_change:.4f} even with all but one product in float32."
            )
        if order is None:
            order = _by_harm(maker, images.held_out[:RANKED_ON], flavour, report)
        kept = tuple(order[: min(max(1, 2 * len(kept)), len(order) - 1)])
    ours, floats = _latencies(path, float_path, images.held_out[:1], source)
    faster = ours.median_ms <= FASTER * floats.median_ms
    note = (
        f"{floats.median_ms / ours.median_ms:.2f} times as fast as float32 on this machine"
        if faster
        else f"not faster than float32 on this machine ({ours.median_ms:.1f} ms, float32 {floats.median_ms:.1f} ms)"
    )
    entry = source.model_copy(
        update={
            "path": path.name,
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
            "precision": flavour,
            "parity": Parity(
                images=len(reference),
                max_abs_prob_delta=judged.largest,
                label_flips=judged.flips,
                max_rel_embedding_delta=_embedding_delta(path, float_path, source, images.held_out, flavour),
                reference=f"{source.path} in ONNX Runtime",
            ),
            "latency": ours,
            "target": TARGETS[flavour],
            "note": note,
            "quantization": {
                "products": len(maker.products),
                "left_in_float32": list(kept),
                "held_out_images": len(reference),
                "label_flips": judged.flips,
                "auroc": judged.auroc,
                "auroc_change": judged.auroc_change,
                "labels": "true" if images.unsafe is not None else "the float32 file's own",
                "uncertified_classes": _uncertified(reference, probs, images, classes),
                "calibration_images": len(images.calibration) if flavour == "int8" else 0,
                "float32_median_ms": floats.median_ms,
            },
        }
    )
    return [entry, *data_beside(path, entry)]


def faster_than_float(file: GuardFile) -> bool:
    """Say whether an INT8 file was faster than its float32 one where it was made."""
    stated = file.quantization or {}
    return file.latency is not None and file.latency.median_ms <= FASTER * float(stated.get("float32_median_ms", 0.0))


def default_file(files: Sequence[GuardFile]) -> str:
    """Return the path of the INT8 file that was fastest, if it was faster than float32; else of the first file."""
    quick = [file for file in files if file.quantization is not None and faster_than_float(file)]
    if not quick:
        return files[0].path
    return min(quick, key=lambda file: file.latency.median_ms if file.latency else float("inf")).path


# -- making -----------------------------------------------------------------------------------------------


class _Maker:
    """Quantizes one float32 graph again and again, with other products left out; its scales are found once."""

    def __init__(self, source: Path, flavour: Flavour, calibration: Pictures, head_layers: int) -> None:
        self.source, self.flavour = source, flavour
        self.ranges = activation_ranges(source, calibration) if flavour == "int8" else {}
        products = quantizable(source, flavour)
        self.products, self.head = products[:-head_layers], products[-head_layers:]

    def write(self, path: Path, left_out: Sequence[str], only: str | None = None) -> None:
        """Write the quantized graph; ``only`` quantizes that one product."""
        chosen = [only] if only is not None else [name for name in self.products if name not in left_out]
        write_int8(self.source, path, self.flavour, self.ranges, chosen, self.head)


def _by_harm(maker: _Maker, images: Pictures, flavour: Flavour, report: Report) -> list[str]:
    """Return products by the harm that each does alone to the logits, worst first."""
    reference = _run(maker.source, "logits", images, BATCH)
    harm = {}
    with tempfile.TemporaryDirectory(prefix="safevlm-int8-") as folder:
        for number, name in enumerate(maker.products, 1):
            report(f"sensitivity of product {number} of {len(maker.products)}")
            path = Path(folder) / "one.onnx"
            maker.write(path, (), only=name)
            found = _run(path, "logits", images, _most(flavour))
            harm[name] = float(np.square(found - reference).mean())
    return sorted(harm, key=lambda name: -harm[name])


# -- judging ----------------------------------------------------------------------------------------------


def _most(flavour: Flavour) -> int:
    return 1 if flavour == "int8-dynamic" else BATCH


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=[CPU])


def _run(path: Path, output: str, images: Pictures, most: int) -> Floats:
    """Run ``most`` images at once, or fewer where they are large."""
    session = _session(path)
    batch = min(most, batch_size(*images[:1].shape[1:3]))
    pieces = (images[start : start + batch] for start in range(0, len(images), batch))
    return np.concatenate([session.run([output], {"rgb": piece})[0] for piece in pieces])


def _probs(path: Path, images: Pictures, most: int) -> Floats:
    return _run(path, "probs", images, most)


def _judge(reference: Floats, found: Floats, unsafe: NDArray[np.bool_] | None, safe: int) -> _Judged:
    if not np.isfinite(found).all():
        return _Judged(flips=len(found), largest=1.0, auroc=None, auroc_change=1.0)
    truth = reference.argmax(axis=1) != safe if unsafe is None else unsafe
    before, after = (auroc(unsafe_probability(probs, safe), truth) for probs in (reference, found))
    return _Judged(
        flips=int((reference.argmax(axis=1) != found.argmax(axis=1)).sum()),
        largest=float(np.abs(reference.astype(np.float64) - found).max()),
        auroc=after,
        auroc_change=0.0 if before is None or after is None else abs(after - before),
    )


def _uncertified(
    reference: Floats, found: Floats, images: Int8Images, classes: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Return the classes of which the held-out images do not prove that at most a margin more is missed, from 0.5."""
    safe = safe_index(classes)
    truth = reference.argmax(axis=1).astype(np.int64)
    if images.harms is not None:
        place = {name: at for at, name in enumerate(classes)} | {None: safe}
        truth = np.array([place.get(harm, -1) for harm in images.harms], np.int64)
    before, after = (blocks(unsafe_probability(probs, safe), DEFAULT_LIMITS.block) for probs in (reference, found))
    short = uncertified_classes(truth, classes, newly=before & ~after)
    return {name: each.model_dump(exclude_none=True) for name, each in short.items()}


def _embedding_delta(path: Path, floats: Path, source: GuardFile, images: Pictures, flavour: Flavour) -> float | None:
    """Return the largest difference of image embeddings, the language model's input, over their largest value."""
    if not any(output.name == "embeddings" for output in source.outputs):
        return None
    few = images[:RANKED_ON]
    reference, found = _run(floats, "embeddings", few, BATCH), _run(path, "embeddings", few, _most(flavour))
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def _latencies(ours: Path, floats: Path, image: Bytes, source: GuardFile) -> tuple[Latency, Latency]:
    """Time both files by turns on one image; only one of them is in memory at a time."""
    import onnxruntime

    times: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for path, found in zip((ours, floats), times, strict=True):
            session = _session(path)
            session.run(["probs"], {"rgb": image})
            found += times_ms(partial(session.run, ["probs"], {"rgb": image}), most=RUNS, seconds=1)
            del session
    stated = source.latency.runtime if source.latency else f"onnxruntime {onnxruntime.__version__} {CPU}"
    return latency_of(times[0], stated, provider=CPU), latency_of(times[1], stated, provider=CPU)

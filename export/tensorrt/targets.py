"""The GPUs that TensorRT-RTX compiles engines for, named by compute capability: ``sm89``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.tensorrt.messages import said, title_of
from runtimes.guard.engines.library import collecting_logger
from safevlm.errors import InputError

__all__ = ["DEFAULT_TARGETS", "check_targets", "parse_targets", "set_targets", "shown_targets"]

DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")
GPUS: Mapping[str, str] = {
    "sm75": "RTX 20, T4",
    "sm80": "A100, A30",
    "sm86": "RTX 30, A10, A40",
    "sm87": "Jetson Orin",
    "sm89": "RTX 40, L4, L40",
    "sm90": "H100, H200",
    "sm100": "B200",
    "sm103": "B300",
    "sm110": "Jetson Thor",
    "sm120": "RTX 50",
    "sm121": "DGX Spark",
}
"""Examples of what has a compute capability (https://developer.nvidia.com/cuda-gpus)."""
_TARGET = re.compile(r"sm[0-9]{2,3}")


def parse_targets(text: str) -> tuple[str, ...]:
    """Return the targets in ``sm89,sm80``, in rising order; InputError for anything else."""
    names = [name.strip().lower() for name in text.split(",")]
    wrong = next((name for name in names if not _TARGET.fullmatch(name)), None)
    if wrong is not None:
        raise InputError(
            f"--targets {text}: {wrong!r} is not a target. A target is a GPU's compute capability without the point, "
            "sm89 for 8.9; several are separated by commas."
        )
    return tuple(sorted(set(names), key=_number))


def shown_targets(targets: Sequence[str]) -> str:
    """Return targets as they are told: ``sm89 (RTX 40, L4, L40)``."""
    return ", ".join(f"{target} ({GPUS[target]})" if target in GPUS else target for target in targets)


def check_targets(trt: Any, targets: Sequence[str]) -> None:
    """Compile one float32 product, which every guard's head has, for each target: before the long work.

    Raises InputError for a target that this TensorRT-RTX does not have or refuses, with its own words and those that
    it compiles for.
    """
    known = _known(trt)
    for target in targets:
        reason = _refusal(trt, target) if target in known else "it is not one of its targets"
        if reason is not None:
            good = [name for name in known if _refusal(trt, name) is None]
            raise InputError(
                f"--targets: {title_of(trt)} does not compile a guard for {shown_targets([target])}: {reason}. It "
                f"compiles for {', '.join(good) or 'none here'}. For another GPU build on that GPU with --builder "
                "tensorrt."
            )


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Name the targets to a builder's configuration."""
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index)


def _known(trt: Any) -> list[str]:
    names = [name.lower() for name in trt.ComputeCapability.__members__]
    return sorted((name for name in names if _TARGET.fullmatch(name)), key=_number)


def _refusal(trt: Any, target: str) -> str | None:
    """Return what the builder says to a float32 product for a target, None where it compiles it."""
    log = collecting_logger(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    factor = network.add_constant((1, 1), trt.Weights(np.ones((1, 1), np.float32)))
    values = network.add_input("values", trt.float32, (1, 1))
    plain = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(values, plain, factor.get_output(0), plain)
    network.mark_output(product.get_output(0))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    set_targets(trt, config, [target])
    return None if builder.build_serialized_network(network, config) is not None else said(log.errors)


def _number(target: str) -> int:
    return int(target.removeprefix("sm"))

"""The steps of the path, as the commands that a user types, and what each promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes.shapes import VisionShape
from safevlm.terminal.child import module_arguments

__all__ = ["STEPS", "Step", "steps_of"]

GIBIBYTE = 2**30
STEPS = ("write", "guard", "guard-int8", "check", "gate", "gptq", "int8", "gguf", "chat")
QUESTION = "What is in the picture?"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command, the exit codes that are right, and the most memory that it may take, in bytes, where that is promised.

    ``makes`` is the folder that shows that it was done.
    """

    name: str
    arguments: tuple[str, ...]
    codes: frozenset[int] = frozenset({0})
    most_bytes: int | None = None
    makes: Path | None = None


def steps_of(shape: VisionShape, work: Path, *, layers: int | None, sparse: bool) -> Mapping[str, Step]:
    """Return the steps for a shape, in order; ``layers`` of the language model are written, None for all of them."""
    model, guard, small = work / "model", work / "guard", work / "guard-int8"
    pictures, image = work.parent / "pictures", str(work.parent / "picture.png")
    calibration = ["--calibration", str(pictures / "holisafe_bench.json"), "--samples", "8", "--answers", "none"]
    calibration += ["--mix", "unsafe=0.5,safe=0.5,text=0", "--guard-images", "0", "--max-memory", "9"]
    shortened = [] if layers is None else ["--layers", str(layers)]
    holes = ["--sparse"] if sparse else []
    asked = ["--question", QUESTION, "--max-new-tokens", "4", "--timeout", "600", "--dtype", "bfloat16"]
    steps = [
        Step(
            name="write",
            arguments=_run("benchmarks.random_checkpoint", "--shape", shape.name, "--out", model, *shortened, *holes),
            makes=model,
        ),
        Step(
            name="guard",
            arguments=_run("export.onnx", "--model", model, "--out", guard, "--precision", "fp32,fp16", *_PARITY),
            most_bytes=4 * GIBIBYTE,
            makes=guard,
        ),
        Step(
            name="guard-int8",
            arguments=_run("export.onnx", "--model", model, "--out", small, "--precision", "fp32,int8", *_ON_PROJECTOR),
            most_bytes=4 * GIBIBYTE,
            makes=small,
        ),
        Step(name="check", arguments=_run("runtimes.check", small, image), codes=frozenset({0, 10})),
        Step(
            name="gate",
            arguments=_run("runtimes.gate", image, "--bundle", guard, "--model", model, *asked),
            codes=frozenset({0, 10}),
        ),
        Step(
            name="gptq",
            arguments=_run("quantize.gptq", "--model", model, "--out", work / "gptq", "--layers", "2", *calibration),
            most_bytes=10 * GIBIBYTE,
        ),
        Step(
            name="int8",
            arguments=_run("quantize.int8", "--model", model, "--out", work / "int8", "--layers", "2", *calibration),
            most_bytes=10 * GIBIBYTE,
        ),
        Step(
            name="gguf",
            arguments=_run(
                "export.gguf", "--model", model, "--out", work / "gguf", "--type", "q4_0", "--parity-images", "1"
            ),
            makes=work / "gguf",
        ),
        Step(
            name="chat",
            arguments=_run(
                "runtimes.chat", "--bundle", guard, "--model", work / "gguf", image, QUESTION, "--max-new-tokens", "4",
                "--timeout", "600",
            ),
            codes=frozenset({0, 10}),
        ),
    ]  # fmt: skip
    return {step.name: step for step in steps}


_PARITY = ("--parity-images", "2")
_ON_PROJECTOR = ("--tap", "projector", "--parity-images", "1", "--int8-images", "2")
"""A guard that judges by itself, which INT8 is for: random weights do not say where they tap."""


def _run(module: str, *arguments: object) -> tuple[str, ...]:
    return tuple(module_arguments(module, *arguments))

"""The steps of the proof, in order, with the seconds that each may take."""

from __future__ import annotations

from dataclasses import dataclass

from safevlm.errors import InputError

__all__ = ["STEPS", "Step", "find_steps"]

PROOFS = "benchmarks.gpu_proof.proofs"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: ``function`` is ``MODULE:FUNCTION`` in ``proofs``, ``seconds`` its deadline."""

    name: str
    title: str
    function: str
    seconds: float


STEPS: tuple[Step, ...] = (
    Step(name="cuda", title="CUDA bindings, memory, activations", function="cuda:prove", seconds=60),
    Step(name="torch", title="torch guard, CPU against GPU", function="torch_guard:prove", seconds=150),
    Step(name="quantize", title="GPTQ and INT8 of the tiny three", function="quantizing:prove", seconds=240),
    Step(name="quantize-7b", title="GPTQ at SafeLLaVA-7B's shape", function="real_shape:prove", seconds=330),
    Step(name="use", title="gate, run and distill", function="using:prove", seconds=150),
    Step(name="onnxruntime", title="ONNX Runtime on CUDA", function="onnx_runtime:prove", seconds=120),
    Step(name="speed-llava", title="guard speed, SafeLLaVA-7B", function="speed:prove_llava", seconds=150),
    Step(name="speed-qwen", title="guard speed, SafeQwen2.5-VL-7B", function="speed:prove_qwen", seconds=150),
    Step(name="speed-gem", title="guard speed, SafeGem-12B", function="speed:prove_gem", seconds=180),
    Step(name="rtx", title="TensorRT-RTX engines", function="rtx:prove", seconds=100),
    Step(name="tests", title="pytest -m gpu", function="gpu_tests:prove", seconds=150),
)


def find_steps(names: str | None) -> list[Step]:
    """Return the steps named, separated by commas, in their own order; all where nothing is named.

    Raises InputError for a name that is no step's.
    """
    if names is None:
        return list(STEPS)
    asked = names.split(",")
    unknown = sorted(set(asked) - {step.name for step in STEPS})
    if unknown:
        known = ", ".join(step.name for step in STEPS)
        raise InputError(f"--steps {','.join(unknown)}: use one or several of {known}.")
    return [step for step in STEPS if step.name in asked]

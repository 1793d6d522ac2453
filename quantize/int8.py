"""W8A8 of a Safe-VLM's language model: ``python -m quantize.int8 --model SafeLLaVA-7B --out DIR``.

Weights and activations of the decoder's linears in 8 bits, in compressed-tensors' ``int-quantized`` format, which
transformers and vLLM load. Vision tower, projector and guard head stay in 16 bit. For 8-bit weights alone:
``python -m quantize.gptq --bits 8``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from quantize.methods.int8_method import OPTIONS, STEPS, STRENGTHS, W8A8
from quantize.methods.rotation import Rotate
from quantize.methods.settings import Plan
from quantize.methods.solver import SolveOptions
from quantize.streamed.compress import compress
from quantize.streamed.layers import LINEARS
from quantize.streamed.options import calibration_of, finish, progress_on, rotate_option, run_of, shared_options
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.machine import return_freed_memory
from safevlm.terminal.commandline import run

__all__ = ["int8_plan", "quantization_config"]

NOT_QUANTIZED = (
    "lm_head",
    "re:.*vision_tower.*",
    "re:.*visual.*",
    "re:.*multi_modal_projector.*",
    "re:.*img_safety_head.*",
)


def quantization_config() -> dict[str, Any]:
    """Return compressed-tensors' settings for config.json: all that readers ask for, nothing left to defaults."""
    whole = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**whole, "strategy": "channel", "dynamic": False, "actorder": None},
                "input_activations": {**whole, "strategy": "token", "dynamic": True, "actorder": None},
                "output_activations": None,
                "format": "int-quantized",
            }
        },
        "ignore": list(NOT_QUANTIZED),
        "kv_cache_scheme": None,
        "sparsity_config": {},
    }


def int8_plan(
    strengths: tuple[float, ...] = STRENGTHS,
    options: SolveOptions = OPTIONS,
    *,
    steps: int = STEPS,
    rotate: Rotate = "none",
) -> Plan:
    """Return what rounds every decoder linear and its inputs to 8 bits; ``rotate`` says what is turned before."""
    recipe = {
        "name": "w8a8",
        "smoothing_strengths": list(strengths),
        "smoothing_steps": steps,
        "act_order": options.act_order,
        "damp": options.damp,
        "search": options.search,
        "linears": list(LINEARS),
    }
    return Plan(
        method=W8A8(strengths=strengths, steps=steps, options=options),
        recipe=recipe,
        rotate=rotate,
        quantization=quantization_config(),
        consumers=["GPTQModel, AutoGPTQ and llama.cpp do not read compressed-tensors"],
    )


@click.command(name="int8")
@shared_options
@click.option(
    "--smoothing",
    default=",".join(f"{strength:g}" for strength in STRENGTHS),
    show_default=True,
    help="Smoothing strengths to try, separated by commas; 0 turns it off.",
)
@click.option(
    "--smoothing-steps",
    type=int,
    default=STEPS,
    show_default=True,
    help="Steps that improve the best strength's factors; 0 keeps them.",
)
@click.option(
    "--damp",
    type=float,
    default=OPTIONS.damp,
    show_default=True,
    help="Damping as a share of the Hessian's mean diagonal.",
)
@rotate_option
def main(
    model: str,
    revision: str | None,
    out: Path,
    smoothing: str,
    smoothing_steps: int,
    damp: float,
    rotate: Rotate,
    as_json: bool,
    **shared: Any,
) -> None:
    """Round weights and activations of MODEL's language model to 8 bits, calibrated on images and text."""
    if smoothing_steps < 0:
        raise InputError(f"--smoothing-steps {smoothing_steps} is not allowed. Give 0 or more; {STEPS} is usual.")
    plan = int8_plan(_strengths(smoothing), replace(OPTIONS, damp=damp), steps=smoothing_steps, rotate=rotate)
    return_freed_memory()
    checkpoint = open_checkpoint(model, revision=revision)
    with progress_on(Console(stderr=True)) as progress:
        found = compress(checkpoint, out, plan, calibration_of(shared), run_of(shared, rounds_inputs=True), progress)
    finish(found, as_json, f"python -m benchmarks.tiny --model {out}")


def _strengths(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted({0.0, *(float(part) for part in text.split(","))}))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= strength < 1 for strength in found):
        raise InputError(
            f"--smoothing {text} is not allowed. Give strengths of at least 0 and below 1, as in 0,0.4,0.6."
        )
    return found


if __name__ == "__main__":
    run(main)

"""GPTQ of a Safe-VLM's language model: ``python -m quantize.gptq --model SafeLLaVA-7B --out DIR --bits 4``.

Decoder layers stream by one at a time, calibrated on images and text; vision tower, projector and guard head stay in
16 bit. The result is a checkpoint in GPTQ's v1 format that transformers and GPTQModel load, and vLLM with 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import click
from rich.console import Console

from quantize.bits.auto_bits import auto_plan
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Scheme
from quantize.methods.rotation import Rotate
from quantize.methods.settings import Plan
from quantize.methods.solver import ActOrder, SolveOptions
from quantize.methods.tuning import TuneOptions, Tuner
from quantize.streamed.compress import compress
from quantize.streamed.consumers import consumers
from quantize.streamed.layers import LINEARS
from quantize.streamed.options import calibration_of, finish, progress_on, rotate_option, run_of, shared_options
from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from safevlm.checkpoint.weights.quantized import BITS
from safevlm.errors import InputError
from safevlm.machine import return_freed_memory
from safevlm.terminal.commandline import run
from safevlm.version import VERSION

__all__ = ["gptq_plan", "quantization_config"]


def quantization_config(checkpoint: Checkpoint, scheme: Scheme, options: SolveOptions) -> dict[str, Any]:
    """Return GPTQ's settings for config.json: all that any reader asks for, nothing left to defaults.

    ``modules_in_block_to_quantize`` is left out: vLLM looks for its names anywhere in a module's, and then takes the
    vision tower's linears for quantized, too. Without it every reader finds the same modules by itself.
    """
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": options.act_order == "group",
        "sym": scheme.symmetric,
        "checkpoint_format": "gptq",
        "static_groups": options.act_order == "static",
        "damp_percent": options.damp,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": f"{checkpoint.family.language_prefix}layers",
        "meta": {"quantizer": [f"safevlm-edge:{VERSION}"]},
    }


def gptq_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    options: SolveOptions = SolveOptions(),
    more: Mapping[str, Any] = MappingProxyType({}),
    *,
    nearest: bool = False,
    rotate: Rotate = "none",
    tuning: TuneOptions | None = None,
) -> Plan:
    """Return what rounds every decoder linear with ``scheme``; ``more`` goes into the config.

    ``nearest`` rounds each weight by itself, to have something to compare with; ``rotate`` says what is turned before.
    With ``tuning`` each layer's codes are tuned on its output.
    """
    if nearest:
        options = replace(options, sweeps=0, beams=1, mismatch=0.0)
    tuner = None if tuning is None else Tuner(tuning)
    config = {**quantization_config(checkpoint, scheme, options), **more}
    recipe = {
        "name": "rtn" if nearest else "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "signed": scheme.either_sign,
        "act_order": options.act_order,
        "damp": options.damp,
        "search": options.search,
        "sweeps": options.sweeps,
        "beams": options.beams,
        "mismatch": options.mismatch,
        "linears": list(LINEARS),
        "tuning": None if tuning is None else tuning.recipe(),
    }
    return Plan(
        method=Gptq(scheme_of=lambda _: scheme, options=options, nearest=nearest, tuner=tuner),
        recipe=recipe,
        rotate=rotate,
        quantization=config,
        extra_files={"quantize_config.json": {**config, "model_name_or_path": None, "model_file_base_name": None}},
        consumers=consumers({scheme.bits}, scheme, options),
        tuner=tuner,
        original_inputs=options.mismatch > 0,
    )


@click.command(name="gptq")
@shared_options
@click.option(
    "--bits", default="4", show_default=True, help="Bits per weight: 2, 3, 4, 8, or auto by safety sensitivity."
)
@click.option("--target-bits", type=float, help="Average bits per weight with --bits auto, scales included.")
@click.option(
    "--safety-weight",
    type=float,
    default=4.0,
    show_default=True,
    help="Weight of refusals and guard relative to other answers, with --bits auto.",
)
@click.option(
    "--sensitivity-samples", type=int, default=32, show_default=True, help="Number of samples for the sensitivity."
)
@click.option(
    "--group-size", type=int, default=128, show_default=True, help="Input columns per scale; -1 is one scale per row."
)
@click.option("--asymmetric", is_flag=True, help="Use a zero point per group.")
@click.option(
    "--unsigned",
    is_flag=True,
    help="Store positive scales only, instead of letting their sign say which side has one more level.",
)
@click.option(
    "--act-order",
    type=click.Choice(["static", "group", "none"]),
    default="static",
    show_default=True,
    help="Order of columns: by activation with fixed groups (static), by activation with groups in that order "
    "(group), or as stored (none).",
)
@click.option(
    "--damp",
    type=float,
    default=SolveOptions.damp,
    show_default=True,
    help="Damping as a share of the Hessian's mean diagonal.",
)
@click.option(
    "--sweeps",
    type=int,
    default=SolveOptions.sweeps,
    show_default=True,
    help="Passes over scales and integers after GPTQ, each lowering the error; 0 for none.",
)
@click.option(
    "--beams",
    type=int,
    default=SolveOptions.beams,
    show_default=True,
    help="Partial roundings of each row that GPTQ keeps within a block of columns; more take longer.",
)
@click.option(
    "--mismatch",
    type=float,
    default=SolveOptions.mismatch,
    show_default=True,
    metavar="SHARE",
    help="How far weights make up, before rounding, for what the layers before did to their inputs; from 0 (off) to 1.",
)
@click.option("--no-search", is_flag=True, help="Use the full range for every grid, without a search.")
@click.option(
    "--time",
    "minutes",
    type=float,
    help="Minutes to tune all layers, each by gradient on its output, after GPTQ.",
)
@click.option("--tune-steps", type=int, help="Number of steps to tune each layer instead of --time; reproducible.")
@click.option("--nearest", is_flag=True, help="Round to nearest instead of GPTQ, for comparison.")
@rotate_option
def main(
    model: str,
    revision: str | None,
    out: Path,
    bits: str,
    target_bits: float | None,
    safety_weight: float,
    sensitivity_samples: int,
    group_size: int,
    asymmetric: bool,
    unsigned: bool,
    act_order: str,
    damp: float,
    sweeps: int,
    beams: int,
    mismatch: float,
    no_search: bool,
    minutes: float | None,
    tune_steps: int | None,
    nearest: bool,
    rotate: Rotate,
    as_json: bool,
    **shared: Any,
) -> None:
    """Round the language model of MODEL to a few bits with GPTQ, calibrated on images and text."""
    auto = bits == "auto"
    if auto != (target_bits is not None):
        raise InputError("--bits auto needs --target-bits, and the reverse, as in --bits auto --target-bits 4.5.")
    tuning = None
    if minutes is not None or tune_steps is not None:
        tuning = TuneOptions(minutes=minutes, steps=tune_steps)
    if nearest and tuning:
        raise InputError("--nearest rounds each weight by itself; it does not work with --time or --tune-steps.")
    if nearest and mismatch:
        raise InputError("--nearest rounds each weight by itself; it does not work with --mismatch.")
    if nearest and auto:
        raise InputError("--nearest needs a number of bits; it does not work with --bits auto.")
    scheme = Scheme(
        bits=BITS[0] if auto else whole_bits(bits),
        group_size=group_size,
        symmetric=not asymmetric,
        signed=not (unsigned or nearest),
    )
    options = SolveOptions(
        act_order=cast(ActOrder, act_order),
        damp=damp,
        search=not (no_search or nearest),
        sweeps=sweeps,
        beams=beams,
        mismatch=mismatch,
    )
    return_freed_memory()
    checkpoint = open_checkpoint(model, revision=revision)
    with progress_on(Console(stderr=True)) as progress:
        plan = gptq_plan(checkpoint, scheme, options, nearest=nearest, rotate=rotate, tuning=tuning)
        if target_bits is not None:
            plan = auto_plan(
                checkpoint,
                target_bits,
                scheme,
                options,
                lambda scheme, more: gptq_plan(checkpoint, scheme, options, more, rotate=rotate, tuning=tuning),
                safety_weight=safety_weight,
                samples=sensitivity_samples,
            )
        found = compress(checkpoint, out, plan, calibration_of(shared), run_of(shared), progress)
    finish(found, as_json, f"python -m benchmarks.tiny --model {out}")


def whole_bits(text: str) -> int:
    """Return ``--bits`` as a number of bits that is allowed. Raises InputError for any other text."""
    if text not in map(str, BITS):
        raise InputError(f"--bits {text}: use one of {', '.join(map(str, BITS))}, or auto.")
    return int(text)


if __name__ == "__main__":
    run(main)

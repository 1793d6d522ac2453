"""GPTQ with bits by safety sensitivity: what is measured on which samples, and the plan that it leads to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibration.streaming.batches import Row, embed_batches, pack_rows
from calibration.streaming.sequential import Activations, LayerStream
from quantize.bits.sensitivity import PARTS, SIXTEEN, Sensitivity, choose_bits, measure, record, stored_bits
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Scheme
from quantize.methods.settings import AutoBits, Plan
from quantize.methods.solver import SolveOptions
from quantize.streamed.consumers import FUSED, consumers
from quantize.streamed.unfinished import Unfinished
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.quantized import BITS
from safevlm.errors import InputError

__all__ = ["auto_plan", "choices_for", "mixed_plan", "sensitivity_of"]

KEPT = "sensitivity.json"
REFUSED_BY_TRANSFORMERS = "several bit widths: load this with GPTQModel or vLLM, transformers knows one width"
"""Transformers ignores ``dynamic`` rules and loads other widths without a word, as noise. It does check the name of the
calibration data set, which other readers do not look at, and says it in its error."""


def choices_for(target: float) -> tuple[int, ...]:
    """Return the widths worth measuring for ``target`` bits: from one step below it up to 16."""
    below = [bits for bits in BITS if bits <= target]
    return (*[bits for bits in BITS if bits >= (below[-2] if len(below) > 1 else BITS[0])], SIXTEEN)


def sensitivity_of(
    stream: LayerStream,
    packed: Sequence[tuple[Row, ...]],
    auto: AutoBits,
    unfinished: Unfinished,
    max_bytes: int,
    batch_tokens: int,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure on some of the rows, refusals and others by turns; a run that goes on keeps what it measured."""
    kept = unfinished.kept(KEPT)
    if kept is not None:
        return list(kept)
    rows = [row for batch in packed for row in batch if row.answer_length]
    refused, others = [row for row in rows if row.refused], [row for row in rows if not row.refused]
    half = min(len(refused), max(auto.samples - len(others), auto.samples // 2))
    chosen = _spread(refused, half) + _spread(others, auto.samples - half)
    few = pack_rows(chosen or [row for batch in packed for row in batch], batch_tokens)
    shapes = [(len(batch), max(len(row.ids) for row in batch), stream.checkpoint.hidden_size) for batch in few]
    with Activations(shapes, stream.dtype, max_bytes, unfinished.folder) as hidden:
        batches = embed_batches(stream, few, hidden, report)
        found = measure(
            stream,
            batches,
            hidden,
            auto.choices,
            auto.scheme,
            max_bytes=max(0, max_bytes - hidden.nbytes),
            folder=unfinished.folder,
            report=report,
        )
    unfinished.keep(KEPT, record(found))
    return record(found)


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Return ``count`` rows from all along the list."""
    if count >= len(rows):
        return list(rows)
    return [rows[place * len(rows) // count] for place in range(count)]


def auto_plan(
    checkpoint: Checkpoint,
    target: float,
    scheme: Scheme,
    options: SolveOptions,
    base: Callable[[Scheme, Mapping[str, Any]], Plan],
    *,
    safety_weight: float,
    samples: int,
) -> Plan:
    """Return the plan of ``--bits auto``; ``base`` makes the plan of a uniform scheme with more for its config.

    ``scheme`` gives all but the bits. Raises InputError for a target that no width meets.
    """
    if not BITS[0] < target <= SIXTEEN:
        raise InputError(f"--target-bits {target:g} is not allowed. Give a number above {BITS[0]}, up to {SIXTEEN}.")
    if samples < 1 or not 0 <= safety_weight < float("inf"):
        raise InputError(
            f"--sensitivity-samples must be at least 1 and --safety-weight at least 0, not {samples} and "
            f"{safety_weight}."
        )
    choices = choices_for(target)
    wanted = {"target_bits": target, "choices": list(choices), "safety_weight": safety_weight, "samples": samples}
    schemes = {bits: replace(scheme, bits=bits) for bits in choices[:-1]}
    narrowest = min(_columns(checkpoint))

    def plan(measured: Sequence[Mapping[str, Any]]) -> Plan:
        rows = [Sensitivity(**row) for row in measured]
        bits_of = choose_bits(
            rows,
            target,
            lambda bits: stored_bits(bits, scheme.group_size, narrowest),
            safety_weight=safety_weight,
        )
        return mixed_plan(checkpoint, bits_of, schemes, options, base, wanted)

    uniform = base(schemes[choices[0]], {})
    auto = AutoBits(choices=choices, scheme=scheme, samples=samples, plan=plan)
    return Plan(
        method=uniform.method,
        recipe={**uniform.recipe, "bits": "auto", **wanted},
        quantization=uniform.quantization,
        rotate=uniform.rotate,
        tuner=uniform.tuner,
        original_inputs=uniform.original_inputs,
        auto=auto,
    )


def _columns(checkpoint: Checkpoint) -> list[int]:
    prefix = f"{checkpoint.family.language_prefix}layers.0."
    return [checkpoint.tensors.shape(f"{prefix}{name}.weight")[1] for names in PARTS.values() for name in names]


def mixed_plan(
    checkpoint: Checkpoint,
    bits_of: Mapping[tuple[int, str], int],
    schemes: Mapping[int, Scheme],
    options: SolveOptions,
    base: Callable[[Scheme, Mapping[str, Any]], Plan],
    wanted: Mapping[str, Any],
) -> Plan:
    """Return the plan of given bits: the commonest width is the config's, the others are ``dynamic`` rules."""
    rounded = Counter(bits for bits in bits_of.values() if bits != SIXTEEN)
    usual = min(rounded, key=lambda bits: (-rounded[bits], bits)) if rounded else min(schemes)
    prefix = f"{checkpoint.family.language_prefix}layers."
    bits_by_name = {f"{prefix}{layer}.{name}": bits for (layer, part), bits in bits_of.items() for name in PARTS[part]}
    dynamic: dict[str, dict[str, Any]] = {}
    for (layer, part), bits in bits_of.items():
        names = "|".join([*(name.split(".")[1] for name in PARTS[part]), FUSED[part]])
        parent = PARTS[part][0].split(".")[0]
        rule = rf"{re.escape(f'layers.{layer}.{parent}.')}({names})$"
        if bits == SIXTEEN:
            dynamic[f"-:.*{rule}"] = {}
        elif bits != usual:
            dynamic[f"+:.*{rule}"] = {"bits": bits}
    more: dict[str, Any] = {}
    if SIXTEEN in bits_of.values():  # transformers knows no rules, but which modules are quantized
        # vLLM finds these names in the vision tower's, too; the first rule that fits counts
        spared: dict[str, dict[str, Any]] = {
            f"-:.*{vision.split('.')[1]}.*": {} for vision in checkpoint.family.vision_prefixes
        }
        dynamic = {**spared, **dynamic}
        quantized = [name.removeprefix(f"{prefix}") for name, bits in bits_by_name.items() if bits != SIXTEEN]
        more["modules_in_block_to_quantize"] = [[f"layers.{name}" for name in quantized]]
    if dynamic:
        more["dynamic"] = dynamic
    if len(rounded) > 1:
        more["dataset"] = REFUSED_BY_TRANSFORMERS
    plan = base(schemes[usual], more)
    return Plan(
        method=Gptq(
            scheme_of=lambda name: None if bits_by_name[name] == SIXTEEN else schemes[bits_by_name[name]],
            options=options,
            tuner=plan.tuner,
        ),
        recipe={
            **plan.recipe,
            "bits": "auto",
            **wanted,
            "assigned": {f"layers.{layer}.{part}": bits for (layer, part), bits in bits_of.items()},
        },
        quantization=plan.quantization,
        extra_files=plan.extra_files,
        rotate=plan.rotate,
        consumers=consumers(set(rounded) or {usual}, schemes[usual], options),
        tuner=plan.tuner,
        original_inputs=plan.original_inputs,
    )

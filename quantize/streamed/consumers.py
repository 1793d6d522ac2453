"""Who reads a GPTQ artifact and who cannot, as it was tried (RESULTS.md): said when one is written."""

from __future__ import annotations

from collections.abc import Collection

from quantize.methods.grid import Scheme
from quantize.methods.solver import SolveOptions

__all__ = ["FUSED", "consumers"]

KERNELS = frozenset((4, 8))
"""Bits that vLLM and the fast GPU kernels read."""
FUSED = {"attention": "qkv_proj", "mlp": "gate_up_proj"}
"""What vLLM makes one linear of, and looks up in rules by that name."""


def consumers(widths: Collection[int], scheme: Scheme, options: SolveOptions) -> list[str]:
    """Return a line for each reader that takes only some artifacts; ``widths`` are the bits of rounded linears."""
    shown = " and ".join(map(str, sorted(widths)))
    if len(widths) == 1:
        who = "transformers (with GPTQModel or AutoGPTQ), GPTQModel and AutoGPTQ read it"
    else:
        who = "GPTQModel reads the dynamic rules"
    notes = [f"{shown} bits: {who}; {_in_vllm(widths, scheme, options)}"]
    if not scheme.symmetric:
        notes.append("asymmetric: GPTQModel's own loader refuses it from other tools; transformers reads it")
    if scheme.either_sign:
        notes.append(
            "scales of either sign: readers that multiply by them need nothing more; vLLM's Marlin with INT8 "
            "activations (off by default) divides scales by their largest, where --unsigned is the safe choice"
        )
    if options.act_order == "group":
        notes.append(
            "act order by groups: readers need g_idx and run slower; --act-order static has the same gain without it"
        )
    if len(widths) > 1:
        notes.append(
            "several bit widths: transformers (through optimum) and AutoGPTQ support one width only; the artifact "
            "makes them refuse it"
        )
    return notes


def _in_vllm(widths: Collection[int], scheme: Scheme, options: SolveOptions) -> str:
    """Say whether vLLM 0.32 reads it."""
    lacking = []
    if not KERNELS.issuperset(widths):
        lacking.append("4 and 8 bits only")
    if not scheme.symmetric:
        lacking.append("nothing asymmetric")
    if options.act_order == "group" and scheme.group_size != -1:
        lacking.append("no act order by groups")
    if lacking:
        return f"vLLM does not: it reads {', '.join(lacking)}"
    return "vLLM does, too" if set(widths) == {4} else "vLLM does, too, on GPUs"

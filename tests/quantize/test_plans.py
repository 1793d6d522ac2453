"""What a plan writes down: how it rounds, and who reads the outcome."""

from __future__ import annotations

import pytest

from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods.grid import Scheme
from quantize.methods.solver import SolveOptions
from safevlm.checkpoint.checkpoint import open_checkpoint


def test_how_scales_and_sweeps_were_is_in_the_recipe_so_that_an_unfinished_run_is_not_mixed_with_another() -> None:
    checkpoint = open_checkpoint("tiny-safegem")
    usual = gptq_plan(checkpoint, Scheme(group_size=32)).recipe
    assert (usual["signed"], usual["sweeps"], usual["damp"]) == (True, 2, 0.2)
    old = gptq_plan(checkpoint, Scheme(group_size=32, signed=False), SolveOptions(damp=0.05, sweeps=0)).recipe
    assert (old["signed"], old["sweeps"], old["damp"]) == (False, 0, 0.05)
    assert not gptq_plan(checkpoint, Scheme(group_size=32, symmetric=False)).recipe["signed"]
    assert gptq_plan(checkpoint, Scheme(group_size=32), nearest=True).recipe["sweeps"] == 0
    assert usual["beams"] == 1
    assert gptq_plan(checkpoint, Scheme(group_size=32), SolveOptions(beams=4)).recipe["beams"] == 4
    assert int8_plan().recipe["damp"] == 0.05


def test_who_divides_by_scales_is_told_that_they_may_be_negative() -> None:
    checkpoint = open_checkpoint("tiny-safegem")
    for scheme in (Scheme(group_size=32), Scheme(group_size=32, signed=False), Scheme(group_size=32, symmetric=False)):
        notes = gptq_plan(checkpoint, scheme).consumers
        assert any("--unsigned" in note for note in notes) == scheme.either_sign


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        (Scheme(bits=4, group_size=32), SolveOptions(), "AutoGPTQ read it; vLLM does, too"),
        (Scheme(bits=8, group_size=-1), SolveOptions(act_order="group"), "vLLM does, too, on GPUs"),
        (Scheme(bits=3, group_size=32), SolveOptions(), "vLLM does not: it reads 4 and 8 bits only"),
        (Scheme(bits=2, group_size=32, symmetric=False), SolveOptions(), "4 and 8 bits only, nothing asymmetric"),
        (Scheme(bits=4, group_size=32), SolveOptions(act_order="group"), "vLLM does not: it reads no act order"),
    ],
)
def test_who_reads_an_artifact_is_said_of_its_bits(scheme: Scheme, options: SolveOptions, said: str) -> None:
    plan = gptq_plan(open_checkpoint("tiny-safegem"), scheme, options)
    assert plan.consumers[0].startswith(f"{scheme.bits} bits: ") and said in plan.consumers[0]
    assert "modules_in_block_to_quantize" not in plan.quantization, "vLLM finds those names in the vision tower, too"

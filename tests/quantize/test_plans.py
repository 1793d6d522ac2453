"""What a plan writes down: how it rounds, and who reads the outcome."""

from __future__ import annotations

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

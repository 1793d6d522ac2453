"""Quantizing on CUDA, as far as it can be played on a CPU: what is counted, kept, launched, said and recorded.

Devices are CPUs that are described as GPUs; what a kernel computes is not tested here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.sets import samples as samples_module
from calibration.sets.samples import answers_of
from calibration.streaming.sequential import LayerStream
from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods import int8_method, solver
from quantize.methods.grid import Scheme
from quantize.methods.int8_method import W8A8, _Fold
from quantize.methods.settings import Plan, RunOptions
from quantize.methods.solver import SolveOptions, rows_together, solve
from quantize.streamed import compress as compress_module
from quantize.streamed.compress import compress
from quantize.streamed.estimate import check_memory, estimate
from quantize.streamed.layers import Rounded, Stage, linear_names
from quantize.streamed.options import describe
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.device import GpuUse
from safevlm.network.loading import load_safe_vlm
from tests.quantize.streamed.test_compress import FEW, QUICK, built_in, four_bits
from tests.quantize.streamed.test_estimate import rows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.25 GiB. GPU 0 has a total capacity of 8 GiB.")


# -- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["auto", "own"])
def test_a_model_that_the_gpu_has_no_room_for_is_not_loaded_onto_it(
    answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    checkpoint, options = open_checkpoint("tiny-safegem"), replace(FEW, answers=answers)
    chosen, said = built_in("tiny-safegem"), list[str]()
    monkeypatch.setattr(samples_module, "torch_device", lambda _: GPU)
    monkeypatch.setattr(samples_module, "gpu_room", lambda _: 2**30)
    monkeypatch.setattr(samples_module, "own_answers", load)
    ask = partial(answers_of, checkpoint, chosen.samples, options, max_memory=2**50, device="cuda", say=said.append)
    if answers == "own":
        with pytest.raises(InputError, match=r"exceeds the free memory of the GPU \(1\.0 GiB\)"):
            ask()
    else:
        assert all(answer is None or answer.ids is None for answer in ask())
        assert "of free GPU memory, so it cannot answer" in said[0]


def test_the_host_s_memory_does_not_bound_what_a_gpu_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = built_in("tiny-safegem")
    monkeypatch.setattr(samples_module, "torch_device", lambda _: GPU)
    monkeypatch.setattr(samples_module, "gpu_room", lambda _: 2**40)
    monkeypatch.setattr(samples_module, "own_answers", lambda *_, device, **__: [f"on {device}"])
    assert answers_of(open_checkpoint("tiny-safegem"), chosen.samples, FEW, max_memory=1, device="cuda") == [
        "on cuda:0"
    ]


# -- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_weights_count_in_the_dtype_that_they_run_in(name: str) -> None:
    checkpoint = open_checkpoint(name)
    layer = sum(
        torch.Size(checkpoint.tensors.shape(f"{full}.weight")).numel()
        for index, _, full in linear_names(checkpoint)
        if index == 0
    )
    count = partial(estimate, checkpoint, [rows(4, 100)], device=GPU, speed=1e9)
    full, half = count(dtype=torch.float32), count(dtype=torch.bfloat16)
    assert full.gpu - half.gpu >= layer * 2, "a float32 layer takes two bytes a weight more"
    assert full.memory == half.memory, "the host holds what is stored"
    on_cpu = estimate(checkpoint, [rows(4, 100)], dtype=torch.float32, device=CPU, speed=1e9)
    assert on_cpu.gpu == 0 and len(on_cpu.lines(2**40)) == len(full.lines(2**40)) - 1
    check_memory(full, full.memory, full.gpu)
    with pytest.raises(InputError, match=r"The GPU has .* free: about .* are needed\. Free it, use --dtype bfloat16"):
        check_memory(full, full.memory, full.gpu - 1)


def test_memory_that_runs_out_is_a_message_and_keeps_finished_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = four_bits(open_checkpoint("tiny-safegem"))

    class Second:
        """Rounds one layer, then finds the GPU full."""

        check = plan.method.check
        attach = plan.method.attach

        def round_layer(self, stage: Stage) -> Rounded:
            if stage.index:
                raise FULL
            return plan.method.round_layer(stage)

    with pytest.raises(
        InputError, match=r"^The GPU's memory is full: 7\.25 GiB more were needed\. Layers that are fin"
    ):
        attempt(tmp_path / "out", replace(plan, method=Second()))
    assert sorted(path.name for path in (tmp_path / ".out.unfinished").glob("layer-*")) == ["layer-00000.safetensors"]
    assert not (tmp_path / "out").exists()


def attempt(out: Path, plan: Plan, options: RunOptions = QUICK) -> Any:
    given = replace(FEW, answers="given")
    return compress(open_checkpoint("tiny-safegem"), out, plan, given, options, chosen=built_in("tiny-safegem"))


# -- the embedding table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_only_the_rows_that_are_used_are_held_and_they_are_the_model_s(name: str) -> None:
    checkpoint, used = open_checkpoint(name), [5, 9, 17, 9, -1]
    stream = LayerStream(checkpoint, token_ids=lambda _: used)
    table = stream.skeleton.core.get_input_embeddings()
    whole = load_safe_vlm(checkpoint).core.get_input_embeddings()
    held = sum(parameter.numel() for parameter in table.parameters())
    assert held == 5 * checkpoint.hidden_size, "ids 0, 5, 9, 17 and one of zeros"
    ids = torch.tensor([[5, 17, 0], [9, 9, 5]])
    assert torch.equal(table(ids), whole(ids))
    assert not table(torch.tensor([6])).any()
    assert table.weight.dtype == torch.float32 and table.embedding_dim == checkpoint.hidden_size


def test_the_rows_of_bfloat16_are_bfloat16() -> None:
    stream = LayerStream(open_checkpoint("tiny-safegem"), token_ids=lambda _: [5], dtype=torch.bfloat16)
    assert stream.skeleton.core.get_input_embeddings().weight.dtype == torch.bfloat16


# -- launches -----------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts operations that compute something, each of which a GPU would be told of; views are no work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(rows: int, columns: int) -> int:
    torch.manual_seed(0)
    inputs = torch.randn(4 * columns, columns)
    with Counting() as counting:
        solve([torch.randn(rows, columns)], inputs.T @ inputs, Scheme(bits=4, group_size=128), SolveOptions())
    return counting.count


def test_a_gpu_is_not_told_of_millions_of_operations() -> None:
    """Qwen-32B's down_proj: 5,120 rows of 27,648 columns, which are walked over once by GPTQ and once a sweep."""
    rows, columns, most = 5120, 27648, 1e6 * (1 + SolveOptions().sweeps)
    chunks = -(-rows // rows_together(columns, GPU))
    one = (operations(64, 512) - operations(64, 256)) / 256
    assert 5 < one < 40
    assert one * columns * chunks < most < one * columns * -(-rows // rows_together(columns, CPU))
    for width, height in ((4096, 22016), (11008, 4096), (5120, 55296)):
        assert rows_together(width, GPU) * width * 4 * 10 < 6e9, "and the copies fit on a small card"
        assert -(-height // rows_together(width, GPU)) <= 3


def test_rows_that_are_rounded_together_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(700, 128), torch.randn(512, 128)
    scheme = Scheme(bits=4, group_size=32)
    (few,) = solve([weight], inputs.T @ inputs, scheme)
    monkeypatch.setattr(solver, "TOGETHER", 1)
    (many,) = solve([weight], inputs.T @ inputs, scheme)
    assert torch.equal(few.ints, many.ints) and abs(few.loss / many.loss - 1) < 1e-4


def test_the_search_for_a_strength_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linears: Sequence[nn.Linear] = [nn.Linear(96, count, bias=False) for count in (300, 700)]
    sample = torch.randn(128, 96) * torch.logspace(-1, 1.5, 96)
    largest = sample.abs().amax(dim=0)
    other = torch.randn(64, 96) * torch.logspace(-1, 1.5, 96)

    def errors(factor: Tensor) -> Tensor:
        found = [int8_method._product(linear, factor, other) - linear(other) for linear in linears]
        return torch.cat(found, dim=1).square().sum(dim=1)

    search = partial(W8A8()._search, list(linears), largest, sample, _Fold(), torch.no_grad()(errors))
    factor, found = search()
    sizes: list[int] = []
    moved = int8_method._moved

    def watched(part: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(part))
        return moved(part, factor)

    monkeypatch.setattr(solver, "TOGETHER", 1)
    monkeypatch.setattr(int8_method, "_moved", watched)
    same, again = search()
    assert found["smoothing"] > 0 and found["descent"]["kept"] and found["smoothed_error"] < 1
    assert torch.equal(same, factor) and again["smoothing"] == found["smoothing"]
    assert abs(again["smoothed_error"] / found["smoothed_error"] - 1) < 1e-4
    assert max(sizes) == 256, "no copy is of all the rows"


# -- the record -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [four_bits, lambda _: int8_plan()])
def test_the_gpu_and_its_peak_are_recorded_and_decide_what_is_resumed(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def card(name: str) -> None:
        monkeypatch.setattr(compress_module, "gpu_use", lambda _: GpuUse(name=name, peak_bytes=5 * 2**30))

    made = plan(open_checkpoint("tiny-safegem"))
    card("NVIDIA A10")
    attempt(tmp_path / "out", made, replace(QUICK, layers=1))
    card("NVIDIA H100")
    with pytest.raises(InputError, match="other settings"):
        attempt(tmp_path / "out", made)
    card("NVIDIA A10")
    found = attempt(tmp_path / "out", made)
    measured = json.loads((tmp_path / "out" / "compression.json").read_text())["measured"]
    assert measured["gpu"] == "NVIDIA A10" and measured["peak_gpu_memory_bytes"] == 5 * 2**30
    assert " of NVIDIA A10; next: " in describe(found, "again")[-1]


def test_without_a_gpu_the_record_says_so(tmp_path: Path) -> None:
    found = attempt(tmp_path / "out", gptq_plan(open_checkpoint("tiny-safegem"), Scheme(bits=4, group_size=32)))
    assert found.record["measured"]["gpu"] is None and found.record["measured"]["peak_gpu_memory_bytes"] is None
    assert "NVIDIA" not in describe(found, "again")[-1]

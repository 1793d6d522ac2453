"""Products in bfloat16 with sums in float32: near to float32, the same bytes when resumed, and recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods.gptq_method import Gptq
from quantize.methods.grid import Scheme
from quantize.streamed import options as options_module
from quantize.streamed.caches import Caches
from quantize.streamed.layers import Rounded, round_layers
from quantize.streamed.options import run_of
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network import device as device_module
from safevlm.network.device import multiplies_bfloat16
from tests.quantize.streamed.test_compress import content, run
from tests.quantize.streamed.test_layers import prefills
from tests.safevlm.checkpoint.random_checkpoints import QUESTIONS, SIZE, Written, write_checkpoint

NARROW = torch.bfloat16
GIVEN = {"max_memory": None, "device": "cpu", "layers": None, "guard_images": 4}


@pytest.fixture(scope="module", params=[("llava", "original"), ("qwen2_5_vl", "old"), ("gemma3", "hf")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    family, layout = request.param
    return write_checkpoint(family, layout, tmp_path_factory.mktemp(family) / "checkpoint")


def rounded(written: Written, products: torch.dtype | None, watch: Callable[[nn.Module], None]) -> tuple[Any, Any]:
    """Return the reports of all layers, and last hidden states; ``watch`` sees each layer before it is rounded."""
    stream = LayerStream(
        open_checkpoint(str(written.folder), tap="language_model"),
        grid=SIZE[written.family],
        products=products,
        token_ids=lambda model: [token for question in QUESTIONS for token in model.prompt_ids(question)],
    )
    load = stream.load_layer

    def watched(index: int) -> nn.Module:
        layer = load(index)
        watch(layer)
        return layer

    stream.load_layer = watched  # type: ignore[method-assign]
    batches, report = prefills(stream.skeleton, written), list[Any]()

    def write(_: int, found: Rounded) -> None:
        report.extend(found.report)

    shapes = [(*batch.inputs_embeds.shape,) for batch in batches]
    with Activations(shapes, torch.float32, None) as hidden, Caches() as caches:  # type: ignore[arg-type]
        for number, batch in enumerate(batches):
            hidden[number].copy_(batch.inputs_embeds)
        method = Gptq(scheme_of=lambda _: Scheme(bits=8, group_size=32))
        round_layers(stream, batches, hidden, method, write=write, caches=caches)
        assert {kept.dtype for kept in caches._kept.values()} == {products or torch.float32}
        real = [batch.masks["attention_mask"].bool() for batch in batches]
        return report, torch.cat([hidden[number][mask].clone() for number, mask in enumerate(real)])


def test_mixed_is_near_float32_and_its_linears_multiply_bfloat16(written: Written) -> None:
    seen: dict[torch.dtype, set[torch.dtype]] = {torch.float32: set(), NARROW: set()}
    found = {}
    for dtype in seen:

        def watch(layer: nn.Module, dtype: torch.dtype = dtype) -> None:
            assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
            down: Any = layer.get_submodule("mlp.gate_proj")
            down.register_forward_hook(lambda _layer, _given, output: seen[dtype].add(output.dtype))

        found[dtype] = rounded(written, None if dtype == torch.float32 else dtype, watch)
    assert seen == {torch.float32: {torch.float32}, NARROW: {NARROW}}
    (report, states), (mixed_report, mixed_states) = found.values()
    assert states.dtype == mixed_states.dtype == torch.float32
    assert 1e-5 < (states - mixed_states).norm() / states.norm() < 0.03
    for one, other in zip(report, mixed_report, strict=True):
        assert one["linear"] == other["linear"] and one["damp"] == other["damp"]
        assert other["loss"] == pytest.approx(one["loss"], rel=0.15), one["linear"]


def test_a_mixed_run_that_is_resumed_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, out = run(tmp_path / "whole", products=NARROW), tmp_path / "out"
    assert whole.out is not None and whole.record["measured"]["dtype"] == "mixed"
    for layers in (1, 3):
        assert run(out, products=NARROW, layers=layers).out is None
    with pytest.raises(InputError, match=r'other settings \(run; run was {"dtype": "mixed".*, now {"dtype": "float32"'):
        run(out)
    again = run(out, products=NARROW)
    assert content(out) == content(whole.out) and again.record["layers"] == whole.record["layers"]
    assert again.record["answers"] == whole.record["answers"]
    other = run(tmp_path / "other")
    assert other.out is not None and content(other.out) != content(whole.out)
    assert json.loads((other.out / "compression.json").read_text())["measured"]["dtype"] == "float32"


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_mixed_where_the_processor_multiplies_bfloat16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "multiplies_bfloat16", lambda _: fast)
    assert run_of({**GIVEN, "dtype": "auto"}).dtype_name == ("mixed" if fast else "float32")
    assert run_of({**GIVEN, "dtype": "auto"}, rounds_inputs=True).dtype_name == "float32"
    for given in ("mixed", "float32", "bfloat16"):
        for rounds_inputs in (False, True):
            assert run_of({**GIVEN, "dtype": given}, rounds_inputs=rounds_inputs).dtype_name == given


def test_a_processor_says_what_it_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, fast in ((set(), False), ({"avx512f"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True)):
        monkeypatch.setattr(device_module, "cpu_flags", lambda flags=flags: frozenset(flags))
        assert multiplies_bfloat16(torch.device("cpu")) is fast

"""Other projects load what we write, and compute what we compute; each in an environment of its own.

``make peers`` makes the environments (tests/peers/*.txt). Without one its tests skip, except where CI is set.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantize.bits.auto_bits import mixed_plan
from quantize.bits.sensitivity import PARTS
from quantize.gptq import gptq_plan
from quantize.int8 import int8_plan
from quantize.methods.grid import Scheme
from quantize.methods.settings import Plan
from quantize.methods.solver import SolveOptions
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import QuantizedTensors
from safevlm.network.loading import load_safe_vlm
from tests.quantize.bits.test_sensitivity import auto
from tests.quantize.streamed.test_compress import run

ROOT = Path(__file__).parents[3]
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}


def peer(name: str) -> str:
    python = ROOT / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        assert not os.environ.get("CI"), f"CI must make .venv-{name}"
        pytest.skip(f"no .venv-{name}; make peers")
    return str(python)


def theirs(name: str, folder: Path, tmp_path: Path, *arguments: str) -> tuple[Tensor, str]:
    done = loaded(name, folder, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / f"{name}.pt"), done.stdout.strip().splitlines()[-1]


def loaded(name: str, folder: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    out = tmp_path / f"{name}.pt"
    torch.save(some_ids(folder), f"{out}.ids")
    return peers_run(name, str(ROOT / "tests" / "peers" / "load.py"), str(folder), str(out), *arguments, cwd=tmp_path)


def peers_run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **QUIET, "PYTHONPATH": ""}
    command = [peer(name), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=environment)


def some_ids(folder: Path) -> Tensor:
    vlm = load_safe_vlm(open_checkpoint(str(folder)))
    return torch.tensor([vlm.tokenizer.encode("What is the safe way to keep a red square?" * 2)[:40]])


def ours(folder: Path, monkeypatch: pytest.MonkeyPatch, *, rounded_to_16_bit: bool) -> Tensor:
    """Return our own logits; GPTQModel's torch kernel rounds dequantized weights to float16."""
    read = QuantizedTensors.read

    def half(self: Any, name: str, *, own: bool = False) -> Tensor:
        tensor = read(self, name, own=own)
        return tensor.half().float() if name in self._parts else tensor

    with monkeypatch.context() as patched:
        if rounded_to_16_bit:
            patched.setattr(QuantizedTensors, "read", half)
        vlm = load_safe_vlm(open_checkpoint(str(folder)))
    prefill = vlm.assemble(some_ids(folder).tolist())
    with torch.no_grad():
        return vlm.token_logits(vlm.language_forward(prefill.inputs_embeds, prefill.masks, prefill.position_ids))


MODELS = ("tiny-safellava", "tiny-safeqwen", "tiny-safegem")
SCHEMES = [
    *((model, Scheme(bits=4, group_size=32), SolveOptions()) for model in MODELS),
    ("tiny-safellava", Scheme(bits=8, group_size=-1), SolveOptions()),
    ("tiny-safeqwen", Scheme(bits=3, group_size=64, symmetric=False), SolveOptions(act_order="group")),
    ("tiny-safegem", Scheme(bits=2, group_size=32, symmetric=False), SolveOptions(act_order="none")),
]


@pytest.mark.parametrize(("model", "scheme", "options"), SCHEMES)
def test_transformers_reads_gptq_with_either_kernel(
    model: str, scheme: Scheme, options: SolveOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(checkpoint: Any) -> Plan:
        return gptq_plan(checkpoint, scheme, options)

    folder = run(tmp_path / "out", model, plan).out
    assert folder is not None
    for name, arguments, kernel in (
        ("gptqmodel", ("gptq_torch",), "gptqmodel."),
        ("autogptq", (), "auto_gptq."),
    ):
        found, what = theirs(name, folder, tmp_path, *arguments)
        assert what.startswith(kernel), what
        expected = ours(folder, monkeypatch, rounded_to_16_bit=name == "gptqmodel")
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), name


@pytest.mark.parametrize("model", MODELS)
def test_transformers_reads_w8a8_with_compressed_tensors(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(tmp_path / "out", model, lambda _: int8_plan()).out
    assert folder is not None
    found, _ = theirs("gptqmodel", folder, tmp_path)
    expected = ours(folder, monkeypatch, rounded_to_16_bit=False)
    # a rounding of an activation that falls the other way moves a logit by more than float32's own error
    assert (found - expected).abs().mean() <= 1e-4 * expected.abs().max()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_several_widths_are_told_by_rules_and_refused_where_rules_are_not_known(tmp_path: Path) -> None:
    found = run(tmp_path / "out", "tiny-safellava", auto(3.0))
    assert found.out is not None
    assigned = {name: bits for name, bits in found.record["method"]["assigned"].items() if bits != 16}
    assert len(set(assigned.values())) > 1
    for name, arguments in (("gptqmodel", ("gptq_torch",)), ("autogptq", ())):
        done = loaded(name, found.out, tmp_path, *arguments)
        assert done.returncode != 0 and "several bit widths" in done.stderr, name
    code = (
        "import json, sys; from gptqmodel import QuantizeConfig\n"
        "config = QuantizeConfig.from_pretrained(sys.argv[1])\n"
        "print(json.dumps({name: config.dynamic_get(name, 'bits', config.bits) for name in sys.argv[2:]}))"
    )
    modules = [f"model.language_model.{unit.rsplit('.', 1)[0]}.{PARTS[unit.rsplit('.', 1)[1]][0]}" for unit in assigned]
    done = peers_run("gptqmodel", "-c", code, str(found.out), *modules, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == dict(zip(modules, assigned.values(), strict=True))


def test_units_in_16_bit_are_read_by_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(checkpoint: Any) -> Plan:
        bits_of = {(layer, part): 16 if (layer, part) == (1, "mlp") else 4 for layer in range(3) for part in PARTS}
        return mixed_plan(
            checkpoint,
            bits_of,
            {4: Scheme(bits=4, group_size=32)},
            SolveOptions(),
            lambda scheme, more: gptq_plan(checkpoint, scheme, SolveOptions(), more),
            {},
        )

    folder = run(tmp_path / "out", "tiny-safellava", plan).out
    assert folder is not None
    for name, arguments in (("gptqmodel", ("gptq_torch",)), ("autogptq", ())):
        found, _ = theirs(name, folder, tmp_path, *arguments)
        expected = ours(folder, monkeypatch, rounded_to_16_bit=name == "gptqmodel")
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max(), name

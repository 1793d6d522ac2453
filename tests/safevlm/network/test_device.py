"""A device is found by its name or refused in words, and float32 on it is float32."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from runtimes.language.torch_language import TorchLanguageRunner
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network import device
from safevlm.network.device import gpu_room, gpu_use, reset_gpu_peak, torch_device
from safevlm.terminal.commands import COMMANDS
from tests.safevlm.network.fake_gpus import GPU, install

ROOT = Path(__file__).parents[3]
PACKAGES = ("safevlm", "runtimes", "calibration", "quantize", "export", "benchmarks")


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "mps", "meta", "cuda:1\n"])
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="use cpu, cuda or cuda:N"):
        torch_device(name)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_there_computes_in_true_float32(name: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 2)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert torch_device(name) == torch.device("cuda", index)
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch_device(torch.device(name)) == torch.device("cuda", index)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:9", "cuda:256", "cuda:999999999"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 2)
    with pytest.raises(InputError, match=f"--device {name}: there is no such GPU here. Use cuda:0 to cuda:1, or cpu"):
        torch_device(name)


def test_without_a_gpu_the_driver_s_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        warnings.warn("CUDA initialization: the driver is too old.\nUpdate it.", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    with pytest.raises(InputError, match=r"no CUDA GPU here \(CUDA initialization: the driver is too old\.\)"):
        torch_device("cuda")
    assert torch_device("cpu") == torch.device("cpu"), "and a CPU asks for no driver"


def test_a_gpu_that_cannot_compute_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def useless(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    attempt = device._try
    install(monkeypatch, 1)
    monkeypatch.setattr(device, "_try", attempt)
    monkeypatch.setattr(torch, "ones", useless)
    with pytest.raises(InputError, match=r"--device cuda: the GPU cannot be used by torch .*no kernel image is"):
        torch_device("cuda")


def test_a_gpu_has_a_name_and_a_peak_and_a_cpu_none(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 1, free=5)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    reset_gpu_peak(cpu)
    assert gpu_room(gpu) == 5 and gpu_room(cpu) is None and gpu_use(cpu) is None
    use = gpu_use(gpu)
    assert use is not None and use.name == GPU and use.peak_bytes == 3 * 2**30


@pytest.mark.parametrize(("available", "room"), [(1, 5), (7, 7), (64, 10)])
def test_an_integrated_gpu_has_room_where_the_system_would_give_memory_back(
    monkeypatch: pytest.MonkeyPatch, available: int, room: int
) -> None:
    monkeypatch.setattr("safevlm.machine.available_memory", lambda: available)
    install(monkeypatch, 1, free=5, integrated=True)
    assert gpu_room(torch.device("cuda")) == room
    install(monkeypatch, 1, free=5)
    assert gpu_room(torch.device("cuda")) == 5, "one with memory of its own has what it says"


def test_no_other_file_makes_devices_or_asks_torch_about_gpus() -> None:
    """So none forgets to check the name, or computes in TF32. The line-up only asks whether a peer can run."""
    asks = re.compile(r"\btorch\.(device\([^)|]|cuda\.)|\.cuda\(\)|\.to\(['\"]cuda")
    allowed = {"safevlm/network/device.py", "benchmarks/speed/guard_peers.py"}
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if asks.search(line) and "``" not in line and "benchmarks/gpu_proof/" not in str(path)
    }
    assert found == allowed


# -- the commands that take --device ---------------------------------------------------------------------


def arguments(module: str, folder: Path) -> list[str]:
    """Return the least that each command needs to come to its device."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"query": "What is two and two?", "answer": "Four.", "kind": "text"}\n')
    tiny, out = ["--model", "tiny-safellava"], ["--out", str(folder / "out")]
    return {
        "quantize.gptq": [*tiny, *out],
        "quantize.int8": [*tiny, *out],
        "calibration.distill": [*tiny, *out],
        "calibration.answers": [*tiny, *out, "--calibration", str(rows)],
        "benchmarks.run": [*tiny, *out, "--suite", "holisafe-mini", "--limit", "2"],
    }[module]


def has_device(command: click.Command) -> bool:
    return any(parameter.name == "device" for parameter in command.params)


TAKING = sorted(module for module in set(COMMANDS.values()) if has_device(import_module(module).main))


@pytest.mark.parametrize("name", ["cuda:9", "gpu"])
@pytest.mark.parametrize("module", [each for each in TAKING if not each.startswith("runtimes.")])
def test_every_command_refuses_a_device_that_is_not_there(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, 1)
    ended = CliRunner().invoke(import_module(module).main, [*arguments(module, tmp_path), "--device", name])
    assert isinstance(ended.exception, InputError), (ended.output, ended.exception)
    assert f"--device {name}: " in str(ended.exception) and not (tmp_path / "out" / "samples.jsonl").exists()


def test_the_gate_s_language_model_refuses_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, 1)
    with pytest.raises(InputError, match=r"--device cuda:9: there is no such GPU here\. Use cuda:0, or cpu"):
        TorchLanguageRunner(open_checkpoint("tiny-safellava"), device="cuda:9").activate()

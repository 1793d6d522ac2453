"""``benchmarks.speed guard``: every peer is measured or explained, and the figures fit together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.shapes.random_guard import build_random_guard
from benchmarks.speed import __main__ as speed
from benchmarks.speed import guard as guard_speed
from benchmarks.speed import guard_engine, guard_peers, guard_source, reference_runner
from benchmarks.speed.guard import GuardSpeed, Row, SpeedOptions, measure_guard
from benchmarks.speed.guard_peers import measure
from benchmarks.speed.isolation import Outcome
from benchmarks.speed.peer import Subject
from export.tensorrt.engine import Device
from runtimes.guard.bundle import open_bundle
from runtimes.guard.cuda import Gpu
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.configs.processor_config import read_processor
from safevlm.errors import InputError, SafeVLMError
from safevlm.terminal.commandline import run
from tests.benchmarks.shapes.test_random_guard import small_shape
from tests.runtimes.bundles import guard_graph
from tests.safevlm.checkpoint.random_checkpoints import write_checkpoint

QUICK = SpeedOptions(batches=(2, 1), rounds=1, repeats=2, seconds=0.05, threads=1)


def in_process(function: str, request: Mapping[str, Any], *, threads: int) -> Outcome:
    """Stand in for a process: the same function on the same JSON, here."""
    module, _, name = function.partition(":")
    answers = getattr(import_module(module), name)(json.loads(json.dumps(request)))
    try:
        return Outcome(answers=tuple(json.loads(json.dumps(answer)) for answer in answers))
    except SafeVLMError as error:
        return Outcome(answers=(), problem=str(error), exit_code=error.exit_code)


def _small(size: tuple[int, int]) -> bytes:
    return guard_graph(np.zeros((3, 20), np.float32), size=size).SerializeToString()


def _write_small(_graph: Any, example: Any, path: Path) -> None:
    """Write a graph of the example's size and 20 classes, without exporting anything."""
    path.write_bytes(_small(example.shape[1:3]))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write some bytes where an ONNX file would stand: exporting has its own tests."""
    monkeypatch.setattr(guard_source, "write_onnx", _write_small)


# -- the real thing -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Run the command as a user does: its record from ``--out`` and what it printed."""
    folder = tmp_path_factory.mktemp("speed")
    model, out = write_checkpoint("gemma3", "hf", folder / "model").folder, folder / "speed.json"
    quick = ["--embeddings", "--batch=2", "--batch=1", "--rounds=1", "--repeats=2", "--seconds=0.05", "--threads=1"]
    command = [sys.executable, "-m", "benchmarks.speed", "guard", "--model", str(model), *quick, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return json.loads(out.read_text()), done.stdout


def row_of(record: dict[str, Any], runtime: str, batch: int, device: str = "cpu") -> dict[str, Any]:
    wanted = (runtime, batch, device, "guard")
    (row,) = (row for row in record["rows"] if (row["runtime"], row["batch"], row["device"], row["work"]) == wanted)
    return dict(row)


def test_every_peer_is_measured_or_explained(told: tuple[dict[str, Any], str]) -> None:
    record, _ = told
    for runtime, device in (("torch", "cpu"), ("onnxruntime", "cpu"), ("torch", "gpu"), ("tensorrt", "gpu")):
        for batch in (1, 2):
            row = row_of(record, runtime, batch, device)
            assert (row["latency"] is not None) == (row["status"] == "measured")
            assert row["latency"] is not None or row["reason"]
            assert row["weights"] == "checkpoint"
    assert {row["status"] for row in record["rows"] if row["device"] == "cpu"} == {"measured"}


def test_record_says_what_where_when(told: tuple[dict[str, Any], str]) -> None:
    record, _ = told
    assert {"created", "command", "machine", "versions", "settings", "subject", "how_measured"} <= set(record)
    assert "benchmarks.speed guard --model" in record["command"]
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["threads"] == 1
    assert (record["subject"]["height"], record["subject"]["width"]) == (56, 56)


def test_figures_fit_together(told: tuple[dict[str, Any], str]) -> None:
    record, _ = told
    for batch in (1, 2):
        reference, ours = row_of(record, "torch", batch), row_of(record, "onnxruntime", batch)
        times = reference["latency"]["median_ms"] / ours["latency"]["median_ms"]
        assert ours["ratio_to_torch_eager"] == pytest.approx(times)
        assert reference["ratio_to_torch_eager"] == 1
        assert 0 < ours["max_abs_prob_delta"] < 1e-5, "0 would mean that torch was compared with itself"
        assert ours["latency"]["ms_per_image"] == pytest.approx(ours["latency"]["median_ms"] / batch)
        assert 1 <= ours["latency"]["runs"] <= 2
        # torch and transformers alone are larger: they are not in ONNX Runtime's process.
        assert 20 * 2**20 < ours["peak_rss_bytes"] < 0.7 * reference["peak_rss_bytes"]
    assert row_of(record, "onnxruntime", 1)["peak_rss_bytes"] <= row_of(record, "onnxruntime", 2)["peak_rss_bytes"]
    assert row_of(record, "torch", 1)["size_bytes"] == 4 * record["subject"]["parameters"]


def test_table(told: tuple[dict[str, Any], str]) -> None:
    record, printed = told
    lines = printed.splitlines()
    (head,) = (line for line in lines if line.startswith("peer"))
    row = row_of(record, "onnxruntime", 2)
    (line,) = (line for line in lines if line.startswith("ONNX Runtime") and line.split()[4] == "2")
    end = head.index("median ms") + len("median ms")
    assert line[:end].endswith(f" {row['latency']['median_ms']:.2f}")
    assert len(line) == len(head)
    if row_of(record, "tensorrt", 1, "gpu")["status"] != "measured":
        assert len([line for line in lines if line.startswith("not measured: TensorRT")]) == 1


def test_a_shared_tower_is_measured_beside_the_tower_alone(told: tuple[dict[str, Any], str]) -> None:
    record, printed = told
    works = {(row["work"], row["batch"]): row for row in record["rows"] if row["runtime"] == "onnxruntime"}
    assert set(works) == {(work, batch) for work in ("guard", "shared", "vision") for batch in (1, 2)}
    assert works["shared", 2]["max_abs_prob_delta"] < 1e-5 and works["vision", 2]["max_abs_prob_delta"] is None
    shared, alone = (works[work, 2]["latency"]["median_ms"] for work in ("shared", "vision"))
    assert f"fp32, batch 2: {shared / alone - 1:+.1%} over the vision tower alone" in printed


# -- random weights -------------------------------------------------------------------------------------


def test_shape_is_measured_and_marked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_export: None, one_thread: None
) -> None:
    """Random weights run on torch, a bundle is measured beside them, and everything says what they are."""
    monkeypatch.setattr(reference_runner, "find_shape", lambda _: small_shape("llava"))
    subject = Subject(name="SafeLLaVA-7B", random=True, layers=1)
    request = {"subject": dataclasses.asdict(subject), "precisions": ["fp32"], "bundle": None, "folder": str(tmp_path)}
    request["embeddings"] = False
    list(guard_source.prepare(request))
    monkeypatch.setattr(guard_speed, "open_bundle", unverified(open_bundle))
    script = Script()

    def torch_for_real(function: str, request: Mapping[str, Any], *, threads: int) -> Outcome:
        real = request.get("peer", {}).get("runtime") == "torch" and request["peer"]["device"] == "cpu"
        return (in_process if real else script)(function, request, threads=threads)

    monkeypatch.setattr(guard_speed, "run_isolated", torch_for_real)
    found = measure_guard(subject, QUICK, bundle=tmp_path)
    runs = [(row.peer, row.batch) for row in found.rows if row.status == "measured"]
    given = f"ONNX Runtime ({tmp_path})"
    assert all(row.max_abs_prob_delta is None for row in found.rows if row.peer == given), "other weights"
    assert runs == [(peer, batch) for peer in ("torch eager", "ONNX Runtime", given) for batch in (1, 2)]
    assert {row.weights for row in found.rows} == {"random"}
    assert speed.guard_record(found, "command")["subject"]["weights"].startswith("random weights")
    assert "random weights" in speed.guard_table(found)[0] and "1 vision layers" in speed.guard_table(found)[0]
    monkeypatch.setattr(reference_runner, "find_shape", lambda _: small_shape("qwen2_5_vl"))
    with pytest.raises(InputError, match=r"takes images of 336x336 pixels.* 448x448.*Give the --model or --shape"):
        measure_guard(subject, QUICK, bundle=tmp_path)


def unverified(opening: Any) -> Any:
    """Open a scratch bundle, whose hashes are not filled in, as one that was given."""
    return lambda folder, **_: opening(folder, verify=False)


class Growing:
    """A runner in a process that holds 1 GiB and grows by 1 GiB an image; 4 GiB are free."""

    preprocessing = build_random_guard(small_shape("llava"), seed=0).preprocessing

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = 1
        monkeypatch.setattr("benchmarks.speed.guard_peers._open_runner", lambda *_: self)
        monkeypatch.setattr("benchmarks.speed.guard_peers.peak_rss", lambda: self.held * 2**30)
        monkeypatch.setattr("benchmarks.speed.guard_peers.restart_peak", lambda: None)
        monkeypatch.setattr("benchmarks.speed.guard_peers.available_memory", lambda: (5 - self.held) * 2**30)

    def __enter__(self) -> Growing:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def infer(self, images: Any, *, embeddings: bool) -> Any:
        self.held = max(self.held, 1 + len(images))
        return type("Output", (), {"probs": np.full((len(images), 2), 0.5)})


BUDGET = {
    "peer": {"runtime": "torch", "precision": "fp32"},
    "subject": {"name": "x", "random": True},
    "threads": 1,
    "seed": 0,
    "repeats": 4,
    "seconds": 60,
}


def test_measure_stops_at_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run is timed even where the time is up, and never more than ``repeats``."""
    Growing(monkeypatch)
    (first, second) = measure({**BUDGET, "batches": [3, 1]})
    assert [first["batch"], second["batch"]] == [1, 3], "the smaller batch first, or its memory is the larger's"
    assert len(first["times_ms"]) == 4 and len(second["probs"]) == 3
    assert len(next(measure({**BUDGET, "batches": [1], "seconds": 1e-9}))["times_ms"]) == 1


def test_measure_skips_what_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    Growing(monkeypatch)
    first, second, third = measure({**BUDGET, "batches": [1, 4, 5]})
    assert first["peak_rss_bytes"] == 2 * 2**30 and len(second["probs"]) == 4, "4 images just fit"
    assert third == {"batch": 5, "skipped": "batch 5 needs about 6.0 GiB, but only 5.0 GiB is available here"}


# -- rounds ---------------------------------------------------------------------------------------------


class Script:
    """Play the processes: torch takes 10, 12, 20 ms in its rounds, ONNX Runtime 5, 4, 6."""

    times: Mapping[str, tuple[float, ...]] = {"torch": (10.0, 12.0, 20.0), "onnxruntime": (5.0, 4.0, 6.0)}

    def __init__(self, killed_in_round: int | None = None) -> None:
        self.order: list[str] = []
        self.killed_in_round = killed_in_round

    def __call__(self, function: str, request: Mapping[str, Any], *, threads: int) -> Outcome:
        if function.endswith(":build"):
            return Outcome(answers=(), problem="no TensorRT", exit_code=6)
        if function.endswith(":prepare"):
            return in_process(function, request, threads=threads)
        runtime = request["peer"]["runtime"]
        if request["peer"]["device"] == "gpu":
            return Outcome(answers=(), problem="no GPU", exit_code=2)
        number = self.order.count(runtime)
        self.order.append(runtime)
        if runtime == "onnxruntime" and number == self.killed_in_round:
            return Outcome(answers=(), problem="the process was ended by SIGKILL", exit_code=1)
        time = self.times[runtime][number]
        found = {"times_ms": [time, 3 * time, time], "peak_rss_bytes": number}
        answers = [{**found, "batch": batch, "probs": [[0.05] * 20] * batch} for batch in request["batches"]]
        return Outcome(answers=tuple(answers))


@pytest.fixture(scope="module")
def scratch_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("gemma3", "hf", tmp_path_factory.mktemp("model")).folder)


def scripted(script: Script, model: str, monkeypatch: pytest.MonkeyPatch) -> GuardSpeed:
    monkeypatch.setattr(guard_speed, "run_isolated", script)
    return measure_guard(Subject(name=model, random=False), SpeedOptions(batches=(4,), rounds=3, threads=1))


def cpu_row(found: GuardSpeed, runtime: str) -> Row:
    (row,) = (row for row in found.rows if row.runtime == runtime and row.device == "cpu")
    return row


@pytest.mark.usefixtures("no_export")
def test_rounds_alternate_and_are_summed_up(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    found = scripted(script, scratch_model, monkeypatch)
    assert script.order == ["torch", "onnxruntime", "onnxruntime", "torch", "torch", "onnxruntime"]
    row = cpu_row(found, "torch")
    assert row.latency is not None and row.latency.rounds_ms == (10, 12, 20)
    assert (row.latency.median_ms, row.latency.spread_ms, row.latency.ms_per_image) == (12, 10, 3)
    assert row.latency.p95_ms == pytest.approx(np.percentile([10, 30, 10, 12, 36, 12, 20, 60, 20], 95))
    assert row.latency.runs == 9 and row.peak_rss_bytes == 2
    assert cpu_row(found, "onnxruntime").ratio_to_torch_eager == pytest.approx(12 / 5)
    assert {row.reason for row in found.rows if row.device == "gpu"} == {"no GPU", "no TensorRT"}
    assert {row.status for row in found.rows if row.device == "gpu"} == {"unavailable"}


@pytest.mark.usefixtures("no_export")
def test_killed_peer_is_told_and_not_started_again(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(killed_in_round=0)
    found = scripted(script, scratch_model, monkeypatch)
    row = cpu_row(found, "onnxruntime")
    assert (row.status, row.latency, row.reason) == ("failed", None, "the process was ended by SIGKILL")
    size = read_processor(open_checkpoint(scratch_model).processor, family="gemma3")
    assert row.size_bytes == len(_small((size.height, size.width))), "the file was written"
    assert script.order.count("onnxruntime") == 1 and script.order.count("torch") == 3
    line = "not measured: ONNX Runtime fp32 on cpu, batch 4: the process was ended by SIGKILL"
    assert line in speed.guard_table(found)


@pytest.mark.usefixtures("no_export")
def test_skipped_batch_is_told_and_others_are_measured(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_8(function: str, request: Mapping[str, Any], *, threads: int) -> Outcome:
        if not function.endswith(":measure"):
            return script(function, request, threads=threads)
        outcome = script(function, {**request, "batches": [1]}, threads=threads)
        return dataclasses.replace(outcome, answers=(*outcome.answers, {"batch": 8, "skipped": "batch 8 is too much"}))

    script = Script()
    monkeypatch.setattr(guard_speed, "run_isolated", skip_8)
    found = measure_guard(Subject(name=scratch_model, random=False), SpeedOptions(rounds=3, threads=1))
    one, eight = (row for row in found.rows if row.runtime == "onnxruntime")
    assert one.latency is not None and len(one.latency.rounds_ms) == 3 and one.reason is None
    assert (eight.status, eight.latency, eight.reason) == ("unavailable", None, "batch 8 is too much")
    assert "not measured: ONNX Runtime fp32 on cpu: batch 8 is too much" in speed.guard_table(found)


@pytest.mark.usefixtures("no_export")
def test_engine_is_built_and_measured(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are TensorRT and a GPU, the exported file becomes an engine for all batch sizes."""
    device = Device(SimpleNamespace(__name__="tensorrt", __version__="10.3.0"), Gpu("some GPU", "8.7"))
    built: list[tuple[str, int]] = []

    def build_engine(trt: Any, source: Path, plan: Path, size: Any, options: Any, **_: Any) -> None:
        plan.write_bytes(b"an engine")
        built.append((source.name, options.max_batch))

    monkeypatch.setattr(guard_engine, "find_device", lambda request: device)
    monkeypatch.setattr(guard_engine, "build_engine", build_engine)
    script, measured = Script(), []

    def build_for_real(function: str, request: Mapping[str, Any], *, threads: int) -> Outcome:
        if function.endswith(":measure"):
            measured.append((request["peer"]["runtime"], request["peer"]["device"]))
        return (in_process if function.endswith(":build") else script)(function, request, threads=threads)

    monkeypatch.setattr(guard_speed, "run_isolated", build_for_real)
    found = measure_guard(Subject(name=scratch_model, random=False), dataclasses.replace(QUICK, batches=(1, 3)))
    assert built == [("guard.fp32.onnx", 3)]
    assert ("tensorrt", "gpu") in measured
    rows = [row for row in found.rows if row.runtime == "tensorrt"]
    assert [(row.batch, row.precision, row.size_bytes) for row in rows] == [(1, "fp32", 9), (3, "fp32", 9)]


@pytest.mark.usefixtures("no_export")
def test_peer_killed_in_a_later_round_keeps_its_figures(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted(Script(killed_in_round=1), scratch_model, monkeypatch)
    row = cpu_row(found, "onnxruntime")
    assert row.status == "measured" and row.latency is not None and row.latency.rounds_ms == (5,)
    assert any(line.startswith("measured in some rounds only: ONNX Runtime") for line in speed.guard_table(found))


def test_measuring_process_loads_no_torch() -> None:
    code = "import sys, benchmarks.speed.guard_peers, benchmarks.speed.__main__\n"
    code += "print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "set()"


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape SafeLava-7B", r"--shape SafeLava-7B is unknown.*SafeGem-27B.*nearest is SafeLLaVA-7B"),
        ("--shape nothing-like-it", r"is unknown\. Allowed: [^.]*SafeLLaVA-7B(?!.*nearest)"),
        ("", r"give either --model .* or --shape .*; neither was given"),
        ("--shape SafeGem-12B --model x", "both were given"),
        ("--shape SafeGem-12B --batch 0", r"--batch 0 is not allowed. Give batch sizes of at least 1"),
        ("--shape SafeGem-12B --batch 1 --batch 1", r"--batch 1, 1 is not allowed.*each once"),
        (
            "--shape SafeGem-12B --precision int3",
            r"--precision int3 is not allowed. Give one or more of fp32, fp16, int8",
        ),
        ("--shape SafeGem-12B --precision int8", r"--precision int8: INT8 files and peers are made from fp32"),
        ("--shape SafeGem-12B --peers --peers-python /no/such", r"/no/such: there is no such file\. Run make peers"),
        ("--shape SafeGem-12B --rounds 0", r"--rounds 0 is not allowed. Give at least 1"),
        ("--shape SafeGem-12B --seconds nan", r"--seconds nan is not allowed. Give a time above 0"),
        ("--shape SafeLLaVA-7B --layers 24", r"--layers 24: .*reads 23 layers.*Give 1 to 23"),
        ("--shape SafeLLaVA-7B --layers 0", r"--layers 0: .*1 to 23"),
        ("--shape SafeLLaVA-7B --tap projector", r"need --model"),
        ("--model x --layers 2", r"needs --shape"),
        ("--shape SafeGem-12B --out /", r"--out / is a folder"),
        ("--shape SafeGem-12B --out /no/such/x.json", r"no folder /no/such"),
        ("--shape SafeGem-12B --bundle /no/such", r"/no/such is missing, not a guard bundle"),
        ("--shape", "requires an argument"),
    ],
)
def test_bad_input(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_speed, "run_isolated", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(SystemExit) as ended:
        run(speed.main, ["guard", *arguments.split()])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, printed.err.replace("\n", " ")), printed.err


def test_language_model_tap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_speed, "run_isolated", in_process)
    folder = write_checkpoint("llava", "hf", tmp_path).folder
    with pytest.raises(InputError, match=r"calibration\.distill"):
        measure_guard(Subject(name=str(folder), random=False), QUICK)


@pytest.mark.usefixtures("no_export")
def test_failed_peer_is_exit_code_1(
    scratch_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["guard", "--model", scratch_model, "--json", "--batch", "4"]
    for script, code in ((Script(), 0), (Script(killed_in_round=0), 1)):
        monkeypatch.setattr(guard_speed, "run_isolated", script)
        with pytest.raises(SystemExit) as ended:
            run(speed.main, arguments)
        assert ended.value.code == code
        assert json.loads(capsys.readouterr().out)["benchmark"] == "guard"


@pytest.mark.usefixtures("no_export", "one_thread")
def test_on_the_gpu_alone_every_peer_says_what_it_lacks(scratch_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU. ONNX Runtime starts on the CPU instead, which must not pass for the GPU's time."""
    monkeypatch.setattr(guard_speed, "run_isolated", in_process)
    monkeypatch.setattr(guard_peers, "CUDA_DRIVER", "libno-such-driver.so")
    monkeypatch.setattr(guard_peers, "CUDA_PROVIDER", "NoSuchProvider")
    options = dataclasses.replace(QUICK, batches=(1,), precisions=("fp32", "fp16"), gpu_alone=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ONNX Runtime's, about the provider
        found = measure_guard(Subject(name=scratch_model, random=False), options)
    assert {row.device for row in found.rows} == {"gpu"} and {row.status for row in found.rows} == {"unavailable"}
    runtimes = ("torch", "compile", "onnxruntime", "tensorrt")
    expected = [(runtime, precision) for runtime in runtimes for precision in ("fp32", "fp16")]
    assert [(row.runtime, row.precision) for row in found.rows] == expected
    said = {row.runtime: row.reason or "" for row in found.rows}
    assert "no CUDA GPU" in said["compile"] and "cannot use NoSuchProvider" in said["onnxruntime"]
    with pytest.raises(InputError, match="--gpu-alone leaves out the CPU"):
        SpeedOptions(gpu_alone=True, peers="python")

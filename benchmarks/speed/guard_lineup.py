"""Who takes part in ``benchmarks.speed guard``: ours, one a file, and what people use today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.speed.isolation import Outcome
from benchmarks.speed.peer import NNCF_FILE, PLAIN, Device, Peer, Runtime, Work
from runtimes.guard.bundle import Bundle, open_bundle
from safevlm.contract.manifest import GuardFile

__all__ = ["Measured", "line_up", "line_up_gpu"]

INT8 = "int8"


@dataclass
class Measured:
    """What the rounds gave of one peer so far; a peer that ended early is not started again."""

    peer: Peer
    size_bytes: int | None
    answers: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    problem: str | None = None
    exit_code: int = 0

    def add(self, outcome: Outcome) -> None:
        """Keep a round's answers, by batch size, and why there are no more."""
        for answer in outcome.answers:
            if "skipped" in answer:
                self.skipped[answer["batch"]] = answer["skipped"]
            else:
                self.answers.setdefault(answer["batch"], []).append(answer)
        self.problem, self.exit_code = outcome.problem, outcome.exit_code


def line_up(
    guard: Mapping[str, Any],
    scratch: Bundle,
    given: Bundle | None,
    engines: Outcome,
    *,
    python: str | None = None,
    nncf: Outcome | None = None,
) -> list[Measured]:
    """Return the peers in the order of the table: torch, what people use, then each file of the bundles.

    ``engines`` says why the scratch bundle lacks an engine, if it does; ``python`` has OpenVINO, and ``nncf`` says
    why there is no INT8 file of NNCF's.
    """
    stored = int(guard["stored_bytes"])
    devices: tuple[Device, ...] = ("cpu", "gpu")
    peers = [Measured(Peer(runtime="torch", precision="fp32", device=device), stored) for device in devices]
    if python is not None and nncf is not None:
        peers += _others(stored, scratch, python, nncf)
    for bundle in (scratch, given):
        if bundle is not None:
            files = (*bundle.files("onnx"), *bundle.files("engine"))
            peers += [_file_peer(bundle, file, given=bundle is given) for file in files]
    return peers + _without_engine(scratch, engines)


def line_up_gpu(
    guard: Mapping[str, Any], scratch: Bundle, given: Bundle | None, engines: Outcome, precisions: Sequence[str]
) -> list[Measured]:
    """Return the peers on a GPU: torch eager and compiled, ONNX Runtime's CUDA provider, TensorRT.

    torch runs float32 untouched, and float16 as it is exported.
    """
    stored = int(guard["stored_bytes"])
    runtimes: tuple[Runtime, ...] = ("torch", "compile")
    asked = ["fp32", *(each for each in precisions if each == "fp16")]
    peers = [
        Measured(Peer(runtime=runtime, precision=precision, device="gpu"), stored // (1 + (precision == "fp16")))
        for runtime in runtimes
        for precision in asked
    ]
    for bundle in (scratch, given):
        if bundle is not None:
            for file in (*bundle.files("onnx"), *bundle.files("engine")):
                found = _file_peer(bundle, file, given=bundle is given)
                if found.peer.runtime != "openvino":  # static INT8 is not for ONNX Runtime
                    peers.append(replace(found, peer=replace(found.peer, device="gpu")))
    return peers + _without_engine(scratch, engines)


def _without_engine(scratch: Bundle, engines: Outcome) -> list[Measured]:
    """Return a row for each file that no engine was built of, with the reason."""
    peers = []
    built = {file.precision for file in scratch.files("engine")}
    for file in scratch.files("onnx"):
        if file.precision not in built and _work(file) == "guard" and file.precision != "int8-dynamic":
            missing = Peer(
                runtime="tensorrt", precision=file.precision, device="gpu", bundle=str(scratch.folder), ours=True
            )
            problem = engines.problem or "this TensorRT builds it from the fp32 file; add fp32 to --precision"
            peers.append(Measured(missing, None, problem=problem, exit_code=engines.exit_code or 2))
    return peers


def _others(stored: int, scratch: Bundle, python: str, nncf: Outcome) -> list[Measured]:
    """Return what people use on a CPU today, on the same guard as PyTorch's exporter writes it."""
    plain = open_bundle(scratch.folder / PLAIN, verify=False)
    peers = [Measured(Peer(runtime="compile", precision="fp32"), stored)]
    for file in plain.files("onnx"):
        for runtime in ("onnxruntime", "openvino"):
            peer = Peer(
                runtime=runtime,
                precision=file.precision,
                bundle=str(plain.folder),
                path=file.path,
                python=python if runtime == "openvino" else None,
            )
            peers.append(Measured(peer, _bytes(plain, file)))
    quantized = Peer(runtime="openvino", precision=INT8, bundle=str(plain.folder), path=NNCF_FILE, python=python)
    size = nncf.answers[0]["bytes"] if nncf.problem is None else None
    peers.append(Measured(quantized, size, problem=nncf.problem, exit_code=nncf.exit_code))
    return peers


def _file_peer(bundle: Bundle, file: GuardFile, *, given: bool) -> Measured:
    peer = Peer(
        runtime=_runtime(file),
        precision=file.precision,
        device="gpu" if file.kind == "engine" else "cpu",
        bundle=str(bundle.folder),
        given=given,
        path=file.path,
        work=_work(file),
        ours=True,
    )
    return Measured(peer, _bytes(bundle, file))


def _runtime(file: GuardFile) -> Runtime:
    """Return where a file runs fastest: static INT8 is made for OpenVINO and TensorRT."""
    if file.kind == "engine":
        return "tensorrt"
    return "openvino" if file.precision == INT8 else "onnxruntime"


def _bytes(bundle: Bundle, file: GuardFile) -> int:
    return file.bytes + sum(data.bytes for data in bundle.files("onnx_data") if data.path == file.path + ".data")


def _work(file: GuardFile) -> Work:
    if file.role == "vision":
        return "vision"
    return "shared" if any(output.name == "embeddings" for output in file.outputs) else "guard"

"""Loading an engine of TensorRT-RTX: what it says of the file in plain words, and the cache of what it compiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.cuda import CudaRuntime, Gpu
from runtimes.guard.engines import runtime_cache
from runtimes.guard.engines.library import Library
from runtimes.guard.engines.loaded import DIAGNOSTICS, LoadedEngine
from runtimes.guard.tensorrt_runner import TensorRTRunner, misplaced
from safevlm.errors import EngineRefusedError, InputError
from safevlm.files.user_cache import user_cache
from tests.runtimes.bundles import RTX, SIZE, engine_file, guard_graph, write_bundle
from tests.runtimes.guard import fake_tensorrt
from tests.runtimes.guard.engines.test_verify import RGB
from tests.runtimes.guard.fake_tensorrt import (
    EngineInvalidityDiagnostics,
    EngineValidity,
    FakeCuda,
    FakeRtxEngine,
    FakeRtxRuntime,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return user_cache() / runtime_cache.FOLDER


def open_once(bundle: Bundle) -> None:
    with TensorRTRunner(bundle, bundle.file(kind="engine")) as runner:
        runner.infer(RGB)


# -- validity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EngineInvalidityDiagnostics)
def test_each_reason_of_an_invalid_engine_is_told_in_plain_words(
    engine: FakeRtxEngine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, kind: EngineInvalidityDiagnostics
) -> None:
    monkeypatch.setattr(FakeRtxRuntime, "validity", (EngineValidity.INVALID, int(kind)))
    with pytest.raises(EngineRefusedError) as caught:
        TensorRTRunner(bundle, bundle.file(kind="engine")).activate()
    assert DIAGNOSTICS[kind.name] in str(caught.value) and kind.name not in str(caught.value)
    assert "engines/guard.fp16.plan: TensorRT-RTX 1.7.1.116 says that it cannot run here" in caught.value.reason


def test_several_reasons_are_told_and_what_is_unknown_refuses(
    engine: FakeRtxEngine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for validity, bits, told in (
        (EngineValidity.INVALID, 1 | 4, "another version of TensorRT-RTX; the GPU's driver is too old"),
        (EngineValidity.INVALID, 0, "it does not say why"),
        (EngineValidity.INVALID, 1024, r"its reason 1024 is unknown here"),
        (7, 0, "says that it cannot run here"),
    ):
        monkeypatch.setattr(FakeRtxRuntime, "validity", (validity, bits))
        with pytest.raises(EngineRefusedError, match=told):
            TensorRTRunner(bundle, bundle.file(kind="engine")).activate()


def test_a_file_shorter_than_a_header_is_not_shown_to_the_library(engine: FakeRtxEngine, tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "b", engine_file(tmp_path / "b", content=b"pla", **RTX)))
    with pytest.raises(EngineRefusedError, match="the file is damaged, or is not an engine"):
        TensorRTRunner(bundle, bundle.file(kind="engine")).activate()


def test_an_engine_that_is_slower_here_runs_and_says_so(
    engine: FakeRtxEngine, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FakeRtxRuntime, "validity", (EngineValidity.SUBOPTIMAL, 8))
    open_once(bundle)
    assert any("slower than it could be (the installed CUDA runtime is too old" in line for line in caplog.messages)


# -- compiled kernels -------------------------------------------------------------------------------------


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.cache"))


def test_what_was_compiled_is_there_at_the_next_start(
    installed: tuple[FakeCuda, FakeRtxEngine], bundle: Bundle, cache: Path
) -> None:
    cuda, engine = installed
    for _ in range(2):
        open_once(bundle)
    first, second = engine.loaded_kernels
    assert (first, second) == (frozenset(), {1, 2, 3, 4})
    (path,) = files(cache)
    assert path.stat().st_mode & 0o777 == 0o600
    cuda.driver = 13000
    open_once(bundle)
    assert engine.loaded_kernels[-1] == frozenset() and len(files(cache)) == 2


@pytest.mark.parametrize("damage", ["content", "mode", "size"])
def test_a_cache_that_is_damaged_or_not_ours_is_passed_over_and_replaced(
    engine: FakeRtxEngine, bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    open_once(bundle)
    (path,) = files(cache)
    whole = path.read_bytes()
    if damage == "content":
        path.write_bytes(b"ehcac")
    elif damage == "mode":
        path.chmod(0o622)
    else:
        path.write_bytes(whole + b" 1" * 200)
        monkeypatch.setattr(runtime_cache, "MAX_BYTES", 100)
    open_once(bundle)
    assert engine.loaded_kernels[-1] == frozenset()
    assert path.read_bytes() == b"cache:3" and path.stat().st_mode & 0o022 == 0


def test_caches_are_bounded_in_size_and_number(
    installed: tuple[FakeCuda, FakeRtxEngine], bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, _ = installed
    for number in range(runtime_cache.MOST_FILES + 3):
        cuda.driver = 12000 + 10 * number
        open_once(bundle)
    kept = files(cache)
    assert len(kept) == runtime_cache.MOST_FILES
    for path in kept:
        path.unlink()
    monkeypatch.setattr(runtime_cache, "MAX_BYTES", 3)
    open_once(bundle)
    assert not files(cache)


def test_a_cache_that_cannot_be_kept_costs_time_and_nothing_else(
    engine: FakeRtxEngine, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    open_once(bundle)


# -- the real library -------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")


def test_the_stand_in_has_nothing_that_the_real_library_has_not(real: Any) -> None:
    pairs = {
        "FakeContext": real.IExecutionContext,
        "FakeRtxEngine": real.ICudaEngine,
        "FakeRuntimeCache": real.IRuntimeCache,
        "FakeRuntimeConfig": real.IRuntimeConfig,
        "FakeRtxRuntime": real.Runtime,
        "FakeLogger": real.ILogger,
    }
    own = {
        "FakeContext": {"batches", "idle"},
        "FakeRtxEngine": {
            *("answer", "embedding", "hidden", "input_name", "input_type", "least", "loaded_kernels", "most", "names"),
            "shapes",
        },
        "FakeRtxRuntime": {"validity"},
    }
    for name, kind in pairs.items():
        public = {each for each in dir(getattr(fake_tensorrt, name)) if not each.startswith("_")}
        assert public - own.get(name, set()) <= set(dir(kind)), name
    for fake in (EngineValidity, EngineInvalidityDiagnostics):
        members = getattr(real, fake.__name__).__members__
        assert {each.name: int(each) for each in fake} == {key: int(value) for key, value in members.items()}
    specialization = real.DynamicShapesKernelSpecializationStrategy.__members__
    assert {each.name for each in fake_tensorrt.Specialization} == set(specialization)
    assert set(real.EngineInvalidityDiagnostics.__members__) == set(DIAGNOSTICS)
    assert [real.nptype(kind).__name__ for kind in (real.DataType.UINT8, real.DataType.FLOAT)] == ["uint8", "float32"]


def built(real: Any) -> bytes:
    """Return an engine of the bundle's guard that NVIDIA's builder made, for compute capability 8.9."""

    class Quiet(real.ILogger):  # type: ignore[misc]  # the bindings have no types
        def __init__(self) -> None:
            real.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            return

    log = Quiet()
    builder = real.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    assert real.OnnxParser(network, log).parse(guard_graph().SerializeToString())
    profile = builder.create_optimization_profile()
    profile.set_shape("rgb", *((batch, SIZE, SIZE, 3) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(real.ComputeCapability.SM89, 0)
    return bytes(builder.build_serialized_network(network, config))


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU, on which more is tested")  # noqa: PTH110
@pytest.mark.parametrize("damaged", [False, True])
def test_the_real_library_refuses_without_a_gpu_in_its_own_words_and_nothing_on_stdout(
    real: Any, tmp_path: Path, damaged: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    content = b"no engine, whatever its name says " * 10 if damaged else built(real)
    entry = engine_file(tmp_path / "b", content=content, **RTX)
    bundle = open_bundle(write_bundle(tmp_path / "b", entry))
    library = Library("tensorrt_rtx", real, CudaRuntime(FakeCuda()), Gpu("L4", "8.9"), "CUDA 12.8")
    with pytest.raises(EngineRefusedError, match=r"TensorRT-RTX 1\.\d+.* says that it cannot run here") as caught:
        LoadedEngine(library, bundle, entry)
    assert ("the file is damaged, or is not an engine" in str(caught.value)) == damaged
    assert damaged or "CUDA driver version is insufficient" in str(caught.value)
    assert capfd.readouterr().out == ""


@pytest.mark.gpu
def test_an_engine_built_ahead_of_time_is_proven_on_the_gpu(real: Any, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed")
    info = RTX | {"tensorrt_version": str(real.__version__), "targets": ("sm89",)}
    entry = engine_file(tmp_path / "b", content=built(real), precision="fp32", **info)
    bundle = open_bundle(write_bundle(tmp_path / "b", entry))
    try:
        other = misplaced(entry)
    except InputError as error:
        other = str(error)
    if other is not None:
        pytest.skip(other)
    with TensorRTRunner(bundle, entry) as runner:
        assert runner.proof is not None and runner.proof.holds

"""Build a TensorRT engine from a guard's ONNX file, with TensorRT 8.6, 9, 10 or 11, or with TensorRT-RTX.

What differs between the versions is the table :data:`BUILDER_APIS`; TensorRT-RTX counts its versions anew and is known
by its module (:data:`RTX_API`). Sources: the Python bindings of each release
(NVIDIA/TensorRT ``python/src/infer/pyCore.cpp`` and ``python/src/parsers/pyOnnx.cpp``, branches release/8.6,
release/10.0, release/10.3, release/11.1) and https://docs.nvidia.com/deeplearning/tensorrt, "Migrating from
TensorRT 10.x to 11.x". ``tensorrt`` has no types: its objects are ``Any`` here and nowhere else in ``export``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from export.rewrites.opset17 import lower_to_opset17
from export.rewrites.standard_operators import to_standard
from export.rewrites.wide_values import FLOAT32
from export.tensorrt.messages import build_failure, module_of, parser_failure, title_of
from export.tensorrt.targets import set_targets
from runtimes.guard.engines.library import EngineModule, collecting_logger
from safevlm.contract.manifest import TensorSpec
from safevlm.contract.manifest_fields import MAX_BATCH
from safevlm.errors import EngineUnavailableError, InputError, SafeVLMError, StorageError
from safevlm.files.json_file import replace_file
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing

__all__ = [
    "BUILDER_APIS",
    "RTX_API",
    "BuilderApi",
    "EngineOptions",
    "EnginePrecision",
    "Graph",
    "Tensors",
    "build_engine",
    "builder_api",
    "network_tensors",
    "read_graph",
]

EnginePrecision = Literal["fp16", "fp32", "int8"]
Report = Callable[[str], None]
OLDEST = (8, 6)
MIB = 2**20
USUAL_BATCH = 8
MOST_WORKSPACE_MIB = 2**63 // MIB - 1
"""That bytes in 64 bits can state."""
MAX_CACHE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is built with; its batch goes from 1 to ``largest_batch`` and is fastest at ``opt_batch``.

    ``workspace_mib`` bounds the GPU memory that a layer may use for scratch; TensorRT's own bound is all of it.
    ``hardware_compatible`` engines run on every GPU from compute capability 8.0 up, ``version_compatible`` ones with
    newer releases of the same major TensorRT; both cost speed.
    """

    precision: EnginePrecision = "fp16"
    max_batch: int | None = None
    opt_batch: int = 1
    workspace_mib: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(EnginePrecision):
            raise InputError(
                f"--precision {self.precision} is not allowed. Give one of {', '.join(get_args(EnginePrecision))}."
            )
        if not 1 <= self.opt_batch <= self.largest_batch:
            raise InputError(
                f"--opt-batch {self.opt_batch} with --max-batch {self.largest_batch} is not allowed. "
                "Give 1 <= opt-batch <= max-batch."
            )
        if self.largest_batch > MAX_BATCH:
            raise InputError(
                f"an engine of {self.largest_batch} images at once is not allowed. Give at most {MAX_BATCH}."
            )
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= MOST_WORKSPACE_MIB:
            raise InputError(f"--workspace-mib {self.workspace_mib} is not allowed. Give 1 to {MOST_WORKSPACE_MIB}.")

    @property
    def largest_batch(self) -> int:
        """``max_batch``, or the usual one, which an engine of a bundle lowers where it needs much memory."""
        return max(USUAL_BATCH, self.opt_batch) if self.max_batch is None else self.max_batch


@dataclass(frozen=True)
class Tensors:
    """Inputs and outputs of a graph, as a manifest states them."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class BuilderApi:
    """How a range of TensorRT versions is told what to build.

    A strongly typed network takes its precisions from the graph; a weakly typed one takes the float32 graph
    and the names in ``fp16_flags`` (of ``BuilderFlag``). ``network_flags`` are of
    ``NetworkDefinitionCreationFlag``. ``lowered`` graphs are rewritten to opset 17 for the parser. A builder that works
    ``ahead_of_time`` compiles for named targets and times no kernels.
    """

    since: tuple[int, int]
    network_flags: tuple[str, ...]
    fp16_flags: tuple[str, ...] = ()
    lowered: bool = False
    ahead_of_time: bool = False

    @property
    def strongly_typed(self) -> bool:
        """Whether precision lives in the graph."""
        return not self.fp16_flags

    def source_precision(self, precision: EnginePrecision) -> str:
        """Return the precision of the ONNX file that an engine is built from.

        Raises EngineUnavailableError for int8 where weights stored as int8 cannot be read.
        """
        if precision == "int8" and not self.strongly_typed:
            raise EngineUnavailableError(
                "int8 engines need TensorRT 10 or newer (JetPack 6.1 and later have it). Give --precision fp16."
            )
        return precision if self.strongly_typed else "fp32"


BUILDER_APIS = (
    BuilderApi(
        since=OLDEST,
        network_flags=("EXPLICIT_BATCH",),
        fp16_flags=("FP16", "PREFER_PRECISION_CONSTRAINTS"),
        lowered=True,
    ),
    BuilderApi(since=(10, 0), network_flags=("STRONGLY_TYPED",)),
    BuilderApi(since=(11, 0), network_flags=()),  # every network is strongly typed; the flag is deprecated
)


RTX_API = BuilderApi(since=(1, 0), network_flags=(), ahead_of_time=True)
"""TensorRT-RTX, of any version."""


def builder_api(version: str, module: EngineModule = "tensorrt") -> BuilderApi:
    """Return how a module of ``version`` is driven; EngineUnavailableError for TensorRT before 8.6."""
    if module == "tensorrt_rtx":
        return RTX_API
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found < OLDEST:
        raise EngineUnavailableError(
            f"TensorRT {version} is too old: 8.6 or newer is needed (JetPack 6.0 has 8.6, JetPack 6.1 has 10.3)."
        )
    return [api for api in BUILDER_APIS if api.since <= found][-1]


@dataclass(frozen=True)
class Graph:
    """A network as the parser read it; the three are kept together, since the network's weights are the parser's."""

    builder: Any
    network: Any
    parser: Any


def build_engine(
    trt: Any,
    onnx_file: Path,
    plan: Path,
    tensors: Tensors,
    options: EngineOptions,
    *,
    targets: Sequence[str] = (),
    timing_cache: Path | None = None,
    report: Report = lambda _: None,
) -> None:
    """Build an engine of a file with these ``tensors`` and write it to ``plan``.

    ``targets`` are compiled for where the builder works ahead of time; ``timing_cache`` is for those that do not.
    Rewritten graphs are left beside ``plan``: its folder should be a temporary one.

    Raises EngineUnavailableError when this TensorRT cannot read the graph, compile it for a target, or memory does not
    suffice, MissingExtraError, SafeVLMError for any other failure, with what TensorRT said.
    """
    api = builder_api(str(trt.__version__), module_of(trt))
    standard = plan.with_name(f"standard.{onnx_file.name}")
    to_standard(onnx_file, standard)
    onnx_file = standard
    if api.lowered:
        lowered = plan.with_name(f"opset17.{onnx_file.name}")
        lower_to_opset17(onnx_file, lowered)
        onnx_file = lowered
    log = collecting_logger(trt)
    log.errors.clear()
    graph = read_graph(trt, onnx_file)
    _compare(trt, network_tensors(trt, graph.network), tensors, onnx_file)
    config = _configure(trt, graph, api, options, tensors.inputs)
    if api.ahead_of_time:
        set_targets(trt, config, targets)
        report(f"{title_of(trt)}: compiling for {', '.join(targets)}")
    else:
        _load_timing_cache(config, timing_cache, report)
        report("TensorRT: timing kernels")
    serialized = graph.builder.build_serialized_network(graph.network, config)
    if serialized is None:
        raise build_failure(trt, log.errors, options.largest_batch, targets)
    plan.write_bytes(serialized)
    if not api.ahead_of_time:
        _save_timing_cache(config, timing_cache, report)


def read_graph(trt: Any, onnx_file: Path) -> Graph:
    """Let TensorRT's parser read a file of standard operators. Raises EngineUnavailableError for what it refuses."""
    log = collecting_logger(trt)
    api = builder_api(str(trt.__version__), module_of(trt))
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, api.network_flags))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        raise parser_failure(trt, parser, onnx_file)
    return Graph(builder, network, parser)


def network_tensors(trt: Any, network: Any) -> Tensors:
    """Return what TensorRT's network takes and gives; a side that it leaves open is ``"N"``."""

    def spec(tensor: Any) -> TensorSpec:
        sides: tuple[int | Literal["N"], ...] = tuple("N" if side < 0 else int(side) for side in tensor.shape)
        return TensorSpec(name=tensor.name, shape=sides, dtype=np.dtype(trt.nptype(tensor.dtype)).name)

    inputs = [spec(network.get_input(index)) for index in range(network.num_inputs)]
    outputs = [spec(network.get_output(index)) for index in range(network.num_outputs)]
    return Tensors(tuple(inputs), tuple(outputs))


def _compare(trt: Any, found: Tensors, stated: Tensors, onnx_file: Path) -> None:
    """Raise SafeVLMError unless a network has the tensors that the bundle states."""
    if found != stated:
        raise SafeVLMError(
            f"{title_of(trt)} reads {onnx_file.name} as {_shown(found)}, but the bundle states {_shown(stated)}. "
            "Please report this."
        )


def _shown(tensors: Tensors) -> str:
    inputs, outputs = (
        ", ".join(f"{each.name} {each.dtype} {' x '.join(map(str, each.shape))}" for each in side)
        for side in (tensors.inputs, tensors.outputs)
    )
    return f"{inputs} to {outputs}"


def _flags(kinds: Any, names: tuple[str, ...]) -> int:
    return sum(1 << int(getattr(kinds, name)) for name in names)


def _configure(trt: Any, graph: Graph, api: BuilderApi, options: EngineOptions, inputs: Sequence[TensorSpec]) -> Any:
    """Return the builder's configuration: precision, memory and the batch profile."""
    config = graph.builder.create_builder_config()
    # TensorFloat-32 is on unless cleared, and has float16's mantissa: float32 layers would not be float32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.precision == "fp16":
        for name in api.fp16_flags:
            config.set_flag(getattr(trt.BuilderFlag, name))
        if not api.strongly_typed:
            _keep_in_float32(trt, graph.network)
    profile = graph.builder.create_optimization_profile()
    for each in inputs:
        shapes = [(batch, *each.shape[1:]) for batch in (1, options.opt_batch, options.largest_batch)]
        profile.set_shape(each.name, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise SafeVLMError(
            f"{title_of(trt)} refused the batch profile 1, {options.opt_batch}, {options.largest_batch} of "
            f"{', '.join(each.name for each in inputs)}: please report this."
        )
    return config


def _keep_in_float32(trt: Any, network: Any) -> None:
    """Pin the layers that the rewrite marked: their squares and sums can leave float16's range."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name.startswith(FLOAT32) and layer.get_output(0).dtype == trt.float32:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)


# -- timing cache ---------------------------------------------------------------------------------------


def _load_timing_cache(config: Any, file: Path | None, report: Report) -> None:
    """Attach the cache in ``file``, or an empty one; a cache of another TensorRT or GPU is passed over."""
    if file is None:
        return
    content = b""
    try:
        content = read_regular(file, MAX_CACHE_BYTES)
    except FileNotFoundError:
        pass
    except OSError as error:
        report(f"timing cache {file} is ignored: {error.strerror or error}")
    if content:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        report(
            f"timing cache {file} is ignored: it is damaged, or was written by another TensorRT or GPU. It "
            "will be replaced"
        )
    config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timing_cache(config: Any, file: Path | None, report: Report) -> None:
    """Write what was timed; a place that cannot be written costs time at the next build and nothing else."""
    cache = None if file is None else config.get_timing_cache()
    if file is None or cache is None:
        return
    try:
        with storing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, cache.serialize())
    except StorageError as error:
        report(f"timing cache is not saved: {error}")

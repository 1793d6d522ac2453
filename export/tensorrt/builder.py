"""Build a TensorRT engine from a guard's ONNX file, with TensorRT 8.6, 9, 10 or 11.

What differs between the versions is the table :data:`BUILDER_APIS`. Sources: the Python bindings of each release
(NVIDIA/TensorRT ``python/src/infer/pyCore.cpp`` and ``python/src/parsers/pyOnnx.cpp``, branches release/8.6,
release/10.0, release/10.3, release/11.1) and https://docs.nvidia.com/deeplearning/tensorrt, "Migrating from
TensorRT 10.x to 11.x". ``tensorrt`` has no types: its objects are ``Any`` here and nowhere else in ``export``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from export.rewrites.opset17 import lower_to_opset17
from export.rewrites.standard_operators import to_standard
from export.rewrites.wide_values import FLOAT32
from safevlm.errors import EngineUnavailableError, InputError, SafeVLMError, StorageError
from safevlm.files.json_file import replace_file
from safevlm.files.regular_file import read_regular
from safevlm.files.storage import storing
from safevlm.terminal.printable import one_line

__all__ = [
    "BUILDER_APIS",
    "BuilderApi",
    "EngineOptions",
    "EnginePrecision",
    "build_engine",
    "builder_api",
]

EnginePrecision = Literal["fp16", "fp32", "int8"]
Report = Callable[[str], None]
INPUT = "rgb"
OLDEST = (8, 6)
MIB = 2**20
MAX_CACHE_BYTES = 2**30
_MEMORY = re.compile(r"out ?of ?memory|insufficient (memory|workspace)|MemoryAllocation", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is built with; its batch goes from 1 to ``max_batch`` and is fastest at ``opt_batch``.

    ``workspace_mib`` bounds the GPU memory that a layer may use for scratch; TensorRT's own bound is all of it.
    ``hardware_compatible`` engines run on every GPU from compute capability 8.0 up, ``version_compatible`` ones with
    newer releases of the same major TensorRT; both cost speed.
    """

    precision: EnginePrecision = "fp16"
    max_batch: int = 8
    opt_batch: int = 1
    workspace_mib: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(EnginePrecision):
            raise InputError(
                f"engine precision {self.precision!r}: {', '.join(get_args(EnginePrecision))} are allowed."
            )
        if not 1 <= self.opt_batch <= self.max_batch:
            raise InputError(
                f"--opt-batch {self.opt_batch} with --max-batch {self.max_batch}: "
                "1 <= opt-batch <= max-batch is allowed."
            )
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise InputError(f"--workspace-mib {self.workspace_mib}: at least 1 is allowed.")


@dataclass(frozen=True, kw_only=True)
class BuilderApi:
    """How a range of TensorRT versions is told what to build.

    A strongly typed network takes its precisions from the graph; a weakly typed one takes the float32 graph
    and the names in ``fp16_flags`` (of ``BuilderFlag``). ``network_flags`` are of
    ``NetworkDefinitionCreationFlag``. ``lowered`` graphs are rewritten to opset 17 for the parser.
    """

    since: tuple[int, int]
    network_flags: tuple[str, ...]
    fp16_flags: tuple[str, ...] = ()
    lowered: bool = False

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
                "int8 engines need TensorRT 10 or newer (JetPack 6.1 and later have it): ask for --precision fp16."
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


def builder_api(version: str) -> BuilderApi:
    """Return how TensorRT ``version`` is driven; EngineUnavailableError before 8.6."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if found < OLDEST:
        raise EngineUnavailableError(
            f"TensorRT {version} is too old: 8.6 or newer is needed (JetPack 6.0 has 8.6, JetPack 6.1 has 10.3)."
        )
    return [api for api in BUILDER_APIS if api.since <= found][-1]


def build_engine(
    trt: Any,
    onnx_file: Path,
    plan: Path,
    size: tuple[int, int],
    options: EngineOptions,
    *,
    timing_cache: Path | None = None,
    report: Report = lambda _: None,
) -> None:
    """Build an engine for pictures of ``size`` (height, width) and write it to ``plan``.

    Rewritten graphs are left beside ``plan``: its folder should be a temporary one.

    Raises EngineUnavailableError when this TensorRT cannot read the graph or memory does not suffice,
    MissingExtraError, SafeVLMError for any other failure, with what TensorRT said.
    """
    api = builder_api(str(trt.__version__))
    standard = plan.with_name(f"standard.{onnx_file.name}")
    to_standard(onnx_file, standard)
    onnx_file = standard
    if api.lowered:
        lowered = plan.with_name(f"opset17.{onnx_file.name}")
        lower_to_opset17(onnx_file, lowered)
        onnx_file = lowered
    log = _logger(trt)
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt.NetworkDefinitionCreationFlag, api.network_flags))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        raise _parser_failure(trt, parser, onnx_file)
    config = _configure(trt, builder, network, api, options, size)
    _load_timing_cache(config, timing_cache, report)
    report("TensorRT: timing kernels")
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _build_failure(trt, log.errors, options)
    plan.write_bytes(serialized)
    _save_timing_cache(config, timing_cache, report)


def _flags(kinds: Any, names: tuple[str, ...]) -> int:
    return sum(1 << int(getattr(kinds, name)) for name in names)


def _configure(
    trt: Any, builder: Any, network: Any, api: BuilderApi, options: EngineOptions, size: tuple[int, int]
) -> Any:
    """Return the builder's configuration: precision, memory and the batch profile."""
    config = builder.create_builder_config()
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
            _keep_in_float32(trt, network)
    profile = builder.create_optimization_profile()
    shapes = [(batch, *size, 3) for batch in (1, options.opt_batch, options.max_batch)]
    profile.set_shape(INPUT, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise SafeVLMError(
            f"TensorRT {trt.__version__} refused the batch profile {shapes} of {INPUT!r}: please report this."
        )
    return config


def _keep_in_float32(trt: Any, network: Any) -> None:
    """Pin the layers that the rewrite marked: their squares and sums can leave float16's range."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.name.startswith(FLOAT32) and layer.get_output(0).dtype == trt.float32:
            layer.precision = trt.float32
            layer.set_output_type(0, trt.float32)


# -- what TensorRT says ---------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _logger(trt: Any) -> Any:
    """Return one logger a module: TensorRT keeps a pointer to the first that it is given."""

    class CollectingLogger(trt.ILogger):  # type: ignore[misc]  # tensorrt has no types
        """Pass messages on to ``logging`` and keep the errors for the message of a failure."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                _log.info("TensorRT: %s", one_line(message))

    return CollectingLogger()


def _parser_failure(trt: Any, parser: Any, onnx_file: Path) -> EngineUnavailableError:
    """Name every operator and node that the parser refused, and the way out."""
    found = [_refusal(parser.get_error(index), onnx_file) for index in range(parser.num_errors)]
    what = "; ".join(dict.fromkeys(found)) or "no reason was given; is the file a complete ONNX file?"
    return EngineUnavailableError(
        f"TensorRT {trt.__version__} cannot read {onnx_file.name}: {what}. Use TensorRT 10 or newer (JetPack 6.1 "
        "and later have it), or judge with ONNX Runtime: python -m runtimes.check BUNDLE IMAGE --runtime onnxruntime"
    )


def _refusal(error: Any, onnx_file: Path) -> str:
    """Return ``operator Gelu, node 'node_7': reason``; before TensorRT 10 an error has the node's index alone."""
    if hasattr(error, "node_operator"):
        operator, name = error.node_operator(), error.node_name()
    else:
        operator, name = _node(onnx_file, error.node())
    where = f"operator {operator}, node {name!r}: " if operator else ""
    return where + " ".join(str(error.desc()).split())


def _node(onnx_file: Path, index: int) -> tuple[str, str]:
    """Return operator and name of a graph's node by its index, empty where it has no such node."""
    import onnx

    nodes = onnx.load(str(onnx_file), load_external_data=False).graph.node
    return (nodes[index].op_type, nodes[index].name) if 0 <= index < len(nodes) else ("", "")


def _build_failure(trt: Any, errors: list[str], options: EngineOptions) -> SafeVLMError:
    said = "; ".join(dict.fromkeys(" ".join(error.split()) for error in errors)) or "it gave no reason"
    if any(_MEMORY.search(error) for error in errors):
        return EngineUnavailableError(
            f"the GPU has too little free memory for the builder at --max-batch {options.max_batch}. Close what "
            f"else uses the GPU, or try a smaller --max-batch or --workspace-mib. TensorRT said: {said}"
        )
    return SafeVLMError(f"TensorRT {trt.__version__} built no engine: {said}. Please report this.")


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
        report(f"timing cache {file} is ignored: it is damaged, or of another TensorRT or GPU; it will be replaced")
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

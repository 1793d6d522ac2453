"""What TensorRT says: its name and version, and the errors that its failures become."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from runtimes.guard.engines.library import NAMES, EngineModule, as_line
from safevlm.errors import EngineUnavailableError, SafeVLMError

__all__ = ["build_failure", "module_of", "parser_failure", "said", "title_of"]

_MEMORY = re.compile(r"out ?of ?memory|insufficient (memory|workspace)|MemoryAllocation", re.IGNORECASE)


def module_of(trt: Any) -> EngineModule:
    """Return which of the two TensorRTs a Python module is."""
    return "tensorrt_rtx" if trt.__name__.startswith("tensorrt_rtx") else "tensorrt"


def title_of(trt: Any) -> str:
    """Return ``TensorRT 10.3.0`` or ``TensorRT-RTX 1.7.1``."""
    return f"{NAMES[module_of(trt)]} {trt.__version__}"


def parser_failure(trt: Any, parser: Any, onnx_file: Path) -> EngineUnavailableError:
    """Name every operator and node that the parser refused, and the way out."""
    found = [_refusal(parser.get_error(index), onnx_file) for index in range(parser.num_errors)]
    what = "; ".join(dict.fromkeys(found)) or "no reason was given; is the file a complete ONNX file?"
    return EngineUnavailableError(
        f"{title_of(trt)} cannot read {onnx_file.name}: {what}. Use TensorRT 10 or newer (JetPack 6.1 "
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


def said(errors: Iterable[str]) -> str:
    """Return the errors that TensorRT logged, each once, as one line."""
    return as_line(errors) or "it gave no reason"


def build_failure(trt: Any, errors: Collection[str], max_batch: int, targets: Sequence[str]) -> SafeVLMError:
    """Return what a failed build raises, with what TensorRT said."""
    reason = said(errors)
    if targets:
        return EngineUnavailableError(
            f"{title_of(trt)} cannot compile this guard for {', '.join(targets)}: {reason}. Try other --targets or "
            "another --precision."
        )
    if any(_MEMORY.search(error) for error in errors):
        return EngineUnavailableError(
            f"the GPU has too little free memory for the builder at --max-batch {max_batch}. Close what "
            f"else uses the GPU, or try a smaller --max-batch or --workspace-mib. TensorRT said: {reason}"
        )
    return SafeVLMError(f"{title_of(trt)} built no engine: {reason}. Please report this.")

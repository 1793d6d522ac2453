"""Get the image token back that llama.cpp's LLaVA graph drops.

In llama.cpp releases up to the one that llama-cpp-python 0.3.36 has, the graph puts CLIP's class token behind the
patches while the rows it takes are still counted from one: patch 0 is dropped, the class token is taken for the last
patch, and every patch has its neighbour's position (llama.cpp issue 25814). Positions are corrected in the file, by
turning the table round (``export.gguf.vision``). The dropped row is computed all the same, as the last layer's first
column: here it is read with llama.cpp's evaluation callback and taken through the projector.

Shapes: T image tokens, E width of the tower, D width of the language model.
"""

from __future__ import annotations

import ctypes
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safevlm.errors import MissingExtraError, SafeVLMError

__all__ = ["FEATURE_LAYERS_KEY", "FirstPatch"]

Floats = npt.NDArray[np.float32]
FEATURE_LAYERS_KEY = "clip.vision.feature_layer"
"""Of the hidden states that the projector reads side by side, from the first layer; 0 is the first layer's input."""


class FirstPatch:
    """Watches one projector's graph; ``callback`` goes into its parameters, ``complete`` corrects its output."""

    def __init__(self, mmproj: Path, llama: Any) -> None:
        library = _library()
        reader = library.GGUFReader(mmproj)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights = [
            np.asarray(library.quants.dequantize(tensors[name].data, tensors[name].tensor_type), np.float32)
            for name in ("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias")
        ]
        layers = [int(layer) for layer in reader.fields[FEATURE_LAYERS_KEY].contents()]
        self._names = [(f"layer_out-{layer - 1}" if layer else "pre_ln").encode() for layer in layers]
        self._width = self._weights[0].shape[1] // len(layers)
        self._rows: dict[bytes, Floats] = {}
        ggml = import_module("llama_cpp._ggml").libggml_base_path
        base = ctypes.CDLL(str(next(iter(sorted(ggml.glob("*ggml-base*"))))))
        self._name_of = base.ggml_get_name
        self._name_of.argtypes, self._name_of.restype = [ctypes.c_void_p], ctypes.c_char_p
        self._get = base.ggml_backend_tensor_get
        self._get.argtypes, self._get.restype = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2, None
        self.callback = llama.ggml_backend_sched_eval_callback(self._see)

    def forget(self) -> None:
        """Forget the row of an image before, which an error may have left."""
        self._row = None

    def _see(self, tensor: int, ask: bool, _: Any) -> bool:
        """Say whether a tensor is wanted when asked, and copy its first column when it is there."""
        name = self._name_of(tensor)
        wanted = name in self._names
        if not ask and wanted:
            row = np.empty(self._width, np.float32)
            self._get(tensor, row.ctypes.data, 0, row.nbytes)
            self._rows[name] = row
        return wanted if ask else True

    def complete(self, embeddings_TD: Floats) -> Floats:
        """Return all T patches' embeddings in order, of what the graph gave: patches 1 to T - 1 and the class token.

        Raises SafeVLMError when the row was not seen, in a llama.cpp whose graph is another one.
        """
        rows = [self._rows.pop(name, None) for name in self._names]
        if any(row is None for row in rows):
            raise SafeVLMError(
                "the installed llama.cpp computes LLaVA's vision tower differently than this file expects. Write the "
                "file again here, with python -m export.gguf."
            )
        into, into_bias, out, out_bias = self._weights
        hidden = into @ np.concatenate([row for row in rows if row is not None]) + into_bias
        inner = np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))  # as ggml_gelu has it
        first = out @ (0.5 * hidden * (1 + inner)) + out_bias
        return np.concatenate([first[None].astype(np.float32), embeddings_TD[:-1]])


def _library() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "reading a projector file") from error

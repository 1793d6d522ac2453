"""Get the image token back that llama.cpp's LLaVA graph drops.

In llama.cpp releases up to the one that llama-cpp-python 0.3.36 has, the graph puts CLIP's class token behind the
patches while the rows it takes are still counted from one: patch 0 is dropped, the class token is taken for the last
patch, and every patch has its neighbour's position (llama.cpp issue 25814). Positions are mended in the file, by
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

from models.errors import MissingExtraError, SafeVLMError

__all__ = ["FirstPatch"]

Floats = npt.NDArray[np.float32]
LAYERS_KEY = "clip.vision.block_count"


class FirstPatch:
    """Watches one projector's graph; ``callback`` goes into its parameters, ``complete`` mends what it gave."""

    def __init__(self, mmproj: Path, llama: Any) -> None:
        reader = _reader(mmproj)
        layers = int(reader.fields[LAYERS_KEY].parts[-1][0])
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._weights = [
            np.asarray(tensors[name].data, np.float32)
            for name in ("mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias")
        ]
        self._name = f"layer_out-{layers - 1}".encode()
        self._row: Floats | None = None
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
        """Say which tensor is wanted when asked, and copy its first column when it is there."""
        wanted: bool = self._name_of(tensor) == self._name
        if not ask and wanted:
            row = np.empty(self._weights[0].shape[1], np.float32)
            self._get(tensor, row.ctypes.data, 0, row.nbytes)
            self._row = row
        return wanted if ask else True

    def complete(self, embeddings_TD: Floats) -> Floats:
        """Return all T patches' embeddings in order, of what the graph gave: patches 1 to T - 1 and the class token.

        Errors: SafeVLMError when the row was not seen, in a llama.cpp whose graph is another one.
        """
        if self._row is None:
            raise SafeVLMError(
                "this llama.cpp does not compute LLaVA's tower as this file expects. Write it again with "
                "python -m export.gguf and the llama-cpp-python that is installed here."
            )
        into, into_bias, out, out_bias = self._weights
        hidden = into @ self._row + into_bias
        inner = np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3))  # as ggml_gelu has it
        first = out @ (0.5 * hidden * (1 + inner)) + out_bias
        return np.concatenate([first[None].astype(np.float32), embeddings_TD[:-1]])


def _reader(path: Path) -> Any:
    try:
        return import_module("gguf").GGUFReader(path)
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "reading a projector file") from error

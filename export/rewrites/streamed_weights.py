"""Read and write an ONNX file's weights one at a time: a graph is changed without all of them in memory.

Source: the ONNX IR specification, "External Tensor Data".
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["WeightWriter", "place_beside", "read_weight"]

SMALL = 2**10
"""Bytes; smaller tensors stay inside the graph."""
ALIGNMENT = 2**12
"""Bytes; so that a reader can map a tensor's pages."""


def read_weight(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """Return the values of a tensor that stands in a graph or in a file beside it in ``folder``."""
    from onnx import TensorProto, numpy_helper

    own = TensorProto()  # what is read stays in the message that it is read into
    own.CopyFrom(tensor)
    return numpy_helper.to_array(own, str(folder))


def place_beside(data: Path, there: Path) -> None:
    """Put a file of weights under a second name, the same file where the disk can; nothing happens where it is there.

    Not a symbolic link: readers refuse links that lead away.
    """
    data = data.resolve()
    if there.exists() and there.samefile(data):
        return
    try:
        os.link(data, there)
    except OSError:  # another file system, or one without such links
        shutil.copyfile(data, there)


class WeightWriter:
    """Writes tensors for the graph at ``path``: into ``path`` + ``.data``, or inside the graph.

    A context manager; the data file is complete when it ends.
    """

    def __init__(self, path: Path, *, beside: bool) -> None:
        self._data = path.with_name(path.name + ".data")
        self._data.unlink(missing_ok=True)
        self._file = self._data.open("wb") if beside else None

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, name: str, values: NDArray[Any]) -> TensorProto:
        """Store ``values``; return the tensor ``name`` that a graph takes as an initializer."""
        from onnx import TensorProto, helper, numpy_helper

        if self._file is None or values.nbytes < SMALL:
            return numpy_helper.from_array(np.ascontiguousarray(values), name)
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        tensor = TensorProto(name=name, dims=values.shape, data_type=helper.np_dtype_to_tensor_dtype(values.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._data.name, "offset": self._file.tell(), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        np.ascontiguousarray(values).tofile(self._file)
        return tensor

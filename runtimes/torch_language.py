"""The language model on torch: a checkpoint's whole model, answer and exact verdict from one prefill."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from models.errors import InputError, MissingExtraError
from runtimes.language import LanguageRunner, Prefilled

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.safe_vlm import Begun, SafeVLM

__all__ = ["Dtype", "TorchLanguageRunner"]

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


class TorchLanguageRunner(LanguageRunner):
    """Run a checkpoint through ``models.safe_vlm``.

    ``model`` is an opened checkpoint or a model that is loaded already; ``device`` is torch's word for one
    (``cpu``, ``cuda``, ``cuda:1``); ``grid`` the (height, width) that pictures are brought to where the family
    lets one choose (Qwen2.5-VL), which should be the guard bundle's.
    """

    runtime = "torch"
    takes_embeddings = True

    def __init__(
        self,
        model: Checkpoint | SafeVLM,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        grid: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in get_args(Dtype):
            raise InputError(f"unknown dtype {dtype!r}; allowed: {', '.join(get_args(Dtype))}")
        self.model = model
        self.random_weights = bool(getattr(model, "random_weights", False))  # a loaded model does not say
        self.device = device
        self.dtype = dtype
        self.grid = grid
        self.threads = threads
        self._vlm: SafeVLM | None = None

    def _activate(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "torch", "answering with torch") from error
        from models.safe_vlm import SafeVLM, load_safe_vlm

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = _device(torch, self.device)
        dtype = getattr(torch, self.dtype)
        vlm = self.model if isinstance(self.model, SafeVLM) else load_safe_vlm(self.model, dtype=dtype, grid=self.grid)
        self._vlm = vlm.to(device=device, dtype=dtype).eval()
        self.preprocessing = vlm.preprocessing
        self.classes = vlm.classes

    def _deactivate(self) -> None:
        self._vlm = None

    def _prefill(
        self, rgb: npt.NDArray[np.uint8], question: str, embeddings: npt.NDArray[np.float32] | None
    ) -> Prefilled:
        import torch

        vlm = self._held(self._vlm)
        images = torch.from_numpy(rgb[None].copy()).to(self.device)
        features = None
        if embeddings is not None:
            features = torch.from_numpy(embeddings[None].copy()).to(self.device, getattr(torch, self.dtype))
        begun = vlm.begin(images, [question], features)
        return Prefilled(exact_probs=begun.guard_probs[0], handle=[begun])

    def _generate(self, handle: Any, max_new_tokens: int) -> str:
        return self._held(self._vlm).finish(_begun(handle), max_new_tokens)[0]

    def _stream(self, handle: Any, max_new_tokens: int) -> Iterator[str]:
        return self._held(self._vlm).stream(_begun(handle), max_new_tokens)


def _begun(handle: Any) -> Begun:
    """Take the prefill out of a handle: decoding extends its cache, so that it is good for one answer."""
    if not isinstance(handle, list) or not handle:
        raise InputError("this handle was answered already, or is another runner's: prefill again")
    begun: Begun = handle.pop()
    return begun


def _device(torch: Any, name: str) -> Any:
    """Return torch's device of this name; InputError when there is no such thing here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"torch knows no device {name!r}; allowed are cpu, cuda and cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch {torch.__version__} finds no CUDA GPU here. Take --device cpu.")
    return device

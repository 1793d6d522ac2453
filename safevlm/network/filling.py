"""Lay out a torch module without memory for its parameters, and fill them from a checkpoint one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from safevlm.checkpoint.weights.finite import converted
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from safevlm.checkpoint.weights.tensors import TensorStore

__all__ = ["check_stored", "fill", "on_meta"]

NAMES_SHOWN = 4

Module = TypeVar("Module", bound=nn.Module)


class _ParametersOnMeta(TorchFunctionMode):
    """Make the factories that parameters come from allocate on ``meta``; buffers stay real.

    Unlike ``torch.device("meta")`` this keeps rotary frequencies, position ids and embedding scales, which
    are computed (``arange``, ``tensor``) and not stored in a checkpoint.
    """

    factories = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.factories:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def on_meta(build: Callable[[], Module]) -> Module:
    """Return what ``build`` makes, its parameters on ``meta`` and its unstored buffers computed."""
    with _ParametersOnMeta():
        module = build()
    unset = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not unset, f"buffers without data: {unset}"
    return module.eval()


def fill(
    module: nn.Module,
    tensors: TensorStore,
    *,
    prefix: str,
    dtype: torch.dtype = torch.float32,
    own: bool = False,
    device: torch.device | str = "cpu",
) -> None:
    """Give every parameter of ``module`` its tensor ``prefix + name``, read one at a time, without gradient.

    With ``own`` parameters share no memory with the checkpoint's mapped files. On a GPU each is there, in its dtype,
    before the next one is read: the host holds one tensor, as it is stored. Buffers stay where they are.

    All names and shapes are checked before the first byte is read. A parameter that another one is tied to
    is filled once; tie again afterwards.

    Raises CheckpointError, naming the tensors that are missing or of another shape, or one that holds NaN or infinity
    in its dtype.
    """
    slots = dict(module.named_parameters())
    check_stored({prefix + name: tuple(slot.shape) for name, slot in slots.items()}, tensors)
    for name in slots:
        path, _, leaf = name.rpartition(".")
        stored = tensors.read(prefix + name, own=own).to(device)
        value = converted(stored, dtype, tensors.stored_name(prefix + name))
        setattr(module.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def check_stored(wanted: Mapping[str, tuple[int, ...]], tensors: TensorStore) -> None:
    """Check that tensors of these names and shapes are stored.

    Raises:
        CheckpointError: naming the tensors that are missing or of another shape.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        listed = ", ".join(f"'{name}'" for name in missing[:NAMES_SHOWN])
        raise CheckpointError(
            f"the checkpoint lacks {listed}{more}, which its config.json calls for. Fetch config and tensors again, "
            "from the same revision."
        )
    for name, shape in wanted.items():
        stored = tuple(tensors.shape(name))
        if stored != shape:
            raise CheckpointError(
                f"tensor '{name}' has shape {stored}, config.json asks for {shape}. "
                "Fetch config and tensors from the same revision."
            )

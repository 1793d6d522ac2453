"""Read quantized language models: GPTQ's packed integers (v1 and v2) and compressed-tensors' 8-bit weights.

Every quantized linear appears under its usual name, ``X.weight``, and is read as float32; nobody above has to know.
Bit widths are read off the shapes, so rules that give modules different ones need not be followed.

Shapes: R output rows, C input columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safevlm.checkpoint.weights.shards import Shards
from safevlm.checkpoint.weights.tensors import TensorStore
from safevlm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "BITS",
    "GPTQ_PARTS",
    "WORD",
    "Quantization",
    "QuantizedTensors",
    "dequantized",
    "read_quantization",
    "refuse_scales",
    "unpack",
    "unpack_linear",
]

BITS = (2, 3, 4, 8)
WORD = 32
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
INT8_PARTS = ("weight", "weight_scale")
SCALES = (
    *(".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale"),  # FP8, compressed-tensors, ModelOpt
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed"),  # GPTQ, AWQ, compressed-tensors
    *(".SCB", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),  # bitsandbytes
)
"""Endings of names that only a quantized weight's parts have."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a checkpoint is quantized, as its config.json says."""

    method: str
    """``gptq`` or ``compressed-tensors``."""
    format: str
    """``gptq`` (v1), ``gptq_v2``, or ``int-quantized``."""
    rounds_inputs: bool = False
    """Whether inputs of quantized linears are rounded to 8 bits, a scale each token (W8A8)."""


def read_quantization(name: str, config: Mapping[str, Any]) -> Quantization | None:
    """Return what ``quantization_config`` says, or ``None`` for a checkpoint that is not quantized.

    As in transformers it may stand in ``text_config``.
    Raises CheckpointError for a method or format that is not read here.
    """
    text = config.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    stated = config.get("quantization_config")
    stated = nested if stated is None else stated
    if stated is None:
        return None
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if method == "gptq":
        form = stated.get("checkpoint_format") or "gptq"
        if form in ("gptq", "gptq_v2"):
            return Quantization(method="gptq", format=form)
    elif method == "compressed-tensors":
        form = stated.get("format")
        if form == "int-quantized":
            return Quantization(method=method, format=form, rounds_inputs=_rounds_inputs(name, stated))
    else:
        form = None
    raise CheckpointError(
        f"{name}: quantized by {method!r}{f' in the format {form!r}' if form else ''}; only GPTQ (v1, v2) and "
        "compressed-tensors int-quantized can be read. Give the checkpoint in 16 bit."
    )


def refuse_scales(name: str, stored: Iterable[str]) -> None:
    """Refuse a checkpoint that stores scales of quantized weights while its config says nothing of quantization.

    Raises CheckpointError.
    """
    found = sorted(tensor for tensor in stored if tensor.endswith(SCALES))
    if found:
        raise CheckpointError(
            f"{name}: tensor '{found[0]}'{f' and {len(found) - 1} more' if len(found) > 1 else ''} scales a quantized "
            "weight, but config.json has no quantization_config. Fetch config.json again, or give the checkpoint in "
            "16 bit."
        )


def _rounds_inputs(name: str, stated: Mapping[str, Any]) -> bool:
    """Say whether activations are rounded; CheckpointError for another way than 8 bits a token."""
    groups = stated.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    found = [group.get("input_activations") for group in groups if isinstance(group, dict)]
    if not any(found):
        return False
    wanted = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    for each in found:
        if not isinstance(each, dict) or any(each.get(key) != value for key, value in wanted.items()):
            raise CheckpointError(f"{name}: its activations are quantized as {each}; only {wanted} can be read.")
    return True


class QuantizedTensors(TensorStore):
    """A store in which the parts of a quantized linear are one float32 tensor, ``X.weight``."""

    def __init__(self, shards: Shards, canonical: Callable[[str], str | None], quantization: Quantization) -> None:
        super().__init__(shards, canonical)
        self.quantization = quantization
        parts = GPTQ_PARTS if quantization.method == "gptq" else INT8_PARTS
        marker = "." + ("qweight" if parts is GPTQ_PARTS else "weight_scale")
        self._parts: dict[str, dict[str, str]] = {}
        for name in super().names():
            if name.endswith(marker):
                module = name.removesuffix(marker)
                self._parts[f"{module}.weight"] = {part: f"{module}.{part}" for part in parts}
        if not self._parts:
            raise CheckpointError(
                f"{shards.where}: config.json says it is quantized ({quantization.method}), but there is no tensor "
                f"'*{marker}'. Fetch config and tensors from the same revision."
            )
        for name, found in self._parts.items():
            lacking = [part for part in found.values() if not super(QuantizedTensors, self).__contains__(part)]
            if lacking:
                raise CheckpointError(f"{shards.where}: '{name}' is quantized, but '{lacking[0]}' is missing.")
        self._hidden = {part for parts in self._parts.values() for part in parts.values()}

    def names(self) -> tuple[str, ...]:
        """Return the names of whole tensors, sorted."""
        return tuple(sorted({*super().names()} - self._hidden | set(self._parts)))

    def __contains__(self, name: object) -> bool:
        return name in self._parts or (name not in self._hidden and super().__contains__(name))

    def __len__(self) -> int:
        return len(self.names())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a whole tensor's shape."""
        if name not in self._parts:
            return super().shape(name)
        parts = self._parts[name]
        if "qweight" not in parts:
            return super().shape(parts["weight"])
        return super().shape(parts["qweight"])[1], super().shape(parts["g_idx"])[0]

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype; that of a quantized one is what it is read as."""
        return "F32" if name in self._parts else super().dtype(name)

    def read(self, name: str, *, own: bool = False) -> Tensor:
        """Return one tensor, a quantized one as the float32 numbers that it stands for, R × C.

        Raises CheckpointError, also for parts whose shapes do not fit together.
        """
        if name not in self._parts:
            return super().read(name, own=own)
        parts = self._parts[name].items()
        tensors = {part: super(QuantizedTensors, self).read(stored, own=own) for part, stored in parts}
        try:
            return dequantized(tensors, v2=self.quantization.format == "gptq_v2")
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            shapes = {part: tuple(tensor.shape) for part, tensor in tensors.items()}
            raise CheckpointError(f"'{name}': its packed parts do not fit together: {shapes} ({error}).") from error

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some rows of a tensor; a quantized one is read whole."""
        return self.read(name)[start:stop] if name in self._parts else super().read_rows(name, start, stop)

    def pieces(self, name: str, rows: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor in pieces; a quantized one is read once."""
        if name not in self._parts:
            yield from super().pieces(name, rows)
        else:
            whole = self.read(name)
            each = rows or len(whole)
            yield from (whole[start : start + each] for start in range(0, len(whole), each))

    def stored_name(self, name: str) -> str:
        """Return the name that the file uses; that of a packed linear is what its parts' names have in common."""
        packed = self._parts.get(name, {}).get("qweight")
        if packed is None:
            return super().stored_name(name)
        return super().stored_name(packed).removesuffix("qweight") + "weight"

    def quantized_modules(self, prefix: str = "") -> tuple[str, ...]:
        """Return the quantized linears below ``prefix``, by their names after it."""
        weights = (name for name in sorted(self._parts) if name.startswith(prefix))
        return tuple(name.removeprefix(prefix).removesuffix(".weight") for name in weights)

    def sha256(self, names: Iterable[str]) -> str:
        """Return the hash of stored tensors: a quantized one counts with all its parts."""
        return super().sha256(part for name in names for part in self._parts.get(name, {"": name}).values())


def round_tokens(inputs: Tensor) -> Tensor:
    """Round each token (the last axis) to 8 bits, symmetric, and return the numbers that these stand for."""
    scale = (inputs.abs().amax(dim=-1, keepdim=True) / 127.5).clamp(min=1e-30)
    return (inputs / scale).round().clamp(-128, 127) * scale


def round_inputs(module: nn.Module, names: Iterable[str]) -> None:
    """Let the named linears of a module round their inputs, as W8A8 kernels do."""

    def rounded(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_tokens(given[0]), *given[1:])

    for name in names:
        module.get_submodule(name).register_forward_pre_hook(rounded)


def dequantized(parts: Mapping[str, Tensor], *, v2: bool = False) -> Tensor:
    """Return the float32 numbers, R × C, that the stored parts of one linear stand for."""
    if "qweight" not in parts:
        return parts["weight"].float() * parts["weight_scale"].float()
    ints, scale_RG, zero_RG, group_of = unpack_linear(parts, v2=v2)
    return (ints.float() - zero_RG[:, group_of]) * scale_RG[:, group_of]


def unpack(words_KM: Tensor, bits: int) -> Tensor:
    """Return the whole numbers that int32 words K × M hold, lowest bits first: int64, (K · 32 / bits) × M."""
    import torch

    count, others = words_KM.shape
    words = words_KM.to(torch.int64).reshape(count // bits, bits, others) & (2**WORD - 1)
    values = torch.empty(count // bits, WORD, others, dtype=torch.int64, device=words.device)
    for place in range(WORD):
        word, shift = divmod(place * bits, WORD)
        value = words[:, word] >> shift
        if shift + bits > WORD:
            value = value | (words[:, word + 1] << (WORD - shift))
        values[:, place] = value & (2**bits - 1)
    return values.reshape(-1, others)


def unpack_linear(parts: Mapping[str, Tensor], *, v2: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return integers R × C (int64), scales and zeros R × G (float32) and each column's group (int64).

    ``parts`` are ``qweight``, ``qzeros``, ``scales`` and ``g_idx``; v1 stores zero - 1, v2 (``v2``) the zero.
    """
    bits = parts["qweight"].shape[0] * WORD // parts["g_idx"].shape[0]
    ints = unpack(parts["qweight"], bits).T
    zero = unpack(parts["qzeros"].T.contiguous(), bits) + (0 if v2 else 1)
    return ints, parts["scales"].T.float(), zero.float(), parts["g_idx"].long()

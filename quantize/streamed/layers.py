"""Round a language model whose decoder layers stream by, each read, rounded, run and dropped.

What a layer's linears are rounded with is a :class:`Method`. Shapes: B samples a batch, L positions, T = B · L tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from calibration.streaming.sequential import Activations, LayerStream
from quantize.methods.hessian import CrossMoments, Hessian
from quantize.streamed.caches import Caches, OriginalInputs
from safevlm.checkpoint.checkpoint import Checkpoint
from safevlm.checkpoint.weights.finite import is_finite
from safevlm.checkpoint.weights.quantized import GPTQ_PARTS, dequantized
from safevlm.errors import InputError
from safevlm.network.safe_vlm import Prefill

__all__ = [
    "LINEARS",
    "SHARED_INPUTS",
    "Beside",
    "Method",
    "Rounded",
    "Stage",
    "linear_names",
    "round_layers",
    "stored_dtype",
]

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""A decoder layer's linears in the order of data, those that read the same input together; all three families."""
LINEARS = tuple(name for names in SHARED_INPUTS for name in names)


class _Enough(Exception):  # noqa: N818  # control flow, not an error
    """The inputs that were wanted have been seen: the rest of the layer need not run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounded:
    """What became of one decoder layer: tensors to store by name within the layer, and a report of each linear.

    Parameters of the layer that are not among ``tensors`` are stored in 16 bit as they are.
    """

    tensors: dict[str, Tensor]
    report: list[dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class Stage:
    """A decoder layer in its place: what comes in, and what each of its linears reads, found in the order of data.

    Inputs are looked at once all linears before are as they will run. What they were is kept, so each linear runs
    about once.
    """

    index: int
    layer: nn.Module
    stream: LayerStream
    batches: Sequence[Prefill]
    hidden: Activations
    weights: Sequence[Tensor] | None
    prefix: str
    """Canonical name of the layer, a dot at its end."""
    caches: Caches = field(default_factory=Caches)
    moved: bool = False
    """Whether kept inputs were changed by :meth:`rescale`, or weights since they were kept."""
    target: Activations | None = None
    """What the 16-bit layer makes of the 16-bit model's hidden states, where a method asks for it."""
    originals: OriginalInputs | None = None
    """What the layer's linears read in the 16-bit model, where a method asks for it."""
    _known: dict[str, Activations] = field(default_factory=dict)

    @property
    def moment_dtype(self) -> torch.dtype:
        """What factors of second moments are in: float32 unless the stream's products are narrower than its states."""
        return torch.float32 if self.stream.products == self.stream.dtype else self.stream.products

    def linear(self, name: str) -> Any:
        """Return a linear of the layer."""
        return self.layer.get_submodule(name)

    def moments(self, name: str) -> Tensor:
        """Return the second moments of a linear's inputs, C × C; the layer runs as far as this linear.

        Raises InputError, with the linear's name, for inputs that are not finite.
        """
        hessian = Hessian(self.linear(name).in_features, self.stream.device, self.moment_dtype)
        with self.named(name):
            for number, inputs in enumerate(self.inputs(name)):
                hessian.add(inputs, None if self.weights is None else self.weights[number].to(self.stream.device))
            return hessian.mean()

    def mismatch(self, name: str) -> Tensor:
        """Return the mean of (x - y) yᵀ, C × C: x is what a linear reads in the 16-bit model, y what it reads here.

        Tokens count as for :meth:`moments`. Raises InputError, with the linear's name, for inputs that are not finite,
        and where what the 16-bit model's linears read was not kept.
        """
        with self.named(name):
            if self.originals is None:
                raise InputError("what it reads in the 16-bit model was not kept.")
            cross = CrossMoments(self.linear(name).in_features, self.stream.device, self.moment_dtype)
            for number, inputs in enumerate(self.inputs(name)):
                original = self.originals.of(name, number).to(self.stream.device)
                cross.add(original, inputs, None if self.weights is None else self.weights[number].to(original.device))
            return cross.mean()

    def gather(self, name: str) -> None:
        """Find what a linear reads in all batches, and let go of the weights that stand before it.

        What those made is kept and they never run again, so the caller has stored them. They are empty afterwards.
        """
        for _ in self.inputs(name):
            pass
        if "self_attn.o_proj" not in self._known:
            return
        for before in LINEARS[: LINEARS.index(name)]:
            if before != "self_attn.o_proj" or len(self._outputs) == len(self.batches):
                self.linear(before).weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def inputs(self, name: str) -> Iterator[Tensor]:
        """Yield a linear's inputs, T × C, batch by batch."""
        for number in range(len(self.batches)):
            known = self._known.get(name)
            if known is not None and number < self._filled[name]:
                yield known[number].to(self.stream.device).flatten(0, 1)
                continue
            found = self._run_to(name, number)
            self._keep(name, number, found)
            yield found.flatten(0, 1)

    def rescale(self, name: str, factor_C: Tensor) -> None:
        """Divide what a linear reads: what stands before it was changed so that it gives that, but for rounding."""
        self.moved = True
        if name in self._known:
            for number in range(len(self.batches)):
                self._known[name][number].div_(factor_C.to(self._known[name].dtype).cpu())

    def output(self, number: int) -> Tensor:
        """Return what the layer makes of a batch, B × L × D, with all its linears as they are now."""
        layer = cast(Any, self.layer)
        attention, last = self._cached("self_attn.o_proj", number), self._cached("mlp.down_proj", number)
        with contextlib.ExitStack() as stack:
            if attention is not None:
                stack.enter_context(_instead(layer.self_attn, lambda: (self._attended(number), None)))
            if last is not None:
                stack.enter_context(_instead(layer.mlp, lambda: layer.mlp.down_proj(last)))
            return self.stream.run_layer(self.index, self.layer, self.batches[number], self.hidden[number])

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Put the linear's name before the message of an InputError."""
        try:
            yield
        except InputError as error:
            raise InputError(f"{self.prefix}{name}: {error}") from error

    def __post_init__(self) -> None:
        self._filled: dict[str, int] = {}
        self._outputs: set[int] = set()

    def _run_to(self, name: str, number: int) -> Tensor:
        """Run a batch as far as a linear and return what it reads, B × L × C; begin at what is known."""
        layer = cast(Any, self.layer)
        caught: list[Tensor] = []

        def catch(_: nn.Module, given: tuple[Any, ...]) -> None:
            caught.append(given[0])
            raise _Enough

        before = self._cached("mlp.gate_proj", number) if name == "mlp.down_proj" else None
        attention = self._cached("self_attn.o_proj", number) if name.startswith("mlp.") else None
        hook = self.linear(name).register_forward_pre_hook(catch, prepend=True)
        try:
            with contextlib.suppress(_Enough), contextlib.ExitStack() as stack:
                if before is not None:
                    stack.enter_context(self.stream.multiplying())
                    layer.mlp(before)
                if attention is not None:
                    stack.enter_context(_instead(layer.self_attn, lambda: (self._attended(number), None)))
                self.stream.run_layer(self.index, self.layer, self.batches[number], self.hidden[number])
        finally:
            hook.remove()
        return caught.pop().to(self.stream.products)  # what the linear itself reads

    def _attended(self, number: int) -> Tensor:
        """Return what the attention gives; kept in place of what its last linear read, where that is as wide."""
        known = self._known["self_attn.o_proj"]
        if number in self._outputs:
            return known[number].to(self.stream.device)
        with self.stream.multiplying():
            found = self.linear("self_attn.o_proj")(known[number].to(self.stream.device))
        if found.shape == known[number].shape:
            known[number].copy_(found)
            self._outputs.add(number)
        return cast(Tensor, found)

    def _keep(self, name: str, number: int, found: Tensor) -> None:
        if name == "self_attn.q_proj":  # only a norm stands before it
            return
        if name not in self._known:
            shapes = [(*shape[:2], found.shape[-1]) for shape in self.hidden.shapes]
            self._known[name] = self.caches.of(name, shapes, self.stream.products)
        self._known[name][number].copy_(found)
        self._filled[name] = number + 1

    def _cached(self, name: str, number: int) -> Tensor | None:
        known = self._known.get(name)
        return None if known is None else known[number].to(self.stream.device)


@contextlib.contextmanager
def _instead(module: nn.Module, give: Callable[[], Any]) -> Iterator[None]:
    """Let a module give something else for a while, without running."""
    module.forward = lambda *_, **__: give()
    try:
        yield
    finally:
        del module.forward


class Method(Protocol):
    """A way to round linears."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError for a checkpoint that it cannot round, before anything is read."""

    def round_layer(self, stage: Stage) -> Rounded:
        """Round a layer's linears, and leave the layer as it will run."""

    def attach(self, layer: nn.Module) -> None:
        """Prepare a restored layer to run as a rounded one does; weights are in place."""


class Beside(Protocol):
    """Runs over layers that are rounded, with hidden states of its own."""

    def unrounded(self, index: int, layer: nn.Module) -> None:
        """Run a layer as it was read."""

    def rounded(self, index: int, layer: nn.Module) -> None:
        """Run it as it was written."""


def linear_names(checkpoint: Checkpoint) -> list[tuple[int, str, str]]:
    """Return every decoder linear: its layer, its name in the layer, its canonical name without ``.weight``."""
    prefix = f"{checkpoint.family.language_prefix}layers."
    layers = {
        int(name.removeprefix(prefix).split(".")[0]) for name in checkpoint.tensors.names() if name.startswith(prefix)
    }
    return [(index, name, f"{prefix}{index}.{name}") for index in sorted(layers) for name in LINEARS]


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the 16-bit dtype of tensors that are not rounded: the checkpoint's own, otherwise the family's."""
    stored = checkpoint.tensors.dtype(f"{checkpoint.family.language_prefix}norm.weight")
    half = stored if stored in ("F16", "BF16") else checkpoint.family.half
    return torch.float16 if half == "F16" else torch.bfloat16


@torch.no_grad()
def round_layers(
    stream: LayerStream,
    batches: Sequence[Prefill],
    hidden: Activations,
    method: Method,
    *,
    weights: Sequence[Tensor] | Callable[[int], Sequence[Tensor]] | None = None,
    finished: Callable[[int], Mapping[str, Tensor] | None] = lambda _: None,
    write: Callable[[int, Rounded], None],
    report: Callable[[int], None] = lambda _: None,
    stop: int | None = None,
    caches: Caches | None = None,
    beside: Beside | None = None,
    last_states: bool = True,
    target: Activations | None = None,
    original_inputs: bool = False,
) -> None:
    """Round every decoder layer; ``hidden`` goes from embeddings to last hidden states, those of the rounded model.

    ``weights`` are the tokens' (T each) of every batch, or give those of a layer. ``write`` gets each layer once, with
    all its tensors, and nothing is kept; what ``finished`` returns for a layer (its tensors as they were written) is
    put in place instead of being found again. With ``stop`` only so many layers are rounded. ``caches`` bounds the
    memory of linears' inputs. ``beside`` runs each layer by itself, before and after, which needs ``finished`` to know
    what was written. Without ``last_states`` the last layer need not run once it is rounded. ``target`` (embeddings, as
    ``hidden``) goes through the 16-bit model for a method that looks at it; with ``original_inputs`` what linears read
    there is kept in ``caches``, too.

    Raises those of the method, before anything is read; InputError for activations that are not finite, with the
    layer's and the linear's name.
    """
    method.check(stream.checkpoint)
    dtype = stored_dtype(stream.checkpoint)
    kept = caches or Caches()
    originals = OriginalInputs(kept, [names[0] for names in SHARED_INPUTS]) if original_inputs else None

    def settle(index: int, layer: nn.Module, done: Mapping[str, Tensor] | None) -> Callable[[int], Tensor] | None:
        """Give a layer its rounded weights; return the short way to what it then makes of a batch, if there is one."""
        if done is not None:
            _restore(layer, done)
            method.attach(layer)
            return None
        for name, parameter in layer.named_parameters():
            if name.removesuffix(".weight") not in LINEARS:
                parameter.data = parameter.data.to(dtype).to(parameter.dtype)  # as it will be stored
        stage = Stage(
            index=index,
            layer=layer,
            stream=stream,
            batches=batches,
            hidden=hidden,
            weights=weights(index) if callable(weights) else weights,
            prefix=f"{stream.checkpoint.family.language_prefix}layers.{index}.",
            caches=kept,
            target=target,
            originals=originals,
        )
        rounded = method.round_layer(stage)
        plain = {
            name: parameter.data.to(dtype).cpu()
            for name, parameter in layer.named_parameters()
            if name not in rounded.tensors and f"{name.removesuffix('weight')}qweight" not in rounded.tensors
        }
        for name, tensor in {**plain, **rounded.tensors}.items():
            if not is_finite(tensor):
                raise InputError(
                    f"{stage.prefix}{name}: a value exceeds {str(tensor.dtype).removeprefix('torch.')}, in which it is "
                    "stored. The checkpoint's numbers are too large for this method. Try the other one of "
                    "quantize.gptq and quantize.int8."
                )
        write(index, Rounded(tensors={**plain, **rounded.tensors}, report=rounded.report))
        # what was moved by hand is not what the stored layer gives to the last bit, which a run that goes on sees
        return None if stage.moved else stage.output

    for index, layer in stream.layers(stop):
        if beside is not None:
            beside.unrounded(index, layer)
        done = finished(index)
        if target is not None:
            with contextlib.ExitStack() as stack:
                if originals is not None and done is None:
                    stack.enter_context(originals.keeping(layer, target.shapes, stream.products))
                stream.advance(index, layer, batches, target)
        output = settle(index, layer, done)
        del done
        if last_states or index < len(stream) - 1:
            stream.advance(index, layer, batches, hidden, output)
        del output
        if beside is not None:
            _restore(layer, finished(index) or {})  # a layer that was just rounded may have let go of its weights
            beside.rounded(index, layer)
        report(index)
    if stop is None or stop >= len(stream):
        stream.norm(hidden)


def _restore(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer the weights that stored tensors stand for."""
    for name, parameter in layer.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            value = dequantized({part: tensors[f"{module}.{part}"] for part in GPTQ_PARTS})
        elif f"{module}.weight_scale" in tensors:
            value = dequantized({part: tensors[f"{module}.{part}"] for part in ("weight", "weight_scale")})
        else:
            value = tensors[name]
        parameter.data = value.to(parameter)

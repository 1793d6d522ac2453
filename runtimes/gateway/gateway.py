"""What a gateway is made of, and how it is made again when its bundle, policy or keys have changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtimes.gate.gate import Gate
from runtimes.gate.open import open_gate
from runtimes.gateway.options import GatewayOptions
from runtimes.gateway.serving.clients import Clients
from runtimes.gateway.upstream.exact import expected_guard
from runtimes.guard.bundle import Bundle, open_bundle
from runtimes.guard.judge import Guard
from runtimes.guard.policy import Policy
from runtimes.language.exact_guard import ExactGuardRunner
from runtimes.language.torch_language import TorchLanguageRunner
from runtimes.vllm_guard.verdict import Identity
from safevlm.errors import InputError

__all__ = ["Gateway"]


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """What a gateway is made of: a guard and, behind it, an upstream's URL or a gate with a language model.

    ``key`` is sent upstream where the client sends none; ``clients`` are those who may ask, None where everybody may;
    their keys are not passed on.
    """

    gate: Gate
    name: str
    """Name of the model in this process, as clients see it."""
    upstream: str | None = None
    exact: Identity | None = None
    """Whose exact verdicts the upstream gives; None where it is not asked for any."""
    options: GatewayOptions = field(default_factory=GatewayOptions)
    key: str | None = field(default=None, repr=False)
    clients: Clients | None = field(default=None, repr=False)
    again: Callable[[], Gateway] | None = field(default=None, repr=False)
    """Makes the same gateway of what its files hold now."""

    @classmethod
    def open(
        cls,
        bundle: Path | str | Bundle | None,
        *,
        upstream: str | None = None,
        exact: bool = False,
        model: str | None = None,
        policy: Policy | None = None,
        options: GatewayOptions | None = None,
        key: str | None = None,
        client_key: str | None = None,
        runtime: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Gateway:
        """Open a bundle, and a model (by default the bundle's own source) unless there is an ``upstream``.

        ``exact``: the upstream's own exact verdict settles what the guard is unsure of.

        A bundle of a guard's exact parts judges with the model in this process, by a prefill of each image. Raises
        InputError for a guard that cannot judge by itself; those of :func:`open_gate`.
        """
        options = options or GatewayOptions()
        if upstream is not None and (model is not None or bundle is None):
            raise InputError("--upstream needs --bundle and excludes --model, because the model runs upstream.")
        if exact and upstream is None:
            raise InputError("--exact upstream needs --upstream: a model in this process gives exact verdicts anyway.")
        if upstream is not None:
            assert bundle is not None
            bundle = open_bundle(bundle) if isinstance(bundle, (str, Path)) else bundle
            guard = Guard.open(bundle, runtime, precision=precision, threads=threads, view=options.view)
            gate = Gate(guard, None, policy)
        else:
            opened = open_bundle(bundle) if isinstance(bundle, (str, Path)) else bundle
            gate = open_gate(
                opened, model, policy=policy, runtime=runtime, precision=precision, threads=threads, view=options.view
            )
            if gate.guard is None and opened is not None and isinstance(gate.language, TorchLanguageRunner):
                gate = _judging_exactly(gate, opened, gate.language, options)
        if gate.guard is None:
            raise InputError(
                "the guard of this bundle (or GGUF folder) is not standalone: it needs the language model. Make a "
                "standalone one: python -m export.onnx --model M --out DIR --images DIR."
            )
        name = Path(model).name if model is not None else "safe-vlm"
        return cls(
            gate=gate,
            name=name,
            upstream=upstream,
            exact=expected_guard(bundle) if exact and isinstance(bundle, Bundle) else None,
            options=options,
            key=key,
            clients=None if client_key is None else Clients.of_key(client_key),
        )

    def renewed(self) -> Gateway:
        """Return the same gateway, made of what its files hold now.

        Raises InputError for one with a model in this process, which is not loaded twice, and what opening raises.
        """
        if self.again is None or self.upstream is None:
            raise InputError("a gateway with a model in its own process cannot be reloaded. Restart it.")
        return replace(self.again(), again=self.again)


def _judging_exactly(gate: Gate, bundle: Bundle, language: TorchLanguageRunner, options: GatewayOptions) -> Gate:
    """Return a gate whose guard is the language model's exact verdict, by the limits that the policy has for that."""
    manifest, policy = bundle.manifest, gate.policy
    runner = ExactGuardRunner(language, manifest.preprocessing, manifest.classes)
    guard = Guard(runner, manifest.classes, batch=options.batch, view=options.view)
    limits = policy.model_copy(update={"guard": policy.exact})
    return Gate(guard, language, limits, gate.timeout, digest=gate.digest, share_embeddings=False)

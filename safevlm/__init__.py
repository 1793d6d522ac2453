"""Safe-VLM Edge: judge images with a guard, gate a language model with it, and read what both are made of.

>>> from safevlm import Guard
>>> with Guard.open("build/guard") as guard:
...     guard.judge(["holiday.jpg"])

Judging
    ``Guard`` judges images with a bundle; each ``Judgement`` holds a ``Verdict``: allow, block, unsure or error.
    ``ImageSource`` is what it takes: a path, bytes or a Pillow image. ``open_image`` reads a file as it does.
Gating
    ``open_gate`` opens a ``Gate``: a guard in front of a language model. Its ``ask`` returns a ``GateResult``, whose
    ``Finding`` says what decided. ``Policy`` says which classes to block, and ``read_policy`` reads one from a file.
Files
    ``open_bundle`` opens a guard ``Bundle``, whose ``Manifest`` holds its ``Preprocessing`` and ``Thresholds``.
    ``open_checkpoint`` opens a ``Checkpoint`` by its name, hub id or folder.
Errors
    ``SafeVLMError`` is the root. ``InputError`` is what the caller can mend: ``BundleError``, ``CheckpointError``,
    ``HubError``, ``ImageFileError``, ``MissingExtraError``, ``QuestionError``. ``BusyError``: a runner is still at an
    earlier call. ``EngineUnavailableError``: no engine can be built on this machine.

Each is loaded when it is first asked for; none needs torch before it reads or runs a checkpoint's weights. Only
``safevlm`` and ``runtimes`` are loaded, so a project may have packages named ``export`` or ``benchmarks`` of its own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safevlm import version
from safevlm.imports.siblings import require_ours

if TYPE_CHECKING:
    from runtimes.gate.gate import Gate
    from runtimes.gate.open import open_gate
    from runtimes.gate.result import GateResult
    from runtimes.guard.bundle import Bundle, open_bundle
    from runtimes.guard.judge import Guard, ImageSource
    from runtimes.guard.policy import Policy, read_policy
    from runtimes.guard.verdict import Finding, Judgement, Verdict
    from safevlm.checkpoint.checkpoint import Checkpoint, open_checkpoint
    from safevlm.contract.manifest import Manifest, Thresholds
    from safevlm.contract.preprocessing import Preprocessing
    from safevlm.errors import (
        BundleError,
        BusyError,
        CheckpointError,
        EngineUnavailableError,
        HubError,
        ImageFileError,
        InputError,
        MissingExtraError,
        QuestionError,
        SafeVLMError,
    )
    from safevlm.images.image import open_image

__version__ = version.VERSION
__all__ = [
    "BundleError",
    "Bundle",
    "BusyError",
    "Checkpoint",
    "CheckpointError",
    "EngineUnavailableError",
    "Finding",
    "Gate",
    "GateResult",
    "Guard",
    "HubError",
    "ImageFileError",
    "ImageSource",
    "InputError",
    "Judgement",
    "Manifest",
    "MissingExtraError",
    "Policy",
    "Preprocessing",
    "QuestionError",
    "SafeVLMError",
    "Thresholds",
    "Verdict",
    "__version__",
    "open_bundle",
    "open_checkpoint",
    "open_gate",
    "open_image",
    "read_policy",
]

_MODULES = {
    "runtimes.gate.gate": "Gate",
    "runtimes.gate.open": "open_gate",
    "runtimes.gate.result": "GateResult",
    "runtimes.guard.bundle": "Bundle open_bundle",
    "runtimes.guard.judge": "Guard ImageSource",
    "runtimes.guard.policy": "Policy read_policy",
    "runtimes.guard.verdict": "Finding Judgement Verdict",
    "safevlm.checkpoint.checkpoint": "Checkpoint open_checkpoint",
    "safevlm.contract.manifest": "Manifest Thresholds",
    "safevlm.contract.preprocessing": "Preprocessing",
    "safevlm.errors": "BundleError BusyError CheckpointError EngineUnavailableError HubError ImageFileError InputError "
    "MissingExtraError QuestionError SafeVLMError",
    "safevlm.images.image": "open_image",
}
"""Where each name is defined, as text: ``safevlm`` stands below ``runtimes`` and imports nothing of it by itself."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for. Raises HiddenPackageError for a ``runtimes`` that is not ours."""
    if name not in _HOMES:
        raise AttributeError(f"module 'safevlm' has no attribute '{name}'")
    module = _HOMES[name]
    if module.startswith("runtimes."):
        require_ours("runtimes", "safevlm")
    found = globals()[name] = getattr(import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

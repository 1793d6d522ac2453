"""What differs between the architectures, as data: one :class:`Family` each, in ``safevlm/checkpoint/families``.

This half needs neither torch nor transformers. Which classes of transformers compute a family stands in
``safevlm/checkpoint/architectures``, its ONNX trunk in ``export/guard/trunks.py``, its GGUF files in
``export/gguf/families``. Nothing else asks which family a checkpoint is of (a test keeps it so).

Canonical tensor names are those of transformers >= 5 (``model.vision_tower.*``, ``model.visual.*``,
``model.multi_modal_projector.*``, ``model.language_model.*``, ``lm_head.*``) plus the guard's own
``img_safety_head.mlp.*``. A family's ``renames`` bring every layout that is known to exist to those names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from safevlm.network.dialogue import ChatFormat, PromptFormat

__all__ = [
    "FLAT_LANGUAGE_RENAME",
    "HEAD_PREFIX",
    "HEAD_RENAME",
    "LANGUAGE_RENAMES",
    "OUTPUT_PREFIX",
    "Family",
    "OwnSetting",
    "PromptFormat",
    "Rename",
    "TapSource",
]

TapSource = Literal["projector", "language_model"]

HEAD_PREFIX = "img_safety_head."
OUTPUT_PREFIX = "lm_head."

WRAPPERS = re.compile(
    r"(?:(?<=^)|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module)\."
)
"""Levels of a name that torch.compile, FSDP, activation checkpointing, Fabric and data-parallel wrappers add."""
OUTER = re.compile(r"^(?:base_model\.model\.|model\.(?=model\.|lm_head\.))+")
"""Levels that PEFT's model and a module holding the model (``self.model``) add before all others."""


@dataclass(frozen=True)
class Rename:
    """One rule from a stored tensor name to the canonical one: ``re.sub`` of an anchored pattern."""

    pattern: str
    replacement: str

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)


HEAD_RENAME = Rename(r"^(?:.*\.)?img_safety_head\.", HEAD_PREFIX)
"""The guard head may carry any prefix."""

LANGUAGE_RENAMES = (
    Rename(r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    Rename(r"^(?:model\.)?language_model\.model\.", "model.language_model."),
    Rename(r"^(?:model\.)?language_model\.", "model.language_model."),
    Rename(r"^lm_head\.", "lm_head."),
)
"""The language model as transformers names it, before and since version 5."""

FLAT_LANGUAGE_RENAME = Rename(r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model.")
"""The language model at the top, as the original LLaVA and the first Qwen2.5-VL checkpoints have it."""


@dataclass(frozen=True)
class OwnSetting:
    """A key of ``config.json`` by which the family's original code changes the image or the prompt."""

    key: str
    followed: tuple[object, ...]
    """The values that are followed here; every other one is refused."""
    effect: str
    """What another value does, as the end of "…, which ": for the message."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: how its tensors are named, where its guard taps, how its prompt is written."""

    key: str
    """Short name used in manifests: ``llava``, ``qwen2_5_vl`` or ``gemma3``."""
    title: str
    """The name people know: ``SafeLLaVA``, ``SafeQwen2.5-VL``, ``SafeGem``."""
    tiny: str
    """The tiny checkpoint of this family that ships with the package."""
    renames: tuple[Rename, ...]
    """Tried in order on a stored name; the first that matches gives the canonical name."""
    evidence: tuple[str, ...]
    """Canonical names that, all present, prove this family (shapes are not looked at)."""
    default_tap: TapSource
    vision_prefixes: tuple[str, ...]
    """Canonical prefixes of the vision tower and the projector: what a guard export reads, with the head."""
    language_prefix: str = "model.language_model."
    chat: ChatFormat
    processor_source: str
    """Hub id of the base model whose processor is used when the checkpoint carries none."""
    preprocessing: dict[str, object] = field(default_factory=dict)
    """Processor settings used when the checkpoint carries none, in ``preprocessor_config.json`` terms."""
    auto_processor: str
    """Class that transformers' AutoImageProcessor takes for ``auto_model_type`` where no file names one."""
    auto_model_type: str
    """``model_type`` of transformers' own config; another one is the family's original code."""
    own_settings: tuple[OwnSetting, ...] = ()
    """What the family's original code reads from ``config.json``."""
    free_grid: bool = False
    """Whether the vision tower reads many sizes, of which ``--grid`` chooses one."""
    half: Literal["F16", "BF16"] = "F16"
    """The 16-bit format that holds the language model's numbers, where the checkpoint states none."""
    norm_offset: float = 0.0
    """What the language model's norms add to their weight before it multiplies."""
    mlp_norm: str = "post_attention_layernorm"
    """The decoder layer's norm that stands before its MLP."""
    image_linear: str | None = None
    """Canonical name of the linear that writes image features into the residual stream; None where that stream cannot
    be turned, since norms stand on what blocks add to it."""

    def fixed_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Return the size to choose so that the tower reads ``height`` × ``width``; None where there is no choice."""
        return (height, width) if self.free_grid else None

    @property
    def prompt(self) -> PromptFormat:
        """The prompt of one user turn."""
        return self.chat.prompt

    def canonical(self, name: str) -> str | None:
        """Return the canonical name of a stored tensor, or ``None`` when no rule of this family knows it.

        What wrappers added to the name is left out first.
        """
        name = OUTER.sub("", WRAPPERS.sub("", name))
        for rename in self.renames:
            if rename.compiled.match(name):
                return rename.compiled.sub(rename.replacement, name, count=1)
        return None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Canonical prefixes of every part: vision, projector, language model, output matrix and guard head."""
        return (*self.vision_prefixes, self.language_prefix, OUTPUT_PREFIX, HEAD_PREFIX)

    def matches(self, names: Iterable[str]) -> bool:
        """Say whether a checkpoint with these stored tensor names is of this family."""
        known = {self.canonical(name) for name in names}
        return all(evidence in known for evidence in self.evidence)

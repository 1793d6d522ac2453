"""A Safe-VLM checkpoint, opened without running its code and without reading its weights.

Opening reads JSON and safetensors headers. The family is recognised by the stored tensors; every tensor has one
canonical name, whatever layout stored it (see :mod:`safevlm.checkpoint.family`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safevlm.checkpoint.configs.processor_files import read_processor_settings
from safevlm.checkpoint.families import FAMILIES
from safevlm.checkpoint.family import HEAD_PREFIX, OUTPUT_PREFIX, Family, TapSource
from safevlm.checkpoint.guard_head import (
    HeadShape,
    check_width,
    hidden_size_of,
    read_classes,
    read_head,
    standard_classes,
)
from safevlm.checkpoint.hub import fetch_checkpoint, find_model
from safevlm.checkpoint.ignored import NOTHING, Ignored, report_ignored
from safevlm.checkpoint.tap import Tap, find_tap
from safevlm.checkpoint.weights.quantized import Quantization, QuantizedTensors, read_quantization, refuse_scales
from safevlm.checkpoint.weights.shards import Shards
from safevlm.checkpoint.weights.tensors import TensorStore
from safevlm.errors import CheckpointError
from safevlm.files.json_file import read_json_object

__all__ = [
    "OUTPUT_PREFIX",
    "RANDOM_KEY",
    "Checkpoint",
    "HeadShape",
    "open_checkpoint",
    "standard_classes",
    "tell_family",
]

RANDOM_KEY = "safevlm_edge_random_weights"
"""Set in the config of a stand-in (benchmarks.random_checkpoint), whose verdicts and answers are noise."""
SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What is known about a checkpoint before any weight is read."""

    name: str
    folder: Path
    revision: str | None
    """The commit of the hub that was opened; ``None`` for a folder of this machine."""
    family: Family
    config: Mapping[str, Any]
    """config.json as it is stored."""
    classes: tuple[str, ...]
    """Class names in the order of the head's outputs."""
    head: HeadShape
    tap: Tap
    processor: Mapping[str, Any]
    """Image processor settings: the checkpoint's own, or the family's where it has none."""
    tensors: TensorStore
    """Those of a quantized language model stand for the numbers that were stored (see ``weights.quantized``)."""
    ignored: Ignored = NOTHING
    """Files and tensors that lie in the checkpoint and are not part of what is read."""
    quantization: Quantization | None = None

    @property
    def random_weights(self) -> bool:
        """Whether the config says that the weights are random: good for sizes and times alone."""
        return self.config.get(RANDOM_KEY) is True

    @property
    def hidden_size(self) -> int:
        """Width of the language model, which is the width of the head's input."""
        return self.head.widths[0]

    def vision_names(self) -> tuple[str, ...]:
        """Return the canonical names of the vision tower's and the projector's tensors."""
        return self._names(*self.family.vision_prefixes)

    def head_names(self) -> tuple[str, ...]:
        """Return the canonical names of the guard head's tensors."""
        return self._names(HEAD_PREFIX)

    def language_names(self) -> tuple[str, ...]:
        """Return the canonical names of the language model's tensors, output matrix included."""
        return self._names(self.family.language_prefix, OUTPUT_PREFIX)

    def _names(self, *prefixes: str) -> tuple[str, ...]:
        return tuple(name for name in self.tensors.names() if name.startswith(prefixes))


def open_checkpoint(model: str | Path, *, tap: TapSource | None = None, revision: str | None = None) -> Checkpoint:
    """Open a folder, one of the six names, a hub id (``owner/name@revision``) or a tiny name.

    ``tap`` overrides what config, code and family say of the guard's tap. Nothing of the checkpoint is imported
    or run, and of a hub's shards only those that hold the guard head are fetched. What is ignored of it is logged
    once, as a warning.
    Raises InputError for an unknown name, HubError, CheckpointError, GuardHeadError.
    """
    reference = find_model(model, revision)
    commit = None
    if reference.folder is not None:
        folder = reference.folder
        shards = Shards.local(folder, _stated_weights(folder))
    else:
        hub = fetch_checkpoint(reference.repo_id or reference.name, reference.revision)
        folder, commit = hub.folder, hub.commit
        top = [name for name in hub.files if "/" not in name]
        shards = Shards(
            reference.name,
            folder,
            top,
            exists=hub.files.__contains__,
            path_of=hub.shard,
            stated=_stated_weights(folder),
        )
    name = reference.name
    family = tell_family(name, shards.stored)
    config = read_json_object(folder / "config.json", needed_for="a checkpoint's configuration")
    quantization = read_quantization(name, config)
    if quantization is None:
        tensors = TensorStore(shards, family.canonical)
    else:
        tensors = QuantizedTensors(shards, family.canonical, quantization)
    head = read_head(name, tensors)
    check_width(name, head, hidden_size_of(config, tensors))
    if quantization is None:
        refuse_scales(name, shards.stored)
    ignored = _find_ignored(shards, family)
    report_ignored(name, ignored)
    return Checkpoint(
        name=name,
        folder=folder,
        revision=commit,
        family=family,
        config=config,
        classes=read_classes(name, config, head),
        head=head,
        tap=find_tap(family, config, folder, tap),
        processor=read_processor_settings(folder, family, config),
        tensors=tensors,
        ignored=ignored,
        quantization=quantization,
    )


def tell_family(where: str, stored_names: Iterable[str]) -> Family:
    """Return the family whose evidence stands among stored tensor names; ``model_type`` is not asked.

    Raises CheckpointError when none or several match, with what each lacks.
    """
    names = sorted(stored_names)
    found = [family for family in FAMILIES.values() if family.matches(names)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(names[:SHOWN_NAMES]) or "none"
    if found:
        raise CheckpointError(
            f"{where}: its tensors fit several families: {', '.join(family.title for family in found)}. Remove the "
            f"shards that belong to another checkpoint. Tensors stored: {shown}, …"
        )
    lacks = "; ".join(f"{family.title} needs {', '.join(_lacking(family, names))}" for family in FAMILIES.values())
    prefix = _unknown_prefix(names)
    if prefix:
        raise CheckpointError(
            f"{where}: the names of the tensors begin with the unknown prefix {prefix[:80]!r}. Save the checkpoint "
            f"again without that prefix. Tensors stored: {shown}, …"
        )
    guard = any(HEAD_PREFIX in name for name in names)
    what = "a Safe-VLM of no known family" if guard else "not a Safe-VLM checkpoint"
    raise CheckpointError(
        f"{where}: {what}: {lacks}. Tensors stored: {shown}{', …' if len(names) > SHOWN_NAMES else ''}. "
        "Give a complete SafeLLaVA, SafeQwen2.5-VL or SafeGem checkpoint, vision tower and projector included."
    )


def _unknown_prefix(names: list[str]) -> str | None:
    """Return the one or two first levels of most names without which they are a family's, or ``None``."""
    for depth in (1, 2):
        heads = Counter(".".join(name.split(".", depth)[:depth]) + "." for name in names if name.count(".") >= depth)
        for prefix, count in heads.most_common(1):
            shorter = [name.removeprefix(prefix) for name in names]
            if 2 * count > len(names) and any(family.matches(shorter) for family in FAMILIES.values()):
                return prefix
    return None


def _lacking(family: Family, stored: Iterable[str]) -> list[str]:
    known = {family.canonical(name) for name in stored}
    return [f"'{name}'" for name in family.evidence if name not in known]


def _stated_weights(folder: Path) -> object:
    """Return ``transformers_weights`` of config.json: the file that transformers reads, whatever lies beside it."""
    path = folder / "config.json"
    if not path.is_file():
        return None  # refused with the reason once it is known that there are weights
    return read_json_object(path, needed_for="a checkpoint's configuration").get("transformers_weights")


def _find_ignored(shards: Shards, family: Family) -> Ignored:
    """Return what lies in the checkpoint and is no part of the model."""
    unknown = sorted(name for name in shards.stored if not (family.canonical(name) or name).startswith(family.prefixes))
    return Ignored(files=shards.ignored, tensors=tuple(unknown), share=shards.share(unknown))

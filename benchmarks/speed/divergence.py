"""How far a rounded language model is from its 16-bit one on held-out text: KL divergence and the likeliest token.

Shapes: L positions, D width of the language model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.checkpoint.weights.quantized import round_inputs
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from safevlm.network.safe_vlm import SafeVLM

__all__ = ["BEGINNINGS", "OTHER_SYSTEM", "Divergence", "Reference", "Window"]

BEGINNINGS = ("calibrated", "raw", "other")
"""As calibration rows begin; text alone, cut anywhere; behind another system prompt."""
OTHER_SYSTEM = "You are the night clerk of a small museum. You answer in short sentences, and you love timetables."
SCORED = 2**24
"""Log-probabilities at once."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Token ids, and the first position that is scored: the beginning before it is not."""

    ids: tuple[int, ...]
    first: int


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Mean over the scored positions of one beginning's windows."""

    kl: float
    """KL(16 bit || rounded), in nats."""
    same_token: float
    """Share of positions with the same likeliest token."""


class Reference:
    """The 16-bit model of a checkpoint in float32, and windows of held-out text behind each beginning.

    ``seed`` chooses the windows' places. Raises InputError for a text that is shorter than the windows together.
    """

    def __init__(self, checkpoint: Path, text: str, *, windows: int, length: int, seed: int) -> None:
        self._checkpoint = checkpoint
        model = load_safe_vlm(open_checkpoint(checkpoint, tap="language_model"))
        self.windows = _windows(model, text, windows=windows, length=length, seed=seed)
        self._head_VD = _output_matrix(model)
        self._states = {name: [_states(model, window) for window in rows] for name, rows in self.windows.items()}

    def of_artifact(self, folder: Path) -> dict[str, Divergence]:
        """Return the divergence of a compressed checkpoint."""
        return self.of(load_safe_vlm(open_checkpoint(folder, tap="language_model")))

    def of_weights(self, weights: dict[str, Tensor], *, rounds_inputs: bool = False) -> dict[str, Divergence]:
        """Return that of the 16-bit model with some weights replaced: ``layers.0.mlp.up_proj.weight`` …

        With ``rounds_inputs`` what the linears among them read is rounded to 8 bits, a scale a token.
        """
        model = load_safe_vlm(open_checkpoint(self._checkpoint, tap="language_model"))
        slots = dict(model.core.language_model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                slots[name].copy_(value)
        if rounds_inputs:
            linears = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
            round_inputs(model.core.language_model, linears)
        return self.of(model)

    @torch.no_grad()
    def of(self, model: SafeVLM) -> dict[str, Divergence]:
        """Return the divergence of a model for each beginning, over the 16-bit model's words: others may have more.

        One more is ``<image>``, which LLaVA's readers look up.
        """
        head_VD = _output_matrix(model)[: len(self._head_VD)]
        step = max(1, SCORED // len(head_VD))
        found = {}
        for name, rows in self.windows.items():
            total = hits = count = 0.0
            for window, wanted_LD in zip(rows, self._states[name], strict=True):
                states_LD = _states(model, window)
                for start in range(window.first, len(window.ids), step):
                    at = slice(start, start + step)
                    wanted = torch.log_softmax(wanted_LD[at] @ self._head_VD.T, dim=-1)
                    given = torch.log_softmax(states_LD[at] @ head_VD.T, dim=-1)
                    total += float((wanted.exp() * (wanted - given)).sum())
                    hits += float((wanted.argmax(dim=-1) == given.argmax(dim=-1)).sum())
                    count += len(wanted)
            found[name] = Divergence(kl=total / count, same_token=hits / count)
        return found


def _windows(model: SafeVLM, text: str, *, windows: int, length: int, seed: int) -> dict[str, list[Window]]:
    """Return the same windows of ``length`` tokens behind each beginning."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    room = len(ids) // windows - length
    if room < 0:
        raise InputError(
            f"the held-out text has {len(ids)} tokens; {windows} windows of {length} need {windows * length}. Give "
            "fewer windows."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = [
        number * (room + length) + int(torch.randint(room + 1, (), generator=generator)) for number in range(windows)
    ]
    chat = model.family.chat
    other = (
        f"{chat.opening}{chat.user[0]}{OTHER_SYSTEM}{chat.folded_end}"
        if chat.system is None
        else f"{chat.opening}{OTHER_SYSTEM.join(chat.system)}{chat.user[0]}"
    )
    before: dict[str, Sequence[int]] = {
        name: model.tokenizer.encode(beginning, add_special_tokens=False)
        for name, beginning in zip(BEGINNINGS, (model.family.prompt.before_text, "", other), strict=True)
    }
    return {
        name: [Window(ids=(*first, *ids[start : start + length]), first=len(first)) for start in starts]
        for name, first in before.items()
    }


@torch.no_grad()
def _states(model: SafeVLM, window: Window) -> Tensor:
    """Return the last hidden states behind the last norm, L × D."""
    core: Any = model.core.language_model
    found: Tensor = core(input_ids=torch.tensor([window.ids]), use_cache=False).last_hidden_state[0]
    return found


def _output_matrix(model: SafeVLM) -> Tensor:
    whole: Any = model.model
    found: Tensor = whole.lm_head.weight.detach()
    return found

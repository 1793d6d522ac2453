"""A tiny Safe-VLM as it is trained: transformers' own layers, the guard head, a packed forward pass.

Shapes: B images, S input size, T image tokens, P prefix tokens, L packed tokens, M supervised tokens,
H hidden width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tiny.blueprints import Blueprint
from benchmarks.tiny.packing import PADDING, PREFIX, Packed
from safevlm.checkpoint.architectures import ARCHITECTURES
from safevlm.checkpoint.families import FAMILIES
from safevlm.network.fixed_windows import FixedWindowTower
from safevlm.network.head import GuardHead

__all__ = ["TinyNetwork"]

CLASSES = 20


class TinyNetwork(nn.Module):
    """One blueprint's model and guard head."""

    mean: Tensor
    std: Tensor

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.width = int(blueprint.text["hidden_size"])
        self.tokens = blueprint.image_tokens
        self.architecture = ARCHITECTURES[blueprint.family]
        self.model: Any = _transformers_model(blueprint)
        self.head = GuardHead((self.width, self.width // 2, CLASSES))
        self.windows: list[FixedWindowTower] | None = None
        self.compiled = False
        mean = torch.tensor(blueprint.processor["image_mean"]) * 255
        std = torch.tensor(blueprint.processor["image_std"]) * 255
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def compile_layers(self) -> None:
        """Compile the transformer blocks in place; on two cores this makes a step about a third shorter."""
        torch._dynamo.config.recompile_limit = 32
        self.compiled = True
        inner = self.model.model
        layers = list(inner.language_model.layers)
        if not self.blueprint.batched_tower:  # that one is compiled whole, see _batched_features
            layers += inner.vision_tower.encoder.layers
        for layer in layers:
            layer.compile(dynamic=False)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, the guard head's included."""
        return sum(p.numel() for p in self.parameters())

    @property
    def vision_modules(self) -> list[nn.Module]:
        """The vision tower and the projector."""
        tower, projector = self.architecture.tower, self.architecture.projector
        names = [tower] if projector.startswith(f"{tower}.") else [tower, projector]
        return [self.model.model.get_submodule(name) for name in names]

    def image_features(self, rgb: Tensor) -> Tensor:
        """Return projector output B×T×H for uint8 images B×S×S×3."""
        pixels = ((rgb.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        if self.blueprint.batched_tower:
            return self._batched_features(pixels)
        return torch.stack(tuple(self.model.model.get_image_features(pixels).pooler_output))

    def _batched_features(self, pixels: Tensor) -> Tensor:
        """Run the tower batched over images: transformers' own forward goes through them one by one."""
        visual = self.model.model.visual
        if self.windows is None:
            self.windows = [FixedWindowTower(visual, *pixels.shape[2:])]  # in a list: its blocks have an owner
            if self.compiled:
                self.windows[0].compile(dynamic=False)
        states = self.windows[0](pixels, visual.patch_embed.proj.weight.sum(dim=2))
        merged: Tensor = visual.merger(states.flatten(0, 1))
        return merged.reshape(len(pixels), self.tokens, self.width)[:, self.windows[0].reading_order]

    def forward(self, rgb: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        """Return answer logits M×V, guard logits B×C and the projector output B×T×H."""
        features = self.image_features(rgb)
        start = packed.prefix - self.tokens
        embedded = self.model.get_input_embeddings()(packed.ids)
        embedded = torch.cat([embedded[:, :start], features.to(embedded.dtype), embedded[:, packed.prefix :]], dim=1)
        hidden = self.model.model.language_model(
            inputs_embeds=embedded,
            attention_mask=self._masks(packed),
            position_ids=self._positions(packed),
            use_cache=False,
        ).last_hidden_state
        tapped = (
            features if FAMILIES[self.blueprint.family].default_tap == "projector" else hidden[:, start : packed.prefix]
        )
        logits: Tensor = self.model.lm_head(hidden[packed.rows, packed.columns])
        guard: Tensor = self.head(tapped.float().mean(1))
        return logits, guard, features

    def _positions(self, packed: Packed) -> Tensor:
        in_prefix = packed.branch == PREFIX
        if self.architecture.axes == 1:
            return packed.offsets + packed.prefix * ~in_prefix
        side = round(self.tokens**0.5)
        start = packed.prefix - self.tokens
        image = torch.arange(self.tokens)
        prefix = torch.arange(packed.prefix).repeat(3, 1)
        prefix[0, start:], prefix[1, start:], prefix[2, start:] = start, start + image // side, start + image % side
        positions: Tensor = (packed.offsets + start + side).repeat(3, 1, 1)
        positions[:, :, : packed.prefix] = prefix[:, None]
        return positions

    def _masks(self, packed: Packed) -> Tensor | dict[str, Tensor]:
        """Return who sees whom, bool B×1×L×L: the prefix and one's own branch, up to oneself."""
        branch, place = packed.branch, packed.offsets + packed.prefix * (packed.branch != PREFIX)
        near = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == PREFIX)
        distance = place[:, :, None] - place[:, None, :]
        causal = near & (distance >= 0) & (branch[:, None, :] != PADDING)
        if self.architecture.images_see_themselves:
            image = (branch == PREFIX) & (place >= packed.prefix - self.tokens)
            causal = causal | (image[:, :, None] & image[:, None, :])
        causal = causal | torch.eye(causal.shape[-1], dtype=torch.bool)
        text = self.model.config.text_config
        kinds = getattr(text, "layer_types", None)
        if kinds is None:
            return causal[:, None]
        masks = {"full_attention": causal[:, None]}
        if "sliding_attention" in kinds:
            masks["sliding_attention"] = (causal & (distance.abs() < text.sliding_window))[:, None]
        return masks


def _transformers_model(blueprint: Blueprint) -> Any:
    architecture = ARCHITECTURES[blueprint.family]
    config: Any = architecture.config_class
    model: Any = architecture.whole_class(
        config(text_config=dict(blueprint.text), vision_config=dict(blueprint.vision), **blueprint.top)
    )
    for name, deviation in blueprint.drawn.items():
        nn.init.normal_(model.model.get_parameter(name), std=deviation)
    return model.float()

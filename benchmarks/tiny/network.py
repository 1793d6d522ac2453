"""A tiny Safe-VLM as it is trained: transformers' own layers, the guard head, a packed forward pass.

Shapes: B pictures, S input size, T image tokens, P prefix tokens, L packed tokens, M supervised tokens,
H hidden width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tiny.blueprints import Blueprint
from benchmarks.tiny.packing import PADDING, PREFIX, Packed, image_tokens
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
        self.tokens = image_tokens(blueprint)
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
        if self.blueprint.family != "qwen2_5_vl":  # whose tower is compiled whole, see _qwen_features
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
        inner = self.model.model
        if self.blueprint.family == "qwen2_5_vl":
            return [inner.visual]
        return [inner.vision_tower, inner.multi_modal_projector]

    def image_features(self, rgb: Tensor) -> Tensor:
        """Return projector output B×T×H for uint8 pictures B×S×S×3."""
        pixels = ((rgb.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        if self.blueprint.family == "qwen2_5_vl":
            features = self._qwen_features(pixels)
        elif self.blueprint.family == "llava":
            features = self.model.model.get_image_features(
                pixels, vision_feature_layer=-2, vision_feature_select_strategy="default"
            ).pooler_output
            features = torch.stack(list(features))
        else:
            features = self.model.model.get_image_features(pixels).pooler_output
        assert isinstance(features, Tensor)
        return features

    def _qwen_features(self, pixels: Tensor) -> Tensor:
        """Run the tower batched over pictures: transformers' own forward goes through them one by one."""
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
        tapped = features if self.blueprint.family == "gemma3" else hidden[:, start : packed.prefix]
        logits: Tensor = self.model.lm_head(hidden[packed.rows, packed.columns])
        guard: Tensor = self.head(tapped.float().mean(1))
        return logits, guard, features

    def _positions(self, packed: Packed) -> Tensor:
        in_prefix = packed.branch == PREFIX
        if self.blueprint.family != "qwen2_5_vl":
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
        if self.blueprint.family == "gemma3":
            image = (branch == PREFIX) & (place >= packed.prefix - self.tokens)
            causal = causal | (image[:, :, None] & image[:, None, :])
        causal = causal | torch.eye(causal.shape[-1], dtype=torch.bool)
        masks = {"full_attention": causal[:, None]}
        if self.blueprint.family == "gemma3":
            window = int(self.blueprint.text["sliding_window"])
            masks["sliding_attention"] = (causal & (distance.abs() < window))[:, None]
        return masks["full_attention"] if self.blueprint.family == "llava" else masks


def _transformers_model(blueprint: Blueprint) -> Any:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    text, vision = dict(blueprint.text), dict(blueprint.vision)
    model: Any
    if blueprint.family == "llava":
        config = LlavaConfig(
            text_config={"model_type": "llama", **text}, vision_config={"model_type": "clip_vision_model", **vision}
        )
        model = LlavaForConditionalGeneration(config)
    elif blueprint.family == "gemma3":
        tokens = int(blueprint.config["mm_tokens_per_image"])
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=tokens)
        )
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.06)
    else:
        untyped: Any = Qwen2_5_VLForConditionalGeneration
        model = untyped(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=blueprint.image_token_id)
        )
    return model.float()

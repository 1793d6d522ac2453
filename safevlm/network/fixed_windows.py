"""Qwen2.5-VL's vision tower at one grid, its windows and rotary angles constants.

Preserves the tower's tokens for images of that one size, in window order instead of reading order: a mean
over tokens does not see the difference, and the gather that would put them back is saved. transformers' own
forward splits the sequence at lengths that it computes from the grid, which no exporter can follow; at a
fixed grid the lengths are known, equal windows become a batch dimension, and the two equal frames that a
still image stands for become one by adding the patch kernel over time.

Shapes: N images, H × W pixels, p patch size, m merge size, S = (H/p)·(W/p) patches, T = S/m² tokens,
E tower width, h heads, d head width, G windows of w patches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

__all__ = ["FixedWindowTower"]


class FixedWindowTower(nn.Module):
    """``Qwen2_5_VisionTransformerPretrainedModel`` without its merger, for N × 3 × H × W pixels."""

    order: Tensor
    """S: which patch, in reading order, stands where."""
    reading_order: Tensor
    """T: where each token, in reading order, stands; puts the merger's output back in order."""
    cos: Tensor
    signed_sin: Tensor
    """Each S × 1 × d; the first half of the sines is negative, so that no pass over queries and keys turns signs."""

    def __init__(self, tower: Any, height: int, width: int) -> None:
        super().__init__()
        config = tower.config
        self.blocks = tower.blocks
        self.heads = int(config.num_heads)
        self.full_layers = frozenset(config.fullatt_block_indexes)
        self.kernel = nn.Parameter(tower.patch_embed.proj.weight.sum(dim=2), requires_grad=False)
        grid = torch.tensor([[1, height // config.patch_size, width // config.patch_size]])
        merge = int(config.spatial_merge_size)
        windows, ends = get_vision_window_index(grid, merge, int(config.window_size), int(config.patch_size))
        blocks_S = _patches_by_token(int(grid[0, 1]), int(grid[0, 2]), merge)
        self.window_lengths = [int(n) for n in (ends[1:] - ends[:-1])]
        self.register_buffer("order", blocks_S[windows].flatten(), persistent=False)
        self.register_buffer("reading_order", torch.argsort(windows), persistent=False)
        in_blocks = get_vision_position_ids(grid, merge)
        cos, sin = tower.rotary_pos_emb(self.kernel, in_blocks)
        cos, sin = (angle.unflatten(0, (-1, merge**2))[windows].flatten(0, 1)[:, None].float() for angle in (cos, sin))
        first, second = sin.chunk(2, dim=-1)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("signed_sin", torch.cat((-first, second), dim=-1), persistent=False)

    def forward(self, pixels_NCHW: Tensor, kernel: Tensor | None = None) -> Tensor:
        """Return N × S × E hidden states, window by window, the m² patches of a token side by side.

        ``kernel`` replaces the patch kernel, E × 3 × p × p: training gives the one of the moment.
        """
        kernel = self.kernel if kernel is None else kernel
        patches = F.conv2d(pixels_NCHW.to(kernel.dtype), kernel, stride=kernel.shape[-1])
        hidden = patches.flatten(2).transpose(1, 2)[:, self.order]
        for number, block in enumerate(self.blocks):
            full = number in self.full_layers
            hidden = hidden + self._attend(block.attn, block.norm1(hidden), full)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return hidden

    def _attend(self, attention: Any, hidden_NSE: Tensor, full: bool) -> Tensor:
        qkv = attention.qkv(hidden_NSE).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(2)  # each N × S × h × d
        q, k = self._rotate(q), self._rotate(k)
        lengths = [hidden_NSE.shape[1]] if full else self.window_lengths
        if len(set(lengths)) == 1:
            parts = [_attend_windows(q, k, v, len(lengths))]
        else:
            split = [x.split(lengths, dim=1) for x in (q, k, v)]
            parts = [_attend_windows(q, k, v, 1) for q, k, v in zip(*split, strict=True)]
        mixed: Tensor = attention.proj(torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        return mixed

    def _rotate(self, x_NShd: Tensor) -> Tensor:
        x = x_NShd.float()
        first, second = x.chunk(2, dim=-1)
        return (x * self.cos + torch.cat((second, first), dim=-1) * self.signed_sin).to(x_NShd.dtype)


def _patches_by_token(rows: int, columns: int, merge: int) -> Tensor:
    """Return T × m²: which patches, counted in reading order, make up each token."""
    reading = torch.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return reading.transpose(1, 2).reshape(-1, merge**2)


def _attend_windows(q_NShd: Tensor, k_NShd: Tensor, v_NShd: Tensor, windows: int) -> Tensor:
    """Attend inside each of ``windows`` equal windows of S; return N × S × E."""
    n, s, heads, width = q_NShd.shape
    by_window = (n * windows, s // windows, heads, width)
    q, k, v = (x.reshape(by_window).transpose(1, 2) for x in (q_NShd, k_NShd, v_NShd))
    mixed: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return mixed.reshape(n, s, heads * width)

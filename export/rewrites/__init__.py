"""Rewrites of the guard's graph, one a file; each says what it preserves, and an export's parity check proves it."""

from __future__ import annotations

__all__ = ["DOMAIN", "FUSED"]

DOMAIN, FUSED = "com.microsoft", "MultiHeadAttention"
"""The node that attention is written as; see :mod:`export.rewrites.attention`."""

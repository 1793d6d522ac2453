"""Drop the encoder layers behind the one that the tap reads.

Preserves every hidden state up to and including the one read; LLaVA reads layer -2 of CLIP, so the last layer
and the final norm go.
"""

from __future__ import annotations

from safevlm.errors import CheckpointError

__all__ = ["layers_read"]


def layers_read(count: int, hidden_state: int) -> int:
    """Return how many of ``count`` layers stand before ``hidden_states[hidden_state]``.

    ``hidden_states`` has count + 1 entries, the embeddings first, as transformers numbers them.
    """
    if not -(count + 1) <= hidden_state <= count:
        raise CheckpointError(
            f"the vision tower is read at hidden state {hidden_state}, but it has {count} layers: "
            f"{-(count + 1)} to {count} are allowed. The config's 'mm_vision_select_layer' or "
            "'vision_feature_layer' does not belong to these weights."
        )
    return hidden_state % (count + 1)

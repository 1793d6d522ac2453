"""From a checkpoint to a compressed one, layer by layer."""

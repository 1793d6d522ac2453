"""A Safe-VLM checkpoint: where it lies, its family, its guard head and tap, its configs and weights."""

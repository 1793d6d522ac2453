"""A checkpoint's tensors, read one at a time."""

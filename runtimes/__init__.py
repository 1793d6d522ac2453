"""One runner a runtime, reading a bundle, and judging images with it."""

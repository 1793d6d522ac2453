"""TensorRT engines of a guard."""

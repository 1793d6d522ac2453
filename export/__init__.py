"""Guard bundles: the ONNX split, TensorRT engines, parity, writing."""

"""TensorRT engines: which there are for this device, loading one, and the proof that it answers as its ONNX file."""

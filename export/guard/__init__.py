"""The guard as ONNX files in a bundle."""

"""Guard bundles: the ONNX split, TensorRT engines, parity, writing."""

from safevlm.imports.siblings import join

join(__name__)

"""GGUF: a checkpoint's language model and multimodal projector for llama.cpp, the guard beside them."""

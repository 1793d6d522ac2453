"""Small language models with real weights, as package registries hold them, put into Safe-VLM checkpoints."""

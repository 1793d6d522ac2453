"""The three tiny Safe-VLMs: blueprints, tokenizers, the training recipe, and the trained checkpoints."""

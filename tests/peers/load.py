"""Run in a peer's environment: ``load.py FOLDER OUT [BACKEND]`` loads an artifact and writes its logits to OUT."""

import sys

import torch
from transformers import AutoModelForImageTextToText

folder, out, *backend = sys.argv[1:]
settings = {}
if backend:
    from transformers import GPTQConfig

    settings["quantization_config"] = GPTQConfig(bits=4, backend=backend[0])
# float32 by name for both: transformers 4 and 5 call the argument differently
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **settings).eval()
ids = torch.load(f"{out}.ids")
extra = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits
torch.save(logits, out)
linear = model.model.language_model.layers[0].self_attn.q_proj
print(type(linear).__module__, type(linear).__name__)

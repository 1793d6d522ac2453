"""An OpenAI-compatible server with the guard in front of any language model: ``python -m runtimes.gateway``."""

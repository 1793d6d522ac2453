"""The gate: an image passes the guard before a language model answers about it."""

"""The models themselves, on torch."""

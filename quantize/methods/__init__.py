"""Algorithms of rounding, one a file."""

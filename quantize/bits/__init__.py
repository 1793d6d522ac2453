"""Bits by safety sensitivity."""

"""The views and tiles of an image that a guard judges."""

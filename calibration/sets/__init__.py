"""Calibration sets: conversations, their images, their mix, and what they must not share with a suite."""

"""Calibration sets, activation capture, head distillation and guard thresholds."""

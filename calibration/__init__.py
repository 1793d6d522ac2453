"""Calibration sets, activation capture, head distillation and guard thresholds."""

from safevlm.imports.siblings import join

join(__name__)

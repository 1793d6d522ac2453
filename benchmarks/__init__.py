"""Suites, judges, statistics, reports, and speed against peers."""

from safevlm.imports.siblings import join

join(__name__)

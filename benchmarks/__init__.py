"""Suites, judges, statistics, reports, and speed against peers."""

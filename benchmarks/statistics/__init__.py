"""Paired statistics of two runs: intervals, tests, the verdict's rule, and the simulation of its error rates."""

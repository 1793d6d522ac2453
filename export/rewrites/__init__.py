"""Rewrites of the guard's graph, one a file; each says what it preserves, and an export's parity check proves it."""

"""A small guard head fitted to the exact guard's verdicts."""

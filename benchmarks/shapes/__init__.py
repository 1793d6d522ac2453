"""The true shapes of the six, with random weights."""

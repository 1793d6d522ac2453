"""What each step of the proof does, a file a step; each runs in a process of its own."""

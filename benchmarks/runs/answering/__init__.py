"""Who answers a suite's rows: a checkpoint, a guard bundle, both behind a gate, a server."""

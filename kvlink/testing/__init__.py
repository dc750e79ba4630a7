"""Cases and helpers that tests and benchmarks share."""

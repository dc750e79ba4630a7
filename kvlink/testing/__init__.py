"""Cases and tolerances that tests and benchmarks share."""

"""What the development commands, the tests and the benchmarks share."""

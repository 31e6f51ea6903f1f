"""A GPU that is not there: `make gpu` walks its whole way on it, and nothing is computed (`benchmarks.rehearse`)."""

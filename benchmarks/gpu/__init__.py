"""`python -m benchmarks gpu`: everything that only a machine with a GPU can tell, in one run."""

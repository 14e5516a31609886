"""Benchmarks: ``python -m benchmarks NAME [options]``. The results that the documentation quotes are in results/."""

"""Benchmarks: ``python -m benchmarks NAME [options]``. Results that the documentation quotes are committed under results/."""

"""Benchmarks: ``python -m benchmarks NAME [options]``. Results that the README quotes are committed under results/."""

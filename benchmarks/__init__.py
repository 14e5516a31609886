"""Benchmarks: ``python -m benchmarks --help``. The results that the documentation quotes are committed in results/."""

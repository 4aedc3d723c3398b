"""What this package costs beside its comparators: `python -m benchmarks`."""

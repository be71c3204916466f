"""Benchmarks of the farm; each measures both sides in the same run."""

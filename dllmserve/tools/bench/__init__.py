"""Benchmarks of the engine: workload, timed runs, roofline, kernel share, report, picture."""

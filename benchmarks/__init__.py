"""Timings against dense, mask-only, sliced and repacked attention: `python -m benchmarks.run`."""

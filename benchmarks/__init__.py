"""Measurements against diffusers, eager and compiled, in the same run. Start with `python -m benchmarks.run --help`."""

"""Which heads do the methods keep, and what is lost: `python -m benchmarks.experiments.run`; see PROTOCOL.md."""

"""Speed of the compiled programs, each beside what the same machine can do at most. `python -m benchmarks.run` runs them all."""

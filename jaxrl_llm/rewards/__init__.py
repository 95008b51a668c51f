"""HOST. Graders are pure functions of strings, run in a pool of processes under a deadline. Never jax."""

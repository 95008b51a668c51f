"""Run directory -> one self-contained HTML page; see `build.build`. Host only, imports no jax."""

"""Published effects reproduced at small scale: `python -m experiments.NAME`, then docs/experiments.md. No part of the package."""

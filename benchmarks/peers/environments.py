"""`python -m benchmarks.peers.environments [transformers trl tunix]`: the environment of each peer, by package name and version.

They are in benchmarks/peers/.envs/. If JAXRL_TORCH_PYTHON, JAXRL_TRL_PYTHON or JAXRL_TUNIX_PYTHON is the Python of an
existing environment, that one is used instead.
"""

import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from jaxrl_llm.errors import UserError

LIMIT_S = 3600
HERE = Path(__file__).parent / ".envs"
VARIABLES = {"transformers": "JAXRL_TORCH_PYTHON", "trl": "JAXRL_TRL_PYTHON", "tunix": "JAXRL_TUNIX_PYTHON"}


def packages(name: str) -> tuple[str, ...]:
    """Return the packages to install. Tunix gets our versions of jax and flax, and so the same compiler."""
    torch = ("torch==2.13.0", "transformers==5.23.0", "numpy")
    return {
        "transformers": torch,
        "trl": (*torch, "trl==1.16.0"),
        "tunix": ("google-tunix==0.1.7", f"jax=={version('jax')}", f"flax=={version('flax')}"),
    }[name]


def python(name: str) -> Path:
    """Return the interpreter of peer `name`; `ours` is the current one. Raises UserError if it does not exist."""
    if name == "ours":
        return Path(sys.executable)
    if given := os.environ.get(VARIABLES[name]):
        if not Path(given).exists():
            raise UserError(f"{VARIABLES[name]}: got {given}, want the Python of an environment with {name}")
        return Path(given)
    stamp = HERE / name / "packages.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8").split() != [*packages(name)]:
        raise UserError(
            f"{name}: got no environment with {', '.join(packages(name))}, want one: "
            f"run `python -m benchmarks.peers.environments {name}`, or set {VARIABLES[name]}"
        )
    return HERE / name / "bin" / "python"


def build(name: str) -> Path:
    """Build an environment in place of an existing one; return its interpreter. The stamp, written last, marks a complete one."""
    path = HERE / name
    shutil.rmtree(path, ignore_errors=True)
    venv.create(path, with_pip=True)
    subprocess.run(
        [path / "bin" / "python", "-m", "pip", "install", "-q", *packages(name)], check=True, timeout=LIMIT_S
    )
    (path / "packages.txt").write_text("\n".join(packages(name)) + "\n", encoding="utf-8")
    return path / "bin" / "python"


def main() -> None:
    names = sys.argv[1:] or [*VARIABLES]
    if unknown := [n for n in names if n not in VARIABLES]:
        sys.exit(f"environments: got {', '.join(unknown)}, want some of {', '.join(VARIABLES)}")
    for name in names:
        print(build(name), flush=True)


if __name__ == "__main__":
    main()

"""Resolution of a model's path or hub name to a local directory."""

import re
from pathlib import Path

from jaxrl_llm.errors import UserError

# No pickles, no code, no images.
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(name: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """Return the directory itself, or that of the hub's `files` of this name, downloaded once into the hub's cache.

    Raises UserError if it is neither, or the hub cannot be reached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: got a directory without config.json, want a Hugging Face model directory")
        return path
    if path.exists():
        raise UserError(f"{path}: got a file, want a Hugging Face model directory")
    if not HUB_NAME.fullmatch(str(name)) or str(name).startswith("."):
        want = "a Hugging Face model directory, or a hub name (org/model)"
        raise UserError(f"{path}: got a path that does not exist, want {want}")
    return _download(str(name), files)


def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(name, allow_patterns=files))
    # HTTP libraries raise types of their own beside the hub's; for the user all mean that there is no model.
    except Exception as error:
        raise UserError(
            f"{name}: got neither a local directory nor a model on the hub ({str(error).splitlines()[0][:200]}), "
            "want one of them; without internet pass the path of a local directory"
        ) from None
    if not (path / "config.json").is_file():
        raise UserError(f"{name}: got a repository without config.json, want a Hugging Face model")
    return path

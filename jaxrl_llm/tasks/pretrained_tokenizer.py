"""Loading a Hugging Face tokenizer and its chat template from a directory."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.chat import first_line, make_chat_renderer
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Where it knows the model's class and finds none of these files, transformers silently makes an empty tokenizer.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")


def load(cfg: PretrainedTokenizer) -> Tokenizer:
    """Load the tokenizer. Raises UserError for anything wrong with the directory, its files or its chat template."""
    _check_unused_settings(cfg)
    directory = find_directory(cfg.path)
    try:
        return _load(directory, cfg)
    except UserError:
        raise
    except BaseException as error:  # bad JSON, bad merges, unknown classes: each underlying library raises its own
        # Errors inside the `tokenizers` library may be panics, which do not derive from Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{directory}: the tokenizer cannot be read: {first_line(error)}") from None


def _load(directory: Path, cfg: PretrainedTokenizer) -> Tokenizer:
    fast = read(directory)
    backend = fast.backend_tokenizer
    # tokenizer.json may contain padding and truncation settings from training.
    backend.no_padding()
    backend.no_truncation()
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    eos = end_tokens(directory, fast, size, cfg.stop)
    chat = (
        dict(zip(("render", "delimiters", "chat_template"), make_chat_renderer(directory, fast, cfg, eos), strict=True))
        if cfg.chat
        else {}
    )
    tokenizer = Tokenizer(
        backend,
        pad=eos[0] if fast.pad_token_id is None else fast.pad_token_id,
        eos=eos,
        write=lambda out: fast.save_pretrained(out),
        keeps_special=cfg.special_in_data == "keep",
        **(chat or {"prefix": bos_tokens(fast)}),
    )
    tokenizer.prompt("1+1")  # a template that raises should raise here, before any row is read
    return tokenizer


def _check_unused_settings(cfg: PretrainedTokenizer) -> None:
    ignored = [name for name in ("system", "template") if getattr(cfg, name) and not cfg.chat]
    if ignored:
        raise UserError(
            "\n".join(
                f"tokenizer.{n}: got {getattr(cfg, n)!r}, want it empty: tokenizer.chat is false" for n in ignored
            )
        )


def find_directory(path: str) -> Path:
    """Return the local directory, or the snapshot of a Hugging Face hub repository. Raises UserError."""
    if path and Path(path).is_dir():
        directory = Path(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        directory = _snapshot(path)
    else:
        raise UserError(f"tokenizer.path: got {path!r}, which is no directory, want one with tokenizer.json in it")
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise UserError(f"tokenizer.path: {directory} holds no tokenizer, want one of {', '.join(VOCABULARIES)} in it")
    return directory


def _snapshot(name: str) -> Path:
    import huggingface_hub

    try:
        files = ["*.json", "*.jinja", "*.txt", "*.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # errors of the hub and of the network have no common base class
        why = str(error).splitlines()[0]
        raise UserError(
            f"tokenizer.path: got {name!r}, which is no directory here, and downloading it from the hub failed ({why}); "
            "pass a local path"
        ) from None


def read(directory: Path) -> "PreTrainedTokenizerFast":
    """Read a fast tokenizer without running code from the directory. Raises UserError for a slow one."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if not getattr(fast, "is_fast", False):
        raise UserError(f"{directory}: got a {type(fast).__name__}, want a fast tokenizer (one with tokenizer.json)")
    return fast


def end_tokens(directory: Path, fast: "PreTrainedTokenizerFast", size: int, stop: tuple[str, ...]) -> tuple[int, ...]:
    """End tokens of the tokenizer, of generation_config.json and of `stop`, in this order, without duplicates.

    Args:
        directory: Where generation_config.json may be.
        fast: The tokenizer.
        size: Vocabulary size, added tokens included.
        stop: `tokenizer.stop`: texts of one token each.
    """
    own = [] if fast.eos_token_id is None else [fast.eos_token_id]
    found = list(dict.fromkeys([*own, *_generation_eos(directory, size), *_stop_tokens(fast, stop)]))
    if not found:
        raise UserError(
            f"{directory}: got no end token, want eos_token in tokenizer_config.json, eos_token_id in generation_config.json, "
            f"or tokenizer.stop"
        )
    return tuple(found)


def _generation_eos(directory: Path, size: int) -> list[int]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    eos = values.get("eos_token_id") if isinstance(values, dict) else None
    found = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if wrong := [e for e in found if type(e) is not int or not 0 <= e < size]:
        raise UserError(f"{path}: eos_token_id: got {repr(wrong[0])[:80]}, want tokens below the tokenizer's {size}")
    return found


def _stop_tokens(fast: "PreTrainedTokenizerFast", stop: tuple[str, ...]) -> list[int]:
    found, wrong = [], []
    for text in stop:
        encoding = fast.backend_tokenizer.encode(text, add_special_tokens=False)
        found += encoding.ids
        if len(encoding.ids) != 1:
            wrong.append(
                f"tokenizer.stop: got {text!r}, which is {len(encoding.ids)} tokens {encoding.tokens}, want one"
            )
        # Unknown words, and words changed by a normalizer, may also be one token.
        elif fast.backend_tokenizer.decode(encoding.ids, skip_special_tokens=False).strip() != text.strip():
            wrong.append(
                f"tokenizer.stop: got {text!r}, which is the token {encoding.tokens[0]!r}, want text that it spells"
            )
    if wrong:
        raise UserError("\n".join(wrong))
    return found


def bos_tokens(fast: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Tokens that the tokenizer prepends to a text (BOS). Tokens that it appends are not part of a prompt."""
    text = "1"
    plain = fast.backend_tokenizer.encode(text, add_special_tokens=False).ids
    whole = fast.backend_tokenizer.encode(text, add_special_tokens=True).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:start])

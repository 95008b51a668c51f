"""Tokenizer and prompts of whole steps, the same for every trainer: token i is the word w<i>, prompts have 64 of them.

Token 0 is padding and the last ends a response; prompts contain neither, and the end is never sampled.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.models import PROMPT_SLOTS, SIZES
from benchmarks.peers import weights

PROMPTS = 1024


def directory(size: str) -> Path:
    """Return the directory of size `size` with tokenizer.json, tokenizer_config.json, prompts.jsonl; written if missing."""
    path = weights.HERE / f"{size}-words"
    if not (path / "prompts.jsonl").exists():
        path.mkdir(parents=True, exist_ok=True)
        vocab_size = SIZES[size].vocab_size
        _tokenizer(vocab_size).save_pretrained(path)
        (path / "prompts.jsonl").write_text(_prompts(vocab_size), encoding="utf-8")
    return path


def _tokenizer(vocab_size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, end = "<pad>", "<end>"
    names = [pad, *(f"w{i}" for i in range(1, vocab_size - 1)), end]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=pad))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=end)


def _prompts(vocab_size: int) -> str:
    ids = np.random.default_rng(0).integers(1, vocab_size - 1, (PROMPTS, PROMPT_SLOTS))
    texts = [" ".join(f"w{i}" for i in row) for row in ids]
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)

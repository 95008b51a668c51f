"""A small Hugging Face tokenizer trained for the tests: byte-level BPE with special tokens, `<think>` tags and a chat template."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

TEXT = [
    "What is 3 + 4? The answer is 7.",
    "Count the apples, please: two and three.",
    "Be brief. You are a calculator.",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
ENDOFTEXT, IM_START, IM_END, BOS = range(4)
# As in Qwen: a system turn if there is one, and an empty <think> block if thinking is off.
CHATML = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


@cache
def _trained() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXT * 20, trainer)
    backend.add_tokens([AddedToken(tag, special=False) for tag in ("<think>", "</think>")])
    return backend.to_str()


def save_tokenizer(
    directory: Path,
    template: str | None = CHATML,
    eos: str | None = "<|im_end|>",
    pad: str | None = "<|endoftext|>",
    around: str = "",
    generation: dict | None = None,
) -> Path:
    """Save a directory for AutoTokenizer. `around`: tokens that the tokenizer adds to a text, e.g. "<s> $A"."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_str(_trained())
    if around:
        tokens = [(token, SPECIAL.index(token)) for token in around.split() if token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    names = {"eos_token": eos, "pad_token": pad, "bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
    fast.chat_template = template
    fast.save_pretrained(directory)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory

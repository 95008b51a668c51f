"""Tunix's sampler, with Tunix's Qwen2 and loader: tokens (`plain`), or tokens and log-probabilities (`logprobs`).

Its input is text. The tokenizer here parses decimal ids, so that all generators get the same ids; that takes
milliseconds. Its cache has exactly the slots that the call needs.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2.model import ModelConfig
from tunix.models.qwen2.params import create_model_from_safe_tensors

from benchmarks.peers.serve import Call, Generate, serve, versions

VARIANTS = ("plain", "logprobs")
NO_TOKEN = -1


class Ids:
    """Ids as text, with the interface of Tunix's tokenizers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return ""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return NO_TOKEN


def model_config(directory: str, compute: str) -> ModelConfig:
    given = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        use_tied_embedding=given["tie_word_embeddings"],
        dtype=jnp.dtype(compute),
        param_dtype=jnp.dtype(compute),
    )


def load(directory: str, compute: str, variant: str) -> tuple[Generate, dict]:
    cfg = model_config(directory, compute)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = create_model_from_safe_tensors(directory, cfg, mesh, dtype=jnp.dtype(compute))
    made: dict[int, Sampler] = {}

    def sampler(slots: int) -> Sampler:
        if slots not in made:
            made[slots] = Sampler(model, Ids(), CacheConfig(slots, cfg.num_layers, cfg.num_kv_heads, cfg.head_dim))
        return made[slots]

    def generate(call: Call) -> list:
        length = len(call.prompts[0])
        texts = [" ".join(map(str, prompt)) for prompt in call.prompts for _ in range(call.samples)]
        sampling = {"temperature": 0.0} if call.greedy else {"temperature": 1.0, "top_p": call.top_p}
        found = sampler(length + call.new_tokens)(
            texts,
            max_generation_steps=call.new_tokens,
            max_prompt_length=length,
            eos_tokens=[NO_TOKEN],
            return_logprobs=variant == "logprobs",
            seed=call.seed,
            **sampling,
        )
        return found.tokens

    return generate, {
        "versions": versions("google-tunix", "jax", "jaxlib", "flax"),
        "threads": "XLA: one per core",
        "attention": "einsum over the whole cache",
        "dtype": compute,
        "returns": "tokens and log-probabilities" if variant == "logprobs" else "tokens",
    }


if __name__ == "__main__":
    serve(load)

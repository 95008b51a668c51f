"""transformers' `generate`: a growing cache (`dynamic`), a static one (`static`), or a static one and torch.compile (`compile`).

Only tokens: `generate` computes log-probabilities only if asked for scores, which makes it slower.
"""

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig
from transformers.utils import logging

from benchmarks.peers.serve import Call, Generate, serve, versions

VARIANTS = ("dynamic", "static", "compile")


def generation_config(call: Call, variant: str) -> GenerationConfig:
    cache = {} if variant == "dynamic" else {"cache_implementation": "static"}
    sampling = (
        {"do_sample": False}
        if call.greedy
        else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": call.top_p}
    )
    return GenerationConfig(
        max_new_tokens=call.new_tokens,
        pad_token_id=0,
        eos_token_id=None,
        disable_compile=variant != "compile",
        compile_config=compiled() if variant == "compile" else None,
        **sampling,
        **cache,
    )


def compiled() -> CompileConfig:
    """Return the config with which `generate` compiles on a GPU; on a CPU it does not compile by default."""
    found = CompileConfig(mode="default", fullgraph=False)
    found._compile_all_devices = True
    return found


def load(directory: str, compute: str, variant: str) -> tuple[Generate, dict]:
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, compute)).eval()

    @torch.inference_mode()
    def generate(call: Call) -> torch.Tensor:
        torch.manual_seed(call.seed)
        # As num_return_sequences does, which greedy calls refuse: every row prefills its prompt again.
        prompts = torch.tensor(call.prompts).repeat_interleave(call.samples, dim=0)
        config = generation_config(call, variant)
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        return found[:, prompts.shape[1] :].numpy()

    return generate, {
        "versions": versions("torch", "transformers"),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "dtype": str(next(model.parameters()).dtype),
        "returns": "tokens",
    }


if __name__ == "__main__":
    serve(load)

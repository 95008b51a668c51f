"""`transformers_reference.py JOBS`, a file with a JSON list of jobs, run in an environment with torch. Imports nothing of ours.

{"make": config, "seed": n, "to": directory}          a random model of transformers' own classes, saved
{"read": directory, "tokens": [[..]], "to": file}     its logits over those tokens, and 16 greedy tokens after the first row
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def make(config: dict, seed: int, to: str) -> None:
    torch.manual_seed(seed)
    kind = AutoConfig.for_model(config.pop("model_type"), **config)
    model = AutoModelForCausalLM.from_config(kind)
    with torch.no_grad():
        for x in model.parameters():
            # At initialization logits are nearly constant, and norms are all one.
            x.copy_(x + 0.3 * torch.randn_like(x) if x.ndim == 1 else torch.randn_like(x) * 1.5 * x.shape[-1] ** -0.5)
    model.save_pretrained(to, max_shard_size="40KB")


@torch.no_grad()
def read(directory: str, tokens: list[list[int]], to: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    logits = model(torch.tensor(tokens), use_cache=False).logits.numpy()
    first = torch.tensor(tokens[:1])
    whole = {"attention_mask": torch.ones_like(first), "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(first, do_sample=False, max_new_tokens=16, **whole)
    np.savez(to, logits=logits, greedy=out[0, first.shape[1] :].numpy())


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        make(job["make"], job["seed"], job["to"]) if "make" in job else read(job["read"], job["tokens"], job["to"])

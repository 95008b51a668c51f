"""`peft_reference.py BASE ADAPTER TOKENS TO`, run in an environment with torch and peft. Imports nothing of ours.

Loads the adapter onto the model in BASE and writes the logits of the tokens [[..]] to TO.npz, with the adapter and without it.
"""

import json
import sys
import warnings

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[list[int]]) -> np.ndarray:
    return model(torch.tensor(tokens), use_cache=False).logits.numpy()


if __name__ == "__main__":
    base, adapter, tokens, to = sys.argv[1:]
    # PEFT only warns about missing keys.
    warnings.simplefilter("error", UserWarning)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    without = logits(model, json.loads(tokens))
    model = PeftModel.from_pretrained(model, adapter)
    assert model.peft_config["default"].base_model_name_or_path == base
    np.savez(to, adapted=logits(model, json.loads(tokens)), base=without)

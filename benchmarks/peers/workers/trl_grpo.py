"""Generation of TRL's GRPOTrainer, called on a trainer with default settings except length, sampling and EOS.

    generate    `_generate_single_turn`: each prompt repeated G times and padded, transformers' `generate` with the trainer's
                generation config (the trainer disables torch.compile), truncation after EOS, and conversion to lists of ids
    logprobs    also `_get_per_token_logps_and_entropies` of prompts and completions without gradients, which the trainer
                computes before an update if the sampling policy may differ from the current one, or to compare with the
                log-probabilities of sampling, which our engine always returns

Excluded, in its favor: the tokenizer, rewards, metrics, and its bf16 default (f32 weights, cast for every product by
autocast): the weights are loaded in the compute dtype.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.serve import Call, Generate, serve, versions

VARIANTS = ("generate", "logprobs")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer, which GRPOTrainer requires; only its ids of padding and end are used."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def trainer(model: AutoModelForCausalLM, call: Call) -> GRPOTrainer:
    rows = len(call.prompts) * call.samples
    sampling = {"do_sample": False} if call.greedy else {}
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows,
        num_generations=max(call.samples, 2),
        max_completion_length=call.new_tokens,
        temperature=1.0,
        top_p=call.top_p,
        generation_kwargs={"eos_token_id": None, **sampling},
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["<pad>"] * rows}),
        processing_class=tokenizer(),
    )


def load(directory: str, compute: str, variant: str) -> tuple[Generate, dict]:
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, compute))
    made: dict[tuple, GRPOTrainer] = {}

    def generate(call: Call) -> torch.Tensor:
        shape = (len(call.prompts), call.samples, call.new_tokens, call.top_p, call.greedy)
        if shape not in made:
            made[shape] = trainer(model, call)
            made[shape].eos_token_ids = [-1]
        ours = made[shape]
        torch.manual_seed(call.seed)
        prompts = [prompt for prompt in call.prompts for _ in range(call.samples)]
        completions, _ = ours._generate_single_turn(prompts, None, {}, call.samples)
        completions = torch.tensor(completions)
        if variant == "logprobs":
            whole = torch.cat([torch.tensor(prompts), completions], dim=1)
            with torch.no_grad():
                ours._get_per_token_logps_and_entropies(ours.model, whole, torch.ones_like(whole), call.new_tokens)
        return completions.numpy()

    return generate, {
        "versions": versions("torch", "transformers", "trl"),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "dtype": str(next(model.parameters()).dtype),
        "returns": "tokens and log-probabilities" if variant == "logprobs" else "tokens",
    }


if __name__ == "__main__":
    serve(load)

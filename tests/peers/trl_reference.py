"""`trl_reference.py DIRECTORY`, run in an environment with TRL; cases.json and tensors.npz are in it. Imports nothing of ours.

A case is {"name": .., "trainer": "grpo" or "rloo", "arguments": of its config, "sampler": true where another program sampled}. For
each a real trainer of a tiny model is created. The model's outputs are replaced by the tensors: prompts and completions,
rewards, log-probabilities and entropies. Advantages, reference terms, ratios and the loss are computed by the trainer, in float64.
trl.npz holds <name>/loss, <name>/advantages and the loss's gradients <name>/logprobs and <name>/entropy.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def make_model(directory: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    kind = AutoConfig.for_model("qwen2", vocab_size=8, num_key_value_heads=1, **sizes)
    AutoModelForCausalLM.from_config(kind).save_pretrained(directory)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def make_trainer(case: dict, given: SimpleNamespace, directory: Path):
    kind, config = TRAINERS[case["trainer"]]
    rows, samples = given.reward.size, given.reward.shape[1]
    args = config(
        output_dir=str(directory / "output"),
        per_device_train_batch_size=rows,
        num_generations=samples,
        max_completion_length=given.sampled.shape[1],
        # Not every update is then the first after sampling, so the trainer scores the old policy.
        num_iterations=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        **case["arguments"],
    )
    parts = given.parts.shape[-1] if case["parts"] else 1
    trainer = kind(
        model=str(directory / "model"),
        reward_funcs=[lambda completions, **others: [0.0] * len(completions)] * parts,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["<pad>"] * rows}),
        processing_class=tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def put_tensors_in(trainer, case: dict, given: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leaves to differentiate with respect to."""
    logprobs = torch.tensor(given.logprobs, requires_grad=True)
    entropy = torch.tensor(given.entropy, requires_grad=True)
    rows, length = len(given.length), given.length.tolist()
    completions = [[2] * n for n in length]
    sampled = [row[:n].astype(int).tolist() for row, n in zip(given.sampled, length, strict=True)]
    sampler = [row[:n].tolist() for row, n in zip(given.sampler, length, strict=True)] if case["sampler"] else None

    def generate(prompts: list) -> tuple:
        texts = [""] * rows
        if case["trainer"] == "rloo":
            return [[1]] * rows, completions, texts
        return [[1]] * rows, completions, sampled, texts, sampler, {}, None, []

    def score(model, *args, **named) -> tuple:
        if model is trainer.ref_model:
            return torch.tensor(given.reference), None, None
        return (logprobs, entropy, None) if torch.is_grad_enabled() else (torch.tensor(given.old), None, None)

    def grade(*args) -> torch.Tensor:
        return torch.tensor(given.parts.reshape(rows, -1) if case["parts"] else given.reward.reshape(rows, 1))

    trainer._generate, trainer._get_per_token_logps_and_entropies, trainer._calculate_rewards = generate, score, grade
    if case["sampler"]:
        trainer.use_vllm = True
    return logprobs, entropy


def run_case(case: dict, given: SimpleNamespace, directory: Path) -> dict[str, np.ndarray]:
    trainer = make_trainer(case, given, directory)
    logprobs, entropy = put_tensors_in(trainer, case, given)
    inputs = trainer._generate_and_score_completions([{"prompt": "<pad>"}] * len(given.length))
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    found = {"loss": loss.detach(), "advantages": inputs["advantages"], "logprobs": logprobs.grad}
    found["entropy"] = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return {f"{case['name']}/{key}": x.numpy() for key, x in found.items()}


def main(directory: Path) -> None:
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    make_model(directory / "model")
    # Otherwise the trainers' constants would be rounded to f32 when combined with a tensor: SAPO's 1.05.
    torch.set_default_dtype(torch.float64)
    given = SimpleNamespace(**np.load(directory / "tensors.npz"))
    results = {}
    for case in json.loads((directory / "cases.json").read_text()):
        results |= run_case(case, given, directory)
    np.savez(directory / "trl.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

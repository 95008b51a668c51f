"""TRL's GRPOTrainer through `train()`: one optimizer step for each batch that it generates, `generate` of transformers, no vLLM.

    plain           activations are stored
    checkpointing   activations are recomputed in the backward pass, TRL's default: less memory, slower
    cast            as plain, with compute bfloat16 for weights, gradients and moments too, which loses most updates of lr 1e-6

Otherwise compute bfloat16 has f32 weights and torch casts at every product (autocast), TRL's default. Loss dapo, AdamW of torch,
gradient norm 1, lr 1e-6: also defaults. With beta the reference is a second model, loaded by the trainer.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers.paced import Paced
from benchmarks.peers.reward import rewards
from benchmarks.peers.serve import Step, serve_steps, versions

GROUPS, SAMPLES, NEW_TOKENS = 8, 8, 128


class AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._call()


def config(compute: str, variant: str, beta: float) -> GRPOConfig:
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=GROUPS * SAMPLES,
        gradient_accumulation_steps=1,
        num_generations=SAMPLES,
        num_iterations=1,
        max_completion_length=NEW_TOKENS,
        max_steps=10_000,
        loss_type="dapo",
        beta=beta,
        temperature=1.0,
        generation_kwargs={"eos_token_id": None},
        gradient_checkpointing=variant == "checkpointing",
        bf16=compute == "bfloat16" and variant != "cast",
        model_init_kwargs={"dtype": compute if variant == "cast" else "float32"},
        use_cpu=not torch.cuda.is_available(),
        use_vllm=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


def load(directory: str, words: str, compute: str, variant: str, beta: float) -> tuple[Step, dict]:
    logging.set_verbosity_error()
    lines = (Path(words) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = GRPOTrainer(
        model=directory,
        reward_funcs=rewards,
        args=config(compute, variant, beta),
        train_dataset=Dataset.from_dict({"prompt": [json.loads(line)["prompt"] for line in lines]}),
        processing_class=AutoTokenizer.from_pretrained(words),
    )
    # The trainer truncates responses at these ids; none is sampled, since `generate` has no end token.
    trainer.eos_token_ids = [-1]
    sampled: list[tuple[float, int]] = []
    generate = trainer._generate

    def timed(prompts: list) -> tuple:
        start = time.perf_counter()
        found = generate(prompts)
        sampled.append((time.perf_counter() - start, sum(map(len, found[1]))))
        return found

    trainer._generate = timed

    def loop(pause: Callable[[], None]) -> None:
        trainer.add_callback(AfterStep(pause))
        trainer.train()

    run = Paced(loop)

    def step() -> dict:
        run.step()
        seconds, tokens = sampled[-1]
        assert len(sampled) == trainer.state.global_step, "an optimizer step for each generation"
        return {"rollout_s": seconds, "tokens": tokens, "updates": trainer.state.global_step}

    return step, {
        "versions": versions("torch", "transformers", "trl"),
        "threads": torch.get_num_threads(),
        "attention": trainer.model.config._attn_implementation,
        "dtype": str(next(trainer.model.parameters()).dtype),
        "autocast": trainer.args.bf16,
        "optimizer": type(trainer.create_optimizer()).__name__ + f", {trainer.args.optim}",
    }


if __name__ == "__main__":
    serve_steps(load)

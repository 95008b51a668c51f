"""The whole path on two CPU cores: train a tokenizer and a model, export them, then train the exported checkpoint by GRPO.

    python docs/experiments/whole_path.py            # about half an hour; resumes where it was stopped

1. tokenizer   a byte-level BPE with a chat template, trained on generated problems
2. pretrain    `jaxrl train configs/chain_sum_pretrain.yaml`: 5 M parameters of Qwen3's architecture, from scratch, supervised, on
               answers of which 40 % are wrong; then `jaxrl export`: from here on the directory is used like any other checkpoint
3. before      `jaxrl eval` of that directory
4. train       `jaxrl train configs/chain_sum.yaml`: GRPO with the scorer of reasoning-gym
5. after       `jaxrl export`, and `jaxrl eval` of the exported directory
6. same        transformers and our engine generate greedily from both directories: the tokens are equal. Needs an interpreter with
               torch and transformers in JAXRL_TORCH_PYTHON; skipped without one.
7. report      writes the numbers into docs/experiments/whole_path.json
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "runs" / "whole_path"
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = 16
NEW_TOKENS = 8


def make_tokenizer(out: Path) -> None:
    """Byte-level BPE trained on generated problems; each digit is one token, as in Qwen's tokenizer."""
    import reasoning_gym
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    problems = reasoning_gym.create_dataset("chain_sum", size=2000, seed=7)
    texts = [f"{p['metadata']['expression']} = {p['answer']}" for p in problems] + [
        "user\n",
        "assistant\n",
        "system\n",
    ] * 500
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT
    fast.save_pretrained(out)


def jaxrl(*args: object) -> str:
    """Run one command and return its standard output. The script ends if the command fails."""
    command = [sys.executable, "-m", "jaxrl_llm.cli", *map(str, args)]
    print("$ jaxrl", *args, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}")
    return done.stdout


def pretrain() -> None:
    jaxrl("train", "configs/chain_sum_pretrain.yaml", "--run-dir", HERE / "pretrain")
    jaxrl("export", HERE / "pretrain", "--out", HERE / "model", "--dtype", "float32")


def evaluate(model: str) -> dict:
    found = jaxrl("eval", HERE / model, "--task", "configs/chain_sum.yaml", "-k", 8)
    return json.loads(found)


def train() -> float:
    start = time.monotonic()
    jaxrl("train", "configs/chain_sum.yaml", "--run-dir", HERE / "grpo", "--model.path", HERE / "model")
    seconds = time.monotonic() - start
    jaxrl("export", HERE / "grpo", "--out", HERE / "trained", "--dtype", "float32")
    return seconds


GREEDY = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
found = []
for text in prompts:
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=new, do_sample=False)
    found.append(out[0, ids["input_ids"].shape[1]:].tolist())
print(json.dumps(found))
"""


def same_tokens(model: str) -> dict:
    """Greedy responses of transformers and of our decode loop to the same held-out prompts."""
    import numpy as np

    from jaxrl_llm.cli import read_evaluation
    from jaxrl_llm.commands.loaded_policy import load_policy, prepare_sampling
    from jaxrl_llm.config import loading, run_config
    from jaxrl_llm.roles.build import make_keys
    from jaxrl_llm.tasks.stream import make_prompts

    cfg = read_evaluation(str(HERE / model), str(ROOT / "configs/chain_sum.yaml"), [])
    values = run_config.to_dict(cfg)
    values["rollout"] |= {"prompts": PROMPTS, "samples": 2, "max_new_tokens": NEW_TOKENS}
    values["update"] |= {"minibatches": 1, "micro_batches": 1}
    cfg = loading.validate(values, "greedy")
    setup = prepare_sampling(cfg)
    rows = setup.task.held_out[:PROMPTS]
    index = np.arange(PROMPTS)
    prompts, controls = (
        make_prompts(setup.task, rows, index, index),
        setup.engine.controls(PROMPTS, temperature=0.0),
    )
    rollouts = setup.engine.generate(load_policy(setup).policy, prompts, make_keys(cfg.seed).evaluation, controls)
    ours = [rollouts.tokens[2 * p, : rollouts.length[2 * p]].tolist() for p in index]
    command = [os.environ["JAXRL_TORCH_PYTHON"], "-c", GREEDY, str(HERE / model), json.dumps([r.prompt for r in rows])]
    done = subprocess.run([*command, str(NEW_TOKENS)], stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    return {"prompts": PROMPTS, "equal": sum(a == b for a, b in zip(ours, theirs, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    steps = {
        "tokenizer": lambda: make_tokenizer(HERE / "tokenizer"),
        "pretrain": pretrain,
        "before": lambda: evaluate("model"),
        "train_seconds": train,
        "after": lambda: evaluate("trained"),
    }
    if "JAXRL_TORCH_PYTHON" in os.environ:
        steps |= {
            "same_tokens_before": lambda: same_tokens("model"),
            "same_tokens_after": lambda: same_tokens("trained"),
        }
    record = HERE / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for name, step in steps.items():
        if name not in done:
            done[name] = step()
            record.write_text(json.dumps(done))
    (Path(__file__).with_suffix(".json")).write_text(json.dumps(done, indent=1) + "\n")
    before, after = (done[name]["avg@8"]["value"] for name in ("before", "after"))
    print(f"avg@8 {before:.4f} -> {after:.4f} in {done['train_seconds']:.0f} s of training")


if __name__ == "__main__":
    main()

"""`python tests/golden/make_hf.py`: write the results of transformers for three small random models per family to tests/golden/hf/.

Needs torch and transformers (these were made with torch 2.13.0 on a CPU and transformers 5.23.0), and nothing of jaxrl_llm.
A file holds config.json as written by hand (old form and new), the names and shapes of the tensors, tokens, logits at some places,
and for the first model of a family 64 greedy tokens after each of four prompts. Weights are in none: see hf_weights.py.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from hf_weights import draw_all
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
ROWS, SLOTS, NEW = 3, 40, 64
PLACES = [(0, 0), (0, 7), (0, 39), (1, 12), (1, 25), (1, 39), (2, 18), (2, 33), (2, 39)]
PROMPT_LENGTHS = [1, 11, 4, 7]
# Relative to the largest logit: f32 sums in a different order change logits by about 1e-6 of it.
GAP = 1e-3

EVEN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT = {"max_position_embeddings": 128, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def odd(vocab: int, hidden: int, mlp: int, heads: int, kv_heads: int, layers: int) -> dict:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }


def types(word: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in word]


EVEN2, EVEN3 = EVEN | {"num_hidden_layers": 2}, EVEN | {"num_hidden_layers": 3}
MODELS: dict[tuple[str, str], list[dict]] = {
    ("LlamaForCausalLM", "llama"): [
        EVEN2
        | {"head_dim": 8, "rope_theta": 10000.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}}
        | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
        odd(53, 30, 37, 6, 3, 2)
        | {"head_dim": 10, "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000.0}}
        | {"tie_word_embeddings": True},
        odd(61, 40, 29, 5, 1, 3) | {"rope_theta": 500.0, "rope_scaling": YARN, "tie_word_embeddings": False},
    ],
    ("MistralForCausalLM", "mistral"): [
        EVEN2 | {"head_dim": 8, "sliding_window": 6, "tie_word_embeddings": False, "rope_theta": 10000.0},
        odd(47, 33, 19, 4, 4, 2) | {"head_dim": 6, "sliding_window": None, "tie_word_embeddings": True},
        odd(59, 31, 23, 6, 2, 3)
        | {"head_dim": 10, "sliding_window": 3, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}},
    ],
    ("Qwen2ForCausalLM", "qwen2"): [
        EVEN2 | {"tie_word_embeddings": True, "rope_theta": 10000.0},
        odd(57, 42, 31, 7, 7, 3)
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": False}
        | {"rope_theta": 1000.0},
        odd(49, 36, 27, 6, 2, 2)
        | {"use_sliding_window": True, "sliding_window": 4, "layer_types": types("sf"), "tie_word_embeddings": True}
        | {"rope_parameters": YARN | {"rope_theta": 300.0, "truncate": False}},
    ],
    ("Qwen3ForCausalLM", "qwen3"): [
        EVEN2 | {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 10000.0},
        odd(51, 27, 33, 9, 3, 2)
        | {"head_dim": 6, "tie_word_embeddings": False, "rope_theta": 200.0}
        | {"rope_scaling": YARN | {"attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5}},
        odd(45, 29, 21, 3, 1, 3)
        | {"head_dim": 14, "use_sliding_window": True, "sliding_window": 2, "layer_types": types("fss")}
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
    ("Qwen3MoeForCausalLM", "qwen3_moe"): [
        EVEN2
        | {
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        }
        | {"tie_word_embeddings": False, "rope_theta": 10000.0},
        odd(43, 25, 99, 3, 3, 2)
        | {"head_dim": 8, "moe_intermediate_size": 11, "num_local_experts": 5, "num_experts_per_tok": 3}
        | {"norm_topk_prob": False, "tie_word_embeddings": False},
        odd(55, 31, 99, 6, 2, 2)
        | {
            "head_dim": 6,
            "moe_intermediate_size": 13,
            "num_experts": 6,
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
        }
        | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5}
        | {"rope_parameters": YARN | {"rope_theta": 100.0}},
    ],
    ("Gemma2ForCausalLM", "gemma2"): [
        EVEN2
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "hidden_activation": "gelu_pytorch_tanh"}
        | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 0.8, "rope_theta": 10000.0},
        odd(41, 28, 35, 4, 4, 3)
        | {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 3, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": 6.0, "tie_word_embeddings": False, "rope_theta": 1000.0},
        odd(63, 35, 17, 5, 1, 2)
        | {"head_dim": 8, "query_pre_attn_scalar": 7, "sliding_window": 5, "layer_types": types("fs")}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}
        | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    ],
    ("Gemma3ForCausalLM", "gemma3_text"): [
        EVEN3
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6, "sliding_window_pattern": 3}
        | {
            "rope_theta": 100000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        odd(37, 30, 39, 6, 3, 2)
        | {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4, "layer_types": types("fs")}
        | {"tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            }
        },
        odd(39, 35, 15, 5, 1, 3)
        | {"head_dim": 8, "query_pre_attn_scalar": 9, "sliding_window": 2, "layer_types": types("sfs")}
        | {"final_logit_softcapping": 0.6}
        | {
            "rope_parameters": {
                "full_attention": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            }
        },
    ],
}


def shapes_of(directory: Path) -> dict[str, list[int]]:
    """Return names and shapes as transformers writes them."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        with safe_open(Path(saved) / "model.safetensors", framework="numpy") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def load(directory: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    return model(torch.tensor(tokens), use_cache=False).logits.numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]] | None:
    """Return 64 tokens of `generate` per prompt; None if two logits are too close to each other, or the tokens are too uniform."""
    found = []
    for prompt in prompts:
        given = torch.tensor([prompt])
        # Without a mask, `generate` would take every 0 of the prompt for padding.
        whole = {"attention_mask": torch.ones_like(given), "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(given, do_sample=False, max_new_tokens=NEW, **whole)
        scores = np.sort(logits(model, out.numpy())[0, len(prompt) - 1 : -1], axis=-1)
        if (scores[:, -1] - scores[:, -2]).min() < GAP * np.abs(scores).max():
            return None
        found.append(out[0, len(prompt) :].tolist())
    distinct = len({token for row in found for token in row})
    return found if distinct >= 16 and min(len(set(row)) for row in found) >= 6 else None


def make(architecture: str, model_type: str, number: int, given: dict) -> dict:
    config = {"architectures": [architecture], "model_type": model_type, **TEXT, **given}
    gemma = model_type.startswith("gemma")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(config))
        shapes = shapes_of(directory)
        for seed in range(200):
            save_file(draw_all(shapes, seed, gemma), directory / "model.safetensors", metadata={"format": "pt"})
            model, rng = load(directory), np.random.default_rng([seed, number])
            tokens = rng.integers(0, config["vocab_size"], (ROWS, SLOTS))
            prompts = [rng.integers(0, config["vocab_size"], n).tolist() for n in PROMPT_LENGTHS]
            if number or (continued := greedy(model, prompts)) is not None:
                break
        else:
            raise SystemExit(f"{architecture}: no seed of 200 has clear greedy tokens")
        all_logits = logits(model, tokens)
        found = {
            "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "seed": seed,
            "config": config,
            "tensors": shapes,
            "tokens": tokens.tolist(),
            "places": PLACES,
            "logits": [[float(f"{x:.7g}") for x in all_logits[place]] for place in PLACES],
        }
        return found if number else found | {"prompts": prompts, "greedy": continued}


def main(only: list[str]) -> None:
    (HERE / "hf").mkdir(exist_ok=True)
    for (architecture, model_type), models in MODELS.items():
        for number, given in enumerate(models):
            if only and model_type not in only:
                continue
            found = make(architecture, model_type, number, given)
            lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
            path = HERE / "hf" / f"{model_type}_{number}.json"
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            print(path.name, "seed", found["seed"], path.stat().st_size, "bytes", flush=True)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main(sys.argv[1:])

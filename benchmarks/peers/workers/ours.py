"""Our engine with default settings: tokens, log-probabilities and entropies, on the host."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import layouts
from benchmarks.peers.serve import Call, Generate, serve, versions
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.hf.load import load as load_params
from jaxrl_llm.model.params import specs, unstack
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Policy, Prompts

VARIANTS = ("default",)


def load(directory: str, compute: str, variant: str) -> tuple[Generate, dict]:
    cfg = read_config(directory, compute=compute)
    _, decode = layouts()
    params = load_params(directory, unstack(specs(cfg), cfg.layers), decode, jnp.dtype(compute))
    policy = Policy(params=params, version=jax.device_put(np.int32(0), decode.replicated))
    vocabulary = Vocabulary(size=cfg.vocab_size, pad=0, eos=(-1,))
    made: dict[tuple, Engine] = {}

    def engine(call: Call) -> Engine:
        shape = (len(call.prompts), call.samples, call.new_tokens, call.top_p)
        if shape not in made:
            rollout = RolloutConfig(shape[0], call.samples, call.new_tokens, top_p=call.top_p)
            made[shape] = Engine(EngineModel(cfg, decode, vocabulary), rollout, len(call.prompts[0]))
        return made[shape]

    def generate(call: Call) -> np.ndarray:
        found, prompts = engine(call), prompts_of(call)
        controls = found.controls(len(call.prompts), 0.0 if call.greedy else 1.0)
        return found.generate(policy, prompts, jax.random.key(call.seed), controls).tokens

    return generate, {
        "versions": versions("jax", "jaxlib"),
        "threads": "XLA: one per core",
        "attention": "shared prompt, separate suffixes",
        "dtype": compute,
        "returns": "tokens, log-probabilities and entropies",
    }


def prompts_of(call: Call) -> Prompts:
    tokens = np.asarray(call.prompts, np.int32)
    count = np.arange(len(tokens), dtype=np.int32)
    return Prompts(tokens=tokens, length=np.full(len(tokens), tokens.shape[1], np.int32), uid=count, row=count)


if __name__ == "__main__":
    serve(load)

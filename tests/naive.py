"""The oracle: an engine without cache, without batch and without jit. It reads the whole sequence again for each token.

(Padded to one length, since each new shape costs seconds: nobody reads what stands behind the sequence.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from setups import until_of

from jaxrl_llm.distribution.logits import process_logits
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import hidden, logits
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.sample import FullDistribution, Vocabulary, row_keys, sample_from
from jaxrl_llm.types import Finish, Prompts, PyTree, Rollouts, number_rows


def generate(
    params: PyTree, version: int, prompts: Prompts, key: jax.Array, temperature: np.ndarray,
    samples: int, max_new_tokens: int, vocab: Vocabulary, cfg: ModelConfig, layout: Layout,
) -> Rollouts:  # fmt: skip
    """`params` in the trainer's form. Same contract as `rollout.engine.Engine.generate`."""
    rows, c = len(prompts.length) * samples, max_new_tokens
    slots = prompts.tokens.shape[1] + c
    keys = row_keys(key, jnp.asarray(prompts.uid), jnp.broadcast_to(jnp.arange(samples), (len(prompts.uid), samples)))
    tokens = np.full((rows, c), vocab.pad, np.int32)
    sampled, logprobs, entropies = (
        np.zeros((rows, c), bool),
        np.zeros((rows, c), np.float32),
        np.zeros((rows, c), np.float32),
    )
    finish = np.full(rows, int(Finish.LENGTH), np.int32)
    for b in range(rows):
        p = b // samples
        sequence = prompts.tokens[p, : prompts.length[p]].tolist()
        for t in range(c):
            ids = np.full((1, slots), vocab.pad, np.int32)
            ids[0, : len(sequence)] = sequence
            until = until_of(np.array([len(sequence)]), slots)
            with jax.disable_jit():
                h = np.asarray(hidden(params, ids, np.arange(slots)[None], until, cfg, layout))[:, len(sequence) - 1]
                logp = process_logits(logits(params, h, cfg), jnp.asarray(temperature[p : p + 1]), vocab.size)
            drawn = sample_from(keys[b : b + 1], jnp.array([t]), FullDistribution(logp), raw_logprobs=False)
            (token,), (logprobs[b, t],), (entropies[b, t],) = drawn.token, drawn.logprob, drawn.entropy
            tokens[b, t], sampled[b, t] = token, True
            sequence.append(int(token))
            if int(token) in vocab.eos:
                finish[b] = int(Finish.EOS)
                break
    prompt, sample = number_rows(np.full(len(prompts.length), samples))
    return Rollouts(
        prompts=prompts, prompt=prompt, sample=sample, tokens=tokens, length=sampled.sum(1).astype(np.int32), sampled=sampled,
        behavior_logprobs=logprobs, entropy=entropies, temperature=np.repeat(temperature, samples).astype(np.float32),
        version=np.where(sampled, version, 0).astype(np.int32), finish=finish,
    )  # fmt: skip

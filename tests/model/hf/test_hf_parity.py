"""Parity with transformers on models loaded from files: logits, and greedy tokens through the decode loop."""

import jax
import numpy as np
import pytest
from hf_cases import CASES, FAMILIES, case, load_model
from setups import layouts

from jaxrl_llm.model.transformer import hidden, logits
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Policy, Prompts

# Both are f32 and sum in a different order; relative to the largest logit.
TOLERANCE = 2e-4


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name, tmp_path):
    golden, (layout, _) = case(name).golden, layouts()
    cfg, params = load_model(case(name).write(tmp_path), layout)
    tokens = np.array(golden["tokens"], np.int32)
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def run(params, tokens, position):
        return logits(params, hidden(params, tokens, position, position * 0 + tokens.shape[1], cfg, layout), cfg)

    found = np.asarray(run(params, tokens, position))
    found = np.stack([found[row, slot] for row, slot in golden["places"]])
    want = np.array(golden["logits"])
    assert np.abs(found - want).max() <= TOLERANCE * np.abs(want).max()
    assert (found.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [pytest.param((1, 1, 1), marks=pytest.mark.soak), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_match_transformers(family, mesh, tmp_path):
    """Four ragged prompts in one batch; transformers continued each by itself. Sequences exceed windows and original lengths."""
    golden, (_, layout) = case(f"{family}_0").golden, layouts(mesh)
    cfg, params = load_model(case(f"{family}_0").write(tmp_path), layout, stacked=False)
    want = np.array(golden["greedy"])
    lengths = np.array([len(p) for p in golden["prompts"]], np.int32)
    tokens = np.zeros((len(lengths), lengths.max()), np.int32)
    for row, prompt in zip(tokens, golden["prompts"], strict=True):
        row[: len(prompt)] = prompt
    rows = np.arange(len(lengths), dtype=np.int32)
    # An end token that is never sampled: transformers had none.
    vocab = Vocabulary(size=cfg.vocab_size, pad=0, eos=(cfg.vocab_size,))
    rollout = RolloutConfig(prompts=4, samples=1, max_new_tokens=want.shape[1], temperature=0.0)
    prompts = Prompts(tokens=tokens, length=lengths, uid=rows, row=rows)
    policy = Policy(params=params, version=np.int32(0))
    rollouts = Engine(EngineModel(cfg, layout, vocab), rollout, lengths.max()).generate(
        policy, prompts, jax.random.key(0)
    )
    assert rollouts.tokens.tolist() == want.tolist()

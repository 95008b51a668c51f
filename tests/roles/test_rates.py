"""Ceilings are measured at the shapes of the roles: rows and tokens per device, worked out by hand."""

from types import SimpleNamespace

from setups import TINY, layouts

from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.roles import rates
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.update.packing import BatchShape


def test_the_sampler_is_compared_with_a_step_of_all_rows(monkeypatch):
    """8 prompts of 3 samples on 4 shards of rows: 2 * 3 rows per device; matrices split in 2."""
    monkeypatch.setattr(rates, "decode_rates", lambda *shapes: shapes)
    cfg, vocab = RolloutConfig(prompts=8, samples=3, max_new_tokens=4), Vocabulary(size=16, pad=0, eos=(1,))
    engine = Engine(EngineModel(TINY, layouts((2, 2, 2))[1], vocab), cfg, 8)
    assert rates.sampler_rates(engine) == (TINY, 6, 2)


def test_the_learner_is_compared_with_a_micro_batch(monkeypatch):
    """16 rows of 32 slots in 2 micro-batches on 4 shards of rows: 2 * 32 tokens per device."""
    monkeypatch.setattr(rates, "update_rates", lambda *shapes: shapes)
    train, _ = layouts((2, 2, 2))
    shapes, cfg = SimpleNamespace(update=BatchShape("plain", 16, 32, 2)), SimpleNamespace(lora=LoraConfig(rank=2))
    blueprint = SimpleNamespace(model=TINY, shapes=shapes, train=train, cfg=cfg)
    assert rates.learner_rates(blueprint) == (TINY, 64, train, True)

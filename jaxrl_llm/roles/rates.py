"""Hardware ceilings at the shapes of a run's roles: what the sampler's and the learner's speed is compared with."""

from jaxrl_llm.perf.utilization import DecodeRates, UpdateRates, decode_rates, describe_updates, update_rates
from jaxrl_llm.roles.blueprint import Blueprint
from jaxrl_llm.roles.summary import describe_engine
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.session import Stats


def sampler_rates(engine: Engine) -> DecodeRates:
    """Return the ceilings of one device for a decode step in which all rows are active."""
    sizes, decoding = engine.sizes, engine.decoding
    rows = sizes.groups(sizes.prompts[0]) * sizes.rows_per_group // sizes.shards
    return decode_rates(decoding.model, rows, decoding.layout.size("mlp"))


def learner_rates(blueprint: Blueprint) -> UpdateRates:
    """Return the FLOPs per second that one device reaches at most in an update."""
    shape, layout = blueprint.shapes.update, blueprint.train
    tokens = shape.rows // shape.num_micro_batches // layout.size("rows") * shape.slots
    return update_rates(blueprint.model, tokens, layout, blueprint.cfg.lora.rank > 0)


def describe_rates(
    engine: Engine, stats: Stats, blueprint: Blueprint, learned: Learned, measured: bool
) -> dict[str, float]:
    """Metrics of a step's speed.

    Args:
        engine: of the sampler.
        stats: of the step's rollouts.
        blueprint: of the run.
        learned: of the step's updates, which may be none.
        measured: measure the ceilings, and give the fractions of them; nothing else runs on the host meanwhile, and nothing was
            compiled beside the step.
    """
    metrics = describe_engine(stats, sampler_rates(engine) if measured else None)
    if learned.seconds:
        rates = learner_rates(blueprint) if measured else None
        metrics |= describe_updates(learned.flops, learned.seconds, rates, blueprint.train)
    return metrics

"""A run as abstract arrays (shapes, dtypes and shardings), on devices that need not exist."""

import dataclasses
from dataclasses import dataclass

import jax

from jaxrl_llm.control.config import NoControl
from jaxrl_llm.distribution.control_tables import ControlTables, blank_tables
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.publish import abstract_policy
from jaxrl_llm.roles.blueprint import Blueprint, uses_of
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.types import Batch, Policy, PyTree, TrainState
from jaxrl_llm.update.batch import abstract_batch
from jaxrl_llm.update.optimizer.state import abstract_state


@dataclass(frozen=True, kw_only=True)
class AbstractRun(Blueprint):
    """A blueprint with abstract values of everything that a step keeps on the devices."""

    engine: Engine
    state: TrainState
    reference: PyTree | None
    policy: Policy
    batch: Batch
    """The batch of one update."""
    abstract_tables: ControlTables | None
    """Control tables of a nominal size; None: nothing is controlled."""

    @property
    def queues_prompts(self) -> bool:
        """True if some prompts of a step are prefilled while others are being decoded."""
        return self.cfg.rollout.prompts > self.engine.sizes.prompts[0]

    @property
    def capacity(self) -> tuple[int, int, int]:
        """Maximum numbers of prompts and of sequence groups decoded concurrently, and their widest window."""
        sizes = self.engine.sizes
        return sizes.prompts[0], sizes.groups(sizes.prompts[0]), sizes.windows[-1]


def make_abstract_run(blueprint: Blueprint) -> AbstractRun:
    """Return the abstract values of a blueprint whose config was found valid."""
    # Without the control, whose tables are small and need a tokenizer.
    engine = Engine(
        blueprint.engine_model, dataclasses.replace(blueprint.cfg.rollout, control=NoControl()), blueprint.prompt_slots
    )
    train, specs = blueprint.train, blueprint.reference_specs
    return AbstractRun(
        **{field.name: getattr(blueprint, field.name) for field in dataclasses.fields(Blueprint)},
        engine=engine,
        state=abstract_state(blueprint.learner_specs, blueprint.optimizer, train),
        reference=None if specs is None else model_params.abstract(specs, train),
        policy=abstract_policy(blueprint.model, blueprint.decode, blueprint.cfg.rollout.engine.weights),
        batch=_batch(blueprint, engine),
        abstract_tables=_tables(blueprint),
    )


def with_micro_batches(run: AbstractRun, micro_batches: int) -> AbstractRun:
    """Return the run with another number of micro-batches; everything else stays."""
    cfg = dataclasses.replace(run.cfg, update=dataclasses.replace(run.cfg.update, micro_batches=micro_batches))
    changed = dataclasses.replace(run, cfg=cfg)
    return dataclasses.replace(changed, batch=_batch(changed, run.engine))


def _batch(blueprint: Blueprint, engine: Engine) -> Batch:
    """The batch of one update: the rows of a minibatch at their full length."""
    max_kept_tokens, own = engine.decoding.max_kept_tokens, blueprint.loss.own
    return abstract_batch(blueprint.shapes.update, uses_of(blueprint.cfg), max_kept_tokens, own, blueprint.train)


def _tables(blueprint: Blueprint) -> ControlTables | None:
    if not blueprint.cfg.rollout.controlled:
        return None
    blank = blank_tables((1, 64, 64), blueprint.model.vocab_size)
    where = blueprint.train.replicated
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), blank)

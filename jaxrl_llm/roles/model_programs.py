"""Programs of a model for a loop of one's own: update, publish and score, and the batches that they read.

`build.py` makes the same programs for a whole config; here each is made of a `Model`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from jaxrl_llm.config.user_code import traced
from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.distribution.loss_terms import Loss, Terms, Tokens
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.publish import publisher
from jaxrl_llm.objective.credit import as_credit
from jaxrl_llm.objective.losses import as_loss, with_own_columns
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.loaded_model import Model
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.roles.updates import as_floats, without_zero_gradients
from jaxrl_llm.types import Batch, Credit, Experience, Groups, Policy, PyTree, Rollouts, Scores, TrainState
from jaxrl_llm.update.batch import fill_batch, spread_rows, token_weights
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.packing import BatchShape, GroupSizes, batch_shape
from jaxrl_llm.update.step import Update, jit_score, jit_update

Packing = Literal["none", "plain", "shared_prefix"]
LossFunction = Callable[[TokenScores, Batch], Tokens | Terms]


@dataclass(frozen=True)
class ModelUpdate:
    """One optimizer step on a batch: `update(state, batch)`. `make_update` makes it."""

    model: Model
    loss: Loss
    optimizer: optax.GradientTransformation
    micro_batches: int
    program: Update

    def start(self, params: PyTree) -> TrainState:
        """Return the state before the first step, with a copy of the parameters: `model.params`, or those of another state."""
        specs, where = model_params.specs(self.model.config), self.model.train.replicated
        if jax.tree.structure(params) != jax.tree.structure(specs, is_leaf=model_params.is_spec):
            raise UserError(
                "params: got a tree of another structure, want model.params, or state.params of an earlier update"
            )
        hosts.check_alive("params", params)
        init_state = make_init_state(specs, self.optimizer, self.model.train)
        return init_state(jax.tree.map(jnp.copy, params), hosts.put(np.int32(0), where))

    def __call__(
        self, state: TrainState, batch: Batch, reference: PyTree | None = None, tables: ControlTables | None = None
    ) -> tuple[TrainState, dict[str, float]]:
        """Return the next state and the metrics of the step: `loss`, `grad_norm`, `ratio/max`, `entropy`, ...

        After a batch without a token in the loss, whose metrics are NaN, and after a non-finite gradient (`nonfinite` 1), only the
        step differs.

        Args:
            state: donated: its arrays cannot be read any more.
            batch: from `make_batch`, the same shape in every step.
            reference: parameters of the reference, for a loss that reads its whole distribution.
            tables: `engine.tables`, of an engine with a control or a minimum length.

        Raises:
            UserError: the state was used up, the batch was not made for the loss, or there are no tables for its control.
        """
        check_kind("state", state, TrainState, "update.start(model.params)")
        check_kind("batch", batch, Batch, "rl.make_batch(groups, credit)")
        hosts.check_alive("state", state)
        check_batch(batch, self.loss)
        check_tables("batch", batch, tables)
        layout = self.model.train
        rows = spread_rows(batch, self.micro_batches, layout.size("rows"))
        state, found = self.program(
            state, hosts.put(rows, layout.sharding(("rows", None))), reference, hosts.put(tables, layout.replicated)
        )
        metrics, _ = without_zero_gradients(as_floats(jax.device_get(found)))
        # Means and extremes of no tokens.
        return state, metrics if batch.loss_mask.any() else dict.fromkeys(metrics, math.nan)


def make_update(
    model: Model, loss: Loss | LossFunction, optimizer: optax.GradientTransformation, micro_batches: int = 8
) -> ModelUpdate:
    """Return `update(state, batch) -> (state, metrics)`; it compiles when it is first called.

        update = rl.make_update(model, loss, optax.adamw(1e-6), micro_batches=8)
        state = update.start(model.params)
        state, metrics = update(state, rl.make_batch(groups, credit))

    Args:
        model: trained from any parameters of its shape.
        loss: function (scores, batch) -> one term per token [R T], of which the mean over all tokens in the loss is taken; or a
            `Loss`, as `rl.losses.make_loss` and `rl.losses.as_loss` return it.
        optimizer: of optax; it minimizes.
        micro_batches: parts of the batch whose gradients are accumulated: less memory, the same result.

    Raises:
        UserError: the loss reads a critic, which only `rl.train` trains.
    """
    if not hasattr(optimizer, "update"):
        raise UserError(f"optimizer: got {optimizer!r}, want a transformation of optax, such as optax.adamw(1e-6)")
    if micro_batches < 1:
        raise UserError(f"micro_batches: got {micro_batches}, want 1 or more")
    if not isinstance(loss, Loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        loss = as_loss(traced(loss, name, f"the loss {name}"))
    if "values" in loss.columns:
        raise UserError(
            "loss: got one that reads the values of a critic, want another: only jaxrl train trains a critic"
        )
    program = jit_update(model_params.specs(model.config), loss, optimizer, model.scoring, micro_batches=micro_batches)
    return ModelUpdate(model, loss, optimizer, micro_batches, program)


def check_kind(name: str, found: Any, kind: Any, want: str) -> None:
    """Raise UserError unless `found` is of this kind. `want`: what makes one."""
    if not isinstance(found, kind):
        raise UserError(f"{name}: got {type(found).__name__}, want what {want} returns")


def check_tables(name: str, sampled: Batch | Rollouts, tables: ControlTables | None) -> None:
    """Raise UserError if tokens were sampled under a control, and there are no tables in which to read it."""
    check_kind("tables", tables, ControlTables | None, "engine.tables")
    if tables is None and sampled.control_state is not None and sampled.kept_tokens is None:
        raise UserError(
            f"tables: got none for {name}.control_state, want engine.tables, of the engine that sampled: tokens are scored over "
            "what their control allowed"
        )


def check_batch(batch: Batch, loss: Loss) -> None:
    """Raise UserError if the batch lacks a column of the loss, or has the weights of a mean over tokens where the loss asks for
    others."""
    if missing := [name for name in loss.columns if getattr(batch, name) is None]:
        raise UserError(
            f"batch.{missing[0]}: got None, want what the loss reads: rl.make_batch(groups, credit, rl.Scores({missing[0]}=...))"
        )
    if missing := [column.name for column in loss.own if column.name not in batch.own]:
        raise UserError(
            f"batch.own: got no {missing[0]}, a column of the loss: want rl.make_batch(groups, credit, loss=loss)"
        )
    row, slot = np.nonzero(batch.loss_mask)
    if loss.aggregation == "token" and len(row) and np.ptp(batch.weight[row, slot]):
        raise UserError("batch.weight: got those of another mean, want that over tokens: rl.make_batch(groups, credit)")
    # A group's rows may be apart, so the weights of the mean over prompts cannot be made again.
    if loss.aggregation in ("token", "prompt") or not len(row):
        return
    sequences, index, count = np.unique(
        row * batch.tokens.shape[1] + batch.segment[row, slot], return_inverse=True, return_counts=True
    )
    mask, group = np.arange(count.max()) < count[:, None], np.zeros(len(sequences), int)
    of_tokens, want = (token_weights(mask, group, kind, loss.length)[:, 0] for kind in ("token", loss.aggregation))
    if np.array_equal(batch.weight[row, slot], of_tokens[index]) and not np.array_equal(of_tokens, want):
        raise UserError(
            f"batch.weight: got those of a mean over tokens, want the loss's, {loss.aggregation}: "
            "rl.make_batch(groups, credit, loss=loss)"
        )


def make_batch(
    groups: Groups,
    credit: Credit | Float[np.ndarray, "B ..."],
    scores: Scores | None = None,
    loss: Loss | LossFunction | None = None,
    packing: Packing = "shared_prefix",
    slots: int = 0,
) -> Batch:
    """Return the batch of the kept rows, NumPy. Its shape depends on the shape of the groups alone.

        batch = rl.make_batch(groups, rl.advantages.Grpo()(groups), packing="shared_prefix")

    Args:
        groups: graded.
        credit: advantages, from `rl.advantages`; or your own, one number per row [B] or per token [B C].
        scores: log-probs under a reference or proximal policy, if the loss reads them.
        loss: the loss that `make_update` got, if it is a `Loss`: it may take another mean, and define columns.
        packing: none, one sequence per row; plain, as many as fit; shared_prefix, a prompt once, followed by its completions.
        slots: tokens per row T; 0: the longest sequence, with shared_prefix the longest group.

    Raises:
        UserError: `packing` or `slots` is out of range, or the credit has another shape than the groups.
    """
    check_kind("groups", groups, Groups, "rl.grade(...), or keep(groups) of a filter made by rl.filters.chain")
    check_kind("scores", scores, Scores | None, "rl.Scores(reference_logprobs=...)")
    shape = shape_of(groups, packing, slots)
    credit = credit if isinstance(credit, Credit) else as_credit(credit, groups, "credit")
    aggregation, length, own = (loss.aggregation, loss.length, loss.own) if isinstance(loss, Loss) else ("token", 1, ())
    scores = with_own_columns(scores or Scores(), groups, own)
    return fill_batch(Experience(groups, scores, credit), shape, 0, aggregation, length, own)[0]


def shape_of(groups: Groups, packing: Packing, slots: int = 0, micro_batches: int = 1, shards: int = 1) -> BatchShape:
    """Return the least shape that holds groups of this shape at their longest.

    Args:
        groups: of any length.
        packing, slots: as in `make_batch`.
        micro_batches, shards: the rows are a multiple of their product.
    """
    if packing not in get_args(Packing):
        raise UserError(f"packing: got {packing!r}, want one of {', '.join(get_args(Packing))}")
    rollouts, size = groups.rollouts, groups.rollouts.size
    longest = rollouts.prompts.tokens.shape[1], rollouts.tokens.shape[1]
    try:
        sizes = GroupSizes(len(size), len(rollouts.length), int(size.max()))
        return batch_shape(packing, sizes, longest, slots, micro_batches, shards)
    except ValueError as error:
        raise UserError(f"slots: {error}") from None


def make_score(model: Model, packing: Packing = "shared_prefix", micro_batches: int = 1) -> Callable[..., TokenScores]:
    """Return `score(params, groups, tables=None)`: log-probs and entropies [B C] of the sampled tokens under `params`, NumPy.

        score = rl.make_score(model)
        scores = rl.Scores(reference_logprobs=score(model.params, groups).logprobs)

    They are at the rollouts' temperature and over the tokens that truncation kept and the control allowed, for which `tables` are
    `engine.tables`; 0 in rows that are not kept.

    Args:
        model: of the parameters' shape.
        packing: as in `make_batch`.
        micro_batches: parts that are scored in turn: less memory, the same result.
    """
    program, layout = jit_score(model.scoring, micro_batches), model.train

    def score(params: PyTree, groups: Groups, tables: ControlTables | None = None) -> TokenScores:
        check_kind("groups", groups, Groups, "rl.grade(...)")
        check_tables("rollouts", groups.rollouts, tables)
        hosts.check_alive("params", params)
        shape = shape_of(groups, packing, 0, micro_batches, layout.size("rows"))
        tables = hosts.put(tables, layout.replicated)
        return Scorer(program, shape, 0, layout.sharding(("rows", None)), tables)(params, groups)

    return score


def make_publish(model: Model, weights: str = "compute") -> Callable[..., Policy]:
    """Return `publish(params, version=0, old=None) -> Policy`, the parameters for sampling in the compute dtype and DECODE layout.

        publish = rl.make_publish(model)
        policy = publish(model.params)
        policy = publish(state.params, state.step, policy)      # the old policy's buffers are donated

    `weights`: format of the policy's matrices, as `rollout.engine.weights`: compute, int8 or fp8.
    """
    return publisher(model.config, model.train, model.decode, weights)

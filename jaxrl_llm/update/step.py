"""Compiled programs of the update: one optimizer step on one minibatch (donates its TrainState), and token scoring."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.distribution.loss_terms import Loss, Terms
from jaxrl_llm.distribution.score import Scoring, TokenScores, score_tokens
from jaxrl_llm.model import lora
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree, TrainState
from jaxrl_llm.update.config import EssScaling
from jaxrl_llm.update.effective_sample_size import (
    WeightSums,
    effective_share,
    lr_scale,
    merged,
    no_weights,
    weight_sums,
)
from jaxrl_llm.update.optimizer.state import state_shardings, zero_gradients

Metrics = dict[str, Float[Array, ""]]
Update = Callable[..., tuple[TrainState, Metrics]]


class _Measured(NamedTuple):
    """Metrics of a micro-batch, each kind to be accumulated in its own way."""

    sums: Metrics
    maxima: Metrics
    weights: dict[str, WeightSums]


def jit_update(
    specs: PyTree,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    scoring: Scoring,
    micro_batches: int = 1,
    ess_scaling: EssScaling | None = None,
) -> Update:
    """Return the program `update(state, batch, reference, tables) -> (state, metrics)`.

    `reference`: parameters of the reference if the loss reads its whole distribution, else None; with adapters, the adapters
    suffice. `tables`: control tables in which `batch.control_state` is read; None without it.

    Terms are weighted by `batch.weight`, computed from counts over the whole minibatch, so the gradient does not depend on the
    number of micro-batches or on the mesh. Trailing micro-batches without a token in the loss are skipped.
    A non-finite loss or gradient (`nonfinite` 1), or a minibatch without a token in the loss, leaves parameters and optimizer state
    unchanged to the bit. `zero_gradient/<path>` is 1 where a parameter's gradient is exactly 0 everywhere. `ess/sequences` and
    `ess/tokens` are the effective sample size of their importance weights, as a share of their number, for a loss of samples.

    Args:
        specs: specs of the state's parameters.
        loss: the loss to minimize.
        optimizer: the transformation of gradients of the trained parameters.
        scoring: model and options by which tokens are scored.
        micro_batches: number of micro-batches whose gradients are accumulated.
        ess_scaling: of the step, by `ess/sequences`; the factor, `lr/ess_scale`, has to be finite too.
    """
    layout = scoring.layout

    def objective(params: PyTree, micro_batch: Batch, share: Array, *read: PyTree) -> tuple[Array, _Measured]:
        scores = score_tokens(params, micro_batch, scoring, *read)
        return _loss_and_metrics(loss.terms(scores, micro_batch), micro_batch, share)

    def update(
        state: TrainState, batch: Batch, reference: PyTree | None = None, tables: ControlTables | None = None
    ) -> tuple[TrainState, Metrics]:
        trained, frozen = lora.split(state.params)
        reference = None if reference is None else lora.join(reference, frozen)
        share = batch.loss_mask / jnp.maximum(jnp.sum(batch.loss_mask), 1)
        batch, more = _without_dropped(loss, batch, share)
        grads, metrics = _accumulate(
            lambda trained, *of: objective(lora.join(trained, frozen), *of, reference, tables),
            trained,
            (batch, share),
            micro_batches,
            layout,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        if ess_scaling is not None:
            more["lr/ess_scale"] = lr_scale(ess_scaling, metrics["ess/sequences"])
            finite = finite & jnp.isfinite(more["lr/ess_scale"])
        # Without a token in the loss, Adam would still step along its momentum.
        useful = finite & jnp.any(batch.loss_mask)
        new = _apply_gradients(state, grads, optimizer, useful, more.get("lr/ess_scale"))
        return new, metrics | more | zero_gradients(grads) | {"grad_norm": grad_norm, "nonfinite": 1.0 - finite}

    return jax.jit(
        update, donate_argnums=0, out_shardings=(state_shardings(specs, optimizer, layout), layout.replicated)
    )


def _without_dropped(loss: Loss, batch: Batch, share: Array) -> tuple[Batch, Metrics]:
    """Return the minibatch, without a weight for the tokens that the loss drops, and their share."""
    if loss.keep is None:
        return batch, {}
    kept = loss.keep(batch)
    more = {"mismatch/dropped": jnp.sum(share * ~kept)}
    return batch.replace(weight=jnp.where(kept, batch.weight, 0.0)), more


def _loss_and_metrics(terms: Terms, micro_batch: Batch, share: Array) -> tuple[Array, _Measured]:
    """Return a micro-batch's loss and its contribution to the metrics."""
    summed = lambda x, by: jnp.sum(jnp.where(micro_batch.loss_mask, x, 0.0) * by)  # noqa: E731
    total = summed(terms.loss, micro_batch.weight)
    means = {name: summed(x, share) for name, x in terms.means.items()}
    means |= {name: summed(x, micro_batch.weight) for name, x in terms.weighted.items()}
    maxima = {name: jnp.max(jnp.where(micro_batch.loss_mask, x, -jnp.inf)) for name, x in terms.maxima.items()}
    weights = {} if terms.log_ratio is None else weight_sums(terms.log_ratio, micro_batch)
    return total, _Measured({"loss": total, **means}, maxima, weights)


def _apply_gradients(
    state: TrainState, grads: PyTree, optimizer: optax.GradientTransformation, useful: Array, scale: Array | None
) -> TrainState:
    """Return the state after one optimizer step, times `scale`; if not `useful`, only the step counter changes."""
    trained, frozen = lora.split(state.params)
    changes, opt_state = optimizer.update(grads, state.opt_state, trained)
    if scale is not None:
        # The gradient's own size would cancel in Adam.
        changes = jax.tree.map(lambda x: scale * x, changes)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(useful, a, b), new, old)  # noqa: E731
    return TrainState(
        params=lora.join(keep(optax.apply_updates(trained, changes), trained), frozen),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
    )


def _accumulate(
    objective: Callable, params: PyTree, minibatch: tuple[Batch, Array], num_micro_batches: int, layout: Layout
) -> tuple[PyTree, Metrics]:
    """Return gradient and metrics of a minibatch, accumulated in f32 over `num_micro_batches`."""

    def one(micro_batch: tuple[Batch, Array]) -> tuple[PyTree, _Measured]:
        return jax.grad(objective, has_aux=True)(params, *micro_batch)

    def add(i: Array, total: tuple) -> tuple:
        grads, (sums, maxima, weights) = total
        micro_batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)
        more, (more_sums, more_maxima, more_weights) = one(micro_batch)
        sums, grads = jax.tree.map(jnp.add, (sums, grads), (more_sums, more))
        maxima = jax.tree.map(jnp.maximum, maxima, more_maxima)
        return grads, _Measured(sums, maxima, {name: merged(weights[name], more_weights[name]) for name in weights})

    if num_micro_batches == 1:
        grads, (sums, maxima, weights) = one(minibatch)
    else:
        stacked = _split_micro_batches(minibatch, num_micro_batches, layout)
        # Starts from zeros, not from the first micro-batch: otherwise the whole model is compiled twice.
        _, (sums, maxima, weights) = jax.eval_shape(one, jax.tree.map(lambda x: x[0], stacked))
        fill = lambda tree, value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)  # noqa: E731
        empty = _Measured(fill(sums, 0), fill(maxima, -jnp.inf), {name: no_weights() for name in weights})
        has_loss = jnp.any(stacked[0].loss_mask, axis=(1, 2))
        last = jnp.max(jnp.where(has_loss, jnp.arange(1, num_micro_batches + 1), 0))
        grads, (sums, maxima, weights) = jax.lax.fori_loop(0, last, add, (jax.tree.map(jnp.zeros_like, params), empty))
    for name in [n for n in maxima if n.endswith("/-min")]:
        maxima[name.replace("-min", "min")] = -maxima.pop(name)
    return grads, sums | maxima | {f"ess/{name}": effective_share(found) for name, found in weights.items()}


def _split_micro_batches(tree: PyTree, num_micro_batches: int, layout: Layout) -> PyTree:
    """Reshape [R ...] to [M, R / M, ...], M = num_micro_batches: micro-batch i has the rows i, i + M, ..."""

    def split(x: Array) -> Array:
        # Strided, so every device keeps its rows; consecutive rows would all move between devices.
        x = x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, tree)


def jit_score(scoring: Scoring, num_micro_batches: int = 1) -> Callable[..., TokenScores]:
    """Return the program `score(params, batch, tables) -> TokenScores`, in `num_micro_batches` sequential micro-batches; `tables`
    as in `jit_update`.

    It serves the reference, the proximal policy, the critic and exact evaluation.
    """

    def score(params: PyTree, batch: Batch, tables: ControlTables | None = None) -> TokenScores:
        one = lambda micro_batch: score_tokens(params, micro_batch, scoring, tables=tables)  # noqa: E731
        if num_micro_batches == 1:
            return one(batch)
        scores = jax.lax.map(one, _split_micro_batches(batch, num_micro_batches, scoring.layout))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), scores)

    return jax.jit(score, out_shardings=scoring.layout.sharding(("rows", None)))

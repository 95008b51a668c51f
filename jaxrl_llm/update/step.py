"""`update`: one optimizer step on one minibatch, in one compiled program; the TrainState is donated to it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.distribution.loss import Loss, Terms
from jaxrl_llm.distribution.score import Scoring, TokenScores, score_tokens
from jaxrl_llm.model import lora
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.types import Batch, PyTree, TrainState
from jaxrl_llm.update.optimizer.state import state_shardings, zero_gradients

Metrics = dict[str, Float[Array, ""]]
Update = Callable[..., tuple[TrainState, Metrics]]


def make_update(
    specs: PyTree,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    scoring: Scoring,
    micro_batches: int = 1,
) -> Update:
    """The program `update(state, batch, reference) -> (state, metrics)`; `reference`: the parameters of a policy whose whole
    distribution the loss reads, else None; of one with adapters these are enough.

    Every term is weighted by `batch.weight`, made of counts over the whole minibatch, so the gradient does not depend on the
    number of micro-batches nor on the mesh. Micro-batches without a token to learn from are skipped if they stand last.
    A non-finite loss or gradient (`nonfinite` 1), or a minibatch without any token, leaves parameters and optimizer bit for bit
    as they were. `zero_gradient/<path>` is 1 where a parameter's gradient is exactly 0 everywhere.

    Args:
        specs: of the state's parameters.
        loss: what is minimized.
        optimizer: of gradients to changes, over the parameters that are trained.
        scoring: how the tokens of a batch are scored.
        micro_batches: parts of a minibatch whose gradients are added up.
    """
    layout = scoring.layout

    def objective(
        params: PyTree, part: Batch, share: Array, reference: PyTree | None
    ) -> tuple[Array, tuple[Metrics, Metrics]]:
        scores = score_tokens(params, part, scoring, reference)
        return _summed(loss.terms(scores, part), part, share)

    def update(state: TrainState, batch: Batch, reference: PyTree | None = None) -> tuple[TrainState, Metrics]:
        trained, frozen = lora.split(state.params)
        reference = None if reference is None else lora.join(reference, frozen)
        share = batch.loss_mask / jnp.maximum(jnp.sum(batch.loss_mask), 1)
        more = {}
        if loss.keep is not None:
            kept = loss.keep(batch)
            more = {"mismatch/dropped": jnp.sum(share * ~kept)}
            batch = batch.replace(weight=jnp.where(kept, batch.weight, 0.0))
        grads, metrics = _accumulate(
            lambda trained, part, share: objective(lora.join(trained, frozen), part, share, reference),
            trained,
            (batch, share),
            micro_batches,
            layout,
        )
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
        # Adam would go on along its momentum where nothing was learned.
        useful = finite & jnp.any(batch.loss_mask)
        new = _stepped(state, grads, optimizer, useful)
        return new, metrics | more | zero_gradients(grads) | {"grad_norm": grad_norm, "nonfinite": 1.0 - finite}

    return jax.jit(
        update, donate_argnums=0, out_shardings=(state_shardings(specs, optimizer, layout), layout.replicated)
    )


def _summed(terms: Terms, part: Batch, share: Array) -> tuple[Array, tuple[Metrics, Metrics]]:
    """A part's loss, its share of the means, and its maxima."""
    summed = lambda x, by: jnp.sum(jnp.where(part.loss_mask, x, 0.0) * by)  # noqa: E731
    total = summed(terms.loss, part.weight)
    means = {name: summed(x, share) for name, x in terms.means.items()}
    means |= {name: summed(x, part.weight) for name, x in terms.weighted.items()}
    maxima = {name: jnp.max(jnp.where(part.loss_mask, x, -jnp.inf)) for name, x in terms.maxima.items()}
    return total, ({"loss": total, **means}, maxima)


def _stepped(state: TrainState, grads: PyTree, optimizer: optax.GradientTransformation, useful: Array) -> TrainState:
    """One step of the optimizer; where it is not `useful` only the count of steps changes."""
    trained, frozen = lora.split(state.params)
    changes, opt_state = optimizer.update(grads, state.opt_state, trained)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(useful, a, b), new, old)  # noqa: E731
    return TrainState(
        params=lora.join(keep(optax.apply_updates(trained, changes), trained), frozen),
        opt_state=keep(opt_state, state.opt_state),
        step=state.step + 1,
    )


def _accumulate(
    objective: Callable, params: PyTree, minibatch: tuple[Batch, Array], parts: int, layout: Layout
) -> tuple[PyTree, Metrics]:
    """Gradient and metrics of a minibatch, added up over `parts` of its rows in turn; accumulators are f32."""

    def one(part: tuple[Batch, Array]) -> tuple[PyTree, tuple[Metrics, Metrics]]:
        return jax.grad(objective, has_aux=True)(params, *part)

    def add(i: Array, total: tuple) -> tuple:
        grads, (sums, maxima) = total
        part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked)
        more, (more_sums, more_maxima) = one(part)
        sums, grads = jax.tree.map(jnp.add, (sums, grads), (more_sums, more))
        return grads, (sums, jax.tree.map(jnp.maximum, maxima, more_maxima))

    if parts == 1:
        grads, (sums, maxima) = one(minibatch)
    else:
        stacked = _in_parts(minibatch, parts, layout)
        # From nothing, not from the first part: else the whole model is compiled twice.
        _, (sums, maxima) = jax.eval_shape(one, jax.tree.map(lambda x: x[0], stacked))
        fill = lambda tree, value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)  # noqa: E731
        nothing = (jax.tree.map(jnp.zeros_like, params), (fill(sums, 0), fill(maxima, -jnp.inf)))
        learns = jnp.any(stacked[0].loss_mask, axis=(1, 2))
        last = jnp.max(jnp.where(learns, jnp.arange(1, parts + 1), 0))
        grads, (sums, maxima) = jax.lax.fori_loop(0, last, add, nothing)
    for name in [n for n in maxima if n.endswith("/-min")]:
        maxima[name.replace("-min", "min")] = -maxima.pop(name)
    return grads, sums | maxima


def _in_parts(tree: PyTree, parts: int, layout: Layout) -> PyTree:
    """[R ...] to [parts, R / parts, ...]: part i takes rows i, i + parts, ..."""

    def split(x: Array) -> Array:
        # Every device keeps its own rows. Consecutive rows would move them all.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return layout.constrain(x, None, "rows", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, tree)


def make_score(scoring: Scoring, parts: int = 1) -> Callable[[PyTree, Batch], TokenScores]:
    """The program `score(params, batch) -> TokenScores`, `parts` of the rows in turn: for the reference and the proximal policy,
    the critic and exact evaluation."""

    def score(params: PyTree, batch: Batch) -> TokenScores:
        one = lambda part: score_tokens(params, part, scoring)  # noqa: E731
        if parts == 1:
            return one(batch)
        scores = jax.lax.map(one, _in_parts(batch, parts, scoring.layout))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), scores)

    return jax.jit(score, out_shardings=scoring.layout.sharding(("rows", None)))

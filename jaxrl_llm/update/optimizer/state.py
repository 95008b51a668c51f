"""Shardings of the optimizer's state, and its initialization."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel.layout import Axes, Layout
from jaxrl_llm.types import PyTree, TrainState
from jaxrl_llm.update.optimizer.transform import parameter_paths

ZERO_GRADIENT = "zero_gradient/"


def state_shardings(specs: PyTree, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Return the sharding of each leaf of the TrainState: moments as their parameter, moments of fewer axes by the parameter's
    remaining axes, counters replicated."""
    trained, _ = lora.split(specs)
    params = dict(jax.tree_util.tree_leaves_with_path(trained, is_leaf=model_params.is_spec))
    shapes = jax.eval_shape(optimizer.init, _abstract(trained, lambda shape: shape))
    # Here all axes of a parameter have different lengths, in the same order: the length identifies a remaining axis.
    by_length = jax.eval_shape(optimizer.init, _abstract(trained, _distinct))

    def place(keys: tuple, leaf: jax.ShapeDtypeStruct, distinct: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        own = next((params[keys[n:]] for n in range(len(keys)) if keys[n:] in params), None)
        return layout.replicated if own is None else layout.sharding(_axes_left(own, leaf.shape, distinct.shape))

    placed = jax.tree_util.tree_map_with_path(place, shapes, by_length)
    return TrainState(model_params.shardings(specs, layout), placed, layout.replicated)


def _abstract(specs: PyTree, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> PyTree:
    return model_params.map_specs(lambda s: jax.ShapeDtypeStruct(shape(s.shape), jnp.float32), specs)


def _distinct(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(shape) * size + axis for axis, size in enumerate(shape))


def _axes_left(spec: model_params.ParamSpec, shape: tuple[int, ...], distinct: tuple[int, ...]) -> Axes:
    """Return the logical axes of a state's leaf of this shape; none if it has no axes of the parameter."""
    if shape == spec.shape:
        return spec.axes
    axis_of = {size: axis for axis, size in enumerate(_distinct(spec.shape))}
    remaining = [axis_of.get(size) for size in distinct]
    if None in remaining or shape != tuple(spec.shape[axis] for axis in remaining):
        return ()
    return tuple(spec.axes[axis] for axis in remaining)


def abstract_state(specs: PyTree, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Return shapes, dtypes and shardings of the TrainState of parameters of these specs."""
    shapes = jax.eval_shape(
        lambda p: TrainState(p, optimizer.init(lora.split(p)[0]), jnp.zeros((), jnp.int32)),
        model_params.abstract(specs, layout),
    )
    where = state_shardings(specs, optimizer, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def make_init_state(
    specs: PyTree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    add_parameters: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[[PyTree, Array], TrainState]:
    """Return the program `init_state(params, step) -> TrainState` with a fresh optimizer; it donates `params`.

    Args:
        specs: specs of `add_parameters(params)`.
        optimizer: the transformation of gradients.
        layout: the mesh.
        add_parameters: adds the adapters and the critic.
    """

    def init_state(params: PyTree, step: Array) -> TrainState:
        params = add_parameters(params)
        return TrainState(params=params, opt_state=optimizer.init(lora.split(params)[0]), step=step)

    return jax.jit(init_state, donate_argnums=0, out_shardings=state_shardings(specs, optimizer, layout))


def zero_gradients(grads: PyTree) -> dict[str, Float[Array, ""]]:
    """Return `zero_gradient/<path>` per parameter: 1 if its gradient is exactly 0 everywhere, else 0."""
    found = zip(parameter_paths(grads), jax.tree.leaves(grads), strict=True)
    return {f"{ZERO_GRADIENT}{path}": 1.0 - jnp.any(x != 0) for path, x in found}

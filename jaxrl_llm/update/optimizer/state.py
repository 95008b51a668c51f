"""Where the optimizer's state lies, and the state that a run starts from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel.layout import Axes, Layout
from jaxrl_llm.types import PyTree, TrainState
from jaxrl_llm.update.optimizer.transform import names

ZERO_GRADIENT = "zero_gradient/"


def state_shardings(specs: PyTree, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Where each leaf of the TrainState lies: a moment as its parameter does, one of fewer axes on what is left of the parameter's,
    counters everywhere."""
    trained, _ = lora.split(specs)
    params = dict(jax.tree_util.tree_leaves_with_path(trained, is_leaf=model_params.is_spec))
    shapes = jax.eval_shape(optimizer.init, _abstract(trained, lambda shape: shape))
    # No two axes of a parameter are equally long here, and their order by length is the same: a length tells which axis is left.
    told = jax.eval_shape(optimizer.init, _abstract(trained, _distinct))

    def place(keys: tuple, leaf: jax.ShapeDtypeStruct, distinct: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        own = next((params[keys[n:]] for n in range(len(keys)) if keys[n:] in params), None)
        return layout.replicated if own is None else layout.sharding(_axes_left(own, leaf.shape, distinct.shape))

    placed = jax.tree_util.tree_map_with_path(place, shapes, told)
    return TrainState(model_params.shardings(specs, layout), placed, layout.replicated)


def _abstract(specs: PyTree, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> PyTree:
    return model_params.map_specs(lambda s: jax.ShapeDtypeStruct(shape(s.shape), jnp.float32), specs)


def _distinct(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(shape) * size + axis for axis, size in enumerate(shape))


def _axes_left(spec: model_params.ParamSpec, shape: tuple[int, ...], distinct: tuple[int, ...]) -> Axes:
    """Logical axes of a state's leaf of this shape; none where it holds no axes of the parameter."""
    if shape == spec.shape:
        return spec.axes
    axis_of = {size: axis for axis, size in enumerate(_distinct(spec.shape))}
    left = [axis_of.get(size) for size in distinct]
    if None in left or shape != tuple(spec.shape[axis] for axis in left):
        return ()
    return tuple(spec.axes[axis] for axis in left)


def abstract_state(specs: PyTree, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """Shapes, dtypes and shardings of the state that trains parameters of these specs."""
    shapes = jax.eval_shape(
        lambda p: TrainState(p, optimizer.init(lora.split(p)[0]), jnp.zeros((), jnp.int32)),
        model_params.abstract(specs, layout),
    )
    where = state_shardings(specs, optimizer, layout)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def make_start(
    specs: PyTree,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    grown: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[[PyTree, Array], TrainState]:
    """The program `start(params, step) -> TrainState` with a fresh optimizer; `params` are donated. `specs` are those of
    `grown(params)`, which is what is trained."""

    def start(params: PyTree, step: Array) -> TrainState:
        params = grown(params)
        return TrainState(params=params, opt_state=optimizer.init(lora.split(params)[0]), step=step)

    return jax.jit(start, donate_argnums=0, out_shardings=state_shardings(specs, optimizer, layout))


def zero_gradients(grads: PyTree) -> dict[str, Float[Array, ""]]:
    """`zero_gradient/<path>` of each parameter: 1 where its gradient is exactly 0 everywhere, else 0."""
    found = zip(names(grads), jax.tree.leaves(grads), strict=True)
    return {f"{ZERO_GRADIENT}{path}": 1.0 - jnp.any(x != 0) for path, x in found}

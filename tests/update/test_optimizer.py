"""The optimizers: equal to optax on unsharded trees, for every mesh; schedules, decay, groups and clipping by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import TypeAdapter, ValidationError
from setups import SMALL, layouts, make_params

from jaxrl_llm.errors import UserError
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import TrainState
from jaxrl_llm.update.optimizer.config import Adafactor, AdamW, GroupConfig, Lion, Muon, OptimizerConfig
from jaxrl_llm.update.optimizer.state import make_init_state, state_shardings, zero_gradients
from jaxrl_llm.update.optimizer.transform import learning_rate, make_optimizer, parameter_paths

SPECS = model_params.specs(SMALL)
LAYERS, D = SMALL.layers, SMALL.d_model
CLIP = 0.7
STEPS = 3
MATRICES = ("qkv", "out", "gate_up", "down")
NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm")


def numpy_params():
    return jax.device_get(make_params(SMALL, layouts()[0]))


@cache
def gradients():
    """One tree a step; the norm of each is far above CLIP."""
    rng = np.random.default_rng(1)
    return [
        jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), numpy_params()) for _ in range(STEPS)
    ]


def sharded_steps(cfg, sizes=(1, 4, 2)):
    """Parameters after STEPS updates of `make_optimizer(cfg)` on a mesh, as NumPy."""
    train, _ = layouts(sizes)
    optimizer = make_optimizer(cfg)
    state = make_init_state(SPECS, optimizer, train)(
        make_params(SMALL, train), hosts.put(np.int32(0), train.replicated)
    )

    def step(state, grads):
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, changes), opt_state, state.step + 1)

    where = state_shardings(SPECS, optimizer, train)
    step = jax.jit(step, donate_argnums=0, in_shardings=(where, where.params), out_shardings=where)
    for grads in gradients():
        state = step(state, hosts.put(grads, where.params))
    return jax.device_get(state.params)


def plain_steps(optimizer, params, grads):
    """The same with optax alone, on one device."""

    @jax.jit
    def step(params, state, grads):
        changes, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, changes), state

    state = optimizer.init(params)
    for each in grads:
        params, state = step(params, state, each)
    return jax.device_get(params)


def assert_equal(ours, theirs):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6, err_msg=jax.tree_util.keystr(path))


# --- the same as optax -----------------------------------------------------------------------------------------------------

DECAYED = {"embed": True, "final_norm": False, "layers": dict.fromkeys(MATRICES, True) | dict.fromkeys(NORMS, False)}
PLAIN = {
    "adamw": (
        AdamW(lr=1e-2, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.1, max_grad_norm=CLIP),
        optax.adamw(1e-2, 0.8, 0.9, 1e-6, weight_decay=0.1, mask=DECAYED),
    ),
    "adafactor": (
        Adafactor(lr=1e-2, decay_exponent=0.7, clip_rms=0.9, factor_from=8, relative=True, max_grad_norm=CLIP),
        optax.adafactor(1e-2, min_dim_size_to_factor=8, decay_rate=0.7, clipping_threshold=0.9),
    ),
    "lion": (
        Lion(lr=1e-3, b1=0.8, b2=0.95, weight_decay=0.1, max_grad_norm=CLIP),
        optax.lion(1e-3, 0.8, 0.95, weight_decay=0.1, mask=DECAYED),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLAIN)
def test_three_steps_on_a_mesh_are_those_of_optax(kind):
    cfg, plain = PLAIN[kind]
    assert_equal(
        sharded_steps(cfg),
        plain_steps(optax.chain(optax.clip_by_global_norm(CLIP), plain), numpy_params(), gradients()),
    )


def as_matrices(layers):
    """Every matrix by itself, two-dimensional: [inputs, outputs]."""
    found = {}
    for n in range(LAYERS):
        found[f"qkv {n}"] = layers["qkv"][n].reshape(D, -1)
        found[f"out {n}"] = layers["out"][n].reshape(-1, D)
        found[f"down {n}"] = layers["down"][n]
        found |= {f"gate_up {n} {side}": layers["gate_up"][n, side] for side in range(2)}
    return found


@pytest.mark.slow
def test_muon_steps_are_those_of_optax_on_single_matrices_and_adamw_elsewhere():
    """optax's Muon on every matrix as a leaf of its own; its Adam, which has Nesterov's momentum too, on all else."""
    cfg = Muon(lr=1e-2, momentum=0.9, iterations=3, b1=0.8, b2=0.9, max_grad_norm=CLIP)
    ours = sharded_steps(cfg)
    clip = optax.clip_by_global_norm(CLIP)
    clipped = [jax.device_get(clip.update(g, clip.init(g))[0]) for g in gradients()]
    muon = optax.contrib.muon(1e-2, ns_steps=3, beta=0.9, consistent_rms=0.2)
    matrices = plain_steps(muon, as_matrices(numpy_params()["layers"]), [as_matrices(g["layers"]) for g in clipped])
    assert_equal(as_matrices(ours["layers"]), matrices)

    def rest(tree):
        return {"embed": tree["embed"], "final_norm": tree["final_norm"], **{n: tree["layers"][n] for n in NORMS}}

    adam = optax.adamw(1e-2, 0.8, 0.9, weight_decay=0.0, nesterov=True)
    assert_equal(rest(ours), plain_steps(adam, rest(numpy_params()), [rest(g) for g in clipped]))


@pytest.mark.slow
def test_muon_steps_adapters_as_the_two_matrices_they_are():
    """A [L *inputs rank] and B [L rank *outputs] of q and of the output projection, layer by layer."""
    specs, _ = lora.split(lora.adapted_specs(SPECS, SMALL, LoraConfig(rank=2, targets=("q", "o"))))
    rng = np.random.default_rng(3)
    params, grads = (
        model_params.map_specs(lambda s: rng.standard_normal(s.shape).astype(np.float32), specs) for _ in range(2)
    )
    optimizer = make_optimizer(Muon(lr=1e-2, iterations=3, max_grad_norm=1e9))
    assert set(parameter_paths(params)) == {
        f"layers/{leaf}/pairs/{name}/{x}" for leaf, name in (("qkv", "q"), ("out", "o")) for x in "ab"
    }
    ours = jax.device_get(jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads))

    def flat(tree):
        pairs = {name: tree["layers"][leaf].pairs[name] for leaf, name in (("qkv", "q"), ("out", "o"))}
        return {
            f"{name} {x} {n}": pair[n].reshape(-1, 2) if x == "a" else pair[n].reshape(2, -1)
            for name, both in pairs.items()
            for x, pair in (("a", both.a), ("b", both.b))
            for n in range(LAYERS)
        }

    plain = optax.contrib.muon(1e-2, ns_steps=3, beta=0.95, consistent_rms=0.2)
    theirs = jax.device_get(jax.jit(lambda p, g: plain.update(g, plain.init(p), p)[0])(flat(params), flat(grads)))
    assert_equal(flat(ours), theirs)


# --- where the state lies --------------------------------------------------------------------------------------------------


def placed(cfg, sizes=(1, 4, 2)):
    """{path of a leaf of the optimizer's state: (its shape, its axes by the mesh, that of one device)}"""
    train, _ = layouts(sizes)
    optimizer = make_optimizer(cfg)
    where = state_shardings(SPECS, optimizer, train).opt_state
    shapes = jax.eval_shape(optimizer.init, model_params.abstract(SPECS, train))
    return {
        jax.tree_util.keystr(keys): (x.shape, tuple(to.spec), to.shard_shape(x.shape))
        for (keys, x), to in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(where), strict=True)
    }


@pytest.mark.parametrize(("cfg", "moments"), [(AdamW(), 2), (Lion(), 1)])
def test_a_device_holds_of_each_moment_what_it_holds_of_the_parameters(cfg, moments):
    train, _ = layouts((1, 4, 2))
    leaves = jax.tree.leaves(model_params.abstract(SPECS, train))
    per_device = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in leaves)
    assert per_device < 0.2 * model_params.count(SPECS), "the mesh must split the parameters for this to mean anything"
    numbers = [int(np.prod(own)) for shape, _, own in placed(cfg).values() if shape]
    assert sum(numbers) == moments * per_device
    assert [spec for shape, spec, _ in placed(cfg).values() if not shape] == [(), ()]


def test_muon_holds_one_moment_of_matrices_and_two_of_all_else():
    found = placed(Muon())
    of = lambda name: [(spec, own) for path, (_, spec, own) in found.items() if path.endswith(f"['{name}']")]  # noqa: E731
    assert of("qkv") == [((None, "fsdp", "tensor", None, None), (LAYERS, D // 4, 4, 4, 8))]
    assert of("embed") == [(("tensor", "fsdp"), (8, D // 4))] * 2
    assert of("attn_norm") == [((None, None), (LAYERS, D))] * 2


def test_factored_moments_lie_on_the_axes_that_are_left():
    """qkv [2 32 8 4 8] on (-, fsdp, tensor, -, -): the widest are 32 and the last 8. down [2 64 32]: 64 and 32."""
    found = placed(Adafactor(factor_from=8))
    of = lambda name: {p.split(".")[-1].split("[")[0]: x for p, x in found.items() if p.endswith(f"['{name}']")}  # noqa: E731
    assert of("qkv") == {
        "v_row": ((2, 8, 4, 8), (None, "tensor", None, None), (2, 4, 4, 8)),
        "v_col": ((2, 32, 8, 4), (None, "fsdp", "tensor", None), (2, 8, 4, 4)),
        "v": ((1,), (), (1,)),
    }
    assert of("down") == {
        "v_row": ((2, 32), (None, "fsdp"), (2, 8)),
        "v_col": ((2, 64), (None, "tensor"), (2, 32)),
        "v": ((1,), (), (1,)),
    }
    # Two layers are fewer than 8: not factored, and the moment is the parameter's size.
    assert of("attn_norm") == {
        "v_row": ((1,), (), (1,)),
        "v_col": ((1,), (), (1,)),
        "v": ((2, 32), (None, None), (2, 32)),
    }
    assert of("embed")["v"] == ((1,), (), (1,))


def test_a_square_parameter_keeps_the_axis_that_is_left():
    """Equal lengths are ambiguous: [8 8] on (fsdp, tensor). optax's row drops the last of them, its column the one before."""
    train, _ = layouts((1, 4, 2))
    specs = {"w": model_params.ParamSpec((8, 8), ("embed", "mlp"), 1.0)}
    state = state_shardings(specs, make_optimizer(Adafactor(factor_from=8)), train).opt_state[1][0]
    assert (tuple(state.v_row["w"].spec), tuple(state.v_col["w"].spec)) == (("fsdp",), ("tensor",))


# --- by hand ---------------------------------------------------------------------------------------------------------------


def first_step(cfg, weights, grads):
    optimizer = make_optimizer(cfg)
    return optimizer.update(grads, optimizer.init(weights), weights)[0]


def test_first_steps_of_adamw_by_hand():
    """lr * sign(g); the first of ten steps of warm-up is a tenth of it; decay adds lr * decay * w."""
    weights, grads = {"w": jnp.array([[2.0, -4.0]])}, {"w": jnp.array([[0.3, -0.4]])}
    step = lambda **cfg: first_step(AdamW(lr=1e-2, **cfg), weights, grads)["w"][0]  # noqa: E731
    np.testing.assert_allclose(step(), [-1e-2, 1e-2], rtol=1e-5)
    np.testing.assert_allclose(step(warmup_steps=10), [-1e-3, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(step(weight_decay=0.5), [-2e-2, 3e-2], rtol=1e-5)
    # The first update is number 1: one of four steps down from 1e-2 to 2e-3.
    np.testing.assert_allclose(step(decay_steps=4, final_lr=2e-3), [-8e-3, 8e-3], rtol=1e-5)


SCHEDULES = {
    "constant": (AdamW(lr=8.0), [8, 8, 8, 8, 8, 8, 8, 8]),
    "warm-up, linear": (AdamW(lr=8.0, warmup_steps=2, decay_steps=4, final_lr=4.0), [4, 8, 7, 6, 5, 4, 4, 4]),
    "cosine": (AdamW(lr=8.0, decay_steps=4, schedule="cosine"), [4 + 8**0.5, 4, 4 - 8**0.5, 0, 0, 0, 0, 0]),
    "warm-up, stable, decay": (AdamW(lr=8.0, warmup_steps=1, hold_steps=3, decay_steps=2), [8, 8, 8, 8, 4, 0, 0, 0]),
    "square root": (
        AdamW(lr=8.0, hold_steps=1, decay_steps=4, schedule="sqrt"),
        [8, 4, 8 - 32**0.5, 8 - 48**0.5, 0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_by_hand(name):
    cfg, rates = SCHEDULES[name]
    np.testing.assert_allclose(learning_rate(cfg, np.arange(1, 9)) * np.ones(8), rates, atol=1e-5)


SOME = {
    "embed": np.ones((3, 2), np.float32),
    "final_norm": np.ones(2, np.float32),
    "value": np.ones((2, 1), np.float32),
    "critic": {"layers": {"down": np.ones((2, 3, 2), np.float32), "mlp_norm": np.ones((2, 2), np.float32)}},
    "layers": {
        "down": np.ones((2, 3, 2), np.float32),
        "mlp_norm": np.ones((2, 2), np.float32),
        "qkv_bias": np.ones((2, 2, 3, 2), np.float32),
    },
}
DOWN, CRITIC_DOWN = "layers/down", "critic/layers/down"
CRITIC = GroupConfig(match="value|critic", lr_scale=3.0, weight_decay=0.5)


@pytest.mark.parametrize(
    ("cfg", "moved"),
    [
        (AdamW(lr=1.0, weight_decay=0.1), {"embed": 0.1, "value": 0.1, DOWN: 0.1, CRITIC_DOWN: 0.1}),
        (AdamW(lr=1.0, weight_decay=0.1, decay_embedding=False), {"value": 0.1, DOWN: 0.1, CRITIC_DOWN: 0.1}),
        (
            AdamW(lr=1.0, weight_decay=0.1, groups=(CRITIC,)),
            {"embed": 0.1, DOWN: 0.1, "value": 1.5, CRITIC_DOWN: 1.5},
        ),
        (
            AdamW(lr=1.0, weight_decay=0.1, groups=(GroupConfig(match=".*down", lr_scale=0.0),)),
            {"embed": 0.1, "value": 0.1},
        ),
        (Lion(lr=1.0, weight_decay=0.1), {"embed": 0.1, "value": 0.1, DOWN: 0.1, CRITIC_DOWN: 0.1}),
        (Adafactor(lr=1.0, weight_decay=0.1), {"embed": 0.1, "value": 0.1, DOWN: 0.1, CRITIC_DOWN: 0.1}),
    ],
)
def test_weight_decay_by_hand(cfg, moved):
    """Without a gradient only decay moves a parameter, which is 1 everywhere: by lr * lr_scale * decay."""
    changes = first_step(cfg, SOME, jax.tree.map(np.zeros_like, SOME))
    found = {
        name: np.unique(-np.asarray(x)) for name, x in zip(parameter_paths(SOME), jax.tree.leaves(changes), strict=True)
    }
    assert all(x.size == 1 for x in found.values())
    np.testing.assert_allclose([found[n][0] for n in found], [moved.get(n, 0.0) for n in found], atol=1e-6)


def first_moments(groups):
    """(1 - b1) * what the clip left, of gradients 3, 4 (norm 5) of the policy and 300, 400 of the critic."""
    weights = {"a": jnp.ones(1), "b": jnp.ones(1), "critic": {"a": jnp.ones(1)}, "value": jnp.ones(1)}
    grads = {
        "a": jnp.full(1, 3.0),
        "b": jnp.full(1, 4.0),
        "critic": {"a": jnp.full(1, 300.0)},
        "value": jnp.full(1, 400.0),
    }
    optimizer = make_optimizer(AdamW(max_grad_norm=2.5, groups=groups))
    return np.concatenate(jax.tree.leaves(optimizer.update(grads, optimizer.init(weights), weights)[1][1].mu)) * 10


def test_each_group_is_clipped_by_its_own_norm():
    np.testing.assert_allclose(first_moments((CRITIC,)), [1.5, 2.0, 1.5, 2.0], rtol=1e-5)
    # Without the group one norm holds them all, and nothing is left of the policy's.
    whole = np.hypot(5.0, 500.0)
    np.testing.assert_allclose(first_moments(()), np.array([3, 4, 300, 400]) * 2.5 / whole, rtol=1e-5)
    # A gradient below the bound is not touched.
    optimizer = make_optimizer(AdamW(max_grad_norm=9.0))
    grads = {"w": jnp.full(1, 3.0)}
    np.testing.assert_array_equal(
        optimizer.update(grads, optimizer.init(grads), grads)[1][1].mu["w"], np.float32(0.1) * 3
    )


def test_a_group_without_a_parameter_is_refused():
    optimizer = make_optimizer(AdamW(groups=(CRITIC, GroupConfig(match="value"))))
    with pytest.raises(
        UserError, match=r"update.optimizer.groups.1.match: got 'value', want a pattern that fits one of critic/"
    ):
        optimizer.init(SOME)
    make_optimizer(AdamW(groups=(CRITIC,))).init(SOME)


def test_a_parameter_without_any_gradient_is_seen():
    grads = jax.tree.map(np.zeros_like, SOME)
    grads["layers"]["down"][1, 2, 0] = -1e-30
    grads["value"][:] = np.nan
    found = {name.removeprefix("zero_gradient/"): float(x) for name, x in zero_gradients(grads).items()}
    assert tuple(found) == parameter_paths(grads) and set(found.values()) == {0.0, 1.0}
    assert [name for name, zero in found.items() if not zero] == [DOWN, "value"]


@pytest.mark.parametrize(
    "cfg", [AdamW(lr=0.3), Adafactor(lr=0.3, factor_from=4), Lion(lr=0.1), Muon(lr=0.5)], ids=lambda c: c.kind
)
def test_a_small_problem_is_learned(cfg):
    """Two stacked matrices and a bias that add up to given outputs; 200 steps down to a rate of 0."""
    cfg = type(cfg)(lr=cfg.lr, decay_steps=200, max_grad_norm=10.0)
    rng = np.random.default_rng(0)
    x, truth = rng.standard_normal((32, 8)), rng.standard_normal((2, 8, 4))
    y = np.tanh(x @ truth[0]) + x @ truth[1] + 1.0
    params = {"layers": {"down": jnp.zeros((2, 8, 4))}, "final_norm": jnp.zeros(4)}
    optimizer = make_optimizer(cfg)

    def loss(params):
        w = params["layers"]["down"]
        return jnp.mean((jnp.tanh(x @ w[0]) + x @ w[1] + params["final_norm"] - y) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, changes), state), value

    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=200))(params)
    assert losses[-1] < 0.02 * losses[0]


# --- config ----------------------------------------------------------------------------------------------------------------


def test_a_config_without_a_kind_is_adamw():
    read = TypeAdapter(OptimizerConfig).validate_python
    assert read({"lr": 1e-6, "warmup_steps": 10, "b2": 0.999}) == AdamW(lr=1e-6, warmup_steps=10, b2=0.999)
    assert read({"kind": "lion", "groups": [{"match": "value", "lr_scale": 2}]}).groups == (GroupConfig("value", 2.0),)
    assert [read({"kind": kind}) for kind in ("adafactor", "muon")] == [Adafactor(), Muon()]
    for wrong, message in (
        ({"kind": "sgd"}, "'adamw', 'adafactor', 'lion', 'muon'"),
        ({"kind": "lion", "eps": 1.0}, "eps"),
        ({"groups": [{"match": "("}]}, "not a regular expression"),
        ({"b1": 1.0}, "less than 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            read(wrong)

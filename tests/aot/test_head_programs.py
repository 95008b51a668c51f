"""The head under the TPU compiler, at 2,048 tokens, D 1,024 and V 151,936: memory per chip, and collectives."""

import jax
import jax.numpy as jnp
import pytest
from programs import Program, array, compile_program, layouts

from jaxrl_llm.distribution import head, logits, score
from jaxrl_llm.distribution.control_tables import blank_tables
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.perf.hlo import collectives
from jaxrl_llm.types import Batch

pytestmark = pytest.mark.timeout(1200)

R, T, D, V = 2, 1024, 1024, 151936
CFG = ModelConfig(vocab_size=V, d_model=D, layers=1, compute="bfloat16")


def dense(params, batch, layout, tables):
    """Log-prob and entropy from all logits at once."""
    h = jnp.take_along_axis(params["h"], batch.before[:, :, None], axis=1)
    x = jnp.einsum("rtd,vd->rtv", h, params["embed"].astype(h.dtype), preferred_element_type=jnp.float32)
    logp = logits.process_logits(x, batch.temperature, V)
    logprob = jnp.take_along_axis(logp, batch.tokens[..., None], axis=-1)[..., 0]
    return score.TokenScores(logprob, logits.entropy(logp))


def tiled(params, batch, layout, tables):
    return score.score_tokens(params, batch, score.Scoring(CFG, layout, V), tables=tables)


def gradient(scores, topology, sizes: tuple[int, ...], automata: int = 0) -> Program:
    """Compile the gradient of the head alone: activations are an argument. `automata`: of control tables; 0: there are none."""
    layout = layouts(topology, sizes)[0]
    numbers = lambda dtype: array(layout, (R, T), dtype, "rows", None)  # noqa: E731
    i32, f32 = numbers(jnp.int32), numbers(jnp.float32)
    batch = Batch(*[i32] * 6, numbers(jnp.bool_), *[f32] * 4)
    params = {
        "embed": array(layout, (V, D), jnp.float32, "vocab", "embed"),
        "h": array(layout, (R, T, D), CFG.compute, "rows", None, None),
    }

    tables = None
    if automata:
        blank = blank_tables((automata, 1024, 96), V)
        tables = jax.tree.map(lambda x: array(layout, x.shape, x.dtype, *(None for _ in x.shape)), blank)
        batch = batch.replace(control_state=i32)

    def loss(params, batch, tables):
        of = scores(params, batch, layout, tables)
        return jnp.sum(batch.weight * (of.logprobs + 0.01 * of.entropy))

    program = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda x: x.sharding, params))
    return compile_program(topology, CFG, lambda: program.lower(params, batch, tables))


@pytest.fixture(autouse=True)
def activations(monkeypatch):
    monkeypatch.setattr(score, "hidden", lambda params, *_: params["h"])


@pytest.fixture(scope="module")
def split(topology) -> Program:
    """Over `fsdp` and `tensor`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(score, "hidden", lambda params, *_: params["h"])
        return gradient(tiled, topology, (1, 2, 2))


def test_temporary_memory_per_chip(topology):
    """The table in bf16 and one tile of logits; the dense form has every logit in f32, 1.25 GB."""
    got, full = gradient(tiled, topology, (1, 1, 1)).temp, gradient(dense, topology, (1, 1, 1)).temp
    print(f"temp: {got / 1e6:.0f} MB in tiles, {full / 1e6:.0f} MB dense")
    assert got < 0.5e9, f"temp: got {got / 1e9:.2f} GB, want less than 0.5"
    assert full >= 4 * R * T * V, f"temp of the dense form: got {full / 1e9:.2f} GB: is it still dense?"


@pytest.mark.soak
@pytest.mark.parametrize("automata", [1, 4])
def test_a_control_takes_no_more_memory(topology, automata):
    """With one automaton next to nothing beside a tile of f32 logits; with several, each logit has a class of its own, a byte."""
    free, program = gradient(tiled, topology, (1, 1, 1)), gradient(tiled, topology, (1, 1, 1), automata)
    more = program.temp - free.temp
    print(f"temp: {free.temp / 1e6:.1f} MB, with control {program.temp / 1e6:.1f} MB")
    most = 2**20 if automata == 1 else 1.5 * head.ACCELERATOR.logits
    assert more < most, f"temp: got {more / 1e6:.1f} MB more, want less than {most / 1e6:.1f}"


def test_a_control_moves_nothing(topology, split):
    kinds = lambda program: sorted((i.kind, a.size) for i in collectives(program.hlo.all) for a in i.results)  # noqa: E731
    assert kinds(gradient(tiled, topology, (1, 2, 2), 4)) == kinds(split)


def test_neither_logits_nor_activations_move(split):
    """Over `fsdp` the table and its gradient cross once each; over `tensor` the activations' cotangent, and numbers per token."""
    tokens, width = R * T // 2, V // 2
    moved = [(split.hlo.loops[i.computation], i.kind, a) for i in collectives(split.hlo.all) for a in i.results]
    print(*moved, sep="\n")
    large = sorted((kind, a.size) for _, kind, a in moved if a.size > tokens)
    assert ("all-gather", width * D) in large
    assert {size for kind, size in large if kind == "all-gather"} == {width * D}, large
    assert {size for _, size in large} <= {width * D, width * D // 2, tokens * D}, large
    in_loops = [(kind, a) for depth, kind, a in moved if depth]
    assert in_loops and all(kind == "all-reduce" and a.size <= tokens for kind, a in in_loops), in_loops

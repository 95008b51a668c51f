"""A program that a thread compiles."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.parallel.compiled_ahead import CompiledAhead, abstract


def test_it_is_traced_once_in_another_thread_and_gives_the_same():
    threads = []

    @jax.jit
    def program(tree, none):
        threads.append(threading.current_thread())
        return tree["x"] @ tree["x"].T

    given = {"x": jnp.arange(6.0).reshape(2, 3)}
    ahead = CompiledAhead(program, abstract(given), None)
    ahead.start()
    ahead.start()
    np.testing.assert_array_equal(ahead.ready()(given, None), [[5.0, 14.0], [14.0, 50.0]])
    assert ahead.ready() is ahead.ready()
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
    # Compiled for these shapes: others are an error, not another compilation in the middle of a run.
    with pytest.raises(TypeError):
        ahead.ready()({"x": jnp.ones((3, 3))}, None)


def test_what_goes_wrong_is_raised_where_the_program_is_called():
    @jax.jit
    def program(x):
        raise ValueError("the loss is wrong")

    ahead = CompiledAhead(program, jax.ShapeDtypeStruct((2,), jnp.float32))
    ahead.start()
    for _ in range(2):
        with pytest.raises(ValueError, match="the loss is wrong"):
            ahead.ready()


def test_without_start_it_is_the_jitted_function():
    program = jax.jit(lambda x: x + 1)
    assert CompiledAhead(program, None).ready() is program

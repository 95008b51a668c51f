"""What is shown of a mask equals the mask that was sampled under."""

import jax
import jax.numpy as jnp
import numpy as np
from controlled import CONTROLS, C, G, P, policy, sampler
from setups import make_prompts

from jaxrl_llm.distribution.control_tables import allowed_tokens, encode
from jaxrl_llm.roles.allowed_sets import SHOWN, AllowedSet, allowed_sets

N = 16


def test_as_the_device_masks():
    """Every state of every control, with little and with much room, below the minimum length and above."""
    engine = sampler()
    engine.controls(P, control=list(CONTROLS.values()))
    tables = engine.tables
    used = int(max(engine.control_set.starts.values())) + 1
    state, room, masked = (x.reshape(-1) for x in np.meshgrid(np.arange(used), [1, 3, 10], [False, True]))
    codes = encode(state.astype(np.int32), room.astype(np.int32), masked)
    masks = np.asarray(allowed_tokens(jax.tree.map(jnp.asarray, tables), codes).mask)[:, :N]
    sizes = set()
    for code_state, mask, shown in zip(state, masks, allowed_sets(tables, codes, N), strict=True):
        ids = np.flatnonzero(mask).tolist()
        if tables.forced[code_state] >= 0:
            assert shown == AllowedSet(1, (tables.forced[code_state],))
        else:
            assert shown == (None if len(ids) == N else AllowedSet(len(ids), tuple(ids[:SHOWN])))
            sizes.add(len(ids))
    assert {1, 10, 11, 15, 16} <= sizes


def test_of_sampled_rows():
    """By hand: `<1` is forced, two digits follow, then only `#`; a free row allows everything."""
    engine = sampler()
    controls = engine.controls(P, control=[CONTROLS["begin"], *[CONTROLS["forbid"]] * (P - 2), None])
    of = engine.generate(policy(), make_prompts(P), jax.random.key(0), controls)
    sets = allowed_sets(engine.tables, of.control_state[0, :5], N)
    digits = AllowedSet(10, tuple(range(1, 1 + SHOWN)))
    token = engine.model.tokenizer.encode("<1#")
    assert sets == [AllowedSet(1, (token[0],)), AllowedSet(1, (token[1],)), digits, digits, AllowedSet(1, (token[2],))]
    assert not of.sampled[0, :2].any() and of.sampled[0, 2:5].all()
    assert allowed_sets(engine.tables, of.control_state[(P - 1) * G], N) == [None] * C

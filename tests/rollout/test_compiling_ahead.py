"""The engine's programs, compiled in a thread while a call samples already."""

import threading

import numpy as np
import pytest
from setups import layouts, make_prompts
from test_engine import FORMS, KEY, ONE_LAYER, VOCAB, C, G, P, policy_of, same

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.programs import Programs


def new(form: str) -> Engine:
    """An engine that has compiled nothing."""
    cfg = RolloutConfig(prompts=P, samples=G, max_new_tokens=C, temperature=3.0, engine=FORMS[form])
    return Engine(EngineModel(ONE_LAYER, layouts()[1], VOCAB), cfg, 7)


@pytest.fixture
def compiled(monkeypatch):
    """Names and threads of the programs that were compiled. The thread of `compile_ahead` waits before its second one for `go`."""
    found, go, whole = [], threading.Event(), Programs._compile

    def compile_one(self, params, name):
        ahead = threading.current_thread() is not threading.main_thread()
        if ahead and found:
            assert go.wait(60), "the test never lets the thread continue"
        found.append((name, ahead))
        return whole(self, params, name)

    monkeypatch.setattr(Programs, "_compile", compile_one)
    yield found, go
    go.set()


def test_what_a_full_batch_needs_is_compiled_once_and_ahead(compiled):
    found, go = compiled
    go.set()
    growing, policy = new("growth"), policy_of()
    growing.compile_ahead(policy, P)
    got = growing.generate(policy, make_prompts(P), KEY)
    same(got, new("growth").generate(policy, make_prompts(P), KEY))
    names = growing.names(P)
    assert found[: len(names)] == [(name, True) for name in names]
    assert [name[0] for name in names] == [
        "prefill", "empty_suffix", "decode_chunk", "extend_suffix", "decode_chunk", "extend_suffix", "decode_chunk",
    ]  # fmt: skip
    growing.compile_ahead(policy, P)
    growing.generate(policy, make_prompts(P), KEY)
    assert len(found) == 2 * len(names), "the other engine's, and none twice"


def test_a_call_compiles_what_it_needs_before_its_turn(compiled):
    found, _ = compiled
    growing, policy = new("growth"), policy_of()
    growing.compile_ahead(policy, P)
    growing.programs(policy.params, *growing.names(P)[0])
    growing.programs(policy.params, *growing.names(P)[-1])
    assert found == [(growing.names(P)[0], True), (growing.names(P)[-1], False)]


def test_a_closed_engine_compiles_no_more_ahead_and_samples_still(compiled):
    found, go = compiled
    growing, policy = new("growth"), policy_of()
    growing.compile_ahead(policy, P)
    growing.programs(policy.params, *growing.names(P)[0])
    growing.close()
    go.set()
    rollouts = growing.generate(policy, make_prompts(P), KEY)
    # The second one may have been begun.
    assert [ahead for _, ahead in found].count(True) <= 2 and np.all(rollouts.length > 0)


def test_on_cpus_only_what_a_full_batch_needs_is_compiled_ahead(compiled):
    found, go = compiled
    go.set()
    compacting, policy = new("compaction"), policy_of()
    compacting.compile_ahead(policy, P)
    full = compacting.names(P, compacted=False)
    for name in full:
        compacting.programs(policy.params, *name)
    assert [name for name, _ in found] == full and len(full) < len(compacting.names(P))
    counter = CompileCounter()
    compacting.warm(policy, P)
    assert counter.take()["compiles"] == len(compacting.names(P)) - len(full)


def test_an_engine_with_open_prompts_wants_their_length_first():
    cfg = RolloutConfig(prompts=P, samples=G, max_new_tokens=C)
    with pytest.raises(UserError, match="prompt_slots: got none for engine or session"):
        Engine(EngineModel(ONE_LAYER, layouts()[1], VOCAB), cfg).compile_ahead(policy_of(), P)


def test_other_sizes_leave_nothing_behind(compiled):
    """An engine that is fitted to longer prompts stops what it compiled for shorter ones."""
    found, go = compiled
    growing, policy = new("growth"), policy_of()
    growing.compile_ahead(policy, P)
    growing.programs(policy.params, *growing.names(P)[0])
    assert growing.is_compiling
    before = growing.programs
    growing._fit(14)
    go.set()
    assert not before.is_compiling and not growing.is_compiling
    assert sum(ahead for _, ahead in found) <= 2

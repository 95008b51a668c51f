"""`generate`: G samples for each prompt, in one compiled program on the mesh.

Prompts are read once each; then a `while_loop` on the device decodes one token a row and step against static caches until
every row has ended. What was drawn, its log-probability under the distribution it was drawn from, that distribution's
entropy and the policy's version are written down as they happen.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.transformer import PromptCache, SuffixCache, decode, prefill
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.sample import Controls, Vocabulary, distribution, draw_from, row_keys
from jaxrl_llm.types import Finish, Policy, Prompts, Rollouts


class DecodeState(flax.struct.PyTreeNode):
    """What the loop carries."""

    slot: Int[Array, ""]
    """Completion slot that the next draw fills."""
    last: Int[Array, " B"]
    """The token that the next step reads."""
    done: Bool[Array, " B"]
    live: Bool[Array, ""]
    """Some row has not ended."""
    cache: SuffixCache
    tokens: Int[Array, "B C"]
    sampled: Bool[Array, "B C"]
    logprobs: Float[Array, "B C"]
    entropy: Float[Array, "B C"]


Generate = Callable[[Policy, Prompts, Key[Array, ""], Float[Array, " P"]], Rollouts]


def start(prompts: Prompts, rows: int, slots: int, vocab: Vocabulary, cfg: ModelConfig, layout: Layout) -> DecodeState:
    """The state before the first draw: each row is about to read its prompt's last token."""
    last = jnp.take_along_axis(prompts.tokens, prompts.length[:, None] - 1, axis=1)[:, 0]
    full = lambda value, dtype: layout.constrain(jnp.full((rows, slots), value, dtype), "rows", None)  # noqa: E731
    return DecodeState(
        slot=jnp.zeros((), jnp.int32),
        last=jnp.repeat(last, rows // prompts.length.shape[0]),
        done=jnp.zeros((rows,), bool),
        live=jnp.ones((), bool),
        cache=SuffixCache.empty(cfg, rows, slots, layout),
        tokens=full(vocab.pad, jnp.int32),
        sampled=full(False, bool),
        logprobs=full(0.0, jnp.float32),
        entropy=full(0.0, jnp.float32),
    )


def step(
    params: Policy,
    keys: Key[Array, " B"],
    temperature: Float[Array, " B"],
    prompt: PromptCache,
    state: DecodeState,
    vocab: Vocabulary,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[DecodeState, Float[Array, "B V"]]:
    """One token for every row. Also returns the log-probabilities it was drawn from.

    A row that has ended goes on computing, and nothing of it is written.
    """
    raw, cache = decode(params, state.last, state.slot, prompt, state.cache, cfg, layout)
    with jax.named_scope("draw"):
        slot = jnp.broadcast_to(state.slot, temperature.shape)
        ones = jnp.ones_like(temperature)
        controls = Controls(temperature, top_p=ones, top_k=0 * slot, min_p=0 * ones, min_new_tokens=0 * slot)
        of = distribution(slot, raw, controls, state.live, vocab, support=0)
        token, logprob, entropy, *_ = draw_from(keys, slot, of, raw_logprobs=False)
    live = ~state.done
    done = state.done | vocab.ends(token)

    def write(column: Array, value: Array, fill: float) -> Array:
        return jax.lax.dynamic_update_slice(
            column, jnp.where(live, value, fill)[:, None].astype(column.dtype), (0, state.slot)
        )

    return DecodeState(
        slot=state.slot + 1,
        last=jnp.where(live, token, vocab.pad),
        done=done,
        live=~jnp.all(done),
        cache=cache,
        tokens=write(state.tokens, token, vocab.pad),
        sampled=write(state.sampled, live, False),
        logprobs=write(state.logprobs, logprob, 0.0),
        entropy=write(state.entropy, entropy, 0.0),
    ), of.logp


def finished(prompts: Prompts, state: DecodeState, temperature: Array, version: Array, vocab: Vocabulary) -> Rollouts:
    """What the loop wrote, as a value."""
    length = jnp.sum(state.sampled, axis=1, dtype=jnp.int32)
    ended = jnp.any(state.sampled & vocab.ends(state.tokens), axis=1)
    return Rollouts(
        prompts=prompts,
        tokens=state.tokens,
        length=length,
        sampled=state.sampled,
        behavior_logprobs=state.logprobs,
        entropy=state.entropy,
        temperature=temperature,
        version=jnp.where(state.sampled, version, 0),
        finish=jnp.where(ended, int(Finish.EOS), int(Finish.LENGTH)).astype(jnp.int32),
    )


def make_generate(samples: int, max_new_tokens: int, vocab: Vocabulary, cfg: ModelConfig, layout: Layout) -> Generate:
    """The program `generate(policy, prompts, key, temperature [P]) -> Rollouts`, rows split over the mesh, compiled once.

    A row's tokens depend on the weights, its prompt, `key`, its uid and its sample number, and on nothing else.
    """

    def generate(policy: Policy, prompts: Prompts, key: Key[Array, ""], temperature: Float[Array, " P"]) -> Rollouts:
        rows = prompts.length.shape[0] * samples
        keys = row_keys(key, prompts.uid, samples)
        row_temperature = jnp.repeat(temperature, samples)
        with jax.named_scope("prefill"):
            prompt = prefill(policy.params, prompts.tokens, prompts.length, cfg, layout)
        state = jax.lax.while_loop(
            lambda s: (s.slot < max_new_tokens) & s.live,
            lambda s: step(policy.params, keys, row_temperature, prompt, s, vocab, cfg, layout)[0],
            start(prompts, rows, max_new_tokens, vocab, cfg, layout),
        )
        return finished(prompts, state, row_temperature, policy.version, vocab)

    return jax.jit(generate, out_shardings=layout.sharding(("rows",)))

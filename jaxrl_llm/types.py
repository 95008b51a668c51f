"""The values that travel between the rooms, complete at birth and never changed afterwards.

Letters of the dimensions, the same everywhere:

    P prompts            G samples per prompt      B = P * G rows, prompt-major: row b belongs to prompt b // G
    S prompt slots       C completion slots        R rows and T slots of a training batch
    V vocabulary         L layers                  D model                   n graders
    N query heads        K key/value heads; of a support, its tokens        H head dim

An array `[B C]` or `[R T]` speaks about the token in that very slot: `logprobs[b, c] = log p(tokens[b, c] | all before it)`.
Log-probabilities are in nats, f32. A mask is True where its name holds.

Carriers are not checked when they are made (`jax.tree.map` rebuilds them around things that are no arrays);
`check(value)` checks dtypes and shapes at a stage's border.
"""

import enum
from typing import Any, TypeVar, get_args

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, jaxtyped

PyTree = Any
Carrier = TypeVar("Carrier")
ArrayLike = Array | np.ndarray


class Finish(enum.IntEnum):
    """Why a row ended."""

    EOS = 0
    """The policy drew the end token."""
    LENGTH = 1
    """All C completion slots were used without an end token."""
    CONTROL = 2
    """A control ended the row."""


class Prompts(flax.struct.PyTreeNode):
    """What a step samples from. Right-padded: slots `length[p]` and beyond hold the pad token."""

    tokens: Int[ArrayLike, "P S"]
    length: Int[ArrayLike, " P"]
    """Number of prompt tokens, at least 1."""
    uid: Int[ArrayLike, " P"]
    """Identity for randomness: the place in the endless stream of prompts, so each visit of a row has its own."""
    row: Int[ArrayLike, " P"]
    """Index into the task's rows: joins to the answer on the host."""


class Rollouts(flax.struct.PyTreeNode):
    """What `generate` produced from prompts, G samples each."""

    prompts: Prompts
    tokens: Int[ArrayLike, "B C"]
    """Completion tokens; the pad token from slot `length[b]` on."""
    length: Int[ArrayLike, " B"]
    """Number of completion tokens, the end token included."""
    sampled: Bool[ArrayLike, "B C"]
    """The policy drew this token: not forced, not padding. The end token is inside."""
    behavior_logprobs: Float[ArrayLike, "B C"]
    """Under exactly the distribution the token was drawn from; 0.0 where not sampled. Captured once, never rewritten."""
    entropy: Float[ArrayLike, "B C"]
    """Of the distribution the token was drawn from, nats; 0.0 where not sampled."""
    temperature: Float[ArrayLike, " B"]
    """What the logits were divided by: a part of the distribution, so the scorer needs it too."""
    version: Int[ArrayLike, "B C"]
    """Optimizer steps behind the policy that drew each token."""
    finish: Int[ArrayLike, " B"]
    """A `Finish` each."""
    support: Int[ArrayLike, "B C K"] | None = None
    """Tokens that a truncated draw chose among, the likeliest first, -1 where they are fewer; all -1 where not sampled."""
    raw_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the distribution before truncation; 0.0 where not sampled. For the eye alone: no loss reads it."""
    barred: Bool[ArrayLike, "B C"] | None = None
    """No end token could be drawn in this slot; False where not sampled."""


class Experience(flax.struct.PyTreeNode):
    """Rollouts with what they earned."""

    rollouts: Rollouts
    reward: Float[ArrayLike, " B"]
    """NaN where a group was not graded."""
    parts: Float[ArrayLike, "B n"]
    """What each of n graders gave, before weights."""


class Batch(flax.struct.PyTreeNode):
    """What one update consumes; the same shape all run long. A row holds one sequence, several (packing), or trees: one prompt and
    behind it all that was sampled for it, depth first, so the prompt is there once."""

    tokens: Int[ArrayLike, "R T"]
    position: Int[ArrayLike, "R T"]
    """Place of the token in its own sequence, from 0."""
    until: Int[ArrayLike, "R T"]
    """Slot t is seen by slots t to until[t] - 1, and by no other: to the end of its sequence, or of its tree where the sequences of
    a tree share it. t itself at padding, which nobody sees."""
    before: Int[ArrayLike, "R T"]
    """Slot of the token before this one in its sequence; the slot itself at a sequence's first."""
    segment: Int[ArrayLike, "R T"]
    """Which sequence of its row a token belongs to: 1, 2, ...; 0 where it belongs to several, or is padding."""
    group: Int[ArrayLike, "R T"]
    """Which group (one prompt's samples) of its row a token belongs to: 1, 2, ...; 0 is padding."""
    loss_mask: Bool[ArrayLike, "R T"]
    """The token takes part in the loss: sampled by the policy, and its group was kept."""
    weight: Float[ArrayLike, "R T"]
    """Of the token's term in the loss: what makes sums means, by counts over the whole minibatch. 0 outside the loss mask."""
    behavior_logprobs: Float[ArrayLike, "R T"]
    advantage: Float[ArrayLike, "R T"]
    temperature: Float[ArrayLike, "R T"]
    reference_logprobs: Float[ArrayLike, "R T"] | None = None
    """Under the reference policy; only where the objective has a KL term that reads them."""
    proximal_logprobs: Float[ArrayLike, "R T"] | None = None
    """Under the trainer's parameters before the first update on this batch; only where the objective is anchored there."""
    values: Float[ArrayLike, "R T"] | None = None
    """The critic's, of the tokens before this one, before the first update on this batch."""
    returns: Float[ArrayLike, "R T"] | None = None
    """What the critic is to predict there."""
    support: Int[ArrayLike, "R T K"] | None = None
    """As in `Rollouts`: what the scorer's distribution is over. All -1 outside completions."""
    barred: Bool[ArrayLike, "R T"] | None = None
    """As in `Rollouts`: end tokens have no mass in these slots."""


class TrainState(flax.struct.PyTreeNode):
    """The trainer's own: f32 master parameters and optimizer state, TRAIN layout. Donated to each update."""

    params: PyTree
    opt_state: PyTree
    step: Int[ArrayLike, ""]
    """Updates of the optimizer so far: the policy's version."""


class Policy(flax.struct.PyTreeNode):
    """What `generate` reads: compute-dtype parameters in the DECODE layout, one entry a layer."""

    params: PyTree
    version: Int[ArrayLike, ""]


def check(value: Carrier) -> Carrier:
    """Return `value` if every field has the annotated dtype kind and shape, with each letter bound to one size.

    Raises ValueError that names the first field that does not fit, what came and what was wanted.
    """
    with jaxtyped("context"):
        _check_fields(value)
    return value


def _check_fields(value: Any) -> None:
    for name, field in type(value).__dataclass_fields__.items():
        got = getattr(value, name)
        if hasattr(type(got), "__dataclass_fields__"):
            _check_fields(got)
        elif field.type is not PyTree and not any(isinstance(got, kind) for kind in get_args(field.type)):
            described = f"{got.dtype}{list(got.shape)}" if isinstance(got, jax.Array | np.ndarray) else repr(got)
            raise ValueError(f"{type(value).__name__}.{name}: got {described}, want {get_args(field.type)[0]}")

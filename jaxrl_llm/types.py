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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

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
    STOP = 2
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
    kept_tokens: Int[ArrayLike, "B C K"] | None = None
    """Tokens that a truncated draw chose among, the likeliest first, -1 where they are fewer; all -1 where not sampled."""
    raw_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the distribution before truncation; 0.0 where not sampled. For the eye alone: no loss reads it."""
    eos_masked: Bool[ArrayLike, "B C"] | None = None
    """No end token could be drawn in this slot; False where not sampled."""


class Groups(flax.struct.PyTreeNode):
    """Rollouts with their grades: the G rows of a prompt are a group."""

    rollouts: Rollouts
    reward: Float[ArrayLike, " B"]
    """Weighted sum of the components; NaN where the group was not graded."""
    components: Float[ArrayLike, "B n"]
    """What each of the n graders gave, before its weight."""
    failure: Int[ArrayLike, " P"]
    """Why the group was not graded: a `Failure` of the graders' workers; 0 where it was."""
    failed_by: Int[ArrayLike, " P"]
    """Index of the grader that failed; -1 where none did."""
    vote: Int[ArrayLike, " B"]
    """A number for each final answer, equal for equal answers; 0 where there is none."""
    keep: Bool[ArrayLike, " B"]
    """The row may teach. Filters only lower it: no row leaves its group."""

    @property
    def kept(self) -> Bool[np.ndarray, " P"]:
        """A row of the group may teach."""
        return self.keep.reshape(len(self.failure), -1).any(axis=1)

    @property
    def teaching(self) -> Bool[np.ndarray, "B C"]:
        """Tokens that may teach: those that the policy drew, in rows that are kept. The prompt never, the end token always."""
        return self.rollouts.sampled & self.keep[:, None]


class Scores(flax.struct.PyTreeNode):
    """Log-probs and values of the completions under other parameters, each there where the objective reads it."""

    reference_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the reference policy."""
    proximal_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the trainer's parameters before the first update on these groups."""
    values: Float[ArrayLike, "B C"] | None = None
    """The critic's, of the tokens before this one, before the first update on these groups."""
    own: dict[str, ArrayLike] = flax.struct.field(default_factory=dict)
    """Columns that a loss brought along: `OwnColumn`."""


class Credit(flax.struct.PyTreeNode):
    """What each token was worth."""

    advantage: Float[ArrayLike, "B C"]
    """0 outside the tokens that teach."""
    returns: Float[ArrayLike, "B C"] | None = None
    """What a critic is to predict."""
    keep: Bool[ArrayLike, " B"] | None = None
    """Of the rows that groups keep, those that take part in the loss; None: all."""


class Experience(NamedTuple):
    """All that updates are made from."""

    groups: Groups
    scores: Scores
    credit: Credit

    @property
    def loss_mask(self) -> Bool[np.ndarray, "B C"]:
        """Tokens to learn from."""
        teaching, keep = self.groups.teaching, self.credit.keep
        return teaching if keep is None else teaching & keep[:, None]


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
    kept_tokens: Int[ArrayLike, "R T K"] | None = None
    """As in `Rollouts`: what the scorer's distribution is over. All -1 outside completions."""
    eos_masked: Bool[ArrayLike, "R T"] | None = None
    """As in `Rollouts`: end tokens have no mass in these slots."""
    own: dict[str, ArrayLike] = flax.struct.field(default_factory=dict)
    """As in `Scores`, `[R T]`."""


class Column(NamedTuple):
    """What is known of one number per token before any array of it exists."""

    name: str
    """Of the field that holds it."""
    dtype: type
    fill: float = 0
    """Where no completion token stands."""
    dims: tuple[str, ...] = ()
    """Letters of the dimensions behind [B C] or [R T]."""
    rollouts: bool = False
    """A field of `Rollouts`."""
    batch: bool = False
    """A field of `Batch`."""
    when: str = ""
    """What a run must use for the column to be there; "": it always is."""


COLUMNS = (
    Column("tokens", np.int32, rollouts=True, batch=True),
    Column("sampled", np.bool_, rollouts=True),
    Column("behavior_logprobs", np.float32, rollouts=True, batch=True),
    Column("entropy", np.float32, rollouts=True),
    Column("version", np.int32, rollouts=True),
    Column("kept_tokens", np.int32, fill=-1, dims=("K",), rollouts=True, batch=True, when="truncation"),
    Column("raw_logprobs", np.float32, rollouts=True, when="raw_logprobs"),
    Column("eos_masked", np.bool_, rollouts=True, batch=True, when="min_new_tokens"),
    Column("position", np.int32, batch=True),
    Column("until", np.int32, batch=True),
    Column("before", np.int32, batch=True),
    Column("segment", np.int32, batch=True),
    Column("group", np.int32, batch=True),
    Column("loss_mask", np.bool_, batch=True),
    Column("weight", np.float32, batch=True),
    Column("temperature", np.float32, fill=1, batch=True),
    Column("advantage", np.float32, batch=True),
    Column("reference_logprobs", np.float32, batch=True, when="reference"),
    Column("proximal_logprobs", np.float32, batch=True, when="proximal"),
    Column("values", np.float32, batch=True, when="critic"),
    Column("returns", np.float32, batch=True, when="critic"),
)
"""The one table of per-token columns. Output buffers, replay, batches, checkpoints and `plan` are maps over it: a new column is a
line here, and a field of the values that hold it. The fill of `tokens` is the pad token, which the tokenizer names."""


class OwnColumn(NamedTuple):
    """A column that a loss brings along, as `Batch.own[name]`."""

    name: str
    make: Callable[[Groups, Scores], ArrayLike]
    """Its numbers `[B C]`, from groups and scores."""
    dtype: type = np.float32
    fill: float = 0


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
        elif field.type not in (PyTree, dict[str, ArrayLike]) and not any(
            isinstance(got, kind) for kind in get_args(field.type)
        ):
            described = f"{got.dtype}{list(got.shape)}" if isinstance(got, jax.Array | np.ndarray) else repr(got)
            raise ValueError(f"{type(value).__name__}.{name}: got {described}, want {get_args(field.type)[0]}")

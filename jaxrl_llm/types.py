"""The values passed between stages: immutable, and complete when they are created.

Dimensions, the same everywhere:

    P prompts            G samples per prompt      B rows: the samples of all prompts, those of a prompt in a row
    S prompt slots       C completion slots        R rows and T slots of a training batch
    V vocabulary         L layers                  D model                   n graders
    N query heads        K key/value heads; in `kept_tokens`, their number per slot        H head dim

An array `[B C]` or `[R T]` describes the token in the same slot: `logprobs[b, c] = log p(tokens[b, c] | all tokens before it)`.
Log-probabilities are in nats, f32. A mask is True where its name holds.

A value that is created is not checked, since `jax.tree.map` rebuilds it with any leaves; `check(value)` checks dtypes and shapes.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, jaxtyped

from jaxrl_llm.errors import UserError

PyTree = Any
Value = TypeVar("Value")
ArrayLike = Array | np.ndarray


class Finish(enum.IntEnum):
    """Why a row ended."""

    EOS = 0
    """The policy sampled an end-of-sequence token."""
    LENGTH = 1
    """All C completion slots were used without an end-of-sequence token."""
    STOP = 2
    """A stop string ended the row."""
    UNFINISHED = 3
    """The row has not ended: it was stopped by the caller, and may be resumed."""


class Prompts(flax.struct.PyTreeNode):
    """Prompts of one step. Right-padded: slots `length[p]` and beyond hold the pad token."""

    tokens: Int[ArrayLike, "P S"]
    length: Int[ArrayLike, " P"]
    """Number of prompt tokens, at least 1."""
    uid: Int[ArrayLike, " P"]
    """Seed of the prompt's sampling noise: its index in the endless stream of prompts, unless a visit repeats an earlier one's."""
    row: Int[ArrayLike, " P"]
    """Index into the task's rows, to join with the answer on the host."""


class Rollouts(flax.struct.PyTreeNode):
    """Completions of prompts. A prompt may have any number of rows, also none; often it is G for all of them."""

    prompts: Prompts
    prompt: Int[ArrayLike, " B"]
    """Index of each row's prompt, ascending. -1 in filler rows: they are the last, without a token, and belong to nobody."""
    sample: Int[ArrayLike, " B"]
    """Number of the row among its prompt's samples, which names its sampling noise; -1 in filler rows."""
    tokens: Int[ArrayLike, "B C"]
    """Completion tokens; the pad token from slot `length[b]` on."""
    length: Int[ArrayLike, " B"]
    """Number of completion tokens, end-of-sequence token and forced tokens included."""
    sampled: Bool[ArrayLike, "B C"]
    """True where the policy sampled the token (end-of-sequence included): not forced, not padding."""
    behavior_logprobs: Float[ArrayLike, "B C"]
    """Log-prob under exactly the distribution the token was sampled from; 0.0 where not sampled. Captured once, never rewritten."""
    entropy: Float[ArrayLike, "B C"]
    """Entropy of the distribution the token was sampled from, nats; 0.0 where not sampled."""
    temperature: Float[ArrayLike, " B"]
    """Divisor of the logits: part of the sampling distribution, so scoring needs it too."""
    version: Int[ArrayLike, "B C"]
    """Version (number of optimizer steps) of the policy that sampled each token."""
    finish: Int[ArrayLike, " B"]
    """Why each row ended: a `Finish`."""
    kept_tokens: Int[ArrayLike, "B C K"] | None = None
    """Tokens that top-k, top-p or min-p kept, most probable first, padded with -1; all -1 where not sampled."""
    raw_logprobs: Float[ArrayLike, "B C"] | None = None
    """Log-prob before truncation; 0.0 where not sampled. Diagnostic only; no loss uses it."""
    control_state: Int[ArrayLike, "B C"] | None = None
    """What the row's control allowed in each slot: an entry of `distribution.control_tables`; 0: everything."""
    trunk: Int[ArrayLike, " B"] | None = None
    """Sample number of the row of the same prompt that the row left; its own if it was sampled independently. None: all were."""
    fork: Int[ArrayLike, " B"] | None = None
    """Tokens that the row has in common with its trunk. They are `sampled` in the trunk alone, where their log-probs are."""

    @property
    def size(self) -> Int[np.ndarray, " P"]:
        """Rows per prompt."""
        return np.bincount(self.prompt[self.prompt >= 0], minlength=len(self.prompts.length))

    @property
    def trunk_rows(self) -> Int[np.ndarray, " B"]:
        """Index of each row's trunk, its own if it left none."""
        prompt = self.prompt.tolist()
        row = {name: b for b, name in enumerate(zip(prompt, self.sample.tolist(), strict=True))}
        trunk = self.sample if self.trunk is None else self.trunk
        return np.array([row[name] for name in zip(prompt, trunk.tolist(), strict=True)], int)


def number_rows(size: Int[np.ndarray, " P"], rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return `prompt` and `sample` of rollouts, i32[B]. `size`: rows per prompt; `rows`: B, of which filler rows make up what is
    missing, or None: as many as the prompts have."""
    size = np.asarray(size)
    prompt = np.repeat(np.arange(len(size), dtype=np.int32), size)
    sample = np.arange(len(prompt), dtype=np.int32) - np.repeat(np.cumsum(size) - size, size).astype(np.int32)
    fill = (0, (len(prompt) if rows is None else rows) - len(prompt))
    return np.pad(prompt, fill, constant_values=-1), np.pad(sample, fill, constant_values=-1)


class Groups(flax.struct.PyTreeNode):
    """Rollouts with their rewards: the rows of a prompt are a group."""

    rollouts: Rollouts
    reward: Float[ArrayLike, " B"]
    """Weighted sum of the components; NaN if grading the group failed, and in filler rows."""
    components: Float[ArrayLike, "B n"]
    """Reward of each of the n graders, before weighting; NaN also of graders that do not grade the row's task."""
    failure: Int[ArrayLike, " P"]
    """Why grading the group failed: a `Failure` of the grader workers; 0 if it did not."""
    failed_by: Int[ArrayLike, " P"]
    """Index of the grader that failed; -1 if none did."""
    vote: Int[ArrayLike, " B"]
    """Id of the final answer, equal for equal answers; 0 if there is no answer."""
    keep: Bool[ArrayLike, " B"]
    """True if the row may be trained on. Filters only set it to False; no row is removed from its group."""
    graders: tuple[str, ...] = flax.struct.field(pytree_node=False, default=())
    """Names of the graders, in the order of `components`."""
    threshold: float = flax.struct.field(pytree_node=False, default=1.0)
    """Lowest reward by the first grader of its task of a right response, as the evaluation counts them."""
    reused: Bool[ArrayLike, " B"] | None = None
    """Rows of an earlier step, or of a file; None: there are none."""
    loss_weight: Float[ArrayLike, " B"] | None = None
    """Factor of the row's loss terms; None: 1."""
    step_reward: Float[ArrayLike, "B C"] | None = None
    """Reward at the last token of each step, of graders without at the row's last; NaN elsewhere. None: no grader has steps."""
    hint: Int[ArrayLike, " B"] | None = None
    """Tokens of its prompt's demonstration that each row began with. None: none did."""
    taught: Bool[ArrayLike, "B C"] | None = None
    """Tokens to train on that the policy did not sample: those of hints. None: there are none."""

    def measure(self, by: str) -> Float[np.ndarray, " B"]:
        """Return one number per row, f64, NaN where it could not be graded, or is of a task that the named grader does not grade.

        Args:
            by: success, 1 for a right response and 0 for a wrong one; the name of a grader; or reward, the weighted sum of all.

        Raises:
            UserError: there is no grader of this name.
        """
        if by == "reward":
            return np.asarray(self.reward, np.float64)
        if by == "success":
            first = np.take_along_axis(self.components, np.isnan(self.components).argmin(axis=1)[:, None], axis=1)[:, 0]
            # In the rewards' float32, as the evaluation compares: a reward of 0.7 is no less than 0.7.
            return np.where(np.isnan(first), np.nan, first >= np.float32(self.threshold))
        if by not in self.graders:
            raise UserError(f"by: got {by!r}, want success, reward, or the name of a grader: {', '.join(self.graders)}")
        return np.asarray(self.components[:, self.graders.index(by)], np.float64)

    @property
    def kept(self) -> Bool[np.ndarray, " P"]:
        """True for groups with at least one row to train on."""
        return np.bincount(self.rollouts.prompt[self.keep], minlength=len(self.failure)) > 0

    @property
    def trainable_tokens(self) -> Bool[np.ndarray, "B C"]:
        """Tokens to train on: those the policy sampled, end-of-sequence included, and `taught` ones, in rows that are kept."""
        sampled = self.rollouts.sampled
        return (sampled if self.taught is None else sampled | self.taught) & self.keep[:, None]


# Fields with one entry per prompt. All others of `Groups`, `Scores` and `Credit` have one per row.
PER_PROMPT = {"prompts", "failure", "failed_by"}


class Scores(flax.struct.PyTreeNode):
    """Log-probs and values of the completions under other parameters; each is present if the objective uses it."""

    reference_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the reference policy."""
    proximal_logprobs: Float[ArrayLike, "B C"] | None = None
    """Under the trainer's parameters before the first update on these groups."""
    values: Float[ArrayLike, "B C"] | None = None
    """The critic's value of the tokens before this one, before the first update on these groups."""
    own: dict[str, ArrayLike] = flax.struct.field(default_factory=dict)
    """Additional columns of a loss: `OwnColumn`."""


class Credit(flax.struct.PyTreeNode):
    """Credit assignment: advantages and returns per token."""

    advantage: Float[ArrayLike, "B C"]
    """0 outside the tokens to train on."""
    returns: Float[ArrayLike, "B C"] | None = None
    """Regression target of the critic."""
    keep: Bool[ArrayLike, " B"] | None = None
    """Kept rows that enter the loss; None: all of them."""


class Experience(NamedTuple):
    """Everything an update is computed from."""

    groups: Groups
    scores: Scores
    credit: Credit

    @property
    def loss_mask(self) -> Bool[np.ndarray, "B C"]:
        """Tokens in the loss."""
        trainable_tokens, keep = self.groups.trainable_tokens, self.credit.keep
        return trainable_tokens if keep is None else trainable_tokens & keep[:, None]


class Batch(flax.struct.PyTreeNode):
    """Input of one update; its shape is constant during a run. A row holds one sequence, several (packing), or trees: one prompt
    followed by all its samples, depth first, so that the prompt is stored once."""

    tokens: Int[ArrayLike, "R T"]
    position: Int[ArrayLike, "R T"]
    """Position of the token in its own sequence, from 0."""
    until: Int[ArrayLike, "R T"]
    """Slots t to until[t] - 1, and no others, attend to slot t: until[t] is the end of its sequence, or of its tree if the tree's
    sequences share it. At padding it is t: no slot attends to it."""
    before: Int[ArrayLike, "R T"]
    """Slot of the previous token of the sequence; the slot itself for the first token."""
    segment: Int[ArrayLike, "R T"]
    """Index of the token's sequence in the row: 1, 2, ...; 0 if several sequences share it, and at padding."""
    group: Int[ArrayLike, "R T"]
    """Index of its group (one prompt's samples), likewise."""
    loss_mask: Bool[ArrayLike, "R T"]
    """True for tokens in the loss: sampled by the policy, in a row that was kept."""
    weight: Float[ArrayLike, "R T"]
    """Weight of the token's loss term, normalized over the whole minibatch (sums become means). 0 outside the loss mask."""
    behavior_logprobs: Float[ArrayLike, "R T"]
    advantage: Float[ArrayLike, "R T"]
    temperature: Float[ArrayLike, "R T"]
    reference_logprobs: Float[ArrayLike, "R T"] | None = None
    proximal_logprobs: Float[ArrayLike, "R T"] | None = None
    values: Float[ArrayLike, "R T"] | None = None
    returns: Float[ArrayLike, "R T"] | None = None
    """These four as in `Scores` and `Credit`; each is present if the objective uses it."""
    kept_tokens: Int[ArrayLike, "R T K"] | None = None
    """The support of the scored distribution, as in `Rollouts`. All -1 outside completions."""
    control_state: Int[ArrayLike, "R T"] | None = None
    """As in `Rollouts`: tokens that it does not allow have probability 0."""
    own: dict[str, ArrayLike] = flax.struct.field(default_factory=dict)
    """As in `Scores`, `[R T]`."""


class Column(NamedTuple):
    """Description of a per-token column: one value per token."""

    name: str
    """Name of the field that holds it."""
    dtype: type
    fill: float = 0
    """Value in slots without a completion token."""
    dims: tuple[str, ...] = ()
    """Dimensions after [B C] or [R T]."""
    rollouts: bool = False
    """True if it is a field of `Rollouts`."""
    batch: bool = False
    """True if it is a field of `Batch`."""
    when: str = ""
    """Feature that a run must use for the column to be present; "": always present."""


COLUMNS = (
    Column("tokens", np.int32, rollouts=True, batch=True),
    Column("sampled", np.bool_, rollouts=True),
    Column("behavior_logprobs", np.float32, rollouts=True, batch=True),
    Column("entropy", np.float32, rollouts=True),
    Column("version", np.int32, rollouts=True),
    Column("kept_tokens", np.int32, fill=-1, dims=("K",), rollouts=True, batch=True, when="truncation"),
    Column("raw_logprobs", np.float32, rollouts=True, when="raw_logprobs"),
    Column("control_state", np.int32, rollouts=True, batch=True, when="control"),
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
"""The one table of per-token columns. Output buffers, replay, batches, checkpoints and `plan` are maps over it: a new column is one
line here, and a field of the values that hold it. The fill of `tokens` is the tokenizer's pad token."""

# Values in a filler row, and in its tokens; 0 in all others.
FILLER = {"prompt": -1, "sample": -1, "trunk": -1, **dict.fromkeys(("reward", "components", "step_reward"), np.nan)} | {
    column.name: column.fill for column in COLUMNS if column.rollouts
}


def select_groups(value: Value, index: Int[np.ndarray, " n"], rows: int | None = None) -> Value:
    """Return the groups at `index`, in that order.

    Args:
        value: `Groups` or an `Experience`, NumPy.
        index: of the prompts.
        rows: B of the result, of which filler rows make up what is missing; None: as many rows as the groups have.
    """
    size = (value if isinstance(value, Groups) else value.groups).rollouts.size
    start = np.cumsum(size) - size
    taken = size[index]
    prompt, sample = number_rows(taken, rows)
    own, fillers = np.flatnonzero(prompt >= 0), np.count_nonzero(prompt < 0)
    source = np.repeat(start[index], taken) + sample[own]

    def of_rows(x: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([x[source], np.full((fillers, *x.shape[1:]), fill, x.dtype)]) if fillers else x[source]

    return _renumbered(map_groups(value, lambda x: x[index], of_rows), prompt)


def map_groups(value: Value, of_prompts: Callable, of_rows: Callable) -> Value:
    """Return `Groups` or an `Experience` with `of_prompts(array)` for arrays per prompt, `of_rows(array, filler)` for others."""

    def apply(path: tuple, x: np.ndarray) -> np.ndarray:
        names = {getattr(key, "name", None) for key in path}
        return of_prompts(x) if names & PER_PROMPT else of_rows(x, next((FILLER[n] for n in names if n in FILLER), 0))

    return jax.tree_util.tree_map_with_path(apply, value)


def join_groups(*parts: Groups) -> Groups:
    """Return the groups of all parts, NumPy, without filler rows."""
    first = np.cumsum([0, *(len(part.failure) for part in parts)])
    whole = [select_groups(part, np.arange(len(part.failure))) for part in parts]
    prompt = np.concatenate([part.rollouts.prompt + first[i] for i, part in enumerate(whole)])
    return _renumbered(jax.tree.map(lambda *x: np.concatenate(x), *whole), prompt.astype(np.int32))


def _renumbered(value: Value, prompt: Int[np.ndarray, " B"]) -> Value:
    """Return the value with another `Rollouts.prompt`."""
    if not isinstance(value, Groups):
        return value._replace(groups=_renumbered(value.groups, prompt))
    return value.replace(rollouts=value.rollouts.replace(prompt=prompt))


class OwnColumn(NamedTuple):
    """An additional column of a loss, passed as `Batch.own[name]`."""

    name: str
    make: Callable[[Groups, Scores], ArrayLike]
    """Computes the column `[B C]` from groups and scores."""
    dtype: type = np.float32
    fill: float = 0


class TrainState(flax.struct.PyTreeNode):
    """State of the trainer: f32 master parameters and optimizer state, TRAIN layout. Donated to each update."""

    params: PyTree
    opt_state: PyTree
    step: Int[ArrayLike, ""]
    """Number of optimizer steps so far: the version of the policy."""


class Policy(flax.struct.PyTreeNode):
    """Parameters for sampling, in the compute dtype and the DECODE layout, one entry per layer."""

    params: PyTree
    version: Int[ArrayLike, ""]


def check(value: Value) -> Value:
    """Return `value` if every field has the annotated dtype kind and shape, with one size per dimension name.

    Raises:
        ValueError: names the first field that does not match, with what it is and what was expected.
    """
    with jaxtyped("context"):
        _check_fields(value)
    return value


def _check_fields(value: Any) -> None:
    for name, field in type(value).__dataclass_fields__.items():
        got = getattr(value, name)
        if not field.metadata.get("pytree_node", True):
            continue
        if hasattr(type(got), "__dataclass_fields__"):
            _check_fields(got)
        elif field.type not in (PyTree, dict[str, ArrayLike]) and not any(
            isinstance(got, kind) for kind in get_args(field.type)
        ):
            described = f"{got.dtype}{list(got.shape)}" if isinstance(got, jax.Array | np.ndarray) else repr(got)
            raise ValueError(f"{type(value).__name__}.{name}: got {described}, want {get_args(field.type)[0]}")

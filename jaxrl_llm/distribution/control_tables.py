"""Controls as arrays: which tokens may be sampled next, for drawing and for scoring alike.

All automata of a run are joined in one set of tables; a row's state says which automaton it is in, so rows under different controls
decode side by side. Arrays are arguments: another grammar of the same size compiles nothing.

A sampled token's entry of `control_state` is all that its mask depends on: the state; the tokens that the row has room for, with
which it must reach an end; and whether end tokens are masked, below the minimum length. State 0 is free: everything is allowed.
"""

from collections.abc import Sequence
from types import ModuleType

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxrl_llm.control.automaton import MAX_DISTANCE, REFUSED, TokenAutomaton
from jaxrl_llm.distribution.allowed_tokens import WORD, AllowedTokens
from jaxrl_llm.errors import UserError
from jaxrl_llm.types import ArrayLike

STATE_BITS, ROOM_BITS = 19, 11
MOST_STATES, MOST_ROOM = 2**STATE_BITS, 2**ROOM_BITS - 1
assert MOST_ROOM > MAX_DISTANCE + 1
ENOUGH = np.iinfo(np.int32).max


class ControlTables(flax.struct.PyTreeNode):
    """Joined automata. A automata, S states, K classes (a multiple of 32), V entries of the model's vocabulary."""

    classes: Int[ArrayLike, "A V"]
    """Class of each token in each automaton; uint8 or uint16."""
    next: Int[ArrayLike, "S K"]
    """State behind a token of the class; REFUSED where it is not allowed."""
    distance: Int[ArrayLike, " S"]
    """As in `TokenAutomaton`, and the following four too."""
    expires: Int[ArrayLike, " S"]
    forced: Int[ArrayLike, " S"]
    replaces: Bool[ArrayLike, " S"]
    ends: Bool[ArrayLike, " S"]
    automaton: Int[ArrayLike, " S"]
    """Automaton of each state."""
    end_classes: Bool[ArrayLike, "A K"]
    """Classes of end tokens."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """A, S and K, for which programs are compiled."""
        return (len(self.classes), *self.next.shape)

    def after(self, state: Int[ArrayLike, "*rows"], token: Int[ArrayLike, "*rows"]) -> Int[ArrayLike, "*rows"]:
        """Return the state behind a token; REFUSED if it is not allowed."""
        return self.next[state, self.classes[self.automaton[state], token]]


def blank_tables(sizes: tuple[int, int, int], vocab_size: int) -> ControlTables:
    """Return tables of these sizes in which nothing is allowed, NumPy."""
    automata, states, classes = sizes
    zeros = np.zeros(states, np.int32)
    return ControlTables(
        classes=np.zeros((automata, vocab_size), np.uint8 if classes <= 256 else np.uint16),
        next=np.full((states, classes), REFUSED, np.int32),
        distance=zeros,
        expires=np.arange(states, dtype=np.int32),
        forced=np.full(states, -1, np.int32),
        replaces=np.zeros(states, bool),
        ends=np.zeros(states, bool),
        automaton=zeros.copy(),
        end_classes=np.zeros((automata, classes), bool),
    )


def join_automata(
    automata: Sequence[TokenAutomaton], num_tokens: int, ends: tuple[int, ...], vocab_size: int
) -> tuple[ControlTables, list[int]]:
    """Return tables of the free state and of these automata, NumPy, and the start state of each of these.

    Sizes are rounded up, so that other grammars of about the same size fit the same programs.

    Args:
        automata: over the tokenizer's vocabulary.
        num_tokens: tokens of the tokenizer; larger ids are padding of the vocabulary, and never allowed.
        ends: end tokens.
        vocab_size: V.

    Raises:
        UserError: together they have too many states.
    """
    maps = [a.classes for a in automata] or [np.isin(np.arange(num_tokens), ends).astype(np.int32)]
    first = np.cumsum([1, *(len(a.next) for a in automata)])
    if first[-1] > MOST_STATES:
        raise UserError(f"control: got {first[-1]} states in all automata together, want at most {MOST_STATES}")
    # One class more than any automaton has: of ids that are no tokens.
    sizes = len(maps), _rounded(int(first[-1]), 8), _rounded(2 + max(int(of.max()) for of in maps), WORD)
    tables = blank_tables(sizes, vocab_size)
    tables.classes[:] = sizes[2] - 1
    for i, of in enumerate(maps):
        tables.classes[i, :num_tokens] = of
        tables.end_classes[i, of[[end for end in ends if 0 <= end < num_tokens]]] = True
    # The free state shares the first automaton's classes: with one automaton, no row needs a map of its own.
    tables.next[0, :-1] = 0
    for i, a in enumerate(automata):
        own = slice(first[i], first[i + 1])
        tables.next[own, : a.next.shape[1]] = np.where(a.next == REFUSED, REFUSED, a.next + first[i])
        tables.distance[own], tables.expires[own], tables.forced[own] = a.distance, a.expires + first[i], a.forced
        tables.replaces[own], tables.ends[own], tables.automaton[own] = a.replaces, a.ends, i
    return tables, [int(first[i]) + a.start for i, a in enumerate(automata)]


def _rounded(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple of `multiple`, and of an eighth of the next power of two."""
    step = max(multiple, (1 << (n - 1).bit_length()) // 8)
    return -(-n // step) * step


def encode(
    state: Int[ArrayLike, "*rows"], room: Int[ArrayLike, "*rows"], ends_masked: Bool[ArrayLike, "*rows"]
) -> Int[ArrayLike, "*rows"]:
    """Return entries of `control_state`, int32; 0: everything is allowed.

    Args:
        state: of the tables.
        room: tokens that the row may still have, this one included.
        ends_masked: end tokens are not allowed, unless nothing else is.
    """
    missing = (MOST_ROOM - room) * (room < MOST_ROOM)
    return state + (missing << STATE_BITS) + (ends_masked.astype(np.int32) << (STATE_BITS + ROOM_BITS))


def state_of(code: Int[ArrayLike, "*rows"]) -> Int[ArrayLike, "*rows"]:
    """Return the state of entries of `control_state`."""
    return code & (MOST_STATES - 1)


def allowed_classes(tables: ControlTables, code: Int[ArrayLike, "*rows"], xp: ModuleType) -> Bool[ArrayLike, "*rows K"]:
    """Return the allowed classes under entries of `control_state`.

    A class is allowed if a state follows from which the row can still reach an end within its room. If end tokens are masked and
    nothing else is allowed, they are allowed.

    Args:
        tables: in which the entries are read.
        code: the entries.
        xp: `numpy` or `jax.numpy`.
    """
    state = state_of(code)
    missing = (code >> STATE_BITS) & MOST_ROOM
    room = xp.where(missing == 0, ENOUGH, MOST_ROOM - missing)[..., None]
    following, automaton = tables.next[state], tables.automaton[state]
    fits = (following != REFUSED) & (tables.distance[xp.maximum(following, 0)] < room)
    ends_masked = (code >> (STATE_BITS + ROOM_BITS) == 1)[..., None]
    others = fits & ~tables.end_classes[automaton]
    return xp.where(ends_masked & xp.any(others, axis=-1, keepdims=True), others, fits)


def allowed_tokens(tables: ControlTables, code: Int[Array, "*rows"]) -> AllowedTokens:
    """Return the tokens of the allowed classes under entries of `control_state`."""
    fits = allowed_classes(tables, code, jnp)
    bits = fits.reshape(*fits.shape[:-1], -1, WORD).astype(jnp.uint32) << jnp.arange(WORD, dtype=jnp.uint32)
    words = jnp.sum(bits, axis=-1, dtype=jnp.uint32)
    automaton = tables.automaton[state_of(code)] if len(tables.classes) > 1 else None
    return AllowedTokens(words, automaton, tables.classes)

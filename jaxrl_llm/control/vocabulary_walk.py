"""From an automaton over bytes to one over the tokens of a vocabulary.

The bytes of a token are a map from states to states: its column. All tokens are walked at once, byte by byte, and each pair of
a column and a class of bytes is worked out once. So the time depends on the number of distinct columns rather than on the size of
the vocabulary. Tokens of equal columns are one class of the result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxrl_llm.control.automaton import MAX_DISTANCE, REFUSED, TokenAutomaton, TokenTexts, token_automaton
from jaxrl_llm.control.byte_automaton import DEAD, ByteAutomaton
from jaxrl_llm.control.graph import ENDLESS, distances, distinct, steps_from
from jaxrl_llm.control.minimization import merge_equivalent
from jaxrl_llm.errors import UserError

# Entries of the columns that are worked out at once, and that are kept.
BLOCK, MAX_COLUMNS = 1 << 24, 1 << 28
# Of the result. 32,000 states take 20 seconds, and their tables 64 MB as int16.
MAX_STATES, MAX_CLASSES, MAX_TABLE = 32_000, 4_096, 1 << 25
# What a token does: it adds its text, it has none, it ends the row.
TEXT, NO_TEXT, END, END_WITH_TEXT = range(4)


class Walked(NamedTuple):
    """An automaton over tokens, and where the states of the one over bytes are in it."""

    automaton: TokenAutomaton
    state_of: Int[np.ndarray, " S"]
    """State of `automaton` per state of the byte automaton, int32; -1: removed. Equivalent states have become one."""


def over_tokens(
    automaton: ByteAutomaton, vocabulary: TokenTexts, where: str = "rollout.control", kept: Sequence[int] = ()
) -> Walked:
    """Return the automaton whose rows of tokens spell the texts of `automaton`, each followed by an end token.

    Its last state is the one behind end tokens. States from which no end can be reached are left out, and so are those that no
    token leads to.

    Args:
        automaton: The texts.
        vocabulary: The tokens.
        where: Name of the setting, for errors.
        kept: States that remain although no token leads to them, each apart from all others. Those from which no end can be reached
            are removed all the same.

    Raises:
        UserError: No end can be reached from the start, or only after more than MAX_DISTANCE tokens from some state. Or the result
            is larger than MAX_STATES, MAX_CLASSES or MAX_TABLE.
    """
    states = len(automaton.next)
    if vocabulary.drops_space:
        automaton = _behind_a_space(automaton)
    # Merging takes long, and seldom leaves less than a fifth.
    if states > 5 * MAX_STATES:
        check_size(where, "states", states, MAX_STATES)
    small, merged = merge_equivalent(automaton, kept)
    check_size(where, "states", len(small.next), MAX_STATES)
    column, columns = _walk(small, vocabulary.texts, where)
    kind = _kinds(vocabulary)
    # The dead column, of tokens that are refused everywhere.
    column[kind != TEXT] *= kind[kind != TEXT] == END_WITH_TEXT
    pairs, classes = np.unique(column * 4 + kind, return_inverse=True)
    table = np.stack([_transitions(small, columns[pair // 4], pair % 4) for pair in pairs], axis=1)
    table = np.concatenate([table, np.full((1, len(pairs)), REFUSED)])
    sinks = np.append(small.free, True)
    distance = distances(table, sinks)
    if distance[small.start] == ENDLESS:
        raise UserError(f"{where}: {_why_endless(small, table[:, pairs % 4 == TEXT], vocabulary)}")
    roots = [small.start, *merged[list(kept)]]
    reached = np.flatnonzero((steps_from(table, roots) < ENDLESS) & (distance < ENDLESS))
    # The state behind the end tokens stays the last one.
    reached = np.union1d(reached, [len(table) - 1])
    if (longest := distance[reached].max()) > MAX_DISTANCE:
        raise UserError(
            f"{where}: got texts that end only {longest} tokens after some of their states, want at most {MAX_DISTANCE}: smaller "
            "minimum lengths"
        )
    number = np.full(len(table) + 1, REFUSED, np.int32)
    number[reached] = np.arange(len(reached))
    table, classes = _merge_columns(number[table[reached]], classes, pairs % 4 >= END)
    check_size(where, "classes of tokens", table.shape[1], MAX_CLASSES)
    check_size(where, "entries in its table", table.size, MAX_TABLE)
    result = token_automaton(
        classes, table, distance[reached], int(number[small.start]), np.arange(len(reached)) == len(reached) - 1
    )
    return Walked(result, number[merged[:states]])


def _behind_a_space(automaton: ByteAutomaton) -> ByteAutomaton:
    """Return the automaton of the same texts, and of those with a space before them; its start is a further state."""
    next, accepts, free = (
        np.append(of, of[[automaton.start]], axis=0) for of in (automaton.next, automaton.accepts, automaton.free)
    )
    next[-1, ord(" ")] = automaton.start
    return ByteAutomaton(next, accepts, free, len(automaton.next))


def check_size(where: str, what: str, size: int, most: int) -> None:
    if size > most:
        raise UserError(
            f"{where}: got a grammar of {size:,} {what}, want at most {most:,}: fewer or shorter counted repeats, and classes of "
            "few characters, such as [a-z] in place of \\w"
        )


def _walk(
    automaton: ByteAutomaton, texts: Sequence[bytes | None], where: str
) -> tuple[Int[np.ndarray, " V"], Int[np.ndarray, "D S"]]:
    """Return the column of each token's text, and the columns: the state behind the text per state before it. Column 0 is dead in
    all states, column 1 that of a text without bytes."""
    first, alphabet = distinct(automaton.next.T)
    states, size = len(automaton.next), len(first)
    # The last entry is that of DEAD.
    behind = np.concatenate([automaton.next[:, first], np.full((1, size), DEAD)]).astype(np.int32)
    columns = np.stack([np.full(states, DEAD), np.arange(states)]).astype(np.int32)
    number = {column.tobytes(): i for i, column in enumerate(columns)}
    after = np.stack([np.zeros(size), np.full(size, -1)]).astype(np.int64)

    text = alphabet[np.frombuffer(b"".join(text or b"" for text in texts), np.uint8)]
    length = np.array([len(text or b"") for text in texts], np.int64)
    begin = np.cumsum(length) - length
    column = np.ones(len(texts), np.int64)
    for position in range(length.max(initial=0)):
        tokens = np.flatnonzero((length > position) & (column != 0))
        pair = column[tokens] * size + text[begin[tokens] + position]
        unknown = np.unique(pair[after.ravel()[pair] < 0])
        for some in np.array_split(unknown, -(-len(unknown) * states // BLOCK) or 1):
            fresh = behind[columns[some // size], (some % size)[:, None]]
            after.ravel()[some] = [number.setdefault(row.tobytes(), len(number)) for row in fresh]
            _, new = np.unique(after.ravel()[some], return_index=True)
            new = new[after.ravel()[some[new]] >= len(columns)]
            check_size(where, "entries in its columns", (len(columns) + len(new)) * states, MAX_COLUMNS)
            columns = np.concatenate([columns, fresh[new]])
            after = np.concatenate([after, np.full((len(new), size), -1)])
        column[tokens] = after.ravel()[pair]
    return column, columns


def _kinds(vocabulary: TokenTexts) -> Int[np.ndarray, " V"]:
    kind = np.array([TEXT if text else NO_TEXT for text in vocabulary.texts])
    kind[list(vocabulary.ends)] = [END_WITH_TEXT if vocabulary.texts[id] else END for id in vocabulary.ends]
    return kind


def _transitions(automaton: ByteAutomaton, column: Int[np.ndarray, " S"], kind: int) -> Int[np.ndarray, " S"]:
    """State behind a token of a kind, with a text of this column. The state behind the end tokens is number S."""
    states = np.arange(len(column))
    if kind == TEXT:
        return column
    if kind == NO_TEXT:
        return np.where(automaton.free, states, REFUSED)
    ends = automaton.accepts if kind == END else np.append(automaton.accepts, False)[column]
    return np.where(ends, len(states), REFUSED)


def _merge_columns(
    table: Int[np.ndarray, "S K"], classes: Int[np.ndarray, " V"], ends: Bool[np.ndarray, " K"]
) -> tuple[Int[np.ndarray, "S M"], Int[np.ndarray, " V"]]:
    """Merge classes that have become equal. Those of end tokens stay apart from the others."""
    first, merged = distinct(np.concatenate([ends[None], table]).T.astype(np.int32))
    return table[:, first], merged[classes]


def _why_endless(automaton: ByteAutomaton, table: Int[np.ndarray, "S K"], vocabulary: TokenTexts) -> str:
    """What is wrong, and what to do. `table`: transitions of the tokens that add a text."""
    sinks = automaton.accepts | automaton.free
    if distances(automaton.next, sinks)[automaton.start] == ENDLESS:
        return "got no text at all that is allowed, want at least one"
    if distances(table, np.append(sinks, False))[automaton.start] < ENDLESS:
        ends = " or ".join(repr(vocabulary.texts[id].decode(errors="replace")) for id in vocabulary.ends)
        return f"got texts that do not end with an end token, want texts that end with {ends}: this tokenizer ends texts with it"
    live = distances(automaton.next, sinks) < ENDLESS
    bytes_ = np.flatnonzero((np.append(live, False)[automaton.next] & live[:, None]).any(0))
    missing = sorted(set(bytes_.tolist()) - set(b"".join(text or b"" for text in vocabulary.texts)))
    lacking = f", such as {' '.join(repr(bytes([b]))[1:] for b in missing[:8])}" if missing else ""
    return (
        f"got texts that this tokenizer cannot spell, want characters that it has: no token has some of them{lacking}"
    )

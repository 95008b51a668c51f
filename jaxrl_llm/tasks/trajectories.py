"""Trajectories: sampled responses as rows of a .jsonl or .parquet file, token in, token out.

A row has the columns of `COLUMNS`; those of texts are for people. `tokenizer` names the vocabulary of the ids in every row, so
that files may be cut, shuffled and joined by any tool. A file without ids is one of texts, as other libraries write them: its
responses have no log-probs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import records
from jaxrl_llm.tasks.records import Record, refuse
from jaxrl_llm.tasks.rows import fill_rows, make_rows
from jaxrl_llm.tasks.tokenizer import Tokenizer

COLUMNS: dict[str, str] = {
    "tokenizer": "text", "uid": "int", "sample": "int", "row": "int",
    "prompt": "text", "completion": "text", "answer": "text", "task": "text",
    "form": "text",
    "prompt_ids": "ints", "ids": "ints", "logprobs": "floats", "entropy": "floats", "version": "ints",
    "sampled": "bools", "kept_tokens": "lists of ints", "control_state": "ints", "raw_logprobs": "floats", "step_reward": "floats",
    "temperature": "float", "reward": "float", "components": "floats by name", "success": "bool", "vote": "int", "finish": "text",
    "failure": "text", "failed_by": "int", "hint_tokens": "int",
    "trunk": "int", "fork": "int",
}  # fmt: skip
"""Columns of a file and what they hold. A column that says nothing is left out: `sampled` if all tokens were, `kept_tokens` without
truncation. In JSON `version` is one number if all tokens have the same."""
PER_TOKEN = {name for name, kind in COLUMNS.items() if kind.endswith("ints") or kind in ("floats", "bools")} | {
    "tokens"
}
"""Columns with one entry per token, and the texts of the tokens in a run's record."""
FINISHES = ("eos", "length", "stop", "unfinished")
DIGITS = 16
"""Hexadecimal digits of a tokenizer's fingerprint that are written."""
LARGEST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}
OF_ROW = {"row": -1, "vote": 0, "failed_by": -1, "hint_tokens": 0, "trunk": -1, "fork": 0}
"""Whole numbers of a response, and the value of each in a file without it."""
LARGEST_LOGPROB = 1e-3
"""Nats: a log-prob of 0 may be rounded up by this much; larger ones are no log-probs."""


class Trajectory(NamedTuple):
    """One response. None: the file does not say."""

    where: str
    """File and line, for messages."""
    prompt: str
    completion: str
    answer: str
    prompt_ids: Int32[np.ndarray, " s"]
    ids: Int32[np.ndarray, " t"]
    """Tokens of the response, end token included."""
    logprobs: Float32[np.ndarray, " t"] | None
    entropy: Float32[np.ndarray, " t"]
    version: Int32[np.ndarray, " t"]
    sampled: Bool[np.ndarray, " t"]
    kept_tokens: list[list[int]] | None
    control_state: Int32[np.ndarray, " t"] | None
    """What the control allowed, as the run that sampled it numbered it."""
    raw_logprobs: Float32[np.ndarray, " t"] | None
    step_reward: Float32[np.ndarray, " t"] | None
    uid: int | None
    """One number per visit of a prompt."""
    sample: int | None
    row: int
    """Index into the task's rows when it was sampled; -1 if unknown."""
    temperature: float
    reward: float | None
    components: dict[str, float]
    """Reward of each grader, before weights."""
    success: bool | None
    vote: int
    finish: str
    failure: str
    """Why its group could not be graded; "" if it was."""
    failed_by: int
    hint_tokens: int
    """Tokens of a demonstration that it began with."""
    trunk: int
    """Sample number of the response that it left behind `fork` tokens; -1: none."""
    fork: int
    columns: Mapping[str, Any]
    """Other columns and texts, for graders."""

    @property
    def group(self) -> tuple[str, int | None, bytes]:
        """Equal for the responses to one visit of a prompt. A run that repeats a visit's noise has its uid in several steps."""
        return str(self.columns.get("step")), self.uid, self.prompt_ids.tobytes()


def tokenizer_name(tokenizer: Tokenizer) -> str:
    """The value of the column `tokenizer`: the beginning of the fingerprint of vocabulary, special, end and padding tokens."""
    return tokenizer.fingerprint[:DIGITS]


def read(path: Path, tokenizer: Tokenizer) -> list[Trajectory]:
    """Read the responses of a file, in its order.

    Args:
        path: a .jsonl, .json or .parquet file with the columns `prompt_ids` and `ids`; or with the texts `prompt` and
            `completion`, or chat `messages` of which the last is the completion.
        tokenizer: that of the ids; it encodes texts.

    Raises:
        UserError: names file, line, what was found and what is wanted.
    """
    # Parquet has nulls where JSON leaves a key out, and NaN where it has nulls.
    rows = [
        Record(record.where, {name: x for name, x in record.columns.items() if x is not None and x == x})
        for record in records.read(path, "train")
    ]
    if not any({"ids", "prompt_ids"} & row.columns.keys() for row in rows):
        return _read_texts(path, rows, tokenizer)
    _check_tokenizer(path, rows, tokenizer)
    return _trajectories(rows, tokenizer)


def _trajectories(rows: list[Record], tokenizer: Tokenizer) -> list[Trajectory]:
    found, bad, size = [], [], tokenizer.size
    for row in rows:
        try:
            found.append(_Reader(row, size).trajectory(tokenizer))
        except ValueError as error:
            bad.append(f"{row.where}: {error}")
    refuse(bad)
    return found


def _check_tokenizer(path: Path, rows: list[Record], tokenizer: Tokenizer) -> None:
    want, other = tokenizer_name(tokenizer), "token ids say nothing under another vocabulary"
    for row in rows:
        got = row.columns.get("tokenizer")
        if got is None:
            raise UserError(
                f"{row.where}: got token ids without the column tokenizer, want {want!r} in it, the fingerprint of this run's: "
                f"{other}; or a file of texts alone, prompt and completion"
            )
        if got != want:
            raise UserError(
                f"{path}: got tokens of another tokenizer ({str(got)[:40]!r} in {row.where}), want those of this run's ({want!r}): "
                f"{other}; give the tokenizer they were sampled with, or a file of texts alone, without ids and prompt_ids"
            )


class _Reader:
    """Reader of one row's columns. Raises ValueError with what it got, and what it wants."""

    def __init__(self, record: Record, size: int):
        self.where, self.columns, self.size = record.where, record.columns, size

    def trajectory(self, tokenizer: Tokenizer) -> Trajectory:
        ids, prompt_ids = self.tokens("ids"), self.tokens("prompt_ids")
        n = len(ids)
        sampled = self.numbers("sampled", n, np.bool_, "true or false")
        logprobs = self.numbers("logprobs", n, np.float32, "a number")
        if logprobs is not None and not (logprobs <= LARGEST_LOGPROB).all():
            wrong = next(x for x in logprobs.tolist() if not x <= LARGEST_LOGPROB)
            raise ValueError(f"logprobs: got {_shown(None if wrong != wrong else wrong)}, want logarithms, 0 at most")
        is_one = not isinstance(self.columns.get("version"), list)
        version = (
            np.full(n, self.one("version", int, 0))
            if is_one
            else self.numbers("version", n, np.int32, "a whole number")
        )
        last = "eos" if ids[-1] in tokenizer.eos else "length"
        texts = {name: self.one(name, str, "") for name in ("prompt", "completion", "answer", "failure")}
        entropy = self.numbers("entropy", n, np.float32, "a number")
        found = Trajectory(
            where=self.where,
            **texts,
            prompt_ids=prompt_ids,
            ids=ids,
            logprobs=logprobs,
            entropy=np.zeros(n, np.float32) if entropy is None else entropy,
            version=version.astype(np.int32),
            sampled=np.ones(n, bool) if sampled is None else sampled,
            kept_tokens=self.kept(n),
            control_state=self.numbers("control_state", n, np.int32, "a whole number"),
            **{name: self.numbers(name, n, np.float32, "a number") for name in ("raw_logprobs", "step_reward")},
            **{name: self.one(name, int, None) for name in ("uid", "sample")},
            **{name: self.one(name, int, least) for name, least in OF_ROW.items()},
            temperature=self.one("temperature", float, 1.0),
            reward=self.one("reward", float, None),
            components=self.components(),
            success=self.one("success", bool, None),
            finish=self.one("finish", str, last),
            columns={name: x for name, x in self.columns.items() if name not in PER_TOKEN},
        )
        return self.checked(found)

    def tokens(self, name: str) -> Int32[np.ndarray, " n"]:
        x = _array(self.columns.get(name))
        if x is None or x.ndim != 1 or x.dtype.kind not in "iu" or not len(x):
            got = _shown(self.columns[name]) if name in self.columns else "nothing"
            raise ValueError(f"{name}: got {got}, want a list of one or more token ids")
        return self.known(name, x)

    def known(self, name: str, x: np.ndarray) -> Int32[np.ndarray, " n"]:
        if (wrong := x[(x < 0) | (x >= self.size)]).size:
            raise ValueError(f"{name}: got the token {wrong[0]}, want 0 to {self.size - 1}, those of the tokenizer")
        return x.astype(np.int32)

    def numbers(self, name: str, n: int, dtype: type, want: str) -> np.ndarray | None:
        """One number per token; JSON has null for NaN. None if there is no such column."""
        given = self.columns.get(name)
        if given is None:
            return None
        if not isinstance(given, list):
            raise ValueError(f"{name}: got {_shown(given)}, want a list")
        if len(given) != n:
            raise ValueError(f"{name}: got {len(given)}, want {n}, one per token of ids")
        is_float = dtype is np.float32
        x = _array([np.nan if v is None else v for v in given] if is_float else given)
        if x is None or x.ndim != 1 or x.dtype.kind not in {np.bool_: "b", np.int32: "iu", np.float32: "iuf"}[dtype]:
            raise ValueError(f"{name}: got {_shown(given)}, want {want} per token")
        with np.errstate(over="ignore"):
            found = x.astype(dtype)
        if np.isinf(found).any() if is_float else (found != x).any():
            raise ValueError(f"{name}: got {_shown(given)}, want numbers that {np.dtype(dtype)} holds")
        return found

    def one(self, name: str, kind: type, missing: Any) -> Any:
        given = self.columns.get(name)
        if given is None:
            return missing
        kinds = (int, float) if kind is float else (kind,)
        if type(given) not in kinds:
            words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            raise ValueError(f"{name}: got {_shown(given)}, want {words[kind]}")
        if kind in (int, float) and abs(given) > LARGEST[kind]:
            raise ValueError(f"{name}: got {_shown(given)}, want {LARGEST[kind]} at most")
        return kind(given)

    def kept(self, n: int) -> list[list[int]] | None:
        given = self.columns.get("kept_tokens")
        if given is None:
            return None
        if not isinstance(given, list) or not all(isinstance(kept, list) for kept in given):
            raise ValueError(f"kept_tokens: got {_shown(given)}, want a list of token ids per token")
        if len(given) != n:
            raise ValueError(f"kept_tokens: got {len(given)}, want {n}, one list per token of ids")
        flat = _array([id for kept in given for id in kept])
        if flat is None or (len(flat) and flat.dtype.kind not in "iu"):
            raise ValueError(f"kept_tokens: got {_shown(given)}, want lists of token ids")
        self.known("kept_tokens", flat)
        return given

    def components(self) -> dict[str, float]:
        given = self.columns.get("components", {})
        if not isinstance(given, dict) or not all(x is None or type(x) in (int, float) for x in given.values()):
            raise ValueError(f"components: got {_shown(given)}, want a number by the name of each grader")
        return {name: float("nan") if x is None else float(x) for name, x in given.items()}

    def checked(self, found: Trajectory) -> Trajectory:
        """Check what must fit together."""
        if found.finish not in FINISHES:
            raise ValueError(f"finish: got {found.finish!r}, want one of {', '.join(FINISHES)}")
        if not found.temperature >= 0:
            raise ValueError(f"temperature: got {found.temperature}, want 0 or more")
        for id, kept, was_sampled in zip(found.ids.tolist(), found.kept_tokens or (), found.sampled, strict=False):
            if was_sampled and id not in kept:
                raise ValueError(f"kept_tokens: got {_shown(kept)}, want the sampled token {id} among them")
        return found


def _read_texts(path: Path, rows: list[Record], tokenizer: Tokenizer) -> list[Trajectory]:
    """Responses of which there are only texts. They end with the end token, as complete ones do."""
    there = rows[0].columns
    prompt = next((name for name in ("prompt", "messages") if name in there), None)
    response = next((name for name in ("completion", "messages") if name in there), None)
    if prompt is None or response is None:
        want = "prompt_ids and ids, prompt and completion, or messages of which the last is the completion"
        raise UserError(f"{rows[0].where}: got the columns {', '.join(there) or '(none)'}, want {want}")
    texts = make_rows(fill_rows(rows, f"{{{prompt}}}", "", f"{{{response}}}"), tokenizer)
    encoded = []
    for row, record in zip(texts, rows, strict=True):
        known = {name: record.columns[name] for name in ("reward", "success", "answer") if name in record.columns}
        if type(known.get("answer")) in (int, float):
            known["answer"] = str(known["answer"])
        ids = {"prompt_ids": row.tokens.tolist(), "ids": row.target.tolist()}
        encoded.append(Record(record.where, {**known, "prompt": row.prompt, "completion": row.response, **ids}))
    found = _trajectories(encoded, tokenizer)
    return [t._replace(columns=record.columns) for t, record in zip(found, rows, strict=True)]


def _array(values: Any) -> np.ndarray | None:
    """The list as an array; None if it is none of numbers."""
    if not isinstance(values, list):
        return None
    try:
        x = np.array(values) if values else np.zeros(0, np.int64)
    except (ValueError, OverflowError):  # lists of different lengths
        return None
    return x if x.dtype.kind in "biuf" else None


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

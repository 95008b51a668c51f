"""A generation workload: one model, one batch, one dtype, prompts shared by groups or all different."""

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.models import DTYPES, NEW_TOKENS, PROMPT_SLOTS, SAMPLES, SIZES
from jaxrl_llm.errors import UserError

GROUPS, DIFFERENT = "groups", "different"


@dataclass(frozen=True)
class Work:
    size: str
    rows: int
    compute: str
    prompts: str = GROUPS
    """`groups`: 8 rows per prompt, as in training; `different`: one."""
    top_p: float = 1.0

    @property
    def name(self) -> str:
        cut = "" if self.top_p == 1.0 else f", top-p {self.top_p:g}"
        return f"{self.size} {self.rows} rows {self.compute}, {self.prompts}{cut}"

    @property
    def samples(self) -> int:
        return SAMPLES if self.prompts == GROUPS else 1

    @property
    def new_tokens(self) -> int:
        """16 for L: on two cores its 128 would take a minute per call."""
        return 16 if self.size == "L" else NEW_TOKENS

    @property
    def tokens(self) -> int:
        return self.rows * self.new_tokens

    def call(self, seed: int, greedy: bool = False) -> dict:
        """Return the fields of `serve.Call`."""
        shape = (self.rows // self.samples, PROMPT_SLOTS)
        prompts = np.random.default_rng(0).integers(0, SIZES[self.size].vocab_size, shape)
        return {
            "prompts": prompts.tolist(),
            "samples": self.samples,
            "new_tokens": self.new_tokens,
            "top_p": self.top_p,
            "greedy": greedy,
            "seed": seed,
        }

    def as_dict(self) -> dict:
        return asdict(self) | {"samples": self.samples, "prompt": PROMPT_SLOTS, "new_tokens": self.new_tokens}


def parse(text: str, prompts: str = GROUPS, top_p: float = 1.0) -> Work:
    """Return the work of "M,64,float32". Raises UserError for any other form."""
    parts = text.split(",")
    fits = len(parts) == 3 and parts[0] in SIZES and parts[1].isdigit() and parts[2] in DTYPES
    if not fits or int(parts[1]) == 0 or int(parts[1]) % SAMPLES:
        sizes, dtypes = ", ".join(SIZES), " or ".join(DTYPES)
        raise UserError(f"--work: got {text}, want SIZE,ROWS,DTYPE: one of {sizes}; a multiple of {SAMPLES}; {dtypes}")
    return Work(parts[0], int(parts[1]), parts[2], prompts, top_p)

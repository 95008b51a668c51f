"""Sampling of trees: the sessions of roots and of branches, one behind the other, and what they cost together."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import NoTree, SegmentTree
from jaxrl_llm.rollout.growth import first_limit, grow, num_roots
from jaxrl_llm.rollout.request_checks import limits_of, per_prompt
from jaxrl_llm.rollout.sample import Controls
from jaxrl_llm.rollout.session import Session, Stats, add_stats
from jaxrl_llm.rollout.tree import Branches, branch, check_branches
from jaxrl_llm.types import Prompts, Rollouts

MakeSession = Callable[[Branches | None], Session]
"""A session for roots, or for branches of rollouts."""


class TreeSampler:
    """Samples trees from one policy, with one key."""

    def __init__(self, make_session: MakeSession, key: Key[Array, ""], between: Callable[[], None], slots: int):
        """Made by `Engine.tree_sampler`.

        Args:
            make_session: of the engine, for the policy.
            key: random key of the sessions, and of random choices.
            between: called between two chunks.
            slots: C, completion slots.
        """
        self.make_session, self.key, self.between, self.slots = make_session, key, between, slots
        self.stats = Stats()

    def branch(self, rollouts: Rollouts, branches: Branches, controls: Controls | None, limit: object) -> Rollouts:
        """Return the rollouts with further rows; see `Engine.branch`."""
        branches = check_branches(rollouts, branches, self.slots)
        session = self.make_session(branches)
        found = branch(session, self._run, rollouts, branches, controls, limit)
        self.stats = add_stats(self.stats, session.stats)
        return found

    def grow(
        self, prompts: Prompts, controls: Controls | None = None, limit: Int[np.ndarray, " P"] | None = None,
        samples: Int[np.ndarray, " P"] | None = None,
    ) -> Rollouts:  # fmt: skip
        """Return a tree for each prompt.

        Args:
            prompts: NumPy arrays, equal on every host.
            controls: sampling parameters per prompt; the configured ones by default.
            limit: maximum completion tokens per prompt; `max_new_tokens` by default.
            samples: rows of each prompt; the configured number by default.

        Raises:
            UserError: the config has no tree, or segments under a control.
            ValueError: no prompts, a number out of range, or controls per row.
        """
        session, num = self.make_session(None), len(prompts.length)
        cfg, tree = session.cfg, session.cfg.tree
        if isinstance(tree, NoTree):
            raise UserError("tree: got none, want an engine with a tree, such as tree=rl.trees.points(roots=2)")
        if controls is not None and len(controls.temperature) != num:
            raise ValueError(f"controls: got {len(controls.temperature)}, want one for each of the {num} prompts")
        controlled = cfg.control.kind != "none" if controls is None else bool(np.any(controls.control))
        if isinstance(tree, SegmentTree) and controlled:
            raise UserError(
                "tree.kind: got segments under a control, want points: a control ends each row within its limit, and here that "
                "would be the end of a segment"
            )
        samples = per_prompt("samples", cfg.samples if samples is None else samples, num, 1)
        limit = np.full(num, cfg.max_new_tokens) if limit is None else limit
        limits = limits_of("limit", limit, np.ones(num, int), cfg.max_new_tokens)
        ids = session.add(prompts, num_roots(tree, samples, cfg.samples), controls, first_limit(tree, limits))
        roots = self._run(session, ids)
        self.stats = add_stats(self.stats, session.stats)

        def sample(rollouts: Rollouts, branches: Branches, limit: Int[np.ndarray, " n"]) -> Rollouts:
            of_rows = controls and jax.tree.map(lambda x: x[rollouts.prompt], controls)
            return self.branch(rollouts, branches, of_rows, limit)

        return grow(tree, roots, samples, limits, self.key, sample)

    def _run(self, session: Session, ids: Int[np.ndarray, " n"]) -> Rollouts:
        """Return the rollouts of all requests of a session."""
        while session.pending:
            session.advance()
            self.between()
        return session.take(ids)

"""The rollout engine: one config, one set of compiled programs, and sessions that run them.

prompts -> session -> (admit -> decode a chunk -> store its output -> release) until all rows have ended -> rollouts
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from jaxrl_llm.config.options import with_options
from jaxrl_llm.control.automaton import TokenAutomaton
from jaxrl_llm.control.config import Control, budget_of
from jaxrl_llm.distribution.control_tables import ControlTables
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.cache import Caching, attention_windows, choose_cache_format
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.parallel.config import divisors
from jaxrl_llm.parallel.layout import Layout
from jaxrl_llm.rollout.batch_sizes import BatchSizes, first_window, smallest
from jaxrl_llm.rollout.built_control import build_control, limit_problem
from jaxrl_llm.rollout.config import ExactReuse, NoReuse, NoTree, RolloutConfig
from jaxrl_llm.rollout.control_set import ControlSet
from jaxrl_llm.rollout.growth import check_tree
from jaxrl_llm.rollout.programs import ProgramName, Programs
from jaxrl_llm.rollout.requests import PromptsLike, PromptTokenizer, as_prompts, controls_for
from jaxrl_llm.rollout.reuse import Reused, reuse
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary
from jaxrl_llm.rollout.session import Session
from jaxrl_llm.rollout.tree import Branches, lanes_for
from jaxrl_llm.rollout.tree_sampler import TreeSampler
from jaxrl_llm.types import Policy, Rollouts

KINDS = get_args(get_args(Control)[0])
INEXACT = 2**32 - 1
"""Number that makes the noise of inexact reuse another one than that of any prompt."""


class EngineModel(NamedTuple):
    """What the engine knows about a model, apart from its parameters."""

    config: ModelConfig
    decode: Layout
    """Sharding of policy, caches and rows."""
    vocab: Vocabulary
    tokenizer: PromptTokenizer | None = None
    """For prompts given as text, and for stop strings."""


class Engine:
    """Samples G completions per prompt with one config and one set of compiled programs.

    engine = Engine(model, prompts=64, samples=8, max_new_tokens=512)
    rollouts = engine.generate(policy, ["What is 3 + 4?"], jax.random.key(0))
    """

    def __init__(self, model: EngineModel, cfg: RolloutConfig | None = None, prompt_slots: int = 0, **options: Any):
        """Fix sizes and static settings; nothing compiles yet.

        Args:
            model: an `EngineModel`, or any value with its attributes.
            cfg: the rollouts; None: the defaults.
            prompt_slots: maximum prompt length; 0: that of the first prompts, doubled or more once longer ones come.
            options: fields of `RolloutConfig` that replace those of `cfg`.

        Raises:
            UserError: an option is unknown or its value is out of range.
        """
        if "reuse" in options:
            raise UserError(
                "reuse: got one, want none: an engine knows no earlier call; call engine.reuse(policy, rollouts, key)"
            )
        self.model, self.cfg, self.prompt_slots = model, with_options(cfg or RolloutConfig(), options), prompt_slots
        if not isinstance(self.cfg.tree, NoTree) and self.cfg.tree.roots >= self.cfg.samples:
            raise UserError(
                f"tree.roots: got {self.cfg.tree.roots}, want less than samples ({self.cfg.samples}): the rest are branches"
            )
        check_tree(self.cfg.tree)
        self.sizes: BatchSizes | None = None
        self.control_set = configured_controls(model, self.cfg)
        self.branching: dict[int, tuple[BatchSizes, Programs]] = {}
        """Sizes and programs of sessions whose rows share a trunk, by rows per trunk."""
        if prompt_slots:
            self._fit(prompt_slots)

    def _fit(self, prompt_slots: int) -> None:
        """Set the sizes and programs for prompts of up to `prompt_slots` tokens."""
        self.close()
        cfg, config, layout, vocab = self.cfg, self.model.config, self.model.decode, self.model.vocab
        steps = min(cfg.engine.decode_chunk, cfg.max_new_tokens)
        window = cfg.engine.window or first_window(cfg, config, layout)
        self.sizes = BatchSizes.of(cfg, window, prompt_slots, max(attention_windows(config)), layout.size("rows"))
        most = min(cfg.engine.eos_interval, steps, self.sizes.windows[0])
        interval = max(n for n in divisors(steps) if n <= most)
        max_kept_tokens = cfg.max_kept_of(vocab.size)
        self.decoding = Decoding(config, layout, vocab, steps, interval, max_kept_tokens, cfg.raw_logprobs)
        form = choose_cache_format(cfg.engine.attention, cfg.engine.cache, config, layout)
        self.programs = Programs(self.decoding, Caching(prompt_slots, cfg.engine.prefill_chunk, form), self.sizes)
        self.branching.clear()

    def controls(
        self, prompts: int, temperature: float | None = None, control: Control | Sequence[Control] | None = None
    ) -> Controls:
        """Return the configured sampling parameters for `prompts` prompts; the same for all samples, whatever `per_sample` says.

        Args:
            prompts: number of prompts.
            temperature: another one than the configured.
            control: what responses may consist of (`rl.controls`), one for all or one for each prompt; None: the configured one.

        Raises:
            UserError: not a control for each prompt, or one that cannot be built for the tokenizer.
        """
        each = list(control) if isinstance(control, list | tuple) else [control] * prompts
        each = [self.cfg.control if one is None else one for one in each]
        if wrong := [one for one in each if not isinstance(one, KINDS)]:
            raise UserError(
                f"control: got {wrong[0]!r}, want what rl.controls makes, or a list with one for each prompt"
            )
        if len(each) != prompts:
            raise UserError(f"control: got {len(each)}, want one for each of the {prompts} prompts")
        start, budget = [self.control_set.start(one) for one in each], [budget_of(one) for one in each]
        of = controls_for(self.cfg, prompts, temperature)
        return of.replace(control=np.array(start, np.int32), budget=np.array(budget, np.int32))

    @property
    def tables(self) -> ControlTables | None:
        """Tables of all controls so far, NumPy, in which `Rollouts.control_state` is read; None: there are none."""
        return self.control_set.tables

    def session(self, policy: Policy, key: Key[Array, ""], prompt_slots: int = 0) -> Session:
        """Return a session without requests.

        Args:
            policy: the sampling policy.
            key: random key of all its tokens.
            prompt_slots: maximum prompt length, for an engine that has none.

        Raises:
            UserError: neither the engine nor the call has a maximum prompt length.
        """
        self._make_room(prompt_slots)
        self._want_slots()
        return Session(self.cfg, self.sizes, self.programs, self.model.tokenizer, self.control_set, policy, key)

    def generate(
        self, policy: Policy, prompts: PromptsLike, key: Key[Array, ""], controls: Controls | None = None,
        limit: Int[np.ndarray, " P"] | None = None,
    ) -> Rollouts:  # fmt: skip
        """Sample all completions.

        A row's tokens depend only on the weights, its prompt, `key`, its uid and its sample number.

        Args:
            policy: the sampling policy.
            prompts: NumPy arrays, equal on every host; or texts, or lists of token ids, with uids 0, 1, 2, ...
            key: random key of the call.
            controls: sampling parameters, per prompt or per row; the configured ones by default.
            limit: maximum completion tokens per prompt; `max_new_tokens` by default.

        Raises:
            UserError: prompts of another type.
            ValueError: no prompts, or a prompt length or limit out of range.
        """
        prompts = as_prompts(prompts, self.model.tokenizer, self.model.vocab, 0)
        self._make_room(prompts.tokens.shape[1])
        if not isinstance(self.cfg.tree, NoTree):
            return self.tree_sampler(policy, key).grow(prompts, controls, limit)
        session = self.session(policy, key)
        ids = session.add(prompts, controls=controls, limit=limit)
        while session.pending:
            session.advance()
        return session.take(ids)

    def tree_sampler(
        self, policy: Policy, key: Key[Array, ""], between: Callable[[], None] = lambda: None
    ) -> TreeSampler:
        """Return what samples trees.

        Args:
            policy: samples the tokens.
            key: random key of all tokens.
            between: called between two chunks; what it raises ends the sampling.
        """

        def session(branches: Branches | None) -> Session:
            if branches is None:
                return self.session(policy, key)
            sizes, programs = self._for_branches(lanes_for(branches, self.cfg))
            return Session(self.cfg, sizes, programs, self.model.tokenizer, self.control_set, policy, key)

        return TreeSampler(session, key, between, self.cfg.max_new_tokens)

    def _for_branches(self, lanes: int) -> tuple[BatchSizes, Programs]:
        """Return sizes and programs of sessions with so many rows per trunk."""
        if lanes not in self.branching:
            sizes = self.sizes.for_branches(lanes, self.cfg.samples, self.cfg.max_new_tokens)
            caching = self.programs.caching._replace(prompt_slots=sizes.prompt_slots[-1])
            self.branching[lanes] = sizes, Programs(self.decoding, caching, sizes)
        return self.branching[lanes]

    def reuse(
        self, policy: Policy, known: Rollouts, key: Key[Array, ""], controls: Controls | None = None,
        limit: Int[np.ndarray, " P"] | None = None, leniency: float | None = None,
    ) -> Reused:  # fmt: skip
        """Sample the completions of earlier rollouts under another policy, and keep what it draws as they have it.

        The result is that of `generate` with the same prompts, their uids, and key, token for token but for rounding: distributed
        as fresh samples of the policy, with its log-probs and version. Only what differs is decoded. That holds if which rollouts
        are passed here does not depend on what they contain, their rewards above all.

        Args:
            policy: the sampling policy.
            known: rollouts of an earlier policy, of which any row may be unfinished; one turn each if they have a control.
            key: random key of the call that sampled `known`: with another one hardly a token is kept.
            controls: sampling parameters, per prompt or per row; the configured ones by default.
            limit: maximum completion tokens per prompt; `max_new_tokens` by default.
            leniency: None: the above. A number, nats: the inexact form of SPEC-RL (arXiv 2509.23232) instead, which keeps tokens up
                to the first that is not accepted, each with probability min(1, exp(leniency) * new / old), and samples on with
                noise of its own for each version of the policy, whatever the key. Kept tokens keep their version, and the
                probability of being accepted becomes a part of their log-probs.

        Raises:
            UserError: not rollouts.
            ValueError: rollouts with rows missing, of several turns under a control, or other tokens; as in `generate`; or a
                leniency below 0.
        """
        if leniency is not None:
            if type(leniency) not in (int, float) or not 0 <= leniency < math.inf:
                raise ValueError(f"leniency: got {leniency!r}, want None, or a number of nats from 0")
            # Noise of its own, whatever the key of the earlier call: the same would draw a rejected token again.
            key = jax.random.fold_in(jax.random.fold_in(key, INEXACT), int(policy.version))
        self._make_room(known.prompts.tokens.shape[1] if isinstance(known, Rollouts) else 0)
        return reuse(self.session(policy, key), known, controls, limit, leniency)

    def branch(
        self, policy: Policy, rollouts: Rollouts, branches: Branches, key: Key[Array, ""], controls: Controls | None = None,
        limit: int | Int[np.ndarray, " n"] | None = None,
    ) -> Rollouts:  # fmt: skip
        """Sample further rows that begin with tokens of earlier ones, whose keys and values all rows of a trunk share.

        Args:
            policy: the sampling policy, the one that sampled the rollouts.
            rollouts: of this engine; their rows may have ended or not, and have branches of their own.
            branches: which rows to leave, and where, one new row for each; and which rows continue themselves.
            key: random key of the call that sampled the rollouts. New rows have new sample numbers, and so their own noise.
            controls: sampling parameters of each row of the rollouts, which hold for its branches too; the configured ones by
                default.
            limit: maximum completion tokens of all rows that are sampled, or of each; `max_new_tokens` by default.

        Returns:
            The rollouts with the new rows, those of each prompt behind its earlier ones. `trunk` and `fork` say what they share.

        Raises:
            UserError: not rollouts.
            ValueError: no branches, branches of rows or behind tokens that do not exist, or a limit out of range.
        """
        self._make_room(rollouts.prompts.tokens.shape[1] if isinstance(rollouts, Rollouts) else 0)
        return self.tree_sampler(policy, key).branch(rollouts, branches, controls, limit)

    def _want_slots(self) -> None:
        if not self.sizes:
            raise UserError("prompt_slots: got none for engine or session, want the maximum prompt length in tokens")

    def _make_room(self, slots: int) -> None:
        """Fit the engine to prompts of `slots` tokens, if their maximum was left open."""
        if self.prompt_slots or not slots or (self.sizes and slots <= self.sizes.prompt_slots[-1]):
            return
        self._fit(max(slots, 2 * self.sizes.prompt_slots[-1] if self.sizes else 0))

    @property
    def _table_sizes(self) -> tuple[int, ...]:
        return () if self.tables is None else self.tables.sizes

    def names(self, prompts: int, compacted: bool = True) -> list[ProgramName]:
        """Return all programs that a call with `prompts` prompts may run, in the order in which it needs them.

        Args:
            prompts: number of prompts.
            compacted: with those of a batch that was compacted.
        """
        sizes = self.sizes
        several = self.cfg.max_new_tokens > min(self.decoding.steps, sizes.windows[0])
        batch = smallest(sizes.prompts, min(prompts, sizes.prompts[0]))
        fewer = [n for n in sizes.prompts if n <= batch]
        # With a single chunk all rows end together, and all slots become free at once.
        admitted = fewer if several and prompts > batch else {batch, smallest(sizes.prompts, prompts % batch or batch)}
        compacts = compacted and self.cfg.engine.compact and (several or prompts > batch)
        groups = [sizes.groups(n) for n in (fewer if compacts else [batch])]
        found: list[ProgramName] = [("prefill", n, s) for n in admitted for s in sizes.prompt_slots]
        found += [
            ("broadcast_prefix", n, groups[0]) for n in admitted if sizes.groups(n) != groups[0] or sizes.groups_per_prompt > 1
        ]  # fmt: skip
        if several and prompts > batch:
            found += [("insert_prefix", groups[0], n) for n in admitted]
        found.append(("empty_suffix", groups[0], sizes.windows[0]))
        for u in groups:
            found += self._growing(u)
        found += [("compact", u, v, w) for u in groups for v in groups if v < u for w in sizes.windows]
        return found

    def _growing(self, groups: int) -> list[ProgramName]:
        """Return the programs that decode an active batch of one size, in the order in which it needs them."""
        windows = self.sizes.windows
        found: list[ProgramName] = [("decode_chunk", groups, windows[0], *self._table_sizes)]
        for window, wider in pairwise(windows):
            found += [("extend_suffix", groups, window, wider), ("decode_chunk", groups, wider, *self._table_sizes)]
        return found

    def session_names(self) -> list[ProgramName]:
        """Return all programs that a session may run, which are those of every call too."""
        sizes = self.sizes
        prompts, groups, windows = sizes.prompts, sizes.group_counts, sizes.windows
        found = self._one_way_names(sizes)
        found += [("read_rows", n, s) for n in prompts for s in sizes.row_slots]
        if not isinstance(self.cfg.reuse, NoReuse):
            what = "redraw" if isinstance(self.cfg.reuse, ExactReuse) else "rescore"
            found += [(what, sizes.known_rows(s), s, *self._table_sizes) for s in sizes.row_slots]
        found += [("join_suffix", u, w, n) for u in groups for w in windows for n in prompts]
        return found + [("expand", u, v, w) for u in groups for v in groups if v > u for w in windows]

    def _one_way_names(self, sizes: BatchSizes) -> list[ProgramName]:
        """Return all programs of a session to which all is added at once, and of which no row is read again: one of branches."""
        prompts, groups, windows = sizes.prompts, sizes.group_counts, sizes.windows
        found: list[ProgramName] = [("prefill", n, s) for n in prompts for s in sizes.prompt_slots]
        found += [("broadcast_prefix", n, u) for n in prompts for u in groups]
        found += [("insert_prefix", u, n) for n in prompts for u in groups]
        found += [("empty_suffix", u, windows[0]) for u in groups]
        for u in groups:
            found += self._growing(u)
        return found + [("compact", u, v, w) for u in groups for v in groups if v < u for w in windows]

    def warm(self, policy: Policy, prompts: int | None = None) -> None:
        """Compile the programs of calls with `prompts` prompts; by default, of sessions, and so of all calls. If the config has a
        tree, those of branches too."""
        self.programs.warm(policy.params, self.session_names() if prompts is None else self.names(prompts))
        if not isinstance(self.cfg.tree, NoTree):
            sizes, programs = self._for_branches(self.cfg.rows_per_trunk)
            programs.warm(policy.params, self._one_way_names(sizes))

    def compile_ahead(self, policy: Policy, prompts: int | None = None) -> None:
        """Compile what `warm` compiles in a thread; what a call of `prompts` prompts needs before, it compiles itself.

        On CPUs only what a full batch needs: the cores that would compile the rest are those that sample. Sessions (None) and trees
        wait, as in `warm`: what they need depends on which rows end, and would be compiled in one step or another. So does a job of
        several processes, whose compilers may wait for each other.
        """
        self._want_slots()
        if prompts is None or not isinstance(self.cfg.tree, NoTree) or jax.process_count() > 1:
            self.warm(policy, prompts)
        else:
            names = self.names(prompts, compacted=not self.decoding.layout.on_cpu)
            self.programs.compile_ahead(policy.params, names)

    @property
    def is_compiling(self) -> bool:
        """True while `compile_ahead` has programs to compile."""
        return bool(self.sizes) and self.programs.is_compiling

    def close(self) -> None:
        """Leave out what `compile_ahead` has not begun to compile: the process would wait for it at its end. Calls are possible
        still."""
        if self.sizes:
            self.programs.stop_compiling()


def configured_controls(model: EngineModel, cfg: RolloutConfig) -> ControlSet:
    """Return the controls of a config. Raises UserError if one cannot be built for the tokenizer, or a row could not end within
    `max_new_tokens`.

    Args:
        model: an `EngineModel`, or any value with its attributes.
        cfg: the rollouts.
    """

    def built(control: Control) -> TokenAutomaton:
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise UserError(f"control: got {control.kind} for a model without a tokenizer, want none")
        return build_control(control, tokenizer, model.vocab.eos)

    found = ControlSet(model.vocab, model.config.vocab_size, built)
    if cfg.min_new_tokens:
        found.need()
    found.start(cfg.control)
    for automaton in found.automata.values():
        if wrong := limit_problem(cfg.max_new_tokens, automaton, budget_of(cfg.control)):
            raise UserError(f"max_new_tokens: {wrong}")
    return found

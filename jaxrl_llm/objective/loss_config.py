"""Config of the loss. Each variant is a type, tagged by `kind`."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict, Field

from jaxrl_llm.config import user_code
from jaxrl_llm.config.own_part import OwnPart
from jaxrl_llm.errors import UserError

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
NonNegative = Annotated[float, Ge(0)]


Level = Literal["token", "sequence", "geometric"]
Aggregation = Literal["token", "sequence", "constant", "sequence_sum", "token_sum", "prompt"]


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate with separate lower and upper bounds; DAPO's clip-higher is high > low."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["clip"] = "clip"
    low: Fraction = 0.2
    """No gradient where the ratio is below 1 - low and the advantage is negative."""
    high: NonNegative = 0.2
    """No gradient where the ratio is above 1 + high and the advantage is positive."""
    dual: Annotated[float, Gt(1)] | None = None
    """c: with a negative advantage A the loss is at most -c A (Ye et al. 2020)."""


@dataclass(frozen=True)
class Cispo:
    """-clip(ratio, low, high) A log p, the clipped ratio without a gradient (MiniMax-M1). The bounds are on the ratio itself:
    for a framework's eps_low, eps_high write 1 - eps_low, 1 + eps_high."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["cispo"] = "cispo"
    low: NonNegative = 0.0
    high: Positive = 5.0


@dataclass(frozen=True)
class Gmpo:
    """The geometric mean of a sequence's ratios, each log-ratio bounded to [-low, high] where its sign and the advantage's agree
    (Zhao et al. 2025)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["gmpo"] = "gmpo"
    low: NonNegative = 0.4
    high: NonNegative = 0.4


@dataclass(frozen=True)
class Sapo:
    """-A sigmoid(tau (ratio - 1)) 4 / tau (SAPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["sapo"] = "sapo"
    positive: Positive = 1.0
    """tau where A > 0."""
    negative: Positive = 1.05
    """tau elsewhere."""


@dataclass(frozen=True)
class Dppo:
    """Drops tokens for which the policy has moved too far in the direction of the advantage, by the divergence of the token's
    two-way distribution (DPPO)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    """tv: p - p_old. kl: of the Bernoulli distributions of sampling this token."""
    low: NonNegative = 0.2
    high: NonNegative = 0.2
    form: Literal["ratio", "reinforce"] = "ratio"
    """-A ratio (SkyRL, prime-rl until August 2026), or -A min(ratio, cap) log p, the ratio without a gradient (verl)."""
    cap: Positive = 20.0
    """Upper bound of the ratio in the form `reinforce`."""


@dataclass(frozen=True)
class Ipo:
    """-A ratio for tokens whose probability has moved by at most `eps` since sampling, up or down, for either sign of A
    (prime-rl's IPO; not the preference loss of that name)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["ipo"] = "ipo"
    eps: NonNegative = 0.3
    """Largest |p - p_old| of a token that is kept."""


@dataclass(frozen=True)
class Reinforce:
    """-A log p (Williams 1992)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["reinforce"] = "reinforce"


Surrogate = Clip | Cispo | Gmpo | Sapo | Dppo | Ipo | Reinforce


SurrogateConfig = Annotated[Surrogate, Field(discriminator="kind")]


@dataclass(frozen=True)
class NoCorrection:
    """No correction: sampler and trainer are taken to compute the same log-probs."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["none"] = "none"


@dataclass(frozen=True)
class TruncatedImportance:
    """Each token is weighted by w = p_proximal / p_sampler, truncated to [floor, cap]; the ratio is to the proximal policy, the
    trainer's parameters before the first update (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"). With level `token` this is decoupled PPO (Hilton et al. 2022)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["truncated_importance"] = "truncated_importance"
    level: Level = "token"
    """token: w per token. sequence: the product over its sequence. geometric: the geometric mean over its sequence."""
    cap: Positive = 2.0
    """Upper bound of the weight, which has no gradient."""
    floor: NonNegative = 0.0


@dataclass(frozen=True)
class MaskedImportance:
    """Tokens with w = p_proximal / p_sampler outside [low, high] get weight 0 (IcePop, MIS). They stay in the denominators of
    means."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["masked_importance"] = "masked_importance"
    level: Level = "token"
    low: NonNegative = 0.5
    high: Positive = 5.0
    weight: Literal["level", "token", "one"] = "level"
    """Weight of the kept tokens: the tested w (level), the token's own w (token), or 1 (one)."""


@dataclass(frozen=True)
class SecondMoment:
    """Tokens with the largest (log p_proximal - log p_sampler)^2 are dropped until the mean over the rest is at most `threshold`
    (M2PO; Zheng et al. 2025, "Prosperity before collapse")."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["second_moment"] = "second_moment"
    threshold: Positive = 0.04


@dataclass(frozen=True)
class AutoCorrection:
    """`truncated_importance` if the sampler's weights or cache are quantized, else `none`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["auto"] = "auto"


Correction = NoCorrection | TruncatedImportance | MaskedImportance | SecondMoment


CorrectionConfig = Annotated[Correction | AutoCorrection, Field(discriminator="kind")]


@dataclass(frozen=True)
class KlConfig:
    """weight * the per-token estimate of KL(policy || other), with d = log p - log p_other."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["k1", "k2", "k3", "k3_plus", "full"] = "k3"
    """k1: d. k2: d^2 / 2. k3: e^-d - 1 + d. k3_plus: the value of k3 with the gradient of k2. full: exact, over the vocabulary."""
    weight: NonNegative = 0.0
    to: Literal["reference", "behavior"] = "reference"
    times: Literal["one", "score", "ratio"] = "one"
    """Factor that makes the gradient of k1 and k3 unbiased. score: times p / sg(p), 1 with the score's gradient (NeMo-RL). ratio:
    times the ratio with its gradient (DeepSeek-V3.2). In a first update on fresh data the two are equal."""
    max_difference: Positive | None = None
    """First clips d to +- this (verl 20)."""
    max_value: Positive | None = None
    """Clips the estimate, after the factor `times`, to +- this (verl 10)."""


@dataclass(frozen=True)
class CriticLoss:
    """weight * 1/2 max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2), normalized as the policy's term is."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    weight: NonNegative = 1.0
    clip: Positive | None = 0.5


@dataclass(frozen=True)
class PolicyGradient:
    """surrogate(ratio, advantage) * correction weight + KL - entropy; all parts are averaged by the same weights."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["policy_gradient"] = "policy_gradient"
    ratio: Literal["token", "sequence", "sequence_token", "product"] = "token"
    """p / p_anchor. token: per token. sequence: geometric mean over the sequence (GSPO). sequence_token: that value with each
    token's own gradient (GSPO-token). product: over the sequence (TRL's RLOO)."""
    anchor: Literal["auto", "behavior", "proximal"] = "auto"
    """behavior: as captured while sampling. proximal: the trainer's own before the first update. auto: proximal with a
    correction, else behavior."""
    surrogate: SurrogateConfig = field(default_factory=Clip)
    correction: CorrectionConfig = field(default_factory=AutoCorrection)
    """Correction of the mismatch between the sampler's and the trainer's log-probs."""
    aggregation: Aggregation = "token"
    """Average of the loss over the whole minibatch. token: over tokens (DAPO). sequence: over the tokens of a sequence, then
    sequences (GRPO). constant: a sequence's sum / `length`, over sequences (Dr. GRPO). sequence_sum: a sequence's sum, over
    sequences. token_sum: no average. prompt: over the tokens of a group, then groups."""
    length: Count | None = None
    """Divisor of `constant`; None: rollout.max_new_tokens."""
    shaping: Positive | None = None
    """gamma: rows of an earlier step or of a file, and tokens of hints that are trained on, have -A r / (r + gamma) in place of the
    surrogate, r to their captured log-probs (of hints: to 0), neither clipped nor corrected (LUFFY, arXiv 2504.14945, eq. 8;
    ExGRPO, arXiv 2510.02245; both 0.1). None: as all others."""
    kl: KlConfig = field(default_factory=KlConfig)
    entropy: NonNegative = 0.0
    """Weight of the entropy bonus: exact, of the distribution that each token was sampled from."""
    critic: CriticLoss = field(default_factory=CriticLoss)
    """Used with the advantage `gae` only."""

    @property
    def reads_reference_logprobs(self) -> bool:
        return self.kl.weight > 0 and self.kl.to == "reference" and self.kl.kind != "full"


@dataclass(frozen=True)
class CrossEntropy:
    """-log p of the tokens in the loss mask."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["cross_entropy"] = "cross_entropy"
    reads_reference_logprobs: ClassVar[bool] = False


@dataclass(frozen=True)
class Dpo:
    """-log sigmoid(beta ((log p - log p_ref) of the best - that of the worst)), sequences summed (Rafailov et al. 2023, eq. 7)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    reads_reference_logprobs: ClassVar[bool] = True


@dataclass(frozen=True)
class Distillation:
    """Exact KL(policy || reference) over the vocabulary, on the policy's own samples (on-policy distillation)."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["distillation"] = "distillation"
    reads_reference_logprobs: ClassVar[bool] = False


@dataclass(frozen=True)
class OwnLoss(OwnPart):
    """A custom function of scores and batch that returns one term per token; the package averages them. A bare "module:name" is one
    without options."""

    aggregation: Aggregation = "token"
    """As in `policy_gradient`."""
    length: Count | None = None
    """Divisor of `constant`; None: rollout.max_new_tokens."""
    columns: tuple[Literal["reference_logprobs", "proximal_logprobs"], ...] = ()
    """Optional columns of the batch that it reads."""
    own_columns: tuple[str, ...] = ()
    """Columns that it defines, each "module:name": a function of groups and scores to [B C], or an `OwnColumn`."""

    arguments: ClassVar[tuple[str, ...]] = ("scores", "batch")

    @property
    def reads_reference_logprobs(self) -> bool:
        return "reference_logprobs" in self.columns

    def columns_made(self) -> list[Any]:
        """Return the objects named in `own_columns`. Raises UserError as `user_code.find` does."""
        return [user_code.find(name) for name in self.own_columns]

    def problems(self, place: str) -> list[str]:
        found = super().problems(place)
        for index, name in enumerate(self.own_columns):
            try:
                column = user_code.find(name)
            except UserError as error:
                found.append(f"{place}.own_columns.{index}: {error}")
                continue
            if not callable(getattr(column, "make", column)):
                what = f"which is a {type(column).__name__}; want a function of groups and scores, or an OwnColumn"
                found.append(f'{place}.own_columns.{index}: got "{name}", {what}')
                continue
            wrong = user_code.wrong_arguments(name, getattr(column, "make", column), {}, ("groups", "scores"))
            found += [f"{place}.own_columns.{index}{text}" for text in wrong]
        return found


LossConfig = Annotated[PolicyGradient | CrossEntropy | Dpo | Distillation | OwnLoss, Field(discriminator="kind")]


def resolve_correction(loss: LossConfig, weights: str, cache: str) -> Correction:
    """Return the correction with `auto` resolved by `rollout.engine.weights` and `.cache`; none if the loss has no correction."""
    if not isinstance(loss, PolicyGradient):
        return NoCorrection()
    if not isinstance(loss.correction, AutoCorrection):
        return loss.correction
    return NoCorrection() if weights == cache == "compute" else TruncatedImportance()


def anchored_on_proximal(loss: LossConfig, correction: Correction) -> bool:
    """Return whether the ratio is to the trainer's parameters before the first update on a batch, not to the behavior log-probs."""
    if not isinstance(loss, PolicyGradient):
        return False
    if loss.anchor == "auto":
        return not isinstance(correction, NoCorrection)
    return loss.anchor == "proximal"


def scores_proximal(loss: LossConfig, correction: Correction, updates: int) -> bool:
    """Return whether a batch needs proximal log-probs before its first update; a single update computes them itself."""
    if isinstance(loss, OwnLoss):
        return "proximal_logprobs" in loss.columns
    return isinstance(correction, SecondMoment) or (anchored_on_proximal(loss, correction) and updates > 1)

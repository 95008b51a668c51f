"""What an estimator of advantages is: its equation, the most that this can give, and what it does with equal rewards."""

from typing import TYPE_CHECKING, ClassVar

from jaxrl_llm.objective.outcome import Estimate, Group, Outcome

if TYPE_CHECKING:
    from jaxrl_llm.types import Credit, Groups, Scores


class Estimator:
    """The base of the published ones, each a frozen dataclass whose fields are its numbers."""

    kind: str
    compares_a_group: ClassVar[bool] = True
    """A group of one has nothing to be compared with."""
    reads_the_batch: ClassVar[bool] = False
    """Its statistics are over all groups, so that leaving one out changes the others."""
    gives_what_is_to_come: ClassVar[bool] = False
    """A token gets the rewards that are still to come."""
    leaves_zeros_out: ClassVar[bool] = False
    """A row whose advantages are all 0 takes no part in the loss."""
    reads_reference_logprobs: ClassVar[bool] = False

    def __call__(self, groups: "Groups", scores: "Scores | None" = None) -> "Credit":
        """What each token was worth, where each grader weighs 1 and no KL is taken from rewards."""
        # Configs hold estimators, and are read before JAX is loaded.
        from jaxrl_llm.objective.credit import UNSCORED, of_estimator

        return of_estimator(self, groups, UNSCORED if scores is None else scores)

    def estimate(self, outcome: Outcome) -> Estimate:
        """Advantages, and returns where there is a critic, of the groups that count."""
        raise NotImplementedError

    def bound(self, score: Group, outcome: Outcome) -> float:
        """The largest |advantage| that the formula allows. `score`: the rewards of the groups that count, one at least."""
        raise NotImplementedError

    def of_equal_rewards(self, graders: int) -> str:
        """Why a group of equal rewards has advantages other than 0; "" where it has none. `graders`: how many there are."""
        return ""

"""What a limit of completion tokens has to leave room for under a control. Imports no jax."""

from jaxrl_llm.control.automaton import TokenAutomaton


def limit_problem(limit: int, automaton: TokenAutomaton, budget: int) -> str:
    """Return what is wrong with a limit, as "got X, want Y: why"; "" if every row can end within it.

    Args:
        limit: maximum completion tokens.
        automaton: of the control.
        budget: slot from which its states expire.
    """
    shortest, rest = int(automaton.distance[automaton.start]), automaton.expired_distance
    if limit < shortest:
        return f"got {limit}, want at least {shortest}: the control allows no response of fewer tokens"
    if budget < limit < budget + rest:
        return (
            f"got {limit}, want at least {budget + rest}: the control's budget is {budget} tokens, and what follows it takes "
            f"{rest} at least"
        )
    return ""

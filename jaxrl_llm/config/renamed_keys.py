"""Keys of the config that were renamed, so that an old config or command is answered with the new name."""

from collections.abc import Sequence

RENAMED = {
    "rollout.support": "rollout.max_kept_tokens",
    "rollout.engine.in_flight": "rollout.engine.max_concurrent_prompts",
    "rollout.engine.shared_by": "rollout.engine.rows_per_prompt_cache",
    "rollout.engine.segment": "rollout.engine.decode_chunk",
}
"""Old path -> new path, of a value or of a section."""


def new_name(path: Sequence[str]) -> str | None:
    """The new path of a key that was renamed, or that stands in a section that was renamed; None for any other."""
    for n in range(1, len(path) + 1):
        if new := RENAMED.get(".".join(path[:n])):
            return ".".join([new, *path[n:]])
    return None

"""YAML text to a value: repeated keys are reported, 1e-5 is a number, and small text cannot make a huge value."""

import re
from typing import Any

import yaml

# Limit of values in a config, with every alias expanded.
MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """Collects the keys that a mapping repeats."""

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated_keys: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                where = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                self.repeated_keys.append(f"the key {key.value!r} appears twice, want it once: {where}")
            seen.append(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 requires a dot in a float.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the value, and an error message for each repeated key. Raises ValueError with a message of one line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, []
            if _count_nodes(node, {}, set()) > MAX_NODES:
                raise ValueError(f"its aliases expand to more than {MAX_NODES:,} values")
            return loader.construct_document(node), loader.repeated_keys
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _count_nodes(node: yaml.Node, counts: dict[int, int], ancestors: set[int]) -> int:
    """Number of values with every alias expanded. Raises ValueError for a value that contains itself."""
    if id(node) in ancestors:
        raise ValueError(f"an alias is inside the value that it names: line {node.start_mark.line + 1}")
    if id(node) not in counts:
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else inside
        counts[id(node)] = 1 + sum(_count_nodes(part, counts, ancestors | {id(node)}) for part in parts)
    return counts[id(node)]

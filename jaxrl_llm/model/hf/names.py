"""Map from Hugging Face tensor names to parameters, as data: each tensor is a block of a leaf, with a given order of dimensions.

Dimensions have one letter each: l layer, d model, k key/value head, g query head within its key/value head, h head dim, c gate or
up, f MLP width, e expert, v vocabulary. The leaf `qkv` is "dkgh"; a dimension of a tensor is a product of these, row-major: the
rows of q_proj are "kgh". A piece can have fixed dimensions: k_proj is the block g = G of its leaf. Loading, checking and exporting
each iterate over the pieces.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxrl_llm.model.params import ParamSpec
from jaxrl_llm.types import PyTree

At = Mapping[str, int | range]


class Piece(NamedTuple):
    """One tensor of a file."""

    tensor: str
    dims: tuple[str, ...]
    """For each dimension of the tensor, the leaf's dimensions whose product it is."""
    at: At
    """Its block of the leaf: an index along a dimension that the tensor lacks, or a range along one that it has."""


class Leaf(NamedTuple):
    """One leaf of the parameter tree and the tensors that it consists of."""

    path: tuple[str | int, ...]
    spec: ParamSpec
    dims: str
    pieces: tuple[Piece, ...]

    def size(self, letter: str) -> int:
        return self.spec.shape[self.dims.index(letter)]

    def shape(self, piece: Piece) -> tuple[int, ...]:
        """Return the tensor's shape."""
        size = lambda letter: len(piece.at[letter]) if letter in piece.at else self.size(letter)  # noqa: E731
        return tuple(math.prod(size(letter) for letter in dim) for dim in piece.dims)


# (suffix of the name, dims, at)
Entry = tuple[str, str, At]


def _layer_entries(layer: Mapping[str, ParamSpec], fused: bool) -> dict[str, tuple[str, list[Entry]]]:
    """Return each leaf's dimensions and tensors by the leaf's name, for one layer."""
    group = layer["qkv"].shape[-2] - 2
    heads: list[tuple[str, str, At]] = [
        ("q_proj", "kgh", {"g": range(group)}),
        ("k_proj", "kh", {"g": group}),
        ("v_proj", "kh", {"g": group + 1}),
    ]
    sandwich = "attn_out_norm" in layer
    found = {
        "attn_norm": ("d", [("input_layernorm.weight", "d", {})]),
        "attn_out_norm": ("d", [("post_attention_layernorm.weight", "d", {})]),
        "mlp_norm": ("d", [(f"{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.weight", "d", {})]),
        "mlp_out_norm": ("d", [("post_feedforward_layernorm.weight", "d", {})]),
        "q_norm": ("h", [("self_attn.q_norm.weight", "h", {})]),
        "k_norm": ("h", [("self_attn.k_norm.weight", "h", {})]),
        "qkv": ("dkgh", [(f"self_attn.{name}.weight", f"{rows} d", at) for name, rows, at in heads]),
        "qkv_bias": ("kgh", [(f"self_attn.{name}.bias", rows, at) for name, rows, at in heads]),
        "out": ("kghd", [("self_attn.o_proj.weight", "d kgh", {})]),
        "gate_up": ("cdf", [("mlp.gate_proj.weight", "f d", {"c": 0}), ("mlp.up_proj.weight", "f d", {"c": 1})]),
        "gate": ("df", [("mlp.gate_proj.weight", "f d", {})]),
        "up": ("df", [("mlp.up_proj.weight", "f d", {})]),
        "down": ("fd", [("mlp.down_proj.weight", "d f", {})]),
        "router": ("de", [("mlp.gate.weight", "e d", {})]),
    }
    if "router" in layer:
        found |= _expert_entries(layer["router"].shape[-1], fused)
    return {name: found[name] for name in layer}


def _expert_entries(experts: int, fused: bool) -> dict[str, tuple[str, list[Entry]]]:
    """Return the experts' leaves: one tensor per expert and matrix, as in published checkpoints, or, `fused`, one for all experts,
    as in transformers 5."""
    if fused:
        return {
            "gate_up": ("cedf", [("mlp.experts.gate_up_proj", "e cf d", {})]),
            "down": ("efd", [("mlp.experts.down_proj", "e d f", {})]),
        }
    name = lambda e, matrix: f"mlp.experts.{e}.{matrix}_proj.weight"  # noqa: E731
    matrices = [(name(e, m), "f d", {"c": c, "e": e}) for e in range(experts) for c, m in enumerate(("gate", "up"))]
    return {
        "gate_up": ("cedf", matrices),
        "down": ("efd", [(name(e, "down"), "d f", {"e": e}) for e in range(experts)]),
    }


def leaves(tree: PyTree, prefix: str = "model.", fused: bool = False) -> list[Leaf]:
    """Return every leaf of `specs(cfg)`, stacked or unstacked, with its tensors.

    Args:
        tree: `specs(cfg)`.
        prefix: prefix of every name except the head's.
        fused: the experts of a layer are one tensor.
    """
    stacked = isinstance(tree["layers"], Mapping)
    found = [_leaf(("embed",), tree["embed"], "vd", [(f"{prefix}embed_tokens.weight", "v d", {})])]
    for index, layer in enumerate([tree["layers"]] if stacked else tree["layers"]):
        for name, (dims, entries) in _layer_entries(layer, fused).items():
            if stacked:
                path, dims = ("layers", name), f"l{dims}"
                depth = range(layer[name].shape[0])
                numbered = [(i, (s, dims, {"l": i, **at})) for i in depth for s, dims, at in entries]
            else:
                path, numbered = ("layers", index, name), [(index, entry) for entry in entries]
            named = [(f"{prefix}layers.{i}.{suffix}", dims, at) for i, (suffix, dims, at) in numbered]
            found.append(_leaf(path, layer[name], dims, named))
    found.append(_leaf(("final_norm",), tree["final_norm"], "d", [(f"{prefix}norm.weight", "d", {})]))
    if "head" in tree:
        found.append(_leaf(("head",), tree["head"], "vd", [("lm_head.weight", "v d", {})]))
    return found


def _leaf(path: tuple[str | int, ...], spec: ParamSpec, dims: str, entries: list[Entry]) -> Leaf:
    return Leaf(path, spec, dims, tuple(Piece(name, tuple(dims.split()), at) for name, dims, at in entries))


def tensors(found: list[Leaf]) -> Iterator[tuple[str, Leaf, Piece]]:
    """Yield every tensor's name with its leaf and piece."""
    for leaf in found:
        for piece in leaf.pieces:
            yield piece.tensor, leaf, piece

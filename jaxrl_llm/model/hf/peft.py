"""Adapters to a directory that PEFT loads: adapter_config.json and adapter_model.safetensors, in the form of PEFT 0.21."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.model.hf.config import read_json
from jaxrl_llm.model.hf.export import whole
from jaxrl_llm.model.lora import MODULES, Adapted
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import PyTree

# Where a decoder layer has the module, in all families that have adapters here.
BLOCKS = {**dict.fromkeys("qkvo", "self_attn"), **dict.fromkeys(("gate", "up", "down"), "mlp")}


def export_adapter(
    params: PyTree, lora: LoraConfig, base: str | Path, directory: str | Path, *, source: Path | None = None
) -> None:
    """Write the adapters of `params` (layers stacked; on any mesh) as `directory`, whole or not at all, f32 as they are trained.

    `base` is the model that they stand beside, as PEFT is to find it, `source` the directory it was read from. Every process calls
    this; the first one writes. Raises UserError where the directory has something in it, or of the model in `source` the text part
    alone was read: there its modules have other names.
    """
    if source is not None and "text_config" in read_json(source / "config.json"):
        raise UserError(
            f"{source}: got a model of which the text part alone is trained, want the merged model: leave out --adapter"
        )
    tensors = dict(_tensors(hosts.gather({name: params["layers"][name].pairs for name in _adapted(params)})))
    with whole(Path(directory), {"adapter_config.json": _config(lora, base)}) as building:
        if building is not None:
            save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(params: PyTree) -> list[str]:
    return [name for name, x in params["layers"].items() if isinstance(x, Adapted)]


def _tensors(pairs: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """PEFT's names and matrices: A [rank, inputs] and B [outputs, rank], a layer each."""
    for of_leaf in pairs.values():
        for name, pair in of_leaf.items():
            depth, rank = len(pair.a), pair.a.shape[-1]
            a = pair.a.reshape(depth, -1, rank).swapaxes(1, 2)
            b = pair.b.reshape(depth, rank, -1).swapaxes(1, 2)
            for layer in range(depth):
                module = f"base_model.model.model.layers.{layer}.{BLOCKS[name]}.{name}_proj"
                yield f"{module}.lora_A.weight", np.ascontiguousarray(a[layer])
                yield f"{module}.lora_B.weight", np.ascontiguousarray(b[layer])


def _config(lora: LoraConfig, base: str | Path) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name}_proj" for name in MODULES if name in lora.targets],
        "inference_mode": True,
    }

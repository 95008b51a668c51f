"""Export of adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors, in the form of PEFT 0.21."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.model.hf.config import read_json
from jaxrl_llm.model.hf.export import atomic_directory
from jaxrl_llm.model.lora import MODULES, Adapted
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import PyTree

# The block of a decoder layer that contains each module, in all families that support adapters.
BLOCKS = {**dict.fromkeys("qkvo", "self_attn"), **dict.fromkeys(("gate", "up", "down"), "mlp")}


def export_adapter(
    params: PyTree, lora: LoraConfig, base: str | Path, directory: str | Path, *, source: Path | None = None
) -> None:
    """Write adapters to `directory`, atomically, in f32. Every process calls this; the first one writes.

    Args:
        params: parameters with adapters, layers stacked; on any mesh.
        lora: the config of the adapters.
        base: path or hub name under which PEFT finds the base model.
        directory: new or empty.
        source: directory that the base model was loaded from.

    Raises:
        UserError: the directory is not empty, or only the text part of the model in `source` was loaded: there its modules have
            other names.
    """
    if source is not None and "text_config" in read_json(source / "config.json"):
        raise UserError(
            f"{source}: got a model of which only the text part is trained, want the merged model: leave out --adapter"
        )
    tensors = dict(_tensors(hosts.gather({name: params["layers"][name].pairs for name in _adapted(params)})))
    with atomic_directory(Path(directory), {"adapter_config.json": _config(lora, base)}) as building:
        if building is not None:
            save_file(tensors, building / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(params: PyTree) -> list[str]:
    return [name for name, x in params["layers"].items() if isinstance(x, Adapted)]


def _tensors(pairs: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Yield PEFT's names and matrices: A [rank, inputs] and B [outputs, rank] of each layer."""
    for modules in pairs.values():
        for name, pair in modules.items():
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

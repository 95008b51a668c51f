"""`jaxrl export`: the newest checkpoint of a run as a Hugging Face directory, or its adapters as a PEFT directory."""

from functools import partial
from pathlib import Path

import jax

from jaxrl_llm.commands.loaded_policy import prepare_sampling, restore_params, with_batch
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import CheckpointError, UserError
from jaxrl_llm.model import lora
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.model.hf.export import ConfigFiles, export
from jaxrl_llm.model.hf.peft import export_adapter
from jaxrl_llm.model.hf.source import resolve as resolve_model
from jaxrl_llm.model.params import policy_params, shardings
from jaxrl_llm.types import PyTree


def export_run(cfg: RunConfig, out: Path, dtype: str | None, adapter: bool = False) -> Path:
    """Write the newest checkpoint to the directory `out`, and return it.

    Args:
        dtype: of the written model; None: `model.compute`.
        adapter: write only the adapters, for PEFT. By default they are merged into the model.

    Raises:
        CheckpointError: the run has no checkpoint.
        UserError: adapters were asked for, and the checkpoint has none.
    """
    setup = prepare_sampling(with_batch(cfg, 1, 1))
    blueprint, task = setup.blueprint, setup.task
    restored = restore_params(blueprint)
    if restored is None:
        raise CheckpointError(f"{cfg.run_dir}: got no checkpoint, want a run directory that holds one")
    source = resolve_model(cfg.model.path) if isinstance(cfg.model, PretrainedModel) else None
    files = ConfigFiles(source, eos=task.eos, pad=task.pad)
    params, dtype = policy_params(restored.params, blueprint.model), dtype or blueprint.model.compute

    def write(params: PyTree, directory: Path) -> None:
        export(params, blueprint.model, directory, dtype, files, save_tokenizer=task.tokenizer.save)

    if not adapter:
        merge = jax.jit(partial(lora.merge, dtype=dtype), out_shardings=shardings(blueprint.specs, blueprint.train))
        write(merge(params) if cfg.lora.rank else params, out)
        return out
    if not cfg.lora.rank or not restored.in_rl:
        raise UserError("--adapter: got a checkpoint without adapters, want one of RL with lora.rank above 0")
    base_is_new = source is None or cfg.warm_start.steps > 0
    export_adapter(params, cfg.lora, (out / "base").resolve() if base_is_new else cfg.model.path, out, source=source)
    if base_is_new:
        # The base model exists nowhere else.
        write(lora.without_adapters(params), out / "base")
    return out

"""docs/notebook.md: its loop runs as it stands there, and on the arithmetic task it does what `jaxrl train` does."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from row_graders import odd
from setups import layouts, make_params
from tokenizer_setup import save_tokenizer

import jaxrl_llm as rl
from jaxrl_llm.config.loading import validate
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.model.hf.export import export
from jaxrl_llm.roles.build import make_keys
from jaxrl_llm.update.optimizer.transform import make_optimizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
LOOP, SMALL, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
STEPS = 3


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with each old part, which must be there once, replaced."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def records(printed: str) -> list[list[float]]:
    return [list(map(float, line.split())) for line in printed.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of the Hugging Face layout, and 40 problems."""
    place = tmp_path_factory.mktemp("notebook")
    cfg = rl.ModelConfig(vocab_size=320, layers=1, d_model=32, heads=4, kv_heads=2, head_dim=8, d_mlp=64, qk_norm=True)
    export(
        make_params(cfg, layouts()[0], sharpness=1.0), cfg, place / "model", "float32", save_tokenizer=save_tokenizer
    )
    rows = [{"question": f"What is {i} + 1?", "solution": str(i + 1)} for i in range(40)]
    (place / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def test_the_loop_of_the_page_runs_as_it_stands_there(place, capsys):
    """Changed: model path, data file, sizes and number of steps. This untrained model is never right, so no
    group has a signal: that it learns is the other test's."""
    text = changed(
        LOOP, ('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(place / "model"))),
        ('"problems.jsonl"', repr(str(place / "problems.jsonl"))),
        ("held_out=200", "held_out=8"), ("prompts=64, samples=8, max_new_tokens=512", "prompts=8, samples=4, max_new_tokens=8"),
        ("micro_batches=8", "micro_batches=2"), ("rng, 64)", "rng, 8)"), ("range(100)", f"range({STEPS})"),
    )  # fmt: skip
    exec(text, notebook := {})
    found = records(capsys.readouterr().out)
    np.testing.assert_array_equal(found, [[step, 0, np.nan, np.nan] for step in range(STEPS)])
    assert notebook["policy"].version == STEPS == notebook["state"].step
    # The second half of the page, on the same values: other texts, held-out rows, a directory for transformers.
    looking = re.search(r"^```python\n(rollouts = engine.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
    exec(changed(looking, ('"mine-trained"', repr(str(place / "trained")))), notebook)
    assert "Estimate(" in capsys.readouterr().out
    again = rl.load_model(place / "trained", notebook["mesh"])
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(notebook["state"].params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b).astype(jax.numpy.bfloat16).astype(np.float32))


def test_what_the_page_computes_per_group_is_right_for_groups_of_any_size():
    """Groups of 3, 1 and 4 rows: rewards less means of 1, 3 and 2; two minibatches, of two groups and of one."""
    groups = SimpleNamespace(
        reward=np.float32([0, 1, 2, 3, 1, 1, 2, 4]),
        failure=np.zeros(3),
        keep=np.ones(8, bool),
        rollouts=SimpleNamespace(prompt=np.repeat(np.arange(3), [3, 1, 4])),
        replace=lambda keep: keep,
    )
    blocks, kept = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL), []
    names = {"np": np, "groups": groups, "state": None, "rng": np.random.default_rng(0)}
    names |= {"rl": SimpleNamespace(make_batch=lambda keep, credit: keep)}
    names |= {"update": lambda state, batch: (state, kept.append(batch))}
    exec(next(block for block in blocks if block.startswith("prompt = groups")), names)
    assert names["credit"].tolist() == [-1, 0, 1, 0, -1, -1, 0, 2]
    exec(next(block for block in blocks if block.startswith("for part in")), names)
    # Each row once, and no group in two.
    np.testing.assert_array_equal(np.sum(kept, axis=0), np.ones(8))
    assert sorted(len(set(groups.rollouts.prompt[rows])) for rows in kept) == [1, 2]


# As the loop: one update per step, no warm start, mean over tokens; a reward with a signal for an untrained model.
RUN = {
    "seed": 3,
    "steps": STEPS,
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "model": {"layers": 1, "d_model": 32, "d_mlp": 32},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 4},
    "reward": "row_graders:odd",
    "experience": {"filter": "has_signal"},
    "objective": {"loss": "page_loss:loss"},
    "update": {"micro_batches": 2, "packing": {"kind": "shared_prefix"}, "optimizer": {"lr": 0.03}},
    "evaluation": {"every": 100},
    "metrics": {"tensorboard": False, "samples_every": 0},
}


def test_the_small_model_and_its_task():
    found = {"rl": rl, "mesh": rl.make_mesh(fsdp=-1)}
    exec(SMALL, found)
    assert len(found["task"].train) == 1000 - 128 and found["task"].train[0].answer.endswith("#")


@pytest.mark.soak
def test_the_loop_gets_the_rewards_of_a_run_step_by_step(tmp_path, capsys, monkeypatch):
    """Exactly, and the gradients too: from one seed both draw the same prompts, initial parameters and noise, and the same programs
    compute them on the same batches. The run names the page's loss as its own."""
    source = "import jax.numpy as jnp\n\n" + re.search(r"^def loss.*?(?=\n\n)", LOOP, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "page_loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = validate(RUN | {"run_dir": str(tmp_path / "run")}, "test")
    rl.train.train(cfg)
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    model = "rl.load_model(rl.ModelConfig(layers=1, d_model=32, d_mlp=32), mesh, seed=3)"
    small = changed(SMALL, ("rl.load_model(rl.ModelConfig(layers=2, d_model=64), mesh)", model))
    small = changed(
        small,
        ("rl.ArithmeticTask(terms=3), model.tokenizer", "rl.ArithmeticTask(terms=2, held_out=8), model.tokenizer, 3"),
    )
    text = changed(
        re.sub(r"^(model|task) .*\n", "", LOOP, flags=re.MULTILINE),
        ("mesh  = rl.make_mesh(fsdp=-1)\n", f"mesh  = rl.make_mesh(fsdp=-1)\n{small}"),
        ("prompts=64, samples=8, max_new_tokens=512", "prompts=8, samples=4, max_new_tokens=4"),
        ("rl.filters.chain(rl.filters.has_signal, long_enough)", "rl.filters.chain(rl.filters.has_signal)"),
        ("micro_batches=8", "micro_batches=2"), ("optax.adamw(1e-6)", "optimizer"),
        ("rl.curricula.Uniform()", "rl.curricula.Uniform(seed=3)"), ("jax.random.key(0)", "key"),
        ("rng, 64)", "rng, 8)"), ("range(100)", f"range({STEPS})"),
        ('float(sample.completion.split("####")[-1].strip() == sample.answer)', "odd(sample)"),
    )  # fmt: skip
    capsys.readouterr()
    exec(text, {"odd": odd, "key": make_keys(3).train, "optimizer": make_optimizer(cfg.update.optimizer)})
    found = records(capsys.readouterr().out)
    assert found == [[n, row["reward"], row["ratio/max"], row["grad_norm"]] for n, row in enumerate(rows)]
    # The policy changes, and with it what is sampled.
    assert len(rows) == STEPS == len({row["reward"] for row in rows})

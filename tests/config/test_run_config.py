"""The config: YAML to values, every error at once and in words, and what a mesh cannot do said before anything compiles."""

import dataclasses
from pathlib import Path

import pytest

from jaxrl_llm.cli import read_config
from jaxrl_llm.config import run_config
from jaxrl_llm.config.run_config import (
    EvaluationConfig,
    RunConfig,
    changes,
    dump,
    load,
    problems,
    to_dict,
    training_problems,
)
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import ModelConfig, PretrainedModel
from jaxrl_llm.model.hf.config import read_config as read_model_config
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import Clip, CrossEntropy, KlConfig, PolicyGradient
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer
from jaxrl_llm.update.config import UpdateConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes) -> RunConfig:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return read


@pytest.fixture
def refuse(read, tmp_path):
    """The lines of the error, without the file's name, which each must begin with."""

    def refuse(text: str | bytes) -> list[str]:
        with pytest.raises(UserError) as error:
            read(text)
        assert error.value.exit_code == 2
        lines = str(error.value).splitlines()
        assert lines[0].startswith(f"{tmp_path}/c.yaml: ")
        return [line.removeprefix(f"{tmp_path}/c.yaml: ") for line in lines]

    return refuse


# Chips that a config's header names, and the model's numbers, which its own directory would tell.
MEANT_FOR = {
    "qwen2.5-0.5b_gsm8k": (1, "Qwen2.5-0.5B"),
    "qwen3-1.7b_gsm8k": (8, "Qwen3-1.7B"),
    "llama3.1-8b_gsm8k": (8, "Llama-3.1-8B"),
    "qwen3-8b_gsm8k": (64, "Qwen3-8B"),
    "qwen3-30b-a3b_gsm8k": (32, "Qwen3-30B-A3B"),
    "llama3-70b_gsm8k": (512, "Llama-3-70B"),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configs_of_the_repository_load(path):
    cfg = load(path)
    devices, shape = MEANT_FOR.get(path.stem, (1, None))
    model = read_model_config(ROOT / "benchmarks/shapes" / shape) if shape else cfg.model
    assert problems(dataclasses.replace(cfg, model=model), devices) + training_problems(cfg) == []
    assert load(path) == cfg and path.read_text().startswith("#")


def test_there_are_configs():
    assert CONFIGS


def test_defaults_alone_work():
    assert problems(RunConfig(), 1) == problems(RunConfig(), 8) == []


@pytest.mark.parametrize(
    "text, lines",
    [
        ("stpes: 3", ["stpes: no such key, perhaps you meant steps"]),
        ("model: {vocab_sise: 16}", ["model.vocab_sise: no such key, perhaps you meant model.vocab_size"]),
        (
            "update: {optimizer: {lrr: 0.1}}",
            ["update.optimizer.lrr: no such key, perhaps you meant update.optimizer.lr"],
        ),
        (
            "objective: {loss: {surrogate: {hihg: 1}}}",
            ["objective.loss.surrogate.hihg: no such key, perhaps you meant objective.loss.surrogate.high"],
        ),
        ("zzzzz: 1", ["zzzzz: no such key"]),
        (
            "reward: {graders: [{grader: numeric, wieght: 2}]}",
            ["reward.graders.0.wieght: no such key, perhaps you meant reward.graders.0.weight"],
        ),
        (
            "steps: many",
            ["steps: got 'many', want a whole number"],
        ),
        ("steps: -1", ["steps: got -1, want 0 or more"]),
        (
            "rollout: {temperature: -1}",
            ["rollout.temperature: got -1, want 0 or more"],
        ),
        ("model: 3", ["model: got 3, want a section, as {key: value}"]),
        (
            "experience: {filter: 3}",
            ["experience.filter: got 3, want text, or a section, as {key: value}"],
        ),
        ("task: {kind: file}", ["task.path: got nothing, want a value"]),
        ("update: {optimizer: {lr: .nan}}", ["update.optimizer.lr: got nan, want a finite number"]),
        ("1: 2", ["1: got 1, want a name as key"]),
        ("", ["got an empty file, want section: values"]),
        ("# only a comment", ["got an empty file, want section: values"]),
        ("- 1", ["got list, want section: values"]),
        ("words", ["got str, want section: values"]),
    ],
)
def test_what_is_wrong_is_said(refuse, text, lines):
    assert refuse(text) == lines


def test_an_unknown_kind_names_the_kinds_there_are(refuse):
    assert refuse("task: {kind: arithmatic}") == [
        "task.kind: got 'arithmatic', want one of arithmetic, file, reasoning_gym; perhaps you meant arithmetic"
    ]
    assert refuse("task: {terms: 2}") == ["task.kind: got nothing, want one of arithmetic, file, reasoning_gym"]
    assert refuse("update: {optimizer: {kind: 3}}") == [
        "update.optimizer.kind: got 3, want one of adamw, adafactor, lion, muon"
    ]
    (line,) = refuse("objective: {loss: {surrogate: {kind: clop}}}")
    assert line.startswith("objective.loss.surrogate.kind: got 'clop', want one of clip, cispo, ")
    (line,) = refuse("objective: verl:gropo")
    assert line.startswith("objective.preset: got 'verl:gropo', want one of paper:reinforce, paper:ppo, ")
    assert line.endswith("; perhaps you meant verl:grpo")


def test_what_hides_no_other_error(refuse):
    """A preset that there is not, a key twice, an unknown kind, a tokenizer of nothing: beside each, all the others."""
    text = (
        "seed: x\nsteps: 1\nsteps: 2\nmesh: {data: 1, data: 2, fsdp: 0}\ntokenizer: {chat: false}\n"
        "task: {kind: arithmatic}\nobjective: {preset: zzz, advantage: {eps: -1}, loss: {surrogate: {kind: clop}}}\n"
    )
    assert [line.split(": ")[0] for line in refuse(text)] == [
        "the key 'steps' stands twice, want it once",
        "the key 'data' stands twice, want it once",
        "seed",
        "task.kind",
        "mesh.fsdp",
        "objective.advantage.eps",
        "objective.loss.surrogate.kind",
        "objective.preset",
        "tokenizer.path",
    ]
    # What else is wrong is judged beside the preset that was meant: a cispo has no `dual`.
    lines = refuse("objective: {preset: paper:cisppo, loss: {surrogate: {dual: 3.0, low: -1}}}")
    assert [line.split(", ")[0] for line in lines] == [
        "objective.loss.surrogate.low: got -1",
        "objective.loss.surrogate.dual: no such key with kind cispo",
        "objective.preset: got 'paper:cisppo'",
    ]


def test_a_union_of_a_word_and_a_section_is_one_error(refuse):
    (line,) = refuse("rollout: {engine: {layout: wied}}")
    assert line.startswith("rollout.engine.layout: got 'wied', want 'replicated' or 'wide', or ")
    (line,) = refuse("rollout: {engine: {layout: {fsdp: 0}}}")
    assert line.startswith("rollout.engine.layout.fsdp: got 0, want ")


def test_a_key_of_another_kind_is_told_from_a_typo(refuse):
    assert refuse("update: {optimizer: {clip_rms: 2}}") == [
        "update.optimizer.clip_rms: no such key with kind adamw, only with adafactor"
    ]
    assert refuse("model: {path: m, layers: 3}") == ["model.layers: no such key beside path"]
    assert refuse("tokenizer: {alphabet: ab, chat: false}") == ["tokenizer.chat: no such key beside alphabet"]


def test_a_mesh_axis_of_zero_is_refused(refuse):
    assert refuse("mesh: {data: 0}") == ["mesh.data: got 0, want 1 or more, or -1 for what is left"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", ["not YAML", "line 1, column 5"]),
        ("seed: 1\nseed: 2", ["the key 'seed' stands twice, want it once: line 2, column 1"]),
        ("model: {layers: 1, layers: 2}", ["the key 'layers' stands twice, want it once: line 1, column 20"]),
        ("{[1, 2]: 3}", ["not YAML"]),
        ("seed: !!python/object/apply:os.getcwd []", ["not YAML", "could not determine a constructor"]),
        (b"seed: \xff", ["not YAML", "byte 0xff"]),
        (b"seed: \x00", ["not YAML", "#x0000"]),
    ],
)
def test_what_is_not_yaml_says_where(refuse, text, words):
    said = "\n".join(refuse(text))
    assert all(word in said for word in words), said


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nope.yaml: cannot be read: No such file or directory"):
        load(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_all_errors_come_at_once(refuse):
    text = "stpes: 3\nseed: x\nmodel: {layers: 0, headz: 2}\nobjective: {loss: {surrogate: {low: 2}}}\n"
    named = sorted(line.split(": ")[0] for line in refuse(text))
    assert named == ["model.headz", "model.layers", "objective.loss.surrogate.low", "seed", "stpes"]


def test_numbers_as_people_write_them(read):
    for text, want in (("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e+0", 1.5), ("3", 3.0), ("1.e-3", 1e-3), ("1_0e-1", 1.0)):
        lr = read(f"update: {{optimizer: {{lr: {text}}}}}").update.optimizer.lr
        assert lr == want and type(lr) is float, text
    # What only looks like a number stays a word.
    assert read("run_dir: 1e5x").run_dir == "1e5x"


def test_a_choice_is_a_type(read):
    assert read("task: {kind: arithmetic, terms: 2}").task == ArithmeticTask(terms=2)
    assert read("task: {kind: file, path: a, held_out_path: b}").task == FileTask("a", held_out_path="b")
    given = read("objective: {loss: {surrogate: {high: 0.28}}}").objective
    assert given.loss == PolicyGradient(surrogate=Clip(high=0.28))
    assert read("objective: {loss: {kind: cross_entropy}}").objective.loss == CrossEntropy()
    assert read("objective: {preset: verl:dapo, loss: {aggregation: sequence}}").objective.loss == PolicyGradient(
        surrogate=Clip(low=0.2, high=0.28, dual=10.0), aggregation="sequence"
    )


def test_a_pretrained_model_brings_its_tokenizer(read, refuse):
    cfg = read("model: {path: some/model}")
    assert cfg.model == PretrainedModel("some/model") and cfg.tokenizer == PretrainedTokenizer("some/model")
    assert read("model: {path: m}\ntokenizer: {system: Be brief.}").tokenizer == PretrainedTokenizer(
        "m", system="Be brief."
    )
    assert read("model: {path: m}\ntokenizer: {path: t}").tokenizer == PretrainedTokenizer("t")
    assert read("model: {path: m}\ntokenizer: {alphabet: ab}").tokenizer == CharacterTokenizer("ab")
    assert read("seed: 1").tokenizer == CharacterTokenizer("0123456789+<> #")
    assert read("tokenizer: {path: t}").tokenizer == PretrainedTokenizer("t")
    assert refuse("tokenizer: {chat: false}") == [
        "tokenizer.path: got nothing, want a directory, since model has no path either"
    ]
    assert refuse("model: {path: m, compute: int8}") == ["model.compute: got 'int8', want 'float32' or 'bfloat16'"]


def test_the_tokenizer_follows_the_model_that_is_evaluated(read):
    def of(text: str):
        return run_config.tokenizer_of(read(text), "other")

    assert of("model: {path: m}") == of("model: {path: m}\ntokenizer: {path: m}") == PretrainedTokenizer("other")
    assert of("model: {path: m}\ntokenizer: {path: t}") == PretrainedTokenizer("t")


@pytest.mark.parametrize(
    "text",
    [
        "seed: 3",
        "model: {path: m}\ntokenizer: {stop: [x], template: {a: 1}}",
        "task: {kind: file, path: a, held_out_path: b}",
        "update: {optimizer: {lr: 1e-5}}",
    ],
)
def test_a_config_survives_its_own_yaml(read, text):
    cfg = read(text)
    assert read(dump(cfg)) == cfg
    assert run_config.validate(to_dict(cfg), "again") == cfg


def overridden(tmp_path, *args: str, text: str = "seed: 3\nsteps: 7\n") -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_config(str(path), args)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    cfg = overridden(tmp_path, "--steps", "9", "--mesh.data", "-1", "--mesh.fsdp", "2", "--update.optimizer.lr", "3e-4")
    assert (cfg.seed, cfg.steps, cfg.mesh, cfg.update.optimizer.lr) == (3, 9, MeshConfig(-1, 2, 1), 3e-4)
    assert overridden(tmp_path) == load(tmp_path / "c.yaml")
    assert cfg.rollout == RolloutConfig()


def test_overrides_reach_into_a_chosen_kind(tmp_path):
    assert overridden(tmp_path, "--objective.loss.kl.weight", "0.1").objective.loss == PolicyGradient(
        kl=KlConfig(weight=0.1)
    )
    assert overridden(tmp_path, "--task.terms", "2").task == ArithmeticTask(terms=2)
    file = "task: {kind: file, path: a, held_out_path: b}"
    assert overridden(tmp_path, "--task.path", "c", text=file).task == FileTask("c", held_out_path="b")
    assert overridden(tmp_path, "--model.qk-norm", "True").model.qk_norm is True


def test_an_override_is_validated_too(tmp_path):
    with pytest.raises(UserError, match=r"^--update.optimizer.lr: got -1, want more than 0$"):
        overridden(tmp_path, "--update.optimizer.lr", "-1")


def test_a_run_directory_is_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: elsewhere\nseed: 5\n")
    cfg = read_config(str(tmp_path), [])
    assert (cfg.seed, cfg.run_dir) == (5, str(tmp_path))


def test_every_problem_of_an_impossible_mesh_is_listed():
    """8 devices cannot be 3 x 2 x 5; 5 divides nothing of the model; 3 * 2 = 6 rows' shards divide nothing either."""
    cfg = RunConfig(
        mesh=MeshConfig(3, 2, 5),
        model=ModelConfig(heads=3, kv_heads=2, head_dim=7, d_mlp=9, vocab_size=16),
        rollout=RolloutConfig(prompts=4),
        warm_start=run_config.WarmStartConfig(rows=8),
        update=UpdateConfig(minibatches=3),
    )
    assert problems(cfg, 8) == [
        "mesh: asked for data 3, fsdp 2, tensor 5, expert 1 (a product of 30), found 8 devices; "
        "the product must be 8, sizes that work on an axis: 1, 2, 4, 8",
        "model.heads: got 3, want a multiple of model.kv_heads (2)",
        "model.head_dim: got 7, want an even number (RoPE turns pairs)",
        "mesh.tensor: got 5, want a divisor of model.kv_heads (2): 1, 2",
        "mesh.tensor: got 5, want a divisor of model.d_mlp (9): 1, 3, 9",
        "mesh.tensor: got 5, want a divisor of model.vocab_size (16): 1, 2, 4, 8, 16",
        "rollout.prompts: got 4, want a multiple of mesh.data * mesh.fsdp * mesh.expert (6); 4 allows 1, 2, 4",
        "warm_start.rows: got 8, want a multiple of mesh.data * mesh.fsdp * mesh.expert (6); 8 allows 1, 2, 4, 8",
        "update.minibatches: got 3, want a divisor of rollout.prompts (4): 1, 2, 4",
    ]


def test_what_can_be_sampled_but_not_trained():
    assert training_problems(RunConfig()) == []
    cfg = RunConfig(rollout=RolloutConfig(samples=1, temperature=0), objective=ObjectiveConfig(loss=CrossEntropy()))
    assert problems(cfg, 1) == []
    assert training_problems(cfg) == [
        "rollout.temperature: got 0, want more: a policy that never explores learns nothing",
        "objective.advantage.kind: got grpo with rollout.samples 1, want 2 or more samples: a group of one has no mean of others",
        "objective.loss.kind: got cross_entropy, want one for RL: it uses no reward; warm_start is supervised",
    ]


def test_micro_batches_must_leave_rows_for_every_shard():
    """32 prompts of 8 in 4 minibatches: 64 rows. 8 shards leave 8 rows each."""
    cfg = RunConfig(update=UpdateConfig(minibatches=4, micro_batches=9))
    assert problems(cfg, 8) == [
        "update.micro_batches: got 9, want 8 at most: a minibatch has 64 rows, and each part takes one at least on each of 8 "
        "shards of mesh.data * mesh.fsdp * mesh.expert"
    ]
    assert problems(dataclasses.replace(cfg, update=UpdateConfig(minibatches=4, micro_batches=8)), 8) == []


def test_changes_names_what_a_resumption_may_not_change():
    saved = to_dict(RunConfig())
    assert changes(saved, to_dict(RunConfig())) == []
    may = RunConfig(
        run_dir="b", steps=5, mesh=MeshConfig(2, 2, 2), reward=dataclasses.replace(RunConfig().reward, workers=9)
    )
    assert changes(saved, to_dict(may)) == []
    scored = RunConfig(evaluation=EvaluationConfig(every=5, threshold=0.5))
    assert changes(saved, to_dict(scored)) == ["evaluation.threshold: 1.0 -> 0.5"]
    now = RunConfig(seed=1, rollout=RolloutConfig(temperature=0.5), objective=ObjectiveConfig(loss=CrossEntropy()))
    found = changes(saved, to_dict(now))
    assert [line for line in found if not line.endswith(" -> None")] == [
        "objective.loss.kind: 'policy_gradient' -> 'cross_entropy'",
        "rollout.temperature: 1.0 -> 0.5",
        "seed: 0 -> 1",
    ]


def test_a_field_that_an_older_run_did_not_have_is_a_change():
    saved = to_dict(RunConfig())
    del saved["seed"]
    assert changes(saved, to_dict(RunConfig())) == ["seed: None -> 0"]


def test_warm_start_and_rl_add_up():
    assert RunConfig(steps=10, warm_start=run_config.WarmStartConfig(steps=5)).total_steps == 15


def test_the_engine_must_fit_the_mesh_and_the_groups():
    """Two kv heads over 2 * 4 shards, a group of 8 in threes, and axes of its own for another number of devices."""
    cfg = RunConfig(mesh=MeshConfig(fsdp=4, tensor=2), model=ModelConfig(kv_heads=2, d_mlp=64))
    of = lambda **engine: problems(  # noqa: E731
        dataclasses.replace(cfg, rollout=RolloutConfig(engine=EngineConfig(**engine))), 8
    )
    assert of(layout=MeshConfig(fsdp=8)) == of(rows_per_prompt_cache=4) == of() == []
    assert of(layout="wide") == [
        "rollout.engine.layout: mesh.tensor: got 8, want a divisor of model.kv_heads (2): 1, 2"
    ]
    assert of(rows_per_prompt_cache=3) == [
        "rollout.engine.rows_per_prompt_cache: got 3, want a divisor of rollout.samples (8): 1, 2, 4, 8"
    ]
    (text,) = of(layout=MeshConfig(data=3, fsdp=1))
    assert text.startswith("rollout.engine.layout: mesh: asked for data 3") and "found 8 devices" in text


def test_a_truncated_draw_records_what_it_keeps():
    cfg = dataclasses.replace(RunConfig(), rollout=RolloutConfig(top_k=200, min_new_tokens=9))
    assert problems(cfg, 1) == [
        "rollout.top_k: got 200, want at most rollout.max_kept_tokens (128)",
        "rollout.min_new_tokens: got 9, want at most rollout.max_new_tokens (8)",
    ]

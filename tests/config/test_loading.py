"""YAML and flags to a RunConfig: every error at once, each by its name."""

import pytest

from jaxrl_llm.cli import read_config
from jaxrl_llm.config.loading import load, validate
from jaxrl_llm.config.run_config import RunConfig, to_dict
from jaxrl_llm.config.saved_config import to_yaml
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.objective.loss_config import Clip, CrossEntropy, KlConfig, PolicyGradient
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes) -> RunConfig:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return read


@pytest.fixture
def refuse(read, tmp_path):
    """Lines of the error without the name of the file, which begins each of them."""

    def refuse(text: str | bytes) -> list[str]:
        with pytest.raises(UserError) as error:
            read(text)
        assert error.value.exit_code == 2
        lines = str(error.value).splitlines()
        assert lines[0].startswith(f"{tmp_path}/c.yaml: ")
        return [line.removeprefix(f"{tmp_path}/c.yaml: ") for line in lines]

    return refuse


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
            ["experience.filter: got 3, want a section, as {key: value}"],
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
def test_error_messages(refuse, text, lines):
    assert refuse(text) == lines


def test_an_unknown_kind_lists_the_known_ones(refuse):
    assert refuse("task: {kind: arithmatic}") == [
        "task.kind: got 'arithmatic', want one of arithmetic, file, reasoning_gym, rollouts, mixture; perhaps you meant arithmetic"
    ]
    assert refuse("task: {terms: 2}") == [
        "task.kind: got nothing, want one of arithmetic, file, reasoning_gym, rollouts, mixture"
    ]
    assert refuse("update: {optimizer: {kind: 3}}") == [
        "update.optimizer.kind: got 3, want one of adamw, adafactor, lion, muon"
    ]
    (line,) = refuse("objective: {loss: {surrogate: {kind: clop}}}")
    assert line.startswith("objective.loss.surrogate.kind: got 'clop', want one of clip, cispo, ")
    (line,) = refuse("objective: verl:gropo")
    assert line.startswith("objective.preset: got 'verl:gropo', want one of paper:reinforce, paper:ppo, ")
    assert line.endswith("; perhaps you meant verl:grpo")


RULES = (
    "none, signal, difficulty_band, not_stale, max_variance, first_samples, best_by, not_cut_off, between, no_duplicates, "
    "no_repetition, own"
)


@pytest.mark.parametrize("section", ["filter", "refill.filter"])
@pytest.mark.parametrize(
    "rules, line",
    [
        (
            "[success, {kind: no_duplicate}]",
            f"1.kind: got 'no_duplicate', want one of {RULES}; perhaps you meant no_duplicates",
        ),
        ("[{all_of: [success]}, success]", f"0: got 'all_of', want one of {RULES}"),
        ("[[success]]", f"0: got 'chain', want one of {RULES}"),
        ("[auto]", f"0: got 'auto', want one of {RULES}"),
        ("[{keep: 3}]", f"0.kind: got nothing, want one of {RULES}"),
        ("{any_of: [{kind: own_}]}", f"any_of.0.kind: got 'own_', want one of {RULES}; perhaps you meant own"),
        (
            "{kind: chain, filters: [{kind: own_}]}",
            f"filters.0.kind: got 'own_', want one of {RULES}; perhaps you meant own",
        ),
        ("[{kind: best_by, keepp: 3}]", "0.keepp: no such key, perhaps you meant experience.SECTION.0.keep"),
        ("[{kind: not_stale, ngram: 3}]", "0.ngram: no such key with kind not_stale, only with no_repetition"),
        ("[{kind: not_stale, max_age: true}]", "0.max_age: got True, want a whole number"),
        ("{all_of: [{kind: not_stale, max_age: true}]}", "all_of.0.max_age: got True, want a whole number"),
        ("{all_of: success}", "all_of: got 'success', want a list, as [a, b]"),
        ("{all_of: [success], any_of: [success]}", "kind: got all_of and any_of, want all_of or any_of alone"),
    ],
)
def test_what_is_wrong_in_a_short_form_of_a_filter_is_said_where_it_stands(refuse, section, rules, line):
    text = f"experience: {{filter: {rules}}}" if section == "filter" else f"experience: {{refill: {{filter: {rules}}}}}"
    assert refuse(text) == [f"experience.{section}.{line.replace('SECTION', section)}"]


def test_a_replay_is_a_ring_or_ones_own(refuse):
    assert refuse("experience: {replay: {kind: ring}}") == [
        "experience.replay.function: got nothing, want a value",
        "experience.replay.kind: got 'ring', want 'own'",
    ]
    assert refuse("experience: {replay: {function: 3}}") == ["experience.replay.function: got 3, want text"]
    assert refuse("experience: {replay: {capacity: -1}}") == ["experience.replay.capacity: got -1, want 0 or more"]


def test_no_error_hides_another(refuse):
    """An unknown preset, a repeated key, an unknown kind and a tokenizer without a path, each beside all the others."""
    text = (
        "seed: x\nsteps: 1\nsteps: 2\nmesh: {data: 1, data: 2, fsdp: 0}\ntokenizer: {chat: false}\n"
        "task: {kind: arithmatic}\nobjective: {preset: zzz, advantage: {eps: -1}, loss: {surrogate: {kind: clop}}}\n"
    )
    assert [line.split(": ")[0] for line in refuse(text)] == [
        "the key 'steps' appears twice, want it once",
        "the key 'data' appears twice, want it once",
        "seed",
        "task.kind",
        "mesh.fsdp",
        "objective.advantage.eps",
        "objective.loss.surrogate.kind",
        "objective.preset",
        "tokenizer.path",
    ]
    # The other keys are checked against the preset that was probably meant: cispo has no `dual`.
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


def test_a_key_of_another_kind_is_no_typo(refuse):
    assert refuse("update: {optimizer: {clip_rms: 2}}") == [
        "update.optimizer.clip_rms: no such key with kind adamw, only with adafactor"
    ]
    assert refuse("model: {path: m, layers: 3}") == ["model.layers: no such key beside path"]
    assert refuse("tokenizer: {alphabet: ab, chat: false}") == ["tokenizer.chat: no such key beside alphabet"]


def test_controls_are_named_by_their_kind(refuse, read):
    kinds = "none, regex, json_schema, choice, allow, forbid, stop, budget, begin"
    assert refuse("rollout: {control: {kind: regexp}}") == [
        f"rollout.control.kind: got 'regexp', want one of {kinds}; perhaps you meant regex"
    ]
    assert refuse("rollout: {control: {kind: budget, then: {kind: stop}}}") == [
        "rollout.control.then.kind: got 'stop', want one of none, regex, json_schema, choice"
    ]
    assert refuse("rollout: {control: {kind: none, regex: a}}") == [
        "rollout.control.regex: no such key, want kind: regex and its settings"
    ]
    assert refuse("rollout: {control: {kind: choice, texts: [yes, 'no']}}") == [
        "rollout.control.texts.0: got True, want text"
    ]
    assert refuse("rollout: {control: {kind: choice, texts: []}}") == [
        "rollout.control.texts: got [], want 1 entries or more"
    ]
    schema = "rollout: {control: {kind: json_schema, schema: {type: object, properties: {kind: {type: string}}}}}"
    assert read(schema).rollout.control.schema == {"type": "object", "properties": {"kind": {"type": "string"}}}


def test_a_mesh_axis_of_zero_is_refused(refuse):
    assert refuse("mesh: {data: 0}") == ["mesh.data: got 0, want 1 or more, or -1 for what is left"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", ["not YAML", "line 1, column 5"]),
        ("seed: 1\nseed: 2", ["the key 'seed' appears twice, want it once: line 2, column 1"]),
        ("model: {layers: 1, layers: 2}", ["the key 'layers' appears twice, want it once: line 1, column 20"]),
        ("{[1, 2]: 3}", ["not YAML"]),
        ("seed: !!python/object/apply:os.getcwd []", ["not YAML", "could not determine a constructor"]),
        (b"seed: \xff", ["not YAML", "byte 0xff"]),
        (b"seed: \x00", ["not YAML", "#x0000"]),
    ],
)
def test_text_that_is_no_yaml_is_located(refuse, text, words):
    message = "\n".join(refuse(text))
    assert all(word in message for word in words), message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nope.yaml: cannot be read: No such file or directory"):
        load(tmp_path / "nope.yaml")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_all_errors_come_at_once(refuse):
    text = "stpes: 3\nseed: x\nmodel: {layers: 0, headz: 2}\nobjective: {loss: {surrogate: {low: 2}}}\n"
    names = sorted(line.split(": ")[0] for line in refuse(text))
    assert names == ["model.headz", "model.layers", "objective.loss.surrogate.low", "seed", "stpes"]


def test_numbers_without_a_dot_or_with_an_underscore(read):
    for text, want in (("1e-5", 1e-5), ("2E-4", 2e-4), ("1.5e+0", 1.5), ("3", 3.0), ("1.e-3", 1e-3), ("1_0e-1", 1.0)):
        lr = read(f"update: {{optimizer: {{lr: {text}}}}}").update.optimizer.lr
        assert lr == want and type(lr) is float, text
    # Text that only begins like a number stays text.
    assert read("run_dir: 1e5x").run_dir == "1e5x"


def test_a_kind_chooses_a_type(read):
    assert read("task: {kind: arithmetic, terms: 2}").task == ArithmeticTask(terms=2)
    assert read("task: {kind: file, path: a, held_out_path: b}").task == FileTask("a", held_out_path="b")
    given = read("objective: {loss: {surrogate: {high: 0.28}}}").objective
    assert given.loss == PolicyGradient(surrogate=Clip(high=0.28))
    assert read("objective: {loss: {kind: cross_entropy}}").objective.loss == CrossEntropy()
    assert read("objective: {preset: verl:dapo, loss: {aggregation: sequence}}").objective.loss == PolicyGradient(
        surrogate=Clip(low=0.2, high=0.28, dual=10.0), aggregation="sequence"
    )


def test_a_pretrained_model_has_its_own_tokenizer(read, refuse):
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


@pytest.mark.parametrize(
    "text",
    [
        "seed: 3",
        "model: {path: m}\ntokenizer: {stop: [x], template: {a: 1}}",
        "task: {kind: file, path: a, held_out_path: b}",
        "update: {optimizer: {lr: 1e-5}}",
    ],
)
def test_a_config_equals_the_one_read_from_its_yaml(read, text):
    cfg = read(text)
    assert read(to_yaml(cfg)) == cfg
    assert validate(to_dict(cfg), "test") == cfg


def overridden(tmp_path, *args: str, text: str = "seed: 3\nsteps: 7\n") -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_config(str(path), args)


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path):
    cfg = overridden(tmp_path, "--steps", "9", "--mesh.data", "-1", "--mesh.fsdp", "2", "--update.optimizer.lr", "3e-4")
    assert (cfg.seed, cfg.steps, cfg.mesh, cfg.update.optimizer.lr) == (3, 9, MeshConfig(-1, 2, 1), 3e-4)
    assert overridden(tmp_path) == load(tmp_path / "c.yaml")
    assert cfg.rollout == RolloutConfig()


def test_flags_change_parts_of_a_chosen_kind(tmp_path):
    assert overridden(tmp_path, "--objective.loss.kl.weight", "0.1").objective.loss == PolicyGradient(
        kl=KlConfig(weight=0.1)
    )
    assert overridden(tmp_path, "--task.terms", "2").task == ArithmeticTask(terms=2)
    file = "task: {kind: file, path: a, held_out_path: b}"
    assert overridden(tmp_path, "--task.path", "c", text=file).task == FileTask("c", held_out_path="b")
    assert overridden(tmp_path, "--model.qk-norm", "True").model.qk_norm is True


def test_a_flag_is_validated(tmp_path):
    with pytest.raises(UserError, match=r"^--update.optimizer.lr: got -1, want more than 0$"):
        overridden(tmp_path, "--update.optimizer.lr", "-1")


def test_a_run_directory_is_a_config(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: elsewhere\nseed: 5\n")
    cfg = read_config(str(tmp_path), [])
    assert (cfg.seed, cfg.run_dir) == (5, str(tmp_path))

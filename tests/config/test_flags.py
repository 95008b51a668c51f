"""Flags: every key of the config, in every variant of every section, can be set by its path."""

import dataclasses
import typing
from functools import cache, reduce
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from jaxrl_llm import cli
from jaxrl_llm.cli import read_config
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import NoDuplicates, Signal
from jaxrl_llm.model.config import LinearRope, ModelConfig, PretrainedModel
from jaxrl_llm.objective.loss_config import Cispo, Clip, KlConfig, PolicyGradient
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.tasks.config import ArithmeticTask, CharacterTokenizer, FileTask, PretrainedTokenizer
from jaxrl_llm.update.optimizer.config import AdamW, GroupConfig, Lion, Muon

ROOT = Path(__file__).parents[2]
TASKS = "arithmetic, file, reasoning_gym, rollouts, mixture"
# Values to set: the first that the type accepts and that is not the default. Some are text that YAML reads as something else.
CANDIDATES = (
    3, 7, 2, 0, 0.5, 0.25, 1.5, True, False, "a: b, 007", "{question} [1]", "{prompt} {response}", "a.*", {"a": {"b": 1}},
    [{"kind": "first_samples", "keep": 2}],
    [{"values": [1]}],
    [{"match": "layers/.*", "lr_scale": 0.5}], [{"grader": "numeric", "weight": 2.0}], [0.25, 0.5], [5, "x"], [3], [True],
    ["q", "down"], ["x", "# y"], ["reference_logprobs"], {"a": 0.5}, {"a": "b"}, None, "easy", [{"name": "easy", "weight": 2.0}],
)  # fmt: skip


def members(annotation) -> list:
    """Members of a union; dataclasses without their Annotated."""
    inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation
    if typing.get_origin(inner) in (typing.Union, type(int | str)):
        return [m for part in typing.get_args(inner) for m in members(part)]
    return [inner]


@cache
def reader(annotation) -> TypeAdapter:
    return TypeAdapter(annotation)


def value_for(section: type, field: dataclasses.Field) -> tuple:
    """A value to give, and the value that the config then has."""
    words = [x for m in members(field.type) if typing.get_origin(m) is typing.Literal for x in typing.get_args(m)]
    presets = ["paper:cispo"] if field.name == "preset" else []
    # In place of a section, "a: b" would be one.
    section_or_text = [x for x in ("a.*",) if any(dataclasses.is_dataclass(m) for m in members(field.type))]
    for value in (*presets, *words, *section_or_text, *CANDIDATES):
        try:
            read = reader(field.type).validate_python(value, strict=not isinstance(value, list | dict))
        except ValidationError:
            continue
        if read != field.default and (isinstance(value, bool) == isinstance(read, bool)):
            return value, read
    assert field.name == "kind", (section, field)
    return field.default, field.default


def leaves(section: type, path: tuple = (), needs: tuple = ()):
    """(path, value to give, value to read, other values required) for each field of each variant."""
    fields = dataclasses.fields(section)
    required = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    needs = (*needs, *(((*path, f.name), value_for(section, f)[0]) for f in required))
    if section is PretrainedTokenizer:  # its directory, which model.path would give as well
        needs = (*needs, ((*path, "path"), "t"))
    for field in fields:
        place, variants = (*path, field.name), [m for m in members(field.type) if dataclasses.is_dataclass(m)]
        for variant in variants:
            kind = {f.name: f.default for f in dataclasses.fields(variant)}.get("kind")
            chosen = (((*place, "kind"), kind),) if kind and len(variants) > 1 else ()
            yield from leaves(variant, place, needs + chosen)
        for entry in (typing.get_args(m)[0] for m in members(field.type) if typing.get_origin(m) is tuple):
            if dataclasses.is_dataclass(entry):
                yield from leaves(entry, (*place, "0"), needs)
        if len(variants) < len(members(field.type)) and not (variants and type(None) in members(field.type)):
            yield place, *value_for(section, field), needs


LEAVES = list(leaves(RunConfig))


def text(value) -> str:
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("flags") / "c.yaml"
    path.write_text("seed: 0\n")
    return str(path)


def test_the_walk_covers_all_kinds_of_values():
    paths = {".".join(path) for path, *_ in LEAVES}
    assert len(LEAVES) > 350 and len(paths) > 180
    assert paths >= {
        "run_dir", "task.kind", "task.terms", "task.too_long", "task.config", "model.path", "model.rope_scaling.original_length",
        "model.sliding", "tokenizer.template", "rollout.stop", "rollout.engine.layout", "rollout.engine.layout.fsdp",
        "reward.graders.0.weight", "update.optimizer.groups.0.match", "update.optimizer.clip_rms", "objective.preset",
        "objective.loss.surrogate.dual", "objective.loss.correction.threshold", "objective.advantage.lam", "metrics.tensorboard",
    }  # fmt: skip


@pytest.mark.parametrize("part", sorted({path[0] for path, *_ in LEAVES}))
def test_every_value_can_be_set_by_its_path(empty, part):
    wrong = []
    for path, given, want, needs in LEAVES:
        if path[0] != part:
            continue
        # The flag that chooses the variant comes last, to show that the order does not matter.
        args = ["--" + ".".join(path), text(given), *(f"--{'.'.join(p)}={text(v)}" for p, v in needs if p != path)]
        got = reduce(lambda x, n: x[int(n)] if n.isdigit() else getattr(x, n), path, read_config(empty, args))
        if (type(got), got) != (type(want), want):
            wrong.append((args, got))
    assert wrong == []


def test_help_lists_every_value(empty, capsys):
    assert cli.main(["train", empty, "--help"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("--")}
    assert {"--" + ".".join(path) for path, *_ in LEAVES} <= listed


def read(tmp_path, yaml_text: str, *args: str) -> RunConfig:
    (tmp_path / "c.yaml").write_text(yaml_text)
    return read_config(str(tmp_path / "c.yaml"), args)


def refused(tmp_path, yaml_text: str, *args: str) -> list[str]:
    with pytest.raises(UserError) as error:
        read(tmp_path, yaml_text, *args)
    return str(error.value).replace(f"{tmp_path}/c.yaml: ", "FILE ").splitlines()


SIZES = "model: {layers: 3, heads: 8}\n"
PRETRAINED = "model: {path: m, compute: float32}\n"


def test_the_layout_is_a_name_or_mesh_axes(tmp_path):
    def layout(text, *args):
        return read(tmp_path, text, *args).rollout.engine.layout

    assert layout("seed: 0", "--rollout.engine.layout", "wide") == "wide"
    assert layout("seed: 0", "--rollout.engine.layout.tensor", "2") == MeshConfig(tensor=2)
    assert layout("seed: 0", "--rollout.engine.layout", "{data: 2, fsdp: 1}") == MeshConfig(2, 1)
    axes = "rollout: {engine: {layout: {data: 2}, decode_chunk: 9}}"
    assert layout(axes, "--rollout.engine.layout.fsdp", "4") == MeshConfig(2, 4)
    assert layout(axes, "--rollout.engine.layout=replicated") == "replicated"
    assert read(tmp_path, axes, "--rollout.engine.layout=wide").rollout.engine.decode_chunk == 9


def test_a_path_replaces_the_sizes_of_a_model(tmp_path):
    cfg = read(tmp_path, SIZES, "--model.path", "m")
    assert cfg.model == PretrainedModel("m") and cfg.tokenizer == PretrainedTokenizer("m")
    cfg = read(
        tmp_path,
        SIZES,
        "--model.compute",
        "float32",
        "--model.path",
        "m",
        "--tokenizer.template.enable_thinking=false",
    )
    assert cfg.model == PretrainedModel("m", "float32")
    assert cfg.tokenizer == PretrainedTokenizer("m", template={"enable_thinking": False})
    assert read(tmp_path, PRETRAINED, "--model.path", "n").model == PretrainedModel("n", "float32")
    assert read(tmp_path, SIZES, "--model.heads", "4").model == ModelConfig(layers=3, heads=4)


def test_sizes_beside_a_path_are_refused_but_a_section_of_them_replaces_it(tmp_path):
    """A flag for one number must not discard the checkpoint."""
    assert refused(tmp_path, PRETRAINED, "--model.layers", "2") == ["--model.layers: no such key beside path"]
    assert read(tmp_path, PRETRAINED, "--model", "{layers: 2}").model == ModelConfig(layers=2)
    assert read(tmp_path, PRETRAINED, "--model", "{compute: bfloat16}").model == PretrainedModel("m", "bfloat16")


def test_a_tokenizer_is_chosen_by_a_key_that_only_it_has(tmp_path):
    letters = "tokenizer: {alphabet: ab}"
    assert read(tmp_path, letters, "--tokenizer.path", "t").tokenizer == PretrainedTokenizer("t")
    assert read(tmp_path, "tokenizer: {path: t}", "--tokenizer.alphabet", "01").tokenizer == CharacterTokenizer("01")
    assert read(tmp_path, PRETRAINED, "--tokenizer.stop.0", "#").tokenizer == PretrainedTokenizer("m", stop=("#",))


def test_another_kind_starts_from_its_own_defaults(tmp_path):
    file = "update: {optimizer: {lr: 0.5, b1: 0.3}}\nobjective: {loss: {surrogate: {high: 0.3}}}\n"
    assert read(tmp_path, file, "--update.optimizer.kind", "lion").update.optimizer == Lion()
    assert read(tmp_path, file, "--update.optimizer.kind", "adamw").update.optimizer == AdamW(lr=0.5, b1=0.3)
    given = read(tmp_path, file, "--update.optimizer.lr", "3e-4", "--update.optimizer", "{kind: muon, rms: 1}")
    assert given.update.optimizer == Muon(lr=3e-4, rms=1.0)
    assert read(tmp_path, file, "--update.optimizer", "{b1: 0.5}").update.optimizer == AdamW(lr=0.5, b1=0.5)
    assert read(tmp_path, file, "--objective.loss.surrogate.kind=cispo").objective.loss.surrogate == Cispo()
    assert read(tmp_path, "seed: 0", "--task", "{kind: file, path: p}").task == FileTask("p")
    assert read(tmp_path, "task: {kind: file, path: p}", "--task.kind", "arithmetic").task == ArithmeticTask()
    scaled = ("--model.rope_scaling.factor", "8", "--model.rope_scaling.kind", "linear")
    assert read(tmp_path, SIZES, *scaled).model == ModelConfig(layers=3, heads=8, rope_scaling=LinearRope(8.0))
    turned = "model: {rope_scaling: {kind: linear, factor: 8}}"
    assert read(tmp_path, turned, "--model.rope_scaling", "null").model.rope_scaling is None


def test_the_kind_of_a_loss_term_does_not_choose_a_section(tmp_path):
    """`kl` is one section for all kinds: its weight, from the file or the preset's 0.04, stays."""
    assert read(
        tmp_path, "objective: {loss: {kl: {weight: 0.5}}}", "--objective.loss.kl.kind", "k2"
    ).objective.loss.kl == KlConfig("k2", 0.5)
    assert read(tmp_path, "objective: paper:grpo", "--objective.loss.kl.kind=k2").objective.loss.kl == KlConfig(
        "k2", 0.04
    )
    assert read(tmp_path, "objective: {preset: paper:grpo, loss: {kl: {kind: k2}}}").objective.loss.kl == KlConfig(
        "k2", 0.04
    )


def test_a_preset_replaces_the_parts_of_the_file(tmp_path):
    file = "objective: {preset: paper:grpo, loss: {aggregation: prompt}}"
    gspo = PolicyGradient(ratio="sequence", aggregation="sequence", surrogate=Clip(low=3e-4, high=4e-4))
    for preset in (
        ["--objective", "paper:gspo"],
        ["--objective.preset=paper:gspo"],
        ["--objective={preset: 'paper:gspo'}"],
    ):
        assert read(tmp_path, file, *preset).objective.loss == gspo
        weighed = read(tmp_path, file, "--objective.loss.kl.weight", "0.1", *preset).objective
        assert weighed.loss == dataclasses.replace(gspo, kl=KlConfig(weight=0.1)) and weighed.preset == "paper:gspo"


def test_lists_and_mappings(tmp_path):
    graders = "reward: {graders: [numeric, {grader: format, weight: 0.2}], workers: 3}"
    cfg = read(tmp_path, graders, "--reward.graders.0.weight", "0.5", "--reward.graders.2", "length")
    assert [(g.grader, g.weight) for g in cfg.reward.graders] == [("numeric", 0.5), ("format", 0.2), ("length", 1.0)]
    assert cfg.reward.workers == 3
    short = read(
        tmp_path, "reward: numeric", "--reward.graders.0.options.tolerance", "0.1", "--reward.workers=5"
    ).reward
    assert (short.graders[0].grader, short.graders[0].options, short.workers) == ("numeric", {"tolerance": 0.1}, 5)
    default = read(tmp_path, "reward: {workers: 5}", "--reward.graders.0.weight", "2").reward
    assert (default.graders[0].grader, default.graders[0].weight, default.workers) == ("exact_match", 2.0, 5)
    assert [g.grader for g in read(tmp_path, graders, "--reward", "a.b:c").reward.graders] == ["a.b:c"]
    stop = "rollout: {stop: [a, b]}"
    assert read(tmp_path, stop, "--rollout.stop", '["</answer>", "007"]').rollout.stop == ("</answer>", "007")
    assert read(tmp_path, stop, "--rollout.stop.1", "Q: ").rollout.stop == ("a", "Q: ")
    assert read(tmp_path, stop, "--rollout.stop", "[]").rollout.stop == ()
    gym = "task: {kind: reasoning_gym, name: n, config: {min_terms: 1, ops: [a, b]}}"
    cfg = read(tmp_path, gym, "--task.config.max_terms", "4", "--task.config.ops.1", "c")
    assert cfg.task.config == {"min_terms": 1, "max_terms": 4, "ops": ["a", "c"]}
    assert read(tmp_path, gym, "--task.config", "{x: 1}").task.config == {"x": 1}
    groups = read(tmp_path, "seed: 0", "--update.optimizer.groups.0.match", "embed").update.optimizer.groups
    assert groups == (GroupConfig("embed"),)


@pytest.mark.parametrize(
    "file", ["seed: 0", "experience: {filter: [none]}", "experience: {filter: {any_of: [reward]}}"]
)
@pytest.mark.parametrize("kind", ["chain", "all_of", "any_of"])
def test_a_composed_filter_replaces_that_of_the_file(tmp_path, file, kind):
    both = (Signal(by="success"), NoDuplicates())
    parts = f"{{{kind}: [success, {{kind: no_duplicates}}]}}"
    experience = read(tmp_path, file, "--experience.filter", parts, "--experience.refill.filter", parts).experience
    assert (experience.filter.kind, experience.filter.filters) == (kind, both)
    assert (experience.refill.filter.kind, experience.refill.filter.filters) == (kind, both)


def test_text_stays_text_and_numbers_become_numbers(tmp_path):
    args = [
        "--run-dir",
        "007",
        "--task.held-out",
        "1_0",
        "--tokenizer.alphabet",
        "null#",
        "--update.optimizer.lr",
        "1e-3",
    ]
    cfg = read(tmp_path, "seed: 0", *args, "--rollout.raw_logprobs", "true", "--update.guards.max_mismatch_kl", "None")
    assert (cfg.run_dir, cfg.task.held_out, cfg.tokenizer.alphabet) == ("007", 10, "null#")
    assert (cfg.update.optimizer.lr, cfg.rollout.raw_logprobs, cfg.update.guards.max_mismatch_kl) == (1e-3, True, None)
    assert read(tmp_path, "seed: 0", "--mesh.data", "-1", "--mesh.fsdp=2").mesh == MeshConfig(-1, 2)
    assert read(tmp_path, "seed: 0", "--run_dir=--x=y").run_dir == "--x=y"
    assert read(tmp_path, "task: {kind: file, path: a}", "--task.answer", "").task.answer == ""


def test_the_last_of_two_flags_counts_and_a_part_overrides_its_section(tmp_path):
    assert read(tmp_path, "seed: 0", "--seed", "1", "--seed=2").seed == 2
    args = [
        "--update.optimizer.lr",
        "0.1",
        "--update.optimizer",
        "{lr: 0.2, b1: 0.5}",
        "--update",
        "{epochs: 3, optimizer: {b1: 0.4}}",
    ]
    cfg = read(tmp_path, "seed: 0", *args, "--mesh.data", "2", "--mesh", "{data: 4}", "--mesh.data", "3")
    assert (cfg.update.epochs, cfg.update.optimizer.b1, cfg.mesh.data) == (3, 0.4, 3)


@pytest.mark.parametrize(
    "args, lines",
    [
        (["wide"], ["wide: got a word that belongs to no flag, want --section.field VALUE"]),
        (["--seed", "1", "-x"], ["-x: got a word that belongs to no flag, want --section.field VALUE"]),
        (["--seed"], ["--seed: got no value, want --seed VALUE; --seed=VALUE where it begins with --"]),
        (["--model.pth", "x"], ["--model.pth: no such flag, perhaps you meant --model.path"]),
        (["--model.layerz", "2"], ["--model.layerz: no such flag, perhaps you meant --model.layers"]),
        (
            ["--temperature", "1"],
            ["--temperature: no such flag, perhaps you meant --rollout.temperature or --rollout.per_sample.temperature"],
        ),
        (["--lr", "1"], ["--lr: no such flag, perhaps you meant --warm_start.optimizer.lr or --update.optimizer.lr"]),
        (["--update.optimizr.lr", "1"], ["--update.optimizr.lr: no such flag, perhaps you meant --update.optimizer.lr"]),
        (["--seed.x", "1"], ["--seed.x: no such flag"]),
        (["--resum", "--zzz=1"], ["--resum: no such flag, perhaps you meant --resume", "--zzz: no such flag"]),
        (["--update.optimizer", "{lrr: 1}"], ["--update.optimizer.lrr: no such key, perhaps you meant --update.optimizer.lr"]),
        (["--update.optimizer.clip_rms", "1"], ["--update.optimizer.clip_rms: no such key with kind adamw, only with adafactor"]),
        (["--task.kind", "fil"], [f"--task.kind: got 'fil', want one of {TASKS}; perhaps you meant file"]),
        (["--task.kind", "file"], ["--task.path: got nothing, want a value"]),
        (["--rollout.stop", "ab"], ["--rollout.stop: got 'ab', want a list, as [a, b]"]),
        (["--lora.targets.9", "q"], ["--lora.targets.9: got entry 9 of a list that has 7, want 7 at most: entries count from 0"]),
        (["--mesh", "{data: 1, data: 2}"], ["--mesh: the key 'data' appears twice, want it once: line 1, column 11"]),
        (["--tokenizer.chat", "false"], ["--tokenizer.path: got nothing, want a directory, since model has no path either"]),
        (["--model.path", "a/b", "--model.layers", "2"], ["--model.layers: no such key beside path"]),
        (["--seed", "true"], ["--seed: got True, want a whole number"]),
        (["--update.optimizer", "{lr: true}"], ["--update.optimizer.lr: got True, want a number"]),
        (["--evaluation.threshold", "false"], ["--evaluation.threshold: got False, want a number"]),
        (["--resume=yes"], ["--resume: got a value, or stands where it is not read, want --resume alone"]),
        (["--update.optimizer", "lion"], ["--update.optimizer: got 'lion', want a section, as {key: value}"]),
        (["--reward", "[]"], ["--reward: got [], want a section, as {key: value}"]),
        (["--rollout.stop", "[3]"], ["--rollout.stop.0: got 3, want text"]),
        (["--lora.targets", "[x]"], ["--lora.targets.0: got 'x', want 'q', 'k', 'v', 'o', 'gate', 'up' or 'down'"]),
        (["--seed", str(2**32)], ["--seed: got 4294967296, want less than 4294967296"]),
        (["--steps", "1.5"], ["--steps: got 1.5, want a whole number"]),
    ],
)  # fmt: skip
def test_errors_about_flags(tmp_path, args, lines):
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError) as error:
        read_config(str(tmp_path / "c.yaml"), args, ["--resume"])
    assert str(error.value).replace(f"{tmp_path}/c.yaml: ", "FILE ").splitlines() == lines


def test_errors_in_the_file_and_on_the_command_line_come_at_once(tmp_path):
    file = "seed: x\nstpes: 1\nsteps: 1\nsteps: -2\nobjective: {preset: verl:gropo, loss: {kl: {weight: -1}}}\nmesh: {data: 0}\n"
    lines = refused(
        tmp_path, file, "--mesh.fsdp", "0", "wide", "--rollout.prompts=0", "--mesh.data", "1", "--modle.path", "m"
    )
    assert [line.split(": ")[0] for line in lines] == [
        "FILE the key 'steps' appears twice, want it once",
        "wide",
        "--modle.path",
        "FILE seed",
        "FILE steps",
        "--mesh.fsdp",
        "--rollout.prompts",
        "FILE objective.loss.kl.weight",
        "FILE stpes",
        "FILE objective.preset",
    ]
    assert refused(tmp_path, "a: [", "--seeed", "1")[-1] == "--seeed: no such flag, perhaps you meant --seed"


@pytest.mark.parametrize(
    "file", ["model: 3", "model: [1]", "model: words", "reward: {graders: 3}", "rollout: {stop: a}"]
)
def test_a_flag_for_a_part_does_not_hide_that_the_file_has_no_section_there(tmp_path, file):
    args = ["--model.layers=2", "--reward.graders.0.weight=2", "--rollout.stop.0=x"]
    (line,) = refused(tmp_path, file, *args)
    assert line.startswith(f"FILE {'.'.join(file.replace('{', '').split(': ')[:-1])}: got ")
